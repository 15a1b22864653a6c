// SPDX-License-Identifier: Apache-2.0
// FRONT DOOR 1: exact softmax attention on the CPU. MHA, MQA, GQA and cross-attention; causal, windowed, ragged, biased,
// with sinks and draft trees; prefill and decode; K and V in any storage format, contiguous, paged, in rings. Options and the
// order of operations: core/attention_options.hpp. Views: core/view.hpp. Storage: core/formats.hpp and core/kv.hpp.
//
//   fovea::Status status = fovea::attention(q, k, v, out, {.causal = fovea::Causal::bottom_right});
//   fovea::Status status = fovea::attention(q, cache.kv(), out, {.len_k = cache.lengths()});
//
// Shapes     q [batch, q_head, len_q, dim_qk], k [batch, kv_head, len_k, dim_qk], v [batch, kv_head, len_k, dim_v],
//            out [batch, q_head, len_q, dim_v]; query head h reads kv head h / (q_heads / kv_heads). Dims 1 to 576.
// Types      q, k, v and out each f32, bf16, f16 or f64 (an Operand or Result is made from a Tensor of any of them); a Kv also
//            int8, int4 and fp8. Arithmetic is fp32 whatever the storage, so f64 gets fp32 accuracy; see Panels for bf16.
// Strides    any, in elements; k and v need an innermost stride of 1, anything else is refused with the reason.
// Aliasing   out and lse overlap no input, no other output and not themselves; ranges of bytes are compared, so an output that
//            interleaves with an input is refused too. Inputs may overlap each other.
// Masked     keys leave no trace: NaN or Inf in their K or V does not reach an output; in a visible key or a query it does.
// Empty row  output 0, LSE -inf (with a sink: LSE = sink).
// Errors     a Status with the offending numbers; on error nothing has been written.
// Allocates  nothing on a warm call with the library's thread-local workspace, nothing at all with a plan and a workspace.
// Same bits  for any number of lanes, executor, batch around a row, for paged and ring caches as for contiguous ones, and any
//            chunking of the queries in one forced regime (docs/numerics.md). Reentrant; concurrent calls share nothing.
#pragma once
#include <span>

#include "call/variant.hpp"
#include "core/attention_options.hpp"
#include "core/kv.hpp"
#include "core/status.hpp"
#include "engine/plan.hpp"
#include "mechanisms/softmax.hpp"

namespace fovea {
inline namespace v0 {

// A row whose weights are wanted: query q_index of sequence `sequence` (the batch entry, or the member of a ragged batch).
struct WeightRow {
  index_t sequence, q_head, q_index;
};

inline namespace FOVEA_ARCH {

// Validates, plans and runs.
template <class TK, class TV>
Status attention(const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, const Result& out,
                 const AttentionOptions& options = {});

// The same from a Kv. Kernels are compiled for the formats listed, by default all of them, which costs some 15 s of compile time:
// a program that stores bf16 and int8 says attention<Formats<Format::bf16, Format::i8_token>>(q, kv, out).
template <class Compiled = AllFormats>
Status attention(const Operand& q, const Kv& kv, const Result& out, const AttentionOptions& options = {});

// Why a problem would be refused, or ok; only make_plan counts its tasks, of which a call may have 2^24. Pure; reads no tensor data,
// only the tables of lengths and slopes.
Status supports(const AttentionShape& shape, const AttentionOptions& options = {});

// Fills `plan` for every call of this shape and these options; a plan holds no data pointers, so one serves all layers of a
// step, whatever their storage. Pure; a reused plan keeps its memory. plan.describe() prints regime, tiles, splits and
// instruction set. For paged and mixed caches shape.len_k is the longest of options.len_k.
Status make_plan(Plan& plan, const AttentionShape& shape, const AttentionOptions& options = {});

// Bytes of workspace a run of `plan` with `lanes` lanes needs: O(lanes * tile), plus one partial row per split of a decode.
std::size_t workspace_bytes(const Plan& plan, int lanes = 1);

// Runs a plan made from the same shape and options.
template <class TK, class TV>
Status attention(const Plan& plan, const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, const Result& out,
                 const AttentionOptions& options = {});
template <class Compiled = AllFormats>
Status attention(const Plan& plan, const Operand& q, const Kv& kv, const Result& out, const AttentionOptions& options = {});

// For engines that already stand inside a parallel region: prepare once (options.workspace is required, options.executor
// says how many lanes), then each thread calls run_lane once with its own lane: one prepare per run. Plan, tensors, tables
// and workspace must outlive the run.
template <class TK, class TV>
Status prepare(AttentionRun& run, const Plan& plan, const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v,
               const Result& out, const AttentionOptions& options);
template <class Compiled = AllFormats>
Status prepare(AttentionRun& run, const Plan& plan, const Operand& q, const Kv& kv, const Result& out,
               const AttentionOptions& options);
void run_lane(AttentionRun& run, int lane);

// The same calls for a variant (call/variant.hpp): scores, masks, normalisers and closings of your own, or of mechanisms/. A plan
// made for one variant serves others with the same needs; a prepared run refers to the variant.
template <AnyVariant V>
Status supports(const AttentionShape& shape, const AttentionOptions& options, const V& variant);
template <AnyVariant V>
Status make_plan(Plan& plan, const AttentionShape& shape, const AttentionOptions& options, const V& variant);
template <class TK, class TV, AnyVariant V>
Status attention(const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, const Result& out,
                 const AttentionOptions& options, const V& variant);
template <class Compiled = AllFormats, AnyVariant V>
Status attention(const Operand& q, const Kv& kv, const Result& out, const AttentionOptions& options, const V& variant);
template <class TK, class TV, AnyVariant V>
Status attention(const Plan& plan, const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v, const Result& out,
                 const AttentionOptions& options, const V& variant);
template <class Compiled = AllFormats, AnyVariant V>
Status attention(const Plan& plan, const Operand& q, const Kv& kv, const Result& out, const AttentionOptions& options,
                 const V& variant);
template <class TK, class TV, AnyVariant V>
Status prepare(AttentionRun& run, const Plan& plan, const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v,
               const Result& out, const AttentionOptions& options, const V& variant);
template <class Compiled = AllFormats, AnyVariant V>
Status prepare(AttentionRun& run, const Plan& plan, const Operand& q, const Kv& kv, const Result& out,
               const AttentionOptions& options, const V& variant);
template <class TK, class TV, AnyVariant V>   // a temporary would be gone when the lanes run
Status prepare(AttentionRun& run, const Plan& plan, const Operand& q, const View<TK, 4>& k, const View<TV, 4>& v,
               const Result& out, const AttentionOptions& options, const V&& variant) = delete;
template <class Compiled = AllFormats, AnyVariant V>
Status prepare(AttentionRun& run, const Plan& plan, const Operand& q, const Kv& kv, const Result& out,
               const AttentionOptions& options, const V&& variant) = delete;

// out_a, lse_a become the attention over the union of the key sets of a and b. Both are normalised fp32 results with
// natural-log LSE; a row with LSE -inf is empty, whatever its out holds. A sink belongs to exactly one of the partials.
Status merge(Tensor<float> out_a, View<float, 3> lse_a, Tensor<const float> out_b, View<const float, 3> lse_b);

// weights[n, j] = the softmax weight of key j for rows[n], recomputed from the LSE of a call with the same options; 0 for
// masked keys and beyond the sequence's keys. No len_q x len_k array is made. With a sink the weights add up to less than 1.
template <class TK>
Status attention_weights(const Operand& q, const View<TK, 4>& k, View<const float, 3> lse, std::span<const WeightRow> rows,
                         View<float, 2> weights, const AttentionOptions& options = {});

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea

#include "attention-inl.hpp"
