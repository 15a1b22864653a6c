// SPDX-License-Identifier: Apache-2.0
// Small dense problems for tests that state one thing about the front door.
#pragma once
#include <cstring>
#include <string>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/attention.hpp"
#include "poison.hpp"
#include "random.hpp"
#include "tolerance.hpp"

namespace test {

// Owned values of a tensor, head-major.
struct Values {
  index_t batch = 1, heads = 1, len = 1, dim = 1;
  std::vector<float> data;

  Values(index_t batch_, index_t heads_, index_t len_, index_t dim_, float value = 0)
      : batch(batch_),
        heads(heads_),
        len(len_),
        dim(dim_),
        data(static_cast<std::size_t>(batch_ * heads_ * len_ * dim_), value) {}

  Tensor<float> view() { return fovea::bhsd(data.data(), batch, heads, len, dim); }
  Tensor<const float> view() const { return fovea::bhsd(data.data(), batch, heads, len, dim); }
};

inline Values random_values(std::uint64_t seed, index_t batch, index_t heads, index_t len, index_t dim) {
  Values values(batch, heads, len, dim);
  Random random(seed);
  for (float& x : values.data) x = random.normal();
  return values;
}

// `len` rows of dim `len`: the output of a row is then its weights.
inline Values identity_values(index_t batch, index_t heads, index_t len) {
  Values values(batch, heads, len, len);
  for (index_t b = 0; b < batch; ++b) {
    for (index_t h = 0; h < heads; ++h) {
      for (index_t j = 0; j < len; ++j) values.view()(b, h, j, j) = 1;
    }
  }
  return values;
}

struct Dense {
  Values q, k, v;
  Dense(std::uint64_t seed, index_t batch, index_t q_heads, index_t kv_heads, index_t len_q, index_t len_k, index_t dim_qk,
        index_t dim_v)
      : q(random_values(seed, batch, q_heads, len_q, dim_qk)),
        k(random_values(seed + 1, batch, kv_heads, len_k, dim_qk)),
        v(random_values(seed + 2, batch, kv_heads, len_k, dim_v)) {}
};

template <class T>
Tensor<T> cut(Tensor<T> view, int axis, index_t begin, index_t count) {
  const auto at = static_cast<std::size_t>(axis);
  view.data += begin * view.stride[at];
  view.extent[at] = count;
  return view;
}
template <class T>
Tensor<T> only_batch(Tensor<T> view, index_t b) {
  return cut(view, 0, b, 1);
}
template <class T>
Tensor<T> only_head(Tensor<T> view, index_t h) {
  return cut(view, 1, h, 1);
}
template <class T>
Tensor<T> only_pos(Tensor<T> view, index_t begin, index_t count) {
  return cut(view, 2, begin, count);
}

struct Result {
  Values out;
  std::vector<float> lse;   // [batch, q_head, pos]

  View<float, 3> lse_view() { return {lse.data(), {out.batch, out.heads, out.len}, {out.heads * out.len, out.len, 1}}; }
  View<const float, 3> lse_view() const {
    return {lse.data(), {out.batch, out.heads, out.len}, {out.heads * out.len, out.len, 1}};
  }
  float lse_at(index_t b, index_t h, index_t i) const { return lse_view()(b, h, i); }
  float at(index_t b, index_t h, index_t i, index_t d) const { return out.view()(b, h, i, d); }
};

inline Result unwritten(Tensor<const float> q, Tensor<const float> v) {
  Result r{Values(q.extent[0], q.extent[1], q.extent[2], v.extent[3], canary()), {}};
  r.lse.assign(static_cast<std::size_t>(q.extent[0] * q.extent[1] * q.extent[2]), canary());
  return r;
}

inline Result attend(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, AttentionOptions options = {}) {
  Result r = unwritten(q, v);
  options.lse = r.lse_view();
  const fovea::Status status = fovea::attention(q, k, v, r.out.view(), options);
  INFO(status.message());
  REQUIRE(status.ok());
  return r;
}
inline Result attend(const Dense& x, const AttentionOptions& options = {}) {
  return attend(x.q.view(), x.k.view(), x.v.view(), options);
}

inline bool same_bits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size_bytes()) == 0);
}
inline bool same_bits(const Result& a, const Result& b) {
  return same_bits(a.out.data, b.out.data) && same_bits(a.lse, b.lse);
}

// Are rows [first, first + count) of `whole`, batch b, those of `part` (batch 0)?
inline bool same_rows(const Result& whole, index_t b, index_t first, const Result& part) {
  for (index_t h = 0; h < part.out.heads; ++h) {
    for (index_t i = 0; i < part.out.len; ++i) {
      const auto width = static_cast<std::size_t>(part.out.dim);
      const float one = whole.lse_at(b, h, first + i), other = part.lse_at(0, h, i);
      if (std::memcmp(&one, &other, sizeof one) != 0) return false;
      if (std::memcmp(&whole.out.view()(b, h, first + i, 0), &part.out.view()(0, h, i, 0), width * sizeof(float)) != 0)
        return false;
    }
  }
  return true;
}

// Largest distance of two results in units of twice the budget: two engines' runs may each be one budget from the truth.
inline double distance(const Result& a, const Result& b, const Expected& budget) {
  double worst = 0;
  for (std::size_t n = 0; n < a.out.data.size(); ++n) {
    worst = std::max(worst, in_budgets(double{a.out.data[n]}, double{b.out.data[n]}, 2 * budget.out_error[n]));
  }
  for (std::size_t n = 0; n < a.lse.size(); ++n) {
    worst = std::max(worst, in_budgets(double{a.lse[n]}, double{b.lse[n]}, 2 * budget.lse_error[n]));
  }
  return worst;
}

// Distance from the reference in budgets.
inline double distance(const Result& a, const Expected& e) {
  double worst = 0;
  for (std::size_t n = 0; n < a.out.data.size(); ++n) {
    worst = std::max(worst, in_budgets(double{a.out.data[n]}, e.out[n], e.out_error[n]));
  }
  for (std::size_t n = 0; n < a.lse.size(); ++n) {
    worst = std::max(worst, in_budgets(double{a.lse[n]}, e.lse[n], e.lse_error[n]));
  }
  return worst;
}

inline constexpr fovea::Regime kRegimes[] = {fovea::Regime::prefill, fovea::Regime::decode, fovea::Regime::wide_decode};

}  // namespace test
