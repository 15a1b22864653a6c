// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/gated_delta.hpp"

#include "fovea/reference/delta.hpp"
#include "fovea/reference/gated_delta.hpp"
#include "fovea/reference/simple_gla.hpp"
#include "support/recurrent_grid.hpp"

using namespace test::recurrent;
namespace reference = fovea::reference;

namespace {

const Mechanism& gated_delta() {
  static const Mechanism mechanism{
      .name = "Gated DeltaNet",
      .run =
          [](const Arguments<float>& x) { return fovea::gated_delta_net(x.q, x.k, x.v, x.decay, x.beta, x.out, x.options); },
      .reference =
          [](const Arguments<double>& x) { reference::gated_delta(x.q, x.k, x.v, x.decay, x.beta, x.out, x.options); },
      .gates = Gates::token,
      .unit_keys = true};
  return mechanism;
}

}   // namespace

TEST_CASE("Gated DeltaNet: what every recurrent mechanism does") { check_everything(gated_delta()); }
TEST_CASE("Gated DeltaNet: every option with every other", "[grid]") { check_grid(gated_delta()); }
TEST_CASE("Gated DeltaNet: golden values") { check_golden("gated_delta", gated_delta(), golden_problem(gated_delta())); }
TEST_CASE("Gated DeltaNet: long sequences") {
  check_long(gated_delta(), 4096, Gating::mild, 1e-6);
  check_long(gated_delta(), 4096, Gating::slow, 1e-6);   // what is written again is no longer off
}
TEST_CASE("Gated DeltaNet: a million tokens") { check_drift(gated_delta(), {.beta = 0.005}); }

TEST_CASE("Gated DeltaNet: with all gates open it is DeltaNet, with beta 0 only decay") {
  Mechanism open = gated_delta(), closed = gated_delta();
  open.reference = [](const Arguments<double>& x) { reference::delta(x.q, x.k, x.v, x.beta, x.out, x.options); };
  closed.reference = [](const Arguments<double>& x) {
    const std::vector<double> none(at(x.k.extent[1] * x.k.extent[2] * x.k.extent[3]));
    reference::simple_gla(x.q, {none.data(), x.k.extent, x.k.stride}, x.v, x.decay, x.out, x.options);
  };
  Problem problem(open, {.seed = 60, .len = 70, .heads = {2, 2, 2}, .dim_k = 12, .dim_v = 20}), none = problem;
  problem.gate.fill([](auto...) { return 0; });
  none.beta.fill([](auto...) { return 0; });
  const Expected delta = problem.expected(open), decayed = none.expected(closed);
  for (const How& how : all_forms()) {
    check(open, problem, delta, how);
    check(closed, none, decayed, how);
  }
}

// beta 1 and a unit key: what was stored for the key is replaced, so the key reads the value, whatever the gate.
TEST_CASE("Gated DeltaNet: beta 1 overwrites") {
  for (const Gating gating : {Gating::mild, Gating::slow, Gating::resets, Gating::strong}) {
    Problem problem(gated_delta(),
                    {.seed = 61, .len = 70, .heads = {2, 2, 2}, .dim_k = 12, .dim_v = 20, .gating = gating, .scale = 0.5});
    problem.q = problem.k;
    problem.beta.fill([](auto...) { return 1; });
    for (const How& how : all_forms()) {
      INFO(describe(how));
      const Answer a = answer_of(gated_delta(), problem, how);
      Exact halves(problem.v);
      for (double& x : halves.data()) x *= 0.5;
      CHECK(distance(a.out, halves, problem.c.len) <= kRelativeError);
    }
  }
}

// beta 2 without values and gates: a reflection, which keeps the state's size; the same one twice is none.
TEST_CASE("Gated DeltaNet: beta 2 reflects") {
  Problem problem(gated_delta(), {.seed = 62, .len = 70, .heads = {1, 1, 1}, .dim_k = 12, .dim_v = 20});
  problem.gate.fill([](auto...) { return 0; });
  problem.beta.fill([](auto...) { return 2; });
  problem.v.fill([](auto...) { return 0; });
  Problem twice = problem;
  twice.k.fill([&](index_t b, index_t h, index_t t, index_t i) { return problem.k.get(b, h, t / 2, i); });
  for (const How& how : all_forms()) {
    INFO(describe(how));
    const Answer a = answer_of(gated_delta(), problem, how), back = answer_of(gated_delta(), twice, how);
    CHECK(squares_of(a.state) == Catch::Approx(squares_of(problem.initial)).epsilon(1e-5));
    CHECK(distance(back.state, Exact(problem.initial), 12) <= kRelativeError);
  }
}

TEST_CASE("Gated DeltaNet: a reset leaves the token, an empty key only decays") {
  constexpr index_t kLast = 36;
  Problem problem(gated_delta(), {.seed = 63, .len = kLast + 1, .dim_k = 12, .dim_v = 20, .scale = 0.5});
  problem.gate.put(0, 0, kLast, 0, -HUGE_VAL);
  Problem no_keys = problem;
  no_keys.k.fill([](auto...) { return 0; });
  no_keys.gate.fill([](auto...) { return -0.25; });
  const double beta = problem.beta.get(0, 0, kLast, 0), left = std::exp(-0.25 * (kLast + 1));
  const auto q = row_of(problem.q, 0, kLast), k = row_of(problem.k, 0, kLast);
  for (const How& how : all_forms()) {
    INFO(describe(how));
    const Answer a = answer_of(gated_delta(), problem, how), decayed = answer_of(gated_delta(), no_keys, how);
    for (index_t j = 0; j < 20; ++j) {
      const double v = problem.v.get(0, 0, kLast, j);
      CHECK(a.out.get(0, 0, kLast, j) == Catch::Approx(0.5 * beta * dot(q, k) * v).epsilon(1e-5));
      for (index_t i = 0; i < 12; ++i) {
        CHECK(a.state.get(0, 0, i, j) == Catch::Approx(beta * k[at(i)] * v).epsilon(1e-6));
        CHECK(decayed.state.get(0, 0, i, j) == Catch::Approx(left * problem.initial.get(0, 0, i, j)).epsilon(1e-5));
      }
    }
  }
}

// Gated DeltaProduct, n updates per token and then one read: n times as many tokens, of which the first decays and the last
// is read.
TEST_CASE("Gated DeltaNet: as DeltaProduct, golden values") {
  using namespace test;
  const index_t steps = 2 * kGoldenLen;
  const auto pairs = [&](index_t dim, auto first, auto second) {
    return golden_rows(
        dim,
        [=](double n, double i) {
          const double t = std::floor(n / 2);
          return n == 2 * t ? first(t, i) : second(t, i);
        },
        steps);
  };
  const auto none = [](double, double) { return 0.; };
  Problem x = golden_problem(gated_delta());
  x.c.len = steps;
  x.q = pairs(kGoldenDimK, none, golden_q);
  x.k = pairs(kGoldenDimK, golden_k, [](double t, double i) { return golden_k(t, i == 3 ? 0 : i + 1); });
  x.v = pairs(kGoldenDimV, golden_v, [](double t, double j) { return -golden_v(t, j) / 2; });
  x.beta = pairs(
      1, [](double t, double) { return golden_beta(t); }, [](double t, double) { return golden_beta(t) / 2; });
  x.gate = pairs(1, golden_gate, none);
  for (const How& how : all_forms()) {
    INFO(describe(how));
    const Answer a = answer_of(gated_delta(), x, how);
    std::vector<double> read;
    for (index_t t = 1; t < steps; t += 2) {
      for (index_t j = 0; j < kGoldenDimV; ++j) read.push_back(a.out.get(0, 0, t, j));
    }
    check_golden("delta_product", read, squares_of(a.state));
  }
}

// A second update of strength 0 is none: DeltaProduct of two is Gated DeltaNet then. (Of one it is the same call.)
TEST_CASE("Gated DeltaNet: as DeltaProduct with one of two updates idle") {
  const Problem single(gated_delta(), {.seed = 65, .len = 35, .heads = {2, 2, 4}, .dim_k = 12, .dim_v = 20});
  const Expected expected = single.expected(gated_delta());
  for (const index_t idle : {0, 1}) {
    Problem pairs(gated_delta(), {.seed = 66, .len = 70, .heads = {2, 2, 4}, .dim_k = 12, .dim_v = 20});
    pairs.initial = single.initial;
    const auto spread = [&](Numbers& to, const Numbers& from, index_t at_pair) {
      to.each([&](index_t b, index_t h, index_t n, index_t i) {
        if (n % 2 == at_pair) to.put(b, h, n, i, from.get(b, h, n / 2, i));
      });
    };
    const Numbers none = Numbers(single.beta.extent()).fill([](auto...) { return 0; });
    spread(pairs.q, single.q, 1);
    spread(pairs.k, single.k, 1 - idle);
    spread(pairs.v, single.v, 1 - idle);
    spread(pairs.beta, single.beta, 1 - idle);
    spread(pairs.beta, none, idle);
    spread(pairs.gate, single.gate, 0);   // the first of a pair decays
    spread(pairs.gate, none, 1);
    for (const How& how : all_forms()) {
      INFO("update " << idle << " idle, " << describe(how));
      const Answer a = answer_of(gated_delta(), pairs, how);
      Numbers read(single.answer(gated_delta()).out.extent());
      read.fill([&](index_t b, index_t h, index_t t, index_t j) { return a.out.get(b, h, 2 * t + 1, j); });
      CHECK(distance(read, expected.out, 35) <= kRelativeError);
      CHECK(distance(a.state, expected.state, 12) <= kRelativeError);
    }
  }
}

TEST_CASE("Gated DeltaNet: refused gates and betas") {
  const Problem problem(gated_delta(), {.seed = 64, .batch = 2, .len = 5, .heads = {2, 2, 4}, .dim_k = 6, .dim_v = 7});
  check_refused(gated_delta(), problem,
                {{"null", [](auto& x) { x.decay.gate.data = nullptr; }},
                 {"null", [](auto& x) { x.beta.data = nullptr; }},
                 {"[2, 4, 6, 1]", [](auto& x) { x.decay.gate.extent[2] = 6; }},
                 {"[2, 2, 5, 1]", [](auto& x) { x.beta.extent[1] = 2; }},
                 {"3", [](auto& x) { x.beta = broadcast(x.beta, 3, 3); }},
                 {"6", [](auto& x) { x.decay.gate = broadcast(x.decay.gate, 3, 6); }},
                 {"overlaps", [](auto& x) { x.beta.data = reinterpret_cast<const float*>(x.out.data); }}});
}
