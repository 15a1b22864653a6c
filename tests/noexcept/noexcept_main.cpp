// SPDX-License-Identifier: Apache-2.0
// The library without exceptions and without RTTI: one right call, one refused one.
#include <cstring>

#include "../consumers/one_call.hpp"

#if defined(__cpp_exceptions) || defined(__GXX_RTTI)
#error "this program is about -fno-exceptions -fno-rtti"
#endif

int main() {
  if (one_call("noexcept") != 0) return 1;

  float q[3 * 8] = {}, k[2 * 8] = {}, v[2 * 8] = {}, out[3 * 8] = {};
  const fovea::Status status =
      fovea::attention(fovea::bhsd<const float>(q, 1, 3, 1, 8), fovea::bhsd<const float>(k, 1, 2, 1, 8),
                       fovea::bhsd<const float>(v, 1, 2, 1, 8), fovea::bhsd(out, 1, 3, 1, 8));
  const bool named = std::strchr(status.message(), '3') != nullptr && std::strchr(status.message(), '2') != nullptr;
  std::printf("noexcept: 3 query heads on 2 kv heads: %s\n", status.message());
  return !status.ok() && named ? 0 : 1;
}
