// SPDX-License-Identifier: Apache-2.0
// The code of docs/state-cache.md and docs/recurrent-modules.md: two layers with their states in a cache, drafted and rolled
// back, end where the same layers end that have seen nothing else.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include <fovea/cache/replay.hpp>
#include <fovea/modules/gated_delta_block.hpp>

namespace {

using fovea::index_t;
constexpr index_t layers = 2, model = 16, channels = 2 * 8 + 2 * 12, width = 4, prompt = 11;

// Numbers that look random, the same ones for the same phase.
std::vector<float> numbers(index_t count, float size, float phase) {
  std::vector<float> x(static_cast<std::size_t>(count));
  for (std::size_t n = 0; n < x.size(); ++n) x[n] = size * std::sin(phase + 1.7f * static_cast<float>(n * n % 997));
  return x;
}
std::vector<float> text(index_t first, index_t count) { return numbers(count * model, 1.f, static_cast<float>(first)); }
const std::vector<float> wrong = text(1000, 1);

struct Weights {
  std::vector<float> qkvz = numbers(64 * model, 0.4f, 1), ba = numbers(4 * model, 0.4f, 2),
                     conv = numbers(channels * width, 0.6f, 3), a_log = numbers(2, 1, 4), dt_bias = numbers(2, 1, 5),
                     norm = numbers(12, 1, 6), out = numbers(model * 24, 0.3f, 7);
};
const Weights weights;

fovea::Operand matrix(const std::vector<float>& w, index_t rows) {
  return fovea::bhsd<const float>(w.data(), 1, 1, rows, static_cast<index_t>(w.size()) / rows);
}
const fovea::GatedDeltaBlock block{
    .model = model,
    .k_heads = 1,
    .v_heads = 2,
    .dim_k = 8,
    .dim_v = 12,
    .weights = {matrix(weights.qkvz, 64), matrix(weights.ba, 4), matrix(weights.conv, channels), matrix(weights.a_log, 1),
                matrix(weights.dt_bias, 1), matrix(weights.norm, 1), matrix(weights.out, model)}};

// The layers with tensors of states.
class Straight {
 public:
  std::vector<float> run(std::vector<float> hidden) {
    const index_t sequences = 1, lanes = 1, tokens = static_cast<index_t>(hidden.size()) / model;
    const std::vector<index_t> cu{0, tokens};
    const fovea::Tensor<float> x = fovea::bhsd(hidden.data(), 1, 1, tokens, model), y = x;
    for (index_t layer = 0; layer < layers; ++layer) {
      float* const numbers_of_layer = states_.data() + layer * (2 * 8 * 12 + channels * (width - 1));
      const fovea::View<float, 4> s = fovea::bhsd(numbers_of_layer, 1, 2, 8, 12);
      const fovea::View<float, 3> conv_state{
          numbers_of_layer + 2 * 8 * 12, {1, channels, width - 1}, {channels * (width - 1), 1, channels}};
      std::vector<std::byte> workspace(fovea::gated_delta_block_bytes(block, tokens, sequences, lanes));
      fovea::RecurrentOptions<float> options{.initial_state = s, .final_state = s, .cu_len = cu};
      fovea::gated_delta_block(block, x, {conv_state, conv_state}, y, options, workspace).or_throw();
    }
    return hidden;
  }

 private:
  std::vector<float> states_ = std::vector<float>(layers * (2 * 8 * 12 + channels * (width - 1)));
};

double worst = 0;
void compare(const std::vector<float>& a, const std::vector<float>& b) {
  for (std::size_t n = 0; n < a.size(); ++n) {
    const double apart = std::abs(static_cast<double>(a[n]) - static_cast<double>(b[n]));
    worst = apart <= worst ? worst : apart;   // a NaN stays
  }
}

void ring_of_states() {
  Straight straight;
  std::vector<float> hidden = text(0, prompt);

  fovea::StateCacheShape shape;
  shape.layers = layers, shape.sequences = 8, shape.snapshots = 2;
  shape.heads = block.v_heads, shape.dim_k = block.dim_k, shape.dim_v = block.dim_v;
  shape.conv_channels = channels, shape.conv_width = width, shape.max_draft = 4;
  fovea::StateCache cache;
  cache.create(shape).or_throw();
  fovea::index_t sequence = 0;
  cache.open(&sequence).or_throw();   // zeros

  // The newest inputs of the convolution, as many as the cache may have to go back to; of one layer at a time.
  const fovea::index_t ring = width - 1 + shape.max_draft;
  std::vector<float> inputs(static_cast<std::size_t>(ring * channels));
  std::vector<std::byte> workspace(fovea::gated_delta_block_bytes(block, prompt, 1, 1, ring));
  // What was begun, or its token `step`: `count` tokens, x [1, 1, token, model] in place.
  const auto run_layers = [&](float* x_data, fovea::index_t count, fovea::index_t step) {
    const auto x = fovea::bhsd(x_data, 1, 1, count, block.model);
    for (fovea::index_t layer = 0; layer < layers; ++layer) {
      fovea::StateViews views;
      cache.views(layer, sequence, &views, step).or_throw();
      const fovea::ConvState conv{views.conv_initial, {inputs.data(), {1, channels, ring}, {ring * channels, 1, channels}}};
      fovea::RecurrentOptions<float> options{.initial_state = views.initial_state, .final_state = views.final_state};
      fovea::gated_delta_block(block, x, conv, x, options, workspace).or_throw();
      const fovea::index_t kept = std::min(count, ring);
      const float* const newest = inputs.data() + (ring - kept) * channels;
      cache.keep_inputs(layer, sequence, fovea::bhsd(newest, 1, 1, kept, channels)).or_throw();
    }
  };

  cache.begin_call(sequence, prompt).or_throw();   // prefill: one state at the end
  run_layers(hidden.data(), prompt, 0);
  cache.commit(sequence, prompt).or_throw();

  compare(hidden, straight.run(text(0, prompt)));
  std::vector<float> draft = text(prompt, 1);
  const std::vector<float> second = text(prompt + 1, 1);
  draft.insert(draft.end(), second.begin(), second.end());
  draft.insert(draft.end(), wrong.begin(), wrong.end());
  draft.insert(draft.end(), wrong.begin(), wrong.end());
  const fovea::index_t accepted = 2;

  cache.begin_steps(sequence, 4).or_throw();   // four drafts: a state after each
  for (fovea::index_t step = 0; step < 4; ++step) run_layers(draft.data() + step * block.model, 1, step);
  cache.commit(sequence, accepted).or_throw();   // the others were never there
  cache.rollback(sequence, 1).or_throw();        // what was committed can be taken back as well

  draft.resize(model);
  compare(draft, straight.run(text(prompt, 1)));
  std::vector<float> next = text(500, 1);
  cache.begin_steps(sequence, 1).or_throw();
  run_layers(next.data(), 1, 0);
  cache.commit(sequence, 1).or_throw();
  compare(next, straight.run(text(500, 1)));
}

void replay() {
  Straight straight;
  fovea::StateCacheShape shape;
  shape.layers = layers, shape.sequences = 1;
  shape.heads = block.v_heads, shape.dim_k = block.dim_k, shape.dim_v = block.dim_v;
  shape.conv_channels = channels, shape.conv_width = width, shape.max_draft = 4, shape.replay = 16;
  fovea::StateCache cache;
  cache.create(shape).or_throw();
  fovea::index_t sequence = 0;
  cache.open(&sequence).or_throw();
  const index_t ring = width - 1 + shape.max_draft, drafts = 4, accepted = 1;
  std::vector<float> inputs(static_cast<std::size_t>(ring * channels));
  std::vector<std::byte> workspace(fovea::gated_delta_block_bytes(block, drafts, 1, 1, ring));
  for (index_t token = 0; token < 3; ++token) {
    std::vector<float> hidden = text(token, 1);
    for (index_t n = 1; n < drafts; ++n) hidden.insert(hidden.end(), wrong.begin(), wrong.end());
    const auto x = fovea::bhsd(hidden.data(), 1, 1, drafts, model);

    cache.begin_steps(sequence, drafts).or_throw();
    for (fovea::index_t layer = 0; layer < layers; ++layer) {
      fovea::StateViews views;
      cache.views(layer, sequence, &views).or_throw();   // the convolution's history only
      const fovea::ConvState conv{views.conv_initial, {inputs.data(), {1, channels, ring}, {ring * channels, 1, channels}}};
      const auto replayed = [&](const auto& q, const auto& k, const auto& v, const auto& decay, const auto& beta,
                                const auto& out, const auto& options) {
        const auto rule = fovea::ReplayRule::delta;
        return fovea::replay_step(cache, layer, {&sequence, 1}, rule, q, k, v, decay, beta, out, options);
      };
      fovea::gated_delta_block(block, x, conv, x, {}, workspace, replayed).or_throw();
      const float* const newest = inputs.data() + (ring - drafts) * channels;
      cache.keep_inputs(layer, sequence, fovea::bhsd(newest, 1, 1, drafts, channels)).or_throw();
    }
    cache.commit(sequence, accepted).or_throw();

    hidden.resize(model);
    compare(hidden, straight.run(text(token, 1)));
  }
}

}   // namespace

int main() {
  ring_of_states();
  if (worst != 0) std::printf("the ring of states: %g apart, must be the same bits\n", worst);
  const bool same = worst == 0;
  replay();
  std::printf("replay: %g apart\n", worst);
  return same && worst < 1e-5 ? 0 : 1;
}
