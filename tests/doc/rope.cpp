// SPDX-License-Identifier: Apache-2.0
// The code of docs/mechanisms/rope.md, against the formula.
#include <cmath>
#include <cstdio>
#include <vector>

#include <fovea/engine/parts/rope.hpp>

int main() {
  const fovea::index_t len = 6, first_pos = 2, heads = 3, dim = 128;
  std::vector<float> q_data(static_cast<std::size_t>((len - first_pos) * heads * dim));
  for (std::size_t n = 0; n < q_data.size(); ++n) q_data[n] = std::sin(static_cast<float>(n));
  const std::vector<float> before = q_data;
  const auto q = fovea::bshd(q_data.data(), 1, len - first_pos, heads, dim);   // [1, head, pos, dim]

  std::vector<double> inv_freq(64);
  float attention_factor = 0;
  const fovea::RopeOptions options{
      .rotary_dim = 128, .base = 5e5, .scaling = fovea::RopeScaling::llama3, .factor = 8, .original_len = 8192};
  fovea::rope_frequencies(options, inv_freq, attention_factor).or_throw();
  std::vector<float> memory(static_cast<std::size_t>(fovea::rope_table_floats(len, 128)));
  fovea::RopeTable table;
  fovea::make_rope_table(table, inv_freq, attention_factor, 0, len, memory).or_throw();
  fovea::rotate(q, {.start = first_pos}, table, fovea::RopeLayout::half_split).or_throw();

  // Frequencies of Llama 3.1: short wavelengths stay, long ones are stretched 8 times.
  if (inv_freq[0] != 1. || std::abs(inv_freq[63] * 8 - std::pow(5e5, -126. / 128)) > 1e-12) return 1;
  for (fovea::index_t pos = 0; pos < q.extent[2]; ++pos) {
    for (fovea::index_t head = 0; head < heads; ++head) {
      const float* const x = before.data() + (pos * heads + head) * dim;
      for (fovea::index_t pair = 0; pair < 64; ++pair) {
        const double angle = static_cast<double>(first_pos + pos) * inv_freq[static_cast<std::size_t>(pair)];
        const double a = double{x[pair]}, b = double{x[pair + 64]};
        const double error = std::abs(double{q(0, head, pos, pair)} - (a * std::cos(angle) - b * std::sin(angle))) +
                             std::abs(double{q(0, head, pos, pair + 64)} - (b * std::cos(angle) + a * std::sin(angle)));
        if (!(error <= 1e-6)) {
          std::printf("position %td, head %td, pair %td: off by %g\n", first_pos + pos, head, pair, error);
          return 1;
        }
      }
    }
  }
  return 0;
}
