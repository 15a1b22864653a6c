// SPDX-License-Identifier: Apache-2.0
// FRONT DOOR 4, the recurrent half: the ONNX operators LinearAttention and CausalConvWithState, opset 27, on pointers,
// element types and shapes (onnx.hpp says how tensors, outputs and errors work; docs/onnx.md). A header of its own, because
// graphs without such layers need not compile its kernels, six instantiations of the chunk engine.
//
//   fovea::Status status = fovea::onnx_linear_attention({.q_num_heads = 8, .kv_num_heads = 4},
//                                                       {.query = q, .key = k, .value = v, .decay = g, .beta = b},
//                                                       {.output = y, .present_state = state});
//
// Types      f32, f16 and bf16, f64 with fp32 accuracy. All of a call are one type but the states of LinearAttention, which
//            have their own: f32 states beside f16 activations are the better choice, and the ones used where they lie.
// Aliasing   outputs overlap nothing, but present_state may be past_state: a decode then updates it in place.
// Allocates  per call a float copy of gates, betas, weights and states that are not f32; f32 ones are used where they lie.
#pragma once
#include "onnx.hpp"

namespace fovea {
inline namespace v0 {

// S_t = e^{g_t} S_{t-1} + k_t u_t', u_t = v_t or beta_t (v_t - (e^{g_t} S_{t-1})' k_t): with or without g, and beta.
enum class OnnxUpdateRule : std::uint8_t { linear, gated, delta, gated_delta };

struct OnnxLinearAttention {
  OnnxUpdateRule update_rule = OnnxUpdateRule::gated_delta;
  std::int64_t q_num_heads = 0, kv_num_heads = 0;   // required; query head h reads state h / (q_num_heads / kv_num_heads)
  float scale = 0;                                  // 0 = 1/sqrt(head size of the keys)
  std::int64_t chunk_size = 64;                     // a hint, not used: the planner knows better (docs/recurrent.md)
};
struct OnnxLinearAttentionInputs {
  OnnxTensor query = {}, key = {}, value = {};   // [batch, pos, heads * dim]
  OnnxTensor past_state = {};                    // [batch, kv_head, dim_k, dim_v]; absent = zeros
  OnnxTensor decay = {};                         // [batch, pos, kv_head | kv_head * dim_k], natural logarithms
  OnnxTensor beta = {};                          // [batch, pos, kv_head | 1]
};
struct OnnxLinearAttentionOutputs {
  OnnxOutput output = {};          // [batch, pos, q_head * dim_v]
  OnnxOutput present_state = {};   // like past_state and of its type, without one of any; absent = not wanted
};

enum class OnnxConvActivation : std::uint8_t { none, silu };   // "swish" is silu

struct OnnxCausalConvWithState {
  OnnxConvActivation activation = OnnxConvActivation::none;
};
struct OnnxCausalConvWithStateInputs {
  OnnxTensor input = {};        // [batch, channel, pos]
  OnnxTensor weight = {};       // [channel, 1, k]; the last one meets the current position
  OnnxTensor bias = {};         // [channel]
  OnnxTensor past_state = {};   // [batch, channel, k - 1]; absent = zeros
};
struct OnnxCausalConvWithStateOutputs {
  OnnxOutput output = {};          // [batch, channel, pos]
  OnnxOutput present_state = {};   // [batch, channel, k - 1], the newest inputs; absent = not wanted
};

inline namespace FOVEA_ARCH {

Status onnx_linear_attention(const OnnxLinearAttention& attributes, const OnnxLinearAttentionInputs& inputs,
                             const OnnxLinearAttentionOutputs& outputs, Executor executor = {});

Status onnx_causal_conv_with_state(const OnnxCausalConvWithState& attributes, const OnnxCausalConvWithStateInputs& inputs,
                                   const OnnxCausalConvWithStateOutputs& outputs, Executor executor = {});

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea

#include "onnx_recurrent-inl.hpp"
