// SPDX-License-Identifier: Apache-2.0
// What the recurrent mechanisms take besides q, k and v, as plain data. A head carries a state S of dim_k x dim_v:
//   S_t = decay(S_{t-1}) + rank-1 part of (k_t, v_t),   o_t = scale * S_t' q_t.
// Real is float at the front doors (gates and states are fp32 whatever q, k and v are stored in) and double in reference/.
//
// Heads. There are state_heads = max(k_heads, v_heads) states and max(q_heads, state_heads) outputs; HeadMap says which head
// of a tensor with fewer serves which. So q and k may have fewer heads than v (grouped value heads: Qwen3-Next), and q more
// than k and v (grouped queries: ONNX LinearAttention).
#pragma once
#include <cstdint>
#include <optional>
#include <span>

#include "executor.hpp"
#include "types.hpp"
#include "view.hpp"

namespace fovea {
inline namespace v0 {

// Which of `few` heads serves head h of `many`. blocks: h / (many / few), each as if repeated in place
// (flash-linear-attention, Hugging Face). tiled: h % few (ggml). Weights of one convention give wrong numbers without any
// error in the other.
enum class HeadMap : std::uint8_t { blocks, tiled };

FOVEA_DATA_INLINE index_t shared_head(index_t h, index_t many, index_t few, HeadMap map) {
  return map == HeadMap::tiled ? h % few : h / (many / few);
}

// How a state lies in memory: [.., dim_k, dim_v] or [.., dim_v, dim_k].
enum class StateLayout : std::uint8_t { k_first, v_first };

// log: g <= 0, the state is multiplied by e^g; -inf erases. alpha: the factor itself, 0 to 1; 0 erases.
enum class DecayForm : std::uint8_t { log, alpha };

// A number per head (RetNet), per token (Mamba-2, Gated DeltaNet) or per token and key channel (GLA, KDA): axes of extent 1
// are shared.
template <class Real>
struct Decay {
  View<const Real, 4> gate = {};   // [batch | 1, state_head | 1, pos | 1, dim_k | 1]
  DecayForm form = DecayForm::log;
};

// The three forms of one recurrence. They agree to rounding; which is fastest depends on the number of tokens.
// step: token by token, the state where it lies: decode. fused: token by token, the state in the workspace. chunked:
// matrix products over chunks of tokens: prefill.
enum class RecurrentForm : std::uint8_t { automatic, step, fused, chunked };

FOVEA_DATA_INLINE constexpr const char* name_of(RecurrentForm form) {
  switch (form) {
    case RecurrentForm::automatic: return "automatic";
    case RecurrentForm::step: return "step";
    case RecurrentForm::fused: return "fused";
    case RecurrentForm::chunked: return "chunked";
  }
  return "?";
}

// What a call does, decided before anything runs; describe() prints it (engine/recurrent_plan.hpp).
struct RecurrentPlan {
  RecurrentForm form = RecurrentForm::chunked;   // never automatic
  index_t chunk = 32;
  Panels panels = Panels::f32;   // in which chunks multiply
  index_t group = 1;             // states of a task: in chunks side by side in every one, in steps one after the other
  index_t tile_panels = 1;       // value panels of a task
  index_t tiles = 1, groups = 1, tasks = 1;
};

// Taken by every mechanism. A sequence without tokens hands its state on unchanged. initial_state and final_state may be the
// same memory. The references read the first six fields; the others say how the kernels run.
template <class Real>
struct RecurrentOptions {
  std::optional<Real> scale = {};   // of q (mLSTM: of k); absent = the mechanism's own, 1/sqrt(dim_k) or 1
  HeadMap head_map = HeadMap::blocks;
  StateLayout layout = StateLayout::k_first;
  View<const Real, 4> initial_state = {};   // [sequence, state_head, dim_k, dim_v] or as `layout` says; null = zeros
  View<Real, 4> final_state = {};           // the same shape; null = not wanted
  std::span<const index_t> cu_len = {};     // [sequence + 1]  ragged: tensors have batch 1, sequence b owns the positions
                                            //                 cu_len[b] .. cu_len[b + 1] - 1

  Executor executor = {};
  std::span<std::byte> workspace = {};   // empty = the library's own, one per thread; a call may then allocate
  RecurrentForm form = RecurrentForm::automatic;
  index_t chunk = 0;   // tokens in a chunk, 1 to 256; 0 = the planner's choice
  // In which chunks multiply. bf16: q, k, scores, pseudo-values and a copy of the state are rounded to 8 bits of mantissa and
  // go through AMX tiles, or the dot product of bf16 pairs, with fp32 sums; the state itself stays fp32 (docs/recurrent.md).
  // Needs AVX-512 BF16; in code compiled for AMX, AMX.
  Panels panels = Panels::f32;
  RecurrentPlan* plan = nullptr;   // where given: filled with what was chosen, once all tensors are checked; not by short_conv, replay_step
};

// Linear attention, o_t = S_t' phi(q_t) / (phi(q_t) . z_t + eps) with z the running sum of phi(k).
template <class Real>
struct LinearOptions {
  bool causal = true;      // false: every token reads the state after the last one
  bool normalize = true;   // false: no denominator
  Real eps = Real(1e-6);
  bool clamp_denominator = false;             // max(denominator, eps) in place of denominator + eps (cosFormer)
  View<const Real, 3> initial_key_sum = {};   // [sequence, state_head, feature]  z
  View<Real, 3> final_key_sum = {};
  std::span<const index_t> first_pos = {};   // [sequence]  tokens that the initial states have seen, for feature maps that
                                             //             look at positions (cosFormer); empty = none
};

// sliding: the newest `window` keys. terraced: the own block of `window` keys and the one before it; only from an empty
// state, and what it hands on is a sliding window.
enum class LolcatsWindow : std::uint8_t { sliding, terraced };

// LoLCATs: softmax over a window and linear attention over all that is older, one denominator. States are per query head.
template <class Real>
struct LolcatsOptions {
  index_t window = 64;
  LolcatsWindow shape = LolcatsWindow::sliding;
  View<const Real, 3> query_map = {}, key_map = {};   // [q_head, dim, feature]  phi(x) = [softmax(x W), softmax(-x W)]
  std::span<const Real> window_weight = {};           // [q_head]  sigmoid of the learned window factor
  Real linear_weight = Real(1);
  View<const Real, 3> initial_key_sum = {};   // [sequence, q_head, 2 feature]
  View<Real, 3> final_key_sum = {};
  View<const Real, 4> initial_window_k = {}, initial_window_v = {};   // [sequence, q_head, n <= window, dim]  oldest first
  View<Real, 4> final_window_k = {}, final_window_v = {};             // [sequence, q_head, min(window, tokens so far), dim]
};

// Mamba-1. A group of channels that shares B and C is a head; S is dim_state x channel, which Mamba stores v_first.
template <class Real>
struct Mamba1Parameters {
  View<const Real, 4> dt = {};   // [batch, group, pos, channel]  after softplus
  View<const Real, 3> a = {};    // [group, channel, dim_state]   -exp(A_log)
  View<const Real, 2> d = {};    // [group, channel]              y += d x; null = no skip
};

// Mamba-2. B and C are k and q, their groups the shared heads; S is dim_state x head_dim, which Mamba stores v_first.
template <class Real>
struct Mamba2Parameters {
  View<const Real, 4> dt = {};    // [batch, head, pos, 1]  after softplus and clamp
  std::span<const Real> a = {};   // [head]                 -exp(A_log)
  View<const Real, 2> d = {};     // [head, 1 | head_dim]   y += d x; null = no skip
};

// S4D: complex modes per channel, time invariant. The state is complex, its last axis real and imaginary part.
template <class Real>
struct S4dParameters {
  View<const Real, 2> log_a_real = {}, a_imag = {};   // [channel, mode]  A = -exp(log_a_real) + i a_imag
  View<const Real, 2> c_real = {}, c_imag = {};       // [channel, mode]
  std::span<const Real> log_dt = {}, d = {};          // [channel]
  View<const Real, 4> initial_state = {};             // [sequence, channel, mode, 2]
  View<Real, 4> final_state = {};
};

// RWKV-4. Its three numbers per channel are kept as a state of three rows: [sequence, head, 3, channel], numerator and
// denominator, both divided by e^epsilon, and epsilon, which is -1e38 at the start.
template <class Real>
struct Rwkv4Parameters {
  View<const Real, 2> w = {};   // [head, channel]  -exp(time_decay)
  View<const Real, 2> u = {};   // [head, channel]  time_first
};

// mLSTM: pre-activations of the exponential input gate and of the sigmoid forget gate. S and n are divided by e^m.
template <class Real>
struct MlstmParameters {
  View<const Real, 4> i = {}, f = {};   // [batch, head, pos, 1]
  Real eps = Real(1e-6);
  View<const Real, 3> initial_n = {};   // [sequence, head, dim_k]
  View<Real, 3> final_n = {};
  View<const Real, 2> initial_m = {};   // [sequence, head]
  View<Real, 2> final_m = {};
};

// Log-linear attention: one state per dyadic bucket of the past. Level 0 is the token itself, level b + 1 a bucket of 2^b
// tokens, live when bit b of the token's index is set; bit_width(len - 1) + 1 levels serve len tokens.
template <class Real>
struct LogLinearOptions {
  View<const Real, 4> level_weight = {};     // [batch, state_head | 1, pos, level]  lambda, of the reading token
  std::span<const index_t> first_pos = {};   // [sequence]  tokens that the initial states have seen; empty = none
  View<const Real, 5> initial_levels = {};   // [sequence, state_head, level, dim_k, dim_v], or with dim_v first (layout)
  View<Real, 5> final_levels = {};           // dead levels are written as zeros; in place they may stay
};

// The depthwise convolution in front of most of them: y_t = act(bias + sum_j weight[j] x_{t - width + 1 + j}).
template <class Real>
struct ShortConvParameters {
  View<const Real, 2> weight = {};   // [channel, width]  the last one meets the current token
  std::span<const Real> bias = {};   // [channel]  empty = none
  bool silu = true;
  View<const Real, 3> initial_state = {};   // [sequence, channel, n >= width - 1]  the newest n inputs; null = zeros
  View<Real, 3> final_state = {};
};

}   // namespace v0
}   // namespace fovea
