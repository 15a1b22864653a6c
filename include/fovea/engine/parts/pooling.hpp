// SPDX-License-Identifier: Apache-2.0
// Blocks of keys and of scores as few numbers: what block selectors look at in place of the keys. Sums run in the order of
// the positions, in fp32, so no result depends on lanes, homes or on how many rows are pooled at once (docs/selection.md).
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "../../simd/lookup.hpp"
#include "../../simd/project.hpp"
#include "codecs.hpp"
#include "sources.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// A stored row as floats [dim], its own scales multiplied in; scales per channel are the caller's.
using RowReader = void (*)(const std::byte* row, index_t dim, float* to);

// The reader of one of the formats of a list, null for others.
template <Format... List>
RowReader row_reader(Format format, Formats<List...>);

// The keys of one kv head of a sequence as floats, whatever they are stored as and wherever they live. Wants the source's
// sequences; asks nothing of its kernels.
class KeyRows {
 public:
  template <class Compiled>
  static Status open(const StoredSource& source, Compiled formats, KeyRows& rows) {
    rows.source_ = source;
    rows.read_[0] = row_reader(source.kv.k.format, formats);
    rows.read_[1] = source.kv.exact == nullptr ? nullptr : row_reader(source.kv.exact->k.format, formats);
    const bool found = rows.read_[0] != nullptr && (source.kv.exact == nullptr || rows.read_[1] != nullptr);
    return found ? Status{}
                 : Status::error(Code::unsupported, "fovea: k is stored as %s, not among the formats of this call",
                                 name_of(rows.read_[0] == nullptr ? source.kv.k.format : source.kv.exact->k.format));
  }

  index_t dim() const { return source_.kv.dim_qk; }

  // f(key, numbers) for the keys [begin, end) in order; `row` is scratch [dim], and what f gets.
  template <class F>
  void each(index_t sequence, index_t kv_head, index_t begin, index_t end, float* row, const F& f) const {
    const Row asked{0, 0, static_cast<int>(sequence), 0, static_cast<int>(kv_head)};
    const float* const scale =
        source_.kv.k_channel_scale == nullptr ? nullptr : source_.kv.k_channel_scale + kv_head * dim();
    for (index_t key = begin; key < end;) {
      const Run run = source_.run(asked, key, end);
      const RowReader read = read_[run.kernels == &source_.kernels ? 0 : 1];
      for (index_t n = 0; n < run.k.count; ++n, ++key) {
        read(run.k.data + n * run.k.stride, dim(), row);
        for (index_t d = 0; scale != nullptr && d < dim(); ++d) row[d] *= scale[d];
        f(key, static_cast<const float*>(row));
      }
    }
  }

 private:
  StoredSource source_{};
  RowReader read_[2] = {};   // of the keys, of the exact part of a mixed cache
};

// to[block] = the mean of the rows [begin + block * size, ...), the last one over the rows that it has. each(begin, end, f)
// calls f(position, numbers) in order. to [ceil((end - begin) / size), dim].
template <class Each>
void pool_mean(const Each& each, index_t begin, index_t end, index_t size, index_t dim, float* to);

// The smallest and the largest of each channel over a block, in place: the block's first row opens, each later one widens.
FOVEA_INLINE void open_bounds(const float* row, index_t dim, float* smallest, float* largest) {
  std::copy_n(row, dim, smallest);
  std::copy_n(row, dim, largest);
}
FOVEA_INLINE void widen_bounds(const float* row, index_t dim, float* smallest, float* largest);
// The same for whole blocks: smallest, largest [ceil((end - begin) / size), dim].
template <class Each>
void pool_bounds(const Each& each, index_t begin, index_t end, index_t size, index_t dim, float* smallest, float* largest);

// Scores to softmax weights in place, natural logits, -inf masked; returns the LSE. A row without a score above -inf becomes
// zeros, and its LSE is -inf.
inline float softmax_row(std::span<float> scores);
// to[b] = the sum of the numbers [b * size, (b + 1) * size), the last block shorter; to [ceil(n / size)].
inline void block_sums(std::span<const float> numbers, index_t size, float* to);
// Softmax-pooled scores: the share of its row's weight that falls into each block. Overwrites the scores with the weights.
inline float softmax_block_sums(std::span<float> scores, index_t size, float* to) {
  const float lse = softmax_row(scores);
  block_sums(scores, size, to);
  return lse;
}

// Pools in one dimension, as neural network libraries define them: output o covers the numbers o * stride - pad ..
// o * stride - pad + kernel - 1.
constexpr index_t pooled_length(index_t n, index_t kernel, index_t stride, index_t pad) {
  return n + 2 * pad < kernel ? 0 : (n + 2 * pad - kernel) / stride + 1;
}
// What the pad holds never wins; -inf where the kernel meets nothing else. to [pooled_length].
inline void max_pool(std::span<const float> numbers, index_t kernel, index_t stride, index_t pad, float* to);
// The pad holds zeros, and they count: every sum is divided by `kernel`. SnapKV smooths its votes so (stride 1, pad kernel /
// 2).
inline void average_pool(std::span<const float> numbers, index_t kernel, index_t stride, index_t pad, float* to);

// XAttention's strided scores: C[i, j] = sum_a q[S i + S - 1 - a] . k[S j + a], the antidiagonal of an S x S tile of Q K',
// as one product of rows of S * dim numbers, of which those of q are read backwards. The caller scales by 1 / (sqrt(dim) S).
// Rows i are q[0], q[1] ... `q_stride` numbers apart; k rows stand next to each other. One call is a list of tasks, as
// project_task's.
struct Antidiagonals {
  const float* q;
  index_t q_stride, rows;   // strided rows
  const float* k;           // [S * columns, dim]
  index_t columns;          // strided columns
  index_t stride, dim;      // S
};
inline index_t antidiagonal_tasks(const Antidiagonals& of) { return project_tasks(of.rows, of.columns); }
// write(i, j, count, scores) takes the columns j .. j + count - 1 of row i, once each; memory: carve_project(bump, rows).
template <class Write>
void antidiagonal_task(index_t task, const Antidiagonals& of, const ProjectMemory& memory, const Write& write) {
  const StoredMatrix k{reinterpret_cast<const std::byte*>(of.k), Format::f32, of.columns, of.stride * of.dim,
                       of.stride * of.dim};
  project_task(
      task, of.rows, k, Weights::by_output, memory,
      [&](index_t row, index_t first, index_t count, float* to) {
        while (count > 0) {
          const index_t slot = first / of.dim, d = first % of.dim, here = std::min(count, of.dim - d);
          std::copy_n(of.q + ((row + 1) * of.stride - 1 - slot) * of.q_stride + d, here, to);
          first += here;
          to += here;
          count -= here;
        }
      },
      write);
}

namespace pooling {

template <class StoredCodec>
void read_row(const std::byte* row, index_t dim, float* to) {
  const StoredCodec codec;
  for (index_t d = 0; d < dim; d += kLanes) {
    const index_t width = std::min(kLanes, dim - d);
    f32 numbers = load_part(codec, row, d, width, dim);
    if constexpr (StoredCodec::kRowScaled) numbers = numbers * f32(codec.scale(row, dim));
    if (width == kLanes) {
      store(to + d, numbers);
    } else {
      store_some(to + d, numbers, width);
    }
  }
}

// f(d, width) for the vectors of a row.
template <class F>
FOVEA_INLINE void each_vector(index_t dim, const F& f) {
  index_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) f(d, kLanes);
  if (d < dim) f(d, dim - d);
}
FOVEA_INLINE f32 load_width(const float* from, index_t width) {
  return width == kLanes ? load(from) : load_some(from, width);
}
FOVEA_INLINE void store_width(float* to, f32 v, index_t width) {
  if (width == kLanes) {
    store(to, v);
  } else {
    store_some(to, v, width);
  }
}

}   // namespace pooling

template <Format... List>
RowReader row_reader(Format format, Formats<List...>) {
  RowReader found = nullptr;
  ((format == List ? void(found = &pooling::read_row<CodecOf<List>>) : void()), ...);
  return found;
}

template <class Each>
void pool_mean(const Each& each, index_t begin, index_t end, index_t size, index_t dim, float* to) {
  using namespace pooling;
  each(begin, end, [&](index_t position, const float* row) {
    const index_t in_block = (position - begin) % size;
    float* const mean = to + (position - begin) / size * dim;
    if (in_block == 0) {
      std::copy_n(row, dim, mean);
    } else {
      each_vector(dim, [&](index_t d, index_t width) {
        store_width(mean + d, load_width(mean + d, width) + load_width(row + d, width), width);
      });
    }
    if (in_block + 1 != size && position + 1 != end) return;
    const f32 count(static_cast<float>(in_block + 1));
    each_vector(dim, [&](index_t d, index_t width) { store_width(mean + d, load_width(mean + d, width) / count, width); });
  });
}

FOVEA_INLINE void widen_bounds(const float* row, index_t dim, float* smallest, float* largest) {
  using namespace pooling;
  each_vector(dim, [&](index_t d, index_t width) {
    const f32 numbers = load_width(row + d, width), low = load_width(smallest + d, width),
              high = load_width(largest + d, width);
    store_width(smallest + d, select(numbers < low, numbers, low), width);
    store_width(largest + d, select(numbers > high, numbers, high), width);
  });
}

template <class Each>
void pool_bounds(const Each& each, index_t begin, index_t end, index_t size, index_t dim, float* smallest, float* largest) {
  each(begin, end, [&](index_t position, const float* row) {
    const index_t at = (position - begin) / size * dim;
    if ((position - begin) % size == 0) {
      open_bounds(row, dim, smallest + at, largest + at);
    } else {
      widen_bounds(row, dim, smallest + at, largest + at);
    }
  });
}

inline float softmax_row(std::span<float> scores) {
  using namespace pooling;
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  const auto n = static_cast<index_t>(scores.size());
  float* const s = scores.data();
  f32 top(kNothing);
  each_vector(n, [&](index_t i, index_t width) {
    const f32 here = load_width(s + i, width);
    top = xsimd::max(
        top, width == kLanes ? here : select(as_keep(lane_numbers() < i32(static_cast<std::int32_t>(width))), here, top));
  });
  const float highest = reduce_max(top);
  if (highest == kNothing) {
    std::fill(scores.begin(), scores.end(), 0.f);
    return kNothing;
  }
  f32 sums(0.f);
  each_vector(n, [&](index_t i, index_t width) {
    const f32 weights = exp2((load_width(s + i, width) - f32(highest)) * f32(kLog2e));
    sums = sums + (width == kLanes ? weights : first_of(weights, width));
    store_width(s + i, weights, width);
  });
  const float sum = reduce_add(sums);
  const f32 factor(1.f / sum);
  each_vector(n, [&](index_t i, index_t width) { store_width(s + i, load_width(s + i, width) * factor, width); });
  return static_cast<float>(static_cast<double>(highest) + std::log(static_cast<double>(sum)));
}

inline void block_sums(std::span<const float> numbers, index_t size, float* to) {
  using namespace pooling;
  const auto n = static_cast<index_t>(numbers.size());
  for (index_t first = 0; first < n; first += size) {
    const float* const block = numbers.data() + first;
    f32 sums(0.f);
    each_vector(std::min(size, n - first), [&](index_t i, index_t width) { sums = sums + load_width(block + i, width); });
    *to++ = reduce_add(sums);
  }
}

namespace pooling {

// to[o] = close(the numbers under the kernel, joined from `start` in their order). Vectors of outputs where a stride of 1
// lets them stand next to each other and no pad is in reach; one by one they give the same bits.
template <class Join, class Close>
void pool(std::span<const float> numbers, index_t kernel, index_t stride, index_t pad, float start, const Join& join,
          const Close& close, float* to) {
  const auto n = static_cast<index_t>(numbers.size());
  const index_t length = pooled_length(n, kernel, stride, pad);
  for (index_t o = 0; o < length;) {
    const index_t first = o * stride - pad;
    if (stride == 1 && first >= 0 && o + kLanes <= length && first + kernel + kLanes - 1 <= n) {
      f32 joined(start);
      for (index_t i = 0; i < kernel; ++i) joined = join(joined, load(numbers.data() + first + i));
      store(to + o, close(joined));
      o += kLanes;
      continue;
    }
    f32 joined(start);
    for (index_t i = std::max<index_t>(first, 0); i < std::min(first + kernel, n); ++i)
      joined = join(joined, f32(numbers[static_cast<std::size_t>(i)]));
    to[o++] = first_lane(close(joined));
  }
}

}   // namespace pooling

inline void max_pool(std::span<const float> numbers, index_t kernel, index_t stride, index_t pad, float* to) {
  pooling::pool(
      numbers, kernel, stride, pad, -std::numeric_limits<float>::infinity(),
      [](f32 a, f32 b) { return select(b > a, b, a); }, [](f32 best) { return best; }, to);
}

inline void average_pool(std::span<const float> numbers, index_t kernel, index_t stride, index_t pad, float* to) {
  const f32 count(static_cast<float>(kernel));
  pooling::pool(
      numbers, kernel, stride, pad, 0.f, [](f32 a, f32 b) { return a + b; }, [count](f32 sum) { return sum / count; }, to);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
