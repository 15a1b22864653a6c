// SPDX-License-Identifier: Apache-2.0
// How well a model predicts a text through a cache: what a storage format costs in the end.
#pragma once
#include <string_view>

#include "engine.hpp"

namespace generate {

struct Loss {
  double nats = 0;   // the sum of -log p over `tokens` predicted tokens of `bytes` bytes
  Index tokens = 0, bytes = 0;

  double per_byte() const { return nats / static_cast<double>(bytes); }
  double per_token() const { return nats / static_cast<double>(tokens); }
  double perplexity() const { return std::exp(per_token()); }
};

// Every token but the first, predicted from those before it in its window of the model's context: windows follow each other
// and share one token. A ring has no windows and takes the text as one.
inline Result<Loss> loss_of(Engine& engine, const Model& model, const Tokenizer& tokenizer, std::string_view text) {
  const std::vector<Token> tokens = tokenizer.encode(text);
  if (tokens.size() < 2) return Result<Loss>::failure("a text of %zu tokens leaves none to predict", tokens.size());
  const std::size_t predicted = tokens.size() - 1;
  const std::size_t window = engine.cache().endless() ? predicted : static_cast<std::size_t>(model.config.context);
  Loss loss;
  for (std::size_t begin = 0; begin < predicted; begin += window) {
    if (const fovea::Status status = engine.rewind(0); !status.ok()) return Result<Loss>::failure(status.message());
    auto nats = engine.surprise(std::span(tokens).subspan(begin, std::min(window, predicted - begin) + 1));
    if (!nats) return Result<Loss>::failure(nats.error);
    loss.nats += *nats;
  }
  loss.tokens = static_cast<Index>(predicted);
  loss.bytes = static_cast<Index>(text.size() - tokenizer.piece(tokens[0]).size());
  return loss;
}

// "bf16", "int8, pages of 16", "int4 between 4 + 64 bf16", "fp8, 4 sinks + 252"
inline std::string describe(const KvOptions& kv) {
  const auto* const named =
      std::find_if(kv_formats.begin(), kv_formats.end(), [&](const auto& format) { return format.second == kv.format; });
  std::string text = named == kv_formats.end() ? fovea::name_of(kv.format) : named->first;
  const std::string ends = std::to_string(kv.sinks) + " + " + std::to_string(kv.window);
  if (kv.home == KvHome::paged) text += ", pages of " + std::to_string(kv.page_size);
  if (kv.home == KvHome::ring) text += ", ring of " + ends;
  if (kv.home == KvHome::mixed) text += " between " + ends + " bf16";
  return text;
}

}   // namespace generate
