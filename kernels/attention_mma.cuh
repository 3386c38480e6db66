// Warp-level pieces that the tensor-core attention kernels share: m16n8k16
// products, fragments of KV elements, exponentials.
#ifndef LOCKSTEP_KERNELS_ATTENTION_MMA_CUH_
#define LOCKSTEP_KERNELS_ATTENTION_MMA_CUH_

#include <cstdint>

#include "kernels/device.cuh"
#include "kernels/vector.cuh"

namespace lockstep::kernels {

__device__ __forceinline__ float Exp2(float v) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
}

// d += a (16x16, row) * b (16x8, col), M the element type.
template <typename M>
__device__ __forceinline__ void Mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void Mma<__nv_bfloat16>(float (&d)[4], uint32_t a0, uint32_t a1,
                                                   uint32_t a2, uint32_t a3, uint32_t b0,
                                                   uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void Mma<__half>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                            uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The transpose of an 8x8 matrix of 16-bit elements spread over the warp.
__device__ __forceinline__ uint32_t Transpose8x8(uint32_t v) {
  uint32_t out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(v));
  return out;
}

// Eight cached elements as they lie in memory, and as four pairs for the tensor
// cores. e4m3 becomes f16 exactly.
template <typename KV>
struct Chunk {
  using Raw = uint4;
  using M = KV;
  __device__ static __forceinline__ uint4 Widen(const Raw& raw) { return raw; }
};
template <>
struct Chunk<__nv_fp8_e4m3> {
  using Raw = uint2;
  using M = __half;
  __device__ static __forceinline__ uint4 Widen(const Raw& raw) {
    uint4 wide;
    HalvesOfE4M3(raw.x, wide.x, wide.y);
    HalvesOfE4M3(raw.y, wide.z, wide.w);
    return wide;
  }
};

// A lane's chunks of a row that `lanes` lanes share: as many together as one access of 16 bytes
// takes, which of e4m3 are two where a lane has two. The order of a row's elements among the
// lanes is free, since both operands of a product have it.
template <typename KV, int N>
inline constexpr int kTogether = N == 1 ? 1
                                        : 16 / static_cast<int>(sizeof(typename Chunk<KV>::Raw));
// The j-th of the N chunks of the i-th lane.
template <typename KV, int N>
__device__ __forceinline__ int ChunkOf(int i, int lanes, int j) {
  constexpr int kMost = kTogether<KV, N>;
  return kMost * (i + lanes * (j / kMost)) + j % kMost;
}
// All N of them; past the row's end its last access again. kGlobal: from the cache, past the L1.
template <typename KV, bool kGlobal, int N>
__device__ __forceinline__ void LoadChunks(const typename Chunk<KV>::Raw* row, int row_chunks,
                                           int i, int lanes, typename Chunk<KV>::Raw (&to)[N]) {
  constexpr int kMost = kTogether<KV, N>;
#pragma unroll
  for (int j = 0; j < N; j += kMost) {
    const auto* from = row + min(ChunkOf<KV, N>(i, lanes, j), row_chunks - kMost);
    if constexpr (kMost == 1) {
      to[j] = kGlobal ? __ldcg(from) : *from;
    } else {
      const uint4* both = reinterpret_cast<const uint4*>(from);
      const uint4 two = kGlobal ? __ldcg(both) : *both;
      to[j] = {two.x, two.y};
      to[j + 1] = {two.z, two.w};
    }
  }
}

// Elements `pair` * 2 and * 2 + 1 of a widened chunk; pair a constant.
__device__ __forceinline__ uint32_t Word(const uint4& v, int pair) {
  return pair == 0 ? v.x : pair == 1 ? v.y : pair == 2 ? v.z : v.w;
}

// Element `e` (a constant) of two chunks as one pair.
__device__ __forceinline__ uint32_t Interleave(const uint4& a, const uint4& b, int e) {
  return __byte_perm(Word(a, e / 2), Word(b, e / 2), e % 2 == 0 ? 0x5410 : 0x7632);
}

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_ATTENTION_MMA_CUH_
