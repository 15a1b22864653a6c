// SPDX-License-Identifier: Apache-2.0
// Scores -> weights.
#pragma once
#include <cmath>
#include <limits>

#include "../../simd/math.hpp"
#include "../policies.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// Online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867), with an optional learned sink logit per head. The
// reference is kept in units of log2, rounded once, and used as rounded everywhere, so that its rounding cancels between sum
// and weights.
struct Softmax {
  const float* sink = nullptr;   // [q_head]

  struct State {
    float reference, sum;   // sum of 2^(s log2 e - reference)
  };

  FOVEA_INLINE State begin(const Row& row, bool whole_row) const {
    constexpr float kEmpty = -std::numeric_limits<float>::infinity();
    if (!whole_row || sink == nullptr || sink[row.q_head] == kEmpty) return {kEmpty, 0.f};
    return {sink[row.q_head] * kLog2e, 1.f};
  }

  // Two passes over a row of scores: maximum, then weights and their sum. The lanes of the sum follow the key index, so a
  // row's bits do not depend on how many masked keys stand around its visible ones.
  FOVEA_INLINE float absorb(State& state, std::span<float> scores) const {
    float* const s = scores.data();
    const index_t count = static_cast<index_t>(scores.size());
    f32 top(-std::numeric_limits<float>::infinity());
    FOVEA_UNROLL_4
    for (index_t j = 0; j < count; j += kLanes) top = xsimd::max(top, load(s + j));
    const float tile_top = reduce_max(top) * kLog2e;
    const float reference = tile_top > state.reference ? tile_top : state.reference;
    // Nothing visible yet: any finite reference gives weights 0, and lets a NaN through.
    const f32 minus_reference(std::isinf(reference) && reference < 0.f ? 0.f : -reference);
    f32 sum(0.f);
    FOVEA_UNROLL_4
    for (index_t j = 0; j < count; j += kLanes) {
      const f32 weight = exp2(fma(load(s + j), f32(kLog2e), minus_reference));
      store(s + j, weight);
      sum += weight;
    }
    const float rescale = moved(state.reference, reference);
    state.sum = std::fma(state.sum, rescale, reduce_add(sum));
    state.reference = reference;
    return rescale;
  }

  FOVEA_INLINE std::array<float, 2> merge(State& a, const State& b) const {
    const float reference = b.reference > a.reference ? b.reference : a.reference;
    const std::array<float, 2> factor = {moved(a.reference, reference), moved(b.reference, reference)};
    a.sum = std::fma(a.sum, factor[0], b.sum * factor[1]);
    a.reference = reference;
    return factor;
  }

  FOVEA_INLINE Final finish(const State& state) const {
    if (state.sum == 0.f) return {0.f, -std::numeric_limits<float>::infinity()};
    const double lse =
        static_cast<double>(state.reference) * 0.693147180559945309417 + std::log(static_cast<double>(state.sum));
    return {1.f / state.sum, static_cast<float>(lse)};
  }

 private:
  FOVEA_INLINE static float moved(float from, float to) { return from == to ? 1.f : exp2(from - to); }
};

// exp(s - lse) for a known LSE: the weights of a finished row.
struct GivenLse {
  FOVEA_INLINE void weights(std::span<float> scores, float lse) const {
    float* const s = scores.data();
    const float reference = lse * kLog2e;
    const f32 minus_reference(std::isinf(reference) && reference < 0.f ? 0.f : -reference);
    for (index_t j = 0; j < static_cast<index_t>(scores.size()); j += kLanes)
      store(s + j, exp2(fma(load(s + j), f32(kLog2e), minus_reference)));
  }
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
