// SPDX-License-Identifier: Apache-2.0
// Mamba-1: one exponential per mode, channel and token, beside as many exponentials and nothing else.
#include "fovea/mechanisms/mamba1.hpp"

#include "baselines/scalar_scan.hpp"
#include "fovea/reference/mamba1.hpp"
#include "support/scan_row.hpp"

namespace fovea_bench {
namespace {

ScanWork make(const ScanShape& shape, const ScanTensors& x) {
  const index_t len = shape.len, channels = shape.channels, modes = shape.modes;
  const float* const u = x.inputs.data();
  const float* const b = u + len * channels;
  const float* const c = b + len * modes;
  const float* const skip = c + len * modes;
  // dt of 0.001 to 0.1 and A of -1 to -modes, as Mamba begins.
  const auto dt = made_floats(len * channels, [&](index_t i) { return 0.001f * std::pow(100.f, u[i] * 0.5f + 0.5f); });
  const auto a = made_floats(channels * modes, [&](index_t i) { return -static_cast<float>(i % modes + 1); });
  const auto state = made_floats(channels * modes, [](index_t) { return 0.f; });
  ScanWork work;
  work.call = [=] {
    const fovea::Mamba1Parameters<float> parameters{fovea::bhsd<const float>(dt->data(), 1, 1, len, channels),
                                                    {a->data(), {1, channels, modes}, {channels * modes, modes, 1}},
                                                    {skip, {1, channels}, {channels, 1}}};
    return fovea::mamba1(fovea::bhsd(u, 1, 1, len, channels), fovea::bhsd(b, 1, 1, len, modes),
                         fovea::bhsd(c, 1, 1, len, modes), parameters, x.out,
                         {.layout = fovea::StateLayout::v_first,
                          .final_state = fovea::bhsd(state->data(), 1, 1, channels, modes),
                          .executor = x.executor});
  };
  work.scalar = [=] {
    fovea_baselines::scalar_mamba1({len, channels, modes}, u, dt->data(), b, c, a->data(), skip, state->data(), x.out.data);
  };
  work.reference = [=](const fovea::Tensor<double>& y) {
    const index_t few = y.extent[3];
    const std::vector<double> wide_u = sampled(u, len, channels), wide_dt = sampled(dt->data(), len, channels),
                              wide_a(a->begin(), a->begin() + few * modes), wide_b(b, b + len * modes),
                              wide_c(c, c + len * modes), wide_skip(skip, skip + few);
    fovea::reference::mamba1(fovea::bhsd(wide_u.data(), 1, 1, len, few), fovea::bhsd(wide_b.data(), 1, 1, len, modes),
                             fovea::bhsd(wide_c.data(), 1, 1, len, modes),
                             {fovea::bhsd(wide_dt.data(), 1, 1, len, few),
                              {wide_a.data(), {1, few, modes}, {few * modes, modes, 1}},
                              {wide_skip.data(), {1, few}, {few, 1}}},
                             y);
  };
  return work;
}

}   // namespace

std::vector<Group> mamba1_groups(int max_threads) {
  ScanMechanism mechanism{"mamba1", 2, 16, make};
  return scan_groups(mechanism, 16, max_threads);
}

}   // namespace fovea_bench
