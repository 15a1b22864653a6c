// SPDX-License-Identifier: Apache-2.0
// Rows of plain numbers (f32, f64, bf16, f16) to floats and back: queries as they enter the engine, outputs as they leave.
#pragma once
#include <algorithm>
#include <cstring>

#include "../core/convert.hpp"
#include "../core/formats.hpp"
#include "convert.hpp"
#include "narrow.hpp"
#include "simd.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

inline void read_numbers(Format format, const std::byte* from, index_t element_stride, index_t count, float* to) {
  if (element_stride == 1 && format == Format::f32) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  if (element_stride == 1 && (format == Format::bf16 || format == Format::f16)) {
    const bool brain = format == Format::bf16;
    index_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, brain ? load_bf16(from + 2 * i) : load_f16(from + 2 * i));
    if (i < count)
      store_some(to + i, brain ? load_bf16_some(from + 2 * i, count - i) : load_f16_some(from + 2 * i, count - i), count - i);
    return;
  }
  const auto read = [&](const auto* numbers, const auto& convert) {
    for (index_t i = 0; i < count; ++i) to[i] = convert(numbers[i * element_stride]);
  };
  switch (format) {
    case Format::f64:
      return read(reinterpret_cast<const double*>(from), [](double x) { return static_cast<float>(x); });
    case Format::bf16:
      return read(reinterpret_cast<const bf16*>(from), [](bf16 x) { return convert<float>(x); });
    case Format::f16:
      return read(reinterpret_cast<const f16*>(from), [](f16 x) { return convert<float>(x); });
    default:
      return read(reinterpret_cast<const float*>(from), [](float x) { return x; });
  }
}

inline void write_numbers(Format format, const float* from, index_t count, std::byte* to, index_t element_stride) {
  if (element_stride == 1 && format == Format::f32) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  if (element_stride == 1 && (format == Format::bf16 || format == Format::f16)) {
    for (index_t i = 0; i < count; i += kLanes) {
      const index_t here = std::min(kLanes, count - i);
      const f32 numbers = here == kLanes ? load(from + i) : load_some(from + i, here);
      if (format == Format::bf16) {
        store_as<bf16>(to + 2 * i, numbers, here);
      } else {
        store_as<f16>(to + 2 * i, numbers, here);
      }
    }
    return;
  }
  const auto write = [&](auto* numbers, const auto& convert) {
    for (index_t i = 0; i < count; ++i) numbers[i * element_stride] = convert(from[i]);
  };
  switch (format) {
    case Format::f64:
      return write(reinterpret_cast<double*>(to), [](float x) { return static_cast<double>(x); });
    case Format::bf16:
      return write(reinterpret_cast<bf16*>(to), [](float x) { return convert<bf16>(x); });
    case Format::f16:
      return write(reinterpret_cast<f16*>(to), [](float x) { return convert<f16>(x); });
    default:
      return write(reinterpret_cast<float*>(to), [](float x) { return x; });
  }
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
