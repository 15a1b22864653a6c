// SPDX-License-Identifier: Apache-2.0
// Namespace md: std where the standard library has <mdspan>, else a stand-in for tests alone, with as much of its interface as
// the adapter asks for: extents, the three layouts, a plain accessor. The words are those of [views.multidim] in C++23.
#pragma once
#include <version>
#if defined(__cpp_lib_mdspan)
#include <mdspan>
namespace md = std;
#else
#include <array>
#include <cstddef>
#include <span>
#include <type_traits>
#include <utility>

namespace md {

template <class Index, std::size_t... Extents>
class extents {
 public:
  using index_type = Index;
  using rank_type = std::size_t;
  static constexpr rank_type rank() { return sizeof...(Extents); }
  static constexpr rank_type rank_dynamic() { return (std::size_t{Extents == std::dynamic_extent} + ... + 0); }

  // Of the dynamic axes only, in their order.
  template <class... Dynamic>
    requires(sizeof...(Dynamic) == rank_dynamic() && (std::is_convertible_v<Dynamic, Index> && ...))
  explicit constexpr extents(Dynamic... dynamic) {
    const std::array<Index, rank_dynamic()> given{static_cast<Index>(dynamic)...};
    std::size_t axis = 0, used = 0;
    for (const std::size_t fixed : {Extents...})
      extent_[axis++] = fixed == std::dynamic_extent ? given[used++] : static_cast<Index>(fixed);
  }
  constexpr Index extent(rank_type axis) const { return extent_[axis]; }

 private:
  std::array<Index, sizeof...(Extents)> extent_{};
};

template <class Index, class Axes>
struct AllDynamic;
template <class Index, std::size_t... Axis>
struct AllDynamic<Index, std::index_sequence<Axis...>> {
  using type = extents<Index, (static_cast<void>(Axis), std::dynamic_extent)...>;
};
template <class Index, std::size_t Rank>
using dextents = typename AllDynamic<Index, std::make_index_sequence<Rank>>::type;

// Extents and a stride per axis: what a mapping of any of the three layouts comes down to.
template <class Extents>
class StridedMapping {
 public:
  using index_type = typename Extents::index_type;
  static constexpr bool is_always_strided() { return true; }
  constexpr const Extents& extents() const { return extents_; }
  constexpr index_type stride(std::size_t axis) const { return stride_[axis]; }
  constexpr index_type required_span_size() const {
    index_type last = 0;
    for (std::size_t axis = 0; axis < Extents::rank(); ++axis) {
      if (extents_.extent(axis) == 0) return 0;
      last = static_cast<index_type>(last + (extents_.extent(axis) - 1) * stride_[axis]);
    }
    return static_cast<index_type>(last + 1);
  }

 protected:
  explicit constexpr StridedMapping(const Extents& extents) : extents_(extents) {}

  Extents extents_;
  std::array<index_type, Extents::rank()> stride_{};
};

// Dense axes: the last one contiguous, or the first.
template <class Extents, bool LastFirst>
class DenseMapping : public StridedMapping<Extents> {
 public:
  constexpr DenseMapping(const Extents& extents) : StridedMapping<Extents>(extents) {
    typename Extents::index_type step = 1;
    for (std::size_t n = 0; n < Extents::rank(); ++n) {
      const std::size_t axis = LastFirst ? Extents::rank() - 1 - n : n;
      this->stride_[axis] = step;
      step *= extents.extent(axis);
    }
  }
};

struct layout_right {
  template <class Extents>
  using mapping = DenseMapping<Extents, true>;
};

struct layout_left {
  template <class Extents>
  using mapping = DenseMapping<Extents, false>;
};

struct layout_stride {
  template <class Extents>
  class mapping : public StridedMapping<Extents> {
   public:
    template <class Index>
    constexpr mapping(const Extents& extents, const std::array<Index, Extents::rank()>& strides) : StridedMapping<Extents>(extents) {
      for (std::size_t axis = 0; axis < Extents::rank(); ++axis)
        this->stride_[axis] = static_cast<typename Extents::index_type>(strides[axis]);
    }
  };
};

template <class T>
struct default_accessor {
  using element_type = T;
  using data_handle_type = T*;
};

template <class T, class Extents, class Layout = layout_right, class Accessor = default_accessor<T>>
class mdspan {
 public:
  using element_type = T;
  using index_type = typename Extents::index_type;
  using mapping_type = typename Layout::template mapping<Extents>;
  using data_handle_type = typename Accessor::data_handle_type;

  constexpr mdspan(data_handle_type data, const Extents& extents) : data_(data), mapping_(extents) {}
  constexpr mdspan(data_handle_type data, const mapping_type& mapping) : data_(data), mapping_(mapping) {}

  static constexpr std::size_t rank() { return Extents::rank(); }
  static constexpr bool is_always_strided() { return mapping_type::is_always_strided(); }
  constexpr index_type extent(std::size_t axis) const { return mapping_.extents().extent(axis); }
  constexpr index_type stride(std::size_t axis) const { return mapping_.stride(axis); }
  constexpr const data_handle_type& data_handle() const { return data_; }
  constexpr const mapping_type& mapping() const { return mapping_; }

 private:
  data_handle_type data_;
  mapping_type mapping_;
};
template <class T, class Index, std::size_t... Extents>
mdspan(T*, const extents<Index, Extents...>&) -> mdspan<T, extents<Index, Extents...>>;

}   // namespace md
#endif
