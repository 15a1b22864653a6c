// SPDX-License-Identifier: Apache-2.0
#include "fovea/simd/project.hpp"

#include <cmath>
#include <cstring>
#include <vector>

#include "catch_compat.hpp"
#include "fovea/core/convert.hpp"
#include "support/poison.hpp"
#include "support/random.hpp"

namespace {

using fovea::Format;
using fovea::index_t;
using fovea::Operand;
using fovea::Tensor;
using fovea::Weights;

// Numbers of one format with room between the rows, which holds NaN.
struct Stored {
  Format format;
  index_t rows, columns, stride;
  std::vector<std::byte> bytes;

  Stored(Format format_, index_t rows_, index_t columns_, std::uint64_t seed, index_t gap = 3)
      : format(format_), rows(rows_), columns(columns_), stride(columns_ + gap) {
    test::Random random(seed);
    bytes.assign(static_cast<std::size_t>(rows * stride * fovea::row_bytes(format, 1)), std::byte{0xff});
    for (index_t r = 0; r < rows; ++r) {
      for (index_t c = 0; c < columns; ++c) {
        const float x = random.normal();
        fovea::write_numbers(format, &x, 1, at(r, c), 1);
      }
    }
  }
  std::byte* at(index_t r, index_t c) { return bytes.data() + (r * stride + c) * fovea::row_bytes(format, 1); }
  double value(index_t r, index_t c) const {
    float x = 0;
    fovea::read_numbers(format, bytes.data() + (r * stride + c) * fovea::row_bytes(format, 1), 1, 1, &x);
    return double{x};
  }
  Operand view() const {
    Operand operand;
    operand.data = bytes.data();
    operand.format = format;
    operand.extent = {1, 1, rows, columns};
    operand.stride = {0, 0, stride, 1};
    return operand;
  }
};

struct Memory {
  test::PoisonedBytes bytes;
  fovea::ProjectMemory memory;

  static std::size_t size(index_t rows) {
    fovea::Bump counting;
    fovea::carve_project(counting, rows);
    return counting.used() + fovea::kAlignment;
  }
  explicit Memory(index_t rows) : bytes(size(rows)) {
    fovea::Bump bump(fovea::aligned(bytes.bytes()).data());
    memory = fovea::carve_project(bump, rows);
  }
};

std::vector<float> product(const Operand& a, const Operand& b, Weights order, index_t columns) {
  Memory memory(a.extent[2]);
  std::vector<float> c(static_cast<std::size_t>(a.extent[2] * columns), test::canary());
  const fovea::Status status = project_rows(a, b, order, fovea::bhsd(c.data(), 1, 1, a.extent[2], columns), memory.memory);
  INFO(status.message());
  REQUIRE(status.ok());
  CHECK(memory.bytes.guards_intact());
  return c;
}

}   // namespace

// A chain of `depth` fused multiply-adds is off by at most depth u sum |a b|; without the fused instruction by one more
// rounding per product. Numbers of A, B and C are exact in fp32, C is written as fp32.
TEST_CASE("a projection against the product in double", "[project]") {
  struct Shape {
    index_t rows, depth, columns;
  };
  const Shape shapes[] = {{1, 1, 1}, {1, 128, 40}, {3, 17, 31}, {12, 256, 32}, {13, 257, 33}, {25, 300, 300}, {390, 9, 20}};
  for (const auto& [rows, depth, columns] : shapes) {
    for (const Format weights : {Format::f32, Format::bf16, Format::f16}) {
      for (const Weights order : {Weights::by_output, Weights::by_input}) {
        const bool by_output = order == Weights::by_output;
        const Stored a(weights == Format::f32 ? Format::bf16 : Format::f32, rows, depth, 1);
        const Stored b(weights, by_output ? columns : depth, by_output ? depth : columns, 2);
        const std::vector<float> c = product(a.view(), b.view(), order, columns);
        double worst = 0;
        for (index_t m = 0; m < rows; ++m) {
          for (index_t n = 0; n < columns; ++n) {
            double exact = 0, size = 0;
            for (index_t k = 0; k < depth; ++k) {
              const double term = a.value(m, k) * (by_output ? b.value(n, k) : b.value(k, n));
              exact += term;
              size += std::abs(term);
            }
            const double budget = 0x1p-24 * (static_cast<double>(depth) + 1) * size;
            const double error = std::abs(double{c[static_cast<std::size_t>(m * columns + n)]} - exact);
            worst = error <= budget ? std::max(worst, error / budget) : INFINITY;
          }
        }
        CAPTURE(rows, depth, columns, fovea::name_of(weights), by_output);
        CHECK(worst <= 1);
      }
    }
  }
}

TEST_CASE("the bits of a row do not depend on the rows beside it, nor on how the weights lie", "[project][bits]") {
  const index_t rows = 26, depth = 300, columns = 70;
  const Stored a(Format::f32, rows, depth, 3), b(Format::bf16, columns, depth, 4);
  Stored turned(Format::bf16, depth, columns, 5);
  for (index_t n = 0; n < columns; ++n) {
    for (index_t k = 0; k < depth; ++k) std::memcpy(turned.at(k, n), b.bytes.data() + (n * b.stride + k) * 2, 2);
  }
  const std::vector<float> all = product(a.view(), b.view(), Weights::by_output, columns);
  CHECK(std::memcmp(all.data(), product(a.view(), turned.view(), Weights::by_input, columns).data(), all.size() * 4) == 0);
  for (const index_t first : {0, 7, 25}) {
    Operand one = a.view();
    one.data += first * a.stride * 4;
    one.extent[2] = 1;
    const std::vector<float> alone = product(one, b.view(), Weights::by_output, columns);
    CHECK(std::memcmp(alone.data(), all.data() + first * columns, alone.size() * 4) == 0);
  }
}

TEST_CASE("a projection reads and writes strided numbers of any plain format", "[project]") {
  const index_t rows = 5, depth = 20, columns = 9;
  const Stored b(Format::f32, columns, depth, 6);
  for (const Format format : {Format::f32, Format::f64, Format::bf16, Format::f16}) {
    const index_t bytes = fovea::row_bytes(format, 1);
    // A is stored [number, row], C likewise with a gap of one.
    Stored a(format, depth, rows, 7);
    Operand turned = a.view();
    turned.extent = {1, 1, rows, depth};
    turned.stride = {0, 0, 1, a.stride};
    Stored plain(format, rows, depth, 8);
    for (index_t m = 0; m < rows; ++m) {
      for (index_t k = 0; k < depth; ++k) std::memcpy(plain.at(m, k), a.at(k, m), static_cast<std::size_t>(bytes));
    }
    const std::vector<float> expected = product(plain.view(), b.view(), Weights::by_output, columns);
    std::vector<std::byte> c(static_cast<std::size_t>(columns * (rows + 1) * bytes), std::byte{0xff});
    fovea::Result result;
    result.data = c.data();
    result.format = format;
    result.extent = {1, 1, rows, columns};
    result.stride = {0, 0, 1, rows + 1};
    Memory memory(rows);
    REQUIRE(project_rows(turned, b.view(), Weights::by_output, result, memory.memory).ok());
    for (index_t n = 0; n < columns; ++n) {
      for (index_t m = 0; m < rows; ++m) {
        std::byte wanted[8];
        fovea::write_numbers(format, &expected[static_cast<std::size_t>(m * columns + n)], 1, wanted, 1);
        CAPTURE(fovea::name_of(format), m, n);
        CHECK(std::memcmp(wanted, c.data() + (n * (rows + 1) + m) * bytes, static_cast<std::size_t>(bytes)) == 0);
      }
      CHECK(c[static_cast<std::size_t>((n * (rows + 1) + rows) * bytes)] == std::byte{0xff});
    }
  }
}

TEST_CASE("a projection that does not fit says its numbers", "[project][errors]") {
  const Stored a(Format::f32, 4, 8, 1), b(Format::f32, 5, 8, 2);
  std::vector<float> c(20, test::canary());
  Memory memory(4);
  const auto message = [&](const Operand& from, const Operand& by, Weights order, index_t columns) {
    const fovea::Status s = project_rows(from, by, order, fovea::bhsd(c.data(), 1, 1, 4, columns), memory.memory);
    CHECK(!s.ok());
    CHECK(test::is_canary(c[0]));
    return std::string(s.message());
  };
  using Catch::Matchers::ContainsSubstring;
  CHECK_THAT(message(a.view(), b.view(), Weights::by_output, 4), ContainsSubstring("b [5, 8] stored by output, c [4, 4]"));
  CHECK_THAT(message(a.view(), b.view(), Weights::by_input, 5), ContainsSubstring("a is [4, 8], b [5, 8] stored by input"));
  Operand wide = b.view();
  wide.format = Format::f64;
  CHECK_THAT(message(a.view(), wide, Weights::by_output, 5), ContainsSubstring("b f64"));
  Operand turned = b.view();
  turned.stride = {0, 0, 1, 5};
  CHECK_THAT(message(a.view(), turned, Weights::by_output, 5), ContainsSubstring("innermost stride 5"));
}
