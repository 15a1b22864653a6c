// SPDX-License-Identifier: Apache-2.0
// The words the engines and the policies share. Plain data, the same bytes in every translation unit.
#pragma once
#include <array>
#include <cstddef>
#include <span>

#include "types.hpp"

namespace fovea {
inline namespace v0 {

// Who is asking: one query of one head. `pos` is its absolute position (masks, ALiBi), q_index its place in its sequence.
struct Row {
  index_t pos;
  index_t q_index;
  int sequence, q_head, kv_head;
};

// Any rows of one sequence that share a kv head, against the keys [k_begin, k_end) of that sequence.
struct Tile {
  std::span<const Row> rows;
  index_t k_begin, k_end;
};

// A run of stored K or V vectors, `stride` bytes apart. What is read next lies `ahead` bytes behind each of them: inside the
// run where it is long, at the start of the next page where it is short.
struct Segment {
  const std::byte* data;
  index_t stride, count;
  index_t ahead;
};

// What closes a row: its accumulator times `scale` is the output.
struct Final {
  float scale, lse;
};

enum class Cover : std::uint8_t { skip, partial, full };

}   // namespace v0
}   // namespace fovea
