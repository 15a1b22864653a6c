// SPDX-License-Identifier: Apache-2.0
// <fovea/fovea.hpp> alone, first in its file: all front doors and mechanisms get along in one program, and each door opens. One
// problem, 2 heads and 12 tokens, seen four ways: dense, through a list of all keys, through one level of a cascade, and as a
// recurrence without decay, which is attention without the exponential.
#include <fovea/fovea.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

using fovea::index_t;
constexpr index_t heads = 2, len = 12, dim = 16;
using Only = fovea::Formats<fovea::Format::f32>;   // kernels for f32 and no other format, shared by the doors

std::vector<float> waves(double frequency) {
  std::vector<float> values(static_cast<std::size_t>(heads * len * dim));
  for (std::size_t n = 0; n < values.size(); ++n) values[n] = static_cast<float>(std::sin(frequency * static_cast<double>(n + 1)));
  return values;
}

// Largest difference between `out` and sum_j weight(q_i . k_j) v_j over the keys j <= i, divided by the sum of weights or not.
template <class Weight>
double error_of(const fovea::Tensor<const float>& q, const fovea::Tensor<const float>& k, const fovea::Tensor<const float>& v,
                const fovea::Tensor<float>& out, bool normalised, Weight weight) {
  double worst = 0;
  for (index_t h = 0; h < heads; ++h) {
    for (index_t i = 0; i < len; ++i) {
      for (index_t e = 0; e < dim; ++e) {
        double sum = 0, weights = 0;
        for (index_t j = 0; j <= i; ++j) {
          double score = 0;
          for (index_t d = 0; d < dim; ++d) score += double{q(0, h, i, d)} * double{k(0, h, j, d)};
          sum += weight(score) * double{v(0, h, j, e)};
          weights += weight(score);
        }
        const double error = std::abs(double{out(0, h, i, e)} - (normalised ? sum / weights : sum));
        if (!(error <= worst)) worst = error;   // a NaN is an error too
      }
    }
  }
  return worst;
}

bool right(const char* door, const fovea::Status& status, double error, double limit) {
  const bool good = status.ok() && error <= limit;
  std::printf("%s: %s, error %.1e: %s\n", door, status.ok() ? "ok" : status.message(), error, good ? "right" : "WRONG");
  return good;
}

}   // namespace

int main() {
  const std::vector<float> q_data = waves(0.37), k_data = waves(0.71), v_data = waves(1.13);
  std::vector<float> out_data(q_data.size());
  const auto q = fovea::bhsd(q_data.data(), 1, heads, len, dim), k = fovea::bhsd(k_data.data(), 1, heads, len, dim),
             v = fovea::bhsd(v_data.data(), 1, heads, len, dim);
  const auto out = fovea::bhsd(out_data.data(), 1, heads, len, dim);
  const fovea::Kv kv = fovea::dense_kv(k, v);
  const fovea::AttentionOptions causal{.causal = fovea::Causal::bottom_right};

  // Scores are sums of 16 products below 1, so fp32 loses at most some 16 * 4 * 2^-24 = 4e-6 of a weight, and as much of a
  // mean of values below 1; without the mean, 12 weights of up to 4 are added: 12 * 16 * 2^-24 = 1.1e-5.
  constexpr double limit = 2e-5;
  const auto softmax = [](double score) { return std::exp(score / std::sqrt(double{dim})); };
  const auto as_it_is = [](double score) { return score / std::sqrt(double{dim}); };
  const auto fresh = [&]() -> const fovea::Tensor<float>& {
    std::fill(out_data.begin(), out_data.end(), NAN);
    return out;
  };
  bool good = true;

  fovea::Status status = fovea::attention<Only>(q, kv, fresh(), causal);
  good &= right("attention", status, error_of(q, k, v, out, true, softmax), limit);

  const std::int32_t blocks[] = {0, 1, 2};
  fovea::KeyLists lists;
  lists.entries = blocks;
  lists.capacity = 3;
  lists.q_block = len;
  lists.k_block = 4;
  status = fovea::sparse_attention<Only>(q, kv, lists, fresh(), causal);
  good &= right("sparse_attention", status, error_of(q, k, v, out, true, softmax), limit);

  const index_t one_request[] = {0, 1}, keys[] = {len}, queries[] = {0, len};
  const fovea::CascadeLevel level{kv, one_request, keys};
  fovea::AttentionOptions ragged = causal;
  ragged.cu_len_q = queries;
  status = fovea::cascade_attention<Only>(q, {&level, 1}, fresh(), ragged);
  good &= right("cascade_attention", status, error_of(q, k, v, out, true, softmax), limit);

  const std::vector<float> gamma(heads, 1.f);
  status = fovea::retention(q, k, v, gamma, fresh());
  good &= right("retention", status, error_of(q, k, v, out, false, as_it_is), limit);

  fovea::MlaPlan plan;
  const fovea::MlaDims dims{.heads = 4, .nope = 8, .rope = 4, .latent = 16, .value = 8};
  status = fovea::make_plan(plan, {dims, 1, 1, len, fovea::Format::f32}, causal);
  good &= right("mla", status, plan.costs.size() == 1 ? 0 : 1, 0);

  std::vector<double> inv_freq(2);
  float factor = 0;
  status = fovea::rope_frequencies({.rotary_dim = 4}, inv_freq, factor);
  good &= right("rope", status, std::abs(inv_freq[1] - 0.01), 1e-15);
  return good ? 0 : 1;
}
