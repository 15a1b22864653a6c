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

// f(j, chain) for the vectors j = 0, kLanes, ... < count, in four chains; unrolled, so that the chains stay in registers.
template <class F>
FOVEA_INLINE void for_each_vector(index_t count, const F& f) {
  index_t j = 0;
  for (; j + kScoreRun <= count; j += kScoreRun) {
    FOVEA_UNROLL
    for (index_t chain = 0; chain < 4; ++chain) f(j + chain * kLanes, chain);
  }
  FOVEA_UNROLL
  for (index_t chain = 0; chain < 3; ++chain) {
    if (j + chain * kLanes < count) f(j + chain * kLanes, chain);
  }
}

// Online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867), with an optional learned sink logit per head.
struct Softmax {
  const float* sink = nullptr;   // [q_head]
  bool with_lse = true;          // a logarithm per row, a third of the closing of a short one

  struct State {
    float reference;   // the largest score so far, natural units
    float sum;         // sum of exp(s - reference)
  };

  FOVEA_INLINE State begin(const Row& row, bool whole_row) const {
    if (!whole_row || sink == nullptr || sink[row.q_head] == kNothing) return {kNothing, 0.f};
    return {sink[row.q_head], 1.f};
  }

  // Two passes over the scores: the maxima of all rows, then weights and their sums. Row by row, each row would wait for its
  // maximum: 58 against 45 ns for 256 keys. The chains and lanes of the sum follow the key index, so a row's bits do not depend
  // on how many masked keys stand around its visible ones.
  FOVEA_INLINE void absorb(State* states, const ScoreRows& scores, float* rescale) const {
    FOVEA_ASSERT(scores.rows <= kMostGroupRows);
    for (index_t r = 0; r < scores.rows; ++r) {
      const float* const s = scores.data + r * kScoreStride;
      f32 top[4] = {f32(kNothing), f32(kNothing), f32(kNothing), f32(kNothing)};
      for_each_vector(scores.count, [&](index_t j, index_t chain) { top[chain] = xsimd::max(top[chain], load(s + j)); });
      const float tile_top = reduce_max(xsimd::max(xsimd::max(top[0], top[1]), xsimd::max(top[2], top[3])));
      const float reference = tile_top > states[r].reference ? tile_top : states[r].reference;
      rescale[r] = moved(states[r].reference, reference);
      states[r].reference = reference;
    }
    for (index_t r = 0; r < scores.rows; ++r) {
      // Nothing visible yet: any finite reference gives weights 0, and lets a NaN through.
      const float base = states[r].reference == kNothing ? 0.f : states[r].reference;
      const float shift = base * kLog2e;
      float* const s = scores.data + r * kScoreStride;
      f32 sum;
      if (std::abs(shift) < kLargeShift) {
        sum = to_weights(s, scores.count, [shift](f32 x) { return fma(x, f32(kLog2e), f32(-shift)); });
      } else {
        sum = to_weights(s, scores.count, [base](f32 x) { return (x - f32(base)) * f32(kLog2e); });
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
    if (state.sum == 0.f) return {0.f, kNothing};
    if (!with_lse) return {1.f / state.sum, 0.f};
    const double lse = static_cast<double>(state.reference) + std::log(static_cast<double>(state.sum));
    return {1.f / state.sum, static_cast<float>(lse)};
  }

 private:
  static constexpr float kNothing = -std::numeric_limits<float>::infinity();

  // One FMA makes the exponent of a weight: s log2 e - shift. The rounding of the shift is shared by sum and weights, in moved()
  // too, and cancels, as long as it is small against 1: beyond, subtract first and pay a second instruction. Without a fused
  // FMA the product is rounded too, and subtracting first costs nothing.
  static constexpr float kLargeShift = kFusedFma ? 0x1p23f : 0.f;

  // Weights below 2^-100 of the largest so far count as 0. Kept, their products with V are denormal, and a denormal costs an
  // assist of some 150 cycles in every FMA it meets: ALiBi with steep slopes ran at a third of its speed.
  static constexpr float kLowest = -100.f;

  template <class Exponent>
  FOVEA_INLINE static f32 to_weights(float* s, index_t count, const Exponent& exponent) {
    f32 sum[4] = {f32(0.f), f32(0.f), f32(0.f), f32(0.f)};
    for_each_vector(count, [&](index_t j, index_t chain) {
      const f32 weight = exp2(exponent(load(s + j)), kLowest);
      store(s + j, weight);
      sum[chain] += weight;
    });
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }

  // exp(from - to), for a reference that moves up: 2^(old shift - new shift), with the shifts as they were rounded.
  FOVEA_INLINE static float moved(float from, float to) {
    if (from == to) return 1.f;
    if (from == kNothing) return 0.f;
    return exp2(std::fma(from - to, kLog2e, residue(to) - residue(from)), kLowest);
  }
  // What the rounding of a shift lost; nothing where the large form subtracts the reference itself.
  FOVEA_INLINE static float residue(float reference) {
    const float shift = reference * kLog2e;
    return std::abs(shift) < kLargeShift ? std::fma(reference, kLog2e, -shift) : 0.f;
  }
};

// exp(s - lse) for a known LSE: the weights of a finished row; 0 for masked scores, also where the LSE is NaN.
struct GivenLse {
  FOVEA_INLINE static f32 weight(const f32& score, const f32& lse) {
    return select(score == f32(-std::numeric_limits<float>::infinity()), f32(0.f), exp2((score - lse) * f32(kLog2e)));
  }
  FOVEA_INLINE void weights(std::span<float> scores, float lse) const {
    float* const s = scores.data();
    const f32 reference(std::isinf(lse) && lse < 0.f ? 0.f : lse);
    for (index_t j = 0; j < static_cast<index_t>(scores.size()); j += kLanes) store(s + j, weight(load(s + j), reference));
  }
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
