// SPDX-License-Identifier: Apache-2.0
// Dense tensors of any element type, for the tests of the ONNX front doors.
#pragma once
#include <cstring>
#include <vector>

#include "fovea/onnx.hpp"
#include "random.hpp"

namespace test::onnx {

using fovea::index_t;
using fovea::OnnxType;

// A dense tensor of any of the types a test needs.
struct Numbers {
  OnnxType type = OnnxType::none;
  std::vector<std::int64_t> shape;
  std::vector<std::byte> bytes;

  std::size_t count() const {
    std::int64_t n = 1;
    for (const std::int64_t extent : shape) n *= extent;
    return static_cast<std::size_t>(n);
  }
  double at(std::size_t n) const {
    if (type == OnnxType::boolean) return static_cast<double>(bytes[n]);
    if (type == OnnxType::i64) return static_cast<double>(integer(n));
    return fovea::onnx::number_at(fovea::onnx::format_of(type), bytes.data(), static_cast<index_t>(n));
  }
  std::int64_t integer(std::size_t n) const {
    std::int64_t value = 0;
    std::memcpy(&value, bytes.data() + 8 * n, 8);
    return value;
  }
  void put(std::size_t n, double x) {
    if (type == OnnxType::boolean) {
      bytes[n] = static_cast<std::byte>(x != 0);
    } else if (type == OnnxType::i64) {
      const auto value = static_cast<std::int64_t>(x);
      std::memcpy(bytes.data() + 8 * n, &value, 8);
    } else {
      fovea::onnx::put_number(fovea::onnx::format_of(type), bytes.data(), static_cast<index_t>(n), x);
    }
  }
  fovea::OnnxTensor in() const { return {bytes.data(), type, shape}; }
  fovea::OnnxOutput out() { return {bytes.data(), type, shape}; }
  explicit operator bool() const { return type != OnnxType::none; }
};

inline Numbers zeros(OnnxType type, std::vector<std::int64_t> shape) {
  Numbers numbers{type, std::move(shape), {}};
  numbers.bytes.resize(numbers.count() * static_cast<std::size_t>(fovea::onnx::bytes_of(type)));
  return numbers;
}
template <class F>
Numbers made(OnnxType type, std::vector<std::int64_t> shape, const F& f) {
  Numbers numbers = zeros(type, std::move(shape));
  for (std::size_t n = 0; n < numbers.count(); ++n) numbers.put(n, f(n));
  return numbers;
}
inline Numbers normal(OnnxType type, std::vector<std::int64_t> shape, test::Random& random) {
  return made(type, std::move(shape), [&](std::size_t) { return static_cast<double>(random.normal()); });
}
inline Numbers listed(OnnxType type, std::vector<std::int64_t> shape, std::initializer_list<double> values) {
  return made(type, std::move(shape), [&](std::size_t n) { return values.begin()[n]; });
}

}   // namespace test::onnx
