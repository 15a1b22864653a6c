// SPDX-License-Identifier: Apache-2.0
// Runs a model: tokens in, logits out, a KV cache between calls. Attention is a function it is given, so that fovea and the
// baselines run in the same engine; everything else is Eigen, dealt to the executor's lanes in blocks of outputs.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <fovea/attention.hpp>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "model.hpp"
#include "tokenizer.hpp"

namespace generate {

// `layer` counts up from 0 within one step; all layers of a step have the same lengths.
using Attention = std::function<fovea::Status(Index layer, fovea::Tensor<const float> q, fovea::Tensor<const float> k,
                                              fovea::Tensor<const float> v, fovea::Tensor<float> out,
                                              const fovea::AttentionOptions& options)>;

// One plan serves every layer of a step.
inline Attention fovea_attention() {
  return [plan = std::make_shared<fovea::Plan>()](Index layer, fovea::Tensor<const float> q, fovea::Tensor<const float> k,
                                                  fovea::Tensor<const float> v, fovea::Tensor<float> out,
                                                  const fovea::AttentionOptions& options) {
    if (layer == 0) {
      const fovea::AttentionShape shape{.batch = q.extent[0],
                                        .q_heads = q.extent[1],
                                        .kv_heads = k.extent[1],
                                        .len_q = q.extent[2],
                                        .len_k = k.extent[2],
                                        .dim_qk = q.extent[3],
                                        .dim_v = v.extent[3]};
      const fovea::Status planned = fovea::make_plan(*plan, shape, options);
      if (!planned.ok()) return planned;
    }
    return fovea::attention(*plan, q, k, v, out, options);
  };
}

class Engine {
 public:
  Engine(const Model& model, Attention attention, fovea::Executor executor = {})
      : model_(model), c_(model.config), attention_(std::move(attention)), executor_(executor) {
    const auto cache_size = static_cast<std::size_t>(c_.layers * c_.kv_heads * c_.context * c_.head_dim);
    k_cache_.resize(cache_size);
    v_cache_.resize(cache_size);
    // In double: near position 500 neighbouring floats are 3e-5 apart, which an angle must not be off by.
    const Index half = c_.head_dim / 2;
    cos_.resize(c_.context, half);
    sin_.resize(c_.context, half);
    for (Index pos = 0; pos < c_.context; ++pos) {
      for (Index i = 0; i < half; ++i) {
        const double angle =
            static_cast<double>(pos) * std::pow(c_.rope_theta, -static_cast<double>(i) / static_cast<double>(half));
        cos_(pos, i) = static_cast<float>(std::cos(angle));
        sin_(pos, i) = static_cast<float>(std::sin(angle));
      }
    }
  }

  Index position() const { return position_; }
  Index room() const { return c_.context - position_; }
  // Forgets everything from `position` on.
  void rewind(Index position) { position_ = std::min(position, position_); }
  // Time spent in the attention function since the engine was made.
  double attention_seconds() const { return attention_seconds_; }

  // Appends tokens and returns the logits after the last one, valid until the next call. A long text is taken in chunks: the
  // scratch memory stays that of one chunk.
  Result<std::span<const float>> forward(std::span<const Token> tokens) {
    using Logits = Result<std::span<const float>>;
    if (tokens.empty()) return Logits::failure("there is no token to run");
    if (static_cast<Index>(tokens.size()) > room()) {
      return Logits::failure("%zu tokens do not fit: %td of the %td positions are taken", tokens.size(), position_,
                             c_.context);
    }
    for (const Token token : tokens) {
      if (token < 0 || token >= c_.vocab)
        return Logits::failure("token %d is not in the vocabulary of %td", token, c_.vocab);
    }
    for (std::size_t begin = 0; begin < tokens.size(); begin += kChunk) {
      const fovea::Status status = run_chunk(tokens.subspan(begin, std::min(kChunk, tokens.size() - begin)));
      if (!status.ok()) return Logits::failure(std::string("attention was refused: ") + status.message());
    }
    const Matrix last = normalised(x_.bottomRows(1), model_.norm);
    linear(last, model_.output_weights(), logits_);
    return std::span<const float>(logits_.data(), static_cast<std::size_t>(logits_.size()));
  }

 private:
  static constexpr std::size_t kChunk = 256;

  fovea::Status run_chunk(std::span<const Token> tokens) {
    const Index len = static_cast<Index>(tokens.size());
    x_.resize(len, c_.hidden);
    for (Index i = 0; i < len; ++i) x_.row(i) = model_.embedding.row(tokens[static_cast<std::size_t>(i)]);
    for (Index n = 0; n < c_.layers; ++n) {
      const Layer& layer = model_.layers[static_cast<std::size_t>(n)];
      linear(normalised(x_, layer.attention_norm), layer.qkv, qkv_);
      const fovea::Status status = attend(n, len);
      if (!status.ok()) return status;
      linear(heads_, layer.attention_out, y_);
      x_ += y_;

      linear(normalised(x_, layer.mlp_norm), layer.gate_up, gate_up_);
      const auto gate = gate_up_.leftCols(c_.intermediate).array(), up = gate_up_.rightCols(c_.intermediate).array();
      hidden_ = gate / (1.f + (-gate).exp()) * up;
      linear(hidden_, layer.down, y_);
      x_ += y_;
    }
    position_ += len;
    return {};
  }

  // qkv_ [len, q heads | k heads | v heads] -> heads_ [len, q heads]; appends to the cache of the layer.
  fovea::Status attend(Index layer, Index len) {
    const auto fresh = fovea::packed_qkv(qkv_.data(), 1, len, c_.heads, c_.kv_heads, c_.head_dim);
    const auto k = cached(k_cache_, layer, position_ + len), v = cached(v_cache_, layer, position_ + len);
    for (Index i = 0; i < len; ++i) {
      for (Index head = 0; head < c_.heads; ++head) rotate(&fresh.q(0, head, i, 0), position_ + i);
      for (Index head = 0; head < c_.kv_heads; ++head) {
        rotate(&fresh.k(0, head, i, 0), position_ + i);
        std::copy_n(&fresh.k(0, head, i, 0), c_.head_dim, &k(0, head, position_ + i, 0));
        std::copy_n(&fresh.v(0, head, i, 0), c_.head_dim, &v(0, head, position_ + i, 0));
      }
    }
    heads_.resize(len, c_.heads * c_.head_dim);
    const auto out = fovea::bshd(heads_.data(), 1, len, c_.heads, c_.head_dim);
    const auto start = std::chrono::steady_clock::now();
    const fovea::Status status =
        attention_(layer, fresh.q, k, v, out, {.causal = fovea::Causal::bottom_right, .executor = executor_});
    attention_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return status;
  }

  // Keys lie one after the other per head, with room for the whole context: [kv_head, context, head_dim] per layer.
  fovea::Tensor<float> cached(std::vector<float>& cache, Index layer, Index used) const {
    auto view = fovea::bhsd(cache.data(), c_.layers, c_.kv_heads, c_.context, c_.head_dim);
    view.data += layer * view.stride[0];
    view.extent = {1, c_.kv_heads, used, c_.head_dim};
    return view;
  }

  // Element i is paired with element i + head_dim / 2.
  void rotate(float* head, Index position) const {
    const Index half = c_.head_dim / 2;
    for (Index i = 0; i < half; ++i) {
      const float a = head[i], b = head[i + half];
      head[i] = a * cos_(position, i) - b * sin_(position, i);
      head[i + half] = b * cos_(position, i) + a * sin_(position, i);
    }
  }

  Matrix normalised(const Eigen::Ref<const Matrix>& x, const RowVector& weight) const {
    const Eigen::ArrayXf scale = (x.array().square().rowwise().mean() + c_.norm_eps).rsqrt();
    return (x.array().colwise() * scale).rowwise() * weight.array();
  }

  // y = x * weight^T. The blocks do not depend on the number of lanes, so neither does the result. One token is bound by
  // reading the weights and takes small blocks; for more tokens they are larger, because Eigen packs x again for every
  // block.
  void linear(const Matrix& x, const Matrix& weight, Matrix& y) const {
    y.resize(x.rows(), weight.rows());
    const Index block = x.rows() == 1 ? 64 : 128, blocks = (weight.rows() + block - 1) / block;
    std::atomic<Index> next{0};
    auto lane = [&](int) {
      for (Index n = next.fetch_add(1, std::memory_order_relaxed); n < blocks;
           n = next.fetch_add(1, std::memory_order_relaxed)) {
        const Index first = n * block, count = std::min(block, weight.rows() - first);
        if (x.rows() == 1) {
          y.row(0).segment(first, count).transpose().noalias() = weight.middleRows(first, count) * x.row(0).transpose();
        } else {
          y.middleCols(first, count).noalias() = x * weight.middleRows(first, count).transpose();
        }
      }
    };
    executor_.run(static_cast<int>(std::min<Index>(executor_.lanes(), blocks)), lane);
  }

  const Model& model_;
  const Config& c_;
  Attention attention_;
  fovea::Executor executor_;
  Index position_ = 0;
  double attention_seconds_ = 0;
  std::vector<float> k_cache_, v_cache_;   // [layer, kv_head, context, head_dim]
  Matrix cos_, sin_;                       // [context, head_dim / 2]
  Matrix x_, y_, qkv_, heads_, gate_up_, hidden_, logits_;
};

}   // namespace generate
