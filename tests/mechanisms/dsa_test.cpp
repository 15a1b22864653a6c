// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/dsa.hpp"

#include <bit>
#include <cstring>
#include <limits>
#include <vector>

#include "fovea/attention.hpp"
#include "fovea/cache/index_cache.hpp"
#include "fovea/core/mla.hpp"
#include "fovea/mla.hpp"
#include "fovea/reference/dsa.hpp"
#include "support/dense.hpp"
#include "support/executors.hpp"
#include "support/key_lists.hpp"

namespace {

using namespace test;
using fovea::Causal;
using fovea::DsaRule;
using fovea::Format;
using fovea::IndexKeys;
using fovea::IndexQueries;
using fovea::IndexRounding;
using fovea::Status;
using Compiled = fovea::Formats<Format::f32, Format::bf16, Format::latent_fp8>;

constexpr std::int32_t kUnwritten = -77;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Token lists or scores, [batch, pos, width].
template <class T>
struct Rows {
  index_t batch, len, width;
  std::vector<T> data;

  Rows(index_t batch_, index_t len_, index_t width_, T value)
      : batch(batch_), len(len_), width(width_), data(static_cast<std::size_t>(batch_ * len_ * width_), value) {}
  View<T, 3> view() { return {data.data(), {batch, len, width}, {len * width, width, 1}}; }
  View<const T, 3> view() const { return {data.data(), {batch, len, width}, {len * width, width, 1}}; }
  std::vector<T> row(index_t b, index_t i) const {
    const auto from = data.begin() + (b * len + i) * width;
    return {from, from + width};
  }
};
using Lists = Rows<std::int32_t>;
using Scores = Rows<float>;

// The inputs of an indexer; keys in fp32 rows.
struct Indexer {
  index_t batch, heads, len_q, len_k, dim;
  Values q, k;
  std::vector<float> w;   // [batch, head, pos]

  Indexer(std::uint64_t seed, index_t batch_, index_t heads_, index_t len_q_, index_t len_k_, index_t dim_)
      : batch(batch_),
        heads(heads_),
        len_q(len_q_),
        len_k(len_k_),
        dim(dim_),
        q(random_values(seed, batch_, heads_, len_q_, dim_)),
        k(random_values(seed + 1, batch_, 1, len_k_, dim_)) {
    Random random(seed + 2);
    for (index_t n = 0; n < batch * heads * len_q; ++n) w.push_back(random.normal());
  }

  // Small integers, so that every score is exact in fp32; few values, so that ties are many.
  static Indexer of_integers(std::uint64_t seed, index_t batch, index_t heads, index_t len_q, index_t len_k, index_t dim) {
    Indexer x(seed, batch, heads, len_q, len_k, dim);
    Random random(seed);
    for (std::vector<float>* numbers : {&x.q.data, &x.k.data, &x.w}) {
      for (float& number : *numbers) number = static_cast<float>(random.between(-3, 3));
    }
    return x;
  }

  View<const float, 3> weights() const { return {w.data(), {batch, heads, len_q}, {heads * len_q, len_q, 1}}; }
  IndexKeys keys() const { return fovea::index_rows(k.data.data(), Format::f32, dim, batch, len_k); }
  float factor() const { return static_cast<float>(1 / std::sqrt(static_cast<double>(heads * dim))); }
};

// The keys a query may see.
struct Seen {
  index_t begin, end;
};
Seen seen_by(const Indexer& x, const AttentionOptions& options, index_t b, index_t i) {
  const auto at = static_cast<std::size_t>(b);
  const index_t len_k = options.len_k.empty() ? x.len_k : options.len_k[at];
  index_t pos = options.causal == Causal::bottom_right ? len_k - x.len_q + i : i;
  if (!options.q_offset.empty()) pos = options.q_offset[at] + i;
  index_t begin = 0, end = len_k;
  if (options.causal != Causal::none) end = std::min(end, pos + 1);
  if (options.window.right >= 0) end = std::min(end, pos + options.window.right + 1);
  if (options.window.left >= 0) begin = std::max<index_t>(begin, pos - options.window.left);
  end = std::max<index_t>(end, 0);
  return {std::min(begin, end), end};
}

// Scores of the reference and what fp32 may be away from them.
struct Expect {
  std::vector<double> score, error;   // [key], -inf where unseen
};
Expect expect_scores(const Indexer& x, const AttentionOptions& options, index_t b, index_t i, double factor) {
  const Seen seen = seen_by(x, options, b, i);
  Expect e{std::vector<double>(static_cast<std::size_t>(x.len_k), -std::numeric_limits<double>::infinity()),
           std::vector<double>(static_cast<std::size_t>(x.len_k), 0.)};
  std::vector<double> q, w;
  for (index_t h = 0; h < x.heads; ++h) {
    w.push_back(double{x.weights()(b, h, i)} * factor);
    for (index_t d = 0; d < x.dim; ++d) q.push_back(double{x.q.view()(b, h, i, d)});
  }
  for (index_t s = seen.begin; s < seen.end; ++s) {
    std::vector<double> k;
    for (index_t d = 0; d < x.dim; ++d) k.push_back(double{x.k.view()(b, 0, s, d)});
    double magnitude = 0;
    for (std::size_t h = 0; h < w.size(); ++h) {
      for (std::size_t d = 0; d < k.size(); ++d) magnitude += std::abs(w[h] * q[h * k.size() + d] * k[d]);
    }
    e.score[static_cast<std::size_t>(s)] = fovea::reference::dsa_score(q, w, k);
    // A rounding per product and sum, of the weight's two products, of the scales of query and key.
    e.error[static_cast<std::size_t>(s)] = kUnit * static_cast<double>(2 * x.dim + x.heads + 8) * magnitude + 1e-37;
  }
  return e;
}

Lists select(const IndexQueries& q, const Indexer& x, const IndexKeys& keys, index_t k, const AttentionOptions& options,
             const DsaRule& rule = {}) {
  Lists lists(x.batch, x.len_q, k, kUnwritten);
  const Status status = fovea::dsa_select(q, x.weights(), keys, lists.view(), options, rule);
  INFO(status.message());
  REQUIRE(status.ok());
  return lists;
}
Lists select(const Indexer& x, index_t k, const AttentionOptions& options, const DsaRule& rule = {}) {
  return select(x.q.view(), x, x.keys(), k, options, rule);
}
Scores scores(const IndexQueries& q, const Indexer& x, const IndexKeys& keys, const AttentionOptions& options,
              const DsaRule& rule = {}) {
  Scores all(x.batch, x.len_q, x.len_k, canary());
  const Status status = fovea::dsa_scores(q, x.weights(), keys, all.view(), options, rule);
  INFO(status.message());
  REQUIRE(status.ok());
  return all;
}

void check_scores(const Scores& got, const Indexer& x, const AttentionOptions& options, double factor) {
  double worst = 0;
  for (index_t b = 0; b < x.batch; ++b) {
    for (index_t i = 0; i < x.len_q; ++i) {
      const Expect want = expect_scores(x, options, b, i, factor);
      const std::vector<float> row = got.row(b, i);
      for (std::size_t s = 0; s < row.size(); ++s) {
        if (std::isinf(want.score[s])) {
          REQUIRE(row[s] == -kInfinity);
        } else {
          worst = std::max(worst, std::abs(double{row[s]} - want.score[s]) / want.error[s]);
        }
      }
    }
  }
  CHECK(worst <= 1);
}

// Keys of an fp32 indexer in a cache, and what the cache made of them back in x.
struct Coded {
  fovea::IndexCache cache;
  Indexer rounded;

  Coded(const Indexer& x, fovea::IndexLayout layout, IndexRounding rounding) : rounded(x) {
    fovea::IndexCacheShape shape;
    shape.dim = x.dim, shape.sequences = x.batch, shape.slots = x.len_k, shape.layout = layout, shape.rounding = rounding;
    REQUIRE(cache.create(shape).ok());
    for (index_t b = 0; b < x.batch; ++b) {
      REQUIRE(cache.append(b, only_batch(x.k.view(), b)).ok());
      for (index_t s = 0; s < x.len_k; ++s) {
        const auto place = fovea::index_keys::place_of(cache.keys(), b, s);
        float scale;
        std::memcpy(&scale, place.scales, sizeof scale);
        for (index_t d = 0; d < x.dim; ++d) {
          const auto code = static_cast<std::uint8_t>(place.codes[d]);
          rounded.k.view()(b, 0, s, d) = static_cast<float>(fovea::widen(fovea::fp8_e4m3{code})) * scale;
        }
      }
    }
  }
  IndexKeys keys() const { return cache.keys(); }
};

AttentionOptions causal_options() {
  AttentionOptions options;
  options.causal = Causal::bottom_right;
  return options;
}

// q, codes and scales as a caller who quantises brings them.
struct CodedQueries {
  std::vector<fovea::fp8_e4m3> codes;
  std::vector<float> scale;
  Values numbers;   // what they stand for

  CodedQueries(const Values& q, IndexRounding rounding) : numbers(q) {
    codes.resize(q.data.size());
    for (std::size_t row = 0; row < q.data.size() / static_cast<std::size_t>(q.dim); ++row) {
      float* const at = numbers.data.data() + row * static_cast<std::size_t>(q.dim);
      auto* const to = reinterpret_cast<std::byte*>(codes.data()) + row * static_cast<std::size_t>(q.dim);
      scale.push_back(fovea::quantise_index_row(at, q.dim, rounding, to));
      for (index_t d = 0; d < q.dim; ++d)
        at[d] =
            static_cast<float>(fovea::widen(codes[row * static_cast<std::size_t>(q.dim) + static_cast<std::size_t>(d)])) *
            scale.back();
    }
  }
  View<const fovea::fp8_e4m3, 4> view() const {
    const Values& q = numbers;
    return {codes.data(), {q.batch, q.heads, q.len, q.dim}, {q.heads * q.len * q.dim, q.len * q.dim, q.dim, 1}};
  }
  View<const float, 3> scales() const {
    const Values& q = numbers;
    return {scale.data(), {q.batch, q.heads, q.len}, {q.heads * q.len, q.len, 1}};
  }
};

fovea::KeyLists key_lists(const Lists& lists) { return fovea::dsa_key_lists(lists.view()); }

// Latents, absorbed queries and the call.
struct Latent {
  index_t dim_v;
  Values q, rows;

  Latent(std::uint64_t seed, index_t batch, index_t heads, index_t len_q, index_t len_k, index_t dim, index_t dim_v_)
      : dim_v(dim_v_),
        q(random_values(seed, batch, heads, len_q, dim)),
        rows(random_values(seed + 1, batch, 1, len_k, dim)) {
    for (float& x : q.data) x *= 0.3f;
  }
  fovea::Kv kv() const {
    fovea::Kv kv = fovea::dense_kv(rows.view(), rows.view());
    kv.dim_v = dim_v;
    return kv;
  }
  Tensor<const float> values() const {
    Tensor<const float> v = rows.view();
    v.extent[3] = dim_v;
    return v;
  }
};

Result attend_lists(const Latent& x, const fovea::Kv& kv, const Lists& lists, AttentionOptions options) {
  Result r = unwritten(x.q.view(), x.values());
  options.lse = r.lse_view();
  if (!options.scale) options.scale = 0.25f;
  const Status status = fovea::dsa_attention<Compiled>(x.q.view(), kv, key_lists(lists), r.out.view(), options);
  INFO(status.message());
  REQUIRE(status.ok());
  return r;
}

// The budget of a dense call with -inf for what is not listed; the numbers of the mechanism's own reference.
Expected expect_lists(const Latent& x, const Lists& lists, AttentionOptions options) {
  options.scale = 0.25f;
  const index_t heads = x.q.heads, len_q = x.q.len, len_k = x.rows.len;
  const std::vector<index_t> lengths(static_cast<std::size_t>(x.q.batch), len_k);
  const fovea::KeyLists kind = key_lists(lists);
  const std::vector<float> bias = list_bias({&kind, 1}, x.q.batch, heads, len_q, lengths, len_k);
  AttentionOptions biased = options;
  biased.bias = {bias.data(), {x.q.batch, heads, len_q, len_k}, {heads * len_q * len_k, len_q * len_k, len_k, 1}};
  Expected e = expect(x.q.view(), x.rows.view(), x.values(), biased);
  const Tensor<double> out = fovea::bhsd(e.out.data(), x.q.batch, heads, len_q, x.dim_v);
  const View<double, 3> lse{e.lse.data(), {x.q.batch, heads, len_q}, {heads * len_q, len_q, 1}};
  fovea::reference::dsa_attention(x.q.view(), x.rows.view(), lists.view(), out, options, lse);
  return e;
}

}   // namespace

TEST_CASE("dsa: the golden index, its tie at zero and its negative value", "[dsa]") {
  Indexer x(1, 1, 2, 1, 4, 2);
  x.q.data = {1, -1, 2, 0};
  x.k.data = {1, 0, 0, 1, 1, 1, -1, -1};
  x.w = {0.5f, -0.25f};
  DsaRule rule;
  rule.weight_scale = 1.f;
  CHECK(scores(x.q.view(), x, x.keys(), {}, rule).data == std::vector<float>{0, 0, -0.5f, 0});
  CHECK(select(x, 1, {}, rule).data == std::vector<std::int32_t>{0});
  CHECK(select(x, 3, {}, rule).data == std::vector<std::int32_t>{0, 1, 3});
  CHECK(select(x, 6, {}, rule).data == std::vector<std::int32_t>{0, 1, 2, 3, -1, -1});
}

TEST_CASE("dsa: scores against the formula", "[dsa]") {
  const std::vector<index_t> lengths{70, 33}, offsets{20, -5};
  for (const index_t heads : {1, 5, 13, 32}) {
    const Indexer x(static_cast<std::uint64_t>(heads), 2, heads, 11, 70, 36);
    for (int kind = 0; kind < 4; ++kind) {
      CAPTURE(heads, kind);
      AttentionOptions options;
      if (kind == 1) options = causal_options();
      if (kind >= 2) options.len_k = lengths, options.causal = Causal::bottom_right;
      if (kind == 3) options.q_offset = offsets, options.window = {9, -1};
      check_scores(scores(x.q.view(), x, x.keys(), options), x, options, double{x.factor()});
    }
  }
}

TEST_CASE("dsa: quantised scores are those of the dequantised formula", "[dsa]") {
  const Indexer x(3, 2, 7, 3, 90, 128);
  for (const IndexRounding rounding : {IndexRounding::plain, IndexRounding::ue8m0}) {
    CAPTURE(static_cast<int>(rounding));
    Coded coded(x, fovea::IndexLayout::rows, rounding);
    check_scores(scores(x.q.view(), x, coded.keys(), {}), coded.rounded, {}, double{x.factor()});

    // Queries quantised inside, brought as codes with scales, or with the scales in the weights.
    const CodedQueries q(x.q, rounding);
    coded.rounded.q = q.numbers;
    DsaRule rule;
    rule.round_queries = rounding;
    const Scores inside = scores(x.q.view(), x, coded.keys(), {}, rule);
    check_scores(inside, coded.rounded, {}, double{x.factor()});
    CHECK(same_bits(inside.data, scores(IndexQueries(q.view(), q.scales()), x, coded.keys(), {}).data));
    Indexer folded = x;
    for (std::size_t n = 0; n < folded.w.size(); ++n) folded.w[n] *= q.scale[n];
    check_scores(scores(IndexQueries(q.view()), folded, coded.keys(), {}), coded.rounded, {}, double{x.factor()});
  }
}

TEST_CASE("dsa: where index keys lie changes no bit", "[dsa]") {
  constexpr index_t kLen = 192;   // whole pages
  const Indexer x(4, 2, 9, 5, kLen, 64);
  const AttentionOptions options = causal_options();
  const Coded rows(x, fovea::IndexLayout::rows, IndexRounding::ue8m0),
      pages(x, fovea::IndexLayout::deep_gemm, IndexRounding::ue8m0);
  const Scores want = scores(x.q.view(), x, rows.keys(), options);
  CHECK(same_bits(scores(x.q.view(), x, pages.keys(), options).data, want.data));

  // Pages of 7 keys, shuffled, in a pool whose other pages are NaN.
  constexpr index_t kPage = 7, kPages = 2 * ((kLen + kPage - 1) / kPage) + 3;
  std::vector<std::byte> pool(static_cast<std::size_t>(kPages * kPage * (x.dim + 4)), std::byte{0xff});
  std::vector<std::int32_t> table;
  for (index_t b = 0; b < 2; ++b) {
    for (index_t page = 0; page * kPage < kLen; ++page) {
      const auto at = static_cast<index_t>(table.size()) * 11 % kPages;
      table.push_back(static_cast<std::int32_t>(at));
      for (index_t slot = 0; slot < std::min(kPage, kLen - page * kPage); ++slot) {
        const auto from = fovea::index_keys::place_of(rows.keys(), b, page * kPage + slot);
        std::byte* const to = pool.data() + at * kPage * (x.dim + 4);
        std::memcpy(to + slot * x.dim, from.codes, static_cast<std::size_t>(x.dim));
        std::memcpy(to + kPage * x.dim + slot * 4, from.scales, 4);
      }
    }
  }
  const index_t width = static_cast<index_t>(table.size()) / 2;
  IndexKeys keys = fovea::index_pages(pool.data(), x.dim, kPages, kPage, 2, kLen, {table.data(), {2, width}, {width, 1}});
  CHECK(same_bits(scores(x.q.view(), x, keys, options).data, want.data));
  table[3] = static_cast<std::int32_t>(kPages);
  Scores untouched(2, 5, kLen, canary());
  CHECK_FALSE(fovea::dsa_scores(x.q.view(), x.weights(), keys, untouched.view(), options).ok());
  CHECK(is_canary(untouched.data[0]));

  // Codes and scales in two arrays.
  std::vector<fovea::fp8_e4m3> codes(static_cast<std::size_t>(2 * kLen * x.dim));
  std::vector<float> scale(2 * kLen);
  for (index_t n = 0; n < 2 * kLen; ++n) {
    const auto from = fovea::index_keys::place_of(rows.keys(), n / kLen, n % kLen);
    std::memcpy(codes.data() + n * x.dim, from.codes, static_cast<std::size_t>(x.dim));
    std::memcpy(&scale[static_cast<std::size_t>(n)], from.scales, 4);
  }
  CHECK(same_bits(scores(x.q.view(), x, fovea::index_arrays(codes.data(), scale.data(), x.dim, 2, kLen), options).data,
                  want.data));
}

TEST_CASE("dsa: selected sets of exact scores, ties included", "[dsa]") {
  const std::vector<index_t> lengths{130, 40}, offsets{60, -3};
  const Indexer x = Indexer::of_integers(5, 2, 6, 9, 130, 8);
  const Coded coded(x, fovea::IndexLayout::rows, IndexRounding::ue8m0);   // -3 .. 3 times a power of two is exact
  DsaRule rule;
  rule.weight_scale = 1.f;
  for (const index_t k : {1, 7, 64, 130, 200}) {
    for (int kind = 0; kind < 4; ++kind) {
      CAPTURE(k, kind);
      AttentionOptions options;
      if (kind == 1) options = causal_options();
      if (kind >= 2) options.len_k = lengths, options.causal = Causal::bottom_right;
      if (kind == 3) options.q_offset = offsets, options.window = {50, -1};
      const Lists got = select(x, k, options, rule);
      for (index_t b = 0; b < x.batch; ++b) {
        for (index_t i = 0; i < x.len_q; ++i)
          CHECK(got.row(b, i) == fovea::reference::dsa_top_k(expect_scores(x, options, b, i, 1).score, k));
      }
      CHECK(select(x.q.view(), x, coded.keys(), k, options, rule).data == got.data);
      rule.round_queries = IndexRounding::ue8m0;
      CHECK(select(x, k, options, rule).data == got.data);
      rule.round_queries = IndexRounding::none;
    }
  }
}

TEST_CASE("dsa: regret of the selection on random data", "[dsa]") {
  const Indexer x(6, 1, 16, 6, 300, 64);
  const AttentionOptions options = causal_options();
  const index_t k = 40;
  const Lists got = select(x, k, options);
  for (index_t i = 0; i < x.len_q; ++i) {
    const Expect e = expect_scores(x, options, 0, i, double{x.factor()});
    const auto sum = [&](const std::vector<std::int32_t>& list) {
      double total = 0;
      for (const std::int32_t s : list) total += e.score[static_cast<std::size_t>(s)];
      return total;
    };
    // A swapped pair differs by no more than both errors.
    double errors = 0;
    for (const double error : e.error) errors = std::max(errors, error);
    CHECK(sum(got.row(0, i)) >= sum(fovea::reference::dsa_top_k(e.score, k)) - 2 * static_cast<double>(k) * errors);
  }
}

TEST_CASE("dsa: numbers that are not finite", "[dsa]") {
  Indexer x(7, 1, 3, 1, 20, 16);
  for (float& w : x.w) w = std::abs(w);
  x.k.view()(0, 0, 4, 2) = std::numeric_limits<float>::quiet_NaN();
  const Scores row = scores(x.q.view(), x, x.keys(), {});
  for (std::size_t s = 0; s < 20; ++s) CHECK(std::isnan(row.data[s]) == (s == 4));
  const Lists all = select(x, 20, {});
  CHECK(std::count(all.data.begin(), all.data.end(), 4) == 0);
  CHECK(all.data.back() == -1);
}

TEST_CASE("dsa: chunks, decode steps, lanes and poison change no bit", "[dsa]") {
  const index_t len = 75, k = 16;
  const Indexer x(8, 1, 14, len, len, 32);
  const Lists whole = select(x, k, causal_options());
  const auto part = [&](index_t first, index_t count, AttentionOptions options) {
    const std::vector<index_t> in_use{first + count};
    options.len_k = in_use;
    options.causal = Causal::bottom_right;
    Lists lists(1, count, k, kUnwritten);
    View<const float, 3> w = x.weights();
    w.data += first;
    w.extent[2] = count;
    IndexKeys keys = x.keys();
    std::vector<float> poisoned = x.k.data;   // keys behind those in use
    std::fill(poisoned.begin() + (first + count) * x.dim, poisoned.end(), canary());
    keys.codes = reinterpret_cast<const std::byte*>(poisoned.data());
    REQUIRE(fovea::dsa_select(only_pos(x.q.view(), first, count), w, keys, lists.view(), options).ok());
    return lists;
  };
  const auto same = [&](index_t first, index_t count, const AttentionOptions& options = {}) {
    return std::equal(whole.data.begin() + first * k, whole.data.begin() + (first + count) * k,
                      part(first, count, options).data.begin());
  };
  CHECK(same(0, 20));
  CHECK(same(20, 31));
  CHECK(same(51, 24));
  for (const index_t i : {0, 7, 40, 74}) CHECK(same(i, 1));   // a token's own key is appended before

  ThreadPerLane pool;
  InOrder serial;
  AttentionOptions three;
  three.executor = fovea::Executor(pool, 3);
  CHECK(same(74, 1, three));
  CHECK(same(0, 75, three));
  three.executor = fovea::Executor(serial, 3);
  CHECK(same(13, 40, three));

  std::vector<std::byte> workspace(1 << 20, std::byte{0xff});
  AttentionOptions own;
  own.workspace = std::span(workspace).subspan(3);
  CHECK(same(0, 75, own));
}

TEST_CASE("dsa: a later token changes no earlier row", "[dsa]") {
  const index_t len = 50, k = 8, changed = 31;
  Indexer x(9, 1, 5, len, len, 24);
  Latent y(10, 1, 3, len, len, 20, 16);
  const Lists before = select(x, k, causal_options());
  const Scores before_scores = scores(x.q.view(), x, x.keys(), causal_options());
  const Result attended = attend_lists(y, y.kv(), before, causal_options());
  for (index_t d = 0; d < x.dim; ++d) x.k.view()(0, 0, changed, d) += 3;
  for (index_t d = 0; d < 20; ++d) y.rows.view()(0, 0, changed, d) -= 2;
  for (index_t h = 0; h < x.heads; ++h) x.q.view()(0, h, changed, 0) += 1;
  const Lists after = select(x, k, causal_options());
  const Result again = attend_lists(y, y.kv(), after, causal_options());
  for (index_t i = 0; i < changed; ++i) {
    CHECK(before.row(0, i) == after.row(0, i));
    for (index_t h = 0; h < 3; ++h) {
      CHECK(std::bit_cast<std::uint32_t>(attended.lse_at(0, h, i)) == std::bit_cast<std::uint32_t>(again.lse_at(0, h, i)));
      CHECK(std::memcmp(&attended.out.view()(0, h, i, 0), &again.out.view()(0, h, i, 0), 16 * sizeof(float)) == 0);
    }
  }
  CHECK(before_scores.row(0, len - 1)[changed] !=
        scores(x.q.view(), x, x.keys(), causal_options()).row(0, len - 1)[changed]);
}

TEST_CASE("dsa: attention over a list against the reference", "[dsa]") {
  const Latent x(11, 2, 6, 4, 90, 36, 32);
  Indexer scorer(12, 2, 3, 4, 90, 16);
  for (const index_t k : {1, 17, 90, 120}) {
    CAPTURE(k);
    const Lists lists = select(scorer, k, causal_options());
    CHECK(distance(attend_lists(x, x.kv(), lists, causal_options()), expect_lists(x, lists, causal_options())) <= 1);
  }
}

TEST_CASE("dsa: every key listed is dense attention", "[dsa]") {
  const Latent x(13, 1, 5, 9, 60, 36, 32);
  const Indexer scorer(14, 1, 3, 9, 60, 16);
  AttentionOptions options = causal_options();
  options.scale = 0.25f;
  const Lists lists = select(scorer, 60, options);
  Result dense = unwritten(x.q.view(), x.values());
  options.lse = dense.lse_view();
  REQUIRE(fovea::attention<fovea::Formats<Format::f32>>(x.q.view(), x.kv(), dense.out.view(), options).ok());
  CHECK(distance(attend_lists(x, x.kv(), lists, causal_options()), dense,
                 expect(x.q.view(), x.rows.view(), x.values(), options)) <= 1);
}

TEST_CASE("dsa: empty lists, and latents that nobody selected", "[dsa]") {
  Latent x(15, 1, 4, 3, 40, 20, 16);
  Lists lists(1, 3, 5, -1);
  const std::vector<std::int32_t> some{3, -1, 17, 18, -1};   // holes anywhere
  std::copy(some.begin(), some.end(), lists.data.begin() + 5);
  for (index_t s = 0; s < 40; ++s) {
    if (std::count(some.begin(), some.end(), static_cast<std::int32_t>(s)) != 0) continue;
    for (index_t d = 0; d < 20; ++d) x.rows.view()(0, 0, s, d) = canary();
  }
  const Result r = attend_lists(x, x.kv(), lists, {});
  for (index_t h = 0; h < 4; ++h) {
    for (const index_t i : {0, 2}) {
      CHECK(r.lse_at(0, h, i) == -kInfinity);
      for (index_t d = 0; d < 16; ++d) CHECK(r.at(0, h, i, d) == 0.f);
    }
    CHECK(std::isfinite(r.lse_at(0, h, 1)));
    for (index_t d = 0; d < 16; ++d) CHECK(std::isfinite(r.at(0, h, 1, d)));
  }
}

TEST_CASE("dsa: latents in bf16 and in the 656-byte rows", "[dsa]") {
  const index_t len_k = 48, dim = 576, dim_v = 512;
  Latent x(16, 1, 3, 2, len_k, dim, dim_v);
  const Indexer scorer(17, 1, 3, 2, len_k, 16);
  const Lists lists = select(scorer, 20, causal_options());
  for (float& q : x.q.data) q *= 0.2f;
  for (const Format format : {Format::bf16, Format::latent_fp8}) {
    CAPTURE(fovea::name_of(format));
    const index_t bytes = fovea::row_bytes(format, dim);
    std::vector<std::byte> stored(static_cast<std::size_t>(len_k * bytes));
    REQUIRE(fovea::quantise(x.rows.view(), format, stored.data(), {len_k * bytes, len_k * bytes, bytes}).ok());
    const fovea::Kv kv = fovea::latent_kv(stored.data(), format, {3, 128, 64, 512, 128}, 1, len_k);
    // The reference gets the numbers that are stored.
    Latent back = x;
    for (index_t s = 0; s < len_k; ++s) {
      const std::byte* const row = stored.data() + s * bytes;
      for (index_t d = 0; d < dim; ++d) {
        float& to = back.rows.view()(0, 0, s, d);
        fovea::bf16 wide;
        if (format == Format::bf16) {
          std::memcpy(&wide, row + 2 * d, 2);
          to = fovea::convert<float>(wide);
        } else if (d >= 512) {
          std::memcpy(&wide, row + 528 + 2 * (d - 512), 2);
          to = fovea::convert<float>(wide);
        } else {
          float scale;
          std::memcpy(&scale, row + 512 + d / 128 * 4, 4);
          to = static_cast<float>(fovea::widen(fovea::fp8_e4m3{static_cast<std::uint8_t>(row[d])})) * scale;
        }
      }
    }
    CHECK(distance(attend_lists(x, kv, lists, causal_options()), expect_lists(back, lists, causal_options())) <= 1);
  }
}

TEST_CASE("dsa: absorbed over all keys is expanded MLA", "[dsa]") {
  const fovea::MlaDims dims{4, 8, 6, 20, 5};
  const index_t len_q = 3, len_k = 25, wide = dims.latent + dims.rope;
  const Values q = random_values(18, 1, dims.heads, len_q, dims.nope + dims.rope),
               rows = random_values(19, 1, 1, len_k, wide);
  Values kv_b = random_values(20, 1, dims.heads, dims.nope + dims.value, dims.latent);
  for (float& w : kv_b.data) w *= 0.25f;
  AttentionOptions options = causal_options();
  options.scale = fovea::mla_scale(dims);
  Values expanded(1, dims.heads, len_q, dims.value);
  REQUIRE(fovea::mla<fovea::Formats<Format::f32>>(q.view(), kv_b.view(), fovea::latent_kv(rows.view(), dims),
                                                  expanded.view(), options, fovea::MlaForm::expanded)
              .ok());

  Latent x(21, 1, dims.heads, len_q, len_k, wide, dims.latent);
  x.rows = rows;
  for (index_t h = 0; h < dims.heads; ++h) {
    for (index_t i = 0; i < len_q; ++i) {
      for (index_t c = 0; c < wide; ++c) {
        double sum = c < dims.latent ? 0 : double{q.view()(0, h, i, dims.nope + c - dims.latent)};
        for (index_t n = 0; c < dims.latent && n < dims.nope; ++n)
          sum += double{q.view()(0, h, i, n)} * double{kv_b.view()(0, h, n, c)};
        x.q.view()(0, h, i, c) = static_cast<float>(sum);
      }
    }
  }
  const Lists lists = select(Indexer(22, 1, 2, len_q, len_k, 8), len_k, options);
  const Result absorbed = attend_lists(x, x.kv(), lists, options);
  for (index_t h = 0; h < dims.heads; ++h) {
    for (index_t i = 0; i < len_q; ++i) {
      for (index_t n = 0; n < dims.value; ++n) {
        double sum = 0;
        for (index_t c = 0; c < dims.latent; ++c)
          sum += double{absorbed.at(0, h, i, c)} * double{kv_b.view()(0, h, dims.nope + n, c)};
        CHECK(std::abs(sum - double{expanded.view()(0, h, i, n)}) <= 1e-5);
      }
    }
  }
}

TEST_CASE("dsa: index rows are normalised, turned at their head by halves, transformed", "[dsa]") {
  const index_t dim = 32, pairs = 8, len = 5;
  const std::vector<double> frequency{1, 0.5, 0.25, 0.125, 0.06, 0.03, 0.015, 0.007};
  std::vector<float> memory(static_cast<std::size_t>(fovea::rope_table_floats(40, 2 * pairs)));
  fovea::RopeTable table;
  REQUIRE(fovea::make_rope_table(table, std::span<const double>(frequency), 1.f, 0, 40, memory).ok());
  const Values x = random_values(23, 2, 3, len, dim);
  Values weight = random_values(24, 1, 1, 1, dim), bias = random_values(25, 1, 1, 1, dim);
  for (const bool norm : {false, true}) {
    for (const bool hadamard : {false, true}) {
      for (const bool interleaved : {false, true}) {
        CAPTURE(norm, hadamard, interleaved);
        fovea::DsaIndexRows how;
        if (norm) how.norm_weight = weight.data, how.norm_bias = bias.data;
        how.rope = &table;
        how.positions.start = 30;
        how.hadamard = hadamard;
        how.layout = interleaved ? fovea::RopeLayout::interleaved : fovea::RopeLayout::half_split;
        Values got(2, 3, len, dim, canary());
        REQUIRE(fovea::dsa_index_rows(x.view(), got.view(), how).ok());
        Values in_place = x;
        REQUIRE(fovea::dsa_index_rows(in_place.view(), in_place.view(), how).ok());
        CHECK(same_bits(in_place.data, got.data));
        double worst = 0;
        for (index_t n = 0; n < 2 * 3 * len; ++n) {
          std::vector<double> row;
          for (index_t d = 0; d < dim; ++d) row.push_back(double{x.data[static_cast<std::size_t>(n * dim + d)]});
          if (norm) fovea::reference::dsa_layer_norm(row, weight.data, bias.data, 1e-6);
          std::vector<double> angle;
          for (const double f : frequency) angle.push_back(f * static_cast<double>(30 + n % len));
          fovea::reference::dsa_rotate(row, angle, interleaved);
          if (hadamard) row = fovea::reference::dsa_hadamard(row);
          double size = 0;
          for (const double r : row) size += r * r;
          for (index_t d = 0; d < dim; ++d) {
            const double error =
                std::abs(double{got.data[static_cast<std::size_t>(n * dim + d)]} - row[static_cast<std::size_t>(d)]);
            // Roundings of the norm's two sums and four steps, of cos, sin and two products, of log2(dim) sums; each is
            // relative to the length of the row.
            worst = std::max(worst, error / (kUnit * static_cast<double>(dim + 4 + 4 + 6) * std::sqrt(size)));
          }
        }
        CHECK(worst <= 1);
      }
    }
  }
}

TEST_CASE("dsa: half-split is interleaved with even channels first", "[dsa]") {
  // 8 rotated dims: pairs (0, 1), (2, 3) ... against (0, 4), (1, 5) ...; dot products agree where both sides are permuted.
  const index_t dim = 12, pairs = 4;
  const std::vector<double> frequency{1, 0.1, 0.01, 0.001};
  std::vector<float> memory(static_cast<std::size_t>(fovea::rope_table_floats(10, 2 * pairs)));
  fovea::RopeTable table;
  REQUIRE(fovea::make_rope_table(table, std::span<const double>(frequency), 1.f, 0, 10, memory).ok());
  const Values x = random_values(26, 1, 1, 10, dim);
  Values permuted = x;
  for (index_t i = 0; i < 10; ++i) {
    for (index_t m = 0; m < pairs; ++m) {
      permuted.view()(0, 0, i, m) = x.view()(0, 0, i, 2 * m);
      permuted.view()(0, 0, i, pairs + m) = x.view()(0, 0, i, 2 * m + 1);
    }
  }
  fovea::DsaIndexRows how;
  how.rope = &table;
  how.hadamard = false;
  Values halves(1, 1, 10, dim), pairs_of_neighbours(1, 1, 10, dim);
  REQUIRE(fovea::dsa_index_rows(permuted.view(), halves.view(), how).ok());
  how.layout = fovea::RopeLayout::interleaved;
  REQUIRE(fovea::dsa_index_rows(x.view(), pairs_of_neighbours.view(), how).ok());
  for (index_t i = 0; i < 10; ++i) {
    for (index_t m = 0; m < pairs; ++m) {
      CHECK(halves.view()(0, 0, i, m) == pairs_of_neighbours.view()(0, 0, i, 2 * m));
      CHECK(halves.view()(0, 0, i, pairs + m) == pairs_of_neighbours.view()(0, 0, i, 2 * m + 1));
    }
    for (index_t d = 2 * pairs; d < dim; ++d) CHECK(halves.view()(0, 0, i, d) == x.view()(0, 0, i, d));
  }
}

TEST_CASE("dsa: refused calls leave the output untouched", "[dsa]") {
  const Indexer x(27, 1, 3, 4, 20, 8);
  Lists lists(1, 4, 5, kUnwritten);
  const auto refused = [&](const IndexQueries& q, View<const float, 3> w, const IndexKeys& keys, View<std::int32_t, 3> to,
                           const AttentionOptions& options, const DsaRule& rule) {
    const Status status = fovea::dsa_select(q, w, keys, to, options, rule);
    INFO(status.message());
    return !status.ok() && std::all_of(lists.data.begin(), lists.data.end(), [](std::int32_t n) { return n == kUnwritten; });
  };
  IndexKeys keys = x.keys();
  keys.dim = 9;
  CHECK(refused(x.q.view(), x.weights(), keys, lists.view(), {}, {}));
  keys = x.keys();
  keys.format = Format::i8_token;
  CHECK(refused(x.q.view(), x.weights(), keys, lists.view(), {}, {}));
  keys = x.keys();
  keys.codes = nullptr;
  CHECK(refused(x.q.view(), x.weights(), keys, lists.view(), {}, {}));
  keys = x.keys();
  keys.page_size = 3;
  CHECK(refused(x.q.view(), x.weights(), keys, lists.view(), {}, {}));
  View<const float, 3> w = x.weights();
  w.extent[1] = 2;
  CHECK(refused(x.q.view(), w, x.keys(), lists.view(), {}, {}));
  View<std::int32_t, 3> to = lists.view();
  to.extent[1] = 3;
  CHECK(refused(x.q.view(), x.weights(), x.keys(), to, {}, {}));
  to = lists.view();
  to.stride[0] = to.stride[1] = 1;
  CHECK(refused(x.q.view(), x.weights(), x.keys(), to, {}, {}));
  const std::vector<index_t> cu{0, 4}, too_long{21};
  const std::vector<std::uint8_t> bytes(80, 1);
  AttentionOptions options;
  options.cu_len_q = cu;
  CHECK(refused(x.q.view(), x.weights(), x.keys(), lists.view(), options, {}));
  options = {};
  options.len_k = too_long;
  CHECK(refused(x.q.view(), x.weights(), x.keys(), lists.view(), options, {}));
  options = {};
  options.keep = {bytes.data(), {1, 1, 4, 20}, {80, 80, 20, 1}};
  CHECK(refused(x.q.view(), x.weights(), x.keys(), lists.view(), options, {}));
  options = {};
  std::vector<std::byte> small(100);
  options.workspace = small;
  CHECK(refused(x.q.view(), x.weights(), x.keys(), lists.view(), options, {}));
  const CodedQueries q(x.q, IndexRounding::plain);
  DsaRule rule;
  rule.round_queries = IndexRounding::plain;
  CHECK(refused(IndexQueries(q.view(), q.scales()), x.weights(), x.keys(), lists.view(), {}, rule));
  to = {reinterpret_cast<std::int32_t*>(const_cast<float*>(x.q.data.data())), {1, 4, 5}, {20, 5, 1}};
  CHECK(refused(x.q.view(), x.weights(), x.keys(), to, {}, {}));

  const Latent y(28, 1, 2, 4, 20, 12, 8);
  Result r = unwritten(y.q.view(), y.values());
  const Lists fine = select(x, 5, {});
  CHECK_FALSE(fovea::dsa_attention<Compiled>(y.q.view(), y.kv(), key_lists(fine), r.out.view(), {}).ok());   // no scale
  CHECK(is_canary(r.out.data[0]));
}

TEST_CASE("dsa: no queries, no keys, nothing wanted", "[dsa]") {
  const Indexer none(29, 1, 3, 0, 20, 8), keyless(30, 1, 3, 2, 0, 8), x(31, 1, 3, 2, 20, 8);
  CHECK(select(none, 4, {}).data.empty());
  CHECK(select(x, 0, {}).data.empty());
  const Lists lists = select(keyless, 3, {});
  CHECK(lists.data == std::vector<std::int32_t>(6, -1));
}
