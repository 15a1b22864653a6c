// SPDX-License-Identifier: Apache-2.0
// Mamba-2: states of 128 x 64. B and C are one group for all heads, which is the default of its layers, or a group each.
#include "fovea/mechanisms/mamba2.hpp"

#include "fovea/reference/mamba2.hpp"
#include "support/recurrent_row.hpp"

namespace fovea_bench {
namespace {

template <class Real>
fovea::Mamba2Parameters<Real> parameters(const RecurrentCall<Real>& x) {
  const auto& d = x.extra[2];
  return {x.extra[0], x.per_head(1), {d.data, {d.extent[1], 1}, {1, 1}}};
}

}   // namespace

std::vector<Group> mamba2_groups(int max_threads) {
  RecurrentMechanism mechanism;
  mechanism.name = "mamba2";
  mechanism.extra = {{.low = 0.001f, .high = 0.1f},                      // dt
                     {.low = -16.f, .high = -1.f, .per_token = false},   // a
                     {.low = -1.f, .high = 1.f, .per_token = false}};    // d
  mechanism.call = [](const RecurrentCall<float>& x) {
    return fovea::mamba2(x.v, x.k, x.q, parameters(x), x.out, x.options);
  };
  mechanism.reference = [](const RecurrentCall<double>& x) {
    fovea::reference::mamba2(x.v, x.k, x.q, parameters(x), x.out, x.options);
  };
  mechanism.scalar = [](const ScalarToken& x) {
    const float dt = *x.extra[0];
    x.decay_by(std::exp(dt * *x.extra[1]));
    fovea_baselines::scalar_decay_step(x, dt, 1.f);
    for (std::ptrdiff_t j = 0; j < x.dim_v; ++j) x.out[j] += *x.extra[2] * x.v[j];
  };
  std::vector<Group> groups = recurrent_groups(mechanism, {.dim_v = 64, .qk_heads = 1, .v_first = true}, max_threads);
  RecurrentTable own_groups(mechanism, {.dim_v = 64}, max_threads);
  own_groups.add_prefill();
  for (Group& group : own_groups.take()) groups.push_back(std::move(group));
  return groups;
}

}   // namespace fovea_bench
