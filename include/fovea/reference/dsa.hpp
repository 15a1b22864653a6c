// SPDX-License-Identifier: Apache-2.0
// DeepSeek Sparse Attention as plain loops in double, in the letters of DeepSeek-V3.2: the indexer's rows, its scores, the
// top-k under a total order, and softmax attention over the list. Inputs are trusted.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "listed_keys.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// A true LayerNorm: mean, variance, weight and bias.
inline void dsa_layer_norm(std::span<double> x, std::span<const float> weight, std::span<const float> bias, double eps) {
  const auto n = static_cast<double>(x.size());
  double mean = 0, variance = 0;
  for (const double value : x) mean += value / n;
  for (const double value : x) variance += (value - mean) * (value - mean) / n;
  for (std::size_t d = 0; d < x.size(); ++d)
    x[d] = (x[d] - mean) / std::sqrt(variance + eps) * double{weight[d]} + double{bias[d]};
}

// The orthonormal Hadamard transform, entry by entry: H[i][j] = (-1)^(bits that i and j share) / sqrt(n).
inline std::vector<double> dsa_hadamard(std::span<const double> x) {
  std::vector<double> y(x.size(), 0.);
  for (std::size_t i = 0; i < x.size(); ++i) {
    for (std::size_t j = 0; j < x.size(); ++j) {
      bool odd = false;
      for (std::size_t shared = i & j; shared != 0; shared &= shared - 1) odd = !odd;
      y[i] += odd ? -x[j] : x[j];
    }
    y[i] /= std::sqrt(static_cast<double>(x.size()));
  }
  return y;
}

// Pairs (i, i + pairs) of the first 2 * pairs numbers turn by angle[i]; interleaved: pairs (2 i, 2 i + 1).
inline void dsa_rotate(std::span<double> x, std::span<const double> angle, bool interleaved) {
  for (std::size_t i = 0; i < angle.size(); ++i) {
    double& first = x[interleaved ? 2 * i : i];
    double& second = x[interleaved ? 2 * i + 1 : i + angle.size()];
    const double a = first, b = second;
    first = a * std::cos(angle[i]) - b * std::sin(angle[i]);
    second = b * std::cos(angle[i]) + a * std::sin(angle[i]);
  }
}

inline double dsa_scale(double largest, bool ue8m0) {
  const double scale = std::max(largest, 1e-4) / 448;
  return ue8m0 ? std::exp2(std::ceil(std::log2(scale))) : scale;
}

// I[t, s] = sum_h w[h] max(q[h] . k, 0).
inline double dsa_score(std::span<const double> q, std::span<const double> w, std::span<const double> k) {   // [head, dim]
  double score = 0;
  for (std::size_t h = 0; h < w.size(); ++h) {
    double dot = 0;
    for (std::size_t d = 0; d < k.size(); ++d) dot += q[h * k.size() + d] * k[d];
    score += w[h] * std::max(dot, 0.);
  }
  return score;
}

// The best k: score descending, index ascending; NaN and -inf are never taken. By index ascending, -1 behind them.
inline std::vector<std::int32_t> dsa_top_k(std::span<const double> scores, index_t k) {
  std::vector<std::int32_t> order;
  for (std::size_t s = 0; s < scores.size(); ++s) {
    if (scores[s] > -std::numeric_limits<double>::infinity()) order.push_back(static_cast<std::int32_t>(s));
  }
  const auto at = [&](std::int32_t s) { return scores[static_cast<std::size_t>(s)]; };
  std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) { return at(a) > at(b); });
  order.resize(std::min(order.size(), static_cast<std::size_t>(k)));
  std::sort(order.begin(), order.end());
  order.resize(static_cast<std::size_t>(k), -1);
  return order;
}

// Softmax attention over the lists [batch, pos, k], one for all heads; keys are the latents, values their first numbers.
inline void dsa_attention(Tensor<const float> q, Tensor<const float> latents, const View<const std::int32_t, 3>& lists,
                          Tensor<double> out, const AttentionOptions& options, View<double, 3> lse = {}) {
  Tensor<const float> values = latents;
  values.extent[3] = out.extent[3];
  listed_keys(q, latents, values, out, options, lse, [&](index_t sequence, index_t, index_t pos, const auto& see) {
    const index_t i = pos - softmax_sequence(sequence, q, latents, options).q_offset;
    for (index_t n = 0; n < lists.extent[2]; ++n) see(index_t{lists(sequence, i, n)});
  });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
