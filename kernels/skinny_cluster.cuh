// The product with 2 to 64 rows in clusters. A cluster owns a stretch of tiles of 64
// weight rows, and each of its S blocks a part of K:
//
//              K: | block 0 | block 1 | ...      a stage: 64 rows x 128 bytes, by the copy
//   64 rows:      |=-=-=-=-=|=-=-=-=-=| ...      engine, swizzled as wgmma wants it
//
//   producer warp: fills the ring with weights, waits for the kernel ahead, fetches the
//     block's part of x, which stays, then goes on filling
//   one or two warpgroups, taking turns at the stages: products to fp32 sums in registers
//
// The sums of a tile go to the block that owns the row (64 / S of them each), by its
// shared memory; that block adds what came from all warpgroups, in order, and finishes
// the outputs while the next tile streams in (Send, Finish).
//
// Two buffers of sums are enough: a block sends tile t after it has received t - 1 from
// every block, each of which sent it after all of its warps had finished t - 2.
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
  uint64_t *full, *empty, *x_full, *received;

  __device__ __forceinline__ Shared(uint8_t* base, int rows, const ClusterParams& p) {
    const ClusterLayout layout(rows, p.stages, p.x_chunks);
    ring = base;
    x = base + layout.x;
    sums = reinterpret_cast<float*>(base + layout.sums);
    full = reinterpret_cast<uint64_t*>(base + layout.barriers);
    empty = full + kMaxClusterStages;
    x_full = empty + kMaxClusterStages;
    received = x_full + 1;
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

// One of the threads that multiply.
template <typename W, typename T, int kRows>
class Consumer {
 public:
  static constexpr int kGroups = ClusterGroups(kRows);
  static constexpr int kThreads = kGroups * 128;

  __device__ __forceinline__ Consumer(const ClusterParams& p, const Shared& s, const Work& work,
                                      int rank)
      : p_(p), s_(s), work_(work), rank_(rank) {}

  __device__ __forceinline__ void Run() {
    WaitForPrevious();
    ClusterBarrierWait(s_.x_full, 0);
    for (int t = 0; t < work_.tiles; ++t) {
      float sum[kSums] = {};
      Multiply(sum);
      if (t > 0) Finish(t - 1);
      asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
      if (t == 0) ClusterAwait();  // every block's barriers exist
      Send(t, sum);
    }
    Finish(work_.tiles - 1);
  }

 private:
  static constexpr int kSums = kRows / 2;  // a thread's
  static constexpr int kStride = ClusterSumStride(kRows);
  static constexpr int kBuffer = kGroups * kClusterTile * kStride;

  // This warpgroup's part of the next tile.
  __device__ __forceinline__ void Multiply(float (&sum)[kSums]) {
    constexpr int kSteps = kClusterChunk / 32;
    for (int c = 0; c < work_.chunks; ++c, slot_.Advance(p_.stages)) {
      if (c % kGroups != group_) continue;
      ClusterBarrierWait(s_.full + slot_.index, slot_.parity);
      const uint64_t a =
          MatrixDescriptor(SharedAddress(s_.ring + slot_.index * kClusterStageBytes));
      const uint64_t b = MatrixDescriptor(SharedAddress(s_.x + c * (kRows * kClusterChunk)));
      if constexpr (sizeof(W) == 1) {
        float part[kSums] = {};
        MultiplySteps<kSteps>(part, a, b);
#pragma unroll
        for (int i = 0; i < kSums; ++i) sum[i] += part[i];
      } else {
        MultiplySteps<kSteps>(sum, a, b);
      }
      if (lane_ == 0) BarrierArrive(s_.empty + slot_.index);
    }
  }
  template <int kSteps>
  static __device__ __forceinline__ void MultiplySteps(float (&sum)[kSums], uint64_t a,
                                                       uint64_t b) {
    Pin(sum);
    ProductsFence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) Product<W>(sum, a + 2 * k, b + 2 * k, 1);
    ProductsCommit();
    ProductsAwait();
    Pin(sum);
  }

  // A warp has 16 rows of the tile: rows g and g + 8 of a lane, by pairs of columns.
  __device__ __forceinline__ void Send(int t, const float (&sum)[kSums]) {
    const int rows_log2 = 6 - p_.split_log2, rows = 1 << rows_log2;
    const int source = rank_ * kGroups + group_, g = lane_ / 4, q = lane_ % 4;
    const uint32_t base = SharedAddress(s_.sums + (t & 1) * kBuffer);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_ * 16 + half * 8 + g;
      const int at = (source * rows + (row & (rows - 1))) * kStride + 2 * q;
      const uint32_t to = AddressIn(base + at * 4, row >> rows_log2);
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j)
        StoreRemote(to + j * 32, sum[4 * j + 2 * half], sum[4 * j + 2 * half + 1]);
    }
    __syncwarp();
    // Of eight rows a block, a warp has two blocks'.
    const uint32_t barrier = SharedAddress(s_.received + (t & 1));
    if (lane_ == 0 || (lane_ == 1 && rows == 8))
      ArriveRemote(AddressIn(barrier, (warp_ * 16 + lane_ * 8) >> rows_log2));
  }

  // The outputs of this block's rows of tile t.
  __device__ __forceinline__ void Finish(int t) {
    const int rows_log2 = 6 - p_.split_log2;
    ClusterBarrierWaitRemote(s_.received + (t & 1), t >> 1 & 1);
    const float* sums = s_.sums + (t & 1) * kBuffer;
    const int first = (work_.first_tile + t) * kClusterTile + (rank_ << rows_log2);
    const bool gate =
        p_.epilogue == GemvEpilogue::kSiluGate || p_.epilogue == GemvEpilogue::kGeluGate;
    const int width_log2 = gate ? rows_log2 - 1 : rows_log2;
    for (int i = static_cast<int>(threadIdx.x); i < p_.m << width_log2; i += kThreads) {
      const int m = i >> width_log2, at = i & ((1 << width_log2) - 1);
      if (gate) {  // n is even: both rows of a gate exist or neither
        const int r = first + 2 * at;
        if (r >= p_.n) continue;
        const float g = Total(sums, 2 * at, r, m), u = Total(sums, 2 * at + 1, r + 1, m);
        static_cast<T*>(p_.out)[m * p_.out_stride + r / 2] = FromFloat<T>(Gated(p_.epilogue, g, u));
        continue;
      }
      const int r = first + at;
      if (r >= p_.n) continue;
      float v = Total(sums, at, r, m);
      if (p_.epilogue == GemvEpilogue::kLogits) {
        static_cast<float*>(p_.out)[m * p_.out_stride + r] = v;
        continue;
      }
      if (p_.bias != nullptr) v += ToFloat(static_cast<const T*>(p_.bias)[r]);
      static_cast<T*>(p_.out)[m * p_.out_stride + r] = FromFloat<T>(v);
    }
  }

  // `at`: weight row r among the block's; column m of x.
  __device__ __forceinline__ float Total(const float* sums, int at, int r, int m) const {
    const int rows = kClusterTile >> p_.split_log2, sources = kGroups << p_.split_log2;
    float total = 0.0f;
#pragma unroll 4
    for (int s = 0; s < sources; ++s) total += sums[(s * rows + at) * kStride + m];
    if constexpr (sizeof(W) == 1) total *= __ldg(p_.weight_scales + r) * __ldcg(p_.x_scales + m);
    return total;
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
    // Of each warpgroup of the cluster, the warps that have rows of this block.
    const int senders = kGroups * max(4, 1 << p.split_log2);
    BarrierInit(s.received, senders);
    BarrierInit(s.received + 1, senders);
    FenceBarrierInit();
  }
  __syncthreads();
  ClusterArrive();
  if (threadIdx.x >= kGroups * 128) {
    if (threadIdx.x == kGroups * 128) cluster::Produce<W, kRows>(p, s, work);
    __syncwarp();
    ClusterAwait();
  } else {
    cluster::Consumer<W, T, kRows>(p, s, work, rank).Run();
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
