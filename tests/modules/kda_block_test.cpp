// SPDX-License-Identifier: Apache-2.0
#include "fovea/modules/kda_block.hpp"

#include <string>

#include "fovea/reference/kda.hpp"
#include "recurrent_layer_support.hpp"

namespace {

using namespace test::layer;
using fovea::ConvState;
using fovea::KdaBlock;
using fovea::RecurrentOptions;
using fovea::Status;

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

Status step(const Layer& layer, const std::vector<float>& x, const std::vector<index_t>& cu, States<float>& states,
            std::vector<float>& y, RecurrentOptions<float> options = {}) {
  const index_t model = layer.shape.model, count = static_cast<index_t>(x.size()) / model;
  y.assign(x.size(), test::canary());
  options.layout = states.layout;
  options.initial_state = options.final_state = states.state_view();
  options.cu_len = cu;
  test::PoisonedBytes workspace(fovea::kda_block_bytes(layer.block, count, states.sequences, options.executor.lanes()), 7);
  const Status status = fovea::kda_block(layer.block, fovea::bhsd<const float>(x.data(), 1, 1, count, model),
                                         {states.conv_view(), states.conv_view()}, fovea::bhsd(y.data(), 1, 1, count, model),
                                         options, workspace.bytes());
  CHECK(workspace.guards_intact());
  return status;
}

std::vector<float> part(const std::vector<float>& x, index_t model, index_t begin, index_t end) {
  return {x.begin() + begin * model, x.begin() + end * model};
}

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
      const std::vector<index_t> cu = cumulative({5, 0, 1, 13});
      const std::vector<float> x = tokens(cu.back(), shape.model, 2);
      States<float> states =
          layer.states(4, layout == StateLayout::v_first ? shape.width : std::max<index_t>(shape.width - 1, 1), layout);
      states.randomise(3);
      States<double> exact(states);
      std::vector<float> y;
      const Status status = step(layer, x, cu, states, y);
      INFO(status.message());
      REQUIRE(status.ok());
      const Table wanted = layer.recipe(table_of(x, shape.model), cu, exact);
      CAPTURE(shape.model, shape.bounded, shape.biased, shape.plain_gate, static_cast<int>(layout));
      CHECK(distance(y, wanted.data) < kClose);
      CHECK(distance(states.s, exact.s) < kClose);
      CHECK(distance(states.conv, exact.conv) < kClose);
    }
  }
}

TEST_CASE("a KDA layer: prefill in parts and by tokens is the prefill in one", "[recurrent][modules]") {
  for (const bool bounded : {false, true}) {
    Shape shape = kKimi;
    shape.bounded = bounded;
    const Layer layer(shape);
    const index_t len = 37;
    const std::vector<float> x = tokens(len, shape.model, 4);
    States<float> whole_states = layer.states(1, 3);
    std::vector<float> whole;
    REQUIRE(step(layer, x, {0, len}, whole_states, whole).ok());
    for (const std::vector<index_t>& cuts :
         {std::vector<index_t>{len - 1, len}, {1, len}, {20, len}, {7, 8, 9, 33, len}, {0, 5, 5, len}}) {
      States<float> states = layer.states(1, 3);
      std::vector<float> y, here;
      index_t begin = 0;
      for (const index_t end : cuts) {
        REQUIRE(step(layer, part(x, shape.model, begin, end), {0, end - begin}, states, here).ok());
        y.insert(y.end(), here.begin(), here.end());
        begin = end;
      }
      CHECK(distance(y, whole) < kClose);
      CHECK(distance(states.s, whole_states.s) < kClose);
      CHECK(states.conv == whole_states.conv);   // projections do not depend on how many tokens share a call
    }
  }
}

TEST_CASE("a KDA layer: members of a ragged batch are the sequences alone, a batch is a ragged one",
          "[recurrent][modules]") {
  const Layer layer(kKimi);
  const index_t model = kKimi.model;
  const std::vector<float> x = tokens(12, model, 5);
  States<float> ragged = layer.states(3, 4);
  ragged.randomise(6);
  const States<float> before = ragged;
  std::vector<float> y;
  const std::vector<index_t> cu = cumulative({6, 0, 6});
  REQUIRE(step(layer, x, cu, ragged, y).ok());
  for (index_t n = 0; n < 3; ++n) {
    States<float> alone = before.one(n);
    std::vector<float> own;
    REQUIRE(step(layer, part(x, model, cu[at(n)], cu[at(n) + 1]), {0, cu[at(n) + 1] - cu[at(n)]}, alone, own).ok());
    CHECK(distance(part(y, model, cu[at(n)], cu[at(n) + 1]), own) < kClose);
    CHECK(distance(ragged.one(n).s, alone.s) < kClose);
    CHECK(ragged.one(n).conv == alone.conv);
  }
  CHECK(ragged.one(1).s == before.one(1).s);   // no tokens: handed on
  CHECK(ragged.one(1).conv == before.one(1).conv);

  // From empty states, [2, 1, 6, model] and two members of 6; y in x's place.
  States<float> empty = layer.states(2, 3), states = layer.states(2, 3);
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

TEST_CASE("a KDA layer has the same bits on one lane and on three", "[recurrent][modules][bits]") {
  const Layer layer(kKimi);
  const std::vector<index_t> cu = cumulative({19, 1, 0, 40});
  const std::vector<float> x = tokens(cu.back(), kKimi.model, 7);
  States<float> one = layer.states(4, 3), three = layer.states(4, 3);
  std::vector<float> y_one, y_three;
  REQUIRE(step(layer, x, cu, one, y_one).ok());
  test::ThreadPerLane pool;
  REQUIRE(step(layer, x, cu, three, y_three, {.executor = fovea::Executor(pool, 3)}).ok());
  CHECK(y_one == y_three);
  CHECK(one.s == three.s);
  CHECK(one.conv == three.conv);
}

TEST_CASE("a KDA layer that is refused leaves y and its states alone", "[recurrent][modules][errors]") {
  using Catch::Matchers::ContainsSubstring;
  const Layer sound(kKimi);
  const index_t model = kKimi.model;
  const std::vector<float> x = tokens(3, model, 9);
  States<float> states = sound.states(1, 3);
  states.randomise(10);
  const States<float> before = states;
  std::vector<float> y(x.size(), test::canary());
  using Bytes = std::vector<std::byte>;
  const auto refused = [&](const auto& change) {
    KdaBlock block = sound.block;
    Operand in = fovea::bhsd<const float>(x.data(), 1, 1, 3, model);
    ConvState conv{states.conv_view(), states.conv_view()};
    RecurrentOptions<float> options;
    options.initial_state = options.final_state = states.state_view();
    Bytes workspace(fovea::kda_block_bytes(block, 3));
    change(block, in, conv, options, workspace);
    const Status status = fovea::kda_block(block, in, conv, fovea::bhsd(y.data(), 1, 1, 3, model), options, workspace);
    CHECK(!status.ok());
    for (const float number : y) CHECK(test::is_canary(number));
    CHECK(states.s == before.s);
    CHECK(states.conv == before.conv);
    return std::string(status.message());
  };
  CHECK_THAT(refused([](auto& block, auto&, auto&, auto&, Bytes&) { block.v_heads = 6; }),
             ContainsSubstring("4 heads of 8, 6 value heads"));
  CHECK_THAT(refused([](auto& block, auto&, auto&, auto&, Bytes&) { block.lower_bound = 0.f; }),
             ContainsSubstring("lower_bound 0"));
  CHECK_THAT(refused([](auto& block, auto&, auto&, auto&, Bytes&) { block.weights.f_a = {}; }),
             ContainsSubstring("f_b is [1, 1, 32, 8], must be [1, 1, 32, 24]"));
  CHECK_THAT(refused([](auto& block, auto&, auto&, auto&, Bytes&) { block.weights.k_conv.extent[3] = 3; }),
             ContainsSubstring("k_conv is [1, 1, 32, 3], must be [1, 1, 32, 4]"));
  CHECK_THAT(refused([](auto& block, auto&, auto&, auto&, Bytes&) { block.weights.g_bias = block.weights.norm; }),
             ContainsSubstring("g_bias is [1, 1, 1, 8], must be [1, 1, 1, 32]"));
  CHECK_THAT(refused([](auto& block, auto&, auto&, auto&, Bytes&) { block.weights.norm = {}; }),
             ContainsSubstring("norm is [0, 0, 0, 0]"));
  CHECK_THAT(refused([](auto&, auto& in, auto&, auto&, Bytes&) { in.data = nullptr; }),
             ContainsSubstring("x has null data"));
  CHECK_THAT(refused([](auto&, auto&, auto& conv, auto&, Bytes&) { conv.final.extent[0] = 2; }),
             ContainsSubstring("conv.final has extent 2 on axis 0, must be 1"));
  CHECK_THAT(refused([](auto&, auto&, auto&, auto& options, Bytes&) { options.initial_state.extent[2] = 7; }),
             ContainsSubstring("initial_state has extent 7 on axis 2, must be 8"));
  CHECK_THAT(refused([](auto&, auto&, auto&, auto&, Bytes& bytes) { bytes.resize(100); }),
             ContainsSubstring("workspace has 100 bytes"));
  Bytes small(64);   // found out by the recurrence, when the convolution has run
  CHECK_THAT(refused([&](auto&, auto&, auto&, auto& options, Bytes&) { options.workspace = small; }),
             ContainsSubstring("workspace has 64 bytes"));
}
