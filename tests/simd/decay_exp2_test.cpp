// SPDX-License-Identifier: Apache-2.0
#include "fovea/simd/decay_exp2.hpp"

#include <cmath>
#include <limits>

#include "catch_compat.hpp"
#include "support/random.hpp"

namespace {

double at(float t) { return double{fovea::first_lane(fovea::decay_exp2(fovea::f32(t)))}; }

}   // namespace

TEST_CASE("decay_exp2: 3 ULP", "[decay_exp2]") {
  double worst = 0;
  for (float t = -125.f; t < 126.f; t += 0.00371f) {
    const double want = std::exp2(double{t});
    const double place = std::exp2(std::floor(std::log2(want)) - 23);
    worst = std::max(worst, std::abs(at(t) - want) / place);
  }
  INFO("worst " << worst << " ULP");
  CHECK(worst <= 3);
}

TEST_CASE("decay_exp2: close to 1 its mean is right", "[decay_exp2]") {
  // n factors of random size: a bias b of each makes the product's mean n b wrong. Rounding alone has a deviation of 1.8e-8,
  // the mean of 20000 of it 1.3e-10; five of those and the 3e-7 of what is lost to 1.
  test::Random random(1);
  for (const float size : {1e-4f, 1e-3f, 1e-2f}) {
    double sum = 0;
    for (int n = 0; n < 20000; ++n) {
      const float t = -random.uniform(size, 3 * size);
      sum += at(t) / std::exp2(double{t}) - 1;
    }
    CHECK(std::abs(sum / 20000) <= 6.5e-10 + 3e-7 * 3 * double{size});
  }
}

TEST_CASE("decay_exp2: values that are exact", "[decay_exp2]") {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  CHECK(at(0.f) == 1);
  CHECK(at(-0.f) == 1);
  CHECK(at(-1.f) == 0.5);
  CHECK(at(-kInfinity) == 0);
  CHECK(at(-1e30f) == 0);
  CHECK(at(-200.f) == 0);
  CHECK(std::isnan(at(std::numeric_limits<float>::quiet_NaN())));
}
