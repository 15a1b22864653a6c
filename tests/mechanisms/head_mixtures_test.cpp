// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/head_mixtures.hpp"

#include "around_softmax.hpp"
#include "fovea/reference/head_mixtures.hpp"

namespace {

using namespace test;

// One weight in `of` is not 0.
Values weights(const Dense& x, index_t of) {
  Values w(x.q.batch, x.q.heads, x.q.len, 1);
  Random random(141);
  for (float& value : w.data) value = random.one_in(of) ? random.uniform(0.1f, 2.f) : 0.f;
  return w;
}
View<const float, 3> rows_of(const Values& w) {
  return {w.data.data(), {w.batch, w.heads, w.len}, {w.heads * w.len, w.len, 1}};
}

Run run_with(index_t of) {
  return [of](const Dense& x, const AttentionOptions& options) {
    const Values w = weights(x, of);
    Result r = unwritten(x.q.view(), x.v.view());
    AttentionOptions with_lse = options;
    with_lse.lse = r.lse_view();
    const fovea::Status status =
        fovea::head_mixture_attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), rows_of(w), with_lse);
    INFO(status.message());
    REQUIRE(status.ok());
    return r;
  };
}
Ask ask_with(index_t of) {
  return [of](const Dense& x, const AttentionOptions& options) {
    const Values w = weights(x, of);
    Expected e = expect(x.q.view(), x.k.view(), x.v.view(), options);
    fovea::reference::head_mixtures(x.q.view(), x.k.view(), x.v.view(),
                                    fovea::bhsd(e.out.data(), x.q.batch, x.q.heads, x.q.len, x.v.dim), rows_of(w), options);
    for (std::size_t n = 0; n < e.out.size(); ++n) {
      const double weight = double{w.data[n / static_cast<std::size_t>(x.v.dim)]};
      e.out_error[n] = weight * e.out_error[n] + kUnit * std::abs(e.out[n]);
    }
    for (std::size_t row = 0; row < e.lse.size(); ++row) {
      if (w.data[row] != 0.f) continue;
      e.lse[row] = -double{kInfinity};
      e.lse_error[row] = 0;
    }
    return e;
  };
}

}   // namespace

TEST_CASE("head_mixtures: against the reference", "[head_mixtures]") {
  for (const index_t of : {2, 15}) check_around_softmax(run_with(of), ask_with(of), {{4, 2}, {2, 2}, {6, 1}});
}

TEST_CASE("head_mixtures: weights of one are plain attention", "[head_mixtures]") {
  const Dense x(142, 2, 4, 2, 17, 40, 16, 20);
  const Values ones(2, 4, 17, 1, 1.f);
  for (const Regime regime : kRegimes) {
    Result r = unwritten(x.q.view(), x.v.view());
    AttentionOptions options;
    options.causal = Causal::bottom_right;
    options.regime = regime;
    const Result want = attend(x, options);
    options.lse = r.lse_view();
    REQUIRE(fovea::attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), options, fovea::head_mixture(rows_of(ones)))
                .ok());
    CHECK(same_bits(r, want));
  }
}

TEST_CASE("head_mixtures: heads that are not chosen leave no trace", "[head_mixtures]") {
  // Heads 0 and 1 share kv head 0, nobody chose it: its NaN is not seen. Row 3 of head 2 is not chosen either, its
  // neighbours are.
  Dense x(143, 1, 4, 2, 30, 40, 16, 20);
  Values w(1, 4, 30, 1, 0.5f);
  for (index_t i = 0; i < 30; ++i) w.view()(0, 0, i, 0) = w.view()(0, 1, i, 0) = 0.f;
  w.view()(0, 2, 3, 0) = 0.f;
  for (index_t j = 0; j < 40; ++j) {
    for (index_t d = 0; d < 16; ++d) x.k.view()(0, 0, j, d) = x.v.view()(0, 0, j, d) = kNan;
  }
  x.k.view()(0, 1, 7, 0) = kNan;
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    Result r = unwritten(x.q.view(), x.v.view());
    REQUIRE(fovea::head_mixture_attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), rows_of(w), options).ok());
    bool closed = true, seen = true;
    for (index_t i = 0; i < 30; ++i) {
      for (index_t d = 0; d < 20; ++d) {
        closed = closed && r.at(0, 0, i, d) == 0 && r.at(0, 1, i, d) == 0 && r.at(0, 2, 3, d) == 0;
        seen = seen && (i == 3 || std::isnan(r.at(0, 2, i, d))) && std::isnan(r.at(0, 3, i, d));
      }
    }
    INFO("regime " << name(regime));
    CHECK(closed);
    CHECK(seen);
  }
}

TEST_CASE("head_mixtures: MoA's slots are its experts", "[head_mixtures]") {
  constexpr index_t kExperts = 6, kSlots = 2, kLen = 19, kDim = 16;
  const Dense x(144, 1, kExperts, 1, kLen, kLen, kDim, kDim);   // the queries of every expert
  Values slots(1, kSlots, kLen, kDim), w(1, kSlots, kLen, 1);
  std::vector<std::array<index_t, kSlots>> chosen(static_cast<std::size_t>(kLen));
  Random random(145);
  for (index_t i = 0; i < kLen; ++i) {
    std::array<float, kExperts> logits{};
    std::array<float, kSlots> token{};
    for (float& logit : logits) logit = random.normal();
    REQUIRE(fovea::moa_route(logits, chosen[static_cast<std::size_t>(i)], token).ok());
    for (index_t s = 0; s < kSlots; ++s) {
      const index_t expert = chosen[static_cast<std::size_t>(i)][static_cast<std::size_t>(s)];
      w.view()(0, s, i, 0) = token[static_cast<std::size_t>(s)];
      for (index_t d = 0; d < kDim; ++d) slots.view()(0, s, i, d) = x.q.view()(0, expert, i, d);
    }
  }
  AttentionOptions options;
  options.causal = Causal::bottom_right;
  options.regime = Regime::prefill;
  const Result all = attend(x, options);
  Result r = unwritten(std::as_const(slots).view(), x.v.view());
  REQUIRE(
      fovea::head_mixture_attention(std::as_const(slots).view(), x.k.view(), x.v.view(), r.out.view(), rows_of(w), options)
          .ok());
  bool equal = true;
  for (index_t i = 0; i < kLen; ++i) {
    for (index_t s = 0; s < kSlots; ++s) {
      const index_t expert = chosen[static_cast<std::size_t>(i)][static_cast<std::size_t>(s)];
      for (index_t d = 0; d < kDim; ++d) equal = equal && r.at(0, s, i, d) == w.view()(0, s, i, 0) * all.at(0, expert, i, d);
    }
  }
  CHECK(equal);
}

TEST_CASE("head_mixtures: routers", "[head_mixtures]") {
  const std::vector<float> logits{0.f, 2.f, 1.f, 2.f, -kInfinity};
  std::vector<index_t> experts(3);
  std::vector<float> w(3);
  REQUIRE(fovea::moa_route(logits, experts, w).ok());
  CHECK(experts == std::vector<index_t>{1, 3, 2});
  const double total = 2 + std::exp(-1.);
  CHECK(w[0] == Catch::Approx(1 / total));
  CHECK(w[1] == Catch::Approx(1 / total));
  CHECK(w[2] == Catch::Approx(std::exp(-1.) / total));
  // Not chosen experts do not matter, and all of them are a softmax.
  std::vector<index_t> all(5);
  std::vector<float> shares(5);
  REQUIRE(fovea::moa_route(logits, all, shares).ok());
  CHECK(shares[0] == Catch::Approx(std::exp(2.) / (1 + 2 * std::exp(2.) + std::exp(1.))));
  CHECK(shares[4] == 0.f);
  CHECK(!fovea::moa_route(logits, std::span(all).first(3), std::span(shares).first(2)).ok());
  CHECK(!fovea::moa_route(std::span(logits).first(2), experts, w).ok());

  const std::vector<float> shared{0.f, 0.f}, kinds{1.f, 1.f};
  std::vector<float> heads(7);
  REQUIRE(fovea::moh_route(shared, logits, kinds, 2, heads).ok());
  // Equal shared heads, equal kinds, two equal winners: everything is 1, the losers 0.
  const std::vector<float> want{1.f, 1.f, 0.f, 1.f, 0.f, 1.f, 0.f};
  for (std::size_t h = 0; h < want.size(); ++h) CHECK(heads[h] == Catch::Approx(want[h]));
  const std::vector<float> unequal{1.f, 0.f}, lean{std::log(3.f), 0.f};
  REQUIRE(fovea::moh_route(unequal, logits, lean, 3, heads).ok());
  CHECK(heads[0] == Catch::Approx(2 * 0.75 * 2 * 0.7310586));
  CHECK(heads[1] == Catch::Approx(2 * 0.75 * 2 * 0.2689414));
  CHECK(heads[3] == Catch::Approx(2 * 0.25 * 3 / total));
  CHECK(heads[4] == Catch::Approx(2 * 0.25 * 3 * std::exp(-1.) / total));
  CHECK(heads[2] == 0.f);
  std::vector<float> routed(5);
  REQUIRE(fovea::moh_route({}, logits, {}, 1, routed).ok());
  CHECK(routed == std::vector<float>{0.f, 1.f, 0.f, 0.f, 0.f});
  CHECK(!fovea::moh_route(shared, logits, {}, 2, heads).ok());
  CHECK(!fovea::moh_route(shared, logits, kinds, 6, heads).ok());
}

TEST_CASE("head_mixtures: refusals write nothing", "[head_mixtures][errors]") {
  const Dense x(146, 1, 4, 2, 5, 8, 8, 8);
  Values out(1, 4, 5, 8, canary());
  const auto refused = [&](View<const float, 3> w, const char* words, const AttentionOptions& options = {}) {
    const fovea::Status status = fovea::head_mixture_attention(x.q.view(), x.k.view(), x.v.view(), out.view(), w, options);
    INFO(status.message());
    CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
    CHECK(std::all_of(out.data.begin(), out.data.end(), is_canary));
  };
  const Values w(1, 4, 5, 1, 1.f);
  refused({w.data.data(), {1, 4, 4}, {20, 5, 1}}, "weight is [1, 4, 4], must be [1, 4, 5]");
  refused({nullptr, {1, 4, 5}, {20, 5, 1}}, "weight has null data");
  refused({out.data.data(), {1, 4, 5}, {20, 5, 1}}, "overlaps weight");
  AttentionOptions capped;
  capped.softcap = 3.f;
  refused(rows_of(w), "softcap", capped);
}
