// SPDX-License-Identifier: Apache-2.0
// Multi-head latent attention (DeepSeek-V2, V3, Kimi): all heads share one cached row a token, 512 numbers of latent and 64
// rotated ones, here in the published fp8 layout of 656 bytes. Two sequences decode one token each (absorbed form), a third
// one reads a prompt (expanded form), in one call.
#include <fovea/engine/parts/rope.hpp>
#include <fovea/mla.hpp>
#include <fovea/reference/mla.hpp>
#include <fovea/reference/stored.hpp>
#include <fovea/simd/quantise.hpp>

#include "example.hpp"

int main() {
  using fovea::index_t;
  const fovea::MlaDims dims{.heads = 4, .nope = 128, .rope = 64, .latent = 512, .value = 128};   // V3 has 128 heads
  const index_t q_dim = dims.nope + dims.rope, row_dim = dims.latent + dims.rope, capacity = 96;
  const fovea::Format format = fovea::Format::latent_fp8;
  const std::vector<index_t> cu_len_q{0, 1, 2, 82}, len_k{90, 35, 80};

  // Rows as a model appends them: quantised from [normalised latent | rotated shared key].
  const index_t row_bytes = fovea::row_bytes(format, row_dim);
  std::vector<std::byte> cache(static_cast<std::size_t>(3 * capacity * row_bytes), std::byte{0xff});
  const std::vector<float> rows = example::random_values(3 * capacity * row_dim, 1);
  for (index_t s = 0; s < 3; ++s) {
    for (index_t j = 0; j < len_k[static_cast<std::size_t>(s)]; ++j) {
      const index_t at = s * capacity + j;
      fovea::quantise_row(format, rows.data() + at * row_dim, 1, row_dim, nullptr, cache.data() + at * row_bytes);
    }
  }

  // Queries of 82 tokens, q_pe rotated; kv_b as in a checkpoint, W_UK above W_UV for every head.
  const index_t tokens = cu_len_q.back();
  const std::vector<float> q_data = example::random_values(tokens * dims.heads * q_dim, 2);
  std::vector<float> kv_b_data = example::random_values(dims.heads * (dims.nope + dims.value) * dims.latent, 3);
  for (float& w : kv_b_data) w *= 0.05f;
  const auto q = fovea::bshd(q_data.data(), 1, tokens, dims.heads, q_dim);
  const auto kv_b = fovea::bhsd<const float>(kv_b_data.data(), 1, dims.heads, dims.nope + dims.value, dims.latent);
  std::vector<float> out_data(static_cast<std::size_t>(tokens * dims.heads * dims.value));
  const auto out = fovea::bshd(out_data.data(), 1, tokens, dims.heads, dims.value);

  const fovea::AttentionOptions options{.scale = fovea::mla_scale(dims, fovea::yarn_mscale(40)),
                                        .causal = fovea::Causal::bottom_right,
                                        .len_k = len_k,
                                        .cu_len_q = cu_len_q};
  fovea::MlaPlan plan;   // one for all layers of a step
  if (example::refused(make_plan(plan, {dims, 1, tokens, capacity, format}, options))) return 1;
  std::printf("%s", plan.describe().c_str());
  const fovea::Kv latents = fovea::latent_kv(cache.data(), format, dims, 3, capacity);
  if (example::refused(fovea::mla<fovea::Formats<fovea::Format::latent_fp8>>(plan, q, kv_b, latents, out, options)))
    return 1;

  // Head 1 against the equations in double, over the numbers the cache holds.
  fovea::MlaDims one = dims;
  one.heads = 1;
  std::vector<double> exact_q, exact_kv_b, exact(static_cast<std::size_t>(tokens * dims.value));
  for (index_t t = 0; t < tokens; ++t) {
    for (index_t d = 0; d < q_dim; ++d) exact_q.push_back(double{q(0, 1, t, d)});
  }
  for (index_t n = 0; n < (dims.nope + dims.value) * dims.latent; ++n) exact_kv_b.push_back(double{(&kv_b(0, 1, 0, 0))[n]});
  fovea::reference::mla(
      fovea::bhsd<const double>(exact_q.data(), 1, 1, tokens, q_dim),
      fovea::bhsd<const double>(exact_kv_b.data(), 1, 1, dims.nope + dims.value, dims.latent),
      [&](index_t s, index_t j, index_t d) {
        return fovea::reference::stored_value(format, cache.data() + (s * capacity + j) * row_bytes, row_dim, d);
      },
      len_k, one, fovea::bhsd(exact.data(), 1, 1, tokens, dims.value), options);
  double error = 0;
  for (index_t t = 0; t < tokens; ++t) {
    for (index_t d = 0; d < dims.value; ++d) {
      const double difference = std::abs(double{out(0, 1, t, d)} - exact[static_cast<std::size_t>(t * dims.value + d)]);
      if (!(difference <= error)) error = difference;
    }
  }
  return example::verdict("MLA", error);
}
