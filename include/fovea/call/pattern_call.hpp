// SPDX-License-Identifier: Apache-2.0
// What calls share whose keys are a pattern of positions: their lists, the memory these are written into, rows of padding.
// Borders of a pattern's blocks are positions, borders of lists are queries; a decode or a chunk of a prefill starts
// anywhere.
#pragma once
#include <cstring>
#include <limits>
#include <numeric>

#include "../core/key_lists.hpp"
#include "call.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {
namespace door {

constexpr index_t block_of(index_t pos, index_t block) { return pos / block - (pos % block < 0); }   // block > 0

// The queries of one list: they stand at the positions first .. last, in one block of the pattern.
struct ListPlace {
  index_t sequence, head;
  index_t first, last;
  index_t len_k;
};

// Takes what a pattern says about one list after the other; without memory it counts.
class ListWriter {
 public:
  explicit ListWriter(std::int32_t* to = nullptr) : to_(to) {}

  index_t written() const { return written_; }
  void entry(index_t number) {
    if (to_ != nullptr) to_[written_] = static_cast<std::int32_t>(number);
    ++written_;
  }
  void range(index_t first, index_t end) {
    if (first >= end) return;
    entry(first);
    entry(end);
  }

 private:
  std::int32_t* to_;
  index_t written_ = 0;
};

// Queries that share a list in a block of a causal pattern: a part of the block, so that few keys behind a query are scored
// for its neighbours' sake, and enough of them to be worth the reading of a key. The block itself where it has no such
// divisor.
inline index_t causal_list(index_t block) {
  constexpr index_t kMost = 128, kFewest = 32;
  for (index_t part = kMost; block > kMost && part >= kFewest; --part) {
    if (block % part == 0) return part;
  }
  return block;
}

struct ListLayout {
  index_t batch = 1;   // 1: all sequences stand at the same positions before as many keys
  index_t heads = 1, q_blocks = 1, q_block = 1;
};

// The fewest lists of which none holds queries of two blocks (or of two parts of one): a sequence that starts inside a block
// and leaves it gets lists of the largest size that divides both.
inline ListLayout layout_of_lists(const AttentionShape& shape, const AttentionOptions& options, index_t block,
                                  index_t heads) {
  ListLayout layout{1, heads, 1, block};
  index_t longest = 1;
  const index_t sequences = count_sequences(shape, options);
  const Sequence front = sequences > 0 ? sequence_of(shape, options, 0) : Sequence{};
  for (index_t b = 0; b < sequences; ++b) {
    const Sequence s = sequence_of(shape, options, b);
    if (s.len_q > 0 && block_of(s.pos, block) != block_of(s.pos + s.len_q - 1, block))
      layout.q_block = std::gcd(layout.q_block, s.pos);
    if (s.pos != front.pos || s.len_k != front.len_k) layout.batch = sequences;
    longest = std::max(longest, s.len_q);
  }
  layout.q_block = std::min(layout.q_block, kMaxLength);   // a block that long holds every position there is
  layout.q_blocks = (longest + layout.q_block - 1) / layout.q_block;
  return layout;
}

// f(ListPlace) for every list in their order; lists behind a sequence's last query are skipped by `empty()`.
template <class F, class Empty>
void for_each_list(const ListLayout& layout, const AttentionShape& shape, const AttentionOptions& options, const F& f,
                   const Empty& empty) {
  for (index_t b = 0; b < layout.batch; ++b) {
    const Sequence s = count_sequences(shape, options) > 0 ? sequence_of(shape, options, b) : Sequence{};
    for (index_t h = 0; h < layout.heads; ++h) {
      for (index_t j = 0; j < layout.q_blocks; ++j) {
        const index_t first = j * layout.q_block;
        // Shared lists serve sequences of any number of queries, so nothing is cut at the end of the first one's.
        const index_t end = layout.batch == 1 ? first + layout.q_block : std::min(first + layout.q_block, s.len_q);
        if (first < end) {
          f(ListPlace{b, h, s.pos + first, s.pos + end - 1, s.len_k});
        } else {
          empty();
        }
      }
    }
  }
}

struct ListMemory : LocalBytes {};

// write(ListPlace, ListWriter&) is called twice for every list, to count and to write; use(KeyLists) gets the lists, which
// live until it returns. `ranges` and `k_block` say what write's numbers are.
template <class Write, class Use>
Status with_position_lists(const ListLayout& layout, const AttentionShape& shape, const AttentionOptions& options,
                           index_t k_block, bool ranges, const Write& write, const Use& use) {
  return with_memory<ListMemory>([&](ListMemory& memory) -> Status {
    ListWriter count;
    for_each_list(
        layout, shape, options, [&](const ListPlace& place) { write(place, count); }, [] {});
    const index_t lists = layout.batch * layout.heads * layout.q_blocks;
    const auto carve = [&](Bump& bump, index_t*& begin, std::int32_t*& entries) {
      begin = bump.take<index_t>(lists + 1);
      entries = bump.take<std::int32_t>(count.written() + 1);
    };
    index_t* begin = nullptr;
    std::int32_t* entries = nullptr;
    Bump size;
    carve(size, begin, entries);
    const std::span<std::byte> bytes = memory.workspace(size.used() + kAlignment);
    if (Status s = check_workspace(bytes, size.used() + kAlignment); !s.ok()) return s;
    Bump bump(aligned(bytes).data());
    carve(bump, begin, entries);

    ListWriter writer(entries);
    index_t list = 0;
    begin[0] = 0;
    const auto close = [&] { begin[++list] = writer.written(); };
    for_each_list(
        layout, shape, options,
        [&](const ListPlace& place) {
          write(place, writer);
          close();
        },
        close);
    KeyLists made;
    made.entries = entries;
    made.begin = {begin, static_cast<std::size_t>(lists) + 1};
    made.batch = layout.batch;
    made.heads = layout.heads;
    made.q_blocks = layout.q_blocks;
    made.q_block = layout.q_block;
    made.k_block = k_block;
    made.ranges = ranges;
    return use(made);
  });
}

// Zeros and an empty LSE for the queries of which is_padding(batch, pos) holds; all zero bits are 0 in every plain format.
template <class IsPadding>
void clear_padding(const Result& out, const View<float, 3>& lse, const IsPadding& is_padding) {
  const index_t number = row_bytes(out.format, 1);
  for (index_t b = 0; b < out.extent[0]; ++b) {
    for (index_t i = 0; i < out.extent[2]; ++i) {
      if (!is_padding(b, i)) continue;
      for (index_t h = 0; h < out.extent[1]; ++h) {
        std::byte* const row = out.data + (b * out.stride[0] + h * out.stride[1] + i * out.stride[2]) * number;
        for (index_t d = 0; d < out.extent[3]; ++d)
          std::memset(row + d * out.stride[3] * number, 0, static_cast<std::size_t>(number));
        if (lse) lse(b, h, i) = -std::numeric_limits<float>::infinity();
      }
    }
  }
}

}   // namespace door
}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
