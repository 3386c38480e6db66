// Bulk copies from device to shared memory and the barriers that count their bytes
// (sm_90 and later; before, nothing may call them), with waits that end in a trap instead
// of a hang.
#ifndef LOCKSTEP_KERNELS_BULK_COPY_CUH_
#define LOCKSTEP_KERNELS_BULK_COPY_CUH_

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>

namespace lockstep::kernels {

__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ uint64_t GlobalTimerNs() {
  uint64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

// Counts the rounds of a wait and looks at the clock now and then.
class Patience {
 public:
  __device__ __forceinline__ explicit Patience(uint64_t limit_ns) : limit_ns_(limit_ns) {}
  // To be asked once a round.
  __device__ __forceinline__ bool Exhausted() {
    if ((++rounds_ & 1023u) != 0) return false;
    const uint64_t now = GlobalTimerNs();
    if (start_ == 0) start_ = now;
    return now - start_ > limit_ns_;
  }

 private:
  uint64_t limit_ns_;
  uint64_t start_ = 0;
  uint32_t rounds_ = 0;
};

// A block-local barrier waits for this grid's own work and, behind it, for the
// kernels ahead: longer than any of them has patience with a peer.
inline constexpr uint64_t kBarrierPatienceNs = 120'000'000'000;

__device__ __noinline__ inline void TrapAtBarrier(const char* what) {
  printf("lockstep: block %d thread %d: nothing arrived at %s\n", static_cast<int>(blockIdx.x),
         static_cast<int>(threadIdx.x), what);
  __trap();
}

__device__ __forceinline__ void BarrierInit(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)),
               "r"(arrivals)
               : "memory");
}
// Makes initialised barriers known to the copy engine and to the cluster.
__device__ __forceinline__ void FenceBarrierInit() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void BarrierArrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier)) : "memory");
}
__device__ __forceinline__ void BarrierArriveExpecting(uint64_t* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
#endif
}
#define LOCKSTEP_BARRIER_PASSED(done, wait, barrier, parity) \
  asm volatile(                                              \
      "{\n.reg .pred p;\n"                                   \
      "mbarrier." wait                                       \
      ".parity.shared::cta.b64 p, [%1], %2;\n"               \
      "selp.u32 %0, 1, 0, p;\n}"                             \
      : "=r"(done)                                           \
      : "r"(SharedAddress(barrier)), "r"(parity)             \
      : "memory")
__device__ __forceinline__ bool BarrierTry(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 1;
#if __CUDA_ARCH__ >= 900
  LOCKSTEP_BARRIER_PASSED(done, "try_wait", barrier, parity);
#endif
  return done != 0;
}
// The same without BarrierTry's pause where the answer is no: for who has other things to do.
__device__ __forceinline__ bool BarrierTest(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 1;
#if __CUDA_ARCH__ >= 900
  LOCKSTEP_BARRIER_PASSED(done, "test_wait", barrier, parity);
#endif
  return done != 0;
}
#undef LOCKSTEP_BARRIER_PASSED
__device__ __forceinline__ void BarrierWait(uint64_t* barrier, uint32_t parity, const char* what) {
  if (BarrierTry(barrier, parity)) return;
  Patience patience(kBarrierPatienceNs);
  while (!BarrierTry(barrier, parity)) {
    if (patience.Exhausted()) TrapAtBarrier(what);
  }
}

// BarrierWait, but it traps without a word: a call of any function (printf) costs
// registers, and makes the compiler wait for every single wgmma.
__device__ __forceinline__ void AwaitBarrier(uint64_t* barrier, uint32_t parity) {
  Patience patience(kBarrierPatienceNs);
  while (!BarrierTry(barrier, parity)) {
    if (patience.Exhausted()) __trap();
  }
}

// Of a thread that has read what a copy is to overwrite, before it says so: copies are not in
// the order of a thread's reads, and do overtake those that are under way.
__device__ __forceinline__ void FenceReadsBeforeCopies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Of one thread; addresses and bytes are multiples of 16.
__device__ __forceinline__ void BulkCopy(void* to, const void* from, uint32_t bytes,
                                         uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(SharedAddress(to)),
      "l"(from), "r"(bytes), "r"(SharedAddress(barrier))
      : "memory");
#endif
}

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_BULK_COPY_CUH_
