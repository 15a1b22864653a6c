// SPDX-License-Identifier: Apache-2.0
// The vector types of this translation unit's instruction set, and the operations xsimd gives everywhere under names that
// changed between its releases (8.1 to 14).
#pragma once

// GCC 12's AVX-512 header defines "undefined" registers as self-initialised variables and then warns about them wherever
// they are inlined.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <xsimd/xsimd.hpp>
#pragma GCC diagnostic pop
#else
#include <xsimd/xsimd.hpp>
#endif
#if XSIMD_VERSION_MAJOR < 8 || (XSIMD_VERSION_MAJOR == 8 && XSIMD_VERSION_MINOR < 1)
#error "fovea: xsimd 8.1 or newer is needed; an older one stands first on the include path"
#endif

#include "../core/types.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

using f32 = xsimd::batch<float>;
using i32 = xsimd::batch<std::int32_t>;
using keep_t = f32::batch_bool_type;
inline constexpr index_t kLanes = static_cast<index_t>(f32::size);

FOVEA_INLINE f32 load(const float* from) { return f32::load_unaligned(from); }
FOVEA_INLINE void store(float* to, f32 v) { v.store_unaligned(to); }
FOVEA_INLINE f32 select(keep_t keep, f32 a, f32 b) { return xsimd::select(keep, a, b); }

// Whether fma() rounds once. Without the instruction it is a product and a sum.
#if defined(__FMA__) || defined(__AVX512F__) || defined(__aarch64__) || defined(__ARM_FEATURE_FMA)
inline constexpr bool kFusedFma = true;
#else
inline constexpr bool kFusedFma = false;
#endif

// An integer comparison as the mask of a float vector.
template <class IntMask>
FOVEA_INLINE keep_t as_keep(IntMask mask) {
#if XSIMD_VERSION_MAJOR >= 9
  return xsimd::batch_bool_cast<float>(mask);
#else
  return xsimd::bool_cast(mask);
#endif
}

// 0, 1, 2, ... in the lanes.
FOVEA_INLINE i32 lane_numbers() {
  alignas(i32) std::int32_t lanes[kLanes];
  for (index_t i = 0; i < kLanes; ++i) lanes[i] = static_cast<std::int32_t>(i);
  return i32::load_aligned(lanes);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
