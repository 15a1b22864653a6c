// SPDX-License-Identifier: Apache-2.0
// What happens to a score between the dot product and the normaliser. Each part is off in its default state, so that one
// instantiation of the engine serves every combination of options; a chain steps aside for its only part that is on.
#pragma once
#include <cmath>

#include "../../core/view.hpp"
#include "../../simd/math.hpp"
#include "../policies.hpp"
#include "masks.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// cap * tanh(s / cap): Gemma 2, Grok. 0 = off.
struct Softcap {
  float cap = 0.f;
  FOVEA_INLINE bool off() const { return cap == 0.f; }

  struct Lane {
    static constexpr bool kAnyPositions = true;
    float cap, inverse;
    FOVEA_INLINE f32 operator()(f32 s, i32) const { return cap == 0.f ? s : tanh(s * f32(inverse)) * f32(cap); }
  };
  FOVEA_INLINE Lane at(const Row&) const { return {cap, cap == 0.f ? 0.f : 1.f / cap}; }
};

// s - slope[q_head] * |pos - key|: Press et al. 2022, arXiv 2108.12409.
struct Alibi {
  const float* slopes = nullptr;   // [q_head]
  FOVEA_INLINE bool off() const { return slopes == nullptr; }

  struct Lane {
    static constexpr bool kAnyPositions = true;
    float minus_slope;
    std::int32_t pos;
    FOVEA_INLINE f32 operator()(f32 s, i32 key) const {
      return minus_slope == 0.f ? s : fma(f32(minus_slope), abs(to_float(key - i32(pos))), s);
    }
  };
  FOVEA_INLINE Lane at(const Row& row) const {
    return {slopes == nullptr ? 0.f : -slopes[row.q_head], static_cast<std::int32_t>(row.pos)};
  }
};

// s + bias[sequence, q_head, q_index, key].
struct Bias {
  View<const float, 4> bias = {};
  FOVEA_INLINE bool off() const { return !bias; }

  struct Lane {
    const float* bias;
    index_t stride, end;
    FOVEA_INLINE f32 operator()(f32 s, i32 pos) const {
      if (bias == nullptr) return s;
      const index_t first = first_lane(pos);
      return fma(load_strided(bias + first * stride, stride, end - first), f32(1.f), s);   // a sum no compiler fuses with s
    }
  };
  FOVEA_INLINE Lane at(const Row& row) const {
    return {bias ? mask_row(bias, row) : nullptr, bias.stride[3], bias.extent[3]};
  }
};

// First, then second.
template <class First, class Second>
struct Then {
  First first;
  Second second;

  struct Lane {
    decltype(std::declval<const First&>().at(std::declval<const Row&>())) first;
    decltype(std::declval<const Second&>().at(std::declval<const Row&>())) second;
    static constexpr bool kAnyPositions = kTakesAnyPositions<decltype(first)> && kTakesAnyPositions<decltype(second)>;
    FOVEA_INLINE f32 operator()(f32 s, i32 pos) const { return second(first(s, pos), pos); }
  };
  FOVEA_INLINE Lane at(const Row& row) const { return {first.at(row), second.at(row)}; }

  Status check(const AttentionShape& shape) const { return check_policies_of(first, second, shape); }
  FOVEA_INLINE bool off() const { return is_off(first) && is_off(second); }
  template <class F>
  FOVEA_INLINE void visit(const F& f) const {
    if (off()) {
      f(Identity{});
    } else if (is_off(first)) {
      visit_simplest(second, f);
    } else if (is_off(second)) {
      visit_simplest(first, f);
    } else {
      f(*this);
    }
  }
};
template <class First, class Second>
Then(First, Second) -> Then<First, Second>;   // clang 14

// One score in plain arithmetic, for references: score_of(score, s, batch, q_head, q, k). A bias has none, it is read by
// the query's index and not by its position.
inline double score_of(const Identity&, double s, int, int, int, int) { return s; }
inline double score_of(const Softcap& c, double s, int, int, int, int) {
  return c.off() ? s : double{c.cap} * std::tanh(s / double{c.cap});
}
inline double score_of(const Alibi& a, double s, int, int q_head, int q, int k) {
  return a.off() ? s : s - double{a.slopes[q_head]} * std::abs(static_cast<double>(q - k));
}
template <class First, class Second>
double score_of(const Then<First, Second>& both, double s, int batch, int q_head, int q, int k) {
  return score_of(both.second, score_of(both.first, s, batch, q_head, q, k), batch, q_head, q, k);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
