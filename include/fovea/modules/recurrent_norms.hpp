// SPDX-License-Identifier: Apache-2.0
// What stands between the projections and the recurrence of a layer: the L2 norm of query and key rows, the gated RMSNorm of
// the output, and the activations of the gates. Rows are [batch, head, pos, dim] of any plain format, arithmetic is fp32.
//
// A row's sum of squares is one chain per lane and a fixed tree over the lanes: its bits depend on the row alone. Nothing
// here needs a workspace. Inputs and outputs may be the same tensor.
#pragma once
#include <algorithm>
#include <cmath>
#include <optional>
#include <span>

#include "../call/recurrent_call.hpp"
#include "../simd/math.hpp"
#include "../simd/numbers.hpp"

namespace fovea {
inline namespace v0 {

// added: x / sqrt(sum x^2 + eps) (DeltaNet and its successors, eps 1e-6). at_least: x / max(|x|, eps) (RWKV-7, eps 1e-12).
enum class L2Floor : std::uint8_t { added, at_least };

enum class OutputGate : std::uint8_t { none, sigmoid, silu };

// norm_first: RMSNorm(x) gain act(gate) (DeltaNet, GLA, RetNet, KDA). gate_first: RMSNorm(x act(gate)) gain (Mamba-2).
enum class NormOrder : std::uint8_t { norm_first, gate_first };

// Defaults are flash-linear-attention's; Qwen3-Next has eps 1e-6, KDA and Comba a sigmoid, Mamba-2 gate_first and groups of
// d_ssm / ngroups.
struct GatedRmsNorm {
  float eps = 1e-5f;
  OutputGate activation = OutputGate::silu;
  NormOrder order = NormOrder::norm_first;
  index_t group = 0;   // neighbouring numbers of a row that share a mean of squares; 0 = the row
};

// The logarithm of a decay, at most 0. Without lower_bound: -e^a_log softplus(x + dt_bias) (Gated DeltaNet, KDA of
// Kimi-Linear). With it: lower_bound sigmoid(e^a_log (x + dt_bias)) (KDA of later models): another function, not a clamp of
// the first.
struct LogDecayGate {
  std::span<const float> a_log = {};       // [head]             empty = 0
  View<const float, 2> dt_bias = {};       // [head, dim | 1]    null = 0
  std::optional<float> lower_bound = {};   // negative, -5 in the models
};

inline namespace FOVEA_ARCH {

namespace gates {

// log(1 + e^x) = max(x, 0) + log1p(u), u = e^-|x|, log1p(u) = 2 artanh(u / (2 + u)) by its series: the argument is at most
// 1/3, the first term left out 3e-9 of the sum. Nothing flushes to 0 before e^x itself does: the relative error is at most
// (16 + 2 max(-x, 0)) 2^-24, and the value 0 below -87.3.
FOVEA_INLINE f32 softplus(f32 x) {
  const f32 u = exp2(abs(x) * f32(-kLog2e));
  const f32 s = u * reciprocal(f32(2.f) + u), square = s * s;
  f32 p = fma(square, f32(2.f / 15.f), f32(2.f / 13.f));
  p = fma(square, p, f32(2.f / 11.f));
  p = fma(square, p, f32(2.f / 9.f));
  p = fma(square, p, f32(2.f / 7.f));
  p = fma(square, p, f32(2.f / 5.f));
  p = fma(square, p, f32(2.f / 3.f));
  p = fma(square, p, f32(2.f));
  return fma(s, p, select(x > f32(0.f), x, f32(0.f)));
}

FOVEA_INLINE f32 activate(OutputGate gate, f32 x) {
  return gate == OutputGate::silu ? silu(x) : gate == OutputGate::sigmoid ? logistic(x) : f32(1.f);
}

}   // namespace gates

namespace recurrent_norms {

inline constexpr index_t kChunk = 64;   // numbers of a row at a time, converted; a whole number of vectors
static_assert(kChunk % kLanes == 0);

// A row of any tensor, chunk by chunk; without data it is a row of ones.
template <class Any>
struct Row {
  const Any& tensor;
  index_t at;   // elements from the start

  Row(const Any& of, index_t batch, index_t head, index_t pos)
      : tensor(of), at(batch * of.stride[0] + head * of.stride[1] + pos * of.stride[2]) {}
  auto* address(index_t d) const { return tensor.data + (at + d * tensor.stride[3]) * row_bytes(tensor.format, 1); }

  // Numbers [d, d + count), zeros behind them.
  void read(index_t d, index_t count, float* to) const {
    if (tensor.data == nullptr) {
      std::fill_n(to, count, 1.f);
    } else if (tensor.extent[3] == 1) {   // one number for all
      read_numbers(tensor.format, address(0), 1, 1, to);
      std::fill_n(to + 1, count - 1, to[0]);
    } else {
      read_numbers(tensor.format, address(d), tensor.stride[3], count, to);
    }
    std::fill_n(to + count, kChunk - count, 0.f);
  }
  void write(index_t d, index_t count, const float* from) const {
    write_numbers(tensor.format, from, count, address(d), tensor.stride[3]);
  }
};

// f(first, count) for the chunks of [begin, end).
template <class F>
FOVEA_INLINE void each_chunk(index_t begin, index_t end, const F& f) {
  for (index_t d = begin; d < end; d += kChunk) f(d, std::min(kChunk, end - d));
}

// body(batch, head, pos) for every row; a task is a token, whose heads are enough work to deal out.
template <class Body>
void each_row(const Executor& executor, const std::array<index_t, 4>& extent, const Body& body) {
  if (std::find(extent.begin(), extent.end(), 0) != extent.end()) return;   // the other axes may be as long as they like
  deal(executor, executor.lanes(), extent[0] * extent[2], [&](int, index_t task) {
    for (index_t head = 0; head < extent[1]; ++head) body(task / extent[2], head, task % extent[2]);
  });
}

// x and y of one shape and any plain format; y may be x.
inline Status check_rows(const Operand& x, const Result& y, door::Memory& memory) {
  if (Status s = door::check_plain("x", x.format); !s.ok()) return s;
  if (Status s = door::check_plain("y", y.format); !s.ok()) return s;
  if (Status s = memory.reads("x", x); !s.ok()) return s;
  if (Status s = door::check_extents("y", y, x.extent, "x"); !s.ok()) return s;
  if (Status s = memory.writes("y", y); !s.ok()) return s;
  if (y.data == x.data && y.format == x.format && y.stride == x.stride) memory.may_be("y", "x");
  return {};
}

// f on every number of x.
template <class F>
void map_numbers(const Operand& x, const Result& y, const Executor& executor, const F& f) {
  each_row(executor, x.extent, [&](index_t b, index_t h, index_t t) {
    const Row from(x, b, h, t);
    const Row to(y, b, h, t);
    alignas(f32) float values[kChunk];
    each_chunk(0, x.extent[3], [&](index_t d, index_t count) {
      from.read(d, count, values);
      f(h, d, count, values);
      to.write(d, count, values);
    });
  });
}

}   // namespace recurrent_norms

// y = x / sqrt(sum x^2 + eps), row by row, or x / max(|x|, eps).
inline Status l2_norm(const Operand& x_any, const Result& y_any, const Executor& executor = {}, float eps = 1e-6f,
                      L2Floor floor = L2Floor::added) {
  using namespace recurrent_norms;
  const Operand x = door::tidy_operand(x_any);
  const Result y = door::tidy_operand(y_any);
  door::Memory memory;
  if (Status s = check_rows(x, y, memory); !s.ok()) return s;
  if (Status s = check_lanes(executor); !s.ok()) return s;
  if (!(eps >= 0) || floor > L2Floor::at_least)
    return door::invalid("fovea: l2_norm with eps %g and floor %d", static_cast<double>(eps), static_cast<int>(floor));
  if (Status s = memory.check_apart(); !s.ok()) return s;
  each_row(executor, x.extent, [&](index_t b, index_t h, index_t t) {
    const Row from(x, b, h, t);
    const Row to(y, b, h, t);
    alignas(f32) float values[kChunk];
    f32 squares(0.f);
    each_chunk(0, x.extent[3], [&](index_t d, index_t count) {
      from.read(d, count, values);
      for (index_t i = 0; i < count; i += kLanes) squares = fma(load(values + i), load(values + i), squares);
    });
    const float sum = reduce_add(squares);
    const f32 factor(1.f / (floor == L2Floor::added ? std::sqrt(sum + eps) : std::max(std::sqrt(sum), eps)));
    each_chunk(0, x.extent[3], [&](index_t d, index_t count) {
      from.read(d, count, values);
      for (index_t i = 0; i < count; i += kLanes) store(values + i, load(values + i) * factor);
      to.write(d, count, values);
    });
  });
  return {};
}

// RMSNorm and gate of output rows, in the order of `norm`. gate [batch, head, pos, dim | 1], not read where the activation
// is none; gain [1, head | 1, 1, dim], without data 1. y may be x.
inline Status gated_rms_norm(const Operand& x_any, const Operand& gate_any, const Operand& gain_any, const Result& y_any,
                             const GatedRmsNorm& norm = {}, const Executor& executor = {}) {
  using namespace recurrent_norms;
  const Operand x = door::tidy_operand(x_any), gate = door::tidy_operand(gate_any), gain = door::tidy_operand(gain_any);
  const Result y = door::tidy_operand(y_any);
  const std::array<index_t, 4>& e = x.extent;
  const index_t group = norm.group == 0 ? std::max<index_t>(e[3], 1) : norm.group;
  const bool gated = norm.activation != OutputGate::none;
  door::Memory memory;
  if (Status s = check_rows(x, y, memory); !s.ok()) return s;
  if (Status s = check_lanes(executor); !s.ok()) return s;
  if (!(norm.eps >= 0) || norm.activation > OutputGate::silu || norm.order > NormOrder::gate_first)
    return door::invalid("fovea: gated_rms_norm with eps %g, activation %d, order %d", static_cast<double>(norm.eps),
                         static_cast<int>(norm.activation), static_cast<int>(norm.order));
  if (group < 1 || e[3] % group != 0)
    return door::invalid("fovea: groups of %td numbers do not fill rows of %td", group, e[3]);
  if (gated) {
    if (Status s = door::check_plain("gate", gate.format); !s.ok()) return s;
    if (gate.extent[3] != 1) {
      if (Status s = door::check_extents("gate", gate, e, "x"); !s.ok()) return s;
    } else if (Status s = door::check_extents("gate", gate, {e[0], e[1], e[2], 1}, "x"); !s.ok()) {
      return s;
    }
    if (Status s = memory.reads("gate", gate); !s.ok()) return s;
  }
  if (gain.data != nullptr) {
    if (Status s = door::check_plain("gain", gain.format); !s.ok()) return s;
    if (Status s = door::check_extents("gain", gain, {1, gain.extent[1] == 1 ? 1 : e[1], 1, e[3]}, "x"); !s.ok()) return s;
    if (Status s = memory.reads("gain", gain); !s.ok()) return s;
  }
  if (Status s = memory.check_apart(); !s.ok()) return s;
  const bool gate_first = gated && norm.order == NormOrder::gate_first;
  each_row(executor, e, [&](index_t b, index_t h, index_t t) {
    const Row from(x, b, h, t), opens(gate, gated ? b : 0, gated ? h : 0, gated ? t : 0), grows(gain, 0, h, 0);
    const Row to(y, b, h, t);
    alignas(f32) float values[kChunk], factors[kChunk];
    const auto activations = [&](index_t d, index_t count) {
      opens.read(d, count, factors);
      for (index_t i = 0; i < count; i += kLanes) store(factors + i, gates::activate(norm.activation, load(factors + i)));
    };
    const auto read = [&](index_t d, index_t count) {
      from.read(d, count, values);
      if (!gate_first) return;
      activations(d, count);
      for (index_t i = 0; i < count; i += kLanes) store(values + i, load(values + i) * load(factors + i));
    };
    for (index_t begin = 0; begin < e[3]; begin += group) {
      f32 squares(0.f);
      each_chunk(begin, begin + group, [&](index_t d, index_t count) {
        read(d, count);
        for (index_t i = 0; i < count; i += kLanes) squares = fma(load(values + i), load(values + i), squares);
      });
      const f32 scale(1.f / std::sqrt(reduce_add(squares) / static_cast<float>(group) + norm.eps));
      each_chunk(begin, begin + group, [&](index_t d, index_t count) {
        read(d, count);
        for (index_t i = 0; i < count; i += kLanes) store(values + i, load(values + i) * scale);
        grows.read(d, count, factors);
        for (index_t i = 0; i < count; i += kLanes) store(values + i, load(values + i) * load(factors + i));
        if (gated && !gate_first) {
          activations(d, count);
          for (index_t i = 0; i < count; i += kLanes) store(values + i, load(values + i) * load(factors + i));
        }
        to.write(d, count, values);
      });
    }
  });
  return {};
}

// The gates of Gated DeltaNet (dim 1) and KDA (dim of the keys), in the logarithmic form that Decay takes. x, g [batch,
// head, pos, dim]; g may be x.
inline Status log_decay_gate(const Operand& x_any, const LogDecayGate& gate, const Tensor<float>& g_any,
                             const Executor& executor = {}) {
  using namespace recurrent_norms;
  const Operand x = door::tidy_operand(x_any);
  const Result g = door::tidy_operand(Result(g_any));
  const View<const float, 2> dt_bias = tidy(gate.dt_bias);
  door::Memory memory;
  if (Status s = check_rows(x, g, memory); !s.ok()) return s;
  if (Status s = check_lanes(executor); !s.ok()) return s;
  if (!gate.a_log.empty() && static_cast<index_t>(gate.a_log.size()) != x.extent[1])
    return door::invalid("fovea: a_log has %zu numbers for %td heads", gate.a_log.size(), x.extent[1]);
  if (dt_bias && (dt_bias.extent[0] != x.extent[1] || (dt_bias.extent[1] != 1 && dt_bias.extent[1] != x.extent[3])))
    return door::invalid("fovea: dt_bias is [%td, %td], must be [%td, 1 | %td]", dt_bias.extent[0], dt_bias.extent[1],
                         x.extent[1], x.extent[3]);
  if (gate.lower_bound && !(*gate.lower_bound < 0 && std::isfinite(*gate.lower_bound)))
    return door::invalid("fovea: lower_bound %g is not a finite number below 0", static_cast<double>(*gate.lower_bound));
  if (Status s = memory.reads("a_log", door::view_of(gate.a_log)); !s.ok()) return s;
  if (Status s = memory.reads("dt_bias", dt_bias); !s.ok()) return s;
  if (Status s = memory.check_apart(); !s.ok()) return s;
  map_numbers(x, g, executor, [&](index_t h, index_t d, index_t count, float* values) {
    const float rate = gate.a_log.empty() ? 1.f : std::exp(gate.a_log[static_cast<std::size_t>(h)]);
    for (index_t i = 0; i < count; i += kLanes) {
      f32 z = load(values + i);
      if (dt_bias)
        z += dt_bias.extent[1] == 1 ? f32(dt_bias(h, 0)) : load_strided(&dt_bias(h, d + i), dt_bias.stride[1], count - i);
      store(values + i,
            gate.lower_bound ? f32(*gate.lower_bound) * logistic(f32(rate) * z) : f32(-rate) * gates::softplus(z));
    }
  });
  return {};
}

// beta = sigmoid(b), twice that where eigenvalues of the transition may be negative (allow_neg_eigval). b, beta [batch,
// head, pos, dim]; beta may be b.
inline Status beta_gate(const Operand& b_any, const Tensor<float>& beta_any, bool negative_eigenvalues = false,
                        const Executor& executor = {}) {
  using namespace recurrent_norms;
  const Operand b = door::tidy_operand(b_any);
  const Result beta = door::tidy_operand(Result(beta_any));
  door::Memory memory;
  if (Status s = check_rows(b, beta, memory); !s.ok()) return s;
  if (Status s = check_lanes(executor); !s.ok()) return s;
  if (Status s = memory.check_apart(); !s.ok()) return s;
  const f32 factor(negative_eigenvalues ? 2.f : 1.f);
  map_numbers(b, beta, executor, [&](index_t, index_t, index_t count, float* values) {
    for (index_t i = 0; i < count; i += kLanes) store(values + i, factor * logistic(load(values + i)));
  });
  return {};
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
