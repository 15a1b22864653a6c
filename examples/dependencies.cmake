# SPDX-License-Identifier: Apache-2.0
# What examples/generate and its tests need beyond the library's own dependencies: a package of this machine first, a pinned
# download second.
include(FetchContent)

function(fovea_provide_json)
  if(TARGET nlohmann_json::nlohmann_json)
    return()
  endif()
  find_package(nlohmann_json 3.9 CONFIG QUIET)
  if(NOT TARGET nlohmann_json::nlohmann_json)
    message(STATUS "fovea: no package nlohmann_json on this machine, fetching v3.11.2")
    FetchContent_Declare(json GIT_REPOSITORY https://github.com/nlohmann/json.git GIT_TAG v3.11.2 GIT_SHALLOW TRUE)
    FetchContent_MakeAvailable(json)
  endif()
endfunction()

function(fovea_provide_cli11)
  if(TARGET CLI11::CLI11)
    return()
  endif()
  find_package(CLI11 2.1 CONFIG QUIET)
  if(NOT TARGET CLI11::CLI11)
    message(STATUS "fovea: no package CLI11 on this machine, fetching v2.3.2")
    FetchContent_Declare(cli11 GIT_REPOSITORY https://github.com/CLIUtils/CLI11.git GIT_TAG v2.3.2 GIT_SHALLOW TRUE)
    FetchContent_MakeAvailable(cli11)
  endif()
endfunction()
