// SPDX-License-Identifier: Apache-2.0
// The six policies of the tile engine, one granularity each: tile > row > lane (docs/policies.md). Where K and V are and how
// stored values become vectors are two things: a source says where, its codecs' kernels say how.
#pragma once
#include <array>
#include <concepts>
#include <span>
#include <type_traits>

#include "../core/attention_options.hpp"
#include "../core/shapes.hpp"
#include "../core/status.hpp"
#include "../simd/panels.hpp"
#include "../simd/stream.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// lane: stored values -> a vector, numbers d .. d + kLanes - 1 of a row; d is a multiple of kLanes. load_some never touches
// memory beyond `count` numbers and gives zeros there. Where a row has one scale for all its numbers, the codec leaves it out
// (kRowScaled) and hands it over once per row: the kernels multiply a score or a weight instead of every number.
template <class C>
concept Codec = requires(const C& codec, const std::byte* row, index_t d, index_t count, index_t dim) {
  { codec.load(row, d, dim) } -> std::same_as<f32>;
  { codec.load_some(row, d, count, dim) } -> std::same_as<f32>;
  { codec.scale(row, dim) } -> std::same_as<float>;
  { C::kRowScaled } -> std::convertible_to<bool>;
  { C::offset(index_t{}) } -> std::convertible_to<index_t>;   // of number d in the row, in bytes: what to prefetch
};

// What a codec can do, one pointer each, called once per segment: K and V formats add up instead of multiplying. `pack` writes
// the columns from `first` on of a key tile at `to`, in elements of the panel type it was made for (simd/panels.hpp).
struct KeyKernels {
  void (*pack)(const Segment& keys, index_t dim, index_t first, void* to);
  void (*scores)(index_t rows, const float* q, index_t q_stride, const Segment& keys, index_t dim, float* s);
};
struct ValueKernels {
  bool (*pack)(const Segment& values, index_t dim, index_t first, void* to, index_t panel_stride);
  void (*weigh)(index_t rows, const float* p, const Segment& values, index_t dim, const float* rescale, float* acc,
                index_t acc_stride);
  bool (*finite)(const Segment& values, index_t dim);
};
struct KvKernels {
  KeyKernels k;
  ValueKernels v;
};

// Where the keys of a run lie, and what reads them: both segments hold the same keys.
struct Run {
  Segment k, v;
  const KvKernels* kernels;
};

// tile: where the stored rows are. The run starts at key `begin` of the row's sequence and ends at `end` or before, at the end
// of a page, at a ring's wrap or where the format changes.
template <class S>
concept KvSource = requires(const S& source, const Row& row, index_t begin, index_t end) {
  { source.run(row, begin, end) } -> std::same_as<Run>;
};

// A source whose keys are slots of lists: position n of a tile says where slot n is. `positions` fills `to` for the slots from
// begin to end, and kPositionsAhead slots more with what follows. `run` starts at positions[0] and gets `count` slots at most;
// it may copy scattered rows to `gathered` (LaneMemory), and only those that are wanted. Scores and masks are asked about
// positions, so a listed source leaves no trace in them.
enum class Want : std::uint8_t { keys, values, both };
template <class S>
concept ListedSource = requires(const S& source, const Row& row, index_t begin, index_t end, std::int32_t* to,
                                const std::int32_t* positions, index_t count, Want want, std::byte* gathered) {
  source.positions(row, begin, end, to);
  { source.run(row, positions, count, want, gathered) } -> std::same_as<Run>;
};

// The keys outside [begin, end) are masked for every row asked about.
struct KeyRange {
  index_t begin, end;
};

// row set: the hull of visible keys. tile: skip, partial or full. lane: keep this key? (asked on partial tiles only)
template <class M>
concept Mask = requires(const M& mask, std::span<const Row> rows, const Tile& tile, const Row& row, i32 pos) {
  { mask.hull(rows) } -> std::same_as<KeyRange>;
  { mask.cover(tile) } -> std::same_as<Cover>;
  { mask.at(row)(pos) } -> std::same_as<keep_t>;
};

// A mask may know which runs of a key tile a group of rows sees: visible(rows, begin, end, f) calls f(begin, end) for each of
// them, in order. The engine then asks cover for these runs; keys between them reach no result. All rows of a group are of
// one list of the plan (Plan::list_rows).
template <class M>
concept RunMask = requires(const M& mask, std::span<const Row> rows, index_t begin, index_t end) {
  mask.visible(rows, begin, end, [](index_t, index_t) {});
};

// lane: s -> s', in natural units, after the scale. at(row) holds what is constant along a row.
template <class M>
concept ScoreMod = requires(const M& mod, const Row& row, f32 s, i32 pos) {
  { mod.at(row)(s, pos) } -> std::same_as<f32>;
};

inline constexpr index_t kMostGroupRows = 32;   // of a row group, on every machine

// The scores of a row group against one key tile: whole vectors of keys that start at a multiple of kScoreRun, -inf where masked.
struct ScoreRows {
  float* data;
  index_t rows, count;
  FOVEA_INLINE std::span<float> row(index_t r) const { return {data + r * kScoreStride, static_cast<std::size_t>(count)}; }
};

// row: scores -> weights, a monoid. begin(row, false) is its zero; begin(row, true) is what a whole row starts from (a sink).
// absorb turns scores into weights in place, row by row, and says in `rescale` by how much each row's accumulator shrinks; it
// gets a group of rows at once, so that the latency of one row's reductions hides behind another's. merge adds b to a and
// returns the factors of the two accumulators.
template <class N>
concept Normalizer = requires(const N& norm, typename N::State& a, const typename N::State& b, const Row& row,
                              const ScoreRows& scores, float* rescale) {
  { norm.begin(row, true) } -> std::same_as<typename N::State>;
  norm.absorb(&a, scores, rescale);
  { norm.merge(a, b) } -> std::same_as<std::array<float, 2>>;
  { norm.finish(b) } -> std::same_as<Final>;
};

// row: scores -> weights where no online form exists. Gets the scores of every key of the row's reach at once, -inf where masked,
// and as many floats of scratch; turns them into weights in place. Rows are kept in the workspace: O(rows x len_k).
template <class N>
concept WholeRowNormalizer = requires(const N& norm, const Row& row, std::span<float> scores, std::span<float> scratch) {
  { norm.weigh_row(row, scores, scratch) } -> std::same_as<Final>;
};

// row: watches the weights of a key run before they are used; never changes them. The run is whole vectors: weights of 0 may stand
// before the first visible key and up to a vector behind the sequence's last one. Each lane has a copy of the tap, and all lanes
// work at once. `rescale` is what earlier weights of the
// row shrink by; a sink that ends the row shrinks them once more, without weights of its own. Only plans without key splits may carry one.
template <class T>
concept Tap = requires(const T& tap, const Row& row, index_t k_begin, std::span<const float> weights, float rescale,
                       Final end) {
  tap.absorb(row, k_begin, weights, rescale);
  tap.finish(row, end);
};

// row: what leaves the engine. acc is padded to whole vectors and may be scribbled on.
template <class E>
concept Epilogue = requires(const E& epilogue, const Row& row, std::span<float> acc, Final end) {
  epilogue.store(row, acc, end);
};

// Whether the lanes of a score or a mask take any positions. Others are given vectors of neighbours only, and where a list
// scatters its keys, one vector per key. A Lane says so by a member of this name.
template <class Lane>
inline constexpr bool kTakesAnyPositions = requires {
  requires Lane::kAnyPositions;
};

// The do-nothing parts. The engine may ask whether a policy is one of these three, and nothing else.
struct Identity {
  struct Lane {
    static constexpr bool kAnyPositions = true;
    FOVEA_INLINE f32 operator()(f32 s, i32) const { return s; }
  };
  FOVEA_INLINE Lane at(const Row&) const { return {}; }
};
struct Everything {
  struct Lane {
    static constexpr bool kAnyPositions = true;
    FOVEA_INLINE keep_t operator()(i32) const { return f32(0.f) == f32(0.f); }
  };
  FOVEA_INLINE bool off() const { return true; }
  FOVEA_INLINE Lane at(const Row&) const { return {}; }
  FOVEA_INLINE KeyRange hull(std::span<const Row>) const { return {0, PTRDIFF_MAX}; }
  FOVEA_INLINE Cover cover(const Tile&) const { return Cover::full; }
};
struct NoTap {
  FOVEA_INLINE void absorb(const Row&, index_t, std::span<const float>, float) const {}
  FOVEA_INLINE void finish(const Row&, Final) const {}
};

// What the engine keeps per row between the key tiles.
template <class N>
struct RowState {
  using type = Final;
};
template <Normalizer N>
struct RowState<N> {
  using type = typename N::State;
};

// f(policy), or f of what is left of it where run-time options have switched parts of it off: a policy made of parts may have
// off() and visit(f) (engine/parts/scores.hpp, masks.hpp). Asked once per row group and tile, so that lanes carry no branches.
template <class Policy>
FOVEA_INLINE bool is_off(const Policy& policy) {
  if constexpr (requires { policy.off(); }) {
    return policy.off();
  } else {
    return false;
  }
}
template <class Policy, class F>
FOVEA_INLINE void visit_simplest(const Policy& policy, const F& f) {
  if constexpr (requires { policy.visit(f); }) {
    policy.visit(f);
  } else {
    f(policy);
  }
}

// A policy with numbers or tensors of its own may have check(AttentionShape) or check() -> Status, asked with the shape of the call
// before anything is written. A policy made of policies hands the question on.
template <class Policy>
Status check_policy(const Policy& policy, const AttentionShape& shape) {
  if constexpr (requires { policy.check(shape); }) {
    return policy.check(shape);
  } else if constexpr (requires { policy.check(); }) {
    return policy.check();
  } else {
    return {};
  }
}
template <class First, class Second>
Status check_policies_of(const First& first, const Second& second, const AttentionShape& shape) {
  if (Status s = check_policy(first, shape); !s.ok()) return s;
  return check_policy(second, shape);
}

template <class Source, class Score, class MaskPolicy, class Norm, class Watch, class Close>
struct TileSpec {
  Source source;
  Score score;
  MaskPolicy mask;
  Norm norm;
  Watch tap;
  Close epilogue;
};

template <class Source, class Score, class MaskPolicy, class Norm, class Watch, class Close>
TileSpec(Source, Score, MaskPolicy, Norm, Watch, Close)
    -> TileSpec<Source, Score, MaskPolicy, Norm, Watch, Close>;   // clang 14

template <class Spec>
constexpr bool check_policies() {
  static_assert(KvSource<decltype(Spec::source)> || ListedSource<decltype(Spec::source)>,
                "fovea: a source needs run(Row, begin, end) -> Run, or positions and run of a listed one; see "
                "docs/policies.md#source");
  static_assert(!ListedSource<decltype(Spec::source)> || std::is_same_v<decltype(Spec::tap), NoTap>,
                "fovea: a tap is told about runs of neighbouring keys, which lists do not have; see docs/policies.md#tap");
  static_assert(ScoreMod<decltype(Spec::score)>,
                "fovea: a score needs at(Row) -> callable (f32 s, i32 pos) -> f32; see docs/policies.md#score");
  static_assert(
      Mask<decltype(Spec::mask)>,
      "fovea: a mask needs hull(rows) -> KeyRange, cover(Tile) -> Cover and at(Row) -> callable (i32 pos) -> keep_t; "
      "see docs/policies.md#mask");
  constexpr bool kNormalizes = Normalizer<decltype(Spec::norm)> || WholeRowNormalizer<decltype(Spec::norm)>;
  static_assert(
      kNormalizes,
      "fovea: a normalizer needs State, begin, absorb, merge and finish, or weigh_row; see docs/policies.md#normalizer");
  static_assert(Tap<decltype(Spec::tap)>, "fovea: a tap needs absorb and finish; see docs/policies.md#tap");
  static_assert(Epilogue<decltype(Spec::epilogue)>,
                "fovea: an epilogue needs store(Row, acc, Final); see docs/policies.md#epilogue");
  return (KvSource<decltype(Spec::source)> || ListedSource<decltype(Spec::source)>)&&ScoreMod<decltype(Spec::score)> &&
         Mask<decltype(Spec::mask)> && kNormalizes && Tap<decltype(Spec::tap)> && Epilogue<decltype(Spec::epilogue)>;
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
