// SPDX-License-Identifier: Apache-2.0
// Every pattern of every small format against its definition in words: sign, exponent and fraction, put together by ldexp.
#include "fovea/simd/convert.hpp"

#include <cmath>
#include <limits>
#include <vector>

#include "catch_compat.hpp"

using namespace fovea;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// An IEEE format: the largest exponent means infinity or NaN.
double ieee(unsigned bits, int exponent_bits, int fraction_bits) {
  const unsigned fraction = bits & ((1u << fraction_bits) - 1), top = (1u << exponent_bits) - 1;
  const unsigned exponent = (bits >> fraction_bits) & top;
  const double sign = ((bits >> (exponent_bits + fraction_bits)) & 1u) != 0 ? -1. : 1.;
  const int least = 2 - (1 << (exponent_bits - 1)) - fraction_bits;
  if (exponent == top) return fraction == 0 ? sign * kInf : kNan;
  if (exponent == 0) return sign * std::ldexp(fraction, least);
  return sign * std::ldexp((1u << fraction_bits) + fraction, least + static_cast<int>(exponent) - 1);
}

double e4m3(unsigned bits) {
  const unsigned exponent = (bits >> 3) & 15u, fraction = bits & 7u;
  const double sign = (bits & 0x80u) != 0 ? -1. : 1.;
  if (exponent == 15 && fraction == 7) return kNan;
  return sign * (exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, static_cast<int>(exponent) - 10));
}

bool same(float got, double exact) {
  if (std::isnan(exact)) return std::isnan(got);
  return static_cast<double>(got) == exact && std::signbit(got) == std::signbit(exact);
}

// All patterns of `bytes` bytes, in vectors that start at every lane, whole and in part.
template <class Load, class LoadSome, class Exact>
void check_patterns(int bytes, const Load& load_all, const LoadSome& load_part, const Exact& exact) {
  const index_t patterns = index_t{1} << (8 * bytes);
  std::vector<std::byte> stored(static_cast<std::size_t>(patterns * bytes));
  for (index_t i = 0; i < patterns * bytes; ++i)
    stored[static_cast<std::size_t>(i)] = static_cast<std::byte>(bytes == 1 || i % 2 == 0 ? i / bytes : i / bytes / 256);
  index_t wrong = 0;
  float lanes[kLanes];
  for (index_t first = 0; first + kLanes <= patterns; ++first) {
    store(lanes, load_all(stored.data() + first * bytes));
    for (index_t i = 0; i < kLanes; ++i) wrong += !same(lanes[i], exact(static_cast<unsigned>(first + i)));
  }
  CHECK(wrong == 0);
  for (index_t first = 0; first < patterns; ++first) {
    const index_t count = std::min(first % (kLanes + 1), patterns - first);
    // Exactly as long as what may be read.
    const std::vector<std::byte> part(stored.begin() + first * bytes, stored.begin() + (first + count) * bytes);
    store(lanes, load_part(part.data(), count));
    for (index_t i = 0; i < kLanes; ++i) {
      wrong += !same(lanes[i], i < count ? exact(static_cast<unsigned>(first + i)) : 0.);
    }
  }
  CHECK(wrong == 0);
}

}   // namespace

TEST_CASE("16-bit numbers: every pattern") {
  check_patterns(
      2, [](const std::byte* from) { return load_bf16(from); },
      [](const std::byte* from, index_t count) { return load_bf16_some(from, count); },
      [](unsigned bits) { return ieee(bits, 8, 7); });
  check_patterns(
      2, [](const std::byte* from) { return load_f16(from); },
      [](const std::byte* from, index_t count) { return load_f16_some(from, count); },
      [](unsigned bits) { return ieee(bits, 5, 10); });
}

TEST_CASE("8-bit numbers: every pattern") {
  check_patterns(
      1, [](const std::byte* from) { return load_e4m3(from); },
      [](const std::byte* from, index_t count) { return load_e4m3_some(from, count); }, e4m3);
  check_patterns(
      1, [](const std::byte* from) { return load_e5m2(from); },
      [](const std::byte* from, index_t count) { return load_e5m2_some(from, count); },
      [](unsigned bits) { return ieee(bits, 5, 2); });
  check_patterns(
      1, [](const std::byte* from) { return load_i8(from); },
      [](const std::byte* from, index_t count) { return load_i8_some(from, count); },
      [](unsigned bits) { return bits < 128 ? double(bits) : double(bits) - 256.; });
}

#if defined(FOVEA_FAST_E4M3)
TEST_CASE("e4m3 in pairs of vectors: every normal number, and none other passes for one") {
  index_t wrong = 0, turned_away = 0;
  for (unsigned pattern = 0; pattern < 256; ++pattern) {
    for (unsigned at = 0; at < 64; ++at) {
      std::byte stored[64];
      for (unsigned i = 0; i < 64; ++i) stored[i] = static_cast<std::byte>((at * 7 + i * 5) % 112 + 15 + (i % 2) * 128);
      stored[at] = static_cast<std::byte>(pattern);
      const bool special = pattern % 128 < 8 || pattern % 128 == 127;
      const bool normal = all_normal_e4m3<4>(stored);
      wrong += special && normal;
      wrong += normal != (all_normal_e4m3<2>(stored) && all_normal_e4m3<2>(stored + 32));
      turned_away += !special && !normal;
      for (unsigned half = 0; half < 2 && normal; ++half) {
        f32 pair[2];
        load_normal_e4m3_pair(stored + 32 * half, pair);
        for (unsigned i = 0; i < 32; ++i) {
          float lanes[kLanes];
          store(lanes, pair[i / kLanes]);
          wrong += !same(lanes[i % kLanes], e4m3(static_cast<unsigned>(stored[32 * half + i])));
        }
      }
    }
  }
  CHECK(wrong == 0);
  CHECK(turned_away == 2 * 7 * 64);   // the smaller numbers of exponent 1
}
#endif

TEST_CASE("nibbles: every value at every place, symmetric and with a zero point") {
  std::byte codes[48];
  for (unsigned turn = 0; turn < 16; ++turn) {
    for (unsigned i = 0; i < 48; ++i) codes[i] = static_cast<std::byte>((i + turn) % 16 + (i * 3 + turn) % 16 * 16);
    for (index_t d = 0; d < 96; d += kLanes) {
      float symmetric[kLanes], zero[kLanes];
      store(symmetric, NibbleValues::symmetric(f32(0.25f))(nibble_bytes(codes, d)));
      store(zero, NibbleValues::with_zero(f32(0.5f), f32(-3.f))(nibble_bytes(codes, d)));
      for (index_t i = 0; i < kLanes; ++i) {
        const index_t number = d + i, byte = number / 32 * 16 + number % 16;
        const unsigned both = static_cast<unsigned>(codes[byte]), nibble = number % 32 < 16 ? both % 16 : both / 16;
        CHECK(symmetric[i] == (static_cast<float>(nibble) - 8.f) * 0.25f);
        CHECK(zero[i] == static_cast<float>(nibble) * 0.5f - 3.f);
      }
    }
  }
}

TEST_CASE("doubles are rounded to the nearest float, ties to even") {
  const double values[] = {0.1,
                           -0.1,
                           1 + 0x1p-24,
                           1 + 0x1p-23 + 0x1p-24,
                           1 + 0x1p-24 + 0x1p-50,
                           0x1p-149,
                           0x1p-151,
                           1e39,
                           kInf,
                           -kInf,
                           kNan,
                           0x1.fffffefp127,
                           -0.,
                           3.};
  const float expected[] = {0.1f,
                            -0.1f,
                            1.f,
                            1 + 0x1p-22f,
                            1 + 0x1p-23f,
                            0x1p-149f,
                            0.f,
                            std::numeric_limits<float>::infinity(),
                            std::numeric_limits<float>::infinity(),
                            -std::numeric_limits<float>::infinity(),
                            std::numeric_limits<float>::quiet_NaN(),
                            0x1.fffffep127f,
                            -0.f,
                            3.f};
  for (std::size_t i = 0; i < std::size(values); ++i) {
    float lanes[kLanes];
    store(lanes, load_f64_some(reinterpret_cast<const std::byte*>(values + i), 1));
    CHECK(same(lanes[0], static_cast<double>(expected[i])));
    for (index_t lane = 1; lane < kLanes; ++lane) CHECK(lanes[lane] == 0.f);
  }
}
