// SPDX-License-Identifier: Apache-2.0
// MoSA as plain loops in double, in the order of the published code: lists are best first, masks compare positions.
#pragma once
#include <vector>

#include "../core/view.hpp"
#include "best_of.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

inline index_t mosa_count(index_t len, double sparsity) {
  index_t k = static_cast<index_t>(static_cast<double>(len) / sparsity);
  if (k < 2) k = 2;
  return k > len ? len : k;
}

// The tokens one head takes, best first; include_first: token 0, then the best of the others.
inline std::vector<index_t> mosa_select(const std::vector<double>& router, double sparsity, bool include_first) {
  const index_t k = mosa_count(static_cast<index_t>(router.size()), sparsity);
  if (!include_first || router.empty()) return best_of(router, k);
  std::vector<index_t> all{0};
  for (const index_t t : best_of({router.begin() + 1, router.end()}, k - 1)) all.push_back(t + 1);
  return all;
}

// Turns the first 2 * pairs numbers by position * 10000^(-m / pairs), halves of a pair `pairs` apart.
inline void mosa_rope(std::vector<double>& x, index_t pairs, index_t position) {
  for (index_t m = 0; m < pairs; ++m) {
    const double angle =
        static_cast<double>(position) * std::pow(10000., -static_cast<double>(m) / static_cast<double>(pairs));
    double &a = x[static_cast<std::size_t>(m)], &b = x[static_cast<std::size_t>(m + pairs)];
    const double turned = a * std::cos(angle) - b * std::sin(angle);
    b = a * std::sin(angle) + b * std::cos(angle);
    a = turned;
  }
}

// The rows of the chosen tokens, in the order of the list: q, k, v [list, dim].
inline std::vector<std::vector<double>> mosa_head(const std::vector<index_t>& chosen, std::vector<std::vector<double>> q,
                                                  std::vector<std::vector<double>> k,
                                                  const std::vector<std::vector<double>>& v,
                                                  const std::vector<double>& router, double scale, index_t rope_pairs) {
  std::vector<std::vector<double>> out;
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    mosa_rope(q[i], rope_pairs, chosen[i]);
    mosa_rope(k[i], rope_pairs, chosen[i]);
  }
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    std::vector<double> score(chosen.size()), row(v.empty() ? 0 : v[0].size(), 0.);
    double max = -std::numeric_limits<double>::infinity(), sum = 0;
    for (std::size_t j = 0; j < chosen.size(); ++j) {
      if (chosen[j] > chosen[i]) continue;
      for (std::size_t d = 0; d < q[i].size(); ++d) score[j] += scale * q[i][d] * k[j][d];
      max = std::max(max, score[j]);
    }
    for (std::size_t j = 0; j < chosen.size(); ++j) {
      if (chosen[j] <= chosen[i]) sum += std::exp(score[j] - max);
    }
    for (std::size_t j = 0; j < chosen.size(); ++j) {
      if (chosen[j] > chosen[i]) continue;
      for (std::size_t d = 0; d < row.size(); ++d) row[d] += router[i] * std::exp(score[j] - max) / sum * v[j][d];
    }
    out.push_back(row);
  }
  return out;
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
