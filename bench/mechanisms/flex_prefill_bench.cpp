// SPDX-License-Identifier: Apache-2.0
// A prompt of 32768 tokens, selection included, beside the dense kernel on the same numbers; every row counts the dense
// flops, so the ratio of two rates is that of their times. `select` is the selection alone.
#include "fovea/mechanisms/flex_prefill.hpp"

#include "support/selecting_prefill.hpp"

namespace fovea_bench {

std::vector<Group> flex_prefill_groups(int max_threads) {
  using P = LongPrompt;
  return selecting_prefill_groups<fovea::FlexPrefillLists>(
      max_threads, "flex_prefill", fovea::FlexPrefill{}, {}, P::kDenseFlops,
      [](const SelectingPrefill& x) { return fovea::flex_prefill<SelectingFormats>(x.q, x.kv, x.out, {}, x.options); });
}

}   // namespace fovea_bench
