// SPDX-License-Identifier: Apache-2.0
// The patterns of the Sparse Transformer in a prefill, and window and sinks in a decode step: 4 sinks and the last 2044 keys
// of a cache, as key ranges (fovea), as a ring that holds nothing else, as a mask over all keys, and all keys.
#include "fovea/mechanisms/sparse_transformer.hpp"

#include "fovea/engine/parts/pattern_masks.hpp"
#include "fovea/sparse.hpp"
#include "support/pattern_row.hpp"

namespace fovea_bench {
namespace {

using F32 = fovea::Formats<fovea::Format::f32>;

SparseImpl prefill(const std::string& impl, const PatternShape& shape, const fovea::SparseTransformer& p) {
  double pairs = 0;
  for (index_t t = 0; t < shape.len_q; ++t) {
    const index_t tokens = p.block * p.stride_blocks;
    const index_t keys = p.pattern == fovea::SparsePattern::local     ? std::min(t + 1, p.bandwidth)
                         : p.pattern == fovea::SparsePattern::strided ? t / p.stride + 1
                                                                      : t % tokens + 1 + t / tokens * p.vertsize * p.block;
    pairs += static_cast<double>(keys);
  }
  return pattern_impl(impl, shape, pairs, static_cast<double>(shape.len_k), [p](PatternTensors x) {
    return [x, p] { return fovea::sparse_transformer_attention(x.q, x.k, x.v, x.out, p, x.options); };
  });
}

Group prefill_group(int threads) {
  const PatternShape shape{4096, 4096, 8, 8, 128};
  fovea::SparseTransformer local, strided, fixed;
  local.pattern = fovea::SparsePattern::local;
  strided.stride = 64;
  fixed.pattern = fovea::SparsePattern::fixed;
  return pattern_group("sparse_transformer/prefill/q4096/kv4096/h8x8", shape, threads, false,
                       {prefill("local128", shape, local), prefill("strided64", shape, strided),
                        prefill("fixed128", shape, fixed), dense_impl(shape, fovea::Causal::bottom_right)});
}

constexpr index_t kSinks = 4, kWindow = 2044;

template <class Make>
SparseImpl step(const std::string& impl, const PatternShape& shape, const Make& make) {
  return pattern_impl(impl, shape, kSinks + kWindow, kSinks + kWindow, make);
}

Group window_sinks_group(index_t len_k) {
  const PatternShape shape{1, len_k, 32, 8, 128};
  const auto ranges = [len_k](const PatternTensors& x) {
    const auto entries = std::make_shared<std::vector<std::int32_t>>(
        std::vector<std::int32_t>{0, kSinks, static_cast<std::int32_t>(len_k - kWindow), static_cast<std::int32_t>(len_k)});
    fovea::KeyLists lists;
    lists.entries = entries->data();
    lists.capacity = 4;
    lists.ranges = true;
    return [=, keep = entries] {
      return fovea::sparse_attention<F32>(x.q, fovea::dense_kv(x.k, x.v), {&lists, 1}, x.out, x.options);
    };
  };
  const auto ring = [len_k](PatternTensors x) {
    const auto turned = std::make_shared<index_t>((len_k - kSinks) % kWindow);
    fovea::Kv kv = fovea::dense_kv(x.k, x.v);
    kv.home = fovea::Home::ring;
    kv.len = kSinks + kWindow;
    kv.sinks = kSinks;
    kv.ring_begin = {turned.get(), 1};
    return [=, keep = turned] { return fovea::attention<F32>(x.q, kv, x.out, x.options); };
  };
  const auto masked = [](PatternTensors x) {
    x.options.causal = fovea::Causal::bottom_right;
    const auto mask = fovea::variant().with_mask(fovea::sink_window(kSinks, kWindow - 1));
    return [x, mask] { return fovea::attention(x.q, x.k, x.v, x.out, x.options, mask); };
  };
  return pattern_group("window_sinks/decode/kv" + std::to_string(len_k) + "/h32x8", shape, 1, true,
                       {step("fovea", shape, ranges), step("ring", shape, ring), step("masked", shape, masked),
                        dense_impl(shape, fovea::Causal::none)});
}

}   // namespace

std::vector<Group> sparse_transformer_groups(int max_threads) {
  std::vector<Group> groups;
  for (int threads = 1; threads <= std::min(2, max_threads); ++threads) groups.push_back(prefill_group(threads));
  // In turns, because their times are compared.
  Group lengths = window_sinks_group(8192);
  Group longer = window_sinks_group(65536);
  for (Row& row : longer.rows) lengths.rows.push_back(std::move(row));
  groups.push_back(std::move(lengths));
  return groups;
}

}   // namespace fovea_bench
