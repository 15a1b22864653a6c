// SPDX-License-Identifier: Apache-2.0
#include "fovea/cache/contiguous_cache.hpp"

#include "cache_rows.hpp"
#include "catch_compat.hpp"
#include "support/random.hpp"

using namespace test;
using fovea::CacheRows;
using fovea::Code;
using fovea::ContiguousCache;
using fovea::Format;
using fovea::KvLayout;
using fovea::Status;

namespace {

std::string everything(const ContiguousCache& cache) {
  std::string all = all_rows(cache.batch().kv, cache.rows());
  for (const index_t len : cache.lengths()) append_number(all, len);
  return all;
}

void random_operations(const fovea::ContiguousCacheShape& shape, int operations, std::uint64_t seed) {
  ContiguousCache cache;
  REQUIRE(cache.create(shape).ok());
  const CacheRows rows = cache.rows();
  std::vector<std::vector<std::uint64_t>> model(static_cast<std::size_t>(shape.sequences));
  Random random(seed);
  std::uint64_t next_id = 1;
  int refused = 0;
  for (int operation = 0; operation < operations; ++operation) {
    CAPTURE(operation);
    const index_t sequence = random.between(-1, shape.sequences), other = random.between(0, shape.sequences - 1);
    const index_t count = random.one_in(20) ? -random.between(1, 9) : random.between(0, shape.slots / 3 + 1);
    const bool known = sequence >= 0 && sequence < shape.sequences;
    std::vector<std::uint64_t>* const tokens = known ? &model[static_cast<std::size_t>(sequence)] : nullptr;
    const auto len = known ? static_cast<index_t>(tokens->size()) : 0;
    std::vector<std::uint64_t> ids;
    for (index_t n = 0; n < count; ++n) ids.push_back(next_id++);
    const bool verify = random.one_in(40);
    const std::string before = verify ? everything(cache) : std::string();
    bool expected = false;
    Status status;
    switch (random.below(8)) {
      case 0:
      case 1:
        expected = known && count >= 0 && len + count <= shape.slots;
        status = cache.append(sequence, count, WriteTokens{ids, rows});
        if (expected) tokens->insert(tokens->end(), ids.begin(), ids.end());
        break;
      case 2:
      case 3: {
        expected = known && count >= 0 && len + count <= shape.slots;
        const ReadyRows ready(ids, rows);
        status = cache.append(sequence, count, ready.k, ready.v);
        if (expected) tokens->insert(tokens->end(), ids.begin(), ids.end());
        break;
      }
      case 4:
        expected = known && count >= 0 && len + count <= shape.slots;
        status = cache.extend(sequence, count);
        if (!expected) break;
        for (index_t n = 0; n < count; ++n) {
          for (index_t kv_head = 0; kv_head < rows.kv_heads; ++kv_head) {
            WriteTokens{ids, rows}(n, kv_head, cache.writable_k_row(sequence, kv_head, len + n),
                                   cache.writable_v_row(sequence, kv_head, len + n));
          }
        }
        tokens->insert(tokens->end(), ids.begin(), ids.end());
        break;
      case 5:
        expected = known && count >= 0 && count <= len;
        status = cache.truncate(sequence, count);
        if (expected) tokens->resize(tokens->size() - static_cast<std::size_t>(count));
        break;
      case 6:
        expected = known && sequence != other;
        status = cache.fork(sequence, other);
        if (expected) model[static_cast<std::size_t>(other)] = *tokens;
        break;
      default:
        expected = known;
        status = cache.reset(sequence);
        if (expected) tokens->clear();
        break;
    }
    REQUIRE(status.ok() == expected);
    if (!expected) ++refused;
    if (!verify) continue;
    if (!expected) REQUIRE(everything(cache) == before);
    const Status sound = cache.check();
    INFO(sound.message());
    REQUIRE(sound.ok());
    const fovea::KvBatch batch = cache.batch();
    for (index_t b = 0; b < shape.sequences; ++b) {
      const auto& held = model[static_cast<std::size_t>(b)];
      REQUIRE(batch.len_k[static_cast<std::size_t>(b)] == static_cast<index_t>(held.size()));
      for (std::size_t n = 0; n < held.size(); ++n) REQUIRE(holds(batch.kv, b, static_cast<index_t>(n), held[n], rows));
    }
  }
  CHECK(refused > operations / 50);
  CHECK(refused < operations * 3 / 4);
}

}   // namespace

TEST_CASE("ContiguousCache does what vectors of tokens do, 20000 random operations", "[cache]") {
  const std::vector<float> scale(2 * 9, 1.f);
  random_operations({.rows = {.kv_heads = 2, .dim_qk = 8, .dim_v = 5}, .sequences = 4, .slots = 23, .poison = true}, 6000,
                    1);
  random_operations({.rows = {.kv_heads = 3, .dim_qk = 33, .dim_v = 40, .k = Format::i4_g32_zero, .v = Format::e4m3},
                     .sequences = 3,
                     .slots = 40,
                     .layout = KvLayout::token_major,
                     .poison = true},
                    6000, 2);
  random_operations({.rows = {.dim_qk = 12, .dim_v = 8, .v_in_k = true}, .sequences = 5, .slots = 7, .poison = true}, 4000,
                    3);
  random_operations({.rows = {.kv_heads = 2,
                              .dim_qk = 9,
                              .dim_v = 9,
                              .k = Format::i8_channel,
                              .v = Format::i8_token,
                              .k_channel_scale = scale.data()},
                     .sequences = 2,
                     .slots = 50},
                    4000, 4);
}

TEST_CASE("ContiguousCache layouts: the strides of head-major and of token-major rows", "[cache]") {
  const CacheRows rows{.kv_heads = 4, .dim_qk = 16, .dim_v = 8, .v = Format::f32};
  ContiguousCache cache;
  CHECK(cache.rows().dim_qk == 0);
  REQUIRE(cache.create({.rows = rows, .sequences = 3, .slots = 10}).ok());
  CHECK(cache.batch().kv.k.stride == std::array<index_t, 3>{4 * 10 * 32, 10 * 32, 32});
  CHECK(cache.batch().kv.v.stride == std::array<index_t, 3>{4 * 10 * 32, 10 * 32, 32});
  REQUIRE(cache.create({.rows = rows, .sequences = 3, .slots = 10, .layout = KvLayout::token_major}).ok());
  CHECK(cache.batch().kv.k.stride == std::array<index_t, 3>{4 * 10 * 32, 32, 4 * 32});
  CHECK(cache.bytes() >= static_cast<std::size_t>(3 * 10 * fovea::token_bytes(rows)));
}

TEST_CASE("ContiguousCache takes rows of a tensor as they are", "[cache]") {
  // Two tokens of a projection, [token, head, dim].
  std::vector<float> k(2 * 3 * 4), v(2 * 3 * 2);
  for (std::size_t n = 0; n < k.size(); ++n) k[n] = static_cast<float>(n);
  for (std::size_t n = 0; n < v.size(); ++n) v[n] = 100.f + static_cast<float>(n);
  const fovea::Kv fresh =
      fovea::dense_kv(fovea::bshd<const float>(k.data(), 1, 2, 3, 4), fovea::bshd<const float>(v.data(), 1, 2, 3, 2));
  ContiguousCache cache;
  REQUIRE(
      cache.create({.rows = {.kv_heads = 3, .dim_qk = 4, .dim_v = 2, .k = Format::f32, .v = Format::f32}, .slots = 5}).ok());
  REQUIRE(cache.append(0, 2, fresh.k, fresh.v).ok());
  for (index_t token = 0; token < 2; ++token) {
    for (index_t kv_head = 0; kv_head < 3; ++kv_head) {
      CHECK(std::memcmp(cache.k_row(0, kv_head, token), k.data() + (token * 3 + kv_head) * 4, 16) == 0);
      CHECK(std::memcmp(cache.v_row(0, kv_head, token), v.data() + (token * 3 + kv_head) * 2, 8) == 0);
    }
  }
}

TEST_CASE("ContiguousCache refuses with the numbers and stays as it was", "[cache]") {
  ContiguousCache cache;
  CHECK(cache.extend(0, 1).code() == Code::invalid_argument);
  CHECK(cache.batch().len_k.empty());
  CHECK(cache.check().ok());
  const CacheRows rows{.dim_qk = 4, .dim_v = 4};
  REQUIRE(cache.create({.rows = rows, .sequences = 2, .slots = 3, .poison = true}).ok());
  REQUIRE(cache.append(1, 2, WriteTokens{{5, 6}, rows}).ok());
  const std::string before = everything(cache);

  const auto refused = [&](const Status& status, Code code, const char* words) {
    CHECK(status.code() == code);
    CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
    CHECK(everything(cache) == before);
  };
  refused(cache.extend(1, 2), Code::out_of_pages, "sequence 1 has 1 of 3 slots left");
  refused(cache.extend(1, PTRDIFF_MAX), Code::out_of_pages, "9223372036854775807");
  refused(cache.extend(2, 1), Code::invalid_argument, "sequence 2 of 2");
  refused(cache.truncate(1, 3), Code::invalid_argument, "has 2");
  refused(cache.truncate(1, -1), Code::invalid_argument, "-1 tokens");
  refused(cache.reset(-1), Code::invalid_argument, "sequence -1");
  refused(cache.fork(1, 1), Code::invalid_argument, "itself");
  refused(cache.append(0, 1, fovea::Stored{nullptr, Format::bf16, {}}, fovea::Stored{nullptr, Format::bf16, {}}),
          Code::invalid_argument, "null");
  refused(cache.append(0, 1, fovea::Stored{nullptr, Format::f32, {}}, fovea::Stored{nullptr, Format::bf16, {}}),
          Code::invalid_argument, "f32");
  refused(cache.create({.rows = rows, .sequences = 0, .slots = 3}), Code::invalid_argument, "0 sequences");
  refused(cache.create({.rows = rows, .sequences = 1, .slots = -3}), Code::invalid_argument, "-3 slots");
  refused(cache.create({.rows = rows, .sequences = index_t{1} << 40, .slots = index_t{1} << 40}), Code::out_of_memory,
          "too much");
  refused(cache.create({.rows = {.dim_qk = 0, .dim_v = 4}, .slots = 3}), Code::invalid_argument, "dim_qk 0");
}

TEST_CASE("ContiguousCache moves, and what is left is an empty cache", "[cache]") {
  const CacheRows rows{.dim_qk = 4, .dim_v = 4};
  ContiguousCache first;
  REQUIRE(first.create({.rows = rows, .slots = 3}).ok());
  REQUIRE(first.append(0, 1, WriteTokens{{9}, rows}).ok());
  const fovea::KvBatch batch = first.batch();
  ContiguousCache second(std::move(first));
  CHECK(first.sequences() == 0);
  CHECK(first.bytes() == 0);
  CHECK(second.len(0) == 1);
  CHECK(holds(batch.kv, 0, 0, 9, rows));
  CHECK(second.batch().kv.k.data == batch.kv.k.data);
}

TEST_CASE("ContiguousCache: check() finds a row behind the last token", "[cache]") {
  const CacheRows rows{.kv_heads = 2, .dim_qk = 4, .dim_v = 4};
  ContiguousCache cache;
  REQUIRE(cache.create({.rows = rows, .sequences = 2, .slots = 4, .poison = true}).ok());
  REQUIRE(cache.append(1, 2, WriteTokens{{1, 2}, rows}).ok());
  REQUIRE(cache.check().ok());
  const fovea::Kv kv = cache.batch().kv;
  auto* const behind = const_cast<std::byte*>(kv.v.data + kv.v.stride[0] + kv.v.stride[1] + 2 * kv.v.stride[2]);
  *behind = std::byte{0};
  CHECK_THAT(cache.check().message(), Catch::Matchers::ContainsSubstring("sequence 1 behind token 2"));
  *behind = std::byte{0xff};
  CHECK(cache.check().ok());
}
