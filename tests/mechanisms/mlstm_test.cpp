// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/mlstm.hpp"

#include "fovea/reference/mlstm.hpp"
#include "support/recurrent_grid.hpp"

using namespace test::recurrent;
namespace reference = fovea::reference;

namespace {

template <class Real>
MlstmParameters<Real> parameters(const Arguments<Real>& x, Real eps) {
  return {.i = x.input_gate,
          .f = x.forget_gate,
          .eps = eps,
          .initial_n = x.initial_n,
          .final_n = x.final_n,
          .initial_m = x.initial_m,
          .final_m = x.final_m};
}
Mechanism with_eps(float eps) {
  return {
      .name = "mLSTM",
      .run = [=](const Arguments<float>& x) { return fovea::mlstm(x.q, x.k, x.v, parameters(x, eps), x.out, x.options); },
      .reference =
          [=](const Arguments<double>& x) { reference::mlstm(x.q, x.k, x.v, parameters(x, double{eps}), x.out, x.options); },
      .carries_n = true,
      .carries_m = true};
}
const Mechanism& mlstm() {
  static const Mechanism mechanism = with_eps(1e-6f);
  return mechanism;
}

}   // namespace

TEST_CASE("mLSTM: what every recurrent mechanism does") { check_everything(mlstm()); }
TEST_CASE("mLSTM: every option with every other", "[grid]") { check_grid(mlstm()); }
TEST_CASE("mLSTM: long sequences") { check_long(mlstm(), 4096, Gating::mild, 1e-6); }
TEST_CASE("mLSTM: a million tokens") { check_drift(mlstm()); }

TEST_CASE("mLSTM: golden values") {
  const Mechanism exact = with_eps(0);
  Problem problem = golden_problem(exact);
  problem.c.initial = false;
  problem.c.scale = {};   // 1/2, of k
  problem.k = golden_rows(test::kGoldenDimK, test::golden_raw_k);
  problem.input_gate = golden_rows(1, [](double t, double) { return 2 * std::sin(t); });
  problem.forget_gate = golden_rows(1, [](double t, double) { return 2 + std::cos(t); });
  check_golden("mlstm", exact, problem);
}

// Outputs do not depend on m: states handed over as S e^c, n e^c and m - c are the same memory.
TEST_CASE("mLSTM: any stabiliser will do") {
  const Mechanism exact = with_eps(0);
  const Problem problem(exact, {.seed = 120, .len = 70, .heads = {2, 2, 2}, .dim_k = 12, .dim_v = 20});
  for (const double shift : {-3., 0.5, 4.}) {
    Problem shifted = problem;
    shifted.initial.fill(
        [&](index_t a, index_t b, index_t c, index_t d) { return problem.initial.get(a, b, c, d) * std::exp(shift); });
    shifted.initial_n.fill(
        [&](index_t a, index_t b, index_t c, index_t d) { return problem.initial_n.get(a, b, c, d) * std::exp(shift); });
    shifted.initial_m.fill(
        [&](index_t a, index_t b, index_t c, index_t d) { return problem.initial_m.get(a, b, c, d) - shift; });
    const Expected expected = problem.expected(exact);
    for (const How& how : all_forms()) {
      INFO("shift " << shift << ", " << describe(how));
      const Error error = error_of(shifted, exact, answer_of(exact, shifted, how), expected);
      CHECK(error.out <= kRelativeError);
      CHECK(error.state <= kRelativeError);
    }
  }
}

// Input gates far apart, forget gates closed and open: e^i~ itself is neither finite nor above zero in fp32.
TEST_CASE("mLSTM: gates beyond the exponents of fp32") {
  Problem problem(mlstm(), {.seed = 121, .len = 130, .heads = {2, 2, 2}, .dim_k = 12, .dim_v = 20});
  test::Random random(122);
  problem.input_gate.fill([&](auto...) { return random.pick({0., 1., -1., 80., -80., 150., -150.}); });
  problem.forget_gate.fill([&](auto...) { return random.pick({0., 2., 5., -100., 100., -1000., 1000.}); });
  const Expected expected = problem.expected(mlstm());
  for (const How& how : all_forms()) {
    const Answer a = answer_of(mlstm(), problem, how);
    INFO(describe(how));
    CHECK(distance(a.out, expected.out, 130) <= kRelativeError);
  }
}

TEST_CASE("mLSTM: one token by hand") {
  const Mechanism exact = with_eps(0);
  Problem problem(exact, {.seed = 123, .len = 1, .dim_k = 12, .dim_v = 20, .initial = false});
  for (const double i : {-3., 0., 3.}) {
    problem.input_gate.fill([&](auto...) { return i; });
    const double qk = dot(row_of(problem.q, 0, 0), row_of(problem.k, 0, 0)) / std::sqrt(12.);
    const double weight = std::exp(i) * qk / std::max(std::abs(std::exp(i) * qk), 1.);
    for (const How& how : all_forms()) {
      INFO("i " << i << ", " << describe(how));
      const Answer a = answer_of(exact, problem, how);
      for (index_t j = 0; j < 20; ++j) {
        CHECK(a.out.get(0, 0, 0, j) == Catch::Approx(weight * problem.v.get(0, 0, 0, j)).epsilon(1e-5).margin(1e-6));
      }
    }
  }
}

TEST_CASE("mLSTM: refused gates and states") {
  const Problem problem(mlstm(), {.seed = 124, .batch = 2, .len = 5, .heads = {2, 2, 4}, .dim_k = 6, .dim_v = 7});
  check_refused(mlstm(), problem,
                {{"i has null data", [](auto& x) { x.input_gate.data = nullptr; }},
                 {"f has null data", [](auto& x) { x.forget_gate.data = nullptr; }},
                 {"[2, 3, 5, 1]", [](auto& x) { x.forget_gate.extent[1] = 3; }},
                 {"initial_n has extent 5 on axis 2, must be 6", [](auto& x) { x.initial_n.extent[2] = 5; }},
                 {"final_m has extent 3 on axis 1, must be 4", [](auto& x) { x.final_m.extent[1] = 3; }},
                 {"overlaps", [](auto& x) { x.final_m.data = x.final_n.data; }},
                 {"overlaps itself", [](auto& x) { x.final_m.stride[0] = 0; }}});
}
