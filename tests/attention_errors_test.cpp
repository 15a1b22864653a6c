// SPDX-License-Identifier: Apache-2.0
// Bad input is answered by a Status with the numbers in it, and nothing is written.
#include <cmath>
#include <functional>
#include <limits>
#include <string>

#include "support/dense.hpp"
#include "support/executors.hpp"

namespace {

using namespace test;
using fovea::Causal;
using fovea::Code;
using fovea::Status;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNotANumber = std::numeric_limits<float>::quiet_NaN();

// A correct call of 3 sequences, 6 heads on 2, 5 queries on 9 keys, dims 8 and 4; each test spoils one thing.
struct Call {
  Dense x{71, 3, 6, 2, 5, 9, 8, 4};
  Poisoned out_store{3 * 6 * 5 * 4}, lse_store{3 * 6 * 5};
  Tensor<const float> q = std::as_const(x.q).view(), k = std::as_const(x.k).view(), v = std::as_const(x.v).view();
  Tensor<float> out = fovea::bhsd(out_store.data(), 3, 6, 5, 4);
  AttentionOptions options;
  std::vector<index_t> table, other_table;
  std::vector<float> floats;
  std::vector<std::uint8_t> bytes;

  Call() { options.lse = {lse_store.data(), {3, 6, 5}, {30, 5, 1}}; }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  fovea::AttentionShape shape() const {
    return {q.extent[0], q.extent[1], k.extent[1], q.extent[2], k.extent[2], q.extent[3], v.extent[3]};
  }
  bool untouched() const {
    for (float value : out_store.everything()) {
      if (!is_canary(value)) return false;
    }
    for (float value : lse_store.everything()) {
      if (!is_canary(value)) return false;
    }
    return true;
  }
};

using Spoil = std::function<void(Call&)>;

// `words` must all stand in the message.
void refused(const char* what, Code code, std::initializer_list<const char*> words, const Spoil& spoil) {
  Call call;
  spoil(call);
  const Status status = fovea::attention(call.q, call.k, call.v, call.out, call.options);
  INFO(what << ": \"" << status.message() << "\"");
  CHECK(status.code() == code);
  for (const char* word : words) CHECK_THAT(std::string(status.message()), Catch::Matchers::ContainsSubstring(word));
  CHECK(std::string(status.message()).size() > 10);
  CHECK(call.untouched());
}

// Refused by everything that knows the shape and the options, before any tensor exists.
void refused_by_shape(const char* what, Code code, std::initializer_list<const char*> words, const Spoil& spoil) {
  refused(what, code, words, spoil);
  Call call;
  spoil(call);
  fovea::Plan plan;
  for (const Status& status :
       {fovea::supports(call.shape(), call.options), fovea::make_plan(plan, call.shape(), call.options)}) {
    INFO(what << " (shape only): \"" << status.message() << "\"");
    CHECK(status.code() == code);
    for (const char* word : words) CHECK_THAT(std::string(status.message()), Catch::Matchers::ContainsSubstring(word));
  }
}

}  // namespace

TEST_CASE("the call that the error tests spoil is correct", "[errors]") {
  Call call;
  const Status status = fovea::attention(call.q, call.k, call.v, call.out, call.options);
  INFO(status.message());
  REQUIRE(status.ok());
  CHECK(std::string(status.message()).empty());
  CHECK_FALSE(call.untouched());
  CHECK(fovea::supports(call.shape(), call.options).ok());
}

TEST_CASE("shapes that contradict each other", "[errors]") {
  const Code bad = Code::invalid_argument;
  refused("batch of k", bad, {"3", "2"}, [](Call& c) { c.k.extent[0] = 2; });
  refused("batch of v", bad, {"3", "1"}, [](Call& c) { c.v.extent[0] = 1; });
  refused("batch of out", bad, {"3", "2"}, [](Call& c) { c.out.extent[0] = 2; });
  refused("dim of k", bad, {"8", "7"}, [](Call& c) { c.k.extent[3] = 7; });
  refused("len of v", bad, {"9", "7"}, [](Call& c) { c.v.extent[2] = 7; });
  refused("heads of v", bad, {"2", "1"}, [](Call& c) { c.v.extent[1] = 1; });
  refused("heads of out", bad, {"6", "3"}, [](Call& c) { c.out.extent[1] = 3; });
  refused("len of out", bad, {"5", "4"}, [](Call& c) { c.out.extent[2] = 4; });
  refused("dim of out", bad, {"4", "3"}, [](Call& c) { c.out.extent[3] = 3; });
  refused("lse batch", bad, {"3", "2"}, [](Call& c) { c.options.lse.extent[0] = 2; });
  refused("lse heads", bad, {"6", "2"}, [](Call& c) { c.options.lse.extent[1] = 2; });
  refused("lse len", bad, {"5", "4"}, [](Call& c) { c.options.lse.extent[2] = 4; });
  refused("negative len", bad, {"-9"}, [](Call& c) { c.k.extent[2] = c.v.extent[2] = -9; });
  refused("negative batch", bad, {"-3"},
          [](Call& c) { c.q.extent[0] = c.k.extent[0] = c.v.extent[0] = c.out.extent[0] = c.options.lse.extent[0] = -3; });
}

TEST_CASE("head counts that do not divide name both", "[errors]") {
  refused_by_shape("6 on 4", Code::invalid_argument, {"6", "4"}, [](Call& c) {
    c.k.extent[1] = c.v.extent[1] = 4;
    c.k.stride[1] = c.v.stride[1] = 0;
  });
  refused_by_shape("2 on 6", Code::invalid_argument, {"2", "6"}, [](Call& c) {
    c.q.extent[1] = c.out.extent[1] = c.options.lse.extent[1] = 2;
    c.k.extent[1] = c.v.extent[1] = 6;
    c.k.stride[1] = c.v.stride[1] = 0;
  });
  refused_by_shape("6 on none", Code::invalid_argument, {"6", "0"}, [](Call& c) { c.k.extent[1] = c.v.extent[1] = 0; });
}

TEST_CASE("null data", "[errors]") {
  const Code bad = Code::invalid_argument;
  refused("q", bad, {"q"}, [](Call& c) { c.q.data = nullptr; });
  refused("k", bad, {"k"}, [](Call& c) { c.k.data = nullptr; });
  refused("v", bad, {"v"}, [](Call& c) { c.v.data = nullptr; });
  refused("out", bad, {"out"}, [](Call& c) { c.out.data = nullptr; });
}

TEST_CASE("out that overlaps an input, itself or lse", "[errors]") {
  const Code bad = Code::invalid_argument;
  const auto check_shared = [&](const char* what, auto spoil) {
    // out lies in the storage of an input: nothing of it may change.
    Call call;
    spoil(call);
    const Dense before = call.x;
    const Status status = fovea::attention(call.q, call.k, call.v, call.out, call.options);
    INFO(what << ": \"" << status.message() << "\"");
    CHECK(status.code() == bad);
    CHECK_THAT(std::string(status.message()), Catch::Matchers::ContainsSubstring("overlap"));
    CHECK(same_bits(before.q.data, call.x.q.data));
    CHECK(same_bits(before.k.data, call.x.k.data));
    CHECK(same_bits(before.v.data, call.x.v.data));
    CHECK(call.untouched());
  };
  check_shared("out is q", [](Call& c) { c.out = {c.x.q.data.data(), c.out.extent, c.out.stride}; });
  check_shared("out ends in q", [](Call& c) { c.out = {c.x.q.data.data() + 7, c.out.extent, c.out.stride}; });
  check_shared("out is k", [](Call& c) {
    c.x.k.data.resize(2000);
    c.k.data = c.x.k.data.data();
    c.out = {c.x.k.data.data() + 400, c.out.extent, c.out.stride};
  });
  check_shared("out begins in v", [](Call& c) {
    c.x.v.data.resize(2000);
    c.v.data = c.x.v.data.data();
    c.out = {c.x.v.data.data() + 3 * 2 * 9 * 4 - 1, c.out.extent, c.out.stride};
  });
  refused("out stride 0 along batch", bad, {"out"}, [](Call& c) { c.out.stride[0] = 0; });
  refused("out stride 0 along heads", bad, {"out"}, [](Call& c) { c.out.stride[1] = 0; });
  refused("out stride 0 along pos", bad, {"out"}, [](Call& c) { c.out.stride[2] = 0; });
  refused("lse in out", bad, {"lse"}, [](Call& c) { c.options.lse.data = c.out.data + 3; });
  refused("lse stride 0", bad, {"lse"}, [](Call& c) { c.options.lse.stride[2] = 0; });
}

TEST_CASE("an innermost stride other than 1 of k and v is refused with the reason", "[errors]") {
  refused("k", Code::unsupported, {"k", "stride", "2"},
          [](Call& c) { c.k.extent[2] = c.v.extent[2] = 2, c.k.stride[3] = 2; });
  refused("v", Code::unsupported, {"v", "stride", "2"},
          [](Call& c) { c.k.extent[2] = c.v.extent[2] = 2, c.v.stride[3] = 2; });
  refused("k backwards", Code::unsupported, {"k", "stride", "-1"}, [](Call& c) { c.k.data += 7, c.k.stride[3] = -1; });
}

TEST_CASE("an innermost stride other than 1 of q, out, bias, keep works or is refused, never wrong", "[errors]") {
  Dense x(72, 1, 2, 1, 5, 70, 8, 4);
  const AttentionOptions plain;
  const auto check = [&](const char* what, Tensor<const float> q, Tensor<float> out, const AttentionOptions& options,
                         const AttentionOptions& same) {
    const Status status = fovea::attention(q, x.k.view(), x.v.view(), out, options);
    INFO(what << ": " << status.message());
    if (!status.ok()) {
      CHECK(status.code() == Code::unsupported);
      CHECK_THAT(std::string(status.message()), Catch::Matchers::ContainsSubstring("stride"));
      return;
    }
    const Result expected = attend(x, same);
    for (index_t h = 0; h < 2; ++h) {
      for (index_t i = 0; i < 5; ++i) {
        for (index_t d = 0; d < 4; ++d) CHECK(out(0, h, i, d) == expected.at(0, h, i, d));
      }
    }
  };
  // [dim, pos] storage of q and out.
  Values q_columns(1, 2, 8, 5), out_columns(1, 2, 4, 5), out_rows(1, 2, 5, 4);
  for (index_t h = 0; h < 2; ++h) {
    for (index_t i = 0; i < 5; ++i) {
      for (index_t d = 0; d < 8; ++d) q_columns.view()(0, h, d, i) = x.q.view()(0, h, i, d);
    }
  }
  check("q", {q_columns.data.data(), {1, 2, 5, 8}, {80, 40, 1, 5}}, out_rows.view(), plain, plain);
  check("out", x.q.view(), {out_columns.data.data(), {1, 2, 5, 4}, {40, 20, 1, 5}}, plain, plain);
  const Values bias = random_values(73, 1, 1, 5, 70);
  std::vector<float> columns(350);
  std::vector<std::uint8_t> keep(350), keep_columns(350);
  for (index_t i = 0; i < 5; ++i) {
    for (index_t j = 0; j < 70; ++j) {
      const auto from = static_cast<std::size_t>(i * 70 + j), to = static_cast<std::size_t>(j * 5 + i);
      columns[to] = bias.data[from];
      keep_columns[to] = keep[from] = bias.data[from] > 0;
    }
  }
  AttentionOptions one, other;
  one.bias = {columns.data(), {1, 1, 5, 70}, {350, 350, 1, 5}};
  other.bias = bias.view();
  check("bias", x.q.view(), out_rows.view(), one, other);
  one.bias = other.bias = {};
  one.keep = {keep_columns.data(), {1, 1, 5, 70}, {350, 350, 1, 5}};
  other.keep = {keep.data(), {1, 1, 5, 70}, {350, 350, 70, 1}};
  check("keep", x.q.view(), out_rows.view(), one, other);
}

TEST_CASE("dims outside 1 .. 576", "[errors]") {
  const auto set_qk = [](index_t dim) {
    return [dim](Call& c) { c.q.extent[3] = c.k.extent[3] = dim, c.k.extent[2] = c.v.extent[2] = 0; };
  };
  const auto set_v = [](index_t dim) {
    return [dim](Call& c) { c.v.extent[3] = c.out.extent[3] = dim, c.k.extent[2] = c.v.extent[2] = 0; };
  };
  for (const auto& [dim, text] : {std::pair<index_t, const char*>{0, "0"}, {577, "577"}, {100000, "100000"}}) {
    for (const Spoil& spoil : {Spoil(set_qk(dim)), Spoil(set_v(dim))}) {
      Call call;
      spoil(call);
      fovea::Plan plan;
      for (const Status& status :
           {fovea::supports(call.shape(), call.options), fovea::make_plan(plan, call.shape(), call.options)}) {
        INFO("dim " << text << ": \"" << status.message() << "\"");
        CHECK_FALSE(status.ok());
        if (dim > 0) CHECK(status.code() == Code::unsupported);
        CHECK_THAT(std::string(status.message()), Catch::Matchers::ContainsSubstring(text));
      }
    }
  }
}

TEST_CASE("numbers that are none", "[errors]") {
  const Code bad = Code::invalid_argument;
  refused_by_shape("scale NaN", bad, {"scale", "nan"}, [](Call& c) { c.options.scale = kNotANumber; });
  refused_by_shape("scale inf", bad, {"scale", "inf"}, [](Call& c) { c.options.scale = kInf; });
  refused_by_shape("softcap -1", bad, {"softcap", "-1"}, [](Call& c) { c.options.softcap = -1; });
  refused_by_shape("softcap NaN", bad, {"softcap", "nan"}, [](Call& c) { c.options.softcap = kNotANumber; });
  refused_by_shape("softcap inf", bad, {"softcap", "inf"}, [](Call& c) { c.options.softcap = kInf; });
}

TEST_CASE("enums beyond their last value", "[errors]") {
  const Code bad = Code::invalid_argument;
  refused_by_shape("causal", bad, {"causal is 3"}, [](Call& c) { c.options.causal = static_cast<Causal>(3); });
  refused_by_shape("regime", bad, {"regime is 4"}, [](Call& c) { c.options.regime = static_cast<fovea::Regime>(4); });
  refused_by_shape("panels", bad, {"panels is 2"}, [](Call& c) { c.options.panels = static_cast<fovea::Panels>(2); });
}

TEST_CASE("an executor without lanes, or with too many", "[errors]") {
  static InOrder pool;
  for (const auto& [lanes, words] : {std::pair{0, "this one 0"}, {-3, "this one -3"}, {65537, "this one 65537"}}) {
    refused_by_shape("lanes", Code::invalid_argument, {"1 to 65536 lanes", words},
                     [count = lanes](Call& c) { c.options.executor = {pool, count}; });
  }
  Call call;
  call.options.executor = {pool, 65536};
  CHECK(fovea::supports(call.shape(), call.options).ok());
}

TEST_CASE("lengths and offsets", "[errors]") {
  const Code bad = Code::invalid_argument;
  refused_by_shape("negative len_k", bad, {"len_k", "-4"}, [](Call& c) { c.options.len_k = c.table = {1, -4, 2}; });
  refused_by_shape("len_k beyond", bad, {"len_k", "10", "9"}, [](Call& c) { c.options.len_k = c.table = {1, 2, 10}; });
  refused_by_shape("len_k short", bad, {"len_k", "2", "3"}, [](Call& c) { c.options.len_k = c.table = {1, 2}; });
  refused_by_shape("q_offset short", bad, {"q_offset", "1", "3"}, [](Call& c) { c.options.q_offset = c.table = {1}; });
  refused_by_shape("slopes short", bad, {"alibi_slopes", "5", "6"}, [](Call& c) {
    c.floats.assign(5, 0.5f);
    c.options.alibi_slopes = c.floats;
  });
  refused_by_shape("sink short", bad, {"sink", "2", "6"}, [](Call& c) {
    c.floats.assign(2, 0.5f);
    c.options.sink = c.floats;
  });
}

TEST_CASE("ragged batches", "[errors]") {
  const Code bad = Code::invalid_argument;
  // One batch of 5 queries and 9 keys.
  const auto ragged = [](std::vector<index_t> cu_q, std::vector<index_t> cu_k) {
    return [cu_q, cu_k](Call& c) {
      c.q.extent[0] = c.k.extent[0] = c.v.extent[0] = c.out.extent[0] = c.options.lse.extent[0] = 1;
      c.options.cu_len_q = c.table = cu_q;
      c.options.cu_len_k = c.other_table = cu_k;
    };
  };
  Call fine;
  ragged({0, 2, 2, 5}, {0, 0, 4, 9})(fine);
  const Status status = fovea::attention(fine.q, fine.k, fine.v, fine.out, fine.options);
  INFO(status.message());
  CHECK(status.ok());

  refused("only cu_len_q", bad, {"cu_len_k"}, ragged({0, 2, 5}, {}));
  refused_by_shape("only cu_len_k", bad, {"cu_len_q"}, ragged({}, {0, 2, 9}));
  refused_by_shape("two sizes", bad, {"3", "4"}, ragged({0, 2, 5}, {0, 2, 4, 9}));
  refused_by_shape("q not from 0", bad, {"cu_len_q", "1"}, ragged({1, 2, 5}, {0, 2, 9}));
  refused_by_shape("k not from 0", bad, {"cu_len_k", "2"}, ragged({0, 2, 5}, {2, 2, 9}));
  refused_by_shape("q falls", bad, {"cu_len_q", "4", "3"}, ragged({0, 4, 3, 5}, {0, 2, 4, 9}));
  refused_by_shape("k falls", bad, {"cu_len_k", "6", "4"}, ragged({0, 2, 3, 5}, {0, 6, 4, 9}));
  refused_by_shape("q beyond", bad, {"cu_len_q", "6", "5"}, ragged({0, 2, 6}, {0, 2, 9}));
  refused_by_shape("k beyond", bad, {"cu_len_k", "11", "9"}, ragged({0, 2, 5}, {0, 2, 11}));
  refused_by_shape("batch 3", bad, {"3"}, [&](Call& c) {
    ragged({0, 2, 5}, {0, 2, 9})(c);
    c.q.extent[0] = c.k.extent[0] = c.v.extent[0] = c.out.extent[0] = c.options.lse.extent[0] = 3;
  });
  std::vector<index_t> too_long{2, 8}, short_table{2};
  refused_by_shape("len_k beyond its slot", bad, {"len_k", "8", "7"}, [&](Call& c) {
    ragged({0, 2, 5}, {0, 2, 9})(c);
    c.options.len_k = too_long;
  });
  refused_by_shape("len_k short", bad, {"len_k", "1", "2"}, [&](Call& c) {
    ragged({0, 2, 5}, {0, 2, 9})(c);
    c.options.len_k = short_table;
  });
}

TEST_CASE("masks and biases of the wrong shape", "[errors]") {
  const Code bad = Code::invalid_argument;
  const auto bias = [](std::array<index_t, 4> extent) {
    return [extent](Call& c) {
      c.floats.assign(4000, 0.f);
      c.options.bias = {c.floats.data(), extent, {extent[1] * extent[2] * extent[3], extent[2] * extent[3], extent[3], 1}};
    };
  };
  const auto keep = [](std::array<index_t, 4> extent) {
    return [extent](Call& c) {
      c.bytes.assign(4000, 1);
      c.options.keep = {c.bytes.data(), extent, {extent[1] * extent[2] * extent[3], extent[2] * extent[3], extent[3], 1}};
    };
  };
  refused_by_shape("bias batch", bad, {"bias", "2", "3"}, bias({2, 6, 5, 9}));
  refused_by_shape("bias heads", bad, {"bias", "2", "6"}, bias({3, 2, 5, 9}));
  refused_by_shape("bias queries", bad, {"bias", "4", "5"}, bias({3, 6, 4, 9}));
  refused_by_shape("bias keys", bad, {"bias", "8", "9"}, bias({3, 6, 5, 8}));
  refused_by_shape("bias one key", bad, {"bias", "1", "9"}, bias({3, 6, 5, 1}));
  refused_by_shape("keep batch", bad, {"keep", "2", "3"}, keep({2, 6, 5, 9}));
  refused_by_shape("keep heads", bad, {"keep", "3", "6"}, keep({1, 3, 5, 9}));
  refused_by_shape("keep queries", bad, {"keep", "4", "5"}, keep({1, 1, 4, 9}));
  refused_by_shape("keep keys", bad, {"keep", "8", "9"}, keep({1, 1, 1, 8}));
}

TEST_CASE("a workspace that is too small says how much is needed", "[errors][workspace]") {
  Call call;
  fovea::Plan plan;
  REQUIRE(fovea::make_plan(plan, call.shape(), call.options).ok());
  const std::size_t needed = fovea::workspace_bytes(plan, 1);
  REQUIRE(needed > 64);
  std::vector<std::byte> bytes(needed - 1);
  for (const std::size_t given : {std::size_t{1}, needed / 2, needed - 1}) {
    call.options.workspace = std::span(bytes).first(given);
    for (const Status& status : {fovea::attention(call.q, call.k, call.v, call.out, call.options),
                                 fovea::attention(plan, call.q, call.k, call.v, call.out, call.options)}) {
      INFO(status.message());
      CHECK(status.code() == Code::workspace_too_small);
      CHECK_THAT(std::string(status.message()), Catch::Matchers::ContainsSubstring(std::to_string(given)));
      CHECK_THAT(std::string(status.message()), Catch::Matchers::ContainsSubstring(std::to_string(needed)));
      CHECK(call.untouched());
    }
    fovea::AttentionRun run;
    const Status status = fovea::prepare(run, plan, call.q, call.k, call.v, call.out, call.options);
    CHECK(status.code() == Code::workspace_too_small);
    CHECK(call.untouched());
  }
}

TEST_CASE("a plan of another shape is refused", "[errors][plan]") {
  Call call, other;
  other.q.extent[2] = 4;
  fovea::Plan plan;
  REQUIRE(fovea::make_plan(plan, other.shape(), other.options).ok());
  const Status status = fovea::attention(plan, call.q, call.k, call.v, call.out, call.options);
  INFO(status.message());
  CHECK(status.code() == Code::invalid_argument);
  CHECK_THAT(std::string(status.message()), Catch::Matchers::ContainsSubstring("5"));
  CHECK_THAT(std::string(status.message()), Catch::Matchers::ContainsSubstring("4"));
  CHECK(call.untouched());
}

TEST_CASE("a plan of other lengths or positions is refused, not followed", "[errors][plan]") {
  const std::vector<index_t> nine{9, 9, 9}, fewer{9, 4, 9}, offsets{1, 1, 1};
  const auto check = [&](const char* what, auto plan_options, auto call_options) {
    Call call, other;
    plan_options(other.options);
    call_options(call.options);
    fovea::Plan plan;
    REQUIRE(fovea::make_plan(plan, other.shape(), other.options).ok());
    const Status status = fovea::attention(plan, call.q, call.k, call.v, call.out, call.options);
    INFO(what << ": \"" << status.message() << "\"");
    CHECK(status.code() == Code::invalid_argument);
    CHECK(call.untouched());
  };
  const auto nothing = [](AttentionOptions&) {};
  check("fewer keys in the call", nothing, [&](AttentionOptions& o) { o.len_k = fewer; });
  check(
      "fewer keys in the plan", [&](AttentionOptions& o) { o.len_k = fewer; }, [&](AttentionOptions& o) { o.len_k = nine; });
  check(
      "another alignment", [](AttentionOptions& o) { o.causal = Causal::top_left; },
      [](AttentionOptions& o) { o.causal = Causal::bottom_right; });
  check(
      "another offset", [](AttentionOptions& o) { o.causal = Causal::top_left; },
      [&](AttentionOptions& o) {
        o.causal = Causal::top_left;
        o.q_offset = offsets;
      });
}

TEST_CASE("a plan of another window, regime, variant or heads is refused", "[errors][plan]") {
  // Keeps whole rows of scores; a plan for online softmax has no room for them.
  struct WholeRows {
    fovea::Final weigh_row(const fovea::Row&, std::span<float>, std::span<float>) const { return {1.f, 0.f}; }
  };
  const auto check = [&](const char* what, std::initializer_list<const char*> words, auto make, const AttentionOptions& options) {
    Call call;
    const View<float, 3> lse = call.options.lse;
    call.options = options;
    call.options.lse = lse;
    fovea::Plan plan;
    REQUIRE(make(plan, call.shape()).ok());
    std::vector<std::byte> workspace(fovea::workspace_bytes(plan, 1));
    AttentionOptions prepared = call.options;
    prepared.workspace = workspace;
    fovea::AttentionRun run;
    for (const Status& status : {fovea::attention(plan, call.q, call.k, call.v, call.out, call.options),
                                 fovea::prepare(run, plan, call.q, call.k, call.v, call.out, prepared)}) {
      INFO(what << ": \"" << status.message() << "\"");
      CHECK(status.code() == Code::invalid_argument);
      for (const char* word : words) CHECK_THAT(std::string(status.message()), Catch::Matchers::ContainsSubstring(word));
      CHECK(call.untouched());
    }
  };
  const auto made_with = [](const AttentionOptions& options) {
    return [options](fovea::Plan& plan, const fovea::AttentionShape& shape) { return fovea::make_plan(plan, shape, options); };
  };
  AttentionOptions plain, left, right, causal, decode;
  left.window.left = 3, right.window.right = 7, causal.causal = Causal::top_left, decode.regime = fovea::Regime::decode;
  check("no window in the call", {"keys 3 left"}, made_with(left), plain);
  check("no window in the plan", {"say 3 and"}, made_with(plain), left);
  check("another right end", {"to 7 right"}, made_with(right), plain);
  check("causal in the plan", {"to 0 right"}, made_with(causal), plain);
  check("causal in the call", {"and 0"}, made_with(plain), causal);
  check("another regime", {"another regime or panels"}, made_with(decode), plain);
  check("a regime in the call", {"another regime or panels"}, made_with(plain), decode);
  if (fovea::kHasBf16Dot) {
    AttentionOptions bf16;
    bf16.panels = fovea::Panels::bf16;
    check("other panels", {"another regime or panels"}, made_with(bf16), plain);
  }
  check(
      "a variant with whole rows", {"keys whole, rows kept; this one needs keys split, online"},
      [](fovea::Plan& plan, const fovea::AttentionShape& shape) {
        return fovea::make_plan(plan, shape, {}, fovea::variant().with_normalizer(WholeRows{}));
      },
      plain);
  const auto with = [](auto change) {
    return [change](fovea::Plan& plan, fovea::AttentionShape shape) {
      change(shape);
      return fovea::make_plan(plan, shape);
    };
  };
  check("heads", {"for 12/2 heads", "the call has 6/2"}, with([](auto& s) { s.q_heads = 12; }), plain);
  check("kv heads", {"for 6/6 heads", "the call has 6/2"}, with([](auto& s) { s.kv_heads = 6; }), plain);
  check("dims", {"dims 16/4", "and 8/4"}, with([](auto& s) { s.dim_qk = 16; }), plain);
  check("dims of v", {"dims 8/5", "and 8/4"}, with([](auto& s) { s.dim_v = 5; }), plain);
  check("sequences", {"for 2 sequences, the call has 3"}, with([](auto& s) { s.batch = 2; }), plain);
}

TEST_CASE("merge refuses what does not fit", "[errors][merge]") {
  Result a{Values(1, 2, 3, 4), std::vector<float>(6)}, b{Values(1, 2, 3, 5), std::vector<float>(6)};
  Status status = fovea::merge(a.out.view(), a.lse_view(), b.out.view(), b.lse_view());
  INFO(status.message());
  CHECK(status.code() == Code::invalid_argument);
  CHECK_THAT(std::string(status.message()), Catch::Matchers::ContainsSubstring("4"));
  CHECK_THAT(std::string(status.message()), Catch::Matchers::ContainsSubstring("5"));
  Result c{Values(1, 2, 3, 4), std::vector<float>(6)};
  View<const float, 3> lse = c.lse_view();
  lse.extent[2] = 2;
  status = fovea::merge(a.out.view(), a.lse_view(), c.out.view(), lse);
  CHECK(status.code() == Code::invalid_argument);
  Tensor<const float> null = c.out.view();
  null.data = nullptr;
  status = fovea::merge(a.out.view(), a.lse_view(), null, c.lse_view());
  CHECK(status.code() == Code::invalid_argument);
  lse = c.lse_view();
  lse.data = nullptr;
  status = fovea::merge(a.out.view(), a.lse_view(), c.out.view(), lse);
  CHECK(status.code() == Code::invalid_argument);
  for (float value : a.out.data) CHECK(value == 0);
}

TEST_CASE("attention_weights refuses rows and outputs that do not exist", "[errors][weights]") {
  Dense x(74, 2, 2, 1, 3, 9, 8, 4);
  const Result r = attend(x);
  std::vector<float> store(18, canary());
  const auto check = [&](std::vector<fovea::WeightRow> rows, View<float, 2> weights,
                         std::initializer_list<const char*> words) {
    const Status status = fovea::attention_weights(x.q.view(), x.k.view(), r.lse_view(), rows, weights, {});
    INFO(status.message());
    CHECK(status.code() == Code::invalid_argument);
    for (const char* word : words) CHECK_THAT(std::string(status.message()), Catch::Matchers::ContainsSubstring(word));
    for (float value : store) CHECK(is_canary(value));
  };
  const View<float, 2> fits{store.data(), {1, 9}, {9, 1}};
  check({{2, 0, 0}}, fits, {"2"});
  check({{-1, 0, 0}}, fits, {"-1"});
  check({{0, 2, 0}}, fits, {"2"});
  check({{0, 0, 3}}, fits, {"3"});
  check({{0, 0, -5}}, fits, {"-5"});
  check({{0, 0, 0}, {0, 0, 1}}, fits, {"2", "1"});
  check({{0, 0, 0}}, {store.data(), {1, 8}, {8, 1}}, {"8", "9"});
  check({{0, 0, 0}}, {nullptr, {1, 9}, {9, 1}}, {"weights"});
}

TEST_CASE("attention_weights refuses to write over what it reads", "[errors][weights]") {
  Dense x(74, 1, 2, 1, 1, 9, 8, 4);
  const Result r = attend(x);
  std::vector<float> numbers(18, 0.25f);
  const std::vector<float> before = numbers;
  const auto check = [&](const AttentionOptions& options, float* to, const char* name) {
    const std::vector<fovea::WeightRow> rows{{0, 0, 0}};
    const Status status = fovea::attention_weights(x.q.view(), x.k.view(), r.lse_view(), rows, {to, {1, 9}, {9, 1}}, options);
    CHECK(status.code() == Code::invalid_argument);
    CHECK_THAT(std::string(status.message()), Catch::Matchers::ContainsSubstring(std::string("overlaps ") + name));
    CHECK(numbers == before);
  };
  check({.bias = {numbers.data(), {1, 2, 1, 9}, {18, 9, 9, 1}}}, numbers.data() + 9, "bias");
  check({.keep = {reinterpret_cast<const std::uint8_t*>(numbers.data()), {1, 1, 1, 9}, {9, 9, 9, 1}}}, numbers.data(), "keep");
  check({.alibi_slopes = {numbers.data(), 2}}, numbers.data() + 1, "alibi_slopes");
  check({.sink = {numbers.data() + 8, 2}}, numbers.data(), "sink");
  check({.tree = {reinterpret_cast<const std::uint64_t*>(numbers.data()), 1}}, numbers.data(), "tree");
}
