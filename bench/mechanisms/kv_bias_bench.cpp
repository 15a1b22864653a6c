// SPDX-License-Identifier: Apache-2.0
// One learned key, and value, per kv head: two dot products and a row of fused additions per query.
#include "fovea/mechanisms/kv_bias.hpp"

#include "support/variant_row.hpp"

namespace fovea_bench {

namespace {

VariantCall with_bias(const char* impl, bool with_value) {
  return {impl,
          [=](const VariantTensors& x) {
            const index_t heads = x.k.extent[1], dim = x.k.extent[3];
            fovea::KvBias bias{{x.extra.data(), {heads, dim}, {dim, 1}}, {}};
            if (with_value) bias.value = {x.extra.data() + heads * dim, {heads, dim}, {dim, 1}};
            return [=] { return fovea::kv_bias_attention(x.q, x.k, x.v, x.out, bias, x.options); };
          },
          2 * VariantShape{}.kv_heads * VariantShape{}.dim};
}

}   // namespace

std::vector<Group> kv_bias_groups(int) {
  return {variant_group("kv_bias", {bare_softmax(), with_bias("fovea", true), with_bias("key_only", false)})};
}

}   // namespace fovea_bench
