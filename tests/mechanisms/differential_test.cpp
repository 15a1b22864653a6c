// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/differential.hpp"

#include "around_softmax.hpp"
#include "fovea/reference/differential.hpp"

namespace {

using namespace test;
using fovea::reference::differential_half;

constexpr float kLambda = 0.6f, kLambdaInit = 0.3555f, kEps = 1e-5f;

// V1 takes half as many heads of V as of K: those of every other one.
Tensor<const float> half_v(const Dense& x) { return differential_half(x.v.view(), 0); }
Tensor<const float> half_q(const Dense& x, index_t first) { return differential_half(x.q.view(), first); }
std::vector<float> weights(index_t dim) {
  std::vector<float> w(static_cast<std::size_t>(dim));
  for (std::size_t d = 0; d < w.size(); ++d) w[d] = 0.5f + 0.1f * static_cast<float>(d % 11);
  return w;
}
Values lambdas(const Dense& x) { return random_values(111, x.q.batch, x.q.heads / 2, x.q.len, 1); }
View<const float, 3> lambda_view(const Values& l) {
  return {l.data.data(), {l.batch, l.heads, l.len}, {l.heads * l.len, l.len, 1}};
}

Result run_v1(const Dense& x, const AttentionOptions& attention) {
  Result r = unwritten(half_q(x, 0), x.v.view());
  const std::vector<float> w = weights(x.v.dim);
  fovea::DifferentialOptions options{
      .attention = attention, .lambda = kLambda, .lambda_init = kLambdaInit, .norm_weight = w};
  options.eps = kEps;
  const fovea::Status status = fovea::differential_attention(x.q.view(), x.k.view(), half_v(x), r.out.view(), options);
  INFO(status.message());
  REQUIRE(status.ok());
  r.lse.clear();
  return r;
}

Result run_v2(const Dense& x, const AttentionOptions& attention, bool at_once) {
  Result r = unwritten(half_q(x, 0), x.v.view());
  const Values l = lambdas(x);
  Values halves(x.q.batch, x.q.heads, x.q.len, x.v.dim, canary());
  fovea::DifferentialV2Options options{.attention = attention, .lambda = lambda_view(l)};
  if (at_once) options.halves = halves.view();
  const fovea::Status status = fovea::differential_attention_v2(x.q.view(), x.k.view(), x.v.view(), r.out.view(), options);
  INFO(status.message());
  REQUIRE(status.ok());
  r.lse.clear();
  return r;
}

// x = a1 - lambda a2 with the errors of both; N = 1 / rms(x) moves by at most N^2 rms(dx); second orders stay below 1 %.
Expected ask_v1(const Dense& x, const AttentionOptions& options) {
  const Expected a1 = expect(half_q(x, 0), differential_half(x.k.view(), 0), half_v(x), options);
  const Expected a2 = expect(half_q(x, 1), differential_half(x.k.view(), 1), half_v(x), options);
  const std::vector<float> w = weights(x.v.dim);
  Expected e = a1;
  e.lse.clear(), e.lse_error.clear();
  fovea::reference::differential(x.q.view(), x.k.view(), half_v(x),
                                 fovea::bhsd(e.out.data(), x.q.batch, x.q.heads / 2, x.q.len, x.v.dim), options,
                                 double{kLambda}, double{kLambdaInit}, w, double{kEps});
  const auto dim = static_cast<std::size_t>(x.v.dim);
  for (std::size_t row = 0; row < e.out.size(); row += dim) {
    double squares = 0, errors = 0;
    std::vector<double> value(dim), error(dim);
    for (std::size_t d = 0; d < dim; ++d) {
      const double before = a1.out[row + d], subtracted = double{kLambda} * a2.out[row + d];
      value[d] = before - subtracted;
      error[d] = a1.out_error[row + d] + double{kLambda} * a2.out_error[row + d] +
                 kUnit * (std::abs(before) + 2 * std::abs(subtracted));
      squares += value[d] * value[d];
      errors += error[d] * error[d];
    }
    const double n = static_cast<double>(dim), inverse = 1 / std::sqrt(squares / n + double{kEps});
    for (std::size_t d = 0; d < dim; ++d) {
      const double factor = (1 - double{kLambdaInit}) * double{w[d]};
      e.out_error[row + d] =
          1.01 * factor * (inverse * error[d] + std::abs(value[d]) * inverse * inverse * std::sqrt(errors / n)) +
          kUnit * (n / 2 + 12) * std::abs(e.out[row + d]);
    }
  }
  return e;
}

Expected ask_v2(const Dense& x, const AttentionOptions& options) {
  const Expected a1 = expect(half_q(x, 0), x.k.view(), x.v.view(), options);
  const Expected a2 = expect(half_q(x, 1), x.k.view(), x.v.view(), options);
  const Values l = lambdas(x);
  Expected e = a1;
  e.lse.clear(), e.lse_error.clear();
  fovea::reference::differential_v2(x.q.view(), x.k.view(), x.v.view(),
                                    fovea::bhsd(e.out.data(), x.q.batch, x.q.heads / 2, x.q.len, x.v.dim), options,
                                    lambda_view(l));
  for (std::size_t n = 0; n < e.out.size(); ++n) {
    const double share = 1 / (1 + std::exp(-double{l.data[n / static_cast<std::size_t>(x.v.dim)]}));
    // The sigmoid: exp of the C library, sum, division, 6 units at most.
    e.out_error[n] =
        a1.out_error[n] + share * a2.out_error[n] + kUnit * (std::abs(a1.out[n]) + 8 * share * std::abs(a2.out[n]));
  }
  return e;
}

}   // namespace

TEST_CASE("differential: V1 against the reference", "[differential]") {
  check_around_softmax(run_v1, ask_v1, {{4, 2}, {2, 2}, {12, 4}});
}

TEST_CASE("differential: V2 against the reference", "[differential]") {
  for (const bool at_once : {false, true}) {
    check_around_softmax([=](const Dense& x, const AttentionOptions& o) { return run_v2(x, o, at_once); }, ask_v2,
                         {{4, 2}, {2, 1}, {12, 2}});
  }
}

TEST_CASE("differential: lambda 0 is the normalised first half, equal halves cancel", "[differential]") {
  Dense x(112, 1, 4, 2, 19, 40, 16, 24);
  AttentionOptions causal;
  causal.causal = Causal::bottom_right;
  const Result first = attend(half_q(x, 0), differential_half(x.k.view(), 0), half_v(x), causal);
  const auto norm = [&](const Result& rows, double eps, double factor) {
    std::vector<double> to(rows.out.data.begin(), rows.out.data.end());
    for (std::size_t row = 0; row < to.size(); row += 24) {
      double squares = 0;
      for (std::size_t d = 0; d < 24; ++d) squares += to[row + d] * to[row + d];
      for (std::size_t d = 0; d < 24; ++d) to[row + d] *= factor / std::sqrt(squares / 24 + eps);
    }
    return to;
  };
  Values out(1, 2, 19, 24);
  fovea::DifferentialOptions options{.attention = causal, .lambda = 0.f, .lambda_init = 0.2f};
  REQUIRE(fovea::differential_attention(x.q.view(), x.k.view(), half_v(x), out.view(), options).ok());
  const std::vector<double> want = norm(first, 1e-5, 0.8);
  for (std::size_t n = 0; n < want.size(); ++n) CHECK(out.data[n] == Catch::Approx(want[n]).epsilon(1e-5));

  // The same queries and keys in both halves: (1 - lambda) A V, which the norm makes A V again.
  for (index_t h = 0; h < 4; h += 2) {
    for (index_t i = 0; i < 19; ++i) {
      for (index_t d = 0; d < 16; ++d) x.q.view()(0, h + 1, i, d) = x.q.view()(0, h, i, d);
    }
  }
  for (index_t j = 0; j < 40; ++j) {
    for (index_t d = 0; d < 16; ++d) x.k.view()(0, 1, j, d) = x.k.view()(0, 0, j, d);
  }
  options.lambda = 0.75f;   // 1 - lambda is exact
  options.eps = 0.f;
  REQUIRE(fovea::differential_attention(x.q.view(), x.k.view(), half_v(x), out.view(), options).ok());
  const std::vector<double> unscaled = norm(first, 0, 0.8);
  for (std::size_t n = 0; n < unscaled.size(); ++n)
    CHECK(out.data[n] == Catch::Approx(unscaled[n]).epsilon(1e-5).margin(1e-5));

  // A row that sees no key stays 0 then, too: 0 / 0 is not asked.
  const std::vector<index_t> none(static_cast<std::size_t>(x.q.batch), 0);
  options.attention.len_k = none;
  REQUIRE(fovea::differential_attention(x.q.view(), x.k.view(), half_v(x), out.view(), options).ok());
  CHECK(std::count(out.data.begin(), out.data.end(), 0.f) == static_cast<std::ptrdiff_t>(out.data.size()));
}

TEST_CASE("differential: V2 with closed and open lambda", "[differential]") {
  const Dense x(113, 2, 4, 2, 9, 40, 16, 24);
  const Result first = attend(half_q(x, 0), x.k.view(), x.v.view()), second = attend(half_q(x, 1), x.k.view(), x.v.view());
  for (const bool at_once : {false, true}) {
    Values halves(2, 4, 9, 24), out(2, 2, 9, 24);
    Values l(2, 2, 9, 1, -kInfinity);
    fovea::DifferentialV2Options options{.attention = {}, .lambda = lambda_view(l)};
    if (at_once) options.halves = halves.view();
    REQUIRE(fovea::differential_attention_v2(x.q.view(), x.k.view(), x.v.view(), out.view(), options).ok());
    for (std::size_t n = 0; n < out.data.size(); ++n)
      CHECK(out.data[n] == Catch::Approx(first.out.data[n]).epsilon(1e-5).margin(1e-6));
    std::fill(l.data.begin(), l.data.end(), kInfinity);
    REQUIRE(fovea::differential_attention_v2(x.q.view(), x.k.view(), x.v.view(), out.view(), options).ok());
    for (std::size_t n = 0; n < out.data.size(); ++n)
      CHECK(out.data[n] == Catch::Approx(first.out.data[n] - second.out.data[n]).epsilon(1e-5).margin(1e-5));
  }
}

TEST_CASE("differential: lambda", "[differential][golden]") {
  CHECK(fovea::differential_lambda_init(0) == Catch::Approx(0.2));
  CHECK(fovea::differential_lambda_init(1) == Catch::Approx(0.3555).epsilon(1e-4));
  CHECK(fovea::differential_lambda_init(2) == Catch::Approx(0.4707).epsilon(1e-4));
  CHECK(fovea::differential_lambda_init(3) == Catch::Approx(0.5561).epsilon(1e-4));
  const std::vector<float> a{0.5f, -0.25f}, b{1.f, 2.f}, c{0.f, 0.f};
  CHECK(fovea::differential_lambda(a, c, c, a, 0.25f) == 0.25f);
  CHECK(fovea::differential_lambda(a, b, b, b, 0.f) == Catch::Approx(std::exp(0.) - std::exp(5.)));
}

TEST_CASE("differential: 16-bit outputs through fp32 memory", "[differential]") {
  const Dense x(114, 1, 4, 2, 19, 40, 16, 24);
  const Result v1 = run_v1(x, {}), v2 = run_v2(x, {}, true);
  std::vector<fovea::bf16> narrow(v1.out.data.size());
  Values first(1, 2, 19, 24, canary()), halves(1, 4, 19, 24, canary());
  const Tensor<fovea::bf16> out = fovea::bhsd(narrow.data(), 1, 2, 19, 24);
  const std::vector<float> w = weights(24);
  fovea::DifferentialOptions options{.lambda = kLambda, .lambda_init = kLambdaInit, .norm_weight = w};
  const fovea::Status without = fovea::differential_attention(x.q.view(), x.k.view(), half_v(x), out, options);
  CHECK_THAT(without.message(), Catch::Matchers::ContainsSubstring("first_half [1, 2, 19, 24]"));
  options.first_half = first.view();
  REQUIRE(fovea::differential_attention(x.q.view(), x.k.view(), half_v(x), out, options).ok());
  for (std::size_t n = 0; n < narrow.size(); ++n) CHECK(narrow[n].bits == fovea::convert<fovea::bf16>(v1.out.data[n]).bits);

  const Values l = lambdas(x);
  fovea::DifferentialV2Options second{.attention = {}, .lambda = lambda_view(l), .halves = halves.view()};
  REQUIRE(fovea::differential_attention_v2(x.q.view(), x.k.view(), x.v.view(), out, second).ok());
  for (std::size_t n = 0; n < narrow.size(); ++n) CHECK(narrow[n].bits == fovea::convert<fovea::bf16>(v2.out.data[n]).bits);
}

TEST_CASE("differential: refusals write nothing", "[differential][errors]") {
  const Dense x(115, 1, 4, 2, 5, 8, 8, 8);
  Values out(1, 2, 5, 8, canary());
  std::vector<float> w(8, 1.f), sink(2, 0.f);
  const auto refused = [&](const fovea::Status& status, const char* words) {
    INFO(status.message());
    CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
    CHECK(std::all_of(out.data.begin(), out.data.end(), is_canary));
  };
  const auto v1 = [&](const fovea::DifferentialOptions& o) {
    return fovea::differential_attention(x.q.view(), x.k.view(), half_v(x), out.view(), o);
  };
  refused(v1({.norm_weight = std::span(w).first(7)}), "norm_weight has 7 entries for dim_v 8");
  std::vector<float> memory(1 << 16);
  fovea::DifferentialOptions shared;
  shared.norm_weight = std::span(memory).first(8);
  shared.attention.workspace = std::as_writable_bytes(std::span(memory));
  refused(v1(shared), "workspace [");
  refused(v1({.lambda = kNan}), "lambda nan");
  refused(v1({.attention = {.sink = sink}}), "no sink (2 logits)");
  refused(v1({.attention = {.softcap = 3.f}}), "softcap");
  refused(v1({.norm_weight = std::span(out.data).first(8)}), "overlaps norm_weight");
  std::vector<std::byte> tiny(64);
  refused(v1({.attention = {.workspace = tiny}}), "workspace has 64 bytes");
  refused(fovea::differential_attention(cut(x.q.view(), 1, 0, 3), x.k.view(), half_v(x), out.view(), {}),
          "q has 3, k has 2");
  refused(fovea::differential_attention(x.q.view(), x.k.view(), x.v.view(), out.view(), {}), "v is [1, 2, 8, 8]");
  refused(fovea::differential_attention_v2(cut(x.q.view(), 1, 0, 2), x.k.view(), x.v.view(), out.view(), {}),
          "q has 2, k has 2");
  refused(fovea::differential_attention_v2(x.q.view(), x.k.view(), x.v.view(), out.view(), {}), "lambda is [0, 0, 0]");
}
