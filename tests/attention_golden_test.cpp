// SPDX-License-Identifier: Apache-2.0
// Numbers known without this library: worked by hand or published with the mechanism.
#include <cmath>

#include "support/dense.hpp"

namespace {

using namespace test;
using fovea::Causal;
using fovea::Regime;

// One query 1 against keys 1, 0, -1 at scale 1: scores [1, 0, -1]; the values are unit vectors, so out is the weights.
struct Golden {
  Values q{1, 1, 1, 1, 1.f}, k{1, 1, 3, 1}, v = identity_values(1, 1, 3);
  Golden() { k.data = {1, 0, -1}; }

  void check(const AttentionOptions& base, std::vector<double> weights, double lse) const {
    AttentionOptions options = base;
    options.scale = 1.f;
    for (const Regime regime : kRegimes) {
      options.regime = regime;
      const Result r = attend(q.view(), k.view(), v.view(), options);
      const Expected e = expect(q.view(), k.view(), v.view(), options);
      for (std::size_t j = 0; j < 3; ++j) {
        CHECK(e.out[j] == Catch::Approx(weights[j]).margin(6e-8));   // the table has seven digits
        CHECK(double{r.out.data[j]} == Catch::Approx(weights[j]).margin(6e-7));
      }
      CHECK(e.lse[0] == Catch::Approx(lse).margin(6e-8));
      CHECK(double{r.lse[0]} == Catch::Approx(lse).margin(1e-6));
    }
  }
};

}  // namespace

TEST_CASE("scores 1, 0, -1 give the weights of the table", "[golden]") {
  const Golden golden;
  AttentionOptions options;
  golden.check(options, {0.6652410, 0.2447285, 0.0900306}, 1.4076060);

  // The row's entropy, LSE - sum p s, and the same from the weights alone. check() found p within 6e-7 and the LSE within
  // 1e-6; s is 1, 0 and -1, and a weight's own term moves by 1 + ln p of it.
  options.scale = 1.f;
  for (const Regime regime : kRegimes) {
    options.regime = regime;
    const Result r = attend(golden.q.view(), golden.k.view(), golden.v.view(), options);
    double from_lse = double{r.lse[0]}, from_weights = 0, margin = 0;
    for (std::size_t j = 0; j < 3; ++j) {
      const double p = double{r.out.data[j]};
      from_lse -= p * double{golden.k.data[j]};
      from_weights -= p * std::log(p);
      margin += 6e-7 * std::abs(1 + std::log(p));
    }
    CHECK(from_lse == Catch::Approx(0.8323956).margin(1e-6 + 2 * 6e-7));
    CHECK(from_weights == Catch::Approx(0.8323956).margin(margin));
  }
}

TEST_CASE("a sink logit takes its share and gives no value", "[golden][sink]") {
  const Golden golden;
  AttentionOptions options;
  const std::vector<float> two{2.f}, zero{0.f}, never{-std::numeric_limits<float>::infinity()};
  options.sink = two;
  golden.check(options, {0.2368828, 0.0871443, 0.0320586}, 2 + std::log1p(std::exp(1.4076060 - 2)));
  options.sink = zero;
  golden.check(options, {0.5344466, 0.1966119, 0.0723295}, std::log1p(std::exp(1.4076060)));
  options.sink = never;
  golden.check(options, {0.6652410, 0.2447285, 0.0900306}, 1.4076060);
}

TEST_CASE("softcap 2 makes the scores 0.9242343, 0, -0.9242343", "[golden][softcap]") {
  const Golden golden;
  AttentionOptions options;
  options.softcap = 2;
  const double up = std::exp(0.9242343), down = std::exp(-0.9242343), sum = up + 1 + down;
  golden.check(options, {up / sum, 1 / sum, down / sum}, std::log(sum));
}

TEST_CASE("softcap comes before the bias: a bias of -inf masks", "[golden][softcap]") {
  const Golden golden;
  AttentionOptions options;
  options.softcap = 2;
  const std::vector<float> bias{-std::numeric_limits<float>::infinity(), 0.f, 1.f};
  options.bias = {bias.data(), {1, 1, 1, 3}, {3, 3, 3, 1}};
  const double last = std::exp(1 - 0.9242343);
  golden.check(options, {0, 1 / (1 + last), last / (1 + last)}, std::log(1 + last));
}

TEST_CASE("window left 1, right 2 over zero scores averages the visible values", "[golden][window]") {
  const Values q(1, 1, 5, 1), k(1, 1, 5, 1);
  Values v(1, 1, 5, 1);
  v.data = {0, 1, 2, 3, 4};
  AttentionOptions options;
  options.window = {1, 2};
  for (const Regime regime : kRegimes) {
    options.regime = regime;
    const Result r = attend(q.view(), k.view(), v.view(), options);
    const double want[] = {1.0, 1.5, 2.5, 3.0, 3.5};
    for (index_t i = 0; i < 5; ++i) CHECK(double{r.at(0, 0, i, 0)} == Catch::Approx(want[i]).margin(1e-6));
  }
}

TEST_CASE("ALiBi lowers a score by slope times distance, in both directions", "[golden][alibi]") {
  const index_t heads = 8, len = 4;
  const Values q(1, heads, 2, 3), k(1, 1, len, 3), v = identity_values(1, 1, len);
  std::vector<float> slopes;
  for (int h = 0; h < heads; ++h) slopes.push_back(std::ldexp(1.f, -(h + 1)));   // 1/2 .. 1/256
  AttentionOptions options;
  options.alibi_slopes = slopes;
  const std::vector<index_t> offset{2};
  for (const bool is_causal : {false, true}) {
    options.causal = is_causal ? Causal::bottom_right : Causal::none;
    options.q_offset = offset;   // the queries stand at 2 and 3
    for (const Regime regime : kRegimes) {
      options.regime = regime;
      const Result r = attend(q.view(), k.view(), v.view(), options);
      for (index_t h = 0; h < heads; ++h) {
        for (index_t i = 0; i < 2; ++i) {
          double weights[4] = {}, sum = 0;
          for (index_t j = 0; j < len; ++j) {
            const index_t distance = i + 2 - j;
            if (is_causal && distance < 0) continue;
            weights[j] = std::exp(-double{slopes[static_cast<std::size_t>(h)]} * std::abs(static_cast<double>(distance)));
            sum += weights[j];
          }
          for (index_t j = 0; j < len; ++j) {
            INFO("causal " << is_causal << " head " << h << " query " << i << " key " << j);
            CHECK(double{r.at(0, h, i, j)} == Catch::Approx(weights[j] / sum).margin(1e-6));
          }
          CHECK(double{r.lse_at(0, h, i)} == Catch::Approx(std::log(sum)).margin(1e-6));
        }
      }
    }
  }
}

TEST_CASE("merging {1, 0} with {-1} restores the three scores", "[golden][merge]") {
  const Golden golden;
  AttentionOptions options;
  options.scale = 1.f;
  const auto k = golden.k.view(), v = golden.v.view();
  Result a = attend(golden.q.view(), only_pos(k, 0, 2), only_pos(v, 0, 2), options);
  const Result b = attend(golden.q.view(), only_pos(k, 2, 1), only_pos(v, 2, 1), options);
  CHECK(double{a.lse[0]} == Catch::Approx(1.3132617).margin(1e-6));
  CHECK(double{b.lse[0]} == Catch::Approx(-1).margin(1e-6));
  REQUIRE(fovea::merge(a.out.view(), a.lse_view(), b.out.view(), b.lse_view()).ok());
  CHECK(double{a.lse[0]} == Catch::Approx(1.4076060).margin(1e-6));
  const double want[] = {0.6652410, 0.2447285, 0.0900306};
  for (std::size_t j = 0; j < 3; ++j) CHECK(double{a.out.data[j]} == Catch::Approx(want[j]).margin(6e-7));
}

TEST_CASE("the default scale is 1 / sqrt(dim_qk), never of dim_v", "[golden]") {
  const Values q(1, 1, 1, 16, 0.5f);
  Values k(1, 1, 2, 16);
  for (index_t d = 0; d < 16; ++d) k.view()(0, 0, 0, d) = 0.5f;   // dots 4 and 0, scores 1 and 0
  const Values v = identity_values(1, 1, 2);
  const Result r = attend(q.view(), k.view(), v.view());
  CHECK(double{r.out.data[0]} == Catch::Approx(std::exp(1.) / (std::exp(1.) + 1)).margin(1e-6));
}

TEST_CASE("query head h reads kv head h / (q_heads / kv_heads)", "[golden][gqa]") {
  const index_t q_heads = 6, kv_heads = 2;
  const Values q(1, q_heads, 3, 4), k(1, kv_heads, 5, 4);
  Values v(1, kv_heads, 5, 2);
  for (index_t h = 0; h < kv_heads; ++h) {
    for (index_t j = 0; j < 5; ++j) v.view()(0, h, j, 0) = v.view()(0, h, j, 1) = static_cast<float>(h + 1);
  }
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    const Result r = attend(q.view(), k.view(), v.view(), options);
    for (index_t h = 0; h < q_heads; ++h) {
      for (index_t i = 0; i < 3; ++i) CHECK(double{r.at(0, h, i, 1)} == Catch::Approx(h < 3 ? 1. : 2.).margin(1e-6));
    }
  }
}
