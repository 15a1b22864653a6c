// SPDX-License-Identifier: Apache-2.0
// Blocks of 256 with and without the block before.
#include "fovea/mechanisms/block_local.hpp"

#include "support/pattern_row.hpp"

namespace fovea_bench {
namespace {

SparseImpl block_local(const std::string& impl, const PatternShape& shape, index_t look_back) {
  const fovea::BlockLocal blocks{256, look_back, 0};
  double pairs = 0;
  for (index_t t = 0; t < shape.len_q; ++t)
    pairs += static_cast<double>(t - std::max<index_t>(t / blocks.block - look_back, 0) * blocks.block + 1);
  return pattern_impl(impl, shape, pairs, static_cast<double>(shape.len_k), [blocks](PatternTensors x) {
    x.options.causal = fovea::Causal::bottom_right;
    return [x, blocks] { return fovea::block_local_attention(x.q, x.k, x.v, x.out, blocks, x.options); };
  });
}

}   // namespace

std::vector<Group> block_local_groups(int max_threads) {
  const PatternShape shape{4096, 4096, 8, 8, 128};
  std::vector<Group> groups;
  for (int threads = 1; threads <= std::min(2, max_threads); ++threads)
    groups.push_back(pattern_group("block_local/prefill/q4096/kv4096/h8x8/block256", shape, threads, false,
                                   {block_local("fovea", shape, 0), block_local("look_back1", shape, 1),
                                    dense_impl(shape, fovea::Causal::bottom_right)}));
  return groups;
}

}   // namespace fovea_bench
