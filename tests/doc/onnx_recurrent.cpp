// SPDX-License-Identifier: Apache-2.0
// The recurrent code of docs/onnx.md, compiled and run: a decode step of LinearAttention that updates its state in place.
#include "fovea/onnx_recurrent.hpp"

#include <cstdint>
#include <cstdio>
#include <vector>

int main() {
  const std::vector<fovea::f16> ones(32, fovea::convert<fovea::f16>(1.f)), zeros(2);
  std::vector<fovea::f16> out(32);
  std::vector<float> cells(2 * 16 * 16, 0.5f);
  const fovea::f16 *const q = ones.data(), *const k = ones.data(), *const v = ones.data();
  const fovea::f16 *const decay = zeros.data(), *const beta = zeros.data();   // e^0: all is kept; 0: nothing is written
  fovea::f16* const y = out.data();
  float* const state = cells.data();

  const std::int64_t packed[] = {1, 1, 32}, states[] = {1, 2, 16, 16}, per_head[] = {1, 1, 2};
  const fovea::Status status = fovea::onnx_linear_attention(
      {.q_num_heads = 2, .kv_num_heads = 2},
      {.query = {q, fovea::OnnxType::f16, packed},
       .key = {k, fovea::OnnxType::f16, packed},
       .value = {v, fovea::OnnxType::f16, packed},
       .past_state = {state, fovea::OnnxType::f32, states},
       .decay = {decay, fovea::OnnxType::f16, per_head},
       .beta = {beta, fovea::OnnxType::f16, per_head}},
      {.output = {y, fovea::OnnxType::f16, packed}, .present_state = {state, fovea::OnnxType::f32, states}});

  const float first = fovea::convert<float>(y[0]);   // 16 times 1 times 0.5, times 1/sqrt(16)
  std::printf("onnx_recurrent: %s, y[0] = %g\n", status.ok() ? "ok" : status.message(), static_cast<double>(first));
  return status.ok() && first == 2.f && cells[0] == 0.5f ? 0 : 1;
}
