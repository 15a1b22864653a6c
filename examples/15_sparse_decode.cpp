// SPDX-License-Identifier: Apache-2.0
// A selection of your own in front of the exact kernel: 4 blocks of 64 keys for every kv head, by the score of the query with the
// block's mean key, and the newest block always. What the rule costs and what it leaves out is all that is approximate.
#include <fovea/sparse.hpp>

#include "example.hpp"

namespace {

using fovea::index_t;
constexpr index_t q_heads = 8, kv_heads = 2, len = 2048, dim = 64, block = 64, blocks = len / block, chosen = 4;

// Blocks by the dot product of the group's summed queries with the block's mean key, best first; ascending at the end.
std::vector<std::int32_t> choose(const std::vector<float>& q, const std::vector<float>& k) {   // [kv_head, chosen]
  std::vector<std::int32_t> lists;
  for (index_t head = 0; head < kv_heads; ++head) {
    std::vector<std::pair<float, std::int32_t>> scores;
    for (index_t b = 0; b < blocks; ++b) {
      float score = b == blocks - 1 ? 1e30f : 0.f;
      for (index_t j = b * block; j < (b + 1) * block; ++j) {
        for (index_t member = 0; member < q_heads / kv_heads; ++member) {
          const auto from = static_cast<std::size_t>((head * (q_heads / kv_heads) + member) * dim);
          const auto key = static_cast<std::size_t>((head * len + j) * dim);
          for (std::size_t d = 0; d < dim; ++d) score += q[from + d] * k[key + d];
        }
      }
      scores.emplace_back(-score, static_cast<std::int32_t>(b));
    }
    std::sort(scores.begin(), scores.end());
    for (index_t n = 0; n < chosen; ++n) lists.push_back(scores[static_cast<std::size_t>(n)].second);
    std::sort(lists.end() - chosen, lists.end());
  }
  return lists;
}

}   // namespace

int main() {
  const std::vector<float> q_data = example::random_values(q_heads * dim, 1);
  const std::vector<float> k_data = example::random_values(kv_heads * len * dim, 2);
  const std::vector<float> v_data = example::random_values(kv_heads * len * dim, 3);
  std::vector<float> out_data(q_data.size());
  const auto q = fovea::bhsd(q_data.data(), 1, q_heads, 1, dim);
  const auto k = fovea::bhsd(k_data.data(), 1, kv_heads, len, dim);
  const auto v = fovea::bhsd(v_data.data(), 1, kv_heads, len, dim);
  const auto out = fovea::bhsd(out_data.data(), 1, q_heads, 1, dim);

  const std::vector<std::int32_t> entries = choose(q_data, k_data);
  fovea::KeyLists lists;   // [1, kv_heads, 1] lists of `chosen` blocks
  lists.entries = entries.data();
  lists.capacity = chosen;
  lists.heads = kv_heads;
  lists.k_block = block;
  const fovea::AttentionOptions options{.causal = fovea::Causal::bottom_right};
  if (example::refused(fovea::sparse_attention(q, k, v, lists, out, options))) return 1;
  std::printf("%td of %td keys looked at by each head\n", chosen * block, len);

  // The reference sees the same keys through a mask.
  std::vector<std::uint8_t> keep(q_heads * len, 0);
  for (index_t h = 0; h < q_heads; ++h) {
    for (index_t n = 0; n < chosen; ++n) {
      const index_t b = entries[static_cast<std::size_t>(h / (q_heads / kv_heads) * chosen + n)];
      std::fill_n(keep.begin() + h * len + b * block, block, std::uint8_t{1});
    }
  }
  fovea::AttentionOptions masked = options;
  masked.keep = {keep.data(), {1, q_heads, 1, len}, {q_heads * len, len, len, 1}};
  return example::verdict("chosen blocks", example::difference(out, [&](fovea::Tensor<double> to) {
                            fovea::reference::softmax(q, k, v, to, masked);
                          }));
}
