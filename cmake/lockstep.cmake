# How Lockstep's targets are declared: one function per kind of target, so that
# a directory's CMakeLists.txt is a list of names, sources and dependencies.
#
#   lockstep_cc_library(NAME n SRCS ... DEPS ...)     target lockstep_n, alias lockstep::n
#   lockstep_cc_binary(NAME n OUTPUT o SRCS ... DEPS ...)
#   lockstep_cc_test(NAME n SRCS ... DEPS ... [LABELS ...] [DATA ...] [TIMEOUT s])
#   lockstep_cc_benchmark(NAME n SRCS ... DEPS ...)
#   lockstep_fuzz_target(NAME n DEPS ...)             n_fuzz.cc, and corpus/n as its test
#   lockstep_proto_library(NAME n PROTOS ...)         generated code, warnings off
#   lockstep_rust_library(NAME n CRATE dir ARCHIVE a SRCS ...)  static library through cargo
#
# DEPS name our own libraries bare (model, wire) or any CMake target in full.

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)

# "Dev": optimised enough to serve the demo model, quick to compile, line
# numbers in traces, assertions on (they stay on in Release as well).
set(CMAKE_CXX_FLAGS_DEV "-O1 -g1")
set(CMAKE_C_FLAGS_DEV "-O1 -g1")
set(CMAKE_CXX_FLAGS_RELEASE "-O2")
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Dev CACHE STRING "Dev, Release" FORCE)
endif()

find_program(LOCKSTEP_CCACHE ccache)
if(LOCKSTEP_CCACHE)
  # Paths relative to the source tree: a second clone or build folder hits too.
  set(launcher ${CMAKE_COMMAND} -E env CCACHE_BASEDIR=${CMAKE_SOURCE_DIR} CCACHE_NOHASHDIR=1
               CCACHE_SLOPPINESS=time_macros,include_file_mtime,include_file_ctime ${LOCKSTEP_CCACHE})
  set(CMAKE_C_COMPILER_LAUNCHER ${launcher})
  set(CMAKE_CXX_COMPILER_LAUNCHER ${launcher})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${launcher})
endif()
find_program(LOCKSTEP_MOLD mold)
if(LOCKSTEP_MOLD)
  add_link_options(-fuse-ld=mold)
endif()

if(LOCKSTEP_SANITIZE STREQUAL "address")
  add_compile_options(-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer)
  add_link_options(-fsanitize=address,undefined)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # As two shared libraries, only one of them would heed log_path, by which
    # the integration tests learn of reports (clang links statically anyway).
    add_link_options(-static-libasan -static-libubsan)
  endif()
elseif(LOCKSTEP_SANITIZE STREQUAL "thread")
  add_compile_options(-fsanitize=thread -fno-omit-frame-pointer)
  add_link_options(-fsanitize=thread)
elseif(LOCKSTEP_SANITIZE)
  message(FATAL_ERROR "LOCKSTEP_SANITIZE=${LOCKSTEP_SANITIZE}: expected address, thread or nothing")
endif()
if(LOCKSTEP_FUZZ)
  if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "Clang" OR LOCKSTEP_SANITIZE)
    message(FATAL_ERROR "LOCKSTEP_FUZZ is libFuzzer with sanitizers of its own: "
            "configure with -DCMAKE_CXX_COMPILER=clang++-14 -DCMAKE_C_COMPILER=clang-14 and no LOCKSTEP_SANITIZE")
  endif()
  add_compile_options(-fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer)
  add_link_options(-fsanitize=address,undefined)
  # As tools/lint has it: clang 14 has coroutines and does not say so.
  add_compile_definitions(__cpp_impl_coroutine=201902L BOOST_ASIO_HAS_CO_AWAIT=1 BOOST_ASIO_HAS_STD_COROUTINE=1)
endif()
if(NOT LOCKSTEP_SANITIZE AND NOT LOCKSTEP_FUZZ)
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-U_FORTIFY_SOURCE> $<$<COMPILE_LANGUAGE:CXX>:-D_FORTIFY_SOURCE=2>)
endif()
add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fstack-protector-strong> $<$<COMPILE_LANGUAGE:CXX>:-fcf-protection>)
add_link_options(-Wl,-z,relro,-z,now)
# Fused multiply-adds are written where they are meant: results must not depend
# on what the optimiser happened to contract.
add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off>)

find_package(Threads REQUIRED)
find_package(absl REQUIRED)
find_package(Protobuf REQUIRED)
find_package(gRPC CONFIG REQUIRED)
find_package(nlohmann_json REQUIRED)
find_package(CLI11 REQUIRED)
find_package(spdlog REQUIRED)
find_package(prometheus-cpp CONFIG REQUIRED)
find_package(GTest CONFIG REQUIRED)
find_package(benchmark CONFIG REQUIRED)
find_package(Boost 1.74 REQUIRED)
find_library(LOCKSTEP_GLOO gloo REQUIRED)
set(LOCKSTEP_SPDLOG spdlog::spdlog)
if(LOCKSTEP_STATIC)
  include(lockstep_static)
endif()

function(_lockstep_deps out)
  set(result)
  foreach(dep IN LISTS ARGN)
    if(dep MATCHES "::|^-|^/")
      list(APPEND result ${dep})
    else()
      list(APPEND result lockstep_${dep})
    endif()
  endforeach()
  set(${out} ${result} PARENT_SCOPE)
endfunction()

# GCC 12 loses track of std::variant in instrumented code and warns where nothing is wrong.
function(_lockstep_own target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic -Wshadow -Wnon-virtual-dtor
                         $<$<BOOL:${LOCKSTEP_WERROR}>:-Werror>
                         $<$<NOT:$<STREQUAL:${LOCKSTEP_SANITIZE},>>:-Wno-maybe-uninitialized>)
  target_include_directories(${target} PUBLIC ${CMAKE_SOURCE_DIR})
endfunction()

function(lockstep_cc_library)
  cmake_parse_arguments(A "" "NAME" "HDRS;SRCS;DEPS" ${ARGN})
  _lockstep_deps(deps ${A_DEPS})
  if(A_SRCS)
    add_library(lockstep_${A_NAME} STATIC ${A_SRCS} ${A_HDRS})
    target_link_libraries(lockstep_${A_NAME} PUBLIC ${deps})
    _lockstep_own(lockstep_${A_NAME})
  else()
    add_library(lockstep_${A_NAME} INTERFACE)
    target_include_directories(lockstep_${A_NAME} INTERFACE ${CMAKE_SOURCE_DIR})
    target_link_libraries(lockstep_${A_NAME} INTERFACE ${deps})
  endif()
  add_library(lockstep::${A_NAME} ALIAS lockstep_${A_NAME})
endfunction()

function(lockstep_cc_binary)
  cmake_parse_arguments(A "" "NAME;OUTPUT" "SRCS;DEPS" ${ARGN})
  _lockstep_deps(deps ${A_DEPS})
  add_executable(lockstep_${A_NAME} ${A_SRCS})
  target_link_libraries(lockstep_${A_NAME} PRIVATE ${deps})
  _lockstep_own(lockstep_${A_NAME})
  set_target_properties(lockstep_${A_NAME} PROPERTIES OUTPUT_NAME ${A_OUTPUT}
                        RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
endfunction()

function(lockstep_cc_test)
  cmake_parse_arguments(A "" "NAME;TIMEOUT" "SRCS;DEPS;LABELS;DATA" ${ARGN})
  _lockstep_deps(deps ${A_DEPS})
  add_executable(lockstep_${A_NAME} ${A_SRCS})
  target_link_libraries(lockstep_${A_NAME} PRIVATE ${deps} GTest::gmock GTest::gtest_main)
  _lockstep_own(lockstep_${A_NAME})
  target_compile_definitions(lockstep_${A_NAME} PRIVATE
    LOCKSTEP_SOURCE_DIR="${CMAKE_SOURCE_DIR}" LOCKSTEP_BINARY_DIR="${CMAKE_BINARY_DIR}")
  set_target_properties(lockstep_${A_NAME} PROPERTIES OUTPUT_NAME ${A_NAME}
                        RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  add_test(NAME ${A_NAME} COMMAND lockstep_${A_NAME})
  if(NOT A_TIMEOUT)
    set(A_TIMEOUT 120)
  endif()
  set_tests_properties(${A_NAME} PROPERTIES LABELS "${A_LABELS}")
  lockstep_test_limits(${A_NAME} ${A_TIMEOUT})
endfunction()

# The seconds an ordinary build may take, and what a sanitizer's run time reads.
function(lockstep_test_limits name seconds)
  if(LOCKSTEP_SANITIZE)
    math(EXPR seconds "${seconds} * 5")
  endif()
  set_tests_properties(${name} PROPERTIES TIMEOUT ${seconds})
  if(LOCKSTEP_SANITIZE STREQUAL "thread")
    set_tests_properties(${name} PROPERTIES
      ENVIRONMENT "TSAN_OPTIONS=suppressions=${CMAKE_SOURCE_DIR}/tests/tsan.supp:history_size=7")
  endif()
endfunction()

function(lockstep_cc_benchmark)
  cmake_parse_arguments(A "" "NAME" "SRCS;DEPS" ${ARGN})
  lockstep_cc_binary(NAME ${A_NAME} OUTPUT ${A_NAME} SRCS ${A_SRCS} DEPS ${A_DEPS} benchmark::benchmark)
endfunction()

# A parser behind LLVMFuzzerTestOneInput: a libFuzzer program with LOCKSTEP_FUZZ,
# otherwise one that replays files. The test runs the committed corpus.
function(lockstep_fuzz_target)
  cmake_parse_arguments(A "" "NAME" "DEPS" ${ARGN})
  set(target lockstep_fuzz_target_${A_NAME})
  _lockstep_deps(deps fuzz_input ${A_DEPS})
  add_executable(${target} ${A_NAME}_fuzz.cc)
  if(LOCKSTEP_FUZZ)
    target_link_options(${target} PRIVATE -fsanitize=fuzzer)
    set(replay -runs=0)
  else()
    target_sources(${target} PRIVATE replay_main.cc)
    set(replay)
  endif()
  target_link_libraries(${target} PRIVATE ${deps})
  _lockstep_own(${target})
  target_compile_definitions(${target} PRIVATE LOCKSTEP_SOURCE_DIR="${CMAKE_SOURCE_DIR}")
  set_target_properties(${target} PROPERTIES OUTPUT_NAME ${A_NAME}
                        RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/fuzz)
  add_test(NAME fuzz_${A_NAME}
           COMMAND ${target} ${replay} ${CMAKE_CURRENT_SOURCE_DIR}/corpus/${A_NAME})
  set_tests_properties(fuzz_${A_NAME} PROPERTIES LABELS fuzz)
  lockstep_test_limits(fuzz_${A_NAME} 60)
endfunction()

# Generated code lives in one library, compiled once, warnings off.
function(lockstep_proto_library)
  cmake_parse_arguments(A "" "NAME" "PROTOS" ${ARGN})
  set(out ${CMAKE_BINARY_DIR}/gen)
  file(MAKE_DIRECTORY ${out})
  set(srcs)
  foreach(proto IN LISTS A_PROTOS)
    get_filename_component(stem ${proto} NAME_WE)
    file(RELATIVE_PATH rel ${CMAKE_SOURCE_DIR} ${CMAKE_CURRENT_SOURCE_DIR})
    set(base ${out}/${rel}/${stem})
    file(STRINGS ${proto} has_service REGEX "^service ")
    set(products ${base}.pb.cc ${base}.pb.h)
    set(grpc_args)
    if(has_service)
      list(APPEND products ${base}.grpc.pb.cc ${base}.grpc.pb.h)
      set(grpc_args --grpc_out=${out} --plugin=protoc-gen-grpc=$<TARGET_FILE:gRPC::grpc_cpp_plugin>)
    endif()
    add_custom_command(
      OUTPUT ${products}
      COMMAND protobuf::protoc -I ${CMAKE_SOURCE_DIR} --cpp_out=${out} ${grpc_args}
              ${CMAKE_CURRENT_SOURCE_DIR}/${proto}
      DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/${proto} VERBATIM)
    list(APPEND srcs ${products})
  endforeach()
  add_library(lockstep_${A_NAME} STATIC ${srcs})
  target_include_directories(lockstep_${A_NAME} SYSTEM PUBLIC ${out})
  target_compile_options(lockstep_${A_NAME} PRIVATE -w)
  target_link_libraries(lockstep_${A_NAME} PUBLIC gRPC::grpc++ protobuf::libprotobuf)
  add_library(lockstep::${A_NAME} ALIAS lockstep_${A_NAME})
endfunction()

# A Rust static library. Cargo decides what is stale; its target folder is shared
# by every preset, because it is the largest piece of a clean build.
function(lockstep_rust_library)
  cmake_parse_arguments(A "" "NAME;CRATE;ARCHIVE" "SRCS" ${ARGN})
  set(target_dir ${CMAKE_SOURCE_DIR}/build/cargo)
  set(archive ${target_dir}/release/${A_ARCHIVE})
  execute_process(COMMAND ${CMAKE_SOURCE_DIR}/deploy/find_rust
                  OUTPUT_VARIABLE rust OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE missing)
  if(missing)
    message(FATAL_ERROR "no cargo and rustc new enough for the text library: run deploy/setup")
  endif()
  string(REPLACE "\n" ";" rust "${rust}")
  list(GET rust 0 cargo)
  list(GET rust 1 rustc)
  add_custom_command(
    OUTPUT ${archive}
    COMMAND ${CMAKE_COMMAND} -E env CARGO_TARGET_DIR=${target_dir} RUSTC=${rustc}
            ${cargo} build --release --locked --quiet
    COMMAND ${CMAKE_COMMAND} -E touch ${archive}
    WORKING_DIRECTORY ${A_CRATE}
    DEPENDS ${A_SRCS} VERBATIM)
  add_custom_target(lockstep_${A_NAME}_cargo DEPENDS ${archive})
  add_library(lockstep_${A_NAME} STATIC IMPORTED GLOBAL)
  set_target_properties(lockstep_${A_NAME} PROPERTIES IMPORTED_LOCATION ${archive}
                        INTERFACE_LINK_LIBRARIES "Threads::Threads;dl;m")
  add_dependencies(lockstep_${A_NAME} lockstep_${A_NAME}_cargo)
endfunction()
