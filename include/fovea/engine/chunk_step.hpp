// SPDX-License-Identifier: Apache-2.0
// The same recurrences token by token: in place for decode, where a state is read and written once (V-first: one sweep over
// its rows; K-first: tiles of columns that stay in L1 between two sweeps), or in the workspace over a span of tokens. Both
// dots of a token are taken of the state before it:
//   p = S' r,  y = S' (alpha q),  w = beta (v - p),  o = y + (k . q) w,  S = Diag(alpha) S + k w'.
#pragma once
#include <cmath>
#include <cstdlib>

#include "../simd/math.hpp"
#include "chunk_memory.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

struct StepMemory {
  float *q, *k, *a, *b;            // [dim_k]  rows of the token
  float *alpha, *removal, *read;   // [dim_k]
  float *v, *p, *w, *out, *beta;   // [columns of the task]
  float* row;                      // before a feature map
  float* state;                    // [panel, dim_k, kPanel]  fused
  float* key_sum;                  // [dim_k]
};

inline StepMemory carve_step(Bump& bump, const RecurrentRun& run, bool in_place) {
  const index_t dim = padded_dim_k(run.shape), columns = run.plan.tile_panels * kPanel;
  StepMemory m{};
  for (float** at : {&m.q, &m.k, &m.a, &m.b, &m.alpha, &m.removal, &m.read, &m.key_sum}) *at = bump.take<float>(dim);
  for (float** at : {&m.v, &m.p, &m.w, &m.out, &m.beta}) *at = bump.take<float>(columns);
  m.row = bump.take<float>(round_up(std::max(run.q.extent[3], run.k.extent[3]), kLanes));
  m.state = in_place ? nullptr : bump.take<float>(columns * dim);
  return m;
}

// What a token does to a state, apart from its values.
struct StepRows {
  const float *alpha, *removal, *read, *k, *b;   // [dim_k], zeros in the padding (alpha: 1); removal and b may be null
  float k_dot_q, b_dot_q;
};

// p and y of `Vectors` vectors of columns: one sweep over the rows of a K-first tile.
// ahead: bytes from a row to what the next tile reads in its place. This sweep asks for half of it and the update for the
// other half, so that memory is never without a request for long.
template <int Vectors>
FOVEA_INLINE void step_dots(const float* state, index_t stride, index_t dim_k, const float* removal, const float* read,
                            float* p, float* y, index_t ahead) {
  f32 sum_p[Vectors], sum_y[Vectors];
  FOVEA_UNROLL
  for (int n = 0; n < Vectors; ++n) sum_p[n] = sum_y[n] = f32(0.f);
  for (index_t d = 0; d < dim_k; ++d, state += stride) {
    const f32 by_p(removal == nullptr ? 0.f : removal[d]), by_y(read[d]);
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) {
      if (n < Vectors / 2)
        prefetch_l2(reinterpret_cast<const std::byte*>(state + n * kLanes), ahead);   // L1 holds the tile in work
      const f32 s = load(state + n * kLanes);
      if (removal != nullptr) sum_p[n] = fma(s, by_p, sum_p[n]);
      sum_y[n] = fma(s, by_y, sum_y[n]);
    }
  }
  FOVEA_UNROLL
  for (int n = 0; n < Vectors; ++n) {
    if (removal != nullptr) store(p + n * kLanes, sum_p[n]);
    store(y + n * kLanes, sum_y[n]);
  }
}

// to = Diag(alpha) from + k w' + b p'.
template <int Vectors>
FOVEA_INLINE void step_update(const float* from, index_t from_stride, index_t dim_k, const StepRows& rows, const float* w,
                              const float* p, float* to, index_t to_stride, index_t ahead) {
  f32 written[Vectors], removed[Vectors];
  FOVEA_UNROLL
  for (int n = 0; n < Vectors; ++n) {
    written[n] = load(w + n * kLanes);
    removed[n] = rows.b == nullptr ? f32(0.f) : load(p + n * kLanes);
  }
  for (index_t d = 0; d < dim_k; ++d, from += from_stride, to += to_stride) {
    const f32 alpha(rows.alpha[d]), k(rows.k[d]);
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) {
      if (n >= Vectors / 2) prefetch_l2(reinterpret_cast<const std::byte*>(from + n * kLanes), ahead);
      f32 s = load(from + n * kLanes) * alpha;
      if (rows.b != nullptr) s = fma(removed[n], f32(rows.b[d]), s);
      store(to + n * kLanes, fma(written[n], k, s));
    }
  }
}

// Both at once, where what is written does not depend on what is read: y of the state before, and one sweep instead of two.
template <int Vectors>
FOVEA_INLINE void step_once(float* state, index_t stride, index_t dim_k, const StepRows& rows, const float* w, float* y,
                            index_t ahead) {
  f32 written[Vectors], sum[Vectors];
  FOVEA_UNROLL
  for (int n = 0; n < Vectors; ++n) {
    written[n] = load(w + n * kLanes);
    sum[n] = f32(0.f);
  }
  for (index_t d = 0; d < dim_k; ++d, state += stride) {
    const f32 alpha(rows.alpha[d]), k(rows.k[d]), read(rows.read[d]);
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) {
      prefetch(reinterpret_cast<const std::byte*>(state + n * kLanes), ahead);
      const f32 s = load(state + n * kLanes);
      sum[n] = fma(s, read, sum[n]);
      store(state + n * kLanes, fma(written[n], k, s * alpha));
    }
  }
  FOVEA_UNROLL
  for (int n = 0; n < Vectors; ++n) store(y + n * kLanes, sum[n]);
}

template <class Spec>
class StepTask {
  using DecayOf = typename Spec::DecayOf;
  using UpdateOf = typename Spec::UpdateOf;
  using ReadOf = typename Spec::ReadOf;
  using CloseOf = typename Spec::CloseOf;
  static constexpr bool kByKey = DecayOf::kind == Decayed::key;
  static constexpr bool kDelta = UpdateOf::kind == Written::delta;
  static constexpr bool kLowRank = UpdateOf::kind == Written::dplr;
  static constexpr bool kRemoves = kDelta || kLowRank;

 public:
  static StepMemory carve(Bump& bump, const RecurrentRun& run) {
    return carve_step(bump, run, run.plan.form == RecurrentForm::step);
  }

  StepTask(const RecurrentRun& run, const Spec& spec, const StepMemory& memory)
      : run_(run), spec_(spec), m_(memory), dim_(padded_dim_k(run.shape)), in_place_(run.plan.form == RecurrentForm::step) {}

  void operator()(index_t task) {
    place_ = task_place(run_, task);
    first_ = place_.first_panel * kPanel;
    columns_ = std::min(run_.shape.dim_v - first_, place_.panels * kPanel);
    float* const panels = in_place_ ? nullptr : m_.state;
    float* const key_sum = CloseOf::divides ? m_.key_sum : nullptr;
    const index_t group = group_size(run_, place_.group);
    for (index_t member = 0; member < group; ++member) {
      head_ = place_.group * run_.plan.group + member;   // as they lie: they share nothing but their neighbourhood
      followed_ = member + 1 < group;
      load_state(run_, place_, head_, panels, key_sum);
      if (in_place_) copy_in_place();
      for (index_t t = place_.tokens.begin; t < place_.tokens.end; ++t) token(t);
      store_state(run_, place_, head_, panels, key_sum);
    }
  }

 private:
  StateColumns<const float> initial() const {
    return state_columns(run_.initial_state, run_.layout, place_.sequence, head_, first_);
  }
  StateColumns<float> final() const { return state_columns(run_.final_state, run_.layout, place_.sequence, head_, first_); }

  // The final state as the initial one, unless it is that already.
  void copy_in_place() {
    const bool moves = !run_.initial_state || run_.initial_state.data != run_.final_state.data;
    if (!moves) return;
    const index_t dim_k = run_.shape.dim_k;
    const StateColumns<float> to = final();
    const StateColumns<const float> from = run_.initial_state ? initial() : StateColumns<const float>{};
    const bool v_first = run_.layout == StateLayout::v_first;
    const index_t outer = v_first ? columns_ : dim_k, inner = v_first ? dim_k : columns_;
    for (index_t i = 0; i < outer; ++i) {
      float* const row = to.data + i * (v_first ? to.v_stride : to.k_stride);
      const index_t step = v_first ? from.k_stride : from.v_stride;
      const float* const source = from.data + i * (v_first ? from.v_stride : from.k_stride);
      for (index_t n = 0; n < inner; ++n) row[n] = from.data == nullptr ? 0.f : source[n * step];
    }
  }

  void token(index_t t) {
    const RecurrentShape& shape = run_.shape;
    at_ = {place_.sequence, place_.tokens.batch, head_, t, 1};
    load_rows(run_.k, map_of(run_, run_.k_map, place_), at_.batch,
              shared_head(head_, shape.state_heads, shape.k_heads, run_.head_map), t, 1, shape.dim_k, dim_, 1, 1.f, m_.row, m_.k);
    prepare_alpha();
    StepRows rows{m_.alpha, nullptr, m_.read, m_.k, nullptr, 0.f, 0.f};
    if constexpr (UpdateOf::kind == Written::additive) {
      if constexpr (UpdateOf::kGain) {
        float gain = 0.f;
        spec_.update.gain(at_, &gain);
        for (index_t d = 0; d < dim_; d += kLanes) store(m_.k + d, load(m_.k + d) * f32(gain));
      }
    }
    if constexpr (kDelta) {
      for (index_t d = 0; d < dim_; d += kLanes) store(m_.removal + d, load(m_.k + d) * load(m_.alpha + d));
      rows.removal = m_.removal;
      if (spec_.update.beta_width() == 1) {
        float beta = 0.f;
        spec_.update.beta(at_, 0, 1, &beta, 1);
        std::fill_n(m_.beta, columns_, beta);
      } else {
        spec_.update.beta(at_, first_, columns_, m_.beta, 1);
      }
    }
    if constexpr (kLowRank) {
      std::fill_n(m_.a, dim_, 0.f);
      std::fill_n(m_.b, dim_, 0.f);
      spec_.update.rows(at_, m_.k, dim_, m_.a, m_.b);
      rows.removal = m_.a;
      rows.b = m_.b;
    }
    const std::byte* const v =
        row_at(run_.v, at_.batch, shared_head(head_, shape.state_heads, shape.v_heads, run_.head_map), t);
    read_numbers(run_.v.format, v + first_ * run_.v.stride[3] * row_bytes(run_.v.format, 1), run_.v.stride[3], columns_,
                 m_.v);
    std::fill(m_.v + columns_, m_.v + place_.panels * kPanel, 0.f);

    const index_t readers = shape.out_heads / shape.state_heads;
    for (index_t reader = 0; reader < readers; ++reader) {
      const index_t out = out_head(run_, head_, reader);
      prepare_read(shared_head(out, shape.out_heads, shape.q_heads, run_.head_map), rows);
      sweep(rows, reader + 1 == readers);
      write_out(out, rows, t);
    }
    if constexpr (CloseOf::divides) {
      for (index_t d = 0; d < dim_; d += kLanes)
        store(m_.key_sum + d, fma(load(m_.key_sum + d), load(m_.alpha + d), load(m_.k + d)));
    }
  }

  void prepare_alpha() {
    if constexpr (kByKey) {
      spec_.decay.alpha(at_, m_.alpha, dim_);
      std::fill(m_.alpha + run_.shape.dim_k, m_.alpha + dim_, 1.f);
    } else {
      m_.alpha[0] = 1.f;
      if constexpr (DecayOf::kind != Decayed::none) spec_.decay.alpha(at_, m_.alpha, 1);
      std::fill(m_.alpha + 1, m_.alpha + dim_, m_.alpha[0]);
    }
  }

  void prepare_read(index_t q_head, StepRows& rows) {
    load_rows(run_.q, map_of(run_, run_.q_map, place_), at_.batch, q_head, at_.begin, 1, run_.shape.dim_k, dim_, 1, run_.scale,
              m_.row, m_.q);
    f32 kq(0.f), bq(0.f);
    for (index_t d = 0; d < dim_; d += kLanes) {
      const f32 q = load(m_.q + d);
      store(m_.read + d, ReadOf::exclusive ? q : q * load(m_.alpha + d));
      kq = fma(q, load(m_.k + d), kq);
      if constexpr (kLowRank) bq = fma(q, load(m_.b + d), bq);
    }
    rows.k_dot_q = reduce_add(kq);
    rows.b_dot_q = kLowRank ? reduce_add(bq) : 0.f;
    if constexpr (ReadOf::exclusive) spec_.read.bonus(at_, m_.q, m_.k, dim_, &rows.k_dot_q);
  }

  // w and o of vectors [n, n + count) from p and y (which lie in m_.p and m_.out).
  FOVEA_INLINE void combine(const StepRows& rows, index_t n) const {
    f32 w = load(m_.v + n);
    if constexpr (kDelta) w = load(m_.beta + n) * (w - load(m_.p + n));
    f32 o = fma(w, f32(rows.k_dot_q), load(m_.out + n));
    if constexpr (kLowRank) o = fma(load(m_.p + n), f32(rows.b_dot_q), o);
    store(m_.w + n, w);
    store(m_.out + n, o);
  }

  void sweep(const StepRows& rows, bool last) {
    if (in_place_ && run_.layout == StateLayout::v_first) return sweep_rows(rows, last);
    if (in_place_) {
      const StateColumns<float> s = final();
      index_t n = 0;
      if constexpr (!kRemoves) {
        for (; n + 8 * kLanes <= columns_; n += 8 * kLanes) sweep_tile<8>(rows, s.data + n, s.k_stride, n, last);
      }
      for (; n + 4 * kLanes <= columns_; n += 4 * kLanes) sweep_tile<4>(rows, s.data + n, s.k_stride, n, last);
      for (; n + kLanes <= columns_; n += kLanes) sweep_tile<1>(rows, s.data + n, s.k_stride, n, last);
      if (n < columns_) sweep_tail(rows, s.data + n, s.k_stride, n, last);
      return;
    }
    for (index_t p = 0; p < place_.panels; ++p) {
      float* const s = m_.state + p * dim_ * kPanel;
      sweep_tile<kPanelVectors>(rows, s, kPanel, p * kPanel, last);
    }
  }

  template <int Vectors>
  FOVEA_INLINE void sweep_tile(const StepRows& rows, float* s, index_t stride, index_t n, bool last) {
    if (!kRemoves && last) {
      const index_t ahead = in_place_ ? bytes_ahead(stride) : 0;
      step_once<Vectors>(s, stride, run_.shape.dim_k, rows, m_.v + n, m_.out + n, ahead);
      FOVEA_UNROLL
      for (int i = 0; i < Vectors; ++i) combine(rows, n + i * kLanes);
      return;
    }
    const index_t ahead = next_tile<Vectors>(n);
    step_dots<Vectors>(s, stride, run_.shape.dim_k, kRemoves ? rows.removal : nullptr, rows.read, m_.p + n, m_.out + n,
                       ahead);
    FOVEA_UNROLL
    for (int i = 0; i < Vectors; ++i) combine(rows, n + i * kLanes);
    if (last) step_update<Vectors>(s, stride, run_.shape.dim_k, rows, m_.w + n, m_.p + n, s, stride, ahead);
  }

  // Bytes to the tile after this one: the columns to the right, or the first ones of the next head of the task. Never those of
  // another task: its lane is writing them, and two cores that fetch each other's lines were no faster than one.
  template <int Vectors>
  index_t next_tile(index_t n) const {
    if (!in_place_) return 0;
    const index_t step = Vectors * kLanes;
    const index_t to = n + 2 * step <= columns_ ? step : followed_ ? run_.final_state.stride[1] - n : 0;
    return to * static_cast<index_t>(sizeof(float));
  }

  // Fewer columns than lanes, in place.
  void sweep_tail(const StepRows& rows, float* s, index_t stride, index_t n, bool last) {
    const index_t count = columns_ - n;
    f32 p(0.f), y(0.f);
    for (index_t d = 0; d < run_.shape.dim_k; ++d) {
      const f32 cells = load_some(s + d * stride, count);
      if constexpr (kRemoves) p = fma(cells, f32(rows.removal[d]), p);
      y = fma(cells, f32(rows.read[d]), y);
    }
    store(m_.p + n, p);
    store(m_.out + n, y);
    combine(rows, n);
    const f32 w = load(m_.w + n);
    for (index_t d = 0; last && d < run_.shape.dim_k; ++d) {
      f32 cells = load_some(s + d * stride, count) * f32(rows.alpha[d]);
      if constexpr (kLowRank) cells = fma(p, f32(rows.b[d]), cells);
      store_some(s + d * stride, fma(w, f32(rows.k[d]), cells), count);
    }
  }

  // V-first: the dots of four rows at once, then those rows, still in L1.
  void sweep_rows(const StepRows& rows, bool last) {
    const StateColumns<float> s = final();
    const index_t dim_k = run_.shape.dim_k, whole = dim_k / kLanes * kLanes, tail = dim_k - whole;
    const index_t ahead = bytes_ahead(s.v_stride);
    // Rows that stand together are fetched in the order of memory, not one line of each (Zen 4, Gated DeltaNet: 115 instead of 274 us).
    const bool in_order = s.v_stride == dim_k && tail == 0 && columns_ % 4 == 0;
    const index_t step = in_order ? 4 : 1;
    for (index_t n = 0; n < columns_; n += 4) {
      const index_t live = std::min<index_t>(4, columns_ - n);
      const index_t between = in_order ? kLanes : live == 4 ? s.v_stride : 0;   // of the four lines that a step fetches
      float* at[4];
      f32 p[4], y[4];
      float written[4];
      FOVEA_UNROLL
      for (index_t r = 0; r < 4; ++r) {
        at[r] = s.data + (n + std::min(r, live - 1)) * s.v_stride;
        p[r] = y[r] = f32(0.f);
        written[r] = r < live ? m_.v[n + r] : 0.f;
      }
      if constexpr (!kRemoves) {
        if (last && live == 4 && tail == 0) {   // what is written is known before what is read: one sweep
          for (index_t d = 0; d < whole; d += kLanes) {
            const f32 read = load(rows.read + d), alpha = load(rows.alpha + d), k = load(rows.k + d);
            FOVEA_UNROLL
            for (index_t r = 0; r < 4; ++r) {
              prefetch(reinterpret_cast<const std::byte*>(at[0] + d * step + r * between), ahead);
              const f32 cells = load(at[r] + d);
              y[r] = fma(cells, read, y[r]);
              store(at[r] + d, fma(k, f32(written[r]), cells * alpha));
            }
          }
          float sum_y[4];
          reduce_add4(y[0], y[1], y[2], y[3], sum_y);
          for (index_t r = 0; r < 4; ++r) m_.out[n + r] = std::fma(written[r], rows.k_dot_q, sum_y[r]);
          continue;
        }
      }
      const auto dots = [&](index_t d, const auto& cells_at) {
        const f32 read = load(rows.read + d);
        f32 removal(0.f);
        if constexpr (kRemoves) removal = load(rows.removal + d);
        FOVEA_UNROLL
        for (index_t r = 0; r < 4; ++r) {
          prefetch(reinterpret_cast<const std::byte*>(at[0] + d * step + r * between), ahead);
          const f32 cells = cells_at(at[r] + d);
          if constexpr (kRemoves) p[r] = fma(cells, removal, p[r]);
          y[r] = fma(cells, read, y[r]);
        }
      };
      for (index_t d = 0; d < whole; d += kLanes) dots(d, [](const float* from) { return load(from); });
      if (tail > 0) dots(whole, [&](const float* from) { return load_some(from, tail); });
      float sum_p[4] = {}, sum_y[4], w[4];
      if constexpr (kRemoves) reduce_add4(p[0], p[1], p[2], p[3], sum_p);
      reduce_add4(y[0], y[1], y[2], y[3], sum_y);
      for (index_t r = 0; r < 4; ++r) {
        w[r] = written[r];
        if constexpr (kDelta) w[r] = m_.beta[std::min(n + r, columns_ - 1)] * (w[r] - sum_p[r]);
        if (r >= live) continue;
        float o = std::fma(w[r], rows.k_dot_q, sum_y[r]);
        if constexpr (kLowRank) o = std::fma(sum_p[r], rows.b_dot_q, o);
        m_.out[n + r] = o;
      }
      if (!last) continue;
      const auto update = [&](index_t d, const auto& cells_at, const auto& put) {
        const f32 alpha = load(rows.alpha + d), k = load(rows.k + d);
        f32 b(0.f);
        if constexpr (kLowRank) b = load(rows.b + d);
        for (index_t r = 0; r < live; ++r) {
          f32 cells = cells_at(at[r] + d) * alpha;
          if constexpr (kLowRank) cells = fma(b, f32(sum_p[r]), cells);
          put(at[r] + d, fma(k, f32(w[r]), cells));
        }
      };
      for (index_t d = 0; d < whole; d += kLanes) {
        update(
            d, [](const float* from) { return load(from); }, [](float* to, f32 cells) { store(to, cells); });
      }
      if (tail > 0) {
        update(
            whole, [&](const float* from) { return load_some(from, tail); },
            [&](float* to, f32 cells) { store_some(to, cells, tail); });
      }
    }
  }

  // To the rows that come after those in work: 8 of them and 4 KiB at least. Beyond the head they are those of the next.
  static index_t bytes_ahead(index_t stride) {
    const index_t row = std::max<index_t>(std::abs(stride) * static_cast<index_t>(sizeof(float)), 1);
    return std::max<index_t>(8, 4096 / row) * stride * static_cast<index_t>(sizeof(float));
  }

  void write_out(index_t out, const StepRows& rows, index_t t) {
    if constexpr (CloseOf::divides) {
      f32 sum(0.f);
      for (index_t d = 0; d < dim_; d += kLanes) sum = fma(load(m_.key_sum + d), load(m_.read + d), sum);
      const f32 inverse(1.f / spec_.close.divisor(at_, 0, reduce_add(sum) + rows.k_dot_q));
      for (index_t n = 0; n < place_.panels * kPanel; n += kLanes) store(m_.out + n, load(m_.out + n) * inverse);
    }
    if constexpr (CloseOf::skips) spec_.close.skip(at_, first_, columns_, m_.v, m_.out);
    std::byte* const to = row_at(run_.out, at_.batch, out, t) + first_ * run_.out.stride[3] * row_bytes(run_.out.format, 1);
    store_values(run_.out, m_.out, columns_, to);
  }

  const RecurrentRun& run_;
  const Spec& spec_;
  const StepMemory& m_;
  const index_t dim_;
  const bool in_place_;
  TaskPlace place_{};
  ChunkPlace at_{};
  index_t head_ = 0, first_ = 0, columns_ = 0;
  bool followed_ = false;   // the task has the next head too
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
