// SPDX-License-Identifier: Apache-2.0
#include "fovea/cache/turned_sinks.hpp"

#include <string>
#include <vector>

#include "catch_compat.hpp"
#include "support/random.hpp"

using namespace fovea;

namespace {

constexpr index_t kHeads = 2, kDim = 36, kDimV = 5, kSinks = 3, kWindow = 4, kRollback = 3, kPositions = 120;

// Every token's key and value, as they come; position p of the table turns the first 16 of 36 numbers.
struct Text {
  std::vector<float> k, v, scale, table_memory;
  RopeTable table;

  Text() : k(2 * kPositions * kHeads * kDim), v(2 * kPositions * kHeads * kDimV), scale(kHeads * kDim) {
    test::Random random(5);
    for (auto* numbers : {&k, &v}) {
      for (float& x : *numbers) x = random.normal();
    }
    for (float& s : scale) s = random.uniform(0.01f, 0.02f);   // some keys are clipped
    std::vector<double> inv_freq(8);
    float factor = 1;
    rope_frequencies({.rotary_dim = 16, .base = 100}, inv_freq, factor).or_throw();
    table_memory.resize(static_cast<std::size_t>(rope_table_floats(kPositions, 16)));
    make_rope_table(table, inv_freq, factor, 0, kPositions, table_memory).or_throw();
  }
  // Tokens [first, first + count) of text 0 or 1, which differ.
  Operand keys(index_t text, index_t first, index_t count) const {
    return bshd(k.data() + (text * kPositions + first) * kHeads * kDim, 1, count, kHeads, kDim);
  }
  Operand values(index_t text, index_t first, index_t count) const {
    return bshd(v.data() + (text * kPositions + first) * kHeads * kDimV, 1, count, kHeads, kDimV);
  }
  std::string row(Format format, RopeLayout layout, index_t text, index_t token, index_t head, index_t position) const {
    float numbers[kDim];
    rotate_rows(layout, k.data() + ((text * kPositions + token) * kHeads + head) * kDim, 0, numbers, 0, 1,
                table.cos_at(position), table.sin_at(position), 0, table.pairs, kDim);
    std::vector<std::byte> row(static_cast<std::size_t>(row_bytes(format, kDim)));
    quantise_row(format, numbers, 1, kDim, scale.data() + head * kDim, row.data());
    return {reinterpret_cast<const char*>(row.data()), row.size()};
  }
};

CacheRows rows_of(const Text& text, Format format) {
  return {.kv_heads = kHeads,
          .dim_qk = kDim,
          .dim_v = kDimV,
          .k = format,
          .v = Format::f32,
          .k_channel_scale = format == Format::i8_channel ? text.scale.data() : nullptr};
}

}   // namespace

TEST_CASE("TurnedSinks: each sink is its own key at its place in the cache, whatever came, went and was forked", "[cache]") {
  const Text text;
  int turns = 0, same_place = 0;
  for (int f = 0; f < kFormats; ++f) {
    const auto format = static_cast<Format>(f);
    if (format == Format::latent_fp8) continue;   // of one dim
    for (const RopeLayout layout : {RopeLayout::half_split, RopeLayout::interleaved}) {
      INFO(name_of(format) << ", layout " << static_cast<int>(layout));
      RingCache cache;
      REQUIRE(cache
                  .create({.rows = rows_of(text, format),
                           .sequences = 2,
                           .sinks = kSinks,
                           .window = kWindow,
                           .rollback = kRollback,
                           .layout = f % 2 == 0 ? KvLayout::head_major : KvLayout::token_major,
                           .poison = true})
                  .ok());
      TurnedSinks sinks;
      REQUIRE(sinks.create(cache, layout).ok());
      index_t texts[2] = {0, 1}, at[2] = {0, 0};   // of a sequence: whose tokens it has, and where its sinks were read last
      test::Random random(static_cast<std::uint64_t>(2 * f) + static_cast<std::uint64_t>(layout));
      for (int operation = 0; operation < 120; ++operation) {
        const index_t s = random.below(2), seen = cache.seen(s);
        switch (random.below(5)) {
          case 0:
            static_cast<void>(cache.truncate(s, random.between(0, seen)));   // what the ring has overwritten is refused
            break;
          case 1:
            if (!random.one_in(4)) break;
            REQUIRE(cache.fork(s, 1 - s).ok());
            REQUIRE(sinks.fork(s, 1 - s).ok());
            texts[1 - s] = texts[s];
            break;
          default: {
            if (seen > kPositions - 12) REQUIRE(cache.reset(s).ok());
            const index_t first = cache.seen(s), count = random.between(0, 12);
            if (first == 0) texts[s] = random.below(2);
            REQUIRE(
                sinks.append(cache, s, text.keys(texts[s], first, count), text.values(texts[s], first, count), text.table)
                    .ok());
          }
        }
        if (random.one_in(3)) continue;   // not read after this one
        REQUIRE(sinks.turn(cache, s, text.table).ok());
        const index_t position = TurnedSinks::position(cache, s), len = cache.len(s);
        ++(position == at[s] ? same_place : turns);
        at[s] = position;
        bool right = true;
        for (index_t key = 0; key < len; ++key) {
          const index_t token = key < kSinks ? key : key + position;   // the window's keys stand where they came
          for (index_t head = 0; head < kHeads; ++head) {
            const std::string wanted = text.row(format, layout, texts[s], token, head, key + position);
            right = right && std::memcmp(cache.k_row(s, head, key), wanted.data(), wanted.size()) == 0;
          }
        }
        REQUIRE(right);
      }
      REQUIRE(cache.check().ok());
    }
  }
  CHECK(turns > 200);
  CHECK(same_place > 200);
}

TEST_CASE("TurnedSinks: sinks rolled back and come again turn again, at the same place too", "[cache]") {
  const Text text;
  RingCache cache;
  REQUIRE(cache.create({.rows = rows_of(text, Format::i8_channel), .sinks = kSinks, .window = kWindow, .rollback = 9}).ok());
  TurnedSinks sinks;
  REQUIRE(sinks.create(cache, RopeLayout::half_split).ok());
  const auto append = [&](index_t first, index_t count) {
    return sinks.append(cache, 0, text.keys(0, first, count), text.values(0, first, count), text.table).ok();
  };
  index_t lost = 0;
  REQUIRE(append(0, 12));
  REQUIRE(sinks.turn(cache, 0, text.table, &lost).ok());
  CHECK(lost > 0);
  const index_t once = lost;
  REQUIRE(sinks.turn(cache, 0, text.table, &lost).ok());   // stands there already
  CHECK(lost == once);
  REQUIRE(cache.truncate(0, 10).ok());
  REQUIRE(append(2, 10));
  REQUIRE(sinks.turn(cache, 0, text.table).ok());
  for (index_t sink = 0; sink < kSinks; ++sink) {
    const std::string wanted = text.row(Format::i8_channel, RopeLayout::half_split, 0, sink, 1, sink + 5);
    CHECK(std::memcmp(cache.k_row(0, 1, sink), wanted.data(), wanted.size()) == 0);
  }
}

TEST_CASE("TurnedSinks refuses with the numbers and writes nothing", "[cache]") {
  const Text text;
  RingCache cache, other;
  const CacheRows rows = rows_of(text, Format::bf16);
  REQUIRE(cache.create({.rows = rows, .sequences = 2, .sinks = kSinks, .window = kWindow, .poison = true}).ok());
  REQUIRE(other.create({.rows = rows, .sequences = 2, .sinks = kSinks + 1, .window = kWindow, .poison = true}).ok());
  TurnedSinks sinks;
  const auto refused = [&](const Status& status, const char* words) {
    CHECK_FALSE(status.ok());
    CHECK_THAT(std::string(status.message()), Catch::Matchers::ContainsSubstring(words));
  };
  refused(sinks.append(cache, 0, text.keys(0, 0, 1), text.values(0, 0, 1), text.table), "sinks of 0 sequences");
  REQUIRE(sinks.create(cache, RopeLayout::half_split).ok());
  CHECK(sinks.bytes() >= 2 * kHeads * kSinks * kDim * sizeof(float));
  refused(sinks.append(other, 0, text.keys(0, 0, 1), text.values(0, 0, 1), text.table), "the ring has 2, 4, 2 and 36");
  refused(sinks.append(cache, 2, text.keys(0, 0, 1), text.values(0, 0, 1), text.table), "sequence 2 of 2");
  refused(sinks.fork(0, 2), "sequence 2 of 2");
  refused(sinks.fork(1, 1), "itself");
  RopeTable table = text.table;
  table.len = 11;
  refused(sinks.append(cache, 0, text.keys(0, 0, 12), text.values(0, 0, 12), table), "positions 0 to 11");
  CHECK(cache.seen(0) == 0);

  REQUIRE(sinks.append(cache, 0, text.keys(0, 0, 12), text.values(0, 0, 12), text.table).ok());
  const auto row = [&] { return std::string(reinterpret_cast<const char*>(cache.k_row(0, 0, 0)), 2 * kDim); };
  const std::string before = row();
  table.len = 7;
  refused(sinks.turn(cache, 0, table), "sinks at 5 to 7 are outside the RoPE table's 0 to 6");
  table = text.table;
  table.pairs = 19;
  refused(sinks.turn(cache, 0, table), "turns 38 numbers, keys have 36");
  CHECK(row() == before);

  // Sinks that came another way.
  REQUIRE(append_tokens(cache, 1, text.keys(0, 0, 2), text.values(0, 0, 2), {&text.table}).ok());
  refused(sinks.append(cache, 1, text.keys(0, 2, 9), text.values(0, 2, 9), text.table), "has 2 sinks, 0 came");
  REQUIRE(append_tokens(cache, 1, text.keys(0, 2, 9), text.values(0, 2, 9), {&text.table, RopeLayout::half_split, 2}).ok());
  refused(sinks.turn(cache, 1, text.table), "has 3 sinks, 0 came");

  RingCache latent;
  REQUIRE(latent.create({.rows = {.dim_qk = kDim, .dim_v = kDimV, .v_in_k = true}, .window = 4}).ok());
  refused(sinks.create(latent, RopeLayout::half_split), "V in K");
}
