// SPDX-License-Identifier: Apache-2.0
// Weights that are exactly 0 for all but the keys that matter, in place of softmax: sparsemax (Martins and Astudillo 2016,
// arXiv 1602.02068), 1.5-entmax and alpha-entmax (Peters, Niculae and Martins 2019, arXiv 1905.05702):
//   p_j = max((alpha - 1) s_j - tau, 0)^(1 / (alpha - 1)),  tau such that they add up to 1; sparsemax is alpha = 2.
//
//   fovea::attention(q, k, v, out, {.causal = fovea::Causal::bottom_right}, fovea::entmax15());
//
// tau needs the whole row, so rows of scores are kept (the strip form): no LSE, no merge, and decode splits no keys.
//
// With g_j = max s - s_j, power = 1 / (alpha - 1), t = (alpha - 1) max s - tau and q_j = max(1 - g_j / (power t), 0) the
// weights are q_j^power / S with S = sum q_j^power, and t is the root of t = S(t)^(-1 / power) in (0, 1]. S grows with t, so
// the root lies between any t and S(t)^(-1 / power). For alpha <= 2 the norm N(t) = t S^(1 / power) is convex, and Newton's
// steps on N(t) = 1 fall to the root without passing it; (N - 1) N' shrinks at least by 4 a step, which bounds them by 12 +
// log2(n) / power for n keys. Rows of 4096 scores take 3 to 10 from t = 1. For sparsemax they are Michelot's steps, exact
// once the support stands.
#pragma once
#include <bit>
#include <cmath>
#include <limits>

#include "../call/variant.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// q^power and q^(power - 1) for q = max(1 - gap * inverse, 0).
struct PowerTerms {
  f32 weight, slope;
};

struct SparsemaxPower {
  FOVEA_INLINE float power() const { return 1.f; }
  FOVEA_INLINE float root(float sum) const { return 1.f / sum; }
  FOVEA_INLINE PowerTerms terms(f32 gap, f32 inverse) const {
    const f32 q = fma(gap, -inverse, f32(1.f));
    const keep_t none = q <= f32(0.f);   // a NaN is not
    return {select(none, f32(0.f), q), select(none, f32(0.f), f32(1.f))};
  }
};

struct Entmax15Power {
  FOVEA_INLINE float power() const { return 2.f; }
  FOVEA_INLINE float root(float sum) const { return 1.f / std::sqrt(sum); }
  FOVEA_INLINE PowerTerms terms(f32 gap, f32 inverse) const {
    const f32 line = fma(gap, -inverse, f32(1.f)), q = select(line <= f32(0.f), f32(0.f), line);
    return {q * q, q};
  }
};

// log2 x of a normal x > 0: relative error 2.6e-8 before rounding, near 1 too.
FOVEA_INLINE f32 entmax_log2(f32 x) {
  const i32 bits = std::bit_cast<i32>(x), exponent = (bits - i32(0x3f3504f3)) >> 23;   // of x / sqrt(1/2)
  const f32 f = as_float(bits - (exponent << 23)) - f32(1.f);                          // exact, in [-0.293, 0.414]
  f32 p = fma(f, f32(0.12583698332309723f), f32(-0.20726972818374634f));
  p = fma(f, p, f32(0.21571561694145203f));
  p = fma(f, p, f32(-0.23894482851028442f));
  p = fma(f, p, f32(0.28791624307632446f));
  p = fma(f, p, f32(-0.3607036769390106f));
  p = fma(f, p, f32(0.48091062903404236f));
  p = fma(f, p, f32(-0.7213473320007324f));
  p = fma(f, p, f32(1.4426950216293335f));
  return fma(f, p, to_float(exponent));
}

// Any alpha in (1, 4]. Near 1 the power is large: what the rounding of q loses goes back into its logarithm, so that a
// weight has the accuracy of a softmax weight. Weights below 2^-100 of the largest count as 0, as in softmax.
struct EntmaxPower {
  float alpha;

  Status check() const {
    if (alpha > 1.f && alpha <= 4.f) return {};
    return door::invalid("fovea: entmax needs 1 < alpha <= 4, got %g", static_cast<double>(alpha));
  }
  FOVEA_INLINE float power() const { return 1.f / (alpha - 1.f); }
  FOVEA_INLINE float root(float sum) const {
    return static_cast<float>(std::pow(static_cast<double>(sum), 1. - static_cast<double>(alpha)));
  }
  FOVEA_INLINE PowerTerms terms(f32 gap, f32 inverse) const {
    const f32 q = fma(gap, -inverse, f32(1.f));
    const keep_t none = q <= f32(0.f);
    if (xsimd::all(none)) return {f32(0.f), f32(0.f)};
    const f32 safe = select(none, f32(1.f), q), lost = fma(gap, -inverse, f32(1.f) - q);
    const f32 exponent = fma(lost, f32(kLog2e), entmax_log2(safe)) * f32(power());
    const f32 weight = select(none, f32(0.f), exp2(exponent, -100.f));
    return {weight, weight * reciprocal(safe)};
  }
};

template <class Power>
struct EntmaxNormalizer {
  Power power;

  Status check() const {
    if constexpr (requires { power.check(); }) {
      return power.check();
    } else {
      return {};
    }
  }
  FOVEA_INLINE Final weigh_row(const Row&, std::span<float> scores, std::span<float> scratch) const {
    float *const s = scores.data(), *const gaps = scratch.data();
    const auto count = static_cast<index_t>(scores.size());
    FOVEA_ASSERT(count % kScoreRun == 0 && scratch.size() >= scores.size());
    if (count == 0) return {0.f, 0.f};
    f32 tops[4] = {f32(kNothing), f32(kNothing), f32(kNothing), f32(kNothing)};
    for_each_vector(count, [&](index_t j, index_t chain) { tops[chain] = xsimd::max(tops[chain], load(s + j)); });
    const float largest = reduce_max(xsimd::max(xsimd::max(tops[0], tops[1]), xsimd::max(tops[2], tops[3])));
    // Without a visible key any finite reference gives weights 0, and lets a NaN through.
    const f32 top(largest == kNothing ? 0.f : largest);
    // Fewer keys have a larger t. That of the largest keys of the lanes, which costs next to nothing, is a good start, and
    // leaves few keys to look at: with it sparsemax takes 0.3 instead of 0.9 ns a key, 1.5-entmax 0.5 instead of 0.8 (2048
    // Gaussian scores).
    for (index_t chain = 0; chain < 4; ++chain) store(gaps + chain * kLanes, top - tops[chain]);
    const float start = solve(gaps, kScoreRun, 1.f);
    const index_t kept = keep_candidates(s, count, top, start, gaps);
    if (kept == 0) {
      std::fill_n(s, count, 0.f);
      return {0.f, 0.f};
    }
    const f32 inverse(1.f / (power.power() * solve(gaps, kept, start)));
    f32 sum[4] = {f32(0.f), f32(0.f), f32(0.f), f32(0.f)};
    for_each_vector(count, [&](index_t j, index_t chain) {
      const f32 weight = power.terms(top - load(s + j), inverse).weight;
      store(s + j, weight);
      sum[chain] += weight;
    });
    return {1.f / reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])), 0.f};
  }

 private:
  static constexpr float kNothing = -std::numeric_limits<float>::infinity();
  static constexpr float kUlps = 0x1p-22f;
  static constexpr int kMostSteps = 64;   // bisection, for alpha > 2, takes 24 and some

  // The gaps to the top of the vectors that hold a key with weight at t, one after the other, in whole runs. Which vectors
  // these are depends on visible keys alone, and so do the bits of all sums over them.
  FOVEA_INLINE index_t keep_candidates(const float* s, index_t count, f32 top, float t, float* gaps) const {
    const f32 widest(power.power() * t);
    index_t kept = 0;
    for (index_t j = 0; j < count; j += kLanes) {
      const f32 gap = top - load(s + j);
      store(gaps + kept, gap);
      kept += xsimd::all(gap >= widest) ? 0 : kLanes;   // a NaN stays
    }
    for (; kept % kScoreRun != 0; kept += kLanes) store(gaps + kept, f32(-kNothing));
    return kept;
  }

  // The root, from a t that is not below it.
  FOVEA_INLINE float solve(const float* gaps, index_t count, float t) const {
    float low = 0.f, high = 1.f;
    for (int step = 0; step < kMostSteps; ++step) {
      const f32 inverse(1.f / (power.power() * t));
      f32 sum[4] = {f32(0.f), f32(0.f), f32(0.f), f32(0.f)}, slope[4] = {f32(0.f), f32(0.f), f32(0.f), f32(0.f)};
      for_each_vector(count, [&](index_t j, index_t chain) {
        const PowerTerms terms = power.terms(load(gaps + j), inverse);
        sum[chain] += terms.weight;
        slope[chain] += terms.slope;
      });
      const float total = reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
      const float slopes = reduce_add((slope[0] + slope[1]) + (slope[2] + slope[3]));
      const float other = power.root(total);
      low = std::max(low, std::min(t, other));
      high = std::min(high, std::max(t, other));
      const float next = power.power() < 1.f ? 0.5f * (low + high) : std::fma(other - t, total / slopes, t);
      if (!(std::abs(next - t) > kUlps * t)) break;   // with a NaN among the scores at once
      t = next;
    }
    return t;
  }
};

using Sparsemax = EntmaxNormalizer<SparsemaxPower>;
using Entmax15 = EntmaxNormalizer<Entmax15Power>;
using Entmax = EntmaxNormalizer<EntmaxPower>;

constexpr auto sparsemax() { return variant().with_normalizer(Sparsemax{}); }
constexpr auto entmax15() { return variant().with_normalizer(Entmax15{}); }
// 1 < alpha <= 4; any other alpha is refused by the call.
constexpr auto entmax(float alpha) { return variant().with_normalizer(Entmax{{alpha}}); }

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
