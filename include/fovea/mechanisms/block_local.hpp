// SPDX-License-Identifier: Apache-2.0
// Block-local attention (Liu et al. 2018, arXiv 1801.10198; "chunked attention" of Llama 4): positions are
// cut into blocks of b, and a query sees its own block, look_back blocks before it and look_ahead behind:
//   s is seen by t  iff  floor(t / b) - look_back <= floor(s / b) <= floor(t / b) + look_ahead,
// and s <= t as well where the options are causal. Blocks are counted from position 0, so a decode step and a chunk of a
// prefill have the blocks of the whole sequence.
#pragma once
#include "../call/pattern_call.hpp"
#include "../call/sparse_call.hpp"

namespace fovea {
inline namespace v0 {

struct BlockLocal {
  index_t block = 256;
  index_t look_back = 0, look_ahead = 0;   // in blocks
};

inline namespace FOVEA_ARCH {

// Every option of fovea::attention, over the keys of the blocks. Any home and format of K and V.
template <class Compiled = AllFormats>
Status block_local_attention(const Operand& q, const Kv& kv, const Result& out, const BlockLocal& blocks,
                             const AttentionOptions& options = {}) {
  if (blocks.block < 1 || blocks.look_back < 0 || blocks.look_ahead < 0 || blocks.block > door::kMaxLength ||
      blocks.look_back > door::kMaxLength || blocks.look_ahead > door::kMaxLength)
    return door::invalid("fovea: block %td, look_back %td and look_ahead %td must be 1, 0, 0 or more, and at most %td",
                         blocks.block, blocks.look_back, blocks.look_ahead, door::kMaxLength);
  const AttentionShape shape = door::shape_of(q, kv, options);
  if (Status s = door::check_call(door::tidy_operand(q), door::tidy_kv(kv), door::tidy_operand(out), options); !s.ok())
    return s;
  if (Status s = door::check_problem(shape, options); !s.ok()) return s;
  const bool causal = options.causal != Causal::none;
  const auto write = [&](const door::ListPlace& place, door::ListWriter& list) {
    const index_t own = door::block_of(place.first, blocks.block);
    const index_t end = std::min((own + blocks.look_ahead + 1) * blocks.block, place.len_k);
    list.range(std::max<index_t>((own - blocks.look_back) * blocks.block, 0), causal ? std::min(end, place.last + 1) : end);
  };
  const index_t together = causal ? door::causal_list(blocks.block) : blocks.block;
  const auto run = [&](const KeyLists& lists) { return door::sparse<Compiled>(q, kv, {&lists, 1}, out, options); };
  return door::with_position_lists(door::layout_of_lists(shape, options, together, 1), shape, options, 1, true, write, run);
}
template <class TK, class TV>
Status block_local_attention(const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, const Result& out,
                             const BlockLocal& blocks, const AttentionOptions& options = {}) {
  if (Status s = door::check_dense(q, k, v); !s.ok()) return s;
  return block_local_attention<door::FormatsOf<TK, TV>>(q, door::kv_of(k, v), out, blocks, options);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
