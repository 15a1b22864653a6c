// SPDX-License-Identifier: Apache-2.0
// FRONT DOOR 4: the attention operators of ONNX for authors of engines: pointers, element types and shapes as a runtime of
// graphs has them, attributes with their defaults, the operators' own rules to the letter (docs/onnx.md).
//
//   fovea::Status status = fovea::onnx_attention({.is_causal = 1}, {.q = q, .k = k, .v = v}, {.y = y});
//
// Tensors    dense, row-major, aligned for their element type; the caller infers the shapes of outputs; they are checked.
// Types      f32, f16, bf16 and f64 where the operator allows them. Attention computes in fp32 whatever the type: f64
//            tensors and softmax_precision 11 get fp32 accuracy, softmax_precision 10 and 16 more than they ask for.
// Aliasing   outputs overlap no input and no other output; onnx_rotary_embedding and onnx_tensor_scatter also work in place.
// Errors     a Status with the offending numbers; on error nothing has been written. Where memory runs out in the middle
//            (workspace_too_small, out_of_memory), present outputs and Y may stand already.
// Allocates  what fovea::attention allocates, and per call two tables of batch numbers, a float copy of masks of other
//            types than bool and f32, and room for past and new keys where they are not wanted as present_key.
// Kernels    are compiled for K and V in the formats listed, by default all four.
#pragma once
#include <cstdint>
#include <optional>
#include <span>

#include "attention.hpp"
#include "engine/parts/rope.hpp"

namespace fovea {
inline namespace v0 {

// TensorProto.DataType.
enum class OnnxType : std::int32_t {
  none = 0,   // an optional tensor that is absent
  f32 = 1,
  u8 = 2,
  i8 = 3,
  u16 = 4,
  i16 = 5,
  i32 = 6,
  i64 = 7,
  boolean = 9,   // one byte, 0 or not
  f16 = 10,
  f64 = 11,
  u32 = 12,
  u64 = 13,
  c64 = 14,
  c128 = 15,
  bf16 = 16,
  e4m3fn = 17,
  e4m3fnuz = 18,
  e5m2 = 19,
  e5m2fnuz = 20
};

struct OnnxTensor {
  const void* data = nullptr;
  OnnxType type = OnnxType::none;
  std::span<const std::int64_t> shape = {};
};
struct OnnxOutput {
  void* data = nullptr;
  OnnxType type = OnnxType::none;
  std::span<const std::int64_t> shape = {};
};

// Attributes keep the operators' names and defaults.
struct OnnxAttention {
  std::optional<float> scale = {};                              // 1/sqrt(head size) if absent
  std::int64_t is_causal = 0;
  float softcap = 0;                                            // 0 = off; acts before the mask, as since ONNX 1.22
  std::int64_t q_num_heads = 0, kv_num_heads = 0;               // needed for 3-D tensors; for 4-D 0 or what the shapes say
  std::int64_t qk_matmul_output_mode = 0;                       // as since ONNX 1.22: 0 scaled QK^T, 1 after softcap,
                                                                // 2 after softcap and mask (-inf where masked),
                                                                // 3 the weights (0 in an empty row)
  std::int64_t softmax_precision = 0;                           // 0 (absent), 1, 10, 11 or 16
  std::int64_t left_window_size = -1, right_window_size = -1;   // since opset 25
  std::int64_t opset = 25;                                      // of the model: nonpad_kv_seqlen since 24, windows since 25
};

struct OnnxAttentionInputs {
  OnnxTensor q = {}, k = {}, v = {};           // 4-D [batch, heads, pos, dim], or all 3-D [batch, pos, heads * dim]; v may
                                               // have its own type
  OnnxTensor attn_mask = {};                   // broadcast from the right to [batch, q_head, len_q, keys]: bool (true =
                                               // attend) or a number to be added; a last axis shorter than past and new
                                               // keys masks those behind it
  OnnxTensor past_key = {}, past_value = {};   // [batch, kv_head, past, dim]
  OnnxTensor nonpad_kv_seqlen = {};            // i64 [batch]: keys in use of an external cache, not together with past_key
};
struct OnnxAttentionOutputs {
  OnnxOutput y = {};
  OnnxOutput present_key = {}, present_value = {};   // [batch, kv_head, past + new, dim]
  OnnxOutput qk_matmul_output = {};   // [batch, q_head, len_q, past + new]; a scalar loop in double, for looking inside
};

struct OnnxRotaryEmbedding {
  std::int64_t interleaved = 0, rotary_embedding_dim = 0, num_heads = 0;
};
struct OnnxRotaryEmbeddingInputs {
  OnnxTensor x = {};                           // 4-D [batch, head, pos, dim] or 3-D [batch, pos, head * dim]
  OnnxTensor cos_cache = {}, sin_cache = {};   // with position_ids [position, pair], else [batch, pos, pair]
  OnnxTensor position_ids = {};                // i64 [batch, pos]
};

enum class OnnxScatterMode : std::uint8_t { linear, circular };
struct OnnxTensorScatter {
  std::int64_t axis = -2;
  OnnxScatterMode mode = OnnxScatterMode::linear;
};
struct OnnxTensorScatterInputs {
  OnnxTensor past_cache = {}, update = {}, write_indices = {};   // write_indices i64 [batch]; absent = 0
};

// A step of a FlexAttention score_mod, ready made.
struct OnnxModifier {
  enum class Kind : std::uint8_t {
    add,                  // s + value
    multiply,             // s * value
    soft_cap,             // value * tanh(s / value)
    causal_mask,          // -inf where key > query
    relative_positional   // s + value * (query - key)
  };
  Kind kind = Kind::add;
  float value = 0;
};
struct OnnxFlexAttention {
  std::optional<float> scale = {};
  std::int64_t softmax_precision = 0;
  std::span<const OnnxModifier> score_mod = {};   // one after the other
  float prob_scale = 1;                           // prob_mod: weights times a constant
};
struct OnnxFlexAttentionInputs {
  OnnxTensor q = {}, k = {}, v = {};   // [batch, heads, pos, dim], one type
};

using OnnxFormats = Formats<Format::f32, Format::f64, Format::bf16, Format::f16>;

inline namespace FOVEA_ARCH {

// Attention, opsets 23 to 25.
template <class Compiled = OnnxFormats>
Status onnx_attention(const OnnxAttention& attributes, const OnnxAttentionInputs& inputs,
                      const OnnxAttentionOutputs& outputs, Executor executor = {});

// FlexAttention of ai.onnx.preview 1. A row that sees no key gives 0 where the operator's own definition gives NaN.
template <class Compiled = OnnxFormats>
Status onnx_flex_attention(const OnnxFlexAttention& attributes, const OnnxFlexAttentionInputs& inputs, const OnnxOutput& y,
                           Executor executor = {});

// RotaryEmbedding, opset 23. y may be x.
Status onnx_rotary_embedding(const OnnxRotaryEmbedding& attributes, const OnnxRotaryEmbeddingInputs& inputs,
                             const OnnxOutput& y);

// TensorScatter, opset 24: update written into the cache at write_indices[batch] along axis; any type of whole bytes. Where
// present_cache is past_cache, only the update is copied.
Status onnx_tensor_scatter(const OnnxTensorScatter& attributes, const OnnxTensorScatterInputs& inputs,
                           const OnnxOutput& present_cache);

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea

#include "onnx-inl.hpp"
