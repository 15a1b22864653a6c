// SPDX-License-Identifier: Apache-2.0
#include "fovea/core/convert.hpp"

#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/adapters/eigen.hpp"
#include "fovea/reference/stored.hpp"
#include "support/random.hpp"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace {

using fovea::bf16;
using fovea::convert;
using fovea::convert_saturated;
using fovea::f16;
using fovea::fp8_e4m3;
using fovea::fp8_e5m2;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// What a pattern stands for, by a formula that shares nothing with core/convert.hpp.
double value_of(bf16 x) { return fovea::reference::stored_float(x.bits, 8, 7, true); }
double value_of(f16 x) { return fovea::reference::stored_float(x.bits, 5, 10, true); }
double value_of(fp8_e4m3 x) { return fovea::reference::stored_float(x.bits, 4, 3, false); }
double value_of(fp8_e5m2 x) { return fovea::reference::stored_float(x.bits, 5, 2, true); }

template <class T>
constexpr unsigned kPatterns = 1u << (8 * sizeof(T));

template <class T>
T pattern(unsigned bits) {
  return T{static_cast<decltype(T::bits)>(bits)};
}

// Every number that is not negative, ascending, and behind them where the next would be if the range went on: what rounds to
// it is too large.
template <class T>
std::vector<std::pair<double, unsigned>> ladder() {
  std::vector<std::pair<double, unsigned>> steps;
  for (unsigned bits = 0; bits < kPatterns<T> / 2; ++bits) {
    const double value = value_of(pattern<T>(bits));
    if (std::isfinite(value)) steps.emplace_back(value, bits);
  }
  std::sort(steps.begin(), steps.end());
  const std::size_t n = steps.size();
  steps.emplace_back(2 * steps[n - 1].first - steps[n - 2].first, steps[n - 1].second + 1);
  return steps;
}

// The nearest step by searching all of them. Midpoints are exact in double.
template <class T>
unsigned nearest(const std::vector<std::pair<double, unsigned>>& steps, double x) {
  const unsigned sign = std::signbit(x) ? kPatterns<T> / 2 : 0;
  const double size = std::abs(x);
  auto above = std::upper_bound(steps.begin(), steps.end(), std::pair(size, ~0u));
  if (above == steps.end()) return sign | steps.back().second;
  const auto below = above - 1;
  const double middle = (below->first + above->first) / 2;
  if (size < middle) return sign | below->second;
  if (size > middle) return sign | above->second;
  return sign | (below->second % 2 == 0 ? below->second : above->second);
}

template <class T>
bool is_nan(T x) {
  return std::isnan(value_of(x));
}

}   // namespace

TEMPLATE_TEST_CASE("Every pattern widens exactly and comes back", "[convert]", bf16, f16, fp8_e4m3, fp8_e5m2) {
  int wrong_value = 0, wrong_float = 0, wrong_back = 0, wrong_nan = 0, nans = 0;
  for (unsigned bits = 0; bits < kPatterns<TestType>; ++bits) {
    const auto x = pattern<TestType>(bits);
    const double value = value_of(x);
    if (std::isnan(value)) {
      ++nans;
      const auto wide = convert<double>(x);
      const auto back = convert<TestType>(wide), float_back = convert<TestType>(convert<float>(x));
      wrong_nan += !std::isnan(wide) || !std::isnan(convert<float>(x)) || !is_nan(back) || !is_nan(float_back);
      wrong_nan += std::signbit(wide) != (bits >= kPatterns<TestType> / 2);
      wrong_nan += (back.bits & bits) != bits || back.bits != float_back.bits;   // sign and payload stay, quiet is added
      continue;
    }
    wrong_value += std::bit_cast<std::uint64_t>(convert<double>(x)) != std::bit_cast<std::uint64_t>(value);
    wrong_float +=
        std::bit_cast<std::uint32_t>(convert<float>(x)) != std::bit_cast<std::uint32_t>(static_cast<float>(value));
    wrong_back += convert<TestType>(value).bits != bits || convert<TestType>(static_cast<float>(value)).bits != bits;
  }
  CHECK(wrong_value == 0);
  CHECK(wrong_float == 0);
  CHECK(wrong_back == 0);
  CHECK(wrong_nan == 0);
  CHECK(nans == 2 * (sizeof(TestType) == 2 ? (std::is_same_v<TestType, f16> ? 1023 : 127)
                                           : (std::is_same_v<TestType, fp8_e5m2> ? 3 : 1)));
}

TEMPLATE_TEST_CASE("Rounding is to nearest, ties to even, at every boundary", "[convert]", bf16, f16, fp8_e4m3, fp8_e5m2) {
  const auto steps = ladder<TestType>();
  int wrong = 0, wrong_float = 0, floats = 0;
  const auto check = [&](double x) {
    for (const double sign : {1., -1.}) {
      const unsigned expected = nearest<TestType>(steps, sign * x);
      wrong += convert<TestType>(sign * x).bits != expected;
      const auto narrow = static_cast<float>(sign * x);
      if (double{narrow} == sign * x) {
        ++floats;
        wrong_float += convert<TestType>(narrow).bits != expected;
      }
    }
  };
  for (std::size_t n = 0; n + 1 < steps.size(); ++n) {
    const double low = steps[n].first, high = steps[n + 1].first, middle = (low + high) / 2;
    for (const double at : {low, middle, high}) {
      check(at);
      check(std::nextafter(at, kInfinity));
      if (at > 0) check(std::nextafter(at, 0));
      const auto as_float = static_cast<float>(at);
      if (std::isfinite(as_float)) check(double{std::nextafter(as_float, std::numeric_limits<float>::infinity())});
      if (as_float > 0) check(double{std::nextafter(as_float, 0.f)});
    }
  }
  check(std::numeric_limits<double>::max());
  check(std::numeric_limits<double>::denorm_min());
  check(std::numeric_limits<double>::min());
  check(double{std::numeric_limits<float>::max()});
  check(double{std::numeric_limits<float>::denorm_min()});
  check(double{std::numeric_limits<float>::min()});
  CHECK(wrong == 0);
  CHECK(wrong_float == 0);
  CHECK(floats > static_cast<int>(steps.size()));
}

TEMPLATE_TEST_CASE("Random numbers of any size round to the nearest", "[convert]", bf16, f16, fp8_e4m3, fp8_e5m2) {
  const auto steps = ladder<TestType>();
  test::Random random(7);
  int wrong = 0, wrong_saturated = 0;
  for (int n = 0; n < 200000; ++n) {
    const auto x = std::bit_cast<float>(static_cast<std::uint32_t>(random.bits()));
    if (std::isnan(x)) continue;
    const unsigned expected = nearest<TestType>(steps, double{x}), sign = expected & (kPatterns<TestType> / 2);
    const unsigned largest = steps[steps.size() - 2].second;
    wrong += convert<TestType>(x).bits != expected;
    wrong_saturated += convert_saturated<TestType>(x).bits != ((expected ^ sign) > largest ? sign | largest : expected);
  }
  CHECK(wrong == 0);
  CHECK(wrong_saturated == 0);
}

TEST_CASE("Known values of the small formats", "[convert]") {
  static_assert(convert<f16>(1.f).bits == 0x3c00 && convert<float>(f16{0x3555}) == 0.333251953125f);
  static_assert(convert<bf16>(1.f).bits == 0x3f80 && convert<bf16>(3.1415926).bits == 0x4049);
  static_assert(convert<fp8_e4m3>(448.f).bits == 0x7e && convert<fp8_e5m2>(57344.f).bits == 0x7b);
  CHECK(convert<f16>(65504.f).bits == 0x7bff);
  CHECK(convert<f16>(65519.996f).bits == 0x7bff);
  CHECK(convert<f16>(65520.f).bits == 0x7c00);
  CHECK(convert<f16>(0x1p-25f).bits == 0);   // half the smallest denormal: a tie with zero, which is even
  CHECK(convert<f16>(0x1.000002p-25f).bits == 1);
  CHECK(convert<bf16>(std::numeric_limits<float>::max()).bits == 0x7f80);
  CHECK(convert<bf16>(0x1p-149f).bits == 0);
  CHECK(convert<fp8_e4m3>(464.f).bits == 0x7e);   // a tie with what would be 480, whose pattern is the NaN's and odd
  CHECK(convert<fp8_e4m3>(464.1f).bits == 0x7f);
  CHECK(convert<fp8_e4m3>(-kInfinity).bits == 0xff);
  CHECK(convert<fp8_e5m2>(61440.f).bits == 0x7c);
  CHECK(convert_saturated<fp8_e4m3>(-kInfinity).bits == 0xfe);
  CHECK(convert_saturated<fp8_e4m3>(1e9).bits == 0x7e);
  CHECK(convert_saturated<fp8_e5m2>(1e9f).bits == 0x7b);
  CHECK(convert_saturated<fp8_e4m3>(kNan).bits == 0x7f);
  CHECK(convert_saturated<fp8_e5m2>(-kInfinity).bits == 0xfb);
  CHECK(convert_saturated<f16>(1e6f).bits == 0x7bff);
  CHECK(convert<f16>(-0.f).bits == 0x8000);
  CHECK(std::signbit(convert<float>(fp8_e4m3{0x80})));
}

TEST_CASE("NaN stays NaN, quiet, whatever its payload", "[convert]") {
  for (const std::uint32_t bits : {0x7f800001u, 0x7fbfffffu, 0xff800001u, 0x7fc00000u, 0xffffffffu}) {
    const auto x = std::bit_cast<float>(bits);
    const unsigned sign = bits >> 31;
    CHECK(convert<bf16>(x).bits == ((bits >> 16) | 0x40));
    CHECK((convert<f16>(x).bits & 0xfe00u) == (0x7e00u | sign << 15));
    CHECK(convert<fp8_e4m3>(x).bits == (0x7fu | sign << 7));
    CHECK((convert<fp8_e5m2>(x).bits & 0xfeu) == (0x7eu | sign << 7));
  }
}

TEST_CASE("A double rounds once", "[convert]") {
  // Just above the middle of two numbers, by less than a float shows: through float it would be a tie and go to even.
  CHECK(convert<f16>(1 + 0x1p-11 + 0x1p-40).bits == 0x3c01);
  CHECK(convert<f16>(double{static_cast<float>(1 + 0x1p-11 + 0x1p-40)}).bits == 0x3c00);
  CHECK(convert<bf16>(1 + 0x1p-8 + 0x1p-50).bits == 0x3f81);
  CHECK(convert<bf16>(1 + 3 * 0x1p-8 - 0x1p-50).bits == 0x3f81);
  CHECK(convert<fp8_e4m3>(1 + 0x1p-4 + 0x1p-50).bits == 0x39);
}

TEST_CASE("Small formats convert to each other", "[convert]") {
  int wrong = 0;
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const auto half = pattern<f16>(bits);
    if (is_nan(half)) continue;
    wrong += convert<bf16>(half).bits != convert<bf16>(value_of(half)).bits;
    wrong += convert<fp8_e5m2>(half).bits != convert<fp8_e5m2>(value_of(half)).bits;
  }
  CHECK(wrong == 0);
  CHECK(convert<f16>(bf16{0x4049}).bits == 0x4248);
}

TEST_CASE("Rounding mode and flush-to-zero of the thread change nothing", "[convert]") {
  test::Random random(11);
  std::vector<float> numbers(20000);
  for (float& x : numbers) x = std::bit_cast<float>(static_cast<std::uint32_t>(random.bits()));
  for (std::uint32_t n = 0; n < 64; ++n) numbers.push_back(std::bit_cast<float>(n << 12));   // denormals that bf16 keeps
  const auto patterns_of_all = [&] {
    std::vector<unsigned> patterns;
    for (const float x : numbers) {
      for (const unsigned bits : {unsigned{convert<f16>(x).bits}, unsigned{convert<bf16>(x).bits},
                                  unsigned{convert<fp8_e4m3>(x).bits}, unsigned{convert<fp8_e5m2>(x).bits}}) {
        patterns.push_back(bits);
      }
      patterns.push_back(std::bit_cast<std::uint32_t>(convert<float>(convert<bf16>(x))));
      patterns.push_back(std::bit_cast<std::uint32_t>(convert<float>(convert<f16>(x))));
    }
    return patterns;
  };
  const auto expected = patterns_of_all();
  std::fesetround(FE_UPWARD);
  const auto upward = patterns_of_all();
  std::fesetround(FE_TONEAREST);
  CHECK(upward == expected);
#if defined(__SSE2__)
  const unsigned control = _mm_getcsr();
  _mm_setcsr(control | 0x8040u);   // flush to zero, denormals are zero
  const auto flushed = patterns_of_all();
  _mm_setcsr(control);
  CHECK(flushed == expected);
#endif
}

#if defined(__FLT16_MANT_DIG__)
TEST_CASE("f16 agrees with the compiler's _Float16 and shares its memory", "[convert]") {
  test::Random random(3);
  int wrong = 0;
  for (int n = 0; n < 4000000; ++n) {
    // Exponents around f16's range, so that most numbers are not just 0 or infinity.
    const std::uint64_t bits = random.bits();
    const std::uint32_t exponent = 127 - 28 + static_cast<std::uint32_t>((bits >> 32) % 48);
    const auto x = std::bit_cast<float>(static_cast<std::uint32_t>(bits & 0x807fffffu) | exponent << 23);
    wrong += convert<f16>(x).bits != std::bit_cast<f16>(static_cast<_Float16>(x)).bits;
  }
  CHECK(wrong == 0);
  CHECK(convert<f16>(static_cast<_Float16>(0.1f)).bits == 0x2e66);
  CHECK(convert<float>(static_cast<_Float16>(-2.5f)) == -2.5f);
  CHECK(convert<_Float16>(0.1) == static_cast<_Float16>(0.1));
  CHECK(convert<bf16>(static_cast<_Float16>(-2.5f)).bits == 0xc020);

  std::vector<_Float16> memory(6, static_cast<_Float16>(1.5f));
  const fovea::View<_Float16, 2> view{memory.data(), {2, 3}, {3, 1}};
  const auto stored = fovea::as_storage(view);
  static_assert(std::is_same_v<decltype(stored), const fovea::View<f16, 2>>);
  CHECK(static_cast<const void*>(stored.data) == memory.data());
  CHECK(stored.extent == view.extent);
  CHECK(stored.stride == view.stride);
  static_assert(std::is_same_v<decltype(fovea::as_storage(fovea::View<const _Float16, 2>{})), fovea::View<const f16, 2>>);
  static_assert(fovea::FormatOf<_Float16>::value == fovea::Format::f16);
}
#endif

#if defined(FOVEA_HAS_BF16_TYPE)
TEST_CASE("bf16 shares the bits of the compiler's __bf16", "[convert]") {
  const __bf16 third = convert<__bf16>(1.f / 3);
  CHECK(convert<bf16>(third).bits == 0x3eab);
  CHECK(convert<float>(third) == 0.333984375f);
  static_assert(std::is_same_v<decltype(fovea::as_storage(fovea::View<__bf16, 3>{})), fovea::View<bf16, 3>>);
}
#endif

TEST_CASE("Eigen's half and bfloat16 have the bits of f16 and bf16", "[convert]") {
  int wrong = 0;
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const auto half = Eigen::numext::bit_cast<Eigen::half>(static_cast<Eigen::numext::uint16_t>(bits));
    const auto brain = Eigen::numext::bit_cast<Eigen::bfloat16>(static_cast<Eigen::numext::uint16_t>(bits));
    wrong += convert<f16>(half).bits != bits || convert<bf16>(brain).bits != bits;
    wrong += std::bit_cast<std::uint16_t>(convert<Eigen::half>(f16{static_cast<std::uint16_t>(bits)})) != bits;
    if (is_nan(pattern<f16>(bits)) || is_nan(pattern<bf16>(bits))) continue;
    wrong += convert<float>(half) != static_cast<float>(half) || convert<float>(brain) != static_cast<float>(brain);
  }
  CHECK(wrong == 0);
  CHECK(convert<Eigen::half>(65519.f) == Eigen::half(65504.f));
  CHECK(convert<Eigen::bfloat16>(1 + 0x1p-8 + 0x1p-50) == Eigen::bfloat16(1.0078125f));   // rounded once, from double

  using Matrix = Eigen::Matrix<Eigen::half, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  Matrix matrix(3, 8);
  for (int n = 0; n < 24; ++n) matrix.data()[n] = Eigen::half(static_cast<float>(n) / 4);
  const auto view = fovea::from_eigen(matrix, 2);
  static_assert(std::is_same_v<decltype(view), const fovea::Tensor<f16>>);
  CHECK(static_cast<const void*>(view.data) == matrix.data());
  CHECK(view.extent == std::array<fovea::index_t, 4>{1, 2, 3, 4});
  CHECK(value_of(view(0, 1, 2, 3)) == 23 / 4.);
  const Matrix& readable = matrix;
  static_assert(std::is_same_v<decltype(fovea::from_eigen(readable, 2)), fovea::Tensor<const f16>>);
  static_assert(
      std::is_same_v<decltype(fovea::as_storage(fovea::View<const Eigen::bfloat16, 2>{})), fovea::View<const bf16, 2>>);
  static_assert(fovea::FormatOf<Eigen::half>::value == fovea::Format::f16);
  static_assert(fovea::FormatOf<Eigen::bfloat16>::value == fovea::Format::bf16);
}
