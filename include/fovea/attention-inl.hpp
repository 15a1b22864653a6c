// SPDX-License-Identifier: Apache-2.0
// Behind front door 1: validation, the thread-local workspace, merge and weights.
#pragma once
#include <cmath>
#include <memory>
#include <new>

#include "attention.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {
namespace door {

inline constexpr index_t kMaxDim = 576;
inline constexpr index_t kMaxLength = INT32_MAX;   // lanes carry positions as int32
inline constexpr int kMaxLanes = 1 << 16;
inline constexpr index_t kMaxSequences = kMaxTasks;

template <class... Values>
Status invalid(const char* format, Values... values) {
  return Status::error(Code::invalid_argument, format, values...);
}
template <class... Values>
Status unsupported(const char* format, Values... values) {
  return Status::error(Code::unsupported, format, values...);
}

inline index_t count_sequences(const AttentionShape& shape, const AttentionOptions& options) {
  return options.cu_len_q.empty() ? shape.batch : static_cast<index_t>(options.cu_len_q.size()) - 1;
}

inline Status check_shape(const AttentionShape& s) {
  if (s.batch < 0 || s.len_q < 0 || s.len_k < 0)
    return invalid("fovea: negative extent: batch %td, len_q %td, len_k %td", s.batch, s.len_q, s.len_k);
  if (s.q_heads < 1 || s.kv_heads < 1)
    return invalid("fovea: q heads (%td) and kv heads (%td) must be positive", s.q_heads, s.kv_heads);
  if (s.q_heads % s.kv_heads != 0)
    return invalid("fovea: kv heads (%td) do not divide q heads (%td)", s.kv_heads, s.q_heads);
  if (s.dim_qk < 1 || s.dim_v < 1) return invalid("fovea: dims must be positive: dim_qk %td, dim_v %td", s.dim_qk, s.dim_v);
  if (s.dim_qk > kMaxDim || s.dim_v > kMaxDim)
    return unsupported("fovea: dims up to %td are supported: dim_qk %td, dim_v %td", kMaxDim, s.dim_qk, s.dim_v);
  if (s.len_q > kMaxLength || s.len_k > kMaxLength || s.q_heads > kMaxLength || s.batch > kMaxLength)
    return unsupported("fovea: extents up to %td are supported: batch %td, q heads %td, len_q %td, len_k %td", kMaxLength,
                       s.batch, s.q_heads, s.len_q, s.len_k);
  return {};
}

// cu[0] = 0, never falling, ending inside the stored length.
inline Status check_cumulative(const char* name, std::span<const index_t> cu, index_t stored) {
  if (cu.front() != 0) return invalid("fovea: %s[0] is %td, must be 0", name, cu.front());
  for (std::size_t i = 1; i < cu.size(); ++i) {
    if (cu[i] < cu[i - 1])
      return invalid("fovea: %s[%zu] = %td is less than %s[%zu] = %td", name, i, cu[i], name, i - 1, cu[i - 1]);
  }
  if (cu.back() > stored) return invalid("fovea: %s ends at %td, the tensor has %td positions", name, cu.back(), stored);
  return {};
}

inline Status check_tables(const AttentionShape& s, const AttentionOptions& o) {
  if (o.cu_len_q.empty() != o.cu_len_k.empty())
    return invalid("fovea: cu_len_q (%zu entries) and cu_len_k (%zu entries) are given together or not at all",
                   o.cu_len_q.size(), o.cu_len_k.size());
  if (!o.cu_len_q.empty()) {
    if (s.batch != 1) return invalid("fovea: a ragged call has batch 1 and its sequences along pos; batch is %td", s.batch);
    if (o.cu_len_q.size() != o.cu_len_k.size())
      return invalid("fovea: cu_len_q has %zu entries, cu_len_k has %zu", o.cu_len_q.size(), o.cu_len_k.size());
    if (Status status = check_cumulative("cu_len_q", o.cu_len_q, s.len_q); !status.ok()) return status;
    if (Status status = check_cumulative("cu_len_k", o.cu_len_k, s.len_k); !status.ok()) return status;
  }
  const index_t sequences = count_sequences(s, o);
  if (sequences > kMaxSequences)
    return unsupported("fovea: up to %td sequences are supported, got %td", kMaxSequences, sequences);
  if (!o.len_k.empty() && static_cast<index_t>(o.len_k.size()) != sequences)
    return invalid("fovea: len_k has %zu entries for %td sequences", o.len_k.size(), sequences);
  if (!o.q_offset.empty() && static_cast<index_t>(o.q_offset.size()) != sequences)
    return invalid("fovea: q_offset has %zu entries for %td sequences", o.q_offset.size(), sequences);
  for (std::size_t b = 0; b < o.len_k.size(); ++b) {
    const index_t stored = o.cu_len_k.empty() ? s.len_k : o.cu_len_k[b + 1] - o.cu_len_k[b];
    if (o.len_k[b] < 0 || o.len_k[b] > stored)
      return invalid("fovea: len_k[%zu] = %td is outside 0 .. %td, the keys stored", b, o.len_k[b], stored);
  }
  for (std::size_t b = 0; b < o.q_offset.size(); ++b) {
    if (o.q_offset[b] < s.len_k - kMaxLength || o.q_offset[b] > kMaxLength - s.len_q)
      return unsupported("fovea: q_offset[%zu] = %td puts distances to keys beyond %td", b, o.q_offset[b], kMaxLength);
  }
  if (!o.alibi_slopes.empty() && static_cast<index_t>(o.alibi_slopes.size()) != s.q_heads)
    return invalid("fovea: alibi_slopes has %zu entries for %td q heads", o.alibi_slopes.size(), s.q_heads);
  if (!o.sink.empty() && static_cast<index_t>(o.sink.size()) != s.q_heads)
    return invalid("fovea: sink has %zu entries for %td q heads", o.sink.size(), s.q_heads);
  return {};
}

template <class T>
Status check_mask(const char* name, const View<const T, 4>& mask, const AttentionShape& s, const AttentionOptions& o) {
  if (!mask) return {};
  index_t len_q = s.len_q, len_k = s.len_k;
  if (!o.cu_len_q.empty()) {
    len_q = len_k = 0;
    for (std::size_t b = 1; b < o.cu_len_q.size(); ++b) {
      len_q = std::max(len_q, o.cu_len_q[b] - o.cu_len_q[b - 1]);
      len_k = std::max(len_k, o.cu_len_k[b] - o.cu_len_k[b - 1]);
    }
  }
  const index_t wanted[3] = {count_sequences(s, o), s.q_heads, len_q};
  const char* const axis_name[3] = {"sequence", "q_head", "len_q"};
  for (std::size_t axis = 0; axis < 3; ++axis) {
    const bool enough = axis == 2 ? mask.extent[axis] >= wanted[axis] : mask.extent[axis] == wanted[axis];
    if (mask.extent[axis] != 1 && !enough)
      return invalid("fovea: %s has %td along %s, must be 1 or %td", name, mask.extent[axis], axis_name[axis], wanted[axis]);
  }
  if (mask.extent[3] < len_k) return invalid("fovea: %s has %td keys, the call has %td", name, mask.extent[3], len_k);
  return {};
}

inline Status check_numbers(const AttentionOptions& o) {
  if (o.causal > Causal::bottom_right)
    return invalid("fovea: causal is %d, no value of the enum", static_cast<int>(o.causal));
  if (o.regime > Regime::decode) return invalid("fovea: regime is %d, no value of the enum", static_cast<int>(o.regime));
  if (o.scale && !std::isfinite(*o.scale)) return invalid("fovea: scale %g is not finite", static_cast<double>(*o.scale));
  if (!std::isfinite(o.softcap) || o.softcap < 0.f || (o.softcap > 0.f && !std::isfinite(1.f / o.softcap)))
    return invalid("fovea: softcap %g must be 0 (off), or positive with a finite inverse", static_cast<double>(o.softcap));
  for (std::size_t h = 0; h < o.alibi_slopes.size(); ++h) {
    if (!std::isfinite(o.alibi_slopes[h]))
      return invalid("fovea: alibi_slopes[%zu] = %g is not finite", h, static_cast<double>(o.alibi_slopes[h]));
  }
  if (o.executor.lanes() < 1 || o.executor.lanes() > kMaxLanes)
    return invalid("fovea: an executor has 1 to %d lanes, this one %d", kMaxLanes, o.executor.lanes());
  return {};
}

// The elements a view touches, as a byte range; false if an offset overflows.
struct Bytes {
  std::uintptr_t begin = 0, end = 0;
  bool overlaps(const Bytes& other) const { return begin < other.end && other.begin < end; }
};
template <class T, int Rank>
bool bytes_of(const View<T, Rank>& view, Bytes& bytes) {
  index_t low = 0, high = 0;
  bytes = {};
  if (view.data == nullptr) return true;
  for (std::size_t axis = 0; axis < Rank; ++axis) {
    if (view.extent[axis] == 0) return true;
    index_t reach = 0;
    if (__builtin_mul_overflow(view.extent[axis] - 1, view.stride[axis], &reach)) return false;
    if (__builtin_add_overflow(reach < 0 ? low : high, reach, reach < 0 ? &low : &high)) return false;
  }
  constexpr index_t kLimit = PTRDIFF_MAX / static_cast<index_t>(sizeof(T)) - 1;
  if (low < -kLimit || high > kLimit) return false;
  const auto base = reinterpret_cast<std::uintptr_t>(view.data);
  bytes = {base + static_cast<std::uintptr_t>(low * static_cast<index_t>(sizeof(T))),
           base + static_cast<std::uintptr_t>((high + 1) * static_cast<index_t>(sizeof(T)))};
  return true;
}

template <class T, int Rank>
bool is_empty(const View<T, Rank>& view) {
  for (const index_t extent : view.extent) {
    if (extent == 0) return true;
  }
  return false;
}

// Two indices of an output never name the same element: sorted by stride, each axis steps over all smaller ones.
template <class T, int Rank>
bool writes_apart(const View<T, Rank>& view) {
  std::array<std::size_t, Rank> order;
  for (std::size_t axis = 0; axis < Rank; ++axis) order[axis] = axis;
  const auto size = [&](std::size_t axis) { return view.extent[axis] <= 1 ? 0 : std::abs(view.stride[axis]); };
  std::sort(order.begin(), order.end(),
            [&](std::size_t a, std::size_t b) { return size(a) != size(b) ? size(a) < size(b) : a < b; });
  index_t covered = 0;
  if (is_empty(view)) return true;
  for (const std::size_t axis : order) {
    if (view.extent[axis] <= 1) continue;
    if (size(axis) <= covered) return false;
    covered += (view.extent[axis] - 1) * size(axis);
  }
  return true;
}

template <class T, class U>
Status check_extents(const char* name, const View<T, 4>& view, const std::array<index_t, 4>& want, const char* against,
                     const View<U, 4>&) {
  if (view.extent == want) return {};
  return invalid("fovea: %s is [%td, %td, %td, %td], must be [%td, %td, %td, %td] to fit %s", name, view.extent[0],
                 view.extent[1], view.extent[2], view.extent[3], want[0], want[1], want[2], want[3], against);
}

template <class T, int Rank>
Status check_data(const char* name, const View<T, Rank>& view, Bytes& bytes) {
  for (std::size_t axis = 0; axis < Rank; ++axis) {
    if (view.extent[axis] < 0) return invalid("fovea: %s has extent %td on axis %zu", name, view.extent[axis], axis);
  }
  if (view.data == nullptr && !is_empty(view)) return invalid("fovea: %s has null data", name);
  if (!bytes_of(view, bytes)) return invalid("fovea: %s reaches beyond the address space, check its strides", name);
  return {};
}

template <class T>
Status check_innermost(const char* name, const Tensor<T>& tensor) {
  if (tensor.stride[3] == 1 || tensor.extent[3] <= 1) return {};
  return unsupported("fovea: %s has innermost stride %td, must be 1: kernels read its vectors in place; copy it first", name,
                     tensor.stride[3]);
}

struct OutputBytes {
  const char* name;
  Bytes bytes;
};

inline Status check_apart(const OutputBytes& output, const char* name, const Bytes& bytes) {
  if (!output.bytes.overlaps(bytes)) return {};
  return invalid("fovea: %s [%#zx, %#zx) overlaps %s [%#zx, %#zx)", output.name,
                 static_cast<std::size_t>(output.bytes.begin), static_cast<std::size_t>(output.bytes.end), name,
                 static_cast<std::size_t>(bytes.begin), static_cast<std::size_t>(bytes.end));
}

inline AttentionShape shape_of(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v) {
  return {q.extent[0], q.extent[1], k.extent[1], q.extent[2], k.extent[2], q.extent[3], v.extent[3]};
}

inline Status check_tensors(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<float> out,
                            const AttentionOptions& o) {
  Bytes q_bytes, k_bytes, v_bytes, out_bytes, lse_bytes, bias_bytes, keep_bytes;
  if (Status s = check_data("q", q, q_bytes); !s.ok()) return s;
  if (Status s = check_data("k", k, k_bytes); !s.ok()) return s;
  if (Status s = check_data("v", v, v_bytes); !s.ok()) return s;
  if (Status s = check_data("out", out, out_bytes); !s.ok()) return s;
  if (Status s = check_data("bias", o.bias, bias_bytes); o.bias && !s.ok()) return s;
  if (Status s = check_data("keep", o.keep, keep_bytes); o.keep && !s.ok()) return s;
  if (Status s = check_extents("k", k, {q.extent[0], k.extent[1], k.extent[2], q.extent[3]}, "q", q); !s.ok()) return s;
  if (Status s = check_extents("v", v, {k.extent[0], k.extent[1], k.extent[2], v.extent[3]}, "k", k); !s.ok()) return s;
  if (Status s = check_extents("out", out, {q.extent[0], q.extent[1], q.extent[2], v.extent[3]}, "q and v", q); !s.ok())
    return s;
  if (Status s = check_innermost("k", k); !s.ok()) return s;
  if (Status s = check_innermost("v", v); !s.ok()) return s;
  if (!writes_apart(out)) {
    return invalid("fovea: out overlaps itself: extents [%td, %td, %td, %td], strides [%td, %td, %td, %td]", out.extent[0],
                   out.extent[1], out.extent[2], out.extent[3], out.stride[0], out.stride[1], out.stride[2], out.stride[3]);
  }
  if (o.lse) {
    if (Status s = check_data("lse", o.lse, lse_bytes); !s.ok()) return s;
    if (o.lse.extent != std::array<index_t, 3>{q.extent[0], q.extent[1], q.extent[2]})
      return invalid("fovea: lse is [%td, %td, %td], must be [%td, %td, %td]", o.lse.extent[0], o.lse.extent[1],
                     o.lse.extent[2], q.extent[0], q.extent[1], q.extent[2]);
    if (!writes_apart(o.lse))
      return invalid("fovea: lse overlaps itself: strides [%td, %td, %td]", o.lse.stride[0], o.lse.stride[1],
                     o.lse.stride[2]);
    if (Status s = check_apart({"out", out_bytes}, "lse", lse_bytes); !s.ok()) return s;
  }
  const auto span_bytes = [](const auto& span) {
    const auto base = reinterpret_cast<std::uintptr_t>(span.data());
    return Bytes{base, base + span.size_bytes()};
  };
  const std::pair<const char*, Bytes> inputs[] = {{"q", q_bytes},
                                                  {"k", k_bytes},
                                                  {"v", v_bytes},
                                                  {"bias", bias_bytes},
                                                  {"keep", keep_bytes},
                                                  {"alibi_slopes", span_bytes(o.alibi_slopes)},
                                                  {"sink", span_bytes(o.sink)},
                                                  {"workspace", span_bytes(o.workspace)}};
  const OutputBytes workspace{"workspace", span_bytes(o.workspace)};
  for (const auto& [name, bytes] : inputs) {
    if (bytes.begin != workspace.bytes.begin || bytes.end != workspace.bytes.end) {
      if (Status s = check_apart(workspace, name, bytes); !s.ok()) return s;
    }
    if (Status s = check_apart({"out", out_bytes}, name, bytes); !s.ok()) return s;
    if (Status s = check_apart({"lse", lse_bytes}, name, bytes); !s.ok()) return s;
  }
  return {};
}

inline Sequence sequence_of(const AttentionShape& shape, const AttentionOptions& options, index_t b) {
  const auto i = static_cast<std::size_t>(b);
  Sequence sequence{0, shape.len_q, 0, shape.len_k, 0, b};
  if (!options.cu_len_q.empty()) {
    const index_t q_begin = options.cu_len_q[i], k_begin = options.cu_len_k[i];
    sequence = {q_begin, options.cu_len_q[i + 1] - q_begin, k_begin, options.cu_len_k[i + 1] - k_begin, 0, 0};
  }
  if (!options.len_k.empty()) sequence.len_k = options.len_k[i];
  sequence.pos = !options.q_offset.empty()                ? options.q_offset[i]
                 : options.causal == Causal::bottom_right ? sequence.len_k - sequence.len_q
                                                          : 0;
  return sequence;
}

// A plan made for another problem would mask wrongly, or read and write outside these tensors.
inline Status check_plan(const Plan& plan, const AttentionShape& s, const AttentionOptions& o) {
  const PlanRequest& r = plan.request;
  if (r.q_heads != s.q_heads || r.kv_heads != s.kv_heads || r.dim_qk != s.dim_qk || r.dim_v != s.dim_v)
    return invalid("fovea: the plan is for %td/%td heads and dims %td/%td, the call has %td/%td and %td/%td", r.q_heads,
                   r.kv_heads, r.dim_qk, r.dim_v, s.q_heads, s.kv_heads, s.dim_qk, s.dim_v);
  const Reach reach = reach_of(o);
  if (r.reach.left != reach.left || r.reach.right != reach.right)
    return invalid("fovea: the plan is for keys %td left to %td right of the query, the options say %td and %td",
                   r.reach.left, r.reach.right, reach.left, reach.right);
  if (static_cast<index_t>(plan.sequences.size()) != count_sequences(s, o))
    return invalid("fovea: the plan is for %zu sequences, the call has %td", plan.sequences.size(), count_sequences(s, o));
  if (r.regime != o.regime) return invalid("fovea: the plan was made with another regime option than the call");
  for (std::size_t b = 0; b < plan.sequences.size(); ++b) {
    const Sequence &planned = plan.sequences[b], called = sequence_of(s, o, static_cast<index_t>(b));
    if (planned != called) {
      return invalid(
          "fovea: sequence %zu is planned as %td queries from position %td and %td keys, the call has %td, %td, %td", b,
          planned.len_q, planned.pos, planned.len_k, called.len_q, called.pos, called.len_k);
    }
  }
  return {};
}

// The library's own memory for callers who bring none: one per thread, kept between calls. A call from inside a call (a
// work-stealing pool may do that) finds it busy and takes memory of its own.
struct Local {
  Plan plan;
  AttentionRun run;
  std::unique_ptr<std::byte[]> bytes;
  std::size_t size = 0;
  bool busy = false;

  std::span<std::byte> workspace(std::size_t wanted) {
    if (size < wanted) {
      bytes.reset();
      bytes.reset(new (std::nothrow) std::byte[wanted]);
      size = bytes ? wanted : 0;
    }
    return {bytes.get(), size};
  }
};
inline Local& thread_local_memory() {
  thread_local Local local;
  return local;
}
template <class F>
auto with_local(const F& f) {
  Local& shared = thread_local_memory();
  if (shared.busy) {
    Local own;
    return f(own);
  }
  struct Busy {   // also when a pool throws
    bool& flag;
    explicit Busy(bool& f) : flag(f) { flag = true; }
    ~Busy() { flag = false; }
  } busy(shared.busy);
  return f(shared);
}

inline Status check_workspace(std::span<std::byte> workspace, std::size_t wanted) {
  if (workspace.size() >= wanted) return {};
  return Status::error(Code::workspace_too_small, "fovea: workspace has %zu bytes, the plan needs %zu", workspace.size(),
                       wanted);
}

inline int lanes_for(const Plan& plan, const AttentionOptions& options) {
  return static_cast<int>(
      std::min<index_t>(options.executor.lanes(), std::max<index_t>(static_cast<index_t>(plan.tasks.size()), 1)));
}

// Everything has been checked.
inline Status execute(AttentionRun& run, std::span<std::byte> workspace, int slices, const Plan& plan, Tensor<const float> q,
                      Tensor<const float> k, Tensor<const float> v, Tensor<float> out, const AttentionOptions& options) {
  if (Status status = check_workspace(workspace, plan.workspace_bytes(slices)); !status.ok()) return status;
  bind(run, plan, q, k, v, out, options);
  open_workspace(run, workspace, slices);
  const int lanes = std::min(lanes_for(plan, options), slices);
  if (lanes == 1) {
    softmax_lane(run, 0);
  } else {
    const auto lane = [&run](int i) { softmax_lane(run, i); };
    options.executor.run(lanes, lane);
  }
  return {};
}

inline Status execute(Local& local, const Plan& plan, Tensor<const float> q, Tensor<const float> k, Tensor<const float> v,
                      Tensor<float> out, const AttentionOptions& options) {
  if (!options.workspace.empty())
    return execute(local.run, options.workspace, options.executor.lanes(), plan, q, k, v, out, options);
  const int lanes = lanes_for(plan, options);
  return execute(local.run, local.workspace(plan.workspace_bytes(lanes)), lanes, plan, q, k, v, out, options);
}

template <class... Views>
void tidy_all(Views&... views) {
  ((views = tidy(views)), ...);
}

}   // namespace door

inline Status supports(const AttentionShape& shape, const AttentionOptions& options) {
  if (Status s = door::check_shape(shape); !s.ok()) return s;
  if (Status s = door::check_numbers(options); !s.ok()) return s;
  if (Status s = door::check_tables(shape, options); !s.ok()) return s;
  if (Status s = door::check_mask("bias", options.bias, shape, options); !s.ok()) return s;
  return door::check_mask("keep", options.keep, shape, options);
}

namespace door {
inline Status check_planned_call(const Plan& plan, Tensor<const float> q, Tensor<const float> k, Tensor<const float> v,
                                 Tensor<float> out, const AttentionOptions& options) {
  const AttentionShape shape = shape_of(q, k, v);
  if (Status s = check_tensors(q, k, v, out, options); !s.ok()) return s;
  if (Status s = supports(shape, options); !s.ok()) return s;
  return check_plan(plan, shape, options);
}
inline void list_sequences(Plan& plan, const AttentionShape& shape, const AttentionOptions& options) {
  plan.sequences.clear();
  for (index_t b = 0; b < count_sequences(shape, options); ++b) plan.sequences.push_back(sequence_of(shape, options, b));
}
inline PlanRequest request_of(const AttentionShape& shape, const AttentionOptions& options) {
  return {shape.q_heads,  shape.kv_heads,           shape.dim_qk, shape.dim_v, reach_of(options),
          options.regime, options.executor.lanes(), options.cpu};
}
}   // namespace door

inline Status make_plan(Plan& plan, const AttentionShape& shape, const AttentionOptions& options) {
  if (Status s = supports(shape, options); !s.ok()) return s;
  door::list_sequences(plan, shape, options);
  return plan.build(door::request_of(shape, options));
}

inline std::size_t workspace_bytes(const Plan& plan, int lanes) { return plan.workspace_bytes(lanes); }

inline Status attention(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v, Tensor<float> out,
                        const AttentionOptions& options) {
  door::tidy_all(q, k, v, out);
  if (Status s = door::check_tensors(q, k, v, out, options); !s.ok()) return s;
  return door::with_local([&](door::Local& local) {
    if (Status s = make_plan(local.plan, door::shape_of(q, k, v), options); !s.ok()) return s;
    return door::execute(local, local.plan, q, k, v, out, options);
  });
}

inline Status attention(const Plan& plan, Tensor<const float> q, Tensor<const float> k, Tensor<const float> v,
                        Tensor<float> out, const AttentionOptions& options) {
  door::tidy_all(q, k, v, out);
  if (Status s = door::check_planned_call(plan, q, k, v, out, options); !s.ok()) return s;
  if (!options.workspace.empty()) {
    AttentionRun run;
    return door::execute(run, options.workspace, options.executor.lanes(), plan, q, k, v, out, options);
  }
  return door::with_local([&](door::Local& local) { return door::execute(local, plan, q, k, v, out, options); });
}

inline Status prepare(AttentionRun& run, const Plan& plan, Tensor<const float> q, Tensor<const float> k,
                      Tensor<const float> v, Tensor<float> out, const AttentionOptions& options) {
  door::tidy_all(q, k, v, out);
  if (Status s = door::check_planned_call(plan, q, k, v, out, options); !s.ok()) return s;
  if (Status s = door::check_workspace(options.workspace, plan.workspace_bytes(options.executor.lanes())); !s.ok()) return s;
  bind(run, plan, q, k, v, out, options);
  open_workspace(run, options.workspace, options.executor.lanes());
  return {};
}

inline void run_lane(AttentionRun& run, int lane) { softmax_lane(run, lane); }

inline Status merge(Tensor<float> out_a, View<float, 3> lse_a, Tensor<const float> out_b, View<const float, 3> lse_b) {
  door::tidy_all(out_a, lse_a, out_b, lse_b);
  door::Bytes a, b, la, lb;
  if (Status s = door::check_data("out_a", out_a, a); !s.ok()) return s;
  if (Status s = door::check_data("out_b", out_b, b); !s.ok()) return s;
  if (Status s = door::check_data("lse_a", lse_a, la); !s.ok()) return s;
  if (Status s = door::check_data("lse_b", lse_b, lb); !s.ok()) return s;
  if (Status s = door::check_extents("out_b", out_b, out_a.extent, "out_a", out_a); !s.ok()) return s;
  const std::array<index_t, 3> rows = {out_a.extent[0], out_a.extent[1], out_a.extent[2]};
  if (lse_a.extent != rows || lse_b.extent != rows) {
    return door::invalid("fovea: lse_a is [%td, %td, %td] and lse_b [%td, %td, %td], must be [%td, %td, %td]",
                         lse_a.extent[0], lse_a.extent[1], lse_a.extent[2], lse_b.extent[0], lse_b.extent[1],
                         lse_b.extent[2], rows[0], rows[1], rows[2]);
  }
  if (!door::writes_apart(out_a) || !door::writes_apart(lse_a))
    return door::invalid("fovea: out_a or lse_a overlaps itself");
  for (const auto& [name, bytes] : {std::pair{"out_b", b}, std::pair{"lse_b", lb}}) {
    if (Status s = door::check_apart({"out_a", a}, name, bytes); !s.ok()) return s;
    if (Status s = door::check_apart({"lse_a", la}, name, bytes); !s.ok()) return s;
  }
  if (Status s = door::check_apart({"out_a", a}, "lse_a", la); !s.ok()) return s;

  const float empty = -std::numeric_limits<float>::infinity();
  for (index_t n = 0; n < rows[0]; ++n) {
    for (index_t h = 0; h < rows[1]; ++h) {
      for (index_t i = 0; i < rows[2]; ++i) {
        float& lse = lse_a(n, h, i);
        const float other = lse_b(n, h, i);
        if (other == empty) {
          for (index_t d = 0; lse == empty && d < out_a.extent[3]; ++d) out_a(n, h, i, d) = 0.f;
          continue;
        }
        // Two infinite sinks cannot be weighed against each other; equal references make them equal.
        const double top = lse > other ? lse : other;
        const double weight_a = lse == empty                      ? 0.
                                : static_cast<double>(lse) == top ? 1.
                                                                  : std::exp(static_cast<double>(lse) - top);
        const double weight_b = static_cast<double>(other) == top ? 1. : std::exp(static_cast<double>(other) - top);
        const double sum = weight_a + weight_b;
        const auto share_a = static_cast<float>(weight_a / sum), share_b = static_cast<float>(weight_b / sum);
        for (index_t d = 0; d < out_a.extent[3]; ++d) {
          float& to = out_a(n, h, i, d);
          to = lse == empty ? out_b(n, h, i, d) : std::fma(to, share_a, out_b(n, h, i, d) * share_b);
        }
        lse = static_cast<float>(top + std::log(sum));
      }
    }
  }
  return {};
}

inline Status attention_weights(Tensor<const float> q, Tensor<const float> k, View<const float, 3> lse,
                                std::span<const WeightRow> rows, View<float, 2> weights, const AttentionOptions& options) {
  door::tidy_all(q, k, lse, weights);
  door::Bytes q_bytes, k_bytes, lse_bytes, to_bytes;
  if (Status s = door::check_data("q", q, q_bytes); !s.ok()) return s;
  if (Status s = door::check_data("k", k, k_bytes); !s.ok()) return s;
  if (Status s = door::check_data("lse", lse, lse_bytes); !s.ok()) return s;
  if (Status s = door::check_data("weights", weights, to_bytes); !s.ok()) return s;
  if (Status s = door::check_extents("k", k, {q.extent[0], k.extent[1], k.extent[2], q.extent[3]}, "q", q); !s.ok())
    return s;
  if (Status s = door::check_innermost("k", k); !s.ok()) return s;
  if (lse.extent != std::array<index_t, 3>{q.extent[0], q.extent[1], q.extent[2]}) {
    return door::invalid("fovea: lse is [%td, %td, %td], must be [%td, %td, %td]", lse.extent[0], lse.extent[1],
                         lse.extent[2], q.extent[0], q.extent[1], q.extent[2]);
  }
  if (!door::writes_apart(weights))
    return door::invalid("fovea: weights overlaps itself: strides [%td, %td]", weights.stride[0], weights.stride[1]);
  for (const auto& [name, bytes] : {std::pair{"q", q_bytes}, std::pair{"k", k_bytes}, std::pair{"lse", lse_bytes}}) {
    if (Status s = door::check_apart({"weights", to_bytes}, name, bytes); !s.ok()) return s;
  }
  return door::with_local([&](door::Local& local) {
    const AttentionShape shape = door::shape_of(q, k, k);
    if (Status s = supports(shape, options); !s.ok()) return s;
    door::list_sequences(local.plan, shape, options);   // no tasks: only places and positions are asked
    local.plan.request = door::request_of(shape, options);
    index_t longest = 0;
    for (std::size_t n = 0; n < rows.size(); ++n) {
      const WeightRow& row = rows[n];
      if (row.sequence < 0 || row.sequence >= static_cast<index_t>(local.plan.sequences.size()) || row.q_head < 0 ||
          row.q_head >= shape.q_heads || row.q_index < 0 ||
          row.q_index >= local.plan.sequences[static_cast<std::size_t>(row.sequence)].len_q)
        return door::invalid("fovea: rows[%zu] is sequence %td, q head %td, query %td: there is no such row", n,
                             row.sequence, row.q_head, row.q_index);
      longest = std::max(longest, local.plan.sequences[static_cast<std::size_t>(row.sequence)].len_k);
    }
    if (weights.extent[0] != static_cast<index_t>(rows.size()) || weights.extent[1] < longest)
      return door::invalid("fovea: weights is [%td, %td], must be [%zu, at least %td]", weights.extent[0], weights.extent[1],
                           rows.size(), longest);
    Bump size;
    carve_strip(size, shape.dim_qk, longest);
    const std::span<std::byte> bytes = local.workspace(size.used() + kAlignment);
    if (Status s = door::check_workspace(bytes, size.used() + kAlignment); !s.ok()) return s;
    Bump bump(aligned(bytes).data());
    const StripMemory memory = carve_strip(bump, shape.dim_qk, longest);
    bind(local.run, local.plan, q, k, k, {}, options);

    // Neighbours in the list that share a sequence and a kv head share the reading of K.
    const index_t group = shape.q_heads / shape.kv_heads;
    for (std::size_t n = 0; n < rows.size();) {
      Row strip[kStripRows];
      float row_lse[kStripRows];
      std::array<float*, kStripRows> to{};
      std::size_t count = 0;
      while (count < kStripRows && n + count < rows.size() && rows[n + count].sequence == rows[n].sequence &&
             rows[n + count].q_head / group == rows[n].q_head / group) {
        const WeightRow& row = rows[n + count];
        const Sequence& sequence = local.plan.sequences[static_cast<std::size_t>(row.sequence)];
        strip[count] = {sequence.pos + row.q_index, row.q_index, static_cast<int>(row.sequence),
                        static_cast<int>(row.q_head), static_cast<int>(row.q_head / group)};
        row_lse[count] = lse(sequence.batch, row.q_head, sequence.q_begin + row.q_index);
        to[count] = weights.data + static_cast<index_t>(n + count) * weights.stride[0];
        ++count;
      }
      softmax_weights(local.run, {strip, count}, row_lse, memory, to, weights.stride[1], weights.extent[1]);
      n += count;
    }
    return Status{};
  });
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
