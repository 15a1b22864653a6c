// SPDX-License-Identifier: Apache-2.0
// Feature maps phi of linear attention on rows of floats: what stands in for exp(q . k / sqrt(dim)) as phi(q) . phi(k). A
// map is any functor with
//   index_t features(index_t dim) const;   // 0: not a map of rows of dim numbers
//   void operator()(index_t head, index_t pos, const float* row, float* features) const;
// `row` has dim numbers and `features` features(dim); they do not overlap. `pos` counts from the first token of the sequence,
// those before the call included (LinearOptions::first_pos). No map allocates. Learned matrices are views
// [head | 1, ..]; of a tensor with shared heads, `head` is that tensor's head. Citations are in reference/feature_maps.hpp.
#pragma once
#include <algorithm>
#include <cmath>
#include <concepts>

#include "../../core/view.hpp"
#include "../../simd/lookup.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

template <class Map>
concept FeatureMap = requires(const Map& map, index_t n, const float* row, float* features) {
  { map.features(n) } -> std::convertible_to<index_t>;
  map(n, n, row, features);
};

namespace feature_rows {

FOVEA_INLINE f32 load_part(const float* from, index_t count) {
  return count >= kLanes ? load(from) : load_some(from, count);
}
FOVEA_INLINE void store_part(float* to, f32 x, index_t count) {
  if (count >= kLanes) return store(to, x);
  store_some(to, x, count);
}
FOVEA_INLINE f32 first_part(f32 x, index_t count) { return count >= kLanes ? x : first_of(x, count); }

// to[i] = f(from[i]); `to` may be `from`.
template <class F>
FOVEA_INLINE void each(const float* from, index_t count, float* to, const F& f) {
  for (index_t i = 0; i < count; i += kLanes) store_part(to + i, f(load_part(from + i, count - i)), count - i);
}

FOVEA_INLINE f32 at_least(f32 x, float low) { return select(x < f32(low), f32(low), x); }   // NaN stays NaN

FOVEA_INLINE float sum(const float* x, index_t count) {
  f32 total(0.f);
  for (index_t i = 0; i < count; i += kLanes) total = total + load_part(x + i, count - i);
  return reduce_add(total);
}

FOVEA_INLINE float dot(const float* a, const float* b, index_t count) {
  f32 total(0.f);
  for (index_t i = 0; i < count; i += kLanes) total = fma(load_part(a + i, count - i), load_part(b + i, count - i), total);
  return reduce_add(total);
}

struct Extremes {
  float low, high;
};
inline Extremes extremes(const float* x, index_t count) {
  Extremes found{x[0], x[0]};
  index_t i = 0;
  if (count >= kLanes) {
    f32 low = load(x), high = low;
    for (i = kLanes; i + kLanes <= count; i += kLanes) {
      const f32 part = load(x + i);
      low = select(part < low, part, low);
      high = select(part > high, part, high);
    }
    found = {-reduce_max(-low), reduce_max(high)};
  }
  for (; i < count; ++i) found = {std::min(found.low, x[i]), std::max(found.high, x[i])};
  return found;
}

// to[i] = e^(factor from[i] + offset); returns their sum. `to` may be `from`.
inline float exponentials(const float* from, index_t count, float factor, float offset, float* to) {
  f32 total(0.f);
  for (index_t i = 0; i < count; i += kLanes) {
    const f32 x = exp(fma(load_part(from + i, count - i), f32(factor), f32(offset)));
    store_part(to + i, x, count - i);
    total = total + first_part(x, count - i);
  }
  return reduce_add(total);
}

// [softmax(y), softmax(-y)], nothing below `low`. y may be the first half of `features`.
inline void softmax_halves(const float* y, index_t count, float low, float* features) {
  const Extremes ends = extremes(y, count);
  const float minus = 1.f / exponentials(y, count, -1.f, ends.low, features + count);
  const float plus = 1.f / exponentials(y, count, 1.f, -ends.high, features);
  each(features, count, features, [&](f32 x) { return at_least(x * f32(plus), low); });
  each(features + count, count, features + count, [&](f32 x) { return at_least(x * f32(minus), low); });
}

// The matrix of a head of [head | 1, row, column].
FOVEA_INLINE View<const float, 2> head_matrix(const View<const float, 3>& w, index_t head) {
  return {w.data + (w.extent[0] == 1 ? 0 : head * w.stride[0]), {w.extent[1], w.extent[2]}, {w.stride[1], w.stride[2]}};
}

// out = W x with W [feature, dim]. Eight rows of W in eight chains where dim is contiguous, columns where features are: 8
// or 16 FMAs per vector of x or broadcast of it.
inline void multiply(const View<const float, 2>& w, const float* x, float* out) {
  const index_t features = w.extent[0], dim = w.extent[1];
  if (w.stride[1] == 1 || dim == 1) {
    constexpr int kChains = 8;
    for (index_t f = 0; f < features; f += kChains) {
      const float* row[kChains];
      f32 chain[kChains];
      FOVEA_UNROLL
      for (int n = 0; n < kChains; ++n) {
        row[n] = w.data + std::min(f + n, features - 1) * w.stride[0];
        chain[n] = f32(0.f);
      }
      index_t d = 0;
      for (; d + kLanes <= dim; d += kLanes) {
        const f32 part = load(x + d);
        FOVEA_UNROLL
        for (int n = 0; n < kChains; ++n) chain[n] = fma(load(row[n] + d), part, chain[n]);
      }
      if (d < dim) {
        const f32 part = load_some(x + d, dim - d);
        FOVEA_UNROLL
        for (int n = 0; n < kChains; ++n) chain[n] = fma(load_some(row[n] + d, dim - d), part, chain[n]);
      }
      float sums[kChains];
      reduce_add4(chain[0], chain[1], chain[2], chain[3], sums);
      reduce_add4(chain[4], chain[5], chain[6], chain[7], sums + 4);
      for (index_t n = 0; n < kChains && f + n < features; ++n) out[f + n] = sums[n];
    }
    return;
  }
  if (w.stride[0] == 1 || features == 1) {
    constexpr int kVectors = 4;
    index_t f = 0;
    for (; f + kVectors * kLanes <= features; f += kVectors * kLanes) {
      f32 total[kVectors];
      FOVEA_UNROLL
      for (int n = 0; n < kVectors; ++n) total[n] = f32(0.f);
      for (index_t d = 0; d < dim; ++d) {
        const float* const column = w.data + d * w.stride[1] + f;
        FOVEA_UNROLL
        for (int n = 0; n < kVectors; ++n) total[n] = fma(load(column + n * kLanes), f32(x[d]), total[n]);
      }
      FOVEA_UNROLL
      for (int n = 0; n < kVectors; ++n) store(out + f + n * kLanes, total[n]);
    }
    for (; f < features; f += kLanes) {
      f32 total(0.f);
      for (index_t d = 0; d < dim; ++d) {
        total = fma(load_part(w.data + d * w.stride[1] + f, features - f), f32(x[d]), total);
      }
      store_part(out + f, total, features - f);
    }
    return;
  }
  for (index_t f = 0; f < features; ++f) {
    float total = 0;
    for (index_t d = 0; d < dim; ++d) total += w.data[f * w.stride[0] + d * w.stride[1]] * x[d];
    out[f] = total;
  }
}

// out = W x + bias; a null bias is none. bias [head | 1, feature].
inline void affine(const View<const float, 3>& w, const View<const float, 2>& bias, index_t head, const float* x,
                   float* out) {
  multiply(head_matrix(w, head), x, out);
  if (!bias) return;
  const float* const from = bias.data + (bias.extent[0] == 1 ? 0 : head * bias.stride[0]);
  for (index_t f = 0; f < w.extent[1]; ++f) out[f] += from[f * bias.stride[1]];
}

}   // namespace feature_rows

struct IdentityMap {
  index_t dim = 0;

  index_t features(index_t) const { return dim; }
  void operator()(index_t, index_t, const float* row, float* to) const { std::copy_n(row, dim, to); }
};

// x + 1 for x > 0, e^x else.
struct EluMap {
  index_t dim = 0;

  index_t features(index_t) const { return dim; }
  void operator()(index_t, index_t, const float* row, float* to) const {
    feature_rows::each(row, dim, to, [](f32 x) { return select(x > f32(0.f), x + f32(1.f), exp(x)); });
  }
};

// max(x, low); LoLCATs takes 1e-12 for `low`.
struct ReluMap {
  index_t dim = 0;
  float low = 0;

  index_t features(index_t) const { return dim; }
  void operator()(index_t, index_t, const float* row, float* to) const {
    feature_rows::each(row, dim, to, [this](f32 x) { return feature_rows::at_least(x, low); });
  }
};

// [e^(x - max x), e^(min x - x)], nothing below 1e-12: LoLCATs' "exp_dim".
struct ExponentialMap {
  index_t dim = 0;

  index_t features(index_t) const { return 2 * dim; }
  void operator()(index_t, index_t, const float* row, float* to) const {
    const feature_rows::Extremes ends = feature_rows::extremes(row, dim);
    const auto half = [&](float factor, float offset, float* at) {
      feature_rows::each(row, dim, at, [&](f32 x) {
        return feature_rows::at_least(exp(fma(x, f32(factor), f32(offset))), 1e-12f);
      });
    };
    half(1.f, -ends.high, to);
    half(-1.f, ends.low, to + dim);
  }
};

// DPFP: r = [relu(x), relu(-x)], phi = [r * roll(r, j)] for j = 1 .. rolls. The paper's r; flash-linear-attention's, which
// has -relu(x) for the second half and so gives features of both signs; weights of one are wrong in the other.
enum class DpfpForm : std::uint8_t { paper, flash_linear_attention };
struct DpfpMap {
  index_t dim = 0;
  index_t rolls = 4;   // flash-linear-attention; the authors' own code has 2
  DpfpForm form = DpfpForm::paper;

  index_t features(index_t) const { return 2 * dim * rolls; }
  void operator()(index_t, index_t, const float* row, float* to) const {
    const index_t all = 2 * dim;
    const auto part_of_r = [&](index_t n, index_t count) {   // r[n ..], none of it beyond its half
      const bool second = n >= dim;
      const f32 x = feature_rows::load_part(row + (second ? n - dim : n), count);
      if (!second) return feature_rows::at_least(x, 0.f);
      return form == DpfpForm::paper ? feature_rows::at_least(-x, 0.f) : -feature_rows::at_least(x, 0.f);
    };
    for (index_t roll = 1; roll <= rolls; ++roll, to += all) {
      for (index_t n = 0; n < all;) {
        const index_t other = (n - roll % all + all) % all;
        const index_t run = std::min(dim - n % dim, dim - other % dim);
        for (index_t i = 0; i < run; i += kLanes) {
          feature_rows::store_part(to + n + i, part_of_r(n + i, run - i) * part_of_r(other + i, run - i), run - i);
        }
        n += run;
      }
    }
  }
};

// [1, x / dim^(1/4), x_i^2 / sqrt(2 dim), x_i x_j / sqrt(dim) for i < j]: 1 + u + u^2 / 2 with u = q . k / sqrt(dim)
// (Based).
struct TaylorMap {
  index_t dim = 0;

  index_t features(index_t) const { return 1 + dim + dim * (dim + 1) / 2; }
  void operator()(index_t, index_t, const float* row, float* to) const {
    const auto d = static_cast<float>(dim);
    const float root = 1.f / std::sqrt(d), fourth = std::sqrt(root), square = root * 0.707106781186547524f;
    *to++ = 1.f;
    feature_rows::each(row, dim, to, [&](f32 x) { return x * f32(fourth); });
    to += dim;
    feature_rows::each(row, dim, to, [&](f32 x) { return x * x * f32(square); });
    to += dim;
    for (index_t i = 0; i + 1 < dim; ++i) {
      const f32 factor(row[i] * root);
      feature_rows::each(row + i + 1, dim - i - 1, to, [&](f32 x) { return x * factor; });
      to += dim - i - 1;
    }
  }
};

// [relu(x) sin, relu(x) cos] of pi (pos + 1) / (2 longest): weights relu(q) . relu(k) cos(pi (i - j) / (2 longest)), none
// negative while positions differ by less than `longest` (cosFormer). `longest` is part of the model: the length of the whole
// sequence, for a stream the longest context.
struct CosformerMap {
  index_t dim = 0;
  index_t longest = 1;

  index_t features(index_t) const { return 2 * dim; }
  void operator()(index_t, index_t pos, const float* row, float* to) const {
    const double angle = std::acos(0.) * static_cast<double>(pos + 1) / static_cast<double>(longest);
    const auto sine = static_cast<float>(std::sin(angle)), cosine = static_cast<float>(std::cos(angle));
    feature_rows::each(row, dim, to, [&](f32 x) { return feature_rows::at_least(x, 0.f) * f32(sine); });
    feature_rows::each(row, dim, to + dim, [&](f32 x) { return feature_rows::at_least(x, 0.f) * f32(cosine); });
  }
};

// relu(W x + bias) (T2R).
struct T2rMap {
  View<const float, 3> w = {};      // [head | 1, feature, dim]
  View<const float, 2> bias = {};   // [head | 1, feature]  null = none

  index_t features(index_t dim) const { return dim == w.extent[2] ? w.extent[1] : 0; }
  void operator()(index_t head, index_t, const float* row, float* to) const {
    feature_rows::affine(w, bias, head, row, to);
    feature_rows::each(to, w.extent[1], to, [](f32 x) { return feature_rows::at_least(x, 0.f); });
  }
};

// One softmax over [y, -y] with y = 2 (W x + bias): Hedgehog as flash-linear-attention computes it.
struct HedgehogMap {
  View<const float, 3> w = {};      // [head | 1, feature, dim]
  View<const float, 2> bias = {};   // [head | 1, feature]  null = none

  index_t features(index_t dim) const { return dim == w.extent[2] ? 2 * w.extent[1] : 0; }
  void operator()(index_t head, index_t, const float* row, float* to) const {
    const index_t count = w.extent[1];
    feature_rows::affine(w, bias, head, row, to);
    const feature_rows::Extremes ends = feature_rows::extremes(to, count);
    const float largest = 2.f * std::max(ends.high, -ends.low);
    const float minus = feature_rows::exponentials(to, count, -2.f, -largest, to + count);
    const f32 inverse(1.f / (minus + feature_rows::exponentials(to, count, 2.f, -largest, to)));
    feature_rows::each(to, 2 * count, to, [&](f32 x) { return x * inverse; });
  }
};

// [softmax(x W), softmax(-x W)], each half by itself, nothing below 1e-12: Hedgehog as LoLCATs computes it.
struct LolcatsMap {
  View<const float, 3> w = {};   // [head | 1, dim, feature]

  index_t features(index_t dim) const { return dim == w.extent[1] ? 2 * w.extent[2] : 0; }
  void operator()(index_t head, index_t, const float* row, float* to) const {
    const View<const float, 2> m = feature_rows::head_matrix(w, head);
    feature_rows::multiply({m.data, {m.extent[1], m.extent[0]}, {m.stride[1], m.stride[0]}}, row, to);
    feature_rows::softmax_halves(to, w.extent[2], 1e-12f, to);
  }
};

// y = gamma LayerNorm(x) + beta and its products: [y_i^2 / sqrt(dim), y_i y_j sqrt(2 / dim) for i < j], so that
// phi(q) . phi(k) = (y_q . y_k)^2 / dim (ReBased) with half the features of the outer product.
struct RebasedMap {
  index_t dim = 0;
  View<const float, 2> gamma = {}, beta = {};   // [head | 1, dim]
  float eps = 1e-5f;

  index_t features(index_t) const { return gamma && beta ? dim * (dim + 1) / 2 : 0; }
  void operator()(index_t head, index_t, const float* row, float* to) const {
    const auto d = static_cast<float>(dim);
    const f32 mean(feature_rows::sum(row, dim) / d);
    feature_rows::each(row, dim, to, [&](f32 x) { return x - mean; });
    const float inverse = 1.f / std::sqrt(feature_rows::dot(to, to, dim) / d + eps);
    const auto of_head = [&](const View<const float, 2>& view) {
      return view.data + (view.extent[0] == 1 ? 0 : head * view.stride[0]);
    };
    const float* const g = of_head(gamma);
    const float* const b = of_head(beta);
    for (index_t i = 0; i < dim; ++i) {
      to[i] = g[i * gamma.stride[1]] * (to[i] * inverse) + b[i * beta.stride[1]];   // y, until it is squared below
    }
    const float root = 1.f / std::sqrt(d), pair = root * 1.41421356237309505f;
    float* at = to + dim;
    for (index_t i = 0; i + 1 < dim; ++i) {
      const f32 factor(to[i] * pair);
      feature_rows::each(to + i + 1, dim - i - 1, at, [&](f32 y) { return y * factor; });
      at += dim - i - 1;
    }
    feature_rows::each(to, dim, to, [&](f32 y) { return y * y * f32(root); });
  }
};

// (W1 x) * (W2 x), element by element. Products are made kBlock features at a time: no room for both rows is needed.
struct HadamardMap {
  View<const float, 3> w1 = {}, w2 = {};   // [head | 1, feature, dim]

  index_t features(index_t dim) const { return dim == w1.extent[2] && w1.extent == w2.extent ? w1.extent[1] : 0; }
  void operator()(index_t head, index_t, const float* row, float* to) const {
    constexpr index_t kBlock = 64;
    float second[kBlock];
    feature_rows::multiply(feature_rows::head_matrix(w1, head), row, to);
    const View<const float, 2> w = feature_rows::head_matrix(w2, head);
    for (index_t f = 0; f < w.extent[0]; f += kBlock) {
      const index_t count = std::min(kBlock, w.extent[0] - f);
      feature_rows::multiply({w.data + f * w.stride[0], {count, w.extent[1]}, w.stride}, row, second);
      for (index_t n = 0; n < count; ++n) to[f + n] *= second[n];
    }
  }
};

// Features of a map without weights divided by their sum + eps: 1e-4 in flash-linear-attention (norm_q, norm_k), 0 in the
// code of DPFP.
template <class Map>
struct SumNormalizedMap {
  Map map;
  float eps = 1e-4f;

  index_t features(index_t dim) const { return dim == map.dim ? map.features(dim) : 0; }
  void operator()(index_t head, index_t pos, const float* row, float* to) const {
    const index_t count = map.features(map.dim);
    map(head, pos, row, to);
    const f32 inverse(1.f / (feature_rows::sum(to, count) + eps));
    feature_rows::each(to, count, to, [&](f32 x) { return x * inverse; });
  }
};

// phi(x) = m^(-1/2) (exp(W x' - |x'|^2 / 2 - s) + eps) with x' = x dim^(-1/4), m features. The stabiliser s of a query is
// the largest number of its own W x' and cancels in a normalised output; that of the keys must be one number for all keys
// that meet in a sum. Both are maxima of W x' without |x'|^2 / 2, so features may be small but not above m^(-1/2) (1 +
// eps).
namespace favor {

FOVEA_INLINE float inverse_fourth_root(index_t dim) { return 1.f / std::sqrt(std::sqrt(static_cast<float>(dim))); }

// W x of a row to its features, in place. norm = |x'|^2 / 2.
inline void close_row(float* projected, index_t count, float scale, float norm, float stabiliser, float eps) {
  const float root = 1.f / std::sqrt(static_cast<float>(count));
  feature_rows::each(projected, count, projected, [&](f32 p) {
    return (exp(fma(p, f32(scale), f32(-stabiliser)) - f32(norm)) + f32(eps)) * f32(root);
  });
}

// W x of a row to relu(W x') + eps, in place.
inline void close_relu_row(float* projected, index_t count, float scale, float eps) {
  feature_rows::each(projected, count, projected,
                     [&](f32 p) { return feature_rows::at_least(p * f32(scale), 0.f) + f32(eps); });
}

// |x'|^2 / 2.
FOVEA_INLINE float half_norm(const float* row, index_t dim) {
  return feature_rows::dot(row, row, dim) / (2.f * std::sqrt(static_cast<float>(dim)));
}

}   // namespace favor

struct FavorQueryMap {
  View<const float, 3> projection = {};   // [head | 1, feature, dim]  W
  float eps = 1e-4f;

  index_t features(index_t dim) const { return dim == projection.extent[2] ? projection.extent[1] : 0; }
  void operator()(index_t head, index_t, const float* row, float* to) const {
    const index_t count = projection.extent[1], dim = projection.extent[2];
    const float scale = favor::inverse_fourth_root(dim);
    feature_rows::multiply(feature_rows::head_matrix(projection, head), row, to);
    favor::close_row(to, count, scale, favor::half_norm(row, dim), scale * feature_rows::extremes(to, count).high, eps);
  }
};

struct FavorKeyMap {
  View<const float, 3> projection = {};   // [head | 1, feature, dim]  W
  View<const float, 1> stabiliser = {};   // [head | 1]  one number per head; favor_largest of the keys, or more
  float eps = 1e-4f;

  index_t features(index_t dim) const { return stabiliser && dim == projection.extent[2] ? projection.extent[1] : 0; }
  void operator()(index_t head, index_t, const float* row, float* to) const {
    const index_t count = projection.extent[1], dim = projection.extent[2];
    const float largest = stabiliser.data[stabiliser.extent[0] == 1 ? 0 : head * stabiliser.stride[0]];
    feature_rows::multiply(feature_rows::head_matrix(projection, head), row, to);
    favor::close_row(to, count, favor::inverse_fourth_root(dim), favor::half_norm(row, dim), largest, eps);
  }
};

// relu(W x') + eps: the ReLU kernel of the same paper.
struct FavorReluMap {
  View<const float, 3> projection = {};   // [head | 1, feature, dim]  W
  float eps = 1e-3f;

  index_t features(index_t dim) const { return dim == projection.extent[2] ? projection.extent[1] : 0; }
  void operator()(index_t head, index_t, const float* row, float* to) const {
    feature_rows::multiply(feature_rows::head_matrix(projection, head), row, to);
    favor::close_relu_row(to, projection.extent[1], favor::inverse_fourth_root(projection.extent[2]), eps);
  }
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
