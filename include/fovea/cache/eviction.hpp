// SPDX-License-Identifier: Apache-2.0
// Which rows of a cache stay, and how the others leave it.
//   H2O (Zhang et al. 2023, arXiv 2306.14048)       every step: the recent rows, and of the others those with the largest
//                                                   sum of weights so far: KeptTokens, evict_light_rows
//   SnapKV (Li et al. 2024, arXiv 2404.14469)       once, behind the prompt: the rows its last queries vote for, and these
//                                                   queries' own: snapkv_keep
//   PyramidKV (Cai et al. 2024, arXiv 2406.02069)   SnapKV with fewer rows in later layers: pyramid_rows
//   StreamingLLM (Xiao et al. 2023, 2309.17453)     the first rows and the last ones: a RingCache does it by itself
// A policy writes lists of rows, rising, one per kv head and all equally long; keep_rows moves the rows. Keys stay as they
// are stored: rotated keys keep the position they were rotated by, and the next token's position is that in the text
// (KeptTokens::seen), not the number of rows. All kept keys are older than a new query, so it is attended without a causal
// mask.
#pragma once
#include <numeric>

#include "../engine/parts/pooling.hpp"
#include "../simd/select.hpp"
#include "contiguous_cache.hpp"

namespace fovea {
inline namespace v0 {

struct KeptTokensShape {
  index_t sequences = 1, kv_heads = 1, slots = 0;   // of the cache they go with
};

enum class SnapKvPool : std::uint8_t { average, maximum };

struct SnapKvOptions {
  index_t window = 32;       // W: the last queries, which vote and whose keys stay; the published class default is 64
  index_t capacity = 2048;   // rows that stay, the window included; the published class default is 320
  index_t kernel = 5;        // odd; neighbours share votes
  SnapKvPool pool = SnapKvPool::average;
};

inline namespace FOVEA_ARCH {

namespace eviction {

// Scratch for any choice among up to `len` rows: at most two lists of them and a bitmap.
inline std::size_t top_k_bytes(index_t len) { return 3 * top_k_scratch_bytes(len, len); }

// The `best` highest scores, rising, into `to`; returns how many were found. All of them are what they are, NaN or not.
inline index_t choose(std::span<const float> scores, index_t best, std::int32_t* to, std::span<std::byte> scratch) {
  if (best < static_cast<index_t>(scores.size())) return top_k(scores, best, to, scratch);
  std::iota(to, to + best, std::int32_t{0});
  return best;
}

// Rising, inside 0 .. len - 1.
inline Status check_keep(const View<const std::int32_t, 2>& keep, index_t heads, index_t len) {
  if (keep.extent[0] != heads || keep.extent[1] < 0 || (keep.data == nullptr && keep.extent[1] > 0))
    return Status::error(Code::invalid_argument, "cache: rows to keep are [%td, %td], must be [%td, rows]", keep.extent[0],
                         keep.extent[1], heads);
  for (index_t h = 0; h < heads; ++h) {
    std::int32_t before = -1;
    for (index_t n = 0; n < keep.extent[1]; ++n) {
      const std::int32_t row = keep(h, n);
      if (row <= before || row >= len)
        return Status::error(Code::invalid_argument, "cache: row %td of head %td to keep is %d behind %d, of %td", n, h,
                             static_cast<int>(row), static_cast<int>(before), len);
      before = row;
    }
  }
  return {};
}

}   // namespace eviction

// Only the listed rows of a sequence stay, in their order, [kv_head, row]. In place.
inline Status keep_rows(ContiguousCache& cache, index_t sequence, View<const std::int32_t, 2> keep) {
  const CacheRows& rows = cache.rows();
  if (Status s = check_sequence(sequence, cache.sequences()); !s.ok()) return s;
  const index_t len = cache.len(sequence), count = keep.extent[1];
  if (Status s = eviction::check_keep(keep, rows.kv_heads, len); !s.ok()) return s;
  const auto k_bytes = static_cast<std::size_t>(row_bytes(rows.k, rows.dim_qk));
  const auto v_bytes = static_cast<std::size_t>(row_bytes(rows.v, rows.dim_v));
  // Rows only move to the front, over rows that have left or moved. Neighbours that stay neighbours move together.
  const auto move = [&](std::byte* to, const std::byte* from, const std::byte* next, std::size_t row, index_t run) {
    const index_t stride = next == nullptr ? static_cast<index_t>(row) : next - from;
    if (stride == static_cast<index_t>(row)) {
      std::memmove(to, from, row * static_cast<std::size_t>(run));
      return;
    }
    for (index_t n = 0; n < run; ++n) std::memcpy(to + n * stride, from + n * stride, row);
  };
  for (index_t h = 0; h < rows.kv_heads; ++h) {
    for (index_t n = 0; n < count;) {
      const index_t from = keep(h, n);
      index_t run = 1;
      while (n + run < count && keep(h, n + run) == from + run) ++run;
      if (from != n) {
        const bool more = run > 1;
        move(cache.writable_k_row(sequence, h, n), cache.k_row(sequence, h, from),
             more ? cache.k_row(sequence, h, from + 1) : nullptr, k_bytes, run);
        if (!rows.v_in_k)
          move(cache.writable_v_row(sequence, h, n), cache.v_row(sequence, h, from),
               more ? cache.v_row(sequence, h, from + 1) : nullptr, v_bytes, run);
      }
      n += run;
    }
  }
  return cache.truncate(sequence, len - count);
}

// The listed rows of a sequence of any cache (a ring that has turned among them) become all of a sequence of another one.
// Lists are [kv_head of `to`, row]; with G times as many heads there, G neighbours choose from one head here: SnapKV as
// published, where every query head selects. Refused without a trace when `to` has no room.
template <class Cache>
Status keep_rows(const Cache& from, index_t from_sequence, View<const std::int32_t, 2> keep, ContiguousCache& to,
                 index_t to_sequence) {
  const CacheRows &source = from.rows(), &target = to.rows();
  if (Status s = check_sequence(from_sequence, from.sequences()); !s.ok()) return s;
  if (Status s = check_sequence(to_sequence, to.sequences()); !s.ok()) return s;
  if (static_cast<const void*>(&from) == static_cast<const void*>(&to))
    return Status::error(Code::invalid_argument,
                         "cache: rows to keep go from a cache to itself; that is keep_rows in place");
  if (source.k != target.k || source.v_in_k != target.v_in_k || (!source.v_in_k && source.v != target.v) ||
      source.dim_qk != target.dim_qk || source.dim_v != target.dim_v || target.kv_heads % source.kv_heads != 0)
    return Status::error(Code::invalid_argument,
                         "cache: rows of %td heads, %s and %s, dims %td and %td, go to %td heads, %s and %s, %td and %td",
                         source.kv_heads, name_of(source.k), name_of(source.v), source.dim_qk, source.dim_v, target.kv_heads,
                         name_of(target.k), name_of(target.v), target.dim_qk, target.dim_v);
  if (source.k == Format::i8_channel)
    return Status::error(Code::unsupported, "cache: scales per channel belong to their cache, i8_channel rows cannot move");
  if (Status s = eviction::check_keep(keep, target.kv_heads, from.len(from_sequence)); !s.ok()) return s;
  if (keep.extent[1] > to.slots())
    return Status::error(Code::out_of_pages, "cache: %td rows to keep, a sequence has %td slots", keep.extent[1],
                         to.slots());
  if (Status s = to.reset(to_sequence); !s.ok()) return s;
  const auto k_bytes = static_cast<std::size_t>(row_bytes(source.k, source.dim_qk));
  const auto v_bytes = static_cast<std::size_t>(row_bytes(source.v, source.dim_v));
  const index_t group = target.kv_heads / source.kv_heads;
  return to.append(to_sequence, keep.extent[1], [&](index_t n, index_t h, std::byte* k_row, std::byte* v_row) {
    std::memcpy(k_row, from.k_row(from_sequence, h / group, keep(h, n)), k_bytes);
    if (v_row != nullptr) std::memcpy(v_row, from.v_row(from_sequence, h / group, keep(h, n)), v_bytes);
  });
}

// What a cache with evictions has beside it: which token of the text each row is, and the sum of the weights the row has
// had. Owns 12 bytes per slot and kv head, and 13 per slot to choose with. Follows the cache: append, then add, then evict.
class KeptTokens {
 public:
  // Replaces whatever it held; on error it keeps it.
  Status create(const KeptTokensShape& shape) {
    if (shape.sequences < 1 || shape.kv_heads < 1 || shape.slots < 1 || shape.slots > INT32_MAX)
      return Status::error(Code::invalid_argument, "cache: tokens of %td sequences of %td slots in %td heads",
                           shape.sequences, shape.slots, shape.kv_heads);
    if (limited_product({shape.sequences, shape.kv_heads, shape.slots, 16}) == kLargestCache)
      return Status::error(Code::out_of_memory, "cache: tokens of %td sequences of %td slots in %td heads are too much",
                           shape.sequences, shape.slots, shape.kv_heads);
    const std::size_t scratch = eviction::top_k_bytes(shape.slots);
    const auto take = [&](Bump& bump, State& state) {
      state.shape = shape;
      state.token = bump.take<std::int32_t>(shape.sequences * shape.kv_heads * shape.slots);
      state.score = bump.take<float>(shape.sequences * shape.kv_heads * shape.slots);
      state.len = bump.take<index_t>(shape.sequences);
      state.seen = bump.take<index_t>(shape.sequences);
      state.keep = bump.take<std::int32_t>(shape.kv_heads * shape.slots);
      state.scratch = {bump.take<std::byte>(static_cast<index_t>(scratch)), scratch};
    };
    if (Status s = allocate(owned_, take); !s.ok()) return s;
    std::fill_n(state().len, shape.sequences, index_t{0});
    std::fill_n(state().seen, shape.sequences, index_t{0});
    std::fill_n(state().score, shape.sequences * shape.kv_heads * shape.slots, 0.f);
    return {};
  }

  // New rows: the next tokens of the text, without weights so far.
  Status append(index_t sequence, index_t count) {
    if (Status s = first_error({check_sequence(sequence, shape().sequences), check_count(count)}); !s.ok()) return s;
    index_t &len = state().len[sequence], &seen = state().seen[sequence];
    if (count > shape().slots - len || seen > INT32_MAX - count)
      return Status::error(Code::out_of_pages,
                           "cache: %td tokens to append, sequence %td has %td of %td slots left, %td seen", count, sequence,
                           shape().slots - len, shape().slots, seen);
    for (index_t h = 0; h < shape().kv_heads; ++h) {
      for (index_t n = 0; n < count; ++n) {
        token_at(sequence, h)[len + n] = static_cast<std::int32_t>(seen + n);
        score_at(sequence, h)[len + n] = 0.f;
      }
    }
    len += count;
    seen += count;
    return {};
  }

  // Weights that a step gave to the rows, [kv_head or q_head, row], one query's or a sum over queries. Query heads that
  // share a kv head add up, in their order.
  Status add(index_t sequence, View<const float, 2> weights) {
    if (Status s = check_sequence(sequence, shape().sequences); !s.ok()) return s;
    const index_t len = state().len[sequence], kv_heads = shape().kv_heads;
    if (weights.extent[0] < kv_heads || weights.extent[0] % kv_heads != 0 || weights.extent[1] < len ||
        (weights.data == nullptr && len > 0))
      return Status::error(Code::invalid_argument,
                           "cache: weights are [%td, %td], must be [a multiple of %td, at least %td]", weights.extent[0],
                           weights.extent[1], kv_heads, len);
    const index_t group = weights.extent[0] / kv_heads;
    for (index_t q_head = 0; q_head < weights.extent[0]; ++q_head) {
      float* const score = score_at(sequence, q_head / group);
      for (index_t n = 0; n < len; ++n) score[n] += weights(q_head, n);
    }
    return {};
  }

  // The rows of `keep` stay, as keep_rows does it in the cache.
  Status keep(index_t sequence, View<const std::int32_t, 2> keep) {
    if (Status s = check_sequence(sequence, shape().sequences); !s.ok()) return s;
    if (Status s = eviction::check_keep(keep, shape().kv_heads, state().len[sequence]); !s.ok()) return s;
    for (index_t h = 0; h < shape().kv_heads; ++h) {
      for (index_t n = 0; n < keep.extent[1]; ++n) {
        token_at(sequence, h)[n] = token_at(sequence, h)[keep(h, n)];
        score_at(sequence, h)[n] = score_at(sequence, h)[keep(h, n)];
      }
    }
    state().len[sequence] = keep.extent[1];
    return {};
  }

  // H2O's choice: the last `recent` rows, and of the others the `heavy` ones with the largest sums; of equal sums the older
  // row. [kv_head, row], valid until the next call. All rows while there are no more than heavy + recent.
  Status choose_heavy(index_t sequence, index_t heavy, index_t recent, View<const std::int32_t, 2>& keep) {
    if (Status s = check_sequence(sequence, shape().sequences); !s.ok()) return s;
    if (heavy < 0 || recent < 0 || heavy > kLargestCache || recent > kLargestCache)
      return Status::error(Code::invalid_argument, "cache: %td heavy and %td recent rows to keep", heavy, recent);
    const index_t len = state().len[sequence], slots = shape().slots;
    const index_t last = std::min(recent, len), others = len - last, best = std::min(heavy, others);
    for (index_t h = 0; h < shape().kv_heads; ++h) {
      std::int32_t* const to = state().keep + h * slots;
      float* const score = score_at(sequence, h);
      const index_t found = eviction::choose({score, static_cast<std::size_t>(others)}, best, to, state().scratch);
      if (found != best)
        return Status::error(Code::invalid_argument, "cache: head %td of sequence %td has %td finite sums, %td rows stay", h,
                             sequence, found, best);
      for (index_t n = 0; n < last; ++n) to[best + n] = static_cast<std::int32_t>(others + n);
    }
    keep = {state().keep, {shape().kv_heads, best + last}, {slots, 1}};
    return {};
  }

  // The sums, for column_sums to add to: {.keys = kept.running_sums(), .add = true} with the cache's lengths.
  View<float, 3> running_sums() {   // [sequence, kv_head, slot]
    return {state().score,
            {shape().sequences, shape().kv_heads, shape().slots},
            {shape().kv_heads * shape().slots, shape().slots, 1}};
  }

  Status reset(index_t sequence) {
    if (Status s = check_sequence(sequence, shape().sequences); !s.ok()) return s;
    state().len[sequence] = state().seen[sequence] = 0;
    return {};
  }

  const KeptTokensShape& shape() const { return owned_.state.shape; }
  std::size_t bytes() const { return owned_.block.size(); }
  index_t len(index_t sequence) const { return state().len[sequence]; }
  // Tokens appended, evicted ones included: the position of the next one in the text.
  index_t seen(index_t sequence) const { return state().seen[sequence]; }
  std::span<const std::int32_t> tokens(index_t sequence, index_t kv_head) const {   // [row]
    return {token_at(sequence, kv_head), static_cast<std::size_t>(len(sequence))};
  }
  std::span<const float> scores(index_t sequence, index_t kv_head) const {   // [row]
    return {score_at(sequence, kv_head), static_cast<std::size_t>(len(sequence))};
  }

 private:
  struct State {
    KeptTokensShape shape{0, 0, 0};   // of a cache that was not created
    std::int32_t* token = nullptr;    // [sequence, kv_head, slot]
    float* score = nullptr;           // [sequence, kv_head, slot]
    index_t* len = nullptr;           // [sequence]
    index_t* seen = nullptr;          // [sequence]
    std::int32_t* keep = nullptr;     // [kv_head, slot]
    std::span<std::byte> scratch{};
  };
  const State& state() const { return owned_.state; }
  std::int32_t* token_at(index_t sequence, index_t kv_head) const {
    return state().token + (sequence * shape().kv_heads + kv_head) * shape().slots;
  }
  float* score_at(index_t sequence, index_t kv_head) const {
    return state().score + (sequence * shape().kv_heads + kv_head) * shape().slots;
  }

  Owned<State> owned_;
};

// H2O's eviction: chooses and moves the rows of a cache and of what stands beside it. The prompt's rows may be more than
// heavy + recent at once. A row that has left never comes back, and its sum with it.
inline Status evict_light_rows(ContiguousCache& cache, KeptTokens& kept, index_t sequence, index_t heavy, index_t recent) {
  if (Status s = check_sequence(sequence, cache.sequences()); !s.ok()) return s;
  const KeptTokensShape& shape = kept.shape();
  if (shape.sequences <= sequence || shape.kv_heads != cache.rows().kv_heads || kept.len(sequence) != cache.len(sequence))
    return Status::error(Code::invalid_argument, "cache: sequence %td has %td rows in %td heads, its tokens are %td in %td",
                         sequence, cache.len(sequence), cache.rows().kv_heads,
                         shape.sequences <= sequence ? index_t{0} : kept.len(sequence), shape.kv_heads);
  View<const std::int32_t, 2> keep;
  if (Status s = kept.choose_heavy(sequence, heavy, recent, keep); !s.ok()) return s;
  if (keep.extent[1] == kept.len(sequence)) return {};
  if (Status s = keep_rows(cache, sequence, keep); !s.ok()) return s;
  return kept.keep(sequence, keep);
}

// Rows that SnapKV keeps of `len`.
inline index_t snapkv_rows(index_t len, const SnapKvOptions& options) { return std::min(len, options.capacity); }

// Rows of layer `layer` of `layers`, the window included; for SnapKvOptions::capacity. Early layers keep more: from
// (capacity - window) / beta, or what mirrors the longest prefix there is, in equal steps.
inline index_t pyramid_rows(index_t layer, index_t layers, index_t len, index_t capacity, index_t window,
                            index_t beta = 20) {
  const index_t prefix = capacity - window;
  if (len < capacity) return len;
  if (len < 2 * prefix || layers < 2) return capacity;
  index_t least = prefix / beta, most = 2 * prefix - least;
  if (most >= len - window) {
    most = len - window;
    least = 2 * prefix - most;
  }
  return most - layer * ((most - least) / (layers - 1)) + window;
}

// Bytes of memory for snapkv_keep.
inline std::size_t snapkv_bytes(index_t len, const SnapKvOptions& options) {
  Bump bump;
  bump.take<float>(len);
  bump.take<float>(len);
  bump.take<std::int32_t>(snapkv_rows(len, options));
  bump.take<std::byte>(static_cast<index_t>(eviction::top_k_bytes(len)));
  return bump.used() + kAlignment;
}

// The rows that stay, rising: the capacity - window ones of the prefix with the most votes, and the window's. A vote is the
// sum of the weights the window's queries give a key (column_sums), smoothed over `kernel` neighbours within the prefix; an
// average divides by `kernel` at the edges too, as published. Of equal votes the earlier row. With the votes of q heads and
// lists of kv heads, a group votes by its mean; with lists of q heads every query head selects, as published. Rows are f32:
// the published code rounds weights to the model's format before it adds them up.
inline Status snapkv_keep(View<const float, 2> votes,   // [head, at least len]  the window's own columns are not read
                          index_t len, View<std::int32_t, 2> keep,   // [head or a divisor, snapkv_rows(len)]
                          std::span<std::byte> memory,               // snapkv_bytes(len, options)
                          const SnapKvOptions& options = {}) {
  const index_t count = snapkv_rows(len, options), heads = keep.extent[0];
  if (len < 0 || len > INT32_MAX || options.window < 0 || options.capacity < options.window || options.kernel < 1 ||
      options.kernel % 2 == 0)
    return Status::error(
        Code::invalid_argument,
        "cache: SnapKV of %td rows: window %td, capacity %td, kernel %td; an odd kernel, the window at most "
        "the capacity",
        len, options.window, options.capacity, options.kernel);
  if (heads < 1 || votes.extent[0] < heads || votes.extent[0] % heads != 0 || votes.extent[1] < len ||
      keep.extent[1] != count)
    return Status::error(Code::invalid_argument,
                         "cache: votes are [%td, %td] and rows to keep [%td, %td], must be [a multiple of heads, at least "
                         "%td] and [heads, %td]",
                         votes.extent[0], votes.extent[1], heads, keep.extent[1], len, count);
  if ((votes.data == nullptr || keep.data == nullptr) && count > 0)
    return Status::error(Code::invalid_argument, "cache: votes or rows to keep have null data");
  if (memory.size() < snapkv_bytes(len, options))
    return Status::error(Code::workspace_too_small, "cache: memory has %zu bytes, SnapKV needs %zu", memory.size(),
                         snapkv_bytes(len, options));
  Bump bump(aligned(memory).data());
  float* const vote = bump.take<float>(len);
  float* const smooth = bump.take<float>(len);
  const std::size_t scratch = eviction::top_k_bytes(len);
  std::int32_t* const chosen = bump.take<std::int32_t>(count);
  std::byte* const select_bytes = bump.take<std::byte>(static_cast<index_t>(scratch));
  const index_t window = std::min(options.window, count), prefix = len - window, best = count - window;
  const index_t group = votes.extent[0] / heads;
  for (index_t h = 0; h < heads; ++h) {
    for (index_t row = 0; row < prefix; ++row) {
      float sum = 0.f;
      for (index_t n = 0; n < group; ++n) sum += votes(h * group + n, row);
      vote[row] = sum / static_cast<float>(group);
    }
    const std::span<const float> prefix_votes{vote, static_cast<std::size_t>(prefix)};
    if (options.pool == SnapKvPool::average) {
      average_pool(prefix_votes, options.kernel, 1, options.kernel / 2, smooth);
    } else {
      max_pool(prefix_votes, options.kernel, 1, options.kernel / 2, smooth);
    }
    const index_t found = eviction::choose({smooth, static_cast<std::size_t>(prefix)}, best, chosen, {select_bytes, scratch});
    if (found != best)
      return Status::error(Code::invalid_argument, "cache: head %td has %td finite votes, %td rows stay", h, found, best);
    for (index_t n = 0; n < count; ++n) keep(h, n) = n < best ? chosen[n] : static_cast<std::int32_t>(prefix + n - best);
  }
  return {};
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
