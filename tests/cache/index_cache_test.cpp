// SPDX-License-Identifier: Apache-2.0
#include "fovea/cache/index_cache.hpp"

#include <cstring>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/reference/dsa.hpp"
#include "support/random.hpp"

namespace {

using fovea::Format;
using fovea::index_t;
using fovea::IndexCache;
using fovea::IndexLayout;
using fovea::IndexRounding;

fovea::IndexCacheShape shape_of(index_t dim, index_t sequences, index_t slots, IndexLayout layout,
                                IndexRounding rounding = IndexRounding::ue8m0, Format format = Format::e4m3) {
  fovea::IndexCacheShape shape;
  shape.dim = dim, shape.sequences = sequences, shape.slots = slots;
  shape.layout = layout, shape.rounding = rounding, shape.format = format;
  return shape;
}

std::vector<float> random_rows(index_t tokens, index_t dim, float size) {
  test::Random random(11);
  std::vector<float> rows;
  for (index_t n = 0; n < tokens * dim; ++n) rows.push_back(size * random.normal());
  return rows;
}
fovea::Operand operand(std::vector<float>& rows, index_t first, index_t tokens, index_t dim) {
  return fovea::bhsd(rows.data() + first * dim, 1, 1, tokens, dim);
}

// Number d of key j, as the cache holds it.
double stored_number(const fovea::IndexKeys& keys, index_t sequence, index_t j, index_t d) {
  const auto place = fovea::index_keys::place_of(keys, sequence, j);
  float scale = 1;
  if (place.scales != nullptr) std::memcpy(&scale, place.scales, sizeof scale);
  fovea::fp8_e4m3 code;
  std::memcpy(&code, place.codes + d, 1);
  return fovea::widen(code) * double{scale};
}

}   // namespace

TEST_CASE("index cache: scales, plain and ue8m0", "[index_cache]") {
  // Largest number -> ue8m0 scale.
  const std::pair<float, int> golden[] = {{1e-6f, -22}, {0.875f, -9}, {1.f, -8}, {3.f, -7}, {448.f, 0}, {449.f, 1}};
  for (const auto& [largest, exponent] : golden) {
    CAPTURE(largest);
    CHECK(fovea::index_scale(largest, IndexRounding::ue8m0) == std::ldexp(1.f, exponent));
    CHECK(double{fovea::index_scale(largest, IndexRounding::ue8m0)} == fovea::reference::dsa_scale(double{largest}, true));
  }
  CHECK(fovea::index_scale(0.875f, IndexRounding::plain) == 0x1p-9f);
  CHECK(fovea::index_scale(1e-6f, IndexRounding::plain) == 1e-4f / 448.f);
}

TEST_CASE("index cache: both layouts hold the rounded rows of every sequence", "[index_cache]") {
  constexpr index_t kTokens = 150;
  for (const index_t dim : {index_t{128}, index_t{20}}) {
    for (const IndexRounding rounding : {IndexRounding::plain, IndexRounding::ue8m0}) {
      std::vector<float> rows = random_rows(kTokens, dim, 3);
      for (const IndexLayout layout : {IndexLayout::rows, IndexLayout::deep_gemm}) {
        CAPTURE(dim, static_cast<int>(rounding), static_cast<int>(layout));
        IndexCache cache;
        REQUIRE(cache.create(shape_of(dim, 2, kTokens, layout, rounding)).ok());
        REQUIRE(cache.append(1, operand(rows, 0, 70, dim)).ok());
        REQUIRE(cache.append(1, operand(rows, 70, 1, dim)).ok());
        REQUIRE(cache.append(0, operand(rows, 5, 3, dim)).ok());
        REQUIRE(cache.append(1, operand(rows, 71, kTokens - 71, dim)).ok());
        CHECK(cache.len(0) == 3);
        CHECK(cache.len(1) == kTokens);
        const fovea::IndexBatch batch = cache.batch();
        const auto check = [&](index_t sequence, index_t j, index_t row) {
          double largest = 0;
          for (index_t d = 0; d < dim; ++d)
            largest = std::max(largest, std::abs(double{rows[static_cast<std::size_t>(row * dim + d)]}));
          const double scale = fovea::reference::dsa_scale(largest, rounding == IndexRounding::ue8m0);
          for (index_t d = 0; d < dim; ++d) {
            const double x = rows[static_cast<std::size_t>(row * dim + d)], got = stored_number(batch.keys, sequence, j, d);
            // Half a unit of four significant bits, or of the smallest denormal, 2^-9; fp32 roundings of scale and quotient.
            CHECK(std::abs(got - x) <= std::max(std::abs(x) * 0x1.00001p-4, scale * 0x1p-10));
          }
        };
        for (index_t j = 0; j < kTokens; ++j) check(1, j, j);
        for (index_t j = 0; j < 3; ++j) check(0, j, 5 + j);
      }
    }
  }
}

TEST_CASE("index cache: bytes per token, and where a deep_gemm page keeps them", "[index_cache]") {
  IndexCache rows, pages;
  REQUIRE(rows.create(shape_of(128, 1, 640, IndexLayout::rows)).ok());
  REQUIRE(pages.create(shape_of(128, 1, 600, IndexLayout::deep_gemm)).ok());
  CHECK(pages.slots() == 640);
  CHECK(rows.bytes() == 640 * 132 + 64);
  CHECK(pages.bytes() == 640 * 132 + 64);
  std::vector<float> numbers = random_rows(65, 128, 1);
  REQUIRE(pages.append(0, operand(numbers, 0, 65, 128)).ok());
  const fovea::IndexKeys keys = pages.keys();
  const auto last = fovea::index_keys::place_of(keys, 0, 64);
  CHECK(last.codes - keys.codes == 64 * 132);
  CHECK(last.scales - keys.codes == 64 * 132 + 64 * 128);
  const auto second = fovea::index_keys::place_of(keys, 0, 1);
  CHECK(second.codes - keys.codes == 128);
  CHECK(second.scales - keys.codes == 64 * 128 + 4);
}

TEST_CASE("index cache: plain formats, numbers that are not finite", "[index_cache]") {
  const index_t dim = 24;
  std::vector<float> rows = random_rows(2, dim, 1);
  IndexCache cache;
  REQUIRE(cache.create(shape_of(dim, 1, 2, IndexLayout::rows, IndexRounding::none, Format::f32)).ok());
  REQUIRE(cache.append(0, operand(rows, 0, 2, dim)).ok());
  CHECK(std::memcmp(cache.keys().codes, rows.data(), rows.size() * sizeof(float)) == 0);
  CHECK(cache.keys().scales == nullptr);

  rows[3] = std::numeric_limits<float>::infinity();
  rows[4] = std::numeric_limits<float>::quiet_NaN();
  IndexCache coded;
  REQUIRE(coded.create(shape_of(dim, 1, 2, IndexLayout::rows)).ok());
  REQUIRE(coded.append(0, operand(rows, 0, 1, dim)).ok());
  for (index_t d = 0; d < dim; ++d) CHECK(std::isnan(stored_number(coded.keys(), 0, 0, d)) == (d == 3 || d == 4));
}

TEST_CASE("index cache: refusals change nothing", "[index_cache]") {
  IndexCache cache;
  CHECK(cache.sequences() == 0);
  for (const auto& bad :
       {shape_of(0, 1, 4, IndexLayout::rows), shape_of(513, 1, 4, IndexLayout::rows), shape_of(8, 0, 4, IndexLayout::rows),
        shape_of(8, 1, 0, IndexLayout::rows), shape_of(8, 1, 4, IndexLayout::rows, IndexRounding::none),
        shape_of(8, 1, 4, IndexLayout::deep_gemm, IndexRounding::none, Format::bf16),
        shape_of(8, 1, 4, IndexLayout::rows, IndexRounding::none, Format::i8_token),
        shape_of(512, index_t{1} << 30, index_t{1} << 30, IndexLayout::rows),
        shape_of(8, 1, PTRDIFF_MAX - 10, IndexLayout::rows), shape_of(8, 1, PTRDIFF_MAX - 10, IndexLayout::deep_gemm)})
    CHECK_FALSE(cache.create(bad).ok());
  CHECK(cache.sequences() == 0);

  std::vector<float> rows = random_rows(9, 8, 1);
  REQUIRE(cache.create(shape_of(8, 2, 6, IndexLayout::rows)).ok());
  REQUIRE(cache.append(0, operand(rows, 0, 4, 8)).ok());
  CHECK(cache.append(0, operand(rows, 0, 3, 8)).code() == fovea::Code::out_of_pages);
  CHECK_FALSE(cache.append(2, operand(rows, 0, 1, 8)).ok());
  CHECK_FALSE(cache.append(-1, operand(rows, 0, 1, 8)).ok());
  CHECK_FALSE(cache.append(0, fovea::Operand(fovea::bhsd(rows.data(), 1, 1, 1, 7))).ok());
  CHECK_FALSE(cache.append(0, fovea::Operand(fovea::bhsd(static_cast<float*>(nullptr), 1, 1, 1, 8))).ok());
  CHECK_FALSE(cache.truncate(0, 5).ok());
  CHECK(cache.len(0) == 4);
  REQUIRE(cache.truncate(0, 3).ok());
  CHECK(cache.len(0) == 1);
  REQUIRE(cache.reset(0).ok());
  CHECK(cache.lengths()[0] == 0);
}
