# The CUDA toolkit: the system's, or the one deploy/setup --cuda put beside the builds.
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(CMAKE_CUDA_COMPILER nvcc HINTS ${CMAKE_SOURCE_DIR}/build/cuda-toolkit/bin /usr/local/cuda/bin)
endif()
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  message(FATAL_ERROR "LOCKSTEP_CUDA=ON, but no nvcc was found: run deploy/setup --cuda")
endif()
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 90a)
endif()
enable_language(CUDA)
# CMake 3.25 does not know which dialects this nvcc speaks.
set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
set(CMAKE_CUDA_STANDARD 20)
find_package(CUDAToolkit 13.0 REQUIRED)

# One function per kind of CUDA target, as in lockstep.cmake:
#   lockstep_cuda_library(NAME n HDRS ... SRCS ... DEPS ...)
#   lockstep_gpu_test(NAME n SRCS ... DEPS ...)        built everywhere; tests/gpu/run runs it
#   lockstep_gpu_benchmark(NAME n SRCS ... DEPS ...)
# The runtime is linked statically: a test is one file to carry to a GPU machine.
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_FLAGS_DEV "-O2 -lineinfo")
set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -lineinfo")
# The host half is hardened as the rest is, but for _FORTIFY_SOURCE: its inline wrappers
# would reach the device half, and launchers call nothing that it checks.
string(APPEND CMAKE_CUDA_FLAGS " -Xcompiler=-fcf-protection,-fstack-protector-strong")

function(_lockstep_own_cuda target)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra --expt-relaxed-constexpr -Wno-deprecated-gpu-targets>
    $<$<AND:$<BOOL:${LOCKSTEP_WERROR}>,$<COMPILE_LANGUAGE:CUDA>>:-Werror=all-warnings>)
  target_include_directories(${target} PUBLIC ${CMAKE_SOURCE_DIR})
endfunction()

function(lockstep_cuda_library)
  cmake_parse_arguments(A "" "NAME" "HDRS;SRCS;DEPS" ${ARGN})
  _lockstep_deps(deps ${A_DEPS})
  add_library(lockstep_${A_NAME} STATIC ${A_SRCS} ${A_HDRS})
  target_link_libraries(lockstep_${A_NAME} PUBLIC ${deps} CUDA::cudart_static)
  _lockstep_own_cuda(lockstep_${A_NAME})
  add_library(lockstep::${A_NAME} ALIAS lockstep_${A_NAME})
endfunction()

function(lockstep_gpu_test)
  cmake_parse_arguments(A "" "NAME" "SRCS;DEPS" ${ARGN})
  _lockstep_deps(deps ${A_DEPS})
  add_executable(lockstep_${A_NAME} ${A_SRCS})
  target_link_libraries(lockstep_${A_NAME} PRIVATE ${deps} GTest::gmock GTest::gtest_main CUDA::cudart_static)
  _lockstep_own_cuda(lockstep_${A_NAME})
  target_compile_definitions(lockstep_${A_NAME} PRIVATE LOCKSTEP_SOURCE_DIR="${CMAKE_SOURCE_DIR}")
  set_target_properties(lockstep_${A_NAME} PROPERTIES OUTPUT_NAME ${A_NAME}
                        RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/gpu-tests)
endfunction()

function(lockstep_gpu_benchmark)
  cmake_parse_arguments(A "" "NAME" "SRCS;DEPS" ${ARGN})
  _lockstep_deps(deps ${A_DEPS})
  add_executable(lockstep_${A_NAME} ${A_SRCS})
  target_link_libraries(lockstep_${A_NAME} PRIVATE ${deps} CUDA::cudart_static)
  _lockstep_own_cuda(lockstep_${A_NAME})
  set_target_properties(lockstep_${A_NAME} PROPERTIES OUTPUT_NAME ${A_NAME}
                        RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bench)
endfunction()
