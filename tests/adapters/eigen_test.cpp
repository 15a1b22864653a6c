// SPDX-License-Identifier: Apache-2.0
#include "fovea/adapters/eigen.hpp"

#include <type_traits>

#include "catch_compat.hpp"

namespace {

using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using fovea::index_t;

RowMajor numbered(index_t rows, index_t cols) {
  RowMajor matrix(rows, cols);
  for (index_t r = 0; r < rows; ++r) {
    for (index_t c = 0; c < cols; ++c) matrix(r, c) = static_cast<float>(100 * r + c);
  }
  return matrix;
}

// Element [b, h, s, d] is the matrix' element (b * len + s, h * dim + d).
template <class T, class Matrix>
int misplaced(const fovea::Tensor<T>& view, const Matrix& matrix) {
  int wrong = 0;
  const auto [batch, heads, len, dim] = view.extent;
  for (index_t b = 0; b < batch; ++b) {
    for (index_t h = 0; h < heads; ++h) {
      for (index_t s = 0; s < len; ++s) {
        for (index_t d = 0; d < dim; ++d) wrong += &view(b, h, s, d) != &matrix.coeffRef(b * len + s, h * dim + d);
      }
    }
  }
  return wrong;
}

}   // namespace

TEST_CASE("from_eigen sees a row-major matrix as [batch, head, pos, dim]", "[adapters]") {
  RowMajor matrix = numbered(6, 12);
  const auto view = fovea::from_eigen(matrix, 3);
  static_assert(std::is_same_v<decltype(view), const fovea::Tensor<float>>);
  CHECK(view.extent == std::array<index_t, 4>{1, 3, 6, 4});
  CHECK(misplaced(view, matrix) == 0);
  const auto batched = fovea::from_eigen(matrix, 4, 2);
  CHECK(batched.extent == std::array<index_t, 4>{2, 4, 3, 3});
  CHECK(misplaced(batched, matrix) == 0);
}

TEST_CASE("from_eigen keeps const and takes maps, references, blocks and other scalars", "[adapters]") {
  RowMajor matrix = numbered(5, 8);
  const RowMajor& readable = matrix;
  static_assert(std::is_same_v<decltype(fovea::from_eigen(readable, 2)), fovea::Tensor<const float>>);
  CHECK(misplaced(fovea::from_eigen(readable, 2), readable) == 0);

  Eigen::Map<RowMajor> map(matrix.data(), 5, 8);
  static_assert(std::is_same_v<decltype(fovea::from_eigen(map, 2)), fovea::Tensor<float>>);
  CHECK(misplaced(fovea::from_eigen(map, 2), matrix) == 0);
  static_assert(std::is_same_v<decltype(fovea::from_eigen(Eigen::Map<const RowMajor>(matrix.data(), 5, 8), 2)),
                               fovea::Tensor<const float>>);

  Eigen::Ref<RowMajor> ref = matrix;
  static_assert(std::is_same_v<decltype(fovea::from_eigen(ref, 2)), fovea::Tensor<float>>);
  CHECK(misplaced(fovea::from_eigen(ref, 2), matrix) == 0);
  const Eigen::Ref<const RowMajor> const_ref = matrix;
  static_assert(std::is_same_v<decltype(fovea::from_eigen(const_ref, 2)), fovea::Tensor<const float>>);
  CHECK(fovea::from_eigen(const_ref, 2).data == matrix.data());

  // One projection holds q, k and v side by side: blocks of columns are views of it.
  const auto k = fovea::from_eigen(matrix.middleCols(4, 2), 1);
  static_assert(std::is_same_v<decltype(k), const fovea::Tensor<float>>);
  CHECK(k.extent == std::array<index_t, 4>{1, 1, 5, 2});
  CHECK(&k(0, 0, 3, 1) == &matrix(3, 5));

  Eigen::Matrix<double, 4, 6, Eigen::RowMajor> fixed;
  static_assert(std::is_same_v<decltype(fovea::from_eigen(fixed, 3)), fovea::Tensor<double>>);
  CHECK(misplaced(fovea::from_eigen(fixed, 3), fixed) == 0);

  Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic> column_major(6, 4);
  const auto transposed = fovea::from_eigen(column_major.transpose(), 2);   // its transpose is row-major
  CHECK(transposed.extent == std::array<index_t, 4>{1, 2, 4, 3});
  CHECK(&transposed(0, 1, 2, 1) == &column_major(4, 2));
}

TEST_CASE("from_eigen carries outer and inner strides", "[adapters]") {
  std::vector<float> memory(200);
  using Strides = Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>;
  Eigen::Map<RowMajor, Eigen::Unaligned, Strides> map(memory.data(), 4, 6, Strides(30, 3));
  const auto view = fovea::from_eigen(map, 2, 2);
  CHECK(view.stride == std::array<index_t, 4>{60, 9, 30, 3});
  CHECK(misplaced(view, map) == 0);
}

TEST_CASE("from_eigen gives no data when heads or batch do not divide", "[adapters]") {
  RowMajor matrix = numbered(6, 12);
  CHECK(fovea::from_eigen(matrix, 5).data == nullptr);
  CHECK(fovea::from_eigen(matrix, 3, 4).data == nullptr);
  CHECK(fovea::from_eigen(matrix, 0).data == nullptr);
  CHECK(fovea::from_eigen(matrix, 3, -1).data == nullptr);
}
