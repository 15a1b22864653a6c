// SPDX-License-Identifier: Apache-2.0
// Products of bf16 tiles against double sums, and the layouts of their operands.
#include "fovea/simd/tiles.hpp"

#include "catch_compat.hpp"

TEST_CASE("tiles are there where the compiler may use AMX on Linux, and given only where they are there") {
  CHECK(fovea::kHasTiles == (FOVEA_HAS_TILES != 0));
  if (!fovea::kHasTiles) CHECK_FALSE(fovea::tiles_allowed());
  if (!fovea::kHasTileProducts) CHECK_FALSE(fovea::tile_products_allowed());
}

#if FOVEA_HAS_TILE_PRODUCTS
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "support/bf16_numbers.hpp"

using namespace fovea;
using test::number;

namespace {

std::size_t at(index_t n) { return static_cast<std::size_t>(n); }

std::vector<bf16> rounded_numbers(index_t count, std::uint64_t seed) {
  test::Random random(seed);
  return test::bf16_numbers(count, random);
}

template <int RowTiles, bool Onto>
void check_product(index_t depth, index_t a_stride, index_t b_stride, index_t c_stride) {
  constexpr index_t kRows = 16 * RowTiles;
  const std::vector<bf16> a = rounded_numbers(kRows * a_stride, 1), b = rounded_numbers(depth / 2 * b_stride, 2);
  std::vector<float> c(at(kRows * c_stride), 0.5f);
  {
    const TileRegisters registers;
    tile_product<RowTiles, Onto>(a.data(), a_stride, b.data(), b_stride, depth, c.data(), c_stride);
  }
  for (index_t m = 0; m < kRows; ++m) {
    for (index_t n = 0; n < c_stride; ++n) {
      double sum = n >= kTileStep || Onto ? 0.5 : 0., size = std::abs(sum);
      for (index_t k = 0; n < kTileStep && k < depth; ++k) {
        const double x = number(a[at(m * a_stride + k)]) * number(b[at(k / 2 * b_stride + 2 * n + k % 2)]);
        sum += x;
        size += std::abs(x);
      }
      CHECK(std::abs(static_cast<double>(c[at(m * c_stride + n)]) - sum) <= static_cast<double>(depth) * 0x1p-24 * size);
    }
  }
}

}   // namespace

TEST_CASE("tile products are sums of products") {
  if (!tile_products_allowed()) return;
  check_product<2, false>(32, 32, 64, 32);
  check_product<2, false>(128, 160, 96, 48);
  check_product<2, true>(64, 64, 64, 32);
  check_product<1, true>(96, 96, 128, 40);
}

TEST_CASE("tile products take NaN and infinities for what they are and denormals for zeros") {
  if (!tile_products_allowed()) return;
  std::vector<bf16> a(32 * 32, convert<bf16>(1.)), b(16 * 64, convert<bf16>(1.));
  std::vector<float> c(32 * 32);
  a[3 * 32 + 5] = convert<bf16>(std::numeric_limits<double>::quiet_NaN());
  a[4 * 32 + 5] = convert<bf16>(HUGE_VAL);
  for (index_t k = 0; k < 32; ++k) a[at(5 * 32 + k)] = bf16{1};   // 2^-133
  {
    const TileRegisters registers;
    tile_product<2, false>(a.data(), 32, b.data(), 64, 32, c.data(), 32);
  }
  for (index_t n = 0; n < 32; ++n) {
    CHECK(c[at(n)] == 32.f);
    CHECK(std::isnan(c[at(3 * 32 + n)]));
    CHECK(std::isinf(c[at(4 * 32 + n)]));
    CHECK(c[at(5 * 32 + n)] == 0.f);
  }
}

TEST_CASE("rows turned to pairs and to columns") {
  constexpr index_t kRows = 64, kDim = 96, kStride = 104, kTo = 80;
  const std::vector<bf16> rows = rounded_numbers(kRows * kStride, 3);
  std::vector<bf16> pairs(at(kDim / 2 * 2 * kTo)), columns(at(kDim * kTo)), pairs_only = pairs, columns_only = columns;
  turn_rows<true, true>(rows.data(), kStride, kRows, kDim, pairs.data(), columns.data(), kTo);
  turn_rows<true, false>(rows.data(), kStride, kRows, kDim, pairs_only.data(), nullptr, kTo);
  turn_rows<false, true>(rows.data(), kStride, kRows, kDim, nullptr, columns_only.data(), kTo);
  for (index_t row = 0; row < kRows; ++row) {
    for (index_t d = 0; d < kDim; ++d) {
      const double x = number(rows[at(row * kStride + d)]);
      const std::size_t pair = at(d / 2 * 2 * kTo + 2 * row + d % 2), column = at(d * kTo + row);
      CHECK((number(pairs[pair]) == x && number(pairs_only[pair]) == x));
      CHECK((number(columns[column]) == x && number(columns_only[column]) == x));
    }
  }
}

TEST_CASE("a panel rounded to pairs of rows") {
  test::Random random(4);
  std::vector<float> rows(at(6 * kPanel)), by(6);
  for (float& x : rows) x = random.normal();
  for (float& x : by) x = random.normal();
  std::vector<bf16> plain(rows.size()), scaled(rows.size());
  round_panel(rows.data(), 6, nullptr, plain.data());
  round_panel(rows.data(), 6, by.data(), scaled.data());
  for (index_t i = 0; i < 6; ++i) {
    for (index_t n = 0; n < kPanel; ++n) {
      const float x = rows[at(i * kPanel + n)];
      const std::size_t pair = at(i / 2 * 2 * kPanel + 2 * n + i % 2);
      CHECK(number(plain[pair]) == number(convert<bf16>(x)));
      CHECK(number(scaled[pair]) == number(convert<bf16>(x * by[at(i)])));
    }
  }
}

#if FOVEA_HAS_TILES
TEST_CASE("tile registers are given back as they were configured") {
  if (!tiles_allowed()) return;
  struct alignas(64) Shape {
    std::uint8_t bytes[64] = {};
  };
  const auto configured = [] {
    Shape shape;
    asm volatile("" : "+m"(shape));
    _tile_storeconfig(&shape);
    asm volatile("" : "+m"(shape));
    return shape;
  };
  const auto same = [](const Shape& a, const Shape& b) { return std::memcmp(&a, &b, sizeof a) == 0; };
  _tile_release();
  { const TileRegisters registers; }
  CHECK(same(configured(), Shape{}));
  Shape own;   // palette 1, tile 0 of 8 rows of 32 bytes
  own.bytes[0] = 1;
  own.bytes[16] = 32;
  own.bytes[48] = 8;
  asm volatile("" : "+m"(own));
  _tile_loadconfig(&own);
  { const TileRegisters registers; }
  CHECK(same(configured(), own));
  _tile_release();
}

TEST_CASE("tile registers may be taken while they are taken") {
  if (!tiles_allowed()) return;
  const std::vector<bf16> a = rounded_numbers(16 * 32, 3), b = rounded_numbers(16 * 64, 4);
  std::vector<float> once(16 * 32), again(16 * 32);
  const TileRegisters registers;
  tile_product<1, false>(a.data(), 32, b.data(), 64, 32, once.data(), 32);
  { const TileRegisters inner; }
  tile_product<1, false>(a.data(), 32, b.data(), 64, 32, again.data(), 32);
  CHECK(std::memcmp(once.data(), again.data(), once.size() * sizeof(float)) == 0);
}

#endif
#endif
