// SPDX-License-Identifier: Apache-2.0
// Executor over Eigen::ThreadPool: fovea::EigenPool pool(eigen_pool); options.executor = {pool, pool.threads()};
#pragma once
#include <atomic>
#include <memory>

#if !defined(EIGEN_USE_THREADS)
#define EIGEN_USE_THREADS
#endif
#include <unsupported/Eigen/CXX11/ThreadPool>

#include "../core/executor.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// The calling thread works too, and waits only for lanes that a pool thread has begun. So a call from inside the pool, even
// one in which every pool thread is busy, ends: what nobody else took the caller runs itself.
class EigenPool {
 public:
  explicit EigenPool(Eigen::ThreadPoolInterface& pool) : pool_(&pool) {}

  // The pool's threads and the caller; a caller that is itself one of the pool's threads is not counted twice.
  int threads() const { return pool_->NumThreads() + (pool_->CurrentThreadId() < 0 ? 1 : 0); }

  // Costs one small allocation for the shared counters, and Eigen's own per scheduled function: a helper that the pool
  // starts after this call has returned still finds its counters alive.
  void run(int lanes, LaneFunction f) {
    const int most = threads() - 1;
    const int helpers = lanes - 1 < most ? lanes - 1 : most;
    if (helpers <= 0) {
      for (int lane = 0; lane < lanes; ++lane) f(lane);
      return;
    }
    const auto shared = std::make_shared<Shared>(lanes);
    for (int helper = 0; helper < helpers; ++helper) {
      pool_->Schedule([shared, f] { shared->work(f); });
    }
    shared->work(f);
    for (int left = shared->unfinished.load(std::memory_order_acquire); left != 0;
         left = shared->unfinished.load(std::memory_order_acquire)) {
      shared->unfinished.wait(left, std::memory_order_acquire);
    }
  }

 private:
  struct Shared {
    explicit Shared(int count) : lanes(count), unfinished(count) {}

    // `f` borrows from the caller of run, who is gone when all lanes are done: it is called only for a lane just taken.
    void work(LaneFunction f) {
      for (int lane = next.fetch_add(1, std::memory_order_relaxed); lane < lanes;
           lane = next.fetch_add(1, std::memory_order_relaxed)) {
        f(lane);
        if (unfinished.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished.notify_all();
      }
    }

    const int lanes;
    std::atomic<int> next{0};
    std::atomic<int> unfinished;
  };

  Eigen::ThreadPoolInterface* pool_;
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
