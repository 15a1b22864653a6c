// SPDX-License-Identifier: Apache-2.0
// expect: deleted
// A prepared run refers to its variant, so a temporary one would be gone when the lanes run.
#include <fovea/attention.hpp>

fovea::Status prepared(fovea::AttentionRun& run, const fovea::Plan& plan, fovea::Tensor<const float> x, fovea::Tensor<float> out) {
  const auto variant = fovea::variant();
#if defined(FOVEA_MUST_COMPILE)
  return fovea::prepare(run, plan, x, x, x, out, {}, variant);
#else
  return fovea::prepare(run, plan, x, x, x, out, {}, fovea::variant());
#endif
}
