// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/kda.hpp"

#include "fovea/reference/delta.hpp"
#include "fovea/reference/gated_delta.hpp"
#include "fovea/reference/gla.hpp"
#include "fovea/reference/kda.hpp"
#include "support/recurrent_grid.hpp"

using namespace test::recurrent;
namespace reference = fovea::reference;

namespace {

const Mechanism& kda() {
  static const Mechanism mechanism{
      .name = "KDA",
      .run = [](const Arguments<float>& x) { return fovea::kda(x.q, x.k, x.v, x.decay, x.beta, x.out, x.options); },
      .reference = [](const Arguments<double>& x) { reference::kda(x.q, x.k, x.v, x.decay, x.beta, x.out, x.options); },
      .gates = Gates::channel,
      .unit_keys = true};
  return mechanism;
}

}   // namespace

TEST_CASE("KDA: what every recurrent mechanism does") { check_everything(kda()); }
TEST_CASE("KDA: every option with every other", "[grid]") { check_grid(kda()); }
TEST_CASE("KDA: long sequences") {
  check_long(kda(), 4096, Gating::mild, 1e-6);
  check_long(kda(), 4096, Gating::slow, 1e-6);
}

TEST_CASE("KDA: a million tokens") { check_drift(kda(), {.beta = 0.005}); }

TEST_CASE("KDA: golden values") {
  Problem problem = golden_problem(kda());
  check_golden("kda", kda(), problem);
  problem.beta.fill([](index_t, index_t, index_t t, index_t) { return 2 * test::golden_beta(double(t)); });
  check_golden("kda, beta doubled", kda(), problem);
}

TEST_CASE("KDA: one gate for all channels is Gated DeltaNet, open gates DeltaNet, beta 0 decay") {
  Mechanism as_gated = kda(), as_delta = kda(), as_decay = kda();
  as_gated.gates = Gates::token;
  as_gated.run = [](const Arguments<float>& x) {
    Arguments<float> wide = x;
    wide.decay.gate = broadcast(x.decay.gate, 3, x.k.extent[3]);
    return kda().run(wide);
  };
  as_gated.reference = [](const Arguments<double>& x) {
    reference::gated_delta(x.q, x.k, x.v, x.decay, x.beta, x.out, x.options);
  };
  as_delta.reference = [](const Arguments<double>& x) { reference::delta(x.q, x.k, x.v, x.beta, x.out, x.options); };
  as_decay.reference = [](const Arguments<double>& x) {
    const std::vector<double> none(at(x.k.extent[1] * x.k.extent[2] * x.k.extent[3]));
    reference::gla(x.q, {none.data(), x.k.extent, x.k.stride}, x.v, x.decay, x.out, x.options);
  };
  const Case c{.seed = 90, .len = 70, .heads = {2, 2, 4}, .dim_k = 20, .dim_v = 12, .gating = Gating::resets};
  const Problem gated(as_gated, c);
  Problem open(as_delta, c), closed(as_decay, c);
  open.gate.fill([](auto...) { return 0; });
  closed.beta.fill([](auto...) { return 0; });
  const Expected one = gated.expected(as_gated), two = open.expected(as_delta), three = closed.expected(as_decay);
  for (const How& how : all_forms()) {
    check(as_gated, gated, one, how);
    check(as_delta, open, two, how);
    check(as_decay, closed, three, how);
  }
}

TEST_CASE("KDA: beta 1 overwrites whatever the gates") {
  for (const Gating gating : {Gating::mild, Gating::slow, Gating::resets, Gating::strong}) {
    Problem problem(kda(),
                    {.seed = 91, .len = 70, .heads = {2, 2, 2}, .dim_k = 12, .dim_v = 20, .gating = gating, .scale = 0.5});
    problem.q = problem.k;
    problem.beta.fill([](auto...) { return 1; });
    Exact halves(problem.v);
    for (double& x : halves.data()) x *= 0.5;
    for (const How& how : all_forms()) {
      INFO(describe(how));
      CHECK(distance(answer_of(kda(), problem, how).out, halves, 70) <= kRelativeError);
    }
  }
}

TEST_CASE("KDA: a reset leaves the token, an erased channel its own row") {
  constexpr index_t kLast = 36;
  Problem reset(kda(), {.seed = 92, .len = kLast + 1, .dim_k = 12, .dim_v = 20});
  Problem one_row = reset;
  for (index_t i = 0; i < 12; ++i) reset.gate.put(0, 0, kLast, i, -HUGE_VAL);
  one_row.gate.put(0, 0, kLast, 5, -HUGE_VAL);
  for (index_t i = 0; i < 12; ++i) one_row.k.put(0, 0, kLast, i, i == 5 ? 1 : 0);   // reads and writes that row only
  const double beta = reset.beta.get(0, 0, kLast, 0);
  for (const How& how : all_forms()) {
    INFO(describe(how));
    const Answer a = answer_of(kda(), reset, how), b = answer_of(kda(), one_row, how);
    for (index_t j = 0; j < 20; ++j) {
      const double v = reset.v.get(0, 0, kLast, j);
      for (index_t i = 0; i < 12; ++i) {
        CHECK(a.state.get(0, 0, i, j) == Catch::Approx(beta * reset.k.get(0, 0, kLast, i) * v).epsilon(1e-6));
      }
      CHECK(b.state.get(0, 0, 5, j) == Catch::Approx(beta * v).epsilon(1e-6));
    }
  }
}

// Channels that forget at once beside channels that never do: factors over a chunk differ by more than fp32's exponents.
TEST_CASE("KDA: gates of all sizes in one token") {
  for (const DecayForm form : {DecayForm::log, DecayForm::alpha}) {
    Problem problem(kda(), {.seed = 93, .len = 130, .dim_k = 40, .dim_v = 12, .decay_form = form});
    const double sizes[] = {0, -1e-7, -1e-3, -0.3, -5, -20, -80, -HUGE_VAL};
    problem.gate.fill([&](index_t, index_t, index_t, index_t i) {
      return form == DecayForm::log ? sizes[i % 8] : std::exp(sizes[i % 8]);
    });
    const Expected expected = problem.expected(kda());
    for (const How& how : all_forms()) check(kda(), problem, expected, how);
  }
}

TEST_CASE("KDA: refused gates and betas") {
  const Problem problem(kda(), {.seed = 94, .batch = 2, .len = 5, .heads = {2, 2, 4}, .dim_k = 6, .dim_v = 7});
  check_refused(kda(), problem,
                {{"null", [](auto& x) { x.decay.gate.data = nullptr; }},
                 {"beta", [](auto& x) { x.beta.data = nullptr; }},
                 {"[2, 4, 6, 6]", [](auto& x) { x.decay.gate.extent[2] = 6; }},
                 {"5", [](auto& x) { x.decay.gate.extent[3] = 5; }},
                 {"[2, 2, 5, 1]", [](auto& x) { x.beta.extent[1] = 2; }}});
}
