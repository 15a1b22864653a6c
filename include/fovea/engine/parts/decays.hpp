// SPDX-License-Identifier: Apache-2.0
// Factors of the state, as the mechanisms get them.
#pragma once
#include <algorithm>
#include <cmath>

#include "../../simd/math.hpp"
#include "../chunk_policies.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

struct NoDecay {
  static constexpr Decayed kind = Decayed::none;
  FOVEA_INLINE void alpha(const ChunkPlace&, float*, index_t) const {}
};

// One number per state head: a factor (RetNet), or the slope s of a factor e^-s (Lightning).
struct HeadDecay {
  static constexpr Decayed kind = Decayed::head;
  const float* numbers;   // [state_head]
  DecayForm form;

  FOVEA_INLINE void alpha(const ChunkPlace& place, float* to, index_t) const {
    const float number = numbers[place.head], factor = form == DecayForm::log ? std::exp(-number) : number;
    for (index_t i = 0; i < place.count; ++i) to[i] = factor;
  }
};

// to[i] = e^from[i]; `to` may be `from`.
FOVEA_INLINE void exponentials(const float* from, float* to, index_t count) {
  index_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, exp2_centred(load(from + i) * f32(kLog2e)));
  if (i < count) store_some(to + i, exp2_centred(load_some(from + i, count - i) * f32(kLog2e)), count - i);
}

// The gate of a call; Kind is token or key.
template <Decayed Kind>
struct GateDecay {
  static constexpr Decayed kind = Kind;
  View<const float, 4> gate;   // [batch | 1, state_head | 1, pos | 1, dim_k | 1], shared axes with stride 0
  DecayForm form;
  index_t dim_k;

  // The gates of a state's positions [next, next + rows), for the engine to fetch.
  template <class Ahead>
  FOVEA_INLINE void add_ahead(Ahead& ahead, const ChunkPlace& place, index_t head, index_t next, index_t rows) const {
    if (Kind != Decayed::key || gate.stride[3] != 1 || gate.stride[2] == 0) return;
    const float* const from = row_at(gate, place.batch, head, next);
    constexpr index_t kSize = sizeof(float);
    ahead.add(reinterpret_cast<const std::byte*>(from), gate.stride[2] * kSize, rows, dim_k * kSize);
  }

  FOVEA_INLINE void alpha(const ChunkPlace& place, float* to, index_t stride) const {
    const float* from = row_at(gate, place);
    if constexpr (Kind == Decayed::token) {
      for (index_t i = 0; i < place.count; ++i) to[i] = from[i * gate.stride[2]];
      if (form == DecayForm::log) exponentials(to, to, place.count);
    } else {
      for (index_t i = 0; i < place.count; ++i, from += gate.stride[2]) {
        float* const row = to + i * stride;
        const bool together = gate.stride[3] == 1;
        if (together && form == DecayForm::alpha) std::copy_n(from, dim_k, row);
        for (index_t d = 0; !together && d < dim_k; ++d) row[d] = from[d * gate.stride[3]];
        if (form == DecayForm::log) exponentials(together ? from : row, row, dim_k);
      }
    }
  }
};

// e^{dt A_h}: Mamba-2.
struct StepSizeDecay {
  static constexpr Decayed kind = Decayed::token;
  View<const float, 4> dt;   // [batch | 1, state_head | 1, pos | 1, 1], shared axes with stride 0
  const float* a;            // [state_head]

  FOVEA_INLINE void alpha(const ChunkPlace& place, float* to, index_t) const {
    const float* from = row_at(dt, place);
    for (index_t i = 0; i < place.count; ++i) to[i] = from[i * dt.stride[2]] * a[place.head];
    exponentials(to, to, place.count);
  }
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
