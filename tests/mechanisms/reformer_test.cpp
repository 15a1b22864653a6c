// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/reformer.hpp"

#include <algorithm>

#include "fovea/reference/reformer.hpp"
#include "support/dense.hpp"
#include "support/executors.hpp"

using namespace test;
using fovea::ReformerOptions;

namespace {

constexpr double kTolerance = 1e-5;   // of attention over values of about 1 in fp32
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
using Rows = std::vector<std::vector<double>>;

struct Buckets {
  index_t batch, heads, rounds, len;
  std::vector<std::int32_t> data;
  Buckets(index_t b, index_t h, index_t r, index_t n)
      : batch(b), heads(h), rounds(r), len(n), data(static_cast<std::size_t>(b * h * r * n), -7) {}
  View<std::int32_t, 4> view() {
    return {data.data(), {batch, heads, rounds, len}, {heads * rounds * len, rounds * len, len, 1}};
  }
  std::vector<std::vector<index_t>> of(index_t b, index_t h) {
    std::vector<std::vector<index_t>> all(static_cast<std::size_t>(rounds));
    for (index_t r = 0; r < rounds; ++r) {
      for (index_t t = 0; t < len; ++t) all[static_cast<std::size_t>(r)].push_back(view()(b, h, r, t));
    }
    return all;
  }
};

Buckets random_buckets(std::uint64_t seed, index_t batch, index_t heads, index_t rounds, index_t len, index_t count) {
  Buckets all(batch, heads, rounds, len);
  Random random(seed);
  for (std::int32_t& bucket : all.data) bucket = static_cast<std::int32_t>(random.below(count));
  return all;
}

Rows rows_of(const Values& x, index_t b, index_t h) {
  Rows rows;
  for (index_t t = 0; t < x.len; ++t) {
    const float* const at = &x.view()(b, h, t, 0);
    rows.emplace_back(at, at + x.dim);
  }
  return rows;
}

double worst(const Values& got, const Values& qk, const Values& v, Buckets& buckets, const ReformerOptions& options) {
  double off = 0;
  const double scale = options.scale ? double{*options.scale} : 1 / std::sqrt(static_cast<double>(qk.dim));
  for (index_t b = 0; b < qk.batch; ++b) {
    for (index_t h = 0; h < qk.heads; ++h) {
      const Rows want = fovea::reference::reformer(
          rows_of(qk, b, h), rows_of(v, b, h), buckets.of(b, h),
          {options.bucket, options.causal, options.count_duplicates, double{options.self_score}, scale});
      for (index_t t = 0; t < qk.len; ++t) {
        for (index_t d = 0; d < v.dim; ++d) {
          const double here =
              std::abs(double{got.view()(b, h, t, d)} - want[static_cast<std::size_t>(t)][static_cast<std::size_t>(d)]);
          off = here <= off ? off : here;
        }
      }
    }
  }
  return off;
}

Values integers(std::uint64_t seed, index_t batch, index_t heads, index_t len, index_t dim) {
  Values x(batch, heads, len, dim);
  Random random(seed);
  for (float& value : x.data) value = static_cast<float>(random.between(-3, 3));
  return x;
}

}   // namespace

TEST_CASE("reformer: buckets of integers are exact", "[reformer]") {
  struct Shape {
    index_t len, bucket, rounds, dim;
  };
  // 2 buckets; rounds that a task of columns cuts (150 columns each); more rows than a task has.
  for (const Shape s : {Shape{16, 8, 3, 5}, Shape{600, 2, 3, 4}, Shape{800, 100, 2, 12}}) {
    const index_t half = s.len / s.bucket / 2;
    Values qk = integers(1, 2, 2, s.len, s.dim);
    const Values rotations = integers(2, 1, s.dim, s.rounds, half);
    std::fill_n(&qk.view()(1, 1, 3, 0), s.dim, 0.f);   // all equal: bucket 0
    const View<const float, 3> r{rotations.data.data(), {s.dim, s.rounds, half}, {s.rounds * half, half, 1}};
    Buckets one(2, 2, s.rounds, s.len), three(2, 2, s.rounds, s.len);
    ReformerOptions options;
    options.bucket = s.bucket;
    REQUIRE(fovea::reformer_buckets(qk.view(), r, one.view(), options).ok());
    ThreadPerLane threads;
    options.executor = {threads, 3};
    PoisonedBytes workspace(fovea::reformer_buckets_bytes(s.len, s.rounds, 3));
    options.workspace = workspace.bytes();
    REQUIRE(fovea::reformer_buckets(qk.view(), r, three.view(), options).ok());
    CHECK(workspace.guards_intact());
    CHECK(one.data == three.data);
    bool equal = true;
    for (index_t b = 0; b < 2; ++b) {
      for (index_t h = 0; h < 2; ++h) {
        const Rows x = rows_of(qk, b, h);
        for (index_t round = 0; round < s.rounds; ++round) {
          Rows rotation(static_cast<std::size_t>(s.dim));
          for (index_t d = 0; d < s.dim; ++d) {
            for (index_t n = 0; n < half; ++n) rotation[static_cast<std::size_t>(d)].push_back(r(d, round, n));
          }
          for (index_t t = 0; t < s.len; ++t) {
            const index_t want = fovea::reference::reformer_bucket(x[static_cast<std::size_t>(t)], rotation);
            equal = equal && one.view()(b, h, round, t) == want;
          }
        }
      }
    }
    CHECK(equal);
    CHECK(one.view()(1, 1, 0, 3) == 0);
  }
}

TEST_CASE("reformer: attention in given buckets against the reference", "[reformer]") {
  ThreadPerLane threads;
  std::uint64_t seed = 10;
  for (const index_t rounds : {1, 2, 4}) {
    for (const bool causal : {true, false}) {
      for (const bool count_duplicates : {true, false}) {
        const Values qk = random_values(++seed, 2, 2, 64, 12), v = random_values(++seed, 2, 2, 64, 10);
        Buckets buckets = random_buckets(++seed, 2, 2, rounds, 64, 8);
        ReformerOptions options;
        options.bucket = 8;
        options.causal = causal;
        options.count_duplicates = count_duplicates;
        options.scale = 2.f;
        Values one(2, 2, 64, 10, canary()), three = one;
        const fovea::Status status = fovea::reformer_attend(qk.view(), v.view(), buckets.view(), one.view(), options);
        INFO(status.message());
        REQUIRE(status.ok());
        const double off = worst(one, qk, v, buckets, options);
        INFO("rounds " << rounds << ", causal " << causal << ", duplicates " << count_duplicates << ": " << off);
        CHECK(off <= kTolerance);
        options.executor = {threads, 3};
        PoisonedBytes workspace(fovea::reformer_attend_bytes(64, 12, 10, rounds, 8), 4);
        options.workspace = workspace.bytes();
        REQUIRE(fovea::reformer_attend(qk.view(), v.view(), buckets.view(), three.view(), options).ok());
        CHECK(workspace.guards_intact());
        CHECK(same_bits(one.data, three.data));
      }
    }
  }
}

TEST_CASE("reformer: all in one bucket, and buckets nobody is in", "[reformer]") {
  const Values qk = random_values(50, 1, 1, 32, 8), v = random_values(51, 1, 1, 32, 8);
  for (const std::int32_t bucket : {0, 7}) {
    Buckets buckets(1, 1, 2, 32);
    std::fill(buckets.data.begin(), buckets.data.end(), bucket);
    ReformerOptions options;
    options.bucket = 4;
    Values out(1, 1, 32, 8);
    REQUIRE(fovea::reformer_attend(qk.view(), v.view(), buckets.view(), out.view(), options).ok());
    CHECK(worst(out, qk, v, buckets, options) <= kTolerance);
    // Token 0 sees nobody but itself; in every round.
    for (index_t d = 0; d < 8; ++d)
      CHECK(std::abs(out.view()(0, 0, 0, d) - v.view()(0, 0, 0, d)) <= 1e-6f * std::abs(v.view()(0, 0, 0, d)));
  }
}

TEST_CASE("reformer: two pieces and one round are dense attention without the diagonal", "[reformer]") {
  for (const bool causal : {true, false}) {
    Dense x(60, 1, 2, 2, 32, 32, 8, 8);
    Buckets buckets = random_buckets(61, 1, 2, 1, 32, 2);
    ReformerOptions options;
    options.bucket = 16;
    options.causal = causal;
    Values out(1, 2, 32, 8);
    REQUIRE(fovea::reformer_attend(x.q.view(), x.v.view(), buckets.view(), out.view(), options).ok());
    for (index_t h = 0; h < 2; ++h) {
      for (index_t t = 0; t < 32; ++t) {
        float* const key = &x.k.view()(0, h, t, 0);
        std::copy_n(&x.q.view()(0, h, t, 0), 8, key);
        fovea::make_unit(key, 8);
      }
    }
    std::vector<std::uint8_t> keep(32 * 32, 1);
    for (std::size_t t = 0; t < 32; ++t) keep[t * 33] = causal && t == 0;
    AttentionOptions dense;
    dense.causal = causal ? fovea::Causal::top_left : fovea::Causal::none;
    dense.keep = {keep.data(), {1, 1, 32, 32}, {0, 0, 32, 1}};
    const Result want = attend(x, dense);
    double off = 0;
    for (std::size_t n = 0; n < out.data.size(); ++n)
      off = std::max(off, std::abs(double{out.data[n]} - double{want.out.data[n]}));
    CHECK(off <= kTolerance);
  }
}

TEST_CASE("reformer: without duplicates every key counts once", "[reformer]") {
  const Values qk = random_values(70, 1, 1, 48, 8), v = random_values(71, 1, 1, 48, 8);
  Buckets buckets = random_buckets(72, 1, 1, 5, 48, 8);
  ReformerOptions options;
  options.bucket = 6;
  options.count_duplicates = false;
  Values out(1, 1, 48, 8);
  REQUIRE(fovea::reformer_attend(qk.view(), v.view(), buckets.view(), out.view(), options).ok());
  // One softmax over the union of what the rounds show.
  const auto met = fovea::reference::reformer_met(buckets.of(0, 0), 6);
  Values unit = qk;
  std::vector<std::uint8_t> keep(48 * 48, 0);
  for (std::size_t t = 0; t < 48; ++t) {
    fovea::make_unit(&unit.view()(0, 0, static_cast<index_t>(t), 0), 8);
    for (const auto& round : met) {
      for (const index_t key : round[t]) keep[t * 48 + static_cast<std::size_t>(key)] = 1;
    }
    const bool alone =
        std::count(keep.begin() + static_cast<index_t>(t) * 48, keep.begin() + static_cast<index_t>(t * 49), 1) == 0;
    keep[t * 49] = alone;
  }
  AttentionOptions dense;
  dense.causal = fovea::Causal::top_left;
  dense.keep = {keep.data(), {1, 1, 48, 48}, {0, 0, 48, 1}};
  const Result want = attend(qk.view(), unit.view(), v.view(), dense);
  double off = 0;
  for (std::size_t n = 0; n < out.data.size(); ++n)
    off = std::max(off, std::abs(double{out.data[n]} - double{want.out.data[n]}));
  CHECK(off <= kTolerance);
}

TEST_CASE("reformer: hashing and attention in one call", "[reformer]") {
  const Values qk = integers(80, 1, 2, 64, 8), v = random_values(81, 1, 2, 64, 8), rotations = integers(82, 1, 8, 3, 4);
  const View<const float, 3> r{rotations.data.data(), {8, 3, 4}, {12, 4, 1}};
  Buckets buckets(1, 2, 3, 64);
  ReformerOptions options;
  options.bucket = 8;
  Values one(1, 2, 64, 8, canary()), three = one;
  REQUIRE(fovea::reformer_buckets(qk.view(), r, buckets.view(), options).ok());
  REQUIRE(fovea::reformer_attention(qk.view(), v.view(), r, one.view(), options).ok());
  CHECK(worst(one, qk, v, buckets, options) <= kTolerance);
  ThreadPerLane threads;
  options.executor = {threads, 3};
  PoisonedBytes workspace(fovea::reformer_bytes(1, 2, 64, 8, 8, 3, 8, 3), 4);
  options.workspace = workspace.bytes();
  REQUIRE(fovea::reformer_attention(qk.view(), v.view(), r, three.view(), options).ok());
  CHECK(workspace.guards_intact());
  CHECK(same_bits(one.data, three.data));
}

TEST_CASE("reformer: refusals write nothing", "[reformer][errors]") {
  const Values qk = random_values(90, 1, 1, 32, 8), v = random_values(91, 1, 1, 32, 8);
  Buckets buckets = random_buckets(92, 1, 1, 2, 32, 4);
  Values out(1, 1, 32, 8, canary());
  ReformerOptions options;
  options.bucket = 8;
  const auto refused = [&](const fovea::Status& status, const char* words) {
    INFO(status.message());
    CHECK(!status.ok());
    CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
    CHECK(std::all_of(out.data.begin(), out.data.end(), is_canary));
  };
  const auto call = [&] { return fovea::reformer_attend(qk.view(), v.view(), buckets.view(), out.view(), options); };
  options.bucket = 12;
  refused(call(), "32 tokens are no multiple of twice the bucket of 12");
  options.bucket = 8;
  buckets.data[5] = 4;
  refused(call(), "buckets[0, 0, 0, 5] is 4, there are 4");
  buckets.data[5] = 0;
  options.scale = kNan;
  refused(call(), "not finite");
  options.scale = {};
  std::byte little[8];
  options.workspace = little;
  refused(call(), "workspace has 8 bytes");
  options.workspace = {};
  refused(fovea::reformer_attend(qk.view(), out.view(), buckets.view(), out.view(), options), "overlaps");
  refused(fovea::reformer_attend(qk.view(), only_pos(v.view(), 0, 16), buckets.view(), out.view(), options),
          "v is [1, 1, 16, 8]");
  const Values rotations = random_values(93, 1, 8, 2, 3);
  const View<const float, 3> wrong{rotations.data.data(), {8, 2, 3}, {6, 3, 1}};
  refused(fovea::reformer_attention(qk.view(), v.view(), wrong, out.view(), options), "rotations are [8, 2, 3]");
}
