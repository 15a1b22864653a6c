// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "../vectors.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

FOVEA_INLINE f32 fma(f32 a, f32 b, f32 c) { return _mm256_fmadd_ps(a, b, c); }
FOVEA_INLINE f32 fma_from_memory(const float* a, f32 b, f32 c) { return fma(f32(*a), b, c); }

FOVEA_INLINE __m256i first_lanes(index_t count) {
  const __m256i numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), numbers);
}
FOVEA_INLINE f32 load_some(const float* from, index_t count) { return _mm256_maskload_ps(from, first_lanes(count)); }
FOVEA_INLINE void store_some(float* to, f32 v, index_t count) { _mm256_maskstore_ps(to, first_lanes(count), v); }

FOVEA_INLINE f32 to_float(i32 v) { return _mm256_cvtepi32_ps(v); }
FOVEA_INLINE f32 abs(f32 v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), v); }
// from[index[lane]].
FOVEA_INLINE f32 gather(const float* from, i32 index) { return _mm256_i32gather_ps(from, index, 4); }
FOVEA_INLINE i32 gather(const std::int32_t* from, i32 index) { return _mm256_i32gather_epi32(from, index, 4); }

FOVEA_INLINE float first_lane(f32 v) { return _mm256_cvtss_f32(v); }
FOVEA_INLINE std::int32_t first_lane(i32 v) { return _mm_cvtsi128_si32(_mm256_castsi256_si128(v)); }

// The lanes i < count whose byte from[i * stride] is not 0.
FOVEA_INLINE keep_t nonzero_bytes(const std::uint8_t* from, index_t stride, index_t count) {
  std::uint8_t some[8] = {};
  const bool whole = stride == 1 && count >= 8;
  for (index_t i = 0; !whole && i < 8 && i < count; ++i) some[i] = from[i * stride];
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(whole ? from : some)));
  return !keep_t(_mm256_castsi256_ps(_mm256_cmpeq_epi32(wide, _mm256_setzero_si256())));
}

// Bit i: lane i is kept.
FOVEA_INLINE unsigned keep_bits(keep_t keep) { return static_cast<unsigned>(_mm256_movemask_ps(keep.data)); }

// Byte n of entry `keep`: the n-th lane whose bit is set in it.
struct KeptLanes {
  std::uint64_t of[256] = {};
  constexpr KeptLanes() {
    for (unsigned keep = 0; keep < 256; ++keep) {
      int n = 0;
      for (unsigned lane = 0; lane < 8; ++lane) {
        if ((keep >> lane & 1u) != 0) of[keep] |= std::uint64_t{lane} << (8 * n++);
      }
    }
  }
};
inline constexpr KeptLanes kKeptLanes;
// The lanes whose bit is set, one after the other; nothing behind them is written.
FOVEA_INLINE void store_kept(std::int32_t* to, i32 v, unsigned keep) {
  const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(kKeptLanes.of[keep])));
  _mm256_maskstore_epi32(to, first_lanes(__builtin_popcount(keep)), _mm256_permutevar8x32_epi32(v, lanes));
}
// Bit i, i < 32: from[i] <= bound.
FOVEA_INLINE std::uint32_t at_most_bits(const std::uint16_t* from, std::uint16_t bound) {
  const __m256i most = _mm256_set1_epi16(static_cast<short>(bound));
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 16));
  const __m256i bytes = _mm256_packs_epi16(_mm256_cmpeq_epi16(_mm256_min_epu16(low, most), low),
                                           _mm256_cmpeq_epi16(_mm256_min_epu16(high, most), high));
  return static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0xd8)));
}

FOVEA_INLINE float reduce_add(f32 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
FOVEA_INLINE float reduce_max(f32 v) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

FOVEA_INLINE f32 above_floor(f32 t) { return _mm256_sub_ps(t, _mm256_floor_ps(t)); }
FOVEA_INLINE f32 from_nearest(f32 t) { return _mm256_sub_ps(t, _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }

// 0 where t < lowest (at least -126: below, the exponent field is clamped), inf from 2^128 on.
FOVEA_INLINE f32 times_exp2_floor(f32 x, f32 t, float lowest) {
  const __m256 clamped = _mm256_min_ps(_mm256_set1_ps(128.f), _mm256_max_ps(_mm256_set1_ps(-127.f), t));
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_floor_ps(clamped)), _mm256_set1_epi32(127));
  const __m256 scaled = _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  const __m256 underflow = _mm256_cmp_ps(t, _mm256_set1_ps(lowest), _CMP_LT_OQ);
  return _mm256_andnot_ps(underflow, scaled);
}

FOVEA_INLINE f32 reciprocal(f32 x) { return _mm256_div_ps(_mm256_set1_ps(1.f), x); }

// Four lane sums at once, 7 shuffles.
FOVEA_INLINE void reduce_add4(f32 a, f32 b, f32 c, f32 d, float* to) {
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const __m256 halves = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

FOVEA_INLINE void transpose(f32 (&rows)[kLanes]) {
  __m256 pairs[8], quads[8];
  FOVEA_UNROLL
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  FOVEA_UNROLL
  for (int i = 0; i < 8; i += 4) {
    quads[i + 0] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  FOVEA_UNROLL
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}

// Stored integers, one to a 32-bit lane; the `_some` forms read `count` of them and give zeros behind.
FOVEA_INLINE i32 widen_u8(const std::byte* from) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
FOVEA_INLINE i32 widen_i8(const std::byte* from) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
FOVEA_INLINE i32 widen_u16(const std::byte* from) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
FOVEA_INLINE i32 widen_u8_some(const std::byte* from, index_t count) {
  std::byte some[8] = {};
  std::memcpy(some, from, static_cast<std::size_t>(count));
  return widen_u8(some);
}
FOVEA_INLINE i32 widen_i8_some(const std::byte* from, index_t count) {
  std::byte some[8] = {};
  std::memcpy(some, from, static_cast<std::size_t>(count));
  return widen_i8(some);
}
FOVEA_INLINE i32 widen_u16_some(const std::byte* from, index_t count) {
  std::byte some[16] = {};
  std::memcpy(some, from, static_cast<std::size_t>(2 * count));
  return widen_u16(some);
}
FOVEA_INLINE f32 as_float(i32 bits) { return _mm256_castsi256_ps(bits); }
FOVEA_INLINE f32 first_of(f32 v, index_t count) { return _mm256_and_ps(_mm256_castsi256_ps(first_lanes(count)), v); }

#if defined(__F16C__)
FOVEA_INLINE f32 load_f16(const std::byte* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
FOVEA_INLINE f32 load_f16_some(const std::byte* from, index_t count) {
  std::byte some[16] = {};
  std::memcpy(some, from, static_cast<std::size_t>(2 * count));
  return load_f16(some);
}
FOVEA_INLINE f32 load_e5m2(const std::byte* from) {
  return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))), 8));
}
FOVEA_INLINE f32 load_e5m2_some(const std::byte* from, index_t count) {
  std::byte some[8] = {};
  std::memcpy(some, from, static_cast<std::size_t>(count));
  return load_e5m2(some);
}
#endif

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
