// SPDX-License-Identifier: Apache-2.0
#include "fovea/modules/gated_delta_block.hpp"

#include "fovea/reference/gated_delta.hpp"
#include "recurrent_layer_support.hpp"

namespace {

using namespace test::layer;
using fovea::GatedDeltaBlock;

struct Layer {
  index_t model, k_heads, v_heads, dim_k, dim_v, width;
  Matrix in_qkvz, in_ba, conv, a_log, dt_bias, norm, out;
  GatedDeltaBlock block;

  Layer(index_t model_, index_t k_heads_, index_t v_heads_, index_t dim_k_, index_t dim_v_, index_t width_ = 4)
      : model(model_), k_heads(k_heads_), v_heads(v_heads_), dim_k(dim_k_), dim_v(dim_v_), width(width_) {
    test::Random random(1);
    in_qkvz = Matrix::weights(2 * k_heads * dim_k + 2 * v_heads * dim_v, model, random);
    in_ba = Matrix::weights(2 * v_heads, model, random);
    conv = Matrix::weights(channels(), width, random);
    a_log = {1, v_heads, random, -3, 1};
    dt_bias = {1, v_heads, random, -3, 1};
    norm = {1, dim_v, random, 0.8f, 1.2f};
    out = Matrix::weights(model, v_heads * dim_v, random);
    block = {.model = model, .k_heads = k_heads, .v_heads = v_heads, .dim_k = dim_k, .dim_v = dim_v};
    block.weights = {in_qkvz.view(), in_ba.view(), conv.view(), a_log.view(), dt_bias.view(), norm.view(), out.view()};
  }
  index_t channels() const { return 2 * k_heads * dim_k + v_heads * dim_v; }
  template <class Real = float>
  States<Real> states(index_t sequences, index_t kept, StateLayout layout = StateLayout::k_first) const {
    return {sequences, v_heads, dim_k, dim_v, channels(), kept, layout};
  }

  template <class... Arguments>
  static Status call(Arguments&&... arguments) {
    return fovea::gated_delta_block(arguments...);
  }
  template <class... Arguments>
  static std::size_t bytes(const Arguments&... arguments) {
    return fovea::gated_delta_block_bytes(arguments...);
  }

  // The recipe, for tokens [cu[n], cu[n + 1]) of sequence n.
  Table recipe(const Table& x, const std::vector<index_t>& cu, States<double>& states) const {
    const index_t group = v_heads / k_heads, per = 2 * dim_k + 2 * group * dim_v;
    const Table qkvz = product(x, in_qkvz), ba = product(x, in_ba);
    Table mixed(x.rows, channels()), z(x.rows, v_heads * dim_v), beta(x.rows, v_heads), g(x.rows, v_heads);
    for (index_t t = 0; t < x.rows; ++t) {
      for (index_t h = 0; h < k_heads; ++h) {
        for (index_t d = 0; d < dim_k; ++d) {
          mixed(t, h * dim_k + d) = qkvz(t, h * per + d);
          mixed(t, (k_heads + h) * dim_k + d) = qkvz(t, h * per + dim_k + d);
        }
        for (index_t j = 0; j < group; ++j) {
          const index_t head = h * group + j;
          for (index_t d = 0; d < dim_v; ++d) {
            mixed(t, 2 * k_heads * dim_k + head * dim_v + d) = qkvz(t, h * per + 2 * dim_k + j * dim_v + d);
            z(t, head * dim_v + d) = qkvz(t, h * per + 2 * dim_k + (group + j) * dim_v + d);
          }
          beta(t, head) = (block.negative_eigenvalues ? 2 : 1) * fovea::reference::logistic(ba(t, h * 2 * group + j));
          g(t, head) =
              fovea::reference::gated_delta_gate(ba(t, h * 2 * group + group + j), a_log(0, head), dt_bias(0, head));
        }
      }
    }
    Table convolved(x.rows, channels()), o(x.rows, v_heads * dim_v);
    fovea::reference::short_conv(mixed.heads(0, 1, channels()),
                                 {.weight = {conv.exact.data(), {channels(), width}, {width, 1}},
                                  .initial_state = states.conv_view(),
                                  .final_state = states.conv_view()},
                                 convolved.heads(0, 1, channels()), {.cu_len = cu});
    normalise(convolved, 0, 2 * k_heads * dim_k, dim_k);
    fovea::reference::gated_delta(
        convolved.heads(0, k_heads, dim_k), convolved.heads(k_heads * dim_k, k_heads, dim_k),
        convolved.heads(2 * k_heads * dim_k, v_heads, dim_v), {g.heads(0, v_heads, 1)}, beta.heads(0, v_heads, 1),
        o.heads(0, v_heads, dim_v),
        {.layout = states.layout, .initial_state = states.state_view(), .final_state = states.state_view(), .cu_len = cu});
    close(o, z, norm, dim_v, 1e-6, [](double v) { return fovea::reference::silu(v); });
    return product(o, out);
  }
};

}   // namespace

TEST_CASE("a Gated DeltaNet layer is the recipe in double: ragged, from states, both layouts", "[recurrent][modules]") {
  struct Shape {
    index_t model, k_heads, v_heads, dim_k, dim_v, width;
  };
  for (const Shape& s :
       {Shape{24, 2, 4, 8, 12, 4}, Shape{40, 16, 32, 4, 4, 4}, Shape{33, 1, 3, 20, 17, 2}, Shape{16, 2, 2, 16, 16, 1}}) {
    for (const bool negative : {false, true}) {
      Layer layer(s.model, s.k_heads, s.v_heads, s.dim_k, s.dim_v, s.width);
      layer.block.negative_eigenvalues = negative;
      for (const StateLayout layout : {StateLayout::k_first, StateLayout::v_first}) {
        CAPTURE(s.model, negative, static_cast<int>(layout));
        check_recipe(layer, negative ? s.width + 3 : std::max<index_t>(s.width - 1, 1), layout);
      }
    }
  }
}

TEST_CASE("a Gated DeltaNet layer: prefill in parts and by tokens is the prefill in one", "[recurrent][modules]") {
  check_parts(Layer(24, 2, 4, 8, 12));
}

TEST_CASE("a Gated DeltaNet layer: a batch and a ragged batch are the sequences alone", "[recurrent][modules]") {
  const Layer layer(24, 2, 4, 8, 12);
  const std::vector<float> x = tokens(12, layer.model, 5);
  States<float> before = layer.states(3, 4), batch = layer.states(2, 4);
  before.randomise(6);
  const std::vector<float> y = check_members(layer, x, before);

  // [batch, 1, pos, model] without cumulative lengths, sequences interleaved in memory; y as bf16, and in x's place.
  std::vector<float> interleaved(x.size());
  const View<float, 4> in{interleaved.data(), {2, 1, 6, layer.model}, {layer.model, 0, 2 * layer.model, 1}};
  for (index_t b = 0; b < 2; ++b) {
    for (index_t t = 0; t < 6; ++t) {
      for (index_t d = 0; d < layer.model; ++d) in(b, 0, t, d) = x[at((b * 6 + t) * layer.model + d)];
    }
  }
  const States<float> first = before.one(0), last = before.one(2);
  std::copy(first.s.begin(), first.s.end(), batch.s.begin());
  std::copy(last.s.begin(), last.s.end(), batch.s.begin() + static_cast<index_t>(first.s.size()));
  std::copy(first.conv.begin(), first.conv.end(), batch.conv.begin());
  std::copy(last.conv.begin(), last.conv.end(), batch.conv.begin() + static_cast<index_t>(first.conv.size()));
  RecurrentOptions<float> options;
  options.initial_state = options.final_state = batch.state_view();
  std::vector<fovea::bf16> small(x.size());
  std::vector<std::byte> workspace(fovea::gated_delta_block_bytes(layer.block, 12, 2));
  const ConvState conv{batch.conv_view(), {}};
  RecurrentOptions<float> reading = options;
  reading.final_state = {};
  REQUIRE(
      fovea::gated_delta_block(layer.block, in, conv, fovea::bhsd(small.data(), 2, 1, 6, layer.model), reading, workspace)
          .ok());
  REQUIRE(fovea::gated_delta_block(layer.block, in, {batch.conv_view(), batch.conv_view()}, in, options, workspace).ok());
  std::vector<float> sorted;
  for (index_t b = 0; b < 2; ++b) {
    for (index_t t = 0; t < 6; ++t) {
      for (index_t d = 0; d < layer.model; ++d) sorted.push_back(in(b, 0, t, d));
    }
  }
  CHECK(distance(sorted, y) < kClose);
  bool rounded = true;
  for (std::size_t n = 0; n < sorted.size(); ++n)
    rounded = rounded && small[n].bits == fovea::convert<fovea::bf16>(sorted[n]).bits;
  CHECK(rounded);
}

TEST_CASE("a Gated DeltaNet layer: drafts and rollback in a StateCache, by a ring of states and by replay",
          "[recurrent][modules][cache]") {
  check_cache(Layer(24, 2, 4, 8, 12), StateLayout::v_first, false);
}

TEST_CASE("a Gated DeltaNet layer has the same bits on one lane and on three", "[recurrent][modules][bits]") {
  check_lanes(Layer(24, 2, 4, 8, 12));
}

TEST_CASE("tokens behind the last sequence of a ragged batch are left alone", "[recurrent][modules]") {
  const Layer layer(24, 2, 4, 8, 12);
  std::vector<float> x = tokens(5, layer.model, 8), y, exact;
  States<float> states = layer.states(1, 3), other = layer.states(1, 3);
  for (std::size_t n = at(3 * layer.model); n < x.size(); ++n) x[n] = test::canary();
  REQUIRE(step(layer, x, {0, 3}, states, y).ok());
  for (std::size_t n = at(3 * layer.model); n < y.size(); ++n) CHECK(test::is_canary(y[n]));
  REQUIRE(step(layer, part(x, layer.model, 0, 3), {0, 3}, other, exact).ok());
  CHECK(part(y, layer.model, 0, 3) == exact);
  CHECK(states.s == other.s);
}

TEST_CASE("a Gated DeltaNet layer that is refused leaves y and its states alone", "[recurrent][modules][errors]") {
  const auto check = [](const auto& change, const char* words) {
    CHECK_THAT(refused(Layer(24, 2, 4, 8, 12), change), Catch::Matchers::ContainsSubstring(words));
  };
  check([](auto& call) { call.block.k_heads = 3; }, "3 key heads of 8, 4 value heads");
  check([](auto& call) { call.block.weights.in_qkvz.extent[2] = 127; },
        "in_qkvz is [1, 1, 127, 24], must be [1, 1, 128, 24]");
  check([](auto& call) { call.block.weights.conv = {}; }, "conv is [0, 0, 0, 0] without data");
  check([](auto& call) { call.block.weights.out.format = fovea::Format::f64; }, "out is f64");
  check([](auto& call) { call.x.extent[3] = 23; }, "x is [1, 1, 3, 23], must be [batch, 1, pos, 24]");
  check([](auto& call) { call.y.extent[2] = 2; }, "y is [1, 1, 2, 24]");
  check([](auto& call) { call.conv.final.extent[2] = 2; }, "conv.final keeps 2 inputs, a width of 4 needs 3");
  check([](auto& call) { call.conv.initial.extent[2] = 2; }, "conv.initial keeps 2 inputs, a width of 4 needs 3");
  check([](auto& call) { call.conv.initial.extent[1] = 5; }, "conv.initial has extent 5 on axis 1");
  check([](auto& call) { call.options.final_state.extent[1] = 2; }, "final_state has extent 2 on axis 1, must be 4");
  check([](auto& call) { call.options.head_map = fovea::HeadMap::tiled; }, "head_map is blocks");
  check([](auto& call) { call.workspace.resize(100); }, "workspace has 100 bytes");
  std::vector<std::byte> small(64);   // found out by the recurrence, when the convolution has run
  check([&](auto& call) { call.options.workspace = small; }, "workspace has 64 bytes");
  check([](auto& call) { call.options.final_state.data = reinterpret_cast<float*>(call.y.data); }, "overlaps");
}
