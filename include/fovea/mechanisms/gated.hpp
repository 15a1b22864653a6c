// SPDX-License-Identifier: Apache-2.0
// Gated attention (Qiu et al. 2025, arXiv 2505.06708; the full-attention layers of Qwen3-Next):
//   y_i = attention_i * f(g_i),   g_i = x_i W_g,   f a sigmoid or SiLU,   or y_i = attention_i + f(g_i),
// with one gate per output feature (elementwise) or one per head (headwise), of the token that asks. This is the paper's
// position G1, after the weighted sum and before W_O: the one it recommends, multiplying. gate_rows serves the positions
// before and after the call: G2 and G3 gate V and K rows, G4 queries, G5 the rows behind W_O.
#pragma once
#include "../call/variant.hpp"

namespace fovea {
inline namespace v0 {

enum class GateFunction : std::uint8_t { sigmoid, silu };
enum class GateForm : std::uint8_t { multiply, add };   // y f(g), y + f(g); the paper adds SiLU, which has no bound

// The two halves of one fused projection.
template <class T>
struct QueryGate {
  Tensor<T> q, gate;
};

inline namespace FOVEA_ARCH {

FOVEA_INLINE f32 gate_factor(GateFunction function, f32 x) {
  return function == GateFunction::silu ? silu(x) : logistic(x);
}

// Does the gate have a number for each of these rows [batch, head, pos, dim], its axes batch, head and dim shared where 1?
inline Status check_gate(const Operand& gate, const std::array<index_t, 4>& rows) {
  if (Status s = door::check_plain("gate", gate.format); !s.ok()) return s;
  const auto fits = [&](std::size_t axis) {
    return gate.extent[axis] == rows[axis] || (axis != 2 && gate.extent[axis] == 1);
  };
  if (fits(0) && fits(1) && fits(2) && fits(3)) return {};
  return door::invalid("fovea: gate is [%td, %td, %td, %td], must be [%td | 1, %td | 1, %td, %td | 1]", gate.extent[0],
                       gate.extent[1], gate.extent[2], gate.extent[3], rows[0], rows[1], rows[2], rows[3]);
}

// Multiplies rows by f(gate) before they are stored, or adds it to them.
struct Gate {
  Operand logits;   // [batch | 1, q_head | 1, pos, dim_v | 1], f32, f64, bf16 or f16, any strides
  GateFunction function = GateFunction::sigmoid;
  GateForm form = GateForm::multiply;

  Status check(const AttentionShape& s) const {
    door::Bytes ignored;
    if (Status status = check_gate(logits, {s.batch, s.q_heads, s.len_q, s.dim_v}); !status.ok()) return status;
    return door::check_data("gate", logits, ignored);
  }

  FOVEA_INLINE void operator()(const OutRow& row, std::span<float> values, Final) const {
    join(row.batch * logits.stride[0] + row.q_head * logits.stride[1] + row.pos * logits.stride[2], values.data(),
         static_cast<index_t>(values.size()));
  }

  // values *= f(the gates that start at element `at`), or +=; `values` are padded to whole vectors.
  FOVEA_INLINE void join(index_t at, float* values, index_t dim) const {
    if (form == GateForm::multiply) {
      change(at, values, dim, [](f32 y, f32 factor) { return y * factor; });
    } else {
      change(at, values, dim, [](f32 y, f32 term) { return fma(term, f32(1.f), y); });   // not fused with SiLU's product
    }
  }

 private:
  template <class With>
  FOVEA_INLINE void change(index_t at, float* values, index_t dim, const With& with) const {
    const index_t step = logits.stride[3];
    const std::byte* const from = logits.data + at * row_bytes(logits.format, 1);
    if (logits.extent[3] == 1) {
      float gate = 0.f;
      read_numbers(logits.format, from, 1, 1, &gate);
      const f32 shared = gate_factor(function, f32(gate));
      for (index_t d = 0; d < dim; d += kLanes) store(values + d, with(load(values + d), shared));
      return;
    }
    if (logits.format == Format::f32) {
      const auto* const gates = reinterpret_cast<const float*>(from);
      for (index_t d = 0; d < dim; d += kLanes) {
        const f32 gate = load_strided(gates + d * step, step, dim - d);
        store(values + d, with(load(values + d), gate_factor(function, gate)));
      }
      return;
    }
    constexpr index_t kChunk = 64;
    alignas(f32) float gates[kChunk] = {};
    for (index_t first = 0; first < dim; first += kChunk) {
      const index_t count = std::min(kChunk, dim - first);
      read_numbers(logits.format, from + first * step * row_bytes(logits.format, 1), step, count, gates);
      for (index_t d = 0; d < count; d += kLanes)
        store(values + first + d, with(load(values + first + d), gate_factor(function, load(gates + d))));
    }
  }
};

// fovea::attention(q, k, v, out, options, fovea::gated(gate)). The gate must lie apart from out; gated_attention sees to it.
// Also the close of another variant: fovea::variant().with_close(gated(gate).close).
inline auto gated(const Operand& gate, GateFunction function = GateFunction::sigmoid, GateForm form = GateForm::multiply) {
  return variant().with_close(Gate{door::tidy_operand(gate), function, form});
}

namespace door {
inline Status check_gate_of_call(const Operand& gate, const Result& out, const AttentionOptions& options) {
  Bytes bytes;
  if (Status s = check_gate(gate, out.extent); !s.ok()) return s;
  if (Status s = check_data("gate", tidy_operand(gate), bytes); !s.ok()) return s;
  return check_learned("gate", bytes, out, options);
}
}   // namespace door

// fovea::attention, every output row times f(gate), or plus it. gate [batch | 1, q_head | 1, pos, dim_v | 1]; the LSE is that of the
// bare attention. softcap, ALiBi, bias, keep and trees need gated(gate, function).with_options().
template <class Compiled = AllFormats>
Status gated_attention(const Operand& q, const Kv& kv, const Result& out, const Operand& gate,
                       const AttentionOptions& options = {}, GateFunction function = GateFunction::sigmoid,
                       GateForm form = GateForm::multiply) {
  if (Status s = door::check_gate_of_call(gate, out, options); !s.ok()) return s;
  const auto policies = gated(gate, function, form);
  return door::run(door::call_of_variant<Compiled>(q, kv, out, options, policies));
}
template <class TK, class TV>
Status gated_attention(const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, const Result& out, const Operand& gate,
                       const AttentionOptions& options = {}, GateFunction function = GateFunction::sigmoid,
                       GateForm form = GateForm::multiply) {
  if (Status s = door::check_dense(q, k, v); !s.ok()) return s;
  return gated_attention<door::FormatsOf<TK, TV>>(q, door::kv_of(k, v), out, gate, options, function, form);
}

// to = x * f(gate) or x + f(gate), row by row, any plain formats; x and to may be the same tensor. V and K are gated once, when a token is
// appended: a gate of the key's token does not depend on who asks.
inline Status gate_rows(const Operand& x_any, const Operand& gate, const Result& to_any,
                        GateFunction function = GateFunction::sigmoid, GateForm form = GateForm::multiply) {
  const Operand x = door::tidy_operand(x_any);
  const Result to = door::tidy_operand(to_any);
  const Gate close{door::tidy_operand(gate), function, form};
  door::Bytes x_bytes, gate_bytes, to_bytes;
  if (Status s = door::check_plain("x", x.format); !s.ok()) return s;
  if (Status s = door::check_plain("to", to.format); !s.ok()) return s;
  if (Status s = door::check_data("x", x, x_bytes); !s.ok()) return s;
  if (Status s = door::check_data("to", to, to_bytes); !s.ok()) return s;
  if (Status s = door::check_extents("to", to, x.extent, "x"); !s.ok()) return s;
  if (Status s = check_gate(gate, x.extent); !s.ok()) return s;
  if (Status s = door::check_data("gate", close.logits, gate_bytes); !s.ok()) return s;
  if (!door::writes_apart(to)) return door::invalid("fovea: to overlaps itself");
  if (Status s = door::check_apart({"to", to_bytes}, "gate", gate_bytes); !s.ok()) return s;
  if (to.data != x.data || to.stride != x.stride || to.format != x.format) {
    if (Status s = door::check_apart({"to", to_bytes}, "x", x_bytes); !s.ok()) return s;
  }
  constexpr index_t kChunk = 64;
  alignas(f32) float values[kChunk] = {};
  for (index_t b = 0; b < x.extent[0]; ++b) {
    for (index_t h = 0; h < x.extent[1]; ++h) {
      for (index_t i = 0; i < x.extent[2]; ++i) {
        const auto row_of = [&](const auto& view) { return b * view.stride[0] + h * view.stride[1] + i * view.stride[2]; };
        for (index_t d = 0; d < x.extent[3]; d += kChunk) {
          const index_t count = std::min(kChunk, x.extent[3] - d);
          const index_t from = row_of(x) + d * x.stride[3], into = row_of(to) + d * to.stride[3];
          read_numbers(x.format, x.data + from * row_bytes(x.format, 1), x.stride[3], count, values);
          close.join(row_of(close.logits) + d * close.logits.stride[3], values, count);
          write_numbers(to.format, values, count, to.data + into * row_bytes(to.format, 1), to.stride[3]);
        }
      }
    }
  }
  return {};
}

// Qwen3-Next's q_proj, per query head [dim of the query | dim of the gate]: data[((b * len + s) * q_heads + h) * 2 dim +
// ...].
template <class T>
QueryGate<T> query_gate_per_head(T* data, index_t batch, index_t len, index_t q_heads, index_t dim) {
  const std::array<index_t, 4> extent{batch, q_heads, len, dim};
  const std::array<index_t, 4> stride{len * q_heads * 2 * dim, 2 * dim, q_heads * 2 * dim, 1};
  return {{data, extent, stride}, {data == nullptr ? nullptr : data + dim, extent, stride}};
}

// The q_proj of the paper's code, per kv head [group queries of dim | group gates of gate_dim], gate_dim = dim or 1: data[(s
// * kv_heads + n) * group * (dim + gate_dim) + ...]. From query head to query head this is no stride, so a kv head takes the
// place of a batch entry, one sequence per call: q and gate are [kv_head, group, pos, ...]; k, v and out go through
// heads_as_batch.
template <class T>
QueryGate<T> query_gate_per_group(T* data, index_t len, index_t kv_heads, index_t group, index_t dim, index_t gate_dim) {
  const index_t width = group * (dim + gate_dim);
  return {{data, {kv_heads, group, len, dim}, {width, dim, kv_heads * width, 1}},
          {data == nullptr ? nullptr : data + group * dim,
           {kv_heads, group, len, gate_dim},
           {width, gate_dim, kv_heads * width, 1}}};
}

// [1, head, pos, dim] as [batches, head / batches, pos, dim]: the same elements, nothing copied.
template <class T>
Tensor<T> heads_as_batch(const Tensor<T>& x, index_t batches) {
  FOVEA_ASSERT(x.extent[0] == 1 && batches > 0 && x.extent[1] % batches == 0);
  const index_t heads = x.extent[1] / batches;
  return {x.data, {batches, heads, x.extent[2], x.extent[3]}, {heads * x.stride[1], x.stride[1], x.stride[2], x.stride[3]}};
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
