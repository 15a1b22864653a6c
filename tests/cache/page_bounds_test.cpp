// SPDX-License-Identifier: Apache-2.0
#include "fovea/cache/page_bounds.hpp"

#include "../support/dense.hpp"

namespace {

using namespace test;
using fovea::Code;
using fovea::Format;
using fovea::PageBounds;

float bound_at(const PageBounds& cache, index_t sequence, index_t head, index_t page, index_t d) {
  const fovea::Operand all = cache.bounds();
  const index_t at = sequence * all.stride[0] + head * all.stride[1] + page * all.stride[2] + d;
  float number = 0;
  fovea::read_numbers(all.format, all.data + at * fovea::row_bytes(all.format, 1), 1, 1, &number);
  return number;
}

}   // namespace

TEST_CASE("page bounds: token by token, in chunks and at once", "[page_bounds]") {
  const Values k = random_values(1, 1, 2, 37, 6);
  for (const Format format : {Format::f32, Format::bf16}) {
    for (const index_t chunk : {index_t{1}, index_t{5}, index_t{37}}) {
      PageBounds cache;
      REQUIRE(cache.create({2, 40, 2, 6, 8, format}).ok());
      for (index_t at = 0; at < 37; at += chunk)
        REQUIRE(cache.append(1, only_pos(k.view(), at, std::min(chunk, 37 - at))).ok());
      CHECK(cache.lengths()[0] == 0);
      CHECK(cache.lengths()[1] == 37);
      for (index_t h = 0; h < 2; ++h) {
        for (index_t page = 0; page < 5; ++page) {
          for (index_t d = 0; d < 6; ++d) {
            float largest = -1e9f, smallest = 1e9f;
            for (index_t j = 8 * page; j < std::min<index_t>(37, 8 * page + 8); ++j) {
              largest = std::max(largest, k.view()(0, h, j, d));
              smallest = std::min(smallest, k.view()(0, h, j, d));
            }
            const float upper = bound_at(cache, 1, h, page, d), lower = bound_at(cache, 1, h, page, 6 + d);
            CHECK(upper >= largest);
            CHECK(lower <= smallest);
            const float step = format == Format::f32 ? 0.f : 0x1p-7f;
            CHECK(upper - largest <= step * std::abs(largest));
            CHECK(smallest - lower <= step * std::abs(smallest));
          }
        }
      }
    }
  }
}

TEST_CASE("page bounds: bf16 rounds outwards", "[page_bounds]") {
  PageBounds cache;
  REQUIRE(cache.create({1, 1, 1, 1, 1, Format::bf16}).ok());
  for (const float x : {1.f, 1.00001f, -1.00001f, 1e-30f, -1e-30f, 0.f, -0.f, 3.3895e38f, 0x1.fffffep127f, -0x1.fffffep127f,
                        1e-42f, -1e-42f}) {
    REQUIRE(cache.append(0, fovea::bhsd(&x, 1, 1, 1, 1)).ok());
    INFO(x);
    CHECK(bound_at(cache, 0, 0, 0, 0) >= x);
    CHECK(bound_at(cache, 0, 0, 0, 1) <= x);
    // Above the largest bf16 there is only infinity.
    if (x < 3.39e38f) CHECK(bound_at(cache, 0, 0, 0, 0) - x <= 0x1p-7f * std::abs(x) + 1e-40f);
    REQUIRE(cache.truncate(0, 1).ok());
  }
}

TEST_CASE("page bounds: tokens taken back", "[page_bounds]") {
  const Values k = random_values(2, 1, 1, 20, 4);
  PageBounds cache, fresh;
  REQUIRE(cache.create({1, 32, 1, 4, 8, Format::f32}).ok());
  REQUIRE(fresh.create({1, 32, 1, 4, 8, Format::f32}).ok());
  REQUIRE(cache.append(0, k.view()).ok());
  REQUIRE(fresh.append(0, only_pos(k.view(), 0, 18)).ok());
  REQUIRE(cache.truncate(0, 2, only_pos(k.view(), 16, 2)).ok());
  for (index_t d = 0; d < 8; ++d) CHECK(bound_at(cache, 0, 0, 2, d) == bound_at(fresh, 0, 0, 2, d));
  REQUIRE(cache.truncate(0, 6).ok());   // 12 keys: page 1 keeps what it had
  CHECK(cache.lengths()[0] == 12);
  for (index_t d = 0; d < 8; ++d) CHECK(bound_at(cache, 0, 0, 1, d) == bound_at(fresh, 0, 0, 1, d));
  CHECK(cache.truncate(0, 13).code() == Code::invalid_argument);
  CHECK(cache.truncate(0, 1, only_pos(k.view(), 8, 2)).code() == Code::invalid_argument);
  CHECK(cache.lengths()[0] == 12);
}

TEST_CASE("page bounds: refusals change nothing", "[page_bounds][errors]") {
  PageBounds cache;
  CHECK(cache.create({0, 4, 1, 4, 2, Format::f32}).code() == Code::invalid_argument);
  CHECK(cache.create({1, 4, 1, 4, 2, Format::i8_token}).code() == Code::unsupported);
  CHECK(cache.create({1, index_t{1} << 44, 1 << 10, 4, 2, Format::f32}).code() == Code::out_of_memory);
  CHECK(cache.create({1, 4, 1, 4, PTRDIFF_MAX, Format::f32}).code() == Code::invalid_argument);
  REQUIRE(cache.create({1, 4, 1, 4, 2, Format::f32}).ok());
  const Values k = random_values(3, 1, 1, 5, 4);
  CHECK(cache.append(0, k.view()).code() == Code::out_of_pages);
  CHECK(cache.append(1, only_pos(k.view(), 0, 1)).code() == Code::invalid_argument);
  CHECK(cache.append(0, cut(k.view(), 3, 0, 3)).code() == Code::invalid_argument);
  CHECK(cache.append(0, fovea::bhsd<const float>(nullptr, 1, 1, 1, 4)).code() == Code::invalid_argument);
  CHECK(cache.lengths()[0] == 0);
}
