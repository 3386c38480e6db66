#include "kernels/attention_decode_deal.cuh"

namespace lockstep::kernels::decode {
namespace {

constexpr int kPlanThreads = kMaxDealtRows;

// Tiles of a block that take as long as putting together what was cut (e4m3, 512 places of 1.1K on
// 528 blocks: 43.5 us cut into equal parts, 40.5 whole).
constexpr int kTilesOfMerge = 6;

// One block.
__global__ void __launch_bounds__(kPlanThreads, 1)
    PlanKernel(StepRows rows, int num_rows, int kv_heads, int window, int blocks, BlockPlan* plan) {
  __shared__ int ends[kMaxDealtRows], positions[kMaxDealtRows], slots[kMaxDealtRows];
  __shared__ int warps[kPlanThreads / 32], longest;
  // Nothing behind this kernel begins before it has ended: who reads the plan need not wait.
  WaitForPrevious();
  const int row = static_cast<int>(threadIdx.x), lane = row % 32, warp = row / 32;
  int of_head = 0;
  if (row < num_rows) {
    slots[row] = __ldcg(rows.slot + row);
    positions[row] = __ldcg(rows.position + row);
    if (slots[row] >= 0) of_head = WorkOf(window, positions[row]).tiles();
  }
  const int tiles = of_head * kv_heads;
  if (row == 0) longest = 0;
  const int places = __syncthreads_count(of_head > 0) * kv_heads;
  if (of_head > 0) atomicMax(&longest, of_head);
  const auto sum_before = [lane](int v) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, v, step);
      if (lane >= step) v += other;
    }
    return v;
  };
  int end = sum_before(tiles);
  if (lane == 31) warps[warp] = end;
  __syncthreads();
  if (warp == 0) warps[lane] = sum_before(warps[lane]);
  __syncthreads();
  if (warp > 0) end += warps[warp - 1];
  ends[row] = end;  // those behind the last row too, which have no tiles
  __syncthreads();

  const int total = ends[kPlanThreads - 1];
  Cuts cuts;
  cuts.blocks = max(1, min(blocks, total / kLeastTiles));
  cuts.each = total / cuts.blocks;
  cuts.rest = total - cuts.each * cuts.blocks;
  const int places_each = (places + cuts.blocks - 1) / cuts.blocks;
  const bool whole = places_each * longest <= cuts.each + kTilesOfMerge;
  const auto plan_at = [&](int at) {
    int low = 0, high = num_rows - 1;  // the first row whose end is beyond `at`
    while (low < high) {
      const int middle = (low + high) / 2;
      if (ends[middle] > at) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    const int before = low > 0 ? ends[low - 1] : 0, each = (ends[low] - before) / kv_heads;
    const int head = each == 0 ? 0 : (at - before) / each;
    return BlockPlan{at,   0,   low, slots[low], positions[low], head, before + head * each,
                     each, cuts};
  };
  // Where a block's part begins: no nearer to a place's ends than pays, but there; between places
  // if blocks then have as much to do but for what they need not put together.
  const auto begin_of = [&](int block) {
    if (block >= cuts.blocks) return total;
    const int raw = block * cuts.each + min(block, cuts.rest);
    const BlockPlan at = plan_at(raw);
    const int least = whole ? (at.tiles + 1) / 2 : kLeastCut;
    if (raw - at.begin < least) return at.begin;
    return whole || at.begin + at.tiles - raw < kLeastCut ? at.begin + at.tiles : raw;
  };
  for (int block = static_cast<int>(threadIdx.x); block < blocks; block += kPlanThreads) {
    BlockPlan part = plan_at(begin_of(block));
    part.end = begin_of(block + 1);
    plan[block] = part;
  }
}

}  // namespace

size_t PlanBytes(int blocks) { return sizeof(BlockPlan) * blocks; }

cudaError_t LaunchPlan(const Launch& launch, const StepRows& rows, int num_rows, int kv_heads,
                       int window, int blocks, BlockPlan* plan) {
  return LaunchKernel(launch, PlanKernel, 1, kPlanThreads, 0, 1, rows, num_rows, kv_heads, window,
                      blocks, plan);
}

}  // namespace lockstep::kernels::decode
