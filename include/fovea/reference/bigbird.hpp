// SPDX-License-Identifier: Apache-2.0
// BigBird's block attention as plain loops in double.
#pragma once
#include "listed_keys.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

// random_blocks [q_head | 1, blocks - 2, r], row i - 1 for query block i, negative numbers skipped; a block that is named
// twice counts twice. valid [batch, pos], 0 = padding: never a key, its rows are 0. Null: no padding.
inline void bigbird(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<double> out, index_t block,
                    View<const std::int32_t, 3> random_blocks, View<const std::uint8_t, 2> valid,
                    const AttentionOptions& options = {}, View<double, 3> lse = {}) {
  const index_t blocks = q.extent[2] / block;
  listed_keys(q, k, v, out, options, lse, [&](index_t b, index_t head, index_t t, const auto& see) {
    if (valid && valid(b, t) == 0) return;
    const auto see_block = [&](index_t n) {
      for (index_t s = n * block; s < (n + 1) * block; ++s) {
        if (!valid || valid(b, s) != 0) see(s);
      }
    };
    const index_t i = t / block;
    if (i == 0 || i == blocks - 1) {
      for (index_t n = 0; n < blocks; ++n) see_block(n);
      return;
    }
    if (i == 1) {
      for (const index_t n : {index_t{0}, index_t{1}, index_t{2}, blocks - 1}) see_block(n);
    } else if (i == blocks - 2) {
      for (const index_t n : {index_t{0}, blocks - 3, blocks - 2, blocks - 1}) see_block(n);
    } else {
      for (const index_t n : {index_t{0}, i - 1, i, i + 1, blocks - 1}) see_block(n);
    }
    for (index_t r = 0; r < random_blocks.extent[2]; ++r) {
      const index_t n = random_blocks(random_blocks.extent[0] == 1 ? 0 : head, i - 1, r);
      if (n >= 0) see_block(n);
    }
  });
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
