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
#include <fovea/cache/turned_sinks.hpp>
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
        fovea::Status status = create_layers<fovea::RingCache>(
            fovea::RingCacheShape{.rows = rows, .sinks = options.sinks, .window = options.window});
        sinks_ = std::vector<fovea::TurnedSinks>(static_cast<std::size_t>(c_.layers));
        for (std::size_t layer = 0; status.ok() && layer < sinks_.size(); ++layer)
          status = sinks_[layer].create(std::get<std::vector<fovea::RingCache>>(layers_)[layer], kLayout);
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
    const auto of_layer = static_cast<std::size_t>(layer);
    const auto append_to = [&](auto& layers) -> fovea::Status {
      auto& cache = layers[of_layer];
      if constexpr (std::is_same_v<std::decay_t<decltype(cache)>, fovea::RingCache>) {
        if (fovea::Status status = sinks_[of_layer].append(cache, 0, k, v, table); !status.ok()) return status;
        // The step's table has the positions of its tokens only; sinks stand elsewhere.
        if (fovea::Status status =
                sink_rope_.move_to(fovea::TurnedSinks::position(cache, 0), std::max<Index>(options_.sinks, 1));
            !status.ok()) {
          return status;
        }
        return sinks_[of_layer].turn(cache, 0, sink_rope_.table());
      } else {
        return fovea::append_tokens(cache, 0, k, v, {.table = &table, .layout = kLayout, .position = position});
      }
    };
    return std::visit(append_to, layers_);
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

  static constexpr fovea::RopeLayout kLayout = fovea::RopeLayout::half_split;

  const Config& c_;
  KvOptions options_;
  Index bytes_per_token_ = 0;
  std::variant<std::vector<fovea::ContiguousCache>, std::vector<fovea::PagedCache>, std::vector<fovea::RingCache>,
               std::vector<fovea::MixedCache>>
      layers_;
  std::vector<fovea::TurnedSinks> sinks_;   // [layer]  with a ring only
  Rope sink_rope_;
};

}   // namespace generate
