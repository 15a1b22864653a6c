// SPDX-License-Identifier: Apache-2.0
// The encoders against plain scalar ones written here, byte for byte, and what they promise: nothing is further than half a
// scale away, storing a decoded row again changes no byte, what is not finite stays visible.
#include "fovea/simd/quantise.hpp"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/core/view.hpp"
#include "fovea/reference/stored.hpp"
#include "support/random.hpp"

namespace {

using fovea::bf16;
using fovea::convert;
using fovea::f16;
using fovea::Format;
using fovea::fp8_e4m3;
using fovea::fp8_e5m2;
using fovea::index_t;
using fovea::reference::stored_value;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

constexpr Format kRowFormats[] = {Format::f32,         Format::f64,         Format::bf16,   Format::f16,
                                  Format::i8_token,    Format::i8_channel,  Format::i4_g32, Format::i4_g64,
                                  Format::i4_g32_zero, Format::i4_g64_zero, Format::e4m3,   Format::e5m2};

bool is_i4(Format format) { return format >= Format::i4_g32 && format <= Format::i4_g64_zero; }
bool has_zero(Format format) { return format == Format::i4_g32_zero || format == Format::i4_g64_zero; }

using Bytes = std::vector<std::byte>;

template <class T>
void put(Bytes& row, index_t at, T value) {
  std::memcpy(row.data() + at, &value, sizeof value);
}
template <class T>
T get(const Bytes& row, index_t at) {
  T value;
  std::memcpy(&value, row.data() + at, sizeof value);
  return value;
}

bool all_finite(const std::vector<float>& x) {
  return std::all_of(x.begin(), x.end(), [](float number) { return std::isfinite(number); });
}

// max|x| over the numbers that are finite.
float max_abs(const std::vector<float>& x) {
  float largest = 0;
  for (const float number : x) {
    if (std::isfinite(number)) largest = std::max(largest, std::abs(number));
  }
  return largest;
}

float cut_scale(float largest, float levels) {
  return std::max(std::bit_cast<float>(std::bit_cast<std::uint32_t>(largest / levels) & ~0xffu), FLT_MIN);
}

template <class T>
void put_plain(Bytes& row, const std::vector<float>& x) {
  for (std::size_t d = 0; d < x.size(); ++d) put(row, static_cast<index_t>(d * sizeof(T)), convert<T>(x[d]));
}

void put_i4(Bytes& row, const std::vector<float>& all, index_t group, bool with_zero) {
  const auto dim = static_cast<index_t>(all.size()), groups = (dim + group - 1) / group;
  for (index_t g = 0; g < groups; ++g) {
    const std::vector<float> x(all.begin() + g * group, all.begin() + std::min(dim, (g + 1) * group));
    const float high = *std::max_element(x.begin(), x.end()), low = *std::min_element(x.begin(), x.end());
    f16 scale{0x7e00}, zero{0};
    if (all_finite(x) && with_zero) {
      zero = convert<f16>(low);
      if (convert<float>(zero) == 0) zero.bits = 0;
      int exponent;
      (void)std::frexp(convert<float>(zero), &exponent);   // zero = [0.5, 1) * 2^exponent, 11 bits of it are stored
      const float step = zero.bits == 0 ? 0 : std::ldexp(1.f, exponent - 11);
      scale = convert<f16>(std::max({(high - convert<float>(zero)) / 15, step, 0x1p-20f}));
    } else if (all_finite(x)) {
      const float positive = high, negative = -low;
      scale = convert<f16>(std::max({std::max(positive, negative) / 8, std::min(positive, negative) / 7, 0x1p-20f}));
      if (positive > 7.5f * convert<float>(scale)) scale.bits |= 0x8000;
    }
    if (!std::isfinite(convert<float>(scale)) || !std::isfinite(convert<float>(zero))) scale.bits = 0x7e00, zero.bits = 0;
    const bool stored = scale.bits != 0x7e00;
    for (index_t i = 0; i < group; ++i) {
      int nibble = with_zero ? 0 : 8;
      if (stored && i < static_cast<index_t>(x.size())) {
        const float number = x[static_cast<std::size_t>(i)];
        const float code = std::nearbyint((number - convert<float>(zero)) / convert<float>(scale)) + (with_zero ? 0.f : 8.f);
        nibble = static_cast<int>(std::clamp(code, 0.f, 15.f));
      }
      const index_t d = g * group + i, at = d / 32 * 16 + d % 16;
      const auto old = get<std::uint8_t>(row, at);
      put(row, at, static_cast<std::uint8_t>(d % 32 < 16 ? (old & 0xf0) | nibble : (old & 0x0f) | nibble << 4));
    }
    put(row, groups * group / 2 + (with_zero ? 4 : 2) * g, scale);
    if (with_zero) put(row, groups * group / 2 + 4 * g + 2, zero);
  }
}

Bytes scalar_row(Format format, const std::vector<float>& x, const float* channel_scale) {
  const auto dim = static_cast<index_t>(x.size());
  Bytes row(static_cast<std::size_t>(fovea::row_bytes(format, dim)));
  switch (format) {
    case Format::f32:
      put_plain<float>(row, x);
      break;
    case Format::f64:
      put_plain<double>(row, x);
      break;
    case Format::bf16:
      put_plain<bf16>(row, x);
      break;
    case Format::f16:
      put_plain<f16>(row, x);
      break;
    case Format::i8_token: {
      const float scale = all_finite(x) ? cut_scale(max_abs(x), 127) : kNan;
      for (index_t d = 0; d < dim; ++d) {
        const float code = std::isnan(scale) ? 0.f : std::nearbyint(x[static_cast<std::size_t>(d)] / scale);
        put(row, d, static_cast<std::int8_t>(code));
      }
      put(row, dim, scale);
      break;
    }
    case Format::i8_channel:
      for (index_t d = 0; d < dim; ++d) {
        const float code = x[static_cast<std::size_t>(d)] / channel_scale[d];
        put(row, d, static_cast<std::int8_t>(std::isnan(code) ? 0.f : std::nearbyint(std::clamp(code, -127.f, 127.f))));
      }
      break;
    case Format::e4m3:
    case Format::e5m2: {
      const float scale = cut_scale(max_abs(x), format == Format::e4m3 ? 448.f : 57344.f);
      for (index_t d = 0; d < dim; ++d) {
        const float number = x[static_cast<std::size_t>(d)] / scale;
        put(row, d, format == Format::e4m3 ? convert<fp8_e4m3>(number).bits : convert<fp8_e5m2>(number).bits);
      }
      put(row, dim, scale);
      break;
    }
    case Format::latent_fp8:
      for (index_t g = 0; g < 4; ++g) {
        const std::vector<float> part(x.begin() + 128 * g, x.begin() + 128 * (g + 1));
        const float scale =
            static_cast<float>(std::exp2(std::ceil(std::log2(std::max(double{max_abs(part) / 448.f}, double{1e-4f})))));
        for (index_t i = 0; i < 128; ++i)
          put(row, 128 * g + i, convert<fp8_e4m3>(part[static_cast<std::size_t>(i)] / scale));
        put(row, 512 + 4 * g, scale);
      }
      for (index_t i = 0; i < 64; ++i) put(row, 528 + 2 * i, convert<bf16>(x[static_cast<std::size_t>(512 + i)]));
      break;
    default:
      put_i4(row, x, fovea::i4_group(format), has_zero(format));
  }
  return row;
}

// Rows that have caught encoders out.
constexpr int kKinds = 14;
std::vector<float> sample(int kind, index_t dim, test::Random& random) {
  std::vector<float> x(static_cast<std::size_t>(dim));
  for (float& number : x) number = random.normal();
  auto& any = x[static_cast<std::size_t>(random.below(dim))];
  auto& other = x[static_cast<std::size_t>(random.below(dim))];
  switch (kind) {
    case 1:   // zeros, one of them negative
      std::fill(x.begin(), x.end(), 0.f);
      any = -0.f;
      break;
    case 2:   // one outlier
      any *= 1e4f;
      break;
    case 3:   // the largest fp32 there is
      any = -FLT_MAX;
      break;
    case 4:   // denormals only
      for (float& number : x) number *= 0x1p-140f;
      break;
    case 5:   // at the bottom of the scales of int8 and fp8
      for (float& number : x) number *= 0x1p-122f;
      break;
    case 6:   // at the bottom of the scales of int4
      for (float& number : x) number *= 0x1p-18f;
      break;
    case 7:   // one sign, small spread around a large offset
      for (float& number : x) number = 10 + number * 1e-3f;
      break;
    case 8:   // constant
      std::fill(x.begin(), x.end(), random.normal());
      break;
    case 9:   // ties: halves of a scale of 1 or 1/8
      for (float& number : x) number = static_cast<float>(random.between(-254, 254)) / 2;
      any = 127;
      break;
    case 10:   // a power of two times integers
      for (float& number : x) number = static_cast<float>(random.between(-16, 16)) * 0.0625f;
      break;
    case 11:   // at the end of the range of an f16 scale
      for (float& number : x) number *= 1.5e5f;
      break;
    case 12:
      any = kNan;
      break;
    case 13:
      any = kInfinity;
      other = -kInfinity;
      break;
    default:
      break;
  }
  return x;
}

// A row in memory of exactly its size (a sanitizer sees a byte too many), and once with poison around it at an odd address.
Bytes vector_row(Format format, const std::vector<float>& x, const float* channel_scale, index_t* lost = nullptr) {
  const auto dim = static_cast<index_t>(x.size());
  const auto bytes = static_cast<std::size_t>(fovea::row_bytes(format, dim));
  const std::unique_ptr<float[]> exact(new float[x.size()]);
  std::copy(x.begin(), x.end(), exact.get());
  Bytes row(bytes, std::byte{0xa5});
  const index_t count = fovea::quantise_row(format, exact.get(), 1, dim, channel_scale, row.data());
  if (lost != nullptr) *lost = count;

  constexpr std::size_t kGuard = 65;
  Bytes guarded(bytes + 2 * kGuard, std::byte{0x5a});
  (void)fovea::quantise_row(format, exact.get(), 1, dim, channel_scale, guarded.data() + kGuard);
  const auto untouched = [](std::byte byte) { return byte == std::byte{0x5a}; };
  REQUIRE(std::all_of(guarded.begin(), guarded.begin() + kGuard, untouched));
  REQUIRE(std::all_of(guarded.end() - kGuard, guarded.end(), untouched));
  REQUIRE(std::equal(row.begin(), row.end(), guarded.begin() + kGuard));
  return row;
}

std::vector<float> channel_scales_for(index_t dim, test::Random& random) {
  std::vector<float> scales(static_cast<std::size_t>(dim));
  for (float& scale : scales) scale = random.uniform(0.01f, 0.1f);
  return scales;
}

std::vector<index_t> dims_of(Format format) {
  if (format == Format::latent_fp8) return {576};
  std::vector<index_t> dims{128, 576};
  for (index_t dim = 1; dim <= 70; ++dim) dims.push_back(dim);
  return dims;
}

// The stored row as numbers; a NaN of the same bits twice compares equal.
std::vector<double> decoded(Format format, const Bytes& row, index_t dim, const float* channel_scale) {
  std::vector<double> numbers;
  for (index_t d = 0; d < dim; ++d) numbers.push_back(stored_value(format, row.data(), dim, d, channel_scale));
  return numbers;
}

// By how much number d of a row may differ from x, from the scale that stands in the row.
double bound(Format format, const Bytes& row, index_t dim, index_t d, const float* channel_scale, double x) {
  constexpr double kQuotient = 1 + 0x1p-16;   // a quotient of up to 127 is rounded by 2^-18, half a step is 2^-1
  const double size = std::abs(x);
  const auto small = [&](int mantissa, int min_exponent, double scale) {   // half a unit in the last place
    return std::max(size * std::ldexp(1., -mantissa - 1), scale * std::ldexp(1., min_exponent - mantissa - 1)) *
           (1 + 0x1p-20);
  };
  switch (format) {
    case Format::f32:
    case Format::f64:
      return 0;
    case Format::bf16:
      return small(7, -126, 1);
    case Format::f16:
      return small(10, -14, 1);
    case Format::i8_token:
      return get<float>(row, dim) / 2 * kQuotient;
    case Format::i8_channel:
      return channel_scale[d] / 2 * kQuotient;
    case Format::e4m3:
      return small(3, -6, get<float>(row, dim));
    case Format::e5m2:
      return small(2, -14, get<float>(row, dim));
    case Format::latent_fp8:
      return d < 512 ? small(3, -6, get<float>(row, 512 + 4 * (d / 128))) : small(7, -126, 1);
    default: {
      const index_t group = fovea::i4_group(format), groups = (dim + group - 1) / group;
      const index_t at = groups * group / 2 + (has_zero(format) ? 4 : 2) * (d / group);
      return std::abs(convert<double>(get<f16>(row, at))) / 2 * kQuotient;
    }
  }
}

}   // namespace

TEST_CASE("Vectors of small patterns equal the scalar conversion", "[quantise]") {
  test::Random random(5);
  const auto check = [&](auto number, const std::vector<float>& x) {
    using T = decltype(number);
    int wrong = 0;
    for (std::size_t n = 0; n + fovea::kLanes <= x.size(); n += fovea::kLanes) {
      alignas(64) std::int32_t lanes[fovea::kLanes];
      fovea::small_patterns<T>(fovea::load(x.data() + n)).store_aligned(lanes);
      T stored[fovea::kLanes];
      fovea::store_as<T>(reinterpret_cast<std::byte*>(stored), fovea::load(x.data() + n), fovea::kLanes);
      for (std::size_t i = 0; i < fovea::kLanes; ++i) {
        const unsigned expected = convert<T>(x[n + i]).bits;
        wrong += static_cast<unsigned>(lanes[i]) != expected || stored[i].bits != expected;
      }
    }
    CHECK(wrong == 0);
  };
  std::vector<float> x;
  for (std::uint32_t high = 0; high < 0x10000;
       ++high) {   // every sign, exponent and upper fraction; ties and their neighbours
    for (const std::uint32_t low : {0u, 1u, 0x1000u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      x.push_back(std::bit_cast<float>(high << 16 | low));
    }
  }
  for (int n = 0; n < 1 << 18; ++n) x.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(random.bits())));
  check(bf16{}, x);
  check(f16{}, x);
  check(fp8_e4m3{}, x);
  check(fp8_e5m2{}, x);
}

TEST_CASE("Rows are stored with the bits of the scalar encoder", "[quantise]") {
  test::Random random(17);
  std::vector<Format> formats(std::begin(kRowFormats), std::end(kRowFormats));
  formats.push_back(Format::latent_fp8);
  for (const Format format : formats) {
    for (const index_t dim : dims_of(format)) {
      for (int kind = 0; kind < kKinds; ++kind) {
        const std::vector<float> scales = channel_scales_for(dim, random), x = sample(kind, dim, random);
        const bool same = vector_row(format, x, scales.data()) == scalar_row(format, x, scales.data());
        if (!same) {
          CAPTURE(fovea::name_of(format), dim, kind);
          CHECK(same);
        }
      }
    }
  }
  CHECK(formats.size() == static_cast<std::size_t>(fovea::kFormats));
}

TEST_CASE("A stored number is within half a scale, or half a unit in the last place", "[quantise]") {
  test::Random random(19);
  std::vector<Format> formats(std::begin(kRowFormats), std::end(kRowFormats));
  formats.push_back(Format::latent_fp8);
  for (const Format format : formats) {
    int too_far = 0, compared = 0;
    for (const index_t dim : dims_of(format)) {
      for (int kind = 0; kind <= 11; ++kind) {
        if (format == Format::bf16 && kind == 3) continue;   // FLT_MAX rounds to infinity, as IEEE says
        if (format == Format::f16 && (kind == 3 || kind == 11)) continue;
        if (is_i4(format) && kind == 3) continue;   // beyond an f16 scale: NaN, tested below
        if (is_i4(format) && kind == 11 && has_zero(format)) continue;
        const std::vector<float> x = sample(kind, dim, random);
        std::vector<float> scales = channel_scales_for(dim, random);
        if (format == Format::i8_channel) {
          for (index_t d = 0; d < dim; ++d) {
            const auto at = static_cast<std::size_t>(d);
            scales[at] = std::max(std::abs(x[at]) / 127 * random.uniform(1, 3), FLT_MIN);
          }
        }
        index_t lost = -1;
        const Bytes row = vector_row(format, x, scales.data(), &lost);
        CHECK(lost == 0);
        if (is_i4(format) && kind == 11 && max_abs(x) > 4.5e5f) continue;
        for (index_t d = 0; d < dim; ++d) {
          const double number = double{x[static_cast<std::size_t>(d)]};
          const double difference = std::abs(stored_value(format, row.data(), dim, d, scales.data()) - number);
          too_far += !(difference <= bound(format, row, dim, d, scales.data(), number));
          ++compared;
        }
      }
    }
    CAPTURE(fovea::name_of(format));
    CHECK(too_far == 0);
    CHECK(compared >= 576);
  }
}

TEST_CASE("Storing a decoded row again gives the same bytes", "[quantise]") {
  test::Random random(23);
  std::vector<Format> formats(std::begin(kRowFormats), std::end(kRowFormats));
  formats.push_back(Format::latent_fp8);
  for (const Format format : formats) {
    for (const index_t dim : dims_of(format)) {
      for (int kind = 0; kind <= 11; ++kind) {
        for (int repeat = 0; repeat < 4; ++repeat) {
          const std::vector<float> scales = channel_scales_for(dim, random), x = sample(kind, dim, random);
          const Bytes first = vector_row(format, x, scales.data());
          std::vector<float> again;
          bool exact = true, number = true;
          for (const double value : decoded(format, first, dim, scales.data())) {
            again.push_back(static_cast<float>(value));
            exact = exact && double{again.back()} == value;
            number = number && std::isfinite(again.back());
          }
          if (!number) continue;   // FLT_MAX in a 16-bit or 4-bit format
          CAPTURE(fovea::name_of(format), dim, kind);
          // code * scale fits fp32 where fovea chose the scale; with a zero or a caller's scale it may round.
          if (!exact && format != Format::i8_channel && !has_zero(format))
            FAIL_CHECK("the decoded value is not exact in fp32");
          const Bytes second = vector_row(format, again, scales.data());
          if (format == Format::latent_fp8) {   // a largest code that rounded down leaves room for half the scale
            if (decoded(format, second, dim, nullptr) != decoded(format, first, dim, nullptr)) FAIL_CHECK("values differ");
          } else if (second != first) {
            FAIL_CHECK("bytes differ");
          }
        }
      }
    }
  }
}

TEST_CASE("Zeros are stored as zeros, and no scale is zero", "[quantise]") {
  const std::vector<float> x(576, 0.f);
  for (int n = 0; n < fovea::kFormats; ++n) {
    const auto format = static_cast<Format>(n);
    const std::vector<float> scales(576, 1.f);
    const Bytes row = vector_row(format, x, scales.data());
    for (const double value : decoded(format, row, 576, scales.data())) CHECK(value == 0);
    if (format == Format::i8_token || format == Format::e4m3 || format == Format::e5m2) {
      CHECK(get<float>(row, 576) == FLT_MIN);
    }
  }
}

TEST_CASE("What is not finite does not vanish", "[quantise]") {
  test::Random random(29);
  for (const float bad : {kNan, kInfinity, -kInfinity}) {
    for (const index_t dim : {1, 3, 33, 70, 128}) {
      const index_t at = random.below(dim);
      std::vector<float> x = sample(0, dim, random);
      const std::vector<float> good = x;
      x[static_cast<std::size_t>(at)] = bad;
      for (const Format format : kRowFormats) {
        std::vector<float> scales(static_cast<std::size_t>(dim), 1.f);
        index_t lost = 0;
        const Bytes row = vector_row(format, x, scales.data(), &lost);
        const std::vector<double> values = decoded(format, row, dim, scales.data());
        CAPTURE(fovea::name_of(format), dim, at, bad);
        CHECK(lost == (format == Format::i8_channel ? 1 : 0));
        if (format == Format::i8_channel) {
          CHECK(values[static_cast<std::size_t>(at)] == (std::isnan(bad) ? 0 : std::copysign(127, bad)));
        } else if (format == Format::i8_token || is_i4(format)) {
          const index_t group = format == Format::i8_token ? dim : fovea::i4_group(format);
          int wrong = 0;
          for (index_t d = 0; d < dim; ++d)
            wrong += std::isnan(values[static_cast<std::size_t>(d)]) != (d / group == at / group);
          CHECK(wrong == 0);
        } else {
          const double value = values[static_cast<std::size_t>(at)];
          CHECK((std::isnan(bad) || format == Format::e4m3 ? std::isnan(value) : value == double{bad}));
          int wrong = 0;
          for (index_t d = 0; d < dim; ++d) {
            const auto n = static_cast<std::size_t>(d);
            wrong +=
                d != at && !(std::abs(values[n] - double{good[n]}) <= bound(format, row, dim, d, nullptr, double{good[n]}));
          }
          CHECK(wrong == 0);
        }
      }
    }
  }
  // Beyond the range of an f16 scale or zero.
  for (const Format format : {Format::i4_g32, Format::i4_g64_zero}) {
    const Bytes row = vector_row(format, {1.f, 2e6f, -1.f}, nullptr);
    CHECK(std::isnan(stored_value(format, row.data(), 3, 0)));
  }
  const Bytes far = vector_row(Format::i4_g32_zero, {-7e4f, -7e4f + 1}, nullptr);
  CHECK(std::isnan(stored_value(Format::i4_g32_zero, far.data(), 2, 1)));
}

TEST_CASE("The larger side of an int4 group reaches -8 steps, whichever sign it has", "[quantise]") {
  const auto scale_of = [](const std::vector<float>& x) {
    const Bytes row = vector_row(Format::i4_g32, x, nullptr);
    return convert<float>(get<f16>(row, 16));
  };
  CHECK(scale_of({-8.f, 3.f}) == 1.f);
  CHECK(scale_of({8.f, -3.f}) == -1.f);
  CHECK(scale_of({8.f, -7.f}) == -1.f);
  CHECK(scale_of({7.f, -7.f}) == 1.f);     // symmetric: seven steps on both sides
  CHECK(scale_of({7.25f, -7.f}) == 1.f);   // 7.25 is nearer to 7 than to 8
  CHECK(scale_of({5.f, 8.f}) == -1.f);
  const Bytes row = vector_row(Format::i4_g32, {8.f, -7.f, 0.f, 1.f}, nullptr);
  CHECK(decoded(Format::i4_g32, row, 4, nullptr) == std::vector<double>{8, -7, 0, 1});
}

TEST_CASE("Latent scales are powers of two, not below 2^-13", "[quantise]") {
  std::vector<float> x(576, 0.f);
  x[0] = 448.f;                             // 1
  x[128] = std::nextafter(448.f, 1000.f);   // a little more: 2
  x[256] = 300.f;                           // 0.67: 1
  const Bytes row = vector_row(Format::latent_fp8, x, nullptr);
  CHECK(get<float>(row, 512) == 1.f);
  CHECK(get<float>(row, 516) == 2.f);
  CHECK(get<float>(row, 520) == 1.f);
  CHECK(get<float>(row, 524) == 0x1p-13f);   // 1e-4 rounded up
}

TEST_CASE("quantise stores strided tensors and leaves what lies between the rows alone", "[quantise]") {
  test::Random random(31);
  const index_t batch = 2, heads = 3, len = 5, dim = 40;
  std::vector<float> memory(static_cast<std::size_t>(batch * heads * len * dim * 2));
  for (float& x : memory) x = random.normal();
  const fovea::Tensor<const float> views[] = {
      fovea::bhsd<const float>(memory.data(), batch, heads, len, dim),
      fovea::bshd<const float>(memory.data(), batch, len, heads, dim),
      {memory.data(), {batch, heads, len, dim}, {heads * len * dim * 2, len * dim * 2, dim * 2, 2}},
      {memory.data(), {batch, heads, len, dim}, {heads * len * dim, len * dim, 1, len}},   // dim is not the fastest axis
      {memory.data() + dim - 1, {batch, heads, len, dim}, {heads * len * dim, len * dim, dim, -1}},
  };
  std::vector<float> scales(static_cast<std::size_t>(heads * dim), 0.03f);
  for (const Format format : kRowFormats) {
    const index_t bytes = fovea::row_bytes(format, dim), gap = 3, row_stride = bytes + gap;
    // Token-major: the heads of a token next to each other.
    const std::array<index_t, 3> stride{len * heads * row_stride, row_stride, heads * row_stride};
    for (const auto& view : views) {
      Bytes rows(static_cast<std::size_t>(batch * len * heads * row_stride), std::byte{0x77});
      index_t lost = 0, expected_lost = 0;
      REQUIRE(fovea::quantise(view, format, rows.data(), stride, scales.data(), &lost).ok());
      int wrong = 0, touched = 0;
      for (index_t b = 0; b < batch; ++b) {
        for (index_t h = 0; h < heads; ++h) {
          for (index_t s = 0; s < len; ++s) {
            std::vector<float> x;
            for (index_t d = 0; d < dim; ++d) x.push_back(view(b, h, s, d));
            index_t row_lost = 0;
            const Bytes expected = vector_row(format, x, scales.data() + h * dim, &row_lost);
            expected_lost += row_lost;
            const auto at = rows.begin() + b * stride[0] + h * stride[1] + s * stride[2];
            wrong += !std::equal(expected.begin(), expected.end(), at);
            for (index_t n = 0; n < gap; ++n) touched += *(at + bytes + n) != std::byte{0x77};
          }
        }
      }
      CAPTURE(fovea::name_of(format));
      CHECK(wrong == 0);
      CHECK(touched == 0);
      CHECK(lost == expected_lost);
    }
  }
}

TEST_CASE("quantise says what is wrong and writes nothing", "[quantise]") {
  std::vector<float> memory(1000, 1.f);
  Bytes rows(4000, std::byte{0x77});
  const auto view = fovea::bhsd<const float>(memory.data(), 1, 2, 5, 10);
  const auto message = [&](fovea::Tensor<const float> x, Format format, std::byte* to, std::array<index_t, 3> stride) {
    const fovea::Status status = fovea::quantise(x, format, to, stride);
    CHECK(!status.ok());
    return std::string(status.message());
  };
  using Catch::Matchers::ContainsSubstring;
  CHECK_THAT(message(view, Format::i8_token, nullptr, {0, 70, 14}), ContainsSubstring("destination"));
  CHECK_THAT(message({nullptr, view.extent, view.stride}, Format::i8_token, rows.data(), {0, 70, 14}),
             ContainsSubstring("x has no data"));
  CHECK_THAT(message(view, Format::i8_token, rows.data(), {0, 70, 13}),
             ContainsSubstring("14 bytes") && ContainsSubstring("i8_token") && ContainsSubstring("13"));
  CHECK_THAT(message(view, Format::i8_channel, rows.data(), {0, 50, 10}), ContainsSubstring("channel_scale [2, 10]"));
  CHECK_THAT(message(view, Format::latent_fp8, rows.data(), {0, 3280, 656}),
             ContainsSubstring("576") && ContainsSubstring("10"));
  CHECK_THAT(message({memory.data(), {1, 1, 1, 0}, {0, 0, 0, 1}}, Format::f16, rows.data(), {0, 0, 0}),
             ContainsSubstring("dim"));
  CHECK_THAT(message(view, static_cast<Format>(99), rows.data(), {0, 0, 0}), ContainsSubstring("99"));
  CHECK(std::all_of(rows.begin(), rows.end(), [](std::byte byte) { return byte == std::byte{0x77}; }));
  CHECK(fovea::quantise(fovea::bhsd<const float>(nullptr, 0, 2, 5, 10), Format::f16, nullptr, {0, 0, 0}).ok());
}

TEST_CASE("Channel scales come from the largest key of each head and channel", "[quantise]") {
  test::Random random(37);
  const index_t heads = 2, len = 50, dim = 37;
  std::vector<float> first(static_cast<std::size_t>(heads * len * dim)), second = first;
  for (float& x : first) x = random.normal();
  for (float& x : second) x = random.normal();
  const auto a = fovea::bshd<const float>(first.data(), 1, len, heads, dim);
  const auto b = fovea::bhsd<const float>(second.data(), 1, heads, len, dim);
  std::vector<float> largest(static_cast<std::size_t>(heads * dim), 0.f), scales(largest);
  fovea::widen_channels(a, largest.data());
  fovea::widen_channels(b, largest.data());
  fovea::channel_scales(largest.data(), heads * dim, scales.data());
  int wrong = 0;
  for (index_t h = 0; h < heads; ++h) {
    for (index_t d = 0; d < dim; ++d) {
      float expected = 0;
      for (index_t s = 0; s < len; ++s) expected = std::max({expected, std::abs(a(0, h, s, d)), std::abs(b(0, h, s, d))});
      wrong += largest[static_cast<std::size_t>(h * dim + d)] != expected;
      wrong += scales[static_cast<std::size_t>(h * dim + d)] != cut_scale(expected, 127);
    }
  }
  CHECK(wrong == 0);

  // The keys of the calibration fit; ten times as large ones clip, as many as are beyond 127.5 scales.
  const index_t bytes = fovea::row_bytes(Format::i8_channel, dim);
  Bytes rows(static_cast<std::size_t>(heads * len * bytes));
  index_t lost = 0;
  REQUIRE(fovea::quantise(b, Format::i8_channel, rows.data(), {0, len * bytes, bytes}, scales.data(), &lost).ok());
  CHECK(lost == 0);
  index_t beyond = 0;
  for (float& x : second) x *= 10;
  for (index_t h = 0; h < heads; ++h) {
    for (index_t s = 0; s < len; ++s) {
      for (index_t d = 0; d < dim; ++d) {
        beyond += std::abs(b(0, h, s, d) / scales[static_cast<std::size_t>(h * dim + d)]) > 127.5f;
      }
    }
  }
  REQUIRE(fovea::quantise(b, Format::i8_channel, rows.data(), {0, len * bytes, bytes}, scales.data(), &lost).ok());
  CHECK(beyond > 100);
  CHECK(lost == beyond);
  CHECK(std::none_of(rows.begin(), rows.end(), [](std::byte code) { return code == std::byte{0x80}; }));

  // Headroom, and a NaN that a later finite key does not hide.
  std::vector<float> roomy(largest.size());
  fovea::channel_scales(largest.data(), heads * dim, roomy.data(), 2.f);
  CHECK(roomy[3] == 2 * scales[3]);
  first[static_cast<std::size_t>(dim + 5)] = kNan;   // position 0, head 1, channel 5
  fovea::widen_channels(a, largest.data());
  fovea::widen_channels(b, largest.data());
  fovea::channel_scales(largest.data(), heads * dim, largest.data());
  CHECK(std::isnan(largest[static_cast<std::size_t>(dim + 5)]));
  CHECK(std::count_if(largest.begin(), largest.end(), [](float x) { return std::isnan(x); }) == 1);
}
