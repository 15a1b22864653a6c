// SPDX-License-Identifier: Apache-2.0
// Multi-head latent attention as plain loops in double, in the letters of the DeepSeek-V2 paper (arXiv 2405.04434): always
// the expanded form, key by key. Inputs are trusted.
#pragma once
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "../core/attention_options.hpp"
#include "../core/mla.hpp"
#include "rope.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {

// One visible key of a row. `dots` is the magnitude that rounding errors of its score are relative to, the sum of all
// |scale q_d W_dc c_c| and |scale q_pe k_pe|.
struct MlaTerm {
  index_t key;
  double score, weight, dots;
};

// What one row did, for who wants to bound errors: v and v_size are [len_k, value], v_size the sums of |W_vc c_c|.
struct MlaRow {
  index_t sequence, head, q_index, batch, pos_q;
  std::span<const MlaTerm> terms;
  const double* v;
  const double* v_size;
  double max, lse;
};

inline namespace FOVEA_ARCH {

struct MlaIgnoreRow {
  void operator()(const MlaRow&) const {}
};

// out [batch, head, pos, value]. q [batch, head, pos, nope + rope], its rope part rotated. kv_b [1, head, nope + value,
// latent]: W_UK_h above W_UV_h. latents(sequence, key, d) is number d of the cached row [c | k_pe]. len_k [sequence]. Of the
// options: scale, causal, window, q_offset, cu_len_q, sink.
template <class Latents, class Watch = MlaIgnoreRow>
void mla(Tensor<const double> q, Tensor<const double> kv_b, const Latents& latents, std::span<const index_t> len_k,
         const MlaDims& dims, Tensor<double> out, const AttentionOptions& options = {}, View<double, 3> lse = {},
         Watch&& watch = {}) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const double scale = options.scale ? double{*options.scale} : 1 / std::sqrt(static_cast<double>(dims.nope + dims.rope));
  const auto at = [](index_t row, index_t width, index_t column) { return static_cast<std::size_t>(row * width + column); };
  for (std::size_t b = 0; b < len_k.size(); ++b) {
    const auto sequence = static_cast<index_t>(b);
    const bool ragged = !options.cu_len_q.empty();
    const index_t first = ragged ? options.cu_len_q[b] : 0, batch = ragged ? 0 : sequence;
    const index_t len_q = ragged ? options.cu_len_q[b + 1] - first : q.extent[2], keys = len_k[b];
    const index_t offset = !options.q_offset.empty()                ? options.q_offset[b]
                           : options.causal == Causal::bottom_right ? keys - len_q
                                                                    : 0;
    const auto sized = [&](index_t width) { return std::vector<double>(static_cast<std::size_t>(keys * width)); };
    for (index_t h = 0; h < dims.heads; ++h) {
      // k^C_j = W^UK c_j, v^C_j = W^UV c_j, and the same sums of magnitudes.
      auto k = sized(dims.nope), k_size = sized(dims.nope), v = sized(dims.value), v_size = sized(dims.value);
      std::vector<double> c(static_cast<std::size_t>(dims.latent));
      for (index_t j = 0; j < keys && len_q > 0; ++j) {
        for (index_t n = 0; n < dims.latent; ++n) c[static_cast<std::size_t>(n)] = latents(sequence, j, n);
        for (index_t d = 0; d < dims.nope + dims.value; ++d) {
          const double* const w = &kv_b(0, h, d, 0);
          double sum = 0, size = 0;
          for (std::size_t n = 0; n < c.size(); ++n) {
            sum += w[n] * c[n];
            size += std::abs(w[n] * c[n]);
          }
          const bool key = d < dims.nope;
          (key ? k[at(j, dims.nope, d)] : v[at(j, dims.value, d - dims.nope)]) = sum;
          (key ? k_size[at(j, dims.nope, d)] : v_size[at(j, dims.value, d - dims.nope)]) = size;
        }
      }
      for (index_t i = 0; i < len_q; ++i) {
        const index_t pos = i + offset;
        const double sink = options.sink.empty() ? -infinity : double{options.sink[static_cast<std::size_t>(h)]};
        double max = sink;
        std::vector<MlaTerm> terms;
        for (index_t j = 0; j < keys; ++j) {
          if (options.causal != Causal::none && j > pos) continue;
          if (options.window.left >= 0 && pos - j > options.window.left) continue;
          if (options.window.right >= 0 && j - pos > options.window.right) continue;
          double dot = 0, dots = 0;
          for (index_t d = 0; d < dims.nope; ++d) {   // q^C . k^C
            const double x = q(batch, h, first + i, d);
            dot += x * k[at(j, dims.nope, d)];
            dots += std::abs(x) * k_size[at(j, dims.nope, d)];
          }
          for (index_t d = 0; d < dims.rope; ++d) {   // q^R . k^R
            const double product = q(batch, h, first + i, dims.nope + d) * latents(sequence, j, dims.latent + d);
            dot += product;
            dots += std::abs(product);
          }
          terms.push_back({j, scale * dot, 0, std::abs(scale) * dots});
          max = std::max(max, scale * dot);
        }
        const double reference = max == -infinity ? 0 : max;
        double sum = std::exp(sink - reference);
        for (MlaTerm& term : terms) sum += term.weight = std::exp(term.score - reference);
        for (index_t d = 0; d < dims.value; ++d) out(batch, h, first + i, d) = 0;
        for (MlaTerm& term : terms) {
          term.weight /= sum;
          for (index_t d = 0; d < dims.value; ++d)
            out(batch, h, first + i, d) += term.weight * v[at(term.key, dims.value, d)];
        }
        const double row_lse = reference + std::log(sum);
        if (lse) lse(batch, h, first + i) = row_lse;
        watch(MlaRow{sequence, h, i, batch, first + i, terms, v.data(), v_size.data(), max, row_lse});
      }
    }
  }
}

// A matrix [rows, columns] of doubles.
struct MlaMatrix {
  index_t rows = 0, columns = 0;
  std::vector<double> data;

  MlaMatrix() = default;
  MlaMatrix(index_t rows_, index_t columns_)
      : rows(rows_), columns(columns_), data(static_cast<std::size_t>(rows_ * columns_)) {}
  double& operator()(index_t r, index_t c) { return data[static_cast<std::size_t>(r * columns + c)]; }
  double operator()(index_t r, index_t c) const { return data[static_cast<std::size_t>(r * columns + c)]; }
};

// x W'.
inline MlaMatrix mla_linear(const MlaMatrix& x, const MlaMatrix& w) {
  MlaMatrix y(x.rows, w.rows);
  for (index_t i = 0; i < x.rows; ++i) {
    for (index_t n = 0; n < w.rows; ++n) {
      for (index_t d = 0; d < w.columns; ++d) y(i, n) += x(i, d) * w(n, d);
    }
  }
  return y;
}

// x / sqrt(mean x^2 + eps) * gain over the first `count` numbers of each row.
inline void mla_rms_norm(MlaMatrix& x, index_t count, const MlaMatrix& gain, double eps) {
  for (index_t i = 0; i < x.rows; ++i) {
    double square = 0;
    for (index_t d = 0; d < count; ++d) square += x(i, d) * x(i, d);
    const double factor = 1 / std::sqrt(square / static_cast<double>(count) + eps);
    for (index_t d = 0; d < count; ++d) x(i, d) *= factor * gain(0, d);
  }
}

// The weights of a layer; q_a and q_norm are empty where queries have no low-rank path.
struct MlaLayer {
  MlaDims dims;
  MlaMatrix q_a, q_norm;     // W_DQ [q_rank, model], gain [1, q_rank]
  MlaMatrix q_b;             // W_UQ and W_QR [head * (nope + rope), q_rank], or W_Q [.., model]
  MlaMatrix kv_a, kv_norm;   // W_DKV and W_KR [latent + rope, model], gain [1, latent]
  MlaMatrix kv_b;            // W_UK and W_UV [head * (nope + value), latent]
  MlaMatrix o;               // W_O [model, head * value]
  RopeOptions rope;
  RopeLayout layout = RopeLayout::interleaved;
  double scale = 0, eps = 1e-6;
};

// Cached rows [c | k_pe] of the tokens x [token, model] at positions[token].
inline MlaMatrix mla_latents(const MlaLayer& layer, const MlaMatrix& x, std::span<const index_t> positions) {
  MlaMatrix rows = mla_linear(x, layer.kv_a);
  mla_rms_norm(rows, layer.dims.latent, layer.kv_norm, layer.eps);
  std::vector<double> turned(static_cast<std::size_t>(layer.dims.rope));
  for (index_t i = 0; i < x.rows; ++i) {
    const index_t pos = positions[static_cast<std::size_t>(i)];
    rope_row(&rows(i, layer.dims.latent), turned.data(), layer.dims.rope, {pos, pos, pos}, layer.rope, layer.layout);
    for (index_t d = 0; d < layer.dims.rope; ++d) rows(i, layer.dims.latent + d) = turned[static_cast<std::size_t>(d)];
  }
  return rows;
}

// One sequence: y [token, model] of the tokens x, which are the last of the cached rows `cache`, causal.
inline MlaMatrix mla_layer(const MlaLayer& layer, const MlaMatrix& x, std::span<const index_t> positions,
                           const MlaMatrix& cache) {
  const MlaDims& dims = layer.dims;
  const index_t width = dims.nope + dims.rope;
  MlaMatrix c_q = x;
  if (layer.q_a.rows > 0) {
    c_q = mla_linear(x, layer.q_a);
    mla_rms_norm(c_q, c_q.columns, layer.q_norm, layer.eps);
  }
  MlaMatrix q = mla_linear(c_q, layer.q_b);
  std::vector<double> turned(static_cast<std::size_t>(dims.rope));
  for (index_t i = 0; i < x.rows; ++i) {
    const index_t pos = positions[static_cast<std::size_t>(i)];
    for (index_t h = 0; h < dims.heads; ++h) {
      double* const q_pe = &q(i, h * width + dims.nope);
      rope_row(q_pe, turned.data(), dims.rope, {pos, pos, pos}, layer.rope, layer.layout);
      std::copy(turned.begin(), turned.end(), q_pe);
    }
  }
  MlaMatrix o(x.rows, dims.heads * dims.value);
  const index_t keys = cache.rows;
  const AttentionOptions options{.scale = static_cast<float>(layer.scale), .causal = Causal::bottom_right};
  mla(
      {q.data.data(), {1, dims.heads, x.rows, width}, {0, width, dims.heads * width, 1}},
      {layer.kv_b.data.data(),
       {1, dims.heads, dims.nope + dims.value, dims.latent},
       {0, (dims.nope + dims.value) * dims.latent, dims.latent, 1}},
      [&](index_t, index_t j, index_t d) { return cache(j, d); }, {&keys, 1}, dims,
      {o.data.data(), {1, dims.heads, x.rows, dims.value}, {0, dims.value, dims.heads * dims.value, 1}}, options);
  return mla_linear(o, layer.o);
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
