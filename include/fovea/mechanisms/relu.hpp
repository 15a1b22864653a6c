// SPDX-License-Identifier: Apache-2.0
// ReLU attention (Wortsman et al. 2023, arXiv 2309.08586):  o_i = 1/L sum_j relu(s_ij) v_j, L the number of keys.
// The paper's L is the length of the sequence, relu(L). relu() divides each row by the number of keys it sees, which under a
// causal mask keeps early rows as large as late ones.
#pragma once
#include <cmath>
#include <limits>

#include "../call/merging.hpp"
#include "../call/variant.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// A given L: partial results add.
struct Relu {
  float keys = 1.f;   // positive

  struct State {};

  Status check() const {
    if (keys > 0.f && std::isfinite(keys)) return {};
    return door::invalid("fovea: relu attention divides by a positive number of keys, got %g", static_cast<double>(keys));
  }

  FOVEA_INLINE State begin(const Row&, bool) const { return {}; }
  FOVEA_INLINE void absorb(State*, const ScoreRows& scores, float* rescale) const {
    for (index_t r = 0; r < scores.rows; ++r) {
      float* const s = scores.data + r * kScoreStride;
      for (index_t j = 0; j < scores.count; j += kLanes) store(s + j, weight(load(s + j)));
      rescale[r] = 1.f;
    }
  }
  FOVEA_INLINE std::array<float, 2> merge(State&, const State&) const { return {1.f, 1.f}; }
  FOVEA_INLINE Final finish(const State&) const { return {1.f / keys, 0.f}; }

  FOVEA_INLINE static f32 weight(f32 s) { return xsimd::max(f32(0.f), s); }   // second operand where that is NaN
};

// L = the visible keys of the row, those with a score above -inf. Its LSE is ln L, so fovea::merge joins partial results.
struct ReluMean {
  static constexpr bool kHasLse = true;

  struct State {
    std::int32_t keys;
  };

  FOVEA_INLINE State begin(const Row&, bool) const { return {0}; }
  FOVEA_INLINE void absorb(State* states, const ScoreRows& scores, float* rescale) const {
    const f32 masked(-std::numeric_limits<float>::infinity());
    for (index_t r = 0; r < scores.rows; ++r) {
      float* const s = scores.data + r * kScoreStride;
      f32 seen(0.f);
      for (index_t j = 0; j < scores.count; j += kLanes) {
        const f32 score = load(s + j);
        store(s + j, Relu::weight(score));
        seen = seen + select(score != masked, f32(1.f), f32(0.f));
      }
      states[r].keys += static_cast<std::int32_t>(reduce_add(seen));
      rescale[r] = 1.f;
    }
  }
  FOVEA_INLINE std::array<float, 2> merge(State& a, const State& b) const {
    a.keys += b.keys;
    return {1.f, 1.f};
  }
  FOVEA_INLINE Final finish(const State& state) const {
    if (state.keys == 0) return {0.f, -std::numeric_limits<float>::infinity()};
    const auto keys = static_cast<double>(state.keys);
    return {static_cast<float>(1. / keys), static_cast<float>(std::log(keys))};
  }
};

inline auto relu() { return variant().with_normalizer(ReluMean{}); }
inline auto relu(float keys) { return variant().with_normalizer(Relu{keys}); }

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
