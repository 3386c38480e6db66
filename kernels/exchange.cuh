// What kernels that write into each other's memory share: stores and loads of
// system scope, the word that means "nothing here yet", a bounded wait, the
// count of exchanges on the device, and where in a region each part lies.
#ifndef LOCKSTEP_KERNELS_EXCHANGE_CUH_
#define LOCKSTEP_KERNELS_EXCHANGE_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels/all_reduce.h"
#include "kernels/peers.h"
#include "kernels/relaxed_words.cuh"

namespace lockstep::kernels {

LOCKSTEP_RELAXED_WORDS(LoadSystem, StoreSystem, "sys")
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
__device__ __forceinline__ bool Arrived(uint2 v) {
  return v.x != kNothingYet && v.y != kNothingYet;
}
__device__ __forceinline__ bool Arrived(uint32_t v) { return v != kNothingYet; }
__device__ __forceinline__ uint32_t Sendable(uint32_t v) {
  return v == kNothingYet ? kOtherNan : v;
}
__device__ __forceinline__ uint2 Sendable(uint2 v) {
  return make_uint2(Sendable(v.x), Sendable(v.y));
}
__device__ __forceinline__ uint4 Sendable(uint4 v) {
  return make_uint4(Sendable(v.x), Sendable(v.y), Sendable(v.z), Sendable(v.w));
}

// What bounds a thread's wait for a word of a peer.
struct WaitLimits {
  PeerFault* fault;
  const uint32_t* abort;
  uint32_t* aborted;
  uint64_t patience_ns;
};

inline WaitLimits LimitsOf(const Peers& peers) {
  return {peers.fault, peers.abort, peers.aborted, peers.patience_ns};
}

// Says what was missing, in one store, and ends the kernel and its context.
[[noreturn]] __device__ inline void GiveUp(PeerFault* fault, PeerWait code, uint32_t exchange,
                                           int rank) {
  if (fault != nullptr) {
    StoreSystem(reinterpret_cast<uint4*>(fault),
                make_uint4(static_cast<uint32_t>(code), exchange, rank, blockIdx.x));
    __threadfence_system();
  }
  __trap();
  __builtin_unreachable();
}

class PeerWaiter {
 public:
  __device__ PeerWaiter(const WaitLimits& limits, PeerWait code, uint64_t exchange)
      : limits_(limits), code_(code), exchange_(static_cast<uint32_t>(exchange)) {}

  // After a try in vain. True: the group is given up, stop waiting. Does not
  // return once patience has ended.
  __device__ bool Over(int missing) {
    if ((++tries_ & 255u) != 0) return false;
    since_ns_ = Look(limits_, code_, exchange_, missing, tries_, since_ns_);
    return since_ns_ == 0;
  }

 private:
  // Since when this thread has been waiting, or 0: no longer. Out of line, and its
  // state by value, so that the loop around it stays in registers.
  __device__ __noinline__ static uint64_t Look(const WaitLimits& limits, PeerWait code,
                                               uint32_t exchange, int missing, uint32_t tries,
                                               uint64_t since_ns) {
    if (limits.abort != nullptr) {
      if (LoadSystem(limits.aborted) != 0) return 0;
      // Far away: a read by every warp of a full device takes milliseconds, in which
      // nothing else comes through. The threads of the grid take turns.
      const uint32_t turn = (tries >> 8) ^ (blockIdx.x * blockDim.x + threadIdx.x);
      if (turn % 2048 == 0 && LoadSystem(limits.abort) != 0) {
        *limits.aborted = 1;
        return 0;
      }
    }
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (since_ns == 0) return now;
    if (now - since_ns > limits.patience_ns) GiveUp(limits.fault, code, exchange, missing);
    return since_ns;
  }

  const WaitLimits& limits_;
  const PeerWait code_;
  const uint32_t exchange_;
  uint32_t tries_ = 0;
  uint64_t since_ns_ = 0;
};

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

// Of one thread of a launch. Without an answer, so that nothing waits for it.
__device__ __forceinline__ void AddTo(uint64_t* sum_ns, uint64_t begin_ns, uint64_t end_ns) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(sum_ns), "l"(end_ns - begin_ns)
               : "memory");
}

// The parts of a region, in bytes from layout.offset. Each part is two slots.
struct RegionParts {
  static constexpr size_t kCounterStride = 256;
  static constexpr size_t kOneShotCounter = 0;
  static constexpr size_t kTwoShotCounter = kCounterStride;
  static constexpr size_t kGatherCounter = 2 * kCounterStride;
  static constexpr size_t kNoCounter = 3 * kCounterStride;  // counted, never read
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
  const size_t one_shot =
      layout.one_shot_bytes > layout.pushed_bytes ? layout.one_shot_bytes : layout.pushed_bytes;
  parts.one_shot_source = RoundUpTo(one_shot, 256);
  parts.scatter = parts.one_shot + 2 * size * parts.one_shot_source;
  // Stretches that do not come out even leave gaps, many if they are few.
  const size_t share = layout.two_shot_bytes / size;
  const bool even = (size & (size - 1)) == 0;
  parts.scatter_source = RoundUpTo(even ? share * 5 / 4 : share * 2, 256);
  parts.sums = parts.scatter + 2 * size * parts.scatter_source;
  parts.sums_slot = RoundUpTo(layout.two_shot_bytes, 256);
  parts.gather = parts.sums + 2 * parts.sums_slot;
  parts.gather_source = RoundUpTo(2 * layout.gather_bytes, 256);
  parts.end = parts.gather + 2 * size * parts.gather_source;
  return parts;
}

// For InitAllReduce.
cudaError_t LoadAllReduceKernels();

// A row further on in an array of void; a null pointer stays one.
template <typename Pointer>
Pointer Advance(Pointer p, size_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const std::byte,
                                  std::byte>;
  return p == nullptr ? nullptr : static_cast<Byte*>(p) + bytes;
}

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_EXCHANGE_CUH_
