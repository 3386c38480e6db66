// The kernel of kernels/row_stack.h. While the rings stream, L1 has next to no room, and what
// misses it waits a microsecond or two: so nothing may spill, and code must be short. A warp
// has one other to share its scheduler with, so what an instruction waits for counts in full:
// while a ring fills up behind a wait, how soon it is emptied again is what the wait costs.
#ifndef LOCKSTEP_KERNELS_ROW_STACK_CUH_
#define LOCKSTEP_KERNELS_ROW_STACK_CUH_

#include "kernels/row_stack_attention.cuh"
#include "kernels/row_stack_product.cuh"
#include "kernels/row_stack_stage.cuh"

namespace lockstep::kernels::stack {

// Once everything of exchange `number` is there, all blocks have read what it was made of:
// that can take new words.
__device__ __forceinline__ void ClearBehind(const Params& p, int step, int layer, uint32_t number) {
  ClearPreviousSlot(p.exchange, number);
  if (step == kGateUp) {
    const int slot = layer & 1, group_width = p.heads * p.head_dim;
    ClearWords(p, p.words.qkv[slot], 2 * (p.heads + 2 * p.kv_heads) * p.head_dim);
    ClearWords(p, p.words.heads[slot], 2 * group_width);
    ClearWords(p, p.words.partials[slot], 4 * p.max_shares * group_width);
    // In whole vectors: half of an odd number's last one lies in the gap to the next part.
    ClearWords(p, p.words.statistics[slot], 16 * ((p.max_shares * p.heads + 1) / 2));
  } else {
    ClearWords(p, p.words.activated[(layer - 1) & 1], 2 * p.intermediate);
  }
}

// A product's rows of this block from `from` on, as many as are worked on together. Made anew at
// each of the three steps from what is in memory: there are no registers for it in between.
struct Chunk {
  const Product q;
  const int rows;
  __device__ __forceinline__ Chunk(const Params& p, const Shared& shared, const Place& place,
                                   int from)
      : q(shared.products[place.step]), rows(min(RowsOfChunk(p, q.split_log2), q.rows - from)) {}
};
// False: there are no such rows.
template <typename W, typename T>
__device__ __forceinline__ bool Multiply(const Params& p, const Shared& shared, const Place& place,
                                         int from, Ring& ring) {
  const Chunk c(p, shared, place, from);
  if (c.rows <= 0) return false;
  if (from > 0) SyncThreads();  // the last chunk's sums are read
  if (sizeof(W) == 1 && place.step != kHead) {
    AskForScales(shared, c.rows, p.layers[place.layer].scales[place.step] + c.q.begin + from);
    MultiplyPieces<W, T, 4>(p, c.q, shared, from, from + c.rows, ring);
  } else if (c.q.capacity == 8) {
    MultiplyPieces<T, T, 8>(p, c.q, shared, from, from + c.rows, ring);
  } else {
    MultiplyPieces<T, T, 4>(p, c.q, shared, from, from + c.rows, ring);
  }
  return true;
}
template <typename W>
__device__ __forceinline__ void AddUp(const Params& p, const Shared& shared, const Place& place,
                                      int from) {
  const Chunk c(p, shared, place, from);
  AddParts(p, c.q, shared, c.rows, sizeof(W) == 1 && place.step != kHead);
}
// Returns what comes after them.
template <typename T>
__device__ __forceinline__ int Send(const Params& p, const Shared& shared, const Place& place,
                                    int from) {
  const Chunk c(p, shared, place, from);
  SendSums<T>(p, place.step, place.layer, c.q.begin + from, c.rows, shared.sums);
  return from + c.rows;
}

template <typename W, typename T>
__device__ __forceinline__ void RunProduct(const Params& p, const Shared& shared,
                                           const Place& place, Ring& ring) {
  const bool first = place.step == kQkv && place.layer == 0;
  const uint32_t number = 2 * place.layer - (place.step == kGateUp ? 0 : 1);
  if (place.step == kOutput || place.step == kDown) {
    StageWords<T, sizeof(W) == 1>(
        p, shared, place.layer,
        place.step == kOutput ? p.words.heads[place.layer & 1] : p.words.activated[place.layer & 1],
        (place.step == kOutput ? p.heads * p.head_dim : p.intermediate) / 8);
  } else {
    StageNorm<T>(
        p, shared, first, number,
        place.step == kHead ? p.final_norm : p.layers[place.layer].norms[place.step == kGateUp],
        sizeof(W) == 1 && place.step != kHead);
  }
#pragma unroll 1
  for (int from = 0; Multiply<W, T>(p, shared, place, from, ring);) {
    SyncThreads();
    AddUp<W>(p, shared, place, from);
    SyncThreads();
    from = Send<T>(p, shared, place, from);
  }
  // Off the path of those who wait for the sums.
  if (place.step != kOutput && place.step != kDown && !first)
    ClearBehind(p, place.step, place.layer, number);
}

// Two warps' rings, by one thread. By two of a warp it is 1.5 % faster, but racecheck then
// loses track of what each has waited for, and says nothing of worth about the rings.
template <typename KV, int kDim>
__device__ __forceinline__ void FeedTwo(const Params& p, uint8_t* rings, Barriers& barriers) {
  const int warp = static_cast<int>(threadIdx.x - kThreads) / 32 * 2;
  const auto read_position = [&](int* position, const int32_t** table) {
    WaitForPrevious();
    const int slot = __ldcg(p.rows.slot);
    *position = slot < 0 ? -1 : __ldcg(p.rows.position);
    *table = p.rows.block_table + static_cast<int64_t>(slot) * p.rows.table_stride;
  };
  Feed<KV, kDim> first(p, warp, rings, barriers), second(p, warp + 1, rings, barriers);
  bool first_goes = true, second_goes = true;
#pragma unroll 1
  while (first_goes || second_goes) {
    if (first_goes) first_goes = first.Go(read_position);
    if (second_goes) second_goes = second.Go(read_position);
  }
}

template <typename W, typename T, typename KV, int kDim>
__global__ void __launch_bounds__(kLaunched, 1) StackKernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) uint8_t dynamic[];
  static_assert(kWarps * kMaxDepth <= kThreads);
  __shared__ Barriers barriers;
  __shared__ float norms[kWarps], largest[kWarps], unscale;
  __shared__ Place places[kWarps];  // there, not in registers, which are scarce
  __shared__ Product products[kDone];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < kWarps * kMaxDepth) {
    BarrierInit(&barriers.full[0][0] + threadIdx.x, 1);
    BarrierInit(&barriers.empty[0][0] + threadIdx.x, 32);
    FenceBarrierInit();
  }
  if (threadIdx.x < kDone) products[threadIdx.x] = Product(p.products[threadIdx.x]);
  __syncthreads();
  if (threadIdx.x >= kThreads) {
    if (lane == 0) FeedTwo<KV, kDim>(p, dynamic, barriers);
    return;
  }
  uint8_t* const row = dynamic + kWarps * p.depth * kPieceBytes;
  float* const partials = reinterpret_cast<float*>(row + p.sums_at);
  const Shared shared = {row,      p.halves,          reinterpret_cast<uint4*>(row + p.x_bytes),
                         partials, partials + p.sums, norms,
                         largest,  &unscale,          products};
  if (threadIdx.x == 0) unscale = 1.0f;  // of f16 it stays that
  Ring ring(p.depth, dynamic, barriers);

  WaitForPrevious();
  const int slot = __ldcg(p.rows.slot), position = __ldcg(p.rows.position);
  if (slot < 0) return;
#pragma unroll
  for (int i = 0; i < kRowVectors; ++i) {
    const int v = static_cast<int>(threadIdx.x) + i * kThreads;
    if (v < p.hidden / 8) shared.residual[v] = __ldcg(static_cast<const uint4*>(p.residual) + v);
  }
  Place& place = places[threadIdx.x / 32];
  if (lane == 0) place = {kQkv, 0, slot, position, Share(p, threadIdx.x / 32, position)};
  __syncwarp();
  // One place for all products: what a layer runs through must stay in the caches of code.
#pragma unroll 1
  for (bool more = true; more;) {
    if (place.step == kCache) {
      Attention<T, KV, kDim> attention(p, place, shared.x);
      attention.Run(ring);
      attention.Merge();
      SyncThreads();  // what attention had in shared memory is read
    } else {
      if (place.step == kHead) TriggerDependents();
      RunProduct<W, T>(p, shared, place, ring);
    }
    __syncwarp();
    int step = place.step, layer = place.layer;
    more = Advance(p, step, layer);
    __syncwarp();
    if (lane == 0) {
      place.step = step;
      place.layer = layer;
    }
    __syncwarp();
  }
}

template <typename W, typename T, typename Fn>
cudaError_t WithStackKernel(bool kv_e4m3, int head_dim, Fn fn) {
  using F8 = __nv_fp8_e4m3;
  if (head_dim == 128)
    return kv_e4m3 ? fn(StackKernel<W, T, F8, 128>) : fn(StackKernel<W, T, T, 128>);
  return kv_e4m3 ? fn(StackKernel<W, T, F8, 64>) : fn(StackKernel<W, T, T, 64>);
}

template <typename W, typename T>
cudaError_t InitStack() {
  for (const bool kv_e4m3 : {false, true}) {
    for (const int head_dim : {64, 128}) {
      const cudaError_t status = WithStackKernel<W, T>(kv_e4m3, head_dim, [](auto* kernel) {
        return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(kMaxStackShared));
      });
      if (status != cudaSuccess) return status;
    }
  }
  return cudaSuccess;
}

template <typename W, typename T>
cudaError_t LaunchStack(const Launch& launch, bool kv_e4m3, int head_dim, const Params& params) {
  return WithStackKernel<W, T>(kv_e4m3, head_dim, [&](auto* kernel) {
    return LaunchKernel(launch, kernel, params.blocks, kLaunched, SharedBytes(params), 1, params);
  });
}

}  // namespace lockstep::kernels::stack

#endif  // LOCKSTEP_KERNELS_ROW_STACK_CUH_
