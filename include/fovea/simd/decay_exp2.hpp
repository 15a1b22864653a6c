// SPDX-License-Identifier: Apache-2.0
// 2^t for the factors of a recurrence: exp2(), but most exact where that matters most.
#pragma once
#include "math.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// 2^t, at most 3 ULP, for t < 127. 1 for 0, 0 for -inf; NaN stays NaN. Below the normal numbers it is 0 or what is left.
//
// A factor just below 1 makes a state remember thousands of tokens and add up what is wrong about each factor. exp2() rounds
// such an exponent down to -1, and at the end of its polynomial is 9e-8 low on average. Here it is rounded to nearest: what
// is lost to 1 is right to 3e-7 of itself, and only the last rounding is left, which has no direction. It costs an
// instruction. Degree 5 on [-1/2, 1/2], constant term 1: relative error 9.2e-8 before rounding.
FOVEA_INLINE f32 decay_exp2(f32 t) {
#if defined(__AVX512F__)
  const f32 x = _mm512_reduce_ps(t, 0x08), whole = t - x;   // 0x08: t - nearest integer, no exceptions raised
#else
  const f32 bounded = xsimd::select(t < f32(-200.f), f32(-200.f), t), whole = xsimd::floor(bounded + f32(0.5f)),
            x = bounded - whole;
#endif
  f32 p = fma(x, f32(0x1.5bba14p-10f), f32(0x1.3cea88p-7f));
  p = fma(x, p, f32(0x1.c6b752p-5f));
  p = fma(x, p, f32(0x1.ebf9bcp-3f));
  p = fma(x, p, f32(0x1.62e42ap-1f));
  p = fma(x, p, f32(1.f));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, whole);   // down to denormals by itself: an instruction less than with a limit
#else
  return times_exp2_floor(p, whole, -125.f);
#endif
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
