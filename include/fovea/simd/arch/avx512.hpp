// SPDX-License-Identifier: Apache-2.0
// AVX-512 (F, DQ, BW, VL). xsimd 8.1 has no FMA for it and converts int32 to float lane
// by lane; exp2 is shorter with vreduceps and vscalefps.
#pragma once
#include <immintrin.h>

#include <cstring>

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
// from[index[lane]].
FOVEA_INLINE f32 gather(const float* from, i32 index) { return _mm512_i32gather_ps(index, from, 4); }
FOVEA_INLINE i32 gather(const std::int32_t* from, i32 index) { return _mm512_i32gather_epi32(index, from, 4); }

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
FOVEA_INLINE f32 from_nearest(f32 t) { return _mm512_reduce_ps(t, 0x08); }   // t - round(t)

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

// Stored integers, one to a 32-bit lane; the `_some` forms read `count` of them and give zeros behind.
FOVEA_INLINE i32 widen_u8(const std::byte* from) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
FOVEA_INLINE i32 widen_i8(const std::byte* from) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
FOVEA_INLINE i32 widen_u16(const std::byte* from) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
FOVEA_INLINE i32 widen_u8_some(const std::byte* from, index_t count) {
  return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first_lanes(count), from));
}
FOVEA_INLINE i32 widen_i8_some(const std::byte* from, index_t count) {
  return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(count), from));
}
FOVEA_INLINE i32 widen_u16_some(const std::byte* from, index_t count) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(count), from));
}
FOVEA_INLINE f32 as_float(i32 bits) { return _mm512_castsi512_ps(bits); }
FOVEA_INLINE f32 first_of(f32 v, index_t count) { return _mm512_maskz_mov_ps(first_lanes(count), v); }   // zeros behind

FOVEA_INLINE f32 load_f16(const std::byte* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
FOVEA_INLINE f32 load_f16_some(const std::byte* from, index_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), from));
}
// Up to eight halves in the first lanes.
template <int Count>
FOVEA_INLINE f32 load_f16_few(const std::byte* from) {
  if constexpr (Count == 8) {
    return _mm512_castps256_ps512(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  } else if constexpr (Count == 4) {
    return _mm512_castps128_ps512(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  } else if constexpr (Count == 2) {
    return _mm512_castps128_ps512(_mm_cvtph_ps(_mm_loadu_si32(from)));
  } else {
    static_assert(Count == 1);
    short half;
    std::memcpy(&half, from, sizeof(half));
    return _mm512_castps128_ps512(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
  }
}

// vpermb puts the bytes where a wider number has them and clears the rest: one instruction on the shuffle port where
// widening and shifting are two.
#if defined(__AVX512VBMI__)
FOVEA_INLINE f32 bf16_words_to_float(__m256i words) {
  const __m512i upper =
      _mm512_set_epi32(0x1f1e0000, 0x1d1c0000, 0x1b1a0000, 0x19180000, 0x17160000, 0x15140000, 0x13120000, 0x11100000,
                       0x0f0e0000, 0x0d0c0000, 0x0b0a0000, 0x09080000, 0x07060000, 0x05040000, 0x03020000, 0x01000000);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi8(0xcccccccccccccccc, upper, _mm512_castsi256_si512(words)));
}
FOVEA_INLINE __m256i e5m2_bytes_to_f16(__m128i bytes) {
  const __m256i upper = _mm256_set_epi16(0x0f00, 0x0e00, 0x0d00, 0x0c00, 0x0b00, 0x0a00, 0x0900, 0x0800, 0x0700, 0x0600,
                                         0x0500, 0x0400, 0x0300, 0x0200, 0x0100, 0x0000);
  return _mm256_maskz_permutexvar_epi8(0xaaaaaaaa, upper, _mm256_castsi128_si256(bytes));
}
#else
FOVEA_INLINE f32 bf16_words_to_float(__m256i words) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}
FOVEA_INLINE __m256i e5m2_bytes_to_f16(__m128i bytes) { return _mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8); }
#endif
FOVEA_INLINE f32 load_bf16(const std::byte* from) {
  return bf16_words_to_float(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
FOVEA_INLINE f32 load_bf16_some(const std::byte* from, index_t count) {
  return bf16_words_to_float(_mm256_maskz_loadu_epi16(first_lanes(count), from));
}
FOVEA_INLINE f32 load_e5m2(const std::byte* from) {
  return _mm512_cvtph_ps(e5m2_bytes_to_f16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
FOVEA_INLINE f32 load_e5m2_some(const std::byte* from, index_t count) {
  return _mm512_cvtph_ps(e5m2_bytes_to_f16(_mm_maskz_loadu_epi8(first_lanes(count), from)));
}

// e4m3 as a half whose exponent is 8 too small: denormals come out right, NaN does not.
FOVEA_INLINE f32 e4m3_bytes_to_float(__m128i bytes) {
  const __m256i halves =
      _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7), _mm256_set1_epi16(static_cast<short>(0xbfff)));
  const __m512 value = _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(256.f));
  const __mmask16 nan = _mm_cmpeq_epi8_mask(_mm_or_si128(bytes, _mm_set1_epi8(-128)), _mm_set1_epi8(-1));
  return _mm512_mask_mov_ps(value, nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
}
FOVEA_INLINE f32 load_e4m3(const std::byte* from) {
  return e4m3_bytes_to_float(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
FOVEA_INLINE f32 load_e4m3_some(const std::byte* from, index_t count) {
  return e4m3_bytes_to_float(_mm_maskz_loadu_epi8(first_lanes(count), from));
}

#if defined(__AVX512VBMI__) && defined(__GFNI__)
#define FOVEA_FAST_E4M3
// Row i of the matrix names the input bits whose sum is output bit i.
constexpr long long bit_matrix(const unsigned char (&rows)[8]) {
  unsigned long long matrix = 0;
  for (int i = 0; i < 8; ++i) matrix |= static_cast<unsigned long long>(rows[i]) << (8 * (7 - i));
  return static_cast<long long>(matrix);
}
// Whether none of the numbers is without a leading one (e = 0) or NaN. Some with e = 1 are turned away as well, which saves
// an instruction: all in all 1 in 100 runs of 64 of Gaussian rows scaled to their largest number, 9 in 100 where that is 30
// times the standard deviation.
template <int Vectors>
FOVEA_INLINE bool all_normal_e4m3(const std::byte* from) {
  if constexpr (Vectors == 2) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm256_testn_epi8_mask(_mm256_add_epi8(codes, _mm256_set1_epi8(1)), _mm256_set1_epi8(0x70)) == 0;
  } else {
    static_assert(Vectors % 4 == 0);
    bool all = true;
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; n += 4) {
      const __m512i codes = _mm512_loadu_si512(from + 16 * n);
      all &= _mm512_testn_epi8_mask(_mm512_add_epi8(codes, _mm512_set1_epi8(1)), _mm512_set1_epi8(0x70)) == 0;
    }
    return all;
  }
}
// 32 such numbers of exponent e, bias 7. The fp32 has the exponent e + 120, whose bits are e3, four times not e3, e2, e1,
// e0: both of its bytes that are not 0 are sums of bits, so one vgf2p8affineqb makes them all: 2 instructions per 16 numbers
// where the way through halves takes 8.
FOVEA_INLINE void load_normal_e4m3_pair(const std::byte* from, f32 (&to)[2]) {
  constexpr long long kUpper = bit_matrix({0x10, 0x20, 0x40, 0x40, 0x40, 0x40, 0x40, 0x80});
  constexpr long long kLower = bit_matrix({0, 0, 0, 0, 0x01, 0x02, 0x04, 0x08});
  const __m512i matrix = _mm512_set_epi64(kUpper, kUpper, kUpper, kUpper, kLower, kLower, kLower, kLower);
  const __m512i inverted = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(0x3c), 1);
  const __m512i low =
      _mm512_set_epi32(0x2f0f0000, 0x2e0e0000, 0x2d0d0000, 0x2c0c0000, 0x2b0b0000, 0x2a0a0000, 0x29090000, 0x28080000,
                       0x27070000, 0x26060000, 0x25050000, 0x24040000, 0x23030000, 0x22020000, 0x21010000, 0x20000000);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(0x10100000));
  const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  const __m512i bytes = _mm512_xor_si512(_mm512_gf2p8affine_epi64_epi8(twice, matrix, 0), inverted);
  to[0] = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi8(0xcccccccccccccccc, low, bytes));
  to[1] = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi8(0xcccccccccccccccc, high, bytes));
}
#endif

// Bit i: lane i is kept.
FOVEA_INLINE unsigned keep_bits(keep_t keep) { return keep.data; }
// The lanes whose bit is set, one after the other; nothing behind them is written.
FOVEA_INLINE void store_kept(std::int32_t* to, i32 v, unsigned keep) {
  const __m512i kept = _mm512_maskz_compress_epi32(static_cast<__mmask16>(keep), v);
  _mm512_mask_storeu_epi32(to, first_lanes(__builtin_popcount(keep)), kept);
}
// Bit i, i < 32: from[i] <= bound.
FOVEA_INLINE std::uint32_t at_most_bits(const std::uint16_t* from, std::uint16_t bound) {
  return _mm512_cmple_epu16_mask(_mm512_loadu_si512(from), _mm512_set1_epi16(static_cast<short>(bound)));
}

// first, first + 1, first + 2, ... first + 15, as a constant and not as a conversion in the loop.
FOVEA_INLINE f32 counted_from(float first) {
  return _mm512_setr_ps(first, first + 1, first + 2, first + 3, first + 4, first + 5, first + 6, first + 7, first + 8,
                        first + 9, first + 10, first + 11, first + 12, first + 13, first + 14, first + 15);
}
// table[i & 15] for every lane of i.
FOVEA_INLINE f32 lookup16(f32 table, i32 i) { return _mm512_permutexvar_ps(i, table); }
FOVEA_INLINE f32 broadcast_lane(f32 v, int lane) { return _mm512_permutexvar_ps(_mm512_set1_epi32(lane), v); }

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
