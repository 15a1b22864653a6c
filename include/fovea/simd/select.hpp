// SPDX-License-Identifier: Apache-2.0
// Exact selection from a row of scores. The total order is score descending, then index ascending; -0 equals +0; NaN counts
// as lower than -inf, and neither of them is ever taken. Results are indices in ascending order, so sums over them have one
// order and caches are read forwards. Everything is decided on the bits of the scores: no rounding mode, no flushing of
// denormals, no number of lanes changes a result (docs/selection.md).
//
// top_k reads a long row once. A jittered sample of it gives a bound that about twice k scores reach; one pass of
// comparisons marks those in a bitmap, a bit per score; the k best of them follow by bisection over the integers that order
// floats, each step one count over some thousand keys in L1. The sample decides about time only: where the bound was a bad
// guess (many equal scores), the bisection runs over the whole row instead, up to 35 passes, 5 where all scores are equal.
// Short rows start with it. One core of 2.2 GHz with AVX-512, uniform scores: 2048 of 131072 in 35 us, 2048 of 1048576 in
// 0.44 ms, 64 of 4096 in 1.9 us (46, 13 and 8 times std::partial_sort); equal scores take three times as long.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include "../core/workspace.hpp"
#include "narrow.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// Bytes that top_k and its relatives use, aligned to anything.
using TopKScratch = std::span<std::byte>;

// For up to INT32_MAX scores; never less for a longer row or a larger k.
inline std::size_t top_k_scratch_bytes(index_t n, index_t k);

// The k best of `scores`, to `to` [k] in ascending order of index, -1 behind them; how many they are: less than k where
// fewer scores are above -inf. scratch: top_k_scratch_bytes(n, k) of it.
inline index_t top_k(std::span<const float> scores, index_t k, std::int32_t* to, TopKScratch scratch);

// All indices with scores[i] >= bound, or > bound, to `to` [n], ascending; how many. No scratch.
inline index_t select_at_least(std::span<const float> scores, float bound, std::int32_t* to);
inline index_t select_above(std::span<const float> scores, float bound, std::int32_t* to);

// The k smallest of the distances that are at most max_distance (larger ones mark keys that may not be taken), ties to the
// lower index, to `to` [k] ascending, -1 behind them; how many. For few distinct distances, as the 385 of 128 two-bit codes:
// some 4 passes over a long row, 20 at worst.
inline index_t select_smallest(std::span<const std::uint16_t> distances, index_t k, std::uint16_t max_distance,
                               std::int32_t* to);

// An integer that orders scores as above: NaN lowest, both zeros 0. Its upper bit flipped it is the usual unsigned radix
// key.
constexpr std::int32_t order_key(float score) {
  const auto bits = std::bit_cast<std::int32_t>(score);
  if ((bits & 0x7fffffff) > 0x7f800000) return INT32_MIN;
  if (bits == INT32_MIN) return 0;
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
// A score of that key; both zeros have the key 0.
constexpr float score_of_key(std::int32_t key) { return std::bit_cast<float>(key ^ ((key >> 31) & 0x7fffffff)); }

namespace selection {

inline constexpr std::int32_t kNever = order_key(-std::numeric_limits<float>::infinity());   // this key and lower ones
inline constexpr std::int32_t kInfinity = order_key(std::numeric_limits<float>::infinity());

// Both zeros apart and NaN at the ends: what is cheap to make of many scores.
FOVEA_INLINE i32 raw_keys(f32 scores) {
  const i32 bits = float_bits(scores);
  return bits ^ ((bits >> 31) & i32(0x7fffffff));
}
FOVEA_INLINE i32 order_keys(f32 scores) {
  const i32 raw = raw_keys(scores);
  const i32 key = select_int(raw == i32(-1), i32(0), raw);
  return select_int(key > i32(kInfinity), i32(INT32_MIN), key);
}

FOVEA_INLINE index_t sum_of(i32 counts) {
  alignas(i32) std::int32_t lanes[kLanes];
  counts.store_aligned(lanes);
  index_t sum = 0;
  for (const std::int32_t lane : lanes) sum += lane;
  return sum;
}

// What a bisection knows: at_low keys, at least as many as wanted, reach `low`; `above`, fewer than wanted, reach `high`.
struct Bracket {
  std::int32_t low, high;
  index_t at_low, above;
};
// Narrows it until no more than `enough` keys reach `low`, or until high = low + 1. at_least(key) counts. The step behind
// `low` comes first where many keys may equal it.
template <class AtLeast>
Bracket narrow(Bracket bracket, const AtLeast& at_least, index_t wanted, index_t enough, bool ties_first) {
  while (bracket.at_low > enough && bracket.high - 1 > bracket.low) {
    const std::int64_t half = (std::int64_t{bracket.high} - std::int64_t{bracket.low}) / 2;
    const auto middle = static_cast<std::int32_t>(bracket.low + (ties_first ? 1 : half));
    ties_first = false;
    const index_t count = at_least(middle);
    if (count >= wanted) {
      bracket.low = middle;
      bracket.at_low = count;
    } else {
      bracket.high = middle;
      bracket.above = count;
    }
  }
  return bracket;
}

// What is taken: every key above `key`, and the first `ties` of those that equal it.
struct Threshold {
  std::int32_t key;
  index_t ties;
};
FOVEA_INLINE Threshold threshold_of(const Bracket& bracket, index_t k) {
  if (bracket.at_low <= k) return {bracket.low - 1, 0};
  return {bracket.low, k - bracket.above};
}

// The lanes taken, as bits. `ties` counts down.
FOVEA_INLINE unsigned taken_bits(i32 keys, std::int32_t threshold, index_t& ties) {
  unsigned taken = keep_bits(as_keep(keys > i32(threshold)));
  if (ties == 0) return taken;
  for (unsigned equal = keep_bits(as_keep(keys == i32(threshold))); equal != 0 && ties > 0; equal &= equal - 1, --ties)
    taken |= equal & (~equal + 1u);
  return taken;
}

// Keys in L1 or L2 with room for whole vectors.
struct Keys {
  std::int32_t* data;
  index_t count;
  std::int32_t smallest, largest;

  index_t at_least(std::int32_t key) const {
    i32 first(0), second(0);
    const i32 bound(key), one(1);
    index_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
      first = select_int(i32::load_unaligned(data + i) >= bound, first + one, first);
      second = select_int(i32::load_unaligned(data + i + kLanes) >= bound, second + one, second);
    }
    for (; i < count; i += kLanes) first = select_int(i32::load_unaligned(data + i) >= bound, first + one, first);
    return sum_of(first + second);
  }
  // All that may be taken.
  Bracket eligible() const {
    const std::int32_t low = std::max(smallest, kNever + 1);
    if (count == 0 || largest < low) return {kNever + 1, kNever + 2, 0, 0};
    return {low, largest + 1, at_least(low), 0};
  }
};

// to[i] = the key of score(i .. i + kLanes - 1), INT32_MIN behind them up to a whole vector.
template <class Scores>
FOVEA_INLINE Keys make_keys(index_t count, std::int32_t* to, const Scores& scores) {
  i32 smallest(INT32_MAX), largest(INT32_MIN);
  for (index_t i = 0; i < count; i += kLanes) {
    i32 key = order_keys(scores(i));
    if (count - i < kLanes)
      key = select_int(lane_numbers() < i32(static_cast<std::int32_t>(count - i)), key, i32(INT32_MIN));
    key.store_unaligned(to + i);
    smallest = select_int(key < smallest, key, smallest);
    largest = select_int(key > largest, key, largest);
  }
  alignas(i32) std::int32_t low[kLanes], high[kLanes];
  smallest.store_aligned(low);
  largest.store_aligned(high);
  return {to, count, *std::min_element(low, low + kLanes), *std::max_element(high, high + kLanes)};
}

// The best k of the keys, as indices: their own numbers, or names[number]. `names` has room for whole vectors.
inline index_t take_best(const Keys& keys, const std::int32_t* names, index_t k, std::int32_t* to) {
  const Bracket whole = keys.eligible();
  const auto at_least = [&](std::int32_t key) { return keys.at_least(key); };
  const Threshold threshold =
      whole.at_low <= k ? Threshold{kNever, 0} : threshold_of(narrow(whole, at_least, k, k, false), k);
  index_t ties = threshold.ties, taken = 0;
  for (index_t i = 0; i < keys.count; i += kLanes) {
    const unsigned bits = taken_bits(i32::load_unaligned(keys.data + i), threshold.key, ties);
    store_kept(to + taken,
               names == nullptr ? lane_numbers() + i32(static_cast<std::int32_t>(i)) : i32::load_unaligned(names + i), bits);
    taken += std::popcount(bits);
  }
  return taken;
}

inline constexpr index_t kWord = 64;

// Bit i % 64 of word i / 64: keep(scores i ...). Returns how many bits are set.
template <class Keep>
FOVEA_INLINE index_t mark(const float* scores, index_t count, const Keep& keep, std::uint64_t* words) {
  index_t marked = 0, i = 0;
  for (; i + kWord <= count; i += kWord, ++words) {
    std::uint64_t word = 0;
    FOVEA_UNROLL
    for (index_t n = 0; n < kWord; n += kLanes) word |= std::uint64_t{keep(load(scores + i + n))} << n;
    *words = word;
    marked += std::popcount(word);
  }
  if (i == count) return marked;
  std::uint64_t word = 0;
  for (index_t n = 0; i + n < count; n += kLanes) {
    const index_t here = std::min(kLanes, count - i - n);
    const f32 some = here == kLanes ? load(scores + i + n) : load_some(scores + i + n, here);
    word |= (std::uint64_t{keep(some)} & ((std::uint64_t{1} << here) - 1)) << n;
  }
  *words = word;
  return marked + std::popcount(word);
}
inline index_t mark_at_least(const float* scores, index_t count, float bound, std::uint64_t* words) {
  return mark(
      scores, count, [bound](f32 x) { return keep_bits(x >= f32(bound)); }, words);
}

// The numbers of the set bits from `first` on. to has `room` entries; four at a time are written where they fit, because the
// number of bits of a word is random and a loop over them would be predicted wrongly once a word.
inline index_t list_marked(const std::uint64_t* words, index_t count, index_t first, std::int32_t* to, index_t room) {
  index_t listed = 0;
  for (index_t w = 0; w < count; ++w, first += kWord) {
    std::uint64_t word = words[w];
    const auto base = static_cast<std::int32_t>(first);
    const index_t end = listed + std::popcount(word);
    if (listed + 4 <= room) {
      FOVEA_UNROLL
      for (index_t n = 0; n < 4; ++n, word &= word - 1) to[listed + n] = base + std::countr_zero(word);
      listed += 4;
    }
    for (; listed < end; word &= word - 1) to[listed++] = base + std::countr_zero(word);
    listed = end;
  }
  return listed;
}

// Rows at most this long, and rows of which a quarter is wanted, are ordered as they are.
inline constexpr index_t kShort = 1024;
inline constexpr index_t kSample = 4096;
constexpr bool is_sampled(index_t n, index_t k) { return n > kShort && k < n / 4; }
constexpr index_t sample_size(index_t n) { return std::min(kSample, n / 16); }

// The place in the sample whose score at least k scores reach, up to 1 in 30,000 samples: four standard deviations.
inline double sample_rank(double scores_per_sample, index_t k) {
  const double expected = static_cast<double>(k) / scores_per_sample;
  return expected + 4 * std::sqrt(expected) + 4;
}
// Twice as many candidates as are expected fit. Grows with n and k, so that memory for a long row serves shorter ones.
inline index_t candidate_room(index_t n, index_t k) {
  const double scores_per_sample = std::max(16., static_cast<double>(n) / static_cast<double>(kSample));
  const double expected = sample_rank(scores_per_sample, std::min(k, n)) * scores_per_sample;
  return std::min(n, static_cast<index_t>(2 * expected) + k);
}

struct Memory {
  std::int32_t* keys;     // of a short row, of the sample, then of the candidates
  std::int32_t* names;    // [room] candidates
  std::uint64_t* words;   // the bitmap
  index_t room;
};
inline Memory carve(Bump& bump, index_t n, index_t k) {
  const index_t room = candidate_room(n, k), short_row = std::max(kShort, 4 * std::min(k, n) + 3);
  const index_t keys = std::min(n, std::max({room, short_row, kSample}));
  return {bump.take<std::int32_t>(keys + kLanes), bump.take<std::int32_t>(room + kLanes),
          bump.take<std::uint64_t>((n + kWord - 1) / kWord), room};
}
inline Memory carve(TopKScratch scratch, index_t n, index_t k) {
  FOVEA_ASSERT(scratch.size() >= top_k_scratch_bytes(n, k));
  Bump bump(aligned(scratch).data());
  return carve(bump, n, k);
}

// One score of every n / sample_size, at a place that no period of the scores shares.
inline float sample_bound(const float* scores, index_t n, index_t k, std::int32_t* keys) {
  const index_t size = sample_size(n), stride = n / size;
  std::uint32_t mixed = 0;
  const Keys sample = make_keys(size, keys, [&](index_t i) {
    alignas(f32) float lanes[kLanes];
    for (index_t lane = 0; lane < kLanes; ++lane) {
      mixed += 0x9e3779b9u;   // the golden ratio: every run of them is spread evenly
      const auto within = static_cast<index_t>(std::uint64_t{mixed} * static_cast<std::uint64_t>(stride) >> 32);
      lanes[lane] = scores[std::min(i + lane, size - 1) * stride + within];
    }
    return f32::load_aligned(lanes);
  });
  const auto rank = static_cast<index_t>(sample_rank(static_cast<double>(n) / static_cast<double>(size), k));
  const Bracket whole = sample.eligible();
  if (whole.at_low < rank) return std::numeric_limits<float>::lowest();
  const auto at_least = [&](std::int32_t key) { return sample.at_least(key); };
  return score_of_key(narrow(whole, at_least, rank, rank + rank / 8, false).low);
}

// How many raw keys reach `key`.
inline index_t count_raw(const float* scores, index_t n, std::int32_t key) {
  i32 counts(0);
  const i32 bound(key), one(1);
  index_t i = 0, sum = 0;
  for (; i + kLanes <= n; i += kLanes) counts = select_int(raw_keys(load(scores + i)) >= bound, counts + one, counts);
  for (; i < n; ++i) {
    const auto bits = std::bit_cast<std::int32_t>(scores[i]);
    sum += (bits ^ ((bits >> 31) & 0x7fffffff)) >= key ? 1 : 0;
  }
  return sum + sum_of(counts);
}

// The best k of a long row whose bound was no help.
FOVEA_NOINLINE inline index_t take_by_passes(const float* scores, index_t n, index_t k, float bound, std::uint64_t* words,
                                             std::int32_t* to) {
  const index_t positive_nan = count_raw(scores, n, kInfinity + 1);
  // -0 has a raw key of its own below that of +0; NaN stand behind infinity.
  const auto at_least = [&](std::int32_t key) { return count_raw(scores, n, key == 0 ? -1 : key) - positive_nan; };
  Bracket bracket{kNever + 1, kInfinity + 1, at_least(kNever + 1), 0};
  Threshold threshold{kNever, 0};
  if (bracket.at_low > k) {
    const std::int32_t guess = order_key(bound);
    const index_t reach_it = at_least(guess);   // `marked` where no mode of the processor flushes denormals
    if (reach_it >= k) {
      bracket.low = guess;
      bracket.at_low = reach_it;
    } else {
      bracket.high = guess;
      bracket.above = reach_it;
    }
    threshold = threshold_of(narrow(bracket, at_least, k, k, reach_it >= k), k);
  }
  index_t ties = threshold.ties;
  const auto taken = [&](f32 x) { return taken_bits(order_keys(x), threshold.key, ties); };
  static_cast<void>(mark(scores, n, taken, words));
  return list_marked(words, (n + kWord - 1) / kWord, 0, to, k);
}

// Whether the marked scores hold all of the best k, and are few enough to be listed.
inline bool is_enough(index_t marked, index_t k, float bound, index_t room) {
  return marked <= room && (marked >= k || bound == std::numeric_limits<float>::lowest());
}

// The best k of the candidates names[0 .. count), which hold all of the row's best k.
inline index_t take_candidates(const float* scores, std::int32_t* names, index_t count, index_t k, std::int32_t* keys,
                               std::int32_t* to) {
  std::fill_n(names + count, kLanes, 0);
  const Keys candidates = make_keys(count, keys, [&](index_t i) { return gather(scores, i32::load_unaligned(names + i)); });
  return take_best(candidates, names, k, to);
}

}   // namespace selection

inline std::size_t top_k_scratch_bytes(index_t n, index_t k) {
  Bump counting;
  selection::carve(counting, n, k);
  return counting.used() + kAlignment;
}

inline index_t top_k(std::span<const float> scores, index_t k, std::int32_t* to, TopKScratch scratch) {
  using namespace selection;
  if (k <= 0) return 0;
  const auto n = static_cast<index_t>(scores.size());
  FOVEA_ASSERT(n <= INT32_MAX);
  const Memory memory = carve(scratch, n, k);
  index_t taken;
  if (!is_sampled(n, k)) {
    const Keys keys = make_keys(n, memory.keys, [&](index_t i) {
      return n - i >= kLanes ? load(scores.data() + i) : load_some(scores.data() + i, n - i);
    });
    taken = take_best(keys, nullptr, k, to);
  } else {
    const float bound = sample_bound(scores.data(), n, k, memory.keys);
    const index_t marked = mark_at_least(scores.data(), n, bound, memory.words);
    if (is_enough(marked, k, bound, memory.room)) {
      list_marked(memory.words, (n + kWord - 1) / kWord, 0, memory.names, memory.room + kLanes);
      taken = take_candidates(scores.data(), memory.names, marked, k, memory.keys, to);
    } else {
      taken = take_by_passes(scores.data(), n, k, bound, memory.words, to);
    }
  }
  std::fill(to + taken, to + k, -1);
  return taken;
}

namespace selection {

template <class Keep>
index_t select_where(std::span<const float> scores, const Keep& keep, std::int32_t* to) {
  const auto n = static_cast<index_t>(scores.size());
  constexpr index_t kWords = 64, kRun = kWords * kWord;
  std::uint64_t words[kWords];
  index_t taken = 0;
  for (index_t first = 0; first < n; first += kRun) {
    const index_t here = std::min(kRun, n - first);
    static_cast<void>(mark(scores.data() + first, here, keep, words));
    taken += list_marked(words, (here + kWord - 1) / kWord, first, to + taken, n - taken);
  }
  return taken;
}

// f(from, first, in_use) for every 32 distances from number `first` on; the last ones are a copy, bits say which are in use.
template <class F>
FOVEA_INLINE void each_32(std::span<const std::uint16_t> distances, const F& f) {
  const auto n = static_cast<index_t>(distances.size());
  index_t i = 0;
  for (; i + 32 <= n; i += 32) f(distances.data() + i, i, ~std::uint32_t{0});
  if (i == n) return;
  std::uint16_t last[32] = {};
  std::copy(distances.begin() + i, distances.end(), last);
  f(last, i, (std::uint32_t{1} << (n - i)) - 1);
}
inline index_t count_at_most(std::span<const std::uint16_t> distances, std::uint16_t bound) {
  index_t count = 0;
  each_32(distances, [&](const std::uint16_t* from, index_t, std::uint32_t in_use) {
    count += std::popcount(at_most_bits(from, bound) & in_use);
  });
  return count;
}
// Where the k-th distance should be, by every 8th run of 32. Steps from there double, so a wrong guess costs a few passes.
inline std::int32_t guess_distance(std::span<const std::uint16_t> distances, index_t k, std::int32_t max_distance) {
  constexpr std::size_t kStride = 256;
  std::int32_t low = -1, high = max_distance;
  if (distances.size() < 16 * kStride) return -1;
  while (high - low > 1) {
    const std::int32_t middle = low + (high - low) / 2;
    index_t count = 0;
    for (std::size_t i = 0; i + 32 <= distances.size(); i += kStride)
      count += std::popcount(at_most_bits(distances.data() + i, static_cast<std::uint16_t>(middle)));
    if (8 * count >= k) {
      high = middle;
    } else {
      low = middle;
    }
  }
  return high;
}

}   // namespace selection

inline index_t select_at_least(std::span<const float> scores, float bound, std::int32_t* to) {
  return selection::select_where(
      scores, [bound](f32 x) { return keep_bits(x >= f32(bound)); }, to);
}
inline index_t select_above(std::span<const float> scores, float bound, std::int32_t* to) {
  return selection::select_where(
      scores, [bound](f32 x) { return keep_bits(x > f32(bound)); }, to);
}

inline index_t select_smallest(std::span<const std::uint16_t> distances, index_t k, std::uint16_t max_distance,
                               std::int32_t* to) {
  using namespace selection;
  if (k <= 0) return 0;
  // Fewer than k are at most `low`, `below` of them; k or more are at most `high`, or all that may be taken.
  std::int32_t low = -1, high = max_distance, next = guess_distance(distances, k, max_distance), step = 1;
  index_t below = 0;
  for (; high - low > 1; step *= 2) {
    const std::int32_t middle = next > low && next < high ? next : low + (high - low) / 2;
    const index_t count = count_at_most(distances, static_cast<std::uint16_t>(middle));
    if (count >= k) {
      high = middle;
      next = middle - step;
    } else {
      low = middle;
      below = count;
      next = middle + step;
    }
  }
  index_t ties = k - below, taken = 0;
  each_32(distances, [&](const std::uint16_t* from, index_t first, std::uint32_t in_use) {
    const std::uint32_t nearer = low < 0 ? 0 : at_most_bits(from, static_cast<std::uint16_t>(low)) & in_use;
    std::uint32_t equal = at_most_bits(from, static_cast<std::uint16_t>(high)) & in_use & ~nearer, bits = nearer;
    for (; equal != 0 && ties > 0; equal &= equal - 1, --ties) bits |= equal & (~equal + 1u);
    for (; bits != 0; bits &= bits - 1) to[taken++] = static_cast<std::int32_t>(first) + std::countr_zero(bits);
  });
  std::fill(to + taken, to + k, -1);
  return taken;
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
