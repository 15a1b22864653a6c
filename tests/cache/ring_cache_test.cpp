// SPDX-License-Identifier: Apache-2.0
#include "fovea/cache/ring_cache.hpp"

#include "cache_rows.hpp"
#include "catch_compat.hpp"
#include "support/random.hpp"

using namespace test;
using fovea::CacheRows;
using fovea::Code;
using fovea::Format;
using fovea::RingCache;
using fovea::RingCacheShape;
using fovea::Status;

namespace {

std::string everything(const RingCache& cache) {
  std::string all = all_rows(cache.batch().kv, cache.rows());
  for (index_t b = 0; b < cache.sequences(); ++b) {
    append_number(all, cache.seen(b));
    append_number(all, cache.len(b));
    append_number(all, cache.ring_begin()[static_cast<std::size_t>(b)]);
  }
  return all;
}

// The model keeps every token that was appended and not rolled back, and what each slot holds.
struct Sequence {
  std::vector<std::uint64_t> tokens;
  std::vector<std::uint64_t> slots;   // 0 = never written or rolled back
};

struct Model {
  index_t sinks, window, ring;

  std::uint64_t& at(Sequence& sequence, index_t token) const {
    return sequence.slots[static_cast<std::size_t>(token < sinks ? token : sinks + (token - sinks) % ring)];
  }
  // The tokens a reader sees when there are `total`.
  std::vector<index_t> visible(index_t total) const {
    std::vector<index_t> seen;
    for (index_t token = 0; token < total; ++token) {
      if (token < sinks || token >= total - window) seen.push_back(token);
    }
    return seen;
  }
  void append(Sequence& sequence, const std::vector<std::uint64_t>& ids) const {
    for (const std::uint64_t id : ids) {
      at(sequence, static_cast<index_t>(sequence.tokens.size())) = id;
      sequence.tokens.push_back(id);
    }
  }
  // Possible if every token that is then visible is still where it was written.
  bool may_truncate(Sequence& sequence, index_t count) const {
    const index_t total = static_cast<index_t>(sequence.tokens.size()) - count;
    if (count < 0 || total < 0) return false;
    for (const index_t token : visible(total)) {
      if (at(sequence, token) != sequence.tokens[static_cast<std::size_t>(token)]) return false;
    }
    return true;
  }
  void truncate(Sequence& sequence, index_t count) const {
    for (index_t n = 0; n < count; ++n) {
      std::uint64_t& slot = at(sequence, static_cast<index_t>(sequence.tokens.size()) - 1);
      if (slot == sequence.tokens.back()) slot = 0;
      sequence.tokens.pop_back();
    }
  }
};

void random_operations(const RingCacheShape& shape, int operations, std::uint64_t seed) {
  RingCache cache;
  REQUIRE(cache.create(shape).ok());
  const CacheRows rows = cache.rows();
  CHECK(cache.batch().kv.k.stride[2] ==
        k_bytes(rows) * (shape.layout == fovea::KvLayout::token_major ? rows.kv_heads : 1));
  const Model model{shape.sinks, shape.window, shape.window + shape.rollback};
  const index_t slots = shape.sinks + model.ring;
  REQUIRE(cache.slots() == slots);
  std::vector<Sequence> sequences(static_cast<std::size_t>(shape.sequences));
  for (Sequence& sequence : sequences) sequence.slots.assign(static_cast<std::size_t>(slots), 0);
  Random random(seed);
  std::uint64_t next_id = 1;
  int refused_rollbacks = 0, rollbacks_after_a_turn = 0;
  for (int operation = 0; operation < operations; ++operation) {
    CAPTURE(operation);
    const index_t b = random.one_in(30) ? random.between(-1, shape.sequences) : random.below(shape.sequences);
    const index_t other = random.below(shape.sequences);
    const bool known = b >= 0 && b < shape.sequences;
    Sequence* const mine = known ? &sequences[static_cast<std::size_t>(b)] : nullptr;
    const auto total = known ? static_cast<index_t>(mine->tokens.size()) : 0;
    const std::string before = everything(cache);
    bool expected = known;
    Status status;
    switch (random.below(12)) {
      case 0:
        status = cache.reset(b);
        if (expected) model.truncate(*mine, total);
        break;
      case 1:
        expected = known && b != other;
        status = cache.fork(b, other);
        if (expected) sequences[static_cast<std::size_t>(other)] = *mine;
        break;
      case 2:
      case 3:
      case 4: {
        const index_t count = random.one_in(3) ? random.between(-1, total + 1) : random.between(0, shape.rollback + 1);
        expected = known && model.may_truncate(*mine, count);
        status = cache.truncate(b, count);
        if (known && count <= total && count >= 0 && !expected) ++refused_rollbacks;
        if (expected && count > 0 && total > slots) ++rollbacks_after_a_turn;
        if (expected) model.truncate(*mine, count);
        break;
      }
      default: {
        const index_t count = random.one_in(10) ? random.between(-1, 3 * slots) : random.between(0, 3);
        std::vector<std::uint64_t> ids;
        for (index_t n = 0; n < count; ++n) ids.push_back(next_id++);
        expected = known && count >= 0;
        if (random.one_in(2)) {
          status = cache.append(b, count, WriteTokens{ids, rows});
        } else {
          const ReadyRows ready(ids, rows);
          status = cache.append(b, count, ready.k, ready.v);
        }
        if (expected) model.append(*mine, ids);
        break;
      }
    }
    INFO(status.message());
    if (status.ok() != expected) FAIL("refused or not, against the model");
    if (!expected && everything(cache) != before) FAIL("a refused call changed the cache");
    if (!random.one_in(10)) continue;
    const Status sound = cache.check();
    INFO(sound.message());
    REQUIRE(sound.ok());
    const fovea::KvBatch batch = cache.batch();
    for (index_t n = 0; n < shape.sequences; ++n) {
      const Sequence& held = sequences[static_cast<std::size_t>(n)];
      const std::vector<index_t> visible = model.visible(static_cast<index_t>(held.tokens.size()));
      REQUIRE(cache.seen(n) == static_cast<index_t>(held.tokens.size()));
      REQUIRE(batch.len_k[static_cast<std::size_t>(n)] == static_cast<index_t>(visible.size()));
      for (std::size_t key = 0; key < visible.size(); ++key) {
        if (!holds(batch.kv, n, static_cast<index_t>(key), held.tokens[static_cast<std::size_t>(visible[key])], rows)) {
          FAIL("sequence " << n << ": key " << key << " is not token " << visible[key]);
        }
      }
    }
  }
  CHECK(refused_rollbacks > operations / 100);
  if (shape.rollback > 0) CHECK(rollbacks_after_a_turn > operations / 100);
}

}   // namespace

TEST_CASE("RingCache does what a vector of tokens and a vector of slots do, 25000 random operations", "[cache]") {
  random_operations(
      {.rows = {.kv_heads = 2, .dim_qk = 8, .dim_v = 5}, .sequences = 3, .sinks = 4, .window = 9, .poison = true}, 7000, 1);
  random_operations({.rows = {.kv_heads = 2, .dim_qk = 33, .dim_v = 12, .k = Format::i4_g64, .v = Format::e5m2},
                     .sequences = 3,
                     .sinks = 2,
                     .window = 3,
                     .rollback = 5,
                     .layout = fovea::KvLayout::token_major,
                     .poison = true},
                    7000, 2);
  random_operations({.rows = {.dim_qk = 12, .dim_v = 8, .v_in_k = true},
                     .sequences = 4,
                     .sinks = 0,
                     .window = 6,
                     .rollback = 2,
                     .poison = true},
                    7000, 3);
  random_operations({.rows = {.dim_qk = 4, .dim_v = 4}, .sequences = 2, .sinks = 3, .window = 1}, 4000, 4);
}

TEST_CASE("RingCache: the first tokens stay, the others go round", "[cache]") {
  const CacheRows rows{.kv_heads = 2, .dim_qk = 4, .dim_v = 4};
  RingCache cache;
  REQUIRE(cache.create({.rows = rows, .sinks = 2, .window = 3, .poison = true}).ok());
  for (std::uint64_t id = 0; id < 7; ++id) REQUIRE(cache.append(0, 1, WriteTokens{{id}, rows}).ok());
  const fovea::KvBatch batch = cache.batch();
  CHECK(batch.kv.home == fovea::Home::ring);
  CHECK(batch.kv.len == 5);
  CHECK(batch.kv.sinks == 2);
  CHECK(batch.len_k[0] == 5);
  CHECK(batch.kv.ring_begin[0] == 2);
  // Token 6 stands in slot 3, where token 3 was.
  const std::uint64_t expected[] = {0, 1, 4, 5, 6};
  for (index_t key = 0; key < 5; ++key) CHECK(holds(batch.kv, 0, key, expected[key], rows));
  CHECK(cache.k_row(0, 1, 4) == batch.kv.k.data + batch.kv.k.stride[1] + 3 * batch.kv.k.stride[2]);
  CHECK(cache.v_row(0, 1, 1) == batch.kv.v.data + batch.kv.v.stride[1] + batch.kv.v.stride[2]);
  CHECK(cache.writable_k_row(0, 0, 2) == batch.kv.k.data + 4 * batch.kv.k.stride[2]);
}

TEST_CASE("RingCache: of a long append only the rows that stay are written", "[cache]") {
  const CacheRows rows{.dim_qk = 4, .dim_v = 4};
  RingCache cache;
  REQUIRE(cache.create({.rows = rows, .sinks = 2, .window = 3, .rollback = 1}).ok());
  std::vector<index_t> asked;
  REQUIRE(cache.append(0, 1000, [&](index_t token, index_t, std::byte*, std::byte*) { asked.push_back(token); }).ok());
  CHECK(asked == std::vector<index_t>{0, 1, 996, 997, 998, 999});
  CHECK(cache.len(0) == 5);
  CHECK(cache.seen(0) == 1000);
}

TEST_CASE("RingCache refuses with the numbers and stays as it was", "[cache]") {
  const CacheRows rows{.dim_qk = 4, .dim_v = 4};
  RingCache cache;
  CHECK(cache.append(0, 1, WriteTokens{{1}, rows}).code() == Code::invalid_argument);
  CHECK(cache.check().ok());
  REQUIRE(cache.create({.rows = rows, .sequences = 2, .sinks = 1, .window = 3, .rollback = 2, .poison = true}).ok());
  REQUIRE(cache.append(1, 9, WriteTokens{{1, 2, 3, 4, 5, 6, 7, 8, 9}, rows}).ok());
  const std::string before = everything(cache);
  const auto refused = [&](const Status& status, Code code, const char* words) {
    CHECK(status.code() == code);
    CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
    CHECK(everything(cache) == before);
  };
  refused(cache.truncate(1, 3), Code::invalid_argument, "needs token 3, overwritten; the oldest in the ring is 4");
  refused(cache.truncate(1, 10), Code::invalid_argument, "has seen 9");
  refused(cache.truncate(2, 0), Code::invalid_argument, "sequence 2 of 2");
  refused(cache.append(1, -2, WriteTokens{{}, rows}), Code::invalid_argument, "-2 tokens");
  refused(cache.append(1, PTRDIFF_MAX, WriteTokens{{}, rows}), Code::unsupported, "9223372036854775807");
  refused(cache.fork(0, 0), Code::invalid_argument, "itself");
  refused(cache.reset(7), Code::invalid_argument, "sequence 7");
  refused(cache.create({.rows = rows, .window = 0}), Code::invalid_argument, "window of 0");
  refused(cache.create({.rows = rows, .sinks = -1, .window = 8}), Code::invalid_argument, "-1 sinks");
  refused(cache.create({.rows = rows, .window = PTRDIFF_MAX, .rollback = PTRDIFF_MAX}), Code::out_of_memory, "too much");
  refused(cache.create({.rows = rows, .sequences = index_t{1} << 40, .window = index_t{1} << 40}), Code::out_of_memory,
          "too much");
  CHECK(cache.truncate(1, 2).ok());
  CHECK(holds(cache.batch().kv, 1, 3, 7, rows));
  CHECK(cache.check().ok());
}

TEST_CASE("RingCache: check() finds a slot that was written without a token", "[cache]") {
  const CacheRows rows{.dim_qk = 4, .dim_v = 4};
  RingCache cache;
  REQUIRE(cache.create({.rows = rows, .sequences = 2, .sinks = 1, .window = 4, .poison = true}).ok());
  REQUIRE(cache.append(1, 3, WriteTokens{{1, 2, 3}, rows}).ok());
  REQUIRE(cache.check().ok());
  const fovea::Kv kv = cache.batch().kv;
  for (index_t slot = 0; slot < 5; ++slot) {
    auto* const row = const_cast<std::byte*>(kv.k.data + kv.k.stride[0] + slot * kv.k.stride[2]);
    const std::byte was = std::exchange(*row, std::byte{0x55});
    CHECK(cache.check().ok() == (slot < 3));
    *row = was;
  }
}
