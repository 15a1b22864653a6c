// SPDX-License-Identifier: Apache-2.0
// Tensors as floats between canaries and as doubles, for the tests of mechanisms with feature maps.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/core/status.hpp"
#include "support/poison.hpp"
#include "support/random.hpp"

namespace test::paired {

using fovea::bhsd;
using fovea::index_t;
using fovea::Tensor;
using fovea::View;

inline constexpr double kRelative = 1e-5;   // root mean square, relative: fp32 against double

// Numbers of four axes, as floats between canaries and as doubles.
struct Numbers {
  std::array<index_t, 4> extent{};
  test::Poisoned floats;
  std::vector<double> doubles;

  Numbers() = default;
  Numbers(index_t a, index_t b, index_t c, index_t d)
      : extent{a, b, c, d}, floats(a * b * c * d), doubles(static_cast<std::size_t>(a * b * c * d)) {}
  template <class F>
  static Numbers made(index_t a, index_t b, index_t c, index_t d, F&& f) {
    Numbers x(a, b, c, d);
    for (std::size_t n = 0; n < x.doubles.size(); ++n) x.set(n, f());
    return x;
  }
  static Numbers random(std::uint64_t seed, index_t a, index_t b, index_t c, index_t d) {
    test::Random random(seed);
    return made(a, b, c, d, [&] { return random.normal(); });
  }
  void set(std::size_t n, float value) {
    floats.data()[n] = value;
    doubles[n] = double{value};
  }
  Tensor<float> f() { return bhsd(floats.data(), extent[0], extent[1], extent[2], extent[3]); }
  Tensor<const float> f() const { return bhsd(floats.data(), extent[0], extent[1], extent[2], extent[3]); }
  Tensor<double> d() { return bhsd(doubles.data(), extent[0], extent[1], extent[2], extent[3]); }
  Tensor<const double> d() const { return bhsd(doubles.data(), extent[0], extent[1], extent[2], extent[3]); }
  std::vector<float> values() const { return {floats.data(), floats.data() + floats.size()}; }
  bool untouched() const {
    const std::vector<float> all = values();
    return std::all_of(all.begin(), all.end(), test::is_canary);
  }
  bool guarded() const {
    test::Poisoned copy = floats;
    return test::first_overwritten<1>(copy, {View<float, 1>{copy.data(), {copy.size()}, {1}}}) == -1;
  }
};

// The floats against the doubles.
inline double distance(const Numbers& x) {
  double error = 0, size = 0;
  for (std::size_t n = 0; n < x.doubles.size(); ++n) {
    const double difference = double{x.floats.data()[n]} - x.doubles[n];
    error += difference * difference;
    size += x.doubles[n] * x.doubles[n];
  }
  if (std::isnan(error)) return HUGE_VAL;
  return size == 0 ? error : std::sqrt(error / size);
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// The first axes away.
template <class T>
View<T, 3> rank3(Tensor<T> x) {
  return {x.data, {x.extent[1], x.extent[2], x.extent[3]}, {x.stride[1], x.stride[2], x.stride[3]}};
}
template <class T>
View<T, 2> rank2(Tensor<T> x) {
  return {x.data, {x.extent[2], x.extent[3]}, {x.stride[2], x.stride[3]}};
}
template <class T>
Tensor<T> tokens(Tensor<T> x, index_t begin, index_t end) {
  x.data += begin * x.stride[2];
  x.extent[2] = end - begin;
  return x;
}

inline void require_ok(const fovea::Status& status) {
  INFO(status.message());
  REQUIRE(status.ok());
}

}   // namespace test::paired
