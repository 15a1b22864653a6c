// SPDX-License-Identifier: Apache-2.0
// Executor over OpenMP: fovea::OpenMp pool; options.executor = {pool, pool.threads()};
//
// OpenMP may grant fewer threads than were asked for: inside a parallel region (nesting is off by default), under a thread
// limit, or when `dynamic` is on. The lanes are therefore dealt over the team that really came.
#pragma once
#if !defined(_OPENMP)
#error "fovea: adapters/openmp.hpp needs a compiler with OpenMP switched on (-fopenmp)"
#endif
#include <omp.h>

#include "../core/executor.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

class OpenMp {
 public:
  explicit OpenMp(int threads = omp_get_max_threads()) : threads_(threads < 1 ? 1 : threads) {}

  int threads() const { return threads_; }

  void run(int lanes, LaneFunction f) {
    const int wanted = lanes < threads_ ? lanes : threads_;
    if (wanted <= 1) {
      for (int lane = 0; lane < lanes; ++lane) f(lane);
      return;
    }
#pragma omp parallel num_threads(wanted)
    {
      const int granted = omp_get_num_threads();
      for (int lane = omp_get_thread_num(); lane < lanes; lane += granted) f(lane);
    }
  }

 private:
  int threads_;
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
