// SPDX-License-Identifier: Apache-2.0
// Stored rows -> the order the prefill kernels read. A Codec turns stored numbers into a vector (engine/policies.hpp); where
// a row has one scale, every number is multiplied here, once per tile and not once per query.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../core/shapes.hpp"
#include "register_budget.hpp"
#include "simd.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// Numbers d .. d + width - 1 of a row, zeros behind them.
template <class Codec>
FOVEA_INLINE f32 load_part(const Codec& codec, const std::byte* row, index_t d, index_t width, index_t dim) {
  return width >= kLanes ? codec.load(row, d, dim) : codec.load_some(row, d, width, dim);
}

// to[d * kPanel + column] = row `column` of the segment, for the columns [first, first + count) of a key tile; panels of
// kPanel columns follow each other every dim * kPanel floats. Columns that are not written keep what they hold.
template <class Codec>
void pack_keys(const Codec& codec, const Segment& keys, index_t dim, index_t first, float* to) {   // [panel, dim, kPanel]
  const index_t last = first + keys.count;
  // The rows of the next block, too short for the hardware to foresee; where the segment ends before, of the next segment.
  const index_t block_bytes = kLanes * keys.stride;
  const index_t ahead = keys.ahead >= 0 && keys.ahead < block_bytes ? block_bytes : keys.ahead;
  index_t column = first;
  while (column < last) {
    const index_t lane = column % kLanes;
    const index_t here = std::min(kLanes - lane, last - column);
    const std::byte* const block = keys.data + (column - first) * keys.stride;
    float* const panel = to + column / kPanel * dim * kPanel + column % kPanel;
    [[maybe_unused]] float row_scale[kLanes];
    if constexpr (Codec::kRowScaled) {
      for (index_t r = 0; r < kLanes; ++r) row_scale[r] = codec.scale(block + std::min(r, here - 1) * keys.stride, dim);
    }
    for (index_t d = 0; d < dim; d += kLanes) {
      const index_t width = std::min(kLanes, dim - d);
      f32 cells[kLanes];
      FOVEA_UNROLL
      for (index_t r = 0; r < kLanes; ++r) {
        const std::byte* const row = block + std::min(r, here - 1) * keys.stride;
        prefetch(row + Codec::offset(d), ahead);
        cells[r] = load_part(codec, row, d, width, dim);
        if constexpr (Codec::kRowScaled) cells[r] = cells[r] * f32(row_scale[r]);
      }
      transpose(cells);
      if (here == kLanes) {
        FOVEA_UNROLL
        for (index_t c = 0; c < kLanes; ++c) {
          if (c < width) store(panel + (d + c) * kPanel, cells[c]);
        }
      } else {
        FOVEA_UNROLL
        for (index_t c = 0; c < kLanes; ++c) {
          if (c < width) store_some(panel + (d + c) * kPanel, cells[c], here);
        }
      }
    }
    column += here;
  }
}

// Zeros in the columns [first, last) of a key tile: what lies there from earlier tiles may be denormal, and slow.
FOVEA_INLINE void clear_columns(float* to, index_t dim, index_t first, index_t last) {
  for (index_t column = first; column < last;) {
    const index_t here = std::min(kPanel - column % kPanel, last - column);
    float* const panel = to + column / kPanel * dim * kPanel + column % kPanel;
    for (index_t d = 0; d < dim; ++d) std::fill_n(panel + d * kPanel, here, 0.f);
    column += here;
  }
}

// to[panel][j][n] = value panel * kPanel + n of row j, zero beyond dim; panels follow each other every panel_stride floats.
// Returns whether every value is finite: a weight of 0 times NaN or Inf would be NaN, so the engine must know.
template <class Codec>
bool pack_values(const Codec& codec, const Segment& values, index_t dim, float* to, index_t panel_stride) {
  f32 taint(0.f);
  const index_t whole = dim / kPanel * kPanel;
  const std::byte* row = values.data;
  // Row by row, so that storage is read in order: it comes from L3 or DRAM, the panels stay in L2.
  for (index_t j = 0; j < values.count; ++j, row += values.stride, to += kPanel) {
    [[maybe_unused]] const f32 row_scale(codec.scale(row, dim));
    const auto keep = [&](float* at, f32 v) {
      if constexpr (Codec::kRowScaled) v = v * row_scale;
      taint = fma(v, f32(0.f), taint);
      store(at, v);
    };
    float* at = to;
    for (index_t d = 0; d < whole; d += kPanel, at += panel_stride) {
      FOVEA_UNROLL
      for (index_t n = 0; n < kPanelVectors; ++n) keep(at + n * kLanes, codec.load(row, d + n * kLanes, dim));
    }
    if (whole == dim) continue;
    FOVEA_UNROLL
    for (index_t n = 0; n < kPanelVectors; ++n) {
      const index_t d = whole + n * kLanes, width = std::min(kLanes, dim - d);
      keep(at + n * kLanes, width > 0 ? codec.load_some(row, d, width, dim) : f32(0.f));
    }
  }
  return reduce_add(taint) == 0.f;
}

// Whether no weight of 0 makes a NaN out of a row: its numbers and its scale are finite. Their product need not be.
template <class Codec>
bool all_finite(const Codec& codec, const Segment& values, index_t dim) {
  f32 taint(0.f);
  const std::byte* row = values.data;
  for (index_t j = 0; j < values.count; ++j, row += values.stride) {
    if constexpr (Codec::kRowScaled) taint = fma(f32(codec.scale(row, dim)), f32(0.f), taint);
    for (index_t d = 0; d < dim; d += kLanes) taint = fma(load_part(codec, row, d, dim - d, dim), f32(0.f), taint);
  }
  return reduce_add(taint) == 0.f;
}

// Query rows -> [dim, kTileRows] times scale; rows beyond `count` are zero. Any element stride (in floats).
FOVEA_INLINE void pack_queries(const float* const* rows, index_t count, index_t element_stride, index_t dim, float scale,
                               float* to) {
  if (element_stride == 1) {
    for (index_t first = 0; first < kTileRows; first += kLanes) {
      for (index_t d = 0; d < dim; d += kLanes) {
        const index_t width = std::min(kLanes, dim - d);
        f32 cells[kLanes];
        for (index_t r = 0; r < kLanes; ++r) {
          const bool live = first + r < count;
          cells[r] =
              !live ? f32(0.f)
                    : (width == kLanes ? load(rows[first + r] + d) : load_some(rows[first + r] + d, width)) * f32(scale);
        }
        transpose(cells);
        const index_t lanes = std::min(kLanes, kTileRows - first);
        for (index_t c = 0; c < width; ++c) store_some(to + (d + c) * kTileRows + first, cells[c], lanes);
      }
    }
    return;
  }
  for (index_t d = 0; d < dim; ++d) {
    for (index_t r = 0; r < kTileRows; ++r) to[d * kTileRows + r] = r < count ? rows[r][d * element_stride] * scale : 0.f;
  }
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
