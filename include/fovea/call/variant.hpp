// SPDX-License-Identifier: Apache-2.0
// A variant: the policies of one attention, to be handed to fovea::attention as its last argument. Everything the options say
// about places, lengths, scale, causality and windows holds for every variant.
//
//   auto tanh_bounded = fovea::variant().with_score([](auto s, int, int, int, auto) { return 20.f * fovea::tanh(s * 0.05f); });
//   fovea::attention(q, k, v, out, {.causal = fovea::Causal::bottom_right}, tanh_bounded);
#pragma once
#include "../engine/parts/functions.hpp"
#include "call.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// The default normaliser: the softmax that the options describe, with their sink and LSE.
struct OptionSoftmax {};
// The default of what happens to a finished row: nothing.
struct AsIs {};

template <class N>
concept HasLse = requires { requires N::kHasLse; };
template <class C>
concept NeedsLse = requires { requires C::kNeedsLse; };

// Policies are kept by value; what they point at must outlive the call (with prepare: the run, and the variant too).
// kAllOptions: softcap, ALiBi, bias, keep and draft trees of the options act before the score and beside the mask, for 2 to 5 %
// of the time. Without it they are refused.
template <class Score = Identity, class MaskPolicy = Everything, class Norm = OptionSoftmax, class Watch = NoTap,
          class Close = AsIs, bool kAllOptions = false>
struct Variant {
  Score score{};       // after scale (and with_options: softcap, ALiBi, bias)
  MaskPolicy mask{};   // beside causality and windows
  Norm norm{};
  Watch tap{};
  Close close{};       // (OutRow, span<float>, Final): changes a finished row before it is stored (parts/epilogues.hpp)

  // A policy (engine/policies.hpp), or a callable f(s, batch, q_head, q, k).
  template <class S>
  constexpr auto with_score(S changed) const {
    if constexpr (ScoreMod<S>) {
      return Variant<S, MaskPolicy, Norm, Watch, Close, kAllOptions>{changed, mask, norm, tap, close};
    } else {
      static_assert(std::is_invocable_r_v<f32, const S&, f32, int, int, int, i32>,
                    "fovea: a score is a policy or a callable f(s, batch, q_head, q, k) that takes vectors s and k; "
                    "see docs/variants.md#functors");
      return with_score(ScoreFunction<S>{changed});
    }
  }
  // A policy, or a callable f(batch, q_head, q, k).
  template <class M>
  constexpr auto with_mask(M changed) const {
    if constexpr (Mask<M>) {
      return Variant<Score, M, Norm, Watch, Close, kAllOptions>{score, changed, norm, tap, close};
    } else {
      static_assert(std::is_invocable_v<const M&, int, int, int, i32>,
                    "fovea: a mask is a policy or a callable f(batch, q_head, q, k) that takes a vector k; "
                    "see docs/variants.md#functors");
      return with_mask(MaskFunction<M>{changed});
    }
  }
  template <class N>
  constexpr auto with_normalizer(N changed) const {
    static_assert(Normalizer<N> || WholeRowNormalizer<N>,
                  "fovea: a normalizer needs State, begin, absorb, merge and finish, or weigh_row; "
                  "see docs/policies.md#normalizer");
    return Variant<Score, MaskPolicy, N, Watch, Close, kAllOptions>{score, mask, changed, tap, close};
  }
  template <class T>
  constexpr auto with_tap(T changed) const {
    static_assert(Tap<T>, "fovea: a tap needs absorb and finish; see docs/policies.md#tap");
    return Variant<Score, MaskPolicy, Norm, T, Close, kAllOptions>{score, mask, norm, changed, close};
  }
  template <class C>
  constexpr auto with_close(C changed) const {
    static_assert(std::is_invocable_v<const C&, OutRow, std::span<float>, Final>,
                  "fovea: a closing is a callable f(OutRow, span<float>, Final); see docs/policies.md#epilogue");
    return Variant<Score, MaskPolicy, Norm, Watch, C, kAllOptions>{score, mask, norm, tap, changed};
  }
  constexpr auto with_options() const {
    return Variant<Score, MaskPolicy, Norm, Watch, Close, true>{score, mask, norm, tap, close};
  }
};

constexpr Variant<> variant() { return {}; }

template <class V>
struct VariantTraits;
template <class Score, class MaskPolicy, class Norm, class Watch, class Close, bool kAllOptions>
struct VariantTraits<Variant<Score, MaskPolicy, Norm, Watch, Close, kAllOptions>> {
  using V = Variant<Score, MaskPolicy, Norm, Watch, Close, kAllOptions>;
  static constexpr bool kSoftmax = std::is_same_v<Norm, OptionSoftmax>;

  static Status check_options(const AttentionOptions& o) {
    if constexpr (!kAllOptions) {
      if (o.softcap != 0.f || !o.alibi_slopes.empty() || o.bias || o.keep || !o.tree.empty())
        return door::unsupported(
            "fovea: this variant leaves softcap (%g), alibi_slopes (%zu), bias, keep and tree out; compose them into its score "
            "and mask, or call with_options()",
            static_cast<double>(o.softcap), o.alibi_slopes.size());
    }
    if constexpr (!kSoftmax) {
      if (!o.sink.empty())
        return door::unsupported("fovea: a sink (%zu logits) belongs to softmax, this variant has another normaliser",
                                 o.sink.size());
      if constexpr (!HasLse<Norm>) {
        if (o.lse && Normalizer<Norm>)
          return door::unsupported(
              "fovea: this variant's normaliser has no sum, so there is no LSE; results over parts of the keys merge by "
              "merge_added");
        if (o.lse)
          return door::unsupported(
              "fovea: no LSE: this variant's normaliser weighs whole rows, so results over parts of the keys cannot be merged");
      }
    }
    return {};
  }
  static Status check(const V& v, const AttentionShape& shape) {
    if (Status s = check_policies_of(v.score, v.mask, shape); !s.ok()) return s;
    if (Status s = check_policies_of(v.norm, v.tap, shape); !s.ok()) return s;
    return check_policy(v.close, shape);
  }
  static Status check_erased(const void* v, const AttentionShape& shape) { return check(*static_cast<const V*>(v), shape); }

  static constexpr door::Needs needs() {
    constexpr bool kStrip = !kSoftmax && !Normalizer<Norm>;
    static_assert(kSoftmax || HasLse<Norm> || !NeedsLse<Close>,
                  "fovea: this closing needs the LSE of the row, and the normalizer has none; see docs/variants.md");
    return {std::is_same_v<Watch, NoTap> && !kStrip, kStrip, &check_options};
  }

  // The policies of a lane of `run`, over any source of its keys.
  template <class Source>
  static auto spec_of(const AttentionRun& run, const Source& source) {
    const V& v = *static_cast<const V*>(run.variant);
    const auto score = [&] {
      if constexpr (!kAllOptions) {
        return v.score;
      } else if constexpr (std::is_same_v<Score, Identity>) {
        return run.score;
      } else {
        return Then<OptionScore, Score>{run.score, v.score};
      }
    };
    const auto mask = [&] {
      constexpr bool kOwn = !std::is_same_v<MaskPolicy, Everything>;
      if constexpr (kAllOptions && kOwn) {
        return Both<OptionMask, MaskPolicy>{run.mask, v.mask};
      } else if constexpr (kAllOptions) {
        return run.mask;
      } else if constexpr (kOwn) {
        return Both<Band, MaskPolicy>{run.mask.first, v.mask};
      } else {
        return run.mask.first;
      }
    };
    const auto norm = [&] {
      if constexpr (kSoftmax) {
        Softmax softmax = run.norm;
        softmax.with_lse = softmax.with_lse || NeedsLse<Close>;
        return softmax;
      } else {
        return v.norm;
      }
    };
    const auto epilogue = [&] {
      if constexpr (std::is_same_v<Close, AsIs>) {
        return run.epilogue;
      } else {
        return Closing<Close>{run.epilogue, v.close};
      }
    };
    return TileSpec{source, score(), mask(), norm(), v.tap, epilogue()};
  }
  template <class PanelType>
  static void lane(AttentionRun& run, int lane) {
    tile_lane<PanelType>(run, lane, spec_of(run, run.source));
  }
};

template <class V>
concept AnyVariant = requires { VariantTraits<V>::needs(); };

namespace door {
template <class Compiled, class V>
Call call_of_variant(const Operand& q, const Kv& kv, const Result& out, const AttentionOptions& options, const V& variant) {
  Call call = call_of<VariantTraits<V>, Compiled>(q, kv, out, options);
  call.needs = VariantTraits<V>::needs();
  call.variant = &variant;
  call.check_variant = &VariantTraits<V>::check_erased;
  return call;
}
}   // namespace door

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
