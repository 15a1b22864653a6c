// SPDX-License-Identifier: Apache-2.0
// PageBounds: for every page of keys the largest and the smallest value of each channel (Quest, arXiv 2406.10774), kept up
// with every token. A page's row is [dim largest | dim smallest], so that a score is one dot product over 2 dim neighbours.
// Pages here are runs of `page` keys of a sequence and need not be those of the KV cache. One writer at a time; no call
// throws, and a refused one changes nothing.
#pragma once
#include <limits>

#include "../core/convert.hpp"
#include "../simd/numbers.hpp"
#include "rows.hpp"

namespace fovea {
inline namespace v0 {

struct PageBoundsShape {
  index_t sequences = 1, slots = 0;   // keys per sequence
  index_t kv_heads = 1, dim = 128, page = 16;
  Format format = Format::bf16;   // f32 or bf16; bounds are rounded outwards, so they stay bounds
};

inline namespace FOVEA_ARCH {

class PageBounds {
 public:
  // Replaces whatever the cache held; on error it keeps it.
  Status create(const PageBoundsShape& shape) {
    if (shape.sequences < 1 || shape.slots < 1 || shape.kv_heads < 1 || shape.dim < 1 || shape.page < 1)
      return Status::error(Code::invalid_argument,
                           "cache: bounds of %td sequences of %td slots, %td kv heads, dim %td, page %td", shape.sequences,
                           shape.slots, shape.kv_heads, shape.dim, shape.page);
    if (shape.dim > kMostNumbers)
      return Status::error(Code::unsupported, "cache: bounds of dim %td, at most %td", shape.dim, kMostNumbers);
    if (shape.format != Format::f32 && shape.format != Format::bf16)
      return Status::error(Code::unsupported, "cache: bounds are stored as f32 or bf16, not %s",
                           static_cast<int>(shape.format) < kFormats ? name_of(shape.format) : "outside the enum");
    const index_t row = 2 * row_bytes(shape.format, shape.dim);
    if (shape.page > kLargestCache)
      return Status::error(Code::invalid_argument, "cache: bounds of pages of %td slots, at most %td", shape.page, kLargestCache);
    if (limited_product({shape.sequences, shape.slots, shape.kv_heads, row}) == kLargestCache)
      return Status::error(Code::out_of_memory, "cache: bounds of %td sequences of %td slots are too much", shape.sequences,
                           shape.slots);
    const auto take = [&](Bump& bump, State& state) {
      state.shape = shape;
      state.pages = (shape.slots + shape.page - 1) / shape.page;
      state.rows = bump.take<std::byte>(shape.sequences * shape.kv_heads * state.pages * row);
      state.len = bump.take<index_t>(shape.sequences);
    };
    if (Status status = allocate(owned_, take); !status.ok()) return status;
    std::fill_n(owned_.state.len, shape.sequences, index_t{0});
    return {};
  }

  // New keys, k [1, kv_head, token, dim] as they go into the KV cache (rotated), f32, f64, bf16 or f16.
  Status append(index_t sequence, const Operand& k) {
    const PageBoundsShape& shape = owned_.state.shape;
    if (Status status = check_sequence(sequence, shape.sequences); !status.ok()) return status;
    if (Status status = check_keys(k); !status.ok()) return status;
    index_t& len = owned_.state.len[sequence];
    if (k.extent[2] > shape.slots - len)
      return Status::error(Code::out_of_pages, "cache: %td tokens to append, sequence %td has %td of %td slots left",
                           k.extent[2], sequence, shape.slots - len, shape.slots);
    widen(sequence, len, k);
    len += k.extent[2];
    return {};
  }

  // Forgets the last `count` keys. Bounds cannot be narrowed by themselves: `open` [1, kv_head, token, dim] are the keys
  // that remain in the last page, from its first one on; without it the page keeps the bounds of the forgotten keys as well,
  // which are bounds still, only wider.
  Status truncate(index_t sequence, index_t count, const Operand& open = {}) {
    const PageBoundsShape& shape = owned_.state.shape;
    if (Status status = first_error({check_sequence(sequence, shape.sequences), check_count(count)}); !status.ok())
      return status;
    index_t& len = owned_.state.len[sequence];
    if (count > len)
      return Status::error(Code::invalid_argument, "cache: %td tokens to roll back, sequence %td has %td", count, sequence,
                           len);
    const index_t left = len - count, inside = left % shape.page;
    if (open.data != nullptr) {
      if (Status status = check_keys(open); !status.ok()) return status;
      if (open.extent[2] != inside)
        return Status::error(Code::invalid_argument, "cache: %td keys of the open page are given, %td remain in it",
                             open.extent[2], inside);
      widen(sequence, left - inside, open);
    }
    len = left;
    return {};
  }

  // [sequence, kv_head, page, 2 dim]: the largest values of the channels, then the smallest.
  Operand bounds() const {
    const State& state = owned_.state;
    const index_t wide = 2 * state.shape.dim, heads = state.shape.kv_heads;
    Operand all;
    all.data = state.rows;
    all.format = state.shape.format;
    all.extent = {state.shape.sequences, heads, state.pages, wide};
    all.stride = {heads * state.pages * wide, state.pages * wide, wide, 1};
    return all;
  }
  index_t page() const { return owned_.state.shape.page; }
  index_t sequences() const { return owned_.state.shape.sequences; }
  std::span<const index_t> lengths() const {
    return {owned_.state.len, static_cast<std::size_t>(sequences())};
  }   // [sequence]
  std::size_t bytes() const { return owned_.block.size(); }

 private:
  static constexpr index_t kMostNumbers = 1024;

  struct State {
    PageBoundsShape shape{0, 0, 0, 0, 1, Format::bf16};
    index_t pages = 0;
    std::byte* rows = nullptr;   // [sequence, kv_head, page, 2 dim]
    index_t* len = nullptr;      // [sequence]
  };

  Status check_keys(const Operand& k) const {
    const PageBoundsShape& shape = owned_.state.shape;
    if (k.extent[0] != 1 || k.extent[1] != shape.kv_heads || k.extent[3] != shape.dim || k.extent[2] < 0 ||
        !is_plain(k.format))
      return Status::error(Code::invalid_argument,
                           "cache: keys for bounds are [%td, %td, %td, %td], must be [1, %td, n, %td]", k.extent[0],
                           k.extent[1], k.extent[2], k.extent[3], shape.kv_heads, shape.dim);
    if (k.extent[2] > 0 && k.data == nullptr)
      return Status::error(Code::invalid_argument, "cache: keys for bounds have null data");
    return {};
  }

  // Keys from position `first` on; a page that starts among them starts anew.
  void widen(index_t sequence, index_t first, const Operand& k) {
    const State& state = owned_.state;
    const PageBoundsShape& shape = state.shape;
    const index_t dim = shape.dim, row = 2 * row_bytes(shape.format, dim);
    float numbers[kMostNumbers], both[2 * kMostNumbers];
    for (index_t head = 0; head < shape.kv_heads; ++head) {
      for (index_t token = 0; token < k.extent[2];) {
        const index_t pos = first + token, page = pos / shape.page;
        std::byte* const at = state.rows + ((sequence * shape.kv_heads + head) * state.pages + page) * row;
        if (pos % shape.page == 0) {
          std::fill_n(both, dim, -std::numeric_limits<float>::infinity());
          std::fill_n(both + dim, dim, std::numeric_limits<float>::infinity());
        } else {
          read_numbers(shape.format, at, 1, 2 * dim, both);
        }
        const index_t end = std::min(k.extent[2], (page + 1) * shape.page - first);
        for (; token < end; ++token) {
          const index_t from = head * k.stride[1] + token * k.stride[2];
          read_numbers(k.format, k.data + from * row_bytes(k.format, 1), k.stride[3], dim, numbers);
          for (index_t d = 0; d < dim; ++d) {
            both[d] = numbers[d] > both[d] ? numbers[d] : both[d];
            both[dim + d] = numbers[d] < both[dim + d] ? numbers[d] : both[dim + d];
          }
        }
        if (shape.format == Format::f32) {
          std::memcpy(at, both, static_cast<std::size_t>(row));
        } else {
          for (index_t d = 0; d < 2 * dim; ++d) {
            const bf16 rounded = outwards(both[d], d < dim);
            std::memcpy(at + 2 * d, &rounded, sizeof(rounded));
          }
        }
      }
    }
  }

  // The nearest bf16 that is not below (upper) or not above the number.
  static bf16 outwards(float x, bool upper) {
    const bf16 nearest = convert<bf16>(x);
    const float back = convert<float>(nearest);
    if (upper ? !(back < x) : !(back > x)) return nearest;
    // One step away from the number: the magnitude's pattern grows where the sign is the direction's, else it shrinks. A
    // number between 0 and the smallest denormal is the only one whose nearest has magnitude 0.
    if (back == 0.f) return {static_cast<std::uint16_t>(upper ? 0x0001 : 0x8001)};
    return {static_cast<std::uint16_t>((back > 0.f) == upper ? nearest.bits + 1 : nearest.bits - 1)};
  }

  Owned<State> owned_;
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
