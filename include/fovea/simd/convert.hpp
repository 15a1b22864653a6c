// SPDX-License-Identifier: Apache-2.0
// Stored numbers -> f32 lanes. All exact: fp32 holds every value of the 16- and 8-bit formats (f64 is rounded to nearest
// even). Signalling NaNs may come out quiet. `load_x` reads kLanes numbers, `load_x_some` reads `count` and gives zeros behind.
#pragma once
#include <cstring>

#include "simd.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

FOVEA_INLINE f32 load_f32(const std::byte* from) { return load(reinterpret_cast<const float*>(from)); }
FOVEA_INLINE f32 load_f32_some(const std::byte* from, index_t count) {
  return load_some(reinterpret_cast<const float*>(from), count);
}

FOVEA_INLINE f32 load_f64_some(const std::byte* from, index_t count) {
  alignas(f32) float lanes[kLanes] = {};
  for (index_t i = 0; i < count; ++i) {
    double number;
    std::memcpy(&number, from + i * 8, sizeof(number));
    lanes[i] = static_cast<float>(number);
  }
  return f32::load_aligned(lanes);
}
FOVEA_INLINE f32 load_f64(const std::byte* from) { return load_f64_some(from, kLanes); }

FOVEA_INLINE f32 load_i8(const std::byte* from) { return to_float(widen_i8(from)); }
FOVEA_INLINE f32 load_i8_some(const std::byte* from, index_t count) { return to_float(widen_i8_some(from, count)); }

#if !defined(__AVX512F__)
FOVEA_INLINE f32 load_bf16(const std::byte* from) { return as_float(widen_u16(from) << 16); }
FOVEA_INLINE f32 load_bf16_some(const std::byte* from, index_t count) { return as_float(widen_u16_some(from, count) << 16); }

// 1 sign, 4 exponent, 3 mantissa bits, bias 7; 0x7f and 0xff are NaN, there is no infinity. Denormals go through integers
// here and below: as the operand of a multiplication they cost some 150 cycles on x86 and are 0 on processors set that way.
FOVEA_INLINE f32 e4m3_bits_to_float(i32 number) {
  const i32 magnitude = number & i32(0x7f), sign = (number & i32(0x80)) << 24;
  const i32 normal = (magnitude << 20) + i32((127 - 7) << 23);
  const f32 finite = select(as_keep(magnitude < i32(8)), to_float(magnitude) * f32(0x1p-9f), as_float(normal));
  const f32 value = select(as_keep(magnitude < i32(0x7f)), finite, as_float(i32(0x7fc00000)));
  return select(as_keep(sign < i32(0)), -value, value);
}
FOVEA_INLINE f32 load_e4m3(const std::byte* from) { return e4m3_bits_to_float(widen_u8(from)); }
FOVEA_INLINE f32 load_e4m3_some(const std::byte* from, index_t count) {
  return e4m3_bits_to_float(widen_u8_some(from, count));
}

#if !(defined(__AVX2__) && defined(__FMA__) && defined(__F16C__))
// IEEE half in the low 16 bits of each lane.
FOVEA_INLINE f32 f16_bits_to_float(i32 half) {
  const i32 magnitude = half & i32(0x7fff), sign = (half & i32(0x8000)) << 16;
  const i32 normal = (magnitude << 13) + i32((127 - 15) << 23);
  const i32 special = (magnitude << 13) + i32((255 - 31) << 23);
  const f32 finite = select(as_keep(magnitude < i32(0x0400)), to_float(magnitude) * f32(0x1p-24f), as_float(normal));
  const f32 value = select(as_keep(magnitude < i32(0x7c00)), finite, as_float(special));
  return select(as_keep(sign < i32(0)), -value, value);
}
FOVEA_INLINE f32 load_f16(const std::byte* from) { return f16_bits_to_float(widen_u16(from)); }
FOVEA_INLINE f32 load_f16_some(const std::byte* from, index_t count) {
  return f16_bits_to_float(widen_u16_some(from, count));
}
FOVEA_INLINE f32 load_e5m2(const std::byte* from) { return f16_bits_to_float(widen_u8(from) << 8); }   // a half's upper byte
FOVEA_INLINE f32 load_e5m2_some(const std::byte* from, index_t count) {
  return f16_bits_to_float(widen_u8_some(from, count) << 8);
}
#endif
#endif

// Scales need no alignment.
FOVEA_INLINE float read_f32(const std::byte* from) {
  float value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}
FOVEA_INLINE float read_f16(const std::byte* from) { return first_lane(load_f16_some(from, 1)); }

// Byte d % 16 of block d / 32 holds number d of a row of nibbles, in its upper half where d & 16.
FOVEA_INLINE i32 nibble_bytes(const std::byte* codes, index_t d) {
  const i32 bytes = widen_u8(codes + d / 32 * 16 + d % 16);
  return (d & 16) != 0 ? bytes >> 4 : bytes;
}

// What the 16 nibbles stand for is value(n) = n * scale + zero, or (n - 8) * scale.
#if defined(__AVX512F__)
// All 16 values are one vector, and vpermps looks them up by the lowest four bits of each lane: no mask, no conversion, and
// the scale costs one multiplication per group instead of one per 16 numbers.
struct NibbleValues {
  f32 table;
  FOVEA_INLINE static NibbleValues with_zero(f32 scale, f32 zero) { return {fma(counted_from(0.f), scale, zero)}; }
  FOVEA_INLINE static NibbleValues symmetric(f32 scale) { return {counted_from(-8.f) * scale}; }
  FOVEA_INLINE f32 operator()(i32 bytes) const { return lookup16(table, bytes); }
};
#else
struct NibbleValues {
  f32 scale, zero, shift;
  FOVEA_INLINE static NibbleValues with_zero(f32 scale, f32 zero) { return {scale, zero, f32(0.f)}; }
  FOVEA_INLINE static NibbleValues symmetric(f32 scale) { return {scale, f32(0.f), f32(8.f)}; }
  FOVEA_INLINE f32 operator()(i32 bytes) const { return fma(to_float(bytes & i32(15)) - shift, scale, zero); }
};
#endif

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
