// SPDX-License-Identifier: Apache-2.0
// generate --model DIR --prompt TEXT: a language model writes on.
// generate --model DIR --compare: its speed with fovea, with the Eigen baseline and with scalar loops.
// generate --model DIR --perplexity held-out: what each format of the KV cache costs.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <fovea/adapters/std_threads.hpp>
#include <string>
#include <thread>

#include "compare.hpp"
#include "perplexity.hpp"
#include "sampler.hpp"
#include "tokenizer.hpp"

namespace {

using generate::Index;
using generate::Token;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Text goes to stdout as it comes, everything else to stderr.
int write_on(const generate::Model& model, const generate::Tokenizer& tokenizer, generate::Engine& engine,
             const generate::SamplerOptions& sampling, const std::string& prompt, Index count) {
  const std::vector<Token> tokens = tokenizer.encode(prompt);
  if (static_cast<Index>(tokens.size()) >= engine.room()) {
    std::fprintf(stderr, "the prompt has %zu tokens, the model's context is %td\n", tokens.size(), model.config.context);
    return 1;
  }
  const double start = now();
  auto logits = engine.forward(tokens);
  if (!logits) {
    std::fprintf(stderr, "%s\n", logits.error.c_str());
    return 1;
  }
  const double prefilled = now();
  std::fwrite(prompt.data(), 1, prompt.size(), stdout);

  generate::Sampler sampler(sampling);
  Index written = 0, steps = 0;
  while (written < count) {
    const Token token = sampler.next(*logits);
    const std::string_view piece = tokenizer.piece(token);
    std::fwrite(piece.data(), 1, piece.size(), stdout);
    std::fflush(stdout);
    if (++written == count || engine.room() == 0) break;
    logits = engine.forward(std::span(&token, 1));
    ++steps;
    if (!logits) {
      std::fprintf(stderr, "\n%s\n", logits.error.c_str());
      return 1;
    }
  }
  const double done = now();
  std::printf("\n");
  std::fflush(stdout);
  std::fprintf(stderr,
               "prefill: %zu tokens, %.0f tokens/s; decode: %td tokens, %.0f tokens/s; attention took %.0f %% of the time\n",
               tokens.size(), static_cast<double>(tokens.size()) / (prefilled - start), written,
               static_cast<double>(steps) / (done - prefilled), 100 * engine.attention_seconds() / (done - start));
  std::fprintf(stderr, "KV cache (%s): %td bytes per token, %.2f MB in all\n",
               generate::describe(engine.cache().options()).c_str(), engine.cache().bytes_per_token(),
               static_cast<double>(engine.cache().bytes()) * 1e-6);
  if (written < count) std::fprintf(stderr, "stopped at the model's context of %td tokens\n", model.config.context);
  return 0;
}

// One row per format: all of them from the same home, against fp32 from there. A mixed cache has bf16 at its ends: the wider
// formats make no sense between them, and its cost is told against fp32 throughout.
int print_perplexity(const generate::Model& model, const generate::Tokenizer& tokenizer, const std::string& text,
                     const generate::KvOptions& chosen, fovea::Executor executor) {
  std::printf("%-28s %15s %14s %12s %9s\n", "KV cache", "bytes per token", "nats per byte", "perplexity", "change");
  double exact = 0;
  for (const auto& [name, format] : generate::kv_formats) {
    generate::KvOptions kv = chosen;
    kv.format = format;
    if (kv.home == generate::KvHome::mixed && fovea::is_plain(format)) {
      if (format != fovea::Format::f32) continue;
      kv.home = generate::KvHome::contiguous;
    }
    generate::Engine engine(model, *generate::attention_named("fovea"), executor, kv);
    auto loss = generate::loss_of(engine, model, tokenizer, text);
    if (!loss) {
      std::fprintf(stderr, "%s: %s\n", name, loss.error.c_str());
      return 1;
    }
    if (format == fovea::Format::f32) exact = loss->perplexity();
    std::printf("%-28s %15td %14.5f %12.4f %+7.3f %%\n", generate::describe(kv).c_str(), engine.cache().bytes_per_token(),
                loss->per_byte(), loss->perplexity(), 100 * (loss->perplexity() / exact - 1));
    std::fflush(stdout);
  }
  return 0;
}

}   // namespace

int main(int argc, char** argv) {
  std::string directory, prompt = "In the beginning", attention = "fovea", format = "f32", evaluated;
  Index count = 100;
  int threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  bool compare = false, mixed = false;
  generate::KvOptions kv;
  generate::SamplerOptions sampling;

  CLI::App app("Text from a small Llama, with fovea's attention");
  // scripts/demo sets a prompt and a length, then appends what it was given itself.
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  app.add_option("--model", directory, "directory with config.json, tokenizer.json and model.safetensors")->required();
  app.add_option("--prompt", prompt, "text to write on from");
  app.add_option("--tokens", count, "tokens to write")->check(CLI::Range(Index{1}, Index{1} << 20));
  app.add_option("--temperature", sampling.temperature, "0 takes the likeliest token every time")
      ->check(CLI::Range(0.f, 100.f));
  app.add_option("--top-k", sampling.top_k, "sample from the k likeliest tokens, 0 for all");
  app.add_option("--top-p", sampling.top_p, "sample from the fewest tokens whose probabilities reach p")
      ->check(CLI::Range(0.f, 1.f));
  app.add_option("--seed", sampling.seed, "same seed, same text");
  app.add_option("--attention", attention, "who computes attention")->check(CLI::IsMember({"fovea", "eigen", "scalar"}));
  app.add_option("--threads", threads, "threads, the calling one included")->check(CLI::Range(1, 1024));
  std::vector<std::string> formats;
  for (const auto& named : generate::kv_formats) formats.emplace_back(named.first);
  app.add_option("--kv", format, "how the KV cache stores K and V")->check(CLI::IsMember(formats));
  CLI::Option* const paged =
      app.add_flag("--paged{16}", kv.page_size, "keep the KV cache in pages: --paged or --paged=SIZE");
  CLI::Option* const window =
      app.add_option("--window", kv.window, "keep only so many of the last tokens and the first, and write without end")
          ->check(CLI::Range(Index{1}, Index{1} << 20));
  CLI::Option* const sinks =
      app.add_option("--sink", kv.sinks, "first tokens to keep beside those of --window (alone: the last 64) or --mixed, else 4")
          ->check(CLI::Range(Index{0}, Index{1} << 20));
  app.add_flag("--mixed", mixed, "the first 4 and the last 64 tokens in bf16, the others in --kv")->excludes(paged);
  paged->excludes(window)->excludes(sinks);
  app.add_option("--perplexity", evaluated,
                 "print what each format costs on a text file, or on the model's own held-out text: held-out");
  app.add_flag("--compare", compare, "print speeds instead of text");
  CLI11_PARSE(app, argc, argv);
  kv.format = *generate::format_named(format);
  kv.home = mixed                               ? generate::KvHome::mixed
            : window->count() || sinks->count() ? generate::KvHome::ring
            : paged->count()                    ? generate::KvHome::paged
                                                : generate::KvHome::contiguous;

  auto model = generate::load_model(directory);
  if (!model) {
    std::fprintf(stderr, "%s\n", model.error.c_str());
    return 1;
  }
  fovea::StdThreads pool(threads);
  const fovea::Executor executor(pool, pool.threads());
  if (compare) return generate::compare(*model, executor);

  auto tokenizer = generate::Tokenizer::load(std::filesystem::path(directory) / "tokenizer.json");
  if (!tokenizer) {
    std::fprintf(stderr, "%s\n", tokenizer.error.c_str());
    return 1;
  }
  if (static_cast<Index>(tokenizer->size()) != model->config.vocab) {
    std::fprintf(stderr, "the tokenizer has %zu tokens, the model %td\n", tokenizer->size(), model->config.vocab);
    return 1;
  }
  if (!evaluated.empty()) {
    std::filesystem::path path(evaluated);
    if (evaluated == "held-out") path = std::filesystem::path(directory) / "held_out.txt";
    auto bytes = generate::read_file(path);
    if (!bytes) {
      std::fprintf(stderr, "%s\n", bytes.error.c_str());
      return 1;
    }
    const std::string text(reinterpret_cast<const char*>(bytes->data()), bytes->size());
    return print_perplexity(*model, *tokenizer, text, kv, executor);
  }
  generate::Engine engine(*model, *generate::attention_named(attention), executor, kv);
  return write_on(*model, *tokenizer, engine, sampling, prompt, count);
}
