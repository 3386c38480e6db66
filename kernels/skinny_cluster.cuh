// The product with 2 to 64 rows in clusters. A cluster owns a stretch of tiles of 64
// weight rows, and each of its S blocks a part of K:
//
//              K: | block 0 | block 1 | ...      a stage: 64 rows x 128 bytes, by the copy
//   64 rows:      |=-=-=-=-=|=-=-=-=-=| ...      engine, swizzled as wgmma wants it
//
//   producer warp: fills the ring with weights, waits for the kernel ahead, fetches the
//     block's part of x, which stays, then goes on filling
//   one or two warpgroups, taking turns at the stages: products to fp32 sums in registers,
//     and those to the block that owns the row (64 / S of a tile each), by its memory
//   a warpgroup that finishes: adds what came from all, in order; epilogue
//
// Nobody waits for what is sent: it counts itself at the barrier of its receiver, which
// gives a buffer of sums free when it has read it (two buffers, in turn).
//
// Bytes moved: n * k * sizeof(W); of x, m * k * sizeof(W) / S from L2 a block.
// Checked against a double reference in tests/kernels/skinny_cluster_test.cu.
#ifndef LOCKSTEP_KERNELS_SKINNY_CLUSTER_CUH_
#define LOCKSTEP_KERNELS_SKINNY_CLUSTER_CUH_

#include "kernels/gemv_elements.cuh"
#include "kernels/skinny_cluster_mma.cuh"
#include "kernels/skinny_cluster_plan.h"

namespace lockstep::kernels {
namespace cluster {

// What a block works on.
struct Work {
  int first_tile, tiles;
  int first_chunk, chunks;  // of K
};
__device__ __forceinline__ Work WorkOf(const ClusterParams& p, int rank) {
  const int cluster = static_cast<int>(blockIdx.x) >> p.split_log2;
  const int begin = rank * p.chunks >> p.split_log2, end = (rank + 1) * p.chunks >> p.split_log2;
  return {cluster * p.share + min(cluster, p.remainder), p.share + (cluster < p.remainder ? 1 : 0),
          begin, end - begin};
}

struct Shared {
  uint8_t *ring, *x;
  float* sums;  // [2][sources][64 / S][stride]
  uint64_t *full, *empty, *x_full, *received, *freed;

  __device__ __forceinline__ Shared(uint8_t* base, int rows, const ClusterParams& p) {
    const ClusterLayout layout(rows, p.stages, p.x_chunks);
    ring = base;
    x = base + layout.x;
    sums = reinterpret_cast<float*>(base + layout.sums);
    full = reinterpret_cast<uint64_t*>(base + layout.barriers);
    empty = full + kMaxClusterStages;
    x_full = empty + kMaxClusterStages;
    received = x_full + 1;
    freed = received + 2;
  }
};

// A place in the ring, round and round.
struct Slot {
  int index = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void Advance(int stages) {
    if (++index == stages) index = 0, parity ^= 1;
  }
};

// By one thread.
template <typename W, int kRows>
__device__ __forceinline__ void Produce(const ClusterParams& p, const Shared& s, const Work& work) {
  constexpr int kElements = kClusterChunk / static_cast<int>(sizeof(W));
  constexpr int kXBytes = kRows * kClusterChunk;
  Slot slot;
  int tile = 0, chunk = 0;
  const auto request = [&] {
    BarrierArriveExpecting(s.full + slot.index, kClusterStageBytes);
    CopyBox(s.ring + slot.index * kClusterStageBytes, &p.weights,
            (work.first_chunk + chunk) * kElements, (work.first_tile + tile) * kClusterTile,
            s.full + slot.index);
    slot.Advance(p.stages);
    if (++chunk == work.chunks) chunk = 0, ++tile;
  };
  const int total = work.tiles * work.chunks, early = min(p.stages, total);
  for (int i = 0; i < early; ++i) request();
  PrefetchMap(&p.x);
  WaitForPrevious();
  BarrierArriveExpecting(s.x_full, work.chunks * kXBytes);
  for (int c = 0; c < work.chunks; ++c)
    CopyBox(s.x + c * kXBytes, &p.x, (work.first_chunk + c) * kElements, 0, s.x_full);
  for (int i = early; i < total; ++i) {
    ClusterBarrierWait(s.empty + slot.index, slot.parity ^ 1);
    request();
  }
}

template <int kRows>
inline constexpr int kSumBytes = ClusterGroups(kRows) * kClusterTile* kRows * 4;  // of a tile
template <int kRows>
inline constexpr int kSumFloats =
    ClusterGroups(kRows) * kClusterTile* ClusterSumStride(kRows);  // of a buffer

// One of the threads that multiply.
template <typename W, int kRows>
class Multiplier {
 public:
  __device__ __forceinline__ Multiplier(const ClusterParams& p, const Shared& s, const Work& work,
                                        int rank)
      : p_(p), s_(s), work_(work), rank_(rank) {}

  __device__ __forceinline__ void Run() {
    ClusterBarrierWait(s_.x_full, 0);
    for (int t = 0; t < work_.tiles; ++t) {
      float sum[kSums] = {};
      Multiply(sum);
      if (t > 1) ClusterBarrierWaitRemote(s_.freed + (t & 1), (t >> 1 & 1) ^ 1);
      Send(t, sum);
    }
  }

 private:
  static constexpr int kGroups = ClusterGroups(kRows);
  static constexpr int kSums = kRows / 2;  // a thread's
  static constexpr int kStride = ClusterSumStride(kRows);
  static constexpr int kSteps = kClusterChunk / 32;

  // This warpgroup's part of the next tile.
  __device__ __forceinline__ void Multiply(float (&sum)[kSums]) {
    int unread = -1;  // a slot whose products may still run
    Pin(sum);
    for (int c = 0; c < work_.chunks; ++c, slot_.Advance(p_.stages)) {
      if (c % kGroups != group_) continue;
      ClusterBarrierWait(s_.full + slot_.index, slot_.parity);
      const uint64_t a =
          MatrixDescriptor(SharedAddress(s_.ring + slot_.index * kClusterStageBytes));
      const uint64_t b = MatrixDescriptor(SharedAddress(s_.x + c * (kRows * kClusterChunk)));
      if constexpr (sizeof(W) == 1) {
        float part[kSums] = {};
        Pin(part);
        Start(part, a, b);
        ProductsAwait<0>();
        Pin(part);
#pragma unroll
        for (int i = 0; i < kSums; ++i) sum[i] += part[i];
        Release(slot_.index);
      } else {
        Start(sum, a, b);
        ProductsAwait<1>();
        if (unread >= 0) Release(unread);
        unread = slot_.index;
      }
    }
    if constexpr (sizeof(W) != 1) {
      ProductsAwait<0>();
      Pin(sum);
      if (unread >= 0) Release(unread);
    }
  }
  static __device__ __forceinline__ void Start(float (&sum)[kSums], uint64_t a, uint64_t b) {
    ProductsFence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) Product<W>(sum, a + 2 * k, b + 2 * k, 1);
    ProductsCommit();
  }
  __device__ __forceinline__ void Release(int slot) {
    if (lane_ == 0) BarrierArrive(s_.empty + slot);
  }

  // A warp has 16 rows of the tile: rows g and g + 8 of a lane, by pairs of columns.
  __device__ __forceinline__ void Send(int t, const float (&sum)[kSums]) {
    const int rows_log2 = 6 - p_.split_log2, rows = 1 << rows_log2;
    const int source = rank_ * kGroups + group_, g = lane_ / 4, q = lane_ % 4;
    const uint32_t base = SharedAddress(s_.sums + (t & 1) * kSumFloats<kRows>);
    const uint32_t barrier = SharedAddress(s_.received + (t & 1));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_ * 16 + half * 8 + g, owner = row >> rows_log2;
      const int at = (source * rows + (row & (rows - 1))) * kStride + 2 * q;
      const uint32_t to = AddressIn(base + at * 4, owner), count = AddressIn(barrier, owner);
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j)
        StoreRemote(to + j * 32, sum[4 * j + 2 * half], sum[4 * j + 2 * half + 1], count);
    }
  }

  const ClusterParams& p_;
  const Shared& s_;
  const Work& work_;
  const int rank_;
  const int group_ = static_cast<int>(threadIdx.x) / 128;
  const int warp_ = static_cast<int>(threadIdx.x) % 128 / 32;
  const int lane_ = static_cast<int>(threadIdx.x) % 32;
  Slot slot_;
};

// One of the threads that finish: it has a weight row of the block's part of each tile,
// and every 128 / rows-th row of x.
template <typename W, typename T, int kRows>
class Finisher {
 public:
  __device__ __forceinline__ Finisher(const ClusterParams& p, const Shared& s, const Work& work,
                                      int rank)
      : p_(p), s_(s), work_(work), rank_(rank) {}

  __device__ __forceinline__ void Run() {
    WaitForPrevious();
    if constexpr (sizeof(W) == 1) {
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        const int m = first_m_ + j * step_m_;
        x_scale_[j] = m < p_.m ? __ldcg(p_.x_scales + m) : 0.0f;
      }
    }
    for (int t = 0; t < work_.tiles; ++t) Finish(t);
  }

 private:
  static constexpr int kItems = kRows / 4;  // of at most 32 rows a block
  static constexpr int kStride = ClusterSumStride(kRows);

  __device__ __forceinline__ void Finish(int t) {
    const int r = (work_.first_tile + t) * kClusterTile + (rank_ << rows_log2_) + at_;
    const bool exists = r < p_.n;
    // Constants, on their way during the wait.
    const float weight_scale = sizeof(W) == 1 && exists ? __ldg(p_.weight_scales + r) : 1.0f;
    const float bias =
        p_.bias != nullptr && exists ? ToFloat(static_cast<const T*>(p_.bias)[r]) : 0.0f;
    ClusterBarrierWaitRemote(s_.received + (t & 1), t >> 1 & 1);
    const bool again = t + 2 < work_.tiles;  // else nobody waits for the buffer
    if (again && tid_ == 0) BarrierArriveExpecting(s_.received + (t & 1), kSumBytes<kRows>);
    const float* sums = s_.sums + (t & 1) * kSumFloats<kRows>;
    float v[kItems];
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int m = first_m_ + j * step_m_;
      v[j] = m < p_.m ? Total(sums, m) : 0.0f;
    }
    if (again) {
      asm volatile("bar.sync 1, 128;" ::: "memory");
      if (tid_ < 1 << p_.split_log2)
        ArriveRemote(AddressIn(SharedAddress(s_.freed + (t & 1)), tid_));
    }
    if constexpr (sizeof(W) == 1) {
#pragma unroll
      for (int j = 0; j < kItems; ++j) v[j] *= weight_scale * x_scale_[j];
    }
    if (p_.epilogue == GemvEpilogue::kSiluGate || p_.epilogue == GemvEpilogue::kGeluGate) {
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        const int m = first_m_ + j * step_m_;
        const float up = __shfl_xor_sync(~0u, v[j], 1);  // of the row after a gate's
        // n is even: both rows of a gate exist or neither.
        if (at_ % 2 == 0 && exists && m < p_.m)
          static_cast<T*>(p_.out)[m * p_.out_stride + r / 2] =
              FromFloat<T>(Gated(p_.epilogue, v[j], up));
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int m = first_m_ + j * step_m_;
      if (!exists || m >= p_.m) continue;
      if (p_.epilogue == GemvEpilogue::kLogits) {
        static_cast<float*>(p_.out)[m * p_.out_stride + r] = v[j];
      } else {
        static_cast<T*>(p_.out)[m * p_.out_stride + r] = FromFloat<T>(v[j] + bias);
      }
    }
  }

  // What all warpgroups of the cluster have for column m of x.
  __device__ __forceinline__ float Total(const float* sums, int m) const {
    const int sources = ClusterGroups(kRows) << p_.split_log2;
    float total = 0.0f;
#pragma unroll 4
    for (int s = 0; s < sources; ++s) total += sums[((s << rows_log2_) + at_) * kStride + m];
    return total;
  }

  const ClusterParams& p_;
  const Shared& s_;
  const Work& work_;
  const int rank_;
  const int tid_ = static_cast<int>(threadIdx.x) % 128;
  const int rows_log2_ = 6 - p_.split_log2;
  const int at_ = tid_ & ((1 << rows_log2_) - 1);
  const int first_m_ = tid_ >> rows_log2_, step_m_ = 128 >> rows_log2_;
  float x_scale_[kItems] = {};
};

}  // namespace cluster

template <typename W, typename T, int kRows>
__global__ void __launch_bounds__(ClusterThreads(kRows), 1)
    SkinnyClusterKernel(const __grid_constant__ ClusterParams p) {
#if __CUDA_ARCH__ == 900
  constexpr int kGroups = ClusterGroups(kRows);
  extern __shared__ uint8_t raw[];
  TriggerDependents();
  const cluster::Shared s(raw + (1024 - SharedAddress(raw) % 1024) % 1024, kRows, p);
  const int rank = static_cast<int>(ClusterRank());
  const cluster::Work work = cluster::WorkOf(p, rank);
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; ++i) {
      BarrierInit(s.full + i, 1);
      BarrierInit(s.empty + i, 4);
    }
    BarrierInit(s.x_full, 1);
    for (int i = 0; i < 2; ++i) {
      BarrierInit(s.received + i, 1);
      BarrierInit(s.freed + i, 1 << p.split_log2);
      BarrierArriveExpecting(s.received + i, cluster::kSumBytes<kRows>);
    }
    FenceBarrierInit();
  }
  __syncthreads();
  ClusterArrive();
  const int warpgroup = static_cast<int>(threadIdx.x) / 128;
  if (warpgroup == kGroups + 1) {
    if (threadIdx.x % 32 == 0) cluster::Produce<W, kRows>(p, s, work);
    __syncwarp();
    ClusterAwait();
    return;
  }
  ClusterAwait();  // every block's barriers exist
  if (warpgroup < kGroups) {
    cluster::Multiplier<W, kRows>(p, s, work, rank).Run();
  } else {
    cluster::Finisher<W, T, kRows>(p, s, work, rank).Run();
  }
#endif
}

template <typename W, typename T, typename Fn>
cudaError_t WithClusterKernel(int rows, Fn fn) {
  return rows == 16   ? fn(SkinnyClusterKernel<W, T, 16>)
         : rows == 32 ? fn(SkinnyClusterKernel<W, T, 32>)
                      : fn(SkinnyClusterKernel<W, T, 64>);
}

// clusters[split] becomes the least of how many clusters of so many blocks there can
// be at a time.
template <typename W, typename T>
cudaError_t InitCluster(int (&clusters)[kMaxClusterSplit + 1]) {
  for (int rows : {16, 32, 64}) {
    const cudaError_t status = WithClusterKernel<W, T>(rows, [&](auto* kernel) {
      cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               static_cast<int>(kMaxClusterShared));
      // An SM that changes how it divides its memory first runs empty.
      if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     cudaSharedmemCarveoutMaxShared);
      }
      for (unsigned split = 2; split <= kMaxClusterSplit && error == cudaSuccess; split *= 2) {
        cudaLaunchAttribute attribute = {};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {split, 1, 1};
        cudaLaunchConfig_t config = {};
        config.gridDim = split * 1024;
        config.blockDim = ClusterThreads(rows);
        config.dynamicSmemBytes = kMaxClusterShared;
        config.attrs = &attribute;
        config.numAttrs = 1;
        int count = 0;
        error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
        clusters[split] = std::min(clusters[split], count);
      }
      return error;
    });
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

template <typename W, typename T>
cudaError_t LaunchCluster(const Launch& launch, int rows, int blocks, size_t shared_bytes,
                          const ClusterParams& params) {
  return WithClusterKernel<W, T>(rows, [&](auto* kernel) {
    return LaunchKernel(launch, kernel, blocks, ClusterThreads(rows), shared_bytes,
                        1u << params.split_log2, params);
  });
}

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_SKINNY_CLUSTER_CUH_
