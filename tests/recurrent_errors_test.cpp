// SPDX-License-Identifier: Apache-2.0
// What every recurrent mechanism refuses, in which words, before anything is written. What only one of them takes is in its
// own file.
#include "fovea/mechanisms/gated_delta.hpp"
#include "support/recurrent_grid.hpp"

using namespace test::recurrent;

namespace {

const Mechanism& gated_delta() {
  static const Mechanism mechanism{
      .name = "Gated DeltaNet",
      .run =
          [](const Arguments<float>& x) { return fovea::gated_delta_net(x.q, x.k, x.v, x.decay, x.beta, x.out, x.options); },
      .reference = {},
      .gates = Gates::token,
      .unit_keys = true};
  return mechanism;
}

const Problem& problem() {
  static const Problem it(gated_delta(), {.seed = 1, .batch = 2, .len = 5, .heads = {2, 2, 4}, .dim_k = 6, .dim_v = 7});
  return it;
}
void refused(const std::vector<Refusal>& refusals) { check_refused(gated_delta(), problem(), refusals); }

constexpr index_t kHuge = PTRDIFF_MAX / 2;

}   // namespace

TEST_CASE("recurrent errors: extents") {
  refused({{"q is [2, 2, 5, 5], must be [2, 2, 5, 6] to fit k and v", [](auto& x) { x.q.extent[3] = 5; }},
           {"q is [3, 2, 5, 6], must be [2, 2, 5, 6]", [](auto& x) { x.q.extent[0] = 3; }},
           {"q is [2, 2, 4, 6], must be [2, 2, 5, 6]", [](auto& x) { x.q.extent[2] = 4; }},
           {"k is [2, 2, 6, 6], must be [2, 2, 5, 6]", [](auto& x) { x.k.extent[2] = 6; }},
           {"k is [1, 2, 5, 6], must be [2, 2, 5, 6]", [](auto& x) { x.k.extent[0] = 1; }},
           {"out is [2, 2, 5, 7], must be [2, 4, 5, 7] to fit q and v", [](auto& x) { x.out.extent[1] = 2; }},
           {"out is [2, 4, 5, 6], must be [2, 4, 5, 7]", [](auto& x) { x.out.extent[3] = 6; }},
           {"out is [2, 4, 4, 7], must be [2, 4, 5, 7]", [](auto& x) { x.out.extent[2] = 4; }},
           {"v has batch -1 and 5 positions", [](auto& x) { x.v.extent[0] = -1; }},
           {"v has batch 2 and -5 positions", [](auto& x) { x.v.extent[2] = -5; }}});
}

TEST_CASE("recurrent errors: heads and dims") {
  refused({{"q heads (0), k heads (2) and v heads (4) must be positive", [](auto& x) { x.q.extent[1] = 0; }},
           {"k heads (-2)", [](auto& x) { x.k.extent[1] = -2; }},
           {"v heads (0)", [](auto& x) { x.v.extent[1] = 0; }},
           {"k heads (3) and v heads (4) do not divide each other", [](auto& x) { x.k.extent[1] = 3; }},
           {"q heads (3) and states (4) do not divide each other", [](auto& x) { x.q.extent[1] = 3; }},
           {"q heads (6) and states (4) do not divide each other", [](auto& x) { x.q.extent[1] = 6; }},
           {"dims 1 to 4096 are supported: dim_k 0, dim_v 7", [](auto& x) { x.k.extent[3] = x.q.extent[3] = 0; },
            fovea::Code::unsupported},
           {"dim_k 6, dim_v 4097", [](auto& x) { x.v.extent[3] = x.out.extent[3] = 4097; }, fovea::Code::unsupported},
           {"dim_k 4097, dim_v 7", [](auto& x) { x.k.extent[3] = x.q.extent[3] = 4097; }, fovea::Code::unsupported}});
}

TEST_CASE("recurrent errors: memory") {
  refused({{"q has null data", [](auto& x) { x.q.data = nullptr; }},
           {"k has null data", [](auto& x) { x.k.data = nullptr; }},
           {"v has null data", [](auto& x) { x.v.data = nullptr; }},
           {"out has null data", [](auto& x) { x.out.data = nullptr; }},
           {"q reaches beyond the address space", [](auto& x) { x.q.stride[1] = kHuge; }},
           {"v reaches beyond the address space", [](auto& x) { x.v.stride[2] = -kHuge; }},
           {"out reaches beyond the address space", [](auto& x) { x.out.stride[0] = PTRDIFF_MAX; }},
           {"decay.gate reaches beyond the address space", [](auto& x) { x.decay.gate.stride[1] = kHuge; }},
           {"out overlaps itself", [](auto& x) { x.out.stride[1] = 0; }},
           {"out overlaps itself", [](auto& x) { x.out.stride[2] = 6; }},
           {"out [", [](auto& x) { x.q.data = x.out.data + 4; }},
           {"overlaps k [", [](auto& x) { x.k.data = x.out.data; }},
           {"overlaps v [", [](auto& x) { x.v.data = x.out.data; }},
           {"overlaps initial_state [",
            [](auto& x) { x.options.initial_state.data = reinterpret_cast<const float*>(x.out.data); }},
           {"overlaps final_state [", [](auto& x) { x.options.final_state.data = reinterpret_cast<float*>(x.out.data); }},
           {"final_state [", [](auto& x) { x.v.data = reinterpret_cast<const std::byte*>(x.options.final_state.data); }},
           {"overlaps initial_state [", [](auto& x) { x.options.initial_state.data = x.options.final_state.data + 1; }}});
}

TEST_CASE("recurrent errors: formats") {
  const auto format = [](Format f) { return [f](auto& x) { x.v.format = f; }; };
  refused({{"v has format i8_token", format(Format::i8_token), fovea::Code::unsupported},
           {"v has format e4m3", format(Format::e4m3), fovea::Code::unsupported},
           {"v has format outside the enum", format(static_cast<Format>(77)), fovea::Code::unsupported},
           {"q has format i4_g32", [](auto& x) { x.q.format = Format::i4_g32; }, fovea::Code::unsupported},
           {"out has format e5m2", [](auto& x) { x.out.format = Format::e5m2; }, fovea::Code::unsupported}});
}

TEST_CASE("recurrent errors: states") {
  const auto same_memory = [](auto& x) {
    x.options.initial_state = x.options.final_state;
    std::swap(x.options.initial_state.stride[2], x.options.initial_state.stride[3]);
  };
  refused({{"initial_state has extent 1 on axis 0, must be 2", [](auto& x) { x.options.initial_state.extent[0] = 1; }},
           {"initial_state has extent 2 on axis 1, must be 4", [](auto& x) { x.options.initial_state.extent[1] = 2; }},
           {"final_state has extent 5 on axis 2, must be 6", [](auto& x) { x.options.final_state.extent[2] = 5; }},
           {"initial_state has extent 6 on axis 2, must be 7", [](auto& x) { x.options.layout = StateLayout::v_first; }},
           {"final_state overlaps itself", [](auto& x) { x.options.final_state.stride[0] = 0; }},
           {"share their memory with different strides", same_memory}});
}

TEST_CASE("recurrent errors: options") {
  refused({{"scale nan is not finite", [](auto& x) { x.options.scale = std::numeric_limits<float>::quiet_NaN(); }},
           {"scale -inf is not finite", [](auto& x) { x.options.scale = -kInfinity; }},
           {"head_map is 2", [](auto& x) { x.options.head_map = static_cast<HeadMap>(2); }},
           {"layout is 7", [](auto& x) { x.options.layout = static_cast<StateLayout>(7); }},
           {"form is 4", [](auto& x) { x.options.form = static_cast<RecurrentForm>(4); }},
           {"chunk is -1, must be 1 to 256, or 0", [](auto& x) { x.options.chunk = -1; }},
           {"chunk is 257, must be 1 to 256, or 0", [](auto& x) { x.options.chunk = 257; }},
           {"decay.form is 9", [](auto& x) { x.decay.form = static_cast<DecayForm>(9); }}});
}

TEST_CASE("recurrent errors: lanes") {
  test::InOrder pool;
  for (const int lanes : {0, -3, (1 << 16) + 1}) {
    refused({{"this one " + std::to_string(lanes), [&](auto& x) { x.options.executor = fovea::Executor(pool, lanes); }}});
  }
}

TEST_CASE("recurrent errors: ragged batches") {
  static const std::vector<index_t> good{0, 2, 5}, late{1, 5}, falling{0, 4, 3, 5}, beyond{0, 2, 6};
  refused({{"a ragged call has batch 1 and its sequences along pos; batch is 2", [](auto& x) { x.options.cu_len = good; }}});
  Case c{.seed = 2, .heads = {2, 2, 4}, .dim_k = 6, .dim_v = 7};
  c.lengths = {2, 3};
  const Problem packed(gated_delta(), c);
  const auto lengths = [](const std::vector<index_t>& cu) { return [&cu](auto& x) { x.options.cu_len = cu; }; };
  check_refused(gated_delta(), packed,
                {{"cu_len[0] is 1, must be 0", lengths(late)},
                 {"cu_len[2] = 3 is less than cu_len[1] = 4", lengths(falling)},
                 {"cu_len ends at 6, the tensor has 5 positions", lengths(beyond)},
                 {"initial_state has extent 2 on axis 0, must be 1",
                  [](auto& x) { x.options.cu_len = std::span<const index_t>(good).first(2); }}});
}

// A workspace one byte short is refused; the words name both sizes.
TEST_CASE("recurrent errors: a workspace too small") {
  for (const How& how : all_forms()) {
    std::byte byte[1];
    Answer a = problem().answer(gated_delta());
    Arguments<float> x = problem().arguments(gated_delta(), a);
    x.options.workspace = byte;
    const Status first = call(gated_delta(), x, how);
    INFO(describe(how) << ": " << first.message());
    REQUIRE(first.code() == fovea::Code::workspace_too_small);
    const std::string message = first.message(), words = "needs ";
    CHECK_THAT(message, Catch::Matchers::ContainsSubstring("workspace has 1 bytes"));
    const auto wanted = std::strtoul(message.c_str() + message.find(words) + words.size(), nullptr, 10);
    REQUIRE(wanted > 1);
    std::vector<std::byte> short_by_one(wanted - 1);
    x.options.workspace = short_by_one;
    CHECK(call(gated_delta(), x, how).code() == fovea::Code::workspace_too_small);
    CHECK(a.untouched());
  }
}
