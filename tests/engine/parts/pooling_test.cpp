// SPDX-License-Identifier: Apache-2.0
#include "fovea/engine/parts/pooling.hpp"

#include <cmath>
#include <limits>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/simd/quantise.hpp"
#include "support/poison.hpp"
#include "support/random.hpp"

namespace {

using fovea::Format;
using fovea::index_t;

constexpr float kInf = std::numeric_limits<float>::infinity();
std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

std::vector<float> normal(index_t n, std::uint64_t seed) {
  test::Random random(seed);
  std::vector<float> numbers(at(n));
  for (float& x : numbers) x = random.normal();
  return numbers;
}

// Small integers: sums are exact in any order.
std::vector<float> integers(index_t n, std::uint64_t seed) {
  test::Random random(seed);
  std::vector<float> numbers(at(n));
  for (float& x : numbers) x = static_cast<float>(random.between(-8, 8));
  return numbers;
}

auto rows_of(const std::vector<float>& rows, index_t dim) {
  return [&rows, dim](index_t begin, index_t end, const auto& f) {
    for (index_t r = begin; r < end; ++r) f(r, rows.data() + r * dim);
  };
}

}   // namespace

TEST_CASE("block means: whole blocks, the cut last one, a start in the middle", "[pooling]") {
  for (const index_t dim : {1, 5, 16, 37}) {
    const index_t len = 23;
    const std::vector<float> rows = integers(len * dim, 3);
    for (const index_t size : {1, 4, 16, 64}) {
      for (const auto& [begin, end] : {std::pair<index_t, index_t>{0, len}, {5, 20}, {7, 7}, {22, 23}}) {
        const index_t blocks = (end - begin + size - 1) / size;
        test::Poisoned means(blocks * dim);
        fovea::pool_mean(rows_of(rows, dim), begin, end, size, dim, means.data());
        for (index_t b = 0; b < blocks; ++b) {
          const index_t first = begin + b * size, last = std::min(first + size, end);
          for (index_t d = 0; d < dim; ++d) {
            float sum = 0;
            for (index_t r = first; r < last; ++r) sum += rows[at(r * dim + d)];
            CHECK(means.data()[b * dim + d] == sum / static_cast<float>(last - first));
          }
        }
        CHECK(test::is_canary(means.data()[blocks * dim]));
      }
    }
  }
}

TEST_CASE("block bounds: at once, and one token after the other", "[pooling]") {
  const index_t dim = 21, len = 19, size = 8, blocks = 3;
  const std::vector<float> rows = normal(len * dim, 5);
  std::vector<float> low(at(blocks * dim)), high(low);
  fovea::pool_bounds(rows_of(rows, dim), 0, len, size, dim, low.data(), high.data());
  for (index_t b = 0; b < blocks; ++b) {
    for (index_t d = 0; d < dim; ++d) {
      float least = kInf, most = -kInf;
      for (index_t r = b * size; r < std::min((b + 1) * size, len); ++r) {
        least = std::min(least, rows[at(r * dim + d)]);
        most = std::max(most, rows[at(r * dim + d)]);
      }
      CHECK(low[at(b * dim + d)] == least);
      CHECK(high[at(b * dim + d)] == most);
    }
  }
  test::Poisoned step_low(dim), step_high(dim);
  fovea::open_bounds(rows.data() + 16 * dim, dim, step_low.data(), step_high.data());
  for (index_t r = 17; r < len; ++r) fovea::widen_bounds(rows.data() + r * dim, dim, step_low.data(), step_high.data());
  CHECK(std::equal(low.begin() + 2 * dim, low.end(), step_low.data()));
  CHECK(std::equal(high.begin() + 2 * dim, high.end(), step_high.data()));
  CHECK(test::is_canary(step_low.data()[dim]));
}

TEST_CASE("Quest's golden bounds", "[pooling]") {
  const std::vector<float> rows{1, -2, 3, 0, -1, 4, 0, 1};
  float low[2], high[2];
  fovea::pool_bounds(rows_of(rows, 2), 0, 4, 4, 2, low, high);
  CHECK((low[0] == -1 && low[1] == -2 && high[0] == 3 && high[1] == 4));
}

TEST_CASE("rows of every format read as what their codec says", "[pooling]") {
  for (int f = 0; f < fovea::kFormats; ++f) {
    const auto format = static_cast<Format>(f);
    const index_t dim = format == Format::latent_fp8 ? fovea::kLatentFp8Dim : 70;
    const std::vector<float> row = normal(dim, 50 + static_cast<std::uint64_t>(f)), unit(at(dim), 0.03f);
    std::vector<std::byte> stored(at(fovea::row_bytes(format, dim)), std::byte{0xff});
    static_cast<void>(fovea::quantise_row(format, row.data(), 1, dim, unit.data(), stored.data()));
    const fovea::RowReader read = fovea::row_reader(format, fovea::AllFormats{});
    REQUIRE(read != nullptr);
    test::Poisoned numbers(dim);
    read(stored.data(), dim, numbers.data());
    // 4-bit steps are a fifteenth of a group's range of some 5, 8-bit channel codes steps of 0.03.
    for (index_t d = 0; d < dim; ++d) {
      const float value = format == Format::i8_channel ? numbers.data()[d] * 0.03f : numbers.data()[d];
      const bool clipped = format == Format::i8_channel && std::abs(row[at(d)]) > 3.8f;
      if (!clipped) CHECK(std::abs(value - row[at(d)]) < 0.3f);
      if (fovea::is_plain(format)) CHECK(std::abs(value - row[at(d)]) <= std::abs(row[at(d)]) / 256);
    }
    CHECK(test::is_canary(numbers.data()[dim]));
  }
  CHECK(fovea::row_reader(Format::bf16, fovea::Formats<Format::f32>{}) == nullptr);
}

TEST_CASE("keys of a paged and of a contiguous home are the same rows", "[pooling]") {
  const index_t heads = 2, len = 11, dim = 6, page = 4;
  const std::vector<float> keys = normal(heads * len * dim, 7);
  fovea::Kv flat;
  flat.k = flat.v = fovea::stored_rows(keys.data(), Format::f32, dim, heads, len);
  flat.kv_heads = heads;
  flat.dim_qk = flat.dim_v = dim;
  flat.len = len;
  // Pages in the pool stand backwards.
  const std::int32_t table[3] = {2, 1, 0};
  std::vector<float> pool(at(3 * heads * page * dim), std::numeric_limits<float>::quiet_NaN());
  for (index_t h = 0; h < heads; ++h) {
    for (index_t s = 0; s < len; ++s)
      std::copy_n(keys.data() + (h * len + s) * dim, dim,
                  pool.data() + ((table[s / page] * heads + h) * page + s % page) * dim);
  }
  fovea::Kv paged = flat;
  paged.k = paged.v = fovea::stored_rows(pool.data(), Format::f32, dim, heads, page);
  paged.batch = 3;
  paged.len = page;
  paged.home = fovea::Home::paged;
  paged.block_table = {table, {1, 3}, {3, 1}};
  const fovea::Sequence sequence{0, 1, 0, len, 0, 0, 0};
  for (const fovea::Kv& kv : {flat, paged}) {
    fovea::KeyRows rows;
    REQUIRE(fovea::KeyRows::open({kv, &sequence, {}, {}}, fovea::Formats<Format::f32>{}, rows).ok());
    index_t next = 3;
    std::vector<float> row(at(dim));
    rows.each(0, 1, 3, len, row.data(), [&](index_t key, const float* numbers) {
      CHECK(key == next++);
      CHECK(std::equal(numbers, numbers + dim, keys.data() + (len + key) * dim));
    });
    CHECK(next == len);
    const auto refused = fovea::KeyRows::open({kv, &sequence, {}, {}}, fovea::Formats<Format::bf16>{}, rows);
    CHECK(refused.code() == fovea::Code::unsupported);
  }
}

TEST_CASE("keys of a mixed cache with scales per channel: both parts times the scales", "[pooling]") {
  const index_t len = 9, heads = 2, dim = 21, first = 2, from = 6;   // the exact part: 0, 1, 6, 7, 8
  std::vector<std::int8_t> codes(at(heads * len * dim));
  std::vector<fovea::bf16> near(at(heads * 5 * dim));
  std::vector<float> scale(at(heads * dim));
  for (std::size_t n = 0; n < codes.size(); ++n) codes[n] = static_cast<std::int8_t>(n * 37 % 255 - 127);
  for (std::size_t n = 0; n < near.size(); ++n) near[n] = fovea::convert<fovea::bf16>(static_cast<float>(n % 200) + 0.5f);
  for (std::size_t n = 0; n < scale.size(); ++n) scale[n] = 0.25f * static_cast<float>(n + 1);
  const index_t exact_from[] = {from};
  fovea::Kv kv, exact;
  kv.kv_heads = exact.kv_heads = heads;
  kv.dim_qk = kv.dim_v = exact.dim_qk = exact.dim_v = dim;
  kv.k = kv.v = fovea::stored_rows(codes.data(), Format::i8_channel, dim, heads, len);
  kv.len = len;
  kv.k_channel_scale = scale.data();
  exact.k = exact.v = fovea::stored_rows(near.data(), Format::bf16, dim, heads, 5);
  exact.len = 5;
  kv.exact = &exact;
  kv.exact_first = first;
  kv.exact_from = exact_from;
  const fovea::Sequence sequence{0, 1, 0, len, 0, 0, 0};
  fovea::KeyRows rows;
  REQUIRE(
      fovea::KeyRows::open({kv, &sequence, {}, {}}, fovea::Formats<Format::i8_channel, Format::bf16>{}, rows).ok());
  std::vector<float> row(at(dim));
  index_t next = 0;
  for (const index_t h : {0, 1}) {
    rows.each(0, h, 0, len, row.data(), [&](index_t key, const float* numbers) {
      CHECK(key == next++ % len);
      for (index_t d = 0; d < dim; ++d) {
        const index_t slot = key < first ? key : key - from + first;
        const float stored = key < first || key >= from ? fovea::convert<float>(near[at((h * 5 + slot) * dim + d)])
                                                        : static_cast<float>(codes[at((h * len + key) * dim + d)]);
        CHECK(numbers[d] == stored * scale[at(h * dim + d)]);
      }
    });
  }
  CHECK(next == 2 * len);
}

TEST_CASE("softmax of a row: weights, LSE, masked scores, empty rows, block sums", "[pooling]") {
  for (const index_t n : {1, 3, 16, 17, 100}) {
    std::vector<float> scores = normal(n, 60 + static_cast<std::uint64_t>(n));
    for (float& x : scores) x *= 3;
    if (n > 2) scores[1] = -kInf;
    double sum = 0;
    for (const float x : scores) sum += std::exp(double{x});
    std::vector<double> weights;
    for (const float x : scores) weights.push_back(std::exp(double{x}) / sum);
    for (const index_t size : {1, 4, 7, 200}) {
      test::Poisoned row(n), sums((n + size - 1) / size);
      std::copy(scores.begin(), scores.end(), row.data());
      const float lse = fovea::softmax_block_sums({row.data(), at(n)}, size, sums.data());
      CHECK(std::abs(double{lse} - std::log(sum)) < 1e-5);
      for (index_t i = 0; i < n; ++i) CHECK(std::abs(double{row.data()[i]} - weights[at(i)]) < 1e-6);
      for (index_t b = 0; b * size < n; ++b) {
        double block = 0;
        for (index_t i = b * size; i < std::min((b + 1) * size, n); ++i) block += weights[at(i)];
        CHECK(std::abs(double{sums.data()[b]} - block) < 1e-6);
      }
      CHECK(test::is_canary(row.data()[n]));
      CHECK(test::is_canary(sums.data()[(n + size - 1) / size]));
    }
  }
  std::vector<float> masked(20, -kInf);
  CHECK(fovea::softmax_row(masked) == -kInf);
  CHECK(masked == std::vector<float>(20, 0.f));
  CHECK(fovea::softmax_row({}) == -kInf);
}

TEST_CASE("pools: kernel, stride and pad as networks define them", "[pooling]") {
  for (const index_t n : {1, 4, 5, 40, 71}) {
    const std::vector<float> numbers = integers(n, 9);
    for (const index_t kernel : {1, 2, 5, 7}) {
      for (const index_t stride : {1, 2, 4}) {
        for (const index_t pad : {index_t{0}, index_t{1}, kernel / 2}) {
          if (2 * pad > kernel) continue;
          const index_t length = fovea::pooled_length(n, kernel, stride, pad);
          test::Poisoned most(length), mean(length);
          fovea::max_pool(numbers, kernel, stride, pad, most.data());
          fovea::average_pool(numbers, kernel, stride, pad, mean.data());
          INFO("n " << n << ", kernel " << kernel << ", stride " << stride << ", pad " << pad);
          CHECK(length == (n + 2 * pad < kernel ? 0 : (n + 2 * pad - kernel) / stride + 1));
          for (index_t o = 0; o < length; ++o) {
            float sum = 0, best = -kInf;
            for (index_t i = o * stride - pad; i < o * stride - pad + kernel; ++i) {
              const bool inside = i >= 0 && i < n;
              sum += inside ? numbers[at(i)] : 0;
              best = inside ? std::max(best, numbers[at(i)]) : best;
            }
            REQUIRE(most.data()[o] == best);
            REQUIRE(mean.data()[o] == sum / static_cast<float>(kernel));
          }
          REQUIRE(test::is_canary(most.data()[length]));
          REQUIRE(test::is_canary(mean.data()[length]));
        }
      }
    }
  }
  // SnapKV: zeros at the edge count.
  const float votes[3] = {5, 5, 5};
  float smooth[3];
  fovea::average_pool(votes, 5, 1, 2, smooth);
  CHECK((smooth[0] == 3 && smooth[1] == 3 && smooth[2] == 3));
}

TEST_CASE("antidiagonals: the golden tiles, and any stride, dim and length against the sum itself", "[pooling]") {
  const auto run = [](const fovea::Antidiagonals& of) {
    fovea::Bump size;
    fovea::carve_project(size, of.rows);
    test::PoisonedBytes bytes(size.used() + fovea::kAlignment);
    fovea::Bump bump(fovea::aligned(bytes.bytes()).data());
    const fovea::ProjectMemory memory = fovea::carve_project(bump, of.rows);
    std::vector<float> scores(at(of.rows * of.columns), std::numeric_limits<float>::quiet_NaN());
    for (index_t task = 0; task < fovea::antidiagonal_tasks(of); ++task) {
      fovea::antidiagonal_task(task, of, memory, [&](index_t i, index_t j, index_t count, const float* from) {
        std::copy_n(from, count, scores.data() + i * of.columns + j);
      });
    }
    CHECK(bytes.guards_intact());
    return scores;
  };
  const std::vector<float> q{1, 2, 3, 4}, k{1, 0, 2, 1};
  CHECK(run({q.data(), 1, 2, k.data(), 2, 2, 1}) == std::vector<float>{2, 5, 4, 11});

  for (const auto& [stride, dim] : {std::pair<index_t, index_t>{1, 8}, {2, 5}, {8, 16}, {3, 70}}) {
    const index_t rows = 13, columns = 9, q_stride = dim + 3;
    const std::vector<float> a = integers(rows * stride * q_stride, 1), b = integers(columns * stride * dim, 2);
    const std::vector<float> scores = run({a.data(), q_stride, rows, b.data(), columns, stride, dim});
    for (index_t i = 0; i < rows; ++i) {
      for (index_t j = 0; j < columns; ++j) {
        float sum = 0;
        for (index_t s = 0; s < stride; ++s) {
          for (index_t d = 0; d < dim; ++d)
            sum += a[at((i * stride + stride - 1 - s) * q_stride + d)] * b[at((j * stride + s) * dim + d)];
        }
        CHECK(scores[at(i * columns + j)] == sum);
      }
    }
  }
}
