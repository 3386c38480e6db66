// The product with 2..16 rows, on tensor cores: m16n8k16 with 16 rows of weights as
// the A operand and 8 rows of x as B, so that a mostly empty x wastes arithmetic,
// which is free here, and not bandwidth.
//
// K is dealt to the blocks of a cluster and to warps, each of which holds its part
// of x in registers for the whole run. A stage is one warp's part of 16 weight rows:
//
//        K: |  warp 0   |  warp 1   | ...      a lane reads 16 bytes of row g and of
//   row 0   |===========|===========|          row g + 8 at a time; that these are
//   ...     |  stage i  | stage i+1 |          neighbours in K and not the columns a
//   row 15  |===========|===========|          fragment names is as good, as long as
//                                              x is read the same way
//
// Rows of a stage lie an odd number of 64-byte units apart: no bank conflicts.
// Partial sums are added over warps in shared memory after each step of tiles, then
// over the blocks of the cluster, both in order of K.
//
// Bytes moved: n * k * sizeof(W), and m * k * sizeof(T) from L2 for each cluster.
#ifndef LOCKSTEP_KERNELS_SKINNY_CUH_
#define LOCKSTEP_KERNELS_SKINNY_CUH_

#include "kernels/skinny_tile.cuh"

namespace lockstep::kernels {

template <typename W, typename T, int kRows, int S>
__global__ void __launch_bounds__(kSkinnyThreads, 1)
    SkinnyKernel(const __grid_constant__ SkinnyParams p) {
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ uint64_t full[kMaxGemvStages], cluster_barrier;
  __shared__ uint64_t key_scratch[kGemvWarps * 32];
  TriggerDependents();

  const int tid = threadIdx.x, warp = tid / 32;
  const skinny::Stretch stretch = skinny::StretchOf(p);
  const int per_step = kGemvWarps >> p.split_log2;
  const int steps = (stretch.tiles + per_step - 1) / per_step;
  const int num_stages = steps * kGemvWarps;

  if (tid == 0) {
    for (int i = 0; i < p.stages; ++i) BarrierInit(full + i, 1);
    BarrierInit(&cluster_barrier, p.cluster);
    FenceBarrierInit();
  }
  __syncthreads();
  for (int i = warp; i < min(p.stages, num_stages); i += kGemvWarps)
    skinny::Request<W>(p, stretch, i, i, dynamic, full);
  if (p.cluster > 1) {  // the others' barriers are ready
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
  }

  float* partial =
      reinterpret_cast<float*>(dynamic + static_cast<size_t>(p.stages) * p.stage_bytes);
  float* cluster_sums = partial + 2 * kGemvWarps * skinny::kPartial<kRows>;
  const int rank = skinny::ClusterRank(p.cluster);
  const skinny::Part part = skinny::PartOf<W>(p, rank, warp & ((1 << p.split_log2) - 1));
  WaitForPrevious();
  skinny::XPart<W, T, kRows, S> x;
  skinny::LoadX<W, T, kRows, S>(p, part, x);

  constexpr int kChunkTiles = kSkinnySumBytes / (kRows * skinny::kTile * 4);
  uint64_t key = 0;
  int chunk = 0;  // the first tile whose sums wait in cluster_sums
  for (int step = 0; step < steps; ++step) {
    const int i = step * kGemvWarps + warp, slot = i % p.stages;
    float* step_partial = partial + (step & 1) * kGemvWarps * skinny::kPartial<kRows>;
    BarrierWait(full + slot, (i / p.stages) & 1, "skinny: weights");
    skinny::Accumulator<kRows> sum = {};
    skinny::MultiplyStage<W, T, kRows, S>(p, dynamic + static_cast<size_t>(slot) * p.stage_bytes,
                                          part, x, sum);
    // Its only reader asks for the slot's next stage, whichever warp that is for.
    __syncwarp();
    if (i + p.stages < num_stages)
      skinny::Request<W>(p, stretch, i + p.stages, slot, dynamic, full);
    skinny::StorePartial<kRows>(sum, step_partial + warp * skinny::kPartial<kRows>);
    ComputeBarrier();

    const auto over_warps = [&](int tile, int row, int r) {
      const float* from = step_partial + (tile << p.split_log2) * skinny::kPartial<kRows> +
                          row * skinny::kColumn + r;
      float sum = 0.0f;
      for (int w = 0; w < 1 << p.split_log2; ++w) sum += from[w * skinny::kPartial<kRows>];
      return sum;
    };
    const int tile = step * per_step, tiles = min(per_step, stretch.tiles - tile);
    if (p.cluster == 1) {
      skinny::FinishTiles<T, kRows>(p, (stretch.first + tile) * skinny::kTile, tiles, tid,
                                    kGemvWarps * 32, over_warps, key);
      continue;
    }

    for (int o = tid; o < tiles * kRows * skinny::kTile; o += kGemvWarps * 32) {
      cluster_sums[(tile - chunk) * kRows * skinny::kTile + o] =
          over_warps(o / (kRows * skinny::kTile), o / skinny::kTile % kRows, o % skinny::kTile);
    }
    if (step + 1 < steps && tile + 2 * per_step - chunk <= kChunkTiles) continue;
    const auto over_cluster = [&](int t, int row, int r) {
      const float* from = cluster_sums + (t * kRows + row) * skinny::kTile + r;
      float parts[8], sum = 0.0f;
#pragma unroll
      for (int c = 0; c < 8; ++c) parts[c] = c < p.cluster ? skinny::LoadRemote(from, c) : 0.0f;
#pragma unroll
      for (int c = 0; c < 8; ++c) sum += parts[c];
      return sum;
    };
    skinny::ClusterBarrier(&cluster_barrier, p.cluster, 0);
    skinny::FinishTiles<T, kRows>(p, (stretch.first + chunk) * skinny::kTile, tile + tiles - chunk,
                                  rank * kGemvWarps * 32 + tid, p.cluster * kGemvWarps * 32,
                                  over_cluster, key);
    // Neither overwrite the sums nor leave while another block reads them.
    skinny::ClusterBarrier(&cluster_barrier, p.cluster, 1);
    chunk = tile + per_step;
  }
  if (p.epilogue == GemvEpilogue::kLogits && p.keys != nullptr)
    skinny::StoreKeys<kRows>(p, key, key_scratch);
}

// Capacities of pieces, by the weight type: x takes the same registers.
template <typename W>
inline constexpr int kLargeCapacity = sizeof(W) == 2 ? 16 : 8;

template <typename W, typename T, typename Fn>
cudaError_t WithSkinnyKernel(int m, int capacity, Fn fn) {
  constexpr int kLarge = kLargeCapacity<W>;
  if (capacity == kLarge)
    return m <= 8 ? fn(SkinnyKernel<W, T, 8, kLarge>) : fn(SkinnyKernel<W, T, 16, kLarge>);
  if (capacity == kLarge / 2)
    return m <= 8 ? fn(SkinnyKernel<W, T, 8, kLarge / 2>) : fn(SkinnyKernel<W, T, 16, kLarge / 2>);
  return cudaErrorInvalidValue;
}

template <typename W, typename T>
cudaError_t InitSkinny() {
  for (int m : {8, 16}) {
    for (int capacity : {kLargeCapacity<W> / 2, kLargeCapacity<W>}) {
      const cudaError_t status = WithSkinnyKernel<W, T>(m, capacity, [](auto* kernel) {
        return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(kMaxGemvShared));
      });
      if (status != cudaSuccess) return status;
    }
  }
  return cudaSuccess;
}

template <typename W, typename T>
cudaError_t LaunchSkinny(const Launch& launch, const GemvArgs& args, const SkinnyPlan& plan) {
  SkinnyParams p = {};
  p.weights = static_cast<const uint8_t*>(args.weights);
  p.scales = sizeof(W) == 1 ? args.scales : nullptr;
  p.x = args.x;
  p.x_stride = args.x_stride != 0 ? args.x_stride : args.k;
  p.n = args.n;
  p.k = args.k;
  p.m = args.m;
  p.cluster = plan.cluster;
  while (1 << p.split_log2 < plan.split) ++p.split_log2;
  p.pieces = plan.pieces;
  p.stages = plan.stages;
  p.row_bytes = static_cast<uint32_t>(args.k * sizeof(W));
  p.row_stride = static_cast<uint32_t>(plan.row_stride);
  p.stage_bytes = static_cast<uint32_t>(plan.stage_bytes);
  p.epilogue = args.epilogue;
  p.out = args.out;
  const bool gate =
      args.epilogue == GemvEpilogue::kSiluGate || args.epilogue == GemvEpilogue::kGeluGate;
  p.out_stride = args.out_stride != 0 ? args.out_stride : gate ? args.n / 2 : args.n;
  p.bias = args.bias;
  p.keys = args.keys;
  p.keys_stride = plan.blocks;
  p.first_id = args.first_id;
  return WithSkinnyKernel<W, T>(args.m, plan.capacity, [&](auto* kernel) {
    return LaunchKernel(launch, kernel, plan.blocks, kSkinnyThreads, plan.shared_bytes,
                        plan.cluster, p);
  });
}

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_SKINNY_CUH_
