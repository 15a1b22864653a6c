// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/simple_gla.hpp"

#include "fovea/reference/linear.hpp"
#include "fovea/reference/simple_gla.hpp"
#include "support/recurrent_grid.hpp"

using namespace test::recurrent;
namespace reference = fovea::reference;

namespace {

const Mechanism& simple_gla() {
  static const Mechanism mechanism{
      .name = "simple GLA",
      .run = [](const Arguments<float>& x) { return fovea::simple_gla(x.q, x.k, x.v, x.decay, x.out, x.options); },
      .reference = [](const Arguments<double>& x) { reference::simple_gla(x.q, x.k, x.v, x.decay, x.out, x.options); },
      .gates = Gates::token};
  return mechanism;
}

}   // namespace

TEST_CASE("simple GLA: what every recurrent mechanism does") { check_everything(simple_gla()); }
TEST_CASE("simple GLA: every option with every other", "[grid]") { check_grid(simple_gla()); }
TEST_CASE("simple GLA: golden values") { check_golden("simple_gla", simple_gla(), golden_problem(simple_gla())); }

// A state that forgets within tokens keeps fp32's digits. One that keeps thousands of tokens walks: a rounding per token.
TEST_CASE("simple GLA: long sequences") {
  check_long(simple_gla(), 4096, Gating::mild, 1e-6);
  check_long(simple_gla(), 4096, Gating::slow, 0x1p-24 * 64);
}
TEST_CASE("simple GLA: a million tokens") { check_drift(simple_gla()); }

TEST_CASE("simple GLA: a gate of 0 is linear attention") {
  Mechanism open = simple_gla();
  open.reference = [](const Arguments<double>& x) {
    reference::linear(x.q, x.k, x.v, x.out, {.normalize = false}, x.options);
  };
  Problem problem(open, {.seed = 40, .len = 70, .heads = {2, 2, 2}, .dim_k = 12, .dim_v = 20});
  for (const DecayForm form : {DecayForm::log, DecayForm::alpha}) {
    problem.c.decay_form = form;
    problem.gate.fill([&](auto...) { return form == DecayForm::log ? 0 : 1; });
    const Expected expected = problem.expected(open);
    for (const How& how : all_forms()) check(open, problem, expected, how);
  }
}

TEST_CASE("simple GLA: a reset leaves the token, an empty key only decays, an empty query reads nothing") {
  constexpr index_t kLast = 36;
  const Case c{.seed = 41, .len = kLast + 1, .dim_k = 12, .dim_v = 20, .scale = 0.5};
  Problem problem(simple_gla(), c);
  const auto token_alone = [&](const Answer& a) {
    const auto q = row_of(problem.q, 0, kLast), k = row_of(problem.k, 0, kLast), v = row_of(problem.v, 0, kLast);
    for (index_t j = 0; j < c.dim_v; ++j) {
      CHECK(a.out.get(0, 0, kLast, j) == Catch::Approx(0.5 * dot(q, k) * v[at(j)]).epsilon(1e-5));
      for (index_t i = 0; i < c.dim_k; ++i) {
        CHECK(a.state.get(0, 0, i, j) == Catch::Approx(k[at(i)] * v[at(j)]).epsilon(1e-6));
      }
    }
  };
  for (const How& how : all_forms()) {
    INFO(describe(how));
    problem.gate.put(0, 0, kLast, 0, -HUGE_VAL);
    token_alone(answer_of(simple_gla(), problem, how));

    Problem no_keys = problem;
    no_keys.k.fill([](auto...) { return 0; });
    no_keys.gate.fill([](auto...) { return -0.25; });
    const Answer decayed = answer_of(simple_gla(), no_keys, how);
    const double left = std::exp(-0.25 * (kLast + 1));
    const auto read = read_of(problem.initial, 0, row_of(problem.q, 0, kLast));
    for (index_t j = 0; j < c.dim_v; ++j) {
      CHECK(decayed.out.get(0, 0, kLast, j) == Catch::Approx(0.5 * left * read[at(j)]).epsilon(1e-4));
      CHECK(decayed.state.get(0, 0, 3, j) == Catch::Approx(left * problem.initial.get(0, 0, 3, j)).epsilon(1e-5));
    }

    Problem no_queries = problem;
    no_queries.q.fill([](auto...) { return 0; });
    CHECK(squares_of(answer_of(simple_gla(), no_queries, how).out) == 0);
  }
  // One token, no state.
  Problem one(simple_gla(), {.seed = 42, .len = 1, .dim_k = 12, .dim_v = 20, .initial = false});
  for (const How& how : all_forms()) {
    const Answer a = answer_of(simple_gla(), one, how);
    const double qk = dot(row_of(one.q, 0, 0), row_of(one.k, 0, 0)) / std::sqrt(12.);
    for (index_t j = 0; j < 20; ++j) CHECK(a.out.get(0, 0, 0, j) == Catch::Approx(qk * one.v.get(0, 0, 0, j)).epsilon(1e-5));
  }
}

TEST_CASE("simple GLA: refused gates") {
  const Problem problem(simple_gla(), {.seed = 43, .batch = 2, .len = 5, .heads = {2, 2, 4}, .dim_k = 6});
  check_refused(simple_gla(), problem,
                {{"null", [](auto& x) { x.decay.gate.data = nullptr; }},
                 {"[2, 4, 6, 1]", [](auto& x) { x.decay.gate.extent[2] = 6; }},
                 {"[2, 2, 5, 1]", [](auto& x) { x.decay.gate.extent[1] = 2; }},
                 {"6", [](auto& x) { x.decay.gate = broadcast(x.decay.gate, 3, 6); }},
                 {"9", [](auto& x) { x.decay.form = static_cast<DecayForm>(9); }},
                 {"overlaps", [](auto& x) { x.decay.gate.data = reinterpret_cast<const float*>(x.out.data); }}});
}
