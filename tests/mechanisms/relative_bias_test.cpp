// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/relative_bias.hpp"

#include "fovea/attention.hpp"
#include "mechanisms/relative_support.hpp"

namespace {

using namespace test;
using fovea::distance_bias;
using fovea::distance_bias_floats;
using fovea::DistanceBias;
using fovea::grid_bias;
using fovea::grid_bias_index;
using fovea::GridBias;
using fovea::relative_bias;
using fovea::Status;
using fovea::t5_bias;
using fovea::t5_bias_floats;
using fovea::t5_bucket;
using fovea::T5Buckets;
namespace reference = fovea::reference;

// A T5 bias in memory of exactly its size, NaN around it.
struct T5 {
  T5Buckets buckets;
  Table weight;
  Poisoned memory;
  DistanceBias bias;

  T5(std::uint64_t seed, index_t heads, const T5Buckets& b)
      : buckets(b), weight(seed, 1, b.count, heads, 2.f), memory(static_cast<index_t>(t5_bias_floats(heads, b))) {
    REQUIRE(t5_bias(weight.flat(), buckets, {memory.data(), static_cast<std::size_t>(memory.size())}, bias).ok());
  }
  Expected expected(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v,
                    const AttentionOptions& options) const {
    return expect_relative(q, k, v, options, [&](Tensor<double> out, View<double, 3> lse, const auto& watch) {
      reference::t5(q, k, v, out, weight.flat(), static_cast<double>(buckets.max_distance), buckets.bidirectional, options,
                    lse, watch);
    });
  }
};

template <class V>
Result attend_with(const Dense& x, AttentionOptions options, const V& variant) {
  Result r = unwritten(x.q.view(), x.v.view());
  options.lse = r.lse_view();
  const Status status = attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), options, variant);
  INFO(status.message());
  REQUIRE(status.ok());
  return r;
}

}   // namespace

TEST_CASE("T5 bias against the reference", "[relative_bias]") {
  Random random(5);
  for (const Problem& p : relative_grid()) {
    const Instance x(p);
    const T5Buckets buckets = random.pick<T5Buckets>({{32, 128, true}, {32, 128, false}, {8, 20, true}, {2, 3, false}});
    const T5 t5(random.bits(), p.q_heads, buckets);
    const std::string wrong = check_call(x, t5.expected(x.q, x.k, x.v, x.options()),
                                         [&](auto q, auto k, auto v, auto out, const AttentionOptions& options) {
                                           return attention(q, k, v, out, options, relative_bias(t5.bias));
                                         });
    INFO(describe(p) << ", " << buckets.count << " buckets");
    CHECK(wrong == "");
  }
}

TEST_CASE("T5 bias is a dense bias written out", "[relative_bias][identities]") {
  const index_t len_q = 20, len_k = 300, heads = 4;
  const Dense x(8, 1, heads, 2, len_q, len_k, 24, 17);
  const T5 t5(9, heads, {});
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    options.causal = Causal::bottom_right;
    const Result by_distance = attend_with(x, options, relative_bias(t5.bias));
    Values dense(1, heads, len_q, len_k);
    for (index_t h = 0; h < heads; ++h) {
      for (index_t i = 0; i < len_q; ++i) {
        for (index_t j = 0; j < len_k; ++j)
          dense.view()(0, h, i, j) = t5.weight.flat()(t5_bucket(j - (i + len_k - len_q), t5.buckets), h);
      }
    }
    options.bias = dense.view();
    CHECK(same_bits(by_distance, attend(x, options)));
  }
}

TEST_CASE("a T5 table that is constant per head moves the LSE only", "[relative_bias][identities]") {
  const index_t heads = 3;
  const Dense x(11, 2, heads, 1, 18, 65, 16, 16);
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    const Result plain = attend(x, options);
    const Expected e = expect(x.q.view(), x.k.view(), x.v.view(), options);
    std::vector<float> weight(static_cast<std::size_t>(32 * heads)), memory(t5_bias_floats(heads, {}));
    const float constants[] = {-3.f, 0.25f, 40.f};
    for (std::size_t n = 0; n < weight.size(); ++n) weight[n] = constants[n % 3];
    DistanceBias bias;
    REQUIRE(t5_bias({weight.data(), {32, heads}, {heads, 1}}, {}, memory, bias).ok());
    const Result moved = attend_with(x, options, relative_bias(bias));
    const Expected f =
        expect_relative(x.q.view(), x.k.view(), x.v.view(), options, [&](auto out, auto lse, const auto& watch) {
          reference::t5(x.q.view(), x.k.view(), x.v.view(), out, {weight.data(), {32, heads}, {heads, 1}}, 128, true,
                        options, lse, watch);
        });
    for (std::size_t n = 0; n < plain.out.data.size(); ++n)
      CHECK(std::abs(double{plain.out.data[n]} - double{moved.out.data[n]}) <= e.out_error[n] + f.out_error[n]);
    for (std::size_t n = 0; n < plain.lse.size(); ++n) {
      const double constant = constants[n / 18 % 3];
      CHECK(std::abs(double{moved.lse[n]} - double{plain.lse[n]} - constant) <= e.lse_error[n] + f.lse_error[n]);
    }
  }
}

TEST_CASE("a bias of -slope times distance is ALiBi", "[relative_bias][identities]") {
  const index_t heads = 2, len = 90;
  const Dense x(12, 1, heads, 1, len, len, 16, 8);
  std::vector<float> slopes(heads), values, memory(distance_bias_floats(heads, 2 * len - 1));
  fovea::alibi_slopes_press(slopes);
  for (index_t h = 0; h < heads; ++h) {
    for (index_t d = 1 - len; d < len; ++d)
      values.push_back(-slopes[static_cast<std::size_t>(h)] * static_cast<float>(std::abs(d)));
  }
  DistanceBias bias;
  REQUIRE(distance_bias({values.data(), {heads, 2 * len - 1}, {2 * len - 1, 1}}, 1 - len, memory, bias).ok());
  for (const Causal causal : {Causal::none, Causal::top_left}) {
    AttentionOptions options;
    options.causal = causal;
    const Result by_table = attend_with(x, options, relative_bias(bias));
    options.alibi_slopes = slopes;
    const Expected e = expect(x.q.view(), x.k.view(), x.v.view(), options);
    CHECK(distance(by_table, e) <= 1);
    CHECK(distance(attend(x, options), by_table, e) <= 1);
  }
}

TEST_CASE("Swin's bias against the reference, with lengths that fill no vector", "[relative_bias]") {
  for (const auto& [height, width] : {std::pair<index_t, index_t>{7, 7}, {3, 5}, {1, 1}, {4, 4}, {17, 16}}) {
    const index_t tokens = height * width, heads = 3, entries = (2 * height - 1) * (2 * width - 1);
    std::vector<std::int32_t> index(static_cast<std::size_t>(tokens * tokens));
    REQUIRE(grid_bias_index(height, width, index).ok());
    CHECK(index.front() == (height - 1) * (2 * width - 1) + width - 1);   // no difference
    CHECK(index.back() == index.front());
    CHECK(index[static_cast<std::size_t>(tokens - 1)] == 0);   // last key from the first query
    CHECK(index[static_cast<std::size_t>((tokens - 1) * tokens)] == entries - 1);
    const Table table(13, 1, entries, heads);
    const View<const std::int32_t, 2> pairs{index.data(), {tokens, tokens}, {tokens, 1}};
    GridBias bias;
    REQUIRE(grid_bias(table.flat(), pairs, bias).ok());
    const Dense x(14, 2, heads, heads, tokens, tokens, 16, 12);
    for (const Regime regime : {Regime::prefill, Regime::decode, Regime::wide_decode}) {
      AttentionOptions options;
      options.regime = regime;
      const Expected e =
          expect_relative(x.q.view(), x.k.view(), x.v.view(), options, [&](auto out, auto lse, const auto& watch) {
            reference::grid(x.q.view(), x.k.view(), x.v.view(), out, table.flat(), pairs, options, lse, watch);
          });
      const double off = distance(attend_with(x, options, relative_bias(bias)), e);
      INFO(height << " x " << width << ", " << name(regime) << ": " << off << " budgets");
      CHECK(off <= 1);
    }
  }
}

TEST_CASE("relative bias: rows that break careless kernels", "[relative_bias]") {
  const index_t len = 300;
  const T5 t5(15, 1, {.bidirectional = false});
  for (const int shape : {0, 1, 2, 3}) {
    Dense x(16, 1, 1, 1, 5, len, 1, 7);
    std::fill(x.q.data.begin(), x.q.data.end(), 1.f);
    for (index_t j = 0; j < len; ++j) {
      const auto f = static_cast<float>(j);
      x.k.data[static_cast<std::size_t>(j)] = shape == 0   ? f
                                              : shape == 1 ? -f
                                              : shape == 2 ? 1e4f
                                                           : (j % 2 == 0 ? 1e4f : -1e4f);
    }
    for (const Regime regime : {Regime::prefill, Regime::decode, Regime::wide_decode}) {
      AttentionOptions options;
      options.scale = 1.f;
      options.regime = regime;
      options.causal = Causal::bottom_right;
      const double off = distance(attend_with(x, options, relative_bias(t5.bias)),
                                  t5.expected(x.q.view(), x.k.view(), x.v.view(), options));
      INFO("scores " << shape << ", " << name(regime) << ": " << off);
      CHECK(off <= 1);
      // Nothing visible, then one key.
      for (const index_t offset : {index_t{-5}, index_t{-4}}) {
        options.causal = Causal::top_left;
        options.q_offset = {&offset, 1};
        const Result r = attend_with(x, options, relative_bias(t5.bias));
        CHECK(r.at(0, 0, 3, 0) == 0.f);
        CHECK(r.lse_at(0, 0, 3) == -kInfinity);
        CHECK(r.at(0, 0, 4, 0) == (offset == -5 ? 0.f : x.v.data[0]));
      }
    }
  }
}

TEST_CASE("relative bias: later keys leave no trace, lanes change no bit", "[relative_bias]") {
  const index_t heads = 2, len = 40;
  const T5 t5(17, heads, {.bidirectional = false});
  const Dense x(18, 1, heads, 1, len, len, 16, 16);
  Dense changed = x;
  for (std::size_t n = 0; n < changed.k.data.size(); ++n) {
    if (n >= 30 * 16) changed.k.data[n] = changed.v.data[n] = n % 2 == 0 ? kNan : 1e30f;
  }
  ThreadPerLane threads;
  for (const Regime regime : {Regime::prefill, Regime::decode, Regime::wide_decode}) {
    AttentionOptions options;
    options.regime = regime;
    options.causal = Causal::top_left;
    const Result a = attend_with(x, options, relative_bias(t5.bias)),
                 b = attend_with(changed, options, relative_bias(t5.bias));
    for (index_t h = 0; h < heads; ++h) {
      for (index_t i = 0; i < 30; ++i) {
        CHECK(same_bits(std::span(&a.out.view()(0, h, i, 0), 16), std::span(&b.out.view()(0, h, i, 0), 16)));
      }
    }
    options.executor = {threads, 3};
    CHECK(same_bits(a, attend_with(x, options, relative_bias(t5.bias))));
  }
}

TEST_CASE("relative bias: what is refused, with numbers", "[relative_bias]") {
  std::vector<float> weight(32 * 2), memory(t5_bias_floats(2, {}));
  DistanceBias bias;
  const View<const float, 2> view{weight.data(), {32, 2}, {2, 1}};
  using Catch::Matchers::ContainsSubstring;
  CHECK_THAT(t5_bias(view, {.count = 16}, memory, bias).message(), ContainsSubstring("[32, 2], must be [16"));
  CHECK_THAT(t5_bias(view, {.max_distance = 8}, memory, bias).message(), ContainsSubstring("max_distance beyond those 8"));
  CHECK_THAT(t5_bias(view, {}, std::span(memory).first(7), bias).message(), ContainsSubstring("7 floats, must have"));
  CHECK_THAT(distance_bias({weight.data(), {1, 0}, {0, 1}}, 0, memory, bias).message(), ContainsSubstring("0 distances"));
  CHECK(bias.table == nullptr);
  std::vector<std::int32_t> index(9);
  GridBias grid;
  CHECK_THAT(grid_bias_index(2, 2, index).message(), ContainsSubstring("9 entries, must have 16"));
  CHECK_THAT(grid_bias(view, {index.data(), {3, 3}, {1, 3}}, grid).message(), ContainsSubstring("innermost stride 3"));
}

TEST_CASE("relative bias: a call larger than the tables reads nothing outside of them", "[relative_bias]") {
  const Dense x(19, 1, 2, 2, 40, 40, 8, 8), wide(19, 1, 4, 4, 40, 40, 8, 8);
  const T5 t5(20, 2, {.count = 4, .max_distance = 3});
  for (const float y : attend_with(x, {}, relative_bias(t5.bias)).out.data) REQUIRE(std::isfinite(y));
  Table table(21, 1, 9, 2);
  std::vector<std::int32_t> index(16, 1000);
  GridBias grid;
  REQUIRE(grid_bias(table.flat(), {index.data(), {4, 4}, {4, 1}}, grid).ok());
  for (const float y : attend_with(x, {}, relative_bias(grid)).out.data) REQUIRE(std::isfinite(y));

  // Heads are not clamped: the call is refused.
  Values out(1, 4, 40, 8, canary());
  const auto refused = [&](const auto& bias) {
    const Status s = fovea::attention(wide.q.view(), wide.k.view(), wide.v.view(), out.view(), {}, relative_bias(bias));
    CHECK_THAT(s.message(), Catch::Matchers::ContainsSubstring("has 2 heads, the call has 4 q heads"));
    CHECK(is_canary(out.data[0]));
  };
  refused(t5.bias);
  refused(grid);
}
