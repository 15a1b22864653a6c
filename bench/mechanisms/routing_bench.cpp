// SPDX-License-Identifier: Apache-2.0
// Routing Transformer, choice included, against dense causal attention over the same keys.
#include "fovea/mechanisms/routing.hpp"

#include "fovea/attention.hpp"
#include "support/sparse_row.hpp"

namespace fovea_bench {

namespace {

constexpr index_t kLen = 4096, kHeads = 4, kDim = 64, kClusters = 16, kWindow = 256;

struct Tensors {
  fovea::Tensor<const float> q, k, v, memory_k, memory_v;
  fovea::View<const float, 3> centroids;
  fovea::Tensor<float> out;

  explicit Tensors(const SparseMemory& memory) {
    const float* from = memory.inputs.data();
    for (auto* tensor : {&q, &k, &v}) {
      *tensor = fovea::bhsd(from, 1, kHeads, kLen, kDim);
      from += kHeads * kLen * kDim;
    }
    for (auto* tensor : {&memory_k, &memory_v}) {
      *tensor = fovea::bhsd(from, kHeads, kClusters, 1, kDim);
      from += kHeads * kClusters * kDim;
    }
    centroids = {from, {kHeads, kClusters, kDim}, {kClusters * kDim, kDim, 1}};
    out = fovea::bhsd(memory.outputs.data(), 1, kHeads, kLen, kDim);
  }
};

SparseWork sparse(const SparseMemory& memory) {
  return {[x = Tensors(memory), executor = memory.executor] {
    fovea::RoutingOptions options;
    options.memory_k = x.memory_k;
    options.memory_v = x.memory_v;
    options.executor = executor;
    return fovea::routing_attention(x.q, x.k, x.v, x.centroids, kWindow, x.out, options);
  }};
}
SparseWork dense(const SparseMemory& memory) {
  return {[x = Tensors(memory), executor = memory.executor] {
    fovea::AttentionOptions options;
    options.causal = fovea::Causal::top_left;
    options.executor = executor;
    return fovea::attention(x.q, x.k, x.v, x.out, options);
  }};
}

}   // namespace

std::vector<Group> routing_groups(int) {
  const index_t floats = kHeads * kLen * kDim;
  // Two choices, and within a cluster the learned key and all chosen ones (the causal mask falls anywhere in them).
  const double pairs = static_cast<double>(kHeads * kClusters * kWindow) * static_cast<double>(kWindow + 1);
  const double sparse_flops = 4. * static_cast<double>(kDim) * pairs + 4. * static_cast<double>(floats * kClusters);
  const double dense_flops = 4. * static_cast<double>(floats) * static_cast<double>(kLen + 1) / 2;
  return {sparse_group("routing/prefill/q4096/h4/d64/c16w256", 1, 3 * floats + 3 * kHeads * kClusters * kDim, floats, false,
                       {{"fovea", sparse_flops, 0, sparse}, {"dense", dense_flops, 0, dense}})};
}

}   // namespace fovea_bench
