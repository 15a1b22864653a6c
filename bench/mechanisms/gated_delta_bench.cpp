// SPDX-License-Identifier: Apache-2.0
// Gated DeltaNet with the heads of Qwen3-Next: 16 of queries and keys, 32 of values.
#include "fovea/mechanisms/gated_delta.hpp"

#include "fovea/reference/gated_delta.hpp"
#include "support/recurrent_row.hpp"

namespace fovea_bench {

std::vector<Group> gated_delta_groups(int max_threads) {
  RecurrentMechanism mechanism;
  mechanism.name = "gated_delta";
  mechanism.work = Work::delta;
  // Log decay; beta: keys are not normalised, |k|^2 is near 43, so beta |k|^2 is in [0, 0.67).
  mechanism.extra = {{.low = -0.1f, .high = 0.f}, {.low = 0.f, .high = 1.f / 64}};
  mechanism.call = [](const RecurrentCall<float>& x) {
    return fovea::gated_delta_net(x.q, x.k, x.v, {x.extra[0]}, x.extra[1], x.out, x.options);
  };
  mechanism.reference = [](const RecurrentCall<double>& x) {
    fovea::reference::gated_delta(x.q, x.k, x.v, {x.extra[0]}, x.extra[1], x.out, x.options);
  };
  mechanism.scalar = [](const ScalarToken& x) {
    x.decay_by(std::exp(*x.extra[0]));
    fovea_baselines::scalar_delta_step(x, *x.extra[1], x.inverse_root());
  };
  RecurrentShapes shapes;
  shapes.qk_heads = 16;
  shapes.v_first = shapes.bf16_on_two_threads = shapes.token_major = shapes.longest = shapes.forms = true;
  return recurrent_groups(mechanism, shapes, max_threads);
}

}   // namespace fovea_bench
