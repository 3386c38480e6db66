// The words of an all-reduce that is folded into its neighbours (kernels/gemv.h).
// As in the all-reduce (kernels/exchange.cuh), each word is its own flag: neither
// fences nor 16-byte atomicity are needed.
#ifndef LOCKSTEP_KERNELS_EXCHANGE_WORDS_CUH_
#define LOCKSTEP_KERNELS_EXCHANGE_WORDS_CUH_

#include "kernels/exchange.cuh"
#include "kernels/gemv_elements.cuh"
#include "kernels/gemv_plan.h"

namespace lockstep::kernels {

inline constexpr int kExchangeSlots = 4;

struct ExchangeWords {
  uint4* base[kMaxPeers];   // of each rank, slot 0
  int rank, size, vectors;  // a row's 16-byte vectors
  WaitLimits limits;
  CollectiveClock* clock;  // null: waits are not counted
};

inline ExchangeWords MakeExchangeWords(const GemvExchange& exchange) {
  ExchangeWords words = {};
  for (int r = 0; r < exchange.peers.size; ++r)
    words.base[r] = reinterpret_cast<uint4*>(exchange.peers.base[r] + exchange.offset);
  words.rank = exchange.peers.rank;
  words.size = exchange.peers.size;
  words.vectors = exchange.width / 8;
  words.limits = LimitsOf(exchange.peers);
  words.clock = exchange.peers.size > 1 ? exchange.peers.clock : nullptr;
  return words;
}

// Vector v of what `sender` put into the slot of `number`.
__device__ __forceinline__ int64_t ExchangeIndex(const ExchangeWords& e, uint32_t number,
                                                 int sender, int v) {
  const int slot = static_cast<int>(number % kExchangeSlots);
  return static_cast<int64_t>(slot * e.size + sender) * e.vectors + v;
}

// To the turn-th rank after one's own; 0: to oneself, which is the last.
__device__ __forceinline__ void PushWords(const ExchangeWords& e, uint32_t number, int turn, int v,
                                          uint4 words) {
  const int to = (e.rank + 1 + turn) % e.size;
  StoreSystem(e.base[to] + ExchangeIndex(e, number, e.rank, v), Sendable(words));
}

// Waits for vectors first, first + stride, ... below `end`, N at most, of every rank
// and adds each up in rank order. Of a group that is given up, whatever is there. There are
// kRanks ranks at most. Of a whole warp, which goes on together: lanes that went on one by
// one would be far slower from there on.
//
// One thread of the grid, that has vector 0, counts the wait: a rank pushes to itself too,
// and last, so its own words among its own tell when it had sent. The rest of a transfer is
// hidden behind the weights.
template <typename T, int N, int kRanks = kMaxPeers>
__device__ __forceinline__ void SumsOfRanks(const ExchangeWords& e, uint32_t number, int first,
                                            int stride, int end, float (&sums)[N][8]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int k = 0; k < 8; ++k) sums[i][k] = 0.0f;
  }
  const uint4* const from = e.base[e.rank] + ExchangeIndex(e, number, 0, 0);
  uint4 words[N][kRanks];
  PeerWaiter waiter(e.limits, PeerWait::kPushedPartial, number);
  const bool counts = kRanks > 1 && e.clock != nullptr && blockIdx.x == 0 && first == 0;
  uint64_t sent_ns = 0;  // 0: not seen before the look that sees all
  for (;;) {
    int missing = -1;
    uint32_t own = kNothingYet;
    if (counts) own = LoadSystem(from + e.rank * e.vectors).x;
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
      for (int r = 0; r < kRanks; ++r) {
        const int v = first + i * stride;
        if (r < e.size && v < end) words[i][r] = LoadSystem(from + r * e.vectors + v);
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
      for (int r = 0; r < kRanks; ++r) {
        if (r < e.size && first + i * stride < end && !Arrived(words[i][r])) missing = r;
      }
    }
    if (own != kNothingYet && missing >= 0 && sent_ns == 0) sent_ns = DeviceClockNs();
    missing = __reduce_max_sync(~0u, missing);
    if (missing < 0 || __any_sync(~0u, waiter.Over(missing))) break;
  }
  if (sent_ns != 0) AddTo(&e.clock->wait_ns, sent_ns, DeviceClockNs());
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (first + i * stride >= end) break;
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      if (r >= e.size) break;
      float f[8];
      UnpackVector<T>(words[i][r], f);
#pragma unroll
      for (int k = 0; k < 8; ++k) sums[i][k] += f[k];
    }
  }
}

// The grid together; call it once this exchange has been read. Nobody reads the slot
// any more, since the kernel that did ended before this rank pushed; and nobody
// writes it before having read what this rank pushes next.
__device__ __forceinline__ void ClearPreviousSlot(const ExchangeWords& e, uint32_t number) {
  uint4* slot = e.base[e.rank] + ExchangeIndex(e, number + kExchangeSlots - 1, 0, 0);
  constexpr int threads = kGemvThreads;
  for (int i = blockIdx.x * threads + threadIdx.x; i < e.size * e.vectors;
       i += threads * static_cast<int>(gridDim.x))
    StoreSystem(slot + i, NothingYet());
}

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_EXCHANGE_WORDS_CUH_
