// SPDX-License-Identifier: Apache-2.0
// Views over Eigen: a row-major matrix [batch * pos, heads * dim], the shape a projection `x * W` leaves behind, seen as
// [batch, head, pos, dim] without a copy. Takes Matrix, Map, Ref and blocks of them (qkv.leftCols(n)); const stays const.
// Eigen's 16-bit numbers have the bits of fovea's: matrices of them give views of f16 and bf16, convert<f16>(Eigen::half(x))
// and back keeps the bits, as_storage does the same for any view.
#pragma once
#include <Eigen/Core>
#include <type_traits>

#include "../core/convert.hpp"
#include "../core/view.hpp"

namespace fovea {
inline namespace v0 {

template <>
struct StorageOf<Eigen::half> {
  using type = f16;
};
template <>
struct FormatOf<Eigen::half> : FormatOf<f16> {};
template <>
struct StorageOf<Eigen::bfloat16> {
  using type = bf16;
};
template <>
struct FormatOf<Eigen::bfloat16> : FormatOf<bf16> {};

// A matrix whose columns are not heads * dim, or whose rows are not batch * pos, gives a view without data, which every
// call refuses.
template <class Matrix>
FOVEA_DATA_INLINE auto from_eigen(Matrix&& matrix, index_t heads, index_t batch = 1) {
  using Plain = std::remove_cvref_t<Matrix>;
  constexpr bool has_memory = (int(Plain::Flags) & int(Eigen::DirectAccessBit)) != 0;
  constexpr bool row_major = bool(Plain::IsRowMajor);
  constexpr bool stays_alive =
      std::is_lvalue_reference_v<Matrix> || !std::is_base_of_v<Eigen::PlainObjectBase<Plain>, Plain>;
  static_assert(has_memory,
                "fovea::from_eigen: this is an Eigen expression without memory of its own; evaluate it into a matrix first");
  static_assert(row_major,
                "fovea::from_eigen: the matrix must be row-major, one token per row [pos, heads * dim]; Eigen's default is "
                "column-major, so declare it with Eigen::RowMajor");
  static_assert(stays_alive, "fovea::from_eigen: a view of a temporary matrix would dangle; give the matrix a name");
  if constexpr (has_memory && row_major && stays_alive) {
    using Element = std::remove_pointer_t<decltype(matrix.data())>;
    const index_t rows = matrix.rows(), cols = matrix.cols();
    Tensor<Element> view;
    if (heads <= 0 || batch <= 0 || cols % heads != 0 || rows % batch != 0) return as_storage(view);
    const index_t len = rows / batch, dim = cols / heads, token = matrix.outerStride(), step = matrix.innerStride();
    view = {matrix.data(), {batch, heads, len, dim}, {len * token, dim * step, token, step}};
    return as_storage(view);
  } else {
    return Tensor<const float>{};
  }
}

}   // namespace v0
}   // namespace fovea
