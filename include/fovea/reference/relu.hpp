// SPDX-License-Identifier: Apache-2.0
// ReLU attention as plain loops in double:  o_i = 1/L sum_j relu(s_ij) v_j.
#pragma once
#include "variant.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// out [batch, q_head, pos, dim_v]; L = keys, or with keys = 0 the number of keys the row sees.
inline void relu(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
                 const AttentionOptions& options, double keys = 0) {
  variant(
      q, k, v, out, options, [](double s, int, int, int, int) { return s; }, [](int, int, int, int) { return true; },
      [keys](std::span<double> scores) {
        const double length = keys == 0 ? static_cast<double>(scores.size()) : keys;
        for (double& s : scores) s = std::max(s, 0.) / length;
      });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
