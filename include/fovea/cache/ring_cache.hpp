// SPDX-License-Identifier: Apache-2.0
// RingCache: the first `sinks` tokens of a sequence for good, and the last `window` of the others (StreamingLLM, arXiv
// 2309.17453). Memory and time per token stay the same however long the sequence gets. One writer at a time; no call throws,
// and a refused one changes nothing.
#pragma once
#include "rows.hpp"

namespace fovea {
inline namespace v0 {

struct RingCacheShape {
  CacheRows rows;
  index_t sequences = 1;
  index_t sinks = 4, window = 0;
  index_t rollback = 0;   // tokens truncate() can always take back; as many slots more, which are not read
  KvLayout layout = KvLayout::head_major;
  bool poison = false;   // 0xFF wherever no token is; writes all memory once at creation
};

inline namespace FOVEA_ARCH {

// Token t of a sequence stands in slot t if it is a sink, else in slot sinks + (t - sinks) mod ring.
struct RingPlaces {
  index_t sinks = 0, window = 0, ring = 1;   // ring = window + rollback slots

  index_t slots() const { return sinks + ring; }
  index_t slot(index_t token) const { return token < sinks ? token : sinks + (token - sinks) % ring; }
  // The oldest token of the ring that `total` tokens have not overwritten, if it was `oldest` before.
  index_t oldest(index_t total, index_t oldest) const { return std::max(oldest, total - ring); }
  // Where the window starts.
  index_t recent(index_t total) const { return std::max(sinks, total - window); }
  // How far the ring is turned for a reader whose first token behind the sinks is `first`.
  index_t turned(index_t first) const { return (first - sinks) % ring; }

  // Calls f(first slot, count) for the runs of slots of the tokens [begin, end), of which at most `ring` are no sinks.
  template <class F>
  void each_run(index_t begin, index_t end, F&& f) const {
    while (begin < end) {
      const index_t first = slot(begin), border = first < sinks ? sinks : slots();
      const index_t run = std::min(end - begin, border - first);
      f(first, run);
      begin += run;
    }
  }
};

inline Status check_ring(index_t sequences, index_t sinks, index_t window, index_t rollback) {
  if (sequences < 1 || sinks < 0 || window < 1 || rollback < 0) {
    return Status::error(Code::invalid_argument, "cache: %td sequences, %td sinks, a window of %td, %td to roll back",
                         sequences, sinks, window, rollback);
  }
  if (sinks > kLargestCache || window > kLargestCache || rollback > kLargestCache) {
    return Status::error(Code::out_of_memory, "cache: %td sinks, a window of %td and %td to roll back are too much", sinks,
                         window, rollback);
  }
  return {};
}

class RingCache {
 public:
  // Replaces whatever the cache held; on error it keeps it.
  Status create(const RingCacheShape& shape) {
    if (Status status =
            first_error({check_rows(shape.rows), check_ring(shape.sequences, shape.sinks, shape.window, shape.rollback)});
        !status.ok()) {
      return status;
    }
    const RingPlaces places{shape.sinks, shape.window, shape.window + shape.rollback};
    if (limited_product({shape.sequences, places.slots(), token_bytes(shape.rows)}) == kLargestCache) {
      return Status::error(Code::out_of_memory, "cache: %td sequences of %td slots of %td bytes are too much",
                           shape.sequences, places.slots(), token_bytes(shape.rows));
    }
    const auto take = [&](Bump& bump, State& state) {
      state.sequences = shape.sequences;
      state.places = places;
      state.store = RowStore(bump, shape.rows, shape.sequences, places.slots(), shape.layout, shape.poison);
      state.total = bump.take<index_t>(shape.sequences);
      state.oldest = bump.take<index_t>(shape.sequences);
      state.len = bump.take<index_t>(shape.sequences);
      state.ring_begin = bump.take<index_t>(shape.sequences);
    };
    if (Status status = allocate(owned_, take); !status.ok()) return status;
    for (index_t sequence = 0; sequence < shape.sequences; ++sequence) settle(sequence, 0, shape.sinks);
    return {};
  }

  // Appends `count` tokens and calls write(token, kv_head, k_row, v_row) for each row that stays: of more tokens than the
  // ring has slots, those that this call would overwrite are not written at all.
  template <RowWriter Write>
  Status append(index_t sequence, index_t count, Write&& write) {
    if (Status status = check_call(sequence, count); !status.ok()) return status;
    const index_t before = state().total[sequence], sinks = places().sinks;
    if (count > kLargestCache - before) {
      return Status::error(Code::unsupported, "cache: %td tokens to append, sequence %td has seen %td; positions end at %td",
                           count, sequence, before, kLargestCache);
    }
    const index_t total = before + count, oldest = places().oldest(total, state().oldest[sequence]);
    for (index_t kv_head = 0; kv_head < rows().kv_heads; ++kv_head) {
      const auto write_tokens = [&](index_t begin, index_t end) {
        for (index_t token = begin; token < end; ++token) {
          const index_t slot = places().slot(token);
          write(token - before, kv_head, store().k(sequence, kv_head, slot), store().v(sequence, kv_head, slot));
        }
      };
      write_tokens(before, std::min(total, sinks));
      write_tokens(std::max({before, sinks, oldest}), total);
    }
    settle(sequence, total, oldest);
    return {};
  }

  // Appends ready rows, strides per [-, kv_head, token]: from a tensor (dense_kv(k, v).k), stored_rows, another cache.
  Status append(index_t sequence, index_t count, const Stored& k, const Stored& v) {
    if (Status status = check_ready_rows(rows(), k, v, count); !status.ok()) return status;
    return append(sequence, count, copy_rows(rows(), k, v));
  }

  // Rolls back the last `count` tokens, as if they had never been appended. Always possible for up to `rollback` tokens, and
  // for more where nothing of the then visible window was overwritten; refused otherwise.
  Status truncate(index_t sequence, index_t count) {
    if (Status status = check_call(sequence, count); !status.ok()) return status;
    const index_t before = state().total[sequence], total = before - count, oldest = state().oldest[sequence];
    if (total < 0) {
      return Status::error(Code::invalid_argument, "cache: %td tokens to roll back, sequence %td has seen %td", count,
                           sequence, before);
    }
    if (total > places().sinks && places().recent(total) < oldest) {
      return Status::error(
          Code::invalid_argument,
          "cache: without the last %td of its %td tokens sequence %td needs token %td, overwritten; the oldest "
          "in the ring is %td",
          count, before, sequence, places().recent(total), oldest);
    }
    const auto poison = [&](index_t slot, index_t run) { store().poison(sequence, slot, run); };
    if (total < places().sinks) places().each_run(total, std::min(before, places().sinks), poison);
    places().each_run(std::max(total, oldest), before, poison);
    settle(sequence, total, total <= places().sinks ? places().sinks : oldest);
    return {};
  }

  Status reset(index_t sequence) { return truncate(sequence, check_call(sequence, 0).ok() ? state().total[sequence] : 0); }

  // Makes `to` a copy of `from`, whatever it was before.
  Status fork(index_t from, index_t to) {
    if (Status status = first_error({check_sequence(from, sequences()), check_sequence(to, sequences())}); !status.ok()) {
      return status;
    }
    if (from == to) return Status::error(Code::invalid_argument, "cache: a copy of sequence %td onto itself", from);
    store().copy(from, 0, to, 0, used_slots(from));
    if (used_slots(to) > used_slots(from)) store().poison(to, used_slots(from), used_slots(to) - used_slots(from));
    settle(to, state().total[from], state().oldest[from]);
    return {};
  }

  index_t sequences() const { return state().sequences; }
  index_t slots() const { return places().slots(); }
  index_t sinks() const { return places().sinks; }
  index_t window() const { return places().window; }
  const CacheRows& rows() const { return store().rows(); }
  std::size_t bytes() const { return owned_.block.size(); }

  // Tokens appended and not rolled back, overwritten ones included: the position of the next token in the text. In the cache
  // it gets the position min(seen, sinks + window).
  index_t seen(index_t sequence) const {
    FOVEA_ASSERT(sequence >= 0 && sequence < sequences());
    return state().total[sequence];
  }
  index_t len(index_t sequence) const {
    FOVEA_ASSERT(sequence >= 0 && sequence < sequences());
    return state().len[sequence];
  }
  std::span<const index_t> lengths() const { return {state().len, static_cast<std::size_t>(sequences())}; }   // [sequence]
  std::span<const index_t> ring_begin() const {                                                               // [sequence]
    return {state().ring_begin, static_cast<std::size_t>(sequences())};
  }

  // All sequences; valid as long as the cache, `len_k` and `ring_begin` follow its changes.
  KvBatch batch() const {
    KvBatch all{store().kv(), lengths()};
    all.kv.home = Home::ring;
    all.kv.sinks = sinks();
    all.kv.ring_begin = ring_begin();
    return all;
  }

  // Key j, counted as a reader counts: the sinks, then the window from its oldest token on.
  const std::byte* k_row(index_t sequence, index_t kv_head, index_t key) const {
    return store().k(sequence, kv_head, slot_of(sequence, key));
  }
  const std::byte* v_row(index_t sequence, index_t kv_head, index_t key) const {
    return store().v_or_k(sequence, kv_head, slot_of(sequence, key));
  }
  std::byte* writable_k_row(index_t sequence, index_t kv_head, index_t key) {   // to rotate a key again
    return store().k(sequence, kv_head, slot_of(sequence, key));
  }
  std::byte* writable_v_row(index_t sequence, index_t kv_head, index_t key) {   // null where V lies in K
    return store().v(sequence, kv_head, slot_of(sequence, key));
  }

  // Whether the bookkeeping is sound; in a poisoned cache also whether every slot without a token is untouched.
  Status check() const {
    for (index_t sequence = 0; sequence < sequences(); ++sequence) {
      const index_t total = state().total[sequence], oldest = state().oldest[sequence], len = state().len[sequence];
      const index_t readable = std::min(total, sinks() + window());
      if (total < 0 || len != readable || oldest < sinks() || (total > sinks() && oldest > places().recent(total)) ||
          (total <= sinks() && oldest != sinks()) || total - oldest > places().ring) {
        return Status::error(Code::invalid_argument,
                             "cache: sequence %td has seen %td, %td readable, oldest of the ring %td", sequence, total, len,
                             oldest);
      }
      if (len > sinks() && slot_of(sequence, len - 1) != places().slot(total - 1)) {
        return Status::error(Code::invalid_argument, "cache: sequence %td: its last key is in slot %td, not %td", sequence,
                             places().slot(total - 1), slot_of(sequence, len - 1));
      }
      if (!store().poisoned()) continue;
      // The slots from behind the last token round to the oldest hold none.
      bool untouched = total >= sinks() || store().is_poison(sequence, total, sinks() - total);
      const index_t held = std::max(total - oldest, index_t{0}), next = std::max(total, sinks());
      places().each_run(next, next + places().ring - held,
                        [&](index_t slot, index_t run) { untouched = untouched && store().is_poison(sequence, slot, run); });
      if (!untouched) {
        return Status::error(Code::invalid_argument, "cache: a slot of sequence %td without a token was written", sequence);
      }
    }
    return {};
  }

 private:
  struct State {
    index_t sequences = 0;
    RingPlaces places;
    RowStore store;
    index_t* total = nullptr;        // [sequence]
    index_t* oldest = nullptr;       // [sequence]  the first token behind the sinks that is still in the ring
    index_t* len = nullptr;          // [sequence]  readable
    index_t* ring_begin = nullptr;   // [sequence]
  };

  const State& state() const { return owned_.state; }
  const RowStore& store() const { return owned_.state.store; }
  const RingPlaces& places() const { return owned_.state.places; }
  Status check_call(index_t sequence, index_t count) const {
    return first_error({check_sequence(sequence, sequences()), check_count(count)});
  }
  void settle(index_t sequence, index_t total, index_t oldest) {
    state().total[sequence] = total;
    state().oldest[sequence] = oldest;
    state().len[sequence] = std::min(total, sinks() + window());
    state().ring_begin[sequence] = places().turned(places().recent(total));
  }
  // Slots that may hold a token: until the ring has turned once, those behind the last token never did.
  index_t used_slots(index_t sequence) const { return std::min(state().total[sequence], slots()); }
  index_t slot_of(index_t sequence, index_t key) const {
    FOVEA_ASSERT(key >= 0 && key < len(sequence));
    return key < sinks() ? key : sinks() + (state().ring_begin[sequence] + key - sinks()) % places().ring;
  }

  Owned<State> owned_;
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
