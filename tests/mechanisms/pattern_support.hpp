// SPDX-License-Identifier: Apache-2.0
// What every mechanism whose keys are a pattern of positions must pass, given how to run it, its reference and a predicate.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "support/dense.hpp"
#include "support/executors.hpp"
#include "support/problem.hpp"

namespace test {

using PatternCall = std::function<fovea::Status(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v,
                                                Tensor<float> out, const AttentionOptions& options)>;
using PatternReference =
    std::function<void(const Dense& x, const AttentionOptions& options, Tensor<double> out, View<double, 3> lse)>;
// The definition in one place that shares no line with mechanism and reference; causality included.
using Sees = std::function<bool(index_t sequence, index_t head, index_t pos, index_t key)>;

inline Result run_pattern(const PatternCall& call, Tensor<const float> q, Tensor<const float> k, Tensor<const float> v,
                          AttentionOptions options) {
  Result r = unwritten(q, v);
  options.lse = r.lse_view();
  const fovea::Status status = call(q, k, v, r.out.view(), options);
  INFO(status.message());
  REQUIRE(status.ok());
  return r;
}
inline Result run_pattern(const PatternCall& call, const Dense& x, const AttentionOptions& options) {
  return run_pattern(call, x.q.view(), x.k.view(), x.v.view(), options);
}

// Results and budgets of softmax under the predicate as a mask.
inline Expected expect_seen(const Dense& x, AttentionOptions options, const Sees& sees) {
  const index_t sequences = fovea::reference::softmax_sequences(options, x.q.batch);
  std::vector<std::uint8_t> keep(static_cast<std::size_t>(sequences * x.q.heads * x.q.len * x.k.len));
  std::size_t n = 0;
  for (index_t b = 0; b < sequences; ++b) {
    const auto s = fovea::reference::softmax_sequence(b, x.q.view(), x.k.view(), options);
    for (index_t h = 0; h < x.q.heads; ++h) {
      for (index_t i = 0; i < x.q.len; ++i) {
        for (index_t j = 0; j < x.k.len; ++j) keep[n++] = sees(b, h, s.q_offset + i, j);
      }
    }
  }
  options.keep = {
      keep.data(), {sequences, x.q.heads, x.q.len, x.k.len}, {x.q.heads * x.q.len * x.k.len, x.q.len * x.k.len, x.k.len, 1}};
  return expect(x.q.view(), x.k.view(), x.v.view(), options);
}

// NaN in the keys and values that no query of their kv head sees.
inline Dense poisoned(const Dense& x, const AttentionOptions& options, const Sees& sees) {
  Dense y = x;
  const index_t group = x.q.heads / x.k.heads;
  for (index_t b = 0; b < fovea::reference::softmax_sequences(options, x.q.batch); ++b) {
    const auto s = fovea::reference::softmax_sequence(b, x.q.view(), x.k.view(), options);
    const index_t stored = options.cu_len_k.empty() ? x.k.len : s.len_k;
    for (index_t h = 0; h < x.k.heads; ++h) {
      for (index_t j = 0; j < stored; ++j) {
        bool seen = false;
        for (index_t g = 0; g < group; ++g) {
          for (index_t i = 0; i < s.len_q; ++i) seen = seen || (j < s.len_k && sees(b, h * group + g, s.q_offset + i, j));
        }
        for (index_t d = 0; !seen && d < x.k.dim; ++d) y.k.view()(s.batch, h, s.first_k + j, d) = kNan;
        for (index_t d = 0; !seen && d < x.v.dim; ++d) y.v.view()(s.batch, h, s.first_k + j, d) = kNan;
      }
    }
  }
  return y;
}

// Mechanism against the predicate's budgets, reference against its values; unseen keys, lanes.
inline void check_pattern(const PatternCall& call, const PatternReference& reference, const Sees& sees, const Dense& x,
                          AttentionOptions options, const std::string& what) {
  INFO(what << ", len " << x.q.len << " x " << x.k.len << ", heads " << x.q.heads << "/" << x.k.heads);
  Expected want = expect_seen(x, options, sees);
  std::vector<double> out(want.out.size()), lse(want.lse.size());
  reference(x, options, fovea::bhsd(out.data(), x.q.batch, x.q.heads, x.q.len, x.v.dim),
            {lse.data(), {x.q.batch, x.q.heads, x.q.len}, {x.q.heads * x.q.len, x.q.len, 1}});
  double apart = 0;
  for (std::size_t n = 0; n < out.size(); ++n) apart = std::max(apart, in_budgets(out[n], want.out[n], 1e-12));
  for (std::size_t n = 0; n < lse.size(); ++n) apart = std::max(apart, in_budgets(lse[n], want.lse[n], 1e-12));
  INFO("the reference is " << apart << " times 1e-12 from the predicate");
  CHECK(apart <= 1);

  options.executor = {};
  const Dense y = poisoned(x, options, sees);
  const Result serial = run_pattern(call, y, options);
  const double off = distance(serial, want);
  INFO(off << " budgets");
  CHECK(off <= 1);
  CHECK(same_bits(serial, run_pattern(call, x, options)));
  ThreadPerLane threads;
  options.executor = {threads, 3};
  CHECK(same_bits(serial, run_pattern(call, y, options)));
}

// The last rows of a causal sequence in chunks, each with the keys up to its end: within the budgets of the whole.
inline void check_pattern_chunks(const PatternCall& call, const Sees& sees, const Dense& x,
                                 const std::vector<index_t>& chunks) {
  AttentionOptions options;
  options.causal = Causal::bottom_right;
  const Expected want = expect_seen(x, options, sees);
  index_t begin = 0;
  double worst = 0;
  for (const index_t count : chunks) {
    const Result r = run_pattern(call, only_pos(x.q.view(), begin, count), only_pos(x.k.view(), 0, begin + count),
                                 only_pos(x.v.view(), 0, begin + count), options);
    for (index_t b = 0; b < x.q.batch; ++b) {
      for (index_t h = 0; h < x.q.heads; ++h) {
        for (index_t i = 0; i < count; ++i) {
          const auto row = static_cast<std::size_t>((b * x.q.heads + h) * x.q.len + begin + i);
          worst = std::max(worst, in_budgets(double{r.lse_at(b, h, i)}, want.lse[row], want.lse_error[row]));
          for (index_t d = 0; d < x.v.dim; ++d) {
            const std::size_t n = row * static_cast<std::size_t>(x.v.dim) + static_cast<std::size_t>(d);
            worst = std::max(worst, in_budgets(double{r.at(b, h, i, d)}, want.out[n], want.out_error[n]));
          }
        }
      }
    }
    begin += count;
  }
  REQUIRE(begin == x.q.len);
  INFO(worst << " budgets");
  CHECK(worst <= 1);
}

// Other keys from position `from` on leave the rows before it bit for bit.
inline void check_pattern_future(const PatternCall& call, const Dense& x, index_t from, const AttentionOptions& options) {
  Dense y = x;
  Random random(77);
  for (index_t h = 0; h < x.k.heads; ++h) {
    for (index_t j = from; j < x.k.len; ++j) {
      for (index_t d = 0; d < x.k.dim; ++d) y.k.view()(0, h, j, d) = random.normal();
      for (index_t d = 0; d < x.v.dim; ++d) y.v.view()(0, h, j, d) = random.normal();
    }
  }
  const Result a = run_pattern(call, x, options), b = run_pattern(call, y, options);
  bool same = true, moved = false;
  for (index_t h = 0; h < x.q.heads; ++h) {
    for (index_t i = 0; i < x.q.len; ++i) {
      const bool equal = std::memcmp(&a.out.view()(0, h, i, 0), &b.out.view()(0, h, i, 0),
                                     static_cast<std::size_t>(x.v.dim) * sizeof(float)) == 0;
      same = same && (equal || i >= from);
      moved = moved || !equal;
    }
  }
  CHECK(same);
  CHECK(moved);
}

// A refusal with these words, after which nothing is written.
template <class F>
void check_refused(Result& r, const char* words, const F& call) {
  const fovea::Status status = call();
  INFO(status.message());
  CHECK(!status.ok());
  CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
  CHECK(std::all_of(r.out.data.begin(), r.out.data.end(), is_canary));
  CHECK(std::all_of(r.lse.begin(), r.lse.end(), is_canary));
}

}   // namespace test
