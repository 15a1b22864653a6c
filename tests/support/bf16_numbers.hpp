// SPDX-License-Identifier: Apache-2.0
// Numbers in bf16 for tests of kernels, and fp32 arithmetic as the CPU's bf16 products do it: no denormals anywhere.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "fovea/core/convert.hpp"
#include "random.hpp"

namespace test {

inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x; }
inline float flushed_fma(float a, float b, float c) { return flushed(std::fma(flushed(a), flushed(b), flushed(c))); }
inline bool same_bits(float a, float b) { return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b); }

inline std::vector<fovea::bf16> bf16_numbers(fovea::index_t count, Random& random) {
  std::vector<fovea::bf16> values(static_cast<std::size_t>(count));
  for (fovea::bf16& x : values) x = fovea::convert<fovea::bf16>(static_cast<double>(random.normal()));
  return values;
}
inline double number(fovea::bf16 x) { return fovea::convert<double>(x); }

// A codec of plain rows of bf16.
struct Bf16Rows {
  static constexpr bool kRowScaled = false, kStoredBf16 = true;
  static constexpr fovea::index_t offset(fovea::index_t d) { return 2 * d; }
};

}   // namespace test
