// SPDX-License-Identifier: Apache-2.0
// One recurrent call, bound: shapes, operands, states, and who works on what. Tasks are columns of states: a sequence, a
// group of states, and a run of value panels; columns never meet, so tasks never talk.
#pragma once
#include <algorithm>

#include "../core/kv.hpp"
#include "../core/recurrent.hpp"
#include "../core/workspace.hpp"
#include "../simd/register_budget.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

struct RecurrentShape {
  index_t batch, len, sequences, q_heads, k_heads, v_heads, state_heads, out_heads, dim_k, dim_v;
};

// The positions of one sequence: [begin, end) of a batch entry.
struct SequenceRun {
  index_t batch, begin, end;
};
inline SequenceRun sequence_run(const RecurrentShape& shape, std::span<const index_t> cu_len, index_t sequence) {
  if (cu_len.empty()) return {sequence, 0, shape.len};
  const auto n = static_cast<std::size_t>(sequence);
  return {0, cu_len[n], cu_len[n + 1]};
}

// A feature map as the engine calls it, row by row; null = the row itself.
struct RowMap {
  const void* map = nullptr;
  void (*apply)(const void* map, index_t head, index_t pos, const float* row, float* features) = nullptr;
  index_t shift = 0;   // from positions of the batch entry to those of the sequence, which `apply` gets
};

struct RecurrentRun {
  RecurrentShape shape{};   // dim_k: features
  Operand q, k, v;
  Result out;
  float scale = 1.f;        // of q
  HeadMap head_map = HeadMap::blocks;
  StateLayout layout = StateLayout::k_first;
  View<const float, 4> initial_state{};
  View<float, 4> final_state{};
  std::span<const index_t> cu_len;
  std::span<const index_t> first_pos;       // [sequence]  tokens before this call, where positions matter; empty = none
  View<const float, 3> initial_key_sum{};   // where the mechanism divides
  View<float, 3> final_key_sum{};
  RowMap q_map{}, k_map{};
  bool read_last = false;   // every token reads the state after the last one
  RecurrentPlan plan{};

  index_t first_of(index_t sequence) const { return first_pos.empty() ? 0 : first_pos[static_cast<std::size_t>(sequence)]; }
};

inline constexpr index_t round_up(index_t n, index_t to) { return (n + to - 1) / to * to; }
inline index_t value_panels(const RecurrentShape& shape) { return (shape.dim_v + kPanel - 1) / kPanel; }
inline index_t padded_dim_k(const RecurrentShape& shape) { return round_up(shape.dim_k, kLanes); }

// The states of a task and their readers.
struct TaskPlace {
  index_t sequence, first_panel, panels;
  index_t group;   // which set of states
  SequenceRun tokens;
};

inline TaskPlace task_place(const RecurrentRun& run, index_t task) {
  const RecurrentPlan& plan = run.plan;
  const index_t tile = task % plan.tiles, group = task / plan.tiles % plan.groups, sequence = task / plan.tiles / plan.groups;
  const index_t first = tile * plan.tile_panels;
  return {sequence, first, std::min(plan.tile_panels, value_panels(run.shape) - first), group,
          sequence_run(run.shape, run.cu_len, sequence)};
}

// The map for the rows of one sequence.
inline RowMap map_of(const RecurrentRun& run, RowMap map, const TaskPlace& place) {
  map.shift = run.first_of(place.sequence) - place.tokens.begin;
  return map;
}

// How many states a task has.
inline index_t group_size(const RecurrentRun& run, index_t group) {
  return std::min(run.plan.group, run.shape.state_heads - group * run.plan.group);
}

// State `member` of a task's group. Those that share a key head follow each other.
inline index_t state_head(const RecurrentRun& run, index_t group, index_t member) {
  const index_t at = group * run.plan.group + member;
  if (run.head_map == HeadMap::blocks) return at;
  const index_t sharing = run.shape.state_heads / run.shape.k_heads;
  return at % sharing * run.shape.k_heads + at / sharing;
}

// Output `reader` of a state: there are out_heads / state_heads.
inline index_t out_head(const RecurrentRun& run, index_t state, index_t reader) {
  const index_t readers = run.shape.out_heads / run.shape.state_heads;
  return run.head_map == HeadMap::tiled ? state + reader * run.shape.state_heads : state * readers + reader;
}

// Where the engine is in a state's sequence.
struct ChunkPlace {
  index_t sequence, batch, head, begin, count;   // positions [begin, begin + count) of the batch entry
};

// Where the row of a token starts.
FOVEA_INLINE const std::byte* row_at(const Operand& x, index_t batch, index_t head, index_t pos) {
  return x.data + (batch * x.stride[0] + head * x.stride[1] + pos * x.stride[2]) * row_bytes(x.format, 1);
}
inline std::byte* row_at(const Result& x, index_t batch, index_t head, index_t pos) {
  return x.data + (batch * x.stride[0] + head * x.stride[1] + pos * x.stride[2]) * row_bytes(x.format, 1);
}
FOVEA_INLINE const float* row_at(const View<const float, 4>& x, index_t batch, index_t head, index_t pos) {
  return x.data + batch * x.stride[0] + head * x.stride[1] + pos * x.stride[2];
}
FOVEA_INLINE const float* row_at(const View<const float, 4>& x, const ChunkPlace& place) {
  return row_at(x, place.batch, place.head, place.begin);
}

// Columns [first, first + count) of one head's state, wherever it lies.
template <class T>
struct StateColumns {
  T* data;
  index_t k_stride, v_stride;
};
template <class T>
StateColumns<T> state_columns(const View<T, 4>& states, StateLayout layout, index_t sequence, index_t head, index_t first) {
  const bool v_first = layout == StateLayout::v_first;
  const index_t k_stride = states.stride[v_first ? 3 : 2], v_stride = states.stride[v_first ? 2 : 3];
  return {states.data + sequence * states.stride[0] + head * states.stride[1] + first * v_stride, k_stride, v_stride};
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
