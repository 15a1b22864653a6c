// SPDX-License-Identifier: Apache-2.0
// expect: fovea::from_eigen: this is an Eigen expression without memory of its own; evaluate it into a matrix first
// expect: fovea::from_eigen: the matrix must be row-major, one token per row [pos, heads * dim]
// expect: fovea::from_eigen: a view of a temporary matrix would dangle; give the matrix a name
// An expression, a matrix of Eigen's default order, a temporary: each is refused in words of its own.
#include <fovea/adapters/eigen.hpp>

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

int main() {
#if defined(FOVEA_MUST_COMPILE)
  const Matrix x(3, 8), sum = x + x, ordered(3, 8), named(3, 8);
  const auto a = fovea::from_eigen(sum, 2), b = fovea::from_eigen(ordered, 2), c = fovea::from_eigen(named, 2);
#else
  const Matrix x(3, 8);
  const Eigen::MatrixXf ordered(3, 8);
  const auto a = fovea::from_eigen(x + x, 2), b = fovea::from_eigen(ordered, 2), c = fovea::from_eigen(Matrix(3, 8), 2);
#endif
  return a.extent == b.extent && b.extent == c.extent ? 0 : 1;
}
