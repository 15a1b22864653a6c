// SPDX-License-Identifier: Apache-2.0
// The code of the README.
#include <cmath>
#include <cstdio>
#include <vector>

#include <fovea/adapters/eigen.hpp>
#include <fovea/adapters/mdspan.hpp>
#include <fovea/attention.hpp>

#include "../support/mdspan.hpp"

// Every value is 3, so every weighted mean is.
static bool all_three(const std::vector<float>& out) {
  for (const float x : out) {
    if (!(std::abs(x - 3.f) <= 1e-5f)) return false;
  }
  return true;
}

static bool tensors_of_others() {
  const fovea::index_t batch = 2, len = 5, q_heads = 4, kv_heads = 2, dim = 8;
  Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> qkv(batch * len, (q_heads + 2 * kv_heads) * dim);
  qkv.setRandom();
  qkv.rightCols(kv_heads * dim).setConstant(3.f);
  const std::vector<float> keys(static_cast<std::size_t>(batch * kv_heads * len * dim), 0.25f);
  const md::mdspan k_span(keys.data(), md::dextents<fovea::index_t, 4>(batch, kv_heads, len, dim));
  std::vector<float> out(static_cast<std::size_t>(batch * q_heads * len * dim), NAN);

  auto q = fovea::from_eigen(qkv.leftCols(q_heads * dim), q_heads, batch);      // adapters/eigen.hpp: a token per row
  auto v = fovea::from_eigen(qkv.rightCols(kv_heads * dim), kv_heads, batch);   // a block of a fused projection, in place
  auto k = fovea::from_mdspan(k_span);                                          // adapters/mdspan.hpp: [batch, head, pos, dim]

  return fovea::attention(q, k, v, fovea::bhsd(out.data(), batch, q_heads, len, dim)).ok() && all_three(out);
}

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

  return status.ok() && all_three(out_data) && tensors_of_others() ? 0 : 1;
}
