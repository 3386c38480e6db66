// How the shares of a row become one result, always in the same order:
//
//   warps of a block       through shared memory
//   blocks of a cluster    each block owns a slice of the result; all send it their
//                          part, into its shared memory
//   clusters (very long    partials in device memory; the last block to arrive
//   contexts only), and    at a slice adds them up
//   blocks that work was
//   dealt out to
//
// A share is (top, sum) of each head, the largest score seen (base 2) and the
// sum of exp2(score - top), and the output weighted the same way.
#ifndef LOCKSTEP_KERNELS_ATTENTION_DECODE_MERGE_CUH_
#define LOCKSTEP_KERNELS_ATTENTION_DECODE_MERGE_CUH_

#include <cmath>

#include "kernels/attention_decode_deal.cuh"
#include "kernels/attention_decode_launch.h"
#include "kernels/attention_mma.cuh"
#include "kernels/cluster.cuh"

namespace lockstep::kernels::decode {

// i / n for i up to 1024, by magic = QuotientMagic(n).
__device__ __forceinline__ int Quotient(int i, uint32_t magic) {
  return static_cast<int>((static_cast<uint32_t>(i) * magic) >> kMagicShift);
}

__device__ __forceinline__ void AddScaled(float4& to, float weight, const float4& v) {
  to.x += weight * v.x;
  to.y += weight * v.y;
  to.z += weight * v.z;
  to.w += weight * v.w;
}

// Where maxima are subtracted: a share that saw nothing then weighs 0, not NaN.
__device__ __forceinline__ float Base(float top) { return top == -INFINITY ? 0.0f : top; }

// Lives in the block's dynamic shared memory, laid out as SharedBytes counts it.
class Merge {
 public:
  // barrier: in the block's shared memory, used by a cluster of several blocks only.
  __device__ __forceinline__ Merge(const Params& p, uint64_t* barrier)
      : p_(p),
        barrier_(barrier),
        quads_(p.group * p.head_dim / 4),
        quads_per_block_(QuadsPerBlock(p.group, p.head_dim, p.cluster_size)) {
    // Copies to what is not a multiple of 128 take up to a quarter longer.
    extern __shared__ __align__(128) unsigned char shared[];
    stash_ = shared;
    query_ = shared + kStashBytes;
    warps_ = query_ + QueryBytes(p.group, p.head_dim);
    warp_statistics_ = reinterpret_cast<float2*>(warps_ + kWarps * p.warp_bytes);
    received_ = reinterpret_cast<float4*>(warp_statistics_ + kWarps * p.group);
    received_statistics_ = reinterpret_cast<float2*>(received_ + p.cluster_size * quads_per_block_);
  }

  // Before the first thing that takes time: the others need to know that the block runs.
  __device__ __forceinline__ void Begin() const {
    if (p_.cluster_size == 1) return;
    if (threadIdx.x == 0) {
      const int mine = max(
          0, min(quads_per_block_, quads_ - static_cast<int>(ClusterRank()) * quads_per_block_));
      BarrierInit(barrier_, 1);
      FenceBarrierInit();
      BarrierArriveExpecting(
          barrier_, p_.cluster_size * mine * static_cast<int>(sizeof(float4) + sizeof(float2)));
    }
    ClusterArrive();
  }

  __device__ __forceinline__ void* stash() const { return stash_; }
  __device__ __forceinline__ void* query() const { return query_; }
  // A warp's own, until it sets its output.
  __device__ __forceinline__ void* ring(int warp) const { return warps_ + warp * p_.warp_bytes; }
  __device__ __forceinline__ void SetWarpStatistics(int warp, int head, float2 s) const {
    warp_statistics_[warp * p_.group + head] = s;
  }
  __device__ __forceinline__ void SetWarpOutput(int warp, int head, int d, float4 v) const {
    *reinterpret_cast<float4*>(WarpOutput(warp, head, d)) = v;
  }

  // Writes the result of a share's place, once every warp has set its part, or leaves that to
  // the block that comes last to it.
  template <typename T>
  __device__ __forceinline__ void Finish(const Share& share) const {
    __shared__ bool others_came;
    int* const arrived = p_.arrived + share.first_block;
    // Usual of the one that has a place's beginning: to the others it was the first they did.
    if (threadIdx.x == 0)
      others_came =
          share.blocks > 1 && share.index == 0 && LoadAcquire(arrived) == share.blocks - 1;
    __syncthreads();
    if (share.blocks > 1) {
      if (others_came) {
        if (threadIdx.x == 0) *arrived = 0;
      } else {
        for (int quad = threadIdx.x; quad < quads_; quad += kThreads) {
          float4 out;
          const float2 s = OfBlock(quad, out);
          const int64_t at = DealtIndex(share, share.index, quad);
          p_.partials[at] = out;
          p_.partial_statistics[at] = s;
        }
        if (!IsLast(arrived, share.blocks)) return;
      }
    }
    for (int quad = threadIdx.x; quad < quads_; quad += kThreads) {
      float4 out;
      float2 all = OfBlock(quad, out);
      if (share.blocks > 1) all = AddShares(share, quad, all, out);
      Store<T>(share.place, quad, all.y, out);
    }
  }

  // Writes the row's result, once every warp has set its share. `clusters` take
  // part.
  template <typename T>
  __device__ __forceinline__ void Finish(const Place& place, int clusters) const {
    __syncthreads();
    if (p_.cluster_size == 1) {
      for (int quad = threadIdx.x; quad < quads_; quad += kThreads) {
        float4 out;
        const float2 s = OfBlock(quad, out);
        SetResult<T>(place, clusters, 0, quad, s, out);
      }
    } else {
      const int rank = static_cast<int>(ClusterRank());
      const uint32_t values = SharedAddress(received_), count = SharedAddress(barrier_);
      const uint32_t statistics = SharedAddress(received_statistics_);
      ClusterAwait();  // all blocks have begun: their shared memory is theirs
      for (int quad = threadIdx.x; quad < quads_; quad += kThreads) {
        float4 out;
        const float2 s = OfBlock(quad, out);
        const int owner = Quotient(quad, p_.slice_magic);
        const int at = rank * quads_per_block_ + quad - owner * quads_per_block_;
        const uint32_t counted = AddressIn(count, owner);
        SendRemote(AddressIn(values + at * sizeof(float4), owner), out, counted);
        SendRemote(AddressIn(statistics + at * sizeof(float2), owner), s, counted);
      }
      AwaitBarrier(barrier_, 0);
      AddBlocks<T>(place, clusters, rank);
    }
    if (clusters > 1) AddClusters<T>(place, clusters);
  }

 private:
  __device__ __forceinline__ float* WarpOutput(int warp, int head, int d) const {
    return reinterpret_cast<float*>(warps_ + warp * p_.warp_bytes) + head * OutStride(p_.head_dim) +
           d;
  }

  __device__ __forceinline__ float2 OfBlock(int quad, float4& out) const {
    const int head = Quotient(quad, p_.head_magic), d = quad * 4 - head * p_.head_dim;
    float2 shares[kWarps], all = {-INFINITY, 0.0f};
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      shares[warp] = warp_statistics_[warp * p_.group + head];
      all.x = fmaxf(all.x, shares[warp].x);
    }
    out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const float weight = Exp2(shares[warp].x - Base(all.x));
      all.y += weight * shares[warp].y;
      AddScaled(out, weight, *reinterpret_cast<const float4*>(WarpOutput(warp, head, d)));
    }
    return all;
  }

  // This block's slice: neighbouring lanes hold what the blocks sent of a quad.
  template <typename T>
  __device__ __forceinline__ void AddBlocks(const Place& place, int clusters, int rank) const {
    const int size = p_.cluster_size, items = quads_per_block_ * size;
    for (int first = 0; first < items; first += kThreads) {
      const int item = first + static_cast<int>(threadIdx.x);
      const int from = item & (size - 1), i = item >> p_.cluster_shift;
      const int quad = rank * quads_per_block_ + i;
      const bool mine = item < items && quad < quads_;
      float2 s = {-INFINITY, 0.0f};
      float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (mine) {
        s = received_statistics_[from * quads_per_block_ + i];
        out = received_[from * quads_per_block_ + i];
      }
      float top = s.x;
      for (int step = 1; step < size; step *= 2) {
        top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
      }
      const float weight = Exp2(s.x - Base(top));
      float v[5] = {out.x * weight, out.y * weight, out.z * weight, out.w * weight, s.y * weight};
      for (int step = 1; step < size; step *= 2) {
#pragma unroll
        for (float& part : v) part += __shfl_xor_sync(~0u, part, step);
      }
      if (mine && from == 0) {
        SetResult<T>(place, clusters, rank, quad, {top, v[4]}, make_float4(v[0], v[1], v[2], v[3]));
      }
    }
  }

  template <typename T>
  __device__ __forceinline__ void SetResult(const Place& place, int clusters, int rank, int quad,
                                            float2 s, const float4& out) const {
    if (clusters == 1) {
      Store<T>(place, quad, s.y, out);
    } else {
      SetPartial(place, rank, quad, s, out);
    }
  }

  template <typename T>
  __device__ __forceinline__ void Store(const Place& place, int quad, float sum,
                                        const float4& v) const {
    const float factor = p_.factors.v / sum;
    const float values[4] = {v.x * factor, v.y * factor, v.z * factor, v.w * factor};
    T* out = static_cast<T*>(p_.out) + static_cast<int64_t>(place.row) * p_.out_stride +
             place.kv_head * p_.group * p_.head_dim;
    kernels::Store<T, 4>(out + quad * 4, Pack<T, 4>(values));
  }

  // A block may leave two: of the place that it begins within and of the one that it ends within.
  __device__ __forceinline__ int64_t DealtIndex(const Share& share, int index, int quad) const {
    return (int64_t{share.first_block + index} * 2 + (index == 0)) * quads_ + quad;
  }
  // What all blocks have found of a quad, in their order; `own` and `out` are this one's.
  __device__ __forceinline__ float2 AddShares(const Share& share, int quad, float2 own,
                                              float4& out) const {
    constexpr int kAtOnce = 8;
    const float4 own_out = out;
    float2 all = {-INFINITY, 0.0f};
    out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int first = 0; first < share.blocks; first += kAtOnce) {
      float2 s[kAtOnce];
      float4 v[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        s[i] = {-INFINITY, 0.0f};
        v[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (first + i >= share.blocks) continue;
        const int64_t at = DealtIndex(share, first + i, quad);
        const bool mine = first + i == share.index;
        s[i] = mine ? own : __ldcg(p_.partial_statistics + at);
        v[i] = mine ? own_out : __ldcg(p_.partials + at);
      }
      float top = all.x;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) top = fmaxf(top, s[i].x);
      const float shrink = Exp2(all.x - Base(top));
      all = {top, all.y * shrink};
      out = make_float4(out.x * shrink, out.y * shrink, out.z * shrink, out.w * shrink);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float weight = Exp2(s[i].x - Base(top));
        all.y += weight * s[i].y;
        AddScaled(out, weight, v[i]);
      }
    }
    return all;
  }
  __device__ __forceinline__ int64_t Pair(const Place& place) const {
    return static_cast<int64_t>(place.row) * p_.kv_heads + place.kv_head;
  }
  __device__ __forceinline__ int64_t PartialIndex(const Place& place, int cluster, int quad) const {
    return (Pair(place) * p_.clusters + cluster) * quads_ + quad;
  }
  __device__ __forceinline__ void SetPartial(const Place& place, int rank, int quad, float2 s,
                                             const float4& v) const {
    const int cluster = (static_cast<int>(blockIdx.x) - rank) >> p_.cluster_shift;
    const int64_t at = PartialIndex(place, cluster, quad);
    p_.partials[at] = v;
    p_.partial_statistics[at] = s;
  }

  static __device__ __forceinline__ int LoadAcquire(const int* from) {
    int v;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
  }
  // Whether this block is the last of so many to arrive, with all that the others have stored. It
  // leaves the counter at zero for the next launch.
  __device__ __forceinline__ bool IsLast(int* arrived, int blocks) const {
    int* flag = reinterpret_cast<int*>(stash_);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      const bool last = atomicAdd(arrived, 1) == blocks - 1;
      if (last) *arrived = 0;
      *flag = last;
    }
    __syncthreads();
    if (*flag == 0) return false;
    __threadfence();
    return true;
  }

  // The block that arrives last at this slice of the result finishes it.
  template <typename T>
  __device__ __forceinline__ void AddClusters(const Place& place, int clusters) const {
    const int rank = p_.cluster_size == 1 ? 0 : static_cast<int>(ClusterRank());
    if (!IsLast(p_.arrived + Pair(place) * kMaxCluster + rank, clusters)) return;
    for (int i = threadIdx.x; i < quads_per_block_; i += kThreads) {
      const int quad = rank * quads_per_block_ + i;
      if (quad >= quads_) break;
      const float4* values = p_.partials + PartialIndex(place, 0, quad);
      const float2* statistics = p_.partial_statistics + PartialIndex(place, 0, quad);
      float2 shares[kMaxClusters];
#pragma unroll
      for (int k = 0; k < kMaxClusters; ++k) {
        shares[k] = k < clusters ? __ldcg(statistics + static_cast<int64_t>(k) * quads_)
                                 : make_float2(-INFINITY, 0.0f);
      }
      float2 all = {-INFINITY, 0.0f};
#pragma unroll
      for (int k = 0; k < kMaxClusters; ++k) all.x = fmaxf(all.x, shares[k].x);
      float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
      for (int k = 0; k < kMaxClusters; ++k) {
        if (k >= clusters) break;
        const float weight = Exp2(shares[k].x - all.x);
        all.y += weight * shares[k].y;
        AddScaled(out, weight, __ldcg(values + static_cast<int64_t>(k) * quads_));
      }
      Store<T>(place, quad, all.y, out);
    }
  }

  const Params& p_;
  uint64_t* const barrier_;
  const int quads_, quads_per_block_;
  unsigned char *stash_, *query_, *warps_;
  float2* warp_statistics_;
  float2* received_statistics_;
  float4* received_;
};

}  // namespace lockstep::kernels::decode

#endif  // LOCKSTEP_KERNELS_ATTENTION_DECODE_MERGE_CUH_
