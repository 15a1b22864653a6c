// SPDX-License-Identifier: Apache-2.0
// Log-linear attention: o_t = sum_l lambda_t^(l) S^(l)' q_t over the live levels of token t (level_states.hpp).
// Chunks lie on an absolute grid of a power of two, so that inside one only the newest buckets change. Per chunk and state:
//   intra     lambda joins the weights of a token pair by their level; with a delta rule those weights are
//             (Q K' * Gamma) (I + L)^-1 beta, solved for once for all value columns
//   inter     the levels of whole chunks: one product whose depth is dim_k times the live ones
//   advance   the levels that merge after the chunk are summed first, so they and the chunk share one update. The others
//             decay: by a number, kept apart, or under a delta rule by two products, or by one with the chunk's transition
// Before the first multiple of the chunk, and in decode, tokens go one by one through the same levels.
#pragma once
#include "chunk_step.hpp"
#include "chunk_tables.hpp"
#include "level_states.hpp"
#include "recurrent_plan.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

template <class Decay, class Update, class Close>
struct LevelSpec {
  using DecayOf = Decay;
  using UpdateOf = Update;
  using CloseOf = Close;
  Decay decay;
  Update update;
  Close close;
};

template <class Spec>
class LevelTask {
  using DecayOf = typename Spec::DecayOf;
  using UpdateOf = typename Spec::UpdateOf;
  using CloseOf = typename Spec::CloseOf;
  static constexpr bool kDelta = UpdateOf::kind == Written::delta;
  static_assert(DecayOf::kind == Decayed::token && (kDelta || UpdateOf::kind == Written::additive) && !CloseOf::divides,
                "levels go with a factor per token, additive or delta updates, and no division");

 public:
  static index_t chunk_rows(const LevelRun& run) { return round_up(run.plan.chunk, std::max<index_t>(kLanes, 4)); }
  static LevelMemory carve(Bump& bump, const LevelRun& run) {
    const index_t shift = bits_of(run.plan.chunk) - 1;
    return carve_levels(bump, run, chunk_rows(run), std::max<index_t>(run.levels - shift - 1, 0), kDelta);
  }

  LevelTask(const LevelRun& run, const Spec& spec, const LevelMemory& memory)
      : run_(run),
        spec_(spec),
        m_(memory),
        stride_(chunk_rows(run)),
        dim_(padded_dim_k(run.shape)),
        shift_(bits_of(run.plan.chunk) - 1),
        in_place_(run.plan.form == RecurrentForm::step) {}

  void operator()(index_t task) {
    place_ = task_place(run_, task);
    group_ = group_size(run_, place_.group);
    first_ = run_.first_of(place_.sequence);
    if (in_place_) {
      copy_levels();
    } else {
      load_levels();
    }
    walk();
    if (!in_place_) store_levels();
  }

 private:
  // ---- levels

  // Of a position: how many tokens there were before it.
  index_t index_of(index_t pos) const { return first_ + pos - place_.tokens.begin; }

  float* level(index_t member, index_t l, index_t p) const {
    return m_.levels + ((member * run_.levels + l) * place_.panels + p) * dim_ * kPanel;
  }
  float* scales(index_t member) const { return m_.scales + member * run_.levels; }
  index_t columns(index_t p) const { return panel_columns(run_, place_.first_panel + p); }

  bool has_initial(index_t l) const { return run_.initial_levels && first_ > 0 && is_live(first_ - 1, l); }
  StateColumns<const float> initial(index_t head, index_t l, index_t p) const {
    return level_columns(run_.initial_levels, run_.layout, place_.sequence, head, l, (place_.first_panel + p) * kPanel);
  }
  StateColumns<float> final(index_t head, index_t l, index_t p) const {
    return level_columns(run_.final_levels, run_.layout, place_.sequence, head, l, (place_.first_panel + p) * kPanel);
  }

  template <class F>
  void each_panel(const F& f) const {   // f(member, head, panel)
    for (index_t member = 0; member < group_; ++member) {
      for (index_t p = 0; p < place_.panels; ++p) f(member, state_head(run_, place_.group, member), p);
    }
  }

  void load_levels() {
    each_panel([&](index_t member, index_t head, index_t p) {
      for (index_t l = 0; first_ > 0 && l < levels_for(first_); ++l) {
        if (!is_live(first_ - 1, l)) continue;
        if (has_initial(l)) {
          load_state_panel(initial(head, l, p), run_.shape.dim_k, columns(p), dim_, level(member, l, p));
        } else {
          std::fill_n(level(member, l, p), dim_ * kPanel, 0.f);
        }
      }
    });
  }

  void store_levels() {
    if (!run_.final_levels) return;
    const index_t tokens = index_of(place_.tokens.end);
    each_panel([&](index_t member, index_t head, index_t p) {
      for (index_t l = 0; l < run_.final_levels.extent[2]; ++l) {
        const float* from = m_.panel;
        if (tokens > 0 && l < levels_for(tokens) && is_live(tokens - 1, l)) {
          from = level(member, l, p);
        } else {
          std::fill_n(m_.panel, dim_ * kPanel, 0.f);
        }
        store_state_panel(from, final(head, l, p), run_.shape.dim_k, columns(p));
      }
    });
  }

  // Final levels as the initial ones, unless they are them already.
  void copy_levels() {
    const bool stays = run_.initial_levels && run_.initial_levels.data == run_.final_levels.data && first_ > 0;
    if (stays) return;
    each_panel([&](index_t, index_t head, index_t p) {
      for (index_t l = 0; l < run_.final_levels.extent[2]; ++l) {
        if (has_initial(l)) {
          load_state_panel(initial(head, l, p), run_.shape.dim_k, columns(p), dim_, m_.panel);
        } else {
          std::fill_n(m_.panel, dim_ * kPanel, 0.f);
        }
        store_state_panel(m_.panel, final(head, l, p), run_.shape.dim_k, columns(p));
      }
    });
  }

  void walk() {
    const index_t begin = place_.tokens.begin, end = place_.tokens.end, chunk_size = run_.plan.chunk;
    const index_t ahead = (chunk_size - first_ % chunk_size) % chunk_size;
    const index_t single = run_.plan.form == RecurrentForm::chunked ? std::min(begin + ahead, end) : end;
    for (index_t member = 0; member < group_; ++member) {
      for (index_t pos = begin; pos < single; ++pos) token(member, pos);
    }
    if (single == end) return;
    if (index_of(single) > 0) {
      const index_t merging = trailing_zeros(index_of(single)) + 1;
      each_panel([&](index_t member, index_t, index_t p) {
        sum_panels(level(member, 0, p), place_.panels * dim_ * kPanel, merging, nullptr, dim_ * kPanel,
                   level(member, merging, p));
      });
    }
    std::fill_n(m_.scales, group_ * run_.levels, 1.f);
    for (index_t pos = single; pos < end; pos += chunk_size) chunk(pos, std::min(chunk_size, end - pos));
  }

  // ---- token by token

  // A panel of a level: in the workspace, or where the caller keeps it, or from there in the workspace for as long as it is
  // worked on (columns that are not a whole panel, or not next to each other).
  struct LevelPanel {
    float* data;
    index_t stride;
    bool copied;
  };
  LevelPanel open(index_t member, index_t l, index_t p) const {
    if (!in_place_) return {level(member, l, p), kPanel, false};
    const StateColumns<float> lies = final(at_.head, l, p);
    if (lies.v_stride == 1 && columns(p) == kPanel) return {lies.data, lies.k_stride, false};
    load_state_panel({lies.data, lies.k_stride, lies.v_stride}, run_.shape.dim_k, columns(p), dim_, m_.panel);
    return {m_.panel, kPanel, true};
  }
  void close(const LevelPanel& panel, index_t l, index_t p) const {
    if (panel.copied) store_state_panel(panel.data, final(at_.head, l, p), run_.shape.dim_k, columns(p));
  }

  // The levels below `merging` become level `merging`; they are written as zeros where the caller sees them.
  void merge(index_t member, index_t merging, index_t p) const {
    if (!in_place_) {
      sum_panels(level(member, 0, p), place_.panels * dim_ * kPanel, merging, nullptr, dim_ * kPanel,
                 level(member, merging, p));
      return;
    }
    const index_t rows = run_.shape.dim_k, count = columns(p);
    const StateColumns<float> to = final(at_.head, merging, p);
    const bool by_rows = to.v_stride == 1;
    const index_t outer = by_rows ? rows : count, inner = by_rows ? count : rows;
    for (index_t l = 0; l < merging; ++l) {
      const StateColumns<float> from = final(at_.head, l, p);
      for (index_t i = 0; i < outer; ++i) {
        float* const sum = to.data + i * (by_rows ? to.k_stride : to.v_stride);
        float* const cells = from.data + i * (by_rows ? from.k_stride : from.v_stride);
        const index_t sum_step = by_rows ? to.v_stride : to.k_stride, step = by_rows ? from.v_stride : from.k_stride;
        for (index_t n = 0; n < inner; ++n) {
          sum[n * sum_step] = l == 0 ? cells[n * step] : sum[n * sum_step] + cells[n * step];
          cells[n * step] = 0.f;
        }
      }
    }
  }

  void token(index_t member, index_t pos) {
    const RecurrentShape& shape = run_.shape;
    const index_t head = state_head(run_, place_.group, member), index = index_of(pos);
    at_ = {place_.sequence, place_.tokens.batch, head, pos, 1};
    load_rows(run_.k, {}, at_.batch, shared_head(head, shape.state_heads, shape.k_heads, run_.head_map), pos, 1, shape.dim_k,
              dim_, 1, 1.f, m_.row, m_.token_k);
    float alpha = 0.f, beta = 1.f;
    spec_.decay.alpha(at_, &alpha, 1);
    if constexpr (kDelta) {
      spec_.update.beta(at_, 0, 1, &beta, 1);
      for (index_t d = 0; d < dim_; d += kLanes) store(m_.token_removal + d, load(m_.token_k + d) * f32(alpha));
    } else if constexpr (UpdateOf::kGain) {
      spec_.update.gain(at_, &beta);
    }
    const index_t readers = level_readers(run_);
    for (index_t reader = 0; reader < readers; ++reader) {
      const index_t out = out_head(run_, head, reader);
      load_rows(run_.q, {}, at_.batch, shared_head(out, shape.out_heads, shape.q_heads, run_.head_map), pos, 1, shape.dim_k,
                dim_, 1, run_.scale, m_.row, m_.token_q + reader * dim_);
    }
    const float* const lambda = row_at(run_.level_weight, at_);
    for (index_t p = 0; p < place_.panels; ++p) {
      load_token_values(pos, p);
      std::fill_n(m_.token_out, readers * kPanel, 0.f);
      if (index > 0) merge(member, trailing_zeros(index) + 1, p);
      for (index_t l = 1; l < levels_for(index + 1); ++l) {
        if (!is_live(index, l)) continue;
        const LevelPanel panel = open(member, l, p);
        pass_token(panel, alpha, beta, lambda[l * run_.level_weight.stride[3]]);
        close(panel, l, p);
      }
      write_token(member, p, beta, lambda[0]);
      for (index_t reader = 0; reader < readers; ++reader) {
        float* const row = m_.token_out + reader * kPanel;
        if constexpr (CloseOf::skips) spec_.close.skip(at_, (place_.first_panel + p) * kPanel, columns(p), m_.token_v, row);
        store_values(run_.out, row, columns(p), out_at(out_head(run_, head, reader), pos, p));
      }
    }
  }

  std::byte* out_at(index_t head, index_t pos, index_t p) const {
    return row_at(run_.out, at_.batch, head, pos) +
           (place_.first_panel + p) * kPanel * run_.out.stride[3] * row_bytes(run_.out.format, 1);
  }

  void load_token_values(index_t pos, index_t p) const {
    const index_t head = shared_head(at_.head, run_.shape.state_heads, run_.shape.v_heads, run_.head_map);
    const std::byte* const from = row_at(run_.v, at_.batch, head, pos) +
                                  (place_.first_panel + p) * kPanel * run_.v.stride[3] * row_bytes(run_.v.format, 1);
    std::fill_n(m_.token_v, kPanel, 0.f);
    read_numbers(run_.v.format, from, run_.v.stride[3], columns(p), m_.token_v);
  }

  // An older level: read, and what the token does to it, both from the state before:
  // S~ = alpha S, w = -beta S~' k, o += lambda (S~' q + (k . q) w), S = S~ + k w'.
  void pass_token(const LevelPanel& panel, float alpha, float beta, float lambda) const {
    for (index_t reader = 0; reader < level_readers(run_); ++reader) {
      const float* const q = m_.token_q + reader * dim_;
      step_dots<kPanelVectors>(panel.data, panel.stride, run_.shape.dim_k,
                               kDelta && reader == 0 ? m_.token_removal : nullptr, q, m_.token_p, m_.token_y, 0);
      const f32 passes(alpha * lambda), writes(kDelta ? lambda * dot(m_.token_k, q) : 0.f);
      float* const out = m_.token_out + reader * kPanel;
      for (index_t n = 0; n < kPanel; n += kLanes) {
        f32 sum = fma(load(m_.token_y + n), passes, load(out + n));
        if constexpr (kDelta) {
          if (reader == 0) store(m_.token_w + n, load(m_.token_p + n) * f32(-beta));
          sum = fma(load(m_.token_w + n), writes, sum);
        }
        store(out + n, sum);
      }
    }
    update_panel(panel.data, panel.stride, run_.shape.dim_k, alpha, kDelta ? m_.token_k : nullptr, m_.token_w);
  }

  // Level 0 is the token itself.
  void write_token(index_t member, index_t p, float gain, float lambda) const {
    for (index_t n = 0; n < kPanel; n += kLanes) store(m_.token_w + n, load(m_.token_v + n) * f32(gain));
    for (index_t reader = 0; reader < level_readers(run_); ++reader) {
      const f32 writes(lambda * dot(m_.token_k, m_.token_q + reader * dim_));
      float* const out = m_.token_out + reader * kPanel;
      for (index_t n = 0; n < kPanel; n += kLanes) store(out + n, fma(load(m_.token_w + n), writes, load(out + n)));
    }
    LevelPanel panel{};
    if (in_place_) {
      const StateColumns<float> lies = final(at_.head, 0, p);
      const bool whole = lies.v_stride == 1 && columns(p) == kPanel;
      panel = whole ? LevelPanel{lies.data, lies.k_stride, false} : LevelPanel{m_.panel, kPanel, true};
    } else {
      panel = {level(member, 0, p), kPanel, false};
    }
    for (index_t d = 0; d < (in_place_ ? run_.shape.dim_k : dim_); ++d) {
      for (index_t n = 0; n < kPanel; n += kLanes)
        store(panel.data + d * panel.stride + n, load(m_.token_w + n) * f32(m_.token_k[d]));
    }
    close(panel, 0, p);
  }

  float dot(const float* a, const float* b) const {
    f32 sum(0.f);
    for (index_t d = 0; d < dim_; d += kLanes) sum = fma(load(a + d), load(b + d), sum);
    return reduce_add(sum);
  }

  // ---- chunks

  void chunk(index_t begin, index_t count) {
    const RecurrentShape& shape = run_.shape;
    rows_ = round_up(count, std::max<index_t>(kLanes, 4));
    number_ = index_of(begin) >> shift_;
    last_ = begin + count == place_.tokens.end;
    live_count_ = 0;
    for (index_t bit = 0; bit < bits_of(number_); ++bit) {
      if (((number_ >> bit) & 1) != 0) live_[live_count_++] = bit;
    }
    loaded_q_ = loaded_k_ = -1;
    for (index_t member = 0; member < group_; ++member) {
      const index_t head = state_head(run_, place_.group, member);
      at_ = {place_.sequence, place_.tokens.batch, head, begin, count};
      load_keys(shared_head(head, shape.state_heads, shape.k_heads, run_.head_map));
      load_values(run_, place_, shared_head(head, shape.state_heads, shape.v_heads, run_.head_map), begin, count, stride_,
                  rows_, m_.row, m_.v);
      prepare_gates();
      prepare_level_weights();
      prepare_keys();
      const index_t readers = level_readers(run_);
      for (index_t reader = 0; reader < readers; ++reader) {
        const index_t out = out_head(run_, head, reader);
        prepare_queries(shared_head(out, shape.out_heads, shape.q_heads, run_.head_map), member);
        for (index_t p = 0; p < place_.panels; ++p) {
          output(out, member, p);
          if (reader + 1 == readers && writes()) advance(member, p);
        }
      }
      if (writes()) settle(member);
    }
  }

  bool writes() const { return !last_ || run_.final_levels; }
  index_t level_of_bit(index_t bit) const { return shift_ + 1 + bit; }
  // After the last chunk nothing merges: that is the next token's part.
  index_t merging_bits() const { return last_ ? 0 : trailing_zeros(number_ + 1); }

  void load_keys(index_t head) {
    if (loaded_k_ == head) return;
    loaded_k_ = head;
    loaded_q_ = -1;
    load_rows(run_.k, {}, at_.batch, head, at_.begin, at_.count, run_.shape.dim_k, dim_, rows_, 1.f, m_.row, m_.k_rows);
    transpose_rows(m_.k_rows, dim_, rows_, dim_, m_.k_t, stride_);
    if constexpr (kDelta) chunk_scores(m_.k_t, m_.k_t, run_.shape.dim_k, rows_, stride_, m_.kk);
  }

  void prepare_gates() {
    spec_.decay.alpha(at_, m_.alpha, 1);
    std::fill(m_.alpha + at_.count, m_.alpha + rows_, 1.f);
    total_ = 1.f;
    for (index_t i = 0; i < rows_; ++i) m_.prefix[i] = total_ = total_ * m_.alpha[i];
    float product = 1.f;
    for (index_t j = rows_; j-- > 0; product *= m_.alpha[j]) m_.suffix[j] = product;
    decay_table(m_.alpha, rows_, stride_, m_.weights, m_.decays);
    if constexpr (kDelta) {   // the solves take -beta
      spec_.update.beta(at_, 0, 1, m_.beta, 1);
      for (index_t i = 0; i < at_.count; ++i) m_.beta[i] = -m_.beta[i];
      std::fill(m_.beta + at_.count, m_.beta + rows_, 0.f);
    } else if constexpr (UpdateOf::kGain) {
      spec_.update.gain(at_, m_.gain);
      std::fill(m_.gain + at_.count, m_.gain + rows_, 0.f);
    }
  }

  // lambda by level, and for the pairs of tokens inside one vector by pair. Tokens that do not exist weigh nothing.
  void prepare_level_weights() const {
    const float* const from = row_at(run_.level_weight, at_);
    const index_t by_token = run_.level_weight.stride[2], by_level = run_.level_weight.stride[3];
    const auto copy = [&](index_t l) {
      float* const to = m_.lambda + l * stride_;
      for (index_t i = 0; i < at_.count; ++i) to[i] = from[i * by_token + l * by_level];
      std::fill(to + at_.count, to + rows_, 0.f);
    };
    for (index_t l = 0; l <= bits_of(at_.count - 1); ++l) copy(l);
    for (index_t n = 0; n < live_count_; ++n) copy(level_of_bit(live_[n]));
    std::fill_n(m_.corner, rows_ * kLanes, 0.f);
    for (index_t j = 0; j < at_.count; ++j) {
      const index_t block = j / kLanes * kLanes;
      for (index_t i = j; i < std::min(block + kLanes, at_.count); ++i)
        m_.corner[j * kLanes + i - block] = m_.lambda[bits_of(i ^ j) * stride_ + i];
    }
  }

  // The level of two tokens is that of their vectors, unless it is the same vector.
  void weigh(float* weights) const {
    for (index_t j = 0; j < rows_; ++j) {
      const index_t own = j / kLanes;
      float* const row = weights + j * stride_;
      for (index_t block = 0; block < own; ++block) store(row + block * kLanes, f32(0.f));
      store(row + own * kLanes, load(row + own * kLanes) * load(m_.corner + j * kLanes));
      for (index_t block = own + 1; block < rows_ / kLanes; ++block) {
        const float* const lambda = m_.lambda + (bits_of(block ^ own) + bits_of(kLanes) - 1) * stride_;
        store(row + block * kLanes, load(row + block * kLanes) * load(lambda + block * kLanes));
      }
    }
  }

  void prepare_keys() {
    for (index_t j = 0; j < rows_; ++j) {
      float by = m_.suffix[j];
      if constexpr (!kDelta) {
        if constexpr (UpdateOf::kGain) by *= m_.gain[j];
      }
      for (index_t d = 0; d < dim_; d += kLanes) store(m_.k_out + j * dim_ + d, load(m_.k_rows + j * dim_ + d) * f32(by));
    }
    if constexpr (kDelta) {
      keep_triangle<false>(m_.kk, m_.decays, 1.f, rows_, stride_, m_.lower);
      for (index_t j = 0; j < rows_; ++j) {
        std::fill_n(m_.inverse + j * stride_, rows_, 0.f);
        m_.inverse[j * stride_ + j] = 1.f;
      }
      for (index_t n = 0; n < rows_; n += kPanel) {
        with_width(rows_ - n, [&](auto vectors) {
          solve<vectors.value>(n, nullptr, {m_.inverse + n, stride_, -1.f}, m_.inverse + n, stride_);
        });
      }
      if (live_count_ > 0) prepare_erase();
    }
  }

  // What the chunk takes from a state S: S = total S + k_out' (erase S).
  void prepare_erase() {
    ProductBase keys{m_.k_rows, dim_, 1.f};
    keys.by_row = m_.prefix;
    for (index_t d = 0; d < dim_; d += kPanel) {
      keys.base = m_.k_rows + d;
      with_width(dim_ - d, [&](auto vectors) { solve<vectors.value>(0, nullptr, keys, m_.erase + d, dim_); });
    }
    index_t passing = 0;
    for (index_t n = 0; n < live_count_; ++n) passing += live_[n] >= merging_bits() ? 1 : 0;
    const index_t dim_k = run_.shape.dim_k,
                  dim_v = run_.shape.dim_v;   // not the columns of the task: equal bits on all lanes
    by_transition_ = dim_k * rows_ + passing * dim_k * dim_v < 2 * passing * rows_ * dim_v;
    if (!writes() || passing == 0) return;
    if (!by_transition_) return transpose_rows(m_.erase, dim_, rows_, dim_, m_.erase_t, stride_);
    for (index_t d = 0; d < dim_; d += kPanel) {
      with_width(dim_ - d, [&](auto vectors) {
        products<vectors.value>(dim_, {m_.erase, dim_, m_.k_out + d, dim_, at_.count}, {}, m_.transition + d, dim_);
      });
    }
  }

  void prepare_queries(index_t head, index_t member) {
    const index_t dim_k = run_.shape.dim_k;
    if (loaded_q_ != head) {
      loaded_q_ = head;
      load_rows(run_.q, {}, at_.batch, head, at_.begin, at_.count, dim_k, dim_, rows_, run_.scale, m_.row, m_.q_rows);
      transpose_rows(m_.q_rows, dim_, rows_, dim_, m_.q_t, stride_);
      chunk_scores(m_.k_t, m_.q_t, dim_k, rows_, stride_, m_.qk);
    }
    keep_triangle<true>(m_.qk, m_.decays, 1.f, rows_, stride_, m_.weights);
    const float *seen = m_.q_t, *decayed = m_.prefix;
    if constexpr (kDelta) {
      if (live_count_ > 0) {   // P Q - (weights' W), W what the chunk removes
        scale_columns(m_.q_t, m_.prefix, m_.q_state);
        for (index_t i = 0; i < rows_; i += kPanel) {
          with_width(rows_ - i, [&](auto vectors) {
            products<vectors.value>(dim_, {m_.erase, dim_, m_.weights + i, stride_, std::min(rows_, i + kPanel)},
                                    {m_.q_state + i, stride_}, m_.q_state + i, stride_);
          });
        }
      }
      seen = m_.q_state;
      decayed = nullptr;
      mix_weights();
    } else if constexpr (UpdateOf::kGain) {
      for (index_t j = 0; j < rows_; ++j) {
        for (index_t i = j / kLanes * kLanes; i < rows_; i += kLanes)
          store(m_.weights + j * stride_ + i, load(m_.weights + j * stride_ + i) * f32(m_.gain[j]));
      }
    }
    weigh(kDelta ? m_.mixed : m_.weights);
    for (index_t n = 0; n < live_count_; ++n) {
      const index_t l = level_of_bit(live_[n]);
      const f32 scale(scales(member)[l]);
      for (index_t i = 0; i < rows_; i += kLanes) {
        f32 by = load(m_.lambda + l * stride_ + i) * scale;
        if (decayed != nullptr) by = by * load(decayed + i);
        store(m_.column + i, by);
      }
      scale_columns(seen, m_.column, m_.level_q + n * dim_ * stride_);
    }
  }

  // mixed[n, i] = sum_j inverse[j, n] weights[j, i]: what of value n reaches query i. Both are triangles.
  void mix_weights() const {
    for (index_t n = 0; n < rows_;) {
      const index_t first = n;
      for (index_t i = first / kLanes * kLanes; i < rows_; i += kPanel) {
        const ProductTerm term{m_.inverse + first * stride_ + first, stride_, m_.weights + first * stride_ + i, stride_,
                               std::min(rows_, i + kPanel) - first};
        n = first + with_tile_rows(rows_ - first, [&](auto rows) {
              with_width(rows_ - i, [&](auto vectors) {
                product_tile<rows.value, vectors.value>(&term, 1, {}, m_.mixed + first * stride_ + i, stride_);
              });
            });
      }
    }
  }

  void output(index_t out, index_t member, index_t p) const {
    const float* const v = m_.v + p * stride_ * kPanel;
    const float* const weights = kDelta ? m_.mixed : m_.weights;
    ProductTerm terms[kMaxLevels];
    for (index_t n = 0; n < live_count_; ++n)
      terms[n] = {m_.level_q + n * dim_ * stride_, stride_, level(member, level_of_bit(live_[n]), p), kPanel,
                  run_.shape.dim_k};
    with_width(columns(p), [&](auto vectors) {
      for (index_t r = 0; r < rows_;) {
        const index_t first = r;
        r += with_tile_rows(rows_ - first, [&](auto rows) {
          terms[live_count_] = {weights + first, stride_, v, kPanel, std::min(rows_, first + rows.value)};
          product_tile<rows.value, vectors.value>(terms, static_cast<int>(live_count_ + 1), {}, m_.out + first * kPanel,
                                                  kPanel);
        });
        for (index_t n = 0; n < live_count_; ++n) terms[n].a += r - first;
      }
    });
    for (index_t i = 0; i < at_.count; ++i) {
      float* const row = m_.out + i * kPanel;
      if constexpr (CloseOf::skips)
        spec_.close.skip(at_, (place_.first_panel + p) * kPanel, columns(p), v + i * kPanel, row);
      store_values(run_.out, row, columns(p), out_at(out, at_.begin + i, p));
    }
  }

  void advance(index_t member, index_t p) const {
    const index_t merging = merging_bits();
    with_width(columns(p), [&](auto vectors) {
      constexpr int kWidth = vectors.value;
      if constexpr (kDelta) {
        for (index_t n = 0; n < live_count_; ++n) {
          if (live_[n] >= merging) pass_chunk<kWidth>(level(member, level_of_bit(live_[n]), p));
        }
      }
      if (last_) return keep_newest<kWidth>(member, p);
      float* const to = level(member, level_of_bit(merging), p);
      ProductBase from;
      if (merging > 0) {
        sum_panels(level(member, level_of_bit(0), p), place_.panels * dim_ * kPanel, merging,
                   kDelta ? nullptr : scales(member) + level_of_bit(0), dim_ * kPanel, to);
        from = {to, kPanel, total_};
      }
      const float* written = m_.v + p * stride_ * kPanel;
      if constexpr (kDelta) {
        solve<kWidth>(0, merging > 0 ? to : nullptr, {written, kPanel, -1.f}, m_.w, kPanel);
        written = m_.w;
      }
      products<kWidth>(dim_, {m_.k_out, dim_, written, kPanel, at_.count}, from, to, kPanel);
    });
  }

  // A level over which the chunk passes.
  template <int Vectors>
  void pass_chunk(float* state) const {
    const index_t dim_k = run_.shape.dim_k;
    if (by_transition_) {
      std::memcpy(m_.panel, state, static_cast<std::size_t>(dim_ * kPanel) * sizeof(float));
      products<Vectors>(dim_, {m_.transition, dim_, m_.panel, kPanel, dim_k}, {m_.panel, kPanel, total_}, state, kPanel);
      return;
    }
    products<Vectors>(rows_, {m_.erase_t, stride_, state, kPanel, dim_k}, {}, m_.w, kPanel);
    products<Vectors>(dim_, {m_.k_out, dim_, m_.w, kPanel, at_.count}, {state, kPanel, total_}, state, kPanel);
  }

  // After the last chunk its own tokens are handed on in buckets as well.
  template <int Vectors>
  void keep_newest(index_t member, index_t p) const {
    const index_t newest = at_.count - 1;
    keep_bucket<Vectors>(newest, at_.count, level(member, 0, p), p);
    for (index_t bit = 0; bit < bits_of(newest); ++bit) {
      const index_t end = (newest >> bit) << bit;
      if (is_live(newest, bit + 1)) keep_bucket<Vectors>(end - (index_t{1} << bit), end, level(member, bit + 1, p), p);
    }
  }

  // The state that tokens [begin, end) of the chunk leave at its end.
  template <int Vectors>
  void keep_bucket(index_t begin, index_t end, float* to, index_t p) const {
    const float* const v = m_.v + p * stride_ * kPanel;
    if constexpr (!kDelta) {
      products<Vectors>(dim_, {m_.k_out + begin * dim_, dim_, v + begin * kPanel, kPanel, end - begin}, {}, to, kPanel);
    } else {
      const index_t start = begin / 4 * 4;   // of whole tiles
      std::fill_n(m_.w, rows_ * kPanel, 0.f);
      std::copy(v + begin * kPanel, v + end * kPanel, m_.w + begin * kPanel);
      solve<Vectors>(start, nullptr, {m_.w, kPanel, -1.f}, m_.w, kPanel);
      products<Vectors>(dim_, {m_.k_out + start * dim_, dim_, m_.w + start * kPanel, kPanel, at_.count - start}, {}, to,
                        kPanel);
    }
  }

  // The numbers of undecayed levels after the chunk; at the end they join the states.
  void settle(index_t member) const {
    if constexpr (!kDelta) {
      float* const scale = scales(member);
      for (index_t n = 0; n < live_count_; ++n) scale[level_of_bit(live_[n])] *= total_;
      if (!last_) {
        scale[level_of_bit(merging_bits())] = 1.f;
        return;
      }
      for (index_t n = 0; n < live_count_; ++n) {
        const index_t l = level_of_bit(live_[n]);
        for (index_t p = 0; p < place_.panels; ++p)
          update_panel(level(member, l, p), kPanel, dim_, scale[l], nullptr, nullptr);
      }
    }
  }

  // ---- products

  template <class F>
  static void with_width(index_t columns, const F& f) {
    if (columns > kLanes) {
      f(std::integral_constant<int, kPanelVectors>{});
    } else {
      f(std::integral_constant<int, 1>{});
    }
  }

  // to[d, i] = from[d, i] by[i].
  void scale_columns(const float* from, const float* by, float* to) const {
    for (index_t i = 0; i < rows_; i += kLanes) {
      const f32 factor = load(by + i);
      for (index_t d = 0; d < run_.shape.dim_k; ++d) store(to + d * stride_ + i, load(from + d * stride_ + i) * factor);
    }
  }

  static ProductBase from_row(ProductBase from, index_t row) {
    if (from.base != nullptr) from.base += row * from.stride;
    if (from.by_row != nullptr) from.by_row += row;
    return from;
  }

  template <int Vectors>
  static void products(index_t rows, ProductTerm term, const ProductBase& from, float* to, index_t stride) {
    const float* const a = term.a;
    for (index_t r = 0; r < rows;) {
      const index_t first = r;
      term.a = a + first;
      r += with_tile_rows(rows - first, [&](auto count) {
        product_tile<count.value, Vectors>(&term, 1, from_row(from, first), to + first * stride, stride);
      });
    }
  }

  // to_i = beta_i (-from_i ..): rows from `start` on of (I + L) to = beta (from - (P K) state).
  template <int Vectors>
  void solve(index_t start, const float* state, const ProductBase& from, float* to, index_t stride) const {
    for (index_t r = start; r < rows_;) {
      const index_t first = r;
      r += with_tile_rows(rows_ - first, [&](auto rows) {
        const ProductTerm terms[2] = {
            {m_.k_t + first, stride_, state, kPanel, run_.shape.dim_k},
            {m_.lower + start * stride_ + first, stride_, to + start * stride, stride, first - start}};
        ProductBase base = from_row(from, first);
        if (state != nullptr) base.scale_by_row = m_.prefix + first;
        solve_tile<rows.value, Vectors>(state != nullptr ? terms : terms + 1, state != nullptr ? 2 : 1, base,
                                        m_.lower + first * stride_ + first, stride_, m_.beta + first, 0, to + first * stride,
                                        stride);
      });
    }
  }

  const LevelRun& run_;
  const Spec& spec_;
  const LevelMemory& m_;
  const index_t stride_, dim_, shift_;   // of the chunk's tables, of rows; log2 of the chunk
  const bool in_place_;
  TaskPlace place_{};
  ChunkPlace at_{};
  index_t group_ = 1, first_ = 0;
  index_t rows_ = 0, number_ = 0;                    // of the chunk: tokens padded to whole vectors; which one since token 0
  index_t live_[kMaxLevels] = {}, live_count_ = 0;   // bits of number_
  index_t loaded_q_ = -1, loaded_k_ = -1;
  float total_ = 1.f;
  bool last_ = false, by_transition_ = false;
};

// Twice those of a single state, because fewer levels are then live; the tables of a chunk grow with its square.
inline constexpr index_t kLevelChunk = 64;

inline RecurrentPlan plan_levels(const LevelRun& run, const RecurrentOptions<float>& options, const RecurrentKind& kind) {
  const index_t chunk = options.chunk != 0 ? options.chunk : kLevelChunk;
  const index_t kept = std::max<index_t>(run.levels - bits_of(chunk) + 1, 1);
  const auto few = [&] {
    return longest_sequence(run.shape, options.cu_len) <= form_limits(kind, run.shape.dim_k, run.shape.dim_v).step_up_to;
  };
  const bool steps = run.final_levels && (options.form == RecurrentForm::step ||
                                          (options.form == RecurrentForm::automatic && few()));
  RecurrentOptions<float> asked = options;
  if (steps) asked.form = RecurrentForm::fused;   // its tasks: one state each, by itself
  RecurrentPlan plan = plan_recurrent(run, asked, kind, kept);
  if (steps) plan.form = RecurrentForm::step;
  plan.chunk = chunk;
  return plan;
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
