// SPDX-License-Identifier: Apache-2.0
// Views over std::mdspan: rank 4 is [batch, head, pos, dim], rank 3 is [head, pos, dim] with batch 1. Any layout with
// strides will do (layout_right, layout_left, layout_stride); token-major storage is a layout_stride mapping with the axes
// in this order. Empty where the standard library has no <mdspan>.
#pragma once
#if __has_include(<version>)
#include <version>
#endif
#if __has_include(<mdspan>) && defined(__cpp_lib_mdspan)
#include <cstddef>
#include <mdspan>
#include <type_traits>

#include "../core/view.hpp"

namespace fovea {
inline namespace v0 {

template <class T, class Extents, class Layout, class Accessor>
FOVEA_DATA_INLINE Tensor<T> from_mdspan(const std::mdspan<T, Extents, Layout, Accessor>& span) {
  using Span = std::mdspan<T, Extents, Layout, Accessor>;
  constexpr bool rank_known = Span::rank() == 3 || Span::rank() == 4;
  constexpr bool strided = Span::is_always_strided();
  constexpr bool plain = std::is_convertible_v<typename Accessor::data_handle_type, T*>;
  static_assert(rank_known,
                "fovea::from_mdspan: the mdspan must have rank 4 [batch, head, pos, dim] or rank 3 [head, pos, dim]");
  static_assert(strided,
                "fovea::from_mdspan: the layout must have a stride per axis (layout_right, layout_left, layout_stride)");
  static_assert(plain, "fovea::from_mdspan: the accessor must hand out a plain pointer (std::default_accessor)");
  Tensor<T> view;
  if constexpr (rank_known && strided && plain) {
    view.data = span.data_handle();
    view.extent[0] = 1;
    view.stride[0] = static_cast<index_t>(span.mapping().required_span_size());
    constexpr std::size_t first = 4 - Span::rank();
    for (std::size_t axis = 0; axis < Span::rank(); ++axis) {
      view.extent[first + axis] = static_cast<index_t>(span.extent(axis));
      view.stride[first + axis] = static_cast<index_t>(span.stride(axis));
    }
  }
  return view;
}

}   // namespace v0
}   // namespace fovea
#endif
