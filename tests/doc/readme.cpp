// SPDX-License-Identifier: Apache-2.0
// The code of the README.
#include <cmath>
#include <cstdio>
#include <vector>

#include <fovea/attention.hpp>

int main() {
  const fovea::index_t batch = 2, len = 70, q_heads = 8, kv_heads = 2, dim = 64;
  std::vector<float> q_data(static_cast<std::size_t>(batch * len * q_heads * dim), 0.5f), out_data(q_data.size(), NAN);
  std::vector<float> k_data(static_cast<std::size_t>(batch * len * kv_heads * dim), 0.25f), v_data(k_data.size(), 3.f);

  auto q = fovea::bshd<const float>(q_data.data(), batch, len, q_heads, dim);    // [batch, q_head, pos, dim]
  auto k = fovea::bshd<const float>(k_data.data(), batch, len, kv_heads, dim);   // [batch, kv_head, pos, dim]
  auto v = fovea::bshd<const float>(v_data.data(), batch, len, kv_heads, dim);   // [batch, kv_head, pos, dim]
  auto out = fovea::bshd(out_data.data(), batch, len, q_heads, dim);             // [batch, q_head, pos, dim]

  fovea::Status status = fovea::attention(q, k, v, out, {.causal = fovea::Causal::top_left, .window = {.left = 31}});
  if (!status.ok()) std::puts(status.message());

  // Every value is 3, so every weighted mean is.
  for (const float x : out_data) {
    if (std::abs(x - 3.f) > 1e-5f) return 1;
  }
  return status.ok() ? 0 : 1;
}
