// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/linear.hpp"

#include "fovea/engine/parts/feature_maps.hpp"
#include "fovea/reference/feature_maps.hpp"
#include "fovea/reference/linear.hpp"
#include "support/recurrent_grid.hpp"

using namespace test::recurrent;
namespace reference = fovea::reference;

namespace {

template <class Real>
LinearOptions<Real> linear_options(const Arguments<Real>& x, LinearOptions<Real> options) {
  options.initial_key_sum = x.initial_n;
  options.final_key_sum = x.final_n;
  return options;
}

Mechanism linear(const char* name, bool normalize, bool causal, bool clamp) {
  const LinearOptions<float> options{.causal = causal, .normalize = normalize, .eps = 0.01f, .clamp_denominator = clamp};
  const LinearOptions<double> exact{
      .causal = causal, .normalize = normalize, .eps = double{0.01f}, .clamp_denominator = clamp};
  return {
      .name = name,
      .run =
          [=](const Arguments<float>& x) {
            return fovea::linear_attention(x.q, x.k, x.v, x.out, linear_options(x, options), x.options);
          },
      .reference =
          [=](const Arguments<double>& x) { reference::linear(x.q, x.k, x.v, x.out, linear_options(x, exact), x.options); },
      .positive = normalize,
      .carries_n = normalize,
      .causal = causal};
}
const Mechanism& plain() {
  static const Mechanism mechanism = linear("linear", false, true, false);
  return mechanism;
}
const Mechanism& normalized() {
  static const Mechanism mechanism = linear("linear, normalised", true, true, false);
  return mechanism;
}
const Mechanism& bidirectional() {
  static const Mechanism mechanism = linear("linear, bidirectional", true, false, false);
  return mechanism;
}
// phi = elu + 1
const Mechanism& elu() {
  static const Mechanism mechanism{.name = "linear, elu + 1",
                                   .run =
                                       [](const Arguments<float>& x) {
                                         return fovea::linear_attention(x.q, x.k, x.v, x.out, linear_options<float>(x, {}),
                                                                        x.options, fovea::EluMap{x.k.extent[3]});
                                       },
                                   .reference =
                                       [](const Arguments<double>& x) {
                                         reference::linear(x.q, x.k, x.v, x.out, linear_options<double>(x, {}), x.options,
                                                           reference::elu_features);
                                       },
                                   .carries_n = true};
  return mechanism;
}

}   // namespace

TEST_CASE("linear: what every recurrent mechanism does") {
  check_everything(plain());
  check_everything(normalized());
  check_everything(bidirectional());
}
TEST_CASE("linear: every option with every other", "[grid]") {
  check_grid(plain());
  check_grid(normalized());
  check_grid(bidirectional(), 40);
  check_grid(linear("linear, clamped", true, true, true), 30);
  check_grid(linear("linear, bidirectional, unnormalised", false, false, false), 30);
}
TEST_CASE("linear: golden values") { check_golden("linear", plain(), golden_problem(plain())); }

TEST_CASE("linear: elu + 1, golden values and lengths") {
  Problem problem = golden_problem(elu());
  problem.c.initial = false;
  problem.c.scale = {};
  check_golden("elu", elu(), problem);
  check_lengths(elu());
}

// Sums of T terms of both signs: a rounding per token, as a walk; a chunk adds its tokens first.
TEST_CASE("linear: long sequences") {
  check_long(plain(), 4096, Gating::mild, 0x1p-24 * 64);
  check_long(normalized(), 4096, Gating::mild, 0x1p-24 * 64);
}

TEST_CASE("linear: normalised, values of one come back, features of zero give zero") {
  for (const Mechanism* mechanism : {&normalized(), &bidirectional()}) {
    Problem ones(*mechanism, {.seed = 10, .len = 70, .heads = {2, 2, 2}, .dim_k = 12, .dim_v = 20, .initial = false});
    ones.v.fill([](auto...) { return 1; });
    Problem zeros = ones;
    zeros.q.fill([](auto...) { return 0; });
    for (const How& how : all_forms()) {
      INFO(mechanism->name << ", " << describe(how));
      double worst = 0;
      const Answer a = answer_of(*mechanism, ones, how);
      for (index_t t = 0; t < 70; t += 23) {
        double sum = 0;
        const auto q = row_of(ones.q, 1, t);
        for (index_t s = 0; s < (mechanism->causal ? t + 1 : 70); ++s) sum += dot(q, row_of(ones.k, 1, s));
        for (const double x : row_of(a.out, 1, t)) worst = std::max(worst, std::abs(x - sum / (sum + 0.01)));
      }
      CHECK(worst <= 1e-5);
      CHECK(squares_of(answer_of(*mechanism, zeros, how).out) == 0);
    }
  }
}

// No positions: the last output does not depend on the order of the past.
TEST_CASE("linear: the order of the past does not matter") {
  Problem problem(normalized(), {.seed = 11, .len = 70, .heads = {2, 2, 2}, .dim_k = 12, .dim_v = 20});
  Problem turned = problem;
  turned.k.fill([&](index_t b, index_t h, index_t t, index_t i) { return problem.k.get(b, h, t == 69 ? t : 68 - t, i); });
  turned.v.fill([&](index_t b, index_t h, index_t t, index_t j) { return problem.v.get(b, h, t == 69 ? t : 68 - t, j); });
  for (const How& how : all_forms()) {
    INFO(describe(how));
    const Answer one = answer_of(normalized(), problem, how), other = answer_of(normalized(), turned, how);
    Distance apart;
    for (index_t j = 0; j < 20; ++j) apart.see(one.out.get(0, 1, 69, j), other.out.get(0, 1, 69, j));
    CHECK(apart.value() <= 2 * kRelativeError);
  }
}

// Every token of a bidirectional call reads what the last one of a causal call does.
TEST_CASE("linear: bidirectional is the last state for all") {
  const Problem problem(bidirectional(), {.seed = 12, .len = 45, .heads = {2, 2, 2}, .dim_k = 12, .dim_v = 20});
  Problem last = problem;
  for (index_t h = 0; h < 2; ++h) {
    for (index_t i = 0; i < 12; ++i) last.q.put(0, h, 44, i, problem.q.get(0, h, 7, i));
  }
  for (const How& how : all_forms()) {
    INFO(describe(how));
    const Answer all = answer_of(bidirectional(), problem, how), causal = answer_of(normalized(), last, how);
    Distance apart;
    for (index_t j = 0; j < 20; ++j) apart.see(all.out.get(0, 1, 7, j), causal.out.get(0, 1, 44, j));
    CHECK(apart.value() <= 2 * kRelativeError);
  }
}

TEST_CASE("linear: refused key sums and options") {
  const Problem problem(normalized(), {.seed = 13, .batch = 2, .len = 5, .heads = {2, 2, 4}, .dim_k = 6});
  Mechanism no_eps = normalized();
  no_eps.run = [](const Arguments<float>& x) {
    return fovea::linear_attention(x.q, x.k, x.v, x.out, linear_options<float>(x, {.eps = kInfinity}), x.options);
  };
  check_refused(no_eps, problem, {{"eps inf", [](auto&) {}}});
  check_refused(normalized(), problem,
                {{"initial_key_sum has extent 5 on axis 2, must be 6", [](auto& x) { x.initial_n.extent[2] = 5; }},
                 {"final_key_sum has extent 3 on axis 1, must be 4", [](auto& x) { x.final_n.extent[1] = 3; }},
                 {"final_key_sum overlaps itself", [](auto& x) { x.final_n.stride[1] = 0; }},
                 {"overlaps", [](auto& x) { x.final_n.data = x.options.final_state.data; }}});
}
