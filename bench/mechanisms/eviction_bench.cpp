// SPDX-License-Identifier: Apache-2.0
// What H2O adds to a decode step over the rows it keeps: the sums of the weights, the choice, and moving the rows.
#include "fovea/cache/eviction.hpp"

#include "fovea/attention.hpp"
#include "fovea/cache/append.hpp"
#include "fovea/call/column_sums.hpp"
#include "support/sparse_row.hpp"

namespace fovea_bench {

namespace {

constexpr index_t kRows = 2048, kHeads = 32, kKvHeads = 8, kDim = 128;
using F32 = fovea::Formats<fovea::Format::f32>;

struct Tokens {
  fovea::Tensor<const float> q, k, v;
  fovea::Tensor<float> out;

  Tokens(const SparseMemory& memory, index_t len) {
    const float* from = memory.inputs.data();
    q = fovea::bhsd(from, 1, kHeads, 1, kDim);
    k = fovea::bhsd(from + kHeads * kDim, 1, kKvHeads, len, kDim);
    v = fovea::bhsd(from + kHeads * kDim + kKvHeads * kRows * kDim, 1, kKvHeads, len, kDim);
    out = fovea::bhsd(memory.outputs.data(), 1, kHeads, 1, kDim);
  }
};

struct Kept {
  fovea::ContiguousCache cache;
  fovea::KeptTokens tokens;

  explicit Kept(const SparseMemory& memory) {
    const Tokens all(memory, kRows);
    cache.create({{kKvHeads, kDim, kDim, fovea::Format::f32, fovea::Format::f32}, 1, kRows + 1}).or_throw();
    tokens.create({1, kKvHeads, kRows + 1}).or_throw();
    fovea::append_tokens(cache, 0, all.k, all.v).or_throw();
    tokens.append(0, kRows).or_throw();
  }
  fovea::Status attend(const Tokens& x, const fovea::AttentionOptions& options) {
    return fovea::attention<F32>(x.q, cache.batch().kv, x.out, options);
  }
};

SparseWork h2o(const SparseMemory& memory) {
  auto kept = std::make_shared<Kept>(memory);
  return {[kept, x = Tokens(memory, 1), executor = memory.executor] {
    if (fovea::Status s = fovea::append_tokens(kept->cache, 0, x.k, x.v); !s.ok()) return s;
    if (fovea::Status s = kept->tokens.append(0, 1); !s.ok()) return s;
    fovea::AttentionOptions options;
    options.len_k = kept->cache.lengths();
    options.executor = executor;
    if (fovea::Status s = kept->attend(x, options); !s.ok()) return s;
    const fovea::ColumnSums sums{kept->tokens.running_sums(), {}, true};
    if (fovea::Status s = fovea::column_sums<F32>(x.q, kept->cache.batch().kv, sums, options); !s.ok()) return s;
    return fovea::evict_light_rows(kept->cache, kept->tokens, 0, kRows / 2, kRows / 2);
  }};
}
SparseWork dense(const SparseMemory& memory) {
  auto kept = std::make_shared<Kept>(memory);
  return {[kept, x = Tokens(memory, 1), executor = memory.executor] {
    fovea::AttentionOptions options;
    options.len_k = kept->cache.lengths();
    options.executor = executor;
    return kept->attend(x, options);
  }};
}

}   // namespace

std::vector<Group> eviction_groups(int) {
  const double bytes = 2. * static_cast<double>(kRows * kKvHeads * kDim) * sizeof(float);
  return {sparse_group("h2o/decode/kv2048/h32x8/d128", 1, kHeads * kDim + 2 * kKvHeads * kRows * kDim, kHeads * kDim, false,
                       {{"fovea", 0, bytes, h2o}, {"dense", 0, bytes, dense}})};
}

}   // namespace fovea_bench
