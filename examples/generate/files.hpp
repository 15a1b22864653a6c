// SPDX-License-Identifier: Apache-2.0
// Whole files into memory, and JSON whose every surprise becomes a message.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <new>
#include <nlohmann/json.hpp>
#include <set>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "result.hpp"

namespace generate {

using Json = nlohmann::json;

// A sparse file may claim any size, and would be filled with zeros page by page.
inline constexpr std::uintmax_t kMaxFileBytes = std::uintmax_t{4} << 30;

inline Result<std::vector<std::byte>> read_file(const std::filesystem::path& path) {
  using Bytes = Result<std::vector<std::byte>>;
  std::error_code code;
  const std::uintmax_t size = std::filesystem::is_regular_file(path, code) ? std::filesystem::file_size(path, code) : 0;
  std::ifstream file(path, std::ios::binary);
  if (code || !file || !std::filesystem::is_regular_file(path, code)) return Bytes::failure("cannot read %s", path.c_str());
  if (size > kMaxFileBytes) {
    return Bytes::failure("%s has %llu bytes, more than %llu", path.c_str(), static_cast<unsigned long long>(size),
                          static_cast<unsigned long long>(kMaxFileBytes));
  }
  std::vector<std::byte> bytes;
  try {
    bytes.resize(static_cast<std::size_t>(size));
  } catch (const std::bad_alloc&) {
    return Bytes::failure("%s: no memory for its %llu bytes", path.c_str(), static_cast<unsigned long long>(size));
  }
  file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(size));
  if (static_cast<std::uintmax_t>(file.gcount()) != size) return Bytes::failure("%s ends early", path.c_str());
  return bytes;
}

// A JSON object without duplicate keys at its top: two readers of one file must not see two different values.
inline Result<Json> parse_json(std::span<const std::byte> bytes, const char* what) {
  const char* const text = reinterpret_cast<const char*>(bytes.data());
  // The parser takes a zero byte for the end of the text and would not look at what follows.
  if (std::find(bytes.begin(), bytes.end(), std::byte{0}) != bytes.end())
    return Result<Json>::failure("%s contains a zero byte", what);
  std::set<std::string> seen;
  std::string duplicate;
  const auto watch = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth == 1 && event == Json::parse_event_t::key && !seen.insert(parsed.get<std::string>()).second) {
      duplicate = parsed.get<std::string>();
    }
    return true;
  };
  try {
    Json json = Json::parse(text, text + bytes.size(), watch);
    if (!json.is_object()) return Result<Json>::failure("%s is not a JSON object", what);
    if (!duplicate.empty()) return Result<Json>::failure("%s names \"%.80s\" twice", what, duplicate.c_str());
    return json;
  } catch (const Json::exception& problem) {
    return Result<Json>::failure("%s is not valid JSON: %.200s", what, problem.what());
  }
}

// A whole number without a sign or fraction, at most `limit`.
inline bool read_unsigned(const Json& json, std::uint64_t limit, std::uint64_t& number) {
  if (!json.is_number_unsigned()) return false;
  number = json.get<std::uint64_t>();
  return number <= limit;
}

}   // namespace generate
