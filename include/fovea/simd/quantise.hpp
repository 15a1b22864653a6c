// SPDX-License-Identifier: Apache-2.0
// fp32 rows to stored rows (core/formats.hpp). Everything rounds to nearest, ties to even; codes are the rounded fp32
// quotients x / scale, so the stored value of a finite x is at most scale / 2 away from it, in floating formats at most half
// a unit in the last place. The scales (docs/storage.md has the figures):
//
//   i8_token       max|x| / 127; codes -127 .. 127
//   i8_channel     calibrated (widen_channels, channel_scales) or the caller's own; codes clip to -127 .. 127
//   i4_g*          a group's larger side reaches nibble 0 (8 steps), its smaller side at most nibble 15 (7 steps): |scale| =
//                  max(larger / 8, smaller / 7), negative where the larger side is the positive one. Rounding errors are
//                  11 % smaller (RMS, Gaussian groups) than with max|x| / 7, and no number clips
//   i4_g*_zero     zero = min x, scale = (max x - zero) / 15, at least the step of an f16 of zero's size
//   e4m3, e5m2     max|x| / 448, max|x| / 57344
//   latent_fp8     2^ceil(log2(max(max|x| / 448, 1e-4))) per 128 numbers, as published; the last 64 numbers in bf16
//
// f32 scales are cut to 16 significant bits: code * scale is then exact in fp32, and a row that was decoded and is stored
// again gives the same bytes (latent_fp8: the same values). They are at least 2^-126, f16 scales at least 2^-20; neither is
// 0, a row of zeros is stored as zeros.
//
// A number that is not finite never vanishes: in bf16, f16 and fp8 it stays what it is where it is (infinity in e4m3 is
// NaN); in i8_token and the i4 formats the scale becomes NaN, and with it every number of the row or group. So does a group
// of i4 beyond the range of an f16 scale (|x| > 4.6e5). i8_channel has neither: what its scales cannot hold is counted and
// returned.
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../core/status.hpp"
#include "narrow.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// The integer nearest to x for |x| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction.
FOVEA_INLINE i32 nearest_int(f32 x) { return float_bits(x + f32(12582912.f)) - i32(0x4b400000); }

template <class T>
FOVEA_INLINE void store_field(std::byte* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

inline constexpr std::int32_t kInfinityBits = 0x7f800000;
inline constexpr float kSmallestScale = 0x1p-126f, kSmallestScaleF16 = 0x1p-20f, kSmallestLatentScale = 1e-4f;

// A row of fp32 numbers to be stored.
struct QuantiseSource {
  const float* x;
  index_t stride, dim;

  FOVEA_INLINE f32 at(index_t d) const { return d < dim ? load_strided(x + d * stride, stride, dim - d) : f32(0.f); }
  FOVEA_INLINE index_t lanes(index_t d) const { return dim - d < kLanes ? dim - d : kLanes; }
};

FOVEA_INLINE std::int32_t largest_lane(i32 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32(v);
#else
  alignas(i32) std::int32_t lanes[kLanes];
  v.store_aligned(lanes);
  std::int32_t largest = lanes[0];
  for (index_t i = 1; i < kLanes; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  return largest;
#endif
}

// max|x| as bits. Compared as integers a NaN is larger than infinity, infinity larger than every number: none gets lost.
template <bool kFiniteOnly>
FOVEA_INLINE std::int32_t largest_bits(const QuantiseSource& from, index_t begin, index_t end) {
  i32 largest(0);
  for (index_t d = begin; d < end; d += kLanes) {
    i32 magnitude = float_bits(from.at(d)) & i32(0x7fffffff);
    if constexpr (kFiniteOnly) magnitude = select_int(magnitude < i32(kInfinityBits), magnitude, i32(0));
    largest = select_int(magnitude > largest, magnitude, largest);
  }
  return largest_lane(largest);
}

// largest / levels in 16 significant bits. Cut, not rounded: `levels` scales are then never beyond `largest`, so the largest
// fp32 number does not read as infinity; 2^-15 too small a scale does not move the largest code.
FOVEA_INLINE float scale_of(std::int32_t largest, float levels) {
  if (largest >= kInfinityBits) return std::numeric_limits<float>::quiet_NaN();
  const auto quotient = std::bit_cast<std::uint32_t>(std::bit_cast<float>(largest) / levels);
  const float scale = std::bit_cast<float>(quotient & 0xffffff00u);
  return scale < kSmallestScale ? kSmallestScale : scale;
}

template <class T>
FOVEA_INLINE void store_plain(const QuantiseSource& from, std::byte* row) {
  for (index_t d = 0; d < from.dim; d += kLanes) {
    store_as<T>(row + static_cast<index_t>(sizeof(T)) * d, from.at(d), from.lanes(d));
  }
}

FOVEA_INLINE void store_i8_token(const QuantiseSource& from, std::byte* row) {
  const float scale = scale_of(largest_bits<false>(from, 0, from.dim), 127.f);
  if (scale == scale) {
    for (index_t d = 0; d < from.dim; d += kLanes) {
      store_low8(row + d, nearest_int(from.at(d) / f32(scale)), from.lanes(d));
    }
  } else {
    std::memset(row, 0, static_cast<std::size_t>(from.dim));
  }
  store_field(row + from.dim, scale);
}

FOVEA_INLINE index_t store_i8_channel(const QuantiseSource& from, const float* scale, std::byte* row) {
  constexpr auto kHeld = std::bit_cast<std::int32_t>(127.5f);
  i32 lost(0);
  for (index_t d = 0; d < from.dim; d += kLanes) {
    const index_t lanes = from.lanes(d);
    const f32 code = from.at(d) / load_strided(scale + d, 1, lanes);
    const auto too_large = (float_bits(code) & i32(0x7fffffff)) > i32(kHeld);
    lost = lost + select_int(too_large & (lane_numbers() < i32(static_cast<std::int32_t>(lanes))), i32(1), i32(0));
    const f32 below = xsimd::select(code > f32(127.f), f32(127.f), code);
    const f32 inside = xsimd::select(below < f32(-127.f), f32(-127.f), below);
    store_low8(row + d, nearest_int(xsimd::select(inside == inside, inside, f32(0.f))), lanes);
  }
  alignas(i32) std::int32_t counts[kLanes];
  lost.store_aligned(counts);
  index_t sum = 0;
  for (const std::int32_t lane : counts) sum += lane;
  return sum;
}

template <class T>
FOVEA_INLINE void store_fp8_token(const QuantiseSource& from, float largest_code, std::byte* row) {
  const float scale = scale_of(largest_bits<true>(from, 0, from.dim), largest_code);
  for (index_t d = 0; d < from.dim; d += kLanes) store_as<T>(row + d, from.at(d) / f32(scale), from.lanes(d));
  store_field(row + from.dim, scale);
}

FOVEA_INLINE void store_latent_fp8(const QuantiseSource& from, std::byte* row) {
  std::byte* const scales = row + kLatentFp8Values;
  for (index_t group = 0; group < 4; ++group) {
    const index_t begin = 128 * group, end = begin + 128;
    const float wanted = std::bit_cast<float>(largest_bits<true>(from, begin, end)) / 448.f;
    const auto bits = std::bit_cast<std::uint32_t>(wanted < kSmallestLatentScale ? kSmallestLatentScale : wanted);
    const float scale = std::bit_cast<float>((bits + 0x7fffffu) & 0xff800000u);   // the next power of two
    for (index_t d = begin; d < end; d += kLanes) store_as<fp8_e4m3>(row + d, from.at(d) / f32(scale), kLanes);
    store_field(scales + 4 * group, scale);
  }
  std::byte* const exact = scales + 16;
  for (index_t d = kLatentFp8Values; d < kLatentFp8Dim; d += kLanes) {
    store_as<bf16>(exact + 2 * (d - kLatentFp8Values), from.at(d), kLanes);
  }
}

// value = (nibble - offset) * scale + zero. scale is NaN where the group cannot be stored.
struct NibbleScale {
  f16 scale, zero;
  std::int32_t offset;
};

// 2^-20 is the smallest f16 scale because nearest rounding moves it by at most 1/32 of itself: no code moves.
FOVEA_INLINE NibbleScale symmetric_nibbles(float positive, float negative) {
  const float larger = positive > negative ? positive : negative, smaller = positive > negative ? negative : positive;
  const float wanted = larger / 8 > smaller / 7 ? larger / 8 : smaller / 7;
  f16 scale = convert<f16>(wanted < kSmallestScaleF16 ? kSmallestScaleF16 : wanted);
  if (scale.bits >= SmallFloat<f16>::overflow) return {f16{0x7e00}, f16{0}, 8};
  if (positive > 7.5f * convert<float>(scale)) scale.bits = static_cast<std::uint16_t>(scale.bits | 0x8000u);
  return {scale, f16{0}, 8};
}

// Where a group spreads over less than 15 steps of its zero's own precision, its scale is that step: rounding zero to
// nearest then moves no number by more than half a scale.
FOVEA_INLINE NibbleScale affine_nibbles(float low, float high) {
  f16 zero = convert<f16>(low);
  if ((zero.bits & 0x7fffu) == 0) zero.bits = 0;
  if ((zero.bits & 0x7fffu) >= SmallFloat<f16>::overflow) return {f16{0x7e00}, f16{0}, 0};
  const unsigned exponent = (zero.bits >> 10) & 31u;
  const float step = std::bit_cast<float>((exponent > 5 ? exponent - 25 + 127 : 127u - 20u) << 23);
  const float wanted = (high - convert<float>(zero)) / 15;
  const f16 scale = convert<f16>(wanted < step ? step : wanted);
  if (scale.bits >= SmallFloat<f16>::overflow) return {f16{0x7e00}, f16{0}, 0};
  return {scale, zero, 0};
}

template <bool kZero>
FOVEA_INLINE void store_i4(const QuantiseSource& from, index_t group, std::byte* row) {
  constexpr index_t kScaleBytes = kZero ? 4 : 2;
  const index_t groups = (from.dim + group - 1) / group;
  std::byte* const scales = row + groups * group / 2;
  for (index_t g = 0; g < groups; ++g) {
    const index_t begin = g * group, end = from.dim < begin + group ? from.dim : begin + group;
    const f32 first(from.x[begin * from.stride]);
    f32 high = first, low_negated = -first;
    for (index_t d = begin; d < end; d += kLanes) {
      const f32 x = xsimd::select(as_keep(lane_numbers() < i32(static_cast<std::int32_t>(end - d))), from.at(d), first);
      high = xsimd::max(high, x);
      low_negated = xsimd::max(low_negated, -x);
    }
    NibbleScale code{f16{0x7e00}, f16{0}, kZero ? 0 : 8};
    if (largest_bits<false>(from, begin, end) < kInfinityBits) {
      const float highest = reduce_max(high), lowest_negated = reduce_max(low_negated);
      code = kZero ? affine_nibbles(-lowest_negated, highest) : symmetric_nibbles(highest, lowest_negated);
    }
    const bool stored = code.scale.bits != 0x7e00u;
    const f32 scale(convert<float>(code.scale)), zero(convert<float>(code.zero));
    const auto nibbles = [&](index_t d) {
      i32 nibble = nearest_int((from.at(d) - zero) / scale) + i32(code.offset);
      nibble = select_int(nibble < i32(0), i32(0), nibble);
      nibble = select_int(nibble > i32(15), i32(15), nibble);
      const auto inside = lane_numbers() < i32(static_cast<std::int32_t>(stored && end > d ? end - d : 0));
      return select_int(inside, nibble, i32(code.offset));
    };
    for (index_t block = begin; block < begin + group; block += 32) {
      for (index_t i = 0; i < 16; i += kLanes) {
        store_low8(row + block / 2 + i, nibbles(block + i) | (nibbles(block + 16 + i) << 4), kLanes);
      }
    }
    store_field(scales + kScaleBytes * g, code.scale);
    if (kZero) store_field(scales + kScaleBytes * g + 2, code.zero);
  }
}

// One row: dim numbers, element_stride apart, to row_bytes(format, dim) bytes at `row` of any alignment. channel_scale [dim]
// is read by i8_channel only. Returns how many numbers an i8_channel row could not hold: clipped to 127 scales, or not
// finite (stored as 127, -127 or 0); 0 for every other format.
FOVEA_NOINLINE inline index_t quantise_row(Format format, const float* x, index_t element_stride, index_t dim,
                                           const float* channel_scale, std::byte* row) {
  FOVEA_ASSERT(format != Format::latent_fp8 || dim == kLatentFp8Dim);
  FOVEA_ASSERT(format != Format::i8_channel || channel_scale != nullptr);
  const QuantiseSource from{x, element_stride, dim};
  switch (format) {
    case Format::f32:
      store_plain<float>(from, row);
      break;
    case Format::f64:
      store_plain<double>(from, row);
      break;
    case Format::bf16:
      store_plain<bf16>(from, row);
      break;
    case Format::f16:
      store_plain<f16>(from, row);
      break;
    case Format::i8_token:
      store_i8_token(from, row);
      break;
    case Format::i8_channel:
      return store_i8_channel(from, channel_scale, row);
    case Format::e4m3:
      store_fp8_token<fp8_e4m3>(from, 448.f, row);
      break;
    case Format::e5m2:
      store_fp8_token<fp8_e5m2>(from, 57344.f, row);
      break;
    case Format::latent_fp8:
      store_latent_fp8(from, row);
      break;
    case Format::i4_g32:
    case Format::i4_g64:
      store_i4<false>(from, i4_group(format), row);
      break;
    case Format::i4_g32_zero:
    case Format::i4_g64_zero:
      store_i4<true>(from, i4_group(format), row);
      break;
  }
  return 0;
}

// A tensor to rows: strides of `to` in bytes per [batch, kv_head, pos], as in Stored (core/kv.hpp). channel_scale [kv_head,
// dim], contiguous, with i8_channel only. `lost`, if given, grows by what quantise_row returns. Writes nothing when it
// refuses.
inline Status quantise(Tensor<const float> x, Format format, std::byte* to, std::array<index_t, 3> stride,
                       const float* channel_scale = nullptr, index_t* lost = nullptr) {
  const auto [batch, heads, len, dim] = x.extent;
  if (static_cast<int>(format) >= kFormats) {
    return Status::error(Code::invalid_argument, "quantise: format %d does not exist", static_cast<int>(format));
  }
  if (batch < 0 || heads < 0 || len < 0 || dim <= 0) {
    return Status::error(Code::invalid_argument,
                         "quantise: x is [%td, %td, %td, %td]; extents are not negative, dim is at least 1", batch, heads,
                         len, dim);
  }
  if (format == Format::latent_fp8 && dim != kLatentFp8Dim) {
    return Status::error(Code::unsupported, "quantise: latent_fp8 rows hold %td numbers, x has dim %td", kLatentFp8Dim, dim);
  }
  if (batch == 0 || heads == 0 || len == 0) return {};
  if (x.data == nullptr || to == nullptr) {
    return Status::error(Code::invalid_argument, "quantise: %s has no data", x.data == nullptr ? "x" : "the destination");
  }
  if (format == Format::i8_channel && channel_scale == nullptr) {
    return Status::error(Code::invalid_argument, "quantise: i8_channel needs channel_scale [%td, %td]", heads, dim);
  }
  const index_t bytes = row_bytes(format, dim);
  if (len > 1 && stride[2] < bytes && -stride[2] < bytes) {
    return Status::error(Code::invalid_argument,
                         "quantise: rows of %td bytes (%s, dim %td) overlap at a stride of %td bytes", bytes,
                         name_of(format), dim, stride[2]);
  }
  index_t sum = 0;
  for (index_t b = 0; b < batch; ++b) {
    for (index_t h = 0; h < heads; ++h) {
      const float* const scale = channel_scale == nullptr ? nullptr : channel_scale + h * dim;
      for (index_t s = 0; s < len; ++s) {
        sum += quantise_row(format, x.data + b * x.stride[0] + h * x.stride[1] + s * x.stride[2], x.stride[3], dim, scale,
                            to + b * stride[0] + h * stride[1] + s * stride[2]);
      }
    }
  }
  if (lost != nullptr) *lost += sum;
  return {};
}

// Calibration of i8_channel: widen_channels over as many keys as are typical, then channel_scales once. largest [kv_head,
// dim], contiguous, starts as zeros and becomes max|k| so far; a NaN or infinity stays in it.
inline void widen_channels(Tensor<const float> k, float* largest) {
  const auto [batch, heads, len, dim] = k.extent;
  for (index_t b = 0; b < batch; ++b) {
    for (index_t h = 0; h < heads; ++h) {
      for (index_t s = 0; s < len; ++s) {
        const QuantiseSource row{k.data + b * k.stride[0] + h * k.stride[1] + s * k.stride[2], k.stride[3], dim};
        for (index_t d = 0; d < dim; d += kLanes) {
          float* const at = largest + h * dim + d;
          const i32 old = float_bits(load_strided(at, 1, row.lanes(d)));
          const i32 magnitude = float_bits(row.at(d)) & i32(0x7fffffff);
          store_some(at, as_float(select_int(magnitude > old, magnitude, old)), row.lanes(d));
        }
      }
    }
  }
}

// scales[n] = headroom * largest[n] / 127, NaN where largest[n] is not finite. Headroom above 1 leaves room for keys larger
// than those of the calibration, at the price of coarser steps. `scales` may be `largest`.
inline void channel_scales(const float* largest, index_t count, float* scales, float headroom = 1.f) {
  for (index_t n = 0; n < count; ++n) scales[n] = scale_of(std::bit_cast<std::int32_t>(headroom * largest[n]), 127.f);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
