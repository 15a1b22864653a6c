// SPDX-License-Identifier: Apache-2.0
// expect: fovea: a score is a policy or a callable
// expect: see docs/variants.md#functors
// A score functor that only takes numbers: kernels call it with vectors.
#include <fovea/attention.hpp>

int main() {
#if defined(FOVEA_MUST_COMPILE)
  const auto score = [](auto s, int, int, int, auto) { return s * 0.5f; };
#else
  const auto score = [](double s, int, int, int, int) { return s * 0.5; };
#endif
  const auto halved = fovea::variant().with_score(score);
  return sizeof halved == 0;
}
