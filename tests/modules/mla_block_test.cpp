// SPDX-License-Identifier: Apache-2.0
#include "fovea/modules/mla_block.hpp"

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/cache/contiguous_cache.hpp"
#include "fovea/cache/paged_cache.hpp"
#include "fovea/mla.hpp"
#include "fovea/reference/mla.hpp"
#include "fovea/reference/stored.hpp"
#include "support/executors.hpp"
#include "support/poison.hpp"
#include "support/random.hpp"

namespace {

using fovea::Format;
using fovea::index_t;
using fovea::MlaDims;
using fovea::Operand;
using fovea::Tensor;
using fovea::reference::MlaMatrix;
using Attention = fovea::MlaAttention<
    fovea::Formats<Format::f32, Format::bf16, Format::latent_fp8, Format::i8_token, Format::e4m3>>;

// The same numbers as bf16 for the layer and as doubles for the reference.
struct Matrix {
  index_t rows = 0, columns = 0;
  std::vector<fovea::bf16> stored;
  MlaMatrix exact;

  Matrix() = default;
  Matrix(index_t rows_, index_t columns_, test::Random& random, float middle, float spread)
      : rows(rows_), columns(columns_), stored(static_cast<std::size_t>(rows_ * columns_)), exact(rows_, columns_) {
    for (std::size_t n = 0; n < stored.size(); ++n) {
      stored[n] = fovea::convert<fovea::bf16>(random.uniform(middle - spread, middle + spread));
      exact.data[n] = fovea::convert<double>(stored[n]);
    }
  }
  Operand view(index_t heads = 1) const {
    if (stored.empty()) return {};
    return fovea::bhsd<const fovea::bf16>(stored.data(), 1, heads, rows / heads, columns);
  }
};

Matrix weights(index_t rows, index_t columns, test::Random& random) {
  return {rows, columns, random, 0, 1.7f / std::sqrt(static_cast<float>(columns))};
}
Matrix gains(index_t columns, test::Random& random) { return {1, columns, random, 1, 0.2f}; }

struct Layer {
  MlaDims dims;
  index_t model;
  Matrix q_a, q_norm, q_b, kv_a, kv_norm, kv_b, o;
  fovea::RopeOptions rope{
      .base = 10000, .scaling = fovea::RopeScaling::yarn, .factor = 40, .original_len = 4096, .attention_factor = 1};
  std::vector<float> table_memory;
  fovea::MlaBlock block;
  fovea::reference::MlaLayer exact;

  Layer(const MlaDims& dims_, index_t model_, index_t rank, std::uint64_t seed = 1,
        fovea::RopeLayout layout = fovea::RopeLayout::interleaved)
      : dims(dims_), model(model_) {
    test::Random random(seed);
    if (rank > 0) {
      q_a = weights(rank, model, random);
      q_norm = gains(rank, random);
    }
    q_b = weights(dims.heads * (dims.nope + dims.rope), rank > 0 ? rank : model, random);
    kv_a = weights(dims.latent + dims.rope, model, random);
    kv_norm = gains(dims.latent, random);
    kv_b = weights(dims.heads * (dims.nope + dims.value), dims.latent, random);
    o = weights(model, dims.heads * dims.value, random);
    rope.rotary_dim = dims.rope;
    std::vector<double> inv_freq(static_cast<std::size_t>(dims.rope / 2));
    float attention_factor = 0;
    REQUIRE(fovea::rope_frequencies(rope, inv_freq, attention_factor).ok());
    table_memory.resize(static_cast<std::size_t>(fovea::rope_table_floats(64, dims.rope)));
    REQUIRE(fovea::make_rope_table(block.rope, inv_freq, attention_factor, 0, 64, table_memory).ok());
    block.dims = dims;
    block.model = model;
    block.weights = {q_a.view(), q_norm.view(), q_b.view(), kv_a.view(), kv_norm.view(), kv_b.view(dims.heads), o.view()};
    block.layout = layout;
    block.scale = fovea::mla_scale(dims, fovea::yarn_mscale(40, 1));
    exact = {dims,       q_a.exact, q_norm.exact, q_b.exact, kv_a.exact,          kv_norm.exact,
             kv_b.exact, o.exact,   rope,         layout,    double{block.scale}, 1e-6};
  }
};

MlaMatrix tokens_of(index_t count, index_t model, std::uint64_t seed) {
  MlaMatrix x(count, model);
  test::Random random(seed);
  for (double& value : x.data) value = double{random.uniform(-1.7f, 1.7f)};
  return x;
}
MlaMatrix rows_of(const MlaMatrix& x, index_t first, index_t count) {
  MlaMatrix part(count, x.columns);
  std::copy_n(x.data.begin() + first * x.columns, count * x.columns, part.data.begin());
  return part;
}

// One step on the token rows of x. Returns y as floats.
template <class Cache>
fovea::Status step(const Layer& layer, const MlaMatrix& x, std::vector<index_t> cu, Cache& cache, std::vector<float>& y,
                   fovea::MlaForm form = fovea::MlaForm::automatic, fovea::AttentionOptions options = {},
                   std::span<const index_t> positions = {}, const fovea::MlaPlan* plan = nullptr) {
  std::vector<float> input(x.data.begin(), x.data.end());
  y.assign(input.size(), test::canary());
  options.cu_len_q = cu;
  test::PoisonedBytes workspace(fovea::mla_block_bytes(layer.block, x.rows, options.executor.lanes()), 3);
  const fovea::Status status = fovea::mla_block(
      layer.block, fovea::bhsd<const float>(input.data(), 1, 1, x.rows, x.columns), cache, Attention{form, plan},
      fovea::bhsd(y.data(), 1, 1, x.rows, x.columns), options, workspace.bytes(), positions);
  CHECK(workspace.guards_intact());
  return status;
}

fovea::CacheRows cache_rows(const MlaDims& dims, Format format) {
  return {.kv_heads = 1,
          .dim_qk = dims.latent + dims.rope,
          .dim_v = fovea::latent_value_dim(format, dims),
          .k = format,
          .v = format,
          .v_in_k = true};
}

// Largest difference over the largest number of the reference.
double difference(const std::vector<float>& got, const MlaMatrix& wanted) {
  double largest = 0, worst = 0;
  for (std::size_t n = 0; n < got.size(); ++n) {
    largest = std::max(largest, std::abs(wanted.data[n]));
    const double here = std::abs(double{got[n]} - wanted.data[n]);
    worst = here <= worst ? worst : here;   // NaN stays
  }
  return worst / largest;
}

// Keys of a sequence as the cache holds them.
template <class Cache>
MlaMatrix stored(const Cache& cache, index_t sequence) {
  MlaMatrix rows(cache.len(sequence), cache.rows().dim_qk);
  for (index_t j = 0; j < rows.rows; ++j) {
    for (index_t d = 0; d < rows.columns; ++d)
      rows(j, d) = fovea::reference::stored_value(cache.rows().k, cache.k_row(sequence, 0, j), rows.columns, d);
  }
  return rows;
}

// Numbers of size 1 pass four projections in a row, whose sums have up to 2048 terms of both signs, norms and a softmax of
// scores up to 10 or so. Roundings of sums with random signs grow like the square root of their terms: sqrt(2048) u = 2.7e-6
// each, and an error of a score is an equal relative error of a weight. 1e-4 of the largest output is 10 times all of that
// and a hundredth of what the smallest slip costs (measured below: more than 1e-2).
constexpr double kLimit = 1e-4;

}   // namespace

TEST_CASE("the MLA layer of V2-Lite and of V3, step by step against the reference", "[mla][modules]") {
  struct Model {
    MlaDims dims;
    index_t model, rank;
    Format format;
  };
  // V2-Lite is whole but for its width; V3 has its 128 heads and a narrow model around them.
  const Model models[] = {{{16, 128, 64, 512, 128}, 256, 0, Format::f32}, {{128, 128, 64, 512, 128}, 32, 48, Format::bf16}};
  for (const auto& [dims, model, rank, format] : models) {
    const Layer layer(dims, model, rank);
    fovea::ContiguousCache cache;
    REQUIRE(cache.create({.rows = cache_rows(dims, format), .sequences = 1, .slots = 8, .poison = true}).ok());
    const MlaMatrix x = tokens_of(3, model, 5);
    for (const auto& [first, count] : {std::pair<index_t, index_t>{0, 2}, {2, 1}}) {
      const MlaMatrix now = rows_of(x, first, count);
      std::vector<index_t> positions;
      for (index_t i = 0; i < count; ++i) positions.push_back(first + i);
      std::vector<float> y;
      const fovea::Status status = step(layer, now, {0, count}, cache, y);
      INFO(status.message());
      REQUIRE(status.ok());
      const MlaMatrix rows = stored(cache, 0), fresh = fovea::reference::mla_latents(layer.exact, now, positions);
      double worst = 0;
      for (index_t i = 0; i < count; ++i) {
        for (index_t d = 0; d < rows.columns; ++d)
          worst = std::max(worst, std::abs(rows(first + i, d) - fresh(i, d)) / (1 + std::abs(fresh(i, d))));
      }
      CHECK(worst < (format == Format::f32 ? 1e-5 : 0x1p-8 + 1e-5));   // bf16 has 8 significant bits
      CHECK(difference(y, fovea::reference::mla_layer(layer.exact, now, positions, rows)) < kLimit);
    }
    CHECK(cache.check().ok());
  }
}

TEST_CASE("the MLA layer on a ragged batch over pages, both forms, any number of lanes", "[mla][modules]") {
  const MlaDims dims{4, 24, 16, 40, 20};
  const Layer layer(dims, 48, 32, 3);
  const std::vector<index_t> cu{0, 5, 5, 6, 9};
  const MlaMatrix before = tokens_of(11, 48, 7), x = tokens_of(9, 48, 8);
  const index_t old[] = {0, 3, 7, 1};
  for (const Format format : {Format::bf16, Format::i8_token, Format::e4m3}) {
    INFO(fovea::name_of(format));
    std::vector<std::vector<float>> results;
    using fovea::MlaForm;
    for (const MlaForm form : {MlaForm::absorbed, MlaForm::expanded, MlaForm::absorbed, MlaForm::absorbed}) {
      fovea::PagedCache cache;
      REQUIRE(
          cache.create({.rows = cache_rows(dims, format), .pages = 12, .page_size = 4, .sequences = 4, .poison = true})
              .ok());
      for (index_t s = 0; s < 4; ++s) {
        index_t number = -1;
        REQUIRE(cache.create_sequence(&number).ok());
        REQUIRE(number == s);
      }
      std::vector<float> y;
      REQUIRE(step(layer, before, {0, 0, 3, 10, 11}, cache, y, form).ok());
      fovea::AttentionOptions options;
      test::ThreadPerLane threads;
      if (results.size() == 2) options.executor = fovea::Executor(threads, 3);
      // One plan for all layers of the step, by the lengths behind the append.
      fovea::MlaPlan plan;
      const index_t len_k[] = {5, 3, 8, 4};
      fovea::AttentionOptions planned = options;
      planned.causal = fovea::Causal::bottom_right;
      planned.scale = layer.block.scale;
      planned.cu_len_q = cu;
      planned.len_k = len_k;
      REQUIRE(make_plan(plan, {dims, 1, 9, 8, format}, planned, form).ok());
      const fovea::Status status = step(layer, x, cu, cache, y, form, options, {}, results.size() == 3 ? &plan : nullptr);
      INFO(status.message());
      REQUIRE(status.ok());
      results.push_back(y);
      for (index_t s = 0; s < 4; ++s) {
        const auto at = static_cast<std::size_t>(s);
        const index_t first = cu[at], count = cu[at + 1] - first;
        REQUIRE(cache.len(s) == old[s] + count);
        if (count == 0) continue;
        std::vector<index_t> positions;
        for (index_t i = 0; i < count; ++i) positions.push_back(old[s] + i);
        const std::vector<float> own(y.begin() + first * 48, y.begin() + (first + count) * 48);
        const MlaMatrix now = rows_of(x, first, count), rows = stored(cache, s);
        CHECK(difference(own, fovea::reference::mla_layer(layer.exact, now, positions, rows)) < kLimit);
        // A row holds its token: half a step of the format (of the row's largest number with codes) and what fp32 sums cost.
        const MlaMatrix fresh = fovea::reference::mla_latents(layer.exact, now, positions);
        const double half_step = format == Format::bf16 ? 0x1p-8 : format == Format::i8_token ? 1 / 253. : 0x1p-4;
        double worst = 0;
        for (index_t i = 0; i < count; ++i) {
          double largest = 0, off = 0;
          for (index_t d = 0; d < rows.columns; ++d) {
            largest = std::max(largest, std::abs(fresh(i, d)));
            off = std::max(off, std::abs(rows(old[s] + i, d) - fresh(i, d)));
          }
          worst = std::max(worst, off / (half_step * largest + 1e-5));
        }
        CHECK(worst <= 1);
      }
    }
    CHECK(std::memcmp(results[0].data(), results[2].data(), 4 * results[0].size()) == 0);
    CHECK(std::memcmp(results[0].data(), results[3].data(), 4 * results[0].size()) == 0);
  }
}

TEST_CASE("an MLA layer whose plan is of another step is refused and takes its tokens back", "[mla][modules][errors]") {
  const MlaDims dims{4, 24, 16, 40, 20};
  const Layer layer(dims, 48, 32, 3);
  fovea::ContiguousCache cache;
  REQUIRE(cache.create({.rows = cache_rows(dims, Format::bf16), .sequences = 1, .slots = 8, .poison = true}).ok());
  fovea::AttentionOptions options;
  options.causal = fovea::Causal::bottom_right;
  options.scale = layer.block.scale;
  fovea::MlaPlan plan;
  REQUIRE(make_plan(plan, {dims, 1, 2, 3, Format::bf16}, options).ok());
  std::vector<float> y;
  const fovea::Status status =
      step(layer, tokens_of(2, 48, 12), {0, 2}, cache, y, fovea::MlaForm::automatic, {}, {}, &plan);
  CHECK_THAT(std::string(status.message()),
             Catch::Matchers::ContainsSubstring("planned as 2 queries from position 1 and 3 keys, the call has 2, 0, 2"));
  CHECK(cache.len(0) == 0);
  CHECK(cache.check().ok());
  for (const float number : y) CHECK(test::is_canary(number));
}

TEST_CASE("the slips an MLA layer could make are far beyond its tolerance", "[mla][modules]") {
  const MlaDims dims{4, 24, 16, 40, 20};
  const MlaMatrix x = tokens_of(6, 48, 9);
  const index_t positions[] = {0, 1, 2, 3, 4, 5};
  const auto run = [&](Layer& layer, std::span<const index_t> at = {}) {
    fovea::ContiguousCache cache;
    REQUIRE(cache.create({.rows = cache_rows(dims, Format::f32), .sequences = 1, .slots = 6}).ok());
    std::vector<float> y;
    REQUIRE(step(layer, x, {0, 6}, cache, y, fovea::MlaForm::automatic, {}, at).ok());
    return y;
  };
  Layer layer(dims, 48, 32, 4);
  const MlaMatrix rows = fovea::reference::mla_latents(layer.exact, x, positions);
  const MlaMatrix wanted = fovea::reference::mla_layer(layer.exact, x, positions, rows);
  CHECK(difference(run(layer), wanted) < kLimit);
  const index_t shifted[] = {7, 8, 9, 10, 11, 12};   // only distances count
  CHECK(difference(run(layer, shifted), wanted) < kLimit);
  const index_t spread[] = {0, 1, 2, 3, 4, 6};
  CHECK(difference(run(layer, spread), wanted) > 1e-2);
  Layer half(dims, 48, 32, 4, fovea::RopeLayout::half_split);
  CHECK(difference(run(half), wanted) > 1e-2);
  layer.block.scale *= 1.1f;
  CHECK(difference(run(layer), wanted) > 1e-2);
  layer.block.scale /= 1.1f;
  layer.block.eps = 0.1f;
  CHECK(difference(run(layer), wanted) > 1e-2);
}

TEST_CASE("an MLA layer over the fp8 latent cache", "[mla][modules]") {
  const MlaDims dims{2, 32, 64, 512, 16};
  const Layer layer(dims, 64, 0, 6);
  fovea::ContiguousCache cache;
  REQUIRE(cache.create({.rows = cache_rows(dims, Format::latent_fp8), .sequences = 1, .slots = 6, .poison = true}).ok());
  CHECK(fovea::token_bytes(cache.rows()) == 656);
  const MlaMatrix x = tokens_of(4, 64, 10);
  const index_t positions[] = {0, 1, 2, 3};
  std::vector<float> y;
  REQUIRE(step(layer, x, {0, 4}, cache, y).ok());
  CHECK(difference(y, fovea::reference::mla_layer(layer.exact, x, positions, stored(cache, 0))) < kLimit);
}

TEST_CASE("an MLA layer that is refused leaves its cache and output alone", "[mla][modules][errors]") {
  const MlaDims dims{4, 24, 16, 40, 20};
  Layer layer(dims, 48, 32, 3);
  using Catch::Matchers::ContainsSubstring;
  fovea::PagedCache cache;
  REQUIRE(cache.create({.rows = cache_rows(dims, Format::bf16), .pages = 3, .page_size = 2, .sequences = 2, .poison = true})
              .ok());
  index_t number = -1;
  REQUIRE(cache.create_sequence(&number).ok());
  std::vector<float> y;
  const MlaMatrix x = tokens_of(6, 48, 11);
  const auto refused = [&](const std::vector<index_t>& cu, const fovea::AttentionOptions& options = {}) {
    const fovea::Status status = step(layer, rows_of(x, 0, cu.back()), cu, cache, y, fovea::MlaForm::automatic, options);
    CHECK(!status.ok());
    CHECK(cache.len(0) == 0);
    CHECK(cache.check().ok());
    for (const float number_of_y : y) CHECK(test::is_canary(number_of_y));
    return std::string(status.message());
  };
  CHECK_THAT(refused({0, 1}), ContainsSubstring("cu_len_q has 2 entries for 2 sequences"));
  CHECK_THAT(refused({0, 1, 2}), ContainsSubstring("tokens for sequence 1, which the cache does not have"));
  REQUIRE(cache.create_sequence(&number).ok());
  CHECK_THAT(refused({0, 3, 6}), ContainsSubstring("pages"));   // the second sequence finds one page of two
  CHECK(cache.free_pages() == 3);
  fovea::AttentionOptions options;
  options.scale = 1;
  const index_t offset[] = {0, 0};
  options.q_offset = offset;
  CHECK_THAT(refused({0, 1, 2}, options), ContainsSubstring("q_offset"));
  options = {};
  options.softcap = -1;   // attention's own refusal, after the append
  CHECK_THAT(refused({0, 1, 2}, options), ContainsSubstring("softcap -1"));
  CHECK(cache.free_pages() == 3);
  layer.block.rope.len = 1;
  CHECK_THAT(refused({0, 2, 2}), ContainsSubstring("the table holds 1 positions"));
  layer.block.rope.len = 64;
  layer.block.weights.o.extent[3] = 79;
  CHECK_THAT(refused({0, 1, 2}), ContainsSubstring("o is [1, 1, 48, 79], must be [1, 1, 48, 80]"));
  layer.block.weights.o.extent[3] = 80;
  layer.block.weights.kv_norm.extent[3] = 41;
  CHECK_THAT(refused({0, 1, 2}), ContainsSubstring("kv_norm is [1, 1, 1, 41] of bf16, must be [1, 1, 1, 40]"));
  layer.block.weights.kv_norm.extent[3] = 40;
  layer.block.weights.q_a.extent[3] = 47;
  CHECK_THAT(refused({0, 1, 2}), ContainsSubstring("q_a is [1, 1, 32, 47]"));
}
