// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/transformer_xl.hpp"

#include "fovea/attention.hpp"
#include "fovea/reference/transformer_xl.hpp"
#include "mechanisms/relative_support.hpp"

namespace {

using namespace test;
using fovea::Status;
using fovea::XlTables;
namespace reference = fovea::reference;

Expected expected(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, const AttentionOptions& options,
                  const XlTables& tables) {
  return expect_relative(q, k, v, options, [&](Tensor<double> out, View<double, 3> lse, const auto& watch) {
    reference::transformer_xl(q, k, v, out, tables.r, tables.ahead, tables.content_bias, tables.position_bias, options, lse,
                              watch);
  });
}

Status run(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<float> out, AttentionOptions options,
           const XlTables& tables) {
  const fovea::AttentionShape shape{q.extent[0], q.extent[1], k.extent[1], q.extent[2],
                                    k.extent[2], q.extent[3], v.extent[3]};
  PoisonedBytes workspace(fovea::transformer_xl_workspace_bytes(shape, tables, options), 8);
  options.workspace = workspace.bytes();
  const Status status = fovea::transformer_xl_attention(q, k, v, out, tables, options);
  CHECK(workspace.guards_intact());
  return status;
}

Result attend_xl(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, AttentionOptions options,
                 const XlTables& tables) {
  Result r = unwritten(q, v);
  options.lse = r.lse_view();
  const Status status = run(q, k, v, r.out.view(), options, tables);
  INFO(status.message());
  REQUIRE(status.ok());
  return r;
}
Result attend_xl(const Dense& x, const AttentionOptions& options, const XlTables& tables) {
  return attend_xl(x.q.view(), x.k.view(), x.v.view(), options, tables);
}

}   // namespace

TEST_CASE("Transformer-XL against the reference", "[transformer_xl]") {
  Random random(61);
  for (const bool causal : {true, false}) {
    for (const Problem& p : relative_grid(causal)) {
      const Instance x(p);
      const index_t ahead = causal ? 0 : random.pick<index_t>({1, 5, 300}),
                    rows = ahead + random.pick<index_t>({1, 8, 60, 400});
      const Table r(random.bits(), random.one_in(2) ? 1 : p.q_heads, rows, p.dim_qk);
      const Table u(random.bits(), 1, random.one_in(2) ? 1 : p.q_heads, p.dim_qk), w(random.bits(), 1, p.q_heads, p.dim_qk);
      XlTables tables{r.view(), ahead, {}, {}};
      if (!random.one_in(4)) tables.content_bias = u.flat();
      if (!random.one_in(4)) tables.position_bias = w.flat();
      INFO(describe(p) << ", r of " << rows << ", " << ahead << " ahead");
      CHECK(check_call(x, expected(x.q, x.k, x.v, x.options(), tables),
                       [&](auto q, auto k, auto v, auto out, const AttentionOptions& options) {
                         return run(q, k, v, out, options, tables);
                       }) == "");
    }
  }
}

TEST_CASE("Transformer-XL without r, u and v is plain attention", "[transformer_xl][identities]") {
  const Dense x(62, 2, 4, 2, 19, 70, 16, 20);
  const std::vector<float> zeros(80 * 16);
  const XlTables tables{
      {zeros.data(), {1, 80, 16}, {0, 16, 1}}, 0, {zeros.data(), {4, 16}, {16, 1}}, {zeros.data(), {4, 16}, {16, 1}}};
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    options.causal = Causal::bottom_right;
    CHECK(same_bits(attend(x, options), attend_xl(x, options, tables)));
  }
}

TEST_CASE("Transformer-XL with u alone is attention of moved queries", "[transformer_xl][identities]") {
  const index_t heads = 3;
  const Dense x(63, 1, heads, 1, 20, 45, 12, 9);
  const Table u(64, 1, heads, 12);
  const std::vector<float> zeros(12);
  Dense moved = x;
  for (index_t h = 0; h < heads; ++h) {
    for (index_t i = 0; i < 20; ++i) {
      for (index_t d = 0; d < 12; ++d) moved.q.view()(0, h, i, d) += u.flat()(h, d);
    }
  }
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    options.causal = Causal::bottom_right;
    CHECK(
        same_bits(attend(moved, options), attend_xl(x, options, {{zeros.data(), {1, 1, 12}, {0, 12, 1}}, 0, u.flat(), {}})));
  }
}

TEST_CASE("Transformer-XL's second product is a dense bias, shifted row by row", "[transformer_xl][identities]") {
  // v and r of ones and a number: the term is a function of the distance alone.
  const index_t len_q = 21, len_k = 50, memory = len_k - len_q;
  const Dense x(65, 1, 1, 1, len_q, len_k, 1, 8);
  Dense silent = x;
  std::fill(silent.q.data.begin(), silent.q.data.end(), 0.f);
  std::vector<float> r(static_cast<std::size_t>(len_k));
  Random random(66);
  for (float& y : r) y = random.normal();
  const float one = 1;
  Values bias(1, 1, len_q, len_k);
  for (index_t i = 0; i < len_q; ++i) {
    for (index_t j = 0; j <= i + memory; ++j) bias.view()(0, 0, i, j) = r[static_cast<std::size_t>(i + memory - j)];
  }
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    options.causal = Causal::bottom_right;
    options.scale = 1.f;
    const Result by_distance =
        attend_xl(silent, options, {{r.data(), {1, len_k, 1}, {0, 1, 1}}, 0, {}, {&one, {1, 1}, {0, 0}}});
    options.bias = bias.view();
    CHECK(same_bits(by_distance, attend(silent, options)));
  }
}

TEST_CASE("Transformer-XL: a memory is keys before the queries", "[transformer_xl][identities]") {
  // The last queries of a long segment are the queries of a short one with a memory.
  const index_t len = 90, last = 31;
  const Dense x(67, 2, 2, 1, len, len, 16, 16);
  const Table r(68, 2, len, 16), u(69, 1, 2, 16), w(70, 1, 2, 16);
  const XlTables tables{r.view(), 0, u.flat(), w.flat()};
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    options.causal = Causal::bottom_right;
    const Result whole = attend_xl(x, options, tables);
    const Result with_memory = attend_xl(only_pos(x.q.view(), len - last, last), x.k.view(), x.v.view(), options, tables);
    for (index_t b = 0; b < 2; ++b) {
      for (index_t h = 0; h < 2; ++h) {
        for (index_t i = 0; i < last; ++i)
          REQUIRE(same_bits(std::span(&whole.out.view()(b, h, len - last + i, 0), 16),
                            std::span(&with_memory.out.view()(b, h, i, 0), 16)));
      }
    }
  }
}

TEST_CASE("Transformer-XL: a call that is cut into blocks", "[transformer_xl]") {
  // 16 heads of 900 queries and keys: 58 KiB a query and more, so blocks of 256 queries, one sequence after the other.
  const index_t heads = 16, len = 900;
  const Dense x(71, 2, heads, 1, len, len, 2, 2);
  const Table r(72, 1, len, 2), u(73, 1, heads, 2), w(74, 1, heads, 2);
  const XlTables tables{r.view(), 0, u.flat(), w.flat()};
  AttentionOptions options;
  options.regime = Regime::prefill;
  options.causal = Causal::bottom_right;
  const fovea::AttentionShape shape{2, heads, 1, len, len, 2, 2};
  CHECK(fovea::transformer_xl_workspace_bytes(shape, tables, options) < (std::size_t{36} << 20));
  const Result whole = attend_xl(x, options, tables);
  for (const index_t first : {index_t{0}, index_t{250}, index_t{889}}) {
    const index_t count = 11;
    AttentionOptions part_options = options;
    part_options.q_offset = {&first, 1};
    for (index_t b = 0; b < 2; ++b) {
      const auto q = only_batch(only_pos(x.q.view(), first, count), b), k = only_batch(x.k.view(), b),
                 v = only_batch(x.v.view(), b);
      const Result part = attend_xl(q, k, v, part_options, tables);
      CHECK(same_rows(whole, b, first, part));
      CHECK(distance(part, expected(q, k, v, part_options, tables)) <= 1);
    }
  }
  ThreadPerLane threads;
  options.executor = {threads, 3};
  CHECK(same_bits(whole, attend_xl(x, options, tables)));
}

TEST_CASE("Transformer-XL: rows that break careless kernels", "[transformer_xl]") {
  const index_t len = 300;
  const Table r(75, 1, 40, 1);
  const XlTables tables{r.view(), 0, {}, {}};
  for (const int scores : {0, 1, 2, 3}) {
    Dense x(76, 1, 1, 1, 5, len, 1, 7);
    std::fill(x.q.data.begin(), x.q.data.end(), 1.f);
    for (index_t j = 0; j < len; ++j) {
      const auto f = static_cast<float>(j);
      x.k.data[static_cast<std::size_t>(j)] = scores == 0   ? f
                                              : scores == 1 ? -f
                                              : scores == 2 ? 1e4f
                                                            : (j % 2 == 0 ? 1e4f : -1e4f);
    }
    for (const Regime regime : kRegimes) {
      AttentionOptions options;
      options.scale = 1.f;
      options.regime = regime;
      options.causal = Causal::bottom_right;
      const double off =
          distance(attend_xl(x, options, tables), expected(x.q.view(), x.k.view(), x.v.view(), options, tables));
      INFO("scores " << scores << ", " << name(regime) << ": " << off);
      CHECK(off <= 1);
      options.causal = Causal::top_left;
      for (const index_t offset : {index_t{-5}, index_t{-4}}) {
        options.q_offset = {&offset, 1};
        const Result y = attend_xl(x, options, tables);
        CHECK(y.at(0, 0, 3, 0) == 0.f);
        CHECK(y.lse_at(0, 0, 3) == -kInfinity);
        CHECK(std::abs(double{y.at(0, 0, 4, 0)} - (offset == -5 ? 0. : double{x.v.data[0]})) <=
              3 * kUnit * std::abs(double{x.v.data[0]}));
      }
    }
  }
}

TEST_CASE("Transformer-XL: later keys leave no trace, lanes change no bit", "[transformer_xl]") {
  const index_t heads = 2, len = 40, dim = 16;
  const Table r(77, heads, len, dim), u(78, 1, heads, dim), w(79, 1, heads, dim);
  const XlTables tables{r.view(), 0, u.flat(), w.flat()};
  const Dense x(80, 1, heads, 1, len, len, dim, dim);
  Dense changed = x;
  for (std::size_t n = 30 * 16; n < changed.k.data.size(); ++n)
    changed.k.data[n] = changed.v.data[n] = n % 2 == 0 ? kNan : 1e30f;
  ThreadPerLane threads;
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    options.causal = Causal::top_left;
    const Result a = attend_xl(x, options, tables), b = attend_xl(changed, options, tables);
    for (index_t h = 0; h < heads; ++h) {
      for (index_t i = 0; i < 30; ++i)
        CHECK(same_bits(std::span(&a.out.view()(0, h, i, 0), 16), std::span(&b.out.view()(0, h, i, 0), 16)));
    }
    options.executor = {threads, 3};
    CHECK(same_bits(a, attend_xl(x, options, tables)));
  }
}

TEST_CASE("Transformer-XL's sinusoids", "[transformer_xl]") {
  std::vector<float> rows(4 * 4);
  REQUIRE(fovea::xl_sinusoids(-1, {rows.data(), {4, 4}, {4, 1}}).ok());
  const double golden[4][4] = {{-0.841470985, -0.00999983333, 0.540302306, 0.999950000},
                               {0, 0, 1, 1},
                               {0.841470985, 0.00999983333, 0.540302306, 0.999950000},
                               {0.909297427, 0.0199986667, -0.416146837, 0.999800007}};
  for (std::size_t n = 0; n < 4; ++n) {
    for (std::size_t d = 0; d < 4; ++d) CHECK(double{rows[4 * n + d]} == Catch::Approx(golden[n][d]).epsilon(1e-7));
  }
  CHECK_THAT(fovea::xl_sinusoids(0, {rows.data(), {4, 3}, {3, 1}}).message(), Catch::Matchers::ContainsSubstring("dim 3"));
}

TEST_CASE("Transformer-XL: what is refused, with numbers", "[transformer_xl]") {
  const Dense x(81, 1, 2, 1, 4, 6, 8, 8);
  const Table r(82, 1, 6, 8), three(83, 3, 6, 8), u(84, 1, 3, 8);
  Values out(1, 2, 4, 8, canary());
  std::vector<std::byte> workspace(1 << 21);
  const auto message = [&](const XlTables& tables, AttentionOptions options = {}) {
    if (options.workspace.empty()) options.workspace = workspace;
    const Status status = fovea::transformer_xl_attention(x.q.view(), x.k.view(), x.v.view(), out.view(), tables, options);
    return std::string(status.message());
  };
  using Catch::Matchers::ContainsSubstring;
  AttentionOptions causal;
  causal.causal = Causal::bottom_right;
  CHECK_THAT(message({}), ContainsSubstring("r is [0, 0, 0], must be [1 or 2, distances, 8]"));
  CHECK_THAT(message({three.view(), 0, {}, {}}, causal), ContainsSubstring("r is [3, 6, 8]"));
  CHECK_THAT(message({r.view(), 0, {}, {}}), ContainsSubstring("keys ahead"));
  CHECK_THAT(message({r.view(), 6, {}, {}}), ContainsSubstring("6 of them ahead"));
  CHECK_THAT(message({r.view(), 0, u.flat(), {}}, causal), ContainsSubstring("content_bias is [3, 8], must be [1 or 2, 8]"));
  CHECK_THAT(message({r.view(), 0, {}, {out.data.data(), {1, 8}, {8, 1}}}, causal),
             ContainsSubstring("overlaps position_bias"));
  causal.workspace = std::span(workspace).first(10);
  CHECK_THAT(message({r.view(), 0, {}, {}}, causal), ContainsSubstring("workspace has 10 bytes"));
  for (const float y : out.data) CHECK(is_canary(y));
}
