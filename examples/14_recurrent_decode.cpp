// SPDX-License-Identifier: Apache-2.0
// Gated DeltaNet, prompt then tokens: one state per value head carries all of the past. The prompt goes through in chunks of
// tokens, each new token in one read and write of the state where it lies. Two sequences, 2 key heads for 4 value heads.
#include <fovea/mechanisms/gated_delta.hpp>
#include <fovea/reference/gated_delta.hpp>

#include "example.hpp"

namespace {

using fovea::index_t;
constexpr index_t sequences = 2, k_heads = 2, v_heads = 4, len = 96, prompt = 80, dim = 32;

// Positions [begin, end) of a tensor or a gate: the same numbers, seen through a narrower view.
template <class T>
fovea::Tensor<T> positions(fovea::Tensor<T> x, index_t begin, index_t end) {
  x.data += begin * x.stride[2];
  x.extent[2] = end - begin;
  return x;
}

}   // namespace

int main() {
  const std::vector<float> q_data = example::random_values(sequences * k_heads * len * dim, 1);
  std::vector<float> k_data = example::random_values(sequences * k_heads * len * dim, 2);
  const std::vector<float> v_data = example::random_values(sequences * v_heads * len * dim, 3);
  for (std::size_t row = 0; row < k_data.size(); row += dim) {   // the delta rule wants keys of length 1
    float sum = 0;
    for (std::size_t d = 0; d < dim; ++d) sum += k_data[row + d] * k_data[row + d];
    for (std::size_t d = 0; d < dim; ++d) k_data[row + d] /= std::sqrt(sum + 1e-6f);
  }
  std::vector<float> g_data = example::random_values(sequences * v_heads * len, 4), beta_data = g_data;
  for (float& g : g_data) g = -0.1f * std::abs(g);       // natural logarithm of the decay, one per head and token
  for (float& beta : beta_data) beta = (beta + 1) / 2;   // how much of the error is corrected

  const auto q = fovea::bhsd(q_data.data(), sequences, k_heads, len, dim);
  const fovea::Tensor<const float> k = fovea::bhsd(k_data.data(), sequences, k_heads, len, dim);
  const auto v = fovea::bhsd(v_data.data(), sequences, v_heads, len, dim);
  const fovea::Tensor<const float> gate = fovea::bhsd(g_data.data(), sequences, v_heads, len, 1);
  const fovea::Tensor<const float> beta = fovea::bhsd(beta_data.data(), sequences, v_heads, len, 1);
  std::vector<float> out_data(v_data.size()), state_data(sequences * v_heads * dim * dim, 0.f);   // zeros: nothing seen yet
  const auto out = fovea::bhsd(out_data.data(), sequences, v_heads, len, dim);
  const auto state = fovea::bhsd(state_data.data(), sequences, v_heads, dim, dim);

  // The state is updated in place; V-first is the layout that decode reads in one sweep.
  const fovea::RecurrentOptions<float> options{
      .layout = fovea::StateLayout::v_first, .initial_state = state, .final_state = state};
  fovea::RecurrentPlan plan;
  fovea::RecurrentOptions<float> asking = options;
  asking.plan = &plan;   // filled by every call
  for (index_t begin = 0; begin < len;) {
    const index_t end = begin == 0 ? prompt : begin + 1;
    const fovea::Status status = fovea::gated_delta_net(positions(q, begin, end), positions(k, begin, end),
                                                        positions(v, begin, end), {positions(gate, begin, end)},
                                                        positions(beta, begin, end), positions(out, begin, end), asking);
    if (example::refused(status)) return 1;
    if (begin == 0 || end == len) std::printf("%s tokens:\n%s", begin == 0 ? "the prompt's" : "later", fovea::describe(plan).c_str());
    begin = end;
  }
  std::printf("%td tokens of prompt, %td one by one; %zu bytes of state\n", prompt, len - prompt,
              state_data.size() * sizeof(float));

  // Against one pass over everything, in double.
  const auto doubles = [](const std::vector<float>& x) { return std::vector<double>(x.begin(), x.end()); };
  const auto q2 = doubles(q_data), k2 = doubles(k_data), v2 = doubles(v_data), g2 = doubles(g_data), b2 = doubles(beta_data);
  const auto tensor = [](const std::vector<double>& x, index_t heads, index_t n) {
    return fovea::bhsd(x.data(), sequences, heads, len, n);
  };
  return example::verdict("prefill and decode", example::difference(out, [&](fovea::Tensor<double> to) {
                            fovea::reference::gated_delta(tensor(q2, k_heads, dim), tensor(k2, k_heads, dim),
                                                          tensor(v2, v_heads, dim), {tensor(g2, v_heads, 1)},
                                                          tensor(b2, v_heads, 1), to);
                          }));
}
