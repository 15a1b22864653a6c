// SPDX-License-Identifier: Apache-2.0
// The words every floor shares: the index type, the storage types and the small enums of the public contract.
#pragma once
#include <cstddef>
#include <cstdint>

#include "config.hpp"

namespace fovea {
inline namespace v0 {

using index_t = std::ptrdiff_t;

// 16- and 8-bit numbers as stored: bits, no arithmetic (conversions: core/convert.hpp). bf16 is the upper half of an fp32, f16 is
// IEEE binary16; both may alias, because other libraries' halves are read through them. fp8_e4m3 has no infinity and one NaN
// pattern per sign, largest 448; fp8_e5m2 is IEEE-like, largest 57344.
struct __attribute__((may_alias)) bf16 {
  std::uint16_t bits;
};
struct __attribute__((may_alias)) f16 {
  std::uint16_t bits;
};
struct fp8_e4m3 {
  std::uint8_t bits;
};
struct fp8_e5m2 {
  std::uint8_t bits;
};

// Where the causal diagonal starts when len_q != len_k: at key 0 (top_left) or such that the last query sees the last key.
enum class Causal : std::uint8_t { none, top_left, bottom_right };

// Inclusive distances: a query at position p sees the keys p - left .. p + right. A negative side is unbounded.
struct Window {
  index_t left = -1, right = -1;
};

// Regimes of one engine. Prefill packs K and V once per key tile for many rows; decode reads them in place and splits the keys;
// wide decode packs and splits: some dozens of rows per kv head on a long cache (many query heads on one kv head, MLA, chunks
// of a draft). `automatic` decides by the sequence's own len_q * group and the panels, never by the batch around it; over lists of keys
// the longest sequence decides for all (docs/sparse.md).
enum class Regime : std::uint8_t { automatic, prefill, decode, wide_decode };

// The numbers in which packed regimes multiply. f32: exact products, one rounding per sum. bf16: q, k, v and the weights are
// rounded to 8 bits of mantissa and multiplied in AMX tiles or by the CPU's bf16 dot product, with fp32 sums (docs/numerics.md
// has the error); needs AVX-512 BF16; faster than f32 with AMX, or where the dot product beats fp32 FMAs.
enum class Panels : std::uint8_t { f32, bf16 };

}   // namespace v0
}   // namespace fovea
