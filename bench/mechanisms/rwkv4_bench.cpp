// SPDX-License-Identifier: Apache-2.0
// RWKV-4: two exponentials and a reciprocal per channel and token.
#include "fovea/mechanisms/rwkv4.hpp"

#include "baselines/scalar_scan.hpp"
#include "fovea/reference/rwkv4.hpp"
#include "support/scan_row.hpp"

namespace fovea_bench {
namespace {

ScanWork make(const ScanShape& shape, const ScanTensors& x) {
  const index_t len = shape.len, channels = shape.channels;
  const float* const k = x.inputs.data();
  const float* const v = k + len * channels;
  const float* const u = v + len * channels;
  const auto w = made_floats(channels, [&](index_t c) { return -0.5f + 0.45f * u[c]; });
  const auto state = made_floats(3 * channels, [](index_t) { return 0.f; });
  ScanWork work;
  work.call = [=] {
    return fovea::rwkv4(fovea::bhsd(k, 1, 1, len, channels), fovea::bhsd(v, 1, 1, len, channels),
                        {{w->data(), {1, channels}, {channels, 1}}, {u, {1, channels}, {channels, 1}}}, x.out,
                        {.final_state = fovea::bhsd(state->data(), 1, 1, 3, channels), .executor = x.executor});
  };
  work.scalar = [=] {
    fovea_baselines::scalar_rwkv4({len, channels, 1}, k, v, w->data(), u, state->data(), x.out.data);
  };
  work.reference = [=](const fovea::Tensor<double>& out) {
    const index_t few = out.extent[3];
    const std::vector<double> wide_k = sampled(k, len, channels), wide_v = sampled(v, len, channels),
                              wide_w(w->begin(), w->begin() + few), wide_u(u, u + few);
    fovea::reference::rwkv4(fovea::bhsd(wide_k.data(), 1, 1, len, few), fovea::bhsd(wide_v.data(), 1, 1, len, few),
                            {{wide_w.data(), {1, few}, {few, 1}}, {wide_u.data(), {1, few}, {few, 1}}}, out);
  };
  return work;
}

}   // namespace

std::vector<Group> rwkv4_groups(int max_threads) {
  ScanMechanism mechanism{"rwkv4", 2, 2, make};
  return scan_groups(mechanism, 1, max_threads);
}

}   // namespace fovea_bench
