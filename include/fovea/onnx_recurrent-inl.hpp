// SPDX-License-Identifier: Apache-2.0
// Behind the recurrent ONNX operators: shapes checked and turned into views, then the mechanism that the attributes name.
#pragma once
#include "mechanisms/delta.hpp"
#include "mechanisms/gated_delta.hpp"
#include "mechanisms/gla.hpp"
#include "mechanisms/kda.hpp"
#include "mechanisms/linear.hpp"
#include "mechanisms/short_conv.hpp"
#include "mechanisms/simple_gla.hpp"
#include "onnx_recurrent.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {
namespace onnx {

template <class T>
index_t elements_of(const T& tensor) {
  index_t count = 1;
  for (const std::int64_t extent : tensor.shape) count *= extent;
  return count;
}

// Numbers of a tensor as floats: where they lie, or widened into memory of the call. Null where there is no tensor.
class Floats {
 public:
  Status read(const OnnxTensor& tensor) {
    data_ = static_cast<const float*>(tensor.data);
    if (tensor.type == OnnxType::none || tensor.type == OnnxType::f32) return {};
    const index_t count = elements_of(tensor);
    if (Status s = own_.take(count); !s.ok()) return s;
    if (count > 0) read_numbers(format_of(tensor.type), static_cast<const std::byte*>(tensor.data), 1, count, own_.data());
    data_ = own_.data();
    return {};
  }
  const float* data() const { return data_; }

 private:
  const float* data_ = nullptr;
  Scratch<float> own_;
};

// The same for what is written: narrowed into the tensor at the end.
class WrittenFloats {
 public:
  Status begin(const OnnxOutput& tensor) {
    tensor_ = tensor;
    data_ = static_cast<float*>(tensor.data);
    if (tensor.type == OnnxType::none || tensor.type == OnnxType::f32) return {};
    if (Status s = own_.take(elements_of(tensor)); !s.ok()) return s;
    data_ = own_.data();
    return {};
  }
  void end() const {
    if (tensor_.type == OnnxType::none || tensor_.type == OnnxType::f32 || elements_of(tensor_) == 0) return;
    write_numbers(format_of(tensor_.type), data_, elements_of(tensor_), static_cast<std::byte*>(tensor_.data), 1);
  }
  float* data() const { return data_; }

 private:
  OnnxOutput tensor_{};
  float* data_ = nullptr;
  Scratch<float> own_;
};

// Row-major.
template <std::size_t Rank, class T>
View<T, static_cast<int>(Rank)> dense(T* data, const std::array<index_t, Rank>& extent) {
  View<T, static_cast<int>(Rank)> view{data, extent, {}};
  index_t stride = 1;
  for (std::size_t axis = Rank; axis-- > 0; stride *= extent[axis]) view.stride[axis] = stride;
  return view;
}

// `inputs` ends with past_state, which present_state may be.
inline Status check_recurrent_places(std::span<const NamedBytes> inputs, const NamedBytes& output,
                                     const NamedBytes& present) {
  const Bytes& past = inputs.back().bytes;
  const bool in_place = past.begin == present.bytes.begin && past.end == present.bytes.end;
  const NamedBytes both[] = {output, present};
  if (Status s = check_apart(inputs, std::span(both).first(1)); !s.ok()) return s;
  if (Status s = check_apart(inputs.first(inputs.size() - (in_place ? 1 : 0)), std::span(both).last(1)); !s.ok()) return s;
  return check_apart({}, both);
}

struct NamedTensor {
  const char* name;
  const OnnxTensor* tensor;
};

// One plain type for all of them, and tensors that stand by themselves.
inline Status check_inputs(std::span<const NamedTensor> tensors, OnnxType type, std::span<NamedBytes> bytes) {
  for (std::size_t n = 0; n < tensors.size(); ++n) {
    const auto& [name, tensor] = tensors[n];
    bytes[n].name = name;
    if (Status s = check_tensor(name, *tensor, bytes[n].bytes); !s.ok()) return s;
    if (tensor->type == OnnxType::none) continue;
    if (Status s = check_type(name, *tensor, type); !s.ok()) return s;
  }
  return {};
}
inline Status check_output(const char* name, const OnnxOutput& output, OnnxType type, NamedBytes& bytes) {
  bytes.name = name;
  if (Status s = check_tensor(name, output, bytes.bytes); !s.ok()) return s;
  if (output.type == OnnxType::none) return {};
  return check_type(name, output, type);
}

struct LinearCall {
  Operand q, k, v;
  Result out;
  std::array<index_t, 4> state_extent{};
  bool decays_by_key = false;
};

inline Status check_rule(const OnnxLinearAttention& a, const OnnxLinearAttentionInputs& in) {
  if (a.update_rule > OnnxUpdateRule::gated_delta)
    return invalid("fovea: onnx: update_rule is %d, no value of the enum", static_cast<int>(a.update_rule));
  constexpr const char* kNames[] = {"linear", "gated", "delta", "gated_delta"};
  const char* const rule = kNames[static_cast<std::size_t>(a.update_rule)];
  const bool gated = a.update_rule == OnnxUpdateRule::gated || a.update_rule == OnnxUpdateRule::gated_delta;
  const bool delta = a.update_rule == OnnxUpdateRule::delta || a.update_rule == OnnxUpdateRule::gated_delta;
  if (gated != (in.decay.type != OnnxType::none))
    return invalid("fovea: onnx: update_rule %s %s decay", rule, gated ? "needs" : "takes no");
  if (delta != (in.beta.type != OnnxType::none))
    return invalid("fovea: onnx: update_rule %s %s beta", rule, delta ? "needs" : "takes no");
  if (a.kv_num_heads < 1 || a.q_num_heads < 1 || a.q_num_heads % a.kv_num_heads != 0)
    return invalid("fovea: onnx: q_num_heads is %lld, must be a positive multiple of kv_num_heads, %lld",
                   static_cast<long long>(a.q_num_heads), static_cast<long long>(a.kv_num_heads));
  return {};
}

inline Status bind_linear(LinearCall& call, const OnnxLinearAttention& a, const OnnxLinearAttentionInputs& in,
                          const OnnxLinearAttentionOutputs& outputs) {
  if (Status s = check_present("query", in.query); !s.ok()) return s;
  if (Status s = check_present("key", in.key); !s.ok()) return s;
  if (Status s = check_present("value", in.value); !s.ok()) return s;
  if (Status s = check_present("output", outputs.output); !s.ok()) return s;
  if (Status s = check_plain("query", in.query); !s.ok()) return s;
  const NamedTensor tensors[] = {{"query", &in.query}, {"key", &in.key},   {"value", &in.value},
                                 {"decay", &in.decay}, {"beta", &in.beta}, {"past_state", &in.past_state}};
  NamedBytes bytes[6], written[2];
  const OnnxType type = in.query.type;
  if (Status s = check_inputs(std::span(tensors).first(5), type, bytes); !s.ok()) return s;
  const bool carried = in.past_state.type != OnnxType::none;
  if (carried) {
    if (Status s = check_plain("past_state", in.past_state); !s.ok()) return s;
  }
  if (Status s = check_inputs(std::span(tensors).last(1), in.past_state.type, std::span(bytes).last(1)); !s.ok()) return s;
  if (outputs.present_state.type != OnnxType::none) {
    if (Status s = check_plain("present_state", outputs.present_state); !s.ok()) return s;
  }
  const OnnxType state_type = carried ? in.past_state.type : outputs.present_state.type;
  if (Status s = check_output("output", outputs.output, type, written[0]); !s.ok()) return s;
  if (Status s = check_output("present_state", outputs.present_state, state_type, written[1]); !s.ok()) return s;
  if (Status s = check_recurrent_places(bytes, written[0], written[1]); !s.ok()) return s;
  if (Status s = check_rule(a, in); !s.ok()) return s;

  for (const NamedTensor& packed : std::span(tensors).first(3)) {
    if (Status s = check_rank(packed.name, packed.tensor->shape.size(), 3); !s.ok()) return s;
  }
  if (Status s = view_of("query", in.query, a.q_num_heads, call.q); !s.ok()) return s;
  if (Status s = view_of("key", in.key, a.kv_num_heads, call.k); !s.ok()) return s;
  if (Status s = view_of("value", in.value, a.kv_num_heads, call.v); !s.ok()) return s;
  const index_t batch = call.q.extent[0], len = call.q.extent[2], dim_k = call.q.extent[3], dim_v = call.v.extent[3];
  if (Status s = check_shape<3>("key", in.key.shape, {batch, len, a.kv_num_heads * dim_k}); !s.ok()) return s;
  if (Status s = check_shape<3>("value", in.value.shape, {batch, len, a.kv_num_heads * dim_v}); !s.ok()) return s;
  index_t out_width = 0;
  if (__builtin_mul_overflow(a.q_num_heads, dim_v, &out_width))
    return invalid("fovea: %td query heads of %td numbers are more than an output can have", a.q_num_heads, dim_v);
  if (Status s = check_shape<3>("output", outputs.output.shape, {batch, len, out_width}); !s.ok()) return s;
  if (Status s = view_of("output", outputs.output, a.q_num_heads, call.out); !s.ok()) return s;
  call.state_extent = {batch, a.kv_num_heads, dim_k, dim_v};
  if (carried) {
    if (Status s = check_shape("past_state", in.past_state.shape, call.state_extent); !s.ok()) return s;
  }
  if (outputs.present_state.type != OnnxType::none) {
    if (Status s = check_shape("present_state", outputs.present_state.shape, call.state_extent); !s.ok()) return s;
  }
  if (in.decay.type != OnnxType::none) {
    if (Status s = check_rank("decay", in.decay.shape.size(), 3); !s.ok()) return s;
    call.decays_by_key = in.decay.shape[2] != a.kv_num_heads;
    const index_t width = call.decays_by_key ? dim_k : 1;
    if (Status s = check_shape<3>("decay", in.decay.shape, {batch, len, a.kv_num_heads * width}); !s.ok()) return s;
  }
  if (in.beta.type != OnnxType::none) {
    if (Status s = check_rank("beta", in.beta.shape.size(), 3); !s.ok()) return s;
    const index_t heads = in.beta.shape[2] == 1 ? 1 : a.kv_num_heads;
    if (Status s = check_shape<3>("beta", in.beta.shape, {batch, len, heads}); !s.ok()) return s;
  }
  return {};
}

// [batch, pos, head * width] as [batch, head, pos, width].
inline View<const float, 4> gate_view(const float* data, std::span<const std::int64_t> shape, index_t heads) {
  const index_t width = shape[2] / heads;
  return {data, {shape[0], heads, shape[1], width}, {shape[1] * shape[2], width, shape[2], 1}};
}

inline Status run_rule(const LinearCall& call, OnnxUpdateRule rule, const Decay<float>& decay,
                       const View<const float, 4>& beta, const RecurrentOptions<float>& options) {
  const auto& [q, k, v, out, state_extent, decays_by_key] = call;
  switch (rule) {
    case OnnxUpdateRule::linear:
      return linear_attention(q, k, v, out, LinearOptions<float>{.normalize = false}, options);
    case OnnxUpdateRule::gated:
      return decays_by_key ? gla(q, k, v, decay, out, options) : simple_gla(q, k, v, decay, out, options);
    case OnnxUpdateRule::delta:
      return delta_net(q, k, v, beta, out, options);
    case OnnxUpdateRule::gated_delta:
      break;
  }
  return decays_by_key ? kda(q, k, v, decay, beta, out, options) : gated_delta_net(q, k, v, decay, beta, out, options);
}

struct ConvCall {
  Operand x;
  Result y;
  index_t batch = 0, channels = 0, width = 0;
};

inline Status bind_conv(ConvCall& call, const OnnxCausalConvWithState& a, const OnnxCausalConvWithStateInputs& in,
                        const OnnxCausalConvWithStateOutputs& outputs) {
  if (a.activation > OnnxConvActivation::silu)
    return invalid("fovea: onnx: activation is %d, no value of the enum", static_cast<int>(a.activation));
  if (Status s = check_present("input", in.input); !s.ok()) return s;
  if (Status s = check_present("weight", in.weight); !s.ok()) return s;
  if (Status s = check_present("output", outputs.output); !s.ok()) return s;
  if (Status s = check_plain("input", in.input); !s.ok()) return s;
  const NamedTensor tensors[] = {
      {"input", &in.input}, {"weight", &in.weight}, {"bias", &in.bias}, {"past_state", &in.past_state}};
  NamedBytes bytes[4], written[2];
  const OnnxType type = in.input.type;
  if (Status s = check_inputs(tensors, type, bytes); !s.ok()) return s;
  if (Status s = check_output("output", outputs.output, type, written[0]); !s.ok()) return s;
  if (Status s = check_output("present_state", outputs.present_state, type, written[1]); !s.ok()) return s;
  if (Status s = check_recurrent_places(bytes, written[0], written[1]); !s.ok()) return s;

  const std::span<const std::int64_t> shape = in.input.shape;
  if (shape.size() == 4 || shape.size() == 5)
    return unsupported("fovea: onnx: input has rank %zu; convolutions along one axis, rank 3, are supported", shape.size());
  if (Status s = check_rank("input", shape.size(), 3); !s.ok()) return s;
  if (Status s = check_rank("weight", in.weight.shape.size(), 3); !s.ok()) return s;
  call.batch = shape[0];
  call.channels = shape[1];
  call.width = in.weight.shape[2];
  if (Status s = check_shape<3>("weight", in.weight.shape, {call.channels, 1, call.width}); !s.ok()) return s;
  if (call.width < 1) return invalid("fovea: onnx: weight has %td taps, must have at least 1", call.width);
  if (in.bias.type != OnnxType::none) {
    if (Status s = check_shape<1>("bias", in.bias.shape, {call.channels}); !s.ok()) return s;
  }
  const std::array<index_t, 3> state{call.batch, call.channels, call.width - 1};
  if (in.past_state.type != OnnxType::none) {
    if (Status s = check_shape("past_state", in.past_state.shape, state); !s.ok()) return s;
  }
  if (outputs.present_state.type != OnnxType::none) {
    if (Status s = check_shape("present_state", outputs.present_state.shape, state); !s.ok()) return s;
  }
  if (Status s = check_shape<3>("output", outputs.output.shape, {shape[0], shape[1], shape[2]}); !s.ok()) return s;

  call.x.data = static_cast<const std::byte*>(in.input.data);
  call.y.data = static_cast<std::byte*>(outputs.output.data);
  call.x.format = call.y.format = format_of(type);
  call.x.extent = call.y.extent = {shape[0], 1, shape[2], shape[1]};
  call.x.stride = call.y.stride = {shape[1] * shape[2], 0, 1, shape[2]};
  return {};
}

}   // namespace onnx

inline Status onnx_linear_attention(const OnnxLinearAttention& attributes, const OnnxLinearAttentionInputs& inputs,
                                    const OnnxLinearAttentionOutputs& outputs, Executor executor) {
  onnx::LinearCall call;
  if (Status s = onnx::bind_linear(call, attributes, inputs, outputs); !s.ok()) return s;
  onnx::Floats past, decay, beta;
  onnx::WrittenFloats present;
  if (Status s = past.read(inputs.past_state); !s.ok()) return s;
  if (Status s = decay.read(inputs.decay); !s.ok()) return s;
  if (Status s = beta.read(inputs.beta); !s.ok()) return s;
  if (Status s = present.begin(outputs.present_state); !s.ok()) return s;

  RecurrentOptions<float> options;
  options.executor = executor;
  if (attributes.scale != 0.f) options.scale = attributes.scale;
  if (past.data() != nullptr) options.initial_state = onnx::dense(past.data(), call.state_extent);
  if (present.data() != nullptr) options.final_state = onnx::dense(present.data(), call.state_extent);
  Decay<float> gate;
  View<const float, 4> strength;
  if (inputs.decay.type != OnnxType::none)
    gate.gate = onnx::gate_view(decay.data(), inputs.decay.shape, attributes.kv_num_heads);
  if (inputs.beta.type != OnnxType::none) strength = onnx::gate_view(beta.data(), inputs.beta.shape, inputs.beta.shape[2]);
  if (Status s = onnx::run_rule(call, attributes.update_rule, gate, strength, options); !s.ok()) return s;
  present.end();
  return {};
}

inline Status onnx_causal_conv_with_state(const OnnxCausalConvWithState& attributes,
                                          const OnnxCausalConvWithStateInputs& inputs,
                                          const OnnxCausalConvWithStateOutputs& outputs, Executor executor) {
  onnx::ConvCall call;
  if (Status s = onnx::bind_conv(call, attributes, inputs, outputs); !s.ok()) return s;
  if (call.batch == 0 || call.channels == 0) return {};
  onnx::Floats weight, bias, past;
  onnx::WrittenFloats present;
  if (Status s = weight.read(inputs.weight); !s.ok()) return s;
  if (Status s = bias.read(inputs.bias); !s.ok()) return s;
  if (Status s = past.read(inputs.past_state); !s.ok()) return s;
  if (Status s = present.begin(outputs.present_state); !s.ok()) return s;

  const std::array<index_t, 3> state{call.batch, call.channels, call.width - 1};
  ShortConvParameters<float> parameters;
  parameters.weight = onnx::dense(weight.data(), std::array{call.channels, call.width});
  if (bias.data() != nullptr) parameters.bias = {bias.data(), static_cast<std::size_t>(call.channels)};
  parameters.silu = attributes.activation == OnnxConvActivation::silu;
  if (call.width > 1 && past.data() != nullptr) parameters.initial_state = onnx::dense(past.data(), state);
  if (call.width > 1 && present.data() != nullptr) parameters.final_state = onnx::dense(present.data(), state);
  RecurrentOptions<float> options;
  options.executor = executor;
  if (Status s = short_conv(call.x, parameters, call.y, options); !s.ok()) return s;
  present.end();
  return {};
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
