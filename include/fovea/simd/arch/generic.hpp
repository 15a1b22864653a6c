// SPDX-License-Identifier: Apache-2.0
// What the kernels need beyond xsimd, in portable form: SSE2, NEON and anything else xsimd knows. The other files of this
// folder give the same names with the intrinsics of one instruction set; simd.hpp includes exactly one.
#pragma once
#include <cstring>

#include "../vectors.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

FOVEA_INLINE f32 fma(f32 a, f32 b, f32 c) { return xsimd::fma(a, b, c); }
FOVEA_INLINE f32 fma_from_memory(const float* a, f32 b, f32 c) { return fma(f32(*a), b, c); }

FOVEA_INLINE f32 load_some(const float* from, index_t count) {
  alignas(f32) float lanes[kLanes] = {};
  for (index_t i = 0; i < count; ++i) lanes[i] = from[i];
  return f32::load_aligned(lanes);
}
FOVEA_INLINE void store_some(float* to, f32 v, index_t count) {
  alignas(f32) float lanes[kLanes];
  v.store_aligned(lanes);
  for (index_t i = 0; i < count; ++i) to[i] = lanes[i];
}

FOVEA_INLINE f32 to_float(i32 v) { return xsimd::to_float(v); }
FOVEA_INLINE f32 abs(f32 v) { return xsimd::abs(v); }
// from[index[lane]].
template <class T>
FOVEA_INLINE xsimd::batch<T> gather(const T* from, i32 index) {
  alignas(i32) std::int32_t at[kLanes];
  alignas(i32) T values[kLanes];
  index.store_aligned(at);
  for (index_t i = 0; i < kLanes; ++i) values[i] = from[at[i]];
  return xsimd::batch<T>::load_aligned(values);
}

FOVEA_INLINE float first_lane(f32 v) { return v.get(0); }
FOVEA_INLINE std::int32_t first_lane(i32 v) {
  alignas(i32) std::int32_t lanes[kLanes];
  v.store_aligned(lanes);
  return lanes[0];
}

// The lanes i < count whose byte from[i * stride] is not 0.
FOVEA_INLINE keep_t nonzero_bytes(const std::uint8_t* from, index_t stride, index_t count) {
  alignas(f32) float lanes[kLanes] = {};
  for (index_t i = 0; i < kLanes && i < count; ++i) lanes[i] = from[i * stride] != 0 ? 1.f : 0.f;
  return f32::load_aligned(lanes) != f32(0.f);
}

// Bit i: lane i is kept.
FOVEA_INLINE unsigned keep_bits(keep_t keep) {
#if defined(__SSE2__) && !defined(__AVX__)
  return static_cast<unsigned>(_mm_movemask_ps(keep.data));
#else
  alignas(f32) float lanes[kLanes];
  select(keep, f32(1.f), f32(0.f)).store_aligned(lanes);
  unsigned bits = 0;
  for (index_t i = 0; i < kLanes; ++i) bits |= (lanes[i] != 0.f ? 1u : 0u) << i;
  return bits;
#endif
}
// The lanes whose bit is set, one after the other; nothing behind them is written.
FOVEA_INLINE void store_kept(std::int32_t* to, i32 v, unsigned keep) {
  alignas(i32) std::int32_t lanes[kLanes];
  v.store_aligned(lanes);
  for (; keep != 0; keep &= keep - 1) *to++ = lanes[__builtin_ctz(keep)];
}
// Bit i, i < 32: from[i] <= bound.
FOVEA_INLINE std::uint32_t at_most_bits(const std::uint16_t* from, std::uint16_t bound) {
  std::uint32_t bits = 0;
#if defined(__SSE2__)
  const __m128i most = _mm_set1_epi16(static_cast<short>(bound));
  for (int half = 0; half < 2; ++half, from += 16) {
    const __m128i low = _mm_subs_epu16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), most);
    const __m128i high = _mm_subs_epu16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8)), most);
    const __m128i zero = _mm_setzero_si128();
    const int bytes = _mm_movemask_epi8(_mm_packs_epi16(_mm_cmpeq_epi16(low, zero), _mm_cmpeq_epi16(high, zero)));
    bits |= static_cast<std::uint32_t>(bytes) << (16 * half);
  }
#else
  for (int i = 0; i < 32; ++i) bits |= (from[i] <= bound ? 1u : 0u) << i;
#endif
  return bits;
}

FOVEA_INLINE float reduce_add(f32 v) {
#if XSIMD_VERSION_MAJOR >= 9
  return xsimd::reduce_add(v);
#else
  return xsimd::hadd(v);
#endif
}

FOVEA_INLINE float reduce_max(f32 v) {
  alignas(f32) float lanes[kLanes];
  v.store_aligned(lanes);
  float m = lanes[0];
  for (index_t i = 1; i < kLanes; ++i) m = lanes[i] > m ? lanes[i] : m;
  return m;
}

// t - floor(t) and x * 2^floor(t), the two halves of exp2. 0 where t < lowest (at least -126), inf from 2^128 on.
FOVEA_INLINE f32 above_floor(f32 t) { return t - xsimd::floor(t); }
FOVEA_INLINE f32 from_nearest(f32 t) { return t - xsimd::nearbyint(t); }
FOVEA_INLINE f32 times_exp2_floor(f32 x, f32 t, float lowest) {
  const f32 low = xsimd::select(t < f32(-127.f), f32(-127.f), t);
  const i32 exponent = xsimd::to_int(xsimd::floor(xsimd::select(low < f32(128.f), low, f32(128.f)))) + i32(127);
  const f32 scaled = x * xsimd::bitwise_cast<f32>(exponent << 23);
  return xsimd::select(t < f32(lowest), f32(0.f), scaled);
}

FOVEA_INLINE f32 reciprocal(f32 x) { return f32(1.f) / x; }

// to[0..3] = the lane sums of a, b, c, d; each sum is made in the same order whatever the other three hold.
FOVEA_INLINE void reduce_add4(f32 a, f32 b, f32 c, f32 d, float* to) {
  to[0] = reduce_add(a);
  to[1] = reduce_add(b);
  to[2] = reduce_add(c);
  to[3] = reduce_add(d);
}

FOVEA_INLINE void transpose(f32 (&rows)[kLanes]) {
  alignas(f32) float cells[kLanes * kLanes];
  for (index_t r = 0; r < kLanes; ++r) rows[r].store_aligned(cells + r * kLanes);
  for (index_t r = 0; r < kLanes; ++r) {
    alignas(f32) float column[kLanes];
    for (index_t c = 0; c < kLanes; ++c) column[c] = cells[c * kLanes + r];
    rows[r] = f32::load_aligned(column);
  }
}

// Stored integers, one to a 32-bit lane; the `_some` forms read `count` of them and give zeros behind.
template <class T>
FOVEA_INLINE i32 widen(const std::byte* from, index_t count) {
  T some[kLanes] = {};
  std::memcpy(some, from, static_cast<std::size_t>(count) * sizeof(T));
  alignas(i32) std::int32_t lanes[kLanes];
  for (index_t i = 0; i < kLanes; ++i) lanes[i] = some[i];
  return i32::load_aligned(lanes);
}
FOVEA_INLINE i32 widen_u8(const std::byte* from) { return widen<std::uint8_t>(from, kLanes); }
FOVEA_INLINE i32 widen_i8(const std::byte* from) { return widen<std::int8_t>(from, kLanes); }
FOVEA_INLINE i32 widen_u16(const std::byte* from) { return widen<std::uint16_t>(from, kLanes); }
FOVEA_INLINE i32 widen_u8_some(const std::byte* from, index_t count) { return widen<std::uint8_t>(from, count); }
FOVEA_INLINE i32 widen_i8_some(const std::byte* from, index_t count) { return widen<std::int8_t>(from, count); }
FOVEA_INLINE i32 widen_u16_some(const std::byte* from, index_t count) { return widen<std::uint16_t>(from, count); }
FOVEA_INLINE f32 as_float(i32 bits) {
  alignas(i32) std::int32_t lanes[kLanes];
  alignas(f32) float floats[kLanes];
  bits.store_aligned(lanes);
  std::memcpy(floats, lanes, sizeof(lanes));
  return f32::load_aligned(floats);
}
FOVEA_INLINE f32 first_of(f32 v, index_t count) {   // zeros behind
  alignas(f32) float lanes[kLanes];
  v.store_aligned(lanes);
  return load_some(lanes, count);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
