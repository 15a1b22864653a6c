// SPDX-License-Identifier: Apache-2.0
// Block masks: what is built, against counting pair by pair; what the policy answers, against the mask's definition;
// attention through it, against the double reference and, bit for bit, against the same mask without blocks.
#include "fovea/engine/parts/block_mask.hpp"

#include "any_mask.hpp"
#include "fovea/mechanisms/entmax.hpp"
#include "support/dense.hpp"
#include "support/executors.hpp"

using namespace fovea;
using test::Dense;
using test::kRegimes;

namespace {

// Depends on everything it is told; whole blocks of it are full and empty.
struct Knotted {
  template <class K>
  auto operator()(int batch, int head, int q, K k) const {
    const int near = 40 + 30 * head;
    return ((k <= q - 3 * batch) & (q - k < near)) | (k < 5 - batch) | ((k >= 64) & (k < 96 + 40 * batch));
  }
};
bool knotted(index_t b, index_t h, index_t q, index_t k) {
  return Knotted{}(static_cast<int>(b), static_cast<int>(h), static_cast<int>(q), static_cast<int>(k));
}

Cover count(const BlockMaskShape& s, index_t b, index_t h, index_t q_block, index_t k_block) {
  index_t seen = 0;
  for (index_t q = q_block * s.q_block; q < std::min((q_block + 1) * s.q_block, s.len_q); ++q) {
    for (index_t k = k_block * s.k_block; k < std::min((k_block + 1) * s.k_block, s.len_k); ++k) seen += knotted(b, h, q, k);
  }
  return seen == 0 ? Cover::skip : seen == s.q_block * s.k_block ? Cover::full : Cover::partial;
}

// Number of blocks that differ from `truth(b, h, q_block, k_block)`.
template <class Truth>
index_t wrong_blocks(const BlockMaskView& mask, const Truth& truth) {
  const BlockMaskShape& s = mask.shape();
  index_t wrong = 0;
  BlockCounts counts{0, 0, 0};
  for (index_t b = 0; b < s.batch; ++b) {
    for (index_t h = 0; h < s.q_heads; ++h) {
      for (index_t i = 0; i < mask.q_blocks(); ++i) {
        for (index_t j = 0; j < mask.k_blocks(); ++j) {
          const Cover cover = mask.block(b, h, i, j);
          wrong += cover != truth(b, h, i, j);
          ++(cover == Cover::full ? counts.full : cover == Cover::partial ? counts.partial : counts.empty);
        }
      }
    }
  }
  const BlockCounts told = mask.counts();
  return wrong + (told.full != counts.full) + (told.partial != counts.partial) + (told.empty != counts.empty);
}

BlockMask made(const BlockMaskShape& shape) {
  BlockMask mask;
  const Status status = mask.build(shape, Knotted{});
  INFO(status.message());
  REQUIRE(status.ok());
  return mask;
}

// Does the policy agree with `sees(b, h, q, k)`, for groups of rows and key tiles as the engine makes them and at odd
// places?
template <class M, class Sees>
void check_policy(const M& mask, const BlockMaskShape& s, const Sees& sees) {
  index_t wrong_lanes = 0, wrong_covers = 0, wrong_hulls = 0;
  const index_t q_blocks = BlockMaskView::blocks(s.len_q, s.q_block), k_blocks = BlockMaskView::blocks(s.len_k, s.k_block);
  std::vector<Cover> blocks;   // [q_head, q_block, k_block] of sequence 1
  for (index_t n = 0; n < s.q_heads * q_blocks * k_blocks; ++n)
    blocks.push_back(count(s, 1, n / k_blocks / q_blocks, n / k_blocks % q_blocks, n % k_blocks));
  const auto block_of = [&](const Row& row, index_t k) {
    if (row.pos < 0 || row.pos >= s.len_q || k >= s.len_k) return Cover::skip;
    return blocks[static_cast<std::size_t>((row.q_head * q_blocks + row.pos / s.q_block) * k_blocks + k / s.k_block)];
  };
  for (const index_t first : {-20, -3, 0, 5, 58, 120, 127, 150, 200}) {
    for (const auto& [positions, heads] : {std::pair{12, 1}, std::pair{16, 1}, std::pair{4, 3}, std::pair{1, 2}}) {
      std::vector<Row> rows;
      for (int i = 0; i < positions; ++i) {
        for (int h = 0; h < heads; ++h) rows.push_back({first + i, i, 1, h, 0});
      }
      const KeyRange hull = mask.hull(rows);
      for (const index_t begin : {0, 31, 64, 128, 250}) {
        for (const index_t keys : {1, 16, 64, 128, 256}) {
          index_t seen = 0;
          bool some_block = false, all_blocks = true;
          for (const Row& row : rows) {
            for (index_t k = begin; k < begin + keys; ++k) {
              const bool sees_it = sees(row.sequence, row.q_head, row.pos, k);
              seen += sees_it;
              wrong_hulls += sees_it && (k < hull.begin || k >= hull.end);
              const Cover block = block_of(row, k);
              some_block = some_block || block != Cover::skip;
              all_blocks = all_blocks && block == Cover::full;
            }
          }
          const Cover cover = mask.cover(Tile{rows, begin, begin + keys});
          wrong_covers += cover != (!some_block ? Cover::skip : all_blocks ? Cover::full : Cover::partial);
          wrong_covers += cover == Cover::skip && seen != 0;
          wrong_covers += cover == Cover::full && seen != static_cast<index_t>(rows.size()) * keys;
        }
      }
      for (const Row& row : rows) {
        const auto keep = mask.at(row);
        for (index_t start = 0; start < 300; start += start < 40 ? 1 : 7) {
          alignas(f32) float lanes[kLanes];
          select(keep(lane_numbers() + i32(static_cast<std::int32_t>(start))), f32(1.f), f32(0.f)).store_aligned(lanes);
          for (index_t i = 0; i < kLanes; ++i)
            wrong_lanes += (lanes[i] != 0.f) != sees(row.sequence, row.q_head, row.pos, start + i);
        }
      }
    }
  }
  CHECK(wrong_lanes == 0);
  CHECK(wrong_covers == 0);
  CHECK(wrong_hulls == 0);
}

struct Written {
  std::vector<std::uint8_t> bytes;
  View<const std::uint8_t, 4> view{};
};
// sees(b, h, q, k) over the positions of a call, query 0 of each sequence at `first`.
template <class Sees>
Written written(const Dense& x, index_t first, const Sees& sees) {
  Written mask{{}, {}};
  for (index_t b = 0; b < x.q.batch; ++b) {
    for (index_t h = 0; h < x.q.heads; ++h) {
      for (index_t i = 0; i < x.q.len; ++i) {
        for (index_t j = 0; j < x.k.len; ++j) mask.bytes.push_back(sees(b, h, first + i, j) ? 1 : 0);
      }
    }
  }
  const index_t row = x.k.len, head = row * x.q.len;
  mask.view = {mask.bytes.data(), {x.q.batch, x.q.heads, x.q.len, x.k.len}, {head * x.q.heads, head, row, 1}};
  return mask;
}

// K and V of keys that no row of their kv head sees become NaN.
void poison(Dense& x, const Written& mask) {
  const index_t group = x.q.heads / x.k.heads;
  for (index_t b = 0; b < x.k.batch; ++b) {
    for (index_t h = 0; h < x.k.heads; ++h) {
      for (index_t j = 0; j < x.k.len; ++j) {
        bool seen = false;
        for (index_t n = 0; n < group * x.q.len && !seen; ++n)
          seen = mask.view(b, h * group + n / x.q.len, n % x.q.len, j) != 0;
        for (index_t d = 0; d < x.k.dim && !seen; ++d) x.k.view()(b, h, j, d) = test::canary();
        for (index_t d = 0; d < x.v.dim && !seen; ++d) x.v.view()(b, h, j, d) = test::canary();
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

// Whole blocks of keys are dead, partly visible or visible, others in each sequence. Lanes in the other two lie: in a dead block they
// keep everything, in a full one nothing.
struct Striped {
  static constexpr index_t kBlock = 256;   // a key tile never holds keys of two
  struct Asked {
    index_t dead = 0, full = 0, partial = 0;   // covers
    index_t lanes = 0, wrong_lanes = 0;        // in partial blocks, elsewhere
  };
  Asked* asked;

  static Cover block(index_t sequence, index_t k) {
    return std::array{Cover::skip, Cover::full, Cover::partial}[static_cast<std::size_t>((k / kBlock + sequence) % 3)];
  }
  static bool sees(index_t sequence, index_t q, index_t k) {
    const Cover cover = block(sequence, k);
    return cover == Cover::full || (cover == Cover::partial && (q + k) % 3 != 0);
  }

  struct Lane {
    const Striped* mask;
    Row row;
    keep_t operator()(i32 pos) const {
      const index_t first = first_lane(pos);
      const Cover cover = block(row.sequence, first);
      ++(cover == Cover::partial ? mask->asked->lanes : mask->asked->wrong_lanes);
      alignas(f32) float keep[kLanes];
      for (index_t i = 0; i < kLanes; ++i)
        keep[i] = cover == Cover::partial ? sees(row.sequence, row.pos, first + i) : cover == Cover::skip;
      return f32::load_aligned(keep) != f32(0.f);
    }
  };
  Lane at(const Row& row) const { return {this, row}; }
  KeyRange hull(std::span<const Row>) const { return {0, PTRDIFF_MAX}; }
  Cover cover(const Tile& tile) const {
    const Cover cover = block(tile.rows.front().sequence, tile.k_begin);
    ++(cover == Cover::skip ? asked->dead : cover == Cover::full ? asked->full : asked->partial);
    return cover;
  }
};

template <class M, class Sees>
void check_attention(const M& mask, const Sees& sees, Dense x, index_t first) {
  const Written bytes = written(x, first, sees);
  poison(x, bytes);
  const std::vector<index_t> offset(static_cast<std::size_t>(x.q.batch), first);
  AttentionOptions options{.q_offset = offset};
  options.keep = bytes.view;
  const test::Expected expected = test::expect(x.q.view(), x.k.view(), x.v.view(), options);
  options.keep = {};
  for (const Regime regime : kRegimes) {
    INFO("queries " << x.q.len << " from " << first << ", keys " << x.k.len << ", regime " << static_cast<int>(regime));
    options.regime = regime;
    const test::Result one = attend(x, options, mask);
    CHECK(test::distance(one, expected) <= 1);
    CHECK(test::same_bits(one, attend(x, options, mask, 3)));
  }
}

}   // namespace

TEST_CASE("a block mask counts the pairs of each block", "[masks]") {
  for (const auto& [q_block, k_block] : {std::pair{1, 1}, std::pair{3, 5}, std::pair{16, 16}, std::pair{7, 64},
                                         std::pair{32, 48}, std::pair{128, 128}, std::pair{100, 1000}}) {
    for (const index_t len : {0, 1, 16, 131}) {
      const BlockMaskShape shape{
          .batch = 2, .q_heads = 3, .len_q = len, .len_k = 2 * len, .q_block = q_block, .k_block = k_block};
      INFO("len_q " << len << ", blocks " << q_block << " x " << k_block);
      const BlockMask mask = made(shape);
      CHECK(wrong_blocks(mask, [&](index_t b, index_t h, index_t i, index_t j) { return count(shape, b, h, i, j); }) == 0);
    }
  }
}

TEST_CASE("formulas build what their pairs build", "[masks]") {
  const std::vector<index_t> borders{3, 10, 10, 26, 90, 128, 0, 33, 200}, first{0, 6, 9}, prefix{20, 70};
  std::vector<std::int32_t> ids;
  for (int p = 0; p < 260; ++p) ids.push_back(p % 50 == 0 ? -1 : p / 16 % 5);
  const auto check = [](const auto& mask) {
    for (const auto& [q_block, k_block] : {std::pair{16, 16}, std::pair{5, 33}, std::pair{64, 8}, std::pair{1, 1}}) {
      const BlockMaskShape s{.batch = 2, .len_q = 130, .len_k = 150, .q_block = q_block, .k_block = k_block};
      BlockMask by_formula, by_pair;
      REQUIRE(by_formula.build(s, mask).ok());
      REQUIRE(by_pair
                  .build(s,
                         [&mask](int b, int h, int q, i32 k) {
                           return mask.at(Row{q, q, b, h, 0})(k);   // a callable has no formula
                         })
                  .ok());
      const BlockMaskView expected = by_pair;
      CHECK(wrong_blocks(by_formula,
                         [&](index_t b, index_t h, index_t i, index_t j) { return expected.block(b, h, i, j); }) == 0);
    }
  };
  check(band(-1, 0));
  check(band(20, 3));
  check(Everything{});
  check(documents(borders, first));
  check(document_ids(View<const std::int32_t, 2>{ids.data(), {2, 130}, {130, 1}}));
  check(prefix_lm(prefix));
  check(chunks(24));
  check(dilated(3, 50));
  check(sink_window(4, 30));
  test::Random random(17);
  std::vector<std::uint64_t> words(2 * 70 * 2);   // not random alone: blocks of pairs all seen and all unseen among them
  for (std::size_t n = 0; n < words.size(); ++n) words[n] = n % 3 == 0 ? ~std::uint64_t{0} : n % 3 == 1 ? 0 : random.bits();
  check(tree({words.data(), {2, 70, 2}, {140, 2, 1}}, prefix));
  check(Both{band(-1, 0), documents(borders, first)});
  check(Either{Both{band(16, 0), chunks(32)}, global_tokens(5)});
}

TEST_CASE("the policy of a block mask, pair by pair", "[masks]") {
  for (const auto& [q_block, k_block] :
       {std::pair{128, 128}, std::pair{16, 32}, std::pair{10, 24}, std::pair{64, 17}, std::pair{1, 1}}) {
    const BlockMaskShape s{.batch = 2, .q_heads = 3, .len_q = 160, .len_k = 270, .q_block = q_block, .k_block = k_block};
    INFO("blocks " << q_block << " x " << k_block);
    const BlockMask mask = made(s);
    check_policy(block_masked(mask, Knotted{}), s, [&](index_t b, index_t h, index_t q, index_t k) {
      return q >= 0 && q < s.len_q && k < s.len_k && knotted(b, h, q, k);
    });
  }
}

TEST_CASE("full blocks never ask the function, empty ones neither", "[masks]") {
  const BlockMaskShape s{.batch = 2, .q_heads = 3, .len_q = 160, .len_k = 270, .q_block = 16, .k_block = 32};
  const BlockMask mask = made(s);
  const BlockMaskView truth = mask;
  // A function that says the opposite everywhere: only partial blocks may notice.
  const auto opposite = [](int b, int h, int q, auto k) { return !Knotted{}(b, h, q, k); };
  check_policy(block_masked(mask, opposite), s, [&](index_t b, index_t h, index_t q, index_t k) {
    if (q < 0 || q >= s.len_q || k >= s.len_k) return false;
    const Cover block = truth.block(b, h, q / s.q_block, k / s.k_block);   // checked against counting above
    return block == Cover::full || (block == Cover::partial && !knotted(b, h, q, k));
  });
}

TEST_CASE("attention reads no dead tile and asks no lane of a full one, online and whole rows", "[masks][poison]") {
  const auto whole_rows = [](const Dense& x, const AttentionOptions& options, const test::AnyMask& mask) {
    test::Result r = test::unwritten(x.q.view(), x.v.view());
    const auto entmax = variant().with_normalizer(EntmaxNormalizer<Entmax15Power>{}).with_mask(mask);
    const Status status = attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), options, entmax);
    INFO(status.message());
    REQUIRE(status.ok());
    return r;
  };
  for (const index_t dim : {16, 170}) {   // key tiles of 256 and of 128
    const Dense x(18, 2, 4, 2, 14, 5 * Striped::kBlock + 40, dim, 8);
    const Written bytes =
        written(x, 0, [](index_t b, index_t, index_t q, index_t k) { return Striped::sees(b, q, k); });
    const StoredMask stored{bytes.view, {}};
    Dense dirty = x;
    poison(dirty, bytes);
    AttentionOptions options;
    options.keep = bytes.view;
    const test::Expected expected = test::expect(x.q.view(), x.k.view(), x.v.view(), options);
    options.keep = {};
    for (const Regime regime : kRegimes) {
      INFO("dim " << dim << ", regime " << static_cast<int>(regime));
      options.regime = regime;
      Striped::Asked online, whole;
      const test::Result one = attend(dirty, options, Striped{&online});
      CHECK(test::distance(one, expected) <= 1);
      CHECK(test::same_bits(one, attend(x, options, stored)));
      CHECK(test::same_bits(whole_rows(dirty, options, test::AnyMask(Striped{&whole})),
                            whole_rows(x, options, test::AnyMask(stored))));
      for (const Striped::Asked& asked : {online, whole}) {
        CHECK(asked.wrong_lanes == 0);
        CHECK(std::min({asked.dead, asked.full, asked.partial, asked.lanes}) > 0);
      }
    }
  }
}

TEST_CASE("attention behind a block mask meets the double reference", "[masks]") {
  for (const index_t len : {1, 15, 16, 17, 255, 256, 257}) {
    const BlockMaskShape s{.batch = 1, .q_heads = 4, .len_q = len, .len_k = len, .q_block = 32, .k_block = 64};
    const BlockMask mask = made(s);
    check_attention(block_masked(mask, Knotted{}), knotted, Dense(static_cast<std::uint64_t>(len), 1, 4, 2, len, len, 9, 7),
                    0);
  }
}

TEST_CASE("positions, keys, sequences and heads beyond a block mask are masked", "[masks]") {
  const BlockMaskShape s{.batch = 2, .q_heads = 3, .len_q = 50, .len_k = 100, .q_block = 16, .k_block = 16};
  const BlockMask mask = made(s);
  const auto inside = [&](index_t b, index_t h, index_t q, index_t k) {
    return b < 2 && h < 3 && q >= 0 && q < 50 && k < 100 && knotted(b, h, q, k);
  };
  for (const index_t first : {-7, 0, 20, 45, 1000, -1000})
    check_attention(block_masked(mask, Knotted{}), inside, Dense(11, 3, 6, 2, 13, 120, 5, 6), first);
  const BlockMask moved_from_nothing;
  check_attention(
      block_masked(moved_from_nothing, Knotted{}), [](auto...) { return false; }, Dense(12, 1, 1, 1, 3, 20, 4, 4), 0);
}

TEST_CASE("a block mask changes no bit of what its function gives", "[masks][bits]") {
  const auto spiral = [](int, int, int q, auto k) { return (k <= q) & ((q - k < 64) | (k < 4)); };
  const Dense x(13, 1, 4, 2, 300, 300, 16, 16);
  for (const index_t block : {16, 40, 128}) {
    BlockMask mask;
    REQUIRE(mask.build({.len_q = 300, .len_k = 300, .q_block = block, .k_block = block}, spiral).ok());
    for (const Regime regime : kRegimes) {
      const AttentionOptions options{.regime = regime};
      CHECK(test::same_bits(attend(x, options, block_masked(mask, spiral)),
                            attend(x, options, MaskFunction<decltype(spiral)>{spiral})));
    }
  }
  // A later key that is not seen leaves no trace.
  BlockMask mask;
  REQUIRE(mask.build({.len_q = 300, .len_k = 300}, spiral).ok());
  Dense y = x;
  for (index_t h = 0; h < 2; ++h) {
    for (index_t j = 201; j < 300; ++j) {
      for (index_t d = 0; d < 16; ++d) y.k.view()(0, h, j, d) = y.v.view()(0, h, j, d) = test::canary();
    }
  }
  const test::Result before = attend(x, {}, block_masked(mask, spiral)), after = attend(y, {}, block_masked(mask, spiral));
  index_t moved = 0;
  for (index_t h = 0; h < 4; ++h) {
    for (index_t i = 0; i <= 200; ++i)
      moved += std::memcmp(&before.out.view()(0, h, i, 0), &after.out.view()(0, h, i, 0), 16 * sizeof(float)) != 0;
  }
  CHECK(moved == 0);
}

TEST_CASE("blocks kept whole", "[masks]") {
  const index_t len = 150;
  const BlockMaskShape s{.batch = 1, .q_heads = 2, .len_q = len, .len_k = len, .q_block = 16, .k_block = 48};
  std::vector<std::uint8_t> keep;
  test::Random random(14);
  for (int n = 0; n < 2 * 10 * 4; ++n) keep.push_back(random.one_in(3) ? 2 : 0);
  const View<const std::uint8_t, 4> view{keep.data(), {1, 2, 10, 4}, {80, 40, 4, 1}};
  BlockMask mask;
  REQUIRE(mask.build_from_blocks(s, view).ok());
  CHECK(wrong_blocks(mask, [&](index_t b, index_t h, index_t i, index_t j) {
          return view(b, h, i, j) == 0 ? Cover::skip
                 : i == 9 || j == 3    ? Cover::partial
                                       : Cover::full;   // cut ones are partial
        }) == 0);
  check_attention(
      block_sparse(mask), [&](index_t, index_t h, index_t q, index_t k) { return view(0, h, q / 16, k / 48) != 0; },
      Dense(15, 1, 2, 1, len, len, 8, 8), 0);
}

TEST_CASE("steep scores, empty rows and single keys behind a block mask", "[masks]") {
  const auto sees = [](int, int, int q, auto k) {
    if (q == 7) return k < 0;
    return q == 9 ? k == 9 : k <= q;
  };
  BlockMask mask;
  REQUIRE(mask.build({.len_q = 270, .len_k = 270, .q_block = 16, .k_block = 16}, sees).ok());
  for (const float step : {75.f, -75.f}) {
    Dense x(16, 1, 1, 1, 270, 270, 1, 3);
    for (index_t j = 0; j < 270; ++j) {
      x.q.view()(0, 0, j, 0) = 1;
      x.k.view()(0, 0, j, 0) = step * static_cast<float>(j - 135);
    }
    check_attention(
        block_masked(mask, sees),
        [&](index_t, index_t, index_t q, index_t k) { return sees(0, 0, static_cast<int>(q), static_cast<int>(k)); }, x, 0);
  }
}

TEST_CASE("any executor builds the same block mask, and memory is reused", "[masks]") {
  const BlockMaskShape s{.batch = 2, .q_heads = 3, .len_q = 300, .len_k = 500, .q_block = 16, .k_block = 16};
  const BlockMask serial = made(s);
  test::ThreadPerLane threads;
  test::Reversed reversed;
  for (const Executor& executor : {Executor(threads, 3), Executor(reversed, 3), Executor(threads, 200)}) {
    BlockMask mask;
    REQUIRE(mask.build({.len_q = 1000, .len_k = 1000, .q_block = 3, .k_block = 3}, Everything{}).ok());
    const std::uint64_t* const before = mask.view().block_row(0, 0, 0).live;
    REQUIRE(mask.build(s, Knotted{}, executor).ok());
    CHECK(mask.view().block_row(0, 0, 0).live == before);
    const BlockMaskView expected = serial;
    CHECK(wrong_blocks(mask, [&](index_t b, index_t h, index_t i, index_t j) { return expected.block(b, h, i, j); }) == 0);
  }
}

TEST_CASE("what a block mask refuses", "[masks]") {
  using Catch::Matchers::ContainsSubstring;
  BlockMask mask = made({.len_q = 20, .len_k = 30, .q_block = 16, .k_block = 16});
  const auto message = [&](const BlockMaskShape& shape) { return std::string(mask.build(shape, Knotted{}).message()); };
  CHECK_THAT(message({.len_q = -1, .len_k = 3}), ContainsSubstring("len_q -1"));
  CHECK_THAT(message({.len_q = 1, .len_k = 3, .k_block = 0}), ContainsSubstring("blocks of 128 x 0"));
  CHECK_THAT(message({.batch = 0}), ContainsSubstring("batch 0"));
  CHECK_THAT(message({.len_q = INT32_MAX, .len_k = 3}), ContainsSubstring("too large"));
  CHECK_THAT(message({.batch = 1 << 20, .q_heads = 1 << 20, .len_q = 1 << 30, .len_k = 1 << 30, .q_block = 1, .k_block = 1}),
             ContainsSubstring("too large"));
  CHECK(mask.build_from_blocks({.len_q = 20, .len_k = 30}, {nullptr, {1, 1, 2, 2}, {}}).code() == Code::invalid_argument);
  CHECK(mask.view().shape().len_k == 30);   // as it was
  CHECK(mask.view().counts().partial == 3);

  const BlockMaskView view = mask;
  CHECK(view.check({.len_q = 20, .len_k = 30}, {}).ok());
  CHECK_THAT(view.check({.len_q = 20, .len_k = 31}, {}).message(), ContainsSubstring("31 keys"));
  CHECK_THAT(view.check({.len_q = 21, .len_k = 30}, {}).message(), ContainsSubstring("0 .. 20"));
  CHECK_THAT(view.check({.len_q = 20, .len_k = 30}, {.causal = Causal::bottom_right}).message(),
             ContainsSubstring("10 .. 29"));
  const std::vector<index_t> offset{-1};
  CHECK_THAT(view.check({.len_q = 2, .len_k = 30}, {.q_offset = offset}).message(), ContainsSubstring("-1 .. 0"));
  CHECK(view.check({.batch = 5, .q_heads = 8, .kv_heads = 2, .len_q = 1, .len_k = 1}, {}).ok());
  const BlockMask wide = made({.batch = 2, .q_heads = 4, .len_q = 20, .len_k = 30});
  CHECK_THAT(wide.view().check({.batch = 2, .q_heads = 8, .len_q = 1, .len_k = 1}, {}).message(),
             ContainsSubstring("4 q heads"));
}

TEST_CASE("a block mask reads no table of the wrong length and no block that is not there", "[masks][errors]") {
  BlockMask blocks;
  const BlockMaskShape shape{.batch = 2, .len_q = 64, .len_k = 64, .q_block = 32, .k_block = 32};
  REQUIRE(blocks.build(shape, Knotted{}).ok());
  const std::vector<index_t> one{64};   // on the heap, so that a sanitizer sees a read behind it
  const AttentionShape call{2, 1, 1, 64, 64, 8, 8};
  for (const int which : {0, 1, 2}) {
    AttentionOptions options;
    (which == 0 ? options.len_k : which == 1 ? options.q_offset : options.cu_len_k) = one;
    CHECK(blocks.view().check(call, options).code() == Code::invalid_argument);
  }
  const View<const std::uint8_t, 4> nothing{nullptr, {2, 1, 2, 2}, {4, 4, 2, 1}};
  CHECK(blocks.build_from_blocks(shape, nothing).code() == Code::invalid_argument);
  BlockMaskShape huge = shape;
  huge.len_q = PTRDIFF_MAX;
  CHECK_FALSE(blocks.build_from_blocks(huge, nothing).ok());
}

TEST_CASE("a block mask prints itself", "[masks]") {
  BlockMask mask;
  REQUIRE(mask.build({.len_q = 512, .len_k = 512}, band(-1, 0)).ok());
  // The square causal mask: row r of blocks is full before r and partial at r.
  CHECK(to_string(mask) ==
        "512 x 512 positions in blocks of 128 x 128, batch 1, q heads 1: 6 full, 4 partial, 6 empty (37.5 %)\n"
        "+...\n#+..\n##+.\n###+\n");
  CHECK(mask.view().sparsity() == 0.375);
  CHECK(to_string(mask, 0, 0, 2).ends_with("\n+.\n#+\n"));
  REQUIRE(mask.build({.len_q = 130, .len_k = 300}, Everything{}).ok());
  CHECK(to_string(mask).ends_with("\n##+\n+++\n"));   // cut blocks are partial
  CHECK(to_string(BlockMask{}).ends_with("0 empty (0.0 %)\n"));
}
