// SPDX-License-Identifier: Apache-2.0
// The chunkwise form with its products in blocks of bf16, in tile registers or vectors (simd/tiles.hpp): scores, reads of the
// state, pseudo-values inside the chunk and the update of the state. Sums are fp32, and so are the state, the gates and the
// triangular solve of every block of 32 tokens. Rounded to bf16 are q and k, or what factors per key channel make of them; a
// copy of the state for the chunk that reads it; the factors between tokens times the scores; and the pseudo-values.
//
// Gated DeltaNet of 128 x 128, one chunk of 64 of one head in AMX: 30 us at best where fp32 takes 75. The tile products alone are 6
// with operands in L1; rounding, the passes between products, the solve and waiting for L2 are the rest.
#pragma once
#include "../simd/tiles.hpp"
#include "chunk_engine.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// Tokens in a chunk; 0 = not in tiles. GFLOP/s in chunks of 32, 64 and 128 (AMX, heads of 128 x 128, both CPUs of the machine
// busy): Gated DeltaNet 140, 152 and 141; KDA 111, 111 and 106, and there half of a short chunk seldom decays too much for
// factored scores. Without AMX 32 are best for both: 60, 63 and 71 ms for Gated DeltaNet on Zen 4. A sum of keys is made of fp32
// scores, and no caller yet wants the twins of exclusive reads and low ranks.
template <class Spec>
constexpr index_t tile_chunk() {
  if (!kHasTileProducts || Spec::CloseOf::divides || Spec::ReadOf::exclusive || Spec::UpdateOf::kind == Written::dplr) return 0;
  return Spec::DecayOf::kind == Decayed::key || !kHasTiles ? 32 : 64;
}

#if FOVEA_HAS_TILE_PRODUCTS

struct TileMemory : ChunkMemory {
  bf16 *q16, *k16;                  // [chunk, dim_k]  rows as they are
  bf16 *q_start, *k_start;          // [chunk, dim_k]  key decay: times the factors from the start of the chunk
  bf16 *middle16, *end16;           //                 from its middle or their inverse, to its end; used at once
  bf16* k_pairs;                    // [dim_k / 2, chunk, 2]  right operand of the scores
  bf16* k_columns;                  // [dim_k, chunk]  left operand of the state's update
  bf16 *weights16, *lower16;        // [chunk, chunk]
  bf16* state16;                    // [dim_k / 2, kPanel, 2]
  bf16 *w16, *w_end16;              // [panel, chunk / 2, kPanel, 2]
  float *removed, *read, *inside;   // [kTileStep, kPanel]
};

inline TileMemory carve_tiles(Bump& bump, const RecurrentRun& run, index_t chunk_rows, bool by_key) {
  TileMemory m{};
  static_cast<ChunkMemory&>(m) = carve_chunk(bump, run, chunk_rows, by_key, false);
  const index_t dim = round_up(run.shape.dim_k, kTileStep), rows = chunk_rows * dim;
  const auto halves = [&](index_t count) { return bump.take<bf16>(count); };
  for (bf16** at : {&m.q16, &m.k16, &m.k_pairs, &m.k_columns}) *at = halves(rows);
  if (by_key) {
    for (bf16** at : {&m.q_start, &m.k_start, &m.middle16, &m.end16}) *at = halves(rows);
  }
  for (bf16** at : {&m.weights16, &m.lower16}) *at = halves(chunk_rows * chunk_rows);
  m.state16 = halves(dim * kPanel);
  for (bf16** at : {&m.w16, &m.w_end16}) *at = halves(run.plan.tile_panels * chunk_rows * kPanel);
  for (float** at : {&m.removed, &m.read, &m.inside}) *at = bump.take<float>(kTileStep * kPanel);
  return m;
}

template <class Spec>
class TileChunkTask : ChunkTask<Spec> {
  using Base = ChunkTask<Spec>;
  using Base::at_;
  using Base::dim_;
  using Base::factored_;
  using Base::group_;
  using Base::kByKey;
  using Base::kDecays;
  using Base::kDelta;
  using Base::place_;
  using Base::reads_;
  using Base::rows_;
  using Base::run_;
  using Base::spec_;
  using Base::stride_;
  using Base::values_;
  using Base::writes_;
  using CloseOf = typename Spec::CloseOf;

 public:
  static index_t chunk_rows(const RecurrentRun& run) { return round_up(run.plan.chunk, kTileStep); }
  static TileMemory carve(Bump& bump, const RecurrentRun& run) { return carve_tiles(bump, run, chunk_rows(run), kByKey); }

  TileChunkTask(const RecurrentRun& run, const Spec& spec, const TileMemory& memory)
      : Base(run, spec, memory, chunk_rows(run)), m_(memory), wide_(round_up(run.shape.dim_k, kTileStep)) {
    const index_t rows = stride_ * wide_;
    for (bf16* const at : {m_.q16, m_.k16, m_.q_start, m_.k_start, m_.middle16, m_.end16}) {
      if (at != nullptr) std::fill_n(at, rows, bf16{});   // what stands behind dim_k stays
    }
    std::fill_n(m_.state16, wide_ * kPanel, bf16{});
  }

  void operator()(index_t task) {
    const TileRegisters registers;
    Base::walk_task(task, [this](index_t begin, index_t count) { chunk(begin, count); });
  }

 private:
  void chunk(index_t begin, index_t count) {
    const RecurrentShape& shape = run_.shape;
    rows_ = round_up(count, kTileStep);
    have_q_ = have_k_ = -1;
    for (index_t member = 0; member < group_; ++member) {
      const index_t head = state_head(run_, place_.group, member);
      at_ = {place_.sequence, place_.tokens.batch, head, begin, count};
      load_keys(shared_head(head, shape.state_heads, shape.k_heads, run_.head_map));
      Base::loaded_k_ = have_k_;   // what plan_ahead need not fetch
      Base::plan_ahead(member);
      Base::prepare_gates();
      if constexpr (kByKey) {
        factored_ = Base::factor_rows();
        if (!factored_) {   // decays too strong for products with inverses
          Base::loaded_q_ = Base::loaded_k_ = -1;
          Base::chunk_of(member);
          continue;
        }
      }
      find_values(shared_head(head, shape.state_heads, shape.v_heads, run_.head_map));
      prepare_keys();
      const index_t readers = reads_ ? shape.out_heads / shape.state_heads : 0;
      for (index_t reader = 0; reader < readers; ++reader) {
        const index_t out = out_head(run_, head, reader);
        prepare_queries(shared_head(out, shape.out_heads, shape.q_heads, run_.head_map));
        for (index_t p = 0; p < place_.panels; ++p) {
          round_state(member, p, writes_ && reader + 1 == readers);
          if (reader == 0 && writes_) transform(p);
          output(out, p);
          if (reader + 1 == readers && writes_) advance(member, p);
        }
      }
      for (index_t p = 0; readers == 0 && p < place_.panels; ++p) {
        round_state(member, p, true);
        transform(p);
        advance(member, p);
      }
    }
  }

  // ---- operands

  void find_values(index_t head) {
    const Operand& v = run_.v;
    stored_values_ = nullptr;
    if (kDelta && !CloseOf::skips && v.format == Format::bf16 && v.stride[3] == 1 && at_.count == rows_ &&
        run_.shape.dim_v % kPanel == 0) {
      stored_values_ = row_at(v, at_.batch, head, at_.begin) + 2 * place_.first_panel * kPanel;
    } else {
      Base::find_values(head);
    }
  }

  // Rows of one head as bf16, zeros behind the last token. Always a copy: tile loads want rows close to each other, and the
  // caller's may lie a page apart.
  void load_rows16(const Operand& x, const RowMap& map, index_t head, float* copy, bf16* to) const {
    const index_t dim_k = run_.shape.dim_k;
    if (x.format == Format::bf16 && x.stride[3] == 1 && map.apply == nullptr) {
      for (index_t i = 0; i < at_.count; ++i)
        std::memcpy(to + i * wide_, row_at(x, at_.batch, head, at_.begin + i), 2 * static_cast<std::size_t>(dim_k));
    } else {
      load_rows(x, map_of(run_, map, place_), at_.batch, head, at_.begin, at_.count, dim_k, dim_, at_.count, 1.f, m_.row, copy);
      for (index_t i = 0; i < at_.count; ++i) {
        each_pair_vector([&](index_t d, auto whole) {
          const float* const from = copy + i * dim_ + d;
          store_pairs(to + i * wide_ + d, round_to_pairs(load(from), second_half<whole.value>(from)));
        });
      }
    }
    std::fill_n(to + at_.count * wide_, (rows_ - at_.count) * wide_, bf16{});
  }

  // f(d, whole) for the 32 numbers of every vector of pairs; where only the first 16 are of fp32 rows, whole is false.
  template <class F>
  FOVEA_INLINE void each_pair_vector(const F& f) const {
    index_t d = 0;
    for (; d + kTileStep <= dim_; d += kTileStep) f(d, std::true_type{});
    if (d < dim_) f(d, std::false_type{});
  }
  template <bool Whole>
  static FOVEA_INLINE f32 second_half(const float* from) {
    if constexpr (Whole) return load(from + kLanes);
    return f32(0.f);
  }

  void load_keys(index_t head) {
    if (have_k_ == head) return;
    have_k_ = head;
    have_q_ = -1;
    load_rows16(run_.k, run_.k_map, head, m_.k_rows, m_.k16);
    if constexpr (!kByKey) {
      turn_rows<true, true>(m_.k16, wide_, rows_, wide_, m_.k_pairs, m_.k_columns, stride_);
      if constexpr (kDelta) scores(m_.k16, m_.kk);
    }
  }

  void load_queries(index_t head) {
    if (have_q_ == head) return;
    have_q_ = head;
    load_rows16(run_.q, run_.q_map, head, m_.q_rows, m_.q16);
    if constexpr (!kByKey) {
      if (writes_) scores(m_.q16, m_.qk);
    }
  }

  // to[i, j] = read_i . key_j for the blocks up to the diagonal.
  void scores(const bf16* read, float* to) {
    for (index_t i = 0; i < rows_; i += kTileStep) {
      for (index_t j = 0; j <= i; j += kTileStep)
        tile_product<2, false>(read + i * wide_, wide_, m_.k_pairs + 2 * j, 2 * stride_, wide_, to + i * stride_ + j,
                               stride_);
    }
  }

  // Rows times the products from the middle of the chunk, and from its start. The former meet keys times their inverse.
  void scale_reads(const bf16* rows, bf16* from_start) const {
    for (index_t i = 0; i < rows_; ++i) {
      each_pair_vector([&](index_t d, auto whole) {
        const std::byte* const at = reinterpret_cast<const std::byte*>(rows + i * wide_ + d);
        const float* const factor = m_.row_factor + i * dim_ + d;
        const f32 low = load_bf16(at) * load(factor);
        const f32 high = load_bf16(at + 2 * kLanes) * second_half<whole.value>(factor);
        store_pairs(m_.middle16 + i * wide_ + d, round_to_pairs(low, high));
        store_pairs(from_start + i * wide_ + d,
                    round_to_pairs(low * load(m_.middle + d), high * second_half<whole.value>(m_.middle + d)));
      });
    }
  }
  void scale_writes() const {
    for (index_t i = 0; i < rows_; ++i) {
      each_pair_vector([&](index_t d, auto whole) {
        const std::byte* const at = reinterpret_cast<const std::byte*>(m_.k16 + i * wide_ + d);
        const float* const inverse = m_.scratch_rows + i * dim_ + d;
        const f32 low = load_bf16(at) * load(inverse);
        const f32 high = load_bf16(at + 2 * kLanes) * second_half<whole.value>(inverse);
        store_pairs(m_.middle16 + i * wide_ + d, round_to_pairs(low, high));
        store_pairs(m_.end16 + i * wide_ + d,
                    round_to_pairs(low * load(m_.to_end + d), high * second_half<whole.value>(m_.to_end + d)));
      });
    }
  }

  void prepare_keys() {
    if constexpr (kByKey) {
      scale_writes();
      turn_rows<true, false>(m_.middle16, wide_, rows_, wide_, m_.k_pairs, nullptr, stride_);
      turn_rows<false, true>(m_.end16, wide_, rows_, wide_, nullptr, m_.k_columns, stride_);
      if constexpr (kDelta) {
        scale_reads(m_.k16, m_.k_start);
        scores(m_.middle16, m_.kk);
      }
    }
    if constexpr (kDelta) {
      keep_factored<false>(m_.kk, 1.f, m_.lower16);
      turn_triangles();
    }
  }

  void prepare_queries(index_t head) {
    load_queries(head);
    if constexpr (kByKey) {
      scale_reads(m_.q16, m_.q_start);
      if (writes_) scores(m_.middle16, m_.qk);
    }
    if (writes_) keep_factored<true>(m_.qk, run_.scale, m_.weights16);
  }

  // from[i, j] * scale, times the factors between the tokens and the gain of j, for j < i, or j <= i; 0 above: rounded to
  // `to`, and without the diagonal also left in fp32 where the turned factors were, for the solve.
  template <bool WithDiagonal>
  void keep_factored(const float* from, float scale, bf16* to) const {
    constexpr bool kFactors = kDecays && !kByKey;
    const i32 numbers = lane_numbers();
    for (index_t i = 0; i < rows_; ++i) {
      const i32 bound(static_cast<std::int32_t>(WithDiagonal ? i + 1 : i));
      const index_t reach = i / kTileStep * kTileStep + kTileStep;
      for (index_t j = 0; j < reach; j += kTileStep) {
        f32 x[2];
        FOVEA_UNROLL
        for (index_t n = 0; n < 2; ++n) {
          const index_t at = j + n * kLanes;
          x[n] = load(from + i * stride_ + at) * f32(scale);
          // prepare_gates leaves the factors between tokens by rows where the fp32 products have their weights.
          if constexpr (kFactors) x[n] = x[n] * (at <= i ? load(m_.weights + i * stride_ + at) : f32(0.f));
          if constexpr (WithDiagonal && Base::has_gain()) x[n] = x[n] * load(m_.gain + at);
          x[n] = select(as_keep(numbers + i32(static_cast<std::int32_t>(at)) < bound), x[n], f32(0.f));
          if constexpr (!WithDiagonal) store(m_.decays + i * stride_ + at, x[n]);
        }
        store_pairs(to + i * stride_ + j, round_to_pairs(x[0], x[1]));
      }
    }
  }

  // lower[j, i] within blocks of 32 tokens.
  void turn_triangles() const {
    for (index_t block = 0; block < rows_; block += kTileStep) {
      const auto turn = [&](index_t i, index_t j) {
        transpose_rows(m_.decays + (block + i) * stride_ + block + j, stride_, kLanes, kLanes,
                       m_.lower + (block + j) * stride_ + block + i, stride_);
      };
      turn(0, 0);
      turn(kLanes, 0);
      turn(kLanes, kLanes);
    }
  }

  // The state as the right operand of the reads; and what of it outlives the chunk, where that is its last use.
  void round_state(index_t member, index_t p, bool decays) const {
    float* const s = Base::state(member, p);
    for (index_t d = 0; d < dim_; d += 2) {
      float* const rows = s + d * kPanel;
      round_panel(rows, 2, nullptr, m_.state16 + d * kPanel);
      if (!kDecays || !decays) continue;
      FOVEA_UNROLL
      for (index_t n = 0; n < 2 * kPanel; n += kLanes) store(rows + n, load(rows + n) * f32(m_.total[d + n / kPanel]));
    }
  }

  // ---- the products

  void product_block(const bf16* left, index_t left_stride, const bf16* right, index_t depth, float* to) {
    tile_product<2, false>(left, left_stride, right, 2 * kPanel, depth, to, kPanel);
    Base::worked(kTileStep, depth);
  }
  bf16* w16(index_t p) const { return m_.w16 + p * stride_ * kPanel; }
  bf16* w_end16(index_t p) const {
    return Base::scales_writes() ? m_.w_end16 + p * stride_ * kPanel : w16(p);
  }

  // The pseudo-values of a block of tokens after the other: rounded as they are, and times what of them the state takes.
  void transform(index_t p) {
    for (index_t i = 0; i < rows_; i += kTileStep) {
      const float* numbers = m_.w;
      if constexpr (kDelta) {
        product_block((kByKey ? m_.k_start : m_.k16) + i * wide_, wide_, m_.state16, wide_, m_.removed);
        subtract_values(i, p);
        if (i > 0) {
          tile_product<2, true>(m_.lower16 + i * stride_, stride_, w16(p), 2 * kPanel, i, m_.removed, kPanel);
          Base::worked(kTileStep, i);
        }
        solve(i, p);
      } else {
        numbers = Base::values(p) + i * kPanel;
      }
      round_panel(numbers, kTileStep, nullptr, w16(p) + i * kPanel);
      if (w_end16(p) != w16(p)) round_panel(numbers, kTileStep, m_.suffix + i, w_end16(p) + i * kPanel);
    }
  }

  // removed = P K S - V.
  void subtract_values(index_t first, index_t p) const {
    const float* const numbers = stored_values_ == nullptr ? Base::values(p) + first * values_.stride : nullptr;
    const std::byte* stored =
        stored_values_ == nullptr ? nullptr : stored_values_ + 2 * (first * run_.v.stride[2] + p * kPanel);
    float* to = m_.removed;
    for (index_t i = 0; i < kTileStep; ++i, to += kPanel) {
      f32 v[2];
      if (stored != nullptr) {
        v[0] = load_bf16(stored);
        v[1] = load_bf16(stored + 2 * kLanes);
        stored += 2 * run_.v.stride[2];
      } else {
        v[0] = load(numbers + i * values_.stride);
        v[1] = load(numbers + i * values_.stride + kLanes);
      }
      const f32 factor(kDecays && !kByKey ? m_.prefix[first + i] : 1.f);
      store(to, fma(load(to), factor, f32(0.f) - v[0]));
      store(to + kLanes, fma(load(to + kLanes), factor, f32(0.f) - v[1]));
    }
  }

  void solve(index_t first, index_t p) const {
    const bool wide = Base::wide_beta();
    const float* const beta = m_.beta + (wide ? (p * stride_ + first) * kPanel : first);
    const float* const lower = m_.lower + first * stride_ + first;
    float* const w = m_.w;
    for (index_t r = 0; r < kTileStep;) {
      const index_t at = r;
      r += with_tile_rows(kTileStep - at, [&](auto rows) {
        const ProductTerm term{lower + at, stride_, w, kPanel, at};
        const ProductBase from{m_.removed + at * kPanel, kPanel};
        solve_tile<rows.value, kPanelVectors>(&term, 1, from, lower + at * stride_ + at, stride_,
                                              beta + at * (wide ? kPanel : 1), wide ? kPanel : 0, w + at * kPanel, kPanel);
      });
    }
  }

  void output(index_t out, index_t p) {
    const index_t panel = place_.first_panel + p, columns = panel_columns(run_, panel);
    const index_t number = row_bytes(run_.out.format, 1), row_stride = run_.out.stride[2] * number;
    std::byte* to = row_at(run_.out, at_.batch, out, at_.begin) + panel * kPanel * run_.out.stride[3] * number;
    const bool halves = run_.out.format == Format::bf16 && run_.out.stride[3] == 1 && columns == kPanel && !CloseOf::skips;
    for (index_t first = 0; first < at_.count; first += kTileStep) {
      product_block((kByKey ? m_.q_start : m_.q16) + first * wide_, wide_, m_.state16, wide_, m_.read);
      if (writes_) product_block(m_.weights16 + first * stride_, stride_, w16(p), first + kTileStep, m_.inside);
      for (index_t i = first; i < std::min(at_.count, first + kTileStep); ++i, to += row_stride) {
        f32 o[2];
        FOVEA_UNROLL
        for (index_t n = 0; n < 2; ++n) {
          const index_t at = (i - first) * kPanel + n * kLanes;
          o[n] = load(m_.read + at) * f32(m_.read_prefix[i]);
          if (writes_) o[n] = o[n] + load(m_.inside + at);
        }
        if (halves) {
          store_pairs(to, round_to_pairs(o[0], o[1]));
          continue;
        }
        store(m_.out, o[0]);
        store(m_.out + kLanes, o[1]);
        if constexpr (CloseOf::skips) spec_.close.skip(at_, panel * kPanel, columns, Base::values(p) + i * values_.stride, m_.out);
        store_values(run_.out, m_.out, columns, to);
      }
    }
  }

  void advance(index_t member, index_t p) {
    float* const s = Base::state(member, p);
    for (index_t d = 0; d < dim_; d += kTileStep) {
      const bf16* const keys = m_.k_columns + d * stride_;
      if (dim_ - d >= kTileStep) {
        tile_product<2, true>(keys, stride_, w_end16(p), 2 * kPanel, rows_, s + d * kPanel, kPanel);
      } else {
        tile_product<1, true>(keys, stride_, w_end16(p), 2 * kPanel, rows_, s + d * kPanel, kPanel);
      }
      Base::worked(kTileStep, rows_);
    }
  }

  const TileMemory& m_;
  const index_t wide_;   // dim_k in whole tiles
  index_t have_q_ = -1, have_k_ = -1;
  const std::byte* stored_values_ = nullptr;
};
#endif

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
