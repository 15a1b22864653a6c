// SPDX-License-Identifier: Apache-2.0
// FlexPrefill's choice of blocks as plain loops in double, one head of one sequence at a time.
#pragma once
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "../core/view.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {

struct FlexPrefillChoice {
  double distance;                       // sqrt of the Jensen-Shannon divergence between seen and foreseen weights
  std::vector<std::vector<bool>> kept;   // [block of queries][block of keys]
};

inline namespace FOVEA_ARCH {

inline void flex_softmax(std::vector<double>& row) {
  const double max = *std::max_element(row.begin(), row.end());
  double z = 0;
  for (double& x : row) z += x = std::exp(x - max);
  for (double& x : row) x /= z;
}

// Indices in the order (weight descending, index ascending).
inline std::vector<std::size_t> flex_order(const std::vector<double>& weight) {
  std::vector<std::size_t> order(weight.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return weight[a] > weight[b]; });
  return order;
}

// The size of the smallest set with gamma of the mass.
inline std::size_t flex_needed(const std::vector<double>& weight, double gamma) {
  if (gamma >= 1) return weight.size();
  const double total = std::accumulate(weight.begin(), weight.end(), 0.);
  double mass = 0;
  std::size_t count = 0;
  for (const std::size_t n : flex_order(weight)) {
    if (mass >= gamma * total) break;
    mass += weight[n];
    ++count;
  }
  return count;
}

inline std::vector<double> flex_mean(View<const float, 2> x, index_t begin, index_t end) {
  std::vector<double> mean(static_cast<std::size_t>(x.extent[1]));
  for (index_t i = begin; i < end; ++i) {
    for (index_t d = 0; d < x.extent[1]; ++d)
      mean[static_cast<std::size_t>(d)] += double{x(i, d)} / static_cast<double>(end - begin);
  }
  return mean;
}

// q [len_q, dim], k [len_k, dim]; query i stands at position pos + i, pos a multiple of block.
inline FlexPrefillChoice flex_prefill_choice(View<const float, 2> q, View<const float, 2> k, double scale, index_t pos,
                                             index_t block, double gamma, double tau, index_t min_blocks) {
  const index_t len_q = q.extent[0], len_k = k.extent[0], q_blocks = (len_q + block - 1) / block;
  const index_t k_blocks = (len_k + block - 1) / block;
  const auto visible = [&](index_t i) { return std::min(pos / block + i + 1, k_blocks); };
  std::vector<std::vector<double>> k_mean;
  for (index_t j = 0; j < k_blocks; ++j) k_mean.push_back(flex_mean(k, j * block, std::min((j + 1) * block, len_k)));
  const auto estimate = [&](const std::vector<double>& query, index_t count) {
    std::vector<double> row;
    for (index_t j = 0; j < count; ++j)
      row.push_back(scale * std::inner_product(query.begin(), query.end(), k_mean[static_cast<std::size_t>(j)].begin(), 0.));
    flex_softmax(row);
    return row;
  };

  // The weights of the last block of queries, by key and by distance.
  std::vector<double> column(static_cast<std::size_t>(len_k)), diagonal(static_cast<std::size_t>(pos + len_q));
  const index_t first = std::max<index_t>(len_q - block, 0);
  for (index_t i = first; i < len_q; ++i) {
    std::vector<double> row;
    for (index_t s = 0; s < len_k && s <= pos + i; ++s) {
      double dot = 0;
      for (index_t d = 0; d < q.extent[1]; ++d) dot += double{q(i, d)} * double{k(s, d)};
      row.push_back(scale * dot);
    }
    flex_softmax(row);
    for (std::size_t s = 0; s < row.size(); ++s) {
      column[s] += row[s];
      diagonal[static_cast<std::size_t>(pos + i) - s] += row[s];
    }
  }
  const auto sums = [&](const std::vector<double>& lines) {
    std::vector<double> blocks((lines.size() + static_cast<std::size_t>(block) - 1) / static_cast<std::size_t>(block));
    for (std::size_t n = 0; n < lines.size(); ++n) blocks[n / static_cast<std::size_t>(block)] += lines[n];
    return blocks;
  };

  FlexPrefillChoice choice{0, std::vector<std::vector<bool>>(static_cast<std::size_t>(q_blocks),
                                                             std::vector<bool>(static_cast<std::size_t>(k_blocks)))};
  std::vector<double> seen = sums(column);
  const std::vector<double> foreseen = estimate(flex_mean(q, first, len_q), visible(q_blocks - 1));
  double divergence = 0;
  for (std::size_t j = 0; j < foreseen.size(); ++j) {
    const double a = seen[j] / static_cast<double>(len_q - first), b = foreseen[j], middle = (a + b) / 2;
    if (a > 0) divergence += a / 2 * std::log(a / middle);
    if (b > 0) divergence += b / 2 * std::log(b / middle);
  }
  choice.distance = std::sqrt(std::max(divergence, 0.));

  if (choice.distance < tau) {
    std::vector<double> map;
    for (index_t i = 0; i < q_blocks; ++i) {
      std::vector<double> row = estimate(flex_mean(q, i * block, std::min((i + 1) * block, len_q)), visible(i));
      row.resize(static_cast<std::size_t>(k_blocks));
      map.insert(map.end(), row.begin(), row.end());
    }
    const std::vector<std::size_t> order = flex_order(map);
    const std::size_t needed = flex_needed(map, gamma), across = static_cast<std::size_t>(k_blocks);
    for (std::size_t n = 0; n < needed; ++n) choice.kept[order[n] / across][order[n] % across] = true;
  } else {
    const auto chosen = [&](const std::vector<double>& lines) {
      const std::vector<double> blocks = sums(lines);
      const std::size_t size = static_cast<std::size_t>(block), needed = (flex_needed(lines, gamma) + size - 1) / size;
      std::vector<bool> marks(blocks.size());
      const std::vector<std::size_t> order = flex_order(blocks);
      for (std::size_t n = 0; n < std::min(std::max(needed, static_cast<std::size_t>(min_blocks)), blocks.size()); ++n)
        marks[order[n]] = true;
      return marks;
    };
    const std::vector<bool> columns = chosen(column), diagonals = chosen(diagonal);
    for (index_t i = 0; i < q_blocks; ++i) {
      for (index_t j = 0; j < visible(i); ++j) {
        const auto back = static_cast<std::size_t>(pos / block + i - j);
        choice.kept[static_cast<std::size_t>(i)][static_cast<std::size_t>(j)] =
            columns[static_cast<std::size_t>(j)] || (back < diagonals.size() && diagonals[back]);
      }
    }
  }
  for (index_t i = 0; i < q_blocks; ++i) {
    std::vector<bool>& row = choice.kept[static_cast<std::size_t>(i)];
    for (index_t j = visible(i); j < k_blocks; ++j) row[static_cast<std::size_t>(j)] = false;
    row[0] = true;
    if (pos / block + i < k_blocks) row[static_cast<std::size_t>(pos / block + i)] = true;
  }
  return choice;
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
