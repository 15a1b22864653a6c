// SPDX-License-Identifier: Apache-2.0
// Queries and keys of a prompt whose weights have the structure that selectors look for: they return at multiples of a
// period, as diagonals, and on some columns. With random numbers alone nothing is sparse and every selector chooses at
// random.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>
#include <span>

#include "fovea/core/view.hpp"
#include "memory.hpp"

namespace fovea_bench {

using fovea::index_t;

struct PlantedPrompt {
  index_t heads, len, dim;
  HugeBuffer q_bytes, k_bytes;
  std::span<float> q, k;   // [head, pos, dim]

  // `noise` holds 2 * heads * len * dim numbers in [-1, 1). A score is peak * cos(2 pi distance / period) and noise of
  // standard deviation 1/3; every column_step-th key gets column_score more from everybody.
  PlantedPrompt(std::span<const float> noise, index_t heads_, index_t len_, index_t dim_, double peak, double period,
                index_t column_step, double column_score)
      : heads(heads_), len(len_), dim(dim_) {
    const auto half = static_cast<std::size_t>(heads * len * dim);
    q_bytes.reserve(half * sizeof(float));
    k_bytes.reserve(half * sizeof(float));
    q = q_bytes.floats().first(half);
    k = k_bytes.floats().first(half);
    std::copy_n(noise.begin(), half, q.begin());
    std::copy_n(noise.begin() + static_cast<std::ptrdiff_t>(half), half, k.begin());
    const double root = std::sqrt(static_cast<double>(dim)), size = std::sqrt(peak * root),
                 turn = 2 * 3.14159265358979 / period;
    for (index_t row = 0; row < heads * len; ++row) {
      const double angle = turn * static_cast<double>(row % len);
      for (const std::span<float>* x : {&q, &k}) {
        (*x)[static_cast<std::size_t>(row * dim)] = static_cast<float>(size * std::cos(angle));
        (*x)[static_cast<std::size_t>(row * dim + 1)] = static_cast<float>(size * std::sin(angle));
      }
      q[static_cast<std::size_t>(row * dim + 2)] = 1;
      k[static_cast<std::size_t>(row * dim + 2)] =
          (row % len) % column_step == column_step / 2 ? static_cast<float>(column_score * root) : 0.f;
    }
  }
};

// 2 heads of dim 128, 32768 causal tokens.
struct LongPrompt {
  static constexpr index_t kHeads = 2, kLen = 32768, kDim = 128, kFloats = kHeads * kLen * kDim;
  static constexpr const char* kProblem = "prefill/q32768/h2x2";
  static constexpr double kDenseFlops = 4. * kHeads * kDim * kLen * (kLen + 1) / 2;

  static std::shared_ptr<PlantedPrompt> make(std::span<const float> inputs) {
    return std::make_shared<PlantedPrompt>(inputs.first(static_cast<std::size_t>(2 * kFloats)), kHeads, kLen, kDim, 6, 12288,
                                           64, 3);
  }
};

}   // namespace fovea_bench
