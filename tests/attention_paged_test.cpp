// SPDX-License-Identifier: Apache-2.0
// Pages: the bits of contiguous storage whatever the page size, the order of pages and what lies around them.
#include <optional>

#include "catch_compat.hpp"
#include "fovea/adapters/std_threads.hpp"
#include "support/executors.hpp"
#include "support/stored.hpp"

namespace {

using namespace test;

constexpr index_t kHeads = 4, kKvHeads = 2;

// A prefill chunk, a few drafts and a decode step, in one ragged call; dims with vector tails, keys beyond one split.
struct Step {
  std::vector<index_t> len_q{13, 4, 1}, cu_q = cumulative(len_q);
  Keys keys;
  Tokens q;

  explicit Step(const FormatPair& pair, std::uint64_t seed = 11, std::vector<index_t> len_k = {70, 290, 1090},
                index_t dim_qk = 40, index_t dim_v = 24)
      : keys(seed, pair.k, pair.v, kKvHeads, dim_qk, dim_v, len_k), q(random_queries(seed + 9, 18, kHeads, dim_qk)) {}

  AttentionOptions options(const Way& way) const {
    AttentionOptions o;
    o.cu_len_q = cu_q;
    o.len_k = keys.len;
    o.causal = Causal::bottom_right;
    o.regime = way.regime;
    o.panels = way.panels;
    return o;
  }
  Answer attend(const Kv& kv, const Way& way) { return attend_stored(q, kv, options(way)); }
};

Lodging pages_of(index_t page_size, std::uint64_t seed = 3) {
  Lodging how;
  how.home = Home::paged;
  how.page_size = page_size;
  how.seed = seed;
  how.csr = seed % 2 == 0;
  how.weave = std::array{Weave::head_major, Weave::token_major, Weave::interleaved}[at(static_cast<index_t>(seed % 3))];
  how.gap = static_cast<index_t>(seed % 4 == 3) * 3;
  return how;
}

}   // namespace

TEST_CASE("pages of any size and order = contiguous", "[bits][paged]") {
  std::uint64_t seed = 20;
  for (const FormatPair& pair : kFormatPairs) {
    Step step(pair);
    const Housed flat(step.keys.k, step.keys.v, consecutive(step.keys.len), {});
    for (const Way& way : ways(pair.k, pair.v)) {
      const Answer whole = step.attend(flat.kv(), way);
      CHECK_FALSE(whole.has_nan());
      for (const index_t page_size : {1, 2, 3, 8, 16, 31, 64, 256}) {
        if (page_size % 2 == 1 && page_size > 1 && seed % 3 != 0) continue;   // odd sizes for a third of them
        const Lodging how = pages_of(page_size, ++seed);
        const Housed paged(step.keys.k, step.keys.v, consecutive(step.keys.len), how);
        INFO(describe(pair) << ", " << describe(way) << ", " << describe(how));
        CHECK(step.attend(paged.kv(), way) == whole);
      }
    }
  }
}

TEST_CASE("repeated and shared pages = their keys written out", "[bits][paged]") {
  for (const FormatPair& pair : {kFormatPairs[1], kFormatPairs[3], kFormatPairs[6]}) {
    for (const index_t page_size : {1, 4, 16}) {
      Step step(pair, 12, {90, 140, 200});
      // Sequence 0 is the prefix of all; the end of sequence 2 repeats one page's tokens again and again.
      Placement tokens = consecutive(step.keys.len);
      for (std::size_t s = 1; s < 3; ++s) std::copy(tokens[0].begin(), tokens[0].end(), tokens[s].begin());
      for (index_t j = 96; j < 200; ++j) tokens[2][at(j)] = tokens[2][at(j % page_size)];
      Lodging how = pages_of(page_size, 5);
      how.share_pages = true;
      const Housed shared(step.keys.k, step.keys.v, tokens, how);
      how.share_pages = false;
      const Housed apart(step.keys.k, step.keys.v, tokens, how);
      const Housed flat(step.keys.k, step.keys.v, tokens, {});
      REQUIRE(shared.pages() + 90 / page_size < apart.pages());
      for (const Way& way : ways(pair.k, pair.v)) {
        INFO(describe(pair) << ", " << describe(way) << ", pages of " << page_size);
        const Answer whole = step.attend(flat.kv(), way);
        CHECK(step.attend(shared.kv(), way) == whole);
        CHECK(step.attend(apart.kv(), way) == whole);
      }
    }
  }
}

TEST_CASE("slots, pages and table entries not in use leave no trace", "[bits][paged][poison]") {
  std::uint64_t seed = 60;
  for (const FormatPair& pair : kFormatPairs) {
    Step step(pair, 13, {70, 129, 600});
    for (const index_t page_size : {1, 5, 16, 128}) {
      std::vector<std::optional<Answer>> first(ways(pair.k, pair.v).size());
      ++seed;
      for (const bool csr : {false, true}) {
        for (const std::byte fill : {kPoison, std::byte{0}, std::byte{0x7f}}) {
          for (const std::int32_t behind : {2147480000, -1, 0}) {
            if (fill != kPoison && behind == -1) continue;
            Lodging how = pages_of(page_size, seed);
            how.csr = csr;
            how.fill = fill;
            how.behind = behind;
            // Tables that end with the last page in use, and longer ones.
            how.columns_behind = behind == -1 ? 0 : 3;
            const Housed paged(step.keys.k, step.keys.v, consecutive(step.keys.len), how);
            std::size_t n = 0;
            for (const Way& way : ways(pair.k, pair.v)) {
              INFO(describe(pair) << ", " << describe(way) << ", " << describe(how) << ", behind " << behind);
              const Answer answer = step.attend(paged.kv(), way);
              CHECK_FALSE(answer.has_nan());
              if (!first[n]) first[n] = answer;
              CHECK(answer == *first[n++]);
            }
          }
        }
      }
      if (page_size == 5 && pair.k == Format::f32) break;
    }
  }
}

TEST_CASE("a paged sequence alone = inside a batch", "[bits][paged]") {
  for (const FormatPair& pair : kFormatPairs) {
    Step step(pair, 14);
    const Lodging how = pages_of(16, 7);
    const Housed paged(step.keys.k, step.keys.v, consecutive(step.keys.len), how);
    for (Way way : ways(pair.k, pair.v)) {
      for (const bool automatic : {false, true}) {
        if (automatic) way.regime = Regime::automatic;
        const Answer together = step.attend(paged.kv(), way);
        for (std::size_t s = 0; s < 3; ++s) {
          Tokens q(Format::f32, step.len_q[s], kHeads, 40);
          const index_t row = kHeads * 40;
          q.fill(std::vector<float>(step.q.values.begin() + step.cu_q[s] * row,
                                    step.q.values.begin() + step.cu_q[s + 1] * row));
          Kv alone = paged.kv();
          const std::vector<index_t> len{step.keys.len[s]};
          const auto sequence = static_cast<index_t>(s);
          if (how.csr) {
            alone.page_begin = std::span(paged.page_begin).subspan(s, 2);
          } else {
            alone.block_table.data += sequence * alone.block_table.stride[0];
            alone.block_table.extent[0] = 1;
          }
          AttentionOptions options = step.options(way);
          options.cu_len_q = {};
          options.len_k = len;
          INFO(describe(pair) << ", " << describe(way) << ", sequence " << s);
          CHECK(same_tokens(together, step.cu_q[s], attend_stored(q, alone, options)));
        }
      }
    }
  }
}

TEST_CASE("threads change no bit of a paged call", "[bits][paged]") {
  for (const FormatPair& pair : kFormatPairs) {
    Step step(pair, 15);
    const Housed paged(step.keys.k, step.keys.v, consecutive(step.keys.len), pages_of(16, 8));
    for (Way way : ways(pair.k, pair.v)) {
      for (const bool automatic : {false, true}) {
        if (automatic) way.regime = Regime::automatic;
        const Answer serial = step.attend(paged.kv(), way);
        for (int lanes = 1; lanes <= 5; ++lanes) {
          fovea::StdThreads pool(lanes);
          AttentionOptions options = step.options(way);
          options.executor = {pool, lanes};
          INFO(describe(pair) << ", " << describe(way) << ", " << lanes << " lanes");
          CHECK(attend_stored(step.q, paged.kv(), options) == serial);
        }
      }
    }
  }
}

TEST_CASE("chunked = whole prefill over a paged cache, in one forced regime", "[bits][paged][chunks]") {
  const index_t past = 21, len = 60, total = past + len;
  for (const FormatPair& pair : kFormatPairs) {
    Keys keys(16, pair.k, pair.v, kKvHeads, 33, 17, {total});
    Tokens q = random_queries(17, len, kHeads, 33);
    const Housed paged(keys.k, keys.v, consecutive(keys.len), pages_of(16, 9));
    for (const Way& way : ways(pair.k, pair.v)) {
      AttentionOptions options;
      options.causal = Causal::bottom_right;
      options.regime = way.regime;
      options.panels = way.panels;
      options.len_k = keys.len;
      const Answer whole = attend_stored(q, paged.kv(), options);
      for (const index_t chunk : {1, 7, 16, 59}) {
        for (index_t begin = 0; begin < len; begin += chunk) {
          const index_t count = std::min(chunk, len - begin);
          Tokens part(Format::f32, count, kHeads, 33);
          part.fill(
              std::vector<float>(q.values.begin() + begin * kHeads * 33, q.values.begin() + (begin + count) * kHeads * 33));
          const std::vector<index_t> in_use{past + begin + count};
          AttentionOptions of_part = options;
          of_part.len_k = in_use;
          INFO(describe(pair) << ", " << describe(way) << ", chunk " << chunk << " at " << begin);
          REQUIRE(same_tokens(whole, begin, attend_stored(part, paged.kv(), of_part)));
        }
      }
    }
  }
}

TEST_CASE("pages of latents, V the head of K's rows = contiguous, in chunks and with anything in unused slots", "[bits][paged]") {
  const index_t len_q = 5, total = 200, dim_qk = fovea::kLatentFp8Dim, dim_v = fovea::kLatentFp8Values;
  for (const Format format : {Format::latent_fp8, Format::bf16}) {
    const Rows k(format, 1, dim_qk, random_numbers(23, total * dim_qk)), v = head_of(k, dim_v);
    const std::vector<index_t> len{total};
    Tokens q = random_queries(24, len_q, 2, dim_qk);
    Lodging how;
    how.weave = Weave::v_in_k;
    const Housed flat(k, v, consecutive(len), how);
    for (const Way& way : ways(format, format)) {
      AttentionOptions options;
      options.causal = Causal::bottom_right;
      options.regime = way.regime;
      options.panels = way.panels;
      options.len_k = len;
      const Answer whole = attend_stored(q, flat.kv(), options);
      CHECK_FALSE(whole.has_nan());
      std::uint64_t seed = 80;
      for (const index_t page_size : {1, 16, 64}) {
        for (const std::byte fill : {kPoison, std::byte{0}, std::byte{0x7f}}) {
          how = pages_of(page_size, ++seed);
          how.weave = Weave::v_in_k;
          how.fill = fill;
          const Housed paged(k, v, consecutive(len), how);
          INFO(name_of(format) << ", " << describe(way) << ", " << describe(how) << ", filled with "
                               << std::to_integer<int>(fill));
          CHECK(attend_stored(q, paged.kv(), options) == whole);
          if (fill != kPoison) continue;
          const index_t chunk = 3;
          for (index_t begin = 0; begin < len_q; begin += chunk) {
            const index_t count = std::min(chunk, len_q - begin);
            Tokens part(Format::f32, count, 2, dim_qk);
            part.fill(std::vector<float>(q.values.begin() + begin * 2 * dim_qk,
                                         q.values.begin() + (begin + count) * 2 * dim_qk));
            const std::vector<index_t> in_use{total - len_q + begin + count};
            AttentionOptions of_part = options;
            of_part.len_k = in_use;
            CHECK(same_tokens(whole, begin, attend_stored(part, paged.kv(), of_part)));
          }
        }
      }
    }
  }
}

TEST_CASE("one plan serves caches of every format and page size", "[bits][paged][plan]") {
  fovea::Plan plan;
  std::optional<Step> first(kFormatPairs[1]);
  const fovea::AttentionShape shape{1, kHeads, kKvHeads, 18, 1090, 40, 24};
  const Way way{Regime::automatic, Panels::f32};
  REQUIRE(fovea::make_plan(plan, shape, first->options(way)).ok());
  std::uint64_t seed = 70;
  for (const FormatPair& pair : kFormatPairs) {
    Step step(pair);
    const Housed paged(step.keys.k, step.keys.v, consecutive(step.keys.len), pages_of(index_t{1} << seed % 8, seed));
    ++seed;
    const Answer direct = step.attend(paged.kv(), way);
    Answer planned(Format::f32, 18, kHeads, 24);
    AttentionOptions options = step.options(way);
    options.lse = planned.lse_view();
    std::vector<std::byte> workspace(fovea::workspace_bytes(plan), kPoison);
    options.workspace = workspace;
    const fovea::Status status = attend_all(plan, step.q.operand(), paged.kv(), planned.out.result(), options);
    INFO(describe(pair) << ": " << status.message());
    REQUIRE(status.ok());
    CHECK(planned == direct);
  }
}

TEST_CASE("a NaN in a stored row reaches those who see the key and nobody else", "[paged][poison]") {
  const index_t len = 40;
  for (const FormatPair& pair : kFormatPairs) {
    const Keys keys(18, pair.k, pair.v, 1, 24, 40, {len});
    Tokens q = random_queries(19, len, 2, 24);
    const Housed clean(keys.k, keys.v, consecutive(keys.len), pages_of(16, 10));
    for (const Way& way : ways(pair.k, pair.v)) {
      AttentionOptions options;
      options.causal = Causal::top_left;
      options.regime = way.regime;
      options.panels = way.panels;
      options.len_k = keys.len;
      const Answer before = attend_stored(q, clean.kv(), options);
      for (const index_t j : {1, 15, 16, 39}) {
        for (const bool in_key : {false, true}) {
          const Format format = in_key ? pair.k : pair.v;
          if (format == Format::i8_channel) continue;   // has no NaN
          Housed dirty(keys.k, keys.v, consecutive(keys.len), pages_of(16, 10));
          const auto [entry, position] = dirty.place(0, j);
          std::byte* const row = in_key ? dirty.k_at(entry, 0, position) : dirty.v_at(entry, 0, position);
          std::fill_n(row, in_key ? keys.k.bytes : keys.v.bytes, kPoison);
          const Answer after = attend_stored(q, dirty.kv(), options);
          INFO(describe(pair) << ", " << describe(way) << ", NaN in " << (in_key ? "key " : "value ") << j);
          bool same = true, shown = true;
          for (index_t token = 0; token < len; ++token) {
            for (index_t h = 0; h < 2; ++h) {
              const float lse = after.lse[at(h * len + token)], lse_before = before.lse[at(h * len + token)];
              for (index_t d = 0; d < 40; ++d) {
                const double x = after.out.value(token * 2 + h, d);
                if (token < j) same = same && x == before.out.value(token * 2 + h, d);
                if (token >= j) shown = shown && std::isnan(x);
              }
              if (token < j || !in_key) same = same && lse == lse_before;
              if (token >= j && in_key) shown = shown && std::isnan(lse);
            }
          }
          CHECK(same);
          CHECK(shown);
        }
      }
    }
  }
}

TEST_CASE("infinite keys and values in sight show, out of sight do not", "[paged][poison]") {
  const index_t len = 40, j = 17;
  for (const Format format : {Format::f32, Format::bf16, Format::f16, Format::e5m2}) {
    for (const Way& way : ways(format, format)) {
      for (const bool in_key : {false, true}) {
        auto k_numbers = random_numbers(20, len * 24), v_numbers = random_numbers(21, len * 24);
        const Keys clean(format, format, 1, 24, 24, {len}, k_numbers, v_numbers);
        for (index_t d = 0; d < 24; ++d)
          (in_key ? k_numbers : v_numbers)[at(j * 24 + d)] = std::numeric_limits<float>::infinity();
        const Keys dirty(format, format, 1, 24, 24, {len}, k_numbers, v_numbers);
        Tokens q = random_queries(22, len, 1, 24);
        AttentionOptions options;
        options.causal = Causal::top_left;
        options.regime = way.regime;
        options.panels = way.panels;
        options.len_k = clean.len;
        const Housed clean_home(clean.k, clean.v, consecutive(clean.len), pages_of(8, 6));
        const Housed dirty_home(dirty.k, dirty.v, consecutive(dirty.len), pages_of(8, 6));
        const Answer before = attend_stored(q, clean_home.kv(), options), after = attend_stored(q, dirty_home.kv(), options);
        INFO(name_of(format) << ", " << describe(way) << (in_key ? ", key" : ", value"));
        for (index_t token = 0; token < len; ++token) {
          for (index_t d = 0; d < 24; ++d) {
            const double x = after.out.value(token, d);
            if (token < j) REQUIRE(x == before.out.value(token, d));
            // An infinite score is NaN, or -inf: then the key has no weight, and its value shows nothing.
            if (token >= j && !in_key) REQUIRE(!std::isfinite(x));
            if (token >= j && in_key) REQUIRE((std::isnan(x) || x != before.out.value(token, d)));
          }
        }
      }
    }
  }
}
