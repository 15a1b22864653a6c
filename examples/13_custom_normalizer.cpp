// SPDX-License-Identifier: Apache-2.0
// A normaliser of one's own: squared ReLU, p_j = relu(s_j)^2, without a sum. It runs through the same tile loop as softmax, in
// prefill, in decode with split keys, over any cache.
#include "example.hpp"

struct SquaredRelu {
  struct State {};   // nothing is carried from one key tile to the next

  State begin(const fovea::Row&, bool) const { return {}; }

  // Scores of a few rows become weights in place; masked ones are -inf and must become 0.
  void absorb(State*, const fovea::ScoreRows& scores, float* rescale) const {
    for (fovea::index_t r = 0; r < scores.rows; ++r) {
      float* const s = scores.row(r).data();
      for (fovea::index_t j = 0; j < scores.count; j += fovea::kLanes) {
        const fovea::f32 positive = fovea::max(fovea::load(s + j), fovea::f32(0.f));
        fovea::store(s + j, positive * positive);
      }
      rescale[r] = 1.f;   // earlier weights of the row keep their size
    }
  }
  std::array<float, 2> merge(State&, const State&) const { return {1.f, 1.f}; }   // split keys: partial rows just add
  fovea::Final finish(const State&) const { return {1.f, 0.f}; }                  // the accumulator is the output
};

int main() {
  const fovea::index_t heads = 4, len = 200, dim = 32, size = heads * len * dim;
  const std::vector<float> q_data = example::random_values(size, 1), k_data = example::random_values(size, 2),
                           v_data = example::random_values(size, 3);
  std::vector<float> out_data(q_data.size());
  const auto q = fovea::bhsd(q_data.data(), 1, heads, len, dim), k = fovea::bhsd(k_data.data(), 1, heads, len, dim),
             v = fovea::bhsd(v_data.data(), 1, heads, len, dim);
  const auto out = fovea::bhsd(out_data.data(), 1, heads, len, dim);

  const auto squared_relu = fovea::variant().with_normalizer(SquaredRelu{});
  const fovea::AttentionOptions options{.causal = fovea::Causal::top_left};
  if (example::refused(fovea::attention(q, k, v, out, options, squared_relu))) return 1;

  const double error = example::difference(out, [&](fovea::Tensor<double> to) {
    const auto same_score = [](double s, int, int, int, int) { return s; };
    const auto all = [](int, int, int, int) { return true; };
    fovea::reference::variant(q, k, v, to, options, same_score, all, [](std::span<double> scores) {
      for (double& s : scores) s = s > 0 ? s * s : 0;
    });
  });
  return example::verdict("squared ReLU", error, 2e-5);   // outputs are sums of up to 200 values here, not averages
}
