// SPDX-License-Identifier: Apache-2.0
// Behind front door 1: plans, calls, merge and weights.
#pragma once
#include "attention.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

inline Status supports(const AttentionShape& shape, const AttentionOptions& options) {
  return door::check_problem(shape, options);
}

inline Status make_plan(Plan& plan, const AttentionShape& shape, const AttentionOptions& options) {
  return door::plan_call(plan, shape, options, {});
}

inline std::size_t workspace_bytes(const Plan& plan, int lanes) { return plan.workspace_bytes(lanes); }

template <class Compiled>
Status attention(const Operand& q, const Kv& kv, const Result& out, const AttentionOptions& options) {
  return door::run(door::call_of<SoftmaxLanes, Compiled>(q, kv, out, options));
}
template <class Compiled>
Status attention(const Plan& plan, const Operand& q, const Kv& kv, const Result& out, const AttentionOptions& options) {
  return door::run(plan, door::call_of<SoftmaxLanes, Compiled>(q, kv, out, options));
}
template <class Compiled>
Status prepare(AttentionRun& run, const Plan& plan, const Operand& q, const Kv& kv, const Result& out,
               const AttentionOptions& options) {
  return door::prepare(run, plan, door::call_of<SoftmaxLanes, Compiled>(q, kv, out, options));
}

template <class TK, class TV>
Status attention(const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, const Result& out,
                 const AttentionOptions& options) {
  if (Status s = door::check_dense(q, k, v); !s.ok()) return s;
  return attention<door::FormatsOf<TK, TV>>(q, door::kv_of(k, v), out, options);
}
// Views of another rank fit no call; without this one the compiler would list all of them and why.
template <class TQ, int Q, class TK, int K, class TV, int V, class TO, int O>
  requires(Q != 4 || K != 4 || V != 4 || O != 4)
Status attention(const View<TQ, Q>&, const View<TK, K>&, const View<TV, V>&, const View<TO, O>&, const AttentionOptions& = {}) {
  static_assert(Q == 4 && K == 4 && V == 4 && O == 4,
                "fovea: q, k, v and out have four axes, [batch, head, pos, dim]; one sequence has batch 1");
  return {};
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

template <AnyVariant V>
Status supports(const AttentionShape& shape, const AttentionOptions& options, const V& variant) {
  if (Status s = door::check_problem(shape, options, VariantTraits<V>::needs()); !s.ok()) return s;
  return VariantTraits<V>::check(variant, shape);
}
template <AnyVariant V>
Status make_plan(Plan& plan, const AttentionShape& shape, const AttentionOptions& options, const V&) {
  return door::plan_call(plan, shape, options, VariantTraits<V>::needs());
}
template <class Compiled, AnyVariant V>
Status attention(const Operand& q, const Kv& kv, const Result& out, const AttentionOptions& options, const V& variant) {
  return door::run(door::call_of_variant<Compiled>(q, kv, out, options, variant));
}
template <class Compiled, AnyVariant V>
Status attention(const Plan& plan, const Operand& q, const Kv& kv, const Result& out, const AttentionOptions& options,
                 const V& variant) {
  return door::run(plan, door::call_of_variant<Compiled>(q, kv, out, options, variant));
}
template <class Compiled, AnyVariant V>
Status prepare(AttentionRun& run, const Plan& plan, const Operand& q, const Kv& kv, const Result& out,
               const AttentionOptions& options, const V& variant) {
  return door::prepare(run, plan, door::call_of_variant<Compiled>(q, kv, out, options, variant));
}
template <class TK, class TV, AnyVariant V>
Status attention(const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, const Result& out,
                 const AttentionOptions& options, const V& variant) {
  if (Status s = door::check_dense(q, k, v); !s.ok()) return s;
  return attention<door::FormatsOf<TK, TV>>(q, door::kv_of(k, v), out, options, variant);
}
template <class TK, class TV, AnyVariant V>
Status attention(const Plan& plan, const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, const Result& out,
                 const AttentionOptions& options, const V& variant) {
  if (Status s = door::check_dense(q, k, v); !s.ok()) return s;
  return attention<door::FormatsOf<TK, TV>>(plan, q, door::kv_of(k, v), out, options, variant);
}
template <class TK, class TV, AnyVariant V>
Status prepare(AttentionRun& run, const Plan& plan, const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v,
               const Result& out, const AttentionOptions& options, const V& variant) {
  if (Status s = door::check_dense(q, k, v); !s.ok()) return s;
  return prepare<door::FormatsOf<TK, TV>>(run, plan, q, door::kv_of(k, v), out, options, variant);
}

inline void run_lane(AttentionRun& run, int lane) { run.lane(run, lane); }

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
  std::array<NamedBytes, 5> of_options;
  if (Status s = option_inputs(options, of_options); !s.ok()) return s;
  if (Status s = check_data("weights", weights, to_bytes); !s.ok()) return s;
  if (lse.extent != std::array<index_t, 3>{q.extent[0], q.extent[1], q.extent[2]}) {
    return invalid("fovea: lse is [%td, %td, %td], must be [%td, %td, %td]", lse.extent[0], lse.extent[1],
                         lse.extent[2], q.extent[0], q.extent[1], q.extent[2]);
  }
  if (!writes_apart(weights))
    return invalid("fovea: weights overlaps itself: strides [%td, %td]", weights.stride[0], weights.stride[1]);
  for (const auto& [name, bytes] : {NamedBytes{"q", q_bytes}, NamedBytes{"k", k_bytes}, NamedBytes{"lse", lse_bytes}}) {
    if (Status s = check_apart({"weights", to_bytes}, name, bytes); !s.ok()) return s;
  }
  for (const auto& [name, bytes] : of_options) {
    if (Status s = check_apart({"weights", to_bytes}, name, bytes); !s.ok()) return s;
  }
  return with_local([&](Local& local) {
    const AttentionShape shape = shape_of(q, call.kv, options);
    if (Status s = check_problem(shape, options); !s.ok()) return s;
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
  const auto call = door::call_of<SoftmaxLanes, door::FormatsOf<TK, TK>>(q, door::kv_of(k, k), {}, options);
  return door::export_weights(call, lse, rows, weights);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
