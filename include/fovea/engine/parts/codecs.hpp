// SPDX-License-Identifier: Apache-2.0
// How stored rows (core/formats.hpp) become vectors, and the kernels of each format.
#pragma once
#include <algorithm>

#include "../../core/formats.hpp"
#include "../../simd/convert.hpp"
#include "../policies.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// Numbers of Bytes each, one behind the other; where the row is scaled, its f32 scale follows them.
template <index_t Bytes, f32 (*Load)(const std::byte*), f32 (*LoadSome)(const std::byte*, index_t), bool RowScaled>
struct NumberCodec {
  static constexpr bool kRowScaled = RowScaled;
  FOVEA_INLINE static constexpr index_t offset(index_t d) { return Bytes * d; }
  FOVEA_INLINE f32 load(const std::byte* row, index_t d, index_t) const { return Load(row + offset(d)); }
  FOVEA_INLINE f32 load_some(const std::byte* row, index_t d, index_t count, index_t) const {
    return LoadSome(row + offset(d), count);
  }
  FOVEA_INLINE float scale(const std::byte* row, index_t dim) const {
    if constexpr (RowScaled) return read_f32(row + offset(dim));
    return 1.f;
  }
};

using F32Codec = NumberCodec<4, load_f32, load_f32_some, false>;
using F64Codec = NumberCodec<8, load_f64, load_f64_some, false>;
using F16Codec = NumberCodec<2, load_f16, load_f16_some, false>;
using I8TokenCodec = NumberCodec<1, load_i8, load_i8_some, true>;
using I8ChannelCodec = NumberCodec<1, load_i8, load_i8_some, false>;   // whoever packs the query multiplies it by the scales
using E5m2Codec = NumberCodec<1, load_e5m2, load_e5m2_some, true>;

struct Bf16Codec : NumberCodec<2, load_bf16, load_bf16_some, false> {
  static constexpr bool kStoredBf16 = true;   // bf16 panels copy the bits
};

struct E4m3Codec : NumberCodec<1, load_e4m3, load_e4m3_some, true> {
#if defined(FOVEA_FAST_E4M3)
  static constexpr int kChunkVectors = 4;
  template <int Vectors>
  struct Chunk {
    const std::byte* codes;
    FOVEA_INLINE Chunk(const std::byte* row, index_t d, index_t) : codes(row + d) {}
    FOVEA_INLINE bool plain() const { return all_normal_e4m3<Vectors>(codes); }
    FOVEA_INLINE void pair(int n, f32 (&to)[2]) const { load_normal_e4m3_pair(codes + n * kLanes, to); }
  };
#endif
};

template <index_t Group, bool Zero>
struct I4Codec {
  static constexpr bool kRowScaled = false, kGroupScaled = true;
  static constexpr index_t kScaleBytes = Zero ? 4 : 2;
  FOVEA_INLINE static constexpr index_t offset(index_t d) { return d / 2; }
  FOVEA_INLINE static const std::byte* scales(const std::byte* row, index_t d, index_t dim) {
    return row + (dim + Group - 1) / Group * (Group / 2) + d / Group * kScaleBytes;
  }
  FOVEA_INLINE f32 load(const std::byte* row, index_t d, index_t dim) const {
    const std::byte* const at = scales(row, d, dim);
    const i32 bytes = nibble_bytes(row, d);
    if constexpr (Zero) return NibbleValues::with_zero(f32(read_f16(at)), f32(read_f16(at + 2)))(bytes);
    return NibbleValues::symmetric(f32(read_f16(at)))(bytes);
  }
  // The row is padded to whole groups, so the last vector may be read; what lies behind dim there counts as 0.
  FOVEA_INLINE f32 load_some(const std::byte* row, index_t d, index_t count, index_t dim) const {
    return first_of(load(row, d, dim), count);
  }
  FOVEA_INLINE float scale(const std::byte*, index_t) const { return 1.f; }
#if defined(__AVX512F__)
  // Both halves of a block from one load, the scales of a chunk from one conversion.
  static constexpr int kChunkVectors = 8;
  template <int Vectors>
  struct Chunk {
    static constexpr int kGroups = std::max(static_cast<int>(Vectors * kLanes / Group), 1), kHalves = Zero ? 2 : 1;
    const std::byte* codes;
    f32 stored;
    FOVEA_INLINE Chunk(const std::byte* row, index_t d, index_t dim)
        : codes(row + d / 2), stored(load_f16_few<kGroups * kHalves>(scales(row, d, dim))) {}
    FOVEA_INLINE constexpr bool plain() const { return true; }
    FOVEA_INLINE void pair(int n, f32 (&to)[2]) const {
      const int group = n * kGroups / Vectors;
      const f32 scale = broadcast_lane(stored, group * kHalves);
      const i32 bytes = widen_u8(codes + n * kLanes / 2);
      NibbleValues values;
      if constexpr (Zero) {
        values = NibbleValues::with_zero(scale, broadcast_lane(stored, group * kHalves + 1));
      } else {
        values = NibbleValues::symmetric(scale);
      }
      to[0] = values(bytes);
      to[1] = values(bytes >> 4);
    }
  };
#endif
};

// 512 e4m3, four f32 scales, 64 bf16. Dim is 576, or 512 to leave the bf16 numbers out.
struct LatentFp8Codec {
  static constexpr bool kRowScaled = false;
  static constexpr index_t kScales = 512, kTail = 528, kScaleGroup = 128;
  FOVEA_INLINE static constexpr index_t offset(index_t d) {
    return d < kLatentFp8Values ? d : kTail + 2 * (d - kLatentFp8Values);
  }
  FOVEA_INLINE f32 load(const std::byte* row, index_t d, index_t) const {
    if (d >= kLatentFp8Values) return load_bf16(row + offset(d));
    return load_e4m3(row + d) * f32(read_f32(row + kScales + d / kScaleGroup * 4));
  }
  FOVEA_INLINE f32 load_some(const std::byte* row, index_t d, index_t count, index_t) const {
    if (d >= kLatentFp8Values) return load_bf16_some(row + offset(d), count);
    return load_e4m3_some(row + d, count) * f32(read_f32(row + kScales + d / kScaleGroup * 4));
  }
  FOVEA_INLINE float scale(const std::byte*, index_t) const { return 1.f; }
#if defined(FOVEA_FAST_E4M3)
  static constexpr int kChunkVectors = 4;
  template <int Vectors>
  struct Chunk {
    const std::byte* codes;
    bool wide;
    f32 scale;
    FOVEA_INLINE Chunk(const std::byte* row, index_t d, index_t)
        : codes(row + offset(d)),
          wide(d >= kLatentFp8Values),
          scale(wide ? 1.f : read_f32(row + kScales + d / kScaleGroup * 4)) {}
    FOVEA_INLINE bool plain() const { return wide || all_normal_e4m3<Vectors>(codes); }
    FOVEA_INLINE void pair(int n, f32 (&to)[2]) const {
      if (wide) {
        to[0] = load_bf16(codes + 2 * n * kLanes);
        to[1] = load_bf16(codes + 2 * (n + 1) * kLanes);
      } else {
        load_normal_e4m3_pair(codes + n * kLanes, to);
        to[0] = to[0] * scale;
        to[1] = to[1] * scale;
      }
    }
  };
#endif
};

template <Codec C, class PanelType>
constexpr KeyKernels key_kernels_of() {
  using Element = typename PanelType::Element;
  return {
      [](const Segment& keys, index_t dim, index_t first, void* to) {
        PanelType::pack_keys(C{}, keys, dim, first, static_cast<Element*>(to));
      },
      [](index_t rows, const float* q, index_t q_stride, const Segment& keys, index_t dim, float* s) {
        stream_scores(C{}, rows, q, q_stride, keys, dim, s);
      },
  };
}

template <Codec C, class PanelType>
constexpr ValueKernels value_kernels_of() {
  using Element = typename PanelType::Element;
  return {
      [](const Segment& values, index_t dim, index_t first, void* to, index_t panel_stride) {
        return PanelType::pack_values(C{}, values, dim, first, static_cast<Element*>(to), panel_stride);
      },
      [](index_t rows, const float* p, const Segment& values, index_t dim, const float* rescale, float* acc,
         index_t acc_stride) { stream_weigh(C{}, rows, p, values, dim, rescale, acc, acc_stride); },
      [](const Segment& values, index_t dim) { return all_finite(C{}, values, dim); },
  };
}

template <Codec KeyCodec, Codec ValueCodec, class PanelType = F32Panels>
constexpr KvKernels kv_kernels() {
  return {key_kernels_of<KeyCodec, PanelType>(), value_kernels_of<ValueCodec, PanelType>()};
}

// The codec of a format.
template <Format>
struct CodecOf;
template <>
struct CodecOf<Format::f32> : F32Codec {};
template <>
struct CodecOf<Format::f64> : F64Codec {};
template <>
struct CodecOf<Format::bf16> : Bf16Codec {
  static constexpr bool kStoredBf16 = true;   // bf16 panels copy the bits
};
template <>
struct CodecOf<Format::f16> : F16Codec {};
template <>
struct CodecOf<Format::i8_token> : I8TokenCodec {};
template <>
struct CodecOf<Format::i8_channel> : I8ChannelCodec {};
template <>
struct CodecOf<Format::i4_g32> : I4Codec<32, false> {};
template <>
struct CodecOf<Format::i4_g64> : I4Codec<64, false> {};
template <>
struct CodecOf<Format::i4_g32_zero> : I4Codec<32, true> {};
template <>
struct CodecOf<Format::i4_g64_zero> : I4Codec<64, true> {};
template <>
struct CodecOf<Format::e4m3> : E4m3Codec {};
template <>
struct CodecOf<Format::e5m2> : E5m2Codec {};
template <>
struct CodecOf<Format::latent_fp8> : LatentFp8Codec {};

// The kernels of one of the formats of a list; null pointers for others.
template <class PanelType, Format... List>
KeyKernels key_kernels(Format format, Formats<List...>) {
  KeyKernels found{};
  ((format == List ? void(found = key_kernels_of<CodecOf<List>, PanelType>()) : void()), ...);
  return found;
}
// Codes with scales per channel are keys only: as values their scales would multiply the output, which other formats may share.
template <class PanelType, Format... List>
ValueKernels value_kernels(Format format, Formats<List...>) {
  ValueKernels found{};
  const auto take = [&]<Format F>(std::integral_constant<Format, F>) {
    if constexpr (F != Format::i8_channel) {
      if (format == F) found = value_kernels_of<CodecOf<F>, PanelType>();
    }
  };
  (take(std::integral_constant<Format, List>{}), ...);
  return found;
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
