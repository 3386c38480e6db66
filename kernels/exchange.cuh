// What kernels that write into each other's memory share: stores and loads of
// system scope, the word that means "nothing here yet", a bounded wait, the
// count of exchanges on the device, and where in a region each part lies.
#ifndef LOCKSTEP_KERNELS_EXCHANGE_CUH_
#define LOCKSTEP_KERNELS_EXCHANGE_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/all_reduce.h"
#include "kernels/peers.h"

namespace lockstep::kernels {

// Relaxed: each 32-bit word says by itself whether it has arrived.
__device__ __forceinline__ uint4 LoadSystem(const uint4* from) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}
__device__ __forceinline__ void StoreSystem(uint4* to, uint4 v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}
// Two 64-bit halves, each of which arrives whole.
__device__ __forceinline__ ulonglong2 LoadSystem(const ulonglong2* from) {
  ulonglong2 v;
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];"
               : "=l"(v.x), "=l"(v.y)
               : "l"(from)
               : "memory");
  return v;
}
__device__ __forceinline__ void StoreSystem(ulonglong2* to, ulonglong2 v) {
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(v.x), "l"(v.y)
               : "memory");
}

// All ones is a NaN, and a pair of NaNs, in every element type: rare enough to
// be replaced by another one, and then free to mean "nothing has arrived".
inline constexpr uint32_t kNothingYet = 0xFFFFFFFFu;
inline constexpr uint32_t kOtherNan = 0x7FFF7FFFu;

__device__ __forceinline__ uint4 NothingYet() {
  return make_uint4(kNothingYet, kNothingYet, kNothingYet, kNothingYet);
}
__device__ __forceinline__ bool Arrived(uint4 v) {
  return v.x != kNothingYet && v.y != kNothingYet && v.z != kNothingYet && v.w != kNothingYet;
}
__device__ __forceinline__ uint4 Sendable(uint4 v) {
  v.x = v.x == kNothingYet ? kOtherNan : v.x;
  v.y = v.y == kNothingYet ? kOtherNan : v.y;
  v.z = v.z == kNothingYet ? kOtherNan : v.z;
  v.w = v.w == kNothingYet ? kOtherNan : v.w;
  return v;
}

// How long this thread has been waiting. Looks at the clock every 256 tries.
class Patience {
 public:
  __device__ bool Over(uint64_t limit_ns) {
    if ((++tries_ & 255u) != 0) return false;
    uint64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    if (tries_ == 256) since_ns_ = now;
    return now - since_ns_ > limit_ns;
  }

 private:
  uint32_t tries_ = 0;
  uint64_t since_ns_ = 0;
};

// Says what was missing, whole words at once, and ends the kernel and its context.
[[noreturn]] __device__ inline void GiveUp(PeerFault* fault, PeerWait code, uint32_t exchange,
                                           int rank) {
  if (fault != nullptr) {
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(fault),
                 "r"(static_cast<uint32_t>(code)), "r"(exchange), "r"(rank), "r"(blockIdx.x)
                 : "memory");
    __threadfence_system();
  }
  __trap();
  __builtin_unreachable();
}

// Counts exchanges without an atomic's answer: the blocks of one launch add up
// to 2^16, so as long as one of them has not counted, the upper bits stay.
// Every thread reads it after WaitForPrevious; a block counts once all have.
inline constexpr int kMaxExchangeBlocks = 1 << 15;

__device__ __forceinline__ uint64_t ExchangeNumber(const uint64_t* counter) {
  uint64_t v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(counter) : "memory");
  return v >> 16;
}
// All threads of the block.
__device__ __forceinline__ void CountExchange(uint64_t* counter) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  const uint64_t share = blockIdx.x == 0 ? (1u << 16) - (gridDim.x - 1) : 1;
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(counter), "l"(share) : "memory");
}

// The parts of a region, in bytes from layout.offset. Each part is two slots.
struct RegionParts {
  static constexpr size_t kCounterStride = 256;
  static constexpr size_t kOneShotCounter = 0;
  static constexpr size_t kTwoShotCounter = kCounterStride;
  static constexpr size_t kGatherCounter = 2 * kCounterStride;
  static constexpr size_t kCounterBytes = 4 * kCounterStride;

  size_t one_shot, one_shot_source;  // [2][source][one_shot_source]
  size_t scatter, scatter_source;    // [2][source][scatter_source]
  size_t sums, sums_slot;            // [2][sums_slot]
  size_t gather, gather_source;      // [2][source][gather_source]
  size_t end;
};

constexpr size_t RoundUpTo(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

constexpr RegionParts PartsOf(const ExchangeLayout& layout, int size) {
  RegionParts parts{};
  parts.one_shot = RegionParts::kCounterBytes;
  parts.one_shot_source = RoundUpTo(layout.one_shot_bytes, 256);
  parts.scatter = parts.one_shot + 2 * size * parts.one_shot_source;
  // A tile whose stretches do not come out even takes up to one stretch more a rank.
  parts.scatter_source = RoundUpTo(layout.two_shot_bytes / size * 9 / 8, 256);
  parts.sums = parts.scatter + 2 * size * parts.scatter_source;
  parts.sums_slot = RoundUpTo(layout.two_shot_bytes, 256);
  parts.gather = parts.sums + 2 * parts.sums_slot;
  parts.gather_source = RoundUpTo(2 * layout.gather_bytes, 256);
  parts.end = parts.gather + 2 * size * parts.gather_source;
  return parts;
}

// For InitAllReduce.
cudaError_t LoadAllReduceKernels();

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_EXCHANGE_CUH_
