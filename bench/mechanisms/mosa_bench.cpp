// SPDX-License-Identifier: Apache-2.0
// MoSA's attention (choice, gather, dense calls among the chosen, scatter) against dense causal attention of the same heads.
#include "fovea/mechanisms/mosa.hpp"

#include "fovea/attention.hpp"
#include "support/sparse_row.hpp"

namespace fovea_bench {

namespace {

constexpr index_t kLen = 4096, kHeads = 8, kDim = 64;
constexpr double kSparsity = 16;

struct Tensors {
  fovea::Tensor<const float> q, k, v;
  fovea::View<const float, 3> router;
  fovea::Tensor<float> out;

  explicit Tensors(const SparseMemory& memory) {
    const float* from = memory.inputs.data();
    for (auto* tensor : {&q, &k, &v}) {
      *tensor = fovea::bhsd(from, 1, kHeads, kLen, kDim);
      from += kHeads * kLen * kDim;
    }
    router = {from, {1, kHeads, kLen}, {kHeads * kLen, kLen, 1}};
    out = fovea::bhsd(memory.outputs.data(), 1, kHeads, kLen, kDim);
  }
};

// Products of the visible pairs among `tokens` tokens per head.
double flops(index_t tokens) {
  const auto n = static_cast<double>(tokens);
  return 4. * static_cast<double>(kHeads * kDim) * n * (n + 1) / 2;
}

SparseWork sparse(const SparseMemory& memory) {
  const index_t count = fovea::mosa_count(kLen, kSparsity);
  auto lists = std::make_shared<std::vector<std::int32_t>>(static_cast<std::size_t>(kHeads * count));
  const fovea::View<std::int32_t, 3> chosen{lists->data(), {1, kHeads, count}, {kHeads * count, count, 1}};
  return {[x = Tensors(memory), executor = memory.executor, lists, chosen] {
    fovea::MosaSelectOptions select;
    select.sparsity = kSparsity;
    select.executor = executor;
    if (fovea::Status s = fovea::mosa_select(x.router, chosen, select); !s.ok()) return s;
    fovea::MosaOptions options;
    options.executor = executor;
    return fovea::mosa_attention(x.q, x.k, x.v, x.router, chosen, x.out, options);
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

std::vector<Group> mosa_groups(int) {
  const index_t floats = kHeads * kLen * kDim;
  return {sparse_group("mosa/prefill/q4096/h8/d64/s16", 1, 3 * floats + kHeads * kLen, floats, false,
                       {{"fovea", flops(fovea::mosa_count(kLen, kSparsity)), 0, sparse}, {"dense", flops(kLen), 0, dense}})};
}

}   // namespace fovea_bench
