// SPDX-License-Identifier: Apache-2.0
// The chunkwise form of every recurrence with a matrix state. Per chunk of tokens and state (docs/recurrent.md):
//   gates      products of the factors from the start of the chunk (P), to its end (Z), between tokens
//   scores     write keys against read rows, once per key head where the factors are scalars
//   transform  delta rules: (I + L) W = beta (V - (P K) S), one product and one triangular solve in registers
//   output     O = (P Q) S + A W
//   state      S = P_C S + K' (Z W), with factors per key channel (Z K)' W
// Values go in panels of kPanel columns, so that a panel of the state stays in L1 through transform, output and state.
#pragma once
#include "../simd/math.hpp"
#include "chunk_memory.hpp"
#include "chunk_tables.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

template <class Spec>
class ChunkTask {
 protected:
  using DecayOf = typename Spec::DecayOf;
  using UpdateOf = typename Spec::UpdateOf;
  using ReadOf = typename Spec::ReadOf;
  using CloseOf = typename Spec::CloseOf;
  static constexpr bool kByKey = DecayOf::kind == Decayed::key;
  static constexpr bool kDecays = DecayOf::kind != Decayed::none;
  static constexpr bool kDelta = UpdateOf::kind == Written::delta;
  static constexpr bool kLowRank = UpdateOf::kind == Written::dplr;
  static constexpr bool kSolves = kDelta || kLowRank;
  static_assert(!ReadOf::exclusive || kByKey, "an exclusive read goes with factors per key channel");
  static_assert(!kLowRank || kByKey, "low-rank updates go with factors per key channel");
  static_assert(!kByKey || !CloseOf::divides, "a key sum goes with factors per token or head");

 public:
  static index_t chunk_rows(const RecurrentRun& run) { return round_up(run.plan.chunk, std::max<index_t>(kLanes, 4)); }
  static ChunkMemory carve(Bump& bump, const RecurrentRun& run) {
    return carve_chunk(bump, run, chunk_rows(run), kByKey, kLowRank);
  }

  ChunkTask(const RecurrentRun& run, const Spec& spec, const ChunkMemory& memory)
      : ChunkTask(run, spec, memory, chunk_rows(run)) {}

  void operator()(index_t task) {
    walk_task(task, [this](index_t begin, index_t count) { chunk(begin, count); });
  }

 protected:
  ChunkTask(const RecurrentRun& run, const Spec& spec, const ChunkMemory& memory, index_t stride)
      : run_(run), spec_(spec), m_(memory), stride_(stride), dim_(padded_dim_k(run.shape)) {}

  template <class Chunk>   // chunk(begin, count)
  void walk_task(index_t task, const Chunk& chunk) {
    static_assert(!kByKey || !has_gain(), "gains go with factors per token or head");
    place_ = task_place(run_, task);
    group_ = group_size(run_, place_.group);
    for (index_t member = 0; member < group_; ++member)
      load_state(run_, place_, state_head(run_, place_.group, member), state(member, 0), key_sum(member));
    if (run_.read_last) {
      walk(true, false, chunk);
      walk(false, true, chunk);
    } else {
      walk(true, true, chunk);
    }
    for (index_t member = 0; member < group_; ++member)
      store_state(run_, place_, state_head(run_, place_.group, member), state(member, 0), key_sum(member));
  }

  template <class Chunk>
  void walk(bool write, bool read, const Chunk& chunk) {
    writes_ = write;
    reads_ = read;
    for (index_t begin = place_.tokens.begin; begin < place_.tokens.end; begin += run_.plan.chunk) {
      chunk(begin, std::min(run_.plan.chunk, place_.tokens.end - begin));
    }
  }

  float* state(index_t member, index_t panel) const { return m_.state + (member * place_.panels + panel) * dim_ * kPanel; }
  float* key_sum(index_t member) const { return CloseOf::divides ? m_.key_sum + member * dim_ : nullptr; }

  void chunk(index_t begin, index_t count) {
    rows_ = round_up(count, std::max<index_t>(kLanes, 4));
    loaded_q_ = loaded_k_ = -1;
    for (index_t member = 0; member < group_; ++member) {
      const index_t head = state_head(run_, place_.group, member);
      at_ = {place_.sequence, place_.tokens.batch, head, begin, count};
      chunk_of(member);
    }
  }

  // The chunk of one state.
  void chunk_of(index_t member) {
    const RecurrentShape& shape = run_.shape;
    const index_t head = at_.head;
    load_keys(shared_head(head, shape.state_heads, shape.k_heads, run_.head_map));
    find_values(shared_head(head, shape.state_heads, shape.v_heads, run_.head_map));
    plan_ahead(member);
    prepare_gates();
    prepare_keys();
    const index_t readers = reads_ ? shape.out_heads / shape.state_heads : 0;
    for (index_t reader = 0; reader < readers; ++reader) {
      const index_t out = out_head(run_, head, reader);
      prepare_queries(shared_head(out, shape.out_heads, shape.q_heads, run_.head_map), member);
      for (index_t p = 0; p < place_.panels; ++p) {
        if (reader == 0) transform(member, p);
        output(out, member, p);
        if (reader + 1 == readers) advance(member, p);
      }
    }
    for (index_t p = 0; readers == 0 && p < place_.panels; ++p) {
      transform(member, p);
      advance(member, p);
    }
    if constexpr (CloseOf::divides) advance_key_sum(member);
  }

  // The rows of the next state of the group, or of the next chunk; and where this one's output goes.
  void plan_ahead(index_t member) {
    const RecurrentShape& shape = run_.shape;
    const auto head_of = [&](index_t of, index_t heads) { return shared_head(of, shape.state_heads, heads, run_.head_map); };
    const index_t first = place_.first_panel * kPanel;
    const index_t columns = std::min(shape.dim_v - first, place_.panels * kPanel);
    const index_t next = at_.begin + run_.plan.chunk, rows = std::min(run_.plan.chunk, place_.tokens.end - next);
    ahead_.clear();
    if (reads_) ahead_.add(run_.out, at_.batch, out_head(run_, at_.head, 0), at_.begin, at_.count, first, columns);
    const bool same_chunk = member + 1 < group_;
    const index_t begin = same_chunk ? at_.begin : next, count = same_chunk ? at_.count : rows;
    if (count > 0) {
      const index_t head = state_head(run_, place_.group, same_chunk ? member + 1 : 0);
      const index_t k_head = head_of(head, shape.k_heads);
      const index_t q_head = shared_head(out_head(run_, head, 0), shape.out_heads, shape.q_heads, run_.head_map);
      ahead_.add(run_.v, at_.batch, head_of(head, shape.v_heads), begin, count, first, columns);
      if (!same_chunk || k_head != loaded_k_) {
        ahead_.add(run_.k, at_.batch, k_head, begin, count, 0, run_.k.extent[3]);
        if (reads_) ahead_.add(run_.q, at_.batch, q_head, begin, count, 0, run_.q.extent[3]);
      }
      if constexpr (requires { spec_.decay.add_ahead(ahead_, at_, head, begin, count); })
        spec_.decay.add_ahead(ahead_, at_, head, begin, count);
    }
    const index_t reads = rows_ * (shape.dim_k + rows_ / 2),
                  work = place_.panels * ((kSolves ? 2 : 1) * reads + dim_ * rows_);
    work_per_row_ = std::max<index_t>(work / std::max<index_t>(ahead_.rows(), 1), 1);
    work_ = 0;
  }

  // Evenly by the multiplications done: 16 lines can be on their way at a time, more of them in a burst would wait.
  FOVEA_INLINE void worked(index_t rows, index_t depth) {
    for (work_ += rows * depth; work_ >= work_per_row_; work_ -= work_per_row_) ahead_.ask();
  }

  // A delta rule reads each value once, so whole panels are read where they lie.
  void find_values(index_t head) {
    const Operand& v = run_.v;
    direct_values_ = kDelta && in_place(v.format, v.stride[3]) && at_.count == rows_ && run_.shape.dim_v % kPanel == 0;
    values_ = {m_.v, kPanel};
    if (direct_values_) {
      values_ = {reinterpret_cast<const float*>(row_at(v, at_.batch, head, at_.begin)) + place_.first_panel * kPanel,
                 v.stride[2]};
      return;
    }
    load_values(run_, place_, head, at_.begin, at_.count, stride_, rows_, m_.row, m_.v);
  }
  const float* values(index_t p) const { return values_.data + p * (direct_values_ ? kPanel : stride_ * kPanel); }

  // Rows of whole vectors are turned where they lie; others are copied first.
  RowsAt find_rows(const Operand& x, const RowMap& map, index_t head, float* copy) const {
    const bool whole = at_.count == rows_ && run_.shape.dim_k == dim_;
    if (!ReadOf::exclusive && !kLowRank && map.apply == nullptr && whole && in_place(x.format, x.stride[3]))
      return {reinterpret_cast<const float*>(row_at(x, at_.batch, head, at_.begin)), x.stride[2]};
    load_rows(x, map_of(run_, map, place_), at_.batch, head, at_.begin, at_.count, run_.shape.dim_k, dim_, rows_, 1.f, m_.row,
              copy);
    return {copy, dim_};
  }

  void scores(const float* left, const float* right, float* to) const {
    chunk_scores(left, right, run_.shape.dim_k, rows_, stride_, to);
  }
  template <bool WithDiagonal>
  void keep_lower(const float* from, bool factors, float scale, float* to) const {
    keep_triangle<WithDiagonal>(from, factors ? m_.decays : nullptr, scale, rows_, stride_, to);
  }

  void load_keys(index_t head) {
    if (loaded_k_ == head) return;
    loaded_k_ = head;
    loaded_q_ = -1;   // raw scores are of both
    keys_ = find_rows(run_.k, run_.k_map, head, m_.k_rows);
    if constexpr (!kByKey) {
      transpose_rows(keys_.data, keys_.stride, rows_, dim_, m_.k_t, stride_);
      if constexpr (kDelta) scores(m_.k_t, m_.k_t, m_.kk);
    }
  }

  void prepare_gates() {
    if constexpr (kByKey) {
      spec_.decay.alpha(at_, m_.alpha, dim_);
      for (index_t i = 0; i < at_.count; ++i)
        std::fill(m_.alpha + i * dim_ + run_.shape.dim_k, m_.alpha + (i + 1) * dim_, 1.f);
      std::fill(m_.alpha + at_.count * dim_, m_.alpha + rows_ * dim_, 1.f);
      std::fill_n(m_.read_prefix, rows_, run_.scale);
    } else if constexpr (kDecays) {
      spec_.decay.alpha(at_, m_.alpha, 1);
      std::fill(m_.alpha + at_.count, m_.alpha + rows_, 1.f);
      // Rounded once: where the factors of all chunks are the same (retention), so is the error of their product, and a state
      // that remembers n tokens is off by n / rows of it.
      double exact = 1;
      for (index_t i = 0; i < rows_; ++i) {
        exact *= double{m_.alpha[i]};
        m_.prefix[i] = static_cast<float>(exact);
        m_.read_prefix[i] = m_.prefix[i] * run_.scale;
      }
      std::fill_n(m_.total, dim_, m_.prefix[rows_ - 1]);
      float product = 1.f;
      for (index_t j = rows_; j-- > 0; product *= m_.alpha[j]) m_.suffix[j] = product;
      decay_table(m_.alpha, rows_, stride_, m_.weights, m_.decays);   // weights are free until the queries come
    } else {
      std::fill_n(m_.total, dim_, 1.f);
      std::fill_n(m_.read_prefix, rows_, run_.scale);
    }
    if constexpr (UpdateOf::kind == Written::additive) {
      if constexpr (UpdateOf::kGain) {
        spec_.update.gain(at_, m_.gain);
        std::fill(m_.gain + at_.count, m_.gain + rows_, 0.f);
        for (index_t j = 0; j < rows_; ++j) m_.suffix[j] = (kDecays ? m_.suffix[j] : 1.f) * m_.gain[j];
      }
    }
    if constexpr (kDelta) prepare_beta();
    if constexpr (kLowRank) std::fill_n(m_.beta, rows_, 1.f);
  }

  bool wide_beta() const {   // a number per value column
    if constexpr (kDelta) return spec_.update.beta_width() != 1;
    return false;
  }

  // W = -beta (-V + ..): the sums of the solve start from -V, so that no operand needs a sign.
  void prepare_beta() {
    if (!wide_beta()) {
      spec_.update.beta(at_, 0, 1, m_.beta, 1);
      for (index_t i = 0; i < at_.count; ++i) m_.beta[i] = -m_.beta[i];
      std::fill(m_.beta + at_.count, m_.beta + rows_, 0.f);
      return;
    }
    std::fill_n(m_.beta, place_.panels * stride_ * kPanel, 0.f);
    for (index_t p = 0; p < place_.panels; ++p) {
      const index_t panel = place_.first_panel + p, columns = panel_columns(run_, panel);
      float* const to = m_.beta + p * stride_ * kPanel;
      spec_.update.beta(at_, panel * kPanel, columns, to, kPanel);
      for (index_t i = 0; i < at_.count; ++i) {
        for (index_t n = 0; n < columns; ++n) to[i * kPanel + n] = -to[i * kPanel + n];
      }
    }
  }

  // ---- factors per token or head

  void prepare_keys() {
    if constexpr (kByKey) {
      prepare_keys_by_channel();
      return;
    }
    if constexpr (kDelta) {
      keep_lower<false>(m_.kk, kDecays, 1.f, m_.lower);
    }
  }
  // Whether what a token writes is multiplied by suffix on its way into the state.
  static constexpr bool scales_writes() { return !kByKey && (kDecays || has_gain()); }
  static constexpr bool has_gain() {
    if constexpr (UpdateOf::kind == Written::additive) return UpdateOf::kGain;
    return false;
  }

  void load_queries(index_t head) {
    if (loaded_q_ == head) return;
    loaded_q_ = head;
    queries_ = find_rows(run_.q, run_.q_map, head, m_.q_rows);
    if constexpr (!kByKey) {
      transpose_rows(queries_.data, queries_.stride, rows_, dim_, m_.q_t, stride_);
      if (writes_) scores(m_.k_t, m_.q_t, m_.qk);
    }
  }

  void prepare_queries(index_t head, index_t member) {
    load_queries(head);
    if constexpr (kByKey) {
      prepare_queries_by_channel();
    } else {
      if (writes_) {
        keep_lower<true>(m_.qk, kDecays, run_.scale, m_.weights);
        if constexpr (has_gain()) {
          for (index_t j = 0; j < rows_; ++j) {
            const f32 factor(m_.gain[j]);
            for (index_t i = j / kLanes * kLanes; i < rows_; i += kLanes)
              store(m_.weights + j * stride_ + i, load(m_.weights + j * stride_ + i) * factor);
          }
        }
      }
    }
    if constexpr (CloseOf::divides) prepare_divisors(member);
  }

  // Operands of the products with the state; factors per token are left to the products (read_prefix, prefix).
  const float* state_queries() const { return kByKey ? m_.q_state : m_.q_t; }
  const float* state_removals() const { return kByKey ? m_.a_state : m_.k_t; }
  RowsAt written_keys() const { return kByKey ? RowsAt{m_.k_out, dim_} : keys_; }

  // ---- factors per key channel

  // Products from the middle of the chunk make both sides of every score small or large together, and their product is at most
  // 1: sound as long as half a chunk decays by less than 2^-60. Otherwise decayed copies of the keys, at three times the cost.
  void prepare_keys_by_channel() {
    if constexpr (kLowRank) {
      spec_.update.rows(at_, m_.k_rows, dim_, m_.a_rows, m_.b_rows);
      for (float* const rows : {m_.a_rows, m_.b_rows}) {
        for (index_t i = 0; i < at_.count; ++i) std::fill(rows + i * dim_ + run_.shape.dim_k, rows + (i + 1) * dim_, 0.f);
        std::fill(rows + at_.count * dim_, rows + rows_ * dim_, 0.f);
      }
    }
    const RowsAt a{m_.a_rows, dim_}, b{m_.b_rows, dim_};
    factored_ = factor_rows();
    write_rows(keys_, m_.k_t, m_.k_out);
    if constexpr (kLowRank) write_rows(b, m_.b_t, m_.b_out);
    if constexpr (kDelta) read_rows<false>(keys_, m_.a_t, m_.a_state);
    if constexpr (kLowRank) read_rows<true>(a, m_.a_t, m_.a_state);
    if constexpr (kDelta) channel_scores<false, false>(keys_, m_.a_t, keys_, m_.k_t, 1.f, m_.lower);
    if constexpr (kLowRank) {
      channel_scores<true, false>(a, m_.a_t, b, m_.b_t, 1.f, m_.lower);
      channel_scores<true, false>(a, m_.a_t, keys_, m_.k_t, 1.f, m_.lower_v);
    }
  }

  void prepare_queries_by_channel() {
    const float scale = run_.scale;
    read_rows<ReadOf::exclusive>(queries_, m_.q_t, m_.q_state);
    channel_scores<ReadOf::exclusive, !ReadOf::exclusive>(queries_, m_.q_t, keys_, m_.k_t, scale, m_.weights);
    if constexpr (kLowRank)
      channel_scores<false, true>(queries_, m_.q_t, RowsAt{m_.b_rows, dim_}, m_.b_t, scale, m_.weights_b);
    if constexpr (ReadOf::exclusive) {
      spec_.read.bonus(at_, m_.q_rows, m_.k_rows, dim_, m_.divisor);
      for (index_t i = 0; i < at_.count; ++i) m_.weights[i * stride_ + i] = m_.divisor[i] * scale;
    }
  }

  // What the state takes, [chunk, dim_k]: factored, rows / row_factor, and the product from the middle to the end is left to the
  // products (to_end); else the rows times the products to the end. turned: for the scores, where factored.
  void write_rows(const RowsAt& rows, float* turned, float* to) const {
    if (factored_) return turn(rows, m_.scratch_rows, 0, turned, to);
    for (index_t d = 0; d < dim_; d += kLanes) {
      f32 product(1.f);
      for (index_t j = rows_; j-- > 0;) {
        store(to + j * dim_ + d, load(rows.data + j * rows.stride + d) * product);
        product = product * load(m_.alpha + j * dim_ + d);
      }
      store(m_.total + d, product);
    }
  }

  // row_factor_i: the product from the middle to i, its inverse before the middle; scratch_i: 1 / row_factor_i. False where a
  // product is too small for that.
  bool factor_rows() const {
    const index_t middle = rows_ / 2;
    keep_t sound = f32(0.f) == f32(0.f);
    const f32 least(0x1p-60f), most(0x1p60f);
    for (index_t d = 0; d < dim_; d += kLanes) {
      f32 product(1.f);
      store(m_.row_factor + middle * dim_ + d, product);
      store(m_.scratch_rows + middle * dim_ + d, product);
      for (index_t i = middle + 1; i < rows_; ++i) {
        product = product * load(m_.alpha + i * dim_ + d);
        store(m_.row_factor + i * dim_ + d, product);
        store(m_.scratch_rows + i * dim_ + d, reciprocal(product));
      }
      sound = sound & (product >= least) & (product <= most);
      store(m_.to_end + d, product);
      const f32 to_end = product;
      product = f32(1.f);
      for (index_t i = middle; i-- > 0;) {
        product = product * load(m_.alpha + (i + 1) * dim_ + d);
        store(m_.scratch_rows + i * dim_ + d, product);
        store(m_.row_factor + i * dim_ + d, reciprocal(product));
      }
      sound = sound & (product >= least) & (product <= most);
      product = product * load(m_.alpha + d);
      store(m_.middle + d, product);
      store(m_.total + d, product * to_end);
    }
    return xsimd::all(sound);
  }

  // to[d, i] = rows[i, d] factors[i - shift, d], the first `shift` rows unscaled. If wanted, scaled[i, d] is the same unturned
  // and from_start[d, i] the same times the product up to the middle.
  void turn(const RowsAt& rows, const float* factors, index_t shift, float* to, float* scaled = nullptr,
            float* from_start = nullptr) const {
    for (index_t row = 0; row < rows_; row += kLanes) {
      for (index_t d = 0; d < dim_; d += kLanes) {
        f32 cells[kLanes];
        FOVEA_UNROLL
        for (index_t r = 0; r < kLanes; ++r) {
          const index_t at = row + r;
          cells[r] = load(rows.data + at * rows.stride + d);
          if (at >= shift) cells[r] = cells[r] * load(factors + (at - shift) * dim_ + d);
          if (scaled != nullptr) store(scaled + at * dim_ + d, cells[r]);
        }
        transpose(cells);
        FOVEA_UNROLL
        for (index_t c = 0; c < kLanes; ++c) store(to + (d + c) * stride_ + row, cells[c]);
        if (from_start == nullptr) continue;
        FOVEA_UNROLL
        for (index_t c = 0; c < kLanes; ++c) store(from_start + (d + c) * stride_ + row, cells[c] * f32(m_.middle[d + c]));
      }
    }
  }

  // turned: [dim_k, chunk] for the scores, where factored; state: the rows times the product from the start of the chunk.
  template <bool Exclusive>
  void read_rows(const RowsAt& rows, float* turned, float* state_rows) const {
    constexpr index_t kShift = Exclusive ? 1 : 0;
    if (factored_) {
      turn(rows, m_.row_factor, kShift, turned, nullptr, state_rows);
      for (index_t d = 0; Exclusive && d < run_.shape.dim_k; ++d) state_rows[d * stride_] = rows.data[d];
      return;
    }
    for (index_t d = 0; d < dim_; d += kLanes) {   // row_factor is free: the products from the start
      f32 product(1.f);
      for (index_t i = 0; i < rows_; ++i) {
        product = product * load(m_.alpha + i * dim_ + d);
        store(m_.row_factor + i * dim_ + d, product);
      }
    }
    turn(rows, m_.row_factor, kShift, state_rows);
  }

  // to[j, i] = scale sum_d write[j, d] (factors between) read[i, d] for i > j, or i >= j; 0 elsewhere.
  template <bool Exclusive, bool WithDiagonal>
  void channel_scores(const RowsAt& read, const float* read_t, const RowsAt& write, const float* write_t, float scale,
                      float* to) const {
    if (factored_) {
      scores(write_t, read_t, m_.decays);
      keep_lower<WithDiagonal>(m_.decays, false, scale, to);
      return;
    }
    float* const decayed = m_.scratch_rows;
    for (index_t j = 0; j < rows_; ++j) copy_padded(write.data + j * write.stride, dim_, dim_, f32(1.f), decayed + j * dim_);
    std::fill_n(to, rows_ * stride_, 0.f);
    for (index_t i = 0; i < rows_; ++i) {
      for (index_t j = 0; j < i + (WithDiagonal ? 1 : 0); ++j) {
        f32 sum(0.f);
        for (index_t d = 0; d < dim_; d += kLanes) {
          f32 key = load(decayed + j * dim_ + d);
          const f32 x = load(read.data + i * read.stride + d);
          if constexpr (Exclusive) sum = fma(key, x, sum);
          if (j < i) {
            key = key * load(m_.alpha + i * dim_ + d);
            store(decayed + j * dim_ + d, key);
          }
          if constexpr (!Exclusive) sum = fma(key, x, sum);
        }
        to[j * stride_ + i] = reduce_add(sum) * scale;
      }
    }
  }

  // ---- the three products

  template <class F>
  void with_vectors(index_t panel, const F& f) const {
    if (panel_columns(run_, place_.first_panel + panel) > kLanes) {
      f(std::integral_constant<int, kPanelVectors>{});
    } else {
      f(std::integral_constant<int, 1>{});
    }
  }

  void transform(index_t member, index_t p) {
    if constexpr (kSolves) {
      float* const w = m_.w + p * stride_ * kPanel;
      const bool wide = wide_beta();
      const float* const beta = m_.beta + (wide ? p * stride_ * kPanel : 0);
      with_vectors(p, [&](auto vectors) {
        for (index_t r = 0; r < rows_;) {
          const index_t first = r;
          r += with_tile_rows(rows_ - first, [&](auto rows) {
            const ProductTerm terms[3] = {
                {state_removals() + first, stride_, state(member, p), kPanel, run_.shape.dim_k},
                {m_.lower + first, stride_, w, kPanel, first},
                {kLowRank ? m_.lower_v + first : nullptr, stride_, values(p), kPanel, first + rows.value}};
            ProductBase from;
            if constexpr (kDelta) from = {values(p) + first * values_.stride, values_.stride, -1.f};
            if constexpr (kDelta && kDecays && !kByKey) from.scale_by_row = m_.prefix + first;
            solve_tile<rows.value, vectors.value>(terms, kLowRank ? 3 : 2, from, m_.lower + first * stride_ + first, stride_,
                                                  beta + first * (wide ? kPanel : 1), wide ? kPanel : 0, w + first * kPanel,
                                                  kPanel);
            worked(rows.value, run_.shape.dim_k + first);
          });
        }
      });
    }
  }

  void output(index_t out, index_t member, index_t p) {
    const index_t panel = place_.first_panel + p, columns = panel_columns(run_, panel);
    const float* const w = m_.w + p * stride_ * kPanel;
    std::byte* const row =
        row_at(run_.out, at_.batch, out, at_.begin) + panel * kPanel * run_.out.stride[3] * row_bytes(run_.out.format, 1);
    const bool direct = !CloseOf::divides && !CloseOf::skips && in_place(run_.out.format, run_.out.stride[3]) &&
                        at_.count == rows_ && columns == kPanel;
    float* const to = direct ? reinterpret_cast<float*>(row) : m_.out;
    const index_t to_stride = direct ? run_.out.stride[2] : kPanel;
    const int count = !writes_ ? 1 : kLowRank ? 3 : 2;   // of terms
    with_vectors(p, [&](auto vectors) {
      for (index_t r = 0; r < rows_;) {
        const index_t first = r;
        r += with_tile_rows(rows_ - first, [&](auto rows) {
          const index_t reach = std::min(rows_, first + rows.value);
          const ProductTerm terms[3] = {{state_queries() + first, stride_, state(member, p), kPanel, run_.shape.dim_k},
                                        {m_.weights + first, stride_, kDelta ? w : values(p), kPanel, reach},
                                        {kLowRank ? m_.weights_b + first : nullptr, stride_, w, kPanel, reach}};
          ProductBase from;
          from.scale_by_row = m_.read_prefix + first;
          product_tile<rows.value, vectors.value>(terms, count, from, to + first * to_stride, to_stride);
          worked(rows.value, run_.shape.dim_k + reach);
        });
      }
    });
    if (direct) return;
    for (index_t i = 0; i < at_.count; ++i) {
      float* const numbers = m_.out + i * kPanel;
      if constexpr (CloseOf::divides) {
        for (index_t n = 0; n < kPanel; n += kLanes) store(numbers + n, load(numbers + n) * f32(m_.divisor[i]));
      }
      if constexpr (CloseOf::skips) spec_.close.skip(at_, panel * kPanel, columns, values(p) + i * values_.stride, numbers);
      store_values(run_.out, numbers, columns, row + i * run_.out.stride[2] * row_bytes(run_.out.format, 1));
    }
  }

  void advance(index_t member, index_t p) {
    if (!writes_) return;
    float* const s = state(member, p);
    float* const w = m_.w + p * stride_ * kPanel;
    float* const written = kDelta ? w : m_.v + p * stride_ * kPanel;
    const RowsAt keys = written_keys();
    if constexpr (scales_writes()) {   // in place: nobody reads them after this, and they are fewer than the keys
      with_vectors(p, [&](auto vectors) {
        for (index_t j = 0; j < at_.count; ++j) {
          const f32 factor(m_.suffix[j]);
          FOVEA_UNROLL
          for (int n = 0; n < vectors.value; ++n)
            store(written + j * kPanel + n * kLanes, load(written + j * kPanel + n * kLanes) * factor);
        }
      });
    }
    with_vectors(p, [&](auto vectors) {
      for (index_t r = 0; r < dim_;) {
        const index_t first = r;
        r += with_tile_rows(dim_ - first, [&](auto rows) {
          const ProductTerm terms[2] = {{keys.data + first, keys.stride, written, kPanel, at_.count},
                                        {kLowRank ? m_.b_out + first : nullptr, dim_, w, kPanel, at_.count}};
          ProductBase from{s + first * kPanel, kPanel, 1.f, kDecays ? m_.total + first : nullptr};
          if (kByKey && factored_) {
            from.scale_by_row = m_.to_end + first;
            from.scaled = kLowRank ? 2 : 1;
          }
          product_tile<rows.value, vectors.value>(terms, kLowRank ? 2 : 1, from, s + first * kPanel, kPanel);
          worked(rows.value, at_.count);
        });
      }
    });
  }

  // ---- the sum of keys, a column of the state whose value is always 1

  void prepare_divisors(index_t member) const {
    const float* const z = key_sum(member);
    for (index_t i = 0; i < rows_; i += kLanes) {
      f32 sum(0.f);
      for (index_t d = 0; d < run_.shape.dim_k; ++d) sum = fma(f32(z[d]), load(state_queries() + d * stride_ + i), sum);
      sum = sum * load(m_.read_prefix + i);
      for (index_t j = 0; writes_ && j < std::min(rows_, i + kLanes); ++j) sum = sum + load(m_.weights + j * stride_ + i);
      store(m_.divisor + i, sum);
    }
    for (index_t i = 0; i < at_.count; ++i) m_.divisor[i] = 1.f / spec_.close.divisor(at_, i, m_.divisor[i]);
  }

  void advance_key_sum(index_t member) const {
    if (!writes_) return;
    float* const z = key_sum(member);
    const RowsAt keys = written_keys();
    for (index_t d = 0; d < dim_; d += kLanes) {
      f32 sum = load(z + d) * load(m_.total + d);
      for (index_t j = 0; j < at_.count; ++j)
        sum = fma(load(keys.data + j * keys.stride + d), f32(scales_writes() ? m_.suffix[j] : 1.f), sum);
      store(z + d, sum);
    }
  }

  const RecurrentRun& run_;
  const Spec& spec_;
  const ChunkMemory& m_;
  const index_t stride_, dim_;   // of the chunk's transposed arrays, of rows
  TaskPlace place_{};
  ChunkPlace at_{};
  index_t rows_ = 0;   // tokens of this chunk, padded to whole vectors
  index_t group_ = 1, loaded_q_ = -1, loaded_k_ = -1;
  index_t work_ = 0, work_per_row_ = 1;
  RowsAt keys_{}, queries_{}, values_{};
  bool direct_values_ = false;
  RowsAhead ahead_;
  bool writes_ = true, reads_ = true, factored_ = true;
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
