// SPDX-License-Identifier: Apache-2.0
// The two kernels of decode: few query rows against stored K and V, read in place, once. Bound by memory, so they fetch each
// cache line once and ahead of its use, in the order of memory where they can, and never copy. Each result is made in one order whatever
// rows and keys stand beside it, so it does not depend on where segments end.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../core/shapes.hpp"
#include "register_budget.hpp"
#include "simd.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

inline constexpr index_t kLineBytes = 64;

// How far ahead of their use rows are fetched. 4 KiB are 20 % slower for 16-bit keys on Zen 4, 8 KiB a tenth for values.
inline constexpr index_t kPrefetchBytes = 6144;

// Vectors per step of the loops over a row: a cache line's worth, so that a line is fetched once and not once per vector.
template <class Codec>
inline constexpr int kLineVectors = static_cast<int>(std::clamp<index_t>(kLineBytes / Codec::offset(kLanes), 1, 4));

// A codec may decode several vectors of a row cheaper than one by one: Codec::Chunk<Vectors>{row, d, dim} looks at numbers
// d .. d + Vectors * kLanes - 1 (d is a multiple of their count), plain() says whether it can, pair(n, to) gives the vectors
// n and n + 1. kChunkVectors is the widest chunk that pays.
template <class Codec>
concept HasChunks = requires {
  Codec::kChunkVectors;
};
template <int Vectors, class Codec>
FOVEA_INLINE void load_vectors(const Codec& codec, const std::byte* row, index_t d, index_t dim, f32 (&to)[Vectors]) {
  if constexpr (HasChunks<Codec> && Vectors % 2 == 0) {
    const typename Codec::template Chunk<Vectors> chunk(row, d, dim);
    if (__builtin_expect(chunk.plain(), 1)) {
      FOVEA_UNROLL
      for (int n = 0; n < Vectors; n += 2) {
        f32 pair[2];
        chunk.pair(n, pair);
        to[n] = pair[0];
        to[n + 1] = pair[1];
      }
      return;
    }
  }
  FOVEA_UNROLL
  for (int n = 0; n < Vectors; ++n) to[n] = codec.load(row, d + n * kLanes, dim);
}

// The lines that hold `Vectors` vectors from number d on of the row `ahead` bytes behind this one.
template <int Vectors, class Codec, bool IntoL1 = true>
FOVEA_INLINE void prefetch_vectors(const std::byte* row, index_t d, index_t ahead) {
  constexpr index_t kBytes = Codec::offset(Vectors * kLanes);
  FOVEA_UNROLL
  for (index_t at = 0; at < kBytes; at += kLineBytes) {
    if constexpr (IntoL1) {
      prefetch(row + Codec::offset(d) + at, ahead);
    } else {
      prefetch_l2(row + Codec::offset(d) + at, ahead);
    }
  }
}
// Scales behind the numbers (of groups: kGroupScaled) may have a line to themselves.
template <class Codec>
FOVEA_INLINE void prefetch_scales(const std::byte* row, index_t dim, index_t ahead) {
  if constexpr (Codec::kRowScaled || requires { requires Codec::kGroupScaled; }) prefetch(row + Codec::offset(dim), ahead);
}

// Numbers of two bytes and more: the others take longer to decode than to fetch, and the order of their lines does not matter.
template <class Codec>
inline constexpr bool kBoundByMemory = Codec::offset(kLanes) >= 2 * kLanes;

template <class Codec>
FOVEA_INLINE bool stand_together(index_t stride, index_t dim) {
  return kBoundByMemory<Codec> && stride > 0 && stride < Codec::offset(dim) + kLineBytes;
}

// What a step over four keys prefetches: a line's worth of each of the keys `ahead`, or, where keys stand next to one another, as much
// in the order of memory, which keeps the hardware's prefetcher going (Zen 4, four queries, f32: 28 instead of 10 GB/s on one core).
struct Lookahead {
  index_t ahead, between, step;
};
template <class Codec>
FOVEA_INLINE Lookahead lookahead(const Segment& keys, index_t dim) {
  constexpr index_t kBytes = Codec::offset(kLineVectors<Codec> * kLanes);
  if (stand_together<Codec>(keys.stride, dim)) return {keys.ahead, kBytes, kStreamKeys * kBytes};
  return {keys.ahead, keys.stride, kBytes};
}

// sum[r] = the product of q[r] and one key, lane by lane. One or two queries work off a line faster than memory gives it, and only
// keys read one after the other let prefetchers follow then (Zen 4, one query, f32: 28 instead of 10 GB/s on one core).
template <class Codec>
inline constexpr int kRowsKeyByKey = kBoundByMemory<Codec>&& kLanes >= 8 ? 2 : 0;   // fewer lanes: memory is faster
template <int Rows, class Codec>
FOVEA_INLINE void multiply_key(const Codec& codec, const float* q, index_t q_stride, const std::byte* key, index_t ahead,
                               index_t dim, f32 (&sum)[Rows]) {
  FOVEA_UNROLL
  for (int r = 0; r < Rows; ++r) sum[r] = f32(0.f);
  const auto add = [&](index_t d, const f32& part) {
    FOVEA_UNROLL
    for (int r = 0; r < Rows; ++r) sum[r] = fma(load(q + r * q_stride + d), part, sum[r]);
  };
  constexpr int kStep = kLineVectors<Codec>;
  index_t d = 0;
  for (; d + kStep * kLanes <= dim; d += kStep * kLanes) {
    prefetch_vectors<kStep, Codec, false>(key, d, ahead);
    FOVEA_UNROLL
    for (int n = 0; n < kStep; ++n) add(d + n * kLanes, codec.load(key, d + n * kLanes, dim));
  }
  if (d < dim) prefetch_vectors<kStep, Codec, false>(key, d, ahead);
  for (; d + kLanes <= dim; d += kLanes) add(d, codec.load(key, d, dim));
  if (d < dim) add(d, codec.load_some(key, d, dim - d, dim));
}

// sum[r][0 .. 3] = the products of q[r] and the keys at key + offset[0 .. 3], lane by lane.
template <int Rows, class Codec>
FOVEA_INLINE void multiply_block(const Codec& codec, const float* q, index_t q_stride, const std::byte* key,
                                 const index_t (&offset)[kStreamKeys], const Lookahead& far, index_t dim,
                                 f32 (&sum)[Rows][kStreamKeys]) {
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
  if constexpr (HasChunks<Codec>) {
    const auto add_chunks = [&]<int Vectors>(std::integral_constant<int, Vectors>) {
      using Chunk = typename Codec::template Chunk<Vectors>;
      for (; d + Vectors * kLanes <= dim; d += Vectors * kLanes) {
        FOVEA_UNROLL
        for (int j = 0; j < kStreamKeys; ++j) prefetch_vectors<Vectors, Codec>(key + offset[j], d, far.ahead);
        const Chunk chunks[kStreamKeys] = {
            {key + offset[0], d, dim}, {key + offset[1], d, dim}, {key + offset[2], d, dim}, {key + offset[3], d, dim}};
        static_assert(kStreamKeys == 4);
        bool plain = true;
        FOVEA_UNROLL
        for (int j = 0; j < kStreamKeys; ++j) plain &= chunks[j].plain();
        if (__builtin_expect(plain, 1)) {
          FOVEA_UNROLL
          for (int n = 0; n < Vectors; n += 2) {
            FOVEA_UNROLL
            for (int j = 0; j < kStreamKeys; ++j) {
              f32 part[2];
              chunks[j].pair(n, part);
              FOVEA_UNROLL
              for (int r = 0; r < Rows; ++r) {
                const float* const query = q + r * q_stride + d + n * kLanes;
                sum[r][j] = fma(load(query + kLanes), part[1], fma(load(query), part[0], sum[r][j]));
              }
            }
          }
        } else {
          for (index_t at = d; at < d + Vectors * kLanes; at += kLanes)
            add(at, [&](const std::byte* row) { return codec.load(row, at, dim); });
        }
      }
    };
    add_chunks(std::integral_constant<int, Codec::kChunkVectors>{});
    if constexpr (Codec::kChunkVectors > 4) add_chunks(std::integral_constant<int, 4>{});
    add_chunks(std::integral_constant<int, 2>{});
  } else {
    constexpr int kStep = kLineVectors<Codec>;
    index_t ahead = far.ahead;
    for (; d + kStep * kLanes <= dim; d += kStep * kLanes) {
      if constexpr (kBoundByMemory<Codec>) {
        FOVEA_UNROLL
        for (int j = 0; j < kStreamKeys; ++j) prefetch_vectors<kStep, Codec>(key, 0, ahead + j * far.between);
        ahead += far.step;
      }
      FOVEA_UNROLL
      for (int n = 0; n < kStep; ++n) {
        add(d + n * kLanes, [&](const std::byte* row) {
          if (!kBoundByMemory<Codec> && n == 0) prefetch_vectors<kStep, Codec>(row, d, ahead);
          return codec.load(row, d + n * kLanes, dim);
        });
      }
    }
  }
  if (d < dim) {
    FOVEA_UNROLL
    for (int j = 0; j < kStreamKeys; ++j) prefetch_vectors<kLineVectors<Codec>, Codec>(key + offset[j], d, far.ahead);
  }
  FOVEA_UNROLL
  for (int j = 0; j < kStreamKeys; ++j) prefetch_scales<Codec>(key + offset[j], dim, far.ahead);
  for (; d + kLanes <= dim; d += kLanes) add(d, [&](const std::byte* row) { return codec.load(row, d, dim); });
  if (d < dim) add(d, [&](const std::byte* row) { return codec.load_some(row, d, dim - d, dim); });
}

// to[r * to_stride + 0 .. 3] = q[r] . the keys at key + offset[0 .. 3].
template <int Rows, class Codec>
FOVEA_INLINE void score_block(const Codec& codec, const float* q, index_t q_stride, const std::byte* key,
                              const index_t (&offset)[kStreamKeys], const Lookahead& far, index_t dim, float* to,
                              index_t to_stride) {
  f32 sum[Rows][kStreamKeys];
  if constexpr (Rows <= kRowsKeyByKey<Codec>) {
    FOVEA_UNROLL
    for (int j = 0; j < kStreamKeys; ++j) {
      f32 of_key[Rows];
      multiply_key<Rows>(codec, q, q_stride, key + offset[j], far.ahead, dim, of_key);
      FOVEA_UNROLL
      for (int r = 0; r < Rows; ++r) sum[r][j] = of_key[r];
    }
  } else {
    multiply_block<Rows>(codec, q, q_stride, key, offset, far, dim, sum);
  }
  FOVEA_UNROLL
  for (int r = 0; r < Rows; ++r) reduce_add4(sum[r][0], sum[r][1], sum[r][2], sum[r][3], to + r * to_stride);
  if constexpr (Codec::kRowScaled) {
    float scale[kStreamKeys];
    FOVEA_UNROLL
    for (int j = 0; j < kStreamKeys; ++j) scale[j] = codec.scale(key + offset[j], dim);
    FOVEA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      FOVEA_UNROLL
      for (int j = 0; j < kStreamKeys; ++j) to[r * to_stride + j] *= scale[j];
    }
  }
}

template <int Rows, class Codec>
FOVEA_NOINLINE void stream_scores_rows(const Codec& codec, const float* q, index_t q_stride, const Segment& keys,
                                       index_t dim, float* s) {
  const index_t stride = keys.stride, count = keys.count;
  const Lookahead far = lookahead<Codec>(keys, dim);
  const std::byte* rows = keys.data;
  const index_t whole[kStreamKeys] = {0, stride, 2 * stride, 3 * stride};
  index_t j = 0;
  for (; j + kStreamKeys <= count; j += kStreamKeys, rows += kStreamKeys * stride)
    score_block<Rows>(codec, q, q_stride, rows, whole, far, dim, s + j, kScoreStride);
  if (j == count) return;
  // The last keys: the same kernel on repeated rows, so that their bits are those of whole blocks.
  index_t last[kStreamKeys];
  for (index_t i = 0; i < kStreamKeys; ++i) last[i] = std::min(i, count - j - 1) * stride;
  float block[Rows * kStreamKeys];
  score_block<Rows>(codec, q, q_stride, rows, last, far, dim, block, kStreamKeys);
  for (int r = 0; r < Rows; ++r) {
    for (index_t i = 0; i < count - j; ++i) s[r * kScoreStride + j + i] = block[r * kStreamKeys + i];
  }
}

// s[r, j] = q[r] . key j, for r < rows, j < keys.count. q is padded with zeros to whole vectors.
template <class Codec>
void stream_scores(const Codec& codec, index_t rows, const float* q, index_t q_stride, const Segment& keys, index_t dim,
                   float* s) {   // [rows, kScoreStride]
  for (index_t r = 0; r < rows; r += kStreamRows, q += kStreamRows * q_stride, s += kStreamRows * kScoreStride) {
    switch (std::min(kStreamRows, rows - r)) {
      case 1:
        stream_scores_rows<1>(codec, q, q_stride, keys, dim, s);
        break;
      case 2:
        stream_scores_rows<2>(codec, q, q_stride, keys, dim, s);
        break;
      case 3:
        stream_scores_rows<3>(codec, q, q_stride, keys, dim, s);
        break;
      default:
        stream_scores_rows<4>(codec, q, q_stride, keys, dim, s);
    }
  }
}

// ahead, step: what to prefetch beside row j is ahead + j * step from the first row. Into the L2 beside three and four rows: they take
// several passes, and pages of 16 read twice as fast then (Zen 4).
template <int Rows, int Vectors, class Codec>
FOVEA_INLINE void weigh_columns(const Codec& codec, const float* p, index_t p_stride, const std::byte* rows,
                                index_t row_stride, index_t ahead, index_t step, index_t count, index_t d, index_t dim,
                                const float* rescale, float* acc, index_t acc_stride) {
  f32 sum[Rows][Vectors];
  FOVEA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) sum[r][n] = load(acc + r * acc_stride + d + n * kLanes) * f32(rescale[r]);
  }
  const std::byte* const first = rows;
  for (index_t j = 0; j < count; ++j, rows += row_stride, ahead += step) {
    prefetch_vectors<Vectors, Codec, (Rows <= 2 || !kBoundByMemory<Codec>)>(first, 0, ahead);
    f32 value[Vectors];
    load_vectors(codec, rows, d, dim, value);
    FOVEA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const f32 weight(p[r * p_stride + j]);
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
FOVEA_NOINLINE void stream_weigh_rows(const Codec& codec, const float* p, const Segment& values, index_t dim,
                                      const float* rescale, float* acc, index_t acc_stride) {
  // Columns at once, in vectors: as many chains as the registers hold, at most the 8 that a dim of 128 has.
  constexpr int kWide = kStreamAccumulators / Rows >= 8 ? 8 : kStreamAccumulators / Rows >= 4 ? 4 : 2;
  constexpr index_t kRun = 32;   // keys per pass over the columns: 16 KiB at dim 128, so the second pass reads the L1 cache
  const index_t stride = values.stride, ahead = values.ahead;
  const float keep[kStreamRows] = {1.f, 1.f, 1.f, 1.f};
  // Several passes over the columns of rows that stand together: each pass fetches its share of the run behind this one, in the
  // order of memory (Zen 4, four queries, f32: 26 instead of 12 GB/s on one core; 20 with runs of kPrefetchBytes). Short segments
  // are pages or lists, and what follows them lies elsewhere.
  const bool in_order = dim > kWide * kLanes && values.count >= 4 * kRun && stand_together<Codec>(stride, dim);
  for (index_t first = 0; first < values.count; first += kRun) {
    const index_t here = std::min(kRun, values.count - first);
    const std::byte* const run = values.data + first * stride;
    for (index_t j = 0; j < here; ++j) prefetch_scales<Codec>(run + j * stride, dim, ahead);
    const float* const factor = first == 0 ? rescale : keep;
    const float* weights = p + first;
    index_t weights_stride = kScoreStride;
    [[maybe_unused]] float scaled[Rows * kRun];
    if constexpr (Codec::kRowScaled) {
      for (index_t j = 0; j < here; ++j) {
        const float scale = codec.scale(run + j * stride, dim);
        for (int r = 0; r < Rows; ++r) scaled[r * kRun + j] = p[r * kScoreStride + first + j] * scale;
      }
      weights = scaled;
      weights_stride = kRun;
    }
    index_t d = 0;
    const auto columns = [&]<int Vectors>(std::integral_constant<int, Vectors>) {
      for (; d + Vectors * kLanes <= dim; d += Vectors * kLanes) {
        const index_t next = in_order ? here * (stride + Codec::offset(d)) : ahead + Codec::offset(d);
        const index_t step = in_order ? Codec::offset(Vectors * kLanes) : stride;
        weigh_columns<Rows, Vectors>(codec, weights, weights_stride, run, stride, next, step, here, d, dim, factor, acc,
                                     acc_stride);
      }
    };
    columns(std::integral_constant<int, kWide>{});
    if constexpr (kWide >= 8) columns(std::integral_constant<int, 4>{});
    if constexpr (kWide >= 4) columns(std::integral_constant<int, 2>{});
    columns(std::integral_constant<int, 1>{});
    if (d < dim) {
      for (int r = 0; r < Rows; ++r) {
        f32 sum = load(acc + r * acc_stride + d) * f32(factor[r]);
        for (index_t j = 0; j < here; ++j)
          sum = fma(f32(weights[r * weights_stride + j]), codec.load_some(run + j * stride, d, dim - d, dim), sum);
        store(acc + r * acc_stride + d, sum);
      }
    }
  }
}

// acc[r] = acc[r] * rescale[r] + sum_j p[r, j] value j, for r < rows, j < values.count >= 1. acc is padded to whole vectors.
template <class Codec>
void stream_weigh(const Codec& codec, index_t rows, const float* p, const Segment& values, index_t dim, const float* rescale,
                  float* acc, index_t acc_stride) {
  for (index_t r = 0; r < rows; r += kStreamRows) {
    const float* const weights = p + r * kScoreStride;
    float* const sums = acc + r * acc_stride;
    switch (std::min(kStreamRows, rows - r)) {
      case 1:
        stream_weigh_rows<1>(codec, weights, values, dim, rescale + r, sums, acc_stride);
        break;
      case 2:
        stream_weigh_rows<2>(codec, weights, values, dim, rescale + r, sums, acc_stride);
        break;
      case 3:
        stream_weigh_rows<3>(codec, weights, values, dim, rescale + r, sums, acc_stride);
        break;
      default:
        stream_weigh_rows<4>(codec, weights, values, dim, rescale + r, sums, acc_stride);
    }
  }
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
