// SPDX-License-Identifier: Apache-2.0
// What all panel types promise the engine: ranges of columns with the bits of whole tiles, rows that step over masked keys.
#include "fovea/simd/panels.hpp"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "catch_compat.hpp"
#include "support/random.hpp"

using namespace fovea;

namespace {

constexpr index_t kRows = 32;   // of any group: kernels may touch rows that are not there

struct FloatRows {
  static constexpr bool kRowScaled = false;
  static constexpr index_t offset(index_t d) { return 4 * d; }
  f32 load(const std::byte* row, index_t d, index_t) const { return fovea::load(reinterpret_cast<const float*>(row) + d); }
  f32 load_some(const std::byte* row, index_t d, index_t count, index_t) const {
    return fovea::load_some(reinterpret_cast<const float*>(row) + d, count);
  }
  float scale(const std::byte*, index_t) const { return 1.f; }
};

std::vector<float> numbers(index_t count, std::uint64_t seed) {
  test::Random random(seed);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& x : values) x = random.normal();
  return values;
}

template <class Panels>
std::vector<typename Panels::Element> packed_values(const std::vector<float>& v, index_t dim, index_t keys, index_t stride,
                                                    bool finite) {
  std::vector<typename Panels::Element> panels(static_cast<std::size_t>(Panels::value_size(dim, stride / kPanel)));
  const Segment rows{reinterpret_cast<const std::byte*>(v.data()), 4 * dim, keys, 0};
  CHECK(Panels::pack_values(FloatRows{}, rows, dim, 0, panels.data(), stride) == finite);
  return panels;
}

template <class Panels>
void check_live_rows() {
  const typename Panels::Session session(true);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  test::Random random(41);
  for (const index_t dim : {index_t{1}, kLanes, kPanel - 1, kPanel + 1, 2 * kPanel + 3, index_t{128}}) {
    const index_t keys = 2 * kPanel + 3, stride = 3 * kPanel * kPanel, acc_stride = (dim + kLanes - 1) / kLanes * kLanes;
    for (int round = 0; round < 20; ++round) {
      const index_t begin = random.below(keys), end = random.between(begin + 1, keys);
      std::vector<std::uint8_t> live(static_cast<std::size_t>(kMaxKeyTile), 1);
      std::vector<float> weights(static_cast<std::size_t>(kRows * kScoreStride), 0.f);
      std::vector<float> v = numbers(keys * dim, static_cast<std::uint64_t>(round)), tainted = v;
      for (index_t j = 0; j < keys; ++j) {
        const bool masked = random.one_in(2);
        live[static_cast<std::size_t>(j)] = masked ? 0 : 1;
        weights[static_cast<std::size_t>(j)] = masked || j < begin || j >= end ? 0.f : random.uniform(0.f, 1.f);
        for (index_t d = 0; d < dim; ++d)
          if (masked || j < begin || j >= end) tainted[static_cast<std::size_t>(j * dim + d)] = nan;
      }
      live[0] = 0;   // so that there is a NaN
      weights[0] = 0.f;
      for (index_t d = 0; d < dim; ++d) tainted[static_cast<std::size_t>(d)] = nan;
      const auto clean_panels = packed_values<Panels>(v, dim, keys, stride, true);
      const auto tainted_panels = packed_values<Panels>(tainted, dim, keys, stride, false);

      const std::vector<float> start = numbers(kTileRows * acc_stride, 43);
      std::vector<float> expected = start, got = start, copy = weights;
      const std::vector<float> rescale(static_cast<std::size_t>(kTileRows), 0.75f);
      Panels::weigh(1, begin, end, copy.data(), clean_panels.data(), stride, dim, rescale.data(), expected.data(),
                    acc_stride);
      copy = weights;
      Panels::weigh_live(begin, end, live.data(), copy.data(), tainted_panels.data(), stride, dim, 0.75f, got.data());
      CHECK(std::memcmp(got.data(), expected.data(), static_cast<std::size_t>(dim) * sizeof(float)) == 0);
      CHECK(std::memcmp(got.data() + acc_stride, start.data() + acc_stride,
                        static_cast<std::size_t>((kTileRows - 1) * acc_stride) * sizeof(float)) == 0);
      // A NaN that is looked at does show.
      if (live[static_cast<std::size_t>(begin)] == 0) {
        live[static_cast<std::size_t>(begin)] = 1;
        got = start;
        copy = weights;
        Panels::weigh_live(begin, end, live.data(), copy.data(), tainted_panels.data(), stride, dim, 0.75f, got.data());
        CHECK(std::isnan(got[0]));
      }
    }
  }
}

// Scores and weighted sums of any range of columns against those of the whole tile.
template <class Panels>
void check_ranges() {
  const typename Panels::Session session(true);
  test::Random random(51);
  for (const index_t dim : {index_t{3}, kLanes + 1, index_t{64}}) {
    const index_t keys = 3 * kPanel, stride = keys * kPanel, acc_stride = (dim + kLanes - 1) / kLanes * kLanes;
    const std::vector<float> q = numbers(kTileRows * dim, 52), k = numbers(keys * dim, 53), v = numbers(keys * dim, 54);
    std::vector<typename Panels::Element> queries(static_cast<std::size_t>(Panels::query_size(dim))),
        panels(static_cast<std::size_t>(Panels::key_size(dim, keys)));
    const float* from[kTileRows];
    for (index_t r = 0; r < kTileRows; ++r) from[r] = q.data() + r * dim;
    const float scale = 0.125f;
    Panels::pack_queries(from, kTileRows, 1, dim, scale, queries.data());
    Panels::clear_keys(panels.data(), dim, 0, keys);
    Panels::pack_keys(FloatRows{}, Segment{reinterpret_cast<const std::byte*>(k.data()), 4 * dim, keys, 0}, dim, 0,
                      panels.data());
    const auto values = packed_values<Panels>(v, dim, keys, stride, true);
    std::vector<float> whole(static_cast<std::size_t>(kRows * kScoreStride), 0.f);
    Panels::scores(kTileRows, 0, keys, queries.data(), panels.data(), dim, scale, whole.data());
    double worst = 0;
    for (index_t r = 0; r < kTileRows; ++r) {
      for (index_t j = 0; j < keys; ++j) {
        double exact = 0, size = 0;
        for (index_t d = 0; d < dim; ++d) {
          const double term = 0.125 * static_cast<double>(q[static_cast<std::size_t>(r * dim + d)]) *
                              static_cast<double>(k[static_cast<std::size_t>(j * dim + d)]);
          exact += term;
          size += std::abs(term);
        }
        // Numbers rounded to bf16 (8 significant bits) are off by up to 2^-8 of their size, products by twice that and its
        // square; then the roundings of the fp32 sum.
        const double rounding = sizeof(typename Panels::Element) == 2 ? 2 * 0x1p-8 + 0x1p-16 : 0.;
        const double bound = (rounding + static_cast<double>(dim + 3) * 1.01 * 0x1p-24) * size;
        worst = std::max(
            worst, std::abs(static_cast<double>(whole[static_cast<std::size_t>(r * kScoreStride + j)]) - exact) / bound);
      }
    }
    CHECK(worst <= 1.);

    for (int round = 0; round < 40; ++round) {
      const index_t begin = random.below(keys), end = random.between(begin + 1, keys), rows = random.between(1, kTileRows);
      std::vector<float> part(static_cast<std::size_t>(kRows * kScoreStride), 0.f);
      Panels::scores(rows, begin, end, queries.data(), panels.data(), dim, scale, part.data());
      index_t wrong = 0;
      for (index_t r = 0; r < rows; ++r)
        wrong += std::memcmp(part.data() + r * kScoreStride + begin, whole.data() + r * kScoreStride + begin,
                             static_cast<std::size_t>(end - begin) * sizeof(float)) != 0;
      CHECK(wrong == 0);

      // Weights that are zero outside a range, over the range and over everything.
      std::vector<float> weights(static_cast<std::size_t>(kRows * kScoreStride), 0.f);
      for (index_t r = 0; r < kTileRows; ++r)
        for (index_t j = begin; j < end; ++j)
          weights[static_cast<std::size_t>(r * kScoreStride + j)] = random.uniform(0.f, 1.f);
      std::vector<float> copy = weights, narrow = numbers(kTileRows * acc_stride, 55), wide = narrow;
      const std::vector<float> rescale(static_cast<std::size_t>(kTileRows), 0.5f);
      Panels::weigh(rows, begin, end, copy.data(), values.data(), stride, dim, rescale.data(), narrow.data(), acc_stride);
      copy = weights;
      Panels::weigh(kTileRows, 0, keys, copy.data(), values.data(), stride, dim, rescale.data(), wide.data(), acc_stride);
      CHECK(std::memcmp(narrow.data(), wide.data(), static_cast<std::size_t>(rows * acc_stride) * sizeof(float)) == 0);
    }
  }
}

}   // namespace

TEST_CASE("f32 panels: ranges of columns have the bits of whole tiles") { check_ranges<F32Panels>(); }
TEST_CASE("f32 panels: a row steps over masked keys and keeps its bits") { check_live_rows<F32Panels>(); }
#if defined(__AVX512BF16__)
TEST_CASE("bf16 panels of dot products: ranges of columns have the bits of whole tiles") { check_ranges<DotBf16Panels>(); }
TEST_CASE("bf16 panels of dot products: a row steps over masked keys and keeps its bits") {
  check_live_rows<DotBf16Panels>();
}
TEST_CASE("this machine's bf16 panels: ranges of columns have the bits of whole tiles") { check_ranges<Bf16Panels>(); }
TEST_CASE("this machine's bf16 panels: a row steps over masked keys and keeps its bits") { check_live_rows<Bf16Panels>(); }
#endif
