// The product with one row. Every block owns a contiguous stretch of weight rows
// and streams it, whole rows at a time, through a ring of stages:
//
//   `split` warps share the K of a row; so there are 8 / split groups, and stage i is
//   group i % groups's, which asks for the slot's next stage when it has read it.
//   Groups do not wait for each other: that, and x in registers, makes them
//   fast enough to empty a full ring in a microsecond once x is there.
//
//   Per warp and stage: 16-byte reads of a lane, of R rows S vectors each.
//   Every kRowChunk rows: partial sums added in order of K, epilogue.
//
// Bytes moved: n * k * sizeof(W), x and the outputs are noise. Checked against a
// double reference in tests/kernels/gemv_test.cu.
#ifndef LOCKSTEP_KERNELS_GEMV_ROW_CUH_
#define LOCKSTEP_KERNELS_GEMV_ROW_CUH_

#include "kernels/bulk_copy.cuh"
#include "kernels/exchange_words.cuh"
#include "kernels/gemv_elements.cuh"
#include "kernels/gemv_plan.h"
#include "kernels/gemv_row_dot.cuh"

namespace lockstep::kernels {

struct RowParams {
  const uint8_t* weights;
  const float* scales;
  int n, k;
  int unit;              // rows that stay in one block: 1, of a gate 2, of a push 8
  int share, remainder;  // units of a block; the first `remainder` blocks have one more
  int split_log2, stages, stage_rows;
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
  uint32_t exchange_number;
};

namespace row {

// Shared memory: ring | x as T | partial sums.
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
template <int S>
__device__ __forceinline__ int VectorOf(int wk, int s) {
  return (wk * S + s) * 32 + static_cast<int>(threadIdx.x % 32);
}

// What a thread asks for at a time: behind the weights that every SM has requested, an
// answer takes a microsecond or two, so there is one wait for all of a usual row.
inline constexpr int kXBatch = 4;
inline constexpr int kReduceBatch = 2;  // of all ranks

__device__ __forceinline__ int XVector(int first, int i) {
  return first + i * kGemvThreads + static_cast<int>(threadIdx.x);
}

template <int N>
__device__ __forceinline__ void LoadBatch(const uint4* from, int first, int end,
                                          uint4 (&batch)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i)
    batch[i] = XVector(first, i) < end ? __ldcg(from + XVector(first, i)) : uint4{};
}

// The same of the sum over ranks plus residual, which also goes to residual_out.
template <typename T, int N>
__device__ __forceinline__ void ReduceBatch(const RowParams& p, int first, int end,
                                            uint4 (&batch)[N]) {
  float sum[N][8];
  SumsOfRanks<T, N>(p.exchange, p.exchange_number, XVector(first, 0), kGemvThreads, end, sum);
  // Not before: the arrival of the sums says that this is complete.
  LoadBatch(static_cast<const uint4*>(p.residual_in), first, end, batch);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int v = XVector(first, i);
    if (v >= end) break;
    float residual[8];
    UnpackVector<T>(batch[i], residual);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum[i][e] += residual[e];
    batch[i] = PackVector<T>(sum[i]);
    if (v % static_cast<int>(gridDim.x) == static_cast<int>(blockIdx.x))
      static_cast<uint4*>(p.residual_out)[v] = batch[i];
  }
}

// Puts a batch into shared.x; returns the sum of its squares.
template <typename T, int N>
__device__ __forceinline__ float StoreBatch(const Shared& shared, int first, int end,
                                            const uint4 (&batch)[N]) {
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int v = XVector(first, i);
    if (v >= end) break;
    shared.x[v] = batch[i];
    float f[8];
    UnpackVector<T>(batch[i], f);
#pragma unroll
    for (int e = 0; e < 8; ++e) squares = __fmaf_rn(f[e], f[e], squares);
  }
  return squares;
}

// Fills shared.x with the row that meets the weights, before any norm, and returns
// this thread's sum of its squares.
template <typename T>
__device__ __forceinline__ float StageX(const RowParams& p, const Shared& shared) {
  const int end = p.k / 8;
  float squares = 0.0f;
  if (p.prologue == GemvPrologue::kReduce) {
    for (int first = 0; first < end; first += kReduceBatch * kGemvThreads) {
      uint4 batch[kReduceBatch];
      ReduceBatch<T>(p, first, end, batch);
      squares += StoreBatch<T>(shared, first, end, batch);
    }
  } else {
    for (int first = 0; first < end; first += kXBatch * kGemvThreads) {
      uint4 batch[kXBatch];
      LoadBatch(static_cast<const uint4*>(p.x), first, end, batch);
      squares += StoreBatch<T>(shared, first, end, batch);
    }
  }
  return squares;
}

// 1 / rms of the row, from every thread's squares; the barrier also publishes shared.x.
__device__ __forceinline__ float InverseRms(const RowParams& p, float squares, float* scratch) {
  squares = WarpSum(squares);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = squares;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kGemvWarps; ++w) total += scratch[w];
  return rsqrtf(total / static_cast<float>(p.k) + p.eps);
}

// This warp's part of x, as it meets the weights.
template <typename W, typename T, int S>
__device__ __forceinline__ void LoadX(const RowParams& p, const Shared& shared, int wk,
                                      float* scratch, float (&x)[S][kPerVector<W>]) {
  constexpr int kParts = kPerVector<W> / 8;  // 16-byte pieces of x for one of weights
  const int vectors = p.k / kPerVector<W>;
  const bool normed = p.prologue != GemvPrologue::kPlain;
  uint4 weight[S][kParts];  // constants: on their way before the wait
#pragma unroll
  for (int s = 0; s < S; ++s) {
    const int v = VectorOf<S>(wk, s);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const uint4* from = static_cast<const uint4*>(p.norm_weight) + v * kParts + i;
      weight[s][i] = normed && v < vectors ? __ldg(from) : uint4{};
    }
  }
  // A reduction polls: what it reads has arrived when it has arrived, and everything
  // older is complete by then, since the kernel that pushed waited for it.
  if (p.prologue != GemvPrologue::kReduce) WaitForPrevious();
  const float squares = StageX<T>(p, shared);
  float scale = 1.0f;
  if (normed) {
    scale = InverseRms(p, squares, scratch);
  } else {
    __syncthreads();
  }
  if (p.prologue == GemvPrologue::kReduce) ClearPreviousSlot(p.exchange, p.exchange_number);
#pragma unroll
  for (int s = 0; s < S; ++s) {
    const int v = VectorOf<S>(wk, s);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      float f[8];
      UnpackVector<T>(v < vectors ? shared.x[v * kParts + i] : uint4{}, f);
      if (normed) {
        float w[8];
        UnpackVector<T>(weight[s][i], w);
#pragma unroll
        for (int e = 0; e < 8; ++e)
          f[e] = ToFloat(FromFloat<T>(f[e] * scale * (w[e] + p.weight_offset)));
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) x[s][i * 8 + e] = f[e];
    }
  }
}
template <typename W, typename T, int S>
__device__ __forceinline__ void LoadX(const RowParams& p, const Shared& shared, int wk,
                                      float* scratch, LaneX<W, S>& x) {
  if constexpr (sizeof(W) == 1) {
    float values[S][kPerVector<W>];
    LoadX<W, T, S>(p, shared, wk, scratch, values);
    PackX<T, S>(values, x);
  } else {
    LoadX<W, T, S>(p, shared, wk, scratch, x.values);
  }
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
  constexpr int kStep = kGemvThreads;
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
        PushWords(p.exchange, p.exchange_number, i % size, first / 8 + i / size, PackVector<T>(v));
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
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kGemvWarps; ++w) key = scratch[w] > key ? scratch[w] : key;
  keys[blockIdx.x] = key;
}

__device__ __forceinline__ void Request(const RowParams& p, const Stretch& stretch, int stage,
                                        int slot, uint8_t* ring, uint64_t* full) {
  const int first = stage * p.stage_rows;
  const uint32_t bytes = min(p.stage_rows, stretch.rows - first) * p.row_bytes;
  BarrierArriveExpecting(full + slot, bytes);
  BulkCopy(ring + slot * p.stage_bytes,
           p.weights + static_cast<size_t>(stretch.begin + first) * p.row_bytes, bytes,
           full + slot);
}

// The products of R rows from one stage, complete in lane 0.
template <typename W, int S, int R>
__device__ __forceinline__ void ReadStage(const uint8_t* stage, uint32_t row_bytes, int vectors,
                                          int wk, int rows, uint4 (&w)[R][S]) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int s = 0; s < S; ++s) {
      const int v = VectorOf<S>(wk, s);
      w[r][s] = r < rows && v < vectors
                    ? *reinterpret_cast<const uint4*>(stage + r * row_bytes + v * 16)
                    : uint4{};
    }
  }
}

}  // namespace row

// The bound on registers is that of larger blocks: 168 a thread leave enough of an SM's
// for a block of decode attention, which then begins while this one ends.
template <typename W, int S>
inline constexpr int kRowBound = S* kPerVector<W> <= 64 ? 384 : kGemvThreads;

template <typename W, typename T, int S>
__global__ void __launch_bounds__(kRowBound<W, S>, 1)
    RowKernel(const __grid_constant__ RowParams p) {
  constexpr int R = StageRows(S), kPaired = sizeof(W) == 1 ? R + R % 2 : R;
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ uint64_t full[kMaxGemvStages], empty[kMaxGemvStages];
  __shared__ float norm_scratch[kGemvWarps];
  __shared__ uint64_t key_scratch[kGemvWarps];
  TriggerDependents();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int block = static_cast<int>(blockIdx.x);
  row::Stretch stretch;
  stretch.begin = (block * p.share + min(block, p.remainder)) * p.unit;
  stretch.rows = (p.share + (block < p.remainder ? 1 : 0)) * p.unit;
  const int num_stages = (stretch.rows + R - 1) / R;

  row::Shared shared;
  shared.ring = dynamic;
  shared.x = reinterpret_cast<uint4*>(dynamic + p.stages * p.stage_bytes);
  shared.sums = reinterpret_cast<float*>(shared.x + p.k / 8);

  const int split = 1 << p.split_log2, groups = kGemvWarps >> p.split_log2;
  if (warp == 0) {
    if (lane < p.stages) {
      BarrierInit(full + lane, 1);
      BarrierInit(empty + lane, 32 * split);
    }
    FenceBarrierInit();
    __syncwarp();
    if (lane < min(p.stages, num_stages)) row::Request(p, stretch, lane, lane, shared.ring, full);
  }
  __syncthreads();

  const int wk = warp & (split - 1), group = warp >> p.split_log2;
  row::LaneX<W, S> x;
  row::LoadX<W, T, S>(p, shared, wk, norm_scratch, x);

  const int vectors = p.k / kPerVector<W>;
  uint64_t key = 0;
  int slot = group, stage = group;
  uint32_t parity = 0;
  for (int begin = 0; begin < stretch.rows; begin += kRowChunk) {
    const int end = min(begin + kRowChunk, stretch.rows);
    for (; stage * R < end; stage += groups) {
      const int first = stage * R, rows = end - first;
      BarrierWait(full + slot, parity, "gemv: weights");
      __syncwarp();  // tensor cores want the warp together
      uint4 w[kPaired][S];
      row::ReadStage<W, S, kPaired>(shared.ring + slot * p.stage_bytes, p.row_bytes, vectors, wk,
                                    min(rows, R), w);
      float sum[kPaired];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if constexpr (sizeof(W) == 2) {
          sum[r] = row::Dot<W, S>(w[r], x);
        } else if (r % 2 == 0) {
          row::DotPair<S>(w[r], w[r + 1], x, lane, sum[r], sum[r + 1]);
          for (float* of_row : {&sum[r], &sum[r + 1]})
            *of_row = row::HoldsPair(lane) ? *of_row * x.unscale : 0.0f;
        }
      }
#pragma unroll
      for (int r = 0; r < R; ++r) sum[r] = WarpSum(sum[r]);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (lane == r && r < rows) shared.sums[wk * kRowChunk + first - begin + r] = sum[r];
      }
      // Not before: sums that are stored say that the stage has been read, and a copy
      // overtakes reads that are under way.
      BarrierArrive(empty + slot);
      if (lane == 0 && wk == 0 && stage + p.stages < num_stages) {
        BarrierWait(empty + slot, parity, "gemv: a stage to be read");
        row::Request(p, stretch, stage + p.stages, slot, shared.ring, full);
      }
      slot += groups;
      if (slot >= p.stages) slot -= p.stages, parity ^= 1;
    }
    __syncthreads();
    // Outputs may be read still by a kernel before the one ahead.
    if (p.prologue == GemvPrologue::kReduce && begin == 0) WaitForPrevious();
    row::Epilogue<T>(p, {p, shared.sums, stretch.begin + begin}, end - begin, key);
    if (end < stretch.rows) __syncthreads();
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
    const cudaError_t status =
        WithRowKernel<W, T>(vectors, [](auto* kernel) { return AllowShared(kernel); });
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
  p.share = args.n / plan.unit / plan.blocks;
  p.remainder = args.n / plan.unit % plan.blocks;
  p.stage_rows = StageRows(plan.vectors);
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
  if (args.exchange != nullptr) p.exchange = MakeExchangeWords(*args.exchange);
  p.exchange_number = args.exchange_number;
  return WithRowKernel<W, T>(plan.vectors, [&](auto* kernel) {
    return LaunchKernel(launch, kernel, plan.blocks, kGemvThreads, plan.shared_bytes, 1, p);
  });
}

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_GEMV_ROW_CUH_
