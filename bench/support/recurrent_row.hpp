// SPDX-License-Identifier: Apache-2.0
// Rows of the suite `recurrent`. A mechanism says what it takes besides q, k and v and how it is called; shapes, states and
// comparisons are the same for all.
#pragma once
#include <functional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "baselines/scalar_recurrence.hpp"
#include "fovea/core/kv.hpp"
#include "fovea/core/recurrent.hpp"
#include "fovea/core/status.hpp"
#include "rows.hpp"

namespace fovea_bench {

using fovea::Format;
using fovea::index_t;
using fovea_baselines::ScalarToken;

// How the work of a token is counted. Prefill: the chunk form with a triangular solve at chunks of 32, whatever chunks a
// kernel takes: 4, 6 or 8 dim_k dim_v + 32, 64 or 128 (dim_k + dim_v). Decode: 5 dim_k dim_v, or 7 where a product of the
// state and the key comes first.
enum class Work { decay, delta, removal };

// A tensor of fp32 that a mechanism takes besides q, k and v: uniform numbers in [low, high).
struct ExtraInput {
  static constexpr index_t kDimK = 0;   // as a width

  float low, high;
  index_t width = 1;
  bool per_token = true;   // else once per head
};

// What a mechanism is called with: all heads in float, or one head in double for its reference.
template <class Real>
struct RecurrentCall {
  static constexpr bool kDouble = std::is_same_v<Real, double>;
  using Input = std::conditional_t<kDouble, fovea::Tensor<const double>, fovea::Operand>;
  using Output = std::conditional_t<kDouble, fovea::Tensor<double>, fovea::Result>;

  Input q{}, k{}, v{};   // [1, head, pos, dim]
  Output out{};
  std::vector<fovea::Tensor<const Real>> extra;   // [1, head, pos | 1, width]
  fovea::View<const Real, 3> initial_sum{};       // [1, head, dim_k]  where the mechanism keeps a sum of keys
  fovea::View<Real, 3> final_sum{};
  fovea::View<const Real, 2> initial_max{};   // [1, head]  and the exponent of its state
  fovea::View<Real, 2> final_max{};
  fovea::RecurrentOptions<Real> options{};

  std::span<const Real> per_head(std::size_t which) const {
    return {extra[which].data, static_cast<std::size_t>(extra[which].extent[1])};
  }
};

struct RecurrentMechanism {
  std::string name;
  Work work = Work::decay;
  std::vector<ExtraInput> extra;
  bool keeps_sum = false;   // of keys, beside the state
  std::function<fovea::Status(const RecurrentCall<float>&)> call;
  std::function<void(const RecurrentCall<double>&)> reference;
  std::function<void(const ScalarToken&)> scalar;
};

struct RecurrentRow {
  bool decode = false;   // states are read and written in place; else from nothing, the states afterwards wanted
  Format format = Format::f32;
  bool token_major = false;
  index_t dim_k = 128, dim_v = 128, len = 4096, qk_heads = 32, heads = 32;
  bool streamed = false;   // decode: states walk through memory, one set per call
  fovea::StateLayout layout = fovea::StateLayout::k_first;
  fovea::RecurrentForm form = fovea::RecurrentForm::automatic;
  index_t chunk = 0;
  fovea::Panels panels = fovea::Panels::f32;   // in which chunks multiply
  bool scalar = false;
  int threads = 1;
};

Row make_row(const RecurrentMechanism& mechanism, const RecurrentRow& row);

// What differs between the mechanisms' tables.
struct RecurrentShapes {
  index_t dim_k = 128, dim_v = 128, qk_heads = 32, heads = 32;
  bool v_first = false;   // decode from states with dim_v first as well
  bool bf16_on_two_threads = false;   // and in tiles of bf16, where the machine has them
  bool token_major = false;   // a row of prefill with the heads of a token next to each other
  bool longest = false;       // one head, up to 1M tokens
  bool forms = false;         // the three forms and several chunks beside the planner's choice
};

// The groups of a mechanism, one `add` after the other; recurrent_groups has them all.
class RecurrentTable {
 public:
  RecurrentTable(const RecurrentMechanism& mechanism, const RecurrentShapes& shapes, int max_threads);

  // 4096 tokens from nothing.
  void add_prefill();
  // One token, all heads, states from memory: beside an update of the same memory that does nothing else.
  void add_streamed_decode();
  // One and four heads, states in the caches.
  void add_cached_decode();
  // One head and few tokens, where a fixed cost would show: continued with up to 64 tokens (drafts to verify), and 1024 from
  // nothing. Beside the latter up to a million: what a token costs must not depend on how many there were.
  void add_short();

  std::vector<Group> take() { return std::move(groups_); }

 private:
  RecurrentRow with_heads(index_t qk_heads, index_t heads) const;
  std::vector<fovea::StateLayout> layouts() const;
  Group& add_group(const RecurrentRow& row);
  void add_threads(Group& group, RecurrentRow row, int most) const;
  void add_scalar(Group& group, RecurrentRow row) const;
  void add_longest(Group& group, RecurrentRow row) const;

  RecurrentMechanism mechanism_;
  RecurrentShapes shapes_;
  int most_threads_;
  std::vector<Group> groups_;
};

std::vector<Group> recurrent_groups(const RecurrentMechanism& mechanism, const RecurrentShapes& shapes, int max_threads);

}   // namespace fovea_bench
