// SPDX-License-Identifier: Apache-2.0
// The one translation unit that carries Catch2's runner (2.x) or calls it (3.x).
#if __has_include(<catch2/catch_session.hpp>)
#include <catch2/catch_session.hpp>
#else
#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>
#endif

int main(int argc, char** argv) {
  Catch::Session session;
#if defined(CATCH_VERSION_MAJOR) && CATCH_VERSION_MAJOR < 3
  // A filter that matches no test case passes with 2.x unless told otherwise; 3.x fails by itself.
  session.configData().warnings = Catch::WarnAbout::NoTests;
#endif
  return session.run(argc, argv);
}
