// SPDX-License-Identifier: Apache-2.0
// AVX-512 (F, DQ, BW, VL). xsimd 8.1 has no FMA for it and converts int32 to float lane
// by lane; exp2 is shorter with vreduceps and vscalefps.
#pragma once
#include <immintrin.h>

#include "../vectors.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

FOVEA_INLINE f32 fma(f32 a, f32 b, f32 c) { return _mm512_fmadd_ps(a, b, c); }

// a * b + c with a read and broadcast by the FMA itself. Half of the rows of a micro-kernel use it: a broadcast in a
// register costs an instruction, one in the operand costs a load per FMA, and half and half stays inside both budgets (12 x
// 2 tile on Sapphire Rapids: 33 instead of 42 instructions a step, 20 loads in 12 cycles). Compilers merge equal set1
// intrinsics, hence asm.
FOVEA_INLINE f32 fma_from_memory(const float* a, f32 b, f32 c) {
  __m512 sum = c;
  asm("vfmadd231ps {%2%{1to16%}, %1, %0|%0, %1, %2%{1to16%}}" : "+v"(sum) : "v"(static_cast<__m512>(b)), "m"(*a));
  return sum;
}

FOVEA_INLINE __mmask16 first_lanes(index_t count) { return static_cast<__mmask16>((1u << count) - 1u); }
FOVEA_INLINE f32 load_some(const float* from, index_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), from); }
FOVEA_INLINE void store_some(float* to, f32 v, index_t count) { _mm512_mask_storeu_ps(to, first_lanes(count), v); }

FOVEA_INLINE f32 to_float(i32 v) { return _mm512_cvtepi32_ps(v); }
FOVEA_INLINE f32 abs(f32 v) { return _mm512_abs_ps(v); }

FOVEA_INLINE float first_lane(f32 v) { return _mm512_cvtss_f32(v); }
FOVEA_INLINE std::int32_t first_lane(i32 v) { return _mm_cvtsi128_si32(_mm512_castsi512_si128(v)); }

// The lanes i < count whose byte from[i * stride] is not 0.
FOVEA_INLINE keep_t nonzero_bytes(const std::uint8_t* from, index_t stride, index_t count) {
  if (stride == 1) {
    const index_t lanes = count >= 16 ? 16 : (count > 0 ? count : 0);
    return keep_t(_mm_test_epi8_mask(_mm_maskz_loadu_epi8(first_lanes(lanes), from), _mm_set1_epi8(-1)));
  }
  __mmask16 visible = 0;
  for (index_t i = 0; i < 16 && i < count; ++i)
    visible = static_cast<__mmask16>(visible | ((from[i * stride] != 0 ? 1u : 0u) << i));
  return keep_t(visible);
}

FOVEA_INLINE float reduce_add(f32 v) { return _mm512_reduce_add_ps(v); }
FOVEA_INLINE float reduce_max(f32 v) { return _mm512_reduce_max_ps(v); }

FOVEA_INLINE f32 above_floor(f32 t) { return _mm512_reduce_ps(t, 0x09); }   // 0x09: t - floor(t), no exceptions raised

// Not less than `lowest`: a NaN passes.
FOVEA_INLINE f32 times_exp2_floor(f32 x, f32 t, float lowest) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(t, _mm512_set1_ps(lowest), _CMP_NLT_UQ), x, t);
}

// 14-bit estimate and one Newton step: 1 ULP in 5 instructions where vdivps holds its port for 16 cycles.
FOVEA_INLINE f32 reciprocal(f32 x) {
  const __m512 estimate = _mm512_rcp14_ps(x);
  return _mm512_mul_ps(estimate, _mm512_fnmadd_ps(x, estimate, _mm512_set1_ps(2.f)));
}

// Four lane sums at once: transposing adds inside the 128-bit quarters, then the quarters are folded. 8 shuffles for 4 sums.
FOVEA_INLINE void reduce_add4(f32 a, f32 b, f32 c, f32 d, float* to) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 quarters = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

FOVEA_INLINE void transpose(f32 (&rows)[kLanes]) {
  __m512 pairs[16], quads[16];
  FOVEA_UNROLL
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  FOVEA_UNROLL
  for (int i = 0; i < 16; i += 4) {
    quads[i + 0] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  FOVEA_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512 even_low = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0xdd);
    rows[i] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    rows[i + 4] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    rows[i + 8] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    rows[i + 12] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
