// SPDX-License-Identifier: Apache-2.0
#include "fovea/simd/hadamard.hpp"

#include <vector>

#include "catch_compat.hpp"
#include "fovea/reference/dsa.hpp"
#include "support/poison.hpp"
#include "support/random.hpp"

namespace {

using fovea::index_t;

std::vector<float> transformed(std::vector<float> x) {
  fovea::hadamard(x.data(), static_cast<index_t>(x.size()));
  return x;
}

void check_near(const std::vector<float>& got, const std::vector<double>& want, double error) {
  REQUIRE(got.size() == want.size());
  for (std::size_t n = 0; n < got.size(); ++n) CHECK(std::abs(double{got[n]} - want[n]) <= error);
}

}   // namespace

TEST_CASE("hadamard: golden vectors", "[hadamard]") {
  CHECK(transformed({4, 0, -2, 6}) == std::vector<float>{4, -2, 0, 6});
  const std::vector<float> eight{1, 2, 3, 4, 5, 6, 7, 8};
  check_near(transformed(eight), {12.727922, -1.414214, -2.828427, 0, -5.656854, 0, 0, 0}, 1e-6);
  check_near(transformed(transformed(eight)), {1, 2, 3, 4, 5, 6, 7, 8}, 1e-5);
}

TEST_CASE("hadamard: against the matrix, one rounding for integers", "[hadamard]") {
  for (index_t n = 1; n <= fovea::kMaxHadamard; n *= 2) {
    CAPTURE(n);
    test::Random random(static_cast<std::uint64_t>(n));
    test::Poisoned row(n);
    std::vector<double> x;
    for (index_t i = 0; i < n; ++i) x.push_back(static_cast<double>(random.between(-9, 9)));
    for (index_t i = 0; i < n; ++i) row.data()[i] = static_cast<float>(x[static_cast<std::size_t>(i)]);
    fovea::hadamard(row.data(), n);
    const std::vector<double> want = fovea::reference::dsa_hadamard(x);
    for (index_t i = 0; i < n; ++i) {
      const double exact = want[static_cast<std::size_t>(i)];
      CHECK(std::abs(double{row.data()[i]} - exact) <=
            std::abs(exact) * 3 * 0x1p-24);   // the factor's rounding and the product's
    }
    CHECK(test::first_overwritten<1>(row, {{row.data(), {n}, {1}}}) == -1);
  }
}

TEST_CASE("hadamard: sizes", "[hadamard]") {
  for (const index_t n : {1, 2, 64, 128, 512}) CHECK(fovea::is_hadamard_size(n));
  for (const index_t n : {0, -4, 3, 96, 1024}) CHECK_FALSE(fovea::is_hadamard_size(n));
}
