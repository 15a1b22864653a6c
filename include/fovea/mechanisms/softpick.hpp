// SPDX-License-Identifier: Apache-2.0
// Softpick (Zuhri et al. 2025, arXiv 2504.20966):  p_ij = relu(e^s_ij - 1) / (sum_j |e^s_ij - 1| + epsilon).
// Keys with s <= 0 get exactly 0, rows add up to at most 1, and no sink grows. Online: m = max(0, max_j s_ij), so that
// neither e^(s - m) nor e^-m can overflow, which m = max_j s_ij does not give for rows of very negative scores. epsilon is
// that of the equation, e^-m epsilon in the scaled sums; code that adds it to sums scaled by e^-m differs by up to epsilon
// (e^m - 1).
#pragma once
#include <cmath>
#include <limits>

#include "../call/merging.hpp"
#include "../call/variant.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

struct Softpick {
  static constexpr bool kHasLse = true;   // ln(sum_j |e^s_ij - 1| + epsilon)
  static constexpr float kEpsilon = 1e-6f;
  float epsilon = kEpsilon;   // positive: a row of scores that are all 0 divides by it

  struct State {
    float reference;   // max(0, the largest score so far)
    float sum;         // of |e^s - 1| e^-reference over the visible keys
  };

  Status check() const {
    if (epsilon > 0.f && std::isfinite(epsilon)) return {};
    return door::invalid("fovea: the epsilon of softpick is %g, must be positive and finite", static_cast<double>(epsilon));
  }
  FOVEA_INLINE State begin(const Row&, bool) const { return {0.f, 0.f}; }

  FOVEA_INLINE void absorb(State* states, const ScoreRows& scores, float* rescale) const {
    for (index_t r = 0; r < scores.rows; ++r) {
      const float* const s = scores.data + r * kScoreStride;
      f32 top(states[r].reference);
      for (index_t j = 0; j < scores.count; j += kLanes) top = xsimd::max(top, load(s + j));
      const float reference = reduce_max(top);
      rescale[r] = moved(states[r].reference, reference);
      states[r].reference = reference;
    }
    const f32 masked(-std::numeric_limits<float>::infinity());
    for (index_t r = 0; r < scores.rows; ++r) {
      const f32 reference(states[r].reference), one(exp2(states[r].reference * -kLog2e, kLowest));
      float* const s = scores.data + r * kScoreStride;
      f32 sum(0.f);
      for (index_t j = 0; j < scores.count; j += kLanes) {
        const f32 score = load(s + j);
        const f32 large = exp2((score - reference) * f32(kLog2e), kLowest) - one;
        const f32 picked = select(abs(score) < f32(kSmall), expm1_small(score) * one, large);
        store(s + j, xsimd::max(f32(0.f), picked));                   // second operand where that is NaN
        sum = sum + select(score != masked, abs(picked), f32(0.f));   // a masked key is no key of weight |0 - 1|
      }
      states[r].sum = std::fma(states[r].sum, rescale[r], reduce_add(sum));
    }
  }

  FOVEA_INLINE std::array<float, 2> merge(State& a, const State& b) const {
    const float reference = b.reference > a.reference ? b.reference : a.reference;
    const std::array<float, 2> factor = {moved(a.reference, reference), moved(b.reference, reference)};
    a.sum = std::fma(a.sum, factor[0], b.sum * factor[1]);
    a.reference = reference;
    return factor;
  }

  FOVEA_INLINE Final finish(const State& state) const {
    const auto reference = static_cast<double>(state.reference);
    const double sum = static_cast<double>(state.sum) + static_cast<double>(epsilon) * std::exp(-reference);
    return {static_cast<float>(1. / sum), static_cast<float>(reference + std::log(sum))};
  }

  // e^x - 1 for |x| < kSmall, at most 2 ULP (1.1 found); degree 7, relative error 1.5e-8 before rounding. A difference of
  // two exponentials within 3 ULP would be off by up to 2^-24 (6 e^x + 6) / |e^x - 1|: 24 units at 0.5, 12,000 at 0.001.
  static constexpr float kSmall = 0.5f;
  FOVEA_INLINE static f32 expm1_small(f32 x) {
    f32 p = fma(x, f32(1.9849810632877052e-4f), f32(1.3996176421642303e-3f));
    p = fma(x, p, f32(8.333578705787659e-3f));
    p = fma(x, p, f32(4.166536033153534e-2f));
    p = fma(x, p, f32(0.166666641831398f));
    p = fma(x, p, f32(0.5000000596046448f));
    return fma(x * x, p, x);
  }

 private:
  static constexpr float kLowest = -100.f;   // as in softmax: smaller weights make denormal products

  FOVEA_INLINE static float moved(float from, float to) { return from == to ? 1.f : exp2((from - to) * kLog2e, kLowest); }
};

inline auto softpick(float epsilon = Softpick::kEpsilon) { return variant().with_normalizer(Softpick{epsilon}); }

// Partial results made with the same epsilon, with their LSE.
inline Status merge_softpick(Tensor<float> out_a, View<float, 3> lse_a, Tensor<const float> out_b,
                             View<const float, 3> lse_b, float epsilon = Softpick::kEpsilon) {
  return merge_sharing(out_a, lse_a, out_b, lse_b, epsilon);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
