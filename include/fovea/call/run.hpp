// SPDX-License-Identifier: Apache-2.0
// A call bound to its tensors, and one lane of it: what front doors and mechanisms share below their policies.
#pragma once
#include <atomic>
#include <cmath>
#include <span>
#include <type_traits>

#include "../core/attention_options.hpp"
#include "../core/status.hpp"
#include "../engine/parts/codecs.hpp"
#include "../engine/parts/epilogues.hpp"
#include "../engine/parts/masks.hpp"
#include "../engine/parts/normalizers.hpp"
#include "../engine/parts/scores.hpp"
#include "../engine/parts/sources.hpp"
#include "../engine/tile_engine.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

using OptionScore = Then<Then<Softcap, Alibi>, Bias>;
using OptionMask = Both<Band, Both<Tree, StoredMask>>;

// A plan bound to tensors, options and a workspace. prepare() fills it; the lanes of one run share it.
class AttentionRun {
 public:
  const Plan* plan = nullptr;
  Queries queries{};
  StoredSource source{};
  OptionScore score{};
  OptionMask mask{};
  Softmax norm{};
  Store epilogue{};
  const void* variant = nullptr;                // of a variant's call; `lane` knows its type
  const KeyRanges* lists = nullptr;             // of a sparse call
  void (*lane)(AttentionRun&, int) = nullptr;   // the engine for the panels in use
  std::byte* workspace = nullptr;
  std::size_t lane_bytes = 0;
  int lanes = 0;   // slices the workspace holds
  std::atomic<index_t> next_task{0};

  bool modified() const {
    return score.first.first.cap != 0.f || score.first.second.slopes || score.second.bias || mask.second.first.words ||
           mask.second.second.keep;
  }
};

inline float scale_of(const AttentionOptions& options, index_t dim_qk) {
  return options.scale ? *options.scale : 1.f / std::sqrt(static_cast<float>(dim_qk));
}

inline Reach reach_of(const AttentionOptions& options) {
  const index_t right = options.window.right < 0 ? kUnbounded : std::min(options.window.right, kUnbounded);
  return {options.window.left < 0 ? kUnbounded : std::min(options.window.left, kUnbounded),
          options.causal == Causal::none ? right : std::min<index_t>(right, 0)};
}

// Everything but the kernels and the workspace.
inline void bind(AttentionRun& run, const Plan& plan, const Operand& q, const Kv& kv, const Result& out,
                 const AttentionOptions& options) {
  run.plan = &plan;
  run.queries = {q, scale_of(options, plan.request.dim_qk), kv.k_channel_scale, plan.request.q_heads / kv.kv_heads};
  run.source = {kv, plan.sequences.data(), {}, {}};
  run.score = {{{options.softcap}, {options.alibi_slopes.empty() ? nullptr : options.alibi_slopes.data()}},
               {tidy(options.bias)}};
  run.mask = {{plan.request.reach},
              {{options.tree.empty() ? nullptr : options.tree.data(), plan.sequences.data()},
               {tidy(options.keep), tidy(options.bias)}}};
  run.norm = {options.sink.empty() ? nullptr : options.sink.data(), options.lse.data != nullptr};
  run.epilogue = {out, options.lse, plan.sequences.data()};
}

// Lays the lanes' slices and the partials out in `workspace` and resets the counters.
inline void open_workspace(AttentionRun& run, std::span<std::byte> workspace, int lanes) {
  Bump lane;
  carve_lane(lane, *run.plan);
  run.workspace = aligned(workspace).data();
  run.lane_bytes = lane.used();
  run.lanes = lanes;
  Bump shared(run.workspace);
  const SharedMemory memory = carve_shared(shared, *run.plan);
  for (std::size_t b = 0; memory.open != nullptr && b < run.plan->blocks.size(); ++b)
    memory.open[b] = run.plan->blocks[b].splits;
  run.next_task.store(0, std::memory_order_relaxed);
}

// Runs the lane's share of the tasks. A lane the workspace has no slice for does nothing; the others draw all tasks.
template <class PanelType, class Spec>
void tile_lane(AttentionRun& run, int lane, const Spec& spec) {
  if (lane < 0 || lane >= run.lanes) return;
  Bump shared_bytes(run.workspace);
  const SharedMemory shared = carve_shared(shared_bytes, *run.plan);
  Bump lane_bytes(run.workspace + shared_bytes.used() + run.lane_bytes * static_cast<std::size_t>(lane));
  const LaneMemory memory = carve_lane(lane_bytes, *run.plan);
  run_tiles<PanelType>(*run.plan, run.queries, spec, memory, shared, run.next_task);
}

// The storage formats a call is compiled for, and what follows from them: which kernels and which engine a run gets.
constexpr bool is_narrow(Format format) { return format != Format::f32 && format != Format::f64; }

// Lanes::lane<PanelType> is the lane function.
template <class Lanes, Format... List>
Status bind_kernels(AttentionRun& run, Formats<List...> formats) {
  const auto take = [&]<class PanelType>(std::type_identity<PanelType>) -> Status {
    const auto find = [&](const Kv& stored, KvKernels& kernels) -> Status {
      kernels = {key_kernels<PanelType>(stored.k.format, formats), value_kernels<PanelType>(stored.v.format, formats)};
      if (kernels.k.pack != nullptr && kernels.v.pack != nullptr) return {};
      return Status::error(Code::unsupported, "fovea: k is stored as %s, v as %s: not both among the formats of this call",
                           name_of(stored.k.format), name_of(stored.v.format));
    };
    run.lane = &Lanes::template lane<PanelType>;
    if (Status s = find(run.source.kv, run.source.kernels); !s.ok()) return s;
    return run.source.kv.exact == nullptr ? Status{} : find(*run.source.kv.exact, run.source.exact_kernels);
  };
  if (run.plan->request.panels == Panels::f32) return take(std::type_identity<F32Panels>{});
#if defined(__AVX512BF16__)
  const Kv& kv = run.source.kv;
  const Kv& exact = kv.exact == nullptr ? kv : *kv.exact;
  if constexpr ((is_narrow(List) || ...)) {
    if (is_narrow(kv.k.format) && is_narrow(kv.v.format) && is_narrow(exact.k.format) && is_narrow(exact.v.format))
      return take(std::type_identity<Bf16Panels>{});
  }
#endif
  return Status::error(Code::unsupported, "fovea: bf16 panels would round k and v, which are stored wider (%s, %s)",
                       name_of(run.source.kv.k.format), name_of(run.source.kv.v.format));
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
