// SPDX-License-Identifier: Apache-2.0
// Feature maps phi of linear attention, one row at a time in double. phi(q) . phi(k) stands in for exp(q . k / sqrt(d)).
#pragma once
#include "recurrence.hpp"

namespace fovea {
inline namespace v0 {
namespace reference {
inline namespace FOVEA_ARCH {

using MatrixView = View<const double, 2>;

inline Vector concatenated(const Vector& a, const Vector& b) {
  Vector out(a.size() + b.size());
  out[std::slice(0, a.size(), 1)] = a;
  out[std::slice(a.size(), b.size(), 1)] = b;
  return out;
}

// W x + bias with W [feature, dim]; no bias where it is empty.
inline Vector affine(const MatrixView& w, const Vector& x, std::span<const double> bias = {}) {
  Vector out(size_of(w.extent[0]));
  for (index_t f = 0; f < w.extent[0]; ++f) {
    if (!bias.empty()) out[size_of(f)] = bias[size_of(f)];
    for (index_t d = 0; d < w.extent[1]; ++d) out[size_of(f)] += w(f, d) * x[size_of(d)];
  }
  return out;
}

inline Vector softmax_row(const Vector& x) {
  const Vector e = std::exp(x - x.max());
  return e / e.sum();
}

inline Vector at_least(const Vector& x, double low) {
  Vector out = x;
  for (double& value : out) value = std::max(value, low);
  return out;
}

// x + 1 for x > 0, e^x else (Katharopoulos et al. 2020, arXiv 2006.16236).
inline Vector elu_features(const Vector& x) {
  Vector out = x;
  for (double& value : out) value = value > 0 ? value + 1 : std::exp(value);
  return out;
}

inline Vector relu_features(const Vector& x) { return at_least(x, 0); }

// T2R (Kasai et al. 2021, arXiv 2103.13076): relu(W x + b).
inline Vector t2r_features(const Vector& x, const MatrixView& w, std::span<const double> bias = {}) {
  return relu_features(affine(w, x, bias));
}

// Hedgehog (Zhang et al. 2024, arXiv 2402.04347) as flash-linear-attention computes it: one softmax over [y, -y] with
// y = 2 (W x + b).
inline Vector hedgehog_features(const Vector& x, const MatrixView& w, std::span<const double> bias = {}) {
  const Vector y = 2. * affine(w, x, bias);
  return softmax_row(concatenated(y, -y));
}

// Hedgehog as LoLCATs computes it (Zhang et al. 2024, arXiv 2410.10254): each half its own softmax. W is [dim, feature].
inline Vector lolcats_features(const Vector& x, const MatrixView& w) {
  Vector y(size_of(w.extent[1]));
  for (index_t d = 0; d < w.extent[0]; ++d) {
    for (index_t f = 0; f < w.extent[1]; ++f) y[size_of(f)] += x[size_of(d)] * w(d, f);
  }
  return at_least(concatenated(softmax_row(y), softmax_row(-y)), 1e-12);
}

// LoLCATs' exponential map: [e^{x - max x}, e^{-x + min x}].
inline Vector exponential_features(const Vector& x) {
  return at_least(concatenated(std::exp(x - x.max()), std::exp(x.min() - x)), 1e-12);
}

// DPFP (Schlag, Irie, Schmidhuber 2021, arXiv 2102.11174): r = [relu(x), relu(-x)], phi = [r * roll(r, j)] for j = 1 .. nu.
// flash-linear-attention takes [relu(x), -relu(x)] for r.
enum class DpfpHalf { relu_of_minus, minus_relu };
inline Vector dpfp_features(const Vector& x, int nu, DpfpHalf half = DpfpHalf::relu_of_minus) {
  const Vector r =
      concatenated(relu_features(x), half == DpfpHalf::minus_relu ? Vector(-relu_features(x)) : relu_features(-x));
  Vector out;
  for (int j = 1; j <= nu; ++j) out = concatenated(out, r * r.cshift(-j));
  return out;
}

// Based (Arora et al. 2024, arXiv 2402.18668): the Taylor series to the second order, phi(q) . phi(k) = 1 + u + u^2 / 2 with
// u = q . k / sqrt(d). Products of two different numbers appear once, with weight sqrt(2).
inline Vector taylor_features(const Vector& x) {
  const double d = static_cast<double>(x.size());
  std::vector<double> out{1.};
  for (const double value : x) out.push_back(value / std::pow(d, 0.25));
  for (const double value : x) out.push_back(value * value / std::sqrt(2 * d));
  for (std::size_t i = 0; i < x.size(); ++i) {
    for (std::size_t j = i + 1; j < x.size(); ++j) out.push_back(x[i] * x[j] / std::sqrt(d));
  }
  return Vector(out.data(), out.size());
}

// ReBased (Aksenov et al. 2024, arXiv 2402.10644): phi(q) . phi(k) = (q' . k')^2 / d of x' = gamma LayerNorm(x) + beta.
inline Vector rebased_features(const Vector& x, const Vector& gamma, const Vector& beta, double eps = 1e-5) {
  const double d = static_cast<double>(x.size());
  const Vector centred = x - x.sum() / d;
  const Vector y = gamma * centred / std::sqrt(dot(centred, centred) / d + eps) + beta;
  Vector out;
  for (const double value : y) out = concatenated(out, value * y / std::sqrt(d));
  return out;
}

// cosFormer (Qin et al. 2022, arXiv 2202.08791): weights relu(q) . relu(k) cos(pi (i - j) / (2 M)), never negative while
// |i - j| <= M. Positions count from 1; M is the length of the whole sequence, so a stream needs a fixed one.
inline Vector cosformer_features(const Vector& x, index_t position, index_t longest) {
  const double angle = std::acos(0.) * static_cast<double>(position) / static_cast<double>(longest);
  return concatenated(relu_features(x) * std::sin(angle), relu_features(x) * std::cos(angle));
}

// (W1 x) * (W2 x), element by element.
inline Vector hadamard_features(const Vector& x, const MatrixView& w1, const MatrixView& w2) {
  return affine(w1, x) * affine(w2, x);
}

// Performer's FAVOR+ (Choromanski et al. 2021, arXiv 2009.14794): m^{-1/2} (exp(W x' - |x'|^2 / 2 - stabiliser) + eps) with
// x' = x d^{-1/4}. The stabiliser of a query is its own largest exponent, that of the keys one number for all of them.
inline Vector favor_exponents(const Vector& x, const MatrixView& w) {
  const Vector scaled = x / std::pow(static_cast<double>(x.size()), 0.25);
  return affine(w, scaled) - dot(scaled, scaled) / 2;
}
inline Vector favor_features(const Vector& exponents, double stabiliser, double eps = 1e-4) {
  return (std::exp(exponents - stabiliser) + eps) / std::sqrt(static_cast<double>(exponents.size()));
}
inline Vector favor_query_features(const Vector& x, const MatrixView& w, double eps = 1e-4) {
  const Vector exponents = favor_exponents(x, w);
  return favor_features(exponents, exponents.max(), eps);
}
// features [batch, head, pos, feature] of all keys of a sequence.
inline void favor_key_features(const Tensor<const double>& k, const Tensor<double>& features, const MatrixView& w,
                               double eps = 1e-4) {
  for (index_t b = 0; b < k.extent[0]; ++b) {
    for (index_t h = 0; h < k.extent[1]; ++h) {
      double largest = -HUGE_VAL;
      for (index_t t = 0; t < k.extent[2]; ++t) largest = std::max(largest, favor_exponents(row(k, b, h, t), w).max());
      for (index_t t = 0; t < k.extent[2]; ++t) {
        put(features, b, h, t, favor_features(favor_exponents(row(k, b, h, t), w), largest, eps));
      }
    }
  }
}
// The ReLU kernel of the same paper: relu(W x') + eps.
inline Vector favor_relu_features(const Vector& x, const MatrixView& w, double eps = 1e-3) {
  return relu_features(affine(w, x / std::pow(static_cast<double>(x.size()), 0.25))) + eps;
}

}   // namespace FOVEA_ARCH
}   // namespace reference
}   // namespace v0
}   // namespace fovea
