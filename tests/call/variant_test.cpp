// SPDX-License-Identifier: Apache-2.0
// Variants through the front door: functors against the options that say the same, policies of the caller's own, what is
// refused, and that the promise of equal bits holds for them too.
#include "fovea/attention.hpp"

#include <array>
#include <cmath>

#include "catch_compat.hpp"
#include "fovea/reference/variant.hpp"
#include "support/dense.hpp"
#include "support/executors.hpp"

using namespace fovea;
using test::Dense;
using TestResult = test::Result;

namespace {

template <class V>
TestResult attend_variant(const Dense& x, AttentionOptions options, const V& variant, bool with_lse = true) {
  TestResult r = test::unwritten(x.q.view(), x.v.view());
  if (with_lse) options.lse = r.lse_view();
  const Status status = attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), options, variant);
  INFO(status.message());
  REQUIRE(status.ok());
  return r;
}

// Additive weights without a sum: relu(s).
struct Relu {
  struct State {};
  State begin(const Row&, bool) const { return {}; }
  void absorb(State*, const ScoreRows& scores, float* rescale) const {
    for (index_t r = 0; r < scores.rows; ++r) {
      for (float& s : scores.row(r)) s = s > 0.f ? s : 0.f;
      rescale[r] = 1.f;
    }
  }
  std::array<float, 2> merge(State&, const State&) const { return {1.f, 1.f}; }
  Final finish(const State&) const { return {1.f, 0.f}; }
};

// What a closing that asks for it is told.
struct KeepLse {
  [[maybe_unused]] static constexpr bool kNeedsLse = true;
  float* lse;   // [q_head, pos]
  index_t len_q;
  void operator()(OutRow row, std::span<float>, Final end) const { lse[row.q_head * len_q + row.pos] = end.lse; }
};

const auto bounded = [](auto s, int, int, int, auto) { return 20.f * fovea::tanh(s * (1.f / 20.f)); };
const auto not_ahead = [](int, int, int q, auto k) { return k <= q; };
const auto near_or_even = [](int, int, int q, auto k) { return (k > q - 5) | (k % 2 == 0); };

}   // namespace

TEST_CASE("a functor that says what an option says gives the option's bits", "[variant]") {
  for (const Regime regime : {Regime::prefill, Regime::decode, Regime::wide_decode}) {
    const Dense x(7, 2, 4, 2, 37, 300, 40, 24);
    AttentionOptions plain;
    plain.regime = regime;
    const std::array<index_t, 2> offsets{263, 100};
    plain.q_offset = offsets;
    AttentionOptions causal = plain;
    causal.causal = Causal::bottom_right;
    CHECK(test::same_bits(attend_variant(x, plain, variant().with_mask(not_ahead)), test::attend(x, causal)));

    AttentionOptions capped = causal;
    capped.softcap = 20.f;
    CHECK(test::same_bits(attend_variant(x, causal, variant().with_score(bounded)), test::attend(x, capped)));

    const std::array<float, 4> slopes{0.5f, 0.25f, 0.125f, 0.0625f};
    const std::span<const float> table(slopes);
    AttentionOptions alibi = causal;
    alibi.alibi_slopes = slopes;
    const auto by_functor = variant().with_score([table](auto s, int, int head, int q, auto k) {
      return s - table[static_cast<std::size_t>(head)] * fovea::abs(to_float(q - k));
    });
    const TestResult a = attend_variant(x, causal, by_functor), b = test::attend(x, alibi);
    const test::Expected budget = test::expect(x.q.view(), x.k.view(), x.v.view(), alibi);
    CHECK(test::distance(a, b, budget) <= 1);   // the part fuses the product with the sum
  }
}

TEST_CASE("one text for lanes and for the reference", "[variant]") {
  const Dense x(11, 1, 4, 2, 50, 130, 24, 20);
  const std::array<std::int32_t, 3> steps{1, 3, 2};
  const std::span<const std::int32_t> table(steps);
  const auto score = [table](auto s, int batch, int head, int q, auto k) {
    return select(lookup(table, k % 3) == 2, s * 0.5f, s) + 0.01f * to_float(q - k) + static_cast<float>(head - batch);
  };
  for (const Regime regime : {Regime::prefill, Regime::decode}) {
    AttentionOptions options;
    options.causal = Causal::bottom_right;
    options.window = {90, 0};
    options.regime = regime;
    const TestResult r = attend_variant(x, options, variant().with_score(score).with_mask(near_or_even));
    std::vector<double> out(r.out.data.size());
    reference::variant(x.q.view(), x.k.view(), x.v.view(), bhsd(out.data(), 1, 4, 50, 20), options, score,
                       [](int b, int h, int q, int k) { return static_cast<bool>(near_or_even(b, h, q, k)); },
                       reference::SoftmaxWeights{});
    // Scores are at most some 8 in size, the values 5: the budget of plain softmax at that size.
    double worst = 0;
    for (std::size_t n = 0; n < out.size(); ++n) worst = std::max(worst, std::abs(double{r.out.data[n]} - out[n]));
    CHECK(worst < 5e-6);
  }
}

TEST_CASE("Then, Both and Either", "[variant]") {
  const Dense x(13, 1, 2, 2, 40, 70, 16, 16);
  const auto doubled = score_mod([](auto s, int, int, int, auto) { return s + s; });
  const auto lifted = score_mod([](auto s, int, int, int, auto k) { return s + to_float(k); });
  const auto first = [](int, int, int, auto k) { return k < 10; };
  const auto last = [](int, int, int, auto k) { return k >= 60; };
  const auto neither = [](int, int, int, auto k) { return (k < 10) | (k >= 60); };

  const TestResult chained = attend_variant(x, {}, variant().with_score(Then{doubled, lifted}));
  const TestResult in_one =
      attend_variant(x, {}, variant().with_score([](auto s, int, int, int, auto k) { return (s + s) + to_float(k); }));
  CHECK(test::same_bits(chained, in_one));

  const TestResult either = attend_variant(x, {}, variant().with_mask(Either{mask_mod(first), mask_mod(last)}));
  CHECK(test::same_bits(either, attend_variant(x, {}, variant().with_mask(neither))));

  const TestResult both = attend_variant(x, {}, variant().with_mask(Both{mask_mod(first), mask_mod(last)}));
  for (const float value : both.out.data) REQUIRE(value == 0.f);   // nobody sees anything
  for (const float value : both.lse) REQUIRE(value == -std::numeric_limits<float>::infinity());

  // Masks that know their tiles: the union of two bands far apart reads what lies between as masked.
  const Band head{{kUnbounded, -30}}, tail{{-20, kUnbounded}};
  const TestResult bands = attend_variant(x, {}, variant().with_mask(Either{head, tail}));
  const TestResult by_lane =
      attend_variant(x, {}, variant().with_mask([](int, int, int q, auto k) { return (k <= q - 30) | (k >= q + 20); }));
  CHECK(test::same_bits(bands, by_lane));
}

TEST_CASE("scores one after the other, in either order, against the reference", "[variant]") {
  constexpr index_t kDim = 16;
  const Dense x(14, 1, 2, 1, 40, 70, kDim, 12);
  const std::array<float, 2> slopes{0.1f, 0.02f};
  const Softcap cap{2.f};
  const Alibi alibi{slopes.data()};
  const auto lifted = score_mod(
      [](auto s, int, int head, int q, auto k) { return select(k == q, s + 1.f, s) + 0.5f * static_cast<float>(head); });
  AttentionOptions options;
  options.causal = Causal::bottom_right;
  const auto want = [&](const auto& score, const AttentionOptions& how) {
    std::vector<double> out(2 * 40 * 12);
    reference::variant(
        x.q.view(), x.k.view(), x.v.view(), bhsd(out.data(), 1, 2, 40, 12), how,
        [&](double s, int b, int h, int q, int k) { return score_of(score, s, b, h, q, k); },
        [](int, int, int, int) { return true; }, reference::SoftmaxWeights{});
    return out;
  };
  const auto most = [](const auto& a, const auto& b) {
    double worst = 0;
    for (std::size_t n = 0; n < a.size(); ++n) worst = std::max(worst, std::abs(double{a[n]} - double{b[n]}));
    return worst;
  };
  // A score's error as score_error() has it, whatever the order: no part has a slope above 1. Scores are at most the sum of
  // their products, 7 of ALiBi and 1.5 of the functor; the other weights' errors come in through the sum.
  double dots = 0, largest = 0;
  for (index_t h = 0; h < 2; ++h) {
    for (index_t i = 0; i < 40; ++i) {
      for (index_t j = 0; j < 70; ++j) {
        double sum = 0;
        for (index_t d = 0; d < kDim; ++d) sum += std::abs(double{x.q.view()(0, h, i, d)} * double{x.k.view()(0, 0, j, d)});
        dots = std::max(dots, sum / 4);
      }
    }
  }
  for (const float value : x.v.data) largest = std::max(largest, std::abs(double{value}));
  const double score_error = test::kUnit * ((kDim + 6) * dots + (test::kTanhUnits + 4) * 2 + 6 * 8.5 + 8 * (dots + 8.5));
  const double budget = (2 * std::expm1(score_error + test::kExpUnits * test::kUnit) + test::sum_error(70, 70)) * largest;
  const auto check = [&](const auto& score) {
    const std::vector<double> expected = want(score, options);
    for (const Regime regime : {Regime::prefill, Regime::decode, Regime::wide_decode}) {
      AttentionOptions how = options;
      how.regime = regime;
      CHECK(most(attend_variant(x, how, variant().with_score(score)).out.data, expected) <= budget);
    }
    return expected;
  };
  const auto capped_first = check(Then{cap, alibi}), capped_last = check(Then{alibi, cap});
  CHECK(most(capped_first, capped_last) > 1000 * budget);
  check(Then{Then{cap, lifted}, alibi});
  check(Then{alibi, Then{lifted, cap}});
  // The order of the options.
  AttentionOptions by_options = options;
  by_options.softcap = 2.f;
  by_options.alibi_slopes = slopes;
  CHECK(most(want(Identity{}, by_options), capped_first) < 1e-12);
}

TEST_CASE("with_options adds what the options say", "[variant]") {
  const Dense x(17, 1, 2, 1, 33, 90, 16, 12);
  std::vector<float> bias(33 * 90);
  std::vector<std::uint8_t> keep(33 * 90);
  test::Random random(5);
  for (float& b : bias) b = random.one_in(5) ? -std::numeric_limits<float>::infinity() : random.normal();
  for (std::uint8_t& k : keep) k = !random.one_in(4);
  const std::array<float, 2> slopes{0.1f, 0.2f}, sink{0.5f, -1.f};
  AttentionOptions options;
  options.causal = Causal::bottom_right;
  options.softcap = 5.f;
  options.alibi_slopes = slopes;
  options.bias = {bias.data(), {1, 1, 33, 90}, {0, 0, 90, 1}};
  options.keep = {keep.data(), {1, 1, 33, 90}, {0, 0, 90, 1}};
  options.sink = sink;
  const AttentionOptions without_tree = options;
  std::vector<std::uint64_t> words(33);
  for (std::uint64_t& word : words) word = random.bits();
  options.tree = words;
  CHECK_FALSE(test::same_bits(test::attend(x, options), test::attend(x, without_tree)));
  for (const Regime regime : {Regime::prefill, Regime::decode}) {
    options.regime = regime;
    CHECK(test::same_bits(attend_variant(x, options, variant().with_options()), test::attend(x, options)));
    const auto same = variant().with_options().with_score([](auto s, int, int, int, auto) { return s; });
    CHECK(test::same_bits(attend_variant(x, options, same), test::attend(x, options)));
    const auto all = variant().with_options().with_mask([](int, int, int, auto k) { return k >= 0; });
    CHECK(test::same_bits(attend_variant(x, options, all), test::attend(x, options)));
  }
}

TEST_CASE("what a variant cannot serve is refused before anything is written", "[variant][errors]") {
  const Dense x(19, 1, 2, 2, 5, 9, 8, 8);
  const std::array<float, 2> numbers{0.1f, 0.2f};
  const auto refused = [&](AttentionOptions options, const auto& v, Code code, const char* words) {
    TestResult r = test::unwritten(x.q.view(), x.v.view());
    const TestResult before = r;
    const Status status = attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), options, v);
    INFO(status.message());
    CHECK(status.code() == code);
    CHECK(std::string(status.message()).find(words) != std::string::npos);
    CHECK(test::same_bits(r, before));
    CHECK(supports({1, 2, 2, 5, 9, 8, 8}, options, v).code() == code);
  };
  AttentionOptions softcap, alibi, sink, tree, lse;
  softcap.softcap = 3.f;
  alibi.alibi_slopes = numbers;
  sink.sink = numbers;
  std::vector<float> sums(10);
  lse.lse = {sums.data(), {1, 2, 5}, {10, 5, 1}};
  const std::array<std::uint64_t, 5> words{1, 3, 7, 15, 31};
  tree.tree = words;
  refused(softcap, variant(), Code::unsupported, "softcap (3)");
  refused(tree, variant(), Code::unsupported, "tree out");
  refused(alibi, variant(), Code::unsupported, "with_options()");
  refused(sink, variant().with_normalizer(Relu{}), Code::unsupported, "a sink (2 logits)");
  refused(lse, variant().with_normalizer(Relu{}), Code::unsupported, "no LSE");
  CHECK(supports({1, 2, 2, 5, 9, 8, 8}, sink, variant()).ok());
}

TEST_CASE("a policy's own numbers are checked before anything is written", "[variant][errors]") {
  struct Picky {
    float limit;
    Status check() const {
      return limit > 0.f ? Status{} : Status::error(Code::invalid_argument, "limit is %g", static_cast<double>(limit));
    }
    Identity::Lane at(const Row&) const { return {}; }
  };
  const Dense x(47, 1, 2, 2, 5, 9, 8, 8);
  TestResult r = test::unwritten(x.q.view(), x.v.view());
  const TestResult before = r;
  const auto wrong = variant().with_score(Picky{-2.f});
  const Status status = attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), {}, wrong);
  CHECK(std::string(status.message()) == "limit is -2");
  CHECK(test::same_bits(r, before));
  CHECK(supports({1, 2, 2, 5, 9, 8, 8}, {}, wrong).code() == Code::invalid_argument);
  CHECK(supports({1, 2, 2, 5, 9, 8, 8}, {}, variant().with_score(Picky{2.f})).ok());

  // Whoever is made of it asks it; a tap, which writes into the caller's memory, above all.
  struct PickyMask : Everything {
    Status check(const AttentionShape& shape) const { return Status::error(Code::invalid_argument, "%td heads", shape.q_heads); }
  };
  struct PickyTap {
    Status check() const { return Status::error(Code::invalid_argument, "no memory"); }
    void absorb(const Row&, index_t, std::span<const float>, float) const {}
    void finish(const Row&, Final) const {}
  };
  const auto same = score_mod([](auto s, int, int, int, auto) { return s; });
  const auto all = mask_mod([](int, int, int, auto k) { return k >= 0; });
  const auto message = [](const auto& v) { return std::string(supports({1, 2, 2, 5, 9, 8, 8}, {}, v).message()); };
  CHECK(message(variant().with_score(Then{same, Picky{-3.f}})) == "limit is -3");
  CHECK(message(variant().with_score(Then{Picky{-4.f}, same})) == "limit is -4");
  CHECK(message(variant().with_mask(Both{all, PickyMask{}})) == "2 heads");
  CHECK(message(variant().with_mask(Either{PickyMask{}, all})) == "2 heads");
  CHECK(message(variant().with_tap(PickyTap{})) == "no memory");
  CHECK(supports({1, 2, 0, 5, 9, 8, 8}, {}, variant().with_mask(PickyMask{})).message() != std::string("2 heads"));
}

TEST_CASE("normalisers of the caller's own, split and whole", "[variant]") {
  const Dense x(23, 1, 4, 2, 3, 2500, 16, 8);
  AttentionOptions options;
  options.causal = Causal::bottom_right;
  const auto relu = variant().with_normalizer(Relu{});
  for (const Regime regime : {Regime::prefill, Regime::decode, Regime::wide_decode}) {
    options.regime = regime;
    const TestResult r = attend_variant(x, options, relu, false);
    std::vector<double> out(r.out.data.size());
    reference::variant(
        x.q.view(), x.k.view(), x.v.view(), bhsd(out.data(), 1, 4, 3, 8), options,
        [](double s, int, int, int, int) { return s; }, [](int, int, int, int) { return true; },
        [](std::span<double> scores) {
          for (double& s : scores) s = std::max(s, 0.);
        });
    // 2,500 terms of up to 20 each: the sum's own error, n u sum |p v|, is below 2500 * 2^-24 * 2500 * 2.
    double worst = 0;
    for (std::size_t n = 0; n < out.size(); ++n) worst = std::max(worst, std::abs(double{r.out.data[n]} - out[n]));
    CHECK(worst < 2500. * 0x1p-24 * 2500 * 2);
    CHECK(worst > 0);
  }
}

TEST_CASE("a tap sees every weight once, whatever the regime asks for", "[variant]") {
  struct WeightSum {
    double* sum;   // [q_head, query]
    index_t len_q;
    void absorb(const Row& row, index_t, std::span<const float> weights, float rescale) const {
      double& mine = sum[row.q_head * len_q + row.q_index];
      mine *= double{rescale};
      for (const float w : weights) mine += double{w};
    }
    void finish(const Row& row, Final end) const { sum[row.q_head * len_q + row.q_index] *= double{end.scale}; }
  };
  const Dense x(29, 1, 4, 2, 3, 2500, 16, 8);
  for (const Regime regime : {Regime::automatic, Regime::decode, Regime::wide_decode, Regime::prefill}) {
    std::vector<double> sums(12, 0.);
    AttentionOptions options;
    options.regime = regime;
    attend_variant(x, options, variant().with_tap(WeightSum{sums.data(), 3}));
    for (const double sum : sums) CHECK(std::abs(sum - 1) < 2500 * 0x1p-24);
  }
}

TEST_CASE("closings get the row's place in the views, and their changes are stored in its format", "[variant]") {
  const Dense x(31, 1, 4, 2, 12, 40, 16, 10);
  const std::array<index_t, 4> cu_q{0, 5, 5, 12}, cu_k{0, 20, 25, 40};
  AttentionOptions options;
  options.cu_len_q = cu_q;
  options.cu_len_k = cu_k;
  const auto marked = variant().with_close([](OutRow row, std::span<float> values, Final) {
    for (float& value : values) value += static_cast<float>(100 * row.q_head + row.pos + 1000 * row.batch);
  });
  const TestResult plain = test::attend(x, options);
  const TestResult changed = attend_variant(x, options, marked);
  std::vector<bf16> narrow(changed.out.data.size());
  attention(x.q.view(), x.k.view(), x.v.view(), bhsd(narrow.data(), 1, 4, 12, 10), options, marked).or_throw();
  for (index_t h = 0; h < 4; ++h) {
    for (index_t i = 0; i < 12; ++i) {
      for (index_t d = 0; d < 10; ++d) {
        const float want = plain.at(0, h, i, d) + static_cast<float>(100 * h + i);
        REQUIRE(changed.at(0, h, i, d) == want);
        REQUIRE(narrow[static_cast<std::size_t>((h * 12 + i) * 10 + d)].bits == convert<bf16>(want).bits);
      }
    }
  }
  CHECK(test::same_bits(plain.lse, changed.lse));

  std::vector<float> lse(48);
  attend_variant(x, options, variant().with_close(KeepLse{lse.data(), 12}), false);
  CHECK(test::same_bits(lse, plain.lse));
}

TEST_CASE("variants keep the promise of equal bits", "[variant][bits]") {
  const Dense x(37, 1, 4, 1, 70, 1500, 16, 16);
  const auto both = variant().with_score(bounded).with_mask(near_or_even);
  for (const Regime regime : {Regime::prefill, Regime::decode, Regime::wide_decode}) {
    AttentionOptions options;
    options.causal = Causal::bottom_right;
    options.regime = regime;
    const TestResult whole = attend_variant(x, options, both);
    for (const int lanes : {2, 3, 8}) {
      test::ThreadPerLane pool;
      AttentionOptions parallel = options;
      parallel.executor = Executor(pool, lanes);
      CHECK(test::same_bits(attend_variant(x, parallel, both), whole));
    }
    for (index_t begin = 0; begin < 70; begin += 30) {
      const index_t count = std::min<index_t>(30, 70 - begin);
      const std::array<index_t, 1> offset{1430 + begin};
      AttentionOptions chunk = options;
      chunk.q_offset = offset;
      const auto q = test::only_pos(x.q.view(), begin, count);
      TestResult r = test::unwritten(q, x.v.view());
      chunk.lse = r.lse_view();
      attention(q, x.k.view(), x.v.view(), r.out.view(), chunk, both).or_throw();
      CHECK(test::same_rows(whole, 0, begin, r));
    }
  }
}

TEST_CASE("plans and prepared runs of variants", "[variant][plan][lanes]") {
  const Dense x(41, 1, 2, 2, 20, 64, 16, 16);
  const auto capped = variant().with_score(bounded);
  AttentionOptions options;
  options.causal = Causal::bottom_right;
  const AttentionShape shape{1, 2, 2, 20, 64, 16, 16};
  Plan plan;
  REQUIRE(make_plan(plan, shape, options, capped).ok());
  const TestResult once = attend_variant(x, options, capped);

  TestResult planned = test::unwritten(x.q.view(), x.v.view());
  AttentionOptions with_lse = options;
  with_lse.lse = planned.lse_view();
  REQUIRE(attention(plan, x.q.view(), x.k.view(), x.v.view(), planned.out.view(), with_lse, capped).ok());
  CHECK(test::same_bits(planned, once));

  std::vector<std::byte> workspace(workspace_bytes(plan, 1));
  TestResult prepared = test::unwritten(x.q.view(), x.v.view());
  with_lse.lse = prepared.lse_view();
  with_lse.workspace = workspace;
  AttentionRun run;
  REQUIRE(prepare(run, plan, x.q.view(), x.k.view(), x.v.view(), prepared.out.view(), with_lse, capped).ok());
  run_lane(run, 0);
  CHECK(test::same_bits(prepared, once));

  struct Watch {
    void absorb(const Row&, index_t, std::span<const float>, float) const {}
    void finish(const Row&, Final) const {}
  };
  const Status status =
      attention(plan, x.q.view(), x.k.view(), x.v.view(), planned.out.view(), options, variant().with_tap(Watch{}));
  INFO(status.message());
  CHECK(status.code() == Code::invalid_argument);
}

TEST_CASE("variants run over pages and 16-bit keys", "[variant][storage]") {
  const Dense x(43, 1, 2, 1, 1, 100, 16, 16);
  std::vector<bf16> k(7 * 16 * 16), v(7 * 16 * 16);
  const std::array<std::int32_t, 7> table{3, 1, 6, 0, 5, 2, 4};
  test::Values wide_k(1, 1, 100, 16), wide_v(1, 1, 100, 16);
  for (index_t j = 0; j < 100; ++j) {
    for (index_t d = 0; d < 16; ++d) {
      const auto at = static_cast<std::size_t>((table[static_cast<std::size_t>(j / 16)] * 16 + j % 16) * 16 + d);
      k[at] = convert<bf16>(x.k.view()(0, 0, j, d));
      v[at] = convert<bf16>(x.v.view()(0, 0, j, d));
      wide_k.view()(0, 0, j, d) = convert<float>(k[at]);
      wide_v.view()(0, 0, j, d) = convert<float>(v[at]);
    }
  }
  Kv kv;
  kv.k = stored_rows(k.data(), Format::bf16, 16, 1, 16);
  kv.v = stored_rows(v.data(), Format::bf16, 16, 1, 16);
  kv.dim_qk = kv.dim_v = 16;
  kv.batch = 7;
  kv.len = 16;
  kv.home = Home::paged;
  kv.block_table = {table.data(), {1, 7}, {7, 1}};
  const std::array<index_t, 1> len_k{100};
  AttentionOptions options;
  options.causal = Causal::bottom_right;
  options.len_k = len_k;
  const auto both = variant().with_score(bounded).with_mask(near_or_even);
  TestResult paged = test::unwritten(x.q.view(), x.v.view());
  options.lse = paged.lse_view();
  attention<Formats<Format::bf16>>(x.q.view(), kv, paged.out.view(), options, both).or_throw();
  TestResult flat = test::unwritten(x.q.view(), x.v.view());
  options.lse = flat.lse_view();
  attention(x.q.view(), wide_k.view(), wide_v.view(), flat.out.view(), options, both).or_throw();
  CHECK(test::same_bits(paged, flat));
}
