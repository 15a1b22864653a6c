// SPDX-License-Identifier: Apache-2.0
// The tables of a chunk whose factors are scalars: scores, factors between tokens, the triangle. All are [j, i], j the token
// that writes and i the one that reads, in rows of `stride`; `rows` is the number of tokens, padded to whole vectors.
#pragma once
#include "../simd/product.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// to[j, i] = sum_d left[d, j] right[d, i] for the vectors of i that reach the diagonal.
inline void chunk_scores(const float* left, const float* right, index_t depth, index_t rows, index_t stride, float* to) {
  for (index_t j = 0; j < rows;) {
    const index_t first = j;
    for (index_t i = first / kLanes * kLanes; i < rows; i += kPanel) {
      const ProductTerm term{left + first, stride, right + i, stride, depth};
      index_t tile = 0;
      if (rows - i >= kPanel) {
        tile = with_tile_rows(rows - first, [&](auto count) {
          product_tile<count.value, kPanelVectors>(&term, 1, {}, to + first * stride + i, stride);
        });
      } else {
        tile = with_tile_rows(
            rows - first, [&](auto count) { product_tile<count.value, 1>(&term, 1, {}, to + first * stride + i, stride); });
      }
      j = first + tile;
    }
  }
}

// to[j, i] = scale from[j, i] (times factors[j, i] where given) for i > j, or i >= j; 0 elsewhere.
template <bool WithDiagonal>
void keep_triangle(const float* from, const float* factors, float scale, index_t rows, index_t stride, float* to) {
  const i32 numbers = lane_numbers();
  const f32 by(scale);
  for (index_t j = 0; j < rows; ++j) {
    const i32 bound(static_cast<std::int32_t>(WithDiagonal ? j - 1 : j));
    for (index_t i = 0; i < rows; i += kLanes) {
      if (i + kLanes <= j) {
        store(to + j * stride + i, f32(0.f));
        continue;
      }
      f32 x = load(from + j * stride + i) * by;
      if (factors != nullptr) x = x * load(factors + j * stride + i);
      store(to + j * stride + i, select(as_keep(numbers + i32(static_cast<std::int32_t>(i)) > bound), x, f32(0.f)));
    }
  }
}

// to[j, i] = alpha_{j + 1} .. alpha_i, by rows i (each is the row before times alpha_i) and then turned. scratch: as large.
inline void decay_table(const float* alpha, index_t rows, index_t stride, float* scratch, float* to) {
  for (index_t i = 0; i < rows; ++i) {
    const f32 factor(alpha[i]);
    float* const row = scratch + i * stride;
    for (index_t j = 0; j <= i; j += kLanes) store(row + j, i == 0 ? f32(0.f) : load(row - stride + j) * factor);
    if (i % kLanes == 0) store(row + i, f32(0.f));
    row[i] = 1.f;
  }
  for (index_t i = 0; i < rows; i += kLanes) {
    for (index_t j = 0; j <= i; j += kLanes) {
      f32 cells[kLanes];
      FOVEA_UNROLL
      for (index_t r = 0; r < kLanes; ++r) cells[r] = load(scratch + (i + r) * stride + j);
      transpose(cells);
      FOVEA_UNROLL
      for (index_t c = 0; c < kLanes; ++c) store(to + (j + c) * stride + i, cells[c]);
    }
  }
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
