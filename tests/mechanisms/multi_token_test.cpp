// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/multi_token.hpp"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/reference/multi_token.hpp"
#include "support/dense.hpp"
#include "support/executors.hpp"

namespace {

using namespace test;
using fovea::Causal;
using fovea::KeyPadding;
using fovea::MultiTokenOptions;
using fovea::Status;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Learned parameters of a layer, for `heads` heads.
struct Layer {
  index_t heads, dim_v;
  std::vector<float> pre{}, post{}, pre_mix{}, post_mix{}, norm_weight{}, gate{}, gate_bias{};
  MultiTokenOptions options{};

  Layer(index_t heads_, index_t dim_v_) : heads(heads_), dim_v(dim_v_) {}
  Layer(const Layer&) = delete;

  static std::vector<float> numbers(Random& random, index_t count, float spread) {
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& x : values) x = random.normal() * spread;
    return values;
  }
  // Random taps around the identity.
  static std::vector<float> kernel(Random& random, index_t heads, index_t cq, index_t ck, KeyPadding padding) {
    const index_t left = padding == KeyPadding::both ? ck / 2 : padding == KeyPadding::left ? ck - 1 : 0;
    std::vector<float> values = numbers(random, heads * cq * ck, 0.2f);
    for (index_t h = 0; h < heads; ++h) values[static_cast<std::size_t>((h * cq + cq - 1) * ck + left)] += 1;
    return values;
  }
  void set_pre(std::vector<float> values, index_t cq, index_t ck) {
    pre = std::move(values);
    options.pre = {pre.data(), {heads, cq, ck}, {cq * ck, ck, 1}};
  }
  void set_post(std::vector<float> values, index_t cq, index_t ck) {
    post = std::move(values);
    options.post = {post.data(), {heads, cq, ck}, {cq * ck, ck, 1}};
  }
  void set_pre_mix(std::vector<float> values) {
    pre_mix = std::move(values);
    options.pre_mix = {pre_mix.data(), {heads, heads}, {heads, 1}};
  }
  void set_post_mix(std::vector<float> values, index_t together) {
    post_mix = std::move(values);
    options.post_mix = {post_mix.data(), {heads / together, together, together}, {together * together, together, 1}};
  }
  void set_norm(Random& random) {
    norm_weight = numbers(random, dim_v, 1);
    options.norm = true;
    options.norm_weight = norm_weight;
    options.norm_factor = 0.8f;
  }
  void set_gate(Random& random, index_t rows) {
    gate = numbers(random, rows * dim_v, 0.3f);
    gate_bias = numbers(random, rows, 1);
    options.gate = {gate.data(), {rows, dim_v}, {dim_v, 1}};
    options.gate_bias = gate_bias;
  }
};

// The layers of the released 830M models, with fewer heads: 6 x 11 kernels, all heads mixed, norm and gate.
void make_published(Layer& layer, std::uint64_t seed) {
  Random random(seed);
  layer.set_pre(Layer::kernel(random, layer.heads, 6, 11, KeyPadding::both), 6, 11);
  layer.set_post(Layer::kernel(random, layer.heads, 6, 11, KeyPadding::both), 6, 11);
  layer.set_pre_mix(Layer::numbers(random, layer.heads * layer.heads, 0.5f));
  layer.set_post_mix(Layer::numbers(random, layer.heads * layer.heads, 0.5f), layer.heads);
  layer.set_norm(random);
  layer.set_gate(random, 1);
}

Values call(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, const MultiTokenOptions& options) {
  Values out(q.extent[0], q.extent[1], q.extent[2], v.extent[3], canary());
  const Status status = fovea::multi_token_attention(q, k, v, out.view(), options);
  INFO(status.message());
  REQUIRE(status.ok());
  return out;
}

struct Budgeted {
  std::vector<double> out, error;   // [batch, q_head, pos, dim_v]
};

// The reference's result, and how far fp32 may be off. u = 2^-24. To first order, a chain of n fused products is off by n u
// times the sum of its magnitudes, on top of what its operands are off by:
//   scores            (dim + 6) u dots, as for attention (docs/numerics.md)
//   convolution, mix  sum |tap| error + (taps + 1) u sum |tap score|
//   weights           softmax of scores that are off: relative error (1 + eta_j) (1 + sigma) / (1 - sum p eta) - 1 with
//                     eta_j = expm1(error_j + 4 u (|s_j| + |max|) + 6 u), sigma of test::sum_error; weights below 2^-100
//                     may be 0
//   outputs           sum error |v| + (keys + 2) u sum |p v|
//   norm              the mean of squares is off by 2 sum |o| error / dim + (dim + 3) u mean, its root by half of that
//   gate              sigmoid has slope at most 1/4 and is off by 12 u of itself
Budgeted expect(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, const MultiTokenOptions& o) {
  constexpr double u = kUnit;
  const index_t heads = q.extent[1], group = heads / k.extent[1], dim_v = v.extent[3];
  const auto numbers = static_cast<std::size_t>(q.extent[0] * heads * q.extent[2] * dim_v);
  Budgeted e{std::vector<double>(numbers), std::vector<double>(numbers)};
  const Tensor<double> out = fovea::bhsd(e.out.data(), q.extent[0], heads, q.extent[2], dim_v);
  const Tensor<double> error = fovea::bhsd(e.error.data(), q.extent[0], heads, q.extent[2], dim_v);

  fovea::reference::multi_token(q, k, v, out, o, [&](const fovea::reference::MultiTokenSteps& s) {
    const std::size_t size = s.scores.size();
    const auto for_each = [&](const auto& f) {
      for (index_t h = 0; h < heads; ++h) {
        for (index_t i = 0; i < s.rows; ++i) {
          for (index_t j = 0; j < s.keys && s.sees(i, j); ++j) f(h, i, j, s.at(h, i, j));
        }
      }
    };
    const auto convolve = [&](const View<const float, 3>& kernel, const std::vector<double>& from,
                              const std::vector<double>& from_error) {
      if (!kernel) return from_error;
      const auto taps = static_cast<double>(kernel.extent[1] * kernel.extent[2]);
      std::vector<double> to(size);
      for_each([&](index_t h, index_t i, index_t j, std::size_t at) {
        fovea::reference::multi_token_taps(kernel, o.padding, h, s, i, j, [&](double tap, index_t row, index_t key) {
          const std::size_t one = s.at(h, row, key);
          to[at] += std::abs(tap) * (from_error[one] + u * (taps + 1) * std::abs(from[one]));
        });
      });
      return to;
    };
    std::vector<double> off(size);
    for (std::size_t n = 0; n < size; ++n) off[n] = u * (static_cast<double>(q.extent[3]) + 6) * s.dots[n];
    off = convolve(o.pre, s.scores, off);
    if (o.pre_mix) {
      std::vector<double> to(size);
      for_each([&](index_t h, index_t i, index_t j, std::size_t at) {
        for (index_t g = 0; g < heads; ++g)
          to[at] += std::abs(double{o.pre_mix(h, g)}) *
                    (off[s.at(g, i, j)] + u * static_cast<double>(heads + 1) * std::abs(s.convolved[s.at(g, i, j)]));
      });
      off = to;
    }
    for (index_t h = 0; h < heads; ++h) {
      for (index_t i = 0; i < s.rows; ++i) {
        const index_t seen = std::clamp<index_t>(s.first_position + i + 1, 0, s.keys);
        double top = 0, mean = 0;
        for (index_t j = 0; j < seen; ++j) top = j == 0 ? s.mixed[s.at(h, i, j)] : std::max(top, s.mixed[s.at(h, i, j)]);
        for (index_t j = 0; j < s.keys; ++j) {
          const std::size_t at = s.at(h, i, j);
          off[at] = j < seen ? std::expm1(off[at] + u * (4 * (std::abs(s.mixed[at]) + std::abs(top)) + kExpUnits)) : 0;
          mean += s.weights[at] * off[at];
        }
        REQUIRE(mean < 0.1);   // beyond, first order says nothing
        for (index_t j = 0; j < seen; ++j) {
          const std::size_t at = s.at(h, i, j);
          off[at] = s.weights[at] * ((1 + off[at]) * (1 + sum_error(seen, seen)) / (1 - mean) - 1) + 0x1p-99;
        }
      }
    }
    off = convolve(o.post, s.weights, off);
    if (o.post_mix) {
      const index_t together = o.post_mix.extent[1];
      std::vector<double> to(size);
      for_each([&](index_t h, index_t i, index_t j, std::size_t at) {
        const index_t first = h / together * together;
        for (index_t g = 0; g < together; ++g) {
          const std::size_t one = s.at(first + g, i, j);
          to[at] += std::abs(double{o.post_mix(h / together, g, h - first)}) *
                    (off[one] + u * static_cast<double>(together + 1) * std::abs(s.convolved_weights[one]));
        }
      });
      off = to;
    }

    const auto n = static_cast<std::size_t>(s.sequence);
    const index_t q_batch = o.cu_len_q.empty() ? s.sequence : 0, q_begin = o.cu_len_q.empty() ? 0 : o.cu_len_q[n];
    const index_t k_batch = o.cu_len_k.empty() ? s.sequence : 0, k_begin = o.cu_len_k.empty() ? 0 : o.cu_len_k[n];
    const index_t len_q = o.cu_len_q.empty() ? q.extent[2] : o.cu_len_q[n + 1] - q_begin, old = s.rows - len_q;
    const auto dim = static_cast<double>(dim_v);
    std::vector<double> value(static_cast<std::size_t>(dim_v)), bound(value);
    for (index_t h = 0; h < heads; ++h) {
      for (index_t i = old; i < s.rows; ++i) {
        double squares = 0, off_squares = 0;
        for (std::size_t d = 0; d < value.size(); ++d) {
          value[d] = bound[d] = 0;
          const index_t seen = std::clamp<index_t>(s.first_position + i + 1, 0, s.keys);
          for (index_t j = 0; j < seen; ++j) {
            const double number = double{v(k_batch, h / group, k_begin + j, static_cast<index_t>(d))};
            const double weight = s.mixed_weights[s.at(h, i, j)];
            value[d] += weight * number;
            bound[d] += std::abs(number) * (off[s.at(h, i, j)] + u * static_cast<double>(seen + 2) * std::abs(weight));
          }
          squares += value[d] * value[d];
          off_squares += (2 * std::abs(value[d]) + bound[d]) * bound[d];
        }
        if (o.norm) {
          const double mean = squares / dim + double{o.norm_eps}, off_mean = off_squares / dim + u * (dim + 3) * mean;
          const double factor = std::abs(double{o.norm_factor}) / std::sqrt(mean);
          const double relative = std::sqrt(mean / std::max(mean - off_mean, double{o.norm_eps} / 2)) - 1 + 6 * u;
          for (std::size_t d = 0; d < value.size(); ++d) {
            const double weight = o.norm_weight.empty() ? 1 : double{o.norm_weight[d]};
            bound[d] = std::abs(weight) * factor * (bound[d] * (1 + relative) + std::abs(value[d]) * relative);
            value[d] *= weight * double{o.norm_factor} / std::sqrt(mean);
          }
        }
        std::vector<double> gated(bound);
        for (std::size_t d = 0; o.gate && d < value.size(); ++d) {
          const std::size_t unit = o.gate.extent[0] == 1 ? 0 : d;
          double logit = o.gate_bias.empty() ? 0 : double{o.gate_bias[unit]}, off_logit = 2 * u * std::abs(logit);
          for (std::size_t e_ = 0; e_ < value.size(); ++e_) {
            const double tap = double{o.gate(static_cast<index_t>(unit), static_cast<index_t>(e_))};
            logit += tap * value[e_];
            off_logit += std::abs(tap) * (bound[e_] + u * (dim + 3) * std::abs(value[e_]));
          }
          const double share = 1 / (1 + std::exp(-logit));
          gated[d] = bound[d] * share + (std::abs(value[d]) + bound[d]) * (off_logit / 4 + share * 12 * u);
        }
        for (std::size_t d = 0; d < value.size(); ++d)
          error(q_batch, h, q_begin + i - old, static_cast<index_t>(d)) = gated[d] + 1e-30;
      }
    }
  });
  return e;
}

double worst(const Values& got, const Budgeted& want) {
  double most = 0;
  for (std::size_t n = 0; n < got.data.size(); ++n)
    most = std::max(most, in_budgets(double{got.data[n]}, want.out[n], want.error[n]));
  return most;
}

void check_against_reference(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v,
                             const MultiTokenOptions& o) {
  const Values got = call(q, k, v, o);
  CHECK(worst(got, expect(q, k, v, o)) <= 1);
}

// Two fp32 results that differ in how they were computed, each within its own budget of the same numbers.
void check_close(const Values& got, const Budgeted& got_budget, const Values& other,
                 const std::vector<double>& other_error) {
  double most = 0;
  for (std::size_t n = 0; n < got.data.size(); ++n)
    most = std::max(most, in_budgets(double{got.data[n]}, double{other.data[n]}, got_budget.error[n] + other_error[n]));
  CHECK(most <= 1);
}

Values plain_attention(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, std::vector<double>& error) {
  const AttentionOptions options{.causal = Causal::bottom_right};
  error = test::expect(q, k, v, options).out_error;
  return attend(q, k, v, options).out;
}

const std::vector<index_t> kLengths{1, 2, 5, 15, 16, 17, 49, 50, 51, 60, 61, 86, 96, 97, 127, 128, 129, 255, 256, 257};

struct Case {
  index_t q_heads, kv_heads, dim_qk, dim_v;
  std::vector<index_t> len_q, len_k;   // [sequence]; all equal unless ragged
  bool ragged;
};

}   // namespace

TEST_CASE("multi-token: a grid of layers and shapes against the reference", "[multi_token]") {
  for (std::uint64_t n = 0; n < 60; ++n) {
    Random random(n * 7919 + 3);
    Case c{};
    c.kv_heads = random.pick<index_t>({1, 1, 2});
    c.q_heads = c.kv_heads * random.pick<index_t>({1, 2, 3});
    c.dim_qk = random.pick<index_t>({1, 7, 8, 16, 17, 33, 64});
    c.dim_v = random.pick<index_t>({1, 8, 15, 16, 24, 33, 72});
    c.ragged = random.one_in(3);
    // Prefill, a chunk behind others, and decode with the few queries it needs.
    const std::uint64_t regime = n % 3;
    const index_t sequences = random.between(1, 2);
    for (index_t b = 0; b < sequences; ++b) {
      const bool same = b > 0 && !c.ragged;
      c.len_k.push_back(same ? c.len_k[0] : random.pick(kLengths));
      const index_t most = c.len_k.back();
      c.len_q.push_back(same          ? c.len_q[0]
                        : regime == 0 ? most
                        : regime == 1 ? random.between(1, most)
                                      : std::min<index_t>(most, random.between(1, 3)));
    }
    Layer layer(c.q_heads, c.dim_v);
    MultiTokenOptions& o = layer.options;
    o.padding = random.pick({KeyPadding::both, KeyPadding::both, KeyPadding::left, KeyPadding::right});
    const bool odd = o.padding == KeyPadding::both;
    const index_t queries[2] = {random.pick<index_t>({1, 2, 5, 6, 7, 13}), random.pick<index_t>({1, 3, 4, 6, 8})};
    const index_t keys[2] = {odd ? random.pick<index_t>({1, 3, 11, 35}) : random.pick<index_t>({1, 2, 4, 17}),
                             odd ? random.pick<index_t>({1, 3, 11}) : random.pick<index_t>({2, 3, 18})};
    const bool with_pre = !random.one_in(4), with_post = !random.one_in(4);
    if (with_pre) layer.set_pre(Layer::kernel(random, c.q_heads, queries[0], keys[0], o.padding), queries[0], keys[0]);
    if (with_post) layer.set_post(Layer::kernel(random, c.q_heads, queries[1], keys[1], o.padding), queries[1], keys[1]);
    if (random.one_in(3)) layer.set_pre_mix(Layer::numbers(random, c.q_heads * c.q_heads, 0.6f));
    if (random.one_in(2)) {
      const index_t together = c.q_heads % 2 == 0 && random.one_in(2) ? 2 : c.q_heads;
      layer.set_post_mix(Layer::numbers(random, c.q_heads * together, 0.6f), together);
    }
    if (random.one_in(3)) layer.set_norm(random);
    if (random.one_in(3)) layer.set_gate(random, random.one_in(2) ? 1 : c.dim_v);
    if (random.one_in(4)) o.scale = random.pick({0.f, -0.3f, 1.f});

    // What the reference costs, in taps; dense sequences share their lengths.
    const index_t taps = 1 + (with_pre ? queries[0] * keys[0] : 0) + (with_post ? queries[1] * keys[1] : 0);
    for (std::size_t b = 0; b < c.len_k.size(); ++b) {
      while (c.q_heads * c.len_q[b] * c.len_k[b] * taps > 1'500'000 && c.len_q[b] > 1) {
        c.len_q[b] = (c.len_q[b] + 1) / 2;
        if (regime == 0) c.len_k[b] = c.len_q[b];
      }
    }
    index_t total_q = c.len_q[0], total_k = c.len_k[0], batch = sequences, most_before = 0;
    std::vector<index_t> cu_q{0}, cu_k{0};
    for (index_t b = 0; b < sequences; ++b) {
      const auto at = static_cast<std::size_t>(b);
      cu_q.push_back(cu_q.back() + c.len_q[at]);
      cu_k.push_back(cu_k.back() + c.len_k[at]);
      most_before = std::max(most_before, c.len_k[at] - c.len_q[at]);
    }
    if (c.ragged) {
      batch = 1;
      total_q = cu_q.back();
      total_k = cu_k.back();
      o.cu_len_q = cu_q;
      o.cu_len_k = cu_k;
    }
    const Dense x(n + 100, batch, c.q_heads, c.kv_heads, total_q, total_k, c.dim_qk, c.dim_v);
    const index_t before = (with_pre ? queries[0] - 1 : 0) + (with_post ? queries[1] - 1 : 0);
    const index_t stored = std::min(most_before, before) + random.between(0, 2);
    const Values history = random_values(n + 500, sequences, c.q_heads, std::max<index_t>(stored, 1), c.dim_qk);
    o.q_history = history.view();
    ThreadPerLane pool;
    if (random.one_in(2)) o.executor = fovea::Executor(pool, 3);
    INFO("case " << n << ", heads " << c.q_heads << "/" << c.kv_heads << ", dims " << c.dim_qk << "/" << c.dim_v
                 << ", len_q " << total_q << ", len_k " << total_k << ", pre " << with_pre << " " << queries[0] << "x"
                 << keys[0] << ", post " << with_post << " " << queries[1] << "x" << keys[1] << ", padding "
                 << static_cast<int>(o.padding));
    check_against_reference(x.q.view(), x.k.view(), x.v.view(), o);
  }
}

TEST_CASE("multi-token: the published layer, prefill", "[multi_token]") {
  for (const index_t len : {1, 16, 97, 129}) {
    Layer layer(4, 16);
    make_published(layer, 5);
    const Dense x(9, 1, 4, 4, len, len, 16, 16);
    INFO(len << " tokens");
    check_against_reference(x.q.view(), x.k.view(), x.v.view(), layer.options);
  }
}

TEST_CASE("multi-token: the budget is small enough to notice", "[multi_token]") {
  const Dense x(201, 1, 4, 2, 61, 61, 16, 16);
  Layer layer(4, 16);
  make_published(layer, 202);
  Random random(203);
  layer.set_post_mix(Layer::numbers(random, 8, 0.5f), 2);
  const Budgeted want = expect(x.q.view(), x.k.view(), x.v.view(), layer.options);
  MultiTokenOptions o = layer.options;
  CHECK(worst(call(x.q.view(), x.k.view(), x.v.view(), o), want) > 1e-3);   // far from wasteful
  const auto noticed = [&](const char* what) {
    INFO(what);
    CHECK(worst(call(x.q.view(), x.k.view(), x.v.view(), o), want) > 30);
    o = layer.options;
  };
  const auto turned = [](auto view, std::size_t axis) {
    view.data += (view.extent[axis] - 1) * view.stride[axis];
    view.stride[axis] = -view.stride[axis];
    return view;
  };
  o.padding = KeyPadding::left;
  noticed("keys padded on another side");
  o.pre = turned(o.pre, 1);
  noticed("queries in the other order before softmax");
  o.post = turned(o.post, 1);
  noticed("queries in the other order after softmax");
  o.pre = turned(o.pre, 2);
  noticed("keys in the other order before softmax");
  o.post = turned(o.post, 2);
  noticed("keys in the other order after softmax");
  o.pre.data += 1;
  o.pre.extent[2] = 9;
  noticed("the outer keys of the kernel left out");
  std::swap(o.pre_mix.stride[0], o.pre_mix.stride[1]);
  noticed("pre_mix transposed");
  std::swap(o.post_mix.stride[1], o.post_mix.stride[2]);
  noticed("post_mix transposed");
  o.post_mix = turned(o.post_mix, 0);
  noticed("groups of heads swapped");
  o.norm_factor *= 1.01f;
  noticed("another factor");
  o.norm_eps = 1e-3f;
  noticed("another epsilon");
  o.gate_bias = {};
  noticed("no bias of the gate");
}

TEST_CASE("multi-token: any strides of q, k, v, out and the parameters", "[multi_token]") {
  constexpr index_t kLen = 40, kHeads = 2, kDim = 9;
  Layer layer(kHeads, kDim);
  make_published(layer, 6);
  const Dense x(11, 1, kHeads, kHeads, kLen, kLen, kDim, kDim);
  const Values want = call(x.q.view(), x.k.view(), x.v.view(), layer.options);

  // Queries and outputs with their numbers 3 and 2 apart, keys backwards in memory, kernels stored transposed.
  std::vector<float> q(static_cast<std::size_t>(kHeads * kLen * kDim * 3), kNan), out(q.size(), kNan), k(q.size(), kNan);
  const Tensor<float> q_view{q.data(), {1, kHeads, kLen, kDim}, {0, kLen * kDim * 3, kDim * 3, 3}};
  const Tensor<float> out_view{out.data(), {1, kHeads, kLen, kDim}, {0, kDim * 2, kHeads * kDim * 2, 2}};
  const Tensor<float> k_view{k.data() + (kHeads * kLen - 1) * kDim, {1, kHeads, kLen, kDim}, {0, -kLen * kDim, -kDim, 1}};
  std::vector<float> taps(layer.pre.size());
  const View<float, 3> pre{taps.data(), {kHeads, 6, 11}, {1, kHeads, 6 * kHeads}};
  for (index_t h = 0; h < kHeads; ++h) {
    for (index_t i = 0; i < kLen; ++i) {
      for (index_t d = 0; d < kDim; ++d) {
        q_view(0, h, i, d) = x.q.view()(0, h, i, d);
        k_view(0, h, i, d) = x.k.view()(0, h, i, d);
      }
    }
    for (index_t a = 0; a < 6; ++a) {
      for (index_t b = 0; b < 11; ++b) pre(h, a, b) = layer.options.pre(h, a, b);
    }
  }
  MultiTokenOptions options = layer.options;
  options.pre = pre;
  REQUIRE(fovea::multi_token_attention(q_view, k_view, x.v.view(), out_view, options).ok());
  for (index_t h = 0; h < kHeads; ++h) {
    for (index_t i = 0; i < kLen; ++i) {
      for (index_t d = 0; d < kDim; ++d) REQUIRE(out_view(0, h, i, d) == want.view()(0, h, i, d));
    }
  }
}

TEST_CASE("multi-token: no step, and steps that are the identity, are causal attention", "[multi_token]") {
  for (const index_t len : {1, 17, 61, 257}) {
    const Dense x(21, 2, 4, 2, len, len, 24, 20);
    const MultiTokenOptions none;
    const Values got = call(x.q.view(), x.k.view(), x.v.view(), none);
    std::vector<double> error;
    const Values attention = plain_attention(x.q.view(), x.k.view(), x.v.view(), error);
    check_close(got, expect(x.q.view(), x.k.view(), x.v.view(), none), attention, error);

    Layer layer(4, 20);
    std::vector<float> pre(4 * 66, 0.f), post(4 * 21, 0.f), mix(16, 0.f), pairs(8, 0.f);
    for (std::size_t h = 0; h < 4; ++h) pre[h * 66 + 5 * 11 + 5] = post[h * 21 + 6 * 3 + 1] = mix[h * 5] = 1;
    for (std::size_t h = 0; h < 4; ++h) pairs[h / 2 * 4 + h % 2 * 3] = 1;
    layer.set_pre(pre, 6, 11);
    layer.set_post(post, 7, 3);
    layer.set_pre_mix(mix);
    layer.set_post_mix(pairs, 2);
    CHECK(same_bits(call(x.q.view(), x.k.view(), x.v.view(), layer.options).data, got.data));
  }
}

TEST_CASE("multi-token: a kernel along keys is a convolution of K or of V", "[multi_token]") {
  // Up to the key itself: q_i . (sum_b tap_b k_{j-b}), all of them visible. From it on: p's convolution moves over to V.
  constexpr index_t kLen = 70, kKeys = 4;
  const Dense x(31, 1, 1, 1, kLen, kLen, 16, 12);
  const std::vector<float> taps{0.5f, -1.f, 0.25f, 2.f};   // powers of two: the copies below are off by their sums alone
  Values k(1, 1, kLen, 16), v(1, 1, kLen, 12);
  for (index_t j = 0; j < kLen; ++j) {
    for (index_t b = 0; b < kKeys; ++b) {
      const index_t back = j - (kKeys - 1) + b, from = j - b;
      const float tap = taps[static_cast<std::size_t>(b)];
      for (index_t d = 0; d < 16 && back >= 0; ++d) k.view()(0, 0, j, d) += tap * x.k.view()(0, 0, back, d);
      for (index_t d = 0; d < 12 && from >= 0; ++d) v.view()(0, 0, j, d) += tap * x.v.view()(0, 0, from, d);
    }
  }
  std::vector<double> error;
  SECTION("before softmax") {
    Layer layer(1, 12);
    layer.set_pre(taps, 1, kKeys);
    layer.options.padding = KeyPadding::left;
    const Values want = plain_attention(x.q.view(), k.view(), x.v.view(), error);
    for (double& e : error) e *= 2;   // and the rounding of K's copy
    check_close(call(x.q.view(), x.k.view(), x.v.view(), layer.options),
                expect(x.q.view(), x.k.view(), x.v.view(), layer.options), want, error);
  }
  SECTION("after softmax") {
    Layer layer(1, 12);
    layer.set_post(taps, 1, kKeys);
    layer.options.padding = KeyPadding::right;
    const Values want = plain_attention(x.q.view(), x.k.view(), v.view(), error);
    for (double& e : error) e *= 2;
    check_close(call(x.q.view(), x.k.view(), x.v.view(), layer.options),
                expect(x.q.view(), x.k.view(), x.v.view(), layer.options), want, error);
  }
}

TEST_CASE("multi-token: a kernel along queries after softmax convolves attention's outputs", "[multi_token]") {
  constexpr index_t kLen = 130;
  const Dense x(41, 1, 2, 1, kLen, kLen, 16, 12);
  Layer layer(2, 12);
  const std::vector<float> taps{0.5f, -1.f, 2.f, 0.25f, 1.f, -0.5f, 4.f, 1.f};   // [head, 4, 1]
  layer.set_post(taps, 4, 1);
  std::vector<double> plain_error;
  const Values plain = plain_attention(x.q.view(), x.k.view(), x.v.view(), plain_error);
  Values want(1, 2, kLen, 12);
  std::vector<double> error(plain_error.size());
  for (index_t h = 0; h < 2; ++h) {
    for (index_t i = 0; i < kLen; ++i) {
      for (index_t a = 0; a < 4; ++a) {
        const float tap = taps[static_cast<std::size_t>(h * 4 + a)];
        for (index_t d = 0; d < 12 && i - 3 + a >= 0; ++d) {
          const auto to = static_cast<std::size_t>((h * kLen + i) * 12 + d),
                     from = to - static_cast<std::size_t>((3 - a) * 12);
          want.data[to] += tap * plain.data[from];
          error[to] += std::abs(double{tap}) * (plain_error[from] + 4 * kUnit * std::abs(double{plain.data[from]}));
        }
      }
    }
  }
  check_close(call(x.q.view(), x.k.view(), x.v.view(), layer.options),
              expect(x.q.view(), x.k.view(), x.v.view(), layer.options), want, error);
}

TEST_CASE("multi-token: mixing heads that share K and V mixes queries, or outputs", "[multi_token]") {
  constexpr index_t kLen = 65, kHeads = 4;
  const Dense x(51, 1, kHeads, 1, kLen, kLen, 8, 8);
  // Not symmetric, and powers of two, so that mixed queries are off by their sums alone.
  const std::vector<float> matrix{1, 0.5f, 0, 0, 0, 2, 0, -1, 0.25f, 0, 1, 0, -0.5f, 0, 0, 1};
  std::vector<double> error;
  SECTION("before softmax: to, from") {
    Layer layer(kHeads, 8);
    layer.set_pre_mix(matrix);
    Values q(1, kHeads, kLen, 8);
    for (index_t h = 0; h < kHeads; ++h) {
      for (index_t g = 0; g < kHeads; ++g) {
        for (index_t n = 0; n < kLen * 8; ++n)
          q.data[static_cast<std::size_t>(h * kLen * 8 + n)] +=
              matrix[static_cast<std::size_t>(h * kHeads + g)] * x.q.data[static_cast<std::size_t>(g * kLen * 8 + n)];
      }
    }
    const Values want = plain_attention(q.view(), x.k.view(), x.v.view(), error);
    for (double& e : error) e *= 2;   // and the rounding of the mixed queries
    check_close(call(x.q.view(), x.k.view(), x.v.view(), layer.options),
                expect(x.q.view(), x.k.view(), x.v.view(), layer.options), want, error);
  }
  SECTION("after softmax: from, to") {
    Layer layer(kHeads, 8);
    layer.set_post_mix(matrix, kHeads);
    std::vector<double> plain_error;
    const Values plain = plain_attention(x.q.view(), x.k.view(), x.v.view(), plain_error);
    Values want(1, kHeads, kLen, 8);
    error.assign(plain_error.size(), 0);
    for (index_t h = 0; h < kHeads; ++h) {
      for (index_t g = 0; g < kHeads; ++g) {
        const float weight = matrix[static_cast<std::size_t>(g * kHeads + h)];
        for (index_t n = 0; n < kLen * 8; ++n) {
          const auto to = static_cast<std::size_t>(h * kLen * 8 + n), from = static_cast<std::size_t>(g * kLen * 8 + n);
          want.data[to] += weight * plain.data[from];
          error[to] += std::abs(double{weight}) * (plain_error[from] + 4 * kUnit * std::abs(double{plain.data[from]}));
        }
      }
    }
    check_close(call(x.q.view(), x.k.view(), x.v.view(), layer.options),
                expect(x.q.view(), x.k.view(), x.v.view(), layer.options), want, error);
  }
}

TEST_CASE("multi-token: only the kernel's last query row acts where the others are zeros", "[multi_token]") {
  const Dense x(61, 1, 2, 2, 90, 90, 16, 8);
  Random random(62);
  const std::vector<float> row = Layer::numbers(random, 2 * 11, 0.5f);
  std::vector<float> padded(2 * 66, 0.f);
  for (index_t h = 0; h < 2; ++h) std::copy_n(row.begin() + h * 11, 11, padded.begin() + h * 66 + 55);
  Layer one(2, 8), six(2, 8);
  one.set_pre(row, 1, 11);
  six.set_pre(padded, 6, 11);
  CHECK(same_bits(call(x.q.view(), x.k.view(), x.v.view(), one.options).data,
                  call(x.q.view(), x.k.view(), x.v.view(), six.options).data));
}

TEST_CASE("multi-token: numbers worked out by hand", "[multi_token]") {
  // Keys 1, 0, -1 of dim 1 and queries 1: every row has the first of the scores 1, 0, -1. V is the identity: outputs are
  // weights.
  const std::vector<float> q{1, 1, 1}, k{1, 0, -1};
  const Values v = identity_values(1, 1, 3);
  const auto rows = [&](const MultiTokenOptions& o) {
    return call(fovea::bhsd(q.data(), 1, 1, 3, 1), fovea::bhsd(k.data(), 1, 1, 3, 1), v.view(), o).data;
  };
  const auto check = [&](const std::vector<float>& got, const std::vector<double>& want) {
    REQUIRE(got.size() == want.size());
    for (std::size_t n = 0; n < got.size(); ++n) CHECK(double{got[n]} == Catch::Approx(want[n]).margin(1e-7).epsilon(1e-6));
  };
  Layer layer(1, 3);
  check(rows(layer.options), {1, 0, 0, 0.7310586, 0.2689414, 0, 0.6652410, 0.2447285, 0.0900306});
  SECTION("scores one key later") {   // row 2: 0, 1, 0; row 1: 0, 1; row 0: 0
    layer.set_pre({1, 0, 0}, 1, 3);
    check(rows(layer.options), {1, 0, 0, 0.2689414, 0.7310586, 0, 0.2119416, 0.5761169, 0.2119416});
  }
  SECTION("scores one key earlier do not show the future") {   // row 2: 0, -1, 0; row 1: 0, 0 (not -1); row 0: 0
    layer.set_pre({0, 0, 1}, 1, 3);
    check(rows(layer.options), {1, 0, 0, 0.5, 0.5, 0, 0.4223188, 0.1553624, 0.4223188});
  }
  SECTION("scores of the query before") {   // row 2: 1, 0, 0 (key 2 was masked); row 1: 1, 0; row 0: 0
    layer.set_pre({1, 0}, 2, 1);
    layer.options.padding = KeyPadding::left;
    check(rows(layer.options), {1, 0, 0, 0.7310586, 0.2689414, 0, 0.5761169, 0.2119416, 0.2119416});
  }
  SECTION("weights of the query before") {
    layer.set_post({1, 0}, 2, 1);
    layer.options.padding = KeyPadding::left;
    check(rows(layer.options), {0, 0, 0, 1, 0, 0, 0.7310586, 0.2689414, 0});
  }
  SECTION("weights one key later are masked again") {
    layer.set_post({1, 0, 0}, 1, 3);
    check(rows(layer.options), {0, 0, 0, 0, 0.7310586, 0, 0, 0.6652410, 0.2447285});
  }
}

TEST_CASE("multi-token: extreme rows", "[multi_token]") {
  constexpr index_t kLen = 70;
  Layer layer(1, 6);
  Random random(71);
  layer.set_pre(Layer::kernel(random, 1, 3, 5, KeyPadding::both), 3, 5);
  layer.set_post(Layer::kernel(random, 1, 2, 3, KeyPadding::both), 2, 3);
  layer.options.scale = 1.f;
  const Values v = random_values(72, 1, 1, kLen, 6);
  Values q(1, 1, kLen, 1, 1.f), k(1, 1, kLen, 1);
  const auto key = [&](index_t j) -> float& { return k.data[static_cast<std::size_t>(j)]; };
  SECTION("rising") {
    for (index_t j = 0; j < kLen; ++j) key(j) = static_cast<float>(j);
  }
  SECTION("falling") {
    for (index_t j = 0; j < kLen; ++j) key(j) = static_cast<float>(-j);
  }
  SECTION("+-1e4") {
    for (index_t j = 0; j < kLen; ++j) key(j) = j % 3 == 0 ? 1e4f : -1e4f;
  }
  SECTION("all equal") {
    for (index_t j = 0; j < kLen; ++j) key(j) = -1e4f;
  }
  check_against_reference(q.view(), k.view(), v.view(), layer.options);
}

TEST_CASE("multi-token: queries before the first key see nothing", "[multi_token]") {
  const Dense x(81, 1, 2, 2, 20, 5, 8, 8);
  Layer layer(2, 8);
  Random random(82);
  layer.set_pre(Layer::kernel(random, 2, 6, 11, KeyPadding::both), 6, 11);
  layer.set_post(Layer::kernel(random, 2, 6, 11, KeyPadding::both), 6, 11);
  const Values got = call(x.q.view(), x.k.view(), x.v.view(), layer.options);
  for (index_t h = 0; h < 2; ++h) {
    for (index_t i = 0; i < 15; ++i) {
      for (index_t d = 0; d < 8; ++d) REQUIRE(got.view()(0, h, i, d) == 0.f);
    }
  }
  check_against_reference(x.q.view(), x.k.view(), x.v.view(), layer.options);
  layer.options.norm_eps = 0;   // the RMS of such a row is 0, and 0 / 0 is not asked
  const Values sharp = call(x.q.view(), x.k.view(), x.v.view(), layer.options);
  for (index_t h = 0; h < 2; ++h) {
    for (index_t i = 0; i < 15; ++i) {
      for (index_t d = 0; d < 8; ++d) REQUIRE(sharp.view()(0, h, i, d) == 0.f);
    }
  }

  // No keys at all, no queries at all.
  const Values none = call(x.q.view(), only_pos(x.k.view(), 0, 0), only_pos(x.v.view(), 0, 0), layer.options);
  CHECK(std::all_of(none.data.begin(), none.data.end(), [](float out) { return out == 0.f; }));
  CHECK(
      call(only_pos(x.q.view(), 0, 0), only_pos(x.k.view(), 0, 0), only_pos(x.v.view(), 0, 0), layer.options).data.empty());
}

TEST_CASE("multi-token: the future moves no bit", "[multi_token][bits]") {
  constexpr index_t kLen = 150, kHeads = 2;
  Layer layer(kHeads, 16);
  make_published(layer, 91);
  const Dense x(92, 1, kHeads, 1, kLen, kLen, 8, 16);
  const Values want = call(x.q.view(), x.k.view(), x.v.view(), layer.options);
  for (const index_t now : {0, 15, 16, 49, 50, 77, 128, 148}) {
    for (const float other : {3.f, -1e30f, kInfinity, kNan}) {
      Dense y = x;
      for (index_t j = now + 1; j < kLen; ++j) {
        for (index_t h = 0; h < kHeads; ++h) {
          for (index_t d = 0; d < 8; ++d) y.q.view()(0, h, j, d) = other;
        }
        for (index_t d = 0; d < 8; ++d) y.k.view()(0, 0, j, d) = other;
        for (index_t d = 0; d < 16; ++d) y.v.view()(0, 0, j, d) = other;
      }
      const Values got = call(y.q.view(), y.k.view(), y.v.view(), layer.options);
      INFO("after " << now << " everything is " << other);
      for (index_t h = 0; h < kHeads; ++h) {
        const auto first = static_cast<std::size_t>(h * kLen * 16), count = static_cast<std::size_t>((now + 1) * 16);
        CHECK(same_bits(std::span(got.data).subspan(first, count), std::span(want.data).subspan(first, count)));
      }
    }
  }
}

TEST_CASE("multi-token: a NaN query reaches the rows its kernels meet and no other", "[multi_token]") {
  constexpr index_t kLen = 100, kAt = 45, kBefore = 10;
  Layer layer(1, 8);
  Random random(95);
  layer.set_pre(Layer::kernel(random, 1, 6, 11, KeyPadding::both), 6, 11);
  layer.set_post(Layer::kernel(random, 1, 6, 11, KeyPadding::both), 6, 11);
  Dense x(96, 1, 1, 1, kLen, kLen, 8, 8);
  const Values want = call(x.q.view(), x.k.view(), x.v.view(), layer.options);
  x.q.view()(0, 0, kAt, 3) = kNan;
  const Values got = call(x.q.view(), x.k.view(), x.v.view(), layer.options);
  for (index_t i = 0; i < kLen; ++i) {
    const bool meets = i >= kAt && i <= kAt + kBefore;
    INFO("row " << i);
    for (index_t d = 0; d < 8; ++d) {
      const float one = got.view()(0, 0, i, d);
      CHECK((meets ? std::isnan(one) : one == want.view()(0, 0, i, d)));
    }
  }
}

TEST_CASE("multi-token: decode and chunks give the bits of the whole prefill", "[multi_token][bits]") {
  constexpr index_t kLen = 140, kHeads = 4, kDim = 16;
  for (const bool mixed : {false, true}) {
    Layer layer(kHeads, kDim);
    make_published(layer, 101);
    if (!mixed) layer.options.pre_mix = {}, layer.options.post_mix = {};
    const Dense x(102, 1, kHeads, 2, kLen, kLen, kDim, kDim);
    const Values whole = call(x.q.view(), x.k.view(), x.v.view(), layer.options);
    for (const index_t step : {1, 3, 37, 64}) {
      for (index_t begin = 0; begin < kLen; begin += step == 1 ? 23 : step) {
        const index_t count = std::min(step, kLen - begin), end = begin + count, old = std::min<index_t>(begin, 10);
        MultiTokenOptions options = layer.options;
        if (old > 0) options.q_history = only_pos(x.q.view(), begin - old, old);
        const Values got =
            call(only_pos(x.q.view(), begin, count), only_pos(x.k.view(), 0, end), only_pos(x.v.view(), 0, end), options);
        INFO("queries " << begin << " to " << end << ", heads mixed " << mixed);
        for (index_t h = 0; h < kHeads; ++h) {
          const auto first = static_cast<std::size_t>((h * kLen + begin) * kDim);
          const auto numbers = static_cast<std::size_t>(count * kDim), own = static_cast<std::size_t>(h) * numbers;
          CHECK(same_bits(std::span(got.data).subspan(own, numbers), std::span(whole.data).subspan(first, numbers)));
        }
      }
    }
  }
}

TEST_CASE("multi-token: documents packed beside each other are those documents alone", "[multi_token][bits]") {
  constexpr index_t kHeads = 2, kDim = 8, kTotal = 130;
  Layer layer(kHeads, kDim);
  make_published(layer, 111);
  const Dense x(112, 1, kHeads, 1, kTotal, kTotal, kDim, kDim);
  const std::vector<index_t> cu{0, 17, 17, 18, 90, 127};   // an empty one, and 3 positions that belong to nobody
  MultiTokenOptions options = layer.options;
  options.cu_len_q = options.cu_len_k = cu;
  const Values packed = call(x.q.view(), x.k.view(), x.v.view(), options);
  for (std::size_t n = 0; n + 1 < cu.size(); ++n) {
    const index_t begin = cu[n], count = cu[n + 1] - begin;
    const Values alone = call(only_pos(x.q.view(), begin, count), only_pos(x.k.view(), begin, count),
                              only_pos(x.v.view(), begin, count), layer.options);
    for (index_t h = 0; h < kHeads; ++h) {
      const auto numbers = static_cast<std::size_t>(count * kDim);
      CHECK(same_bits(std::span(packed.data).subspan(static_cast<std::size_t>((h * kTotal + begin) * kDim), numbers),
                      std::span(alone.data).subspan(static_cast<std::size_t>(h) * numbers, numbers)));
    }
  }
  for (index_t i = cu.back(); i < kTotal; ++i) CHECK(is_canary(packed.view()(0, 1, i, 0)));

  // A neighbour of NaN.
  Dense y = x;
  for (index_t j = 18; j < 90; ++j) {
    for (index_t d = 0; d < kDim; ++d) y.q.view()(0, 0, j, d) = y.k.view()(0, 0, j, d) = y.v.view()(0, 0, j, d) = kNan;
  }
  const Values beside = call(y.q.view(), y.k.view(), y.v.view(), options);
  for (const index_t i : {0, 16, 17, 90, 91, 126}) {
    for (index_t d = 0; d < kDim; ++d) CHECK(beside.view()(0, 0, i, d) == packed.view()(0, 0, i, d));
  }
}

TEST_CASE("multi-token: lanes and executors move no bit, and the workspace is as large as it says", "[multi_token][bits]") {
  constexpr index_t kHeads = 4;
  const Dense x(121, 2, kHeads, 2, 130, 130, 8, 8);
  for (const bool mixed : {false, true}) {
    Layer layer(kHeads, 8);
    make_published(layer, 122);
    if (!mixed) layer.options.pre_mix = {}, layer.options.post_mix = {};
    const Values want = call(x.q.view(), x.k.view(), x.v.view(), layer.options);
    MultiTokenOptions options = layer.options;
    ThreadPerLane threads;
    Reversed reversed;
    InOrder in_order;
    for (const fovea::Executor& executor : {fovea::Executor(threads, 3), fovea::Executor(reversed, 5),
                                            fovea::Executor(in_order, 2), fovea::Executor(threads, 50)}) {
      options.executor = executor;
      options.workspace = {};
      CHECK(same_bits(call(x.q.view(), x.k.view(), x.v.view(), options).data, want.data));
      const std::size_t size = fovea::multi_token_workspace_bytes({2, kHeads, 2, 130, 130, 8, 8}, options);
      PoisonedBytes bytes(size, 4);
      options.workspace = bytes.bytes();
      CHECK(same_bits(call(x.q.view(), x.k.view(), x.v.view(), options).data, want.data));
      CHECK(bytes.guards_intact());
    }
  }
}

TEST_CASE("multi-token: a long context keeps fewer rows of scores, not a gigabyte", "[multi_token]") {
  Layer layer(16, 8);
  make_published(layer, 125);
  for (const index_t keys : {index_t{4096}, index_t{1} << 16, index_t{1} << 20}) {
    const std::size_t bytes = fovea::multi_token_workspace_bytes({1, 16, 16, keys, keys, 128, 8}, layer.options);
    const std::size_t row = static_cast<std::size_t>(4 * 16 * keys);   // of the scores of the heads that are mixed
    INFO(keys << " keys, " << bytes << " bytes");
    CHECK(bytes >= 20 * row);   // ten queries before a block of ten
    CHECK(bytes <= std::max<std::size_t>(std::size_t{96} << 20, 26 * row + (std::size_t{8} << 20)));
  }
}

TEST_CASE("multi-token: keys beyond len_k are not read", "[multi_token]") {
  Layer layer(2, 8);
  make_published(layer, 131);
  Dense x(132, 2, 2, 1, 1, 90, 8, 8);
  const Values history = random_values(133, 2, 2, 10, 8);
  const std::vector<index_t> len_k{33, 71};
  MultiTokenOptions options = layer.options;
  options.len_k = len_k;
  options.q_history = history.view();
  const Values want = call(x.q.view(), x.k.view(), x.v.view(), options);
  for (index_t b = 0; b < 2; ++b) {
    for (index_t j = len_k[static_cast<std::size_t>(b)]; j < 90; ++j) {
      for (index_t d = 0; d < 8; ++d) x.k.view()(b, 0, j, d) = x.v.view()(b, 0, j, d) = kNan;
    }
  }
  CHECK(same_bits(call(x.q.view(), x.k.view(), x.v.view(), options).data, want.data));
  check_against_reference(x.q.view(), x.k.view(), x.v.view(), options);
}

TEST_CASE("multi-token: a closing of the caller's comes behind the norm", "[multi_token]") {
  Layer layer(3, 10);
  make_published(layer, 141);
  const Dense x(142, 2, 3, 3, 30, 30, 8, 10), gate(143, 2, 3, 3, 30, 30, 10, 10);
  const Values want = call(x.q.view(), x.k.view(), x.v.view(), layer.options);
  Values out(2, 3, 30, 10, canary());
  const auto close = [&](const fovea::OutRow& row, std::span<float> values, fovea::Final) {
    const float* const gates = &gate.q.view()(row.batch, row.q_head, row.pos, 0);
    for (std::size_t d = 0; d < values.size(); ++d) values[d] *= gates[d];
  };
  REQUIRE(fovea::multi_token_attention(x.q.view(), x.k.view(), x.v.view(), out.view(), layer.options, close).ok());
  for (std::size_t n = 0; n < out.data.size(); ++n) REQUIRE(out.data[n] == want.data[n] * gate.q.data[n]);
}

TEST_CASE("multi-token: refusals say the numbers and write nothing", "[multi_token]") {
  const Dense x(151, 1, 4, 2, 6, 20, 8, 8);
  Values out(1, 4, 6, 8, canary());
  std::vector<float> numbers(4 * 300 * 12, 0.5f);
  const float* const some = numbers.data();
  const auto kernel = [&](index_t heads, index_t cq, index_t ck) {
    return View<const float, 3>{some, {heads, cq, ck}, {cq * ck, ck, 1}};
  };
  const auto refused = [&](const MultiTokenOptions& options, const std::string& words) {
    const Status status = fovea::multi_token_attention(x.q.view(), x.k.view(), x.v.view(), out.view(), options);
    CHECK_FALSE(status.ok());
    CHECK_THAT(std::string(status.message()), Catch::Matchers::ContainsSubstring(words));
    CHECK(std::all_of(out.data.begin(), out.data.end(), is_canary));
  };
  MultiTokenOptions o;
  // No sequence: nothing to do, and nothing behind a workspace of the size asked for is touched.
  std::vector<std::byte> guarded(256, std::byte{0x55});
  const fovea::AttentionShape none{0, 4, 4, 6, 20, 8, 8};
  o.workspace = std::span(guarded).first(fovea::multi_token_workspace_bytes(none, o));
  CHECK(fovea::multi_token_attention(test::cut(x.q.view(), 0, 0, 0), test::cut(x.k.view(), 0, 0, 0),
                                     test::cut(x.v.view(), 0, 0, 0), test::cut(out.view(), 0, 0, 0), o)
            .ok());
  CHECK(std::all_of(guarded.begin() + static_cast<std::ptrdiff_t>(o.workspace.size()), guarded.end(),
                    [](std::byte b) { return b == std::byte{0x55}; }));
  o = {};
  o.pre = kernel(3, 6, 11);
  refused(o, "pre is [3, 6, 11], must be [4 q heads");
  o.pre = kernel(4, 6, 10);
  refused(o, "pre covers 10 keys");
  o.pre = kernel(4, 300, 1);
  refused(o, "pre is 300 x 1");
  o.pre = kernel(4, 6, 11);
  o.post = kernel(4, 4, 3);
  refused(o, "starts at position 14 and its kernels reach 8 queries back: q_history has 0 queries, must have 8");
  const Values seven = random_values(152, 1, 4, 7, 8), other = random_values(153, 1, 4, 8, 9);
  o.q_history = seven.view();
  refused(o, "q_history has 7 queries, must have 8");
  o.q_history = other.view();
  refused(o, "q_history is [1, 4, 8, 9], must be [1, 4, 8, 8]");
  o = {};
  o.pre_mix = {some, {4, 3}, {3, 1}};
  refused(o, "pre_mix is [4, 3]");
  o = {};
  o.post_mix = {some, {1, 3, 3}, {9, 3, 1}};
  refused(o, "post_mix is [1, 3, 3]");
  o = {};
  o.norm_weight = {some, 8};
  refused(o, "norm_weight has 8 numbers, norm is off");
  o.norm = true;
  o.norm_weight = {some, 7};
  refused(o, "norm_weight has 7 numbers");
  o.norm_weight = {};
  o.norm_eps = -1;
  refused(o, "norm_eps -1");
  o = {};
  o.gate = {some, {2, 8}, {8, 1}};
  refused(o, "gate is [2, 8]");
  o = {};
  o.gate_bias = {some, 1};
  refused(o, "gate_bias has 1 numbers, gate 0 rows");
  o = {};
  o.padding = static_cast<KeyPadding>(7);
  refused(o, "padding is 7");
  o = {};
  o.pre = View<const float, 3>{out.data.data(), {4, 1, 1}, {1, 1, 1}};
  refused(o, "overlaps pre");
  o = {};
  std::vector<std::byte> little(100);
  o.workspace = little;
  refused(o, "workspace has 100 bytes");
  const std::vector<index_t> beyond{21};
  o = {};
  o.len_k = beyond;
  refused(o, "len_k[0] = 21");
  CHECK(fovea::multi_token_workspace_bytes({1, 4, 2, 6, 20, 8, 8}, o) == 0);
  CHECK_FALSE(fovea::multi_token_supports({1, 4, 3, 6, 20, 8, 8}, {}).ok());
  CHECK(fovea::multi_token_supports({1, 4, 2, 6, 20, 8, 8}, {}).ok());
}
