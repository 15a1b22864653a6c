// SPDX-License-Identifier: Apache-2.0
// CodeCache: the 2-bit codes of the keys of a KV cache, a quarter of a byte per number (Adamas: 32 bytes per key of dim 128,
// 1/16 of K and V in 16 bits). Stands beside a cache of any home that counts keys 0 .. len - 1; it is told of every token
// that one is told of. One writer at a time; no call throws, and a refused one changes nothing.
#pragma once
#include "../simd/code_distance.hpp"
#include "../simd/hadamard.hpp"
#include "../simd/numbers.hpp"
#include "rows.hpp"

namespace fovea {
inline namespace v0 {

struct CodeCacheShape {
  index_t sequences = 1, slots = 0;   // keys per sequence
  index_t kv_heads = 1, dim = 128;    // a power of two
  float threshold = 10.f;             // codes change at -threshold, 0 and threshold
};

inline namespace FOVEA_ARCH {

class CodeCache {
 public:
  // Replaces whatever the cache held; on error it keeps it.
  Status create(const CodeCacheShape& shape) {
    if (shape.sequences < 1 || shape.slots < 1 || shape.kv_heads < 1)
      return Status::error(Code::invalid_argument, "cache: codes of %td sequences of %td slots, %td kv heads",
                           shape.sequences, shape.slots, shape.kv_heads);
    if (!is_code_dim(shape.dim))
      return Status::error(Code::unsupported, "cache: codes of dim %td, must be a power of two from 4 to %td", shape.dim,
                           kMaxCodeDim);
    if (!(shape.threshold > 0.f))
      return Status::error(Code::invalid_argument, "cache: the threshold of codes is %g, must be positive",
                           static_cast<double>(shape.threshold));
    const index_t row = code_bytes(shape.dim);
    if (limited_product({shape.sequences, shape.slots, shape.kv_heads, row}) == kLargestCache)
      return Status::error(Code::out_of_memory, "cache: codes of %td sequences of %td slots are too much", shape.sequences,
                           shape.slots);
    const auto take = [&](Bump& bump, State& state) {
      state.shape = shape;
      state.codes = bump.take<std::uint8_t>(shape.sequences * shape.kv_heads * shape.slots * row);
      state.len = bump.take<index_t>(shape.sequences);
    };
    if (Status status = allocate(owned_, take); !status.ok()) return status;
    std::fill_n(owned_.state.len, shape.sequences, index_t{0});
    return {};
  }

  // Codes of new keys, k [1, kv_head, token, dim] as they go into the KV cache (rotated), f32, f64, bf16 or f16.
  Status append(index_t sequence, const Operand& k) {
    const State& state = owned_.state;
    const CodeCacheShape& shape = state.shape;
    if (Status status = check_sequence(sequence, shape.sequences); !status.ok()) return status;
    const index_t count = k.extent[2], first = state.len[sequence];
    if (k.extent[0] != 1 || k.extent[1] != shape.kv_heads || k.extent[3] != shape.dim || count < 0 || !is_plain(k.format))
      return Status::error(Code::invalid_argument, "cache: k to append is [%td, %td, %td, %td], must be [1, %td, %td, %td]",
                           k.extent[0], k.extent[1], count, k.extent[3], shape.kv_heads, count, shape.dim);
    if (count > 0 && k.data == nullptr) return Status::error(Code::invalid_argument, "cache: k to append has null data");
    if (count > shape.slots - first)
      return Status::error(Code::out_of_pages, "cache: %td tokens to append, sequence %td has %td of %td slots left", count,
                           sequence, shape.slots - first, shape.slots);
    alignas(64) float numbers[kMaxCodeDim];
    for (index_t head = 0; head < shape.kv_heads; ++head) {
      for (index_t token = 0; token < count; ++token) {
        const index_t at = head * k.stride[1] + token * k.stride[2];
        read_numbers(k.format, k.data + at * row_bytes(k.format, 1), k.stride[3], shape.dim, numbers);
        hadamard(numbers, shape.dim);
        write_codes(numbers, shape.dim, shape.threshold,
                    reinterpret_cast<std::byte*>(row_at(sequence, head, first + token)));
      }
    }
    state.len[sequence] += count;
    return {};
  }

  // Forgets the last `count` keys.
  Status truncate(index_t sequence, index_t count) {
    if (Status status = first_error({check_sequence(sequence, sequences()), check_count(count)}); !status.ok())
      return status;
    index_t& len = owned_.state.len[sequence];
    if (count > len)
      return Status::error(Code::invalid_argument, "cache: %td tokens to roll back, sequence %td has %td", count, sequence,
                           len);
    len -= count;
    return {};
  }

  // [sequence, kv_head, key, byte]; keys behind lengths()[sequence] are not written.
  Tensor<const std::uint8_t> codes() const {
    const CodeCacheShape& shape = owned_.state.shape;
    return bhsd<const std::uint8_t>(owned_.state.codes, shape.sequences, shape.kv_heads, shape.slots, code_bytes(shape.dim));
  }
  float threshold() const { return owned_.state.shape.threshold; }
  index_t sequences() const { return owned_.state.shape.sequences; }
  std::span<const index_t> lengths() const {
    return {owned_.state.len, static_cast<std::size_t>(sequences())};
  }   // [sequence]
  std::size_t bytes() const { return owned_.block.size(); }

 private:
  struct State {
    CodeCacheShape shape{0, 0, 0, 0, 0.f};
    std::uint8_t* codes = nullptr;   // [sequence, kv_head, slot, byte]
    index_t* len = nullptr;          // [sequence]
  };

  std::uint8_t* row_at(index_t sequence, index_t head, index_t slot) const {
    const CodeCacheShape& shape = owned_.state.shape;
    return owned_.state.codes + ((sequence * shape.kv_heads + head) * shape.slots + slot) * code_bytes(shape.dim);
  }

  Owned<State> owned_;
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
