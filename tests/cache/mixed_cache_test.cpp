// SPDX-License-Identifier: Apache-2.0
#include "fovea/cache/mixed_cache.hpp"

#include <algorithm>

#include "cache_rows.hpp"
#include "catch_compat.hpp"
#include "support/random.hpp"

using namespace test;
using fovea::CacheRows;
using fovea::Code;
using fovea::Format;
using fovea::MixedCache;
using fovea::MixedCacheShape;
using fovea::Status;

namespace {

CacheRows exact_rows(const MixedCacheShape& shape) {
  CacheRows rows = shape.rows;
  rows.k = shape.exact_k;
  rows.v = shape.rows.v_in_k ? shape.exact_k : shape.exact_v;
  rows.k_channel_scale = nullptr;
  return rows;
}

std::string everything(const MixedCache& cache, const CacheRows& exact) {
  const fovea::Kv kv = cache.batch().kv;
  std::string all = all_rows(kv, cache.rows()) + all_rows(*kv.exact, exact);
  for (std::size_t b = 0; b < cache.lengths().size(); ++b) {
    append_number(all, cache.lengths()[b]);
    append_number(all, cache.exact_from()[b]);
    append_number(all, kv.exact->ring_begin[b]);
  }
  return all;
}

// Exact and quantised rows of one token differ, so that reading the wrong one is noticed.
constexpr std::uint64_t kExact = std::uint64_t{1} << 32;

std::vector<std::uint64_t> exact_ids(std::vector<std::uint64_t> ids) {
  for (std::uint64_t& id : ids) id += kExact;
  return ids;
}

struct Sequence {
  std::vector<std::uint64_t> tokens;
  std::vector<std::uint64_t> slots;   // of the exact rows; 0 = never written or rolled back
};

std::size_t slot_of(index_t token, index_t sinks, index_t ring) {
  return static_cast<std::size_t>(token < sinks ? token : sinks + (token - sinks) % ring);
}

void random_operations(const MixedCacheShape& shape, int operations, std::uint64_t seed) {
  MixedCache cache;
  REQUIRE(cache.create(shape).ok());
  const CacheRows rows = cache.rows(), exact = exact_rows(shape);
  const index_t apart = shape.layout == fovea::KvLayout::token_major ? rows.kv_heads : 1;
  CHECK(cache.batch().kv.k.stride[2] == k_bytes(rows) * apart);
  CHECK(cache.batch().kv.exact->k.stride[2] == k_bytes(exact) * apart);
  const index_t sinks = shape.sinks, ring = shape.window + shape.rollback;
  std::vector<Sequence> sequences(static_cast<std::size_t>(shape.sequences));
  for (Sequence& sequence : sequences) sequence.slots.assign(static_cast<std::size_t>(sinks + ring), 0);
  const auto truncate = [&](Sequence& sequence, index_t count) {
    for (index_t n = 0; n < count; ++n) {
      std::uint64_t& slot = sequence.slots[slot_of(static_cast<index_t>(sequence.tokens.size()) - 1, sinks, ring)];
      if (slot == sequence.tokens.back()) slot = 0;
      sequence.tokens.pop_back();
    }
  };
  Random random(seed);
  std::uint64_t next_id = 1;
  int shorter_windows = 0, middles = 0;
  for (int operation = 0; operation < operations; ++operation) {
    CAPTURE(operation);
    const index_t b = random.one_in(30) ? random.between(-1, shape.sequences) : random.below(shape.sequences);
    const index_t other = random.below(shape.sequences);
    const bool known = b >= 0 && b < shape.sequences;
    Sequence* const mine = known ? &sequences[static_cast<std::size_t>(b)] : nullptr;
    const auto len = known ? static_cast<index_t>(mine->tokens.size()) : 0;
    const std::string before = everything(cache, exact);
    bool expected = known;
    Status status;
    switch (random.below(12)) {
      case 0:
        status = cache.reset(b);
        if (expected) truncate(*mine, len);
        break;
      case 1:
        expected = known && b != other;
        status = cache.fork(b, other);
        if (expected) sequences[static_cast<std::size_t>(other)] = *mine;
        break;
      case 2:
      case 3: {
        const index_t count = random.one_in(3) ? random.between(-1, len + 1) : random.between(0, shape.rollback + 2);
        expected = known && count >= 0 && count <= len;
        status = cache.truncate(b, count);
        if (expected) truncate(*mine, count);
        break;
      }
      default: {
        const index_t count = random.one_in(10) ? random.between(-1, shape.slots) : random.between(0, 3);
        std::vector<std::uint64_t> ids;
        for (index_t n = 0; n < count; ++n) ids.push_back(next_id++);
        const std::vector<std::uint64_t> other_ids = exact_ids(ids);
        expected = known && count >= 0 && len + count <= shape.slots;
        if (random.one_in(2)) {
          status = cache.append(b, count, WriteTokens{other_ids, exact}, WriteTokens{ids, rows});
        } else {
          const ReadyRows ready_exact(other_ids, exact), ready(ids, rows);
          status = cache.append(b, count, ready_exact.k, ready_exact.v, ready.k, ready.v);
        }
        for (index_t n = 0; expected && n < count; ++n) {
          mine->slots[slot_of(len + n, sinks, ring)] = ids[static_cast<std::size_t>(n)];
          mine->tokens.push_back(ids[static_cast<std::size_t>(n)]);
        }
        break;
      }
    }
    INFO(status.message());
    if (status.ok() != expected) FAIL("refused or not, against the model");
    if (!expected && everything(cache, exact) != before) FAIL("a refused call changed the cache");
    if (!random.one_in(10)) continue;
    const Status sound = cache.check();
    INFO(sound.message());
    REQUIRE(sound.ok());
    const fovea::KvBatch batch = cache.batch();
    REQUIRE(batch.kv.exact_first == sinks);
    for (std::size_t n = 0; n < sequences.size(); ++n) {
      const Sequence& held = sequences[n];
      const auto total = static_cast<index_t>(held.tokens.size());
      REQUIRE(batch.len_k[n] == total);
      // The longest run of last tokens, at most the window, whose exact rows are still there.
      index_t from = total;
      while (from > std::max(sinks, total - shape.window) &&
             held.slots[slot_of(from - 1, sinks, ring)] == held.tokens[static_cast<std::size_t>(from - 1)]) {
        --from;
      }
      REQUIRE(batch.kv.exact_from[n] == std::max(from, sinks));
      if (from > std::max(sinks, total - shape.window)) ++shorter_windows;
      if (from > sinks) ++middles;
      for (index_t key = 0; key < total; ++key) {
        const std::uint64_t id = held.tokens[static_cast<std::size_t>(key)];
        const bool is_exact = key < sinks || key >= from;
        if (!holds(batch.kv, static_cast<index_t>(n), key, is_exact ? id + kExact : id, is_exact ? exact : rows)) {
          FAIL("sequence " << n << ": key " << key << " is not the " << (is_exact ? "exact" : "quantised") << " token "
                           << id);
        }
      }
    }
  }
  CHECK(middles > operations / 100);
  CHECK(shorter_windows > operations / 100);
}

}   // namespace

TEST_CASE("MixedCache does what a vector of tokens and a vector of slots do, 15000 random operations", "[cache]") {
  const std::vector<float> scale(2 * 9, 1.f);
  random_operations({.rows = {.kv_heads = 2, .dim_qk = 8, .dim_v = 5, .k = Format::i8_token, .v = Format::i4_g32},
                     .sequences = 3,
                     .slots = 40,
                     .sinks = 4,
                     .window = 9,
                     .poison = true},
                    5000, 1);
  random_operations({.rows = {.kv_heads = 2,
                              .dim_qk = 9,
                              .dim_v = 12,
                              .k = Format::i8_channel,
                              .v = Format::e4m3,
                              .k_channel_scale = scale.data()},
                     .exact_k = Format::f16,
                     .exact_v = Format::f32,
                     .sequences = 2,
                     .slots = 30,
                     .sinks = 2,
                     .window = 3,
                     .rollback = 4,
                     .layout = fovea::KvLayout::token_major,
                     .poison = true},
                    5000, 2);
  random_operations({.rows = {.dim_qk = 576, .dim_v = 512, .k = Format::latent_fp8, .v = Format::latent_fp8, .v_in_k = true},
                     .sequences = 2,
                     .slots = 12,
                     .sinks = 0,
                     .window = 4,
                     .poison = true},
                    5000, 3);
}

TEST_CASE("MixedCache: the descriptor reads sinks, a quantised middle and a window", "[cache]") {
  const MixedCacheShape shape{.rows = {.kv_heads = 2, .dim_qk = 32, .dim_v = 32, .k = Format::i8_token, .v = Format::i4_g32},
                              .sequences = 2,
                              .slots = 20,
                              .sinks = 2,
                              .window = 3};
  MixedCache first;
  REQUIRE(first.create(shape).ok());
  std::vector<std::uint64_t> ids(11);
  for (std::size_t n = 0; n < ids.size(); ++n) ids[n] = n;
  const std::vector<std::uint64_t> other_ids = exact_ids(ids);
  REQUIRE(first.append(1, 11, WriteTokens{other_ids, exact_rows(shape)}, WriteTokens{ids, shape.rows}).ok());
  const fovea::KvBatch batch = first.batch();
  const MixedCache cache(std::move(first));   // the descriptor outlives the move
  CHECK(first.sequences() == 0);
  CHECK(batch.kv.home == fovea::Home::contiguous);
  CHECK(batch.kv.k.format == Format::i8_token);
  CHECK(batch.kv.exact->k.format == Format::bf16);
  CHECK(batch.kv.exact->home == fovea::Home::ring);
  CHECK(batch.kv.exact->len == 5);
  CHECK(batch.kv.exact_from[1] == 8);
  CHECK(batch.kv.exact_from[0] == 2);
  for (index_t key = 0; key < 11; ++key) {
    const bool is_exact = key < 2 || key >= 8;
    CHECK(holds(batch.kv, 1, key, static_cast<std::uint64_t>(key) + (is_exact ? kExact : 0),
                is_exact ? exact_rows(shape) : shape.rows));
  }
  CHECK(cache.len(1) == 11);
}

TEST_CASE("MixedCache refuses with the numbers and stays as it was", "[cache]") {
  const MixedCacheShape shape{.rows = {.dim_qk = 8, .dim_v = 8, .k = Format::i8_token, .v = Format::i8_token},
                              .sequences = 2,
                              .slots = 6,
                              .sinks = 1,
                              .window = 2,
                              .poison = true};
  MixedCache cache;
  CHECK(cache.truncate(0, 0).code() == Code::invalid_argument);
  CHECK(cache.check().ok());
  REQUIRE(cache.create(shape).ok());
  const std::vector<std::uint64_t> ids{1, 2, 3, 4, 5};
  const WriteTokens write_exact{ids, exact_rows(shape)}, write{ids, shape.rows};
  REQUIRE(cache.append(0, 5, write_exact, write).ok());
  const std::string before = everything(cache, exact_rows(shape));
  const auto refused = [&](const Status& status, Code code, const char* words) {
    CHECK(status.code() == code);
    CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
    CHECK(everything(cache, exact_rows(shape)) == before);
  };
  refused(cache.append(0, 2, write_exact, write), Code::out_of_pages, "has 1 of 6 slots left");
  refused(cache.append(2, 1, write_exact, write), Code::invalid_argument, "sequence 2 of 2");
  refused(cache.truncate(0, 6), Code::invalid_argument, "has 5");
  refused(cache.fork(1, 1), Code::invalid_argument, "itself");
  const ReadyRows rows(ids, shape.rows);
  refused(cache.append(0, 1, rows.k, rows.v, rows.k, rows.v), Code::invalid_argument, "rows of i8_token");
  refused(cache.create({.rows = shape.rows, .slots = 0}), Code::invalid_argument, "0 slots");
  refused(cache.create({.rows = shape.rows, .exact_k = Format::i8_channel, .slots = 4}), Code::invalid_argument,
          "i8_channel");
  refused(cache.create({.rows = shape.rows, .slots = index_t{1} << 46}), Code::out_of_memory, "too much");
  refused(cache.create({.rows = shape.rows, .slots = 4, .window = 0}), Code::invalid_argument, "window of 0");
}
