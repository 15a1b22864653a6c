// SPDX-License-Identifier: Apache-2.0
// Softmax-off-by-one (Miller 2023, "Attention Is Off By One"):  p_ij = exp(s_ij) / (1 + sum_j exp(s_ij)), softmax with a
// sink logit of 0 in every head. The 1 belongs to the unshifted sum: code that subtracts the row's maximum and still adds 1
// computes another function, which shifts of the scores do not change.
#pragma once
#include "../call/merging.hpp"
#include "../call/variant.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

struct OffByOne {
  static constexpr bool kHasLse = true;   // ln(1 + sum_j exp(s_ij)), 0 for an empty row

  using State = Softmax::State;

  FOVEA_INLINE State begin(const Row& row, bool whole_row) const {
    return whole_row ? State{0.f, 1.f} : Softmax{}.begin(row, false);
  }
  FOVEA_INLINE void absorb(State* states, const ScoreRows& scores, float* rescale) const {
    Softmax{}.absorb(states, scores, rescale);
  }
  FOVEA_INLINE std::array<float, 2> merge(State& a, const State& b) const { return Softmax{}.merge(a, b); }
  FOVEA_INLINE Final finish(const State& state) const { return Softmax{}.finish(state); }
};

inline auto off_by_one() { return variant().with_normalizer(OffByOne{}); }

// Partial results, each with its own 1. fovea::merge joins one such partial with others that are plain softmax.
inline Status merge_off_by_one(Tensor<float> out_a, View<float, 3> lse_a, Tensor<const float> out_b,
                               View<const float, 3> lse_b) {
  return merge_sharing(out_a, lse_a, out_b, lse_b, 1.f);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
