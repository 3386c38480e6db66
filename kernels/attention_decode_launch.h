// What the fast decode kernel is told, and where its instances are. Between
// attention_decode.cu and the files that instantiate the kernel.
#ifndef LOCKSTEP_KERNELS_ATTENTION_DECODE_LAUNCH_H_
#define LOCKSTEP_KERNELS_ATTENTION_DECODE_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/attention_factors.h"
#include "kernels/types.h"

namespace lockstep::kernels::decode {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kTile = 16;         // positions a warp takes at a time
constexpr int kTilesPerWarp = 4;  // before another cluster takes part
constexpr int kMaxCluster = 16;
constexpr int kMaxClusters = 16;
constexpr int kMaxGroup = 16;
constexpr int kMaxHeadDim = 256;
constexpr int kMaxDealtRows = 1024, kMaxDealtBlocks = 1024;
// How a warp comes by its tiles: to its registers, or through a ring in shared memory, of one tile
// or of two.
enum class Way : uint8_t { kPlain, kRing, kDeepRing };
constexpr int RingTiles(Way way) { return way == Way::kRing ? 1 : way == Way::kDeepRing ? 2 : 0; }
// Rings are there for 8 heads of 128 in 16 bits.
constexpr bool HasRing(size_t kv_bytes, int dim, int head_tiles) {
  return kv_bytes == 2 && dim == 128 && head_tiles == 1;
}
// Of a multiprocessor: as many as have the registers, so that enough is on its way.
constexpr int BlocksOf(size_t kv_bytes, int dim, int head_tiles, Way way) {
  return dim > 128 || head_tiles > 1 ? 2 : kv_bytes == 1 || way == Way::kRing ? 4 : 3;
}

struct BlockPlan;  // attention_decode_deal.cuh

struct Params {
  StepRows rows;
  const BlockPlan* plan;  // of dealt work
  void* k;
  void* v;
  int kv_heads, block_shift, head_dim, group;  // blocks of 1 << block_shift positions
  const void* q;
  void* out;
  int q_stride, out_stride;
  AttentionFactors factors;
  int window;
  int cluster_size;  // thread blocks that merge through shared memory
  int cluster_shift;
  int clusters;  // of a row and KV head, a power of two; several merge through partials
  uint32_t head_magic, slice_magic;  // to divide by the quads of a head and of a block's slice
  bool history_ready;
  const void* fresh_k;
  const void* fresh_v;
  const float2* rotary;
  ProductScales scales;  // columns: q's
  int k_column, v_column;
  int warp_bytes;  // see WarpBytes
  // Zero between launches: of several clusters [rows * kv_heads][kMaxCluster], of dealt
  // work [blocks].
  int* arrived;
  // [rows * kv_heads][clusters][group * head_dim / 4], or [blocks][2][group * head_dim / 4].
  float4* partials;
  float2* partial_statistics;
};

// Shared memory of a block, in bytes: see merge.cuh.
constexpr size_t kStashBytes = 2 * kMaxHeadDim * 2;
constexpr int OutStride(int head_dim) { return head_dim + 8; }
constexpr int QuadsPerBlock(int group, int head_dim, int cluster_size) {
  return (group * head_dim / 4 + cluster_size - 1) / cluster_size;
}
// Exact for dividends up to kMaxGroup * kMaxHeadDim / 4 and divisors up to 512.
constexpr int kMagicShift = 20;
constexpr uint32_t QuotientMagic(int divisor) {
  return ((1u << kMagicShift) + divisor - 1) / divisor;
}
// Of K or of V of a tile in a ring.
constexpr int kRingHalf = kTile * 128 * 2;
// Of a warp: its ring, and when that is read, what it found for the merge.
constexpr int WarpBytes(int group, int head_dim, Way way) {
  const int found = static_cast<int>(sizeof(float)) * group * OutStride(head_dim);
  const int ring = RingTiles(way) * 2 * kRingHalf;
  return ring > found ? ring : found;
}
constexpr int QueryBytes(int group, int head_dim) { return group * head_dim * 2; }
constexpr size_t SharedBytes(int group, int head_dim, int cluster_size, Way way) {
  const size_t cluster = cluster_size == 1 ? 0
                                           : size_t{1} * cluster_size *
                                                 QuadsPerBlock(group, head_dim, cluster_size) *
                                                 (sizeof(float4) + sizeof(float2));
  return kStashBytes + size_t{1} * kWarps * WarpBytes(group, head_dim, way) +
         QueryBytes(group, head_dim) + kWarps * group * sizeof(float2) + cluster;
}

using Kernel = void (*)(Params);
// Writes what dealt work's blocks begin with.
cudaError_t LaunchPlan(const Launch& launch, const StepRows& rows, int num_rows, int kv_heads,
                       int window, int blocks, BlockPlan* plan);
size_t PlanBytes(int blocks);
// Of so many head tiles, 1 or 2, and 64, 128 or 256 elements.
struct KernelShape {
  int dim, head_tiles;
  Way way;  // the plain one where the shape has no such ring
  bool dealt;
};
Kernel FindBF16(const KernelShape& shape);
Kernel FindF16(const KernelShape& shape);
Kernel FindBF16OverE4M3(const KernelShape& shape);
Kernel FindF16OverE4M3(const KernelShape& shape);

}  // namespace lockstep::kernels::decode

#endif  // LOCKSTEP_KERNELS_ATTENTION_DECODE_LAUNCH_H_
