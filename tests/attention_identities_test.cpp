// SPDX-License-Identifier: Apache-2.0
// What softmax attention must satisfy whatever the numbers are, and the inputs that break careless kernels.
#include <cmath>

#include "support/dense.hpp"
#include "support/problem.hpp"

namespace {

using namespace test;

void check_reference(const Dense& x, const AttentionOptions& base) {
  for (const Regime regime : kRegimes) {
    AttentionOptions options = base;
    options.regime = regime;
    const Result r = attend(x, options);
    const double off = distance(r, expect(x.q.view(), x.k.view(), x.v.view(), options));
    INFO("regime " << name(regime) << ": " << off << " budgets");
    CHECK(off <= 1);
  }
}

// One head, one feature, scale 1: the scores are the given numbers.
Dense with_scores(const std::vector<float>& scores, index_t len_q = 1) {
  Dense x(41, 1, 1, 1, len_q, static_cast<index_t>(scores.size()), 1, 7);
  std::fill(x.q.data.begin(), x.q.data.end(), 1.f);
  x.k.data = scores;
  return x;
}

AttentionOptions scale_one() {
  AttentionOptions options;
  options.scale = 1.f;
  return options;
}

}  // namespace

TEST_CASE("values of one give one", "[identities]") {
  for (const index_t len_k : {1, 5, 64, 333}) {
    Dense x(42, 1, 2, 1, 4, len_k, 16, 5);
    std::fill(x.v.data.begin(), x.v.data.end(), 1.f);
    for (const Regime regime : kRegimes) {
      AttentionOptions options;
      options.regime = regime;
      const Expected e = expect(x.q.view(), x.k.view(), x.v.view(), options);
      const Result r = attend(x, options);
      for (std::size_t n = 0; n < r.out.data.size(); ++n) CHECK(std::abs(double{r.out.data[n]} - 1) <= e.out_error[n]);
    }
  }
}

TEST_CASE("a constant added to a row of scores moves the LSE only", "[identities]") {
  const index_t len_q = 3, len_k = 130;
  const Dense x(43, 1, 2, 1, len_q, len_k, 16, 8);
  for (const float constant : {-40.f, 0.5f, 12.f, 300.f}) {
    Values bias(1, 1, 1, len_k, constant);
    for (const Regime regime : kRegimes) {
      AttentionOptions options;
      options.regime = regime;
      const Result plain = attend(x, options);
      options.bias = bias.view();
      const Result moved = attend(x, options);
      const Expected e = expect(x.q.view(), x.k.view(), x.v.view(), options);
      for (std::size_t n = 0; n < plain.out.data.size(); ++n) {
        CHECK(std::abs(double{plain.out.data[n]} - double{moved.out.data[n]}) <= 2 * e.out_error[n]);
      }
      for (std::size_t n = 0; n < plain.lse.size(); ++n) {
        CHECK(std::abs(double{moved.lse[n]} - double{plain.lse[n]} - double{constant}) <= 2 * e.lse_error[n]);
      }
    }
  }
}

TEST_CASE("with as many queries as keys both causal alignments are one", "[identities]") {
  const Dense x(44, 2, 2, 2, 67, 67, 16, 16);
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    options.causal = Causal::top_left;
    const Result top = attend(x, options);
    options.causal = Causal::bottom_right;
    CHECK(same_bits(top, attend(x, options)));
  }
}

TEST_CASE("a scale of 0 averages, a negative scale is a negative query", "[identities]") {
  const Dense x(45, 1, 2, 1, 5, 90, 12, 12);
  AttentionOptions options;
  options.scale = 0.f;
  check_reference(x, options);
  for (const Regime regime : kRegimes) {
    options.regime = regime;
    options.scale = -0.25f;
    const Result negative = attend(x, options);
    Dense y = x;
    for (float& value : y.q.data) value = -value;
    options.scale = 0.25f;
    CHECK(distance(negative, attend(y, options), expect(y.q.view(), y.k.view(), y.v.view(), options)) <= 1);
  }
  check_reference(x, options);
}

TEST_CASE("empty rows: output 0, LSE -inf, or the sink's logit", "[identities][empty]") {
  const Dense x(46, 1, 2, 1, 7, 5, 8, 8);
  const std::vector<float> sinks{1.5f, -2.f};
  for (const bool with_sink : {false, true}) {
    for (const Regime regime : kRegimes) {
      AttentionOptions options;
      options.regime = regime;
      if (with_sink) options.sink = sinks;
      const auto check_empty = [&](const Result& r, index_t i) {
        for (index_t h = 0; h < 2; ++h) {
          for (index_t d = 0; d < 8; ++d) CHECK(r.at(0, h, i, d) == 0);
          CHECK(r.lse_at(0, h, i) == (with_sink ? sinks[static_cast<std::size_t>(h)] : -kInfinity));
        }
      };
      options.causal = Causal::bottom_right;   // offset -2: rows 0 and 1 see nothing
      const Result some = attend(x, options);
      check_empty(some, 0), check_empty(some, 1);
      CHECK(some.at(0, 0, 2, 0) != 0);
      const std::vector<index_t> before{-7}, beyond{100}, no_keys{0};
      options.q_offset = before;
      const Result none = attend(x, options);
      for (index_t i = 0; i < 7; ++i) check_empty(none, i);
      options.causal = Causal::none;
      options.q_offset = beyond;
      options.window = {3, 3};
      const Result outside = attend(x, options);
      for (index_t i = 0; i < 7; ++i) check_empty(outside, i);
      options = {};
      options.regime = regime;
      if (with_sink) options.sink = sinks;
      options.len_k = no_keys;
      const Result unused = attend(x, options);
      for (index_t i = 0; i < 7; ++i) check_empty(unused, i);
      options.len_k = {};
      const Result absent = attend(x.q.view(), only_pos(x.k.view(), 0, 0), only_pos(x.v.view(), 0, 0), options);
      for (index_t i = 0; i < 7; ++i) check_empty(absent, i);
      const std::vector<std::uint8_t> nothing(5, 0);
      options.keep = {nothing.data(), {1, 1, 1, 5}, {5, 5, 5, 1}};
      const Result dropped = attend(x, options);
      for (index_t i = 0; i < 7; ++i) check_empty(dropped, i);
      options.keep = {};
      const std::vector<float> minus(5, -kInfinity);
      options.bias = {minus.data(), {1, 1, 1, 5}, {5, 5, 5, 1}};
      const Result biased = attend(x, options);
      for (index_t i = 0; i < 7; ++i) check_empty(biased, i);
    }
  }
}

TEST_CASE("no queries, no keys, no sequences: accepted, nothing else written", "[identities][empty]") {
  const Dense x(47, 2, 2, 1, 4, 6, 8, 8);
  AttentionOptions options;
  const Result no_queries = attend(only_pos(x.q.view(), 0, 0), x.k.view(), x.v.view(), options);
  CHECK(no_queries.out.data.empty());
  const Result no_batch = attend(cut(x.q.view(), 0, 0, 0), cut(x.k.view(), 0, 0, 0), cut(x.v.view(), 0, 0, 0), options);
  CHECK(no_batch.out.data.empty());
  const std::vector<index_t> only_zero{0, 0, 0};
  options.cu_len_q = options.cu_len_k = only_zero;
  const auto q = cut(cut(x.q.view(), 0, 0, 1), 2, 0, 0), k = cut(cut(x.k.view(), 0, 0, 1), 2, 0, 0);
  const auto v = cut(cut(x.v.view(), 0, 0, 1), 2, 0, 0);
  CHECK(attend(q, k, v, options).out.data.empty());
}

TEST_CASE("one key, the last key only, lengths beside every tile edge", "[identities][edges]") {
  for (const index_t len_k : {1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1025}) {
    const Dense x(48, 1, 2, 1, 3, len_k, 16, 12);
    check_reference(x, {});
    // The only visible key is the last one: every tile before it is skipped or fully masked.
    std::vector<std::uint8_t> last(static_cast<std::size_t>(len_k), 0);
    last.back() = 1;
    AttentionOptions options;
    options.keep = {last.data(), {1, 1, 1, len_k}, {len_k, len_k, len_k, 1}};
    for (const Regime regime : kRegimes) {
      options.regime = regime;
      const Result r = attend(x, options);
      for (index_t d = 0; d < 12; ++d) CHECK(r.at(0, 1, 2, d) == Catch::Approx(x.v.view()(0, 0, len_k - 1, d)).margin(1e-6));
    }
  }
}

TEST_CASE("the first tiles masked for some rows only", "[identities][edges]") {
  const index_t len_q = 30, len_k = 600;
  const Dense x(49, 1, 2, 1, len_q, len_k, 16, 12);
  std::vector<float> bias(static_cast<std::size_t>(len_q * len_k), 0.f);
  for (index_t i = 0; i < len_q; i += 2) {
    for (index_t j = 0; j < 20 * i; ++j) bias[static_cast<std::size_t>(i * len_k + j)] = -kInfinity;
  }
  AttentionOptions options;
  options.bias = {bias.data(), {1, 1, len_q, len_k}, {0, 0, len_k, 1}};
  check_reference(x, options);
  options.bias = {};
  options.window = {40, -1};
  const std::vector<index_t> offset{300};
  options.q_offset = offset;
  check_reference(x, options);
}

TEST_CASE("sorted, reverse sorted and jumping scores", "[identities][scores]") {
  const std::size_t count = 1000;
  std::vector<float> rising(count), falling(count), steps(count), spike(count, 0.f), late(count);
  for (std::size_t j = 0; j < count; ++j) {
    rising[j] = 0.25f * static_cast<float>(j);
    falling[j] = -rising[j];
    steps[j] = 50.f * static_cast<float>(j / 64);   // every tile's maximum is 50 above the one before
    late[j] = j + 1 == count ? 50.f : 0.f;
  }
  spike[500] = 80.f;
  for (const auto& scores : {rising, falling, steps, spike, late}) {
    check_reference(with_scores(scores), scale_one());
    check_reference(with_scores(scores, 40), scale_one());
  }
}

TEST_CASE("scores of +-1e4 and beyond the range of exp", "[identities][scores]") {
  Random random(50);
  for (const float range : {90.f, 1e4f, 1e8f, 1e30f}) {
    std::vector<float> scores(300);
    for (float& score : scores) score = random.uniform(-range, range);
    check_reference(with_scores(scores), scale_one());
    for (float& score : scores) score = range;   // all equal: the average, however large
    const Dense equal = with_scores(scores);
    for (const Regime regime : kRegimes) {
      AttentionOptions options = scale_one();
      options.regime = regime;
      const Result r = attend(equal, options);
      for (index_t d = 0; d < 7; ++d) {
        double mean = 0;
        for (index_t j = 0; j < 300; ++j) mean += double{equal.v.view()(0, 0, j, d)} / 300;
        CHECK(double{r.at(0, 0, 0, d)} == Catch::Approx(mean).margin(2e-5));
      }
    }
    for (float& score : scores) score = -range;
    const Result r = attend(with_scores(scores), scale_one());
    CHECK(r.lse[0] == Catch::Approx(-double{range} + std::log(300.)).epsilon(1e-6));
  }
}

TEST_CASE("tiny differences survive a large common score", "[identities][scores]") {
  // 1000 and 1001 are exact, so the weights of a pair are those of 0 and 1 up to the rounding of the scores themselves.
  check_reference(with_scores({1000.f, 1001.f, 999.f}), scale_one());
  check_reference(with_scores({-1000.f, -1001.f, -999.f}), scale_one());
}

TEST_CASE("softcap of large, small and tiny scores", "[identities][softcap]") {
  AttentionOptions options = scale_one();
  for (const float cap : {0.01f, 1.f, 50.f, 1e4f}) {
    options.softcap = cap;
    check_reference(with_scores({-1e6f, -100.f, -1.f, -1e-3f, 0.f, 1e-6f, 0.5f, 0.7f, 3.f, 49.f, 200.f, 1e9f}), options);
  }
  const Dense x(51, 1, 4, 2, 20, 200, 32, 32);
  options.scale.reset();
  options.softcap = 2;
  check_reference(x, options);
}

TEST_CASE("a softcap far above the scores is no softcap", "[identities][softcap]") {
  const Dense x(52, 1, 2, 1, 5, 100, 16, 16);
  AttentionOptions options;
  const Result plain = attend(x, options);
  options.softcap = 1e6f;
  const Expected e = expect(x.q.view(), x.k.view(), x.v.view(), options);
  CHECK(distance(plain, attend(x, options), e) <= 1);
}

TEST_CASE("a row of sinks: huge, equal, vanishing", "[identities][sink]") {
  const Dense x(53, 1, 4, 2, 6, 130, 16, 16);
  const std::vector<float> sinks{-1e4f, 0.f, 5.f, 80.f};
  AttentionOptions options;
  options.sink = sinks;
  check_reference(x, options);
  // From the plain call: out *= 1 / (1 + exp(sink - lse)), lse = log(exp(lse) + exp(sink)).
  const Result with = attend(x, options);
  const Expected e = expect(x.q.view(), x.k.view(), x.v.view(), options);
  options.sink = {};
  const Result without = attend(x, options);
  for (index_t h = 0; h < 4; ++h) {
    for (index_t i = 0; i < 6; ++i) {
      const double sink = sinks[static_cast<std::size_t>(h)], lse = without.lse_at(0, h, i);
      const double factor = 1 / (1 + std::exp(sink - lse));
      const auto at = static_cast<std::size_t>(h * 6 + i);
      for (index_t d = 0; d < 16; ++d) {
        const double budget = 2 * e.out_error[at * 16 + static_cast<std::size_t>(d)];
        CHECK(std::abs(double{with.at(0, h, i, d)} - factor * double{without.at(0, h, i, d)}) <= budget);
      }
      const double joined = std::max(lse, sink) + std::log1p(std::exp(-std::abs(lse - sink)));
      CHECK(std::abs(double{with.lse_at(0, h, i)} - joined) <= 2 * e.lse_error[at]);
    }
  }
}

TEST_CASE("a sink of +inf takes everything", "[identities][sink]") {
  const Dense x(58, 1, 2, 1, 3, 70, 8, 8);
  const std::vector<float> sinks{kInfinity, 0.f};
  AttentionOptions options;
  options.sink = sinks;
  check_reference(x, options);
  for (const Regime regime : kRegimes) {
    options.regime = regime;
    const Result r = attend(x, options);
    for (index_t i = 0; i < 3; ++i) {
      for (index_t d = 0; d < 8; ++d) CHECK(r.at(0, 0, i, d) == 0);
      CHECK(r.lse_at(0, 0, i) == kInfinity);
      CHECK(std::isfinite(r.lse_at(0, 1, i)));
    }
  }
}

TEST_CASE("every dim of the contract, equal and unequal", "[identities][dims]") {
  for (const index_t dim : {40, 64, 80, 96, 128, 192, 256, 576}) {
    for (const index_t dim_v : {index_t{1}, index_t{31}, dim, index_t{512}}) {
      check_reference(Dense(54, 1, 2, 1, 3, 70, dim, dim_v), {});
    }
  }
}

TEST_CASE("NaN in a live query, key or value reaches exactly the rows that use it", "[identities][nan]") {
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    Dense x(55, 1, 2, 1, 20, 100, 16, 16);
    x.q.view()(0, 1, 7, 3) = kNan;
    Result r = attend(x, options);
    for (index_t h = 0; h < 2; ++h) {
      for (index_t i = 0; i < 20; ++i) {
        const bool expected = h == 1 && i == 7;
        CHECK(std::isnan(r.at(0, h, i, 0)) == expected);
        CHECK(std::isnan(r.at(0, h, i, 15)) == expected);
        CHECK(std::isnan(r.lse_at(0, h, i)) == expected);
      }
    }
    for (const float softcap : {0.f, 3.f}) {
      Dense y(56, 1, 2, 1, 20, 100, 16, 16);
      options.softcap = softcap;
      y.k.view()(0, 0, 66, 15) = kNan;
      r = attend(y, options);
      for (float value : r.out.data) CHECK(std::isnan(value));
      for (float value : r.lse) CHECK(std::isnan(value));
    }
    options.softcap = 0;
    Dense z(57, 1, 2, 1, 20, 100, 16, 16);
    z.v.view()(0, 0, 99, 4) = kNan;
    r = attend(z, options);
    for (index_t h = 0; h < 2; ++h) {
      for (index_t i = 0; i < 20; ++i) {
        for (index_t d = 0; d < 16; ++d) CHECK(std::isnan(r.at(0, h, i, d)) == (d == 4));
        CHECK(std::isfinite(r.lse_at(0, h, i)));
      }
    }
  }
}

TEST_CASE("a NaN that follows or precedes a large score is not lost by the running maximum", "[identities][nan]") {
  for (const std::size_t at : {0u, 63u, 64u, 500u, 999u}) {
    for (const float around : {0.f, 1e4f, -1e4f}) {
      std::vector<float> scores(1000, around);
      scores[at] = kNan;
      for (const Regime regime : kRegimes) {
        AttentionOptions options = scale_one();
        options.regime = regime;
        const Result r = attend(with_scores(scores), options);
        for (float value : r.out.data) CHECK(std::isnan(value));
        CHECK(std::isnan(r.lse[0]));
      }
    }
  }
}

TEST_CASE("a live NaN value shows even where its weight rounds to nothing", "[identities][nan]") {
  std::vector<float> scores(200, 0.f);
  scores[150] = -1000;
  Dense x = with_scores(scores);
  x.v.view()(0, 0, 150, 2) = kNan;
  for (const Regime regime : kRegimes) {
    AttentionOptions options = scale_one();
    options.regime = regime;
    const Result r = attend(x, options);
    for (index_t d = 0; d < 7; ++d) CHECK(std::isnan(r.at(0, 0, 0, d)) == (d == 2));
  }
}
