// SPDX-License-Identifier: Apache-2.0
// Masks with a formula: each against its definition over small intervals of positions, pair by pair, and through attention
// against the double reference, which is given the same mask written out.
#include "fovea/engine/parts/pattern_masks.hpp"

#include "any_mask.hpp"
#include "support/dense.hpp"
#include "support/executors.hpp"

using namespace fovea;
using test::Dense;
using test::Values;

namespace {

constexpr index_t kFirstQuery = -5, kQueries = 75, kKeys = 90;

// Does the lane agree with the definition, whichever position the vector starts at?
template <class M, class Sees>
index_t wrong_lanes(const M& mask, int sequence, const Sees& sees) {
  index_t wrong = 0;
  for (index_t q = kFirstQuery; q < kQueries; ++q) {
    const auto keep = mask.at(Row{q, q - kFirstQuery, sequence, 1, 0});
    for (index_t start = 0; start < kKeys; ++start) {
      alignas(f32) float lanes[kLanes];
      select(keep(lane_numbers() + i32(static_cast<std::int32_t>(start))), f32(1.f), f32(0.f)).store_aligned(lanes);
      for (index_t i = 0; i < kLanes; ++i) wrong += (lanes[i] != 0.f) != sees(q, start + i);
    }
  }
  return wrong;
}

// Calls visit(rows, queries, keys, seen) for tiles of 1 to 9 positions of two heads against 1 to 40 keys.
template <class Sees, class Visit>
void each_tile(int sequence, const Sees& sees, const Visit& visit) {
  for (index_t q = kFirstQuery; q < kQueries - 9; q += 2) {
    for (const index_t count : {1, 2, 9}) {
      std::vector<Row> rows;
      for (index_t i = 0; i < 2 * count; ++i) rows.push_back({q + i / 2, i / 2, sequence, static_cast<int>(i % 2), 0});
      for (index_t k = 0; k < kKeys; k += 3) {
        for (const index_t keys : {1, 16, 40}) {
          index_t seen = 0;
          for (index_t i = q; i < q + count; ++i) {
            for (index_t j = k; j < k + keys; ++j) seen += sees(i, j);
          }
          const Cover truth = seen == 0 ? Cover::skip : seen == count * keys ? Cover::full : Cover::partial;
          visit(Tile{rows, k, k + keys}, Positions{q, q + count - 1}, truth);
        }
      }
    }
  }
}

template <class M, class Sees>
void check_policy(const char* name, const M& mask, const Sees& sees, int sequence = 0) {
  INFO(name << ", sequence " << sequence);
  STATIC_REQUIRE(Mask<M>);
  CHECK(wrong_lanes(mask, sequence, sees) == 0);
  index_t wrong_keeps = 0, wrong_covers = 0, wrong_intervals = 0, wrong_hulls = 0;
  for (index_t q = kFirstQuery; q < kQueries; ++q) {
    for (index_t k = 0; k < kKeys; ++k) wrong_keeps += keeps(mask, sequence, 1, q, k) != sees(q, k);
  }
  each_tile(sequence, sees, [&](const Tile& tile, Positions q, Cover truth) {
    const Cover cover = mask.cover(tile);
    wrong_covers += Analytic<M>::kExact || cover != Cover::partial ? cover != truth : 0;
    wrong_intervals += Analytic<M>::cover(mask, sequence, q, {tile.k_begin, tile.k_end - 1}) != cover;
    const KeyRange hull = mask.hull(tile.rows), keys = Analytic<M>::keys(mask, sequence, q);
    const bool outside = tile.k_end <= hull.begin || tile.k_begin >= hull.end;
    wrong_hulls += (outside && truth != Cover::skip) || keys.begin != hull.begin || keys.end != hull.end;
  });
  CHECK(wrong_keeps == 0);
  CHECK(wrong_covers == 0);
  CHECK(wrong_intervals == 0);
  CHECK(wrong_hulls == 0);
}

struct Written {
  std::vector<std::uint8_t> bytes;
  View<const std::uint8_t, 4> view{};
};

// The mask as bytes, with the positions of the options.
template <class Sees>
Written written(const Dense& x, const AttentionOptions& o, const Sees& sees) {
  const index_t batch = x.q.batch, len_q = x.q.len, len_k = x.k.len;
  Written mask{std::vector<std::uint8_t>(static_cast<std::size_t>(batch * len_q * len_k)), {}};
  mask.view = {mask.bytes.data(), {batch, 1, len_q, len_k}, {len_q * len_k, 0, len_k, 1}};
  std::size_t at = 0;
  for (index_t b = 0; b < batch; ++b) {
    const index_t first = !o.q_offset.empty()                ? o.q_offset[static_cast<std::size_t>(b)]
                          : o.causal == Causal::bottom_right ? len_k - len_q
                                                             : 0;
    for (index_t i = 0; i < len_q; ++i) {
      for (index_t j = 0; j < len_k; ++j) mask.bytes[at++] = sees(b, first + i, j);
    }
  }
  return mask;
}

// K and V of keys that no query sees become NaN.
void poison(Dense& x, const AttentionOptions& o, const Written& mask) {
  for (index_t b = 0; b < x.k.batch; ++b) {
    const auto pos = [&](index_t i) {
      if (!o.q_offset.empty()) return i + o.q_offset[static_cast<std::size_t>(b)];
      return o.causal == Causal::bottom_right ? i + x.k.len - x.q.len : i;
    };
    for (index_t j = 0; j < x.k.len; ++j) {
      bool seen = false;
      for (index_t i = 0; i < x.q.len && !seen; ++i)
        seen = mask.view(b, 0, i, j) != 0 && (o.causal == Causal::none || j <= pos(i));
      for (index_t h = 0; h < x.k.heads && !seen; ++h) {
        for (index_t d = 0; d < x.k.dim; ++d) x.k.view()(b, h, j, d) = test::canary();
        for (index_t d = 0; d < x.v.dim; ++d) x.v.view()(b, h, j, d) = test::canary();
      }
    }
  }
}

test::Result attend(const Dense& x, const AttentionOptions& options, const test::AnyMask& mask, int lanes = 1) {
  test::Result r = test::unwritten(x.q.view(), x.v.view());
  AttentionOptions o = options;
  o.lse = r.lse_view();
  test::ThreadPerLane pool;
  o.executor = {pool, lanes};
  const Status status = attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), o, variant().with_mask(mask));
  INFO(status.message());
  REQUIRE(status.ok());
  return r;
}

template <Mask M>
test::Result attend(const Dense& x, const AttentionOptions& options, const M& mask, int lanes = 1) {
  return attend(x, options, test::AnyMask(mask), lanes);
}

template <class M, class Sees>
void check_attention(const char* name, const M& mask, const Sees& sees, Dense x, AttentionOptions options) {
  INFO(name << ", len_q " << x.q.len << ", len_k " << x.k.len);
  const Written bytes = written(x, options, sees);
  poison(x, options, bytes);
  AttentionOptions reference = options;
  reference.keep = bytes.view;
  const test::Expected expected = test::expect(x.q.view(), x.k.view(), x.v.view(), reference);
  for (const Regime regime : {Regime::prefill, Regime::decode, Regime::wide_decode}) {
    INFO("regime " << static_cast<int>(regime));
    options.regime = regime;
    const test::Result one = attend(x, options, mask);
    CHECK(test::distance(one, expected) <= 1);
    CHECK(test::same_bits(one, attend(x, options, mask, 3)));
  }
}

// Two sequences with tables of their own.
const std::vector<index_t> kBorders{3, 10, 10, 26, 27, 60, 0, 33, 40}, kFirstBorder{0, 6, 9}, kPrefix{5, 20};

bool same_document(index_t sequence, index_t q, index_t k) {
  const auto document = [sequence](index_t p) {
    if (sequence == 1) return p < 0 || p >= 40 ? -1 : p < 33 ? 0 : 1;
    return p < 3 || p >= 60 ? -1 : p < 10 ? 0 : p < 26 ? 1 : p < 27 ? 2 : 3;
  };
  return document(q) >= 0 && document(q) == document(k);
}

std::vector<std::int32_t> ids_of_documents() {   // [2, 70]: mixed up, with padding
  std::vector<std::int32_t> ids;
  for (int p = 0; p < 70; ++p) ids.push_back(p < 30 ? 7 : p < 50 ? 2 : p < 64 ? 7 : -1);
  for (int p = 0; p < 70; ++p) ids.push_back(p % 9 == 0 ? -1 : p / 20);
  return ids;
}

// Draft trees of two sequences, each draft a child of an earlier one or of the prefix: seen[sequence][draft][draft], and the same
// in words, whose bits of no draft are rubbish.
struct Drafts {
  index_t count, per_draft;   // words
  std::vector<index_t> prefix;
  std::vector<std::uint8_t> seen;
  std::vector<std::uint64_t> words;

  Drafts(std::uint64_t seed, index_t drafts, std::vector<index_t> first)
      : count(drafts), per_draft((drafts + 63) / 64), prefix(std::move(first)) {
    test::Random random(seed);
    seen.resize(static_cast<std::size_t>(2 * count * count));
    for (index_t s = 0; s < 2; ++s) {
      for (index_t i = 0; i < count; ++i) {
        const index_t parent = i == 0 || random.one_in(9) ? -1 : std::max<index_t>(i - 1 - random.below(4), 0);
        for (index_t j = 0; parent >= 0 && j < i; ++j) at(s, i, j) = at(s, parent, j);
        at(s, i, i) = 1;
        std::vector<std::uint64_t> row(static_cast<std::size_t>(per_draft), 0);
        for (index_t j = 0; j < 64 * per_draft; ++j) {
          const bool bit = j < count ? at(s, i, j) != 0 : random.one_in(2);
          row[static_cast<std::size_t>(j / 64)] |= static_cast<std::uint64_t>(bit) << j % 64;
        }
        words.insert(words.end(), row.begin(), row.end());
      }
    }
  }
  std::uint8_t& at(index_t s, index_t i, index_t j) { return seen[static_cast<std::size_t>((s * count + i) * count + j)]; }
  bool sees(index_t s, index_t q, index_t k) const {
    const index_t i = q - prefix[static_cast<std::size_t>(s)], j = k - prefix[static_cast<std::size_t>(s)];
    if (j < 0) return true;
    return i >= 0 && i < count && j < count && seen[static_cast<std::size_t>((s * count + i) * count + j)] != 0;
  }
  Pattern<DraftTree> mask() const {
    return tree({words.data(), {2, count, per_draft}, {count * per_draft, per_draft, 1}}, prefix);
  }
};

}   // namespace

TEST_CASE("documents, by borders and by number, pair by pair", "[masks]") {
  for (const int s : {0, 1, 2})
    check_policy(
        "borders", documents(kBorders, kFirstBorder), [s](index_t q, index_t k) { return s < 2 && same_document(s, q, k); },
        s);
  check_policy("no borders", documents({}), [](index_t, index_t) { return false; });
  const std::vector<std::int32_t> ids = ids_of_documents();
  const auto by_number = [&ids](int s) {
    return [&ids, s](index_t q, index_t k) {
      const auto id = [&](index_t p) { return p < 0 || p >= 70 ? -1 : ids[static_cast<std::size_t>(70 * s + p)]; };
      return id(q) >= 0 && id(q) == id(k);
    };
  };
  for (const int s : {0, 1})
    check_policy("numbers", document_ids(View<const std::int32_t, 2>{ids.data(), {2, 70}, {70, 1}}), by_number(s), s);
  check_policy("numbers for all", document_ids(View<const std::int32_t, 2>{ids.data(), {1, 70}, {0, 1}}), by_number(0), 3);
  std::vector<std::int32_t> apart(210, 99);
  for (std::size_t p = 0; p < 70; ++p) apart[3 * p] = ids[p];
  check_policy("numbers apart", document_ids(View<const std::int32_t, 2>{apart.data(), {1, 70}, {0, 3}}), by_number(0));
}

TEST_CASE("prefix, chunks, global tokens and first tokens with a window, pair by pair", "[masks]") {
  for (const int s : {0, 1})
    check_policy(
        "prefix", prefix_lm(kPrefix), [s](index_t q, index_t k) { return k < (s == 0 ? 5 : 20) || k <= q; }, s);
  check_policy(
      "a prefix for all", prefix_lm(std::span(kPrefix).first(1)), [](index_t q, index_t k) { return k < 5 || k <= q; }, 4);
  for (const index_t size : {1, 7, 16, 100})
    check_policy("chunks", chunks(size), [size](index_t q, index_t k) {
      const auto chunk = [size](index_t p) { return (p + 100 * size) / size; };
      return chunk(q) == chunk(k);
    });
  for (const index_t count : {0, 3, 200})
    check_policy("global", global_tokens(count), [count](index_t q, index_t k) { return q < count || k < count; });
  for (const index_t sinks : {0, 4, 30}) {
    for (const index_t left : {0, 9})
      check_policy("sinks", sink_window(sinks, left), [=](index_t q, index_t k) { return k < sinks || q - k <= left; });
  }
}

TEST_CASE("dilation and strides, pair by pair", "[masks]") {
  for (const index_t step : {1, 2, 3, 5, 15, 16, 17, 33}) {
    for (const index_t reach : {0, 5, 34, -1})
      check_policy("dilated", dilated(step, reach), [=](index_t q, index_t k) {
        return (reach < 0 || std::abs(q - k) <= reach) && std::abs(q - k) % step == 0;
      });
  }
  for (const index_t stride : {1, 6})
    check_policy("strided", strided(stride),
                 [=](index_t q, index_t k) { return std::abs(q - k) < stride || std::abs(q - k) % stride == 0; });
}

TEST_CASE("compositions of patterns, pair by pair", "[masks]") {
  check_policy("band", band(3, 11), [](index_t q, index_t k) { return q - k <= 3 && k - q <= 11; });
  check_policy("causal documents", Both{band(-1, 0), documents(kBorders, kFirstBorder)},
               [](index_t q, index_t k) { return k <= q && same_document(0, q, k); });
  check_policy("Longformer", Either{dilated(2, 8), global_tokens(3)},
               [](index_t q, index_t k) { return q < 3 || k < 3 || (std::abs(q - k) <= 8 && (q - k) % 2 == 0); });
  check_policy("all or none", Either{Everything{}, chunks(4)}, [](index_t, index_t) { return true; });
  check_policy(
      "chunks of documents", Either{Both{chunks(8), documents(kBorders, kFirstBorder)}, sink_window(1, 0)},
      [](index_t q, index_t k) { return ((q + 800) / 8 == (k + 800) / 8 && same_document(0, q, k)) || k < 1 || k >= q; });
}

TEST_CASE("draft trees, pair by pair", "[masks]") {
  for (const auto& [drafts, first] : {std::pair{1, 20}, std::pair{12, 0}, std::pair{63, 3}, std::pair{64, 17}, std::pair{65, 9},
                                      std::pair{200, 5}, std::pair{40, 200}, std::pair{0, 30}}) {
    const Drafts x(static_cast<std::uint64_t>(drafts), drafts, {first, 11});
    INFO(drafts << " drafts from " << first);
    for (const int s : {0, 1})
      check_policy(
          "tree", x.mask(), [&x, s](index_t q, index_t k) { return x.sees(s, q, k); }, s);
    if (drafts != 65) continue;
    // One tree and one prefix for all; no tree for a sequence behind the last; words apart.
    const std::span<const index_t> one = std::span(x.prefix).first(1);
    const View<const std::uint64_t, 3> shared{x.words.data(), {1, drafts, x.per_draft}, {0, x.per_draft, 1}};
    check_policy(
        "a tree for all", tree(shared, one), [&x](index_t q, index_t k) { return x.sees(0, q, k); }, 5);
    check_policy(
        "no tree", tree(x.mask().rule.words, x.prefix), [](index_t, index_t k) { return k < 0; }, 2);
    std::vector<std::uint64_t> apart(3 * x.words.size(), ~std::uint64_t{0});
    for (std::size_t n = 0; n < x.words.size(); ++n) apart[3 * n] = x.words[n];
    const index_t row = 3 * x.per_draft;
    const View<const std::uint64_t, 3> spread{apart.data(), {2, drafts, x.per_draft}, {drafts * row, row, 3}};
    check_policy(
        "words apart", tree(spread, x.prefix), [&x](index_t q, index_t k) { return x.sees(1, q, k); }, 1);
  }
  const Drafts x(3, 40, {20, 20});
  check_policy("a tree in a band", Both{band(15, 0), x.mask()},
               [&x](index_t q, index_t k) { return k <= q && q - k <= 15 && x.sees(0, q, k); });
  check_policy("a tree beside first tokens", Either{x.mask(), sink_window(25, 2)},
               [&x](index_t q, index_t k) { return k < 25 || q - k <= 2 || x.sees(0, q, k); });

  const std::vector<std::uint64_t> words(9);
  const auto refusal = [&](std::array<index_t, 3> extent, std::span<const index_t> prefix) {
    return std::string(tree({words.data(), extent, {0, 0, 0}}, prefix).check({}).message());
  };
  CHECK(refusal({1, 64, 1}, x.prefix).empty());
  CHECK_THAT(refusal({1, 65, 1}, x.prefix), Catch::Matchers::ContainsSubstring("1 words of 64 bits for each of 65 drafts"));
  CHECK_THAT(refusal({1, 64, 1}, {}), Catch::Matchers::ContainsSubstring("0 prefixes"));
  CHECK(!tree({nullptr, {1, 4, 1}, {4, 1, 1}}, x.prefix).check({}).ok());
  CHECK(!tree({x.words.data(), {1, INT64_MAX, 0}, {0, 0, 0}}, x.prefix).check({}).ok());
  const std::vector<index_t> beyond{INT64_MIN};
  CHECK(!tree({x.words.data(), {1, 4, 1}, {0, 0, 0}}, beyond).check({}).ok());
  CHECK_FALSE(refusal({0, 64, 1}, x.prefix).empty());
}

TEST_CASE("quotients without a division", "[masks]") {
  for (const index_t by : {1, 2, 3, 5, 7, 12, 64, 100, 128, 641, 65535, 65537, 1 << 30, INT32_MAX - 1, INT32_MAX}) {
    const Divisor divisor(by);
    test::Random random(static_cast<std::uint64_t>(by));
    index_t wrong = 0;
    for (int n = 0; n < 2000; ++n) {
      const index_t near = random.below(INT32_MAX / by + 1) * by, any = random.below(index_t{1} << 31);
      for (const index_t value : {near, std::max<index_t>(near - 1, 0), any, index_t{INT32_MAX}})
        wrong += divisor.quotient(value) != value / by;
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("patterns through attention meet the double reference", "[masks]") {
  for (const index_t len : {1, 15, 16, 17, 255, 256, 257}) {
    const Dense x(static_cast<std::uint64_t>(len), 1, 4, 2, len, len, 9, 7);
    const std::vector<index_t> borders{1, 14, 16, 16, 130, std::max<index_t>(len - 1, 130)}, prefix{100};
    const AttentionOptions causal{.causal = Causal::top_left};
    check_attention(
        "documents", documents(borders),
        [&](index_t, index_t q, index_t k) {
          for (std::size_t d = 0; d + 1 < borders.size(); ++d) {
            if (q >= borders[d] && q < borders[d + 1] && k >= borders[d] && k < borders[d + 1]) return true;
          }
          return false;
        },
        x, causal);
    check_attention("prefix", prefix_lm(prefix), [](index_t, index_t q, index_t k) { return k < 100 || k <= q; }, x, {});
    check_attention(
        "chunks", chunks(48), [](index_t, index_t q, index_t k) { return q / 48 == k / 48; }, x, causal);
    check_attention(
        "Longformer", Either{dilated(3, 30), global_tokens(2)},
        [](index_t, index_t q, index_t k) { return q < 2 || k < 2 || (std::abs(q - k) <= 30 && (q - k) % 3 == 0); }, x, {});
    check_attention("sinks", sink_window(4, 20), [](index_t, index_t q, index_t k) { return k < 4 || q - k <= 20; }, x,
                    {.causal = Causal::top_left, .window = {.left = 200}});
  }
}

TEST_CASE("patterns of several sequences, at shifted positions", "[masks]") {
  const Dense x(77, 2, 6, 2, 40, 68, 20, 12);
  const std::vector<index_t> offset{-4, 25};
  for (const AttentionOptions& options :
       {AttentionOptions{.causal = Causal::bottom_right}, AttentionOptions{.q_offset = offset}}) {
    check_attention(
        "documents", documents(kBorders, kFirstBorder),
        [](index_t s, index_t q, index_t k) { return same_document(s, q, k); }, x, options);
    check_attention(
        "prefix", prefix_lm(kPrefix), [](index_t s, index_t q, index_t k) { return k < (s == 0 ? 5 : 20) || k <= q; }, x,
        options);
    const std::vector<std::int32_t> ids = ids_of_documents();
    check_attention(
        "numbers", document_ids(View<const std::int32_t, 2>{ids.data(), {2, 70}, {70, 1}}),
        [&](index_t s, index_t q, index_t k) {
          const auto id = [&](index_t p) { return p < 0 || p >= 70 ? -1 : ids[static_cast<std::size_t>(70 * s + p)]; };
          return id(q) >= 0 && id(q) == id(k);
        },
        x, options);
    const Drafts drafts(78, 30, {20, 29});
    check_attention(
        "tree", drafts.mask(), [&](index_t s, index_t q, index_t k) { return drafts.sees(s, q, k); }, x, options);
  }
}

TEST_CASE("patterns that say what options say give their bits", "[masks][bits]") {
  const Dense x(5, 1, 4, 2, 270, 270, 16, 16);
  const std::vector<index_t> none{0}, all{270}, borders{0, 48, 96, 144, 192, 240, 288}, one{0, 270};
  for (const Regime regime : test::kRegimes) {
    const AttentionOptions full{.regime = regime}, causal{.causal = Causal::top_left, .regime = regime};
    const test::Result plain = test::attend(x, full), triangle = test::attend(x, causal);
    CHECK(test::same_bits(attend(x, full, prefix_lm(none)), triangle));
    CHECK(test::same_bits(attend(x, full, prefix_lm(all)), plain));
    CHECK(test::same_bits(attend(x, full, documents(one)), plain));
    CHECK(test::same_bits(attend(x, full, global_tokens(270)), plain));
    CHECK(test::same_bits(attend(x, causal, chunks(48)), attend(x, causal, documents(borders))));
    const AttentionOptions window{.window = {.left = 20, .right = 20}, .regime = regime};
    CHECK(test::same_bits(attend(x, full, dilated(1, 20)), test::attend(x, window)));
    CHECK(test::same_bits(attend(x, full, band(20, 20)), test::attend(x, window)));
    const AttentionOptions left{.causal = Causal::top_left, .window = {.left = 20}, .regime = regime};
    CHECK(test::same_bits(attend(x, causal, sink_window(0, 20)), test::attend(x, left)));
  }
}

TEST_CASE("a tree as a mask has the bits of the option's", "[masks][bits]") {
  const Drafts drafts(79, 40, {230, 230});
  const Dense x(80, 2, 4, 2, 40, 270, 16, 16);
  for (const Regime regime : {Regime::prefill, Regime::decode, Regime::wide_decode}) {
    for (const Causal causal : {Causal::bottom_right, Causal::none}) {
      INFO("regime " << static_cast<int>(regime) << ", causal " << static_cast<int>(causal));
      AttentionOptions options{.causal = causal, .q_offset = drafts.prefix, .regime = regime};
      AttentionOptions by_option = options;
      by_option.tree = drafts.words;
      const test::Result masked = attend(x, options, drafts.mask());
      CHECK(test::same_bits(masked, test::attend(x, by_option)));
      CHECK_FALSE(test::same_bits(masked, test::attend(x, options)));
    }
  }
  // More drafts than a word has bits: a chain of 130 is causal.
  const std::vector<index_t> prefix{140};
  std::vector<std::uint64_t> chain;
  for (index_t i = 0; i < 130; ++i) {
    for (index_t j = 0; j < 3; ++j)
      chain.push_back(i >= 64 * j + 63 ? ~std::uint64_t{0} : i < 64 * j ? 0 : (std::uint64_t{2} << (i - 64 * j)) - 1);
  }
  const Dense y(81, 1, 4, 2, 130, 270, 16, 16);
  for (const Regime regime : test::kRegimes) {
    AttentionOptions options{.q_offset = prefix, .regime = regime}, causal = options;
    causal.causal = Causal::bottom_right;
    CHECK(test::same_bits(attend(y, options, tree({chain.data(), {1, 130, 3}, {0, 3, 1}}, prefix)), test::attend(y, causal)));
  }
}

TEST_CASE("packed documents are the ragged batch of them", "[masks]") {
  const std::vector<index_t> borders{0, 17, 17, 50, 306, 320};
  const Dense x(6, 1, 4, 2, 320, 320, 16, 16);
  AttentionOptions ragged{.causal = Causal::top_left};
  ragged.cu_len_q = ragged.cu_len_k = borders;
  const test::Expected budget = test::expect(x.q.view(), x.k.view(), x.v.view(), ragged);
  CHECK(test::distance(attend(x, {.causal = Causal::top_left}, documents(borders)), test::attend(x, ragged), budget) <= 1);
}

TEST_CASE("other documents and later keys leave no trace in a row", "[masks][bits]") {
  const std::vector<index_t> borders{0, 100, 180, 300};
  Dense x(7, 1, 4, 2, 300, 300, 16, 16);
  for (const Regime regime : {Regime::prefill, Regime::decode, Regime::wide_decode}) {
    const AttentionOptions causal{.causal = Causal::top_left, .regime = regime};
    const test::Result before = attend(x, causal, documents(borders));
    Dense y = x;
    for (index_t j = 0; j < 300; ++j) {
      if (j >= 100 && j < 150) continue;   // left alone: what the queries 100 .. 149 see
      for (index_t h = 0; h < 2; ++h) {
        for (index_t d = 0; d < 16; ++d)
          y.k.view()(0, h, j, d) = y.v.view()(0, h, j, d) = j % 2 == 0 ? test::canary() : 1e30f;
      }
    }
    const test::Result after = attend(y, causal, documents(borders));
    index_t moved = 0;
    for (index_t h = 0; h < 4; ++h) {
      for (index_t i = 100; i < 150; ++i) {
        moved += std::memcmp(&before.out.view()(0, h, i, 0), &after.out.view()(0, h, i, 0), 16 * sizeof(float)) != 0;
        moved += before.lse_at(0, h, i) != after.lse_at(0, h, i);
      }
    }
    CHECK(moved == 0);
  }
}

TEST_CASE("extreme rows under patterns", "[masks]") {
  // Scores up to +-1e4 that rise or fall along the keys; the documents leave the first and the last position out, and one of
  // them holds a single position.
  const std::vector<index_t> borders{1, 60, 61, 275};
  for (const float step : {75.f, -75.f}) {
    Dense x(8, 1, 2, 1, 276, 276, 1, 5);
    for (index_t j = 0; j < 276; ++j) {
      x.k.view()(0, 0, j, 0) = step * static_cast<float>(j - 138);
      for (index_t h = 0; h < 2; ++h) x.q.view()(0, h, j, 0) = h == 0 ? 1.f : -0.5f;
    }
    const auto sees = [](index_t, index_t q, index_t k) {
      const auto document = [](index_t p) { return p < 1 || p >= 275 ? -1 : p < 60 ? 0 : p < 61 ? 1 : 2; };
      return document(q) >= 0 && document(q) == document(k);
    };
    check_attention("steep", documents(borders), sees, x, {.scale = 1.f});
    const test::Result r = attend(x, {.scale = 1.f}, documents(borders));
    for (const index_t empty : {0, 275}) {
      CHECK(r.lse_at(0, 1, empty) == -std::numeric_limits<float>::infinity());
      for (index_t d = 0; d < 5; ++d) CHECK(r.at(0, 1, empty, d) == 0.f);
    }
    // The only visible key: weight times value, times the rounded inverse of the weight.
    for (index_t d = 0; d < 5; ++d) {
      const double value = double{x.v.view()(0, 0, 60, d)};
      CHECK(std::abs(double{r.at(0, 0, 60, d)} - value) <= 4 * test::kUnit * std::abs(value));
    }
  }
}

TEST_CASE("golden: two documents of the scores 1, 0, -1", "[masks]") {
  Dense x(9, 1, 1, 1, 6, 6, 1, 6);
  x.v = test::identity_values(1, 1, 6);
  for (index_t i = 0; i < 6; ++i) {
    x.q.view()(0, 0, i, 0) = 1;
    x.k.view()(0, 0, i, 0) = static_cast<float>(1 - i % 3);
  }
  const std::vector<index_t> borders{0, 3, 6};
  const double golden[] = {0.6652410, 0.2447285, 0.0900306};
  for (const Regime regime : test::kRegimes) {
    const test::Result r = attend(x, {.scale = 1.f, .regime = regime}, documents(borders));
    for (index_t i = 0; i < 6; ++i) {
      CHECK(static_cast<double>(r.lse_at(0, 0, i)) == Catch::Approx(1.4076060).epsilon(1e-6));
      for (index_t j = 0; j < 6; ++j) {
        if (i / 3 != j / 3) {
          CHECK(r.at(0, 0, i, j) == 0.f);
        } else {
          CHECK(static_cast<double>(r.at(0, 0, i, j)) == Catch::Approx(golden[j % 3]).epsilon(1e-6));
        }
      }
    }
  }
}
