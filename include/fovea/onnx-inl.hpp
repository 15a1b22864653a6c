// SPDX-License-Identifier: Apache-2.0
// Behind the ONNX front door: shapes checked and turned into views, then fovea::attention.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <utility>

#include "onnx.hpp"
#include "simd/numbers.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {
namespace onnx {

using door::Bytes;
using door::invalid;
using door::unsupported;

// 0 for what has no whole bytes.
inline index_t bytes_of(OnnxType type) {
  switch (type) {
    case OnnxType::u8:
    case OnnxType::i8:
    case OnnxType::boolean:
    case OnnxType::e4m3fn:
    case OnnxType::e4m3fnuz:
    case OnnxType::e5m2:
    case OnnxType::e5m2fnuz:
      return 1;
    case OnnxType::u16:
    case OnnxType::i16:
    case OnnxType::f16:
    case OnnxType::bf16:
      return 2;
    case OnnxType::f32:
    case OnnxType::i32:
    case OnnxType::u32:
      return 4;
    case OnnxType::i64:
    case OnnxType::f64:
    case OnnxType::u64:
    case OnnxType::c64:
      return 8;
    case OnnxType::c128:
      return 16;
    default:
      return 0;
  }
}

inline bool is_plain(OnnxType type) {
  return type == OnnxType::f32 || type == OnnxType::f16 || type == OnnxType::bf16 || type == OnnxType::f64;
}
inline Format format_of(OnnxType type) {
  return type == OnnxType::f64    ? Format::f64
         : type == OnnxType::f16  ? Format::f16
         : type == OnnxType::bf16 ? Format::bf16
                                  : Format::f32;
}
template <Format... List>
bool lists(Formats<List...>, Format format) {
  return ((List == format) || ...);
}

// Memory of one call.
template <class T>
class Scratch {
 public:
  Status take(index_t count) {
    numbers_.reset(new (std::nothrow) T[static_cast<std::size_t>(count)]);
    if (numbers_) return {};
    return Status::error(Code::out_of_memory, "fovea: onnx: no memory for %td elements of %zu bytes", count, sizeof(T));
  }
  T* data() { return numbers_.get(); }
  std::span<const T> first(index_t count) const { return {numbers_.get(), static_cast<std::size_t>(count)}; }

 private:
  std::unique_ptr<T[]> numbers_;
};

struct NamedBytes {
  const char* name;
  Bytes bytes;
};

// A tensor that stands by itself: a known type, extents that fit into memory, data where there are elements.
template <class T>
Status check_tensor(const char* name, const T& tensor, Bytes& bytes) {
  bytes = {};
  if (tensor.type == OnnxType::none) return {};
  index_t elements = bytes_of(tensor.type);
  if (elements == 0)
    return unsupported("fovea: onnx: %s has element type %d, no type of whole bytes", name, static_cast<int>(tensor.type));
  bool empty = false;
  for (std::size_t axis = 0; axis < tensor.shape.size(); ++axis) {
    const std::int64_t extent = tensor.shape[axis];
    if (extent < 0)
      return invalid("fovea: onnx: %s has extent %lld on axis %zu", name, static_cast<long long>(extent), axis);
    empty = empty || extent == 0;
    if (extent > 0 && __builtin_mul_overflow(elements, extent, &elements))
      return invalid("fovea: onnx: the extents of %s reach beyond the address space", name);
  }
  if (empty) return {};
  if (tensor.data == nullptr) return invalid("fovea: onnx: %s has null data", name);
  const auto base = reinterpret_cast<std::uintptr_t>(tensor.data);
  bytes = {base, base + static_cast<std::uintptr_t>(elements)};
  return {};
}

template <class T>
Status check_present(const char* name, const T& tensor) {
  if (tensor.type != OnnxType::none) return {};
  return invalid("fovea: onnx: %s is required", name);
}

template <class T>
Status check_type(const char* name, const T& tensor, OnnxType type) {
  if (tensor.type == type) return {};
  return invalid("fovea: onnx: %s has element type %d, must be %d", name, static_cast<int>(tensor.type),
                 static_cast<int>(type));
}

template <class T>
Status check_plain(const char* name, const T& tensor) {
  if (is_plain(tensor.type)) return {};
  return invalid("fovea: onnx: %s has element type %d, must be 1, 10, 11 or 16", name,
                 static_cast<int>(tensor.type));
}

inline Status check_rank(const char* name, std::size_t rank, std::size_t want) {
  if (rank == want) return {};
  return invalid("fovea: onnx: %s has rank %zu, must be %zu", name, rank, want);
}

template <std::size_t Rank>
Status check_shape(const char* name, std::span<const std::int64_t> shape, const std::array<index_t, Rank>& want) {
  if (Status s = check_rank(name, shape.size(), Rank); !s.ok()) return s;
  for (std::size_t axis = 0; axis < Rank; ++axis) {
    if (shape[axis] != want[axis])
      return invalid("fovea: onnx: %s has %lld on axis %zu, must be %td", name, static_cast<long long>(shape[axis]), axis,
                     want[axis]);
  }
  return {};
}

// No output overlaps an input or another output.
inline Status check_apart(std::span<const NamedBytes> inputs, std::span<const NamedBytes> outputs) {
  for (std::size_t n = 0; n < outputs.size(); ++n) {
    const door::OutputBytes output{outputs[n].name, outputs[n].bytes};
    for (const NamedBytes& input : inputs) {
      if (Status s = door::check_apart(output, input.name, input.bytes); !s.ok()) return s;
    }
    for (std::size_t other = 0; other < n; ++other) {
      if (Status s = door::check_apart(output, outputs[other].name, outputs[other].bytes); !s.ok()) return s;
    }
  }
  return {};
}

// 4-D [batch, head, pos, dim] as it is, 3-D [batch, pos, head * dim] cut into `heads`.
template <class V, class T>
Status view_of(const char* name, const T& tensor, std::int64_t heads, V& view) {
  view.data = static_cast<decltype(view.data)>(tensor.data);
  view.format = format_of(tensor.type);
  if (tensor.shape.size() == 4) {
    for (std::size_t axis = 0; axis < 4; ++axis) view.extent[axis] = tensor.shape[axis];
    if (heads != 0 && heads != view.extent[1])
      return invalid("fovea: onnx: %s has %td heads, the attribute says %lld", name, view.extent[1],
                     static_cast<long long>(heads));
    const index_t dim = view.extent[3], len = view.extent[2];
    view.stride = {view.extent[1] * len * dim, len * dim, dim, 1};
    return {};
  }
  if (tensor.shape.size() != 3) return invalid("fovea: onnx: %s has rank %zu, must be 3 or 4", name, tensor.shape.size());
  const index_t hidden = tensor.shape[2];
  if (heads <= 0 || hidden % heads != 0)
    return invalid("fovea: onnx: the last axis of %s, %td, cannot be cut into %lld heads", name, hidden,
                   static_cast<long long>(heads));
  const index_t dim = hidden / heads;
  view.extent = {tensor.shape[0], heads, tensor.shape[1], dim};
  view.stride = {tensor.shape[1] * hidden, dim, hidden, 1};
  return {};
}

inline Status check_precision(std::int64_t precision) {
  if (precision == 0 || precision == 1 || precision == 10 || precision == 11 || precision == 16) return {};
  return invalid("fovea: onnx: softmax_precision is %lld, must be 1, 10, 11 or 16", static_cast<long long>(precision));
}

inline void copy_rows(const Operand& from, const Result& to, index_t first_pos) {
  const index_t number = row_bytes(from.format, 1);
  const auto row = static_cast<std::size_t>(from.extent[3] * number);
  for (index_t b = 0; b < from.extent[0]; ++b) {
    for (index_t h = 0; h < from.extent[1]; ++h) {
      for (index_t i = 0; i < from.extent[2] && row > 0; ++i) {
        std::memcpy(to.data + (b * to.stride[0] + h * to.stride[1] + (first_pos + i) * to.stride[2]) * number,
                    from.data + (b * from.stride[0] + h * from.stride[1] + i * from.stride[2]) * number, row);
      }
    }
  }
}

inline Operand read_back(const Result& result) {
  Operand operand;
  operand.data = result.data;
  operand.format = result.format;
  operand.extent = result.extent;
  operand.stride = result.stride;
  return operand;
}

inline double number_at(Format format, const std::byte* data, index_t at) {
  switch (format) {
    case Format::f64:
      return reinterpret_cast<const double*>(data)[at];
    case Format::bf16:
      return convert<double>(reinterpret_cast<const bf16*>(data)[at]);
    case Format::f16:
      return convert<double>(reinterpret_cast<const f16*>(data)[at]);
    default:
      return static_cast<double>(reinterpret_cast<const float*>(data)[at]);
  }
}
inline void put_number(Format format, std::byte* data, index_t at, double x) {
  switch (format) {
    case Format::f64:
      reinterpret_cast<double*>(data)[at] = x;
      return;
    case Format::bf16:
      reinterpret_cast<bf16*>(data)[at] = convert<bf16>(x);
      return;
    case Format::f16:
      reinterpret_cast<f16*>(data)[at] = convert<f16>(x);
      return;
    default:
      reinterpret_cast<float*>(data)[at] = static_cast<float>(x);
  }
}

template <class T>
void widen(const void* from, index_t count, float* to) {
  for (index_t i = 0; i < count; ++i) to[i] = static_cast<float>(static_cast<const T*>(from)[i]);
}

// An additive mask as floats. The lowest double is a number, not -inf: a row of it is a uniform average, not an empty row.
inline Status widen_mask(const OnnxTensor& mask, index_t count, float* to) {
  switch (mask.type) {
    case OnnxType::f16:
    case OnnxType::bf16:
      read_numbers(format_of(mask.type), static_cast<const std::byte*>(mask.data), 1, count, to);
      return {};
    case OnnxType::f64:
      for (index_t i = 0; i < count; ++i) {
        const double x = static_cast<const double*>(mask.data)[i];
        to[i] = std::isfinite(x) ? static_cast<float>(std::min(std::max(x, -double{FLT_MAX}), double{FLT_MAX}))
                                 : static_cast<float>(x);
      }
      return {};
    case OnnxType::u8:
      return widen<std::uint8_t>(mask.data, count, to), Status{};
    case OnnxType::i8:
      return widen<std::int8_t>(mask.data, count, to), Status{};
    case OnnxType::u16:
      return widen<std::uint16_t>(mask.data, count, to), Status{};
    case OnnxType::i16:
      return widen<std::int16_t>(mask.data, count, to), Status{};
    case OnnxType::u32:
      return widen<std::uint32_t>(mask.data, count, to), Status{};
    case OnnxType::i32:
      return widen<std::int32_t>(mask.data, count, to), Status{};
    case OnnxType::u64:
      return widen<std::uint64_t>(mask.data, count, to), Status{};
    case OnnxType::i64:
      return widen<std::int64_t>(mask.data, count, to), Status{};
    default:
      return unsupported("fovea: onnx: attn_mask has element type %d, no number", static_cast<int>(mask.type));
  }
}

// A call whose shapes have been checked against each other.
struct AttentionCall {
  Operand q, k, v, past_k, past_v;
  Result y, present_k, present_v, qk;
  index_t past = 0, total = 0, masked_from = 0;   // keys from masked_from on are behind a short mask
  bool empty = true;                              // no output has an element, so extents may be any numbers
  AttentionOptions options;
  Scratch<float> bias;
  Scratch<index_t> lengths;    // [batch] len_k, [batch] q_offset
  Scratch<std::byte> joined;   // past and new keys and values where there is no present
};

inline Status bind_heads(AttentionCall& call) {
  const auto &q = call.q.extent, &k = call.k.extent, &v = call.v.extent;
  if (k[0] != q[0] || v[0] != q[0]) return invalid("fovea: onnx: batches differ: Q %td, K %td, V %td", q[0], k[0], v[0]);
  if (k[1] != v[1] || k[2] != v[2])
    return invalid("fovea: onnx: K has %td heads of %td keys, V %td of %td", k[1], k[2], v[1], v[2]);
  if (q[3] != k[3]) return invalid("fovea: onnx: Q has head size %td, K %td", q[3], k[3]);
  return {};
}

inline Status bind_past(AttentionCall& call, const OnnxAttentionInputs& in) {
  const auto &k = call.k.extent, &v = call.v.extent;
  const bool key = in.past_key.type != OnnxType::none, value = in.past_value.type != OnnxType::none;
  if (key != value) return invalid("fovea: onnx: %s without the other of the pair", key ? "past_key" : "past_value");
  call.total = k[2];
  if (!key) return {};
  if (Status s = check_type("past_key", in.past_key, in.k.type); !s.ok()) return s;
  if (Status s = check_type("past_value", in.past_value, in.v.type); !s.ok()) return s;
  if (Status s = check_rank("past_key", in.past_key.shape.size(), 4); !s.ok()) return s;
  call.past = in.past_key.shape[2];
  if (Status s = check_shape<4>("past_key", in.past_key.shape, {k[0], k[1], call.past, k[3]}); !s.ok()) return s;
  if (Status s = check_shape<4>("past_value", in.past_value.shape, {v[0], v[1], call.past, v[3]}); !s.ok()) return s;
  if (Status s = view_of("past_key", in.past_key, 0, call.past_k); !s.ok()) return s;
  if (Status s = view_of("past_value", in.past_value, 0, call.past_v); !s.ok()) return s;
  call.total = call.past + k[2];
  return {};
}

inline Status bind_outputs(AttentionCall& call, const OnnxAttention& a, const OnnxAttentionInputs& in,
                           const OnnxAttentionOutputs& out) {
  const auto &q = call.q.extent, &k = call.k.extent, &v = call.v.extent;
  if (Status s = check_type("Y", out.y, in.q.type); !s.ok()) return s;
  if (in.q.shape.size() == 4) {
    if (Status s = check_shape<4>("Y", out.y.shape, {q[0], q[1], q[2], v[3]}); !s.ok()) return s;
  } else {
    index_t width = 0;
    if (__builtin_mul_overflow(q[1], v[3], &width))
      return unsupported("fovea: onnx: %td heads of dim %td are more numbers than can be counted", q[1], v[3]);
    if (Status s = check_shape<3>("Y", out.y.shape, {q[0], q[2], width}); !s.ok()) return s;
  }
  if (Status s = view_of("Y", out.y, q[1], call.y); !s.ok()) return s;

  const bool key = out.present_key.type != OnnxType::none, value = out.present_value.type != OnnxType::none;
  if (key != value) return invalid("fovea: onnx: %s without the other of the pair", key ? "present_key" : "present_value");
  if (key) {
    if (Status s = check_type("present_key", out.present_key, in.k.type); !s.ok()) return s;
    if (Status s = check_type("present_value", out.present_value, in.v.type); !s.ok()) return s;
    if (Status s = check_shape<4>("present_key", out.present_key.shape, {k[0], k[1], call.total, k[3]}); !s.ok()) return s;
    if (Status s = check_shape<4>("present_value", out.present_value.shape, {v[0], v[1], call.total, v[3]}); !s.ok())
      return s;
    if (Status s = view_of("present_key", out.present_key, 0, call.present_k); !s.ok()) return s;
    if (Status s = view_of("present_value", out.present_value, 0, call.present_v); !s.ok()) return s;
  }
  if (a.qk_matmul_output_mode < 0 || a.qk_matmul_output_mode > 3)
    return invalid("fovea: onnx: qk_matmul_output_mode is %lld, must be 0 to 3",
                   static_cast<long long>(a.qk_matmul_output_mode));
  if (out.qk_matmul_output.type == OnnxType::none) return {};
  if (Status s = check_type("qk_matmul_output", out.qk_matmul_output, in.q.type); !s.ok()) return s;
  const std::array<index_t, 4> scores{q[0], q[1], q[2], call.total};
  if (Status s = check_shape("qk_matmul_output", out.qk_matmul_output.shape, scores); !s.ok()) return s;
  return view_of("qk_matmul_output", out.qk_matmul_output, 0, call.qk);
}

// Lengths in use and the position of query 0: behind the past, or such that the last query stands at the last key in use.
inline Status bind_lengths(AttentionCall& call, const OnnxAttention& a, const OnnxTensor& nonpad) {
  const index_t batch = call.q.extent[0];
  if (Status s = call.lengths.take(2 * batch); !s.ok()) return s;
  index_t *const len_k = call.lengths.data(), *const q_offset = len_k + batch;
  const bool external = nonpad.type != OnnxType::none;
  if (external) {
    if (a.opset < 24)
      return invalid("fovea: onnx: nonpad_kv_seqlen needs opset 24, this is %lld", static_cast<long long>(a.opset));
    if (call.past_k.extent[1] > 0) return invalid("fovea: onnx: nonpad_kv_seqlen and past_key exclude each other");
    if (Status s = check_type("nonpad_kv_seqlen", nonpad, OnnxType::i64); !s.ok()) return s;
    if (Status s = check_shape<1>("nonpad_kv_seqlen", nonpad.shape, {batch}); !s.ok()) return s;
  }
  for (index_t b = 0; b < batch; ++b) {
    const index_t used = external ? static_cast<const std::int64_t*>(nonpad.data)[b] : call.total;
    if (used < 0 || used > call.total)
      return invalid("fovea: onnx: nonpad_kv_seqlen[%td] = %td is outside 0 .. %td, the keys stored", b, used, call.total);
    len_k[b] = std::min(used, call.masked_from);
    q_offset[b] = external ? used - call.q.extent[2] : call.past;
  }
  call.options.len_k = call.lengths.first(batch);
  call.options.q_offset = {q_offset, static_cast<std::size_t>(batch)};
  return {};
}

inline Status bind_mask(AttentionCall& call, const OnnxTensor& mask) {
  call.masked_from = call.total;
  if (mask.type == OnnxType::none) return {};
  const std::size_t rank = mask.shape.size();
  if (rank < 1 || rank > 4) return invalid("fovea: onnx: attn_mask has rank %zu, must be 1 to 4", rank);
  const std::array<index_t, 3> wanted{call.q.extent[0], call.q.extent[1], call.q.extent[2]};
  std::array<index_t, 4> extent{1, 1, 1, 1}, stride{};
  for (std::size_t axis = 0; axis < rank; ++axis) extent[4 - rank + axis] = mask.shape[axis];
  for (std::size_t axis = 0; axis < 3; ++axis) {
    if (extent[axis] != 1 && extent[axis] != wanted[axis])
      return invalid("fovea: onnx: attn_mask has %td where [batch, head, pos] has %td (axis %zu), must be that or 1",
                     extent[axis], wanted[axis], axis);
  }
  if (extent[3] > call.total) return invalid("fovea: onnx: attn_mask is for %td keys, there are %td", extent[3], call.total);
  call.masked_from = extent[3];
  stride = {extent[1] * extent[2] * extent[3], extent[2] * extent[3], extent[3], 1};
  if (mask.type == OnnxType::boolean) {
    call.options.keep = {static_cast<const std::uint8_t*>(mask.data), extent, stride};
    return {};
  }
  if (mask.type == OnnxType::f32) {
    call.options.bias = {static_cast<const float*>(mask.data), extent, stride};
    return {};
  }
  const index_t count = extent[0] * stride[0];
  if (Status s = call.bias.take(count); !s.ok()) return s;
  if (Status s = widen_mask(mask, count, call.bias.data()); !s.ok()) return s;
  call.options.bias = {call.bias.data(), extent, stride};
  return {};
}

inline Status bind_attributes(AttentionCall& call, const OnnxAttention& a) {
  if (a.opset < 23)
    return invalid("fovea: onnx: Attention exists since opset 23, this is %lld", static_cast<long long>(a.opset));
  if (a.is_causal != 0 && a.is_causal != 1)
    return invalid("fovea: onnx: is_causal is %lld, must be 0 or 1", static_cast<long long>(a.is_causal));
  const bool windows = a.left_window_size != -1 || a.right_window_size != -1;
  if (a.left_window_size < -1 || a.right_window_size < -1 || (windows && a.opset < 25))
    return invalid("fovea: onnx: windows %lld and %lld must be -1 or more, and since opset 25; this is %lld",
                   static_cast<long long>(a.left_window_size), static_cast<long long>(a.right_window_size),
                   static_cast<long long>(a.opset));
  if (Status s = check_precision(a.softmax_precision); !s.ok()) return s;
  call.options.scale = a.scale;
  call.options.softcap = a.softcap;
  call.options.causal = a.is_causal != 0 ? Causal::top_left : Causal::none;
  call.options.window = {a.left_window_size, a.right_window_size};
  return {};
}

inline AttentionShape shape_of(const AttentionCall& call) {
  return {call.q.extent[0], call.q.extent[1], call.k.extent[1], call.q.extent[2],
          call.masked_from, call.q.extent[3], call.v.extent[3]};
}

inline Status bind(AttentionCall& call, const OnnxAttention& a, const OnnxAttentionInputs& in,
                   const OnnxAttentionOutputs& out) {
  NamedBytes inputs[] = {
      {"Q", {}}, {"K", {}}, {"V", {}}, {"attn_mask", {}}, {"past_key", {}}, {"past_value", {}}, {"nonpad_kv_seqlen", {}}};
  NamedBytes outputs[] = {{"Y", {}}, {"present_key", {}}, {"present_value", {}}, {"qk_matmul_output", {}}};
  const OnnxTensor* const read[] = {&in.q, &in.k, &in.v, &in.attn_mask, &in.past_key, &in.past_value, &in.nonpad_kv_seqlen};
  const OnnxOutput* const written[] = {&out.y, &out.present_key, &out.present_value, &out.qk_matmul_output};
  for (std::size_t n = 0; n < std::size(inputs); ++n) {
    if (n < 3) {
      if (Status s = check_present(inputs[n].name, *read[n]); !s.ok()) return s;
      if (Status s = check_plain(inputs[n].name, *read[n]); !s.ok()) return s;
    }
    if (Status s = check_tensor(inputs[n].name, *read[n], inputs[n].bytes); !s.ok()) return s;
  }
  if (Status s = check_present("Y", out.y); !s.ok()) return s;
  for (std::size_t n = 0; n < std::size(outputs); ++n) {
    if (Status s = check_tensor(outputs[n].name, *written[n], outputs[n].bytes); !s.ok()) return s;
  }
  if (Status s = check_apart(inputs, outputs); !s.ok()) return s;
  if (Status s = check_type("K", in.k, in.q.type); !s.ok()) return s;
  if (in.k.shape.size() != in.q.shape.size() || in.v.shape.size() != in.q.shape.size())
    return invalid("fovea: onnx: Q, K and V have ranks %zu, %zu and %zu", in.q.shape.size(), in.k.shape.size(),
                   in.v.shape.size());
  if (Status s = view_of("Q", in.q, a.q_num_heads, call.q); !s.ok()) return s;
  if (Status s = view_of("K", in.k, a.kv_num_heads, call.k); !s.ok()) return s;
  if (Status s = view_of("V", in.v, a.kv_num_heads, call.v); !s.ok()) return s;
  if (Status s = bind_heads(call); !s.ok()) return s;
  if (Status s = bind_past(call, in); !s.ok()) return s;
  if (Status s = bind_outputs(call, a, in, out); !s.ok()) return s;
  if (Status s = bind_attributes(call, a); !s.ok()) return s;
  if (Status s = bind_mask(call, in.attn_mask); !s.ok()) return s;
  if (Status s = supports(shape_of(call), {}); !s.ok()) return s;
  for (const NamedBytes& output : outputs) call.empty = call.empty && output.bytes.begin == output.bytes.end;
  return call.empty ? Status{} : bind_lengths(call, a, in.nonpad_kv_seqlen);
}

template <class Compiled>
Status check_kernels(const Operand& k, const Operand& v) {
  if (lists(Compiled{}, k.format) && lists(Compiled{}, v.format)) return {};
  return unsupported("fovea: onnx: this call was compiled without kernels for K in %s and V in %s", name_of(k.format),
                     name_of(v.format));
}

// Past and new keys and values one after the other, in the present outputs where there are any.
inline Status join(AttentionCall& call) {
  const bool kept = call.present_k.extent[1] > 0;
  if (!kept && call.past == 0) return {};
  if (!kept) {
    const auto size = [&](const Operand& x) {
      return x.extent[0] * x.extent[1] * call.total * x.extent[3] * row_bytes(x.format, 1);
    };
    const index_t k_bytes = (size(call.k) + 63) / 64 * 64;
    if (Status s = call.joined.take(k_bytes + size(call.v)); !s.ok()) return s;
    const auto lay = [&](const Operand& from, std::byte* data, Result& to) {
      to.data = data;
      to.format = from.format;
      to.extent = {from.extent[0], from.extent[1], call.total, from.extent[3]};
      to.stride = {from.extent[1] * call.total * from.extent[3], call.total * from.extent[3], from.extent[3], 1};
    };
    lay(call.k, call.joined.data(), call.present_k);
    lay(call.v, call.joined.data() + k_bytes, call.present_v);
  }
  if (call.past > 0) {
    copy_rows(call.past_k, call.present_k, 0);
    copy_rows(call.past_v, call.present_v, 0);
  }
  copy_rows(call.k, call.present_k, call.past);
  copy_rows(call.v, call.present_v, call.past);
  call.k = read_back(call.present_k);
  call.v = read_back(call.present_v);
  return {};
}

// How far a score gets, as qk_matmul_output_mode says; every key of the total is a column.
inline Status write_scores(const AttentionCall& call, std::int64_t mode) {
  const AttentionOptions& o = call.options;
  const auto [batches, heads, queries, keys] = call.qk.extent;
  const index_t dim = call.q.extent[3], group = heads / std::max<index_t>(call.k.extent[1], 1);
  const double scale = o.scale ? double{*o.scale} : 1 / std::sqrt(static_cast<double>(dim)), cap = double{o.softcap};
  const double infinity = std::numeric_limits<double>::infinity();
  const Reach reach = reach_of(o);
  Scratch<double> row;
  if (Status s = row.take(keys); !s.ok()) return s;
  const View<const float, 4> bias = tidy(o.bias);
  const View<const std::uint8_t, 4> keep = tidy(o.keep);
  const auto at = [](const auto& mask, index_t b, index_t h, index_t i, index_t j) {
    return mask.data[b * mask.stride[0] + h * mask.stride[1] + i * mask.stride[2] + j * mask.stride[3]];
  };
  for (index_t b = 0; b < batches; ++b) {
    for (index_t h = 0; h < heads; ++h) {
      for (index_t i = 0; i < queries; ++i) {
        const index_t pos = i + o.q_offset[static_cast<std::size_t>(b)], len = o.len_k[static_cast<std::size_t>(b)];
        double max = -infinity, sum = 0;
        for (index_t j = 0; j < keys; ++j) {
          double score = 0;
          for (index_t d = 0; d < dim; ++d) {
            score += number_at(call.q.format, call.q.data,
                               b * call.q.stride[0] + h * call.q.stride[1] + i * call.q.stride[2] + d) *
                     number_at(call.k.format, call.k.data,
                               b * call.k.stride[0] + h / group * call.k.stride[1] + j * call.k.stride[2] + d);
          }
          score *= scale;
          if (mode >= 1 && cap > 0) score = cap * std::tanh(score / cap);
          if (mode >= 2) {
            bool visible = j < len && j >= pos - reach.left && j <= pos + reach.right;
            if (visible && keep) visible = at(keep, b, h, i, j) != 0;
            const double added = visible && bias ? double{at(bias, b, h, i, j)} : 0;
            score = visible && added != -infinity ? score + added : -infinity;
          }
          row.data()[j] = score;
          max = std::max(max, score);
        }
        if (mode == 3) {
          for (index_t j = 0; j < keys; ++j) {
            row.data()[j] = row.data()[j] == -infinity ? 0 : std::exp(row.data()[j] - max);
            sum += row.data()[j];
          }
        }
        const index_t to = b * call.qk.stride[0] + h * call.qk.stride[1] + i * call.qk.stride[2];
        for (index_t j = 0; j < keys; ++j)
          put_number(call.qk.format, call.qk.data, to + j, mode == 3 && sum != 0 ? row.data()[j] / sum : row.data()[j]);
      }
    }
  }
  return {};
}

struct Modifiers {
  std::span<const OnnxModifier> list;

  FOVEA_INLINE f32 operator()(f32 s, int, int, int q, i32 k) const {
    for (const OnnxModifier& step : list) {
      const f32 value(step.value);
      switch (step.kind) {
        case OnnxModifier::Kind::add:
          s = s + value;
          break;
        case OnnxModifier::Kind::multiply:
          s = s * value;
          break;
        case OnnxModifier::Kind::soft_cap:
          s = value * tanh(s / value);
          break;
        case OnnxModifier::Kind::causal_mask:
          s = select(k <= i32(q), s, f32(-std::numeric_limits<float>::infinity()));
          break;
        default:
          s = s + value * to_float(i32(q) - k);
      }
    }
    return s;
  }
};

struct ScaleRow {
  float factor;

  FOVEA_INLINE void operator()(const OutRow&, std::span<float> row, Final) const {
    for (index_t d = 0; d < static_cast<index_t>(row.size()); d += kLanes)
      store(row.data() + d, load(row.data() + d) * f32(factor));
  }
};

inline Status check_modifiers(const OnnxFlexAttention& a) {
  for (std::size_t n = 0; n < a.score_mod.size(); ++n) {
    const OnnxModifier& step = a.score_mod[n];
    if (step.kind > OnnxModifier::Kind::relative_positional)
      return invalid("fovea: onnx: score_mod[%zu] is %d, no value of the enum", n, static_cast<int>(step.kind));
    const bool capped = step.kind == OnnxModifier::Kind::soft_cap;
    if (!std::isfinite(step.value) || (capped && !std::isfinite(1.f / step.value)))
      return invalid("fovea: onnx: score_mod[%zu] has value %g, must be finite%s", n, static_cast<double>(step.value),
                     capped ? " and have a finite inverse" : "");
  }
  if (!std::isfinite(a.prob_scale))
    return invalid("fovea: onnx: prob_scale %g is not finite", static_cast<double>(a.prob_scale));
  return check_precision(a.softmax_precision);
}

}   // namespace onnx

template <class Compiled>
Status onnx_attention(const OnnxAttention& attributes, const OnnxAttentionInputs& inputs,
                      const OnnxAttentionOutputs& outputs, Executor executor) {
  onnx::AttentionCall call;
  if (Status s = onnx::bind(call, attributes, inputs, outputs); !s.ok()) return s;
  call.options.executor = executor;
  if (Status s = onnx::check_kernels<Compiled>(call.k, call.v); !s.ok()) return s;
  if (Status s = supports(onnx::shape_of(call), call.options); !s.ok() || call.empty) return s;
  if (Status s = onnx::join(call); !s.ok()) return s;
  const Operand k = call.k;   // with the keys that a short mask hides
  call.k.extent[2] = call.v.extent[2] = call.masked_from;
  if (Status s = attention<Compiled>(call.q, dense_kv(call.k, call.v), call.y, call.options); !s.ok()) return s;
  call.k = k;
  if (outputs.qk_matmul_output.type == OnnxType::none) return {};
  return onnx::write_scores(call, attributes.qk_matmul_output_mode);
}

template <class Compiled>
Status onnx_flex_attention(const OnnxFlexAttention& attributes, const OnnxFlexAttentionInputs& inputs, const OnnxOutput& y,
                           Executor executor) {
  onnx::NamedBytes read[] = {{"Q", {}}, {"K", {}}, {"V", {}}}, written[] = {{"Y", {}}};
  const OnnxTensor* const tensors[] = {&inputs.q, &inputs.k, &inputs.v};
  onnx::AttentionCall call;
  Operand* const views[] = {&call.q, &call.k, &call.v};
  for (std::size_t n = 0; n < 3; ++n) {
    if (Status s = onnx::check_present(read[n].name, *tensors[n]); !s.ok()) return s;
    if (Status s = onnx::check_plain(read[n].name, *tensors[n]); !s.ok()) return s;
    if (Status s = onnx::check_type(read[n].name, *tensors[n], inputs.q.type); !s.ok()) return s;
    if (Status s = onnx::check_tensor(read[n].name, *tensors[n], read[n].bytes); !s.ok()) return s;
    if (Status s = onnx::check_rank(read[n].name, tensors[n]->shape.size(), 4); !s.ok()) return s;
    if (Status s = onnx::view_of(read[n].name, *tensors[n], 0, *views[n]); !s.ok()) return s;
  }
  if (Status s = onnx::check_type("Y", y, inputs.q.type); !s.ok()) return s;
  if (Status s = onnx::check_tensor("Y", y, written[0].bytes); !s.ok()) return s;
  if (Status s = onnx::check_apart(read, written); !s.ok()) return s;
  if (Status s = onnx::bind_heads(call); !s.ok()) return s;
  const std::array<index_t, 4> out{call.q.extent[0], call.q.extent[1], call.q.extent[2], call.v.extent[3]};
  if (Status s = onnx::check_shape("Y", y.shape, out); !s.ok()) return s;
  if (Status s = onnx::view_of("Y", y, 0, call.y); !s.ok()) return s;
  if (Status s = onnx::check_modifiers(attributes); !s.ok()) return s;
  if (Status s = onnx::check_kernels<Compiled>(call.k, call.v); !s.ok()) return s;
  call.options.scale = attributes.scale;
  call.options.executor = executor;
  std::span<const OnnxModifier> steps = attributes.score_mod;
  while (!steps.empty() &&
         steps.back().kind == OnnxModifier::Kind::causal_mask) {   // tiles behind the diagonal cost nothing
    call.options.causal = Causal::top_left;
    steps = steps.first(steps.size() - 1);
  }
  const Kv kv = dense_kv(call.k, call.v);
  if (steps.empty() && attributes.prob_scale == 1.f) return attention<Compiled>(call.q, kv, call.y, call.options);
  return attention<Compiled>(call.q, kv, call.y, call.options,
                             variant().with_score(onnx::Modifiers{steps}).with_close(onnx::ScaleRow{attributes.prob_scale}));
}

inline Status onnx_rotary_embedding(const OnnxRotaryEmbedding& a, const OnnxRotaryEmbeddingInputs& in, const OnnxOutput& y) {
  onnx::NamedBytes inputs[] = {{"cos_cache", {}}, {"sin_cache", {}}, {"position_ids", {}}, {"X", {}}},
                   outputs[] = {{"Y", {}}};
  const OnnxTensor* const read[] = {&in.cos_cache, &in.sin_cache, &in.position_ids, &in.x};
  for (std::size_t n = 0; n < std::size(inputs); ++n) {
    if (n != 2) {
      if (Status s = onnx::check_present(inputs[n].name, *read[n]); !s.ok()) return s;
      if (Status s = onnx::check_type(inputs[n].name, *read[n], in.x.type); !s.ok()) return s;
    }
    if (Status s = onnx::check_tensor(inputs[n].name, *read[n], inputs[n].bytes); !s.ok()) return s;
  }
  if (in.x.type != OnnxType::f32 && in.x.type != OnnxType::f16 && in.x.type != OnnxType::bf16)
    return onnx::invalid("fovea: onnx: X has element type %d, RotaryEmbedding takes 1, 10 and 16",
                         static_cast<int>(in.x.type));
  if (Status s = onnx::check_type("Y", y, in.x.type); !s.ok()) return s;
  if (Status s = onnx::check_tensor("Y", y, outputs[0].bytes); !s.ok()) return s;
  const bool in_place = y.data == in.x.data;
  if (Status s = onnx::check_apart(std::span(inputs).first(in_place ? 3 : 4), outputs); !s.ok()) return s;
  if (a.interleaved != 0 && a.interleaved != 1)
    return onnx::invalid("fovea: onnx: interleaved is %lld, must be 0 or 1", static_cast<long long>(a.interleaved));
  Operand x;
  Result out;
  if (Status s = onnx::view_of("X", in.x, a.num_heads, x); !s.ok()) return s;
  if (y.shape.size() != in.x.shape.size() || !std::equal(y.shape.begin(), y.shape.end(), in.x.shape.begin()))
    return onnx::invalid("fovea: onnx: Y has not the shape of X, rank %zu and %zu", y.shape.size(), in.x.shape.size());
  if (Status s = onnx::view_of("Y", y, a.num_heads, out); !s.ok()) return s;

  const auto [batches, heads, len, dim] = x.extent;
  const index_t rotary = a.rotary_embedding_dim == 0 ? dim : a.rotary_embedding_dim, pairs = rotary / 2;
  if (rotary < 0 || rotary > dim || rotary % 2 != 0)
    return onnx::invalid("fovea: onnx: %td of the %td numbers of a head cannot turn in pairs", rotary, dim);
  const bool listed = in.position_ids.type != OnnxType::none;
  index_t rows = 0;   // of a cache
  for (const auto& [name, cache] :
       {std::pair<const char*, const OnnxTensor*>{"cos_cache", &in.cos_cache}, {"sin_cache", &in.sin_cache}}) {
    if (!listed) {
      if (Status s = onnx::check_shape<3>(name, cache->shape, {batches, len, pairs}); !s.ok()) return s;
    } else {
      if (Status s = onnx::check_rank(name, cache->shape.size(), 2); !s.ok()) return s;
      rows = in.cos_cache.shape[0];
      if (Status s = onnx::check_shape<2>(name, cache->shape, {rows, pairs}); !s.ok()) return s;
    }
  }
  const auto* const ids = static_cast<const std::int64_t*>(in.position_ids.data);
  if (listed) {
    if (Status s = onnx::check_type("position_ids", in.position_ids, OnnxType::i64); !s.ok()) return s;
    if (Status s = onnx::check_shape<2>("position_ids", in.position_ids.shape, {batches, len}); !s.ok()) return s;
    for (index_t token = 0; token < batches * len; ++token) {
      if (ids[token] < 0 || ids[token] >= rows)
        return onnx::invalid("fovea: onnx: position_ids has %lld at token %td, the caches hold %td positions",
                             static_cast<long long>(ids[token]), token, rows);
    }
  }

  if (outputs[0].bytes.begin == outputs[0].bytes.end) return {};
  onnx::Scratch<float> scratch;   // a vector, cosines, sines
  if (Status s = scratch.take(dim + 2 * pairs); !s.ok()) return s;
  float *const vector = scratch.data(), *const cos = vector + dim, *const sin = cos + pairs;
  const RopeLayout layout = a.interleaved != 0 ? RopeLayout::interleaved : RopeLayout::half_split;
  const index_t number = row_bytes(x.format, 1);
  for (index_t b = 0; b < batches; ++b) {
    for (index_t i = 0; i < len; ++i) {
      const index_t row = (listed ? ids[b * len + i] : b * len + i) * pairs * number;
      if (pairs > 0) {
        read_numbers(x.format, static_cast<const std::byte*>(in.cos_cache.data) + row, 1, pairs, cos);
        read_numbers(x.format, static_cast<const std::byte*>(in.sin_cache.data) + row, 1, pairs, sin);
      }
      for (index_t h = 0; h < heads && dim > 0; ++h) {
        const index_t at = (b * x.stride[0] + h * x.stride[1] + i * x.stride[2]) * number;
        read_numbers(x.format, x.data + at, 1, dim, vector);
        rotate_rows(layout, vector, 0, vector, 0, 1, cos, sin, 0, pairs, dim);
        write_numbers(x.format, vector, dim, out.data + at, 1);
      }
    }
  }
  return {};
}

inline Status onnx_tensor_scatter(const OnnxTensorScatter& a, const OnnxTensorScatterInputs& in,
                                  const OnnxOutput& present_cache) {
  onnx::NamedBytes inputs[] = {{"update", {}}, {"write_indices", {}}, {"past_cache", {}}},
                   outputs[] = {{"present_cache", {}}};
  if (Status s = onnx::check_present("past_cache", in.past_cache); !s.ok()) return s;
  if (Status s = onnx::check_type("update", in.update, in.past_cache.type); !s.ok()) return s;
  if (Status s = onnx::check_type("present_cache", present_cache, in.past_cache.type); !s.ok()) return s;
  if (Status s = onnx::check_tensor("past_cache", in.past_cache, inputs[2].bytes); !s.ok()) return s;
  if (Status s = onnx::check_tensor("update", in.update, inputs[0].bytes); !s.ok()) return s;
  if (Status s = onnx::check_tensor("write_indices", in.write_indices, inputs[1].bytes); !s.ok()) return s;
  if (Status s = onnx::check_tensor("present_cache", present_cache, outputs[0].bytes); !s.ok()) return s;
  const bool in_place = present_cache.data == in.past_cache.data;
  if (Status s = onnx::check_apart(std::span(inputs).first(in_place ? 2 : 3), outputs); !s.ok()) return s;
  if (a.mode > OnnxScatterMode::circular)
    return onnx::invalid("fovea: onnx: mode is %d, no value of the enum", static_cast<int>(a.mode));

  const std::span<const std::int64_t> shape = in.past_cache.shape, written = in.update.shape;
  const auto rank = static_cast<std::int64_t>(shape.size());
  const std::int64_t axis = a.axis < 0 ? a.axis + rank : a.axis;
  if (axis < 1 || axis >= rank)
    return onnx::invalid("fovea: onnx: axis %lld of a cache of rank %lld, must name an axis behind the batch",
                         static_cast<long long>(a.axis), static_cast<long long>(rank));
  if (Status s = onnx::check_rank("update", written.size(), shape.size()); !s.ok()) return s;
  if (Status s = onnx::check_rank("present_cache", present_cache.shape.size(), shape.size()); !s.ok()) return s;
  index_t between = 1, inner = onnx::bytes_of(in.past_cache.type);   // axes before and behind the written one
  for (std::int64_t n = 0; n < rank; ++n) {
    const auto at = static_cast<std::size_t>(n);
    if (present_cache.shape[at] != shape[at] || (n != axis && written[at] != shape[at]))
      return onnx::invalid("fovea: onnx: axis %zu: the cache has %lld, update %lld, present_cache %lld", at,
                           static_cast<long long>(shape[at]), static_cast<long long>(written[at]),
                           static_cast<long long>(present_cache.shape[at]));
    if (n > axis) inner *= shape[at];
    if (n > 0 && n < axis) between *= shape[at];
  }
  const index_t batches = shape[0], len = shape[static_cast<std::size_t>(axis)],
                count = written[static_cast<std::size_t>(axis)];
  if (count > len) return onnx::invalid("fovea: onnx: update has %td positions, the cache %td", count, len);
  const bool listed = in.write_indices.type != OnnxType::none, circular = a.mode == OnnxScatterMode::circular;
  const auto* const indices = static_cast<const std::int64_t*>(in.write_indices.data);
  if (listed) {
    if (Status s = onnx::check_type("write_indices", in.write_indices, OnnxType::i64); !s.ok()) return s;
    if (Status s = onnx::check_shape<1>("write_indices", in.write_indices.shape, {batches}); !s.ok()) return s;
    for (index_t b = 0; b < batches; ++b) {
      if (indices[b] < 0 || (!circular && indices[b] > len - count))
        return onnx::invalid("fovea: onnx: write_indices[%td] = %lld, %td positions of %td do not fit there", b,
                             static_cast<long long>(indices[b]), count, len);
    }
  }
  if (outputs[0].bytes.begin == outputs[0].bytes.end) return {};

  auto* const cache = static_cast<std::byte*>(present_cache.data);
  const auto* const update = static_cast<const std::byte*>(in.update.data);
  if (!in_place) std::memcpy(cache, in.past_cache.data, outputs[0].bytes.end - outputs[0].bytes.begin);
  for (index_t b = 0; b < batches && count > 0; ++b) {
    const index_t first = listed ? indices[b] % len : 0, straight = std::min(count, len - first);
    for (index_t n = b * between; n < (b + 1) * between; ++n) {
      std::memcpy(cache + (n * len + first) * inner, update + n * count * inner, static_cast<std::size_t>(straight * inner));
      std::memcpy(cache + n * len * inner, update + (n * count + straight) * inner,
                  static_cast<std::size_t>((count - straight) * inner));
    }
  }
  return {};
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
