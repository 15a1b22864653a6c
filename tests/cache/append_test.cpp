// SPDX-License-Identifier: Apache-2.0
#include "fovea/cache/append.hpp"

#include <array>
#include <bit>
#include <cmath>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/cache/contiguous_cache.hpp"
#include "fovea/cache/paged_cache.hpp"
#include "fovea/cache/ring_cache.hpp"
#include "fovea/reference/rope.hpp"
#include "fovea/reference/stored.hpp"
#include "support/random.hpp"

using namespace fovea;
using fovea::reference::stored_value;

namespace {

constexpr index_t kHeads = 3, kDim = 72, kDimV = 40, kTokens = 21, kFirst = 1000;

using Positions = std::vector<std::array<index_t, 3>>;   // [token]  time, height, width

Positions consecutive() {
  Positions all;
  for (index_t t = kFirst; t < kFirst + kTokens; ++t) all.push_back({t, t, t});
  return all;
}

// Tokens, and their keys turned in double.
struct Tokens {
  index_t dim;
  std::vector<float> k, v, table_memory, scale;   // scale [head, dim]  of int8 per channel
  std::vector<double> inv_freq, turned;           // turned [token, head, dim]
  float attention = 0;
  RopeTable table;
  AppendRope rope;

  explicit Tokens(RopeLayout layout, const Positions& positions = consecutive(),
                  const RopeOptions& options = {.rotary_dim = 32}, index_t dim_qk = kDim)
      : dim(dim_qk),
        k(static_cast<std::size_t>(kTokens * kHeads * dim)),
        v(kTokens * kHeads * kDimV),
        table_memory(static_cast<std::size_t>(rope_table_floats(kTokens, options.rotary_dim))),
        scale(static_cast<std::size_t>(kHeads * dim), 0.f),
        inv_freq(static_cast<std::size_t>(options.rotary_dim / 2)),
        turned(k.size()) {
    test::Random random(7);
    for (auto* numbers : {&k, &v}) {
      for (float& x : *numbers) x = random.normal();
    }
    rope_frequencies(options, std::span<double>(inv_freq), attention).or_throw();
    make_rope_table(table, inv_freq, attention, kFirst, kTokens, table_memory).or_throw();
    rope = {&table, layout, kFirst};
    for (index_t row = 0; row < kTokens * kHeads; ++row) {
      reference::rope_row(k.data() + row * dim, turned.data() + row * dim, dim,
                          positions[static_cast<std::size_t>(row / kHeads)], options, layout);
      for (index_t d = 0; d < dim; ++d) {
        float& largest = scale[static_cast<std::size_t>(row % kHeads * dim + d)];
        largest = std::max(largest, static_cast<float>(std::abs(turned[static_cast<std::size_t>(row * dim + d)])));
      }
    }
    channel_scales(scale.data(), kHeads * dim, scale.data());
  }
  Tokens(const Tokens&) = delete;   // `rope` points into it
  Tokens& operator=(const Tokens&) = delete;

  Operand keys(index_t first, index_t count) const {
    return bshd(k.data() + first * kHeads * dim, 1, count, kHeads, dim);
  }
  Operand values(index_t first, index_t count) const {
    return bshd(v.data() + first * kHeads * kDimV, 1, count, kHeads, kDimV);
  }
  double rotated(index_t token, index_t head, index_t d) const {
    return turned[static_cast<std::size_t>((token * kHeads + head) * dim + d)];
  }
  CacheRows rows(Format k_format, Format v_format) const {
    return {.kv_heads = kHeads,
            .dim_qk = dim,
            .dim_v = kDimV,
            .k = k_format,
            .v = v_format,
            .k_channel_scale = k_format == Format::i8_channel ? scale.data() : nullptr};
  }
};

// Steps of a format, as a share of the row's largest number: half of it is the worst rounding.
double step(Format format) {
  switch (format) {
    case Format::f32:
    case Format::f64:
      return 0x1p-22;
    case Format::bf16:
      return 0x1p-7;
    case Format::f16:
      return 0x1p-10;
    case Format::i8_token:
      return 1. / 126;
    case Format::e4m3:
    case Format::latent_fp8:
      return 0x1p-3;
    case Format::e5m2:
      return 0x1p-2;
    default:   // int4: a larger side of 8 steps, or 15 steps from end to end and a zero rounded to f16
      return 1. / 6.9;
  }
}

// `divisor` [head, dim]: of the exact keys beside int8 ones per channel.
template <class RowOf>
void check_rows_hold(const Tokens& tokens, const CacheRows& rows, index_t first, index_t count, const RowOf& row_of,
                     const float* divisor = nullptr) {
  double worst_k = 0, worst_v = 0;
  for (index_t token = first; token < first + count; ++token) {
    for (index_t head = 0; head < kHeads; ++head) {
      const auto [k_row, v_row] = row_of(token, head);
      const float* const scale = tokens.scale.data() + head * tokens.dim;
      double largest_k = 0, largest_v = 0;
      for (index_t d = 0; d < tokens.dim; ++d) largest_k = std::max(largest_k, std::abs(tokens.rotated(token, head, d)));
      for (index_t d = 0; d < tokens.dim; ++d) {
        const double factor = divisor == nullptr ? 1 : double{divisor[head * tokens.dim + d]};
        const double value = stored_value(rows.k, k_row, tokens.dim, d, scale) * factor;
        const double one = rows.k == Format::i8_channel ? double{scale[d]} : step(rows.k) * largest_k;
        worst_k = std::max(worst_k, std::abs(value - tokens.rotated(token, head, d)) / (0.51 * one + 1e-6));
      }
      if (rows.v_in_k) {
        CHECK(v_row == k_row);
        continue;
      }
      const float* const values = tokens.v.data() + (token * kHeads + head) * kDimV;
      for (index_t d = 0; d < kDimV; ++d) largest_v = std::max(largest_v, static_cast<double>(std::abs(values[d])));
      for (index_t d = 0; d < kDimV; ++d) {
        const double error = std::abs(stored_value(rows.v, v_row, kDimV, d) - static_cast<double>(values[d]));
        worst_v = std::max(worst_v, error / (0.51 * step(rows.v) * largest_v + 1e-6));
      }
    }
  }
  CHECK(worst_k <= 1.);
  CHECK(worst_v <= 1.);
}

template <class Cache>
auto rows_of(const Cache& cache, index_t sequence) {
  return [&cache, sequence](index_t token, index_t head) {
    return std::pair{cache.k_row(sequence, head, token), cache.v_row(sequence, head, token)};
  };
}

// In two calls.
template <class Cache>
void append_all(const Tokens& tokens, Cache& cache, index_t sequence) {
  for (const index_t first : {0, 13}) {
    const index_t count = first == 0 ? 13 : kTokens - 13;
    AppendRope rope = tokens.rope;
    rope.position += first;
    const Operand values = cache.rows().v_in_k ? Operand() : tokens.values(first, count);
    const Status status = append_tokens(cache, sequence, tokens.keys(first, count), values, rope);
    INFO(status.message());
    REQUIRE(status.ok());
  }
}

}   // namespace

TEST_CASE("append rotates and encodes: the rows of every cache hold the rotated keys", "[cache]") {
  int v_format = 0;
  for (const RopeLayout layout : {RopeLayout::half_split, RopeLayout::interleaved}) {
    const Tokens tokens(layout);
    for (int k_format = 0; k_format < kFormats; ++k_format, ++v_format) {
      const auto format = static_cast<Format>(k_format);
      if (format == Format::latent_fp8) continue;   // of another dim: below
      auto of_v = static_cast<Format>(v_format % (kFormats - 1));
      if (of_v == Format::i8_channel) of_v = Format::i8_token;   // not for V
      INFO(name_of(format) << " and " << name_of(of_v) << ", layout " << static_cast<int>(layout));
      const CacheRows rows = tokens.rows(format, of_v);

      ContiguousCache contiguous;
      REQUIRE(contiguous.create({.rows = rows, .sequences = 2, .slots = 64}).ok());
      PagedCache paged;
      REQUIRE(paged.create({.rows = rows, .pages = 9, .page_size = 4, .sequences = 2}).ok());
      index_t sequence = -1;
      REQUIRE(paged.create_sequence(&sequence).ok());
      RingCache ring;
      REQUIRE(ring.create({.rows = rows, .sequences = 1, .sinks = 4, .window = 28}).ok());
      append_all(tokens, contiguous, 1);
      append_all(tokens, paged, sequence);
      append_all(tokens, ring, 0);
      check_rows_hold(tokens, rows, 0, kTokens, rows_of(contiguous, 1));
      check_rows_hold(tokens, rows, 0, kTokens, rows_of(paged, sequence));
      check_rows_hold(tokens, rows, 0, kTokens, rows_of(ring, 0));
    }
  }
}

TEST_CASE("append with a table of one row per token: row t is position t, whatever positions it holds", "[cache]") {
  // Three positions a token and YaRN, whose attention factor is in the table; and the depths of a draft tree behind 500 tokens.
  Positions image, tree;
  for (index_t t = 0; t < kTokens; ++t) {
    image.push_back({900 + t / 6, 40 + t % 6 / 3, 7 + t % 3});
    const index_t depth = 500 + static_cast<index_t>(std::bit_width(static_cast<std::size_t>(t + 1))) - 1;   // of a binary tree in breadth
    tree.push_back({depth, depth, depth});
  }
  const RopeOptions mrope{.rotary_dim = 32,
                          .scaling = RopeScaling::yarn,
                          .factor = 8,
                          .original_len = 256,
                          .sections = {.pairs = {6, 5, 5}, .interleaved = true}};
  for (const RopeLayout layout : {RopeLayout::half_split, RopeLayout::interleaved}) {
    for (const bool is_tree : {false, true}) {
      const Positions& positions = is_tree ? tree : image;
      const RopeOptions options = is_tree ? RopeOptions{.rotary_dim = 32} : mrope;
      INFO((is_tree ? "draft tree" : "M-RoPE with YaRN") << ", layout " << static_cast<int>(layout));
      Tokens tokens(layout, positions, options);
      std::vector<index_t> ids(3 * kTokens);
      for (std::size_t t = 0; t < kTokens; ++t) {
        for (std::size_t axis = 0; axis < 3; ++axis) ids[axis * kTokens + t] = positions[t][axis];
      }
      REQUIRE(make_rope_table(tokens.table, tokens.inv_freq, tokens.attention,
                              View<const index_t, 2>{ids.data(), {is_tree ? 1 : 3, kTokens}, {kTokens, 1}}, options.sections,
                              tokens.table_memory)
                  .ok());
      tokens.rope.position = 0;
      const CacheRows rows = tokens.rows(Format::f32, Format::bf16);
      ContiguousCache cache;
      REQUIRE(cache.create({.rows = rows, .sequences = 1, .slots = 32}).ok());
      append_all(tokens, cache, 0);
      check_rows_hold(tokens, rows, 0, kTokens, rows_of(cache, 0));
    }
  }
}

TEST_CASE("append where V lies in K ignores v", "[cache]") {
  for (const Format format : {Format::bf16, Format::i8_token, Format::i4_g32, Format::latent_fp8}) {
    INFO(name_of(format));
    const bool latent = format == Format::latent_fp8;
    Tokens tokens(RopeLayout::interleaved, consecutive(), {.rotary_dim = 32}, latent ? kLatentFp8Dim : kDim);
    CacheRows rows = tokens.rows(format, format);
    rows.v_in_k = true;
    rows.dim_v = latent ? kLatentFp8Values : format == Format::bf16 ? kDimV : kDim;
    PagedCache cache;
    REQUIRE(cache.create({.rows = rows, .pages = 6, .page_size = 4, .poison = true}).ok());
    index_t sequence = -1;
    REQUIRE(cache.create_sequence(&sequence).ok());
    append_all(tokens, cache, sequence);
    check_rows_hold(tokens, rows, 0, kTokens, rows_of(cache, sequence));
  }
}

TEST_CASE("append to a mixed cache encodes every token twice", "[cache]") {
  const Tokens tokens(RopeLayout::interleaved);
  for (const Format format : {Format::i8_token, Format::i8_channel}) {
    INFO(name_of(format));
    const CacheRows rows = tokens.rows(format, Format::i4_g32), exact_rows = tokens.rows(Format::bf16, Format::f16);
    MixedCache cache;
    REQUIRE(cache.create({.rows = rows, .exact_k = Format::bf16, .exact_v = Format::f16, .sequences = 1, .slots = 64,
                          .sinks = 2, .window = 5})
                .ok());
    append_all(tokens, cache, 0);
    const Kv kv = cache.batch().kv;
    const auto coded = [&](index_t token, index_t head) {
      return std::pair{kv.k.data + head * kv.k.stride[1] + token * kv.k.stride[2],
                       kv.v.data + head * kv.v.stride[1] + token * kv.v.stride[2]};
    };
    check_rows_hold(tokens, rows, 2, kTokens - 7, coded);
    const Kv& exact = *kv.exact;
    REQUIRE(kv.exact_first == 2);
    REQUIRE(kv.exact_from[0] == kTokens - 5);
    const auto exact_row = [&](index_t token, index_t head) {
      const index_t key = token < 2 ? token : token - (kTokens - 5) + 2, turned = exact.len - exact.sinks;
      const index_t slot = key < 2 ? key : 2 + (exact.ring_begin[0] + key - 2) % turned;
      return std::pair{exact.k.data + head * exact.k.stride[1] + slot * exact.k.stride[2],
                       exact.v.data + head * exact.v.stride[1] + slot * exact.v.stride[2]};
    };
    // Beside int8 keys per channel they are divided by the scales.
    check_rows_hold(tokens, exact_rows, 0, 2, exact_row, rows.k_channel_scale);
    check_rows_hold(tokens, exact_rows, kTokens - 5, 5, exact_row, rows.k_channel_scale);
  }
}

TEST_CASE("append counts what int8 per channel had to clip, and takes 16-bit tokens", "[cache]") {
  std::vector<float> scale(8, 1.f / 127), v(8, 0.f);
  std::vector<bf16> k(8);
  for (std::size_t d = 0; d < 8; ++d) k[d] = convert<bf16>(d < 3 ? 2.f : 0.5f);
  ContiguousCache cache;
  REQUIRE(cache.create({.rows = {.kv_heads = 1, .dim_qk = 8, .dim_v = 8, .k = Format::i8_channel, .v = Format::f32,
                                 .k_channel_scale = scale.data()},
                        .sequences = 1,
                        .slots = 1})
              .ok());
  index_t lost = 0;
  const Tensor<const bf16> keys = bshd<const bf16>(k.data(), 1, 1, 1, 8);
  REQUIRE(append_tokens(cache, 0, keys, bshd<const float>(v.data(), 1, 1, 1, 8), {}, &lost).ok());
  CHECK(lost == 3);
  CHECK(std::abs(stored_value(Format::i8_channel, cache.k_row(0, 0, 0), 8, 5, scale.data()) - 0.5) <= 0.51 / 127);
}

TEST_CASE("exact keys of channels that were empty in calibration stay finite, and count as lost", "[cache]") {
  const std::vector<float> scale{0.f, 0x1p-126f, 1.f / 127, 1.f / 127}, v(4, 0.f), k{5.f, 5.f, 0.5f, -0.5f};
  for (const Format exact : {Format::f16, Format::bf16, Format::f32}) {
    INFO(name_of(exact));
    MixedCache cache;
    REQUIRE(cache.create({.rows = {.kv_heads = 1, .dim_qk = 4, .dim_v = 4, .k = Format::i8_channel, .v = Format::f32,
                                   .k_channel_scale = scale.data()},
                          .exact_k = exact, .exact_v = Format::f32, .sequences = 1, .slots = 2})
                .ok());
    index_t lost = 0;
    REQUIRE(append_tokens(cache, 0, bshd(k.data(), 1, 1, 1, 4), bshd(v.data(), 1, 1, 1, 4), {}, &lost).ok());
    const std::byte* const row = cache.batch().kv.exact->k.data;
    CHECK(stored_value(exact, row, 4, 0, nullptr) == 0);
    CHECK(std::isfinite(stored_value(exact, row, 4, 1, nullptr)));
    CHECK(stored_value(exact, row, 4, 1, nullptr) > 0);
    CHECK(std::abs(stored_value(exact, row, 4, 3, nullptr) + 63.5) <= 63.5 * 0x1p-8);
    CHECK(lost >= 1);
  }
}

TEST_CASE("append refuses what does not fit, and the cache stays as it was", "[cache]") {
  const Tokens tokens(RopeLayout::interleaved);
  ContiguousCache cache;
  REQUIRE(cache.create({.rows = {.kv_heads = kHeads, .dim_qk = kDim, .dim_v = kDimV}, .sequences = 1, .slots = 16}).ok());
  const auto refused = [&](const Status& status, const char* word) {
    CHECK_FALSE(status.ok());
    CHECK_THAT(std::string(status.message()), Catch::Matchers::ContainsSubstring(word));
    CHECK(cache.len(0) == 0);
  };
  refused(append_tokens(cache, 0, tokens.keys(0, kTokens), tokens.values(0, kTokens), tokens.rope), "16");
  refused(append_tokens(cache, 0, tokens.values(0, 4), tokens.values(0, 4), tokens.rope), "72");
  refused(append_tokens(cache, 0, tokens.keys(0, 4), tokens.values(0, 3), tokens.rope), "[1, 3, 4, 40]");
  AppendRope rope = tokens.rope;
  rope.position = kFirst + kTokens - 3;
  refused(append_tokens(cache, 0, tokens.keys(0, 4), tokens.values(0, 4), rope), "1018");
  rope.position = kFirst - 1;
  refused(append_tokens(cache, 0, tokens.keys(0, 4), tokens.values(0, 4), rope), "999");
}
