// SPDX-License-Identifier: Apache-2.0
// The elementwise scans token by token as plain loops in fp32, from a state of zeros: what scalar_recurrence.hpp is to the others.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>

namespace fovea_baselines {

struct ScalarScan {
  std::ptrdiff_t len, channels, modes;
};

inline void scalar_mamba1(const ScalarScan& shape, const float* x,   // [pos, channel]
                          const float* dt,                           // [pos, channel]
                          const float* b, const float* c,            // [pos, mode]
                          const float* a,                            // [channel, mode]
                          const float* d,                            // [channel]
                          float* __restrict state,                   // [channel, mode]
                          float* __restrict y) {                     // [pos, channel]
  std::fill_n(state, shape.channels * shape.modes, 0.f);
  for (std::ptrdiff_t t = 0; t < shape.len; ++t, x += shape.channels, dt += shape.channels, y += shape.channels) {
    for (std::ptrdiff_t channel = 0; channel < shape.channels; ++channel) {
      float sum = d[channel] * x[channel];
      for (std::ptrdiff_t n = 0; n < shape.modes; ++n) {
        float& h = state[channel * shape.modes + n];
        h = std::exp(dt[channel] * a[channel * shape.modes + n]) * h + dt[channel] * b[t * shape.modes + n] * x[channel];
        sum += c[t * shape.modes + n] * h;
      }
      y[channel] = sum;
    }
  }
}

inline void scalar_rwkv4(const ScalarScan& shape, const float* k, const float* v,   // [pos, channel]
                         const float* w, const float* u,                            // [channel]
                         float* __restrict state,                                   // [3, channel]
                         float* __restrict out) {                                   // [pos, channel]
  const std::ptrdiff_t channels = shape.channels;
  float *const numerator = state, *const denominator = state + channels, *const largest = state + 2 * channels;
  std::fill_n(state, 2 * channels, 0.f);
  std::fill_n(largest, channels, -1e38f);
  for (std::ptrdiff_t t = 0; t < shape.len; ++t, k += channels, v += channels, out += channels) {
    for (std::ptrdiff_t c = 0; c < channels; ++c) {
      const float most = std::max(u[c] + k[c], largest[c]);
      const float past = std::exp(largest[c] - most), now = std::exp(u[c] + k[c] - most);
      out[c] = (past * numerator[c] + now * v[c]) / (past * denominator[c] + now);
      const float next = std::max(w[c] + largest[c], k[c]);
      const float decayed = std::exp(w[c] + largest[c] - next), written = std::exp(k[c] - next);
      numerator[c] = decayed * numerator[c] + written * v[c];
      denominator[c] = decayed * denominator[c] + written;
      largest[c] = next;
    }
  }
}

// A = -exp(log_a_real) + i a_imag; every factor once per call, as its parameters are given.
inline void scalar_s4d(const ScalarScan& shape, const float* u,                     // [pos, channel]
                       const float* log_a_real, const float* a_imag,                // [channel, mode]
                       const float* c_real, const float* c_imag,                    // [channel, mode]
                       const float* log_dt, const float* d,                         // [channel]
                       float* __restrict state,                                     // [channel, mode, 2]
                       float* __restrict y) {                                       // [pos, channel]
  for (std::ptrdiff_t channel = 0; channel < shape.channels; ++channel) {
    const float dt = std::exp(log_dt[channel]);
    for (std::ptrdiff_t t = 0; t < shape.len; ++t) y[t * shape.channels + channel] = d[channel] * u[t * shape.channels + channel];
    for (std::ptrdiff_t n = 0; n < shape.modes; ++n) {
      const std::ptrdiff_t at = channel * shape.modes + n;
      const float real = -std::exp(log_a_real[at]), imag = a_imag[at], size = std::exp(dt * real);
      const float factor_real = size * std::cos(dt * imag), factor_imag = size * std::sin(dt * imag);
      const float over = 1.f / (real * real + imag * imag);   // (factor - 1) / A, times C, times 2
      const float step_real = ((factor_real - 1.f) * real + factor_imag * imag) * over;
      const float step_imag = (factor_imag * real - (factor_real - 1.f) * imag) * over;
      const float read_real = 2.f * (c_real[at] * step_real - c_imag[at] * step_imag);
      const float read_imag = 2.f * (c_real[at] * step_imag + c_imag[at] * step_real);
      float s_real = 0.f, s_imag = 0.f;
      for (std::ptrdiff_t t = 0; t < shape.len; ++t) {
        const float before = s_real;
        s_real = factor_real * before - factor_imag * s_imag + u[t * shape.channels + channel];
        s_imag = factor_real * s_imag + factor_imag * before;
        y[t * shape.channels + channel] += read_real * s_real - read_imag * s_imag;
      }
      state[2 * at] = s_real;
      state[2 * at + 1] = s_imag;
    }
  }
}

}   // namespace fovea_baselines
