# SPDX-License-Identifier: Apache-2.0
# Builds and runs the consumer project WAY in the folder SCRATCH, which is emptied first.
set(consumer "${FOVEA_SOURCE_DIR}/tests/consumers/${WAY}")
file(REMOVE_RECURSE "${SCRATCH}")
file(MAKE_DIRECTORY "${SCRATCH}")

function(run)
  list(JOIN ARGN " " line)
  message(STATUS "${line}")
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "consumer ${WAY}: ended with ${result}: ${line}")
  endif()
endfunction()

if(WAY STREQUAL "plain_include")
  list(TRANSFORM XSIMD_DIRECTORIES PREPEND "-I")
  run("${CXX}" -std=c++20 -O1 "-I${FOVEA_SOURCE_DIR}/include" ${XSIMD_DIRECTORIES} "${consumer}/main.cpp"
      -o "${SCRATCH}/consumer")
  run("${SCRATCH}/consumer")
else()
  if(WAY STREQUAL "find_package")
    run("${CMAKE_COMMAND}" --install "${FOVEA_BINARY_DIR}" --prefix "${SCRATCH}/prefix")
  endif()
  run("${CMAKE_COMMAND}" -S "${consumer}" -B "${SCRATCH}/build" -G "${GENERATOR}" -D "CMAKE_CXX_COMPILER=${CXX}"
      -D CMAKE_BUILD_TYPE=Release -D "CMAKE_CXX_FLAGS_RELEASE=-O1" -D "CMAKE_PREFIX_PATH=${SCRATCH}/prefix"
      -D "FOVEA_SOURCE_DIR=${FOVEA_SOURCE_DIR}")
  run("${CMAKE_COMMAND}" --build "${SCRATCH}/build")
  run("${SCRATCH}/build/consumer")
  if(WAY STREQUAL "find_package")
    # Before 1.0 another minor version is another interface: asking for it must fail.
    file(WRITE "${SCRATCH}/newer/CMakeLists.txt"
         "cmake_minimum_required(VERSION 3.22)\nproject(newer LANGUAGES CXX)\nfind_package(fovea 99.0 CONFIG REQUIRED)\n")
    execute_process(COMMAND "${CMAKE_COMMAND}" -S "${SCRATCH}/newer" -B "${SCRATCH}/newer/build" -G "${GENERATOR}"
                            -D "CMAKE_CXX_COMPILER=${CXX}" -D "CMAKE_PREFIX_PATH=${SCRATCH}/prefix"
                    RESULT_VARIABLE result OUTPUT_QUIET ERROR_VARIABLE printed)
    if(result EQUAL 0 OR NOT printed MATCHES "version: ${FOVEA_VERSION}")
      message(FATAL_ERROR "find_package(fovea 99.0) must be refused with the installed version; got ${result}: ${printed}")
    endif()
    message(STATUS "find_package(fovea 99.0) was refused, as it must be")
  endif()
endif()
