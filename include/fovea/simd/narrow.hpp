// SPDX-License-Identifier: Apache-2.0
// f32 lanes -> stored numbers: round to nearest, ties to even, the bits of core/convert.hpp's convert<T>.
#pragma once
#include <bit>
#include <cstring>
#include <type_traits>

#include "../core/convert.hpp"
#include "simd.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

FOVEA_INLINE i32 float_bits(f32 x) { return std::bit_cast<i32>(x); }

// As floats: xsimd 8.1's select of integers does not compile with g++ -O0 on AVX-512, where the intrinsics are macros.
template <class IntMask>
FOVEA_INLINE i32 select_int(IntMask keep, i32 a, i32 b) {
  return float_bits(select(as_keep(keep), as_float(a), as_float(b)));
}

// The pattern of T nearest to each x, in the low bits of its lane: the same bits as convert<T>(x).
template <SmallNumber T>
FOVEA_INLINE i32 small_patterns(f32 x) {
  using S = SmallFloat<T>;
  constexpr int kDropped = 23 - S::mantissa;
  constexpr std::int32_t kSign = static_cast<std::int32_t>(S::sign), kOverflow = static_cast<std::int32_t>(S::overflow);
  const i32 bits = float_bits(x), magnitude = bits & i32(0x7fffffff);
  const i32 to_even = (magnitude >> kDropped) & i32(1);
  i32 pattern = (magnitude + to_even + i32((1 << (kDropped - 1)) - 1)) >> kDropped;
  if constexpr (S::min_exponent > -126) {
    pattern = pattern - i32((127 + S::min_exponent - 1) << S::mantissa);
    // Denormals: the last place of `unit` is theirs. fp32's own denormals round to 0 either way.
    constexpr std::int32_t kUnit = (S::min_exponent - S::mantissa + 23 + 127) << 23;
    constexpr std::int32_t kSmallestNormal = (S::min_exponent + 127) << 23;
    const i32 denormal = float_bits(as_float(magnitude) + as_float(i32(kUnit))) - i32(kUnit);
    pattern = select_int(magnitude < i32(kSmallestNormal), denormal, pattern);
    pattern = select_int(pattern > i32(kOverflow), i32(kOverflow), pattern);
  }
  const i32 payload = (magnitude >> kDropped) & i32((1 << S::mantissa) - 1);
  pattern = select_int(magnitude > i32(0x7f800000), payload | i32(static_cast<std::int32_t>(S::quiet_nan)), pattern);
  return pattern | ((bits >> 31) & i32(kSign));
}

// The low 8 or 16 bits of the first `count` lanes, count <= kLanes.
FOVEA_INLINE void store_low8(std::byte* to, i32 v, index_t count) {
#if defined(__AVX512F__)
  _mm_mask_storeu_epi8(to, first_lanes(count), _mm512_maskz_cvtepi32_epi8(first_lanes(count), v));
#elif defined(__AVX2__)
  const __m256i low = v & i32(0xff);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  const __m128i bytes = _mm_packus_epi16(words, words);
  std::memcpy(to, &bytes, static_cast<std::size_t>(count));
#else
  alignas(i32) std::int32_t lanes[kLanes];
  v.store_aligned(lanes);
  for (index_t i = 0; i < count; ++i) to[i] = static_cast<std::byte>(lanes[i] & 0xff);
#endif
}
FOVEA_INLINE void store_low16(std::byte* to, i32 v, index_t count) {
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(to, first_lanes(count), _mm512_maskz_cvtepi32_epi16(first_lanes(count), v));
#elif defined(__AVX2__)
  const __m256i low = v & i32(0xffff);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  std::memcpy(to, &words, static_cast<std::size_t>(2 * count));
#else
  alignas(i32) std::int32_t lanes[kLanes];
  v.store_aligned(lanes);
  std::uint16_t words[kLanes];
  for (index_t i = 0; i < kLanes; ++i) words[i] = static_cast<std::uint16_t>(lanes[i]);
  std::memcpy(to, words, static_cast<std::size_t>(2 * count));
#endif
}

// The first `count` lanes of x, count <= kLanes, as stored numbers of type T.
template <class T>
FOVEA_INLINE void store_as(std::byte* to, f32 x, index_t count) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    alignas(f32) float lanes[kLanes];
    x.store_aligned(lanes);
    T numbers[kLanes];
    for (index_t i = 0; i < kLanes; ++i) numbers[i] = lanes[i];
    std::memcpy(to, numbers, sizeof(T) * static_cast<std::size_t>(count));
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<T, f16>) {
    _mm256_mask_storeu_epi16(to, first_lanes(count), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__) && defined(__F16C__)
  } else if constexpr (std::is_same_v<T, f16>) {
    const __m128i words = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(to, &words, static_cast<std::size_t>(2 * count));
#endif
  } else if constexpr (sizeof(T) == 2) {
    store_low16(to, small_patterns<T>(x), count);
  } else {
    store_low8(to, small_patterns<T>(x), count);
  }
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
