// SPDX-License-Identifier: Apache-2.0
// A Llama: configuration and weights, read from a directory with config.json and model.safetensors (Hugging Face's names).
#pragma once
#ifndef EIGEN_DONT_PARALLELIZE
#define EIGEN_DONT_PARALLELIZE   // the engine deals blocks of outputs to its own lanes
#endif
#include <Eigen/Core>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "safetensors.hpp"

namespace generate {

using Index = Eigen::Index;
using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using RowVector = Eigen::Matrix<float, 1, Eigen::Dynamic>;

struct Config {
  Index hidden = 0, layers = 0, heads = 0, kv_heads = 0, head_dim = 0, intermediate = 0, vocab = 0, context = 0;
  float norm_eps = 1e-5f;
  double rope_theta = 10000.;
  bool tied = false;   // the output projection is the embedding
};

struct Layer {
  RowVector attention_norm, mlp_norm;   // [hidden]
  Matrix qkv;                           // [(heads + 2 kv_heads) * head_dim, hidden]
  Matrix attention_out;                 // [hidden, heads * head_dim]
  Matrix gate_up;                       // [2 * intermediate, hidden]
  Matrix down;                          // [hidden, intermediate]
};

struct Model {
  Config config;
  Matrix embedding;   // [vocab, hidden]
  std::vector<Layer> layers;
  RowVector norm;   // [hidden]
  Matrix output;    // [vocab, hidden], empty if tied

  const Matrix& output_weights() const { return config.tied ? embedding : output; }

  Index parameters() const {
    Index count = embedding.size() + norm.size() + output.size();
    for (const Layer& layer : layers) {
      count += layer.attention_norm.size() + layer.mlp_norm.size() + layer.qkv.size() + layer.attention_out.size() +
               layer.gate_up.size() + layer.down.size();
    }
    return count;
  }
};

inline Result<Config> parse_config(std::span<const std::byte> bytes) {
  using Parsed = Result<Config>;
  auto json = parse_json(bytes, "the configuration");
  if (!json) return Parsed::failure(json.error);
  Config config;
  // 2^20 of anything is beyond every model this engine could run, and a product of two or three such numbers cannot
  // overflow.
  constexpr std::uint64_t most = std::uint64_t{1} << 20;
  const std::pair<const char*, Index*> numbers[] = {
      {"hidden_size", &config.hidden},        {"num_hidden_layers", &config.layers},
      {"num_attention_heads", &config.heads}, {"num_key_value_heads", &config.kv_heads},
      {"head_dim", &config.head_dim},         {"intermediate_size", &config.intermediate},
      {"vocab_size", &config.vocab},          {"max_position_embeddings", &config.context}};
  for (const auto& [name, place] : numbers) {
    std::uint64_t number = 0;
    if (!read_unsigned(json->value(name, Json()), most, number) || number == 0) {
      return Parsed::failure("the configuration needs %s, a number from 1 to 2^20", name);
    }
    *place = static_cast<Index>(number);
  }
  if (config.heads % config.kv_heads != 0) {
    return Parsed::failure("%td query heads cannot share %td kv heads evenly", config.heads, config.kv_heads);
  }
  if (config.head_dim % 2 != 0)
    return Parsed::failure("rotary positions need an even head_dim, this is %td", config.head_dim);
  const double cache =
      8. * static_cast<double>(config.layers * config.kv_heads) * static_cast<double>(config.head_dim * config.context);
  if (cache > 1e11) return Parsed::failure("the KV cache of the whole context would take %.0f GB", cache * 1e-9);
  if (config.layers > 1024) return Parsed::failure("%td layers are too many", config.layers);

  const Json eps = json->value("rms_norm_eps", Json()), theta = json->value("rope_theta", Json());
  if (!eps.is_number() || !theta.is_number() || !(eps.get<double>() > 0) || !(theta.get<double>() > 1)) {
    return Parsed::failure("the configuration needs rms_norm_eps above 0 and rope_theta above 1");
  }
  config.norm_eps = eps.get<float>();
  config.rope_theta = theta.get<double>();
  const Json tied = json->value("tie_word_embeddings", Json(false));
  config.tied = tied.is_boolean() && tied.get<bool>();
  for (const char* name : {"attention_bias", "mlp_bias"}) {
    if (json->value(name, Json(false)) == Json(true)) return Parsed::failure("%s is not supported", name);
  }
  if (!json->value("rope_scaling", Json()).is_null()) return Parsed::failure("rope_scaling is not supported");
  return config;
}

namespace detail {

// Collects the first error; after it, every further read does nothing.
class WeightReader {
 public:
  explicit WeightReader(const Safetensors& file) : file_(file) {}

  // The named tensors [rows_i, cols] one below the other.
  Matrix stacked(const std::vector<std::pair<std::string, Index>>& parts, Index cols) {
    Index rows = 0, at = 0;
    std::vector<std::vector<float>> values;
    for (const auto& [name, part_rows] : parts) {
      values.push_back(read(name, {static_cast<std::uint64_t>(part_rows), static_cast<std::uint64_t>(cols)}));
      rows += part_rows;
    }
    if (!error.empty()) return {};
    Matrix matrix(rows, cols);
    for (const std::vector<float>& part : values) {
      const Index part_rows = static_cast<Index>(part.size()) / cols;
      matrix.middleRows(at, part_rows) = Eigen::Map<const Matrix>(part.data(), part_rows, cols);
      at += part_rows;
    }
    return matrix;
  }

  Matrix matrix(const std::string& name, Index rows, Index cols) { return stacked({{name, rows}}, cols); }

  RowVector vector(const std::string& name, Index size) {
    const std::vector<float> values = read(name, {static_cast<std::uint64_t>(size)});
    return error.empty() ? RowVector(Eigen::Map<const RowVector>(values.data(), size)) : RowVector();
  }

  std::string error;

 private:
  std::vector<float> read(const std::string& name, const std::vector<std::uint64_t>& shape) {
    if (!error.empty()) return {};
    auto values = read_floats(file_, name, shape);
    if (!values) error = values.error;
    return values ? std::move(*values) : std::vector<float>{};
  }

  const Safetensors& file_;
};

}   // namespace detail

inline Result<Model> build_model(const Config& config, const Safetensors& file) {
  detail::WeightReader reader(file);
  const Index q_size = config.heads * config.head_dim, kv_size = config.kv_heads * config.head_dim;
  Model model;
  model.config = config;
  model.embedding = reader.matrix("model.embed_tokens.weight", config.vocab, config.hidden);
  for (Index n = 0; n < config.layers && reader.error.empty(); ++n) {
    const std::string prefix = "model.layers." + std::to_string(n) + ".";
    Layer layer;
    layer.attention_norm = reader.vector(prefix + "input_layernorm.weight", config.hidden);
    layer.qkv = reader.stacked({{prefix + "self_attn.q_proj.weight", q_size},
                                {prefix + "self_attn.k_proj.weight", kv_size},
                                {prefix + "self_attn.v_proj.weight", kv_size}},
                               config.hidden);
    layer.attention_out = reader.matrix(prefix + "self_attn.o_proj.weight", config.hidden, q_size);
    layer.mlp_norm = reader.vector(prefix + "post_attention_layernorm.weight", config.hidden);
    layer.gate_up = reader.stacked(
        {{prefix + "mlp.gate_proj.weight", config.intermediate}, {prefix + "mlp.up_proj.weight", config.intermediate}},
        config.hidden);
    layer.down = reader.matrix(prefix + "mlp.down_proj.weight", config.hidden, config.intermediate);
    model.layers.push_back(std::move(layer));
  }
  model.norm = reader.vector("model.norm.weight", config.hidden);
  if (!config.tied) model.output = reader.matrix("lm_head.weight", config.vocab, config.hidden);
  if (!reader.error.empty()) return Result<Model>::failure(reader.error);
  return model;
}

inline Result<Model> load_model(const std::filesystem::path& directory) {
  auto config_bytes = read_file(directory / "config.json");
  if (!config_bytes) return Result<Model>::failure(config_bytes.error);
  auto config = parse_config(*config_bytes);
  if (!config) return Result<Model>::failure("%s: %s", (directory / "config.json").c_str(), config.error.c_str());
  auto file = load_safetensors(directory / "model.safetensors");
  if (!file) return Result<Model>::failure(file.error);
  auto model = build_model(*config, *file);
  if (!model) return Result<Model>::failure("%s: %s", (directory / "model.safetensors").c_str(), model.error.c_str());
  return model;
}

}   // namespace generate
