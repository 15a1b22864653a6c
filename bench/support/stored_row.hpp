// SPDX-License-Identifier: Apache-2.0
// A row of attention over stored K and V: any format, any home, batches, ragged mixes and cascades. Queries and outputs are
// bf16 (f32 where the cache is); queries and keys begin with the same random numbers, so some weights stand out.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "fovea/core/convert.hpp"
#include "fovea/reference/softmax.hpp"
#include "rows.hpp"
#include "stored_cache.hpp"
#include "stored_calls.hpp"

namespace fovea_bench {

struct StoredRow {
  std::string regime = "decode";
  CacheShape cache{};
  index_t q_heads = 32;
  index_t len_q = 1;
  std::vector<index_t> lens_q{};     // [sequence]  ragged queries instead of len_q each
  std::string q_name{}, kv_name{};   // where one number does not say it
  index_t shared_keys = 0;           // a prefix of so many keys for all sequences together: cascade
  index_t alone = 0;                 // so many sequences in a call of their own, the others in a second one; 0: one call
  bool causal = false;               // bottom_right
  Memory memory = Memory::cached;
  bool bf16_limit = false;
  unsigned suites = kDecode;
  // How fovea is called; goes into the name of the implementation.
  fovea::Panels panels = fovea::Panels::f32;
  fovea::Regime forced = fovea::Regime::automatic;
  int threads = 1;

  index_t queries_of(index_t sequence) const { return lens_q.empty() ? len_q : lens_q[static_cast<std::size_t>(sequence)]; }
  index_t all_queries() const {
    index_t sum = 0;
    for (index_t sequence = 0; sequence < cache.sequences; ++sequence) sum += queries_of(sequence);
    return sum;
  }
  Format plain_format() const { return cache.k_format == Format::f32 ? Format::f32 : Format::bf16; }
};

inline std::string format_name(Format format) { return format == Format::i8_token ? "i8" : fovea::name_of(format); }

// Everything but threads and implementation.
inline std::string problem_name(const StoredRow& row) {
  const CacheShape& cache = row.cache;
  const auto number = [](const char* letter, index_t value) { return letter + std::to_string(value); };
  std::string name = "attention/" + row.regime + "/" + format_name(cache.k_format);
  if (cache.v_format != cache.k_format) name += "_" + format_name(cache.v_format);
  if (cache.sequences > 1) name += number("/b", cache.sequences);
  if (cache.place == Place::paged) name += number("/paged", cache.page_size);
  if (cache.place == Place::ring) name += "/ring";
  if (cache.place == Place::token_major) name += "/token_major";
  if (cache.latent) name += "/latent";
  name += number("/d", cache.dim_qk);
  if (cache.dim_v != cache.dim_qk) name += number("_", cache.dim_v);
  name += "/q" + (row.q_name.empty() ? std::to_string(row.len_q) : row.q_name);
  name += "/kv" + (row.kv_name.empty() ? std::to_string(cache.len) : row.kv_name);
  return name + number("/h", row.q_heads) + number("x", cache.kv_heads) + (row.causal ? "/causal" : "/full");
}

inline std::string row_name(const StoredRow& row) {
  std::string name = problem_name(row) + "/t" + std::to_string(row.threads) + "/fovea";
  if (row.forced == fovea::Regime::wide_decode) name += "_wide";
  if (row.panels == fovea::Panels::bf16) name += "_bf16";
  return name;
}

// Keys that query i of a sequence sees of its own cache: all, or those up to itself.
inline index_t visible_keys(const StoredRow& row, index_t sequence, index_t query) {
  const index_t len_k = row.cache.len_of(sequence);
  return row.causal ? std::max<index_t>(len_k - row.queries_of(sequence) + query + 1, 0) : len_k;
}

inline double stored_flops(const StoredRow& row) {
  double pairs = 0;
  for (index_t sequence = 0; sequence < row.cache.sequences; ++sequence) {
    for (index_t query = 0; query < row.queries_of(sequence); ++query)
      pairs += static_cast<double>(visible_keys(row, sequence, query) + row.shared_keys);
  }
  return 2. * static_cast<double>(row.cache.dim_qk + row.cache.dim_v) * pairs * static_cast<double>(row.q_heads);
}

// The cache of a cascade's shared keys: one sequence.
inline CacheShape shared_cache(const StoredRow& row) {
  CacheShape shape = row.cache;
  shape.sequences = 1;
  shape.len = row.shared_keys;
  return shape;
}

// The right answer for up to 64 rows, spread over heads and queries.
struct SampledOutputs {
  struct Place {
    index_t sequence, head, query;
  };
  std::vector<Place> places;
  std::vector<double> values;   // [place, dim_v]
};

class PreparedStored final : public PreparedRow {
 public:
  PreparedStored(const StoredRow& row, const RowMemory& memory)
      : row_(row), cache_(row.cache, row.memory, *memory.buffers), executor_(*memory.pool, row.threads) {
    if (row.shared_keys > 0) shared_ = std::make_unique<StoredCache>(shared_cache(row), row.memory, *memory.buffers);
    for (index_t sequence = 0; sequence < row.cache.sequences; ++sequence) {
      begins_.push_back(begins_.back() + row.queries_of(sequence));
    }
    place_tensors(memory);
    if (shared_ != nullptr) {
      prepare_cascade();
    } else if (row.alone > 0) {
      add_step(0, row.alone);
      add_step(row.alone, row.cache.sequences - row.alone);
    } else {
      add_step(0, row.cache.sequences);
    }
  }

  void call() override {
    ++copy_;
    if (shared_ != nullptr) {
      levels_[0].kv = shared_->kv(copy_, 0, 1);
      levels_[1].kv = cache_.kv(copy_, 0, row_.cache.sequences);
      status_ = stored_cascade(q_, levels_, out_, cascade_options_);
      return;
    }
    for (const std::unique_ptr<Step>& step : steps_) {
      if (!status_.ok()) return;
      status_ = stored_attention(step->plan, step->q, cache_.kv(copy_, step->first, step->count), step->out, step->options);
    }
  }

  std::string refusal() override { return status_.ok() ? "" : status_.message(); }

  double max_error() override {
    const SampledOutputs& right = reference();
    double worst = 0;
    std::size_t at = 0;
    for (const SampledOutputs::Place& place : right.places) {
      for (index_t d = 0; d < row_.cache.dim_v; ++d) {
        const double error = std::abs(output(place, d) - right.values[at++]);
        if (!(error <= worst)) worst = error;   // a NaN stays
      }
    }
    return worst;
  }

 private:
  // One call of fovea::attention, over `count` sequences from `first` on.
  struct Step {
    index_t first = 0, count = 0;
    std::vector<index_t> cu_len_q, len_k;
    fovea::Operand q;
    fovea::Result out;
    fovea::Plan plan;
    fovea::AttentionOptions options;
    std::vector<std::byte> workspace;
  };

  bool ragged() const { return !row_.lens_q.empty(); }

  // q and out: [sequence, q_head, query, dim], ragged [1, q_head, query of any sequence, dim].
  void place_tensors(const RowMemory& memory) {
    const index_t all = row_.all_queries(), heads = row_.q_heads, dim = row_.cache.dim_qk;
    const index_t batch = ragged() ? 1 : row_.cache.sequences, len = ragged() ? all : row_.len_q;
    const float* const numbers = memory.inputs.data();
    const auto at = [&](auto* data, index_t last) { return fovea::bhsd(data, batch, heads, len, last); };
    q_numbers_ = at(numbers, dim);
    if (row_.plain_format() == Format::f32) {
      q_ = q_numbers_;
      out_ = at(memory.outputs.data(), row_.cache.dim_v);
      return;
    }
    const auto count = static_cast<std::size_t>(heads * all * dim);
    const std::span<std::byte> bytes =
        memory.buffers->get("q/" + std::to_string(count), 2 * count, [&](std::span<std::byte> to) {
          fovea::quantise_row(Format::bf16, numbers, 1, static_cast<index_t>(count), nullptr, to.data());
        });
    q_stored_ = at(reinterpret_cast<const fovea::bf16*>(bytes.data()), dim);
    q_ = q_stored_;
    out_ = at(reinterpret_cast<fovea::bf16*>(memory.outputs.data()), row_.cache.dim_v);
  }

  fovea::AttentionOptions plain_options() const {
    fovea::AttentionOptions options;
    if (row_.causal) options.causal = fovea::Causal::bottom_right;
    options.panels = row_.panels;
    options.regime = row_.forced;
    options.executor = executor_;
    return options;
  }

  void add_step(index_t first, index_t count) {
    steps_.push_back(std::make_unique<Step>());
    Step& step = *steps_.back();
    step.first = first;
    step.count = count;
    step.q = q_;
    step.out = out_;
    step.options = plain_options();
    const auto first_query = begins_[static_cast<std::size_t>(first)];
    if (ragged()) {
      for (index_t at = 0; at <= count; ++at)
        step.cu_len_q.push_back(begins_[static_cast<std::size_t>(first + at)] - first_query);
      step.options.cu_len_q = step.cu_len_q;
      step.q.extent[2] = step.out.extent[2] = step.cu_len_q.back();
      step.q.data += first_query * step.q.stride[2] * fovea::row_bytes(step.q.format, 1);
      step.out.data += first_query * step.out.stride[2] * fovea::row_bytes(step.out.format, 1);
    }
    index_t longest = 0;
    for (index_t at = first; at < first + count; ++at) {
      step.len_k.push_back(row_.cache.len_of(at));
      longest = std::max(longest, step.len_k.back());
    }
    step.options.len_k = step.len_k;
    const fovea::AttentionShape shape{step.q.extent[0], row_.q_heads,      row_.cache.kv_heads, step.q.extent[2],
                                      longest,          row_.cache.dim_qk, row_.cache.dim_v};
    status_ = fovea::make_plan(step.plan, shape, step.options);
    if (!status_.ok()) return;
    step.workspace.resize(fovea::workspace_bytes(step.plan, row_.threads) + fovea::kAlignment);
    step.options.workspace = fovea::aligned(step.workspace);
  }

  // Plans of a cascade are made inside the call.
  void prepare_cascade() {
    cascade_options_ = plain_options();
    cascade_options_.cu_len_q = begins_;
    everyone_ = {0, row_.cache.sequences};
    shared_len_ = {row_.shared_keys};
    for (index_t sequence = 0; sequence <= row_.cache.sequences; ++sequence) each_.push_back(sequence);
    own_len_.assign(static_cast<std::size_t>(row_.cache.sequences), row_.cache.len);
    levels_ = {{{}, everyone_, shared_len_}, {{}, each_, own_len_}};
  }

  std::pair<index_t, index_t> entry_of(const SampledOutputs::Place& place) const {
    if (!ragged()) return {place.sequence, place.query};
    return {0, begins_[static_cast<std::size_t>(place.sequence)] + place.query};
  }

  double output(const SampledOutputs::Place& place, index_t d) const {
    const auto [batch, query] = entry_of(place);
    const std::byte* const number =
        out_.data + (batch * out_.stride[0] + place.head * out_.stride[1] + query * out_.stride[2] + d) *
                        fovea::row_bytes(out_.format, 1);
    return fovea::reference::stored_value(out_.format, number, 1, 0);
  }

  // Threads, panels and regimes of one problem share the answer: all first calls read the first copy.
  const SampledOutputs& reference() const {
    static std::map<std::string, SampledOutputs> known;
    const auto [place, is_new] = known.try_emplace(problem_name(row_));
    if (is_new) compute(place->second);
    return place->second;
  }

  void compute(SampledOutputs& outputs) const {
    const CacheShape& shape = row_.cache;
    const index_t tokens = begins_.back(), group = row_.q_heads / shape.kv_heads;
    // Fewer of long caches: a quarter of a second for a problem.
    const index_t samples =
        std::min(std::clamp<index_t>((index_t{1} << 18) / (shape.len + row_.shared_keys), 8, 64), row_.q_heads * tokens);
    std::vector<float> k, v, q(static_cast<std::size_t>(shape.dim_qk));
    outputs.values.resize(static_cast<std::size_t>(samples * shape.dim_v));
    for (index_t sample = 0; sample < samples; ++sample) {
      // The middle of the sample-th of equal parts; the last sample is the last query, which sees most keys. Heads in an
      // order that meets all of them.
      const index_t token = sample + 1 == samples ? tokens - 1 : (2 * sample + 1) * tokens / (2 * samples);
      const auto end = std::upper_bound(begins_.begin(), begins_.end(), token);
      SampledOutputs::Place place{end - begins_.begin() - 1, (13 * sample + 7) % row_.q_heads, 0};
      place.query = token - begins_[static_cast<std::size_t>(place.sequence)];
      k.clear();
      v.clear();
      const auto gather = [&](const StoredCache& cache, index_t sequence, index_t keys) {
        for (index_t at = 0; at < keys; ++at) {
          const float* const key = cache.key(copy_, sequence, place.head / group, at);
          const float* const value = cache.value(copy_, sequence, place.head / group, at);
          k.insert(k.end(), key, key + shape.dim_qk);
          v.insert(v.end(), value, value + shape.dim_v);
        }
      };
      if (shared_ != nullptr) gather(*shared_, 0, row_.shared_keys);
      gather(cache_, place.sequence, visible_keys(row_, place.sequence, place.query));
      const auto [batch, query] = entry_of(place);
      for (index_t d = 0; d < shape.dim_qk; ++d) {
        float& number = q[static_cast<std::size_t>(d)];
        number = q_stored_ ? fovea::convert<float>(q_stored_(batch, place.head, query, d))
                           : q_numbers_(batch, place.head, query, d);
      }
      const auto keys = static_cast<index_t>(k.size()) / shape.dim_qk;
      fovea::reference::softmax(fovea::bhsd<const float>(q.data(), 1, 1, 1, shape.dim_qk),
                                fovea::bhsd<const float>(k.data(), 1, 1, keys, shape.dim_qk),
                                fovea::bhsd<const float>(v.data(), 1, 1, keys, shape.dim_v),
                                fovea::bhsd(outputs.values.data() + sample * shape.dim_v, 1, 1, 1, shape.dim_v));
      outputs.places.push_back(place);
    }
  }

  StoredRow row_;
  StoredCache cache_;
  std::unique_ptr<StoredCache> shared_;
  fovea::Executor executor_;
  std::vector<index_t> begins_{0};   // [sequence + 1]  queries
  fovea::Operand q_;
  fovea::Result out_;
  fovea::Tensor<const float> q_numbers_;
  fovea::Tensor<const fovea::bf16> q_stored_;
  index_t copy_ = -1;
  std::vector<std::unique_ptr<Step>> steps_;
  std::vector<index_t> everyone_, each_, shared_len_, own_len_;
  std::vector<fovea::CascadeLevel> levels_;
  fovea::AttentionOptions cascade_options_;
  fovea::Status status_;
};

inline Row make_row(const StoredRow& stored) {
  Row row;
  row.name = row_name(stored);
  row.suites = stored.suites;
  row.threads = stored.threads;
  row.flops = stored_flops(stored);
  row.bytes = stored_bytes(stored.cache) + (stored.shared_keys > 0 ? stored_bytes(shared_cache(stored)) : 0.);
  row.memory = stored.memory;
  row.bf16_limit = stored.bf16_limit;
  const index_t rows = stored.q_heads * stored.all_queries();
  row.input_floats = static_cast<std::size_t>(rows * stored.cache.dim_qk);
  row.output_floats =
      static_cast<std::size_t>(rows * stored.cache.dim_v * fovea::row_bytes(stored.plain_format(), 1) + 3) / 4;
  row.prepare = [stored](const RowMemory& memory) -> std::unique_ptr<PreparedRow> {
    return std::make_unique<PreparedStored>(stored, memory);
  };
  return row;
}

}   // namespace fovea_bench
