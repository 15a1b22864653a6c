// SPDX-License-Identifier: Apache-2.0
// Several documents packed into one sequence, as in training batches without padding: a token sees its own document only.
// The mask knows the borders, so key tiles of other documents cost a comparison.
#include <fovea/engine/parts/pattern_masks.hpp>

#include "example.hpp"

int main() {
  const fovea::index_t q_heads = 4, kv_heads = 2, len = 700, dim = 32;
  const std::vector<float> q_data = example::random_values(q_heads * len * dim, 1),
                           k_data = example::random_values(kv_heads * len * dim, 2),
                           v_data = example::random_values(kv_heads * len * dim, 3);
  std::vector<float> out_data(q_data.size());
  const auto q = fovea::bhsd(q_data.data(), 1, q_heads, len, dim), k = fovea::bhsd(k_data.data(), 1, kv_heads, len, dim),
             v = fovea::bhsd(v_data.data(), 1, kv_heads, len, dim);
  const auto out = fovea::bhsd(out_data.data(), 1, q_heads, len, dim);
  const auto plain = [](double s, int, int, int, int) { return s; };

  // Documents of 300, 37, 200 and 150 tokens, then 13 tokens of padding that belong to none: their output is 0.
  const std::vector<fovea::index_t> borders{0, 300, 337, 537, 687};
  const auto mask = fovea::documents(borders);
  const fovea::AttentionOptions causal{.causal = fovea::Causal::top_left};
  if (example::refused(fovea::attention(q, k, v, out, causal, fovea::variant().with_mask(mask)))) return 1;
  const auto keeps = [&](int batch, int head, int i, int j) { return fovea::keeps(mask, batch, head, i, j); };
  const double error = example::difference(out, [&](fovea::Tensor<double> expected) {
    fovea::reference::variant(q, k, v, expected, causal, plain, keeps, fovea::reference::SoftmaxWeights{});
  });
  int wrong = example::verdict("packed documents", error);
  std::printf("padding gives %g\n", double{out(0, 0, len - 1, 0)});

  // Masks compose: an instruction of 20 tokens at the start that all documents see as well.
  const fovea::Either shared{mask, fovea::global_tokens(20)};
  if (example::refused(fovea::attention(q, k, v, out, causal, fovea::variant().with_mask(shared)))) return 1;
  const auto keeps_shared = [&](int batch, int head, int i, int j) { return fovea::keeps(shared, batch, head, i, j); };
  const double shared_error = example::difference(out, [&](fovea::Tensor<double> expected) {
    fovea::reference::variant(q, k, v, expected, causal, plain, keeps_shared, fovea::reference::SoftmaxWeights{});
  });
  wrong += example::verdict("documents with a shared beginning", shared_error);
  return wrong;
}
