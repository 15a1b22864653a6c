// SPDX-License-Identifier: Apache-2.0
// Sigmoid attention (Ramapuram et al. 2024, arXiv 2409.04431):  o_i = sum_j sigmoid(s_ij + bias) v_j.
// No maximum, no sum, no LSE: partial results add. Not invariant to shifts, so ALiBi must be the true distance; that of the
// options is.
//
//   fovea::attention(q, k, v, out, {.causal = fovea::Causal::bottom_right}, fovea::sigmoid(fovea::sigmoid_bias(2048)));
#pragma once
#include <cmath>

#include "../call/merging.hpp"
#include "../call/variant.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

struct Sigmoid {
  float bias = 0.f;   // finite

  struct State {};

  Status check() const {
    if (std::isfinite(bias)) return {};
    return door::invalid("fovea: the bias of sigmoid attention is %g, must be finite", static_cast<double>(bias));
  }

  FOVEA_INLINE State begin(const Row&, bool) const { return {}; }
  FOVEA_INLINE void absorb(State*, const ScoreRows& scores, float* rescale) const {
    const f32 shift(bias * kLog2e);
    for (index_t r = 0; r < scores.rows; ++r) {
      float* const s = scores.data + r * kScoreStride;
      for (index_t j = 0; j < scores.count; j += kLanes) store(s + j, weight(fma(load(s + j), f32(kLog2e), shift)));
      rescale[r] = 1.f;
    }
  }
  FOVEA_INLINE std::array<float, 2> merge(State&, const State&) const { return {1.f, 1.f}; }
  FOVEA_INLINE Final finish(const State&) const { return {1.f, 0.f}; }

  // 1 / (1 + 2^-t) as e / (1 + e), e = 2^t: one exponential, one reciprocal, and exactly 0 for a masked score. At most 5 ULP
  // (3.9 found); 0 below 2^-100, where products with V would be denormal. From t = 30 on the quotient is that of 30, 1 in
  // fp32.
  FOVEA_INLINE static f32 weight(f32 t) {
    const f32 e = exp2(xsimd::min(f32(30.f), t), -100.f);   // min gives its second operand where that is NaN
    return e * reciprocal(f32(1.f) + e);
  }
};

// The paper's start, so that the weights of a row of `len` equal scores of 0 add up to len / (len + 1). It is a constant of
// the training length, not of the length at hand.
inline float sigmoid_bias(index_t len) { return len > 1 ? -std::log(static_cast<float>(len)) : 0.f; }

inline auto sigmoid(float bias) { return variant().with_normalizer(Sigmoid{bias}); }

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
