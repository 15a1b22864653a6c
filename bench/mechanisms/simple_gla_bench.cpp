// SPDX-License-Identifier: Apache-2.0
// Simple GLA: one gate per token and head.
#include "fovea/mechanisms/simple_gla.hpp"

#include "fovea/reference/simple_gla.hpp"
#include "support/recurrent_row.hpp"

namespace fovea_bench {

std::vector<Group> simple_gla_groups(int max_threads) {
  RecurrentMechanism mechanism;
  mechanism.name = "simple_gla";
  mechanism.extra = {{.low = -0.1f, .high = 0.f}};   // log decay
  mechanism.call = [](const RecurrentCall<float>& x) {
    return fovea::simple_gla(x.q, x.k, x.v, {x.extra[0]}, x.out, x.options);
  };
  mechanism.reference = [](const RecurrentCall<double>& x) {
    fovea::reference::simple_gla(x.q, x.k, x.v, {x.extra[0]}, x.out, x.options);
  };
  mechanism.scalar = [](const ScalarToken& x) {
    x.decay_by(std::exp(*x.extra[0]));
    fovea_baselines::scalar_decay_step(x, 1.f, x.inverse_root());
  };
  return recurrent_groups(mechanism, {.longest = true, .forms = true}, max_threads);
}

}   // namespace fovea_bench
