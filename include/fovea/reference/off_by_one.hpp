// SPDX-License-Identifier: Apache-2.0
// Softmax-off-by-one as plain loops in double:  p_ij = exp(s_ij) / (1 + sum_j exp(s_ij)).
#pragma once
#include "variant.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// out [batch, q_head, pos, dim_v]. Both sides of the fraction are multiplied by exp(-m), m = max(0, max_j s_ij).
inline void off_by_one(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
                       const AttentionOptions& options) {
  variant(
      q, k, v, out, options, [](double s, int, int, int, int) { return s; }, [](int, int, int, int) { return true; },
      [](std::span<double> scores) {
        double m = 0;
        for (const double s : scores) m = std::max(m, s);
        double sum = std::exp(-m);
        for (double& s : scores) sum += s = std::exp(s - m);
        for (double& p : scores) p /= sum;
      });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
