// A block of kernels/skinny_cluster.cuh: what it works on, and what lies where in its memory.
#ifndef LOCKSTEP_KERNELS_SKINNY_CLUSTER_BLOCK_CUH_
#define LOCKSTEP_KERNELS_SKINNY_CLUSTER_BLOCK_CUH_

#include <cstdint>

#include "kernels/device.cuh"
#include "kernels/skinny_cluster_plan.h"

namespace lockstep::kernels::cluster {

enum NamedBarrier { kFinished = 1, kGiven = 2, kStaged = 4 };  // kGiven: and the next, in turns

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
  float* sums;     // [2][sources][64 / S][stride]
  float* given;    // [a thread's sums][128]
  float* factors;  // [rows] of unquantized_x: what its e4m3 are to be multiplied by
  uint64_t *full, *empty, *x_full, *received, *freed;

  __device__ __forceinline__ Shared(uint8_t* base, int rows, const ClusterParams& p) {
    const ClusterLayout layout(rows, p.stages, p.x_chunks);
    ring = base;
    x = base + layout.x;
    sums = reinterpret_cast<float*>(base + layout.sums);
    given = reinterpret_cast<float*>(base + layout.given);
    factors = reinterpret_cast<float*>(base + layout.factors);
    full = reinterpret_cast<uint64_t*>(base + layout.barriers);
    empty = full + kMaxClusterStages;
    x_full = empty + kMaxClusterStages;
    received = x_full + kXParts;
    freed = received + kClusterGroups;
  }
};

}  // namespace lockstep::kernels::cluster

#endif  // LOCKSTEP_KERNELS_SKINNY_CLUSTER_BLOCK_CUH_
