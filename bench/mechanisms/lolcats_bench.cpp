// SPDX-License-Identifier: Apache-2.0
// LoLCATs' layers (window 64, 64 features) on heads of 128 numbers: a prompt with both windows, and one token, whose states
// and windows are updated in place.
#include "fovea/mechanisms/lolcats.hpp"

#include <cmath>

#include "fovea/reference/lolcats.hpp"
#include "support/rows.hpp"

namespace fovea_bench {

namespace {

using fovea::index_t;
using fovea::LolcatsWindow;

struct LolcatsShape {
  index_t len = 4096, heads = 8, dim = 128, features = 64, window = 64;
  LolcatsWindow shape = LolcatsWindow::sliding;
  int threads = 1;

  index_t map_floats() const { return heads * dim * features; }
  index_t tensor_floats() const { return heads * len * dim; }
  index_t state_floats() const { return heads * (2 * features * (dim + 1) + 2 * window * dim); }
  // Two maps, the state read and written, scores and weighed values of the window.
  double flops_of_token() const { return static_cast<double>(4 * dim * features + 8 * features * dim + 4 * window * dim); }
};

class PreparedLolcats final : public PreparedRow {
 public:
  PreparedLolcats(const LolcatsShape& shape, const RowMemory& memory) : s_(shape) {
    const float* from = memory.inputs.data();
    const auto next = [&](index_t len, index_t dim) {
      const auto view = fovea::bhsd(from, 1, s_.heads, len, dim);
      from += s_.heads * len * dim;
      return view;
    };
    q_ = next(s_.len, s_.dim), k_ = next(s_.len, s_.dim), v_ = next(s_.len, s_.dim);
    for (fovea::View<const float, 3>* map : {&options_.query_map, &options_.key_map}) {
      *map = {from, {s_.heads, s_.dim, s_.features}, {s_.dim * s_.features, s_.features, 1}};
      from += s_.map_floats();
    }
    out_ = fovea::bhsd(memory.outputs.data(), 1, s_.heads, s_.len, s_.dim);
    weight_.assign(static_cast<std::size_t>(s_.heads), 0.1f);
    options_.window = s_.window;
    options_.shape = s_.shape;
    options_.window_weight = weight_;
    how_.executor = fovea::Executor(*memory.pool, s_.threads);
    if (s_.len > 1) return;
    kept_.assign(from, from + s_.state_floats());
    float* at = kept_.data();
    for (index_t n = 0; n < 2; ++n, at += s_.heads * s_.window * s_.dim) {
      const auto window = fovea::bhsd(at, 1, s_.heads, s_.window, s_.dim);
      (n == 0 ? options_.final_window_k : options_.final_window_v) = window;
      (n == 0 ? options_.initial_window_k : options_.initial_window_v) = window;
    }
    how_.final_state = fovea::bhsd(at, 1, s_.heads, 2 * s_.features, s_.dim);
    how_.initial_state = how_.final_state;
    at += s_.heads * 2 * s_.features * s_.dim;
    for (index_t n = 0; n < s_.heads * 2 * s_.features; ++n) at[n] = 1.f + std::abs(at[n]);
    options_.final_key_sum = {at, {1, s_.heads, 2 * s_.features}, {s_.heads * 2 * s_.features, 2 * s_.features, 1}};
    options_.initial_key_sum = options_.final_key_sum;
  }
  void call() override { status_ = fovea::lolcats(q_, k_, v_, out_, options_, how_); }
  // The first tokens of the first head; a state that is updated in place has moved on.
  double max_error() override {
    if (s_.len == 1) return 0;
    constexpr index_t kCompared = 300;
    const auto doubles = [](const float* x, index_t count) { return std::vector<double>(x, x + count); };
    const std::vector<double> q = doubles(q_.data, kCompared * s_.dim), k = doubles(k_.data, kCompared * s_.dim),
                              v = doubles(v_.data, kCompared * s_.dim);
    const std::vector<double> query_map = doubles(options_.query_map.data, s_.dim * s_.features),
                              key_map = doubles(options_.key_map.data, s_.dim * s_.features);
    std::vector<double> out(q.size());
    const double weight[] = {double{weight_[0]}};
    const fovea::View<const double, 3> map{query_map.data(), {1, s_.dim, s_.features}, {0, s_.features, 1}};
    fovea::LolcatsOptions<double> options{.window = s_.window, .shape = s_.shape, .query_map = map, .window_weight = weight};
    options.key_map = {key_map.data(), map.extent, map.stride};
    const auto view = [&](const std::vector<double>& x) { return fovea::bhsd(x.data(), 1, 1, kCompared, s_.dim); };
    fovea::reference::lolcats(view(q), view(k), view(v), fovea::bhsd(out.data(), 1, 1, kCompared, s_.dim), options);
    double worst = 0;
    for (std::size_t n = 0; n < out.size(); ++n) worst = std::max(worst, std::abs(double{out_.data[n]} - out[n]));
    return worst;
  }
  std::string refusal() override { return status_.ok() ? "" : status_.message(); }

 private:
  LolcatsShape s_;
  fovea::Tensor<const float> q_, k_, v_;
  fovea::Tensor<float> out_;
  std::vector<float> weight_, kept_;
  fovea::LolcatsOptions<float> options_;
  fovea::RecurrentOptions<float> how_;
  fovea::Status status_;
};

Row lolcats_row(const LolcatsShape& shape) {
  Row row;
  row.name = std::string("recurrent/lolcats/") + (shape.len == 1 ? "decode" : "prefill") + "/f32/d" +
             std::to_string(shape.dim) + "/w" + std::to_string(shape.window) + "/f" + std::to_string(shape.features) + "/t" +
             std::to_string(shape.len) + "/h" + std::to_string(shape.heads) + "/t" + std::to_string(shape.threads) +
             (shape.shape == LolcatsWindow::terraced ? "/terraced" : "/sliding");
  row.suites = kRecurrent;
  row.threads = shape.threads;
  row.flops = shape.flops_of_token() * static_cast<double>(shape.len * shape.heads);
  row.bytes = 4. * static_cast<double>(4 * shape.tensor_floats() + (shape.len == 1 ? 2 * shape.state_floats() : 0));
  row.memory = Memory::cached;
  row.input_floats = static_cast<std::size_t>(3 * shape.tensor_floats() + 2 * shape.map_floats() + shape.state_floats());
  row.output_floats = static_cast<std::size_t>(shape.tensor_floats());
  row.prepare = [shape](const RowMemory& memory) -> std::unique_ptr<PreparedRow> {
    return std::make_unique<PreparedLolcats>(shape, memory);
  };
  return row;
}

}   // namespace

std::vector<Group> lolcats_groups(int max_threads) {
  std::vector<Group> groups(2);
  for (int threads = 1; threads <= std::min(2, max_threads); ++threads) {
    for (const LolcatsWindow shape : {LolcatsWindow::sliding, LolcatsWindow::terraced})
      groups[0].rows.push_back(lolcats_row({.shape = shape, .threads = threads}));
    groups[1].rows.push_back(lolcats_row({.len = 1, .threads = threads}));
  }
  for (Group& group : groups) group.title = group.rows.front().name.substr(0, group.rows.front().name.rfind("/t"));
  return groups;
}

}   // namespace fovea_bench
