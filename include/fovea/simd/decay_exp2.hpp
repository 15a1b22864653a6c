// SPDX-License-Identifier: Apache-2.0
// 2^t for the factors of a recurrence: exp2(), but most exact where that matters most.
#pragma once
#include "math.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// 2^t, at most 4 ULP, for t < 127. 1 for 0, 0 for -inf; NaN stays NaN. Below the normal numbers it is 0 or what is left.
//
// A factor just below 1 makes a state remember thousands of tokens and add up what is wrong about each factor. t is then
// -0.001, say, its remainder 0.999, the end of the polynomial, where that of exp2() is off by up to 8e-8 and its slope by
// 5e-6. This one has the value 1 at 0 and, within 4e-10 and 2e-9, 2 and the slope 2 ln 2 at 1, for a relative error of
// 1.6e-7 in between, where states forget within few tokens. Degree 5 on [0, 1).
FOVEA_INLINE f32 decay_exp2(f32 t) {
  const f32 x = above_floor(t);
  f32 p = fma(x, f32(0x1.fb5d06p-10f), f32(0x1.226378p-7f));
  p = fma(x, p, f32(0x1.ca158ap-5f));
  p = fma(x, p, f32(0x1.ebc92cp-3f));
  p = fma(x, p, f32(0x1.62e52p-1f));
  p = fma(x, p, f32(1.f));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, t);   // down to denormals by itself: one instruction less than with a limit
#else
  return times_exp2_floor(p, t, -126.f);
#endif
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
