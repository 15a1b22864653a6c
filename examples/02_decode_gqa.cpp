// SPDX-License-Identifier: Apache-2.0
// One decode step over a KV cache: 3 sequences of different lengths, 8 query heads that share 2 kv heads (GQA). The cache is
// head-major with room to grow, [sequence, kv_head, capacity, dim]; len_k says how much of it is in use.
#include "example.hpp"

int main() {
  const fovea::index_t sequences = 3, q_heads = 8, kv_heads = 2, dim = 64, capacity = 512;
  std::vector<fovea::index_t> len_k{17, 300, 1};

  // Slots nobody wrote hold NaN here: keys beyond the length are never read.
  const auto cache_size = static_cast<std::size_t>(sequences * kv_heads * capacity * dim);
  std::vector<float> k_data(cache_size, NAN), v_data(cache_size, NAN);
  const auto k = fovea::bhsd(k_data.data(), sequences, kv_heads, capacity, dim);
  const auto v = fovea::bhsd(v_data.data(), sequences, kv_heads, capacity, dim);
  const std::vector<float> old_tokens = example::random_values(2 * capacity * dim, 1);
  for (fovea::index_t s = 0; s < sequences; ++s) {
    for (fovea::index_t h = 0; h < kv_heads; ++h) {
      for (fovea::index_t at = 0; at < len_k[static_cast<std::size_t>(s)] * dim; ++at) {
        (&k(s, h, 0, 0))[at] = old_tokens[static_cast<std::size_t>(at)];
        (&v(s, h, 0, 0))[at] = old_tokens[static_cast<std::size_t>(capacity * dim + at)];
      }
    }
  }

  // The new token of each sequence: a fused projection [q heads | k heads | v heads], its K and V appended to the cache.
  const std::vector<float> token = example::random_values(sequences * (q_heads + 2 * kv_heads) * dim, 2);
  const auto fresh = fovea::packed_qkv(token.data(), sequences, 1, q_heads, kv_heads, dim);
  for (fovea::index_t s = 0; s < sequences; ++s) {
    const fovea::index_t slot = len_k[static_cast<std::size_t>(s)]++;
    for (fovea::index_t h = 0; h < kv_heads; ++h) {
      std::copy_n(&fresh.k(s, h, 0, 0), dim, &k(s, h, slot, 0));
      std::copy_n(&fresh.v(s, h, 0, 0), dim, &v(s, h, slot, 0));
    }
  }

  // bottom_right: the last query sees the last key. With one query per sequence it sees its whole cache.
  std::vector<float> out_data(static_cast<std::size_t>(sequences * q_heads * dim)), lse_data(out_data.size() / dim);
  const auto out = fovea::bhsd(out_data.data(), sequences, q_heads, 1, dim);
  const fovea::AttentionOptions options{.causal = fovea::Causal::bottom_right,
                                        .len_k = len_k,
                                        .lse = {lse_data.data(), {sequences, q_heads, 1}, {q_heads, 1, 1}}};
  if (example::refused(fovea::attention(fresh.q, k, v, out, options))) return 1;

  for (fovea::index_t s = 0; s < sequences; ++s) {
    std::printf("sequence %td: %3td keys, lse of head 0 = %.3f\n", s, len_k[static_cast<std::size_t>(s)],
                double{options.lse(s, 0, 0)});
  }
  return example::verdict("decode step", example::error_of(fresh.q, k, v, out, options));
}
