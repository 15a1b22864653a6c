// SPDX-License-Identifier: Apache-2.0
// The published base model's layer: 4096 positions, 12 heads of 64, blocks of 64, three random ones.
#include "fovea/mechanisms/bigbird.hpp"

#include "support/pattern_row.hpp"

namespace fovea_bench {
namespace {

SparseImpl bigbird(const PatternShape& shape) {
  constexpr index_t kBlock = 64, kRandom = 3;
  const index_t blocks = shape.len_q / kBlock;
  const auto rows = static_cast<double>(2 * blocks + 2 * (4 + kRandom) + (blocks - 4) * (5 + kRandom));
  return pattern_impl(
      "fovea", shape, rows * kBlock * kBlock, static_cast<double>(shape.len_k), [=](const PatternTensors& x) {
        // Any blocks outside of the window and the global ones: which of them does not change the cost.
        const auto random = std::make_shared<std::vector<std::int32_t>>();
        for (index_t h = 0; h < shape.q_heads; ++h) {
          for (index_t i = 1; i < blocks - 1; ++i) {
            for (index_t r = 0; r < kRandom; ++r)
              random->push_back(static_cast<std::int32_t>(1 + (i + 1 + (7 + h) * (r + 1)) % (blocks - 2)));
          }
        }
        fovea::BigBird p;
        p.block = kBlock;
        p.random_blocks = {random->data(), {shape.q_heads, blocks - 2, kRandom}, {(blocks - 2) * kRandom, kRandom, 1}};
        return [=, keep = random] { return fovea::bigbird_attention(x.q, x.k, x.v, x.out, p, x.options); };
      });
}

}   // namespace

std::vector<Group> bigbird_groups(int max_threads) {
  const PatternShape shape{4096, 4096, 12, 12, 64};
  std::vector<Group> groups;
  for (int threads = 1; threads <= std::min(2, max_threads); ++threads)
    groups.push_back(pattern_group("bigbird/prefill/q4096/kv4096/h12x12/d64", shape, threads, false,
                                   {bigbird(shape), dense_impl(shape, fovea::Causal::none)}));
  return groups;
}

}   // namespace fovea_bench
