#include <algorithm>
#include <iterator>

#include "kernels/device.cuh"
#include "kernels/exchange.cuh"
#include "kernels/row_exchange.h"
#include "kernels/vector.cuh"

namespace lockstep::kernels {
namespace {

// A rank's word, in which it says how far it has come, alone in its line.
constexpr size_t kWordStride = 128;
constexpr size_t kWordsBytes = kMaxPeers * kWordStride;
constexpr int kSumThreads = 256;
// Of a sum: as much as keeps the memory busy beside other kernels.
constexpr int kSumBlocks = 264;

struct MeetParams {
  uint32_t* word[kMaxPeers];  // this rank's, in each rank's region
  const uint32_t* words;      // of all ranks, in the own region
  int rank, size;
  WaitLimits limits;
  uint32_t number;
};

__device__ __forceinline__ void StoreRelease(uint32_t* to, uint32_t v) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}
__device__ __forceinline__ uint32_t LoadAcquire(const uint32_t* from) {
  uint32_t v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
  return v;
}

// One warp may look at the host's word as often as it likes, unlike a device full of waiting
// threads (PeerWaiter): hundreds of these follow each other, and all must end soon.
__device__ __forceinline__ bool GivenUp(const WaitLimits& limits) {
  if (limits.abort == nullptr) return false;
  if (LoadAcquire(limits.aborted) != 0) return true;
  if (LoadAcquire(limits.abort) == 0) return false;
  *limits.aborted = 1;
  return true;
}

// A lane a rank. What the stream copied before is where it should be when this begins.
__global__ void __launch_bounds__(32) MeetKernel(const __grid_constant__ MeetParams p) {
  const int r = static_cast<int>(threadIdx.x);
  if (r >= p.size || r == p.rank) return;
  __threadfence_system();
  StoreRelease(p.word[r], p.number);
  PeerWaiter waiter(p.limits, PeerWait::kCopiedRows, p.number);
  const uint32_t* const theirs = p.words + r * (kWordStride / sizeof(uint32_t));
  for (uint32_t tries = 0; static_cast<int32_t>(LoadAcquire(theirs) - p.number) < 0; ++tries) {
    if ((tries % 64 == 0 && GivenUp(p.limits)) || waiter.Over(r)) return;
  }
}

struct SumParams {
  const uint4* from[kMaxPeers];  // by rank
  uint4* out;                    // may be from[rank]
  uint32_t vectors;
};

template <typename T, int kSize>
__global__ void __launch_bounds__(kSumThreads) SumKernel(const __grid_constant__ SumParams p) {
  constexpr int kN = 16 / sizeof(T);
  for (uint32_t i = blockIdx.x * kSumThreads + threadIdx.x; i < p.vectors;
       i += gridDim.x * kSumThreads) {
    Packed<T, kN> got[kSize];
#pragma unroll
    for (int r = 0; r < kSize; ++r) got[r].raw = __ldcg(p.from[r] + i);
    float sum[kN];
    Unpack(got[0], sum);
#pragma unroll
    for (int r = 1; r < kSize; ++r) {
      float f[kN];
      Unpack(got[r], f);
#pragma unroll
      for (int e = 0; e < kN; ++e) sum[e] += f[e];
    }
    p.out[i] = Pack<T, kN>(sum).raw;
  }
}

using SumPointer = void (*)(SumParams);
// size: 2 to kMaxPeers.
template <typename T>
SumPointer SumOf(int size) {
  static constexpr SumPointer kSums[] = {SumKernel<T, 2>, SumKernel<T, 3>, SumKernel<T, 4>,
                                         SumKernel<T, 5>, SumKernel<T, 6>, SumKernel<T, 7>,
                                         SumKernel<T, 8>};
  static_assert(std::size(kSums) == kMaxPeers - 1);
  return kSums[size - 2];
}
SumPointer FindSum(Type type, int size) {
  switch (type) {
    case Type::kF32:
      return SumOf<float>(size);
    case Type::kF16:
      return SumOf<__half>(size);
    case Type::kBF16:
      return SumOf<__nv_bfloat16>(size);
    case Type::kE4M3:
      break;
  }
  return nullptr;
}

std::byte* Inbox(const RowExchange& e, int at, int source) {
  return e.peers.base[at] + e.offset + kWordsBytes + source * e.inbox_bytes;
}

cudaError_t Meet(cudaStream_t stream, const RowExchange& e, uint32_t number) {
  const Peers& peers = e.peers;
  MeetParams p = {};
  for (int r = 0; r < peers.size; ++r) {
    p.word[r] = reinterpret_cast<uint32_t*>(peers.base[r] + e.offset + peers.rank * kWordStride);
  }
  p.words = reinterpret_cast<const uint32_t*>(peers.base[peers.rank] + e.offset);
  p.rank = peers.rank;
  p.size = peers.size;
  p.limits = LimitsOf(peers);
  p.number = number;
  return LaunchKernel({.stream = stream, .pdl = false}, MeetKernel, dim3(1), dim3(32), 0, 1, p);
}

// Calls copy(rank) for every other rank, each rank in an order of its own: no two send to
// the same one at a time.
template <typename Copy>
cudaError_t ForEachOther(const Peers& peers, Copy copy) {
  for (int d = 1; d < peers.size; ++d) {
    const cudaError_t error = copy((peers.rank + d) % peers.size);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

bool IsValid(const RowExchange& e) {
  return e.peers.size >= 2 && e.peers.size <= kMaxPeers && e.peers.rank >= 0 &&
         e.peers.rank < e.peers.size && e.offset % 256 == 0 && e.inbox_bytes % 256 == 0;
}

}  // namespace

size_t RowExchangeBytes(size_t inbox_bytes, int size) { return kWordsBytes + inbox_bytes * size; }

cudaError_t ClearRowExchange(std::byte* part, cudaStream_t stream) {
  return cudaMemsetAsync(part, 0, kWordsBytes, stream);
}

cudaError_t InitRowExchange() {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, MeetKernel);
  for (const Type type : {Type::kF32, Type::kF16, Type::kBF16}) {
    for (int size = 2; size <= kMaxPeers && error == cudaSuccess; ++size) {
      error = cudaFuncGetAttributes(&attributes, FindSum(type, size));
    }
  }
  return error;
}

cudaError_t SumRows(cudaStream_t stream, const RowExchange& e, const SumRowsArgs& args) {
  if (!IsValid(e) || args.rows < 0 || args.hidden < 1) return cudaErrorInvalidValue;
  const Peers& peers = e.peers;
  const size_t row_bytes = args.hidden * TypeBytes(args.type);
  const SumPointer kernel = FindSum(args.type, peers.size);
  if (kernel == nullptr || row_bytes % 16 != 0 ||
      MostRowsOfShare(args.rows, peers.size) * row_bytes > e.inbox_bytes) {
    return cudaErrorInvalidValue;
  }
  if (reinterpret_cast<uintptr_t>(args.data) % 16 != 0) return cudaErrorMisalignedAddress;
  const auto rows_of = [&](int rank) {
    return static_cast<std::byte*>(args.data) +
           ShareOf(args.rows, rank, peers.size).first * row_bytes;
  };
  cudaError_t error = ForEachOther(peers, [&](int to) {
    const size_t bytes = ShareOf(args.rows, to, peers.size).rows * row_bytes;
    if (bytes == 0) return cudaSuccess;
    return cudaMemcpyAsync(Inbox(e, to, peers.rank), rows_of(to), bytes, cudaMemcpyDeviceToDevice,
                           stream);
  });
  if (error == cudaSuccess) error = Meet(stream, e, args.number);
  const int own = ShareOf(args.rows, peers.rank, peers.size).rows;
  if (error != cudaSuccess || own == 0) return error;
  SumParams p = {};
  for (int r = 0; r < peers.size; ++r) {
    p.from[r] =
        reinterpret_cast<const uint4*>(r == peers.rank ? rows_of(r) : Inbox(e, peers.rank, r));
  }
  p.out = reinterpret_cast<uint4*>(rows_of(peers.rank));
  p.vectors = static_cast<uint32_t>(own * row_bytes / 16);
  const unsigned blocks =
      std::min<unsigned>((p.vectors + kSumThreads - 1) / kSumThreads, kSumBlocks);
  return LaunchKernel({.stream = stream, .pdl = false}, kernel, dim3(blocks), dim3(kSumThreads), 0,
                      1, p);
}

cudaError_t GatherRows(cudaStream_t stream, const RowExchange& e, const GatheredRows* arrays,
                       int num_arrays, int rows, uint32_t number) {
  if (!IsValid(e) || rows < 0) return cudaErrorInvalidValue;
  const Peers& peers = e.peers;
  const RowShare own = ShareOf(rows, peers.rank, peers.size);
  const cudaError_t error = ForEachOther(peers, [&](int to) {
    for (int a = 0; a < num_arrays && own.rows > 0; ++a) {
      const size_t at = e.offset + arrays[a].offset + own.first * arrays[a].row_bytes;
      const cudaError_t copied =
          cudaMemcpyAsync(peers.base[to] + at, peers.base[peers.rank] + at,
                          own.rows * arrays[a].row_bytes, cudaMemcpyDeviceToDevice, stream);
      if (copied != cudaSuccess) return copied;
    }
    return cudaSuccess;
  });
  return error != cudaSuccess ? error : Meet(stream, e, number + 1);
}

}  // namespace lockstep::kernels
