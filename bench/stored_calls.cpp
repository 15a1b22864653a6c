// SPDX-License-Identifier: Apache-2.0
#include "support/stored_calls.hpp"

namespace fovea_bench {

using fovea::Format;
using Measured =
    fovea::Formats<Format::f32, Format::bf16, Format::f16, Format::i8_token, Format::i8_channel, Format::i4_g32,
                   Format::i4_g64, Format::i4_g32_zero, Format::i4_g64_zero, Format::e4m3, Format::e5m2, Format::latent_fp8>;

fovea::Status stored_attention(const fovea::Plan& plan, const fovea::Operand& q, const fovea::Kv& kv,
                               const fovea::Result& out, const fovea::AttentionOptions& options) {
  return fovea::attention<Measured>(plan, q, kv, out, options);
}

fovea::Status stored_cascade(const fovea::Operand& q, std::span<const fovea::CascadeLevel> levels, const fovea::Result& out,
                             const fovea::AttentionOptions& options) {
  return fovea::cascade_attention<Measured>(q, levels, out, options);
}

}   // namespace fovea_bench
