// SPDX-License-Identifier: Apache-2.0
// What a stored row means: the table of core/formats.hpp, read byte by byte, one number at a time, in double. Every value is
// exact (a code has at most 8 bits, a scale 24), so a kernel's result on stored rows is compared with attention over these.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../core/formats.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

template <class T>
T stored_field(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

// Sign, exponent and fraction of a number with `fraction_bits` below `exponent_bits`. The highest exponent means infinity
// and NaN, except where only its last fraction is a NaN (e4m3).
inline double stored_float(unsigned bits, int exponent_bits, int fraction_bits, bool has_infinity) {
  const unsigned fraction_end = 1u << fraction_bits, exponent_end = 1u << exponent_bits;
  const unsigned fraction = bits % fraction_end, exponent = bits / fraction_end % exponent_end;
  const double sign = bits / fraction_end / exponent_end % 2 == 1 ? -1 : 1;
  const int bias = static_cast<int>(exponent_end / 2) - 1;
  if (exponent == exponent_end - 1) {
    if (has_infinity && fraction == 0) return sign * std::numeric_limits<double>::infinity();
    if (has_infinity || fraction == fraction_end - 1) return std::numeric_limits<double>::quiet_NaN();
  }
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
  return sign * std::ldexp(fraction_end + fraction, static_cast<int>(exponent) - bias - fraction_bits);
}

inline double stored_bf16(const std::byte* at) { return stored_float(stored_field<std::uint16_t>(at), 8, 7, true); }
inline double stored_f16(const std::byte* at) { return stored_float(stored_field<std::uint16_t>(at), 5, 10, true); }
inline double stored_e4m3(const std::byte* at) { return stored_float(stored_field<std::uint8_t>(at), 4, 3, false); }
inline double stored_e5m2(const std::byte* at) { return stored_float(stored_field<std::uint8_t>(at), 5, 2, true); }
inline double stored_f32(const std::byte* at) { return double{stored_field<float>(at)}; }
inline double stored_i8(const std::byte* at) { return stored_field<std::int8_t>(at); }

// The code of number d, 0 to 15: blocks of 32 numbers in 16 bytes, the first half of a block in the low nibbles.
inline double stored_nibble(const std::byte* row, index_t d) {
  const index_t block = d / 32, within = d % 32;
  const unsigned byte = stored_field<std::uint8_t>(row + 16 * block + within % 16);
  return within < 16 ? byte % 16 : byte / 16;
}

// Number d of a row of `dim` numbers. channel_scale[d]: only i8_channel reads it.
inline double stored_value(Format format, const std::byte* row, index_t dim, index_t d,
                           const float* channel_scale = nullptr) {
  switch (format) {
    case Format::f32:
      return stored_f32(row + 4 * d);
    case Format::f64:
      return stored_field<double>(row + 8 * d);
    case Format::bf16:
      return stored_bf16(row + 2 * d);
    case Format::f16:
      return stored_f16(row + 2 * d);
    case Format::i8_token:
      return stored_i8(row + d) * stored_f32(row + dim);
    case Format::i8_channel:
      return stored_i8(row + d) * double{channel_scale[d]};
    case Format::e4m3:
      return stored_e4m3(row + d) * stored_f32(row + dim);
    case Format::e5m2:
      return stored_e5m2(row + d) * stored_f32(row + dim);
    case Format::latent_fp8:
      if (d < 512) return stored_e4m3(row + d) * stored_f32(row + 512 + 4 * (d / 128));
      return stored_bf16(row + 512 + 16 + 2 * (d - 512));
    case Format::i4_g32:
    case Format::i4_g64: {
      const index_t group = format == Format::i4_g32 ? 32 : 64, groups = (dim + group - 1) / group;
      const std::byte* const scales = row + groups * group / 2;
      return (stored_nibble(row, d) - 8) * stored_f16(scales + 2 * (d / group));
    }
    case Format::i4_g32_zero:
    case Format::i4_g64_zero: {
      const index_t group = format == Format::i4_g32_zero ? 32 : 64, groups = (dim + group - 1) / group;
      const std::byte* const pair = row + groups * group / 2 + 4 * (d / group);   // scale, zero
      return stored_nibble(row, d) * stored_f16(pair) + stored_f16(pair + 2);
    }
  }
  return std::numeric_limits<double>::quiet_NaN();
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
