// SPDX-License-Identifier: Apache-2.0
#include "fovea/mechanisms/shaw.hpp"

#include "fovea/attention.hpp"
#include "fovea/reference/shaw.hpp"
#include "mechanisms/relative_support.hpp"

namespace {

using namespace test;
using fovea::ShawTables;
using fovea::Status;
namespace reference = fovea::reference;

Expected expected(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, const AttentionOptions& options,
                  const ShawTables& tables) {
  const index_t clip = tables.clip();
  return expect_relative(
      q, k, v, options,
      [&](Tensor<double> out, View<double, 3> lse, const auto& watch) {
        reference::shaw(q, k, v, out, tables.k, tables.v, options, lse, watch);
      },
      [&](const reference::RelativePair& pair, index_t d) {
        if (!tables.v) return 0.;
        return double{
            tables.v(tables.v.extent[0] == 1 ? 0 : pair.q_head, std::clamp(pair.key - pair.pos, -clip, clip) + clip, d)};
      },
      2 * clip + 4);
}

fovea::AttentionShape shape_of(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v) {
  return {q.extent[0], q.extent[1], k.extent[1], q.extent[2], k.extent[2], q.extent[3], v.extent[3]};
}

// In a workspace of exactly the size announced.
template <class TK, class Out>
Status run(fovea::Operand q, fovea::View<TK, 4> k, fovea::View<TK, 4> v, Out out, AttentionOptions options,
           const ShawTables& tables) {
  const fovea::AttentionShape shape{q.extent[0], q.extent[1], k.extent[1], q.extent[2],
                                    k.extent[2], q.extent[3], v.extent[3]};
  PoisonedBytes workspace(fovea::shaw_workspace_bytes(shape, tables, options.executor.lanes()), 4);
  options.workspace = workspace.bytes();
  const Status status = fovea::shaw_attention(q, k, v, out, tables, options);
  CHECK(workspace.guards_intact());
  return status;
}

Result attend_shaw(const Dense& x, AttentionOptions options, const ShawTables& tables) {
  Result r = unwritten(x.q.view(), x.v.view());
  options.lse = r.lse_view();
  const Status status = run(x.q.view(), x.k.view(), x.v.view(), r.out.view(), options, tables);
  INFO(status.message());
  REQUIRE(status.ok());
  return r;
}

}   // namespace

TEST_CASE("Shaw against the reference", "[shaw]") {
  Random random(31);
  for (const Problem& p : relative_grid()) {
    const Instance x(p);
    const index_t clip = random.pick<index_t>({0, 1, 3, 8, 20}), rows = 2 * clip + 1;
    const Table a_k(random.bits(), random.one_in(2) ? 1 : p.q_heads, rows, p.dim_qk);
    const Table a_v(random.bits(), random.one_in(2) ? 1 : p.q_heads, rows, p.dim_v);
    ShawTables tables;
    const index_t which = random.below(4);
    if (which != 0) tables.k = a_k.view();
    if (which != 1) tables.v = a_v.view();
    INFO(describe(p) << ", clip " << clip << ", tables " << which);
    CHECK(check_call(x, expected(x.q, x.k, x.v, x.options(), tables),
                     [&](auto q, auto k, auto v, auto out, const AttentionOptions& options) {
                       return run(q, k, v, out, options, tables);
                     }) == "");
  }
}

TEST_CASE("Shaw by hand", "[shaw]") {
  // Scores 1, 0, -1 come from the relative keys alone, so the values' weights are those of the golden table.
  const Values q(1, 1, 3, 1, 1.f), k(1, 1, 3, 1, 0.f), v(1, 1, 3, 1, 0.f);
  const float a_k[] = {0, 0, 1, 0, -1}, a_v[] = {0, 0, 1, 10, 100};
  const ShawTables tables{{a_k, {1, 5, 1}, {5, 1, 1}}, {a_v, {1, 5, 1}, {5, 1, 1}}};
  Values out(1, 1, 3, 1);
  AttentionOptions options;
  options.scale = 1.f;
  std::vector<float> lse(3);
  options.lse = {lse.data(), {1, 1, 3}, {3, 3, 1}};
  REQUIRE(run(q.view(), k.view(), v.view(), out.view(), options, tables).ok());
  CHECK(out.data[0] == Catch::Approx(0.6652410 + 2.447285 + 9.00306).epsilon(1e-6));
  CHECK(lse[0] == Catch::Approx(1.4076060).epsilon(1e-6));
}

TEST_CASE("Shaw with tables of zeros is plain attention", "[shaw][identities]") {
  const Dense x(32, 2, 4, 2, 19, 70, 16, 20);
  std::vector<float> zeros(9 * 20);
  const ShawTables tables{{zeros.data(), {1, 9, 16}, {0, 16, 1}}, {zeros.data(), {1, 9, 20}, {0, 20, 1}}};
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    options.causal = Causal::bottom_right;
    CHECK(same_bits(attend(x, options), attend_shaw(x, options, tables)));
  }
}

TEST_CASE("Shaw clipped to nothing adds a constant vector", "[shaw][identities]") {
  const Dense x(33, 1, 2, 2, 18, 40, 8, 12);
  const Table a_k(34, 2, 1, 8), a_v(35, 2, 1, 12);
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    const ShawTables tables{a_k.view(), a_v.view()};
    const Result plain = attend(x, options), r = attend_shaw(x, options, tables);
    const Expected e = expect(x.q.view(), x.k.view(), x.v.view(), options),
                   f = expected(x.q.view(), x.k.view(), x.v.view(), options, tables);
    for (index_t h = 0; h < 2; ++h) {
      for (index_t i = 0; i < 18; ++i) {
        for (index_t d = 0; d < 12; ++d) {
          const auto n = static_cast<std::size_t>((h * 18 + i) * 12 + d);
          CHECK(std::abs(double{r.out.data[n]} - double{plain.out.data[n]} - double{a_v.view()(h, 0, d)}) <=
                e.out_error[n] + f.out_error[n]);
        }
      }
    }
  }
}

TEST_CASE("Shaw without clipping is a dense bias and dense values", "[shaw][identities]") {
  // One query: k_j + a_j and v_j + a_j can be written out.
  const index_t len = 33, clip = 40;
  const Dense x(36, 1, 2, 1, 1, len, 8, 9);
  const Table a_k(37, 1, 2 * clip + 1, 8), a_v(38, 1, 2 * clip + 1, 9);
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    const index_t pos = 11;
    options.q_offset = {&pos, 1};
    Dense moved = x;
    for (index_t j = 0; j < len; ++j) {
      for (index_t d = 0; d < 8; ++d) moved.k.view()(0, 0, j, d) += a_k.view()(0, j - pos + clip, d);
      for (index_t d = 0; d < 9; ++d) moved.v.view()(0, 0, j, d) += a_v.view()(0, j - pos + clip, d);
    }
    const ShawTables tables{a_k.view(), a_v.view()};
    const Result r = attend_shaw(x, options, tables), dense = attend(moved, options);
    const Expected e = expected(x.q.view(), x.k.view(), x.v.view(), options, tables);
    CHECK(distance(r, dense, e) <= 1);
  }
}

TEST_CASE("Shaw: a call that is cut into blocks has the bits of its parts", "[shaw]") {
  // 520 queries of 2 x 8.2 thousand floats and head: blocks of 254.
  const index_t clip = 4100, len = 520, heads = 2, dim = 2;
  const Dense x(39, 2, heads, 1, len, len, dim, dim);
  const Table a_k(40, 1, 2 * clip + 1, dim), a_v(41, 1, 2 * clip + 1, dim);
  const ShawTables tables{a_k.view(), a_v.view()};
  AttentionOptions options;
  options.regime = Regime::prefill;
  options.causal = Causal::bottom_right;
  CHECK(fovea::shaw_workspace_bytes(shape_of(x.q.view(), x.k.view(), x.v.view()), tables) < (std::size_t{34} << 20));
  const Result whole = attend_shaw(x, options, tables);
  const index_t first = 300, count = 3;
  for (index_t b = 0; b < 2; ++b) {
    Result part = unwritten(only_batch(only_pos(x.q.view(), first, count), b), only_batch(x.v.view(), b));
    options.lse = part.lse_view();
    options.q_offset = {&first, 1};
    REQUIRE(run(only_batch(only_pos(x.q.view(), first, count), b), only_batch(x.k.view(), b), only_batch(x.v.view(), b),
                part.out.view(), options, tables)
                .ok());
    CHECK(same_rows(whole, b, first, part));
    const Expected e = expected(only_batch(only_pos(x.q.view(), first, count), b), only_batch(x.k.view(), b),
                                only_batch(x.v.view(), b), options, tables);
    CHECK(distance(part, e) <= 1);
  }
  // Ragged: each sequence with a cut of its own.
  Values q(1, heads, 2 * len, dim), k(1, 1, 2 * len, dim), v(1, 1, 2 * len, dim);
  for (index_t b = 0; b < 2; ++b) {
    for (index_t i = 0; i < len; ++i) {
      for (index_t d = 0; d < dim; ++d) {
        for (index_t h = 0; h < heads; ++h) q.view()(0, h, b * len + i, d) = x.q.view()(b, h, i, d);
        k.view()(0, 0, b * len + i, d) = x.k.view()(b, 0, i, d);
        v.view()(0, 0, b * len + i, d) = x.v.view()(b, 0, i, d);
      }
    }
  }
  const index_t cu[] = {0, len, 2 * len};
  options.q_offset = {};
  options.cu_len_q = options.cu_len_k = cu;
  Result ragged = unwritten(q.view(), v.view());
  options.lse = ragged.lse_view();
  REQUIRE(run(q.view(), k.view(), v.view(), ragged.out.view(), options, tables).ok());
  for (index_t b = 0; b < 2; ++b) {
    for (index_t h = 0; h < heads; ++h) {
      for (index_t i = 0; i < len; ++i) {
        REQUIRE(
            same_bits(std::span(&ragged.out.view()(0, h, b * len + i, 0), 2), std::span(&whole.out.view()(b, h, i, 0), 2)));
        REQUIRE(ragged.lse_at(0, h, b * len + i) == whole.lse_at(b, h, i));
      }
    }
  }
}

TEST_CASE("Shaw: rows that break careless kernels", "[shaw]") {
  const index_t len = 300;
  const Table a_k(42, 1, 9, 1), a_v(43, 1, 9, 7);
  const ShawTables tables{a_k.view(), a_v.view()};
  for (const int scores : {0, 1, 2, 3}) {
    Dense x(44, 1, 1, 1, 5, len, 1, 7);
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
          distance(attend_shaw(x, options, tables), expected(x.q.view(), x.k.view(), x.v.view(), options, tables));
      INFO("scores " << scores << ", " << name(regime) << ": " << off);
      CHECK(off <= 1);
      options.causal = Causal::top_left;
      for (const index_t offset : {index_t{-5}, index_t{-4}}) {
        options.q_offset = {&offset, 1};
        const Result r = attend_shaw(x, options, tables);
        CHECK(r.at(0, 0, 3, 0) == 0.f);
        CHECK(r.lse_at(0, 0, 3) == -kInfinity);
        // One key: weight times value, times the reciprocal of the weight, and a sum.
        const double value = x.v.data[0], more = a_v.view()(0, 4, 0), wanted = offset == -5 ? 0 : value + more;
        CHECK(std::abs(double{r.at(0, 0, 4, 0)} - wanted) <=
              (offset == -5 ? 0 : 4 * kUnit * (std::abs(value) + std::abs(more))));
      }
    }
  }
}

TEST_CASE("Shaw: later keys leave no trace, lanes and neighbours change no bit", "[shaw]") {
  const index_t heads = 2, len = 40, dim = 16;
  const Table a_k(45, heads, 11, dim), a_v(46, heads, 11, dim);
  const ShawTables tables{a_k.view(), a_v.view()};
  const Dense x(47, 1, heads, 1, len, len, dim, dim);
  Dense changed = x;
  for (std::size_t n = 30 * 16; n < changed.k.data.size(); ++n)
    changed.k.data[n] = changed.v.data[n] = n % 2 == 0 ? kNan : 1e30f;
  ThreadPerLane threads;
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    options.causal = Causal::top_left;
    const Result a = attend_shaw(x, options, tables), b = attend_shaw(changed, options, tables);
    for (index_t h = 0; h < heads; ++h) {
      for (index_t i = 0; i < 30; ++i)
        CHECK(same_bits(std::span(&a.out.view()(0, h, i, 0), 16), std::span(&b.out.view()(0, h, i, 0), 16)));
    }
    options.executor = {threads, 3};
    CHECK(same_bits(a, attend_shaw(x, options, tables)));
    // A row of the value table that no visible key is at leaves no trace either.
    Table poisoned = a_v;
    for (index_t h = 0; h < heads; ++h) {
      for (index_t d = 0; d < dim; ++d) poisoned.store.data()[(h * 11 + 6) * dim + d] = kNan;
    }
    CHECK(same_bits(a, attend_shaw(x, options, {a_k.view(), poisoned.view()})));
  }
}

TEST_CASE("Shaw with a sink: the weights collected by distance shrink with the row", "[shaw]") {
  const Dense x(48, 1, 2, 1, 17, 30, 8, 8);
  const Table a_k(49, 1, 5, 8), a_v(50, 1, 5, 8);
  const float sink[] = {1.f, 9.f};
  AttentionOptions options;
  options.sink = sink;
  for (const ShawTables& tables : {ShawTables{a_k.view(), {}}, ShawTables{{}, a_v.view()}, ShawTables{a_k.view(), a_v.view()}})
    CHECK(distance(attend_shaw(x, options, tables), expected(x.q.view(), x.k.view(), x.v.view(), options, tables)) <= 1);
}

TEST_CASE("Shaw from bf16 tensors", "[shaw]") {
  const Dense x(51, 1, 2, 1, 20, 40, 16, 16);
  const auto narrow = [](const Values& values) {
    std::vector<fovea::bf16> all;
    for (const float f : values.data) all.push_back(fovea::convert<fovea::bf16>(f));
    return all;
  };
  const auto widen = [](const std::vector<fovea::bf16>& from, Values to) {
    for (std::size_t n = 0; n < from.size(); ++n) to.data[n] = fovea::convert<float>(from[n]);
    return to;
  };
  const auto q = narrow(x.q), k = narrow(x.k), v = narrow(x.v);
  Dense rounded = x;
  rounded.q = widen(q, x.q);
  rounded.k = widen(k, x.k);
  rounded.v = widen(v, x.v);
  const Table a_k(52, 1, 7, 16), a_v(53, 1, 7, 16);
  const ShawTables tables{a_k.view(), a_v.view()};
  Result r = unwritten(x.q.view(), x.v.view());
  AttentionOptions options;
  options.lse = r.lse_view();
  REQUIRE(run(fovea::bhsd(q.data(), 1, 2, 20, 16), fovea::bhsd(k.data(), 1, 1, 40, 16), fovea::bhsd(v.data(), 1, 1, 40, 16),
              r.out.view(), options, tables)
              .ok());
  CHECK(same_bits(r, attend_shaw(rounded, options, tables)));
}

TEST_CASE("Shaw: what is refused, with numbers", "[shaw]") {
  const Dense x(54, 1, 2, 1, 4, 6, 8, 8);
  const Table a_k(55, 1, 5, 8), three(56, 3, 5, 8), even(57, 1, 4, 8), wide(58, 1, 5, 9);
  Values out(1, 2, 4, 8, canary());
  std::vector<std::byte> workspace(1 << 21);
  const auto message = [&](const ShawTables& tables, AttentionOptions options = {}) {
    if (options.workspace.empty()) options.workspace = workspace;
    const Status status = fovea::shaw_attention(x.q.view(), x.k.view(), x.v.view(), out.view(), tables, options);
    return std::string(status.message());
  };
  using Catch::Matchers::ContainsSubstring;
  CHECK(fovea::shaw_workspace_bytes({1, 0, 1, 4, 6, 8, 8}, {a_k.view(), {}}) == 0);
  CHECK_THAT(message({}), ContainsSubstring("has neither"));
  CHECK_THAT(message({three.view(), {}}), ContainsSubstring("[3, 5, 8], must be [1 or 2, 5, 8]"));
  CHECK_THAT(message({even.view(), {}}), ContainsSubstring("4 distances"));
  CHECK_THAT(message({a_k.view(), wide.view()}), ContainsSubstring("[1, 5, 9]"));
  CHECK_THAT(message({a_k.view(), {out.data.data(), {1, 5, 8}, {0, 8, 1}}}), ContainsSubstring("overlaps a Shaw table"));
  AttentionOptions options;
  options.workspace = std::span(workspace).first(10);
  CHECK_THAT(message({a_k.view(), {}}, options), ContainsSubstring("workspace has 10 bytes"));
  options = {};
  options.softcap = 3.f;
  CHECK_THAT(message({a_k.view(), {}}, options), ContainsSubstring("softcap (3)"));
  for (const float y : out.data) CHECK(is_canary(y));
}
