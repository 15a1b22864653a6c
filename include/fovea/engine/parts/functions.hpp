// SPDX-License-Identifier: Apache-2.0
// Callables as policies. A score is f(s, batch, q_head, q, k), a mask f(batch, q_head, q, k): the signatures of FlexAttention
// (PyTorch 2.5). batch, q_head and q are ints, q and k positions; s is a vector of scores and k one of int32 positions, so the
// text must work on vectors: arithmetic, comparisons, &, |, ! and the functions of simd/lookup.hpp, which take plain
// numbers as well. The same text then serves the double reference.
#pragma once
#include "../../simd/lookup.hpp"
#include "../policies.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

template <class F>
struct ScoreFunction {
  F f;

  struct Lane {
    const F& f;
    int batch, q_head, q;
    FOVEA_INLINE f32 operator()(f32 s, i32 k) const { return f(s, batch, q_head, q, k); }
  };
  FOVEA_INLINE Lane at(const Row& row) const { return {f, row.sequence, row.q_head, static_cast<int>(row.pos)}; }
};

// As in parts/scores.hpp.
template <class F>
double score_of(const ScoreFunction<F>& score, double s, int batch, int q_head, int q, int k) {
  return score.f(s, batch, q_head, q, k);
}

FOVEA_INLINE keep_t keep_of(keep_t keep) { return keep; }
FOVEA_INLINE keep_t keep_of(xsimd::batch_bool<std::int32_t> keep) { return as_keep(keep); }
FOVEA_INLINE keep_t keep_of(bool keep) { return f32(keep ? 1.f : 0.f) != f32(0.f); }

// A mask that says nothing about tiles is asked key by key in every tile; a BlockMask made from it saves that.
template <class F>
struct MaskFunction {
  F f;

  struct Lane {
    const F& f;
    int batch, q_head, q;
    FOVEA_INLINE keep_t operator()(i32 k) const { return keep_of(f(batch, q_head, q, k)); }
  };
  FOVEA_INLINE Lane at(const Row& row) const { return {f, row.sequence, row.q_head, static_cast<int>(row.pos)}; }
  FOVEA_INLINE KeyRange hull(std::span<const Row>) const { return {0, PTRDIFF_MAX}; }
  FOVEA_INLINE Cover cover(const Tile&) const { return Cover::partial; }
};

template <class F>
ScoreFunction<F> score_mod(F f) {
  return {f};
}
template <class F>
MaskFunction<F> mask_mod(F f) {
  return {f};
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
