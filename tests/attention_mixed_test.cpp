// SPDX-License-Identifier: Apache-2.0
// Mixed caches: first tokens and a recent window in one format, the middle in another, as if they were one sequence of keys.
#include <optional>

#include "catch_compat.hpp"
#include "fovea/adapters/std_threads.hpp"
#include "fovea/cache/append.hpp"
#include "support/stored.hpp"

namespace {

using namespace test;

constexpr index_t kHeads = 4, kKvHeads = 2, kDimQk = 40, kDimV = 24;

// Where the parts are cut, per sequence.
struct Cut {
  index_t first;
  std::vector<index_t> from;
};

// Two containers over the same keys, each with poison where the other one is read.
struct Mixed {
  std::vector<index_t> from;
  index_t first;
  Housed middle, exact;
  Kv exact_kv;

  Mixed(const Keys& middle_keys, const Keys& exact_keys, const Cut& cut, const Lodging& how, const Lodging& exact_how)
      : from(cut.from),
        first(cut.first),
        middle(middle_keys.k, middle_keys.v, middle_part(middle_keys.len, cut), how),
        exact(exact_keys.k, exact_keys.v, exact_part(exact_keys.len, cut), exact_how),
        exact_kv(exact.kv()) {}

  Kv kv() const {
    Kv all = middle.kv();
    all.exact = &exact_kv;
    all.exact_first = first;
    all.exact_from = from;
    return all;
  }

  static bool is_exact(const Cut& cut, std::size_t s, index_t j) { return j < cut.first || j >= cut.from[s]; }
  static Placement middle_part(const std::vector<index_t>& len, const Cut& cut) {
    Placement tokens = consecutive(len);
    for (std::size_t s = 0; s < len.size(); ++s) {
      // Where the window begins among the first tokens there is no middle, and need be no page.
      tokens[s].resize(at(cut.from[s] <= cut.first ? 0 : cut.from[s]));
      for (index_t j = 0; j < std::min(cut.first, static_cast<index_t>(tokens[s].size())); ++j) tokens[s][at(j)] = -1;
    }
    return tokens;
  }
  static Placement exact_part(const std::vector<index_t>& len, const Cut& cut) {
    const Placement tokens = consecutive(len);
    Placement kept;
    for (std::size_t s = 0; s < len.size(); ++s) {
      kept.emplace_back();
      for (index_t j = 0; j < len[s]; ++j) {
        if (is_exact(cut, s, j)) kept.back().push_back(tokens[s][at(j)]);
      }
    }
    return kept;
  }
};

const std::vector<index_t> kLen{1060, 290, 40, 5};
const std::vector<Cut> kCuts{{4, {1000, 250, 8, 4}},       // the usual case
                             {0, {1060, 290, 40, 5}},      // nothing exact
                             {0, {0, 0, 0, 0}},            // everything exact, as a window
                             {2000, {1060, 290, 40, 5}},   // everything exact, as first tokens
                             {7, {3, 6, 7, 0}},            // the window begins among the first tokens
                             {9, {1000, 250, 9, 9}},       // the same, behind the keys in use
                             {1, {1025, 257, 39, 1}},    {64, {1024, 128, 40, 2}}};

std::vector<Lodging> middle_homes(std::uint64_t seed) {
  std::vector<Lodging> all(4);
  all[0].weave = Weave::token_major;
  all[1].home = all[2].home = Home::paged;
  all[1].page_size = 16, all[2].page_size = 5;
  all[2].csr = true;
  all[2].columns_behind = all[1].columns_behind = 0;
  all[3].home = Home::ring;
  all[3].sinks = 3;
  for (Lodging& how : all) how.seed = ++seed, how.spare = static_cast<index_t>(seed % 3);
  return all;
}
std::vector<Lodging> exact_homes(std::uint64_t seed) {
  std::vector<Lodging> all(2);
  all[0].weave = Weave::interleaved;
  all[1].home = Home::ring;
  all[1].sinks = 4;
  for (Lodging& how : all) how.seed = ++seed, how.spare = 2;
  return all;
}

AttentionOptions options_of(const Way& way) {
  AttentionOptions o;
  o.len_k = kLen;
  o.causal = Causal::bottom_right;
  o.regime = way.regime;
  o.panels = way.panels;
  return o;
}

}   // namespace

TEST_CASE("a mixed cache of one format = contiguous", "[bits][mixed]") {
  std::uint64_t seed = 1;
  for (const FormatPair& pair : kFormatPairs) {
    const Keys keys(51, pair.k, pair.v, kKvHeads, kDimQk, kDimV, kLen);
    Tokens q = random_queries(52, 4 * 3, kHeads, kDimQk);
    const Housed flat(keys.k, keys.v, consecutive(keys.len), {});
    Keys exact = keys;
    exact.k.channel_scale.clear();   // those of the call are for both parts
    std::vector<Answer> whole;
    for (const Way& way : ways(pair.k, pair.v)) whole.push_back(attend_stored(q, flat.kv(), options_of(way), 4));
    for (const Cut& cut : kCuts) {
      for (const Lodging& how : middle_homes(seed)) {
        ++seed;
        const Lodging exact_how = exact_homes(seed)[seed % 2];
        const Mixed mixed(keys, exact, cut, how, exact_how);
        std::size_t n = 0;
        for (const Way& way : ways(pair.k, pair.v)) {
          INFO(describe(pair) << ", " << describe(way) << ", below " << cut.first << " and from " << cut.from[0] << ": "
                              << describe(how) << "; exact " << describe(exact_how));
          CHECK(attend_stored(q, mixed.kv(), options_of(way), 4) == whole[n++]);
        }
      }
    }
  }
}

TEST_CASE("rows of the other part of a mixed cache leave no trace", "[bits][mixed][poison]") {
  std::uint64_t seed = 100;
  for (const FormatPair& pair : {FormatPair{Format::i8_token, Format::i8_token}, FormatPair{Format::i4_g32, Format::e4m3},
                                 FormatPair{Format::i8_channel, Format::i4_g64_zero}}) {
    const Keys middle(53, pair.k, pair.v, kKvHeads, kDimQk, kDimV, kLen);
    const Keys exact(53, Format::bf16, Format::f16, kKvHeads, kDimQk, kDimV, kLen);
    Tokens q = random_queries(54, 4 * 3, kHeads, kDimQk);
    for (const Cut& cut : {kCuts[0], kCuts[4], kCuts[5]}) {
      for (Lodging how : middle_homes(seed)) {
        for (Lodging exact_how : exact_homes(++seed)) {
          const Mixed poisoned(middle, exact, cut, how, exact_how);
          how.fill = exact_how.fill = std::byte{0};
          how.behind = 0;
          const Mixed cleared(middle, exact, cut, how, exact_how);
          for (const Way& way : ways(pair.k, pair.v)) {
            INFO(describe(pair) << ", " << describe(way) << ", below " << cut.first << " and from " << cut.from[0] << ": "
                                << describe(how) << "; exact " << describe(exact_how));
            const Answer answer = attend_stored(q, poisoned.kv(), options_of(way), 4);
            CHECK_FALSE(answer.has_nan());
            CHECK(answer == attend_stored(q, cleared.kv(), options_of(way), 4));
          }
          how.fill = kPoison;
        }
      }
    }
  }
}

TEST_CASE("pages of a mixed cache that lie below its exact keys need not be there", "[mixed]") {
  const Cut cut{16, {1000, 250, 24, 16}};
  const Keys keys(55, Format::bf16, Format::bf16, kKvHeads, kDimQk, kDimV, kLen);
  Tokens q = random_queries(56, 4 * 3, kHeads, kDimQk);
  for (const index_t size : {16, 5}) {
    for (const bool csr : {false, true}) {
      Lodging how{.home = Home::paged, .page_size = size, .csr = csr};
      Mixed mixed(keys, keys, cut, how, {});
      const Answer whole = attend_stored(q, mixed.kv(), options_of({}), 4);
      for (index_t s = 0; s < 4; ++s) {
        const index_t first = csr ? mixed.middle.page_begin[at(s)] : s * mixed.middle.width;
        const index_t pages = cut.from[at(s)] <= cut.first ? 0 : cut.first / size;
        for (index_t page = 0; page < pages; ++page) mixed.middle.table[at(first + page)] = -1;
      }
      INFO(describe(how));
      CHECK(attend_stored(q, mixed.kv(), options_of({}), 4) == whole);
    }
  }
}

TEST_CASE("each key of a mixed cache is read from its own part", "[mixed]") {
  // Value j is the unit vector j, 1024 times as long in the exact part: the output shows each key's part by itself.
  const index_t len = 50;
  for (const Cut& cut : {Cut{4, {30}}, Cut{0, {50}}, Cut{50, {50}}, Cut{5, {2}}, Cut{0, {17}}}) {
    std::vector<float> zeros(at(len * 2), 0.f), names(at(len * len), 0.f), far_names(at(len * len), 0.f);
    for (index_t j = 0; j < len; ++j) names[at(j * len + j)] = 1.f, far_names[at(j * len + j)] = 1024.f;
    const Keys middle(Format::f32, Format::i8_token, 1, 2, len, {len}, zeros, names);
    const Keys exact(Format::f32, Format::bf16, 1, 2, len, {len}, zeros, far_names);
    const Mixed mixed(middle, exact, cut, middle_homes(3)[1], exact_homes(3)[1]);
    Tokens q = random_queries(55, 1, 1, 2);
    const std::vector<index_t> in_use{len};
    for (const Regime regime : {Regime::prefill, Regime::decode, Regime::wide_decode}) {
      AttentionOptions options;
      options.regime = regime;
      options.len_k = in_use;
      const Answer answer = attend_stored(q, mixed.kv(), options);
      for (index_t j = 0; j < len; ++j) {
        // All scores are 0: every key weighs 1 / len.
        const double wanted = (Mixed::is_exact(cut, 0, j) ? 1024. : 1.) / static_cast<double>(len);
        INFO("below " << cut.first << " and from " << cut.from[0] << ", key " << j << ", " << regime_name(regime));
        CHECK(answer.out.value(0, j) == Catch::Approx(wanted).epsilon(1e-4));
      }
    }
  }
}

TEST_CASE("attention over a MixedCache with scales per channel reads the numbers that were appended", "[mixed][cache]") {
  const index_t len = 70, sinks = 3, window = 20;
  // Every eighth channel is 20 times as large as the others, and no two scales are alike.
  std::vector<float> k = random_numbers(71, len * kKvHeads * kDimQk), scale(at(kKvHeads * kDimQk), 0.f);
  for (std::size_t n = 0; n < k.size(); ++n) k[n] *= n % 8 == 3 ? 20.f : 1.f;
  const std::vector<float> v = random_numbers(72, len * kKvHeads * kDimV);
  const Tensor<const float> keys = fovea::bshd(k.data(), 1, len, kKvHeads, kDimQk);
  fovea::widen_channels(keys, scale.data());
  fovea::channel_scales(scale.data(), kKvHeads * kDimQk, scale.data());
  for (const Format exact : {Format::bf16, Format::f16, Format::f32}) {
    INFO(name_of(exact));
    fovea::MixedCache cache;
    REQUIRE(cache
                .create({.rows = {.kv_heads = kKvHeads,
                                  .dim_qk = kDimQk,
                                  .dim_v = kDimV,
                                  .k = Format::i8_channel,
                                  .v = Format::f32,
                                  .k_channel_scale = scale.data()},
                         .exact_k = exact,
                         .exact_v = Format::f32,
                         .slots = len,
                         .sinks = sinks,
                         .window = window,
                         .poison = true})
                .ok());
    index_t lost = 0;
    REQUIRE(fovea::append_tokens(cache, 0, keys, fovea::bshd(v.data(), 1, len, kKvHeads, kDimV), {}, &lost).ok());
    CHECK(lost == 0);

    // A key read back is off by half a step of its channel in the middle; elsewhere by its format's rounding, the quotient's
    // and that of reading it (both fp32).
    const Kv kv = cache.batch().kv;
    REQUIRE(kv.exact->k_channel_scale == nullptr);
    const double unit = exact == Format::bf16 ? 0x1p-8 : exact == Format::f16 ? 0x1p-11 : 0;
    std::vector<float> read(k.size());
    double worst = 0;
    for (index_t j = 0; j < len; ++j) {
      const bool is_exact = j < sinks || j >= len - window;
      const Kv& part = is_exact ? *kv.exact : kv;
      const index_t key = j < sinks || !is_exact ? j : sinks + j - (len - window);
      const index_t slot = !is_exact || key < sinks ? key : sinks + (part.ring_begin[0] + key - sinks) % (part.len - sinks);
      for (index_t h = 0; h < kKvHeads; ++h) {
        const std::byte* const row = part.k.data + h * part.k.stride[1] + slot * part.k.stride[2];
        const float* const of_head = scale.data() + h * kDimQk;
        for (index_t d = 0; d < kDimQk; ++d) {
          const std::size_t n = at((j * kKvHeads + h) * kDimQk + d);
          const double stored = fovea::reference::stored_value(part.k.format, row, kDimQk, d, of_head);
          read[n] = static_cast<float>(is_exact ? stored * double{of_head[d]} : stored);
          const double budget =
              is_exact ? std::abs(double{k[n]}) * (unit + 3 * kUnit) : 0.5 * double{of_head[d]} * (1 + 256 * kUnit);
          worst = std::max(worst, std::abs(double{read[n]} - double{k[n]}) / budget);
        }
      }
    }
    CHECK(worst <= 1);
    CHECK(worst > 0.5);

    const Tokens q = random_queries(73, 6, kHeads, kDimQk);
    const AttentionOptions o{.scale = 0.02f, .causal = Causal::bottom_right};
    const Expected wanted = expect_stored(q.floats(), fovea::bshd<const float>(read.data(), 1, len, kKvHeads, kDimQk),
                                          fovea::bshd(v.data(), 1, len, kKvHeads, kDimV), o);
    for (const Regime regime : {Regime::prefill, Regime::decode, Regime::wide_decode}) {
      AttentionOptions options = o;
      options.len_k = cache.lengths();
      options.regime = regime;
      Tokens queries = q;
      const WorstOf found = worst_of(attend_stored(queries, kv, options), wanted);
      INFO(regime_name(regime) << ": " << found.where);
      CHECK(found.budgets <= 1);
    }
  }
}

TEST_CASE("a mixed sequence alone = inside a batch, on any number of threads", "[bits][mixed]") {
  const Keys middle(56, Format::i8_token, Format::i4_g32, kKvHeads, kDimQk, kDimV, kLen);
  const Keys exact(56, Format::bf16, Format::bf16, kKvHeads, kDimQk, kDimV, kLen);
  Tokens q = random_queries(57, 4 * 3, kHeads, kDimQk);
  const Mixed mixed(middle, exact, kCuts[0], middle_homes(5)[1], exact_homes(5)[1]);
  for (Way way : ways(Format::i8_token, Format::i4_g32)) {
    for (const bool automatic : {false, true}) {
      if (automatic) way.regime = Regime::automatic;
      const Answer together = attend_stored(q, mixed.kv(), options_of(way), 4);
      INFO(describe(way));
      for (int lanes = 2; lanes <= 5; ++lanes) {
        fovea::StdThreads pool(lanes);
        AttentionOptions options = options_of(way);
        options.executor = {pool, lanes};
        CHECK(attend_stored(q, mixed.kv(), options, 4) == together);
      }
      for (index_t s = 0; s < 4; ++s) {
        Tokens part(Format::f32, 3, kHeads, kDimQk);
        const index_t row = 3 * kHeads * kDimQk;
        part.fill(std::vector<float>(q.values.begin() + s * row, q.values.begin() + (s + 1) * row));
        Kv alone = mixed.kv(), alone_exact = *alone.exact;
        alone_exact.k.data += s * alone_exact.k.stride[0];
        alone_exact.v.data += s * alone_exact.v.stride[0];
        alone_exact.batch = 1;
        alone_exact.ring_begin = alone_exact.ring_begin.subspan(at(s), 1);
        alone.exact = &alone_exact;
        alone.exact_from = alone.exact_from.subspan(at(s), 1);
        alone.block_table.data += s * alone.block_table.stride[0];
        alone.block_table.extent[0] = 1;
        AttentionOptions options = options_of(way);
        options.len_k = options.len_k.subspan(at(s), 1);
        CHECK(same_tokens(together, 3 * s, attend_stored(part, alone, options)));
      }
    }
  }
}

TEST_CASE("chunked = whole prefill over a mixed cache, in one forced regime", "[bits][mixed][chunks]") {
  const index_t past = 40, len = 50, total = past + len;
  const Keys middle(58, Format::e4m3, Format::i8_token, kKvHeads, kDimQk, kDimV, {total});
  const Keys exact(58, Format::bf16, Format::bf16, kKvHeads, kDimQk, kDimV, {total});
  Tokens q = random_queries(59, len, kHeads, kDimQk);
  // The parts stay where they are while queries arrive.
  const Mixed mixed(middle, exact, {4, {30}}, middle_homes(6)[1], exact_homes(6)[0]);
  const std::vector<index_t> all{total};
  for (const Way& way : ways(Format::e4m3, Format::i8_token)) {
    AttentionOptions options = options_of(way);
    options.len_k = all;
    const Answer whole = attend_stored(q, mixed.kv(), options);
    for (const index_t chunk : {1, 7, 49}) {
      for (index_t begin = 0; begin < len; begin += chunk) {
        const index_t count = std::min(chunk, len - begin);
        Tokens part(Format::f32, count, kHeads, kDimQk);
        const index_t row = kHeads * kDimQk;
        part.fill(std::vector<float>(q.values.begin() + begin * row, q.values.begin() + (begin + count) * row));
        const std::vector<index_t> in_use{past + begin + count};
        options.len_k = in_use;
        INFO(describe(way) << ", chunk " << chunk << " at " << begin);
        REQUIRE(same_tokens(whole, begin, attend_stored(part, mixed.kv(), options)));
      }
    }
  }
}
