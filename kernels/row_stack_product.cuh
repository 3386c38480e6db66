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

// A product as a block sees it, see ProductPlan. In shared memory: what is indexed by a step in
// the kernel's parameters is hundreds of cycles away.
struct alignas(16) Product {
  int begin, rows;  // weight rows, this block's
  int parts, split_log2, count, row_bytes, capacity;
  Product() = default;
  __device__ __forceinline__ explicit Product(const ProductPlan& plan)
      : parts(plan.parts),
        split_log2(plan.split_log2),
        count(plan.count),
        row_bytes(plan.row_bytes),
        capacity(plan.capacity) {
    const Stretch mine(plan, 0);
    begin = mine.begin;
    rows = mine.rows;
  }
};

// What of a block's shared memory the products use.
struct Shared {
  // The row that meets the weights. Of T; or where those are e4m3 of f16, brought into its range
  // by a power of two (what that rounds is 2^-39 of the bound on the largest), vectors of 8
  // elements with even numbers first, then the odd ones: so a lane's 16 elements come without
  // conflicts.
  uint8_t* x;
  int halves;  // from the even ones to the odd ones
  // The sum of all so far, of T; a thread keeps vectors threadIdx.x + i * kThreads. Every
  // block has all of it: each must read every sum anyway, and nobody waits for its own.
  uint4* residual;
  float* partials;          // [parts][RowsOfChunk][kPartials]
  float* sums;              // [RowsOfChunk]
  float* norms;             // [kWarps] squares
  float* largest;           // [kWarps] no less than the largest of x
  float* unscale;           // the inverse of that power of two
  const Product* products;  // by step
  __device__ __forceinline__ uint4* Halves(int v) const {
    return reinterpret_cast<uint4*>(x + (v & 1) * halves) + v / 2;
  }
};

// This warp's part of the row in shared memory.
template <typename W, typename T, int S>
__device__ __forceinline__ void LoadX(const Product& q, int part, const Shared& shared,
                                      row::LaneX<W, S>& x) {
  const int vectors = q.row_bytes / 16;
#pragma unroll
  for (int s = 0; s < S; ++s) {
    const int at = (part * q.count + s) * 32 + static_cast<int>(threadIdx.x % 32);
    const bool there = s < q.count && at < vectors;
    if constexpr (sizeof(W) == 1) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const uint4 v = there ? *shared.Halves(2 * at + odd) : uint4{};
        x.pairs[s][4 * odd] = v.x;
        x.pairs[s][4 * odd + 1] = v.y;
        x.pairs[s][4 * odd + 2] = v.z;
        x.pairs[s][4 * odd + 3] = v.w;
      }
    } else {
      UnpackVector<T>(there ? reinterpret_cast<const uint4*>(shared.x)[at] : uint4{}, x.values[s]);
    }
  }
}

// The partial sums of this warp's part of rows [from, to) of the block's stretch, which begin a
// piece. What there is between a piece and the next decides how soon a ring that filled up
// during a wait has been caught up with.
template <typename W, typename T, int S>
__device__ __forceinline__ void MultiplyPieces(const Params& p, const Product& q,
                                               const Shared& shared, int from, int to, Ring& ring) {
  // Warps that share a row have each a part of K; the others have other rows.
  const int warp = threadIdx.x / 32, part = warp & ((1 << q.split_log2) - 1);
  if (part >= q.parts) return;
  bool ready = ring.Ready();
  row::LaneX<W, S> x;
  LoadX<W, T, S>(q, part, shared, x);
  constexpr int R = PieceRows(S), kPaired = sizeof(W) == 1 ? R + R % 2 : R;
  const unsigned lane = threadIdx.x % 32;
  const int stride = q.count * 512, turn = (kWarps >> q.split_log2) * R;
  // Of a row. Where a lane has nothing x is 0, and it reads the end instead: what else lies there
  // may be no number.
  const int last = min(stride, q.row_bytes - part * stride) - 16;
  const bool holds = sizeof(W) == 1 ? row::HoldsPair(lane) : lane % 4 == 0;
  float* const partials =
      shared.partials + (part * RowsOfChunk(p, q.split_log2) - from) * kPartials + lane / 4;
#pragma unroll 1
  for (int row = from + (warp >> q.split_log2) * R; row < to; row += turn) {
    const uint8_t* const piece = ring.Await(ready);
    uint64_t* const empty = ring.Advance();
    uint4 w[kPaired][S];
#pragma unroll
    for (int r = 0; r < kPaired; ++r) {
#pragma unroll
      for (int s = 0; s < S; ++s)
        w[r][s] = r < R ? *reinterpret_cast<const uint4*>(
                              piece + r * stride + min(s * 512 + static_cast<int>(lane) * 16, last))
                        : uint4{};
    }
    // Of 16 bits at once: up to 3 % faster than behind the sums, though that needs no fence.
    if constexpr (sizeof(W) == 2) {
      FenceReadsBeforeCopies();
      BarrierArrive(empty);
    }
    ready = ring.Ready();
    float sum[kPaired];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if constexpr (sizeof(W) == 2) {
        sum[r] = row::Dot<W, S>(w[r], x);
        sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
        sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
      } else if (r % 2 == 0) {
        row::DotPair<S>(w[r], w[r + 1], x, lane, sum[r], sum[r + 1]);
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (holds && row + r < to) partials[(row + r) * kPartials] = sum[r];
    }
    // Behind the sums, for which the whole warp's reads have ended.
    if constexpr (sizeof(W) == 1) BarrierArrive(empty);
  }
}

// Asks for the scales of `rows` rows, to be where their sums will; no register waits for them.
__device__ __forceinline__ void AskForScales(const Shared& shared, int rows, const float* scales) {
#pragma unroll 1
  for (int r = threadIdx.x; r < rows; r += kThreads) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(SharedAddress(shared.sums + r)),
                 "l"(scales + r)
                 : "memory");
  }
}
// Adds up the partial sums of `rows` rows; behind a barrier, and a barrier must follow. scaled:
// of e4m3, whose scales this thread has asked for.
__device__ __forceinline__ void AddParts(const Params& p, const Product& q, const Shared& shared,
                                         int rows, bool scaled) {
  const float4* const partials = reinterpret_cast<const float4*>(shared.partials);
  float unscale = 1.0f;
  if (scaled) {
    asm volatile("cp.async.wait_all;" ::: "memory");
    unscale = *shared.unscale;
  }
#pragma unroll 1
  for (int r = threadIdx.x; r < rows; r += kThreads) {
    float sum = 0.0f;
#pragma unroll 2
    for (int part = 0; part < q.parts; ++part) {
      const float4* const v =
          partials + (part * RowsOfChunk(p, q.split_log2) + r) * (kPartials / 4);
      const float4 a = v[0], b = v[1];
      sum += ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
    }
    shared.sums[r] = scaled ? sum * unscale * shared.sums[r] : sum;
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
