// SPDX-License-Identifier: Apache-2.0
// A causal prefill of 32 K with the published blocks of 2048 and k 3, means and gates included, against the dense one on the
// same numbers. flops count the visible pairs of each, so that the quotient of the rates is the share of the ideal speed-up.
#include "fovea/mechanisms/moba.hpp"

#include "fovea/attention.hpp"
#include "support/sparse_row.hpp"

namespace fovea_bench {

namespace {

constexpr index_t kHeads = 2, kLen = 32768, kDim = 128;

double visible_pairs(const fovea::MobaOptions& moba) {
  double pairs = 0;
  for (index_t pos = 0; pos < kLen; ++pos)
    pairs += static_cast<double>(pos % moba.block + 1 + std::min(moba.k - 1, pos / moba.block) * moba.block);
  return static_cast<double>(kHeads) * pairs;
}

}   // namespace

std::vector<Group> moba_groups(int) {
  using F32 = fovea::Formats<fovea::Format::f32>;
  constexpr index_t kNumbers = kHeads * kLen * kDim;
  const auto make = [](const auto& call) {
    return [=](const SparseMemory& memory) -> SparseWork {
      const auto view = [&](index_t n) {
        return fovea::bhsd<const float>(memory.inputs.data() + n * kNumbers, 1, kHeads, kLen, kDim);
      };
      const auto q = view(0), k = view(1), v = view(2);
      const auto out = fovea::bhsd<float>(memory.outputs.data(), 1, kHeads, kLen, kDim);
      fovea::AttentionOptions options;
      options.causal = fovea::Causal::bottom_right;
      options.executor = memory.executor;
      return {[=] { return call(q, fovea::dense_kv(k, v), out, options); }};
    };
  };
  const fovea::MobaOptions moba;
  const auto blocks = [=](const auto& q, const fovea::Kv& kv, const auto& out, const auto& options) {
    return fovea::moba_attention<F32>(q, kv, out, options, moba);
  };
  const auto dense = [](const auto& q, const fovea::Kv& kv, const auto& out, const auto& options) {
    return fovea::attention<F32>(q, kv, out, options);
  };
  const double pairs = visible_pairs(moba), all = visible_pairs({kLen, 1, {}}), per_pair = 4 * static_cast<double>(kDim);
  const std::string share = std::to_string(static_cast<int>(100 * pairs / all + 0.5));
  Group group = sparse_group("moba/prefill/q32768/h2x2/block2048/k3/share" + share, 1, 3 * kNumbers, kNumbers, false,
                             {{"fovea", pairs * per_pair, 0, make(blocks)}, {"dense", all * per_pair, 0, make(dense)}});
  group.slow = true;   // seconds a call
  return {group};
}

}   // namespace fovea_bench
