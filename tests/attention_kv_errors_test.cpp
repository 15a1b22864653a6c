// SPDX-License-Identifier: Apache-2.0
// A bad Kv is answered by a Status with the numbers in it, and nothing is written; a hostile one never crashes a call.
#include <functional>
#include <optional>

#include "catch_compat.hpp"
#include "support/stored.hpp"

namespace {

using namespace test;
using fovea::Code;
using fovea::Status;

constexpr index_t kHeads = 4, kKvHeads = 2;
constexpr Code kInvalid = Code::invalid_argument, kUnsupported = Code::unsupported;

// What a case begins with: a correct call of 3 sequences with 20, 9 and 33 keys, 2 queries each, dims 24 and 16.
enum class Base { contiguous, paged, lists, ring, mixed, mixed_ring };

Lodging lodging(Base base) {
  Lodging how;
  how.home = base == Base::contiguous || base == Base::mixed_ring ? Home::contiguous
             : base == Base::ring                                 ? Home::ring
                                                                  : Home::paged;
  how.page_size = 8;
  how.csr = base == Base::lists;
  how.sinks = 4;
  how.columns_behind = 0;
  how.spare = 2;
  return how;
}

// Encoded once: the cases are thousands.
const Keys& middle_keys() {
  static const Keys keys(1, Format::bf16, Format::i8_token, kKvHeads, 24, 16, {20, 9, 33});
  return keys;
}
const Keys& exact_rows() {
  static const Keys keys(1, Format::bf16, Format::bf16, kKvHeads, 24, 16, {20, 9, 33});
  return keys;
}
const Tokens& queries() {
  static const Tokens tokens = random_queries(3, 6, kHeads, 24);
  return tokens;
}

struct Call {
  const Keys &keys = middle_keys(), &exact_keys = exact_rows();
  Tokens q_tokens = queries();
  Answer answer{Format::f32, 6, kHeads, 16};
  std::optional<Housed> home, exact_home;
  std::vector<index_t> exact_from{12, 9, 20};
  Kv kv, exact;
  fovea::Operand q = q_tokens.operand(3);
  fovea::Result out;
  AttentionOptions options;
  std::vector<index_t> numbers;
  std::vector<float> scales = std::vector<float>(kKvHeads * 24, 1.f);
  std::vector<std::int32_t> pages;

  explicit Call(Base base) {
    Placement tokens = consecutive(keys.len), exact_tokens(3);
    if (base == Base::mixed || base == Base::mixed_ring) {
      Lodging how;
      how.home = base == Base::mixed_ring ? Home::ring : Home::contiguous;
      how.sinks = 4;
      for (std::size_t s = 0; s < 3; ++s) {
        for (index_t j = 0; j < keys.len[s]; ++j) {
          if (j < 4 || j >= exact_from[s]) exact_tokens[s].push_back(tokens[s][at(j)]);
        }
        tokens[s].resize(at(exact_from[s]));
      }
      exact_home.emplace(exact_keys.k, exact_keys.v, exact_tokens, how);
      exact = exact_home->kv();
    }
    home.emplace(keys.k, keys.v, tokens, lodging(base));
    kv = home->kv();
    if (exact_home) {
      kv.exact = &exact;
      kv.exact_first = 4;
      kv.exact_from = exact_from;
    }
    out = answer.out.result(3);
    options.len_k = keys.len;
    options.lse = answer.lse_view(3);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
};

using Spoil = std::function<void(Call&)>;

// All `words` must stand in the message.
void refused(const char* what, Base base, Code code, std::initializer_list<const char*> words, const Spoil& spoil) {
  Call call(base);
  spoil(call);
  const Status status = attend_all(call.q, call.kv, call.out, call.options);
  INFO(what << ": \"" << status.message() << "\"");
  CHECK(status.code() == code);
  for (const char* word : words) CHECK_THAT(std::string(status.message()), Catch::Matchers::ContainsSubstring(word));
  CHECK(call.answer.untouched());
}

Spoil with_numbers(std::vector<index_t> values, const std::function<void(Call&)>& use) {
  return [values = std::move(values), use](Call& c) {
    c.numbers = values;
    use(c);
  };
}

}   // namespace

TEST_CASE("the calls that the cases of errors spoil are good ones", "[errors][storage]") {
  for (const Base base : {Base::contiguous, Base::paged, Base::lists, Base::ring, Base::mixed, Base::mixed_ring}) {
    Call call(base);
    const Status status = attend_all(call.q, call.kv, call.out, call.options);
    INFO(static_cast<int>(base) << ": \"" << status.message() << "\"");
    CHECK(status.ok());
    CHECK_FALSE(call.answer.has_nan());
  }
}

TEST_CASE("formats that cannot be", "[errors][storage]") {
  const Base any = Base::paged;
  refused("q in codes", any, kUnsupported, {"q has format i8_token"}, [](Call& c) { c.q.format = Format::i8_token; });
  refused("out in codes", any, kUnsupported, {"out has format e4m3"}, [](Call& c) { c.out.format = Format::e4m3; });
  refused("q outside the enum", any, kUnsupported, {"q has format outside"}, [](Call& c) { c.q.format = Format{77}; });
  refused("out outside the enum", any, kUnsupported, {"out has format outside"}, [](Call& c) { c.out.format = Format{13}; });
  refused("k outside the enum", any, kInvalid, {"k has format 13"}, [](Call& c) { c.kv.k.format = Format{13}; });
  refused("v outside the enum", any, kInvalid, {"v has format 255"}, [](Call& c) { c.kv.v.format = Format{255}; });
  refused("v with scales per channel", any, kUnsupported, {"v has format i8_channel"},
          [](Call& c) { c.kv.v.format = Format::i8_channel; });
  refused("k with scales per channel, and none", any, kInvalid, {"no k_channel_scale"},
          [](Call& c) { c.kv.k.format = Format::i8_channel; });
  refused("scales for k in bf16", any, kInvalid, {"k is bf16"}, [](Call& c) { c.kv.k_channel_scale = c.scales.data(); });
  refused("a latent k of other dims", any, kInvalid, {"576 numbers", "dim_qk is 24"},
          [](Call& c) { c.kv.k.format = Format::latent_fp8; });
  refused("a latent v of other dims", any, kInvalid, {"512 numbers", "dim_v is 16"},
          [](Call& c) { c.kv.v.format = Format::latent_fp8; });
  refused("v as the head of rows whose scales lie behind", any, kUnsupported, {"i8_token rows", "24"}, [](Call& c) {
    c.kv.k.format = c.kv.v.format = Format::i8_token;
    c.kv.v = c.kv.k;
  });
  refused("bf16 panels of f32 rows", Base::contiguous, kUnsupported, {fovea::kHasBf16Dot ? "f32" : "BF16"}, [](Call& c) {
    c.kv.k.format = Format::f32;
    c.kv.dim_qk = c.q.extent[3] = 12;   // the same bytes
    c.options.panels = Panels::bf16;
  });
  refused("bf16 panels with an exact part in f32", Base::mixed, kUnsupported, {fovea::kHasBf16Dot ? "wider" : "BF16"},
          [](Call& c) {
            c.exact.v.format = Format::f32;
            c.exact.v.stride[1] = c.exact.v.stride[2] = 0;
            c.options.panels = Panels::bf16;
          });
}

TEST_CASE("formats that a call is not compiled for", "[errors][storage]") {
  using Few = fovea::Formats<Format::f32, Format::bf16>;
  for (const bool in_exact : {false, true}) {
    Call call(in_exact ? Base::mixed : Base::paged);
    if (in_exact) {
      call.kv.v.format = Format::bf16;
      call.kv.v.stride = {0, 0, 0};
      call.exact.k.format = Format::f16;
    }
    const Status status = fovea::attention<Few>(call.q, call.kv, call.out, call.options);
    INFO(status.message());
    CHECK(status.code() == kUnsupported);
    CHECK_THAT(std::string(status.message()), Catch::Matchers::ContainsSubstring(in_exact ? "f16" : "i8_token"));
    CHECK(call.answer.untouched());
  }
}

TEST_CASE("shapes of stored rows that cannot be", "[errors][storage]") {
  const Base any = Base::paged;
  refused("dim 0 of k", any, kUnsupported, {"k has 0"}, [](Call& c) { c.kv.dim_qk = 0; });
  refused("dim 577 of v", any, kUnsupported, {"576", "v has 577"}, [](Call& c) { c.kv.dim_v = 577; });
  refused("negative batch", any, kInvalid, {"batch -1"}, [](Call& c) { c.kv.batch = -1; });
  refused("negative heads", any, kInvalid, {"kv heads -2"}, [](Call& c) { c.kv.kv_heads = -2; });
  refused("negative len", any, kInvalid, {"len -8"}, [](Call& c) { c.kv.len = -8; });
  refused("no heads", any, kInvalid, {"kv heads (0)"}, [](Call& c) { c.kv.kv_heads = 0; });
  refused("heads that do not divide", any, kInvalid, {"3", "4"}, [](Call& c) {
    c.kv.kv_heads = 3;
    c.kv.k.stride[1] = c.kv.v.stride[1] = 0;
  });
  refused("k without data", any, kInvalid, {"k has null data"}, [](Call& c) { c.kv.k.data = nullptr; });
  refused("v without data", any, kInvalid, {"v has null data"}, [](Call& c) { c.kv.v.data = nullptr; });
  refused("k beyond the address space", any, kInvalid, {"k reaches", "strides"},
          [](Call& c) { c.kv.k.stride[0] = PTRDIFF_MAX / 2; });
  refused("v beyond the address space", any, kInvalid, {"v reaches", "strides"},
          [](Call& c) { c.kv.v.stride[2] = PTRDIFF_MIN; });
  refused("q of another dim", any, kInvalid, {"dim 20", "dim 24"}, [](Call& c) { c.q.extent[3] = 20; });
  refused("out of another dim", any, kInvalid, {"24", "16"}, [](Call& c) { c.out.extent[3] = 24; });
  refused("out for another batch", any, kInvalid, {"out is [2", "[3"}, [](Call& c) { c.out.extent[0] = 2; });
  refused("home outside the enum", Base::contiguous, kInvalid, {"home is 3"}, [](Call& c) { c.kv.home = Home{3}; });
  refused("panels outside the enum", any, kInvalid, {"panels is 2"}, [](Call& c) { c.options.panels = Panels{2}; });
  refused("more keys than 32 bits count", Base::ring, kUnsupported, {"2147483648"}, [](Call& c) {
    c.kv.len = index_t{1} << 31;
    c.kv.k.stride[2] = c.kv.v.stride[2] = 0;
  });
}

TEST_CASE("lengths and sequences that do not fit the home", "[errors][storage]") {
  refused("a contiguous entry too few", Base::contiguous, kInvalid, {"2 batch entries", "3 sequences"},
          [](Call& c) { c.kv.batch = 2; });
  refused("ragged keys in a batch", Base::contiguous, kInvalid, {"batch is 3"}, [](Call& c) {
    c.numbers = {0, 2, 4, 6};
    c.q = c.q_tokens.operand(1);
    c.out = c.answer.out.result(1);
    c.options.lse = c.answer.lse_view(1);
    c.options.cu_len_q = c.options.cu_len_k = c.numbers;
    c.options.len_k = {};
  });
  for (const Base base : {Base::paged, Base::ring}) {
    refused("ragged keys in a cache", base, kInvalid, {"cu_len_k"}, [](Call& c) {
      c.numbers = {0, 2, 4, 6};
      c.q = c.q_tokens.operand(1);
      c.out = c.answer.out.result(1);
      c.options.lse = c.answer.lse_view(1);
      c.options.cu_len_q = c.options.cu_len_k = c.numbers;
      c.options.len_k = {};
    });
  }
  refused("pages without len_k", Base::paged, kInvalid, {"len_k", "3 sequences", "got 0"},
          [](Call& c) { c.options.len_k = {}; });
  refused("len_k of fewer sequences", Base::paged, kInvalid, {"2", "3"},
          [](Call& c) { c.options.len_k = c.options.len_k.first(2); });
  refused("a negative len_k", Base::paged, kInvalid, {"len_k[1] = -1"},
          with_numbers({20, -1, 33}, [](Call& c) { c.options.len_k = c.numbers; }));
  refused("negative len_k only", Base::lists, kInvalid, {"len_k[0] = -5"},
          with_numbers({-5, -5, -5}, [](Call& c) { c.options.len_k = c.numbers; }));
  refused("more keys than a contiguous entry", Base::contiguous, kInvalid, {"len_k[2] = 36", "35"},
          with_numbers({20, 9, 36}, [](Call& c) { c.options.len_k = c.numbers; }));
  refused("more keys than the ring", Base::ring, kInvalid, {"len_k[0] = 36", "35"},
          with_numbers({36, 9, 33}, [](Call& c) { c.options.len_k = c.numbers; }));
  refused("huge len_k", Base::paged, kUnsupported, {"2147483648"},
          with_numbers({20, 9, index_t{1} << 31}, [](Call& c) { c.options.len_k = c.numbers; }));
  refused("a ring too few", Base::ring, kInvalid, {"ring has 2", "3 sequences"}, [](Call& c) { c.kv.batch = 2; });
}

TEST_CASE("page tables that cannot be", "[errors][storage][paged]") {
  refused("pages of nothing", Base::paged, kInvalid, {"holds 0 positions"}, [](Call& c) { c.kv.len = 0; });
  refused("a table and lists", Base::paged, kInvalid, {"twice"}, [](Call& c) { c.kv.page_indices = c.home->table; });
  refused("a table and borders of lists", Base::paged, kInvalid, {"twice"},
          [](Call& c) { c.kv.page_begin = c.home->page_begin; });
  refused("a table of fewer sequences", Base::paged, kInvalid, {"[2, 5]", "3 sequences"},
          [](Call& c) { c.kv.block_table.extent[0] = 2; });
  refused("a table of negative width", Base::paged, kInvalid, {"block_table", "-5"},
          [](Call& c) { c.kv.block_table.extent[1] = -5; });
  refused("a table too narrow", Base::paged, kInvalid, {"sequence 2", "33 keys", "5 pages of 8", "lists 4"},
          [](Call& c) { c.kv.block_table.extent[1] = 4; });
  refused("a page that does not exist", Base::paged, kInvalid, {"page 1 of sequence 2 is 12", "12 pages"}, [](Call& c) {
    c.home->table[at(2 * c.home->width + 1)] = 12;
    REQUIRE(c.kv.batch == 12);
  });
  refused("a negative page", Base::paged, kInvalid, {"page 0 of sequence 0 is -1"}, [](Call& c) { c.home->table[0] = -1; });
  refused("the smallest page", Base::paged, kInvalid, {"-2147483648"}, [](Call& c) { c.home->table[0] = INT32_MIN; });
  refused("no table and no lists", Base::paged, kInvalid, {"page_begin", "0 entries", "3 sequences"},
          [](Call& c) { c.kv.block_table = {}; });
  refused("lists of fewer sequences", Base::lists, kInvalid, {"3 entries", "3 sequences"},
          [](Call& c) { c.kv.page_begin = c.kv.page_begin.first(3); });
  refused("lists that do not start at 0", Base::lists, kInvalid, {"page_begin[0] is 1"},
          with_numbers({1, 3, 5, 10}, [](Call& c) { c.kv.page_begin = c.numbers; }));
  refused("lists that fall", Base::lists, kInvalid, {"page_begin[2] = 2", "page_begin[1] = 3"},
          with_numbers({0, 3, 2, 10}, [](Call& c) { c.kv.page_begin = c.numbers; }));
  refused("lists beyond the pages", Base::lists, kInvalid, {"page_begin ends at 11", "10"},
          with_numbers({0, 3, 5, 11}, [](Call& c) { c.kv.page_begin = c.numbers; }));
  refused("a list too short", Base::lists, kInvalid, {"sequence 1", "9 keys", "2 pages of 8", "lists 1"},
          with_numbers({0, 3, 4, 10}, [](Call& c) { c.kv.page_begin = c.numbers; }));
  refused("a page of a list that does not exist", Base::lists, kInvalid, {"page 1 of sequence 1 is 99", "12 pages"},
          [](Call& c) { c.home->table[4] = 99; });
  // The same numbers behind the last page in use are nobody's business.
  Call call(Base::paged);
  call.home->table[at(1 * call.home->width + 2)] = -7;
  CHECK(attend_all(call.q, call.kv, call.out, call.options).ok());
}

TEST_CASE("rings that cannot be", "[errors][storage][ring]") {
  refused("negative sinks", Base::ring, kInvalid, {"35 slots", "-1 sinks"}, [](Call& c) { c.kv.sinks = -1; });
  refused("nothing but sinks", Base::ring, kInvalid, {"35 slots", "35 sinks"}, [](Call& c) { c.kv.sinks = 35; });
  refused("turns of fewer sequences", Base::ring, kInvalid, {"2 entries", "3 sequences"},
          [](Call& c) { c.kv.ring_begin = c.kv.ring_begin.first(2); });
  refused("no turns", Base::ring, kInvalid, {"0 entries", "3 sequences"}, [](Call& c) { c.kv.ring_begin = {}; });
  refused("a negative turn", Base::ring, kInvalid, {"ring_begin[1] = -1", "30"},
          with_numbers({0, -1, 0}, [](Call& c) { c.kv.ring_begin = c.numbers; }));
  refused("more than a turn", Base::ring, kInvalid, {"ring_begin[2] = 31", "30"},
          with_numbers({0, 0, 31}, [](Call& c) { c.kv.ring_begin = c.numbers; }));
}

TEST_CASE("mixed caches that cannot be", "[errors][storage][mixed]") {
  const Base any = Base::mixed;
  refused("mixed twice", any, kUnsupported, {"not mixed itself"}, [](Call& c) { c.exact.exact = &c.exact; });
  refused("an exact part in pages", any, kUnsupported, {"contiguous or a ring"},
          [](Call& c) { c.exact.home = Home::paged; });
  refused("an exact part in no home", any, kInvalid, {"home is 9"}, [](Call& c) { c.exact.home = Home{9}; });
  refused("other heads", any, kInvalid, {"1 kv heads", "2"}, [](Call& c) { c.exact.kv_heads = 1; });
  refused("other dims of k", any, kInvalid, {"8/16", "24/16"}, [](Call& c) { c.exact.dim_qk = 8; });
  refused("other dims of v", any, kInvalid, {"24/8", "24/16"}, [](Call& c) { c.exact.dim_v = 8; });
  refused("scales per channel of the exact part's own", any, kInvalid, {"exact part has a k_channel_scale"}, [](Call& c) {
    c.kv.k.format = c.exact.k.format = Format::i8_channel;
    c.kv.k_channel_scale = c.exact.k_channel_scale = c.scales.data();
  });
  refused("an exact part per channel beside keys that are not", any, kInvalid, {"i8_channel and no k_channel_scale"},
          [](Call& c) { c.exact.k.format = Format::i8_channel; });
  refused("no len_k", any, kInvalid, {"len_k", "3 sequences"}, [](Call& c) { c.options.len_k = {}; });
  refused("ragged keys", any, kInvalid, {"cu_len_k"}, [](Call& c) {
    c.numbers = {0, 2, 4, 6};
    c.q = c.q_tokens.operand(1);
    c.out = c.answer.out.result(1);
    c.options.lse = c.answer.lse_view(1);
    c.options.cu_len_q = c.options.cu_len_k = c.numbers;
    c.options.len_k = {};
  });
  refused("exact_from of fewer sequences", any, kInvalid, {"2 entries", "3 sequences"},
          [](Call& c) { c.kv.exact_from = c.kv.exact_from.first(2); });
  refused("a negative exact_first", any, kInvalid, {"exact_first is -1"}, [](Call& c) { c.kv.exact_first = -1; });
  refused("a negative exact_from", any, kInvalid, {"exact_from[1] = -1", "9"},
          with_numbers({12, -1, 20}, [](Call& c) { c.kv.exact_from = c.numbers; }));
  refused("exact_from behind the keys", any, kInvalid, {"exact_from[0] = 21", "20"},
          with_numbers({21, 9, 20}, [](Call& c) { c.kv.exact_from = c.numbers; }));
  refused("an exact part too small", any, kInvalid, {"sequence 2", "hold 21 keys", "20 positions"},
          with_numbers({12, 9, 16}, [](Call& c) { c.kv.exact_from = c.numbers; }));
  refused("an exact part for fewer sequences", any, kInvalid, {"2 entries", "3 sequences"},
          [](Call& c) { c.exact.batch = 2; });
  refused("a middle that does not hold its keys", Base::mixed_ring, kInvalid, {"sequence 2", "up to 20", "19 positions"},
          [](Call& c) { c.kv.len = 19; });
  refused("exact sinks", Base::mixed_ring, kInvalid, {"20 slots", "20 sinks"}, [](Call& c) { c.exact.sinks = 20; });
  refused("an exact turn", Base::mixed_ring, kInvalid, {"ring_begin[0] = 16", "15"},
          with_numbers({16, 0, 0}, [](Call& c) { c.exact.ring_begin = c.numbers; }));
  refused("an exact ring without turns", Base::mixed_ring, kInvalid, {"0 entries"},
          [](Call& c) { c.exact.ring_begin = {}; });
  refused("an exact format outside the enum", any, kInvalid, {"the exact k", "13"},
          [](Call& c) { c.exact.k.format = Format{13}; });
  refused("an exact v with scales per channel", any, kUnsupported, {"i8_channel"},
          [](Call& c) { c.exact.v.format = Format::i8_channel; });
  refused("an exact latent k", any, kInvalid, {"576", "24"}, [](Call& c) { c.exact.k.format = Format::latent_fp8; });
  refused("an exact k without data", any, kInvalid, {"the exact k has null data"},
          [](Call& c) { c.exact.k.data = nullptr; });
  refused("an exact v without data", any, kInvalid, {"the exact v has null data"},
          [](Call& c) { c.exact.v.data = nullptr; });
  refused("an exact v beyond the address space", any, kInvalid, {"the exact v reaches"},
          [](Call& c) { c.exact.v.stride[0] = PTRDIFF_MAX; });
  refused("a page of the middle that does not exist", any, kInvalid, {"page 1 of sequence 2 is 50"},
          [](Call& c) { c.home->table[at(2 * c.home->width + 1)] = 50; });
  refused("a negative len of the exact part", any, kInvalid, {"the exact k", "len -1"}, [](Call& c) { c.exact.len = -1; });
}

TEST_CASE("outputs over stored rows", "[errors][storage]") {
  const auto over = [](const char* what, Base base, const char* word, const std::function<std::byte*(Call&)>& place,
                       bool lse) {
    Call call(base);
    std::byte* const memory = place(call);
    const std::vector<std::byte> before(memory, memory + 24);
    if (lse) {
      // Unaligned where the rows are: the call must refuse before it matters.
      call.options.lse = {reinterpret_cast<float*>(memory), {3, 4, 2}, {2, 6, 1}};
    } else {
      call.out.data = memory;
    }
    const Status status = attend_all(call.q, call.kv, call.out, call.options);
    INFO(what << ": \"" << status.message() << "\"");
    CHECK(status.code() == kInvalid);
    CHECK_THAT(std::string(status.message()), Catch::Matchers::ContainsSubstring(word));
    CHECK(std::equal(before.begin(), before.end(), memory));
    CHECK(call.answer.untouched());
  };
  for (const bool lse : {false, true}) {
    const char* const name = lse ? "lse" : "out";
    over(
        name, Base::paged, "overlaps k", [](Call& c) { return c.home->k_pool.data() + 128; }, lse);
    over(
        name, Base::paged, "overlaps v", [](Call& c) { return c.home->v_pool.data(); }, lse);
    over(
        name, Base::ring, "overlaps k", [](Call& c) { return c.home->k_pool.data(); }, lse);
    over(
        name, Base::mixed, "overlaps the exact k", [](Call& c) { return c.exact_home->k_pool.data(); }, lse);
    over(
        name, Base::mixed, "overlaps the exact v", [](Call& c) { return c.exact_home->v_pool.data() + 64; }, lse);
  }
  refused("a workspace over the pages", Base::paged, kInvalid, {"workspace", "overlaps k"},
          [](Call& c) { c.options.workspace = c.home->k_pool; });
  refused("out over the scales per channel", Base::contiguous, kInvalid, {"overlaps k_channel_scale"}, [](Call& c) {
    c.kv.k.format = Format::i8_channel;
    c.scales.assign(6 * kHeads * 16, 1.f);
    c.kv.k_channel_scale = c.scales.data();
    c.out.data = reinterpret_cast<std::byte*>(c.scales.data());
  });
  refused("out over the page table", Base::paged, kInvalid, {"out", "overlaps"},
          [](Call& c) { c.out.data = reinterpret_cast<std::byte*>(c.home->table.data()); });
  refused("out over the page lists", Base::lists, kInvalid, {"out", "overlaps"},
          [](Call& c) { c.out.data = reinterpret_cast<std::byte*>(c.home->table.data()); });
}

TEST_CASE("empty caches without memory are no error", "[storage][paged]") {
  const std::vector<index_t> none{0, 0, 0};
  for (const Base base : {Base::contiguous, Base::paged, Base::lists}) {
    for (const Format format : {Format::bf16, Format::i8_token, Format::i4_g32}) {
      Call call(base);
      call.kv.k.format = call.kv.v.format = format;
      call.kv.k.data = call.kv.v.data = nullptr;
      if (base == Base::contiguous) call.kv.len = 0;
      if (base != Base::contiguous) call.kv.batch = 0;
      call.options.len_k = none;
      const Status status = attend_all(call.q, call.kv, call.out, call.options);
      INFO(name_of(format) << ": \"" << status.message() << "\"");
      CHECK(status.ok());
      for (const float lse : call.answer.lse) CHECK(lse == -std::numeric_limits<float>::infinity());
    }
  }
}

namespace {

// Whatever it says of memory is true, everything else may be nonsense.
class Hostile {
 public:
  explicit Hostile(std::uint64_t seed)
      : random_(seed),
        base_(random_.pick({Base::contiguous, Base::paged, Base::lists, Base::ring, Base::mixed, Base::mixed_ring})),
        call(base_) {
    const index_t spoiled = random_.pick<index_t>({0, 1, 1, 1, 2, 3, 8});
    for (index_t n = 0; n < spoiled; ++n) spoil(call.kv.exact != nullptr && random_.one_in(3) ? call.exact : call.kv);
    if (random_.one_in(3)) spoil_options();
    keep_inside(call.kv, *call.home);
    if (call.exact_home) keep_inside(call.exact, *call.exact_home);
  }
  Hostile(const Hostile&) = delete;
  Hostile& operator=(const Hostile&) = delete;

 private:
  Random random_;
  Base base_;
  std::vector<std::vector<index_t>> lists_;

 public:
  Call call;

 private:
  index_t number() {
    return random_.pick<index_t>({0,
                                  1,
                                  2,
                                  3,
                                  4,
                                  5,
                                  8,
                                  9,
                                  16,
                                  20,
                                  24,
                                  33,
                                  35,
                                  64,
                                  100,
                                  576,
                                  577,
                                  -1,
                                  -2,
                                  -8,
                                  -100,
                                  INT32_MAX,
                                  index_t{1} + INT32_MAX,
                                  INT32_MIN,
                                  index_t{1} << 40,
                                  PTRDIFF_MAX,
                                  PTRDIFF_MAX - 7,
                                  PTRDIFF_MIN,
                                  PTRDIFF_MIN + 7});
  }
  std::span<const index_t> list() {
    lists_.emplace_back();
    index_t value = random_.one_in(4) ? number() : 0;
    const index_t count = random_.between(0, 5);
    for (index_t n = 0; n < count; ++n) {
      lists_.back().push_back(value);
      value = random_.one_in(3) ? number() : std::clamp<index_t>(value, 0, 1000) + random_.below(9);
    }
    return lists_.back();
  }
  void spoil(Kv& kv) {
    switch (random_.below(18)) {
      case 0:
        kv.k.format = Format{static_cast<std::uint8_t>(random_.below(15))};
        break;
      case 1:
        kv.v.format = Format{static_cast<std::uint8_t>(random_.below(15))};
        break;
      case 2:
        kv.k.stride[at(random_.below(3))] = number();
        break;
      case 3:
        kv.v.stride[at(random_.below(3))] = number();
        break;
      case 4:
        kv.kv_heads = number();
        break;
      case 5:
        kv.dim_qk = number();
        if (random_.one_in(2)) call.q.extent[3] = std::min<index_t>(kv.dim_qk, 24);
        break;
      case 6:
        kv.dim_v = number();
        if (random_.one_in(2)) call.out.extent[3] = std::min<index_t>(kv.dim_v, 16);
        break;
      case 7:
        kv.batch = number();
        break;
      case 8:
        kv.len = number();
        break;
      case 9:
        kv.home = Home{static_cast<std::uint8_t>(random_.below(5))};
        break;
      case 10: {
        std::vector<std::int32_t>& table = call.home->table;
        if (table.empty()) break;
        for (index_t n = random_.between(1, 3); n > 0; --n) {
          table[at(random_.below(static_cast<index_t>(table.size())))] =
              random_.pick<std::int32_t>({0, 1, 2, 3, 11, 12, 13, -1, INT32_MAX, INT32_MIN, 2147480000});
        }
        break;
      }
      case 11:
        if (kv.block_table) {
          kv.block_table.extent[at(random_.below(2))] = random_.between(-2, 5);
          kv.block_table.extent[0] = std::min<index_t>(kv.block_table.extent[0], 3);
        } else {
          kv.page_begin = list();
        }
        break;
      case 12:
        kv.page_indices = call.home->table;
        kv.page_begin = list();
        if (random_.one_in(2)) kv.block_table = {};
        break;
      case 13:
        kv.sinks = number();
        break;
      case 14:
        kv.ring_begin = list();
        break;
      case 15:
        kv.k_channel_scale = random_.one_in(2) ? nullptr : call.scales.data();
        if (random_.one_in(2)) kv.k.format = Format::i8_channel;
        break;
      case 16:
        if (call.exact_home) call.kv.exact_first = number();
        if (random_.one_in(4)) kv.exact = &kv;
        break;
      default:
        if (call.exact_home) call.kv.exact_from = list();
        break;
    }
  }
  void spoil_options() {
    AttentionOptions& o = call.options;
    switch (random_.below(9)) {
      case 0:
        o.len_k = list();
        break;
      case 1:
        o.cu_len_k = list();
        break;
      case 2:
        o.cu_len_q = list();
        if (random_.one_in(2)) {
          call.q = call.q_tokens.operand(1);
          call.out = call.answer.out.result(1);
          o.lse = call.answer.lse_view(1);
        }
        break;
      case 3:
        o.q_offset = list();
        break;
      case 4:
        o.regime = Regime{static_cast<std::uint8_t>(random_.below(6))};
        break;
      case 5:
        o.panels = Panels{static_cast<std::uint8_t>(random_.below(3))};
        break;
      case 6:
        o.causal = Causal{static_cast<std::uint8_t>(random_.below(5))};
        break;
      case 7:
        o.window = {number(), number()};
        break;
      default:
        call.numbers.assign(at(random_.between(4, 7)), PTRDIFF_MAX);
        o.tree = {reinterpret_cast<const std::uint64_t*>(call.numbers.data()), call.numbers.size()};
        break;
    }
  }
  // Strides and the start are laid so that what the struct claims lies in its pool.
  void keep_inside(Kv& kv, Housed& home) {
    for (const auto& [stored, dim, pool] :
         {std::tuple{&kv.k, kv.dim_qk, &home.k_pool}, std::tuple{&kv.v, kv.dim_v, &home.v_pool}}) {
      const index_t extent[3] = {kv.batch, kv.kv_heads, kv.len};
      const auto size = static_cast<index_t>(pool->size());
      if (static_cast<int>(stored->format) >= fovea::kFormats || dim < 1 || dim > 576) continue;
      const index_t row = fovea::row_bytes(stored->format, dim);
      for (int turn = 0; turn < 2; ++turn) {
        __int128 low = 0, high = row;
        for (std::size_t axis = 0; axis < 3; ++axis) {
          if (extent[axis] <= 1) continue;
          const __int128 reach = static_cast<__int128>(extent[axis] - 1) * stored->stride[axis];
          (reach < 0 ? low : high) += reach;
        }
        // Refused for its overflow; without strides even that is true.
        if ((low < -(__int128{1} << 62) || high > (__int128{1} << 62)) && random_.one_in(2)) break;
        if (high - low <= size) {
          stored->data = pool->data() - static_cast<std::ptrdiff_t>(low);
          break;
        }
        stored->stride = {0, 0, 0};   // rows one upon the other; a row may still be too long
        if (turn == 1) stored->data = wide_.data();
      }
    }
  }
  std::vector<std::byte> wide_ = std::vector<std::byte>(at(8 * 576), std::byte{0x3c});   // the longest row
};

}   // namespace

TEST_CASE("a hostile Kv gets a Status or a result", "[errors][storage][fuzz]") {
  index_t answered = 0, refusals = 0;
  for (std::uint64_t seed = 0; seed < 10000; ++seed) {
    Hostile hostile(seed);
    Call& call = hostile.call;
    const Status status = attend_all(call.q, call.kv, call.out, call.options);
    INFO("seed " << seed << ": \"" << status.message() << "\"");
    if (status.ok()) {
      ++answered;
    } else {
      ++refusals;
      if (!call.answer.untouched() || std::string(status.message()).size() < 15) FAIL_CHECK("written although refused");
    }
  }
  // Both happen often enough to mean something.
  CHECK(answered > 2000);
  CHECK(refusals > 2000);
}
