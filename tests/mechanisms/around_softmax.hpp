// SPDX-License-Identifier: Apache-2.0
// What every mechanism that wraps softmax must pass, given how to run it and what to expect: a grid, rows of extreme scores,
// keys that must leave no trace, and the same bits for any number of lanes.
#pragma once
#include <functional>
#include <utility>
#include <vector>

#include "support/dense.hpp"
#include "support/executors.hpp"
#include "support/problem.hpp"

namespace test {

using Run = std::function<Result(const Dense&, const AttentionOptions&)>;
// Values and error budgets; without `lse` it is not compared.
using Ask = std::function<Expected(const Dense&, const AttentionOptions&)>;

inline double worst_of(const Result& got, const Expected& want) {
  REQUIRE(got.out.data.size() == want.out.size());
  double worst = 0;
  for (std::size_t n = 0; n < want.out.size(); ++n)
    worst = std::max(worst, in_budgets(double{got.out.data[n]}, want.out[n], want.out_error[n]));
  for (std::size_t n = 0; n < want.lse.size(); ++n)
    worst = std::max(worst, in_budgets(double{got.lse[n]}, want.lse[n], want.lse_error[n]));
  return worst;
}

inline void check_case(const Run& run, const Ask& ask, const Dense& x, AttentionOptions options) {
  const Expected want = ask(x, options);
  ThreadPerLane threads;
  for (const Regime regime : kRegimes) {
    options.regime = regime;
    options.executor = {};
    const Result serial = run(x, options);
    const double off = worst_of(serial, want);
    INFO("regime " << name(regime) << ", heads " << x.q.heads << "/" << x.k.heads << ", len " << x.q.len << " x " << x.k.len
                   << ", dims " << x.q.dim << "/" << x.v.dim << ", causal " << name(options.causal) << ", window "
                   << options.window.left << ": " << off << " budgets");
    CHECK(off <= 1);
    options.executor = {threads, 3};
    CHECK(same_bits(serial, run(x, options)));
  }
}

// Lengths around row groups, vectors, key tiles and the key splits of a decode.
inline void check_grid(const Run& run, const Ask& ask, const std::vector<std::pair<index_t, index_t>>& heads) {
  struct Shape {
    index_t batch, len_q, len_k, dim_qk, dim_v;
  };
  constexpr Shape kShapes[] = {{1, 1, 1, 8, 8},      {2, 1, 257, 16, 24},  {1, 15, 16, 16, 16},  {2, 16, 15, 3, 5},
                               {1, 17, 255, 24, 32}, {1, 33, 256, 16, 17}, {1, 129, 257, 8, 16}, {1, 3, 1100, 16, 16}};
  std::size_t n = 0;
  for (const Shape& s : kShapes) {
    for (int mask = 0; mask < 3; ++mask, ++n) {
      const auto& [q_heads, kv_heads] = heads[n % heads.size()];
      const Dense x(700 + n, s.batch, q_heads, kv_heads, s.len_q, s.len_k, s.dim_qk, s.dim_v);
      AttentionOptions options;
      options.causal = mask == 0 ? Causal::none : mask == 1 ? Causal::bottom_right : Causal::top_left;
      if (mask == 2) options.window.left = 20;
      check_case(run, ask, x, options);
    }
  }
}

// Ragged batches, keys in use, positions of the caller's.
inline void check_lengths(const Run& run, const Ask& ask, const std::pair<index_t, index_t>& heads) {
  const std::vector<index_t> cu_q{0, 3, 3, 21}, cu_k{0, 17, 40, 75}, used{9, 30}, offsets{4, -2};
  Dense packed(801, 1, heads.first, heads.second, 21, 75, 16, 16);
  AttentionOptions options;
  options.cu_len_q = cu_q;
  options.cu_len_k = cu_k;
  options.causal = Causal::bottom_right;
  check_case(run, ask, packed, options);

  Dense padded(802, 2, heads.first, heads.second, 5, 33, 16, 16);
  for (index_t b = 0; b < 2; ++b) {
    for (index_t h = 0; h < heads.second; ++h) {
      for (index_t j = used[static_cast<std::size_t>(b)]; j < 33; ++j) {
        for (index_t d = 0; d < 16; ++d) padded.k.view()(b, h, j, d) = padded.v.view()(b, h, j, d) = kNan;
      }
    }
  }
  AttentionOptions lengths;
  lengths.len_k = used;
  lengths.q_offset = offsets;
  lengths.causal = Causal::top_left;
  check_case(run, ask, padded, lengths);
}

// One feature, scale 1: scores are the numbers in K.
inline void check_extremes(const Run& run, const Ask& ask, const std::pair<index_t, index_t>& heads) {
  constexpr index_t kKeys = 300;
  const auto scores = [&](const std::function<float(index_t)>& f) {
    Dense x(803, 1, heads.first, heads.second, 4, kKeys, 1, 9);
    std::fill(x.q.data.begin(), x.q.data.end(), 1.f);
    for (std::size_t n = 0; n < x.k.data.size(); ++n) x.k.data[n] = f(static_cast<index_t>(n) % kKeys);
    return x;
  };
  AttentionOptions options;
  options.scale = 1.f;
  const std::function<float(index_t)> all[] = {[](index_t j) { return 0.2f * static_cast<float>(j) - 30.f; },
                                               [](index_t j) { return 30.f - 0.2f * static_cast<float>(j); },
                                               [](index_t j) { return j % 2 == 0 ? 1e4f : -1e4f; },
                                               [](index_t) { return -1e4f; }, [](index_t) { return 0.f; }};
  for (const auto& f : all) check_case(run, ask, scores(f), options);
  AttentionOptions one = options;
  one.window = {0, 0};
  check_case(run, ask, scores(all[0]), one);
  AttentionOptions empty = options;
  empty.causal = Causal::top_left;
  const std::vector<index_t> before{-2};   // rows 0 and 1 see nothing
  empty.q_offset = before;
  check_case(run, ask, scores(all[0]), empty);
}

// Other keys behind a row's position, or NaN there, move no bit of it.
inline void check_future(const Run& run, const std::pair<index_t, index_t>& heads) {
  constexpr index_t kLen = 45, kSame = 19;
  const Dense x(804, 1, heads.first, heads.second, kLen, kLen, 16, 16);
  for (const bool poisoned : {false, true}) {
    Dense y = x;
    Random random(805);
    for (index_t h = 0; h < heads.second; ++h) {
      for (index_t j = kSame; j < kLen; ++j) {
        for (index_t d = 0; d < 16; ++d) {
          y.k.view()(0, h, j, d) = poisoned ? kNan : random.normal();
          y.v.view()(0, h, j, d) = poisoned ? kNan : random.normal();
        }
      }
    }
    for (const Regime regime : kRegimes) {
      AttentionOptions options;
      options.causal = Causal::top_left;
      options.regime = regime;
      const Result a = run(x, options), b = run(y, options);
      bool same = true, moved = false;
      for (index_t h = 0; h < a.out.heads; ++h) {
        for (index_t i = 0; i < kLen; ++i) {
          const auto bytes = static_cast<std::size_t>(a.out.dim) * sizeof(float);
          const bool equal = std::memcmp(&a.out.view()(0, h, i, 0), &b.out.view()(0, h, i, 0), bytes) == 0;
          same = same && (equal || i >= kSame);
          moved = moved || !equal;
        }
      }
      INFO("regime " << name(regime) << (poisoned ? ", NaN" : ", other numbers"));
      CHECK(same);
      CHECK(moved);
    }
  }
}

inline void check_around_softmax(const Run& run, const Ask& ask, const std::vector<std::pair<index_t, index_t>>& heads) {
  check_grid(run, ask, heads);
  check_lengths(run, ask, heads[0]);
  check_extremes(run, ask, heads[0]);
  check_future(run, heads[0]);
}

// The budget of bare attention, LSE left out: rows that a mechanism changes start from it.
inline Expected expect_rows(const Dense& x, const AttentionOptions& options) {
  Expected e = expect(x.q.view(), x.k.view(), x.v.view(), options);
  e.lse.clear();
  e.lse_error.clear();
  return e;
}

}   // namespace test
