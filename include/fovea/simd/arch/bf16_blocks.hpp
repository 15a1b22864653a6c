// SPDX-License-Identifier: Apache-2.0
// The products of amx.hpp without tile registers: the dot product of bf16 pairs, which on Zen 4 makes twice the flops of fp32 FMAs.
#pragma once
#include "avx512_bf16.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// There is nothing to configure.
class TileRegisters {
 public:
  TileRegisters() {}
};

// c[m, n] = sum_k a[m, k] b[k, n] for m < 16 RowTiles, n < 32; with Onto, c[m, n] is where the sum starts. depth is even. An
// element is one chain of dot_pairs over rising k, whatever stands around it. Eight rows at a time: 16 chains hide the latency of
// 6, and a pair of rows of b is read once for all eight.
template <int RowTiles, bool Onto>
FOVEA_NOINLINE void tile_product(const bf16* a, index_t a_stride,   // [m, a_stride]
                                 const bf16* b, index_t b_stride,   // [k / 2, b_stride]: pairs (k, k + 1) of every n
                                 index_t depth, float* c, index_t c_stride) {
  constexpr int kRows = 8;
  for (index_t row = 0; row < 16 * RowTiles; row += kRows, a += kRows * a_stride, c += kRows * c_stride) {
    f32 sum[kRows][2];
    FOVEA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sum[r][0] = Onto ? load(c + r * c_stride) : f32(0.f);
      sum[r][1] = Onto ? load(c + r * c_stride + kLanes) : f32(0.f);
    }
    const bf16* right = b;
    for (index_t k = 0; k < depth; k += 2, right += b_stride) {
      const i32 first = load_pairs(right), second = load_pairs(right + 2 * kLanes);
      FOVEA_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const i32 left = broadcast_pair(a + r * a_stride + k);
        sum[r][0] = dot_pairs(left, first, sum[r][0]);
        sum[r][1] = dot_pairs(left, second, sum[r][1]);
      }
    }
    FOVEA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      store(c + r * c_stride, sum[r][0]);
      store(c + r * c_stride + kLanes, sum[r][1]);
    }
  }
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
