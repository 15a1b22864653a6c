// SPDX-License-Identifier: Apache-2.0
// AMX: eight tile registers of 16 rows of 64 bytes, and products of tiles of bf16 with fp32 sums. On Sapphire Rapids one
// product of 16 x 32 and 32 x 16 numbers takes 16 cycles, a load from L1 8, a store 16: 1600 to 2000 GFLOP/s from registers
// and 1100 to 1800 with the loads of 2 x 2 tiles, where fp32 FMAs do 140.
#pragma once
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#include "avx512_bf16.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// Linux gives the tile registers (8 KiB of state a thread) only to a process that asks for them: ARCH_REQ_XCOMP_PERM of
// XFEATURE_XTILEDATA (Documentation/arch/x86/xstate.rst). The answer is for good, for all threads.
inline bool tiles_allowed() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return allowed;
}

// While one of these lives, this thread's tile registers are 16 x 64 bytes each. What they were configured to before comes back
// (calls may be nested: a functor of the caller's may attend itself), what they held does not. A thread that gives them back has
// less to save at a switch.
class TileRegisters {
 public:
  TileRegisters() {
    asm volatile("" : "+m"(before_));   // to g++ 12 these instructions touch 8 bytes alone
    _tile_storeconfig(&before_);
    asm volatile("" : "+m"(before_));
    Shape shape;
    shape.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      shape.row_bytes[tile] = 64;
      shape.rows[tile] = 16;
    }
    asm volatile("" : "+m"(shape));
    _tile_loadconfig(&shape);
  }
  ~TileRegisters() {
    if (before_.palette == 0) {
      _tile_release();
    } else {
      _tile_loadconfig(&before_);
    }
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  struct alignas(64) Shape {
    std::uint8_t palette = 0, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
  };
  static_assert(sizeof(Shape) == 64);
  Shape before_;
};

// c[m, n] = sum_k a[m, k] b[k, n] for m < 16 RowTiles, n < 32; with Onto, c[m, n] is where the sum starts. depth is a
// multiple of 32. Of every 32 k the even and the odd ones are chains of their own from 0, whose sum is added to the element, whatever
// the tile around it. Denormals are read and written as zeros, sums round to the nearest even (Intel SDM, TDPBF16PS).
template <int RowTiles, bool Onto>
FOVEA_NOINLINE void tile_product(const bf16* a, index_t a_stride,   // [m, a_stride]
                                 const bf16* b, index_t b_stride,   // [k / 2, b_stride]: pairs (k, k + 1) of every n
                                 index_t depth, float* c, index_t c_stride) {
  constexpr index_t kDepth = 32, kSide = 16;
  const index_t a_bytes = 2 * a_stride, b_bytes = 2 * b_stride, c_bytes = 4 * c_stride;
  float* const lower = c + kSide * c_stride;
  asm volatile("" ::: "memory");   // g++ 12 does not know that tile loads read memory
  if constexpr (Onto) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + kSide, c_bytes);
    if constexpr (RowTiles == 2) _tile_loadd(2, lower, c_bytes);
    if constexpr (RowTiles == 2) _tile_loadd(3, lower + kSide, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (index_t k = 0; k < depth; k += kDepth, a += kDepth, b += kDepth / 2 * b_stride) {
    const auto* const next = reinterpret_cast<const char*>(b + kDepth / 2 * b_stride);   // 5 to 25 % faster from L2
    _tile_loadd(6, b, b_bytes);
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(7, b + 2 * kSide, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    for (index_t row = 0; row < kSide; ++row) _mm_prefetch(next + row * b_bytes, _MM_HINT_T0);
    _tile_dpbf16ps(1, 4, 7);
    for (index_t row = 0; row < kSide; ++row) _mm_prefetch(next + row * b_bytes + 64, _MM_HINT_T0);
    if constexpr (RowTiles == 2) _tile_loadd(5, a + kSide * a_stride, a_bytes);
    if constexpr (RowTiles == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (RowTiles == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + kSide, c_bytes);
  if constexpr (RowTiles == 2) _tile_stored(2, lower, c_bytes);
  if constexpr (RowTiles == 2) _tile_stored(3, lower + kSide, c_bytes);
  asm volatile("" ::: "memory");
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
