// SPDX-License-Identifier: Apache-2.0
// The code of the pages in docs/mechanisms/, compiled and run once.
#include <cmath>
#include <cstdio>
#include <vector>

#include "fovea/attention.hpp"
#include "fovea/mechanisms/entmax.hpp"
#include "fovea/mechanisms/multi_token.hpp"
#include "fovea/mechanisms/relative_bias.hpp"
#include "fovea/mechanisms/shaw.hpp"
#include "fovea/mechanisms/transformer_xl.hpp"

namespace {

using fovea::index_t;
constexpr index_t heads = 2, len = 24, dim = 8, model_dim = 16;
const fovea::AttentionShape shape{1, heads, heads, len, len, dim, dim};
const fovea::AttentionOptions options;

using In = const fovea::Tensor<const float>&;
using Out = const fovea::Tensor<float>&;

void entmax(In q, In k, In v, Out out) {
  fovea::attention(q, k, v, out, options, fovea::sparsemax()).or_throw();
  fovea::attention(q, k, v, out, options, fovea::entmax15()).or_throw();
  fovea::attention(q, k, v, out, options, fovea::entmax(1.25f)).or_throw();                  // 1 < alpha <= 4
  fovea::attention(q, k, v, out, options, fovea::entmax15().with_options()).or_throw();      // softcap, ALiBi, bias, keep
}

void multi_token(In q, In k, In v, Out out) {
  const std::vector<float> pre(heads * 66, 0.01f), post(heads * 66, 0.01f);
  fovea::MultiTokenOptions mta;
  mta.pre = {pre.data(), {heads, 6, 11}, {66, 11, 1}};
  mta.post = {post.data(), {heads, 6, 11}, {66, 11, 1}};
  fovea::multi_token_attention(q, k, v, out, mta).or_throw();
}

void relative_bias(In q, In k, In v, Out out) {
  const std::vector<float> numbers(32 * heads, 0.5f);
  const fovea::View<const float, 2> weight{numbers.data(), {32, heads}, {heads, 1}};
  fovea::DistanceBias bias;
  std::vector<float> floats(fovea::t5_bias_floats(heads, {}));
  fovea::t5_bias(weight, {}, floats, bias).or_throw();   // weight [bucket, q_head], once per model
  fovea::attention(q, k, v, out, {.scale = 1.f}, fovea::relative_bias(bias)).or_throw();
}

void shaw(In q, In k, In v, Out out) {
  const std::vector<float> numbers(9 * dim, 0.25f);
  const fovea::View<const float, 3> a_k{numbers.data(), {1, 9, dim}, {9 * dim, dim, 1}}, a_v = a_k;
  const fovea::ShawTables tables{a_k, a_v};   // [1 | q_head, 2 K + 1, dim]
  std::vector<std::byte> workspace(fovea::shaw_workspace_bytes(shape, tables));
  fovea::shaw_attention(q, k, v, out, tables, {.causal = fovea::Causal::top_left, .workspace = workspace}).or_throw();
}

void transformer_xl(In q, In k, In v, Out out) {
  const std::vector<float> numbers(len * dim, 0.25f), biases(heads * dim, 0.5f);
  const fovea::View<const float, 3> r{numbers.data(), {1, len, dim}, {len * dim, dim, 1}};
  const fovea::View<const float, 2> content_bias{biases.data(), {heads, dim}, {dim, 1}}, position_bias = content_bias;
  std::vector<float> encoding(static_cast<std::size_t>(len * model_dim));
  fovea::xl_sinusoids(0, {encoding.data(), {len, model_dim}, {model_dim, 1}}).or_throw();   // row d: distance d
  const fovea::XlTables tables{r, 0, content_bias, position_bias};                          // r [1 | q_head, distance, dim]
  fovea::AttentionOptions causal{.causal = fovea::Causal::bottom_right};
  std::vector<std::byte> workspace(fovea::transformer_xl_workspace_bytes(shape, tables, causal));
  causal.workspace = workspace;
  fovea::transformer_xl_attention(q, k, v, out, tables, causal).or_throw();
}

}  // namespace

int main() {
  std::vector<float> numbers(static_cast<std::size_t>(heads * len * dim)), results(numbers.size());
  for (std::size_t n = 0; n < numbers.size(); ++n) numbers[n] = std::sin(static_cast<float>(n));
  const auto x = fovea::bhsd<const float>(numbers.data(), 1, heads, len, dim);
  const auto out = fovea::bhsd(results.data(), 1, heads, len, dim);
  int wrong = 0;
  for (const auto mechanism : {&entmax, &multi_token, &relative_bias, &shaw, &transformer_xl}) {
    std::fill(results.begin(), results.end(), std::nanf(""));
    mechanism(x, x, x, out);
    for (const float y : results) wrong += !std::isfinite(y);
  }
  std::printf("%d of the numbers written are not finite\n", wrong);
  return wrong != 0;
}
