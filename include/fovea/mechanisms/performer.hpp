// SPDX-License-Identifier: Apache-2.0
// Performer, FAVOR+ (Choromanski et al. 2021, arXiv 2009.14794): linear attention with positive random features of the
// softmax kernel,
//   phi(x) = m^(-1/2) (exp(W x' - |x'|^2 / 2 - s) + eps),  x' = x dim^(-1/4),  W [m, dim],
//   o_i = phi(q_i)' S / (phi(q_i) . z + eps'),  S = sum phi(k_j) v_j',  z = sum phi(k_j).
// s of a query is its own largest W x'; that of the keys is one number per sequence and head, or S would add unlike things.
// Without s and eps the mean of phi(q) . phi(k) over W is e^(q . k / sqrt(dim)).
//
// W x is a matrix product over all tokens, three to four times as fast as one row after the other, so features are
// made first, for the whole call: 4 m bytes per token and head of q and of k.
#pragma once
#include <optional>

#include "../call/chunk_call.hpp"
#include "../call/in_memory.hpp"
#include "../engine/parts/decays.hpp"
#include "../engine/parts/feature_maps.hpp"
#include "../engine/parts/readouts.hpp"
#include "../engine/parts/updates.hpp"
#include "../simd/project.hpp"

namespace fovea {
inline namespace v0 {

// relu: phi(x) = relu(W x') + eps, no stabiliser; the paper's "generalized" attention.
enum class PerformerKernel : std::uint8_t { softmax, relu };

struct PerformerOptions {
  View<const float, 2> projection = {};   // [feature, dim]  W, of the checkpoint; innermost stride 1
  PerformerKernel kernel = PerformerKernel::softmax;
  std::optional<float> eps = {};   // absent = 1e-4 for softmax, 1e-3 for relu
  // [sequence, k_head]  s of the keys. Null = the largest number of W k' over the sequence. A state goes on only with the s
  // that it was made with, so a call with an initial state needs it; later keys may exceed it, by 88 at most.
  View<const float, 2> key_stabiliser = {};
  View<float, 2> used_stabiliser = {};   // [sequence, k_head]  the s of this call, for the next; 0 where there are no tokens
};

// How long the rows of a random W are: as long as Gaussian vectors, or all sqrt(dim).
enum class ProjectionLength : std::uint8_t { gaussian, equal };

inline namespace FOVEA_ARCH {

namespace performer_parts {

// Tokens from which W x is a matrix product; below, packing W costs more than it saves. With W [621, 128], microseconds per
// row one by one and as a product: 7.1 and 20.2 (1 row), 7.4 and 5.8 (4 rows), 7.8 and 3.2 (12), 6.7 and 1.7 (64).
inline constexpr index_t kProjectedFrom = 4;
inline constexpr index_t kRowsOfTask = 64;

using PerformerSpec = ChunkSpec<NoDecay, Additive, Inclusive, Normalized>;
using UnnormalizedSpec = ChunkSpec<NoDecay, Additive, Inclusive, Plain>;

struct Features {
  Operand from;
  float* to;   // [batch, head, pos, stride]
  index_t stride;

  index_t heads() const { return from.extent[1]; }
  index_t len() const { return from.extent[2]; }
  float* row(index_t batch_head, index_t pos) const { return to + (batch_head * len() + pos) * stride; }
  void read(index_t batch_head, index_t pos, index_t first, index_t count, float* numbers) const {
    const std::byte* const x = row_at(from, batch_head / heads(), batch_head % heads(), pos);
    read_numbers(from.format, x + first * from.stride[3] * row_bytes(from.format, 1), from.stride[3], count, numbers);
  }
  Operand operand(index_t count) const {
    return Tensor<const float>{
        to, {from.extent[0], heads(), len(), count}, {heads() * len() * stride, len() * stride, stride, 1}};
  }
};

struct Memory {
  float *q, *k;        // [batch, head, pos, stride]
  float* stabiliser;   // [sequence, k_head]
  std::byte* lanes;    // a ProjectMemory and a row for each
  std::size_t slice;   // bytes of a lane
};
struct LaneMemory {
  ProjectMemory project;
  float* row;   // [dim]
};
inline LaneMemory carve_lane(Bump& bump, index_t rows, index_t dim) {
  const ProjectMemory project = carve_project(bump, rows < kProjectedFrom ? 1 : rows);
  return {project, bump.take<float>(dim)};
}
inline Memory carve(Bump& bump, const door::RecurrentShape& shape, index_t features, index_t dim, int lanes) {
  const index_t stride = round_up(features, kLanes);
  Memory m;
  m.q = bump.take<float>(shape.batch * shape.q_heads * shape.len * stride);
  m.k = bump.take<float>(shape.batch * shape.k_heads * shape.len * stride);
  m.stabiliser = bump.take<float>(shape.sequences * shape.k_heads);
  Bump lane;
  carve_lane(lane, shape.len, dim);
  m.slice = lane.used();
  m.lanes = bump.take<std::byte>(static_cast<index_t>(m.slice) * lanes);
  return m;
}

class Maker {
 public:
  Maker(const PerformerOptions& performer, const RecurrentOptions<float>& options, const door::RecurrentShape& shape,
        index_t dim, const Memory& memory)
      : performer_(performer),
        options_(options),
        shape_(shape),
        dim_(dim),
        features_(performer.projection.extent[0]),
        scale_(favor::inverse_fourth_root(dim)),
        memory_(memory) {}

  void make(const Features& q, const Features& k) const {
    project(q);
    project(k);
    if (performer_.kernel == PerformerKernel::softmax) find_stabilisers(k);
    close(q, false);
    close(k, true);
  }

 private:
  LaneMemory lane_memory(int lane) const {
    Bump bump(memory_.lanes + static_cast<std::size_t>(lane) * memory_.slice);
    return carve_lane(bump, shape_.len, dim_);
  }

  // Rows behind the last sequence of a ragged call belong to nobody.
  index_t used_rows() const { return options_.cu_len.empty() ? shape_.len : options_.cu_len.back(); }

  // W x of every row.
  void project(const Features& x) const {
    const View<const float, 2>& w = performer_.projection;
    const index_t heads = shape_.batch * x.heads(), len = used_rows();
    if (shape_.len < kProjectedFrom) {   // not `len`: bits depend on how long the tensor is, not on how full
      return deal(options_.executor, options_.executor.lanes(), heads * len, [&](int lane, index_t task) {
        float* const row = lane_memory(lane).row;
        x.read(task / len, task % len, 0, dim_, row);
        feature_rows::multiply(w, row, x.row(task / len, task % len));
      });
    }
    const index_t tasks = project_tasks(len, features_);
    const StoredMatrix matrix{reinterpret_cast<const std::byte*>(w.data), Format::f32, features_, dim_,
                              features_ == 1 ? 0 : w.stride[0]};
    deal(options_.executor, options_.executor.lanes(), heads * tasks, [&](int lane, index_t task) {
      const index_t head = task / tasks;
      project_task(
          task % tasks, len, matrix, Weights::by_output, lane_memory(lane).project,
          [&](index_t row, index_t first, index_t count, float* to) { x.read(head, row, first, count, to); },
          [&](index_t row, index_t first, index_t count, const float* from) {
            std::copy_n(from, count, x.row(head, row) + first);
          });
    });
  }

  void find_stabilisers(const Features& k) const {
    const auto& given = performer_.key_stabiliser;
    const auto& used = performer_.used_stabiliser;
    deal(options_.executor, options_.executor.lanes(), shape_.sequences * shape_.k_heads, [&](int, index_t task) {
      const index_t sequence = task / shape_.k_heads, head = task % shape_.k_heads;
      const door::SequenceRun run = door::sequence_run(shape_, options_.cu_len, sequence);
      float found = 0.f;
      if (given) {
        found = given.data[sequence * given.stride[0] + head * given.stride[1]];
      } else if (run.begin < run.end) {
        found = -HUGE_VALF;
        for (index_t t = run.begin; t < run.end; ++t) {
          const float here = feature_rows::extremes(k.row(run.batch * shape_.k_heads + head, t), features_).high;
          found = here > found ? here : found;
        }
        found *= scale_;
      }
      memory_.stabiliser[task] = found;
      if (used) used.data[sequence * used.stride[0] + head * used.stride[1]] = found;
    });
  }

  index_t sequence_of(index_t batch, index_t pos) const {
    const auto& cu = options_.cu_len;
    if (cu.empty()) return batch;
    return static_cast<index_t>(std::upper_bound(cu.begin(), cu.end(), pos) - cu.begin()) - 1;
  }

  // W x to phi(x), in place.
  void close(const Features& x, bool keys) const {
    const index_t len = used_rows();
    const index_t blocks = (len + kRowsOfTask - 1) / kRowsOfTask;
    const bool relu = performer_.kernel == PerformerKernel::relu;
    const float eps = performer_.eps ? *performer_.eps : relu ? 1e-3f : 1e-4f;
    deal(options_.executor, options_.executor.lanes(), shape_.batch * x.heads() * blocks, [&](int lane, index_t task) {
      const index_t batch_head = task / blocks, begin = task % blocks * kRowsOfTask;
      float* const row = lane_memory(lane).row;
      for (index_t t = begin; t < std::min(begin + kRowsOfTask, len); ++t) {
        float* const at = x.row(batch_head, t);
        if (relu) {
          favor::close_relu_row(at, features_, scale_, eps);
          continue;
        }
        x.read(batch_head, t, 0, dim_, row);
        const index_t batch = batch_head / x.heads();
        const float stabiliser = keys ? memory_.stabiliser[sequence_of(batch, t) * x.heads() + batch_head % x.heads()]
                                      : scale_ * feature_rows::extremes(at, features_).high;
        favor::close_row(at, features_, scale_, favor::half_norm(row, dim_), stabiliser, eps);
      }
    });
  }

  const PerformerOptions& performer_;
  const RecurrentOptions<float>& options_;
  const door::RecurrentShape& shape_;
  const index_t dim_, features_;
  const float scale_;
  const Memory& memory_;
};

// Divided by or only handed on.
inline bool keeps_sum(const LinearOptions<float>& linear) {
  return linear.normalize || linear.initial_key_sum || linear.final_key_sum;
}

// What the chunk engine is asked, once features are there (null pointers while bytes are counted).
struct Bound {
  Features q, k;
  RecurrentRun run;
};
inline Bound bind(const Operand& q, const Operand& k, const Operand& v, const Result& out, const Memory& memory,
                  index_t features, const LinearOptions<float>& linear, const RecurrentOptions<float>& options) {
  const index_t stride = round_up(features, kLanes);
  Bound bound{{door::tidy_operand(q), memory.q, stride}, {door::tidy_operand(k), memory.k, stride}, {}};
  bound.run = door::bind_recurrent(bound.q.operand(features), bound.k.operand(features), v, out, options,
                                   linear.normalize ? 1.f : door::inverse_root(features));
  bound.run.read_last = !linear.causal;
  bound.run.initial_key_sum = linear.initial_key_sum;
  bound.run.final_key_sum = linear.final_key_sum;
  return bound;
}

inline Status check(const PerformerOptions& performer, const LinearOptions<float>& linear,
                    const RecurrentOptions<float>& options, const door::RecurrentShape& shape, index_t dim,
                    door::Memory& memory) {
  const auto& w = performer.projection;
  if (w.extent[1] != dim)
    return door::invalid("fovea: projection is [%td, %td], q has dim %td", w.extent[0], w.extent[1], dim);
  if (w.stride[1] != 1 && dim > 1)
    return door::unsupported("fovea: projection has innermost stride %td, must be 1", w.stride[1]);
  if (w.data == nullptr) return door::invalid("fovea: projection has null data");
  if (Status s = memory.reads("projection", w); !s.ok()) return s;
  if (performer.kernel > PerformerKernel::relu)
    return door::invalid("fovea: kernel is %d, no value of the enum", static_cast<int>(performer.kernel));
  if (performer.eps && !(*performer.eps >= 0.f && std::isfinite(*performer.eps)))
    return door::invalid("fovea: performer.eps %g must be 0 or more", static_cast<double>(*performer.eps));
  if (!std::isfinite(linear.eps)) return door::invalid("fovea: eps %g is not finite", static_cast<double>(linear.eps));
  const std::array<index_t, 2> heads{shape.sequences, shape.k_heads};
  if (Status s = door::check_like("key_stabiliser", performer.key_stabiliser, heads, memory); !s.ok()) return s;
  if (Status s = door::check_like("used_stabiliser", performer.used_stabiliser, heads, memory); !s.ok()) return s;
  const bool softmax = performer.kernel == PerformerKernel::softmax;
  if (!softmax && (performer.key_stabiliser || performer.used_stabiliser))
    return door::invalid("fovea: the relu kernel has no stabiliser");
  if (softmax && !performer.key_stabiliser && (options.initial_state || linear.initial_key_sum))
    return door::invalid("fovea: an initial state goes on with the key_stabiliser it was made with");
  const std::array<index_t, 3> sums{shape.sequences, shape.state_heads, w.extent[0]};
  if (Status s = door::check_like("initial_key_sum", linear.initial_key_sum, sums, memory); !s.ok()) return s;
  if (Status s = door::check_like("final_key_sum", linear.final_key_sum, sums, memory); !s.ok()) return s;
  memory.may_be("final_key_sum", "initial_key_sum");
  if (Status s = door::check_in_place("initial_key_sum", linear.initial_key_sum, "final_key_sum", linear.final_key_sum); !s.ok())
    return s;
  // Numbers of features, and then bytes, are counted in index_t.
  const double rows =
      static_cast<double>(shape.batch) * static_cast<double>(shape.len) * static_cast<double>(shape.q_heads + shape.k_heads);
  if (rows * static_cast<double>(w.extent[0]) > 0x1p56)
    return door::unsupported("fovea: %g rows of %td features are more than a workspace can hold", rows, w.extent[0]);
  return memory.check_apart();
}

}   // namespace performer_parts

// Bytes for options.workspace of a valid call.
inline std::size_t performer_workspace_bytes(const Operand& q, const Operand& k, const Operand& v, const Result& out,
                                             const PerformerOptions& performer, const LinearOptions<float>& linear = {},
                                             const RecurrentOptions<float>& options = {}) {
  using namespace performer_parts;
  const index_t features = performer.projection.extent[0];
  Bump bump;
  const Memory memory =
      carve(bump, door::recurrent_shape(q, k, v, options), features, k.extent[3], options.executor.lanes());
  const RecurrentRun run = bind(q, k, v, out, memory, features, linear, options).run;
  return bump.used() + kAlignment +
         (keeps_sum(linear) ? door::recurrent_workspace_bytes<PerformerSpec>(run, options)
                            : door::recurrent_workspace_bytes<UnnormalizedSpec>(run, options));
}

// q [batch, q_head, pos, dim], k [batch, k_head, pos, dim], v [batch, v_head, pos, dim_v], out [batch, out_head, pos,
// dim_v]; the states have `feature` rows. options.scale multiplies phi(q); 1 if normalised. Nothing is written before every
// check has passed; out must not overlap anything.
inline Status performer(const Operand& q, const Operand& k, const Operand& v, const Result& out,
                        const PerformerOptions& performer, const LinearOptions<float>& linear = {},
                        const RecurrentOptions<float>& options = {}) {
  using namespace performer_parts;
  const index_t features = performer.projection.extent[0], dim = k.extent[3];
  if (features < 1) return door::invalid("fovea: projection has %td features", features);
  door::Memory checked;
  if (Status s = door::check_recurrent(q, k, v, out, options, checked, features); !s.ok()) return s;
  const door::RecurrentShape shape = door::recurrent_shape(q, k, v, options);
  if (Status s = check(performer, linear, options, shape, dim, checked); !s.ok()) return s;

  const std::size_t wanted = performer_workspace_bytes(q, k, v, out, performer, linear, options);
  return door::in_memory<door::LocalBytes>(options.workspace, wanted, [&](std::span<std::byte> bytes) -> Status {
    Bump bump(bytes.data());
    const Memory memory = carve(bump, shape, features, dim, options.executor.lanes());
    Bound bound = bind(q, k, v, out, memory, features, linear, options);
    Maker(performer, options, shape, dim, memory).make(bound.q, bound.k);
    RecurrentOptions<float> rest = options;
    rest.workspace = bytes.subspan(bump.used());
    if (!keeps_sum(linear)) return door::run_recurrent(bound.run, UnnormalizedSpec{{}, {}, {}, {}}, rest);
    const PerformerSpec spec{{}, {}, {}, {linear.eps, linear.clamp_denominator, linear.normalize}};
    return door::run_recurrent(bound.run, spec, rest);
  });
}

// A random W: blocks of dim orthonormal rows, uniform among all such, the last one cut off, times the rows' lengths. For
// training and tests: inference takes the W of its checkpoint. The same seed gives the same numbers (to the last bits of
// the C library's log and cos).
inline Status draw_projection(std::uint64_t seed, const View<float, 2>& projection,
                              ProjectionLength length = ProjectionLength::gaussian) {
  const index_t rows = projection.extent[0], dim = projection.extent[1];
  door::Bytes bytes;
  if (Status s = door::check_data("projection", projection, bytes); !s.ok()) return s;
  if (!door::writes_apart(projection)) return door::invalid("fovea: projection overlaps itself");
  if (length > ProjectionLength::equal)
    return door::invalid("fovea: length is %d, no value of the enum", static_cast<int>(length));
  std::uint64_t state = seed;
  const auto uniform = [&] {   // splitmix64, in (0, 1)
    std::uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (static_cast<double>((z ^ (z >> 31)) >> 12) + 0.5) * 0x1p-52;
  };
  const auto gaussian = [&] { return std::sqrt(-2 * std::log(uniform())) * std::cos(4 * std::acos(0.) * uniform()); };
  const auto dot = [&](index_t a, index_t b) {
    double sum = 0;
    for (index_t d = 0; d < dim; ++d) sum += double{projection(a, d)} * double{projection(b, d)};
    return sum;
  };
  const auto multiply = [&](index_t row, double factor) {
    for (index_t d = 0; d < dim; ++d) projection(row, d) = static_cast<float>(double{projection(row, d)} * factor);
  };
  for (index_t block = 0; block < rows && dim > 0; block += dim) {
    const index_t end = std::min(block + dim, rows);
    for (index_t row = block; row < end; ++row) {
      for (double left = 0; !(left > 1e-4);) {   // of what no earlier row has; less is drawn again
        for (index_t d = 0; d < dim; ++d) projection(row, d) = static_cast<float>(gaussian());
        // Gram and Schmidt, which leaves the signs of R's diagonal positive; the second time takes away what the first one's
        // rounding has left.
        for (int pass = 0; pass < 2; ++pass) {
          for (index_t before = block; before < row; ++before) {
            const double share = dot(row, before);
            for (index_t d = 0; d < dim; ++d) {
              projection(row, d) = static_cast<float>(double{projection(row, d)} - share * double{projection(before, d)});
            }
          }
          const double size = std::sqrt(dot(row, row));
          if (pass == 0) left = size;
          multiply(row, size > 0 ? 1 / size : 0);
        }
      }
    }
    for (index_t row = block; row < end; ++row) {
      double squares = static_cast<double>(dim);
      if (length == ProjectionLength::gaussian) {
        squares = 0;
        for (index_t d = 0; d < dim; ++d) {
          const double x = gaussian();
          squares += x * x;
        }
      }
      multiply(row, std::sqrt(squares));
    }
  }
  return {};
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
