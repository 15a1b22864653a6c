// SPDX-License-Identifier: Apache-2.0
// The safetensors format: 8 bytes header length (little-endian), a JSON header {name: {dtype, shape, data_offsets}}, then
// the data, offsets counted from the header's end. The file is not trusted: every length is checked before it is used, sums
// and products are checked for overflow, and tensors must cover the data exactly, without overlap and without holes.
#pragma once
#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "files.hpp"

namespace generate {

static_assert(std::endian::native == std::endian::little, "safetensors stores little-endian numbers");

enum class Dtype : std::uint8_t { f32, bf16, f16, other };

struct StoredTensor {
  Dtype dtype = Dtype::other;
  std::vector<std::uint64_t> shape;
  std::uint64_t begin = 0, end = 0;   // bytes from the file's start
};

struct Safetensors {
  std::vector<std::byte> file;
  std::map<std::string, StoredTensor> tensors;
};

namespace detail {

struct DtypeName {
  const char* name;
  std::uint64_t bytes;
  Dtype dtype;
};

inline const DtypeName* find_dtype(const std::string& name) {
  static constexpr DtypeName known[] = {{"F32", 4, Dtype::f32},   {"BF16", 2, Dtype::bf16}, {"F16", 2, Dtype::f16},
                                        {"F64", 8, Dtype::other}, {"I64", 8, Dtype::other}, {"I32", 4, Dtype::other},
                                        {"I16", 2, Dtype::other}, {"I8", 1, Dtype::other},  {"U64", 8, Dtype::other},
                                        {"U32", 4, Dtype::other}, {"U16", 2, Dtype::other}, {"U8", 1, Dtype::other},
                                        {"BOOL", 1, Dtype::other}};
  const auto* const at =
      std::find_if(std::begin(known), std::end(known), [&](const DtypeName& row) { return name == row.name; });
  return at == std::end(known) ? nullptr : at;
}

// Offsets stay relative to the data here; the caller knows where the data begins.
inline Result<StoredTensor> read_entry(const char* name, const Json& entry, std::uint64_t data_size) {
  using Entry = Result<StoredTensor>;
  StoredTensor tensor;
  if (!entry.is_object() || !entry.contains("dtype") || !entry.contains("shape") || !entry.contains("data_offsets")) {
    return Entry::failure("tensor \"%.80s\" needs dtype, shape and data_offsets", name);
  }
  const DtypeName* const dtype = entry["dtype"].is_string() ? find_dtype(entry["dtype"].get<std::string>()) : nullptr;
  if (dtype == nullptr) return Entry::failure("tensor \"%.80s\" has an unknown dtype", name);
  tensor.dtype = dtype->dtype;

  const Json &shape = entry["shape"], &offsets = entry["data_offsets"];
  constexpr std::uint64_t most = std::numeric_limits<std::uint64_t>::max();
  if (!shape.is_array() || shape.size() > 8) return Entry::failure("tensor \"%.80s\" has a bad shape", name);
  std::uint64_t bytes = dtype->bytes;
  for (const Json& axis : shape) {
    std::uint64_t extent = 0;
    if (!read_unsigned(axis, most, extent)) return Entry::failure("tensor \"%.80s\" has a bad shape", name);
    if (extent != 0 && bytes > most / extent) return Entry::failure("tensor \"%.80s\" is larger than 2^64 bytes", name);
    bytes *= extent;
    tensor.shape.push_back(extent);
  }
  if (!offsets.is_array() || offsets.size() != 2 || !read_unsigned(offsets[0], data_size, tensor.begin) ||
      !read_unsigned(offsets[1], data_size, tensor.end) || tensor.begin > tensor.end) {
    return Entry::failure("tensor \"%.80s\" has data_offsets outside the %llu bytes of data", name,
                          static_cast<unsigned long long>(data_size));
  }
  if (tensor.end - tensor.begin != bytes) {
    return Entry::failure("tensor \"%.80s\" needs %llu bytes, its data_offsets span %llu", name,
                          static_cast<unsigned long long>(bytes),
                          static_cast<unsigned long long>(tensor.end - tensor.begin));
  }
  return tensor;
}

}   // namespace detail

inline Result<Safetensors> parse_safetensors(std::vector<std::byte> file) {
  using Parsed = Result<Safetensors>;
  constexpr std::uint64_t largest_header = 100'000'000;   // the format's own limit
  std::uint64_t header_size = 0;
  if (file.size() < sizeof header_size)
    return Parsed::failure("a safetensors file has at least 8 bytes, this has %zu", file.size());
  std::memcpy(&header_size, file.data(), sizeof header_size);
  const std::uint64_t after_length = file.size() - sizeof header_size;
  if (header_size > largest_header || header_size > after_length) {
    return Parsed::failure("the header claims %llu bytes, %llu bytes follow", static_cast<unsigned long long>(header_size),
                           static_cast<unsigned long long>(after_length));
  }
  const std::uint64_t data_size = after_length - header_size, data_begin = sizeof header_size + header_size;
  auto header = parse_json(std::span(file).subspan(sizeof header_size, header_size), "the safetensors header");
  if (!header) return Parsed::failure(header.error);

  Safetensors result;
  std::vector<std::pair<std::uint64_t, std::uint64_t>> covered;
  for (const auto& [name, entry] : header->items()) {
    if (name == "__metadata__") continue;
    auto tensor = detail::read_entry(name.c_str(), entry, data_size);
    if (!tensor) return Parsed::failure(tensor.error);
    covered.emplace_back(tensor->begin, tensor->end);
    tensor->begin += data_begin;
    tensor->end += data_begin;
    result.tensors.emplace(name, std::move(*tensor));
  }

  std::sort(covered.begin(), covered.end());
  std::uint64_t reached = 0;
  for (const auto& [begin, end] : covered) {
    if (begin != reached) {
      return Parsed::failure("tensor data %s at byte %llu", begin < reached ? "overlaps" : "has a hole",
                             static_cast<unsigned long long>(std::min(begin, reached)));
    }
    reached = end;
  }
  if (reached != data_size) {
    return Parsed::failure("the tensors cover %llu of %llu bytes of data", static_cast<unsigned long long>(reached),
                           static_cast<unsigned long long>(data_size));
  }
  result.file = std::move(file);
  return result;
}

// One tensor as fp32, row-major; the shape must be the expected one.
inline Result<std::vector<float>> read_floats(const Safetensors& file, const std::string& name,
                                              const std::vector<std::uint64_t>& shape) {
  using Floats = Result<std::vector<float>>;
  const auto at = file.tensors.find(name);
  if (at == file.tensors.end()) return Floats::failure("the tensor \"%s\" is missing", name.c_str());
  const StoredTensor& tensor = at->second;
  if (tensor.shape != shape) {
    const auto text = [](const std::vector<std::uint64_t>& axes) { return Json(axes).dump(); };
    return Floats::failure("the tensor \"%s\" has shape %.100s, the configuration asks for %s", name.c_str(),
                           text(tensor.shape).c_str(), text(shape).c_str());
  }
  const std::byte* const data = file.file.data() + tensor.begin;
  const std::uint64_t bytes = tensor.end - tensor.begin;
  if (tensor.dtype == Dtype::f32) {
    std::vector<float> values(bytes / sizeof(float));
    std::memcpy(values.data(), data, bytes);
    return values;
  }
  if (tensor.dtype == Dtype::bf16) {
    std::vector<float> values(bytes / sizeof(std::uint16_t));
    for (std::size_t i = 0; i < values.size(); ++i) {
      std::uint16_t upper_half = 0;   // a bf16 is the upper half of a float
      std::memcpy(&upper_half, data + i * sizeof upper_half, sizeof upper_half);
      values[i] = std::bit_cast<float>(std::uint32_t{upper_half} << 16);
    }
    return values;
  }
  return Floats::failure("the tensor \"%s\" is neither F32 nor BF16", name.c_str());
}

inline Result<Safetensors> load_safetensors(const std::filesystem::path& path) {
  auto bytes = read_file(path);
  if (!bytes) return Result<Safetensors>::failure(bytes.error);
  auto parsed = parse_safetensors(std::move(*bytes));
  if (!parsed) return Result<Safetensors>::failure("%s: %s", path.c_str(), parsed.error.c_str());
  return parsed;
}

}   // namespace generate
