// SPDX-License-Identifier: Apache-2.0
// Independent tasks to the lanes of an executor, from one counter: what the projections around attention need of threads.
#pragma once
#include <algorithm>
#include <atomic>

#include "../core/executor.hpp"
#include "../core/status.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

inline constexpr int kMaxLanes = 1 << 16;
inline Status check_lanes(const Executor& executor) {
  if (executor.lanes() >= 1 && executor.lanes() <= kMaxLanes) return {};
  return Status::error(Code::invalid_argument, "fovea: an executor has 1 to %d lanes, this one %d", kMaxLanes,
                       executor.lanes());
}

// f(lane, task) once for every task; at most `lanes` at a time, each with a lane of its own.
template <class F>
void deal(const Executor& executor, int lanes, index_t tasks, const F& f) {
  const int used = static_cast<int>(std::min<index_t>(lanes, tasks));
  if (used <= 1) {
    for (index_t task = 0; task < tasks; ++task) f(0, task);
    return;
  }
  std::atomic<index_t> next{0};
  const auto draw = [&](int lane) {
    for (index_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) f(lane, task);
  };
  executor.run(used, draw);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
