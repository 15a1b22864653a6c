// SPDX-License-Identifier: Apache-2.0
#include "fovea/core/status.hpp"

#include <string>

#include "catch_compat.hpp"
#include "fovea/core/types.hpp"

using fovea::Code;
using fovea::Status;

TEST_CASE("a fresh status is ok and says nothing", "[status]") {
  const Status status;
  CHECK(status.ok());
  CHECK(status.code() == Code::ok);
  CHECK(std::string(status.message()).empty());
  status.or_throw();
}

TEST_CASE("an error carries its numbers", "[status]") {
  const Status status =
      Status::error(Code::invalid_argument, "%td query heads on %td", fovea::index_t{6}, fovea::index_t{4});
  CHECK_FALSE(status.ok());
  CHECK(status.code() == Code::invalid_argument);
  CHECK(std::string(status.message()) == "6 query heads on 4");
}

TEST_CASE("a message without numbers is not a format", "[status]") {
  CHECK(std::string(Status::error(Code::unsupported, "100% wrong").message()) == "100% wrong");
}

TEST_CASE("a long message is cut and ends", "[status]") {
  const std::string text(1000, 'x');
  const std::string got = Status::error(Code::unsupported, "%s", text.c_str()).message();
  CHECK(got.size() < 300);
  CHECK(got.size() > 200);
  CHECK(got == text.substr(0, got.size()));
}

TEST_CASE("or_throw throws the message", "[status]") {
  CHECK_THROWS_WITH(Status::error(Code::unsupported, "dim %d", 577).or_throw(), "dim 577");
}
