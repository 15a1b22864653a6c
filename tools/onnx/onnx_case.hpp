// SPDX-License-Identifier: Apache-2.0
// One backend node test of ONNX: a folder with model.onnx and test_data_set_<n>/{input,output}_<k>.pb, a graph of one node,
// run through fovea/onnx.hpp or onnx_recurrent.hpp and compared. Passing: |a - b| <= 1e-7 + 1e-3 |b|, as the ONNX backend
// tests have it; for f16 and bf16 1e-3 + 4e-3 |b|, since rounding to bf16 alone is off by up to 2^-8 |b| = 3.9e-3 |b|. Equal
// infinities and NaN for NaN pass, integers are equal.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <vector>

#include "flex_modifiers.hpp"
#include "fovea/onnx_recurrent.hpp"
#include "onnx_model.hpp"

namespace onnx_tool {

enum class Verdict : std::uint8_t { passed, failed, unsupported };

struct Outcome {
  Verdict verdict = Verdict::passed;
  std::string reason{};   // of what did not pass
  double worst = 0;       // largest |a - b| of all numbers compared
};

inline Outcome failed(std::string reason) { return {Verdict::failed, std::move(reason), 0}; }
inline Outcome unsupported(std::string reason) { return {Verdict::unsupported, std::move(reason), 0}; }

namespace detail {

// A tensor whose numbers stand aligned in memory of their own.
struct Loaded {
  Tensor tensor;
  std::vector<std::byte> data;

  fovea::OnnxTensor input() const { return {data.data(), tensor.type, tensor.shape()}; }
};

inline Problem load(Bytes file, Loaded& loaded) {
  if (Problem problem = read_tensor(file, loaded.tensor); !problem.empty()) return problem;
  const Bytes data = loaded.tensor.data();
  loaded.data.assign(data.begin(), data.end());
  return {};
}

inline bool close(double a, double b, double absolute, double relative) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  if (std::isinf(a) || std::isinf(b)) return a == b;
  return std::abs(a - b) <= absolute + relative * std::abs(b);
}

inline Outcome compare(std::string_view name, const Loaded& got, const Loaded& want) {
  const fovea::OnnxType type = want.tensor.type;
  const auto differs = [&](std::size_t at, const std::string& numbers) {
    return failed("output " + std::string(name) + " differs at element " + std::to_string(at) + ": " + numbers);
  };
  if (!fovea::onnx::is_plain(type)) {
    const auto at = std::mismatch(got.data.begin(), got.data.end(), want.data.begin()).first;
    if (at == got.data.end()) return {};
    return differs(static_cast<std::size_t>(at - got.data.begin()) / static_cast<std::size_t>(fovea::onnx::bytes_of(type)),
                   "bytes");
  }
  const bool half = type == fovea::OnnxType::f16 || type == fovea::OnnxType::bf16;
  const fovea::Format format = fovea::onnx::format_of(type);
  const auto size = static_cast<std::size_t>(fovea::onnx::bytes_of(type));
  Outcome outcome;
  for (std::size_t n = 0; n < want.data.size() / size; ++n) {
    const double a = fovea::onnx::number_at(format, got.data.data(), static_cast<fovea::index_t>(n));
    const double b = fovea::onnx::number_at(format, want.data.data(), static_cast<fovea::index_t>(n));
    if (!close(a, b, half ? 1e-3 : 1e-7, half ? 4e-3 : 1e-3)) {
      char numbers[64];
      std::snprintf(numbers, sizeof numbers, "%.9g, expected %.9g", a, b);
      return differs(n, numbers);
    }
    if (std::isfinite(a) && std::isfinite(b)) outcome.worst = std::max(outcome.worst, std::abs(a - b));
  }
  return outcome;
}

// The attributes of a node by name; what nobody asked for is a feature that is not here.
class Attributes {
 public:
  explicit Attributes(const Node& node) : node_(node), asked_(node.attributes.size()) {}

  const Attribute* find(std::string_view name) {
    for (std::size_t n = 0; n < asked_.size(); ++n) {
      if (node_.attributes[n].name != name) continue;
      asked_[n] = true;
      return &node_.attributes[n];
    }
    return nullptr;
  }
  void integer(std::string_view name, std::int64_t& value) {
    if (const Attribute* const found = find(name)) {
      value = found->integer;
      wrong_kind(*found, found->has_integer);
    }
  }
  std::optional<float> real(std::string_view name) {
    const Attribute* const found = find(name);
    if (found == nullptr) return {};
    wrong_kind(*found, found->has_real);
    return found->real;
  }
  std::string_view text(std::string_view name, std::string_view otherwise) {
    const Attribute* const found = find(name);
    if (found == nullptr) return otherwise;
    wrong_kind(*found, found->has_text);
    return found->text;
  }
  Outcome check() const {
    if (!problem_.empty()) return failed(problem_);
    for (std::size_t n = 0; n < asked_.size(); ++n) {
      if (!asked_[n])
        return unsupported("attribute " + std::string(node_.attributes[n].name) + " of " + std::string(node_.op));
    }
    return {};
  }

 private:
  void wrong_kind(const Attribute& attribute, bool right) {
    if (!right) problem_ = "attribute " + std::string(attribute.name) + " has a value of another type";
  }

  const Node& node_;
  std::vector<bool> asked_;
  std::string problem_;
};

struct Run {
  const Model& model;
  const Graph& graph;
  const Node& node;
  std::vector<Loaded> inputs, expected, got;   // inputs and outputs of the graph, in its order

  fovea::OnnxTensor input(std::size_t at) const {
    if (at >= node.inputs.size() || node.inputs[at].empty()) return {};
    const auto name = std::find(graph.inputs.begin(), graph.inputs.end(), node.inputs[at]);
    if (name == graph.inputs.end()) return {};
    return inputs[static_cast<std::size_t>(name - graph.inputs.begin())].input();
  }
  fovea::OnnxOutput output(std::size_t at) {
    if (at >= node.outputs.size() || node.outputs[at].empty()) return {};
    const auto name = std::find(graph.outputs.begin(), graph.outputs.end(), node.outputs[at]);
    if (name == graph.outputs.end()) return {};
    Loaded& loaded = got[static_cast<std::size_t>(name - graph.outputs.begin())];
    return {loaded.data.data(), loaded.tensor.type, loaded.tensor.shape()};
  }
};

inline Outcome outcome_of(const fovea::Status& status) {
  if (status.ok()) return {};
  return status.code() == fovea::Code::unsupported ? unsupported(status.message()) : failed(status.message());
}

inline Outcome run_attention(Run& run) {
  Attributes attributes(run.node);
  fovea::OnnxAttention a;
  a.scale = attributes.real("scale");
  a.softcap = attributes.real("softcap").value_or(0.f);
  attributes.integer("is_causal", a.is_causal);
  attributes.integer("q_num_heads", a.q_num_heads);
  attributes.integer("kv_num_heads", a.kv_num_heads);
  attributes.integer("qk_matmul_output_mode", a.qk_matmul_output_mode);
  attributes.integer("softmax_precision", a.softmax_precision);
  attributes.integer("left_window_size", a.left_window_size);
  attributes.integer("right_window_size", a.right_window_size);
  if (Outcome outcome = attributes.check(); outcome.verdict != Verdict::passed) return outcome;
  a.opset = run.model.opset("");
  return outcome_of(fovea::onnx_attention(a,
                                          {.q = run.input(0),
                                           .k = run.input(1),
                                           .v = run.input(2),
                                           .attn_mask = run.input(3),
                                           .past_key = run.input(4),
                                           .past_value = run.input(5),
                                           .nonpad_kv_seqlen = run.input(6)},
                                          {.y = run.output(0),
                                           .present_key = run.output(1),
                                           .present_value = run.output(2),
                                           .qk_matmul_output = run.output(3)}));
}

inline Outcome run_rotary_embedding(Run& run) {
  Attributes attributes(run.node);
  fovea::OnnxRotaryEmbedding a;
  attributes.integer("interleaved", a.interleaved);
  attributes.integer("num_heads", a.num_heads);
  attributes.integer("rotary_embedding_dim", a.rotary_embedding_dim);
  if (Outcome outcome = attributes.check(); outcome.verdict != Verdict::passed) return outcome;
  return outcome_of(fovea::onnx_rotary_embedding(
      a, {.x = run.input(0), .cos_cache = run.input(1), .sin_cache = run.input(2), .position_ids = run.input(3)},
      run.output(0)));
}

inline Outcome run_tensor_scatter(Run& run) {
  Attributes attributes(run.node);
  fovea::OnnxTensorScatter a;
  attributes.integer("axis", a.axis);
  const std::string_view mode = attributes.text("mode", "linear");
  if (Outcome outcome = attributes.check(); outcome.verdict != Verdict::passed) return outcome;
  if (mode != "linear" && mode != "circular") return unsupported("mode " + std::string(mode) + " of TensorScatter");
  if (mode == "circular") a.mode = fovea::OnnxScatterMode::circular;
  return outcome_of(fovea::onnx_tensor_scatter(
      a, {.past_cache = run.input(0), .update = run.input(1), .write_indices = run.input(2)}, run.output(0)));
}

inline Outcome run_flex_attention(Run& run) {
  Attributes attributes(run.node);
  fovea::OnnxFlexAttention a;
  a.scale = attributes.real("scale");
  attributes.integer("softmax_precision", a.softmax_precision);
  ModifierGraph score_mod, prob_mod;
  if (const Attribute* const found = attributes.find("score_mod")) {
    if (!found->has_graph) return failed("attribute score_mod has no graph");
    if (!score_mod.read(found->graph)) return unsupported("score_mod: " + score_mod.reason());
    a.score_mod = score_mod.steps();
  }
  if (const Attribute* const found = attributes.find("prob_mod")) {
    if (!found->has_graph) return failed("attribute prob_mod has no graph");
    if (!prob_mod.read(found->graph)) return unsupported("prob_mod: " + prob_mod.reason());
    for (const fovea::OnnxModifier& step : prob_mod.steps()) {
      if (step.kind != fovea::OnnxModifier::Kind::multiply)
        return unsupported("prob_mod: a subgraph that does more than scale");
      a.prob_scale *= step.value;
    }
  }
  if (Outcome outcome = attributes.check(); outcome.verdict != Verdict::passed) return outcome;
  return outcome_of(fovea::onnx_flex_attention(a, {.q = run.input(0), .k = run.input(1), .v = run.input(2)}, run.output(0)));
}

inline Outcome run_linear_attention(Run& run) {
  using Rule = fovea::OnnxUpdateRule;
  constexpr std::pair<std::string_view, Rule> kRules[] = {
      {"linear", Rule::linear}, {"gated", Rule::gated}, {"delta", Rule::delta}, {"gated_delta", Rule::gated_delta}};
  Attributes attributes(run.node);
  fovea::OnnxLinearAttention a;
  a.scale = attributes.real("scale").value_or(0.f);
  attributes.integer("q_num_heads", a.q_num_heads);
  attributes.integer("kv_num_heads", a.kv_num_heads);
  attributes.integer("chunk_size", a.chunk_size);
  const std::string_view rule = attributes.text("update_rule", "gated_delta");
  if (Outcome outcome = attributes.check(); outcome.verdict != Verdict::passed) return outcome;
  const auto* const named =
      std::find_if(std::begin(kRules), std::end(kRules), [&](const auto& r) { return r.first == rule; });
  if (named == std::end(kRules)) return unsupported("update_rule " + std::string(rule) + " of LinearAttention");
  a.update_rule = named->second;
  return outcome_of(fovea::onnx_linear_attention(a,
                                                 {.query = run.input(0),
                                                  .key = run.input(1),
                                                  .value = run.input(2),
                                                  .past_state = run.input(3),
                                                  .decay = run.input(4),
                                                  .beta = run.input(5)},
                                                 {.output = run.output(0), .present_state = run.output(1)}));
}

inline Outcome run_causal_conv_with_state(Run& run) {
  Attributes attributes(run.node);
  const std::string_view activation = attributes.text("activation", "none");
  if (Outcome outcome = attributes.check(); outcome.verdict != Verdict::passed) return outcome;
  fovea::OnnxCausalConvWithState a;
  if (activation == "silu" || activation == "swish") {
    a.activation = fovea::OnnxConvActivation::silu;
  } else if (activation != "none") {
    return unsupported("activation " + std::string(activation) + " of CausalConvWithState");
  }
  return outcome_of(fovea::onnx_causal_conv_with_state(
      a, {.input = run.input(0), .weight = run.input(1), .bias = run.input(2), .past_state = run.input(3)},
      {.output = run.output(0), .present_state = run.output(1)}));
}

struct Operator {
  std::string_view domain, name;
  std::size_t inputs;   // that it knows
  Outcome (*run)(Run& run);
};
inline constexpr Operator kOperators[] = {{"", "Attention", 7, &run_attention},
                                          {"", "RotaryEmbedding", 4, &run_rotary_embedding},
                                          {"", "TensorScatter", 3, &run_tensor_scatter},
                                          {"", "LinearAttention", 6, &run_linear_attention},
                                          {"", "CausalConvWithState", 4, &run_causal_conv_with_state},
                                          {"ai.onnx.preview", "FlexAttention", 3, &run_flex_attention}};

inline const Operator* find_operator(const Node& node) {
  for (const Operator& known : kOperators) {
    const bool same = node.domain == known.domain || (known.domain.empty() && node.domain == "ai.onnx");
    if (same && node.op == known.name) return &known;
  }
  return nullptr;
}

}   // namespace detail

// The node of a model that can be run, or why it cannot.
struct Ready {
  Model model;
  Graph graph;
  const detail::Operator* known = nullptr;
};

inline Outcome prepare(Bytes file, Ready& ready) {
  if (Problem problem = read_model(file, ready.model); !problem.empty()) return failed("model.onnx: " + problem);
  if (Problem problem = read_graph(ready.model.graph, ready.graph); !problem.empty())
    return failed("model.onnx: " + problem);
  if (ready.graph.node_count != 1) return unsupported("a graph of " + std::to_string(ready.graph.node_count) + " nodes");
  const Node& node = ready.graph.nodes[0];
  ready.known = detail::find_operator(node);
  if (ready.known == nullptr) {
    const std::string domain(node.domain);
    return unsupported("operator " + (domain.empty() ? "" : domain + ".") + std::string(node.op));
  }
  for (std::size_t at = ready.known->inputs; at < node.inputs.size(); ++at) {   // what newer versions of it add
    if (!node.inputs[at].empty()) return unsupported("input " + std::string(node.inputs[at]) + " of " + std::string(node.op));
  }
  if (ready.model.opset(ready.known->domain) <= 0) return failed("model.onnx: no opset import for its operator's domain");
  for (const std::string_view name : node.inputs) {
    const auto& names = ready.graph.inputs;
    if (!name.empty() && std::find(names.begin(), names.end(), name) == names.end())
      return unsupported("input " + std::string(name) + " that is no input of the graph");
  }
  return {};
}

// One data set: the files input_<k>.pb and output_<k>.pb, in the order of the graph's inputs and outputs.
inline Outcome run_data(const Ready& ready, const std::vector<Bytes>& inputs, const std::vector<Bytes>& outputs) {
  detail::Run run{ready.model, ready.graph, ready.graph.nodes[0], {}, {}, {}};
  if (inputs.size() != ready.graph.inputs.size() || outputs.size() != ready.graph.outputs.size())
    return failed(std::to_string(inputs.size()) + " input and " + std::to_string(outputs.size()) +
                  " output files, the graph has " + std::to_string(ready.graph.inputs.size()) + " and " +
                  std::to_string(ready.graph.outputs.size()));
  run.inputs.resize(inputs.size());
  run.expected.resize(outputs.size());
  for (std::size_t n = 0; n < inputs.size(); ++n) {
    if (Problem problem = detail::load(inputs[n], run.inputs[n]); !problem.empty())
      return failed("input_" + std::to_string(n) + ".pb: " + problem);
  }
  for (std::size_t n = 0; n < outputs.size(); ++n) {
    if (Problem problem = detail::load(outputs[n], run.expected[n]); !problem.empty())
      return failed("output_" + std::to_string(n) + ".pb: " + problem);
  }
  run.got = run.expected;
  for (detail::Loaded& output : run.got) std::fill(output.data.begin(), output.data.end(), std::byte{0xff});
  Outcome outcome = ready.known->run(run);
  for (std::size_t n = 0; n < outputs.size() && outcome.verdict == Verdict::passed; ++n) {
    const double worst = outcome.worst;
    outcome = detail::compare(ready.graph.outputs[n], run.got[n], run.expected[n]);
    outcome.worst = std::max(outcome.worst, worst);
  }
  return outcome;
}

// A file as a whole; only regular files, so that the memory taken is what the file system says, up to a limit: a sparse file may
// claim any size.
inline constexpr std::uintmax_t kMaxBytes = std::uintmax_t{1} << 30;
inline Problem read_file(const std::filesystem::path& path, std::vector<std::byte>& bytes, std::uintmax_t limit = kMaxBytes) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) return path.filename().string() + " is missing or no file";
  const std::uintmax_t size = std::filesystem::file_size(path, error);
  if (error) return path.filename().string() + ": " + error.message();
  if (size > limit) return path.filename().string() + " is too large: files read together have 1 GiB at most";
  bytes.resize(static_cast<std::size_t>(size));
  std::ifstream file(path, std::ios::binary);
  file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(size));
  return file ? Problem{} : path.filename().string() + " cannot be read";
}

inline bool is_case(const std::filesystem::path& directory) {
  std::error_code error;
  return std::filesystem::exists(directory / "model.onnx", error);
}

// Folders inside, sorted by name, that begin with `prefix`.
inline std::vector<std::filesystem::path> folders(const std::filesystem::path& directory, std::string_view prefix) {
  std::vector<std::filesystem::path> found;
  std::error_code error;
  for (std::filesystem::directory_iterator entry(directory, error), end; !error && entry != end; entry.increment(error)) {
    if (entry->is_directory(error) && entry->path().filename().string().starts_with(prefix)) found.push_back(entry->path());
  }
  std::sort(found.begin(), found.end());
  return found;
}

inline Outcome run_data_set(const Ready& ready, const std::filesystem::path& directory) {
  std::vector<std::vector<std::byte>> files;
  std::uintmax_t left = kMaxBytes;
  const auto read_all = [&](const char* prefix, std::size_t count) -> Problem {
    for (std::size_t n = 0; n < count; ++n) {
      files.emplace_back();
      if (Problem problem = read_file(directory / (prefix + std::to_string(n) + ".pb"), files.back(), left); !problem.empty())
        return problem;
      left -= files.back().size();
    }
    return {};
  };
  const std::size_t inputs = ready.graph.inputs.size();
  if (Problem problem = read_all("input_", inputs); !problem.empty()) return failed(problem);
  if (Problem problem = read_all("output_", ready.graph.outputs.size()); !problem.empty()) return failed(problem);
  const auto middle = files.begin() + static_cast<std::ptrdiff_t>(inputs);
  return run_data(ready, {files.begin(), middle}, {middle, files.end()});
}

// A case passes when all its data sets do.
inline Outcome run_case(const std::filesystem::path& directory) {
  std::vector<std::byte> file;
  if (Problem problem = read_file(directory / "model.onnx", file); !problem.empty()) return failed(problem);
  Ready ready;
  if (Outcome outcome = prepare(file, ready); outcome.verdict != Verdict::passed) return outcome;
  const auto sets = folders(directory, "test_data_set_");
  if (sets.empty()) return failed("no test_data_set_<n>");
  Outcome all;
  for (const auto& set : sets) {
    Outcome outcome = run_data_set(ready, set);
    if (outcome.verdict != Verdict::passed) return outcome;
    all.worst = std::max(all.worst, outcome.worst);
  }
  return all;
}

// What fovea_onnx does: one line per case of a folder, or of the case that the folder is, and their counts in the last. The exit
// status: 0 if none failed, 1 if some did, 2 where there is no case.
inline int run_folder(const std::filesystem::path& directory, std::FILE* lines, std::FILE* problems) {
  std::filesystem::path root = std::filesystem::absolute(directory).lexically_normal();
  if (!root.has_filename()) root = root.parent_path();   // "cases/"
  std::vector<std::filesystem::path> cases = folders(root, "");
  if (is_case(root)) cases = {root};
  if (cases.empty()) {
    std::fprintf(problems, "fovea_onnx: %s is no folder of cases\n", directory.string().c_str());
    return 2;
  }
  constexpr const char* kWords[] = {"passed", "failed", "unsupported"};
  int counts[] = {0, 0, 0};
  for (const std::filesystem::path& one : cases) {
    const Outcome outcome = run_case(one);
    const auto verdict = static_cast<std::size_t>(outcome.verdict);
    ++counts[verdict];
    const std::string name = one.filename().string();
    if (outcome.verdict == Verdict::passed) {
      std::fprintf(lines, "%-12s %s  (largest error %.1e)\n", kWords[verdict], name.c_str(), outcome.worst);
    } else {
      std::fprintf(lines, "%-12s %s: %s\n", kWords[verdict], name.c_str(), outcome.reason.c_str());
    }
  }
  std::fprintf(lines, "%d passed, %d failed, %d unsupported\n", counts[0], counts[1], counts[2]);
  return counts[1] == 0 ? 0 : 1;
}

}   // namespace onnx_tool
