// SPDX-License-Identifier: Apache-2.0
// AVX-512 BF16: pairs of bf16, 16 to a vector, and their dot product. A pair stands in one 32-bit lane, the number of lower
// index in its low half, so that rows in memory are pairs as they are.
#pragma once
#include <immintrin.h>

#include <array>
#include <cstdint>

#include "avx512.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// sum += a.high * b.high, then sum += a.low * b.low: two FMAs, each rounded to the nearest even fp32 (Intel SDM, VDPBF16PS;
// compared with that bit for bit in the tests). It reads denormal operands and sums as zero and flushes denormal results to
// zero, whatever MXCSR says, so that it never waits for an assist.
FOVEA_INLINE f32 dot_pairs(i32 a, i32 b, f32 sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh) static_cast<__m512i>(a), (__m512bh) static_cast<__m512i>(b));
}

FOVEA_INLINE __mmask32 first_halves(index_t count) { return static_cast<__mmask32>((std::uint64_t{1} << count) - 1u); }
FOVEA_INLINE i32 load_pairs(const void* from) { return _mm512_loadu_si512(from); }
FOVEA_INLINE i32 load_some_pairs(const void* from, index_t numbers) {
  return _mm512_maskz_loadu_epi16(first_halves(numbers), from);
}
FOVEA_INLINE void store_pairs(void* to, i32 v) { _mm512_storeu_si512(to, v); }
FOVEA_INLINE void store_some_pairs(void* to, i32 v, index_t pairs) { _mm512_mask_storeu_epi32(to, first_lanes(pairs), v); }
FOVEA_INLINE void store_high_halves(void* to, i32 v) { _mm512_mask_storeu_epi16(to, 0xaaaaaaaau, v); }
FOVEA_INLINE i32 broadcast_pair(const void* from) {
  std::int32_t pair;
  __builtin_memcpy(&pair, from, sizeof pair);
  return _mm512_set1_epi32(pair);
}
FOVEA_INLINE i32 both(i32 a, i32 b) { return _mm512_and_si512(a, b); }

FOVEA_INLINE f32 as_floats(i32 v) { return _mm512_castsi512_ps(v); }
FOVEA_INLINE i32 as_pairs(f32 v) { return _mm512_castps_si512(v); }

// 32 numbers in order, rounded to nearest even. Denormals become zeros, as the dot product would read them anyway.
FOVEA_INLINE i32 round_to_pairs(f32 first, f32 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

// The lanes first <= i < end, zeros elsewhere.
FOVEA_INLINE f32 load_between(const float* from, index_t first, index_t end) {
  const index_t low = first > 0 ? (first < kLanes ? first : kLanes) : 0, high = end > 0 ? (end < kLanes ? end : kLanes) : 0;
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_lanes(high) & ~first_lanes(low)), from);
}

// Numbers a[n] and b[n] -> pairs (a[n], b[n]), n < 16 in `low`, 16 <= n < 32 in `high`. Interleaving stays inside 128 bits,
// so the 64-bit words are put in their order first.
FOVEA_INLINE void interleave(i32 a, i32 b, i32& low, i32& high) {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const __m512i first = _mm512_permutexvar_epi64(order, a), second = _mm512_permutexvar_epi64(order, b);
  low = _mm512_unpacklo_epi16(first, second);
  high = _mm512_unpackhi_epi16(first, second);
}

// Infinity and NaN are the largest of all bf16 without their sign: a running maximum finds them for two instructions per 32
// numbers.
FOVEA_INLINE i32 larger_sizes(i32 sizes, i32 v) { return _mm512_max_epu16(sizes, _mm512_slli_epi16(v, 1)); }
FOVEA_INLINE bool finite_sizes(i32 sizes) {
  return _mm512_cmpge_epu16_mask(sizes, _mm512_set1_epi16(static_cast<short>(0xff00))) == 0;
}

// Pairs (a[n], b[n]) for 32 n, a vector of either word of them -> the words apart.
FOVEA_INLINE void split_pairs(i32 low, i32 high, i32& first, i32& second) {
  alignas(64) static constexpr auto kEven = [] {
    std::array<std::uint16_t, 32> words{};
    for (std::uint16_t n = 0; n < 32; ++n) words[n] = static_cast<std::uint16_t>(2 * n);
    return words;
  }();
  const __m512i even = _mm512_load_si512(kEven.data());
  first = _mm512_permutex2var_epi16(low, even, high);
  second = _mm512_permutex2var_epi16(low, _mm512_or_si512(even, _mm512_set1_epi16(1)), high);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
