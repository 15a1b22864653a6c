// SPDX-License-Identifier: Apache-2.0
// Which keys a query attends to, as lists: the one form that every sparse mechanism's selection takes. Plain data, owns nothing.
#pragma once
#include <cstdint>
#include <span>

#include "types.hpp"

namespace fovea {
inline namespace v0 {

// Lists [batch, head, q_block]: query i of a sequence uses the list i / q_block. Either CSR (`begin`) or rows of `capacity`
// entries, of which `count` are in use.
//   entries    entry e is the keys e * k_block .. e * k_block + k_block - 1 of the sequence, cut at its end; k_block 1: tokens.
//              With `ranges` the entries are pairs instead: keys first .. end - 1, any length, any alignment.
//   -1         any negative entry (a pair with a negative first) is skipped, wherever it stands. Entries behind the sequence's
//              last key are an error.
//   order      any; sorted lists are faster. A key that is listed twice counts twice in the softmax.
struct KeyLists {
  const std::int32_t* entries = nullptr;
  std::span<const index_t> begin{};          // CSR: [list + 1], counted in entries (with ranges: in numbers, two per range)
  index_t capacity = 0;                      // padded: numbers per list
  std::span<const std::int32_t> count{};     // padded: [list]  numbers in use; empty: all
  index_t batch = 1;                         // 1 = shared by all sequences
  index_t heads = 1;                         // 1 = shared by all heads; kv_heads or q_heads: each has its own
  index_t q_blocks = 1;                      // lists per head; q_blocks * q_block covers the longest sequence's queries
  index_t q_block = 1;                       // queries that share a list
  index_t k_block = 1;                       // keys of an entry
  bool ranges = false;

  FOVEA_DATA_INLINE KeyLists() {}
};

}   // namespace v0
}   // namespace fovea
