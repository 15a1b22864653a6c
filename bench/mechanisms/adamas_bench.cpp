// SPDX-License-Identifier: Apache-2.0
// A decode step at 32 K with a budget of 128 keys, selection included, against the dense step over the same bf16 cache: 32
// bytes of codes per key and 512 per selected key, against 512 per key.
#include "fovea/mechanisms/adamas.hpp"

#include "fovea/cache/code_cache.hpp"
#include "support/selecting_decode.hpp"

namespace fovea_bench {

namespace {

// The numbers of a bench lie in [-1, 1): thresholds at 0.8 give all four codes, as +-10 do with the keys of models.
constexpr float kThreshold = 0.8f;

struct Codes {
  fovea::CodeCache cache;
  explicit Codes(const fovea::Operand& k) {
    cache.create({1, k.extent[2], k.extent[1], k.extent[3], kThreshold}).or_throw();
    cache.append(0, k).or_throw();
  }
};

}   // namespace

std::vector<Group> adamas_groups(int max_threads) {
  std::vector<Group> groups;
  for (const SelectingShape& shape : {SelectingShape{}, SelectingShape{32768, 32, 8, 128}}) {
    for (int threads = 1; threads <= (shape.kv_heads == 32 ? max_threads : 1); ++threads) {
      constexpr index_t kBudget = 128;
      const auto attend = [](const auto& q, const fovea::Kv& kv, const Codes& codes, const auto& out, const auto& options) {
        return fovea::adamas_attention<fovea::Formats<Format::bf16>>(q, kv, codes.cache.codes(), out, options,
                                                                     {kBudget, true, kThreshold});
      };
      const auto heads = static_cast<double>(shape.q_heads), keys = static_cast<double>(shape.len_k);
      const double selected = heads * static_cast<double>(4 * kBudget * shape.dim);
      groups.push_back(selecting_group<Codes>("adamas", shape, threads, selected,
                                              static_cast<double>(shape.kv_heads) * keys * 32 + selected, attend));
    }
  }
  return groups;
}

}   // namespace fovea_bench
