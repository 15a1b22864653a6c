// SPDX-License-Identifier: Apache-2.0
// The strip form of the tile engine (rows of scores kept, weighed as a whole, multiplied with V) with normalisers made here:
// a softmax in two passes, which the online form and the reference know the answer to, and the hardest choice of all, the
// maximum.
#include <algorithm>
#include <array>
#include <cmath>

#include "fovea/reference/variant.hpp"
#include "mechanisms/normalizer_grid.hpp"

using namespace fovea;
using test::Dense;
using test::kRegimes;
using TestResult = test::Result;

namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

struct TwoPassSoftmax {
  static constexpr bool kHasLse = true;
  Final weigh_row(const Row&, std::span<float> scores, std::span<float>) const {
    const float top = scores.empty() ? kNothing : *std::max_element(scores.begin(), scores.end());
    double sum = 0;
    for (float& s : scores) {
      s = top == kNothing ? 0.f : static_cast<float>(std::exp(double{s} - double{top}));
      sum += double{s};
    }
    if (sum == 0) return {0.f, kNothing};
    return {static_cast<float>(1 / sum), static_cast<float>(double{top} + std::log(sum))};
  }
};

// All weight on the largest score; equal ones share it. Uses the scratch, in which the engine has left what it likes.
struct HardMax {
  Final weigh_row(const Row&, std::span<float> scores, std::span<float> scratch) const {
    REQUIRE(scratch.size() >= scores.size());
    float top = kNothing, count = 0;
    for (const float s : scores) top = std::max(top, s);
    for (std::size_t j = 0; j < scores.size(); ++j) count += scratch[j] = top != kNothing && scores[j] == top ? 1.f : 0.f;
    std::copy_n(scratch.begin(), scores.size(), scores.begin());
    return {count == 0 ? 0.f : 1 / count, 0.f};
  }
};
struct HardMaxWeights {
  void operator()(std::span<double> scores) const {
    const double top = *std::max_element(scores.begin(), scores.end());
    const auto count = static_cast<double>(std::count(scores.begin(), scores.end(), top));
    for (double& s : scores) s = s == top ? 1 / count : 0;
  }
};

const auto two_pass = variant().with_normalizer(TwoPassSoftmax{});
const auto hard_max = variant().with_normalizer(HardMax{});

// Small whole numbers: scores are exact in fp32, so that equal ones are equal everywhere.
Dense whole_numbers(std::uint64_t seed, index_t batch, index_t q_heads, index_t kv_heads, index_t len_q, index_t len_k,
                    index_t dim_qk, index_t dim_v) {
  Dense x(seed, batch, q_heads, kv_heads, len_q, len_k, dim_qk, dim_v);
  for (auto* tensor : {&x.q, &x.k}) {
    for (float& number : tensor->data) number = std::round(number);
  }
  return x;
}

template <class V>
TestResult attend(const Dense& x, const AttentionOptions& options, const V& variant) {
  return test::attend_with(x, options, false, variant);
}

// A maximum taken from one to `len_k` values of size 5 at most: the sum of their shares.
void check_hard_max(const Dense& x, const AttentionOptions& options) {
  const TestResult got = attend(x, options, hard_max);
  std::vector<double> want(got.out.data.size());
  const auto same = [](double s, int, int, int, int) { return s; };
  const auto every = [](int, int, int, int) { return true; };
  reference::variant(x.q.view(), x.k.view(), x.v.view(),
                     bhsd(want.data(), got.out.batch, got.out.heads, got.out.len, got.out.dim), options, same, every,
                     HardMaxWeights{});
  double worst = 0;
  for (std::size_t n = 0; n < want.size(); ++n) worst = std::max(worst, std::abs(double{got.out.data[n]} - want[n]));
  CHECK(worst <= 5 * static_cast<double>(x.k.len + 4) * test::kUnit);
}

bool no_splits(const Plan& plan) {
  return plan.partial_rows == 0 &&
         std::all_of(plan.blocks.begin(), plan.blocks.end(), [](const Block& block) { return block.splits == 1; });
}

}   // namespace

TEST_CASE("two passes over a row are the softmax of the reference", "[strip]") {
  double worst_of_all = 0;
  std::vector<test::Problem> problems = test::normalizer_problems();
  for (const Regime regime : kRegimes) {   // key tiles of 128 and 64
    for (const index_t dim : {161, 321}) {
      test::Problem p;
      p.seed = static_cast<std::uint64_t>(dim), p.regime = regime, p.q_heads = 2, p.dim_qk = dim, p.dim_v = 9;
      p.len_q = {3}, p.stored_k = {150}, p.window = {70, -1}, p.causal = Causal::bottom_right;
      problems.push_back(p);
    }
  }
  for (const test::Problem& p : problems) {
    const test::Instance x(p);
    INFO(test::describe(p));
    test::Output one(x, true), three(x, true);
    REQUIRE(test::run_variant(x, one, 1, test::Pool::serial, two_pass.with_options()) == "");
    const test::Worst worst = test::compare(x.expected(), one.out, one.lse);
    INFO(worst.where);
    CHECK(worst.budgets <= 1);
    worst_of_all = std::max(worst_of_all, worst.budgets);
    REQUIRE(test::run_variant(x, three, 3, test::Pool::threads, two_pass.with_options()) == "");
    CHECK(three == one);
  }
  CHECK(worst_of_all > 0.005);
}

TEST_CASE("two passes over a row are the online softmax", "[strip]") {
  const Dense x(81, 2, 4, 2, 70, 300, 24, 17);
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    options.causal = Causal::bottom_right;
    options.window = {130, -1};
    const TestResult strip = test::attend_with(x, options, true, two_pass), online = test::attend(x, options);
    CHECK(test::distance(strip, online, test::expect(x.q.view(), x.k.view(), x.v.view(), options)) <= 1);
  }
}

TEST_CASE("the largest score takes all, wherever the window begins", "[strip]") {
  for (const Regime regime : kRegimes) {
    for (const index_t len_k : {1, 15, 16, 17, 255, 256, 257, 700}) {
      const Dense x = whole_numbers(static_cast<std::uint64_t>(len_k), 1, 4, 2, 20, len_k, 8, 11);
      AttentionOptions options;
      options.scale = 1.f;
      options.regime = regime;
      INFO("regime " << test::name(regime) << ", " << len_k << " keys");
      check_hard_max(x, options);
      options.causal = Causal::bottom_right;
      check_hard_max(x, options);
      // The first key in reach lies in the middle of a tile, of a run of scores and of a vector.
      for (const index_t left : {0, 3, 37, 200, 300}) {
        options.window = {left, 2};
        check_hard_max(x, options);
      }
    }
  }
}

TEST_CASE("a key without weight leaves no trace", "[strip]") {
  for (const Regime regime : kRegimes) {
    const Dense x = whole_numbers(83, 1, 2, 1, 14, 530, 8, 9);
    AttentionOptions options;
    options.scale = 1.f;
    options.regime = regime;
    options.causal = Causal::bottom_right;
    // Keys that some row gives weight, from a call whose V is the identity.
    const test::Values identity = test::identity_values(1, 1, 530);
    const TestResult weights = test::attend_with(x.q.view(), x.k.view(), identity.view(), options, false, hard_max);
    Dense poisoned = x;
    index_t poisons = 0;
    for (index_t j = 0; j < 530; ++j) {
      bool weighed = false;
      for (index_t h = 0; h < 2; ++h) {
        for (index_t i = 0; i < 14; ++i) weighed = weighed || weights.at(0, h, i, j) != 0;
      }
      for (index_t d = 0; !weighed && d < 9; ++d) poisoned.v.view()(0, 0, j, d) = j % 2 == 0 ? test::kNan : test::kInfinity;
      poisons += !weighed;
    }
    REQUIRE(poisons > 300);
    CHECK(test::same_bits(attend(poisoned, options, hard_max), attend(x, options, hard_max)));

    // A NaN where one row has weight reaches that row alone.
    Dense one = x;
    index_t heir = 0;
    while (weights.at(0, 1, 5, heir) == 0) ++heir;
    one.v.view()(0, 0, heir, 4) = test::kNan;
    const TestResult r = attend(one, options, hard_max);
    for (index_t h = 0; h < 2; ++h) {
      for (index_t i = 0; i < 14; ++i) {
        CHECK(std::isnan(r.at(0, h, i, 4)) == (weights.at(0, h, i, heir) != 0));
        CHECK(std::isfinite(r.at(0, h, i, 3)));
      }
    }
  }
}

namespace {

// For keys whose score is their number.
struct Numbers {
  index_t* rows;
  Final weigh_row(const Row&, std::span<float> scores, std::span<float>) const {
    index_t first = -1;
    bool in_order = true;
    for (std::size_t j = 0; j < scores.size(); ++j) {
      if (scores[j] == kNothing) continue;
      const index_t begin = static_cast<index_t>(scores[j]) - static_cast<index_t>(j);
      if (first < 0) first = begin;
      in_order = in_order && begin == first;
    }
    CHECK(in_order);
    CHECK(first % key_tile(1, 1) == 0);
    CHECK(static_cast<index_t>(scores.size()) % key_tile(1, 1) == 0);
    ++*rows;
    return {0.f, 0.f};
  }
};

}   // namespace

TEST_CASE("a row of scores begins at a multiple of the key tile", "[strip]") {
  test::Values one(1, 1, 50, 1, 1.f), numbers(1, 1, 900, 1);
  for (std::size_t j = 0; j < 900; ++j) numbers.data[j] = static_cast<float>(j);
  for (const Regime regime : kRegimes) {
    for (const index_t left : {0, 30, 255, 256, 400}) {
      AttentionOptions options;
      options.scale = 1.f;
      options.regime = regime;
      options.causal = Causal::bottom_right;
      options.window = {left, -1};
      index_t rows = 0;
      test::attend_with(one.view(), numbers.view(), numbers.view(), options, false,
                        variant().with_normalizer(Numbers{&rows}));
      CHECK(rows == 50);
    }
  }
}

TEST_CASE("masked keys hold NaN", "[strip]") {
  test::check_masks(two_pass, true, kNothing);
  test::check_masks(hard_max, false, 0.f);
}

TEST_CASE("rows in chunks have the bits of one call", "[strip][bits]") {
  constexpr index_t kLen = 330;
  const Dense x(85, 1, 4, 2, kLen, kLen, 16, 18);
  for (const Regime regime : kRegimes) {
    for (const index_t left : {index_t{-1}, index_t{70}}) {
      AttentionOptions options;
      options.regime = regime;
      options.causal = Causal::bottom_right;
      options.window = {left, -1};
      const TestResult whole = test::attend_with(x, options, true, two_pass);
      for (const index_t chunk : {1, 7, 61, 256}) {
        if (chunk < 10 && left < 0) continue;   // as many keys again for every few rows
        for (index_t first = 0; first < kLen; first += chunk) {
          const index_t count = std::min(chunk, kLen - first), end = first + count;
          const TestResult part =
              test::attend_with(test::only_pos(x.q.view(), first, count), test::only_pos(x.k.view(), 0, end),
                                test::only_pos(x.v.view(), 0, end), options, true, two_pass);
          REQUIRE(test::same_rows(whole, 0, first, part));
        }
      }
    }
  }
}

TEST_CASE("rows are kept whole however long a decode is", "[strip]") {
  const Dense x(86, 1, 4, 1, 1, 5000, 16, 16);
  AttentionOptions options;
  options.regime = Regime::decode;
  const AttentionShape shape{1, 4, 1, 1, 5000, 16, 16};
  Plan plan, online;
  REQUIRE(make_plan(plan, shape, options, two_pass).ok());
  REQUIRE(make_plan(online, shape, options).ok());
  CHECK(no_splits(plan));
  CHECK_FALSE(no_splits(online));
  CHECK(plan.strip_keys >= 5000);
  const TestResult r = test::attend_with(x, options, true, two_pass);
  CHECK(test::distance(r, test::expect(x.q.view(), x.k.view(), x.v.view(), options)) <= 1);
}

TEST_CASE("a plan serves every variant with the same needs and no other", "[strip]") {
  const Dense x = whole_numbers(87, 1, 2, 2, 5, 40, 8, 8);
  const AttentionShape shape{1, 2, 2, 5, 40, 8, 8};
  Plan strip, online;
  REQUIRE(make_plan(strip, shape, {}, two_pass).ok());
  REQUIRE(make_plan(online, shape, {}).ok());
  const auto with_plan = [&](const Plan& plan, TestResult& r, const auto& variant) {
    return attention(plan, x.q.view(), x.k.view(), x.v.view(), r.out.view(), {}, variant);
  };
  for (int layer = 0; layer < 2; ++layer) {
    TestResult r = test::unwritten(x.q.view(), x.v.view());
    REQUIRE(with_plan(strip, r, hard_max).ok());
    CHECK(test::same_bits(r.out.data, attend(x, {}, hard_max).out.data));
    REQUIRE(with_plan(strip, r, two_pass).ok());
    CHECK(test::same_bits(r.out.data, attend(x, {}, two_pass).out.data));
  }
  TestResult untouched = test::unwritten(x.q.view(), x.v.view());
  const TestResult before = untouched;
  const Status kept = with_plan(online, untouched, two_pass), split = with_plan(strip, untouched, variant());
  CHECK(kept.code() == Code::invalid_argument);
  CHECK_THAT(kept.message(), Catch::Matchers::ContainsSubstring("another variant"));
  CHECK(split.code() == Code::invalid_argument);
  CHECK(test::same_bits(untouched, before));
}

TEST_CASE("the strip is in the workspace that is asked for", "[strip]") {
  const Dense x(88, 1, 2, 1, 30, 700, 8, 8);
  const AttentionShape shape{1, 2, 1, 30, 700, 8, 8};
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    Plan plan;
    REQUIRE(make_plan(plan, shape, options, two_pass).ok());
    test::PoisonedBytes workspace(workspace_bytes(plan), 4);
    options.workspace = workspace.bytes();
    TestResult r = test::unwritten(x.q.view(), x.v.view());
    REQUIRE(attention(plan, x.q.view(), x.k.view(), x.v.view(), r.out.view(), options, two_pass).ok());
    CHECK(workspace.guards_intact());
    options.workspace = {};
    CHECK(test::same_bits(r.out.data, attend(x, options, two_pass).out.data));

    options.workspace = workspace.bytes().first(workspace_bytes(plan) - 1);
    TestResult untouched = test::unwritten(x.q.view(), x.v.view());
    const TestResult before = untouched;
    CHECK(attention(plan, x.q.view(), x.k.view(), x.v.view(), untouched.out.view(), options, two_pass).code() ==
          Code::workspace_too_small);
    CHECK(test::same_bits(untouched, before));
  }
}

namespace {

struct SumOfWeights {
  double* sums;   // [q_head, q_index], then scaled
  index_t len_q;
  double& of(const Row& row) const { return sums[row.q_head * len_q + row.q_index]; }
  void absorb(const Row& row, index_t, std::span<const float> weights, float rescale) const {
    CHECK(rescale == 1.f);
    for (const float w : weights) of(row) += double{w};
  }
  void finish(const Row& row, Final end) const { of(row) *= double{end.scale}; }
};

struct TwiceAndLse {
  [[maybe_unused]] static constexpr bool kNeedsLse = true;   // clang 14 takes a requirement for no use
  float* lse;   // [q_head, pos]
  index_t len_q;
  void operator()(OutRow row, std::span<float> values, Final end) const {
    lse[row.q_head * len_q + row.pos] = end.lse;
    for (float& value : values) value *= 2;
  }
};

}   // namespace

TEST_CASE("taps and closings see whole rows", "[strip]") {
  const Dense x(89, 1, 2, 1, 31, 600, 8, 8);
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    options.causal = Causal::bottom_right;
    std::vector<double> sums(62);
    attend(x, options, two_pass.with_tap(SumOfWeights{sums.data(), 31}));
    for (const double sum : sums) CHECK(std::abs(sum - 1) <= 4 * test::kUnit);   // of float weights, in double

    std::vector<float> lse(62);
    const TestResult plain = test::attend_with(x, options, true, two_pass);
    const TestResult twice = attend(x, options, two_pass.with_close(TwiceAndLse{lse.data(), 31}));
    CHECK(test::same_bits(lse, plain.lse));
    for (std::size_t n = 0; n < twice.out.data.size(); ++n) REQUIRE(twice.out.data[n] == 2 * plain.out.data[n]);
  }
}

TEST_CASE("pages and 16-bit storage have the bits of contiguous rows", "[strip][bits]") {
  constexpr index_t kLen = 300, kDim = 16, kPage = 7, kPages = 43;
  const Dense x(90, 1, 2, 1, 20, kLen, kDim, kDim);
  std::vector<bf16> k(kLen * kDim), v(k), k_pool(kPages * kPage * kDim), v_pool(k_pool);
  std::vector<std::int32_t> table(kPages);
  for (std::size_t n = 0; n < k.size(); ++n) k[n] = convert<bf16>(x.k.data[n]), v[n] = convert<bf16>(x.v.data[n]);
  for (index_t page = 0; page < kPages; ++page) {
    const index_t place = (page * 5) % kPages, count = std::min(kPage, kLen - page * kPage) * kDim;
    table[static_cast<std::size_t>(page)] = static_cast<std::int32_t>(place);
    std::copy_n(k.begin() + page * kPage * kDim, count, k_pool.begin() + place * kPage * kDim);
    std::copy_n(v.begin() + page * kPage * kDim, count, v_pool.begin() + place * kPage * kDim);
  }
  Kv rows = dense_kv(bhsd<const bf16>(k.data(), 1, 1, kLen, kDim), bhsd<const bf16>(v.data(), 1, 1, kLen, kDim));
  Kv pages = dense_kv(bhsd<const bf16>(k_pool.data(), kPages, 1, kPage, kDim),
                      bhsd<const bf16>(v_pool.data(), kPages, 1, kPage, kDim));
  pages.home = Home::paged;
  pages.block_table = {table.data(), {1, kPages}, {kPages, 1}};
  const std::array<index_t, 1> used{kLen};
  Dense rounded = x;
  for (std::size_t n = 0; n < k.size(); ++n)
    rounded.k.data[n] = convert<float>(k[n]), rounded.v.data[n] = convert<float>(v[n]);
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    options.causal = Causal::bottom_right;
    options.len_k = used;
    const TestResult plain = attend(rounded, options, two_pass);
    for (const Kv& kv : {rows, pages}) {
      TestResult r = test::unwritten(x.q.view(), x.v.view());
      const Status status = attention<Formats<Format::bf16>>(x.q.view(), kv, r.out.view(), options, two_pass);
      INFO(status.message());
      REQUIRE(status.ok());
      CHECK(test::same_bits(r.out.data, plain.out.data));
    }
  }
}
