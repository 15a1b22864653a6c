// SPDX-License-Identifier: Apache-2.0
#include "fovea/simd/code_distance.hpp"

#include <vector>

#include "../support/random.hpp"
#include "catch_compat.hpp"

namespace {

using fovea::CodeDistance;
using fovea::index_t;

int code_at(const std::vector<std::byte>& codes, index_t i) {
  return (std::to_integer<int>(codes[static_cast<std::size_t>(i / 4)]) >> (2 * (i % 4))) & 3;
}
int table_distance(CodeDistance kind, const std::vector<std::byte>& a, const std::vector<std::byte>& b) {
  int sum = 0;
  for (index_t i = 0; i < 4 * static_cast<index_t>(a.size()); ++i)
    sum += kind == CodeDistance::exact ? std::abs(code_at(a, i) - code_at(b, i)) : code_at(a, i) ^ code_at(b, i);
  return sum;
}
std::uint16_t one_distance(CodeDistance kind, const std::vector<std::byte>& a, const std::vector<std::byte>& b) {
  std::uint16_t distance = 9999;
  const auto bytes = static_cast<index_t>(a.size());
  fovea::code_distances(kind, a.data(), bytes, b.data(), bytes, 1, &distance);
  return distance;
}
std::vector<std::byte> codes_of(const std::vector<float>& numbers, float threshold = 10.f) {
  std::vector<std::byte> codes(numbers.size() / 4);
  fovea::write_codes(numbers.data(), static_cast<index_t>(numbers.size()), threshold, codes.data());
  return codes;
}

}   // namespace

TEST_CASE("code distance: golden codes and distances", "[code_distance]") {
  const auto key = codes_of({-12, -10, -0.5f, 0, 0.25f, 10, 10.5f, 40}), query = codes_of({3, 3, 3, 3, -20, -20, 11, 0});
  CHECK(key == std::vector<std::byte>{std::byte{0x50}, std::byte{0xfa}});
  CHECK(query == std::vector<std::byte>{std::byte{0xaa}, std::byte{0x70}});
  CHECK(one_distance(CodeDistance::exact, query, key) == 12);
  CHECK(one_distance(CodeDistance::xor_popcount, query, key) == 16);
  const float infinity = std::numeric_limits<float>::infinity();
  // Thresholds of +-infinity leave the signs: only codes 1 and 2.
  CHECK(codes_of({-5, 5, 0, 1e30f}, infinity) == std::vector<std::byte>{std::byte{0b10011001}});
}

TEST_CASE("code distance: all 16 pairs, at every place of a key", "[code_distance]") {
  for (const index_t bytes : {1, 2, 8, 16, 32, 64, 128}) {
    for (int a = 0; a < 4; ++a) {
      for (int b = 0; b < 4; ++b) {
        for (index_t i = 0; i<4 * bytes; i += bytes> 8 ? 5 : 1) {
          std::vector<std::byte> query(static_cast<std::size_t>(bytes)), key(query);
          query[static_cast<std::size_t>(i / 4)] = static_cast<std::byte>(a << (2 * (i % 4)));
          key[static_cast<std::size_t>(i / 4)] = static_cast<std::byte>(b << (2 * (i % 4)));
          const int exact = one_distance(CodeDistance::exact, query, key);
          const int crossed = one_distance(CodeDistance::xor_popcount, query, key);
          if (exact != std::abs(a - b) || crossed != (a ^ b)) FAIL("codes " << a << " and " << b << " at " << i);
        }
      }
    }
  }
  SUCCEED();
}

TEST_CASE("code distance: many keys, against the table", "[code_distance]") {
  test::Random random(1);
  for (const CodeDistance kind : {CodeDistance::exact, CodeDistance::xor_popcount}) {
    for (const index_t bytes : {4, 16, 32, 64}) {
      for (const index_t gap : {0, 7}) {
        for (const index_t count : {0, 1, 3, 4, 7, 8, 9, 25}) {
          const index_t stride = bytes + gap;
          std::vector<std::byte> query(static_cast<std::size_t>(bytes)), keys(static_cast<std::size_t>(count * stride));
          for (std::byte& byte : query) byte = static_cast<std::byte>(random.below(256));
          for (std::byte& byte : keys) byte = static_cast<std::byte>(random.below(256));
          std::vector<std::uint16_t> distances(static_cast<std::size_t>(count) + 1, 9999);
          fovea::code_distances(kind, query.data(), bytes, keys.data(), stride, count, distances.data());
          bool equal = distances.back() == 9999;
          for (index_t i = 0; i < count; ++i) {
            const std::vector<std::byte> key(keys.begin() + i * stride, keys.begin() + i * stride + bytes);
            equal = equal && distances[static_cast<std::size_t>(i)] == table_distance(kind, query, key);
          }
          INFO(bytes << " bytes, stride " << stride << ", " << count << " keys");
          CHECK(equal);
        }
      }
    }
  }
}

TEST_CASE("code distance: a distance is symmetric, 0 to itself and at most 3 dim", "[code_distance]") {
  for (const index_t bytes : {16, 32, 64, 128}) {
    const std::vector<std::byte> low(static_cast<std::size_t>(bytes)), high(low.size(), std::byte{0xff});
    std::vector<std::byte> keys(low);
    for (int n = 0; n < 8; ++n) keys.insert(keys.end(), high.begin(), high.end());
    std::vector<std::uint16_t> distances(9);
    fovea::code_distances(CodeDistance::exact, low.data(), bytes, keys.data(), bytes, 9, distances.data());
    CHECK(distances[0] == 0);
    for (std::size_t n = 1; n < 9; ++n) CHECK(distances[n] == fovea::largest_distance(4 * bytes));
    CHECK(one_distance(CodeDistance::exact, high, low) == fovea::largest_distance(4 * bytes));
  }
}
