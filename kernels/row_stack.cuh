// The kernel of kernels/row_stack.h. While the rings stream, L1 has next to no room, and what
// misses it waits a microsecond or two: so nothing may spill, and code must be short. A warp
// has one other to share its scheduler with, so what an instruction waits for counts in full:
// while a ring fills up behind a wait, how soon it is emptied again is what the wait costs.
#ifndef LOCKSTEP_KERNELS_ROW_STACK_CUH_
#define LOCKSTEP_KERNELS_ROW_STACK_CUH_

#include "kernels/row_stack_attention.cuh"
#include "kernels/row_stack_product.cuh"

namespace lockstep::kernels::stack {

// The largest magnitude among vectors of bf16; of f16 nobody needs it.
template <typename T>
class Largest {
 public:
  __device__ __forceinline__ void See(const uint4& v) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      for (const uint32_t word : {v.x, v.y, v.z, v.w}) {
        __nv_bfloat162 pair;
        memcpy(&pair, &word, sizeof(pair));
        pair_ = __hmax2(pair_, __habs2(pair));
      }
    }
  }
  __device__ __forceinline__ float value() const {
    return fmaxf(__low2float(pair_), __high2float(pair_));
  }

 private:
  __nv_bfloat162 pair_ = __float2bfloat162_rn(0.0f);
};
// Behind a barrier: the power of two that brings the row into the range of f16. Each of
// shared.largest times `factor` is no less than some part of it.
template <typename T>
__device__ __forceinline__ float ScaleOfHalves(const Shared& shared, float factor) {
  if (!std::is_same_v<T, __nv_bfloat16>) return 1.0f;
  float largest = 0.0f, scale, unscale;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, shared.largest[w]);
  row::ScaleToHalf(largest * factor, scale, unscale);
  if (threadIdx.x == 0) *shared.unscale = unscale;
  return scale;
}
// A vector of T as one of f16.
template <typename T>
__device__ __forceinline__ uint4 AsHalves(const uint4& v, float scale) {
  if constexpr (std::is_same_v<T, __half>) return v;
  float f[8];
  UnpackVector<T>(v, f);
#pragma unroll
  for (int e = 0; e < 8; ++e) f[e] *= scale;
  return PackVector<__half>(f);
}
// Non-negative floats are ordered as their bits.
__device__ __forceinline__ float WarpLargest(float v) {
  return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(v)));
}

// Adds the sums of exchange `number`, of kRanks ranks at most, to this thread's part of the
// residual, kBatch vectors at a time. Returns the squares of what that makes, and takes note
// of its largest.
template <typename T, int kBatch, int kRanks>
__device__ __forceinline__ float AddSums(const Params& p, const Shared& shared, uint32_t number,
                                         Largest<T>& largest) {
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
      largest.See(sum);
      UnpackVector<T>(sum, f);
#pragma unroll
      for (int e = 0; e < 8; ++e) squares = __fmaf_rn(f[e], f[e], squares);
    }
  }
  return squares;
}

// Adds the sums of exchange `number` to the residual, unless `first`, which has none, and
// leaves its RMS norm in shared.x, if `halves` as e4m3 weights want it.
template <typename T>
__device__ __forceinline__ void StageNorm(const Params& p, const Shared& shared, bool first,
                                          uint32_t number, const void* weights, bool halves) {
  const int end = p.hidden / 8, tid = threadIdx.x;
  uint4 weight[kRowVectors];  // on their way before anything is waited for
#pragma unroll
  for (int i = 0; i < kRowVectors; ++i) {
    const int v = tid + i * kThreads;
    weight[i] = v < end ? __ldg(static_cast<const uint4*>(weights) + v) : uint4{};
  }
  Largest<T> largest_weight, largest;
  if (halves) {
#pragma unroll
    for (int i = 0; i < kRowVectors; ++i) largest_weight.See(weight[i]);
  }
  float squares;
  const int size = first ? 0 : p.exchange.size;
  if (size == 0) {
    squares = AddSums<T, 1, 0>(p, shared, number, largest);
  } else if (size == 1) {
    squares = AddSums<T, 2, 1>(p, shared, number, largest);
  } else if (size <= 4) {
    squares = AddSums<T, 2, 4>(p, shared, number, largest);
  } else {
    squares = AddSums<T, 1, kMaxPeers>(p, shared, number, largest);
  }
  squares = WarpSum(squares);
  if (halves) {
    const float of_lane = largest.value() * (largest_weight.value() + fabsf(p.weight_offset));
    const float of_warp = WarpLargest(of_lane);
    if (tid % 32 == 0) shared.largest[tid / 32] = of_warp;
  }
  if (tid % 32 == 0) shared.norms[tid / 32] = squares;
  SyncThreads();
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += shared.norms[w];
  const float scale = rsqrtf(__fdividef(total, static_cast<float>(p.hidden)) + p.eps);
  const float of_halves = halves ? ScaleOfHalves<T>(shared, scale) : 1.0f;
#pragma unroll
  for (int i = 0; i < kRowVectors; ++i) {
    const int v = tid + i * kThreads;
    if (v >= end) continue;
    float f[8], w[8];
    UnpackVector<T>(shared.residual[v], f);
    UnpackVector<T>(weight[i], w);
#pragma unroll
    for (int e = 0; e < 8; ++e) f[e] *= scale * (w[e] + p.weight_offset);
    const uint4 normed = PackVector<T>(f);
    if (halves) {
      *shared.Halves(v) = AsHalves<T>(normed, of_halves);
    } else {
      reinterpret_cast<uint4*>(shared.x)[v] = normed;
    }
  }
  SyncThreads();
}

// A row that other blocks made, into shared.x; kHalves: as e4m3 weights want it.
template <typename T, bool kHalves>
__device__ __forceinline__ void StageWords(const Params& p, const Shared& shared, uint32_t number,
                                           const uint32_t* words, int vectors) {
  constexpr int kBatch = 4;
  const int tid = threadIdx.x;
  const uint4* from = reinterpret_cast<const uint4*>(words);
  Largest<T> largest;
#pragma unroll 1
  for (int warps = tid / 32 * 32; warps < vectors; warps += kBatch * kThreads) {
    const int first = warps + tid % 32;
    uint4 batch[kBatch];
    AwaitWords<kBatch>(p.exchange, number, from, first, kThreads, vectors - 1, batch);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int v = first + i * kThreads;
      if (v >= vectors) continue;
      *(kHalves ? shared.Halves(v) : reinterpret_cast<uint4*>(shared.x) + v) = batch[i];
      if (kHalves) largest.See(batch[i]);
    }
  }
  if constexpr (kHalves && std::is_same_v<T, __nv_bfloat16>) {
    const float of_warp = WarpLargest(largest.value());
    if (tid % 32 == 0) shared.largest[tid / 32] = of_warp;
    SyncThreads();
    const float scale = ScaleOfHalves<T>(shared, 1.0f);
#pragma unroll 1
    for (int v = tid; v < vectors; v += kThreads) {
      *shared.Halves(v) = AsHalves<T>(*shared.Halves(v), scale);
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
