// SPDX-License-Identifier: Apache-2.0
// expect: fovea: a tensor holds float, double, fovea::bf16 or fovea::f16
// A tensor of another number type: the message names those there are.
#include <fovea/attention.hpp>

#if defined(FOVEA_MUST_COMPILE)
#define ELEMENT float
#else
#define ELEMENT int
#endif

int main() {
  const ELEMENT q[4] = {}, k[4] = {}, v[4] = {};
  float out[4] = {};
  const fovea::View<const ELEMENT, 4> q_view{q, {1, 1, 1, 4}, {4, 4, 4, 1}};
  const fovea::View<const ELEMENT, 4> k_view{k, {1, 1, 1, 4}, {4, 4, 4, 1}};
  const fovea::View<const ELEMENT, 4> v_view{v, {1, 1, 1, 4}, {4, 4, 4, 1}};
  return fovea::attention(q_view, k_view, v_view, fovea::bhsd(out, 1, 1, 1, 4)).ok() ? 0 : 1;
}
