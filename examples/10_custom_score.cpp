// SPDX-License-Identifier: Apache-2.0
// A score of your own: a function of the score, the batch entry, the query head and the positions of query and key. It
// becomes part of the tile loop; the same text, called with plain numbers, is its own reference in double.
#include <fovea/mechanisms/relative_bias.hpp>
#include <fovea/reference/variant.hpp>

#include "example.hpp"

namespace {

using fovea::index_t;

constexpr index_t kHeads = 4, kLen = 96, kDim = 32;

struct Tensors {
  std::vector<float> numbers = example::random_values(3 * kHeads * kLen * kDim, 1),
                     result = std::vector<float>(kHeads * kLen * kDim);
  fovea::Tensor<const float> q = at(0), k = at(1), v = at(2);
  fovea::Tensor<float> out = fovea::bhsd(result.data(), 1, kHeads, kLen, kDim);

  fovea::Tensor<const float> at(index_t n) const {
    return fovea::bhsd(numbers.data() + n * kHeads * kLen * kDim, 1, kHeads, kLen, kDim);
  }
};

// Runs the variant, and `score` in the double reference.
template <class Variant, class Score>
int check(const char* what, Tensors& x, const Variant& variant, const Score& score) {
  const fovea::AttentionOptions causal{.causal = fovea::Causal::top_left};
  if (example::refused(fovea::attention(x.q, x.k, x.v, x.out, causal, variant))) return 1;
  std::vector<double> expected(x.result.size());
  const auto visible = [](int, int, int, int) { return true; };
  fovea::reference::variant(x.q, x.k, x.v, fovea::bhsd(expected.data(), 1, kHeads, kLen, kDim), causal, score, visible,
                            fovea::reference::SoftmaxWeights{});
  double largest = 0;
  for (std::size_t n = 0; n < expected.size(); ++n) {
    const double difference = std::abs(double{x.result[n]} - expected[n]);
    if (!(difference <= largest)) largest = difference;
  }
  return example::verdict(what, largest);
}

}   // namespace

int main() {
  Tensors x;
  int wrong = 0;

  // Arithmetic, comparisons, and the functions of fovea/simd/lookup.hpp work on vectors of scores and on plain numbers. Here
  // tanh bounds the score, and keys beyond a distance of 16 count less.
  const auto bounded = [](auto s, int, int, int q, auto k) {
    const auto far = fovea::max(fovea::to_float(q - k) - 16.f, decltype(s)(0.f));
    return 20.f * fovea::tanh(s * 0.05f) - 0.125f * far;
  };
  wrong += check("tanh and a distance", x, fovea::variant().with_score(bounded), bounded);

  // Data of yours: a table per head, looked up by distance. Indices outside of a table are moved to its nearest end.
  const std::vector<float> bias = example::random_values(kHeads * 32, 2);
  const auto looked_up = [&](auto s, int, int q_head, int q, auto k) {
    return s + fovea::lookup(std::span<const float>(bias).subspan(static_cast<std::size_t>(q_head) * 32, 32), q - k);
  };
  wrong += check("a table by distance", x, fovea::variant().with_score(looked_up), looked_up);

  // The library's own bias by distance says the same to the tile loop in one load: keys are neighbours, so distances are.
  // Its distances are key - query: from -31 up to 0.
  fovea::DistanceBias ready;
  std::vector<float> memory(fovea::distance_bias_floats(kHeads, 32));
  if (example::refused(fovea::distance_bias({bias.data() + 31, {kHeads, 32}, {32, -1}}, -31, memory, ready))) return 1;
  wrong += check("the same, by the library", x, fovea::relative_bias(ready), looked_up);
  return wrong;
}
