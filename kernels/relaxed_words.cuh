// Loads and stores of 4, 8 and 16 bytes of device memory that others store to or load from
// meanwhile: blocks of one kernel ("gpu") or GPUs ("sys"). Relaxed: each 32-bit word says by
// itself whether it has arrived.
#ifndef LOCKSTEP_KERNELS_RELAXED_WORDS_CUH_
#define LOCKSTEP_KERNELS_RELAXED_WORDS_CUH_

#include <cuda_runtime.h>

#include <cstdint>

// Defines the functions Load(from) and Store(to, v) for uint32_t, uint2 and uint4.
#define LOCKSTEP_RELAXED_WORDS(Load, Store, scope)                                                 \
  __device__ __forceinline__ uint32_t Load(const uint32_t* from) {                                 \
    uint32_t v;                                                                                    \
    asm volatile("ld.relaxed." scope ".global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");    \
    return v;                                                                                      \
  }                                                                                                \
  __device__ __forceinline__ uint2 Load(const uint2* from) {                                       \
    uint2 v;                                                                                       \
    asm volatile("ld.relaxed." scope ".global.v2.u32 {%0, %1}, [%2];"                              \
                 : "=r"(v.x), "=r"(v.y)                                                            \
                 : "l"(from)                                                                       \
                 : "memory");                                                                      \
    return v;                                                                                      \
  }                                                                                                \
  __device__ __forceinline__ uint4 Load(const uint4* from) {                                       \
    uint4 v;                                                                                       \
    asm volatile("ld.relaxed." scope ".global.v4.u32 {%0, %1, %2, %3}, [%4];"                      \
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)                                      \
                 : "l"(from)                                                                       \
                 : "memory");                                                                      \
    return v;                                                                                      \
  }                                                                                                \
  __device__ __forceinline__ void Store(uint32_t* to, uint32_t v) {                                \
    asm volatile("st.relaxed." scope ".global.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory");        \
  }                                                                                                \
  __device__ __forceinline__ void Store(uint2* to, uint2 v) {                                      \
    asm volatile("st.relaxed." scope ".global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(v.x),         \
                 "r"(v.y)                                                                          \
                 : "memory");                                                                      \
  }                                                                                                \
  __device__ __forceinline__ void Store(uint4* to, uint4 v) {                                      \
    asm volatile("st.relaxed." scope ".global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), \
                 "r"(v.y), "r"(v.z), "r"(v.w)                                                      \
                 : "memory");                                                                      \
  }

#endif  // LOCKSTEP_KERNELS_RELAXED_WORDS_CUH_
