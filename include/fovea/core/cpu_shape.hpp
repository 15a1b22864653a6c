// SPDX-License-Identifier: Apache-2.0
// What the planner may know of the machine. It moves work between tasks, never a bit of a result.
#pragma once
#include "types.hpp"

namespace fovea {
inline namespace v0 {

struct CpuShape {
  index_t l2_bytes = 1 << 20;   // per core; Q, K, V and the accumulators of a task should fit into it
};

}   // namespace v0
}   // namespace fovea
