// SPDX-License-Identifier: Apache-2.0
// What a selector that reads queries and keys itself needs of a call: its checks, its rows as floats, its keys as packed
// columns, and memory for the lists that it makes.
#pragma once
#include "../engine/deal.hpp"
#include "sparse_call.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {
namespace door {

// A checked call, as a selector sees it. Keys may be stored in any format of the call and live anywhere.
struct Selection {
  Operand q;
  AttentionShape shape;
  StoredSource source{};                                              // .sequences: [sequence]
  index_t sequences = 0, longest = 0, most_keys = 0, last_pos = -1;   // over all sequences; last_pos of any query

  const Sequence& sequence(index_t b) const { return source.sequences[b]; }
  index_t kv_head(index_t q_head) const { return q_head / (shape.q_heads / shape.kv_heads); }

  // Query i of a sequence times the scales that its keys are stored without.
  void read_query(index_t b, index_t head, index_t i, float* to) const {
    const Sequence& s = sequence(b);
    const index_t at = s.batch * q.stride[0] + head * q.stride[1] + (s.q_begin + i) * q.stride[2];
    read_numbers(q.format, q.data + at * row_bytes(q.format, 1), q.stride[3], shape.dim_qk, to);
    if (source.kv.k_channel_scale == nullptr) return;
    const float* const scale = source.kv.k_channel_scale + kv_head(head) * shape.dim_qk;
    for (index_t d = 0; d < shape.dim_qk; ++d) to[d] *= scale[d];
  }

  // Keys first, first + step ... as the columns 0 .. count - 1 of whole panels, zeros behind: to [panel, dim, kPanel].
  void pack_keys(index_t b, index_t head, index_t first, index_t step, index_t count, float* to) const {
    const Row row{0, 0, static_cast<int>(b), static_cast<int>(head), static_cast<int>(kv_head(head))};
    const index_t end = first + (count - 1) * step + 1;
    for (index_t n = 0; n < count;) {
      const Run run = source.run(row, first + n * step, end);
      const index_t here = std::min(count - n, (run.k.count + step - 1) / step);
      run.kernels->k.pack({run.k.data, run.k.stride * step, here, 0}, shape.dim_qk, n, to);
      n += here;
    }
    if (count % kPanel != 0) clear_columns(to, shape.dim_qk, count, padded(count, kPanel));
  }
};

// Everything the attend step would refuse, but for the outputs. `memory` holds the sequences and lives as long as
// `selection`.
template <class Compiled>
Status open_selection(Selection& selection, LocalBytes& memory, const Operand& q_any, const Kv& kv_any,
                      const AttentionOptions& options) {
  const Operand q = tidy_operand(q_any);
  const Kv kv = tidy_kv(kv_any);
  const AttentionShape shape = shape_of(q, kv, options);
  Bytes ignored;
  if (Status s = check_plain("q", q.format); !s.ok()) return s;
  if (Status s = check_data("q", q, ignored); !s.ok()) return s;
  if (Status s = check_stored("k", kv, kv.k, kv.dim_qk, ignored); !s.ok()) return s;
  if (kv.exact != nullptr) {
    if (Status s = check_stored("the exact k", *kv.exact, kv.exact->k, kv.exact->dim_qk, ignored); !s.ok()) return s;
    if (Status s = check_formats(*kv.exact, kv.k_channel_scale); !s.ok()) return s;
  }
  if (q.extent[3] != kv.dim_qk) return invalid("fovea: q has dim %td, k has dim %td", q.extent[3], kv.dim_qk);
  if (Status s = check_problem(shape, options); !s.ok()) return s;
  if (Status s = check_home(kv, shape, options); !s.ok()) return s;
  const auto kernels_of = [](const Kv& stored, KvKernels& kernels) -> Status {
    kernels.k = key_kernels<F32Panels>(stored.k.format, Compiled{});
    if (kernels.k.pack != nullptr) return {};
    return unsupported("fovea: k is stored as %s, not among the formats of this call", name_of(stored.k.format));
  };
  selection = {q, shape, {kv, nullptr, {}, {}}, count_sequences(shape, options)};
  if (Status s = kernels_of(kv, selection.source.kernels); !s.ok()) return s;
  if (kv.exact != nullptr) {
    if (Status s = kernels_of(*kv.exact, selection.source.exact_kernels); !s.ok()) return s;
  }
  const std::size_t wanted = static_cast<std::size_t>(selection.sequences) * sizeof(Sequence) + 2 * kAlignment;
  const std::span<std::byte> bytes = memory.workspace(wanted);
  if (Status s = check_workspace(bytes, wanted); !s.ok()) return s;
  auto* const sequences = Bump(aligned(bytes).data()).take<Sequence>(selection.sequences);
  for (index_t b = 0; b < selection.sequences; ++b) {
    const Sequence& s = *new (sequences + b) Sequence(sequence_of(shape, options, b));
    selection.longest = std::max(selection.longest, s.len_q);
    selection.most_keys = std::max(selection.most_keys, s.len_k);
    if (s.len_q > 0) selection.last_pos = std::max(selection.last_pos, s.pos + s.len_q - 1);
  }
  selection.source.sequences = sequences;
  return {};
}

// `carve(Bump&)` lays memory out; it is called once to count and once over the bytes.
template <class Carve>
Status carve_local(LocalBytes& memory, const Carve& carve) {
  Bump size;
  carve(size);
  const std::size_t wanted = size.used() + kAlignment;
  const std::span<std::byte> bytes = memory.workspace(wanted);
  if (Status s = check_workspace(bytes, wanted); !s.ok()) return s;
  Bump bump(aligned(bytes).data());
  carve(bump);
  return {};
}

// f(memory of a lane, task) once for every task; carve(Bump&) lays a lane's memory out.
template <class Carve, class F>
Status deal_to_lanes(LocalBytes& memory, const Executor& executor, index_t tasks, const Carve& carve, const F& f) {
  const int lanes = static_cast<int>(std::min<index_t>(executor.lanes(), std::max<index_t>(tasks, 1)));
  Bump size;
  carve(size);
  const auto slice = static_cast<index_t>(size.used());
  std::byte* bytes = nullptr;
  if (Status s = carve_local(memory, [&](Bump& bump) { bytes = bump.take<std::byte>(slice * lanes); }); !s.ok()) return s;
  deal(executor, lanes, tasks, [&](int lane, index_t task) {
    Bump bump(bytes + slice * lane);
    f(carve(bump), task);
  });
  return {};
}

// Lists of a rule (Lists::select, kept per thread), then attend(Local&): Local holds them as `lists`.
template <class Compiled, class Local, class Rule, class Attend>
Status select_and_attend(const Operand& q, const Kv& kv, const Result& out, const Rule& rule,
                         const AttentionOptions& options, const Attend& attend) {
  if (Status s = check_call(tidy_operand(q), tidy_kv(kv), tidy_operand(out), options); !s.ok()) return s;
  return with_memory<Local>([&](Local& local) -> Status {
    if (Status s = local.lists.template select<Compiled>(q, kv, rule, options); !s.ok()) return s;
    return attend(local);
  });
}
template <class Compiled, class Lists, class Rule>
Status attend_to_selected(const Operand& q, const Kv& kv, const Result& out, const Rule& rule,
                          const AttentionOptions& options) {
  struct Chosen : LocalBytes {
    Lists lists;
  };
  return select_and_attend<Compiled, Chosen>(q, kv, out, rule, options, [&](const Chosen& chosen) {
    return sparse<Compiled>(q, kv, {&chosen.lists.lists(), 1}, out, options);
  });
}

// counts[n] becomes the sum of the counts before n; one more entry holds the total.
inline index_t counts_to_begins(index_t* counts, index_t lists) {
  index_t total = 0;
  for (index_t n = 0; n <= lists; ++n) {
    const index_t count = n < lists ? counts[n] : 0;
    counts[n] = total;
    total += count;
  }
  return total;
}

}   // namespace door
}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
