// SPDX-License-Identifier: Apache-2.0
// Key lists that own their numbers, made at random, and what they mean to a dense reference: a key that is listed n times has
// log n added to its score, one that is not listed -inf.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "fovea/core/key_lists.hpp"
#include "fovea/core/view.hpp"
#include "random.hpp"

namespace test {

using fovea::index_t;
using fovea::KeyLists;

struct OwnedLists {
  std::vector<std::int32_t> entries, count;
  std::vector<index_t> begin;
  KeyLists lists;   // without pointers; view() adds them

  KeyLists view() const {
    KeyLists all = lists;
    all.entries = entries.data();
    all.begin = begin;
    all.count = count;
    return all;
  }
};

struct ListShape {
  index_t batch = 1, heads = 1, len_q = 1, q_block = 1, k_block = 1;
  bool ranges = false, csr = false, sorted = true, holes = false, duplicates = false;
  double density = 0.3;   // of the entries there are
};

// len_k [batch]: the keys of each sequence; shared lists (batch 1) name those of the shortest.
inline OwnedLists random_lists(Random& random, const ListShape& shape, const std::vector<index_t>& len_k) {
  OwnedLists made;
  KeyLists& l = made.lists;
  l.batch = shape.batch;
  l.heads = shape.heads;
  l.q_block = shape.q_block;
  l.k_block = shape.ranges ? 1 : shape.k_block;
  l.ranges = shape.ranges;
  l.q_blocks = (shape.len_q + shape.q_block - 1) / shape.q_block;
  std::vector<std::vector<std::int32_t>> all;
  for (index_t n = 0; n < shape.batch * shape.heads * l.q_blocks; ++n) {
    const index_t b = n / (shape.heads * l.q_blocks);
    const index_t keys =
        shape.batch == 1 ? *std::min_element(len_k.begin(), len_k.end()) : len_k[static_cast<std::size_t>(b)];
    std::vector<std::int32_t> chosen;
    for (index_t e = 0; e * shape.k_block < keys; ++e) {
      if (random.uniform() >= shape.density) continue;
      for (index_t again = shape.duplicates && random.one_in(4) ? 2 : 1; again > 0; --again)
        chosen.push_back(static_cast<std::int32_t>(e));
    }
    if (!shape.sorted) {
      for (std::size_t i = chosen.size(); i > 1; --i)
        std::swap(chosen[i - 1], chosen[static_cast<std::size_t>(random.below(static_cast<index_t>(i)))]);
    }
    std::vector<std::int32_t> numbers;
    for (const std::int32_t e : chosen) {
      if (shape.holes && random.one_in(3)) {
        numbers.push_back(-1);
        if (shape.ranges) numbers.push_back(7);
      }
      if (shape.ranges) {
        const index_t first = e * shape.k_block + random.below(shape.k_block);
        numbers.push_back(static_cast<std::int32_t>(std::min(first, keys - 1)));
        numbers.push_back(static_cast<std::int32_t>(std::min(first + random.between(0, 2 * shape.k_block), keys)));
      } else {
        numbers.push_back(e);
      }
    }
    all.push_back(numbers);
  }
  if (shape.csr) {
    made.begin.push_back(0);
    for (const auto& numbers : all) {
      made.entries.insert(made.entries.end(), numbers.begin(), numbers.end());
      made.begin.push_back(static_cast<index_t>(made.entries.size()));
    }
  } else {
    std::size_t capacity = 0;
    for (const auto& numbers : all) capacity = std::max(capacity, numbers.size());
    l.capacity = static_cast<index_t>(capacity) + 2;
    for (const auto& numbers : all) {
      made.entries.insert(made.entries.end(), numbers.begin(), numbers.end());
      made.entries.insert(made.entries.end(), static_cast<std::size_t>(l.capacity) - numbers.size(), INT32_MAX);   // unused
      made.count.push_back(static_cast<std::int32_t>(numbers.size()));
    }
  }
  return made;
}

// How often the lists name key j for query i of (sequence, q head).
inline index_t times_listed(std::span<const KeyLists> kinds, index_t b, index_t head, index_t q_heads, index_t i, index_t j,
                            index_t len_k) {
  index_t times = 0;
  for (const KeyLists& kind : kinds) {
    const index_t own = kind.heads == 1 ? 0 : head / (q_heads / kind.heads);
    const index_t n = ((kind.batch == 1 ? 0 : b) * kind.heads + own) * kind.q_blocks + i / kind.q_block;
    const auto at = static_cast<std::size_t>(n);
    const index_t first = kind.begin.empty() ? n * kind.capacity : kind.begin[at];
    const index_t count = !kind.begin.empty()  ? kind.begin[at + 1] - kind.begin[at]
                          : kind.count.empty() ? kind.capacity
                                               : index_t{kind.count[at]};
    for (index_t e = first; e < first + count; e += kind.ranges ? 2 : 1) {
      const index_t entry = kind.entries[e];
      if (entry < 0 || j >= len_k) continue;
      const bool inside = kind.ranges ? j >= entry && j < kind.entries[e + 1] : j / kind.k_block == entry;
      times += inside;
    }
  }
  return times;
}

// [sequence, q_head, len_q, len_k]
inline std::vector<float> list_bias(std::span<const KeyLists> kinds, index_t batch, index_t q_heads, index_t len_q,
                                    const std::vector<index_t>& len_k, index_t longest) {
  std::vector<float> bias;
  for (index_t b = 0; b < batch; ++b) {
    for (index_t h = 0; h < q_heads; ++h) {
      for (index_t i = 0; i < len_q; ++i) {
        for (index_t j = 0; j < longest; ++j)
          bias.push_back(
              std::log(static_cast<float>(times_listed(kinds, b, h, q_heads, i, j, len_k[static_cast<std::size_t>(b)]))));
      }
    }
  }
  return bias;
}

}   // namespace test
