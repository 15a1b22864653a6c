// SPDX-License-Identifier: Apache-2.0
// Adding up the partial rows of key splits.
#pragma once
#include "../simd/simd.hpp"
#include "policies.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// (state, acc) += (other, other_acc). A partial without a visible key is the identity, bit for bit.
template <class Norm>
FOVEA_INLINE void merge_row(const Norm& norm, typename Norm::State& state, float* acc, const typename Norm::State& other,
                            const float* other_acc, index_t dim) {
  const std::array<float, 2> factor = norm.merge(state, other);
  for (index_t d = 0; d < dim; d += kLanes)
    store(acc + d, fma(load(other_acc + d), f32(factor[1]), load(acc + d) * f32(factor[0])));
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
