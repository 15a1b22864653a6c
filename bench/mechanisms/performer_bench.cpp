// SPDX-License-Identifier: Apache-2.0
// Performer with dim ln dim features on heads of 128 numbers: a prompt, and one token, whose state is updated in place.
#include "fovea/mechanisms/performer.hpp"

#include <cmath>

#include "fovea/reference/performer.hpp"
#include "support/rows.hpp"

namespace fovea_bench {

namespace {

using fovea::index_t;

struct PerformerShape {
  index_t len = 4096, heads = 8, dim = 128, features = 621;
  fovea::PerformerKernel kernel = fovea::PerformerKernel::softmax;
  int threads = 1;

  index_t tensor_floats() const { return heads * len * dim; }
  index_t state_floats() const { return heads * features * (dim + 1); }
  // W q and W k, then the chunk form at chunks of 32 with one column more for the sum.
  double flops_of_token() const {
    return static_cast<double>(4 * features * dim + 4 * features * (dim + 1) + 32 * (features + dim + 1));
  }
};

class PreparedPerformer final : public PreparedRow {
 public:
  PreparedPerformer(const PerformerShape& shape, const RowMemory& memory) : s_(shape) {
    const float* from = memory.inputs.data();
    const auto next = [&] {
      const auto view = fovea::bhsd(from, 1, s_.heads, s_.len, s_.dim);
      from += s_.tensor_floats();
      return view;
    };
    q_ = next(), k_ = next(), v_ = next();
    out_ = fovea::bhsd(memory.outputs.data(), 1, s_.heads, s_.len, s_.dim);
    projection_.resize(static_cast<std::size_t>(s_.features * s_.dim));
    const fovea::View<float, 2> w{projection_.data(), {s_.features, s_.dim}, {s_.dim, 1}};
    status_ = fovea::draw_projection(1, w);
    options_.projection = w;
    options_.kernel = s_.kernel;
    stabiliser_.assign(static_cast<std::size_t>(s_.heads), 2.f);
    if (s_.kernel == fovea::PerformerKernel::softmax)
      options_.key_stabiliser = {stabiliser_.data(), {1, s_.heads}, {s_.heads, 1}};
    how_.executor = fovea::Executor(*memory.pool, s_.threads);
    if (s_.len > 1) return;
    kept_.assign(from, from + s_.state_floats());
    how_.final_state = fovea::bhsd(kept_.data(), 1, s_.heads, s_.features, s_.dim);
    how_.initial_state = how_.final_state;
    float* const sum = kept_.data() + s_.heads * s_.features * s_.dim;
    for (index_t n = 0; n < s_.heads * s_.features; ++n) sum[n] = 1.f + std::abs(sum[n]);
    linear_.final_key_sum = {sum, {1, s_.heads, s_.features}, {s_.heads * s_.features, s_.features, 1}};
    linear_.initial_key_sum = linear_.final_key_sum;
  }
  void call() override { status_ = fovea::performer(q_, k_, v_, out_, options_, linear_, how_); }
  // The first tokens of the first head; a state that is updated in place has moved on.
  double max_error() override {
    if (s_.len == 1) return 0;
    constexpr index_t kCompared = 100;
    const auto doubles = [](const float* x, index_t count) { return std::vector<double>(x, x + count); };
    const std::vector<double> q = doubles(q_.data, kCompared * s_.dim), k = doubles(k_.data, kCompared * s_.dim),
                              v = doubles(v_.data, kCompared * s_.dim),
                              w = doubles(projection_.data(), s_.features * s_.dim);
    std::vector<double> out(q.size());
    const double stabiliser = double{stabiliser_[0]};
    const bool relu = s_.kernel == fovea::PerformerKernel::relu;
    const auto view = [&](const std::vector<double>& x) { return fovea::bhsd(x.data(), 1, 1, kCompared, s_.dim); };
    fovea::reference::performer(view(q), view(k), view(v), fovea::bhsd(out.data(), 1, 1, kCompared, s_.dim),
                                {.w = {w.data(), {s_.features, s_.dim}, {s_.dim, 1}},
                                 .relu = relu,
                                 .eps = relu ? 1e-3 : 1e-4,
                                 .key_stabiliser = {&stabiliser, {1, 1}, {1, 1}}},
                                {});
    double worst = 0;
    for (std::size_t n = 0; n < out.size(); ++n) worst = std::max(worst, std::abs(double{out_.data[n]} - out[n]));
    return worst;
  }
  std::string refusal() override { return status_.ok() ? "" : status_.message(); }

 private:
  PerformerShape s_;
  fovea::Tensor<const float> q_, k_, v_;
  fovea::Tensor<float> out_;
  std::vector<float> projection_, stabiliser_, kept_;
  fovea::PerformerOptions options_;
  fovea::LinearOptions<float> linear_;
  fovea::RecurrentOptions<float> how_;
  fovea::Status status_;
};

Row performer_row(const PerformerShape& shape) {
  Row row;
  row.name = std::string("recurrent/performer/") + (shape.len == 1 ? "decode" : "prefill") + "/f32/d" +
             std::to_string(shape.dim) + "/f" + std::to_string(shape.features) + "/t" + std::to_string(shape.len) + "/h" +
             std::to_string(shape.heads) + "/t" + std::to_string(shape.threads) +
             (shape.kernel == fovea::PerformerKernel::relu ? "/relu" : "/softmax");
  row.suites = kRecurrent;
  row.threads = shape.threads;
  row.flops = shape.flops_of_token() * static_cast<double>(shape.len * shape.heads);
  row.bytes = 4. * static_cast<double>(4 * shape.tensor_floats() + (shape.len == 1 ? 2 * shape.state_floats() : 0));
  row.memory = Memory::cached;
  row.input_floats = static_cast<std::size_t>(3 * shape.tensor_floats() + shape.state_floats());
  row.output_floats = static_cast<std::size_t>(shape.tensor_floats());
  row.prepare = [shape](const RowMemory& memory) -> std::unique_ptr<PreparedRow> {
    return std::make_unique<PreparedPerformer>(shape, memory);
  };
  return row;
}

}   // namespace

std::vector<Group> performer_groups(int max_threads) {
  std::vector<Group> groups(2);
  for (int threads = 1; threads <= std::min(2, max_threads); ++threads) {
    for (const auto kernel : {fovea::PerformerKernel::softmax, fovea::PerformerKernel::relu})
      groups[0].rows.push_back(performer_row({.kernel = kernel, .threads = threads}));
    groups[1].rows.push_back(performer_row({.len = 1, .threads = threads}));
  }
  for (Group& group : groups) group.title = group.rows.front().name.substr(0, group.rows.front().name.rfind("/t"));
  return groups;
}

}   // namespace fovea_bench
