// SPDX-License-Identifier: Apache-2.0
// SnapKV's choice as plain loops in double.
#pragma once
#include <algorithm>
#include <vector>

#include "best_of.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// What the last `window` queries of a prompt give each key: q and k [token][number].
inline std::vector<double> snapkv_votes(const std::vector<std::vector<double>>& q, const std::vector<std::vector<double>>& k,
                                        index_t window, double scale) {
  std::vector<double> votes(k.size(), 0.);
  const auto len = static_cast<index_t>(k.size());
  for (index_t i = std::max<index_t>(len - window, 0); i < len; ++i) {
    std::vector<double> weight;
    double sum = 0;
    for (index_t j = 0; j <= i; ++j) {
      double dot = 0;
      for (std::size_t d = 0; d < k[0].size(); ++d)
        dot += q[static_cast<std::size_t>(i)][d] * k[static_cast<std::size_t>(j)][d];
      weight.push_back(std::exp(scale * dot));
      sum += weight.back();
    }
    for (std::size_t j = 0; j < weight.size(); ++j) votes[j] += weight[j] / sum;
  }
  return votes;
}

// The rows that stay, rising.
inline std::vector<index_t> snapkv_keep(const std::vector<double>& votes, index_t window, index_t capacity, index_t kernel,
                                        bool average) {
  const auto len = static_cast<index_t>(votes.size());
  std::vector<index_t> keep;
  if (len <= capacity) {
    for (index_t n = 0; n < len; ++n) keep.push_back(n);
    return keep;
  }
  std::vector<double> smooth;
  for (index_t s = 0; s < len - window; ++s) {
    double sum = 0, max = -std::numeric_limits<double>::infinity();
    for (index_t n = s - kernel / 2; n <= s + kernel / 2; ++n) {
      const double vote = n < 0 || n >= len - window ? 0 : votes[static_cast<std::size_t>(n)];
      sum += vote;
      max = std::max(max, vote);
    }
    smooth.push_back(average ? sum / static_cast<double>(kernel) : max);
  }
  keep = best_of(smooth, capacity - window);
  std::sort(keep.begin(), keep.end());
  for (index_t n = len - window; n < len; ++n) keep.push_back(n);
  return keep;
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
