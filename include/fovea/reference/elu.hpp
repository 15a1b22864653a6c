// SPDX-License-Identifier: Apache-2.0
// ELU + 1 on the scores as plain loops in double:  p = s + 1 if s > 0, else exp(s);  o_i = sum_j p_ij v_j / D_i.
#pragma once
#include "variant.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// out [batch, q_head, pos, dim_v]; D = 1, or with `normalized` the row's sum of p plus 1e-8.
inline void elu(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
                const AttentionOptions& options, bool normalized) {
  variant(
      q, k, v, out, options, [](double s, int, int, int, int) { return s; }, [](int, int, int, int) { return true; },
      [normalized](std::span<double> scores) {
        double sum = 1e-8;
        for (double& s : scores) sum += s = s > 0 ? s + 1 : std::exp(s);
        if (!normalized) return;
        for (double& p : scores) p /= sum;
      });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
