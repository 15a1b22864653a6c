// SPDX-License-Identifier: Apache-2.0
// The two kernels of decode: few query rows against stored K and V, read in place, once. Bound by memory, so they keep four
// keys in flight, prefetch 4 KiB ahead and never copy. Each result is made in one order whatever rows and keys stand beside
// it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "register_budget.hpp"
#include "simd.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

inline constexpr index_t kPrefetchBytes = 4096;

// How far ahead in bytes, in whole rows: the next rows may be far apart (token-major storage).
FOVEA_INLINE index_t prefetch_distance(index_t row_stride, index_t row_bytes) {
  if (row_stride == row_bytes) return kPrefetchBytes;
  return std::max<index_t>(kPrefetchBytes / std::max<index_t>(row_bytes, 1), 1) * row_stride;
}

// to[r * to_stride + 0 .. 3] = q[r] . the keys at key + offset[0 .. 3].
template <int Rows, class Codec>
FOVEA_INLINE void score_block(const Codec& codec, const float* q, index_t q_stride, const std::byte* key,
                              const index_t (&offset)[kStreamKeys], index_t ahead, index_t dim, float* to,
                              index_t to_stride) {
  f32 sum[Rows][kStreamKeys];
  FOVEA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    FOVEA_UNROLL
    for (int j = 0; j < kStreamKeys; ++j) sum[r][j] = f32(0.f);
  }
  const auto add = [&](index_t d, const auto& load_key) {
    f32 part[kStreamKeys];
    FOVEA_UNROLL
    for (int j = 0; j < kStreamKeys; ++j) part[j] = load_key(key + offset[j]);
    FOVEA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const f32 query = load(q + r * q_stride + d);
      FOVEA_UNROLL
      for (int j = 0; j < kStreamKeys; ++j) sum[r][j] = fma(query, part[j], sum[r][j]);
    }
  };
  index_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    add(d, [&](const std::byte* row) {
      prefetch(row + d * Codec::kBytes, ahead);
      return codec.load(row, d);
    });
  }
  if (d < dim) add(d, [&](const std::byte* row) { return codec.load_some(row, d, dim - d); });
  FOVEA_UNROLL
  for (int r = 0; r < Rows; ++r) reduce_add4(sum[r][0], sum[r][1], sum[r][2], sum[r][3], to + r * to_stride);
}

template <int Rows, class Codec>
FOVEA_NOINLINE void stream_scores_rows(const Codec& codec, const float* q, index_t q_stride, const std::byte* rows,
                                       index_t row_stride, index_t count, index_t dim, float* s) {
  const index_t ahead = prefetch_distance(row_stride, dim * Codec::kBytes);
  const index_t whole[kStreamKeys] = {0, row_stride, 2 * row_stride, 3 * row_stride};
  index_t j = 0;
  for (; j + kStreamKeys <= count; j += kStreamKeys, rows += kStreamKeys * row_stride)
    score_block<Rows>(codec, q, q_stride, rows, whole, ahead, dim, s + j, kScoreStride);
  if (j == count) return;
  // The last keys: the same kernel on repeated rows, so that their bits are those of whole blocks.
  index_t last[kStreamKeys];
  for (index_t i = 0; i < kStreamKeys; ++i) last[i] = std::min(i, count - j - 1) * row_stride;
  float block[Rows * kStreamKeys];
  score_block<Rows>(codec, q, q_stride, rows, last, ahead, dim, block, kStreamKeys);
  for (int r = 0; r < Rows; ++r) {
    for (index_t i = 0; i < count - j; ++i) s[r * kScoreStride + j + i] = block[r * kStreamKeys + i];
  }
}

// s[r, j] = q[r] . key j, for r < rows, j < count. q is padded with zeros to whole vectors.
template <class Codec>
void stream_scores(const Codec& codec, index_t rows, const float* q, index_t q_stride, const std::byte* keys,
                   index_t key_stride, index_t count, index_t dim, float* s) {   // [rows, kScoreStride]
  for (index_t r = 0; r < rows; r += kStreamRows, q += kStreamRows * q_stride, s += kStreamRows * kScoreStride) {
    switch (std::min(kStreamRows, rows - r)) {
      case 1:
        stream_scores_rows<1>(codec, q, q_stride, keys, key_stride, count, dim, s);
        break;
      case 2:
        stream_scores_rows<2>(codec, q, q_stride, keys, key_stride, count, dim, s);
        break;
      case 3:
        stream_scores_rows<3>(codec, q, q_stride, keys, key_stride, count, dim, s);
        break;
      default:
        stream_scores_rows<4>(codec, q, q_stride, keys, key_stride, count, dim, s);
    }
  }
}

template <int Rows, int Vectors, class Codec>
FOVEA_INLINE void weigh_columns(const Codec& codec, const float* p, const std::byte* rows, index_t row_stride, index_t ahead,
                                index_t count, index_t d, const float* rescale, float* acc, index_t acc_stride) {
  f32 sum[Rows][Vectors];
  FOVEA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) sum[r][n] = load(acc + r * acc_stride + d + n * kLanes) * f32(rescale[r]);
  }
  for (index_t j = 0; j < count; ++j, rows += row_stride) {
    f32 value[Vectors];
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) {
      value[n] = codec.load(rows, d + n * kLanes);
      prefetch(rows + (d + n * kLanes) * Codec::kBytes, ahead);
    }
    FOVEA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const f32 weight(p[r * kScoreStride + j]);
      FOVEA_UNROLL
      for (int n = 0; n < Vectors; ++n) sum[r][n] = fma(weight, value[n], sum[r][n]);
    }
  }
  FOVEA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) store(acc + r * acc_stride + d + n * kLanes, sum[r][n]);
  }
}

template <int Rows, class Codec>
FOVEA_NOINLINE void stream_weigh_rows(const Codec& codec, const float* p, const std::byte* rows, index_t row_stride,
                                      index_t count, index_t dim, const float* rescale, float* acc, index_t acc_stride) {
  // Columns at once, in vectors: as many chains as the registers hold, at most the 8 that a dim of 128 has.
  constexpr int kWide = kStreamAccumulators / Rows >= 8 ? 8 : kStreamAccumulators / Rows >= 4 ? 4 : 2;
  constexpr index_t kRun = 32;   // keys per pass over the columns: 16 KiB at dim 128, so the second pass reads the L1 cache
  const index_t ahead = prefetch_distance(row_stride, dim * Codec::kBytes);
  const float keep[kStreamRows] = {1.f, 1.f, 1.f, 1.f};
  for (index_t first = 0; first < count; first += kRun) {
    const index_t here = std::min(kRun, count - first);
    const std::byte* const run = rows + first * row_stride;
    const float* const factor = first == 0 ? rescale : keep;
    index_t d = 0;
    const auto columns = [&]<int Vectors>(std::integral_constant<int, Vectors>) {
      for (; d + Vectors * kLanes <= dim; d += Vectors * kLanes)
        weigh_columns<Rows, Vectors>(codec, p + first, run, row_stride, ahead, here, d, factor, acc, acc_stride);
    };
    columns(std::integral_constant<int, kWide>{});
    if constexpr (kWide >= 8) columns(std::integral_constant<int, 4>{});
    if constexpr (kWide >= 4) columns(std::integral_constant<int, 2>{});
    columns(std::integral_constant<int, 1>{});
    if (d < dim) {
      for (int r = 0; r < Rows; ++r) {
        f32 sum = load(acc + r * acc_stride + d) * f32(factor[r]);
        for (index_t j = 0; j < here; ++j)
          sum = fma(f32(p[r * kScoreStride + first + j]), codec.load_some(run + j * row_stride, d, dim - d), sum);
        store(acc + r * acc_stride + d, sum);
      }
    }
  }
}

// acc[r] = acc[r] * rescale[r] + sum_j p[r, j] value j, for r < rows, j < count >= 1. acc is padded to whole vectors.
template <class Codec>
void stream_weigh(const Codec& codec, index_t rows, const float* p, const std::byte* values, index_t value_stride,
                  index_t count, index_t dim, const float* rescale, float* acc, index_t acc_stride) {
  for (index_t r = 0; r < rows; r += kStreamRows) {
    const float* const weights = p + r * kScoreStride;
    float* const sums = acc + r * acc_stride;
    switch (std::min(kStreamRows, rows - r)) {
      case 1:
        stream_weigh_rows<1>(codec, weights, values, value_stride, count, dim, rescale + r, sums, acc_stride);
        break;
      case 2:
        stream_weigh_rows<2>(codec, weights, values, value_stride, count, dim, rescale + r, sums, acc_stride);
        break;
      case 3:
        stream_weigh_rows<3>(codec, weights, values, value_stride, count, dim, rescale + r, sums, acc_stride);
        break;
      default:
        stream_weigh_rows<4>(codec, weights, values, value_stride, count, dim, rescale + r, sums, acc_stride);
    }
  }
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
