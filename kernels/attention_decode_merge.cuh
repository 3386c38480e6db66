// How the shares of a row become one result, always in the same order:
//
//   warps of a block       through shared memory
//   blocks of a cluster    each block owns a slice of the result; the others
//                          push their part of it into its shared memory
//   clusters (very long    partials in device memory; the last block to arrive
//   contexts only)         at a slice adds them up
//
// A share is (top, sum) of each head, the largest score seen (base 2) and the
// sum of exp2(score - top), and the output weighted the same way.
#ifndef LOCKSTEP_KERNELS_ATTENTION_DECODE_MERGE_CUH_
#define LOCKSTEP_KERNELS_ATTENTION_DECODE_MERGE_CUH_

#include <cmath>

#include "kernels/attention_decode_launch.h"
#include "kernels/attention_mma.cuh"

namespace lockstep::kernels::decode {

__device__ __forceinline__ void ClusterArrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ __forceinline__ void ClusterWait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
__device__ __forceinline__ int ClusterRank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}
// The address that `local`, in this block's shared memory, has in block `rank`'s.
__device__ __forceinline__ uint32_t RemoteAddress(const void* local, int rank) {
  uint32_t remote = 0;
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(remote)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(local))), "r"(rank));
#endif
  return remote;
}
__device__ __forceinline__ void StoreRemote(const float4* local, int rank, float4 v) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(RemoteAddress(local, rank)),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
      : "memory");
#endif
}
__device__ __forceinline__ void StoreRemote(const float2* local, int rank, float2 v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(RemoteAddress(local, rank)),
               "f"(v.x), "f"(v.y)
               : "memory");
#endif
}

__device__ __forceinline__ void AddScaled(float4& to, float weight, const float4& v) {
  to.x += weight * v.x;
  to.y += weight * v.y;
  to.z += weight * v.z;
  to.w += weight * v.w;
}

// What `count` shares add up to: statistics[i * step] and values(i), which is
// not called for a share that saw nothing.
template <typename Values>
__device__ __forceinline__ float2 Combine(const float2* statistics, int step, int count,
                                          float4& out, Values values) {
  float2 all = {-INFINITY, 0.0f};
  for (int i = 0; i < count; ++i) all.x = fmaxf(all.x, statistics[i * step].x);
  out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int i = 0; i < count; ++i) {
    const float2 share = statistics[i * step];
    if (share.x == -INFINITY) continue;
    const float weight = Exp2(share.x - all.x);
    all.y += weight * share.y;
    AddScaled(out, weight, values(i));
  }
  return all;
}

// Lives in the block's dynamic shared memory, laid out as SharedBytes counts it.
class Merge {
 public:
  __device__ __forceinline__ explicit Merge(const Params& p)
      : p_(p),
        quads_(p.group * p.head_dim / 4),
        quads_per_block_(QuadsPerBlock(p.group, p.head_dim, p.cluster_size)) {
    extern __shared__ __align__(16) unsigned char shared[];
    stash_ = shared;
    warp_out_ = reinterpret_cast<float*>(shared + kStashBytes);
    warp_statistics_ =
        reinterpret_cast<float2*>(warp_out_ + kWarps * p.group * OutStride(p.head_dim));
    received_statistics_ = warp_statistics_ + kWarps * p.group;
    received_ = reinterpret_cast<float4*>(received_statistics_ + p.cluster_size * p.group);
  }

  __device__ __forceinline__ void* stash() const { return stash_; }
  __device__ __forceinline__ void SetWarpStatistics(int warp, int head, float2 s) const {
    warp_statistics_[warp * p_.group + head] = s;
  }
  __device__ __forceinline__ void SetWarpOutput(int warp, int head, int d, float4 v) const {
    *reinterpret_cast<float4*>(WarpOutput(warp, head, d)) = v;
  }

  // Writes the row's result, once every warp has set its share (a warp that saw
  // nothing only its statistics). `clusters` take part.
  template <typename T>
  __device__ __forceinline__ void Finish(int row, int clusters) const {
    __syncthreads();
    const int tid = threadIdx.x;
    if (p_.cluster_size == 1) {
      for (int quad = tid; quad < quads_; quad += kThreads) {
        float4 out;
        const float2 s = OfBlock(quad, out);
        if (clusters == 1) {
          Store<T>(row, quad, s.y, out);
        } else {
          SetPartial(row, 0, quad, s, out);
        }
      }
    } else {
      const int rank = ClusterRank();
      ClusterWait();  // all blocks have started: their shared memory is theirs
      for (int i = tid; i < p_.group * p_.cluster_size; i += kThreads) {
        const int head = i % p_.group;
        StoreRemote(received_statistics_ + rank * p_.group + head, i / p_.group,
                    BlockStatistics(head));
      }
      for (int quad = tid; quad < quads_; quad += kThreads) {
        float4 out;
        const float2 s = OfBlock(quad, out);
        if (s.x == -INFINITY) continue;
        const int owner = quad / quads_per_block_;
        StoreRemote(received_ + rank * quads_per_block_ + (quad - owner * quads_per_block_), owner,
                    out);
      }
      ClusterArrive();
      ClusterWait();
      for (int i = tid; i < quads_per_block_; i += kThreads) {
        const int quad = rank * quads_per_block_ + i;
        if (quad >= quads_) break;
        float4 out;
        const float2 s =
            Combine(received_statistics_ + HeadOf(quad), p_.group, p_.cluster_size, out,
                    [&](int from) { return received_[from * quads_per_block_ + i]; });
        if (clusters == 1) {
          Store<T>(row, quad, s.y, out);
        } else {
          SetPartial(row, rank, quad, s, out);
        }
      }
    }
    if (clusters > 1) AddClusters<T>(row, clusters);
  }

 private:
  __device__ __forceinline__ float* WarpOutput(int warp, int head, int d) const {
    return warp_out_ + (warp * p_.group + head) * OutStride(p_.head_dim) + d;
  }
  __device__ __forceinline__ int HeadOf(int quad) const { return quad / (p_.head_dim / 4); }
  __device__ __forceinline__ float2 OfBlock(int quad, float4& out) const {
    const int head = HeadOf(quad), d = quad * 4 - head * p_.head_dim;
    return Combine(warp_statistics_ + head, p_.group, kWarps, out, [&](int warp) {
      return *reinterpret_cast<const float4*>(WarpOutput(warp, head, d));
    });
  }
  __device__ __forceinline__ float2 BlockStatistics(int head) const {
    float4 none;
    return Combine(warp_statistics_ + head, p_.group, kWarps, none,
                   [](int) { return make_float4(0.0f, 0.0f, 0.0f, 0.0f); });
  }

  template <typename T>
  __device__ __forceinline__ void Store(int row, int quad, float sum, const float4& v) const {
    const float factor = p_.v_scale / sum;
    const float values[4] = {v.x * factor, v.y * factor, v.z * factor, v.w * factor};
    T* out = static_cast<T*>(p_.out) + static_cast<int64_t>(row) * p_.out_stride +
             static_cast<int>(blockIdx.y) * p_.group * p_.head_dim;
    kernels::Store<T, 4>(out + quad * 4, Pack<T, 4>(values));
  }

  __device__ __forceinline__ int64_t Pair(int row) const {
    return static_cast<int64_t>(row) * p_.kv_heads + blockIdx.y;
  }
  __device__ __forceinline__ int64_t PartialIndex(int row, int cluster, int quad) const {
    return (Pair(row) * p_.clusters + cluster) * quads_ + quad;
  }
  __device__ __forceinline__ void SetPartial(int row, int rank, int quad, float2 s,
                                             const float4& v) const {
    const int cluster = (static_cast<int>(blockIdx.x) - rank) / p_.cluster_size;
    const int64_t at = PartialIndex(row, cluster, quad);
    p_.partials[at] = v;
    p_.partial_statistics[at] = s;
  }

  // The block that arrives last at this slice of the result finishes it, and
  // leaves the counter at zero for the next launch.
  template <typename T>
  __device__ __forceinline__ void AddClusters(int row, int clusters) const {
    const int rank = p_.cluster_size == 1 ? 0 : ClusterRank();
    int* flag = reinterpret_cast<int*>(stash_);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      int* arrived = p_.arrived + Pair(row) * kMaxCluster + rank;
      const bool last = atomicAdd(arrived, 1) == clusters - 1;
      if (last) *arrived = 0;
      *flag = last;
    }
    __syncthreads();
    if (*flag == 0) return;
    __threadfence();
    for (int i = threadIdx.x; i < quads_per_block_; i += kThreads) {
      const int quad = rank * quads_per_block_ + i;
      if (quad >= quads_) break;
      const float4* values = p_.partials + PartialIndex(row, 0, quad);
      const float2* statistics = p_.partial_statistics + PartialIndex(row, 0, quad);
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
        if (shares[k].x == -INFINITY) continue;
        const float weight = Exp2(shares[k].x - all.x);
        all.y += weight * shares[k].y;
        AddScaled(out, weight, __ldcg(values + static_cast<int64_t>(k) * quads_));
      }
      Store<T>(row, quad, all.y, out);
    }
  }

  const Params& p_;
  const int quads_, quads_per_block_;
  unsigned char* stash_;
  float* warp_out_;
  float2* warp_statistics_;
  float2* received_statistics_;
  float4* received_;
};

}  // namespace lockstep::kernels::decode

#endif  // LOCKSTEP_KERNELS_ATTENTION_DECODE_MERGE_CUH_
