// SPDX-License-Identifier: Apache-2.0
// expect: fovea: -ffast-math / -ffinite-math-only break masks and empty rows
// flags: -ffast-math
#if defined(FOVEA_MUST_COMPILE)
#define FOVEA_ALLOW_FAST_MATH
#endif
#include <fovea/core/config.hpp>

int main() { return 0; }
