// SPDX-License-Identifier: Apache-2.0
// KeyRanges: key lists (core/key_lists.hpp) as the engine reads them. Blocks, tokens and ranges all become runs of positions,
// neighbours joined, cut to what some query of the list can see; slot n of a list is the n-th key of its runs. Eight bytes a
// run, whatever its length.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../core/key_lists.hpp"
#include "../core/status.hpp"
#include "../simd/simd.hpp"
#include "plan.hpp"
#include "policies.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

class KeyRanges {
 public:
  struct Range {
    std::int32_t pos, slot;   // of its first key
  };

  // The lists of all `kinds` together, for the sequences of a plan. `heads` is the most that any of them has: 1, kv_heads or
  // q_heads of the call. Their extents have been checked.
  Status build(std::span<const KeyLists> kinds, const std::vector<Sequence>& sequences, index_t heads, Reach reach) {
    heads_ = heads;
    q_block_ = kinds.front().q_block;
    first_list_.clear();
    ranges_.clear();
    first_.assign(1, 0);
    slots_.clear();
    index_t lists = 0;
    for (std::size_t b = 0; b < sequences.size(); ++b) {
      const index_t blocks = (sequences[b].len_q + q_block_ - 1) / q_block_;
      first_list_.push_back({lists, blocks});
      lists += heads * blocks;
      for (index_t head = 0; head < heads; ++head) {
        for (index_t block = 0; block < blocks; ++block) {
          if (Status s = add_list(kinds, sequences[b], static_cast<index_t>(b), head, block, reach); !s.ok()) return s;
        }
      }
    }
    return {};
  }

  index_t heads() const { return heads_; }
  index_t q_block() const { return q_block_; }
  index_t list_of(index_t sequence, index_t head, index_t q_index) const {
    const Lists& own = first_list_[static_cast<std::size_t>(sequence)];
    return own.first + (heads_ == 1 ? 0 : head) * own.blocks + q_index / q_block_;
  }
  index_t slots(index_t list) const { return slots_[static_cast<std::size_t>(list)]; }
  index_t total_slots() const {
    index_t total = 0;
    for (const std::int32_t slots : slots_) total += slots;
    return total;
  }

  // Sorts the runs of every list and joins neighbours. False where a list names a key twice: that is nobody's set.
  bool as_sets() {
    bool sets = true;
    for (std::size_t list = 0; list + 1 < first_.size(); ++list) {
      Range* const all = ranges_.data() + first_[list];
      const std::size_t count = first_[list + 1] - first_[list];
      bool sorted = true;
      for (std::size_t n = 1; n < count; ++n) sorted = sorted && all[n - 1].pos < all[n].pos;
      if (!sorted) {
        lengths_.clear();
        for (std::size_t n = 0; n < count; ++n) lengths_.push_back({all[n].pos, length(list, n)});
        std::sort(lengths_.begin(), lengths_.end(), [](const Range& a, const Range& b) { return a.pos < b.pos; });
        std::int32_t slot = 0;
        for (std::size_t n = 0; n < count; ++n) {
          all[n] = {lengths_[n].pos, slot};
          slot += lengths_[n].slot;
        }
      }
      for (std::size_t n = 1; n < count; ++n) sets = sets && all[n - 1].pos + length(list, n - 1) <= all[n].pos;
    }
    return sets;
  }
  // f(begin, end) for the runs of a list within the positions [begin, end). Only of lists that are sets.
  template <class F>
  void runs(index_t list, index_t begin, index_t end, const F& f) const {
    const auto at = static_cast<std::size_t>(list);
    const Range* const all = ranges_.data() + first_[at];
    const std::size_t count = first_[at + 1] - first_[at];
    std::size_t n = static_cast<std::size_t>(
        std::upper_bound(all, all + count, begin, [](index_t pos, const Range& r) { return pos < r.pos; }) - all);
    n = n == 0 ? 0 : n - 1;
    while (n < count && all[n].pos < end) {
      // Runs that touch were not neighbours in the list; here they are one.
      const index_t from = all[n].pos;
      index_t to = from + length(at, n);
      while (++n < count && all[n].pos == to) to += length(at, n);
      if (to > begin) f(std::max(from, begin), std::min(to, end));
    }
  }
  KeyRange hull(index_t list) const {
    const auto at = static_cast<std::size_t>(list);
    if (first_[at] == first_[at + 1]) return {0, 0};
    const std::size_t last = first_[at + 1] - first_[at] - 1;
    return {ranges_[first_[at]].pos, index_t{ranges_[first_[at] + last].pos} + length(at, last)};
  }

  // to[n] = the position of slot begin + n, n < end - begin; behind the list's last key that key again.
  void positions(index_t list, index_t begin, index_t end, std::int32_t* to) const {
    const auto at = static_cast<std::size_t>(list);
    const Range* const all = ranges_.data() + first_[at];
    const Range* const last = ranges_.data() + first_[at + 1];
    if (all == last) return;
    const Range* range = std::upper_bound(all, last, begin, [](index_t slot, const Range& r) { return slot < r.slot; }) - 1;
    index_t slot = begin;
    for (; slot < end && range != last; ++range) {
      const index_t stop = std::min(end, range + 1 == last ? index_t{slots_[at]} : index_t{range[1].slot});
      const auto shift = static_cast<std::int32_t>(range->pos - range->slot);
      std::int32_t* const run = to + (slot - begin);
      for (index_t n = 0; n < stop - slot; ++n) run[n] = static_cast<std::int32_t>(slot + n) + shift;
      slot = std::max(slot, stop);
    }
    const std::int32_t repeated = last[-1].pos + (slots_[at] - last[-1].slot) - 1;
    for (; slot < end; ++slot) to[slot - begin] = repeated;
  }

 private:
  std::int32_t length(std::size_t list, std::size_t n) const {
    const std::size_t at = first_[list] + n;
    return (at + 1 == first_[list + 1] ? slots_[list] : ranges_[at + 1].slot) - ranges_[at].slot;
  }

  struct Sight {
    index_t first, end;   // keys some query of the list may see
  };

  Status add_list(std::span<const KeyLists> kinds, const Sequence& sequence, index_t b, index_t head, index_t block,
                  Reach reach) {
    const index_t first_query = block * q_block_, last_query = std::min(first_query + q_block_, sequence.len_q) - 1;
    index_t slots = 0;
    if (last_query >= first_query) {
      const Sight sight{std::clamp<index_t>(sequence.pos + first_query - reach.left, 0, sequence.len_k),
                        std::clamp<index_t>(sequence.pos + last_query + reach.right + 1, 0, sequence.len_k)};
      for (const KeyLists& kind : kinds) {
        if (Status s = add_entries(kind, sequence, b, head, block, sight, slots); !s.ok()) return s;
      }
    }
    first_.push_back(ranges_.size());
    slots_.push_back(static_cast<std::int32_t>(slots));
    return {};
  }

  Status add_entries(const KeyLists& kind, const Sequence& sequence, index_t b, index_t head, index_t block, Sight sight,
                     index_t& slots) {
    const index_t list = ((kind.batch == 1 ? 0 : b) * kind.heads + head * kind.heads / heads_) * kind.q_blocks + block;
    const auto at = static_cast<std::size_t>(list);
    const std::int32_t* entries = kind.entries;
    index_t count = kind.capacity;
    if (!kind.begin.empty()) {
      entries += kind.begin[at];
      count = kind.begin[at + 1] - kind.begin[at];
    } else {
      entries += list * kind.capacity;
      if (!kind.count.empty()) count = kind.count[at];
    }
    const index_t step = kind.ranges ? 2 : 1;
    if (count % step != 0)
      return Status::error(Code::invalid_argument,
                           "fovea: list %td (sequence %td, head %td, q block %td) has %td numbers, "
                           "ranges come in pairs",
                           list, b, head, block, count);
    for (index_t n = 0; n + step <= count; n += step) {
      if (entries[n] < 0) continue;
      const index_t begin = kind.ranges ? entries[n] : entries[n] * kind.k_block;
      const index_t wanted_end = kind.ranges ? entries[n + 1] : begin + kind.k_block;
      const index_t end = kind.ranges ? wanted_end : std::min(wanted_end, sequence.len_k);
      if ((!kind.ranges && begin >= sequence.len_k) || end > sequence.len_k || end < begin)
        return Status::error(Code::invalid_argument,
                             "fovea: list %td (sequence %td, head %td, q block %td), number %td: keys %td .. %td, the "
                             "sequence has %td",
                             list, b, head, block, n, begin, wanted_end - 1, sequence.len_k);
      const index_t from = std::max(begin, sight.first), to = std::min(end, sight.end);
      if (from >= to) continue;
      const bool joins = ranges_.size() > first_.back() && ranges_.back().pos + (slots - ranges_.back().slot) == from;
      if (!joins) ranges_.push_back({static_cast<std::int32_t>(from), static_cast<std::int32_t>(slots)});
      slots += to - from;
      if (slots > INT32_MAX)
        return Status::error(Code::unsupported, "fovea: list %td names more than %d keys", list, INT32_MAX);
    }
    return {};
  }

  std::vector<Range> ranges_;
  std::vector<std::size_t> first_;    // [list + 1]
  std::vector<std::int32_t> slots_;   // [list]
  std::vector<Range> lengths_;        // of one list while it is sorted: pos, length
  struct Lists {
    index_t first, blocks;   // of a sequence: [head, block]
  };
  std::vector<Lists> first_list_;   // [sequence]
  index_t heads_ = 1, q_block_ = 1;
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
