// SPDX-License-Identifier: Apache-2.0
#include "fovea/engine/parts/gather.hpp"

#include <cstring>
#include <vector>

#include "catch_compat.hpp"
#include "support/random.hpp"

namespace {

using fovea::AbsentRows;
using fovea::Format;
using fovea::index_t;
using fovea::Stored;

struct Rows {
  index_t count, bytes, stride;
  std::vector<std::byte> memory;

  Rows(index_t count_, index_t bytes_, index_t stride_)
      : count(count_), bytes(bytes_), stride(stride_), memory(static_cast<std::size_t>((count_ - 1) * stride_ + bytes_)) {
    test::Random random(7);
    for (std::byte& b : memory) b = static_cast<std::byte>(random.bits() & 0xff);
  }
  Stored stored() const { return {memory.data(), Format::f32, {0, 0, stride}}; }
  const std::byte* row(index_t n) const { return memory.data() + n * stride; }
};

}   // namespace

TEST_CASE("gather: rows of any width, absent ones skipped or zero", "[gather]") {
  for (const index_t bytes : {4, 63, 64, 132, 656, 1152}) {
    for (const index_t gap : {index_t{0}, index_t{5}}) {
      CAPTURE(bytes, gap);
      const Rows rows(23, bytes, bytes + gap);
      const std::vector<std::int32_t> list{-1, 22, 0, 0, -7, 5, 21, 6, -1};
      for (const AbsentRows absent : {AbsentRows::skip, AbsentRows::zero}) {
        const index_t to_stride = bytes + 3;
        std::vector<std::byte> want(list.size() * static_cast<std::size_t>(to_stride), std::byte{0xa5}), got = want;
        std::byte* to = want.data();
        index_t written = 0;
        for (const std::int32_t n : list) {
          if (n < 0 && absent == AbsentRows::skip) continue;
          if (n < 0) {
            std::memset(to, 0, static_cast<std::size_t>(bytes));
          } else {
            std::memcpy(to, rows.row(n), static_cast<std::size_t>(bytes));
          }
          to += to_stride;
          ++written;
        }
        CHECK(fovea::gather_rows(rows.stored(), bytes, list, absent, got.data(), to_stride) == written);
        CHECK(got == want);
      }
    }
  }
}

TEST_CASE("gather: rows of a format, one behind the other", "[gather]") {
  const index_t bytes = fovea::row_bytes(Format::latent_fp8, 576);
  const Rows rows(9, bytes, bytes);
  Stored stored = rows.stored();
  stored.format = Format::latent_fp8;
  const std::vector<std::int32_t> list{8, 3, 3};
  std::vector<std::byte> got(static_cast<std::size_t>(3 * bytes));
  CHECK(fovea::gather_rows(stored, 576, list, AbsentRows::zero, got.data()) == 3);
  for (index_t n = 0; n < 3; ++n)
    CHECK(std::memcmp(got.data() + n * bytes, rows.row(list[static_cast<std::size_t>(n)]),
                      static_cast<std::size_t>(bytes)) == 0);
}

TEST_CASE("gather: in tiles, the next one announced", "[gather]") {
  const Rows rows(50, 100, 100);
  std::vector<std::int32_t> list;
  for (std::int32_t n = 0; n < 40; ++n) list.push_back(n % 7 == 3 ? -1 : n * 11 % 50);
  std::vector<std::byte> whole(40 * 100), tiles(40 * 100);
  CHECK(fovea::gather_rows(rows.stored(), 100, list, AbsentRows::zero, whole.data(), 100) == 40);
  for (index_t first = 0; first < 40; first += 8)
    CHECK(fovea::gather_rows(rows.stored(), 100, std::span(list).subspan(static_cast<std::size_t>(first), 8),
                             AbsentRows::zero, tiles.data() + first * 100, 100, 32 - first) == 8);
  CHECK(whole == tiles);
}

TEST_CASE("gather: an empty list", "[gather]") {
  std::byte untouched{0x5a};
  CHECK(fovea::gather_rows(Stored{}, 64, std::span<const std::int32_t>{}, AbsentRows::zero, &untouched, 64) == 0);
  CHECK(untouched == std::byte{0x5a});
}
