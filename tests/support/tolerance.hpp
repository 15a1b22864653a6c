// SPDX-License-Identifier: Apache-2.0
// How far an fp32 result may be from the double reference. Derived, not tuned: docs/numerics.md, section Tolerance, has the
// steps; every constant below is named there.
#pragma once
#include <cmath>
#include <limits>
#include <vector>

#include "fovea/reference/softmax.hpp"

namespace test {

using fovea::AttentionOptions;
using fovea::index_t;
using fovea::Tensor;
using fovea::View;

inline constexpr double kUnit = 0x1p-24;   // unit roundoff of fp32: one rounded operation is off by at most kUnit relative
inline constexpr double kExpUnits = 6;     // exp is within 3 ULP
inline constexpr double kTanhUnits = 8;    // tanh is within 4 ULP of its value
inline constexpr double kLogUnits = 4;
inline constexpr double kSmallestTile = 64;   // keys per running-maximum step, at least

// Absolute error of one score in natural units.
inline double score_error(const fovea::reference::SoftmaxTerm& term, index_t dim_qk, const AttentionOptions& options,
                          double max) {
  const double dot = (static_cast<double>(dim_qk) + 6) * term.dots;
  const double cap = options.softcap > 0 ? (kTanhUnits + 4) * std::min(double{options.softcap}, term.dots) : 0;
  return kUnit * (dot + cap + 6 * term.added + 4 * (std::abs(term.score) + std::abs(max)));
}

// Relative error that sums over `terms` keys, rescaling between tiles and the closing division add to every weight alike.
inline double sum_error(index_t terms, index_t keys) {
  const double steps = static_cast<double>(keys) / kSmallestTile + 2;
  return kUnit * (2 * static_cast<double>(terms) + 2 * steps * (kExpUnits + 2) + 16);
}

struct Expected {
  index_t q_heads, total, dim_v;
  std::vector<double> out, out_error;   // [batch, q_head, pos, dim_v]
  std::vector<double> lse, lse_error;   // [batch, q_head, pos]
};

// The reference's result with the error budget of every element.
inline Expected expect(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v,
                       const AttentionOptions& options) {
  const index_t batch = q.extent[0], heads = q.extent[1], len = q.extent[2], dim_v = v.extent[3];
  const index_t group = heads / k.extent[1];
  const auto rows = static_cast<std::size_t>(batch * heads * len), values = rows * static_cast<std::size_t>(dim_v);
  Expected e{heads,
             len,
             dim_v,
             std::vector<double>(values),
             std::vector<double>(values),
             std::vector<double>(rows),
             std::vector<double>(rows)};
  const Tensor<double> out = fovea::bhsd(e.out.data(), batch, heads, len, dim_v);
  const View<double, 3> lse{e.lse.data(), {batch, heads, len}, {heads * len, len, 1}};
  std::vector<double> magnitude(static_cast<std::size_t>(dim_v)), spread(magnitude);

  fovea::reference::softmax(q, k, v, out, options, lse, [&](const fovea::reference::SoftmaxRow& row) {
    std::fill(magnitude.begin(), magnitude.end(), 0.);
    std::fill(spread.begin(), spread.end(), 0.);
    double mean_error = 0;
    for (const auto& term : row.terms) {
      const double relative = std::expm1(score_error(term, q.extent[3], options, row.max) + kExpUnits * kUnit);
      mean_error += term.weight * relative;
      const float* const v_row = &v(row.batch, row.q_head / group, row.first_k + term.key, 0);
      for (index_t d = 0; d < dim_v; ++d) {
        const double part = term.weight * std::abs(double{v_row[d * v.stride[3]]});
        magnitude[static_cast<std::size_t>(d)] += part;
        spread[static_cast<std::size_t>(d)] += part * relative;
      }
    }
    if (std::isfinite(row.sink)) {
      const double relative = std::expm1(kUnit * (4 * (std::abs(row.sink) + std::abs(row.max)) + kExpUnits));
      mean_error += std::exp(row.sink - row.lse) * relative;
    }
    const auto terms = static_cast<index_t>(row.terms.size());
    const double common = mean_error + sum_error(terms, terms == 0 ? 0 : row.terms.back().key - row.terms.front().key + 1);
    const auto at = static_cast<std::size_t>((row.batch * heads + row.q_head) * len + row.pos_q);
    for (std::size_t d = 0; d < static_cast<std::size_t>(dim_v); ++d) {
      // Weights below the smallest normal may be flushed to zero: 2^-126 of each value, far below any value used in tests.
      e.out_error[at * static_cast<std::size_t>(dim_v) + d] = spread[d] + common * magnitude[d] + 1e-30;
    }
    e.lse_error[at] =
        std::isfinite(row.lse) ? common + kUnit * (kLogUnits * 16 + 4 * (std::abs(row.max) + std::abs(row.lse))) : 0;
  });
  return e;
}

// |got - expected| in units of the budget. NaN where NaN is due and equal infinities count as 0, other mismatches as infinite.
inline double in_budgets(double got, double expected, double budget) {
  if (std::isnan(expected) || std::isnan(got)) {
    return std::isnan(expected) == std::isnan(got) ? 0 : std::numeric_limits<double>::infinity();
  }
  if (got == expected) return 0;
  if (!std::isfinite(got) || !std::isfinite(expected)) return std::numeric_limits<double>::infinity();
  return std::abs(got - expected) / budget;
}

}  // namespace test
