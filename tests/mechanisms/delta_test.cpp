// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/delta.hpp"

#include "fovea/reference/delta.hpp"
#include "support/recurrent_grid.hpp"

using namespace test::recurrent;
namespace reference = fovea::reference;

namespace {

const Mechanism& delta() {
  static const Mechanism mechanism{
      .name = "DeltaNet",
      .run = [](const Arguments<float>& x) { return fovea::delta_net(x.q, x.k, x.v, x.beta, x.out, x.options); },
      .reference = [](const Arguments<double>& x) { reference::delta(x.q, x.k, x.v, x.beta, x.out, x.options); },
      .unit_keys = true};
  return mechanism;
}

}   // namespace

TEST_CASE("DeltaNet: what every recurrent mechanism does") { check_everything(delta()); }
TEST_CASE("DeltaNet: every option with every other", "[grid]") { check_grid(delta()); }
TEST_CASE("DeltaNet: golden values") { check_golden("delta", delta(), golden_problem(delta())); }
TEST_CASE("DeltaNet: long sequences") { check_long(delta(), 4096, Gating::mild, 1e-6); }

TEST_CASE("DeltaNet: beta 0 writes nothing, beta 1 overwrites, beta 2 reflects") {
  Problem problem(delta(), {.seed = 80, .len = 70, .heads = {2, 2, 2}, .dim_k = 12, .dim_v = 20, .scale = 0.5});
  Problem zero = problem, one = problem, two = problem, twice = problem;
  zero.beta.fill([](auto...) { return 0; });
  one.beta.fill([](auto...) { return 1; });
  one.q = one.k;
  two.beta.fill([](auto...) { return 2; });
  two.v.fill([](auto...) { return 0; });
  twice = two;
  twice.k.fill([&](index_t b, index_t h, index_t t, index_t i) { return problem.k.get(b, h, t / 2, i); });
  Exact halves(problem.v);
  for (double& x : halves.data()) x *= 0.5;
  for (const How& how : all_forms()) {
    INFO(describe(how));
    CHECK(answer_of(delta(), zero, how).state.bytes() == problem.initial.bytes());
    CHECK(distance(answer_of(delta(), one, how).out, halves, 70) <= kRelativeError);
    CHECK(squares_of(answer_of(delta(), two, how).state) == Catch::Approx(squares_of(problem.initial)).epsilon(1e-5));
    CHECK(distance(answer_of(delta(), twice, how).state, Exact(problem.initial), 12) <= kRelativeError);
  }
}

// The hardest triangle there is: the same key in every row. With beta 2 the state swings between two values for ever, and
// every token repeats the same rounding of 2 k . k.
TEST_CASE("DeltaNet: one key again and again") {
  constexpr index_t kLen = 260;
  Problem problem(delta(), {.seed = 81, .len = kLen, .dim_k = 12, .dim_v = 20});
  problem.k.fill([&](index_t b, index_t h, index_t, index_t i) { return problem.k.get(b, h, 0, i); });
  for (const double beta : {0.01, 0.5, 1., 1.9, 2.}) {
    problem.beta.fill([&](auto...) { return beta; });
    const Expected expected = problem.expected(delta());
    const double allowed = beta == 2. ? double{kLen} * 2 * 0x1p-24 : kRelativeError;
    for (const How& how : all_forms()) check(delta(), problem, expected, how, allowed);
  }
}

TEST_CASE("DeltaNet: refused betas") {
  const Problem problem(delta(), {.seed = 82, .batch = 2, .len = 5, .heads = {2, 2, 4}, .dim_k = 6, .dim_v = 7});
  check_refused(delta(), problem,
                {{"beta", [](auto& x) { x.beta.data = nullptr; }},
                 {"[2, 2, 5, 1]", [](auto& x) { x.beta.extent[1] = 2; }},
                 {"beta has 3 numbers a token, must be 1 or 7", [](auto& x) { x.beta = broadcast(x.beta, 3, 3); }},
                 {"overlaps", [](auto& x) { x.beta.data = reinterpret_cast<const float*>(x.out.data); }}});
}
