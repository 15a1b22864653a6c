// SPDX-License-Identifier: Apache-2.0
#include "fovea/simd/math.hpp"

#include <bit>
#include <cmath>
#include <limits>

#include "catch_compat.hpp"

using namespace fovea;

namespace {

// Distance in units of the last place of the exact value.
double ulps(float value, double exact) {
  const double unit = std::ldexp(1., std::max(std::ilogb(exact), -126) - 23);
  return std::abs(static_cast<double>(value) - exact) / unit;
}

template <class F, class G>
double largest_error(const F& function, const G& exact, std::uint32_t first, std::uint32_t last, std::uint32_t step) {
  double worst = 0;
  for (std::uint64_t bits = first; bits <= last; bits += static_cast<std::uint64_t>(step) * kLanes) {
    alignas(f32) float in[kLanes], out[kLanes];
    for (index_t i = 0; i < kLanes; ++i)
      in[i] = std::bit_cast<float>(
          static_cast<std::uint32_t>(std::min<std::uint64_t>(bits + static_cast<std::uint64_t>(step * i), last)));
    store(out, function(load(in)));
    for (index_t i = 0; i < kLanes; ++i) worst = std::max(worst, ulps(out[i], exact(static_cast<double>(in[i]))));
  }
  return worst;
}

std::uint32_t bits(float x) { return std::bit_cast<std::uint32_t>(x); }

}   // namespace

TEST_CASE("exp2 is within 3 ULP where its result is normal") {
  // Every 4099th float: 0.27 million of the negative and the positive range; the step is prime, so mantissas are spread.
  const auto vector = [](f32 t) { return fovea::exp2(t); };
  const auto exact = [](double t) { return std::exp2(t); };
  const double negative = largest_error(vector, exact, bits(-0x1p-30f), bits(-126.f), 4099);
  const double positive = largest_error(vector, exact, bits(0x1p-30f), bits(127.99f), 4099);
  INFO("negative " << negative << " positive " << positive);
  CHECK(negative <= 3.);
  CHECK(positive <= 3.);
  CHECK(negative > 1.);   // the polynomial alone makes 1.4: less would mean that the wrong range was looked at
}

TEST_CASE("exp2_centred is within 2 ULP, and has no bias next to 0") {
  const auto vector = [](f32 t) { return fovea::exp2_centred(t); };
  const auto exact = [](double t) { return std::exp2(t); };
  const double negative = largest_error(vector, exact, bits(-0x1p-30f), bits(-126.f), 4099);
  const double positive = largest_error(vector, exact, bits(0x1p-30f), bits(127.f), 4099);
  INFO("negative " << negative << " positive " << positive);
  CHECK(negative <= 2.);
  CHECK(positive <= 2.);
  // Roundings of numbers just below 1 are multiples of 2^-24 and average to a tenth of that over 64 thousand of them.
  double sum = 0;
  constexpr int kCount = 1 << 16;
  for (int i = 0; i < kCount; i += static_cast<int>(kLanes)) {
    alignas(f32) float t[kLanes], out[kLanes];
    for (index_t lane = 0; lane < kLanes; ++lane) t[lane] = -1e-3f * static_cast<float>(i + lane) / kCount;
    store(out, fovea::exp2_centred(load(t)));
    for (index_t lane = 0; lane < kLanes; ++lane) sum += static_cast<double>(out[lane]) / std::exp2(static_cast<double>(t[lane])) - 1;
  }
  CHECK(std::abs(sum / kCount) <= 0x1p-24 / 10);
  const float inf = std::numeric_limits<float>::infinity();
  CHECK(first_lane(fovea::exp2_centred(f32(-inf))) == 0.f);
  CHECK(first_lane(fovea::exp2_centred(f32(0.f))) == 1.f);
  CHECK(first_lane(fovea::exp2_centred(f32(-200.f))) == 0.f);
  CHECK(std::isnan(first_lane(fovea::exp2_centred(f32(std::numeric_limits<float>::quiet_NaN())))));
}

TEST_CASE("exp2 at the edges: -inf, NaN, 0, underflow, overflow") {
  const float inf = std::numeric_limits<float>::infinity();
  CHECK(fovea::exp2(-inf) == 0.f);
  CHECK(fovea::exp2(0.f) == 1.f);
  CHECK(fovea::exp2(std::numeric_limits<float>::denorm_min()) == 1.f);
  CHECK(fovea::exp2(-std::numeric_limits<float>::denorm_min()) == Catch::Approx(1.f).epsilon(2e-7));
  CHECK(fovea::exp2(-std::numeric_limits<float>::max()) == 0.f);
  CHECK(fovea::exp2(std::numeric_limits<float>::max()) == inf);
  CHECK(fovea::exp2(-200.f) == 0.f);
  CHECK(std::isnan(fovea::exp2(std::numeric_limits<float>::quiet_NaN())));
}

TEST_CASE("tanh is within 4 ULP and keeps sign, limits and NaN") {
  const auto vector = [](f32 x) { return fovea::tanh(x); };
  const auto exact = [](double x) { return std::tanh(x); };
  const double positive = largest_error(vector, exact, bits(0x1p-20f), bits(20.f), 997);
  const double negative = largest_error(vector, exact, bits(-0x1p-20f), bits(-20.f), 997);
  INFO("positive " << positive << " negative " << negative);
  CHECK(positive <= 4.);
  CHECK(negative <= 4.);
  alignas(f32) float lanes[kLanes];
  for (const float x : {0.f, 1e9f, -1e9f, std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()}) {
    store(lanes, fovea::tanh(f32(x)));
    CHECK(lanes[0] == std::tanh(x));
  }
  store(lanes, fovea::tanh(f32(std::numeric_limits<float>::quiet_NaN())));
  CHECK(std::isnan(lanes[0]));
}

TEST_CASE("logistic and silu are within their bounds, 0 where the gate is closed, and keep NaN") {
  double of_logistic = 0, of_silu = 0;
  const auto see = [&](float x) {
    const double exact = 1 / (1 + std::exp(-static_cast<double>(x))), below = std::max(-static_cast<double>(x), 0.);
    const auto units = [](float got, double wanted) { return std::abs(got - wanted) / (0x1p-24 * std::abs(wanted)); };
    of_logistic = std::max(of_logistic, units(first_lane(logistic(f32(x))), exact) / (12 + 2 * below));
    of_silu = std::max(of_silu, units(first_lane(silu(f32(x))), x * exact) / (13 + 2 * below));
  };
  for (float x = -86; x < 90; x += 0.0731f) see(x);   // no round numbers
  for (const float x : {1e-30f, 1e-7f, 1e-3f}) {
    see(x);
    see(-x);
  }
  CHECK(of_logistic <= 1);
  CHECK(of_silu <= 1);
  CHECK(of_logistic > 0.02);   // it was measured at all
  const float inf = std::numeric_limits<float>::infinity();
  CHECK(first_lane(logistic(f32(inf))) == 1.f);
  CHECK(first_lane(silu(f32(inf))) == inf);
  for (const float x : {-87.f, -1e30f, -inf}) {
    CHECK(first_lane(logistic(f32(x))) == 0.f);
    CHECK(first_lane(silu(f32(x))) == 0.f);
  }
  CHECK(first_lane(silu(f32(0.f))) == 0.f);
  const f32 nan(std::numeric_limits<float>::quiet_NaN());
  CHECK(std::isnan(first_lane(logistic(nan))));
  CHECK(std::isnan(first_lane(silu(nan))));
}

TEST_CASE("a lane's value does not depend on its neighbours") {
  for (const float x : {-3.7f, -0.2f, 0.1f, 0.624f, 0.626f, 5.f}) {
    for (const float neighbour : {0.01f, 0.7f, 80.f, std::numeric_limits<float>::quiet_NaN()}) {
      alignas(f32) float alone[kLanes], mixed[kLanes], out_alone[kLanes], out_mixed[kLanes];
      for (index_t i = 0; i < kLanes; ++i) {
        alone[i] = x;
        mixed[i] = i == kLanes / 2 ? x : neighbour;
      }
      store(out_alone, fovea::tanh(load(alone)));
      store(out_mixed, fovea::tanh(load(mixed)));
      CHECK(bits(out_alone[0]) == bits(out_mixed[kLanes / 2]));
      store(out_alone, fovea::exp2(load(alone)));
      store(out_mixed, fovea::exp2(load(mixed)));
      CHECK(bits(out_alone[0]) == bits(out_mixed[kLanes / 2]));
    }
  }
}
