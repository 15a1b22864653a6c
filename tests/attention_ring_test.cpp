// SPDX-License-Identifier: Apache-2.0
// Rings with sinks: the bits of contiguous storage at every turn of the ring.
#include "catch_compat.hpp"
#include "fovea/adapters/std_threads.hpp"
#include "support/stored.hpp"

namespace {

using namespace test;

constexpr index_t kHeads = 4, kKvHeads = 2, kDimQk = 24, kDimV = 40;

Lodging ring_of(index_t sinks, index_t spare, std::uint64_t seed) {
  Lodging how;
  how.home = Home::ring;
  how.sinks = sinks;
  how.spare = spare;
  how.seed = seed;
  how.weave = std::array{Weave::head_major, Weave::interleaved, Weave::token_major}[at(static_cast<index_t>(seed % 3))];
  return how;
}

AttentionOptions options_of(const Way& way, const std::vector<index_t>& len_k) {
  AttentionOptions o;
  o.len_k = len_k;
  o.causal = Causal::bottom_right;
  o.regime = way.regime;
  o.panels = way.panels;
  return o;
}

}   // namespace

TEST_CASE("a ring at any turn, with any sinks = contiguous", "[bits][ring]") {
  std::uint64_t seed = 1;
  for (const FormatPair& pair : kFormatPairs) {
    // Both behind and in front of the border of a decode's splits.
    const Keys keys(31, pair.k, pair.v, kKvHeads, kDimQk, kDimV, {1040, 75, 3, 0});
    Tokens q = random_queries(32, 4 * 3, kHeads, kDimQk);
    const Housed flat(keys.k, keys.v, consecutive(keys.len), {});
    for (const Way& way : ways(pair.k, pair.v)) {
      const Answer whole = attend_stored(q, flat.kv(), options_of(way, keys.len), 4);
      CHECK_FALSE(whole.has_nan());
      for (const index_t sinks : {0, 1, 4, 64, 300}) {
        for (const index_t spare : {0, 5}) {
          const Lodging how = ring_of(sinks, spare, ++seed);
          const Housed ring(keys.k, keys.v, consecutive(keys.len), how);
          INFO(describe(pair) << ", " << describe(way) << ", " << describe(how));
          CHECK(attend_stored(q, ring.kv(), options_of(way, keys.len), 4) == whole);
        }
      }
    }
  }
}

TEST_CASE("every turn of a small ring gives the same bits", "[bits][ring]") {
  for (const FormatPair& pair : {kFormatPairs[1], kFormatPairs[3], kFormatPairs[5], kFormatPairs[7]}) {
    const Keys keys(33, pair.k, pair.v, kKvHeads, kDimQk, kDimV, {21});
    Tokens q = random_queries(34, 5, kHeads, kDimQk);
    for (const Way& way : ways(pair.k, pair.v)) {
      const Housed flat(keys.k, keys.v, consecutive(keys.len), {});
      const Answer whole = attend_stored(q, flat.kv(), options_of(way, keys.len));
      // 25 slots, 4 of them sinks; the seed decides the turn, and all 21 turns are met.
      std::vector<bool> met(21, false);
      for (std::uint64_t seed = 0; std::find(met.begin(), met.end(), false) != met.end(); ++seed) {
        Lodging how = ring_of(4, 4, seed);
        const Housed ring(keys.k, keys.v, consecutive(keys.len), how);
        if (met[at(ring.ring_begin[0])]) continue;
        met[at(ring.ring_begin[0])] = true;
        INFO(describe(pair) << ", " << describe(way) << ", turned by " << ring.ring_begin[0]);
        CHECK(attend_stored(q, ring.kv(), options_of(way, keys.len)) == whole);
      }
    }
  }
}

TEST_CASE("ring slots not in use leave no trace", "[bits][ring][poison]") {
  for (const FormatPair& pair : kFormatPairs) {
    const Keys keys(35, pair.k, pair.v, kKvHeads, kDimQk, kDimV, {90, 33, 2});
    Tokens q = random_queries(36, 3 * 2, kHeads, kDimQk);
    for (const Way& way : ways(pair.k, pair.v)) {
      Lodging how = ring_of(4, 30, 7);
      const Housed poisoned(keys.k, keys.v, consecutive(keys.len), how);
      how.fill = std::byte{0};
      const Housed cleared(keys.k, keys.v, consecutive(keys.len), how);
      const Answer answer = attend_stored(q, poisoned.kv(), options_of(way, keys.len), 3);
      INFO(describe(pair) << ", " << describe(way));
      CHECK_FALSE(answer.has_nan());
      CHECK(answer == attend_stored(q, cleared.kv(), options_of(way, keys.len), 3));
    }
  }
}

TEST_CASE("a ring alone = inside a batch, on any number of threads", "[bits][ring]") {
  for (const FormatPair& pair : kFormatPairs) {
    const Keys keys(37, pair.k, pair.v, kKvHeads, kDimQk, kDimV, {1100, 75, 30});
    Tokens q = random_queries(38, 3 * 2, kHeads, kDimQk);
    const Housed ring(keys.k, keys.v, consecutive(keys.len), ring_of(4, 2, 8));
    for (Way way : ways(pair.k, pair.v)) {
      for (const bool automatic : {false, true}) {
        if (automatic) way.regime = Regime::automatic;
        const Answer together = attend_stored(q, ring.kv(), options_of(way, keys.len), 3);
        INFO(describe(pair) << ", " << describe(way));
        for (int lanes = 2; lanes <= 5; ++lanes) {
          fovea::StdThreads pool(lanes);
          AttentionOptions options = options_of(way, keys.len);
          options.executor = {pool, lanes};
          CHECK(attend_stored(q, ring.kv(), options, 3) == together);
        }
        for (index_t s = 0; s < 3; ++s) {
          Tokens part(Format::f32, 2, kHeads, kDimQk);
          const index_t row = 2 * kHeads * kDimQk;
          part.fill(std::vector<float>(q.values.begin() + s * row, q.values.begin() + (s + 1) * row));
          Kv alone = ring.kv();
          alone.k.data += s * alone.k.stride[0];
          alone.v.data += s * alone.v.stride[0];
          alone.batch = 1;
          alone.ring_begin = alone.ring_begin.subspan(at(s), 1);
          const std::vector<index_t> len{keys.len[at(s)]};
          CHECK(same_tokens(together, 2 * s, attend_stored(part, alone, options_of(way, len))));
        }
      }
    }
  }
}

TEST_CASE("a ring that moves on = contiguous keys of sinks and window", "[bits][ring]") {
  // Streaming: 4 sinks and the last 16 tokens, token by token, written over the oldest slot.
  const index_t sinks = 4, slots = 16, steps = 50;
  for (const FormatPair& pair : {kFormatPairs[1], kFormatPairs[3], kFormatPairs[5]}) {
    const Keys keys(39, pair.k, pair.v, kKvHeads, kDimQk, kDimV, {steps});
    Lodging how;
    how.home = Home::ring;
    how.sinks = sinks;
    how.spare = 0;
    Placement first{std::vector<index_t>(at(sinks + slots), -1)};
    Housed ring(keys.k, keys.v, first, how);
    for (index_t step = 0; step < steps; ++step) {
      const index_t slot = step < sinks ? step : sinks + (step - sinks) % slots;
      for (index_t h = 0; h < kKvHeads; ++h) {
        std::memcpy(ring.k_at(0, h, slot), keys.k.row(step, h), at(keys.k.bytes));
        std::memcpy(ring.v_at(0, h, slot), keys.v.row(step, h), at(keys.v.bytes));
      }
      const index_t len = std::min(step + 1, sinks + slots);
      ring.ring_begin = {step + 1 > sinks + slots ? (step + 1 - sinks) % slots : 0};
      Placement tokens{{}};
      for (index_t j = 0; j < len; ++j) tokens[0].push_back(j < sinks ? j : step + 1 - len + j);
      const Housed flat(keys.k, keys.v, tokens, {});
      Tokens q = random_queries(40 + static_cast<std::uint64_t>(step), 1, kHeads, kDimQk);
      const std::vector<index_t> in_use{len};
      const Way way{Regime::decode, Panels::f32};
      INFO(describe(pair) << ", step " << step);
      REQUIRE(attend_stored(q, ring.kv(), options_of(way, in_use)) == attend_stored(q, flat.kv(), options_of(way, in_use)));
    }
  }
}
