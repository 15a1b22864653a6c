// SPDX-License-Identifier: Apache-2.0
// Stored rows -> panels of bf16 pairs. Rows are rounded to nearest even on the way, values beyond the range of bf16 become
// infinities; rows stored as bf16 (a codec says so with kStoredBf16) are copied as bits.
#pragma once
#include "../core/shapes.hpp"
#include "gemm_bf16.hpp"
#include "pack.hpp"

#if defined(__AVX512BF16__)

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

template <class Codec>
concept StoredBf16 = requires {
  requires Codec::kStoredBf16;
};

inline constexpr index_t kPairNumbers = 2 * kLanes;   // of one vector

// The numbers d .. d + width - 1 of a row, zeros up to kPairNumbers.
template <class Codec>
FOVEA_INLINE i32 load_rounded(const Codec& codec, const std::byte* row, index_t d, index_t width, index_t dim,
                              [[maybe_unused]] f32 scale) {
  if constexpr (StoredBf16<Codec>) {
    return width >= kPairNumbers ? load_pairs(row + 2 * d) : load_some_pairs(row + 2 * d, width);
  } else {
    const f32 low = load_part(codec, row, d, width, dim);
    const f32 high = width > kLanes ? load_part(codec, row, d + kLanes, width - kLanes, dim) : f32(0.f);
    if constexpr (Codec::kRowScaled) return round_to_pairs(low * scale, high * scale);
    return round_to_pairs(low, high);
  }
}

template <class Codec>
FOVEA_INLINE float row_scale(const Codec& codec, const std::byte* row, index_t dim) {
  if constexpr (Codec::kRowScaled) {
    return codec.scale(row, dim);
  } else {
    return 1.f;
  }
}

// The lines of what is read next: one for storage of up to 16 bits a number, two for wider ones.
template <class Codec>
FOVEA_INLINE void prefetch_next(const std::byte* row, index_t d, index_t ahead) {
  prefetch(row + Codec::offset(d), ahead);
  if (Codec::offset(kLanes) - Codec::offset(0) >= 64) prefetch(row + Codec::offset(d + kLanes), ahead);
}

// As pack_keys, in pairs (number d, number d + 1) of a key, with zeros behind dim up to the even number `depth`.
template <class Codec>
void pack_keys_bf16(const Codec& codec, const Segment& keys, index_t dim, index_t depth, index_t first,
                    bf16* to) {   // [panel, depth / 2, kPanel, 2]
  const index_t panel_size = depth * kPanel;
  for (index_t column = first; column < first + keys.count;) {
    const index_t here = std::min(kLanes - column % kLanes, first + keys.count - column);
    const std::byte* const block = keys.data + (column - first) * keys.stride;
    bf16* const panel = to + column / kPanel * panel_size + 2 * (column % kPanel);
    float scale[kLanes];
    for (index_t r = 0; r < kLanes; ++r) scale[r] = row_scale(codec, block + std::min(r, here - 1) * keys.stride, dim);
    for (index_t d = 0; d < dim; d += kPairNumbers) {
      const index_t width = std::min(kPairNumbers, dim - d);
      f32 cells[kLanes];
      FOVEA_UNROLL
      for (index_t r = 0; r < kLanes; ++r) {
        const std::byte* const row = block + std::min(r, here - 1) * keys.stride;
        prefetch_next<Codec>(row, d, kLanes * keys.stride);   // the next block's rows, too short for the hardware
        cells[r] = as_floats(load_rounded(codec, row, d, width, dim, f32(scale[r])));
      }
      transpose(cells);
      bf16* const at = panel + d * kPanel;
      const index_t pairs = (width + 1) / 2;
      FOVEA_UNROLL
      for (index_t c = 0; c < kLanes; ++c) {
        if (c < pairs && here == kLanes) store_pairs(at + 2 * c * kPanel, as_pairs(cells[c]));
        if (c < pairs && here < kLanes) store_some_pairs(at + 2 * c * kPanel, as_pairs(cells[c]), here);
      }
    }
    for (index_t d = (dim + 1) / 2 * 2; d < depth; d += 2) store_some_pairs(panel + d * kPanel, i32(0), here);
    column += here;
  }
}

// As pack_values, in pairs (key j, key j + 1), where j is even and counts from the start of the tile, as `to` does. The
// first row of the segment is key `first` of the tile. Two segments may share a pair; where the second key is missing it is
// zero.
template <class Codec>
bool pack_values_bf16(const Codec& codec, const Segment& values, index_t dim, index_t first, bf16* to,
                      index_t panel_stride) {   // [panel, key pair, kPanel, 2]
  i32 sizes(0);
  const index_t last = first + values.count;
  for (index_t key = first / 2 * 2; key < last; key += 2) {
    const bool has_low = key >= first, has_high = key + 1 < last;
    const std::byte* const low_row = values.data + (key - first) * values.stride;
    const std::byte* const high_row = low_row + values.stride;
    const f32 low_scale(has_low ? row_scale(codec, low_row, dim) : 1.f);
    const f32 high_scale(has_high ? row_scale(codec, high_row, dim) : 1.f);
    bf16* at = to + key * kPanel;
    for (index_t d = 0; d < dim; d += kPanel, at += panel_stride) {
      const index_t width = std::min(kPanel, dim - d);
      i32 low(0), high(0);
      if (has_low) {
        prefetch_next<Codec>(low_row, d, values.ahead);
        low = load_rounded(codec, low_row, d, width, dim, low_scale);
      }
      if (has_high) {
        prefetch_next<Codec>(high_row, d, values.ahead);
        high = load_rounded(codec, high_row, d, width, dim, high_scale);
      }
      sizes = larger_sizes(larger_sizes(sizes, low), high);
      i32 left, right;
      interleave(low, high, left, right);
      if (has_low) {
        store_pairs(at, left);
        store_pairs(at + kPairNumbers, right);
      } else {
        store_high_halves(at, left);
        store_high_halves(at + kPairNumbers, right);
      }
    }
  }
  return finite_sizes(sizes);
}

// As pack_queries, without a scale, in pairs (number d, number d + 1).
FOVEA_INLINE void pack_queries_bf16(const float* const* rows, index_t count, index_t element_stride, index_t dim,
                                    bf16* to) {   // [dim pair, kTileRows, 2]
  for (index_t d = 0; d < dim; d += kPairNumbers) {
    f32 cells[kLanes];
    for (index_t r = 0; r < kLanes; ++r) {
      if (r >= count) {
        cells[r] = f32(0.f);
        continue;
      }
      const float* const from = rows[r] + d * element_stride;
      const f32 low = load_strided(from, element_stride, dim - d);
      const f32 high =
          dim - d > kLanes ? load_strided(from + kLanes * element_stride, element_stride, dim - d - kLanes) : f32(0.f);
      cells[r] = as_floats(round_to_pairs(low, high));
    }
    transpose(cells);
    const index_t pairs = (std::min(kPairNumbers, dim - d) + 1) / 2;
    for (index_t c = 0; c < pairs; ++c) store_some_pairs(to + (d + 2 * c) * kTileRows, as_pairs(cells[c]), kTileRows);
  }
}

// Weights of one row -> bf16 pairs, in place: they fill the first half of the row, and a write never passes what is still
// to be read. Columns outside [begin, end) of the vectors touched become zeros. A copy beside the scores took 1 % longer
// for the whole product (12 rows, 256 keys, 128 dims): it needs 6 KiB more of L1.
FOVEA_INLINE void round_weights(float* row, index_t begin, index_t end) {   // [kMaxKeyTile]
  for (index_t j = begin / kPairNumbers * kPairNumbers; j < end; j += kPairNumbers) {
    const i32 pairs = j >= begin && j + kPairNumbers <= end
                          ? round_to_pairs(load(row + j), load(row + j + kLanes))
                          : round_to_pairs(load_between(row + j, begin - j, end - j),
                                           load_between(row + j + kLanes, begin - j - kLanes, end - j - kLanes));
    store_pairs(row + j / 2, pairs);
  }
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
#endif
