// SPDX-License-Identifier: Apache-2.0
// BigBird's block attention (Zaheer et al. 2020, arXiv 2007.14062; its ITC form), bidirectional. Of the n blocks of a
// sequence
//   query block   sees the blocks
//   0, n - 1      all
//   1             0, 1, 2, n - 1                      and r random ones
//   n - 2         0, n - 3, n - 2, n - 1              and r random ones
//   others i      0, i - 1, i, i + 1, n - 1           and r random ones
// The random blocks are an input: published checkpoints were trained with those that one generator drew, whose rules depend
// on the length and may draw a block of the window, which then counts twice in the softmax. So it does here.
#pragma once
#include "../call/pattern_call.hpp"
#include "../call/sparse_call.hpp"

namespace fovea {
inline namespace v0 {

struct BigBird {
  index_t block = 64;
  View<const std::int32_t, 3> random_blocks = {};   // [q_head | 1, blocks - 2, r]  row i - 1: query block i; negative: none
  View<const std::uint8_t, 2> valid = {};   // [batch, pos]  0 = padding: never a key, its rows are 0. Null: no padding
};

inline namespace FOVEA_ARCH {
namespace bigbird {

inline Status check_random(const BigBird& p, const AttentionShape& shape, index_t blocks, const Result& out,
                           const AttentionOptions& options) {
  const View<const std::int32_t, 3>& random = p.random_blocks;
  if (!random) return {};
  if ((random.extent[0] != 1 && random.extent[0] != shape.q_heads) || random.extent[1] != blocks - 2 || random.extent[2] < 0)
    return door::invalid("fovea: random_blocks is [%td, %td, %td], must be [%td | 1, %td, r]", random.extent[0],
                         random.extent[1], random.extent[2], shape.q_heads, blocks - 2);
  door::Bytes bytes;
  if (Status s = door::check_data("random_blocks", random, bytes); !s.ok()) return s;
  if (Status s = door::check_learned("random_blocks", bytes, out, options); !s.ok()) return s;
  for (index_t h = 0; h < random.extent[0]; ++h) {
    for (index_t i = 0; i < random.extent[1]; ++i) {
      for (index_t r = 0; r < random.extent[2]; ++r) {
        if (random(h, i, r) >= blocks)
          return door::invalid("fovea: random_blocks[%td, %td, %td] is %d, there are %td blocks", h, i, r,
                               static_cast<int>(random(h, i, r)), blocks);
      }
    }
  }
  return {};
}

inline Status check(const BigBird& p, const AttentionShape& shape, const Result& out, const AttentionOptions& o) {
  if (o.causal != Causal::none || o.window.left >= 0 || o.window.right >= 0 || !o.q_offset.empty() || !o.len_k.empty() ||
      !o.cu_len_q.empty() || !o.cu_len_k.empty() || o.keep || !o.tree.empty())
    return door::unsupported(
        "fovea: BigBird is bidirectional over whole sequences: causal, window, q_offset, len_k, cu_len_q, cu_len_k, keep "
        "and "
        "tree of the options are not its; padding goes into valid");
  if (shape.len_q != shape.len_k)
    return door::invalid("fovea: q has %td positions, k has %td: self-attention needs as many", shape.len_q, shape.len_k);
  if (p.block < 1 || shape.len_q % p.block != 0 || shape.len_q / p.block < 4)
    return door::invalid("fovea: %td positions in blocks of %td: must be at least 4 whole blocks; pad, or attend densely",
                         shape.len_q, p.block);
  if (p.valid) {
    if (p.valid.extent != std::array<index_t, 2>{shape.batch, shape.len_q})
      return door::invalid("fovea: valid is [%td, %td], must be [%td, %td]", p.valid.extent[0], p.valid.extent[1],
                           shape.batch, shape.len_q);
    door::Bytes bytes;
    if (Status s = door::check_data("valid", p.valid, bytes); !s.ok()) return s;
    if (Status s = door::check_learned("valid", bytes, out, o); !s.ok()) return s;
  }
  return check_random(p, shape, shape.len_q / p.block, out, o);
}

}   // namespace bigbird

// Scale, softcap, ALiBi, bias, sink, LSE and executor as in fovea::attention.
template <class Compiled = AllFormats>
Status bigbird_attention(const Operand& q, const Kv& kv, const Result& out_any, const BigBird& pattern,
                         const AttentionOptions& options_any = {}) {
  BigBird p = pattern;
  p.random_blocks = tidy(p.random_blocks);
  p.valid = tidy(p.valid);
  AttentionOptions options = options_any;
  options.lse = tidy(options.lse);
  const Result out = door::tidy_operand(out_any);
  const AttentionShape shape = door::shape_of(q, kv, options);
  if (Status s = door::check_call(door::tidy_operand(q), door::tidy_kv(kv), out, options); !s.ok()) return s;
  if (Status s = door::check_problem(shape, options); !s.ok()) return s;
  if (Status s = bigbird::check(p, shape, out, options); !s.ok()) return s;
  const index_t blocks = shape.len_q / p.block, drawn = p.random_blocks ? p.random_blocks.extent[2] : 0;
  if (p.valid) options.keep = {p.valid.data, {shape.batch, 1, 1, shape.len_q}, {p.valid.stride[0], 0, 0, p.valid.stride[1]}};
  const auto write = [&](const door::ListPlace& place, door::ListWriter& list) {
    const index_t i = place.first / p.block;
    if (i == 0 || i == blocks - 1) {
      for (index_t n = 0; n < blocks; ++n) list.entry(n);
      return;
    }
    list.entry(0);
    for (index_t n = std::max<index_t>(i - 1, 1); n <= std::min(i + 1, blocks - 2); ++n) list.entry(n);
    list.entry(blocks - 1);
    for (index_t r = 0; r < drawn; ++r) list.entry(p.random_blocks(place.head, i - 1, r));
  };
  const index_t heads = drawn > 0 ? p.random_blocks.extent[0] : 1;
  const door::ListLayout layout{1, heads, blocks, p.block};
  const auto run = [&](const KeyLists& lists) { return door::sparse<Compiled>(q, kv, {&lists, 1}, out, options); };
  if (Status s = door::with_position_lists(layout, shape, options, p.block, false, write, run); !s.ok()) return s;
  if (p.valid) door::clear_padding(out, options.lse, [&](index_t b, index_t i) { return p.valid(b, i) == 0; });
  return {};
}
template <class TK, class TV>
Status bigbird_attention(const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, const Result& out,
                         const BigBird& pattern, const AttentionOptions& options = {}) {
  if (Status s = door::check_dense(q, k, v); !s.ok()) return s;
  return bigbird_attention<door::FormatsOf<TK, TV>>(q, door::kv_of(k, v), out, pattern, options);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
