// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/head_mixtures.hpp"

#include "around_softmax.hpp"
#include "fovea/core/convert.hpp"
#include "fovea/modules/switch_head_block.hpp"
#include "fovea/reference/head_mixtures.hpp"

namespace {

using namespace test;
using fovea::ExpertRoutes;
using fovea::Operand;

// One weight in `of` is not 0.
Values weights(const Dense& x, index_t of) {
  Values w(x.q.batch, x.q.heads, x.q.len, 1);
  Random random(141);
  for (float& value : w.data) value = random.one_in(of) ? random.uniform(0.1f, 2.f) : 0.f;
  return w;
}
View<const float, 3> rows_of(const Values& w) {
  return {w.data.data(), {w.batch, w.heads, w.len}, {w.heads * w.len, w.len, 1}};
}

Run run_with(index_t of) {
  return [of](const Dense& x, const AttentionOptions& options) {
    const Values w = weights(x, of);
    Result r = unwritten(x.q.view(), x.v.view());
    AttentionOptions with_lse = options;
    with_lse.lse = r.lse_view();
    const fovea::Status status =
        fovea::head_mixture_attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), rows_of(w), with_lse);
    INFO(status.message());
    REQUIRE(status.ok());
    return r;
  };
}
Ask ask_with(index_t of) {
  return [of](const Dense& x, const AttentionOptions& options) {
    const Values w = weights(x, of);
    Expected e = expect(x.q.view(), x.k.view(), x.v.view(), options);
    fovea::reference::head_mixtures(x.q.view(), x.k.view(), x.v.view(),
                                    fovea::bhsd(e.out.data(), x.q.batch, x.q.heads, x.q.len, x.v.dim), rows_of(w), options);
    for (std::size_t n = 0; n < e.out.size(); ++n) {
      const double weight = double{w.data[n / static_cast<std::size_t>(x.v.dim)]};
      e.out_error[n] = weight * e.out_error[n] + kUnit * std::abs(e.out[n]);
    }
    for (std::size_t row = 0; row < e.lse.size(); ++row) {
      if (w.data[row] != 0.f) continue;
      e.lse[row] = -double{kInfinity};
      e.lse_error[row] = 0;
    }
    return e;
  };
}

// Random experts and weights, [batch, head, pos, slot]; experts of a token differ where there are enough.
struct Routes {
  index_t batch, heads, len, slots;
  std::vector<index_t> experts;
  std::vector<float> weights;

  Routes(std::uint64_t seed, index_t batch_, index_t heads_, index_t len_, index_t slots_, index_t count)
      : batch(batch_), heads(heads_), len(len_), slots(slots_) {
    Random random(seed);
    for (index_t row = 0; row < batch * heads * len; ++row) {
      const index_t first = random.between(0, count - 1);
      for (index_t slot = 0; slot < slots; ++slot) {
        experts.push_back((first + slot) % count);
        weights.push_back(random.uniform(0.f, 1.f));
      }
    }
  }
  template <class T>
  View<const T, 4> view(const std::vector<T>& numbers) const {
    return {numbers.data(), {batch, heads, len, slots}, {heads * len * slots, len * slots, slots, 1}};
  }
  ExpertRoutes view() const { return {view(experts), view(weights)}; }
};

std::vector<float> mixed(const Operand& a, const Operand& weights, const ExpertRoutes& routes, index_t out_heads,
                         const fovea::Executor& executor = {}) {
  const auto& extent = routes.experts.extent;
  Values out(extent[0], out_heads, extent[2], weights.extent[3], canary());
  PoisonedBytes workspace(fovea::expert_mixture_bytes(extent[0] * extent[2], executor.lanes()), 3);
  const fovea::Status status = fovea::expert_mixture(a, weights, routes, out.view(), workspace.bytes(), executor);
  INFO(status.message());
  REQUIRE(status.ok());
  CHECK(workspace.guards_intact());
  return out.data;
}

// Element by element in double, in budgets: a product sums `input` terms, is weighed and added to those of the other slots
// and heads.
double worst_mixture(const std::vector<float>& got, const Values& a, const Values& weights, const Routes& routes,
                     index_t out_heads) {
  const index_t columns = weights.dim, input = weights.len;
  double worst = 0;
  for (index_t b = 0; b < routes.batch; ++b) {
    for (index_t to = 0; to < out_heads; ++to) {
      for (index_t i = 0; i < routes.len; ++i) {
        for (index_t n = 0; n < columns; ++n) {
          double sum = 0, size = 0, terms = 0;
          for (index_t h = 0; h < routes.heads; ++h) {
            if (out_heads > 1 && h != to) continue;
            for (index_t slot = 0; slot < routes.slots; ++slot, ++terms) {
              const index_t expert = routes.view().experts(b, h, i, slot);
              const double weight = routes.view().weights(b, h, i, slot);
              if (weight == 0) continue;
              for (index_t d = 0; d < input; ++d) {
                const double product = weight * double{a.view()(b, a.heads == 1 ? 0 : h, i, d)} *
                                       double{weights.view()(weights.batch == 1 ? 0 : h, expert, d, n)};
                sum += product;
                size += std::abs(product);
              }
            }
          }
          const auto at = static_cast<std::size_t>(((b * out_heads + to) * routes.len + i) * columns + n);
          worst = std::max(worst, in_budgets(double{got[at]}, sum, kUnit * (static_cast<double>(input) + terms + 3) * size));
        }
      }
    }
  }
  return worst;
}

struct SwitchHead {
  index_t model, heads, experts, active, dim_qk, dim_v;
  Values q, k, v_router, o_router, v, o;
  fovea::SwitchHeadBlock block;

  SwitchHead(std::uint64_t seed, index_t model_, index_t heads_, index_t experts_, index_t active_, index_t dim_qk_,
             index_t dim_v_)
      : model(model_),
        heads(heads_),
        experts(experts_),
        active(active_),
        dim_qk(dim_qk_),
        dim_v(dim_v_),
        q(weights(seed, 1, 1, heads * dim_qk, model, model)),
        k(weights(seed + 1, 1, 1, heads * dim_qk, model, model)),
        v_router(weights(seed + 2, 1, 1, heads * experts, model, model)),
        o_router(weights(seed + 3, 1, 1, heads * experts, model, model)),
        v(weights(seed + 4, heads, experts, model, dim_v, model)),
        o(weights(seed + 5, heads, experts, dim_v, model, heads * dim_v)) {
    bind();
  }
  SwitchHead(const SwitchHead&) = delete;
  void bind() {
    const auto view = [](const Values& values) { return values.view(); };
    block = {
        model, heads, experts, active, dim_qk, dim_v, {view(q), view(k), view(v_router), view(o_router), view(v), view(o)}};
  }
  fovea::reference::SwitchHeadMatrices exact() const {
    return {heads, experts, active, q.view(), k.view(), v_router.view(), o_router.view(), v.view(), o.view()};
  }
  // Sums of squares of 1.
  static Values weights(std::uint64_t seed, index_t batch, index_t heads, index_t rows, index_t columns, index_t summed) {
    Values w = random_values(seed, batch, heads, rows, columns);
    for (float& value : w.data) value /= std::sqrt(static_cast<float>(summed));
    return w;
  }
};

const auto kBareAttention = [](const Tensor<float>& q, const Tensor<float>& k, const Tensor<float>& v,
                               const Tensor<float>& out,
                               const AttentionOptions& options) { return fovea::attention(q, k, v, out, options); };

template <class Attend>
std::vector<float> layer(const SwitchHead& w, const Values& x, const Attend& attend, const AttentionOptions& options) {
  Values y(x.batch, 1, x.len, x.dim, canary());
  PoisonedBytes workspace(fovea::switch_head_block_bytes(w.block, x.batch * x.len, options.executor.lanes()), 3);
  const fovea::Status status = fovea::switch_head_block(w.block, x.view(), attend, y.view(), options, workspace.bytes());
  INFO(status.message());
  REQUIRE(status.ok());
  CHECK(workspace.guards_intact());
  return y.data;
}

}   // namespace

TEST_CASE("head_mixtures: against the reference", "[head_mixtures]") {
  for (const index_t of : {2, 15}) check_around_softmax(run_with(of), ask_with(of), {{4, 2}, {2, 2}, {6, 1}});
}

TEST_CASE("head_mixtures: weights of one are plain attention", "[head_mixtures]") {
  const Dense x(142, 2, 4, 2, 17, 40, 16, 20);
  const Values ones(2, 4, 17, 1, 1.f);
  for (const Regime regime : kRegimes) {
    Result r = unwritten(x.q.view(), x.v.view());
    AttentionOptions options;
    options.causal = Causal::bottom_right;
    options.regime = regime;
    const Result want = attend(x, options);
    options.lse = r.lse_view();
    REQUIRE(fovea::attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), options, fovea::head_mixture(rows_of(ones)))
                .ok());
    CHECK(same_bits(r, want));
  }
}

TEST_CASE("head_mixtures: heads that are not chosen leave no trace", "[head_mixtures]") {
  // Heads 0 and 1 share kv head 0, nobody chose it: its NaN is not seen. Row 3 of head 2 is not chosen either, its
  // neighbours are.
  Dense x(143, 1, 4, 2, 30, 40, 16, 20);
  Values w(1, 4, 30, 1, 0.5f);
  for (index_t i = 0; i < 30; ++i) w.view()(0, 0, i, 0) = w.view()(0, 1, i, 0) = 0.f;
  w.view()(0, 2, 3, 0) = 0.f;
  for (index_t j = 0; j < 40; ++j) {
    for (index_t d = 0; d < 16; ++d) x.k.view()(0, 0, j, d) = x.v.view()(0, 0, j, d) = kNan;
  }
  x.k.view()(0, 1, 7, 0) = kNan;
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    Result r = unwritten(x.q.view(), x.v.view());
    REQUIRE(fovea::head_mixture_attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), rows_of(w), options).ok());
    bool closed = true, seen = true;
    for (index_t i = 0; i < 30; ++i) {
      for (index_t d = 0; d < 20; ++d) {
        closed = closed && r.at(0, 0, i, d) == 0 && r.at(0, 1, i, d) == 0 && r.at(0, 2, 3, d) == 0;
        seen = seen && (i == 3 || std::isnan(r.at(0, 2, i, d))) && std::isnan(r.at(0, 3, i, d));
      }
    }
    INFO("regime " << name(regime));
    CHECK(closed);
    CHECK(seen);
  }
}

TEST_CASE("head_mixtures: MoA's slots are its experts", "[head_mixtures]") {
  constexpr index_t kExperts = 6, kSlots = 2, kLen = 19, kDim = 16;
  const Dense x(144, 1, kExperts, 1, kLen, kLen, kDim, kDim);   // the queries of every expert
  Values slots(1, kSlots, kLen, kDim), w(1, kSlots, kLen, 1);
  std::vector<std::array<index_t, kSlots>> chosen(static_cast<std::size_t>(kLen));
  Random random(145);
  for (index_t i = 0; i < kLen; ++i) {
    std::array<float, kExperts> logits{};
    std::array<float, kSlots> token{};
    for (float& logit : logits) logit = random.normal();
    REQUIRE(fovea::moa_route(logits, chosen[static_cast<std::size_t>(i)], token).ok());
    for (index_t s = 0; s < kSlots; ++s) {
      const index_t expert = chosen[static_cast<std::size_t>(i)][static_cast<std::size_t>(s)];
      w.view()(0, s, i, 0) = token[static_cast<std::size_t>(s)];
      for (index_t d = 0; d < kDim; ++d) slots.view()(0, s, i, d) = x.q.view()(0, expert, i, d);
    }
  }
  AttentionOptions options;
  options.causal = Causal::bottom_right;
  options.regime = Regime::prefill;
  const Result all = attend(x, options);
  Result r = unwritten(std::as_const(slots).view(), x.v.view());
  REQUIRE(
      fovea::head_mixture_attention(std::as_const(slots).view(), x.k.view(), x.v.view(), r.out.view(), rows_of(w), options)
          .ok());
  bool equal = true;
  for (index_t i = 0; i < kLen; ++i) {
    for (index_t s = 0; s < kSlots; ++s) {
      const index_t expert = chosen[static_cast<std::size_t>(i)][static_cast<std::size_t>(s)];
      for (index_t d = 0; d < kDim; ++d) equal = equal && r.at(0, s, i, d) == w.view()(0, s, i, 0) * all.at(0, expert, i, d);
    }
  }
  CHECK(equal);
}

TEST_CASE("head_mixtures: routers", "[head_mixtures]") {
  const std::vector<float> logits{0.f, 2.f, 1.f, 2.f, -kInfinity};
  std::vector<index_t> experts(3);
  std::vector<float> w(3);
  REQUIRE(fovea::moa_route(logits, experts, w).ok());
  CHECK(experts == std::vector<index_t>{1, 3, 2});
  const double total = 2 + std::exp(-1.);
  CHECK(w[0] == Catch::Approx(1 / total));
  CHECK(w[1] == Catch::Approx(1 / total));
  CHECK(w[2] == Catch::Approx(std::exp(-1.) / total));
  // Not chosen experts do not matter, and all of them are a softmax.
  std::vector<index_t> all(5);
  std::vector<float> shares(5);
  REQUIRE(fovea::moa_route(logits, all, shares).ok());
  CHECK(shares[0] == Catch::Approx(std::exp(2.) / (1 + 2 * std::exp(2.) + std::exp(1.))));
  CHECK(shares[4] == 0.f);
  CHECK(!fovea::moa_route(logits, std::span(all).first(3), std::span(shares).first(2)).ok());
  CHECK(!fovea::moa_route(std::span(logits).first(2), experts, w).ok());

  const std::vector<float> shared{0.f, 0.f}, kinds{1.f, 1.f};
  std::vector<float> heads(7);
  REQUIRE(fovea::moh_route(shared, logits, kinds, 2, heads).ok());
  // Equal shared heads, equal kinds, two equal winners: everything is 1, the losers 0.
  const std::vector<float> want{1.f, 1.f, 0.f, 1.f, 0.f, 1.f, 0.f};
  for (std::size_t h = 0; h < want.size(); ++h) CHECK(heads[h] == Catch::Approx(want[h]));
  const std::vector<float> unequal{1.f, 0.f}, lean{std::log(3.f), 0.f};
  REQUIRE(fovea::moh_route(unequal, logits, lean, 3, heads).ok());
  CHECK(heads[0] == Catch::Approx(2 * 0.75 * 2 * 0.7310586));
  CHECK(heads[1] == Catch::Approx(2 * 0.75 * 2 * 0.2689414));
  CHECK(heads[3] == Catch::Approx(2 * 0.25 * 3 / total));
  CHECK(heads[4] == Catch::Approx(2 * 0.25 * 3 * std::exp(-1.) / total));
  CHECK(heads[2] == 0.f);
  std::vector<float> routed(5);
  REQUIRE(fovea::moh_route({}, logits, {}, 1, routed).ok());
  CHECK(routed == std::vector<float>{0.f, 1.f, 0.f, 0.f, 0.f});
  CHECK(!fovea::moh_route(shared, logits, {}, 2, heads).ok());
  CHECK(!fovea::moh_route(shared, logits, kinds, 6, heads).ok());
}

TEST_CASE("head_mixtures: routers against the reference", "[head_mixtures]") {
  Random random(147);
  // Roundings to fp32, beside which those of doubles are nothing; weights that small are subnormal or 0.
  const auto close = [](float got, double want, int roundings) {
    return std::abs(double{got} - want) <= (roundings + 0.01) * kUnit * std::abs(want) + 1e-38;
  };
  for (int n = 0; n < 200; ++n) {
    const index_t of = random.between(1, 9), chosen = random.between(1, of);
    const auto count = static_cast<std::size_t>(of), top = static_cast<std::size_t>(chosen);
    std::vector<float> logits(count), shared(static_cast<std::size_t>(random.between(0, 3)));
    // Some logits are equal, a few saturate.
    for (float& logit : logits) logit = random.one_in(3) ? static_cast<float>(random.between(-2, 2)) : 6 * random.normal();
    for (float& logit : shared) logit = random.normal();
    if (random.one_in(4)) logits[0] = random.one_in(2) ? 200.f : -200.f;
    const std::vector<double> exact(logits.begin(), logits.end());
    std::vector<index_t> experts(top);
    std::vector<float> weights(top);
    bool equal = true;
    REQUIRE(fovea::moa_route(logits, experts, weights).ok());
    const auto moa = fovea::reference::moa_route(exact, top);
    for (std::size_t s = 0; s < top; ++s)
      equal = equal && experts[s] == static_cast<index_t>(moa[s].expert) && close(weights[s], moa[s].weight, 2);
    CHECK(equal);
    REQUIRE(fovea::switch_head_route(logits, experts, weights).ok());
    const auto switched = fovea::reference::switch_head_route(exact, top);
    for (std::size_t s = 0; s < top; ++s)
      equal = equal && experts[s] == static_cast<index_t>(switched[s].expert) && close(weights[s], switched[s].weight, 1);
    CHECK(equal);
    std::vector<float> kinds, heads(shared.size() + count);
    if (!shared.empty()) kinds = {random.normal(), random.normal()};
    REQUIRE(fovea::moh_route(shared, logits, kinds, chosen, heads).ok());
    const auto moh = fovea::reference::moh_route({shared.begin(), shared.end()}, exact, {kinds.begin(), kinds.end()}, top);
    for (std::size_t h = 0; h < heads.size(); ++h) equal = equal && close(heads[h], moh[h], 2);
    CHECK(equal);
  }

  const std::vector<float> logits{0.f, kInfinity, -kInfinity, 0.f, std::log(3.f)};
  std::vector<index_t> experts(5);
  std::vector<float> w(5);
  REQUIRE(fovea::switch_head_route(logits, experts, w).ok());
  CHECK(experts == std::vector<index_t>{1, 4, 0, 3, 2});
  CHECK(w == std::vector<float>{1.f, 0.75f, 0.5f, 0.5f, 0.f});
  // Sigmoids of 40 and 50 are both 1 in fp32; the larger logit is chosen all the same.
  const std::vector<float> large{40.f, 50.f};
  REQUIRE(fovea::switch_head_route(large, std::span(experts).first(1), std::span(w).first(1)).ok());
  CHECK((experts[0] == 1 && w[0] == 1.f));
  CHECK(!fovea::switch_head_route(logits, std::span(experts).first(3), std::span(w).first(2)).ok());
  CHECK(!fovea::switch_head_route(large, experts, w).ok());
  CHECK(!fovea::switch_head_route(large, {}, {}).ok());
}

TEST_CASE("head_mixtures: MoH from tokens to outputs", "[head_mixtures]") {
  constexpr index_t kModel = 24, kLen = 33, kShared = 1, kRouted = 5, kHeads = kShared + kRouted, kTop = 2;
  const Dense x(160, 2, kHeads, kHeads, kLen, kLen, 16, 20);
  const Values tokens = random_values(163, 2, 1, kLen, kModel), router = random_values(164, 1, 1, kHeads + 2, kModel);
  Values weight(2, kHeads, kLen, 1, canary());
  std::vector<double> exact(static_cast<std::size_t>(2 * kHeads * kLen));
  const View<double, 3> exact_view{exact.data(), {2, kHeads, kLen}, {kHeads * kLen, kLen, 1}};
  index_t left_out = 0;
  for (index_t b = 0; b < 2; ++b) {
    for (index_t i = 0; i < kLen; ++i) {
      // Rows of the router: the shared head, the routed ones, both kinds.
      std::vector<float> logits;
      for (index_t n = 0; n < kHeads + 2; ++n) {
        double dot = 0;
        for (index_t d = 0; d < kModel; ++d) dot += double{tokens.view()(b, 0, i, d)} * double{router.view()(0, 0, n, d)};
        logits.push_back(static_cast<float>(dot / std::sqrt(double{kModel})));
      }
      const std::span<const float> all(logits);
      const auto shared = all.first(kShared), routed = all.subspan(kShared, kRouted), kinds = all.last(2);
      std::vector<float> heads(kHeads);
      REQUIRE(fovea::moh_route(shared, routed, kinds, kTop, heads).ok());
      const auto want = fovea::reference::moh_route({shared.begin(), shared.end()}, {routed.begin(), routed.end()},
                                                    {kinds.begin(), kinds.end()}, kTop);
      for (index_t h = 0; h < kHeads; ++h) {
        weight.view()(b, h, i, 0) = heads[static_cast<std::size_t>(h)];
        exact_view(b, h, i) = want[static_cast<std::size_t>(h)];
        left_out += heads[static_cast<std::size_t>(h)] == 0.f;
      }
    }
  }
  CHECK(left_out == 2 * kLen * (kRouted - kTop));
  AttentionOptions options;
  options.causal = Causal::bottom_right;
  Expected e = expect_rows(x, options);
  fovea::reference::head_mixtures(x.q.view(), x.k.view(), x.v.view(), fovea::bhsd(e.out.data(), 2, kHeads, kLen, 20),
                                  exact_view, options);
  for (std::size_t n = 0; n < e.out.size(); ++n)   // three roundings of the weight, one of the product
    e.out_error[n] = exact[n / 20] * e.out_error[n] + 5 * kUnit * std::abs(e.out[n]);
  for (const Regime regime : kRegimes) {
    options.regime = regime;
    Result r = unwritten(x.q.view(), x.v.view());
    REQUIRE(fovea::head_mixture_attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), rows_of(weight), options).ok());
    INFO("regime " << name(regime));
    CHECK(worst_of(r, e) <= 1);
  }
}

TEST_CASE("head_mixtures: mixtures of experts against the reference", "[head_mixtures]") {
  struct Shape {
    index_t batch, heads, len, slots, experts, input, output;
  };
  ThreadPerLane threads;
  constexpr Shape kShapes[] = {{1, 1, 1, 1, 1, 1, 1},    {2, 3, 5, 2, 5, 19, 33},  {1, 2, 1, 3, 4, 130, 17},
                               {1, 2, 401, 1, 3, 7, 40}, {1, 2, 9, 2, 3, 16, 300}, {1, 2, 3, 4, 4, 12, 24}};
  for (const Shape& s : kShapes) {
    const Routes routes(170, s.batch, s.heads, s.len, s.slots, s.experts);
    const Values weights = random_values(171, s.heads, s.experts, s.input, s.output);
    const Values tokens = random_values(172, s.batch, 1, s.len, s.input);
    const Values rows = random_values(173, s.batch, s.heads, s.len, s.input);
    INFO("heads " << s.heads << ", tokens " << s.batch << " x " << s.len << ", " << s.slots << " of " << s.experts
                  << " experts, " << s.input << " to " << s.output);
    for (const bool summed : {false, true}) {
      const index_t out_heads = summed ? 1 : s.heads;
      const Values& a = summed ? rows : tokens;
      const std::vector<float> got = mixed(a.view(), weights.view(), routes.view(), out_heads);
      CHECK(worst_mixture(got, a, weights, routes, out_heads) <= 1);
      CHECK(same_bits(got, mixed(a.view(), weights.view(), routes.view(), out_heads, {threads, 3})));
    }
  }

  // Without a slot there is nothing to add up, and one set of weights may serve all heads.
  const Values shared = random_values(174, 1, 3, 8, 20), tokens = random_values(175, 1, 1, 6, 8);
  const Routes routes(176, 1, 2, 6, 2, 3);
  CHECK(worst_mixture(mixed(tokens.view(), shared.view(), routes.view(), 2), tokens, shared, routes, 2) <= 1);
  const Values rows = random_values(178, 1, 2, 6, 8);   // MoA's outputs: slots into one sum
  CHECK(worst_mixture(mixed(rows.view(), shared.view(), routes.view(), 1), rows, shared, routes, 1) <= 1);
  const Routes none(177, 1, 2, 6, 0, 3);
  CHECK(same_bits(mixed(tokens.view(), shared.view(), none.view(), 2), std::vector<float>(2 * 6 * 20, 0.f)));
}

TEST_CASE("head_mixtures: experts without a weight leave no trace, formats and strides", "[head_mixtures]") {
  constexpr index_t kHeads = 2, kLen = 7, kSlots = 2, kExperts = 4, kIn = 21, kOut = 37;
  Routes routes(180, 1, kHeads, kLen, kSlots, kExperts - 1);   // nobody chose the last one
  routes.experts[0] = kExperts - 1, routes.weights[0] = 0.f;   // or with a weight of 0
  const Values a = random_values(181, 1, kHeads, kLen, kIn);
  Values weights = random_values(182, kHeads, kExperts, kIn, kOut);
  std::vector<fovea::bf16> small;
  std::vector<fovea::f16> half;
  for (float& value : weights.data) {
    small.push_back(fovea::convert<fovea::bf16>(value));
    value = fovea::convert<float>(small.back());
    half.push_back(fovea::convert<fovea::f16>(value));   // 8 bits of 11, and none of them that small
  }
  for (const index_t out_heads : {index_t{1}, kHeads}) {
    const std::vector<float> want = mixed(a.view(), weights.view(), routes.view(), out_heads);
    CHECK(worst_mixture(want, a, weights, routes, out_heads) <= 1);
    CHECK(same_bits(want, mixed(a.view(), fovea::bhsd<const fovea::bf16>(small.data(), kHeads, kExperts, kIn, kOut),
                                routes.view(), out_heads)));
    CHECK(same_bits(want, mixed(a.view(), fovea::bhsd<const fovea::f16>(half.data(), kHeads, kExperts, kIn, kOut),
                                routes.view(), out_heads)));
    Values poisoned = weights;
    for (index_t h = 0; h < kHeads; ++h) {
      for (index_t d = 0; d < kIn; ++d) {
        for (index_t n = 0; n < kOut; ++n) poisoned.view()(h, kExperts - 1, d, n) = kNan;
      }
    }
    CHECK(same_bits(want, mixed(a.view(), poisoned.view(), routes.view(), out_heads)));

    // Token-major rows in double, every other number, rows of the weights apart.
    std::vector<double> spread(static_cast<std::size_t>(kLen * kHeads * kIn * 2), std::nan(""));
    const Tensor<double> strided{spread.data(), {1, kHeads, kLen, kIn}, {0, kIn * 2, kHeads * kIn * 2, 2}};
    std::vector<float> wide(static_cast<std::size_t>(kHeads * kExperts * kIn * (kOut + 5)), kNan);
    const Tensor<float> apart{
        wide.data(), {kHeads, kExperts, kIn, kOut}, {kExperts * kIn * (kOut + 5), kIn * (kOut + 5), kOut + 5, 1}};
    for (index_t h = 0; h < kHeads; ++h) {
      for (index_t i = 0; i < kLen; ++i) {
        for (index_t d = 0; d < kIn; ++d) strided(0, h, i, d) = double{a.view()(0, h, i, d)};
      }
      for (index_t e = 0; e < kExperts; ++e) {
        for (index_t d = 0; d < kIn; ++d) {
          for (index_t n = 0; n < kOut; ++n) apart(h, e, d, n) = weights.view()(h, e, d, n);
        }
      }
    }
    CHECK(same_bits(want, mixed(strided, apart, routes.view(), out_heads)));
  }
  // A token has the same bits alone.
  const std::vector<float> all = mixed(a.view(), weights.view(), routes.view(), 1);
  const auto third = [](auto view) { return cut(view, 2, 3, 1); };
  const ExpertRoutes one{third(routes.view().experts), third(routes.view().weights)};
  CHECK(same_bits(std::span(all).subspan(3 * kOut, kOut), mixed(only_pos(a.view(), 3, 1), weights.view(), one, 1)));
}

// Numbers of size 1 pass three projections of at most 48 terms, a mixture of 3 x 3 of them and a softmax of scores up to 5:
// 48 u = 3e-6 of the sums' magnitudes at the worst, some 8 times the sums, and an error of a score is one of its weight. 1e-4
// of the largest output is above that; the slips below cost more than a hundred times as much.
TEST_CASE("switch_head: the layer against the reference", "[head_mixtures]") {
  constexpr double kLimit = 1e-4;
  const auto difference = [](const std::vector<float>& got, const std::vector<double>& want) {
    double largest = 0, worst = 0;
    for (std::size_t n = 0; n < want.size(); ++n) {
      largest = std::max(largest, std::abs(want[n]));
      const double here = std::abs(double{got[n]} - want[n]);
      worst = here <= worst ? worst : here;   // NaN stays
    }
    return worst / largest;
  };
  ThreadPerLane threads;
  for (const auto& [heads, experts, active] : {std::array<index_t, 3>{2, 5, 3}, {3, 4, 2}, {1, 3, 3}}) {
    SwitchHead w(190, 48, heads, experts, active, 16, 20);
    const Values x = random_values(197, 2, 1, 13, 48);
    // Nobody is chosen by a rounding.
    double gap = 1;
    for (const Values* router : {&w.v_router, &w.o_router}) {
      for (index_t row = 0; row < 2 * 13 * heads; ++row) {
        std::vector<double> logits(static_cast<std::size_t>(experts));
        for (index_t e = 0; e < experts; ++e) {
          for (index_t d = 0; d < 48; ++d)
            logits[static_cast<std::size_t>(e)] += double{x.data[static_cast<std::size_t>(row / heads * 48 + d)]} *
                                                   double{router->view()(0, 0, row % heads * experts + e, d)};
        }
        std::sort(logits.begin(), logits.end(), std::greater<>());
        const auto last = static_cast<std::size_t>(active - 1);
        if (active < experts) gap = std::min(gap, logits[last] - logits[last + 1]);
      }
    }
    REQUIRE(gap > 1e-4);
    for (const bool causal : {false, true}) {
      std::vector<double> want(x.data.size());
      fovea::reference::switch_head(x.view(), w.exact(), fovea::bhsd(want.data(), 2, 1, 13, 48), causal);
      AttentionOptions options;
      options.causal = causal ? Causal::bottom_right : Causal::none;
      const std::vector<float> got = layer(w, x, kBareAttention, options);
      INFO(heads << " heads, " << active << " of " << experts << " experts" << (causal ? ", causal" : ""));
      CHECK(difference(got, want) <= kLimit);
      AttentionOptions three = options;
      three.executor = {threads, 3};
      CHECK(same_bits(got, layer(w, x, kBareAttention, three)));
      // y may be x.
      Values in_place = x;
      PoisonedBytes workspace(fovea::switch_head_block_bytes(w.block, 26), 0);
      const Tensor<float> both = in_place.view();
      REQUIRE(fovea::switch_head_block(w.block, both, kBareAttention, both, options, workspace.bytes()).ok());
      CHECK(same_bits(in_place.data, got));
      // Slips: the routers swapped, an expert fewer, another scale, other masks.
      std::swap(w.block.weights.v_router, w.block.weights.o_router);
      CHECK(difference(layer(w, x, kBareAttention, options), want) > 1e-2);
      w.bind();
      if (active > 1) {
        --w.block.active;
        CHECK(difference(layer(w, x, kBareAttention, options), want) > 1e-2);
        w.bind();
      }
      AttentionOptions slip = options;
      slip.scale = 0.3f;
      CHECK(difference(layer(w, x, kBareAttention, slip), want) > 1e-2);
      slip = options;
      slip.causal = causal ? Causal::none : Causal::bottom_right;
      CHECK(difference(layer(w, x, kBareAttention, slip), want) > 1e-2);
    }
  }
}

TEST_CASE("switch_head: one expert with a weight of one is plain attention", "[head_mixtures]") {
  constexpr index_t kModel = 32, kHeads = 3, kDim = 16, kLen = 19;
  SwitchHead w(200, kModel, kHeads, 1, 1, kDim, kDim);
  Values x = random_values(207, 1, 1, kLen, kModel);
  for (index_t i = 0; i < kLen; ++i) x.view()(0, 0, i, 0) = 1.f + 0.1f * static_cast<float>(i);
  // Logits of +inf.
  for (Values* router : {&w.v_router, &w.o_router}) {
    std::fill(router->data.begin(), router->data.end(), 0.f);
    for (index_t h = 0; h < kHeads; ++h) router->view()(0, 0, h, 0) = kInfinity;
  }
  AttentionOptions options;
  options.causal = Causal::bottom_right;
  Values seen(1, kHeads, kLen, kDim, canary());
  const auto attend = [&](const auto& q, const auto& k, const auto& v, const auto& out, const AttentionOptions& how) {
    const fovea::Status status = kBareAttention(q, k, v, out, how);
    for (index_t h = 0; h < kHeads; ++h) {
      for (index_t i = 0; i < kLen; ++i) std::copy_n(&out(0, h, i, 0), kDim, &seen.view()(0, h, i, 0));
    }
    return status;
  };
  const std::vector<float> y = layer(w, x, attend, options);

  // Merged projections: W_V as it stands head by head, W_O [head * dim, model] over all heads.
  fovea::Bump counting;
  fovea::carve_project(counting, kLen);
  PoisonedBytes bytes(counting.used() + fovea::kAlignment);
  fovea::Bump bump(fovea::aligned(bytes.bytes()).data());
  const fovea::ProjectMemory memory = fovea::carve_project(bump, kLen);
  Dense plain(208, 1, kHeads, kHeads, kLen, kLen, kDim, kDim);
  for (index_t h = 0; h < kHeads; ++h) {
    const auto merged = [&](const Tensor<float>& weights, fovea::Weights order, Values& to) {
      REQUIRE(project_rows(x.view(), weights, order, only_head(to.view(), h), memory).ok());
    };
    merged(only_pos(w.q.view(), h * kDim, kDim), fovea::Weights::by_output, plain.q);
    merged(only_pos(w.k.view(), h * kDim, kDim), fovea::Weights::by_output, plain.k);
    merged(only_batch(w.v.view(), h), fovea::Weights::by_input, plain.v);
  }
  const Result bare = test::attend(plain, options);
  CHECK(same_bits(seen.data, bare.out.data));
  for (index_t i = 0; i < kLen; ++i) {
    for (index_t n = 0; n < kModel; ++n) {
      double sum = 0, size = 0;
      for (index_t h = 0; h < kHeads; ++h) {
        for (index_t d = 0; d < kDim; ++d) {
          const double product = double{bare.at(0, h, i, d)} * double{w.o.view()(h, 0, d, n)};
          sum += product;
          size += std::abs(product);
        }
      }
      const auto at = static_cast<std::size_t>(i * kModel + n);
      CHECK(std::abs(double{y[at]} - sum) <= kUnit * (kDim + kHeads) * size);   // a chain per head, then their sum
    }
  }
}

TEST_CASE("switch_head: refusals write nothing", "[head_mixtures][errors]") {
  using Catch::Matchers::ContainsSubstring;
  Routes routes(210, 1, 2, 5, 2, 3);
  const Values a = random_values(211, 1, 2, 5, 8), weights = random_values(212, 2, 3, 8, 16);
  Values out(1, 1, 5, 16, canary());
  std::vector<std::byte> bytes(fovea::expert_mixture_bytes(5));
  const auto refused = [&](const Operand& from, const Operand& w, const ExpertRoutes& chosen, const fovea::Result& to,
                           const char* words, std::size_t room = SIZE_MAX) {
    const fovea::Status status =
        fovea::expert_mixture(from, w, chosen, to, std::span(bytes).first(std::min(room, bytes.size())));
    INFO(status.message());
    CHECK_THAT(status.message(), ContainsSubstring(words));
    CHECK(std::all_of(out.data.begin(), out.data.end(), is_canary));
  };
  refused(only_pos(a.view(), 0, 4), weights.view(), routes.view(), out.view(), "a is [1, 2, 4, 8]");
  refused(cut(a.view(), 3, 0, 7), weights.view(), routes.view(), out.view(), "a is [1, 2, 5, 7], weights [2, 3, 8, 16]");
  refused(a.view(), cut(weights.view(), 3, 0, 15), routes.view(), out.view(), "weights [2, 3, 8, 15] and out [1, 1, 5, 16]");
  refused(a.view(), weights.view(), {routes.view().experts, cut(routes.view().weights, 3, 0, 1)}, out.view(),
          "their weights [1, 2, 5, 1]");
  refused(a.view(), Tensor<const float>{weights.data.data(), {2, 3, 8, 16}, {3 * 128, 128, 1, 8}}, routes.view(), out.view(),
          "innermost stride 8");
  refused(a.view(), fovea::bhsd<const double>(nullptr, 2, 3, 8, 16), routes.view(), out.view(), "weights is f64");
  refused(a.view(), fovea::bhsd<const float>(nullptr, 2, 3, 8, 16), routes.view(), out.view(), "weights has null data");
  refused(out.view(), cut(weights.view(), 2, 0, 8), routes.view(), out.view(), "a is [1, 1, 5, 16]");
  refused(Tensor<const float>{out.data.data(), {1, 2, 5, 8}, {80, 40, 8, 1}}, weights.view(), routes.view(), out.view(),
          "overlaps a");
  refused(a.view(), weights.view(), routes.view(), Tensor<float>{out.data.data(), {1, 1, 5, 16}, {80, 80, 8, 1}},
          "out overlaps itself");
  refused(a.view(), weights.view(), routes.view(), out.view(), "workspace has 100 bytes", 100);
  test::ThreadPerLane pool;
  for (const int lanes : {0, -1}) {
    const fovea::Status status = fovea::expert_mixture(a.view(), weights.view(), routes.view(), out.view(), bytes, {pool, lanes});
    CHECK_THAT(status.message(), ContainsSubstring("1 to 65536 lanes"));
  }
  for (const index_t expert : {index_t{-1}, index_t{3}}) {
    routes.experts[7] = expert;
    refused(a.view(), weights.view(), routes.view(), out.view(),
            ("experts[0, 0, 3, 1] = " + std::to_string(expert) + " is outside 0 .. 2").c_str());
  }

  SwitchHead w(213, 16, 2, 3, 2, 8, 8);
  const Values x = random_values(214, 1, 1, 4, 16);
  Values y(1, 1, 4, 16, canary());
  std::vector<std::byte> room(fovea::switch_head_block_bytes(w.block, 4));
  const auto no_layer = [&](const Operand& from, const char* words, const AttentionOptions& options = {}) {
    const fovea::Status status = fovea::switch_head_block(w.block, from, kBareAttention, y.view(), options, room);
    INFO(status.message());
    CHECK_THAT(status.message(), ContainsSubstring(words));
    CHECK(std::all_of(y.data.begin(), y.data.end(), is_canary));
    w.bind();
  };
  AttentionOptions without;
  without.executor = {pool, 0};
  no_layer(x.view(), "1 to 65536 lanes", without);
  no_layer(cut(x.view(), 3, 0, 15), "x is [1, 1, 4, 15], must be [batch, 1, pos, 16]");
  no_layer(only_pos(x.view(), 0, 3), "y is [1, 1, 4, 16], must be [1, 1, 3, 16]");
  w.block.active = 4;
  no_layer(x.view(), "4 of 3 experts");
  w.block.weights.o_router.extent[2] = 5;
  no_layer(x.view(), "o_router is [1, 1, 5, 16], must be [1, 1, 6, 16]");
  w.block.weights.v.data = nullptr;
  no_layer(x.view(), "v is [2, 3, 16, 8] without data");
  w.block.weights.o.format = fovea::Format::f64;
  no_layer(x.view(), "o is f64");
  w.block.weights.q = fovea::bhsd<const float>(y.data.data(), 1, 1, 16, 16);
  w.block.weights.q.stride[2] = 0;
  no_layer(x.view(), "y [");
  AttentionOptions capped;
  capped.softcap = -1.f;   // attention's own refusal
  no_layer(x.view(), "softcap -1", capped);
  room.resize(room.size() / 2);
  no_layer(x.view(), "workspace has");
}

TEST_CASE("head_mixtures: refusals write nothing", "[head_mixtures][errors]") {
  const Dense x(146, 1, 4, 2, 5, 8, 8, 8);
  Values out(1, 4, 5, 8, canary());
  const auto refused = [&](View<const float, 3> w, const char* words, const AttentionOptions& options = {}) {
    const fovea::Status status = fovea::head_mixture_attention(x.q.view(), x.k.view(), x.v.view(), out.view(), w, options);
    INFO(status.message());
    CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
    CHECK(std::all_of(out.data.begin(), out.data.end(), is_canary));
  };
  const Values w(1, 4, 5, 1, 1.f);
  refused({w.data.data(), {1, 4, 4}, {20, 5, 1}}, "weight is [1, 4, 4], must be [1, 4, 5]");
  refused({nullptr, {1, 4, 5}, {20, 5, 1}}, "weight has null data");
  refused({out.data.data(), {1, 4, 5}, {20, 5, 1}}, "overlaps weight");
  AttentionOptions capped;
  capped.softcap = 3.f;
  refused(rows_of(w), "softcap", capped);
}
