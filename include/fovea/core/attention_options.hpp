// SPDX-License-Identifier: Apache-2.0
// The options of fovea::attention: plain data with defaults. Spans and views are borrowed for the duration of the call.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "cpu_shape.hpp"
#include "executor.hpp"
#include "types.hpp"
#include "view.hpp"

namespace fovea {
inline namespace v0 {

// Order of operations, for query row i and key j of one sequence:
//   s = scale * dot(q_i, k_j);  s = softcap * tanh(s / softcap);  s -= slope[head] * |pos_i - j|;  s += bias[i, j];
//   masked s = -inf;  p = exp(s) / (sum exp(s) + exp(sink[head]));  out_i = sum_j p_j v_j.
// Position of query i of sequence b: pos = i + q_offset[b] if given, else i + len_k - len_q if causal is bottom_right, else i.
// Causal masks, the window and ALiBi all use it.
struct AttentionOptions {
  std::optional<float> scale = {};            // 1/sqrt(dim_qk) if absent; 0 and negative values are legal
  Causal causal = Causal::none;               // keys j <= pos
  Window window = {};                         // keys pos - left .. pos + right, inclusive; negative = unbounded
  float softcap = 0.f;                        // 0 = off

  std::span<const index_t> q_offset = {};     // [sequence]      position of a sequence's query 0; may be negative
  std::span<const index_t> len_k = {};        // [sequence]      keys in use, at most the stored length
  std::span<const index_t> cu_len_q = {};     // [sequence + 1]  ragged queries: q and out have batch 1, sequence b owns the
                                              //                 positions cu_len_q[b] .. cu_len_q[b + 1] - 1
  std::span<const index_t> cu_len_k = {};     // [sequence + 1]  ragged keys, in the same way; without it k and v have one
                                              //                 batch entry, table row or ring per sequence

  std::span<const float> alibi_slopes = {};   // [q_head]        positive slope = farther keys count less
  std::span<const float> sink = {};           // [q_head]        learned logit without a value, not scaled, counted in the LSE
  View<const float, 4> bias = {};             // [sequence | 1, q_head | 1, len_q | 1, len_k]  added after softcap; -inf masks
  View<const std::uint8_t, 4> keep = {};      // [sequence | 1, q_head | 1, len_q | 1, len_k]  0 = masked, else visible

  std::span<const std::uint64_t> tree = {};   // [batch * len_q]  draft trees: the last len_q keys of a sequence are its own
                                              //                 queries, and query i sees bit j of its word, not key j < i.
                                              //                 Sequences of more than 64 queries have no tree, their
                                              //                 words are 0; the mask fovea::tree takes larger trees

  View<float, 3> lse = {};                    // [batch, q_head, pos]  natural-log LSE output, optional; includes the sink

  Regime regime = Regime::automatic;
  Panels panels = Panels::f32;
  Executor executor = {};
  std::span<std::byte> workspace = {};        // at least workspace_bytes(plan); empty = a thread-local one of the library
  CpuShape cpu = {};
};

// The shape of a call, without its data.
struct AttentionShape {
  index_t batch = 1;   // of the views; a ragged call has batch 1
  index_t q_heads = 1, kv_heads = 1;
  index_t len_q = 0, len_k = 0;   // extents of the views along pos
  index_t dim_qk = 0, dim_v = 0;
};

}  // namespace v0
}  // namespace fovea
