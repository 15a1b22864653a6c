// SPDX-License-Identifier: Apache-2.0
// expect: fovea: q, k, v and out have four axes
// expect: [batch, head, pos, dim]
// Tensors without a batch axis: the message names the axes there must be.
#include <fovea/attention.hpp>

int main() {
  const float q[4] = {}, k[4] = {}, v[4] = {};
  float out[4] = {};
#if defined(FOVEA_MUST_COMPILE)
  const auto view = [](auto* data) { return fovea::bhsd(data, 1, 1, 1, 4); };
#else
  const auto view = []<class T>(T* data) { return fovea::View<T, 3>{data, {1, 1, 4}, {4, 4, 1}}; };
#endif
  return fovea::attention(view(q), view(k), view(v), view(out), {.causal = fovea::Causal::top_left}).ok() ? 0 : 1;
}
