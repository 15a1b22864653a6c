// SPDX-License-Identifier: Apache-2.0
// Elementary functions on vectors. Lanes and tails run the same code, so a value does not depend on where it stands.
// Errors are in units in the last place (ULP), bounds are those of tests/simd/math_test.cpp.
#pragma once
#include "simd.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

inline constexpr float kLog2e = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.693147180559945309417f;

// 2^t, at most 3 ULP for t in [lowest, 128) (2.7 found), exactly 0 below `lowest`, which is -126 or more: no denormal comes out.
// exp2(-inf) = 0, NaN stays NaN, +inf gives inf or NaN (a row with a score of +inf is NaN in any case). Degree 5 on [0, 1),
// constant term 1: relative error 8.5e-8 before rounding.
FOVEA_INLINE f32 exp2(f32 t, float lowest = -126.f) {
  const f32 x = above_floor(t);
  f32 p = fma(x, f32(1.86810153536498546600341796875e-3f), f32(9.01452265679836273193359375e-3f));
  p = fma(x, p, f32(5.5802188813686370849609375e-2f));
  p = fma(x, p, f32(0.24016360938549041748046875f));
  p = fma(x, p, f32(0.693151414394378662109375f));
  p = fma(x, p, f32(1.f));
  return times_exp2_floor(p, t, lowest);
}

// The same for factors that a recurrence multiplies thousands of times: relative error 1.6e-8 before rounding and none near
// t = 0, where exp2 is 9e-8 too small on average (a decay of 1e-3 a token over 4096 tokens: 9e-5 in the result, with this
// 1e-6). One FMA more. At most 2 ULP (1.4 found).
FOVEA_INLINE f32 exp2_centred(f32 t, float lowest = -126.f) {
  const f32 x = from_nearest(select(t < f32(lowest), f32(lowest), t));   // -inf would be NaN
  f32 p = fma(x, f32(1.5353520575445145e-4f), f32(1.3398887822404504e-3f));
  p = fma(x, p, f32(9.6184369176626205e-3f));
  p = fma(x, p, f32(5.5503323674201965e-2f));
  p = fma(x, p, f32(0.24022647738456726f));
  p = fma(x, p, f32(0.69314718246459961f));
  p = fma(x, p, f32(1.f));
  return times_exp2_floor(p, t - x, lowest);
}

FOVEA_INLINE float exp2(float t, float lowest = -126.f) { return first_lane(exp2(f32(t), lowest)); }

// tanh(x). |x| < 0.625: odd polynomial, relative error 4.4e-9 before rounding. Beyond: 1 - 2 / (1 + e^2|x|). A vector whose
// lanes are all small skips the second form; the select keeps every lane's value independent of its neighbours.
FOVEA_INLINE f32 tanh(f32 x) {
  const f32 magnitude = abs(x), square = x * x;
  f32 p = fma(square, f32(-0.005704984998f), f32(0.02063908614f));
  p = fma(square, p, f32(-0.05373971536f));
  p = fma(square, p, f32(0.1333144158f));
  p = fma(square, p, f32(-0.3333328068f));
  const f32 small = fma(x * square, p, x);
  const keep_t is_small = magnitude < f32(0.625f);
  if (xsimd::all(is_small)) return small;
  const f32 capped = xsimd::select(magnitude > f32(10.f), f32(10.f), magnitude);   // tanh(10) rounds to 1
  const f32 large = fma(f32(-2.f), reciprocal(f32(1.f) + exp2(capped * f32(2.f * kLog2e))), f32(1.f));
  return select(is_small, small, xsimd::select(x < f32(0.f), -large, large));
}

// 1 / (1 + e^-x), relative error at most (12 + 2 max(-x, 0)) 2^-24: the exponent of a small result is rounded. Exactly 0
// below -125 ln 2 = -86.6, where it is under 2.4e-38. NaN stays NaN.
FOVEA_INLINE f32 logistic(f32 x) {
  const f32 t = x * f32(-kLog2e);
  const keep_t closed = t > f32(125.f);
  return select(closed, f32(0.f), reciprocal(f32(1.f) + exp2(select(closed, f32(125.f), t))));
}

// x logistic(x), one rounding more. 0 below -86.6 too, where its size is under 2.1e-36; so also at -inf.
FOVEA_INLINE f32 silu(f32 x) {
  const f32 share = logistic(x);
  return select(share == f32(0.f), f32(0.f), x * share);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
