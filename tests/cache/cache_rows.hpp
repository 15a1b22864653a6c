// SPDX-License-Identifier: Apache-2.0
// Rows that say which token, head and half they belong to, and a reader that finds them by the words of core/kv.hpp alone.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "fovea/cache/rows.hpp"

namespace test {

using fovea::index_t;

// The bytes of one row of token `id`; none of them is 0xFF, so that it is never taken for poison.
inline std::vector<std::byte> row_of_token(std::uint64_t id, index_t kv_head, bool is_k, index_t bytes) {
  std::uint64_t mixed = (id * 64 + static_cast<std::uint64_t>(kv_head)) * 2 + (is_k ? 1 : 0);
  std::vector<std::byte> row(static_cast<std::size_t>(bytes));
  for (std::size_t n = 0; n < row.size(); ++n) {
    if (n % 7 == 0) mixed = (mixed ^ (mixed >> 29)) * 0xbf58476d1ce4e5b9u + n;
    row[n] = static_cast<std::byte>((mixed >> (8 * (n % 7))) & 0x7f);
  }
  return row;
}

inline index_t k_bytes(const fovea::CacheRows& rows) { return fovea::row_bytes(rows.k, rows.dim_qk); }
inline index_t v_bytes(const fovea::CacheRows& rows) { return fovea::row_bytes(rows.v, rows.dim_v); }

// What append calls for tokens ids[0], ids[1] ...
struct WriteTokens {
  const std::vector<std::uint64_t>& ids;
  fovea::CacheRows rows;

  void operator()(index_t token, index_t kv_head, std::byte* k_row, std::byte* v_row) const {
    const std::uint64_t id = ids[static_cast<std::size_t>(token)];
    const auto k = row_of_token(id, kv_head, true, k_bytes(rows));
    std::memcpy(k_row, k.data(), k.size());
    if (v_row == nullptr) return;
    const auto v = row_of_token(id, kv_head, false, v_bytes(rows));
    std::memcpy(v_row, v.data(), v.size());
  }
};

// Ready rows of tokens, [kv_head, token], with a few bytes between them so that strides matter.
struct ReadyRows {
  std::vector<std::byte> k_data, v_data;
  fovea::Stored k, v;

  ReadyRows(const std::vector<std::uint64_t>& ids, const fovea::CacheRows& rows) {
    const auto count = static_cast<index_t>(ids.size());
    const auto fill = [&](std::vector<std::byte>& data, fovea::Stored& stored, bool is_k, fovea::Format format,
                          index_t bytes) {
      const index_t token_stride = rows.kv_heads * (bytes + 3) + 5;
      data.assign(static_cast<std::size_t>(token_stride * (count + 1)), std::byte{0xff});
      stored = {data.data(), format, {0, bytes + 3, token_stride}};
      for (index_t token = 0; token < count; ++token) {
        for (index_t kv_head = 0; kv_head < rows.kv_heads; ++kv_head) {
          const auto row = row_of_token(ids[static_cast<std::size_t>(token)], kv_head, is_k, bytes);
          std::memcpy(data.data() + token * token_stride + kv_head * (bytes + 3), row.data(), row.size());
        }
      }
    };
    fill(k_data, k, true, rows.k, k_bytes(rows));
    fill(v_data, v, false, rows.v, v_bytes(rows));
  }
};

// Key j of sequence b as core/kv.hpp tells it.
inline const std::byte* stored_row(const fovea::Kv& kv, bool is_k, index_t sequence, index_t kv_head, index_t key) {
  const auto b = static_cast<std::size_t>(sequence);
  if (kv.exact != nullptr && key < kv.exact_first) return stored_row(*kv.exact, is_k, sequence, kv_head, key);
  if (kv.exact != nullptr && key >= kv.exact_from[b]) {
    return stored_row(*kv.exact, is_k, sequence, kv_head, kv.exact_first + key - kv.exact_from[b]);
  }
  const fovea::Stored& stored = is_k ? kv.k : kv.v;
  index_t entry = sequence, position = key;
  if (kv.home == fovea::Home::paged) {
    const index_t page = key / kv.len;
    entry = kv.block_table.data != nullptr ? kv.block_table(sequence, page)
                                           : kv.page_indices[static_cast<std::size_t>(kv.page_begin[b] + page)];
    position = key % kv.len;
  } else if (kv.home == fovea::Home::ring && key >= kv.sinks) {
    position = kv.sinks + (kv.ring_begin[b] + key - kv.sinks) % (kv.len - kv.sinks);
  }
  if (entry < 0 || entry >= kv.batch || position < 0 || position >= kv.len) return nullptr;
  return stored.data + entry * stored.stride[0] + kv_head * stored.stride[1] + position * stored.stride[2];
}

// Whether key j of a sequence is token `id`, in every head, K and V.
inline bool holds(const fovea::Kv& kv, index_t sequence, index_t key, std::uint64_t id, const fovea::CacheRows& rows) {
  for (index_t kv_head = 0; kv_head < rows.kv_heads; ++kv_head) {
    for (const bool is_k : {true, false}) {
      if (!is_k && rows.v_in_k) {
        if (stored_row(kv, false, sequence, kv_head, key) != stored_row(kv, true, sequence, kv_head, key)) return false;
        continue;
      }
      const auto expected = row_of_token(id, kv_head, is_k, is_k ? k_bytes(rows) : v_bytes(rows));
      const std::byte* const got = stored_row(kv, is_k, sequence, kv_head, key);
      if (got == nullptr || std::memcmp(got, expected.data(), expected.size()) != 0) return false;
    }
  }
  return true;
}

// Every byte of the rows a descriptor leads to. Head-major or token-major, the slots of all blocks fill one range.
inline std::string all_rows(const fovea::Kv& kv, const fovea::CacheRows& rows) {
  std::string bytes(reinterpret_cast<const char*>(kv.k.data), static_cast<std::size_t>(kv.batch * kv.k.stride[0]));
  if (!rows.v_in_k)
    bytes.append(reinterpret_cast<const char*>(kv.v.data), static_cast<std::size_t>(kv.batch * kv.v.stride[0]));
  return bytes;
}

inline void append_number(std::string& to, index_t number) {
  to.append(reinterpret_cast<const char*>(&number), sizeof number);
}

}   // namespace test
