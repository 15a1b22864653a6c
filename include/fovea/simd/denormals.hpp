// SPDX-License-Identifier: Apache-2.0
// Products of factors below 1 fade through the denormals, where every operation costs a hundred cycles. While one of these
// lives, this thread reads and writes them as 0; what was set before is set again after.
#pragma once
#include <cstdint>

#include "../core/types.hpp"
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

class FlushDenormals {
 public:
#if defined(__SSE__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }   // flush to zero, denormals are zero
  ~FlushDenormals() { _mm_setcsr(before_); }
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" ::"r"(before_ | (std::uint64_t{1} << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }
#else
  FlushDenormals() {}
#endif
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
#if defined(__SSE__)
  unsigned before_;
#elif defined(__aarch64__)
  std::uint64_t before_ = 0;
#endif
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
