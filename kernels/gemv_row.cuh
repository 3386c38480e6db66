// The product with one row. Every block owns a contiguous stretch of weight rows
// and streams it, whole rows at a time, through a ring of stages:
//
//   producer warp   requests all stages at once, then each one as it is released
//   8 warps         warp = (row within the stage, part of K); 16-byte reads, fp32
//                   multiply-adds with x in registers, one partial sum a row
//   epilogue        every kRowChunk rows: partial sums added in order of K
//
// Bytes moved: n * k * sizeof(W), x and the outputs are noise. Checked against a
// double reference in tests/kernels/gemv_test.cu.
#ifndef LOCKSTEP_KERNELS_GEMV_ROW_CUH_
#define LOCKSTEP_KERNELS_GEMV_ROW_CUH_

#include "kernels/bulk_copy.cuh"
#include "kernels/exchange_words.cuh"
#include "kernels/gemv_elements.cuh"
#include "kernels/gemv_plan.h"

namespace lockstep::kernels {

struct RowParams {
  const uint8_t* weights;
  const float* scales;
  int n, k;
  int unit;  // rows that stay in one block: 1, of a gate 2, of a push 8
  int split_log2, stages;
  uint32_t stage_bytes, row_bytes;

  GemvPrologue prologue;
  const void* x;
  const void* norm_weight;
  float eps, weight_offset;
  const void* residual_in;
  void* residual_out;

  GemvEpilogue epilogue;
  void* out;
  const void* bias;
  uint64_t* keys;
  int first_id;

  ExchangeWords exchange;
};

namespace row {

// Shared memory: ring | x as T (unless plain) | partial sums.
struct Shared {
  uint8_t* ring;
  uint4* x;
  float* sums;  // [split][kRowChunk]
};

// One block's rows of the weights.
struct Stretch {
  int begin, rows;
};

// Pieces of x that a lane multiplies: vector s of warp part `wk` is number
// (wk * S + s) * 32 + lane of the row.
template <typename W, int S>
__device__ __forceinline__ int VectorOf(int wk, int s) {
  return (wk * S + s) * 32 + static_cast<int>(threadIdx.x % 32);
}

template <typename W, typename T, int S>
__device__ __forceinline__ void LoadPlain(const RowParams& p, int wk,
                                          float (&x)[S][kPerVector<W>]) {
  constexpr int kParts = kPerVector<W> / 8;  // 16-byte pieces of x for one of weights
  const int vectors = p.k / kPerVector<W>;
  const uint4* from = static_cast<const uint4*>(p.x);
  WaitForPrevious();
  uint4 raw[S][kParts];
#pragma unroll
  for (int s = 0; s < S; ++s) {
    const int v = VectorOf<W, S>(wk, s);
#pragma unroll
    for (int i = 0; i < kParts; ++i)
      raw[s][i] = v < vectors ? __ldcg(from + v * kParts + i) : uint4{};
  }
#pragma unroll
  for (int s = 0; s < S; ++s) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      float f[8];
      UnpackVector<T>(raw[s][i], f);
#pragma unroll
      for (int e = 0; e < 8; ++e) x[s][i * 8 + e] = f[e];
    }
  }
}

// Fills shared.x with the row to be normed and returns this thread's sum of squares.
template <typename T>
__device__ __forceinline__ float StageResidual(const RowParams& p, const Shared& shared) {
  const uint4* from = static_cast<const uint4*>(p.residual_in);
  float squares = 0.0f;
  for (int v = threadIdx.x; v < p.k / 8; v += kGemvWarps * 32) {
    float f[8];
    uint4 packed;
    if (p.prologue == GemvPrologue::kReduce) {
      SumOfRanks<T>(p.exchange, v, f);
      float residual[8];
      UnpackVector<T>(__ldcg(from + v), residual);
#pragma unroll
      for (int e = 0; e < 8; ++e) f[e] += residual[e];
      packed = PackVector<T>(f);
      if (v % static_cast<int>(gridDim.x) == static_cast<int>(blockIdx.x))
        static_cast<uint4*>(p.residual_out)[v] = packed;
    } else {
      packed = __ldcg(static_cast<const uint4*>(p.x) + v);
    }
    UnpackVector<T>(packed, f);
#pragma unroll
    for (int e = 0; e < 8; ++e) squares = __fmaf_rn(f[e], f[e], squares);
    shared.x[v] = packed;
  }
  return squares;
}

template <typename W, typename T, int S>
__device__ __forceinline__ void LoadNormed(const RowParams& p, const Shared& shared, int wk,
                                           float* scratch, float (&x)[S][kPerVector<W>]) {
  constexpr int kParts = kPerVector<W> / 8;
  const int vectors = p.k / kPerVector<W>;
  uint4 weight[S][kParts];
#pragma unroll
  for (int s = 0; s < S; ++s) {
    const int v = VectorOf<W, S>(wk, s);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      weight[s][i] =
          v < vectors ? __ldg(static_cast<const uint4*>(p.norm_weight) + v * kParts + i) : uint4{};
    }
  }
  // A reduction polls: what it reads has arrived when it has arrived, and everything
  // older is complete by then, since the kernel that pushed waited for it.
  if (p.prologue != GemvPrologue::kReduce) WaitForPrevious();
  const float squares = WarpSum(StageResidual<T>(p, shared));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = squares;
  ComputeBarrier();
  if (p.prologue == GemvPrologue::kReduce) ClearPreviousSlot(p.exchange);
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kGemvWarps; ++w) total += scratch[w];
  const float scale = rsqrtf(total / static_cast<float>(p.k) + p.eps);
#pragma unroll
  for (int s = 0; s < S; ++s) {
    const int v = VectorOf<W, S>(wk, s);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      float f[8], w[8];
      UnpackVector<T>(v < vectors ? shared.x[v * kParts + i] : uint4{}, f);
      UnpackVector<T>(weight[s][i], w);
#pragma unroll
      for (int e = 0; e < 8; ++e)
        x[s][i * 8 + e] = ToFloat(FromFloat<T>(f[e] * scale * (w[e] + p.weight_offset)));
    }
  }
}

// This lane's part of the product of one weight row.
template <typename W, int S>
__device__ __forceinline__ float Dot(const uint4 (&w)[S], const float (&x)[S][kPerVector<W>]) {
  float even = 0.0f, odd = 0.0f;
#pragma unroll
  for (int s = 0; s < S; ++s) {
    float f[kPerVector<W>];
    UnpackVector<W>(w[s], f);
#pragma unroll
    for (int e = 0; e < kPerVector<W>; e += 2) {
      even = __fmaf_rn(f[e], x[s][e], even);
      odd = __fmaf_rn(f[e + 1], x[s][e + 1], odd);
    }
  }
  return even + odd;
}

// The sums of rows [begin, end) of the block's stretch, complete in shared memory.
template <typename T>
struct Sums {
  const RowParams& p;
  const float* partial;
  int first;  // weight row of partial[0]

  __device__ __forceinline__ float operator()(int r) const {
    float sum = 0.0f;
    for (int part = 0; part < 1 << p.split_log2; ++part) sum += partial[part * kRowChunk + r];
    if (p.scales != nullptr) sum *= __ldg(p.scales + first + r);
    return sum;
  }
};

template <typename T>
__device__ __forceinline__ void Epilogue(const RowParams& p, const Sums<T>& sum, int rows,
                                         uint64_t& key) {
  const int first = sum.first, tid = threadIdx.x;
  constexpr int kStep = kGemvWarps * 32;
  switch (p.epilogue) {
    case GemvEpilogue::kStore:
      for (int r = tid; r < rows; r += kStep) {
        float v = sum(r);
        if (p.bias != nullptr) v += ToFloat(static_cast<const T*>(p.bias)[first + r]);
        static_cast<T*>(p.out)[first + r] = FromFloat<T>(v);
      }
      break;
    case GemvEpilogue::kSiluGate:
    case GemvEpilogue::kGeluGate:
      for (int i = tid; i < rows / 2; i += kStep) {
        static_cast<T*>(p.out)[first / 2 + i] =
            FromFloat<T>(Gated(p.epilogue, sum(2 * i), sum(2 * i + 1)));
      }
      break;
    case GemvEpilogue::kLogits:
      for (int r = tid; r < rows; r += kStep) {
        const float v = sum(r);
        if (p.out != nullptr) static_cast<float*>(p.out)[first + r] = v;
        const uint64_t candidate = LogitKey(v, p.first_id + first + r);
        key = candidate > key ? candidate : key;
      }
      break;
    case GemvEpilogue::kPush: {
      const int size = p.exchange.size;
      for (int i = tid; i < rows / 8 * size; i += kStep) {
        float v[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] = sum(i / size * 8 + e);
        PushWords(p.exchange, i % size, first / 8 + i / size, PackVector<T>(v));
      }
      break;
    }
  }
}

// The largest of the block's keys -> keys[block].
__device__ __forceinline__ void StoreKey(uint64_t key, uint64_t* scratch, uint64_t* keys) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    const uint64_t other = __shfl_xor_sync(~0u, key, offset);
    key = other > key ? other : key;
  }
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = key;
  ComputeBarrier();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kGemvWarps; ++w) key = scratch[w] > key ? scratch[w] : key;
  keys[blockIdx.x] = key;
}

__device__ __forceinline__ void Request(const RowParams& p, const Stretch& stretch, int stage,
                                        int slot, uint8_t* ring, uint64_t* full) {
  const int per_stage = kGemvWarps >> p.split_log2;
  const int rows = min(per_stage, stretch.rows - stage * per_stage);
  const uint32_t bytes = rows * p.row_bytes;
  BarrierArriveExpecting(full + slot, bytes);
  BulkCopy(ring + static_cast<size_t>(slot) * p.stage_bytes,
           p.weights + static_cast<size_t>(stretch.begin + stage * per_stage) * p.row_bytes, bytes,
           full + slot);
}

}  // namespace row

template <typename W, typename T, int S>
__global__ void __launch_bounds__(kGemvThreads, 1) RowKernel(const __grid_constant__ RowParams p) {
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ uint64_t full[kMaxGemvStages], empty[kMaxGemvStages];
  __shared__ float norm_scratch[kGemvWarps];
  __shared__ uint64_t key_scratch[kGemvWarps];
  TriggerDependents();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t units = p.n / p.unit;
  row::Stretch stretch;
  stretch.begin = static_cast<int>(blockIdx.x * units / gridDim.x) * p.unit;
  stretch.rows = static_cast<int>((blockIdx.x + 1) * units / gridDim.x) * p.unit - stretch.begin;
  const int per_stage = kGemvWarps >> p.split_log2;
  const int num_stages = (stretch.rows + per_stage - 1) / per_stage;

  row::Shared shared;
  shared.ring = dynamic;
  shared.x = reinterpret_cast<uint4*>(dynamic + static_cast<size_t>(p.stages) * p.stage_bytes);
  shared.sums =
      reinterpret_cast<float*>(shared.x + (p.prologue == GemvPrologue::kPlain ? 0 : p.k / 8));

  if (threadIdx.x == kGemvWarps * 32) {
    for (int i = 0; i < p.stages; ++i) {
      BarrierInit(full + i, 1);
      BarrierInit(empty + i, kGemvWarps);
    }
    FenceBarrierInit();
    for (int i = 0; i < min(p.stages, num_stages); ++i)
      row::Request(p, stretch, i, i, shared.ring, full);
  }
  __syncthreads();

  if (warp == kGemvWarps) {
    if (lane != 0) return;
    int slot = 0;
    uint32_t parity = 0;
    for (int i = p.stages; i < num_stages; ++i) {
      BarrierWait(empty + slot, parity, "gemv: a stage to be read");
      row::Request(p, stretch, i, slot, shared.ring, full);
      if (++slot == p.stages) slot = 0, parity ^= 1;
    }
    return;
  }

  const int wk = warp & ((1 << p.split_log2) - 1), wr = warp >> p.split_log2;
  float x[S][kPerVector<W>];
  if (p.prologue == GemvPrologue::kPlain) {
    row::LoadPlain<W, T, S>(p, wk, x);
  } else {
    row::LoadNormed<W, T, S>(p, shared, wk, norm_scratch, x);
  }

  const int vectors = p.k / kPerVector<W>;
  uint64_t key = 0;
  int slot = 0;
  uint32_t parity = 0;
  for (int begin = 0; begin < stretch.rows; begin += kRowChunk) {
    const int end = min(begin + kRowChunk, stretch.rows);
    for (int base = begin; base < end; base += per_stage) {
      BarrierWait(full + slot, parity, "gemv: weights");
      const int r = base + wr;
      uint4 w[S];
      if (r < end) {
        const uint4* from = reinterpret_cast<const uint4*>(
            shared.ring + static_cast<size_t>(slot) * p.stage_bytes + wr * p.row_bytes);
#pragma unroll
        for (int s = 0; s < S; ++s) {
          const int v = row::VectorOf<W, S>(wk, s);
          w[s] = v < vectors ? from[v] : uint4{};
        }
      }
      __syncwarp();
      if (lane == 0) BarrierArrive(empty + slot);
      if (r < end) {
        const float sum = WarpSum(row::Dot<W, S>(w, x));
        if (lane == 0) shared.sums[wk * kRowChunk + r - begin] = sum;
      }
      if (++slot == p.stages) slot = 0, parity ^= 1;
    }
    ComputeBarrier();
    // Outputs may be read still by a kernel before the one ahead.
    if (p.prologue == GemvPrologue::kReduce && begin == 0) WaitForPrevious();
    row::Epilogue<T>(p, {p, shared.sums, stretch.begin + begin}, end - begin, key);
    if (end < stretch.rows) ComputeBarrier();
  }
  if (p.epilogue == GemvEpilogue::kLogits && p.keys != nullptr)
    row::StoreKey(key, key_scratch, p.keys);
}

// Capacities of vectors: enough for K = 32,768 over eight warps.
template <typename W, typename T, typename Fn>
cudaError_t WithRowKernel(int vectors, Fn fn) {
  constexpr int kUnit = sizeof(W) == 2 ? 4 : 2;
  if (vectors == kUnit) return fn(RowKernel<W, T, kUnit>);
  if (vectors == 2 * kUnit) return fn(RowKernel<W, T, 2 * kUnit>);
  if (vectors == 4 * kUnit) return fn(RowKernel<W, T, 4 * kUnit>);
  return cudaErrorInvalidValue;
}

template <typename W, typename T>
cudaError_t InitRow() {
  constexpr int kUnit = sizeof(W) == 2 ? 4 : 2;
  for (int vectors = kUnit; vectors <= 4 * kUnit; vectors *= 2) {
    const cudaError_t status = WithRowKernel<W, T>(vectors, [](auto* kernel) {
      return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(kMaxGemvShared));
    });
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

template <typename W, typename T>
cudaError_t LaunchRow(const Launch& launch, const GemvArgs& args, const RowPlan& plan) {
  RowParams p = {};
  p.weights = static_cast<const uint8_t*>(args.weights);
  p.scales = sizeof(W) == 1 ? args.scales : nullptr;
  p.n = args.n;
  p.k = args.k;
  p.unit = plan.unit;
  while (1 << p.split_log2 < plan.split) ++p.split_log2;
  p.stages = plan.stages;
  p.stage_bytes = static_cast<uint32_t>(plan.stage_bytes);
  p.row_bytes = static_cast<uint32_t>(args.k * sizeof(W));
  p.prologue = args.prologue;
  p.x = args.x;
  p.norm_weight = args.norm_weight;
  p.eps = args.norm_eps;
  p.weight_offset = args.norm_plus_one ? 1.0f : 0.0f;
  p.residual_in = args.residual_in;
  p.residual_out = args.residual_out;
  p.epilogue = args.epilogue;
  p.out = args.out;
  p.bias = args.bias;
  p.keys = args.keys;
  p.first_id = args.first_id;
  if (args.exchange != nullptr)
    p.exchange = MakeExchangeWords(*args.exchange, args.exchange_number);
  return WithRowKernel<W, T>(plan.vectors, [&](auto* kernel) {
    return LaunchKernel(launch, kernel, plan.blocks, kGemvThreads, plan.shared_bytes, 1, p);
  });
}

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_GEMV_ROW_CUH_
