// SPDX-License-Identifier: Apache-2.0
// Which keys did a query look at? The weights of chosen rows, recomputed from the LSE of the call: no len_q x len_k array.
#include "example.hpp"

int main() {
  const fovea::index_t heads = 2, len = 64, dim = 32, size = heads * len * dim;
  std::vector<float> q_data = example::random_values(size, 1), k_data = example::random_values(size, 2);
  const std::vector<float> v_data = example::random_values(size, 3);
  std::vector<float> out_data(q_data.size()), lse_data(static_cast<std::size_t>(heads * len));
  const auto q = fovea::bhsd(q_data.data(), 1, heads, len, dim), k = fovea::bhsd(k_data.data(), 1, heads, len, dim);
  const auto v = fovea::bhsd(v_data.data(), 1, heads, len, dim);
  const auto out = fovea::bhsd(out_data.data(), 1, heads, len, dim);
  // Query 50 of head 1 is made to look for key 20.
  for (fovea::index_t d = 0; d < dim; ++d) q(0, 1, 50, d) = 3.f * k(0, 1, 20, d);

  const fovea::AttentionOptions options{.causal = fovea::Causal::top_left,
                                        .lse = {lse_data.data(), {1, heads, len}, {heads * len, len, 1}}};
  if (example::refused(fovea::attention(q, k, v, out, options))) return 1;

  const std::vector<fovea::WeightRow> rows{{.sequence = 0, .q_head = 1, .q_index = 50}, {0, 0, 63}};
  std::vector<float> weights_data(rows.size() * static_cast<std::size_t>(len));
  const fovea::View<float, 2> weights{weights_data.data(), {static_cast<fovea::index_t>(rows.size()), len}, {len, 1}};
  if (example::refused(fovea::attention_weights(q, k, options.lse, rows, weights, options))) return 1;

  double error = 0;
  for (fovea::index_t n = 0; n < weights.extent[0]; ++n) {
    const fovea::WeightRow& row = rows[static_cast<std::size_t>(n)];
    const float* const begin = &weights(n, 0);
    const auto top = std::max_element(begin, begin + len) - begin;
    std::printf("head %td, query %td looks most at key %td, weight %.3f\n", row.q_head, row.q_index, top,
                double{begin[top]});

    // The weights must give back the output they belong to.
    for (fovea::index_t d = 0; d < dim; ++d) {
      double sum = 0;
      for (fovea::index_t j = 0; j < len; ++j) sum += double{weights(n, j)} * double{v(0, row.q_head, j, d)};
      error = std::max(error, std::abs(sum - double{out(0, row.q_head, row.q_index, d)}));
    }
  }
  if (std::max_element(&weights(0, 0), &weights(0, 0) + len) - &weights(0, 0) != 20) return 1;
  return example::verdict("weights times values against the output", error);
}
