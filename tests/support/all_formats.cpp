// SPDX-License-Identifier: Apache-2.0
#include "all_formats.hpp"

namespace test {

fovea::Status attend_all(const fovea::Operand& q, const fovea::Kv& kv, const fovea::Result& out,
                         const fovea::AttentionOptions& options) {
  return fovea::attention<fovea::AllFormats>(q, kv, out, options);
}

fovea::Status attend_all(const fovea::Plan& plan, const fovea::Operand& q, const fovea::Kv& kv, const fovea::Result& out,
                         const fovea::AttentionOptions& options) {
  return fovea::attention<fovea::AllFormats>(plan, q, kv, out, options);
}

fovea::Status cascade_all(const fovea::Operand& q, std::span<const fovea::CascadeLevel> levels, const fovea::Result& out,
                          const fovea::AttentionOptions& options) {
  return fovea::cascade_attention<fovea::AllFormats>(q, levels, out, options);
}

fovea::Status cascade_all(const fovea::CascadePlan& plan, const fovea::Operand& q,
                          std::span<const fovea::CascadeLevel> levels, const fovea::Result& out,
                          const fovea::AttentionOptions& options) {
  return fovea::cascade_attention<fovea::AllFormats>(plan, q, levels, out, options);
}

}   // namespace test
