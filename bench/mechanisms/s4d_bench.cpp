// SPDX-License-Identifier: Apache-2.0
// S4D: 32 complex modes a channel, the default of its layers.
#include "fovea/mechanisms/s4d.hpp"

#include "baselines/scalar_scan.hpp"
#include "fovea/reference/s4d.hpp"
#include "support/scan_row.hpp"

namespace fovea_bench {
namespace {

ScanWork make(const ScanShape& shape, const ScanTensors& x) {
  const index_t len = shape.len, channels = shape.channels, modes = shape.modes;
  const float* const u = x.inputs.data();
  const float* const c_real = u + len * channels;
  const float* const c_imag = c_real + channels * modes;
  const float* const d = c_imag + channels * modes;
  // As S4D begins: -1/2 + i pi n, dt of 0.001 to 0.1.
  const auto log_a_real = made_floats(channels * modes, [](index_t) { return std::log(0.5f); });
  const auto a_imag = made_floats(channels * modes, [&](index_t i) { return 3.14159265f * static_cast<float>(i % modes); });
  const auto log_dt = made_floats(channels, [&](index_t c) { return -4.6f + 2.3f * d[c]; });
  const auto state = made_floats(2 * channels * modes, [](index_t) { return 0.f; });
  ScanWork work;
  work.call = [=] {
    const auto rows = [&](const float* numbers) {
      return fovea::View<const float, 2>{numbers, {channels, modes}, {modes, 1}};
    };
    return fovea::s4d(fovea::bhsd(u, 1, 1, len, channels),
                      {rows(log_a_real->data()),
                       rows(a_imag->data()),
                       rows(c_real),
                       rows(c_imag),
                       *log_dt,
                       {d, static_cast<std::size_t>(channels)},
                       {},
                       fovea::bhsd(state->data(), 1, channels, modes, 2)},
                      x.out, {.executor = x.executor});
  };
  work.scalar = [=] {
    fovea_baselines::scalar_s4d({len, channels, modes}, u, log_a_real->data(), a_imag->data(), c_real, c_imag, log_dt->data(), d,
                                state->data(), x.out.data);
  };
  work.reference = [=](const fovea::Tensor<double>& y) {
    const index_t few = y.extent[3];
    const auto wide = [&](const float* numbers, index_t count) { return std::vector<double>(numbers, numbers + count); };
    const std::vector<double> wide_u = sampled(u, len, channels), wide_log_a = wide(log_a_real->data(), few * modes),
                              wide_a = wide(a_imag->data(), few * modes), wide_c_real = wide(c_real, few * modes),
                              wide_c_imag = wide(c_imag, few * modes), wide_log_dt = wide(log_dt->data(), few),
                              wide_d = wide(d, few);
    const auto rows = [&](const std::vector<double>& numbers) {
      return fovea::View<const double, 2>{numbers.data(), {few, modes}, {modes, 1}};
    };
    fovea::reference::s4d(
        fovea::bhsd(wide_u.data(), 1, 1, len, few),
        {rows(wide_log_a), rows(wide_a), rows(wide_c_real), rows(wide_c_imag), wide_log_dt, wide_d, {}, {}}, y);
  };
  return work;
}

}   // namespace

std::vector<Group> s4d_groups(int max_threads) {
  ScanMechanism mechanism{"s4d", 1, 0, make};
  return scan_groups(mechanism, 32, max_threads);
}

}   // namespace fovea_bench
