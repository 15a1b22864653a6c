// SPDX-License-Identifier: Apache-2.0
// BlockMask: which blocks of a mask are empty, full or partial, found once and used by many calls (FlexAttention, Dong et
// al. 2024, arXiv 2412.05496). Empty blocks cost a look at a bitmap, full blocks never ask the mask.
//
//   const auto spiral = [](int, int, int q, auto k) { return (k <= q) & ((q - k < 64) | (k < 4)); };
//   fovea::BlockMask blocks;
//   fovea::Status status = blocks.build({.len_q = len, .len_k = len}, spiral);
//   status = fovea::attention(q, k, v, out, {}, fovea::variant().with_mask(fovea::block_masked(blocks, spiral)));
#pragma once
#include <bit>
#include <memory>
#include <new>
#include <string>

#include "../../core/attention_options.hpp"
#include "../deal.hpp"
#include "pattern_masks.hpp"

namespace fovea {
inline namespace v0 {

// Queries 0 .. len_q - 1 against keys 0 .. len_k - 1, counted in positions: a decode at position p uses row p of the mask.
struct BlockMaskShape {
  index_t batch = 1, q_heads = 1;   // 1 = one mask for all
  index_t len_q = 0, len_k = 0;
  index_t q_block = 128, k_block = 128;
};

struct BlockCounts {
  index_t full, partial, empty;
};

inline namespace FOVEA_ARCH {

// A built mask, to be copied freely; the BlockMask it came from must outlive it. Positions, sequences and heads beyond the
// mask see nothing and are not seen.
class BlockMaskView {
 public:
  struct Keys {
    std::int32_t begin, end;   // hull of the live blocks, empty where none is
  };
  // A row of blocks: bit i of `live` says that block i is not empty, of `full` that it is whole. Null beyond the mask.
  struct BlockRow {
    const std::uint64_t *live, *full;
    Keys keys;
  };

  BlockMaskView() = default;
  BlockMaskView(const BlockMaskShape& shape, const std::uint64_t* bits, const Keys* keys)
      : shape_(shape), q_(shape.q_block), k_(shape.k_block), bits_(bits), keys_(keys) {
    q_blocks_ = blocks(shape.len_q, shape.q_block);
    k_blocks_ = blocks(shape.len_k, shape.k_block);
    words_ = words(k_blocks_);
  }

  const BlockMaskShape& shape() const { return shape_; }
  index_t q_blocks() const { return q_blocks_; }
  index_t k_blocks() const { return k_blocks_; }
  FOVEA_INLINE const Divisor& q_divisor() const { return q_; }
  FOVEA_INLINE const Divisor& k_divisor() const { return k_; }

  // Of the queries at `pos`.
  FOVEA_INLINE BlockRow row(index_t sequence, index_t q_head, index_t pos) const {
    if (pos < 0 || pos >= shape_.len_q) return {};
    return block_row(sequence, q_head, q_.quotient(pos));
  }
  FOVEA_INLINE BlockRow block_row(index_t sequence, index_t q_head, index_t q_block) const {
    if (shape_.batch == 1) sequence = 0;
    if (shape_.q_heads == 1) q_head = 0;
    if (sequence >= shape_.batch || q_head >= shape_.q_heads) return {};
    const index_t at = (sequence * shape_.q_heads + q_head) * q_blocks_ + q_block;
    const std::uint64_t* const live = bits_ + 2 * at * words_;
    return {live, live + words_, keys_[at]};
  }

  Cover block(index_t sequence, index_t q_head, index_t q_block, index_t k_block) const {
    if (q_block < 0 || q_block >= q_blocks_ || k_block < 0 || k_block >= k_blocks_) return Cover::skip;
    const BlockRow at = block_row(sequence, q_head, q_block);
    return at.live == nullptr || !bit(at.live, k_block) ? Cover::skip : bit(at.full, k_block) ? Cover::full : Cover::partial;
  }

  BlockCounts counts() const {
    index_t live = 0, full = 0;
    const index_t rows = shape_.batch * shape_.q_heads * q_blocks_;
    for (index_t row = 0; row < rows; ++row) {
      for (index_t w = 0; w < words_; ++w) {
        live += std::popcount(bits_[2 * row * words_ + w]);
        full += std::popcount(bits_[(2 * row + 1) * words_ + w]);
      }
    }
    return {full, live - full, rows * k_blocks_ - live};
  }
  // The share of empty blocks; 0 of none.
  double sparsity() const {
    const index_t all = shape_.batch * shape_.q_heads * q_blocks_ * k_blocks_;
    return all == 0 ? 0 : static_cast<double>(counts().empty) / static_cast<double>(all);
  }

  // Whether every query and key of a call lies in the mask. A call does not ask: what lies beyond is masked.
  Status check(const AttentionShape& shape, const AttentionOptions& options) const;

  FOVEA_INLINE static bool bit(const std::uint64_t* bits, index_t at) { return bits[at >> 6] >> (at & 63) & 1; }
  static constexpr index_t blocks(index_t len, index_t size) { return (len + size - 1) / size; }
  static constexpr index_t words(index_t bits) { return (bits + 63) / 64; }

 private:
  BlockMaskShape shape_{};
  Divisor q_{128}, k_{128};
  index_t q_blocks_ = 0, k_blocks_ = 0, words_ = 0;
  const std::uint64_t* bits_ = nullptr;   // [batch, q_head, q_block, live | full, word]
  const Keys* keys_ = nullptr;            // [batch, q_head, q_block]
};

// Cover of a block of any mask policy, key by key; stops once it is known to be partial. A function of its own, so that its
// loop keeps its counters in registers, which saves a sixth of the time.
template <class M>
FOVEA_NOINLINE Cover count_block(const M& mask, int sequence, int q_head, Positions q, Positions k) {
  keep_t some = f32(0.f) != f32(0.f), all = f32(0.f) == f32(0.f);
  const i32 step(static_cast<std::int32_t>(kLanes)), last(static_cast<std::int32_t>(k.last));
  const index_t whole = (k.last - k.first + 1) / kLanes;
  const bool cut = (k.last - k.first + 1) % kLanes != 0;
  for (index_t pos = q.first; pos <= q.last; ++pos) {
    const auto keep = mask.at(Row{pos, pos, sequence, q_head, 0});
    i32 keys = lane_numbers() + i32(static_cast<std::int32_t>(k.first));
    for (index_t n = 0; n < whole; ++n, keys = keys + step) {
      const keep_t seen = keep(keys);
      some = some | seen;
      all = all & seen;
    }
    if (cut) {
      const keep_t seen = keep(keys);
      some = some | (seen & as_keep(keys <= last));
      all = all & (seen | as_keep(keys > last));
    }
    if (xsimd::any(some) && !xsimd::all(all)) return Cover::partial;
  }
  return xsimd::any(some) ? Cover::full : Cover::skip;
}

class BlockMask {
 public:
  // From a mask policy or a callable f(batch, q_head, q, k). Masks with a formula (parts/pattern_masks.hpp: patterns, Band,
  // and Both and Either of these) are asked block by block, others key by key. Blocks at the ends of len_q and len_k that
  // are cut are never full. Memory is reused; on error the mask stays as it was.
  template <class M>
  Status build(const BlockMaskShape& shape, const M& mask, const Executor& executor = {}) {
    if constexpr (Mask<M>) {
      return build_rows(shape, executor, [&mask, &shape](int b, int h, Positions q, const auto& note) {
        find_row(shape, mask, b, h, q, note);
      });
    } else {
      return build(shape, MaskFunction<M>{mask}, executor);
    }
  }

  // From a picture of whole blocks: keep [shape.batch, shape.q_heads, q_block, k_block], 0 = empty.
  Status build_from_blocks(const BlockMaskShape& shape, const View<const std::uint8_t, 4>& keep) {
    if (Status s = check_shape(shape); !s.ok()) return s;
    const std::array<index_t, 4> wanted{shape.batch, shape.q_heads, BlockMaskView::blocks(shape.len_q, shape.q_block),
                                        BlockMaskView::blocks(shape.len_k, shape.k_block)};
    if (keep.extent != wanted)
      return Status::error(Code::invalid_argument,
                           "fovea: blocks are [%td, %td, %td, %td], the mask has [%td, %td, %td, %td]", keep.extent[0],
                           keep.extent[1], keep.extent[2], keep.extent[3], wanted[0], wanted[1], wanted[2], wanted[3]);
    if (!keep && wanted[2] > 0 && wanted[3] > 0) return Status::error(Code::invalid_argument, "fovea: blocks have null data");
    return build_rows(shape, {}, [&keep, &shape](int b, int h, Positions q, const auto& note) {
      const bool cut_row = q.last - q.first + 1 < shape.q_block;
      for (index_t block = 0; block < keep.extent[3]; ++block) {
        const bool cut = cut_row || (block + 1) * shape.k_block > shape.len_k;
        if (keep(b, h, q.first / shape.q_block, block) != 0) note(block, cut ? Cover::partial : Cover::full);
      }
    });
  }

  // Holds until the next build.
  BlockMaskView view() const { return bits_ ? BlockMaskView(shape_, bits_.get(), keys_.get()) : BlockMaskView(); }
  operator BlockMaskView() const { return view(); }

 private:
  static constexpr index_t kMaxWords = index_t{1} << 34;   // of all rows of blocks: 128 GiB are a mistake

  // find(batch, q_head, queries, note) calls note(block, full or partial) for the live blocks of a row of blocks.
  static Status check_shape(const BlockMaskShape& s) {
    if (s.batch < 1 || s.q_heads < 1 || s.len_q < 0 || s.len_k < 0 || s.q_block < 1 || s.k_block < 1)
      return Status::error(
          Code::invalid_argument,
          "fovea: a block mask has batch %td, q heads %td, len_q %td, len_k %td, blocks of %td x %td: none may be "
          "negative, only lengths may be 0",
          s.batch, s.q_heads, s.len_q, s.len_k, s.q_block, s.k_block);
    constexpr index_t kMost = INT32_MAX - kLanes;   // lanes carry positions as int32
    if (s.len_q > kMost || s.len_k > kMost || s.q_block > kMost || s.k_block > kMost || s.batch > kMost || s.q_heads > kMost)
      return too_large(s);
    return {};
  }
  template <class Find>
  Status build_rows(const BlockMaskShape& s, const Executor& executor, const Find& find) {
    if (Status status = check_shape(s); !status.ok()) return status;
    const index_t q_blocks = BlockMaskView::blocks(s.len_q, s.q_block), k_blocks = BlockMaskView::blocks(s.len_k, s.k_block);
    const index_t words = BlockMaskView::words(k_blocks);
    index_t room = kMaxWords / 2;
    for (const index_t factor : {s.batch, s.q_heads, q_blocks, words}) room /= std::max<index_t>(factor, 1);
    if (room == 0) return too_large(s);
    const index_t rows = s.batch * s.q_heads * q_blocks;
    if (Status status = reserve(rows, 2 * rows * words); !status.ok()) return status;
    shape_ = s;
    deal(executor, executor.lanes(), rows, [&](int, index_t row) {
      const index_t q_block = row % q_blocks, head = row / q_blocks % s.q_heads, sequence = row / q_blocks / s.q_heads;
      std::uint64_t* const live = bits_.get() + 2 * row * words;
      std::uint64_t* const full = live + words;
      std::fill_n(live, 2 * words, std::uint64_t{0});
      index_t first = k_blocks, last = -1;
      const Positions q{q_block * s.q_block, std::min((q_block + 1) * s.q_block, s.len_q) - 1};
      find(static_cast<int>(sequence), static_cast<int>(head), q, [&](index_t block, Cover cover) {
        const std::uint64_t bit = std::uint64_t{1} << (block & 63);
        live[block >> 6] |= bit;
        if (cover == Cover::full) full[block >> 6] |= bit;
        first = std::min(first, block);
        last = std::max(last, block);
      });
      const index_t end = std::min((last + 1) * s.k_block, s.len_k);
      keys_[static_cast<std::size_t>(row)] = {static_cast<std::int32_t>(last < 0 ? 0 : first * s.k_block),
                                              static_cast<std::int32_t>(end)};
    });
    return {};
  }

  template <class M, class Note>
  static void find_row(const BlockMaskShape& s, const M& mask, int b, int h, Positions q, const Note& note) {
    const index_t k_blocks = BlockMaskView::blocks(s.len_k, s.k_block);
    const bool cut_row = q.last - q.first + 1 < s.q_block;
    index_t block = 0, end = k_blocks;
    if constexpr (Analytic<M>::kKnown) {
      const KeyRange keys = Analytic<M>::keys(mask, b, q);
      block = std::clamp<index_t>(keys.begin, 0, s.len_k) / s.k_block;
      end = BlockMaskView::blocks(std::clamp<index_t>(keys.end, 0, s.len_k), s.k_block);
    }
    for (; block < end; ++block) {
      const Positions k{block * s.k_block, std::min((block + 1) * s.k_block, s.len_k) - 1};
      Cover cover = Cover::partial;
      if constexpr (Analytic<M>::kKnown) {
        cover = Analytic<M>::cover(mask, b, q, k);
        if constexpr (!Analytic<M>::kExact) {
          if (cover == Cover::partial) cover = count_block(mask, b, h, q, k);
        }
      } else {
        cover = count_block(mask, b, h, q, k);
      }
      if (cover == Cover::skip) continue;
      const bool cut = cut_row || k.last - k.first + 1 < s.k_block;
      note(block, cut ? Cover::partial : cover);
    }
  }

  static Status too_large(const BlockMaskShape& s) {
    return Status::error(
        Code::unsupported,
        "fovea: a block mask of batch %td, q heads %td, len_q %td, len_k %td in blocks of %td x %td is too large", s.batch,
        s.q_heads, s.len_q, s.len_k, s.q_block, s.k_block);
  }

  Status reserve(index_t rows, index_t bits) {
    if (rows <= row_room_ && bits <= bit_room_) return {};
    std::unique_ptr<std::uint64_t[]> new_bits(new (std::nothrow) std::uint64_t[static_cast<std::size_t>(bits)]);
    std::unique_ptr<BlockMaskView::Keys[]> new_keys(new (std::nothrow) BlockMaskView::Keys[static_cast<std::size_t>(rows)]);
    if (!new_bits || !new_keys)
      return Status::error(Code::out_of_memory, "fovea: no memory for a block mask of %td rows of blocks, %td words", rows,
                           bits);
    bits_ = std::move(new_bits);
    keys_ = std::move(new_keys);
    row_room_ = rows;
    bit_room_ = bits;
    return {};
  }

  BlockMaskShape shape_{};
  std::unique_ptr<std::uint64_t[]> bits_;
  std::unique_ptr<BlockMaskView::Keys[]> keys_;
  index_t row_room_ = 0, bit_room_ = 0;
};

// The keys of a mask's live blocks that `mask`, the one it was made from, keeps; full blocks do not ask it.
template <class M>
struct BlockMasked {
  BlockMaskView blocks;
  M mask;

  Status check(const AttentionShape& shape) const { return check_policy(mask, shape); }

  struct Lane {
    BlockMaskView::BlockRow row;
    Divisor k_block;
    index_t len_k;
    decltype(std::declval<const M&>().at(std::declval<const Row&>())) mask;

    FOVEA_INLINE keep_t operator()(i32 pos) const {
      const keep_t none = f32(0.f) != f32(0.f);
      const index_t first = first_lane(pos);
      if (row.live == nullptr || first >= len_k) return none;
      const index_t block = first < 0 ? 0 : k_block.quotient(first);
      if (first < 0 || first + kLanes > (block + 1) * k_block.value()) return over_borders(pos, first);
      if (!BlockMaskView::bit(row.live, block)) return none;
      if (BlockMaskView::bit(row.full, block)) return f32(0.f) == f32(0.f);
      return mask(pos) & as_keep(pos < i32(static_cast<std::int32_t>(len_k)));
    }

   private:
    FOVEA_NOINLINE keep_t over_borders(i32 pos, index_t first) const {
      alignas(f32) float live[kLanes] = {}, full[kLanes] = {};
      for (index_t i = 0; i < kLanes; ++i) {
        const index_t key = first + i;
        if (key < 0 || key >= len_k) continue;
        const index_t block = k_block.quotient(key);
        live[i] = BlockMaskView::bit(row.live, block) ? 1.f : 0.f;
        full[i] = BlockMaskView::bit(row.full, block) ? 1.f : 0.f;
      }
      const f32 zero(0.f);
      return (f32::load_aligned(full) != zero) | ((f32::load_aligned(live) != zero) & mask(pos));
    }
  };
  FOVEA_INLINE Lane at(const Row& row) const {
    return {blocks.row(row.sequence, row.q_head, row.pos), blocks.k_divisor(), blocks.shape().len_k, mask.at(row)};
  }

  FOVEA_INLINE KeyRange hull(std::span<const Row> rows) const {
    KeyRange hull{PTRDIFF_MAX, 0};
    each_block_row(rows, [&hull](const BlockMaskView::BlockRow& row) {
      if (row.live == nullptr || row.keys.begin >= row.keys.end) return;
      hull = {std::min<index_t>(hull.begin, row.keys.begin), std::max<index_t>(hull.end, row.keys.end)};
    });
    return hull.begin < hull.end ? hull : KeyRange{0, 0};
  }

  FOVEA_INLINE Cover cover(const Tile& tile) const {
    const index_t end = std::min(tile.k_end, blocks.shape().len_k);
    if (tile.k_begin >= end) return Cover::skip;
    const index_t first = blocks.k_divisor().quotient(tile.k_begin), last = blocks.k_divisor().quotient(end - 1);
    bool some = false, all = end == tile.k_end;
    each_block_row(tile.rows, [&](const BlockMaskView::BlockRow& row) {
      if (row.live == nullptr) {
        all = false;
        return;
      }
      for (index_t w = first >> 6; w <= last >> 6; ++w) {
        std::uint64_t asked = ~std::uint64_t{0};
        if (w == first >> 6) asked &= ~std::uint64_t{0} << (first & 63);
        if (w == last >> 6) asked &= ~std::uint64_t{0} >> (63 - (last & 63));
        some = some || (row.live[w] & asked) != 0;
        all = all && (row.full[w] & asked) == asked;
      }
    });
    return !some ? Cover::skip : all ? Cover::full : Cover::partial;
  }

 private:
  // Neighbours mostly share their row of blocks, so it is looked up where the head or the block changes.
  template <class F>
  FOVEA_INLINE void each_block_row(std::span<const Row> rows, const F& f) const {
    const bool by_head = blocks.shape().q_heads > 1;
    index_t begin = 0, end = 0;
    int head = -1;
    for (const Row& row : rows) {
      if (row.pos >= begin && row.pos < end && (!by_head || row.q_head == head)) continue;
      f(blocks.row(row.sequence, row.q_head, row.pos));
      head = row.q_head;
      const bool inside = row.pos >= 0 && row.pos < blocks.shape().len_q;
      begin = inside ? blocks.q_divisor().quotient(row.pos) * blocks.q_divisor().value() : row.pos;
      end = inside ? std::min(begin + blocks.q_divisor().value(), blocks.shape().len_q) : row.pos + 1;
    }
  }
};

// A callable or a mask policy behind its BlockMask.
template <class M>
auto block_masked(const BlockMaskView& blocks, const M& mask) {
  if constexpr (Mask<M>) {
    return BlockMasked<M>{blocks, mask};
  } else {
    return BlockMasked<MaskFunction<M>>{blocks, {mask}};
  }
}
// Whole blocks.
inline BlockMasked<Everything> block_sparse(const BlockMaskView& blocks) { return {blocks, {}}; }

inline Status BlockMaskView::check(const AttentionShape& shape, const AttentionOptions& options) const {
  const bool ragged = !options.cu_len_q.empty();
  const index_t sequences = ragged ? static_cast<index_t>(options.cu_len_q.size()) - 1 : shape.batch;
  if ((shape_.batch != 1 && shape_.batch != sequences) || (shape_.q_heads != 1 && shape_.q_heads != shape.q_heads))
    return Status::error(Code::invalid_argument,
                         "fovea: the block mask is for %td sequences and %td q heads, the call has %td and %td",
                         shape_.batch, shape_.q_heads, sequences, shape.q_heads);
  const auto entries = static_cast<std::size_t>(std::max<index_t>(sequences, 0));
  if ((!options.len_k.empty() && options.len_k.size() != entries) ||
      (!options.q_offset.empty() && options.q_offset.size() != entries) ||
      (!options.cu_len_k.empty() && options.cu_len_k.size() != entries + 1))
    return Status::error(Code::invalid_argument,
                         "fovea: %td sequences, but len_k has %zu entries, q_offset %zu and cu_len_k %zu", sequences,
                         options.len_k.size(), options.q_offset.size(), options.cu_len_k.size());
  for (index_t s = 0; s < sequences; ++s) {
    const auto at = static_cast<std::size_t>(s);
    const index_t len_q = ragged ? options.cu_len_q[at + 1] - options.cu_len_q[at] : shape.len_q;
    const index_t stored = options.cu_len_k.empty() ? shape.len_k : options.cu_len_k[at + 1] - options.cu_len_k[at];
    const index_t len_k = options.len_k.empty() ? stored : options.len_k[at];
    const index_t pos = !options.q_offset.empty()                ? options.q_offset[at]
                        : options.causal == Causal::bottom_right ? len_k - len_q
                                                                 : 0;
    if (len_k > shape_.len_k || (len_q > 0 && (pos < 0 || pos + len_q > shape_.len_q)))
      return Status::error(
          Code::invalid_argument,
          "fovea: sequence %td has %td keys and the query positions %td .. %td, the block mask %td keys and "
          "the positions 0 .. %td",
          s, len_k, pos, pos + len_q - 1, shape_.len_k, shape_.len_q - 1);
  }
  return {};
}

// A picture of one sequence and head, a character per block or, where there are more than `columns`, per square of blocks:
// '#' full, '+' partial, '.' empty. Squares in which blocks differ are partial.
inline std::string to_string(const BlockMaskView& mask, index_t sequence = 0, index_t q_head = 0, index_t columns = 64) {
  const BlockMaskShape& s = mask.shape();
  const BlockCounts counts = mask.counts();
  char line[240];
  std::snprintf(
      line, sizeof line,
      "%td x %td positions in blocks of %td x %td, batch %td, q heads %td: %td full, %td partial, %td empty (%.1f %%)\n",
      s.len_q, s.len_k, s.q_block, s.k_block, s.batch, s.q_heads, counts.full, counts.partial, counts.empty,
      100 * mask.sparsity());
  std::string text = line;
  const index_t wide = std::max(mask.q_blocks(), mask.k_blocks()), most = std::max<index_t>(columns, 1);
  const index_t square = std::max<index_t>((wide + most - 1) / most, 1);
  for (index_t q = 0; q < mask.q_blocks(); q += square) {
    for (index_t k = 0; k < mask.k_blocks(); k += square) {
      bool some = false, all = true;
      for (index_t i = q; i < std::min(q + square, mask.q_blocks()); ++i) {
        for (index_t j = k; j < std::min(k + square, mask.k_blocks()); ++j) {
          const Cover cover = mask.block(sequence, q_head, i, j);
          some = some || cover != Cover::skip;
          all = all && cover == Cover::full;
        }
      }
      text += !some ? '.' : all ? '#' : '+';
    }
    text += '\n';
  }
  return text;
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
