// SPDX-License-Identifier: Apache-2.0
// What every numbered example needs: numbers to work on, and a check against the naive double reference.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fovea/attention.hpp>
#include <fovea/reference/softmax.hpp>
#include <fovea/reference/variant.hpp>
#include <random>
#include <vector>

namespace example {

using fovea::index_t;

inline std::vector<float> random_values(index_t count, unsigned seed) {
  std::mt19937 bits(seed);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = static_cast<float>(bits()) * 0x1p-31f - 1.f;
  return values;
}

// Largest difference between `out` and what `compute` writes into a tensor of doubles.
template <class Compute>
double difference(fovea::Tensor<const float> out, const Compute& compute) {
  const auto [batch, heads, len, dim] = out.extent;
  std::vector<double> expected(static_cast<std::size_t>(batch * heads * len * dim));
  const auto reference = fovea::bhsd(expected.data(), batch, heads, len, dim);
  compute(reference);
  double largest = 0;
  for (index_t b = 0; b < batch; ++b) {
    for (index_t h = 0; h < heads; ++h) {
      for (index_t i = 0; i < len; ++i) {
        for (index_t d = 0; d < dim; ++d) {
          const double distance = std::abs(double{out(b, h, i, d)} - reference(b, h, i, d));
          if (!(distance <= largest)) largest = distance;   // a NaN is a difference too
        }
      }
    }
  }
  return largest;
}

// Against the same call done as plain loops in double.
inline double error_of(fovea::Tensor<const float> q, fovea::Tensor<const float> k, fovea::Tensor<const float> v,
                       fovea::Tensor<const float> out, const fovea::AttentionOptions& options = {}) {
  return difference(out, [&](fovea::Tensor<double> to) { fovea::reference::softmax(q, k, v, to, options); });
}

// The exit status of an example. Outputs are averages of values in [-1, 1]; fp32 is good for some 1e-7 of that, so 1e-5
// leaves room for long rows and none for a wrong key.
inline int verdict(const char* what, double error, double limit = 1e-5) {
  const bool good = error <= limit;
  std::printf("%s: largest error %.1e, %s\n", what, error, good ? "ok" : "WRONG");
  return good ? 0 : 1;
}

// Prints why a call was refused.
inline bool refused(const fovea::Status& status) {
  if (!status.ok()) std::printf("refused: %s\n", status.message());
  return !status.ok();
}

}   // namespace example
