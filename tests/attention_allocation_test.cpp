// SPDX-License-Identifier: Apache-2.0
// No heap inside kernels: every operator new of the program is counted, and a warm call makes none.
#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>

#include "fovea/cache/append.hpp"
#include "fovea/cache/mixed_cache.hpp"
#include "fovea/cache/paged_cache.hpp"
#include "fovea/mla.hpp"
#include "support/all_formats.hpp"
#include "support/dense.hpp"
#include "support/problem.hpp"

namespace {
std::atomic<long> allocations{0}, allocated{0};   // how many, how many bytes

void* counted(std::size_t bytes, std::size_t alignment) {
  ++allocations;
  allocated += static_cast<long>(bytes);
  void* at = nullptr;
  if (alignment <= alignof(std::max_align_t)) {
    at = std::malloc(bytes == 0 ? 1 : bytes);
  } else if (posix_memalign(&at, alignment, bytes == 0 ? alignment : bytes) != 0) {
    at = nullptr;
  }
  return at;
}
void* counted_or_throw(std::size_t bytes, std::size_t alignment) {
  void* const at = counted(bytes, alignment);
  if (at == nullptr) throw std::bad_alloc();
  return at;
}
}  // namespace

// Inlined, GCC sees the free of a new and warns of a mismatch.
#define OUT_OF_LINE __attribute__((noinline))
OUT_OF_LINE void* operator new(std::size_t bytes) { return counted_or_throw(bytes, 1); }
OUT_OF_LINE void* operator new[](std::size_t bytes) { return counted_or_throw(bytes, 1); }
OUT_OF_LINE void* operator new(std::size_t bytes, std::align_val_t a) {
  return counted_or_throw(bytes, static_cast<std::size_t>(a));
}
OUT_OF_LINE void* operator new[](std::size_t bytes, std::align_val_t a) {
  return counted_or_throw(bytes, static_cast<std::size_t>(a));
}
OUT_OF_LINE void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept { return counted(bytes, 1); }
OUT_OF_LINE void* operator new[](std::size_t bytes, const std::nothrow_t&) noexcept { return counted(bytes, 1); }
OUT_OF_LINE void* operator new(std::size_t bytes, std::align_val_t a, const std::nothrow_t&) noexcept {
  return counted(bytes, static_cast<std::size_t>(a));
}
OUT_OF_LINE void* operator new[](std::size_t bytes, std::align_val_t a, const std::nothrow_t&) noexcept {
  return counted(bytes, static_cast<std::size_t>(a));
}
OUT_OF_LINE void operator delete(void* at) noexcept { std::free(at); }
OUT_OF_LINE void operator delete[](void* at) noexcept { std::free(at); }
OUT_OF_LINE void operator delete(void* at, std::size_t) noexcept { std::free(at); }
OUT_OF_LINE void operator delete[](void* at, std::size_t) noexcept { std::free(at); }
OUT_OF_LINE void operator delete(void* at, std::align_val_t) noexcept { std::free(at); }
OUT_OF_LINE void operator delete[](void* at, std::align_val_t) noexcept { std::free(at); }
OUT_OF_LINE void operator delete(void* at, std::size_t, std::align_val_t) noexcept { std::free(at); }
OUT_OF_LINE void operator delete[](void* at, std::size_t, std::align_val_t) noexcept { std::free(at); }
OUT_OF_LINE void operator delete(void* at, const std::nothrow_t&) noexcept { std::free(at); }
OUT_OF_LINE void operator delete[](void* at, const std::nothrow_t&) noexcept { std::free(at); }
OUT_OF_LINE void operator delete(void* at, std::align_val_t, const std::nothrow_t&) noexcept { std::free(at); }
OUT_OF_LINE void operator delete[](void* at, std::align_val_t, const std::nothrow_t&) noexcept { std::free(at); }

namespace {

using namespace test;

template <class F>
long allocations_of(F&& f) {
  const long before = allocations;
  f();
  return allocations - before;
}

}  // namespace

TEST_CASE("the counter counts", "[allocation]") {
  // The address leaves through a volatile, or clang removes the pair of new and delete, as it may.
  CHECK(allocations_of([] {
          std::vector<int> some(100);
          const volatile int* volatile seen = some.data();
          (void)seen;
        }) == 1);
}

TEST_CASE("a warm call allocates nothing, whatever the options", "[allocation]") {
  for (const Regime regime : {Regime::automatic, Regime::prefill, Regime::decode}) {
    for (const bool everything : {false, true}) {
      Problem p;
      p.regime = regime;
      p.q_heads = 4, p.kv_heads = 2, p.dim_qk = 24, p.dim_v = 40, p.len_q = {30, 30}, p.stored_k = {700, 700};
      if (everything) {
        p.len_k = {650, 3}, p.causal = Causal::bottom_right, p.window = {500, -1}, p.softcap = 5, p.q_offset = {600, 2};
        p.alibi = p.sink = true, p.bias = Share::full, p.keep = Share::heads, p.layout = Layout::padded;
      }
      const Instance x(p);
      Output output(x, true);
      InOrder pool;
      AttentionOptions options = x.options();
      options.lse = output.lse;
      options.executor = {pool, 3};
      fovea::Status status;
      const auto call = [&] { status = fovea::attention(x.q, x.k, x.v, output.out, options); };
      call();
      REQUIRE(status.ok());
      INFO(describe(p));
      CHECK(allocations_of(call) == 0);
      REQUIRE(status.ok());
    }
  }
}

TEST_CASE("a warm ragged call allocates nothing", "[allocation]") {
  Problem p;
  p.is_ragged = true, p.q_heads = 4, p.kv_heads = 2, p.len_q = {1, 20, 0, 70}, p.stored_k = {700, 20, 9, 70};
  const Instance x(p);
  Output output(x, true);
  AttentionOptions options = x.options();
  options.lse = output.lse;
  fovea::Status status;
  const auto call = [&] { status = fovea::attention(x.q, x.k, x.v, output.out, options); };
  call();
  CHECK(allocations_of(call) == 0);
  CHECK(status.ok());
}

TEST_CASE("a smaller call after a larger one allocates nothing", "[allocation]") {
  const Dense large(131, 1, 4, 2, 40, 700, 64, 64), small(132, 2, 2, 1, 3, 90, 16, 16);
  Result r = attend(large), s = attend(small);
  fovea::Status status;
  CHECK(allocations_of([&] {
          for (int repeat = 0; repeat < 3; ++repeat) {
            status = fovea::attention(small.q.view(), small.k.view(), small.v.view(), s.out.view());
            if (!status.ok()) break;
            status = fovea::attention(large.q.view(), large.k.view(), large.v.view(), r.out.view());
            if (!status.ok()) break;
          }
        }) == 0);
  CHECK(status.ok());
}

TEST_CASE("a plan with the caller's workspace allocates nothing, not even the first time", "[allocation]") {
  const Dense x(133, 1, 8, 2, 5, 1200, 48, 48);
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    Result r = unwritten(x.q.view(), x.v.view());
    options.lse = r.lse_view();
    InOrder pool;
    options.executor = {pool, 2};
    const fovea::AttentionShape shape{1, 8, 2, 5, 1200, 48, 48};
    fovea::Plan plan;
    REQUIRE(fovea::make_plan(plan, shape, options).ok());
    std::vector<std::byte> bytes(fovea::workspace_bytes(plan, 2));
    options.workspace = bytes;
    fovea::Status status;
    CHECK(allocations_of(
              [&] { status = fovea::attention(plan, x.q.view(), x.k.view(), x.v.view(), r.out.view(), options); }) == 0);
    CHECK(status.ok());
    CHECK(allocations_of([&] {
            fovea::AttentionRun run;
            status = fovea::prepare(run, plan, x.q.view(), x.k.view(), x.v.view(), r.out.view(), options);
            if (!status.ok()) return;
            fovea::run_lane(run, 1);
            fovea::run_lane(run, 0);
          }) == 0);
    CHECK(status.ok());
    // The same plan object again: its memory is kept.
    CHECK(allocations_of([&] { status = fovea::make_plan(plan, shape, options); }) == 0);
    CHECK(status.ok());
    CHECK(allocations_of([&] { status = fovea::make_plan(plan, {1, 8, 2, 1, 1000, 48, 48}, options); }) == 0);
    CHECK(status.ok());
  }
}

TEST_CASE("weights are recomputed for the rows asked, without a score for every query and key", "[allocation][weights]") {
  const index_t len = 3000, heads = 4;
  const Dense x(135, 1, heads, 2, len, len, 8, 8);
  const std::vector<float> lse(static_cast<std::size_t>(heads * len), 8.f);   // any numbers do
  const std::vector<fovea::WeightRow> rows{{0, 0, 7}, {0, 1, 2999}, {0, 3, 1500}};
  std::vector<float> store(rows.size() * static_cast<std::size_t>(len));
  const View<float, 2> weights{store.data(), {3, len}, {len, 1}};
  fovea::Status status;
  long bytes = 0, warm = -1;
  const auto call = [&] {
    status = fovea::attention_weights(x.q.view(), x.k.view(), {lse.data(), {1, heads, len}, {heads * len, len, 1}}, rows, weights);
  };
  // A thread of its own has no workspace yet.
  std::thread([&] {
    const long before = allocated;
    call();
    bytes = allocated - before;
    warm = allocations_of(call);
  }).join();
  INFO(status.message());
  CHECK(status.ok());
  CHECK(warm == 0);
  // The scores of kStripRows queries and as much again for the rest; those of every query and key would be 36 MB a head.
  INFO(bytes << " bytes");
  CHECK(bytes > 0);
  CHECK(bytes < 2 * 4 * fovea::kStripRows * len);
}

TEST_CASE("a plan with the caller's workspace allocates nothing over stored keys", "[allocation]") {
  const fovea::index_t heads = 4, kv_heads = 2, dim = 32, len = 1100;
  const Dense x(135, 1, heads, kv_heads, 3, len, dim, dim);
  const fovea::CacheRows rows{
      .kv_heads = kv_heads, .dim_qk = dim, .dim_v = dim, .k = fovea::Format::i8_token, .v = fovea::Format::i8_token};
  fovea::PagedCache paged;
  fovea::MixedCache mixed;
  index_t sequence = -1;
  REQUIRE(paged.create({.rows = rows, .pages = 80, .page_size = 16}).ok());
  REQUIRE(paged.create_sequence(&sequence).ok());
  REQUIRE(fovea::append_tokens(paged, 0, x.k.view(), x.v.view()).ok());
  REQUIRE(mixed.create({.rows = rows, .slots = len}).ok());
  REQUIRE(fovea::append_tokens(mixed, 0, x.k.view(), x.v.view()).ok());
  InOrder pool;
  Result r = unwritten(x.q.view(), x.v.view());
  const index_t shared = 1024, cu_len_q[] = {0, 3}, each[] = {0, 1}, prefix[] = {shared}, wanted[] = {0};
  for (const Regime regime : kRegimes) {
    AttentionOptions options;
    options.regime = regime;
    options.causal = Causal::bottom_right;
    options.lse = r.lse_view();
    options.executor = {pool, 2};
    for (const fovea::KvBatch& batch : {paged.batch(), mixed.batch()}) {
      options.workspace = {};
      options.len_k = batch.len_k;
      fovea::Plan plan;
      REQUIRE(fovea::make_plan(plan, {1, heads, kv_heads, 3, len, dim, dim}, options).ok());
      std::vector<std::byte> bytes(fovea::workspace_bytes(plan, 2));
      options.workspace = bytes;
      fovea::Status status;
      CHECK(allocations_of([&] { status = attend_all(plan, x.q.view(), batch.kv, r.out.view(), options); }) == 0);
      INFO(status.message());
      CHECK(status.ok());
    }
    // The same keys as two levels.
    fovea::PageLists lists;
    fovea::KvBatch first, own;
    REQUIRE(paged.csr(wanted, &first).ok());
    REQUIRE(paged.csr(wanted, shared, lists, &own).ok());
    CHECK(allocations_of([&] { static_cast<void>(paged.csr(wanted, shared, lists, &own)); }) == 0);
    const fovea::CascadeLevel levels[] = {{first.kv, each, prefix}, {own.kv, each, own.len_k}};
    options.workspace = {};
    options.len_k = {};
    options.cu_len_q = cu_len_q;
    fovea::CascadePlan plan;
    const fovea::AttentionShape shape{1, heads, kv_heads, 3, 0, dim, dim};
    REQUIRE(fovea::make_plan(plan, shape, levels, options).ok());
    fovea::Status status;
    CHECK(allocations_of([&] { status = fovea::make_plan(plan, shape, levels, options); }) == 0);
    CHECK(status.ok());
    std::vector<std::byte> bytes(fovea::workspace_bytes(plan, 2));
    const auto call = [&] { status = cascade_all(x.q.view(), levels, r.out.view(), options); };
    call();
    CHECK(allocations_of(call) == 0);
    options.workspace = bytes;
    CHECK(allocations_of([&] { status = cascade_all(plan, x.q.view(), levels, r.out.view(), options); }) == 0);
    INFO(status.message());
    CHECK(status.ok());
  }
}

TEST_CASE("MLA with a plan and the caller's workspace allocates nothing", "[allocation][mla]") {
  const fovea::MlaDims dims{4, 8, 4, 20, 12};
  const index_t len_q[] = {1, 9}, keys = 1100;
  std::vector<fovea::bf16> rows(static_cast<std::size_t>(2 * keys * 24)), kv_b(static_cast<std::size_t>(4 * 20 * 20));
  Random random(136);
  for (auto* numbers : {&rows, &kv_b}) {
    for (fovea::bf16& number : *numbers) number = fovea::convert<fovea::bf16>(random.uniform(-1, 1));
  }
  const Values q = random_values(137, 1, dims.heads, 10, 12);
  Values out(1, dims.heads, 10, 12);
  const index_t len_k[] = {keys, keys}, cu_len_q[] = {0, len_q[0], len_q[0] + len_q[1]};
  InOrder pool;
  AttentionOptions options;
  options.causal = Causal::bottom_right;
  options.len_k = len_k;
  options.cu_len_q = cu_len_q;
  options.executor = {pool, 2};
  const fovea::Kv latents = fovea::latent_kv(rows.data(), fovea::Format::bf16, dims, 2, keys);
  const Tensor<const fovea::bf16> weights = fovea::bhsd<const fovea::bf16>(kv_b.data(), 1, dims.heads, 20, 20);
  for (const fovea::MlaForm form : {fovea::MlaForm::absorbed, fovea::MlaForm::expanded}) {
    fovea::MlaPlan plan;
    options.workspace = {};
    REQUIRE(fovea::make_plan(plan, {dims, 1, 10, keys, fovea::Format::bf16}, options, form).ok());
    std::vector<std::byte> bytes(fovea::workspace_bytes(plan, 2));
    options.workspace = bytes;
    fovea::Status status;
    CHECK(allocations_of([&] {
            status = fovea::mla<fovea::Formats<fovea::Format::bf16>>(plan, q.view(), weights, latents, out.view(), options);
          }) == 0);
    INFO(status.message());
    CHECK(status.ok());
  }
}

TEST_CASE("supports, merge and every refusal allocate nothing", "[allocation]") {
  const Dense x(134, 1, 2, 1, 5, 50, 16, 16);
  Result a = attend(x), b = attend(x);
  fovea::Status status;
  CHECK(allocations_of([&] { status = fovea::supports({1, 2, 1, 5, 50, 16, 16}); }) == 0);
  CHECK(status.ok());
  CHECK(allocations_of([&] { status = fovea::merge(a.out.view(), a.lse_view(), b.out.view(), b.lse_view()); }) == 0);
  CHECK(status.ok());
  CHECK(allocations_of([&] { status = fovea::supports({1, 6, 4, 5, 50, 16, 16}); }) == 0);
  CHECK_FALSE(status.ok());
  Tensor<const float> null = x.k.view();
  null.data = nullptr;
  CHECK(allocations_of([&] { status = fovea::attention(x.q.view(), null, x.v.view(), a.out.view()); }) == 0);
  CHECK_FALSE(status.ok());
}
