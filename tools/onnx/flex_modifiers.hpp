// SPDX-License-Identifier: Apache-2.0
// The subgraphs of FlexAttention as ready-made modifiers. The nodes are walked once, each name gets a meaning: the scores with
// the steps taken so far, a constant, an index of a query or a key. A node without a meaning ends the walk, and is named.
#pragma once
#include <cmath>
#include <string>
#include <vector>

#include "onnx_model.hpp"

namespace onnx_tool {

class ModifierGraph {
 public:
  // True if the graph is a chain of modifiers; else reason() says what is not.
  bool read(Bytes message) {
    Graph graph;
    if (reason_ = read_graph(message, graph); !reason_.empty()) return false;
    if (graph.inputs.size() != 1 || graph.outputs.size() != 1) return refuse("more than one input or output");
    if (graph.node_count > graph.nodes.size()) return refuse(std::to_string(graph.node_count) + " nodes");
    values_.clear();
    values_.push_back({graph.inputs[0], {.kind = Kind::scores}});
    for (const Tensor& tensor : graph.initializers) values_.push_back({tensor.name, constant_of(tensor)});
    for (const Node& node : graph.nodes) {
      const Value value = value_of(node);
      if (value.kind == Kind::unknown || node.outputs.size() != 1) return refuse("node " + std::string(node.op));
      values_.push_back({node.outputs[0], value});
    }
    const Value result = find(graph.outputs[0]);
    if (result.kind != Kind::scores) return refuse("an output that is not its input changed");
    steps_ = result.steps;
    return true;
  }

  const std::vector<fovea::OnnxModifier>& steps() const { return steps_; }
  const std::string& reason() const { return reason_; }

 private:
  using Step = fovea::OnnxModifier::Kind;
  enum class Kind : std::uint8_t { unknown, scores, number, numbers, shape, length, range, index, distance, causal };
  struct Value {
    Kind kind = Kind::unknown;
    bool key = false;                           // length, range, index: of keys, else of queries
    double number = 0;                          // number; distance: times query - key
    std::vector<std::int64_t> numbers{};        // a list of integers
    std::vector<fovea::OnnxModifier> steps{};   // of the scores
  };

  bool refuse(const std::string& what) {
    reason_ = "a subgraph with " + what;
    return false;
  }

  Value find(std::string_view name) const {
    for (const auto& [known, value] : values_) {
      if (known == name) return value;
    }
    return {};
  }

  static Value constant_of(const Tensor& tensor) {
    const Bytes data = tensor.data();
    Value value;
    if (tensor.type == fovea::OnnxType::i64 && data.size() <= 8 * kMaxRank) {
      value.numbers.resize(data.size() / 8);
      if (!data.empty()) std::memcpy(value.numbers.data(), data.data(), data.size());
      value.kind = Kind::numbers;
      if (tensor.rank != 0) return value;
      value.kind = Kind::number;
      value.number = static_cast<double>(value.numbers[0]);
    } else if (fovea::onnx::is_plain(tensor.type) &&
               data.size() == static_cast<std::size_t>(fovea::onnx::bytes_of(tensor.type))) {
      alignas(8) std::array<std::byte, 8> number{};   // in a file it stands anywhere
      std::memcpy(number.data(), data.data(), data.size());
      value.kind = Kind::number;
      value.number = fovea::onnx::number_at(fovea::onnx::format_of(tensor.type), number.data(), 0);
    }
    return value;
  }

  static Value with_step(const Value& scores, Step kind, double number) {
    Value value = scores;
    if (!std::isfinite(static_cast<float>(number)) || value.steps.size() == kMaxNames) return {};
    value.steps.push_back({kind, static_cast<float>(number)});
    return value;
  }

  Value value_of(const Node& node) const {
    std::vector<Value> in;
    for (const std::string_view name : node.inputs) in.push_back(find(name));
    if (!node.domain.empty() && node.domain != "ai.onnx") return {};
    const auto is = [&](std::string_view op, std::size_t inputs) { return node.op == op && in.size() == inputs; };
    if (is("Identity", 1)) return in[0];
    if (is("Cast", 1)) return cast(node, in[0]);
    if (is("Shape", 1)) return in[0].kind == Kind::scores && node.attributes.empty() ? Value{.kind = Kind::shape} : Value{};
    if (is("Gather", 2)) return length_of(node, in[0], in[1]);
    if (is("Range", 3)) return range_of(in[0], in[1], in[2]);
    if (is("Reshape", 2)) return index_of(in[0], in[1]);
    if (is("GreaterOrEqual", 2)) return mask_of(in[0], in[1]);
    if (is("LessOrEqual", 2)) return mask_of(in[1], in[0]);
    if (is("Where", 3)) {
      const bool masks = in[0].kind == Kind::causal && in[1].kind == Kind::scores && in[2].kind == Kind::number;
      return masks && in[2].number == -HUGE_VAL ? with_step(in[1], Step::causal_mask, 0) : Value{};
    }
    if (is("Tanh", 1)) return in[0].kind == Kind::scores ? with_step(in[0], Step::soft_cap, 1) : Value{};
    if (is("Add", 2)) return sum(in[0], in[1], 1);
    if (is("Sub", 2)) return sum(in[0], in[1], -1);
    if (is("Mul", 2)) return in[1].kind == Kind::number ? product(in[0], in[1].number) : number_times(in[0], in[1]);
    if (is("Div", 2)) return in[1].kind == Kind::number ? product(in[0], 1 / in[1].number) : Value{};
    return {};
  }

  // Between types that hold the number: a cast that rounds is no cast of these.
  static Value cast(const Node& node, const Value& value) {
    std::int64_t to = 0;
    for (const Attribute& attribute : node.attributes) {
      if (attribute.name != "to" || !attribute.has_integer) return {};
      to = attribute.integer;
    }
    const auto is = [to](fovea::OnnxType type) { return to == static_cast<std::int64_t>(type); };
    using Type = fovea::OnnxType;
    const bool real = is(Type::f32) || is(Type::f64) || is(Type::f16) || is(Type::bf16);
    const bool whole = (is(Type::i64) || is(Type::i32)) && value.number == std::trunc(value.number);
    return (value.kind == Kind::distance || value.kind == Kind::number) && (real || whole) ? value : Value{};
  }

  static Value length_of(const Node& node, const Value& shape, const Value& axis) {
    for (const Attribute& attribute : node.attributes) {
      if (attribute.name != "axis" || attribute.integer != 0) return {};
    }
    if (shape.kind != Kind::shape || axis.kind != Kind::number) return {};
    const double at = axis.number < 0 ? axis.number + 4 : axis.number;
    if (at != 2 && at != 3) return {};
    return {.kind = Kind::length, .key = at == 3};
  }

  static Value range_of(const Value& start, const Value& limit, const Value& delta) {
    const bool counts = start.kind == Kind::number && start.number == 0 && delta.kind == Kind::number && delta.number == 1;
    if (!counts || limit.kind != Kind::length) return {};
    return {.kind = Kind::range, .key = limit.key};
  }

  // A range of queries stands along the last axis but one, a range of keys along the last.
  static Value index_of(const Value& range, const Value& shape) {
    if (range.kind != Kind::range || shape.kind != Kind::numbers) return {};
    const std::size_t rank = shape.numbers.size(), from_right = range.key ? 1 : 2;
    if (rank < 2 || rank > 4) return {};
    for (std::size_t axis = 0; axis < rank; ++axis) {
      if (shape.numbers[axis] != (axis == rank - from_right ? -1 : 1)) return {};
    }
    return {.kind = Kind::index, .key = range.key};
  }

  static Value mask_of(const Value& larger, const Value& smaller) {
    const bool causal = larger.kind == Kind::index && !larger.key && smaller.kind == Kind::index && smaller.key;
    return causal ? Value{.kind = Kind::causal} : Value{};
  }

  static Value sum(const Value& a, const Value& b, double sign) {
    if (a.kind == Kind::scores && b.kind == Kind::number) return with_step(a, Step::add, sign * b.number);
    if (a.kind == Kind::scores && b.kind == Kind::distance) return with_step(a, Step::relative_positional, sign * b.number);
    if (b.kind == Kind::scores && a.kind != Kind::scores && sign > 0) return sum(b, a, 1);
    if (a.kind == Kind::index && b.kind == Kind::index && a.key != b.key && sign < 0)
      return {.kind = Kind::distance, .number = b.key ? 1. : -1.};
    return {};
  }

  static Value product(const Value& a, double factor) {
    if (a.kind == Kind::scores) return with_step(a, Step::multiply, factor);
    if (a.kind == Kind::distance) return {.kind = Kind::distance, .number = a.number * factor};
    return {};
  }
  static Value number_times(const Value& a, const Value& b) {
    return a.kind == Kind::number ? product(b, a.number) : Value{};
  }

  std::vector<std::pair<std::string_view, Value>> values_;
  std::vector<fovea::OnnxModifier> steps_;
  std::string reason_;
};

}   // namespace onnx_tool
