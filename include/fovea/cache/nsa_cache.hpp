// SPDX-License-Identifier: Apache-2.0
// NsaCache: what native sparse attention keeps of a layer. Keys and values of all tokens (keys turned by RoPE; for the
// selected blocks and the window), the compressed entries, and the last tokens as they came, up to l of them, which the next
// entry is made of. One writer at a time; no call throws, and a refused one changes nothing. Tokens cannot be taken back one
// by one: those that an older entry was made of are gone.
#pragma once
#include "../mechanisms/nsa.hpp"
#include "append.hpp"
#include "contiguous_cache.hpp"

namespace fovea {
inline namespace v0 {

struct NsaCacheShape {
  CacheRows rows;                 // of all tokens; V has rows of its own
  Format entries = Format::f32;   // of the compressed keys and values: f32, f64, bf16 or f16
  NsaShape nsa;
  NsaPhi phi_k, phi_v;               // weights are borrowed as long as the cache lives
  const RopeTable* rope = nullptr;   // turns the keys of the tokens, position = place in the sequence; borrowed
  RopeLayout layout = RopeLayout::half_split;
  NsaRopeOrder order = NsaRopeOrder::pool_then_rope;   // of the entries' keys, where there is a table
  index_t sequences = 1, slots = 0;                    // tokens per sequence
  bool poison = false;                                 // 0xFF wherever no token and no entry is
};

inline namespace FOVEA_ARCH {

class NsaCache {
 public:
  // Replaces whatever the cache held; on error it keeps it.
  Status create(const NsaCacheShape& shape) {
    if (Status s = check_nsa(shape.nsa); !s.ok()) return s;
    if (Status s = check_rows(shape.rows); !s.ok()) return s;
    if (shape.rows.v_in_k || !is_plain(shape.entries))
      return Status::error(Code::unsupported, "cache: nsa keeps V apart from K, and entries as f32, f64, bf16 or f16");
    const index_t heads = shape.rows.kv_heads, dim_qk = shape.rows.dim_qk, dim_v = shape.rows.dim_v;
    if (std::max(dim_qk, dim_v) > door::kMaxDim)
      return Status::error(Code::unsupported, "cache: nsa takes dims up to %td: dim_qk %td, dim_v %td", door::kMaxDim, dim_qk, dim_v);
    if (Status s = nsa::check_phi(shape.phi_k, shape.nsa, heads, dim_qk, dim_qk); !s.ok()) return s;
    if (Status s = nsa::check_phi(shape.phi_v, shape.nsa, heads, dim_v, dim_v); !s.ok()) return s;
    if (shape.rope != nullptr && (shape.rope->first_pos > 0 || shape.rope->first_pos + shape.rope->len < shape.slots))
      return Status::error(Code::invalid_argument, "cache: the RoPE table has the positions %td to %td, the cache %td slots",
                           shape.rope->first_pos, shape.rope->first_pos + shape.rope->len - 1, shape.slots);
    if (limited_product({shape.sequences, shape.nsa.block, heads, 4 * (dim_qk + dim_v)}) == kLargestCache)
      return Status::error(Code::out_of_memory, "cache: %td sequences of %td open tokens are too much", shape.sequences,
                           shape.nsa.block);
    ContiguousCache tokens, entries;
    if (Status s = tokens.create({shape.rows, shape.sequences, shape.slots, KvLayout::head_major, shape.poison}); !s.ok())
      return s;
    const CacheRows entry_rows{heads, dim_qk, dim_v, shape.entries, shape.entries};
    const index_t most = std::max<index_t>(nsa_entries(shape.slots, shape.nsa), 1);
    if (Status s = entries.create({entry_rows, shape.sequences, most, KvLayout::head_major, shape.poison}); !s.ok())
      return s;
    const auto take = [&](Bump& bump, State& state) {
      state.shape = shape;
      state.k = bump.take<float>(shape.sequences * heads * shape.nsa.block * dim_qk);
      state.v = bump.take<float>(shape.sequences * heads * shape.nsa.block * dim_v);
    };
    if (Status s = allocate(owned_, take); !s.ok()) return s;
    tokens_ = std::move(tokens);
    entries_ = std::move(entries);
    return {};
  }

  // Appends the tokens k [1, kv_head, token, dim_qk], v [1, kv_head, token, dim_v] (f32, f64, bf16 or f16), keys not yet
  // turned, and the entries they complete.
  Status append(index_t sequence, const Operand& k_any, const Operand& v_any, const Executor& executor = {}) {
    const Operand k = door::tidy_operand(k_any), v = door::tidy_operand(v_any);
    if (Status s = check_sequence(sequence, tokens_.sequences()); !s.ok()) return s;
    if (Status s = check_lanes(executor); !s.ok()) return s;
    const NsaCacheShape& shape = owned_.state.shape;
    const index_t before = tokens_.len(sequence), old = entries_.len(sequence), step = shape.nsa.stride;
    const AppendRope rope{shape.rope, shape.layout, before};
    if (Status s = append_tokens(tokens_, sequence, k, v, rope); !s.ok()) return s;
    const index_t end = nsa_entries(tokens_.len(sequence), shape.nsa);
    const auto refuse = [&](const Status& why) {
      (void)tokens_.truncate(sequence, tokens_.len(sequence) - before);
      (void)entries_.truncate(sequence, entries_.len(sequence) - old);
      return why;
    };
    if (Status s = entries_.extend(sequence, end - old); !s.ok()) return refuse(s);

    // Entries that begin with this append straight from its tokens, all in one call; first, since it takes the most memory: where
    // there is enough for it and for the first of the others, nothing fails once open tokens are forgotten, unless other threads
    // take the memory in between.
    const index_t straight = std::clamp((before + step - 1) / step, old, end);
    if (straight < end) {
      const index_t first = straight * step - before;
      if (Status s = make(sequence, straight, end - straight, nsa::positions_of(k, first, k.extent[2] - first),
                          nsa::positions_of(v, first, v.extent[2] - first), executor);
          !s.ok())
        return refuse(s);
    }
    index_t open = before - old * step, read = 0;
    for (index_t entry = old; entry < straight; ++entry) {   // those that began before, from the open tokens
      const index_t fill = shape.nsa.block - open;
      keep(sequence, open, k, v, read, fill);
      read += fill;
      if (Status s = make(sequence, entry, 1, open_tokens(sequence, 0), open_tokens(sequence, 1), executor); !s.ok())
        return refuse(s);
      forget(sequence, step);
      open = shape.nsa.block - step;
    }
    if (straight < end) {
      read = end * step - before;
      open = 0;
    }
    keep(sequence, open, k, v, read, k.extent[2] - read);
    return {};
  }

  Status reset(index_t sequence) {
    if (Status s = tokens_.reset(sequence); !s.ok()) return s;
    return entries_.reset(sequence);
  }

  // Makes `to` a copy of `from`, whatever it was before.
  Status fork(index_t from, index_t to) {
    if (Status s = tokens_.fork(from, to); !s.ok()) return s;
    if (Status s = entries_.fork(from, to); !s.ok()) return s;
    for (const index_t which : {0, 1}) {
      const Operand source = open_tokens(from, which), target = open_tokens(to, which);
      std::memcpy(const_cast<std::byte*>(target.data), source.data,
                  static_cast<std::size_t>(source.extent[1] * source.stride[1]) * sizeof(float));
    }
    return {};
  }

  index_t sequences() const { return tokens_.sequences(); }
  index_t slots() const { return tokens_.slots(); }
  index_t len(index_t sequence) const { return tokens_.len(sequence); }
  index_t entries(index_t sequence) const { return entries_.len(sequence); }
  const NsaShape& nsa() const { return owned_.state.shape.nsa; }
  std::size_t bytes() const { return tokens_.bytes() + entries_.bytes() + owned_.block.size(); }

  // For nsa_attention: all sequences, `len_k` into NsaOptions; valid as long as the cache.
  KvBatch batch() const { return tokens_.batch(); }
  Kv compressed() const { return entries_.batch().kv; }

  Status check() const { return first_error({tokens_.check(), entries_.check()}); }

 private:
  struct State {
    NsaCacheShape shape;
    float* k = nullptr;   // [sequence, kv_head, l, dim_qk]  the open tokens: those of the entries that are not complete
    float* v = nullptr;   // [sequence, kv_head, l, dim_v]
  };

  // [1, kv_head, l, dim] of K (0) or V (1).
  Operand open_tokens(index_t sequence, index_t which) const {
    const CacheRows& rows = owned_.state.shape.rows;
    const index_t dim = which == 0 ? rows.dim_qk : rows.dim_v, len = owned_.state.shape.nsa.block;
    float* const data = (which == 0 ? owned_.state.k : owned_.state.v) + sequence * rows.kv_heads * len * dim;
    return bhsd(data, 1, rows.kv_heads, len, dim);
  }

  // Tokens [first, first + count) of k and v behind `open` open ones.
  void keep(index_t sequence, index_t open, const Operand& k, const Operand& v, index_t first, index_t count) {
    for (const index_t which : {0, 1}) {
      const Operand& from = which == 0 ? k : v;
      const Operand to = open_tokens(sequence, which);
      auto* const floats = const_cast<float*>(reinterpret_cast<const float*>(to.data));
      for (index_t head = 0; head < to.extent[1]; ++head) {
        for (index_t j = 0; j < count; ++j) {
          const index_t at = head * from.stride[1] + (first + j) * from.stride[2];
          read_strided(from.format, from.data + at * row_bytes(from.format, 1), from.stride[3], to.extent[3],
                       floats + head * to.stride[1] + (open + j) * to.stride[2]);
        }
      }
    }
  }
  void forget(index_t sequence, index_t count) {
    for (const index_t which : {0, 1}) {
      const Operand tokens = open_tokens(sequence, which);
      auto* const floats = const_cast<float*>(reinterpret_cast<const float*>(tokens.data));
      for (index_t head = 0; head < tokens.extent[1]; ++head) {
        float* const of_head = floats + head * tokens.stride[1];
        std::memmove(of_head, of_head + count * tokens.stride[2],
                     static_cast<std::size_t>((tokens.extent[2] - count) * tokens.stride[2]) * sizeof(float));
      }
    }
  }

  Status make(index_t sequence, index_t first, index_t count, const Operand& k, const Operand& v, const Executor& executor) {
    const NsaCacheShape& shape = owned_.state.shape;
    const NsaRope rope{shape.rope == nullptr ? NsaRopeOrder::none : shape.order, shape.rope, shape.layout,
                       first * shape.nsa.stride};
    const Kv kv = entries_.batch().kv;
    const auto rows_of = [&](const Stored& stored, std::byte* data, index_t dim) {
      Result to;
      to.data = data;
      to.format = stored.format;
      to.extent = {1, kv.kv_heads, count, dim};
      const index_t number = row_bytes(stored.format, 1);
      to.stride = {0, stored.stride[1] / number, stored.stride[2] / number, 1};
      return to;
    };
    const Result to_k = rows_of(kv.k, entries_.writable_k_row(sequence, 0, first), kv.dim_qk);
    const Result to_v = rows_of(kv.v, entries_.writable_v_row(sequence, 0, first), kv.dim_v);
    if (Status s = nsa_compress(k, shape.nsa, shape.phi_k, to_k, rope, executor); !s.ok()) return s;
    return nsa_compress(v, shape.nsa, shape.phi_v, to_v, {}, executor);
  }

  ContiguousCache tokens_, entries_;
  Owned<State> owned_;
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
