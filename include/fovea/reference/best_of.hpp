// SPDX-License-Identifier: Apache-2.0
// The total order of every choice: score descending, then index ascending; NaN and -inf are never taken.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../core/types.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// Indices of the k best scores, best first.
inline std::vector<index_t> best_of(const std::vector<double>& scores, index_t k) {
  std::vector<index_t> order;
  for (std::size_t n = 0; n < scores.size(); ++n) {
    if (scores[n] > -std::numeric_limits<double>::infinity()) order.push_back(static_cast<index_t>(n));
  }
  std::stable_sort(order.begin(), order.end(), [&](index_t a, index_t b) {
    return scores[static_cast<std::size_t>(a)] > scores[static_cast<std::size_t>(b)];
  });
  if (static_cast<index_t>(order.size()) > k) order.resize(static_cast<std::size_t>(k));
  return order;
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
