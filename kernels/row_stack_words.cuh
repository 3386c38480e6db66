// How blocks of one kernel hand each other results: words in device memory, each its own
// flag, as between GPUs (kernels/exchange.cuh). Who reads waits for the words themselves.
#ifndef LOCKSTEP_KERNELS_ROW_STACK_WORDS_CUH_
#define LOCKSTEP_KERNELS_ROW_STACK_WORDS_CUH_

#include "kernels/device.cuh"
#include "kernels/exchange_words.cuh"
#include "kernels/relaxed_words.cuh"
#include "kernels/row_stack_plan.h"

namespace lockstep::kernels::stack {

// All threads that compute.
__device__ __forceinline__ void SyncThreads() { NamedSync(1, kThreads); }

LOCKSTEP_RELAXED_WORDS(LoadWords, StoreWords, "gpu")

// Waits for vectors first, first + stride, ..., N of them but none beyond `last`, which takes
// their place. All at once: an answer takes a microsecond when much else is under way. Of a
// whole warp, and until all of it has what it waits for: lanes that went on one by one would
// be far slower from there on.
template <int N>
__device__ __forceinline__ void AwaitWords(const ExchangeWords& e, uint32_t number,
                                           const uint4* from, int first, int stride, int last,
                                           uint4 (&words)[N]) {
  PeerWaiter waiter(e.limits, PeerWait::kOwnBlocks, number);
  for (;;) {
    bool missing = false;
#pragma unroll
    for (int i = 0; i < N; ++i) words[i] = LoadWords(from + min(first + i * stride, last));
#pragma unroll
    for (int i = 0; i < N; ++i) missing |= !Arrived(words[i]);
    if (!__any_sync(~0u, missing) || __any_sync(~0u, waiter.Over(e.rank))) break;
  }
}

// The grid together: `bytes`, a multiple of 16, are as if nothing had arrived again.
__device__ __forceinline__ void ClearWords(const Params& p, void* words, int bytes) {
#pragma unroll 1
  for (int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
       i < bytes / 16; i += p.blocks * kThreads)
    StoreWords(static_cast<uint4*>(words) + i, NothingYet());
}

}  // namespace lockstep::kernels::stack

#endif  // LOCKSTEP_KERNELS_ROW_STACK_WORDS_CUH_
