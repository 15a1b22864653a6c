// SPDX-License-Identifier: Apache-2.0
// The Gated DeltaNet layer of Qwen3-Next (Yang et al. 2024, arXiv 2412.06464), weights as views:
//
//   [q | k | v | z]_h = W_qkvz x    [b | a]_h = W_ba x           rows grouped by key head h
//   q, k, v through a causal convolution and SiLU, channels in the order all q, all k, all v; q and k L2-normalised
//   beta = sigmoid(b)    g = -e^A_log softplus(a + dt_bias)      per value head; j reads key head j k_heads / v_heads
//   y = W_out [RMSNorm(o_j) gain SiLU(z_j)]                      o = Gated DeltaNet of q, k, v, e^g, beta
//
// Prefill, decode and everything between are the same call; what a sequence has seen is in its two states. Owns no memory:
// the states, the workspace and the weights are the caller's.
#pragma once
#include "../mechanisms/gated_delta.hpp"
#include "recurrent_layer.hpp"

namespace fovea {
inline namespace v0 {

// [1, 1, output, input] and [1, 1, 1, n], as the checkpoint has them: f32, bf16 or f16.
struct GatedDeltaBlockWeights {
  Operand in_qkvz;          // [2 k_heads dim_k + 2 v_heads dim_v, model]  per key head q, k, its values, their gates
  Operand in_ba;            // [2 v_heads, model]                          per key head b and a of its value heads
  Operand conv;             // [2 k_heads dim_k + v_heads dim_v, width]    the last one meets the current token
  Operand a_log, dt_bias;   // [v_heads]
  Operand norm;             // [dim_v]
  Operand out;              // [model, v_heads dim_v]
};

struct GatedDeltaBlock {
  index_t model = 2048, k_heads = 16, v_heads = 32, dim_k = 128, dim_v = 128;
  GatedDeltaBlockWeights weights = {};
  float eps = 1e-6f;                   // of the output norm; that of the L2 norms is 1e-6
  bool negative_eigenvalues = false;   // beta up to 2
};

inline namespace FOVEA_ARCH {

namespace gated_delta_block_parts {

using namespace recurrent_layer;

inline constexpr const char* kLayer = "gated_delta_block";

inline index_t channels_of(const GatedDeltaBlock& b) { return 2 * b.k_heads * b.dim_k + b.v_heads * b.dim_v; }
inline index_t width_of(const GatedDeltaBlock& b) { return b.weights.conv.extent[3]; }

struct Memory {
  Common common;
  Rows mixed;   // q | k | v
  Rows z, o;    // [token, v_heads dim_v]
  Rows b, a;    // [token, v_heads]
  float *a_log, *dt_bias;
};
inline Memory carve(Bump& bump, const GatedDeltaBlock& block, index_t tokens, index_t sequences, int lanes, index_t kept) {
  const auto rows = [&](index_t width) { return Rows{bump.take<float>(tokens * width), width}; };
  Memory memory{};
  memory.common = carve_common(bump, channels_of(block), width_of(block), tokens, sequences, lanes, kept);
  memory.mixed = rows(channels_of(block));
  memory.z = rows(block.v_heads * block.dim_v);
  memory.o = rows(block.v_heads * block.dim_v);
  memory.b = rows(block.v_heads);
  memory.a = rows(block.v_heads);
  memory.a_log = bump.take<float>(block.v_heads);
  memory.dt_bias = bump.take<float>(block.v_heads);
  return memory;
}

inline Status check_block(const GatedDeltaBlock& block, door::Memory& memory) {
  const GatedDeltaBlockWeights& w = block.weights;
  if (block.model < 1 || block.k_heads < 1 || block.v_heads < 1 || block.dim_k < 1 || block.dim_v < 1 ||
      block.v_heads % block.k_heads != 0)
    return door::invalid("fovea: %s: model %td, %td key heads of %td, %td value heads of %td; key heads divide value heads",
                         kLayer, block.model, block.k_heads, block.dim_k, block.v_heads, block.dim_v);
  if (block.dim_k > door::kMaxRecurrentDim || block.dim_v > door::kMaxRecurrentDim)
    return door::unsupported("fovea: %s: dims 1 to %td are supported: dim_k %td, dim_v %td", kLayer, door::kMaxRecurrentDim,
                             block.dim_k, block.dim_v);
  if (!(block.eps >= 0)) return door::invalid("fovea: %s: eps %g", kLayer, static_cast<double>(block.eps));
  const index_t values = block.v_heads * block.dim_v;
  for (const Weight& weight : {Weight{"in_qkvz", w.in_qkvz, 2 * block.k_heads * block.dim_k + 2 * values, block.model},
                               Weight{"in_ba", w.in_ba, 2 * block.v_heads, block.model},
                               Weight{"conv", w.conv, channels_of(block), std::max<index_t>(width_of(block), 1)},
                               Weight{"a_log", w.a_log, 0, block.v_heads}, Weight{"dt_bias", w.dt_bias, 0, block.v_heads},
                               Weight{"norm", w.norm, 0, block.dim_v}, Weight{"out", w.out, block.model, values}}) {
    if (Status s = check_weight(kLayer, weight, memory); !s.ok()) return s;
  }
  return {};
}

}   // namespace gated_delta_block_parts

// For up to `tokens` tokens of up to `sequences` sequences in a call, and a conv.final of up to `kept` inputs (or width).
inline std::size_t gated_delta_block_bytes(const GatedDeltaBlock& block, index_t tokens, index_t sequences = 1,
                                           int lanes = 1, index_t kept = 0) {
  Bump bump;
  gated_delta_block_parts::carve(bump, block, tokens, sequences, lanes, kept);
  return bump.used() + kAlignment;
}

// One step of the layer.
//   x, y        [batch, 1, pos, model], any plain format, any strides; y may be x
//   conv        [sequence, channel, width - 1 or more]
//   options     for gated_delta_net: states [sequence, v_heads, dim_k, dim_v] (layout), cu_len, form, chunk; its executor
//               runs the projections too, options.workspace is the recurrence's own. Head mapping is the layer's.
//   recurrence  Status(q, k, v, decay, beta, out, options), as gated_delta_net: replay_step over a cache, for drafts
// On error neither y nor a state has changed.
template <class Recurrence = decltype(gated_delta_net)>
Status gated_delta_block(const GatedDeltaBlock& block, const Operand& x_any, const ConvState& conv, const Result& y_any,
                         const RecurrentOptions<float>& options, std::span<std::byte> workspace,
                         const Recurrence& recurrence = gated_delta_net) {
  using namespace gated_delta_block_parts;
  const Operand x = door::tidy_operand(x_any);
  const Result y = door::tidy_operand(y_any);
  const Tokens tokens = tokens_of(x, options.cu_len);
  const index_t keys = block.k_heads * block.dim_k, values = block.v_heads * block.dim_v, width = width_of(block);
  const index_t group = block.v_heads / std::max<index_t>(block.k_heads, 1);
  const door::RecurrentShape shape{x.extent[0],   x.extent[2],   tokens.sequences, block.k_heads, block.k_heads,
                                   block.v_heads, block.v_heads, block.v_heads,    block.dim_k,   block.dim_v};
  door::Memory ranges;
  if (Status s = check_block(block, ranges); !s.ok()) return s;
  if (options.head_map != HeadMap::blocks)
    return door::invalid("fovea: %s: in_qkvz groups value heads by key head, so head_map is blocks", kLayer);
  if (Status s = check_call(kLayer, x, y, block.model, shape, channels_of(block), width, conv, options, ranges); !s.ok())
    return s;
  const Executor& executor = options.executor;
  const int lanes = executor.lanes();
  const std::size_t needed = gated_delta_block_bytes(block, tokens.count(), tokens.sequences, lanes, kept_of(conv));
  if (Status s = door::check_workspace(workspace, needed); !s.ok()) return s;

  Bump bump(aligned(workspace).data());
  const Memory memory = carve(bump, block, tokens.count(), tokens.sequences, lanes, kept_of(conv));
  const GatedDeltaBlockWeights& w = block.weights;
  project_tokens(executor, memory.common, tokens.count(), w.in_qkvz, read_tokens(x, tokens.len),
                 write_pieces(std::array<Piece, 4>{{{block.dim_k, memory.mixed, 0},
                                                    {block.dim_k, memory.mixed, keys},
                                                    {group * block.dim_v, memory.mixed, 2 * keys},
                                                    {group * block.dim_v, memory.z, 0}}}));
  project_tokens(executor, memory.common, tokens.count(), w.in_ba, read_tokens(x, tokens.len),
                 write_pieces(std::array<Piece, 2>{{{group, memory.b, 0}, {group, memory.a, 0}}}));

  read_matrix(w.conv, memory.common.taps);
  if (Status s = convolve(memory.mixed, tokens, width, memory.common, conv, options); !s.ok()) return s;
  const auto heads = [&](const Rows& rows, index_t first, index_t count, index_t dim) {
    return rows.heads(tokens.batch, tokens.len, first, count, dim);
  };
  const Tensor<float> q = heads(memory.mixed, 0, block.k_heads, block.dim_k);
  const Tensor<float> k = heads(memory.mixed, keys, block.k_heads, block.dim_k);
  const Tensor<float> v = heads(memory.mixed, 2 * keys, block.v_heads, block.dim_v);
  const Tensor<float> z = heads(memory.z, 0, block.v_heads, block.dim_v), o = heads(memory.o, 0, block.v_heads, block.dim_v);
  const Tensor<float> beta = heads(memory.b, 0, block.v_heads, 1), g = heads(memory.a, 0, block.v_heads, 1);
  if (Status s = l2_norm(q, q, executor); !s.ok()) return s;
  if (Status s = l2_norm(k, k, executor); !s.ok()) return s;
  read_vector(w.a_log, memory.a_log);
  read_vector(w.dt_bias, memory.dt_bias);
  const LogDecayGate gate{.a_log = {memory.a_log, static_cast<std::size_t>(block.v_heads)},
                          .dt_bias = {memory.dt_bias, {block.v_heads, 1}, {1, 0}}};
  if (Status s = log_decay_gate(g, gate, g, executor); !s.ok()) return s;
  if (Status s = beta_gate(beta, beta, block.negative_eigenvalues, executor); !s.ok()) return s;

  const Decay<float> decay{.gate = g};
  if (Status s = recurrence(Operand(q), Operand(k), Operand(v), decay, View<const float, 4>(beta), Result(o), options);
      !s.ok())
    return s;
  hand_out(conv, memory.common);
  if (Status s = gated_rms_norm(o, z, w.norm, o, {.eps = block.eps}, executor); !s.ok()) return s;
  project_tokens(executor, memory.common, tokens.count(), w.out, read_rows({memory.o.data, values}),
                 write_tokens(y, tokens));
  return {};
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
