// SPDX-License-Identifier: Apache-2.0
// KV caches of any format and home, larger than any cache of the CPU, filled in the time of a copy: 8144 random rows are
// encoded once per format, and a buffer is pieces of 509 of them, drawn by the number of the piece. Every head then holds
// other numbers, so a kernel that reads the wrong head, page or slot is far from the reference.
#pragma once
#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "fovea/core/kv.hpp"
#include "fovea/reference/stored.hpp"
#include "fovea/simd/quantise.hpp"
#include "memory.hpp"
#include "rows.hpp"

namespace fovea_bench {

using fovea::Format;
using fovea::index_t;

// Where the rows of a cache stand. token_major: the heads of a token next to each other instead of the tokens of a head.
enum class Place { contiguous, token_major, paged, ring };

struct CacheShape {
  Format k_format = Format::bf16, v_format = Format::bf16;
  index_t sequences = 1, kv_heads = 8, dim_qk = 128, dim_v = 128;
  index_t len = 0;                  // keys of a sequence, of the longest where `lengths` says more
  std::vector<index_t> lengths{};   // [sequence], paged only
  Place place = Place::contiguous;
  index_t page_size = 16;
  bool latent = false;   // V is the head of K's rows

  index_t len_of(index_t sequence) const { return lengths.empty() ? len : lengths[static_cast<std::size_t>(sequence)]; }
  index_t k_row() const { return fovea::row_bytes(k_format, dim_qk); }
  index_t v_row() const { return latent ? 0 : fovea::row_bytes(v_format, dim_v); }
};

// Bytes in use, scales included, each once.
inline double stored_bytes(const CacheShape& shape) {
  index_t keys = 0;
  for (index_t sequence = 0; sequence < shape.sequences; ++sequence) keys += shape.len_of(sequence);
  return static_cast<double>(keys * shape.kv_heads * (shape.k_row() + shape.v_row()));
}

// Random rows in one format, and the numbers they stand for (exact in fp32, but for i4 with a zero: one rounding).
struct RowPattern {
  static constexpr index_t kPiece = 509, kPieces = 16, kRows = kPiece * kPieces;
  std::vector<std::byte> rows;        // [row, row_bytes]
  std::vector<float> numbers;         // [row, dim]
  std::vector<float> channel_scale;   // [dim], with i8_channel

  // Which of the pattern's rows is row `row` of a buffer.
  static index_t of(index_t row) {
    auto mixed = static_cast<std::uint64_t>(row / kPiece) * 0x9e3779b97f4a7c15u;
    mixed = (mixed ^ (mixed >> 29)) * 0xbf58476d1ce4e5b9u;
    return static_cast<index_t>(mixed >> 60) * kPiece + row % kPiece;
  }
};

inline const RowPattern& row_pattern(Format format, index_t dim, bool values) {
  static std::map<std::tuple<Format, index_t, bool>, RowPattern> known;
  const auto [place, is_new] = known.try_emplace({format, dim, values});
  RowPattern& pattern = place->second;
  if (!is_new) return pattern;
  const index_t rows = RowPattern::kRows, count = rows * dim, bytes = fovea::row_bytes(format, dim);
  std::vector<float> random(static_cast<std::size_t>(2 * count));
  fill_random(random);
  const auto numbers = fovea::bhsd<const float>(random.data() + (values ? count : 0), 1, 1, rows, dim);
  if (format == Format::i8_channel) {
    pattern.channel_scale.resize(static_cast<std::size_t>(dim));
    fovea::widen_channels(numbers, pattern.channel_scale.data());
    fovea::channel_scales(pattern.channel_scale.data(), dim, pattern.channel_scale.data());
  }
  const float* const scale = pattern.channel_scale.empty() ? nullptr : pattern.channel_scale.data();
  pattern.rows.resize(static_cast<std::size_t>(rows * bytes));
  if (const fovea::Status status = fovea::quantise(numbers, format, pattern.rows.data(), {0, 0, bytes}, scale);
      !status.ok()) {
    std::fprintf(stderr, "fovea_bench: %s\n", status.message());
    std::exit(1);
  }
  pattern.numbers.resize(static_cast<std::size_t>(count));
  for (index_t row = 0; row < rows; ++row) {
    for (index_t d = 0; d < dim; ++d) {
      pattern.numbers[static_cast<std::size_t>(row * dim + d)] =
          static_cast<float>(fovea::reference::stored_value(format, pattern.rows.data() + row * bytes, dim, d, scale));
    }
  }
  return pattern;
}

inline void fill_rows(const RowPattern& pattern, index_t bytes, std::byte* to, index_t rows) {
  for (index_t row = 0; row < rows; row += RowPattern::kPiece) {
    const index_t count = std::min(RowPattern::kPiece, rows - row);
    std::memcpy(to + row * bytes, pattern.rows.data() + RowPattern::of(row) * bytes,
                static_cast<std::size_t>(count * bytes));
  }
}

class StoredCache {
 public:
  // So much is walked through before anything is read again, against last-level caches of 32 and 105 MiB on the machines
  // measured.
  static constexpr index_t kStreamedBytes = index_t{512} << 20;

  StoredCache(const CacheShape& shape, Memory memory, GroupBuffers& buffers) : shape_(shape), entries_(shape.sequences) {
    const index_t row = shape.k_row() + shape.v_row();
    if (shape.place == Place::paged) {
      list_pages();
    } else {
      // A sequence that no cache holds may be every sequence of its batch: eight of 1 GiB need not be 8 GiB.
      if (shape.place == Place::contiguous && shape.kv_heads * shape.len * row >= kStreamedBytes) entries_ = 1;
      rows_ = entries_ * shape.kv_heads * shape.len;
      ring_begin_.assign(static_cast<std::size_t>(shape.sequences), shape.len / 3);
    }
    if (memory == Memory::streamed) copies_ = (kStreamedBytes + rows_ * row - 1) / (rows_ * row);
    if (shape.k_format == Format::i8_channel) {
      const std::vector<float>& scale = keys().channel_scale;
      for (index_t head = 0; head < shape.kv_heads; ++head)
        channel_scale_.insert(channel_scale_.end(), scale.begin(), scale.end());
    }
    // V begins a few cache lines off, so that rows of K and V do not fight over the same cache sets. Homes of the same
    // number of rows share the bytes.
    const index_t all = copies_ * rows_, k_bytes = (all * shape.k_row() + 63) / 64 * 64 + 4160;
    const std::string name = std::string(fovea::name_of(shape.k_format)) + "/" + fovea::name_of(shape.v_format) + "/" +
                             std::to_string(shape.dim_qk) + "/" + std::to_string(shape.v_row()) + "/" + std::to_string(all);
    k_ = buffers
             .get(name, static_cast<std::size_t>(k_bytes + all * shape.v_row()),
                  [&](std::span<std::byte> bytes) {
                    fill_rows(keys(), shape.k_row(), bytes.data(), all);
                    if (!shape.latent) fill_rows(values(), shape.v_row(), bytes.data() + k_bytes, all);
                  })
             .data();
    v_ = shape.latent ? k_ : k_ + k_bytes;
  }
  StoredCache(const StoredCache&) = delete;
  StoredCache& operator=(const StoredCache&) = delete;

  const CacheShape& shape() const { return shape_; }

  // The sequences [first, first + count). Copies follow one another round and round.
  fovea::Kv kv(index_t copy, index_t first, index_t count) const {
    fovea::Kv kv;
    kv.k = stored(k_, shape_.k_format, shape_.k_row(), copy);
    kv.v = stored(v_, shape_.v_format, shape_.latent ? shape_.k_row() : shape_.v_row(), copy);
    kv.kv_heads = shape_.kv_heads;
    kv.dim_qk = shape_.dim_qk;
    kv.dim_v = shape_.dim_v;
    kv.batch = count;
    kv.len = shape_.len;
    kv.k_channel_scale = channel_scale_.empty() ? nullptr : channel_scale_.data();
    if (shape_.place == Place::paged) {
      kv.home = fovea::Home::paged;
      kv.batch = static_cast<index_t>(pages_.size());
      kv.len = shape_.page_size;
      kv.block_table = {table_.data() + first * most_pages_, {count, most_pages_}, {most_pages_, 1}};
      return kv;
    }
    kv.k.data += first * kv.k.stride[0];
    kv.v.data += first * kv.v.stride[0];
    if (shape_.place == Place::ring) {
      kv.home = fovea::Home::ring;
      kv.sinks = kRingSinks;
      kv.ring_begin = std::span(ring_begin_).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count));
    }
    return kv;
  }

  // The numbers of a stored row, for the reference.
  const float* key(index_t copy, index_t sequence, index_t head, index_t at) const {
    return keys().numbers.data() + RowPattern::of(row_at(copy, sequence, head, at)) * shape_.dim_qk;
  }
  const float* value(index_t copy, index_t sequence, index_t head, index_t at) const {
    const index_t row = RowPattern::of(row_at(copy, sequence, head, at));
    return shape_.latent ? keys().numbers.data() + row * shape_.dim_qk : values().numbers.data() + row * shape_.dim_v;
  }

 private:
  static constexpr index_t kRingSinks = 4;

  const RowPattern& keys() const { return row_pattern(shape_.k_format, shape_.dim_qk, false); }
  const RowPattern& values() const { return row_pattern(shape_.v_format, shape_.dim_v, true); }

  // Pages of all sequences in an order that no prefetcher guesses, always the same one.
  void list_pages() {
    const index_t size = shape_.page_size;
    index_t count = 0;
    most_pages_ = (shape_.len + size - 1) / size;
    for (index_t sequence = 0; sequence < shape_.sequences; ++sequence) count += (shape_.len_of(sequence) + size - 1) / size;
    for (index_t page = 0; page < count; ++page) pages_.push_back(static_cast<std::int32_t>(page));
    std::uint64_t state = 1;
    for (std::size_t last = pages_.size(); last > 1; --last) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      std::swap(pages_[last - 1], pages_[(state >> 33) % last]);
    }
    auto next = pages_.begin();
    for (index_t sequence = 0; sequence < shape_.sequences; ++sequence) {
      const index_t used = (shape_.len_of(sequence) + size - 1) / size;
      table_.insert(table_.end(), next, next + used);
      table_.resize(table_.size() + static_cast<std::size_t>(most_pages_ - used), -1);
      next += used;
    }
    rows_ = count * shape_.kv_heads * size;
  }

  fovea::Stored stored(const std::byte* data, Format format, index_t row, index_t copy) const {
    const index_t heads = shape_.kv_heads, run = shape_.place == Place::paged ? shape_.page_size : shape_.len;
    fovea::Stored stored{data + copy % copies_ * rows_ * row, format, {heads * run * row, run * row, row}};
    if (shape_.place == Place::token_major) stored.stride = {run * heads * row, row, heads * row};
    if (entries_ < shape_.sequences && shape_.place != Place::paged) stored.stride[0] = 0;
    return stored;
  }

  index_t row_at(index_t copy, index_t sequence, index_t head, index_t at) const {
    const index_t heads = shape_.kv_heads, entry = entries_ == 1 ? 0 : sequence;
    index_t row = 0;
    switch (shape_.place) {
      case Place::contiguous:
        row = (entry * heads + head) * shape_.len + at;
        break;
      case Place::token_major:
        row = (entry * shape_.len + at) * heads + head;
        break;
      case Place::paged: {
        const index_t page = table_[static_cast<std::size_t>(sequence * most_pages_ + at / shape_.page_size)];
        row = (page * heads + head) * shape_.page_size + at % shape_.page_size;
        break;
      }
      case Place::ring: {
        const index_t slots = shape_.len - kRingSinks, turned = ring_begin_[static_cast<std::size_t>(sequence)];
        const index_t slot = at < kRingSinks ? at : kRingSinks + (turned + at - kRingSinks) % slots;
        row = (entry * heads + head) * shape_.len + slot;
        break;
      }
    }
    return copy % copies_ * rows_ + row;
  }

  CacheShape shape_;
  index_t entries_, rows_ = 0, copies_ = 1;   // rows of one copy
  index_t most_pages_ = 0;
  std::vector<std::int32_t> pages_, table_;   // table [sequence, most_pages]
  std::vector<index_t> ring_begin_;
  std::vector<float> channel_scale_;   // [kv_head, dim_qk]
  const std::byte *k_ = nullptr, *v_ = nullptr;
};

}   // namespace fovea_bench
