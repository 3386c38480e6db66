// The product with 2 to 64 rows in clusters. A cluster owns a stretch of tiles of 64
// weight rows, and each of its S blocks a part of K:
//
//              K: | block 0 | block 1 | ...      a stage: 64 rows x 128 bytes, by the copy
//   64 rows:      |=-=-=-=-=|=-=-=-=-=| ...      engine, swizzled as wgmma wants it
//
//   two producer warps: fill the ring with weights, a stage each in turns
//   two warpgroups, taking turns at the stages: products to fp32 sums in registers. One alone
//     takes about as long for a stage as it takes to arrive, and would never catch up with
//     what the ring has saved before x came. Then one gives its sums to the other, which
//     sends them to the block that owns the row (64 / S of a tile each), by its memory
//   a warpgroup that finishes: waits for the kernel ahead and asks for the block's part of x,
//     which stays (those who multiply do, where they have to quantise it first); adds what
//     came from all, in order; epilogue
//
// Nobody waits for what is sent: it counts itself at the barrier of its receiver, which
// gives a buffer of sums free when it has read it (two buffers, a warpgroup's each).
//
// Bytes moved: n * k * sizeof(W); of x, m * k * sizeof(W) / S from L2 a block.
// Checked against a double reference in tests/kernels/skinny_cluster_test.cu.
#ifndef LOCKSTEP_KERNELS_SKINNY_CLUSTER_CUH_
#define LOCKSTEP_KERNELS_SKINNY_CLUSTER_CUH_

#include "kernels/exchange.cuh"
#include "kernels/gemv_elements.cuh"
#include "kernels/skinny_cluster_block.cuh"
#include "kernels/skinny_cluster_mma.cuh"
#include "kernels/skinny_cluster_plan.h"
#include "kernels/skinny_cluster_staging.cuh"

namespace lockstep::kernels {
namespace cluster {

// By one thread for each warpgroup that multiplies: its stages.
//
// Not all that the ring has room for at once: what others ask for, x and the words of the kernel
// ahead, would have to wait behind it for microseconds.
template <typename W>
__device__ __forceinline__ void Produce(const ClusterParams& p, const Shared& s, const Work& work,
                                        int group) {
  constexpr int kElements = kClusterChunk / static_cast<int>(sizeof(W));
  int slot = group, tile = 0, chunk = group, oldest = group;
  uint32_t parity = 0, oldest_parity = 0;
  const auto advance = [&](int& at, uint32_t& phase) {
    at += kClusterGroups;
    if (at >= p.stages) at -= p.stages, phase ^= 1;
  };
  const int total = work.tiles * work.chunks;
  // Not above the ring: the oldest one's barrier would be waited for by a parity that comes again.
  const int window = min(p.stages, kClusterGroups * kClusterWindow);
  for (int i = group; i < total; i += kClusterGroups) {
    if (i >= window) {
      AwaitBarrier(s.full + oldest, oldest_parity);
      advance(oldest, oldest_parity);
    }
    if (i >= p.stages) AwaitBarrier(s.empty + slot, parity ^ 1);
    for (; chunk >= work.chunks; chunk -= work.chunks) ++tile;
    BarrierArriveExpecting(s.full + slot, kClusterStageBytes);
    CopyBox(s.ring + slot * kClusterStageBytes, &p.weights, (work.first_chunk + chunk) * kElements,
            (work.first_tile + tile) * kClusterTile, s.full + slot);
    chunk += kClusterGroups;
    advance(slot, parity);
  }
}

// By one thread, once the kernel ahead has ended: x, in parts to be begun with early.
template <typename W, int kRows>
__device__ __forceinline__ void RequestX(const ClusterParams& p, const Shared& s,
                                         const Work& work) {
  constexpr int kElements = kClusterChunk / static_cast<int>(sizeof(W));
  constexpr int kXBytes = kRows * kClusterChunk;
  for (int first = 0; first < work.chunks; first += p.x_part) {
    uint64_t* const full = s.x_full + first / p.x_part;
    if (p.x_boxed) {
      BarrierArriveExpecting(full, p.x_part * kXBytes);
      CopyBox(s.x + first * kXBytes, &p.x, 0, 0, work.first_chunk + first, full);
      continue;
    }
    const int end = min(work.chunks, first + p.x_part);
    BarrierArriveExpecting(full, (end - first) * kXBytes);
    for (int c = first; c < end; ++c)
      CopyBox(s.x + c * kXBytes, &p.x, (work.first_chunk + c) * kElements, 0, full);
  }
}

template <int kRows>
inline constexpr int kSumBytes = kClusterTile* kRows * 4;  // of a tile
template <int kRows>
inline constexpr int kSumFloats = kClusterTile* ClusterSumStride(kRows);  // of a buffer

// One of the threads that multiply.
template <typename W, int kRows>
class Multiplier {
 public:
  __device__ __forceinline__ Multiplier(const ClusterParams& p, const Shared& s, const Work& work)
      : p_(p), s_(s), work_(work) {}

  __device__ __forceinline__ void Run() {
    for (int t = 0; t < work_.tiles; ++t) {
      float sum[kSums] = {};
      Multiply(sum);
      // Who takes is the next to give: what it has read it may overwrite.
      if ((t & 1) != group_) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) s_.given[i * 128 + tid_] = sum[i];
        NamedArrive(kGiven + (t & 1), 256);
        continue;
      }
      NamedSync(kGiven + (t & 1), 256);
#pragma unroll
      for (int i = 0; i < kSums; ++i) sum[i] += s_.given[i * 128 + tid_];
      if (t >= 2) AwaitBarrier(s_.freed + group_, (t >> 1 & 1) ^ 1);
      if constexpr (kMayStage) {
        if (p_.unquantized_x != nullptr) Scale(sum);
      }
      HandOver(sum);
    }
  }

 private:
  static constexpr bool kMayStage = sizeof(W) == 1 && kRows == kMaxStagedRows;
  static constexpr int kSums = kRows / 2;  // a thread's
  static constexpr int kStride = ClusterSumStride(kRows);
  static constexpr int kSteps = kClusterChunk / 32;
  // Of e4m3, after which the tensor cores' sums, of fewer bits, go to fp32's.
  static constexpr int kExactChunks = 4 * kClusterGroups;

  // Of a tile's stages every second. A ring's are even: so a slot is always the same
  // warpgroup's, and none mistakes what it holds for what it held a turn before.
  __device__ __forceinline__ void Multiply(float (&sum)[kSums]) {
    int c = first_ ^ group_;
    first_ = (first_ + work_.chunks) & 1;
    if constexpr (sizeof(W) == 1) {
      for (int end = kExactChunks; c < work_.chunks; end += kExactChunks) {
        float part[kSums] = {};
        Add(c, min(end, work_.chunks), part);
#pragma unroll
        for (int i = 0; i < kSums; ++i) sum[i] += part[i];
      }
    } else {
      Add(c, work_.chunks, sum);
    }
  }
  // Chunks c, c + 2, ... below `end`.
  __device__ __forceinline__ void Add(int& c, int end, float (&sum)[kSums]) {
    int unread = -1;  // a slot whose products may still run
    Pin(sum);
    for (; c < end; c += kClusterGroups) {
      while (c >= x_next_) AwaitBarrier(x_full_++, 0), x_next_ += p_.x_part;
      AwaitBarrier(s_.full + slot_, parity_);
      const uint32_t a = ring_at_ + slot_ * (kClusterStageBytes >> 4);
      const uint32_t b = x_at_ + c * (kRows * kClusterChunk >> 4);
      Start(sum, a, b);
      ProductsAwait<1>();
      if (unread >= 0) Release(unread);
      unread = slot_;
      slot_ += kClusterGroups;
      if (slot_ >= p_.stages) slot_ -= p_.stages, parity_ ^= 1;
    }
    ProductsAwait<0>();
    Pin(sum);
    if (unread >= 0) Release(unread);
  }
  static __device__ __forceinline__ void Start(float (&sum)[kSums], uint32_t a, uint32_t b) {
    ProductsFence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
      Product<W>(sum, MatrixDescriptor(a + 2 * k), MatrixDescriptor(b + 2 * k), 1);
    ProductsCommit();
  }
  __device__ __forceinline__ void Release(int slot) {
    if (lane_ == 0) BarrierArrive(s_.empty + slot);
  }

  __device__ __forceinline__ void Scale(float (&sum)[kSums]) const {
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      const float2 factor = *reinterpret_cast<const float2*>(s_.factors + 8 * j + lane_ % 4 * 2);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[4 * j + 2 * half] *= factor.x;
        sum[4 * j + 2 * half + 1] *= factor.y;
      }
    }
  }

  // A warp has 16 rows of the tile: rows g and g + 8 of a lane, by pairs of columns, of
  // which two that are 8 apart go together. So the receiver's columns 4 i to 4 i + 3 are
  // rows m, m + 1, m + 8 and m + 9 of x: Finisher::RowOf.
  __device__ __forceinline__ void HandOver(const float (&sum)[kSums]) {
    const int rows_log2 = 6 - p_.split_log2, rows = 1 << rows_log2, rank = ClusterRank();
    const int g = lane_ / 4, q = lane_ % 4;
    const uint32_t base = SharedAddress(s_.sums + group_ * kSumFloats<kRows>);
    const uint32_t barrier = SharedAddress(s_.received + group_);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_ * 16 + half * 8 + g, owner = row >> rows_log2;
      const int at = (rank * rows + (row & (rows - 1))) * kStride + 4 * q;
      const uint32_t to = AddressIn(base + at * 4, owner), count = AddressIn(barrier, owner);
#pragma unroll
      for (int j = 0; j < kRows / 8; j += 2)
        SendRemote(to + j * 32,
                   make_float4(sum[4 * j + 2 * half], sum[4 * j + 2 * half + 1],
                               sum[4 * j + 4 + 2 * half], sum[4 * j + 4 + 2 * half + 1]),
                   count);
    }
  }

  const ClusterParams& p_;
  const Shared& s_;
  const Work& work_;
  // The same in all lanes, which the compiler cannot see otherwise: a product wants its
  // operands' places so.
  const int group_ = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  const uint32_t ring_at_ = __shfl_sync(~0u, MatrixAt(s_.ring), 0);
  const uint32_t x_at_ = __shfl_sync(~0u, MatrixAt(s_.x), 0);
  const int tid_ = static_cast<int>(threadIdx.x) % 128;
  const int warp_ = tid_ / 32;
  const int lane_ = static_cast<int>(threadIdx.x) % 32;
  // The chunk of x that has not been waited for.
  int x_next_ = kMayStage && p_.unquantized_x != nullptr ? work_.chunks : 0;
  uint64_t* x_full_ = s_.x_full;
  int first_ = 0;  // the warpgroup that has the next tile's first stage
  int slot_ = group_;
  uint32_t parity_ = 0;
};

// One of the threads that finish: it has items of a weight row and four rows of x.
template <typename W, typename T, int kRows>
class Finisher {
 public:
  __device__ __forceinline__ Finisher(const ClusterParams& p, const Shared& s, const Work& work,
                                      int rank)
      : p_(p), s_(s), work_(work), rank_(rank) {}

  __device__ __forceinline__ void Run() {
    Constants next = ConstantsOf(0);
    if (tid_ == 0) PrefetchMap(&p_.x);
    WaitForPrevious();
    if (tid_ == 0 && p_.unquantized_x == nullptr) RequestX<W, kRows>(p_, s_, work_);
    __syncwarp();
    if constexpr (kMayPush) {
      if (p_.epilogue == GemvEpilogue::kPush)
        push_at_ = (ExchangeNumber(p_.push.counter) & 1) * p_.push.slot_bytes;
    }
    if constexpr (sizeof(W) == 1) {
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int m = RowOf(j, i);
          x_scale_[j][i] = m >= p_.m                ? 0.0f
                           : p_.x_scales == nullptr ? 1.0f
                                                    : __ldcg(p_.x_scales + m);
        }
      }
    }
    for (int t = 0; t < work_.tiles; ++t) {
      const Constants constants = next;
      next = ConstantsOf(t + 1);
      Finish(t, constants);
    }
  }

 private:
  static constexpr bool kMayPush = kRows <= kMaxPushedRows;
  static constexpr int kItems = kRows / 16;  // of at most 32 weight rows a block
  static constexpr int kStride = ClusterSumStride(kRows);

  __device__ __forceinline__ int FirstRow(int item) const {
    return ((tid_ + 128 * item) >> rows_log2_) * 4;
  }
  __device__ __forceinline__ int RowOf(int item, int i) const {
    const int first = FirstRow(item);
    return first / 16 * 16 + first % 16 / 2 + i / 2 * 8 + i % 2;
  }

  // Of a tile's weight row, asked for a tile ahead: behind the weights that stream, an
  // answer takes microseconds.
  struct Constants {
    float weight_scale = 1.0f, bias = 0.0f;
  };
  __device__ __forceinline__ int RowOfTile(int t) const {
    return (work_.first_tile + t) * kClusterTile + (rank_ << rows_log2_) + at_;
  }
  __device__ __forceinline__ Constants ConstantsOf(int t) const {
    Constants c;
    const int r = RowOfTile(t);
    if (t >= work_.tiles || r >= p_.n) return c;
    if (sizeof(W) == 1) c.weight_scale = __ldg(p_.weight_scales + r);
    if (p_.bias != nullptr) c.bias = ToFloat(static_cast<const T*>(p_.bias)[r]);
    return c;
  }

  __device__ __forceinline__ void Finish(int t, const Constants& constants) {
    const int r = RowOfTile(t), buffer = t & 1;
    AwaitBarrier(s_.received + buffer, t >> 1 & 1);
    float v[kItems][4] = {};
    const bool again = t + 2 < work_.tiles;  // else nobody waits for the buffer
    if (again && tid_ == 0) BarrierArriveExpecting(s_.received + buffer, kSumBytes<kRows>);
    const float* sums = s_.sums + buffer * kSumFloats<kRows> + at_ * kStride;
#pragma unroll 4
    for (int s = 0; s < 1 << p_.split_log2; ++s) {
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        if (FirstRow(j) >= kRows) continue;
        const float4 part =
            *reinterpret_cast<const float4*>(sums + (s << rows_log2_) * kStride + FirstRow(j));
        v[j][0] += part.x, v[j][1] += part.y, v[j][2] += part.z, v[j][3] += part.w;
      }
    }
    if (again) {
      NamedSync(kFinished, 128);
      if (tid_ < 1 << p_.split_log2)
        ArriveRemote(AddressIn(SharedAddress(s_.freed + buffer), tid_));
    }
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if constexpr (sizeof(W) == 1) {
#pragma unroll
        for (int i = 0; i < 4; ++i) v[j][i] *= constants.weight_scale * x_scale_[j][i];
      }
      if (IsGate(p_.epilogue)) {
        StoreGated(j, r, v[j]);
      } else if (kMayPush && p_.epilogue == GemvEpilogue::kPush) {
        Push(j, r, v[j]);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) Store(RowOf(j, i), r, v[j][i] + constants.bias);
      }
    }
  }

  __device__ __forceinline__ void Store(int m, int r, float v) const {
    if (r >= p_.n || m >= p_.m) return;
    const int64_t at = m * p_.out_stride + r;
    if (p_.epilogue == GemvEpilogue::kLogits) {
      static_cast<float*>(p_.out)[at] = v;
    } else {
      static_cast<T*>(p_.out)[at] = FromFloat<T>(v);
    }
  }

  // By all lanes of a warp: four neighbours have as many columns of four rows of x, and each comes
  // to have all of them of one row, 8 bytes, which it sends to every rank, its own last.
  __device__ __forceinline__ void Push(int item, int r, const float (&v)[4]) const {
    const bool odd = at_ % 2 != 0, second = at_ / 2 % 2 != 0;
    const float a = __shfl_xor_sync(~0u, odd ? v[0] : v[2], 1);
    const float b = __shfl_xor_sync(~0u, odd ? v[1] : v[3], 1);
    const uint32_t first_row = odd ? PackPair<T>(a, v[2]) : PackPair<T>(v[0], a);
    const uint32_t second_row = odd ? PackPair<T>(b, v[3]) : PackPair<T>(v[1], b);
    const uint32_t other = __shfl_xor_sync(~0u, second ? first_row : second_row, 2);
    const int m = RowOf(item, 2 * odd + second);
    if (r >= p_.n || m >= p_.m) return;
    const uint2 words =
        Sendable(second ? make_uint2(other, second_row) : make_uint2(first_row, other));
    const size_t to = push_at_ + (static_cast<size_t>(m) * p_.n + r / 4 * 4) * sizeof(T);
#pragma unroll 1
    for (int turn = 1; turn <= p_.push.size; ++turn) {
      const int rank = p_.push.rank + turn;
      StoreSystem(reinterpret_cast<uint2*>(
                      p_.push.to[rank < p_.push.size ? rank : rank - p_.push.size] + to),
                  words);
    }
  }

  // By all lanes of a warp. An even lane has gates of four rows of x, the next their ups:
  // two of the rows are done by one, two by the other.
  __device__ __forceinline__ void StoreGated(int item, int r, const float (&v)[4]) const {
    const bool odd = at_ % 2 != 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float other = __shfl_xor_sync(~0u, odd ? v[i] : v[2 + i], 1);
      const float gate = odd ? other : v[i], up = odd ? v[2 + i] : other;
      const int m = RowOf(item, odd ? 2 + i : i);
      // n is even: both rows of a gate exist or neither.
      if (r < p_.n && m < p_.m)
        static_cast<T*>(p_.out)[m * p_.out_stride + r / 2] =
            FromFloat<T>(Gated(p_.epilogue, gate, up));
    }
  }

  const ClusterParams& p_;
  const Shared& s_;
  const Work& work_;
  const int rank_;
  const int tid_ = static_cast<int>(threadIdx.x) % 128;
  const int rows_log2_ = 6 - p_.split_log2;
  const int at_ = tid_ & ((1 << rows_log2_) - 1);
  float x_scale_[kItems][4] = {};
  size_t push_at_ = 0;  // the slot
};

}  // namespace cluster

template <typename W, typename T, int kRows>
__global__ void __launch_bounds__(kClusterThreads, 1)
    SkinnyClusterKernel(const __grid_constant__ ClusterParams p) {
#if __CUDA_ARCH__ == 900
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
    for (int i = 0; i < kXParts; ++i) BarrierInit(s.x_full + i, 1);
    for (int i = 0; i < kClusterGroups; ++i) {
      BarrierInit(s.received + i, 1);
      BarrierArriveExpecting(s.received + i, cluster::kSumBytes<kRows>);
      BarrierInit(s.freed + i, 1 << p.split_log2);
    }
    FenceBarrierInit();
  }
  __syncthreads();
  ClusterArrive();
  const int warpgroup = static_cast<int>(threadIdx.x) / 128;
  if (warpgroup == kClusterGroups + 1) {
    const int producer = static_cast<int>(threadIdx.x) % 128 / 32;
    if (threadIdx.x % 32 == 0) cluster::Produce<W>(p, s, work, producer);
    __syncwarp();
    ClusterAwait();
  } else {
    ClusterAwait();  // every block's barriers exist
    if (warpgroup < kClusterGroups) {
      if constexpr (sizeof(W) == 1 && kRows == kMaxStagedRows) {
        if (p.unquantized_x != nullptr) cluster::StageQuantized<T>(p, s, work);
      }
      cluster::Multiplier<W, kRows>(p, s, work).Run();
    } else {
      cluster::Finisher<W, T, kRows>(p, s, work, rank).Run();
    }
    __syncwarp();
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
      if (error == cudaSuccess)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
      for (unsigned split = 2; split <= kMaxClusterSplit && error == cudaSuccess; split *= 2) {
        cudaLaunchAttribute attribute = {};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {split, 1, 1};
        cudaLaunchConfig_t config = {};
        config.gridDim = split * 1024;
        config.blockDim = kClusterThreads;
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
    return LaunchKernel(launch, kernel, blocks, kClusterThreads, shared_bytes,
                        1u << params.split_log2, params);
  });
}

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_SKINNY_CLUSTER_CUH_
