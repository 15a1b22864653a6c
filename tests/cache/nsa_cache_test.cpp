// SPDX-License-Identifier: Apache-2.0
#include "fovea/cache/nsa_cache.hpp"

#include "support/dense.hpp"
#include "support/executors.hpp"

namespace {

using namespace test;
using fovea::Format;
using fovea::NsaCache;
using fovea::NsaCacheShape;
using fovea::NsaOptions;
using fovea::NsaPool;
using fovea::NsaRopeOrder;
using fovea::NsaShape;
using Compiled = fovea::Formats<Format::f32>;

constexpr index_t kHeads = 2, kDim = 8, kDimV = 12, kLen = 133, kSlots = 140, kPairs = 2;
constexpr NsaShape kShape{8, 4, 16, 4, 1, 2, 24};

// A table of positions 0 .. kSlots - 1 that turns four numbers.
struct Rope {
  std::vector<float> memory;
  fovea::RopeTable table;
  Rope() : memory(static_cast<std::size_t>(fovea::rope_table_floats(kSlots, 2 * kPairs))) {
    fovea::RopeOptions options;
    options.rotary_dim = 2 * kPairs;
    std::vector<double> freq(kPairs);
    float attention = 1;
    REQUIRE(fovea::rope_frequencies(options, std::span(freq), attention).ok());
    REQUIRE(fovea::make_rope_table(table, freq, attention, 0, kSlots, memory).ok());
  }
};

NsaCacheShape shape_of(const Rope* rope, NsaRopeOrder order) {
  NsaCacheShape shape;
  shape.rows = {kHeads, kDim, kDimV, Format::f32, Format::f32};
  shape.nsa = kShape;
  shape.rope = rope == nullptr ? nullptr : &rope->table;
  shape.order = order;
  shape.sequences = 2;
  shape.slots = kSlots;
  shape.poison = true;
  return shape;
}

void append(NsaCache& cache, index_t sequence, const Values& k, const Values& v, const std::vector<index_t>& counts) {
  index_t first = 0;
  for (const index_t count : counts) {
    const fovea::Status status = cache.append(sequence, only_pos(k.view(), first, count), only_pos(v.view(), first, count));
    INFO(status.message());
    REQUIRE(status.ok());
    first += count;
    CHECK(cache.len(sequence) == first);
    CHECK(cache.entries(sequence) == fovea::nsa_entries(first, kShape));
    CHECK(cache.check().ok());
  }
}

bool same_rows(const fovea::Stored& stored, index_t sequence, const Values& want, index_t count) {
  bool same = true;
  for (index_t h = 0; h < want.heads; ++h) {
    for (index_t j = 0; j < count; ++j)
      same = same && std::memcmp(stored.data + sequence * stored.stride[0] + h * stored.stride[1] + j * stored.stride[2],
                                 &want.view()(0, h, j, 0), static_cast<std::size_t>(want.dim) * sizeof(float)) == 0;
  }
  return same;
}

std::vector<index_t> pieces(index_t count, index_t size) {
  std::vector<index_t> all;
  for (index_t at = 0; at < count; at += size) all.push_back(std::min(size, count - at));
  return all;
}

}   // namespace

TEST_CASE("nsa cache: entries have the bits of one compression, however the tokens come", "[nsa][cache]") {
  const Rope rope;
  const Values k = random_values(1, 1, kHeads, kLen, kDim), v = random_values(2, 1, kHeads, kLen, kDimV);
  const Values first = random_values(3, 1, kHeads, kShape.block * kDim, kDim),
               slots = random_values(4, 1, 1, 1, kShape.block);
  const index_t entries = fovea::nsa_entries(kLen, kShape);
  for (const NsaRopeOrder order : {NsaRopeOrder::none, NsaRopeOrder::pool_then_rope, NsaRopeOrder::rope_then_pool}) {
    NsaCacheShape shape = shape_of(order == NsaRopeOrder::none ? nullptr : &rope, order);
    shape.phi_k.pool = NsaPool::linear;
    shape.phi_k.first = first.view();
    shape.phi_v.pool = NsaPool::weighted;
    shape.phi_v.slot_weight = {slots.data.data(), {1, kShape.block}, {kShape.block, 1}};
    Values want_k(1, kHeads, entries, kDim), want_v(1, kHeads, entries, kDimV), turned = k;
    const fovea::NsaRope how{order, &rope.table, fovea::RopeLayout::half_split, 0};
    REQUIRE(fovea::nsa_compress(k.view(), kShape, shape.phi_k, want_k.view(), how).ok());
    REQUIRE(fovea::nsa_compress(v.view(), kShape, shape.phi_v, want_v.view()).ok());
    if (order != NsaRopeOrder::none) {
      for (index_t h = 0; h < kHeads; ++h) {
        for (index_t j = 0; j < kLen; ++j) {
          float* const row = &turned.view()(0, h, j, 0);
          fovea::rotate_rows(fovea::RopeLayout::half_split, row, kDim, row, kDim, 1, rope.table.cos_at(j),
                             rope.table.sin_at(j), rope.table.stride, kPairs, kDim);
        }
      }
    }
    std::vector<std::vector<index_t>> ways{{kLen}, {7, 1, 3, 0, 40, 4, 60, 18}, {3, 4, 6, 120}};
    for (const index_t size : {1, 2, 3, 4, 7, 8, 12, 13, 33, 64}) ways.push_back(pieces(kLen, size));
    for (const auto& counts : ways) {
      NsaCache cache;
      REQUIRE(cache.create(shape).ok());
      append(cache, 1, k, v, counts);
      CHECK(cache.len(0) == 0);
      CHECK(same_rows(cache.batch().kv.k, 1, turned, kLen));
      CHECK(same_rows(cache.batch().kv.v, 1, v, kLen));
      CHECK(same_rows(cache.compressed().k, 1, want_k, entries));
      CHECK(same_rows(cache.compressed().v, 1, want_v, entries));
    }
  }
}

TEST_CASE("nsa cache: decode from it is prefill's last row", "[nsa][cache]") {
  const Values k = random_values(11, 1, kHeads, kLen, kDim), v = random_values(12, 1, kHeads, kLen, kDimV),
               q = random_values(13, 1, 4, kLen, kDim), gates(1, 4, kLen, 3, 0.5f);
  NsaCache cache;
  REQUIRE(cache.create(shape_of(nullptr, NsaRopeOrder::none)).ok());
  append(cache, 0, k, v, {kLen});
  Values prefill(1, 4, kLen, kDimV, canary());
  fovea::Kv tokens = cache.batch().kv, entries = cache.compressed();
  tokens.batch = entries.batch = 1;
  NsaOptions options;
  options.len_k = cache.batch().len_k.first(1);
  REQUIRE(fovea::nsa_attention<Compiled>(q.view(), tokens, entries, gates.view(), prefill.view(), kShape, options).ok());

  REQUIRE(cache.reset(0).ok());
  REQUIRE(cache.reset(1).ok());
  double off = 0;
  for (index_t t = 0; t < kLen; ++t) {
    // The other sequence stands still after 30 tokens.
    REQUIRE(cache.append(0, only_pos(k.view(), t, 1), only_pos(v.view(), t, 1)).ok());
    if (t < 30) REQUIRE(cache.append(1, only_pos(k.view(), t, 1), only_pos(v.view(), t, 1)).ok());
    Values two(2, 4, 1, kDim), gate(2, 4, 1, 3, 0.5f), out(2, 4, 1, kDimV, canary());
    for (index_t b = 0; b < 2; ++b) {
      for (index_t h = 0; h < 4; ++h) {
        for (index_t d = 0; d < kDim; ++d) two.view()(b, h, 0, d) = q.view()(0, h, b == 0 ? t : std::min<index_t>(t, 29), d);
      }
    }
    NsaOptions step;
    step.len_k = cache.batch().len_k;
    const fovea::Status status = fovea::nsa_attention<Compiled>(two.view(), cache.batch().kv, cache.compressed(),
                                                                gate.view(), out.view(), kShape, step);
    INFO(status.message());
    REQUIRE(status.ok());
    for (index_t b = 0; b < 2; ++b) {
      for (index_t h = 0; h < 4; ++h) {
        for (index_t d = 0; d < kDimV; ++d)
          off = std::max(off, std::abs(double{out.view()(b, h, 0, d)} -
                                       double{prefill.view()(0, h, b == 0 ? t : std::min<index_t>(t, 29), d)}));
      }
    }
  }
  // The same scores and the same blocks, summed by other kernels: sums of at most 133 terms of size 4.
  CHECK(off <= 300 * kUnit * 4);
}

TEST_CASE("nsa cache: forks go on by themselves, refusals change nothing", "[nsa][cache]") {
  const Values k = random_values(21, 1, kHeads, kLen, kDim), v = random_values(22, 1, kHeads, kLen, kDimV);
  const index_t entries = fovea::nsa_entries(kLen, kShape);
  Values want_k(1, kHeads, entries, kDim);
  REQUIRE(fovea::nsa_compress(k.view(), kShape, fovea::NsaPhi{}, want_k.view()).ok());
  NsaCache cache;
  REQUIRE(cache.create(shape_of(nullptr, NsaRopeOrder::none)).ok());
  append(cache, 0, k, v, {58});
  InOrder pool;   // sequence 1 goes on from what a refused append left
  CHECK(cache.append(0, only_pos(k.view(), 0, 30), only_pos(v.view(), 0, 30), fovea::Executor(pool, 0)).code() ==
        fovea::Code::invalid_argument);
  CHECK(cache.len(0) == 58);
  CHECK(cache.entries(0) == fovea::nsa_entries(58, kShape));
  CHECK(cache.check().ok());
  REQUIRE(cache.fork(0, 1).ok());
  const Values other = random_values(23, 1, kHeads, 20, kDim), other_v = random_values(24, 1, kHeads, 20, kDimV);
  REQUIRE(cache.append(0, other.view(), other_v.view()).ok());
  REQUIRE(cache.append(1, only_pos(k.view(), 58, kLen - 58), only_pos(v.view(), 58, kLen - 58)).ok());
  CHECK(same_rows(cache.compressed().k, 1, want_k, entries));
  CHECK(!same_rows(cache.compressed().k, 0, want_k, fovea::nsa_entries(78, kShape)));
  CHECK(cache.bytes() > 0);

  const auto refused = [&](const fovea::Status& status, const char* words) {
    INFO(status.message());
    CHECK(!status.ok());
    CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
    CHECK(cache.len(0) == 78);
    CHECK(cache.entries(0) == fovea::nsa_entries(78, kShape));
    CHECK(cache.check().ok());
  };
  refused(cache.append(0, k.view(), v.view()), "slots left");
  refused(cache.append(2, only_pos(k.view(), 0, 1), only_pos(v.view(), 0, 1)), "sequence 2 of 2");
  refused(cache.append(0, only_pos(k.view(), 0, 2), only_pos(v.view(), 0, 1)), "to append is");
  refused(cache.fork(0, 0), "onto itself");
  NsaCacheShape bad = shape_of(nullptr, NsaRopeOrder::none);
  bad.nsa.stride = 3;
  refused(cache.create(bad), "stride 3");
  bad = shape_of(nullptr, NsaRopeOrder::none);
  bad.rows.dim_qk = 640;
  refused(cache.create(bad), "dim_qk 640");
  bad = shape_of(nullptr, NsaRopeOrder::none);
  bad.entries = Format::i8_token;
  refused(cache.create(bad), "entries as f32");
  bad = shape_of(nullptr, NsaRopeOrder::none);
  bad.phi_v.pool = NsaPool::weighted;
  refused(cache.create(bad), "slot_weight");
  bad = shape_of(nullptr, NsaRopeOrder::none);
  bad.sequences = 0;
  refused(cache.create(bad), "0 sequences");
  const Rope rope;
  bad = shape_of(&rope, NsaRopeOrder::pool_then_rope);
  bad.slots = kSlots + 1;
  refused(cache.create(bad), "RoPE table");
}
