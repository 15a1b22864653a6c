// SPDX-License-Identifier: Apache-2.0
// What all caches share: what a token is (CacheRows), and a store of encoded rows in blocks of slots (RowStore), where a
// block is a sequence or a page. Caches move bytes; they know neither attention nor what the bytes mean.
#pragma once
#include <algorithm>
#include <array>
#include <concepts>
#include <cstring>
#include <span>
#include <utility>

#include "../core/kv.hpp"
#include "../core/status.hpp"
#include "../core/workspace.hpp"
#include "memory.hpp"

namespace fovea {
inline namespace v0 {

// One token: a K row and a V row per kv head.
struct CacheRows {
  index_t kv_heads = 1, dim_qk = 0, dim_v = 0;
  Format k = Format::bf16, v = Format::bf16;
  bool v_in_k = false;   // V is the first dim_v numbers of the K row and takes no memory (MLA: latent_value_dim says how many)
  const float* k_channel_scale = nullptr;   // [kv_head, dim_qk]  with Format::i8_channel; copied when the cache is created
};

// head_major: the rows of one head of one block stand next to each other. token_major: the rows of all heads of one token
// do; decode then reads with a stride, at half the speed and less (docs/caches.md).
enum class KvLayout : std::uint8_t { head_major, token_major };

// Some sequences of a cache as a call takes them: `len_k` goes into AttentionOptions::len_k.
struct KvBatch {
  Kv kv;
  std::span<const index_t> len_k;   // [sequence]
};

inline namespace FOVEA_ARCH {

// Fills the rows of a new token: token counts from 0 within the append; v_row is null where V lies in K. Must not throw.
template <class F>
concept RowWriter = std::invocable<F&, index_t, index_t, std::byte*, std::byte*>;   // (token, kv_head, k_row, v_row)

// Copies ready rows, strides per [-, kv_head, token] as in Stored; entry 0 is read.
struct CopyRows {
  Stored k, v;
  std::size_t k_bytes, v_bytes;

  void operator()(index_t token, index_t kv_head, std::byte* k_row, std::byte* v_row) const {
    std::memcpy(k_row, k.data + kv_head * k.stride[1] + token * k.stride[2], k_bytes);
    if (v_row != nullptr) std::memcpy(v_row, v.data + kv_head * v.stride[1] + token * v.stride[2], v_bytes);
  }
};

// Sizes multiply up to this and stay there, so that no request overflows: it is refused as too large.
inline constexpr index_t kLargestCache = index_t{1} << 47;

inline index_t limited_product(std::initializer_list<index_t> factors) {
  index_t product = 1;
  for (const index_t factor : factors) {
    if (factor != 0 && product > kLargestCache / factor) return kLargestCache;
    product *= factor;
  }
  return product;
}

// Bytes one token takes in all kv heads.
inline index_t token_bytes(const CacheRows& rows) {
  return rows.kv_heads * (row_bytes(rows.k, rows.dim_qk) + (rows.v_in_k ? 0 : row_bytes(rows.v, rows.dim_v)));
}

inline Status check_rows(const CacheRows& rows) {
  constexpr index_t kMost = 1 << 20;
  if (rows.kv_heads < 1 || rows.kv_heads > kMost || rows.dim_qk < 1 || rows.dim_qk > kMost || rows.dim_v < 1 ||
      rows.dim_v > kMost) {
    return Status::error(Code::invalid_argument, "cache: kv_heads %td, dim_qk %td, dim_v %td; each is 1 to %td",
                         rows.kv_heads, rows.dim_qk, rows.dim_v, kMost);
  }
  if (static_cast<int>(rows.k) >= kFormats || static_cast<int>(rows.v) >= kFormats) {
    return Status::error(Code::invalid_argument, "cache: formats %d and %d; there are %d", static_cast<int>(rows.k),
                         static_cast<int>(rows.v), kFormats);
  }
  if (rows.k == Format::latent_fp8 && rows.dim_qk != kLatentFp8Dim) {
    return Status::error(Code::invalid_argument, "cache: latent_fp8 has %td numbers as K, dim_qk is %td", kLatentFp8Dim,
                         rows.dim_qk);
  }
  if ((rows.k == Format::i8_channel) != (rows.k_channel_scale != nullptr)) {
    return Status::error(Code::invalid_argument, "cache: k_channel_scale %s, K is stored as %s",
                         rows.k_channel_scale != nullptr ? "is given" : "is missing", name_of(rows.k));
  }
  if (rows.v_in_k) {
    const bool latent = rows.k == Format::latent_fp8;
    if (rows.v != rows.k || rows.dim_v > rows.dim_qk || (latent && rows.dim_v != kLatentFp8Values)) {
      return Status::error(Code::invalid_argument, "cache: V in K needs one format and a dim_v of at most %td; %s, %s, %td",
                           latent ? kLatentFp8Values : rows.dim_qk, name_of(rows.k), name_of(rows.v), rows.dim_v);
    }
    // The scales of the other formats stand behind all numbers of the row, where a shorter row has none.
    if (!is_plain(rows.k) && !latent && rows.dim_v != rows.dim_qk) {
      return Status::error(Code::unsupported, "cache: V in %s rows of K has all of their %td numbers, dim_v is %td",
                           name_of(rows.k), rows.dim_qk, rows.dim_v);
    }
  } else if (rows.v == Format::latent_fp8) {
    return Status::error(Code::unsupported, "cache: V of its own cannot be stored as %s", name_of(rows.v));
  }
  if (rows.v == Format::i8_channel)
    return Status::error(Code::unsupported, "cache: V cannot be stored as i8_channel: its scales would be summed over keys");
  return {};
}

inline Status check_sequence(index_t sequence, index_t sequences) {
  if (sequence >= 0 && sequence < sequences) return {};
  return Status::error(Code::invalid_argument, "cache: sequence %td of %td", sequence, sequences);
}

inline Status check_count(index_t count) {
  if (count >= 0) return {};
  return Status::error(Code::invalid_argument, "cache: %td tokens", count);
}

// Ready rows must be what the cache stores: it copies bytes.
inline Status check_ready_rows(const CacheRows& rows, const Stored& k, const Stored& v, index_t count) {
  if (k.format != rows.k || (!rows.v_in_k && v.format != rows.v)) {
    return Status::error(Code::invalid_argument, "cache: rows of %s and %s, the cache stores %s and %s", name_of(k.format),
                         name_of(v.format), name_of(rows.k), name_of(rows.v));
  }
  if (count > 0 && (k.data == nullptr || (!rows.v_in_k && v.data == nullptr))) {
    return Status::error(Code::invalid_argument, "cache: %td rows at a null pointer", count);
  }
  return {};
}

inline CopyRows copy_rows(const CacheRows& rows, const Stored& k, const Stored& v) {
  return {k, v, static_cast<std::size_t>(row_bytes(rows.k, rows.dim_qk)),
          static_cast<std::size_t>(row_bytes(rows.v, rows.dim_v))};
}

// The rows of an append, `run` tokens of a head at a time. New rows mostly come token by token and go head by head: all
// tokens of one head first took longer (1.6 against 0.8 to 1.0 us per token, 8 heads of 128 bf16, 16384 tokens).
template <class F>
void each_token_and_head(index_t count, index_t kv_heads, index_t run, F&& f) {
  for (index_t begin = 0; begin < count; begin += run) {
    for (index_t kv_head = 0; kv_head < kv_heads; ++kv_head) {
      for (index_t token = begin; token < std::min(begin + run, count); ++token) f(token, kv_head);
    }
  }
}

// The first failure of several checks.
inline Status first_error(std::initializer_list<Status> all) {
  for (const Status& status : all) {
    if (!status.ok()) return status;
  }
  return {};
}

// One allocation for everything `take(bump, state)` takes. On error `owned` keeps what it had.
template <class State, class Take>
Status allocate(Owned<State>& owned, Take&& take) {
  Bump counting;
  State counted{};
  take(counting, counted);
  Owned<State> fresh;
  if (Status status = fresh.block.allocate(counting.used()); !status.ok()) return status;
  Bump taking(fresh.block.data());
  take(taking, fresh.state);
  owned = std::move(fresh);
  return {};
}

class RowStore {
 public:
  RowStore() = default;

  // Takes [block, kv_head, slot] rows of K and of V, and the scales of K's channels; over a counting Bump the store is only
  // measured.
  RowStore(Bump& bump, const CacheRows& rows, index_t blocks, index_t slots, KvLayout layout, bool poisoned)
      : rows_(rows), blocks_(blocks), slots_(slots), poisoned_(poisoned) {
    rows_.v = rows.v_in_k ? rows.k : rows.v;
    lay_out(k_, bump, rows_.k, rows.dim_qk, layout);
    if (rows.v_in_k) {
      v_ = k_;
    } else {
      lay_out(v_, bump, rows_.v, rows.dim_v, layout);
    }
    if (rows.k_channel_scale != nullptr) {
      const index_t count = rows.kv_heads * rows.dim_qk;
      float* const scale = bump.take<float>(count);
      if (scale != nullptr) std::memcpy(scale, rows.k_channel_scale, static_cast<std::size_t>(count) * sizeof(float));
      rows_.k_channel_scale = scale;
    }
    if (poisoned && k_.data != nullptr) {
      for (index_t block = 0; block < blocks; ++block) poison(block, 0, slots);
    }
  }

  const CacheRows& rows() const { return rows_; }
  bool poisoned() const { return poisoned_; }
  bool token_major() const { return k_.stride[2] != k_.row; }

  std::byte* k(index_t block, index_t kv_head, index_t slot) const { return at(k_, block, kv_head, slot); }
  std::byte* v(index_t block, index_t kv_head, index_t slot) const {
    return rows_.v_in_k ? nullptr : at(v_, block, kv_head, slot);
  }
  const std::byte* v_or_k(index_t block, index_t kv_head, index_t slot) const { return at(v_, block, kv_head, slot); }

  void copy(index_t from_block, index_t from_slot, index_t to_block, index_t to_slot, index_t count) const {
    each_run(from_block, from_slot, count, [&](const Half& half, index_t kv_head, std::byte* from, std::size_t bytes) {
      std::memcpy(at(half, to_block, kv_head, to_slot), from, bytes);
    });
  }

  // 0xFF is a NaN in every floating format and in every scale: a read of it is noticed. Only where the cache asked for it.
  void poison(index_t block, index_t slot, index_t count) const {
    if (!poisoned_) return;
    each_run(block, slot, count,
             [](const Half&, index_t, std::byte* rows, std::size_t bytes) { std::memset(rows, 0xff, bytes); });
  }
  bool is_poison(index_t block, index_t slot, index_t count) const {
    bool poison = true;
    each_run(block, slot, count, [&](const Half&, index_t, std::byte* rows, std::size_t bytes) {
      for (std::size_t n = 0; n < bytes; ++n) poison = poison && rows[n] == std::byte{0xff};
    });
    return poison;
  }

  // A descriptor of all blocks; where its keys are is left to the cache.
  Kv kv() const {
    Kv kv;
    kv.k = {k_.data, rows_.k, k_.stride};
    kv.v = {v_.data, rows_.v, v_.stride};
    kv.kv_heads = rows_.kv_heads;
    kv.dim_qk = rows_.dim_qk;
    kv.dim_v = rows_.dim_v;
    kv.batch = blocks_;
    kv.len = slots_;
    kv.k_channel_scale = rows_.k_channel_scale;
    return kv;
  }

 private:
  struct Half {
    std::byte* data = nullptr;
    std::array<index_t, 3> stride{};   // bytes per block, kv head, slot
    index_t row = 0;
  };

  void lay_out(Half& half, Bump& bump, Format format, index_t dim, KvLayout layout) const {
    half.row = row_bytes(format, dim);
    half.data = bump.take<std::byte>(blocks_ * slots_ * rows_.kv_heads * half.row);
    const index_t block = slots_ * rows_.kv_heads * half.row;
    if (layout == KvLayout::head_major) {
      half.stride = {block, slots_ * half.row, half.row};
    } else {
      half.stride = {block, half.row, rows_.kv_heads * half.row};
    }
  }

  std::byte* at(const Half& half, index_t block, index_t kv_head, index_t slot) const {
    FOVEA_ASSERT(block >= 0 && block < blocks_ && kv_head >= 0 && kv_head < rows_.kv_heads && slot >= 0 && slot < slots_);
    return half.data + block * half.stride[0] + kv_head * half.stride[1] + slot * half.stride[2];
  }

  // Calls f for runs of bytes that together hold the rows of `count` slots: one per head, or one where all heads of a token
  // stand together.
  template <class F>
  void each_run(index_t block, index_t slot, index_t count, F&& f) const {
    if (count == 0) return;
    for (const Half* half : {&k_, &v_}) {
      if (half == &v_ && rows_.v_in_k) continue;
      const bool together = half->stride[2] != half->row;
      const auto bytes = static_cast<std::size_t>(count * half->stride[2]);
      for (index_t kv_head = 0; kv_head < (together ? 1 : rows_.kv_heads); ++kv_head) {
        f(*half, kv_head, at(*half, block, kv_head, slot), bytes);
      }
    }
  }

  CacheRows rows_{};
  Half k_, v_;
  index_t blocks_ = 0, slots_ = 0;
  bool poisoned_ = false;
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
