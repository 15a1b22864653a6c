// SPDX-License-Identifier: Apache-2.0
// Registers (Darcet et al. 2023, arXiv 2309.16588; meta tokens of Hymba, arXiv 2411.13676): n learned tokens whose keys and
// values every query sees, whatever causality, window and lengths say, and whose outputs nobody reads:
//   out_i = softmax over [scale q_i . r_1 .. r_n, the visible scores of i] times [rv_1 .. rv_n, the visible values].
// They stay where they are, in memory of their own: one short call over the registers leaves its rows and LSE in out and
// lse, the call over the sequence adds them as its rows close, with the weights of fovea::merge.
#pragma once
#include "../call/variant.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// A row becomes the attention over its own keys and those of the rows that stand in `others`.
struct MergeRows {
  static constexpr bool kNeedsLse = true;
  Tensor<float> others;   // [batch, q_head, pos, dim_v]
  View<float, 3> lse;     // [batch, q_head, pos]  of the others; becomes that of the union

  FOVEA_INLINE void operator()(const OutRow& row, std::span<float> values, Final end) const {
    const float empty = -std::numeric_limits<float>::infinity();
    const auto dim = static_cast<index_t>(values.size());
    float& other = lse.data[row.batch * lse.stride[0] + row.q_head * lse.stride[1] + row.pos * lse.stride[2]];
    float own_share = 1.f, other_share = 0.f;
    if (other != empty) {
      const double top = static_cast<double>(end.lse > other ? end.lse : other);
      const double own_weight = end.lse == empty ? 0. : std::exp(static_cast<double>(end.lse) - top);
      const double other_weight = std::exp(static_cast<double>(other) - top), sum = own_weight + other_weight;
      own_share = static_cast<float>(own_weight / sum);
      other_share = static_cast<float>(other_weight / sum);
      other = static_cast<float>(top + std::log(sum));
    } else {
      other = end.lse;
    }
    const index_t step = others.stride[3];
    const float* const from =
        others.data + row.batch * others.stride[0] + row.q_head * others.stride[1] + row.pos * others.stride[2];
    for (index_t d = 0; d < dim; d += kLanes) {
      const f32 part = load_strided(from + d * step, step, dim - d) * f32(other_share);
      store(values.data() + d, fma(load(values.data() + d), f32(own_share), part));
    }
  }
};

struct RegisterTokens {
  Tensor<const float> k, v;   // [sequence | 1, kv_head, n, dim], innermost stride 1
};

// fovea::attention over the registers and the sequence's own keys. out and options.lse [batch, q_head, pos] are required,
// out f32: between the two calls they hold the registers' part. The LSE counts registers and sequence. Options: scale,
// causality, windows, lengths, offsets, regime and executor act on the sequence; a sink is counted once; softcap, ALiBi,
// bias, keep and trees are refused. Errors are found before anything is written.
template <class Compiled = AllFormats>
Status register_attention(const Operand& q, const Kv& kv, Tensor<float> out, const RegisterTokens& registers,
                          const AttentionOptions& options) {
  if (!options.lse)
    return door::invalid("fovea: attention with registers needs options.lse, which holds their part between two calls");
  Tensor<const float> rk = tidy(registers.k), rv = tidy(registers.v);
  const index_t n = rk.extent[2],
                sequences = options.cu_len_q.empty() ? q.extent[0] : static_cast<index_t>(options.cu_len_q.size()) - 1;
  if ((rk.extent[0] != 1 && rk.extent[0] != sequences) || rk.extent[0] != rv.extent[0] || rk.extent[1] != kv.kv_heads ||
      n < 1)
    return door::invalid(
        "fovea: registers are k [%td, %td, %td, %td] and v [%td, ...], must be [1 | %td, %td, at least 1, %td]",
        rk.extent[0], rk.extent[1], n, rk.extent[3], rv.extent[0], sequences, kv.kv_heads, q.extent[3]);
  if (rv.extent[3] != kv.dim_v)
    return door::invalid("fovea: registers have values of dim %td, the sequence of %td", rv.extent[3], kv.dim_v);
  if (Status s = door::check_dense(q, rk, rv); !s.ok()) return s;
  if (Status s = VariantTraits<Variant<>>::check_options(options); !s.ok()) return s;
  // One set of registers for all sequences is a batch with stride 0.
  rk.extent[0] = rv.extent[0] = sequences;
  const Kv register_kv = dense_kv(rk, rv);

  AttentionOptions first = options;
  first.causal = Causal::none;
  first.window = {};
  first.panels = Panels::f32;   // registers are not stored narrower
  first.q_offset = first.len_k = first.cu_len_k = {};
  AttentionOptions second = options;
  second.sink = {};
  second.lse = {};
  // All that the second call would refuse; the first one checks itself before it writes.
  if (Status s = door::check_call(door::tidy_operand(q), door::tidy_kv(kv), door::tidy_operand(Result(out)), options);
      !s.ok())
    return s;
  const AttentionShape shape = door::shape_of(q, kv, options);
  if (Status s = door::check_problem(shape, options); !s.ok()) return s;
  if (Status s = door::check_home(kv, shape, options); !s.ok()) return s;

  const auto plain = variant();
  const auto merged = variant().with_close(MergeRows{tidy(out), tidy(options.lse)});
  const door::Call main_call = door::call_of_variant<Compiled>(q, kv, out, second, merged);
  const auto can_run = [&](door::Local& local) -> Status {
    door::list_sequences(local.plan, shape, second);
    if (Status s = local.plan.build(door::request_of(shape, second)); !s.ok()) return s;
    const std::size_t bytes = local.plan.workspace_bytes(second.executor.lanes());
    // Memory that is taken here is still there when the second call wants it.
    const std::span<std::byte> workspace = second.workspace.empty() ? local.workspace(bytes) : second.workspace;
    if (Status s = door::check_workspace(workspace, bytes); !s.ok()) return s;
    bind(local.run, local.plan, main_call.q, main_call.kv, main_call.out, second);
    return main_call.kernels(local.run);
  };
  if (Status s = door::with_local(can_run); !s.ok()) return s;
  if (Status s = door::run(door::call_of_variant<Formats<Format::f32>>(q, register_kv, out, first, plain)); !s.ok())
    return s;
  return door::run(main_call);
}
template <class TK, class TV>
Status register_attention(const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, Tensor<float> out,
                          const RegisterTokens& registers, const AttentionOptions& options) {
  if (Status s = door::check_dense(q, k, v); !s.ok()) return s;
  return register_attention<door::FormatsOf<TK, TV>>(q, door::kv_of(k, v), out, registers, options);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
