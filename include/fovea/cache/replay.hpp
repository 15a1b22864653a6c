// SPDX-License-Identifier: Apache-2.0
// Replay: decode over a checkpoint state and the newest tokens instead of a state that every token rewrites (ReplaySSM).
// With a(m, t] the product of the decays of the tokens behind m up to t, from the checkpoint c:
//   p_t = S_c' (a(c, t] k_t) + sum_{c < m < t} (a(m, t] k_t . k_m) d_m,   d_t = beta_t (v_t - p_t),
// and o_t is the same expression of q_t with m <= t. Additive mechanisms have d_t = beta_t v_t. What is kept of a token is
// k, d and its decay, so taking tokens back moves a cursor. The vector k_t walks backwards through the tokens and is decayed
// on the way: products only, so that a decay of 0 is exact. A token reads the state; every `replay` tokens it is rewritten.
#pragma once
#include <cmath>

#include "../call/in_memory.hpp"
#include "../call/recurrent_call.hpp"
#include "../simd/denormals.hpp"
#include "../simd/math.hpp"
#include "state_cache.hpp"

namespace fovea {
inline namespace v0 {

// delta: DeltaNet, Gated DeltaNet, KDA. additive: linear attention, retention, simple GLA, GLA, Mamba-2 (beta = dt).
enum class ReplayRule : std::uint8_t { delta, additive };

inline namespace FOVEA_ARCH {
namespace replay {

// Rows in the workspace are padded like those of ReplayTokens, so that only states need masks.
inline index_t padded(index_t numbers) { return (numbers + 15) / 16 * 16; }

FOVEA_INLINE f32 load_tail(const float* from, index_t count) {
  return count >= kLanes ? load(from) : load_some(from, count);
}
FOVEA_INLINE void store_tail(float* to, f32 v, index_t count) {
  if (count >= kLanes) return store(to, v);
  store_some(to, v, count);
}

inline float dot(const float* a, const float* b, index_t count) {
  f32 sum(0.f);
  for (index_t i = 0; i < count; i += kLanes) sum = fma(load(a + i), load(b + i), sum);
  return reduce_add(sum);
}

// weights[m - begin] = a(m, t] x . k_m for begin <= m < t; x becomes a(begin - 1, t] x.
inline void walk_back(const ReplayTokens& tokens, index_t begin, index_t t, float* x, float* weights) {
  const index_t count = tokens.key_stride;
  if (tokens.decay_stride == 1) {   // one factor for all channels stays out of the vectors until the end
    float factor = tokens.decay(t)[0];
    for (index_t m = t - 1; m >= begin; --m) {
      weights[m - begin] = factor * dot(x, tokens.key(m), count);
      factor *= tokens.decay(m)[0];
    }
    for (index_t i = 0; i < count; i += kLanes) store(x + i, load(x + i) * f32(factor));
    return;
  }
  const float* decay = tokens.decay(t);
  for (index_t m = t - 1; m >= begin; --m) {
    const float* const key = tokens.key(m);
    f32 sum(0.f);
    for (index_t i = 0; i < count; i += kLanes) {
      const f32 decayed = load(x + i) * load(decay + i);
      store(x + i, decayed);
      sum = fma(decayed, load(key + i), sum);
    }
    weights[m - begin] = reduce_add(sum);
    decay = tokens.decay(m);
  }
  for (index_t i = 0; i < count; i += kLanes) store(x + i, load(x + i) * load(decay + i));
}

// to += sum_m weights[m - begin] d_m.
inline void add_values(const ReplayTokens& tokens, index_t begin, index_t end, const float* weights, float* to) {
  for (index_t j = 0; j < tokens.value_stride; j += kLanes) {
    f32 sum = load(to + j);
    index_t place = tokens.place(begin);
    for (index_t m = begin; m < end; ++m) {
      sum = fma_from_memory(weights + (m - begin), load(tokens.values + place * tokens.value_stride + j), sum);
      place = place + 1 == tokens.capacity ? 0 : place + 1;
    }
    store(to + j, sum);
  }
}

// Some vectors to be multiplied with a state, and the results.
struct Reads {
  const float* vectors;   // [count, vector_stride]
  float* results;         // [count, result_stride]
  index_t count, vector_stride, result_stride;
};

// The hardware's own prefetch ends at every 4 KiB.
inline constexpr index_t kAhead = 4096;

// kRows rows of a state of dim_k rows against kReads vectors: the state is walked once, in the order of its memory.
template <int kRows, int kReads>
FOVEA_INLINE void read_rows(const float* state, index_t dim_v, const float* vectors, index_t vector_stride, float* results,
                            index_t result_stride) {
  f32 factor[kReads][kRows];
  for (int r = 0; r < kReads; ++r) {
    for (int x = 0; x < kRows; ++x) factor[r][x] = f32(vectors[r * vector_stride + x]);
  }
  for (index_t j = 0; j < dim_v; j += kLanes) {
    f32 sum[kReads];
    for (int r = 0; r < kReads; ++r) sum[r] = load(results + r * result_stride + j);
    for (int x = 0; x < kRows; ++x) {
      const float* const from = state + x * dim_v + j;
      prefetch(reinterpret_cast<const std::byte*>(from), kAhead);
      const f32 cell = load_tail(from, dim_v - j);
      for (int r = 0; r < kReads; ++r) sum[r] = fma(factor[r][x], cell, sum[r]);
    }
    for (int r = 0; r < kReads; ++r) store(results + r * result_stride + j, sum[r]);
  }
}
template <int kRows>
inline void read_block(const float* state, index_t x, index_t dim_v, const Reads& reads) {
  index_t r = 0;
  for (; r + 2 <= reads.count; r += 2)
    read_rows<kRows, 2>(state + x * dim_v, dim_v, reads.vectors + r * reads.vector_stride + x, reads.vector_stride,
                        reads.results + r * reads.result_stride, reads.result_stride);
  if (r < reads.count)
    read_rows<kRows, 1>(state + x * dim_v, dim_v, reads.vectors + r * reads.vector_stride + x, reads.vector_stride,
                        reads.results + r * reads.result_stride, reads.result_stride);
}

// results = S' vectors; every sum runs over x in order.
inline void read_k_first(const float* state, index_t dim_k, index_t dim_v, const Reads& reads) {
  std::fill_n(reads.results, reads.count * reads.result_stride, 0.f);
  index_t x = 0;
  for (; x + 4 <= dim_k; x += 4) read_block<4>(state, x, dim_v, reads);
  for (; x < dim_k; ++x) read_block<1>(state, x, dim_v, reads);
}

// The state's rows are those of S': four dots at a time. The last rows are read twice rather than one by one; what is
// written behind dim_v is padding.
inline void read_v_first(const float* state, index_t dim_k, index_t dim_v, const Reads& reads) {
  for (index_t j = 0; j < dim_v; j += 4) {
    const float* row[4];
    for (index_t i = 0; i < 4; ++i) row[i] = state + std::min(j + i, dim_v - 1) * dim_k;
    for (index_t r = 0; r < reads.count; ++r) {
      f32 sum[4] = {f32(0.f), f32(0.f), f32(0.f), f32(0.f)};
      for (index_t x = 0; x < dim_k; x += kLanes) {
        for (int i = 0; r == 0 && i < 4; ++i) prefetch(reinterpret_cast<const std::byte*>(row[i] + x), kAhead);
        const f32 factor = load(reads.vectors + r * reads.vector_stride + x);
        for (int i = 0; i < 4; ++i) sum[i] = fma(load_tail(row[i] + x, dim_k - x), factor, sum[i]);
      }
      reduce_add4(sum[0], sum[1], sum[2], sum[3], reads.results + r * reads.result_stride + j);
    }
  }
}

// What a fold adds to a state of rows x columns: state = decay * state + sum_m row[m] column[m].
struct Fold {
  const float* rows;      // [count, row_stride]
  const float* columns;   // [count, column_stride]
  const float* decay;     // [rows], or [columns] of a v-first state
  index_t count, row_stride, column_stride;
};

template <int kRows, int kVectors, bool kDecayColumns>
FOVEA_INLINE void fold_block(float* state, index_t row, index_t columns, index_t j, const Fold& fold) {
  f32 cell[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int c = 0; c < kVectors; ++c) {
      const index_t column = j + c * kLanes;
      const f32 decay = kDecayColumns ? load(fold.decay + column) : f32(fold.decay[row + i]);
      cell[i][c] = decay * load_tail(state + (row + i) * columns + column, columns - column);
    }
  }
  for (index_t m = 0; m < fold.count; ++m) {
    f32 column[kVectors];
    for (int c = 0; c < kVectors; ++c) column[c] = load(fold.columns + m * fold.column_stride + j + c * kLanes);
    for (int i = 0; i < kRows; ++i) {
      const f32 factor(fold.rows[m * fold.row_stride + row + i]);
      for (int c = 0; c < kVectors; ++c) cell[i][c] = fma(factor, column[c], cell[i][c]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int c = 0; c < kVectors; ++c) {
      const index_t column = j + c * kLanes;
      store_tail(state + (row + i) * columns + column, cell[i][c], columns - column);
    }
  }
}
// Blocks of four rows and two vectors: eight sums hide the latency of an FMA, and take six loads for eight of them.
template <int kRows, bool kDecayColumns>
inline void fold_rows(float* state, index_t row, index_t columns, const Fold& fold) {
  index_t j = 0;
  for (; j + kLanes < columns; j += 2 * kLanes) fold_block<kRows, 2, kDecayColumns>(state, row, columns, j, fold);
  if (j < columns) fold_block<kRows, 1, kDecayColumns>(state, row, columns, j, fold);
}
template <bool kDecayColumns>
inline void fold_state(float* state, index_t rows, index_t columns, const Fold& fold) {
  index_t row = 0;
  for (; row + 4 <= rows; row += 4) fold_rows<4, kDecayColumns>(state, row, columns, fold);
  for (; row < rows; ++row) fold_rows<1, kDecayColumns>(state, row, columns, fold);
}

// One lane's slice of the workspace.
struct Lane {
  float *vectors, *results, *weights;   // of the tokens of a call: key (delta) and queries
  float *beta, *out;
  float *keys, *values, *decay;   // of a fold: decayed keys, and values without the ring's seam
};

inline Lane take_lane(Bump& bump, const StateCacheShape& shape, index_t tokens, index_t group) {
  const index_t dim_k = padded(shape.dim_k), dim_v = padded(shape.dim_v), capacity = shape.replay + shape.max_draft;
  const index_t reads = tokens * (1 + group);
  Lane lane;
  lane.vectors = bump.take<float>(reads * dim_k);
  lane.results = bump.take<float>(reads * dim_v);
  lane.weights = bump.take<float>(reads * capacity);
  lane.beta = bump.take<float>(dim_v);
  lane.out = bump.take<float>(dim_v);
  lane.keys = bump.take<float>(capacity * dim_k);
  lane.values = bump.take<float>(capacity * dim_v);
  lane.decay = bump.take<float>(dim_k);
  return lane;
}

// The tokens [begin, end) of one head go into its state: a(m, end) k_m d_m' each, from the newest back.
inline void fold_head(const StateCacheShape& shape, float* state, const ReplayTokens& tokens, index_t begin, index_t end,
                      const Lane& lane) {
  std::fill_n(lane.decay, tokens.key_stride, 1.f);
  for (index_t m = end - 1; m >= begin; --m) {
    float* const key = lane.keys + (m - begin) * tokens.key_stride;
    const float *const from = tokens.key(m), *const decay = tokens.decay(m);
    for (index_t x = 0; x < tokens.key_stride; x += kLanes) {
      const f32 behind = load(lane.decay + x);
      store(key + x, behind * load(from + x));
      store(lane.decay + x, behind * (tokens.decay_stride == 1 ? f32(*decay) : load(decay + x)));
    }
    std::copy_n(tokens.value(m), tokens.value_stride, lane.values + (m - begin) * tokens.value_stride);
  }
  if (shape.layout == StateLayout::k_first) {
    fold_state<false>(state, shape.dim_k, shape.dim_v,
                      {lane.keys, lane.values, lane.decay, end - begin, tokens.key_stride, tokens.value_stride});
  } else {
    fold_state<true>(state, shape.dim_v, shape.dim_k,
                     {lane.values, lane.keys, lane.decay, end - begin, tokens.value_stride, tokens.key_stride});
  }
}

struct Call {
  StateCache& cache;
  index_t layer;
  std::span<const index_t> sequences;
  ReplayRule rule;
  const Operand &q, &k, &v;
  const Decay<float>& decay;
  const View<const float, 4>& beta;
  const Result& out;
  const RecurrentOptions<float>& options;
  door::RecurrentShape shape;
  float scale;
};

inline void read_row(const Operand& x, index_t batch, index_t head, index_t pos, float* to, index_t padded_to) {
  read_numbers(x.format, row_at(x, batch, head, pos), x.stride[3], x.extent[3], to);
  std::fill(to + x.extent[3], to + padded_to, 0.f);
}

// `count` numbers of a gate at a token, one of them standing for all, and `absent` where there is no gate.
inline void read_gate(const View<const float, 4>& gate, index_t batch, index_t head, index_t pos, index_t count,
                      float absent, float* to) {
  const auto at = [&](std::size_t axis, index_t n) { return gate.extent[axis] == 1 ? 0 : n * gate.stride[axis]; };
  if (gate.data == nullptr || gate.extent[3] == 1) {
    std::fill_n(to, count, gate.data == nullptr ? absent : gate.data[at(0, batch) + at(1, head) + at(2, pos)]);
    return;
  }
  const float* const from = gate.data + at(0, batch) + at(1, head) + at(2, pos);
  for (index_t i = 0; i < count; ++i) to[i] = from[i * gate.stride[3]];
}

inline void read_decay(const Call& call, index_t batch, index_t head, index_t pos, const ReplayTokens& tokens, float* to) {
  const index_t count = tokens.decay_stride == 1 ? 1 : call.shape.dim_k;
  read_gate(call.decay.gate, batch, head, pos, count, call.decay.form == DecayForm::log ? 0.f : 1.f, to);
  std::fill(to + count, to + tokens.decay_stride, 0.f);
  if (call.decay.form == DecayForm::alpha) return;
  for (index_t i = 0; i < count; i += kLanes)
    store_tail(to + i, exp2(load_tail(to + i, count - i) * f32(kLog2e)), count - i);
}

// All tokens of one sequence and one state head.
inline void step_head(const Call& call, index_t member, index_t head, const Lane& lane) {
  StateCache& cache = call.cache;
  const index_t sequence = call.sequences[static_cast<std::size_t>(member)];
  const door::SequenceRun run = door::sequence_run(call.shape, call.options.cu_len, member);
  const index_t count = run.end - run.begin, states = call.shape.state_heads, group = call.shape.out_heads / states;
  if (count == 0) return;
  const ReplayTokens tokens = cache.replayed(call.layer, sequence, head);
  const index_t begin = cache.checkpoint(sequence), folded = cache.folded(call.layer, sequence);
  const index_t first = cache.done(call.layer, sequence), dim_k = tokens.key_stride, dim_v = tokens.value_stride;
  float* const state = cache.state(call.layer, sequence).data + head * cache.shape().dim_k * cache.shape().dim_v;
  if (folded < begin) fold_head(cache.shape(), state, tokens, folded, begin, lane);

  const bool delta = call.rule == ReplayRule::delta;
  const HeadMap map = call.options.head_map;
  const auto out_head = [&](index_t g) { return map == HeadMap::tiled ? head + g * states : head * group + g; };
  const index_t keys = delta ? 1 : 0, rows = keys + group;   // vectors of a token: its key if it is read, its queries
  for (index_t i = 0; i < count; ++i) {
    const index_t t = first + i, pos = run.begin + i;
    float* const stored = tokens.key(t);
    read_row(call.k, run.batch, shared_head(head, states, call.shape.k_heads, map), pos, stored, dim_k);
    read_decay(call, run.batch, head, pos, tokens, tokens.decay(t));
    if (delta) {
      float* const key = lane.vectors + i * rows * dim_k;
      std::copy_n(stored, dim_k, key);
      walk_back(tokens, begin, t, key, lane.weights + i * rows * tokens.capacity);
    }
    for (index_t g = 0; g < group; ++g) {
      const index_t row = i * rows + keys + g;
      float *const query = lane.vectors + row * dim_k, *const weights = lane.weights + row * tokens.capacity;
      read_row(call.q, run.batch, shared_head(out_head(g), call.shape.out_heads, call.shape.q_heads, map), pos, query,
               dim_k);
      weights[t - begin] = dot(query, stored, dim_k);
      walk_back(tokens, begin, t, query, weights);
    }
  }

  const Reads reads{lane.vectors, lane.results, count * rows, dim_k, dim_v};
  if (cache.shape().layout == StateLayout::k_first) {
    read_k_first(state, call.shape.dim_k, call.shape.dim_v, reads);
  } else {
    read_v_first(state, call.shape.dim_k, call.shape.dim_v, reads);
  }

  for (index_t i = 0; i < count; ++i) {
    const index_t t = first + i, pos = run.begin + i;
    float* const value = tokens.value(t);
    read_row(call.v, run.batch, shared_head(head, states, call.shape.v_heads, map), pos, value, dim_v);
    read_gate(call.beta, run.batch, head, pos, call.shape.dim_v, 1.f, lane.beta);
    std::fill(lane.beta + call.shape.dim_v, lane.beta + dim_v, 0.f);
    float* const predicted = lane.results + i * rows * dim_v;   // delta
    if (delta) add_values(tokens, begin, t, lane.weights + i * rows * tokens.capacity, predicted);
    for (index_t j = 0; j < dim_v; j += kLanes) {
      const f32 wanted = delta ? load(value + j) - load(predicted + j) : load(value + j);
      store(value + j, load(lane.beta + j) * wanted);
    }
    for (index_t g = 0; g < group; ++g) {
      const index_t row = i * rows + keys + g;
      float* const sum = lane.results + row * dim_v;
      add_values(tokens, begin, t + 1, lane.weights + row * tokens.capacity, sum);
      for (index_t j = 0; j < dim_v; j += kLanes) store(lane.out + j, load(sum + j) * f32(call.scale));
      const Result& o = call.out;
      write_numbers(o.format, lane.out, call.shape.dim_v, row_at(o, run.batch, out_head(g), pos), o.stride[3]);
    }
  }
}

inline std::size_t lane_bytes(const StateCacheShape& shape, index_t tokens, index_t group) {
  Bump counting;
  take_lane(counting, shape, tokens, group);
  return counting.used();
}

inline Status check_replayed(const StateCache& cache, index_t layer) {
  if (!cache.replays()) return door::invalid("fovea: the cache keeps a state per token, it does not replay");
  return cache.check_layer(layer);
}

inline Status check(const Call& call, door::Memory& memory) {
  const StateCache& cache = call.cache;
  const StateCacheShape& kept = cache.shape();
  const door::RecurrentShape& shape = call.shape;
  if (Status s = check_replayed(cache, call.layer); !s.ok()) return s;
  if (call.rule > ReplayRule::additive)
    return door::invalid("fovea: rule is %d, no value of the enum", static_cast<int>(call.rule));
  if (call.decay.form > DecayForm::alpha)
    return door::invalid("fovea: the decay's form is %d, no value of the enum", static_cast<int>(call.decay.form));
  if (call.options.initial_state || call.options.final_state)
    return door::invalid("fovea: a replayed call has its states in the cache; initial_state and final_state must be null");
  if (Status s = door::check_recurrent(call.q, call.k, call.v, call.out, call.options, memory); !s.ok()) return s;
  if (shape.state_heads != kept.heads || shape.dim_k != kept.dim_k || shape.dim_v != kept.dim_v)
    return door::invalid("fovea: %td states of %td x %td, the cache has %td of %td x %td", shape.state_heads, shape.dim_k,
                         shape.dim_v, kept.heads, kept.dim_k, kept.dim_v);
  if (static_cast<index_t>(call.sequences.size()) != shape.sequences)
    return door::invalid("fovea: %zu sequences are named, the tensors have %td", call.sequences.size(), shape.sequences);
  if (call.decay.gate.data != nullptr) {
    const index_t width = kept.channel_decay ? shape.dim_k : 1;
    if (Status s = door::check_gate("the decay", call.decay.gate, shape, shape.state_heads, width, 1, memory); !s.ok())
      return s;
  }
  if (call.beta.data != nullptr) {
    if (Status s = door::check_gate("beta", call.beta, shape, shape.state_heads, shape.dim_v, 1, memory); !s.ok()) return s;
  }
  if (Status s = memory.check_apart(); !s.ok()) return s;
  for (std::size_t n = 0; n < call.sequences.size(); ++n) {
    const index_t sequence = call.sequences[n];
    if (Status s = cache.check_open(sequence); !s.ok()) return s;
    const door::SequenceRun run = door::sequence_run(shape, call.options.cu_len, static_cast<index_t>(n));
    const index_t begun =
        cache.steps_begun(sequence) ? cache.len(sequence) + cache.begun(sequence) : cache.done(call.layer, sequence);
    if (run.end - run.begin > begun - cache.done(call.layer, sequence))
      return door::invalid("fovea: %td tokens for sequence %td, which has begun steps for %td more in layer %td",
                           run.end - run.begin, sequence, begun - cache.done(call.layer, sequence), call.layer);
    if (std::find(call.sequences.begin(), call.sequences.begin() + static_cast<index_t>(n), sequence) !=
        call.sequences.begin() + static_cast<index_t>(n))
      return door::invalid("fovea: sequence %td is named twice", sequence);
  }
  return {};
}

}   // namespace replay

// Bytes that replay_step() needs for `tokens` tokens per sequence at most, and replay_fold() for 0 tokens.
inline std::size_t replay_workspace_bytes(const StateCache& cache, index_t q_heads, index_t tokens, int lanes) {
  const index_t group = std::max(index_t{1}, q_heads / std::max(index_t{1}, cache.shape().heads));
  return static_cast<std::size_t>(lanes) * replay::lane_bytes(cache.shape(), tokens, group) + kAlignment;
}

// The next tokens of the sequences named in layer `layer` of a cache that replays; each has begin_steps() before and
// commit() after. q [batch, q_head, pos, dim_k], k, v, out as in every recurrent mechanism, batch entry b (or, with
// options.cu_len, run b) the next tokens of sequences[b]. The decay may be null: none. beta [batch, state_head | 1, pos,
// 1 | dim_v] or null: 1. Of the options: scale (absent: 1/sqrt(dim_k)), head_map, cu_len, executor, workspace. A task is a
// head of a sequence.
inline Status replay_step(StateCache& cache, index_t layer, std::span<const index_t> sequences, ReplayRule rule,
                          const Operand& q, const Operand& k, const Operand& v, const Decay<float>& decay,
                          const View<const float, 4>& beta, const Result& out, const RecurrentOptions<float>& options = {}) {
  const door::RecurrentShape shape = door::recurrent_shape(q, k, v, options);
  const replay::Call call{cache,
                          layer,
                          sequences,
                          rule,
                          q,
                          k,
                          v,
                          decay,
                          beta,
                          out,
                          options,
                          shape,
                          options.scale ? *options.scale : 1.f / std::sqrt(static_cast<float>(shape.dim_k))};
  door::Memory memory;
  if (Status s = replay::check(call, memory); !s.ok()) return s;
  index_t longest = 0;
  for (index_t n = 0; n < shape.sequences; ++n) {
    const door::SequenceRun run = door::sequence_run(shape, options.cu_len, n);
    longest = std::max(longest, run.end - run.begin);
  }
  if (longest == 0) return {};
  const index_t tasks = shape.sequences * shape.state_heads, group = shape.out_heads / shape.state_heads;
  const int lanes = static_cast<int>(std::min<index_t>(options.executor.lanes(), tasks));
  const std::size_t each = replay::lane_bytes(cache.shape(), longest, group);
  const auto run_head = [&](Bump bump, index_t task) {
    const FlushDenormals flush;
    replay::step_head(call, task / shape.state_heads, task % shape.state_heads,
                      replay::take_lane(bump, cache.shape(), longest, group));
  };
  if (Status s = door::deal_in_memory<door::LocalBytes>(options.executor, lanes, tasks, options.workspace, each, run_head);
      !s.ok())
    return s;
  for (index_t n = 0; n < shape.sequences; ++n) {
    const index_t sequence = sequences[static_cast<std::size_t>(n)];
    const door::SequenceRun run = door::sequence_run(shape, options.cu_len, n);
    if (run.end == run.begin) continue;
    cache.set_done(layer, sequence, cache.done(layer, sequence) + run.end - run.begin);
    cache.set_folded(layer, sequence, cache.checkpoint(sequence));
  }
  return {};
}

// All committed tokens of a sequence go into the checkpoints of all layers: before begin_call(), or to read state(). They
// cannot be rolled back any more.
inline Status replay_fold(StateCache& cache, index_t sequence, const Executor& executor = {},
                          std::span<std::byte> given = {}) {
  if (Status s = replay::check_replayed(cache, 0); !s.ok()) return s;
  if (Status s = cache.check_idle(sequence); !s.ok()) return s;
  const StateCacheShape& shape = cache.shape();
  const index_t tasks = shape.layers * shape.heads, end = cache.len(sequence);
  const int lanes = static_cast<int>(std::min<index_t>(executor.lanes(), tasks));
  const std::size_t each = replay::lane_bytes(shape, 0, 1);
  const auto fold = [&](Bump bump, index_t task) {
    const FlushDenormals flush;
    const index_t layer = task / shape.heads, head = task % shape.heads;
    if (cache.folded(layer, sequence) == end) return;
    replay::fold_head(shape, cache.state(layer, sequence).data + head * shape.dim_k * shape.dim_v,
                      cache.replayed(layer, sequence, head), cache.folded(layer, sequence), end,
                      replay::take_lane(bump, shape, 0, 1));
  };
  if (Status s = door::deal_in_memory<door::LocalBytes>(executor, lanes, tasks, given, each, fold); !s.ok()) return s;
  for (index_t layer = 0; layer < shape.layers; ++layer) cache.set_folded(layer, sequence, end);
  cache.set_checkpoint(sequence, end);
  return {};
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
