// SPDX-License-Identifier: Apache-2.0
// What the references of the recurrent mechanisms share: a state matrix, and the loop over sequences and heads that loads,
// lends and stores it. Everything is double. Inputs are trusted.
#pragma once
#include <algorithm>
#include <cmath>
#include <valarray>
#include <vector>

#include "../core/recurrent.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {

using Vector = std::valarray<double>;

inline namespace FOVEA_ARCH {

inline std::size_t size_of(index_t extent) { return static_cast<std::size_t>(extent); }

inline double dot(const Vector& a, const Vector& b) { return (a * b).sum(); }
inline double logistic(double x) { return 1 / (1 + std::exp(-x)); }
inline double log_sigmoid(double x) { return x < 0 ? x - std::log1p(std::exp(x)) : -std::log1p(std::exp(-x)); }
inline double softplus(double x) { return -log_sigmoid(-x); }
inline double silu(double x) { return x * logistic(x); }

// S of one head: dim_k rows of dim_v numbers.
struct StateMatrix {
  std::vector<Vector> rows;

  StateMatrix(index_t dim_k, index_t dim_v) : rows(size_of(dim_k), Vector(size_of(dim_v))) {}

  // S <- Diag(alpha) S
  void decay(const Vector& alpha) {
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i] *= alpha[i];
  }
  // S <- S + k v'
  void add(const Vector& k, const Vector& v) {
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i] += k[i] * v;
  }
  void add(const StateMatrix& other) {
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i] += other.rows[i];
  }
  // S' q
  Vector read(const Vector& q) const {
    Vector o(rows.empty() ? 0 : rows[0].size());
    for (std::size_t i = 0; i < rows.size(); ++i) o += q[i] * rows[i];
    return o;
  }
};

// x[batch, head, pos, :], where an axis of extent 1 is shared.
inline Vector row(const Tensor<const double>& x, index_t batch, index_t head, index_t pos) {
  Vector out(size_of(x.extent[3]));
  const index_t b = x.extent[0] == 1 ? 0 : batch, t = x.extent[2] == 1 ? 0 : pos;
  for (index_t d = 0; d < x.extent[3]; ++d) out[size_of(d)] = x(b, head, t, d);
  return out;
}

inline void put(const Tensor<double>& out, index_t batch, index_t head, index_t pos, const Vector& values) {
  for (index_t d = 0; d < out.extent[3]; ++d) out(batch, head, pos, d) = values[size_of(d)];
}

// A vector per head, such as a key sum, [sequence, head, n]: zeros where the view is null.
inline Vector load(const View<const double, 3>& view, index_t sequence, index_t head, index_t n) {
  Vector x(size_of(n));
  for (index_t d = 0; view && d < n; ++d) x[size_of(d)] = view(sequence, head, d);
  return x;
}
inline void save(const View<double, 3>& view, index_t sequence, index_t head, const Vector& x) {
  for (index_t d = 0; view && d < view.extent[2]; ++d) view(sequence, head, d) = x[size_of(d)];
}

// One number stands for n equal ones.
inline Vector widened(const Vector& x, index_t n) { return x.size() == 1 ? Vector(x[0], size_of(n)) : x; }

// What a call is about.
struct RecurrentShape {
  index_t batch, len, state_heads, out_heads, dim_k, dim_v;
};

inline RecurrentShape recurrent_shape(const Tensor<const double>& k, const Tensor<const double>& v,
                                      const Tensor<double>& out) {
  return {v.extent[0], v.extent[2], std::max(k.extent[1], v.extent[1]), out.extent[1], k.extent[3], v.extent[3]};
}

// The positions [begin, end) that belong to one sequence, and one of its states.
struct HeadRun {
  index_t sequence, batch, head, begin, end, state_heads, out_heads;
  HeadMap map;

  // What the state's head sees at position t.
  Vector row(const Tensor<const double>& x, index_t t) const {
    return reference::row(x, batch, shared_head(head, state_heads, x.extent[1], map), t);
  }
  double number(const Tensor<const double>& x, index_t t) const { return row(x, t)[0]; }

  // The factors of the state's rows at position t.
  Vector alpha(const Decay<double>& decay, index_t t, index_t dim_k) const {
    const Vector gate = widened(row(decay.gate, t), dim_k);
    return decay.form == DecayForm::log ? Vector(std::exp(gate)) : gate;
  }

  // out = read(q) for every query head that this state serves.
  template <class Read>
  void write_out(const Tensor<const double>& q, const Tensor<double>& out, index_t t, Read&& read) const {
    for (index_t h = 0; h < out_heads; ++h) {
      if (shared_head(h, out_heads, state_heads, map) != head) continue;
      put(out, batch, h, t, read(reference::row(q, batch, shared_head(h, out_heads, q.extent[1], map), t)));
    }
  }
};

// body(StateMatrix&, const HeadRun&) for every head of every sequence; the body walks over the tokens.
template <class Body>
void each_head(const RecurrentShape& shape, const RecurrentOptions<double>& options, Body&& body) {
  const auto& cu = options.cu_len;
  const index_t sequences = cu.empty() ? shape.batch : static_cast<index_t>(cu.size()) - 1;
  const bool v_first = options.layout == StateLayout::v_first;
  for (index_t n = 0; n < sequences; ++n) {
    const index_t begin = cu.empty() ? 0 : cu[size_of(n)], end = cu.empty() ? shape.len : cu[size_of(n + 1)];
    for (index_t h = 0; h < shape.state_heads; ++h) {
      StateMatrix s(shape.dim_k, shape.dim_v);
      const auto each_cell = [&](const auto& view, auto&& f) {
        for (index_t i = 0; view && i < shape.dim_k; ++i) {
          for (index_t j = 0; j < shape.dim_v; ++j) {
            f(v_first ? view(n, h, j, i) : view(n, h, i, j), s.rows[size_of(i)][size_of(j)]);
          }
        }
      };
      each_cell(options.initial_state, [](double stored, double& cell) { cell = stored; });
      body(s, HeadRun{n, cu.empty() ? n : 0, h, begin, end, shape.state_heads, shape.out_heads, options.head_map});
      each_cell(options.final_state, [](double& stored, double cell) { stored = cell; });
    }
  }
}

inline double scale_or(const RecurrentOptions<double>& options, double own) { return options.scale ? *options.scale : own; }
inline double inverse_root(index_t dim) { return 1 / std::sqrt(static_cast<double>(dim)); }

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
