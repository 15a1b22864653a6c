// SPDX-License-Identifier: Apache-2.0
// A small fork-join pool of std::thread for programs that have none: fovea::StdThreads pool(4);
// options.executor = {pool, pool.threads()}; The caller owns it; no thread exists that was not asked for here.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#include "../core/executor.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// `threads` counts the calling thread: StdThreads(4) starts three. A run while another is under way, from inside a lane or
// from a second thread, is done on the thread that asked, one lane after the other. Lanes must not throw.
class StdThreads {
 public:
  explicit StdThreads(int threads = static_cast<int>(std::thread::hardware_concurrency())) {
    for (int worker = 1; worker < threads; ++worker) workers_.emplace_back([this] { serve(); });
  }
  ~StdThreads() {
    stop_.store(true, std::memory_order_relaxed);
    wake_all();
    for (std::thread& worker : workers_) worker.join();
  }
  StdThreads(const StdThreads&) = delete;
  StdThreads& operator=(const StdThreads&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  void run(int lanes, LaneFunction f) {
    if (lanes <= 1 || workers_.empty() || busy_.exchange(true, std::memory_order_acquire)) {
      for (int lane = 0; lane < lanes; ++lane) f(lane);
      return;
    }
    job_ = &f;
    unfinished_.store(lanes, std::memory_order_relaxed);
    const std::uint64_t round = (tickets_.load(std::memory_order_relaxed) >> 32) + 1;
    tickets_.store(round << 32 | static_cast<std::uint64_t>(lanes), std::memory_order_release);
    wake_all();
    work();
    for (int spin = 0; unfinished_.load(std::memory_order_acquire) != 0 && spin < kSpins; ++spin) pause();
    for (int left = unfinished_.load(std::memory_order_acquire); left != 0;
         left = unfinished_.load(std::memory_order_acquire)) {
      unfinished_.wait(left, std::memory_order_acquire);
    }
    busy_.store(false, std::memory_order_release);
  }

 private:
  // Some 50 us of waiting awake (1000 pauses on an AMD EPYC VM): there a fork and join with a worker that is awake takes 1
  // us, with one that must be woken 44 us, and a decode step forks again after a few microseconds.
  static constexpr int kSpins = 1000;

  static void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
  }

  void wake_all() {
    wake_.fetch_add(1, std::memory_order_release);
    wake_.notify_all();
  }

  // Takes lanes until none is left. The round is in the same word as the lanes left, so a worker that comes late can neither
  // take a lane of a round that is over nor read the job of one that has not begun.
  void work() {
    std::uint64_t ticket = tickets_.load(std::memory_order_acquire);
    while ((ticket & 0xffffffffu) != 0) {
      if (!tickets_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel, std::memory_order_acquire))
        continue;
      (*job_)(static_cast<int>((ticket - 1) & 0xffffffffu));
      if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_all();
      ticket = tickets_.load(std::memory_order_acquire);
    }
  }

  void serve() {
    int seen = 0;
    while (!stop_.load(std::memory_order_relaxed)) {
      work();
      for (int spin = 0; wake_.load(std::memory_order_acquire) == seen && spin < kSpins; ++spin) pause();
      wake_.wait(seen, std::memory_order_acquire);
      seen = wake_.load(std::memory_order_acquire);
    }
  }

  alignas(64) std::atomic<std::uint64_t> tickets_{0};   // round << 32 | lanes not yet taken
  alignas(64) std::atomic<int> unfinished_{0};
  alignas(64) std::atomic<int> wake_{0};
  std::atomic<bool> busy_{false}, stop_{false};
  LaneFunction* job_ = nullptr;
  std::vector<std::thread> workers_;   // last: the threads start when everything they touch exists
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
