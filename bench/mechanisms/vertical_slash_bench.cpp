// SPDX-License-Identifier: Apache-2.0
// A prompt of 32768 tokens, selection included, beside the dense kernel on the same numbers. `select` is the selection alone; its
// flops are those of the last 64 queries' scores, twice.
#include "fovea/mechanisms/vertical_slash.hpp"

#include "support/selecting_prefill.hpp"

namespace fovea_bench {

std::vector<Group> vertical_slash_groups(int max_threads) {
  using P = LongPrompt;
  constexpr double kShare = 0.2526;   // of the causal keys, at the published 1000 columns and 6096 diagonals
  return selecting_prefill_groups<fovea::VerticalSlashLists>(
      max_threads, "vertical_slash", fovea::VerticalSlash{}, kShare, 4. * P::kHeads * P::kDim * P::kLen * 64,
      [](const SelectingPrefill& x) {
        return fovea::vertical_slash_attention<SelectingFormats>(x.q, x.kv, x.out, {}, x.options);
      });
}

}   // namespace fovea_bench
