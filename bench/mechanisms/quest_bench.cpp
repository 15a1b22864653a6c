// SPDX-License-Identifier: Apache-2.0
// A decode step at 32 K with a budget of 2048 keys in pages of 16, selection included, against the dense step over the same
// bf16 cache: 1/16 of its bytes are bounds, 1/16 selected pages.
#include "fovea/mechanisms/quest.hpp"

#include "fovea/cache/page_bounds.hpp"
#include "support/selecting_decode.hpp"

namespace fovea_bench {

namespace {

struct Bounds {
  fovea::PageBounds cache;
  explicit Bounds(const fovea::Operand& k) {
    cache.create({1, k.extent[2], k.extent[1], k.extent[3], 16, Format::bf16}).or_throw();
    cache.append(0, k).or_throw();
  }
};

}   // namespace

std::vector<Group> quest_groups(int max_threads) {
  std::vector<Group> groups;
  for (const SelectingShape& shape : {SelectingShape{}, SelectingShape{32768, 32, 8, 128}}) {
    for (int threads = 1; threads <= (shape.kv_heads == 32 ? max_threads : 1); ++threads) {
      const fovea::QuestOptions quest;
      const auto attend = [=](const auto& q, const fovea::Kv& kv, const Bounds& bounds, const auto& out,
                              const auto& options) {
        return fovea::quest_attention<fovea::Formats<Format::bf16>>(q, kv, bounds.cache.bounds(), out, options, quest);
      };
      const auto heads = static_cast<double>(shape.q_heads);
      const auto pages = static_cast<double>(shape.len_k / quest.page), numbers = static_cast<double>(4 * shape.dim);
      const double selected = heads * static_cast<double>(quest.budget) * numbers;
      groups.push_back(selecting_group<Bounds>("quest", shape, threads, selected + heads * pages * numbers,
                                               static_cast<double>(shape.kv_heads) * pages * numbers + selected, attend));
    }
  }
  return groups;
}

}   // namespace fovea_bench
