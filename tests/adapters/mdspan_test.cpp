// SPDX-License-Identifier: Apache-2.0
#include "fovea/adapters/mdspan.hpp"

#include <array>
#include <cstring>
#include <type_traits>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/attention.hpp"
#include "support/mdspan.hpp"
#include "support/random.hpp"

namespace {

using fovea::index_t;

std::vector<float> numbers(index_t count, std::uint64_t seed) {
  test::Random random(seed);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = random.normal();
  return values;
}

}   // namespace

TEST_CASE("from_mdspan sees rank 4 as [batch, head, pos, dim] and rank 3 with batch 1", "[adapters]") {
  std::vector<float> memory(2 * 3 * 4 * 5);
  const md::mdspan whole(memory.data(), md::dextents<int, 4>(2, 3, 4, 5));
  const auto view = fovea::from_mdspan(whole);
  static_assert(std::is_same_v<decltype(view), const fovea::Tensor<float>>);
  CHECK(view.extent == std::array<index_t, 4>{2, 3, 4, 5});
  CHECK(view.stride == std::array<index_t, 4>{60, 20, 5, 1});
  CHECK(view.data == memory.data());

  const md::mdspan one(static_cast<const float*>(memory.data()), md::extents<std::size_t, 3, std::dynamic_extent, 5>(4));
  const auto readable = fovea::from_mdspan(one);
  static_assert(std::is_same_v<decltype(readable), const fovea::Tensor<const float>>);
  CHECK(readable.extent == std::array<index_t, 4>{1, 3, 4, 5});
  CHECK(&readable(0, 2, 3, 4) == memory.data() + 2 * 20 + 3 * 5 + 4);
}

TEST_CASE("from_mdspan carries the strides of layout_stride: token-major memory", "[adapters]") {
  std::vector<float> memory(2 * 4 * 3 * 5);   // [batch, pos, head, dim]
  using Extents = md::dextents<index_t, 4>;
  const md::layout_stride::mapping<Extents> mapping(Extents(2, 3, 4, 5), std::array<index_t, 4>{60, 5, 15, 1});
  const md::mdspan<float, Extents, md::layout_stride> span(memory.data(), mapping);
  const auto view = fovea::from_mdspan(span), expected = fovea::bshd(memory.data(), 2, 4, 3, 5);
  CHECK(view.extent == expected.extent);
  CHECK(view.stride == expected.stride);
}

TEST_CASE("from_mdspan carries the strides of layout_left, and an mdspan without elements", "[adapters]") {
  std::vector<float> memory(2 * 3 * 4 * 5);
  const md::mdspan<float, md::dextents<int, 4>, md::layout_left> left(memory.data(), md::dextents<int, 4>(2, 3, 4, 5));
  CHECK(fovea::from_mdspan(left).stride == std::array<index_t, 4>{1, 2, 6, 24});
  const md::mdspan none(memory.data(), md::dextents<int, 3>(3, 0, 5));
  CHECK(fovea::from_mdspan(none).extent == std::array<index_t, 4>{1, 3, 0, 5});
}

TEST_CASE("attention over mdspans: the bits of the same call over named layouts, or the reason why not", "[adapters]") {
  constexpr index_t heads = 2, len = 9, dim = 20, size = heads * len * dim;
  const std::vector<float> q = numbers(size, 1), k = numbers(size, 2), v = numbers(size, 3);
  std::vector<float> out(size, -1.f), expected(size, -2.f);
  using Rank3 = md::dextents<index_t, 3>;
  const Rank3 extents(heads, len, dim);
  const md::layout_stride::mapping<Rank3> token_major(extents, std::array<index_t, 3>{dim, heads * dim, 1});
  const md::mdspan<const float, Rank3, md::layout_stride> q_span(q.data(), token_major), k_span(k.data(), token_major);
  const md::mdspan<const float, Rank3> v_span(v.data(), extents);
  const md::mdspan<float, Rank3> out_span(out.data(), extents);
  const fovea::AttentionOptions options{.causal = fovea::Causal::top_left};
  fovea::attention(fovea::from_mdspan(q_span), fovea::from_mdspan(k_span), fovea::from_mdspan(v_span),
                   fovea::from_mdspan(out_span), options)
      .or_throw();
  fovea::attention(fovea::bshd(q.data(), 1, len, heads, dim), fovea::bshd(k.data(), 1, len, heads, dim),
                   fovea::bhsd(v.data(), 1, heads, len, dim), fovea::bhsd(expected.data(), 1, heads, len, dim), options)
      .or_throw();
  CHECK(std::memcmp(out.data(), expected.data(), sizeof(float) * size) == 0);

  const md::mdspan<const float, Rank3, md::layout_left> column_major(k.data(), extents);
  const fovea::Status refused = fovea::attention(fovea::from_mdspan(q_span), fovea::from_mdspan(column_major),
                                                 fovea::from_mdspan(v_span), fovea::from_mdspan(out_span), options);
  CHECK(refused.code() == fovea::Code::unsupported);
  CHECK_THAT(refused.message(), Catch::Matchers::ContainsSubstring("k has innermost stride 18, must be 1"));
}
