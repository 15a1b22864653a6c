// SPDX-License-Identifier: Apache-2.0
// A folder on disk that goes with its owner.
#pragma once
#include <cstdlib>
#include <filesystem>
#include <string>

#include "catch_compat.hpp"

namespace test {

class TemporaryFolder {
 public:
  TemporaryFolder() {
    // mkdtemp fills in the last six letters.
    std::string name = (std::filesystem::temp_directory_path() / ("fovea_" + std::string(6, 'X'))).string();
    REQUIRE(mkdtemp(name.data()) != nullptr);
    path_ = name;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}   // namespace test
