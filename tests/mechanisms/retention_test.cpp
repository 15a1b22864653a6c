// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/retention.hpp"

#include "fovea/reference/retention.hpp"
#include "support/recurrent_grid.hpp"

using namespace test::recurrent;
namespace reference = fovea::reference;

namespace {

const Mechanism& retention() {
  static const Mechanism mechanism{
      .name = "retention",
      .run = [](const Arguments<float>& x) { return fovea::retention(x.q, x.k, x.v, x.per_head, x.out, x.options); },
      .reference = [](const Arguments<double>& x) { reference::retention(x.q, x.k, x.v, x.per_head, x.out, x.options); },
      .per_head = [](index_t head) { return reference::retention_gamma(head); }};
  return mechanism;
}

}   // namespace

TEST_CASE("retention: what every recurrent mechanism does") { check_everything(retention()); }
TEST_CASE("retention: every option with every other", "[grid]") { check_grid(retention()); }
TEST_CASE("retention: golden values") { check_golden("retention", retention(), golden_problem(retention())); }
TEST_CASE("retention: long sequences") { check_long(retention(), 4096, Gating::mild, 1e-6); }

TEST_CASE("retention: a million tokens") { check_drift(retention()); }

TEST_CASE("retention: gamma of the paper") {
  for (index_t h = 0; h < 8; ++h) CHECK(double{fovea::retention_gamma(h)} == reference::retention_gamma(h));
}

// One gamma of 0 keeps only the token, one of 1 sums all of them.
TEST_CASE("retention: gamma 0 and 1") {
  Problem problem(retention(), {.seed = 20, .len = 70, .heads = {2, 2, 2}, .dim_k = 12, .dim_v = 20, .scale = 0.5});
  problem.per_head = {0.f, 1.f};
  Problem one = problem;   // what is kept of the second head: all values through one key
  one.q.fill([](auto...) { return 1; });
  one.k.fill([](auto...) { return 1; });
  const Expected expected = problem.expected(retention());
  for (const How& how : all_forms()) {
    INFO(describe(how));
    const Answer a = check(retention(), problem, expected, how), sums = answer_of(retention(), one, how);
    for (index_t t = 0; t < 70; ++t) {
      const double qk = dot(row_of(problem.q, 0, t), row_of(problem.k, 0, t));
      const double alone = 0.5 * qk * problem.v.get(0, 0, t, 7);
      CHECK(a.out.get(0, 0, t, 7) == Catch::Approx(alone).epsilon(1e-5).margin(1e-6));
    }
    double sum = 0;
    for (index_t i = 0; i < 12; ++i) sum += problem.initial.get(0, 1, i, 7);
    for (index_t t = 0; t < 70; ++t) {
      sum += 12 * problem.v.get(0, 1, t, 7);
      CHECK(sums.out.get(0, 1, t, 7) == Catch::Approx(0.5 * sum).epsilon(1e-5).margin(1e-4));
    }
  }
}

TEST_CASE("retention: refused factors") {
  const Problem problem(retention(), {.seed = 21, .len = 5, .heads = {2, 2, 4}});
  check_refused(retention(), problem,
                {{"3", [](auto& x) { x.per_head = x.per_head.first(3); }}, {"gamma", [](auto& x) { x.per_head = {}; }}});
}
