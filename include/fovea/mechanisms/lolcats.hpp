// SPDX-License-Identifier: Apache-2.0
// LoLCATs (Zhang et al. 2024, arXiv 2410.10254): softmax over a window W_i, linear attention over what is older, L_i, and
// one denominator for both:
//   o_i = (gamma sum_{W_i} e^(s_ij - c_i) v_j + lambda sum_{L_i} phi(q_i) . phi(k_j) v_j) / (the same with v = 1),
//   s_ij = scale * q_i . k_j,  c_i = max_{W_i} s_ij,  phi(x) = [softmax(x W), softmax(-x W)].
// c_i is part of the definition: it sets the proportion of the two sums.
//
// Tokens go by in blocks of kBlock, which is a chunk form: all tokens of a block read the state of its beginning in one
// pass, and the keys that leave the window meanwhile are weighed one by one, as window or as linear part, whichever they
// are for that token. So the state is read and written once per block, not once per token.
#pragma once
#include "../call/in_memory.hpp"
#include "../call/recurrent_call.hpp"
#include "../engine/parts/feature_maps.hpp"
#include "../simd/numbers.hpp"
#include "../simd/register_budget.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

namespace lolcats_kernel {

inline constexpr index_t kBlock = 8;   // tokens at a time
inline constexpr index_t kMaxWindow = 1 << 16;
inline constexpr index_t kRows = 4;   // of a register tile
inline constexpr int kVectors = kRegisters == 32 ? 4 : 2;
inline constexpr float kLeast = 1e-12f;   // of a feature

// to[r, j] = a_r . b_j; rows are zeros up to whole vectors. kRows times two dots at a time.
inline void dots(const float* a, index_t a_stride, index_t rows, const float* b, index_t b_stride, index_t keys,
                 index_t depth, float* to, index_t to_stride) {
  static_assert(kRows == 4);
  for (index_t r = 0; r < rows; r += kRows) {
    const float* row[kRows];   // a spare one repeats the last
    FOVEA_UNROLL
    for (index_t n = 0; n < kRows; ++n) row[n] = a + std::min(r + n, rows - 1) * a_stride;
    for (index_t j = 0; j < keys; j += 2) {
      const float* const first = b + j * b_stride;
      const float* const second = b + std::min(j + 1, keys - 1) * b_stride;
      f32 sum[2][kRows];
      FOVEA_UNROLL
      for (index_t n = 0; n < kRows; ++n) sum[0][n] = sum[1][n] = f32(0.f);
      for (index_t d = 0; d < depth; d += kLanes) {
        const f32 x = load(first + d), y = load(second + d);
        FOVEA_UNROLL
        for (index_t n = 0; n < kRows; ++n) {
          const f32 part = load(row[n] + d);
          sum[0][n] = fma(part, x, sum[0][n]);
          sum[1][n] = fma(part, y, sum[1][n]);
        }
      }
      float dot[2][kRows];
      FOVEA_UNROLL
      for (int n = 0; n < 2; ++n) reduce_add4(sum[n][0], sum[n][1], sum[n][2], sum[n][3], dot[n]);
      for (index_t n = 0; n < kRows && r + n < rows; ++n) {
        to[(r + n) * to_stride + j] = dot[0][n];
        if (j + 1 < keys) to[(r + n) * to_stride + j + 1] = dot[1][n];
      }
    }
  }
}

// Weights of rows r over keys j anywhere: at[r * row_stride + j * key_stride].
struct WeightTable {
  const float* at;
  index_t row_stride, key_stride;
};

// to_r += sum_j weight(r, j) b_j, Rows x Vectors vectors of `to` at a time. One chain of FMAs per number, in the order of
// the keys, so that the bits of a row do not depend on which others are at hand.
template <int Rows, int Vectors>
FOVEA_INLINE void weigh_tile(const WeightTable& weight, const float* b, index_t b_stride, index_t keys, float* to,
                             index_t to_stride) {
  f32 sum[Rows][Vectors];
  FOVEA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) sum[r][n] = load(to + r * to_stride + n * kLanes);
  }
  for (index_t j = 0; j < keys; ++j, b += b_stride) {
    f32 part[Vectors];
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) part[n] = load(b + n * kLanes);
    FOVEA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const f32 w(weight.at[r * weight.row_stride + j * weight.key_stride]);
      FOVEA_UNROLL
      for (int n = 0; n < Vectors; ++n) sum[r][n] = fma(w, part[n], sum[r][n]);
    }
  }
  FOVEA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    FOVEA_UNROLL
    for (int n = 0; n < Vectors; ++n) store(to + r * to_stride + n * kLanes, sum[r][n]);
  }
}
template <int Rows>
FOVEA_INLINE void weigh_rows(const WeightTable& weight, const float* b, index_t b_stride, index_t keys, index_t width,
                             float* to, index_t to_stride) {
  index_t n = 0;
  for (; n + kVectors * kLanes <= width; n += kVectors * kLanes) {
    weigh_tile<Rows, kVectors>(weight, b + n, b_stride, keys, to + n, to_stride);
  }
  for (; n < width; n += kLanes) weigh_tile<Rows, 1>(weight, b + n, b_stride, keys, to + n, to_stride);
}
inline void weigh(WeightTable weight, index_t rows, const float* b, index_t b_stride, index_t keys, index_t width, float* to,
                  index_t to_stride) {
  for (; rows >= kRows; rows -= kRows, to += kRows * to_stride, weight.at += kRows * weight.row_stride) {
    weigh_rows<kRows>(weight, b, b_stride, keys, width, to, to_stride);
  }
  for (; rows > 0; --rows, to += to_stride, weight.at += weight.row_stride) {
    weigh_rows<1>(weight, b, b_stride, keys, width, to, to_stride);
  }
}

// What one call is about. States, maps and windows are per output head.
struct Shape {
  index_t dim_k, dim_v, features, window, held;   // features of one half; keys that wait in a lane's memory, at most
  index_t k_stride, v_stride, map_stride, feature_stride, score_stride;
};
inline index_t given_keys(const LolcatsOptions<float>& options) {
  return options.initial_window_k.data == nullptr ? 0 : options.initial_window_k.extent[2];
}
inline Shape shape_of(const door::RecurrentShape& call, const LolcatsOptions<float>& options) {
  Shape s{};
  s.dim_k = call.dim_k;
  s.dim_v = call.dim_v;
  s.features = options.key_map.extent[2];
  s.window = options.window;
  // Those of the window, of the block that leave it, and of the block that enter it.
  const index_t span = options.shape == LolcatsWindow::terraced ? 2 * s.window : s.window;
  const index_t tokens = std::min<index_t>(call.len, PTRDIFF_MAX / 4) + given_keys(options);
  s.held = std::min(span, tokens) + 2 * kBlock;
  s.k_stride = round_up(s.dim_k, kLanes);
  s.v_stride = round_up(s.dim_v, kLanes);
  s.map_stride = round_up(s.features, kLanes);
  s.feature_stride = round_up(2 * s.features, kLanes);
  s.score_stride = s.held;
  return s;
}

// One lane's memory; keys and values lie one after the other and move to the front when the end is reached.
struct LolcatsMemory {
  float* k;                // [2 held, k_stride]
  float* v;                // [2 held, v_stride]
  float* state;            // [2 features, v_stride]
  float* key_sum;          // [feature_stride]
  float* query_map;        // [dim_k, map_stride]
  float* key_map;          // [dim_k, map_stride]
  float* q;                // [kBlock, k_stride]
  float* query_features;   // [kBlock, feature_stride]
  float* key_features;     // [kBlock, feature_stride]
  float* linear;           // [kBlock, kBlock]
  float* scores;           // [kBlock, score_stride]
  float* out;              // [kBlock, v_stride]
  float* mapped;           // [kBlock, map_stride]
};
inline LolcatsMemory carve(Bump& bump, const Shape& s) {
  return {bump.take<float>(2 * s.held * s.k_stride),     bump.take<float>(2 * s.held * s.v_stride),
          bump.take<float>(2 * s.features * s.v_stride), bump.take<float>(s.feature_stride),
          bump.take<float>(s.dim_k * s.map_stride),      bump.take<float>(s.dim_k * s.map_stride),
          bump.take<float>(kBlock * s.k_stride),         bump.take<float>(kBlock * s.feature_stride),
          bump.take<float>(kBlock * s.feature_stride),   bump.take<float>(kBlock * kBlock),
          bump.take<float>(kBlock * s.score_stride),     bump.take<float>(kBlock * s.v_stride),
          bump.take<float>(kBlock * s.map_stride)};
}

// `count` numbers of a row as floats, zeros up to `stride`.
FOVEA_INLINE void read_padded(Format format, const std::byte* from, index_t element_stride, index_t count, index_t stride,
                              float* to) {
  read_numbers(format, from, element_stride, count, to);
  std::fill_n(to + count, stride - count, 0.f);
}
FOVEA_INLINE void read_padded(const float* from, index_t element_stride, index_t count, index_t stride, float* to) {
  read_padded(Format::f32, reinterpret_cast<const std::byte*>(from), element_stride, count, stride, to);
}
FOVEA_INLINE const float* row_of(const View<const float, 4>& x, index_t sequence, index_t head, index_t n) {
  return x.data + sequence * x.stride[0] + head * x.stride[1] + n * x.stride[2];
}
FOVEA_INLINE float* row_of(const View<float, 4>& x, index_t sequence, index_t head, index_t n) {
  return x.data + sequence * x.stride[0] + head * x.stride[1] + n * x.stride[2];
}
FOVEA_INLINE void write_row(const float* from, index_t count, float* to, index_t element_stride) {
  if (element_stride == 1) {
    std::copy_n(from, count, to);
  } else {
    for (index_t i = 0; i < count; ++i) to[i * element_stride] = from[i];
  }
}

struct Call {
  const Operand &q, &k, &v;
  const Result& out;
  const LolcatsOptions<float>& lolcats;
  const RecurrentOptions<float>& options;
  door::RecurrentShape recurrent;
  Shape shape;
};

// One head of one sequence. Keys are counted through: first those of the initial window, then those of the call.
class HeadRun {
 public:
  HeadRun(const Call& call, index_t sequence, index_t head, const LolcatsMemory& memory)
      : call_(call),
        s_(call.shape),
        m_(memory),
        sequence_(sequence),
        head_(head),
        run_(door::sequence_run(call.recurrent, call.options.cu_len, sequence)),
        given_(given_keys(call.lolcats)),
        k_head_(shared_head(head, call.recurrent.out_heads, call.recurrent.k_heads, call.options.head_map)),
        v_head_(shared_head(head, call.recurrent.out_heads, call.recurrent.v_heads, call.options.head_map)),
        q_head_(shared_head(head, call.recurrent.out_heads, call.recurrent.q_heads, call.options.head_map)) {}

  void run() {
    begin();
    for (index_t t = run_.begin; t < run_.end;) {
      index_t count = std::min(kBlock, run_.end - t);
      if (is_terraced()) count = std::min(count, s_.window - (t - run_.begin) % s_.window);
      block(t, count);
      t += count;
    }
    finish();
  }

 private:
  bool is_terraced() const { return call_.lolcats.shape == LolcatsWindow::terraced; }
  // The oldest key in the window of a key's own token.
  index_t window_begin(index_t key) const {
    return std::max<index_t>(0, is_terraced() ? (key / s_.window - 1) * s_.window : key - s_.window + 1);
  }
  float* k_row(index_t key) const { return m_.k + (key - front_) * s_.k_stride; }
  float* v_row(index_t key) const { return m_.v + (key - front_) * s_.v_stride; }

  // Rows of whole vectors are read where they lie: for one token, packing them would cost as much as using them.
  struct Map {
    const float* rows;   // [dim_k, stride]
    index_t stride;
  };
  Map map_of(const View<const float, 3>& maps, float* packed) const {
    const float* const from = maps.data + head_ * maps.stride[0];
    if (maps.stride[2] == 1 && s_.features % kLanes == 0) return {from, s_.dim_k == 1 ? 0 : maps.stride[1]};
    for (index_t d = 0; d < s_.dim_k; ++d) {
      read_padded(from + d * maps.stride[1], maps.stride[2], s_.features, s_.map_stride, packed + d * s_.map_stride);
    }
    return {packed, s_.map_stride};
  }

  void begin() {
    const auto& l = call_.lolcats;
    query_map_ = map_of(l.query_map, m_.query_map);
    key_map_ = map_of(l.key_map, m_.key_map);
    for (index_t n = 0; n < given_; ++n) {
      read_padded(row_of(l.initial_window_k, sequence_, head_, n), l.initial_window_k.stride[3], s_.dim_k, s_.k_stride,
                  k_row(n));
      read_padded(row_of(l.initial_window_v, sequence_, head_, n), l.initial_window_v.stride[3], s_.dim_v, s_.v_stride,
                  v_row(n));
    }
    end_ = given_;
    std::fill_n(m_.key_sum, s_.feature_stride, 0.f);
    if (l.initial_key_sum) {
      const auto& z = l.initial_key_sum;
      read_padded(z.data + sequence_ * z.stride[0] + head_ * z.stride[1], z.stride[2], 2 * s_.features, s_.feature_stride,
                  m_.key_sum);
    }
    begin_state();
  }

  // Rows of whole vectors are worked on in final_state.
  void begin_state() {
    const auto& initial = call_.options.initial_state;
    const auto& final = call_.options.final_state;
    StateColumns<const float> from{};
    StateColumns<float> to{};
    if (initial) from = state_columns(initial, call_.options.layout, sequence_, head_, 0);
    if (final) to = state_columns(final, call_.options.layout, sequence_, head_, 0);
    in_place_ = final && to.v_stride == 1 && s_.dim_v % kLanes == 0;
    state_ = in_place_ ? to.data : m_.state;
    state_stride_ = in_place_ ? to.k_stride : s_.v_stride;
    if (in_place_ && from.data == to.data) return;
    for (index_t f = 0; f < 2 * s_.features; ++f) {
      float* const row = state_ + f * state_stride_;
      if (initial) {
        read_padded(from.data + f * from.k_stride, from.v_stride, s_.dim_v, s_.v_stride, row);
      } else {
        std::fill_n(row, s_.v_stride, 0.f);
      }
    }
  }

  void finish() {
    leave_all(std::max(oldest_, end_ - s_.window));
    const auto& l = call_.lolcats;
    if (l.final_key_sum) {
      const auto& z = l.final_key_sum;
      write_row(m_.key_sum, 2 * s_.features, z.data + sequence_ * z.stride[0] + head_ * z.stride[1], z.stride[2]);
    }
    for (index_t key = oldest_; key < end_; ++key) {
      if (l.final_window_k)
        write_row(k_row(key), s_.dim_k, row_of(l.final_window_k, sequence_, head_, key - oldest_),
                  l.final_window_k.stride[3]);
      if (l.final_window_v)
        write_row(v_row(key), s_.dim_v, row_of(l.final_window_v, sequence_, head_, key - oldest_),
                  l.final_window_v.stride[3]);
    }
    const auto& final = call_.options.final_state;
    if (!final || in_place_) return;
    const auto to = state_columns(final, call_.options.layout, sequence_, head_, 0);
    for (index_t f = 0; f < 2 * s_.features; ++f) {
      write_row(m_.state + f * s_.v_stride, s_.dim_v, to.data + f * to.k_stride, to.v_stride);
    }
  }

  // Rows of m_.k and m_.v for `count` more keys.
  void append(index_t t, index_t count) {
    if (end_ + count - front_ > 2 * s_.held) {
      std::copy(k_row(oldest_), k_row(end_), m_.k);
      std::copy(v_row(oldest_), v_row(end_), m_.v);
      front_ = oldest_;
    }
    FOVEA_ASSERT(end_ + count - front_ <= 2 * s_.held);
    for (index_t n = 0; n < count; ++n, ++end_) {
      read_padded(call_.k.format, row_at(call_.k, run_.batch, k_head_, t + n), call_.k.stride[3], s_.dim_k, s_.k_stride,
                  k_row(end_));
      read_padded(call_.v.format, row_at(call_.v, run_.batch, v_head_, t + n), call_.v.stride[3], s_.dim_v, s_.v_stride,
                  v_row(end_));
    }
  }

  // phi of up to kBlock rows, times `factor`.
  void map_rows(const float* from, index_t count, const Map& map, float factor, float* features) {
    std::fill_n(m_.mapped, count * s_.map_stride, 0.f);
    weigh({from, s_.k_stride, 1}, count, map.rows, map.stride, s_.dim_k, s_.map_stride, m_.mapped, s_.map_stride);
    for (index_t n = 0; n < count; ++n, features += s_.feature_stride) {
      feature_rows::softmax_halves(m_.mapped + n * s_.map_stride, s_.features, kLeast, features);
      if (factor != 1.f) feature_rows::each(features, 2 * s_.features, features, [&](f32 x) { return x * f32(factor); });
      std::fill_n(features + 2 * s_.features, s_.feature_stride - 2 * s_.features, 0.f);
    }
  }

  // The oldest `count` keys, whose features are known, into the state.
  void leave(index_t count) {
    weigh({m_.key_features, 1, s_.feature_stride}, 2 * s_.features, v_row(oldest_), s_.v_stride, count, s_.v_stride, state_,
          state_stride_);
    for (index_t n = 0; n < count; ++n) {
      const float* const features = m_.key_features + n * s_.feature_stride;
      for (index_t f = 0; f < s_.feature_stride; f += kLanes) {
        store(m_.key_sum + f, load(m_.key_sum + f) + load(features + f));
      }
    }
    oldest_ += count;
  }
  void leave_all(index_t until) {
    while (oldest_ < until) {
      const index_t count = std::min(kBlock, until - oldest_);
      map_rows(k_row(oldest_), count, key_map_, 1.f, m_.key_features);
      leave(count);
    }
  }

  // Tokens t .. t + count - 1, whose keys are `first` on.
  void block(index_t t, index_t count) {
    const index_t first = end_;
    append(t, count);
    // All that has left the window of every token of the block and is more than a block's tokens can push out.
    if (window_begin(end_ - 1) - oldest_ > kBlock) leave_all(window_begin(first));
    const index_t leaving = window_begin(end_ - 1) - oldest_, keys = end_ - oldest_;
    FOVEA_ASSERT(leaving <= kBlock && keys <= s_.score_stride);

    const float scale = call_.options.scale ? *call_.options.scale : 1.f / std::sqrt(static_cast<float>(s_.dim_k));
    for (index_t n = 0; n < count; ++n) {
      read_padded(call_.q.format, row_at(call_.q, run_.batch, q_head_, t + n), call_.q.stride[3], s_.dim_k, s_.k_stride,
                  m_.q + n * s_.k_stride);
    }
    map_rows(m_.q, count, query_map_, call_.lolcats.linear_weight, m_.query_features);
    map_rows(k_row(oldest_), leaving, key_map_, 1.f, m_.key_features);
    dots(m_.query_features, s_.feature_stride, count, m_.key_features, s_.feature_stride, leaving, s_.feature_stride,
         m_.linear, kBlock);
    for (index_t n = 0; n < count * s_.k_stride; n += kLanes) store(m_.q + n, load(m_.q + n) * f32(scale * kLog2e));
    dots(m_.q, s_.k_stride, count, k_row(oldest_), s_.k_stride, keys, s_.k_stride, m_.scores, s_.score_stride);

    std::fill_n(m_.out, count * s_.v_stride, 0.f);
    weigh({m_.query_features, s_.feature_stride, 1}, count, state_, state_stride_, 2 * s_.features, s_.v_stride, m_.out,
          s_.v_stride);
    float denominators[kBlock];
    for (index_t n = 0; n < count; ++n) {
      denominators[n] = weights(first + n, m_.linear + n * kBlock, m_.scores + n * s_.score_stride) +
                        feature_rows::dot(m_.query_features + n * s_.feature_stride, m_.key_sum, s_.feature_stride);
    }
    // Keys up to the block's first token together, the later ones only for those who see them: a weight of 0 would not keep
    // what is not a number out of a row.
    const index_t common = first + 1 - oldest_;
    weigh({m_.scores, s_.score_stride, 1}, count, v_row(oldest_), s_.v_stride, common, s_.v_stride, m_.out, s_.v_stride);
    for (index_t n = 0; n < count; ++n) {
      float* const row = m_.out + n * s_.v_stride;
      weigh({m_.scores + n * s_.score_stride + common, 0, 1}, 1, v_row(first + 1), s_.v_stride, n, s_.v_stride, row,
            s_.v_stride);
      const f32 inverse(1.f / denominators[n]);
      for (index_t d = 0; d < s_.v_stride; d += kLanes) store(row + d, load(row + d) * inverse);
      write_numbers(call_.out.format, row, s_.dim_v, row_at(call_.out, run_.batch, head_, t + n), call_.out.stride[3]);
    }
    leave(leaving);
  }

  // Scores of the keys oldest_ .. `key` of a token, in place to weights; returns their sum.
  float weights(index_t key, const float* linear, float* scores) const {
    const index_t begin = window_begin(key) - oldest_, count = key + 1 - oldest_ - begin;
    float total = 0.f;
    for (index_t n = 0; n < begin; ++n) total += scores[n] = linear[n];
    const float largest = feature_rows::extremes(scores + begin, count).high;
    const f32 gamma(call_.lolcats.window_weight[static_cast<std::size_t>(head_)]);
    f32 sum(0.f);
    for (index_t n = begin; n < begin + count; n += kLanes) {
      const index_t rest = begin + count - n;
      const f32 weight = exp2(feature_rows::load_part(scores + n, rest) - f32(largest)) * gamma;
      feature_rows::store_part(scores + n, weight, rest);
      sum = sum + feature_rows::first_part(weight, rest);
    }
    return total + reduce_add(sum);
  }

  const Call& call_;
  const Shape& s_;
  const LolcatsMemory& m_;
  const index_t sequence_, head_;
  const door::SequenceRun run_;
  const index_t given_, k_head_, v_head_, q_head_;
  Map query_map_{}, key_map_{};
  float* state_ = nullptr;   // [2 features, state_stride]
  index_t state_stride_ = 0;
  bool in_place_ = false;
  index_t front_ = 0, oldest_ = 0, end_ = 0;   // first key in memory, first that is not in the state, behind the last
};

inline int lanes_of(const door::RecurrentShape& call, const RecurrentOptions<float>& options) {
  return static_cast<int>(std::clamp<index_t>(call.sequences * call.out_heads, 1, options.executor.lanes()));
}

inline Status check_maps(const LolcatsOptions<float>& l, const door::RecurrentShape& s, door::Memory& memory) {
  const index_t features = l.key_map.extent[2];
  if (features < 1 || features > door::kMaxRecurrentDim)
    return door::unsupported("fovea: key_map has %td features, 1 to %td are supported", features, door::kMaxRecurrentDim);
  for (const auto& [name, map] : {std::pair{"query_map", &l.query_map}, std::pair{"key_map", &l.key_map}}) {
    if (map->data == nullptr) return door::invalid("fovea: %s has null data", name);
    const std::array<index_t, 3> want{s.out_heads, s.dim_k, features};
    if (Status status = door::check_like(name, *map, want, memory); !status.ok()) return status;
  }
  if (static_cast<index_t>(l.window_weight.size()) != s.out_heads)
    return door::invalid("fovea: window_weight has %zu numbers for %td heads", l.window_weight.size(), s.out_heads);
  if (Status status = memory.reads("window_weight", door::view_of(l.window_weight)); !status.ok()) return status;
  for (std::size_t h = 0; h < l.window_weight.size(); ++h) {
    // With weight 0 a token without older keys divides 0 by 0.
    if (!(l.window_weight[h] > 0.f) || !std::isfinite(l.window_weight[h]))
      return door::invalid("fovea: window_weight[%zu] is %g, must be positive", h, static_cast<double>(l.window_weight[h]));
  }
  if (!(l.linear_weight >= 0.f) || !std::isfinite(l.linear_weight))
    return door::invalid("fovea: linear_weight is %g, must be 0 or more", static_cast<double>(l.linear_weight));
  return {};
}

// Windows and key sums; `longest` is the length of the longest sequence.
inline Status check_carried(const LolcatsOptions<float>& l, const RecurrentOptions<float>& options,
                            const door::RecurrentShape& s, index_t longest, door::Memory& memory) {
  const index_t given = given_keys(l);
  if (given < 0 || given > l.window)
    return door::invalid("fovea: initial_window_k has %td keys, the window %td", given, l.window);
  if ((l.initial_window_k.data == nullptr) != (l.initial_window_v.data == nullptr) && l.initial_window_k.extent[2] > 0)
    return door::invalid("fovea: initial_window_k and initial_window_v go together");
  const bool starts = given == 0 && !options.initial_state && !l.initial_key_sum;
  if (l.shape == LolcatsWindow::terraced && !starts)
    return door::invalid("fovea: a terraced window starts from an empty state; go on with LolcatsWindow::sliding");
  const index_t kept = std::min(l.window, given + longest);
  const auto windows = [&](index_t n, index_t dim) { return std::array<index_t, 4>{s.sequences, s.out_heads, n, dim}; };
  const auto check = [&](const char* name, const auto& view, const auto& want) {
    return door::check_like(name, view, want, memory);
  };
  const std::array<index_t, 3> sums{s.sequences, s.out_heads, 2 * l.key_map.extent[2]};
  if (Status status = check("initial_window_k", l.initial_window_k, windows(given, s.dim_k)); !status.ok()) return status;
  if (Status status = check("initial_window_v", l.initial_window_v, windows(given, s.dim_v)); !status.ok()) return status;
  if (Status status = check("final_window_k", l.final_window_k, windows(kept, s.dim_k)); !status.ok()) return status;
  if (Status status = check("final_window_v", l.final_window_v, windows(kept, s.dim_v)); !status.ok()) return status;
  if (Status status = check("initial_key_sum", l.initial_key_sum, sums); !status.ok()) return status;
  if (Status status = check("final_key_sum", l.final_key_sum, sums); !status.ok()) return status;
  memory.may_be("final_key_sum", "initial_key_sum");
  memory.may_be("final_window_k", "initial_window_k");
  memory.may_be("final_window_v", "initial_window_v");
  using door::check_in_place;
  if (Status status = check_in_place("initial_key_sum", l.initial_key_sum, "final_key_sum", l.final_key_sum); !status.ok())
    return status;
  if (Status status = check_in_place("initial_window_k", l.initial_window_k, "final_window_k", l.final_window_k); !status.ok())
    return status;
  return check_in_place("initial_window_v", l.initial_window_v, "final_window_v", l.final_window_v);
}

}   // namespace lolcats_kernel

// Bytes of workspace for such a call, alignment included.
inline std::size_t lolcats_workspace_bytes(const Operand& q, const Operand& k, const Operand& v,
                                           const LolcatsOptions<float>& lolcats,
                                           const RecurrentOptions<float>& options = {}) {
  const door::RecurrentShape shape = door::recurrent_shape(q, k, v, options);
  Bump lane;
  lolcats_kernel::carve(lane, lolcats_kernel::shape_of(shape, lolcats));
  return lane.used() * static_cast<std::size_t>(lolcats_kernel::lanes_of(shape, options)) + kAlignment;
}

// q [batch, q_head, pos, dim_k], k and v [batch, kv_head, pos, ..], out [batch, head, pos, dim_v]. States are those of the
// query heads, S [sequence, head, 2 feature, dim_v], or as options.layout says. A sequence hands on its state, its key sum
// and its window together; in ragged calls a sequence with fewer tokens than others leaves the rows of final_window behind
// its own untouched. options.form and options.chunk are not looked at. On error nothing has been written.
inline Status lolcats(const Operand& q_in, const Operand& k_in, const Operand& v_in, const Result& out_in,
                      const LolcatsOptions<float>& lolcats, const RecurrentOptions<float>& options = {}) {
  using namespace lolcats_kernel;
  const Operand q = door::tidy_operand(q_in), k = door::tidy_operand(k_in), v = door::tidy_operand(v_in);
  const Result out = door::tidy_operand(out_in);
  door::Memory memory;
  RecurrentOptions<float> stateless = options;   // its states are not those of check_recurrent
  stateless.initial_state = {};
  stateless.final_state = {};
  if (Status s = door::check_recurrent(q, k, v, out, stateless, memory); !s.ok()) return s;
  const door::RecurrentShape shape = door::recurrent_shape(q, k, v, options);
  if (lolcats.window < 1 || lolcats.window > kMaxWindow)
    return door::invalid("fovea: window is %td, must be 1 to %td", lolcats.window, kMaxWindow);
  if (lolcats.shape > LolcatsWindow::terraced)
    return door::invalid("fovea: shape is %d, no value of the enum", static_cast<int>(lolcats.shape));
  if (Status s = check_maps(lolcats, shape, memory); !s.ok()) return s;
  index_t longest = options.cu_len.empty() ? shape.len : 0;
  for (std::size_t n = 1; n < options.cu_len.size(); ++n)
    longest = std::max(longest, options.cu_len[n] - options.cu_len[n - 1]);
  if (Status s = check_carried(lolcats, options, shape, longest, memory); !s.ok()) return s;
  door::RecurrentShape states = shape;
  states.state_heads = shape.out_heads;
  states.dim_k = 2 * lolcats.key_map.extent[2];
  if (Status s = door::check_states(states, options, memory); !s.ok()) return s;
  if (Status s = memory.check_apart(); !s.ok()) return s;

  const Call call{q, k, v, out, lolcats, options, shape, shape_of(shape, lolcats)};
  Bump one_lane;
  carve(one_lane, call.shape);
  const auto run_head = [&](Bump bump, index_t task) {
    const LolcatsMemory lane_memory = carve(bump, call.shape);
    HeadRun(call, task / shape.out_heads, task % shape.out_heads, lane_memory).run();
  };
  const index_t heads = shape.sequences * shape.out_heads;
  if (options.plan != nullptr) *options.plan = {.chunk = kBlock, .groups = heads, .tasks = heads};
  return door::deal_in_memory<door::LocalBytes>(options.executor, lanes_of(shape, options), heads, options.workspace,
                                                one_lane.used(), run_head);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
