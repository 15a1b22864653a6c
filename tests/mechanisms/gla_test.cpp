// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/gla.hpp"

#include "fovea/reference/gla.hpp"
#include "fovea/reference/linear.hpp"
#include "fovea/reference/mamba2.hpp"
#include "fovea/reference/retention.hpp"
#include "fovea/reference/simple_gla.hpp"
#include "support/recurrent_grid.hpp"

using namespace test::recurrent;
namespace reference = fovea::reference;

namespace {

const Mechanism& gla() {
  static const Mechanism mechanism{
      .name = "GLA",
      .run = [](const Arguments<float>& x) { return fovea::gla(x.q, x.k, x.v, x.decay, x.out, x.options); },
      .reference = [](const Arguments<double>& x) { reference::gla(x.q, x.k, x.v, x.decay, x.out, x.options); },
      .gates = Gates::channel};
  return mechanism;
}

// GLA whose gates are one number per token, written out for every channel.
Mechanism with_one_gate(const std::function<void(const Arguments<double>&)>& other) {
  Mechanism mechanism = gla();
  mechanism.gates = Gates::token;
  mechanism.run = [](const Arguments<float>& x) {
    Arguments<float> wide = x;
    wide.decay.gate = broadcast(x.decay.gate, 3, x.k.extent[3]);
    return gla().run(wide);
  };
  mechanism.reference = other;
  return mechanism;
}

}   // namespace

TEST_CASE("GLA: what every recurrent mechanism does") { check_everything(gla()); }
TEST_CASE("GLA: every option with every other", "[grid]") { check_grid(gla()); }
TEST_CASE("GLA: golden values") { check_golden("gla", gla(), golden_problem(gla())); }
TEST_CASE("GLA: long sequences") {
  check_long(gla(), 4096, Gating::mild, 1e-6);
  check_long(gla(), 4096, Gating::slow, 0x1p-24 * 64);   // a rounding per token, as a walk over 4096 tokens
}

TEST_CASE("GLA: one gate for all channels is simple GLA, retention, and the core of Mamba-2") {
  const Mechanism as_simple_gla =
      with_one_gate([](const Arguments<double>& x) { reference::simple_gla(x.q, x.k, x.v, x.decay, x.out, x.options); });
  const Problem problem(as_simple_gla,
                        {.seed = 50, .len = 70, .heads = {2, 2, 4}, .dim_k = 12, .dim_v = 20, .gating = Gating::resets});
  const Expected expected = problem.expected(as_simple_gla);
  for (const How& how : all_forms()) check(as_simple_gla, problem, expected, how);

  const Mechanism as_retention = with_one_gate([](const Arguments<double>& x) {
    std::vector<double> gamma;
    for (index_t h = 0; h < 2; ++h) gamma.push_back(x.decay.gate(0, h, 0, 0));
    reference::retention(x.q, x.k, x.v, gamma, x.out, x.options);
  });
  Problem constant(as_retention, {.seed = 51,
                                  .len = 70,
                                  .heads = {2, 2, 2},
                                  .dim_k = 12,
                                  .dim_v = 20,
                                  .decay_form = DecayForm::alpha,
                                  .shared = {true, false, true, false}});
  constant.gate.fill([](index_t, index_t h, index_t, index_t) { return reference::retention_gamma(h); });
  const Expected retained = constant.expected(as_retention);
  for (const How& how : all_forms()) check(as_retention, constant, retained, how);

  // Mamba-2 with steps of 1: gates are A, values x.
  const Mechanism as_mamba2 = with_one_gate([](const Arguments<double>& x) {
    const std::vector<double> a{x.decay.gate(0, 0, 0, 0), x.decay.gate(0, 1, 0, 0)}, one{1};
    reference::mamba2(x.v, x.k, x.q, {.dt = {one.data(), {1, 1, 1, 1}, {}}, .a = a}, x.out, x.options);
  });
  Problem stepped(as_mamba2, {.seed = 52,
                              .len = 70,
                              .heads = {2, 2, 2},
                              .dim_k = 12,
                              .dim_v = 20,
                              .shared = {true, false, true, false},
                              .scale = 1.});
  const Expected steps = stepped.expected(as_mamba2);
  for (const How& how : all_forms()) check(as_mamba2, stepped, steps, how);
}

TEST_CASE("GLA: a gate of 0 is linear attention") {
  Mechanism open = gla();
  open.reference = [](const Arguments<double>& x) {
    reference::linear(x.q, x.k, x.v, x.out, {.normalize = false}, x.options);
  };
  Problem problem(open, {.seed = 53, .len = 70, .heads = {2, 2, 2}, .dim_k = 12, .dim_v = 20});
  problem.gate.fill([](auto...) { return 0; });
  const Expected expected = problem.expected(open);
  for (const How& how : all_forms()) check(open, problem, expected, how);
}

TEST_CASE("GLA: an erased channel loses its row of the state and no other") {
  constexpr index_t kLast = 36;
  Problem problem(gla(), {.seed = 54, .len = kLast + 1, .dim_k = 12, .dim_v = 20});
  for (const How& how : all_forms()) {
    INFO(describe(how));
    const Answer whole = answer_of(gla(), problem, how);
    Problem erased = problem;
    erased.gate.put(0, 0, kLast, 5, -HUGE_VAL);
    const Answer partly = answer_of(gla(), erased, how);
    for (index_t i = 0; i < 12; ++i) {
      for (index_t j = 0; j < 20; ++j) {
        const double alone = problem.k.get(0, 0, kLast, i) * problem.v.get(0, 0, kLast, j);
        if (i == 5) CHECK(partly.state.get(0, 0, i, j) == Catch::Approx(alone).epsilon(1e-6));
        if (i == 5) continue;
        const double other = whole.state.get(0, 0, i, j);
        if (how.form == fovea::RecurrentForm::step || how.form == fovea::RecurrentForm::fused) {
          CHECK(partly.state.get(0, 0, i, j) == other);
        } else {   // the chunk takes its exact form for all channels: 37 tokens, four roundings each, of numbers near 1
          CHECK(partly.state.get(0, 0, i, j) == Catch::Approx(other).margin(37 * 4 * 0x1p-24));
        }
      }
    }
    Problem reset = problem;
    for (index_t i = 0; i < 12; ++i) reset.gate.put(0, 0, kLast, i, -HUGE_VAL);
    const Answer alone = answer_of(gla(), reset, how);
    const double qk = dot(row_of(problem.q, 0, kLast), row_of(problem.k, 0, kLast)) / std::sqrt(12.);
    for (index_t j = 0; j < 20; ++j) {
      CHECK(alone.out.get(0, 0, kLast, j) == Catch::Approx(qk * problem.v.get(0, 0, kLast, j)).epsilon(1e-5));
    }
  }
}

// HGRN2: alpha = bound + (1 - bound) sigmoid(f) and k = 1 - alpha. Every cell of the state is then a mean of its old value
// and a value, so ones stay ones.
TEST_CASE("GLA: as HGRN2, states are means") {
  Problem problem(gla(),
                  {.seed = 55, .len = 130, .heads = {2, 2, 2}, .dim_k = 12, .dim_v = 20, .decay_form = DecayForm::alpha});
  test::Random random(56);
  problem.gate.fill([&](auto...) { return reference::hgrn2_alpha(double(random.normal()), 0.25); });
  problem.k.fill([&](index_t b, index_t h, index_t t, index_t d) { return 1 - problem.gate.get(b, h, t, d); });
  const Expected expected = problem.expected(gla());
  Problem ones = problem;
  ones.v.fill([](auto...) { return 1; });
  ones.initial.fill([](auto...) { return 1; });
  for (const How& how : all_forms()) {
    check(gla(), problem, expected, how);
    const Answer a = answer_of(gla(), ones, how);
    double worst = 0;
    for (const double cell : a.state.values()) worst = std::max(worst, std::abs(cell - 1));
    CHECK(worst <= 1e-6);   // a mean of 20 tokens that count: some ten roundings of 2^-24
  }
}

TEST_CASE("GLA: refused gates") {
  const Problem problem(gla(), {.seed = 57, .batch = 2, .len = 5, .heads = {2, 2, 4}, .dim_k = 6});
  check_refused(gla(), problem,
                {{"null", [](auto& x) { x.decay.gate.data = nullptr; }},
                 {"[2, 4, 7, 6]", [](auto& x) { x.decay.gate.extent[2] = 7; }},
                 {"5", [](auto& x) { x.decay.gate.extent[3] = 5; }},
                 {"9", [](auto& x) { x.decay.form = static_cast<DecayForm>(9); }}});
}
