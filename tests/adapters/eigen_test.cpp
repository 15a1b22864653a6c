// SPDX-License-Identifier: Apache-2.0
#include "fovea/adapters/eigen.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/attention.hpp"
#include "support/random.hpp"

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

RowMajor random_matrix(index_t rows, index_t cols, std::uint64_t seed) {
  test::Random random(seed);
  RowMajor matrix(rows, cols);
  for (index_t n = 0; n < matrix.size(); ++n) matrix.data()[n] = random.normal();
  return matrix;
}

bool same_bits(const RowMajor& a, const RowMajor& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.size()) * sizeof(float)) == 0;
}

// Two sequences of 21 tokens, 4 query heads on 2 kv heads.
constexpr index_t kBatch = 2, kLen = 21, kHeads = 4, kKvHeads = 2, kDim = 24, kTokens = kBatch * kLen;
const fovea::AttentionOptions kCausal{.causal = fovea::Causal::bottom_right};

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

TEST_CASE("attention over matrices: the bits of the same call over named layouts", "[adapters]") {
  const RowMajor q = random_matrix(kTokens, kHeads * kDim, 1), k = random_matrix(kTokens, kKvHeads * kDim, 2),
                 v = random_matrix(kTokens, kKvHeads * kDim, 3);
  RowMajor expected = RowMajor::Constant(kTokens, kHeads * kDim, -1.f), out = expected.array() - 1.f;
  fovea::attention(fovea::bshd(q.data(), kBatch, kLen, kHeads, kDim), fovea::bshd(k.data(), kBatch, kLen, kKvHeads, kDim),
                   fovea::bshd(v.data(), kBatch, kLen, kKvHeads, kDim),
                   fovea::bshd(expected.data(), kBatch, kLen, kHeads, kDim), kCausal)
      .or_throw();

  SECTION("whole matrices") {
    fovea::attention(fovea::from_eigen(q, kHeads, kBatch), fovea::from_eigen(k, kKvHeads, kBatch),
                     fovea::from_eigen(v, kKvHeads, kBatch), fovea::from_eigen(out, kHeads, kBatch), kCausal)
        .or_throw();
    CHECK(same_bits(out, expected));
  }
  SECTION("columns of one projection, NaN between the tokens") {
    constexpr index_t nq = kHeads * kDim, nkv = kKvHeads * kDim;
    RowMajor qkv = RowMajor::Constant(kTokens, nq + 2 * nkv + 5, std::numeric_limits<float>::quiet_NaN());
    qkv.leftCols(nq) = q;
    qkv.middleCols(nq, nkv) = k;
    qkv.middleCols(nq + nkv, nkv) = v;
    const RowMajor& projected = qkv;
    fovea::attention(fovea::from_eigen(projected.leftCols(nq), kHeads, kBatch),
                     fovea::from_eigen(projected.middleCols(nq, nkv), kKvHeads, kBatch),
                     fovea::from_eigen(projected.middleCols(nq + nkv, nkv), kKvHeads, kBatch),
                     fovea::from_eigen(out, kHeads, kBatch), kCausal)
        .or_throw();
    CHECK(same_bits(out, expected));
  }
  SECTION("queries and outputs with an inner stride") {
    using Spread = Eigen::Stride<Eigen::Dynamic, 3>;
    std::vector<float> q_memory(static_cast<std::size_t>(q.size()) * 3, std::numeric_limits<float>::quiet_NaN());
    std::vector<float> out_memory(q_memory.size(), -3.f);
    Eigen::Map<RowMajor, Eigen::Unaligned, Spread> q_map(q_memory.data(), kTokens, kHeads * kDim, Spread(kHeads * kDim * 3, 3)),
        out_map(out_memory.data(), kTokens, kHeads * kDim, Spread(kHeads * kDim * 3, 3));
    q_map = q;
    fovea::attention(fovea::from_eigen(q_map, kHeads, kBatch), fovea::from_eigen(k, kKvHeads, kBatch),
                     fovea::from_eigen(v, kKvHeads, kBatch), fovea::from_eigen(out_map, kHeads, kBatch), kCausal)
        .or_throw();
    CHECK(same_bits(out_map, expected));
    CHECK(std::count(out_memory.begin(), out_memory.end(), -3.f) == 2 * out.size());   // between the numbers nothing was written
  }
}

TEST_CASE("attention refuses K and V with an inner stride, and a matrix that gave no view", "[adapters]") {
  using SpreadMatrix = Eigen::Map<const RowMajor, Eigen::Unaligned, Eigen::InnerStride<3>>;
  const RowMajor q = random_matrix(kTokens, kHeads * kDim, 1), k = random_matrix(kTokens, kKvHeads * kDim, 2);
  const std::vector<float> memory(static_cast<std::size_t>(k.size()) * 3, 0.5f);
  const SpreadMatrix spread(memory.data(), kTokens, kKvHeads * kDim);
  RowMajor out = RowMajor::Constant(kTokens, kHeads * kDim, -1.f);
  const RowMajor before = out;
  const auto q_view = fovea::from_eigen(q, kHeads, kBatch), k_view = fovea::from_eigen(k, kKvHeads, kBatch),
             spread_view = fovea::from_eigen(spread, kKvHeads, kBatch);
  const auto out_view = fovea::from_eigen(out, kHeads, kBatch);

  const fovea::Status strided_k = fovea::attention(q_view, spread_view, k_view, out_view, kCausal);
  CHECK(strided_k.code() == fovea::Code::unsupported);
  CHECK_THAT(strided_k.message(), Catch::Matchers::ContainsSubstring("k has innermost stride 3, must be 1"));
  const fovea::Status strided_v = fovea::attention(q_view, k_view, spread_view, out_view, kCausal);
  CHECK_THAT(strided_v.message(), Catch::Matchers::ContainsSubstring("v has innermost stride 3, must be 1"));
  const fovea::Status no_view = fovea::attention(q_view, fovea::from_eigen(k, 5, kBatch), k_view, out_view, kCausal);
  CHECK(no_view.code() == fovea::Code::invalid_argument);
  CHECK_THAT(no_view.message(), Catch::Matchers::ContainsSubstring("k is [0, 0, 0, 0], must be"));
  CHECK(same_bits(out, before));
}
