// SPDX-License-Identifier: Apache-2.0
// Runs a model: tokens in, logits out, a KV cache between calls. Attention is a function it is given, so that fovea and the
// baselines run in the same engine; the rest is Eigen, dealt to the executor's lanes in blocks of outputs.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <fovea/attention.hpp>
#include <functional>
#include <limits>
#include <memory>
#include <span>
#include <vector>

#include "kv_cache.hpp"
#include "tokenizer.hpp"

namespace generate {

// `layer` counts up from 0 within one step; all layers of a step have the same lengths.
using Attention = std::function<fovea::Status(Index layer, fovea::Tensor<const float> q, const fovea::Kv& kv,
                                              fovea::Tensor<float> out, const fovea::AttentionOptions& options)>;

// One plan serves every layer of a step.
inline Attention fovea_attention() {
  return [plan = std::make_shared<fovea::Plan>()](Index layer, fovea::Tensor<const float> q, const fovea::Kv& kv,
                                                  fovea::Tensor<float> out, const fovea::AttentionOptions& options) {
    if (layer == 0) {
      const fovea::AttentionShape shape{.batch = q.extent[0],
                                        .q_heads = q.extent[1],
                                        .kv_heads = kv.kv_heads,
                                        .len_q = q.extent[2],
                                        .len_k = *std::max_element(options.len_k.begin(), options.len_k.end()),
                                        .dim_qk = kv.dim_qk,
                                        .dim_v = kv.dim_v};
      const fovea::Status planned = fovea::make_plan(*plan, shape, options);
      if (!planned.ok()) return planned;
    }
    return fovea::attention<KvFormats>(*plan, q, kv, out, options);
  };
}

class Engine {
 public:
  // A cache the options do not allow is told by the first step.
  Engine(const Model& model, Attention attention, fovea::Executor executor = {}, const KvOptions& kv = {})
      : model_(model),
        c_(model.config),
        attention_(std::move(attention)),
        executor_(executor),
        cache_(model.config),
        rope_(model.config.head_dim, model.config.rope_theta),
        created_(cache_.create(kv)) {}

  Index position() const { return position_; }
  Index room() const { return cache_.endless() ? std::numeric_limits<Index>::max() : c_.context - position_; }
  const KvCache& cache() const { return cache_; }
  // Forgets everything from `position` on.
  fovea::Status rewind(Index position) {
    const fovea::Status status = cache_.rewind(position);
    if (status.ok()) position_ = std::min(position, position_);
    return status;
  }
  // Time spent in the attention function since the engine was made.
  double attention_seconds() const { return attention_seconds_; }

  // Appends tokens and returns the logits after the last one, valid until the next call. A long text is taken in chunks: the
  // scratch memory stays that of one chunk.
  Result<std::span<const float>> forward(std::span<const Token> tokens) {
    using Logits = Result<std::span<const float>>;
    if (tokens.empty()) return Logits::failure("there is no token to run");
    if (const fovea::Status status = run(tokens, [](std::size_t) {}); !status.ok()) return Logits::failure(status.message());
    linear(normalised(x_.bottomRows(1), model_.norm), model_.output_weights(), logits_);
    if (!logits_.allFinite()) return Result<std::span<const float>>::failure("a logit is infinite or no number: broken weights");
    return std::span<const float>(logits_.data(), static_cast<std::size_t>(logits_.size()));
  }

  // Appends all tokens but the last; returns the sum of -log p(token), in nats, over all but the first.
  Result<double> surprise(std::span<const Token> tokens) {
    using Nats = Result<double>;
    if (tokens.size() < 2) return Nats::failure("%zu tokens leave none to predict", tokens.size());
    double nats = 0;
    const auto add = [&](std::size_t first) {
      linear(normalised(x_, model_.norm), model_.output_weights(), logits_);
      for (Index i = 0; i < logits_.rows(); ++i) {
        const Token next = tokens[first + static_cast<std::size_t>(i) + 1];
        const float top = logits_.row(i).maxCoeff();
        nats += double{top} - double{logits_(i, next)} + std::log((logits_.row(i).array() - top).cast<double>().exp().sum());
      }
    };
    const fovea::Status status = check_tokens(tokens.last(1));
    if (!status.ok()) return Nats::failure(status.message());
    const fovea::Status ran = run(tokens.first(tokens.size() - 1), add);
    return ran.ok() ? Nats(std::move(nats)) : Nats::failure(ran.message());
  }

 private:
  static constexpr std::size_t kChunk = 256;

  fovea::Status check_tokens(std::span<const Token> tokens) const {
    for (const Token token : tokens) {
      if (token >= 0 && token < c_.vocab) continue;
      return fovea::Status::error(fovea::Code::invalid_argument, "token %d is not in the vocabulary of %td", token,
                                  c_.vocab);
    }
    return {};
  }

  // Calls after_chunk(number of its first token) with the chunk's last hidden states in x_.
  template <class F>
  fovea::Status run(std::span<const Token> tokens, const F& after_chunk) {
    if (!created_.ok()) return created_;
    if (static_cast<Index>(tokens.size()) > room()) {
      return fovea::Status::error(fovea::Code::invalid_argument, "%zu tokens do not fit: %td of the %td positions are taken",
                                  tokens.size(), position_, c_.context);
    }
    if (fovea::Status status = check_tokens(tokens); !status.ok()) return status;
    for (std::size_t begin = 0; begin < tokens.size();) {
      const std::size_t most = std::min(kChunk, static_cast<std::size_t>(cache_.longest_step(position_)));
      const std::size_t len = std::min(most, tokens.size() - begin);
      if (fovea::Status status = run_chunk(tokens.subspan(begin, len)); !status.ok()) {
        // What some layers have appended goes; a refusal of that (a ring that has turned) would hide the first one.
        static_cast<void>(cache_.rewind(position_));
        return status;
      }
      after_chunk(begin);
      begin += len;
    }
    return {};
  }

  fovea::Status run_chunk(std::span<const Token> tokens) {
    const Index len = static_cast<Index>(tokens.size());
    if (fovea::Status status = rope_.move_to(position_, len); !status.ok()) return status;
    x_.resize(len, c_.hidden);
    for (Index i = 0; i < len; ++i) x_.row(i) = model_.embedding.row(tokens[static_cast<std::size_t>(i)]);
    for (Index n = 0; n < c_.layers; ++n) {
      const Layer& layer = model_.layers[static_cast<std::size_t>(n)];
      linear(normalised(x_, layer.attention_norm), layer.qkv, qkv_);
      if (fovea::Status status = attend(n, len); !status.ok()) return status;
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
    fovea::Status status = fovea::rotate(fresh.q, {.start = position_}, rope_.table(), fovea::RopeLayout::half_split);
    if (status.ok()) status = cache_.append(layer, position_, fresh.k, fresh.v, rope_.table());
    if (!status.ok()) return status;
    heads_.resize(len, c_.heads * c_.head_dim);
    const auto out = fovea::bshd(heads_.data(), 1, len, c_.heads, c_.head_dim);
    const fovea::KvBatch held = cache_.batch(layer);
    const auto start = std::chrono::steady_clock::now();
    status = attention_(layer, fresh.q, held.kv, out,
                        {.causal = fovea::Causal::bottom_right, .len_k = held.len_k, .executor = executor_});
    attention_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return status;
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
  KvCache cache_;
  Rope rope_;
  fovea::Status created_;
  Index position_ = 0;
  double attention_seconds_ = 0;
  Matrix x_, y_, qkv_, heads_, gate_up_, hidden_, logits_;
};

}   // namespace generate
