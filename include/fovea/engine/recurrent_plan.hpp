// SPDX-License-Identifier: Apache-2.0
// Which form a recurrent call takes, and its tasks. Pure: shape, options and the table of engine/recurrent_table.hpp.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <string>

#include "../simd/tiles.hpp"
#include "recurrent_table.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// States that a task keeps in L2, next to its rows.
inline constexpr index_t kGroupStateBytes = 512 * 1024;

inline bool can_step(const RecurrentRun& run) {
  if (!run.final_state || run.read_last) return false;
  const auto fits = [&](const auto& states) { return !states || states.stride[3] == 1 || states.extent[3] == 1; };
  return fits(run.final_state);
}

// What a mechanism does to a state, as far as its speed depends on it.
struct RecurrentKind {
  Written written;
  bool by_key;   // factors per key channel
};
template <class Spec>
constexpr RecurrentKind kind_of() {
  return {Spec::UpdateOf::kind, Spec::DecayOf::kind == Decayed::key};
}

// The row of the largest measured state that is not larger than this one, else of the smallest.
inline const FormLimits& form_limits(const RecurrentKind& kind, index_t dim_k, index_t dim_v) {
  constexpr index_t kTableLanes = kLanes >= 16 ? 16 : kLanes >= 8 ? 8 : 4;
  const FormLimits* found = nullptr;
  for (const FormLimits& row : kFormLimits) {
    if (row.lanes != kTableLanes || row.written != kind.written || row.by_key != kind.by_key) continue;
    if (found == nullptr || row.dim * row.dim <= dim_k * dim_v) found = &row;
  }
  FOVEA_ASSERT(found != nullptr);
  return *found;
}

// Tokens of the longest sequence.
inline index_t longest_sequence(const RecurrentShape& shape, std::span<const index_t> cu_len) {
  index_t longest = 0;
  for (index_t n = 0; n < shape.sequences; ++n) {
    const SequenceRun tokens = sequence_run(shape, cu_len, n);
    longest = std::max(longest, tokens.end - tokens.begin);
  }
  return longest;
}

// states: how many matrices a head keeps at a time. tile_chunk: where chunks are to multiply in tiles of bf16, their length.
inline RecurrentPlan plan_recurrent(const RecurrentRun& run, const RecurrentOptions<float>& options, const RecurrentKind& kind,
                                    index_t states = 1, index_t tile_chunk = 0) {
  const RecurrentShape& shape = run.shape;
  const FormLimits& limits = form_limits(kind, shape.dim_k, shape.dim_v);
  RecurrentPlan plan;
  const index_t longest = longest_sequence(shape, options.cu_len);
  const index_t all = options.cu_len.empty() ? shape.sequences * shape.len : options.cu_len.back();
  const index_t busy = all / std::max<index_t>(longest, 1);   // sequences, were all as long as the longest
  plan.form = options.form;
  if (plan.form == RecurrentForm::automatic) {
    const bool steps = longest <= limits.step_up_to && can_step(run);
    plan.form = steps ? RecurrentForm::step : longest <= limits.fused_up_to ? RecurrentForm::fused : RecurrentForm::chunked;
  }
  if (run.read_last) plan.form = RecurrentForm::chunked;
  if (plan.form == RecurrentForm::step && !can_step(run)) plan.form = RecurrentForm::fused;
  if (plan.form == RecurrentForm::chunked && tile_chunk > 0) plan.panels = Panels::bf16;
  plan.chunk = options.chunk != 0 ? options.chunk : plan.panels == Panels::bf16 ? tile_chunk : limits.chunk;
  const index_t panels = value_panels(shape);
  const index_t wanted = 2 * options.executor.lanes();
  if (plan.form == RecurrentForm::chunked) {
    // Heads that share keys share their scores. In a token-major tensor one page also serves the rows of all heads; in a
    // head-major one every further head is a further stream to fetch.
    const index_t sharing = shape.state_heads / shape.k_heads;
    const bool token_major = std::abs(run.v.stride[1]) < std::abs(run.v.stride[2]);
    const index_t state = states * padded_dim_k(shape) * panels * kPanel * static_cast<index_t>(sizeof(float));
    const index_t most = std::clamp<index_t>(kGroupStateBytes / state, 1, shape.state_heads);
    plan.group = token_major ? most : std::min(most, sharing);
    if (options.executor.lanes() > 1) {
      const index_t fair = busy * shape.state_heads / wanted;
      plan.group = std::clamp<index_t>(fair, 1, plan.group);
    }
    if (plan.group > sharing) plan.group = plan.group / sharing * sharing;
  } else if (plan.form == RecurrentForm::step) {
    // Heads that follow each other in memory, so that the next state can be fetched while one is worked on.
    const index_t fair = busy * shape.state_heads / (2 * wanted);
    plan.group = std::clamp<index_t>(fair, 1, shape.state_heads);
  }
  plan.groups = (shape.state_heads + plan.group - 1) / plan.group;
  // Value tiles only where heads are too few to give each lane two tasks; and not where a key sum is updated in place, which
  // every tile reads and one writes.
  const index_t whole = shape.sequences * plan.groups;
  const bool one_tile = options.executor.lanes() == 1 || whole == 0 || whole >= wanted ||
                        (run.initial_key_sum && run.initial_key_sum.data == run.final_key_sum.data);
  const index_t tiles = one_tile ? 1 : std::min(panels, (wanted + whole - 1) / whole);
  plan.tile_panels = (panels + tiles - 1) / tiles;
  plan.tiles = (panels + plan.tile_panels - 1) / plan.tile_panels;
  plan.tasks = whole * plan.tiles;
  return plan;
}

inline std::string describe(const RecurrentPlan& plan) {
  const bool chunks = plan.form == RecurrentForm::chunked, in_place = plan.form == RecurrentForm::step;
  const char* const how = chunks     ? "matrix products over chunks of tokens"
                          : in_place ? "token by token, the state where it lies"
                                     : "token by token, the state in the workspace";
  char chunk[96] = "none";
  if (chunks)
    std::snprintf(chunk, sizeof chunk, "%td tokens, %s panels", plan.chunk,
                  plan.panels == Panels::f32 ? "f32" : kHasTiles ? "bf16 (AMX)" : "bf16");
  char text[512];
  std::snprintf(text, sizeof text,
                "form        %s (%s)\n"
                "chunk       %s\n"
                "tasks       %td: %td groups of up to %td states, values in %td tiles of up to %td panels of %td\n"
                "isa         " FOVEA_ARCH_NAME "\n",
                name_of(plan.form), how, chunk, plan.tasks, plan.groups, plan.group, plan.tiles, plan.tile_panels, kPanel);
  return text;
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
