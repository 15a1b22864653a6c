// SPDX-License-Identifier: Apache-2.0
// Which state is read, and what leaves.
#pragma once
#include <algorithm>
#include <cmath>

#include "../../simd/simd.hpp"
#include "../chunk_policies.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

struct Inclusive {
  static constexpr bool exclusive = false;
};

// The state before the write, and (q . (u * k)) v for the token itself (RWKV-5 and 6).
struct ExclusiveWithBonus {
  static constexpr bool exclusive = true;
  View<const float, 2> u;   // [state_head, dim_k]

  FOVEA_INLINE void bonus(const ChunkPlace& place, const float* q, const float* k, index_t stride, float* to) const {
    const float* const own = u.data + place.head * u.stride[0];
    for (index_t i = 0; i < place.count; ++i) {
      f32 sum(0.f);
      for (index_t d = 0; d < u.extent[1]; d += kLanes) {
        sum = fma(load(q + i * stride + d) * load_strided(own + d * u.stride[1], u.stride[1], u.extent[1] - d),
                  load(k + i * stride + d), sum);
      }
      to[i] = reduce_add(sum);
    }
  }
};

struct Plain {
  static constexpr bool divides = false, skips = false;
};

// o / (sum + eps), or max(sum, eps): linear attention. Not dividing, only the key sum is kept.
struct Normalized {
  static constexpr bool divides = true, skips = false;
  float eps;
  bool clamp, divide;

  FOVEA_INLINE float divisor(const ChunkPlace&, index_t, float sum) const {
    if (!divide) return 1.f;
    return clamp ? std::max(sum, eps) : sum + eps;
  }
};

// o / (max(|sum|, e^-m) + eps): mLSTM.
struct Stabilized {
  static constexpr bool divides = true, skips = false;
  View<const float, 4> least;   // [batch, state_head, pos, 1]  e^-m
  float eps;

  FOVEA_INLINE float divisor(const ChunkPlace& place, index_t i, float sum) const {
    const float floor = *row_at(least, place.batch, place.head, place.begin + i);
    return std::max(std::fabs(sum), floor) + eps;
  }
};

// o += D v: the skip of Mamba-2.
struct Skip {
  static constexpr bool divides = false, skips = true;
  View<const float, 2> d;   // [state_head, 1 | dim_v]; null = no skip

  FOVEA_INLINE void skip(const ChunkPlace& place, index_t first, index_t count, const float* v, float* o) const {
    if (!d) return;
    const float* const own = d.data + place.head * d.stride[0];
    for (index_t n = 0; n < count; ++n) o[n] += own[d.extent[1] == 1 ? 0 : (first + n) * d.stride[1]] * v[n];
  }
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
