// SPDX-License-Identifier: Apache-2.0
// The parts of onnx.proto that a node test needs, as views into the bytes of its files. Counts are limited, so that what is
// kept beside the file has a fixed size however a file lies; a graph with more nodes is counted, and its first ones kept.
#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fovea/onnx.hpp"
#include "protobuf_reader.hpp"

namespace onnx_tool {

inline constexpr std::size_t kMaxRank = 8, kMaxNames = 32, kMaxNodes = 64, kMaxTensors = 32, kMaxTyped = 64;

// What a reader found wrong; empty if nothing.
using Problem = std::string;

struct Tensor {
  std::string_view name;
  fovea::OnnxType type = fovea::OnnxType::none;
  std::array<std::int64_t, kMaxRank> extents{};
  std::size_t rank = 0;
  Bytes raw;                      // little-endian, inside the file
  std::vector<std::byte> typed;   // of float_data and its kin, for at most kMaxTyped elements
  bool has_raw = false;

  std::span<const std::int64_t> shape() const { return {extents.data(), rank}; }
  Bytes data() const { return has_raw ? raw : Bytes(typed); }
};

struct Attribute {
  std::string_view name, text;
  std::int64_t integer = 0;
  float real = 0;
  Bytes graph;
  bool has_integer = false, has_real = false, has_text = false, has_graph = false;
};

struct Node {
  std::string_view op, domain;
  std::vector<std::string_view> inputs, outputs;   // an empty name is an absent optional one
  std::vector<Attribute> attributes;
};

struct Graph {
  std::vector<Node> nodes;
  std::size_t node_count = 0;
  std::vector<Tensor> initializers;
  std::vector<std::string_view> inputs, outputs;
};

struct Model {
  Bytes graph;
  std::vector<std::pair<std::string_view, std::int64_t>> opsets;

  // The version of a domain the model imports, 0 if none.
  std::int64_t opset(std::string_view domain) const {
    for (const auto& [name, version] : opsets) {
      if (name == domain || (domain.empty() && name == "ai.onnx")) return version;
    }
    return 0;
  }
};

// Elements of a shape, false where there are too many to count or a negative one.
inline bool count_elements(std::span<const std::int64_t> shape, std::int64_t& count) {
  count = 1;
  bool empty = false;
  for (const std::int64_t extent : shape) {
    if (extent < 0) return false;
    empty = empty || extent == 0;
    if (extent > 0 && __builtin_mul_overflow(count, extent, &count)) return false;
  }
  if (empty) count = 0;
  return true;
}

namespace detail {

template <class T>
void append(std::vector<std::byte>& bytes, T value) {
  const auto* const data = reinterpret_cast<const std::byte*>(&value);
  bytes.insert(bytes.end(), data, data + sizeof value);
}

// float_data, double_data: packed little-endian numbers, or one field each.
inline Problem read_numbers(const Field& field, std::size_t size, Tensor& tensor) {
  if (field.is_bytes()) {
    if (field.bytes.size() % size != 0) return "a list of numbers of " + std::to_string(field.bytes.size()) + " bytes";
    if (tensor.typed.size() + field.bytes.size() > kMaxTyped * size) return "too many numbers outside raw_data";
    tensor.typed.insert(tensor.typed.end(), field.bytes.begin(), field.bytes.end());
    return {};
  }
  if (field.wire != (size == 4 ? Field::Wire::fixed32 : Field::Wire::fixed64))
    return "a list of numbers of another wire type";
  if (tensor.typed.size() + size > kMaxTyped * size) return "too many numbers outside raw_data";
  if (size == 4) {
    append(tensor.typed, static_cast<std::uint32_t>(field.integer));
  } else {
    append(tensor.typed, field.integer);
  }
  return {};
}

// int32_data, int64_data, uint64_data: varints, each as wide as the tensor's type (f16 and bf16 as their bits).
inline Problem read_integers(const Field& field, std::vector<std::int64_t>& integers) {
  const bool fits = each_integer(field, [&](std::int64_t value) {
    if (integers.size() == kMaxTyped) return false;
    integers.push_back(value);
    return true;
  });
  return fits ? Problem{} : "a broken or too long list of integers outside raw_data";
}

}   // namespace detail

inline Problem read_tensor(Bytes message, Tensor& tensor) {
  tensor = {};
  std::vector<std::int64_t> integers;
  Problem problem;
  Fields fields(message);
  Field field;
  while (problem.empty() && fields.next(field)) {
    switch (field.number) {
      case 1:
        if (!each_integer(field, [&](std::int64_t extent) {
              if (tensor.rank == kMaxRank) return false;
              tensor.extents[tensor.rank++] = extent;
              return true;
            }))
          problem = "a broken shape, or a rank above " + std::to_string(kMaxRank);
        break;
      case 2:
        if (!field.is_varint() || field.integer > 64) problem = "an element type that is none";
        tensor.type = static_cast<fovea::OnnxType>(field.integer & 127);
        break;
      case 4:
        problem = detail::read_numbers(field, 4, tensor);
        break;
      case 10:
        problem = detail::read_numbers(field, 8, tensor);
        break;
      case 5:
      case 7:
      case 11:
        problem = detail::read_integers(field, integers);
        break;
      case 8:
        if (field.is_bytes()) tensor.name = field.text();
        break;
      case 9:
        if (!field.is_bytes()) problem = "raw_data that is no run of bytes";
        tensor.raw = field.bytes;
        tensor.has_raw = true;
        break;
      case 13:
      case 14:
        problem = "data in another file";
        break;
      default:
        break;
    }
  }
  if (!problem.empty()) return problem;
  if (!fields.ok()) return "a tensor that ends early or is no message";

  const fovea::index_t size = fovea::onnx::bytes_of(tensor.type);
  if (size == 0) return "element type " + std::to_string(static_cast<int>(tensor.type)) + ", which has no whole bytes";
  for (const std::int64_t value : integers) {
    const auto* const bytes = reinterpret_cast<const std::byte*>(&value);
    tensor.typed.insert(tensor.typed.end(), bytes, bytes + std::min<fovea::index_t>(size, 8));
  }
  std::int64_t count = 0, wanted = 0;
  if (!count_elements(tensor.shape(), count) || __builtin_mul_overflow(count, size, &wanted))
    return "a shape that is negative or beyond the address space";
  if (static_cast<std::uint64_t>(wanted) != tensor.data().size())
    return std::to_string(tensor.data().size()) + " bytes of data for a shape of " + std::to_string(wanted);
  return {};
}

namespace detail {

inline Problem read_attribute(Bytes message, Attribute& attribute) {
  Fields fields(message);
  Field field;
  while (fields.next(field)) {
    if (field.number == 1 && field.is_bytes()) attribute.name = field.text();
    if (field.number == 2 && field.is_float()) {
      attribute.real = field.real();
      attribute.has_real = true;
    }
    if (field.number == 3 && field.is_varint()) {
      attribute.integer = field.signed_integer();
      attribute.has_integer = true;
    }
    if (field.number == 4 && field.is_bytes()) {
      attribute.text = field.text();
      attribute.has_text = true;
    }
    if (field.number == 6 && field.is_bytes()) {
      attribute.graph = field.bytes;
      attribute.has_graph = true;
    }
  }
  return fields.ok() ? Problem{} : "a broken attribute";
}

inline Problem read_node(Bytes message, Node& node) {
  Fields fields(message);
  Field field;
  while (fields.next(field)) {
    if (field.number == 1 || field.number == 2) {
      auto& names = field.number == 1 ? node.inputs : node.outputs;
      if (!field.is_bytes() || names.size() == kMaxNames) return "a node with broken or too many names";
      names.push_back(field.text());
    }
    if (field.number == 4 && field.is_bytes()) node.op = field.text();
    if (field.number == 7 && field.is_bytes()) node.domain = field.text();
    if (field.number == 5) {
      if (!field.is_bytes() || node.attributes.size() == kMaxNames) return "a node with broken or too many attributes";
      node.attributes.emplace_back();
      if (Problem problem = read_attribute(field.bytes, node.attributes.back()); !problem.empty()) return problem;
    }
  }
  return fields.ok() ? Problem{} : "a broken node";
}

// The name of a ValueInfoProto.
inline Problem read_name(Bytes message, std::vector<std::string_view>& names) {
  if (names.size() == kMaxNames) return "a graph with too many inputs or outputs";
  names.emplace_back();
  Fields fields(message);
  Field field;
  while (fields.next(field)) {
    if (field.number == 1 && field.is_bytes()) names.back() = field.text();
  }
  return fields.ok() ? Problem{} : "a broken input or output of a graph";
}

}   // namespace detail

// One level: the graph of an attribute is read by another call, and only by who wants it.
inline Problem read_graph(Bytes message, Graph& graph) {
  graph = {};
  Fields fields(message);
  Field field;
  while (fields.next(field)) {
    const bool known = field.number == 1 || field.number == 5 || field.number == 11 || field.number == 12;
    if (!known) continue;
    if (!field.is_bytes()) return "a broken graph";
    Problem problem;
    if (field.number == 1 && graph.node_count++ < kMaxNodes) {
      graph.nodes.emplace_back();
      problem = detail::read_node(field.bytes, graph.nodes.back());
    } else if (field.number == 5) {
      if (graph.initializers.size() == kMaxTensors) return "a graph with too many initializers";
      graph.initializers.emplace_back();
      problem = read_tensor(field.bytes, graph.initializers.back());
    } else if (field.number == 11 || field.number == 12) {
      problem = detail::read_name(field.bytes, field.number == 11 ? graph.inputs : graph.outputs);
    }
    if (!problem.empty()) return problem;
  }
  return fields.ok() ? Problem{} : "a graph that ends early or is no message";
}

inline Problem read_model(Bytes message, Model& model) {
  model = {};
  bool has_graph = false;
  Fields fields(message);
  Field field;
  while (fields.next(field)) {
    if (field.number == 7 && field.is_bytes()) {
      model.graph = field.bytes;
      has_graph = true;
    }
    if (field.number != 8) continue;
    if (!field.is_bytes() || model.opsets.size() == kMaxNames) return "broken or too many opset imports";
    Fields import(field.bytes);
    Field part;
    model.opsets.emplace_back();
    while (import.next(part)) {
      if (part.number == 1 && part.is_bytes()) model.opsets.back().first = part.text();
      if (part.number == 2 && part.is_varint()) model.opsets.back().second = part.signed_integer();
    }
    if (!import.ok()) return "a broken opset import";
  }
  if (!fields.ok()) return "a model that ends early or is no message";
  return has_graph ? Problem{} : "a model without a graph";
}

}   // namespace onnx_tool
