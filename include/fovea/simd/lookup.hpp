// SPDX-License-Identifier: Apache-2.0
// What a functor on scores or masks may call: every name takes vectors, and plain numbers in double, so that one text serves
// the kernels and the reference. From simd.hpp and math.hpp: abs, fma, exp2, tanh, select, to_float.
#pragma once
#include <algorithm>
#include <cmath>
#include <span>

#include "math.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

FOVEA_INLINE double abs(double x) { return std::abs(x); }
FOVEA_INLINE double tanh(double x) { return std::tanh(x); }
FOVEA_INLINE double exp2(double x) { return std::exp2(x); }
FOVEA_INLINE double to_float(int x) { return x; }
FOVEA_INLINE double select(bool keep, double a, double b) { return keep ? a : b; }
FOVEA_INLINE double min(double a, double b) { return std::min(a, b); }
FOVEA_INLINE double max(double a, double b) { return std::max(a, b); }
FOVEA_INLINE double min(double a, int b) { return std::min(a, static_cast<double>(b)); }
FOVEA_INLINE double max(double a, int b) { return std::max(a, static_cast<double>(b)); }
FOVEA_INLINE double min(int a, double b) { return min(b, a); }
FOVEA_INLINE double max(int a, double b) { return max(b, a); }
FOVEA_INLINE double min(double a, float b) { return min(a, static_cast<double>(b)); }
FOVEA_INLINE double max(double a, float b) { return max(a, static_cast<double>(b)); }
FOVEA_INLINE double min(float a, double b) { return min(static_cast<double>(a), b); }
FOVEA_INLINE double max(float a, double b) { return max(static_cast<double>(a), b); }
FOVEA_INLINE int min(int a, int b) { return std::min(a, b); }
FOVEA_INLINE int max(int a, int b) { return std::max(a, b); }
FOVEA_INLINE f32 min(f32 a, f32 b) { return xsimd::min(a, b); }
FOVEA_INLINE f32 max(f32 a, f32 b) { return xsimd::max(a, b); }
FOVEA_INLINE i32 min(i32 a, i32 b) { return xsimd::min(a, b); }
FOVEA_INLINE i32 max(i32 a, i32 b) { return xsimd::max(a, b); }
FOVEA_INLINE f32 select(xsimd::batch_bool<std::int32_t> keep, f32 a, f32 b) { return xsimd::select(as_keep(keep), a, b); }

// e^x, 3 ULP and the rounding of the product.
FOVEA_INLINE f32 exp(f32 x) { return exp2(x * f32(kLog2e)); }
FOVEA_INLINE double exp(double x) { return std::exp(x); }

// table[index], with indices outside the table moved to its nearest end: the lanes behind the last key stand anywhere. A table has
// 1 to INT32_MAX entries.
FOVEA_INLINE f32 lookup(std::span<const float> table, i32 index) {
  FOVEA_ASSERT(!table.empty());
  const i32 inside = max(min(index, i32(static_cast<std::int32_t>(table.size()) - 1)), i32(0));
  return gather(table.data(), inside);
}
FOVEA_INLINE i32 lookup(std::span<const std::int32_t> table, i32 index) {
  FOVEA_ASSERT(!table.empty());
  const i32 inside = max(min(index, i32(static_cast<std::int32_t>(table.size()) - 1)), i32(0));
  return gather(table.data(), inside);
}
FOVEA_INLINE double lookup(std::span<const float> table, int index) {
  return static_cast<double>(table[static_cast<std::size_t>(std::clamp(index, 0, static_cast<int>(table.size()) - 1))]);
}
FOVEA_INLINE int lookup(std::span<const std::int32_t> table, int index) {
  return table[static_cast<std::size_t>(std::clamp(index, 0, static_cast<int>(table.size()) - 1))];
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
