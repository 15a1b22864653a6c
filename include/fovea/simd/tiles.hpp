// SPDX-License-Identifier: Apache-2.0
// Products of bf16 in tile registers, where the instruction set has them, or in vectors of pairs, and the two layouts of their
// operands: the left one as rows, the right one as pairs of rows, (k, k + 1) of every column side by side. Sums are fp32.
#pragma once
#include "gemm_bf16.hpp"

// clang 14 writes __AMXBF16__ where others write __AMX_BF16__.
#if (defined(__AMX_BF16__) || defined(__AMXBF16__)) && defined(__AVX512BF16__) && defined(__linux__) && defined(__x86_64__)
#define FOVEA_HAS_TILES 1
#include "arch/amx.hpp"
#else
#define FOVEA_HAS_TILES 0
#if defined(__AVX512BF16__)
#include "arch/bf16_blocks.hpp"
#endif
#endif
// tile_product() is there, in tile registers or without.
#if defined(__AVX512BF16__)
#define FOVEA_HAS_TILE_PRODUCTS 1
#else
#define FOVEA_HAS_TILE_PRODUCTS 0
#endif

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

inline constexpr bool kHasTiles = FOVEA_HAS_TILES != 0, kHasTileProducts = FOVEA_HAS_TILE_PRODUCTS != 0;
// A product takes rows, columns and depth in steps of so many; its columns are a panel of the fp32 kernels.
inline constexpr index_t kTileStep = 32;

#if FOVEA_HAS_TILE_PRODUCTS
static_assert(kPanel == kTileStep);

// Numbers of rows [row, d] as pairs [d / 2, row, 2], the right operand of products over d, and as columns [d, row], the left
// one of products over rows. Both counts are multiples of kTileStep.
template <bool Pairs, bool Columns>
void turn_rows(const bf16* rows, index_t stride, index_t count, index_t dim, [[maybe_unused]] bf16* pairs,
               [[maybe_unused]] bf16* columns, index_t to_stride) {
  for (index_t row = 0; row < count; row += kTileStep) {
    for (index_t d = 0; d < dim; d += kTileStep) {
      f32 low[kLanes], high[kLanes];
      FOVEA_UNROLL
      for (index_t r = 0; r < kLanes; ++r) low[r] = as_floats(load_pairs(rows + (row + r) * stride + d));
      transpose(low);
      FOVEA_UNROLL
      for (index_t r = 0; r < kLanes; ++r) high[r] = as_floats(load_pairs(rows + (row + kLanes + r) * stride + d));
      transpose(high);
      FOVEA_UNROLL
      for (index_t c = 0; c < kLanes; ++c) {
        if constexpr (Pairs) {
          bf16* const to = pairs + (d / 2 + c) * 2 * to_stride + 2 * row;
          store_pairs(to, as_pairs(low[c]));
          store_pairs(to + kTileStep, as_pairs(high[c]));
        }
        if constexpr (Columns) {
          i32 first, second;
          split_pairs(as_pairs(low[c]), as_pairs(high[c]), first, second);
          store_pairs(columns + (d + 2 * c) * to_stride + row, first);
          store_pairs(columns + (d + 2 * c + 1) * to_stride + row, second);
        }
      }
    }
  }
}

// Rows [row, kPanel] rounded to pairs [row / 2, kPanel, 2], row i times by[i] where given.
FOVEA_INLINE void round_panel(const float* rows, index_t count, const float* by, bf16* to) {
  for (index_t row = 0; row < count; row += 2, rows += 2 * kPanel, to += 2 * kPanel) {
    f32 numbers[4];
    FOVEA_UNROLL
    for (int n = 0; n < 4; ++n) numbers[n] = load(rows + n * kLanes);
    if (by != nullptr) {
      FOVEA_UNROLL
      for (int n = 0; n < 4; ++n) numbers[n] = numbers[n] * f32(by[row + n / 2]);
    }
    i32 low, high;
    interleave(round_to_pairs(numbers[0], numbers[1]), round_to_pairs(numbers[2], numbers[3]), low, high);
    store_pairs(to, low);
    store_pairs(to + kTileStep, high);
  }
}
#endif

#if !FOVEA_HAS_TILES
inline bool tiles_allowed() { return false; }
#endif
// Code for tile registers needs them; other code with the dot product of bf16 pairs does not ask.
inline bool tile_products_allowed() { return kHasTiles ? tiles_allowed() : kHasTileProducts; }

// Rows of a group that packed kernels work on at a time.
inline index_t packed_rows(Panels panels) { return panels == Panels::bf16 && tiles_allowed() ? kTileStep : kTileRows; }

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
