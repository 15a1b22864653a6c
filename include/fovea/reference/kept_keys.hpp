// SPDX-License-Identifier: Apache-2.0
// Softmax over the keys that a selection keeps.
#pragma once
#include <cstdint>

#include "softmax.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// keep: 1 for every selected key, [sequence, q_head, q.extent[2], k.extent[2]]. out [batch, q_head, pos, dim_v]; options
// without a keep of their own.
inline void softmax_of_kept(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
                            AttentionOptions options, const std::vector<std::uint8_t>& keep, View<double, 3> lse) {
  const index_t heads = q.extent[1], len_q = q.extent[2], len_k = k.extent[2];
  options.keep = {keep.data(), {q.extent[0], heads, len_q, len_k}, {heads * len_q * len_k, len_q * len_k, len_k, 1}};
  softmax(q, k, v, out, options, lse);
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
