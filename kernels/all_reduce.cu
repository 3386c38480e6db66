// One thread a vector of 16 bytes. A row is shared by a cluster of blocks, whose
// number depends on its width alone, so that the norm adds up in one order
// whatever the batch. A message without a row's structure (no norm, bias,
// residual or padding) is cut into tiles of 256 vectors, "rows" of their own.
//
// Bytes a rank sends, M the message: one-shot (size - 1) M, two-shot
// 2 M (size - 1) / size. Read and written locally besides: in, out, residual once,
// each received vector once, and its sentinel.
#include <cooperative_groups.h>

#include <algorithm>

#include "kernels/all_reduce.h"
#include "kernels/device.cuh"
#include "kernels/exchange.cuh"

namespace lockstep::kernels {
namespace {

constexpr int kTileVectors = 256;
constexpr int kMaxCluster = 8;    // what every device that has clusters allows
constexpr int kMaxThreads = 512;  // of a block
constexpr int kStretch = 32;      // vectors a rank owns in one piece: a warp's, 512 bytes

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

// One vector from every rank; mine is at hand. Leaves the slots empty behind it.
template <int kMax>
__device__ __forceinline__ void Receive(const Params& p, PeerWait code, uint64_t exchange,
                                        uint4* first, uint4 mine, uint4 (&got)[kMax]) {
  PeerWaiter waiter(p.limits, code, exchange);
  for (;;) {
#pragma unroll
    for (int r = 0; r < kMax; ++r) {
      if (r < p.size && r != p.rank) got[r] = LoadSystem(first + size_t{p.receive_source} * r);
    }
    int missing = -1;
#pragma unroll
    for (int r = 0; r < kMax; ++r) {
      if (r >= p.size) continue;
      if (r == p.rank) {
        got[r] = mine;
      } else if (!Arrived(got[r])) {
        missing = r;
      }
    }
    if (missing < 0 || waiter.Over(missing)) break;
  }
#pragma unroll
  for (int r = 0; r < kMax; ++r) {
    if (r < p.size && r != p.rank) first[size_t{p.receive_source} * r] = NothingYet();
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

template <typename T, int kMax>
__device__ __forceinline__ uint4 OneShot(const Params& p, uint64_t exchange, uint32_t index,
                                         uint4 mine, uint4 bias) {
  const uint32_t slot = p.receive + (exchange & 1) * p.receive_slot;
#pragma unroll
  for (int d = 1; d < kMax; ++d) {
    if (d >= p.size) break;
    const int peer = p.rank + d < p.size ? p.rank + d : p.rank + d - p.size;
    StoreSystem(Vectors(p.base[peer]) + slot + p.rank * p.receive_source + index, mine);
  }
  uint4 residual = {};
  if (p.residual != nullptr) residual = LoadVector(p.residual, index);
  uint4 got[kMax];
  Receive<kMax>(p, PeerWait::kOneShot, exchange, Vectors(p.base[p.rank]) + slot + index, mine, got);
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

// The sum of `value` over the blocks of a row, added in one order. Its storage is
// used in turn by even and odd calls, so that one barrier a call is enough.
class RowSum {
 public:
  struct Storage {
    float warp[2][kMaxThreads / 32];
    float part[2][kMaxCluster];
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
  __device__ float Add(float value) {
    turn_ ^= 1;
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    value = WarpSum(value);
    if (lane == 0) s_->warp[turn_][threadIdx.x / 32] = value;
    __syncthreads();
    const float block = WarpSum(lane < warps ? s_->warp[turn_][lane] : 0.0f);
#if __CUDA_ARCH__ >= 900
    if (cluster_ > 1) {
      auto cluster = cooperative_groups::this_cluster();
      if (threadIdx.x < cluster_) {
        *cluster.map_shared_rank(&s_->part[turn_][cluster.block_rank()], threadIdx.x) = block;
      }
      cluster.sync();
      float sum = 0.0f;
      for (int i = 0; i < cluster_; ++i) sum += s_->part[turn_][i];
      return sum;
    }
#endif
    return block;
  }

 private:
  Storage* const s_;
  const unsigned cluster_;
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
template <typename T, int kMax, bool kTwoShot, bool kRows>
__global__ void __launch_bounds__(kRows ? kMaxThreads : kTileVectors, BlocksPerSm(kMax, kRows))
    AllReduceKernel(const __grid_constant__ Params p) {
  __shared__ RowSum::Storage storage;
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
    if (active) {
      const uint4 mine = Sendable(partial ? LoadPartial<T>(p.in, index, p.tail_elements)
                                          : LoadVector(p.in, index));
      if constexpr (kTwoShot) {
        sum = TwoShot<T, kMax>(p, exchange, row, v, index, mine, bias);
      } else {
        sum = OneShot<T, kMax>(p, exchange, index, mine, bias);
      }
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
    if (active && !padding) static_cast<uint4*>(p.out)[index] = sum;
  }
  CountExchange(p.counter);
}

using Kernel = void (*)(Params);

template <typename T, int kMax>
Kernel KernelOf(bool two_shot, bool rows) {
  if (two_shot) {
    return rows ? AllReduceKernel<T, kMax, true, true> : AllReduceKernel<T, kMax, true, false>;
  }
  return rows ? AllReduceKernel<T, kMax, false, true> : AllReduceKernel<T, kMax, false, false>;
}
template <typename T>
Kernel KernelOf(int size, bool two_shot, bool rows) {
  if (size <= 2) return KernelOf<T, 2>(two_shot, rows);
  if (size <= 4) return KernelOf<T, 4>(two_shot, rows);
  return KernelOf<T, 8>(two_shot, rows);
}
Kernel KernelOf(Type type, int size, bool two_shot, bool rows) {
  switch (type) {
    case Type::kF32:
      return KernelOf<float>(size, two_shot, rows);
    case Type::kF16:
      return KernelOf<__half>(size, two_shot, rows);
    case Type::kBF16:
      return KernelOf<__nv_bfloat16>(size, two_shot, rows);
    case Type::kE4M3:
      break;
  }
  return nullptr;
}

// How a message lies over rows and vectors.
struct Shape {
  bool has_rows = false;
  int rows = 0, row_vectors = 0, tail_elements = 0;
  size_t total_vectors = 0;
  int cluster = 1;
};

bool DeviceHasClusters() {
  static const bool has = [] {
    int device = 0, answer = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&answer, cudaDevAttrClusterLaunch, device) == cudaSuccess &&
           answer != 0;
  }();
  return has;
}

// Of the width alone: see the head of this file.
int ClusterFor(int row_vectors) {
  if (!DeviceHasClusters()) return 1;
  if (row_vectors <= 128) return 1;
  if (row_vectors <= 256) return 2;
  return row_vectors <= 1024 ? 4 : kMaxCluster;
}

// False: no path takes it.
bool ShapeOf(const AllReduceArgs& args, Shape* shape) {
  if (args.type == Type::kE4M3 || args.rows <= 0 || args.hidden <= 0) return false;
  const size_t elements = 16 / TypeBytes(args.type);
  shape->has_rows = args.norm_weight != nullptr || args.bias != nullptr ||
                    args.residual != nullptr || args.residual_out != nullptr ||
                    args.slots != nullptr;
  const size_t total = size_t(args.rows) * args.hidden;
  if (shape->has_rows) {
    shape->rows = args.rows;
    shape->row_vectors = static_cast<int>(args.hidden / elements);
    shape->cluster = ClusterFor(shape->row_vectors);
    if (args.hidden % elements != 0 || shape->row_vectors > shape->cluster * kMaxThreads) {
      return false;
    }
  } else {
    shape->row_vectors = kTileVectors;
    shape->rows =
        static_cast<int>((total + elements * kTileVectors - 1) / (elements * kTileVectors));
    shape->tail_elements = static_cast<int>(total % elements);
  }
  shape->total_vectors = (total + elements - 1) / elements;
  return true;
}

int OwnedVectors(const Shape& shape, int size) {
  return static_cast<int>(RoundUpTo(shape.row_vectors, size_t(kStretch) * size) / size);
}

bool Fits(const Shape& shape, const ExchangeLayout& layout, int size, AllReducePath path) {
  const size_t bytes = shape.total_vectors * 16;
  switch (path) {
    case AllReducePath::kOneShot:
      return bytes <= layout.one_shot_bytes;
    case AllReducePath::kTwoShot:
      return bytes <= layout.two_shot_bytes &&
             size_t(shape.rows) * OwnedVectors(shape, size) * 16 <=
                 PartsOf(layout, size).scatter_source;
    case AllReducePath::kNone:
      break;
  }
  return false;
}

bool Aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

AllReducePath ChooseAllReduce(const AllReduceArgs& args, const ExchangeLayout& layout, int size) {
  Shape shape;
  if (!ShapeOf(args, &shape)) return AllReducePath::kNone;
  for (const AllReducePath path : {AllReducePath::kOneShot, AllReducePath::kTwoShot}) {
    if (Fits(shape, layout, size, path)) return path;
  }
  return AllReducePath::kNone;
}

cudaError_t AllReduce(const Launch& launch, const Peers& peers, const ExchangeLayout& layout,
                      AllReducePath path, const AllReduceArgs& args) {
  if (args.rows == 0) return cudaSuccess;
  Shape shape;
  if (peers.size < 1 || peers.size > kMaxPeers || !ShapeOf(args, &shape) ||
      !Fits(shape, layout, peers.size, path)) {
    return cudaErrorInvalidValue;
  }
  for (const void* p : {args.in, static_cast<const void*>(args.out), args.bias, args.residual,
                        static_cast<const void*>(args.residual_out), args.norm_weight}) {
    if (!Aligned(p)) return cudaErrorMisalignedAddress;
  }
  const bool two_shot = path == AllReducePath::kTwoShot;
  const RegionParts parts = PartsOf(layout, peers.size);
  Params p = {};
  for (int r = 0; r < peers.size; ++r) p.base[r] = peers.base[r] + layout.offset;
  p.rank = peers.rank;
  p.size = peers.size;
  p.limits = LimitsOf(peers);
  p.counter = reinterpret_cast<uint64_t*>(
      p.base[p.rank] + (two_shot ? RegionParts::kTwoShotCounter : RegionParts::kOneShotCounter));
  const size_t source = two_shot ? parts.scatter_source : parts.one_shot_source;
  p.receive = static_cast<uint32_t>((two_shot ? parts.scatter : parts.one_shot) / 16);
  p.receive_source = static_cast<uint32_t>(source / 16);
  p.receive_slot = p.receive_source * peers.size;
  p.sums = static_cast<uint32_t>(parts.sums / 16);
  p.sums_slot = static_cast<uint32_t>(parts.sums_slot / 16);
  p.rows = shape.rows;
  p.row_vectors = shape.row_vectors;
  p.hidden = args.hidden;
  p.cluster = shape.cluster;
  p.total_vectors = static_cast<uint32_t>(shape.total_vectors);
  p.tail_elements = shape.tail_elements;
  p.owned_vectors = OwnedVectors(shape, peers.size);
  p.in = args.in;
  p.out = args.out;
  p.bias = args.bias;
  p.residual = args.residual;
  p.residual_out = args.residual_out;
  p.norm_weight = args.norm_weight;
  p.eps = args.eps;
  p.plus_one = args.plus_one;
  p.slots = args.slots;

  const int most =
      args.max_blocks > 0 ? std::min(args.max_blocks, kMaxExchangeBlocks) : kMaxExchangeBlocks;
  const int at_once = std::max(1, std::min(shape.rows, most / shape.cluster));
  const size_t threads = RoundUpTo((shape.row_vectors + shape.cluster - 1) / shape.cluster, 32);
  return LaunchKernel(launch, KernelOf(args.type, peers.size, two_shot, shape.has_rows),
                      dim3(at_once * shape.cluster), dim3(static_cast<unsigned>(threads)), 0,
                      static_cast<unsigned>(shape.cluster), p);
}

cudaError_t LoadAllReduceKernels() {
  for (const Type type : {Type::kF32, Type::kF16, Type::kBF16}) {
    for (const int size : {2, 4, 8}) {
      for (const int form : {0, 1, 2, 3}) {
        cudaFuncAttributes attributes;
        const cudaError_t error = cudaFuncGetAttributes(
            &attributes, KernelOf(type, size, (form & 1) != 0, (form & 2) != 0));
        if (error != cudaSuccess) return error;
      }
    }
  }
  return cudaSuccess;
}

}  // namespace lockstep::kernels
