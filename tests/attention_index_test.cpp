// SPDX-License-Identifier: Apache-2.0
// 64-bit indices: tensors of more than 2^31 elements in memory that is mostly never touched, and positions beyond 2^31.
#include <sys/mman.h>

#include <cstddef>
#include <limits>

#include "support/dense.hpp"
#include "support/problem.hpp"

namespace {

using namespace test;

// Address space without memory behind it; pages appear when they are written.
class Sparse {
 public:
  explicit Sparse(index_t floats) : bytes_(static_cast<std::size_t>(floats) * sizeof(float)) {
    at_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  ~Sparse() {
    if (ok()) munmap(at_, bytes_);
  }
  Sparse(const Sparse&) = delete;
  Sparse& operator=(const Sparse&) = delete;

  bool ok() const { return at_ != MAP_FAILED; }
  float* data() const { return static_cast<float*>(at_); }

 private:
  std::size_t bytes_;
  void* at_;
};

constexpr index_t k2e31 = index_t{1} << 31;

void copy(Tensor<const float> from, Tensor<float> to) {
  for (index_t b = 0; b < from.extent[0]; ++b) {
    for (index_t h = 0; h < from.extent[1]; ++h) {
      for (index_t i = 0; i < from.extent[2]; ++i) {
        for (index_t d = 0; d < from.extent[3]; ++d) to(b, h, i, d) = from(b, h, i, d);
      }
    }
  }
}

}  // namespace

TEST_CASE("strides that carry every tensor beyond 2^31 elements", "[index]") {
  const index_t batch = 2, heads = 2, len = 20, dim = 8;
  // Batch, head and pos each step over more than 2^31 elements in total.
  const index_t pos = index_t{1} << 27, head = len * pos, whole = heads * head;
  const Dense x(141, batch, heads, heads, len, len, dim, dim);
  Sparse inputs(batch * whole), output(batch * whole);
  if (!inputs.ok() || !output.ok()) {
    WARN("skipped: no address space of " << ((2 * batch * whole) >> 28) << " GiB here");
    return;
  }
  REQUIRE(head > k2e31);
  const auto spread = [&](Sparse& storage, index_t shift) {
    return Tensor<float>{storage.data() + shift, {batch, heads, len, dim}, {whole, head, pos, 1}};
  };
  const Tensor<float> q = spread(inputs, 0), k = spread(inputs, 1024), v = spread(inputs, 2048), out = spread(output, 0);
  copy(x.q.view(), q), copy(x.k.view(), k), copy(x.v.view(), v);
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    options.causal = Causal::top_left;
    const Result dense = attend(x, options);
    const fovea::Status status = fovea::attention(q, k, v, out, options);
    INFO(status.message());
    REQUIRE(status.ok());
    bool same = true;
    for (index_t b = 0; b < batch; ++b) {
      for (index_t h = 0; h < heads; ++h) {
        for (index_t i = 0; i < len; ++i) {
          for (index_t d = 0; d < dim; ++d) same = same && out(b, h, i, d) == dense.at(b, h, i, d);
        }
      }
    }
    CHECK(same);
  }
}

TEST_CASE("a cache of more than 2^31 elements seen through a window", "[index]") {
  const index_t dim = 16, len_k = (k2e31 / dim) + 1000, visible = 130;
  Sparse keys(len_k * dim), values(len_k * dim);
  if (!keys.ok() || !values.ok()) {
    WARN("skipped: no address space of " << ((2 * len_k * dim) >> 28) << " GiB here");
    return;
  }
  REQUIRE(len_k * dim > k2e31);
  const Tensor<float> k = fovea::bhsd(keys.data(), 1, 1, len_k, dim), v = fovea::bhsd(values.data(), 1, 1, len_k, dim);
  const Dense x(142, 1, 2, 1, 2, visible + 1, dim, dim);
  copy(x.k.view(), only_pos(k, len_k - visible - 1, visible + 1));
  copy(x.v.view(), only_pos(v, len_k - visible - 1, visible + 1));
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    options.causal = Causal::bottom_right;
    options.window = {visible - 1, 0};
    const Result far = attend(x.q.view(), k, v, options);
    const Expected e = expect(x.q.view(), x.k.view(), x.v.view(), options);
    CHECK(distance(far, e) <= 1);
  }
}

TEST_CASE("far query positions and unbounded windows written as huge numbers", "[index]") {
  const Dense x(143, 1, 2, 1, 4, 150, 16, 16);
  constexpr index_t huge = std::numeric_limits<index_t>::max();
  const std::vector<index_t> far{2'000'000'000}, before{-2'000'000'000};
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    const Result plain = attend(x, options);
    options.window = {huge, huge};
    CHECK(same_bits(plain, attend(x, options)));
    options.q_offset = far;
    options.causal = Causal::top_left;
    CHECK(same_bits(plain, attend(x, options)));
    options.window = {1'999'999'999, -1};   // query 0 sees keys from 1 on, query 3 from 4 on
    CHECK(distance(attend(x, options), expect(x.q.view(), x.k.view(), x.v.view(), options)) <= 1);
    options.window = {};
    options.q_offset = before;
    const Result empty = attend(x, options);
    for (float value : empty.out.data) CHECK(value == 0);
    for (float value : empty.lse) CHECK(value == -kInfinity);
    options.causal = Causal::none;
    CHECK(same_bits(plain, attend(x, options)));
    options.window = {-1, 2'000'000'010};
    CHECK(distance(attend(x, options), expect(x.q.view(), x.k.view(), x.v.view(), options)) <= 1);
    options.window = {huge, 0};
    options.q_offset = far;
    CHECK(same_bits(plain, attend(x, options)));
  }
}

TEST_CASE("positions that do not fit 32 bits are refused, never wrapped", "[index]") {
  const Dense x(144, 1, 2, 1, 4, 150, 16, 16);
  const std::vector<index_t> offsets[] = {{5'000'000'000}, {-5'000'000'000}, {2'147'483'646}};
  for (const auto& offset : offsets) {
    AttentionOptions options;
    options.q_offset = offset;
    options.causal = Causal::top_left;
    Result r = unwritten(x.q.view(), x.v.view());
    const fovea::Status status = fovea::attention(x.q.view(), x.k.view(), x.v.view(), r.out.view(), options);
    INFO(status.message());
    CHECK(status.code() == fovea::Code::unsupported);
    CHECK_THAT(std::string(status.message()), Catch::Matchers::ContainsSubstring(std::to_string(offset[0])));
    for (float value : r.out.data) CHECK(is_canary(value));
  }
}
