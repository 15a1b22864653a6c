// SPDX-License-Identifier: Apache-2.0
// Block-local attention as plain loops in double.
#pragma once
#include "listed_keys.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// The query at position t sees the keys of the blocks floor(t / block) - look_back .. floor(t / block) + look_ahead, with
// causal only those up to t.
inline void block_local(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out,
                        index_t block, index_t look_back, index_t look_ahead, const AttentionOptions& options,
                        View<double, 3> lse = {}) {
  listed_keys(q, k, v, out, options, lse, [&](index_t, index_t, index_t t, const auto& see) {
    for (index_t s = 0; s < k.extent[2]; ++s) {
      const index_t own = static_cast<index_t>(std::floor(static_cast<double>(t) / static_cast<double>(block)));
      const bool near = s / block >= own - look_back && s / block <= own + look_ahead;
      if (near && (options.causal == Causal::none || s <= t)) see(s);
    }
  });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
