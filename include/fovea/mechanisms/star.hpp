// SPDX-License-Identifier: Apache-2.0
// Star Attention (Acharya et al. 2024, arXiv 2411.17116) in one process, and what it shares with ring and tree decoding:
// partial results over shards of the keys, merged by their LSE.
//   phase 1  the context is cut into blocks; the first attends to itself, every other one to the anchor (the first tokens of
//            the context) and itself, causal. On several machines each block carries a copy of the anchor. The copies see
//            nothing but the anchor, so in every layer they have the keys and values of the anchor itself: here it is not
//            copied, only listed.
//   phase 2  queries behind the context attend to all keys, shard by shard. Only the last shard holds tokens behind the
//            context.
#pragma once
#include "../call/in_memory.hpp"
#include "../call/pattern_call.hpp"
#include "../call/sparse_call.hpp"
#include "../engine/deal.hpp"
#include "../simd/numbers.hpp"

namespace fovea {
inline namespace v0 {

struct StarContext {
  index_t block = 32768;
  index_t anchor = -1;   // tokens, at most a block; negative: the whole first block
};

// A normalised result over some of the keys, with their natural-log LSE; -inf: none, whatever out holds.
struct AttentionPartial {
  Tensor<float> out;    // [batch, q_head, pos, dim_v]
  View<float, 3> lse;   // [batch, q_head, pos]
};

// Some of the keys, in the order of the sequence: shard p begins where shard p - 1 ends.
struct KeyShard {
  Kv kv;
  std::span<const index_t> len_k = {};   // [sequence]  keys in use, all that are stored if empty
};

// Who owns which tokens when P ranks hold `len` of them each: rank r the r-th piece; chunks r and 2 P - 1 - r of 2 P; every
// P-th.
enum class ShardOrder : std::uint8_t { contiguous, zigzag, stripe };

// What a rank computes when the keys of rank `source` have reached it: its queries [q_begin, q_end) against those keys
// [k_begin, k_end). Causal: as many of both, query n of the range sees keys 0 .. n of the range. Nothing where the ranges
// are empty.
struct RingStep {
  index_t source = 0;
  index_t q_begin = 0, q_end = 0, k_begin = 0, k_end = 0;
  bool causal = false;
};

inline namespace FOVEA_ARCH {

// Phase 1. Causal always: Causal::none is read as bottom_right. Other options as in fovea::attention, over the keys of the
// pattern. Any home and format of K and V; a chunk of the context has the rows of the whole.
template <class Compiled = AllFormats>
Status star_context_attention(const Operand& q, const Kv& kv, const Result& out, const StarContext& context,
                              const AttentionOptions& options_any = {}) {
  const index_t block = context.block, anchor = context.anchor < 0 ? block : context.anchor;
  if (block < 1 || block > door::kMaxLength || anchor > block)
    return door::invalid("fovea: block %td must be 1 to %td, the anchor of %td tokens at most a block", block,
                         door::kMaxLength, anchor);
  AttentionOptions options = options_any;
  if (options.causal == Causal::none) options.causal = Causal::bottom_right;
  const AttentionShape shape = door::shape_of(q, kv, options);
  if (Status s = door::check_call(door::tidy_operand(q), door::tidy_kv(kv), door::tidy_operand(out), options); !s.ok())
    return s;
  if (Status s = door::check_problem(shape, options); !s.ok()) return s;
  const auto write = [&](const door::ListPlace& place, door::ListWriter& list) {
    if (place.first < 0) return;   // queries before key 0
    const index_t begin = place.first / block * block;
    list.range(0, std::min({anchor, begin, place.len_k}));
    list.range(begin, std::min({begin + block, place.last + 1, place.len_k}));
  };
  const door::ListLayout layout = door::layout_of_lists(shape, options, door::causal_list(block), 1);
  const auto run = [&](const KeyLists& lists) { return door::sparse<Compiled>(q, kv, {&lists, 1}, out, options); };
  return door::with_position_lists(layout, shape, options, 1, true, write, run);
}

// fovea::attention over the keys of one shard, into fp32: what one rank of a ring, a tree or a star computes. A sink belongs
// to the merge and is refused, and so are softcap, ALiBi, bias, keep and trees.
template <class Compiled = AllFormats>
Status attend_partial(const Operand& q, const Kv& kv, const AttentionPartial& partial,
                      const AttentionOptions& options = {}) {
  if (!options.sink.empty())
    return door::invalid("fovea: a sink (%zu logits) counts once, in merge_partials", options.sink.size());
  AttentionOptions own = options;
  own.lse = partial.lse;
  if (!own.lse) return door::invalid("fovea: a partial result needs an lse");
  const auto plain = variant();
  return door::run(door::call_of_variant<Compiled>(q, kv, partial.out, own, plain));
}

namespace star {

inline Status check_partials(std::span<const AttentionPartial> partials, const Result& out, const View<float, 3>& lse,
                             std::span<const float> sink) {
  using namespace door;
  Bytes out_bytes, lse_bytes;
  if (partials.empty()) return invalid("fovea: a merge needs at least one partial result");
  if (Status s = check_plain("out", out.format); !s.ok()) return s;
  if (Status s = check_data("out", out, out_bytes); !s.ok()) return s;
  if (Status s = check_outputs(out, out_bytes, lse, out.extent, lse_bytes); !s.ok()) return s;
  if (!sink.empty() && static_cast<index_t>(sink.size()) != out.extent[1])
    return invalid("fovea: sink has %zu entries for %td q heads", sink.size(), out.extent[1]);
  for (const AttentionPartial& partial : partials) {
    Bytes a, b;
    if (Status s = check_data("a partial out", partial.out, a); !s.ok()) return s;
    if (Status s = check_data("a partial lse", partial.lse, b); !s.ok()) return s;
    if (Status s = check_extents("a partial out", partial.out, out.extent, "out"); !s.ok()) return s;
    if (partial.lse.extent != std::array<index_t, 3>{out.extent[0], out.extent[1], out.extent[2]})
      return invalid("fovea: a partial lse is [%td, %td, %td], must be [%td, %td, %td]", partial.lse.extent[0],
                     partial.lse.extent[1], partial.lse.extent[2], out.extent[0], out.extent[1], out.extent[2]);
    for (const auto& [name, bytes] : {std::pair{"a partial out", a}, std::pair{"a partial lse", b}}) {
      if (Status s = check_apart({"out", out_bytes}, name, bytes); !s.ok()) return s;
      if (Status s = check_apart({"lse", lse_bytes}, name, bytes); !s.ok()) return s;
    }
  }
  return {};
}

// The merged row (b, h, i), all partials in their order.
inline void merge_row(std::span<const AttentionPartial> partials, const Result& out, const View<float, 3>& lse, float sink,
                      index_t b, index_t h, index_t i) {
  constexpr index_t kChunk = 64;
  const float empty = -std::numeric_limits<float>::infinity();
  const auto weight_of = [](float of, double top) {   // equal infinities weigh the same
    return static_cast<double>(of) == top ? 1. : std::exp(static_cast<double>(of) - top);
  };
  const auto lse_of = [&](const AttentionPartial& p) {
    return p.lse.data[b * p.lse.stride[0] + h * p.lse.stride[1] + i * p.lse.stride[2]];
  };
  double top = static_cast<double>(sink), sum = 0;
  bool any = sink != empty;
  for (const AttentionPartial& p : partials) {
    top = std::max(top, static_cast<double>(lse_of(p)));
    any = any || lse_of(p) != empty;
  }
  if (any && sink != empty) sum += weight_of(sink, top);
  for (const AttentionPartial& p : partials) {
    if (lse_of(p) != empty) sum += weight_of(lse_of(p), top);
  }
  if (lse) lse(b, h, i) = any ? static_cast<float>(top + std::log(sum)) : empty;
  alignas(f32) float row[kChunk];
  for (index_t d = 0; d < out.extent[3]; d += kChunk) {
    const index_t count = std::min(kChunk, out.extent[3] - d);
    std::fill_n(row, kChunk, 0.f);
    for (const AttentionPartial& p : partials) {
      if (lse_of(p) == empty) continue;
      const f32 share(static_cast<float>(weight_of(lse_of(p), top) / sum));
      const index_t step = p.out.stride[3];
      const float* const from = p.out.data + b * p.out.stride[0] + h * p.out.stride[1] + i * p.out.stride[2] + d * step;
      for (index_t n = 0; n < count; n += kLanes)
        store(row + n, fma(load_strided(from + n * step, step, count - n), share, load(row + n)));
    }
    write_numbers(out.format, row, count,
                  out.data + (b * out.stride[0] + h * out.stride[1] + i * out.stride[2] + d * out.stride[3]) *
                                 row_bytes(out.format, 1),
                  out.stride[3]);
  }
}

}   // namespace star

// out = sum_p exp(lse_p) out_p / (sum_p exp(lse_p) + exp(sink)) for any number of results over disjoint keys; the same bits
// for any number of lanes. The LSE counts the sink. A row that is empty in all of them is 0 with LSE -inf (or the sink).
inline Status merge_partials(std::span<const AttentionPartial> partials, const Result& out_any, View<float, 3> lse = {},
                             std::span<const float> sink = {}, const Executor& executor = {}) {   // [q_head]
  const Result out = door::tidy_operand(out_any);
  lse = tidy(lse);
  if (Status s = star::check_partials(partials, out, lse, sink); !s.ok()) return s;
  if (Status s = check_lanes(executor); !s.ok()) return s;
  const index_t len = out.extent[2];
  deal(executor, executor.lanes(), out.extent[0] * out.extent[1], [&](int, index_t task) {
    const index_t b = task / out.extent[1], h = task % out.extent[1];
    const float logit = sink.empty() ? -std::numeric_limits<float>::infinity() : sink[static_cast<std::size_t>(h)];
    for (index_t i = 0; i < len; ++i) star::merge_row(partials, out, lse, logit, b, h, i);
  });
  return {};
}

namespace star {

struct Memory : door::LocalBytes {};

struct ShardMemory {
  AttentionPartial* partials = nullptr;   // [shard]
  index_t* begin = nullptr;               // [sequence]  keys of the shards before
  index_t* pos = nullptr;                 // [sequence]  position of query 0
  index_t* offset = nullptr;              // [sequence]  the same, counted from the shard's first key
  float* numbers = nullptr;               // [shard, rows, dim_v + 1]

  static ShardMemory carve(Bump& bump, index_t shards, index_t sequences, index_t rows, index_t dim) {
    ShardMemory m;
    m.partials = bump.take<AttentionPartial>(shards);
    m.begin = bump.take<index_t>(sequences);
    m.pos = bump.take<index_t>(sequences);
    m.offset = bump.take<index_t>(sequences);
    m.numbers = bump.take<float>(shards * rows * (dim + 1));
    return m;
  }
};

inline index_t keys_of(const KeyShard& shard, index_t sequence) {
  return shard.len_k.empty() ? shard.kv.len : shard.len_k[static_cast<std::size_t>(sequence)];
}

inline Status check_shards(const Operand& q, std::span<const KeyShard> shards, const Result& out,
                           const AttentionOptions& o) {
  if (shards.empty()) return door::invalid("fovea: sharded attention needs at least one shard");
  if (!o.len_k.empty() || !o.cu_len_k.empty())
    return door::invalid("fovea: shards carry the lengths of their keys; len_k (%zu) and cu_len_k (%zu) must be empty",
                         o.len_k.size(), o.cu_len_k.size());
  if (Status s = VariantTraits<Variant<>>::check_options(o); !s.ok()) return s;
  for (std::size_t p = 0; p < shards.size(); ++p) {
    const Kv &kv = shards[p].kv, &front = shards[0].kv;
    if (kv.kv_heads != front.kv_heads || kv.dim_qk != front.dim_qk || kv.dim_v != front.dim_v)
      return door::invalid("fovea: shard %zu has %td kv heads and dims %td/%td, shard 0 has %td and %td/%td", p, kv.kv_heads,
                           kv.dim_qk, kv.dim_v, front.kv_heads, front.dim_qk, front.dim_v);
    if (Status s = door::check_call(q, door::tidy_kv(kv), out, o); !s.ok()) return s;
    AttentionOptions own = o;
    own.len_k = shards[p].len_k;
    const AttentionShape shape = door::shape_of(q, kv, own);
    if (Status s = door::check_problem(shape, own); !s.ok()) return s;
    if (Status s = door::check_home(kv, shape, own); !s.ok()) return s;
  }
  return {};
}

}   // namespace star

// fovea::attention over the keys of all shards, one after the other: Star Attention's phase 2, tree decoding, keys that lie
// in several memories. Positions count through the shards, so causality and windows mean what they mean over one tensor. The
// calls run one by one on options.executor; partial results, 4 (dim_v + 1) bytes per shard and row, are the library's
// memory. Softcap, ALiBi, bias, keep and trees are refused.
template <class Compiled = AllFormats>
Status sharded_attention(const Operand& q_any, std::span<const KeyShard> shards, const Result& out_any,
                         const AttentionOptions& options_any = {}) {
  Operand q = door::tidy_operand(q_any);
  Result out = door::tidy_operand(out_any);
  AttentionOptions options = options_any;
  options.lse = tidy(options.lse);
  if (Status s = star::check_shards(q, shards, out, options); !s.ok()) return s;
  if (!options.cu_len_q.empty()) {   // queries behind the last sequence belong to nobody
    q.extent[2] = out.extent[2] = options.cu_len_q.back();
    options.lse.extent[2] = options.lse ? options.cu_len_q.back() : 0;
  }
  const index_t sequences = options.cu_len_q.empty() ? q.extent[0] : static_cast<index_t>(options.cu_len_q.size()) - 1;
  const index_t rows = q.extent[0] * q.extent[1] * q.extent[2], dim = out.extent[3];
  const auto count = static_cast<index_t>(shards.size());
  Bump size;
  star::ShardMemory::carve(size, count, sequences, rows, dim);
  return door::in_memory<star::Memory>({}, size.used() + kAlignment, [&](std::span<std::byte> bytes) -> Status {
    Bump bump(bytes.data());
    const star::ShardMemory m = star::ShardMemory::carve(bump, count, sequences, rows, dim);
    for (index_t b = 0; b < sequences; ++b) {
      const auto at = static_cast<std::size_t>(b);
      index_t keys = 0;
      for (const KeyShard& shard : shards) keys += star::keys_of(shard, b);
      const index_t len_q = options.cu_len_q.empty() ? q.extent[2] : options.cu_len_q[at + 1] - options.cu_len_q[at];
      m.begin[b] = 0;
      m.pos[b] = !options.q_offset.empty()                ? options.q_offset[at]
                 : options.causal == Causal::bottom_right ? keys - len_q
                                                          : 0;
    }
    for (index_t p = 0; p < count; ++p) {
      const KeyShard& shard = shards[static_cast<std::size_t>(p)];
      for (index_t b = 0; b < sequences; ++b) m.offset[b] = m.pos[b] - m.begin[b];
      float* const numbers = m.numbers + p * rows * (dim + 1);
      const AttentionPartial partial{
          bhsd(numbers, q.extent[0], q.extent[1], q.extent[2], dim),
          {numbers + rows * dim, {q.extent[0], q.extent[1], q.extent[2]}, {q.extent[1] * q.extent[2], q.extent[2], 1}}};
      ::new (static_cast<void*>(m.partials + p)) AttentionPartial(partial);
      AttentionOptions own = options;
      own.sink = {};
      own.len_k = shard.len_k;
      own.q_offset = {m.offset, static_cast<std::size_t>(sequences)};
      if (own.causal != Causal::none) own.causal = Causal::top_left;
      if (Status s = attend_partial<Compiled>(q, shard.kv, partial, own); !s.ok()) return s;
      for (index_t b = 0; b < sequences; ++b) m.begin[b] += star::keys_of(shard, b);
    }
    return merge_partials({m.partials, static_cast<std::size_t>(count)}, out, options.lse, options.sink, options.executor);
  });
}

// Position of a rank's token i.
inline index_t shard_position(ShardOrder order, index_t ranks, index_t len, index_t rank, index_t i) {
  switch (order) {
    case ShardOrder::contiguous:
      return rank * len + i;
    case ShardOrder::zigzag: {
      const index_t chunk = len / 2;
      return i < chunk ? rank * chunk + i : (2 * ranks - 1 - rank) * chunk + i - chunk;
    }
    default:
      return i * ranks + rank;
  }
}

// Step 0 .. ranks - 1 of a causal ring: at step s the keys of rank (rank - s) mod ranks are there. `len` is every rank's
// number of tokens, even with zigzag. Over all steps each pair of a query and a key not behind it is computed once; zigzag
// gives every rank the same number of pairs, stripe nearly so, contiguous 1 step to the first rank and all of them to the
// last.
inline RingStep ring_step(ShardOrder order, index_t ranks, index_t len, index_t rank, index_t step) {
  const bool ahead = step > rank;   // the keys come from a rank behind this one
  const index_t source = ahead ? rank - step + ranks : rank - step;
  switch (order) {
    case ShardOrder::contiguous:
      if (ahead) return {source, 0, 0, 0, 0, false};
      return {source, 0, len, 0, len, step == 0};
    case ShardOrder::zigzag:
      if (step == 0) return {source, 0, len, 0, len, true};
      if (ahead) return {source, len / 2, len, 0, len, false};
      return {source, 0, len, 0, len / 2, false};
    default:
      if (ahead) return {source, 1, len, 0, len - 1, true};
      return {source, 0, len, 0, len, true};
  }
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
