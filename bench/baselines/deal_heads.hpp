// SPDX-License-Identifier: Apache-2.0
// How both baselines use threads: the lanes of an executor draw heads one by one.
#pragma once
#include <atomic>
#include <vector>

#include "fovea/core/executor.hpp"
#include "fovea/core/view.hpp"

namespace fovea_baselines {

// one_head(batch, q_head, scratch) for every head of q. The scratch memory belongs to a thread and is kept between calls, so
// that a baseline is not charged for the allocator.
template <class F>
void deal_heads(const fovea::Executor& executor, const fovea::Tensor<const float>& q, const F& one_head) {
  const fovea::index_t heads = q.extent[1], tasks = q.extent[0] * heads;
  std::atomic<fovea::index_t> next{0};
  auto lane = [&](int) {
    thread_local std::vector<float> scratch;
    for (fovea::index_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      one_head(task / heads, task % heads, scratch);
  };
  executor.run(fovea::LaneFunction(lane));
}

}  // namespace fovea_baselines
