// SPDX-License-Identifier: Apache-2.0
// K bias and KV bias (Gu et al. 2024, arXiv 2410.10781): one learned key k* (and value v*) that every query sees, whatever
// the mask says, joined after the rotation:
//   out_i = (sum_j exp(s_ij) v_j + exp(s_i*) v*) / (sum_j exp(s_ij) + exp(s_i*)),   s_i* = scale q_i . k*.
// With v* = 0 (K bias) this is a sink whose logit depends on the query. The key enters as a row closes, like the sink logit
// of softmax: once, however the keys were split.
#pragma once
#include "../call/variant.hpp"

namespace fovea {
inline namespace v0 {

// Head axes: 1 (shared), kv_heads, or q_heads.
struct KvBias {
  View<const float, 2> key = {};     // [head, dim_qk]
  View<const float, 2> value = {};   // [head, dim_v]  without data: 0
};

inline namespace FOVEA_ARCH {

// The learned key against the query of a row.
struct BiasKey {
  Operand q;                  // [batch, q_head, pos, dim_qk]
  View<const float, 2> key;   // [head, dim_qk]
  float scale;
  std::span<const index_t> cu_len_q;   // [sequence + 1], of a ragged call

  static index_t head_of(const View<const float, 2>& learned, index_t q_heads, index_t q_head) {
    return learned.extent[0] <= 1 ? 0 : q_head / (q_heads / learned.extent[0]);
  }

  FOVEA_INLINE float logit(const OutRow& row) const {
    const index_t dim = q.extent[3], step = q.stride[3];
    const std::byte* const from =
        q.data + row_bytes(q.format, 1) * (row.batch * q.stride[0] + row.q_head * q.stride[1] + row.pos * q.stride[2]);
    const float* const k = key.data + head_of(key, q.extent[1], row.q_head) * key.stride[0];
    f32 sum(0.f);
    if (q.format == Format::f32) {
      const auto* const query = reinterpret_cast<const float*>(from);
      for (index_t d = 0; d < dim; d += kLanes)
        sum = fma(load_strided(query + d * step, step, dim - d), load_strided(k + d * key.stride[1], key.stride[1], dim - d),
                  sum);
    } else {
      alignas(f32) float query[kLanes] = {};
      for (index_t d = 0; d < dim; d += kLanes) {
        const index_t count = std::min(kLanes, dim - d);
        read_numbers(q.format, from + d * step * row_bytes(q.format, 1), step, count, query);
        sum = fma(load_strided(query, 1, count), load_strided(k + d * key.stride[1], key.stride[1], dim - d), sum);
      }
    }
    return scale * reduce_add(sum);
  }
};

inline Status check_kv_bias(const KvBias& bias, index_t q_heads, index_t kv_heads, index_t dim_qk, index_t dim_v) {
  const auto check = [&](const char* name, const View<const float, 2>& learned, index_t dim) -> Status {
    const index_t heads = learned.extent[0];
    if ((heads != 1 && heads != kv_heads && heads != q_heads) || learned.extent[1] != dim)
      return door::invalid("fovea: the learned %s is [%td, %td], must be [1 | %td | %td, %td]", name, heads,
                           learned.extent[1], kv_heads, q_heads, dim);
    door::Bytes ignored;
    return door::check_data(name, tidy(learned), ignored);
  };
  if (Status s = check("key", bias.key, dim_qk); !s.ok()) return s;
  return bias.value ? check("value", bias.value, dim_v) : Status{};
}

// Softmax whose rows begin with the learned key.
struct KvBiasSoftmax {
  using State = Softmax::State;
  static constexpr bool kHasLse = true;
  BiasKey bias;
  Softmax softmax{nullptr, true};

  FOVEA_INLINE State begin(const Row& row, bool whole_row) const {
    if (!whole_row) return softmax.begin(row, false);
    const bool ragged = !bias.cu_len_q.empty();
    const index_t first = ragged ? bias.cu_len_q[static_cast<std::size_t>(row.sequence)] : 0;
    const float logit = bias.logit({ragged ? 0 : row.sequence, row.q_head, first + row.q_index});
    if (logit == -std::numeric_limits<float>::infinity()) return softmax.begin(row, false);
    return {logit, 1.f};
  }
  FOVEA_INLINE void absorb(State* states, const ScoreRows& scores, float* rescale) const {
    softmax.absorb(states, scores, rescale);
  }
  FOVEA_INLINE std::array<float, 2> merge(State& a, const State& b) const { return softmax.merge(a, b); }
  FOVEA_INLINE Final finish(const State& state) const { return softmax.finish(state); }
};

// Adds the learned value with the weight of its key.
struct AddBiasValue {
  static constexpr bool kNeedsLse = true;
  BiasKey bias;
  View<const float, 2> value;   // [head, dim_v], or without data

  Status check(const AttentionShape& s) const {
    const std::array<index_t, 4> rows{s.batch, s.q_heads, s.len_q, s.dim_qk};
    if (Status status = door::check_extents("the q of the variant", bias.q, rows, "the call"); !status.ok()) return status;
    return check_kv_bias({bias.key, value}, s.q_heads, s.kv_heads, s.dim_qk, s.dim_v);
  }

  FOVEA_INLINE void operator()(const OutRow& row, std::span<float> values, Final end) const {
    if (!value) return;
    const float logit = bias.logit(row);
    if (logit == -std::numeric_limits<float>::infinity()) return;
    const f32 weight(exp2((logit - end.lse) * kLog2e));
    const float* const v = value.data + BiasKey::head_of(value, bias.q.extent[1], row.q_head) * value.stride[0];
    const auto dim = static_cast<index_t>(values.size());
    for (index_t d = 0; d < dim; d += kLanes)
      store(values.data() + d,
            fma(weight, load_strided(v + d * value.stride[1], value.stride[1], dim - d), load(values.data() + d)));
  }
};

// fovea::attention(q, k, v, out, options, fovea::kv_bias(q, bias, options)), with the q, scale and cu_len_q of that call.
inline auto kv_bias(const Operand& q, const KvBias& bias, const AttentionOptions& options = {}) {
  const BiasKey key{door::tidy_operand(q), tidy(bias.key), scale_of(options, q.extent[3]), options.cu_len_q};
  return variant().with_normalizer(KvBiasSoftmax{key}).with_close(AddBiasValue{key, tidy(bias.value)});
}

// fovea::attention with the learned key and value in every row; the LSE includes them. Options: those of a variant without
// with_options() (no softcap, ALiBi, bias, keep or trees), and no sink, which the learned key is.
template <class Compiled = AllFormats>
Status kv_bias_attention(const Operand& q, const Kv& kv, const Result& out, const KvBias& bias,
                         const AttentionOptions& options = {}) {
  if (Status s = door::check_plain("q", q.format); !s.ok()) return s;
  if (Status s = check_kv_bias(bias, q.extent[1], kv.kv_heads, q.extent[3], kv.dim_v); !s.ok()) return s;
  door::Bytes key_bytes, value_bytes;
  if (Status s = door::check_data("key", tidy(bias.key), key_bytes); !s.ok()) return s;
  if (Status s = door::check_data("value", tidy(bias.value), value_bytes); bias.value && !s.ok()) return s;
  if (Status s = door::check_learned("the learned key", key_bytes, out, options); !s.ok()) return s;
  if (Status s = door::check_learned("the learned value", value_bytes, out, options); !s.ok()) return s;
  const auto policies = kv_bias(q, bias, options);
  return door::run(door::call_of_variant<Compiled>(q, kv, out, options, policies));
}
template <class TK, class TV>
Status kv_bias_attention(const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, const Result& out, const KvBias& bias,
                         const AttentionOptions& options = {}) {
  if (Status s = door::check_dense(q, k, v); !s.ok()) return s;
  return kv_bias_attention<door::FormatsOf<TK, TV>>(q, door::kv_of(k, v), out, bias, options);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
