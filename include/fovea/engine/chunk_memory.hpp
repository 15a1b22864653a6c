// SPDX-License-Identifier: Apache-2.0
// What a lane of the recurrent engine works in, and how states and rows get there and back.
#pragma once
#include <cstring>

#include "../simd/numbers.hpp"
#include "../simd/product.hpp"
#include "chunk_policies.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// Rows are [chunk, dim_k], transposed ones [dim_k, chunk], both padded to whole vectors; scores [writing, reading token].
struct ChunkMemory {
  float *q_rows, *k_rows, *a_rows, *b_rows, *k_out, *b_out, *scratch_rows;
  float *q_t, *k_t, *a_t, *b_t, *q_state, *a_state;
  float *qk, *kk, *weights, *lower, *weights_b, *lower_v, *decays;
  float* alpha;             // [chunk], or [chunk, dim_k]
  float* row_factor;        // [chunk, dim_k]  key decay: products from the middle of the chunk
  float *middle, *to_end;   // [dim_k]  key decay: products from its start to its middle, from there to its end
  float *prefix, *suffix, *read_prefix, *gain, *divisor;   // [chunk]
  float* total;                                            // [dim_k]  the decay of the whole chunk
  float* beta;                                             // [chunk], or [panel, chunk, kPanel]
  float *v, *w;                                            // [panel, chunk, kPanel]
  float* out;                                              // [chunk, kPanel]
  float* row;                                              // [widest input row]  before a feature map
  float* state;                                            // [state, panel, dim_k, kPanel]
  float* key_sum;                                          // [state, dim_k]
};

inline ChunkMemory carve_chunk(Bump& bump, const RecurrentRun& run, index_t chunk_rows, bool by_key, bool dplr) {
  const index_t dim = padded_dim_k(run.shape), panels = run.plan.tile_panels;
  const index_t rows = chunk_rows * dim, square = chunk_rows * chunk_rows, values = panels * chunk_rows * kPanel;
  const auto floats = [&](index_t count) { return bump.take<float>(count); };
  ChunkMemory m{};
  for (float** at : {&m.q_rows, &m.k_rows}) *at = floats(rows);
  for (float** at : {&m.q_t, &m.k_t}) *at = floats(rows);
  for (float** at : {&m.qk, &m.kk, &m.weights, &m.lower, &m.decays}) *at = floats(square);
  if (by_key) {
    for (float** at : {&m.k_out, &m.a_t, &m.q_state, &m.a_state, &m.row_factor, &m.scratch_rows}) *at = floats(rows);
  }
  if (dplr) {
    for (float** at : {&m.a_rows, &m.b_rows, &m.b_out, &m.b_t}) *at = floats(rows);
    for (float** at : {&m.weights_b, &m.lower_v}) *at = floats(square);
  }
  m.alpha = floats(by_key ? rows : chunk_rows);
  m.middle = floats(dim);
  m.to_end = floats(dim);
  for (float** at : {&m.prefix, &m.suffix, &m.read_prefix, &m.gain, &m.divisor}) *at = floats(chunk_rows);
  m.total = floats(dim);
  m.beta = floats(values);
  m.v = floats(values);
  m.w = floats(values);
  m.out = floats(chunk_rows * kPanel);
  m.row = floats(round_up(std::max({run.q.extent[3], run.k.extent[3], run.shape.dim_v}), kLanes));
  m.state = floats(run.plan.group * panels * dim * kPanel);
  m.key_sum = floats(run.plan.group * dim);
  return m;
}

// The rows that come next, asked for one by one between the products: in token-major tensors every row lies
// on a page of its own, which no hardware foresees. Without it, waiting for rows took 28 % of linear attention's time.
class RowsAhead {
 public:
  void clear() { count_ = at_ = 0; }
  template <class Tensor>
  void add(const Tensor& x, index_t batch, index_t head, index_t pos, index_t rows, index_t first, index_t numbers) {
    if (rows <= 0 || x.stride[3] != 1) return;
    const index_t size = row_bytes(x.format, 1);
    add(reinterpret_cast<const std::byte*>(row_at(x, batch, head, pos)) + first * size, x.stride[2] * size, rows,
        numbers * size);
  }
  void add(const std::byte* data, index_t stride, index_t rows, index_t bytes) {
    FOVEA_ASSERT(count_ < kMost);
    parts_[count_++] = {data, stride, rows, (bytes + kLine - 1) / kLine};
  }
  // The next row, whole: counting single lines cost 8 % of the time.
  FOVEA_INLINE void ask() {
    if (at_ == count_) return;
    Part& part = parts_[at_];
    for (index_t line = 0; line < part.lines; ++line) prefetch(part.data, line * kLine);
    part.data += part.stride;
    if (--part.rows == 0) ++at_;
  }
  index_t rows() const {
    index_t rows = 0;
    for (index_t part = 0; part < count_; ++part) rows += parts_[part].rows;
    return rows;
  }

 private:
  static constexpr index_t kLine = 64, kMost = 6;
  struct Part {
    const std::byte* data;
    index_t stride, rows, lines;
  };
  Part parts_[kMost];
  index_t count_ = 0, at_ = 0;
};

// Columns of a panel that exist.
FOVEA_INLINE index_t panel_columns(const RecurrentRun& run, index_t panel) {
  return std::min(kPanel, run.shape.dim_v - panel * kPanel);
}

// [dim_k, kPanel] of one panel, zeros beyond the dims.
inline void load_state_panel(const StateColumns<const float>& from, index_t dim_k, index_t columns, index_t padded,
                             float* to) {
  if (columns < kPanel || padded > dim_k) std::fill_n(to, padded * kPanel, 0.f);
  if (from.v_stride == 1) {
    for (index_t d = 0; d < dim_k; ++d)
      std::memcpy(to + d * kPanel, from.data + d * from.k_stride, static_cast<std::size_t>(columns) * sizeof(float));
    return;
  }
  if (from.k_stride == 1) {
    for (index_t n = 0; n < columns; n += kLanes) {
      for (index_t d = 0; d < dim_k; d += kLanes) {
        f32 cells[kLanes];
        for (index_t r = 0; r < kLanes; ++r)
          cells[r] = n + r < columns ? load_strided(from.data + (n + r) * from.v_stride + d, 1, dim_k - d) : f32(0.f);
        transpose(cells);
        for (index_t c = 0; c < kLanes && d + c < dim_k; ++c) store(to + (d + c) * kPanel + n, cells[c]);
      }
    }
    return;
  }
  for (index_t d = 0; d < dim_k; ++d) {
    for (index_t n = 0; n < columns; ++n) to[d * kPanel + n] = from.data[d * from.k_stride + n * from.v_stride];
  }
}

inline void store_state_panel(const float* from, const StateColumns<float>& to, index_t dim_k, index_t columns) {
  if (to.v_stride == 1) {
    for (index_t d = 0; d < dim_k; ++d)
      std::memcpy(to.data + d * to.k_stride, from + d * kPanel, static_cast<std::size_t>(columns) * sizeof(float));
    return;
  }
  if (to.k_stride == 1) {
    for (index_t n = 0; n < columns; n += kLanes) {
      for (index_t d = 0; d < dim_k; d += kLanes) {
        f32 cells[kLanes];
        for (index_t r = 0; r < kLanes; ++r) cells[r] = d + r < dim_k ? load(from + (d + r) * kPanel + n) : f32(0.f);
        transpose(cells);
        for (index_t c = 0; c < kLanes && n + c < columns; ++c) {
          float* const at = to.data + (n + c) * to.v_stride + d;
          if (dim_k - d >= kLanes) {
            store(at, cells[c]);
          } else {
            store_some(at, cells[c], dim_k - d);
          }
        }
      }
    }
    return;
  }
  for (index_t d = 0; d < dim_k; ++d) {
    for (index_t n = 0; n < columns; ++n) to.data[d * to.k_stride + n * to.v_stride] = from[d * kPanel + n];
  }
}

// What a task works on of one state: its panels [panel, dim_k, kPanel] and its key sum [dim_k], zeros where the call has
// none; either may be null.
inline void load_state(const RecurrentRun& run, const TaskPlace& place, index_t head, float* panels, float* key_sum) {
  const index_t dim = padded_dim_k(run.shape);
  for (index_t p = 0; panels != nullptr && p < place.panels; ++p, panels += dim * kPanel) {
    const index_t panel = place.first_panel + p;
    if (run.initial_state) {
      load_state_panel(state_columns(run.initial_state, run.layout, place.sequence, head, panel * kPanel), run.shape.dim_k,
                       panel_columns(run, panel), dim, panels);
    } else {
      std::fill_n(panels, dim * kPanel, 0.f);
    }
  }
  if (key_sum == nullptr) return;
  std::fill_n(key_sum, dim, 0.f);
  for (index_t d = 0; run.initial_key_sum && d < run.shape.dim_k; ++d)
    key_sum[d] = run.initial_key_sum(place.sequence, head, d);
}

// And back, where the call wants it. The key sum is that of the task with the first panel.
inline void store_state(const RecurrentRun& run, const TaskPlace& place, index_t head, const float* panels,
                        const float* key_sum) {
  const index_t dim = padded_dim_k(run.shape);
  for (index_t p = 0; panels != nullptr && run.final_state && p < place.panels; ++p, panels += dim * kPanel) {
    const index_t panel = place.first_panel + p;
    store_state_panel(panels, state_columns(run.final_state, run.layout, place.sequence, head, panel * kPanel),
                      run.shape.dim_k, panel_columns(run, panel));
  }
  if (key_sum == nullptr || !run.final_key_sum || place.first_panel != 0) return;
  for (index_t d = 0; d < run.shape.dim_k; ++d) run.final_key_sum(place.sequence, head, d) = key_sum[d];
}

// count numbers, then zeros up to `padded`, a multiple of kLanes.
FOVEA_INLINE void copy_padded(const float* from, index_t count, index_t padded, f32 scale, float* to) {
  index_t d = 0;
  for (; d + kLanes <= count; d += kLanes) store(to + d, load(from + d) * scale);
  if (d < count) {
    store(to + d, load_some(from + d, count - d) * scale);
    d += kLanes;
  }
  for (; d < padded; d += kLanes) store(to + d, f32(0.f));
}

FOVEA_INLINE bool in_place(Format format, index_t element_stride) { return format == Format::f32 && element_stride == 1; }

// Rows as they lie: the caller's own, or a copy.
struct RowsAt {
  const float* data;
  index_t stride;
};

// Token rows of one head, mapped where the mechanism has features, times `scale`; zeros in the padding.
inline void load_rows(const Operand& x, const RowMap& map, index_t batch, index_t head, index_t begin, index_t count,
                      index_t dim_k, index_t stride, index_t rows, float scale, float* row, float* to) {
  const f32 factor(scale);
  for (index_t i = 0; i < count; ++i, to += stride) {
    const std::byte* const from = row_at(x, batch, head, begin + i);
    if (map.apply == nullptr) {
      if (in_place(x.format, x.stride[3])) {
        copy_padded(reinterpret_cast<const float*>(from), dim_k, stride, factor, to);
        continue;
      }
      read_numbers(x.format, from, x.stride[3], dim_k, row);
      copy_padded(row, dim_k, stride, factor, to);
    } else {
      read_numbers(x.format, from, x.stride[3], x.extent[3], row);
      map.apply(map.map, head, begin + i + map.shift, row, to);
      copy_padded(to, dim_k, stride, factor, to);
    }
  }
  if (rows > count) std::fill_n(to, (rows - count) * stride, 0.f);
}

// Value rows of one head into panels.
inline void load_values(const RecurrentRun& run, const TaskPlace& place, index_t head, index_t begin, index_t count,
                        index_t chunk_rows, index_t rows, float* row, float* to) {
  const Operand& v = run.v;
  const index_t first = place.first_panel * kPanel, last = std::min(run.shape.dim_v, first + place.panels * kPanel);
  const bool direct = in_place(v.format, v.stride[3]);
  for (index_t i = 0; i < count; ++i) {
    const std::byte* const from =
        row_at(v, place.tokens.batch, head, begin + i) + first * v.stride[3] * row_bytes(v.format, 1);
    const float* numbers = reinterpret_cast<const float*>(from);
    if (!direct) {
      read_numbers(v.format, from, v.stride[3], last - first, row);
      numbers = row;
    }
    for (index_t p = 0; p < place.panels; ++p) {
      copy_padded(numbers + p * kPanel, panel_columns(run, place.first_panel + p), kPanel, f32(1.f),
                  to + (p * chunk_rows + i) * kPanel);
    }
  }
  for (index_t p = 0; p < place.panels; ++p)
    std::fill_n(to + (p * chunk_rows + count) * kPanel, (rows - count) * kPanel, 0.f);
}

// Part of an output row.
FOVEA_INLINE void store_values(const Result& out, const float* from, index_t count, std::byte* to) {
  if (!in_place(out.format, out.stride[3])) return write_numbers(out.format, from, count, to, out.stride[3]);
  float* const numbers = reinterpret_cast<float*>(to);
  index_t n = 0;
  for (; n + kLanes <= count; n += kLanes) store(numbers + n, load(from + n));
  if (n < count) store_some(numbers + n, load(from + n), count - n);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
