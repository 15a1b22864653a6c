// SPDX-License-Identifier: Apache-2.0
// The micro-kernels of the chunk engine: sums of products A'B of operands that both lie depth-major, and the same with a
// unit lower-triangular solve in the registers. Every element is one chain of FMAs in the order of the terms and of the
// summed index, whatever the tile around it.
#pragma once
#include "gemm.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// sum_d a[d, r] b[d, n].
struct ProductTerm {
  const float* a;     // [depth, a_stride]
  index_t a_stride;
  const float* b;     // [depth, b_stride]
  index_t b_stride;
  index_t depth;
};

// What is added to the products: base[r, n] * factor, times by_row[r] where given; null = 0. Where scale_by_row is given,
// the sum of the first `scaled` terms is multiplied by it: a factor per row is free here, and a pass over an operand elsewhere.
struct ProductBase {
  const float* base = nullptr;   // [row, stride]
  index_t stride = 0;
  float factor = 1.f;
  const float* by_row = nullptr;
  const float* scale_by_row = nullptr;
  int scaled = 1;
};

template <int Rows, int Vectors>
FOVEA_INLINE void accumulate_products(const ProductTerm* terms, int count, f32 (&sum)[Rows][Vectors]) {
  for (int t = 0; t < count; ++t) {
    const float *a = terms[t].a, *b = terms[t].b;
    const index_t a_stride = terms[t].a_stride, b_stride = terms[t].b_stride;
    for (index_t d = terms[t].depth; d > 0; --d, a += a_stride, b += b_stride) {
      f32 column[Vectors];
      FOVEA_UNROLL
      for (int n = 0; n < Vectors; ++n) column[n] = load(b + n * kLanes);
      FOVEA_UNROLL
      for (int r = 0; r < Rows; ++r) multiply_row<Vectors>(r, a + r, column, sum[r]);
    }
  }
}

template <int Rows, int Vectors>
FOVEA_INLINE void start_products(const ProductBase& from, f32 (&sum)[Rows][Vectors]) {
  FOVEA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    if (from.base == nullptr) {
      FOVEA_UNROLL
      for (int n = 0; n < Vectors; ++n) sum[r][n] = f32(0.f);
      continue;
    }
    const f32 factor(from.by_row == nullptr ? from.factor : from.by_row[r] * from.factor);
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) sum[r][n] = load(from.base + r * from.stride + n * kLanes) * factor;
  }
}

// base, then all terms; or the scaled terms, then base, then the others.
template <int Rows, int Vectors>
FOVEA_INLINE void sum_products(const ProductTerm* terms, int count, const ProductBase& from, f32 (&sum)[Rows][Vectors]) {
  if (from.scale_by_row == nullptr) {
    start_products<Rows, Vectors>(from, sum);
  } else {
    start_products<Rows, Vectors>({}, sum);
    accumulate_products<Rows, Vectors>(terms, from.scaled, sum);
    FOVEA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const f32 scale(from.scale_by_row[r]);
      const f32 factor(from.by_row == nullptr ? from.factor : from.by_row[r] * from.factor);
      FOVEA_UNROLL
      for (int n = 0; n < Vectors; ++n) {
        sum[r][n] = from.base == nullptr ? sum[r][n] * scale
                                         : fma(sum[r][n], scale, load(from.base + r * from.stride + n * kLanes) * factor);
      }
    }
    terms += from.scaled;
    count -= from.scaled;
  }
  accumulate_products<Rows, Vectors>(terms, count, sum);
}

template <int Rows, int Vectors>
FOVEA_NOINLINE void product_tile(const ProductTerm* terms, int count, const ProductBase& from, float* to, index_t stride) {
  f32 sum[Rows][Vectors];
  sum_products<Rows, Vectors>(terms, count, from, sum);
  FOVEA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) store(to + r * stride + n * kLanes, sum[r][n]);
  }
}

// to[r] = factor_r (base_r + terms + sum_{i < r} lower[i, r] to[i]): forward substitution for one block of rows. factor is a
// number per row (factor_stride 0) or a row of numbers.
template <int Rows, int Vectors>
FOVEA_NOINLINE void solve_tile(const ProductTerm* terms, int count, const ProductBase& from, const float* lower,
                               index_t lower_stride, const float* factor, index_t factor_stride, float* to, index_t stride) {
  f32 sum[Rows][Vectors];
  sum_products<Rows, Vectors>(terms, count, from, sum);
  FOVEA_UNROLL
  for (int i = 0; i < Rows; ++i) {
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) {
      sum[i][n] = sum[i][n] * (factor_stride == 0 ? f32(factor[i]) : load(factor + i * factor_stride + n * kLanes));
      store(to + i * stride + n * kLanes, sum[i][n]);
    }
    FOVEA_UNROLL
    for (int r = i + 1; r < Rows; ++r) multiply_row<Vectors>(r, lower + i * lower_stride + r, sum[i], sum[r]);
  }
}

// How many of `left` rows, a multiple of 4, the next tile takes: f(Rows) is called with it as a constant.
template <class F>
FOVEA_INLINE index_t with_tile_rows(index_t left, const F& f) {
  if constexpr (kTileRows > 6) {
    if (left == 12 || left >= 20) return f(std::integral_constant<int, 12>{}), 12;
    if (left >= 8) return f(std::integral_constant<int, 8>{}), 8;
    return f(std::integral_constant<int, 4>{}), 4;
  } else {
    if (left == 6 || left >= 10) return f(std::integral_constant<int, 6>{}), 6;
    if (left >= 4) return f(std::integral_constant<int, 4>{}), 4;
    return f(std::integral_constant<int, 2>{}), 2;
  }
}

// to[d, row] = rows[row, d] for whole vectors in both directions.
FOVEA_INLINE void transpose_rows(const float* rows, index_t stride, index_t count, index_t dim, float* to, index_t to_stride) {
  for (index_t row = 0; row < count; row += kLanes) {
    for (index_t d = 0; d < dim; d += kLanes) {
      f32 cells[kLanes];
      FOVEA_UNROLL
      for (index_t r = 0; r < kLanes; ++r) cells[r] = load(rows + (row + r) * stride + d);
      transpose(cells);
      FOVEA_UNROLL
      for (index_t c = 0; c < kLanes; ++c) store(to + (d + c) * to_stride + row, cells[c]);
    }
  }
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
