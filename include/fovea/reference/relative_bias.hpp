// SPDX-License-Identifier: Apache-2.0
// Attention with terms that depend on the distance of key and query, as plain loops in double: the one loop, and biases by
// T5's buckets and by a table of pairs.
#pragma once
#include "softmax.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {

// A query and a key: where they lie in the views, and their positions.
struct RelativePair {
  index_t sequence, q_head, batch, q_pos, kv_head, k_pos;
  index_t pos, key;
};
// What such a pair adds to its score after the scale, and the magnitudes that rounding errors are relative to: of the
// products it is made of, and of itself.
struct RelativeTerm {
  double score, dots = 0, added = 0;
};

inline namespace FOVEA_ARCH {

struct NoRelativeValue {
  double operator()(const RelativePair&, index_t) const { return 0; }
};

// s = scale * dot(q, k) + term(pair).score;  out = sum_j p_j (v_j + value(pair, d)). Scale, causality, window, offsets,
// lengths and sink of the options. watch(SoftmaxRow) as in softmax.hpp. Elements of K and V that no row may see are never
// read.
template <class Term, class Value = NoRelativeValue, class Watch = IgnoreRow>
void relative(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
              const AttentionOptions& options, const Term& term, const Value& value = {}, View<double, 3> lse = {},
              Watch&& watch = {}) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const index_t group = q.extent[1] / k.extent[1];
  const double scale = options.scale ? double{*options.scale} : 1 / std::sqrt(static_cast<double>(q.extent[3]));
  std::vector<SoftmaxTerm> terms;
  for (index_t n = 0; n < softmax_sequences(options, q.extent[0]); ++n) {
    const SoftmaxSequence s = softmax_sequence(n, q, k, options);
    for (index_t head = 0; head < q.extent[1]; ++head) {
      const double sink = options.sink.empty() ? -infinity : double{options.sink[static_cast<std::size_t>(head)]};
      for (index_t i = 0; i < s.len_q; ++i) {
        RelativePair pair{n, head, s.batch, s.first_q + i, head / group, 0, i + s.q_offset, 0};
        double max = sink, sum = 0;
        terms.clear();
        for (index_t j = 0; j < s.len_k; ++j) {
          if (options.causal != Causal::none && j > pair.pos) continue;
          if (options.window.left >= 0 && pair.pos - j > options.window.left) continue;
          if (options.window.right >= 0 && j - pair.pos > options.window.right) continue;
          pair.key = j;
          pair.k_pos = s.first_k + j;
          double dot = 0, dots = 0;
          for (index_t d = 0; d < q.extent[3]; ++d) {
            const double product = double{q(s.batch, head, pair.q_pos, d)} * double{k(s.batch, pair.kv_head, pair.k_pos, d)};
            dot += product;
            dots += std::abs(product);
          }
          const RelativeTerm more = term(pair);
          terms.push_back({j, scale * dot + more.score, 0, std::abs(scale) * dots + more.dots, more.added});
          max = std::max(max, terms.back().score);
        }
        const double reference = max == -infinity ? 0 : max;
        sum = std::exp(sink - reference);
        for (SoftmaxTerm& t : terms) sum += t.weight = std::exp(t.score - reference);
        for (SoftmaxTerm& t : terms) t.weight = sum == 0 ? 0 : t.weight / sum;
        for (index_t d = 0; d < v.extent[3]; ++d) {
          double total = 0;
          for (const SoftmaxTerm& t : terms) {
            pair.key = t.key;
            pair.k_pos = s.first_k + t.key;
            total += t.weight * (double{v(s.batch, pair.kv_head, pair.k_pos, d)} + value(pair, d));
          }
          out(s.batch, head, pair.q_pos, d) = total;
        }
        const double row_lse = reference + std::log(sum);
        if (lse) lse(s.batch, head, pair.q_pos) = row_lse;
        watch(SoftmaxRow{n, head, i, s.batch, pair.q_pos, s.first_k, terms, max, sink, row_lse});
      }
    }
  }
}

// T5's bucket of rel = key - position, in the order of its code.
inline index_t t5_bucket(index_t rel, index_t buckets, double max_distance, bool bidirectional) {
  index_t bucket = 0, n = -rel;
  if (bidirectional) {
    buckets /= 2;
    if (n < 0) bucket += buckets;
    n = std::abs(n);
  } else {
    n = std::max<index_t>(n, 0);
  }
  const index_t exact = buckets / 2;
  if (n < exact) return bucket + n;
  const auto whole = static_cast<double>(exact);
  const double large = whole + std::trunc(std::log(static_cast<double>(n) / whole) / std::log(max_distance / whole) *
                                          static_cast<double>(buckets - exact));
  return bucket + std::min(static_cast<index_t>(large), buckets - 1);
}

// weight [bucket, q_head].
template <class Watch = IgnoreRow>
void t5(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out, View<const float, 2> weight,
        double max_distance, bool bidirectional, const AttentionOptions& options, View<double, 3> lse = {},
        Watch&& watch = {}) {
  const auto term = [&](const RelativePair& pair) {
    const double bias = weight(t5_bucket(pair.key - pair.pos, weight.extent[0], max_distance, bidirectional), pair.q_head);
    return RelativeTerm{bias, 0, std::abs(bias)};
  };
  relative(q, k, v, out, options, term, NoRelativeValue{}, lse, watch);
}

// table [entry, q_head], index [position, key].
template <class Watch = IgnoreRow>
void grid(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
          View<const float, 2> table, View<const std::int32_t, 2> index, const AttentionOptions& options,
          View<double, 3> lse = {}, Watch&& watch = {}) {
  const auto term = [&](const RelativePair& pair) {
    const double bias = table(index(pair.pos, pair.key), pair.q_head);
    return RelativeTerm{bias, 0, std::abs(bias)};
  };
  relative(q, k, v, out, options, term, NoRelativeValue{}, lse, watch);
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
