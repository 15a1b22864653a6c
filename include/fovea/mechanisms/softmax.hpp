// SPDX-License-Identifier: Apache-2.0
// Softmax attention (Vaswani et al. 2017, arXiv 1706.03762) in the online form of FlashAttention (Dao et al. 2022, arXiv
// 2205.14135):  out_i = sum_j softmax_j(scale q_i . k_j) v_j, with GQA, bands, stored masks, softcap, ALiBi and sinks.
// Two instantiations of the engine serve every option: scores used as they are, and scores modified.
#pragma once
#include "../call/run.hpp"
#include "../engine/tile_strip.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

struct SoftmaxLanes {
  template <class PanelType>
  static void lane(AttentionRun& run, int lane) {
    if (run.modified()) {
      tile_lane<PanelType>(run, lane, TileSpec{run.source, run.score, run.mask, run.norm, NoTap{}, run.epilogue});
    } else {
      tile_lane<PanelType>(run, lane, TileSpec{run.source, Identity{}, run.mask.first, run.norm, NoTap{}, run.epilogue});
    }
  }
};

// weights[n] = exp(s - lse) for the given rows, key by key; zeros where masked and beyond the sequence.
inline void softmax_weights(const AttentionRun& run, std::span<const Row> rows, const float* lse, const StripMemory& memory,
                            const std::array<float*, kStripRows>& to, index_t to_stride, index_t to_count) {
  std::size_t n = 0;
  run_strip(*run.plan, run.queries, run.source, run.score, run.mask, rows, memory,
            [&](const Row& row, std::span<float> scores) {
              GivenLse{}.weights(scores, lse[n]);
              const index_t len_k = run.plan->sequences[static_cast<std::size_t>(row.sequence)].len_k;
              for (index_t j = 0; j < to_count; ++j)
                to[n][j * to_stride] = j < len_k ? scores[static_cast<std::size_t>(j)] : 0.f;
              ++n;
            });
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
