// SPDX-License-Identifier: Apache-2.0
#include "compare.hpp"

#include <array>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>

#include "../../bench/baselines/eigen_attention.hpp"
#include "../../bench/baselines/scalar_attention.hpp"

namespace generate {
namespace {

constexpr std::array<const char*, 3> names{"fovea", "eigen", "scalar"};

double seconds_of(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct Speed {
  double whole = 0, attention = 0;   // tokens per second
};

// The fastest of several runs: on a shared machine the others measure the neighbours.
class Best {
 public:
  void add(double whole, double attention) {
    whole_ = std::min(whole_, whole);
    attention_ = std::min(attention_, attention);
  }
  Speed of(Index tokens) const { return {static_cast<double>(tokens) / whole_, static_cast<double>(tokens) / attention_}; }

 private:
  double whole_ = std::numeric_limits<double>::infinity(), attention_ = whole_;
};

void print_speeds(Index context, const char* what, const std::array<Speed, 3>& speeds) {
  std::printf("%8td  %-8s", context, what);
  for (const Speed& speed : speeds) std::printf("%9.0f", speed.whole);
  std::printf("   ");
  for (const Speed& speed : speeds) std::printf("%9.0f", speed.attention);
  std::printf("\n");
}

// False if the logits of the three disagree.
bool compare_model(const Model& model, fovea::Executor executor) {
  std::printf("The model: %.1f M parameters, %td layers, %tdx%td heads, head_dim %td, %d thread(s). Tokens per second.\n",
              static_cast<double>(model.parameters()) * 1e-6, model.config.layers, model.config.heads, model.config.kv_heads,
              model.config.head_dim, executor.lanes());
  std::printf("%18s  %-27s   %s\n", "", "        the whole model", "     the attention in it");
  std::printf("%8s  %-8s", "context", "");
  for (int column = 0; column < 2; ++column) {
    for (const char* name : names) std::printf("%9s", name);
    std::printf("   ");
  }
  std::printf("\n");

  std::mt19937 bits(1);
  std::vector<Token> tokens(static_cast<std::size_t>(model.config.context));
  for (Token& token : tokens) token = static_cast<Token>(bits() % static_cast<unsigned>(model.config.vocab));
  bool agree = true;
  for (Index context = model.config.context / 4; context > 0 && context <= model.config.context; context *= 2) {
    const Index steps = std::min<Index>(16, context / 2), before = context - steps;
    const std::span<const Token> text = std::span(tokens).first(static_cast<std::size_t>(context));
    std::array<Best, 3> prefill, decode;
    std::array<std::vector<float>, 3> logits;
    // Interleaved, so that a slow second of the machine hits all three.
    const auto start = std::chrono::steady_clock::now();
    for (int round = 0; round < 20 && (round < 2 || std::chrono::steady_clock::now() - start < std::chrono::seconds(3));
         ++round) {
      for (std::size_t which = 0; which < names.size(); ++which) {
        Engine engine(model, *attention_named(names[which]), executor);
        const auto run = [&](Best& best, const std::function<void()>& work) {
          const double attention = engine.attention_seconds(), whole = seconds_of(work);
          best.add(whole, engine.attention_seconds() - attention);
        };
        run(prefill[which], [&] {
          const auto last = engine.forward(text);
          if (last.value) logits[which].assign(last.value->begin(), last.value->end());
        });
        engine.rewind(before);
        run(decode[which], [&] {
          for (Index at = before; at < context; ++at) engine.forward(text.subspan(static_cast<std::size_t>(at), 1));
        });
      }
    }
    std::array<Speed, 3> prefill_speed, decode_speed;
    for (std::size_t which = 0; which < names.size(); ++which) {
      prefill_speed[which] = prefill[which].of(context);
      decode_speed[which] = decode[which].of(steps);
      if (logits[which].size() != logits[0].size() || logits[which].empty()) return false;
      for (std::size_t i = 0; i < logits[0].size(); ++i) {
        if (!(std::abs(logits[which][i] - logits[0][i]) <= 1e-3f)) agree = false;
      }
    }
    print_speeds(context, "prefill", prefill_speed);
    print_speeds(context, "decode", decode_speed);
  }
  std::printf("The logits of the three %s.\n\n", agree ? "agree to 1e-3" : "DISAGREE");
  return agree;
}

bool compare_attention(fovea::Executor executor) {
  const Index heads = 32, kv_heads = 8, dim = 128, len_k = 4096;
  std::mt19937 bits(2);
  const auto random = [&](Index count) {
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& value : values) value = static_cast<float>(bits()) * 0x1p-31f - 1.f;
    return values;
  };
  const std::vector<float> k_data = random(kv_heads * len_k * dim), v_data = random(kv_heads * len_k * dim);
  const auto k = fovea::bhsd(k_data.data(), 1, kv_heads, len_k, dim),
             v = fovea::bhsd(v_data.data(), 1, kv_heads, len_k, dim);

  std::printf("One attention call: %tdx%td heads, head_dim %td, %td keys, causal, %d thread(s). Milliseconds per call.\n",
              heads, kv_heads, dim, len_k, executor.lanes());
  std::printf("%18s", "");
  for (const char* name : names) std::printf("%9s", name);
  std::printf("   fovea against eigen, scalar\n");
  bool agree = true;
  for (const Index len_q : {Index{32}, Index{1}}) {
    const std::vector<float> q_data = random(len_q * heads * dim);
    const auto q = fovea::bshd(q_data.data(), 1, len_q, heads, dim);
    std::array<double, 3> seconds;
    seconds.fill(std::numeric_limits<double>::infinity());
    std::array<std::vector<float>, 3> outputs;
    for (std::size_t which = 0; which < names.size(); ++which) {
      const Attention attention = *attention_named(names[which]);
      outputs[which].resize(q_data.size());
      const auto out = fovea::bshd(outputs[which].data(), 1, len_q, heads, dim);
      double spent = 0;
      for (int run = 0; run < 2 || (run < 200 && spent < 0.3); ++run) {
        if (run > 0 && spent > 2) break;   // the scalar prefill takes seconds, and once is enough
        const double once = seconds_of([&] {
          const fovea::Status status =
              attention(0, q, k, v, out, {.causal = fovea::Causal::bottom_right, .executor = executor});
          agree = agree && status.ok();
        });
        seconds[which] = std::min(seconds[which], once);
        spent += once;
      }
      for (std::size_t i = 0; i < outputs[0].size(); ++i) {
        if (!(std::abs(outputs[which][i] - outputs[0][i]) <= 1e-5f)) agree = false;
      }
    }
    std::printf("%4td %-13s", len_q, len_q == 1 ? "query" : "queries");
    for (const double one : seconds) std::printf("%9.3f", one * 1e3);
    std::printf("   %.1fx, %.0fx\n", seconds[1] / seconds[0], seconds[2] / seconds[0]);
  }
  std::printf("The outputs of the three %s.\n", agree ? "agree to 1e-5" : "DISAGREE");
  return agree;
}

}   // namespace

std::optional<Attention> attention_named(const std::string& name) {
  if (name == "fovea") return fovea_attention();
  const auto wrap = [](auto baseline) -> Attention {
    return [baseline](Index, fovea::Tensor<const float> q, fovea::Tensor<const float> k, fovea::Tensor<const float> v,
                      fovea::Tensor<float> out, const fovea::AttentionOptions& options) {
      baseline(q, k, v, out, options);
      return fovea::Status();
    };
  };
  if (name == "eigen") return wrap(fovea_baselines::eigen_attention);
  if (name == "scalar") return wrap(fovea_baselines::scalar_attention);
  return std::nullopt;
}

int compare(const Model& model, fovea::Executor executor) {
  const bool model_agrees = compare_model(model, executor);
  const bool attention_agrees = compare_attention(executor);
  return model_agrees && attention_agrees ? 0 : 1;
}

}   // namespace generate
