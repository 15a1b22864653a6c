// SPDX-License-Identifier: Apache-2.0
// The engine's KV cache: a container of fovea/cache per layer, its rows in any storage format.
#pragma once
#include <algorithm>
#include <array>
#include <fovea/cache/append.hpp>
#include <fovea/cache/contiguous_cache.hpp>
#include <fovea/cache/mixed_cache.hpp>
#include <fovea/cache/paged_cache.hpp>
#include <fovea/cache/ring_cache.hpp>
#include <fovea/engine/parts/rope.hpp>
#include <optional>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "model.hpp"

namespace generate {

// What --kv calls the formats. int8 has a scale per token and head, int4 one per 32 numbers, fp8 is e4m3 with a scale per
// token and head.
inline constexpr std::array<std::pair<const char*, fovea::Format>, 6> kv_formats{{{"f32", fovea::Format::f32},
                                                                                  {"bf16", fovea::Format::bf16},
                                                                                  {"f16", fovea::Format::f16},
                                                                                  {"int8", fovea::Format::i8_token},
                                                                                  {"int4", fovea::Format::i4_g32},
                                                                                  {"fp8", fovea::Format::e4m3}}};
inline std::optional<fovea::Format> format_named(std::string_view name) {
  for (const auto& [known, format] : kv_formats) {
    if (name == known) return format;
  }
  return std::nullopt;
}
using KvFormats = fovea::Formats<fovea::Format::f32, fovea::Format::bf16, fovea::Format::f16, fovea::Format::i8_token,
                                 fovea::Format::i4_g32, fovea::Format::e4m3>;

//   contiguous, paged  every token of the context
//   ring               the first `sinks` tokens and the last `window`: text without end in fixed memory (StreamingLLM)
//   mixed              every token of the context, the first `sinks` and the last `window` of them in bf16
enum class KvHome { contiguous, paged, ring, mixed };

struct KvOptions {
  fovea::Format format = fovea::Format::f32;
  KvHome home = KvHome::contiguous;
  Index page_size = 16;
  Index sinks = 4, window = 64;
};

// Cosines and sines of a run of positions. A step needs those of its own tokens only, so no table ends before the text does.
class Rope {
 public:
  Rope(Index head_dim, double theta)
      : inv_freq_(static_cast<std::size_t>(head_dim / 2)),
        status_(fovea::rope_frequencies({.rotary_dim = head_dim, .base = theta}, inv_freq_, factor_)) {}

  fovea::Status move_to(Index first, Index len) {
    if (!status_.ok() || (len == table_.len && first == table_.first_pos)) return status_;
    memory_.resize(static_cast<std::size_t>(fovea::rope_table_floats(len, 2 * static_cast<Index>(inv_freq_.size()))));
    return fovea::make_rope_table(table_, inv_freq_, factor_, first, len, memory_);
  }
  const fovea::RopeTable& table() const { return table_; }

 private:
  std::vector<double> inv_freq_;
  std::vector<float> memory_;
  float factor_ = 1;
  fovea::RopeTable table_;
  fovea::Status status_;
};

namespace detail {

// Tokens a sequence has had, those a ring has dropped included.
template <class Cache>
Index seen(const Cache& cache) {
  if constexpr (std::is_same_v<Cache, fovea::RingCache>) {
    return cache.seen(0);
  } else {
    return cache.len(0);
  }
}

}   // namespace detail

class KvCache {
 public:
  explicit KvCache(const Config& config) : c_(config), sink_rope_(config.head_dim, config.rope_theta) {}

  fovea::Status create(const KvOptions& options) {
    options_ = options;
    const fovea::CacheRows rows{
        .kv_heads = c_.kv_heads, .dim_qk = c_.head_dim, .dim_v = c_.head_dim, .k = options.format, .v = options.format};
    bytes_per_token_ = c_.layers * fovea::token_bytes(rows);
    row_.resize(static_cast<std::size_t>(c_.head_dim));
    turned_.assign(static_cast<std::size_t>(c_.layers), 0);
    switch (options.home) {
      case KvHome::contiguous:
        return create_layers<fovea::ContiguousCache>(fovea::ContiguousCacheShape{.rows = rows, .slots = c_.context});
      case KvHome::paged: {
        if (options.page_size < 1)
          return fovea::Status::error(fovea::Code::invalid_argument, "pages of %td", options.page_size);
        const Index pages = (c_.context + options.page_size - 1) / options.page_size;
        return create_layers<fovea::PagedCache>(
            fovea::PagedCacheShape{.rows = rows, .pages = pages, .page_size = options.page_size});
      }
      case KvHome::ring: {
        if (options.window > c_.context || options.sinks > c_.context - options.window) {
          return fovea::Status::error(fovea::Code::invalid_argument,
                                      "%td sinks and a window of %td are more positions than the model's %td", options.sinks,
                                      options.window, c_.context);
        }
        const fovea::Status status = create_layers<fovea::RingCache>(
            fovea::RingCacheShape{.rows = rows, .sinks = options.sinks, .window = options.window});
        if (status.ok())
          unrotated_sinks_.resize(static_cast<std::size_t>(c_.layers * c_.kv_heads * options.sinks * c_.head_dim));
        return status;
      }
      case KvHome::mixed:
        return create_layers<fovea::MixedCache>(
            fovea::MixedCacheShape{.rows = rows, .slots = c_.context, .sinks = options.sinks, .window = options.window});
    }
    return {};
  }

  const KvOptions& options() const { return options_; }
  bool endless() const { return options_.home == KvHome::ring; }

  // How many tokens may follow the first `seen` at once such that each reads what it would have read alone. Later tokens of
  // a step would push a ring's oldest out, and a mixed cache's window on, before the earlier ones have read them.
  Index longest_step(Index seen) const {
    if (options_.home == KvHome::contiguous || options_.home == KvHome::paged) return c_.context;
    return std::max<Index>(options_.sinks + options_.window - seen, 1);
  }

  // Tokens from `position` on: k not rotated, `table` has their positions. [1, kv_head, pos, dim]
  fovea::Status append(Index layer, Index position, fovea::Tensor<const float> k, fovea::Tensor<const float> v,
                       const fovea::RopeTable& table) {
    const auto append_to = [&](auto& layers) {
      return fovea::append_tokens(layers[static_cast<std::size_t>(layer)], 0, k, v,
                                  {.table = &table, .layout = fovea::RopeLayout::half_split, .position = position});
    };
    if (fovea::Status status = std::visit(append_to, layers_); !status.ok()) return status;
    if (!endless()) return {};
    for (Index token = 0; token < k.extent[2] && position + token < options_.sinks; ++token) {
      for (Index kv_head = 0; kv_head < c_.kv_heads; ++kv_head)
        std::copy_n(&k(0, kv_head, token, 0), c_.head_dim, unrotated_sink(layer, kv_head, position + token));
    }
    return turn_sinks(layer);
  }

  fovea::KvBatch batch(Index layer) const {
    return std::visit([&](const auto& layers) { return layers[static_cast<std::size_t>(layer)].batch(); }, layers_);
  }

  // Forgets everything from `position` on; a ring refuses where it has overwritten what it would need.
  fovea::Status rewind(Index position) {
    const auto rewind_all = [&](auto& layers) -> fovea::Status {
      for (auto& cache : layers) {
        const Index tokens = detail::seen(cache) - position;
        if (tokens <= 0) continue;
        if (fovea::Status status = cache.truncate(0, tokens); !status.ok()) return status;
      }
      return {};
    };
    return std::visit(rewind_all, layers_);
  }

  // Of all layers. bytes() counts what is allocated, window and tables included.
  Index bytes_per_token() const { return bytes_per_token_; }
  std::size_t bytes() const {
    const auto sum = [](const auto& layers) {
      std::size_t bytes = 0;
      for (const auto& cache : layers) bytes += cache.bytes();
      return bytes;
    };
    return std::visit(sum, layers_);
  }

 private:
  template <class Cache, class Shape>
  fovea::Status create_layers(const Shape& shape) {
    std::vector<Cache> layers(static_cast<std::size_t>(c_.layers));
    for (Cache& cache : layers) {
      if (fovea::Status status = cache.create(shape); !status.ok()) return status;
      if constexpr (std::is_same_v<Cache, fovea::PagedCache>) {
        Index sequence = 0;
        if (fovea::Status status = cache.create_sequence(&sequence); !status.ok()) return status;
      }
    }
    layers_ = std::move(layers);
    return {};
  }

  // StreamingLLM counts positions by cache slots: sink i has position i, and every other token moves one slot down whenever
  // one is dropped. Scores depend on distances only, so the sinks may move up instead: keys and queries keep the position
  // they have in the text, and sink i stands at i + (tokens dropped so far). Rotated from the original each time, because
  // repeated turns of one row, or of its codes, would add up their rounding errors.
  fovea::Status turn_sinks(Index layer) {
    auto& cache = std::get<std::vector<fovea::RingCache>>(layers_)[static_cast<std::size_t>(layer)];
    const Index dropped = cache.seen(0) - cache.len(0), sinks = std::min(options_.sinks, cache.len(0));
    Index& turned = turned_[static_cast<std::size_t>(layer)];
    if (dropped == turned || sinks == 0) return {};
    if (fovea::Status status = sink_rope_.move_to(dropped, sinks); !status.ok()) return status;
    const fovea::RopeTable& table = sink_rope_.table();
    for (Index kv_head = 0; kv_head < c_.kv_heads; ++kv_head) {
      for (Index sink = 0; sink < sinks; ++sink) {
        fovea::rotate_row<fovea::RopeLayout::half_split>(unrotated_sink(layer, kv_head, sink), row_.data(),
                                                         table.cos_at(sink + dropped), table.sin_at(sink + dropped),
                                                         table.pairs, c_.head_dim);
        fovea::quantise_row(options_.format, row_.data(), 1, c_.head_dim, nullptr, cache.writable_k_row(0, kv_head, sink));
      }
    }
    turned = dropped;
    return {};
  }

  float* unrotated_sink(Index layer, Index kv_head, Index sink) {
    return unrotated_sinks_.data() + ((layer * c_.kv_heads + kv_head) * options_.sinks + sink) * c_.head_dim;
  }

  const Config& c_;
  KvOptions options_;
  Index bytes_per_token_ = 0;
  std::variant<std::vector<fovea::ContiguousCache>, std::vector<fovea::PagedCache>, std::vector<fovea::RingCache>,
               std::vector<fovea::MixedCache>>
      layers_;
  std::vector<float> row_;               // [head_dim]  a rotated sink on its way into the cache
  std::vector<float> unrotated_sinks_;   // [layer, kv_head, sink, head_dim]  with a ring only
  std::vector<Index> turned_;            // [layer]  tokens dropped when its sinks were rotated last
  Rope sink_rope_;
};

}   // namespace generate
