# SPDX-License-Identifier: Apache-2.0
# Where other libraries come from: a package of this machine first, a pinned download second. The library itself needs xsimd;
# Eigen, Catch2, Google Benchmark, nlohmann-json and CLI11 serve the tests, benches and examples only.
# -D FETCHCONTENT_SOURCE_DIR_XSIMD=... (EIGEN, CATCH2, BENCHMARK, JSON, CLI11) builds from a copy that is already on disk.
include(FetchContent)
include("${CMAKE_CURRENT_LIST_DIR}/xsimd.cmake")

# Header-only packages are only unpacked: SOURCE_SUBDIR names a folder without a CMakeLists.txt, because Eigen's own would
# add its BLAS, documentation and several hundred test targets.
macro(fovea_unpack name repository tag)
  message(STATUS "fovea: no package ${name} on this machine, fetching ${tag} from ${repository}")
  FetchContent_Declare(${name} GIT_REPOSITORY ${repository} GIT_TAG ${tag} GIT_SHALLOW TRUE SOURCE_SUBDIR unpack-only)
  FetchContent_MakeAvailable(${name})
endmacro()

function(fovea_provide_xsimd)
  if(TARGET fovea_xsimd)
    return()
  endif()
  fovea_find_xsimd(fovea_xsimd)
  if(NOT TARGET fovea_xsimd)
    fovea_unpack(xsimd https://github.com/xtensor-stack/xsimd.git 8.1.0)
    fovea_xsimd_target(fovea_xsimd "${xsimd_SOURCE_DIR}/include")
  endif()
endfunction()

# A macro: catch_discover_tests must be defined where the tests are.
macro(fovea_provide_catch)
  find_package(Catch2 CONFIG QUIET)
  if(NOT TARGET Catch2::Catch2)
    message(STATUS "fovea: no package Catch2 on this machine, fetching v3.5.4")
    FetchContent_Declare(Catch2 GIT_REPOSITORY https://github.com/catchorg/Catch2.git GIT_TAG v3.5.4 GIT_SHALLOW TRUE)
    FetchContent_MakeAvailable(Catch2)
    # Catch2 3.x keeps its CMake modules in extras/, 2.x in contrib/.
    list(APPEND CMAKE_MODULE_PATH "${catch2_SOURCE_DIR}/extras" "${catch2_SOURCE_DIR}/contrib")
  endif()
  include(Catch)
endmacro()

function(fovea_provide_benchmark)
  find_package(benchmark CONFIG QUIET)
  if(NOT TARGET benchmark::benchmark)
    message(STATUS "fovea: no package benchmark on this machine, fetching v1.7.1")
    set(BENCHMARK_ENABLE_TESTING OFF CACHE BOOL "" FORCE)
    set(BENCHMARK_ENABLE_INSTALL OFF CACHE BOOL "" FORCE)
    set(BENCHMARK_ENABLE_WERROR OFF CACHE BOOL "" FORCE)
    FetchContent_Declare(benchmark GIT_REPOSITORY https://github.com/google/benchmark.git GIT_TAG v1.7.1 GIT_SHALLOW TRUE)
    FetchContent_MakeAvailable(benchmark)
  endif()
endfunction()

# A header-only library under the target name its own package would give it; a further argument is the include folder.
macro(fovea_header_only target name repository tag)
  if(NOT TARGET ${target})
    fovea_unpack(${name} ${repository} ${tag})
    add_library(fovea_${name} INTERFACE)
    add_library(${target} ALIAS fovea_${name})
    target_include_directories(fovea_${name} SYSTEM INTERFACE "${${name}_SOURCE_DIR}/${ARGN}")
  endif()
endmacro()

function(fovea_provide_eigen)
  # The version is not asked of find_package: a version file of Eigen 5 refuses every major version but its own.
  find_package(Eigen3 CONFIG QUIET)
  if(Eigen3_VERSION AND Eigen3_VERSION VERSION_LESS 3.4)
    message(FATAL_ERROR "fovea: Eigen ${Eigen3_VERSION} in ${Eigen3_DIR} is too old, 3.4 or newer is needed")
  endif()
  fovea_header_only(Eigen3::Eigen eigen https://gitlab.com/libeigen/eigen.git 3.4.0)
endfunction()

function(fovea_provide_json)
  find_package(nlohmann_json 3.9 CONFIG QUIET)
  fovea_header_only(nlohmann_json::nlohmann_json json https://github.com/nlohmann/json.git v3.11.2 include)
endfunction()

function(fovea_provide_cli11)
  find_package(CLI11 2.1 CONFIG QUIET)
  fovea_header_only(CLI11::CLI11 cli11 https://github.com/CLIUtils/CLI11.git v2.1.2 include)
endfunction()
