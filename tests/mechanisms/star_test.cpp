// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/star.hpp"

#include "fovea/reference/star.hpp"
#include "pattern_support.hpp"

namespace {

using namespace test;
using fovea::AttentionPartial;
using fovea::KeyShard;
using fovea::ShardOrder;
using fovea::StarContext;
using F32 = fovea::Formats<fovea::Format::f32>;

PatternCall call_with(const StarContext& c) {
  return [c](Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<float> out,
             const AttentionOptions& options) {
    return fovea::star_context_attention<F32>(q, fovea::dense_kv(k, v), out, c, options);
  };
}
PatternReference reference_with(const StarContext& c) {
  return [c](const Dense& x, const AttentionOptions& options, Tensor<double> out, View<double, 3> lse) {
    fovea::reference::star_context(x.q.view(), x.k.view(), x.v.view(), out, c.block, c.anchor < 0 ? c.block : c.anchor,
                                   options, lse);
  };
}
Sees sees_with(const StarContext& c) {
  return [c](index_t, index_t, index_t pos, index_t key) {
    const index_t anchor = c.anchor < 0 ? c.block : c.anchor;
    return key <= pos && (key < anchor || pos - key <= pos % c.block);
  };
}

// The keys [begin, end) of x as a shard.
fovea::Kv piece(const Dense& x, index_t begin, index_t end) {
  return fovea::dense_kv(only_pos(x.k.view(), begin, end - begin), only_pos(x.v.view(), begin, end - begin));
}
std::vector<KeyShard> shards_of(const Dense& x, const std::vector<index_t>& borders) {
  std::vector<KeyShard> shards;
  for (std::size_t p = 0; p + 1 < borders.size(); ++p) {
    KeyShard shard;
    shard.kv = piece(x, borders[p], borders[p + 1]);
    shards.push_back(shard);
  }
  return shards;
}
Result run_shards(const Dense& x, const std::vector<KeyShard>& shards, AttentionOptions options) {
  Result r = unwritten(x.q.view(), x.v.view());
  options.lse = r.lse_view();
  const fovea::Status status = fovea::sharded_attention<F32>(x.q.view(), shards, r.out.view(), options);
  INFO(status.message());
  REQUIRE(status.ok());
  return r;
}

// What a merge adds to the budget of one pass: an error e of a part's LSE moves at most e / 4 of the weight from it to the
// others, and with it that share of the distance of two values.
Expected with_merges(Expected e, const Dense& x, const AttentionOptions& options, std::size_t parts) {
  double largest = 0, lse_error = 0;
  for (const float v : x.v.data) largest = std::max(largest, std::abs(double{v}));
  const Expected whole = expect(x.q.view(), x.k.view(), x.v.view(), options);
  for (const double error : whole.lse_error) lse_error = std::max(lse_error, error);
  const auto merged = static_cast<double>(parts) * (2 * lse_error + 8 * kUnit) * largest;
  for (double& error : e.out_error) error += merged;
  for (double& error : e.lse_error) error += lse_error + 8 * kUnit;
  return e;
}

}   // namespace

TEST_CASE("star: phase 1 against the reference", "[star]") {
  for (const StarContext& c : {StarContext{16, -1}, StarContext{16, 5}, StarContext{9, 0}, StarContext{100, 7}}) {
    AttentionOptions options;
    options.causal = Causal::bottom_right;
    const std::string what = "block " + std::to_string(c.block) + ", anchor " + std::to_string(c.anchor);
    for (const auto& [len_q, len_k] : {std::pair<index_t, index_t>{53, 53}, {13, 61}, {1, 33}})
      check_pattern(call_with(c), reference_with(c), sees_with(c), Dense(700, 2, 4, 2, len_q, len_k, 8, 12), options, what);
    check_pattern_chunks(call_with(c), sees_with(c), Dense(710, 1, 4, 2, 45, 45, 8, 8), {7, 16, 1, 1, 19, 1});
    check_pattern_future(call_with(c), Dense(711, 1, 4, 2, 45, 45, 8, 8), 20, options);
  }
}

TEST_CASE("star: blocks that several lists share", "[star]") {
  for (const StarContext& c : {StarContext{192, -1}, StarContext{160, 40}}) {
    AttentionOptions options;
    options.causal = Causal::bottom_right;
    check_pattern(call_with(c), reference_with(c), sees_with(c), Dense(715, 1, 2, 1, 300, 430, 8, 8), options,
                  "block " + std::to_string(c.block));
  }
}

TEST_CASE("star: one block is dense", "[star]") {
  const Dense x(720, 1, 4, 2, 37, 37, 8, 8);
  AttentionOptions options;
  options.causal = Causal::bottom_right;
  const Expected dense = expect(x.q.view(), x.k.view(), x.v.view(), options);
  CHECK(distance(run_pattern(call_with({37, -1}), x, options), dense) <= 1);
  CHECK(distance(run_pattern(call_with({64, 3}), x, {}), dense) <= 1);   // causal also where the options are not
}

// The rows of the anchor are the same in every block's sequence, which is why it need not be copied.
TEST_CASE("star: a copy of the anchor has the rows of the anchor", "[star]") {
  constexpr index_t kBlock = 12, kAnchor = 7;
  const Dense x(730, 1, 2, 1, 3 * kBlock, 3 * kBlock, 8, 8);
  AttentionOptions options;
  options.causal = Causal::bottom_right;
  const Result whole = run_pattern(call_with({kBlock, kAnchor}), x, options);
  for (const index_t block : {1, 2}) {
    Dense own(0, 1, 2, 1, kAnchor + kBlock, kAnchor + kBlock, 8, 8);
    const auto copy = [&](const Values& from, Values& to) {
      for (index_t h = 0; h < from.heads; ++h) {
        for (index_t i = 0; i < to.len; ++i) {
          for (index_t d = 0; d < 8; ++d)
            to.view()(0, h, i, d) = from.view()(0, h, i < kAnchor ? i : block * kBlock + i - kAnchor, d);
        }
      }
    };
    copy(x.q, own.q), copy(x.k, own.k), copy(x.v, own.v);
    const Expected want = expect(own.q.view(), own.k.view(), own.v.view(), options);
    double worst = 0;
    for (index_t h = 0; h < 2; ++h) {
      for (index_t i = 0; i < own.q.len; ++i) {
        for (index_t d = 0; d < 8; ++d) {
          const auto n = static_cast<std::size_t>((h * own.q.len + i) * 8 + d);
          const float got = whole.at(0, h, i < kAnchor ? i : block * kBlock + i - kAnchor, d);
          worst = std::max(worst, in_budgets(double{got}, want.out[n], want.out_error[n]));
        }
      }
    }
    CHECK(worst <= 1);
  }
}

TEST_CASE("star: phase 2 is dense attention over all shards", "[star]") {
  for (const index_t len_q : {index_t{1}, index_t{6}}) {
    const Dense x(740, 2, 4, 2, len_q, 300, 8, 12);
    for (const Causal causal : {Causal::bottom_right, Causal::none}) {
      AttentionOptions options;
      options.causal = causal;
      const std::vector<float> sinks{0.5f, -1.f, 2.f, kInfinity};
      for (const bool with_sink : {false, true}) {
        if (with_sink) options.sink = sinks;
        const Expected want = with_merges(expect(x.q.view(), x.k.view(), x.v.view(), options), x, options, 4);
        // Any cut; the last shard holds the queries' own keys (294 .. 299), or all but one of them.
        for (const std::vector<index_t>& borders :
             {std::vector<index_t>{0, 300}, {0, 100, 200, 294, 300}, {0, 1, 150, 299, 300}}) {
          const Result r = run_shards(x, shards_of(x, borders), options);
          CHECK(distance(r, want) <= 1);
          ThreadPerLane threads;
          AttentionOptions lanes = options;
          lanes.executor = {threads, 3};
          CHECK(same_bits(r, run_shards(x, shards_of(x, borders), lanes)));
        }
      }
    }
    AttentionOptions window;
    window.causal = Causal::bottom_right;
    window.window.left = 120;   // the first shard is seen by nobody
    const Expected want = with_merges(expect(x.q.view(), x.k.view(), x.v.view(), window), x, window, 3);
    CHECK(distance(run_shards(x, shards_of(x, {0, 100, 250, 300}), window), want) <= 1);
  }
}

TEST_CASE("star: shards in use, ragged queries", "[star]") {
  const Dense x(750, 2, 2, 2, 3, 40, 8, 8);
  const std::vector<index_t> first{20, 17}, second{9, 0}, total{29, 17}, cu_q{0, 2, 3};
  // The keys of shard p stand at its front, the rest is NaN.
  Dense shard[2] = {x, x};
  for (int p = 0; p < 2; ++p) {
    for (index_t b = 0; b < 2; ++b) {
      for (index_t h = 0; h < 2; ++h) {
        for (index_t j = 0; j < 40; ++j) {
          const auto at = static_cast<std::size_t>(b);
          const index_t from = p == 0 ? j : first[at] + j;
          const bool used = j < (p == 0 ? first : second)[at];
          for (index_t d = 0; d < 8; ++d) {
            shard[p].k.view()(b, h, j, d) = used ? x.k.view()(b, h, from, d) : kNan;
            shard[p].v.view()(b, h, j, d) = used ? x.v.view()(b, h, from, d) : kNan;
          }
        }
      }
    }
  }
  std::vector<KeyShard> shards(2);
  shards[0].kv = piece(shard[0], 0, 40), shards[0].len_k = first;
  shards[1].kv = piece(shard[1], 0, 40), shards[1].len_k = second;
  AttentionOptions options, dense;
  options.causal = dense.causal = Causal::bottom_right;
  dense.len_k = total;
  const Expected want = with_merges(expect(x.q.view(), x.k.view(), x.v.view(), dense), x, dense, 2);
  CHECK(distance(run_shards(x, shards, options), want) <= 1);

  // The same keys, two queries of sequence 0 and one of sequence 1, and a row that belongs to nobody.
  const Values q = random_values(751, 1, 2, 4, 8);
  Values out(1, 2, 4, 8, canary());
  options.cu_len_q = cu_q;
  REQUIRE(fovea::sharded_attention<F32>(q.view(), shards, out.view(), options).ok());
  for (index_t h = 0; h < 2; ++h) {
    for (index_t d = 0; d < 8; ++d) CHECK(is_canary(out.view()(0, h, 3, d)));
  }
  for (index_t b = 0; b < 2; ++b) {
    const index_t begin = cu_q[static_cast<std::size_t>(b)], count = 2 - b, keys = total[static_cast<std::size_t>(b)];
    AttentionOptions one;
    one.causal = Causal::bottom_right;
    const auto own_k = only_pos(only_batch(std::as_const(x.k).view(), b), 0, keys);
    const auto own_v = only_pos(only_batch(std::as_const(x.v).view(), b), 0, keys);
    const Expected row = with_merges(expect(only_pos(q.view(), begin, count), own_k, own_v, one), x, dense, 2);
    for (index_t h = 0; h < 2; ++h) {
      for (index_t i = 0; i < count; ++i) {
        for (index_t d = 0; d < 8; ++d) {
          const auto n = static_cast<std::size_t>((h * count + i) * 8 + d);
          CHECK(in_budgets(double{out.view()(0, h, begin + i, d)}, row.out[n], row.out_error[n]) <= 1);
        }
      }
    }
  }
}

TEST_CASE("star: golden merge", "[star][golden]") {
  // Two keys each: logits 1, 2 with values 10, 20; logits 3, 0 with values 30, 40.
  const float one = 1.f, logits[] = {1.f, 2.f, 3.f, 0.f}, values[] = {10.f, 20.f, 30.f, 40.f}, sink = 2.f;
  float out[2], lse[2], merged = 0, total = 0;
  AttentionOptions options;
  options.scale = 1.f;
  AttentionPartial partials[2];
  const View<float, 3> total_view{&total, {1, 1, 1}, {1, 1, 1}};
  for (index_t p = 0; p < 2; ++p) {
    partials[p] = {fovea::bhsd(out + p, 1, 1, 1, 1), {lse + p, {1, 1, 1}, {1, 1, 1}}};
    const fovea::Kv kv = fovea::dense_kv(fovea::bhsd(logits + 2 * p, 1, 1, 2, 1), fovea::bhsd(values + 2 * p, 1, 1, 2, 1));
    REQUIRE(fovea::attend_partial<F32>(fovea::bhsd(&one, 1, 1, 1, 1), kv, partials[p], options).ok());
  }
  CHECK(out[0] == Catch::Approx(17.310586).margin(5e-6));
  CHECK(lse[0] == Catch::Approx(2.313262).margin(1e-6));
  CHECK(out[1] == Catch::Approx(30.474259).margin(5e-6));
  CHECK(lse[1] == Catch::Approx(3.048587).margin(1e-6));
  REQUIRE(fovea::merge_partials(partials, fovea::bhsd(&merged, 1, 1, 1, 1), total_view).ok());
  CHECK(merged == Catch::Approx(26.208871).margin(5e-6));
  CHECK(total == Catch::Approx(3.440190).margin(1e-6));
  REQUIRE(fovea::merge_partials(partials, fovea::bhsd(&merged, 1, 1, 1, 1), total_view, {&sink, 1}).ok());
  CHECK(merged == Catch::Approx(21.189454).margin(5e-6));
  CHECK(total == Catch::Approx(std::log(std::exp(3.440190) + std::exp(2.))).margin(2e-6));
}

TEST_CASE("star: merges of any number, with empty parts", "[star]") {
  constexpr index_t kParts = 5, kRows = 7, kDim = 70;
  Random random(760);
  std::vector<Values> out;
  std::vector<std::vector<float>> lse;
  std::vector<AttentionPartial> partials;
  for (index_t p = 0; p < kParts; ++p) {
    out.push_back(random_values(static_cast<std::uint64_t>(761 + p), 1, 1, kRows, kDim));
    lse.emplace_back();
    for (index_t i = 0; i < kRows; ++i) lse.back().push_back(random.uniform(-80.f, 80.f));
    // Row 0 is empty everywhere, row 1 in all but the last, row p + 2 in part p: what stands there is not read.
    for (const index_t i : {index_t{0}, index_t{1}, p + 2}) {
      if (i == 1 && p + 1 == kParts) continue;
      lse.back()[static_cast<std::size_t>(i)] = -kInfinity;
      for (index_t d = 0; d < kDim; ++d) out.back().view()(0, 0, i, d) = kNan;
    }
  }
  for (std::size_t p = 0; p < kParts; ++p)
    partials.push_back({out[p].view(), {lse[p].data(), {1, 1, kRows}, {kRows, kRows, 1}}});
  for (const float sink : {-kInfinity, 3.f, kInfinity}) {
    Values merged(1, 1, kRows, kDim, canary());
    std::vector<float> total(kRows, canary());
    REQUIRE(
        fovea::merge_partials(partials, merged.view(), {total.data(), {1, 1, kRows}, {kRows, kRows, 1}}, {&sink, 1}).ok());
    for (index_t i = 0; i < kRows; ++i) {
      const auto at = static_cast<std::size_t>(i);
      std::vector<double> lses, values, want(kDim);
      double largest = 0;
      for (std::size_t p = 0; p < kParts; ++p) {
        if (lse[p][at] == -kInfinity) continue;
        lses.push_back(double{lse[p][at]});
        for (index_t d = 0; d < kDim; ++d) {
          values.push_back(double{out[p].view()(0, 0, i, d)});
          largest = std::max(largest, std::abs(values.back()));
        }
      }
      if (sink == kInfinity) {   // takes everything
        CHECK(total[at] == kInfinity);
        for (index_t d = 0; d < kDim; ++d) CHECK(merged.view()(0, 0, i, d) == 0.f);
        continue;
      }
      const double want_lse = fovea::reference::merge_row(lses, values, double{sink}, want);
      CHECK(in_budgets(double{total[at]}, want_lse, kUnit * std::max(1., std::abs(want_lse))) <= 1);
      // A share is rounded once, and each of the sums of shares and values once more.
      for (std::size_t d = 0; d < kDim; ++d)
        CHECK(std::abs(double{merged.data[at * kDim + d]} - want[d]) <= (1 + kParts) * kUnit * largest);
    }
  }
}

TEST_CASE("star: parts in any order, and the pairwise merge", "[star]") {
  const Dense x(770, 1, 2, 1, 3, 90, 8, 8);
  const Expected want = with_merges(expect(x.q.view(), x.k.view(), x.v.view(), {}), x, {}, 3);
  std::vector<Result> parts;
  for (const auto& [begin, end] : {std::pair<index_t, index_t>{40, 90}, {0, 10}, {10, 40}}) {
    Result r = unwritten(x.q.view(), x.v.view());
    REQUIRE(fovea::attend_partial<F32>(x.q.view(), piece(x, begin, end), {r.out.view(), r.lse_view()}).ok());
    parts.push_back(r);
  }
  std::vector<AttentionPartial> partials;
  for (Result& part : parts) partials.push_back({part.out.view(), part.lse_view()});
  Result all = unwritten(x.q.view(), x.v.view());
  ThreadPerLane threads;
  REQUIRE(fovea::merge_partials(partials, all.out.view(), all.lse_view(), {}, {threads, 2}).ok());
  CHECK(distance(all, want) <= 1);
  REQUIRE(fovea::merge(parts[0].out.view(), parts[0].lse_view(), std::as_const(parts[1]).out.view(),
                       std::as_const(parts[1]).lse_view())
              .ok());
  REQUIRE(fovea::merge(parts[0].out.view(), parts[0].lse_view(), std::as_const(parts[2]).out.view(),
                       std::as_const(parts[2]).lse_view())
              .ok());
  CHECK(distance(parts[0], want) <= 1);
}

// A causal ring in one process: every rank attends step by step to the keys that reach it. With zero queries a row's LSE is
// the logarithm of the number of keys it has seen.
TEST_CASE("star: rings compute every causal pair once", "[star][golden]") {
  struct Ring {
    ShardOrder order;
    index_t ranks, len;
    std::vector<index_t> pairs;
  };
  const Ring rings[] = {{ShardOrder::contiguous, 4, 3, {6, 15, 24, 33}},
                        {ShardOrder::zigzag, 4, 6, {75, 75, 75, 75}},
                        {ShardOrder::stripe, 4, 3, {15, 18, 21, 24}},
                        {ShardOrder::zigzag, 3, 8, {100, 100, 100}},
                        {ShardOrder::stripe, 1, 5, {15}}};
  for (const Ring& ring : rings) {
    const index_t len = ring.ranks * ring.len;
    const Dense x(780, 1, 2, 1, len, len, 8, 8);
    AttentionOptions causal;
    causal.causal = Causal::bottom_right;
    const Expected want =
        with_merges(expect(x.q.view(), x.k.view(), x.v.view(), causal), x, causal, static_cast<std::size_t>(ring.ranks));
    const auto local = [&](const Values& from, index_t rank) {
      Values to(1, from.heads, ring.len, from.dim);
      for (index_t h = 0; h < from.heads; ++h) {
        for (index_t i = 0; i < ring.len; ++i) {
          for (index_t d = 0; d < from.dim; ++d)
            to.view()(0, h, i, d) = from.view()(0, h, fovea::shard_position(ring.order, ring.ranks, ring.len, rank, i), d);
        }
      }
      return to;
    };
    const auto rank_rows = [&](index_t rank, const Values& q) {
      Result sum = unwritten(q.view(), local(x.v, rank).view());
      std::fill(sum.lse.begin(), sum.lse.end(), -kInfinity);
      for (index_t s = 0; s < ring.ranks; ++s) {
        const fovea::RingStep step = fovea::ring_step(ring.order, ring.ranks, ring.len, rank, s);
        const index_t rows = step.q_end - step.q_begin, keys = step.k_end - step.k_begin;
        if (rows == 0 || keys == 0) continue;
        const Values k = local(x.k, step.source), v = local(x.v, step.source);
        const fovea::Kv kv = fovea::dense_kv(only_pos(k.view(), step.k_begin, keys), only_pos(v.view(), step.k_begin, keys));
        Values out(1, 2, rows, 8, canary());
        Result part{out, std::vector<float>(static_cast<std::size_t>(2 * rows))};
        AttentionOptions options;
        options.causal = step.causal ? Causal::top_left : Causal::none;
        REQUIRE(fovea::attend_partial<F32>(only_pos(q.view(), step.q_begin, rows), kv, {part.out.view(), part.lse_view()},
                                           options)
                    .ok());
        View<float, 3> sum_lse = sum.lse_view();
        sum_lse.data += step.q_begin;
        sum_lse.extent[2] = rows;
        REQUIRE(fovea::merge(only_pos(sum.out.view(), step.q_begin, rows), sum_lse, std::as_const(part).out.view(),
                             std::as_const(part).lse_view())
                    .ok());
      }
      return sum;
    };
    for (index_t rank = 0; rank < ring.ranks; ++rank) {
      const Result r = rank_rows(rank, local(x.q, rank));
      double worst = 0;
      for (index_t h = 0; h < 2; ++h) {
        for (index_t i = 0; i < ring.len; ++i) {
          for (index_t d = 0; d < 8; ++d) {
            const index_t t = fovea::shard_position(ring.order, ring.ranks, ring.len, rank, i);
            const auto n = static_cast<std::size_t>((h * len + t) * 8 + d);
            worst = std::max(worst, in_budgets(double{r.at(0, h, i, d)}, want.out[n], want.out_error[n]));
          }
        }
      }
      CHECK(worst <= 1);
      double pairs = 0;
      const Result counted = rank_rows(rank, Values(1, 2, ring.len, 8));
      for (index_t i = 0; i < ring.len; ++i) {
        const double keys = std::exp(double{counted.lse_at(0, 0, i)});
        const index_t t = fovea::shard_position(ring.order, ring.ranks, ring.len, rank, i);
        CHECK(keys == Catch::Approx(static_cast<double>(t + 1)).epsilon(1e-5));
        pairs += std::round(keys);
      }
      CHECK(static_cast<index_t>(pairs) == ring.pairs[static_cast<std::size_t>(rank)]);
    }
  }
  // Zigzag's chunks with four ranks.
  for (index_t rank = 0; rank < 4; ++rank) {
    CHECK(fovea::shard_position(ShardOrder::zigzag, 4, 2, rank, 0) == rank);
    CHECK(fovea::shard_position(ShardOrder::zigzag, 4, 2, rank, 1) == 7 - rank);
  }
}

TEST_CASE("star: refusals write nothing", "[star][errors]") {
  const Dense x(790, 1, 2, 2, 5, 8, 8, 6);
  Result r = unwritten(x.q.view(), x.v.view());
  AttentionOptions lse;
  lse.lse = r.lse_view();
  check_refused(r, "block 0", [&] {
    return fovea::star_context_attention<F32>(x.q.view(), piece(x, 0, 8), r.out.view(), {0, -1}, lse);
  });
  check_refused(r, "the anchor of 5 tokens", [&] {
    return fovea::star_context_attention<F32>(x.q.view(), piece(x, 0, 8), r.out.view(), {4, 5}, lse);
  });
  const auto sharded = [&](const std::vector<KeyShard>& shards, AttentionOptions options = {}) {
    options.lse = r.lse_view();
    return [&r, &x, shards, options] { return fovea::sharded_attention<F32>(x.q.view(), shards, r.out.view(), options); };
  };
  check_refused(r, "at least one shard", sharded({}));
  std::vector<KeyShard> shards = shards_of(x, {0, 4, 8});
  const std::vector<index_t> lengths{5};
  AttentionOptions len_k;
  len_k.len_k = lengths;
  check_refused(r, "shards carry the lengths", sharded(shards, len_k));
  shards[1].len_k = lengths;
  check_refused(r, "len_k[0] = 5", sharded(shards));
  shards[1].len_k = {};
  shards[1].kv.dim_v = 5;
  check_refused(r, "shard 1 has 2 kv heads and dims 8/5", sharded(shards));
  AttentionOptions capped;
  capped.softcap = 2.f;
  check_refused(r, "softcap", sharded(shards_of(x, {0, 4, 8}), capped));
  const float sink[2] = {1.f, 1.f};
  AttentionOptions with_sink;
  with_sink.sink = sink;
  check_refused(r, "a sink (2 logits)", [&] {
    return fovea::attend_partial<F32>(x.q.view(), piece(x, 0, 8), {r.out.view(), r.lse_view()}, with_sink);
  });
  check_refused(r, "needs an lse", [&] {
    return fovea::attend_partial<F32>(x.q.view(), piece(x, 0, 8), {r.out.view(), {}});
  });
  Result part = r;
  const AttentionPartial partial{part.out.view(), part.lse_view()};
  check_refused(r, "at least one partial", [&] { return fovea::merge_partials({}, r.out.view(), r.lse_view()); });
  check_refused(r, "sink has 1 entries", [&] {
    return fovea::merge_partials({&partial, 1}, r.out.view(), r.lse_view(), {sink, 1});
  });
  check_refused(r, "overlaps", [&] { return fovea::merge_partials({&partial, 1}, part.out.view(), r.lse_view()); });
  AttentionPartial narrow = partial;
  narrow.lse.extent[2] = 4;
  check_refused(r, "a partial lse is [1, 2, 4]", [&] {
    return fovea::merge_partials({&narrow, 1}, r.out.view(), r.lse_view());
  });
}
