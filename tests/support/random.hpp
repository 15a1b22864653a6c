// SPDX-License-Identifier: Apache-2.0
// The same numbers on every machine and compiler, which <random>'s distributions do not promise.
#pragma once
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <vector>

namespace test {

// splitmix64
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t bits() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  // 0 .. n - 1
  std::ptrdiff_t below(std::ptrdiff_t n) { return static_cast<std::ptrdiff_t>(bits() % static_cast<std::uint64_t>(n)); }
  // low .. high, both included
  std::ptrdiff_t between(std::ptrdiff_t low, std::ptrdiff_t high) { return low + below(high - low + 1); }
  bool one_in(std::ptrdiff_t n) { return below(n) == 0; }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  float uniform(float low, float high) { return low + (high - low) * static_cast<float>(uniform()); }
  // Sum of twelve uniforms: close enough to a normal, no libm and so no last-bit differences.
  float normal() {
    double sum = -6;
    for (int n = 0; n < 12; ++n) sum += uniform();
    return static_cast<float>(sum);
  }
  template <class T>
  T pick(std::initializer_list<T> values) {
    return values.begin()[below(static_cast<std::ptrdiff_t>(values.size()))];
  }
  template <class T>
  const T& pick(const std::vector<T>& values) {
    return values[static_cast<std::size_t>(below(static_cast<std::ptrdiff_t>(values.size())))];
  }

 private:
  std::uint64_t state_;
};

}  // namespace test
