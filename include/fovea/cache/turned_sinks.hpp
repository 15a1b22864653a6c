// SPDX-License-Identifier: Apache-2.0
// TurnedSinks: the sinks of a RingCache with RoPE (StreamingLLM, arXiv 2309.17453). Positions are places in the cache there:
// sink j has position j, and every other token moves one place down whenever one is dropped. Scores depend on distances
// only, so the sinks may move up instead: keys and queries keep the position they have in the text, and sink j stands at
// j + (tokens dropped so far). It is rotated from the numbers that came, because repeated turns of one row, or of its codes,
// would add up their rounding errors.
#pragma once
#include "append.hpp"
#include "ring_cache.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// Owns dim_qk floats per sequence, kv head and sink. Of one RingCache: tokens come through append(), forks are told.
class TurnedSinks {
 public:
  // For all sequences of an empty cache. Replaces whatever it held; on error it keeps it.
  Status create(const RingCache& cache, RopeLayout layout) {
    const CacheRows& rows = cache.rows();
    if (rows.v_in_k)
      return Status::error(Code::unsupported, "cache: sinks with V in K cannot turn, V would turn with them");
    const auto take = [&](Bump& bump, State& state) {
      state.sequences = cache.sequences();
      state.sinks = cache.sinks();
      state.kv_heads = rows.kv_heads;
      state.dim = rows.dim_qk;
      state.layout = layout;
      state.keys = bump.take<float>(cache.sequences() * keys_of_sequence(state));
      state.kept = bump.take<index_t>(cache.sequences());
      state.turned = bump.take<index_t>(cache.sequences());
    };
    if (limited_product({cache.sequences(), cache.sinks(), rows.kv_heads, rows.dim_qk, 4}) == kLargestCache)
      return Status::error(Code::out_of_memory, "cache: %td sequences of %td sinks of %td heads of %td numbers are too much",
                           cache.sequences(), cache.sinks(), rows.kv_heads, rows.dim_qk);
    if (Status status = allocate(owned_, take); !status.ok()) return status;
    std::fill_n(state().kept, state().sequences, index_t{0});
    std::fill_n(state().turned, state().sequences, index_t{0});
    return {};
  }

  // append_tokens, keys rotated by their positions in the text, from cache.seen(sequence) on; keeps what it needs of sinks.
  Status append(RingCache& cache, index_t sequence, const Operand& k, const Operand& v, const RopeTable& table,
                index_t* lost = nullptr) {
    if (Status status = check_call(cache, sequence); !status.ok()) return status;
    const index_t first = cache.seen(sequence), known = std::min(first, state().sinks);
    if (known > state().kept[sequence])
      return Status::error(Code::invalid_argument, "cache: sequence %td has %td sinks, %td came through TurnedSinks", sequence,
                           known, state().kept[sequence]);
    if (Status status = append_tokens(cache, sequence, k, v, {&table, state().layout, first}, lost); !status.ok())
      return status;
    const index_t sinks = std::min(cache.seen(sequence), state().sinks);
    if (sinks <= first) return {};
    for (index_t kv_head = 0; kv_head < state().kv_heads; ++kv_head) {
      for (index_t sink = first; sink < sinks; ++sink) read_token_row(k, sink - first, kv_head, key(sequence, kv_head, sink));
    }
    state().kept[sequence] = sinks;
    // New sinks stand at their places in the text; older ones may have been turned before a rollback.
    if (first == 0) state().turned[sequence] = 0;
    if (state().turned[sequence] != 0) state().turned[sequence] = kAgain;
    return {};
  }

  // What sink 0 is to be rotated by: the tokens the cache has dropped.
  static index_t position(const RingCache& cache, index_t sequence) { return cache.seen(sequence) - cache.len(sequence); }

  // Rotates the sinks to position() and the places behind it, which the table must have; does nothing where they stand there.
  // After every append and every rollback, before the cache is read.
  Status turn(RingCache& cache, index_t sequence, const RopeTable& table, index_t* lost = nullptr) {
    if (Status status = check_call(cache, sequence); !status.ok()) return status;
    const index_t first = position(cache, sequence), sinks = std::min(cache.len(sequence), state().sinks);
    if (sinks == 0 || state().turned[sequence] == first) return {};
    if (sinks > state().kept[sequence])
      return Status::error(Code::invalid_argument, "cache: sequence %td has %td sinks, %td came through TurnedSinks", sequence,
                           sinks, state().kept[sequence]);
    if (Status status = check_rope_table(table, state().dim, "sinks at", first, sinks); !status.ok()) return status;
    float numbers[kAppendDim];
    for (index_t kv_head = 0; kv_head < state().kv_heads; ++kv_head) {
      for (index_t sink = 0; sink < sinks; ++sink) {
        rotate_rows(state().layout, key(sequence, kv_head, sink), 0, numbers, 0, 1, table.cos_at(first + sink),
                    table.sin_at(first + sink), 0, table.pairs, state().dim);
        const index_t clipped =
            store_key(cache.rows(), kv_head, numbers, cache.writable_k_row(sequence, kv_head, sink));
        if (lost != nullptr) *lost += clipped;
      }
    }
    state().turned[sequence] = first;
    return {};
  }

  // After cache.fork(from, to).
  Status fork(index_t from, index_t to) {
    if (Status status = first_error({check_sequence(from, state().sequences), check_sequence(to, state().sequences)});
        !status.ok()) {
      return status;
    }
    if (from == to) return Status::error(Code::invalid_argument, "cache: a copy of sequence %td onto itself", from);
    std::copy_n(key(from, 0, 0), keys_of_sequence(state()), key(to, 0, 0));
    state().kept[to] = state().kept[from];
    state().turned[to] = state().turned[from];
    return {};
  }

  std::size_t bytes() const { return owned_.block.size(); }

 private:
  static constexpr index_t kAgain = -1;

  struct State {
    index_t sequences = 0, sinks = 0, kv_heads = 0, dim = 0;
    RopeLayout layout = RopeLayout::half_split;
    float* keys = nullptr;       // [sequence, kv_head, sink, dim]  not rotated
    index_t* kept = nullptr;     // [sequence]  sinks in `keys`
    index_t* turned = nullptr;   // [sequence]  position of sink 0 in the cache
  };

  const State& state() const { return owned_.state; }
  static index_t keys_of_sequence(const State& state) { return state.kv_heads * state.sinks * state.dim; }
  float* key(index_t sequence, index_t kv_head, index_t sink) const {
    return state().keys + ((sequence * state().kv_heads + kv_head) * state().sinks + sink) * state().dim;
  }
  Status check_call(const RingCache& cache, index_t sequence) const {
    const CacheRows& rows = cache.rows();
    if (cache.sequences() != state().sequences || cache.sinks() != state().sinks || rows.kv_heads != state().kv_heads ||
        rows.dim_qk != state().dim) {
      return Status::error(Code::invalid_argument,
                           "cache: sinks of %td sequences, %td each, of %td heads of %td numbers; the ring has %td, %td, %td "
                           "and %td",
                           state().sequences, state().sinks, state().kv_heads, state().dim, cache.sequences(), cache.sinks(),
                           rows.kv_heads, rows.dim_qk);
    }
    return check_sequence(sequence, state().sequences);
  }

  Owned<State> owned_;
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
