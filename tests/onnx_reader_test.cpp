// SPDX-License-Identifier: Apache-2.0
// The reader of ONNX files alone, without the operators: cheap enough to compile under a sanitizer for every change. What whole
// cases come to is in onnx_test.cpp.
#include <cstddef>
#include <limits>
#include <string>
#include <vector>

#include "catch_compat.hpp"
#include "support/onnx_message.hpp"
#include "support/random.hpp"

namespace {

using namespace test::onnx;
using Catch::Matchers::ContainsSubstring;
using fovea::OnnxType;

// On the heap and no longer than it is: a sanitizer sees a read behind it.
onnx_tool::Problem read_model(const std::string& bytes, onnx_tool::Graph& graph) {
  const std::vector<char> exact(bytes.begin(), bytes.end());
  const onnx_tool::Bytes file(reinterpret_cast<const std::byte*>(exact.data()), exact.size());
  onnx_tool::Model model;
  if (onnx_tool::Problem problem = onnx_tool::read_model(file, model); !problem.empty()) return problem;
  return onnx_tool::read_graph(model.graph, graph);
}
onnx_tool::Problem read_tensor(const std::string& bytes) {
  const std::vector<char> exact(bytes.begin(), bytes.end());
  onnx_tool::Tensor tensor;
  onnx_tool::Problem problem =
      onnx_tool::read_tensor({reinterpret_cast<const std::byte*>(exact.data()), exact.size()}, tensor);
  if (problem.empty()) CHECK(tensor.data().size() <= exact.size() + 8 * onnx_tool::kMaxTyped);
  return problem;
}

std::string some_model() {
  const Message step = graph_of({node_of("Mul", {"s", "two"}, {"t"})}, {"s"}, {"t"},
                                {tensor_file("two", listed(OnnxType::f32, {}, {2}))});
  return model_file(graph_of({node_of("FlexAttention", {"Q", "K", "V"}, {"Y"},
                                      {attribute("score_mod", step), attribute("a", 3), attribute_text("b", "text")})},
                             {"Q", "K", "V"}, {"Y"}),
                    1, "ai.onnx.preview");
}

}   // namespace

TEST_CASE("ONNX reader: models and tensors that were cut, or hold random bytes", "[onnx][files]") {
  const std::string model = some_model(), tensor = tensor_file("V", listed(OnnxType::f32, {1, 1, 5, 1}, {0, 1, 2, 3, 4}));
  onnx_tool::Graph graph;
  REQUIRE(read_model(model, graph).empty());
  CHECK(graph.nodes.size() == 1);
  CHECK(graph.inputs.size() == 3);
  REQUIRE(read_tensor(tensor).empty());
  for (std::size_t length = 0; length < tensor.size(); ++length) CHECK_FALSE(read_tensor(tensor.substr(0, length)).empty());
  for (std::size_t length = 0; length < model.size(); ++length) {
    onnx_tool::Graph cut;
    read_model(model.substr(0, length), cut);
    CHECK(cut.nodes.size() <= 1);
  }
  test::Random random(26);
  int refused = 0;
  for (int n = 0; n < 4000; ++n) {
    std::string bad = n % 2 == 0 ? model : tensor;
    for (std::ptrdiff_t flips = random.between(1, 3); flips > 0; --flips)
      bad[static_cast<std::size_t>(random.below(static_cast<std::ptrdiff_t>(bad.size())))] = static_cast<char>(random.below(256));
    onnx_tool::Graph spoiled;
    refused += !(n % 2 == 0 ? read_model(bad, spoiled) : read_tensor(bad)).empty();
  }
  CHECK(refused > 1000);
  CHECK(refused < 4000);
}

TEST_CASE("ONNX reader: hostile lengths and shapes are refused", "[onnx][files]") {
  const auto refuse = [](const char* words, const Message& message) {
    onnx_tool::Tensor tensor;
    CHECK_THAT(onnx_tool::read_tensor(view(message.bytes), tensor), ContainsSubstring(words));
  };
  const std::int64_t huge = std::int64_t{1} << 40;
  const auto tensor = [] { return Message{}.integer(2, 1); };
  refuse("4 bytes of data for a shape of 4398046511104", tensor().integer(1, huge).text(9, "abcd"));
  refuse("beyond the address space", tensor().integer(1, huge).integer(1, huge).text(9, "abcd"));
  refuse("beyond the address space", tensor().integer(1, INT64_MAX).text(9, "abcd"));
  refuse("beyond the address space", tensor().integer(1, 0).integer(1, huge).integer(1, huge));
  refuse("negative", tensor().integer(1, -1).text(9, "abcd"));
  refuse("rank above 8", [&] {
    Message message = tensor();
    for (int n = 0; n < 9; ++n) message.integer(1, 1);
    return message.text(9, "abcd");
  }());
  refuse("element type that is none", Message{}.integer(2, 1000));
  refuse("element type 8", Message{}.integer(2, 8).integer(1, 1));
  refuse("data in another file", tensor().integer(1, 1).integer(14, 1));
  refuse("too many numbers", tensor().integer(1, 65).text(4, std::string(65 * 4, 'x')));
  refuse("broken or too long list", Message{}.integer(2, 7).integer(1, 65).text(7, std::string(65, '\1')));
  refuse("a list of numbers of 3 bytes", tensor().text(4, "abc"));

  // A length of 2^63, a varint that does not end, a group, field 0.
  const auto broken = [&](std::initializer_list<int> bytes) {
    Message message = tensor();
    for (const int byte : bytes) message.bytes += static_cast<char>(byte);
    refuse("ends early or is no message", message);
  };
  broken({9 << 3 | 2, 255, 255, 255, 255, 255, 255, 255, 255, 127});
  broken({9 << 3 | 2, 5, 'a'});
  broken({1 << 3, 255, 255, 255, 255, 255, 255, 255, 255, 255, 2});
  broken({1 << 3, 128});
  broken({15 << 3 | 3});
  broken({0, 1});
  broken({8 << 3 | 1, 1, 2, 3});

  // Numbers outside raw_data: packed, one by one, and as the bits of a small type.
  onnx_tool::Tensor read;
  const auto data_of = [&](const Message& message) {
    const std::string problem = onnx_tool::read_tensor(view(message.bytes), read);
    INFO(problem);
    CHECK(problem.empty());
    return std::vector<std::byte>(read.data().begin(), read.data().end());
  };
  CHECK(data_of(tensor().integer(1, 2).real(4, 1.5f).real(4, -2.f)) == listed(OnnxType::f32, {2}, {1.5, -2}).bytes);
  CHECK(data_of(Message{}.integer(2, 7).integer(1, 2).integer(7, 5).integer(7, -3)) ==
        listed(OnnxType::i64, {2}, {5, -3}).bytes);
  CHECK(data_of(Message{}.integer(2, 7).text(1, "\2").text(7, "\5\6")) == listed(OnnxType::i64, {2}, {5, 6}).bytes);
  CHECK(data_of(Message{}.integer(2, 9).integer(1, 3).text(5, std::string("\1\0\1", 3))) ==
        listed(OnnxType::boolean, {3}, {1, 0, 1}).bytes);
  CHECK(data_of(Message{}.integer(2, 10).integer(1, 1).integer(5, 0x3c00)) == listed(OnnxType::f16, {1}, {1}).bytes);
}
