// SPDX-License-Identifier: Apache-2.0
// Catch2 3.x or 2.13, whichever is installed. Tests are written in the words of 3.x: Catch::Approx,
// Catch::Matchers::ContainsSubstring; what 2.13 calls differently is named here.
#pragma once
#if __has_include(<catch2/catch_test_macros.hpp>)
#include <catch2/catch_approx.hpp>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/catch_tostring.hpp>
#include <catch2/generators/catch_generators_all.hpp>
#include <catch2/matchers/catch_matchers_all.hpp>
#else
#include <string>

#include <catch2/catch.hpp>
namespace Catch {
using Detail::Approx;
namespace Matchers {
inline auto ContainsSubstring(const std::string& words, CaseSensitive::Choice sensitivity = CaseSensitive::Yes) {
  return Contains(words, sensitivity);
}
}   // namespace Matchers
}   // namespace Catch
#endif
