// SPDX-License-Identifier: Apache-2.0
// The attention layer of DeepSeek-V2, V2-Lite, V3 and Kimi K2 around multi-head latent attention, weights as views:
//
//   c_q = RMSNorm(W_DQ x)    [q_nope | q_pe]_h = W_UQ c_q       V2-Lite: W_Q x        q_pe rotated
//   [c | k_pe] = W_DKV x     c normalised, k_pe rotated: one cached row a token
//   y = W_O [o_1 .. o_H]     o_h = attention of q_h over k_h = [W_UK_h c | k_pe], v_h = W_UV_h c
//
// What computes the o_h is an argument, so that the layer knows no mechanism: MlaAttention of mla.hpp, or whatever else
// takes queries, W_UK and W_UV and a latent cache. Owns no memory: the cache, the workspace and the weights are the
// caller's.
#pragma once
#include <algorithm>
#include <cmath>
#include <span>
#include <utility>

#include "../core/attention_options.hpp"
#include "../core/mla.hpp"
#include "../core/rope.hpp"
#include "../core/status.hpp"
#include "../core/workspace.hpp"
#include "../engine/parts/rope.hpp"
#include "projection.hpp"

namespace fovea {
inline namespace v0 {

// Matrices [1, 1, output, input] as a checkpoint has them (Linear.weight), f32, bf16 or f16, innermost stride 1; gains
// [1, 1, 1, n] also f64.
struct MlaBlockWeights {
  Operand q_a, q_norm;     // W_DQ [q_rank, model] and the gain of c_q; no data: queries have no low-rank path
  Operand q_b;             // W_UQ [head * (nope + rope), q_rank], or W_Q [.., model]
  Operand kv_a, kv_norm;   // W_DKV [latent + rope, model] and the gain of c [latent]
  Operand kv_b;            // [1, head, nope + value, latent]: W_UK_h above W_UV_h
  Operand o;               // W_O [model, head * value]
};

struct MlaBlock {
  MlaDims dims;
  index_t model = 0;
  MlaBlockWeights weights;
  RopeTable rope;                                // rope / 2 pairs
  RopeLayout layout = RopeLayout::interleaved;   // DeepSeek's; Hugging Face's copies of V3 permute to it first
  float scale = 0;                               // mla_scale(dims, yarn_mscale(factor, mscale_all_dim))
  float eps = 1e-6f;
};

inline namespace FOVEA_ARCH {

namespace mla_block_parts {

inline index_t q_width(const MlaDims& d) { return d.heads * (d.nope + d.rope); }
inline index_t q_rank(const MlaBlock& block) { return block.weights.q_a.data == nullptr ? 0 : block.weights.q_a.extent[2]; }

struct Memory {
  float* c_q;           // [token, q_rank]
  float* q;             // [token, head, nope + rope]
  float* rows;          // [token, latent + rope]
  float* o;             // [token, head, value]
  float* gains;         // [q_rank + latent]
  std::byte* scratch;   // [lane]
  std::size_t lane_bytes;
};
inline Memory carve(Bump& bump, const MlaBlock& block, index_t tokens, int lanes) {
  const MlaDims& d = block.dims;
  Bump lane;
  carve_project(lane, tokens);
  Memory memory{};
  memory.c_q = bump.take<float>(tokens * q_rank(block));
  memory.q = bump.take<float>(tokens * q_width(d));
  memory.rows = bump.take<float>(tokens * (d.latent + d.rope));
  memory.o = bump.take<float>(tokens * d.heads * d.value);
  memory.gains = bump.take<float>(q_rank(block) + d.latent);
  memory.lane_bytes = lane.used();
  memory.scratch = bump.take<std::byte>(static_cast<index_t>(lane.used()) * lanes);
  return memory;
}

inline Status check_matrix(const char* name, const Operand& w, index_t heads, index_t rows, index_t columns) {
  if (w.data == nullptr || w.extent != std::array<index_t, 4>{1, heads, rows, columns})
    return Status::error(
        Code::invalid_argument, "fovea: mla_block: %s is [%td, %td, %td, %td]%s, must be [1, %td, %td, %td]", name,
        w.extent[0], w.extent[1], w.extent[2], w.extent[3], w.data == nullptr ? " without data" : "", heads, rows, columns);
  return check_weight_format("mla_block", name, w);
}
inline Status check_gain(const char* name, const Operand& gain, index_t count) {
  if (gain.data != nullptr && gain.extent == std::array<index_t, 4>{1, 1, 1, count} && is_plain(gain.format)) return {};
  return Status::error(Code::invalid_argument, "fovea: mla_block: %s is [%td, %td, %td, %td] of %s, must be [1, 1, 1, %td]",
                       name, gain.extent[0], gain.extent[1], gain.extent[2], gain.extent[3], name_of(gain.format), count);
}

inline Status check_block(const MlaBlock& block) {
  const MlaDims& d = block.dims;
  const MlaBlockWeights& w = block.weights;
  const index_t rank = q_rank(block);
  if (d.heads < 1 || d.nope < 1 || d.rope < 0 || d.latent < 1 || d.value < 1 || block.model < 1)
    return Status::error(Code::invalid_argument,
                         "fovea: mla_block: heads %td, nope %td, rope %td, latent %td, value %td, model %td", d.heads,
                         d.nope, d.rope, d.latent, d.value, block.model);
  if (rank > 0) {
    if (Status s = check_matrix("q_a", w.q_a, 1, rank, block.model); !s.ok()) return s;
    if (Status s = check_gain("q_norm", w.q_norm, rank); !s.ok()) return s;
  }
  if (Status s = check_matrix("q_b", w.q_b, 1, q_width(d), rank > 0 ? rank : block.model); !s.ok()) return s;
  if (Status s = check_matrix("kv_a", w.kv_a, 1, d.latent + d.rope, block.model); !s.ok()) return s;
  if (Status s = check_gain("kv_norm", w.kv_norm, d.latent); !s.ok()) return s;
  if (Status s = check_matrix("kv_b", w.kv_b, d.heads, d.nope + d.value, d.latent); !s.ok()) return s;
  if (Status s = check_matrix("o", w.o, 1, block.model, d.heads * d.value); !s.ok()) return s;
  if (2 * block.rope.pairs != d.rope || (d.rope > 0 && (block.rope.cos == nullptr || block.rope.sin == nullptr)))
    return Status::error(Code::invalid_argument, "fovea: mla_block: the rope table turns 2 x %td numbers, rope is %td",
                         block.rope.pairs, d.rope);
  if (!std::isfinite(block.scale) || !(block.eps >= 0))
    return Status::error(Code::invalid_argument, "fovea: mla_block: scale %g, eps %g", static_cast<double>(block.scale),
                         static_cast<double>(block.eps));
  return {};
}

inline Status check_tokens(const char* name, index_t tokens, index_t width, const std::array<index_t, 4>& extent,
                           Format format, const void* data) {
  if (extent == std::array<index_t, 4>{1, 1, tokens, width} && is_plain(format) && (data != nullptr || tokens == 0))
    return {};
  return Status::error(Code::invalid_argument,
                       "fovea: mla_block: %s is [%td, %td, %td, %td] of %s%s, must be [1, 1, %td, %td] of plain numbers",
                       name, extent[0], extent[1], extent[2], extent[3],
                       static_cast<int>(format) < kFormats ? name_of(format) : "no format",
                       data == nullptr ? " without data" : "", tokens, width);
}

// x / sqrt(mean x^2 + eps) * gain, in place.
inline void rms_norm(float* x, index_t count, const float* gain, float eps) {
  f32 squares(0.f);
  for (index_t d = 0; d < count; d += kLanes) {
    const f32 part = load_strided(x + d, 1, count - d);
    squares = fma(part, part, squares);
  }
  const f32 factor(1.f / std::sqrt(reduce_add(squares) / static_cast<float>(count) + eps));
  for (index_t d = 0; d < count; d += kLanes) {
    const f32 normal = load_strided(x + d, 1, count - d) * factor * load_strided(gain + d, 1, count - d);
    if (count - d >= kLanes) {
      store(x + d, normal);
    } else {
      store_some(x + d, normal, count - d);
    }
  }
}

template <class Cache>
index_t next_position(const Cache& cache, index_t sequence) {
  if constexpr (requires { cache.next_position(sequence); }) {
    return cache.next_position(sequence);
  } else {
    return cache.len(sequence);
  }
}

template <class Cache>
bool is_alive(const Cache& cache, index_t sequence) {
  if constexpr (requires { cache.is_alive(sequence); }) {
    return cache.is_alive(sequence);
  } else {
    return sequence < cache.sequences();
  }
}

}   // namespace mla_block_parts

// For up to `tokens` tokens in a call.
inline std::size_t mla_block_bytes(const MlaBlock& block, index_t tokens, int lanes = 1) {
  Bump bump;
  mla_block_parts::carve(bump, block, tokens, lanes);
  return bump.used() + kAlignment;
}

// One step of the layer for a ragged batch: tokens options.cu_len_q[s] .. cu_len_q[s + 1] - 1 belong to sequence s of the
// cache, for every s; sequences without tokens in this step are left alone.
//   x, y        [1, 1, token, model], any plain format, innermost stride 1 or not
//   cache       rows of latent + rope numbers, V in K (ContiguousCache, PagedCache); the tokens are appended, in its format
//   attend      Status(q [1, head, token, nope + rope], kv_b, Kv, out [1, head, token, value], AttentionOptions)
//   positions   [token] for RoPE; without them a token's place behind what its sequence holds
//   options     for attend, with scale, causal bottom_right and the lengths set by the layer; its executor runs the
//               projections too, options.workspace is attend's own
// On error neither y nor the tokens in the cache have changed (a shared last page may have been copied).
template <class Cache, class Attend>
Status mla_block(const MlaBlock& block, const Operand& x, Cache& cache, const Attend& attend, const Result& y,
                 const AttentionOptions& options, std::span<std::byte> workspace, std::span<const index_t> positions = {}) {
  using namespace mla_block_parts;
  const MlaDims& dims = block.dims;
  const std::span<const index_t> cu = options.cu_len_q;
  const index_t sequences = cache.sequences(), width = dims.latent + dims.rope, q_dim = dims.nope + dims.rope;
  if (Status s = check_block(block); !s.ok()) return s;
  if (Status s = check_lanes(options.executor); !s.ok()) return s;
  if (static_cast<index_t>(cu.size()) != sequences + 1 || cu.front() != 0 || !std::is_sorted(cu.begin(), cu.end()))
    return Status::error(
        Code::invalid_argument,
        "fovea: mla_block: cu_len_q has %zu entries for %td sequences of the cache; it starts at 0 and rises", cu.size(),
        sequences);
  const index_t tokens = cu.back();
  const int lanes = options.executor.lanes();
  if (Status s = check_tokens("x", tokens, block.model, x.extent, x.format, x.data); !s.ok()) return s;
  if (Status s = check_tokens("y", tokens, block.model, y.extent, y.format, y.data); !s.ok()) return s;
  if (cache.rows().kv_heads != 1 || cache.rows().dim_qk != width || !cache.rows().v_in_k)
    return Status::error(Code::invalid_argument,
                         "fovea: mla_block: the cache has %td heads of %td numbers%s, must have 1 of %td with V in K",
                         cache.rows().kv_heads, cache.rows().dim_qk, cache.rows().v_in_k ? "" : " and V apart", width);
  if (!positions.empty() && static_cast<index_t>(positions.size()) != tokens)
    return Status::error(Code::invalid_argument, "fovea: mla_block: %zu positions for %td tokens", positions.size(), tokens);
  if (!options.q_offset.empty() || !options.len_k.empty() || !options.cu_len_k.empty())
    return Status::error(
        Code::invalid_argument,
        "fovea: mla_block: the cache says where queries and keys are; q_offset, len_k and cu_len_k must be empty");
  if (workspace.size() < mla_block_bytes(block, tokens, lanes))
    return Status::error(Code::workspace_too_small, "fovea: mla_block: workspace has %zu bytes, %td tokens need %zu",
                         workspace.size(), tokens, mla_block_bytes(block, tokens, lanes));
  const auto position_of = [&](index_t s, index_t i) {
    const index_t first = cu[static_cast<std::size_t>(s)];
    return positions.empty() ? next_position(cache, s) + i : positions[static_cast<std::size_t>(first + i)];
  };
  const auto each_token = [&](const auto& visit) {
    for (index_t s = 0; s < sequences; ++s) {
      const index_t first = cu[static_cast<std::size_t>(s)], count = cu[static_cast<std::size_t>(s) + 1] - first;
      for (index_t i = 0; i < count; ++i) visit(s, i, first + i);
    }
  };
  Status checked;
  each_token([&](index_t s, index_t i, index_t token) {
    if (!checked.ok()) return;
    if (!is_alive(cache, s)) {
      checked = Status::error(Code::invalid_argument,
                              "fovea: mla_block: tokens for sequence %td, which the cache does not have", s);
    } else if (dims.rope > 0) {
      checked = rope::check_position(block.rope, position_of(s, i), s, token);
    }
  });
  if (!checked.ok()) return checked;

  Bump bump(aligned(workspace).data());
  const Memory memory = carve(bump, block, tokens, lanes);
  const auto read_x = read_tokens(x, tokens);
  const auto rows_at = [](float* rows, index_t row_width) {
    return [rows, row_width](index_t token, index_t n, index_t count, const float* from) {
      std::copy_n(from, count, rows + token * row_width + n);
    };
  };
  const auto read_rows = [](const float* rows, index_t row_width) {
    return [rows, row_width](index_t token, index_t d, index_t count, float* to) {
      std::copy_n(rows + token * row_width + d, count, to);
    };
  };

  // Queries.
  const MlaBlockWeights& w = block.weights;
  if (const index_t rank = q_rank(block); rank > 0) {
    read_strided(w.q_norm.format, w.q_norm.data, w.q_norm.stride[3], rank, memory.gains);
    project_tokens(options.executor, memory, tokens, w.q_a, read_x, rows_at(memory.c_q, rank));
    for (index_t t = 0; t < tokens; ++t) rms_norm(memory.c_q + t * rank, rank, memory.gains, block.eps);
    project_tokens(options.executor, memory, tokens, w.q_b, read_rows(memory.c_q, rank), rows_at(memory.q, q_width(dims)));
  } else {
    project_tokens(options.executor, memory, tokens, w.q_b, read_x, rows_at(memory.q, q_width(dims)));
  }

  // Latent rows.
  float* const gain = memory.gains + q_rank(block);
  read_strided(w.kv_norm.format, w.kv_norm.data, w.kv_norm.stride[3], dims.latent, gain);
  project_tokens(options.executor, memory, tokens, w.kv_a, read_x, rows_at(memory.rows, width));
  for (index_t t = 0; t < tokens; ++t) rms_norm(memory.rows + t * width, dims.latent, gain, block.eps);

  if (dims.rope > 0) {
    each_token([&](index_t s, index_t i, index_t token) {
      const index_t pos = position_of(s, i);
      const float *const cos = block.rope.cos_at(pos), *const sin = block.rope.sin_at(pos);
      float* const q_pe = memory.q + token * q_width(dims) + dims.nope;
      float* const k_pe = memory.rows + token * width + dims.latent;
      rotate_rows(block.layout, q_pe, q_dim, q_pe, q_dim, dims.heads, cos, sin, 0, block.rope.pairs, dims.rope);
      rotate_rows(block.layout, k_pe, width, k_pe, width, 1, cos, sin, 0, block.rope.pairs, dims.rope);
    });
  }

  // Sequences [0, done) have their tokens.
  index_t done = 0;
  const auto roll_back = [&] {
    for (index_t s = 0; s < done; ++s) {
      const index_t count = cu[static_cast<std::size_t>(s) + 1] - cu[static_cast<std::size_t>(s)];
      if (count > 0) static_cast<void>(cache.truncate(s, count));
    }
  };
  for (; done < sequences; ++done) {
    const index_t first = cu[static_cast<std::size_t>(done)], count = cu[static_cast<std::size_t>(done) + 1] - first;
    if (count == 0) continue;
    const Format format = cache.rows().k;
    Status s = cache.append(done, count, [&](index_t token, index_t, std::byte* k_row, std::byte*) {
      quantise_row(format, memory.rows + (first + token) * width, 1, width, nullptr, k_row);
    });
    if (s.ok()) continue;
    roll_back();
    return s;
  }

  const auto batch = cache.batch();
  AttentionOptions step = options;
  step.scale = block.scale;
  step.causal = Causal::bottom_right;
  step.len_k = batch.len_k;
  const Tensor<const float> q{memory.q, {1, dims.heads, tokens, q_dim}, {0, q_dim, q_width(dims), 1}};
  const Tensor<float> o{memory.o, {1, dims.heads, tokens, dims.value}, {0, dims.value, dims.heads * dims.value, 1}};
  if (Status s = attend(Operand(q), w.kv_b, batch.kv, Result(o), std::as_const(step)); !s.ok()) {
    roll_back();
    return s;
  }

  project_tokens(options.executor, memory, tokens, w.o, read_rows(memory.o, dims.heads * dims.value),
                 [&](index_t token, index_t n, index_t count, const float* from) {
                   std::byte* const to = y.data + (token * y.stride[2] + n * y.stride[3]) * row_bytes(y.format, 1);
                   write_strided(y.format, from, count, to, y.stride[3]);
                 });
  return {};
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
