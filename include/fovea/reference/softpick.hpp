// SPDX-License-Identifier: Apache-2.0
// Softpick as plain loops in double:  p_ij = relu(exp(s_ij) - 1) / (sum_j |exp(s_ij) - 1| + epsilon), over the visible keys.
#pragma once
#include "variant.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// out [batch, q_head, pos, dim_v]. Both sides of the fraction are multiplied by exp(-m), m = max(0, max_j s_ij).
inline void softpick(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
                     const AttentionOptions& options, double epsilon) {
  variant(
      q, k, v, out, options, [](double s, int, int, int, int) { return s; }, [](int, int, int, int) { return true; },
      [epsilon](std::span<double> scores) {
        double m = 0;
        for (const double s : scores) m = std::max(m, s);
        double sum = epsilon * std::exp(-m);
        for (double& s : scores) {
          s = std::exp(s - m) - std::exp(-m);
          sum += std::abs(s);
        }
        for (double& p : scores) p = std::max(p, 0.) / sum;
      });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
