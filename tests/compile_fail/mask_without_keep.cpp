// SPDX-License-Identifier: Apache-2.0
// expect: fovea: a mask needs
// expect: see docs/policies.md#mask
// A mask that knows its tiles but not its lanes: the message names the policy, its signature and the page that explains it.
#include <fovea/engine/policies.hpp>

namespace {

struct Source {
  fovea::Run run(const fovea::Row&, fovea::index_t, fovea::index_t) const { return {}; }
};

struct EvenKeysOnly {
  fovea::KeyRange hull(std::span<const fovea::Row>) const { return {0, 1}; }
  fovea::Cover cover(const fovea::Tile&) const { return fovea::Cover::partial; }
#if defined(FOVEA_MUST_COMPILE)
  struct Lane {
    fovea::keep_t operator()(fovea::i32 pos) const { return fovea::as_keep((pos & fovea::i32(1)) == fovea::i32(0)); }
  };
  Lane at(const fovea::Row&) const { return {}; }
#endif
};

struct Sum {
  struct State {};
  State begin(const fovea::Row&, bool) const { return {}; }
  void absorb(State*, const fovea::ScoreRows&, float*) const {}
  std::array<float, 2> merge(State&, const State&) const { return {1.f, 1.f}; }
  fovea::Final finish(const State&) const { return {1.f, 0.f}; }
};

struct Drop {
  void store(const fovea::Row&, std::span<const float>, fovea::Final) const {}
};

}  // namespace

int main() {
  using Spec = fovea::TileSpec<Source, fovea::Identity, EvenKeysOnly, Sum, fovea::NoTap, Drop>;
  return fovea::check_policies<Spec>() ? 0 : 1;
}
