# SPDX-License-Identifier: Apache-2.0
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(fovea_config_dir "${CMAKE_INSTALL_DATADIR}/cmake/fovea")

install(DIRECTORY include/fovea DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}" FILES_MATCHING PATTERN "*.hpp")
install(TARGETS fovea EXPORT fovea-targets INCLUDES DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(EXPORT fovea-targets NAMESPACE fovea:: DESTINATION "${fovea_config_dir}")

configure_package_config_file(cmake/fovea-config.cmake.in "${CMAKE_CURRENT_BINARY_DIR}/fovea-config.cmake"
                              INSTALL_DESTINATION "${fovea_config_dir}")
# Headers only: one installation serves every word size. Before 1.0 a new minor version may break its users.
write_basic_package_version_file("${CMAKE_CURRENT_BINARY_DIR}/fovea-config-version.cmake"
                                 COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/fovea-config.cmake" "${CMAKE_CURRENT_BINARY_DIR}/fovea-config-version.cmake"
              cmake/xsimd.cmake
        DESTINATION "${fovea_config_dir}")
install(FILES LICENSE DESTINATION "${CMAKE_INSTALL_DATADIR}/doc/fovea")
