// SPDX-License-Identifier: Apache-2.0
// Views over std::mdspan: rank 4 is [batch, head, pos, dim], rank 3 is [head, pos, dim] with batch 1. Any layout with
// strides will do (layout_right, layout_left, layout_stride); token-major storage is a layout_stride mapping with the axes
// in this order. Only the names of its members are asked for, so no <mdspan> is needed here, and a class of the same interface
// serves as well: the C++23 header is younger than the compilers that this library supports.
#pragma once
#include <cstddef>
#include <type_traits>

#include "../core/view.hpp"

namespace fovea {
inline namespace v0 {

template <class Span>
FOVEA_DATA_INLINE Tensor<typename Span::element_type> from_mdspan(const Span& span) {
  constexpr bool rank_known = Span::rank() == 3 || Span::rank() == 4;
  constexpr bool strided = Span::is_always_strided();
  constexpr bool plain = std::is_convertible_v<typename Span::data_handle_type, typename Span::element_type*>;
  static_assert(rank_known,
                "fovea::from_mdspan: the mdspan must have rank 4 [batch, head, pos, dim] or rank 3 [head, pos, dim]");
  static_assert(strided,
                "fovea::from_mdspan: the layout must have a stride per axis (layout_right, layout_left, layout_stride)");
  static_assert(plain, "fovea::from_mdspan: the accessor must hand out a plain pointer (std::default_accessor)");
  Tensor<typename Span::element_type> view;
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
