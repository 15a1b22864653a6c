// SPDX-License-Identifier: Apache-2.0
// The one translation unit that carries Catch2's runner (2.x) or calls it (3.x).
#if __has_include(<catch2/catch_session.hpp>)
#include <catch2/catch_session.hpp>
#else
#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>
#endif

int main(int argc, char** argv) { return Catch::Session().run(argc, argv); }
