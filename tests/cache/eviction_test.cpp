// SPDX-License-Identifier: Apache-2.0
#include "fovea/cache/eviction.hpp"

#include <algorithm>

#include "cache_rows.hpp"
#include "fovea/cache/turned_sinks.hpp"
#include "fovea/call/column_sums.hpp"
#include "fovea/reference/h2o.hpp"
#include "fovea/reference/snapkv.hpp"
#include "support/dense.hpp"

using namespace test;
using fovea::CacheRows;
using fovea::Causal;
using fovea::ContiguousCache;
using fovea::Format;
using fovea::KeptTokens;
using fovea::RingCache;
using fovea::SnapKvOptions;
using fovea::SnapKvPool;
using fovea::Status;

namespace {

constexpr double kTolerance = 1e-5;   // of attention over values of about 1 in fp32
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
using F32 = fovea::Formats<Format::f32>;
using Rows = std::vector<std::vector<double>>;
using Lists = std::vector<std::vector<std::int32_t>>;   // [head][row]

View<const std::int32_t, 2> view_of(const std::vector<std::int32_t>& flat, index_t heads) {
  const index_t count = static_cast<index_t>(flat.size()) / heads;
  return {flat.data(), {heads, count}, {count, 1}};
}
std::vector<std::int32_t> flat(const Lists& lists) {
  std::vector<std::int32_t> all;
  for (const auto& list : lists) all.insert(all.end(), list.begin(), list.end());
  return all;
}
std::vector<std::uint64_t> ids(std::uint64_t first, index_t count) {
  std::vector<std::uint64_t> all;
  for (index_t n = 0; n < count; ++n) all.push_back(first + static_cast<std::uint64_t>(n));
  return all;
}

// Whether a head's rows are these tokens' rows of head `source`.
template <class Cache>
bool head_holds(const Cache& cache, index_t sequence, index_t kv_head, index_t source,
                const std::vector<std::uint64_t>& tokens) {
  bool same = cache.len(sequence) == static_cast<index_t>(tokens.size());
  for (std::size_t n = 0; same && n < tokens.size(); ++n) {
    const auto k = row_of_token(tokens[n], source, true, k_bytes(cache.rows()));
    const auto v = row_of_token(tokens[n], source, false, v_bytes(cache.rows()));
    same = std::memcmp(cache.k_row(sequence, kv_head, static_cast<index_t>(n)), k.data(), k.size()) == 0;
    if (!cache.rows().v_in_k)
      same = same && std::memcmp(cache.v_row(sequence, kv_head, static_cast<index_t>(n)), v.data(), v.size()) == 0;
  }
  return same;
}

Rows rows_of(const Values& x, index_t b, index_t h) {
  Rows rows;
  for (index_t t = 0; t < x.len; ++t) {
    const float* const at = &x.view()(b, h, t, 0);
    rows.emplace_back(at, at + x.dim);
  }
  return rows;
}

}   // namespace

TEST_CASE("eviction: rows stay in place, head by head", "[eviction]") {
  for (const bool v_in_k : {false, true}) {
    for (const fovea::KvLayout layout : {fovea::KvLayout::head_major, fovea::KvLayout::token_major}) {
      CacheRows rows{2, 8, 6, Format::bf16, v_in_k ? Format::bf16 : Format::i4_g32, v_in_k};
      ContiguousCache cache;
      REQUIRE(cache.create({rows, 2, 12, layout, true}).ok());
      REQUIRE(cache.append(0, 5, WriteTokens{ids(100, 5), rows}).ok());
      REQUIRE(cache.append(1, 9, WriteTokens{ids(1, 9), rows}).ok());
      const auto keep = flat({{0, 1, 4, 8}, {2, 3, 5, 6}});
      REQUIRE(fovea::keep_rows(cache, 1, view_of(keep, 2)).ok());
      CHECK(head_holds(cache, 1, 0, 0, {1, 2, 5, 9}));
      CHECK(head_holds(cache, 1, 1, 1, {3, 4, 6, 7}));
      CHECK(head_holds(cache, 0, 1, 1, ids(100, 5)));
      CHECK(cache.check().ok());   // what was left behind is poison again
      REQUIRE(fovea::keep_rows(cache, 1, view_of({}, 2)).ok());
      CHECK(cache.len(1) == 0);
      const auto refused = [&](const std::vector<std::int32_t>& list) {
        const Status status = fovea::keep_rows(cache, 0, view_of(list, 2));
        CHECK(!status.ok());
        CHECK(head_holds(cache, 0, 0, 0, ids(100, 5)));
      };
      refused({0, 0, 1, 2});
      refused({1, 0, 1, 2});
      refused({0, 5, 1, 2});
      refused({-1, 1, 1, 2});
      CHECK(!fovea::keep_rows(cache, 2, view_of(keep, 2)).ok());
    }
  }
}

TEST_CASE("eviction: rows go from a ring that has turned, and to more heads", "[eviction]") {
  const CacheRows rows{2, 8, 6, Format::bf16, Format::bf16};
  RingCache ring;
  REQUIRE(ring.create({rows, 1, 2, 6, 3, fovea::KvLayout::token_major, true}).ok());
  const std::vector<std::uint64_t> tokens = ids(1, 15);   // 1, 2 and the last 6
  REQUIRE(ring.append(0, 15, WriteTokens{tokens, rows}).ok());
  CacheRows wide = rows;
  wide.kv_heads = 4;
  ContiguousCache cache;
  REQUIRE(cache.create({wide, 2, 5, fovea::KvLayout::head_major, true}).ok());
  REQUIRE(cache.append(1, 2, WriteTokens{ids(50, 2), wide}).ok());
  const auto keep = flat({{0, 2, 7}, {1, 2, 3}, {5, 6, 7}, {0, 1, 2}});
  REQUIRE(fovea::keep_rows(ring, 0, view_of(keep, 4), cache, 1).ok());
  CHECK(head_holds(cache, 1, 0, 0, {1, 10, 15}));
  CHECK(head_holds(cache, 1, 1, 0, {2, 10, 11}));
  CHECK(head_holds(cache, 1, 2, 1, {13, 14, 15}));
  CHECK(head_holds(cache, 1, 3, 1, {1, 2, 10}));
  CHECK(cache.check().ok());
  // Nothing happens where it does not fit.
  const auto six = flat({{0, 1, 2, 3, 4, 5}, {0, 1, 2, 3, 4, 5}, {0, 1, 2, 3, 4, 5}, {0, 1, 2, 3, 4, 5}});
  CHECK(fovea::keep_rows(ring, 0, view_of(six, 4), cache, 1).code() == fovea::Code::out_of_pages);
  CHECK(head_holds(cache, 1, 0, 0, {1, 10, 15}));
  CacheRows other = wide;
  other.dim_v = 5;
  ContiguousCache wrong;
  REQUIRE(wrong.create({other, 1, 5}).ok());
  CHECK(!fovea::keep_rows(ring, 0, view_of(keep, 4), wrong, 0).ok());
  CHECK(!fovea::keep_rows(cache, 1, view_of(keep, 4), cache, 0).ok());
}

TEST_CASE("eviction: H2O chooses by the total order", "[eviction]") {
  KeptTokens kept;
  REQUIRE(kept.create({1, 2, 10}).ok());
  REQUIRE(kept.append(0, 7).ok());
  const std::vector<float> weights{1, 3, 3, 0, 3, 9, 9,   // two q heads of kv head 0
                                   0, 0, 0, 0, 0, 0, 0,   //
                                   0, 1, 0, 1, 0, 1, 0,   // of kv head 1
                                   1, 0, 0, 0, 1, 0, 0};
  REQUIRE(kept.add(0, {weights.data(), {4, 7}, {7, 1}}).ok());
  View<const std::int32_t, 2> keep;
  REQUIRE(kept.choose_heavy(0, 2, 2, keep).ok());
  const auto list = [&](index_t h) {
    std::vector<std::int32_t> all;
    for (index_t n = 0; n < keep.extent[1]; ++n) all.push_back(keep(h, n));
    return all;
  };
  CHECK(list(0) == std::vector<std::int32_t>{1, 2, 5, 6});
  CHECK(list(1) == std::vector<std::int32_t>{0, 1, 5, 6});
  REQUIRE(kept.keep(0, keep).ok());
  CHECK(kept.tokens(0, 0)[1] == 2);
  CHECK(kept.scores(0, 0)[2] == 9.f);
  REQUIRE(kept.append(0, 1).ok());
  CHECK(kept.seen(0) == 8);
  CHECK(kept.tokens(0, 1)[4] == 7);
  CHECK(kept.scores(0, 1)[4] == 0.f);
  // Fewer rows than the budget: all.
  REQUIRE(kept.choose_heavy(0, 30, 30, keep).ok());
  CHECK(list(0) == std::vector<std::int32_t>{0, 1, 2, 3, 4});
  REQUIRE(kept.choose_heavy(0, 0, 1, keep).ok());
  CHECK(list(1) == std::vector<std::int32_t>{4});
  REQUIRE(kept.choose_heavy(0, 0, 0, keep).ok());
  CHECK(keep.extent[1] == 0);
  // A sum that is no number is noticed, not kept.
  const std::vector<float> bad(10, kNan);
  REQUIRE(kept.add(0, {bad.data(), {2, 5}, {5, 1}}).ok());
  CHECK(!kept.choose_heavy(0, 2, 2, keep).ok());
  for (const index_t recent : {0, 2, 5}) {   // where every row stays, its sum does not matter
    REQUIRE(kept.choose_heavy(0, 5, recent, keep).ok());
    CHECK(list(1) == std::vector<std::int32_t>{0, 1, 2, 3, 4});
  }
  CHECK(!kept.append(0, 6).ok());
  CHECK(!kept.add(0, {weights.data(), {3, 7}, {7, 1}}).ok());
}

TEST_CASE("eviction: H2O step by step against the reference", "[eviction]") {
  constexpr index_t kLen = 36, kPrompt = 14, kHeavy = 4, kRecent = 3, kDim = 8;
  const Dense x(20, 1, 4, 2, kLen, kLen, kDim, kDim);
  ContiguousCache cache;
  KeptTokens kept;
  const CacheRows rows{2, kDim, kDim, Format::f32, Format::f32};
  REQUIRE(cache.create({rows, 1, kPrompt + 2, fovea::KvLayout::head_major, true}).ok());
  REQUIRE(kept.create({1, 2, kPrompt + 2}).ok());
  std::vector<fovea::reference::H2oRun> want;
  for (index_t h = 0; h < 2; ++h)
    want.push_back(fovea::reference::h2o({rows_of(x.q, 0, 2 * h), rows_of(x.q, 0, 2 * h + 1)}, rows_of(x.k, 0, h),
                                         rows_of(x.v, 0, h), kPrompt, kHeavy, kRecent, 1 / std::sqrt(double{kDim})));
  double off = 0;
  bool same = true;
  for (index_t t = 0; t < kLen;) {
    const index_t count = t == 0 ? kPrompt : 1;
    REQUIRE(fovea::append_tokens(cache, 0, only_pos(x.k.view(), t, count), only_pos(x.v.view(), t, count)).ok());
    REQUIRE(kept.append(0, count).ok());
    AttentionOptions options;
    options.causal = Causal::bottom_right;
    options.len_k = cache.lengths();
    const Tensor<const float> q = only_pos(x.q.view(), t, count);
    Values out(1, 4, count, kDim);
    REQUIRE(fovea::attention<F32>(q, cache.batch().kv, out.view(), options).ok());
    REQUIRE(fovea::column_sums<F32>(q, cache.batch().kv, {kept.running_sums(), {}, true}, options).ok());
    REQUIRE(fovea::evict_light_rows(cache, kept, 0, kHeavy, kRecent).ok());
    REQUIRE(cache.check().ok());
    for (index_t h = 0; h < 4; ++h) {
      for (index_t i = 0; i < count; ++i) {
        const auto& row =
            want[static_cast<std::size_t>(h / 2)].out[static_cast<std::size_t>(h % 2)][static_cast<std::size_t>(t + i)];
        for (index_t d = 0; d < kDim; ++d)
          off = std::max(off, std::abs(double{out.view()(0, h, i, d)} - row[static_cast<std::size_t>(d)]));
      }
    }
    t += count;
    CHECK(cache.len(0) == kHeavy + kRecent);
    for (index_t h = 0; h < 2; ++h) {
      const auto& stays = want[static_cast<std::size_t>(h)].kept[static_cast<std::size_t>(t - 1)];
      const auto tokens = kept.tokens(0, h);
      same = same && std::equal(stays.begin(), stays.end(), tokens.begin(), tokens.end());
      for (std::size_t n = 0; n < tokens.size(); ++n)   // the cache holds what the list says
        same =
            same && std::memcmp(cache.k_row(0, h, static_cast<index_t>(n)), &x.k.view()(0, h, tokens[n], 0), kDim * 4) == 0;
    }
  }
  CHECK(off <= kTolerance);
  CHECK(same);
  CHECK(kept.seen(0) == kLen);
  for (index_t h = 0; h < 2; ++h) {
    for (std::size_t n = 0; n < kHeavy + kRecent; ++n)
      CHECK(std::abs(double{kept.scores(0, h)[n]} - want[static_cast<std::size_t>(h)].scores[n]) <= kTolerance * kLen);
  }
}

TEST_CASE("eviction: H2O with room for all is dense, and every query gives one", "[eviction]") {
  const Dense x(30, 1, 2, 2, 12, 12, 8, 8);
  ContiguousCache cache;
  KeptTokens kept;
  REQUIRE(cache.create({{2, 8, 8, Format::f32, Format::f32}, 1, 12}).ok());
  REQUIRE(kept.create({1, 2, 12}).ok());
  REQUIRE(fovea::append_tokens(cache, 0, x.k.view(), x.v.view()).ok());
  REQUIRE(kept.append(0, 12).ok());
  AttentionOptions options;
  options.causal = Causal::bottom_right;
  options.len_k = cache.lengths();
  REQUIRE(fovea::column_sums<F32>(x.q.view(), cache.batch().kv, {kept.running_sums(), {}, true}, options).ok());
  REQUIRE(fovea::evict_light_rows(cache, kept, 0, 8, 4).ok());
  CHECK(cache.len(0) == 12);
  for (index_t h = 0; h < 2; ++h) {
    double sum = 0;
    for (const float score : kept.scores(0, h)) sum += double{score};
    CHECK(std::abs(sum - 12) <= 1e-5);
  }
  const std::vector<float> bad(24, kNan);
  REQUIRE(kept.add(0, {bad.data(), {2, 12}, {12, 1}}).ok());
  REQUIRE(fovea::evict_light_rows(cache, kept, 0, 8, 4).ok());
  CHECK(cache.len(0) == 12);
  KeptTokens other;
  REQUIRE(other.create({1, 1, 12}).ok());
  CHECK(!fovea::evict_light_rows(cache, other, 0, 8, 2).ok());
  CHECK(cache.len(0) == 12);
}

TEST_CASE("eviction: SnapKV's choice", "[eviction]") {
  Random random(40);
  for (const SnapKvPool pool : {SnapKvPool::average, SnapKvPool::maximum}) {
    for (const index_t len : {3, 10, 11, 60, 200}) {
      for (const index_t kernel : {1, 3, 5}) {
        SnapKvOptions options;
        options.window = 4;
        options.capacity = 10;
        options.kernel = kernel;
        options.pool = pool;
        // Integers divided by 1 or a power of 2 are exact; 3 and 5 only have to keep their order.
        std::vector<float> votes(static_cast<std::size_t>(4 * len));
        for (float& vote : votes) vote = static_cast<float>(random.below(7));
        const index_t count = fovea::snapkv_rows(len, options);
        for (index_t h = 0; h < 4; ++h) {   // the window's own columns are not read
          for (index_t n = std::max<index_t>(len - 4, 0); n < len; ++n) votes[static_cast<std::size_t>(h * len + n)] = kNan;
        }
        for (const index_t lists : {4, 2}) {
          std::vector<std::int32_t> keep(static_cast<std::size_t>(lists * count), -7);
          PoisonedBytes memory(fovea::snapkv_bytes(len, options), 4);
          const Status status = fovea::snapkv_keep({votes.data(), {4, len}, {len, 1}}, len,
                                                   {keep.data(), {lists, count}, {count, 1}}, memory.bytes(), options);
          INFO(status.message());
          REQUIRE(status.ok());
          CHECK(memory.guards_intact());
          for (index_t h = 0; h < lists; ++h) {
            std::vector<double> mean(static_cast<std::size_t>(len), 0.);
            for (index_t n = 0; n < len; ++n) {
              for (index_t g = 0; g < 4 / lists; ++g)
                mean[static_cast<std::size_t>(n)] +=
                    double{votes[static_cast<std::size_t>((h * (4 / lists) + g) * len + n)]};
              mean[static_cast<std::size_t>(n)] /= static_cast<double>(4 / lists);
            }
            const auto want = fovea::reference::snapkv_keep(mean, 4, 10, kernel, pool == SnapKvPool::average);
            CHECK(std::equal(want.begin(), want.end(), keep.begin() + h * count, keep.begin() + (h + 1) * count));
          }
        }
      }
    }
  }
}

TEST_CASE("eviction: SnapKV keeps all rows that fit, whatever their votes", "[eviction]") {
  SnapKvOptions options;
  options.window = 4;
  options.capacity = 10;
  const std::vector<float> votes(10, kNan);
  for (const SnapKvPool pool : {SnapKvPool::average, SnapKvPool::maximum}) {
    options.pool = pool;
    for (const index_t len : {5, 9, 10}) {
      std::vector<std::int32_t> keep(static_cast<std::size_t>(len), -7);
      std::vector<std::byte> memory(fovea::snapkv_bytes(len, options));
      REQUIRE(fovea::snapkv_keep({votes.data(), {1, len}, {len, 1}}, len, {keep.data(), {1, len}, {len, 1}}, memory, options).ok());
      for (std::size_t n = 0; n < keep.size(); ++n) CHECK(keep[n] == static_cast<std::int32_t>(n));
    }
  }
}

TEST_CASE("eviction: SnapKV behind a prompt", "[eviction]") {
  constexpr index_t kLen = 50, kDim = 8;
  const Dense x(50, 1, 4, 2, kLen, kLen, kDim, kDim);
  SnapKvOptions options;
  options.window = 6;
  options.capacity = 16;
  ContiguousCache cache, per_query_head;
  REQUIRE(cache.create({{2, kDim, kDim, Format::f32, Format::f32}, 1, kLen}).ok());
  REQUIRE(per_query_head.create({{4, kDim, kDim, Format::f32, Format::f32}, 1, 20}).ok());
  REQUIRE(fovea::append_tokens(cache, 0, x.k.view(), x.v.view()).ok());
  AttentionOptions causal;
  causal.causal = Causal::bottom_right;
  causal.len_k = cache.lengths();
  std::vector<float> votes(4 * kLen, kNan);
  REQUIRE(fovea::column_sums<F32>(fovea::last_queries(x.q.view(), options.window), cache.batch().kv,
                                  {{votes.data(), {1, 4, kLen}, {4 * kLen, kLen, 1}}, {}, false}, causal)
              .ok());
  const View<const float, 2> view{votes.data(), {4, kLen}, {kLen, 1}};
  std::vector<std::byte> memory(fovea::snapkv_bytes(kLen, options));
  std::vector<std::int32_t> own(4 * 16), shared(2 * 16);
  REQUIRE(fovea::snapkv_keep(view, kLen, {own.data(), {4, 16}, {16, 1}}, memory, options).ok());
  REQUIRE(fovea::snapkv_keep(view, kLen, {shared.data(), {2, 16}, {16, 1}}, memory, options).ok());
  std::vector<std::vector<double>> want_votes;
  for (index_t h = 0; h < 4; ++h) {
    want_votes.push_back(
        fovea::reference::snapkv_votes(rows_of(x.q, 0, h), rows_of(x.k, 0, h / 2), 6, 1 / std::sqrt(double{kDim})));
    const auto want = fovea::reference::snapkv_keep(want_votes.back(), 6, 16, 5, true);
    CHECK(std::equal(want.begin(), want.end(), own.begin() + h * 16, own.begin() + (h + 1) * 16));
  }
  for (std::size_t h = 0; h < 2; ++h) {
    std::vector<double> mean(want_votes[0].size());
    for (std::size_t n = 0; n < mean.size(); ++n) mean[n] = (want_votes[2 * h][n] + want_votes[2 * h + 1][n]) / 2;
    const auto want = fovea::reference::snapkv_keep(mean, 6, 16, 5, true);
    const auto first = shared.begin() + static_cast<index_t>(h) * 16;
    CHECK(std::equal(want.begin(), want.end(), first, first + 16));
  }

  // As published: a head of the cache per query head; then decoding is dense attention over what is left.
  REQUIRE(fovea::keep_rows(cache, 0, view_of(own, 4), per_query_head, 0).ok());
  const Values q = random_values(60, 1, 4, 1, kDim);
  Values out(1, 4, 1, kDim);
  AttentionOptions decode;
  decode.len_k = per_query_head.lengths();
  REQUIRE(fovea::attention<F32>(q.view(), per_query_head.batch().kv, out.view(), decode).ok());
  std::vector<std::uint8_t> keep(4 * kLen, 0);
  for (std::size_t h = 0; h < 4; ++h) {
    for (std::size_t n = 0; n < 16; ++n) keep[h * kLen + static_cast<std::size_t>(own[h * 16 + n])] = 1;
  }
  AttentionOptions masked;
  masked.keep = {keep.data(), {1, 4, 1, kLen}, {4 * kLen, kLen, kLen, 1}};
  const Result want = attend(q.view(), x.k.view(), x.v.view(), masked);
  double off = 0;
  for (std::size_t n = 0; n < out.data.size(); ++n)
    off = std::max(off, std::abs(double{out.data[n]} - double{want.out.data[n]}));
  CHECK(off <= kTolerance);

  // Refusals.
  options.kernel = 4;
  CHECK(!fovea::snapkv_keep(view, kLen, {own.data(), {4, 16}, {16, 1}}, memory, options).ok());
  options.kernel = 5;
  options.window = 17;
  CHECK(!fovea::snapkv_keep(view, kLen, {own.data(), {4, 16}, {16, 1}}, memory, options).ok());
  options.window = 6;
  CHECK(!fovea::snapkv_keep(view, kLen, {own.data(), {3, 16}, {16, 1}}, memory, options).ok());
  CHECK(fovea::snapkv_keep(view, kLen, {own.data(), {4, 16}, {16, 1}}, std::span(memory).first(64), options).code() ==
        fovea::Code::workspace_too_small);
}

TEST_CASE("eviction: PyramidKV's budgets", "[eviction][golden]") {
  CHECK(fovea::pyramid_rows(0, 32, 32768, 2048, 32) == 3932 + 32);
  CHECK(fovea::pyramid_rows(1, 32, 32768, 2048, 32) == 3932 - 123 + 32);
  CHECK(fovea::pyramid_rows(31, 32, 32768, 2048, 32) == 119 + 32);
  index_t sum = 0;
  for (index_t layer = 0; layer < 32; ++layer) sum += fovea::pyramid_rows(layer, 32, 32768, 2048, 32) - 32;
  CHECK(std::abs(sum - 32 * 2016) <= 32 * 32);   // steps are whole rows
  CHECK(fovea::pyramid_rows(5, 32, 2000, 2048, 32) == 2000);
  CHECK(fovea::pyramid_rows(5, 32, 4031, 2048, 32) == 2048);
  // The first layer cannot keep more than there is, the last one then gets the rest.
  CHECK(fovea::pyramid_rows(0, 32, 4063, 2048, 32) == 3964);
  CHECK(fovea::pyramid_rows(0, 2, 4032, 2048, 132) == 2 * 1916 - 95 + 132);
  CHECK(fovea::pyramid_rows(0, 2, 3850, 2048, 132) == 3850);
  CHECK(fovea::pyramid_rows(1, 2, 3850, 2048, 132) == 2 * 1916 - 3718 + 132);
}

TEST_CASE("eviction: StreamingLLM is a ring, with positions of the cache", "[eviction]") {
  constexpr index_t kSinks = 2, kWindow = 5, kLen = 20, kDim = 8;
  const Dense x(70, 1, 2, 1, kLen, kLen, kDim, kDim);
  std::vector<double> frequencies(kDim / 2);
  float factor = 1;
  fovea::RopeOptions rope;
  rope.rotary_dim = kDim;
  REQUIRE(fovea::rope_frequencies(rope, std::span<double>(frequencies), factor).ok());
  std::vector<float> memory(static_cast<std::size_t>(fovea::rope_table_floats(kLen, kDim)));
  fovea::RopeTable table;
  REQUIRE(fovea::make_rope_table(table, frequencies, factor, 0, kLen, memory).ok());
  const auto turned = [&](const float* from, index_t position) {
    std::vector<float> to(kDim);
    fovea::rotate_rows(fovea::RopeLayout::half_split, from, 0, to.data(), 0, 1, table.cos_at(position),
                       table.sin_at(position), 0, table.pairs, kDim);
    return to;
  };

  RingCache cache;
  REQUIRE(cache.create({{1, kDim, kDim, Format::f32, Format::f32}, 1, kSinks, kWindow}).ok());
  fovea::TurnedSinks sinks;
  REQUIRE(sinks.create(cache, fovea::RopeLayout::half_split).ok());
  for (index_t t = 0; t < kLen; ++t) {
    // The window is rotated by text positions. A sink is rotated anew each step, so that the query is as far from it as the
    // cache says.
    REQUIRE(sinks.append(cache, 0, only_pos(x.k.view(), t, 1), only_pos(x.v.view(), t, 1), table).ok());
    REQUIRE(sinks.turn(cache, 0, table).ok());
    const index_t len = cache.len(0);
    Values q(1, 2, 1, kDim), out(1, 2, 1, kDim);
    for (index_t h = 0; h < 2; ++h) {
      const auto query = turned(&x.q.view()(0, h, t, 0), t);
      std::copy(query.begin(), query.end(), &q.view()(0, h, 0, 0));
    }
    AttentionOptions options;
    options.len_k = cache.lengths();
    REQUIRE(fovea::attention<F32>(q.view(), cache.batch().kv, out.view(), options).ok());

    // The rule in its own words: keys are un-rotated in the cache, key of slot j gets position j, the query len - 1. While
    // all tokens are there, these are the positions of the text, and the result that of dense attention.
    std::vector<index_t> tokens;
    for (index_t token = 0; token <= t; ++token) {
      if (token < kSinks || token > t - kWindow) tokens.push_back(token);
    }
    REQUIRE(static_cast<index_t>(tokens.size()) == len);
    Values slot_k(1, 1, len, kDim), slot_v(1, 1, len, kDim);
    for (index_t j = 0; j < len; ++j) {
      const index_t token = tokens[static_cast<std::size_t>(j)];
      const auto key = turned(&x.k.view()(0, 0, token, 0), j);
      std::copy(key.begin(), key.end(), &slot_k.view()(0, 0, j, 0));
      std::copy_n(&x.v.view()(0, 0, token, 0), kDim, &slot_v.view()(0, 0, j, 0));
    }
    for (index_t h = 0; h < 2; ++h) {
      const auto query = turned(&x.q.view()(0, h, t, 0), len - 1);
      std::copy(query.begin(), query.end(), &q.view()(0, h, 0, 0));
    }
    const Expected want = expect(q.view(), slot_k.view(), slot_v.view(), {});
    for (std::size_t n = 0; n < out.data.size(); ++n) CHECK(std::abs(double{out.data[n]} - want.out[n]) <= kTolerance);
  }
}
