// SPDX-License-Identifier: Apache-2.0
// What every selector of keys per query must do, whatever its rule: Quest, Adamas, MoBA.
#pragma once
#include <algorithm>
#include <functional>

#include "../support/dense.hpp"
#include "../support/executors.hpp"
#include "fovea/reference/softmax.hpp"

namespace test {

using fovea::Causal;
using fovea::Regime;
using fovea::Status;

using Selection = std::vector<std::uint8_t>;   // [sequence, q_head, len_q, len_k]  1: selected

// One mechanism with its parameters: the call under test (which makes its own metadata of x.k), and the reference's
// selection.
struct SelectorCase {
  std::function<Status(const Dense& x, const AttentionOptions& options, const fovea::Result& out)> attend;
  std::function<Selection(const Dense& x, const AttentionOptions& options)> select;
};

// Small integers, exact in every sum: a selector then has one right answer, ties included.
inline void make_integers(Values& values, std::uint64_t seed, std::ptrdiff_t largest) {
  Random random(seed);
  for (float& x : values.data) x = static_cast<float>(random.between(-largest, largest));
}
inline Dense integer_problem(std::uint64_t seed, index_t batch, index_t q_heads, index_t kv_heads, index_t len_q,
                             index_t len_k, index_t dim, index_t dim_v, std::ptrdiff_t largest) {
  Dense x(seed, batch, q_heads, kv_heads, len_q, len_k, dim, dim_v);
  make_integers(x.q, seed + 10, largest);
  make_integers(x.k, seed + 11, largest);
  return x;
}

inline Result run_selector(const SelectorCase& c, const Dense& x, AttentionOptions options) {
  Result r = unwritten(x.q.view(), x.v.view());
  options.lse = r.lse_view();
  const Status status = c.attend(x, options, r.out.view());
  INFO(status.message());
  REQUIRE(status.ok());
  return r;
}

inline AttentionOptions only_selected(AttentionOptions options, const Selection& keep, const Dense& x) {
  const index_t heads = x.q.heads, len_q = x.q.len, len_k = x.k.len;
  options.keep = {keep.data(), {x.q.batch, heads, len_q, len_k}, {heads * len_q * len_k, len_q * len_k, len_k, 1}};
  return options;
}

// The largest error in units of the budget of softmax over exactly these keys.
inline double error_over(const Result& got, const Dense& x, const AttentionOptions& options, const Selection& keep) {
  const Expected e = expect(x.q.view(), x.k.view(), x.v.view(), only_selected(options, keep, x));
  double worst = 0;
  for (std::size_t n = 0; n < e.out.size(); ++n)
    worst = std::max(worst, in_budgets(double{got.out.data[n]}, e.out[n], e.out_error[n]));
  for (std::size_t n = 0; n < e.lse.size(); ++n)
    worst = std::max(worst, in_budgets(double{got.lse[n]}, e.lse[n], e.lse_error[n]));
  return worst;
}

inline void check_selected(const SelectorCase& c, const Dense& x, const AttentionOptions& options) {
  const Result got = run_selector(c, x, options);
  const double worst = error_over(got, x, options, c.select(x, options));
  INFO("worst error " << worst << " budgets");
  CHECK(worst <= 1);
}

// |O - O_S| <= 2 (1 - mass) max |V|, mass the dense weights' sum over the selected keys.
inline void check_mass_bound(const SelectorCase& c, const Dense& x, const AttentionOptions& options) {
  const Result got = run_selector(c, x, options);
  const Expected all = expect(x.q.view(), x.k.view(), x.v.view(), options);
  double largest = 0;
  for (const float v : x.v.data) largest = std::max(largest, std::abs(double{v}));
  bool within = true;
  for (std::size_t row = 0; row < all.lse.size(); ++row) {
    const double mass = std::exp(double{got.lse[row]} - all.lse[row]);
    for (std::size_t d = 0; d < static_cast<std::size_t>(all.dim_v); ++d) {
      const std::size_t n = row * static_cast<std::size_t>(all.dim_v) + d;
      within = within && std::abs(double{got.out.data[n]} - all.out[n]) <= 2 * (1 - mass) * largest + 1e-4;
    }
  }
  CHECK(within);
}

inline void check_all_is_dense(const SelectorCase& everything, const Dense& x, const AttentionOptions& options) {
  const Result got = run_selector(everything, x, options), dense = attend(x, options);
  CHECK(distance(got, dense, expect(x.q.view(), x.k.view(), x.v.view(), options)) <= 1);
}

inline Dense with_queries(const Dense& x, index_t begin, index_t count) {
  Dense part = x;
  part.q = Values(x.q.batch, x.q.heads, count, x.q.dim);
  for (index_t b = 0; b < x.q.batch; ++b) {
    for (index_t h = 0; h < x.q.heads; ++h) {
      for (index_t i = 0; i < count; ++i) {
        for (index_t d = 0; d < x.q.dim; ++d) part.q.view()(b, h, i, d) = x.q.view()(b, h, begin + i, d);
      }
    }
  }
  return part;
}

// Whole prompt against chunks of `chunk` queries, in one regime: the same bits. options are causal; one sequence.
inline void check_chunks(const SelectorCase& c, const Dense& x, AttentionOptions options, index_t chunk) {
  const Result whole = run_selector(c, x, options);
  for (index_t begin = 0; begin < x.q.len; begin += chunk) {
    const index_t count = std::min(chunk, x.q.len - begin), offset = begin + x.k.len - x.q.len;
    options.q_offset = {&offset, 1};
    INFO("queries " << begin << " to " << begin + count);
    CHECK(same_rows(whole, 0, begin, run_selector(c, with_queries(x, begin, count), options)));
  }
}

// Decode of the last token is the last row of the prefill.
inline void check_decode(const SelectorCase& c, const Dense& x, AttentionOptions options) {
  const Result whole = run_selector(c, x, options);
  const Dense last = with_queries(x, x.q.len - 1, 1);
  const Result step = run_selector(c, last, options);
  const Expected budget =
      expect(last.q.view(), x.k.view(), x.v.view(), only_selected(options, c.select(last, options), last));
  Result row = step;
  for (index_t h = 0; h < x.q.heads; ++h) {
    row.lse_view()(0, h, 0) = whole.lse_at(0, h, x.q.len - 1);
    for (index_t d = 0; d < x.v.dim; ++d) row.out.view()(0, h, 0, d) = whole.at(0, h, x.q.len - 1, d);
  }
  CHECK(distance(row, step, budget) <= 1);
}

// Other keys and values behind position `changed` leave all queries up to it as they were, bit for bit.
inline void check_future(const SelectorCase& c, const Dense& x, const AttentionOptions& options, index_t changed) {
  const Result before = run_selector(c, x, options);
  Dense other = x;
  Random random(4711);
  for (index_t h = 0; h < x.k.heads; ++h) {
    for (index_t j = changed + 1; j < x.k.len; ++j) {
      for (index_t d = 0; d < x.k.dim; ++d) other.k.view()(0, h, j, d) = 30 * random.normal();
      for (index_t d = 0; d < x.v.dim; ++d) other.v.view()(0, h, j, d) = 30 * random.normal();
    }
  }
  const Result after = run_selector(c, other, options);
  const index_t rows = changed + 1 - (x.k.len - x.q.len);
  bool same = true;
  for (index_t h = 0; h < x.q.heads; ++h) {
    for (index_t i = 0; i < rows; ++i) {
      same = same &&
             std::bit_cast<std::uint32_t>(before.lse_at(0, h, i)) == std::bit_cast<std::uint32_t>(after.lse_at(0, h, i));
      for (index_t d = 0; d < x.v.dim; ++d)
        same = same &&
               std::bit_cast<std::uint32_t>(before.at(0, h, i, d)) == std::bit_cast<std::uint32_t>(after.at(0, h, i, d));
    }
  }
  CHECK(same);
  CHECK(!same_bits(before, after));   // later queries do see the change
}

inline void check_lanes(const SelectorCase& c, const Dense& x, AttentionOptions options) {
  const Result one = run_selector(c, x, options);
  ThreadPerLane threads;
  Reversed reversed;
  options.executor = {threads, 3};
  CHECK(same_bits(one, run_selector(c, x, options)));
  options.executor = {reversed, 3};
  CHECK(same_bits(one, run_selector(c, x, options)));
}

// A workspace of the caller's, full of NaN; its guards stay.
inline void check_workspace(const SelectorCase& c, const Dense& x, AttentionOptions options, std::size_t bytes) {
  const Result own = run_selector(c, x, options);
  PoisonedBytes workspace(bytes, 8);
  options.workspace = workspace.bytes();
  CHECK(same_bits(own, run_selector(c, x, options)));
  CHECK(workspace.guards_intact());
  options.workspace = workspace.bytes().first(128);
  Values out(x.q.batch, x.q.heads, x.q.len, x.v.dim, canary());
  CHECK(c.attend(x, options, out.view()).code() == fovea::Code::workspace_too_small);
  CHECK(std::all_of(out.data.begin(), out.data.end(), is_canary));
}

// NaN in every K and V row that no query selected, put there behind the selector's back by `attend_poisoned`, which makes
// its metadata of the clean keys.
inline Dense poisoned_elsewhere(const Dense& x, const Selection& keep) {
  Dense bad = x;
  const index_t group = x.q.heads / x.k.heads;
  for (index_t b = 0; b < x.k.batch; ++b) {
    for (index_t h = 0; h < x.k.heads; ++h) {
      for (index_t j = 0; j < x.k.len; ++j) {
        bool used = false;
        for (index_t g = h * group; g < (h + 1) * group; ++g) {
          for (index_t i = 0; i < x.q.len; ++i)
            used = used || keep[static_cast<std::size_t>(((b * x.q.heads + g) * x.q.len + i) * x.k.len + j)] != 0;
        }
        if (used) continue;
        for (index_t d = 0; d < x.k.dim; ++d) bad.k.view()(b, h, j, d) = canary();
        for (index_t d = 0; d < x.v.dim; ++d) bad.v.view()(b, h, j, d) = canary();
      }
    }
  }
  return bad;
}

// The lists of a selector as a selection. lists [sequence, q_head, query, capacity] of entries of `k_block` keys.
inline Selection selection_of(std::span<const std::int32_t> lists, index_t capacity, index_t k_block, index_t len_k) {
  const index_t rows = static_cast<index_t>(lists.size()) / capacity;
  Selection keep(static_cast<std::size_t>(rows * len_k), 0);
  for (index_t row = 0; row < rows; ++row) {
    std::int32_t before = -1;
    bool ended = false;
    for (index_t n = 0; n < capacity; ++n) {
      const std::int32_t entry = lists[static_cast<std::size_t>(row * capacity + n)];
      ended = ended || entry < 0;
      CHECK((ended ? entry == -1 : entry > before));   // ascending, -1 behind the last
      if (ended) continue;
      before = entry;
      for (index_t j = entry * k_block; j < std::min((entry + 1) * k_block, len_k); ++j)
        keep[static_cast<std::size_t>(row * len_k + j)] = 1;
    }
  }
  return keep;
}

}   // namespace test
