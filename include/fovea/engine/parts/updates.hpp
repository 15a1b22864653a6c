// SPDX-License-Identifier: Apache-2.0
// What tokens write into the state.
#pragma once
#include "../../simd/simd.hpp"
#include "../chunk_policies.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

struct Additive {
  static constexpr Written kind = Written::additive;
  static constexpr bool kGain = false;
};

// Keys multiplied by a number per token: dt of Mamba-2, the input gate of mLSTM.
struct GainedAdditive {
  static constexpr Written kind = Written::additive;
  static constexpr bool kGain = true;
  View<const float, 4> gains;   // [batch | 1, state_head | 1, pos | 1, 1], shared axes with stride 0

  FOVEA_INLINE void gain(const ChunkPlace& place, float* to) const {
    const float* from = row_at(gains, place);
    for (index_t i = 0; i < place.count; ++i) to[i] = from[i * gains.stride[2]];
  }
};

struct Delta {
  static constexpr Written kind = Written::delta;
  View<const float, 4> strength;   // [batch | 1, state_head | 1, pos | 1, 1 | dim_v], shared axes with stride 0

  FOVEA_INLINE index_t beta_width() const { return strength.extent[3]; }
  FOVEA_INLINE void beta(const ChunkPlace& place, index_t first, index_t count, float* to, index_t stride) const {
    const float* from = row_at(strength, place);
    for (index_t i = 0; i < place.count; ++i, from += strength.stride[2]) {
      for (index_t n = 0; n < count; ++n) to[i * stride + n] = from[(first + n) * strength.stride[3]];
    }
  }
};

// Removal along rows of their own. Views over the k heads' shape: [batch, head | 1, pos, dim_k].
struct LowRank {
  static constexpr Written kind = Written::dplr;
  View<const float, 4> a, b;

  FOVEA_INLINE void rows(const ChunkPlace& place, const float*, index_t stride, float* a_rows, float* b_rows) const {
    copy(a, place, stride, a_rows);
    copy(b, place, stride, b_rows);
  }

 private:
  static void copy(const View<const float, 4>& x, const ChunkPlace& place, index_t stride, float* to) {
    const float* from = row_at(x, place);
    for (index_t i = 0; i < place.count; ++i, from += x.stride[2]) {
      index_t d = 0;
      for (; x.stride[3] == 1 && d + kLanes <= x.extent[3]; d += kLanes) store(to + i * stride + d, load(from + d));
      for (; d < x.extent[3]; ++d) to[i * stride + d] = from[d * x.stride[3]];
    }
  }
};

// RWKV-7: a = kappa, b = -kappa * rate.
struct RatedRemoval {
  static constexpr Written kind = Written::dplr;
  View<const float, 4> kappa, rate;

  FOVEA_INLINE void rows(const ChunkPlace& place, const float*, index_t stride, float* a_rows, float* b_rows) const {
    const float* direction = row_at(kappa, place);
    const float* much = row_at(rate, place);
    for (index_t i = 0; i < place.count; ++i, direction += kappa.stride[2], much += rate.stride[2]) {
      index_t d = 0;
      for (; kappa.stride[3] == 1 && rate.stride[3] == 1 && d + kLanes <= kappa.extent[3]; d += kLanes) {
        const f32 x = load(direction + d);
        store(a_rows + i * stride + d, x);
        store(b_rows + i * stride + d, -x * load(much + d));
      }
      for (; d < kappa.extent[3]; ++d) {
        const float x = direction[d * kappa.stride[3]];
        a_rows[i * stride + d] = x;
        b_rows[i * stride + d] = -x * much[d * rate.stride[3]];
      }
    }
  }
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
