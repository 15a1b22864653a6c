// SPDX-License-Identifier: Apache-2.0
// Star Attention's two phases as plain loops in double, and the merge of partial results.
#pragma once
#include "listed_keys.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// Phase 1: every block behind the first is a sequence of its own, the anchor (a copy of the first tokens) and the block,
// dense causal inside. Rows of the copies are dropped.
inline void star_context(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
                         index_t block, index_t anchor, const AttentionOptions& options, View<double, 3> lse = {}) {
  listed_keys(q, k, v, out, options, lse, [&](index_t, index_t, index_t t, const auto& see) {
    const index_t begin = t / block * block;
    std::vector<index_t> sequence;   // positions of its tokens
    for (index_t s = 0; begin > 0 && s < anchor; ++s) sequence.push_back(s);
    for (index_t s = begin; s < begin + block; ++s) sequence.push_back(s);
    for (const index_t s : sequence) {
      see(s);
      if (s == t) break;
    }
  });
}

// One row of several normalised results over disjoint keys: out = sum w_p out_p / sum w_p, w_p = exp(lse_p - m), and the
// sink's share in the denominator. Returns the LSE, sink included.
inline double merge_row(std::span<const double> lse, std::span<const double> values, double sink, std::span<double> out) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  double top = sink;
  for (const double l : lse) top = std::max(top, l);
  std::fill(out.begin(), out.end(), 0.);
  if (top == -infinity) return top;
  double sum = std::exp(sink - top);
  for (std::size_t p = 0; p < lse.size(); ++p) {
    const double weight = std::exp(lse[p] - top);
    sum += weight;
    for (std::size_t d = 0; d < out.size(); ++d) out[d] += weight * values[p * out.size() + d];
  }
  for (double& x : out) x /= sum;
  return top + std::log(sum);
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
