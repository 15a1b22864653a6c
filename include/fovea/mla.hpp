// SPDX-License-Identifier: Apache-2.0
// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434; V3, Kimi K2) over a latent cache: one row [c | k_pe] a token
// for all heads, in any format and home of core/kv.hpp (latent_kv, latent_pages of core/mla.hpp, a container of cache/).
//
//   expanded   k_h = [W_UK_h c | k_pe] and v_h = W_UV_h c are made for every head, then attention with dims nope + rope and
//              value
//   absorbed   q_h . [W_UK_h c | k_pe] = [W_UK_h' q_nope_h | q_pe_h] . [c | k_pe]: attention over the cached rows
//              themselves, one kv head, V their first numbers; out_h = W_UV_h z_h
//
// Equal up to rounding. Expanded costs 3.4 times less per query and key (DeepSeek's dims) and 2 latent (nope + value) flops
// per key and head to expand; absorbed the same per query. Each sequence takes the cheaper form by its own lengths: some 128
// to 170 queries are the break-even. The plan prints it, an option forces it.
//
//   fovea::Status s = fovea::mla<Formats<Format::bf16>>(q, kv_b, cache.batch().kv, out,
//                                                       {.scale = scale, .causal = Causal::bottom_right, .len_k = lengths});
#pragma once
#include <string>
#include <vector>

#include "attention.hpp"
#include "core/mla.hpp"
#include "engine/deal.hpp"
#include "simd/project.hpp"

namespace fovea {
inline namespace v0 {

// The shape of a call, without its data.
struct MlaShape {
  MlaDims dims;
  index_t batch = 1;              // of q and out; a ragged call has batch 1
  index_t len_q = 0, len_k = 0;   // extents along pos; paged and mixed caches: len_k is the longest of options.len_k
  Format latents = Format::bf16;
};

inline namespace FOVEA_ARCH {

// What to do, as data: serves every layer of a step. Made by make_plan.
struct MlaPlan {
  struct Cost {
    MlaForm form;
    index_t k_begin, k_end;      // keys in reach of any query: what the expanded form makes
    double absorbed, expanded;   // flops
  };
  // Queries [q_first, q_first + q_count) of a sequence, the rows behind one another in the step's tensors.
  struct Piece {
    index_t sequence, q_first, q_count;
  };
  // One call of attention over the cached rows. Sequences without a piece have no queries in it.
  struct Absorbed {
    std::vector<Piece> pieces;
    std::vector<index_t> cu_len_q, q_offset;   // [sequence + 1], [sequence]
    std::vector<index_t> batch, pos;           // [token]  where its query lies in q and out
    bool whole = true;                         // false: a part of a sequence whose queries are more than kMlaQueries
    Plan plan;
    index_t tokens() const { return cu_len_q.back(); }
  };
  // One sequence, `heads` heads at a time; `last` is for fewer of them at the end.
  struct Expanded {
    index_t sequence, q_offset, heads;
    Plan plan, last;
  };

  MlaShape shape;
  MlaForm wanted = MlaForm::automatic;
  index_t value_dim = 0;   // V of the absorbed form: latent, or the whole row (latent_value_dim)
  float scale = 0;
  Reach reach{};
  Regime regime = Regime::automatic;
  Panels panels = Panels::f32;
  bool tree = false;
  int lanes = 1;
  std::vector<Sequence> sequences;
  std::vector<index_t> len_k;   // [sequence]
  std::vector<Cost> costs;      // [sequence]
  std::vector<Absorbed> absorbed;
  std::vector<Expanded> expanded;

  std::string describe() const;
};

// Validates, plans and runs.
// Shapes     q [batch, head, len_q, nope + rope], its last numbers rotated; kv_b [1, head, nope + value, latent], W_UK_h
//            above W_UV_h (a checkpoint's kv_b_proj [head * (nope + value), latent] as it lies); latents.dim_qk = latent +
//            rope, kv_heads 1; what latents says about V is not used; out [batch, head, len_q, value].
// Types      q and out f32, bf16, f16 or f64; kv_b f32, bf16 or f16 with innermost stride 1; latents any format but
//            i8_channel. Projections are fp32 sums; Panels::bf16 concerns the attention within and rounds expanded keys and
//            values too.
// Options    as for attention, all of them; scale is (nope + rope)^-0.5 if absent (mla_scale has YaRN's mscale).
// Memory     absorbed: a query and an output row of latent dims per query and head, 64 MiB of them or 256 queries of one sequence
//            at a time, whichever is more; expanded: the keys and values of as many heads as fit 64 MiB, of at least one head.
// Allocates  the plan; with a plan and options.workspace nothing. Errors, masks, equal bits as for attention: an output row
//            depends on its own sequence alone, in one form.
template <class Compiled = AllFormats>
Status mla(const Operand& q, const Operand& kv_b, const Kv& latents, const Result& out, const AttentionOptions& options = {},
           MlaForm form = MlaForm::automatic);

// Fills `plan` for every call of this shape and these options. Pure.
Status make_plan(MlaPlan& plan, const MlaShape& shape, const AttentionOptions& options, MlaForm form = MlaForm::automatic);

std::size_t workspace_bytes(const MlaPlan& plan, int lanes = 1);

// Runs a plan made from the same shape and options.
template <class Compiled = AllFormats>
Status mla(const MlaPlan& plan, const Operand& q, const Operand& kv_b, const Kv& latents, const Result& out,
           const AttentionOptions& options);

// The call as an object: what a layer is given that shall not know which attention it has (modules/mla_block.hpp).
template <class Compiled = AllFormats>
struct MlaAttention {
  MlaForm form = MlaForm::automatic;
  const MlaPlan* plan = nullptr;   // optional
  Status operator()(const Operand& q, const Operand& kv_b, const Kv& latents, const Result& out,
                    const AttentionOptions& options) const {
    return plan == nullptr ? mla<Compiled>(q, kv_b, latents, out, options, form)
                           : mla<Compiled>(*plan, q, kv_b, latents, out, options);
  }
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea

#include "mla-inl.hpp"
