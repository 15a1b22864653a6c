// SPDX-License-Identifier: Apache-2.0
// Attention with a weight per token and head, as plain loops in double; weight 0 gives 0 without a look at the row.
#pragma once
#include "softmax.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// weight [batch, q_head, pos].
inline void head_mixtures(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
                          View<const float, 3> weight, const AttentionOptions& options) {
  softmax(q, k, v, out, options);
  for (index_t b = 0; b < out.extent[0]; ++b) {
    for (index_t h = 0; h < out.extent[1]; ++h) {
      for (index_t i = 0; i < out.extent[2]; ++i) {
        const double w = weight(b, h, i);
        for (index_t d = 0; d < out.extent[3]; ++d) out(b, h, i, d) = w == 0 ? 0 : w * out(b, h, i, d);
      }
    }
  }
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
