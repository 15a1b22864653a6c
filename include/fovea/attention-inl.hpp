// SPDX-License-Identifier: Apache-2.0
// Behind front door 1: the thread-local workspace, the calls, merge, cascade and weights.
#pragma once
#include <cmath>
#include <memory>
#include <new>

#include "attention-checks.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {
namespace door {

// The library's own memory for callers who bring none: one per thread, kept between calls. A call from inside a call (a
// work-stealing pool may do that) finds it busy and takes memory of its own.
struct Local {
  Plan plan;
  AttentionRun run;
  std::unique_ptr<std::byte[]> bytes;
  std::size_t size = 0;
  bool busy = false;

  std::span<std::byte> workspace(std::size_t wanted) {
    if (size < wanted) {
      bytes.reset();
      bytes.reset(new (std::nothrow) std::byte[wanted]);
      size = bytes ? wanted : 0;
    }
    return {bytes.get(), size};
  }
};
inline Local& thread_local_memory() {
  thread_local Local local;
  return local;
}
template <class F>
auto with_local(const F& f) {
  Local& shared = thread_local_memory();
  if (shared.busy) {
    Local own;
    return f(own);
  }
  struct Busy {   // also when a pool throws
    bool& flag;
    explicit Busy(bool& f) : flag(f) { flag = true; }
    ~Busy() { flag = false; }
  } busy(shared.busy);
  return f(shared);
}

inline Status check_workspace(std::span<std::byte> workspace, std::size_t wanted) {
  if (workspace.size() >= wanted) return {};
  return Status::error(Code::workspace_too_small, "fovea: workspace has %zu bytes, the plan needs %zu", workspace.size(),
                       wanted);
}

inline int lanes_for(const Plan& plan, const AttentionOptions& options) {
  return static_cast<int>(
      std::min<index_t>(options.executor.lanes(), std::max<index_t>(static_cast<index_t>(plan.tasks.size()), 1)));
}

// One call, its strides tidied; `kernels` gives a bound run the kernels of the formats the call was compiled for.
struct Call {
  Operand q;
  Kv kv;
  Result out;
  const AttentionOptions& options;
  Status (*kernels)(AttentionRun& run);
};

// Everything else has been checked.
inline Status execute(AttentionRun& run, std::span<std::byte> workspace, int slices, const Plan& plan, const Call& call) {
  if (Status status = check_workspace(workspace, plan.workspace_bytes(slices)); !status.ok()) return status;
  bind(run, plan, call.q, call.kv, call.out, call.options);
  if (Status status = call.kernels(run); !status.ok()) return status;
  open_workspace(run, workspace, slices);
  const int lanes = std::min(lanes_for(plan, call.options), slices);
  if (lanes == 1) {
    run.lane(run, 0);
  } else {
    const auto lane = [&run](int i) { run.lane(run, i); };
    call.options.executor.run(lanes, lane);
  }
  return {};
}

inline Status execute(Local& local, const Plan& plan, const Call& call) {
  const std::span<std::byte> workspace = call.options.workspace;
  if (!workspace.empty()) return execute(local.run, workspace, call.options.executor.lanes(), plan, call);
  const int lanes = lanes_for(plan, call.options);
  return execute(local.run, local.workspace(plan.workspace_bytes(lanes)), lanes, plan, call);
}

template <class... Views>
void tidy_all(Views&... views) {
  ((views = tidy(views)), ...);
}

}   // namespace door

inline Status supports(const AttentionShape& shape, const AttentionOptions& options) {
  if (Status s = door::check_shape(shape); !s.ok()) return s;
  if (Status s = door::check_numbers(options); !s.ok()) return s;
  if (Status s = door::check_tables(shape, options); !s.ok()) return s;
  if (Status s = door::check_mask("bias", options.bias, shape, options); !s.ok()) return s;
  return door::check_mask("keep", options.keep, shape, options);
}

namespace door {

inline void list_sequences(Plan& plan, const AttentionShape& shape, const AttentionOptions& options) {
  plan.sequences.clear();
  for (index_t b = 0; b < count_sequences(shape, options); ++b) plan.sequences.push_back(sequence_of(shape, options, b));
}
inline PlanRequest request_of(const AttentionShape& shape, const AttentionOptions& options) {
  return {shape.q_heads,  shape.kv_heads, shape.dim_qk,  shape.dim_v, reach_of(options), options.regime,
          options.panels, options.executor.lanes(), options.cpu};
}

inline Status check_planned_call(const Plan& plan, const Call& call) {
  const AttentionShape shape = shape_of(call.q, call.kv, call.options);
  if (Status s = check_call(call.q, call.kv, call.out, call.options); !s.ok()) return s;
  if (Status s = supports(shape, call.options); !s.ok()) return s;
  if (Status s = check_home(call.kv, shape, call.options); !s.ok()) return s;
  return check_plan(plan, shape, call.options);
}

inline Kv kv_of(const Operand& wide_k, const Operand& wide_v) {
  const Operand k = tidy_operand(wide_k), v = tidy_operand(wide_v);
  const index_t k_number = row_bytes(k.format, 1), v_number = row_bytes(v.format, 1);
  Kv kv;
  kv.k = {k.data, k.format, {k.stride[0] * k_number, k.stride[1] * k_number, k.stride[2] * k_number}};
  kv.v = {v.data, v.format, {v.stride[0] * v_number, v.stride[1] * v_number, v.stride[2] * v_number}};
  kv.kv_heads = k.extent[1];
  kv.dim_qk = k.extent[3];
  kv.dim_v = v.extent[3];
  kv.batch = k.extent[0];
  kv.len = k.extent[2];
  return kv;
}

template <class Compiled>
Status kernels_of(AttentionRun& run) {
  return bind_kernels(run, Compiled{});
}
template <class Compiled>
Call call_of(const Operand& q, const Kv& kv, const Result& out, const AttentionOptions& options) {
  return {tidy_operand(q), tidy_kv(kv), tidy_operand(out), options, &kernels_of<Compiled>};
}
template <class TK, class TV>
using FormatsOf = Formats<FormatOf<std::remove_const_t<TK>>::value, FormatOf<std::remove_const_t<TV>>::value>;

inline Status run(const Call& call) {
  if (Status s = check_call(call.q, call.kv, call.out, call.options); !s.ok()) return s;
  return with_local([&](Local& local) {
    const AttentionShape shape = shape_of(call.q, call.kv, call.options);
    if (Status s = supports(shape, call.options); !s.ok()) return s;
    if (Status s = check_home(call.kv, shape, call.options); !s.ok()) return s;
    list_sequences(local.plan, shape, call.options);
    if (Status s = local.plan.build(request_of(shape, call.options)); !s.ok()) return s;
    return execute(local, local.plan, call);
  });
}

inline Status run(const Plan& plan, const Call& call) {
  if (Status s = check_planned_call(plan, call); !s.ok()) return s;
  if (!call.options.workspace.empty()) {
    AttentionRun run;
    return execute(run, call.options.workspace, call.options.executor.lanes(), plan, call);
  }
  return with_local([&](Local& local) { return execute(local, plan, call); });
}

inline Status prepare(AttentionRun& run, const Plan& plan, const Call& call) {
  const std::span<std::byte> workspace = call.options.workspace;
  const int lanes = call.options.executor.lanes();
  if (Status s = check_planned_call(plan, call); !s.ok()) return s;
  if (Status s = check_workspace(workspace, plan.workspace_bytes(lanes)); !s.ok()) return s;
  bind(run, plan, call.q, call.kv, call.out, call.options);
  if (Status s = call.kernels(run); !s.ok()) return s;
  open_workspace(run, workspace, lanes);
  return {};
}

}   // namespace door

inline Status make_plan(Plan& plan, const AttentionShape& shape, const AttentionOptions& options) {
  if (Status s = supports(shape, options); !s.ok()) return s;
  door::list_sequences(plan, shape, options);
  return plan.build(door::request_of(shape, options));
}

inline std::size_t workspace_bytes(const Plan& plan, int lanes) { return plan.workspace_bytes(lanes); }

template <class Compiled>
Status attention(const Operand& q, const Kv& kv, const Result& out, const AttentionOptions& options) {
  return door::run(door::call_of<Compiled>(q, kv, out, options));
}
template <class Compiled>
Status attention(const Plan& plan, const Operand& q, const Kv& kv, const Result& out, const AttentionOptions& options) {
  return door::run(plan, door::call_of<Compiled>(q, kv, out, options));
}
template <class Compiled>
Status prepare(AttentionRun& run, const Plan& plan, const Operand& q, const Kv& kv, const Result& out,
               const AttentionOptions& options) {
  return door::prepare(run, plan, door::call_of<Compiled>(q, kv, out, options));
}

template <class TK, class TV>
Status attention(const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, const Result& out,
                 const AttentionOptions& options) {
  if (Status s = door::check_dense(q, k, v); !s.ok()) return s;
  return attention<door::FormatsOf<TK, TV>>(q, door::kv_of(k, v), out, options);
}
template <class TK, class TV>
Status attention(const Plan& plan, const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, const Result& out,
                 const AttentionOptions& options) {
  if (Status s = door::check_dense(q, k, v); !s.ok()) return s;
  return attention<door::FormatsOf<TK, TV>>(plan, q, door::kv_of(k, v), out, options);
}
template <class TK, class TV>
Status prepare(AttentionRun& run, const Plan& plan, const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v,
               const Result& out, const AttentionOptions& options) {
  if (Status s = door::check_dense(q, k, v); !s.ok()) return s;
  return prepare<door::FormatsOf<TK, TV>>(run, plan, q, door::kv_of(k, v), out, options);
}

inline void run_lane(AttentionRun& run, int lane) { run.lane(run, lane); }

inline Status merge(Tensor<float> out_a, View<float, 3> lse_a, Tensor<const float> out_b, View<const float, 3> lse_b) {
  door::tidy_all(out_a, lse_a, out_b, lse_b);
  door::Bytes a, b, la, lb;
  if (Status s = door::check_data("out_a", out_a, a); !s.ok()) return s;
  if (Status s = door::check_data("out_b", out_b, b); !s.ok()) return s;
  if (Status s = door::check_data("lse_a", lse_a, la); !s.ok()) return s;
  if (Status s = door::check_data("lse_b", lse_b, lb); !s.ok()) return s;
  if (Status s = door::check_extents("out_b", out_b, out_a.extent, "out_a"); !s.ok()) return s;
  const std::array<index_t, 3> rows = {out_a.extent[0], out_a.extent[1], out_a.extent[2]};
  if (lse_a.extent != rows || lse_b.extent != rows) {
    return door::invalid("fovea: lse_a is [%td, %td, %td] and lse_b [%td, %td, %td], must be [%td, %td, %td]",
                         lse_a.extent[0], lse_a.extent[1], lse_a.extent[2], lse_b.extent[0], lse_b.extent[1],
                         lse_b.extent[2], rows[0], rows[1], rows[2]);
  }
  if (!door::writes_apart(out_a) || !door::writes_apart(lse_a))
    return door::invalid("fovea: out_a or lse_a overlaps itself");
  for (const auto& [name, bytes] : {std::pair{"out_b", b}, std::pair{"lse_b", lb}}) {
    if (Status s = door::check_apart({"out_a", a}, name, bytes); !s.ok()) return s;
    if (Status s = door::check_apart({"lse_a", la}, name, bytes); !s.ok()) return s;
  }
  if (Status s = door::check_apart({"out_a", a}, "lse_a", la); !s.ok()) return s;

  const float empty = -std::numeric_limits<float>::infinity();
  for (index_t n = 0; n < rows[0]; ++n) {
    for (index_t h = 0; h < rows[1]; ++h) {
      for (index_t i = 0; i < rows[2]; ++i) {
        float& lse = lse_a(n, h, i);
        const float other = lse_b(n, h, i);
        if (other == empty) {
          for (index_t d = 0; lse == empty && d < out_a.extent[3]; ++d) out_a(n, h, i, d) = 0.f;
          continue;
        }
        // Two infinite sinks cannot be weighed against each other; equal references make them equal.
        const double top = lse > other ? lse : other;
        const double weight_a = lse == empty                      ? 0.
                                : static_cast<double>(lse) == top ? 1.
                                                                  : std::exp(static_cast<double>(lse) - top);
        const double weight_b = static_cast<double>(other) == top ? 1. : std::exp(static_cast<double>(other) - top);
        const double sum = weight_a + weight_b;
        const auto share_a = static_cast<float>(weight_a / sum), share_b = static_cast<float>(weight_b / sum);
        for (index_t d = 0; d < out_a.extent[3]; ++d) {
          float& to = out_a(n, h, i, d);
          to = lse == empty ? out_b(n, h, i, d) : std::fma(to, share_a, out_b(n, h, i, d) * share_b);
        }
        lse = static_cast<float>(top + std::log(sum));
      }
    }
  }
  return {};
}

namespace door {
inline Status export_weights(const Call& call, View<const float, 3> lse, std::span<const WeightRow> rows,
                             View<float, 2> weights) {
  const Operand& q = call.q;
  const AttentionOptions& options = call.options;
  tidy_all(lse, weights);
  Bytes q_bytes, k_bytes, lse_bytes, to_bytes;
  if (Status s = check_data("q", q, q_bytes); !s.ok()) return s;
  if (Status s = check_stored("k", call.kv, call.kv.k, call.kv.dim_qk, k_bytes); !s.ok()) return s;
  if (Status s = check_data("lse", lse, lse_bytes); !s.ok()) return s;
  if (Status s = check_data("weights", weights, to_bytes); !s.ok()) return s;
  if (lse.extent != std::array<index_t, 3>{q.extent[0], q.extent[1], q.extent[2]}) {
    return invalid("fovea: lse is [%td, %td, %td], must be [%td, %td, %td]", lse.extent[0], lse.extent[1],
                         lse.extent[2], q.extent[0], q.extent[1], q.extent[2]);
  }
  if (!writes_apart(weights))
    return invalid("fovea: weights overlaps itself: strides [%td, %td]", weights.stride[0], weights.stride[1]);
  for (const auto& [name, bytes] : {std::pair{"q", q_bytes}, std::pair{"k", k_bytes}, std::pair{"lse", lse_bytes}}) {
    if (Status s = check_apart({"weights", to_bytes}, name, bytes); !s.ok()) return s;
  }
  return with_local([&](Local& local) {
    const AttentionShape shape = shape_of(q, call.kv, options);
    if (Status s = supports(shape, options); !s.ok()) return s;
    if (Status s = check_home(call.kv, shape, options); !s.ok()) return s;
    list_sequences(local.plan, shape, options);   // no tasks: only places and positions are asked
    local.plan.request = request_of(shape, options);
    index_t longest = 0;
    for (std::size_t n = 0; n < rows.size(); ++n) {
      const WeightRow& row = rows[n];
      if (row.sequence < 0 || row.sequence >= static_cast<index_t>(local.plan.sequences.size()) || row.q_head < 0 ||
          row.q_head >= shape.q_heads || row.q_index < 0 ||
          row.q_index >= local.plan.sequences[static_cast<std::size_t>(row.sequence)].len_q)
        return invalid("fovea: rows[%zu] is sequence %td, q head %td, query %td: there is no such row", n,
                             row.sequence, row.q_head, row.q_index);
      longest = std::max(longest, local.plan.sequences[static_cast<std::size_t>(row.sequence)].len_k);
    }
    if (weights.extent[0] != static_cast<index_t>(rows.size()) || weights.extent[1] < longest)
      return invalid("fovea: weights is [%td, %td], must be [%zu, at least %td]", weights.extent[0], weights.extent[1],
                           rows.size(), longest);
    Bump size;
    carve_strip(size, shape.dim_qk, longest);
    const std::span<std::byte> bytes = local.workspace(size.used() + kAlignment);
    if (Status s = check_workspace(bytes, size.used() + kAlignment); !s.ok()) return s;
    Bump bump(aligned(bytes).data());
    const StripMemory memory = carve_strip(bump, shape.dim_qk, longest);
    bind(local.run, local.plan, q, call.kv, {}, options);
    if (Status s = call.kernels(local.run); !s.ok()) return s;

    // Neighbours in the list that share a sequence and a kv head share the reading of K.
    const index_t group = shape.q_heads / shape.kv_heads;
    for (std::size_t n = 0; n < rows.size();) {
      Row strip[kStripRows];
      float row_lse[kStripRows];
      std::array<float*, kStripRows> to{};
      std::size_t count = 0;
      while (count < kStripRows && n + count < rows.size() && rows[n + count].sequence == rows[n].sequence &&
             rows[n + count].q_head / group == rows[n].q_head / group) {
        const WeightRow& row = rows[n + count];
        const Sequence& sequence = local.plan.sequences[static_cast<std::size_t>(row.sequence)];
        strip[count] = {sequence.pos + row.q_index, row.q_index, static_cast<int>(row.sequence),
                        static_cast<int>(row.q_head), static_cast<int>(row.q_head / group)};
        row_lse[count] = lse(sequence.batch, row.q_head, sequence.q_begin + row.q_index);
        to[count] = weights.data + static_cast<index_t>(n + count) * weights.stride[0];
        ++count;
      }
      softmax_weights(local.run, {strip, count}, row_lse, memory, to, weights.stride[1], weights.extent[1]);
      n += count;
    }
    return Status{};
  });
}

}   // namespace door

template <class TK>
Status attention_weights(const Operand& q, const View<TK, 4>& k, View<const float, 3> lse, std::span<const WeightRow> rows,
                         View<float, 2> weights, const AttentionOptions& options) {
  if (Status s = door::check_dense(q, k, k); !s.ok()) return s;
  return door::export_weights(door::call_of<door::FormatsOf<TK, TK>>(q, door::kv_of(k, k), {}, options), lse, rows, weights);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
