// SPDX-License-Identifier: Apache-2.0
// FRONT DOOR 2: linear attention and its kin on the CPU, everything whose past is a state of fixed size. One function per
// mechanism; they share shapes, options, states and checks (docs/recurrent.md; docs/mechanisms/ has a page for each).
//
//   fovea::RecurrentOptions<float> options{.initial_state = state, .final_state = state};   // the same memory: in place
//   fovea::Status status = fovea::gated_delta_net(q, k, v, {gate}, beta, out, options);     // a prompt, a part, a token
//
//   S_t = decay(S_{t-1}) + write(k_t, v_t)           decay                       write       header
//   linear_attention  a feature map, a denominator   none                        k v'        mechanisms/linear.hpp
//   performer         random features of softmax     none                        k v'        mechanisms/performer.hpp
//   lolcats           a softmax window besides       none                        k v'        mechanisms/lolcats.hpp
//   retention         RetNet                         per head                    k v'        mechanisms/retention.hpp
//   lightning         MiniMax-01, TransNormer        per head                    k v'        mechanisms/lightning.hpp
//   simple_gla        gated RetNet, YOCO             per token                   k v'        mechanisms/simple_gla.hpp
//   mamba2            SSD: grouped B and C, D        per token                   dt k v'     mechanisms/mamba2.hpp
//   mlstm             stabilised exponential gates   per token                   i k v'      mechanisms/mlstm.hpp
//   gla               GLA, HGRN2                     per token and key channel   k v'        mechanisms/gla.hpp
//   rwkv6             RWKV-5, 6: reads, then writes  per token and key channel   k v'        mechanisms/rwkv6.hpp
//   delta_net         DeltaNet                       none                        delta rule  mechanisms/delta.hpp
//   gated_delta_net   Qwen3-Next                     per token                   delta rule  mechanisms/gated_delta.hpp
//   kda               Kimi Linear                    per token and key channel   delta rule  mechanisms/kda.hpp
//   rwkv7             generalised delta rule         per token and key channel   low rank    mechanisms/rwkv7.hpp
//   log_linear_*      a state per power of two       per token                   either      mechanisms/log_linear.hpp
//   mamba1            selective scan                 per token and cell          dt b x      mechanisms/mamba1.hpp
//   s4d               complex modes of a channel     per cell                    dt b x      mechanisms/s4d.hpp
//   rwkv4             a ratio per channel            per channel                 e^k v       mechanisms/rwkv4.hpp
//   short_conv        the convolution before them    keeps the newest inputs                 mechanisms/short_conv.hpp
//
// Shapes     q [batch, q_head, pos, dim_k], k [batch, k_head, pos, dim_k], v [batch, v_head, pos, dim_v], out [batch,
//            out_head, pos, dim_v]; dims 1 to 4096. Gates and betas [batch | 1, state_head | 1, pos | 1, 1 or dim].
// Heads      state_heads = max(k_heads, v_heads), out_heads = max(q_heads, state_heads). Where a tensor has fewer, each of
//            its heads serves several, in blocks or tiled (HeadMap): weights made for one are wrong in the other.
// States     fp32 [sequence, state_head, dim_k, dim_v], or dim_v first (StateLayout). initial_state null = zeros,
//            final_state null = not wanted; they may be the same memory. Key sums, mLSTM's n and m, levels and the like
//            stand in the mechanism's own parameters.
// Ragged     cu_len [sequence + 1] cuts batch 1 along pos; members without tokens hand their state on.
// Forms      step (in place: decode), fused (token by token in the workspace), chunked (matrix products: prefill). The
//            planner chooses by the longest sequence of a call; they agree to rounding.
// Types      q, k, v and out each f32, bf16, f16 or f64; gates, betas and states are floats. Arithmetic is fp32.
// Strides    any, in elements; innermost strides of 1 are the fast ones.
// Aliasing   outputs and final states overlap no input, no other output and not themselves, but for states in place.
// Errors     a Status with the offending numbers; on error nothing has been written.
// Allocates  nothing on a warm call with the library's thread-local workspace, nothing at all with options.workspace.
// Same bits  for any number of lanes and executor; in one form also for any batch around a sequence, ragged or not (performer: of
//            tensors of 4 positions and more).
//            Reentrant; concurrent calls share nothing.
#pragma once
#include "engine/parts/feature_maps.hpp"
#include "mechanisms/delta.hpp"
#include "mechanisms/gated_delta.hpp"
#include "mechanisms/gla.hpp"
#include "mechanisms/kda.hpp"
#include "mechanisms/lightning.hpp"
#include "mechanisms/linear.hpp"
#include "mechanisms/log_linear.hpp"
#include "mechanisms/lolcats.hpp"
#include "mechanisms/mamba1.hpp"
#include "mechanisms/mamba2.hpp"
#include "mechanisms/mlstm.hpp"
#include "mechanisms/performer.hpp"
#include "mechanisms/retention.hpp"
#include "mechanisms/rwkv4.hpp"
#include "mechanisms/rwkv6.hpp"
#include "mechanisms/rwkv7.hpp"
#include "mechanisms/s4d.hpp"
#include "mechanisms/short_conv.hpp"
#include "mechanisms/simple_gla.hpp"
