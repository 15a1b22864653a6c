// SPDX-License-Identifier: Apache-2.0
// A decode step of DeepSeek Sparse Attention against absorbed dense decode over the same latents, and its two bandwidths:
// the indexer is bound by arithmetic, the gather of latents by memory. Every call works on another layer's caches, as a
// model does, so that what a step did not touch lately comes from DRAM.
#include "fovea/mechanisms/dsa.hpp"

#include <algorithm>
#include <cstring>

#include "fovea/attention.hpp"
#include "fovea/cache/index_cache.hpp"
#include "fovea/core/mla.hpp"
#include "fovea/engine/parts/gather.hpp"
#include "support/sparse_row.hpp"

namespace fovea_bench {

namespace {

using fovea::Format;
using Latents = fovea::Formats<Format::bf16>;

constexpr fovea::MlaDims kDims{128, 128, 64, 512, 128};
constexpr index_t kWide = 576, kIndexHeads = 64, kIndexDim = 128, kTop = 2048, kRow = 2 * kWide;
constexpr double kIndexFlops = 2. * kIndexHeads * kIndexDim, kLatentFlops = 2. * 128 * (576 + 512);

// Random bf16 rows, made of the group's numbers at places that no two rows share.
void fill_latents(std::span<const float> inputs, std::byte* to, index_t rows) {
  for (index_t row = 0; row < rows; ++row) {
    const auto at = static_cast<std::size_t>(row * 7919 % (static_cast<index_t>(inputs.size()) - kWide));
    fovea::quantise_row(Format::bf16, inputs.data() + at, 1, kWide, nullptr, to + row * kRow);
  }
}

struct Decode {
  index_t len, queries, layers;
  index_t input_floats() const { return queries * (kDims.heads * kWide + kIndexHeads * (kIndexDim + 1)) + len; }
};

// The caches of some layers; the rows of a group share them.
struct Layers {
  HugeBuffer latents;
  std::vector<fovea::IndexCache> index;

  Layers(const Decode& shape, const SparseMemory& memory) : index(static_cast<std::size_t>(shape.layers)) {
    latents.reserve(static_cast<std::size_t>(shape.layers * shape.len * kRow));
    fill_latents(memory.inputs, latents.data(), shape.layers * shape.len);
    for (std::size_t layer = 0; layer < index.size(); ++layer) {
      fovea::IndexCacheShape cache;
      cache.dim = kIndexDim, cache.slots = shape.len;
      index[layer].create(cache).or_throw();
      for (index_t token = 0; token < shape.len; ++token) {
        const auto at = static_cast<std::size_t>((token * 127 + static_cast<index_t>(layer)) %
                                                 (static_cast<index_t>(memory.inputs.size()) - kIndexDim));
        index[layer].append(0, fovea::Operand(fovea::bhsd(memory.inputs.data() + at, 1, 1, 1, kIndexDim))).or_throw();
      }
    }
  }
};

// One row's view of the problem: what a call needs of layer `call % layers`.
struct Step {
  Decode shape;
  std::shared_ptr<Layers> layers;
  std::vector<std::int32_t> lists;
  fovea::Tensor<const float> q, index_q;
  fovea::Tensor<float> out;
  fovea::View<const float, 3> weights;
  fovea::AttentionOptions options;
  std::size_t calls = 0;

  Step(const Decode& problem, std::shared_ptr<Layers> caches, const SparseMemory& memory)
      : shape(problem), layers(std::move(caches)), lists(static_cast<std::size_t>(problem.queries * kTop)) {
    const float* at = memory.inputs.data();
    q = fovea::bhsd(at, 1, kDims.heads, shape.queries, kWide);
    at += kDims.heads * shape.queries * kWide;
    index_q = fovea::bhsd(at, 1, kIndexHeads, shape.queries, kIndexDim);
    at += kIndexHeads * shape.queries * kIndexDim;
    weights = {at, {1, kIndexHeads, shape.queries}, {kIndexHeads * shape.queries, shape.queries, 1}};
    out = fovea::bhsd(memory.outputs.data(), 1, kDims.heads, shape.queries, kDims.latent);
    options.causal = fovea::Causal::bottom_right;
    options.scale = fovea::mla_scale(kDims, fovea::yarn_mscale(40));
    options.executor = memory.executor;
  }

  fovea::Kv latents() const {
    const auto layer = static_cast<index_t>(calls % layers->index.size());
    return fovea::latent_kv(layers->latents.data() + layer * shape.len * kRow, Format::bf16, kDims, 1, shape.len);
  }
  fovea::View<std::int32_t, 3> list_view() {
    return {lists.data(), {1, shape.queries, kTop}, {shape.queries * kTop, kTop, 1}};
  }
  fovea::Status select() {
    return fovea::dsa_select(index_q, weights, layers->index[calls % layers->index.size()].keys(), list_view(), options);
  }
  fovea::Status attend() {
    return fovea::dsa_attention<Latents>(q, latents(), fovea::dsa_key_lists(list_view()), out, options);
  }
};

SparseImpl step_impl(const char* impl, const Decode& shape, const std::shared_ptr<std::weak_ptr<Layers>>& shared,
                     double flops, double bytes, fovea::Status (*call)(Step&), bool list_first = false) {
  return {impl, flops, bytes, [=](const SparseMemory& memory) {
            std::shared_ptr<Layers> layers = shared->lock();
            if (!layers) *shared = layers = std::make_shared<Layers>(shape, memory);
            const auto step = std::make_shared<Step>(shape, layers, memory);
            if (list_first) step->select().or_throw();
            return SparseWork{[=] {
              ++step->calls;
              return call(*step);
            }};
          }};
}

Group decode_group(const Decode& shape, const std::string& name, int threads) {
  const auto shared = std::make_shared<std::weak_ptr<Layers>>();
  const auto keys = static_cast<double>(shape.len), queries = static_cast<double>(shape.queries);
  const double index_flops = queries * keys * kIndexFlops, attend_flops = queries * kTop * kLatentFlops;
  const double index_bytes = keys * 132, attend_bytes = queries * kTop * kRow;
  std::vector<SparseImpl> impls{
      step_impl("fovea", shape, shared, index_flops + attend_flops, index_bytes + attend_bytes,
                [](Step& step) {
                  if (fovea::Status s = step.select(); !s.ok()) return s;
                  return step.attend();
                }),
      step_impl("index", shape, shared, index_flops, index_bytes, [](Step& step) { return step.select(); }),
      step_impl(
          "attend", shape, shared, attend_flops, attend_bytes, [](Step& step) { return step.attend(); }, true),
      step_impl("dense", shape, shared, queries * keys * kLatentFlops, keys * kRow,
                [](Step& step) { return fovea::attention<Latents>(step.q, step.latents(), step.out, step.options); })};
  Group group = sparse_group(name, threads, shape.input_floats(), shape.queries * kDims.heads * kDims.latent, false, impls);
  group.slow = true;
  return group;
}

// The rows of a tile that a kernel would multiply with next; they stay in L2.
constexpr index_t kTileRows = 256;

// 2048 rows of 131072, every time others: the lists of a pool are a permutation of it, each of them sorted.
struct Pool {
  static constexpr index_t kRows = 131072, kPools = 4;   // 604 MB, against last-level caches of 105 MB
  HugeBuffer rows;
  std::vector<std::int32_t> order;
  index_t calls = 0;

  Pool() {
    rows.reserve(static_cast<std::size_t>(kPools * kRows * kRow));
    std::memset(rows.data(), 1, static_cast<std::size_t>(kPools * kRows * kRow));
    for (index_t n = 0; n < kRows; ++n) order.push_back(static_cast<std::int32_t>(n));
    std::uint64_t state = 1;
    for (std::size_t last = order.size(); last > 1; --last) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      std::swap(order[last - 1], order[(state >> 33) % last]);
    }
    for (auto at = order.begin(); at != order.end(); at += kTop) std::sort(at, at + kTop);
  }
  // Call n takes list n / kPools of pool n % kPools.
  std::span<const std::int32_t> list() const {
    return std::span(order).subspan(static_cast<std::size_t>(calls / kPools * kTop % kRows), kTop);
  }
  fovea::Stored stored() const { return {rows.data() + calls % kPools * kRows * kRow, Format::bf16, {0, 0, kRow}}; }
};

SparseImpl gather_impl(const char* impl, const std::shared_ptr<std::weak_ptr<Pool>>& shared,
                       void (*call)(const Pool& pool, std::byte* to)) {
  return {impl, 0, static_cast<double>(kTop * kRow), [=](const SparseMemory& memory) {
            std::shared_ptr<Pool> pool = shared->lock();
            if (!pool) *shared = pool = std::make_shared<Pool>();
            auto* const to = reinterpret_cast<std::byte*>(memory.outputs.data());
            return SparseWork{[=] {
              ++pool->calls;
              call(*pool, to);
              return fovea::Status{};
            }};
          }};
}

// fovea: tile by tile, as a kernel asks for them. block: into one block of 2.4 MB, which no L2 holds. copy: tiles by memcpy.
Group gather_group() {
  const auto shared = std::make_shared<std::weak_ptr<Pool>>();
  return sparse_group("gather/n131072/k2048/d576", 1, kWide, kTop * kRow / 4, true,
                      {gather_impl("fovea", shared,
                                   [](const Pool& pool, std::byte* to) {
                                     const auto list = pool.list();
                                     for (index_t first = 0; first < kTop; first += kTileRows)
                                       fovea::gather_rows(pool.stored(), kRow,
                                                          list.subspan(static_cast<std::size_t>(first), kTileRows),
                                                          fovea::AbsentRows::zero, to, kRow, kTop - first - kTileRows);
                                   }),
                       gather_impl("block", shared,
                                   [](const Pool& pool, std::byte* to) {
                                     fovea::gather_rows(pool.stored(), kRow, pool.list(), fovea::AbsentRows::zero, to, kRow);
                                   }),
                       gather_impl("copy", shared, [](const Pool& pool, std::byte* to) {
                         for (std::size_t n = 0; n < kTop; ++n)
                           std::memcpy(to + static_cast<index_t>(n) % kTileRows * kRow,
                                       pool.stored().data + pool.list()[n] * kRow, static_cast<std::size_t>(kRow));
                       })});
}

}   // namespace

std::vector<Group> dsa_groups(int max_threads) {
  std::vector<Group> groups{gather_group(), decode_group({65536, 1, 4}, "dsa/decode/kv65536/h128x1", 1)};
  if (max_threads > 1) groups.push_back(decode_group({65536, 1, 4}, "dsa/decode/kv65536/h128x1", max_threads));
  groups.push_back(decode_group({8192, 64, 1}, "dsa/prefill/q64/kv8192/h128x1", 1));
  return groups;
}

}   // namespace fovea_bench
