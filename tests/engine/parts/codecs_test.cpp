// SPDX-License-Identifier: Apache-2.0
// Stored rows of every format: what they decode to, what the kernels make of them, and that neither depends on where a
// segment ends. Rows are random bytes of legal numbers; what they mean is said by reference/stored.hpp.
#include "fovea/engine/parts/codecs.hpp"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/reference/stored.hpp"
#include "support/random.hpp"

using namespace fovea;

namespace {

const float kNan = std::numeric_limits<float>::quiet_NaN();
const Format kAllFormats[] = {Format::f32,         Format::f64,         Format::bf16,   Format::f16,
                              Format::i8_token,    Format::i8_channel,  Format::i4_g32, Format::i4_g64,
                              Format::i4_g32_zero, Format::i4_g64_zero, Format::e4m3,   Format::e5m2,
                              Format::latent_fp8};

KeyKernels key_kernels_for(Format format) { return key_kernels<F32Panels>(format, AllFormats{}); }
ValueKernels value_kernels_for(Format format) { return value_kernels<F32Panels>(format, AllFormats{}); }

template <class F, Format... List>
void with_codec(Format format, const F& call, Formats<List...>) {
  ((format == List ? call(CodecOf<List>{}) : void()), ...);
}
template <class F>
void with_codec(Format format, const F& call) {
  with_codec(format, call, AllFormats{});
}

template <class T>
void put(std::byte* at, T value) {
  std::memcpy(at, &value, sizeof value);
}

std::uint16_t half_in(test::Random& random, float low, float high) {
  // An f16 of the wanted range by search among random patterns: no conversion to trust.
  for (;;) {
    const auto bits = static_cast<std::uint16_t>(random.bits());
    const double value = reference::stored_float(bits, 5, 10, true);
    if (value >= static_cast<double>(low) && value <= static_cast<double>(high)) return bits;
  }
}

std::uint16_t bf16_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<std::uint16_t>(bits >> 16);
}

// An e4m3 or e5m2 pattern that is a number; one in eight is a zero or a denormal.
std::uint8_t fp8_number(test::Random& random, int fraction_bits) {
  for (;;) {
    const auto bits = static_cast<std::uint8_t>(random.bits());
    const bool e4m3 = fraction_bits == 3;
    if (random.one_in(8)) return static_cast<std::uint8_t>(bits & (e4m3 ? 0x87 : 0x83));
    if (std::isfinite(reference::stored_float(bits, 7 - fraction_bits, fraction_bits, !e4m3))) return bits;
  }
}

// Numbers of moderate size, finite, in every format.
void fill_row(Format format, index_t dim, test::Random& random, std::byte* row) {
  switch (format) {
    case Format::f32:
      for (index_t d = 0; d < dim; ++d) put(row + 4 * d, random.normal());
      return;
    case Format::f64:
      for (index_t d = 0; d < dim; ++d) put(row + 8 * d, random.uniform() - 0.5);
      return;
    case Format::bf16:
      for (index_t d = 0; d < dim; ++d) put(row + 2 * d, bf16_of(random.normal()));
      return;
    case Format::f16:
      for (index_t d = 0; d < dim; ++d) put(row + 2 * d, half_in(random, -4.f, 4.f));
      return;
    case Format::i8_token:
    case Format::i8_channel:
      for (index_t d = 0; d < dim; ++d) put(row + d, static_cast<std::uint8_t>(random.bits()));
      if (format == Format::i8_token) put(row + dim, random.uniform(0.001f, 0.1f));
      return;
    case Format::e4m3:
    case Format::e5m2:
      for (index_t d = 0; d < dim; ++d) put(row + d, fp8_number(random, format == Format::e4m3 ? 3 : 2));
      put(row + dim, random.uniform(0.001f, 0.1f));
      return;
    case Format::latent_fp8:
      for (index_t d = 0; d < 512; ++d) put(row + d, fp8_number(random, 3));
      for (index_t g = 0; g < 4; ++g) put(row + 512 + 4 * g, random.uniform(0.001f, 0.1f));
      for (index_t d = 0; d < 64; ++d) put(row + 528 + 2 * d, bf16_of(random.normal()));
      return;
    default: {
      const index_t group = i4_group(format), groups = (dim + group - 1) / group;
      const bool zero = format == Format::i4_g32_zero || format == Format::i4_g64_zero;
      std::byte* at = row;
      for (index_t i = 0; i < groups * group / 2; ++i) put(at++, static_cast<std::uint8_t>(random.bits()));
      for (index_t g = 0; g < groups; ++g) {
        put(at, half_in(random, 0.01f, 0.5f));
        at += 2;
        if (zero) {
          put(at, half_in(random, -4.f, 4.f));
          at += 2;
        }
      }
    }
  }
}

struct Rows {
  Format format;
  index_t dim, count, stride;
  std::vector<std::byte> bytes;   // ends with the last row's last byte

  Rows(Format format_, index_t dim_, index_t count_, std::uint64_t seed, index_t gap = 0)
      : format(format_),
        dim(dim_),
        count(count_),
        stride(row_bytes(format_, dim_) + gap),
        bytes(static_cast<std::size_t>((count_ - 1) * stride + row_bytes(format_, dim_)), std::byte{0xff}) {
    test::Random random(seed);
    for (index_t j = 0; j < count; ++j) fill_row(format, dim, random, bytes.data() + j * stride);
  }
  const std::byte* row(index_t j) const { return bytes.data() + j * stride; }
  Segment segment(index_t first, index_t end) const { return {row(first), stride, end - first, 4096}; }
  double value(index_t j, index_t d) const {
    static const std::vector<float> ones(1024, 1.f);
    return reference::stored_value(format, row(j), dim, d, ones.data());
  }
};

std::vector<index_t> dims_of(Format format) {
  if (format == Format::latent_fp8) return {512, 576};
  std::vector<index_t> dims;
  for (index_t dim = 1; dim <= 70; ++dim) dims.push_back(dim);
  for (const index_t dim : {96, 128, 131, 192, 256}) dims.push_back(dim);
  return dims;
}
std::vector<index_t> some_dims_of(Format format) {
  if (format == Format::latent_fp8) return {512, 576};
  return {1, 16, 37, 64, 80, 128, 230};
}

index_t whole_vectors(index_t dim) { return (dim + kLanes - 1) / kLanes * kLanes; }

constexpr double kUnit = 0x1p-24;
constexpr int kRoundings = kFusedFma ? 1 : 2;   // of a product and a sum

}   // namespace

TEST_CASE("a stored row decodes to what it stands for, and nothing behind it is read") {
  for (const Format format : kAllFormats) {
    for (const index_t dim : dims_of(format)) {
      const Rows rows(format, dim, 2, static_cast<std::uint64_t>(dim));
      for (index_t j = 0; j < 2; ++j) {
        // A row of its own, exactly as long as it is, and one with 0xff behind it: the same numbers.
        const std::vector<std::byte> alone(rows.row(j), rows.row(j) + row_bytes(format, dim));
        std::vector<std::byte> poisoned = alone;
        poisoned.resize(alone.size() + 64, std::byte{0xff});
        with_codec(format, [&](const auto& codec) {
          index_t wrong = 0;
          for (index_t d = 0; d < dim; d += kLanes) {
            const index_t count = std::min(kLanes, dim - d);
            float lanes[kLanes], again[kLanes];
            store(lanes, count == kLanes ? codec.load(alone.data(), d, dim) : codec.load_some(alone.data(), d, count, dim));
            store(again, codec.load_some(poisoned.data(), d, count, dim));
            const double scale = codec.kRowScaled ? static_cast<double>(codec.scale(alone.data(), dim)) : 1.;
            for (index_t i = 0; i < kLanes; ++i) {
              const double exact = i < count ? rows.value(j, d + i) : 0.;
              // A row's own scale stays outside, so its product is exact; other values are rounded once.
              const bool right =
                  codec.kRowScaled ? static_cast<double>(lanes[i]) * scale == exact : lanes[i] == static_cast<float>(exact);
              wrong += !right || lanes[i] != again[i];
            }
          }
          INFO(name_of(format) << " dim " << dim);
          CHECK(wrong == 0);
        });
      }
    }
  }
}

TEST_CASE("vectors decoded together are the vectors decoded one by one") {
  index_t compared = 0;
  for (const Format format : kAllFormats) {
    with_codec(format, [&](const auto& codec) {
      const index_t dim = format == Format::latent_fp8 ? 512 : 256;
      const Rows rows(format, dim, 8, 3);
      index_t wrong = 0;
      const auto check = [&]<int Vectors>(std::integral_constant<int, Vectors>) {
        for (index_t j = 0; j < rows.count; ++j) {
          for (index_t d = 0; d + Vectors * kLanes <= dim; d += Vectors * kLanes) {
            f32 together[Vectors];
            load_vectors(codec, rows.row(j), d, dim, together);
            for (int n = 0; n < Vectors; ++n) {
              float a[kLanes], b[kLanes];
              store(a, together[n]);
              store(b, codec.load(rows.row(j), d + n * kLanes, dim));
              wrong += std::memcmp(a, b, sizeof a) != 0;
              ++compared;
            }
          }
        }
      };
      check(std::integral_constant<int, 1>{});
      check(std::integral_constant<int, 2>{});
      check(std::integral_constant<int, 4>{});
      check(std::integral_constant<int, 8>{});
      INFO(name_of(format));
      CHECK(wrong == 0);
    });
  }
  CHECK(compared >= 13 * 8 * 4 * 16);
}

TEST_CASE("scores and weighted sums of stored rows: near a double sum, the same bits however the keys are cut") {
  for (const Format format : kAllFormats) {
    const KeyKernels keys_of = key_kernels_for(format);
    const ValueKernels values_of = value_kernels_for(format);
    for (const index_t dim : some_dims_of(format)) {
      const index_t rows = 7, count = 45, padded_dim = whole_vectors(dim);
      const Rows stored(format, dim, count, 11, 8);
      test::Random random(12);
      std::vector<float> q(static_cast<std::size_t>(rows * padded_dim), 0.f);
      for (index_t r = 0; r < rows; ++r) {
        for (index_t d = 0; d < dim; ++d) q[static_cast<std::size_t>(r * padded_dim + d)] = random.normal();
      }
      std::vector<float> scores(static_cast<std::size_t>(rows * kScoreStride), kNan), weights(scores.size(), kNan);
      keys_of.scores(rows, q.data(), padded_dim, stored.segment(0, count), dim, scores.data());
      INFO(name_of(format) << " dim " << dim);
      index_t wrong = 0;
      for (index_t r = 0; r < rows; ++r) {
        for (index_t j = 0; j < count; ++j) {
          double exact = 0, size = 0;
          for (index_t d = 0; d < dim; ++d) {
            const double term = static_cast<double>(q[static_cast<std::size_t>(r * padded_dim + d)]) * stored.value(j, d);
            exact += term;
            size += std::abs(term);
          }
          // One chain per lane, a tree over the lanes, the value's own rounding, the row's scale.
          const double roundings =
              static_cast<double>(kRoundings * (padded_dim / kLanes)) + std::log2(static_cast<double>(kLanes)) + 2;
          const double got = static_cast<double>(scores[static_cast<std::size_t>(r * kScoreStride + j)]);
          wrong += !(std::abs(got - exact) <= 1.001 * roundings * kUnit * size);
          weights[static_cast<std::size_t>(r * kScoreStride + j)] = random.uniform(0.f, 1.f);
        }
      }
      CHECK(wrong == 0);

      std::vector<float> start(static_cast<std::size_t>(rows * padded_dim), 0.f), rescale;
      for (index_t r = 0; r < rows; ++r) {
        rescale.push_back(random.uniform(0.5f, 1.f));
        for (index_t d = 0; d < dim; ++d) start[static_cast<std::size_t>(r * padded_dim + d)] = random.normal();
      }
      std::vector<float> acc = start;
      if (values_of.weigh != nullptr) {
        values_of.weigh(rows, weights.data(), stored.segment(0, count), dim, rescale.data(), acc.data(), padded_dim);
        for (index_t r = 0; r < rows; ++r) {
          for (index_t d = 0; d < dim; ++d) {
            const auto at = static_cast<std::size_t>(r * padded_dim + d);
            double exact = static_cast<double>(start[at]) * static_cast<double>(rescale[static_cast<std::size_t>(r)]);
            double size = std::abs(exact);
            for (index_t j = 0; j < count; ++j) {
              const double term =
                  static_cast<double>(weights[static_cast<std::size_t>(r * kScoreStride + j)]) * stored.value(j, d);
              exact += term;
              size += std::abs(term);
            }
            // One chain over the keys; the rescaled start; the value's own rounding or the scaled weight's.
            const double roundings = static_cast<double>(kRoundings * count) + 2;
            wrong += !(std::abs(static_cast<double>(acc[at]) - exact) <= 1.001 * roundings * kUnit * size);
          }
        }
        CHECK(wrong == 0);
      } else {
        CHECK(format == Format::i8_channel);
      }

      // Cut into 1 to 9 keys each, and into 1 to 3 rows: all came four and three at a time.
      for (const index_t whole : {index_t{0}, index_t{1}, index_t{4}, index_t{9}}) {
        std::vector<float> cut_scores(scores.size(), kNan), cut_acc = start;
        const index_t most = whole == 0 ? 2 : whole == 9 ? 1 : 3;
        for (index_t r = 0; r < rows; r += most) {
          const index_t beside = std::min(most, rows - r);
          for (index_t first = 0, n = 0; first < count; ++n) {
            const index_t here = std::min(whole == 0 ? n % 9 + 1 : whole, count - first);
            keys_of.scores(beside, q.data() + r * padded_dim, padded_dim, stored.segment(first, first + here), dim,
                           cut_scores.data() + r * kScoreStride + first);
            if (values_of.weigh != nullptr) {
              const float keep[3] = {1.f, 1.f, 1.f};
              values_of.weigh(beside, weights.data() + r * kScoreStride + first, stored.segment(first, first + here), dim,
                              first == 0 ? rescale.data() + r : keep, cut_acc.data() + r * padded_dim, padded_dim);
            }
            first += here;
          }
          for (index_t row = r; row < r + beside; ++row) {
            wrong += std::memcmp(cut_scores.data() + row * kScoreStride, scores.data() + row * kScoreStride,
                                 static_cast<std::size_t>(count) * sizeof(float)) != 0;
          }
        }
        if (values_of.weigh != nullptr) wrong += std::memcmp(cut_acc.data(), acc.data(), acc.size() * sizeof(float)) != 0;
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("packed panels hold the values of stored rows") {
  for (const Format format : kAllFormats) {
    const KeyKernels keys_of = key_kernels_for(format);
    const ValueKernels values_of = value_kernels_for(format);
    for (const index_t dim : some_dims_of(format)) {
      const index_t count = 2 * kPanel - 3, first = 2;
      const Rows stored(format, dim, count, 21, 16);
      std::vector<float> keys(static_cast<std::size_t>(F32Panels::key_size(dim, 2 * kPanel)), kNan);
      keys_of.pack(stored.segment(0, 7), dim, first, keys.data());
      keys_of.pack(stored.segment(7, count), dim, first + 7, keys.data());
      index_t wrong = 0;
      for (index_t j = 0; j < count; ++j) {
        for (index_t d = 0; d < dim; ++d) {
          const index_t column = first + j;
          const float got = keys[static_cast<std::size_t>(column / kPanel * dim * kPanel + d * kPanel + column % kPanel)];
          wrong += got != static_cast<float>(stored.value(j, d));
        }
      }
      INFO(name_of(format) << " dim " << dim);
      CHECK(wrong == 0);
      if (values_of.pack == nullptr) continue;
      const index_t panel_stride = count * kPanel;
      std::vector<float> values(static_cast<std::size_t>(F32Panels::value_size(dim, count)), kNan);
      CHECK(values_of.pack(stored.segment(0, 5), dim, 0, values.data(), panel_stride));
      CHECK(values_of.pack(stored.segment(5, count), dim, 5, values.data(), panel_stride));
      for (index_t j = 0; j < count; ++j) {
        for (index_t d = 0; d < (dim + kPanel - 1) / kPanel * kPanel; ++d) {
          const float got = values[static_cast<std::size_t>(d / kPanel * panel_stride + j * kPanel + d % kPanel)];
          wrong += got != (d < dim ? static_cast<float>(stored.value(j, d)) : 0.f);
        }
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("a value or a scale that is not finite is noticed") {
  struct Spoiled {
    Format format;
    index_t at;
    std::vector<std::uint8_t> bytes;
  };
  const index_t dim = 96;
  const std::vector<std::uint8_t> nan32 = {0, 0, 0xc0, 0x7f}, inf32 = {0, 0, 0x80, 0xff}, nan16 = {0, 0x7e},
                                  inf16 = {0, 0xfc};
  const Spoiled cases[] = {
      {Format::f32, 4 * 95, nan32},
      {Format::f32, 0, inf32},
      {Format::f64, 8 * 40 + 4, {0, 0, 0xf0, 0x7f}},
      {Format::bf16, 2 * 17, {0xc0, 0x7f}},
      {Format::bf16, 2 * 95, {0x80, 0xff}},
      {Format::f16, 2 * 64, nan16},
      {Format::f16, 0, inf16},
      {Format::i8_token, dim, nan32},
      {Format::i8_token, dim, inf32},
      {Format::i4_g32, 48, nan16},
      {Format::i4_g64, 64 + 2, inf16},
      {Format::i4_g32_zero, 48 + 6, nan16},
      {Format::i4_g64_zero, 64, inf16},
      {Format::e4m3, 33, {0x7f}},
      {Format::e4m3, 95, {0xff}},
      {Format::e4m3, dim, nan32},
      {Format::e5m2, 5, {0x7c}},
      {Format::e5m2, 80, {0xfe}},
      {Format::e5m2, dim, inf32},
      {Format::latent_fp8, 511, {0x7f}},
      {Format::latent_fp8, 520, nan32},
      {Format::latent_fp8, 528 + 126, {0xc0, 0x7f}},
  };
  for (const Spoiled& spoiled : cases) {
    const index_t own_dim = spoiled.format == Format::latent_fp8 ? 576 : dim, count = 9;
    const ValueKernels kernels = value_kernels_for(spoiled.format);
    Rows rows(spoiled.format, own_dim, count, 31);
    std::vector<float> to(static_cast<std::size_t>(F32Panels::value_size(own_dim, count)));
    CHECK(kernels.finite(rows.segment(0, count), own_dim));
    CHECK(kernels.pack(rows.segment(0, count), own_dim, 0, to.data(), count * kPanel));
    std::memcpy(rows.bytes.data() + 8 * rows.stride + spoiled.at, spoiled.bytes.data(), spoiled.bytes.size());
    INFO(name_of(spoiled.format) << " at " << spoiled.at);
    CHECK_FALSE(kernels.finite(rows.segment(0, count), own_dim));
    CHECK_FALSE(kernels.pack(rows.segment(0, count), own_dim, 0, to.data(), count * kPanel));
    CHECK(kernels.finite(rows.segment(0, count - 1), own_dim));
  }
}

TEST_CASE("NaN in a stored row reaches its score and its column, and no other") {
  for (const Format format : {Format::e4m3, Format::e5m2, Format::bf16, Format::f16}) {
    const index_t dim = 128, count = 9, bad_key = 5, bad_d = 77;
    Rows rows(format, dim, count, 41);
    const bool wide = format == Format::bf16 || format == Format::f16;
    const std::uint16_t pattern = format == Format::bf16 ? 0x7fc0 : format == Format::f16 ? 0x7e00 : 0x7f;
    std::memcpy(rows.bytes.data() + bad_key * rows.stride + (wide ? 2 : 1) * bad_d, &pattern, wide ? 2 : 1);
    const std::vector<float> q(static_cast<std::size_t>(dim), 0.5f), p(static_cast<std::size_t>(kScoreStride), 0.25f);
    std::vector<float> scores(static_cast<std::size_t>(kScoreStride)), acc(static_cast<std::size_t>(dim), 1.f);
    const float rescale = 1.f;
    key_kernels_for(format).scores(1, q.data(), dim, rows.segment(0, count), dim, scores.data());
    value_kernels_for(format).weigh(1, p.data(), rows.segment(0, count), dim, &rescale, acc.data(), dim);
    INFO(name_of(format));
    for (index_t j = 0; j < count; ++j) CHECK(std::isnan(scores[static_cast<std::size_t>(j)]) == (j == bad_key));
    for (index_t d = 0; d < dim; ++d) CHECK(std::isnan(acc[static_cast<std::size_t>(d)]) == (d == bad_d));
  }
}

TEST_CASE("every format has kernels, except channel-scaled int8 as V") {
  for (const Format format : kAllFormats) {
    const KvKernels kernels{key_kernels_for(format), value_kernels_for(format)};
    CHECK(kernels.k.pack != nullptr);
    CHECK(kernels.k.scores != nullptr);
    const bool values = format != Format::i8_channel;
    CHECK((kernels.v.pack != nullptr) == values);
    CHECK((kernels.v.weigh != nullptr) == values);
    CHECK((kernels.v.finite != nullptr) == values);
  }
  CHECK(key_kernels<F32Panels>(Format::bf16, Formats<Format::f32, Format::f16>{}).scores == nullptr);
  CHECK(value_kernels<F32Panels>(Format::bf16, Formats<Format::f32, Format::f16>{}).weigh == nullptr);
}
