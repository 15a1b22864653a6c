// SPDX-License-Identifier: Apache-2.0
// expect: fovea: a normalizer needs State, begin, absorb, merge and finish, or weigh_row
// expect: see docs/policies.md#normalizer
// Decode splits the keys of a row, so a normaliser that cannot add two partial rows up is no normaliser.
#include <fovea/attention.hpp>

struct Identical {
  struct State {};
  State begin(const fovea::Row&, bool) const { return {}; }
  void absorb(State*, const fovea::ScoreRows&, float*) const {}
#if defined(FOVEA_MUST_COMPILE)
  std::array<float, 2> merge(State&, const State&) const { return {1.f, 1.f}; }
#endif
  fovea::Final finish(const State&) const { return {1.f, 0.f}; }
};

int main() {
  const auto linear = fovea::variant().with_normalizer(Identical{});
  return sizeof linear == 0;
}
