// SPDX-License-Identifier: Apache-2.0
// The code of docs/onnx.md, compiled and run: a decode step of 3 keys in use of an external cache of 8.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "fovea/onnx.hpp"

int main() {
  const std::vector<fovea::f16> queries(4 * 16), keys(2 * 8 * 16);
  std::vector<fovea::f16> values(2 * 8 * 16), out(4 * 16);
  for (std::size_t n = 0; n < values.size(); ++n) values[n] = fovea::convert<fovea::f16>(static_cast<float>(n / 16 % 8));
  const fovea::f16 *const q = queries.data(), *const k = keys.data(), *const v = values.data();
  fovea::f16* const y = out.data();

  const std::int64_t q_shape[] = {1, 4, 1, 16}, kv_shape[] = {1, 2, 8, 16}, used_shape[] = {1}, used[] = {3};
  const fovea::Status status = fovea::onnx_attention<fovea::Formats<fovea::Format::f16>>(
      {.is_causal = 1},
      {.q = {q, fovea::OnnxType::f16, q_shape},
       .k = {k, fovea::OnnxType::f16, kv_shape},
       .v = {v, fovea::OnnxType::f16, kv_shape},
       .nonpad_kv_seqlen = {used, fovea::OnnxType::i64, used_shape}},
      {.y = {y, fovea::OnnxType::f16, q_shape}});

  const float first = fovea::convert<float>(y[0]);   // scores of 0: the mean of 0, 1 and 2
  std::printf("onnx: %s, y[0] = %g\n", status.ok() ? "ok" : status.message(), static_cast<double>(first));
  return status.ok() && first == 1.f ? 0 : 1;
}
