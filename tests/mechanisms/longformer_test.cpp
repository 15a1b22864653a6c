// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/longformer.hpp"

#include "fovea/reference/longformer.hpp"
#include "pattern_support.hpp"

namespace {

using namespace test;
using fovea::LongformerInputs;
using Kinds = std::vector<std::int8_t>;

struct Case {
  Dense local, global;
  Kinds kinds;   // [batch, pos]
  index_t window;

  Case(std::uint64_t seed, index_t batch, index_t q_heads, index_t kv_heads, index_t len, index_t wide)
      : local(seed, batch, q_heads, kv_heads, len, len, 8, 12),
        global(seed + 10, batch, q_heads, kv_heads, len, len, 8, 12),
        kinds(static_cast<std::size_t>(batch * len), 0),
        window(wide) {}
  index_t len() const { return local.q.len; }
  std::int8_t& kind(index_t b, index_t t) { return kinds[static_cast<std::size_t>(b * len() + t)]; }
  int kind(index_t b, index_t t) const { return kinds[static_cast<std::size_t>(b * len() + t)]; }
  View<const std::int8_t, 2> view() const { return {kinds.data(), {local.q.batch, len()}, {len(), 1}}; }
  LongformerInputs inputs() const {
    return {local.q.view(), local.k.view(), local.v.view(), global.q.view(), global.k.view(), global.v.view()};
  }
};

fovea::Status call(const LongformerInputs& x, const View<const std::int8_t, 2>& kinds, index_t window, Tensor<float> out,
                   const AttentionOptions& options) {
  return fovea::longformer_attention<fovea::Formats<fovea::Format::f32>>(x, kinds, window, out, options);
}
Result run(const Case& c, AttentionOptions options = {}) {
  Result r = unwritten(c.local.q.view(), c.local.v.view());
  options.lse = r.lse_view();
  const fovea::Status status = call(c.inputs(), c.view(), c.window, r.out.view(), options);
  INFO(status.message());
  REQUIRE(status.ok());
  return r;
}

// The budgets of both kinds of rows.
Expected want_of(const Case& c) {
  const Sees local = [&](index_t b, index_t, index_t t, index_t s) {
    return c.kind(b, t) == 0 && (c.kind(b, s) > 0 || (c.kind(b, s) == 0 && t - s <= c.window && s - t <= c.window));
  };
  const Sees global = [&](index_t b, index_t, index_t t, index_t s) { return c.kind(b, t) > 0 && c.kind(b, s) >= 0; };
  Expected e = expect_seen(c.local, {}, local);
  const Expected g = expect_seen(c.global, {}, global);
  for (std::size_t row = 0; row < e.lse.size(); ++row) {
    const auto b = static_cast<index_t>(row) / (c.local.q.heads * c.len()), t = static_cast<index_t>(row) % c.len();
    if (c.kind(b, t) <= 0) continue;
    e.lse[row] = g.lse[row];
    e.lse_error[row] = g.lse_error[row];
    for (std::size_t d = 0; d < 12; ++d) {
      e.out[row * 12 + d] = g.out[row * 12 + d];
      e.out_error[row * 12 + d] = g.out_error[row * 12 + d];
    }
  }
  return e;
}

// Padding, and what only rows of the other kind could read, is NaN.
Case poisoned(Case c) {
  const auto fill = [](Values& x, index_t b, index_t t) {
    for (index_t h = 0; h < x.heads; ++h) {
      for (index_t d = 0; d < x.dim; ++d) x.view()(b, h, t, d) = kNan;
    }
  };
  for (index_t b = 0; b < c.local.q.batch; ++b) {
    bool any = false;
    for (index_t t = 0; t < c.len(); ++t) any = any || c.kind(b, t) > 0;
    for (index_t t = 0; t < c.len(); ++t) {
      if (c.kind(b, t) != 0) fill(c.local.q, b, t);
      if (c.kind(b, t) <= 0) fill(c.global.q, b, t);
      if (c.kind(b, t) < 0) fill(c.local.k, b, t), fill(c.local.v, b, t);
      if (c.kind(b, t) < 0 || !any) fill(c.global.k, b, t), fill(c.global.v, b, t);
    }
  }
  return c;
}

void check_case(const Case& c, const std::string& what) {
  INFO(what);
  const Expected want = want_of(c);
  std::vector<double> out(want.out.size()), lse(want.lse.size());
  fovea::reference::longformer(
      c.local.q.view(), c.local.k.view(), c.local.v.view(), c.global.q.view(), c.global.k.view(), c.global.v.view(),
      c.view(), c.window, fovea::bhsd(out.data(), c.local.q.batch, c.local.q.heads, c.len(), 12), {},
      {lse.data(), {c.local.q.batch, c.local.q.heads, c.len()}, {c.local.q.heads * c.len(), c.len(), 1}});
  for (std::size_t n = 0; n < out.size(); ++n) CHECK(in_budgets(out[n], want.out[n], 1e-12) <= 1);
  for (std::size_t n = 0; n < lse.size(); ++n) CHECK(in_budgets(lse[n], want.lse[n], 1e-12) <= 1);
  const Result serial = run(poisoned(c));
  CHECK(distance(serial, want) <= 1);
  CHECK(same_bits(serial, run(c)));
  ThreadPerLane threads;
  AttentionOptions options;
  options.executor = {threads, 3};
  CHECK(same_bits(serial, run(c, options)));
}

}   // namespace

TEST_CASE("longformer: against the reference", "[longformer]") {
  for (const index_t window : {0, 3, 20, 500}) {
    for (const index_t len : {index_t{1}, index_t{29}, index_t{150}}) {
      Case c(600, 2, 4, 2, len, window);
      const std::string what = "window " + std::to_string(window) + ", len " + std::to_string(len);
      check_case(c, what + ", all local");
      c.kind(0, 0) = 1;
      if (len > 1) {
        c.kind(0, len / 2) = 1, c.kind(0, len - 2) = 2;
        for (index_t t = len - 5; t < len; ++t) c.kind(1, t) = -1;
        c.kind(1, 3) = 1, c.kind(1, 4) = 1;
      }
      check_case(c, what + ", global tokens and padding");
    }
  }
}

TEST_CASE("longformer: sequences without a local token, or without any", "[longformer]") {
  Case c(610, 3, 2, 2, 70, 4);
  for (index_t t = 0; t < 70; ++t) c.kind(0, t) = 1, c.kind(1, t) = -1, c.kind(2, t) = t < 66 ? -1 : 0;
  check_case(c, "all global, all padding, all but four padding");
  // All global: dense attention with the global projections.
  const Result r = run(c);
  const Expected dense = expect(c.global.q.view(), c.global.k.view(), c.global.v.view(), {});
  double worst = 0;
  for (std::size_t n = 0; n < static_cast<std::size_t>(2 * 70 * 12); ++n)
    worst = std::max(worst, in_budgets(double{r.out.data[n]}, dense.out[n], dense.out_error[n]));
  CHECK(worst <= 1);
  for (index_t h = 0; h < 2; ++h) {
    for (index_t d = 0; d < 12; ++d) CHECK(r.at(1, h, 5, d) == 0.f);
    CHECK(r.lse_at(1, h, 5) == -kInfinity);
  }
}

TEST_CASE("longformer: without global tokens a window, wide enough dense", "[longformer]") {
  Case c(620, 1, 4, 2, 90, 7);
  AttentionOptions window;
  window.window = {7, 7};
  CHECK(distance(run(c), expect(c.local.q.view(), c.local.k.view(), c.local.v.view(), window)) <= 1);
  c.window = 90;
  CHECK(distance(run(c), expect(c.local.q.view(), c.local.k.view(), c.local.v.view(), {})) <= 1);
  // The global projections are not read: they need not be there.
  LongformerInputs inputs = c.inputs();
  inputs.q_global = inputs.k_global = inputs.v_global = {};
  Result r = unwritten(c.local.q.view(), c.local.v.view());
  AttentionOptions options;
  options.lse = r.lse_view();
  REQUIRE(call(inputs, c.view(), 90, r.out.view(), options).ok());
  CHECK(same_bits(r, run(c)));
}

TEST_CASE("longformer: a global key inside the window counts once", "[longformer]") {
  Case c(630, 1, 1, 1, 9, 2);
  std::fill(c.local.q.data.begin(), c.local.q.data.end(), 0.f);
  c.kind(0, 3) = 1;
  const Result r = run(c);
  // Token 4 sees 2, 4, 5, 6 and the global 3; token 8 sees 6, 7, 8 and 3.
  CHECK(r.lse_at(0, 0, 4) == Catch::Approx(std::log(5.)).margin(1e-6));
  CHECK(r.lse_at(0, 0, 8) == Catch::Approx(std::log(4.)).margin(1e-6));
}

TEST_CASE("longformer: a result of another format, and no LSE", "[longformer]") {
  Case c(640, 2, 4, 2, 40, 5);
  c.kind(0, 0) = 1, c.kind(1, 7) = 1, c.kind(1, 39) = -1;
  const Result want = run(c);
  std::vector<double> wide(want.out.data.size(), kNan);
  REQUIRE(fovea::longformer_attention<fovea::Formats<fovea::Format::f32>>(c.inputs(), c.view(), 5,
                                                                          fovea::bshd(wide.data(), 2, 40, 4, 12))
              .ok());
  const Tensor<double> out = fovea::bshd(wide.data(), 2, 40, 4, 12);
  bool same = true;
  for (index_t b = 0; b < 2; ++b) {
    for (index_t h = 0; h < 4; ++h) {
      for (index_t t = 0; t < 40; ++t) {
        for (index_t d = 0; d < 12; ++d) same = same && out(b, h, t, d) == double{want.at(b, h, t, d)};
      }
    }
  }
  CHECK(same);
}

TEST_CASE("longformer: refusals write nothing", "[longformer][errors]") {
  Case c(650, 1, 2, 2, 12, 3);
  c.kind(0, 0) = 1;
  Result r = unwritten(c.local.q.view(), c.local.v.view());
  const auto with = [&](const LongformerInputs& x, const View<const std::int8_t, 2>& kinds, index_t window,
                        AttentionOptions options = {}) {
    options.lse = r.lse_view();
    return [&r, x, kinds, window, options] { return call(x, kinds, window, r.out.view(), options); };
  };
  check_refused(r, "window -1", with(c.inputs(), c.view(), -1));
  View<const std::int8_t, 2> kinds = c.view();
  kinds.extent[1] = 11;
  check_refused(r, "kind is [1, 11], must be [1, 12]", with(c.inputs(), kinds, 3));
  AttentionOptions causal;
  causal.causal = Causal::top_left;
  check_refused(r, "bidirectional", with(c.inputs(), c.view(), 3, causal));
  LongformerInputs x = c.inputs();
  x.k = only_pos(c.local.k.view(), 0, 11), x.v = only_pos(c.local.v.view(), 0, 11);
  check_refused(r, "q has 12 positions, k has 11", with(x, c.view(), 3));
  x = c.inputs();
  x.q_global = {};
  check_refused(r, "q_global is [0, 0, 0, 0]", with(x, c.view(), 3));
  x = c.inputs();
  x.k_global.data = nullptr;
  check_refused(r, "null data", with(x, c.view(), 3));
  std::vector<double> wide(c.local.k.data.size());
  x = c.inputs();
  x.k_global = fovea::bhsd<const double>(wide.data(), 1, 2, 12, 8);
  check_refused(r, "k_global and v_global are f64", with(x, c.view(), 3));
  x = c.inputs();
  x.v_global = fovea::bhsd<const float>(r.out.data.data(), 1, 2, 12, 12);
  check_refused(r, "overlaps", with(x, c.view(), 3));
}
