// SPDX-License-Identifier: Apache-2.0
// The kernels on bf16 pairs: what the instruction does, both kernels against double sums of the rounded operands, bits that
// do not depend on the tile around them, and panels packed from any storage.
#include "fovea/simd/gemm_bf16.hpp"

#include "catch_compat.hpp"
#include "fovea/simd/panels.hpp"

#if !defined(__AVX512BF16__)

TEST_CASE("without the dot product of bf16 pairs there are no bf16 panels") {
  CHECK_FALSE(fovea::kHasBf16Dot);
  CHECK(sizeof(fovea::F32Panels::Element) == 4);
}

#else

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "support/bf16_numbers.hpp"

using namespace fovea;
using test::Bf16Rows, test::flushed_fma, test::same_bits;

namespace {

const float kNan = std::numeric_limits<float>::quiet_NaN();
const float kInf = std::numeric_limits<float>::infinity();
const double kRounding = 0x1p-24;   // of one fp32 operation, relative
const double kFlushed = 0x1p-126;   // what a flushed result was smaller than

std::size_t at(index_t n) { return static_cast<std::size_t>(n); }

float widened(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }
// To nearest even, denormals to zero.
std::uint16_t rounded(float x) {
  if (std::fpclassify(x) == FP_SUBNORMAL) return std::signbit(x) ? 0x8000 : 0;
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  if (std::isnan(x)) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float as_bf16(float x) { return widened(rounded(x)); }

// The instruction, in the words of the manual.
float pair_product(float sum, float a_low, float a_high, float b_low, float b_high) {
  return flushed_fma(a_low, b_low, flushed_fma(a_high, b_high, sum));
}

std::vector<float> numbers(index_t count, std::uint64_t seed) {
  test::Random random(seed);
  std::vector<float> values(at(count));
  for (float& x : values) x = random.normal();
  return values;
}

// Rows of storage in a buffer of exactly their size, so that a sanitizer sees a read beyond.
struct Rows {
  std::unique_ptr<std::byte[]> bytes;
  Segment all;
  Segment part(index_t first, index_t count) const { return {all.data + first * all.stride, all.stride, count, 0}; }
};
Rows stored(const void* from, index_t stride, index_t count) {
  Rows rows{std::make_unique<std::byte[]>(at(stride * count)), {}};
  std::memcpy(rows.bytes.get(), from, at(stride * count));
  rows.all = {rows.bytes.get(), stride, count, 0};
  return rows;
}
Rows stored_floats(const std::vector<float>& x, index_t dim, index_t count) { return stored(x.data(), 4 * dim, count); }
Rows stored_bf16(const std::vector<float>& x, index_t dim, index_t count) {
  std::vector<std::uint16_t> bits;
  for (const float v : x) bits.push_back(rounded(v));
  return stored(bits.data(), 2 * dim, count);
}

struct FloatRows {
  static constexpr bool kRowScaled = false;
  static constexpr index_t offset(index_t d) { return 4 * d; }
  f32 load(const std::byte* row, index_t d, index_t) const { return fovea::load(reinterpret_cast<const float*>(row) + d); }
  f32 load_some(const std::byte* row, index_t d, index_t count, index_t) const {
    return fovea::load_some(reinterpret_cast<const float*>(row) + d, count);
  }
  float scale(const std::byte*, index_t) const { return 1.f; }
};
// A row of floats with its scale behind it.
struct ScaledRows : FloatRows {
  static constexpr bool kRowScaled = true;
  float scale(const std::byte* row, index_t dim) const {
    float s;
    std::memcpy(&s, row + 4 * dim, sizeof s);
    return s;
  }
};

template <class T>
std::vector<T> filled(index_t count, T value) {
  return std::vector<T>(at(count), value);
}
std::vector<bf16> poisoned_pairs(index_t count) { return filled(count, bf16{0x7fc1}); }

// One tile: queries, keys and values that are bf16 numbers, packed.
struct Packed {
  index_t dim, keys, panel_stride;
  std::vector<float> q, k, v;
  std::vector<bf16> q_panel, k_panels, v_panels;

  Packed(index_t dim_, index_t keys_, std::uint64_t seed)
      : dim(dim_),
        keys(keys_),
        panel_stride((keys_ + kPanel) / kPanel * kPanel * kPanel),
        q(numbers(kTileRows * dim, seed)),
        k(numbers(keys * dim, seed + 1)),
        v(numbers(keys * dim, seed + 2)),
        q_panel(poisoned_pairs(DotBf16Panels::query_size(dim))),
        k_panels(poisoned_pairs(DotBf16Panels::key_size(dim, panel_stride / kPanel))),
        v_panels(poisoned_pairs(DotBf16Panels::value_size(dim, panel_stride / kPanel))) {
    const Rows key_rows = stored_floats(k, dim, keys), value_rows = stored_floats(v, dim, keys);
    DotBf16Panels::pack_keys(FloatRows{}, key_rows.all, dim, 0, k_panels.data());
    CHECK(DotBf16Panels::pack_values(FloatRows{}, value_rows.all, dim, 0, v_panels.data(), panel_stride));
    pack_queries(kTileRows);
  }
  void pack_queries(index_t rows) {
    const float* from[kTileRows] = {};
    for (index_t r = 0; r < rows; ++r) from[r] = q.data() + r * dim;
    DotBf16Panels::pack_queries(from, rows, 1, dim, 0.f, q_panel.data());
  }
  std::vector<float> scores(index_t rows, index_t begin, index_t end, float scale) const {
    std::vector<float> s = filled(kTileRows * kScoreStride, kNan);
    DotBf16Panels::scores(rows, begin, end, q_panel.data(), k_panels.data(), dim, scale, s.data());
    return s;
  }
};

const float kScale = 0.3f;

void check_scores(const Packed& tile, const std::vector<float>& s, index_t rows, index_t begin, index_t end) {
  index_t wrong_bits = 0;
  double worst = 0;   // of the bound
  for (index_t r = 0; r < rows; ++r) {
    for (index_t j = begin; j < end; ++j) {
      const float* const q = tile.q.data() + r * tile.dim;
      const float* const k = tile.k.data() + j * tile.dim;
      double exact = 0, size = 0;
      float chain = 0;
      for (index_t d = 0; d < tile.dim; d += 2) {
        const bool odd_end = d + 1 == tile.dim;
        const float q_low = as_bf16(q[d]), q_high = odd_end ? 0.f : as_bf16(q[d + 1]);
        const float k_low = as_bf16(k[d]), k_high = odd_end ? 0.f : as_bf16(k[d + 1]);
        const double low = static_cast<double>(q_low) * static_cast<double>(k_low);
        const double high = static_cast<double>(q_high) * static_cast<double>(k_high);
        exact += low + high;
        size += std::abs(low) + std::abs(high);
        chain = pair_product(chain, q_low, q_high, k_low, k_high);
      }
      const float got = s[at(r * kScoreStride + j)];
      wrong_bits += !same_bits(got, chain * kScale);
      // Two FMAs per pair, each rounded (relative to what is summed so far) or flushed, and the scale's rounding.
      const double steps = static_cast<double>((tile.dim + 1) / 2 * 2), scale = static_cast<double>(kScale);
      const double bound = scale * ((steps + 1) * 1.01 * kRounding * size + steps * kFlushed);
      worst = std::max(worst, std::abs(static_cast<double>(got) - scale * exact) / bound);
    }
  }
  CHECK(wrong_bits == 0);
  CHECK(worst <= 1.);
}

std::vector<index_t> all_dims() {
  std::vector<index_t> dims;
  for (index_t dim = 1; dim <= 40; ++dim) dims.push_back(dim);
  dims.insert(dims.end(), {64, 128, 576});
  return dims;
}

}   // namespace

TEST_CASE("a pair product is two rounded FMAs, the high halves first, and has no denormals") {
  CHECK(kHasBf16Dot);
  test::Random random(11);
  const auto number = [&](int lowest, int exponents) {
    return static_cast<std::uint16_t>(random.below(2) << 15 | (lowest + random.below(exponents)) << 7 | random.below(128));
  };
  index_t wrong = 0, flushes = 0;
  for (int round = 0; round < 20000; ++round) {
    // Sizes near 1; products around the smallest normal number; denormal factors and sums.
    const int kind = round % 3;
    std::uint16_t a[2], b[2];
    for (int half = 0; half < 2; ++half) {
      a[half] = kind == 0 ? number(120, 10) : kind == 1 ? number(44, 40) : number(0, 20);
      b[half] = kind == 0 ? number(120, 10) : kind == 1 ? number(44, 40) : number(124, 6);
    }
    const std::uint32_t exponent = kind == 0 ? 127 : static_cast<std::uint32_t>(random.below(kind == 1 ? 30 : 3));
    const float sum = std::bit_cast<float>(exponent << 23 | static_cast<std::uint32_t>(random.below(1 << 23)));
    const i32 pairs_a = broadcast_pair(a), pairs_b = broadcast_pair(b);
    float got[kLanes];
    store(got, dot_pairs(pairs_a, pairs_b, f32(sum)));
    const float expected = pair_product(sum, widened(a[0]), widened(a[1]), widened(b[0]), widened(b[1]));
    wrong += !same_bits(got[0], expected) || !same_bits(got[kLanes - 1], expected);
    const double kept = static_cast<double>(widened(a[0])) * static_cast<double>(widened(b[0])) +
                        static_cast<double>(widened(a[1])) * static_cast<double>(widened(b[1])) + static_cast<double>(sum);
    flushes += expected == 0.f && kept != 0.;
  }
  CHECK(wrong == 0);
  CHECK(flushes > 100);
}

TEST_CASE("rounding to pairs: nearest even, infinities beyond the range, NaN stays NaN") {
  test::Random random(12);
  index_t wrong = 0;
  for (int round = 0; round < 20000; ++round) {
    float x[kPairNumbers];
    for (float& value : x) {
      std::uint32_t bits = static_cast<std::uint32_t>(random.bits());
      if (random.one_in(4)) bits = (bits & 0xffff0000u) | 0x8000u;   // a tie
      value = std::bit_cast<float>(bits);
    }
    std::uint16_t got[kPairNumbers];
    store_pairs(got, round_to_pairs(load(x), load(x + kLanes)));
    for (index_t i = 0; i < kPairNumbers; ++i) wrong += got[i] != rounded(x[i]);
  }
  CHECK(wrong == 0);
  const float edges[kPairNumbers] = {std::numeric_limits<float>::max(), -kInf, 0x1.fefffep127f, 0x1.fep127f, -0.f};
  std::uint16_t got[kPairNumbers];
  store_pairs(got, round_to_pairs(load(edges), load(edges + kLanes)));
  CHECK(got[0] == 0x7f80);
  CHECK(got[1] == 0xff80);
  CHECK(got[2] == 0x7f7f);
  CHECK(got[3] == 0x7f7f);
  CHECK(got[4] == 0x8000);
}

TEST_CASE("bf16 scores: every row count, dim and panel edge, against double and the chain's own bits") {
  const std::vector<index_t> counts = {1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65};
  for (const index_t dim : all_dims()) {
    const index_t widest = dim > 128 ? 33 : 65;
    Packed tile(dim, widest, static_cast<std::uint64_t>(100 + dim));
    INFO("dim " << dim);
    const std::vector<float> full = tile.scores(kTileRows, 0, widest, kScale);
    check_scores(tile, full, kTileRows, 0, widest);
    const auto compare = [&](index_t rows, index_t begin, index_t end) {
      const std::vector<float> part = tile.scores(rows, begin, end, kScale);
      index_t wrong = 0;
      for (index_t r = 0; r < rows; ++r)
        wrong += std::memcmp(part.data() + r * kScoreStride + begin, full.data() + r * kScoreStride + begin,
                             at(end - begin) * sizeof(float)) != 0;
      return wrong;
    };
    for (index_t rows = 1; rows <= kTileRows; ++rows) {
      tile.pack_queries(rows);
      index_t wrong = 0;
      for (const index_t end : counts) {
        if (end <= widest) wrong += compare(rows, 0, end) + compare(rows, end / 2, end) + compare(rows, end - 1, end);
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("bf16 panels of few keys: the columns beside them hold NaN and reach nothing") {
  for (const index_t dim : {1, 2, 31, 33, 128}) {
    for (index_t keys = 1; keys <= 2 * kPanel + 1; ++keys) {
      const Packed tile(dim, keys, static_cast<std::uint64_t>(1000 * dim + keys));
      check_scores(tile, tile.scores(3, 0, keys, kScale), 3, 0, keys);
    }
  }
}

TEST_CASE("bf16 weights: every row count, dim and key range, against double and the chain's own bits") {
  for (const index_t dim : all_dims()) {
    const index_t keys = dim > 128 ? 33 : 67, acc_stride = (dim + kLanes - 1) / kLanes * kLanes;
    Packed tile(dim, keys, static_cast<std::uint64_t>(200 + dim));
    test::Random random(static_cast<std::uint64_t>(300 + dim));
    INFO("dim " << dim);
    std::vector<float> weights(at(kTileRows * kScoreStride));
    for (float& p : weights) p = random.one_in(5) ? 0.f : random.uniform(0.f, 1.f);
    const std::vector<float> start = numbers(kTileRows * acc_stride, 9);
    std::vector<float> rescale(at(kTileRows));
    for (float& x : rescale) x = random.uniform(0.f, 1.f);

    for (index_t rows = 1; rows <= kTileRows; ++rows) {
      for (int round = 0; round < 6; ++round) {
        index_t begin = round == 0 ? 0 : random.below(keys), end = round == 0 ? keys : random.between(begin + 1, keys);
        if (round == 1) begin = end - 1;
        // Whatever does not belong to the range is NaN: weights, and values of keys that are in the panels for others.
        std::vector<float> p = filled(kTileRows * kScoreStride, kNan), v = tile.v;
        for (index_t r = 0; r < kTileRows; ++r)
          for (index_t j = begin; j < end; ++j) p[at(r * kScoreStride + j)] = weights[at(r * kScoreStride + j)];
        for (index_t j = 0; j < keys; ++j)
          for (index_t d = 0; d < dim && (j < begin || j >= end); ++d) v[at(j * dim + d)] = j % 3 == 0 ? kInf : kNan;
        std::vector<bf16> panels = poisoned_pairs(DotBf16Panels::value_size(dim, tile.panel_stride / kPanel));
        const Rows stored_values = stored_floats(v, dim, keys);
        const index_t packed_from = round % 2 == 0 ? 0 : begin;   // nothing at all was packed before an odd first key
        CHECK(DotBf16Panels::pack_values(FloatRows{}, stored_values.part(packed_from, keys - packed_from), dim, packed_from,
                                         panels.data(), tile.panel_stride) == (packed_from == begin && end == keys));
        std::vector<float> acc = start;
        DotBf16Panels::weigh(rows, begin, end, p.data(), panels.data(), tile.panel_stride, dim, rescale.data(), acc.data(),
                             acc_stride);
        index_t wrong_bits = 0;
        double worst = 0;
        for (index_t r = 0; r < rows; ++r) {
          for (index_t d = 0; d < dim; ++d) {
            const float first = start[at(r * acc_stride + d)] * rescale[at(r)];
            double exact = static_cast<double>(start[at(r * acc_stride + d)]) * static_cast<double>(rescale[at(r)]);
            double size = std::abs(exact);
            float chain = first;
            const auto weight = [&](index_t j) {
              return j < begin || j >= end ? 0.f : as_bf16(weights[at(r * kScoreStride + j)]);
            };
            const auto value = [&](index_t j) { return j < begin || j >= end ? 0.f : as_bf16(tile.v[at(j * dim + d)]); };
            for (index_t j = begin / 2 * 2; j < end; j += 2) {
              chain = pair_product(chain, weight(j), weight(j + 1), value(j), value(j + 1));
              for (const index_t key : {j, j + 1}) {
                const double term = static_cast<double>(weight(key)) * static_cast<double>(value(key));
                exact += term;
                size += std::abs(term);
              }
            }
            const float got = acc[at(r * acc_stride + d)];
            wrong_bits += !same_bits(got, chain + 0.f);
            const double steps = static_cast<double>(end - begin + 2);
            const double bound = (steps + 1) * 1.01 * kRounding * size + steps * kFlushed;
            worst = std::max(worst, std::abs(static_cast<double>(got) - exact) / bound);
          }
        }
        CHECK(wrong_bits == 0);
        CHECK(worst <= 1.);
      }
    }
  }
}

TEST_CASE("bf16 panels have the same bits from one segment or many, from fp32 or bf16, and a row's scale is in them") {
  test::Random random(21);
  for (const index_t dim : {1, 5, 31, 32, 33, 63, 64, 65, 70, 128}) {
    const index_t keys = 2 * kPanel + 5, stride = 3 * kPanel * kPanel;
    const std::vector<float> x = numbers(keys * dim, static_cast<std::uint64_t>(dim));
    std::vector<float> half, scaled;
    for (index_t j = 0; j < keys; ++j) {
      for (index_t d = 0; d < dim; ++d) {
        half.push_back(x[at(j * dim + d)] * 0.5f);
        scaled.push_back(x[at(j * dim + d)]);
      }
      scaled.push_back(0.5f);
    }
    const Rows floats = stored_floats(half, dim, keys), halves = stored_bf16(half, dim, keys),
               codes = stored(scaled.data(), 4 * (dim + 1), keys);
    for (const index_t first : {0, 1, 2, 15, 17}) {
      const auto pack = [&](const auto& codec, const Rows& rows, bool cut) {
        std::vector<bf16> panels = poisoned_pairs(DotBf16Panels::key_size(dim, 3 * kPanel));
        const index_t key_elements = static_cast<index_t>(panels.size());
        panels.resize(panels.size() + at(DotBf16Panels::value_size(dim, 3 * kPanel)), bf16{0x7fc1});
        for (index_t key = 0; key < keys;) {
          const index_t count = cut ? std::min(random.between(1, random.pick({1, 2, 9, 40})), keys - key) : keys;
          DotBf16Panels::pack_keys(codec, rows.part(key, count), dim, first + key, panels.data());
          CHECK(DotBf16Panels::pack_values(codec, rows.part(key, count), dim, first + key, panels.data() + key_elements,
                                           stride));
          key += count;
        }
        return panels;
      };
      const std::vector<bf16> whole = pack(FloatRows{}, floats, false);
      const auto equal = [&](const std::vector<bf16>& other) {
        return std::memcmp(whole.data(), other.data(), whole.size() * sizeof(bf16)) == 0;
      };
      CHECK(equal(pack(FloatRows{}, floats, true)));
      CHECK(equal(pack(Bf16Rows{}, halves, false)));
      CHECK(equal(pack(Bf16Rows{}, halves, true)));
      CHECK(equal(pack(ScaledRows{}, codes, false)));
      CHECK(equal(pack(ScaledRows{}, codes, true)));

      index_t wrong = 0;
      const index_t value_base = DotBf16Panels::key_size(dim, 3 * kPanel), even_dim = (dim + 1) / 2 * 2;
      for (index_t j = 0; j < keys; ++j) {
        const index_t column = first + j;
        for (index_t d = 0; d < even_dim; ++d) {
          const std::uint16_t expected = d < dim ? rounded(half[at(j * dim + d)]) : std::uint16_t{0};
          wrong += whole[at(column / kPanel * even_dim * kPanel + d / 2 * 2 * kPanel + column % kPanel * 2 + d % 2)].bits !=
                   expected;
        }
        for (index_t d = 0; d < (dim + kPanel - 1) / kPanel * kPanel; ++d) {
          const std::uint16_t expected = d < dim ? rounded(half[at(j * dim + d)]) : std::uint16_t{0};
          wrong +=
              whole[at(value_base + d / kPanel * stride + column / 2 * 2 * kPanel + d % kPanel * 2 + column % 2)].bits !=
              expected;
        }
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("bf16 queries: strided rows, spare rows and the last odd number are zeros, nothing is written behind") {
  for (const index_t dim : {1, 2, 15, 16, 17, 31, 32, 33, 47, 64, 65, 577}) {
    for (const index_t element_stride : {1, 3}) {
      const std::vector<float> q = numbers(kTileRows * dim * element_stride, 31);
      for (const index_t rows : {index_t{1}, index_t{5}, kTileRows}) {
        const float* from[kTileRows] = {};
        for (index_t r = 0; r < rows; ++r) from[r] = q.data() + r * dim * element_stride;
        const index_t size = DotBf16Panels::query_size(dim);
        std::vector<bf16> panel = poisoned_pairs(size + 8);
        DotBf16Panels::pack_queries(from, rows, element_stride, dim, kNan, panel.data());
        index_t wrong = 0;
        for (index_t d = 0; d < (dim + 1) / 2 * 2; ++d) {
          for (index_t r = 0; r < kTileRows; ++r) {
            const std::uint16_t expected =
                r < rows && d < dim ? rounded(q[at((r * dim + d) * element_stride)]) : std::uint16_t{0};
            wrong += panel[at(d / 2 * 2 * kTileRows + 2 * r + d % 2)].bits != expected;
          }
        }
        for (index_t i = size; i < size + 8; ++i) wrong += panel[at(i)].bits != 0x7fc1;
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE("a value that is not finite as bf16 is noticed while packing") {
  const index_t dim = 37, keys = 9;
  std::vector<bf16> to = poisoned_pairs(DotBf16Panels::value_size(dim, kPanel));
  for (const float bad : {kNan, kInf, -kInf, std::numeric_limits<float>::max()}) {   // the last is rounded to infinity
    for (const index_t where : {index_t{0}, dim - 1, 3 * dim + 16, 4 * dim + 33, keys * dim - 1}) {
      for (const index_t first : {0, 1}) {
        std::vector<float> v = numbers(keys * dim, 6);
        v[0] = 0x1.fep127f;   // the largest bf16
        const auto pack_both = [&] {
          const Rows floats = stored_floats(v, dim, keys), halves = stored_bf16(v, dim, keys);
          const bool from_floats =
              DotBf16Panels::pack_values(FloatRows{}, floats.all, dim, first, to.data(), kPanel * kPanel);
          const bool from_bf16 = DotBf16Panels::pack_values(Bf16Rows{}, halves.all, dim, first, to.data(), kPanel * kPanel);
          CHECK(from_floats == from_bf16);
          return from_floats;
        };
        CHECK(pack_both());
        v[at(where)] = bad;
        CHECK_FALSE(pack_both());
      }
    }
  }
}

#endif
