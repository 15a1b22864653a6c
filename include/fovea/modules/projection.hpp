// SPDX-License-Identifier: Apache-2.0
// What layers share of their projections: the check of a stored matrix, and the rows of tokens times it, dealt to lanes.
#pragma once
#include "../core/status.hpp"
#include "../core/workspace.hpp"
#include "../engine/deal.hpp"
#include "../simd/project.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// What project_task can read where it lies. Its extents are the layer's to check.
inline Status check_weight_format(const char* layer, const char* name, const Operand& w) {
  if (is_weight_format(w.format) && (w.stride[3] == 1 || w.extent[3] <= 1)) return {};
  return Status::error(Code::unsupported,
                       "fovea: %s: %s is %s with innermost stride %td; weights are f32, bf16 or f16 with stride 1", layer, name,
                       static_cast<int>(w.format) < kFormats ? name_of(w.format) : "no format", w.stride[3]);
}

// rows times the matrix: read(token, d, count, to) gives numbers of a row, write(token, n, count, from) takes them.
// memory.scratch: memory.lane_bytes for each lane, of carve_project(.., tokens) or more.
template <class Memory, class Read, class Write>
void project_tokens(const Executor& executor, const Memory& memory, index_t tokens, const Operand& weights, const Read& read,
                    const Write& write) {
  const StoredMatrix matrix = matrix_of(weights);
  deal(executor, executor.lanes(), project_tasks(tokens, matrix.rows), [&](int lane, index_t task) {
    Bump bump(memory.scratch + memory.lane_bytes * static_cast<std::size_t>(lane));
    project_task(task, tokens, matrix, Weights::by_output, carve_project(bump, tokens), read, write);
  });
}

// Token t of x [batch, 1, len, number] is position t % len of entry t / len. x must outlive what is returned.
inline auto read_tokens(const Operand& x, index_t len) {
  return [&x, len](index_t token, index_t d, index_t count, float* to) {
    const index_t at = token / len * x.stride[0] + token % len * x.stride[2] + d * x.stride[3];
    read_strided(x.format, x.data + at * row_bytes(x.format, 1), x.stride[3], count, to);
  };
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
