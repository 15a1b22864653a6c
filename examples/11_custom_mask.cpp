// SPDX-License-Identifier: Apache-2.0
// A mask of your own: a callable that says which keys a query sees, in the signature of FlexAttention's mask_mod, and a
// BlockMask made from it once, so that blocks nobody sees are passed over and whole blocks never ask.
#include <fovea/engine/parts/block_mask.hpp>

#include "example.hpp"

int main() {
  const fovea::index_t heads = 4, len = 512, dim = 32, size = heads * len * dim;
  const std::vector<float> q_data = example::random_values(size, 1), k_data = example::random_values(size, 2),
                           v_data = example::random_values(size, 3);
  std::vector<float> out_data(q_data.size());
  const auto q = fovea::bhsd(q_data.data(), 1, heads, len, dim), k = fovea::bhsd(k_data.data(), 1, heads, len, dim),
             v = fovea::bhsd(v_data.data(), 1, heads, len, dim);
  const auto out = fovea::bhsd(out_data.data(), 1, heads, len, dim);

  // batch, head and q are ints, k is a vector of keys: comparisons, &, | and ! work on it, && and if do not.
  const auto recent_or_first = [](int, int, int q_pos, auto k_pos) {
    return (k_pos <= q_pos) & ((q_pos - k_pos < 200) | (k_pos < 8));
  };

  // Which blocks of 64 x 64 are empty, full or partial: asked once, used by every layer and step of these lengths.
  fovea::BlockMask blocks;
  if (example::refused(blocks.build({.len_q = len, .len_k = len, .q_block = 64, .k_block = 64}, recent_or_first))) return 1;
  std::printf("%s", fovea::to_string(blocks).c_str());

  const auto variant = fovea::variant().with_mask(fovea::block_masked(blocks, recent_or_first));
  if (example::refused(fovea::attention(q, k, v, out, {}, variant))) return 1;

  // The same callable takes a plain int for k, so it serves the reference too.
  const auto plain = [](double s, int, int, int, int) { return s; };
  const double error = example::difference(out, [&](fovea::Tensor<double> expected) {
    fovea::reference::variant(q, k, v, expected, {}, plain, recent_or_first, fovea::reference::SoftmaxWeights{});
  });
  return example::verdict("a mask behind its blocks", error);
}
