// SPDX-License-Identifier: Apache-2.0
#include "fovea/cache/append.hpp"

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

struct Tokens {
  std::vector<float> k, v, table_memory;
  std::vector<double> inv_freq;
  RopeTable table;
  AppendRope rope;

  Tokens() : k(kTokens * kHeads * kDim), v(kTokens * kHeads * kDimV), inv_freq(16) {
    test::Random random(7);
    for (auto* numbers : {&k, &v}) {
      for (float& x : *numbers) x = random.normal();
    }
    const RopeOptions options{.rotary_dim = 32};
    float attention = 0;
    rope_frequencies(options, std::span<double>(inv_freq), attention).or_throw();
    table_memory.resize(static_cast<std::size_t>(rope_table_floats(kTokens, 32)));
    make_rope_table(table, inv_freq, attention, kFirst, kTokens, table_memory).or_throw();
    rope = {&table, RopeLayout::interleaved, kFirst};
  }
  Operand keys(index_t first, index_t count) const {
    return bshd(k.data() + first * kHeads * kDim, 1, count, kHeads, kDim);
  }
  Operand values(index_t first, index_t count) const {
    return bshd(v.data() + first * kHeads * kDimV, 1, count, kHeads, kDimV);
  }
  // In double: pair m is the numbers 2m and 2m + 1, frequency 10000^(-2m / 32).
  double rotated(index_t token, index_t head, index_t d) const {
    const float* const row = k.data() + (token * kHeads + head) * kDim;
    if (d >= 32) return static_cast<double>(row[d]);
    const index_t m = d / 2;
    const double angle = static_cast<double>(kFirst + token) * std::pow(10000., -2. * static_cast<double>(m) / 32.);
    const double x = static_cast<double>(row[2 * m]), y = static_cast<double>(row[2 * m + 1]);
    return d % 2 == 0 ? x * std::cos(angle) - y * std::sin(angle) : x * std::sin(angle) + y * std::cos(angle);
  }
};

// Steps of a format, as a share of the row's largest number: half of it is the worst rounding.
double step(Format format) {
  switch (format) {
    case Format::f32:
      return 0x1p-22;
    case Format::bf16:
      return 0x1p-7;
    case Format::f16:
      return 0x1p-10;
    case Format::i8_token:
      return 1. / 126;
    case Format::e4m3:
      return 0x1p-3;
    default:
      return 1. / 6.9;
  }
}

template <class RowOf>
void check_rows_hold(const Tokens& tokens, Format k_format, Format v_format, index_t first, index_t count, const RowOf& row_of) {
  double worst_k = 0, worst_v = 0;
  for (index_t token = first; token < first + count; ++token) {
    for (index_t head = 0; head < kHeads; ++head) {
      const auto [k_row, v_row] = row_of(token, head);
      const float* const values = tokens.v.data() + (token * kHeads + head) * kDimV;
      double largest_k = 0, largest_v = 0;
      for (index_t d = 0; d < kDim; ++d) largest_k = std::max(largest_k, std::abs(tokens.rotated(token, head, d)));
      for (index_t d = 0; d < kDimV; ++d) largest_v = std::max(largest_v, static_cast<double>(std::abs(values[d])));
      for (index_t d = 0; d < kDim; ++d) {
        const double error = std::abs(stored_value(k_format, k_row, kDim, d) - tokens.rotated(token, head, d));
        worst_k = std::max(worst_k, error / (0.51 * step(k_format) * largest_k + 1e-6));
      }
      for (index_t d = 0; d < kDimV; ++d) {
        const double error = std::abs(stored_value(v_format, v_row, kDimV, d) - static_cast<double>(values[d]));
        worst_v = std::max(worst_v, error / (0.51 * step(v_format) * largest_v + 1e-6));
      }
    }
  }
  CHECK(worst_k <= 1.);
  CHECK(worst_v <= 1.);
}

constexpr Format kStored[] = {Format::f32, Format::bf16, Format::f16, Format::i8_token, Format::e4m3, Format::i4_g32};

}   // namespace

TEST_CASE("append rotates and encodes: the rows of every cache hold the rotated keys", "[cache]") {
  const Tokens tokens;
  for (const Format format : kStored) {
    INFO(name_of(format));
    const CacheRows rows{.kv_heads = kHeads, .dim_qk = kDim, .dim_v = kDimV, .k = format, .v = Format::bf16};

    ContiguousCache contiguous;
    REQUIRE(contiguous.create({.rows = rows, .sequences = 2, .slots = 64}).ok());
    PagedCache paged;
    REQUIRE(paged.create({.rows = rows, .pages = 9, .page_size = 4, .sequences = 2}).ok());
    index_t sequence = -1;
    REQUIRE(paged.create_sequence(&sequence).ok());
    RingCache ring;
    REQUIRE(ring.create({.rows = rows, .sequences = 1, .sinks = 4, .window = 28}).ok());
    for (const index_t first : {0, 13}) {
      const index_t count = first == 0 ? 13 : kTokens - 13;
      AppendRope rope = tokens.rope;
      rope.position += first;
      REQUIRE(append_tokens(contiguous, 1, tokens.keys(first, count), tokens.values(first, count), rope).ok());
      REQUIRE(append_tokens(paged, sequence, tokens.keys(first, count), tokens.values(first, count), rope).ok());
      REQUIRE(append_tokens(ring, 0, tokens.keys(first, count), tokens.values(first, count), rope).ok());
    }
    const auto rows_of = [](const auto& cache, index_t of) {
      return [&cache, of](index_t token, index_t head) {
        return std::pair{cache.k_row(of, head, token), cache.v_row(of, head, token)};
      };
    };
    check_rows_hold(tokens, format, Format::bf16, 0, kTokens, rows_of(contiguous, 1));
    check_rows_hold(tokens, format, Format::bf16, 0, kTokens, rows_of(paged, sequence));
    check_rows_hold(tokens, format, Format::bf16, 0, kTokens, rows_of(ring, 0));
  }
}

TEST_CASE("append to a mixed cache encodes every token twice", "[cache]") {
  const Tokens tokens;
  const CacheRows rows{.kv_heads = kHeads, .dim_qk = kDim, .dim_v = kDimV, .k = Format::i8_token, .v = Format::i4_g32};
  MixedCache cache;
  REQUIRE(cache.create({.rows = rows, .exact_k = Format::bf16, .exact_v = Format::f16, .sequences = 1, .slots = 64, .sinks = 2,
                        .window = 5})
              .ok());
  REQUIRE(append_tokens(cache, 0, tokens.keys(0, kTokens), tokens.values(0, kTokens), tokens.rope).ok());
  const Kv kv = cache.batch().kv;
  const auto coded = [&](index_t token, index_t head) {
    return std::pair{kv.k.data + head * kv.k.stride[1] + token * kv.k.stride[2],
                     kv.v.data + head * kv.v.stride[1] + token * kv.v.stride[2]};
  };
  check_rows_hold(tokens, Format::i8_token, Format::i4_g32, 2, kTokens - 7, coded);
  const Kv& exact = *kv.exact;
  REQUIRE(kv.exact_first == 2);
  REQUIRE(kv.exact_from[0] == kTokens - 5);
  const auto exact_row = [&](index_t token, index_t head) {
    const index_t key = token < 2 ? token : token - (kTokens - 5) + 2, turned = exact.len - exact.sinks;
    const index_t slot = key < 2 ? key : 2 + (exact.ring_begin[0] + key - 2) % turned;
    return std::pair{exact.k.data + head * exact.k.stride[1] + slot * exact.k.stride[2],
                     exact.v.data + head * exact.v.stride[1] + slot * exact.v.stride[2]};
  };
  check_rows_hold(tokens, Format::bf16, Format::f16, 0, 2, exact_row);
  check_rows_hold(tokens, Format::bf16, Format::f16, kTokens - 5, 5, exact_row);
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

TEST_CASE("append refuses what does not fit, and the cache stays as it was", "[cache]") {
  const Tokens tokens;
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
