// A product of the walk through the layers: the row as it meets the weights, the dot
// products of a warp's pieces, and where the sums go.
#ifndef LOCKSTEP_KERNELS_ROW_STACK_PRODUCT_CUH_
#define LOCKSTEP_KERNELS_ROW_STACK_PRODUCT_CUH_

#include "kernels/exchange_words.cuh"
#include "kernels/gemv_elements.cuh"
#include "kernels/gemv_row_dot.cuh"
#include "kernels/row_stack_feed.cuh"
#include "kernels/row_stack_words.cuh"

namespace lockstep::kernels::stack {

// What of a block's shared memory the products use.
struct Shared {
  uint8_t* x;  // the row that meets the weights, of T
  // The sum of all so far, of T; a thread keeps vectors threadIdx.x + i * kThreads. Every
  // block has all of it: each must read every sum anyway, and nobody waits for its own.
  uint4* residual;
  float* sums;   // [parts][kSums >> split_log2]
  float* norms;  // [kWarps] squares
};

// This warp's part of the row in shared memory.
template <typename W, typename T, int S>
__device__ __forceinline__ void LoadX(const ProductPlan& q, int part, const uint8_t* row,
                                      float (&x)[S][kPerVector<W>]) {
  constexpr int kParts = kPerVector<W> / 8;
  const int vectors = q.row_bytes / 16;
#pragma unroll
  for (int s = 0; s < S; ++s) {
    const int at = (part * q.count + s) * 32 + static_cast<int>(threadIdx.x % 32);
    const bool there = s < q.count && at < vectors;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      float f[8];
      UnpackVector<T>(there ? reinterpret_cast<const uint4*>(row)[at * kParts + i] : uint4{}, f);
#pragma unroll
      for (int e = 0; e < 8; ++e) x[s][i * 8 + e] = f[e];
    }
  }
}
template <typename W, typename T, int S>
__device__ __forceinline__ void LoadX(const ProductPlan& q, int part, const uint8_t* row,
                                      row::LaneX<W, S>& x) {
  if constexpr (sizeof(W) == 1) {
    float values[S][kPerVector<W>];
    LoadX<W, T, S>(q, part, row, values);
    row::PackX<T, S>(values, x);
  } else {
    LoadX<W, T, S>(q, part, row, x.values);
  }
}

// The sums of this warp's part of rows [from, to) of the block's stretch, which begin a piece.
template <typename W, typename T, int S>
__device__ __forceinline__ void MultiplyPieces(const ProductPlan& q, const Stretch& mine,
                                               const Shared& shared, int from, int to, Ring& ring) {
  if (mine.part >= q.parts) return;
  row::LaneX<W, S> x;
  LoadX<W, T, S>(q, mine.part, shared.x, x);
  float* const sums = shared.sums + mine.part * (kSums >> q.split_log2);
  constexpr int R = PieceRows(S), kPaired = sizeof(W) == 1 ? R + R % 2 : R;
  const int lane = threadIdx.x % 32;
  const int vectors = q.row_bytes / 16 - mine.part * q.count * 32;
#pragma unroll 1
  for (int row = from + mine.group * R; row < to; row += mine.groups * R) {
    const uint8_t* piece = ring.Await();
    uint4 w[kPaired][S];
#pragma unroll
    for (int r = 0; r < kPaired; ++r) {
#pragma unroll
      for (int s = 0; s < S; ++s) {
        const int at = s * 32 + lane;
        const bool there = r < R && row + r < to && s < q.count && at < vectors;
        w[r][s] =
            there ? *reinterpret_cast<const uint4*>(piece + r * q.count * 512 + at * 16) : uint4{};
      }
    }
    ring.Release();
    float sum[kPaired];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if constexpr (sizeof(W) == 2) {
        sum[r] = row::Dot<W, S>(w[r], x);
      } else if (r % 2 == 0) {
        row::DotPair<S>(w[r], w[r + 1], x, sum[r], sum[r + 1]);
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) sum[r] = WarpSum(sum[r]);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (lane == r && row + r < to) sums[row - from + r] = sum[r];
    }
  }
}

// Adds up the parts of `rows` rows, in place of the first; behind a barrier, and a barrier
// must follow. scales: of these rows, or null.
__device__ __forceinline__ void AddParts(const ProductPlan& q, const Shared& shared, int rows,
                                         const float* scales) {
#pragma unroll 1
  for (int r = threadIdx.x; r < rows; r += kThreads) {
    float sum = 0.0f;
#pragma unroll 1
    for (int part = 0; part < q.parts; ++part)
      sum += shared.sums[part * (kSums >> q.split_log2) + r];
    shared.sums[r] = scales == nullptr ? sum : sum * __ldg(scales + r);
  }
}

// The sums of `rows` rows from weight row `first` on, to where they are waited for.
template <typename T>
__device__ __forceinline__ void SendSums(const Params& p, int step, int layer, int first, int rows,
                                         const float* sums) {
  const int tid = threadIdx.x;
  if (step == kQkv) {
    uint32_t* out = p.words.qkv[layer & 1] + first / 2;
#pragma unroll 1
    for (int i = tid; i < rows / 2; i += kThreads)
      StoreWords(out + i, Sendable(kernels::PackPair<T>(sums[2 * i], sums[2 * i + 1])));
  } else if (step == kGateUp) {
    uint32_t* out = p.words.activated[layer & 1] + first / 4;
#pragma unroll 1
    for (int i = tid; i < rows / 4; i += kThreads) {
      const float4 v = reinterpret_cast<const float4*>(sums)[i];
      StoreWords(out + i,
                 Sendable(kernels::PackPair<T>(Gated(p.gate, v.x, v.y), Gated(p.gate, v.z, v.w))));
    }
  } else if (step == kHead) {
#pragma unroll 1
    for (int r = tid; r < rows; r += kThreads) p.logits[first + r] = sums[r];
  } else {
    const int size = p.exchange.size;
    const uint32_t number = 2 * layer + (step == kDown);
#pragma unroll 1
    for (int i = tid; i < rows / 8 * size; i += kThreads) {
      float v[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] = sums[i / size * 8 + e];
      PushWords(p.exchange, number, i % size, first / 8 + i / size, PackVector<T>(v));
    }
  }
}

}  // namespace lockstep::kernels::stack

#endif  // LOCKSTEP_KERNELS_ROW_STACK_PRODUCT_CUH_
