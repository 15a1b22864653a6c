// SPDX-License-Identifier: Apache-2.0
// Which keys a query may see under a causal mask, a window and a key length: always one run, so two numbers say it.
#pragma once
#include <algorithm>

#include "fovea/core/attention_options.hpp"

namespace fovea_baselines {

using fovea::index_t;

struct KeyRange {
  index_t begin = 0, end = 0;
};

// Positions are those of AttentionOptions; `stored_keys` is the extent of the K view.
class VisibleKeys {
 public:
  VisibleKeys(const fovea::AttentionOptions& options, index_t sequence, index_t len_q, index_t stored_keys)
      : causal_(options.causal != fovea::Causal::none), window_(options.window) {
    const auto at = static_cast<std::size_t>(sequence);
    len_k_ = options.len_k.empty() ? stored_keys : options.len_k[at];
    if (!options.q_offset.empty()) {
      q_offset_ = options.q_offset[at];
    } else if (options.causal == fovea::Causal::bottom_right) {
      q_offset_ = len_k_ - len_q;
    }
  }

  KeyRange of(index_t query) const {
    const index_t pos = query + q_offset_;
    KeyRange keys{0, len_k_};
    if (causal_) keys.end = std::min(keys.end, pos + 1);
    if (window_.right >= 0) keys.end = std::min(keys.end, pos + window_.right + 1);
    if (window_.left >= 0) keys.begin = std::max(keys.begin, pos - window_.left);
    keys.begin = std::min(keys.begin, len_k_);
    keys.end = std::max(keys.end, keys.begin);
    return keys;
  }

  index_t position(index_t query) const { return query + q_offset_; }
  index_t len_k() const { return len_k_; }

 private:
  bool causal_;
  fovea::Window window_;
  index_t len_k_ = 0, q_offset_ = 0;
};

}  // namespace fovea_baselines
