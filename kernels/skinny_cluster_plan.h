// How a product is dealt to clusters: inside of kernels/skinny_cluster.h.
#ifndef LOCKSTEP_KERNELS_SKINNY_CLUSTER_PLAN_H_
#define LOCKSTEP_KERNELS_SKINNY_CLUSTER_PLAN_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/skinny_cluster.h"

namespace lockstep::kernels {

inline constexpr int kClusterTile = 64;    // weight rows, as many as wgmma multiplies
inline constexpr int kClusterChunk = 128;  // bytes of a row: a stage is a tile of them
inline constexpr int kClusterStageBytes = kClusterTile * kClusterChunk;
inline constexpr int kMaxClusterSplit = 8;
inline constexpr int kMaxClusterStages = 24;
inline constexpr int kMinClusterStages = 6;
inline constexpr size_t kMaxClusterShared = 226 << 10;

inline constexpr int kXParts = 4;         // that x arrives in at most
inline constexpr int kClusterWindow = 4;  // of a warpgroup's stages, that are under way at a time
inline constexpr int kClusterGroups = 2;  // warpgroups that take turns at the stages
// Those, a warpgroup that finishes and a warp for each that asks for its weights: with one for
// both, 16 rows of BF16 took 3 % longer.
inline constexpr int kClusterThreads = (kClusterGroups + 1) * 128 + kClusterGroups * 32;
// Rows of 16 bits that are quantised as they are staged, by the threads that multiply, of each of
// which 8 elements of each chunk are in registers. With 32 rows that takes longer than it spares.
inline constexpr int kMaxStagedRows = 16;
inline constexpr int kStagingLanes = kClusterGroups * 128 / kMaxStagedRows;  // a row's
inline constexpr int kMaxStagedChunks = 16;
// A row of sums: padded against bank conflicts.
__host__ __device__ constexpr int ClusterSumStride(int rows) { return rows + 4; }
// Two tiles' sums.
__host__ __device__ constexpr size_t ClusterSumBytes(int rows) {
  return sizeof(float) * 2 * kClusterTile * ClusterSumStride(rows);
}

struct ClusterParams {
  CUtensorMap weights, x;
  const float *weight_scales, *x_scales;
  const void* unquantized_x;  // null: x by its map
  int64_t x_stride;           // of that
  int n, m, k;
  int chunks;            // of K
  int share, remainder;  // tiles of a cluster; the first `remainder` clusters have one more
  int split_log2, stages;
  int x_chunks;  // of the block that has most
  int x_part;    // of those, in each part that arrives
  bool x_boxed;  // a part is one box; else each chunk

  GemvEpilogue epilogue;
  void* out;
  int64_t out_stride;
  const void* bias;
  ExchangePush push;
};

// Where things lie in shared memory, from an address that is a multiple of 1,024.
struct ClusterLayout {
  size_t x, sums, given, barriers, factors, end;

  __host__ __device__ ClusterLayout(int rows, int stages, int x_chunks) {
    x = static_cast<size_t>(stages) * kClusterStageBytes;
    sums = x + static_cast<size_t>(x_chunks) * kClusterChunk * rows;
    given = sums + ClusterSumBytes(rows);
    barriers = given + sizeof(float) * kClusterTile * rows;
    factors = barriers + sizeof(uint64_t) * (2 * kMaxClusterStages + kXParts + 2 * kClusterGroups);
    end = factors + sizeof(float) * kMaxStagedRows;
  }
};

// One translation unit per type. rows: 16, 32 or 64.
template <typename W, typename T>
cudaError_t LaunchCluster(const Launch& launch, int rows, int blocks, size_t shared_bytes,
                          const ClusterParams& params);
template <typename W, typename T>
cudaError_t InitCluster(int (&clusters)[kMaxClusterSplit + 1]);

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_SKINNY_CLUSTER_PLAN_H_
