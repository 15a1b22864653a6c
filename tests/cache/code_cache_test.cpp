// SPDX-License-Identifier: Apache-2.0
#include "fovea/cache/code_cache.hpp"

#include "../support/dense.hpp"
#include "fovea/core/convert.hpp"
#include "fovea/reference/adamas.hpp"

namespace {

using namespace test;
using fovea::Code;
using fovea::CodeCache;

Values integers(std::uint64_t seed, index_t heads, index_t len, index_t dim) {
  Values k(1, heads, len, dim);
  Random random(seed);
  for (float& x : k.data) x = static_cast<float>(random.between(-12, 12));
  return k;
}

}   // namespace

TEST_CASE("code cache: codes of the reference, however the tokens come", "[code_cache]") {
  for (const index_t dim : {index_t{4}, index_t{16}, index_t{64}}) {   // roots of their dims are exact
    const Values k = integers(static_cast<std::uint64_t>(dim), 2, 23, dim);
    for (const index_t chunk : {index_t{1}, index_t{6}, index_t{23}}) {
      CodeCache cache;
      REQUIRE(cache.create({2, 30, 2, dim, 10.f}).ok());
      for (index_t at = 0; at < 23; at += chunk)
        REQUIRE(cache.append(1, only_pos(k.view(), at, std::min(chunk, 23 - at))).ok());
      REQUIRE(cache.lengths()[1] == 23);
      bool equal = true;
      for (index_t h = 0; h < 2; ++h) {
        for (index_t j = 0; j < 23; ++j) {
          const std::vector<int> want = fovea::reference::adamas_codes(&k.view()(0, h, j, 0), dim, 10);
          for (index_t d = 0; d < dim; ++d) {
            const int got = (cache.codes()(1, h, j, d / 4) >> (2 * (d % 4))) & 3;
            equal = equal && got == want[static_cast<std::size_t>(d)];
          }
        }
      }
      CHECK(equal);
    }
  }
}

TEST_CASE("code cache: keys in 16 bits and with strides, tokens taken back", "[code_cache]") {
  const Values k = integers(5, 2, 9, 16);
  std::vector<fovea::bf16> narrow(k.data.size());
  for (index_t h = 0; h < 2; ++h) {
    for (index_t j = 0; j < 9; ++j) {
      for (index_t d = 0; d < 16; ++d)
        narrow[static_cast<std::size_t>((j * 2 + h) * 16 + d)] = fovea::convert<fovea::bf16>(k.view()(0, h, j, d));
    }
  }
  CodeCache a, b;
  REQUIRE(a.create({1, 9, 2, 16, 10.f}).ok());
  REQUIRE(b.create({1, 9, 2, 16, 10.f}).ok());
  REQUIRE(a.append(0, k.view()).ok());
  REQUIRE(b.append(0, fovea::bshd(narrow.data(), 1, 9, 2, 16)).ok());
  REQUIRE(b.truncate(0, 4).ok());
  REQUIRE(b.append(0, only_pos(k.view(), 5, 4)).ok());
  CHECK(std::memcmp(a.codes().data, b.codes().data, 2 * 9 * 4) == 0);
}

TEST_CASE("code cache: refusals change nothing", "[code_cache][errors]") {
  CodeCache cache;
  CHECK(cache.create({1, 4, 1, 48, 10.f}).code() == Code::unsupported);
  CHECK(cache.create({1, 4, 1, 2, 10.f}).code() == Code::unsupported);
  CHECK(cache.create({1, 0, 1, 16, 10.f}).code() == Code::invalid_argument);
  CHECK(cache.create({1, 4, 1, 16, 0.f}).code() == Code::invalid_argument);
  CHECK(cache.create({1, index_t{1} << 45, 1, 16, 10.f}).code() == Code::out_of_memory);
  REQUIRE(cache.create({1, 4, 1, 16, 10.f}).ok());
  const Values k = integers(6, 1, 5, 16);
  CHECK(cache.append(0, k.view()).code() == Code::out_of_pages);
  CHECK(cache.append(2, only_pos(k.view(), 0, 1)).code() == Code::invalid_argument);
  CHECK(cache.append(0, cut(k.view(), 3, 0, 8)).code() == Code::invalid_argument);
  CHECK(cache.append(0, fovea::bhsd<const float>(nullptr, 1, 1, 1, 16)).code() == Code::invalid_argument);
  CHECK(cache.truncate(0, 1).code() == Code::invalid_argument);
  CHECK(cache.lengths()[0] == 0);
}
