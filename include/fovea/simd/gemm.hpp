// SPDX-License-Identifier: Apache-2.0
// The two micro-kernels of prefill, on packed operands. Contract (docs/kernels-howto.md): every element of the result is one
// chain of FMAs in the order of the summed index, whatever the tile around it, so edge tiles give the same bits as full
// ones.
#pragma once
#include "register_budget.hpp"
#include "simd.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// Row stride of the score tile. A constant, so that the broadcasts of gemm_nn address all rows from one pointer; 16 floats
// more than a key tile, so that rows do not share their cache sets.
inline constexpr index_t kMaxKeyTile = 256;
inline constexpr index_t kScoreStride = kMaxKeyTile + 16;

// The scores a normaliser gets start at a multiple of so many keys: four independent chains hide the latency of its maxima and
// sums, and a key always meets the same chain.
inline constexpr index_t kScoreRun = 4 * kLanes;

// One row of a tile: sum[n] += *a * column[n].
template <int Vectors>
FOVEA_INLINE void multiply_row(int row, const float* a, const f32 (&column)[Vectors], f32 (&sum)[Vectors]) {
  if (row % 2 == 0) {
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) sum[n] = fma_from_memory(a, column[n], sum[n]);
  } else {
    const f32 broadcast(*a);
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) sum[n] = fma(broadcast, column[n], sum[n]);
  }
}

// s[r, n] = sum_d a[d, r] b[d, n] for r < Rows, n < Vectors * kLanes. b is one packed panel.
template <int Rows, int Vectors>
FOVEA_NOINLINE void gemm_nt_tile(const float* a,              // [depth, kTileRows]
                                 const float* b,              // [depth, kPanel]
                                 index_t depth, float* s) {   // [Rows, kScoreStride]
  f32 sum[Rows][Vectors];
  FOVEA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) sum[r][n] = f32(0.f);
  }
  for (index_t d = 0; d < depth; ++d, a += kTileRows, b += kPanel) {
    f32 column[Vectors];
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) column[n] = load(b + n * kLanes);
    FOVEA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      multiply_row<Vectors>(r, a + r, column, sum[r]);
    }
  }
  FOVEA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) store(s + r * kScoreStride + n * kLanes, sum[r][n]);
  }
}

// acc[r, n] = acc[r, n] * rescale[r] + sum_j p[r, j] v[j, n] for r < Rows, n < Vectors * kLanes.
template <int Rows, int Vectors>
FOVEA_NOINLINE void gemm_nn_tile(const float* p,                       // [Rows, kScoreStride]
                                 const float* v,                       // [keys, kPanel]
                                 index_t keys, const float* rescale,   // [Rows]
                                 float* acc, index_t acc_stride) {     // [Rows, acc_stride]
  f32 sum[Rows][Vectors];
  FOVEA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) sum[r][n] = load(acc + r * acc_stride + n * kLanes) * f32(rescale[r]);
  }
  for (index_t j = 0; j < keys; ++j, ++p, v += kPanel) {
    f32 column[Vectors];
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) column[n] = load(v + n * kLanes);
    FOVEA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      multiply_row<Vectors>(r, p + r * kScoreStride, column, sum[r]);
    }
  }
  FOVEA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) store(acc + r * acc_stride + n * kLanes, sum[r][n]);
  }
}

// Row counts are rounded up to one of these kernels; the operands are padded with zeros to kTileRows, so a spare row costs
// time, never a read beyond its buffer.
template <int Vectors>
FOVEA_INLINE void gemm_nt(index_t rows, const float* a, const float* b, index_t depth, float* s) {
  FOVEA_ASSERT(rows >= 1 && rows <= kTileRows);
  if constexpr (kTileRows > 6) {
    if (rows > 10) return gemm_nt_tile<kTileRows, Vectors>(a, b, depth, s);
    if (rows > 8) return gemm_nt_tile<10, Vectors>(a, b, depth, s);
    if (rows > 6) return gemm_nt_tile<8, Vectors>(a, b, depth, s);
  }
  if (rows > 4) return gemm_nt_tile<6, Vectors>(a, b, depth, s);
  if (rows > 2) return gemm_nt_tile<4, Vectors>(a, b, depth, s);
  return gemm_nt_tile<2, Vectors>(a, b, depth, s);
}

template <int Vectors>
FOVEA_INLINE void gemm_nn(index_t rows, const float* p, const float* v, index_t keys, const float* rescale, float* acc,
                          index_t acc_stride) {
  FOVEA_ASSERT(rows >= 1 && rows <= kTileRows);
  if constexpr (kTileRows > 6) {
    if (rows > 10) return gemm_nn_tile<kTileRows, Vectors>(p, v, keys, rescale, acc, acc_stride);
    if (rows > 8) return gemm_nn_tile<10, Vectors>(p, v, keys, rescale, acc, acc_stride);
    if (rows > 6) return gemm_nn_tile<8, Vectors>(p, v, keys, rescale, acc, acc_stride);
  }
  if (rows > 4) return gemm_nn_tile<6, Vectors>(p, v, keys, rescale, acc, acc_stride);
  if (rows > 2) return gemm_nn_tile<4, Vectors>(p, v, keys, rescale, acc, acc_stride);
  return gemm_nn_tile<2, Vectors>(p, v, keys, rescale, acc, acc_stride);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
