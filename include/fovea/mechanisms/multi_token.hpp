// SPDX-License-Identifier: Apache-2.0
// Multi-token attention (Golovneva et al. 2025, arXiv 2504.00927): a weight may depend on several queries, keys and heads.
// Causal; query i of a sequence has position i + len_k - len_q and sees the keys j <= position. For every head h:
//   1. s_ij = scale q_i . k_j, 0 where masked
//   2. s'_ij = sum_ab pre[h, a, b] s_{i - (cq - 1) + a, j - left + b}          left = (ck - 1) / 2, ck - 1 or 0: KeyPadding
//   3. s_h <- sum_g pre_mix[h, g] s'_g                                         all heads
//   4. p = softmax of the visible s; 0 where masked
//   5. p'_ij = sum_ab post[h, a, b] p_{i - (cq - 1) + a, j - left + b}, 0 where masked: rows need not add up to 1
//   6. p_h <- sum_g p'_g post_mix[group, g, h]                                 groups of consecutive heads; transposed
//   7. o = p V;  o <- o / sqrt(mean o^2 + norm_eps) * norm_weight * norm_factor;  o <- o * sigmoid(gate o + gate_bias)
// Each step but 1, 4 and p V is optional. Rows before a sequence's first query count as 0, neighbours in a ragged batch are
// never mixed. A kernel looks ahead along keys, but row i - a holds nothing behind its own position: no future leaks.
//
// A task is a block of queries of one head (of all that are mixed), with the 2 (cq - 1) queries before it: their scores over
// all visible keys stand in a strip of workspace, because the second convolution reads its neighbours' normalised rows. A
// visible pair costs 2 cq ck flops per convolution, beside 2 dim_qk + 2 dim_v.
#pragma once
#include <cmath>
#include <cstring>
#include <new>

#include "../call/call.hpp"
#include "../engine/deal.hpp"

namespace fovea {
inline namespace v0 {

// Where the keys of a kernel lie: as many on both sides (an odd number in all), up to the key itself, or from it on.
enum class KeyPadding : std::uint8_t { both, left, right };

// Views are borrowed for the call; absent ones leave their step out.
struct MultiTokenOptions {
  std::optional<float> scale = {};   // 1/sqrt(dim_qk) if absent
  View<const float, 3> pre = {};     // [q_head, cq, ck]             convolves scores
  View<const float, 3> post = {};    // [q_head, cq, ck]             convolves weights; its cq and ck are its own
  KeyPadding padding = KeyPadding::both;
  View<const float, 2> pre_mix = {};    // [q_head, q_head]             to, from
  View<const float, 3> post_mix = {};   // [q_heads / n, n, n]          group, from, to

  bool norm = false;                           // RMS norm of every head's output row
  std::span<const float> norm_weight = {};     // [dim_v], 1 if empty
  float norm_eps = 1e-5f, norm_factor = 1.f;   // the paper's factor is 1 - lambda_init(layer)
  View<const float, 2> gate = {};              // [1 | dim_v, dim_v]           one gate per row and head, or one per number
  std::span<const float> gate_bias = {};       // [1 | dim_v], 0 if empty

  // The queries just before q, for decode and for chunks: row n of N has the position of q's first query - N + n. At least
  // as many as the kernels reach back (cq - 1 of both, added), or as there are positions; more are not read.
  Tensor<const float> q_history = {};   // [sequence, q_head, N, dim_qk]

  std::span<const index_t> len_k = {};      // [sequence]      keys in use, the stored length if empty
  std::span<const index_t> cu_len_q = {};   // [sequence + 1]  as in AttentionOptions
  std::span<const index_t> cu_len_k = {};   // [sequence + 1]

  Executor executor = {};
  std::span<std::byte> workspace = {};   // at least multi_token_workspace_bytes; empty = a thread-local one of the library
};

inline namespace FOVEA_ARCH {

// Keys a kernel covers around key j, and queries up to i.
struct KernelSize {
  index_t queries = 1, keys = 1, left = 0;
  index_t before() const { return queries - 1; }
  index_t right() const { return keys - 1 - left; }
};

inline KernelSize kernel_size(const View<const float, 3>& kernel, KeyPadding padding) {
  if (!kernel) return {};
  const index_t keys = kernel.extent[2];
  return {kernel.extent[1], keys,
          padding == KeyPadding::both   ? (keys - 1) / 2
          : padding == KeyPadding::left ? keys - 1
                                        : index_t{0}};
}

// A convolution handles so many columns at once, and so many rows of the kernel: 6 x 4 sums (16 registers: 6 x 2), the
// columns and a tap stay in registers, and a loaded vector is used for each row of the kernel.
inline constexpr int kTapRows = 6;
inline constexpr int kConvolveVectors = kRegisters == 32 ? 4 : 2;
inline constexpr index_t kConvolveColumns = kConvolveVectors * kLanes;

// Taps of one head, in the order the kernels read them: runs of kTapRows rows (the last one shorter), each [ck, row].
inline void pack_taps(const View<const float, 3>& kernel, index_t head, const KernelSize& size, float* to) {
  for (index_t a = 0; a < size.queries; ++a) {
    const index_t run = a / kTapRows * kTapRows, rows = std::min<index_t>(kTapRows, size.queries - run);
    for (index_t b = 0; b < size.keys; ++b)
      to[run * size.keys + b * rows + (a - run)] =
          kernel ? kernel.data[head * kernel.stride[0] + a * kernel.stride[1] + b * kernel.stride[2]] : 1.f;
  }
}

// to[i, n] (+)= sum_ab taps[b, a] from[i + a, n + b] for i < rows, n < kConvolveColumns: each one chain of FMAs, a by
// a. The sums of Taps results slide down with the rows.
template <int Taps>
FOVEA_NOINLINE void convolve_rows(const float* taps, index_t keys, const float* from, index_t from_stride, index_t rows,
                                  float* to, index_t to_stride, bool add) {
  f32 sum[Taps][kConvolveVectors];
  FOVEA_UNROLL
  for (int a = 0; a < Taps; ++a) {
    FOVEA_UNROLL
    for (int n = 0; n < kConvolveVectors; ++n) sum[a][n] = f32(0.f);
  }
  for (index_t r = 0; r < rows + Taps - 1; ++r, from += from_stride) {
    if (add && r < rows) {
      FOVEA_UNROLL
      for (int n = 0; n < kConvolveVectors; ++n) sum[0][n] = load(to + r * to_stride + n * kLanes);
    }
    const float* tap = taps;
    for (index_t b = 0; b < keys; ++b, tap += Taps) {
      f32 column[kConvolveVectors];
      FOVEA_UNROLL
      for (int n = 0; n < kConvolveVectors; ++n) column[n] = load(from + b + n * kLanes);
      FOVEA_UNROLL
      for (int a = 0; a < Taps; ++a) {
        const f32 weight(tap[a]);
        FOVEA_UNROLL
        for (int n = 0; n < kConvolveVectors; ++n) sum[a][n] = fma(weight, column[n], sum[a][n]);
      }
    }
    if (r >= Taps - 1) {
      float* const done = to + (r - (Taps - 1)) * to_stride;
      FOVEA_UNROLL
      for (int n = 0; n < kConvolveVectors; ++n) store(done + n * kLanes, sum[Taps - 1][n]);
    }
    FOVEA_UNROLL
    for (int a = Taps - 1; a > 0; --a) {
      FOVEA_UNROLL
      for (int n = 0; n < kConvolveVectors; ++n) sum[a][n] = sum[a - 1][n];
    }
    FOVEA_UNROLL
    for (int n = 0; n < kConvolveVectors; ++n) sum[0][n] = f32(0.f);
  }
}

inline void convolve(const float* taps, const KernelSize& size, const float* from, index_t from_stride, index_t rows,
                     float* to, index_t to_stride) {
  for (index_t a = 0; a < size.queries; a += kTapRows, from += kTapRows * from_stride, taps += kTapRows * size.keys) {
    const bool add = a > 0;
    switch (std::min<index_t>(kTapRows, size.queries - a)) {
      case 1:
        convolve_rows<1>(taps, size.keys, from, from_stride, rows, to, to_stride, add);
        break;
      case 2:
        convolve_rows<2>(taps, size.keys, from, from_stride, rows, to, to_stride, add);
        break;
      case 3:
        convolve_rows<3>(taps, size.keys, from, from_stride, rows, to, to_stride, add);
        break;
      case 4:
        convolve_rows<4>(taps, size.keys, from, from_stride, rows, to, to_stride, add);
        break;
      case 5:
        convolve_rows<5>(taps, size.keys, from, from_stride, rows, to, to_stride, add);
        break;
      default:
        convolve_rows<kTapRows>(taps, size.keys, from, from_stride, rows, to, to_stride, add);
        break;
    }
  }
}

// to[h] = sum_g matrix[g, h] from[g] over kConvolveColumns columns, for Heads results beside each other.
template <int Heads>
FOVEA_INLINE void mix_some(const float* matrix, index_t heads, const float* from, index_t head_stride, float* to) {
  f32 sum[Heads][kConvolveVectors];
  FOVEA_UNROLL
  for (int h = 0; h < Heads; ++h) {
    FOVEA_UNROLL
    for (int n = 0; n < kConvolveVectors; ++n) sum[h][n] = f32(0.f);
  }
  for (index_t g = 0; g < heads; ++g, matrix += heads, from += head_stride) {
    f32 column[kConvolveVectors];
    FOVEA_UNROLL
    for (int n = 0; n < kConvolveVectors; ++n) column[n] = load(from + n * kLanes);
    FOVEA_UNROLL
    for (int h = 0; h < Heads; ++h) {
      const f32 weight(matrix[h]);
      FOVEA_UNROLL
      for (int n = 0; n < kConvolveVectors; ++n) sum[h][n] = fma(weight, column[n], sum[h][n]);
    }
  }
  FOVEA_UNROLL
  for (int h = 0; h < Heads; ++h) {
    FOVEA_UNROLL
    for (int n = 0; n < kConvolveVectors; ++n) store(to + h * kConvolveColumns + n * kLanes, sum[h][n]);
  }
}

// In place, over rows x columns (a multiple of kConvolveColumns) of `heads` arrays head_stride apart.
inline void mix_heads(const float* matrix, index_t heads, float* data, index_t head_stride, index_t rows, index_t row_stride,
                      index_t columns, float* mixed) {   // [heads, kConvolveColumns]
  constexpr int kTogether = kRegisters == 32 ? 4 : 2;
  for (index_t r = 0; r < rows; ++r) {
    for (index_t j = 0; j < columns; j += kConvolveColumns) {
      float* const at = data + r * row_stride + j;
      index_t h = 0;
      for (; h + kTogether <= heads; h += kTogether)
        mix_some<kTogether>(matrix + h, heads, at, head_stride, mixed + h * kConvolveColumns);
      for (; h < heads; ++h) mix_some<1>(matrix + h, heads, at, head_stride, mixed + h * kConvolveColumns);
      for (h = 0; h < heads; ++h) std::copy_n(mixed + h * kConvolveColumns, kConvolveColumns, at + h * head_stride);
    }
  }
}

// The sizes of one task, or the largest of a sequence's tasks. A strip row holds `margin` zeros, then a column for every
// key; scores stand `shift` columns to the right, so that convolved ones can be written over them from left to right.
struct StripSize {
  KernelSize pre, post;
  index_t heads, rows, keys;   // rows: queries with an output
  index_t before() const { return pre.before() + post.before(); }
  index_t margin() const { return padded(post.left, 16); }
  index_t shift() const { return padded(pre.left, 16); }
  index_t columns() const { return padded(keys, kConvolveColumns); }
  // An odd number of cache lines: rows under each other then use all sets of a cache.
  index_t row_stride() const {
    const index_t lines = padded(margin() + columns() + std::max(shift() + pre.right(), post.right()), 16) / 16;
    return (lines | 1) * 16;
  }
  index_t head_stride() const { return (rows + before()) * row_stride(); }
};

struct MultiTokenMemory {
  float* pre_taps;      // [head, cq * ck]
  float* post_taps;     // [head, cq * ck]
  float* matrix;        // [head, head]
  float* mixed;         // [head, kConvolveColumns]
  float* staging;       // [kTileRows, dim_qk]  queries whose numbers do not lie beside each other
  float* queries;       // [head, row group, dim_qk, kTileRows]
  float* keys;          // [panel, dim_qk, kPanel]
  float* values;        // [panel, key_tile, kPanel]
  float* scores;        // [kTileRows, kScoreStride]
  float* convolved;     // [row, kConvolveColumns]
  float* strip;         // [head, row, row_stride]
  float* weights;       // [head, padded row, kScoreStride]
  float* acc;           // [head, padded row, padded dim_v]
  float* gates;         // [padded dim_v]
  std::uint8_t* live;   // [kMaxKeyTile]
};

// A lane's place in the list of tasks, which is walked and never written down; a lane draws rising numbers.
struct TaskCursor {
  index_t sequence = 0, first_task = 0;
};

inline MultiTokenMemory carve_multi_token(Bump& bump, const StripSize& s, index_t dim_qk, index_t dim_v) {
  const index_t tile = key_tile(dim_qk, dim_v), rows = padded(s.rows, kTileRows);
  MultiTokenMemory m{};
  m.pre_taps = bump.take<float>(s.heads * s.pre.queries * s.pre.keys);
  m.post_taps = bump.take<float>(s.heads * s.post.queries * s.post.keys);
  m.matrix = bump.take<float>(s.heads * s.heads);
  m.mixed = bump.take<float>(s.heads * kConvolveColumns);
  m.staging = bump.take<float>(kTileRows * dim_qk);
  m.queries = bump.take<float>(s.heads * padded(s.rows + s.before(), kTileRows) * dim_qk);
  m.keys = bump.take<float>(tile * dim_qk);
  m.values = bump.take<float>(tile * padded(dim_v, kPanel));
  m.scores = bump.take<float>(kTileRows * kScoreStride);
  m.convolved = bump.take<float>((s.rows + s.post.before()) * kConvolveColumns);
  m.strip = bump.take<float>(s.heads * s.head_stride());
  m.weights = bump.take<float>(s.heads * rows * kScoreStride);
  m.acc = bump.take<float>(s.heads * rows * padded(dim_v, kLanes));
  m.gates = bump.take<float>(padded(dim_v, kLanes));
  m.live = bump.take<std::uint8_t>(kMaxKeyTile);
  return m;
}

// A call whose arguments have been checked.
class MultiTokenRun {
 public:
  using CloseRow = void (*)(const void* close, const OutRow& row, std::span<float> values);

  MultiTokenRun(const AttentionShape& shape, const MultiTokenOptions& options)
      : shape_(shape),
        options_(options),
        pre_(kernel_size(options.pre, options.padding)),
        post_(kernel_size(options.post, options.padding)),
        scale_(options.scale ? *options.scale : 1.f / std::sqrt(static_cast<float>(shape.dim_qk))) {
    sequence_options_.causal = Causal::bottom_right;
    sequence_options_.len_k = options.len_k;
    sequence_options_.cu_len_q = options.cu_len_q;
    sequence_options_.cu_len_k = options.cu_len_k;
    sequences_ = door::count_sequences(shape, sequence_options_);
  }

  index_t sequences() const { return sequences_; }
  Sequence sequence(index_t b) const { return door::sequence_of(shape_, sequence_options_, b); }
  index_t before() const { return pre_.before() + post_.before(); }

  // Of the largest task of a sequence. Neither rows nor heads of a task move a bit of a result.
  StripSize strip_size(const Sequence& s) const {
    StripSize size{pre_, post_, 1, 0, std::max<index_t>(s.len_k, 1)};
    if (options_.pre_mix) {
      size.heads = shape_.q_heads;
    } else if (options_.post_mix) {
      size.heads = options_.post_mix.extent[1];
    } else if (s.len_q <= kTileRows) {
      size.heads = shape_.q_heads / shape_.kv_heads;   // few rows: packing K for each head would cost as much as the scores
    }
    // The rows before a block are computed twice: never more of them than of the block's own.
    const index_t before = size.before(), fewest = std::max(kTileRows, before);
    index_t rows = std::max(kBlockRows, padded(3 * before, kTileRows));
    while (rows - kTileRows - before >= fewest && 4 * size.heads * rows * size.row_stride() > kStripLimit) rows -= kTileRows;
    rows -= before;
    // At least four blocks a lane, where the rows allow it.
    const index_t units = sequences_ * (shape_.q_heads / size.heads), lanes = options_.executor.lanes();
    const index_t blocks = lanes > 1 ? (4 * lanes + units - 1) / units : 1;
    rows = std::clamp((s.len_q + blocks - 1) / blocks, std::min(fewest, rows), rows);
    size.rows = std::max<index_t>(std::min(rows, s.len_q), 1);
    return size;
  }
  index_t tasks(const Sequence& s) const {
    const StripSize size = strip_size(s);
    return (s.len_q + size.rows - 1) / size.rows * (shape_.q_heads / size.heads);
  }
  index_t tasks() const {
    index_t count = 0;
    for (index_t b = 0; b < sequences_; ++b) count += tasks(sequence(b));
    return count;
  }
  std::size_t lane_bytes() const {
    std::size_t most = 0;
    for (index_t b = 0; b < sequences_; ++b) {
      Bump bump;
      bump.take<TaskCursor>(1);
      carve_multi_token(bump, strip_size(sequence(b)), shape_.dim_qk, shape_.dim_v);
      most = std::max(most, bump.used());
    }
    return most;
  }

  void run(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<float> out, const void* close,
           CloseRow close_row, std::span<std::byte> workspace, int lanes) {
    q_ = q;
    k_ = k;
    v_ = v;
    out_ = out;
    close_ = close;
    close_row_ = close_row;
    if (tasks() == 0) return;   // no sequence, and so no slice either
    std::byte* const slices = aligned(workspace).data();
    const std::size_t slice = lane_bytes();
    for (int lane = 0; lane < lanes; ++lane) new (slices + slice * static_cast<std::size_t>(lane)) TaskCursor;
    deal(options_.executor, lanes, tasks(),
         [&](int lane, index_t task) { run_task(slices + slice * static_cast<std::size_t>(lane), task); });
  }

 private:
  // Of scores, those before the block included. Each block packs K and V: 60 would do so 1.7 times as often.
  static constexpr index_t kBlockRows = 96;
  static constexpr index_t kStripLimit = index_t{64} << 20;   // bytes of a lane's strips

  const AttentionShape& shape_;
  const MultiTokenOptions& options_;
  AttentionOptions sequence_options_{};
  KernelSize pre_, post_;
  float scale_;
  index_t sequences_ = 0;
  Tensor<const float> q_{}, k_{}, v_{};
  Tensor<float> out_{};
  const void* close_ = nullptr;
  CloseRow close_row_ = nullptr;

  // What a task works on.
  struct Block {
    Sequence sequence;
    index_t number, first_head, first_query;
    StripSize size;
    MultiTokenMemory memory;

    index_t raw_rows() const { return size.rows + size.before(); }
    index_t weight_rows() const { return size.rows + size.post.before(); }
    // Keys that query first_query + n sees, n negative for the ones before the block.
    index_t visible(index_t n) const { return std::clamp<index_t>(sequence.pos + first_query + n + 1, 0, sequence.len_k); }
    // Column 0 of a row: of raw scores (row 0 is the first of the halo), of weights.
    float* row(index_t head, index_t r) const {
      return memory.strip + head * size.head_stride() + r * size.row_stride() + size.margin();
    }
    index_t padded_rows() const { return padded(size.rows, kTileRows); }
    float* weight_row(index_t head, index_t r) const { return memory.weights + (head * padded_rows() + r) * kScoreStride; }
  };

  index_t kv_head(index_t head) const { return head / (shape_.q_heads / shape_.kv_heads); }
  index_t tile() const { return key_tile(shape_.dim_qk, shape_.dim_v); }
  index_t acc_stride() const { return padded(shape_.dim_v, kLanes); }
  static Segment rows_of(const Tensor<const float>& stored, const Sequence& s, index_t head, index_t begin, index_t end) {
    const float* const data =
        stored.data + s.kv_batch * stored.stride[0] + head * stored.stride[1] + (s.k_begin + begin) * stored.stride[2];
    return {reinterpret_cast<const std::byte*>(data), stored.stride[2] * static_cast<index_t>(sizeof(float)), end - begin,
            0};
  }

  void run_task(std::byte* slice, index_t task) const {
    Bump bump(slice);
    TaskCursor& cursor = *bump.take<TaskCursor>(1);
    Sequence s = sequence(cursor.sequence);
    for (index_t count = tasks(s); task >= cursor.first_task + count; count = tasks(s)) {
      cursor.first_task += count;
      s = sequence(++cursor.sequence);
    }
    // The last queries first: they see the most keys.
    Block block{s, cursor.sequence, 0, 0, strip_size(s), {}};
    const index_t units = shape_.q_heads / block.size.heads, blocks = tasks(s) / units, number = task - cursor.first_task;
    block.first_head = number % units * block.size.heads;
    block.first_query = (blocks - 1 - number / units) * block.size.rows;
    block.size.rows = std::min(block.size.rows, s.len_q - block.first_query);
    block.size.keys = block.visible(block.size.rows - 1);
    block.memory = carve_multi_token(bump, block.size, shape_.dim_qk, shape_.dim_v);
    std::memset(block.memory.acc, 0,
                static_cast<std::size_t>(block.size.heads * block.padded_rows() * acc_stride()) * sizeof(float));
    if (block.size.keys > 0) {
      fill_scores(block);
      convolve_scores(block);
      if (options_.pre_mix) {
        pack_matrix(options_.pre_mix.data, options_.pre_mix.stride[1], options_.pre_mix.stride[0], block.size.heads,
                    block.memory.matrix);
        mix_heads(block.memory.matrix, block.size.heads, block.row(0, 0), block.size.head_stride(), block.weight_rows(),
                  block.size.row_stride(), block.size.columns(), block.memory.mixed);
      }
      for (index_t h = 0; h < block.size.heads; ++h) {
        for (index_t r = 0; r < block.weight_rows(); ++r)
          normalise(block.row(h, r), block.visible(r - block.size.post.before()), block.size);
      }
      weigh_values(block);
    }
    for (index_t h = 0; h < block.size.heads; ++h) {
      for (index_t r = 0; r < block.size.rows; ++r) finish_row(block, h, r);
    }
  }

  // matrix[from, to]
  static void pack_matrix(const float* data, index_t from_stride, index_t to_stride, index_t heads, float* matrix) {
    for (index_t g = 0; g < heads; ++g) {
      for (index_t h = 0; h < heads; ++h) matrix[g * heads + h] = data[g * from_stride + h * to_stride];
    }
  }

  // The query n places behind the block's first, floats beside each other; null where there is none.
  const float* query_row(const Block& block, index_t head, index_t n, float* staging) const {
    const Sequence& s = block.sequence;
    const index_t i = block.first_query + n;
    if (s.pos + i < 0) return nullptr;
    const Tensor<const float>& from = i >= 0 ? q_ : options_.q_history;
    const index_t entry = i >= 0 ? s.batch : block.number, place = i >= 0 ? s.q_begin + i : from.extent[2] + i;
    const float* const row = from.data + entry * from.stride[0] + head * from.stride[1] + place * from.stride[2];
    if (from.stride[3] == 1) return row;
    for (index_t d = 0; d < shape_.dim_qk; ++d) staging[d] = row[d * from.stride[3]];
    return staging;
  }

  // Rows that no query stands behind see no key: what is packed for them never leaves the tile.
  void pack_group(const Block& block, index_t head, index_t first_row, index_t rows, float* to) const {
    const float* from[kTileRows] = {};
    const float* some = nullptr;
    for (index_t r = 0; r < rows; ++r) {
      from[r] = query_row(block, head, first_row + r - block.size.before(), block.memory.staging + r * shape_.dim_qk);
      if (from[r] != nullptr) some = from[r];
    }
    for (index_t r = 0; r < rows; ++r) from[r] = from[r] == nullptr ? some : from[r];
    F32Panels::pack_queries(from, rows, 1, shape_.dim_qk, scale_, to);
  }

  // Step 1: scores of the block's rows and those before it, zeros where masked.
  void fill_scores(const Block& block) const {
    const StripSize& size = block.size;
    const MultiTokenMemory& m = block.memory;
    const index_t rows = block.raw_rows(), dim = shape_.dim_qk, before = size.before();
    const index_t groups = (rows + kTileRows - 1) / kTileRows, end_column = size.columns() + size.pre.right();
    for (index_t h = 0; h < size.heads; ++h) {
      for (index_t r = 0; r < rows; ++r) {
        float* const row = block.row(h, r) + size.shift();
        std::fill(row - size.pre.left, row, 0.f);
        std::fill(row + block.visible(r - before), row + end_column, 0.f);
      }
    }
    const auto group_rows = [&](index_t g) { return std::min(kTileRows, rows - g * kTileRows); };
    const auto group_keys = [&](index_t g) { return block.visible(g * kTileRows + group_rows(g) - 1 - before); };
    const auto queries = [&](index_t h, index_t g) { return m.queries + (h * groups + g) * F32Panels::query_size(dim); };
    for (index_t first = 0, last; first < size.heads; first = last) {
      const index_t kv = kv_head(block.first_head + first);
      for (last = first; last < size.heads && kv_head(block.first_head + last) == kv; ++last) {
        for (index_t g = 0; g < groups; ++g) {
          if (group_keys(g) > 0) pack_group(block, block.first_head + last, g * kTileRows, group_rows(g), queries(last, g));
        }
      }
      for (index_t begin = 0; begin < size.keys; begin += tile()) {
        const index_t end = std::min(begin + tile(), size.keys);
        F32Panels::clear_keys(m.keys, dim, end - begin, padded(end - begin, kPanel));
        F32Panels::pack_keys(F32Codec{}, rows_of(k_, block.sequence, kv, begin, end), dim, 0, m.keys);
        for (index_t h = first; h < last; ++h) {
          for (index_t g = 0; g < groups; ++g) {
            const index_t columns = std::min(end, group_keys(g)) - begin;
            if (columns <= 0) continue;
            F32Panels::scores(group_rows(g), 0, columns, queries(h, g), m.keys, dim, scale_, m.scores);
            for (index_t r = 0; r < group_rows(g); ++r) {
              const index_t seen = std::min(end, block.visible(g * kTileRows + r - before)) - begin;
              if (seen > 0)
                std::copy_n(m.scores + r * kScoreStride, seen, block.row(h, g * kTileRows + r) + size.shift() + begin);
            }
          }
        }
      }
    }
  }

  // Step 2. A column's results are written `shift` to the left of its scores, which the next columns still need.
  void convolve_scores(const Block& block) const {
    const StripSize& size = block.size;
    const index_t rows = block.weight_rows(), stride = size.row_stride();
    for (index_t h = 0; h < size.heads; ++h) {
      pack_taps(options_.pre, block.first_head + h, size.pre, block.memory.pre_taps);
      float* const first = block.row(h, 0);
      for (index_t j = 0; j < size.columns(); j += kConvolveColumns) {
        convolve(block.memory.pre_taps, size.pre, first + size.shift() + j - size.pre.left, stride, rows,
                 block.memory.convolved, kConvolveColumns);
        for (index_t r = 0; r < rows; ++r)
          std::copy_n(block.memory.convolved + r * kConvolveColumns, kConvolveColumns, first + r * stride + j);
      }
    }
  }

  // Step 4: a row of scores into weights, with zeros around them as far as the second convolution reads.
  static void normalise(float* row, index_t visible, const StripSize& size) {
    std::fill(row - size.post.left, row, 0.f);
    const index_t whole = padded(visible, kLanes);
    if (visible > 0) {
      constexpr Softmax softmax{nullptr, false};
      std::fill(row + visible, row + whole, -std::numeric_limits<float>::infinity());
      Softmax::State state = softmax.begin({}, false);
      float rescale = 0.f;
      softmax.absorb(&state, {row, 1, whole}, &rescale);
      const f32 factor(softmax.finish(state).scale);
      for (index_t j = 0; j < whole; j += kLanes) store(row + j, load(row + j) * factor);
    }
    std::fill(row + visible, row + size.columns() + size.post.right(), 0.f);
  }

  // Steps 5 and 6, and the product with V, key tile by key tile.
  void weigh_values(const Block& block) const {
    const StripSize& size = block.size;
    const MultiTokenMemory& m = block.memory;
    const index_t stride = size.row_stride();
    for (index_t h = 0; h < size.heads; ++h) {
      pack_taps(options_.post, block.first_head + h, size.post, m.post_taps + h * size.post.queries * size.post.keys);
      std::fill(block.weight_row(h, size.rows), block.weight_row(h, block.padded_rows()), 0.f);
    }
    // A task holds one group of mixed heads, or with pre_mix all of them.
    const index_t mixed = options_.post_mix ? options_.post_mix.extent[1] : 0;
    for (index_t begin = 0; begin < size.keys; begin += tile()) {
      const index_t end = std::min(begin + tile(), size.keys), columns = padded(end - begin, kConvolveColumns);
      for (index_t h = 0; h < size.heads; ++h) {
        for (index_t j = 0; j < columns; j += kConvolveColumns) {
          convolve(m.post_taps + h * size.post.queries * size.post.keys, size.post,
                   block.row(h, 0) + begin + j - size.post.left, stride, size.rows, block.weight_row(h, 0) + j,
                   kScoreStride);
        }
        for (index_t r = 0; r < size.rows; ++r) {
          const index_t seen = std::clamp<index_t>(block.visible(r) - begin, 0, columns);
          std::fill(block.weight_row(h, r) + seen, block.weight_row(h, r) + columns, 0.f);
        }
      }
      for (index_t first = 0; mixed > 0 && first < size.heads; first += mixed) {
        const View<const float, 3>& mix = options_.post_mix;
        pack_matrix(mix.data + (block.first_head + first) / mixed * mix.stride[0], mix.stride[1], mix.stride[2], mixed,
                    m.matrix);
        mix_heads(m.matrix, mixed, block.weight_row(first, 0), block.padded_rows() * kScoreStride, size.rows, kScoreStride,
                  columns, m.mixed);
      }
      bool finite = true;
      for (index_t h = 0; h < size.heads; ++h) {
        const index_t kv = kv_head(block.first_head + h), panel = tile() * kPanel;
        if (h == 0 || kv != kv_head(block.first_head + h - 1))
          finite = F32Panels::pack_values(F32Codec{}, rows_of(v_, block.sequence, kv, begin, end), shape_.dim_v, 0, m.values,
                                          panel);
        for (index_t r = 0; r < size.rows; r += kTileRows) weigh_group(block, h, r, begin, end, finite);
      }
    }
  }

  // A weight of 0 times NaN is NaN: where V is not finite, rows step over the keys they do not see.
  void weigh_group(const Block& block, index_t h, index_t first_row, index_t begin, index_t end, bool finite) const {
    const MultiTokenMemory& m = block.memory;
    const index_t rows = std::min(kTileRows, block.size.rows - first_row), panel = tile() * kPanel;
    const index_t seen = std::min(end, block.visible(first_row + rows - 1)) - begin;
    if (seen <= 0) return;
    float* const acc = m.acc + (h * block.padded_rows() + first_row) * acc_stride();
    if (finite || block.visible(first_row) >= end) {
      float unchanged[kTileRows];
      std::fill_n(unchanged, kTileRows, 1.f);
      F32Panels::weigh(rows, 0, seen, block.weight_row(h, first_row), m.values, panel, shape_.dim_v, unchanged, acc,
                       acc_stride());
      return;
    }
    for (index_t r = 0; r < rows; ++r) {
      const index_t own = std::clamp<index_t>(block.visible(first_row + r) - begin, 0, seen);
      std::fill_n(m.live, own, std::uint8_t{1});
      std::fill(m.live + own, m.live + seen, std::uint8_t{0});
      F32Panels::weigh_live(0, seen, m.live, block.weight_row(h, first_row + r), m.values, panel, shape_.dim_v, 1.f,
                            acc + r * acc_stride());
    }
  }

  // Step 7, over the first `count` of the padded numbers of a row.
  void normalise_output(float* row) const {
    const index_t count = shape_.dim_v;
    f32 squares(0.f);
    for (index_t d = 0; d < count; d += kLanes) {
      const f32 x = load_strided(row + d, 1, count - d);
      squares = fma(x, x, squares);
    }
    const float mean = reduce_add(squares) / static_cast<float>(count) + options_.norm_eps;
    const f32 factor(mean == 0.f ? 0.f : options_.norm_factor / std::sqrt(mean));   // 0: a row that sees no key, with eps 0
    for (index_t d = 0; d < count; d += kLanes) {
      f32 x = load(row + d) * factor;
      if (!options_.norm_weight.empty()) x = x * load_strided(options_.norm_weight.data() + d, 1, count - d);
      store(row + d, x);
    }
  }
  void gate_output(float* row, float* gates) const {
    const index_t count = shape_.dim_v;
    const View<const float, 2>& gate = options_.gate;
    for (index_t n = 0; n < gate.extent[0]; ++n) {
      f32 sum(0.f);
      for (index_t d = 0; d < count; d += kLanes)
        sum = fma(load_strided(gate.data + n * gate.stride[0] + d * gate.stride[1], gate.stride[1], count - d),
                  load_strided(row + d, 1, count - d), sum);
      gates[n] = reduce_add(sum) + (options_.gate_bias.empty() ? 0.f : options_.gate_bias[static_cast<std::size_t>(n)]);
    }
    if (gate.extent[0] == 1) std::fill_n(gates, count, gates[0]);
    for (index_t d = 0; d < count; d += kLanes) {
      const f32 share = f32(1.f) / (f32(1.f) + exp2(load_strided(gates + d, 1, count - d) * f32(-kLog2e)));
      store(row + d, load(row + d) * share);
    }
  }

  void finish_row(const Block& block, index_t h, index_t r) const {
    const index_t dim = shape_.dim_v;
    float* const row = block.memory.acc + (h * block.padded_rows() + r) * acc_stride();
    if (options_.norm) normalise_output(row);
    if (options_.gate) gate_output(row, block.memory.gates);
    const OutRow place{block.sequence.batch, block.first_head + h, block.sequence.q_begin + block.first_query + r};
    if (close_row_ != nullptr) close_row_(close_, place, {row, static_cast<std::size_t>(dim)});
    float* const to = out_.data + place.batch * out_.stride[0] + place.q_head * out_.stride[1] + place.pos * out_.stride[2];
    for (index_t d = 0; d < dim; ++d) to[d * out_.stride[3]] = row[d] + 0.f;
  }
};

namespace door {

inline Status check_kernel(const char* name, const View<const float, 3>& kernel, index_t heads, KeyPadding padding) {
  constexpr index_t kMost = 256;
  if (!kernel) return {};
  const auto& [h, queries, keys] = kernel.extent;
  if (h != heads || queries < 1 || keys < 1)
    return invalid("fovea: multi_token: %s is [%td, %td, %td], must be [%td q heads, queries, keys], all positive", name, h,
                   queries, keys, heads);
  if (queries > kMost || keys > kMost)
    return unsupported("fovea: multi_token: kernels up to %td x %td are supported, %s is %td x %td", kMost, kMost, name,
                       queries, keys);
  if (padding == KeyPadding::both && keys % 2 == 0)
    return invalid("fovea: multi_token: %s covers %td keys: with padding on both sides their number is odd", name, keys);
  return {};
}

inline Status check_multi_token(const AttentionShape& shape, const MultiTokenOptions& o) {
  AttentionOptions tables;
  tables.scale = o.scale;
  tables.causal = Causal::bottom_right;
  tables.len_k = o.len_k;
  tables.cu_len_q = o.cu_len_q;
  tables.cu_len_k = o.cu_len_k;
  tables.executor = o.executor;
  if (Status s = check_problem(shape, tables); !s.ok()) return s;
  if (o.padding > KeyPadding::right)
    return invalid("fovea: multi_token: padding is %d, no value of the enum", static_cast<int>(o.padding));
  if (Status s = check_kernel("pre", o.pre, shape.q_heads, o.padding); !s.ok()) return s;
  if (Status s = check_kernel("post", o.post, shape.q_heads, o.padding); !s.ok()) return s;
  if (o.pre_mix && (o.pre_mix.extent[0] != shape.q_heads || o.pre_mix.extent[1] != shape.q_heads))
    return invalid("fovea: multi_token: pre_mix is [%td, %td], must be [%td, %td], the q heads", o.pre_mix.extent[0],
                   o.pre_mix.extent[1], shape.q_heads, shape.q_heads);
  if (o.post_mix) {
    const auto& [groups, from, to] = o.post_mix.extent;
    if (groups < 1 || from < 1 || from != to || from > shape.q_heads || groups != shape.q_heads / from ||
        shape.q_heads % from != 0)
      return invalid("fovea: multi_token: post_mix is [%td, %td, %td], must be [%td / n, n, n] with n dividing the q heads",
                     groups, from, to, shape.q_heads);
  }
  const auto dim = static_cast<std::size_t>(shape.dim_v);
  if (!o.norm_weight.empty() && (!o.norm || o.norm_weight.size() != dim))
    return invalid("fovea: multi_token: norm_weight has %zu numbers, norm is %s, dim_v %zu", o.norm_weight.size(),
                   o.norm ? "on" : "off", dim);
  if (o.norm && !(std::isfinite(o.norm_eps) && o.norm_eps >= 0.f && std::isfinite(o.norm_factor)))
    return invalid("fovea: multi_token: norm_eps %g must be finite and not negative, norm_factor %g finite",
                   static_cast<double>(o.norm_eps), static_cast<double>(o.norm_factor));
  if (o.gate && ((o.gate.extent[0] != 1 && o.gate.extent[0] != shape.dim_v) || o.gate.extent[1] != shape.dim_v))
    return invalid("fovea: multi_token: gate is [%td, %td], must be [1 or %td, %td]", o.gate.extent[0], o.gate.extent[1],
                   shape.dim_v, shape.dim_v);
  if (!o.gate_bias.empty() && (!o.gate || static_cast<index_t>(o.gate_bias.size()) != o.gate.extent[0]))
    return invalid("fovea: multi_token: gate_bias has %zu numbers, gate %td rows", o.gate_bias.size(),
                   o.gate ? o.gate.extent[0] : index_t{0});

  const MultiTokenRun run(shape, o);
  const index_t history = o.q_history ? o.q_history.extent[2] : 0;
  for (index_t b = 0; b < run.sequences(); ++b) {
    const Sequence s = run.sequence(b);
    const index_t needed = std::min(run.before(), s.pos);
    if (s.len_q > 0 && needed > history)
      return invalid(
          "fovea: multi_token: sequence %td starts at position %td and its kernels reach %td queries back: q_history "
          "has %td queries, must have %td",
          b, s.pos, run.before(), history, needed);
    const StripSize size = run.strip_size(s);
    const double bytes = 4. * static_cast<double>(size.heads) * static_cast<double>(size.rows + size.before()) *
                         static_cast<double>(size.row_stride()) * o.executor.lanes();
    if (bytes > 0x1p46)
      return unsupported("fovea: multi_token: %td heads mixed over %td keys on %d lanes would need %g bytes of workspace",
                         size.heads, s.len_k, o.executor.lanes(), bytes);
  }
  return {};
}

inline Status check_multi_token_call(const Tensor<const float>& q, const Tensor<const float>& k,
                                     const Tensor<const float>& v, const Tensor<float>& out, const MultiTokenOptions& o) {
  if (Status s = check_dense(q, k, v); !s.ok()) return s;
  AttentionOptions plain;
  plain.workspace = o.workspace;
  if (Status s = check_call(q, kv_of(k, v), out, plain); !s.ok()) return s;
  const Bytes out_bytes = [&] {
    Bytes bytes;
    return bytes_of(out.data, out.extent, out.stride, 4, 4, bytes) ? bytes : Bytes{};
  }();
  const OutputBytes outputs[] = {{"out", out_bytes}, {"workspace", span_bytes(o.workspace)}};
  const auto check = [&](const char* name, const auto& view) -> Status {
    Bytes bytes;
    if (!view) return {};
    if (Status s = check_data(name, view, bytes); !s.ok()) return s;
    for (const OutputBytes& output : outputs) {
      if (Status s = check_apart(output, name, bytes); !s.ok()) return s;
    }
    return {};
  };
  if (Status s = check("pre", o.pre); !s.ok()) return s;
  if (Status s = check("post", o.post); !s.ok()) return s;
  if (Status s = check("pre_mix", o.pre_mix); !s.ok()) return s;
  if (Status s = check("post_mix", o.post_mix); !s.ok()) return s;
  if (Status s = check("gate", o.gate); !s.ok()) return s;
  if (Status s = check("q_history", o.q_history); !s.ok()) return s;
  for (const auto& [name, bytes] : {std::pair<const char*, Bytes>{"norm_weight", span_bytes(o.norm_weight)},
                                    std::pair<const char*, Bytes>{"gate_bias", span_bytes(o.gate_bias)}}) {
    for (const OutputBytes& output : outputs) {
      if (Status s = check_apart(output, name, bytes); !s.ok()) return s;
    }
  }
  if (!o.q_history) return {};
  const index_t sequences = o.cu_len_q.empty() ? q.extent[0] : static_cast<index_t>(o.cu_len_q.size()) - 1;
  return check_extents("q_history", o.q_history, {sequences, q.extent[1], o.q_history.extent[2], q.extent[3]}, "q");
}

inline Status run_multi_token(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<float> out,
                              const MultiTokenOptions& options, const void* close, MultiTokenRun::CloseRow close_row) {
  if (Status s = check_multi_token_call(q, k, v, out, options); !s.ok()) return s;
  const AttentionShape shape{q.extent[0], q.extent[1], k.extent[1], q.extent[2], k.extent[2], q.extent[3], v.extent[3]};
  MultiTokenOptions tidied = options;
  tidy_all(q, k, v, out, tidied.pre, tidied.post, tidied.pre_mix, tidied.post_mix, tidied.gate, tidied.q_history);
  if (Status s = check_multi_token(shape, tidied); !s.ok()) return s;
  AttentionOptions tables;
  tables.len_k = options.len_k;
  tables.cu_len_q = options.cu_len_q;
  tables.cu_len_k = options.cu_len_k;
  if (Status s = check_home(kv_of(k, v), shape, tables); !s.ok()) return s;
  MultiTokenRun run(shape, tidied);
  const std::size_t slice = run.lane_bytes();
  const auto start = [&](std::span<std::byte> workspace, int lanes) -> Status {
    if (Status s = check_workspace(workspace, slice * static_cast<std::size_t>(lanes) + kAlignment); !s.ok()) return s;
    run.run(q, k, v, out, close, close_row, workspace, lanes);
    return {};
  };
  const int lanes = options.executor.lanes();
  if (!options.workspace.empty()) return start(options.workspace, lanes);
  const int used = static_cast<int>(std::clamp<index_t>(run.tasks(), 1, lanes));
  return with_local(
      [&](Local& local) { return start(local.workspace(slice * static_cast<std::size_t>(used) + kAlignment), used); });
}

}   // namespace door

// Why a problem would be refused, or ok. Reads no tensor data, only the tables of lengths and the views' extents.
inline Status multi_token_supports(const AttentionShape& shape, const MultiTokenOptions& options) {
  return door::check_multi_token(shape, options);
}

// Bytes of options.workspace for a call of this shape; 0 where it would be refused.
inline std::size_t multi_token_workspace_bytes(const AttentionShape& shape, const MultiTokenOptions& options) {
  if (!door::check_multi_token(shape, options).ok()) return 0;
  return MultiTokenRun(shape, options).lane_bytes() * static_cast<std::size_t>(options.executor.lanes()) + kAlignment;
}

// q [batch, q_head, len_q, dim_qk], k [batch, kv_head, len_k, dim_qk], v [batch, kv_head, len_k, dim_v], out [batch, q_head,
// len_q, dim_v]; strides and aliasing as for fovea::attention. A row's bits are the same for any lanes, any batch around it
// and any cut of its sequence into calls that get their q_history. On error nothing has been written.
inline Status multi_token_attention(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<float> out,
                                    const MultiTokenOptions& options = {}) {
  return door::run_multi_token(q, k, v, out, options, nullptr, nullptr);
}

// The same, with close(OutRow, span<float>, Final) on every finished row, behind norm and gate: a gate of the caller's, as a
// variant's with_close. Called from several lanes at once.
template <class Close>
Status multi_token_attention(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<float> out,
                             const MultiTokenOptions& options, const Close& close) {
  return door::run_multi_token(q, k, v, out, options, &close, [](const void* f, const OutRow& row, std::span<float> values) {
    (*static_cast<const Close*>(f))(row, values, Final{1.f, 0.f});
  });
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
