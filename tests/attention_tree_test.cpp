// SPDX-License-Identifier: Apache-2.0
// Draft trees: a bit per pair of draft tokens = the same mask written out, in one call with prefill and decode over pages.
#include "catch_compat.hpp"
#include "fovea/adapters/std_threads.hpp"
#include "support/problem.hpp"
#include "support/stored.hpp"

namespace {

using namespace test;

constexpr index_t kHeads = 4, kKvHeads = 2, kDimQk = 24, kDimV = 40;

// Word i: draft i and its ancestors. Every bit that belongs to no draft is rubbish. More queries than bits are no drafts.
std::vector<std::uint64_t> random_tree(Random& random, index_t len) {
  if (len > 64) return std::vector<std::uint64_t>(at(len));
  std::vector<std::uint64_t> words;
  for (index_t i = 0; i < len; ++i) {
    const std::uint64_t parent = i == 0 || random.one_in(6) ? 0 : words[at(random.below(i))];
    words.push_back(parent | std::uint64_t{1} << i);
  }
  const std::uint64_t behind = len >= 64 ? 0 : ~std::uint64_t{0} << len;
  for (std::uint64_t& word : words) word = (word & ~behind) | (random.bits() & behind);
  return words;
}

// The ragged step of an engine that speculates: a prefill, drafts, plain decodes.
struct Step {
  std::vector<index_t> len_q, cu_q;
  Keys keys;
  Tokens q;
  std::vector<std::uint64_t> words;
  Dense4<std::uint8_t> mask;   // what the words mean

  Step(const FormatPair& pair, std::uint64_t seed, const std::vector<index_t>& queries, const std::vector<index_t>& len_k,
       Format q_format = Format::f32)
      : len_q(queries),
        cu_q(cumulative(queries)),
        keys(seed, pair.k, pair.v, kKvHeads, kDimQk, kDimV, len_k),
        q(random_queries(seed + 1, cumulative(queries).back(), kHeads, kDimQk, q_format)) {
    Random random(seed + 2);
    for (const index_t len : len_q) {
      const auto tree = random_tree(random, len);
      words.insert(words.end(), tree.begin(), tree.end());
    }
    write_out();
  }
  void write_out() {
    mask.extent = {static_cast<index_t>(len_q.size()), 1, *std::max_element(len_q.begin(), len_q.end()),
                   *std::max_element(keys.len.begin(), keys.len.end())};
    mask.values.assign(at(mask.extent[0] * mask.extent[2] * mask.extent[3]), 1);
    for (std::size_t s = 0; s < len_q.size(); ++s) {
      if (len_q[s] > 64) continue;
      for (index_t i = 0; i < len_q[s]; ++i) {
        for (index_t j = 0; j < len_q[s]; ++j) {
          const index_t key = keys.len[s] - len_q[s] + j;
          const bool seen = (words[at(cu_q[s] + i)] >> j & 1) != 0;
          if (key >= 0) mask.at(static_cast<index_t>(s), 0, i, key) = seen ? 1 : 0;
        }
      }
    }
  }
  AttentionOptions options(const Way& way) const {
    AttentionOptions o;
    o.cu_len_q = cu_q;
    o.len_k = keys.len;
    o.causal = Causal::bottom_right;
    o.regime = way.regime;
    o.panels = way.panels;
    return o;
  }
  AttentionOptions with_tree(AttentionOptions o) const {
    o.tree = words;
    return o;
  }
  AttentionOptions with_mask(AttentionOptions o) const {
    o.keep = mask.view();
    return o;
  }
  Expected expected(AttentionOptions o, const std::vector<bool>& packed) const {
    const std::vector<index_t> cu_k = cumulative(keys.len);
    o.keep = mask.view();
    o.len_k = {};
    o.cu_len_k = cu_k;
    return expect_stored(q.floats(), keys.k.floats(), keys.v.floats(), o, packed);
  }
};

Lodging pages_of(index_t page_size, std::uint64_t seed) {
  Lodging how;
  how.home = Home::paged;
  how.page_size = page_size;
  how.csr = seed % 2 == 0;
  how.seed = seed;
  return how;
}

// Drafts of 1 to 16 tokens whose keys lie across the borders of vectors, tiles and splits.
const std::vector<index_t> kQueries{70, 1, 16, 5, 1, 2, 9, 3, 0, 12, 64};
const std::vector<index_t> kKeys{133, 65, 260, 1026, 300, 257, 20, 3, 40, 135, 130};

}   // namespace

TEST_CASE("a tree = the mask it stands for, with prefill and decode in the same call", "[bits][tree]") {
  for (const FormatPair& pair : kFormatPairs) {
    const Step base(pair, 71, kQueries, kKeys);
    for (Way way : ways(pair.k, pair.v)) {
      for (const bool automatic : {false, true}) {
        if (automatic && way.regime != Regime::prefill) continue;   // once per panel type
        if (automatic) way.regime = Regime::automatic;
        Step step = base;
        const Housed paged(step.keys.k, step.keys.v, consecutive(step.keys.len), pages_of(16, 5));
        for (const Causal causal : {Causal::bottom_right, Causal::none}) {
          AttentionOptions options = step.options(way);
          options.causal = causal;
          INFO(describe(pair) << ", " << describe(way) << ", causal " << name(causal));
          const Answer tree = attend_stored(step.q, paged.kv(), step.with_tree(options));
          CHECK(tree == attend_stored(step.q, paged.kv(), step.with_mask(options)));
          if (!automatic) continue;
          std::vector<bool> packed;
          for (const index_t len : step.len_q)
            packed.push_back(way.panels == Panels::bf16 && len * kHeads / kKvHeads > fovea::decode_rows(way.panels));
          const WorstOf worst = worst_of(tree, step.expected(options, packed));
          INFO(worst.where);
          CHECK(worst.budgets <= 1);
        }
      }
    }
  }
}

TEST_CASE("trees of 1 to 16 drafts against the reference, with every other option", "[tree]") {
  Random random(72);
  for (index_t len = 1; len <= 16; ++len) {
    const FormatPair& pair = kFormatPairs[len % 8];
    Step step(pair, 73 + static_cast<std::uint64_t>(len), {len, 1, 17 - len},
              {len + random.below(300), 30, 17 - len + random.below(60)}, len % 2 == 0 ? Format::bf16 : Format::f32);
    const Housed paged(step.keys.k, step.keys.v, consecutive(step.keys.len), pages_of(random.pick<index_t>({1, 5, 16}), 6));
    const std::vector<float> sinks{0.5f, -1.f, 2.f, 0.f}, slopes{0.1f, 0.f, 0.03f, 0.5f};
    for (const Way& way : ways(pair.k, pair.v)) {
      AttentionOptions options = step.options(way);
      if (random.one_in(2)) options.sink = sinks;
      if (random.one_in(2)) options.alibi_slopes = slopes;
      if (random.one_in(2)) options.softcap = 8;
      if (random.one_in(2)) options.window = {random.between(0, 40), -1};
      if (random.one_in(3)) options.causal = Causal::none;
      INFO(describe(pair) << ", " << describe(way) << ", " << len << " drafts, window " << options.window.left
                          << ", softcap " << options.softcap << ", sink " << !options.sink.empty() << ", alibi "
                          << !options.alibi_slopes.empty());
      const Answer tree = attend_stored(step.q, paged.kv(), step.with_tree(options));
      CHECK(tree == attend_stored(step.q, paged.kv(), step.with_mask(options)));
      const WorstOf worst = worst_of(tree, step.expected(options, std::vector<bool>(3, way.panels == Panels::bf16)));
      INFO(worst.where);
      CHECK(worst.budgets <= 1);
    }
  }
}

TEST_CASE("a tree and a stored mask act together", "[bits][tree]") {
  const FormatPair& pair = kFormatPairs[1];
  Step step(pair, 90, {5, 16, 1}, {70, 300, 20});
  Dense4<std::uint8_t> other = step.mask, both = step.mask;
  Random random(91);
  for (std::size_t n = 0; n < other.values.size(); ++n) {
    other.values[n] = random.one_in(3) ? 0 : 255;
    both.values[n] = step.mask.values[n] != 0 && other.values[n] != 0;
  }
  const Housed paged(step.keys.k, step.keys.v, consecutive(step.keys.len), pages_of(16, 7));
  for (const Way& way : ways(pair.k, pair.v)) {
    AttentionOptions options = step.options(way), combined = step.options(way);
    options.keep = other.view();
    combined.keep = both.view();
    INFO(describe(way));
    CHECK(attend_stored(step.q, paged.kv(), step.with_tree(options)) == attend_stored(step.q, paged.kv(), combined));
  }
}

TEST_CASE("a tree that is a chain = causal", "[bits][tree]") {
  for (const FormatPair& pair : {kFormatPairs[1], kFormatPairs[3], kFormatPairs[5]}) {
    Step step(pair, 92, {16, 64, 1, 7}, {40, 300, 1, 7});
    for (std::size_t s = 0; s < step.len_q.size(); ++s) {
      for (index_t i = 0; i < step.len_q[s]; ++i)
        step.words[at(step.cu_q[s] + i)] = i == 63 ? ~std::uint64_t{0} : (std::uint64_t{2} << i) - 1;
    }
    const Housed paged(step.keys.k, step.keys.v, consecutive(step.keys.len), pages_of(8, 8));
    for (const Way& way : ways(pair.k, pair.v)) {
      const AttentionOptions causal = step.options(way);
      AttentionOptions tree = step.with_tree(causal);
      tree.causal = Causal::none;
      INFO(describe(pair) << ", " << describe(way));
      const Answer chain = attend_stored(step.q, paged.kv(), causal);
      CHECK(attend_stored(step.q, paged.kv(), tree) == chain);
      CHECK(attend_stored(step.q, paged.kv(), step.with_tree(causal)) == chain);
    }
  }
}

TEST_CASE("more than 64 queries have no tree, 64 have", "[bits][tree]") {
  for (const index_t len : {64, 65}) {
    Step step(kFormatPairs[1], 93, {len}, {200});
    const Housed paged(step.keys.k, step.keys.v, consecutive(step.keys.len), pages_of(16, 9));
    for (const Way& way : ways(Format::bf16, Format::bf16)) {
      const AttentionOptions options = step.options(way);
      const bool same =
          attend_stored(step.q, paged.kv(), step.with_tree(options)) == attend_stored(step.q, paged.kv(), options);
      INFO(len << " queries, " << describe(way));
      CHECK(same == (len > 64));
    }
  }
}

TEST_CASE("words of a batch lie one sequence after the other", "[bits][tree]") {
  const FormatPair& pair = kFormatPairs[3];
  Step step(pair, 94, {6, 6, 6}, {50, 7, 300});
  const Housed paged(step.keys.k, step.keys.v, consecutive(step.keys.len), pages_of(16, 10));
  for (const Way& way : ways(pair.k, pair.v)) {
    const AttentionOptions ragged = step.with_tree(step.options(way));
    AttentionOptions batched = ragged;
    batched.cu_len_q = {};
    INFO(describe(way));
    CHECK(attend_stored(step.q, paged.kv(), batched, 3) == attend_stored(step.q, paged.kv(), ragged));
  }
}

TEST_CASE("a sequence with its tree alone = inside the step, on any number of threads", "[bits][tree]") {
  const FormatPair& pair = kFormatPairs[1];
  Step step(pair, 95, kQueries, kKeys);
  const Housed paged(step.keys.k, step.keys.v, consecutive(step.keys.len), pages_of(16, 11));
  for (Way way : ways(pair.k, pair.v)) {
    for (const bool automatic : {false, true}) {
      if (automatic) way.regime = Regime::automatic;
      const Answer together = attend_stored(step.q, paged.kv(), step.with_tree(step.options(way)));
      INFO(describe(way));
      for (int lanes = 2; lanes <= 5; ++lanes) {
        fovea::StdThreads pool(lanes);
        AttentionOptions options = step.with_tree(step.options(way));
        options.executor = {pool, lanes};
        CHECK(attend_stored(step.q, paged.kv(), options) == together);
      }
      for (std::size_t s = 0; s < kQueries.size(); ++s) {
        if (kQueries[s] == 0) continue;
        Tokens q(Format::f32, kQueries[s], kHeads, kDimQk);
        const index_t row = kHeads * kDimQk;
        q.fill(
            std::vector<float>(step.q.values.begin() + step.cu_q[s] * row, step.q.values.begin() + step.cu_q[s + 1] * row));
        Kv alone = paged.kv();
        alone.block_table.data += static_cast<index_t>(s) * alone.block_table.stride[0];
        alone.block_table.extent[0] = 1;
        AttentionOptions options = step.options(way);
        options.cu_len_q = {};
        options.len_k = options.len_k.subspan(s, 1);
        options.tree = std::span(step.words).subspan(at(step.cu_q[s]), at(kQueries[s]));
        INFO("sequence " << s);
        CHECK(same_tokens(together, step.cu_q[s], attend_stored(q, alone, options)));
      }
    }
  }
}

TEST_CASE("NaN in a draft that a branch does not see leaves no trace", "[tree][poison]") {
  for (const FormatPair& pair : {kFormatPairs[0], kFormatPairs[1], kFormatPairs[3], kFormatPairs[7]}) {
    Step step(pair, 96, {8}, {130});
    // Two branches: even drafts see even ones, odd drafts odd ones.
    for (index_t i = 0; i < 8; ++i) step.words[at(i)] = (i % 2 == 0 ? 0x55u : 0xaau) & ((2u << i) - 1);
    const Housed clean(step.keys.k, step.keys.v, consecutive(step.keys.len), pages_of(16, 12));
    Housed dirty(step.keys.k, step.keys.v, consecutive(step.keys.len), pages_of(16, 12));
    for (index_t h = 0; h < kKvHeads; ++h) {
      const auto [entry, position] = dirty.place(0, 122 + 3);
      std::fill_n(dirty.k_at(entry, h, position), step.keys.k.bytes, kPoison);
      std::fill_n(dirty.v_at(entry, h, position), step.keys.v.bytes, kPoison);
    }
    for (const Way& way : ways(pair.k, pair.v)) {
      const AttentionOptions options = step.with_tree(step.options(way));
      const Answer before = attend_stored(step.q, clean.kv(), options), after = attend_stored(step.q, dirty.kv(), options);
      INFO(describe(pair) << ", " << describe(way));
      for (index_t token = 0; token < 8; ++token) {
        const bool sees = token % 2 == 1 && token >= 3;
        for (index_t h = 0; h < kHeads; ++h) {
          for (index_t d = 0; d < kDimV; ++d) {
            const double x = after.out.value(token * kHeads + h, d), y = before.out.value(token * kHeads + h, d);
            if (sees ? !std::isnan(x) : x != y)
              FAIL_CHECK("token " << token << ", head " << h << ": " << x << ", was " << y);
          }
        }
      }
    }
  }
}

// A step over pages of 16 that is refused with these words, nothing written.
void check_refused(Step& step, index_t queries, std::uint64_t seed, std::span<const std::uint64_t> tree, fovea::Code code,
                   std::initializer_list<const char*> words) {
  const Housed paged(step.keys.k, step.keys.v, consecutive(step.keys.len), pages_of(16, seed));
  Answer answer(Format::f32, queries, kHeads, kDimV);
  AttentionOptions options = step.options({Regime::automatic, Panels::f32});
  options.lse = answer.lse_view();
  options.tree = tree;
  const fovea::Status status = attend_all(step.q.operand(), paged.kv(), answer.out.result(), options);
  INFO(status.message());
  CHECK(status.code() == code);
  for (const char* const word : words) CHECK_THAT(std::string(status.message()), Catch::Matchers::ContainsSubstring(word));
  CHECK(answer.untouched());
}

TEST_CASE("words of more than 64 queries are refused unless they say that there is no tree", "[tree][errors]") {
  Step step(kFormatPairs[1], 98, {3, 65}, {20, 200});
  step.words[3 + 7] = 0xff;
  check_refused(step, 68, 14, step.words, fovea::Code::unsupported, {"sequence 1 has 65", "word 7 is 0xff"});
}

TEST_CASE("a tree needs a word per query", "[tree][errors]") {
  Step step(kFormatPairs[1], 97, {5, 3}, {20, 30});
  check_refused(step, 8, 13, std::span(step.words).subspan(1), fovea::Code::invalid_argument, {"7 words", "8 queries"});
}
