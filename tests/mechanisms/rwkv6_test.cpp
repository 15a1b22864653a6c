// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/rwkv6.hpp"

#include "fovea/reference/gla.hpp"
#include "fovea/reference/linear.hpp"
#include "fovea/reference/rwkv6.hpp"
#include "support/recurrent_grid.hpp"

using namespace test::recurrent;
namespace reference = fovea::reference;

namespace {

const Mechanism& rwkv6() {
  static const Mechanism mechanism{
      .name = "RWKV-6",
      .run = [](const Arguments<float>& x) { return fovea::rwkv6(x.q, x.k, x.v, x.decay, x.bonus, x.out, x.options); },
      .reference = [](const Arguments<double>& x) { reference::rwkv6(x.q, x.k, x.v, x.decay, x.bonus, x.out, x.options); },
      .gates = Gates::channel};
  return mechanism;
}

}   // namespace

TEST_CASE("RWKV-6: what every recurrent mechanism does") { check_everything(rwkv6()); }
TEST_CASE("RWKV-6: every option with every other", "[grid]") { check_grid(rwkv6()); }
TEST_CASE("RWKV-6: long sequences") { check_long(rwkv6(), 4096, Gating::mild, 1e-6); }

TEST_CASE("RWKV-6: golden values") {
  Problem problem = golden_problem(rwkv6(), 1);
  problem.bonus.fill([](index_t, index_t, index_t, index_t i) { return 0.3 + 0.1 * double(i); });
  check_golden("rwkv6", rwkv6(), problem);
}

// The bonus is not part of the state, which is GLA's; with a bonus of 1 and nothing forgotten the read is the one after the
// write.
TEST_CASE("RWKV-6: the state is that of GLA, a bonus of 1 without decay is linear attention") {
  const Case c{.seed = 100, .len = 70, .heads = {2, 2, 2}, .dim_k = 12, .dim_v = 20, .gating = Gating::resets};
  const Problem problem(rwkv6(), c);
  Mechanism gla = rwkv6();
  gla.reference = [](const Arguments<double>& x) { reference::gla(x.q, x.k, x.v, x.decay, x.out, x.options); };
  const Expected of_gla = problem.expected(gla);
  Mechanism linear = rwkv6();
  linear.reference = [](const Arguments<double>& x) {
    Arguments<double> unscaled = x;
    unscaled.options.scale = 1;
    reference::linear(x.q, x.k, x.v, x.out, {.normalize = false}, unscaled.options);
  };
  Problem open(linear, c);
  open.gate.fill([](auto...) { return 0; });
  open.bonus.fill([](auto...) { return 1; });
  const Expected of_linear = open.expected(linear);
  for (const How& how : all_forms()) {
    INFO(describe(how));
    CHECK(distance(answer_of(rwkv6(), problem, how).state, of_gla.state, 12) <= kRelativeError);
    check(linear, open, of_linear, how);
  }
}

// A reset erases for the next token: this one still reads what was there.
TEST_CASE("RWKV-6: reads before the write and before the decay") {
  Problem problem(rwkv6(), {.seed = 101, .len = 1, .dim_k = 12, .dim_v = 20});
  problem.gate.fill([](auto...) { return -HUGE_VAL; });
  Problem no_state = problem;
  no_state.c.initial = false;
  const auto r = row_of(problem.q, 0, 0), k = row_of(problem.k, 0, 0), read = read_of(problem.initial, 0, r);
  double bonus = 0;
  for (std::size_t i = 0; i < 12; ++i) bonus += r[i] * k[i] * problem.bonus.get(0, 0, 0, index_t(i));
  for (const How& how : all_forms()) {
    INFO(describe(how));
    const Answer a = answer_of(rwkv6(), problem, how), first = answer_of(rwkv6(), no_state, how);
    for (index_t j = 0; j < 20; ++j) {
      const double v = problem.v.get(0, 0, 0, j);
      CHECK(a.out.get(0, 0, 0, j) == Catch::Approx(read[at(j)] + bonus * v).epsilon(1e-5).margin(1e-6));
      CHECK(first.out.get(0, 0, 0, j) == Catch::Approx(bonus * v).epsilon(1e-5));
      for (index_t i = 0; i < 12; ++i) CHECK(a.state.get(0, 0, i, j) == Catch::Approx(k[at(i)] * v).epsilon(1e-6));
    }
  }
}

// RWKV-5: a decay per head and channel, stated once or for every token.
TEST_CASE("RWKV-6: as RWKV-5") {
  const Case c{.seed = 102,
               .batch = 2,
               .len = 70,
               .heads = {2, 2, 2},
               .dim_k = 12,
               .dim_v = 20,
               .shared = {true, false, true, false}};
  const Problem once(rwkv6(), c);
  Problem always = once;
  always.gate = Numbers({2, 2, 70, 12});
  always.gate.fill([&](index_t, index_t h, index_t, index_t i) { return once.gate.get(0, h, 0, i); });
  const Expected expected = once.expected(rwkv6());
  for (const How& how : all_forms()) CHECK(check(rwkv6(), once, expected, how) == answer_of(rwkv6(), always, how));
}

TEST_CASE("RWKV-6: refused arguments") {
  const Problem problem(rwkv6(), {.seed = 103, .batch = 2, .len = 5, .heads = {2, 2, 4}, .dim_k = 6, .dim_v = 7});
  check_refused(rwkv6(), problem,
                {{"null", [](auto& x) { x.decay.gate.data = nullptr; }},
                 {"u has null data", [](auto& x) { x.bonus = {}; }},
                 {"u has extent 3 on axis 0, must be 4", [](auto& x) { x.bonus.extent[0] = 3; }},
                 {"u has extent 5 on axis 1, must be 6", [](auto& x) { x.bonus.extent[1] = 5; }},
                 {"[2, 4, 6, 6]", [](auto& x) { x.decay.gate.extent[2] = 6; }}});
}
