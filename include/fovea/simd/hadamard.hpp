// SPDX-License-Identifier: Apache-2.0
// The orthonormal Hadamard transform of a row, in natural (Sylvester) order: H_1 = 1, H_2n = [[H_n, H_n], [H_n, -H_n]] /
// sqrt 2. It is its own inverse and changes no dot product of two transformed rows; it spreads outliers over all numbers,
// which is what codes of few bits want (QuaRot, DSA's indexer, Adamas).
//
// Sums first, the factor n^-1/2 last: rows of small integers have exact sums and one rounding.
#pragma once
#include <cmath>
#include <cstddef>
#include <utility>

#include "simd.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

inline constexpr index_t kMaxHadamard = 512;

// Powers of two from 1 to 512.
constexpr bool is_hadamard_size(index_t n) { return n >= 1 && n <= kMaxHadamard && (n & (n - 1)) == 0; }

namespace hadamard_steps {

using Floats = float __attribute__((vector_size(sizeof(f32))));

// Lane i gets lane i ^ step.
template <int step, std::size_t... i>
FOVEA_INLINE f32 swap_lanes(f32 x, std::index_sequence<i...>) {
  const auto lanes = static_cast<Floats>(static_cast<f32::register_type>(x));
  return f32(static_cast<f32::register_type>(__builtin_shufflevector(lanes, lanes, (static_cast<int>(i) ^ step)...)));
}

// 1 in lanes without the bit `step`, -1 in those with it.
template <int step>
FOVEA_INLINE f32 signs() {
  alignas(f32) float lanes[kLanes];
  FOVEA_UNROLL
  for (int i = 0; i < static_cast<int>(kLanes); ++i) lanes[i] = (i & step) != 0 ? -1.f : 1.f;
  return f32::load_aligned(lanes);
}

// The butterflies within a vector that are not wider than n.
template <int step, int Vectors>
FOVEA_INLINE void in_lanes(f32 (&x)[Vectors], index_t n) {
  if constexpr (step < static_cast<int>(kLanes)) {
    if (step >= n) return;
    const f32 sign = signs<step>();
    FOVEA_UNROLL
    for (int v = 0; v < Vectors; ++v) x[v] = fma(x[v], sign, swap_lanes<step>(x[v], std::make_index_sequence<f32::size>{}));
    in_lanes<2 * step>(x, n);
  }
}

FOVEA_INLINE void butterfly(f32& a, f32& b) {
  const f32 sum = a + b;
  b = a - b;
  a = sum;
}

// Vectors * kLanes numbers at once: in registers where there are 32 of them.
template <int Vectors>
FOVEA_INLINE void whole(float* x, index_t n, f32 factor) {
  f32 at[Vectors];
  FOVEA_UNROLL
  for (int v = 0; v < Vectors; ++v) at[v] = load(x + v * kLanes);
  in_lanes<1>(at, n);
  FOVEA_UNROLL
  for (int step = 1; step < Vectors; step *= 2) {
    FOVEA_UNROLL
    for (int v = 0; v < Vectors; ++v) {
      if ((v & step) == 0) butterfly(at[v], at[v | step]);
    }
  }
  FOVEA_UNROLL
  for (int v = 0; v < Vectors; ++v) store(x + v * kLanes, at[v] * factor);
}

}   // namespace hadamard_steps

// x [n] in place, n a power of two up to 512.
inline void hadamard(float* x, index_t n) {
  FOVEA_ASSERT(is_hadamard_size(n));
  constexpr int kHeld = 8;   // vectors at once
  const float last = static_cast<float>(1 / std::sqrt(static_cast<double>(n)));
  if (n < kLanes) {
    f32 few[1] = {load_some(x, n)};
    hadamard_steps::in_lanes<1>(few, n);
    store_some(x, few[0] * f32(last), n);
    return;
  }
  const index_t vectors = n / kLanes;
  switch (vectors) {
    case 1:
      return hadamard_steps::whole<1>(x, n, f32(last));
    case 2:
      return hadamard_steps::whole<2>(x, n, f32(last));
    case 4:
      return hadamard_steps::whole<4>(x, n, f32(last));
    case 8:
      return hadamard_steps::whole<kHeld>(x, n, f32(last));
    default:
      break;
  }
  for (index_t first = 0; first < n; first += kHeld * kLanes) hadamard_steps::whole<kHeld>(x + first, n, f32(1.f));
  for (index_t step = kHeld * kLanes; step < n; step *= 2) {
    const f32 factor(2 * step == n ? last : 1.f);
    for (index_t first = 0; first < n; first += 2 * step) {
      for (index_t i = first; i < first + step; i += kLanes) {
        f32 a = load(x + i), b = load(x + i + step);
        hadamard_steps::butterfly(a, b);
        store(x + i, a * factor);
        store(x + i + step, b * factor);
      }
    }
  }
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
