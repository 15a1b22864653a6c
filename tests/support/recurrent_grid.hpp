// SPDX-License-Identifier: Apache-2.0
// One driver for the tests of the recurrent mechanisms: described problems, their tensors in poisoned memory, and what
// every mechanism must do whatever its recurrence is, held against its reference in double.
#pragma once
#include <algorithm>
#include <bit>
#include <climits>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <optional>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "catch_compat.hpp"
#include "executors.hpp"
#include "float_mode.hpp"
#include "fovea/core/convert.hpp"
#include "fovea/core/kv.hpp"
#include "fovea/core/recurrent.hpp"
#include "fovea/core/status.hpp"
#include "poison.hpp"
#include "random.hpp"
#include "reference/recurrent_golden.hpp"

namespace test::recurrent {

using fovea::bf16;
using fovea::Decay;
using fovea::DecayForm;
using fovea::f16;
using fovea::Format;
using fovea::HeadMap;
using fovea::index_t;
using fovea::LinearOptions;
using fovea::MlstmParameters;
using fovea::Operand;
using fovea::RecurrentForm;
using fovea::RecurrentOptions;
using fovea::Result;
using fovea::StateLayout;
using fovea::Status;
using fovea::Tensor;
using fovea::View;

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

// ------------------------------------------------------------------------------------------------------------- memory

// Where the numbers of a tensor lie. padded: token-major, gaps behind every row and token. inner2: a gap behind every
// number. reversed: heads and positions run backwards. wild: dense, but axes of extent 1 have a stride that no memory has.
enum class Placement { bhsd, bshd, padded, inner2, reversed, wild };

// A tensor of up to four axes in a plain format, in memory of exactly its size. All other bytes are ones: NaN in every
// format.
class Numbers {
 public:
  Numbers() = default;
  Numbers(std::array<index_t, 4> extent, Format format = Format::f32, Placement placement = Placement::bhsd)
      : format_(format), extent_(extent) {
    const index_t gap = placement == Placement::padded ? 3 : 0, inner = placement == Placement::inner2 ? 2 : 1;
    const auto& e = extent_;
    const index_t row = e[3] * inner + gap;
    if (placement == Placement::bshd || placement == Placement::padded) {
      const index_t token = e[1] * row + 2 * gap;
      stride_ = {e[2] * token, row, token, inner};
    } else {
      stride_ = {e[1] * e[2] * row, e[2] * row, row, inner};
    }
    index_t reach = 0;
    for (std::size_t axis = 0; axis < 4; ++axis) reach += std::max<index_t>(e[axis] - 1, 0) * stride_[axis];
    bytes_.assign(empty() ? 0 : at((reach + 1) * number()), std::byte{0xff});
    if (placement == Placement::reversed) {
      for (const std::size_t axis : {1u, 2u}) {
        first_ += std::max<index_t>(e[axis] - 1, 0) * stride_[axis];
        stride_[axis] = -stride_[axis];
      }
    }
    for (std::size_t axis = 0; axis < 4 && placement == Placement::wild; ++axis) {
      if (e[axis] <= 1) stride_[axis] = PTRDIFF_MAX / 3;
    }
  }

  // f(a, b, c, d), rounded to the format.
  template <class F>
  Numbers& fill(const F& f) {
    each([&](index_t a, index_t b, index_t c, index_t d) { put(a, b, c, d, static_cast<double>(f(a, b, c, d))); });
    return *this;
  }
  template <class F>
  void each(const F& f) const {
    for (index_t a = 0; a < extent_[0]; ++a) {
      for (index_t b = 0; b < extent_[1]; ++b) {
        for (index_t c = 0; c < extent_[2]; ++c) {
          for (index_t d = 0; d < extent_[3]; ++d) f(a, b, c, d);
        }
      }
    }
  }
  void put(index_t a, index_t b, index_t c, index_t d, double x) {
    std::byte* const to = bytes_.data() + offset(a, b, c, d);
    const auto store = [to](auto value) { std::memcpy(to, &value, sizeof value); };
    switch (format_) {
      case Format::f64:
        return store(x);
      case Format::bf16:
        return store(fovea::convert<bf16>(x));
      case Format::f16:
        return store(fovea::convert<f16>(x));
      default:
        return store(static_cast<float>(x));
    }
  }
  double get(index_t a, index_t b, index_t c, index_t d) const {
    const std::byte* const from = bytes_.data() + offset(a, b, c, d);
    const auto load = [from]<class T>(T value) {
      std::memcpy(&value, from, sizeof value);
      return fovea::convert<double>(value);
    };
    switch (format_) {
      case Format::f64:
        return load(0.);
      case Format::bf16:
        return load(bf16{});
      case Format::f16:
        return load(f16{});
      default:
        return load(0.f);
    }
  }

  const std::array<index_t, 4>& extent() const { return extent_; }
  const std::array<index_t, 4>& stride() const { return stride_; }
  Format format() const { return format_; }
  const std::vector<std::byte>& bytes() const { return bytes_; }
  bool empty() const {
    return std::any_of(extent_.begin(), extent_.end(), [](index_t extent) { return extent == 0; });
  }

  Operand operand() const {
    Operand x;
    x.data = bytes_.data() + first_ * number();
    x.format = format_;
    x.extent = extent_;
    x.stride = stride_;
    return x;
  }
  Result result() {
    Result x;
    x.data = bytes_.data() + first_ * number();
    x.format = format_;
    x.extent = extent_;
    x.stride = stride_;
    return x;
  }
  // The last axes of an f32 tensor whose first ones have extent 1.
  template <int Rank = 4>
  View<const float, Rank> floats() const {
    return cut<Rank>(reinterpret_cast<const float*>(bytes_.data()) + first_);
  }
  template <int Rank = 4>
  View<float, Rank> writable() {
    return cut<Rank>(reinterpret_cast<float*>(bytes_.data()) + first_);
  }
  // The numbers as doubles, dense.
  std::vector<double> values() const {
    std::vector<double> out;
    each([&](index_t a, index_t b, index_t c, index_t d) { out.push_back(get(a, b, c, d)); });
    return out;
  }
  bool untouched() const {
    return std::all_of(bytes_.begin(), bytes_.end(), [](std::byte b) { return b == std::byte{0xff}; });
  }
  bool gaps_intact() const {
    std::vector<bool> owned(bytes_.size());
    each([&](index_t a, index_t b, index_t c, index_t d) {
      for (index_t n = 0; n < number(); ++n) owned[at(offset(a, b, c, d) + n)] = true;
    });
    for (std::size_t n = 0; n < owned.size(); ++n) {
      if (!owned[n] && bytes_[n] != std::byte{0xff}) return false;
    }
    return true;
  }

 private:
  index_t number() const { return fovea::row_bytes(format_, 1); }
  index_t offset(index_t a, index_t b, index_t c, index_t d) const {
    const index_t index[] = {a, b, c, d};
    index_t sum = first_;
    for (std::size_t axis = 0; axis < 4; ++axis) sum += index[axis] == 0 ? 0 : index[axis] * stride_[axis];
    return sum * number();
  }
  template <int Rank, class T>
  View<T, Rank> cut(T* data) const {
    View<T, Rank> view{empty() ? nullptr : data, {}, {}};
    for (int axis = 0; axis < Rank; ++axis) {
      view.extent[std::size_t(axis)] = extent_[std::size_t(axis + 4 - Rank)];
      view.stride[std::size_t(axis)] = stride_[std::size_t(axis + 4 - Rank)];
    }
    return view;
  }

  Format format_ = Format::f32;
  std::array<index_t, 4> extent_{}, stride_{};
  index_t first_ = 0;   // of element 0, 0, 0, 0
  std::vector<std::byte> bytes_;
};

// The same numbers as doubles, dense, for the reference.
class Exact {
 public:
  Exact() = default;
  explicit Exact(const Numbers& x) : extent_(x.extent()), data_(x.values()) {}
  explicit Exact(std::array<index_t, 4> extent)
      : extent_(extent), data_(at(extent[0] * extent[1] * extent[2] * extent[3])) {}

  template <int Rank = 4>
  View<const double, Rank> view() const {
    return cut<Rank>(data_.data());
  }
  template <int Rank = 4>
  View<double, Rank> writable() {
    return cut<Rank>(data_.data());
  }
  std::vector<double>& data() { return data_; }
  const std::vector<double>& data() const { return data_; }
  const std::array<index_t, 4>& extent() const { return extent_; }
  double operator()(index_t a, index_t b, index_t c, index_t d) const { return view()(a, b, c, d); }

 private:
  template <int Rank, class T>
  View<T, Rank> cut(T* data) const {
    View<T, Rank> view{data, {}, {}};
    index_t step = 1;
    for (std::size_t axis = 4; axis-- > 4 - std::size_t(Rank);) {
      view.extent[axis + std::size_t(Rank) - 4] = extent_[axis];
      view.stride[axis + std::size_t(Rank) - 4] = step;
      step *= extent_[axis];
    }
    return view;
  }
  std::array<index_t, 4> extent_{};
  std::vector<double> data_;
};

// ----------------------------------------------------------------------------------------------------------- mechanisms

// What a mechanism may be given; Real is float for the library, double for the reference.
template <class Real>
using OperandOf = std::conditional_t<std::is_same_v<Real, float>, Operand, Tensor<const double>>;
template <class Real>
using ResultOf = std::conditional_t<std::is_same_v<Real, float>, Result, Tensor<double>>;

template <class Real>
struct Arguments {
  OperandOf<Real> q, k, v;
  ResultOf<Real> out;
  Decay<Real> decay{};
  View<const Real, 4> beta{}, dt{}, input_gate{}, forget_gate{};   // [batch, state_head, pos, 1 | dim_v]
  View<const Real, 4> rate{}, kappa{};                             // [batch, state_head, pos, dim_k]
  View<const Real, 2> bonus{}, skip{};                             // [state_head, dim_k], [state_head, 1 | dim_v]
  std::span<const Real> per_head{};                                // [state_head]
  View<const Real, 3> initial_n{};                                 // [sequence, state_head, dim_k]
  View<Real, 3> final_n{};
  View<const Real, 2> initial_m{};   // [sequence, state_head]
  View<Real, 2> final_m{};
  std::vector<index_t> first_pos{};   // [sequence]  tokens before this call; none = 0
  RecurrentOptions<Real> options{};
};

enum class Gates { none, token, channel };

struct Mechanism {
  const char* name;
  std::function<Status(const Arguments<float>&)> run;
  std::function<void(const Arguments<double>&)> reference;
  Gates gates = Gates::none;
  bool unit_keys = false;   // keys of length 1: the delta family
  bool positive = false;    // queries and keys are features, all above 0
  bool carries_n = false, carries_m = false;
  double (*per_head)(index_t head) = nullptr;
  bool causal = true;   // false: a sequence cannot be split
  std::function<index_t(index_t dim_k)> features{};   // rows of a state, where a feature map with values >= 0 makes them
};

// ------------------------------------------------------------------------------------------------------------- problems

struct Heads {
  index_t q = 1, k = 1, v = 1;
  index_t states() const { return std::max(k, v); }
  index_t outs() const { return std::max(q, states()); }
};

// mild: a token keeps a third to all of the state. slow: nearly all, sometimes exactly all. resets: mild ones among 0,
// -30, -88, -100 and -inf. strong: none above -5.
enum class Gating { mild, slow, resets, strong };
enum class Betas { unit, two, corners };   // 0 to 1, 0 to 2, exactly 0, 1 or 2

struct Case {
  std::uint64_t seed = 1;
  index_t batch = 1, len = 45;
  Heads heads{};
  index_t dim_k = 4, dim_v = 3;
  HeadMap map = HeadMap::blocks;
  std::vector<index_t> lengths{};   // ragged: batch 1, len their sum and what no sequence owns
  index_t unowned = 0;
  Format format = Format::f32, out_format = Format::f32;
  Placement placement = Placement::bhsd, gate_placement = Placement::bhsd, state_placement = Placement::bhsd;
  StateLayout layout = StateLayout::k_first;
  bool initial = true;
  Gating gating = Gating::mild;
  DecayForm decay_form = DecayForm::log;
  std::array<bool, 4> shared{};   // axes of the gates that have extent 1
  Betas betas = Betas::two;
  bool wide_beta = false, wide_skip = false;   // a number per value channel
  std::optional<double> scale{};

  index_t sequences() const { return lengths.empty() ? batch : static_cast<index_t>(lengths.size()); }
};

inline std::string describe(const Case& c) {
  std::ostringstream text;
  text << "seed " << c.seed << ", batch " << c.batch << ", len " << c.len << ", heads " << c.heads.q << "/" << c.heads.k
       << "/" << c.heads.v << (c.map == HeadMap::tiled ? " tiled" : "") << ", dims " << c.dim_k << "/" << c.dim_v;
  if (!c.lengths.empty()) {
    text << ", ragged";
    for (const index_t len : c.lengths) text << " " << len;
    text << " unowned " << c.unowned;
  }
  text << ", " << fovea::name_of(c.format) << " to " << fovea::name_of(c.out_format) << ", placement "
       << static_cast<int>(c.placement) << "/" << static_cast<int>(c.gate_placement) << "/"
       << static_cast<int>(c.state_placement) << (c.layout == StateLayout::v_first ? ", v first" : "")
       << (c.initial ? "" : ", no initial state") << ", gating " << static_cast<int>(c.gating)
       << (c.decay_form == DecayForm::alpha ? " alpha" : "") << ", shared " << c.shared[0] << c.shared[1] << c.shared[2]
       << c.shared[3] << ", betas " << static_cast<int>(c.betas) << (c.wide_beta ? " wide" : "")
       << (c.wide_skip ? ", wide skip" : "");
  if (c.scale) text << ", scale " << *c.scale;
  return text.str();
}

// What a call writes.
struct Answer {
  Numbers out, state, n, m;

  bool operator==(const Answer& other) const {
    return out.bytes() == other.out.bytes() && state.bytes() == other.state.bytes() && n.bytes() == other.n.bytes() &&
           m.bytes() == other.m.bytes();
  }
  bool untouched() const { return out.untouched() && state.untouched() && n.untouched() && m.untouched(); }
  bool gaps_intact() const { return out.gaps_intact() && state.gaps_intact() && n.gaps_intact() && m.gaps_intact(); }
};
struct Expected {
  Exact out, state, n, m;
};

class Problem {
 public:
  Case c;
  Numbers q, k, v, gate, beta, dt, rate, kappa, input_gate, forget_gate, bonus, skip;
  Numbers initial, initial_n, initial_m;
  std::vector<float> per_head;
  std::vector<index_t> cu_len;
  index_t state_rows;

  Problem(const Mechanism& mechanism, const Case& described)
      : c(described), state_rows(mechanism.features ? mechanism.features(c.dim_k) : c.dim_k) {
    if (!c.lengths.empty()) {
      cu_len.push_back(0);
      for (const index_t len : c.lengths) cu_len.push_back(cu_len.back() + len);
      c.batch = 1;
      c.len = cu_len.back() + c.unowned;
    }
    Random random(c.seed);
    const auto normal = [&](auto...) { return random.normal(); };
    const auto uniform = [&](float low, float high) {
      return [&random, low, high](auto...) { return random.uniform(low, high); };
    };
    const auto feature = [&](auto...) { return 0.1f + std::abs(random.normal()); };
    const index_t states = c.heads.states();
    const auto tokens = [&](Numbers& x, index_t heads, index_t dim, const auto& f) {
      x = owned_only(Numbers({c.batch, heads, c.len, dim}, c.format, c.placement), f);
    };
    if (mechanism.positive) {
      tokens(q, c.heads.q, c.dim_k, feature);
      tokens(k, c.heads.k, c.dim_k, feature);
    } else {
      tokens(q, c.heads.q, c.dim_k, normal);
      tokens(k, c.heads.k, c.dim_k, normal);
    }
    if (mechanism.unit_keys) normalise(k);
    tokens(v, c.heads.v, c.dim_v, normal);
    const auto gates = [&](Numbers& x, index_t dim, bool may_share, const auto& f) {
      const auto extent = [&](std::size_t axis, index_t n) {
        return may_share && c.shared[axis] ? std::min<index_t>(n, 1) : n;
      };
      Numbers made({extent(0, c.batch), extent(1, states), extent(2, c.len), extent(3, dim)}, Format::f32, c.gate_placement);
      x = c.shared[2] && may_share ? made.fill(f) : owned_only(made, f);
    };
    gates(gate, mechanism.gates == Gates::channel ? c.dim_k : 1, true, [&](auto...) { return next_gate(random); });
    gates(beta, c.wide_beta ? c.dim_v : 1, true, [&](auto...) { return next_beta(random); });
    gates(dt, 1, true, uniform(0.f, 0.5f));
    gates(input_gate, 1, true, normal);
    gates(forget_gate, 1, true, normal);
    gates(rate, c.dim_k, false, uniform(0.f, 1.f));
    gates(kappa, c.dim_k, false, normal);
    normalise(kappa);
    bonus = Numbers({1, 1, states, c.dim_k}, Format::f32, c.gate_placement);
    bonus.fill(normal);
    skip = Numbers({1, 1, states, c.wide_skip ? c.dim_v : 1}, Format::f32, c.gate_placement);
    skip.fill(normal);
    for (index_t h = 0; h < states && mechanism.per_head != nullptr; ++h) {
      per_head.push_back(static_cast<float>(mechanism.per_head(h)));
    }
    initial = like_state().fill(normal);
    initial_n = Numbers({1, c.sequences(), states, state_rows}, Format::f32, c.state_placement);
    const bool sums_features = mechanism.positive || mechanism.features;
    initial_n.fill(sums_features ? std::function<float(index_t, index_t, index_t, index_t)>(feature) : normal);
    initial_m = Numbers({1, 1, c.sequences(), states}, Format::f32, c.state_placement);
    initial_m.fill(normal);
  }

  Numbers like_state() const {
    const bool v_first = c.layout == StateLayout::v_first;
    return Numbers({c.sequences(), c.heads.states(), v_first ? c.dim_v : state_rows, v_first ? state_rows : c.dim_v},
                   Format::f32, c.state_placement);
  }
  Answer answer(const Mechanism& mechanism) const {
    Answer a{Numbers({c.batch, c.heads.outs(), c.len, c.dim_v}, c.out_format, c.placement), like_state(), {}, {}};
    if (mechanism.carries_n) a.n = Numbers(initial_n.extent(), Format::f32, c.state_placement);
    if (mechanism.carries_m) a.m = Numbers(initial_m.extent(), Format::f32, c.state_placement);
    return a;
  }

  Arguments<float> arguments(const Mechanism& mechanism, Answer& a) const {
    Arguments<float> x{.q = q.operand(), .k = k.operand(), .v = v.operand(), .out = a.out.result()};
    x.decay = {gate.floats(), c.decay_form};
    x.beta = beta.floats();
    x.dt = dt.floats();
    x.input_gate = input_gate.floats();
    x.forget_gate = forget_gate.floats();
    x.rate = rate.floats();
    x.kappa = kappa.floats();
    x.bonus = bonus.floats<2>();
    x.skip = skip.floats<2>();
    x.per_head = per_head;
    if (mechanism.carries_n) {
      if (c.initial) x.initial_n = initial_n.floats<3>();
      x.final_n = a.n.writable<3>();
    }
    if (mechanism.carries_m) {
      if (c.initial) x.initial_m = initial_m.floats<2>();
      x.final_m = a.m.writable<2>();
    }
    if (c.scale) x.options.scale = static_cast<float>(*c.scale);
    x.options.head_map = c.map;
    x.options.layout = c.layout;
    if (c.initial) x.options.initial_state = initial.floats();
    x.options.final_state = a.state.writable();
    x.options.cu_len = cu_len;
    return x;
  }

  Expected expected(const Mechanism& mechanism) const {
    Expected e{Exact({c.batch, c.heads.outs(), c.len, c.dim_v}), Exact(like_state().extent()), {}, {}};
    const Exact exact_q(q), exact_k(k), exact_v(v), exact_gate(gate), exact_beta(beta), exact_dt(dt), exact_i(input_gate),
        exact_f(forget_gate), exact_rate(rate), exact_kappa(kappa), exact_bonus(bonus), exact_skip(skip),
        exact_initial(initial), exact_n(initial_n), exact_m(initial_m);
    const std::vector<double> exact_heads(per_head.begin(), per_head.end());
    Arguments<double> x{.q = exact_q.view(), .k = exact_k.view(), .v = exact_v.view(), .out = e.out.writable()};
    x.decay = {exact_gate.view(), c.decay_form};
    x.beta = exact_beta.view();
    x.dt = exact_dt.view();
    x.input_gate = exact_i.view();
    x.forget_gate = exact_f.view();
    x.rate = exact_rate.view();
    x.kappa = exact_kappa.view();
    x.bonus = exact_bonus.view<2>();
    x.skip = exact_skip.view<2>();
    x.per_head = exact_heads;
    if (mechanism.carries_n) {
      e.n = Exact(initial_n.extent());
      if (c.initial) x.initial_n = exact_n.view<3>();
      x.final_n = e.n.writable<3>();
    }
    if (mechanism.carries_m) {
      e.m = Exact(initial_m.extent());
      if (c.initial) x.initial_m = exact_m.view<2>();
      x.final_m = e.m.writable<2>();
    }
    if (c.scale) x.options.scale = static_cast<float>(*c.scale);
    x.options.head_map = c.map;
    x.options.layout = c.layout;
    if (c.initial) x.options.initial_state = exact_initial.view();
    x.options.final_state = e.state.writable();
    x.options.cu_len = cu_len;
    mechanism.reference(x);
    return e;
  }

  index_t owned() const { return cu_len.empty() ? c.len : cu_len.back(); }

 private:
  // Positions that belong to no sequence stay poison.
  template <class F>
  Numbers owned_only(Numbers x, const F& f) const {
    x.each([&](index_t a, index_t b, index_t t, index_t d) {
      const double value = static_cast<double>(f(a, b, t, d));
      if (t < owned()) x.put(a, b, t, d, value);
    });
    return x;
  }
  void normalise(Numbers& x) const {
    const auto& e = x.extent();
    for (index_t a = 0; a < e[0]; ++a) {
      for (index_t b = 0; b < e[1]; ++b) {
        for (index_t t = 0; t < owned(); ++t) {
          double squares = 0;
          for (index_t d = 0; d < e[3]; ++d) squares += x.get(a, b, t, d) * x.get(a, b, t, d);
          for (index_t d = 0; d < e[3]; ++d) x.put(a, b, t, d, x.get(a, b, t, d) / std::sqrt(squares));
        }
      }
    }
  }
  double next_gate(Random& random) const {
    const double mild = -0.05 - random.uniform(), slow = -1e-3 * random.uniform();
    double g = mild;
    if (c.gating == Gating::slow) g = random.pick({slow, slow, slow, slow, 0., -0., -1e-30});
    if (c.gating == Gating::resets) g = random.pick({mild, mild, mild, mild, slow, -1e-7, 0., -30., -88., -100., -HUGE_VAL});
    if (c.gating == Gating::strong) g = -5 - 95 * random.uniform();
    return c.decay_form == DecayForm::log ? g : std::exp(g);
  }
  double next_beta(Random& random) const {
    const double unit = random.uniform();
    if (c.betas == Betas::corners) return random.pick({0., 1., 2.});
    return c.betas == Betas::two ? 2 * unit : unit;
  }
};

// ------------------------------------------------------------------------------------------------------------- accuracy

// Half a unit of the last place of a stored output, relative.
inline double unit_of(Format format) {
  return format == Format::bf16 ? 0x1p-8 : format == Format::f16 ? 0x1p-11 : format == Format::f32 ? 0x1p-24 : 0;
}

inline constexpr double kRelativeError = 1e-5;   // root mean square, fp32 against double, within one head
inline constexpr double kFlushed = 1e-30;        // smaller numbers may be flushed to zero

// Root mean square of the difference relative to that of the expected numbers; a NaN or a difference where zeros are due is
// infinitely far.
class Distance {
 public:
  void see(double got, double expected) {
    const double apart = std::abs(got - expected);
    if (std::isnan(apart)) is_nan_ = true;
    if (apart > kFlushed) difference_ += apart * apart;
    size_ += expected * expected;
    ++count_;
  }
  double value() const {
    if (is_nan_) return HUGE_VAL;
    // A few numbers may all be what is left of sums of numbers around 1 that cancelled.
    const double least = count_ < 16 ? 0.01 * static_cast<double>(count_) : 0;
    return difference_ == 0 ? 0 : std::sqrt(difference_ / std::max(size_, least));
  }

 private:
  double difference_ = 0, size_ = 0;
  index_t count_ = 0;
  bool is_nan_ = false;
};

// The worst head of an output.
inline double distance(const Numbers& got, const Exact& expected, index_t positions) {
  double worst = 0;
  const auto& e = got.extent();
  for (index_t a = 0; a < e[0]; ++a) {
    for (index_t b = 0; b < e[1]; ++b) {
      Distance head;
      for (index_t c = 0; c < positions; ++c) {
        for (index_t d = 0; d < e[3]; ++d) head.see(got.get(a, b, c, d), expected(a, b, c, d));
      }
      worst = std::max(worst, head.value());
    }
  }
  return worst;
}

struct Error {
  double out = 0, state = 0;
};

// m may be any number (the outputs do not depend on it), so where there is one S e^m and n e^m are compared.
inline Error error_of(const Problem& problem, const Mechanism& mechanism, const Answer& got, const Expected& expected) {
  Error error{distance(got.out, expected.out, problem.owned()), 0};
  const auto& e = got.state.extent();
  for (index_t s = 0; s < e[0]; ++s) {
    for (index_t h = 0; h < e[1]; ++h) {
      const double got_unit = mechanism.carries_m ? std::exp(got.m.get(0, 0, s, h)) : 1;
      const double expected_unit = mechanism.carries_m ? std::exp(expected.m(0, 0, s, h)) : 1;
      Distance state, n;
      for (index_t i = 0; i < e[2]; ++i) {
        for (index_t j = 0; j < e[3]; ++j)
          state.see(got_unit * got.state.get(s, h, i, j), expected_unit * expected.state(s, h, i, j));
      }
      for (index_t i = 0; mechanism.carries_n && i < got.n.extent()[3]; ++i) {
        n.see(got_unit * got.n.get(0, s, h, i), expected_unit * expected.n(0, s, h, i));
      }
      error.state = std::max({error.state, state.value(), n.value()});
    }
  }
  return error;
}

// ----------------------------------------------------------------------------------------------------------------- runs

enum class Pool { serial, threads, reversed, one_after_other };

struct How {
  RecurrentForm form = RecurrentForm::automatic;
  index_t chunk = 0;
  int lanes = 1;
  Pool pool = Pool::serial;
};

inline std::string describe(const How& how) {
  std::ostringstream text;
  text << name_of(how.form) << " chunk " << how.chunk << " lanes " << how.lanes << " pool " << static_cast<int>(how.pool);
  return text.str();
}

inline const std::vector<How>& all_forms() {
  using enum RecurrentForm;
  static const std::vector<How> list = {{automatic},   {step},         {fused},       {chunked},
                                        {chunked, 8},  {chunked, 16},  {chunked, 24}, {chunked, 32},
                                        {chunked, 64}, {chunked, 128}, {chunked, 256}};
  return list;
}

// f(executor) with the pool that `how` names.
template <class F>
auto with_executor(const How& how, const F& f) {
  ThreadPerLane threads;
  Reversed reversed;
  OneThreadAfterTheOther one_after_other;
  InOrder in_order;
  switch (how.pool) {
    case Pool::threads:
      return f(fovea::Executor(threads, how.lanes));
    case Pool::reversed:
      return f(fovea::Executor(reversed, how.lanes));
    case Pool::one_after_other:
      return f(fovea::Executor(one_after_other, how.lanes));
    default:
      return how.lanes == 1 ? f(fovea::Executor()) : f(fovea::Executor(in_order, how.lanes));
  }
}

inline Status call(const Mechanism& mechanism, Arguments<float> x, const How& how) {
  return with_executor(how, [&](const fovea::Executor& executor) {
    x.options.executor = executor;
    x.options.form = how.form;
    x.options.chunk = how.chunk;
    return mechanism.run(x);
  });
}

inline Answer answer_of(const Mechanism& mechanism, const Problem& problem, const How& how) {
  Answer a = problem.answer(mechanism);
  const Status status = call(mechanism, problem.arguments(mechanism, a), how);
  INFO(status.message());
  REQUIRE(status.ok());
  return a;
}

// One call against the reference. A state is one sample where outputs are many, so only they may be asked for more digits
// than kRelativeError has. Without FMA each of its steps rounds twice: a state of one cell has been seen at 1.4e-5 then.
inline Answer check(const Mechanism& mechanism, const Problem& problem, const Expected& expected, const How& how,
                    double allowed = kRelativeError) {
  const Answer a = answer_of(mechanism, problem, how);
  const Error error = error_of(problem, mechanism, a, expected);
  const double state_allowed = std::max(allowed, kRelativeError) * (fovea::kFusedFma ? 1 : 2);
  if (!(error.out <= allowed + unit_of(problem.c.out_format)) || !(error.state <= state_allowed) ||
      !a.gaps_intact()) {
    INFO(mechanism.name << ": " << describe(problem.c) << ", " << describe(how));
    CHECK(error.out <= allowed + unit_of(problem.c.out_format));
    CHECK(error.state <= state_allowed);
    CHECK(a.gaps_intact());
  }
  for (index_t b = 0; b < a.out.extent()[0]; ++b) {   // what no sequence owns is not written
    for (index_t h = 0; h < a.out.extent()[1]; ++h) {
      for (index_t t = problem.owned(); t < problem.c.len; ++t) {
        if (!std::isnan(a.out.get(b, h, t, 0))) FAIL_CHECK(mechanism.name << ": wrote position " << t << " of no sequence");
      }
    }
  }
  return a;
}

inline std::size_t case_limit(std::size_t all) {
  const char* const text = std::getenv("FOVEA_GRID_CASES");
  return text == nullptr ? all : std::min(all, at(std::max(std::strtol(text, nullptr, 10), 1l)));
}
// The numbers of the cases to run, spread evenly over all.
inline std::vector<std::size_t> chosen_cases(std::size_t all) {
  std::vector<std::size_t> chosen(case_limit(all));
  for (std::size_t n = 0; n < chosen.size(); ++n) chosen[n] = n * all / chosen.size();
  return chosen;
}

// ------------------------------------------------------------------------------- what every mechanism must do

// Lengths around every chunk size, in every form, from nothing and from a state.
inline void check_lengths(const Mechanism& mechanism) {
  std::vector<index_t> lengths{1, 2, 3, 45, 130};
  for (const index_t chunk : {8, 16, 24, 32, 64, 128, 256}) {
    for (const index_t len : {chunk - 1, chunk, chunk + 1, 3 * chunk + 7}) lengths.push_back(len);
  }
  std::sort(lengths.begin(), lengths.end());
  lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
  for (const index_t len : lengths) {
    for (const bool initial : {false, true}) {
      Case c{.seed = 100 + static_cast<std::uint64_t>(len), .len = len, .initial = initial};
      c.betas = len % 3 == 0 ? Betas::unit : Betas::two;
      const Problem problem(mechanism, c);
      const Expected expected = problem.expected(mechanism);
      for (const How& how : all_forms()) check(mechanism, problem, expected, how);
      for (const index_t chunk : {1, 5, 13}) {
        if (len <= 45) check(mechanism, problem, expected, {RecurrentForm::chunked, chunk});
      }
    }
  }
}

// What the sizes of random cases are drawn from.
struct GridRange {
  struct Dims {
    index_t k, v;
  };
  std::vector<Dims> dims;
  std::vector<index_t> lens, batches;
  index_t large, len_of_large;   // states of more cells: one batch entry, and so many tokens at most
};

// Every axis of a case at random. positive: so is the scale.
inline Case random_case(Random& random, std::uint64_t seed, const GridRange& range, bool positive) {
  const std::vector<Heads> heads{{1, 1, 1}, {2, 2, 2}, {3, 3, 3}, {2, 2, 4}, {1, 1, 3}, {4, 2, 2}, {4, 1, 1}, {4, 4, 2}};
  Case c;
  c.seed = seed;
  c.batch = random.pick(range.batches);
  c.heads = random.pick(heads);
  c.map = random.pick({HeadMap::blocks, HeadMap::tiled});
  const GridRange::Dims dim = random.pick(range.dims);
  c.dim_k = dim.k;
  c.dim_v = dim.v;
  c.len = random.pick(range.lens);
  if (c.dim_k * c.dim_v > range.large) {   // the reference does 10^8 cells a second
    c.batch = 1;
    c.len = std::min(c.len, range.len_of_large);
  }
  if (random.one_in(4)) {
    c.lengths = {random.below(4), 0, c.len, 1, random.below(30)};
    c.unowned = random.below(3);
  }
  c.format = random.pick({Format::f32, Format::f32, Format::bf16, Format::f16, Format::f64});
  c.out_format = random.pick({Format::f32, Format::f32, Format::bf16, Format::f16, Format::f64});
  const auto place = [&] {
    using enum Placement;
    return random.pick({bhsd, bhsd, bshd, padded, inner2, reversed, wild});
  };
  c.placement = place();
  c.gate_placement = place();
  c.state_placement = place();
  c.layout = random.pick({StateLayout::k_first, StateLayout::v_first});
  c.initial = !random.one_in(4);
  c.gating = random.pick({Gating::mild, Gating::mild, Gating::slow, Gating::resets, Gating::resets, Gating::strong});
  c.decay_form = random.pick({DecayForm::log, DecayForm::log, DecayForm::alpha});
  for (bool& shared : c.shared) shared = random.one_in(6);
  c.betas = random.pick({Betas::unit, Betas::two, Betas::corners});
  c.wide_beta = random.one_in(3);
  c.wide_skip = random.one_in(2);
  if (random.one_in(3)) c.scale = random.pick({1., 0.5, positive ? 0.75 : -0.75});   // sums to divide by stay above 0
  return c;
}

// Random cases: each value with every other sooner or later.
inline void check_grid(const Mechanism& mechanism, std::size_t most = 90) {
  const GridRange range{.dims = {{4, 3}, {4, 3}, {16, 16}, {16, 16}, {33, 17}, {33, 17}, {1, 1}, {64, 64}, {40, 72}},
                        .lens = {1, 2, 7, 15, 16, 17, 31, 33, 45, 63, 64, 65, 79, 103, 130},
                        .batches = {1, 1, 2, 3},
                        .large = 2000,
                        .len_of_large = 79};
  const std::vector<How> forms = all_forms();
  for (const std::size_t n : chosen_cases(most)) {
    Random random(7000 + n);
    const Case c = random_case(random, 8000 + n, range, mechanism.positive);
    const Problem problem(mechanism, c);
    const Expected expected = problem.expected(mechanism);
    const std::size_t first = at(random.below(static_cast<index_t>(forms.size())));
    for (std::size_t i = 0; i < 4; ++i) {   // 3 and 11 have no common factor: every form, and pairs of all kinds
      How how = forms[(first + 3 * i) % forms.size()];
      how.lanes = random.pick({1, 1, 2, 3});
      how.pool = random.pick({Pool::serial, Pool::threads, Pool::reversed});
      check(mechanism, problem, expected, how);
    }
  }
}

// One head of the models' size.
inline void check_large_head(const Mechanism& mechanism) {
  Case c{.seed = 300, .len = 70, .dim_k = 128, .dim_v = 128};
  const Problem problem(mechanism, c);
  const Expected expected = problem.expected(mechanism);
  using enum RecurrentForm;
  for (const How& how : {How{automatic}, How{step}, How{fused}, How{chunked, 32}, How{chunked, 64}}) {
    check(mechanism, problem, expected, how);
  }
}

// Positions [begin, end) of a problem of one sequence per batch entry, with the state that `before` left.
inline Answer part_of(const Mechanism& mechanism, const Problem& whole, index_t begin, index_t end, const Answer* before,
                      const How& how) {
  Problem part = whole;
  part.c.len = end - begin;
  Answer a = part.answer(mechanism);
  Arguments<float> x = part.arguments(mechanism, a);
  const auto shorten = [&](auto& view) {
    if (view.data == nullptr || view.extent[2] == 1) {
      if (whole.c.len == 1) view.extent[2] = end - begin;
      return;
    }
    if constexpr (requires { view.format; }) {
      view.data += begin * view.stride[2] * fovea::row_bytes(view.format, 1);
    } else {
      view.data += begin * view.stride[2];
    }
    view.extent[2] = end - begin;
  };
  shorten(x.q);
  shorten(x.k);
  shorten(x.v);
  shorten(x.decay.gate);
  shorten(x.beta);
  shorten(x.dt);
  shorten(x.input_gate);
  shorten(x.forget_gate);
  shorten(x.rate);
  shorten(x.kappa);
  if (before != nullptr) {
    x.first_pos.assign(at(whole.c.sequences()), begin);
    x.options.initial_state = before->state.floats();
    if (mechanism.carries_n) x.initial_n = before->n.floats<3>();
    if (mechanism.carries_m) x.initial_m = before->m.floats<2>();
  }
  const Status status = call(mechanism, x, how);
  INFO(status.message());
  REQUIRE(status.ok());
  return a;
}

// Split anywhere, the second part from what the first one hands on, is the whole; also the last token alone: decode.
inline void check_splits(const Mechanism& mechanism) {
  const Case c{
      .seed = 400, .batch = 2, .len = 41, .heads = {2, 2, 2}, .layout = StateLayout::v_first, .gating = Gating::resets};
  const Problem problem(mechanism, c);
  const Expected expected = problem.expected(mechanism);
  using enum RecurrentForm;
  struct Pair {
    How first, second;
  };
  for (const Pair& pair : {Pair{{chunked, 16}, {chunked, 16}}, Pair{{automatic}, {step}}, Pair{{fused}, {chunked, 8}}}) {
    for (const index_t split :
         {index_t{0}, index_t{1}, index_t{8}, index_t{15}, index_t{16}, index_t{29}, c.len - 1, c.len}) {
      INFO(mechanism.name << ": split at " << split << ", " << describe(pair.first) << ", then " << describe(pair.second));
      const Answer first = part_of(mechanism, problem, 0, split, nullptr, pair.first);
      const Answer second = part_of(mechanism, problem, split, c.len, &first, pair.second);
      if (split == 0) {
        CHECK(first.state.bytes() == problem.initial.bytes());
        if (mechanism.carries_n) CHECK(first.n.bytes() == problem.initial_n.bytes());
        if (mechanism.carries_m) CHECK(first.m.bytes() == problem.initial_m.bytes());
      }
      if (split == c.len) {
        CHECK(second.state.bytes() == first.state.bytes());
        CHECK(second.n.bytes() == first.n.bytes());
        CHECK(second.m.bytes() == first.m.bytes());
      }
      Answer joined = problem.answer(mechanism);
      joined.out.fill([&](index_t b, index_t h, index_t t, index_t d) {
        return t < split ? first.out.get(b, h, t, d) : second.out.get(b, h, t - split, d);
      });
      joined.state = second.state;
      joined.n = second.n;
      joined.m = second.m;
      const Error error = error_of(problem, mechanism, joined, expected);
      CHECK(error.out <= kRelativeError);
      CHECK(error.state <= kRelativeError);
    }
  }
}

// A batch of decode steps, token after token, each in place: the way generation runs.
inline void check_decode(const Mechanism& mechanism) {
  const Case c{.seed = 500, .batch = 3, .len = 12, .heads = {2, 2, 4}, .dim_k = 17, .dim_v = 16};
  const Problem problem(mechanism, c);
  const Expected expected = problem.expected(mechanism);
  for (const RecurrentForm form :
       {RecurrentForm::automatic, RecurrentForm::step, RecurrentForm::fused, RecurrentForm::chunked}) {
    Answer before{{}, problem.initial, problem.initial_n, problem.initial_m}, all = problem.answer(mechanism);
    for (index_t t = 0; t < c.len; ++t) {
      Answer one = part_of(mechanism, problem, t, t + 1, &before, {form});
      one.out.each([&](index_t b, index_t h, index_t, index_t d) { all.out.put(b, h, t, d, one.out.get(b, h, 0, d)); });
      before = one;
    }
    all.state = before.state;
    all.n = before.n;
    all.m = before.m;
    INFO(mechanism.name << " " << name_of(form));
    const Error error = error_of(problem, mechanism, all, expected);
    CHECK(error.out <= kRelativeError);
    CHECK(error.state <= kRelativeError);
  }
}

// Entry n of one axis; an axis of extent 1 is shared.
inline Numbers slice_of(const Numbers& all, std::size_t axis, index_t n) {
  std::array<index_t, 4> extent = all.extent();
  if (extent[axis] <= 1) return all;
  extent[axis] = 1;
  Numbers part(extent, all.format());
  part.each([&](index_t i, index_t j, index_t k, index_t l) {
    std::array<index_t, 4> from{i, j, k, l};
    from[axis] = n;
    part.put(i, j, k, l, all.get(from[0], from[1], from[2], from[3]));
  });
  return part;
}

// An entry of a batch is its single call, bit for bit.
inline void check_batch(const Mechanism& mechanism) {
  const Case c{.seed = 650, .batch = 3, .len = 37, .heads = {2, 2, 4}, .dim_k = 12, .dim_v = 20};
  const Problem batched(mechanism, c);
  using enum RecurrentForm;
  for (const How& how : {How{step}, How{fused}, How{chunked, 16}, How{chunked, 32, 3, Pool::threads}}) {
    INFO(mechanism.name << ", " << describe(how));
    const Answer together = answer_of(mechanism, batched, how);
    for (index_t b = 0; b < c.batch; ++b) {
      Problem single = batched;
      single.c.batch = 1;
      for (Numbers* x : {&single.q, &single.k, &single.v, &single.gate, &single.beta, &single.dt, &single.rate,
                         &single.kappa, &single.input_gate, &single.forget_gate, &single.initial}) {
        *x = slice_of(*x, 0, b);
      }
      single.initial_n = slice_of(single.initial_n, 1, b);
      single.initial_m = slice_of(single.initial_m, 2, b);
      Answer entry{slice_of(together.out, 0, b), slice_of(together.state, 0, b), {}, {}};
      if (mechanism.carries_n) entry.n = slice_of(together.n, 1, b);
      if (mechanism.carries_m) entry.m = slice_of(together.m, 2, b);
      CHECK(answer_of(mechanism, single, how) == entry);
    }
  }
}

// Sequences packed one after the other, with empty ones and single tokens among them, are the single calls, bit for bit.
inline void check_ragged(const Mechanism& mechanism) {
  Case c{.seed = 600, .heads = {2, 2, 4}, .dim_k = 12, .dim_v = 20};
  c.lengths = {0, 5, 0, 1, 40, 17, 0};
  c.unowned = 2;
  const Problem packed(mechanism, c);
  using enum RecurrentForm;
  for (const How& how : {How{step}, How{fused}, How{chunked, 16}, How{chunked, 32, 3, Pool::threads}}) {
    INFO(mechanism.name << ", " << describe(how));
    const Answer together = check(mechanism, packed, packed.expected(mechanism), how);
    for (index_t s = 0; s < packed.c.sequences(); ++s) {
      Problem single = packed;
      single.c.lengths.clear();
      single.cu_len.clear();
      const auto row = [&](const Numbers& all, std::size_t axis) { return slice_of(all, axis, s); };
      single.initial = row(packed.initial, 0);
      single.initial_n = row(packed.initial_n, 1);
      single.initial_m = row(packed.initial_m, 2);
      single.c.batch = 1;
      const index_t begin = packed.cu_len[at(s)], end = packed.cu_len[at(s) + 1];
      const Answer alone = part_of(mechanism, single, begin, end, nullptr, how);
      CHECK(alone.state.bytes() == row(together.state, 0).bytes());
      if (mechanism.carries_n) CHECK(alone.n.bytes() == row(together.n, 1).bytes());
      if (mechanism.carries_m) CHECK(alone.m.bytes() == row(together.m, 2).bytes());
      bool same = true;
      alone.out.each([&](index_t b, index_t h, index_t t, index_t d) {
        same = same && alone.out.get(b, h, t, d) == together.out.get(b, h, begin + t, d);
      });
      CHECK(same);
    }
  }
}

// Initial and final state in the same memory.
inline void check_in_place(const Mechanism& mechanism) {
  for (const StateLayout layout : {StateLayout::k_first, StateLayout::v_first}) {
    const Case c{.seed = 700, .batch = 2, .len = 37, .heads = {2, 2, 4}, .dim_k = 12, .dim_v = 20, .layout = layout};
    const Problem problem(mechanism, c);
    for (const How& how : all_forms()) {
      const Answer apart = answer_of(mechanism, problem, how);
      Answer in_place = problem.answer(mechanism);
      in_place.state = problem.initial;
      if (mechanism.carries_n) in_place.n = problem.initial_n;
      if (mechanism.carries_m) in_place.m = problem.initial_m;
      Arguments<float> x = problem.arguments(mechanism, in_place);
      x.options.initial_state = x.options.final_state;
      if (mechanism.carries_n) x.initial_n = x.final_n;
      if (mechanism.carries_m) x.initial_m = x.final_m;
      const Status status = call(mechanism, x, how);
      INFO(mechanism.name << ", " << describe(how) << ": " << status.message());
      REQUIRE(status.ok());
      CHECK(in_place == apart);
    }
  }
}

// The number of lanes, their order and their threads change no bit.
inline void check_lanes(const Mechanism& mechanism) {
  const std::vector<Case> cases{
      {.seed = 800, .batch = 1, .len = 37, .heads = {1, 1, 1}, .dim_k = 20, .dim_v = 100},
      {.seed = 801, .batch = 2, .len = 37, .heads = {2, 2, 4}, .dim_k = 16, .dim_v = 40, .out_format = Format::bf16},
      {.seed = 802, .batch = 1, .len = 1, .heads = {4, 2, 2}, .dim_k = 16, .dim_v = 70}};
  for (const Case& c : cases) {
    const Problem problem(mechanism, c);
    for (const RecurrentForm form :
         {RecurrentForm::automatic, RecurrentForm::step, RecurrentForm::fused, RecurrentForm::chunked}) {
      const Answer one = answer_of(mechanism, problem, {form});
      for (const How& how : {How{form, 0, 2, Pool::threads}, How{form, 0, 3, Pool::threads}, How{form, 0, 3, Pool::reversed},
                             How{form, 0, 8, Pool::threads}, How{form, 0, 3, Pool::one_after_other}, How{form, 0, 200}}) {
        INFO(mechanism.name << ": " << describe(c) << ", " << describe(how));
        CHECK(answer_of(mechanism, problem, how) == one);
      }
    }
  }
}

// A workspace of exactly the size that a refusal names, anywhere, full of NaN: the same bits, and nothing behind it written.
inline void check_workspace(const Mechanism& mechanism) {
  const std::vector<Case> cases{
      {.seed = 900, .batch = 2, .len = 37, .heads = {2, 2, 4}, .dim_k = 12, .dim_v = 20},
      {.seed = 901, .len = 1, .dim_k = 5, .dim_v = 7},
      {.seed = 902, .len = 70, .heads = {4, 2, 2}, .dim_k = 33, .dim_v = 17, .format = Format::bf16}};
  for (const Case& c : cases) {
    const Problem problem(mechanism, c);
    for (const How& how : all_forms()) {
      for (const int lanes : {1, 3}) {
        How with_lanes = how;
        with_lanes.lanes = lanes;
        INFO(mechanism.name << ": " << describe(c) << ", " << describe(with_lanes));
        const Answer one = answer_of(mechanism, problem, how);
        std::byte too_small[1];
        Answer refused = problem.answer(mechanism);
        Arguments<float> x = problem.arguments(mechanism, refused);
        x.options.workspace = too_small;
        const Status status = call(mechanism, x, with_lanes);
        if (status.ok()) continue;   // a form that needs none
        CHECK(status.code() == fovea::Code::workspace_too_small);
        CHECK(refused.untouched());
        const std::string message = status.message(), words = "needs ";
        const std::size_t found = message.find(words);
        REQUIRE(found != std::string::npos);
        const auto wanted = std::strtoul(message.c_str() + found + words.size(), nullptr, 10);
        REQUIRE(wanted > 0);
        for (const std::size_t misalign : {std::size_t{0}, std::size_t{1}, std::size_t{36}}) {
          PoisonedBytes bytes(wanted, misalign);
          Answer a = problem.answer(mechanism);
          x = problem.arguments(mechanism, a);
          x.options.workspace = bytes.bytes();
          const Status exact = call(mechanism, x, with_lanes);
          INFO(exact.message());
          REQUIRE(exact.ok());
          CHECK(a == one);
          CHECK(bytes.guards_intact());
        }
      }
    }
  }
}

// Sequences without tokens hand their state on: the initial one, or zeros. Also with no batch at all.
inline void check_nothing(const Mechanism& mechanism) {
  for (const How& how : all_forms()) {
    for (const bool initial : {false, true}) {
      for (const bool ragged : {false, true}) {
        Case c{.seed = 1000, .batch = 2, .len = 0, .heads = {2, 2, 4}, .initial = initial};
        if (ragged) c.lengths = {0, 0};
        const Problem problem(mechanism, c);
        INFO(mechanism.name << ": " << describe(problem.c) << ", " << describe(how));
        const Answer a = answer_of(mechanism, problem, how);
        const auto is_handed_on = [&](const Numbers& to, const Numbers& from) {
          bool same = true;
          to.each([&](index_t i, index_t j, index_t k, index_t l) {
            same = same && to.get(i, j, k, l) == (initial ? from.get(i, j, k, l) : 0);
          });
          return same;
        };
        CHECK(is_handed_on(a.state, problem.initial));
        if (mechanism.carries_n) CHECK(is_handed_on(a.n, problem.initial_n));
        if (mechanism.carries_m) CHECK(is_handed_on(a.m, problem.initial_m));
      }
    }
    const Problem none(mechanism, {.seed = 1001, .batch = 0, .len = 5});
    answer_of(mechanism, none, how);
    const Problem no_tokens(mechanism, {.seed = 1002, .batch = 0, .len = 0});
    answer_of(mechanism, no_tokens, how);
  }
}

// Without a final state, and with neither, the outputs are the same bits.
inline void check_unwanted_state(const Mechanism& mechanism) {
  const Problem problem(mechanism, {.seed = 1100, .len = 37, .heads = {2, 2, 2}, .dim_k = 12, .dim_v = 20});
  for (const How& how : all_forms()) {
    const Answer with = answer_of(mechanism, problem, how);
    Answer without = problem.answer(mechanism);
    Arguments<float> x = problem.arguments(mechanism, without);
    x.options.final_state = {};
    x.final_n = {};
    x.final_m = {};
    const Status status = call(mechanism, x, how);
    INFO(mechanism.name << ", " << describe(how) << ": " << status.message());
    REQUIRE(status.ok());
    CHECK(without.out.bytes() == with.out.bytes());
    CHECK(without.state.untouched());
  }
}

// Outputs are rounded once, from the fp32 numbers.
inline void check_rounding(const Mechanism& mechanism) {
  Case c{.seed = 1200, .len = 37, .heads = {2, 2, 4}, .dim_k = 12, .dim_v = 20, .format = Format::bf16};
  for (const How& how : all_forms()) {
    c.out_format = Format::f32;
    const Problem plain(mechanism, c);
    const Answer wide = answer_of(mechanism, plain, how);
    for (const Format format : {Format::bf16, Format::f16, Format::f64}) {
      c.out_format = format;
      const Problem problem(mechanism, c);
      const Answer narrow = answer_of(mechanism, problem, how);
      Numbers rounded = problem.answer(mechanism).out;
      rounded.fill([&](index_t a, index_t b, index_t t, index_t d) { return wide.out.get(a, b, t, d); });
      INFO(mechanism.name << ", " << describe(how) << " to " << fovea::name_of(format));
      CHECK(narrow.out.bytes() == rounded.bytes());
      CHECK(narrow.state.bytes() == wide.state.bytes());
    }
  }
}

// All outputs are finite whatever the gates are.
inline void check_hard_gates(const Mechanism& mechanism) {
  for (const Gating gating : {Gating::slow, Gating::resets, Gating::strong}) {
    for (const DecayForm form : {DecayForm::log, DecayForm::alpha}) {
      Case c{.seed = 1300, .len = 100, .heads = {2, 2, 2}, .dim_k = 20, .dim_v = 9};
      c.gating = gating;
      c.decay_form = form;
      c.betas = Betas::corners;
      const Problem problem(mechanism, c);
      const Expected expected = problem.expected(mechanism);
      for (const How& how : all_forms()) check(mechanism, problem, expected, how);
    }
  }
}

// Fewer heads are the repeated ones bit for bit, and a state with dim_v first is to rounding the other one transposed.
inline void check_heads_and_layouts(const Mechanism& mechanism) {
  const auto repeated = [](const Numbers& x, index_t heads, HeadMap map, std::size_t axis) {
    std::array<index_t, 4> extent = x.extent();
    const index_t few = extent[axis];
    extent[axis] = heads;
    Numbers out(extent, x.format());
    out.each([&](index_t a, index_t b, index_t c, index_t d) {
      std::array<index_t, 4> from{a, b, c, d};
      from[axis] = map == HeadMap::tiled ? from[axis] % few : from[axis] / (heads / few);
      out.put(a, b, c, d, x.get(from[0], from[1], from[2], from[3]));
    });
    return out;
  };
  const auto far = [](const Numbers& a, const Numbers& b) { return distance(a, Exact(b), a.extent()[2]); };
  for (const HeadMap map : {HeadMap::blocks, HeadMap::tiled}) {
    for (const Heads heads : {Heads{2, 2, 4}, Heads{4, 2, 2}, Heads{1, 1, 4}, Heads{4, 1, 1}, Heads{2, 4, 2}}) {
      const Case c{.seed = 1400, .len = 37, .heads = heads, .dim_k = 12, .dim_v = 20, .map = map};
      const Problem few(mechanism, c);
      Problem many = few;
      many.c.heads = {4, 4, 4};
      for (Numbers* x : {&many.q, &many.k, &many.v, &many.gate, &many.beta, &many.dt, &many.rate, &many.kappa,
                         &many.input_gate, &many.forget_gate, &many.initial}) {
        *x = repeated(*x, 4, map, 1);
      }
      for (Numbers* x : {&many.bonus, &many.skip, &many.initial_n}) *x = repeated(*x, 4, map, 2);
      many.initial_m = repeated(many.initial_m, 4, map, 3);
      const index_t states = heads.states();
      many.per_head.clear();
      for (index_t h = 0; h < 4 && !few.per_head.empty(); ++h) {
        many.per_head.push_back(few.per_head[at(map == HeadMap::tiled ? h % states : h / (4 / states))]);
      }
      Problem turned = few;
      turned.c.layout = StateLayout::v_first;
      turned.initial = turned.like_state();
      turned.initial.fill([&](index_t s, index_t h, index_t j, index_t i) { return few.initial.get(s, h, i, j); });
      for (const How& how : {How{RecurrentForm::step}, How{RecurrentForm::fused}, How{RecurrentForm::chunked, 16}}) {
        INFO(mechanism.name << ": " << describe(c) << ", " << describe(how));
        const Answer one = answer_of(mechanism, few, how), other = answer_of(mechanism, many, how),
                     v_first = answer_of(mechanism, turned, how);
        Answer same{one.out, repeated(one.state, 4, map, 1), {}, {}};
        if (mechanism.carries_n) same.n = repeated(one.n, 4, map, 2);
        if (mechanism.carries_m) same.m = repeated(one.m, 4, map, 3);
        CHECK(same == other);
        Numbers transposed(one.state.extent());
        transposed.fill([&](index_t s, index_t h, index_t i, index_t j) { return v_first.state.get(s, h, j, i); });
        CHECK(far(v_first.out, one.out) <= 2 * kRelativeError);
        CHECK(far(transposed, one.state) <= 2 * kRelativeError);
      }
    }
  }
}

// NaN or infinity in a few tokens of one sequence and head: all others keep their bits, also those that work in the same memory
// after it, with chunks of 5 tokens on rows of which the 6th, 7th and 8th may still hold what was there.
inline void check_not_numbers(const Mechanism& mechanism) {
  using enum RecurrentForm;
  Case batch{.seed = 1450, .batch = 2, .len = 37, .heads = {2, 2, 2}, .dim_k = 12, .dim_v = 20, .placement = Placement::bshd};
  Case ragged = batch;
  batch.layout = StateLayout::v_first;
  ragged.lengths = {37, 5, 1, 17};
  for (const Case& c : {batch, ragged}) {
    const Problem clean(mechanism, c);
    const index_t end = 37, head = c.lengths.empty() ? 0 : 1;   // of sequence 0: the task's first head, its last
    for (const How& how : {How{step}, How{fused}, How{chunked, 16}, How{chunked}}) {
      const Answer good = answer_of(mechanism, clean, how);
      const std::vector<Numbers Problem::*> spoils{&Problem::q,           &Problem::k,       &Problem::v,    &Problem::gate,
                                                   &Problem::beta,        &Problem::dt,      &Problem::rate, &Problem::kappa,
                                                   &Problem::input_gate,  &Problem::initial, &Problem::forget_gate,
                                                   &Problem::initial_n,   &Problem::initial_m};
      for (std::size_t n = 0; n < spoils.size(); ++n) {
        for (const double wrong : {std::nan(""), HUGE_VAL}) {
          Problem bad = clean;
          Numbers& x = bad.*spoils[n];
          if (&x == &bad.initial_m) {
            x.put(0, 0, 0, head, wrong);
          } else if (&x == &bad.initial_n) {
            x.put(0, 0, head, 0, wrong);
          } else {
            for (const index_t t : {6, 22, 31}) x.put(0, head, &x == &bad.initial ? 0 : t, 0, wrong);
          }
          const Answer a = answer_of(mechanism, bad, how);
          bool same = true, reached = false;
          const auto see = [&](const Numbers& to, const auto& is_spoiled) {
            const Numbers& from = &to == &a.out ? good.out : &to == &a.state ? good.state : &to == &a.n ? good.n : good.m;
            to.each([&](index_t i, index_t j, index_t k, index_t l) {
              const double got = to.get(i, j, k, l);
              if (is_spoiled(i, j, k, l)) {
                reached = reached || (&to == &a.out && k == 22 && !std::isfinite(got));
              } else {
                same = same && std::bit_cast<std::uint64_t>(got) == std::bit_cast<std::uint64_t>(from.get(i, j, k, l));
              }
            });
          };
          see(a.out, [&](index_t b, index_t h, index_t t, index_t) { return b == 0 && h == head && t < end; });
          see(a.state, [&](index_t s, index_t h, index_t, index_t) { return s == 0 && h == head; });
          see(a.n, [&](index_t, index_t s, index_t h, index_t) { return s == 0 && h == head; });
          see(a.m, [&](index_t, index_t, index_t s, index_t h) { return s == 0 && h == head; });
          INFO(mechanism.name << ": " << describe(bad.c) << ", " << describe(how) << ", " << wrong << " in tensor " << n);
          CHECK(same);
          if (n < 3) CHECK(reached);   // q, k and v, which every mechanism reads
        }
      }
    }
  }
}

// The thread's floating-point mode is what it was.
inline void check_mode(const Mechanism& mechanism) {
  const Problem problem(mechanism, {.seed = 1480, .batch = 2, .len = 20, .heads = {2, 2, 2}});
  for (const RecurrentForm form : {RecurrentForm::step, RecurrentForm::fused, RecurrentForm::chunked}) {
    INFO(mechanism.name << ", " << name_of(form));
    Answer a = problem.answer(mechanism);
    Arguments<float> x = problem.arguments(mechanism, a);
    x.options.form = form;
    check_float_mode([&](const fovea::Executor& executor) {
      x.options.executor = executor;
      return mechanism.run(x);
    });
  }
}

// `len` tokens in one call against double.
inline void check_long(const Mechanism& mechanism, index_t len, Gating gating, double allowed) {
  Case c{.seed = 1500, .len = len, .dim_k = 64, .dim_v = 16, .initial = false};
  c.gating = gating;
  c.betas = Betas::unit;
  const Problem problem(mechanism, c);
  const Expected expected = problem.expected(mechanism);
  using enum RecurrentForm;
  for (const How& how : {How{step}, How{fused}, How{chunked, 32}, How{chunked, 256}}) {
    check(mechanism, problem, expected, how, allowed);
  }
}

// The gates of a drift: a state remembers the newest kMemory tokens.
inline constexpr double kMemory = 1e4, kFaint = 2 / kMemory;

// What `memory` tokens may come to. A token rounds the state once and what the state is multiplied by once, each by 2^-24 at
// most and to either side, and errors are forgotten with what they are errors of: a walk over tokens whose squares weigh
// e^(-2 n / memory), of length 2^-24 sqrt(2 memory / 2). A factor always off to one side, by half of that, comes to memory / 2
// units. In chunks, memory / chunk products of factors are rounded once more, and where all chunks have the same factors, to
// the same side: half a unit.
inline double drift_of(double memory, const How& how) {
  const bool chunked = how.form == RecurrentForm::chunked;
  return 0x1p-24 * (std::sqrt(memory) + (chunked ? memory / static_cast<double>(2 * how.chunk) : 0));
}

struct Drift {
  index_t dim_k = 8, dim_v = 2, calls = 64;
  double beta = 0.02;   // at most: with keys of length 1 the delta rule forgets a token in 2 dim_k / beta others
};

// Calls of 2^14 tokens (64 are a million), each handing its state to the next, fp32 against double: in every call the outputs
// and the state are as near as in any other. mLSTM's and retention's gates are as faint as the others.
inline void check_drift(const Mechanism& mechanism, const Drift& drift = {}) {
  constexpr index_t kCall = 1 << 14;
  const index_t dim_k = drift.dim_k, dim_v = drift.dim_v;
  const auto floats = [](index_t dim) { return std::vector<float>(at(kCall * dim)); };
  const auto view = []<class T>(std::vector<T>& x, index_t dim) { return fovea::bhsd(x.data(), 1, 1, kCall, dim); };
  struct Way {
    How how;
    StateLayout layout = StateLayout::k_first;
    std::vector<float> s{}, n{}, m{0.f};
  };
  using enum RecurrentForm;
  std::vector<Way> ways{{{step}}, {{step}, StateLayout::v_first}, {{fused}}, {{chunked, 64}}};
  for (Way& way : ways) way.s.assign(at(dim_k * dim_v), 0.f), way.n.assign(at(dim_k), 0.f);
  std::vector<double> exact_s(at(dim_k * dim_v)), exact_n(at(dim_k)), exact_m{0.};

  const index_t gates = mechanism.gates == Gates::channel ? dim_k : 1;
  std::vector<float> q = floats(dim_k), k = q, v = floats(dim_v), gate = floats(gates), beta = floats(1), i = beta, f = beta;
  const std::vector<float> gamma{static_cast<float>(std::exp(-1 / kMemory))};
  const std::vector<double> exact_gamma(gamma.begin(), gamma.end());
  std::vector<float> out = floats(dim_v);
  std::vector<double> exact_out(out.size());
  Random random(1600);
  const std::size_t calls = case_limit(at(drift.calls));
  for (std::size_t call_at = 0; call_at < calls; ++call_at) {
    const auto fill = [&](std::vector<float>& x, double low, double high) {
      for (float& number : x) number = static_cast<float>(low + (high - low) * random.uniform());
    };
    const double least = mechanism.carries_n ? 0 : -1;   // what is divided by does not vanish
    fill(q, least, 1), fill(k, least, 1), fill(v, -1, 1);
    fill(gate, -kFaint, 0), fill(beta, 0, drift.beta), fill(i, -1, 1);
    for (float& number : f) {   // log sigmoid of it is a gate
      const double g = -kFaint * (0.01 + 0.99 * random.uniform());
      number = static_cast<float>(g - std::log(-std::expm1(g)));
    }
    for (std::size_t row = 0; mechanism.unit_keys && row < k.size(); row += at(dim_k)) {
      double squares = 0;
      for (std::size_t d = row; d < row + at(dim_k); ++d) squares += double{k[d]} * double{k[d]};
      for (std::size_t d = row; d < row + at(dim_k); ++d) k[d] = static_cast<float>(double{k[d]} / std::sqrt(squares));
    }
    const auto doubles = [](const std::vector<float>& x) { return std::vector<double>(x.begin(), x.end()); };
    std::vector<double> dq = doubles(q), dk = doubles(k), dv = doubles(v), dgate = doubles(gate), dbeta = doubles(beta),
                        di = doubles(i), df = doubles(f);
    const auto states_of = [&](auto& x, auto& s, auto& n, auto& m, StateLayout layout) {
      const bool v_first = layout == StateLayout::v_first;
      x.options.layout = layout;
      x.options.initial_state = x.options.final_state =
          fovea::bhsd(s.data(), 1, 1, v_first ? dim_v : dim_k, v_first ? dim_k : dim_v);
      if (mechanism.carries_n) x.initial_n = x.final_n = {n.data(), {1, 1, dim_k}, {dim_k, dim_k, 1}};
      if (mechanism.carries_m) x.initial_m = x.final_m = {m.data(), {1, 1}, {1, 1}};
    };
    Arguments<double> y{.q = view(dq, dim_k), .k = view(dk, dim_k), .v = view(dv, dim_v), .out = view(exact_out, dim_v)};
    y.decay.gate = view(dgate, gates), y.beta = view(dbeta, 1), y.input_gate = view(di, 1), y.forget_gate = view(df, 1);
    y.per_head = exact_gamma;
    states_of(y, exact_s, exact_n, exact_m, StateLayout::k_first);
    mechanism.reference(y);

    for (Way& way : ways) {
      Arguments<float> x{.q = view(q, dim_k), .k = view(k, dim_k), .v = view(v, dim_v), .out = view(out, dim_v)};
      x.decay.gate = view(gate, gates), x.beta = view(beta, 1), x.input_gate = view(i, 1), x.forget_gate = view(f, 1);
      x.per_head = gamma;
      states_of(x, way.s, way.n, way.m, way.layout);
      std::fill(out.begin(), out.end(), NAN);
      INFO(mechanism.name << ", call " << call_at << ", " << describe(way.how)
                          << (way.layout == StateLayout::v_first ? ", v first" : ""));
      const Status status = call(mechanism, x, way.how);
      INFO(status.message());
      REQUIRE(status.ok());
      Distance outputs, state;
      for (std::size_t n = 0; n < out.size(); ++n) outputs.see(double{out[n]}, exact_out[n]);
      const double unit = mechanism.carries_m ? std::exp(double{way.m[0]} - exact_m[0]) : 1;
      for (index_t a = 0; a < dim_k; ++a) {
        for (index_t c = 0; c < dim_v; ++c) {
          const index_t place = way.layout == StateLayout::v_first ? c * dim_k + a : a * dim_v + c;
          state.see(unit * double{way.s[at(place)]}, exact_s[at(a * dim_v + c)]);
        }
        if (mechanism.carries_n) state.see(unit * double{way.n[at(a)]}, exact_n[at(a)]);
      }
      CHECK(outputs.value() <= drift_of(kMemory, way.how));
      CHECK(state.value() <= drift_of(kMemory, way.how));
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ refusals

// A call with one argument spoiled is refused in these words before anything is written.
struct Refusal {
  std::string words;
  std::function<void(Arguments<float>&)> spoil;
  fovea::Code code = fovea::Code::invalid_argument;
};

inline void check_refused(const Mechanism& mechanism, const Problem& problem, const std::vector<Refusal>& refusals) {
  for (const Refusal& refusal : refusals) {
    Answer a = problem.answer(mechanism);
    Arguments<float> x = problem.arguments(mechanism, a);
    refusal.spoil(x);
    const Status status = mechanism.run(x);
    INFO(mechanism.name << ": " << refusal.words);
    CHECK(status.code() == refusal.code);
    CHECK_THAT(std::string(status.message()), Catch::Matchers::ContainsSubstring(refusal.words));
    CHECK(a.untouched());
  }
}

// -------------------------------------------------------------------------------------------------------- golden values

// The problem of reference/recurrent_golden.hpp.
inline Problem golden_problem(const Mechanism& mechanism, double scale = 0.5) {
  Problem x(mechanism, {.len = kGoldenLen, .dim_k = kGoldenDimK, .dim_v = kGoldenDimV, .scale = scale});
  const auto rows = [](auto f) {
    return [f](index_t, index_t, index_t t, index_t i) { return f(static_cast<double>(t), static_cast<double>(i)); };
  };
  x.q.fill(rows(golden_q));
  x.k.fill(rows(golden_k));
  x.v.fill(rows(golden_v));
  x.gate.fill(rows(golden_gate));
  x.beta.fill(rows([](double t, double) { return golden_beta(t); }));
  x.initial.fill(
      [](index_t, index_t, index_t i, index_t j) { return golden_initial(static_cast<double>(i), static_cast<double>(j)); });
  return x;
}
// f(token, channel) as the numbers of a tensor of tokens.
template <class F>
Numbers golden_rows(index_t dim, const F& f, index_t len = kGoldenLen) {
  Numbers x({1, 1, len, dim});
  return x.fill([&](index_t, index_t, index_t t, index_t i) { return f(static_cast<double>(t), static_cast<double>(i)); });
}

inline const RecurrentGolden& golden(const std::string& name) {
  for (const RecurrentGolden& each : kRecurrentGoldens) {
    if (name == each.name) return each;
  }
  FAIL("no golden values of " << name);
  return kRecurrentGoldens[0];
}

inline void check_golden(const char* name, const std::vector<double>& out, double state_squares) {
  const RecurrentGolden& values = golden(name);
  const auto close = [](double got, double expected) {
    return std::abs(got - expected) <= 1e-5 * std::max(1., std::abs(expected));
  };
  const auto squares = [](const std::vector<double>& x) {
    double sum = 0;
    for (const double each : x) sum += each * each;
    return sum;
  };
  INFO(name);
  REQUIRE(out.size() == std::size_t(kGoldenLen * kGoldenDimV));
  for (std::size_t j = 0; j < 3; ++j) CHECK(close(out[out.size() - 3 + j], values.last[j]));
  CHECK(close(squares(out), values.out_squares));
  if (values.state_squares >= 0) CHECK(close(state_squares, values.state_squares));
}
inline double squares_of(const Numbers& x) {
  double sum = 0;
  x.each([&](index_t a, index_t b, index_t c, index_t d) { sum += x.get(a, b, c, d) * x.get(a, b, c, d); });
  return sum;
}
inline void check_golden(const char* name, const Mechanism& mechanism, const Problem& problem) {
  for (const How& how : all_forms()) {
    INFO(describe(how));
    const Answer a = answer_of(mechanism, problem, how);
    check_golden(name, a.out.values(), squares_of(a.state));
  }
}

// ------------------------------------------------------------------------------------------------------------- identities

// Two mechanisms that come to the same on one problem, each with its own arguments.
inline void check_same(const Mechanism& a, const Problem& of_a, const Mechanism& b, const Problem& of_b) {
  using enum RecurrentForm;
  for (const How& how : {How{step}, How{fused}, How{chunked, 16}, How{chunked, 64}}) {
    INFO(a.name << " as " << b.name << ", " << describe(how));
    const Answer one = answer_of(a, of_a, how), other = answer_of(b, of_b, how);
    CHECK(distance(one.out, Exact(other.out), one.out.extent()[2]) <= 2 * kRelativeError);
    CHECK(distance(one.state, Exact(other.state), one.state.extent()[2]) <= 2 * kRelativeError);
  }
}

// The numbers of one head at one position.
inline std::vector<double> row_of(const Numbers& x, index_t head, index_t t, index_t batch = 0) {
  std::vector<double> row;
  for (index_t d = 0; d < x.extent()[3]; ++d) row.push_back(x.get(batch, head, t, d));
  return row;
}
inline double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}
// S' x of one head of a state with dim_k first.
inline std::vector<double> read_of(const Numbers& state, index_t head, const std::vector<double>& x) {
  std::vector<double> o(at(state.extent()[3]));
  for (std::size_t i = 0; i < x.size(); ++i) {
    for (std::size_t j = 0; j < o.size(); ++j) o[j] += x[i] * state.get(0, head, index_t(i), index_t(j));
  }
  return o;
}

// The axes of extent 1 written out, without copies.
template <class T, int Rank>
View<T, Rank> broadcast(View<T, Rank> view, std::size_t axis, index_t extent) {
  view.extent[axis] = extent;
  view.stride[axis] = 0;
  return view;
}

// All that holds for every mechanism, apart from the grid and long runs.
inline void check_everything(const Mechanism& mechanism) {
  check_lengths(mechanism);
  check_large_head(mechanism);
  if (mechanism.causal) {
    check_splits(mechanism);
    check_decode(mechanism);
  }
  check_ragged(mechanism);
  check_batch(mechanism);
  check_in_place(mechanism);
  check_lanes(mechanism);
  check_workspace(mechanism);
  check_nothing(mechanism);
  check_unwanted_state(mechanism);
  check_rounding(mechanism);
  check_heads_and_layouts(mechanism);
  check_not_numbers(mechanism);
  check_mode(mechanism);
  if (mechanism.gates != Gates::none) check_hard_gates(mechanism);
}

}   // namespace test::recurrent
