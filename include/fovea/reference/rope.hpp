// SPDX-License-Identifier: Apache-2.0
// Rotary position embedding as plain loops in double, in the letters of the papers and of the code models were trained with.
// Inputs are trusted.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <complex>
#include <numbers>
#include <vector>

#include "../core/rope.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// theta_m of RoFormer, stretched: radians per position of each pair.
inline std::vector<double> rope_frequencies(const RopeOptions& options) {
  const auto dim = static_cast<double>(options.rotary_dim), len = static_cast<double>(options.original_len);
  const double factor = options.factor;
  std::vector<double> theta;
  for (index_t m = 0; m < options.rotary_dim / 2; ++m) {
    const auto pair = static_cast<double>(m);
    const double plain = 1 / std::pow(options.base, 2 * pair / dim), wavelength = 2 * std::numbers::pi / plain;

    switch (options.scaling) {
      case RopeScaling::none:
        theta.push_back(plain);
        break;

      // Positional interpolation (Chen et al. 2023, arXiv 2306.15595): positions are divided, here the frequencies.
      case RopeScaling::linear:
        theta.push_back(plain / factor);
        break;

      // NTK-aware: a larger base, so that the slowest pair is interpolated and the fastest is not (bloc97, 2023).
      case RopeScaling::ntk:
        theta.push_back(1 / std::pow(options.base * std::pow(factor, dim / (dim - 2)), 2 * pair / dim));
        break;
      case RopeScaling::dynamic_ntk: {
        const double now = std::max(static_cast<double>(options.current_len), len);
        const double base = options.base * std::pow(factor * now / len - (factor - 1), dim / (dim - 2));
        theta.push_back(1 / std::pow(base, 2 * pair / dim));
        break;
      }

      // YaRN (Peng et al. 2023, arXiv 2309.00071): pairs that turn more than beta_fast times within the training length
      // stay, those that turn less than beta_slow times are interpolated, a linear ramp over the pairs between.
      case RopeScaling::yarn: {
        double low = dim * std::log(len / (options.beta_fast * 2 * std::numbers::pi)) / (2 * std::log(options.base));
        double high = dim * std::log(len / (options.beta_slow * 2 * std::numbers::pi)) / (2 * std::log(options.base));
        if (options.round_range) low = std::floor(low), high = std::ceil(high);
        low = std::max(low, 0.);
        high = std::min(high, dim - 1);
        if (low == high) high += 0.001;
        const double interpolated = std::clamp((pair - low) / (high - low), 0., 1.);
        theta.push_back(plain / factor * interpolated + plain * (1 - interpolated));
        break;
      }

      // Llama 3.1 (Grattafiori et al. 2024, arXiv 2407.21783), by wavelength.
      case RopeScaling::llama3: {
        const double longest = len / options.low_freq_factor, shortest = len / options.high_freq_factor;
        if (wavelength < shortest) {
          theta.push_back(plain);
        } else if (wavelength > longest) {
          theta.push_back(plain / factor);
        } else {
          const double smooth =
              (len / wavelength - options.low_freq_factor) / (options.high_freq_factor - options.low_freq_factor);
          theta.push_back((1 - smooth) * plain / factor + smooth * plain);
        }
        break;
      }

      // LongRoPE (Ding et al. 2024, arXiv 2402.13753): a searched factor per pair.
      case RopeScaling::longrope:
        theta.push_back(1 / (options.pair_factors[static_cast<std::size_t>(m)] * std::pow(options.base, 2 * pair / dim)));
        break;
    }
  }
  return theta;
}

inline double rope_attention_factor(const RopeOptions& options) {
  if (options.attention_factor) return *options.attention_factor;
  if (options.factor <= 1) return 1;
  if (options.scaling == RopeScaling::yarn) return 0.1 * std::log(options.factor) + 1;
  if (options.scaling == RopeScaling::longrope)
    return std::sqrt(1 + std::log(options.factor) / std::log(static_cast<double>(options.original_len)));
  return 1;
}

// For each pair, which of (time, height, width) it follows.
inline std::vector<int> rope_axes(const RopeOptions& options) {
  const auto pairs = static_cast<std::size_t>(options.rotary_dim / 2);
  std::vector<int> axes;
  if (options.sections.interleaved) {   // Qwen3-VL: all time, then every third one overwritten
    axes.assign(pairs, 0);
    for (index_t m = 1; m < 3 * options.sections.pairs[1]; m += 3) axes[static_cast<std::size_t>(m)] = 1;
    for (index_t m = 2; m < 3 * options.sections.pairs[2]; m += 3) axes[static_cast<std::size_t>(m)] = 2;
  } else {   // Qwen2-VL: three blocks
    for (std::size_t axis = 0; axis < 3; ++axis) {
      for (index_t n = 0; n < options.sections.pairs[axis]; ++n) axes.push_back(static_cast<int>(axis));
    }
    axes.resize(pairs, 0);
  }
  return axes;
}

// One vector at the position pos (three equal numbers unless it is M-RoPE): each pair, as a complex number, is multiplied by
// attention_factor * e^(i angle).
template <class Real>
void rope_row(const Real* x, double* out, index_t dim, std::array<index_t, 3> pos, const RopeOptions& options,
              RopeLayout layout) {
  const std::vector<double> theta = rope_frequencies(options);
  const std::vector<int> axes = rope_axes(options);
  const double attention_factor = rope_attention_factor(options);
  for (index_t d = 0; d < dim; ++d) out[d] = static_cast<double>(x[d]);
  for (index_t m = 0; m < options.rotary_dim / 2; ++m) {
    const auto at = static_cast<std::size_t>(m);
    const index_t first = layout == RopeLayout::interleaved ? 2 * m : m;
    const index_t second = layout == RopeLayout::interleaved ? 2 * m + 1 : m + options.rotary_dim / 2;
    const double angle = static_cast<double>(pos[static_cast<std::size_t>(axes[at])]) * theta[at];
    const std::complex<double> z = std::complex<double>(static_cast<double>(x[first]), static_cast<double>(x[second])) *
                                   std::polar(attention_factor, angle);
    out[first] = z.real();
    out[second] = z.imag();
  }
}

// A tensor whose token i of batch entry b has position ids(b, i).
inline void rope(Tensor<const float> x, Tensor<double> out, View<const index_t, 2> ids, const RopeOptions& options,
                 RopeLayout layout) {
  std::vector<float> row(static_cast<std::size_t>(x.extent[3]));
  std::vector<double> turned(row.size());
  for (index_t b = 0; b < x.extent[0]; ++b) {
    for (index_t h = 0; h < x.extent[1]; ++h) {
      for (index_t i = 0; i < x.extent[2]; ++i) {
        for (index_t d = 0; d < x.extent[3]; ++d) row[static_cast<std::size_t>(d)] = x(b, h, i, d);
        const index_t pos = ids(ids.extent[0] == 1 ? 0 : b, i);
        rope_row(row.data(), turned.data(), x.extent[3], {pos, pos, pos}, options, layout);
        for (index_t d = 0; d < x.extent[3]; ++d) out(b, h, i, d) = turned[static_cast<std::size_t>(d)];
      }
    }
  }
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
