// The words of an all-reduce that is folded into its neighbours (kernels/gemv.h).
// A 32-bit word of all ones means "not arrived": no sender sends it, so each word
// is its own flag and neither fences nor 16-byte atomicity are needed.
#ifndef LOCKSTEP_KERNELS_EXCHANGE_WORDS_CUH_
#define LOCKSTEP_KERNELS_EXCHANGE_WORDS_CUH_

#include "kernels/bulk_copy.cuh"
#include "kernels/gemv_elements.cuh"

namespace lockstep::kernels {

inline constexpr int kExchangeSlots = 4;

struct ExchangeWords {
  uint4* base[kMaxPeers];   // of each rank, slot 0
  int rank, size, vectors;  // a row's 16-byte vectors
  uint32_t number;
  PeerFault* fault;
  uint64_t patience_ns;
};

inline ExchangeWords MakeExchangeWords(const GemvExchange& exchange, uint32_t number) {
  ExchangeWords words = {};
  for (int r = 0; r < exchange.peers.size; ++r)
    words.base[r] = reinterpret_cast<uint4*>(exchange.peers.base[r] + exchange.offset);
  words.rank = exchange.peers.rank;
  words.size = exchange.peers.size;
  words.vectors = exchange.width / 8;
  words.number = number;
  words.fault = exchange.peers.fault;
  words.patience_ns = exchange.peers.patience_ns;
  return words;
}

// Vector v of what `sender` put into the slot of `number`.
__device__ __forceinline__ int64_t ExchangeIndex(const ExchangeWords& e, uint32_t number,
                                                 int sender, int v) {
  const int slot = static_cast<int>(number % kExchangeSlots);
  return static_cast<int64_t>(slot * e.size + sender) * e.vectors + v;
}

inline constexpr uint32_t kAbsentWord = 0xffffffffu;

// An all-ones word is a pair of NaNs of either type; so is this one.
__device__ __forceinline__ uint32_t Sendable(uint32_t word) {
  return word == kAbsentWord ? 0x7fff7fffu : word;
}

__device__ __forceinline__ uint4 LoadShared(const uint4* from) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}
__device__ __forceinline__ void StoreShared(uint4* to, uint4 v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ __forceinline__ bool Arrived(const uint4& v) {
  return v.x != kAbsentWord && v.y != kAbsentWord && v.z != kAbsentWord && v.w != kAbsentWord;
}

// To the turn-th rank after one's own; 0: to oneself, which is the last.
__device__ __forceinline__ void PushWords(const ExchangeWords& e, int turn, int v, uint4 words) {
  const int to = (e.rank + 1 + turn) % e.size;
  StoreShared(e.base[to] + ExchangeIndex(e, e.number, e.rank, v),
              {Sendable(words.x), Sendable(words.y), Sendable(words.z), Sendable(words.w)});
}

__device__ __noinline__ inline void TrapWithoutRank(const ExchangeWords& e, int rank) {
  if (e.fault != nullptr) {
    StoreShared(reinterpret_cast<uint4*>(e.fault),
                {static_cast<uint32_t>(PeerWait::kPushedPartial), e.number,
                 static_cast<uint32_t>(rank), blockIdx.x});
    __threadfence_system();
  } else if (threadIdx.x == 0) {
    printf("lockstep: rank %d block %d: nothing of exchange %u from rank %d\n", e.rank,
           static_cast<int>(blockIdx.x), e.number, rank);
  }
  __trap();
}

// Waits for vectors first, first + stride, ... below `end`, N at most, of every rank
// and adds each up in rank order.
template <typename T, int N>
__device__ __forceinline__ void SumsOfRanks(const ExchangeWords& e, int first, int stride, int end,
                                            float (&sums)[N][8]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int k = 0; k < 8; ++k) sums[i][k] = 0.0f;
  }
  const uint4* const from = e.base[e.rank] + ExchangeIndex(e, e.number, 0, 0);
  uint4 words[N][kMaxPeers];
  Patience patience(e.patience_ns);
  for (;;) {
    int missing = -1;
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
      for (int r = 0; r < kMaxPeers; ++r) {
        const int v = first + i * stride;
        if (r < e.size && v < end) words[i][r] = LoadShared(from + r * e.vectors + v);
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
      for (int r = 0; r < kMaxPeers; ++r) {
        if (r < e.size && first + i * stride < end && !Arrived(words[i][r])) missing = r;
      }
    }
    if (missing < 0) break;
    if (patience.Exhausted()) TrapWithoutRank(e, missing);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (first + i * stride >= end) break;
#pragma unroll
    for (int r = 0; r < kMaxPeers; ++r) {
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
__device__ __forceinline__ void ClearPreviousSlot(const ExchangeWords& e) {
  uint4* slot = e.base[e.rank] + ExchangeIndex(e, e.number + kExchangeSlots - 1, 0, 0);
  constexpr int threads = kGemvThreads;
  for (int i = blockIdx.x * threads + threadIdx.x; i < e.size * e.vectors;
       i += threads * static_cast<int>(gridDim.x))
    StoreShared(slot + i, {kAbsentWord, kAbsentWord, kAbsentWord, kAbsentWord});
}

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_EXCHANGE_WORDS_CUH_
