// SPDX-License-Identifier: Apache-2.0
// The products of Bf16Panels in tile registers, where the process has them. Keys and values lie as for the dot products of
// gemm_bf16.hpp, with dims padded by zeros to whole tiles; queries lie row by row, 32 to a group: a tile of keys or values comes
// from the L2, which takes longer than one product with it.
//
// Every element of a product is a sum over whole blocks of 32 in their order; within a block the even and the odd numbers are
// chains of their own. Keys count from the start of the key tile, so a key always meets the same block, and one without weight
// changes no bit.
#pragma once
#include "denormals.hpp"
#include "pack_bf16.hpp"
#include "tiles.hpp"

#if defined(__AVX512BF16__)

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

#if FOVEA_HAS_TILES
static_assert(kPanel == kTileStep);

constexpr index_t whole_tiles(index_t count) { return (count + kTileStep - 1) / kTileStep * kTileStep; }

// c[r, n] = sum_k a[r, k] b[k, n] for the rows of a group and one panel b [k / 2, kPanel, 2]; touches 16 or 32 rows of a and c.
inline void tile_group_product(index_t rows, const bf16* a, index_t a_stride, const bf16* b, index_t depth, float* c,
                               index_t c_stride) {
  if (rows > kTileStep / 2) {
    tile_product<2, false>(a, a_stride, b, 2 * kPanel, depth, c, c_stride);
  } else {
    tile_product<1, false>(a, a_stride, b, 2 * kPanel, depth, c, c_stride);
  }
}

// depth is a multiple of 32. queries [kTileStep, depth], keys [panel, depth / 2, kPanel, 2], s [kTileStep, kScoreStride].
inline void tile_scores(index_t rows, index_t begin, index_t end, const bf16* queries, const bf16* keys, index_t depth,
                        float scale, float* s) {
  for (index_t column = begin / kPanel * kPanel; column < end; column += kPanel) {
    tile_group_product(rows, queries, depth, keys + column * depth, depth, s + column, kScoreStride);
  }
  const f32 by(scale);
  for (index_t r = 0; r < rows; ++r, s += kScoreStride) {
    for (index_t column = begin / kLanes * kLanes; column < end; column += kLanes) store(s + column, load(s + column) * by);
  }
}

// acc = rescale * acc + weights * values over the keys [begin, end). weights [kTileStep, kScoreStride, 2], zeros in the rest of
// the blocks of 32 that begin and end lie in, where values are finite.
inline void tile_weigh(index_t rows, index_t begin, index_t end, const bf16* weights, const bf16* values,
                       index_t panel_stride, index_t dim, const float* rescale, float* acc, index_t acc_stride) {
  alignas(64) float sums[kTileStep * kPanel];
  const index_t first = begin / kTileStep * kTileStep, depth = whole_tiles(end - first);
  values += first * kPanel;
  for (index_t d = 0; d < dim; d += kPanel, values += panel_stride) {
    tile_group_product(rows, weights + first, 2 * kScoreStride, values, depth, sums, kPanel);
    const index_t width = std::min(kPanel, dim - d);
    for (index_t r = 0; r < rows; ++r) {
      const f32 keep(rescale[r]);
      float* const to = acc + r * acc_stride + d;
      for (index_t n = 0; n < width; n += kLanes)   // + 0: a sum is never -0, which a block of zeros would turn into +0
        store(to + n, fma(load(to + n), keep, load(sums + r * kPanel + n)) + f32(0.f));
    }
  }
}

// What a tile product of one row comes to, for a panel of values: vectors do the same operations where denormals are flushed. Not
// inlined, so that none of them moves out of there.
FOVEA_NOINLINE inline void row_sums(index_t begin, index_t end, const bf16* weights, const std::uint32_t* keep,
                                    const bf16* values,
                                    float* sums) {   // [kPanel]
  const i32 high_half(-65536);
  for (index_t n = 0; n < kPanel; n += kLanes, values += 2 * kLanes) {
    f32 sum(0.f);
    for (index_t block = begin / kTileStep * kTileStep; block < end; block += kTileStep) {
      f32 even(0.f), odd(0.f);
      for (index_t j = block; j < std::min(block + kTileStep, end); j += 2) {
        const i32 pair = both(load_pairs(values + j * kPanel), broadcast_pair(keep + j / 2)),
                  weight = broadcast_pair(weights + j);
        even = fma(as_floats(weight << 16), as_floats(pair << 16), even);
        odd = fma(as_floats(both(weight, high_half)), as_floats(both(pair, high_half)), odd);
      }
      sum = sum + (even + odd);
    }
    store(sums + n, sum);
  }
}

// One row of the same with the bits of values that keep[key / 2] does not have as zeros: those may be anything. weights
// [kMaxKeyTile].
inline void tile_weigh_row(index_t begin, index_t end, const bf16* weights, const std::uint32_t* keep, const bf16* values,
                           index_t panel_stride, index_t dim, float rescale, float* acc) {
  for (index_t d = 0; d < dim; d += kPanel, values += panel_stride) {
    alignas(64) float sums[kPanel];
    {
      const FlushDenormals flush;
      row_sums(begin, end, weights, keep, values, sums);
    }
    const index_t width = std::min(kPanel, dim - d);
    for (index_t n = 0; n < width; n += kLanes)
      store(acc + d + n, fma(load(acc + d + n), f32(rescale), load(sums + n)) + f32(0.f));
  }
}

// Rows of a group as they lie, rounded; zeros for rows and numbers that are not there.
inline void pack_query_rows(const float* const* rows, index_t count, index_t element_stride, index_t dim,
                            bf16* to) {   // [kTileStep, padded dim]
  for (index_t r = 0; r < kTileStep; ++r, to += whole_tiles(dim)) {
    for (index_t d = 0; d < dim; d += kPairNumbers) {
      i32 pairs(0);
      if (r < count) {
        const float* const from = rows[r] + d * element_stride;
        pairs = round_to_pairs(
            load_strided(from, element_stride, dim - d),
            dim - d > kLanes ? load_strided(from + kLanes * element_stride, element_stride, dim - d - kLanes) : f32(0.f));
      }
      store_pairs(to + d, pairs);
    }
  }
}
#endif

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
#endif
