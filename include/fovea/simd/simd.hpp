// SPDX-License-Identifier: Apache-2.0
// The vector layer the kernels call: xsimd's batches plus exactly one file of arch/. AVX2 without FMA takes the generic one.
#pragma once
#include <cstdint>

#include "vectors.hpp"

#if defined(__AVX512F__)
#include "arch/avx512.hpp"
#elif defined(__AVX2__) && defined(__FMA__)
#include "arch/avx2.hpp"
#else
#include "arch/generic.hpp"
#endif

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// The cache line `ahead` bytes from `at`, which may lie beyond the array: a prefetch of nowhere does nothing.
FOVEA_INLINE void prefetch(const std::byte* at, index_t ahead) {
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(at) + static_cast<std::uintptr_t>(ahead)));
}

// The same into L2 only.
FOVEA_INLINE void prefetch_l2(const std::byte* at, index_t ahead) {
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(at) + static_cast<std::uintptr_t>(ahead)), 0, 2);
}

// The first `count` of up to kLanes values `stride` apart, zeros behind them.
FOVEA_INLINE f32 load_strided(const float* from, index_t stride, index_t count) {
  if (stride == 1) return count >= kLanes ? load(from) : load_some(from, count > 0 ? count : 0);
  alignas(f32) float lanes[kLanes] = {};
  for (index_t i = 0; i < kLanes && i < count; ++i) lanes[i] = from[i * stride];
  return f32::load_aligned(lanes);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
