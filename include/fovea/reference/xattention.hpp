// SPDX-License-Identifier: Apache-2.0
// XAttention's block selection as plain loops in double, one head of one sequence at a time.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "../core/view.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// Sum of an antidiagonal of the S x S tile (row, column): sum_j q[S row + S - 1 - j] . k[S column + j]. Tokens behind the
// last one are zeros.
inline double xattention_strided_score(View<const float, 2> q, View<const float, 2> k, index_t stride, index_t row,
                                       index_t column) {
  double sum = 0;
  for (index_t j = 0; j < stride; ++j) {
    const index_t i = stride * row + stride - 1 - j, s = stride * column + j;
    if (i >= q.extent[0] || s >= k.extent[0]) continue;
    for (index_t d = 0; d < q.extent[1]; ++d) sum += double{q(i, d)} * double{k(s, d)};
  }
  return sum;
}

// [block of queries, block of keys]: the softmax over strided columns, summed over the block's strided rows and columns. A
// strided row sees the columns that start at or before its own first query, whose position is pos + stride * row; scale is
// that of one dot product.
inline std::vector<std::vector<double>> xattention_block_scores(View<const float, 2> q, View<const float, 2> k, double scale,
                                                                index_t pos, index_t block, index_t stride) {
  const index_t q_blocks = (q.extent[0] + block - 1) / block, k_blocks = (k.extent[0] + block - 1) / block;
  std::vector<std::vector<double>> sums(static_cast<std::size_t>(q_blocks),
                                        std::vector<double>(static_cast<std::size_t>(k_blocks)));
  for (index_t row = 0; row * stride < q.extent[0]; ++row) {
    std::vector<double> score;
    for (index_t column = 0; column * stride < k.extent[0] && column * stride <= pos + row * stride; ++column)
      score.push_back(scale / static_cast<double>(stride) * xattention_strided_score(q, k, stride, row, column));
    if (score.empty()) continue;
    const double max = *std::max_element(score.begin(), score.end());
    double z = 0;
    for (const double x : score) z += std::exp(x - max);
    const auto q_block = static_cast<std::size_t>(row * stride / block);
    for (std::size_t column = 0; column < score.size(); ++column) {
      const auto k_block = column * static_cast<std::size_t>(stride) / static_cast<std::size_t>(block);
      sums[q_block][k_block] += std::exp(score[column] - max) / z;
    }
  }
  return sums;
}

// Block 0 and the blocks that hold a query's own position first, then by (sum descending, index ascending), until the sum
// reaches threshold * total. `visible` blocks are not in the future of every row; threshold >= 1 keeps all of them.
inline std::vector<bool> xattention_choose(const std::vector<double>& sums, index_t first_own, index_t visible,
                                           double threshold) {
  std::vector<bool> kept(sums.size());
  std::vector<std::size_t> others;
  double total = 0, mass = 0;
  for (std::size_t b = 0; b < static_cast<std::size_t>(visible); ++b) {
    total += sums[b];
    if (b == 0 || b >= static_cast<std::size_t>(first_own) || threshold >= 1) {
      kept[b] = true;
      mass += sums[b];
    } else {
      others.push_back(b);
    }
  }
  std::stable_sort(others.begin(), others.end(), [&](std::size_t a, std::size_t b) { return sums[a] > sums[b]; });
  for (const std::size_t b : others) {
    if (mass >= threshold * total) break;
    kept[b] = true;
    mass += sums[b];
  }
  return kept;
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
