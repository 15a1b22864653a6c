// SPDX-License-Identifier: Apache-2.0
// FRONT DOOR 3: exact attention over chosen keys. Lists of blocks, tokens or ranges (core/key_lists.hpp) say which keys a query
// may attend to; everything else is fovea::attention: shapes, storage, homes of K and V, options, variants, LSE, errors.
//
//   fovea::KeyLists chosen;   // 16 blocks of 64 keys for every kv head and query
//   chosen.entries = blocks.data();
//   chosen.capacity = 16, chosen.heads = kv_heads, chosen.q_blocks = len_q, chosen.k_block = 64;
//   fovea::Status status = fovea::sparse_attention(q, cache.kv(), chosen, out, {.causal = fovea::Causal::bottom_right});
#pragma once
#include "attention.hpp"
#include "call/sparse_call.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// out_i = softmax attention of query i over the keys that the lists of `lists` name, all in one softmax, and that the options
// (causality, window, lengths, keep, tree) let it see.
// Lists      all with the same q_block; an entry names keys of the query's own sequence. A key named twice counts twice. A query
//            without a visible key has output 0 and LSE -inf, so results over disjoint lists merge (fovea::merge).
// Positions  a listed key keeps its position: causality, windows, ALiBi, biases and functors see it, whatever its place in a list.
// NaN        in keys that are not listed leaves no trace; otherwise as in fovea::attention.
// Order      the sum runs in the order of the lists: sorted lists give results that do not depend on who made them.
// Same bits  as in fovea::attention, but the regime: with `automatic` the longest sequence of a ragged batch decides for all.
// Costs      scattered keys (runs shorter than 8) are copied before they are read, once for all rows that share the list.
// Allocates  the runs of the lists (8 bytes each) and the plan, kept per thread; with a SparsePlan and a workspace nothing.
// Errors     as fovea::attention; an entry behind the sequence's keys is one. On error nothing has been written.
template <class Compiled = AllFormats>
Status sparse_attention(const Operand& q, const Kv& kv, std::span<const KeyLists> lists, const Result& out,
                        const AttentionOptions& options = {}) {
  return door::sparse<Compiled>(q, kv, lists, out, options);
}
template <class Compiled = AllFormats>
Status sparse_attention(const Operand& q, const Kv& kv, const KeyLists& lists, const Result& out,
                        const AttentionOptions& options = {}) {
  return door::sparse<Compiled>(q, kv, {&lists, 1}, out, options);
}
template <class TK, class TV>
Status sparse_attention(const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, std::span<const KeyLists> lists,
                        const Result& out, const AttentionOptions& options = {}) {
  if (Status s = door::check_dense(q, k, v); !s.ok()) return s;
  return door::sparse<door::FormatsOf<TK, TV>>(q, door::kv_of(k, v), lists, out, options);
}
template <class TK, class TV>
Status sparse_attention(const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, const KeyLists& lists,
                        const Result& out, const AttentionOptions& options = {}) {
  return sparse_attention(q, k, v, std::span<const KeyLists>(&lists, 1), out, options);
}

// The same with a variant (scores, masks, normalisers of your own); taps are refused at compile time, they count on neighbours.
template <class Compiled = AllFormats, AnyVariant V>
Status sparse_attention(const Operand& q, const Kv& kv, std::span<const KeyLists> lists, const Result& out,
                        const AttentionOptions& options, const V& variant) {
  return door::sparse<Compiled>(q, kv, lists, out, options, variant);
}

// A plan to be used by many calls with the same lists, lengths and options: the layers of a step that share one selection.
inline Status make_sparse_plan(SparsePlan& plan, const AttentionShape& shape, std::span<const KeyLists> lists,
                               const AttentionOptions& options = {}) {
  return door::plan_sparse(plan, shape, lists, options, {});
}
template <class Compiled = AllFormats>
Status sparse_attention(const SparsePlan& plan, const Operand& q, const Kv& kv, const Result& out,
                        const AttentionOptions& options = {}) {
  return door::run_sparse(door::call_of<door::ListSoftmaxLanes, Compiled>(q, kv, out, options), plan);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
