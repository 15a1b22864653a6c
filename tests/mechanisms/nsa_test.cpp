// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/nsa.hpp"

#include <functional>
#include <limits>

#include "fovea/reference/nsa.hpp"
#include "support/dense.hpp"
#include "support/executors.hpp"

namespace {

using namespace test;
using fovea::Causal;
using fovea::Format;
using fovea::NsaOptions;
using fovea::NsaPhi;
using fovea::NsaPool;
using fovea::NsaRope;
using fovea::NsaRopeOrder;
using fovea::NsaShape;
using fovea::Operand;
using fovea::reference::NsaRule;
using Compiled = fovea::Formats<Format::f32>;

const float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr NsaShape kSmall{8, 4, 16, 4, 1, 2, 24};

NsaRule rule_of(const NsaShape& s) { return {s.block, s.stride, s.selected_block, s.selected, s.init, s.local, s.window}; }
fovea::Kv kv_of(const Values& k, const Values& v) { return fovea::dense_kv(k.view(), v.view()); }

// One layer: queries for the last len_q of len tokens, mean-pooled entries, gates after the sigmoid.
struct Layer {
  NsaShape shape;
  Values q, k, v, entry_k, entry_v, gates;

  Layer(std::uint64_t seed, const NsaShape& shape_, index_t batch, index_t q_heads, index_t kv_heads, index_t len_q,
        index_t len, index_t dim_qk, index_t dim_v)
      : shape(shape_),
        q(random_values(seed, batch, q_heads, len_q, dim_qk)),
        k(random_values(seed + 1, batch, kv_heads, len, dim_qk)),
        v(random_values(seed + 2, batch, kv_heads, len, dim_v)),
        entry_k(batch, kv_heads, fovea::nsa_entries(len, shape_), dim_qk),
        entry_v(batch, kv_heads, fovea::nsa_entries(len, shape_), dim_v),
        gates(batch, q_heads, len_q, 3) {
    for (float& x : k.data) x *= 2;   // distinct scores
    Random random(seed + 3);
    for (float& g : gates.data) g = 0.5f + 0.4f * std::tanh(random.normal());
    compress();
  }
  void compress() {
    REQUIRE(fovea::nsa_compress(k.view(), shape, NsaPhi{}, entry_k.view()).ok());
    REQUIRE(fovea::nsa_compress(v.view(), shape, NsaPhi{}, entry_v.view()).ok());
  }
  fovea::Kv kv() const { return kv_of(k, v); }
  fovea::Kv entries() const { return kv_of(entry_k, entry_v); }
};

Values run(const Layer& x, const NsaOptions& options = {}) {
  Values out(x.q.batch, x.q.heads, x.q.len, x.v.dim, canary());
  const fovea::Status status =
      fovea::nsa_attention<Compiled>(x.q.view(), x.kv(), x.entries(), x.gates.view(), out.view(), x.shape, options);
  INFO(status.message());
  REQUIRE(status.ok());
  return out;
}

// The first branch, its scores of the blocks, and the lists that follow.
struct Chosen {
  Values out, importance;
  std::vector<float> lse;
  std::vector<std::int32_t> lists;   // [batch, kv_head, pos, n]
};
Chosen choose(const Layer& x, NsaOptions options) {
  Chosen c{Values(x.q.batch, x.q.heads, x.q.len, x.v.dim, canary()),
           Values(x.q.batch, x.k.heads, x.q.len, fovea::nsa_blocks(x.k.len, x.shape), canary()),
           std::vector<float>(static_cast<std::size_t>(x.q.batch * x.q.heads * x.q.len), canary()),
           std::vector<std::int32_t>(static_cast<std::size_t>(x.q.batch * x.k.heads * x.q.len * x.shape.selected), -7)};
  const std::vector<index_t> len(static_cast<std::size_t>(x.q.batch), x.k.len);
  if (options.len_k.empty()) options.len_k = len;
  options.lse = {c.lse.data(), {x.q.batch, x.q.heads, x.q.len}, {x.q.heads * x.q.len, x.q.len, 1}};
  fovea::Status status = fovea::nsa_compressed_attention<Compiled>(x.q.view(), x.entries(), x.shape, c.out.view(),
                                                                   c.importance.view(), options);
  INFO(status.message());
  REQUIRE(status.ok());
  status = fovea::nsa_select(c.importance.view(), x.shape, c.lists, options);
  INFO(status.message());
  REQUIRE(status.ok());
  return c;
}

std::vector<index_t> list_of(const Chosen& c, const NsaShape& shape, index_t n) {
  std::vector<index_t> list;
  for (index_t e = 0; e < shape.selected; ++e) {
    const index_t block = c.lists[static_cast<std::size_t>(n * shape.selected + e)];
    if (block >= 0) list.push_back(block);
  }
  return list;
}

// Values and error budgets of the three branches, by the reference of softmax with the mask of each, lists as chosen.
struct Branches {
  Expected compressed, selected, windowed;
};
Expected masked(const Values& q, const Values& k, const Values& v,
                const std::function<bool(index_t, index_t, index_t, index_t)>& see) {
  std::vector<std::uint8_t> keep(static_cast<std::size_t>(q.batch * q.heads * q.len * k.len));
  std::size_t n = 0;
  for (index_t b = 0; b < q.batch; ++b) {
    for (index_t h = 0; h < q.heads; ++h) {
      for (index_t i = 0; i < q.len; ++i) {
        for (index_t j = 0; j < k.len; ++j) keep[n++] = see(b, h, i, j);
      }
    }
  }
  AttentionOptions options;
  options.keep = fovea::bhsd<const std::uint8_t>(keep.data(), q.batch, q.heads, q.len, k.len);
  return expect(q.view(), k.view(), v.view(), options);
}
Branches expect_branches(const Layer& x, const Chosen& c, index_t offset) {
  const index_t group = x.q.heads / x.k.heads;
  const auto list = [&](index_t b, index_t h, index_t i) {
    return list_of(c, x.shape, (b * x.k.heads + h / group) * x.q.len + i);
  };
  return {
      masked(x.q, x.entry_k, x.entry_v,
             [&](index_t, index_t, index_t i, index_t e) { return e * x.shape.stride + x.shape.block - 1 <= offset + i; }),
      masked(x.q, x.k, x.v,
             [&](index_t b, index_t h, index_t i, index_t j) {
               const auto blocks = list(b, h, i);
               return j <= offset + i && std::count(blocks.begin(), blocks.end(), j / x.shape.selected_block) > 0;
             }),
      masked(x.q, x.k, x.v,
             [&](index_t, index_t, index_t i, index_t j) { return j <= offset + i && j > offset + i - x.shape.window; })};
}

// The gated sum of them: two roundings per product, two sums.
Expected gated(const Branches& all, const Values& gates) {
  Expected e = all.compressed;
  const auto dim = static_cast<std::size_t>(e.dim_v);
  for (std::size_t n = 0; n < e.out.size(); ++n) {
    const float* const g = gates.data.data() + n / dim * 3;
    const Expected* const of[3] = {&all.compressed, &all.selected, &all.windowed};
    e.out[n] = e.out_error[n] = 0;
    for (std::size_t branch = 0; branch < 3; ++branch) {
      const double part = double{g[branch]} * of[branch]->out[n];
      e.out[n] += part;
      e.out_error[n] += std::abs(double{g[branch]}) * of[branch]->out_error[n] + 4 * kUnit * std::abs(part);
    }
  }
  return e;
}

double worst(const Values& got, const Expected& want) {
  REQUIRE(got.data.size() == want.out.size());
  double off = 0;
  for (std::size_t n = 0; n < want.out.size(); ++n)
    off = std::max(off, in_budgets(double{got.data[n]}, want.out[n], want.out_error[n]));
  return off;
}

void check_layer(const Layer& x) {
  const index_t offset = x.k.len - x.q.len;
  const Chosen c = choose(x, {});
  const Branches want = expect_branches(x, c, offset);
  CHECK(worst(c.out, want.compressed) <= 1);
  for (std::size_t n = 0; n < c.lse.size(); ++n)
    CHECK(in_budgets(double{c.lse[n]}, want.compressed.lse[n], want.compressed.lse_error[n]) <= 1);

  Values selected(x.q.batch, x.q.heads, x.q.len, x.v.dim, canary()), windowed = selected;
  REQUIRE(fovea::nsa_selected_attention<Compiled>(x.q.view(), x.kv(), c.lists, x.shape, selected.view(), {}).ok());
  REQUIRE(fovea::nsa_window_attention<Compiled>(x.q.view(), x.kv(), x.shape, windowed.view(), {}).ok());
  CHECK(worst(selected, want.selected) <= 1);
  CHECK(worst(windowed, want.windowed) <= 1);
  CHECK(worst(run(x), gated(want, x.gates)) <= 1);

  // The reference in the letters of the paper says the same, given the lists; and its scores judge the choice.
  std::vector<std::vector<index_t>> lists;
  for (index_t n = 0; n < x.q.batch * x.k.heads * x.q.len; ++n) lists.push_back(list_of(c, x.shape, n));
  std::vector<std::vector<double>> importance;
  std::vector<double> memory(3 * want.compressed.out.size());
  const Expected* const of[3] = {&want.compressed, &want.selected, &want.windowed};
  Tensor<double> branches[3];
  for (std::size_t n = 0; n < 3; ++n)
    branches[n] = fovea::bhsd(memory.data() + n * want.compressed.out.size(), x.q.batch, x.q.heads, x.q.len, x.v.dim);
  fovea::reference::nsa_branches(x.q.view(), x.k.view(), x.v.view(), x.entry_k.view(), x.entry_v.view(), offset,
                                 rule_of(x.shape), lists, branches, &importance);
  for (std::size_t n = 0; n < memory.size(); ++n) {
    const Expected& e = *of[n / want.compressed.out.size()];
    CHECK(std::abs(memory[n] - e.out[n % e.out.size()]) <= 1e-12 * (1 + std::abs(memory[n])));
  }
  // Weights are off by as much as scores are: the group's scores of a block by at most that share of them.
  const double share = 200 * kUnit * static_cast<double>(x.q.dim);
  for (std::size_t n = 0; n < importance.size(); ++n) {
    const index_t t = offset + static_cast<index_t>(n) % x.q.len;
    const auto best = fovea::reference::nsa_select(importance[n], t, rule_of(x.shape));
    const auto worth = [&](const std::vector<index_t>& blocks) {
      double sum = 0;
      for (const index_t j : blocks) sum += importance[n][static_cast<std::size_t>(j)];
      return sum;
    };
    CHECK(lists[n].size() == best.size());
    CHECK(worth(lists[n]) >= (1 - share) * worth(best));
    CHECK(std::is_sorted(lists[n].begin(), lists[n].end()));
    for (std::size_t j = 0; j < importance[n].size(); ++j)
      CHECK(std::abs(double{c.importance.data[n * static_cast<std::size_t>(c.importance.dim) + j]} - importance[n][j]) <=
            share * importance[n][j] + 1e-30);
  }
}

bool same_positions(const Values& a, index_t first_a, const Values& b, index_t first_b, index_t count) {
  bool same = true;
  for (index_t n = 0; n < a.batch; ++n) {
    for (index_t h = 0; h < a.heads; ++h) {
      for (index_t i = 0; i < count; ++i)
        same = same && std::memcmp(&a.view()(n, h, first_a + i, 0), &b.view()(n, h, first_b + i, 0),
                                   static_cast<std::size_t>(a.dim) * sizeof(float)) == 0;
    }
  }
  return same;
}

Values last_positions(const Values& x, index_t first, index_t count) {
  Values y(x.batch, x.heads, count, x.dim);
  for (index_t b = 0; b < x.batch; ++b) {
    for (index_t h = 0; h < x.heads; ++h) {
      for (index_t i = 0; i < count; ++i) {
        for (index_t d = 0; d < x.dim; ++d) y.view()(b, h, i, d) = x.view()(b, h, first + i, d);
      }
    }
  }
  return y;
}

}   // namespace

TEST_CASE("nsa: the golden vector of the aggregation", "[nsa]") {
  // One feature, scale 1: the weights of the seven entries are the numbers themselves.
  const float p[7] = {0.05f, 0.10f, 0.20f, 0.05f, 0.15f, 0.25f, 0.20f};
  Values q(1, 1, 1, 1, 1.f), k(1, 1, 7, 1), v(1, 1, 7, 2, 1.f), out(1, 1, 1, 2), importance(1, 1, 1, 3, canary());
  for (std::size_t n = 0; n < 7; ++n) k.data[n] = std::log(p[n]);
  NsaOptions options;
  const std::vector<index_t> len{128};
  options.len_k = len;
  options.scale = 1.f;
  REQUIRE(
      fovea::nsa_compressed_attention<Compiled>(q.view(), kv_of(k, v), NsaShape{}, out.view(), importance.view(), options)
          .ok());
  CHECK(std::abs(importance.data[0] - 0.75f) <= 1e-6f);
  CHECK(std::abs(importance.data[1] - 1.25f) <= 1e-6f);
  CHECK(importance.data[2] == 0.f);
  const auto want = fovea::reference::nsa_importance({0.05, 0.10, 0.20, 0.05, 0.15, 0.25, 0.20}, 2, {});
  CHECK(std::abs(want[0] - 0.75) <= 1e-12);
  CHECK(std::abs(want[1] - 1.25) <= 1e-12);
}

TEST_CASE("nsa: which entries a position sees", "[nsa]") {
  for (const NsaShape& shape : {NsaShape{}, kSmall, NsaShape{6, 3, 9, 4, 1, 1, 5}, NsaShape{1, 1, 1, 1, 0, 1, 1}}) {
    for (index_t t = -3; t < 200; ++t) {
      CHECK(fovea::nsa_entries(t + 1, shape) == fovea::reference::nsa_visible(t, rule_of(shape)));
    }
  }
}

TEST_CASE("nsa: branches, choice and gated sum against the references", "[nsa]") {
  check_layer(Layer(10, kSmall, 1, 4, 2, 33, 150, 12, 20));
  check_layer(Layer(20, kSmall, 2, 6, 2, 1, 131, 16, 9));
  check_layer(Layer(30, NsaShape{6, 3, 9, 4, 1, 1, 5}, 1, 3, 1, 40, 40, 5, 33));
  check_layer(Layer(40, NsaShape{8, 8, 8, 3, 0, 1, 7}, 1, 2, 2, 7, 61, 8, 8));     // pooled blocks are the selected ones
  check_layer(Layer(50, NsaShape{4, 1, 8, 5, 1, 2, 9}, 1, 16, 1, 3, 700, 8, 8));   // several tiles of entries
}

TEST_CASE("nsa: compression by each phi", "[nsa]") {
  constexpr index_t kHeads = 2, kLen = 75, kDim = 6, kHidden = 7, kOut = 6;
  const Values x = random_values(60, 2, kHeads, kLen, kDim);
  const NsaRule rule = rule_of(kSmall);
  const index_t entries = fovea::nsa_entries(kLen, kSmall), deep = kSmall.block * kDim;
  const Values embedding = random_values(61, 1, kHeads, kSmall.block, kDim),
               slot = random_values(62, 1, 1, kHeads, kSmall.block), first = random_values(63, 1, kHeads, deep, kOut),
               wide = random_values(64, 1, 1, deep, kHidden), second = random_values(65, 1, kHeads, kHidden, kOut),
               bias = random_values(66, 1, 1, kHeads, kOut), hidden_bias = random_values(67, 1, 1, 1, kHidden);
  const auto at = [](const Values& w, index_t head, index_t row, index_t column) {
    return double{w.view()(0, w.heads == 1 ? 0 : head, row, column)};
  };
  const auto token = [&](const double* block, index_t head, index_t j, index_t d) {
    return block[j * kDim + d] + at(embedding, head, j, d);
  };
  NsaPhi phi;
  phi.embedding = {embedding.data.data(), {kHeads, kSmall.block, kDim}, {kSmall.block * kDim, kDim, 1}};
  phi.slot_weight = {slot.data.data(), {kHeads, kSmall.block}, {kSmall.block, 1}};
  const auto check = [&](NsaPool pool, double terms, const auto& want_of) {
    phi.pool = pool;
    Values got(2, kHeads, entries, kOut, canary());
    const fovea::Status status = fovea::nsa_compress(x.view(), kSmall, phi, got.view());
    INFO(status.message());
    REQUIRE(status.ok());
    std::vector<double> want(got.data.size()), size(got.data.size());
    fovea::reference::nsa_compress(x.view(), rule, fovea::bhsd(want.data(), 2, kHeads, entries, kOut),
                                   [&](index_t h, const double* block, double* to) { want_of(h, block, to, false); });
    fovea::reference::nsa_compress(x.view(), rule, fovea::bhsd(size.data(), 2, kHeads, entries, kOut),
                                   [&](index_t h, const double* block, double* to) { want_of(h, block, to, true); });
    for (std::size_t n = 0; n < want.size(); ++n)
      CHECK(std::abs(double{got.data[n]} - want[n]) <= kUnit * (terms + 4) * size[n]);
    ThreadPerLane threads;
    Values lanes(2, kHeads, entries, kOut, canary()), later(2, kHeads, entries - 3, kOut, canary());
    REQUIRE(fovea::nsa_compress(x.view(), kSmall, phi, lanes.view(), {}, {threads, 3}).ok());
    CHECK(same_bits(got.data, lanes.data));
    REQUIRE(fovea::nsa_compress(only_pos(x.view(), 3 * kSmall.stride, kLen - 3 * kSmall.stride), kSmall, phi, later.view())
                .ok());
    CHECK(same_positions(got, 3, later, 0, entries - 3));
  };
  const auto sized = [](double v, bool sizes) { return sizes ? std::abs(v) : v; };
  check(NsaPool::mean, 8, [&](index_t h, const double* block, double* to, bool sizes) {
    for (index_t d = 0; d < kDim; ++d) {
      to[d] = 0;
      for (index_t j = 0; j < kSmall.block; ++j)
        to[d] += (sizes ? std::abs(block[j * kDim + d]) + std::abs(at(embedding, h, j, d)) : token(block, h, j, d)) / 8;
    }
  });
  check(NsaPool::weighted, 8, [&](index_t h, const double* block, double* to, bool sizes) {
    for (index_t d = 0; d < kDim; ++d) {
      to[d] = 0;
      for (index_t j = 0; j < kSmall.block; ++j) {
        const double w = double{slot.data[static_cast<std::size_t>(h * kSmall.block + j)]};
        to[d] += sizes ? std::abs(w) * (std::abs(block[j * kDim + d]) + std::abs(at(embedding, h, j, d)))
                       : w * token(block, h, j, d);
      }
    }
  });
  phi.first = first.view();
  phi.first_bias = {bias.data.data(), {kHeads, kOut}, {kOut, 1}};
  const auto product = [&](const Values& w, index_t h, const double* block, index_t column, bool sizes) {
    double sum = 0;
    for (index_t r = 0; r < deep; ++r)
      sum += sizes ? (std::abs(block[r]) + std::abs(at(embedding, h, r / kDim, r % kDim))) * std::abs(at(w, h, r, column))
                   : token(block, h, r / kDim, r % kDim) * at(w, h, r, column);
    return sum;
  };
  check(NsaPool::linear, static_cast<double>(deep), [&](index_t h, const double* block, double* to, bool sizes) {
    for (index_t n = 0; n < kOut; ++n) to[n] = product(first, h, block, n, sizes) + sized(at(bias, 0, h, n), sizes);
  });
  phi.first = wide.view();
  phi.first_bias = {hidden_bias.data.data(), {1, kHidden}, {kHidden, 1}};
  phi.second = second.view();
  phi.second_bias = {bias.data.data(), {kHeads, kOut}, {kOut, 1}};
  check(NsaPool::mlp, static_cast<double>(deep + kHidden), [&](index_t h, const double* block, double* to, bool sizes) {
    for (index_t n = 0; n < kOut; ++n) {
      to[n] = sized(at(bias, 0, h, n), sizes);
      for (index_t m = 0; m < kHidden; ++m) {
        const double hidden = product(wide, h, block, m, sizes) + sized(at(hidden_bias, 0, 0, m), sizes);
        to[n] += std::max(hidden, 0.) * sized(at(second, h, m, n), sizes);
      }
    }
  });

  Values own(2, kHeads, entries, kOut, canary()), mean(2, kHeads, entries, kOut, canary());
  REQUIRE(fovea::nsa_compress(
              x.view(), kSmall,
              [](index_t, const float* block, float* to) {
                for (index_t d = 0; d < kDim; ++d) {
                  to[d] = 0;
                  for (index_t j = 0; j < kSmall.block; ++j) to[d] += block[j * kDim + d];
                  to[d] *= 0.125f;
                }
              },
              own.view())
              .ok());
  REQUIRE(fovea::nsa_compress(x.view(), kSmall, NsaPhi{}, mean.view()).ok());
  for (std::size_t n = 0; n < own.data.size(); ++n) CHECK(std::abs(own.data[n] - mean.data[n]) <= 1e-6f);
}

TEST_CASE("nsa: RoPE before and after pooling", "[nsa]") {
  constexpr index_t kLen = 40, kDim = 8, kFirst = 5;
  const Values x = random_values(70, 1, 1, kLen, kDim);
  std::vector<double> freq(2);
  float attention = 1;
  fovea::RopeOptions rope_options;
  rope_options.rotary_dim = 4;
  REQUIRE(fovea::rope_frequencies(rope_options, std::span(freq), attention).ok());
  std::vector<float> memory(static_cast<std::size_t>(fovea::rope_table_floats(kLen + kFirst, 4)));
  fovea::RopeTable table;
  REQUIRE(fovea::make_rope_table(table, freq, attention, 0, kLen + kFirst, memory).ok());
  const auto turn = [&](Values& rows, index_t step) {
    for (index_t i = 0; i < rows.len; ++i) {
      for (index_t m = 0; m < 2; ++m) {
        const double angle = static_cast<double>(kFirst + i * step) * freq[static_cast<std::size_t>(m)];
        float &a = rows.view()(0, 0, i, m), &b = rows.view()(0, 0, i, m + 2);
        const double left = double{a}, right = double{b};
        a = static_cast<float>(left * std::cos(angle) - right * std::sin(angle));
        b = static_cast<float>(left * std::sin(angle) + right * std::cos(angle));
      }
    }
  };
  const index_t entries = fovea::nsa_entries(kLen, kSmall);
  Values plain(1, 1, entries, kDim), after = plain, before = plain, turned_first = plain;
  REQUIRE(fovea::nsa_compress(x.view(), kSmall, NsaPhi{}, plain.view()).ok());
  turn(plain, kSmall.stride);
  NsaRope rope{NsaRopeOrder::pool_then_rope, &table, fovea::RopeLayout::half_split, kFirst};
  REQUIRE(fovea::nsa_compress(x.view(), kSmall, NsaPhi{}, after.view(), rope).ok());
  Values turned = x;
  turn(turned, 1);
  REQUIRE(fovea::nsa_compress(turned.view(), kSmall, NsaPhi{}, turned_first.view()).ok());
  rope.order = NsaRopeOrder::rope_then_pool;
  REQUIRE(fovea::nsa_compress(x.view(), kSmall, NsaPhi{}, before.view(), rope).ok());
  // Cosine and sine of a float table, one product and one sum, on numbers below 4.
  for (std::size_t n = 0; n < plain.data.size(); ++n) {
    CHECK(std::abs(plain.data[n] - after.data[n]) <= 4e-6f);
    CHECK(std::abs(turned_first.data[n] - before.data[n]) <= 4e-6f);
  }
  CHECK(!same_bits(after.data, before.data));
}

TEST_CASE("nsa: the choice of blocks is the total order", "[nsa]") {
  Random random(80);
  for (const NsaShape& shape :
       {NsaShape{8, 4, 16, 4, 1, 2, 8}, NsaShape{8, 4, 16, 6, 0, 1, 8}, NsaShape{8, 4, 16, 3, 1, 0, 8},
        NsaShape{8, 4, 16, 1, 0, 0, 8}, NsaShape{8, 4, 16, 3, 1, 2, 8}, NsaShape{8, 4, 16, 40, 2, 2, 8}}) {
    constexpr index_t kQueries = 9;
    Values importance(2, 3, kQueries, 30);
    for (float& x : importance.data) x = static_cast<float>(static_cast<int>(random.normal() * 2));   // many ties
    const std::vector<index_t> first{-4, 400};
    for (const index_t shift : {0, 77}) {
      const std::vector<index_t> offsets{first[0] + shift, first[1] + shift / 2};
      std::vector<std::int32_t> lists(static_cast<std::size_t>(2 * 3 * kQueries * shape.selected), -7);
      NsaOptions options;
      options.q_offset = offsets;
      REQUIRE(fovea::nsa_select(importance.view(), shape, lists, options).ok());
      for (index_t n = 0; n < 2 * 3 * kQueries; ++n) {
        const index_t t = offsets[static_cast<std::size_t>(n / (3 * kQueries))] + n % kQueries;
        const float* const row = importance.data.data() + n * 30;
        const auto want = fovea::reference::nsa_select({row, row + 30}, t, rule_of(shape));
        for (index_t e = 0; e < shape.selected; ++e) {
          const auto at = static_cast<std::size_t>(e);
          CHECK(lists[static_cast<std::size_t>(n * shape.selected + e)] == (at < want.size() ? want[at] : -1));
        }
      }
    }
  }
  // -0 is 0; NaN and -inf are never chosen, forced blocks always are.
  Values importance(1, 1, 1, 6);
  const float minus = -std::numeric_limits<float>::infinity();
  importance.data = {kNan, -0.f, 0.f, minus, kNan, minus};
  std::vector<std::int32_t> lists(6);
  const std::vector<index_t> offset{95};
  NsaOptions options;
  options.q_offset = offset;
  REQUIRE(fovea::nsa_select(importance.view(), {8, 4, 16, 6, 1, 1, 8}, lists, options).ok());
  CHECK(lists == std::vector<std::int32_t>{0, 1, 2, 5, -1, -1});
  lists.resize(3);
  REQUIRE(fovea::nsa_select(importance.view(), {8, 4, 16, 3, 1, 1, 8}, lists, options).ok());
  CHECK(lists == std::vector<std::int32_t>{0, 1, 5});
}

TEST_CASE("nsa: each branch alone is dense attention where it sees everything", "[nsa]") {
  Layer x(90, {8, 4, 16, 10, 1, 2, 200}, 1, 4, 2, 40, 130, 8, 12);
  AttentionOptions causal;
  causal.causal = Causal::bottom_right;
  const Expected dense = expect(x.q.view(), x.k.view(), x.v.view(), causal);
  const auto only = [&](std::size_t branch) {
    for (std::size_t n = 0; n < x.gates.data.size(); ++n) x.gates.data[n] = n % 3 == branch;
  };
  only(1);
  CHECK(worst(run(x), dense) <= 1);
  only(2);
  CHECK(worst(run(x), dense) <= 1);
  Layer one(91, {1, 1, 16, 3, 1, 2, 20}, 1, 4, 2, 40, 130, 8, 12);
  CHECK(same_bits(one.k.data, one.entry_k.data));
  for (std::size_t n = 0; n < one.gates.data.size(); ++n) one.gates.data[n] = n % 3 == 0;
  const Expected same = expect(one.q.view(), one.k.view(), one.v.view(), causal);
  CHECK(worst(run(one), same) <= 1);
}

TEST_CASE("nsa: the shares of the blocks add up to l / s", "[nsa]") {
  Layer x(100, kSmall, 1, 4, 2, 1, 8 * kSmall.selected_block, 8, 8);
  const Chosen c = choose(x, {});
  for (index_t h = 0; h < 2; ++h) {
    double sum = 0;
    for (index_t j = 0; j < 8; ++j) sum += double{c.importance.view()(0, h, 0, j)};
    // two heads, l / s strides each; every one of 31 weights rounded a few times
    CHECK(std::abs(sum - 2. * 2.) <= 4. * 64 * kUnit);
  }
}

TEST_CASE("nsa: decode is the last row of prefill, chunks are the whole", "[nsa]") {
  const Layer whole(110, kSmall, 2, 8, 2, 140, 140, 12, 20);
  const Chosen all = choose(whole, {});
  const Expected want = gated(expect_branches(whole, all, 0), whole.gates);
  const Values prefill = run(whole);
  CHECK(worst(prefill, want) <= 1);
  for (const auto& [first, count] : {std::pair<index_t, index_t>{0, 1}, {0, 37}, {37, 64}, {101, 38}, {7, 1}, {139, 1}}) {
    Layer part = whole;
    part.q = last_positions(whole.q, first, count);
    part.gates = last_positions(whole.gates, first, count);
    const std::vector<index_t> len{first + count, first + count};
    NsaOptions options;
    options.len_k = len;
    const Chosen c = choose(part, options);
    // Scores, weights and blocks: the same bits, whoever asks beside the row.
    CHECK(same_positions(all.out, first, c.out, 0, count));
    CHECK(same_positions(all.importance, first, c.importance, 0, count));
    const Values out = run(part, options);
    double off = 0;
    for (index_t b = 0; b < 2; ++b) {
      for (index_t h = 0; h < 8; ++h) {
        for (index_t i = 0; i < count; ++i) {
          for (index_t d = 0; d < 20; ++d) {
            const auto n = static_cast<std::size_t>(((b * 8 + h) * 140 + first + i) * 20 + d);
            off = std::max(off, in_budgets(double{out.view()(b, h, i, d)}, want.out[n], want.out_error[n]));
          }
        }
      }
    }
    CHECK(off <= 1);
  }
}

TEST_CASE("nsa: what comes later moves no bit", "[nsa]") {
  constexpr index_t kLen = 120, kSame = 71;
  const Layer x(120, kSmall, 1, 4, 2, kLen, kLen, 8, 12);
  const Values before = run(x);
  for (const bool poisoned : {false, true}) {
    Layer y = x;
    Random random(121);
    for (index_t h = 0; h < 2; ++h) {
      for (index_t j = kSame; j < kLen; ++j) {
        for (index_t d = 0; d < 8; ++d) y.k.view()(0, h, j, d) = poisoned ? kNan : random.normal();
        for (index_t d = 0; d < 12; ++d) y.v.view()(0, h, j, d) = poisoned ? kNan : random.normal();
      }
    }
    y.compress();
    const Values after = run(y);
    CHECK(same_positions(before, 0, after, 0, kSame));
    CHECK(!same_positions(before, kSame, after, kSame, 1));
  }
}

TEST_CASE("nsa: NaN in padding, in blocks not chosen and in the workspace", "[nsa]") {
  const Layer x(130, kSmall, 2, 4, 2, 6, 150, 8, 12);
  Layer padded = x;
  padded.k = Values(2, 2, 190, 8, kNan);
  padded.v = Values(2, 2, 190, 12, kNan);
  padded.entry_k = Values(2, 2, x.entry_k.len + 9, 8, kNan);
  padded.entry_v = Values(2, 2, x.entry_k.len + 9, 12, kNan);
  const auto copy = [](const Values& from, Values& to) {
    for (index_t b = 0; b < from.batch; ++b) {
      for (index_t h = 0; h < from.heads; ++h) {
        for (index_t j = 0; j < from.len; ++j) {
          for (index_t d = 0; d < from.dim; ++d) to.view()(b, h, j, d) = from.view()(b, h, j, d);
        }
      }
    }
  };
  copy(x.k, padded.k);
  copy(x.v, padded.v);
  copy(x.entry_k, padded.entry_k);
  copy(x.entry_v, padded.entry_v);
  const std::vector<index_t> len{150, 150};
  NsaOptions options;
  options.len_k = len;
  const Values clean = run(x);
  CHECK(same_bits(clean.data, run(padded, options).data));

  const fovea::AttentionShape extents{2, 4, 2, 6, 150, 8, 12};
  PoisonedBytes bytes(fovea::nsa_workspace_bytes(extents, kSmall, 1), 5);
  NsaOptions given;
  given.workspace = bytes.bytes();
  CHECK(same_bits(clean.data, run(x, given).data));
  CHECK(bytes.guards_intact());
  given.workspace = given.workspace.first(given.workspace.size() - 64);
  Values out(2, 4, 6, 12, canary());
  CHECK(fovea::nsa_attention<Compiled>(x.q.view(), x.kv(), x.entries(), x.gates.view(), out.view(), kSmall, given).code() ==
        fovea::Code::workspace_too_small);
  CHECK(std::all_of(out.data.begin(), out.data.end(), is_canary));

  // Whatever no list names may be anything.
  Layer decode(131, kSmall, 1, 4, 1, 1, 150, 8, 12);
  const Chosen c = choose(decode, {});
  const auto list = list_of(c, kSmall, 0);
  Values selected(1, 4, 1, 12, canary()), poisoned = selected;
  REQUIRE(fovea::nsa_selected_attention<Compiled>(decode.q.view(), decode.kv(), c.lists, kSmall, selected.view(), {}).ok());
  index_t hidden = 0;
  for (index_t j = 0; j < 150; ++j) {
    if (std::count(list.begin(), list.end(), j / kSmall.selected_block) != 0) continue;
    ++hidden;
    for (index_t d = 0; d < 8; ++d) decode.k.view()(0, 0, j, d) = kNan;
    for (index_t d = 0; d < 12; ++d) decode.v.view()(0, 0, j, d) = kNan;
  }
  CHECK(hidden > 0);
  REQUIRE(fovea::nsa_selected_attention<Compiled>(decode.q.view(), decode.kv(), c.lists, kSmall, poisoned.view(), {}).ok());
  CHECK(same_bits(selected.data, poisoned.data));
}

TEST_CASE("nsa: rows that see little or nothing", "[nsa]") {
  Layer x(140, kSmall, 1, 4, 2, 12, 12, 8, 12);
  const Chosen c = choose(x, {});
  for (index_t h = 0; h < 4; ++h) {
    for (index_t i = 0; i < 7; ++i) {
      CHECK(c.lse[static_cast<std::size_t>(h * 12 + i)] == -std::numeric_limits<float>::infinity());
      for (index_t d = 0; d < 12; ++d) CHECK(c.out.view()(0, h, i, d) == 0.f);
    }
  }
  const std::vector<index_t> before{-5};
  NsaOptions options;
  options.q_offset = before;
  const Values out = run(x, options);
  for (index_t h = 0; h < 4; ++h) {
    for (index_t i = 0; i < 5; ++i) {
      for (index_t d = 0; d < 12; ++d) CHECK(out.view()(0, h, i, d) == 0.f);
    }
    CHECK(out.view()(0, h, 5, 0) != 0.f);
  }
  Layer none(141, kSmall, 1, 4, 2, 3, 0, 8, 12);
  for (const float value : run(none).data) CHECK(value == 0.f);
}

TEST_CASE("nsa: lanes, formats, strides, gates and a window of its own", "[nsa]") {
  Layer x(150, kSmall, 2, 8, 2, 45, 160, 12, 20);
  const Values want = run(x);
  ThreadPerLane threads;
  NsaOptions options;
  options.executor = {threads, 3};
  CHECK(same_bits(want.data, run(x, options).data));
  options = {};

  std::vector<fovea::bf16> narrow(want.data.size());
  REQUIRE(fovea::nsa_attention<Compiled>(x.q.view(), x.kv(), x.entries(), x.gates.view(),
                                         fovea::bshd(narrow.data(), 2, 45, 8, 20), kSmall)
              .ok());
  bool rounded = true;
  for (index_t b = 0; b < 2; ++b) {
    for (index_t h = 0; h < 8; ++h) {
      for (index_t i = 0; i < 45; ++i) {
        for (index_t d = 0; d < 20; ++d)
          rounded = rounded && narrow[static_cast<std::size_t>(((b * 45 + i) * 8 + h) * 20 + d)].bits ==
                                   fovea::convert<fovea::bf16>(want.view()(b, h, i, d)).bits;
      }
    }
  }
  CHECK(rounded);

  // Logits: two more roundings of a gate, its exponent and exp2's 6 units.
  Layer logits = x;
  for (float& g : logits.gates.data) g = std::log(g / (1 - g));
  options.gate_logits = true;
  const Values by_logits = run(logits, options);
  for (std::size_t n = 0; n < want.data.size(); ++n) CHECK(std::abs(want.data[n] - by_logits.data[n]) <= 1e-5f);
  options = {};

  // A closed gate hides what its branch holds.
  Layer open = x;
  const Values other_k = random_values(151, 2, 2, 160, 12), other_v(2, 2, 160, 20, kNan);
  const fovea::Kv other = kv_of(other_k, other_v);
  options.window_kv = &other;
  for (std::size_t n = 2; n < open.gates.data.size(); n += 3) open.gates.data[n] = 0;
  CHECK(same_bits(run(open).data, run(open, options).data));
  options.window_kv = nullptr;
  options.compressed_q = x.q.view();
  CHECK(same_bits(want.data, run(x, options).data));
  const Values plain_q = random_values(152, 2, 8, 45, 12);
  options.compressed_q = plain_q.view();
  CHECK(!same_bits(want.data, run(x, options).data));
}

TEST_CASE("nsa: the gated sum, gates shared by sequences and heads", "[nsa]") {
  const Values a = random_values(155, 2, 3, 5, 19), b = random_values(156, 2, 3, 5, 19), c = random_values(157, 2, 3, 5, 19);
  for (const index_t heads : {index_t{1}, index_t{3}}) {
    Values gates = random_values(158, 1, heads, 5, 3), out(2, 3, 5, 19, canary());
    REQUIRE(fovea::nsa_gated_sum(a.view(), b.view(), c.view(), gates.view(), out.view()).ok());
    for (std::size_t n = 0; n < out.data.size(); ++n) {
      const auto row = static_cast<index_t>(n) / 19, i = row % 5, h = heads == 1 ? 0 : row / 5 % 3;
      const float* const g = &gates.view()(0, h, i, 0);
      const double parts[3] = {double{g[0]} * double{a.data[n]}, double{g[1]} * double{b.data[n]},
                               double{g[2]} * double{c.data[n]}};
      const double size = std::abs(parts[0]) + std::abs(parts[1]) + std::abs(parts[2]);
      CHECK(std::abs(double{out.data[n]} - (parts[0] + parts[1] + parts[2])) <= 4 * kUnit * size);
    }
    Values in_place = a;
    CHECK(!fovea::nsa_gated_sum(in_place.view(), b.view(), c.view(), gates.view(), in_place.view()).ok());
    CHECK(same_bits(in_place.data, a.data));
  }
}

TEST_CASE("nsa: refusals write nothing", "[nsa][errors]") {
  const Layer x(160, kSmall, 2, 4, 2, 5, 60, 8, 12);
  Values out(2, 4, 5, 12, canary());
  const auto refused = [&](const fovea::Status& status, const char* words) {
    INFO(status.message());
    CHECK(!status.ok());
    CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
    CHECK(std::all_of(out.data.begin(), out.data.end(), is_canary));
  };
  const auto call = [&](const NsaShape& shape, const NsaOptions& options = {}) {
    return fovea::nsa_attention<Compiled>(x.q.view(), x.kv(), x.entries(), x.gates.view(), out.view(), shape, options);
  };
  refused(call({8, 3, 16, 4, 1, 2, 24}), "stride 3 must divide block 8 and selected_block 16");
  refused(call({8, 4, 18, 4, 1, 2, 24}), "selected_block 18");
  refused(call({8, 4, 16, 2, 1, 2, 24}), "init 1 + local 2 blocks are forced, only 2");
  refused(call({8, 4, 16, 4, 1, 2, 0}), "window 0");
  refused(call({4, 4, 16, 4, 1, 2, 24}), "sees 15 entries, there are 14");
  const std::vector<index_t> one{60}, far{60, 58}, long_one{60, 61};
  NsaOptions options;
  options.len_k = one;
  refused(call(kSmall, options), "len_k has 1 entries for 2 sequences");
  options = {};
  options.len_k = long_one;
  refused(call(kSmall, options), "61");
  options = {};
  options.q_offset = far;
  refused(call(kSmall, options), "its last query position 64");
  options = {};
  std::vector<float> lse(40);
  options.lse = {lse.data(), {2, 4, 5}, {20, 5, 1}};
  refused(call(kSmall, options), "three LSE");
  const Values gates(2, 4, 5, 2);
  refused(fovea::nsa_attention<Compiled>(x.q.view(), x.kv(), x.entries(), gates.view(), out.view(), kSmall),
          "gates is [2, 4, 5, 2]");
  refused(fovea::nsa_attention<Compiled>(x.q.view(), x.kv(), x.entries(), fovea::bhsd(out.data.data(), 2, 4, 5, 3),
                                         out.view(), kSmall),
          "overlaps gates");
  const Values few(2, 1, x.entry_k.len, 8), few_v(2, 1, x.entry_k.len, 12);
  refused(fovea::nsa_attention<Compiled>(x.q.view(), x.kv(), kv_of(few, few_v), x.gates.view(), out.view(), kSmall),
          "with 1 kv heads");
  Values importance(2, 2, 5, 3, canary());
  const std::vector<index_t> len{60, 60};
  options = {};
  refused(fovea::nsa_compressed_attention<Compiled>(x.q.view(), x.entries(), kSmall, out.view(), importance.view(), options),
          "positions need q_offset or len_k");
  options.len_k = len;
  std::vector<std::int32_t> lists(2 * 2 * 5 * 4, -7);
  refused(fovea::nsa_select(importance.view(), kSmall, lists, options), "stands in block 3, importance has 3");
  refused(fovea::nsa_select(importance.view(), kSmall, std::span(lists).first(7), options), "lists hold 7 numbers");
  CHECK(std::all_of(lists.begin(), lists.end(), [](std::int32_t n) { return n == -7; }));
  refused(fovea::nsa_selected_attention<Compiled>(x.q.view(), x.kv(), std::span(lists).first(7), kSmall, out.view(), {}),
          "7 numbers");

  Values entries(2, 2, 15, 8, canary());
  const auto compress = [&](const NsaPhi& phi, const NsaRope& rope = {}) {
    return fovea::nsa_compress(x.k.view(), kSmall, phi, fovea::bhsd(entries.data.data(), 2, 2, 14, 8), rope);
  };
  refused(fovea::nsa_compress(x.k.view(), kSmall, NsaPhi{}, entries.view()), "15 entries to make, 60 tokens hold 14");
  NsaPhi phi;
  phi.pool = NsaPool::weighted;
  refused(compress(phi), "needs slot_weight");
  phi.pool = NsaPool::linear;
  refused(compress(phi), "first is [0, 0, 0, 0], must be [1, 2 | 1, 64, 8]");
  NsaRope rope;
  rope.order = NsaRopeOrder::pool_then_rope;
  refused(compress({}, rope), "no table");
  CHECK(std::all_of(entries.data.begin(), entries.data.end(), is_canary));
}
