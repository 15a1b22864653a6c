// SPDX-License-Identifier: Apache-2.0
// Differential attention (Ye et al. 2024, arXiv 2410.05258), V1:
//   o_n = RMSNorm((softmax(q_2n k_2n') - lambda softmax(q_2n+1 k_2n'+1)) v_n') * (1 - lambda_init),   n' = n / n_rep,
// with twice as many query and key heads as value heads; and V2 (Microsoft, 2026): o_n = a_2n - sigmoid(lambda_n) a_2n+1,
// where both halves read the same K and V and nothing is normalised. V1 is two calls with the same V: the first leaves its
// rows in `out`, the second subtracts as its rows close. V2 likewise, or one call over all heads into memory of the caller,
// which reads K and V once: the form for decode.
#pragma once
#include "../call/variant.hpp"
#include "../engine/deal.hpp"

namespace fovea {
inline namespace v0 {

// attention: scale, causality, windows, lengths, offsets, regime, panels, executor and workspace. There is one softmax for
// each half, so LSE and sinks are refused, and so is what a variant leaves out (softcap, ALiBi, bias, keep, trees).
struct DifferentialOptions {
  AttentionOptions attention = {};
  float lambda = 0.f;                        // differential_lambda
  float lambda_init = 0.f;                   // differential_lambda_init
  std::span<const float> norm_weight = {};   // [dim_v]  shared by heads; empty = ones
  float eps = 1e-5f;
  Tensor<float> first_half = {};   // [batch, head, pos, dim_v]  the first call's rows, where out is not f32
};

struct DifferentialV2Options {
  AttentionOptions attention = {};
  View<const float, 3> lambda = {};   // [batch, head, pos]  before the sigmoid; head counts outputs
  // With it K and V are read once; needed where out is not f32.
  Tensor<float> halves = {};   // [batch, 2 head, pos, dim_v]
};

inline namespace FOVEA_ARCH {

// 0.8 - 0.6 exp(-0.3 layer), layers counted from 0.
inline float differential_lambda_init(index_t layer) {
  return static_cast<float>(0.8 - 0.6 * std::exp(-0.3 * static_cast<double>(layer)));
}

// exp(q1 . k1) - exp(q2 . k2) + lambda_init, four learned vectors of one length.
inline float differential_lambda(std::span<const float> q1, std::span<const float> k1, std::span<const float> q2,
                                 std::span<const float> k2, float lambda_init) {
  FOVEA_ASSERT(q1.size() == k1.size() && q2.size() == k2.size());
  double first = 0, second = 0;
  for (std::size_t d = 0; d < q1.size(); ++d) first += static_cast<double>(q1[d]) * static_cast<double>(k1[d]);
  for (std::size_t d = 0; d < q2.size(); ++d) second += static_cast<double>(q2[d]) * static_cast<double>(k2[d]);
  return static_cast<float>(std::exp(first) - std::exp(second) + static_cast<double>(lambda_init));
}

namespace door {

// The heads first, first + 2, ... of a view.
inline Operand every_other_head(Operand x, index_t first) {
  if (x.data != nullptr) x.data += first * x.stride[1] * row_bytes(x.format, 1);
  x.extent[1] /= 2;
  x.stride[1] *= 2;
  return x;
}
template <class T>
View<T, 4> every_other_head(View<T, 4> x, index_t first) {
  if (x.data != nullptr) x.data += first * x.stride[1];
  x.extent[1] /= 2;
  x.stride[1] *= 2;
  return x;
}

// values = before - lambda * values, as the second half's rows close.
FOVEA_INLINE f32 subtracted(const Tensor<float>& before, const OutRow& row, const float* values, float lambda, index_t d,
                            index_t dim) {
  const float* const from = before.data + row.batch * before.stride[0] + row.q_head * before.stride[1] +
                            row.pos * before.stride[2] + d * before.stride[3];
  return fma(f32(-lambda), load(values + d), load_strided(from, before.stride[3], dim - d));
}

struct SubtractAndNorm {
  Tensor<float> first_half;   // [batch, head, pos, dim_v]
  float lambda, factor, eps;
  const float* weight;   // [dim_v], or null

  FOVEA_INLINE void operator()(const OutRow& row, std::span<float> values, Final) const {
    const auto dim = static_cast<index_t>(values.size());
    f32 squares(0.f);
    for (index_t d = 0; d < dim; d += kLanes) {
      const f32 x = subtracted(first_half, row, values.data(), lambda, d, dim);
      store(values.data() + d, x);
      const f32 counted = dim - d >= kLanes ? x : first_of(x, dim - d);
      squares = fma(counted, counted, squares);
    }
    const float mean = reduce_add(squares) / static_cast<float>(dim) + eps;
    const float scale = mean == 0.f ? 0.f : factor / std::sqrt(mean);   // a row that sees no key, with eps 0
    for (index_t d = 0; d < dim; d += kLanes) {
      const f32 x = load(values.data() + d) * f32(scale);
      store(values.data() + d, weight == nullptr ? x : x * load_strided(weight + d, 1, dim - d));
    }
  }
};

inline float logistic(float x) { return 1.f / (1.f + std::exp(-x)); }

struct SubtractSigmoid {
  Tensor<float> first_half;      // [batch, head, pos, dim_v]
  View<const float, 3> lambda;   // [batch, head, pos]

  FOVEA_INLINE void operator()(const OutRow& row, std::span<float> values, Final) const {
    const auto dim = static_cast<index_t>(values.size());
    const float share = logistic(lambda(row.batch, row.q_head, row.pos));
    for (index_t d = 0; d < dim; d += kLanes)
      store(values.data() + d, subtracted(first_half, row, values.data(), share, d, dim));
  }
};

inline Status check_differential_options(const AttentionOptions& o) {
  if (o.lse || !o.sink.empty())
    return unsupported("fovea: differential attention has two softmaxes per output: no LSE (%s), no sink (%zu logits)",
                       o.lse ? "asked for" : "not asked for", o.sink.size());
  return VariantTraits<Variant<>>::check_options(o);
}

// The f32 rows that the second call reads: out itself, or the caller's memory.
inline Status take_floats(const char* name, const Tensor<float>& memory, const Result& out, index_t heads,
                          Tensor<float>& rows) {
  const std::array<index_t, 4> want{out.extent[0], heads, out.extent[2], out.extent[3]};
  if (!memory.data && out.format == Format::f32 && heads == out.extent[1]) {
    const Result tidied = tidy_operand(out);
    rows = {reinterpret_cast<float*>(tidied.data), tidied.extent, tidied.stride};
    return {};
  }
  if (!memory.data)
    return invalid("fovea: out is %s, so the first half needs fp32 memory: %s [%td, %td, %td, %td]", name_of(out.format),
                   name, want[0], want[1], want[2], want[3]);
  rows = tidy(memory);
  Bytes bytes, out_bytes;
  if (Status s = check_extents(name, rows, want, "out"); !s.ok()) return s;
  if (Status s = check_data(name, rows, bytes); !s.ok()) return s;
  if (!writes_apart(rows)) return invalid("fovea: %s overlaps itself", name);
  if (Status s = check_data("out", out, out_bytes); !s.ok()) return s;
  return check_apart({"out", out_bytes}, name, bytes);
}

// Everything that either call would refuse, before the first one writes.
inline Status check_half(const Operand& q, const Kv& kv, const Result& out, const AttentionOptions& options) {
  if (Status s = check_call(tidy_operand(q), tidy_kv(kv), tidy_operand(out), options); !s.ok()) return s;
  const AttentionShape shape = shape_of(q, kv, options);
  if (Status s = check_problem(shape, options); !s.ok()) return s;
  return check_home(kv, shape, options);
}

// `bytes` of an input against the rows that are written.
inline Status check_input(const char* name, const Bytes& bytes, const Result& out, const Tensor<float>& rows,
                          const AttentionOptions& options) {
  Bytes rows_bytes;
  if (Status s = check_learned(name, bytes, out, options); !s.ok()) return s;
  if (Status s = check_data("the first half", rows, rows_bytes); !s.ok()) return s;
  return check_apart({"the first half", rows_bytes}, name, bytes);
}

}   // namespace door

// V1. q [batch, 2 h, len_q, dim_qk], k [batch, 2 h_kv, len_k, dim_qk], v [batch, h_kv, len_k, dim_v], out [batch, h, len_q,
// dim_v]: heads 2n and 2n + 1 are the halves of output n. Its errors are found before anything is written.
template <class TK, class TV>
Status differential_attention(const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, const Result& out,
                              const DifferentialOptions& options) {
  const AttentionOptions& attention = options.attention;
  if (q.extent[1] % 2 != 0 || k.extent[1] % 2 != 0)
    return door::invalid("fovea: differential attention pairs heads: q has %td, k has %td", q.extent[1], k.extent[1]);
  if (!options.norm_weight.empty() && static_cast<index_t>(options.norm_weight.size()) != v.extent[3])
    return door::invalid("fovea: norm_weight has %zu entries for dim_v %td", options.norm_weight.size(), v.extent[3]);
  if (!std::isfinite(options.lambda) || !std::isfinite(options.lambda_init) || !(options.eps >= 0.f))
    return door::invalid("fovea: lambda %g and lambda_init %g must be finite, eps %g not negative",
                         static_cast<double>(options.lambda), static_cast<double>(options.lambda_init),
                         static_cast<double>(options.eps));
  if (Status s = door::check_differential_options(attention); !s.ok()) return s;
  const Operand q0 = door::every_other_head(q, 0), q1 = door::every_other_head(q, 1);
  const View<TK, 4> k0 = door::every_other_head(k, 0), k1 = door::every_other_head(k, 1);
  if (Status s = door::check_dense(q0, k0, v); !s.ok()) return s;
  const Kv kv0 = door::kv_of(k0, v), kv1 = door::kv_of(k1, v);
  if (Status s = door::check_half(q1, kv1, out, attention); !s.ok()) return s;   // the other half is checked as it runs
  Tensor<float> first;
  if (Status s = door::take_floats("first_half", options.first_half, out, out.extent[1], first); !s.ok()) return s;
  if (Status s = door::check_half(q1, kv1, first, attention); options.first_half && !s.ok()) return s;
  const door::Bytes weight_bytes = door::span_bytes(options.norm_weight);
  if (Status s = door::check_input("norm_weight", weight_bytes, out, first, attention); !s.ok()) return s;

  using Compiled = door::FormatsOf<TK, TV>;
  const auto plain = variant();
  if (Status s = door::run(door::call_of_variant<Compiled>(q0, kv0, first, attention, plain)); !s.ok()) return s;
  const auto difference =
      variant().with_close(door::SubtractAndNorm{first, options.lambda, 1.f - options.lambda_init, options.eps,
                                                 options.norm_weight.empty() ? nullptr : options.norm_weight.data()});
  return door::run(door::call_of_variant<Compiled>(q1, kv1, out, attention, difference));
}

// V2. q [batch, 2 h, len_q, dim_qk], k and v with h_kv heads, 2 h / h_kv even; out [batch, h, len_q, dim_v].
template <class TK, class TV>
Status differential_attention_v2(const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, const Result& out,
                                 const DifferentialV2Options& options) {
  const AttentionOptions& attention = options.attention;
  if (q.extent[1] % 2 != 0 || k.extent[1] < 1 || (q.extent[1] / 2) % k.extent[1] != 0)
    return door::invalid("fovea: differential attention pairs heads of one kv head: q has %td, k has %td", q.extent[1],
                         k.extent[1]);
  if (Status s = door::check_differential_options(attention); !s.ok()) return s;
  const Operand q0 = door::every_other_head(q, 0), q1 = door::every_other_head(q, 1);
  if (Status s = door::check_dense(q0, k, v); !s.ok()) return s;
  const Kv kv = door::kv_of(k, v);
  if (Status s = door::check_half(q1, kv, out, attention); !s.ok()) return s;
  const View<const float, 3> lambda = tidy(options.lambda);
  door::Bytes lambda_bytes;
  if (lambda.extent != std::array<index_t, 3>{out.extent[0], out.extent[1], out.extent[2]})
    return door::invalid("fovea: lambda is [%td, %td, %td], must be [%td, %td, %td]", lambda.extent[0], lambda.extent[1],
                         lambda.extent[2], out.extent[0], out.extent[1], out.extent[2]);
  if (Status s = door::check_data("lambda", lambda, lambda_bytes); !s.ok()) return s;
  const bool at_once = static_cast<bool>(options.halves);
  Tensor<float> first;
  if (Status s = door::take_floats("halves", options.halves, out, at_once ? q.extent[1] : out.extent[1], first); !s.ok())
    return s;
  if (Status s = door::check_input("lambda", lambda_bytes, out, first, attention); !s.ok()) return s;

  using Compiled = door::FormatsOf<TK, TV>;
  const auto plain = variant();
  if (!at_once) {
    if (Status s = door::run(door::call_of_variant<Compiled>(q0, kv, first, attention, plain)); !s.ok()) return s;
    const auto difference = variant().with_close(door::SubtractSigmoid{first, lambda});
    return door::run(door::call_of_variant<Compiled>(q1, kv, out, attention, difference));
  }
  if (Status s = door::run(door::call_of_variant<Compiled>(q, kv, first, attention, plain)); !s.ok()) return s;
  const Result to = door::tidy_operand(out);
  const index_t heads = out.extent[1], len = out.extent[2], dim = out.extent[3];
  const index_t rows = attention.cu_len_q.empty() ? len : attention.cu_len_q.back();   // rows behind the last sequence stay
  const auto combine = [&](int, index_t task) {
    const index_t b = task / heads, h = task % heads;
    alignas(f32) float values[door::kMaxDim + kLanes];
    for (index_t i = 0; i < rows; ++i) {
      const float share = door::logistic(lambda(b, h, i));
      const auto row = [&](index_t head) {
        return first.data + b * first.stride[0] + head * first.stride[1] + i * first.stride[2];
      };
      for (index_t d = 0; d < dim; d += kLanes) {
        const auto part = [&](index_t head) {
          return load_strided(row(head) + d * first.stride[3], first.stride[3], dim - d);
        };
        store(values + d, fma(f32(-share), part(2 * h + 1), part(2 * h)));
      }
      const index_t at = b * to.stride[0] + h * to.stride[1] + i * to.stride[2];
      write_numbers(to.format, values, dim, to.data + at * row_bytes(to.format, 1), to.stride[3]);
    }
  };
  deal(attention.executor, attention.executor.lanes(), out.extent[0] * heads, combine);
  return {};
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
