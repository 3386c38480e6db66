// The region of the exchanges, and the all-gather of a few bytes a rank.
//
// The all-gather's payload may be any bits, so no word can mean "nothing yet":
// 8 bytes travel as two 64-bit packets of 4 bytes and the exchange's number,
// each of which arrives whole. Nothing has to be put back. One thread 8 bytes;
// a rank sends 2 (size - 1) bytes per byte.
#include <algorithm>

#include "kernels/all_reduce.h"
#include "kernels/device.cuh"
#include "kernels/exchange.cuh"

namespace lockstep::kernels {
namespace {

constexpr int kThreads = 128;

struct GatherParams {
  std::byte* base[kMaxPeers];
  int rank, size;
  WaitLimits limits;
  uint64_t* counter;
  size_t gather, gather_source;  // bytes from base
  const uint32_t* in;
  uint32_t* out;
  uint32_t words;       // of one rank
  uint32_t out_stride;  // words from one rank's to the next
  CollectiveClock* clock;
};

__device__ __forceinline__ ulonglong2* Packets(const GatherParams& p, int at, uint64_t exchange,
                                               int source) {
  const size_t slot = (exchange & 1) * p.size + source;
  return reinterpret_cast<ulonglong2*>(p.base[at] + p.gather + slot * p.gather_source);
}

__global__ void __launch_bounds__(kThreads)
    SmallAllGatherKernel(const __grid_constant__ GatherParams p) {
  TriggerDependents();
  WaitForPrevious();
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  const uint64_t exchange = ExchangeNumber(p.counter);
  if (2 * i < p.words) {
    const bool both = 2 * i + 1 < p.words;
    const uint32_t mine[2] = {__ldcg(p.in + 2 * i), both ? __ldcg(p.in + 2 * i + 1) : 0};
    // Never the 0 or ones of a fresh region, however long it runs.
    const uint64_t number = ((exchange & 0x3fffffff) + 1) << 32;
    const ulonglong2 packet = {number | mine[0], number | mine[1]};
    for (int d = 1; d < p.size; ++d) {
      const int peer = p.rank + d < p.size ? p.rank + d : p.rank + d - p.size;
      StoreSystem(Packets(p, peer, exchange, p.rank) + i, packet);
    }
    const bool timed = i == 0 && p.clock != nullptr;
    const uint64_t sent_ns = timed ? DeviceClockNs() : 0;
    for (int r = 0; r < p.size; ++r) {
      ulonglong2 got = packet;
      if (r != p.rank) {
        PeerWaiter waiter(p.limits, PeerWait::kSmallAllGather, exchange);
        do {
          got = LoadSystem(Packets(p, p.rank, exchange, r) + i);
        } while (((got.x ^ number) >> 32 != 0 || (got.y ^ number) >> 32 != 0) && !waiter.Over(r));
      }
      uint32_t* out = p.out + size_t{p.out_stride} * r + 2 * i;
      out[0] = static_cast<uint32_t>(got.x);
      if (both) out[1] = static_cast<uint32_t>(got.y);
    }
    if (timed) AddTo(&p.clock->wait_ns, sent_ns, DeviceClockNs());
  }
  CountExchange(p.counter);
}

__global__ void MarkKernel(CollectiveClock* clock, TransferMark mark) {
  if (mark == TransferMark::kBegin) {
    clock->mark_ns = DeviceClockNs();
  } else {
    AddTo(mark == TransferMark::kEnd ? &clock->transfer_ns : &clock->aside_ns, clock->mark_ns,
          DeviceClockNs());
  }
}

}  // namespace

cudaError_t MarkTransfer(cudaStream_t stream, CollectiveClock* clock, TransferMark mark) {
  return LaunchKernel({.stream = stream}, MarkKernel, 1, 1, 0, 1, clock, mark);
}

ExchangeLayout DefaultExchangeLayout(int size) {
  ExchangeLayout layout;
  // Two ranks: a second crossing saves no bytes.
  layout.one_shot_bytes = size <= 2 ? 8 << 20 : size <= 4 ? 128 << 10 : 64 << 10;
  layout.pushed_bytes = 256 << 10;
  layout.two_shot_bytes = size <= 2 ? 0 : 8 << 20;
  return layout;
}

ExchangePush OneShotPush(const Peers& peers, const ExchangeLayout& layout) {
  const RegionParts parts = PartsOf(layout, peers.size);
  ExchangePush push;
  push.rank = peers.rank;
  push.size = peers.size;
  push.slot_bytes = parts.one_shot_source * peers.size;
  for (int r = 0; r < peers.size; ++r) {
    push.to[r] =
        peers.base[r] + layout.offset + parts.one_shot + peers.rank * parts.one_shot_source;
  }
  push.counter = reinterpret_cast<const uint64_t*>(peers.base[peers.rank] + layout.offset +
                                                   RegionParts::kOneShotCounter);
  return push;
}

size_t ExchangeRegionBytes(const ExchangeLayout& layout, int size) {
  return PartsOf(layout, size).end;
}

cudaError_t ClearExchangeRegion(const ExchangeLayout& layout, int size, std::byte* own_base,
                                cudaStream_t stream) {
  std::byte* begin = own_base + layout.offset;
  const cudaError_t error = cudaMemsetAsync(begin, 0, RegionParts::kCounterBytes, stream);
  if (error != cudaSuccess) return error;
  return cudaMemsetAsync(begin + RegionParts::kCounterBytes, 0xFF,
                         PartsOf(layout, size).end - RegionParts::kCounterBytes, stream);
}

cudaError_t InitAllReduce() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, SmallAllGatherKernel);
  return error != cudaSuccess ? error : LoadAllReduceKernels();
}

cudaError_t SmallAllGather(const Launch& launch, const Peers& peers, const ExchangeLayout& layout,
                           const void* in, void* out, size_t bytes) {
  if (bytes == 0) return cudaSuccess;
  if (peers.size < 1 || peers.size > kMaxPeers || bytes % 4 != 0 || layout.gather_bytes < 8) {
    return cudaErrorInvalidValue;
  }
  if (reinterpret_cast<uintptr_t>(in) % 4 != 0 || reinterpret_cast<uintptr_t>(out) % 4 != 0) {
    return cudaErrorMisalignedAddress;
  }
  const RegionParts parts = PartsOf(layout, peers.size);
  GatherParams p = {};
  for (int r = 0; r < peers.size; ++r) p.base[r] = peers.base[r] + layout.offset;
  p.rank = peers.rank;
  p.size = peers.size;
  p.limits = LimitsOf(peers);
  p.counter = reinterpret_cast<uint64_t*>(p.base[p.rank] + RegionParts::kGatherCounter);
  p.gather = parts.gather;
  p.gather_source = parts.gather_source;
  p.out_stride = static_cast<uint32_t>(bytes / 4);
  p.clock = peers.clock;
  const size_t most = layout.gather_bytes / 8 * 2;
  for (size_t first = 0; first < bytes / 4; first += most) {
    p.in = static_cast<const uint32_t*>(in) + first;
    p.out = static_cast<uint32_t*>(out) + first;
    p.words = static_cast<uint32_t>(std::min(most, bytes / 4 - first));
    const unsigned blocks = (p.words + 2 * kThreads - 1) / (2 * kThreads);
    const cudaError_t error =
        LaunchKernel(launch, SmallAllGatherKernel, dim3(blocks), dim3(kThreads), 0, 1, p);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace lockstep::kernels
