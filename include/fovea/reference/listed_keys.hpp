// SPDX-License-Identifier: Apache-2.0
// Softmax over the keys that a rule names one by one, as plain loops in double; a key that is named twice counts twice.
#pragma once
#include "softmax.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// keys(sequence, q_head, pos, see): calls see(j) for the keys of the query at position pos; those outside 0 .. len_k - 1 are
// dropped. Of the options: scale, lengths, offsets and causal, which gives positions but masks nothing by itself.
template <class Keys>
void listed_keys(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
                 const AttentionOptions& options, View<double, 3> lse, const Keys& keys) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const index_t dim_qk = q.extent[3], dim_v = v.extent[3], group = q.extent[1] / k.extent[1];
  const double scale = options.scale ? double{*options.scale} : 1 / std::sqrt(static_cast<double>(dim_qk));
  std::vector<std::pair<index_t, double>> scores;
  for (index_t sequence = 0; sequence < softmax_sequences(options, q.extent[0]); ++sequence) {
    const SoftmaxSequence s = softmax_sequence(sequence, q, k, options);
    for (index_t head = 0; head < q.extent[1]; ++head) {
      for (index_t i = 0; i < s.len_q; ++i) {
        scores.clear();
        double top = -infinity;
        keys(sequence, head, s.q_offset + i, [&](index_t j) {
          if (j < 0 || j >= s.len_k) return;
          double dot = 0;
          for (index_t d = 0; d < dim_qk; ++d)
            dot += double{q(s.batch, head, s.first_q + i, d)} * double{k(s.batch, head / group, s.first_k + j, d)};
          scores.emplace_back(j, scale * dot);
          top = std::max(top, scale * dot);
        });
        double sum = 0;
        for (const auto& [j, score] : scores) sum += std::exp(score - top);
        for (index_t d = 0; d < dim_v; ++d) {
          double weighed = 0;
          for (const auto& [j, score] : scores)
            weighed += std::exp(score - top) * double{v(s.batch, head / group, s.first_k + j, d)};
          out(s.batch, head, s.first_q + i, d) = scores.empty() ? 0 : weighed / sum;
        }
        if (lse) lse(s.batch, head, s.first_q + i) = scores.empty() ? -infinity : top + std::log(sum);
      }
    }
  }
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
