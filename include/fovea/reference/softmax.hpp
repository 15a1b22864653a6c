// SPDX-License-Identifier: Apache-2.0
// Softmax attention as plain loops in double: the meaning of fovea::attention, one row at a time.
// No tiles, no SIMD, no running maximum. Inputs are trusted: the front door is what validates.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "../core/attention_options.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {

// One visible key of a row. `dots` and `added` are the magnitudes that rounding errors of the score are relative to.
struct SoftmaxTerm {
  index_t key;
  double score;    // after scale, softcap, ALiBi and bias
  double weight;   // exp(score) / (sum + exp(sink))
  double dots;     // |scale| * sum_d |q_d k_d|
  double added;    // |ALiBi| + |bias|
};

// What one row did; the terms are in the order of their keys and live until the hook returns.
struct SoftmaxRow {
  index_t sequence, q_head, q_index;
  index_t batch, pos_q, first_k;   // where the row and key 0 of its sequence lie in the views
  std::span<const SoftmaxTerm> terms;
  double max, sink, lse;   // sink is -inf without one
};

// The part of the views that belongs to one sequence.
struct SoftmaxSequence {
  index_t batch, first_q, first_k, len_q, len_k, q_offset;
};

inline namespace FOVEA_ARCH {

inline index_t softmax_sequences(const AttentionOptions& options, index_t batch) {
  return options.cu_len_q.empty() ? batch : static_cast<index_t>(options.cu_len_q.size()) - 1;
}

inline SoftmaxSequence softmax_sequence(index_t n, Tensor<const float> q, Tensor<const float> k,
                                        const AttentionOptions& options) {
  const auto at = static_cast<std::size_t>(n);
  SoftmaxSequence s{n, 0, 0, q.extent[2], k.extent[2], 0};
  if (!options.cu_len_q.empty()) {
    const auto &cu_q = options.cu_len_q, &cu_k = options.cu_len_k;
    s = {0, cu_q[at], cu_k[at], cu_q[at + 1] - cu_q[at], cu_k[at + 1] - cu_k[at], 0};
  }
  if (!options.len_k.empty()) s.len_k = options.len_k[at];
  if (options.causal == Causal::bottom_right) s.q_offset = s.len_k - s.len_q;
  if (!options.q_offset.empty()) s.q_offset = options.q_offset[at];
  return s;
}

// An axis of extent 1 is shared by all indices.
template <class T>
T softmax_broadcast(const View<T, 4>& view, index_t sequence, index_t q_head, index_t i, index_t j) {
  return view(view.extent[0] == 1 ? 0 : sequence, view.extent[1] == 1 ? 0 : q_head, view.extent[2] == 1 ? 0 : i, j);
}

struct IgnoreRow {
  void operator()(const SoftmaxRow&) const {}
};

// out [batch, q_head, pos, dim_v]; lse [batch, q_head, pos], optional; watch(SoftmaxRow) is called once per row.
// Elements of K and V that no row may see are never read.
template <class Watch = IgnoreRow>
void softmax(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
             const AttentionOptions& options = {}, View<double, 3> lse = {}, Watch&& watch = {}) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const index_t dim_qk = q.extent[3], dim_v = v.extent[3], group = k.extent[1] == 0 ? 1 : q.extent[1] / k.extent[1];
  const double scale = options.scale ? double{*options.scale} : 1 / std::sqrt(static_cast<double>(dim_qk));
  const double cap = options.softcap;
  std::vector<SoftmaxTerm> terms;
  std::vector<double> sum_v(static_cast<std::size_t>(dim_v));

  for (index_t sequence = 0; sequence < softmax_sequences(options, q.extent[0]); ++sequence) {
    const SoftmaxSequence s = softmax_sequence(sequence, q, k, options);
    for (index_t head = 0; head < q.extent[1]; ++head) {
      for (index_t i = 0; i < s.len_q; ++i) {
        const index_t pos = i + s.q_offset, kv_head = head / group;
        const auto head_at = static_cast<std::size_t>(head);
        const double sink = options.sink.empty() ? -infinity : double{options.sink[head_at]};
        double max = sink;
        terms.clear();
        for (index_t j = 0; j < s.len_k; ++j) {
          if (options.causal != Causal::none && j > pos) continue;
          if (options.window.left >= 0 && pos - j > options.window.left) continue;
          if (options.window.right >= 0 && j - pos > options.window.right) continue;
          if (options.keep && softmax_broadcast(options.keep, sequence, head, i, j) == 0) continue;
          const double bias = options.bias ? double{softmax_broadcast(options.bias, sequence, head, i, j)} : 0;
          if (bias == -infinity) continue;

          const float* const q_row = &q(s.batch, head, s.first_q + i, 0);
          const float* const k_row = &k(s.batch, kv_head, s.first_k + j, 0);
          double dot = 0, dots = 0;
          for (index_t d = 0; d < dim_qk; ++d) {
            const double product = double{q_row[d * q.stride[3]]} * double{k_row[d * k.stride[3]]};
            dot += product;
            dots += std::abs(product);
          }
          double score = scale * dot;
          if (cap > 0) score = cap * std::tanh(score / cap);
          const double slope = options.alibi_slopes.empty() ? 0 : double{options.alibi_slopes[head_at]};
          const double alibi = -slope * std::abs(static_cast<double>(pos - j));
          score += alibi + bias;
          max = std::max(max, score);
          terms.push_back({j, score, 0, std::abs(scale) * dots, std::abs(alibi) + std::abs(bias)});
        }

        const double reference = max == -infinity ? 0 : max;
        double sum = sink == reference ? 1 : std::exp(sink - reference);   // an infinite sink takes everything
        for (SoftmaxTerm& term : terms) sum += term.weight = std::exp(term.score - reference);
        std::fill(sum_v.begin(), sum_v.end(), 0.);
        for (SoftmaxTerm& term : terms) {
          term.weight = sum == 0 ? 0 : term.weight / sum;
          const float* const v_row = &v(s.batch, kv_head, s.first_k + term.key, 0);
          for (index_t d = 0; d < dim_v; ++d) {
            sum_v[static_cast<std::size_t>(d)] += term.weight * double{v_row[d * v.stride[3]]};
          }
        }
        const double row_lse = reference + std::log(sum);   // log(0) = -inf: the empty row without a sink
        for (index_t d = 0; d < dim_v; ++d) out(s.batch, head, s.first_q + i, d) = sum_v[static_cast<std::size_t>(d)];
        if (lse) lse(s.batch, head, s.first_q + i) = row_lse;
        watch(SoftmaxRow{sequence, head, i, s.batch, s.first_q + i, s.first_k, terms, max, sink, row_lse});
      }
    }
  }
}

}  // namespace FOVEA_ARCH
}  // namespace reference
}  // namespace v0
}  // namespace fovea
