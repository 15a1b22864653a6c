// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/hydra.hpp"

#include "fovea/reference/hydra.hpp"
#include "support/dense.hpp"
#include "support/executors.hpp"
#include "support/problem.hpp"

namespace {

using namespace test;
using fovea::HydraOptions;

struct Outcome {
  Values out, state;
};
View<float, 3> state_view(Values& s) { return {s.data.data(), {s.batch, s.heads, s.dim}, {s.heads * s.dim, s.dim, 1}}; }

Outcome run(const Dense& x, const HydraOptions& options) {
  Outcome r{Values(x.q.batch, x.q.heads, x.q.len, x.q.dim, canary()), Values(x.q.batch, x.q.heads, 1, x.q.dim)};
  const fovea::Status status =
      fovea::hydra_attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), state_view(r.state), options);
  INFO(status.message());
  REQUIRE(status.ok());
  return r;
}

// A norm sums dim squares, takes a root and divides (dim / 2 + 4 units); a prefix adds a rounding per key to |phi(k) v|
// summed.
double worst(const Dense& x, const Outcome& r, bool causal) {
  const index_t dim = x.q.dim;
  std::vector<double> want(r.out.data.size());
  const Tensor<double> out = fovea::bhsd(want.data(), x.q.batch, x.q.heads, x.q.len, dim);
  fovea::reference::hydra(x.q.view(), x.k.view(), x.v.view(), out, causal, x.k.len, 1e-12);
  double most = 0;
  for (index_t b = 0; b < x.q.batch; ++b) {
    for (index_t h = 0; h < x.q.heads; ++h) {
      const std::vector<double> q_norms = fovea::reference::hydra_norms(x.q.view(), b, h, 1e-12);
      const std::vector<double> k_norms = fovea::reference::hydra_norms(x.k.view(), b, h, 1e-12);
      for (index_t i = 0; i < x.q.len; ++i) {
        const index_t keys = causal ? i + 1 : x.k.len;
        const double units = static_cast<double>(keys) + static_cast<double>(dim) + 16;
        const double q_norm = q_norms[static_cast<std::size_t>(i)];
        for (index_t d = 0; d < dim; ++d) {
          double magnitude = 0;
          for (index_t j = 0; j < keys; ++j)
            magnitude += std::abs(double{x.k.view()(b, h, j, d)} / k_norms[static_cast<std::size_t>(j)] *
                                  double{x.v.view()(b, h, j, d)});
          const double budget = kUnit * units * magnitude * std::abs(double{x.q.view()(b, h, i, d)}) / q_norm + 1e-30;
          most = std::max(most, in_budgets(double{r.out.view()(b, h, i, d)}, out(b, h, i, d), budget));
        }
      }
    }
  }
  return most;
}

}   // namespace

TEST_CASE("hydra: against the reference", "[hydra]") {
  for (const index_t dim : {1, 3, 16, 33, 200}) {
    for (const index_t len : {1, 7, 40}) {
      const Dense x(151, 2, 3, 3, len, len, dim, dim);
      for (const bool causal : {false, true}) {
        const double off = worst(x, run(x, {.causal = causal}), causal);
        INFO("dim " << dim << ", len " << len << (causal ? ", causal: " : ": ") << off << " budgets");
        CHECK(off <= 1);
      }
    }
  }
  const Dense cross(152, 1, 2, 2, 5, 31, 24, 24);
  CHECK(worst(cross, run(cross, {}), false) <= 1);
}

TEST_CASE("hydra: rows that rise and fall over eight decades", "[hydra]") {
  constexpr index_t kLen = 33, kDim = 24;
  const auto spread = [](Values& rows, bool falls) {
    for (index_t h = 0; h < rows.heads; ++h) {
      for (index_t i = 0; i < kLen; ++i) {
        const float decade = 8 * static_cast<float>(i) / (kLen - 1) - 4;
        for (index_t d = 0; d < kDim; ++d) rows.view()(0, h, i, d) *= std::pow(10.f, falls ? -decade : decade);
      }
    }
  };
  for (const bool k_falls : {false, true}) {
    for (const bool v_falls : {false, true}) {
      Dense x(157, 1, 2, 2, kLen, kLen, kDim, kDim);
      spread(x.k, k_falls);
      spread(x.v, v_falls);
      spread(x.q, k_falls != v_falls);
      for (const bool causal : {false, true}) {
        const double off = worst(x, run(x, {.causal = causal}), causal);
        INFO((k_falls ? "k falls, v " : "k rises, v ")
             << (v_falls ? "falls" : "rises") << (causal ? ", causal: " : ": ") << off << " budgets");
        CHECK(off <= 1);
      }
    }
  }
}

TEST_CASE("hydra: no key and one key", "[hydra]") {
  constexpr index_t kQueries = 3, kKeys = 5, kDim = 21;
  Dense x(158, 2, 2, 2, kQueries, kKeys, kDim, kDim);
  const std::vector<index_t> used{0, 1};
  for (index_t b = 0; b < 2; ++b) {
    for (index_t h = 0; h < 2; ++h) {
      for (index_t j = used[static_cast<std::size_t>(b)]; j < kKeys; ++j) {
        for (index_t d = 0; d < kDim; ++d) x.k.view()(b, h, j, d) = x.v.view()(b, h, j, d) = kNan;
      }
    }
  }
  for (const bool starts_at_zero : {true, false}) {
    const Values before = starts_at_zero ? Values(2, 2, 1, kDim) : random_values(159, 2, 2, 1, kDim);
    Values state = before, out(2, 2, kQueries, kDim, canary());
    REQUIRE(fovea::hydra_attention(x.q.view(), x.k.view(), x.v.view(), out.view(), state_view(state), {.len_k = used}).ok());
    INFO((starts_at_zero ? "from zero" : "from a state"));
    double most = 0;
    bool kept = true, zero = true;
    for (index_t b = 0; b < 2; ++b) {
      for (index_t h = 0; h < 2; ++h) {
        const double k_norm = fovea::reference::hydra_norms(x.k.view(), b, h, 1e-12)[0];
        const std::vector<double> q_norms = fovea::reference::hydra_norms(x.q.view(), b, h, 1e-12);
        for (index_t d = 0; d < kDim; ++d) {
          const double own = before.view()(b, h, 0, d);
          const double key = b == 0 ? 0 : double{x.k.view()(b, h, 0, d)} / k_norm * double{x.v.view()(b, h, 0, d)};
          if (b == 0) kept = kept && state.view()(b, h, 0, d) == before.view()(b, h, 0, d);
          for (index_t i = 0; i < kQueries; ++i) {
            const double q = double{x.q.view()(b, h, i, d)} / q_norms[static_cast<std::size_t>(i)];
            const float got = out.view()(b, h, i, d);
            if (b == 0 && starts_at_zero) zero = zero && got == 0.f;
            // As worst() has it, with the state as one more key.
            const double budget = kUnit * (2 + kDim + 16) * (std::abs(own) + std::abs(key)) * std::abs(q) + 1e-30;
            most = std::max(most, in_budgets(double{got}, q * (own + key), budget));
          }
        }
      }
    }
    CHECK(most <= 1);
    CHECK(kept);
    CHECK(zero);
  }
}

TEST_CASE("hydra: attention with one head per feature", "[hydra]") {
  // The matrix form: weights phi(q)_d phi(k)_jd of head d, which sees feature d only, as one L x L product per feature.
  constexpr index_t kLen = 11, kDim = 6;
  const Dense x(153, 1, 1, 1, kLen, kLen, kDim, kDim);
  const Outcome r = run(x, {});
  for (index_t i = 0; i < kLen; ++i) {
    double q_squares = 0;
    for (index_t d = 0; d < kDim; ++d) q_squares += std::pow(double{x.q.view()(0, 0, i, d)}, 2);
    for (index_t d = 0; d < kDim; ++d) {
      double sum = 0;
      for (index_t j = 0; j < kLen; ++j) {
        double k_squares = 0;
        for (index_t e = 0; e < kDim; ++e) k_squares += std::pow(double{x.k.view()(0, 0, j, e)}, 2);
        const double weight =
            double{x.q.view()(0, 0, i, d)} * double{x.k.view()(0, 0, j, d)} / std::sqrt(q_squares * k_squares);
        sum += weight * double{x.v.view()(0, 0, j, d)};
      }
      CHECK(r.out.view()(0, 0, i, d) == Catch::Approx(sum).epsilon(1e-5).margin(1e-6));
    }
  }
  // The last query of a causal sequence sees what every query of a full one sees.
  const Outcome causal = run(x, {.causal = true});
  for (index_t d = 0; d < kDim; ++d) CHECK(causal.out.view()(0, 0, kLen - 1, d) == r.out.view()(0, 0, kLen - 1, d));
}

TEST_CASE("hydra: any chunking of a causal sequence gives the same bits", "[hydra]") {
  const Dense x(154, 2, 2, 2, 23, 23, 37, 37);
  const Outcome whole = run(x, {.causal = true});
  Values out(2, 2, 23, 37, canary()), state(2, 2, 1, 37);
  for (index_t begin = 0, step = 1; begin < 23; begin += step, ++step) {
    const index_t count = std::min(step, 23 - begin);
    REQUIRE(fovea::hydra_attention(only_pos(x.q.view(), begin, count), only_pos(x.k.view(), begin, count),
                                   only_pos(x.v.view(), begin, count), only_pos(out.view(), begin, count), state_view(state),
                                   {.causal = true})
                .ok());
  }
  CHECK(same_bits(out.data, whole.out.data));
  CHECK(same_bits(state.data, whole.state.data));
  ThreadPerLane threads;
  const Outcome three = run(x, {.causal = true, .executor = {threads, 3}});
  CHECK(same_bits(three.out.data, whole.out.data));
}

TEST_CASE("hydra: later keys, unused keys and zero vectors", "[hydra]") {
  Dense x(155, 2, 1, 1, 12, 12, 20, 20);
  const Outcome causal = run(x, {.causal = true});
  const std::vector<index_t> used{5, 7};
  const Outcome some = run(x, {.len_k = used});
  Dense y = x;
  for (index_t b = 0; b < 2; ++b) {
    for (index_t j = used[static_cast<std::size_t>(b)]; j < 12; ++j) {
      for (index_t d = 0; d < 20; ++d) y.k.view()(b, 0, j, d) = y.v.view()(b, 0, j, d) = kNan;
    }
  }
  CHECK(same_bits(run(y, {.len_k = used}).out.data, some.out.data));
  const Outcome poisoned = run(y, {.causal = true});
  bool same = true, seen = true;
  for (index_t b = 0; b < 2; ++b) {
    for (index_t i = 0; i < 12; ++i) {
      for (index_t d = 0; d < 20; ++d) {
        if (i < used[static_cast<std::size_t>(b)]) {
          same = same && poisoned.out.view()(b, 0, i, d) == causal.out.view()(b, 0, i, d);
        } else {
          seen = seen && std::isnan(poisoned.out.view()(b, 0, i, d));
        }
      }
    }
  }
  CHECK(same);
  CHECK(seen);
  std::fill(x.q.data.begin(), x.q.data.end(), 0.f);
  const Outcome zero = run(x, {});
  CHECK(std::all_of(zero.out.data.begin(), zero.out.data.end(), [](float value) { return value == 0.f; }));
  std::fill(x.k.data.begin(), x.k.data.end(), 0.f);
  const Outcome none = run(x, {});
  CHECK(std::all_of(none.state.data.begin(), none.state.data.end(), [](float value) { return value == 0.f; }));
}

TEST_CASE("hydra: strided views and refusals", "[hydra][errors]") {
  const Dense x(156, 1, 2, 2, 6, 6, 9, 9);
  const Outcome want = run(x, {});
  // Token-major with room between the rows.
  std::vector<float> rows(6 * 2 * 16, canary());
  const Tensor<float> out{rows.data(), {1, 2, 6, 9}, {192, 16, 32, 1}};
  Values state(1, 2, 1, 9);
  REQUIRE(fovea::hydra_attention(x.q.view(), x.k.view(), x.v.view(), out, state_view(state)).ok());
  bool equal = true;
  for (std::size_t n = 0; n < rows.size(); ++n) {
    const auto at = static_cast<index_t>(n);
    equal = equal && (at % 16 >= 9 ? is_canary(rows[n]) : rows[n] == want.out.view()(0, at / 16 % 2, at / 32, at % 16));
  }
  CHECK(equal);

  Values to(1, 2, 6, 9, canary());
  const auto refused = [&](Tensor<const float> q, Tensor<const float> v, View<float, 3> s, const HydraOptions& options,
                           const char* words) {
    const fovea::Status status = fovea::hydra_attention(q, x.k.view(), v, to.view(), s, options);
    INFO(status.message());
    CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
    CHECK(std::all_of(to.data.begin(), to.data.end(), is_canary));
  };
  const View<float, 3> s = state_view(state);
  refused(x.q.view(), cut(x.v.view(), 3, 0, 8), s, {}, "v is [1, 2, 6, 8], must be [1, 2, 6, 9]");
  refused(x.q.view(), x.v.view(), {s.data, {1, 2, 8}, s.stride}, {}, "state is [1, 2, 8]");
  refused(only_pos(x.q.view(), 0, 5), x.v.view(), s, {}, "out is [1, 2, 6, 9]");
  refused(x.q.view(), x.v.view(), {to.data.data(), {1, 2, 9}, {18, 9, 1}}, {}, "overlaps state");
  refused(x.q.view(), x.v.view(), s, {.eps = 0.f}, "eps 0");
  const std::vector<index_t> used{7};
  refused(x.q.view(), x.v.view(), s, {.len_k = used}, "len_k[0] = 7");
  refused(x.q.view(), x.v.view(), s, {.causal = true, .len_k = used}, "a causal call");
  CHECK(!fovea::hydra_attention(x.q.view(), only_pos(x.k.view(), 0, 5), only_pos(x.v.view(), 0, 5), to.view(), s,
                                {.causal = true})
             .ok());
}
