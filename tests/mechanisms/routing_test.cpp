// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/routing.hpp"

#include <algorithm>

#include "fovea/reference/routing.hpp"
#include "support/dense.hpp"
#include "support/executors.hpp"

using namespace test;
using fovea::RoutingOptions;

namespace {

constexpr double kTolerance = 1e-5;   // of attention over values of about 1 in fp32
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
using Rows = std::vector<std::vector<double>>;
using fovea::reference::RoutingCluster;

struct Members {
  index_t batch, heads, clusters, window;
  std::vector<std::int32_t> data;
  Members(index_t b, index_t h, index_t c, index_t w)
      : batch(b), heads(h), clusters(c), window(w), data(static_cast<std::size_t>(b * h * c * w), -7) {}
  View<std::int32_t, 4> view() {
    return {data.data(), {batch, heads, clusters, window}, {heads * clusters * window, clusters * window, window, 1}};
  }
  std::vector<index_t> of(index_t b, index_t h, index_t c) {
    std::vector<index_t> list;
    for (index_t n = 0; n < window; ++n) {
      if (view()(b, h, c, n) >= 0) list.push_back(view()(b, h, c, n));
    }
    return list;
  }
};

Members random_members(std::uint64_t seed, index_t batch, index_t heads, index_t clusters, index_t window, index_t len) {
  Members all(batch, heads, clusters, window);
  Random random(seed);
  for (index_t list = 0; list < batch * heads * clusters; ++list) {
    std::vector<std::int32_t> tokens;
    for (std::int32_t t = 0; t < len; ++t) tokens.push_back(t);
    for (index_t n = 0; n < window; ++n)
      std::swap(tokens[static_cast<std::size_t>(n)], tokens[static_cast<std::size_t>(random.between(n, len - 1))]);
    std::sort(tokens.begin(), tokens.begin() + window);
    if (list % 3 == 0) tokens[static_cast<std::size_t>(window / 2)] = -1;
    std::copy_n(tokens.begin(), window, all.data.begin() + list * window);
  }
  return all;
}

Rows rows_of(Tensor<const float> x, index_t b, index_t h) {
  Rows rows;
  for (index_t t = 0; t < x.extent[2]; ++t) {
    rows.emplace_back();
    for (index_t d = 0; d < x.extent[3]; ++d) rows.back().push_back(double{x(b, h, t, d)});
  }
  return rows;
}

View<const float, 3> centroids_of(const Values& x) {
  return {x.data.data(), {x.heads, x.len, x.dim}, {x.len * x.dim, x.dim, 1}};
}

struct Learned {
  Values k, v;
  Learned(index_t heads, index_t clusters, index_t count, index_t dim, index_t dim_v)
      : k(random_values(400, heads, clusters, count, dim)), v(random_values(401, heads, clusters, count, dim_v)) {}
};

double worst(const Values& got, const Dense& x, Members& q_members, Members& k_members, const RoutingOptions& options) {
  double off = 0;
  for (index_t b = 0; b < x.q.batch; ++b) {
    for (index_t h = 0; h < x.q.heads; ++h) {
      const index_t kv_head = h / (x.q.heads / x.k.heads);
      std::vector<RoutingCluster> clusters;
      for (index_t c = 0; c < q_members.clusters; ++c) {
        clusters.push_back({q_members.of(b, h, c), k_members.of(b, h, c), {}, {}});
        if (!options.memory_k) continue;
        clusters.back().memory_k = rows_of(options.memory_k, h, c);
        clusters.back().memory_v = rows_of(options.memory_v, h, c);
      }
      const Rows want = fovea::reference::routing(
          rows_of(x.q.view(), b, h), rows_of(x.k.view(), b, kv_head), rows_of(x.v.view(), b, kv_head), clusters,
          {options.causal, options.shared_qk, double{options.self_score}, 1 / std::sqrt(static_cast<double>(x.q.dim))});
      for (index_t t = 0; t < x.q.len; ++t) {
        for (index_t d = 0; d < x.v.dim; ++d) {
          const double here =
              std::abs(double{got.view()(b, h, t, d)} - want[static_cast<std::size_t>(t)][static_cast<std::size_t>(d)]);
          off = here <= off ? off : here;
        }
      }
    }
  }
  return off;
}

}   // namespace

TEST_CASE("routing: the choice is the total order", "[routing]") {
  constexpr index_t kLen = 45, kDim = 6, kClusters = 5;
  // Axes of any length, so that unit vectors and their products with integers are exact; many ties.
  Values x(2, 2, kLen, kDim), mu(1, 4, kClusters, kDim);
  Random random(1);
  for (index_t n = 0; n < 4 * kLen; ++n)
    x.data[static_cast<std::size_t>(n * kDim + random.below(kDim))] = random.pick({1.f, -2.f, 0.25f, 8.f, -1.f});
  for (float& value : mu.data) value = static_cast<float>(random.between(-2, 2));
  const std::vector<index_t> used{kLen, 20};
  for (index_t h = 0; h < 2; ++h) std::fill_n(&x.view()(1, h, 20, 0), (kLen - 20) * kDim, kNan);
  for (const index_t window : {1, 7, 30, 60}) {
    Members one(2, 4, kClusters, window), three = one;
    RoutingOptions options;
    options.len = used;
    REQUIRE(fovea::routing_select(x.view(), centroids_of(mu), one.view(), options).ok());
    ThreadPerLane threads;
    options.executor = {threads, 3};
    PoisonedBytes workspace(fovea::routing_select_bytes(kLen, kClusters, window, 3), 4);
    options.workspace = workspace.bytes();
    REQUIRE(fovea::routing_select(x.view(), centroids_of(mu), three.view(), options).ok());
    CHECK(workspace.guards_intact());
    CHECK(one.data == three.data);
    for (index_t b = 0; b < 2; ++b) {
      for (index_t h = 0; h < 4; ++h) {
        Rows tokens = rows_of(x.view(), b, h / 2);
        tokens.resize(static_cast<std::size_t>(used[static_cast<std::size_t>(b)]));
        for (index_t c = 0; c < kClusters; ++c) {
          const auto scores =
              fovea::reference::routing_scores(tokens, rows_of(mu.view(), 0, h)[static_cast<std::size_t>(c)]);
          auto want = fovea::reference::best_of(scores, window);
          std::sort(want.begin(), want.end());
          CHECK(one.of(b, h, c) == want);
        }
      }
    }
  }
}

TEST_CASE("routing: the choice among random tokens loses nothing", "[routing]") {
  const Values x = random_values(2, 1, 1, 700, 20), mu = random_values(3, 1, 1, 9, 20);
  Members members(1, 1, 9, 50);
  REQUIRE(fovea::routing_select(x.view(), centroids_of(mu), members.view()).ok());
  for (index_t c = 0; c < 9; ++c) {
    const auto scores =
        fovea::reference::routing_scores(rows_of(x.view(), 0, 0), rows_of(mu.view(), 0, 0)[static_cast<std::size_t>(c)]);
    double chosen = 0, best = 0;
    for (const index_t t : members.of(0, 0, c)) chosen += scores[static_cast<std::size_t>(t)];
    for (const index_t t : fovea::reference::best_of(scores, 50)) best += scores[static_cast<std::size_t>(t)];
    CHECK(members.of(0, 0, c).size() == 50);
    CHECK(chosen >= (1 - 1e-6) * best);
  }
}

TEST_CASE("routing: attention in given clusters against the reference", "[routing]") {
  ThreadPerLane threads;
  std::uint64_t seed = 10;
  for (const bool causal : {true, false}) {
    for (const index_t learned : {0, 1, 3}) {
      for (const bool shared : {false, true}) {
        seed += 10;
        const index_t kv_heads = shared ? 4 : 2;
        Dense x(seed, 2, 4, kv_heads, 50, 50, 12, 10);
        if (shared) x.k = x.q;
        Members q_members = random_members(seed + 3, 2, 4, 5, 13, 50), k_members = random_members(seed + 4, 2, 4, 5, 17, 50);
        if (shared) k_members = q_members;
        const Learned memory(4, 5, std::max<index_t>(learned, 1), 12, 10);
        RoutingOptions options;
        options.causal = causal;
        options.shared_qk = shared;
        if (learned > 0) {
          options.memory_k = memory.k.view();
          options.memory_v = memory.v.view();
        }
        Values one(2, 4, 50, 10, canary()), three = one;
        const fovea::Status status = fovea::routing_attend(x.q.view(), x.k.view(), x.v.view(), q_members.view(),
                                                           k_members.view(), one.view(), options);
        INFO(status.message());
        REQUIRE(status.ok());
        const double off = worst(one, x, q_members, k_members, options);
        INFO("causal " << causal << ", learned " << learned << ", shared " << shared << ": " << off);
        CHECK(off <= kTolerance);
        options.executor = {threads, 3};
        PoisonedBytes workspace(fovea::routing_attend_bytes(2, 4, 5, 17, learned, 12, 10, 3), 4);
        options.workspace = workspace.bytes();
        REQUIRE(fovea::routing_attend(x.q.view(), x.k.view(), x.v.view(), q_members.view(), k_members.view(), three.view(),
                                      options)
                    .ok());
        CHECK(workspace.guards_intact());
        CHECK(same_bits(one.data, three.data));
      }
    }
  }
}

TEST_CASE("routing: more tokens than one block of the means, and tokens nobody takes", "[routing]") {
  Dense x(200, 1, 1, 1, 1200, 1200, 4, 6);
  Members q_members = random_members(201, 1, 1, 4, 90, 1200), k_members = random_members(202, 1, 1, 4, 80, 1200);
  std::vector<bool> asks(1200, false), answers(1200, false);
  for (index_t c = 0; c < 4; ++c) {
    for (const index_t t : q_members.of(0, 0, c)) asks[static_cast<std::size_t>(t)] = true;
    for (const index_t t : k_members.of(0, 0, c)) answers[static_cast<std::size_t>(t)] = true;
  }
  Dense poisoned = x;
  for (index_t t = 0; t < 1200; ++t) {
    if (!asks[static_cast<std::size_t>(t)]) std::fill_n(&poisoned.q.view()(0, 0, t, 0), 4, kNan);
    if (answers[static_cast<std::size_t>(t)]) continue;
    std::fill_n(&poisoned.k.view()(0, 0, t, 0), 4, kNan);
    std::fill_n(&poisoned.v.view()(0, 0, t, 0), 6, kNan);
  }
  RoutingOptions options;
  options.causal = false;
  Values out(1, 1, 1200, 6, canary());
  REQUIRE(fovea::routing_attend(poisoned.q.view(), poisoned.k.view(), poisoned.v.view(), q_members.view(), k_members.view(),
                                out.view(), options)
              .ok());
  CHECK(worst(out, x, q_members, k_members, options) <= kTolerance);
  for (index_t t = 0; t < 1200; ++t) {
    if (!asks[static_cast<std::size_t>(t)]) CHECK(out.view()(0, 0, t, 2) == 0.f);
  }
}

TEST_CASE("routing: one cluster of all tokens is dense attention", "[routing]") {
  for (const bool causal : {true, false}) {
    const Dense x(300, 1, 4, 2, 40, 40, 8, 8);
    const Values mu = random_values(301, 1, 4, 1, 8);
    RoutingOptions options;
    options.causal = causal;
    Values out(1, 4, 40, 8, canary());
    const fovea::Status status =
        fovea::routing_attention(x.q.view(), x.k.view(), x.v.view(), centroids_of(mu), 50, out.view(), options);
    INFO(status.message());
    REQUIRE(status.ok());
    AttentionOptions dense;
    dense.causal = causal ? fovea::Causal::top_left : fovea::Causal::none;
    const Result want = attend(x, dense);
    double off = 0;
    for (std::size_t n = 0; n < out.data.size(); ++n)
      off = std::max(off, std::abs(double{out.data[n]} - double{want.out.data[n]}));
    CHECK(off <= kTolerance);
  }
}

TEST_CASE("routing: choice and attention in one call", "[routing]") {
  const std::vector<index_t> used{60, 33};
  Dense x(310, 2, 2, 2, 60, 60, 8, 8);
  for (index_t h = 0; h < 2; ++h) {
    for (Values* part : {&x.q, &x.k, &x.v}) std::fill_n(&part->view()(1, h, 33, 0), 27 * 8, kNan);
  }
  const Values mu = random_values(311, 1, 2, 4, 8);
  RoutingOptions options;
  options.len = used;
  const Learned memory(2, 4, 1, 8, 8);
  options.memory_k = memory.k.view();
  options.memory_v = memory.v.view();
  Members q_members(2, 2, 4, 15), k_members = q_members;
  REQUIRE(fovea::routing_select(x.q.view(), centroids_of(mu), q_members.view(), options).ok());
  REQUIRE(fovea::routing_select(x.k.view(), centroids_of(mu), k_members.view(), options).ok());
  Values parts(2, 2, 60, 8, canary()), whole = parts;
  REQUIRE(
      fovea::routing_attend(x.q.view(), x.k.view(), x.v.view(), q_members.view(), k_members.view(), parts.view(), options)
          .ok());
  ThreadPerLane threads;
  options.executor = {threads, 3};
  PoisonedBytes workspace(fovea::routing_bytes(2, 2, 60, 4, 15, 1, 8, 8, 3), 4);
  options.workspace = workspace.bytes();
  REQUIRE(fovea::routing_attention(x.q.view(), x.k.view(), x.v.view(), centroids_of(mu), 15, whole.view(), options).ok());
  CHECK(workspace.guards_intact());
  CHECK(same_bits(parts.data, whole.data));
  CHECK(std::none_of(whole.data.begin(), whole.data.end(), [](float value) { return std::isnan(value); }));
}

TEST_CASE("routing: empty clusters and rows that see nothing", "[routing]") {
  const Dense x(320, 1, 1, 1, 8, 8, 4, 4);
  Members none(1, 1, 2, 3), late(1, 1, 2, 3);
  none.data = {-1, -1, -1, -1, -1, -1};
  late.data = {1, 6, -1, -1, -1, -1};
  Members keys = late;
  keys.data = {4, 5, -1, -1, -1, -1};
  Values out(1, 1, 8, 4, canary());
  REQUIRE(fovea::routing_attend(x.q.view(), x.k.view(), x.v.view(), none.view(), keys.view(), out.view()).ok());
  CHECK(std::all_of(out.data.begin(), out.data.end(), [](float value) { return value == 0.f; }));
  RoutingOptions options;
  REQUIRE(fovea::routing_attend(x.q.view(), x.k.view(), x.v.view(), late.view(), keys.view(), out.view(), options).ok());
  CHECK(worst(out, x, late, keys, options) <= kTolerance);   // token 1 stands before its cluster's keys: 0
  CHECK(out.view()(0, 0, 1, 0) == 0.f);
}

TEST_CASE("routing: refusals write nothing", "[routing][errors]") {
  const Dense x(330, 1, 2, 2, 9, 9, 8, 8);
  Members members = random_members(331, 1, 2, 3, 4, 9);
  Values out(1, 2, 9, 8, canary());
  const auto refused = [&](const fovea::Status& status, const char* words) {
    INFO(status.message());
    CHECK(!status.ok());
    CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
    CHECK(std::all_of(out.data.begin(), out.data.end(), is_canary));
  };
  const auto call = [&](Members& q_members, const RoutingOptions& options = {}) {
    return fovea::routing_attend(x.q.view(), x.k.view(), x.v.view(), q_members.view(), members.view(), out.view(), options);
  };
  Members wrong = members;
  wrong.data[5] = 9;
  refused(call(wrong), "below 9");
  wrong.data[5] = wrong.data[4];
  refused(call(wrong), "tokens rise");
  Members heads(1, 3, 3, 4);
  refused(call(heads), "q_members is [1, 3, 3, 4]");
  RoutingOptions options;
  options.scale = kNan;
  refused(call(members, options), "not finite");
  const Learned memory(2, 3, 2, 8, 8);
  options = {};
  options.memory_k = memory.k.view();
  refused(call(members, options), "memory_v is");
  std::byte little[8];
  options = {};
  options.workspace = little;
  refused(call(members, options), "workspace has 8 bytes");
  refused(fovea::routing_attend(x.q.view(), x.k.view(), out.view(), members.view(), members.view(), out.view()), "overlaps");
  const Values mu = random_values(332, 1, 2, 3, 8);
  options = {};
  options.shared_qk = true;
  refused(fovea::routing_attention(x.q.view(), x.k.view(), x.v.view(), centroids_of(mu), 4, out.view(), options), "k is q");
}
