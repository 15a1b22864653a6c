// SPDX-License-Identifier: Apache-2.0
// The wire format of Protocol Buffers, read in place: fields one after the other, each a number or a run of bytes inside the
// message. Every length is checked against what is left; nothing is allocated and nothing recurses.
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>

namespace onnx_tool {

using Bytes = std::span<const std::byte>;

struct Field {
  enum class Wire : std::uint8_t { varint = 0, fixed64 = 1, bytes = 2, fixed32 = 5 };
  std::uint32_t number = 0;
  Wire wire = Wire::varint;
  std::uint64_t integer = 0;   // varint; the bits of fixed64 and fixed32
  Bytes bytes;

  bool is_bytes() const { return wire == Wire::bytes; }
  bool is_varint() const { return wire == Wire::varint; }
  bool is_float() const { return wire == Wire::fixed32; }
  std::int64_t signed_integer() const { return static_cast<std::int64_t>(integer); }
  float real() const { return std::bit_cast<float>(static_cast<std::uint32_t>(integer)); }
  std::string_view text() const { return {reinterpret_cast<const char*>(bytes.data()), bytes.size()}; }
};

class Fields {
 public:
  explicit Fields(Bytes message) : rest_(message) {}

  // False at the end, and at the first byte that makes no sense: ok() tells which.
  bool next(Field& field) {
    if (rest_.empty() || !ok_) return false;
    std::uint64_t key = 0;
    ok_ = varint(key) && key >> 3 != 0 && key >> 3 < (1u << 29);
    if (!ok_) return false;
    field = {};
    field.number = static_cast<std::uint32_t>(key >> 3);
    switch (key & 7) {
      case 0:
        ok_ = varint(field.integer);
        break;
      case 1:
        ok_ = fixed(8, field.integer);
        break;
      case 2: {
        std::uint64_t length = 0;
        ok_ = varint(length) && length <= rest_.size();
        if (!ok_) break;
        field.bytes = rest_.first(static_cast<std::size_t>(length));
        rest_ = rest_.subspan(static_cast<std::size_t>(length));
        break;
      }
      case 5:
        ok_ = fixed(4, field.integer);
        break;
      default:   // groups, which ONNX does not use, and numbers without a meaning
        ok_ = false;
    }
    field.wire = static_cast<Field::Wire>(key & 7);
    return ok_;
  }

  // A varint of a packed list, or of a key: at most 10 bytes, the tenth with one bit.
  bool varint(std::uint64_t& value) {
    value = 0;
    for (std::size_t n = 0; n < 10 && n < rest_.size(); ++n) {
      const auto byte = std::to_integer<std::uint64_t>(rest_[n]);
      if (n == 9 && byte > 1) return false;
      value |= (byte & 127) << (7 * n);
      if (byte < 128) {
        rest_ = rest_.subspan(n + 1);
        return true;
      }
    }
    return false;
  }

  bool ok() const { return ok_; }
  bool at_end() const { return rest_.empty(); }

 private:
  bool fixed(std::size_t size, std::uint64_t& value) {
    if (rest_.size() < size) return false;
    value = 0;
    for (std::size_t n = 0; n < size; ++n) value |= std::to_integer<std::uint64_t>(rest_[n]) << (8 * n);
    rest_ = rest_.subspan(size);
    return true;
  }

  Bytes rest_;
  bool ok_ = true;
};

// A repeated integer: one field each, or packed into one. `take` returns false to stop.
template <class Take>
bool each_integer(const Field& field, const Take& take) {
  if (field.is_varint()) return take(field.signed_integer());
  if (!field.is_bytes()) return false;
  Fields packed(field.bytes);
  while (!packed.at_end()) {
    std::uint64_t value = 0;
    if (!packed.varint(value) || !take(static_cast<std::int64_t>(value))) return false;
  }
  return true;
}

}   // namespace onnx_tool
