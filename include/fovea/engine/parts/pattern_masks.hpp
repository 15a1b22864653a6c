// SPDX-License-Identifier: Apache-2.0
// Masks with a formula: packed documents, prefix-LM, chunks, dilation, global tokens, first tokens plus window, draft trees. A
// Rule states one over intervals of positions, so that hull and cover cost a few comparisons whatever the tile; Pattern makes a
// mask policy of it. Positions are absolute, those of core/attention_options.hpp, and causality and windows come from the
// options. All but DocumentIds answer cover exactly.
//
//   fovea::attention(q, k, v, out, {.causal = fovea::Causal::top_left},
//                    fovea::variant().with_mask(fovea::documents(borders)));
#pragma once
#include <vector>

#include "../../simd/lookup.hpp"
#include "functions.hpp"
#include "masks.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// Queries or keys first .. last of a sequence, both included.
struct Positions {
  index_t first, last;
};

FOVEA_INLINE Positions positions_of(std::span<const Row> rows) {
  Positions p{rows.front().pos, rows.front().pos};
  for (const Row& row : rows) p = {std::min(p.first, row.pos), std::max(p.last, row.pos)};
  return p;
}

FOVEA_INLINE i32 position_lanes(index_t pos) {
  return i32(static_cast<std::int32_t>(std::clamp<index_t>(pos, INT32_MIN, INT32_MAX)));
}
constexpr index_t floor_div(index_t a, index_t b) { return a / b - (a % b < 0); }   // b > 0

// Quotients by a constant without the division instruction, for 0 <= n < 2^31 (Granlund and Montgomery, PLDI 1994): masks
// ask for one per vector of keys.
class Divisor {
 public:
  constexpr explicit Divisor(index_t by = 1) : value_(by) {
    while ((std::uint64_t{1} << (shift_ - 31)) < static_cast<std::uint64_t>(by)) ++shift_;
    multiplier_ = ((std::uint64_t{1} << shift_) + static_cast<std::uint64_t>(by) - 1) / static_cast<std::uint64_t>(by);
  }
  FOVEA_INLINE index_t value() const { return value_; }
  FOVEA_INLINE index_t quotient(index_t n) const {
    return static_cast<index_t>(static_cast<std::uint64_t>(n) * multiplier_ >> shift_);
  }

 private:
  index_t value_;
  std::uint64_t multiplier_ = 0;
  int shift_ = 31;
};

// A Rule has
//   keys(sequence, queries) -> KeyRange    no other key is seen by any of the queries
//   cover(sequence, queries, keys) -> Cover
//   at(sequence, pos) -> Lane              callable (i32 pos) -> keep_t
//   keeps(sequence, q, k) -> bool          the same as plain arithmetic
//   kExact                                 whether cover is right whenever it says partial
template <class Rule>
struct Pattern {
  Rule rule;

  Status check(const AttentionShape& shape) const { return check_policy(rule, shape); }
  FOVEA_INLINE auto at(const Row& row) const { return rule.at(row.sequence, row.pos); }
  FOVEA_INLINE KeyRange hull(std::span<const Row> rows) const {
    return rule.keys(rows.front().sequence, positions_of(rows));
  }
  FOVEA_INLINE Cover cover(const Tile& tile) const {
    return rule.cover(tile.rows.front().sequence, positions_of(tile.rows), {tile.k_begin, tile.k_end - 1});
  }
  bool keeps(int batch, int, index_t q, index_t k) const { return rule.keeps(batch, q, k); }
};

// Documents one after the other in a sequence; a query sees the keys of its own. Document d holds the positions borders[d]
// .. borders[d + 1] - 1, the borders never fall, and what lies outside of all documents neither sees nor is seen. With
// `first`, sequence s has the borders first[s] .. first[s + 1] - 1 of the span; without, all sequences have the same.
struct DocumentBorders {
  static constexpr bool kExact = true;
  std::span<const index_t> borders;
  std::span<const index_t> first = {};   // [sequence + 1]

  using Lane = Band::Lane;

  FOVEA_INLINE KeyRange keys(int sequence, Positions q) const {
    const auto b = of(sequence);
    if (b.empty()) return {0, 0};
    const index_t low = std::max(q.first, b.front()), high = std::min(q.last, b.back() - 1);
    if (low > high) return {0, 0};
    return {b[document(b, low)], b[document(b, high) + 1]};
  }
  FOVEA_INLINE Cover cover(int sequence, Positions q, Positions k) const {
    const auto b = of(sequence);
    if (b.empty()) return Cover::skip;
    const Positions inside_q{std::max(q.first, b.front()), std::min(q.last, b.back() - 1)};
    const Positions inside_k{std::max(k.first, b.front()), std::min(k.last, b.back() - 1)};
    if (inside_q.first > inside_q.last || inside_k.first > inside_k.last) return Cover::skip;
    // The documents of the first and of the last query bound what the queries see, the keys between them are all seen.
    const std::size_t low = document(b, inside_q.first), high = document(b, inside_q.last);
    if (inside_k.last < b[low] || inside_k.first >= b[high + 1]) return Cover::skip;
    const bool whole = inside_q.first == q.first && inside_q.last == q.last;
    const bool full = whole && low == high && k.first >= b[low] && k.last < b[low + 1];
    return full ? Cover::full : Cover::partial;
  }
  FOVEA_INLINE Lane at(int sequence, index_t pos) const {
    const auto b = of(sequence);
    if (b.empty() || pos < b.front() || pos >= b.back()) return {i32(0), i32(-1)};
    const std::size_t d = document(b, pos);
    return {position_lanes(b[d]), position_lanes(b[d + 1] - 1)};
  }
  bool keeps(int sequence, index_t q, index_t k) const {
    const auto b = of(sequence);
    for (std::size_t d = 0; d + 1 < b.size(); ++d) {
      if (b[d] <= q && q < b[d + 1]) return b[d] <= k && k < b[d + 1];
    }
    return false;
  }

 private:
  FOVEA_INLINE std::span<const index_t> of(int sequence) const {
    if (first.empty()) return borders;
    const auto s = static_cast<std::size_t>(sequence);
    if (s + 1 >= first.size()) return {};
    return borders.subspan(static_cast<std::size_t>(first[s]), static_cast<std::size_t>(first[s + 1] - first[s]));
  }
  // Of a position inside: the last border that is not behind it, so that empty documents are stepped over.
  FOVEA_INLINE static std::size_t document(std::span<const index_t> b, index_t pos) {
    std::size_t at = 0;
    for (std::size_t count = b.size(); count > 1;) {
      const std::size_t half = count / 2;
      at = b[at + half] <= pos ? at + half : at;   // no branch to mispredict: 1 ns a step
      count -= half;
    }
    return at;
  }
};

// The document of each position by its number, in any order; a negative number (padding) neither sees nor is seen. cover
// reads the numbers of the tile, and its skip is exact where numbers never fall; borders, or a BlockMask made from this,
// cost less.
struct DocumentIds {
  static constexpr bool kExact = false;
  View<const std::int32_t, 2> ids;   // [sequence | 1, pos]

  struct Lane {
    const std::int32_t* ids;
    index_t stride, count;
    i32 own;
    FOVEA_INLINE keep_t operator()(i32 pos) const {
      return as_keep(load_ids(ids, stride, first_lane(pos), count) == own) & as_keep(own >= i32(0));
    }
  };
  FOVEA_INLINE Lane at(int sequence, index_t pos) const {
    const std::int32_t* const row = of(sequence);
    return {row, ids.stride[1], ids.extent[1], i32(id(row, pos))};
  }
  FOVEA_INLINE KeyRange keys(int, Positions) const { return {0, ids.extent[1]}; }
  FOVEA_INLINE Cover cover(int sequence, Positions q, Positions k) const {
    const std::int32_t* const row = of(sequence);
    const Ends a = ends(row, q), b = ends(row, k);
    if (a.high < 0 || b.high < 0 || a.high < b.low || b.high < a.low) return Cover::skip;
    return a.low == a.high && b.low == b.high ? Cover::full : Cover::partial;
  }
  bool keeps(int sequence, index_t q, index_t k) const {
    const std::int32_t own = id(of(sequence), q);
    return own >= 0 && own == id(of(sequence), k);
  }

 private:
  struct Ends {
    std::int32_t low, high;
  };
  FOVEA_INLINE const std::int32_t* of(int sequence) const {
    if (ids.extent[0] == 1) return ids.data;
    return sequence < ids.extent[0] ? ids.data + sequence * ids.stride[0] : nullptr;
  }
  FOVEA_INLINE std::int32_t id(const std::int32_t* row, index_t pos) const {
    return row != nullptr && pos >= 0 && pos < ids.extent[1] ? row[pos * ids.stride[1]] : -1;
  }
  // Positions first .. first + kLanes - 1, -1 where there is none.
  FOVEA_INLINE static i32 load_ids(const std::int32_t* row, index_t stride, index_t first, index_t count) {
    if (row == nullptr) return i32(-1);
    if (stride == 1 && first >= 0 && first + kLanes <= count) return i32::load_unaligned(row + first);
    alignas(i32) std::int32_t lanes[kLanes];
    for (index_t i = 0; i < kLanes; ++i) {
      const index_t pos = first + i;
      lanes[i] = pos >= 0 && pos < count ? row[pos * stride] : -1;
    }
    return i32::load_aligned(lanes);
  }
  FOVEA_INLINE Ends ends(const std::int32_t* row, Positions p) const {
    const std::int32_t first = id(row, p.first);
    i32 low(first), high(first);
    index_t pos = p.first;
    for (; pos + kLanes - 1 <= p.last; pos += kLanes) {
      const i32 lanes = load_ids(row, ids.stride[1], pos, ids.extent[1]);
      low = min(low, lanes);
      high = max(high, lanes);
    }
    alignas(i32) std::int32_t lows[kLanes], highs[kLanes];
    low.store_aligned(lows);
    high.store_aligned(highs);
    Ends e{first, first};
    for (index_t i = 0; i < kLanes; ++i) e = {std::min(e.low, lows[i]), std::max(e.high, highs[i])};
    for (; pos <= p.last; ++pos) e = {std::min(e.low, id(row, pos)), std::max(e.high, id(row, pos))};
    return e;
  }
};

// Prefix-LM (Raffel et al. 2020, arXiv 1910.10683, figure 4): the prefix is seen by all, what follows is causal. Needs
// Causal::none in the options, which would cut the prefix.
struct PrefixLengths {
  static constexpr bool kExact = true;
  std::span<const index_t> lengths;   // [sequence | 1]

  using Lane = Band::Lane;

  FOVEA_INLINE KeyRange keys(int sequence, Positions q) const { return {0, std::max(of(sequence), q.last + 1)}; }
  FOVEA_INLINE Cover cover(int sequence, Positions q, Positions k) const {
    const index_t prefix = of(sequence);
    if (k.first >= prefix && k.first > q.last) return Cover::skip;
    return k.last < prefix || k.last <= q.first ? Cover::full : Cover::partial;
  }
  FOVEA_INLINE Lane at(int sequence, index_t pos) const { return {i32(0), position_lanes(std::max(of(sequence) - 1, pos))}; }
  bool keeps(int sequence, index_t q, index_t k) const { return k < of(sequence) || k <= q; }

 private:
  FOVEA_INLINE index_t of(int sequence) const {
    const auto s = static_cast<std::size_t>(sequence);
    return lengths.size() == 1 ? lengths[0] : s < lengths.size() ? lengths[s] : 0;
  }
};

// Chunked attention (Llama 4; FlashAttention's attention_chunk): a query sees the keys of its own chunk of `size` positions.
struct Chunks {
  static constexpr bool kExact = true;
  index_t size;

  using Lane = Band::Lane;

  FOVEA_INLINE KeyRange keys(int, Positions q) const {
    return {floor_div(q.first, size) * size, floor_div(q.last, size) * size + size};
  }
  FOVEA_INLINE Cover cover(int, Positions q, Positions k) const {
    const index_t low = floor_div(q.first, size) * size, high = floor_div(q.last, size) * size;
    if (k.last < low || k.first >= high + size) return Cover::skip;
    return low == high && k.first >= low && k.last < low + size ? Cover::full : Cover::partial;
  }
  FOVEA_INLINE Lane at(int, index_t pos) const {
    const index_t begin = floor_div(pos, size) * size;
    return {position_lanes(begin), position_lanes(begin + size - 1)};
  }
  bool keeps(int, index_t q, index_t k) const { return floor_div(q, size) == floor_div(k, size); }
};

// Every `step`-th key on both sides, up to a distance of `reach` (Longformer, arXiv 2004.05150, with reach = w step).
struct Dilation {
  static constexpr bool kExact = true;
  Divisor step;
  index_t reach;

  struct Lane {
    Divisor step;
    index_t phase;   // of the query, 0 .. step - 1
    i32 first, last;
    FOVEA_INLINE keep_t operator()(i32 pos) const {
      const index_t start = first_lane(pos), d = step.value();
      index_t rest = start < 0 ? start - floor_div(start, d) * d : start - step.quotient(start) * d;
      rest -= phase;
      if (rest < 0) rest += d;
      const keep_t inside = as_keep((pos >= first) & (pos <= last));
      const i32 ahead = lane_numbers() + i32(static_cast<std::int32_t>(rest));   // below step + kLanes
      if (d >= kLanes) return inside & as_keep((ahead == i32(0)) | (ahead == i32(static_cast<std::int32_t>(d))));
      // Halves keep quotients of multiples away from the rounding of 1 / step.
      const f32 inverse(1.f / static_cast<float>(d));
      return inside & (above_floor((to_float(ahead) + f32(0.5f)) * inverse) < inverse);
    }
  };
  FOVEA_INLINE Lane at(int, index_t pos) const {
    return {step, pos - floor_div(pos, step.value()) * step.value(), position_lanes(pos - reach),
            position_lanes(pos + reach)};
  }
  FOVEA_INLINE KeyRange keys(int, Positions q) const {
    const index_t far = reach / step.value() * step.value();
    return {q.first - far, q.last + far + 1};
  }
  // Every distance between the smallest and the largest occurs in a tile.
  FOVEA_INLINE Cover cover(int, Positions q, Positions k) const {
    const index_t d = step.value(), low = k.first - q.last, high = k.last - q.first;
    const index_t near = std::max(low, -reach), far = std::min(high, reach);
    if (near > far || -floor_div(-near, d) * d > far) return Cover::skip;
    const bool every = low >= -reach && high <= reach && (d == 1 || low == high);
    return every ? Cover::full : Cover::partial;
  }
  bool keeps(int, index_t q, index_t k) const {
    const index_t distance = q < k ? k - q : q - k;
    return distance <= reach && distance % step.value() == 0;
  }
};

// The first `count` positions see all keys and are seen by all queries.
struct GlobalTokens {
  static constexpr bool kExact = true;
  index_t count;

  using Lane = Band::Lane;

  FOVEA_INLINE KeyRange keys(int, Positions q) const { return {0, q.first < count ? PTRDIFF_MAX : count}; }
  FOVEA_INLINE Cover cover(int, Positions q, Positions k) const {
    if (k.last < count || q.last < count) return Cover::full;
    return k.first >= count && q.first >= count ? Cover::skip : Cover::partial;
  }
  FOVEA_INLINE Lane at(int, index_t pos) const { return {i32(0), position_lanes(pos < count ? PTRDIFF_MAX : count - 1)}; }
  bool keeps(int, index_t q, index_t k) const { return k < count || q < count; }
};

// The first `sinks` keys and those at most `left` before the query (StreamingLLM, arXiv 2309.17453); ahead of it all, unless
// the options are causal.
struct SinkWindow {
  static constexpr bool kExact = true;
  index_t sinks, left;

  struct Lane {
    i32 sinks, first;
    FOVEA_INLINE keep_t operator()(i32 pos) const { return as_keep((pos < sinks) | (pos >= first)); }
  };
  FOVEA_INLINE KeyRange keys(int, Positions q) const { return {sinks > 0 ? 0 : q.first - left, PTRDIFF_MAX}; }
  FOVEA_INLINE Cover cover(int, Positions q, Positions k) const {
    if (k.first >= sinks && k.last < q.first - left) return Cover::skip;
    // The last query misses the keys sinks .. q.last - left - 1 and the others no more than that.
    return k.last < sinks || k.first >= q.last - left || q.last - left <= sinks ? Cover::full : Cover::partial;
  }
  FOVEA_INLINE Lane at(int, index_t pos) const { return {position_lanes(sinks), position_lanes(pos - left)}; }
  bool keeps(int, index_t q, index_t k) const { return k < sinks || k >= q - left; }
};

// Draft trees of any size: the positions before the prefix are seen by all, draft i stands at position prefix + i and sees draft
// j if bit j % 64 of its word j / 64 is set. What is no draft sees the prefix alone; bits of no draft are not read. Numbers of
// drafts may differ: words of 0 fill up. cover reads the bits of the tile's drafts, a word for 64 pairs.
struct DraftTree {
  static constexpr bool kExact = true;
  View<const std::uint64_t, 3> words;   // [sequence | 1, draft, word]
  std::span<const index_t> prefix;      // [sequence | 1]

  // A draft's bits; null for what is no draft.
  struct Bits {
    const std::uint64_t* words;
    index_t stride, drafts;

    FOVEA_INLINE std::uint64_t word(index_t n) const {
      const index_t left = drafts - 64 * n;
      if (words == nullptr || left <= 0) return 0;
      return left < 64 ? words[n * stride] & ((std::uint64_t{1} << left) - 1) : words[n * stride];
    }
    // Of the drafts j .. j + 63, j >= 0.
    FOVEA_INLINE std::uint64_t from(index_t j) const {
      const index_t shift = j % 64;
      return shift == 0 ? word(j / 64) : word(j / 64) >> shift | word(j / 64 + 1) << (64 - shift);
    }
  };
  struct Lane {
    Bits bits;
    index_t prefix;
    FOVEA_INLINE keep_t operator()(i32 pos) const {
      const index_t at = first_lane(pos) - prefix;
      if (at <= -kLanes) return f32(0.f) == f32(0.f);
      const std::uint64_t seen = at >= 0 ? bits.from(at) : bits.from(0) << -at | ((std::uint64_t{1} << -at) - 1);
      alignas(i32) std::int32_t lanes[kLanes];
      for (index_t i = 0; i < kLanes; ++i) lanes[i] = static_cast<std::int32_t>(seen >> i & 1);
      return as_keep(i32::load_aligned(lanes) != i32(0));
    }
  };

  Status check() const {
    const auto& [sequences, drafts, count] = words.extent;
    bool sound = sequences >= 1 && drafts >= 0 && drafts <= INT32_MAX && count >= (drafts + 63) / 64 && !prefix.empty() &&
                 (drafts == 0 || words.data != nullptr);
    for (const index_t first : prefix) sound = sound && first >= INT32_MIN && first <= INT32_MAX;
    if (sound) return {};
    return Status::error(Code::invalid_argument,
                         "fovea: trees of %td sequences with %zu prefixes have %td words of 64 bits for each of %td drafts",
                         sequences, prefix.size(), count, drafts);
  }
  FOVEA_INLINE KeyRange keys(int sequence, Positions q) const {
    const index_t first = of(sequence), end = first + words.extent[1];
    return {0, q.last >= first && q.first < end ? end : first};
  }
  FOVEA_INLINE Cover cover(int sequence, Positions q, Positions k) const {
    const index_t first = of(sequence), end = first + words.extent[1];
    if (k.last < first) return Cover::full;
    bool some = k.first < first, every = q.first >= first && q.last < end && k.last < end;
    const index_t begin = std::max(k.first, first) - first, last = std::min(k.last, end - 1) - first;
    for (index_t pos = std::max(q.first, first); pos <= std::min(q.last, end - 1); ++pos) {
      const Bits bits = bits_of(sequence, pos);
      for (index_t j = begin; j <= last; j += 64) {
        const std::uint64_t asked = last - j < 63 ? (std::uint64_t{2} << (last - j)) - 1 : ~std::uint64_t{0};
        const std::uint64_t seen = bits.from(j) & asked;
        some = some || seen != 0;
        every = every && seen == asked;
        if (some && !every) return Cover::partial;
      }
    }
    return !some ? Cover::skip : every ? Cover::full : Cover::partial;
  }
  FOVEA_INLINE Lane at(int sequence, index_t pos) const { return {bits_of(sequence, pos), of(sequence)}; }
  bool keeps(int sequence, index_t q, index_t k) const {
    const index_t i = q - of(sequence), j = k - of(sequence), drafts = words.extent[1];
    if (j < 0) return true;
    if (i < 0 || i >= drafts || j >= drafts || !has(sequence)) return false;
    return (words(words.extent[0] == 1 ? 0 : sequence, i, j / 64) >> j % 64 & 1) != 0;
  }

 private:
  FOVEA_INLINE index_t of(int sequence) const {
    const auto s = static_cast<std::size_t>(sequence);
    return prefix.size() == 1 ? prefix[0] : s < prefix.size() ? prefix[s] : 0;
  }
  FOVEA_INLINE bool has(int sequence) const { return words.extent[0] == 1 || sequence < words.extent[0]; }
  FOVEA_INLINE Bits bits_of(int sequence, index_t pos) const {
    const index_t draft = pos - of(sequence);
    if (draft < 0 || draft >= words.extent[1] || !has(sequence)) return {nullptr, 0, 0};
    return {words.data + (words.extent[0] == 1 ? 0 : sequence * words.stride[0]) + draft * words.stride[1], words.stride[2],
            words.extent[1]};
  }
};

inline Pattern<DocumentBorders> documents(std::span<const index_t> borders, std::span<const index_t> first = {}) {
  return {{borders, first}};
}
inline Pattern<DocumentIds> document_ids(View<const std::int32_t, 2> ids) { return {{ids}}; }   // [sequence | 1, pos]
inline Pattern<PrefixLengths> prefix_lm(std::span<const index_t> lengths) { return {{lengths}}; }
inline Pattern<Chunks> chunks(index_t size) { return {{std::max<index_t>(size, 1)}}; }
// A negative reach is unbounded.
inline Pattern<Dilation> dilated(index_t step, index_t reach = -1) {
  const index_t bounded = std::clamp<index_t>(step, 1, INT32_MAX - kLanes);
  return {{Divisor(bounded), reach < 0 ? kUnbounded : std::min(reach, kUnbounded)}};
}
inline Pattern<GlobalTokens> global_tokens(index_t count) { return {{std::clamp<index_t>(count, 0, INT32_MAX)}}; }
inline Pattern<SinkWindow> sink_window(index_t sinks, index_t left) {
  return {{std::clamp<index_t>(sinks, 0, INT32_MAX), std::clamp<index_t>(left, 0, kUnbounded)}};
}
// words [sequence | 1, draft, word], prefix [sequence | 1]. The position of a sequence's query 0 is its prefix where the call holds
// the drafts alone: q_offset, or Causal::bottom_right if the drafts' keys come last.
inline Pattern<DraftTree> tree(View<const std::uint64_t, 3> words, std::span<const index_t> prefix) {
  return {{words, prefix}};
}
// The window of the options as a mask, to be an operand of Either; negative distances are unbounded.
constexpr Band band(index_t left, index_t right) {
  return {{left < 0 ? kUnbounded : std::min(left, kUnbounded), right < 0 ? kUnbounded : std::min(right, kUnbounded)}};
}
// The last `stride` positions and every `stride`-th before (Sparse Transformer, Child et al. 2019, arXiv 1904.10509, both
// heads of its strided pattern in one); ahead of the query alike, unless the options are causal.
inline Either<Band, Pattern<Dilation>> strided(index_t stride) {
  const index_t near = std::max<index_t>(stride, 1) - 1;
  return {band(near, near), dilated(stride)};
}

// The borders of runs of equal numbers: what document_ids says, where equal numbers stand together and none is negative.
inline std::vector<index_t> document_borders(std::span<const std::int32_t> ids) {
  std::vector<index_t> borders{0};
  for (std::size_t pos = 1; pos < ids.size(); ++pos) {
    if (ids[pos] != ids[pos - 1]) borders.push_back(static_cast<index_t>(pos));
  }
  if (!ids.empty()) borders.push_back(static_cast<index_t>(ids.size()));
  return borders;
}

// What is known of a mask over intervals of positions. Both and Either may call a tile partial that is not.
template <class M>
struct Analytic {
  static constexpr bool kKnown = false;
};
template <class Rule>
struct Analytic<Pattern<Rule>> {
  using M = Pattern<Rule>;
  static constexpr bool kKnown = true, kExact = Rule::kExact;
  FOVEA_INLINE static KeyRange keys(const M& m, int sequence, Positions q) { return m.rule.keys(sequence, q); }
  FOVEA_INLINE static Cover cover(const M& m, int sequence, Positions q, Positions k) {
    return m.rule.cover(sequence, q, k);
  }
};
template <>
struct Analytic<Band> {
  static constexpr bool kKnown = true, kExact = true;
  FOVEA_INLINE static KeyRange keys(const Band& m, int, Positions q) {
    return {q.first - m.reach.left, q.last + m.reach.right + 1};
  }
  FOVEA_INLINE static Cover cover(const Band& m, int, Positions q, Positions k) {
    if (k.last < q.first - m.reach.left || k.first > q.last + m.reach.right) return Cover::skip;
    return k.first >= q.last - m.reach.left && k.last <= q.first + m.reach.right ? Cover::full : Cover::partial;
  }
};
template <>
struct Analytic<Everything> {
  static constexpr bool kKnown = true, kExact = true;
  FOVEA_INLINE static KeyRange keys(const Everything&, int, Positions) { return {0, PTRDIFF_MAX}; }
  FOVEA_INLINE static Cover cover(const Everything&, int, Positions, Positions) { return Cover::full; }
};
template <class A, class B>
  requires(Analytic<A>::kKnown && Analytic<B>::kKnown)
struct Analytic<Both<A, B>> {
  using M = Both<A, B>;
  static constexpr bool kKnown = true, kExact = false;
  FOVEA_INLINE static KeyRange keys(const M& m, int sequence, Positions q) {
    const KeyRange a = Analytic<A>::keys(m.first, sequence, q), b = Analytic<B>::keys(m.second, sequence, q);
    return {std::max(a.begin, b.begin), std::min(a.end, b.end)};
  }
  FOVEA_INLINE static Cover cover(const M& m, int sequence, Positions q, Positions k) {
    const Cover a = Analytic<A>::cover(m.first, sequence, q, k);
    if (a == Cover::skip) return a;
    const Cover b = Analytic<B>::cover(m.second, sequence, q, k);
    return b == Cover::skip || a == Cover::full ? b : Cover::partial;
  }
};
template <class A, class B>
  requires(Analytic<A>::kKnown && Analytic<B>::kKnown)
struct Analytic<Either<A, B>> {
  using M = Either<A, B>;
  static constexpr bool kKnown = true, kExact = false;
  FOVEA_INLINE static KeyRange keys(const M& m, int sequence, Positions q) {
    const KeyRange a = Analytic<A>::keys(m.first, sequence, q), b = Analytic<B>::keys(m.second, sequence, q);
    if (a.begin >= a.end) return b;
    if (b.begin >= b.end) return a;
    return {std::min(a.begin, b.begin), std::max(a.end, b.end)};
  }
  FOVEA_INLINE static Cover cover(const M& m, int sequence, Positions q, Positions k) {
    const Cover a = Analytic<A>::cover(m.first, sequence, q, k);
    if (a == Cover::full) return a;
    const Cover b = Analytic<B>::cover(m.second, sequence, q, k);
    return b == Cover::full || a == Cover::skip ? b : Cover::partial;
  }
};

// One pair in plain arithmetic, for references: keeps(mask, batch, q_head, q, k).
template <class Rule>
bool keeps(const Pattern<Rule>& m, int batch, int q_head, index_t q, index_t k) {
  return m.keeps(batch, q_head, q, k);
}
inline bool keeps(const Band& m, int, int, index_t q, index_t k) { return k >= q - m.reach.left && k <= q + m.reach.right; }
inline bool keeps(const Everything&, int, int, index_t, index_t) { return true; }
template <class F>
bool keeps(const MaskFunction<F>& m, int batch, int q_head, index_t q, index_t k) {
  return m.f(batch, q_head, static_cast<int>(q), static_cast<int>(k));
}
template <class A, class B>
bool keeps(const Both<A, B>& m, int batch, int q_head, index_t q, index_t k) {
  return keeps(m.first, batch, q_head, q, k) && keeps(m.second, batch, q_head, q, k);
}
template <class A, class B>
bool keeps(const Either<A, B>& m, int batch, int q_head, index_t q, index_t k) {
  return keeps(m.first, batch, q_head, q, k) || keeps(m.second, batch, q_head, q, k);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
