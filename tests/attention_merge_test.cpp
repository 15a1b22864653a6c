// SPDX-License-Identifier: Apache-2.0
// Partial results over disjoint keys, put together.
#include <cmath>

#include "support/dense.hpp"
#include "support/problem.hpp"

namespace {

using namespace test;

Result part(const Dense& x, index_t begin, index_t count, const AttentionOptions& options = {}) {
  return attend(x.q.view(), only_pos(x.k.view(), begin, count), only_pos(x.v.view(), begin, count), options);
}

void join(Result& a, const Result& b) {
  const fovea::Status status = fovea::merge(a.out.view(), a.lse_view(), b.out.view(), b.lse_view());
  INFO(status.message());
  REQUIRE(status.ok());
}

}   // namespace

TEST_CASE("merged parts = the whole, for any split", "[merge]") {
  const index_t len_k = 300;
  const Dense x(81, 2, 4, 2, 5, len_k, 16, 19);
  const Result whole = attend(x);
  const Expected e = expect(x.q.view(), x.k.view(), x.v.view(), {});
  for (const index_t at : {0, 1, 37, 64, 150, 299, 300}) {
    Result a = part(x, 0, at), b = part(x, at, len_k - at), b_first = b;
    const Result a_kept = a;
    join(a, b);
    CHECK(distance(a, whole, e) <= 1);
    CHECK(distance(a, e) <= 2);
    join(b_first, a_kept);   // the other way round
    CHECK(distance(a, b_first, e) <= 1);
  }
}

TEST_CASE("three parts in either nesting", "[merge]") {
  const Dense x(82, 1, 2, 1, 4, 210, 8, 8);
  const Expected e = expect(x.q.view(), x.k.view(), x.v.view(), {});
  Result left = part(x, 0, 70), right = part(x, 70, 70);
  const Result last = part(x, 140, 70);
  join(left, right);
  join(left, last);
  join(right, last);
  Result nested = part(x, 0, 70);
  join(nested, right);
  CHECK(distance(left, e) <= 2);
  CHECK(distance(nested, e) <= 2);
  CHECK(distance(left, nested, e) <= 1);
}

TEST_CASE("an empty partial changes nothing, whatever its out holds", "[merge][empty]") {
  const Dense x(83, 1, 2, 1, 4, 50, 8, 8);
  const Result whole = attend(x);
  for (const float garbage : {0.f, 1e30f, kNan, kInfinity}) {
    Result empty{Values(1, 2, 4, 8, garbage), std::vector<float>(8, -kInfinity)};
    Result a = whole;
    join(a, empty);
    CHECK(same_bits(a, whole));
    join(empty, whole);
    CHECK(same_bits(empty, whole));
    Result one{Values(1, 2, 4, 8, garbage), std::vector<float>(8, -kInfinity)};
    const Result other = one;
    join(one, other);
    for (float value : one.out.data) CHECK(value == 0);
    for (float value : one.lse) CHECK(value == -kInfinity);
  }
}

TEST_CASE("rows are merged one by one: some empty, some not", "[merge][empty]") {
  const Dense x(84, 1, 2, 1, 40, 40, 8, 8);
  AttentionOptions options;
  options.causal = Causal::top_left;
  const Result whole = attend(x, options);
  const Expected e = expect(x.q.view(), x.k.view(), x.v.view(), options);
  Result a = part(x, 0, 25, options);
  const std::vector<index_t> offset{-25};
  options.q_offset = offset;
  const Result b = part(x, 25, 15, options);   // rows before 25 are empty here
  CHECK(b.lse_at(0, 0, 24) == -kInfinity);
  join(a, b);
  CHECK(distance(a, whole, e) <= 1);
  for (index_t i = 0; i < 25; ++i)
    CHECK(a.lse_at(0, 1, i) == part(x, 0, 25,
                                    [] {
                                      AttentionOptions causal;
                                      causal.causal = Causal::top_left;
                                      return causal;
                                    }())
                                   .lse_at(0, 1, i));
}

TEST_CASE("a sink belongs to exactly one partial", "[merge][sink]") {
  const Dense x(85, 1, 4, 2, 5, 130, 16, 8);
  const std::vector<float> sinks{0.f, 3.f, -2.f, 6.f};
  AttentionOptions with;
  with.sink = sinks;
  const Expected e = expect(x.q.view(), x.k.view(), x.v.view(), with);
  for (const bool in_first : {true, false}) {
    Result a = part(x, 0, 60, in_first ? with : AttentionOptions{});
    join(a, part(x, 60, 70, in_first ? AttentionOptions{} : with));
    CHECK(distance(a, e) <= 2);
  }
  // The partial with the sink may have no keys at all.
  Result keys = part(x, 0, 130);
  join(keys, part(x, 0, 0, with));
  CHECK(distance(keys, e) <= 2);
}

TEST_CASE("partials whose LSE differ by more than exp can hold", "[merge]") {
  for (const float gap : {100.f, 1e4f, 1e30f}) {
    Result a{Values(1, 1, 1, 3, 2.f), {gap}}, b{Values(1, 1, 1, 3, 5.f), {-gap}};
    Result c = b;
    const Result a_kept = a;
    join(a, b);
    CHECK(a.lse[0] == gap);
    for (float value : a.out.data) CHECK(value == 2.f);
    join(c, a_kept);
    CHECK(c.lse[0] == gap);
    for (float value : c.out.data) CHECK(value == 2.f);
  }
}

TEST_CASE("a NaN partial stays visible", "[merge][nan]") {
  Result a{Values(1, 1, 1, 2, 1.f), {0.f}}, b{Values(1, 1, 1, 2, kNan), {kNan}};
  Result c = b;
  const Result a_kept = a;
  join(a, b);
  for (float value : a.out.data) CHECK(std::isnan(value));
  CHECK(std::isnan(a.lse[0]));
  join(c, a_kept);
  for (float value : c.out.data) CHECK(std::isnan(value));
  CHECK(std::isnan(c.lse[0]));
}

TEST_CASE("merge works on strided views and writes only their elements", "[merge]") {
  Poisoned out_store(2 * 3 * 10), lse_store(2 * 3 * 4), other_store(2 * 3 * 7);
  const Tensor<float> out{out_store.data(), {1, 2, 3, 5}, {60, 30, 10, 1}};
  const View<float, 3> lse{lse_store.data(), {1, 2, 3}, {24, 12, 4}};
  Tensor<float> other{other_store.data(), {1, 2, 3, 5}, {42, 21, 7, 1}};
  std::vector<float> other_lse(6, 1.f);
  for (index_t h = 0; h < 2; ++h) {
    for (index_t i = 0; i < 3; ++i) {
      lse(0, h, i) = 1;
      for (index_t d = 0; d < 5; ++d) out(0, h, i, d) = 1, other(0, h, i, d) = 3;
    }
  }
  REQUIRE(fovea::merge(out, lse, other, View<const float, 3>{other_lse.data(), {1, 2, 3}, {6, 3, 1}}).ok());
  CHECK(first_overwritten(out_store, {out}) == -1);
  CHECK(first_overwritten(lse_store, {lse}) == -1);
  for (index_t h = 0; h < 2; ++h) {
    for (index_t i = 0; i < 3; ++i) {
      CHECK(double{lse(0, h, i)} == Catch::Approx(1 + std::log(2.)).margin(1e-6));
      for (index_t d = 0; d < 5; ++d) CHECK(double{out(0, h, i, d)} == Catch::Approx(2).margin(1e-6));
    }
  }
}

TEST_CASE("merge: any stride along dim gives the same bits", "[merge][bits]") {
  for (const index_t dim : {1, 7, 16, 37, 128}) {
    const Dense x(86, 1, 2, 1, 3, 60, 8, dim);
    const Result a = part(x, 0, 30), b = part(x, 30, 30);
    Result whole = a;
    join(whole, b);
    std::vector<float> wide_a(static_cast<std::size_t>(6 * dim * 2), canary()),
        wide_b(static_cast<std::size_t>(6 * dim * 3));
    const Tensor<float> to{wide_a.data(), {1, 2, 3, dim}, {6 * dim * 2, 3 * dim * 2, dim * 2, 2}};
    const Tensor<float> from{wide_b.data(), {1, 2, 3, dim}, {6 * dim * 3, 3 * dim * 3, dim * 3, 3}};
    for (const bool both : {false, true}) {
      for (index_t n = 0; n < 6 * dim; ++n) {
        wide_a[static_cast<std::size_t>(2 * n)] = a.out.data[static_cast<std::size_t>(n)];
        wide_b[static_cast<std::size_t>(3 * n)] = b.out.data[static_cast<std::size_t>(n)];
      }
      Result lse = a;
      REQUIRE(fovea::merge(to, lse.lse_view(), both ? Tensor<const float>(from) : b.out.view(), b.lse_view()).ok());
      CHECK(same_bits(lse.lse, whole.lse));
      index_t wrong = 0;
      for (std::size_t n = 0; n < whole.out.data.size(); ++n)
        wrong += std::memcmp(&wide_a[2 * n], &whole.out.data[n], sizeof(float)) != 0 || !is_canary(wide_a[2 * n + 1]);
      CHECK(wrong == 0);
    }
  }
}
