// SPDX-License-Identifier: Apache-2.0
// A value or a plain message. Files come from strangers: what is wrong with one is a value, not an exception or a crash.
#pragma once
#include <cstdio>
#include <optional>
#include <string>
#include <utility>

namespace generate {

template <class T>
struct Result {
  std::optional<T> value;
  std::string error;

  Result(T&& good) : value(std::move(good)) {}

  template <class... Values>
  static Result failure(const char* format, Values... values) {
    char text[512];
    if constexpr (sizeof...(Values) == 0) {
      std::snprintf(text, sizeof text, "%s", format);
    } else {
      std::snprintf(text, sizeof text, format, values...);
    }
    return Result(text);
  }
  // Passes another result's message on.
  static Result failure(const std::string& message) { return Result(message.c_str()); }

  explicit operator bool() const { return value.has_value(); }
  T& operator*() { return *value; }
  T* operator->() { return &*value; }

 private:
  explicit Result(const char* message) : error(message) {}
};

}   // namespace generate
