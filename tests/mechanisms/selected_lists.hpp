// SPDX-License-Identifier: Apache-2.0
// What key lists name, as a mask per query and key: a selection is then attention with options.keep, which has a reference.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "fovea/core/key_lists.hpp"
#include "support/dense.hpp"
#include "support/executors.hpp"

namespace test {

using fovea::KeyLists;

// How often each key is named, [sequence, q_head, query, key].
struct Named {
  index_t sequences, heads, len_q, len_k;
  std::vector<std::uint8_t> count;

  std::uint8_t& at(index_t b, index_t h, index_t i, index_t j) {
    return count[static_cast<std::size_t>(((b * heads + h) * len_q + i) * len_k + j)];
  }
  View<const std::uint8_t, 4> keep() const {
    return {count.data(), {sequences, heads, len_q, len_k}, {heads * len_q * len_k, len_q * len_k, len_k, 1}};
  }
  std::uint8_t most() const { return count.empty() ? std::uint8_t{0} : *std::max_element(count.begin(), count.end()); }
};

// Entries are cut at len_k; what a list names behind it fails the test.
inline Named named_by(std::span<const KeyLists> lists, index_t sequences, index_t heads, index_t len_q, index_t len_k) {
  Named named{sequences, heads, len_q, len_k,
              std::vector<std::uint8_t>(static_cast<std::size_t>(sequences * heads * len_q * len_k))};
  for (const KeyLists& kind : lists) {
    REQUIRE(kind.batch == sequences);
    REQUIRE(kind.heads == heads);
    REQUIRE(kind.q_blocks * kind.q_block >= len_q);
    const index_t step = kind.ranges ? 2 : 1;
    for (index_t list = 0; list < kind.batch * kind.heads * kind.q_blocks; ++list) {
      const index_t b = list / (kind.heads * kind.q_blocks), h = list / kind.q_blocks % kind.heads;
      const auto at = static_cast<std::size_t>(list);
      std::int32_t before = -1;
      for (index_t n = kind.begin[at]; n < kind.begin[at + 1]; n += step) {
        const index_t from = kind.ranges ? kind.entries[n] : kind.entries[n] * kind.k_block;
        const index_t to = kind.ranges ? kind.entries[n + 1] : from + kind.k_block;
        REQUIRE(kind.entries[n] > before);
        REQUIRE(from < to);
        REQUIRE(from < len_k);
        if (kind.ranges) REQUIRE(to <= len_k);
        before = kind.entries[n + step - 1] - (kind.ranges ? 1 : 0);
        const index_t first = list % kind.q_blocks * kind.q_block;
        for (index_t i = first; i < std::min(first + kind.q_block, len_q); ++i) {
          for (index_t j = from; j < std::min(to, len_k); ++j) ++named.at(b, h, i, j);
        }
      }
    }
  }
  return named;
}

inline View<const float, 2> head_of(Tensor<const float> x, index_t b, index_t h, index_t first, index_t count) {
  return {
      x.data + b * x.stride[0] + h * x.stride[1] + first * x.stride[2], {count, x.extent[3]}, {x.stride[2], x.stride[3]}};
}

// attend(Dense, AttentionOptions) -> its results: a sequence without keys, one with fewer keys than queries, none with queries.
template <class Attend>
void check_nothing_to_look_at(std::uint64_t seed, const AttentionOptions& causal, const Attend& attend) {
  const Dense x(seed, 2, 1, 1, 20, 30, 8, 8);
  const std::vector<index_t> len_k{0, 12};
  AttentionOptions options = causal;
  options.len_k = len_k;
  const auto r = attend(x, options);
  for (index_t i = 0; i < 20; ++i) {
    CHECK(r.at(0, 0, i, 3) == 0);
    CHECK(r.lse_at(0, 0, i) == -std::numeric_limits<float>::infinity());
    CHECK((r.lse_at(1, 0, i) == -std::numeric_limits<float>::infinity()) == (i < 8));
  }
  CHECK(attend(Dense(seed, 1, 1, 1, 0, 30, 8, 8), causal).lse.empty());
}

// `out` holds canaries only.
inline void check_refused(const fovea::Status& status, const Values& out, const char* words) {
  INFO(status.message());
  CHECK(!status.ok());
  CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
  CHECK(std::all_of(out.data.begin(), out.data.end(), is_canary));
}

}   // namespace test
