// SPDX-License-Identifier: Apache-2.0
// How a K or V vector of `dim` numbers is stored as one run of bytes, a row. Rows carry their own scales behind their codes, so
// whoever moves a row (a page table, a ring, a copy) moves all of it and needs no second table.
//
//   format         bytes of a row, in order                                                value of number d
//   f32 f64 bf16   dim numbers                                                             the number
//   f16            dim numbers                                                             the number
//   i8_token       dim int8 codes, one f32 scale                                           code * scale
//   i8_channel     dim int8 codes; scales [kv_head, dim] stand beside the rows (K only)    code * scale[kv_head][d]
//   i4_g32 i4_g64  padded(dim, 32 | 64) / 2 bytes of nibbles, one f16 scale per group      (nibble - 8) * scale
//   i4_g32_zero    the same nibbles, then per group f16 scale, f16 zero                    nibble * scale + zero
//   i4_g64_zero    (zero is the value of nibble 0)
//   e4m3 e5m2      dim fp8 numbers, one f32 scale                                          number * scale
//   latent_fp8     512 e4m3, four f32 scales (one per 128 numbers), 64 bf16: 656 bytes, dim 576, the published cache layout
//                  of DeepSeek-V3.2's FlashMLA; read as V, its first 512 numbers
//
// Nibbles stand in blocks of 32 numbers, 16 bytes each: byte i of block b holds number 32 b + i in its low half and number
// 32 b + 16 + i in its high half. Scales need no alignment.
#pragma once
#include "types.hpp"

namespace fovea {
inline namespace v0 {

enum class Format : std::uint8_t {
  f32,
  f64,
  bf16,
  f16,
  i8_token,
  i8_channel,
  i4_g32,
  i4_g64,
  i4_g32_zero,
  i4_g64_zero,
  e4m3,
  e5m2,
  latent_fp8
};
inline constexpr int kFormats = 13;
inline constexpr index_t kLatentFp8Dim = 576, kLatentFp8Values = 512, kLatentFp8Bytes = 656;

FOVEA_DATA_INLINE constexpr const char* name_of(Format format) {
  constexpr const char* kNames[kFormats] = {"f32",    "f64",    "bf16",        "f16",         "i8_token", "i8_channel", "i4_g32",
                                            "i4_g64", "i4_g32_zero", "i4_g64_zero", "e4m3",     "e5m2",       "latent_fp8"};
  return static_cast<int>(format) < kFormats ? kNames[static_cast<int>(format)] : "no format";
}

// Formats a call compiles kernels for: each costs about a second and 40 KiB, so a program names those it stores.
template <Format... List>
struct Formats {};
using AllFormats = Formats<Format::f32, Format::f64, Format::bf16, Format::f16, Format::i8_token, Format::i8_channel,
                           Format::i4_g32, Format::i4_g64, Format::i4_g32_zero, Format::i4_g64_zero, Format::e4m3,
                           Format::e5m2, Format::latent_fp8>;

// Numbers stored one by one, without scales.
FOVEA_DATA_INLINE constexpr bool is_plain(Format format) { return format <= Format::f16; }

FOVEA_DATA_INLINE constexpr index_t i4_group(Format format) {
  return format == Format::i4_g32 || format == Format::i4_g32_zero ? 32 : 64;
}

FOVEA_DATA_INLINE constexpr index_t row_bytes(Format format, index_t dim) {
  switch (format) {
    case Format::f32:
      return 4 * dim;
    case Format::f64:
      return 8 * dim;
    case Format::bf16:
    case Format::f16:
      return 2 * dim;
    case Format::i8_channel:
      return dim;
    case Format::i8_token:
    case Format::e4m3:
    case Format::e5m2:
      return dim + 4;
    case Format::latent_fp8:
      return kLatentFp8Bytes;
    default: {
      const index_t group = i4_group(format), groups = (dim + group - 1) / group;
      const bool zero = format == Format::i4_g32_zero || format == Format::i4_g64_zero;
      return groups * (group / 2 + (zero ? 4 : 2));
    }
  }
}

template <class T>
struct FormatOf {
  static_assert(sizeof(T) == 0, "fovea: a tensor holds float, double, fovea::bf16 or fovea::f16; other numbers are rows of a Kv");
  static constexpr Format value = Format::f32;
};
template <>
struct FormatOf<float> {
  static constexpr Format value = Format::f32;
};
template <>
struct FormatOf<double> {
  static constexpr Format value = Format::f64;
};
template <>
struct FormatOf<bf16> {
  static constexpr Format value = Format::bf16;
};
template <>
struct FormatOf<f16> {
  static constexpr Format value = Format::f16;
};

}   // namespace v0
}   // namespace fovea
