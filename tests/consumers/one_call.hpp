// SPDX-License-Identifier: Apache-2.0
// What every consumer program does: one causal GQA call on its own arrays, held against a double loop written here.
#pragma once
#include <fovea/attention.hpp>

#include <cmath>
#include <cstdio>
#include <vector>

static int one_call(const char* consumer) {
  constexpr fovea::index_t q_heads = 4, kv_heads = 2, len_q = 5, len_k = 37, dim = 24;
  const auto filled = [](fovea::index_t count, double frequency) {
    std::vector<float> values(static_cast<std::size_t>(count));
    for (std::size_t i = 0; i < values.size(); ++i)
      values[i] = static_cast<float>(std::sin(frequency * static_cast<double>(i + 1)));
    return values;
  };
  const std::vector<float> q = filled(q_heads * len_q * dim, 0.37), k = filled(kv_heads * len_k * dim, 0.71),
                           v = filled(kv_heads * len_k * dim, 1.13);
  std::vector<float> out(static_cast<std::size_t>(q_heads * len_q * dim), -1.f);
  const auto q_view = fovea::bhsd(q.data(), 1, q_heads, len_q, dim);
  const auto k_view = fovea::bhsd(k.data(), 1, kv_heads, len_k, dim),
             v_view = fovea::bhsd(v.data(), 1, kv_heads, len_k, dim);
  const auto out_view = fovea::bhsd(out.data(), 1, q_heads, len_q, dim);

  fovea::AttentionOptions options;
  options.causal = fovea::Causal::bottom_right;
  const fovea::Status status = fovea::attention(q_view, k_view, v_view, out_view, options);
  if (!status.ok()) return std::printf("%s: refused: %s\n", consumer, status.message()), 1;

  double worst = 0;
  for (fovea::index_t head = 0; head < q_heads; ++head) {
    const fovea::index_t kv_head = head / (q_heads / kv_heads);
    for (fovea::index_t i = 0; i < len_q; ++i) {
      std::vector<double> weighed(static_cast<std::size_t>(dim), 0.0);
      double sum = 0;
      for (fovea::index_t j = 0; j <= i + len_k - len_q; ++j) {
        double score = 0;
        for (fovea::index_t d = 0; d < dim; ++d) score += double(q_view(0, head, i, d)) * double(k_view(0, kv_head, j, d));
        const double weight = std::exp(score / std::sqrt(double(dim)));
        sum += weight;
        for (fovea::index_t d = 0; d < dim; ++d)
          weighed[static_cast<std::size_t>(d)] += weight * double(v_view(0, kv_head, j, d));
      }
      for (fovea::index_t d = 0; d < dim; ++d)
        worst = std::fmax(worst, std::fabs(weighed[static_cast<std::size_t>(d)] / sum - double(out_view(0, head, i, d))));
    }
  }
  // Scores are below sqrt(24) in size and |v| <= 1, so fp32 rounding of 24-term dots and 37-term sums stays below
  // (24 * sqrt(24) + 2 * 37) * 2^-24 = 1.2e-5; a wrong mask or head shows up as 1e-2 and more.
  const bool right = worst <= 1.2e-5;
  std::printf("%s: fovea %d.%d.%d %s, error %.1e against a double loop: %s\n", consumer, FOVEA_VERSION_MAJOR,
              FOVEA_VERSION_MINOR, FOVEA_VERSION_PATCH, FOVEA_ARCH_NAME, worst, right ? "right" : "WRONG");
  return right ? 0 : 1;
}
