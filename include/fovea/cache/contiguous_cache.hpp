// SPDX-License-Identifier: Apache-2.0
// ContiguousCache: a fixed number of slots per sequence, key j of a sequence in slot j. The plainest cache and the fastest
// to read. One writer at a time; no call throws, and a refused one changes nothing.
#pragma once
#include "rows.hpp"

namespace fovea {
inline namespace v0 {

struct ContiguousCacheShape {
  CacheRows rows;
  index_t sequences = 1, slots = 0;   // positions per sequence
  KvLayout layout = KvLayout::head_major;
  bool poison = false;   // 0xFF wherever no token is; writes all memory once at creation
};

inline namespace FOVEA_ARCH {

class ContiguousCache {
 public:
  // Replaces whatever the cache held; on error it keeps it.
  Status create(const ContiguousCacheShape& shape) {
    if (Status status = check_rows(shape.rows); !status.ok()) return status;
    if (shape.sequences < 1 || shape.slots < 1) {
      return Status::error(Code::invalid_argument, "cache: %td sequences of %td slots", shape.sequences, shape.slots);
    }
    if (limited_product({shape.sequences, shape.slots, token_bytes(shape.rows)}) == kLargestCache) {
      return Status::error(Code::out_of_memory, "cache: %td sequences of %td slots of %td bytes are too much",
                           shape.sequences, shape.slots, token_bytes(shape.rows));
    }
    const auto take = [&](Bump& bump, State& state) {
      state.sequences = shape.sequences;
      state.slots = shape.slots;
      state.store = RowStore(bump, shape.rows, shape.sequences, shape.slots, shape.layout, shape.poison);
      state.len = bump.take<index_t>(shape.sequences);
    };
    if (Status status = allocate(owned_, take); !status.ok()) return status;
    std::fill_n(state().len, shape.sequences, index_t{0});
    return {};
  }

  // Appends `count` tokens and calls write(token, kv_head, k_row, v_row) for each row of them.
  template <RowWriter Write>
  Status append(index_t sequence, index_t count, Write&& write) {
    const index_t first = known(sequence) ? state().len[sequence] : 0;
    if (Status status = extend(sequence, count); !status.ok()) return status;
    each_token_and_head(count, rows().kv_heads, store().token_major() ? 1 : 16, [&](index_t token, index_t kv_head) {
      write(token, kv_head, store().k(sequence, kv_head, first + token), store().v(sequence, kv_head, first + token));
    });
    return {};
  }

  // Appends ready rows, strides per [-, kv_head, token]: from a tensor (dense_kv(k, v).k), stored_rows, another cache.
  Status append(index_t sequence, index_t count, const Stored& k, const Stored& v) {
    if (Status status = check_ready_rows(rows(), k, v, count); !status.ok()) return status;
    return append(sequence, count, copy_rows(rows(), k, v));
  }

  // Appends tokens whose rows the caller writes afterwards, through writable_k_row, from any number of threads.
  Status extend(index_t sequence, index_t count) {
    if (Status status = check_call(sequence, count); !status.ok()) return status;
    index_t& len = state().len[sequence];
    if (count > slots() - len) {
      return Status::error(Code::out_of_pages, "cache: %td tokens to append, sequence %td has %td of %td slots left", count,
                           sequence, slots() - len, slots());
    }
    len += count;
    return {};
  }

  // Rolls back the last `count` tokens.
  Status truncate(index_t sequence, index_t count) {
    if (Status status = check_call(sequence, count); !status.ok()) return status;
    index_t& len = state().len[sequence];
    if (count > len) {
      return Status::error(Code::invalid_argument, "cache: %td tokens to roll back, sequence %td has %td", count, sequence,
                           len);
    }
    len -= count;
    store().poison(sequence, len, count);
    return {};
  }

  Status reset(index_t sequence) { return truncate(sequence, known(sequence) ? state().len[sequence] : 0); }

  // Makes `to` a copy of `from`, whatever it was before.
  Status fork(index_t from, index_t to) {
    if (Status status = first_error({check_sequence(from, sequences()), check_sequence(to, sequences())}); !status.ok()) {
      return status;
    }
    if (from == to) return Status::error(Code::invalid_argument, "cache: a copy of sequence %td onto itself", from);
    index_t* const len = state().len;
    store().copy(from, 0, to, 0, len[from]);
    if (len[to] > len[from]) store().poison(to, len[from], len[to] - len[from]);
    len[to] = len[from];
    return {};
  }

  index_t sequences() const { return state().sequences; }
  index_t slots() const { return state().slots; }
  const CacheRows& rows() const { return store().rows(); }
  std::size_t bytes() const { return owned_.block.size(); }
  index_t len(index_t sequence) const {
    FOVEA_ASSERT(known(sequence));
    return state().len[sequence];
  }
  std::span<const index_t> lengths() const { return {state().len, static_cast<std::size_t>(sequences())}; }   // [sequence]

  // All sequences; valid as long as the cache, `len_k` counts what is in use at the time of the call.
  KvBatch batch() const { return {store().kv(), lengths()}; }

  const std::byte* k_row(index_t sequence, index_t kv_head, index_t position) const {
    FOVEA_ASSERT(position < len(sequence));
    return store().k(sequence, kv_head, position);
  }
  const std::byte* v_row(index_t sequence, index_t kv_head, index_t position) const {
    FOVEA_ASSERT(position < len(sequence));
    return store().v_or_k(sequence, kv_head, position);
  }
  std::byte* writable_k_row(index_t sequence, index_t kv_head, index_t position) {
    FOVEA_ASSERT(position < len(sequence));
    return store().k(sequence, kv_head, position);
  }
  std::byte* writable_v_row(index_t sequence, index_t kv_head, index_t position) {   // null where V lies in K
    FOVEA_ASSERT(position < len(sequence));
    return store().v(sequence, kv_head, position);
  }

  // Whether the bookkeeping is sound; in a poisoned cache also whether every slot without a token is untouched.
  Status check() const {
    for (index_t sequence = 0; sequence < sequences(); ++sequence) {
      const index_t len = state().len[sequence];
      if (len < 0 || len > slots()) {
        return Status::error(Code::invalid_argument, "cache: sequence %td has %td tokens in %td slots", sequence, len,
                             slots());
      }
      if (store().poisoned() && !store().is_poison(sequence, len, slots() - len)) {
        return Status::error(Code::invalid_argument, "cache: a slot of sequence %td behind token %td was written", sequence,
                             len);
      }
    }
    return {};
  }

 private:
  struct State {
    index_t sequences = 0, slots = 0;
    RowStore store;
    index_t* len = nullptr;   // [sequence]
  };

  const State& state() const { return owned_.state; }
  const RowStore& store() const { return owned_.state.store; }
  bool known(index_t sequence) const { return sequence >= 0 && sequence < sequences(); }
  Status check_call(index_t sequence, index_t count) const {
    return first_error({check_sequence(sequence, sequences()), check_count(count)});
  }

  Owned<State> owned_;
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
