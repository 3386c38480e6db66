// Hopper's warpgroup products, as the prefill kernel uses them: shared memory in rows of 128
// bytes, swizzled by the copy engine (16-byte chunk ch of row t lies at ch ^ (t % 8)), eight rows
// to 1,024 aligned bytes.
#ifndef LOCKSTEP_KERNELS_ATTENTION_WGMMA_CUH_
#define LOCKSTEP_KERNELS_ATTENTION_WGMMA_CUH_

#include <cstdint>
#include <type_traits>

#include "kernels/box_copy.cuh"
#include "kernels/bulk_copy.cuh"
#include "kernels/device.cuh"
#include "kernels/wgmma.cuh"

namespace lockstep::kernels {

// Waits for the phase of that parity to end. A wait that never ends is a bug of
// the kernel: it stops with an error rather than hang the device.
__device__ __forceinline__ void Await(uint64_t* barrier, int parity) {
  for (int tries = 0; tries < (1 << 26); ++tries) {
    if (BarrierTry(barrier, static_cast<uint32_t>(parity))) return;
  }
  __trap();
}

// A matrix in swizzled 128-byte rows. leading: bytes from one 64 elements of the
// contiguous dimension to the next, where a product spans several and that
// dimension is not the summed one.
__device__ __forceinline__ uint64_t SwizzledMatrix(uint32_t address, uint32_t leading) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) |
         static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(1024 >> 4) << 32 |
         static_cast<uint64_t>(1) << 62;
}

#define LOCKSTEP_R8(d, i)                                                                     \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define LOCKSTEP_R32(d, i) \
  LOCKSTEP_R8(d, i), LOCKSTEP_R8(d, i + 8), LOCKSTEP_R8(d, i + 16), LOCKSTEP_R8(d, i + 24)
#define LOCKSTEP_NAMES32                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LOCKSTEP_NAMES64                                                                    \
  LOCKSTEP_NAMES32                                                                          \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d [64, n] (+)= a [64, 16] * b [n, 16]^T, both in shared memory, the summed
// dimension contiguous.
#define LOCKSTEP_SCORE_PRODUCT64(type)                                                  \
  asm volatile(                                                                         \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                      \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" LOCKSTEP_NAMES32 \
      "}, %32, %33, p, 1, 1, 0, 0;\n}"                                                  \
      : LOCKSTEP_R32(d, 0)                                                              \
      : "l"(a), "l"(b), "r"(add))
#define LOCKSTEP_SCORE_PRODUCT128(type)                                                  \
  asm volatile(                                                                          \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                       \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" LOCKSTEP_NAMES64 \
      "}, %64, %65, p, 1, 1, 0, 0;\n}"                                                   \
      : LOCKSTEP_R32(d, 0), LOCKSTEP_R32(d, 32)                                          \
      : "l"(a), "l"(b), "r"(add))
// d [64, n] += a [64, 16] in registers * b [16, n] in shared memory, n contiguous.
#define LOCKSTEP_OUTPUT_PRODUCT128(type)                                                 \
  asm volatile(                                                                          \
      "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                                         \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" LOCKSTEP_NAMES64 \
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"                                     \
      : LOCKSTEP_R32(d, 0), LOCKSTEP_R32(d, 32)                                          \
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b))
#define LOCKSTEP_OUTPUT_PRODUCT64(type)                                                 \
  asm volatile(                                                                         \
      "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                                        \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" LOCKSTEP_NAMES32 \
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"                                    \
      : LOCKSTEP_R32(d, 0)                                                              \
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b))

template <typename M>
__device__ __forceinline__ void ScoreProduct(float (&d)[32], uint64_t a, uint64_t b, int add) {
  if constexpr (std::is_same_v<M, __half>) {
    LOCKSTEP_SCORE_PRODUCT64("f16");
  } else {
    LOCKSTEP_SCORE_PRODUCT64("bf16");
  }
}
template <typename M>
__device__ __forceinline__ void ScoreProduct(float (&d)[64], uint64_t a, uint64_t b, int add) {
  if constexpr (std::is_same_v<M, __half>) {
    LOCKSTEP_SCORE_PRODUCT128("f16");
  } else {
    LOCKSTEP_SCORE_PRODUCT128("bf16");
  }
}

// The matrix b [16, n] starts at `address`, 64 columns `panel_bytes` after the
// 64 before them.
template <typename M>
__device__ __forceinline__ void OutputProduct(float (&d)[32], uint32_t a0, uint32_t a1, uint32_t a2,
                                              uint32_t a3, uint32_t address, uint32_t panel_bytes) {
  const uint64_t b = SwizzledMatrix(address, panel_bytes);
  if constexpr (std::is_same_v<M, __half>) {
    LOCKSTEP_OUTPUT_PRODUCT64("f16");
  } else {
    LOCKSTEP_OUTPUT_PRODUCT64("bf16");
  }
}
template <typename M>
__device__ __forceinline__ void OutputProduct(float (&d)[64], uint32_t a0, uint32_t a1, uint32_t a2,
                                              uint32_t a3, uint32_t address, uint32_t panel_bytes) {
  const uint64_t b = SwizzledMatrix(address, panel_bytes);
  if constexpr (std::is_same_v<M, __half>) {
    LOCKSTEP_OUTPUT_PRODUCT128("f16");
  } else {
    LOCKSTEP_OUTPUT_PRODUCT128("bf16");
  }
}
template <typename M>
__device__ __forceinline__ void OutputProduct(float (&d)[128], uint32_t a0, uint32_t a1,
                                              uint32_t a2, uint32_t a3, uint32_t address,
                                              uint32_t panel_bytes) {
  OutputProduct<M>(*reinterpret_cast<float(*)[64]>(&d[0]), a0, a1, a2, a3, address, panel_bytes);
  OutputProduct<M>(*reinterpret_cast<float(*)[64]>(&d[64]), a0, a1, a2, a3,
                   address + 2 * panel_bytes, panel_bytes);
}

#undef LOCKSTEP_R8
#undef LOCKSTEP_R32
#undef LOCKSTEP_NAMES32
#undef LOCKSTEP_NAMES64
#undef LOCKSTEP_SCORE_PRODUCT64
#undef LOCKSTEP_SCORE_PRODUCT128
#undef LOCKSTEP_OUTPUT_PRODUCT128
#undef LOCKSTEP_OUTPUT_PRODUCT64

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_ATTENTION_WGMMA_CUH_
