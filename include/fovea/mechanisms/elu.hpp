// SPDX-License-Identifier: Apache-2.0
// ELU + 1 on the scores (Gu et al. 2024, arXiv 2410.10781, where attention without normalisation grows no sink):
//   p_ij = s_ij + 1 if s_ij > 0, else exp(s_ij);   o_i = sum_j p_ij v_j,   or   sum_j p_ij v_j / (sum_j p_ij + 1e-8)
// Grows linearly: no maximum is needed. The form that maps q and k instead of their product is linear attention.
#pragma once
#include <cmath>

#include "../call/merging.hpp"
#include "../call/variant.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// Partial results add.
struct Elu {
  struct State {};

  FOVEA_INLINE State begin(const Row&, bool) const { return {}; }
  FOVEA_INLINE void absorb(State*, const ScoreRows& scores, float* rescale) const {
    for (index_t r = 0; r < scores.rows; ++r) {
      float* const s = scores.data + r * kScoreStride;
      for (index_t j = 0; j < scores.count; j += kLanes) store(s + j, weight(load(s + j)));
      rescale[r] = 1.f;
    }
  }
  FOVEA_INLINE std::array<float, 2> merge(State&, const State&) const { return {1.f, 1.f}; }
  FOVEA_INLINE Final finish(const State&) const { return {1.f, 0.f}; }

  // e^min(s, 0) + max(s, 0), one of the two exactly 1 or 0. At most 4 ULP, and below 0 the rounding of s log2 e, a relative
  // error of up to 2^-23 |s|; 0 below 2^-100, as in softmax.
  FOVEA_INLINE static f32 weight(f32 s) {   // min and max give their second operand where that is NaN
    return exp2(xsimd::min(f32(0.f), s) * f32(kLog2e), -100.f) + xsimd::max(f32(0.f), s);
  }
};

// LSE = ln(sum_j p_ij + 1e-8).
struct EluNormalized {
  static constexpr bool kHasLse = true;
  static constexpr float kEpsilon = 1e-8f;

  struct State {
    float sum;
  };

  FOVEA_INLINE State begin(const Row&, bool) const { return {0.f}; }
  FOVEA_INLINE void absorb(State* states, const ScoreRows& scores, float* rescale) const {
    for (index_t r = 0; r < scores.rows; ++r) {
      float* const s = scores.data + r * kScoreStride;
      f32 sum(0.f);
      for (index_t j = 0; j < scores.count; j += kLanes) {
        const f32 weight = Elu::weight(load(s + j));
        store(s + j, weight);
        sum = sum + weight;
      }
      states[r].sum += reduce_add(sum);
      rescale[r] = 1.f;
    }
  }
  FOVEA_INLINE std::array<float, 2> merge(State& a, const State& b) const {
    a.sum += b.sum;
    return {1.f, 1.f};
  }
  FOVEA_INLINE Final finish(const State& state) const {
    const double sum = static_cast<double>(state.sum) + static_cast<double>(kEpsilon);
    return {static_cast<float>(1. / sum), static_cast<float>(std::log(sum))};
  }
};

inline auto elu() { return variant().with_normalizer(Elu{}); }
inline auto elu_normalized() { return variant().with_normalizer(EluNormalized{}); }

// Partial results of elu_normalized; those of elu are merge_added.
inline Status merge_elu_normalized(Tensor<float> out_a, View<float, 3> lse_a, Tensor<const float> out_b,
                                   View<const float, 3> lse_b) {
  return merge_sharing(out_a, lse_a, out_b, lse_b, EluNormalized::kEpsilon);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
