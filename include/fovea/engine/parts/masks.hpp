// SPDX-License-Identifier: Apache-2.0
// Which keys a query sees.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "../../core/view.hpp"
#include "../key_ranges.hpp"
#include "../plan.hpp"
#include "../policies.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// Causal masks and windows: the keys pos - reach.left .. pos + reach.right. The lengths of sequences are the engine's
// business.
struct Band {
  Reach reach;

  struct Lane {
    static constexpr bool kAnyPositions = true;
    i32 first, last;
    FOVEA_INLINE keep_t operator()(i32 pos) const { return as_keep((pos >= first) & (pos <= last)); }
  };
  FOVEA_INLINE Lane at(const Row& row) const {
    return {i32(clamped(row.pos - reach.left)), i32(clamped(row.pos + reach.right))};
  }

  FOVEA_INLINE KeyRange hull(std::span<const Row> rows) const {
    const Ends ends = positions(rows);
    return {ends.low - reach.left, ends.high + reach.right + 1};
  }

  FOVEA_INLINE Cover cover(const Tile& tile) const {
    const Ends ends = positions(tile.rows);
    if (tile.k_end <= ends.low - reach.left || tile.k_begin > ends.high + reach.right) return Cover::skip;
    const bool full = tile.k_begin >= ends.high - reach.left && tile.k_end - 1 <= ends.low + reach.right;
    return full ? Cover::full : Cover::partial;
  }

 private:
  struct Ends {
    index_t low, high;
  };
  FOVEA_INLINE static Ends positions(std::span<const Row> rows) {
    Ends ends{rows.front().pos, rows.front().pos};
    for (const Row& row : rows) ends = {std::min(ends.low, row.pos), std::max(ends.high, row.pos)};
    return ends;
  }
  FOVEA_INLINE static std::int32_t clamped(index_t pos) {
    return static_cast<std::int32_t>(std::clamp<index_t>(pos, INT32_MIN, INT32_MAX));
  }
};

// Draft trees: the last len_q keys of a sequence are the keys of its own queries, and query i sees those whose bit is set in its
// word; all earlier keys are visible. Sequences of more than kTreeQueries queries have no tree.
inline constexpr index_t kTreeQueries = 64;

struct Tree {
  const std::uint64_t* words;   // [query of the call], null without trees
  const Sequence* sequences;    // [sequence]
  FOVEA_INLINE bool off() const { return words == nullptr; }

  struct Lane {
    std::uint64_t word;
    index_t first;
    bool whole;
    FOVEA_INLINE keep_t operator()(i32 pos) const {
      const index_t at = first_lane(pos) - first;
      if (whole || at <= -kLanes) return f32(0.f) == f32(0.f);
      const std::uint64_t seen = at >= 64 ? 0 : at >= 0 ? word >> at : (word << -at) | ((std::uint64_t{1} << -at) - 1);
      alignas(i32) std::int32_t bits[kLanes];
      for (index_t i = 0; i < kLanes; ++i) bits[i] = static_cast<std::int32_t>(seen >> i & 1);
      return as_keep(i32::load_aligned(bits) != i32(0));
    }
  };
  FOVEA_INLINE Lane at(const Row& row) const {
    const Sequence& sequence = sequences[row.sequence];
    const bool whole = words == nullptr || sequence.len_q > kTreeQueries;
    const index_t query = sequence.batch * sequence.len_q + sequence.q_begin + row.q_index;
    return {whole ? 0 : words[query], sequence.len_k - sequence.len_q, whole};
  }
  FOVEA_INLINE KeyRange hull(std::span<const Row>) const { return {0, PTRDIFF_MAX}; }
  FOVEA_INLINE Cover cover(const Tile& tile) const {
    const Sequence& sequence = sequences[tile.rows.front().sequence];
    const bool whole = words == nullptr || sequence.len_q > kTreeQueries || tile.k_end <= sequence.len_k - sequence.len_q;
    return whole ? Cover::full : Cover::partial;
  }
};

// The element of row `row`, key 0, of a view [sequence | 1, q_head | 1, len_q | 1, len_k] with stride 0 on broadcast axes.
template <class T>
FOVEA_INLINE const T* mask_row(const View<const T, 4>& view, const Row& row) {
  return view.data + row.sequence * view.stride[0] + row.q_head * view.stride[1] + row.q_index * view.stride[2];
}

// A stored mask: `keep` bytes (0 = masked) and `bias` floats (-inf = masked, the ScoreMod Bias adds the rest); either may be
// absent. cover looks at the tile itself, so that a dead tile of a block-sparse mask costs a look and no arithmetic.
struct StoredMask {
  View<const std::uint8_t, 4> keep;
  View<const float, 4> bias;
  FOVEA_INLINE bool off() const { return !keep && !bias; }

  struct Lane {
    const std::uint8_t* keep;
    const float* bias;
    index_t keep_stride, bias_stride, keep_end, bias_end;

    FOVEA_INLINE keep_t operator()(i32 pos) const {
      const index_t first = first_lane(pos);
      keep_t visible = f32(0.f) == f32(0.f);
      if (keep != nullptr) visible = nonzero_bytes(keep + first * keep_stride, keep_stride, keep_end - first);
      if (bias == nullptr) return visible;
      const f32 b = load_strided(bias + first * bias_stride, bias_stride, bias_end - first);
      return visible & (b != f32(-std::numeric_limits<float>::infinity()));
    }
  };
  FOVEA_INLINE Lane at(const Row& row) const {
    return {keep ? mask_row(keep, row) : nullptr,
            bias ? mask_row(bias, row) : nullptr,
            keep.stride[3],
            bias.stride[3],
            keep.extent[3],
            bias.extent[3]};
  }

  FOVEA_INLINE KeyRange hull(std::span<const Row>) const { return {0, PTRDIFF_MAX}; }

  // One look at 12 rows x 256 floats: about 200 loads against 12,000 FMAs (dim 128) of the tile it may save. It also fetches
  // the rows that the engine asks about next, which are too short for the hardware's prefetcher.
  FOVEA_INLINE Cover cover(const Tile& tile) const {
    // Of scattered keys the tile is the hull: looking at all of it would cost more than the lanes' own look.
    if (tile.k_end - tile.k_begin > kMaxKeyTile) return Cover::partial;
    bool live = false, dead = false;
    const index_t count = tile.k_end - tile.k_begin, next_rows = tile.rows.back().q_index - tile.rows.front().q_index + 1;
    const Row* seen = nullptr;
    for (const Row& row : tile.rows) {
      if (seen != nullptr && at(*seen).keep == at(row).keep && at(*seen).bias == at(row).bias) continue;
      seen = &row;
      Found found{true, false};
      if (keep) {
        const std::uint8_t* const from = mask_row(keep, row) + tile.k_begin * keep.stride[3];
        found = look(from, keep.stride[3], count);
        prefetch_run(from, next_rows * keep.stride[2], count);
      }
      if (bias && found.live) {
        const float* const from = mask_row(bias, row) + tile.k_begin * bias.stride[3];
        const Found finite = look(from, bias.stride[3], count);
        prefetch_run(from, next_rows * bias.stride[2] * 4, count * 4);
        // Where both mask some keys, the union may be anything: call it partial.
        found = {finite.live, found.dead || finite.dead};
      }
      live = live || found.live;
      dead = dead || found.dead;
    }
    return !live ? Cover::skip : dead ? Cover::partial : Cover::full;
  }

 private:
  struct Found {
    bool live, dead;
  };
  FOVEA_INLINE static Found look(const std::uint8_t* from, index_t stride, index_t count) {
    if (stride == 1) {
      const bool dead = std::memchr(from, 0, static_cast<std::size_t>(count)) != nullptr;
      bool live = !dead || from[0] != 0;
      for (index_t j = 0; !live && j < count; ++j) live = from[j] != 0;
      return {live, dead};
    }
    Found found{false, false};
    for (index_t j = 0; j < count; ++j) (from[j * stride] != 0 ? found.live : found.dead) = true;
    return found;
  }
  FOVEA_INLINE static Found look(const float* from, index_t stride, index_t count) {
    const float masked = -std::numeric_limits<float>::infinity();
    Found found{false, false};
    index_t j = 0;
    if (stride == 1 && count >= kLanes) {
      // Nearly every tile has no masked key, and a minimum is half the price of the two comparisons that tell the rest apart. A NaN
      // ends here too.
      f32 least = load(from);
      for (j = kLanes; j + kLanes <= count; j += kLanes) least = xsimd::min(load(from + j), least);
      if (xsimd::all(least > f32(masked))) {
        found = {true, false};
      } else {
        keep_t all_live = f32(0.f) == f32(0.f), all_dead = all_live;
        for (j = 0; j + kLanes <= count; j += kLanes) {
          const f32 b = load(from + j);
          all_live = all_live & (b != f32(masked));
          all_dead = all_dead & (b == f32(masked));
        }
        found = {!xsimd::all(all_dead), !xsimd::all(all_live)};
      }
    }
    for (; j < count; ++j) (from[j * stride] != masked ? found.live : found.dead) = true;
    return found;
  }
  // May lie beyond the mask: a prefetch of nowhere does nothing.
  FOVEA_INLINE static void prefetch_run(const void* from, index_t ahead, index_t bytes) {
    for (index_t at = 0; at < bytes; at += 64) prefetch(static_cast<const std::byte*>(from), ahead + at);
  }
};

// What `mask` leaves of the keys on the rows' lists, which are sets (KeyRanges::as_sets).
template <class M>
struct InLists {
  M mask;
  const KeyRanges* lists;

  FOVEA_INLINE auto at(const Row& row) const { return mask.at(row); }
  FOVEA_INLINE Cover cover(const Tile& tile) const { return mask.cover(tile); }
  KeyRange hull(std::span<const Row> rows) const {
    const KeyRange seen = mask.hull(rows), listed = lists->hull(list_of(rows));
    return {std::max(seen.begin, listed.begin), std::min(seen.end, listed.end)};
  }
  template <class F>
  void visible(std::span<const Row> rows, index_t begin, index_t end, const F& f) const {
    lists->runs(list_of(rows), begin, end, f);
  }
  Status check(const AttentionShape& shape) const { return check_policy(mask, shape); }

 private:
  index_t list_of(std::span<const Row> rows) const {
    return lists->list_of(rows.front().sequence, rows.front().kv_head, rows.front().q_index);
  }
};

// Visible under both.
template <class First, class Second>
struct Both {
  First first;
  Second second;

  struct Lane {
    decltype(std::declval<const First&>().at(std::declval<const Row&>())) first;
    decltype(std::declval<const Second&>().at(std::declval<const Row&>())) second;
    static constexpr bool kAnyPositions = kTakesAnyPositions<decltype(first)> && kTakesAnyPositions<decltype(second)>;
    FOVEA_INLINE keep_t operator()(i32 pos) const { return first(pos) & second(pos); }
  };
  FOVEA_INLINE Lane at(const Row& row) const { return {first.at(row), second.at(row)}; }

  FOVEA_INLINE KeyRange hull(std::span<const Row> rows) const {
    const KeyRange a = first.hull(rows), b = second.hull(rows);
    return {std::max(a.begin, b.begin), std::min(a.end, b.end)};
  }
  FOVEA_INLINE Cover cover(const Tile& tile) const {
    const Cover a = first.cover(tile);
    if (a == Cover::skip) return Cover::skip;
    const Cover b = second.cover(tile);
    if (b == Cover::skip) return Cover::skip;
    return a == Cover::full && b == Cover::full ? Cover::full : Cover::partial;
  }

  Status check(const AttentionShape& shape) const { return check_policies_of(first, second, shape); }
  FOVEA_INLINE bool off() const { return is_off(first) && is_off(second); }
  template <class F>
  FOVEA_INLINE void visit(const F& f) const {
    if (is_off(second)) {
      visit_simplest(first, f);
    } else if (is_off(first)) {
      visit_simplest(second, f);
    } else {
      f(*this);
    }
  }
};

template <class First, class Second>
Both(First, Second) -> Both<First, Second>;   // clang 14

// Visible under one of the two.
template <class First, class Second>
struct Either {
  First first;
  Second second;

  struct Lane {
    decltype(std::declval<const First&>().at(std::declval<const Row&>())) first;
    decltype(std::declval<const Second&>().at(std::declval<const Row&>())) second;
    static constexpr bool kAnyPositions = kTakesAnyPositions<decltype(first)> && kTakesAnyPositions<decltype(second)>;
    FOVEA_INLINE keep_t operator()(i32 pos) const { return first(pos) | second(pos); }
  };
  FOVEA_INLINE Lane at(const Row& row) const { return {first.at(row), second.at(row)}; }

  Status check(const AttentionShape& shape) const { return check_policies_of(first, second, shape); }

  // An empty hull does not widen the other.
  FOVEA_INLINE KeyRange hull(std::span<const Row> rows) const {
    const KeyRange a = first.hull(rows), b = second.hull(rows);
    if (a.begin >= a.end) return b;
    if (b.begin >= b.end) return a;
    return {std::min(a.begin, b.begin), std::max(a.end, b.end)};
  }
  // Where both are partial, the union may be anything: call it partial.
  FOVEA_INLINE Cover cover(const Tile& tile) const {
    const Cover a = first.cover(tile);
    if (a == Cover::full) return Cover::full;
    const Cover b = second.cover(tile);
    return b == Cover::full ? Cover::full : a == Cover::skip ? b : a;
  }
};
template <class First, class Second>
Either(First, Second) -> Either<First, Second>;   // clang 14

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
