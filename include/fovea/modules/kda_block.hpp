// SPDX-License-Identifier: Apache-2.0
// The Kimi Delta Attention layer of Kimi Linear (Kimi Team 2025, arXiv 2510.26692), weights as views:
//
//   q, k, v = causal convolution and SiLU of W_q x, W_k x, W_v x; q and k L2-normalised
//   f = W_fb (W_fa x), per key channel    g = -e^A_log softplus(f + dt_bias), or lower_bound sigmoid(e^A_log (f + dt_bias))
//   beta = sigmoid(W_b x), per value head
//   y = W_o [RMSNorm(o_j) gain sigmoid(z_j)],   z = W_gb (W_ga x) + bias    o = KDA of q, k, v, e^g, beta
//
// Prefill, decode and everything between are the same call; what a sequence has seen is in its two states. Owns no memory:
// the states, the workspace and the weights are the caller's.
#pragma once
#include "../mechanisms/kda.hpp"
#include "recurrent_layer.hpp"

namespace fovea {
inline namespace v0 {

// [1, 1, output, input] and [1, 1, 1, n], as the checkpoint has them: f32, bf16 or f16.
struct KdaBlockWeights {
  Operand q, k, v;                  // [heads dim_k, model] twice, [v_heads dim_v, model]
  Operand q_conv, k_conv, v_conv;   // [.., width]  of the same outputs; one packed convolution is three views
  Operand f_a, f_b;                 // [rank, model], [v_heads dim_k, rank]; f_a without data: f_b is [v_heads dim_k, model]
  Operand a_log, dt_bias;           // [v_heads], [v_heads dim_k]; without data 0
  Operand b;                        // [v_heads, model]
  Operand g_a, g_b;                 // [rank, model], [v_heads dim_v, rank]; g_a without data: the full-rank gate
  Operand g_bias;                   // [v_heads dim_v]  without data 0
  Operand norm;                     // [dim_v]
  Operand o;                        // [model, v_heads dim_v]
};

struct KdaBlock {
  index_t model = 2304, heads = 32, v_heads = 32, dim_k = 128, dim_v = 128;
  KdaBlockWeights weights = {};
  std::optional<float> lower_bound = {};   // absent: the softplus gate
  float eps = 1e-5f;                       // of the output norm; that of the L2 norms is 1e-6
  bool negative_eigenvalues = false;       // beta up to 2
};

inline namespace FOVEA_ARCH {

namespace kda_block_parts {

using namespace recurrent_layer;

inline constexpr const char* kLayer = "kda_block";

inline index_t channels_of(const KdaBlock& b) { return 2 * b.heads * b.dim_k + b.v_heads * b.dim_v; }
inline index_t width_of(const KdaBlock& b) { return b.weights.q_conv.extent[3]; }
inline index_t rank_of(const Operand& down) { return down.data == nullptr ? 0 : down.extent[2]; }

struct Memory {
  Common common;
  Rows mixed;   // q | k | v
  Rows low;     // [token, rank]  of either gate
  Rows f;       // [token, v_heads dim_k]
  Rows z, o;    // [token, v_heads dim_v]
  Rows beta;    // [token, v_heads]
  float *a_log, *dt_bias, *g_bias;
};
inline Memory carve(Bump& bump, const KdaBlock& block, index_t tokens, index_t sequences, int lanes, index_t kept) {
  const auto rows = [&](index_t width) { return Rows{bump.take<float>(tokens * width), width}; };
  const index_t gates = block.v_heads * block.dim_k, values = block.v_heads * block.dim_v;
  Memory memory{};
  memory.common = carve_common(bump, channels_of(block), width_of(block), tokens, sequences, lanes, kept);
  memory.mixed = rows(channels_of(block));
  memory.low = rows(std::max(rank_of(block.weights.f_a), rank_of(block.weights.g_a)));
  memory.f = rows(gates);
  memory.z = rows(values);
  memory.o = rows(values);
  memory.beta = rows(block.v_heads);
  memory.a_log = bump.take<float>(block.v_heads);
  memory.dt_bias = bump.take<float>(gates);
  memory.g_bias = bump.take<float>(values);
  return memory;
}

inline Status check_block(const KdaBlock& block, door::Memory& memory) {
  const KdaBlockWeights& w = block.weights;
  if (block.model < 1 || block.heads < 1 || block.v_heads < 1 || block.dim_k < 1 || block.dim_v < 1 ||
      block.v_heads % block.heads != 0)
    return door::invalid("fovea: %s: model %td, %td heads of %td, %td value heads of %td; heads divide value heads", kLayer,
                         block.model, block.heads, block.dim_k, block.v_heads, block.dim_v);
  if (block.dim_k > door::kMaxRecurrentDim || block.dim_v > door::kMaxRecurrentDim)
    return door::unsupported("fovea: %s: dims 1 to %td are supported: dim_k %td, dim_v %td", kLayer, door::kMaxRecurrentDim,
                             block.dim_k, block.dim_v);
  if (!(block.eps >= 0)) return door::invalid("fovea: %s: eps %g", kLayer, static_cast<double>(block.eps));
  if (block.lower_bound && !(*block.lower_bound < 0 && std::isfinite(*block.lower_bound)))
    return door::invalid("fovea: %s: lower_bound %g is not a finite number below 0", kLayer,
                         static_cast<double>(*block.lower_bound));
  const index_t keys = block.heads * block.dim_k, gates = block.v_heads * block.dim_k, values = block.v_heads * block.dim_v;
  const index_t width = std::max<index_t>(width_of(block), 1), f_rank = rank_of(w.f_a), g_rank = rank_of(w.g_a);
  for (const Weight& weight :
       {Weight{"q", w.q, keys, block.model}, Weight{"k", w.k, keys, block.model}, Weight{"v", w.v, values, block.model},
        Weight{"q_conv", w.q_conv, keys, width}, Weight{"k_conv", w.k_conv, keys, width},
        Weight{"v_conv", w.v_conv, values, width}, Weight{"f_a", w.f_a, std::max<index_t>(f_rank, 1), block.model, true},
        Weight{"f_b", w.f_b, gates, f_rank > 0 ? f_rank : block.model}, Weight{"a_log", w.a_log, 0, block.v_heads, true},
        Weight{"dt_bias", w.dt_bias, 0, gates, true}, Weight{"b", w.b, block.v_heads, block.model},
        Weight{"g_a", w.g_a, std::max<index_t>(g_rank, 1), block.model, true},
        Weight{"g_b", w.g_b, values, g_rank > 0 ? g_rank : block.model}, Weight{"g_bias", w.g_bias, 0, values, true},
        Weight{"norm", w.norm, 0, block.dim_v}, Weight{"o", w.o, block.model, values}}) {
    if (Status s = check_weight(kLayer, weight, memory); !s.ok()) return s;
  }
  return {};
}

}   // namespace kda_block_parts

// For up to `tokens` tokens of up to `sequences` sequences in a call, and a conv.final of up to `kept` inputs (or width).
inline std::size_t kda_block_bytes(const KdaBlock& block, index_t tokens, index_t sequences = 1, int lanes = 1,
                                   index_t kept = 0) {
  Bump bump;
  kda_block_parts::carve(bump, block, tokens, sequences, lanes, kept);
  return bump.used() + kAlignment;
}

// One step of the layer.
//   x, y        [batch, 1, pos, model], any plain format, any strides; y may be x
//   conv        [sequence, channel, width - 1 or more], channels all q, all k, all v
//   options     for kda: states [sequence, v_heads, dim_k, dim_v] (layout), cu_len, form, chunk, head_map; its executor runs
//               the projections too, options.workspace is the recurrence's own
//   recurrence  Status(q, k, v, decay, beta, out, options), as kda: replay_step over a cache, for drafts
// On error neither y nor a state has changed.
template <class Recurrence = decltype(kda)>
Status kda_block(const KdaBlock& block, const Operand& x_any, const ConvState& conv, const Result& y_any,
                 const RecurrentOptions<float>& options, std::span<std::byte> workspace,
                 const Recurrence& recurrence = kda) {
  using namespace kda_block_parts;
  const Operand x = door::tidy_operand(x_any);
  const Result y = door::tidy_operand(y_any);
  const Tokens tokens = tokens_of(x, options.cu_len);
  const index_t keys = block.heads * block.dim_k, values = block.v_heads * block.dim_v, width = width_of(block);
  const door::RecurrentShape shape{x.extent[0],   x.extent[2],   tokens.sequences, block.heads, block.heads,
                                   block.v_heads, block.v_heads, block.v_heads,    block.dim_k, block.dim_v};
  door::Memory ranges;
  if (Status s = check_block(block, ranges); !s.ok()) return s;
  if (Status s = check_call(kLayer, x, y, block.model, shape, channels_of(block), width, conv, options, ranges); !s.ok())
    return s;
  const Executor& executor = options.executor;
  const int lanes = executor.lanes();
  const std::size_t needed = kda_block_bytes(block, tokens.count(), tokens.sequences, lanes, kept_of(conv));
  if (Status s = door::check_workspace(workspace, needed); !s.ok()) return s;

  Bump bump(aligned(workspace).data());
  const Memory memory = carve(bump, block, tokens.count(), tokens.sequences, lanes, kept_of(conv));
  const KdaBlockWeights& w = block.weights;
  const auto project = [&](const Operand& weights, const auto& read, const auto& write) {
    project_tokens(executor, memory.common, tokens.count(), weights, read, write);
  };
  const auto from_x = read_tokens(x, tokens.len);
  // to = up (down x), or up x.
  const auto project_gate = [&](const Operand& down, const Operand& up, const auto& write) {
    if (down.data == nullptr) return project(up, from_x, write);
    const Rows low{memory.low.data, down.extent[2]};
    project(down, from_x, write_rows(low));
    project(up, read_rows(low), write);
  };
  project(w.q, from_x, write_rows(memory.mixed));
  project(w.k, from_x, write_rows(memory.mixed, keys));
  project(w.v, from_x, write_rows(memory.mixed, 2 * keys));
  project(w.b, from_x, write_rows(memory.beta));
  project_gate(w.f_a, w.f_b, write_rows(memory.f));
  const bool biased = w.g_bias.data != nullptr;
  if (biased) read_vector(w.g_bias, memory.g_bias);
  project_gate(w.g_a, w.g_b, [&](index_t token, index_t n, index_t count, const float* from) {
    float* const to = memory.z.data + token * values + n;
    for (index_t i = 0; i < count; ++i) to[i] = from[i] + (biased ? memory.g_bias[n + i] : 0.f);
  });

  read_matrix(w.q_conv, memory.common.taps);
  read_matrix(w.k_conv, memory.common.taps + keys * width);
  read_matrix(w.v_conv, memory.common.taps + 2 * keys * width);
  if (Status s = convolve(memory.mixed, tokens, width, memory.common, conv, options); !s.ok()) return s;
  const auto heads = [&](const Rows& rows, index_t first, index_t count, index_t dim) {
    return rows.heads(tokens.batch, tokens.len, first, count, dim);
  };
  const Tensor<float> q = heads(memory.mixed, 0, block.heads, block.dim_k);
  const Tensor<float> k = heads(memory.mixed, keys, block.heads, block.dim_k);
  const Tensor<float> v = heads(memory.mixed, 2 * keys, block.v_heads, block.dim_v);
  const Tensor<float> z = heads(memory.z, 0, block.v_heads, block.dim_v), o = heads(memory.o, 0, block.v_heads, block.dim_v);
  const Tensor<float> beta = heads(memory.beta, 0, block.v_heads, 1), g = heads(memory.f, 0, block.v_heads, block.dim_k);
  if (Status s = l2_norm(q, q, executor); !s.ok()) return s;
  if (Status s = l2_norm(k, k, executor); !s.ok()) return s;
  LogDecayGate gate{.lower_bound = block.lower_bound};
  if (w.a_log.data != nullptr) {
    read_vector(w.a_log, memory.a_log);
    gate.a_log = {memory.a_log, static_cast<std::size_t>(block.v_heads)};
  }
  if (w.dt_bias.data != nullptr) {
    read_vector(w.dt_bias, memory.dt_bias);
    gate.dt_bias = {memory.dt_bias, {block.v_heads, block.dim_k}, {block.dim_k, 1}};
  }
  if (Status s = log_decay_gate(g, gate, g, executor); !s.ok()) return s;
  if (Status s = beta_gate(beta, beta, block.negative_eigenvalues, executor); !s.ok()) return s;

  const Decay<float> decay{.gate = g};
  if (Status s = recurrence(Operand(q), Operand(k), Operand(v), decay, View<const float, 4>(beta), Result(o), options);
      !s.ok())
    return s;
  hand_out(conv, memory.common);
  const GatedRmsNorm norm{.eps = block.eps, .activation = OutputGate::sigmoid};
  if (Status s = gated_rms_norm(o, z, w.norm, o, norm, executor); !s.ok()) return s;
  project(w.o, read_rows({memory.o.data, values}), write_tokens(y, tokens));
  return {};
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
