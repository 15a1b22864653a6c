// SPDX-License-Identifier: Apache-2.0
// H2O as plain loops in double: a prompt that is attended densely, then tokens that each attend and then evict.
#pragma once
#include <algorithm>
#include <vector>

#include "best_of.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

struct H2oRun {
  std::vector<std::vector<std::vector<double>>> out;   // [q_head of the group][token][number]
  std::vector<std::vector<index_t>> kept;              // [token]  after its step; from the last token of the prompt on
  std::vector<double> scores;                          // of what is kept at the end
};

// One kv head: q [q_head of the group][token][number], k and v [token][number].
inline H2oRun h2o(const std::vector<std::vector<std::vector<double>>>& q, const std::vector<std::vector<double>>& k,
                  const std::vector<std::vector<double>>& v, index_t prompt, index_t heavy, index_t recent, double scale) {
  H2oRun run;
  run.out.resize(q.size());
  run.kept.resize(k.size());
  std::vector<index_t> rows;
  std::vector<double> scores;
  for (std::size_t t = 0; t < k.size(); ++t) {
    rows.push_back(static_cast<index_t>(t));
    scores.push_back(0);
    for (std::size_t g = 0; g < q.size(); ++g) {
      std::vector<double> weight, row(v[0].size(), 0.);
      for (const index_t key : rows) {
        double dot = 0;
        for (std::size_t d = 0; d < q[g][t].size(); ++d) dot += q[g][t][d] * k[static_cast<std::size_t>(key)][d];
        weight.push_back(scale * dot);
      }
      const double max = *std::max_element(weight.begin(), weight.end());
      double sum = 0;
      for (double& w : weight) sum += w = std::exp(w - max);
      for (std::size_t n = 0; n < rows.size(); ++n) {
        scores[n] += weight[n] / sum;
        for (std::size_t d = 0; d < row.size(); ++d) row[d] += weight[n] / sum * v[static_cast<std::size_t>(rows[n])][d];
      }
      run.out[g].push_back(row);
    }
    if (static_cast<index_t>(t) + 1 < prompt) continue;
    const index_t others = std::max<index_t>(static_cast<index_t>(rows.size()) - recent, 0);
    std::vector<index_t> stays = best_of({scores.begin(), scores.begin() + others}, heavy);
    std::sort(stays.begin(), stays.end());
    for (index_t n = others; n < static_cast<index_t>(rows.size()); ++n) stays.push_back(n);
    std::vector<index_t> next_rows;
    std::vector<double> next_scores;
    for (const index_t n : stays) {
      next_rows.push_back(rows[static_cast<std::size_t>(n)]);
      next_scores.push_back(scores[static_cast<std::size_t>(n)]);
    }
    rows = next_rows;
    scores = next_scores;
    run.kept[t] = rows;
  }
  run.scores = scores;
  return run;
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
