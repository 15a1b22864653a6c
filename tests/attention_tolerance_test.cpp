// SPDX-License-Identifier: Apache-2.0
// Is the error budget honest? A plain fp32 loop must fit into it, and the bugs it exists to find must not.
#include <cmath>
#include <functional>
#include <string>

#include "support/dense.hpp"
#include "support/problem.hpp"

namespace {

using namespace test;

// Textbook attention in fp32, nothing else: how much error honest single precision makes.
Result plain_fp32(const Dense& x, const AttentionOptions& options) {
  Result r = unwritten(x.q.view(), x.v.view());
  const float scale = 1 / std::sqrt(static_cast<float>(x.q.dim));
  for (index_t h = 0; h < x.q.heads; ++h) {
    for (index_t i = 0; i < x.q.len; ++i) {
      std::vector<float> scores, out(static_cast<std::size_t>(x.v.dim), 0.f);
      float max = -kInfinity, sum = 0;
      const index_t kv_head = h / (x.q.heads / x.k.heads);
      const index_t end = options.causal == Causal::top_left ? std::min(i + 1, x.k.len) : x.k.len;
      for (index_t j = 0; j < end; ++j) {
        float dot = 0;
        for (index_t d = 0; d < x.q.dim; ++d) dot += x.q.view()(0, h, i, d) * x.k.view()(0, kv_head, j, d);
        float score = dot * scale;
        if (options.softcap > 0) score = options.softcap * std::tanh(score / options.softcap);
        scores.push_back(score);
        max = std::max(max, score);
      }
      for (index_t j = 0; j < end; ++j) {
        const float weight = std::exp(scores[static_cast<std::size_t>(j)] - max);
        sum += weight;
        for (index_t d = 0; d < x.v.dim; ++d) out[static_cast<std::size_t>(d)] += weight * x.v.view()(0, kv_head, j, d);
      }
      for (index_t d = 0; d < x.v.dim; ++d) r.out.view()(0, h, i, d) = out[static_cast<std::size_t>(d)] / sum;
      r.lse_view()(0, h, i) = max + std::log(sum);
    }
  }
  return r;
}

// Largest distance, in budgets of `truth`, of the reference run with something wrong.
double far_off(const Dense& x, const AttentionOptions& truth, const Dense& y, const AttentionOptions& wrong) {
  const Expected e = expect(x.q.view(), x.k.view(), x.v.view(), truth),
                 f = expect(y.q.view(), y.k.view(), y.v.view(), wrong);
  double worst = 0;
  for (std::size_t n = 0; n < e.out.size(); ++n) worst = std::max(worst, in_budgets(f.out[n], e.out[n], e.out_error[n]));
  return worst;
}

}  // namespace

TEST_CASE("a plain fp32 loop stays inside the budget and uses a visible part of it", "[tolerance]") {
  double most = 0;
  for (const index_t dim : {1, 8, 64, 128, 576}) {
    for (const index_t len_k : {1, 7, 64, 300}) {
      for (const float softcap : {0.f, 2.f}) {
        const Dense x(61, 1, 2, 1, 6, len_k, dim, 16);
        AttentionOptions options;
        options.softcap = softcap;
        options.causal = len_k == 7 ? Causal::top_left : Causal::none;
        const double used = distance(plain_fp32(x, options), expect(x.q.view(), x.k.view(), x.v.view(), options));
        INFO("dim " << dim << ", " << len_k << " keys, softcap " << softcap << ": " << used << " budgets");
        CHECK(used <= 1);
        CHECK(used > 1e-4);
        most = std::max(most, used);
      }
    }
  }
  // The budget adds roundings as if all had one sign; real ones cancel like the square root of their number.
  INFO("the worst case uses " << most << " of its budget");
  CHECK(most > 0.02);
}

TEST_CASE("bugs are far outside the budget", "[tolerance]") {
  for (const index_t len_k : {20, 257, 513}) {
    for (const index_t dim : {16, 64, 128}) {
      const Dense x(62, 1, 4, 2, 9, len_k, dim, 32);
      const std::vector<float> slopes{0.5f, 0.25f, 0.125f, 0.0625f}, flipped{-0.5f, -0.25f, -0.125f, -0.0625f};
      const std::vector<float> other_slopes{0.25f, 0.5f, 0.0625f, 0.125f}, sinks{1.f, 2.f, 0.f, 1.5f},
          other_sinks{2.f, 1.f, 1.5f, 0.f};
      const auto with = [](auto change) {
        AttentionOptions options;
        options.causal = Causal::bottom_right;
        change(options);
        return options;
      };
      const AttentionOptions causal = with([](AttentionOptions&) {});
      const index_t span = len_k / 2;
      const std::vector<index_t> one_late{len_k - 9 + 1}, one_early{len_k - 9 - 1}, short_by_one{len_k - 1};
      INFO(len_k << " keys, dim " << dim);
      // Off by one everywhere it is usual.
      CHECK(far_off(x, with([&](auto& o) {
                      o.window = {span, 0};
                    }),
                    x, with([&](auto& o) {
                      o.window = {span - 1, 0};
                    })) > 30);
      CHECK(far_off(x, with([&](auto& o) {
                      o.window = {span, 0};
                    }),
                    x, with([&](auto& o) {
                      o.window = {span + 1, 0};
                    })) > 30);
      CHECK(far_off(x, causal, x, with([&](auto& o) { o.q_offset = one_late; })) > 30);
      CHECK(far_off(x, causal, x, with([&](auto& o) { o.q_offset = one_early; })) > 30);
      CHECK(far_off(x, {}, x, [&] {
              AttentionOptions o;
              o.len_k = short_by_one;
              return o;
            }()) > 30);
      // A key read twice instead of its neighbour, a value row off by one.
      Dense stuck = x, shifted = x;
      for (index_t d = 0; d < dim; ++d) stuck.k.view()(0, 0, len_k - 10, d) = x.k.view()(0, 0, len_k - 11, d);
      for (index_t d = 0; d < 32; ++d) shifted.v.view()(0, 1, len_k / 2, d) = x.v.view()(0, 1, len_k / 2 - 1, d);
      CHECK(far_off(x, causal, stuck, causal) > 30);
      CHECK(far_off(x, causal, shifted, causal) > 30);
      // The last feature of the queries forgotten (a vector tail).
      Dense cut_tail = x;
      for (index_t h = 0; h < 4; ++h) {
        for (index_t i = 0; i < 9; ++i) cut_tail.q.view()(0, h, i, dim - 1) = 0;
      }
      CHECK(far_off(x, causal, cut_tail, causal) > 30);
      // Options ignored or mixed up; a sink of logit 1 among 500 keys is a small thing, hence the lower bar.
      CHECK(far_off(x, with([](auto& o) { o.softcap = 5; }), x, causal) > 5);
      CHECK(far_off(x, with([&](auto& o) { o.alibi_slopes = slopes; }), x,
                    with([&](auto& o) { o.alibi_slopes = flipped; })) > 5);
      CHECK(far_off(x, with([&](auto& o) { o.alibi_slopes = slopes; }), x,
                    with([&](auto& o) { o.alibi_slopes = other_slopes; })) > 5);
      CHECK(far_off(x, with([&](auto& o) { o.sink = sinks; }), x, with([&](auto& o) { o.sink = other_sinks; })) > 5);
      CHECK(far_off(x, with([&](auto& o) { o.sink = sinks; }), x, causal) > 5);
      CHECK(far_off(x, causal, x, with([&](auto& o) { o.scale = 1 / std::sqrt(static_cast<float>(dim + 1)); })) > 5);
      // Values cut to bf16 (8 bits) on the way.
      Dense rounded = x;
      for (float& value : rounded.v.data) value = std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) & 0xffff0000u);
      CHECK(far_off(x, causal, rounded, causal) > 5);
    }
  }
}

TEST_CASE("the reference reads no masked key and no masked value", "[tolerance][reference]") {
  Dense x(63, 1, 2, 1, 4, 10, 8, 8);
  AttentionOptions options;
  options.causal = Causal::top_left;
  const Expected clean = expect(x.q.view(), x.k.view(), x.v.view(), options);
  for (index_t j = 4; j < 10; ++j) {
    for (index_t d = 0; d < 8; ++d) x.k.view()(0, 0, j, d) = kNan, x.v.view()(0, 0, j, d) = kInfinity;
  }
  const Expected dirty = expect(x.q.view(), x.k.view(), x.v.view(), options);
  CHECK(clean.out == dirty.out);
  CHECK(clean.lse == dirty.lse);
}

TEST_CASE("the reference's rows sum to one and rebuild its output", "[tolerance][reference]") {
  const Dense x(64, 2, 4, 2, 5, 30, 8, 6);
  const std::vector<float> sinks{0.f, 1.f, 2.f, -1.f};
  for (const bool with_sink : {false, true}) {
    AttentionOptions options;
    options.causal = Causal::bottom_right;
    options.softcap = 4;
    if (with_sink) options.sink = sinks;
    std::vector<double> out(2 * 4 * 5 * 6);
    const auto view = fovea::bhsd(out.data(), 2, 4, 5, 6);
    int rows = 0;
    fovea::reference::softmax(
        x.q.view(), x.k.view(), x.v.view(), view, options, {}, [&](const fovea::reference::SoftmaxRow& row) {
          ++rows;
          double sum = with_sink ? std::exp(row.sink - row.lse) : 0, value = 0;
          for (const auto& term : row.terms) {
            CHECK(term.weight == Catch::Approx(std::exp(term.score - row.lse)).epsilon(1e-12));
            sum += term.weight;
            value += term.weight * double{x.v.view()(row.batch, row.q_head / 2, term.key, 3)};
          }
          CHECK(sum == Catch::Approx(1).epsilon(1e-12));
          CHECK(view(row.batch, row.q_head, row.pos_q, 3) == Catch::Approx(value).epsilon(1e-12).margin(1e-15));
        });
    CHECK(rows == 2 * 4 * 5);
  }
}
