// SPDX-License-Identifier: Apache-2.0
#include "fovea/modules/kda_block.hpp"

#include "fovea/reference/kda.hpp"
#include "recurrent_layer_support.hpp"

namespace {

using namespace test::layer;
using fovea::KdaBlock;

struct Shape {
  index_t model, heads, v_heads, dim_k, dim_v, f_rank, g_rank;   // rank 0: one full matrix
  bool bounded = false, biased = false, plain_gate = false;      // plain_gate: neither a_log nor dt_bias
  index_t width = 4;
};

struct Layer {
  Shape shape;
  Matrix q, k, v, conv, f_a, f_b, a_log, dt_bias, b, g_a, g_b, g_bias, norm, o;
  KdaBlock block;

  explicit Layer(const Shape& s) : shape(s) {
    test::Random random(1);
    const auto weights = [&](index_t rows, index_t columns) {
      return columns > 0 && rows > 0 ? Matrix::weights(rows, columns, random) : Matrix();
    };
    q = weights(keys(), s.model);
    k = weights(keys(), s.model);
    v = weights(values(), s.model);
    conv = weights(channels(), s.width);
    f_a = weights(s.f_rank, s.model);
    f_b = weights(gates(), s.f_rank > 0 ? s.f_rank : s.model);
    b = weights(s.v_heads, s.model);
    g_a = weights(s.g_rank, s.model);
    g_b = weights(values(), s.g_rank > 0 ? s.g_rank : s.model);
    if (s.biased) g_bias = {1, values(), random, -1, 1};
    if (!s.plain_gate) {
      a_log = {1, s.v_heads, random, -3, 1};
      dt_bias = {1, gates(), random, -3, 1};
    }
    norm = {1, s.dim_v, random, 0.8f, 1.2f};
    o = weights(s.model, values());
    block = {.model = s.model, .heads = s.heads, .v_heads = s.v_heads, .dim_k = s.dim_k, .dim_v = s.dim_v};
    if (s.bounded) block.lower_bound = -5.f;
    const auto taps = [&](index_t first, index_t count) {   // of the packed convolution
      return fovea::bhsd<const fovea::bf16>(conv.stored.data() + first * s.width, 1, 1, count, s.width);
    };
    block.weights = {q.view(),
                     k.view(),
                     v.view(),
                     taps(0, keys()),
                     taps(keys(), keys()),
                     taps(2 * keys(), values()),
                     f_a.view(),
                     f_b.view(),
                     a_log.view(),
                     dt_bias.view(),
                     b.view(),
                     g_a.view(),
                     g_b.view(),
                     g_bias.view(),
                     norm.view(),
                     o.view()};
  }
  index_t keys() const { return shape.heads * shape.dim_k; }
  index_t gates() const { return shape.v_heads * shape.dim_k; }
  index_t values() const { return shape.v_heads * shape.dim_v; }
  index_t channels() const { return 2 * keys() + values(); }
  template <class Real = float>
  States<Real> states(index_t sequences, index_t kept, StateLayout layout = StateLayout::k_first) const {
    return {sequences, shape.v_heads, shape.dim_k, shape.dim_v, channels(), kept, layout};
  }

  template <class... Arguments>
  static Status call(Arguments&&... arguments) {
    return fovea::kda_block(arguments...);
  }
  template <class... Arguments>
  static std::size_t bytes(const Arguments&... arguments) {
    return fovea::kda_block_bytes(arguments...);
  }

  Table recipe(const Table& x, const std::vector<index_t>& cu, States<double>& states) const {
    const Table projected[] = {product(x, q), product(x, k), product(x, v)};
    Table mixed(x.rows, channels()), convolved(x.rows, channels()), out(x.rows, values()), beta = product(x, b);
    for (index_t t = 0; t < x.rows; ++t) {
      index_t to = 0;
      for (const Table& part : projected) {
        for (index_t n = 0; n < part.columns; ++n) mixed(t, to++) = part(t, n);
      }
      for (index_t h = 0; h < shape.v_heads; ++h)
        beta(t, h) = (block.negative_eigenvalues ? 2 : 1) * fovea::reference::logistic(beta(t, h));
    }
    Table g = shape.f_rank > 0 ? product(product(x, f_a), f_b) : product(x, f_b);
    Table z = shape.g_rank > 0 ? product(product(x, g_a), g_b) : product(x, g_b);
    for (index_t t = 0; t < x.rows; ++t) {
      for (index_t n = 0; n < gates(); ++n) {
        const double rate = shape.plain_gate ? 0 : a_log(0, n / shape.dim_k), shift = shape.plain_gate ? 0 : dt_bias(0, n);
        g(t, n) = shape.bounded ? fovea::reference::kda_bounded_gate(g(t, n), rate, shift, -5)
                                : fovea::reference::kda_gate(g(t, n), rate, shift);
      }
      for (index_t n = 0; shape.biased && n < values(); ++n) z(t, n) += g_bias(0, n);
    }
    fovea::reference::short_conv(mixed.heads(0, 1, channels()),
                                 {.weight = {conv.exact.data(), {channels(), shape.width}, {shape.width, 1}},
                                  .initial_state = states.conv_view(),
                                  .final_state = states.conv_view()},
                                 convolved.heads(0, 1, channels()), {.cu_len = cu});
    normalise(convolved, 0, 2 * keys(), shape.dim_k);
    fovea::reference::kda(
        convolved.heads(0, shape.heads, shape.dim_k), convolved.heads(keys(), shape.heads, shape.dim_k),
        convolved.heads(2 * keys(), shape.v_heads, shape.dim_v), {g.heads(0, shape.v_heads, shape.dim_k)},
        beta.heads(0, shape.v_heads, 1), out.heads(0, shape.v_heads, shape.dim_v),
        {.layout = states.layout, .initial_state = states.state_view(), .final_state = states.state_view(), .cu_len = cu});
    close(out, z, norm, shape.dim_v, 1e-5, [](double x_) { return fovea::reference::logistic(x_); });
    return product(out, o);
  }
};

const Shape kKimi{24, 4, 4, 8, 8, 8, 8};   // its form, small

}   // namespace

TEST_CASE("a KDA layer is the recipe in double: gates, ranks, bias, ragged, from states, both layouts",
          "[recurrent][modules]") {
  Shape bounded = kKimi, biased = kKimi, plain = kKimi, plain_bounded = kKimi;
  bounded.bounded = biased.biased = plain.plain_gate = plain_bounded.bounded = plain_bounded.plain_gate = true;
  const Shape full{33, 1, 3, 20, 17, 5, 0, true, true, false, 2}, all_full{16, 2, 2, 16, 12, 0, 0, false, false, false, 1};
  const Shape many{20, 32, 32, 4, 4, 4, 4};
  for (const Shape& shape : {kKimi, bounded, biased, plain, plain_bounded, full, all_full, many}) {
    Layer layer(shape);
    for (const StateLayout layout : {StateLayout::k_first, StateLayout::v_first}) {
      layer.block.negative_eigenvalues = layout == StateLayout::v_first;
      CAPTURE(shape.model, shape.bounded, shape.biased, shape.plain_gate, static_cast<int>(layout));
      check_recipe(layer, layout == StateLayout::v_first ? shape.width + 3 : std::max<index_t>(shape.width - 1, 1), layout);
    }
  }
}

TEST_CASE("a KDA layer: prefill in parts and by tokens is the prefill in one", "[recurrent][modules]") {
  Shape bounded = kKimi;
  bounded.bounded = true;
  check_parts(Layer(kKimi));
  check_parts(Layer(bounded));
}

TEST_CASE("a KDA layer: members of a ragged batch are the sequences alone, a batch is a ragged one",
          "[recurrent][modules]") {
  const Layer layer(kKimi);
  const index_t model = kKimi.model;
  const std::vector<float> x = tokens(12, model, 5);
  States<float> before = layer.states(3, 4);
  before.randomise(6);
  check_members(layer, x, before);

  // From empty states, [2, 1, 6, model] and two members of 6; y in x's place.
  States<float> empty = layer.states(2, 3), states = layer.states(2, 3);
  std::vector<float> y;
  REQUIRE(step(layer, x, {0, 6, 12}, empty, y).ok());
  std::vector<float> both = x;
  std::vector<std::byte> workspace(fovea::kda_block_bytes(layer.block, 12, 2));
  RecurrentOptions<float> options;
  options.final_state = states.state_view();
  REQUIRE(fovea::kda_block(layer.block, fovea::bhsd<const float>(both.data(), 2, 1, 6, model), {{}, states.conv_view()},
                           fovea::bhsd(both.data(), 2, 1, 6, model), options, workspace)
              .ok());
  CHECK(distance(both, y) < kClose);
  CHECK(distance(states.s, empty.s) < kClose);
  CHECK(states.conv == empty.conv);
}

TEST_CASE("a KDA layer: drafts and rollback in a StateCache, by a ring of states and by replay",
          "[recurrent][modules][cache]") {
  check_cache(Layer(kKimi), StateLayout::k_first, true);
}

TEST_CASE("a KDA layer has the same bits on one lane and on three", "[recurrent][modules][bits]") {
  check_lanes(Layer(kKimi));
}

TEST_CASE("a KDA layer that is refused leaves y and its states alone", "[recurrent][modules][errors]") {
  const auto check = [](const auto& change, const char* words) {
    CHECK_THAT(refused(Layer(kKimi), change), Catch::Matchers::ContainsSubstring(words));
  };
  check([](auto& call) { call.block.v_heads = 6; }, "4 heads of 8, 6 value heads");
  check([](auto& call) { call.block.lower_bound = 0.f; }, "lower_bound 0");
  check([](auto& call) { call.block.weights.f_a = {}; }, "f_b is [1, 1, 32, 8], must be [1, 1, 32, 24]");
  check([](auto& call) { call.block.weights.k_conv.extent[3] = 3; }, "k_conv is [1, 1, 32, 3], must be [1, 1, 32, 4]");
  check([](auto& call) { call.block.weights.g_bias = call.block.weights.norm; },
        "g_bias is [1, 1, 1, 8], must be [1, 1, 1, 32]");
  check([](auto& call) { call.block.weights.norm = {}; }, "norm is [0, 0, 0, 0]");
  check([](auto& call) { call.x.data = nullptr; }, "x has null data");
  check([](auto& call) { call.conv.final.extent[0] = 2; }, "conv.final has extent 2 on axis 0, must be 1");
  check([](auto& call) { call.options.initial_state.extent[2] = 7; }, "initial_state has extent 7 on axis 2, must be 8");
  check([](auto& call) { call.workspace.resize(100); }, "workspace has 100 bytes");
  std::vector<std::byte> small(64);   // found out by the recurrence, when the convolution has run
  check([&](auto& call) { call.options.workspace = small; }, "workspace has 64 bytes");
}
