// The product with 2..16 rows, on tensor cores: m16n8k16 with 16 rows of weights as
// the A operand and 8 rows of x as B, so that a mostly empty x wastes arithmetic,
// which is free here, and not bandwidth.
//
// K is dealt to the eight warps of a block, each of which holds its part of x in
// registers. A stage is one warp's part of 16 weight rows, a tile:
//
//        K: |  warp 0   |  warp 1   | ...      a lane reads 16 bytes of row g and of
//   row 0   |===========|===========|          row g + 8 at a time; that these are
//   ...     |   stage   |   stage   |          neighbours in K and not the columns a
//   row 15  |===========|===========|          fragment names is as good, as long as
//                                              x is read the same way
//
// Rows of a stage lie an odd number of 64-byte units apart: no bank conflicts. Every
// warp has a ring of its own, of `depth` stages, and asks for a slot's next stage
// when it has read it.
//
// Where K is longer than eight warps' registers, it passes by in phases: a group of
// tiles keeps its sums in registers while x is loaded part by part (kPhased).
// The warps' sums are added in order through shared memory.
//
// Bytes moved: n * k * sizeof(W); of x, m * k * sizeof(T) from L2 a block and group.
// Checked against a double reference in tests/kernels/skinny_test.cu.
#ifndef LOCKSTEP_KERNELS_SKINNY_CUH_
#define LOCKSTEP_KERNELS_SKINNY_CUH_

#include "kernels/skinny_tile.cuh"

namespace lockstep::kernels {

template <typename W, typename T, int kRows, bool kPhased>
__global__ void __launch_bounds__(kGemvThreads, 1)
    SkinnyKernel(const __grid_constant__ SkinnyParams p) {
  constexpr int kGroup = skinny::kGroup<kRows, kPhased>;
  constexpr bool kNarrow = sizeof(W) == 1 && !std::is_same_v<T, __half>;
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ uint64_t full[kMaxGemvStages];
  TriggerDependents();

  const int warp = threadIdx.x / 32;
  const skinny::Stretch stretch = skinny::StretchOf(p);
  if (threadIdx.x < kGemvWarps * p.depth) BarrierInit(full + threadIdx.x, 1);
  FenceBarrierInit();
  __syncthreads();

  uint64_t* const my_full = full + warp * p.depth;
  uint8_t* const my_ring = dynamic + warp * p.depth * p.stage_bytes;
  skinny::Cursor<kGroup> next;
  for (int i = 0; i < p.depth && next.tile < stretch.tiles; ++i) {
    skinny::Request<W>(p, stretch, next, my_ring + i * p.stage_bytes, my_full + i);
    next.Advance(p, stretch.tiles);
  }
  WaitForPrevious();

  float* const partial = reinterpret_cast<float*>(dynamic + kGemvWarps * p.depth * p.stage_bytes);
  skinny::XPart<W, kRows> x;
  skinny::Narrowing<kRows> narrowing;
  float change[kRows / 8][2], scale[kRows / 8][2];
#pragma unroll
  for (int j = 0; j < kRows / 8; ++j) scale[j][0] = scale[j][1] = 1.0f;
  uint64_t key = 0;
  int slot = 0, buffer = 0;
  uint32_t parity = 0;
  for (int group = 0; group < stretch.tiles; group += kGroup) {
    skinny::Accumulator<kRows, kPhased> sum[kGroup] = {};
    narrowing.Reset();
    for (int phase = 0; phase < p.phases; ++phase) {
      const skinny::Part part = skinny::PartOf<W>(p, phase);
      if (kPhased || group == 0) {
        skinny::LoadX<W, T, kRows>(p, part, x);
        if constexpr (kNarrow) {
          narrowing.Narrow(x, change);
#pragma unroll
          for (int t = 0; t < kGroup; ++t) skinny::Rescale<kRows, kPhased>(sum[t], change);
        }
      }
#pragma unroll
      for (int t = 0; t < kGroup; ++t) {
        if (group + t >= stretch.tiles) break;
        BarrierWait(my_full + slot, parity, "skinny: weights");
        skinny::MultiplyStage<W, T, kRows, kPhased>(p, my_ring + slot * p.stage_bytes, part.count,
                                                    x, sum[t]);
        FenceReadsBeforeCopies();
        __syncwarp();
        if (next.tile < stretch.tiles) {
          skinny::Request<W>(p, stretch, next, my_ring + slot * p.stage_bytes, my_full + slot);
          next.Advance(p, stretch.tiles);
        }
        if (++slot == p.depth) slot = 0, parity ^= 1;
      }
    }
#pragma unroll
    for (int t = 0; t < kGroup; ++t) {
      if (group + t >= stretch.tiles) break;
      float* const sums = partial + buffer * kGemvWarps * skinny::kPartial<kRows>;
      skinny::StorePartial<kRows, kPhased>(sum[t], kNarrow ? narrowing.inverse : scale,
                                           sums + warp * skinny::kPartial<kRows>);
      // The other buffer was read before everybody came here.
      __syncthreads();
      skinny::FinishTile<T, kRows>(p, (stretch.first + group + t) * skinny::kTile, sums, key);
      buffer ^= 1;
    }
  }
  if (p.epilogue == GemvEpilogue::kLogits && p.keys != nullptr) skinny::StoreKeys(p, key);
}

template <typename W, typename T, typename Fn>
cudaError_t WithSkinnyKernel(int m, bool phased, Fn fn) {
  if (phased) return m <= 8 ? fn(SkinnyKernel<W, T, 8, true>) : fn(SkinnyKernel<W, T, 16, true>);
  return m <= 8 ? fn(SkinnyKernel<W, T, 8, false>) : fn(SkinnyKernel<W, T, 16, false>);
}

template <typename W, typename T>
cudaError_t InitSkinny() {
  for (int m : {8, 16}) {
    for (bool phased : {false, true}) {
      const cudaError_t status =
          WithSkinnyKernel<W, T>(m, phased, [](auto* kernel) { return AllowShared(kernel); });
      if (status != cudaSuccess) return status;
    }
  }
  return cudaSuccess;
}

template <typename W, typename T>
cudaError_t LaunchSkinny(const Launch& launch, const GemvArgs& args, const SkinnyPlan& plan) {
  const bool gate =
      args.epilogue == GemvEpilogue::kSiluGate || args.epilogue == GemvEpilogue::kGeluGate;
  const int tiles = (args.n + skinny::kTile - 1) / skinny::kTile;
  SkinnyParams p = {};
  p.weights = static_cast<const uint8_t*>(args.weights);
  p.scales = sizeof(W) == 1 ? args.scales : nullptr;
  p.x = args.x;
  p.x_stride = args.x_stride != 0 ? args.x_stride : args.k;
  p.n = args.n;
  p.k = args.k;
  p.m = args.m;
  p.share = tiles / plan.blocks;
  p.remainder = tiles % plan.blocks;
  p.phases = plan.phases;
  p.pieces = plan.pieces;
  p.depth = plan.depth;
  p.row_bytes = static_cast<uint32_t>(args.k * sizeof(W));
  p.row_stride = static_cast<uint32_t>(plan.row_stride);
  p.stage_bytes = static_cast<uint32_t>(plan.stage_bytes);
  p.epilogue = args.epilogue;
  p.out = args.out;
  p.out_stride = args.out_stride != 0 ? args.out_stride : gate ? args.n / 2 : args.n;
  p.bias = args.bias;
  p.keys = args.keys;
  p.first_id = args.first_id;
  return WithSkinnyKernel<W, T>(args.m, plan.phases > 1, [&](auto* kernel) {
    return LaunchKernel(launch, kernel, plan.blocks, kGemvThreads, plan.shared_bytes, 1, p);
  });
}

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_SKINNY_CUH_
