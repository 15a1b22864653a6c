// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/rwkv7.hpp"

#include "fovea/reference/gla.hpp"
#include "fovea/reference/kda.hpp"
#include "fovea/reference/rwkv7.hpp"
#include "support/recurrent_grid.hpp"

using namespace test::recurrent;
namespace reference = fovea::reference;

namespace {

const Mechanism& rwkv7() {
  static const Mechanism mechanism{
      .name = "RWKV-7",
      .run =
          [](const Arguments<float>& x) { return fovea::rwkv7(x.q, x.k, x.v, x.decay, x.kappa, x.rate, x.out, x.options); },
      .reference =
          [](const Arguments<double>& x) { reference::rwkv7(x.q, x.k, x.v, x.decay, x.kappa, x.rate, x.out, x.options); },
      .gates = Gates::channel};
  return mechanism;
}

// S = Diag(alpha) S + b (S' a)' + k v' with kappa for a and rate for b.
const Mechanism& general() {
  static const Mechanism mechanism{.name = "generalised delta rule",
                                   .run =
                                       [](const Arguments<float>& x) {
                                         return fovea::generalized_delta(x.q, x.k, x.v, x.decay, x.kappa, x.rate, x.out,
                                                                         x.options);
                                       },
                                   .reference = {},
                                   .gates = Gates::channel};
  return mechanism;
}

// Comba, S_t = alpha S + beta k (v - S' p)': what is removed was read before the decay.
Problem comba_problem(const Mechanism& unit_keys, double p_of_k) {
  Problem x(unit_keys, {.seed = 114, .len = 37, .heads = {2, 2, 2}, .dim_k = 12, .dim_v = 20, .scale = 0.5});
  x.gate = Numbers({1, 2, 37, 1}).fill([](auto...) { return 0; });
  x.kappa.fill([&](index_t b, index_t h, index_t t, index_t i) { return p_of_k * x.k.get(b, h, t, i); });
  return x;
}
// a = p is there; b = -beta k, v -> beta v.
void set_strength(Problem& x, const Numbers& v, const Numbers& beta) {
  x.rate.fill([&](index_t b, index_t h, index_t t, index_t i) { return -beta.get(b, h, t, 0) * x.k.get(b, h, t, i); });
  x.v.fill([&](index_t b, index_t h, index_t t, index_t j) { return beta.get(b, h, t, 0) * v.get(b, h, t, j); });
}

}   // namespace

TEST_CASE("RWKV-7: what every recurrent mechanism does") { check_everything(rwkv7()); }
TEST_CASE("RWKV-7: every option with every other", "[grid]") { check_grid(rwkv7()); }
TEST_CASE("RWKV-7: long sequences") { check_long(rwkv7(), 4096, Gating::mild, 1e-6); }

TEST_CASE("RWKV-7: golden values") {
  using namespace test;
  Problem problem = golden_problem(rwkv7(), 1);
  problem.kappa = golden_rows(kGoldenDimK, golden_k);
  problem.k = golden_rows(kGoldenDimK, [](double t, double i) { return 0.9 * golden_k(t, i); });
  problem.rate = golden_rows(kGoldenDimK, [](double t, double i) { return 0.5 + 0.3 * std::sin(0.5 * t + i); });
  check_golden("rwkv7", rwkv7(), problem);
}

// Comba: delta = beta (v - S' p), S = alpha S + k delta' with p = 0.7 k: a = p, b = -beta k, v -> beta v.
TEST_CASE("RWKV-7: the general rule as Comba, golden values") {
  using namespace test;
  Problem problem = golden_problem(general());
  problem.gate = golden_rows(1, golden_gate);
  problem.kappa = golden_rows(kGoldenDimK, [](double t, double i) { return 0.7 * golden_k(t, i); });
  problem.rate = golden_rows(kGoldenDimK, [](double t, double i) { return -golden_beta(t) * golden_k(t, i); });
  problem.v = golden_rows(kGoldenDimV, [](double t, double j) { return golden_beta(t) * golden_v(t, j); });
  check_golden("comba", general(), problem);
}

// GDN-2: S = (I - k (b * k)') Diag(alpha) S + k (w * v)': a = alpha * b * k, b = -k, v -> w * v.
TEST_CASE("RWKV-7: the general rule as GDN-2, golden values") {
  using namespace test;
  Problem problem = golden_problem(general());
  problem.kappa = golden_rows(kGoldenDimK, [](double t, double i) {
    return std::exp(golden_gate(t, i)) * (0.6 + 0.3 * std::sin(0.4 * t + i)) * golden_k(t, i);
  });
  problem.rate = golden_rows(kGoldenDimK, [](double t, double i) { return -golden_k(t, i); });
  problem.v =
      golden_rows(kGoldenDimV, [](double t, double j) { return (0.5 + 0.2 * std::cos(0.3 * t + j)) * golden_v(t, j); });
  check_golden("gdn2", general(), problem);
}

// KDA's erasure reads the decayed state: a = alpha * k, b = -beta k, v -> beta v.
TEST_CASE("RWKV-7: the general rule as KDA, with rate 0 as GLA") {
  Mechanism as_kda = general(), as_gla = rwkv7();
  as_kda.unit_keys = true;
  as_gla.reference = [](const Arguments<double>& x) {
    Arguments<double> unscaled = x;
    unscaled.options.scale = 1;
    reference::gla(x.q, x.k, x.v, x.decay, x.out, unscaled.options);
  };
  const Case c{.seed = 110, .len = 70, .heads = {2, 2, 2}, .dim_k = 12, .dim_v = 20, .gating = Gating::resets};
  Problem problem(as_kda, c), no_rate(as_gla, c);
  no_rate.rate.fill([](auto...) { return 0; });
  const Numbers beta = problem.beta, v = problem.v;
  problem.kappa.fill([&](index_t b, index_t h, index_t t, index_t i) {
    return std::exp(problem.gate.get(b, h, t, i)) * problem.k.get(b, h, t, i);
  });
  problem.rate.fill(
      [&](index_t b, index_t h, index_t t, index_t i) { return -beta.get(b, h, t, 0) * problem.k.get(b, h, t, i); });
  problem.v.fill([&](index_t b, index_t h, index_t t, index_t j) { return beta.get(b, h, t, 0) * v.get(b, h, t, j); });
  as_kda.reference = [&](const Arguments<double>& x) {
    const Exact values(v);
    reference::kda(x.q, x.k, values.view(), x.decay, x.beta, x.out, x.options);
  };
  const Expected kda = problem.expected(as_kda), gla = no_rate.expected(as_gla);
  for (const How& how : all_forms()) {
    check(as_kda, problem, kda, how);
    check(as_gla, no_rate, gla, how);
  }
}

// GDN-2 with b = w = beta: a = alpha * (beta k), b = -k, v -> beta v.
TEST_CASE("RWKV-7: the general rule as GDN-2 with one strength is KDA") {
  Mechanism as_kda = general();
  as_kda.unit_keys = true;
  Problem problem(as_kda, {.seed = 113, .len = 70, .heads = {2, 2, 2}, .dim_k = 12, .dim_v = 20, .gating = Gating::resets});
  const Numbers v = problem.v;
  const auto beta = [&](index_t b, index_t h, index_t t) { return problem.beta.get(b, h, t, 0); };
  problem.kappa.fill([&](index_t b, index_t h, index_t t, index_t i) {
    return std::exp(problem.gate.get(b, h, t, i)) * beta(b, h, t) * problem.k.get(b, h, t, i);
  });
  problem.rate.fill([&](index_t b, index_t h, index_t t, index_t i) { return -problem.k.get(b, h, t, i); });
  problem.v.fill([&](index_t b, index_t h, index_t t, index_t j) { return beta(b, h, t) * v.get(b, h, t, j); });
  as_kda.reference = [&](const Arguments<double>& x) {
    const Exact values(v);
    reference::kda(x.q, x.k, values.view(), x.decay, x.beta, x.out, x.options);
  };
  const Expected kda = problem.expected(as_kda);
  for (const How& how : all_forms()) check(as_kda, problem, kda, how);
}

TEST_CASE("RWKV-7: the general rule as Comba, a gate of -inf is no reset") {
  constexpr index_t kLast = 36;
  Mechanism comba = general();
  comba.unit_keys = true;
  Problem problem = comba_problem(comba, 0.7);
  const Numbers v = problem.v;
  problem.gate.fill([](index_t, index_t, index_t t, index_t) { return t == kLast ? -HUGE_VAL : -0.2; });
  set_strength(problem, v, problem.beta);
  for (const How& how : all_forms()) {
    INFO(describe(how));
    const Answer before = part_of(comba, problem, 0, kLast, nullptr, how), a = answer_of(comba, problem, how);
    for (index_t h = 0; h < 2; ++h) {
      const auto removed = read_of(slice_of(before.state, 1, h), 0, row_of(problem.kappa, h, kLast));
      for (index_t i = 0; i < 12; ++i) {
        for (index_t j = 0; j < 20; ++j) {
          const double written = problem.beta.get(0, h, kLast, 0) * (v.get(0, h, kLast, j) - removed[at(j)]);
          CHECK(a.state.get(0, h, i, j) == Catch::Approx(problem.k.get(0, h, kLast, i) * written).epsilon(1e-5).margin(1e-5));
        }
      }
    }
  }
}

// What the key reads is then v + (alpha - 1) S' k.
TEST_CASE("RWKV-7: the general rule as Comba, beta 1 overwrites where nothing decays") {
  constexpr index_t kLast = 36;
  Mechanism comba = general();
  comba.unit_keys = true;
  Problem open = comba_problem(comba, 1);
  const Numbers v = open.v, ones = Numbers(open.beta.extent()).fill([](auto...) { return 1; });
  open.q = open.k;
  set_strength(open, v, ones);
  Problem decays = open;
  decays.gate.fill([](auto...) { return std::log(0.75); });
  Exact halves(v);
  for (double& x : halves.data()) x *= 0.5;
  for (const How& how : all_forms()) {
    INFO(describe(how));
    CHECK(distance(answer_of(comba, open, how).out, halves, 37) <= kRelativeError);
    const Answer before = part_of(comba, decays, 0, kLast, nullptr, how), a = answer_of(comba, decays, how);
    Distance apart;
    for (index_t h = 0; h < 2; ++h) {
      const auto stored = read_of(slice_of(before.state, 1, h), 0, row_of(open.k, h, kLast));
      for (index_t j = 0; j < 20; ++j)
        apart.see(a.out.get(0, h, kLast, j), 0.5 * (v.get(0, h, kLast, j) - 0.25 * stored[at(j)]));
    }
    CHECK(apart.value() <= kRelativeError);
  }
}

// The removal reads the state before its decay, so even a gate of -inf is no reset.
TEST_CASE("RWKV-7: an erasing gate leaves what the removal writes") {
  Problem problem(rwkv7(), {.seed = 111, .len = 1, .dim_k = 12, .dim_v = 20});
  problem.gate.fill([](auto...) { return -HUGE_VAL; });
  const auto removed = read_of(problem.initial, 0, row_of(problem.kappa, 0, 0));
  for (const How& how : all_forms()) {
    INFO(describe(how));
    const Answer a = answer_of(rwkv7(), problem, how);
    for (index_t i = 0; i < 12; ++i) {
      const double write = problem.kappa.get(0, 0, 0, i) * problem.rate.get(0, 0, 0, i);
      for (index_t j = 0; j < 20; ++j) {
        const double expected = problem.k.get(0, 0, 0, i) * problem.v.get(0, 0, 0, j) - write * removed[at(j)];
        CHECK(a.state.get(0, 0, i, j) == Catch::Approx(expected).epsilon(1e-5).margin(1e-6));
      }
    }
  }
}

TEST_CASE("RWKV-7: refused arguments") {
  const Problem problem(rwkv7(), {.seed = 112, .batch = 2, .len = 5, .heads = {2, 2, 4}, .dim_k = 6, .dim_v = 7});
  const std::vector<Refusal> refusals{{"null", [](auto& x) { x.decay.gate.data = nullptr; }},
                                      {"null", [](auto& x) { x.kappa.data = nullptr; }},
                                      {"null", [](auto& x) { x.rate.data = nullptr; }},
                                      {"[2, 3, 5, 6]", [](auto& x) { x.kappa.extent[1] = 3; }},
                                      {"5", [](auto& x) { x.rate.extent[3] = 5; }},
                                      {"overlaps", [](auto& x) { x.rate.data = x.options.final_state.data; }}};
  check_refused(rwkv7(), problem, refusals);
  check_refused(general(), problem, refusals);
}
