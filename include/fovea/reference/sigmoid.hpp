// SPDX-License-Identifier: Apache-2.0
// Sigmoid attention as plain loops in double:  o_i = sum_j v_j / (1 + exp(-(s_ij + bias))).
#pragma once
#include "variant.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// out [batch, q_head, pos, dim_v]. Of the options, what reference::variant lists.
inline void sigmoid(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
                    const AttentionOptions& options, double bias) {
  variant(
      q, k, v, out, options, [](double s, int, int, int, int) { return s; }, [](int, int, int, int) { return true; },
      [bias](std::span<double> scores) {
        for (double& s : scores) s = 1 / (1 + std::exp(-(s + bias)));
      });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
