// SPDX-License-Identifier: Apache-2.0
// TileBf16Panels against double sums of the rounded operands and against a scalar model of the instruction, bit for bit: with all rows
// and keys around a product, and with keys that are not to be looked at.
#include "fovea/simd/gemm_tiles.hpp"

#include "catch_compat.hpp"
#include "fovea/simd/panels.hpp"

#if !FOVEA_HAS_TILES

TEST_CASE("without tile registers a group has the rows of the vector kernels") {
  CHECK(fovea::packed_rows(fovea::Panels::bf16) == fovea::kTileRows);
}

#else

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "support/bf16_numbers.hpp"

using namespace fovea;
using test::Bf16Rows, test::bf16_numbers, test::flushed, test::flushed_fma, test::number, test::same_bits;

namespace {

using Tiled = TileBf16Panels;
const float kNan = std::numeric_limits<float>::quiet_NaN();

std::size_t at(index_t n) { return static_cast<std::size_t>(n); }

Segment rows_of(const std::vector<bf16>& x, index_t dim, index_t first, index_t count) {
  return {reinterpret_cast<const std::byte*>(x.data() + first * dim), 2 * dim, count, 0};
}

std::vector<bf16> poison(index_t count) { return std::vector<bf16>(at(count), bf16{0x7fc1}); }

constexpr index_t kKeys = 3 * kTileStep + 5, kPanelStride = 4 * kPanel * kPanel;

struct Operands {
  index_t dim;
  std::vector<bf16> q, k, v, queries, keys;
  std::vector<float> q_floats;

  Operands(index_t dim_, test::Random& random)
      : dim(dim_),
        q(bf16_numbers(kTileStep * dim, random)),
        k(bf16_numbers(kKeys * dim, random)),
        v(bf16_numbers(kKeys * dim, random)),
        queries(poison(Tiled::query_size(dim))),
        keys(poison(Tiled::key_size(dim, 4 * kPanel))) {
    for (const bf16 x : q) q_floats.push_back(convert<float>(x));
    Tiled::pack_keys(Bf16Rows{}, rows_of(k, dim, 0, kKeys), dim, 0, keys.data());
  }
  std::vector<float> scores(index_t rows, index_t begin, index_t end) {
    const float* from[kTileStep] = {};
    for (index_t r = 0; r < rows; ++r) from[r] = q_floats.data() + r * dim;
    Tiled::pack_queries(from, rows, 1, dim, 0.f, queries.data());
    std::vector<float> s(at(kTileStep * kScoreStride), kNan);
    Tiled::scores(rows, begin, end, queries.data(), keys.data(), dim, 0.3f, s.data());
    return s;
  }
  // Values of the keys [begin, end) packed into poisoned memory.
  std::vector<bf16> values(index_t begin, index_t end, const std::vector<bf16>& from) const {
    std::vector<bf16> panels = poison((dim + kPanel - 1) / kPanel * kPanelStride);
    Tiled::clear_values(panels.data(), begin, end, dim, kPanelStride);
    Tiled::pack_values(Bf16Rows{}, rows_of(from, dim, begin, end - begin), dim, begin, panels.data(), kPanelStride);
    return panels;
  }
};

const std::vector<index_t> kDims = {1, 2, 15, 31, 32, 33, 48, 64, 80, 128, 576};

// TDPBF16PS in the words of the manual: even and odd terms of 32 from 0, their sum added on; no denormals anywhere.
template <class A, class B>   // a(k), b(k): floats
float tile_sum(index_t begin, index_t end, const A& a, const B& b) {
  float sum = 0;
  for (index_t block = begin / kTileStep * kTileStep; block < end; block += kTileStep) {
    float halves[2] = {0, 0};
    for (index_t k = std::max(begin, block); k < std::min(end, block + kTileStep); ++k)
      halves[k % 2] = flushed_fma(a(k), b(k), halves[k % 2]);
    sum = flushed(sum + flushed(halves[0] + halves[1]));
  }
  return sum;
}
// Sums of so many terms in chains of any grouping, some of them flushed.
double bound(double terms, double size) { return (terms + 2) * (1.01 * 0x1p-24 * size + 0x1p-126); }

bool no_tiles() {
  if (tiles_allowed()) return false;
  WARN("this process gets no tile registers: nothing tested");
  return true;
}

}   // namespace

TEST_CASE("tile scores: every dim, group size and key range against double, with the same bits") {
  if (no_tiles()) return;
  test::Random random(31);
  const Tiled::Session session(true);
  for (const index_t dim : kDims) {
    Operands x(dim, random);
    const std::vector<float> full = x.scores(kTileStep, 0, kKeys);
    index_t wrong_sums = 0, wrong_bits = 0;
    for (index_t r = 0; r < kTileStep; ++r) {
      for (index_t j = 0; j < kKeys; ++j) {
        double sum = 0, size = 0;
        for (index_t d = 0; d < dim; ++d) {
          const double product = number(x.q[at(r * dim + d)]) * number(x.k[at(j * dim + d)]);
          sum += product;
          size += std::abs(product);
        }
        const float got = full[at(r * kScoreStride + j)];
        const double scale = static_cast<double>(0.3f);
        wrong_sums += !(std::abs(static_cast<double>(got) - scale * sum) <= bound(static_cast<double>(dim), scale * size));
        wrong_bits += !same_bits(got, 0.3f * tile_sum(
                                                 0, dim, [&](index_t d) { return convert<float>(x.q[at(r * dim + d)]); },
                                                 [&](index_t d) { return convert<float>(x.k[at(j * dim + d)]); }));
      }
    }
    INFO("dim " << dim);
    CHECK(wrong_sums == 0);
    CHECK(wrong_bits == 0);
    for (const index_t rows : {1, 2, 15, 16, 17, 31, 32}) {
      const index_t begin = random.below(kKeys), end = random.between(begin + 1, kKeys);
      const std::vector<float> part = x.scores(rows, begin, end);
      index_t wrong = 0;
      for (index_t r = 0; r < rows; ++r)
        wrong += std::memcmp(part.data() + r * kScoreStride + begin, full.data() + r * kScoreStride + begin,
                             at(end - begin) * sizeof(float)) != 0;
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("tile weights: every dim, group size and key range, with dead keys among them") {
  if (no_tiles()) return;
  test::Random random(32);
  const Tiled::Session session(true);
  for (const index_t dim : kDims) {
    for (const bool tiny : {false, true}) {   // denormal products and values
      Operands x(dim, random);
      for (bf16& v : x.v) {
        if (tiny) v = convert<bf16>(std::ldexp(random.normal(), -static_cast<int>(random.between(0, 140))));
      }
      const index_t stride = (dim + kLanes - 1) / kLanes * kLanes;
      for (const index_t rows : {1, 7, 16, 17, 32}) {
        const index_t begin = random.one_in(3) ? 0 : random.below(kKeys), end = random.between(begin + 1, kKeys);
        INFO("dim " << dim << ", rows " << rows << ", keys " << begin << " to " << end << (tiny ? ", tiny" : ""));
        // A dead key has no weight in any row, and its value is NaN.
        std::vector<std::uint8_t> live(at(kMaxKeyTile), 1);
        std::vector<bf16> broken = x.v;
        for (index_t j = begin; j < end; ++j) {
          if (!random.one_in(4)) continue;
          live[at(j)] = 0;
          std::fill_n(broken.begin() + j * dim, dim, bf16{0x7fc1});
        }
        std::vector<float> weights(at(kTileStep * kScoreStride), kNan), rescale(at(kTileStep)),
            start(at(kTileStep * stride));
        for (index_t r = 0; r < rows; ++r) {
          for (index_t j = begin; j < end; ++j) {
            const float size = tiny ? std::ldexp(1.f, -static_cast<int>(random.between(0, 100))) : 1.f;
            weights[at(r * kScoreStride + j)] = live[at(j)] == 0 || random.one_in(6) ? 0.f : size * random.uniform(0.f, 1.f);
          }
        }
        for (float& f : rescale) f = random.uniform(0.f, 1.f);
        for (float& f : start) f = tiny ? 0x1p-120f * random.normal() : random.normal();
        const std::vector<bf16> panels = x.values(begin, end, x.v), holes = x.values(begin, end, broken);
        std::vector<float> p = weights, acc = start;
        Tiled::weigh(rows, begin, end, p.data(), panels.data(), kPanelStride, dim, rescale.data(), acc.data(), stride);

        index_t wrong_sums = 0, wrong_bits = 0, wrong_alone = 0;
        for (index_t r = 0; r < rows; ++r) {
          std::vector<float> row(weights.begin() + r * kScoreStride, weights.begin() + (r + 1) * kScoreStride);
          std::vector<float> alone(start.begin() + r * stride, start.begin() + (r + 1) * stride);
          Tiled::weigh_live(begin, end, live.data(), row.data(), holes.data(), kPanelStride, dim, rescale[at(r)],
                            alone.data());
          for (index_t d = 0; d < dim; ++d) {
            const float before = start[at(r * stride + d)], got = acc[at(r * stride + d)];
            const auto weight = [&](index_t j) {
              return convert<float>(convert<bf16>(flushed(weights[at(r * kScoreStride + j)])));
            };
            const auto value = [&](index_t j) { return convert<float>(x.v[at(j * dim + d)]); };
            double sum = static_cast<double>(before) * static_cast<double>(rescale[at(r)]), size = std::abs(sum);
            for (index_t j = begin; j < end; ++j) {
              const double term = static_cast<double>(weight(j)) * static_cast<double>(value(j));
              sum += term;
              size += std::abs(term) + (std::fpclassify(value(j)) == FP_SUBNORMAL ? 0x1p-102 : 0.);
            }
            wrong_sums += !(std::abs(static_cast<double>(got) - sum) <= bound(static_cast<double>(end - begin), size));
            wrong_bits += !same_bits(got, std::fma(before, rescale[at(r)], tile_sum(begin, end, weight, value)) + 0.f);
            wrong_alone += !same_bits(got, alone[at(d)]);
          }
        }
        CHECK(wrong_sums == 0);
        CHECK(wrong_bits == 0);
        CHECK(wrong_alone == 0);
      }
    }
  }
}

TEST_CASE("keys without weight around a range change no bit of tile weights") {
  if (no_tiles()) return;
  test::Random random(33);
  const Tiled::Session session(true);
  const index_t dim = 64;
  const Operands x(dim, random);
  const std::vector<bf16> whole = x.values(0, kKeys, x.v);
  for (int round = 0; round < 200; ++round) {
    const index_t begin = random.below(kKeys), end = random.between(begin + 1, kKeys);
    std::vector<float> narrow(at(kTileStep * kScoreStride), kNan), wide(at(kTileStep * kScoreStride), 0.f);
    for (index_t r = 0; r < kTileStep; ++r) {
      for (index_t j = begin; j < end; ++j)
        narrow[at(r * kScoreStride + j)] = wide[at(r * kScoreStride + j)] = random.uniform(0.f, 1.f);
    }
    const std::vector<float> rescale(at(kTileStep), 0.5f);
    std::vector<float> a(at(kTileStep * dim), 1.f), b = a;
    Tiled::weigh(kTileStep, begin, end, narrow.data(), x.values(begin, end, x.v).data(), kPanelStride, dim, rescale.data(),
                 a.data(), dim);
    Tiled::weigh(kTileStep, 0, kKeys, wide.data(), whole.data(), kPanelStride, dim, rescale.data(), b.data(), dim);
    CHECK(std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
  }
}

#endif
