// SPDX-License-Identifier: Apache-2.0
// The published base model's layer: 4096 positions, 12 heads of 64, 256 keys on each side; with the class token alone and
// with 64
// global tokens. The exact engine's window of the same width is what the global tokens come on top of.
#include "fovea/mechanisms/longformer.hpp"

#include "support/pattern_row.hpp"

namespace fovea_bench {
namespace {

constexpr index_t kWindow = 256;

double window_pairs(const PatternShape& shape) {
  double pairs = 0;
  for (index_t t = 0; t < shape.len_q; ++t)
    pairs += static_cast<double>(std::min(t, kWindow) + 1 + std::min(shape.len_k - 1 - t, kWindow));
  return pairs;
}

// The local projections serve as global ones too: the cost is the same.
SparseImpl longformer(const std::string& impl, const PatternShape& shape, index_t globals) {
  const auto len = static_cast<double>(shape.len_q), some = static_cast<double>(globals);
  return pattern_impl(impl, shape, window_pairs(shape) + 2 * some * len, static_cast<double>(shape.len_k),
                      [=](const PatternTensors& x) {
                        const auto kinds = std::make_shared<std::vector<std::int8_t>>(static_cast<std::size_t>(shape.len_q));
                        std::fill_n(kinds->begin(), globals, std::int8_t{1});
                        const fovea::View<const std::int8_t, 2> kind{kinds->data(), {1, shape.len_q}, {shape.len_q, 1}};
                        return [=, keep = kinds] {
                          return fovea::longformer_attention<fovea::Formats<fovea::Format::f32>>(
                              {x.q, x.k, x.v, x.q, x.k, x.v}, kind, kWindow, x.out, x.options);
                        };
                      });
}

}   // namespace

std::vector<Group> longformer_groups(int max_threads) {
  const PatternShape shape{4096, 4096, 12, 12, 64};
  const SparseImpl window =
      pattern_impl("window", shape, window_pairs(shape), static_cast<double>(shape.len_k), [](PatternTensors x) {
        x.options.window = {kWindow, kWindow};
        return [x] { return fovea::attention(x.q, x.k, x.v, x.out, x.options); };
      });
  std::vector<Group> groups;
  for (int threads = 1; threads <= std::min(2, max_threads); ++threads)
    groups.push_back(pattern_group(
        "longformer/prefill/q4096/kv4096/h12x12/d64", shape, threads, false,
        {longformer("fovea", shape, 1), longformer("global64", shape, 64), window, dense_impl(shape, fovea::Causal::none)}));
  return groups;
}

}   // namespace fovea_bench
