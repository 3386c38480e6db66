// What the products of skinny_cluster.cuh ask of Hopper: warpgroup products of 64 rows
// of weights with 16, 32 or 64 rows of x.
#ifndef LOCKSTEP_KERNELS_SKINNY_CLUSTER_MMA_CUH_
#define LOCKSTEP_KERNELS_SKINNY_CLUSTER_MMA_CUH_

#include <cuda_fp8.h>

#include <cstdint>

#include "kernels/box_copy.cuh"
#include "kernels/cluster.cuh"
#include "kernels/device.cuh"
#include "kernels/wgmma.cuh"

namespace lockstep::kernels {

// Rows of 128 bytes, of which the copy engine has swizzled the 16-byte parts; eight of
// them to 1,024 aligned bytes. The summed dimension is the contiguous one.
// `at`: the low half of such a matrix's descriptor, its address in 16 bytes; what is
// added to one moves the matrix. The high half is the same for all.
__device__ __forceinline__ uint32_t MatrixAt(const void* p) {
  return SharedAddress(p) >> 4 | 1u << 16;
}
__device__ __forceinline__ uint64_t MatrixDescriptor(uint32_t at) {
  return uint64_t{1024 >> 4 | 1u << 30} << 32 | at;
}

#define LOCKSTEP_SUMS8(d, i)                                                                  \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define LOCKSTEP_NAMES8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LOCKSTEP_NAMES16 LOCKSTEP_NAMES8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LOCKSTEP_NAMES32                                                     \
  LOCKSTEP_NAMES16                                                           \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, " \
  "%30, %31"
// tail: of the types that may lie transposed, that they do not.
#define LOCKSTEP_PRODUCT16(shape, types, tail)                                       \
  asm volatile(                                                                      \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"                                   \
      "wgmma.mma_async.sync.aligned.m64n16" shape ".f32." types " {" LOCKSTEP_NAMES8 \
      "}, %8, %9, p, 1, 1" tail ";\n}"                                               \
      : LOCKSTEP_SUMS8(d, 0)                                                         \
      : "l"(a), "l"(b), "r"(add))
#define LOCKSTEP_PRODUCT32(shape, types, tail)                                        \
  asm volatile(                                                                       \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"                                    \
      "wgmma.mma_async.sync.aligned.m64n32" shape ".f32." types " {" LOCKSTEP_NAMES16 \
      "}, %16, %17, p, 1, 1" tail ";\n}"                                              \
      : LOCKSTEP_SUMS8(d, 0), LOCKSTEP_SUMS8(d, 8)                                    \
      : "l"(a), "l"(b), "r"(add))
#define LOCKSTEP_PRODUCT64(shape, types, tail)                                                   \
  asm volatile(                                                                                  \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                               \
      "wgmma.mma_async.sync.aligned.m64n64" shape ".f32." types " {" LOCKSTEP_NAMES32            \
      "}, %32, %33, p, 1, 1" tail ";\n}"                                                         \
      : LOCKSTEP_SUMS8(d, 0), LOCKSTEP_SUMS8(d, 8), LOCKSTEP_SUMS8(d, 16), LOCKSTEP_SUMS8(d, 24) \
      : "l"(a), "l"(b), "r"(add))
#define LOCKSTEP_PRODUCT_OF(N)                             \
  if constexpr (std::is_same_v<W, __half>) {               \
    LOCKSTEP_PRODUCT##N("k16", "f16.f16", ", 0, 0");       \
  } else if constexpr (std::is_same_v<W, __nv_bfloat16>) { \
    LOCKSTEP_PRODUCT##N("k16", "bf16.bf16", ", 0, 0");     \
  } else {                                                 \
    LOCKSTEP_PRODUCT##N("k32", "e4m3.e4m3", "");           \
  }

// d [64][rows] = a [64][32 bytes] . b [rows][32 bytes]^T, + d where `add`.
template <typename W>
__device__ __forceinline__ void Product(float (&d)[8], uint64_t a, uint64_t b, int add) {
  LOCKSTEP_PRODUCT_OF(16)
}
template <typename W>
__device__ __forceinline__ void Product(float (&d)[16], uint64_t a, uint64_t b, int add) {
  LOCKSTEP_PRODUCT_OF(32)
}
template <typename W>
__device__ __forceinline__ void Product(float (&d)[32], uint64_t a, uint64_t b, int add) {
  LOCKSTEP_PRODUCT_OF(64)
}

#undef LOCKSTEP_SUMS8
#undef LOCKSTEP_NAMES8
#undef LOCKSTEP_NAMES16
#undef LOCKSTEP_NAMES32
#undef LOCKSTEP_PRODUCT16
#undef LOCKSTEP_PRODUCT32
#undef LOCKSTEP_PRODUCT64
#undef LOCKSTEP_PRODUCT_OF

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_SKINNY_CLUSTER_MMA_CUH_
