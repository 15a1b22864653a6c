// SPDX-License-Identifier: Apache-2.0
// Attention over two sets of keys, computed apart and merged by their log-sum-exp: a shared prefix stored once for many
// requests, a KV cache split over machines, new keys against old ones.
#include "example.hpp"

int main() {
  const fovea::index_t heads = 4, len_q = 5, len_k = 300, prefix = 123, dim = 48;
  const std::vector<float> q_data = example::random_values(heads * len_q * dim, 1),
                           k_data = example::random_values(heads * len_k * dim, 2),
                           v_data = example::random_values(heads * len_k * dim, 3);
  const auto q = fovea::bhsd(q_data.data(), 1, heads, len_q, dim), k = fovea::bhsd(k_data.data(), 1, heads, len_k, dim),
             v = fovea::bhsd(v_data.data(), 1, heads, len_k, dim);
  const auto keys = [](auto view, fovea::index_t first, fovea::index_t last) {
    view.data += first * view.stride[2];
    view.extent[2] = last - first;
    return view;
  };

  std::vector<float> a_data(q_data.size()), b_data(q_data.size()), a_lse_data(heads * len_q), b_lse_data(heads * len_q);
  const auto a = fovea::bhsd(a_data.data(), 1, heads, len_q, dim), b = fovea::bhsd(b_data.data(), 1, heads, len_q, dim);
  const fovea::View<float, 3> a_lse{a_lse_data.data(), {1, heads, len_q}, {heads * len_q, len_q, 1}};
  const fovea::View<float, 3> b_lse{b_lse_data.data(), {1, heads, len_q}, {heads * len_q, len_q, 1}};

  // The queries stand at the end of the sequence. The prefix is seen whole; in the rest, query i is at rest - len_q + i.
  if (example::refused(fovea::attention(q, keys(k, 0, prefix), keys(v, 0, prefix), a, {.lse = a_lse})) ||
      example::refused(fovea::attention(q, keys(k, prefix, len_k), keys(v, prefix, len_k), b,
                                        {.causal = fovea::Causal::bottom_right, .lse = b_lse}))) {
    return 1;
  }
  std::printf("head 0, query 0: lse %.4f over the prefix, %.4f over the rest", double{a_lse(0, 0, 0)},
              double{b_lse(0, 0, 0)});
  if (example::refused(fovea::merge(a, a_lse, b, b_lse))) return 1;
  std::printf(", %.4f merged\n", double{a_lse(0, 0, 0)});

  return example::verdict("merged", example::error_of(q, k, v, a, {.causal = fovea::Causal::bottom_right}));
}
