// SPDX-License-Identifier: Apache-2.0
// IndexCache: the keys of DSA's lightning indexer, one per token, quantised as they are appended: 128 e4m3 codes and one f32
// scale, 132 bytes a token. One writer at a time; no call throws, and a refused one changes nothing.
//
//   rows        a token's codes, then its scale, tokens one behind the other (the library's e4m3 rows)
//   deep_gemm   pages of 64 tokens: 64 x dim bytes of codes, then 64 f32 scales, as DeepGEMM's paged kernels read them;
//               the pages of a sequence follow each other
//
// The rows to append are index keys already: normalised, rotated, transformed (dsa_index_rows).
#pragma once
#include <span>

#include "../simd/index_scores.hpp"
#include "rows.hpp"

namespace fovea {
inline namespace v0 {

enum class IndexLayout : std::uint8_t { rows, deep_gemm };

struct IndexCacheShape {
  index_t dim = 128, sequences = 1, slots = 0;   // positions per sequence
  Format format = Format::e4m3;                  // f32, bf16 and f16 as well (GLM-5), without scales
  IndexRounding rounding = IndexRounding::ue8m0;
  IndexLayout layout = IndexLayout::rows;
};

// All sequences as a call takes them: `len_k` goes into AttentionOptions::len_k.
struct IndexBatch {
  IndexKeys keys;
  std::span<const index_t> len_k;   // [sequence]
};

inline namespace FOVEA_ARCH {

class IndexCache {
 public:
  static constexpr index_t kPage = 64;   // tokens of a deep_gemm page; slots are rounded up to whole pages
  static constexpr index_t kLargestDim = 512;

  // Replaces whatever the cache held; on error it keeps it.
  Status create(const IndexCacheShape& shape) {
    const bool coded = shape.format == Format::e4m3;
    if (shape.dim < 1 || shape.dim > kLargestDim || shape.sequences < 1 || shape.slots < 1)
      return Status::error(Code::invalid_argument, "index cache: dim %td (1 to %td), %td sequences of %td slots", shape.dim,
                           kLargestDim, shape.sequences, shape.slots);
    if (!coded && shape.format != Format::f32 && shape.format != Format::bf16 && shape.format != Format::f16)
      return Status::error(Code::unsupported, "index cache: keys are e4m3, f32, bf16 or f16, not %s", name_of(shape.format));
    if (shape.layout > IndexLayout::deep_gemm || (!coded && shape.layout == IndexLayout::deep_gemm))
      return Status::error(Code::invalid_argument, "index cache: layout %d of %s keys; deep_gemm pages hold e4m3",
                           static_cast<int>(shape.layout), name_of(shape.format));
    if (coded && shape.rounding != IndexRounding::plain && shape.rounding != IndexRounding::ue8m0)
      return Status::error(Code::invalid_argument, "index cache: e4m3 keys are rounded by plain or ue8m0 scales");
    const index_t row = row_bytes(shape.format, shape.dim);
    if (shape.slots > kLargestCache || limited_product({shape.sequences, shape.slots + kPage, row}) == kLargestCache)
      return Status::error(Code::out_of_memory, "index cache: %td sequences of %td slots of %td bytes are too much",
                           shape.sequences, shape.slots, row);
    const auto take = [&](Bump& bump, State& state) {
      state.shape = shape;
      if (shape.layout == IndexLayout::deep_gemm) state.shape.slots = (shape.slots + kPage - 1) / kPage * kPage;
      state.rows = bump.take<std::byte>(shape.sequences * state.shape.slots * row);
      state.len = bump.take<index_t>(shape.sequences);
    };
    if (Status status = allocate(owned_, take); !status.ok()) return status;
    std::fill_n(state().len, shape.sequences, index_t{0});
    return {};
  }

  // Appends the tokens of k [1, 1, token, dim], f32, f64, bf16 or f16, any strides.
  Status append(index_t sequence, const Operand& k) {
    if (Status status = check_sequence(sequence, sequences()); !status.ok()) return status;
    const index_t count = k.extent[2];
    if (k.extent != std::array<index_t, 4>{1, 1, count, dim()} || count < 0 || !is_plain(k.format))
      return Status::error(
          Code::invalid_argument,
          "index cache: keys to append are [%td, %td, %td, %td] of %s, must be [1, 1, tokens, %td] of plain "
          "numbers",
          k.extent[0], k.extent[1], count, k.extent[3], name_of(k.format), dim());
    if (count > 0 && k.data == nullptr) return Status::error(Code::invalid_argument, "index cache: keys have null data");
    index_t& len = state().len[sequence];
    if (count > slots() - len)
      return Status::error(Code::out_of_pages, "index cache: %td tokens to append, sequence %td has %td of %td slots left",
                           count, sequence, slots() - len, slots());
    alignas(f32) float row[kLargestDim];
    const IndexKeys all = keys();
    for (index_t token = 0; token < count; ++token) {
      read_numbers(k.format, k.data + token * k.stride[2] * row_bytes(k.format, 1), k.stride[3], dim(), row);
      const index_keys::Place place = index_keys::place_of(all, sequence, len + token);
      std::byte* const codes = state().rows + (place.codes - all.codes);
      if (all.scales == nullptr) {
        quantise_row(all.format, row, 1, dim(), nullptr, codes);
      } else {
        const float scale = quantise_index_row(row, dim(), state().shape.rounding, codes);
        store_field(state().rows + (place.scales - all.codes), scale);
      }
    }
    len += count;
    return {};
  }

  // Rolls back the last `count` tokens.
  Status truncate(index_t sequence, index_t count) {
    if (Status status = first_error({check_sequence(sequence, sequences()), check_count(count)}); !status.ok())
      return status;
    index_t& len = state().len[sequence];
    if (count > len)
      return Status::error(Code::invalid_argument, "index cache: %td tokens to roll back, sequence %td has %td", count,
                           sequence, len);
    len -= count;
    return {};
  }

  Status reset(index_t sequence) {
    if (Status status = check_sequence(sequence, sequences()); !status.ok()) return status;
    state().len[sequence] = 0;
    return {};
  }

  index_t sequences() const { return owned_.block.data() == nullptr ? 0 : state().shape.sequences; }
  index_t slots() const { return state().shape.slots; }
  index_t dim() const { return state().shape.dim; }
  std::size_t bytes() const { return owned_.block.size(); }
  index_t len(index_t sequence) const {
    FOVEA_ASSERT(sequence >= 0 && sequence < sequences());
    return state().len[sequence];
  }
  std::span<const index_t> lengths() const { return {state().len, static_cast<std::size_t>(sequences())}; }   // [sequence]

  // Valid as long as the cache; `len_k` counts what is in use at the time of the call.
  IndexBatch batch() const { return {keys(), lengths()}; }

  IndexKeys keys() const {
    const IndexCacheShape& shape = state().shape;
    if (shape.layout == IndexLayout::rows) return index_rows(state().rows, shape.format, dim(), sequences(), slots());
    return index_pages(state().rows, dim(), sequences() * (slots() / kPage), kPage, sequences(), slots());
  }

 private:
  struct State {
    IndexCacheShape shape{};
    std::byte* rows = nullptr;   // of all sequences
    index_t* len = nullptr;      // [sequence]
  };

  const State& state() const { return owned_.state; }

  Owned<State> owned_;
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
