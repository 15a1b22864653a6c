// SPDX-License-Identifier: Apache-2.0
// The simplest call: causal self-attention over tensors you already have, here token-major [batch, pos, head, dim].
#include "example.hpp"

int main() {
  const fovea::index_t batch = 2, len = 100, heads = 4, dim = 64;
  const fovea::index_t size = batch * len * heads * dim;
  const std::vector<float> q_data = example::random_values(size, 1), k_data = example::random_values(size, 2),
                           v_data = example::random_values(size, 3);
  std::vector<float> out_data(q_data.size());

  // Views own nothing and copy nothing; bhsd is the head-major twin, packed_qkv and interleaved_kv read fused projections.
  const auto q = fovea::bshd(q_data.data(), batch, len, heads, dim);
  const auto k = fovea::bshd(k_data.data(), batch, len, heads, dim);
  const auto v = fovea::bshd(v_data.data(), batch, len, heads, dim);
  const auto out = fovea::bshd(out_data.data(), batch, len, heads, dim);

  const fovea::AttentionOptions options{.causal = fovea::Causal::top_left};
  if (example::refused(fovea::attention(q, k, v, out, options))) return 1;

  // Query 0 sees key 0 alone, so its output is value 0.
  std::printf("out[0] = %.4f, v[0] = %.4f\n", double{out(0, 0, 0, 0)}, double{v(0, 0, 0, 0)});

  // A call that contradicts itself is refused with the numbers, and nothing is written.
  const auto three_heads = fovea::bshd(k_data.data(), batch, len, 3, dim);
  const fovea::Status status = fovea::attention(q, three_heads, three_heads, out, options);
  std::printf("3 kv heads for 4 query heads: %s\n", status.message());
  if (status.ok()) return 1;

  return example::verdict("causal self-attention", example::error_of(q, k, v, out, options));
}
