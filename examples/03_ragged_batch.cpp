// SPDX-License-Identifier: Apache-2.0
// Sequences of different lengths in one call without padding: their tokens lie one after the other, and cumulative lengths
// say where each begins. Serving engines mix prefill chunks and decode steps this way.
#include "example.hpp"

int main() {
  const fovea::index_t q_heads = 4, kv_heads = 2, dim = 32;
  // A prompt of 40, a decode step with 99 keys behind it, a member with nothing to do, and the last 16 of 48 prompt tokens.
  const std::vector<fovea::index_t> cu_len_q{0, 40, 41, 41, 57};
  const std::vector<fovea::index_t> cu_len_k{0, 40, 140, 140, 188};
  const fovea::index_t total_q = cu_len_q.back(), total_k = cu_len_k.back();

  const std::vector<float> q_data = example::random_values(total_q * q_heads * dim, 1),
                           k_data = example::random_values(total_k * kv_heads * dim, 2),
                           v_data = example::random_values(total_k * kv_heads * dim, 3);
  std::vector<float> out_data(q_data.size()), alone_data(q_data.size());
  const auto q = fovea::ragged(q_data.data(), total_q, q_heads, dim);
  const auto k = fovea::ragged(k_data.data(), total_k, kv_heads, dim);
  const auto v = fovea::ragged(v_data.data(), total_k, kv_heads, dim);
  const auto out = fovea::ragged(out_data.data(), total_q, q_heads, dim);

  const fovea::AttentionOptions options{.causal = fovea::Causal::bottom_right, .cu_len_q = cu_len_q, .cu_len_k = cu_len_k};
  if (example::refused(fovea::attention(q, k, v, out, options))) return 1;

  // The same sequences one by one: equal bit for bit, whatever stands beside them in the batch.
  const auto slice = [](auto view, fovea::index_t first, fovea::index_t last) {
    view.data += first * view.stride[2];
    view.extent[2] = last - first;
    return view;
  };
  for (std::size_t s = 0; s + 1 < cu_len_q.size(); ++s) {
    const fovea::index_t q_begin = cu_len_q[s], q_end = cu_len_q[s + 1], k_begin = cu_len_k[s], k_end = cu_len_k[s + 1];
    std::printf("sequence %zu: %3td queries, %3td keys\n", s, q_end - q_begin, k_end - k_begin);
    if (q_begin == q_end) continue;
    const auto alone = slice(fovea::ragged(alone_data.data(), total_q, q_heads, dim), q_begin, q_end);
    if (example::refused(fovea::attention(slice(q, q_begin, q_end), slice(k, k_begin, k_end), slice(v, k_begin, k_end),
                                          alone, {.causal = fovea::Causal::bottom_right}))) {
      return 1;
    }
  }
  if (out_data != alone_data) {
    std::printf("a sequence alone and inside the batch differ: WRONG\n");
    return 1;
  }
  return example::verdict("ragged batch", example::error_of(q, k, v, out, options));
}
