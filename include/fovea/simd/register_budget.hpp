// SPDX-License-Identifier: Apache-2.0
// How many accumulators a micro-kernel may keep in registers.
#pragma once
#include "vectors.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr index_t kRegisters = 32;
#else
inline constexpr index_t kRegisters = 16;
#endif

// Prefill tile: kTileRows rows times kPanelVectors vectors. With two FMAs a cycle of latency 4, eight accumulators are the
// least; more rows mean fewer bytes of the streamed panel per FMA (12 x 2: 128 bytes in 12 cycles).
inline constexpr index_t kTileRows = kRegisters == 32 ? 12 : 6;
inline constexpr index_t kPanelVectors = 2;
inline constexpr index_t kPanel = kPanelVectors * kLanes;
static_assert(kTileRows * kPanelVectors + kPanelVectors + 1 <= kRegisters, "accumulators, panel vectors and one broadcast");

// Decode tile: up to 4 rows against 4 keys (scores), or against kStreamAccumulators / rows vectors of V.
inline constexpr index_t kStreamRows = 4, kStreamKeys = 4;
inline constexpr index_t kStreamAccumulators = kRegisters == 32 ? 16 : 8;

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
