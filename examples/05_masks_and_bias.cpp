// SPDX-License-Identifier: Apache-2.0
// What may change a score: windows, ALiBi, a softcap, additive and boolean masks, learned sinks. They combine freely.
#include <cstdint>
#include <limits>

#include "example.hpp"

int main() {
  const fovea::index_t heads = 4, len = 96, dim = 32, size = heads * len * dim;
  const std::vector<float> q_data = example::random_values(size, 1), k_data = example::random_values(size, 2),
                           v_data = example::random_values(size, 3);
  std::vector<float> out_data(q_data.size());
  const auto q = fovea::bhsd(q_data.data(), 1, heads, len, dim), k = fovea::bhsd(k_data.data(), 1, heads, len, dim),
             v = fovea::bhsd(v_data.data(), 1, heads, len, dim);
  const auto out = fovea::bhsd(out_data.data(), 1, heads, len, dim);

  int wrong = 0;
  const auto check = [&](const char* what, const fovea::AttentionOptions& options) {
    if (example::refused(fovea::attention(q, k, v, out, options))) {
      ++wrong;
      return;
    }
    wrong += example::verdict(what, example::error_of(q, k, v, out, options));
  };

  // Inclusive distances: the query itself and the 16 keys before it.
  check("sliding window", {.causal = fovea::Causal::top_left, .window = {.left = 16}});

  // One slope per query head; 2^-2, 2^-4, ... is the usual series for 4 heads.
  const std::vector<float> slopes{0x1p-2f, 0x1p-4f, 0x1p-6f, 0x1p-8f};
  check("ALiBi and softcap", {.causal = fovea::Causal::top_left, .softcap = 20.f, .alibi_slopes = slopes});

  // A boolean mask shared by all heads: an extent of 1 broadcasts. Here two documents packed into one sequence, without
  // crossing.
  std::vector<std::uint8_t> keep_data(static_cast<std::size_t>(len * len));
  const fovea::View<std::uint8_t, 4> keep{keep_data.data(), {1, 1, len, len}, {0, 0, len, 1}};
  for (fovea::index_t i = 0; i < len; ++i) {
    for (fovea::index_t j = 0; j < len; ++j) keep(0, 0, i, j) = (i < 40) == (j < 40);
  }
  check("two documents", {.causal = fovea::Causal::top_left, .keep = keep});

  // An additive bias per key, for all heads and queries; -inf hides the key.
  std::vector<float> bias_data = example::random_values(len, 4);
  bias_data[7] = -std::numeric_limits<float>::infinity();
  check("bias per key", {.bias = {bias_data.data(), {1, 1, 1, len}, {0, 0, 0, 1}}});

  // A learned logit per head that takes weight and has no value: outputs shrink towards 0.
  const std::vector<float> sink{0.f, 1.f, 2.f, 40.f};
  check("sink", {.sink = sink});
  std::printf("with a sink of 40 a whole row weighs almost nothing: out = %.1e\n", double{out(0, 3, 0, 0)});
  return wrong;
}
