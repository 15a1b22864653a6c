// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/lightning.hpp"

#include "fovea/reference/lightning.hpp"
#include "fovea/reference/retention.hpp"
#include "support/recurrent_grid.hpp"

using namespace test::recurrent;
namespace reference = fovea::reference;

namespace {

Mechanism with_slopes(const char* name, double (*slope)(index_t)) {
  return {.name = name,
          .run = [](const Arguments<float>& x) { return fovea::lightning(x.q, x.k, x.v, x.per_head, x.out, x.options); },
          .reference = [](const Arguments<double>& x) { reference::lightning(x.q, x.k, x.v, x.per_head, x.out, x.options); },
          .per_head = slope};
}
const Mechanism& minimax() {
  static const Mechanism mechanism =
      with_slopes("lightning, MiniMax", [](index_t head) { return reference::minimax_slope(head, 4, 3, 80); });
  return mechanism;
}
// Head 0 never forgets.
const Mechanism& transnormer() {
  static const Mechanism mechanism =
      with_slopes("lightning, TransNormer", [](index_t head) { return reference::transnormer_slope(head, 4, 3, 80); });
  return mechanism;
}

}   // namespace

TEST_CASE("lightning: what every recurrent mechanism does") {
  check_everything(minimax());
  check_lengths(transnormer());
}
TEST_CASE("lightning: every option with every other", "[grid]") {
  check_grid(minimax());
  check_grid(transnormer());
}
TEST_CASE("lightning: long sequences") { check_long(minimax(), 4096, Gating::mild, 1e-6); }

TEST_CASE("lightning: is retention with gamma e^-s, golden values") {
  Problem problem = golden_problem(minimax());
  problem.per_head = {-std::log(31.f / 32)};
  check_golden("retention", minimax(), problem);

  Mechanism as_retention = minimax();
  as_retention.reference = [](const Arguments<double>& x) {
    std::vector<double> gamma;
    for (const double slope : x.per_head) gamma.push_back(std::exp(-slope));
    Arguments<double> unscaled = x;
    unscaled.options.scale = 1;
    reference::retention(x.q, x.k, x.v, gamma, x.out, unscaled.options);
  };
  const Problem other(as_retention, {.seed = 30, .len = 70, .heads = {4, 4, 4}, .dim_k = 12, .dim_v = 20});
  const Expected expected = other.expected(as_retention);
  for (const How& how : all_forms()) check(as_retention, other, expected, how);
}

TEST_CASE("lightning: slopes of the models") {
  for (index_t layer = 0; layer < 80; layer += 79) {
    for (index_t h = 0; h < 64; ++h) {
      CHECK(fovea::minimax_slope(h, 64, layer, 80) ==
            Catch::Approx(reference::minimax_slope(h, 64, layer, 80)).epsilon(1e-7));
      CHECK(fovea::transnormer_slope(h, 64, layer, 80) ==
            Catch::Approx(reference::transnormer_slope(h, 64, layer, 80)).epsilon(1e-7));
    }
  }
}

// A slope beyond the exponents of fp32 is an empty memory, not a NaN.
TEST_CASE("lightning: steep slopes") {
  Problem problem(minimax(), {.seed = 31, .len = 70, .heads = {4, 4, 4}, .dim_k = 12, .dim_v = 20});
  problem.per_head = {0.f, 30.f, 200.f, kInfinity};
  const Expected expected = problem.expected(minimax());
  for (const How& how : all_forms()) check(minimax(), problem, expected, how);
}

TEST_CASE("lightning: refused slopes") {
  const Problem problem(minimax(), {.seed = 32, .len = 5, .heads = {2, 2, 4}});
  check_refused(minimax(), problem,
                {{"3", [](auto& x) { x.per_head = x.per_head.first(3); }}, {"slopes", [](auto& x) { x.per_head = {}; }}});
}
