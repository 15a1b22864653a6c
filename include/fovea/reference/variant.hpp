// SPDX-License-Identifier: Apache-2.0
// Attention with a score, a mask and a normaliser of the caller's, as plain loops in double.
#pragma once
#include "softmax.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// The softmax of a row's visible scores, in place.
struct SoftmaxWeights {
  void operator()(std::span<double> scores) const {
    double top = -std::numeric_limits<double>::infinity(), sum = 0;
    for (const double s : scores) top = std::max(top, s);
    for (double& s : scores) sum += s = std::exp(s - top);
    for (double& s : scores) s /= sum;
  }
};

// score(s, batch, q_head, q, k) -> double and keep(batch, q_head, q, k) -> bool take positions as ints, as the functors of
// variants do; weigh(span<double>) turns the scores of a row's visible keys into weights. Of the options: scale, causal,
// window, offsets, lengths, softcap, ALiBi, bias and keep, before score and beside keep. Elements of K and V that no row may
// see are never read.
template <class Score, class Keep, class Weigh>
void variant(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
             const AttentionOptions& options, const Score& score, const Keep& keep, const Weigh& weigh) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const index_t group = q.extent[1] / k.extent[1];
  const double scale = options.scale ? double{*options.scale} : 1 / std::sqrt(static_cast<double>(q.extent[3]));
  const double cap = options.softcap;
  std::vector<index_t> keys;
  std::vector<double> weights;
  for (index_t sequence = 0; sequence < softmax_sequences(options, q.extent[0]); ++sequence) {
    const SoftmaxSequence s = softmax_sequence(sequence, q, k, options);
    for (index_t head = 0; head < q.extent[1]; ++head) {
      for (index_t i = 0; i < s.len_q; ++i) {
        const index_t pos = i + s.q_offset;
        const int batch = static_cast<int>(sequence), q_head = static_cast<int>(head), at = static_cast<int>(pos);
        keys.clear();
        weights.clear();
        for (index_t j = 0; j < s.len_k; ++j) {
          if (options.causal != Causal::none && j > pos) continue;
          if (options.window.left >= 0 && pos - j > options.window.left) continue;
          if (options.window.right >= 0 && j - pos > options.window.right) continue;
          if (options.keep && softmax_broadcast(options.keep, sequence, head, i, j) == 0) continue;
          const double bias = options.bias ? double{softmax_broadcast(options.bias, sequence, head, i, j)} : 0;
          if (bias == -infinity || !keep(batch, q_head, at, static_cast<int>(j))) continue;
          double dot = 0;
          for (index_t d = 0; d < q.extent[3]; ++d)
            dot += double{q(s.batch, head, s.first_q + i, d)} * double{k(s.batch, head / group, s.first_k + j, d)};
          double value = scale * dot;
          if (cap > 0) value = cap * std::tanh(value / cap);
          if (!options.alibi_slopes.empty())
            value -= double{options.alibi_slopes[static_cast<std::size_t>(head)]} * std::abs(static_cast<double>(pos - j));
          weights.push_back(score(value + bias, batch, q_head, at, static_cast<int>(j)));
          keys.push_back(j);
        }
        if (!weights.empty()) weigh(std::span<double>(weights));
        for (index_t d = 0; d < v.extent[3]; ++d) {
          double sum = 0;
          for (std::size_t n = 0; n < keys.size(); ++n)
            sum += weights[n] * double{v(s.batch, head / group, s.first_k + keys[n], d)};
          out(s.batch, head, s.first_q + i, d) = sum;
        }
      }
    }
  }
}

}  // namespace FOVEA_ARCH
}  // namespace reference
}  // namespace v0
}  // namespace fovea
