// SPDX-License-Identifier: Apache-2.0
// MixedCache: a quantised cache whose first `sinks` tokens and last `window` tokens are read in 16 bit, where quantising
// hurts most. One writer at a time; no call throws, and a refused one changes nothing.
#pragma once
#include "ring_cache.hpp"

namespace fovea {
inline namespace v0 {

struct MixedCacheShape {
  CacheRows rows;   // how the middle is stored
  Format exact_k = Format::bf16, exact_v = Format::bf16;
  index_t sequences = 1, slots = 0;   // positions per sequence
  index_t sinks = 4, window = 64;     // tokens read from the exact rows
  index_t rollback = 0;               // tokens truncate() takes back without making the window shorter
  KvLayout layout = KvLayout::head_major;   // of both parts
  bool poison = false;                      // 0xFF wherever no token is; writes all memory once at creation
};

inline namespace FOVEA_ARCH {

// Every token is written twice when it is appended: exact rows into a ring, quantised rows into a contiguous store. So
// nothing is encoded again when a token leaves the window, the codes are made from the numbers before any rounding, and a
// rollback finds older tokens in the contiguous store, which has a slot for each token anyway. The ring is all it costs.
//
// With i8_channel keys the exact ones are stored divided by rows().k_channel_scale, number by number: a call multiplies the
// scales into the query, once for all keys. append_tokens divides; whoever writes exact rows himself does too. Quotients of
// calibrated numbers are at most 127 in size, and floating formats keep as many digits of them as of the numbers;
// append_tokens clips beyond the format's largest (f16: 516 times the calibrated range) and counts it as lost.
class MixedCache {
 public:
  // Replaces whatever the cache held; on error it keeps it.
  Status create(const MixedCacheShape& shape) {
    CacheRows exact_rows = shape.rows;
    exact_rows.k = shape.exact_k;
    exact_rows.v = shape.rows.v_in_k ? shape.exact_k : shape.exact_v;
    exact_rows.k_channel_scale = nullptr;
    if (Status status = first_error({check_rows(shape.rows), check_rows(exact_rows),
                                     check_ring(shape.sequences, shape.sinks, shape.window, shape.rollback)});
        !status.ok()) {
      return status;
    }
    if (shape.slots < 1) return Status::error(Code::invalid_argument, "cache: %td slots per sequence", shape.slots);
    const RingPlaces places{shape.sinks, shape.window, shape.window + shape.rollback};
    if (limited_product({shape.sequences, shape.slots, token_bytes(shape.rows)}) == kLargestCache ||
        limited_product({shape.sequences, places.slots(), token_bytes(exact_rows)}) == kLargestCache) {
      return Status::error(Code::out_of_memory, "cache: %td sequences of %td + %td slots of %td and %td bytes are too much",
                           shape.sequences, shape.slots, places.slots(), token_bytes(shape.rows), token_bytes(exact_rows));
    }
    const auto take = [&](Bump& bump, State& state) {
      state.sequences = shape.sequences;
      state.slots = shape.slots;
      state.places = places;
      state.coded = RowStore(bump, shape.rows, shape.sequences, shape.slots, shape.layout, shape.poison);
      state.exact = RowStore(bump, exact_rows, shape.sequences, places.slots(), shape.layout, shape.poison);
      state.len = bump.take<index_t>(shape.sequences);
      state.oldest = bump.take<index_t>(shape.sequences);
      state.exact_from = bump.take<index_t>(shape.sequences);
      state.ring_begin = bump.take<index_t>(shape.sequences);
      state.exact_kv = bump.take<Kv>(1);
    };
    if (Status status = allocate(owned_, take); !status.ok()) return status;
    for (index_t sequence = 0; sequence < shape.sequences; ++sequence) settle(sequence, 0, shape.sinks);
    Kv* const exact = ::new (static_cast<void*>(owned_.state.exact_kv)) Kv(owned_.state.exact.kv());
    exact->home = Home::ring;
    exact->sinks = shape.sinks;
    exact->ring_begin = {state().ring_begin, static_cast<std::size_t>(shape.sequences)};
    return {};
  }

  // Appends `count` tokens. write_exact and write_coded(token, kv_head, k_row, v_row) fill their rows; exact rows that this
  // call would overwrite are not asked for. Beside i8_channel keys, exact ones are divided by the scales (above).
  template <RowWriter WriteExact, RowWriter WriteCoded>
  Status append(index_t sequence, index_t count, WriteExact&& write_exact, WriteCoded&& write_coded) {
    if (Status status = check_call(sequence, count); !status.ok()) return status;
    const index_t before = state().len[sequence];
    if (count > slots() - before) {
      return Status::error(Code::out_of_pages, "cache: %td tokens to append, sequence %td has %td of %td slots left", count,
                           sequence, slots() - before, slots());
    }
    const index_t len = before + count, oldest = places().oldest(len, state().oldest[sequence]);
    each_token_and_head(count, rows().kv_heads, coded().token_major() ? 1 : 16, [&](index_t n, index_t kv_head) {
      const index_t token = before + n, slot = places().slot(token);
      write_coded(n, kv_head, coded().k(sequence, kv_head, token), coded().v(sequence, kv_head, token));
      if (token >= sinks() && token < oldest) return;
      write_exact(n, kv_head, exact().k(sequence, kv_head, slot), exact().v(sequence, kv_head, slot));
    });
    settle(sequence, len, oldest);
    return {};
  }

  // Appends ready rows, strides per [-, kv_head, token] as in Stored; exact keys divided as above.
  Status append(index_t sequence, index_t count, const Stored& exact_k, const Stored& exact_v, const Stored& coded_k,
                const Stored& coded_v) {
    if (Status status = first_error(
            {check_ready_rows(exact().rows(), exact_k, exact_v, count), check_ready_rows(rows(), coded_k, coded_v, count)});
        !status.ok()) {
      return status;
    }
    return append(sequence, count, copy_rows(exact().rows(), exact_k, exact_v), copy_rows(rows(), coded_k, coded_v));
  }

  // Rolls back the last `count` tokens. Of a window that was overwritten the older tokens are read quantised from then on;
  // with at most `rollback` tokens at a time that does not happen.
  Status truncate(index_t sequence, index_t count) {
    if (Status status = check_call(sequence, count); !status.ok()) return status;
    const index_t before = state().len[sequence], len = before - count, oldest = state().oldest[sequence];
    if (len < 0) {
      return Status::error(Code::invalid_argument, "cache: %td tokens to roll back, sequence %td has %td", count, sequence,
                           before);
    }
    coded().poison(sequence, len, count);
    const auto poison = [&](index_t slot, index_t run) { exact().poison(sequence, slot, run); };
    if (len < sinks()) places().each_run(len, std::min(before, sinks()), poison);
    places().each_run(std::max(len, oldest), before, poison);
    settle(sequence, len, std::max(sinks(), std::min(oldest, len)));
    return {};
  }

  Status reset(index_t sequence) { return truncate(sequence, check_call(sequence, 0).ok() ? state().len[sequence] : 0); }

  // Makes `to` a copy of `from`, whatever it was before.
  Status fork(index_t from, index_t to) {
    if (Status status = first_error({check_sequence(from, sequences()), check_sequence(to, sequences())}); !status.ok()) {
      return status;
    }
    if (from == to) return Status::error(Code::invalid_argument, "cache: a copy of sequence %td onto itself", from);
    const index_t len = state().len[from], other = state().len[to];
    coded().copy(from, 0, to, 0, len);
    if (other > len) coded().poison(to, len, other - len);
    const index_t used = std::min(len, places().slots()), other_used = std::min(other, places().slots());
    exact().copy(from, 0, to, 0, used);
    if (other_used > used) exact().poison(to, used, other_used - used);
    settle(to, len, state().oldest[from]);
    return {};
  }

  index_t sequences() const { return state().sequences; }
  index_t slots() const { return state().slots; }
  index_t sinks() const { return places().sinks; }
  index_t window() const { return places().window; }
  const CacheRows& rows() const { return coded().rows(); }
  const CacheRows& exact_rows() const { return exact().rows(); }
  std::size_t bytes() const { return owned_.block.size(); }
  index_t len(index_t sequence) const {
    FOVEA_ASSERT(sequence >= 0 && sequence < sequences());
    return state().len[sequence];
  }
  std::span<const index_t> lengths() const { return {state().len, static_cast<std::size_t>(sequences())}; }   // [sequence]
  std::span<const index_t> exact_from() const {                                                               // [sequence]
    return {state().exact_from, static_cast<std::size_t>(sequences())};
  }

  // All sequences; valid as long as the cache, its spans follow the changes.
  KvBatch batch() const {
    KvBatch all{coded().kv(), lengths()};
    all.kv.exact = state().exact_kv;
    all.kv.exact_first = sinks();
    all.kv.exact_from = exact_from();
    return all;
  }

  // Whether the bookkeeping is sound; in a poisoned cache also whether every slot without a token is untouched.
  Status check() const {
    for (index_t sequence = 0; sequence < sequences(); ++sequence) {
      const index_t len = state().len[sequence], oldest = state().oldest[sequence], from = state().exact_from[sequence];
      if (len < 0 || len > slots() || oldest < sinks() || oldest > std::max(len, sinks()) || len - oldest > places().ring ||
          from != std::max(places().recent(len), oldest) || state().ring_begin[sequence] != places().turned(from)) {
        return Status::error(Code::invalid_argument,
                             "cache: sequence %td has %td tokens, exact from %td, oldest of the ring %td", sequence, len,
                             from, oldest);
      }
      if (!coded().poisoned()) continue;
      bool untouched = coded().is_poison(sequence, len, slots() - len);
      if (len < sinks()) untouched = untouched && exact().is_poison(sequence, len, sinks() - len);
      const index_t held = std::max(len - oldest, index_t{0}), next = std::max(len, sinks());
      places().each_run(next, next + places().ring - held,
                        [&](index_t slot, index_t run) { untouched = untouched && exact().is_poison(sequence, slot, run); });
      if (!untouched) {
        return Status::error(Code::invalid_argument, "cache: a slot of sequence %td without a token was written", sequence);
      }
    }
    return {};
  }

 private:
  struct State {
    index_t sequences = 0, slots = 0;
    RingPlaces places;
    RowStore coded, exact;
    index_t* len = nullptr;          // [sequence]
    index_t* oldest = nullptr;       // [sequence]  the first token behind the sinks that is still in the ring
    index_t* exact_from = nullptr;   // [sequence]
    index_t* ring_begin = nullptr;   // [sequence]
    Kv* exact_kv = nullptr;          // in the block, so that a moved cache keeps its descriptors valid
  };

  const State& state() const { return owned_.state; }
  const RowStore& coded() const { return owned_.state.coded; }
  const RowStore& exact() const { return owned_.state.exact; }
  const RingPlaces& places() const { return owned_.state.places; }
  Status check_call(index_t sequence, index_t count) const {
    return first_error({check_sequence(sequence, sequences()), check_count(count)});
  }
  void settle(index_t sequence, index_t len, index_t oldest) {
    const index_t from = std::max(places().recent(len), oldest);
    state().len[sequence] = len;
    state().oldest[sequence] = oldest;
    state().exact_from[sequence] = from;
    state().ring_begin[sequence] = places().turned(from);
  }

  Owned<State> owned_;
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
