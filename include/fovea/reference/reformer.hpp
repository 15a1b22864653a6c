// SPDX-License-Identifier: Apache-2.0
// Reformer's LSH attention as plain loops in double: all rounds in one sorted row of slots, as the published code has it.
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

// argmax [x R, -x R] of one round; rotation[d][n] for n < buckets / 2. The first of equal values.
inline index_t reformer_bucket(const std::vector<double>& x, const std::vector<std::vector<double>>& rotation) {
  std::vector<double> turned(rotation[0].size(), 0.);
  for (std::size_t d = 0; d < x.size(); ++d) {
    for (std::size_t n = 0; n < turned.size(); ++n) turned[n] += x[d] * rotation[d][n];
  }
  const std::size_t half = turned.size();
  for (std::size_t n = 0; n < half; ++n) turned.push_back(-turned[n]);
  return std::max_element(turned.begin(), turned.end()) - turned.begin();
}

struct ReformerRule {
  index_t bucket_size;
  bool causal, count_duplicates;
  double self_score, scale;
};

// The tokens every token meets, round by round: met[round][token].
inline std::vector<std::vector<std::vector<index_t>>> reformer_met(const std::vector<std::vector<index_t>>& buckets,
                                                                   index_t bucket_size) {
  const auto rounds = static_cast<index_t>(buckets.size()), len = static_cast<index_t>(buckets[0].size());
  struct Slot {
    index_t key, round, token;
  };
  std::vector<Slot> slots;
  for (index_t h = 0; h < rounds; ++h) {
    for (index_t t = 0; t < len; ++t) {
      const index_t bucket = buckets[static_cast<std::size_t>(h)][static_cast<std::size_t>(t)];
      slots.push_back({(bucket + h * (len / bucket_size)) * len + t, h, t});
    }
  }
  std::sort(slots.begin(), slots.end(), [](const Slot& a, const Slot& b) { return a.key < b.key; });
  std::vector<std::vector<std::vector<index_t>>> met(buckets.size(), std::vector<std::vector<index_t>>(buckets[0].size()));
  const index_t pieces = rounds * len / bucket_size;
  for (std::size_t n = 0; n < slots.size(); ++n) {
    const index_t piece = static_cast<index_t>(n) / bucket_size;
    for (const index_t from : {(piece + pieces - 1) % pieces, piece}) {
      for (index_t i = 0; i < bucket_size; ++i)
        met[static_cast<std::size_t>(slots[n].round)][static_cast<std::size_t>(slots[n].token)].push_back(
            slots[static_cast<std::size_t>(from * bucket_size + i)].token);
    }
  }
  return met;
}

// x and v of one head, [token][number]; buckets [round][token].
inline std::vector<std::vector<double>> reformer(const std::vector<std::vector<double>>& x,
                                                 const std::vector<std::vector<double>>& v,
                                                 const std::vector<std::vector<index_t>>& buckets,
                                                 const ReformerRule& rule) {
  const auto met = reformer_met(buckets, rule.bucket_size);
  std::vector<std::vector<double>> out(x.size(), std::vector<double>(v[0].size(), 0.));
  for (std::size_t i = 0; i < x.size(); ++i) {
    std::vector<double> lse(buckets.size());
    std::vector<std::vector<double>> rows;
    for (std::size_t h = 0; h < buckets.size(); ++h) {
      std::vector<double> score, row(v[0].size(), 0.);
      for (const index_t token : met[h][i]) {
        const auto j = static_cast<std::size_t>(token);
        double dot = 0, norm = 0, times = 0;
        for (std::size_t d = 0; d < x[i].size(); ++d) {
          dot += x[i][d] * x[j][d];
          norm += x[j][d] * x[j][d];
        }
        double s = i == j ? rule.self_score : rule.scale * dot / std::max(std::sqrt(norm), 1e-12);
        if (!rule.count_duplicates) {
          for (const auto& round : met) times += static_cast<double>(std::count(round[i].begin(), round[i].end(), token));
          s -= std::log(times);
        }
        score.push_back(rule.causal && j > i ? -std::numeric_limits<double>::infinity() : s);
      }
      const double max = *std::max_element(score.begin(), score.end());
      double sum = 0;
      for (const double s : score) sum += std::exp(s - max);
      for (std::size_t n = 0; n < score.size(); ++n) {
        for (std::size_t d = 0; d < row.size(); ++d)
          row[d] += std::exp(score[n] - max) / sum * v[static_cast<std::size_t>(met[h][i][n])][d];
      }
      lse[h] = max + std::log(sum);
      rows.push_back(row);
    }
    const double max = *std::max_element(lse.begin(), lse.end());
    double sum = 0;
    for (const double l : lse) sum += std::exp(l - max);
    for (std::size_t h = 0; h < lse.size(); ++h) {
      for (std::size_t d = 0; d < out[i].size(); ++d) out[i][d] += std::exp(lse[h] - max) / sum * rows[h][d];
    }
  }
  return out;
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
