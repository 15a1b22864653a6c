// SPDX-License-Identifier: Apache-2.0
// C = A B' or C = A B for the small projections around attention: rows of A of any origin against a stored matrix of
// weights, fp32 sums. Every element of C is one chain of FMAs in the order of the summed index, so its bits depend on its
// row of A and on B alone, never on how many rows share the call.
//
// B is packed one panel at a time (two vectors of columns, at most 16 KiB of fp32) and stays in L1 while all rows of A in
// the task pass by; those are copied once per kProjectDepth numbers and stay in L2. One call is a list of independent tasks
// (blocks of C): whoever owns threads deals them out.
//
// Share of the FMA peak with AVX-512, weights in L2, k and n of 128 to 512: 8 to 11 % with 1 row (8 to 16 GB/s of bf16
// weights, packing bound), 50 to 63 % with 12, 62 to 74 % with 24, 70 to 81 % with 48, 77 to 86 % with 128. Weights stored
// by output are transposed on the way and are the slower ones.
#pragma once
#include <algorithm>
#include <cstring>

#include "../core/formats.hpp"
#include "../core/kv.hpp"
#include "../core/status.hpp"
#include "../core/workspace.hpp"
#include "convert.hpp"
#include "gemm.hpp"
#include "numbers.hpp"
#include "pack.hpp"
#include "quantise.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

inline constexpr index_t kProjectDepth = 128;     // numbers of the summed index at a time; 256 ran 5 to 20 % slower: L1
inline constexpr index_t kProjectColumns = 256;   // columns of C in one task
inline constexpr index_t kProjectRows = 384;      // rows of C in one task
static_assert(kProjectDepth <= kMaxKeyTile && kProjectColumns % kPanel == 0 && kProjectRows % kTileRows == 0);

// Weights where they lie: f32, bf16 or f16, the numbers of a row next to each other, rows `stride` numbers apart. As stored
// [n, k] the call is A B', as stored [k, n] A B.
struct StoredMatrix {
  const std::byte* data = nullptr;
  Format format = Format::f32;
  index_t rows = 0, columns = 0, stride = 0;
};
enum class Weights : std::uint8_t { by_output, by_input };   // [n, k], [k, n]

constexpr bool is_weight_format(Format format) {
  return format == Format::f32 || format == Format::bf16 || format == Format::f16;
}

// Matrix `head` of a tensor [1, head, row, column].
FOVEA_INLINE StoredMatrix matrix_of(const Operand& tensor, index_t head = 0) {
  return {tensor.data + head * tensor.stride[1] * row_bytes(tensor.format, 1), tensor.format, tensor.extent[2],
          tensor.extent[3], tensor.stride[2]};
}
FOVEA_INLINE StoredMatrix rows_of(const StoredMatrix& matrix, index_t first, index_t count) {
  return {matrix.data + first * matrix.stride * row_bytes(matrix.format, 1), matrix.format, count, matrix.columns,
          matrix.stride};
}

namespace project {

template <index_t Bytes, f32 (*Load)(const std::byte*), f32 (*LoadSome)(const std::byte*, index_t)>
struct PlainCodec {
  static constexpr bool kRowScaled = false;
  FOVEA_INLINE static constexpr index_t offset(index_t d) { return Bytes * d; }
  FOVEA_INLINE f32 load(const std::byte* row, index_t d, index_t) const { return Load(row + offset(d)); }
  FOVEA_INLINE f32 load_some(const std::byte* row, index_t d, index_t count, index_t) const {
    return LoadSome(row + offset(d), count);
  }
  FOVEA_INLINE float scale(const std::byte*, index_t) const { return 1.f; }
};

using Bf16Row = PlainCodec<2, load_bf16, load_bf16_some>;
using F16Row = PlainCodec<2, load_f16, load_f16_some>;
using F32Row = PlainCodec<4, load_f32, load_f32_some>;
using F64Row = PlainCodec<8, load_f64, load_f64_some>;

template <class Codec>
void read_row(const Codec& codec, const std::byte* from, index_t count, float* to) {
  for (index_t d = 0; d < count; d += kLanes) {
    if (count - d >= kLanes) {
      store(to + d, codec.load(from, d, count));
    } else {
      store_some(to + d, codec.load_some(from, d, count - d, count), count - d);
    }
  }
}

}   // namespace project

// `count` numbers of a format, neighbours, as floats.
inline void read_row(Format format, const std::byte* from, index_t count, float* to) {
  switch (format) {
    case Format::bf16:
      return project::read_row(project::Bf16Row{}, from, count, to);
    case Format::f16:
      return project::read_row(project::F16Row{}, from, count, to);
    case Format::f64:
      return project::read_row(project::F64Row{}, from, count, to);
    default:
      std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
  }
}

// A row of a strided tensor; strides count numbers.
inline void read_strided(Format format, const std::byte* from, index_t stride, index_t count, float* to) {
  if (stride == 1) return read_row(format, from, count, to);
  read_numbers(format, from, stride, count, to);
}
inline void write_strided(Format format, const float* from, index_t count, std::byte* to, index_t stride) {
  if (stride != 1) return write_numbers(format, from, count, to, stride);
  if (format == Format::f32) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  quantise_row(format, from, 1, count, nullptr, to);
}

struct ProjectMemory {
  float* a;       // [rows, kScoreStride]
  float* panel;   // [depth, kPanel]
  float* c;       // [rows, columns of a task]
};

// One lane's memory for calls of up to `rows` rows; the same code counts its bytes.
inline ProjectMemory carve_project(Bump& bump, index_t rows) {
  const index_t held = (std::min(rows, kProjectRows) + kTileRows - 1) / kTileRows * kTileRows;
  return {bump.take<float>(held * kScoreStride), bump.take<float>(kProjectDepth * kPanel),
          bump.take<float>(held * kProjectColumns)};
}

inline index_t project_tasks(index_t rows, index_t columns) {
  return (rows + kProjectRows - 1) / kProjectRows * ((columns + kProjectColumns - 1) / kProjectColumns);
}

namespace project {

// Numbers [k, k + depth) of the columns [n, n + count) of C, count <= kPanel; zeros behind them.
template <class Codec>
void pack_panel(const Codec& codec, const StoredMatrix& b, Weights order, index_t k, index_t depth, index_t n, index_t count,
                float* to) {
  const index_t bytes = Codec::offset(1), stride = b.stride * bytes;
  if (order == Weights::by_output) {
    pack_keys(codec, Segment{b.data + n * stride + k * bytes, stride, count, -1}, depth, 0, to);
    clear_columns(to, depth, count, kPanel);
  } else {
    // A weight that is not finite belongs into every sum, so nobody asks.
    static_cast<void>(pack_values(codec, Segment{b.data + k * stride + n * bytes, stride, depth, -1}, count, to, 0));
  }
}

FOVEA_NOINLINE inline void pack(const StoredMatrix& b, Weights order, index_t k, index_t depth, index_t n, index_t count,
                                float* to) {
  switch (b.format) {
    case Format::bf16:
      return pack_panel(Bf16Row{}, b, order, k, depth, n, count, to);
    case Format::f16:
      return pack_panel(F16Row{}, b, order, k, depth, n, count, to);
    default:
      return pack_panel(F32Row{}, b, order, k, depth, n, count, to);
  }
}

// c[r, n] += sum_d a[r, d] panel[d, n] for all rows; a and c are padded to whole tiles of rows.
inline void multiply(const float* a, index_t rows, index_t depth, index_t columns, const float* panel, float* c,
                     index_t stride) {
  float unchanged[kTileRows];
  std::fill_n(unchanged, kTileRows, 1.f);
  for (index_t row = 0; row < rows; row += kTileRows, a += kTileRows * kScoreStride, c += kTileRows * stride) {
    const index_t tile = std::min(kTileRows, rows - row);
    if (columns > kLanes) {
      gemm_nn<kPanelVectors>(tile, a, panel, depth, unchanged, c, stride);
    } else {
      gemm_nn<1>(tile, a, panel, depth, unchanged, c, stride);
    }
  }
}

}   // namespace project

// Task `task` of project_tasks(rows, columns). read(row, k, count, to) gives numbers [k, k + count) of a row of A;
// write(row, n, count, from) takes numbers [n, n + count) of a row of C, once per element. b is [columns, depth] or [depth,
// columns]. Trusts its arguments.
template <class Read, class Write>
void project_task(index_t task, index_t rows, const StoredMatrix& b, Weights order, const ProjectMemory& memory,
                  const Read& read, const Write& write) {
  const index_t columns = order == Weights::by_output ? b.rows : b.columns;
  const index_t depth = order == Weights::by_output ? b.columns : b.rows;
  const index_t across = (columns + kProjectColumns - 1) / kProjectColumns;
  const index_t row_begin = task / across * kProjectRows, row_end = std::min(row_begin + kProjectRows, rows);
  const index_t n = task % across * kProjectColumns, count = std::min(kProjectColumns, columns - n);
  const index_t stride = (count + kPanel - 1) / kPanel * kPanel, here = row_end - row_begin;
  const index_t held = (here + kTileRows - 1) / kTileRows * kTileRows;
  std::fill_n(memory.c, held * stride, 0.f);
  std::fill_n(memory.a + here * kScoreStride, (held - here) * kScoreStride, 0.f);   // spare rows are multiplied too
  for (index_t k = 0; k < depth; k += kProjectDepth) {
    const index_t numbers = std::min(kProjectDepth, depth - k);
    for (index_t row = 0; row < here; ++row) read(row_begin + row, k, numbers, memory.a + row * kScoreStride);
    for (index_t column = 0; column < count; column += kPanel) {
      const index_t wide = std::min(kPanel, count - column);
      project::pack(b, order, k, numbers, n + column, wide, memory.panel);
      project::multiply(memory.a, here, numbers, wide, memory.panel, memory.c + column, stride);
    }
  }
  for (index_t row = row_begin; row < row_end; ++row) write(row, n, count, memory.c + (row - row_begin) * stride);
}

// The whole of it on one lane, for tensors [1, 1, row, number]: c[m, n] = sum_k a[m, k] b[n, k], or b[k, n]. Innermost
// strides of a and c are free, that of b is 1. `memory` as carve_project lays it out.
inline Status project_rows(const Operand& a, const Operand& b, Weights order, const Result& c, const ProjectMemory& memory) {
  const index_t rows = a.extent[2], depth = a.extent[3], columns = c.extent[3];
  const bool by_output = order == Weights::by_output;
  if (b.extent[by_output ? 2 : 3] != columns || b.extent[by_output ? 3 : 2] != depth || c.extent[2] != rows)
    return Status::error(Code::invalid_argument, "fovea: project: a is [%td, %td], b [%td, %td] stored by %s, c [%td, %td]",
                         rows, depth, b.extent[2], b.extent[3], by_output ? "output" : "input", c.extent[2], columns);
  if (!is_weight_format(b.format) || !is_plain(a.format) || !is_plain(c.format))
    return Status::error(Code::unsupported,
                         "fovea: project: a is %s, b %s, c %s; b is f32, bf16 or f16, the others also f64",
                         name_of(a.format), name_of(b.format), name_of(c.format));
  if (b.stride[3] != 1 && b.extent[3] > 1)
    return Status::error(Code::unsupported, "fovea: project: b has innermost stride %td, must be 1", b.stride[3]);
  const index_t a_bytes = row_bytes(a.format, 1), c_bytes = row_bytes(c.format, 1);
  for (index_t task = 0; task < project_tasks(rows, columns); ++task) {
    project_task(
        task, rows, matrix_of(b), order, memory,
        [&](index_t row, index_t k, index_t count, float* to) {
          read_strided(a.format, a.data + (row * a.stride[2] + k * a.stride[3]) * a_bytes, a.stride[3], count, to);
        },
        [&](index_t row, index_t n, index_t count, const float* from) {
          write_strided(c.format, from, count, c.data + (row * c.stride[2] + n * c.stride[3]) * c_bytes, c.stride[3]);
        });
  }
  return {};
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
