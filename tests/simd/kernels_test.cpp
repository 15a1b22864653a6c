// SPDX-License-Identifier: Apache-2.0
// The micro-kernels against double loops, and their promise: an element's bits do not depend on the tile around it.
#include "fovea/engine/parts/codecs.hpp"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "catch_compat.hpp"
#include "support/random.hpp"

using namespace fovea;

namespace {

std::vector<float> numbers(index_t count, std::uint64_t seed) {
  test::Random random(seed);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& x : values) x = random.normal();
  return values;
}

const float kNan = std::numeric_limits<float>::quiet_NaN();

// Rows of `dim` floats, one behind the other.
Segment rows_at(const float* from, index_t dim, index_t count) {
  return {reinterpret_cast<const std::byte*>(from), dim * 4, count, 4096};
}

}   // namespace

TEST_CASE("transpose and the lane sums") {
  f32 rows[kLanes];
  const std::vector<float> cells = numbers(kLanes * kLanes, 1);
  for (index_t r = 0; r < kLanes; ++r) rows[r] = load(cells.data() + r * kLanes);
  transpose(rows);
  std::vector<float> turned(static_cast<std::size_t>(kLanes * kLanes));
  for (index_t r = 0; r < kLanes; ++r) store(turned.data() + r * kLanes, rows[r]);
  for (index_t r = 0; r < kLanes; ++r) {
    for (index_t c = 0; c < kLanes; ++c)
      CHECK(turned[static_cast<std::size_t>(c * kLanes + r)] == cells[static_cast<std::size_t>(r * kLanes + c)]);
  }
  float sums[4], again[4];
  const f32 a = load(cells.data()), zero(0.f);
  reduce_add4(a, zero, a, f32(1.f), sums);
  reduce_add4(zero, a, f32(3.f), a, again);
  double exact = 0;
  for (index_t i = 0; i < kLanes; ++i) exact += static_cast<double>(cells[static_cast<std::size_t>(i)]);
  CHECK(static_cast<double>(sums[0]) == Catch::Approx(exact).margin(1e-5));
  CHECK(sums[1] == 0.f);
  CHECK(sums[3] == static_cast<float>(kLanes));
  CHECK(sums[0] == sums[2]);
  CHECK(sums[0] == again[1]);
  CHECK(sums[0] == again[3]);
}

TEST_CASE("partial loads and stores touch only what they name") {
  const std::vector<float> from = numbers(kLanes, 2);
  for (index_t count = 0; count <= kLanes; ++count) {
    std::vector<float> to(static_cast<std::size_t>(2 * kLanes), -7.f);
    store_some(to.data() + 3, load_some(from.data(), count), count);
    for (index_t i = 0; i < 2 * kLanes; ++i) {
      const bool inside = i >= 3 && i < 3 + count;
      CHECK(to[static_cast<std::size_t>(i)] == (inside ? from[static_cast<std::size_t>(i - 3)] : -7.f));
    }
  }
}

TEST_CASE("packed scores and weights: every row count, against double, bits of edge tiles") {
  const index_t dim = 37, keys = 2 * kPanel;
  const std::vector<float> q = numbers(kTileRows * dim, 3), k = numbers(keys * dim, 4), v = numbers(keys * dim, 5);
  std::vector<float> panels(static_cast<std::size_t>(keys * dim), kNan);
  pack_keys(F32Codec{}, rows_at(k.data(), dim, 5), dim, 0, panels.data());   // two segments, the border inside a vector
  pack_keys(F32Codec{}, rows_at(k.data() + 5 * dim, dim, keys - 5), dim, 5, panels.data());
  const index_t value_panels = (dim + kPanel - 1) / kPanel;
  std::vector<float> values(static_cast<std::size_t>(value_panels * keys * kPanel), kNan);
  CHECK(pack_values(F32Codec{}, rows_at(v.data(), dim, keys), dim, values.data(), keys * kPanel));

  std::vector<float> full;
  for (index_t rows = kTileRows; rows >= 1; --rows) {
    const float* from[kTileRows] = {};
    for (index_t r = 0; r < rows; ++r) from[r] = q.data() + r * dim;
    std::vector<float> packed(static_cast<std::size_t>(kTileRows * dim), kNan);
    pack_queries(from, rows, 1, dim, 0.5f, packed.data());
    std::vector<float> scores(static_cast<std::size_t>(kTileRows * kScoreStride), kNan);
    for (index_t panel = 0; panel < 2; ++panel)
      gemm_nt<kPanelVectors>(rows, packed.data(), panels.data() + panel * dim * kPanel, dim, scores.data() + panel * kPanel);
    std::vector<float> acc(static_cast<std::size_t>(kTileRows * value_panels * kPanel), 1.f),
        rescale(static_cast<std::size_t>(kTileRows), 0.25f);
    for (index_t panel = 0; panel < value_panels; ++panel)
      gemm_nn<kPanelVectors>(rows, scores.data(), values.data() + panel * keys * kPanel, keys, rescale.data(),
                             acc.data() + panel * kPanel, value_panels * kPanel);
    for (index_t r = 0; r < rows; ++r) {
      double largest = 0;
      for (index_t j = 0; j < keys; ++j) {
        double exact = 0;
        for (index_t d = 0; d < dim; ++d)
          exact += 0.5 * static_cast<double>(q[static_cast<std::size_t>(r * dim + d)]) *
                   static_cast<double>(k[static_cast<std::size_t>(j * dim + d)]);
        largest =
            std::max(largest, std::abs(exact - static_cast<double>(scores[static_cast<std::size_t>(r * kScoreStride + j)])));
      }
      CHECK(largest < 1e-4);
      for (index_t d = 0; d < dim; ++d) {
        double exact = 0.25, size = 1;
        for (index_t j = 0; j < keys; ++j) {
          const double term = static_cast<double>(scores[static_cast<std::size_t>(r * kScoreStride + j)]) *
                              static_cast<double>(v[static_cast<std::size_t>(j * dim + d)]);
          exact += term;
          size += std::abs(term);
        }
        const double got = static_cast<double>(acc[static_cast<std::size_t>(r * value_panels * kPanel + d)]);
        CHECK(std::abs(got - exact) <= static_cast<double>(keys + 2) * 0x1p-24 * size);
      }
    }
    if (rows == kTileRows) full = acc;
    CHECK(std::memcmp(full.data(), acc.data(), static_cast<std::size_t>(rows * value_panels * kPanel) * sizeof(float)) == 0);
  }
}

TEST_CASE("a value that is not finite is noticed while packing and while looking") {
  const index_t dim = 21, keys = 9;
  for (const float bad : {kNan, std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()}) {
    for (const index_t at : {index_t{0}, dim - 1, 4 * dim + 16, keys * dim - 1}) {
      std::vector<float> v = numbers(keys * dim, 6), to(static_cast<std::size_t>(keys * 4 * kPanel));
      const Segment rows = rows_at(v.data(), dim, keys);
      CHECK(pack_values(F32Codec{}, rows, dim, to.data(), keys * kPanel));
      CHECK(all_finite(F32Codec{}, rows, dim));
      v[static_cast<std::size_t>(at)] = bad;
      CHECK_FALSE(pack_values(F32Codec{}, rows, dim, to.data(), keys * kPanel));
      CHECK_FALSE(all_finite(F32Codec{}, rows, dim));
    }
  }
}

TEST_CASE("streamed scores and weights: bits do not depend on the rows and keys beside them") {
  for (const index_t dim : {1, 16, 37, 64, 131}) {
    const index_t rows = 7, keys = 41, padded_dim = (dim + kLanes - 1) / kLanes * kLanes;
    std::vector<float> q(static_cast<std::size_t>(rows * padded_dim), 0.f);
    const std::vector<float> raw = numbers(rows * dim, 7), k = numbers(keys * dim, 8), v = numbers(keys * dim, 9);
    for (index_t r = 0; r < rows; ++r) std::copy_n(raw.data() + r * dim, dim, q.data() + r * padded_dim);
    std::vector<float> together(static_cast<std::size_t>(rows * kScoreStride)),
        alone(static_cast<std::size_t>(kScoreStride));
    stream_scores(F32Codec{}, rows, q.data(), padded_dim, rows_at(k.data(), dim, keys), dim, together.data());
    std::vector<float> acc(static_cast<std::size_t>(rows * padded_dim), 0.5f);
    const std::vector<float> rescale(static_cast<std::size_t>(rows), 2.f);
    stream_weigh(F32Codec{}, rows, together.data(), rows_at(v.data(), dim, keys), dim, rescale.data(), acc.data(),
                 padded_dim);
    for (index_t r = 0; r < rows; ++r) {
      for (index_t j = 0; j < keys; ++j) {
        stream_scores(F32Codec{}, 1, q.data() + r * padded_dim, padded_dim, rows_at(k.data() + j * dim, dim, 1), dim,
                      alone.data());
        const float score = together[static_cast<std::size_t>(r * kScoreStride + j)];
        CHECK(score == alone[0]);
        double exact = 0;
        for (index_t d = 0; d < dim; ++d)
          exact += static_cast<double>(raw[static_cast<std::size_t>(r * dim + d)]) *
                   static_cast<double>(k[static_cast<std::size_t>(j * dim + d)]);
        CHECK(std::abs(exact - static_cast<double>(score)) < 1e-4);
      }
      std::vector<float> acc_alone(static_cast<std::size_t>(padded_dim), 0.5f);
      stream_weigh(F32Codec{}, 1, together.data() + r * kScoreStride, rows_at(v.data(), dim, 13), dim, rescale.data(),
                   acc_alone.data(), padded_dim);
      const float keep = 1.f;
      stream_weigh(F32Codec{}, 1, together.data() + r * kScoreStride + 13, rows_at(v.data() + 13 * dim, dim, keys - 13), dim,
                   &keep, acc_alone.data(), padded_dim);
      CHECK(std::memcmp(acc_alone.data(), acc.data() + r * padded_dim, static_cast<std::size_t>(dim) * sizeof(float)) == 0);
    }
  }
}
