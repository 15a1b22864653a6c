// SPDX-License-Identifier: Apache-2.0
// Kimi Delta Attention.
#include "fovea/mechanisms/kda.hpp"

#include "fovea/reference/kda.hpp"
#include "support/recurrent_row.hpp"

namespace fovea_bench {

std::vector<Group> kda_groups(int max_threads) {
  RecurrentMechanism mechanism;
  mechanism.name = "kda";
  mechanism.work = Work::delta;
  // Log decay; beta: keys are not normalised, |k|^2 is near 43, so beta |k|^2 is in [0, 0.67).
  mechanism.extra = {{.low = -0.1f, .high = 0.f, .width = ExtraInput::kDimK}, {.low = 0.f, .high = 1.f / 64}};
  mechanism.call = [](const RecurrentCall<float>& x) {
    return fovea::kda(x.q, x.k, x.v, {x.extra[0]}, x.extra[1], x.out, x.options);
  };
  mechanism.reference = [](const RecurrentCall<double>& x) {
    fovea::reference::kda(x.q, x.k, x.v, {x.extra[0]}, x.extra[1], x.out, x.options);
  };
  mechanism.scalar = [](const ScalarToken& x) {
    x.decay_by_exp(x.extra[0]);
    fovea_baselines::scalar_delta_step(x, *x.extra[1], x.inverse_root());
  };
  RecurrentShapes shapes;
  shapes.v_first = shapes.bf16_on_two_threads = shapes.longest = shapes.forms = true;
  return recurrent_groups(mechanism, shapes, max_threads);
}

}   // namespace fovea_bench
