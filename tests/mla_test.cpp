// SPDX-License-Identifier: Apache-2.0
#include "fovea/mla.hpp"

#include <cmath>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/engine/parts/rope.hpp"
#include "fovea/reference/mla.hpp"
#include "fovea/reference/stored.hpp"
#include "fovea/simd/quantise.hpp"
#include "support/executors.hpp"
#include "support/poison.hpp"
#include "support/random.hpp"
#include "support/tolerance.hpp"

namespace {

using fovea::AttentionOptions;
using fovea::Causal;
using fovea::Format;
using fovea::index_t;
using fovea::Kv;
using fovea::MlaDims;
using fovea::MlaForm;
using fovea::Operand;
using fovea::Regime;
using fovea::Tensor;
using fovea::View;
using Compiled =
    fovea::Formats<Format::f32, Format::f64, Format::bf16, Format::f16, Format::i8_token, Format::i4_g32, Format::i4_g64,
                   Format::i4_g32_zero, Format::i4_g64_zero, Format::e4m3, Format::e5m2, Format::latent_fp8>;

constexpr MlaDims kSmall{4, 8, 6, 20, 5};
constexpr MlaDims kV2Lite{16, 128, 64, 512, 128}, kKimi{64, 128, 64, 512, 128}, kV3{128, 128, 64, 512, 128};

struct Lengths {
  index_t queries, keys;
};

// A ragged batch over a cache of pages whose unused slots are NaN, block table and all.
struct Problem {
  MlaDims dims;
  Format format;
  index_t page_size;
  std::vector<index_t> cu_len_q{0}, len_k;
  std::vector<float> q;            // [head, token, nope + rope]
  std::vector<fovea::bf16> kv_b;   // [head, nope + value, latent]
  std::vector<std::byte> pool;
  std::vector<std::int32_t> table;   // [sequence, page]
  index_t pages = 0, table_width = 0;

  Problem(const MlaDims& dims_, std::initializer_list<Lengths> lengths, Format format_ = Format::bf16,
          std::uint64_t seed = 1, index_t page_size_ = 4)
      : dims(dims_), format(format_), page_size(page_size_) {
    for (const auto& [queries, keys] : lengths) {
      cu_len_q.push_back(cu_len_q.back() + queries);
      len_k.push_back(keys);
      table_width = std::max(table_width, (keys + page_size - 1) / page_size + 1);
    }
    test::Random random(seed);
    q.resize(static_cast<std::size_t>(dims.heads * tokens() * q_dim()));
    for (float& x : q) x = random.uniform(-1.7f, 1.7f);
    kv_b.resize(static_cast<std::size_t>(dims.heads * (dims.nope + dims.value) * dims.latent));
    const float gain = 1.7f / std::sqrt(static_cast<float>(dims.latent));
    for (fovea::bf16& w : kv_b) w = fovea::convert<fovea::bf16>(random.uniform(-gain, gain));
    table.assign(static_cast<std::size_t>(sequences() * table_width), -7);
    std::vector<index_t> rows;
    for (index_t s = 0; s < sequences(); ++s) {
      for (index_t page = 0; page * page_size < len_k[static_cast<std::size_t>(s)]; ++page)
        table[static_cast<std::size_t>(s * table_width + page)] = static_cast<std::int32_t>(pages++);
    }
    // Pages in an order of their own.
    for (std::int32_t& page : table) {
      if (page >= 0) page = static_cast<std::int32_t>((page * 7 + 3) % (pages % 7 == 0 ? pages + 1 : pages));
    }
    if (pages % 7 == 0) ++pages;
    pool.assign(static_cast<std::size_t>(pages * page_size * row_bytes()), std::byte{0xff});
    std::vector<float> row(static_cast<std::size_t>(row_dim()));
    for (index_t s = 0; s < sequences(); ++s) {
      for (index_t j = 0; j < len_k[static_cast<std::size_t>(s)]; ++j) {
        for (float& x : row) x = random.uniform(-1.7f, 1.7f);
        fovea::quantise_row(format, row.data(), 1, row_dim(), nullptr, row_at(s, j));
      }
    }
  }

  index_t sequences() const { return static_cast<index_t>(len_k.size()); }
  index_t tokens() const { return cu_len_q.back(); }
  index_t q_dim() const { return dims.nope + dims.rope; }
  index_t row_dim() const { return dims.latent + dims.rope; }
  index_t row_bytes() const { return fovea::row_bytes(format, row_dim()); }
  std::byte* row_at(index_t s, index_t j) {
    const index_t page = table[static_cast<std::size_t>(s * table_width + j / page_size)];
    return pool.data() + (page * page_size + j % page_size) * row_bytes();
  }
  double latent(index_t s, index_t j, index_t d) {
    return fovea::reference::stored_value(format, row_at(s, j), row_dim(), d);
  }
  Tensor<const float> q_view() const { return fovea::bhsd(q.data(), 1, dims.heads, tokens(), q_dim()); }
  Tensor<const fovea::bf16> kv_b_view() const {
    return fovea::bhsd(kv_b.data(), 1, dims.heads, dims.nope + dims.value, dims.latent);
  }
  Kv kv() const {
    return fovea::latent_pages(fovea::stored_rows(pool.data(), format, row_dim(), 1, page_size), dims, pages, page_size,
                               View<const std::int32_t, 2>{table.data(), {sequences(), table_width}, {table_width, 1}});
  }
  AttentionOptions options(Causal causal = Causal::bottom_right) const {
    return {.causal = causal, .len_k = len_k, .cu_len_q = cu_len_q};
  }
};

struct Got {
  std::vector<float> out, lse;   // [head, token, value], [head, token]
};

Got run(const Problem& p, MlaForm form, AttentionOptions options, const fovea::MlaPlan* plan = nullptr) {
  Got got;
  got.out.assign(static_cast<std::size_t>(p.dims.heads * p.tokens() * p.dims.value), test::canary());
  got.lse.assign(static_cast<std::size_t>(p.dims.heads * p.tokens()), test::canary());
  options.lse = {got.lse.data(), {1, p.dims.heads, p.tokens()}, {p.dims.heads * p.tokens(), p.tokens(), 1}};
  const Tensor<float> out = fovea::bhsd(got.out.data(), 1, p.dims.heads, p.tokens(), p.dims.value);
  const fovea::Status status = plan == nullptr
                                   ? fovea::mla<Compiled>(p.q_view(), p.kv_b_view(), p.kv(), out, options, form)
                                   : fovea::mla<Compiled>(*plan, p.q_view(), p.kv_b_view(), p.kv(), out, options);
  INFO(status.message());
  REQUIRE(status.ok());
  return got;
}

bool same_bits(const Got& a, const Got& b) {
  return a.out.size() == b.out.size() && std::memcmp(a.out.data(), b.out.data(), 4 * a.out.size()) == 0 &&
         std::memcmp(a.lse.data(), b.lse.data(), 4 * a.lse.size()) == 0;
}

// What the reference says about some heads, with budgets of error. u = 2^-24, N = nope + latent + rope.
//
// Both forms compute a score as two sums of products of three numbers: expanded sums latent numbers, then nope + rope of
// them; absorbed nope, then latent + rope. First order, each sum of n fused products is off by n u times the sum of its
// magnitudes, so together with folding the scale in the score is off by (N + 8) u dots, dots the sum of |scale q W c| and
// |scale q_pe k_pe|. The exponential's argument, the sums over keys and the rescaling are those of attention
// (docs/numerics.md). Values pass one more sum over latent numbers, before the sum over keys or behind it: (latent + 2) u
// times the sum of |p W c|. bf16 panels round q, k, v and weights to 2^-8 relative each: 2 * 2^-8 dots in the score, 2 *
// 2^-8 in the output.
struct Wanted {
  std::vector<index_t> heads;
  std::vector<double> out, out_error, lse, lse_error;   // [n, token, value], [n, token]
  std::vector<double> narrow_out_error{}, narrow_lse_error{};

  Wanted with_bf16_panels() const { return {heads, out, narrow_out_error, lse, narrow_lse_error}; }
};

Wanted reference(Problem& p, const AttentionOptions& options, std::vector<index_t> heads) {
  constexpr double u = test::kUnit;
  const index_t tokens = p.tokens(), value = p.dims.value;
  const auto rows = heads.size() * static_cast<std::size_t>(tokens), numbers = rows * static_cast<std::size_t>(value);
  Wanted w{heads, std::vector<double>(numbers), std::vector<double>(numbers), std::vector<double>(rows),
           std::vector<double>(rows), std::vector<double>(numbers), std::vector<double>(rows)};
  std::vector<std::vector<double>> latents;   // [sequence][key, number]: decoded once for all heads
  for (index_t s = 0; s < p.sequences(); ++s) {
    latents.emplace_back();
    for (index_t j = 0; j < p.len_k[static_cast<std::size_t>(s)]; ++j) {
      for (index_t d = 0; d < p.row_dim(); ++d) latents.back().push_back(p.latent(s, j, d));
    }
  }
  for (std::size_t n = 0; n < heads.size(); ++n) {
    MlaDims one = p.dims;
    one.heads = 1;
    std::vector<double> q, kv_b;
    for (index_t at = 0; at < tokens * p.q_dim(); ++at)
      q.push_back(double{p.q[static_cast<std::size_t>(heads[n] * tokens * p.q_dim() + at)]});
    const index_t matrix = (p.dims.nope + value) * p.dims.latent;
    for (index_t at = 0; at < matrix; ++at)
      kv_b.push_back(fovea::convert<double>(p.kv_b[static_cast<std::size_t>(heads[n] * matrix + at)]));
    double* const out = w.out.data() + static_cast<index_t>(n) * tokens * value;
    double* const lse = w.lse.data() + static_cast<index_t>(n) * tokens;
    AttentionOptions head_options = options;
    if (!options.sink.empty()) head_options.sink = options.sink.subspan(static_cast<std::size_t>(heads[n]), 1);
    fovea::reference::mla(
        fovea::bhsd<const double>(q.data(), 1, 1, tokens, p.q_dim()),
        fovea::bhsd<const double>(kv_b.data(), 1, 1, p.dims.nope + value, p.dims.latent),
        [&](index_t s, index_t j, index_t d) {
          return latents[static_cast<std::size_t>(s)][static_cast<std::size_t>(j * p.row_dim() + d)];
        },
        p.len_k, one,
        fovea::bhsd(out, 1, 1, tokens, value), head_options, View<double, 3>{lse, {1, 1, tokens}, {0, 0, 1}},
        [&](const fovea::reference::MlaRow& row) {
          const double factors = static_cast<double>(p.dims.nope + p.dims.latent + p.dims.rope) + 8;
          const std::size_t at = n * static_cast<std::size_t>(tokens) + static_cast<std::size_t>(row.pos_q);
          for (const double rounding : {0., 0x1p-8 * 1.01}) {
            std::vector<double> relative;
            double mean = 0;
            for (const auto& term : row.terms) {
              const double score =
                  u * (factors * term.dots + 4 * (std::abs(term.score) + std::abs(row.max))) + 2 * rounding * term.dots;
              relative.push_back(std::expm1(score + test::kExpUnits * u));
              mean += term.weight * relative.back();
            }
            if (!options.sink.empty()) {
              const double sink = double{head_options.sink[0]};
              mean +=
                  std::exp(sink - row.lse) * std::expm1(u * (4 * (std::abs(sink) + std::abs(row.max)) + test::kExpUnits));
            }
            const auto terms = static_cast<index_t>(row.terms.size());
            const double common =
                mean + test::sum_error(terms, terms == 0 ? 0 : row.terms.back().key - row.terms.front().key + 1);
            double* const out_error = (rounding == 0 ? w.out_error : w.narrow_out_error).data() + at * static_cast<std::size_t>(value);
            for (index_t d = 0; d < value; ++d) {
              double size = 0, spread = 0;
              for (std::size_t t = 0; t < row.terms.size(); ++t) {
                const double part = row.terms[t].weight * row.v_size[row.terms[t].key * value + d];
                size += part;
                spread += part * (relative[t] + u * (static_cast<double>(p.dims.latent) + 2) + 2 * rounding);
              }
              out_error[d] = spread + common * size + 1e-30;
            }
            (rounding == 0 ? w.lse_error : w.narrow_lse_error)[at] =
                std::isfinite(row.lse) ? common + u * (test::kLogUnits * 16 + 4 * (std::abs(row.max) + std::abs(row.lse)))
                                       : 0;
          }
        });
  }
  return w;
}

// Largest distance from the reference in budgets.
double distance(const Problem& p, const Got& got, const Wanted& w) {
  double worst = 0;
  const auto row = static_cast<std::size_t>(p.tokens()), value = static_cast<std::size_t>(p.dims.value);
  for (std::size_t n = 0; n < w.heads.size(); ++n) {
    const auto head = static_cast<std::size_t>(w.heads[n]);
    for (std::size_t t = 0; t < row; ++t) {
      worst =
          std::max(worst, test::in_budgets(double{got.lse[head * row + t]}, w.lse[n * row + t], w.lse_error[n * row + t]));
      for (std::size_t d = 0; d < value; ++d) {
        const std::size_t at = (n * row + t) * value + d;
        worst = std::max(worst, test::in_budgets(double{got.out[(head * row + t) * value + d]}, w.out[at], w.out_error[at]));
      }
    }
  }
  return worst;
}

// Two results may each be one budget from the truth.
double distance(const Problem& p, const Got& a, const Got& b, const Wanted& w) {
  Wanted other = w;
  const auto row = static_cast<std::size_t>(p.tokens()), value = static_cast<std::size_t>(p.dims.value);
  for (std::size_t n = 0; n < w.heads.size(); ++n) {
    const auto head = static_cast<std::size_t>(w.heads[n]);
    for (std::size_t t = 0; t < row; ++t) {
      other.lse[n * row + t] = double{b.lse[head * row + t]};
      for (std::size_t d = 0; d < value; ++d)
        other.out[(n * row + t) * value + d] = double{b.out[(head * row + t) * value + d]};
    }
  }
  for (double& x : other.out_error) x *= 2;
  for (double& x : other.lse_error) x *= 2;
  return distance(p, a, other);
}

std::vector<index_t> all_heads(const MlaDims& dims) {
  std::vector<index_t> heads(static_cast<std::size_t>(dims.heads));
  std::iota(heads.begin(), heads.end(), index_t{0});
  return heads;
}

// For latents of 512 numbers. Sums of 512 numbers of both signs are mostly rounding budget. Eight weights a row, the last
// column among them, keep the sums of magnitudes near the sums; smaller queries keep scores small.
void tame(Problem& p, std::uint64_t seed) {
  test::Random random(seed);
  for (fovea::bf16& w : p.kv_b) w = {};
  for (std::size_t row = 0; row < p.kv_b.size(); row += 512) {
    for (int n = 0; n < 8; ++n)
      p.kv_b[row + static_cast<std::size_t>(n == 0 && row % 1024 == 0 ? 511 : random.below(512))] =
          fovea::convert<fovea::bf16>(random.uniform(-0.5f, 0.5f));
  }
  for (float& x : p.q) x *= 0.35f;
}

constexpr MlaForm kForms[] = {MlaForm::absorbed, MlaForm::expanded};

}   // namespace

TEST_CASE("MLA scales of DeepSeek", "[mla]") {
  CHECK(fovea::mla_scale(kV3, fovea::yarn_mscale(40, 1)) == Catch::Approx(0.1352338).epsilon(1e-6));
  CHECK(fovea::mla_scale(kV2Lite, fovea::yarn_mscale(40, 0.707)) == Catch::Approx(0.1147214).epsilon(1e-6));
  CHECK(fovea::mla_scale(kKimi) == Catch::Approx(0.0721688).epsilon(1e-6));
}

TEST_CASE("both forms of MLA against the reference, every storage format", "[mla]") {
  for (const Format format :
       {Format::f32, Format::f64, Format::bf16, Format::f16, Format::i8_token, Format::i4_g32, Format::i4_g64, Format::i4_g32_zero,
        Format::i4_g64_zero, Format::e4m3, Format::e5m2}) {   // latent_fp8: with the dims of DeepSeek-V2 Lite
    Problem p(kSmall, {{1, 9}, {5, 21}, {0, 3}, {3, 2}, {4, 0}, {17, 17}}, format, 11);
    const Wanted w = reference(p, p.options(), all_heads(p.dims));
    CAPTURE(fovea::name_of(format));
    const Got absorbed = run(p, MlaForm::absorbed, p.options()), expanded = run(p, MlaForm::expanded, p.options());
    CHECK(distance(p, absorbed, w) <= 1);
    CHECK(distance(p, expanded, w) <= 1);
    CHECK(distance(p, absorbed, expanded, w) <= 1);
  }
}

TEST_CASE("MLA with the dims of DeepSeek-V3, V2-Lite and Kimi", "[mla]") {
  struct Model {
    MlaDims dims;
    float scale;
    Format format;
    std::vector<index_t> heads;
  };
  const Model models[] = {{kV3, 0.1352338f, Format::bf16, {0, 77, 127}},
                          {kV2Lite, 0.1147214f, Format::latent_fp8, {0, 7, 15}},
                          {kKimi, 0.0721688f, Format::f16, {0, 63}}};
  for (const Model& model : models) {
    Problem p(model.dims, {{1, 6}, {3, 5}}, model.format, 21);
    tame(p, 22);
    AttentionOptions options = p.options();
    options.scale = model.scale;
    const Wanted w = reference(p, options, model.heads);
    CAPTURE(model.dims.heads);
    const Got absorbed = run(p, MlaForm::absorbed, options), expanded = run(p, MlaForm::expanded, options);
    CHECK(distance(p, absorbed, w) <= 1);
    CHECK(distance(p, expanded, w) <= 1);
    CHECK(distance(p, absorbed, expanded, w) <= 1);
    // What a budget must not hide: one number of the queries, one of the rows, the scale without YaRN.
    Problem wrong = p;
    for (std::size_t at = 191; at < wrong.q.size(); at += 192) wrong.q[at] = 0;
    CHECK(distance(p, run(wrong, MlaForm::absorbed, options), w) > 5);
    AttentionOptions unscaled = options;
    unscaled.scale = *options.scale * 0.9f;
    CHECK(distance(p, run(p, MlaForm::expanded, unscaled), w) > 5);
    wrong = p;
    const index_t last = (p.dims.nope + p.dims.value - 2) * 512 + 511;
    for (const index_t h : model.heads) wrong.kv_b[static_cast<std::size_t>(h * 256 * 512 + last)] = {};
    CHECK(distance(p, run(wrong, MlaForm::absorbed, options), w) > 5);
    // The budget is a small part of the numbers it judges.
    double largest = 0, error = 0;
    for (std::size_t n = 0; n < w.out.size(); ++n) {
      largest = std::max(largest, std::abs(w.out[n]));
      error = std::max(error, w.out_error[n]);
    }
    CHECK(error < 2e-3 * largest);
  }
}

// A key tile at these dims is 64 keys, a split 1024. 16 heads are a decode, 128 a wide decode. nope and value, which count in the
// projections alone, are a quarter of DeepSeek's: the test above has them whole.
TEST_CASE("decode steps of MLA over DeepSeek's latents, several key tiles and splits of them", "[mla]") {
  struct Case {
    MlaDims dims;
    float scale;
    Format format;
    index_t shorter;
    Regime regime;
  };
  const index_t longer = 1100, tile = 64, split = fovea::kSplitKeys;
  const Case cases[] = {{{128, 32, 64, 512, 32}, 0.1352338f, Format::bf16, 65, Regime::wide_decode},
                        {{16, 32, 64, 512, 32}, 0.1147214f, Format::latent_fp8, 130, Regime::decode}};
  for (const Case& c : cases) {
    Problem p(c.dims, {{1, c.shorter}, {1, longer}}, c.format, 25, 16);
    tame(p, 26);
    AttentionOptions options = p.options();
    options.scale = c.scale;
    CAPTURE(c.dims.heads, fovea::name_of(c.format));
    fovea::MlaPlan plan;
    REQUIRE(make_plan(plan, {c.dims, 1, 2, longer, c.format}, options, MlaForm::absorbed).ok());
    const fovea::Plan& absorbed = plan.absorbed[0].plan;
    CHECK(absorbed.blocks[0].regime == c.regime);
    CHECK(absorbed.blocks[0].splits == 1);
    CHECK(absorbed.blocks[1].splits == 2);
    CHECK(absorbed.key_tile_size == tile);

    const Wanted w = reference(p, options, {0, c.dims.heads - 1});
    CHECK(distance(p, run(p, MlaForm::absorbed, options), w) <= 1);
    AttentionOptions wide = options;
    wide.regime = Regime::wide_decode;
    const Got exact = run(p, MlaForm::absorbed, wide);
    CHECK(distance(p, exact, w) <= 1);
    if (fovea::kHasBf16Dot) {
      AttentionOptions narrow = wide;
      narrow.panels = fovea::Panels::bf16;
      const Got rounded = run(p, MlaForm::absorbed, narrow);
      CHECK(distance(p, rounded, w.with_bf16_panels()) <= 1);
      CHECK(!same_bits(rounded, exact));
    }
    // What a budget must not hide: a key tile that is read in the place of another, a split likewise.
    const auto misread = [&](index_t from, index_t to, index_t count) {
      const std::vector<std::byte> right = p.pool;
      for (index_t j = 0; j < count; ++j)
        std::memcpy(p.row_at(1, to + j), p.row_at(1, from + j), static_cast<std::size_t>(p.row_bytes()));
      const Got wrong = run(p, MlaForm::absorbed, options);
      p.pool = right;
      return distance(p, wrong, w);
    };
    CHECK(misread(0, tile, tile) > 5);
    CHECK(misread(0, split, longer - split) > 5);
  }
}

TEST_CASE("expanded MLA at DeepSeek's dims, over several key tiles", "[mla]") {
  Problem p(kV2Lite, {{1, 260}}, Format::latent_fp8, 27, 16);
  tame(p, 28);
  const std::vector<index_t> heads{0, 15};
  const Wanted w = reference(p, p.options(), heads);
  fovea::MlaPlan plan;
  REQUIRE(make_plan(plan, {p.dims, 1, 1, 260, p.format}, p.options(), MlaForm::expanded).ok());
  CHECK(plan.expanded[0].plan.key_tile_size == 128);   // of dims 192 and 128
  const Got got = run(p, MlaForm::expanded, p.options(), &plan);
  CHECK(distance(p, got, w) <= 1);
  Problem wrong = p;
  std::memcpy(wrong.row_at(0, 259), p.row_at(0, 3), static_cast<std::size_t>(p.row_bytes()));
  CHECK(distance(p, run(wrong, MlaForm::expanded, p.options()), w) > 5);
}

TEST_CASE("identity blocks make plain attention of MLA, bit for bit", "[mla][bits]") {
  const MlaDims dims{2, 16, 8, 16, 16};
  Problem p(dims, {{3, 40}}, Format::f32, 31);
  for (index_t h = 0; h < dims.heads; ++h) {
    for (index_t d = 0; d < 32; ++d) {
      for (index_t n = 0; n < 16; ++n)
        p.kv_b[static_cast<std::size_t>((h * 32 + d) * 16 + n)] = fovea::convert<fovea::bf16>(d % 16 == n ? 1.f : 0.f);
    }
  }
  // One product of 1 and zeros otherwise: W_UK c = c, W_UK' q = q, W_UV z = z without a rounding.
  for (const Regime regime : {Regime::prefill, Regime::decode}) {
    AttentionOptions options = p.options();
    options.regime = regime;
    options.scale = 0.25f;
    Got plain;
    plain.out.resize(2 * 3 * 16);
    plain.lse.resize(2 * 3);
    AttentionOptions plain_options = options;
    plain_options.lse = {plain.lse.data(), {1, 2, 3}, {6, 3, 1}};
    REQUIRE(fovea::attention<Compiled>(p.q_view(), p.kv(), fovea::bhsd(plain.out.data(), 1, 2, 3, 16), plain_options).ok());
    CHECK(same_bits(run(p, MlaForm::absorbed, options), plain));
    CHECK(same_bits(run(p, MlaForm::expanded, options), plain));
  }
}

TEST_CASE("one permutation of the rotated numbers of queries and keys changes nothing", "[mla]") {
  Problem p(kSmall, {{2, 12}}, Format::f32, 41);
  const Wanted w = reference(p, p.options(), all_heads(p.dims));
  Problem turned = p;
  const index_t order[] = {3, 0, 5, 1, 4, 2};
  for (index_t row = 0; row < p.dims.heads * p.tokens(); ++row) {
    for (index_t d = 0; d < 6; ++d)
      turned.q[static_cast<std::size_t>(row * 14 + 8 + d)] = p.q[static_cast<std::size_t>(row * 14 + 8 + order[d])];
  }
  for (index_t j = 0; j < 12; ++j) {
    for (index_t d = 0; d < 6; ++d) std::memcpy(turned.row_at(0, j) + 4 * (20 + d), p.row_at(0, j) + 4 * (20 + order[d]), 4);
  }
  for (const MlaForm form : kForms) {
    CHECK(distance(p, run(p, form, p.options()), run(turned, form, p.options()), w) <= 1);
    // Of the keys alone it does.
    Problem wrong = turned;
    wrong.q = p.q;
    CHECK(distance(p, run(wrong, form, p.options()), w) > 1000);
  }
}

TEST_CASE("the form of a sequence is the cheaper one, and the plan says so", "[mla][plan]") {
  const auto plan_of = [](index_t len_q, index_t len_k, Causal causal = Causal::none, MlaForm form = MlaForm::automatic) {
    fovea::MlaPlan plan;
    const fovea::Status status = make_plan(plan, {kV3, 1, len_q, len_k, Format::bf16}, {.causal = causal}, form);
    INFO(status.message());
    REQUIRE(status.ok());
    return plan;
  };
  struct Even {
    index_t keys, queries;   // the last number of queries that is absorbed
  };
  for (const auto& [keys, queries] : {Even{512, 128}, Even{1024, 146}, Even{4096, 163}, Even{65536, 170}}) {
    CHECK(plan_of(queries, keys).costs[0].form == MlaForm::absorbed);
    CHECK(plan_of(queries + 1, keys).costs[0].form == MlaForm::expanded);
  }
  CHECK(plan_of(1, 1000).absorbed.size() == 1);
  CHECK(plan_of(512, 512, Causal::bottom_right).expanded.size() == 1);
  CHECK(plan_of(512, 512, Causal::bottom_right, MlaForm::absorbed).absorbed.size() == 2);   // 256 queries at a time
  // Flops of all heads per pair and per change of basis, as DeepSeek's dims give them.
  CHECK(plan_of(1, 1).costs[0].absorbed == 278528. + 33554432.);
  CHECK(plan_of(1, 1).costs[0].expanded == 81920. + 33554432.);
  const std::string text = plan_of(1, 1000).describe();
  using Catch::Matchers::ContainsSubstring;
  CHECK_THAT(text, ContainsSubstring("1 sequences (1 queries) absorbed, 0 (0) expanded"));
  CHECK_THAT(text, ContainsSubstring("1152 bytes a token, 1152000 bytes in reach"));
  CHECK_THAT(text, ContainsSubstring("absorbed 3.121e+08 (expanded would be 3.364e+10)"));
  // A window bounds what has to be expanded.
  fovea::MlaPlan plan;
  REQUIRE(make_plan(plan, {kV3, 1, 4, 1000, Format::bf16}, {.causal = Causal::bottom_right, .window = {.left = 9}}).ok());
  CHECK(plan.costs[0].k_begin == 1000 - 4 - 9);
  CHECK(plan.costs[0].k_end == 1000);
}

TEST_CASE("a row of MLA keeps its bits in any batch, on any number of lanes, with a plan and a workspace", "[mla][bits]") {
  const Lengths lengths[] = {{1, 9}, {30, 30}, {2, 33}, {19, 40}};
  Problem p(kSmall, {lengths[0], lengths[1], lengths[2], lengths[3]}, Format::bf16, 51);
  const AttentionOptions options = p.options();
  const Got whole = run(p, MlaForm::automatic, options);
  fovea::MlaPlan plan;
  REQUIRE(make_plan(plan, {p.dims, 1, p.tokens(), 40, p.format}, options).ok());
  CHECK(plan.absorbed.size() == 1);
  CHECK(plan.expanded.size() == 2);   // the chunk of 19 and the prompt of 30

  test::ThreadPerLane threads;
  AttentionOptions lanes = options;
  lanes.executor = fovea::Executor(threads, 3);
  CHECK(same_bits(run(p, MlaForm::automatic, lanes), whole));
  test::PoisonedBytes workspace(workspace_bytes(plan, 3), 5);
  lanes.workspace = workspace.bytes();
  CHECK(same_bits(run(p, MlaForm::automatic, lanes, &plan), whole));
  CHECK(workspace.guards_intact());

  for (index_t s = 0; s < 4; ++s) {
    Problem alone = p;
    const auto at = static_cast<std::size_t>(s);
    const index_t first = p.cu_len_q[at], count = p.cu_len_q[at + 1] - first;
    alone.cu_len_q = {0, count};
    alone.len_k = {p.len_k[at]};
    alone.table.assign(p.table.begin() + s * p.table_width, p.table.begin() + (s + 1) * p.table_width);
    alone.q.clear();
    for (index_t h = 0; h < p.dims.heads; ++h) {
      const auto from = p.q.begin() + (h * p.tokens() + first) * p.q_dim();
      alone.q.insert(alone.q.end(), from, from + count * p.q_dim());
    }
    const Got got = run(alone, MlaForm::automatic, alone.options());
    for (index_t h = 0; h < p.dims.heads; ++h) {
      CHECK(std::memcmp(got.out.data() + h * count * p.dims.value,
                        whole.out.data() + (h * p.tokens() + first) * p.dims.value,
                        static_cast<std::size_t>(4 * count * p.dims.value)) == 0);
      CHECK(std::memcmp(got.lse.data() + h * count, whole.lse.data() + h * p.tokens() + first,
                        static_cast<std::size_t>(4 * count)) == 0);
    }
  }
}

TEST_CASE("MLA in chunks is MLA at once, and rows stand anywhere", "[mla][bits]") {
  Problem p(kSmall, {{24, 24}}, Format::bf16, 61);
  for (const MlaForm form : kForms) {
    AttentionOptions options = p.options();
    options.regime = Regime::prefill;
    const Got whole = run(p, form, options);

    // Dense rows, a batch of one, outputs token-major in bf16; the queries in two chunks.
    std::vector<std::byte> rows;
    for (index_t j = 0; j < 24; ++j) rows.insert(rows.end(), p.row_at(0, j), p.row_at(0, j) + p.row_bytes());
    const Kv dense = fovea::latent_kv(rows.data(), p.format, p.dims, 1, 24);
    std::vector<fovea::bf16> out(static_cast<std::size_t>(24 * p.dims.heads * p.dims.value));
    for (const auto& [first, count] : {std::pair<index_t, index_t>{0, 10}, {10, 14}}) {
      Tensor<const float> q = p.q_view();
      q.data += first * q.stride[2];
      q.extent[2] = count;
      Tensor<fovea::bf16> to = fovea::bshd(out.data(), 1, 24, p.dims.heads, p.dims.value);
      to.data += first * to.stride[2];
      to.extent[2] = count;
      const index_t keys[] = {first + count};
      const fovea::Status status = fovea::mla<Compiled>(
          q, p.kv_b_view(), dense, to, {.causal = Causal::bottom_right, .len_k = keys, .regime = Regime::prefill}, form);
      INFO(status.message());
      REQUIRE(status.ok());
    }
    for (index_t t = 0; t < 24; ++t) {
      for (index_t h = 0; h < p.dims.heads; ++h) {
        for (index_t d = 0; d < p.dims.value; ++d) {
          const fovea::bf16 wanted =
              fovea::convert<fovea::bf16>(whole.out[static_cast<std::size_t>((h * 24 + t) * p.dims.value + d)]);
          REQUIRE(out[static_cast<std::size_t>((t * p.dims.heads + h) * p.dims.value + d)].bits == wanted.bits);
        }
      }
    }
  }
}

TEST_CASE("a batch of dense sequences, CSR pages and ragged keys give the bits of the block table", "[mla][bits]") {
  Problem p(kSmall, {{2, 7}, {2, 11}}, Format::f32, 65);
  for (const MlaForm form : kForms) {
    const Got paged = run(p, form, p.options());
    // CSR lists.
    std::vector<std::int32_t> indices(p.table.begin(), p.table.begin() + 2);
    indices.insert(indices.end(), p.table.begin() + p.table_width, p.table.begin() + p.table_width + 3);
    const index_t begin[] = {0, 2, 5};
    Got got = paged;
    std::fill(got.out.begin(), got.out.end(), test::canary());
    const Tensor<float> out = fovea::bhsd(got.out.data(), 1, p.dims.heads, 4, p.dims.value);
    REQUIRE(fovea::mla<Compiled>(p.q_view(), p.kv_b_view(),
                                 fovea::latent_pages(p.kv().k, p.dims, p.pages, p.page_size, indices, begin), out,
                                 p.options(), form)
                .ok());
    CHECK(same_bits(got, paged));
    // Ragged keys.
    std::vector<float> rows;
    for (index_t s = 0; s < 2; ++s) {
      for (index_t j = 0; j < p.len_k[static_cast<std::size_t>(s)]; ++j) {
        for (index_t d = 0; d < p.row_dim(); ++d) rows.push_back(static_cast<float>(p.latent(s, j, d)));
      }
    }
    const index_t cu_len_k[] = {0, 7, 18};
    AttentionOptions ragged = p.options();
    ragged.len_k = {};
    ragged.cu_len_k = cu_len_k;
    std::fill(got.out.begin(), got.out.end(), test::canary());
    const fovea::Status status = fovea::mla<Compiled>(
        p.q_view(), p.kv_b_view(), fovea::latent_kv(rows.data(), Format::f32, p.dims, 1, 18), out, ragged, form);
    INFO(status.message());
    REQUIRE(status.ok());
    CHECK(same_bits(got, paged));
    // [batch, head, pos, dim] queries and [batch, 1, len, dim] rows; len 11 leaves slots of the first sequence unused.
    std::vector<float> batch(static_cast<std::size_t>(2 * 11 * p.row_dim()), test::canary());
    std::copy_n(rows.begin(), 7 * p.row_dim(), batch.begin());
    std::copy_n(rows.begin() + 7 * p.row_dim(), 11 * p.row_dim(), batch.begin() + 11 * p.row_dim());
    Tensor<const float> q = p.q_view();
    q.extent = {2, p.dims.heads, 2, p.q_dim()};
    q.stride[0] = 2 * q.stride[2];
    Tensor<float> to = out;
    to.extent = {2, p.dims.heads, 2, p.dims.value};
    to.stride[0] = 2 * to.stride[2];
    std::fill(got.out.begin(), got.out.end(), test::canary());
    REQUIRE(fovea::mla<Compiled>(q, p.kv_b_view(),
                                 fovea::latent_kv(fovea::bhsd<const float>(batch.data(), 2, 1, 11, p.row_dim()), p.dims), to,
                                 {.causal = Causal::bottom_right, .len_k = p.len_k}, form)
                .ok());
    CHECK(same_bits(got, paged));
  }
}

TEST_CASE("MLA with windows, sinks, offsets and other alignments against the reference", "[mla]") {
  Problem p(kSmall, {{3, 30}, {25, 28}, {6, 4}}, Format::bf16, 71);
  const float sink[] = {0.5f, -2.f, 3.f, 0.f};
  const index_t offset[] = {4, -3, 1};
  std::vector<AttentionOptions> cases(5, p.options());
  cases[0].window = {.left = 5};
  cases[1].causal = Causal::none;
  cases[1].window = {.left = 2, .right = 3};
  cases[1].q_offset = offset;
  cases[2].causal = Causal::top_left;
  cases[2].sink = sink;
  cases[3].causal = Causal::none;
  cases[3].scale = -0.3f;
  cases[4].q_offset = offset;
  for (std::size_t n = 0; n < cases.size(); ++n) {
    const Wanted w = reference(p, cases[n], all_heads(p.dims));
    for (const MlaForm form : kForms) {
      CAPTURE(n, form == MlaForm::absorbed);
      CHECK(distance(p, run(p, form, cases[n]), w) <= 1);
    }
  }
}

// Softcap, ALiBi, bias and keep change a score by at most what they change it from, and mask; 3 budgets leave room for their
// own few roundings, which are u times numbers of the size of the score.
TEST_CASE("every other option reaches both forms of MLA alike", "[mla]") {
  Problem p(kSmall, {{3, 30}, {25, 28}}, Format::bf16, 81);
  const Wanted w = reference(p, p.options(), all_heads(p.dims));
  test::Random random(82);
  const float slopes[] = {0.1f, 0.2f, 0.3f, 0.4f};
  std::vector<float> bias(2 * 4 * 25 * 30);
  for (float& x : bias) x = random.uniform(-1, 1);
  std::vector<std::uint8_t> keep(25 * 30);
  for (std::uint8_t& x : keep) x = static_cast<std::uint8_t>(random.below(3));
  std::vector<std::uint64_t> tree(28);
  for (std::size_t t = 0; t < tree.size(); ++t) {
    const std::size_t i = t < 3 ? t : t - 3;
    tree[t] = (random.bits() & ((std::uint64_t{1} << i) - 1)) | (std::uint64_t{1} << i);
  }
  std::vector<AttentionOptions> cases(5, p.options());
  cases[0].softcap = 2;
  cases[1].alibi_slopes = slopes;
  cases[2].bias = {bias.data(), {2, 4, 25, 30}, {3000, 750, 30, 1}};
  cases[3].keep = {keep.data(), {1, 1, 25, 30}, {750, 750, 30, 1}};
  cases[3].window = {.left = 20};
  cases[4].causal = Causal::none;
  cases[4].tree = tree;
  const Got plain = run(p, MlaForm::absorbed, p.options());
  for (std::size_t n = 0; n < cases.size(); ++n) {
    CAPTURE(n);
    const Got absorbed = run(p, MlaForm::absorbed, cases[n]);
    CHECK(distance(p, absorbed, run(p, MlaForm::expanded, cases[n]), w) <= 3);
    CHECK(distance(p, absorbed, plain, w) > 100);
  }
}

TEST_CASE("absorbed MLA takes long runs of queries in pieces", "[mla]") {
  const MlaDims dims{1, 4, 2, 6, 3};
  Problem p(dims, {{2, 5}, {300, 320}, {1, 8}}, Format::bf16, 91);
  const Wanted w = reference(p, p.options(), all_heads(dims));
  CHECK(distance(p, run(p, MlaForm::absorbed, p.options()), w) <= 1);
  fovea::MlaPlan plan;
  REQUIRE(make_plan(plan, {dims, 1, p.tokens(), 320, p.format}, p.options(), MlaForm::absorbed).ok());
  REQUIRE(plan.absorbed.size() == 4);
  CHECK(plan.absorbed[1].q_offset[1] == 20);
  CHECK(plan.absorbed[2].q_offset[1] == 20 + 256);
}

TEST_CASE("a mixed cache of latents: first and recent tokens in 16 bit", "[mla]") {
  Problem p(kSmall, {{1, 21}, {9, 17}}, Format::i8_token, 101);
  // Keys 0, 1 and the last 5 of each sequence in bf16.
  const index_t from[] = {16, 12}, held = 7;
  std::vector<std::byte> exact_rows(static_cast<std::size_t>(2 * held * 2 * p.row_dim()));
  std::vector<float> row(static_cast<std::size_t>(p.row_dim()));
  test::Random random(102);
  std::vector<std::vector<float>> values(2 * static_cast<std::size_t>(held));
  for (std::size_t n = 0; n < values.size(); ++n) {
    for (float& x : row) x = fovea::convert<float>(fovea::convert<fovea::bf16>(random.uniform(-1.7f, 1.7f)));
    values[n] = row;
    fovea::quantise_row(Format::bf16, row.data(), 1, p.row_dim(), nullptr,
                        exact_rows.data() + static_cast<index_t>(n) * 2 * p.row_dim());
  }
  // The same keys as a plain f32 cache.
  Problem plain(kSmall, {{1, 21}, {9, 17}}, Format::f32, 101);
  plain.q = p.q;
  plain.kv_b = p.kv_b;
  for (index_t s = 0; s < 2; ++s) {
    for (index_t j = 0; j < p.len_k[static_cast<std::size_t>(s)]; ++j) {
      const index_t at = j < 2 ? j : j >= from[s] ? 2 + j - from[s] : -1;
      for (index_t d = 0; d < p.row_dim(); ++d)
        row[static_cast<std::size_t>(d)] =
            at < 0 ? static_cast<float>(p.latent(s, j, d))
                   : values[static_cast<std::size_t>(s * held + at)][static_cast<std::size_t>(d)];
      fovea::quantise_row(Format::f32, row.data(), 1, p.row_dim(), nullptr, plain.row_at(s, j));
      if (at >= 0) std::memset(p.row_at(s, j), 0xff, static_cast<std::size_t>(p.row_bytes()));
    }
  }
  const Kv exact = fovea::latent_kv(exact_rows.data(), Format::bf16, p.dims, 2, held);
  const Wanted w = reference(plain, plain.options(), all_heads(p.dims));
  for (const MlaForm form : kForms) {
    Kv kv = p.kv();
    kv.exact = &exact;
    kv.exact_first = 2;
    kv.exact_from = from;
    Got got;
    got.out.assign(static_cast<std::size_t>(p.dims.heads * 10 * p.dims.value), test::canary());
    got.lse.resize(static_cast<std::size_t>(p.dims.heads * 10));
    AttentionOptions options = p.options();
    options.lse = {got.lse.data(), {1, p.dims.heads, 10}, {0, 10, 1}};
    const fovea::Status status = fovea::mla<Compiled>(
        p.q_view(), p.kv_b_view(), kv, fovea::bhsd(got.out.data(), 1, p.dims.heads, 10, p.dims.value), options, form);
    INFO(status.message());
    REQUIRE(status.ok());
    CHECK(distance(plain, got, w) <= 1);
  }
}

#if defined(__AVX512BF16__)
TEST_CASE("MLA with bf16 panels", "[mla]") {
  Problem p(kSmall, {{2, 30}, {20, 25}}, Format::bf16, 111);
  AttentionOptions options = p.options();
  options.regime = Regime::prefill;   // decode reads in place, without panels
  const Got exact = run(p, MlaForm::absorbed, options);
  options.panels = fovea::Panels::bf16;
  const Wanted w = reference(p, options, all_heads(p.dims)).with_bf16_panels();
  for (const MlaForm form : kForms) {
    const Got got = run(p, form, options);
    CHECK(distance(p, got, w) <= 1);
    CHECK(!same_bits(got, exact));
  }
}
#endif

TEST_CASE("MLA refuses what does not fit, with the numbers, and writes nothing", "[mla][errors]") {
  Problem p(kSmall, {{2, 9}}, Format::bf16, 121);
  std::vector<float> out(static_cast<std::size_t>(p.dims.heads * 2 * p.dims.value), test::canary());
  const auto message = [&](Operand q, Operand kv_b, Kv kv, Tensor<float> to, AttentionOptions options, MlaForm form) {
    const fovea::Status status = fovea::mla<fovea::Formats<Format::bf16>>(q, kv_b, kv, to, options, form);
    CHECK(!status.ok());
    for (const float x : out) CHECK(test::is_canary(x));
    return std::string(status.message());
  };
  const Tensor<float> to = fovea::bhsd(out.data(), 1, p.dims.heads, 2, p.dims.value);
  using Catch::Matchers::ContainsSubstring;
  for (const MlaForm form : kForms) {
    Operand q = p.q_view(), kv_b = p.kv_b_view();
    q.extent[3] = 13;
    CHECK_THAT(message(q, kv_b, p.kv(), to, p.options(), form),
               ContainsSubstring("nope 8, rope 5, so latents must have 1 head of 25 numbers, they have 1 of 26"));
    q = p.q_view();
    kv_b.extent[1] = 3;
    CHECK_THAT(message(q, kv_b, p.kv(), to, p.options(), form), ContainsSubstring("kv_b is [1, 3, 13, 20], q has 4 heads"));
    kv_b = p.kv_b_view();
    kv_b.format = Format::f64;
    CHECK_THAT(message(q, kv_b, p.kv(), to, p.options(), form), ContainsSubstring("kv_b has format f64"));
    kv_b = p.kv_b_view();
    Kv kv = p.kv();
    kv.kv_heads = 2;
    CHECK_THAT(message(q, kv_b, kv, to, p.options(), form), ContainsSubstring("they have 2 of 26"));
    kv = p.kv();
    kv.k.format = Format::f16;
    CHECK_THAT(message(q, kv_b, kv, to, p.options(), form), ContainsSubstring("latents are stored as f16"));
    kv.k.format = Format::i8_channel;
    CHECK_THAT(message(q, kv_b, kv, to, p.options(), form), ContainsSubstring("i8_channel"));
    kv.k.format = Format::latent_fp8;
    CHECK_THAT(message(q, kv_b, kv, to, p.options(), form), ContainsSubstring("512 + 64 numbers, the dims 20 + 6"));
    Tensor<float> narrow = to;
    narrow.extent[2] = 1;
    CHECK_THAT(message(q, kv_b, p.kv(), narrow, p.options(), form), ContainsSubstring("must be [1, 4, 2, 5]"));
    AttentionOptions options = p.options();
    std::vector<std::byte> little(10);
    options.workspace = little;
    CHECK_THAT(message(q, kv_b, p.kv(), to, options, form), ContainsSubstring("workspace has 10 bytes"));
    options = p.options();
    const index_t too_long[] = {100};
    options.len_k = too_long;
    CHECK_THAT(message(q, kv_b, p.kv(), to, options, form), ContainsSubstring("sequence 0 has 100 keys"));
    options = p.options();
    options.scale = INFINITY;
    CHECK_THAT(message(q, kv_b, p.kv(), to, options, form), ContainsSubstring("scale inf"));
  }
  CHECK_THAT(message(p.q_view(), p.kv_b_view(), p.kv(), to, p.options(), static_cast<MlaForm>(9)),
             ContainsSubstring("form is 9"));
  fovea::MlaPlan plan;
  CHECK_THAT(std::string(make_plan(plan, {{1, 500, 100, 512, 64}, 1, 1, 1, Format::bf16}, {}).message()),
             ContainsSubstring("nope + rope 600, latent + rope 612, value 64"));
  REQUIRE(make_plan(plan, {p.dims, 1, 2, 8, p.format}, {.causal = Causal::bottom_right}).ok());
  const fovea::Status status = fovea::mla<Compiled>(plan, p.q_view(), p.kv_b_view(), p.kv(), to, p.options());
  CHECK_THAT(std::string(status.message()),
             ContainsSubstring("sequence 0 is planned as 2 queries from position 6 and 8 keys, the call has 2, 7, 9"));
}
