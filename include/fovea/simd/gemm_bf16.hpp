// SPDX-License-Identifier: Apache-2.0
// The twins of gemm.hpp on pairs of bf16, where the instruction set has their dot product; sums are fp32. Same contract:
// every element is one chain, here of dot_pairs, in the order of the summed index, whatever the tile around it. The spare
// number of an odd count is zero on both sides and changes no bit.
//
// What is gained is the CPU's. Sapphire Rapids starts a dot product of 16 pairs every second cycle (latency 8) and two FMAs
// of 16 numbers every cycle: 80 against 160 GFLOP/s a core, half the flops of fp32. Zen 4 does twice the flops of fp32. The
// 12 x 2 tile runs at 97 to 99 % of the dot product's peak on Sapphire Rapids, 4 rows at 94 to 97 %, 2 rows at 90 to 92 %.
#pragma once
#include "gemm.hpp"

#if defined(__AVX512BF16__)
#include "arch/avx512_bf16.hpp"
#endif

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

#if defined(__AVX512BF16__)
inline constexpr bool kHasBf16Dot = true;
#else
inline constexpr bool kHasBf16Dot = false;
#endif

#if defined(__AVX512BF16__)

// s[r, n] = scale * sum_d a[d, r] b[d, n] for r < Rows, n < Vectors * kLanes. The scale is not in a: queries stored in bf16
// are exact, scale * q rounded to bf16 is not.
template <int Rows, int Vectors>
FOVEA_NOINLINE void gemm_nt_bf16_tile(const bf16* a,                            // [depth pair, kTileRows, 2]
                                      const bf16* b,                            // [depth pair, kPanel, 2]
                                      index_t pairs, float scale, float* s) {   // [Rows, kScoreStride]
  f32 sum[Rows][Vectors];
  FOVEA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) sum[r][n] = f32(0.f);
  }
  for (index_t d = 0; d < pairs; ++d, a += 2 * kTileRows, b += 2 * kPanel) {
    i32 column[Vectors];
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) column[n] = load_pairs(b + 2 * n * kLanes);
    FOVEA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const i32 query = broadcast_pair(a + 2 * r);
      FOVEA_UNROLL
      for (int n = 0; n < Vectors; ++n) sum[r][n] = dot_pairs(query, column[n], sum[r][n]);
    }
  }
  FOVEA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) store(s + r * kScoreStride + n * kLanes, sum[r][n] * f32(scale));
  }
}

// acc[r, n] = acc[r, n] * rescale[r] + sum_j p[r, j] v[j, n] for r < Rows, n < Vectors * kLanes. With Masked, the bits of v
// that keep[j / 2] does not have are zeros: values that must not be looked at, NaN included. What leaves is never -0 (a
// flushed sum may be, and pairs of zeros would turn it into +0 in one tile and not in another).
template <int Rows, int Vectors, bool Masked>
FOVEA_NOINLINE void gemm_nn_bf16_tile(const bf16* p,                                // [Rows, kScoreStride, 2]
                                      const bf16* v,                                // [key pair, kPanel, 2]
                                      [[maybe_unused]] const std::uint32_t* keep,   // [key pair]
                                      index_t pairs, const float* rescale,          // [Rows]
                                      float* acc, index_t acc_stride) {             // [Rows, acc_stride]
  f32 sum[Rows][Vectors];
  FOVEA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) sum[r][n] = load(acc + r * acc_stride + n * kLanes) * f32(rescale[r]);
  }
  for (index_t j = 0; j < pairs; ++j, p += 2, v += 2 * kPanel) {
    i32 column[Vectors];
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) {
      column[n] = load_pairs(v + 2 * n * kLanes);
      if constexpr (Masked) column[n] = both(column[n], broadcast_pair(keep + j));
    }
    FOVEA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const i32 weight = broadcast_pair(p + 2 * r * kScoreStride);
      FOVEA_UNROLL
      for (int n = 0; n < Vectors; ++n) sum[r][n] = dot_pairs(weight, column[n], sum[r][n]);
    }
  }
  FOVEA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) store(acc + r * acc_stride + n * kLanes, sum[r][n] + f32(0.f));
  }
}

// As in gemm.hpp, row counts are rounded up to one of these kernels.
template <int Vectors>
FOVEA_INLINE void gemm_nt_bf16(index_t rows, const bf16* a, const bf16* b, index_t pairs, float scale, float* s) {
  FOVEA_ASSERT(rows >= 1 && rows <= kTileRows);
  if (rows > 10) return gemm_nt_bf16_tile<kTileRows, Vectors>(a, b, pairs, scale, s);
  if (rows > 8) return gemm_nt_bf16_tile<10, Vectors>(a, b, pairs, scale, s);
  if (rows > 6) return gemm_nt_bf16_tile<8, Vectors>(a, b, pairs, scale, s);
  if (rows > 4) return gemm_nt_bf16_tile<6, Vectors>(a, b, pairs, scale, s);
  if (rows > 2) return gemm_nt_bf16_tile<4, Vectors>(a, b, pairs, scale, s);
  return gemm_nt_bf16_tile<2, Vectors>(a, b, pairs, scale, s);
}

template <int Vectors>
FOVEA_INLINE void gemm_nn_bf16(index_t rows, const bf16* p, const bf16* v, index_t pairs, const float* rescale, float* acc,
                               index_t acc_stride) {
  FOVEA_ASSERT(rows >= 1 && rows <= kTileRows);
  if (rows > 10) return gemm_nn_bf16_tile<kTileRows, Vectors, false>(p, v, nullptr, pairs, rescale, acc, acc_stride);
  if (rows > 8) return gemm_nn_bf16_tile<10, Vectors, false>(p, v, nullptr, pairs, rescale, acc, acc_stride);
  if (rows > 6) return gemm_nn_bf16_tile<8, Vectors, false>(p, v, nullptr, pairs, rescale, acc, acc_stride);
  if (rows > 4) return gemm_nn_bf16_tile<6, Vectors, false>(p, v, nullptr, pairs, rescale, acc, acc_stride);
  if (rows > 2) return gemm_nn_bf16_tile<4, Vectors, false>(p, v, nullptr, pairs, rescale, acc, acc_stride);
  return gemm_nn_bf16_tile<2, Vectors, false>(p, v, nullptr, pairs, rescale, acc, acc_stride);
}

#endif

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
