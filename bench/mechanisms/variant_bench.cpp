// SPDX-License-Identifier: Apache-2.0
// What it costs to change scores, to ask a mask functor in every tile, and to bring all options along.
#include <array>

#include "support/variant_row.hpp"

namespace fovea_bench {
namespace {

// A variant whose policies need nothing that changes between calls.
template <class MakeVariant>
VariantCall call(const std::string& impl, const MakeVariant& make_variant) {
  return {impl, [make_variant](const VariantTensors& x) {
            const auto variant = make_variant();
            return [x, variant] { return fovea::attention(x.q, x.k, x.v, x.out, x.options, variant); };
          }};
}

}  // namespace

std::vector<Group> variant_groups(int) {
  static constexpr std::array<float, 8> kSlopes{0x1p-1f, 0x1p-2f, 0x1p-3f, 0x1p-4f, 0x1p-5f, 0x1p-6f, 0x1p-7f, 0x1p-8f};
  // Three flops per score: a difference of positions and an FMA.
  const VariantCall custom = call("fovea", [] {
    return fovea::variant().with_score([](auto s, int, int, int q, auto k) { return s - 0.01f * fovea::to_float(k - q); });
  });
  const VariantCall mask_mod = call("mask_mod", [] {
    return fovea::variant().with_mask([](int, int, int q, auto k) { return k <= q; });
  });
  const VariantCall options = call("with_options", [] { return fovea::variant().with_options(); });
  const VariantCall alibi = call("fovea", [] { return fovea::variant().with_score(fovea::Alibi{kSlopes.data()}); });
  const VariantCall softcap = call("fovea", [] { return fovea::variant().with_score(fovea::Softcap{50.f}); });
  return {variant_group("custom_score", {bare_softmax(), custom, mask_mod, options}),
          variant_group("alibi", {bare_softmax(), alibi}), variant_group("softcap", {bare_softmax(), softcap})};
}

}  // namespace fovea_bench
