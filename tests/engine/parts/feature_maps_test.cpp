// SPDX-License-Identifier: Apache-2.0
#include "fovea/engine/parts/feature_maps.hpp"

#include <limits>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/reference/feature_maps.hpp"
#include "support/poison.hpp"
#include "support/random.hpp"

using namespace fovea;
using reference::Vector;

namespace {

constexpr index_t kHeads = 2, kHead = 1;
constexpr double kRelative = 1e-5;   // root mean square, relative: fp32 against double

std::vector<float> normals(std::uint64_t seed, index_t count) {
  test::Random random(seed);
  std::vector<float> x(static_cast<std::size_t>(count));
  for (float& value : x) value = random.normal();
  return x;
}

Vector wide(const float* x, index_t count, index_t stride = 1) {
  Vector out(static_cast<std::size_t>(count));
  for (index_t i = 0; i < count; ++i) out[static_cast<std::size_t>(i)] = double{x[i * stride]};
  return out;
}

// phi(row) between canaries, of a row with canaries behind it.
template <class Map>
Vector run(const Map& map, const std::vector<float>& row, index_t pos = 0) {
  static_assert(FeatureMap<Map>);
  const auto dim = static_cast<index_t>(row.size());
  const index_t count = map.features(dim);
  test::Poisoned in(dim), out(count);
  std::copy(row.begin(), row.end(), in.data());
  map(kHead, pos, in.data(), out.data());
  const View<float, 1> written{out.data(), {count}, {1}};
  CHECK(test::first_overwritten<1>(out, {written}) == -1);
  return wide(out.data(), count);
}

double distance(const Vector& got, const Vector& want) {
  REQUIRE(got.size() == want.size());
  const Vector difference = got - want;
  const double error = std::sqrt(reference::dot(difference, difference) / reference::dot(want, want));
  return reference::dot(want, want) == 0 ? reference::dot(got, got) : error;
}

// A learned matrix [head, rows, columns] in one of three memory layouts.
enum class Layout { rows, columns, sparse };
struct Matrix {
  std::vector<float> data;
  View<const float, 3> view;
  std::vector<double> of_head;   // [rows, columns] of kHead

  Matrix(std::uint64_t seed, index_t heads, index_t rows, index_t columns, Layout layout)
      : data(normals(seed, 3 * heads * rows * columns)), of_head(static_cast<std::size_t>(rows * columns)) {
    for (float& x : data) x /= std::sqrt(static_cast<float>(columns));
    const index_t step = layout == Layout::sparse ? 3 : 1, head = rows * columns * step;
    view = {data.data(), {heads, rows, columns}, {head, columns * step, step}};
    if (layout == Layout::columns) view.stride = {head, 1, rows};
    for (index_t r = 0; r < rows; ++r) {
      for (index_t c = 0; c < columns; ++c) {
        of_head[static_cast<std::size_t>(r * columns + c)] = double{view(heads == 1 ? 0 : kHead, r, c)};
      }
    }
  }
  reference::MatrixView wide() const { return {of_head.data(), {view.extent[1], view.extent[2]}, {view.extent[2], 1}}; }
};

constexpr index_t kDims[] = {1, 3, 4, 16, 17, 33, 72};

}   // namespace

TEST_CASE("feature maps: those without weights against the reference", "[feature_maps]") {
  for (const index_t dim : kDims) {
    INFO("dim " << dim);
    const std::vector<float> row = normals(11, dim);
    const Vector x = wide(row.data(), dim);
    CHECK(distance(run(IdentityMap{dim}, row), x) == 0);
    CHECK(distance(run(EluMap{dim}, row), reference::elu_features(x)) <= kRelative);
    CHECK(distance(run(ReluMap{dim}, row), reference::relu_features(x)) == 0);
    CHECK(distance(run(ReluMap{dim, 1e-12f}, row), reference::at_least(x, double{1e-12f})) == 0);
    CHECK(distance(run(ExponentialMap{dim}, row), reference::exponential_features(x)) <= kRelative);
    CHECK(distance(run(TaylorMap{dim}, row), reference::taylor_features(x)) <= kRelative);
    for (const index_t rolls : {1, 2, 4, 7}) {
      for (const bool paper : {true, false}) {
        INFO(rolls << " rolls, " << (paper ? "paper" : "flash-linear-attention"));
        const DpfpMap map{dim, rolls, paper ? DpfpForm::paper : DpfpForm::flash_linear_attention};
        const auto half = paper ? reference::DpfpHalf::relu_of_minus : reference::DpfpHalf::minus_relu;
        const Vector want = reference::dpfp_features(x, static_cast<int>(rolls), half);
        CHECK(distance(run(map, row), want) <= kRelative);
      }
    }
    for (const index_t pos : {0, 5, 99}) {
      CHECK(distance(run(CosformerMap{dim, 100}, row, pos), reference::cosformer_features(x, pos + 1, 100)) <= kRelative);
    }
  }
}

TEST_CASE("feature maps: those with weights against the reference", "[feature_maps]") {
  for (const index_t dim : kDims) {
    for (const index_t features : {1, 7, 16, 70}) {
      for (const index_t heads : {index_t{1}, kHeads}) {
        for (const Layout layout : {Layout::rows, Layout::columns, Layout::sparse}) {
          INFO("dim " << dim << ", features " << features << ", heads " << heads << ", layout " << static_cast<int>(layout));
          const std::vector<float> row = normals(12, dim);
          const Vector x = wide(row.data(), dim);
          const Matrix w(13, heads, features, dim, layout), w2(14, heads, features, dim, layout);
          const Matrix across(15, heads, dim, features, layout);
          const std::vector<float> bias_data = normals(16, heads * features * 2);
          const View<const float, 2> bias{bias_data.data(), {heads, features}, {2 * features, 2}};
          const Vector bias_of_head = wide(&bias(heads - 1, 0), features, 2);
          const std::span<const double> b(&bias_of_head[0], bias_of_head.size());

          CHECK(distance(run(T2rMap{w.view}, row), reference::t2r_features(x, w.wide())) <= kRelative);
          CHECK(distance(run(T2rMap{w.view, bias}, row), reference::t2r_features(x, w.wide(), b)) <= kRelative);
          CHECK(distance(run(HedgehogMap{w.view}, row), reference::hedgehog_features(x, w.wide())) <= kRelative);
          CHECK(distance(run(HedgehogMap{w.view, bias}, row), reference::hedgehog_features(x, w.wide(), b)) <= kRelative);
          CHECK(distance(run(LolcatsMap{across.view}, row), reference::lolcats_features(x, across.wide())) <= kRelative);
          CHECK(distance(run(HadamardMap{w.view, w2.view}, row), reference::hadamard_features(x, w.wide(), w2.wide())) <=
                kRelative);
          CHECK(distance(run(FavorReluMap{w.view}, row), reference::favor_relu_features(x, w.wide())) <= kRelative);

          // The stabiliser leaves |x'|^2 / 2 out, which the exponents hold.
          const Vector scaled = x / std::pow(static_cast<double>(dim), 0.25);
          const double half_norm = reference::dot(scaled, scaled) / 2;
          const Vector exponents = reference::favor_exponents(x, w.wide());
          CHECK(distance(run(FavorQueryMap{w.view}, row),
                         reference::favor_features(exponents, exponents.max() + half_norm)) <= kRelative);
          const float stabiliser[] = {0.25f, 1.5f};
          const FavorKeyMap keys{w.view, {stabiliser, {kHeads}, {1}}, 1e-6f};
          CHECK(distance(run(keys, row), reference::favor_features(exponents, 1.5, 1e-6)) <= kRelative);
        }
      }
    }
  }
}

TEST_CASE("feature maps: products of features are the kernels they stand for", "[feature_maps]") {
  for (const index_t dim : kDims) {
    INFO("dim " << dim);
    const std::vector<float> q = normals(21, dim), k = normals(22, dim), gamma = normals(23, dim), beta = normals(24, dim);
    const Vector wide_q = wide(q.data(), dim), wide_k = wide(k.data(), dim);
    const double u = reference::dot(wide_q, wide_k) / std::sqrt(static_cast<double>(dim));
    const double length = reference::dot(wide_q, wide_q) * reference::dot(wide_k, wide_k) / static_cast<double>(dim);
    const TaylorMap taylor{dim};
    CHECK(std::abs(reference::dot(run(taylor, q), run(taylor, k)) - (1 + u + u * u / 2)) <= kRelative * (1 + length));

    // The sum over half of the outer product is that over all of it.
    const View<const float, 2> g{gamma.data(), {1, dim}, {0, 1}}, b{beta.data(), {1, dim}, {0, 1}};
    const RebasedMap rebased{dim, g, b};
    const auto whole = [&](const Vector& x) {
      return reference::rebased_features(x, wide(gamma.data(), dim), wide(beta.data(), dim));
    };
    const Vector whole_q = whole(wide_q), whole_k = whole(wide_k);
    const double size = std::sqrt(reference::dot(whole_q, whole_q) * reference::dot(whole_k, whole_k));
    CHECK(std::abs(reference::dot(run(rebased, q), run(rebased, k)) - reference::dot(whole_q, whole_k)) <= kRelative * size);

    const CosformerMap cosformer{dim, 8};
    const Vector relu_q = reference::relu_features(wide_q), relu_k = reference::relu_features(wide_k);
    const double product = reference::dot(relu_q, relu_k);
    for (const index_t i : {0, 3, 7}) {
      const double weight = product * std::cos(std::acos(-1.) * static_cast<double>(i - 2) / 16);
      CHECK(std::abs(reference::dot(run(cosformer, q, i), run(cosformer, k, 2)) - weight) <= kRelative * (product + 1e-30));
    }
  }
}

TEST_CASE("feature maps: softmax maps sum to one and survive large numbers", "[feature_maps]") {
  for (const index_t dim : {3, 33}) {
    const Matrix w(31, 1, 20, dim, Layout::rows), across(32, 1, dim, 20, Layout::rows);
    std::vector<float> row = normals(33, dim);
    CHECK(run(SumNormalizedMap<EluMap>{{dim}, 0.f}, row).sum() == Catch::Approx(1).epsilon(kRelative));
    const Vector plain = run(DpfpMap{dim, 2}, row);
    CHECK(distance(run(SumNormalizedMap<DpfpMap>{{dim, 2}}, row), plain / (plain.sum() + 1e-4)) <= kRelative);
    for (const float size : {1.f, 1e4f}) {
      for (float& x : row) x *= size;
      CHECK(run(HedgehogMap{w.view}, row).sum() == Catch::Approx(1).epsilon(kRelative));
      const Vector halves = run(LolcatsMap{across.view}, row);
      CHECK(Vector(halves[std::slice(0, 20, 1)]).sum() == Catch::Approx(1).epsilon(kRelative));
      CHECK(Vector(halves[std::slice(20, 20, 1)]).sum() == Catch::Approx(1).epsilon(kRelative));
      CHECK(halves.min() >= double{1e-12f});
      CHECK(run(ExponentialMap{dim}, row).max() == 1);
      const Vector favor = run(FavorQueryMap{w.view}, row);
      CHECK(favor.max() <= (1 + 1e-4) / std::sqrt(20.) * (1 + kRelative));
      CHECK(favor.min() > 0);
    }
  }
}

TEST_CASE("feature maps: those without their weights have no features", "[feature_maps]") {
  const std::vector<float> ones(9, 1.f);
  const View<const float, 2> row{ones.data(), {1, 9}, {9, 1}};
  const Matrix w(40, 1, 6, 9, Layout::rows);
  CHECK(RebasedMap{9}.features(9) == 0);
  CHECK(RebasedMap{9, row}.features(9) == 0);
  CHECK(RebasedMap{9, {}, row}.features(9) == 0);
  CHECK(RebasedMap{9, row, row}.features(9) == 45);
  CHECK(FavorKeyMap{w.view}.features(9) == 0);
}

TEST_CASE("feature maps: a number that is not one reaches its features", "[feature_maps]") {
  const index_t dim = 9;
  std::vector<float> row = normals(41, dim);
  row[4] = std::numeric_limits<float>::quiet_NaN();
  const Matrix w(42, 1, 6, dim, Layout::rows), across(43, 1, dim, 6, Layout::rows);
  CHECK(std::isnan(run(EluMap{dim}, row)[4]));
  CHECK(std::isnan(run(ReluMap{dim}, row)[4]));
  CHECK(std::isnan(run(T2rMap{w.view}, row).sum()));
  CHECK(std::isnan(run(HedgehogMap{w.view}, row).sum()));
  CHECK(std::isnan(run(LolcatsMap{across.view}, row).sum()));
  CHECK(std::isnan(run(FavorQueryMap{w.view}, row).sum()));
}
