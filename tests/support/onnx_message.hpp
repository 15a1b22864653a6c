// SPDX-License-Identifier: Apache-2.0
// Files of ONNX made by tests: tensors, nodes, graphs and models as bytes.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "../tools/onnx/onnx_model.hpp"
#include "onnx_numbers.hpp"

namespace test::onnx {

// The other direction of tools/onnx/protobuf_reader.hpp, as little of it as a test needs.
struct Message {
  std::string bytes;

  void varint(std::uint64_t value) {
    for (; value >= 128; value >>= 7) bytes += static_cast<char>(value | 128);
    bytes += static_cast<char>(value);
  }
  Message& integer(unsigned field, std::int64_t value) {
    varint(field << 3);
    varint(static_cast<std::uint64_t>(value));
    return *this;
  }
  Message& text(unsigned field, const std::string& value) {
    varint(field << 3 | 2);
    varint(value.size());
    bytes += value;
    return *this;
  }
  Message& message(unsigned field, const Message& value) { return text(field, value.bytes); }
  Message& real(unsigned field, float value) {
    varint(field << 3 | 5);
    bytes.append(reinterpret_cast<const char*>(&value), 4);
    return *this;
  }
};

inline onnx_tool::Bytes view(const std::string& bytes) { return {reinterpret_cast<const std::byte*>(bytes.data()), bytes.size()}; }

// raw_data stands last, so that a file that was cut misses some of it.
inline std::string tensor_file(const std::string& name, const Numbers& numbers) {
  Message tensor;
  for (const std::int64_t extent : numbers.shape) tensor.integer(1, extent);
  tensor.integer(2, static_cast<int>(numbers.type)).text(8, name);
  tensor.text(9, std::string(reinterpret_cast<const char*>(numbers.bytes.data()), numbers.bytes.size()));
  return tensor.bytes;
}

inline Message attribute(const std::string& name, std::int64_t value) { return Message{}.text(1, name).integer(3, value); }
inline Message attribute(const std::string& name, const Message& graph) { return Message{}.text(1, name).message(6, graph); }
inline Message attribute_text(const std::string& name, const std::string& text) { return Message{}.text(1, name).text(4, text); }

inline Message node_of(const std::string& op, std::initializer_list<const char*> inputs, std::initializer_list<const char*> outputs,
                const std::vector<Message>& attributes = {}, const std::string& domain = {}) {
  Message node;
  for (const char* const name : inputs) node.text(1, name);
  for (const char* const name : outputs) node.text(2, name);
  node.text(4, op);
  for (const Message& one : attributes) node.message(5, one);
  if (!domain.empty()) node.text(7, domain);
  return node;
}

inline Message graph_of(const std::vector<Message>& nodes, std::initializer_list<const char*> inputs,
                 std::initializer_list<const char*> outputs, const std::vector<std::string>& initializers = {}) {
  Message graph;
  for (const Message& node : nodes) graph.message(1, node);
  for (const std::string& tensor : initializers) graph.text(5, tensor);
  for (const char* const name : inputs) graph.message(11, Message{}.text(1, name));
  for (const char* const name : outputs) graph.message(12, Message{}.text(1, name));
  return graph;
}

// The opset import stands last: every shorter file has none, or a graph that was cut.
inline std::string model_file(const Message& graph, std::int64_t opset, const std::string& domain = {}) {
  return Message{}.integer(1, 10).message(7, graph).message(8, Message{}.text(1, domain).integer(2, opset)).bytes;
}

}   // namespace test::onnx
