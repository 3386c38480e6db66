// The kernel of kernels/row_stack.h. While the rings stream, L1 has next to no room, and what
// misses it waits a microsecond or two: so nothing may spill, and code must be short.
#ifndef LOCKSTEP_KERNELS_ROW_STACK_CUH_
#define LOCKSTEP_KERNELS_ROW_STACK_CUH_

#include "kernels/row_stack_attention.cuh"
#include "kernels/row_stack_product.cuh"

namespace lockstep::kernels::stack {

// Adds the sums of exchange `number`, of kRanks ranks at most, to this thread's part of the
// residual, kBatch vectors at a time. Returns the squares of what that makes.
template <typename T, int kBatch, int kRanks>
__device__ __forceinline__ float AddSums(const Params& p, const Shared& shared, uint32_t number) {
  const int end = p.hidden / 8, tid = threadIdx.x;
  float squares = 0.0f;
#pragma unroll 1
  for (int warps = tid / 32 * 32; warps < end; warps += kBatch * kThreads) {
    const int from = warps + tid % 32;
    float sums[kBatch][8] = {};
    if constexpr (kRanks > 0)
      SumsOfRanks<T, kBatch, kRanks>(p.exchange, number, from, kThreads, end, sums);
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int v = from + j * kThreads;
      if (v >= end) continue;
      float f[8];
      UnpackVector<T>(shared.residual[v], f);
#pragma unroll
      for (int e = 0; e < 8; ++e) f[e] += sums[j][e];
      const uint4 sum = PackVector<T>(f);
      shared.residual[v] = sum;
      UnpackVector<T>(sum, f);
#pragma unroll
      for (int e = 0; e < 8; ++e) squares = __fmaf_rn(f[e], f[e], squares);
    }
  }
  return squares;
}

// Adds the sums of exchange `number` to the residual, unless `first`, which has none, and
// leaves its RMS norm in shared.x.
template <typename T>
__device__ __forceinline__ void StageNorm(const Params& p, const Shared& shared, bool first,
                                          uint32_t number, const void* weights) {
  const int end = p.hidden / 8, tid = threadIdx.x;
  uint4 weight[kRowVectors];  // on their way before anything is waited for
#pragma unroll
  for (int i = 0; i < kRowVectors; ++i) {
    const int v = tid + i * kThreads;
    weight[i] = v < end ? __ldg(static_cast<const uint4*>(weights) + v) : uint4{};
  }
  float squares;
  const int size = first ? 0 : p.exchange.size;
  if (size == 0) {
    squares = AddSums<T, 1, 0>(p, shared, number);
  } else if (size == 1) {
    squares = AddSums<T, 2, 1>(p, shared, number);
  } else if (size <= 4) {
    squares = AddSums<T, 2, 4>(p, shared, number);
  } else {
    squares = AddSums<T, 1, kMaxPeers>(p, shared, number);
  }
  squares = WarpSum(squares);
  if (tid % 32 == 0) shared.norms[tid / 32] = squares;
  SyncThreads();
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += shared.norms[w];
  const float scale = rsqrtf(__fdividef(total, static_cast<float>(p.hidden)) + p.eps);
#pragma unroll
  for (int i = 0; i < kRowVectors; ++i) {
    const int v = tid + i * kThreads;
    if (v >= end) continue;
    float f[8], w[8];
    UnpackVector<T>(shared.residual[v], f);
    UnpackVector<T>(weight[i], w);
#pragma unroll
    for (int e = 0; e < 8; ++e) f[e] *= scale * (w[e] + p.weight_offset);
    reinterpret_cast<uint4*>(shared.x)[v] = PackVector<T>(f);
  }
  SyncThreads();
}

// A row that other blocks made, into shared.x.
__device__ __forceinline__ void StageWords(const Params& p, const Shared& shared, uint32_t number,
                                           const uint32_t* words, int vectors) {
  constexpr int kBatch = 4;
  const int tid = threadIdx.x;
  const uint4* from = reinterpret_cast<const uint4*>(words);
#pragma unroll 1
  for (int warps = tid / 32 * 32; warps < vectors; warps += kBatch * kThreads) {
    const int first = warps + tid % 32;
    uint4 batch[kBatch];
    AwaitWords<kBatch>(p.exchange, number, from, first, kThreads, vectors - 1, batch);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int v = first + i * kThreads;
      if (v < vectors) reinterpret_cast<uint4*>(shared.x)[v] = batch[i];
    }
  }
  SyncThreads();
}

// Once everything of exchange `number` is there, all blocks have read what it was made of:
// that can take new words.
__device__ __forceinline__ void ClearBehind(const Params& p, int step, int layer, uint32_t number) {
  ClearPreviousSlot(p.exchange, number);
  if (step == kGateUp) {
    const int slot = layer & 1, group_width = p.heads * p.head_dim;
    ClearWords(p, p.words.qkv[slot], 2 * (p.heads + 2 * p.kv_heads) * p.head_dim);
    ClearWords(p, p.words.heads[slot], 2 * group_width);
    ClearWords(p, p.words.partials[slot], 4 * p.max_shares * group_width);
    ClearWords(p, p.words.statistics[slot], 8 * p.max_shares * p.heads);
  } else {
    ClearWords(p, p.words.activated[(layer - 1) & 1], 2 * p.intermediate);
  }
}

template <typename W, typename T>
__device__ __forceinline__ void RunProduct(const Params& p, const Shared& shared,
                                           const Place& place, Ring& ring) {
  const ProductPlan& q = p.products[place.step];
  const Stretch mine(q, threadIdx.x / 32);
  const bool first = place.step == kQkv && place.layer == 0;
  const uint32_t number = 2 * place.layer - (place.step == kGateUp ? 0 : 1);
  if (place.step == kOutput || place.step == kDown) {
    StageWords(
        p, shared, place.layer,
        place.step == kOutput ? p.words.heads[place.layer & 1] : p.words.activated[place.layer & 1],
        (place.step == kOutput ? p.heads * p.head_dim : p.intermediate) / 8);
  } else {
    StageNorm<T>(
        p, shared, first, number,
        place.step == kHead ? p.final_norm : p.layers[place.layer].norms[place.step == kGateUp]);
  }
  const float* scales = place.step == kHead ? nullptr : p.layers[place.layer].scales[place.step];
  const int chunk = kSums >> q.split_log2;
#pragma unroll 1
  for (int from = 0; from < mine.rows; from += chunk) {
    const int to = min(from + chunk, mine.rows), row = mine.begin + from;
    if (from > 0) SyncThreads();  // the last chunk's sums are read
    if (sizeof(W) == 1 && place.step != kHead) {
      MultiplyPieces<W, T, 4>(q, mine, shared, from, to, ring);
    } else if (q.capacity == 8) {
      MultiplyPieces<T, T, 8>(q, mine, shared, from, to, ring);
    } else {
      MultiplyPieces<T, T, 4>(q, mine, shared, from, to, ring);
    }
    SyncThreads();
    AddParts(q, shared, to - from, scales == nullptr ? nullptr : scales + row);
    SyncThreads();
    SendSums<T>(p, place.step, place.layer, row, to - from, shared.sums);
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
  __shared__ float norms[kWarps];
  __shared__ Place places[kWarps];  // there, not in registers, which are scarce
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < kWarps * kMaxDepth) {
    BarrierInit(&barriers.full[0][0] + threadIdx.x, 1);
    BarrierInit(&barriers.empty[0][0] + threadIdx.x, 32);
    FenceBarrierInit();
  }
  __syncthreads();
  if (threadIdx.x >= kThreads) {
    if (lane == 0) FeedTwo<KV, kDim>(p, dynamic, barriers);
    return;
  }
  uint8_t* const row = dynamic + kWarps * p.depth * kPieceBytes;
  const Shared shared = {row, reinterpret_cast<uint4*>(row + p.x_bytes),
                         reinterpret_cast<float*>(row + p.x_bytes + 2 * p.hidden), norms};
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
