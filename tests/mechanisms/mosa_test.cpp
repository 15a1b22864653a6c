// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/mosa.hpp"

#include <algorithm>

#include "fovea/reference/mosa.hpp"
#include "support/dense.hpp"
#include "support/executors.hpp"

using namespace test;
using fovea::Causal;
using fovea::MosaOptions;
using fovea::MosaSelectOptions;
using fovea::Operand;

namespace {

constexpr double kTolerance = 1e-5;   // of attention over values of about 1 in fp32
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
using F32 = fovea::Formats<fovea::Format::f32>;
using Rows = std::vector<std::vector<double>>;

struct Lists {
  index_t batch, heads, capacity;
  std::vector<std::int32_t> data;
  Lists(index_t b, index_t h, index_t n) : batch(b), heads(h), capacity(n), data(static_cast<std::size_t>(b * h * n), -7) {}
  View<std::int32_t, 3> view() { return {data.data(), {batch, heads, capacity}, {heads * capacity, capacity, 1}}; }
  std::vector<index_t> of(index_t b, index_t h) const {
    std::vector<index_t> list;
    for (index_t n = 0; n < capacity; ++n) {
      const std::int32_t t = data[static_cast<std::size_t>((b * heads + h) * capacity + n)];
      if (t >= 0) list.push_back(t);
    }
    return list;
  }
};

// [batch, head, pos]
struct Router {
  index_t batch, heads, len;
  std::vector<float> data;
  Router(std::uint64_t seed, index_t b, index_t h, index_t n, bool integers = false) : batch(b), heads(h), len(n) {
    Random random(seed);
    for (index_t i = 0; i < b * h * n; ++i)
      data.push_back(integers ? static_cast<float>(random.below(5)) : random.uniform(0.01f, 0.99f));
  }
  View<float, 3> view() { return {data.data(), {batch, heads, len}, {heads * len, len, 1}}; }
  std::vector<double> of(index_t b, index_t h, index_t used) const {
    const auto at = data.begin() + (b * heads + h) * len;
    return {at, at + used};
  }
};

std::vector<index_t> rising(std::vector<index_t> list) {
  std::sort(list.begin(), list.end());
  return list;
}
std::vector<double> row_of(const Values& x, index_t b, index_t h, index_t t) {
  const float* const at = &x.view()(b, h, t, 0);
  return {at, at + x.dim};
}

// Attention alone: [batch, head, pos, dim_v].
std::vector<double> expect_attention(const Dense& x, const Router* router, const Lists& lists, index_t pairs) {
  std::vector<double> want(static_cast<std::size_t>(x.q.batch * x.q.heads * x.q.len * x.v.dim), 0.);
  for (index_t b = 0; b < x.q.batch; ++b) {
    for (index_t h = 0; h < x.q.heads; ++h) {
      const std::vector<index_t> chosen = lists.of(b, h);
      const index_t kv_head = h / (x.q.heads / x.k.heads);
      Rows q, k, v;
      std::vector<double> r;
      for (const index_t t : chosen) {
        q.push_back(row_of(x.q, b, h, t));
        k.push_back(row_of(x.k, b, kv_head, t));
        v.push_back(row_of(x.v, b, kv_head, t));
        r.push_back(router == nullptr ? 1. : router->of(b, h, router->len)[static_cast<std::size_t>(t)]);
      }
      const Rows rows = fovea::reference::mosa_head(chosen, q, k, v, r, 1 / std::sqrt(static_cast<double>(x.q.dim)), pairs);
      for (std::size_t n = 0; n < chosen.size(); ++n)
        std::copy(rows[n].begin(), rows[n].end(), want.begin() + ((b * x.q.heads + h) * x.q.len + chosen[n]) * x.v.dim);
    }
  }
  return want;
}

double worst(std::span<const float> got, const std::vector<double>& want) {
  REQUIRE(got.size() == want.size());
  double off = 0;
  for (std::size_t n = 0; n < want.size(); ++n) {
    const double here = std::abs(double{got[n]} - want[n]);
    off = here <= off ? off : here;   // NaN too
  }
  return off;
}

struct Table {
  std::vector<float> memory;
  fovea::RopeTable table;
  Table(index_t len, index_t rotary) : memory(static_cast<std::size_t>(len * rotary)) {
    std::vector<double> frequencies(static_cast<std::size_t>(rotary / 2));
    float factor = 1;
    fovea::RopeOptions options;
    options.rotary_dim = rotary;
    REQUIRE(fovea::rope_frequencies(options, std::span<double>(frequencies), factor).ok());
    REQUIRE(fovea::make_rope_table(table, frequencies, factor, 0, len, memory).ok());
  }
};

}   // namespace

TEST_CASE("mosa: how many tokens a head takes", "[mosa][golden]") {
  CHECK(fovea::mosa_count(512, 16) == 32);
  CHECK(fovea::mosa_count(16, 16) == 2);
  CHECK(fovea::mosa_count(1, 16) == 1);
  CHECK(fovea::mosa_count(0, 16) == 0);
  CHECK(fovea::mosa_count(100, 1) == 100);
  CHECK(fovea::mosa_rotary_dim(64) == 32);
  CHECK(fovea::mosa_rotary_dim(10) == 4);
}

TEST_CASE("mosa: the choice is the total order", "[mosa]") {
  const std::vector<index_t> used{37, 20};
  Router router(1, 2, 3, 37, true);   // integers: many ties
  for (index_t h = 0; h < 3; ++h) {
    for (index_t t = 20; t < 37; ++t) router.view()(1, h, t) = kInfinity;   // padding must not be read
  }
  for (const bool include_first : {false, true}) {
    for (const double sparsity : {1., 3.5, 16., 100.}) {
      const index_t most = fovea::mosa_count(37, sparsity);
      Lists one(2, 3, most + 2), three(2, 3, most + 2);
      MosaSelectOptions options;
      options.sparsity = sparsity;
      options.include_first = include_first;
      options.len = used;
      REQUIRE(fovea::mosa_select(router.view(), one.view(), options).ok());
      ThreadPerLane threads;
      options.executor = {threads, 3};
      PoisonedBytes workspace(fovea::mosa_select_bytes(37, sparsity, 3));
      options.workspace = workspace.bytes();
      REQUIRE(fovea::mosa_select(router.view(), three.view(), options).ok());
      CHECK(workspace.guards_intact());
      CHECK(one.data == three.data);
      for (index_t b = 0; b < 2; ++b) {
        for (index_t h = 0; h < 3; ++h) {
          const auto scores = router.of(b, h, used[static_cast<std::size_t>(b)]);
          CHECK(one.of(b, h) == rising(fovea::reference::mosa_select(scores, sparsity, include_first)));
          const auto* const list = &one.view()(b, h, 0);
          CHECK(std::count(list, list + most + 2, -1) == most + 2 - static_cast<index_t>(one.of(b, h).size()));
        }
      }
    }
  }
}

TEST_CASE("mosa: tokens without a score are not taken", "[mosa]") {
  Router router(2, 1, 1, 9);
  for (index_t t = 0; t < 9; ++t) router.view()(0, 0, t) = t % 2 == 0 ? -kInfinity : t == 3 ? kNan : 0.5f;
  Lists lists(1, 1, 9);
  MosaSelectOptions options;
  options.sparsity = 1;
  REQUIRE(fovea::mosa_select(router.view(), lists.view(), options).ok());
  CHECK(lists.of(0, 0) == std::vector<index_t>{1, 5, 7});
}

TEST_CASE("mosa: attention of given lists against the reference", "[mosa]") {
  ThreadPerLane threads;
  for (const bool with_rope : {false, true}) {
    Dense x(3, 2, 4, 2, 40, 40, 12, 10);
    Router router(4, 2, 4, 40);
    Lists lists(2, 4, 11);
    MosaSelectOptions select;
    select.sparsity = 4;
    REQUIRE(fovea::mosa_select(router.view(), lists.view(), select).ok());
    lists.data[1] = -1;                                                // a hole
    std::fill(lists.data.begin() + 22, lists.data.begin() + 33, -1);   // a head that takes nothing
    // Rows that nobody takes are never read.
    for (index_t b = 0; b < 2; ++b) {
      for (index_t h = 0; h < 4; ++h) {
        for (index_t t = 0; t < 40; ++t) {
          const auto takes = [&](index_t head) {
            const auto list = lists.of(b, head);
            return std::find(list.begin(), list.end(), t) != list.end();
          };
          if (!takes(h)) std::fill_n(&x.q.view()(b, h, t, 0), 12, kNan);
          if (h % 2 == 1 || takes(h) || takes(h + 1)) continue;
          std::fill_n(&x.k.view()(b, h / 2, t, 0), 12, kNan);
          std::fill_n(&x.v.view()(b, h / 2, t, 0), 10, kNan);
        }
      }
    }
    const index_t rotary = fovea::mosa_rotary_dim(12);
    const Table table(40, rotary);
    MosaOptions options;
    if (with_rope) options.rope = &table.table;
    Values one(2, 4, 40, 10, canary()), three = one;
    REQUIRE(
        fovea::mosa_attention(x.q.view(), x.k.view(), x.v.view(), router.view(), lists.view(), one.view(), options).ok());
    CHECK(worst(one.data, expect_attention(x, &router, lists, with_rope ? rotary / 2 : 0)) <= kTolerance);

    index_t total = 0;
    for (index_t n = 0; n < 8; ++n) total += static_cast<index_t>(lists.of(n / 4, n % 4).size());
    PoisonedBytes workspace(fovea::mosa_attention_bytes(2, 4, total, 12, 10), 4);
    options.workspace = workspace.bytes();
    options.executor = {threads, 3};
    REQUIRE(
        fovea::mosa_attention(x.q.view(), x.k.view(), x.v.view(), router.view(), lists.view(), three.view(), options).ok());
    CHECK(workspace.guards_intact());
    CHECK(same_bits(one.data, three.data));

    // A factor on r is a factor on the output.
    for (float& r : router.data) r *= 2;
    REQUIRE(
        fovea::mosa_attention(x.q.view(), x.k.view(), x.v.view(), router.view(), lists.view(), three.view(), options).ok());
    bool doubled = true;
    for (std::size_t n = 0; n < one.data.size(); ++n) doubled = doubled && three.data[n] == 2 * one.data[n];
    CHECK(doubled);
  }
}

TEST_CASE("mosa: all tokens without a router are dense attention", "[mosa]") {
  const Dense x(5, 1, 2, 2, 33, 33, 16, 16);
  Lists all(1, 2, 33);
  for (std::size_t n = 0; n < all.data.size(); ++n) all.data[n] = static_cast<std::int32_t>(n % 33);
  AttentionOptions causal;
  causal.causal = Causal::bottom_right;
  const Result dense = attend(x, causal);
  Values out(1, 2, 33, 16, canary());
  REQUIRE(fovea::mosa_attention(x.q.view(), x.k.view(), x.v.view(), {}, all.view(), out.view()).ok());
  CHECK(worst(out.data, {dense.out.data.begin(), dense.out.data.end()}) <= kTolerance);
  // 16-bit tensors in and out.
  std::vector<fovea::bf16> narrow(x.v.data.size()), written(x.v.data.size());
  Dense rounded = x;
  for (std::size_t n = 0; n < narrow.size(); ++n) {
    narrow[n] = fovea::convert<fovea::bf16>(x.v.data[n]);
    rounded.v.data[n] = fovea::convert<float>(narrow[n]);
  }
  REQUIRE(fovea::mosa_attention(x.q.view(), x.k.view(), rounded.v.view(), {}, all.view(), out.view()).ok());
  REQUIRE(fovea::mosa_attention(x.q.view(), x.k.view(), fovea::bhsd(narrow.data(), 1, 2, 33, 16), {}, all.view(),
                                fovea::bhsd(written.data(), 1, 2, 33, 16))
              .ok());
  bool equal = true;
  for (std::size_t n = 0; n < written.size(); ++n)
    equal = equal && written[n].bits == fovea::convert<fovea::bf16>(out.data[n]).bits;
  CHECK(equal);
}

TEST_CASE("mosa: with the choice held, the future moves no bit", "[mosa]") {
  Dense x(6, 1, 2, 2, 30, 30, 8, 8);
  Router router(7, 1, 2, 30);
  Lists lists(1, 2, 10);
  MosaSelectOptions select;
  select.sparsity = 3;
  REQUIRE(fovea::mosa_select(router.view(), lists.view(), select).ok());
  Values before(1, 2, 30, 8), after(1, 2, 30, 8);
  REQUIRE(fovea::mosa_attention(x.q.view(), x.k.view(), x.v.view(), router.view(), lists.view(), before.view()).ok());
  for (index_t h = 0; h < 2; ++h) {
    for (index_t t = 17; t < 30; ++t) {
      for (index_t d = 0; d < 8; ++d) x.k.view()(0, h, t, d) = x.v.view()(0, h, t, d) = x.q.view()(0, h, t, d) = kNan;
    }
  }
  REQUIRE(fovea::mosa_attention(x.q.view(), x.k.view(), x.v.view(), router.view(), lists.view(), after.view()).ok());
  bool same = true, moved = false;
  for (index_t h = 0; h < 2; ++h) {
    same = same && std::memcmp(&before.view()(0, h, 0, 0), &after.view()(0, h, 0, 0), 17 * 8 * sizeof(float)) == 0;
    moved = moved || std::memcmp(&before.view()(0, h, 17, 0), &after.view()(0, h, 17, 0), 13 * 8 * sizeof(float)) != 0;
  }
  CHECK(same);
  CHECK(moved);
}

TEST_CASE("mosa: the whole layer", "[mosa]") {
  struct Shape {
    index_t batch, heads, len, model, dim;
    double sparsity;
  };
  // More tokens than one block of the output's sums; more columns than one task of them; more chosen rows than one of these.
  for (const Shape s :
       {Shape{2, 3, 50, 24, 10, 5}, Shape{1, 2, 1100, 5, 4, 30}, Shape{1, 2, 20, 300, 6, 4}, Shape{1, 1, 450, 6, 4, 1}}) {
    const Values x = random_values(8, s.batch, 1, s.len, s.model);
    Values w_r = random_values(9, 1, 1, s.model, s.heads), w_qkv = random_values(10, 1, s.heads, s.model, 3 * s.dim),
           w_o = random_values(11, 1, s.heads, s.dim, s.model);
    for (Values* w : {&w_r, &w_qkv, &w_o}) {
      for (float& value : w->data) value /= std::sqrt(static_cast<float>(w->len));
    }
    Router router(0, s.batch, s.heads, s.len);
    REQUIRE(fovea::mosa_router(x.view(), w_r.view(), router.view()).ok());
    const auto project = [&](const std::vector<double>& row, const Values& w, index_t h, index_t first, index_t count) {
      std::vector<double> to(static_cast<std::size_t>(count), 0.);
      for (std::size_t i = 0; i < row.size(); ++i) {
        for (index_t n = 0; n < count; ++n)
          to[static_cast<std::size_t>(n)] += row[i] * double{w.view()(0, h, static_cast<index_t>(i), first + n)};
      }
      return to;
    };
    double off = 0;
    for (index_t b = 0; b < s.batch; ++b) {
      for (index_t h = 0; h < s.heads; ++h) {
        for (index_t t = 0; t < s.len; ++t) {
          const double logit = project(row_of(x, b, 0, t), w_r, 0, h, 1)[0];
          off = std::max(off, std::abs(1 / (1 + std::exp(-logit)) - double{router.view()(b, h, t)}));
        }
      }
    }
    CHECK(off <= 1e-6);

    const index_t k = fovea::mosa_count(s.len, s.sparsity);
    Lists lists(s.batch, s.heads, k);
    MosaSelectOptions select;
    select.sparsity = s.sparsity;
    REQUIRE(fovea::mosa_select(router.view(), lists.view(), select).ok());
    const index_t rotary = fovea::mosa_rotary_dim(s.dim);
    const Table table(s.len, rotary);
    MosaOptions options;
    options.rope = &table.table;
    Values out(s.batch, 1, s.len, s.model, canary()), three = out;
    const fovea::Status status =
        fovea::mosa_layer(x.view(), {w_qkv.view(), w_o.view()}, router.view(), lists.view(), out.view(), options);
    INFO(status.message());
    REQUIRE(status.ok());

    std::vector<double> want(out.data.size(), 0.);
    for (index_t b = 0; b < s.batch; ++b) {
      for (index_t h = 0; h < s.heads; ++h) {
        const std::vector<index_t> chosen = fovea::reference::mosa_select(router.of(b, h, s.len), s.sparsity, false);
        Rows q, keys, v;
        std::vector<double> r;
        for (const index_t t : chosen) {
          q.push_back(project(row_of(x, b, 0, t), w_qkv, h, 0, s.dim));
          keys.push_back(project(row_of(x, b, 0, t), w_qkv, h, s.dim, s.dim));
          v.push_back(project(row_of(x, b, 0, t), w_qkv, h, 2 * s.dim, s.dim));
          r.push_back(router.view()(b, h, t));
        }
        const Rows rows =
            fovea::reference::mosa_head(chosen, q, keys, v, r, 1 / std::sqrt(static_cast<double>(s.dim)), rotary / 2);
        for (std::size_t n = 0; n < chosen.size(); ++n) {
          const auto y = project(rows[n], w_o, h, 0, s.model);
          for (std::size_t d = 0; d < y.size(); ++d)
            want[static_cast<std::size_t>((b * s.len + chosen[n]) * s.model) + d] += y[d];
        }
      }
    }
    CHECK(worst(out.data, want) <= kTolerance);

    ThreadPerLane threads;
    options.executor = {threads, 3};
    PoisonedBytes workspace(fovea::mosa_layer_bytes(s.batch, s.heads, s.batch * s.heads * k, s.dim, 3));
    options.workspace = workspace.bytes();
    REQUIRE(
        fovea::mosa_layer(x.view(), {w_qkv.view(), w_o.view()}, router.view(), lists.view(), three.view(), options).ok());
    CHECK(workspace.guards_intact());
    CHECK(same_bits(out.data, three.data));
  }
}

TEST_CASE("mosa: decoding keeps the best so far", "[mosa]") {
  constexpr index_t kBatch = 2, kHeads = 3, kLen = 24, kDim = 8;
  const Dense x(12, kBatch, kHeads, kHeads, kLen, kLen, kDim, kDim);
  Router router(13, kBatch, kHeads, kLen, true);
  for (const index_t budget : {index_t{1}, index_t{6}, kLen}) {
    for (const bool include_first : {false, true}) {
      Values k(kBatch, kHeads, budget, kDim, kNan), v(kBatch, kHeads, budget, kDim, kNan);
      std::vector<float> score(static_cast<std::size_t>(kBatch * kHeads * budget), kNan);
      std::vector<std::int32_t> token(score.size(), -1);
      std::vector<index_t> count(static_cast<std::size_t>(kBatch * kHeads), 0);
      const std::array<index_t, 3> extent{kBatch, kHeads, budget}, stride{kHeads * budget, budget, 1};
      const fovea::MosaState state{{score.data(), extent, stride},
                                   {token.data(), extent, stride},
                                   k.view(),
                                   v.view(),
                                   {count.data(), {kBatch, kHeads}, {kHeads, 1}}};
      std::vector<std::vector<index_t>> kept(count.size());
      double off = 0;
      for (index_t t = 0; t < kLen; ++t) {
        std::vector<float> r;
        for (index_t n = 0; n < kBatch * kHeads; ++n) r.push_back(router.data[static_cast<std::size_t>(n * kLen + t)]);
        Values out(kBatch, kHeads, 1, kDim, canary());
        fovea::MosaStepOptions options;
        options.include_first = include_first;
        const fovea::Status status =
            fovea::mosa_step<F32>(only_pos(x.q.view(), t, 1), only_pos(x.k.view(), t, 1), only_pos(x.v.view(), t, 1),
                                  {r.data(), {kBatch, kHeads}, {kHeads, 1}}, t, state, out.view(), options);
        INFO(status.message());
        REQUIRE(status.ok());
        for (index_t n = 0; n < kBatch * kHeads; ++n) {
          // The set is the best of what was kept and the new token.
          const index_t b = n / kHeads, h = n % kHeads;
          std::vector<index_t>& set = kept[static_cast<std::size_t>(n)];
          set.push_back(t);
          std::vector<double> scores;
          for (const index_t s : set) {
            const double own = double{router.view()(b, h, s)};
            scores.push_back(include_first && s == 0 ? 1e9 : own);
          }
          std::vector<index_t> stays;
          for (const index_t at : rising(fovea::reference::best_of(scores, budget)))
            stays.push_back(set[static_cast<std::size_t>(at)]);
          set = stays;
          std::vector<double> want(kDim, 0.);
          if (std::find(set.begin(), set.end(), t) != set.end()) {
            Rows q, keys, values;
            for (const index_t s : set) {
              q.push_back(row_of(x.q, b, h, s));
              keys.push_back(row_of(x.k, b, h, s));
              values.push_back(row_of(x.v, b, h, s));
            }
            const std::vector<double> factor(set.size(), double{router.view()(b, h, t)});
            want = fovea::reference::mosa_head(set, q, keys, values, factor, 1 / std::sqrt(double{kDim}), 0).back();
          }
          for (index_t d = 0; d < kDim; ++d) {
            const double here = std::abs(double{out.view()(b, h, 0, d)} - want[static_cast<std::size_t>(d)]);
            off = here <= off ? off : here;
          }
        }
      }
      INFO("budget " << budget);
      CHECK(off <= 5 * kTolerance);   // r is up to 4 here
      for (index_t n = 0; n < kBatch * kHeads; ++n) {
        const auto* const first = token.data() + n * budget;
        std::vector<index_t> have(first, first + count[static_cast<std::size_t>(n)]);
        CHECK(rising(have) == kept[static_cast<std::size_t>(n)]);
      }
    }
  }
}

TEST_CASE("mosa: refusals write nothing", "[mosa][errors]") {
  const Dense x(14, 1, 2, 2, 9, 9, 8, 8);
  Router router(15, 1, 2, 9);
  Lists lists(1, 2, 3);
  std::fill(lists.data.begin(), lists.data.end(), -1);
  Values out(1, 2, 9, 8, canary());
  const auto refused = [&](const fovea::Status& status, const char* words) {
    INFO(status.message());
    CHECK(!status.ok());
    CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
    CHECK(std::all_of(out.data.begin(), out.data.end(), is_canary));
  };
  const auto call = [&](const MosaOptions& options = {}) {
    return fovea::mosa_attention(x.q.view(), x.k.view(), x.v.view(), router.view(), lists.view(), out.view(), options);
  };
  lists.data = {3, 2, -1, 0, 1, 2};
  refused(call(), "chosen[0, 0, 1] is 2 behind 3");
  lists.data = {2, 2, -1, 0, 1, 2};
  refused(call(), "tokens rise");
  lists.data = {2, 9, -1, 0, 1, 2};
  refused(call(), "are below 9");
  lists.data = {2, 3, -1, 0, 1, 2};
  MosaOptions options;
  options.scale = kNan;
  refused(call(options), "not finite");
  std::byte little[8];
  options.scale = {};
  options.workspace = little;
  refused(call(options), "workspace has 8 bytes");
  Lists wrong(1, 3, 3);
  refused(fovea::mosa_attention(x.q.view(), x.k.view(), x.v.view(), router.view(), wrong.view(), out.view()),
          "must be [1, 2, tokens]");
  refused(fovea::mosa_attention(out.view(), x.k.view(), x.v.view(), router.view(), lists.view(), out.view()), "overlaps");
  Router short_router(15, 1, 2, 8);
  refused(fovea::mosa_attention(x.q.view(), x.k.view(), x.v.view(), short_router.view(), lists.view(), out.view()),
          "router is [1, 2, 8]");
  const Table table(8, 4);
  options = {};
  options.rope = &table.table;
  refused(call(options), "RoPE table");
  CHECK(!fovea::mosa_select(router.view(), Lists(1, 2, 1).view(), {}).ok());
  MosaSelectOptions select;
  select.sparsity = 0;
  CHECK(!fovea::mosa_select(router.view(), lists.view(), select).ok());
}
