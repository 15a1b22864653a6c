// SPDX-License-Identifier: Apache-2.0
// Results over disjoint keys, put together: by their LSE where weights share a denominator, by adding where they have none.
// What is normalised over the whole row (sparsemax, entmax) cannot be put together.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "../simd/simd.hpp"
#include "checks.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {
namespace door {

template <class... Views>
void tidy_all(Views&... views) {
  ((views = tidy(views)), ...);
}

inline Status check_sum(const Tensor<float>& out_a, const Tensor<const float>& out_b) {
  Bytes a, b;
  if (Status s = check_data("out_a", out_a, a); !s.ok()) return s;
  if (Status s = check_data("out_b", out_b, b); !s.ok()) return s;
  if (Status s = check_extents("out_b", out_b, out_a.extent, "out_a"); !s.ok()) return s;
  if (!writes_apart(out_a)) return invalid("fovea: out_a overlaps itself");
  return check_apart({"out_a", a}, "out_b", b);
}

inline Status check_partials(const Tensor<float>& out_a, const View<float, 3>& lse_a, const Tensor<const float>& out_b,
                             const View<const float, 3>& lse_b) {
  if (Status s = check_sum(out_a, out_b); !s.ok()) return s;
  Bytes a, b, la, lb;
  if (Status s = check_data("out_a", out_a, a); !s.ok()) return s;
  if (Status s = check_data("out_b", out_b, b); !s.ok()) return s;
  if (Status s = check_data("lse_a", lse_a, la); !s.ok()) return s;
  if (Status s = check_data("lse_b", lse_b, lb); !s.ok()) return s;
  const std::array<index_t, 3> rows = {out_a.extent[0], out_a.extent[1], out_a.extent[2]};
  if (lse_a.extent != rows || lse_b.extent != rows) {
    return invalid("fovea: lse_a is [%td, %td, %td] and lse_b [%td, %td, %td], must be [%td, %td, %td]", lse_a.extent[0],
                   lse_a.extent[1], lse_a.extent[2], lse_b.extent[0], lse_b.extent[1], lse_b.extent[2], rows[0], rows[1],
                   rows[2]);
  }
  if (!writes_apart(lse_a)) return invalid("fovea: lse_a overlaps itself");
  for (const auto& [name, bytes] : {std::pair{"out_b", b}, std::pair{"lse_b", lb}}) {
    if (Status s = check_apart({"out_a", a}, name, bytes); !s.ok()) return s;
    if (Status s = check_apart({"lse_a", la}, name, bytes); !s.ok()) return s;
  }
  return check_apart({"out_a", a}, "lse_a", la);
}

// f(batch, head, pos) for every row.
template <class F>
void for_each_row(const Tensor<float>& out, const F& f) {
  for (index_t n = 0; n < out.extent[0]; ++n) {
    for (index_t h = 0; h < out.extent[1]; ++h) {
      for (index_t i = 0; i < out.extent[2]; ++i) f(n, h, i);
    }
  }
}

// Row a and its LSE become the result over the keys of a and b; strides in numbers.
inline void merge_row(float* a, index_t stride_a, float& lse, const float* b, index_t stride_b, float other, index_t dim) {
  const float empty = -std::numeric_limits<float>::infinity();
  if (other == empty) {
    for (index_t d = 0; lse == empty && d < dim; ++d) a[d * stride_a] = 0.f;
    return;
  }
  // Two infinite sinks cannot be weighed against each other; equal references make them equal.
  const double top = lse > other ? lse : other;
  const double weight_a = lse == empty                      ? 0.
                          : static_cast<double>(lse) == top ? 1.
                                                            : std::exp(static_cast<double>(lse) - top);
  const double weight_b = static_cast<double>(other) == top ? 1. : std::exp(static_cast<double>(other) - top);
  const double sum = weight_a + weight_b;
  const auto share_a = static_cast<float>(weight_a / sum), share_b = static_cast<float>(weight_b / sum);
  // Vectors whatever the strides: without a fused FMA they round otherwise than std::fma.
  for (index_t d = 0; d < dim; d += kLanes) {
    const index_t here = std::min(kLanes, dim - d);
    float* const to = a + d * stride_a;
    const f32 from = load_strided(b + d * stride_b, stride_b, here);
    const f32 merged = lse == empty ? from : fma(load_strided(to, stride_a, here), f32(share_a), from * f32(share_b));
    if (stride_a == 1) {
      here == kLanes ? store(to, merged) : store_some(to, merged, here);
    } else {
      alignas(f32) float lanes[kLanes];
      merged.store_aligned(lanes);
      for (index_t i = 0; i < here; ++i) to[i * stride_a] = lanes[i];
    }
  }
  lse = static_cast<float>(top + std::log(sum));
}

}   // namespace door

inline Status merge(Tensor<float> out_a, View<float, 3> lse_a, Tensor<const float> out_b, View<const float, 3> lse_b) {
  door::tidy_all(out_a, lse_a, out_b, lse_b);
  if (Status s = door::check_partials(out_a, lse_a, out_b, lse_b); !s.ok()) return s;
  door::for_each_row(out_a, [&](index_t n, index_t h, index_t i) {
    const index_t to = n * out_a.stride[0] + h * out_a.stride[1] + i * out_a.stride[2];
    const index_t from = n * out_b.stride[0] + h * out_b.stride[1] + i * out_b.stride[2];
    door::merge_row(out_a.data + to, out_a.stride[3], lse_a(n, h, i), out_b.data + from, out_b.stride[3], lse_b(n, h, i),
                    out_a.extent[3]);
  });
  return {};
}

// out_a += out_b: the union of the keys of two results whose weights have no denominator (sigmoid, relu with a given number
// of keys, elu).
inline Status merge_added(Tensor<float> out_a, Tensor<const float> out_b) {
  door::tidy_all(out_a, out_b);
  if (Status s = door::check_sum(out_a, out_b); !s.ok()) return s;
  door::for_each_row(out_a, [&](index_t b, index_t h, index_t i) {
    for (index_t d = 0; d < out_a.extent[3]; ++d) out_a(b, h, i, d) += out_b(b, h, i, d);
  });
  return {};
}

// out_a, lse_a become the result over the keys of a and b, whose denominators exp(lse) both hold the constant `in_both` > 0:
//   D = D_a + D_b - in_both,  out = (D_a out_a + D_b out_b) / D
// No digits are lost in the difference: D is not less than either of the two.
inline Status merge_sharing(Tensor<float> out_a, View<float, 3> lse_a, Tensor<const float> out_b, View<const float, 3> lse_b,
                            float in_both) {
  door::tidy_all(out_a, lse_a, out_b, lse_b);
  if (!(in_both > 0.f) || !std::isfinite(in_both))
    return door::invalid("fovea: in_both is %g, must be positive; without a constant use merge",
                         static_cast<double>(in_both));
  if (Status s = door::check_partials(out_a, lse_a, out_b, lse_b); !s.ok()) return s;
  door::for_each_row(out_a, [&](index_t b, index_t h, index_t i) {
    float& lse = lse_a(b, h, i);
    const double one = static_cast<double>(lse), other = static_cast<double>(lse_b(b, h, i));
    const double top = one > other ? one : other;
    const double share_a = std::exp(one - top), share_b = std::exp(other - top);
    const double sum = share_a + share_b - static_cast<double>(in_both) * std::exp(-top);
    const auto factor_a = static_cast<float>(share_a / sum), factor_b = static_cast<float>(share_b / sum);
    for (index_t d = 0; d < out_a.extent[3]; ++d) {
      float& to = out_a(b, h, i, d);
      to = std::fma(to, factor_a, out_b(b, h, i, d) * factor_b);
    }
    lse = static_cast<float>(top + std::log(sum));
  });
  return {};
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
