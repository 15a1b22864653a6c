// SPDX-License-Identifier: Apache-2.0
// Masks that hide most keys, held against the bare kernel of the dense call; and what building a BlockMask costs, whose
// "flops" are pairs of query and key.
#include "fovea/engine/parts/block_mask.hpp"

#include "support/variant_row.hpp"

namespace fovea_bench {
namespace {

constexpr index_t kLen = 4096, kDocument = 512, kBuildLen = 65536;

std::vector<index_t> equal_documents(index_t len) {
  std::vector<index_t> borders;
  for (index_t begin = 0; begin <= len; begin += kDocument) borders.push_back(begin);
  return borders;
}

// Its own document, by arithmetic on positions.
struct SameDocument {
  template <class K>
  auto operator()(int, int, int q, K k) const {
    return (k <= q) & (k >= q / static_cast<int>(kDocument) * static_cast<int>(kDocument));
  }
};

std::function<fovea::Status()> by_borders(const VariantTensors& x) {
  return [x, borders = equal_documents(kLen)] {
    return fovea::attention(x.q, x.k, x.v, x.out, x.options, fovea::variant().with_mask(fovea::documents(borders)));
  };
}

std::function<fovea::Status()> by_block_mask(const VariantTensors& x) {
  const auto blocks = std::make_shared<fovea::BlockMask>();
  const fovea::Status built = blocks->build({.len_q = kLen, .len_k = kLen}, SameDocument{});
  return [x, blocks, built] {
    if (!built.ok()) return built;
    return fovea::attention(x.q, x.k, x.v, x.out, x.options,
                            fovea::variant().with_mask(fovea::block_masked(*blocks, SameDocument{})));
  };
}

// The same rows as a ragged batch, which needs no mask: what documents of this length can cost at best.
std::function<fovea::Status()> as_ragged_batch(const VariantTensors& x) {
  return [x, borders = equal_documents(kLen)] {
    fovea::AttentionOptions options = x.options;
    options.cu_len_q = options.cu_len_k = borders;
    return fovea::attention(x.q, x.k, x.v, x.out, options);
  };
}

template <class M>
class PreparedBuild final : public PreparedRow {
 public:
  PreparedBuild(const M& mask, const RowMemory& memory, int threads) : mask_(mask), executor_(*memory.pool, threads) {}
  void call() override { status_ = blocks_.build({.len_q = kBuildLen, .len_k = kBuildLen}, mask_, executor_); }
  double max_error() override { return 0; }
  std::string refusal() override { return status_.ok() ? "" : status_.message(); }

 private:
  M mask_;
  fovea::Executor executor_;
  fovea::BlockMask blocks_;
  fovea::Status status_;
};

template <class M>
Row build_row(const std::string& impl, const M& mask, int threads) {
  Row row;
  row.name = "variants/block_mask_build/q65536/kv65536/block128/t" + std::to_string(threads) + "/" + impl;
  row.suites = kVariants;
  row.threads = threads;
  row.flops = static_cast<double>(kBuildLen) * static_cast<double>(kBuildLen);
  row.input_floats = row.output_floats = 16;
  row.prepare = [mask, threads](const RowMemory& memory) -> std::unique_ptr<PreparedRow> {
    return std::make_unique<PreparedBuild<M>>(mask, memory, threads);
  };
  return row;
}

}   // namespace

std::vector<Group> block_mask_groups(int max_threads) {
  const double pairs = static_cast<double>(kLen) * static_cast<double>(kLen + 1) / 2;
  const double visible = static_cast<double>(kLen / kDocument * kDocument) * static_cast<double>(kDocument + 1) / 2 / pairs;
  std::vector<Group> groups;
  groups.push_back(variant_group("documents512", {bare_softmax(),
                                                  {"borders", by_borders, 0, visible},
                                                  {"block_mask", by_block_mask, 0, visible},
                                                  {"ragged", as_ragged_batch, 0, visible}}));

  static const std::vector<index_t> borders = equal_documents(kBuildLen), prefix{10000};
  Group build;
  build.title = "variants/block_mask_build";
  build.rows.push_back(build_row("band", fovea::band(4095, 0), 1));
  build.rows.push_back(build_row("documents", fovea::documents(borders), 1));
  build.rows.push_back(build_row("prefix", fovea::prefix_lm(prefix), 1));
  const auto opaque = [](int, int, int q, auto k) { return (k <= q) & ((q - k < 4096) | (k < 4)); };
  for (int threads = 1; threads <= std::min(2, max_threads); ++threads)
    build.rows.push_back(build_row("opaque", opaque, threads));
  groups.push_back(std::move(build));
  return groups;
}

}   // namespace fovea_bench
