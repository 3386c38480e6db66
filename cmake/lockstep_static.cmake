# LOCKSTEP_STATIC: the programs carry the libraries they use, so that one file runs on
# any host whose C library is as new as that of the host it was built on. What stays
# dynamic is the C library, and what is opened by name (the driver, NCCL, gloo).
#
# Distributions describe their libraries to CMake as shared ones and put an archive
# beside most of them: every imported target is pointed at its archive, here or where
# deploy/setup --static makes those that Debian has not. tests/deploy/hardening_test.py
# reads what the programs still load.
set(LOCKSTEP_ARCHIVES ${CMAKE_SOURCE_DIR}/build/archives CACHE PATH "Where deploy/setup --static put archives")
if(NOT EXISTS ${LOCKSTEP_ARCHIVES}/libprometheus-cpp-core.a)
  message(FATAL_ERROR "LOCKSTEP_STATIC=ON, but ${LOCKSTEP_ARCHIVES} has no libprometheus-cpp-core.a: run deploy/setup --static")
endif()
find_package(OpenSSL REQUIRED)
find_package(fmt REQUIRED)

# The logging library is compiled in where it is used: it has no archive, and needs none.
add_library(lockstep_spdlog INTERFACE)
target_compile_definitions(lockstep_spdlog INTERFACE SPDLOG_FMT_EXTERNAL)
target_link_libraries(lockstep_spdlog INTERFACE fmt::fmt-header-only)
set(LOCKSTEP_SPDLOG spdlog)

get_property(lockstep_imported DIRECTORY PROPERTY IMPORTED_TARGETS)
foreach(target IN LISTS lockstep_imported)
  get_target_property(type ${target} TYPE)
  if(NOT type MATCHES "^(SHARED|UNKNOWN)_LIBRARY$")
    continue()
  endif()
  foreach(property IMPORTED_LOCATION IMPORTED_LOCATION_NONE IMPORTED_LOCATION_RELEASE
                   IMPORTED_LOCATION_RELWITHDEBINFO)
    get_target_property(location ${target} ${property})
    if(NOT location MATCHES "^(.*/)(lib[^/]+)\\.so[.0-9]*$")
      continue()
    endif()
    foreach(archive ${LOCKSTEP_ARCHIVES}/${CMAKE_MATCH_2}.a ${CMAKE_MATCH_1}${CMAKE_MATCH_2}.a)
      if(EXISTS ${archive})
        set_target_properties(${target} PROPERTIES ${property} ${archive})
        break()
      endif()
    endforeach()
  endforeach()
endforeach()
# Found through pkg-config, this one is a bare -lre2 of whichever kind the linker prefers.
find_library(LOCKSTEP_RE2_ARCHIVE libre2.a REQUIRED)
set_target_properties(re2::re2 PROPERTIES INTERFACE_LINK_LIBRARIES ${LOCKSTEP_RE2_ARCHIVE})
# An archive's folder is no place to look for libraries at run time.
set(CMAKE_SKIP_BUILD_RPATH ON)
# The plug-in for gloo shares its libraries with the gloo that it loads.
add_link_options(-Wl,--as-needed
  $<$<STREQUAL:$<TARGET_PROPERTY:TYPE>,EXECUTABLE>:-static-libstdc++>
  $<$<STREQUAL:$<TARGET_PROPERTY:TYPE>,EXECUTABLE>:-static-libgcc>)
