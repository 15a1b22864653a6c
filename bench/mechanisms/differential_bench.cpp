// SPDX-License-Identifier: Apache-2.0
// Against two bare calls on the same data. V1: 4 outputs of two heads each, values of 256 numbers; V2: the same queries, two
// kv heads, values of 128.
#include "fovea/mechanisms/differential.hpp"

#include "support/variant_row.hpp"

namespace fovea_bench {

namespace {

fovea::Tensor<const float> half(const fovea::Tensor<const float>& x, index_t first) {
  return fovea::door::every_other_head(x, first);
}

struct Tensors {
  fovea::Tensor<const float> q, k, v;   // q [1, 8, len, 128]
  fovea::Tensor<float> out;             // [1, 4, len, dim_v]
};

// The memory of V and out holds half as many heads that are twice as wide.
Tensors first_version(const VariantTensors& x) {
  const index_t heads = x.q.extent[1], len = x.q.extent[2], dim = x.q.extent[3];
  return {x.q, x.k, fovea::bhsd(x.v.data, 1, heads / 2, len, 2 * dim), fovea::bhsd(x.out.data, 1, heads / 2, len, 2 * dim)};
}
Tensors second_version(const VariantTensors& x) {
  const index_t heads = x.q.extent[1], len = x.q.extent[2], dim = x.q.extent[3];
  return {x.q, fovea::bhsd(x.k.data, 1, heads / 4, len, dim), fovea::bhsd(x.v.data, 1, heads / 4, len, dim),
          fovea::bhsd(x.out.data, 1, heads / 2, len, dim)};
}

}   // namespace

std::vector<Group> differential_groups(int) {
  const VariantCall two_calls{"softmax",
                              [](const VariantTensors& x) {
                                const Tensors t = first_version(x);
                                return [=] {
                                  const fovea::Status s =
                                      fovea::attention(half(t.q, 0), half(t.k, 0), t.v, t.out, x.options);
                                  return s.ok() ? fovea::attention(half(t.q, 1), half(t.k, 1), t.v, t.out, x.options) : s;
                                };
                              },
                              0, 1.5};
  const VariantCall first{"fovea",
                          [](const VariantTensors& x) {
                            const Tensors t = first_version(x);
                            const fovea::DifferentialOptions options{
                                .attention = x.options,
                                .lambda = 0.6f,
                                .lambda_init = 0.2f,
                                .norm_weight = x.extra.first(static_cast<std::size_t>(t.v.extent[3]))};
                            return [=] { return fovea::differential_attention(t.q, t.k, t.v, t.out, options); };
                          },
                          512, 1.5};
  const VariantCall two_v2{"softmax", [](const VariantTensors& x) {
                             const Tensors t = second_version(x);
                             return [=] {
                               const fovea::Status s = fovea::attention(half(t.q, 0), t.k, t.v, t.out, x.options);
                               return s.ok() ? fovea::attention(half(t.q, 1), t.k, t.v, t.out, x.options) : s;
                             };
                           }};
  const auto version_two = [](bool at_once) {
    return [at_once](const VariantTensors& x) {
      const Tensors t = second_version(x);
      const index_t heads = t.out.extent[1], len = t.out.extent[2];
      fovea::DifferentialV2Options options{.attention = x.options};
      options.lambda = {x.extra.data(), {1, heads, len}, {heads * len, len, 1}};
      const auto memory =
          std::make_shared<std::vector<float>>(static_cast<std::size_t>(at_once ? 2 * heads * len * t.v.extent[3] : 0));
      if (at_once) options.halves = fovea::bhsd(memory->data(), 1, 2 * heads, len, t.v.extent[3]);
      return [=, keep = memory] { return fovea::differential_attention_v2(t.q, t.k, t.v, t.out, options); };
    };
  };
  const VariantShape shape;
  return {variant_group("differential", {two_calls, first}),
          variant_group("differential_v2", {two_v2,
                                            {"fovea", version_two(false), shape.q_heads * shape.len},
                                            {"at_once", version_two(true), shape.q_heads * shape.len}})};
}

}   // namespace fovea_bench
