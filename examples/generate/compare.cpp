// SPDX-License-Identifier: Apache-2.0
#include "compare.hpp"

#include <array>
#include <cstdio>
#include <functional>
#include <limits>
#include <memory>
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
        if (!engine.rewind(before).ok()) return false;
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
  const fovea::Kv kv = fovea::dense_kv(fovea::bhsd(k_data.data(), 1, kv_heads, len_k, dim),
                                       fovea::bhsd(v_data.data(), 1, kv_heads, len_k, dim));
  const std::array<Index, 1> keys{len_k};

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
              attention(0, q, kv, out, {.causal = fovea::Causal::bottom_right, .len_k = keys, .executor = executor});
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

// What a storage format saves and what it costs in time, decoding at the end of the context.
bool compare_formats(const Model& model, fovea::Executor executor) {
  const Index context = model.config.context, steps = std::min<Index>(16, context / 2);
  const std::vector<Token> tokens(static_cast<std::size_t>(context), Token{0});
  const std::array<const char*, 4> formats{"f32", "bf16", "int8", "int4"};
  std::array<Best, formats.size()> decode;
  std::vector<std::unique_ptr<Engine>> engines;
  for (const char* name : formats) {
    const KvOptions kv{.format = *format_named(name)};
    engines.push_back(std::make_unique<Engine>(model, fovea_attention(), executor, kv));
    if (!engines.back()->forward(tokens)) return false;
  }
  for (int round = 0; round < 40; ++round) {
    for (std::size_t which = 0; which < formats.size(); ++which) {
      Engine& engine = *engines[which];
      if (!engine.rewind(context - steps).ok()) return false;
      const double attention = engine.attention_seconds();
      const double whole = seconds_of([&] {
        for (Index step = 0; step < steps; ++step) engine.forward(std::span(tokens).first(1));
      });
      decode[which].add(whole, engine.attention_seconds() - attention);
    }
  }
  std::printf("The KV cache, bytes per token and tokens/s of decode at %td keys:", context);
  for (std::size_t which = 0; which < formats.size(); ++which) {
    std::printf("%s %s %td, %.0f", which == 0 ? "" : ";", formats[which], engines[which]->cache().bytes_per_token(),
                decode[which].of(steps).whole);
  }
  std::printf("\n\n");
  return true;
}

// An fp32 cache in one piece as the tensors that the baselines take.
std::optional<fovea::Tensor<const float>> dense(const fovea::Kv& kv, const fovea::Stored& stored, Index dim, Index len) {
  if (kv.home != fovea::Home::contiguous || kv.exact != nullptr || stored.format != fovea::Format::f32) return std::nullopt;
  constexpr Index number = sizeof(float);
  return fovea::Tensor<const float>{reinterpret_cast<const float*>(stored.data),
                                    {kv.batch, kv.kv_heads, len, dim},
                                    {stored.stride[0] / number, stored.stride[1] / number, stored.stride[2] / number, 1}};
}

}   // namespace

std::optional<Attention> attention_named(const std::string& name) {
  if (name == "fovea") return fovea_attention();
  const auto wrap = [](auto baseline) -> Attention {
    return [baseline](Index, fovea::Tensor<const float> q, const fovea::Kv& kv, fovea::Tensor<float> out,
                      const fovea::AttentionOptions& options) {
      const auto k = dense(kv, kv.k, kv.dim_qk, options.len_k[0]), v = dense(kv, kv.v, kv.dim_v, options.len_k[0]);
      if (!k || !v) {
        return fovea::Status::error(fovea::Code::unsupported, "the baselines read f32 in one piece, the cache holds %s",
                                    fovea::name_of(kv.k.format));
      }
      baseline(q, *k, *v, out, options);
      return fovea::Status();
    };
  };
  if (name == "eigen") return wrap(fovea_baselines::eigen_attention);
  if (name == "scalar") return wrap(fovea_baselines::scalar_attention);
  return std::nullopt;
}

int compare(const Model& model, fovea::Executor executor) {
  const bool model_agrees = compare_model(model, executor);
  const bool formats_ran = compare_formats(model, executor);
  const bool attention_agrees = compare_attention(executor);
  return model_agrees && formats_ran && attention_agrees ? 0 : 1;
}

}   // namespace generate
