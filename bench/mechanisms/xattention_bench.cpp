// SPDX-License-Identifier: Apache-2.0
// A prompt of 32768 tokens, selection included, beside the dense kernel on the same numbers. `select` is the selection alone, its
// flops those of one antidiagonal in 16.
#include "fovea/mechanisms/xattention.hpp"

#include "support/selecting_prefill.hpp"

namespace fovea_bench {

std::vector<Group> xattention_groups(int max_threads) {
  using P = LongPrompt;
  constexpr double kShare = 0.242;   // of the causal blocks of 128 x 128, chosen at a threshold of 0.9
  return selecting_prefill_groups<fovea::XAttentionLists>(
      max_threads, "xattention", fovea::XAttention{}, kShare, P::kDenseFlops / 2 / 16,
      [](const SelectingPrefill& x) { return fovea::xattention<SelectingFormats>(x.q, x.kv, x.out, {}, x.options); });
}

}   // namespace fovea_bench
