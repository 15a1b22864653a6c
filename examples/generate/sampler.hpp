// SPDX-License-Identifier: Apache-2.0
// Picks the next token. Temperature 0 is greedy; top-k keeps the k likeliest, top-p the fewest whose probabilities reach p.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <span>
#include <vector>

#include "tokenizer.hpp"

namespace generate {

struct SamplerOptions {
  float temperature = 0.f;
  std::size_t top_k = 0;   // 0 = all
  float top_p = 1.f;
  std::uint64_t seed = 1;
};

class Sampler {
 public:
  explicit Sampler(const SamplerOptions& options) : options_(options), bits_(options.seed) {}

  Token next(std::span<const float> logits) {
    if (options_.temperature <= 0.f)
      return static_cast<Token>(std::max_element(logits.begin(), logits.end()) - logits.begin());
    order_.resize(logits.size());
    std::iota(order_.begin(), order_.end(), Token{0});
    std::sort(order_.begin(), order_.end(), [&](Token a, Token b) { return logit(logits, a) > logit(logits, b); });
    if (options_.top_k > 0 && options_.top_k < order_.size()) order_.resize(options_.top_k);

    weights_.clear();
    double total = 0;
    for (const Token token : order_) {
      weights_.push_back(std::exp(double{logit(logits, token) - logit(logits, order_[0])} / double{options_.temperature}));
      total += weights_.back();
    }
    double kept = 0;
    std::size_t count = 0;
    while (count < weights_.size() && (count == 0 || kept < double{options_.top_p} * total)) kept += weights_[count++];

    // The same 53 bits on every platform; std::uniform_real_distribution promises none.
    double at = static_cast<double>(bits_() >> 11) * 0x1p-53 * kept;
    for (std::size_t i = 0; i < count; ++i) {
      at -= weights_[i];
      if (at < 0) return order_[i];
    }
    return order_[count - 1];
  }

 private:
  static float logit(std::span<const float> logits, Token token) { return logits[static_cast<std::size_t>(token)]; }

  SamplerOptions options_;
  std::mt19937_64 bits_;
  std::vector<Token> order_;
  std::vector<double> weights_;
};

}   // namespace generate
