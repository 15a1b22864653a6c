// SPDX-License-Identifier: Apache-2.0
// Compiled to something only where the standard library has <mdspan>.
#include "fovea/adapters/mdspan.hpp"

#if defined(__cpp_lib_mdspan)
#include <array>
#include <type_traits>
#include <vector>

#include "catch_compat.hpp"

using fovea::index_t;

TEST_CASE("from_mdspan sees rank 4 as [batch, head, pos, dim] and rank 3 with batch 1", "[adapters]") {
  std::vector<float> memory(2 * 3 * 4 * 5);
  const std::mdspan whole(memory.data(), std::dextents<int, 4>(2, 3, 4, 5));
  const auto view = fovea::from_mdspan(whole);
  static_assert(std::is_same_v<decltype(view), const fovea::Tensor<float>>);
  CHECK(view.extent == std::array<index_t, 4>{2, 3, 4, 5});
  CHECK(view.stride == std::array<index_t, 4>{60, 20, 5, 1});
  CHECK(view.data == memory.data());

  const std::mdspan one(static_cast<const float*>(memory.data()), std::extents<std::size_t, 3, std::dynamic_extent, 5>(4));
  const auto readable = fovea::from_mdspan(one);
  static_assert(std::is_same_v<decltype(readable), const fovea::Tensor<const float>>);
  CHECK(readable.extent == std::array<index_t, 4>{1, 3, 4, 5});
  CHECK(&readable(0, 2, 3, 4) == memory.data() + 2 * 20 + 3 * 5 + 4);
}

TEST_CASE("from_mdspan carries the strides of layout_stride: token-major memory", "[adapters]") {
  std::vector<float> memory(2 * 4 * 3 * 5);   // [batch, pos, head, dim]
  using Extents = std::dextents<index_t, 4>;
  const std::layout_stride::mapping<Extents> mapping(Extents(2, 3, 4, 5), std::array<index_t, 4>{60, 5, 15, 1});
  const std::mdspan<float, Extents, std::layout_stride> span(memory.data(), mapping);
  const auto view = fovea::from_mdspan(span), expected = fovea::bshd(memory.data(), 2, 4, 3, 5);
  CHECK(view.extent == expected.extent);
  CHECK(view.stride == expected.stride);
}
#endif
