// SPDX-License-Identifier: Apache-2.0
// The floating-point mode of a thread: a call may change it while it works, and must set it back on every thread.
#pragma once
#include <atomic>
#include <thread>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/core/executor.hpp"
#include "fovea/core/status.hpp"
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace test {

#if defined(__SSE__)
inline unsigned float_mode() { return _mm_getcsr() & ~0x3fu; }   // without the flags of what has happened

// A thread per lane in a mode of its own; counts those that come back in another.
struct ThreadsInMode {
  unsigned mode;
  std::atomic<int> lanes_run{0}, changed{0};

  void run(int lanes, fovea::LaneFunction f) {
    std::vector<std::thread> threads;
    for (int lane = 0; lane < lanes; ++lane) {
      threads.emplace_back([this, f, lane] {
        _mm_setcsr(mode);
        f(lane);
        ++lanes_run;
        if (float_mode() != mode) ++changed;
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
};
#endif

// call(executor) on the caller's thread and on others, in the default mode, flushing one way or the other, and rounding to 0.
template <class F>
void check_float_mode([[maybe_unused]] const F& call) {
#if defined(__SSE__)
  const unsigned before = _mm_getcsr();
  for (const unsigned mode : {0x1f80u, 0x9f80u, 0x1fc0u, 0x7f80u}) {
    INFO("mode " << mode);
    _mm_setcsr(mode);
    const fovea::Status serial = call(fovea::Executor());
    const unsigned own = float_mode();
    _mm_setcsr(mode);
    ThreadsInMode threads{mode};
    const fovea::Status pooled = call(fovea::Executor(threads, 3));
    const unsigned waiting = float_mode();
    _mm_setcsr(before);
    REQUIRE(serial.ok());
    REQUIRE(pooled.ok());
    CHECK(own == mode);
    CHECK(waiting == mode);
    CHECK(threads.lanes_run > 0);
    CHECK(threads.changed == 0);
  }
#endif
}

}  // namespace test
