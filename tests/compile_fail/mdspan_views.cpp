// SPDX-License-Identifier: Apache-2.0
// expect: fovea::from_mdspan: the mdspan must have rank 4 [batch, head, pos, dim] or rank 3 [head, pos, dim]
// expect: fovea::from_mdspan: the layout must have a stride per axis
// expect: fovea::from_mdspan: the accessor must hand out a plain pointer
// A rank that names no axes, a layout in blocks, an accessor that hands out something else than a pointer.
#include <fovea/adapters/mdspan.hpp>

#include "../support/mdspan.hpp"

using Extents = md::dextents<int, 3>;
#if defined(FOVEA_MUST_COMPILE)
using Given = md::mdspan<float, Extents>;
using Blocked = Given;
using Handled = Given;
#else
struct InBlocks {
  template <class E>
  struct mapping : md::layout_right::mapping<E> {
    using md::layout_right::mapping<E>::mapping;
    static constexpr bool is_always_strided() { return false; }
  };
};
struct Handle {
  float* data;
};
struct HandleAccessor : md::default_accessor<float> {
  using data_handle_type = Handle;
};
using Given = md::mdspan<float, md::dextents<int, 2>>;
using Blocked = md::mdspan<float, Extents, InBlocks>;
using Handled = md::mdspan<float, Extents, md::layout_right, HandleAccessor>;
#endif

bool seen(const Given& given, const Blocked& blocked, const Handled& handled) {
  return fovea::from_mdspan(given) && fovea::from_mdspan(blocked) && fovea::from_mdspan(handled);
}
