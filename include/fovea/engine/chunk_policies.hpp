// SPDX-License-Identifier: Apache-2.0
// What a recurrent mechanism tells the engine, for a run of tokens of one state at a time:
//   S_t = Diag(alpha_t) S_{t-1} + what is written,   o_t = q_t' S_t,   and what leaves.
// The engine multiplies factors in [0, 1] and never subtracts logarithms, so a factor of 0 is exact.
#pragma once
#include "recurrent_run.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// What the factors depend on: nothing, the head, the token, the token and the key channel.
enum class Decayed : std::uint8_t { none, head, token, key };

// additive: k v'.  delta: k (beta (v - S~' k))' on the decayed state S~.  dplr: b (a' S_{t-1})' + k v', read before the decay.
enum class Written : std::uint8_t { additive, delta, dplr };

template <class D>
concept DecayPolicy = requires(const D& d, const ChunkPlace& place, float* to, index_t stride) {
  { D::kind } -> std::convertible_to<Decayed>;
  d.alpha(place, to, stride);   // to[i], or to[i * stride + d] with key decay; not called for none
};

template <class U>
concept UpdatePolicy = requires(const U& u) {
  { U::kind } -> std::convertible_to<Written>;
  // additive: gain(place, to) if kGain: what token i writes is multiplied by to[i].
  // delta:    beta_width() 1 or dim_v; beta(place, first, count, to, stride): to[i] or to[i * stride + n].
  // dplr:     rows(place, k, stride, a, b): a and b are written as k lies, [token, stride].
};

template <class R>
concept ReadPolicy = requires {
  { R::exclusive } -> std::convertible_to<bool>;
  // exclusive: the state before the write is read, and bonus(place, q, k, stride, to): to[i] v_i is added.
};

template <class C>
concept ClosePolicy = requires {
  { C::divides } -> std::convertible_to<bool>;   // divisor(place, i, sum): sum = q . (running sum of k)
  { C::skips } -> std::convertible_to<bool>;     // skip(place, first, count, v, o): o[n] += what passes by the state
};

template <class DecayType, class UpdateType, class ReadType, class CloseType>
struct ChunkSpec {
  using DecayOf = DecayType;
  using UpdateOf = UpdateType;
  using ReadOf = ReadType;
  using CloseOf = CloseType;
  DecayType decay;
  UpdateType update;
  ReadType read;
  CloseType close;
};

template <class Spec>
constexpr bool check_chunk_spec() {
  static_assert(DecayPolicy<typename Spec::DecayOf>, "fovea: a decay needs kind and alpha(place, to, stride); see docs/recurrent.md");
  static_assert(UpdatePolicy<typename Spec::UpdateOf>, "fovea: an update needs kind; see docs/recurrent.md");
  static_assert(ReadPolicy<typename Spec::ReadOf>, "fovea: a readout needs exclusive; see docs/recurrent.md");
  static_assert(ClosePolicy<typename Spec::CloseOf>, "fovea: a close needs divides and skips; see docs/recurrent.md");
  return true;
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
