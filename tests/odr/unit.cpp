// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set; ODR_UNIT names the copy.
#include "unit.hpp"

#define ODR_NAME(unit, what)  ODR_NAME_(unit, what)
#define ODR_NAME_(unit, what) odr_##unit##_##what

bool ODR_NAME(ODR_UNIT, run)(const Problem& problem) {
  return fovea::attention(problem.q, problem.k, problem.v, problem.out, problem.options).ok();
}
const char* ODR_NAME(ODR_UNIT, arch)() { return FOVEA_ARCH_NAME; }
