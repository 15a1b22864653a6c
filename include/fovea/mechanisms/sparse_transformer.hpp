// SPDX-License-Identifier: Apache-2.0
// The patterns of the Sparse Transformer (Child et al. 2019, arXiv 1904.10509; its published code has blocks), all causal;
// the query at position t sees
//   local    t - bandwidth + 1 .. t
//   strided  t, t - stride, t - 2 stride ...
//   fixed    in blocks of `block` tokens, stride_blocks of them a stride: its own stride up to itself, and of every earlier
//            stride `vertsize` block columns: the last ones in head 0, those before in head 1, and from the start again
//            after num_verts.
// local is a window of the exact engine. strided falls apart into `stride` dense causal attentions, of the positions with
// equal remainder: views with a row stride of `stride` rows, nothing is gathered, and classes of equal shape are the batch
// of one call. fixed is a list of blocks.
#pragma once
#include "../call/pattern_call.hpp"
#include "../call/sparse_call.hpp"
#include "../call/variant.hpp"

namespace fovea {
inline namespace v0 {

enum class SparsePattern : std::uint8_t { local, strided, fixed };

struct SparseTransformer {
  SparsePattern pattern = SparsePattern::strided;
  index_t bandwidth = 128;                 // local: keys, the query's own included
  index_t stride = 128;                    // strided: tokens
  index_t block = 32, stride_blocks = 4;   // fixed: tokens of a block, blocks of a stride
  index_t vertsize = 1, num_verts = 1;     // fixed: block columns of a summary, and how many summaries heads take in turn
};

inline namespace FOVEA_ARCH {
namespace sparse_transformer {

inline Status check(const SparseTransformer& p, const AttentionOptions& options) {
  const auto fits = [](index_t number) { return number >= 1 && number <= door::kMaxLength; };
  if (p.pattern > SparsePattern::fixed)
    return door::invalid("fovea: pattern is %d, no value of the enum", static_cast<int>(p.pattern));
  if (!fits(p.bandwidth) || !fits(p.stride) || !fits(p.block) || !fits(p.stride_blocks) || !fits(p.vertsize) ||
      !fits(p.num_verts))
    return door::invalid(
        "fovea: bandwidth %td, stride %td, block %td, stride_blocks %td, vertsize %td, num_verts %td must be 1 to %td",
        p.bandwidth, p.stride, p.block, p.stride_blocks, p.vertsize, p.num_verts, door::kMaxLength);
  if (p.pattern == SparsePattern::fixed && p.vertsize * p.num_verts > p.stride_blocks)
    return door::invalid("fovea: num_verts %td times vertsize %td is more than the %td blocks of a stride", p.num_verts,
                         p.vertsize, p.stride_blocks);
  if (options.window.left >= 0 || options.window.right >= 0)
    return door::invalid("fovea: the window %td, %td is the pattern's to set", options.window.left, options.window.right);
  if (p.pattern == SparsePattern::fixed) return {};
  return VariantTraits<Variant<>>::check_options(options);
}

// Queries first .. first + count - 1 of a sequence, the first ones of as many classes with equally many queries and keys.
struct Classes {
  index_t first, count;
  index_t rows, keys;
  index_t key;      // class of query `first`: its first key
  index_t offset;   // position of query `first` within its class

  static constexpr index_t kMost = 4096;   // offsets of one call, kept in memory

  static Classes at(const Sequence& s, index_t first, index_t stride) {
    Classes c = of(s, first, stride);
    const index_t end = std::min({stride, s.len_q, first + kMost});
    while (c.first + c.count < end) {
      const Classes next = of(s, c.first + c.count, stride);
      if (next.rows != c.rows || next.keys != c.keys || next.key != c.key + c.count) break;
      ++c.count;
    }
    return c;
  }

 private:
  static Classes of(const Sequence& s, index_t query, index_t stride) {
    const index_t pos = s.pos + query, offset = door::block_of(pos, stride), key = pos - offset * stride;
    const auto of_class = [&](index_t len, index_t begin) { return len > begin ? (len - begin + stride - 1) / stride : 0; };
    return {query, 1, of_class(s.len_q, query), of_class(s.len_k, key), key, offset};
  }
};

template <class Tensor4>
Tensor4 class_rows(Tensor4 x, index_t batch, index_t first, index_t stride, const Classes& c) {
  x.data += (batch * x.stride[0] + first * x.stride[2]) * door::number_bytes(x);
  x.extent[0] = c.count;
  x.extent[2] = c.rows;
  x.stride[0] = x.stride[2];
  x.stride[2] *= stride;
  return x;
}
inline Stored class_rows(Stored x, index_t batch, index_t first, index_t stride) {
  if (x.data != nullptr) x.data += batch * x.stride[0] + first * x.stride[2];
  x.stride[0] = x.stride[2];
  x.stride[2] *= stride;
  return x;
}

struct OffsetMemory : door::LocalBytes {};

template <class Compiled>
Status run_strided(const Operand& q, const Kv& kv, const Result& out, index_t stride, const AttentionOptions& options) {
  if (kv.home != Home::contiguous || kv.exact != nullptr)
    return door::unsupported("fovea: the strided pattern reads keys a stride apart, which needs contiguous K and V");
  const AttentionShape shape = door::shape_of(q, kv, options);
  if (Status s = door::check_call(q, kv, out, options); !s.ok()) return s;
  if (Status s = door::check_problem(shape, options); !s.ok()) return s;
  if (Status s = door::check_home(kv, shape, options); !s.ok()) return s;
  const auto run = [&](OffsetMemory& memory) -> Status {
    const std::size_t wanted = Classes::kMost * sizeof(index_t) + kAlignment;
    const std::span<std::byte> bytes = memory.workspace(wanted);
    if (Status s = door::check_workspace(bytes, wanted); !s.ok()) return s;
    index_t* const offsets = Bump(aligned(bytes).data()).take<index_t>(Classes::kMost);
    const auto plain = variant();
    for (index_t b = 0; b < door::count_sequences(shape, options); ++b) {
      const Sequence s = door::sequence_of(shape, options, b);
      for (index_t first = 0; first < std::min(stride, s.len_q);) {
        const Classes c = Classes::at(s, first, stride);
        std::fill_n(offsets, c.count, c.offset);
        Kv keys = kv;
        keys.k = class_rows(kv.k, s.kv_batch, s.k_begin + c.key, stride);
        keys.v = class_rows(kv.v, s.kv_batch, s.k_begin + c.key, stride);
        keys.batch = c.count;
        keys.len = c.keys;
        AttentionOptions dense = options;
        dense.causal = Causal::top_left;
        dense.q_offset = {offsets, static_cast<std::size_t>(c.count)};
        dense.len_k = dense.cu_len_q = dense.cu_len_k = {};
        dense.workspace = {};
        if (options.lse) {
          const View<float, 3>& lse = options.lse;
          dense.lse = {lse.data + s.batch * lse.stride[0] + (s.q_begin + first) * lse.stride[2],
                       {c.count, lse.extent[1], c.rows},
                       {lse.stride[2], lse.stride[1], lse.stride[2] * stride}};
        }
        if (Status status = door::run(
                door::call_of_variant<Compiled>(class_rows(q, s.batch, s.q_begin + first, stride, c), keys,
                                                class_rows(out, s.batch, s.q_begin + first, stride, c), dense, plain));
            !status.ok())
          return status;
        first += c.count;
      }
    }
    return {};
  };
  return door::with_memory<OffsetMemory>(run);
}

template <class Compiled>
Status run_fixed(const Operand& q, const Kv& kv, const Result& out, const SparseTransformer& p,
                 const AttentionOptions& options) {
  const AttentionShape shape = door::shape_of(q, kv, options);
  if (Status s = door::check_call(q, kv, out, options); !s.ok()) return s;
  if (Status s = door::check_problem(shape, options); !s.ok()) return s;
  // Rows of a stride have the same summaries, and causality cuts the rest: they share a list as far as that is worth it.
  const index_t tokens = p.block * p.stride_blocks;
  const auto write = [&](const door::ListPlace& place, door::ListWriter& list) {
    if (place.first < 0) return;   // queries before key 0
    const index_t own = place.first / tokens, n = place.head % p.num_verts;
    const index_t blocks = (place.len_k + p.block - 1) / p.block;
    const auto columns = [&](index_t first, index_t end) {
      for (index_t column = first; column < std::min(end, blocks); ++column) list.entry(column);
    };
    for (index_t stride = 0; stride < own && stride * p.stride_blocks < blocks; ++stride) {
      const index_t last = (stride + 1) * p.stride_blocks - n * p.vertsize;
      columns(last - p.vertsize, last);
    }
    columns(own * p.stride_blocks, std::min(place.last / p.block, (own + 1) * p.stride_blocks - 1) + 1);
  };
  const index_t heads = p.num_verts == 1 ? 1 : shape.q_heads;
  const door::ListLayout layout = door::layout_of_lists(shape, options, door::causal_list(tokens), heads);
  const auto run = [&](const KeyLists& lists) { return door::sparse<Compiled>(q, kv, {&lists, 1}, out, options); };
  return door::with_position_lists(layout, shape, options, p.block, false, write, run);
}

}   // namespace sparse_transformer

// Lengths, positions, scale, sink and LSE as in fovea::attention; Causal::none is read as bottom_right. Windows are refused;
// softcap, ALiBi, bias, keep and trees in all patterns but fixed. strided needs contiguous K and V and takes its workspace
// from the library.
template <class Compiled = AllFormats>
Status sparse_transformer_attention(const Operand& q_any, const Kv& kv_any, const Result& out_any,
                                    const SparseTransformer& pattern, const AttentionOptions& options_any = {}) {
  if (Status s = sparse_transformer::check(pattern, options_any); !s.ok()) return s;
  const Operand q = door::tidy_operand(q_any);
  const Kv kv = door::tidy_kv(kv_any);
  const Result out = door::tidy_operand(out_any);
  AttentionOptions options = options_any;
  options.lse = tidy(options.lse);
  if (options.causal == Causal::none) options.causal = Causal::bottom_right;
  switch (pattern.pattern) {
    case SparsePattern::local: {
      const auto plain = variant();
      options.window = {pattern.bandwidth - 1, -1};
      return door::run(door::call_of_variant<Compiled>(q, kv, out, options, plain));
    }
    case SparsePattern::strided:
      return sparse_transformer::run_strided<Compiled>(q, kv, out, pattern.stride, options);
    default:
      return sparse_transformer::run_fixed<Compiled>(q, kv, out, pattern, options);
  }
}
template <class TK, class TV>
Status sparse_transformer_attention(const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, const Result& out,
                                    const SparseTransformer& pattern, const AttentionOptions& options = {}) {
  if (Status s = door::check_dense(q, k, v); !s.ok()) return s;
  return sparse_transformer_attention<door::FormatsOf<TK, TV>>(q, door::kv_of(k, v), out, pattern, options);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
