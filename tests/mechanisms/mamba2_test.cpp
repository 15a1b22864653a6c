// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/mamba2.hpp"

#include "fovea/reference/mamba2.hpp"
#include "fovea/reference/simple_gla.hpp"
#include "support/recurrent_grid.hpp"

using namespace test::recurrent;
namespace reference = fovea::reference;

namespace {

// k is B, q is C, v is x.
const Mechanism& mamba2() {
  static const Mechanism mechanism{
      .name = "Mamba-2",
      .run =
          [](const Arguments<float>& x) {
            return fovea::mamba2(x.v, x.k, x.q, {.dt = x.dt, .a = x.per_head, .d = x.skip}, x.out, x.options);
          },
      .reference =
          [](const Arguments<double>& x) {
            reference::mamba2(x.v, x.k, x.q, {.dt = x.dt, .a = x.per_head, .d = x.skip}, x.out, x.options);
          },
      .per_head = [](index_t head) { return -1 - 0.7 * static_cast<double>(head); }};
  return mechanism;
}
Mechanism without_skip() {
  Mechanism mechanism = mamba2();
  mechanism.run = [](const Arguments<float>& x) {
    return fovea::mamba2(x.v, x.k, x.q, {.dt = x.dt, .a = x.per_head}, x.out, x.options);
  };
  // The core is simple GLA of dt x with the gate dt A.
  mechanism.reference = [](const Arguments<double>& x) {
    const index_t states = static_cast<index_t>(x.per_head.size());
    Exact gate({x.v.extent[0], states, x.v.extent[2], 1}), dt_x(x.v.extent);
    for (index_t b = 0; b < x.v.extent[0]; ++b) {
      for (index_t h = 0; h < states; ++h) {
        for (index_t t = 0; t < x.v.extent[2]; ++t) {
          gate.writable()(b, h, t, 0) = x.dt(b, h, t, 0) * x.per_head[at(h)];
          for (index_t j = 0; j < x.v.extent[3]; ++j) dt_x.writable()(b, h, t, j) = x.dt(b, h, t, 0) * x.v(b, h, t, j);
        }
      }
    }
    Arguments<double> unscaled = x;
    unscaled.options.scale = 1;
    reference::simple_gla(x.q, x.k, dt_x.view(), {gate.view()}, x.out, unscaled.options);
  };
  return mechanism;
}

}   // namespace

TEST_CASE("Mamba-2: what every recurrent mechanism does") { check_everything(mamba2()); }
TEST_CASE("Mamba-2: every option with every other", "[grid]") { check_grid(mamba2()); }
TEST_CASE("Mamba-2: long sequences") { check_long(mamba2(), 4096, Gating::mild, 1e-6); }

TEST_CASE("Mamba-2: golden values") {
  Problem problem = golden_problem(mamba2(), 1);
  problem.dt = problem.beta;
  problem.per_head = {-1.5f};
  problem.skip.fill([](auto...) { return 0.7; });
  check_golden("mamba2", mamba2(), problem);
}

TEST_CASE("Mamba-2: without the skip it is simple GLA of dt x") {
  const Mechanism core = without_skip();
  const Problem problem(core, {.seed = 70, .batch = 2, .len = 70, .heads = {2, 2, 4}, .dim_k = 12, .dim_v = 20});
  const Expected expected = problem.expected(core);
  for (const How& how : all_forms()) check(core, problem, expected, how);
}

// dt = 0 leaves the state as it is, dt without bound is a reset, C = 0 leaves the skip.
TEST_CASE("Mamba-2: steps of zero, huge steps, empty queries") {
  Problem problem(mamba2(), {.seed = 71, .len = 70, .heads = {2, 2, 2}, .dim_k = 12, .dim_v = 20});
  Problem idle = problem, silent = problem, huge = problem;
  idle.dt.fill([](auto...) { return 0; });
  silent.q.fill([](auto...) { return 0; });
  huge.dt.put(0, 0, 69, 0, 1000);
  huge.dt.put(0, 1, 69, 0, 1000);
  for (const How& how : all_forms()) {
    INFO(describe(how));
    const Answer kept = answer_of(mamba2(), idle, how), skipped = answer_of(mamba2(), silent, how),
                 reset = answer_of(mamba2(), huge, how);
    CHECK(kept.state.bytes() == problem.initial.bytes());
    double worst_kept = 0, worst_skipped = 0;
    for (index_t h = 0; h < 2; ++h) {
      const auto read = read_of(problem.initial, 0, row_of(problem.q, 0, 69));
      for (index_t j = 0; j < 20; ++j) {
        const double skip = problem.skip.get(0, 0, h, 0) * problem.v.get(0, h, 69, j);
        if (h == 0) worst_kept = std::max(worst_kept, std::abs(kept.out.get(0, h, 69, j) - read[at(j)] - skip));
        worst_skipped = std::max(worst_skipped, std::abs(skipped.out.get(0, h, 69, j) - skip));
        for (index_t i = 0; i < 12; ++i) {
          const double alone = 1000 * problem.k.get(0, h, 69, i) * problem.v.get(0, h, 69, j);
          CHECK(reset.state.get(0, h, i, j) == Catch::Approx(alone).epsilon(1e-6));
        }
      }
    }
    CHECK(worst_kept <= 1e-5);
    CHECK(worst_skipped <= 1e-6);
  }
}

// Factors of 1, of one less its last place, 0.9, e^-30 and 0 among each other, and writes 10^9 times as large as others; with
// inputs that even these out, no token hides the others.
TEST_CASE("Mamba-2: steps of all sizes in one sequence") {
  for (const bool even : {false, true}) {
    Problem problem(mamba2(), {.seed = 73, .len = 100, .heads = {2, 2, 4}, .dim_k = 12, .dim_v = 20});
    test::Random random(74);
    problem.per_head.assign(4, -1.f);
    problem.dt.fill([&](auto...) { return random.pick({0., 1e-7, 0.1, 0.1, 30., 100.}); });
    const Numbers v = problem.v;
    problem.v.fill([&](index_t b, index_t h, index_t t, index_t j) {
      return v.get(b, h, t, j) / (even ? std::max(problem.dt.get(b, h, t, 0), 0.01) : 1);
    });
    const Expected expected = problem.expected(mamba2());
    for (const How& how : all_forms()) check(mamba2(), problem, expected, how);
  }
}

TEST_CASE("Mamba-2: refused parameters") {
  const Problem problem(mamba2(), {.seed = 72, .batch = 2, .len = 5, .heads = {2, 2, 4}, .dim_k = 6, .dim_v = 7});
  check_refused(mamba2(), problem,
                {{"dt", [](auto& x) { x.dt.data = nullptr; }},
                 {"[2, 3, 5, 1]", [](auto& x) { x.dt.extent[1] = 3; }},
                 {"3", [](auto& x) { x.per_head = x.per_head.first(3); }},
                 {"3", [](auto& x) { x.skip.extent[0] = 3; }},
                 {"2", [](auto& x) { x.skip = broadcast(x.skip, 1, 2); }}});
}
