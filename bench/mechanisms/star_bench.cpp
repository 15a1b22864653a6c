// SPDX-License-Identifier: Apache-2.0
// Phase 1 in blocks of 1024, and a decode step over a cache in shards.
#include "fovea/mechanisms/star.hpp"

#include "support/pattern_row.hpp"

namespace fovea_bench {
namespace {

using F32 = fovea::Formats<fovea::Format::f32>;

SparseImpl context(const PatternShape& shape, index_t block) {
  double pairs = 0;
  for (index_t t = 0; t < shape.len_q; ++t) pairs += static_cast<double>(t % block + 1 + (t < block ? 0 : block));
  return pattern_impl("fovea", shape, pairs, static_cast<double>(shape.len_k), [block](const PatternTensors& x) {
    return [x, block] {
      return fovea::star_context_attention<F32>(x.q, fovea::dense_kv(x.k, x.v), x.out, {block, -1}, x.options);
    };
  });
}

SparseImpl shards(const PatternShape& shape, index_t count) {
  const auto all = static_cast<double>(shape.len_k);
  return pattern_impl("shards" + std::to_string(count), shape, all, all, [=](const PatternTensors& x) {
    const auto parts = std::make_shared<std::vector<fovea::KeyShard>>();
    const index_t len = shape.len_k / count;
    for (index_t p = 0; p < count; ++p) {
      const auto piece = [&](fovea::Tensor<const float> tensor) {
        tensor.data += p * len * tensor.stride[2];
        tensor.extent[2] = len;
        return tensor;
      };
      fovea::KeyShard shard;
      shard.kv = fovea::dense_kv(piece(x.k), piece(x.v));
      parts->push_back(shard);
    }
    return [=] { return fovea::sharded_attention<F32>(x.q, *parts, x.out, x.options); };
  });
}

}   // namespace

std::vector<Group> star_groups(int max_threads) {
  const PatternShape prompt{8192, 8192, 8, 8, 128}, step{1, 32768, 32, 8, 128};
  std::vector<Group> groups;
  for (int threads = 1; threads <= std::min(2, max_threads); ++threads) {
    groups.push_back(pattern_group("star/context/q8192/kv8192/h8x8/block1024", prompt, threads, false,
                                   {context(prompt, 1024), dense_impl(prompt, fovea::Causal::bottom_right)}));
    groups.push_back(pattern_group("star/decode/kv32768/h32x8", step, threads, true,
                                   {shards(step, 2), shards(step, 8), dense_impl(step, fovea::Causal::none)}));
  }
  return groups;
}

}   // namespace fovea_bench
