// SPDX-License-Identifier: Apache-2.0
// Reformer, hashing and sorting included, against dense causal attention over the same keys.
#include "fovea/mechanisms/reformer.hpp"

#include "fovea/attention.hpp"
#include "support/sparse_row.hpp"

namespace fovea_bench {

namespace {

constexpr index_t kLen = 8192, kHeads = 2, kDim = 64, kBucket = 64, kRounds = 4, kHalf = kLen / kBucket / 2;

struct Tensors {
  fovea::Tensor<const float> qk, v;
  fovea::View<const float, 3> rotations;
  fovea::Tensor<float> out;

  explicit Tensors(const SparseMemory& memory)
      : qk(fovea::bhsd(memory.inputs.data(), 1, kHeads, kLen, kDim)),
        v(fovea::bhsd(memory.inputs.data() + kHeads * kLen * kDim, 1, kHeads, kLen, kDim)),
        rotations{memory.inputs.data() + 2 * kHeads * kLen * kDim, {kDim, kRounds, kHalf}, {kRounds * kHalf, kHalf, 1}},
        out(fovea::bhsd(memory.outputs.data(), 1, kHeads, kLen, kDim)) {}
};

SparseWork sparse(const SparseMemory& memory) {
  return {[x = Tensors(memory), executor = memory.executor] {
    fovea::ReformerOptions options;
    options.bucket = kBucket;
    options.executor = executor;
    return fovea::reformer_attention(x.qk, x.v, x.rotations, x.out, options);
  }};
}
SparseWork dense(const SparseMemory& memory) {
  return {[x = Tensors(memory), executor = memory.executor] {
    fovea::AttentionOptions options;
    options.causal = fovea::Causal::top_left;
    options.executor = executor;
    return fovea::attention(x.qk, x.qk, x.v, x.out, options);
  }};
}

}   // namespace

std::vector<Group> reformer_groups(int) {
  const index_t floats = kHeads * kLen * kDim;
  // Per token and round: the rotation, and the products with two pieces (the causal mask falls anywhere in them).
  const double sparse_flops =
      static_cast<double>(kHeads * kLen * kRounds) * static_cast<double>(2 * kDim * kHalf + 4 * kDim * 2 * kBucket);
  const double dense_flops = 4. * static_cast<double>(floats) * static_cast<double>(kLen + 1) / 2;
  return {sparse_group("reformer/prefill/q8192/h2/d64/r4", 1, 2 * floats + kDim * kRounds * kHalf, floats, false,
                       {{"fovea", sparse_flops, 0, sparse}, {"dense", dense_flops, 0, dense}})};
}

}   // namespace fovea_bench
