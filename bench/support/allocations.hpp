// SPDX-License-Identifier: Apache-2.0
// How often the heap was asked for memory, by any thread of this program. Counted with glibc only.
#pragma once

namespace fovea_bench {

bool allocations_are_counted();
long allocations_so_far();

}  // namespace fovea_bench
