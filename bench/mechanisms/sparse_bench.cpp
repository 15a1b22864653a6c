// SPDX-License-Identifier: Apache-2.0
// Random block lists against the dense kernel: what is looked at, and nothing else, should cost time. 5120 positions make every
// density a whole number of blocks.
#include <algorithm>
#include <numeric>

#include "fovea/sparse.hpp"
#include "support/sparse_row.hpp"

namespace fovea_bench {

namespace {

constexpr index_t kLen = 5120, kDim = 128;

struct Heads {
  index_t q, kv;
};

struct Tensors {
  fovea::Tensor<const float> q, k, v;
  fovea::Tensor<float> out;
};
Tensors tensors(const SparseMemory& memory, Heads heads) {
  const float* const in = memory.inputs.data();
  const index_t q_floats = heads.q * kLen * kDim, kv_floats = heads.kv * kLen * kDim;
  return {fovea::bhsd(in, 1, heads.q, kLen, kDim), fovea::bhsd(in + q_floats, 1, heads.kv, kLen, kDim),
          fovea::bhsd(in + q_floats + kv_floats, 1, heads.kv, kLen, kDim),
          fovea::bhsd(memory.outputs.data(), 1, heads.q, kLen, kDim)};
}

// [kv_head, q_block, block], ascending, no block twice.
std::vector<std::int32_t> random_blocks(index_t heads, index_t blocks, index_t wanted) {
  std::vector<std::int32_t> all(static_cast<std::size_t>(blocks)), lists;
  std::iota(all.begin(), all.end(), 0);
  std::uint64_t state = 1;
  for (index_t list = 0; list < heads * blocks; ++list) {
    for (std::size_t n = 0; n < static_cast<std::size_t>(wanted); ++n) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      std::swap(all[n], all[n + static_cast<std::size_t>(state >> 33) % (all.size() - n)]);
    }
    std::sort(all.begin(), all.begin() + wanted);
    lists.insert(lists.end(), all.begin(), all.begin() + wanted);
  }
  return lists;
}

double flops(Heads heads, double density) {
  return 4. * static_cast<double>(heads.q * kLen) * static_cast<double>(kLen * kDim) * density;
}

SparseImpl dense(Heads heads) {
  return {"dense", flops(heads, 1), 0, [heads](const SparseMemory& memory) -> SparseWork {
            const Tensors x = tensors(memory, heads);
            fovea::AttentionOptions options;
            options.executor = memory.executor;
            return {[=] { return fovea::attention(x.q, x.k, x.v, x.out, options); }};
          }};
}

SparseImpl blocks(Heads heads, index_t size, index_t percent) {
  const std::string impl = "b" + std::to_string(size) + "_d" + std::to_string(percent);
  return {impl, flops(heads, static_cast<double>(percent) / 100), 0, [=](const SparseMemory& memory) -> SparseWork {
            const Tensors x = tensors(memory, heads);
            const index_t count = kLen / size, wanted = count * percent / 100;
            const auto numbers = std::make_shared<std::vector<std::int32_t>>(random_blocks(heads.kv, count, wanted));
            fovea::KeyLists lists;
            lists.entries = numbers->data();
            lists.capacity = wanted;
            lists.heads = heads.kv;
            lists.q_blocks = count;
            lists.q_block = lists.k_block = size;
            fovea::AttentionOptions options;
            options.executor = memory.executor;
            return {[=] {
              (void)numbers;
              return fovea::sparse_attention(x.q, x.k, x.v, lists, x.out, options);
            }};
          }};
}

}   // namespace

std::vector<Group> sparse_groups(int) {
  std::vector<Group> groups;
  for (const Heads heads : {Heads{8, 2}, Heads{4, 4}}) {
    std::vector<SparseImpl> impls{dense(heads)};
    for (const index_t size : {64, 128}) {
      for (const index_t percent : {5, 10, 25, 50}) impls.push_back(blocks(heads, size, percent));
    }
    groups.push_back(sparse_group("blocks/prefill/q5120/h" + std::to_string(heads.q) + "x" + std::to_string(heads.kv), 1,
                                  (heads.q + 2 * heads.kv) * kLen * kDim, heads.q * kLen * kDim, false, impls));
  }
  return groups;
}

}   // namespace fovea_bench
