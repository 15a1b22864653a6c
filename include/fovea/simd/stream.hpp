// SPDX-License-Identifier: Apache-2.0
// The two kernels of decode: few query rows against stored K and V, read in place, once. Bound by memory, so they keep four
// keys in flight, prefetch 4 KiB ahead and never copy. Each result is made in one order whatever rows and keys stand beside it.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../core/shapes.hpp"
#include "register_budget.hpp"
#include "simd.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

inline constexpr index_t kPrefetchBytes = 4096;

FOVEA_INLINE void prefetch(const std::byte* at, index_t ahead) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(at) + static_cast<std::uintptr_t>(ahead)));
}

// The cache lines of whole rows, into L2.
inline void prefetch_rows(const Segment& rows, index_t row_bytes) {
  for (index_t j = 0; j < rows.count; ++j) {
    for (index_t at = 0; at < row_bytes; at += 64) __builtin_prefetch(rows.data + j * rows.stride + at, 0, 2);
  }
}

// How far ahead in bytes, in whole rows: the next rows may be far apart (token-major storage).
FOVEA_INLINE index_t prefetch_distance(index_t row_stride, index_t row_bytes) {
  return std::max<index_t>(kPrefetchBytes / std::max<index_t>(row_bytes, 1), 1) * row_stride;
}

template <int Rows, class Codec>
FOVEA_INLINE void score_block(const Codec& codec, const float* q, index_t q_stride, const std::byte* const (&keys)[kStreamKeys],
                              index_t ahead, index_t dim, float (&to)[Rows][kStreamKeys]) {
  f32 sum[Rows][kStreamKeys];
  FOVEA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    FOVEA_UNROLL
    for (int j = 0; j < kStreamKeys; ++j) sum[r][j] = f32(0.f);
  }
  index_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    f32 key[kStreamKeys];
    FOVEA_UNROLL
    for (int j = 0; j < kStreamKeys; ++j) {
      key[j] = codec.load(keys[j], d);
      prefetch(keys[j] + d * Codec::kBytes, ahead);
    }
    FOVEA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const f32 query = load(q + r * q_stride + d);
      FOVEA_UNROLL
      for (int j = 0; j < kStreamKeys; ++j) sum[r][j] = fma(query, key[j], sum[r][j]);
    }
  }
  if (d < dim) {
    f32 key[kStreamKeys];
    FOVEA_UNROLL
    for (int j = 0; j < kStreamKeys; ++j) key[j] = codec.load_some(keys[j], d, dim - d);
    FOVEA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const f32 query = load(q + r * q_stride + d);
      FOVEA_UNROLL
      for (int j = 0; j < kStreamKeys; ++j) sum[r][j] = fma(query, key[j], sum[r][j]);
    }
  }
  FOVEA_UNROLL
  for (int r = 0; r < Rows; ++r) reduce_add4(sum[r][0], sum[r][1], sum[r][2], sum[r][3], to[r]);
}

template <int Rows, class Codec>
FOVEA_NOINLINE void stream_scores_rows(const Codec& codec, const float* q, index_t q_stride, const std::byte* rows,
                                       index_t row_stride, index_t count, index_t dim, float* s) {
  const index_t ahead = prefetch_distance(row_stride, dim * Codec::kBytes);
  float block[Rows][kStreamKeys];
  for (index_t j = 0; j < count; j += kStreamKeys) {
    const index_t here = std::min(kStreamKeys, count - j);
    const std::byte* keys[kStreamKeys];
    for (index_t i = 0; i < kStreamKeys; ++i) keys[i] = rows + (j + std::min(i, here - 1)) * row_stride;
    score_block<Rows>(codec, q, q_stride, keys, ahead, dim, block);
    for (int r = 0; r < Rows; ++r) {
      for (index_t i = 0; i < here; ++i) s[r * kScoreStride + j + i] = block[r][i];
    }
  }
}

// s[r, j] = q[r] . key j, for r < rows, j < count. q is padded with zeros to whole vectors.
template <class Codec>
void stream_scores(const Codec& codec, index_t rows, const float* q, index_t q_stride, const std::byte* keys, index_t key_stride,
                   index_t count, index_t dim, float* s) {   // [rows, kScoreStride]
  for (index_t r = 0; r < rows; r += kStreamRows, q += kStreamRows * q_stride, s += kStreamRows * kScoreStride) {
    switch (std::min(kStreamRows, rows - r)) {
      case 1: stream_scores_rows<1>(codec, q, q_stride, keys, key_stride, count, dim, s); break;
      case 2: stream_scores_rows<2>(codec, q, q_stride, keys, key_stride, count, dim, s); break;
      case 3: stream_scores_rows<3>(codec, q, q_stride, keys, key_stride, count, dim, s); break;
      default: stream_scores_rows<4>(codec, q, q_stride, keys, key_stride, count, dim, s);
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
  constexpr int kWide = static_cast<int>(kStreamAccumulators / Rows);
  constexpr index_t kRun = 32;   // keys per pass over the columns: 16 KiB at dim 128, so the second pass reads the L1 cache
  const index_t ahead = prefetch_distance(row_stride, dim * Codec::kBytes);
  const float keep[kStreamRows] = {1.f, 1.f, 1.f, 1.f};
  for (index_t first = 0; first < count; first += kRun) {
    const index_t here = std::min(kRun, count - first);
    const std::byte* const run = rows + first * row_stride;
    const float* const factor = first == 0 ? rescale : keep;
    index_t d = 0;
    for (; d + kWide * kLanes <= dim; d += kWide * kLanes)
      weigh_columns<Rows, kWide>(codec, p + first, run, row_stride, ahead, here, d, factor, acc, acc_stride);
    for (; d + kLanes <= dim; d += kLanes)
      weigh_columns<Rows, 1>(codec, p + first, run, row_stride, ahead, here, d, factor, acc, acc_stride);
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
void stream_weigh(const Codec& codec, index_t rows, const float* p, const std::byte* values, index_t value_stride, index_t count,
                  index_t dim, const float* rescale, float* acc, index_t acc_stride) {
  for (index_t r = 0; r < rows; r += kStreamRows) {
    const float* const weights = p + r * kScoreStride;
    float* const sums = acc + r * acc_stride;
    switch (std::min(kStreamRows, rows - r)) {
      case 1: stream_weigh_rows<1>(codec, weights, values, value_stride, count, dim, rescale + r, sums, acc_stride); break;
      case 2: stream_weigh_rows<2>(codec, weights, values, value_stride, count, dim, rescale + r, sums, acc_stride); break;
      case 3: stream_weigh_rows<3>(codec, weights, values, value_stride, count, dim, rescale + r, sums, acc_stride); break;
      default: stream_weigh_rows<4>(codec, weights, values, value_stride, count, dim, rescale + r, sums, acc_stride);
    }
  }
}

}  // namespace FOVEA_ARCH
}  // namespace v0
}  // namespace fovea
