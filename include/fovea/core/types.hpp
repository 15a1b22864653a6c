// SPDX-License-Identifier: Apache-2.0
// The words every floor shares: the index type and the small enums of the public contract.
#pragma once
#include <cstddef>
#include <cstdint>

#include "config.hpp"

namespace fovea {
inline namespace v0 {

using index_t = std::ptrdiff_t;

// Where the causal diagonal starts when len_q != len_k: at key 0 (top_left) or such that the last query sees the last key.
enum class Causal : std::uint8_t { none, top_left, bottom_right };

// Inclusive distances: a query at position p sees the keys p - left .. p + right. A negative side is unbounded.
struct Window {
  index_t left = -1, right = -1;
};

// Two regimes of one engine. Prefill packs K and V once per key tile for many rows; decode reads them in place and splits
// the keys. `automatic` decides by the sequence's own len_q * group, never by the batch around it.
enum class Regime : std::uint8_t { automatic, prefill, decode };

}   // namespace v0
}   // namespace fovea
