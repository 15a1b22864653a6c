// SPDX-License-Identifier: Apache-2.0
// MInference's vertical-slash pattern as plain loops in double, one head of one sequence at a time.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "../core/view.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {

// vertical[s] = sum over the last queries of their weight on key s; slash[o] = the same on the diagonal s = t - o.
struct VerticalSlashSums {
  std::vector<double> vertical, slash;
};
struct VerticalSlashLines {
  std::vector<std::int32_t> verticals, slashes;   // ascending
};

inline namespace FOVEA_ARCH {

// q [len_q, dim], k [len_k, dim] of one head; query i stands at position pos + i.
inline VerticalSlashSums vertical_slash_sums(View<const float, 2> q, View<const float, 2> k, double scale, index_t pos,
                                             index_t last_queries) {
  const index_t len_q = q.extent[0], len_k = k.extent[0], diagonals = std::max<index_t>(pos + len_q, 0);
  VerticalSlashSums sums{std::vector<double>(static_cast<std::size_t>(len_k)),
                         std::vector<double>(static_cast<std::size_t>(diagonals))};
  for (index_t i = std::max<index_t>(len_q - last_queries, 0); i < len_q; ++i) {
    const index_t t = pos + i;
    std::vector<double> score;
    for (index_t s = 0; s < len_k && s <= t; ++s) {
      double dot = 0;
      for (index_t d = 0; d < q.extent[1]; ++d) dot += double{q(i, d)} * double{k(s, d)};
      score.push_back(scale * dot);
    }
    if (score.empty()) continue;
    const double max = *std::max_element(score.begin(), score.end());
    double z = 0;
    for (const double x : score) z += std::exp(x - max);
    for (std::size_t s = 0; s < score.size(); ++s) {
      const double weight = std::exp(score[s] - max) / z;
      sums.vertical[s] += weight;
      sums.slash[static_cast<std::size_t>(t) - s] += weight;
    }
  }
  return sums;
}

// The `count` best in the order (score descending, index ascending), ascending.
inline std::vector<std::int32_t> vertical_slash_best(const std::vector<double>& score, index_t count) {
  std::vector<std::int32_t> order(score.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
    return score[static_cast<std::size_t>(a)] > score[static_cast<std::size_t>(b)];
  });
  order.resize(std::min(order.size(), static_cast<std::size_t>(count)));
  std::sort(order.begin(), order.end());
  return order;
}

// The first 30 columns and the nearest 100 diagonals count as infinite; at least 30 columns and 50 diagonals are taken.
inline VerticalSlashLines vertical_slash_lines(VerticalSlashSums sums, index_t verticals, index_t slashes) {
  const auto force = [](std::vector<double>& score, std::size_t count) {
    std::fill_n(score.begin(), std::min(score.size(), count), std::numeric_limits<double>::infinity());
  };
  force(sums.vertical, 30);
  force(sums.slash, 100);
  return {vertical_slash_best(sums.vertical, std::max<index_t>(verticals, 30)),
          vertical_slash_best(sums.slash, std::max<index_t>(slashes, 50))};
}

// Which keys the 64 rows at positions m .. m + 63 look at, before causality: [len_k].
inline std::vector<bool> vertical_slash_keys(const VerticalSlashLines& lines, index_t m, index_t len_k) {
  std::vector<bool> seen(static_cast<std::size_t>(len_k));
  for (const std::int32_t o : lines.slashes) {
    if (o >= m + 64) continue;
    const index_t e = std::max<index_t>(m + 64 - o, 64);
    for (index_t s = e - 64; s < e && s < len_k; ++s) seen[static_cast<std::size_t>(s)] = true;
  }
  for (const std::int32_t s : lines.verticals) seen[static_cast<std::size_t>(s)] = true;
  return seen;
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
