// SPDX-License-Identifier: Apache-2.0
// What every mask means, said without the mask: the same call over fewer keys, or a drawn truth table.
#include <cmath>
#include <string>

#include "support/dense.hpp"
#include "support/problem.hpp"

namespace {

using namespace test;

// Zero scores and unit values: a row's weights are 1 / visible on the visible keys. Draws them as text, one row per query.
std::string visible_keys(index_t len_q, index_t len_k, AttentionOptions options) {
  const Values q(1, 1, len_q, 2), k(1, 1, len_k, 2), v = identity_values(1, 1, len_k);
  std::string both;
  for (const Regime regime : kRegimes) {
    options.regime = regime;
    const Result r = attend(q.view(), k.view(), v.view(), options);
    const Expected e = expect(q.view(), k.view(), v.view(), options);
    CHECK(distance(r, e) <= 1);
    std::string rows;
    for (index_t i = 0; i < len_q; ++i) {
      if (i > 0) rows += ' ';
      int count = 0;
      for (index_t j = 0; j < len_k; ++j) {
        const bool visible = r.at(0, 0, i, j) > 0;
        rows += visible ? '1' : '0';
        count += visible;
      }
      if (count == 0) {
        CHECK(r.lse_at(0, 0, i) == -kInfinity);
      } else {
        CHECK(double{r.lse_at(0, 0, i)} == Catch::Approx(std::log(count)).margin(1e-6));
      }
    }
    if (!both.empty()) CHECK(both == rows);
    both = rows;
  }
  return both;
}

AttentionOptions masked(Causal causal, Window window = {}) {
  AttentionOptions options;
  options.causal = causal;
  options.window = window;
  return options;
}

struct Shape {
  index_t len_q, len_k, dim;
};
const std::vector<Shape> kShapes{{1, 1, 8},    {3, 40, 17},  {17, 65, 33},  {33, 130, 64},
                                 {70, 70, 40}, {5, 300, 64}, {130, 20, 16}, {1, 700, 32}};

// The keys of one row gathered into their own tensors, run alone without any mask.
Result one_row_over(const Dense& x, index_t q_head, index_t i, const std::vector<index_t>& keys, AttentionOptions options) {
  const index_t group = x.q.heads / x.k.heads, count = static_cast<index_t>(keys.size());
  Values k(1, 1, count, x.k.dim), v(1, 1, count, x.v.dim);
  for (index_t n = 0; n < count; ++n) {
    const index_t j = keys[static_cast<std::size_t>(n)];
    for (index_t d = 0; d < x.k.dim; ++d) k.view()(0, 0, n, d) = x.k.view()(0, q_head / group, j, d);
    for (index_t d = 0; d < x.v.dim; ++d) v.view()(0, 0, n, d) = x.v.view()(0, q_head / group, j, d);
  }
  return attend(only_pos(only_head(x.q.view(), q_head), i, 1), k.view(), v.view(), options);
}

// Every row of a masked call against the unmasked call over the keys that `sees` names.
template <class Sees>
void check_against_gathered(const Dense& x, const AttentionOptions& options, Sees sees) {
  const Result whole = attend(x, options);
  const Expected e = expect(x.q.view(), x.k.view(), x.v.view(), options);
  AttentionOptions plain;
  plain.regime = options.regime;
  double worst = 0;
  for (index_t h = 0; h < x.q.heads; ++h) {
    for (index_t i = 0; i < x.q.len; ++i) {
      std::vector<index_t> keys;
      for (index_t j = 0; j < x.k.len; ++j) {
        if (sees(h, i, j)) keys.push_back(j);
      }
      const Result row = one_row_over(x, h, i, keys, plain);
      const auto at = static_cast<std::size_t>(h * x.q.len + i);
      worst = std::max(worst, in_budgets(double{whole.lse[at]}, double{row.lse[0]}, 2 * e.lse_error[at]));
      for (std::size_t d = 0; d < row.out.data.size(); ++d) {
        const std::size_t n = at * row.out.data.size() + d;
        worst = std::max(worst, in_budgets(double{whole.out.data[n]}, double{row.out.data[d]}, 2 * e.out_error[n]));
      }
    }
  }
  CHECK(worst <= 1);
}

}  // namespace

TEST_CASE("truth tables of the causal modes", "[masks]") {
  CHECK(visible_keys(2, 5, masked(Causal::none)) == "11111 11111");
  CHECK(visible_keys(2, 5, masked(Causal::top_left)) == "10000 11000");
  CHECK(visible_keys(2, 5, masked(Causal::bottom_right)) == "11110 11111");
  CHECK(visible_keys(5, 2, masked(Causal::top_left)) == "10 11 11 11 11");
  CHECK(visible_keys(5, 2, masked(Causal::bottom_right)) == "00 00 00 10 11");
  CHECK(visible_keys(3, 3, masked(Causal::top_left)) == "100 110 111");
  CHECK(visible_keys(3, 3, masked(Causal::bottom_right)) == "100 110 111");
}

TEST_CASE("truth tables of windows: inclusive distances, negative means unbounded", "[masks]") {
  CHECK(visible_keys(3, 3, masked(Causal::none, {0, 0})) == "100 010 001");
  CHECK(visible_keys(3, 3, masked(Causal::none, {1, 0})) == "100 110 011");
  CHECK(visible_keys(3, 3, masked(Causal::none, {-1, 0})) == "100 110 111");
  CHECK(visible_keys(3, 3, masked(Causal::none, {0, -1})) == "111 011 001");
  CHECK(visible_keys(3, 3, masked(Causal::none, {0, 1})) == "110 011 001");
  CHECK(visible_keys(3, 3, masked(Causal::top_left, {1, 1})) == "100 110 011");
  CHECK(visible_keys(2, 5, masked(Causal::none, {0, 1})) == "11000 01100");
  CHECK(visible_keys(2, 5, masked(Causal::top_left, {0, 1})) == "10000 01000");
  CHECK(visible_keys(2, 5, masked(Causal::bottom_right, {1, -1})) == "00110 00011");
  CHECK(visible_keys(2, 5, masked(Causal::bottom_right, {0, 3})) == "00010 00001");
  CHECK(visible_keys(5, 2, masked(Causal::none, {1, 0})) == "10 11 01 00 00");
  CHECK(visible_keys(5, 2, masked(Causal::bottom_right, {0, 0})) == "00 00 00 10 01");
  CHECK(visible_keys(5, 2, masked(Causal::none, {1000, 1000})) == "11 11 11 11 11");
}

TEST_CASE("truth tables of query offsets and key lengths", "[masks]") {
  const std::vector<index_t> two{2}, minus_one{-1}, three{3}, none_left{0}, far{100};
  AttentionOptions options = masked(Causal::top_left);
  options.q_offset = two;
  CHECK(visible_keys(2, 5, options) == "11100 11110");
  options.causal = Causal::bottom_right;   // an offset given beats the alignment
  CHECK(visible_keys(2, 5, options) == "11100 11110");
  options.q_offset = minus_one;
  CHECK(visible_keys(3, 3, options) == "000 100 110");
  options.q_offset = far;
  CHECK(visible_keys(2, 3, options) == "111 111");
  options.window = {98, -1};
  CHECK(visible_keys(2, 3, options) == "001 000");
  options = masked(Causal::none, {1, 1});
  options.q_offset = two;
  CHECK(visible_keys(2, 5, options) == "01110 00111");

  options = masked(Causal::bottom_right);
  options.len_k = three;   // the diagonal ends at the last key in use
  CHECK(visible_keys(2, 5, options) == "11000 11100");
  options.len_k = none_left;
  CHECK(visible_keys(2, 5, options) == "00000 00000");
  options = masked(Causal::none);
  options.len_k = three;
  CHECK(visible_keys(2, 5, options) == "11100 11100");
}

TEST_CASE("causal = unmasked attention over the first keys", "[masks]") {
  for (const Shape& s : kShapes) {
    for (const Regime regime : kRegimes) {
      const Dense x(11, 1, 2, 1, s.len_q, s.len_k, s.dim, s.dim);
      AttentionOptions options = masked(Causal::top_left);
      options.regime = regime;
      INFO(s.len_q << " x " << s.len_k << " dim " << s.dim);
      check_against_gathered(x, options, [&](index_t, index_t i, index_t j) { return j <= i; });
      options.causal = Causal::bottom_right;
      check_against_gathered(x, options, [&](index_t, index_t i, index_t j) { return j <= i + s.len_k - s.len_q; });
    }
  }
}

TEST_CASE("a window = unmasked attention over the sliced keys", "[masks]") {
  for (const Shape& s : kShapes) {
    for (const Window window : {Window{3, 2}, Window{64, -1}, Window{-1, 10}, Window{130, 0}}) {
      const Dense x(12, 1, 2, 2, s.len_q, s.len_k, s.dim, 9);
      AttentionOptions options = masked(Causal::none, window);
      const std::vector<index_t> offset{s.len_k / 3};
      options.q_offset = offset;
      for (const Regime regime : kRegimes) {
        options.regime = regime;
        const Result whole = attend(x, options);
        const Expected e = expect(x.q.view(), x.k.view(), x.v.view(), options);
        AttentionOptions plain;
        plain.regime = regime;
        double worst = 0;
        for (index_t i = 0; i < s.len_q; ++i) {
          const index_t pos = i + offset[0];
          const index_t begin = std::clamp(window.left < 0 ? 0 : pos - window.left, index_t{0}, s.len_k);
          const index_t end = std::clamp(window.right < 0 ? s.len_k : pos + window.right + 1, begin, s.len_k);
          const Result row = attend(only_pos(x.q.view(), i, 1), only_pos(x.k.view(), begin, end - begin),
                                    only_pos(x.v.view(), begin, end - begin), plain);
          for (index_t h = 0; h < 2; ++h) {
            const auto at = static_cast<std::size_t>(h * s.len_q + i);
            worst = std::max(worst, in_budgets(double{whole.lse[at]}, double{row.lse_at(0, h, 0)}, 2 * e.lse_error[at]));
            for (index_t d = 0; d < 9; ++d) {
              const std::size_t n = at * 9 + static_cast<std::size_t>(d);
              worst = std::max(worst, in_budgets(double{whole.out.data[n]}, double{row.at(0, h, 0, d)}, 2 * e.out_error[n]));
            }
          }
        }
        INFO(s.len_q << " x " << s.len_k << " dim " << s.dim << " window " << window.left << ", " << window.right);
        CHECK(worst <= 1);
      }
    }
  }
}

TEST_CASE("a window as wide as the keys changes no bit of a causal call", "[masks]") {
  const Dense x(13, 1, 2, 1, 70, 70, 32, 32);
  for (const Regime regime : kRegimes) {
    AttentionOptions options = masked(Causal::top_left);
    options.regime = regime;
    const Result causal = attend(x, options);
    options.window = {70, 0};
    CHECK(same_bits(causal, attend(x, options)));
    options.window = {0, -1};   // with causal: each row its own key only
    const Result own = attend(x, options);
    for (index_t h = 0; h < 2; ++h) {
      for (index_t i = 0; i < 70; ++i) {
        for (index_t d = 0; d < 32; ++d) CHECK(own.at(0, h, i, d) == Catch::Approx(x.v.view()(0, 0, i, d)).epsilon(1e-6));
      }
    }
  }
}

TEST_CASE("key lengths = sliced keys, bit for bit", "[masks][bits]") {
  const Dense x(14, 3, 4, 2, 9, 200, 24, 24);
  const std::vector<index_t> lens{200, 77, 0};
  for (const Regime regime : {Regime::automatic, Regime::prefill, Regime::decode}) {
    for (const Causal causal : {Causal::none, Causal::top_left, Causal::bottom_right}) {
      AttentionOptions options = masked(causal);
      options.regime = regime;
      options.len_k = lens;
      const Result together = attend(x, options);
      options.len_k = {};
      for (index_t b = 0; b < 3; ++b) {
        const index_t len = lens[static_cast<std::size_t>(b)];
        const Result alone = attend(only_batch(x.q.view(), b), only_pos(only_batch(x.k.view(), b), 0, len),
                                    only_pos(only_batch(x.v.view(), b), 0, len), options);
        INFO("sequence " << b << " regime " << name(regime) << " causal " << name(causal));
        CHECK(same_rows(together, b, 0, alone));
      }
    }
  }
}

TEST_CASE("a ragged batch = one call per sequence, bit for bit", "[masks][bits]") {
  const std::vector<index_t> cu_q{0, 3, 3, 20, 21, 90, 90}, cu_k{0, 70, 75, 75, 275, 340, 340};
  const Dense x(15, 1, 6, 2, 90, 340, 40, 16);
  for (const Regime regime : {Regime::automatic, Regime::prefill, Regime::decode}) {
    for (const Causal causal : {Causal::none, Causal::top_left, Causal::bottom_right}) {
      AttentionOptions options = masked(causal, causal == Causal::none ? Window{30, 20} : Window{});
      options.regime = regime;
      AttentionOptions together = options;
      together.cu_len_q = cu_q;
      together.cu_len_k = cu_k;
      const Result all = attend(x, together);
      for (std::size_t s = 0; s + 1 < cu_q.size(); ++s) {
        const index_t len_q = cu_q[s + 1] - cu_q[s], len_k = cu_k[s + 1] - cu_k[s];
        const Result alone = attend(only_pos(x.q.view(), cu_q[s], len_q), only_pos(x.k.view(), cu_k[s], len_k),
                                    only_pos(x.v.view(), cu_k[s], len_k), options);
        INFO("sequence " << s << " regime " << name(regime) << " causal " << name(causal));
        CHECK(same_rows(all, 0, cu_q[s], alone));
      }
    }
  }
}

TEST_CASE("a keep mask and a bias of -inf = attention over the gathered keys", "[masks]") {
  for (const Shape& s : kShapes) {
    const Dense x(16, 1, 2, 1, s.len_q, s.len_k, s.dim, 11);
    Random random(17);
    std::vector<std::uint8_t> keep(static_cast<std::size_t>(2 * s.len_q * s.len_k));
    for (std::uint8_t& one : keep) one = random.pick<std::uint8_t>({0, 0, 1, 3});
    std::vector<float> bias(keep.size());
    for (std::size_t n = 0; n < keep.size(); ++n) bias[n] = keep[n] != 0 ? 0.f : -kInfinity;
    const std::array<index_t, 4> extent{1, 2, s.len_q, s.len_k}, stride{0, s.len_q * s.len_k, s.len_k, 1};
    const auto sees = [&](index_t h, index_t i, index_t j) {
      return keep[static_cast<std::size_t>((h * s.len_q + i) * s.len_k + j)] != 0;
    };
    for (const Regime regime : kRegimes) {
      INFO(s.len_q << " x " << s.len_k << " dim " << s.dim);
      AttentionOptions options;
      options.regime = regime;
      options.keep = {keep.data(), extent, stride};
      check_against_gathered(x, options, sees);
      const Result kept = attend(x, options);
      options.keep = {};
      options.bias = {bias.data(), extent, stride};
      check_against_gathered(x, options, sees);
      const Result biased = attend(x, options);
      CHECK(distance(kept, biased, expect(x.q.view(), x.k.view(), x.v.view(), options)) <= 1);
    }
  }
}

TEST_CASE("a bias adds to the scores after the softcap", "[masks][bias]") {
  // scores are softcap(q.k) + bias; with keys of zero the bias alone decides.
  const index_t len_q = 5, len_k = 90;
  const Values q(1, 1, len_q, 4, 1.f), k(1, 1, len_k, 4);
  const Values v = random_values(18, 1, 1, len_k, 3), b = random_values(19, 1, 1, len_q, len_k);
  AttentionOptions options;
  options.softcap = 3;
  options.bias = b.view();
  for (const Regime regime : kRegimes) {
    options.regime = regime;
    const Result r = attend(q.view(), k.view(), v.view(), options);
    for (index_t i = 0; i < len_q; ++i) {
      double sum = 0, out[3] = {};
      for (index_t j = 0; j < len_k; ++j) {
        const double weight = std::exp(double{b.view()(0, 0, i, j)});
        sum += weight;
        for (index_t d = 0; d < 3; ++d) out[d] += weight * double{v.view()(0, 0, j, d)};
      }
      for (index_t d = 0; d < 3; ++d) CHECK(double{r.at(0, 0, i, d)} == Catch::Approx(out[d] / sum).margin(5e-6));
      CHECK(double{r.lse_at(0, 0, i)} == Catch::Approx(std::log(sum)).margin(5e-6));
    }
  }
}

TEST_CASE("broadcast axes of bias and keep = the written-out mask, bit for bit", "[masks][bias]") {
  const index_t batch = 2, heads = 4, len_q = 7, len_k = 70;
  const Dense x(20, batch, heads, 2, len_q, len_k, 16, 16);
  for (int shared = 0; shared < 8; ++shared) {
    const index_t eb = (shared & 1) != 0 ? 1 : batch, eh = (shared & 2) != 0 ? 1 : heads, ei = (shared & 4) != 0 ? 1 : len_q;
    const Values small = random_values(21, eb, eh, ei, len_k);
    Values full(batch, heads, len_q, len_k);
    std::vector<std::uint8_t> small_keep, full_keep(full.data.size());
    for (float value : small.data) small_keep.push_back(value > -0.5f);
    std::size_t n = 0;
    for (index_t b = 0; b < batch; ++b) {
      for (index_t h = 0; h < heads; ++h) {
        for (index_t i = 0; i < len_q; ++i) {
          for (index_t j = 0; j < len_k; ++j, ++n) {
            full.data[n] = small.view()(b % eb, h % eh, i % ei, j);
            full_keep[n] = full.data[n] > -0.5f;
          }
        }
      }
    }
    for (const Regime regime : kRegimes) {
      AttentionOptions one, other;
      one.regime = other.regime = regime;
      one.bias = small.view();
      other.bias = full.view();
      CHECK(same_bits(attend(x, one), attend(x, other)));
      one.bias = other.bias = {};
      one.keep = {small_keep.data(), small.view().extent, small.view().stride};
      other.keep = {full_keep.data(), full.view().extent, full.view().stride};
      CHECK(same_bits(attend(x, one), attend(x, other)));
    }
  }
}
