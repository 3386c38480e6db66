// The kernel of the all-reduce; kernels/all_reduce.cu launches it.
//
// One thread a vector of 16 bytes. A row is shared by a cluster of blocks, whose
// number depends on its width alone, so that the norm adds up in one order
// whatever the batch. A message without a row's structure (no norm, bias,
// residual or padding) is cut into tiles of 256 vectors, "rows" of their own.
//
// Bytes a rank sends, M the message: one-shot (size - 1) M, two-shot
// 2 M (size - 1) / size. Read and written locally besides: in, out, residual once,
// each received vector once, and its sentinel.
#ifndef LOCKSTEP_KERNELS_ALL_REDUCE_KERNEL_CUH_
#define LOCKSTEP_KERNELS_ALL_REDUCE_KERNEL_CUH_

#include <cooperative_groups.h>

#include <cstddef>
#include <cstdint>

#include "kernels/device.cuh"
#include "kernels/exchange.cuh"

namespace lockstep::kernels::all_reduce {

inline constexpr int kTileVectors = 256;
inline constexpr int kMaxCluster = 8;    // what every device that has clusters allows
inline constexpr int kMaxThreads = 512;  // of a block
inline constexpr int kStretch = 32;      // vectors a rank owns in one piece: a warp's, 512 bytes

struct Params {
  std::byte* base[kMaxPeers];  // of these kernels' part of each rank's region
  int rank, size;
  WaitLimits limits;
  uint64_t* counter;
  // In vectors, from base.
  uint32_t receive, receive_slot, receive_source;  // one-shot, or the scatter
  uint32_t sums, sums_slot;                        // two-shot

  int rows, row_vectors, hidden, cluster;
  uint32_t total_vectors;
  int tail_elements;  // of the last vector; 0: it is whole
  int owned_vectors;  // of a row, at most, by one rank
  const void* in;
  void* out;
  const void* bias;
  const void* residual;
  void* residual_out;
  const void* norm_weight;
  float eps;
  bool plus_one;
  const int32_t* slots;
  CollectiveClock* clock;
};

template <typename T>
constexpr int kElements = 16 / sizeof(T);

template <typename T>
__device__ __forceinline__ void Unpack(uint4 v, float (&f)[kElements<T>]) {
  const T* t = reinterpret_cast<const T*>(&v);
#pragma unroll
  for (int e = 0; e < kElements<T>; ++e) f[e] = ToFloat(t[e]);
}
template <typename T>
__device__ __forceinline__ uint4 Pack(const float (&f)[kElements<T>]) {
  uint4 v;
  T* t = reinterpret_cast<T*>(&v);
#pragma unroll
  for (int e = 0; e < kElements<T>; ++e) t[e] = FromFloat<T>(f[e]);
  return v;
}
template <typename T>
__device__ __forceinline__ void Accumulate(uint4 v, float (&sum)[kElements<T>]) {
  float f[kElements<T>];
  Unpack<T>(v, f);
#pragma unroll
  for (int e = 0; e < kElements<T>; ++e) sum[e] += f[e];
}

// The last vector of a message without rows may be in part beyond its end.
template <typename T>
__device__ uint4 LoadPartial(const void* from, uint32_t index, int elements) {
  uint4 v = make_uint4(0, 0, 0, 0);
  const T* source = static_cast<const T*>(from) + size_t{index} * kElements<T>;
  for (int e = 0; e < elements; ++e) reinterpret_cast<T*>(&v)[e] = source[e];
  return v;
}
template <typename T>
__device__ void StorePartial(void* to, uint32_t index, int elements, uint4 v) {
  T* target = static_cast<T*>(to) + size_t{index} * kElements<T>;
  for (int e = 0; e < elements; ++e) target[e] = reinterpret_cast<const T*>(&v)[e];
}

__device__ __forceinline__ uint4* Vectors(std::byte* base) {
  return reinterpret_cast<uint4*>(base);
}
__device__ __forceinline__ uint4 LoadVector(const void* from, uint32_t index) {
  return __ldcg(static_cast<const uint4*>(from) + index);
}

// One vector from every rank; mine is at hand, unless it was pushed too. Leaves the slots empty
// behind it.
template <int kMax, bool kPushed = false>
__device__ __forceinline__ void Receive(const Params& p, PeerWait code, uint64_t exchange,
                                        uint4* first, uint4 mine, uint4 (&got)[kMax]) {
  PeerWaiter waiter(p.limits, code, exchange);
  for (;;) {
#pragma unroll
    for (int r = 0; r < kMax; ++r) {
      if (r < p.size && (kPushed || r != p.rank))
        got[r] = LoadSystem(first + size_t{p.receive_source} * r);
    }
    int missing = -1;
#pragma unroll
    for (int r = 0; r < kMax; ++r) {
      if (r >= p.size) continue;
      if (!kPushed && r == p.rank) {
        got[r] = mine;
      } else if (!Arrived(got[r])) {
        missing = r;
      }
    }
    if (missing < 0 || waiter.Over(missing)) break;
  }
#pragma unroll
  for (int r = 0; r < kMax; ++r) {
    if (r < p.size && (kPushed || r != p.rank)) first[size_t{p.receive_source} * r] = NothingYet();
  }
}

// The ranks' vectors, bias and residual added in fp32 and rounded once.
template <typename T, int kMax>
__device__ __forceinline__ uint4 Sum(const Params& p, const uint4 (&got)[kMax], uint4 bias,
                                     uint4 residual) {
  float sum[kElements<T>];
  Unpack<T>(got[0], sum);
#pragma unroll
  for (int r = 1; r < kMax; ++r) {
    if (r < p.size) Accumulate<T>(got[r], sum);
  }
  if (p.bias != nullptr) Accumulate<T>(bias, sum);
  if (p.residual != nullptr) Accumulate<T>(residual, sum);
  return Pack<T>(sum);
}

// kPushed: of rows that the products have pushed.
template <typename T, int kMax, bool kPushed>
__device__ __forceinline__ uint4 OneShot(const Params& p, uint64_t exchange, uint32_t index,
                                         uint4 mine, uint4 bias) {
  const uint32_t slot = p.receive + (exchange & 1) * p.receive_slot;
#pragma unroll
  for (int d = 1; d < kMax; ++d) {
    if (kPushed || d >= p.size) break;
    const int peer = p.rank + d < p.size ? p.rank + d : p.rank + d - p.size;
    StoreSystem(Vectors(p.base[peer]) + slot + p.rank * p.receive_source + index, mine);
  }
  uint4 residual = {};
  if (p.residual != nullptr) residual = LoadVector(p.residual, index);
  uint4 got[kMax];
  Receive<kMax, kPushed>(p, PeerWait::kOneShot, exchange, Vectors(p.base[p.rank]) + slot + index,
                         mine, got);
  return Sum<T, kMax>(p, got, bias, residual);
}

template <typename T, int kMax>
__device__ __forceinline__ uint4 TwoShot(const Params& p, uint64_t exchange, int row, int v,
                                         uint32_t index, uint4 mine, uint4 bias) {
  const uint32_t slot = p.receive + (exchange & 1) * p.receive_slot;
  const uint32_t sums = p.sums + (exchange & 1) * p.sums_slot;
  const int stretch = v / kStretch, owner = stretch % p.size;
  const uint32_t owned =
      row * p.owned_vectors + stretch / p.size * kStretch + v % kStretch;  // at its owner
  if (owner != p.rank) {
    StoreSystem(Vectors(p.base[owner]) + slot + p.rank * p.receive_source + owned, mine);
    uint4* at = Vectors(p.base[p.rank]) + sums + index;
    PeerWaiter waiter(p.limits, PeerWait::kGather, exchange);
    uint4 sum;
    do {
      sum = LoadSystem(at);
    } while (!Arrived(sum) && !waiter.Over(owner));
    *at = NothingYet();
    return sum;
  }
  uint4 residual = {};
  if (p.residual != nullptr) residual = LoadVector(p.residual, index);
  uint4 got[kMax];
  Receive<kMax>(p, PeerWait::kScatter, exchange, Vectors(p.base[p.rank]) + slot + owned, mine, got);
  const uint4 sum = Sendable(Sum<T, kMax>(p, got, bias, residual));
#pragma unroll
  for (int d = 1; d < kMax; ++d) {
    if (d >= p.size) break;
    const int peer = p.rank + d < p.size ? p.rank + d : p.rank + d - p.size;
    StoreSystem(Vectors(p.base[peer]) + sums + index, sum);
  }
  return sum;
}

// The sum of `value` over the warps of a row's blocks, added in one order. Its
// storage is used in turn by even and odd calls, so that one barrier a call is enough.
class RowSum {
 public:
  struct Storage {
    float part[2][kMaxCluster * kMaxThreads / 32];
  };

  __device__ RowSum(Storage* storage, int cluster) : s_(storage), cluster_(cluster) {
#if __CUDA_ARCH__ >= 900
    if (cluster_ > 1) cooperative_groups::this_cluster().barrier_arrive();
#endif
  }
  // Before the first Add: the other blocks' shared memory is there.
  __device__ void Begin() const {
#if __CUDA_ARCH__ >= 900
    if (cluster_ > 1) cooperative_groups::this_cluster().barrier_wait();
#endif
  }
  // All threads of the blocks.
  __device__ float Add(float value) {
    turn_ ^= 1;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    value = WarpSum(value);
#if __CUDA_ARCH__ >= 900
    if (cluster_ > 1) {
      auto cluster = cooperative_groups::this_cluster();
      float* mine = &s_->part[turn_][cluster.block_rank() * warps + warp];
      if (lane < cluster_) *cluster.map_shared_rank(mine, lane) = value;
      __syncwarp();
      cluster.sync();
    }
#endif
    if (cluster_ == 1) {
      if (lane == 0) s_->part[turn_][warp] = value;
      __syncthreads();
    }
    value = 0.0f;
    for (int i = lane; i < cluster_ * warps; i += 32) value += s_->part[turn_][i];
    return WarpSum(value);
  }

 private:
  Storage* const s_;
  const int cluster_;
  int turn_ = 0;
};

template <typename T>
__device__ __forceinline__ float SquareSum(uint4 v) {
  float f[kElements<T>], sum = 0.0f;
  Unpack<T>(v, f);
#pragma unroll
  for (int e = 0; e < kElements<T>; ++e) sum = fmaf(f[e], f[e], sum);
  return sum;
}

template <typename T>
__device__ __forceinline__ uint4 Normed(uint4 v, uint4 weight, float scale, bool plus_one) {
  float f[kElements<T>], w[kElements<T>];
  Unpack<T>(v, f);
  Unpack<T>(weight, w);
#pragma unroll
  for (int e = 0; e < kElements<T>; ++e) f[e] = f[e] * scale * (plus_one ? w[e] + 1.0f : w[e]);
  return Pack<T>(f);
}

// Registers: none spilled, and room for as many threads as they allow.
constexpr int BlocksPerSm(int max_ranks, bool rows) {
  if (rows) return max_ranks <= 2 ? 2 : 1;
  return max_ranks <= 2 ? 4 : max_ranks <= 4 ? 3 : 2;
}

// kRows: bias, residual, norm and padding rows may occur; blocks [row * cluster,
// + cluster) share a row. Otherwise a row is a tile, of which the last may end early.
template <typename T, int kMax, bool kTwoShot, bool kRows, bool kPushed = false>
__global__ void __launch_bounds__(kRows ? kMaxThreads : kTileVectors, BlocksPerSm(kMax, kRows))
    AllReduceKernel(const __grid_constant__ Params p) {
  __shared__ RowSum::Storage storage;
  __shared__ uint64_t clock_ns;  // of one thread: registers are short
  TriggerDependents();
  const bool norm = kRows && p.norm_weight != nullptr;
  RowSum row_sum(&storage, norm ? p.cluster : 1);
  const int cluster = kRows ? p.cluster : 1;
  const int v = (blockIdx.x % cluster) * blockDim.x + threadIdx.x;
  const bool in_row = v < p.row_vectors;
  uint4 weight = {}, bias = {};
  if (kRows && in_row) {
    if (norm) weight = __ldg(static_cast<const uint4*>(p.norm_weight) + v);
    if (p.bias != nullptr) bias = __ldg(static_cast<const uint4*>(p.bias) + v);
  }
  WaitForPrevious();
  row_sum.Begin();
  const uint64_t exchange = ExchangeNumber(p.counter);
  const int step = gridDim.x / cluster;
  for (int row = blockIdx.x / cluster; row < p.rows; row += step) {
    const bool padding = kRows && p.slots != nullptr && __ldcg(p.slots + row) < 0;
    // Row 0 always travels: every exchange must hear from every rank.
    if (padding && row != 0) continue;
    const uint32_t index = row * static_cast<uint32_t>(p.row_vectors) + v;
    const bool active = in_row && index < p.total_vectors;
    const bool partial = !kRows && p.tail_elements != 0 && index == p.total_vectors - 1;
    uint4 sum = {};
    const bool timed = row == 0 && v == 0 && p.clock != nullptr;
    if (timed) clock_ns = DeviceClockNs();
    if (active) {
      uint4 mine = {};
      if constexpr (!kPushed)
        mine = Sendable(partial ? LoadPartial<T>(p.in, index, p.tail_elements)
                                : LoadVector(p.in, index));
      if constexpr (kTwoShot) {
        sum = TwoShot<T, kMax>(p, exchange, row, v, index, mine, bias);
      } else {
        sum = OneShot<T, kMax, kPushed>(p, exchange, index, mine, bias);
      }
    }
    if (timed) {
      const uint64_t arrived_ns = DeviceClockNs();
      AddTo(&p.clock->wait_ns, clock_ns, arrived_ns);
      clock_ns = arrived_ns;
    }
    if (partial && active) {
      StorePartial<T>(p.out, index, p.tail_elements, sum);
      continue;
    }
    if (active && !padding && p.residual_out != nullptr) {
      static_cast<uint4*>(p.residual_out)[index] = sum;
    }
    if (norm) {
      const float squares = row_sum.Add(active ? SquareSum<T>(sum) : 0.0f);
      sum = Normed<T>(sum, weight, rsqrtf(squares / p.hidden + p.eps), p.plus_one);
    }
    if (active && !padding && p.out != nullptr) static_cast<uint4*>(p.out)[index] = sum;
  }
  if (p.clock != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
    AddTo(&p.clock->transfer_ns, clock_ns, DeviceClockNs());
  }
  CountExchange(p.counter);
}

}  // namespace lockstep::kernels::all_reduce

#endif  // LOCKSTEP_KERNELS_ALL_REDUCE_KERNEL_CUH_
