// SPDX-License-Identifier: Apache-2.0
// Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236):
//   S_t = S_{t-1} + phi(k_t) v_t',  z_t = z_{t-1} + phi(k_t),  o_t = S_t' phi(q_t) / (phi(q_t) . z_t + eps).
// phi is a functor on rows (engine/parts/feature_maps.hpp has the published ones):
//   fovea::linear_attention(q, k, v, out, {}, {}, fovea::EluMap{dim});
#pragma once
#include "../call/chunk_call.hpp"
#include "../engine/parts/decays.hpp"
#include "../engine/parts/readouts.hpp"
#include "../engine/parts/updates.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

namespace door {

// A map made for rows of another length has none.
template <class Map>
index_t features_of(const Map& map, index_t dim) {
  if constexpr (requires { map.dim; }) {
    if (map.dim != dim) return 0;
  }
  return map.features(dim);
}

}   // namespace door

struct IdentityFeatures {
  FOVEA_INLINE index_t features(index_t dim) const { return dim; }
};

// q [batch, q_head, pos, dim_k], k [batch, k_head, pos, dim_k], v [batch, v_head, pos, dim_v], out [batch, out_head, pos,
// dim_v] (core/recurrent.hpp: heads, states, ragged batches). Nothing is written before every check has passed; out must not
// overlap anything.
// A feature map has index_t features(index_t dim) and operator()(head, pos, row, features), head being that of q or of k, pos
// that of the token in its sequence. The states have features(dim) rows. Scale is 1 if normalised, else 1/sqrt(features). Not
// causal: every token reads the state after the sequence's last one.
template <class QueryMap, class KeyMap>
Status linear_attention(const Operand& q, const Operand& k, const Operand& v, const Result& out,
                        const LinearOptions<float>& linear, const RecurrentOptions<float>& options,
                        const QueryMap& query_map, const KeyMap& key_map) {
  door::Memory memory;
  const index_t features = door::features_of(key_map, k.extent[3]);
  if (door::features_of(query_map, q.extent[3]) != features || features < 1)
    return door::invalid("fovea: phi gives %td features of q and %td of k", door::features_of(query_map, q.extent[3]), features);
  if (Status s = door::check_recurrent(q, k, v, out, options, memory, features); !s.ok()) return s;
  if (!std::isfinite(linear.eps)) return door::invalid("fovea: eps %g is not finite", static_cast<double>(linear.eps));
  RecurrentRun run = door::bind_recurrent(q, k, v, out, options, linear.normalize ? 1.f : door::inverse_root(features));
  run.shape.dim_k = features;
  run.read_last = !linear.causal;
  if constexpr (!std::is_same_v<QueryMap, IdentityFeatures>) run.q_map = door::row_map(query_map);
  if constexpr (!std::is_same_v<KeyMap, IdentityFeatures>) run.k_map = door::row_map(key_map);
  const std::array<index_t, 3> sums{run.shape.sequences, run.shape.state_heads, features};
  if (Status s = door::check_like("initial_key_sum", linear.initial_key_sum, sums, memory); !s.ok()) return s;
  if (Status s = door::check_like("final_key_sum", linear.final_key_sum, sums, memory); !s.ok()) return s;
  memory.may_be("final_key_sum", "initial_key_sum");
  if (Status s = memory.check_apart(); !s.ok()) return s;
  if (Status s = door::check_first_pos(linear.first_pos, run.shape, options.cu_len, PTRDIFF_MAX); !s.ok()) return s;
  run.first_pos = linear.first_pos;
  if (!linear.normalize && !linear.initial_key_sum && !linear.final_key_sum) {
    const ChunkSpec<NoDecay, Additive, Inclusive, Plain> spec{{}, {}, {}, {}};
    return door::run_recurrent(run, spec, options);
  }
  run.initial_key_sum = linear.initial_key_sum;
  run.final_key_sum = linear.final_key_sum;
  const ChunkSpec<NoDecay, Additive, Inclusive, Normalized> spec{{}, {}, {}, {linear.eps, linear.clamp_denominator, linear.normalize}};
  return door::run_recurrent(run, spec, options);
}

template <class Map = IdentityFeatures>
Status linear_attention(const Operand& q, const Operand& k, const Operand& v, const Result& out,
                        const LinearOptions<float>& linear, const RecurrentOptions<float>& options = {}, const Map& map = {}) {
  return linear_attention(q, k, v, out, linear, options, map, map);
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
