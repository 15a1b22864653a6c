// SPDX-License-Identifier: Apache-2.0
// The states of log-linear attention: one per dyadic bucket of the past. Level 0 is the newest token t, level b + 1 the 2^b
// tokens of bit b of t. Before a token t the levels up to z = countr_zero(t) merge into level z + 1.
#pragma once
#include <bit>

#include "chunk_memory.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// Tokens of a sequence at most, and more levels than they need.
inline constexpr index_t kMaxTokens = index_t{1} << 60, kMaxLevels = 64;

inline bool is_live(index_t t, index_t level) { return level == 0 || ((t >> (level - 1)) & 1) != 0; }
inline index_t bits_of(index_t n) { return static_cast<index_t>(std::bit_width(static_cast<std::size_t>(n))); }
inline index_t trailing_zeros(index_t n) { return static_cast<index_t>(std::countr_zero(static_cast<std::size_t>(n))); }
// Levels that the first `tokens` tokens need.
inline index_t levels_for(index_t tokens) { return tokens == 0 ? 0 : bits_of(tokens - 1) + 1; }

struct LevelRun : RecurrentRun {
  View<const float, 4> level_weight{};     // [batch | 1, state_head | 1, pos | 1, level], shared axes with stride 0
  View<const float, 5> initial_levels{};   // [sequence, state_head, level, dim_k, dim_v] or as `layout` says
  View<float, 5> final_levels{};
  index_t levels = 1;   // of the sequence that needs most
};

template <class T>
StateColumns<T> level_columns(const View<T, 5>& levels, StateLayout layout, index_t sequence, index_t head, index_t level,
                              index_t first) {
  const View<T, 4> states{levels.data + level * levels.stride[2],
                          {levels.extent[0], levels.extent[1], levels.extent[3], levels.extent[4]},
                          {levels.stride[0], levels.stride[1], levels.stride[3], levels.stride[4]}};
  return state_columns(states, layout, sequence, head, first);
}

// to = sum of `count` panels, panel n times factors[n] (null: 1).
inline void sum_panels(const float* panels, index_t stride, index_t count, const float* factors, index_t size, float* to) {
  for (index_t at = 0; at < size; at += kLanes) {
    f32 sum = factors == nullptr ? load(panels + at) : load(panels + at) * f32(factors[0]);
    for (index_t n = 1; n < count; ++n) {
      const f32 cells = load(panels + n * stride + at);
      sum = factors == nullptr ? sum + cells : fma(cells, f32(factors[n]), sum);
    }
    store(to + at, sum);
  }
}

// panel = factor panel + k w', k null: only the factor.
inline void update_panel(float* panel, index_t stride, index_t rows, float factor, const float* k, const float* w) {
  f32 written[kPanelVectors];
  FOVEA_UNROLL
  for (int n = 0; n < kPanelVectors; ++n) written[n] = k == nullptr ? f32(0.f) : load(w + n * kLanes);
  for (index_t d = 0; d < rows; ++d, panel += stride) {
    const f32 key(k == nullptr ? 0.f : k[d]);
    FOVEA_UNROLL
    for (int n = 0; n < kPanelVectors; ++n)
      store(panel + n * kLanes, fma(written[n], key, load(panel + n * kLanes) * f32(factor)));
  }
}

// What a lane works in. Rows are [chunk, dim_k], turned ones [dim_k, chunk], both padded to whole vectors.
struct LevelMemory {
  float *k_rows, *k_out, *erase, *q_rows;   // rows; erase: minus what the chunk's keys take from a state, per token
  float *k_t, *q_t, *q_state, *erase_t;     // turned
  float* level_q;                           // [chunk level, dim_k, chunk]  queries as a level meets them
  float *qk, *kk, *decays, *lower, *weights, *mixed, *inverse;   // [chunk, chunk]
  float* transition;                                             // [dim_k, dim_k]
  float *alpha, *prefix, *suffix, *gain, *beta, *column;         // [chunk]
  float* lambda;                                                 // [level, chunk]
  float* corner;                                                 // [chunk, kLanes]  lambda on the diagonal
  float *v, *w;                                                  // [panel, chunk, kPanel], [chunk, kPanel]
  float* out;                                                    // [chunk, kPanel]
  float* row;                                                    // [widest input row]
  float* levels;                                                 // [state, level, panel, dim_k, kPanel]
  float* scales;                                  // [state, level]  levels are kept undecayed where a scalar will do
  float* panel;                                   // [dim_k, kPanel]
  float *token_k, *token_removal;                 // [dim_k]
  float* token_q;                                 // [reader, dim_k]
  float* token_out;                               // [reader, kPanel]
  float *token_v, *token_w, *token_p, *token_y;   // [kPanel]
};

inline index_t level_readers(const RecurrentRun& run) { return run.shape.out_heads / run.shape.state_heads; }

inline LevelMemory carve_levels(Bump& bump, const LevelRun& run, index_t chunk_rows, index_t chunk_levels, bool delta) {
  const index_t dim = padded_dim_k(run.shape), panels = run.plan.tile_panels, readers = level_readers(run);
  const auto floats = [&](index_t count) { return bump.take<float>(count); };
  LevelMemory m{};
  m.row = floats(round_up(std::max(run.shape.dim_k, run.shape.dim_v), kLanes));
  m.panel = floats(dim * kPanel);
  for (float** at : {&m.token_k, &m.token_removal}) *at = floats(dim);
  m.token_q = floats(readers * dim);
  m.token_out = floats(readers * kPanel);
  for (float** at : {&m.token_v, &m.token_w, &m.token_p, &m.token_y}) *at = floats(kPanel);
  if (run.plan.form == RecurrentForm::step) return m;
  m.levels = floats(run.plan.group * run.levels * panels * dim * kPanel);
  if (run.plan.form == RecurrentForm::fused) return m;
  const index_t rows = chunk_rows * dim, square = chunk_rows * chunk_rows;
  m.scales = floats(run.plan.group * run.levels);
  for (float** at : {&m.k_rows, &m.k_out, &m.q_rows, &m.k_t, &m.q_t}) *at = floats(rows);
  for (float** at : {&m.qk, &m.decays, &m.weights}) *at = floats(square);
  if (delta) {
    for (float** at : {&m.erase, &m.erase_t, &m.q_state}) *at = floats(rows);
    for (float** at : {&m.kk, &m.lower, &m.mixed, &m.inverse}) *at = floats(square);
    m.transition = floats(dim * dim);
  }
  m.level_q = floats(chunk_levels * rows);
  for (float** at : {&m.alpha, &m.prefix, &m.suffix, &m.gain, &m.beta, &m.column}) *at = floats(chunk_rows);
  m.lambda = floats(run.levels * chunk_rows);
  m.corner = floats(chunk_rows * kLanes);
  m.v = floats(panels * chunk_rows * kPanel);
  m.w = floats(chunk_rows * kPanel);
  m.out = floats(chunk_rows * kPanel);
  return m;
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
