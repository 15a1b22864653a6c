// SPDX-License-Identifier: Apache-2.0
// A described attention problem, its poisoned tensors, and the check of one run against the reference.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "executors.hpp"
#include "fovea/attention.hpp"
#include "poison.hpp"
#include "random.hpp"
#include "tolerance.hpp"

namespace test {

using fovea::Causal;
using fovea::Regime;
using fovea::Window;

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

enum class Layout { bshd, bhsd, packed_qkv, interleaved_kv, padded };
// A bias or a keep mask: absent, written out in full, or with one axis of extent 1.
enum class Share { absent, full, sequences, heads, rows };
enum class Pool { serial, threads, reversed, one_after_other };

inline const char* name(Layout x) {
  constexpr const char* names[] = {"bshd", "bhsd", "packed_qkv", "interleaved_kv", "padded"};
  return names[static_cast<int>(x)];
}
inline const char* name(Share x) {
  constexpr const char* names[] = {"no", "full", "shared by sequences", "shared by heads", "shared by rows"};
  return names[static_cast<int>(x)];
}
inline const char* name(Pool x) {
  constexpr const char* names[] = {"serial", "threads", "reversed", "one_after_other"};
  return names[static_cast<int>(x)];
}
inline const char* name(Causal x) {
  constexpr const char* names[] = {"none", "top_left", "bottom_right"};
  return names[static_cast<int>(x)];
}
inline const char* name(Regime x) {
  constexpr const char* names[] = {"automatic", "prefill", "decode", "wide_decode"};
  return names[static_cast<int>(x)];
}

struct Problem {
  std::uint64_t seed = 1;
  Layout layout = Layout::bhsd;
  bool is_ragged = false;
  index_t q_heads = 1, kv_heads = 1, dim_qk = 8, dim_v = 8;
  std::vector<index_t> len_q{4};      // [sequence]; all equal unless ragged
  std::vector<index_t> stored_k{4};   // [sequence]; all equal unless ragged
  std::vector<index_t> len_k{};       // [sequence]; empty = stored_k

  std::optional<float> scale{};
  float q_spread = 1;   // standard deviation of the queries
  Causal causal = Causal::none;
  Window window{};
  float softcap = 0;
  std::vector<index_t> q_offset{};
  bool alibi = false, sink = false, lse = true;
  Share bias = Share::absent, keep = Share::absent;
  bool bias_masks = false;   // a quarter of the bias is -inf
  bool nan_in_live_key = false, nan_in_live_value = false;

  Regime regime = Regime::automatic;
  int lanes = 1;
  Pool pool = Pool::serial;

  std::size_t sequences() const { return len_q.size(); }
  index_t used_k(std::size_t s) const { return len_k.empty() ? stored_k[s] : len_k[s]; }
  index_t position(std::size_t s, index_t i) const {
    if (!q_offset.empty()) return i + q_offset[s];
    return causal == Causal::bottom_right ? i + used_k(s) - len_q[s] : i;
  }
  // Pairs of query and stored key, times what a pair costs.
  double flop() const {
    double pairs = 0;
    for (std::size_t s = 0; s < sequences(); ++s) pairs += static_cast<double>(len_q[s]) * static_cast<double>(used_k(s));
    return 2 * pairs * static_cast<double>(q_heads) * static_cast<double>(dim_qk + dim_v);
  }
};

inline std::string list(const std::vector<index_t>& values) {
  std::string text = "{";
  for (index_t value : values) text += (text.size() > 1 ? "," : "") + std::to_string(value);
  return text + "}";
}

inline std::string describe(const Problem& p) {
  char text[512];
  std::snprintf(text, sizeof text, "seed %llu, %s%s, heads %td/%td, dims %td/%td, len_q %s, stored_k %s, len_k %s, ",
                static_cast<unsigned long long>(p.seed), name(p.layout), p.is_ragged ? " ragged" : "", p.q_heads, p.kv_heads,
                p.dim_qk, p.dim_v, list(p.len_q).c_str(), list(p.stored_k).c_str(), list(p.len_k).c_str());
  std::string all = text;
  std::snprintf(text, sizeof text,
                "scale %s, q_spread %g, causal %s, window %td..%td, softcap %g, q_offset %s, alibi %d, sink %d, ",
                p.scale ? std::to_string(*p.scale).c_str() : "default", double{p.q_spread}, name(p.causal), p.window.left,
                p.window.right, double{p.softcap}, list(p.q_offset).c_str(), p.alibi, p.sink);
  all += text;
  std::snprintf(text, sizeof text, "lse %d, bias %s%s, keep %s, live NaN in key %d value %d, regime %s, lanes %d %s", p.lse,
                name(p.bias), p.bias_masks ? " with -inf" : "", name(p.keep), p.nan_in_live_key, p.nan_in_live_value,
                name(p.regime), p.lanes, name(p.pool));
  return all + text;
}

// A mask or bias [sequence | 1, q_head | 1, len_q | 1, len_k].
template <class T>
struct Dense4 {
  std::vector<T> values;
  std::array<index_t, 4> extent{};

  fovea::View<const T, 4> view() const {
    if (values.empty()) return {};
    return {values.data(), extent, {extent[1] * extent[2] * extent[3], extent[2] * extent[3], extent[3], 1}};
  }
  std::size_t index(index_t s, index_t h, index_t i, index_t j) const {
    const index_t row = (s % extent[0] * extent[1] + h % extent[1]) * extent[2] + i % extent[2];
    return static_cast<std::size_t>(row * extent[3] + j);
  }
  T& at(index_t s, index_t h, index_t i, index_t j) { return values[index(s, h, i, j)]; }
  const T& at(index_t s, index_t h, index_t i, index_t j) const { return values[index(s, h, i, j)]; }
};

// The tensors of a problem. Whatever no row may read is NaN: gaps between rows, slots beyond a sequence's keys, K and V of
// keys that every row of their kv head masks, bias beyond the keys in use.
class Instance {
 public:
  explicit Instance(const Problem& problem) : p(problem), random_(problem.seed) {
    place();
    fill_masks();
    fill_tensors();
    for (index_t h = 0; h < p.q_heads; ++h) {
      if (p.alibi) slopes_.push_back(random_.pick({0.f, 0.01f, 0.125f, 0.5f, -0.02f}));
      if (p.sink) sinks_.push_back(random_.uniform(-3.f, 4.f));
    }
  }
  Instance(const Instance&) = delete;
  Instance& operator=(const Instance&) = delete;

  // The mask's definition in one place that shares no line with the reference.
  bool sees(std::size_t s, index_t head, index_t i, index_t j) const {
    const index_t distance = j - p.position(s, i);   // > 0: the key lies ahead
    const auto sequence = static_cast<index_t>(s);
    if (j >= p.used_k(s)) return false;
    if (p.causal != Causal::none && distance > 0) return false;
    if (p.window.left >= 0 && -distance > p.window.left) return false;
    if (p.window.right >= 0 && distance > p.window.right) return false;
    if (p.keep != Share::absent && keep_.at(sequence, head, i, j) == 0) return false;
    return p.bias == Share::absent || bias_.at(sequence, head, i, j) != -kInfinity;
  }

  AttentionOptions options() const {
    AttentionOptions o;
    o.scale = p.scale;
    o.causal = p.causal;
    o.window = p.window;
    o.softcap = p.softcap;
    o.q_offset = p.q_offset;
    o.len_k = p.len_k;
    o.cu_len_q = cu_q_;
    o.cu_len_k = cu_k_;
    o.alibi_slopes = slopes_;
    o.sink = sinks_;
    o.bias = bias_.view();
    o.keep = keep_.view();
    o.regime = p.regime;
    return o;
  }

  fovea::AttentionShape shape() const {
    return {q.extent[0], p.q_heads, p.kv_heads, q.extent[2], k.extent[2], p.dim_qk, p.dim_v};
  }

  Expected expected() const { return expect(q, k, v, options()); }

  const Problem p;
  Tensor<float> q, k, v;

 private:
  index_t total(const std::vector<index_t>& lens) const {
    return p.is_ragged ? std::accumulate(lens.begin(), lens.end(), index_t{0}) : lens[0];
  }

  static Tensor<float> padded(Poisoned& store, index_t batch, index_t heads, index_t len, index_t dim) {
    const index_t head = dim + 3, pos = heads * head + 5, whole = len * pos + 7;
    store = Poisoned(batch * whole);
    return {store.data(), {batch, heads, len, dim}, {whole, head, pos, 1}};
  }

  void place() {
    const auto sequences = static_cast<index_t>(p.sequences());
    const index_t batch = p.is_ragged ? 1 : sequences, len_q = total(p.len_q), len_k = total(p.stored_k);
    const auto dense = [&](Poisoned& store, index_t heads, index_t len, index_t dim) {
      if (p.layout == Layout::padded) return padded(store, batch, heads, len, dim);
      store = Poisoned(batch * heads * len * dim);
      return p.layout == Layout::bhsd ? fovea::bhsd(store.data(), batch, heads, len, dim)
                                      : fovea::bshd(store.data(), batch, len, heads, dim);
    };
    if (p.layout == Layout::packed_qkv) {
      q_store_ = Poisoned(batch * len_q * (p.q_heads + 2 * p.kv_heads) * p.dim_qk);
      const auto views = fovea::packed_qkv(q_store_.data(), batch, len_q, p.q_heads, p.kv_heads, p.dim_qk);
      q = views.q, k = views.k, v = views.v;
    } else {
      q = dense(q_store_, p.q_heads, len_q, p.dim_qk);
      if (p.layout == Layout::interleaved_kv) {
        k_store_ = Poisoned(2 * batch * len_k * p.kv_heads * p.dim_qk);
        const auto views = fovea::interleaved_kv(k_store_.data(), batch, len_k, p.kv_heads, p.dim_qk);
        k = views.k, v = views.v;
      } else {
        k = dense(k_store_, p.kv_heads, len_k, p.dim_qk);
        v = dense(v_store_, p.kv_heads, len_k, p.dim_v);
      }
    }
    if (p.is_ragged) {
      cu_q_.push_back(0), cu_k_.push_back(0);
      for (std::size_t s = 0; s < p.sequences(); ++s) {
        cu_q_.push_back(cu_q_[s] + p.len_q[s]);
        cu_k_.push_back(cu_k_[s] + p.stored_k[s]);
      }
    }
  }

  template <class T, class Draw>
  void fill_mask(Dense4<T>& mask, Share share, T beyond, Draw draw) {
    if (share == Share::absent) return;
    const index_t longest_q = *std::max_element(p.len_q.begin(), p.len_q.end());
    const index_t longest_k = *std::max_element(p.stored_k.begin(), p.stored_k.end());
    mask.extent = {share == Share::sequences ? 1 : static_cast<index_t>(p.sequences()),
                   share == Share::heads ? 1 : p.q_heads, share == Share::rows ? 1 : longest_q, longest_k};
    const index_t count = mask.extent[0] * mask.extent[1] * mask.extent[2] * mask.extent[3];
    // One element at least, so that an empty problem still passes a mask.
    mask.values.assign(static_cast<std::size_t>(std::max(count, index_t{1})), beyond);
    for (std::size_t s = 0; s < p.sequences(); ++s) {
      for (index_t h = 0; h < p.q_heads; ++h) {
        for (index_t i = 0; i < p.len_q[s]; ++i) {
          for (index_t j = 0; j < p.used_k(s); ++j) mask.at(static_cast<index_t>(s), h, i, j) = draw();
        }
      }
    }
  }

  void fill_masks() {
    fill_mask(bias_, p.bias, kNan, [&] { return p.bias_masks && random_.one_in(4) ? -kInfinity : 2 * random_.normal(); });
    fill_mask(keep_, p.keep, std::uint8_t{255}, [&] { return random_.pick<std::uint8_t>({0, 0, 1, 1, 1, 2, 255}); });
  }

  void fill_tensors() {
    const index_t group = p.q_heads / p.kv_heads;
    bool wants_nan = p.nan_in_live_key || p.nan_in_live_value;
    for (std::size_t s = 0; s < p.sequences(); ++s) {
      const index_t batch = p.is_ragged ? 0 : static_cast<index_t>(s);
      const index_t first_q = p.is_ragged ? cu_q_[s] : 0, first_k = p.is_ragged ? cu_k_[s] : 0;
      for (index_t h = 0; h < p.q_heads; ++h) {
        for (index_t i = 0; i < p.len_q[s]; ++i) {
          for (index_t d = 0; d < p.dim_qk; ++d) q(batch, h, first_q + i, d) = p.q_spread * random_.normal();
        }
      }
      for (index_t h = 0; h < p.kv_heads; ++h) {
        for (index_t j = 0; j < p.used_k(s); ++j) {
          bool live = false;
          for (index_t head = h * group; head < (h + 1) * group && !live; ++head) {
            for (index_t i = 0; i < p.len_q[s] && !live; ++i) live = sees(s, head, i, j);
          }
          if (!live) {
            // Half of the dead slots hold infinities instead of NaN.
            if (j % 2 == 0) continue;
            for (index_t d = 0; d < p.dim_qk; ++d) k(batch, h, first_k + j, d) = d % 2 == 0 ? kInfinity : -kInfinity;
            for (index_t d = 0; d < p.dim_v; ++d) v(batch, h, first_k + j, d) = kInfinity;
            continue;
          }
          for (index_t d = 0; d < p.dim_qk; ++d) k(batch, h, first_k + j, d) = random_.normal();
          for (index_t d = 0; d < p.dim_v; ++d) v(batch, h, first_k + j, d) = random_.normal();
          if (wants_nan && (random_.one_in(8) || j + 1 == p.used_k(s))) {
            wants_nan = false;
            if (p.nan_in_live_key) k(batch, h, first_k + j, random_.below(p.dim_qk)) = kNan;
            if (p.nan_in_live_value) v(batch, h, first_k + j, random_.below(p.dim_v)) = kNan;
          }
        }
      }
    }
  }

  Random random_;
  Poisoned q_store_, k_store_, v_store_;
  std::vector<index_t> cu_q_, cu_k_;
  std::vector<float> slopes_, sinks_;
  Dense4<float> bias_;
  Dense4<std::uint8_t> keep_;
};

struct Pools {
  ThreadPerLane threads;
  InOrder in_order;
  Reversed reversed;
  OneThreadAfterTheOther one_after_other;

  fovea::Executor get(Pool pool, int lanes) {
    switch (pool) {
      case Pool::threads:
        return {threads, lanes};
      case Pool::reversed:
        return {reversed, lanes};
      case Pool::one_after_other:
        return {one_after_other, lanes};
      case Pool::serial:
        break;
    }
    return {in_order, lanes};
  }
};

// What a call wrote, in guarded memory.
struct Output {
  Poisoned out_store, lse_store;
  Tensor<float> out;
  View<float, 3> lse;

  Output(const Instance& x, bool with_lse) {
    const index_t batch = x.q.extent[0], heads = x.q.extent[1], len = x.q.extent[2], dim = x.p.dim_v;
    if (x.p.layout == Layout::bhsd) {
      out_store = Poisoned(batch * heads * len * dim);
      out = fovea::bhsd(out_store.data(), batch, heads, len, dim);
    } else {
      const index_t gap = x.p.layout == Layout::padded ? 5 : 0, head = dim + gap, pos = heads * head + gap;
      out_store = Poisoned(batch * len * pos);
      out = {out_store.data(), {batch, heads, len, dim}, {len * pos, head, pos, 1}};
    }
    if (!with_lse) return;
    const index_t step = x.p.layout == Layout::padded ? 2 : 1;
    lse_store = Poisoned(batch * heads * len * step);
    lse = {lse_store.data(), {batch, heads, len}, {heads * len * step, len * step, step}};
  }

  bool operator==(const Output& other) const {
    const auto same = [](const Poisoned& a, const Poisoned& b) {
      return a.everything().size_bytes() == b.everything().size_bytes() &&
             (a.everything().empty() ||
              std::memcmp(a.everything().data(), b.everything().data(), a.everything().size_bytes()) == 0);
    };
    return same(out_store, other.out_store) && same(lse_store, other.lse_store);
  }
};

// Worst element in units of its budget, and where it is.
struct Worst {
  double budgets = 0;
  std::string where{};
};

inline Worst compare(const Expected& e, Tensor<const float> out, View<const float, 3> lse) {
  Worst worst;
  const auto note = [&](double budgets, const char* what, index_t b, index_t h, index_t i, index_t d, double got,
                        double want, double budget) {
    if (!(budgets > worst.budgets)) return;
    char text[256];
    std::snprintf(text, sizeof text, "%s[batch %td, head %td, pos %td, dim %td] = %.9g, expected %.9g +- %.3g", what, b, h,
                  i, d, got, want, budget);
    worst = {budgets, text};
  };
  for (index_t b = 0; b < out.extent[0]; ++b) {
    for (index_t h = 0; h < out.extent[1]; ++h) {
      for (index_t i = 0; i < out.extent[2]; ++i) {
        const auto row = static_cast<std::size_t>((b * e.q_heads + h) * e.total + i);
        for (index_t d = 0; d < e.dim_v; ++d) {
          const std::size_t n = row * static_cast<std::size_t>(e.dim_v) + static_cast<std::size_t>(d);
          const double got = out(b, h, i, d);
          note(in_budgets(got, e.out[n], e.out_error[n]), "out", b, h, i, d, got, e.out[n], e.out_error[n]);
        }
        if (!lse) continue;
        const double got = lse(b, h, i);
        note(in_budgets(got, e.lse[row], e.lse_error[row]), "lse", b, h, i, 0, got, e.lse[row], e.lse_error[row]);
      }
    }
  }
  return worst;
}

// Runs a problem the long way: plan, poisoned workspace of exactly the announced size, guarded output.
// Returns "" or what is wrong with the call itself; whether the numbers are right is compare's question.
inline std::string run(const Instance& x, Output& output, int lanes, Pool pool) {
  Pools pools;
  AttentionOptions options = x.options();
  options.lse = output.lse;
  options.executor = pools.get(pool, lanes);
  fovea::Plan plan;
  if (const fovea::Status status = fovea::make_plan(plan, x.shape(), options); !status.ok()) {
    return std::string("make_plan: ") + status.message();
  }
  PoisonedBytes workspace(fovea::workspace_bytes(plan, lanes), x.p.seed % 3 == 0 ? 4 : 0);
  options.workspace = workspace.bytes();
  if (const fovea::Status status = fovea::attention(plan, x.q, x.k, x.v, output.out, options); !status.ok()) {
    return std::string("attention: ") + status.message();
  }
  if (!workspace.guards_intact()) return "wrote outside the workspace";
  if (const index_t at = first_overwritten(output.out_store, {output.out}); at >= 0) {
    return "wrote between or beside the rows of out, float " + std::to_string(at);
  }
  if (output.lse) {
    if (const index_t at = first_overwritten(output.lse_store, {output.lse}); at >= 0) {
      return "wrote between or beside the elements of lse, float " + std::to_string(at);
    }
  }
  return "";
}

inline std::string check(const Instance& x) {
  Output output(x, x.p.lse);
  if (std::string wrong = run(x, output, x.p.lanes, x.p.pool); !wrong.empty()) return wrong;
  const Worst worst = compare(x.expected(), output.out, output.lse);
  if (worst.budgets > 1) return worst.where + " (" + std::to_string(worst.budgets) + " budgets off)";
  return "";
}

}  // namespace test
