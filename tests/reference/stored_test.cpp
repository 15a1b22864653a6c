// SPDX-License-Identifier: Apache-2.0
#include "fovea/reference/stored.hpp"

#include <cmath>
#include <cstring>
#include <vector>

#include "catch_compat.hpp"

namespace {

using fovea::Format;
using fovea::index_t;
using fovea::reference::stored_value;

// A row written field by field.
struct RowWriter {
  std::vector<std::byte> bytes;

  template <class T>
  RowWriter& put(T value) {
    const std::size_t at = bytes.size();
    bytes.resize(at + sizeof value);
    std::memcpy(bytes.data() + at, &value, sizeof value);
    return *this;
  }
  RowWriter& byte(int value) { return put(static_cast<std::uint8_t>(value)); }
  RowWriter& half(int bits) { return put(static_cast<std::uint16_t>(bits)); }
  double value(Format format, index_t dim, index_t d, const float* channel_scale = nullptr) const {
    REQUIRE(bytes.size() == static_cast<std::size_t>(fovea::row_bytes(format, dim)));
    return stored_value(format, bytes.data(), dim, d, channel_scale);
  }
};

}   // namespace

TEST_CASE("Plain rows hold their numbers", "[reference]") {
  const RowWriter f32 = RowWriter().put(1.5f).put(-0x1p-149f);
  CHECK(f32.value(Format::f32, 2, 0) == 1.5);
  CHECK(f32.value(Format::f32, 2, 1) == -0x1p-149);
  const RowWriter f64 = RowWriter().put(1.5).put(1e300);
  CHECK(f64.value(Format::f64, 2, 1) == 1e300);
  const RowWriter half =
      RowWriter().half(0x3c00).half(0xc100).half(0x0001).half(0x7bff).half(0x7c00).half(0xfc00).half(0x7c01);
  CHECK(half.value(Format::f16, 7, 0) == 1);
  CHECK(half.value(Format::f16, 7, 1) == -2.5);
  CHECK(half.value(Format::f16, 7, 2) == 0x1p-24);
  CHECK(half.value(Format::f16, 7, 3) == 65504);
  CHECK(half.value(Format::f16, 7, 4) == INFINITY);
  CHECK(half.value(Format::f16, 7, 5) == -INFINITY);
  CHECK(std::isnan(half.value(Format::f16, 7, 6)));
  const RowWriter brain = RowWriter().half(0x3f80).half(0xc020).half(0x0001).half(0x7f7f).half(0xff80).half(0x7fc0);
  CHECK(brain.value(Format::bf16, 6, 0) == 1);
  CHECK(brain.value(Format::bf16, 6, 1) == -2.5);
  CHECK(brain.value(Format::bf16, 6, 2) == 0x1p-133);
  CHECK(brain.value(Format::bf16, 6, 3) == 0x1.fep127);
  CHECK(brain.value(Format::bf16, 6, 4) == -INFINITY);
  CHECK(std::isnan(brain.value(Format::bf16, 6, 5)));
}

TEST_CASE("The corners of fp8", "[reference]") {
  const auto e4m3 = [](int bits) { return fovea::reference::stored_float(static_cast<unsigned>(bits), 4, 3, false); };
  const auto e5m2 = [](int bits) { return fovea::reference::stored_float(static_cast<unsigned>(bits), 5, 2, true); };
  CHECK(e4m3(0x38) == 1);
  CHECK(e4m3(0x7e) == 448);
  CHECK(e4m3(0x78) == 256);   // the highest exponent holds numbers
  CHECK(std::isnan(e4m3(0x7f)));
  CHECK(std::isnan(e4m3(0xff)));
  CHECK(e4m3(0x01) == 0x1p-9);
  CHECK(e4m3(0x08) == 0x1p-6);
  CHECK(e4m3(0xb8) == -1);
  CHECK((e4m3(0x80) == 0 && std::signbit(e4m3(0x80))));
  CHECK(e5m2(0x3c) == 1);
  CHECK(e5m2(0x7b) == 57344);
  CHECK(e5m2(0x7c) == INFINITY);
  CHECK(e5m2(0xfc) == -INFINITY);
  CHECK(std::isnan(e5m2(0x7d)));
  CHECK(e5m2(0x01) == 0x1p-16);
  CHECK(e5m2(0x04) == 0x1p-14);
}

TEST_CASE("Rows of codes and one scale", "[reference]") {
  const RowWriter i8 = RowWriter().byte(127).byte(0x81).byte(0).put(0.25f);
  CHECK(i8.value(Format::i8_token, 3, 0) == 31.75);
  CHECK(i8.value(Format::i8_token, 3, 1) == -31.75);
  CHECK(i8.value(Format::i8_token, 3, 2) == 0);
  const float channels[] = {0.5f, 2.f, 1.f};
  const RowWriter plain = RowWriter().byte(127).byte(0x81).byte(0x80);
  CHECK(plain.value(Format::i8_channel, 3, 0, channels) == 63.5);
  CHECK(plain.value(Format::i8_channel, 3, 1, channels) == -254);
  CHECK(plain.value(Format::i8_channel, 3, 2, channels) == -128);
  const RowWriter e4m3 = RowWriter().byte(0x7e).byte(0xb8).put(0.5f);
  CHECK(e4m3.value(Format::e4m3, 2, 0) == 224);
  CHECK(e4m3.value(Format::e4m3, 2, 1) == -0.5);
  const RowWriter e5m2 = RowWriter().byte(0x7b).put(2.f);
  CHECK(e5m2.value(Format::e5m2, 1, 0) == 114688);
}

TEST_CASE("Nibbles stand in blocks of 32, the first 16 numbers low", "[reference]") {
  for (const bool zero : {false, true}) {
    for (const index_t group : {32, 64}) {
      const index_t dim = 70, groups = (dim + group - 1) / group;
      RowWriter row;
      // Byte i of block b: low nibble (i + b) % 16, high nibble (15 - i).
      for (int block = 0; block < groups * group / 32; ++block) {
        for (int i = 0; i < 16; ++i) row.byte((i + block) % 16 + 16 * (15 - i));
      }
      // Scales 1, 2, 4; zeros 8, 16, 32.
      for (int g = 0; g < groups; ++g) {
        row.half(0x3c00 + 0x400 * g);
        if (zero) row.half(0x4800 + 0x400 * g);
      }
      const Format format =
          group == 32 ? (zero ? Format::i4_g32_zero : Format::i4_g32) : (zero ? Format::i4_g64_zero : Format::i4_g64);
      for (index_t d = 0; d < dim; ++d) {
        const index_t block = d / 32, i = d % 16;
        const double code = static_cast<double>(d % 32 < 16 ? (i + block) % 16 : 15 - i);
        const double scale = std::ldexp(1., static_cast<int>(d / group));
        CAPTURE(d, group, zero);
        CHECK(row.value(format, dim, d) == (zero ? code * scale + 8 * scale : (code - 8) * scale));
      }
    }
  }
}

TEST_CASE("A latent row: 512 e4m3, four scales, 64 bf16", "[reference]") {
  RowWriter row;
  for (int d = 0; d < 512; ++d) row.byte(d % 127);
  for (int g = 0; g < 4; ++g) row.put(std::ldexp(1.f, g - 2));
  for (int d = 0; d < 64; ++d) row.half(0x3f80 + d);
  CHECK(row.value(Format::latent_fp8, 576, 0x38) == 0.25);
  CHECK(row.value(Format::latent_fp8, 576, 127 + 0x38) == 0.5);               // number 183, second group
  CHECK(row.value(Format::latent_fp8, 576, 4 * 127 + 3) == 2 * 3 * 0x1p-9);   // number 511, last group
  CHECK(row.value(Format::latent_fp8, 576, 512) == 1);
  CHECK(row.value(Format::latent_fp8, 576, 575) == 1 + 63 * 0x1p-7);
  CHECK(stored_value(Format::latent_fp8, row.bytes.data(), 512, 511) == 2 * 3 * 0x1p-9);   // the same row read as V
}
