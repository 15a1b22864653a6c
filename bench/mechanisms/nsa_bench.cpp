// SPDX-License-Identifier: Apache-2.0
// NSA with its published defaults against dense attention over the same keys and values, all of them stored as f32. What a
// step costs is the keys it touches: entries + n l' + w of them, instead of all. `compressed` is its first branch and the
// selection.
#include "fovea/mechanisms/nsa.hpp"

#include <vector>

#include "fovea/attention.hpp"
#include "support/sparse_row.hpp"

namespace fovea_bench {
namespace {

struct NsaProblem {
  index_t q_heads, kv_heads, len_q, len_k;
  static constexpr index_t kDimQk = 192, kDimV = 128;

  index_t q_floats() const { return q_heads * len_q * kDimQk; }
  index_t k_floats() const { return kv_heads * len_k * kDimQk; }
  index_t v_floats() const { return kv_heads * len_k * kDimV; }
  index_t gate_floats() const { return q_heads * len_q * 3; }
  // Of `keys` keys that a query meets on average.
  double flops(double keys) const { return 2. * static_cast<double>(q_heads * len_q * (kDimQk + kDimV)) * keys; }
  double bytes(double keys) const { return 4. * static_cast<double>(kv_heads * (kDimQk + kDimV)) * keys; }
};

struct NsaTensors {
  fovea::Tensor<const float> q, k, v, gates;
  fovea::Tensor<float> out;
};
NsaTensors tensors_of(const NsaProblem& p, const SparseMemory& memory) {
  const float* const q = memory.inputs.data();
  const float* const k = q + p.q_floats();
  const float* const v = k + p.k_floats();
  return {fovea::bhsd(q, 1, p.q_heads, p.len_q, p.kDimQk), fovea::bhsd(k, 1, p.kv_heads, p.len_k, p.kDimQk),
          fovea::bhsd(v, 1, p.kv_heads, p.len_k, p.kDimV), fovea::bhsd(v + p.v_floats(), 1, p.q_heads, p.len_q, 3),
          fovea::bhsd(memory.outputs.data(), 1, p.q_heads, p.len_q, p.kDimV)};
}

struct NsaEntries {
  std::vector<float> k, v, importance;
  std::vector<std::int32_t> lists;
  fovea::Status made;
};
std::shared_ptr<NsaEntries> entries_of(const NsaProblem& p, const NsaTensors& x) {
  const fovea::NsaShape shape;
  const index_t entries = fovea::nsa_entries(p.len_k, shape);
  const auto made = std::make_shared<NsaEntries>();
  made->k.resize(static_cast<std::size_t>(p.kv_heads * entries * p.kDimQk));
  made->v.resize(static_cast<std::size_t>(p.kv_heads * entries * p.kDimV));
  made->importance.resize(static_cast<std::size_t>(p.kv_heads * p.len_q * fovea::nsa_blocks(p.len_k, shape)));
  made->lists.resize(static_cast<std::size_t>(p.kv_heads * p.len_q * shape.selected));
  made->made =
      fovea::nsa_compress(x.k, shape, fovea::NsaPhi{}, fovea::bhsd(made->k.data(), 1, p.kv_heads, entries, p.kDimQk));
  if (made->made.ok())
    made->made =
        fovea::nsa_compress(x.v, shape, fovea::NsaPhi{}, fovea::bhsd(made->v.data(), 1, p.kv_heads, entries, p.kDimV));
  return made;
}

using F32 = fovea::Formats<fovea::Format::f32>;

SparseImpl nsa(const NsaProblem& p, bool whole) {
  const fovea::NsaShape shape;
  const double entries = static_cast<double>(fovea::nsa_entries(p.len_k, shape));
  const double keys = entries + (whole ? static_cast<double>(shape.selected * shape.selected_block + shape.window) : 0.);
  return {whole ? "fovea" : "compressed", p.flops(keys), p.bytes(keys),
          [p, shape, whole](const SparseMemory& memory) -> SparseWork {
            const NsaTensors x = tensors_of(p, memory);
            const auto made = entries_of(p, x);
            const index_t entries_made = fovea::nsa_entries(p.len_k, shape);
            const auto entry_k = fovea::bhsd(std::as_const(made->k).data(), 1, p.kv_heads, entries_made, p.kDimQk);
            const auto entry_v = fovea::bhsd(std::as_const(made->v).data(), 1, p.kv_heads, entries_made, p.kDimV);
            return {[=]() -> fovea::Status {
              if (!made->made.ok()) return made->made;
              fovea::NsaOptions options;
              options.executor = memory.executor;
              if (whole) {
                options.gate_logits = true;
                return fovea::nsa_attention<F32>(x.q, x.k, x.v, entry_k, entry_v, x.gates, x.out, shape, options);
              }
              options.len_k = {&p.len_k, 1};
              const auto importance =
                  fovea::bhsd(made->importance.data(), 1, p.kv_heads, p.len_q, fovea::nsa_blocks(p.len_k, shape));
              if (fovea::Status s = fovea::nsa_compressed_attention<F32>(x.q, fovea::dense_kv(entry_k, entry_v), shape,
                                                                         x.out, importance, options);
                  !s.ok())
                return s;
              return fovea::nsa_select(importance, shape, made->lists, options);
            }};
          }};
}

SparseImpl dense(const NsaProblem& p) {
  const double keys = static_cast<double>(p.len_k) - static_cast<double>(p.len_q - 1) / 2;
  return {"dense", p.flops(keys), p.bytes(static_cast<double>(p.len_k)), [p](const SparseMemory& memory) -> SparseWork {
            const NsaTensors x = tensors_of(p, memory);
            fovea::AttentionOptions options;
            options.causal = fovea::Causal::bottom_right;
            options.executor = memory.executor;
            return {[=] { return fovea::attention(x.q, x.k, x.v, x.out, options); }};
          }};
}

Group nsa_group(const std::string& phase, const NsaProblem& p, int threads) {
  const std::string name =
      "nsa/" + phase + "/kv" + std::to_string(p.len_k) + "/h" + std::to_string(p.q_heads) + "x" + std::to_string(p.kv_heads);
  return sparse_group(name, threads, p.q_floats() + p.k_floats() + p.v_floats() + p.gate_floats(),
                      p.q_heads * p.len_q * p.kDimV, true, {nsa(p, true), nsa(p, false), dense(p)});
}

}   // namespace

std::vector<Group> nsa_groups(int max_threads) {
  std::vector<Group> groups{nsa_group("decode", {64, 4, 1, 65536}, 1), nsa_group("decode", {64, 4, 1, 16384}, 1),
                            nsa_group("prefill/q1024", {16, 1, 1024, 16384}, 1)};
  if (max_threads > 1) groups.push_back(nsa_group("decode", {64, 4, 1, 65536}, max_threads));
  return groups;
}

}   // namespace fovea_bench
