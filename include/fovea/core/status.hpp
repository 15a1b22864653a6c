// SPDX-License-Identifier: Apache-2.0
// Status: an error is a value with the offending numbers in its message. Fixed buffer, never allocates.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#if defined(__cpp_exceptions)
#include <stdexcept>
#endif

#include "config.hpp"

namespace fovea {
inline namespace v0 {

enum class Code : std::uint8_t {
  ok,
  invalid_argument,      // the call contradicts itself or the contract
  unsupported,           // a fair wish this build cannot fulfil; the message says which axis
  workspace_too_small,   // the caller's buffer is smaller than workspace_bytes
  out_of_memory,         // the system gave no memory for a container
  out_of_pages,          // a cache has no page, slot or sequence left; it is as it was before the call
};

class [[nodiscard]] Status {
 public:
  // Only the first character is cleared: a warm call makes some twenty of these.
  FOVEA_DATA_INLINE Status() { text_[0] = 0; }

  // printf's words: %td for an index_t. A message longer than the buffer is cut, never overrun.
  template <class... Values>
  FOVEA_DATA_INLINE static Status error(Code code, const char* format, Values... values) {
    Status status;
    status.code_ = code;
    if constexpr (sizeof...(Values) == 0) {
      std::snprintf(status.text_, sizeof status.text_, "%s", format);
    } else {
      std::snprintf(status.text_, sizeof status.text_, format, values...);
    }
    return status;
  }

  FOVEA_DATA_INLINE bool ok() const { return code_ == Code::ok; }
  FOVEA_DATA_INLINE Code code() const { return code_; }
  FOVEA_DATA_INLINE const char* message() const { return text_; }

  // For who likes exceptions; without them (-fno-exceptions) an error prints its message and aborts.
  FOVEA_DATA_INLINE void or_throw() const {
    if (ok()) return;
#if defined(__cpp_exceptions)
    throw std::runtime_error(text_);
#else
    std::fprintf(stderr, "%s\n", text_);
    std::abort();
#endif
  }

 private:
  Code code_ = Code::ok;
  char text_[239];
};

}   // namespace v0
}   // namespace fovea
