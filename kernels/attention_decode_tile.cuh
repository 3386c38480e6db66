// What a warp makes of its tiles of 16 positions: scores of up to 8 query heads a head tile,
// their exponentials, and the values weighted by them. See attention_decode_kernel.cuh for
// how the operands lie in the lanes.
#ifndef LOCKSTEP_KERNELS_ATTENTION_DECODE_TILE_CUH_
#define LOCKSTEP_KERNELS_ATTENTION_DECODE_TILE_CUH_

#include <cmath>
#include <cstdint>

#include "kernels/attention_mma.cuh"

namespace lockstep::kernels::decode {

template <typename KV, int kDim, int kHeadTiles>
class TileSums {
 public:
  using M = typename Chunk<KV>::M;
  using Raw = typename Chunk<KV>::Raw;
  static constexpr int kKChunks = kDim / 32, kVChunks = kDim / 64, kOutTiles = kDim / 16;

  __device__ __forceinline__ TileSums() {
#pragma unroll
    for (int n = 0; n < kHeadTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        top_[n][i] = -INFINITY;
        sum_[n][i] = 0.0f;
      }
#pragma unroll
      for (int m = 0; m < kOutTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out_[n][m][i] = 0.0f;
      }
    }
  }

  // The next tile's q . k.
  __device__ __forceinline__ void Multiply(const uint4 (&q)[kHeadTiles][kKChunks],
                                           const Raw (&k)[2][kKChunks]) {
    // Two chains of products: one would be waited for eight times over.
    float other[kHeadTiles][4] = {};
#pragma unroll
    for (int n = 0; n < kHeadTiles; ++n) {
#pragma unroll
      for (int s = 0; s < 4; ++s) score_[n][s] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kKChunks; ++j) {
      const uint4 a = Chunk<KV>::Widen(k[0][j]), b = Chunk<KV>::Widen(k[1][j]);
#pragma unroll
      for (int n = 0; n < kHeadTiles; ++n) {
        Mma<M>(score_[n], a.x, b.x, a.y, b.y, q[n][j].x, q[n][j].y);
        Mma<M>(other[n], a.z, b.z, a.w, b.w, q[n][j].z, q[n][j].w);
      }
    }
#pragma unroll
    for (int n = 0; n < kHeadTiles; ++n) {
#pragma unroll
      for (int s = 0; s < 4; ++s) score_[n][s] += other[n][s];
    }
  }

  // Their weights. Lane (r, c) has positions r and r + 8, seen if `low` and `high` say so, of
  // heads 2c and 2c + 1.
  __device__ __forceinline__ void Weigh(bool low, bool high, float factor) {
    bool outgrown = false;
#pragma unroll
    for (int n = 0; n < kHeadTiles; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float& s0 = score_[n][h];
        float& s1 = score_[n][2 + h];
        s0 = low ? s0 * factor : -INFINITY;
        s1 = high ? s1 * factor : -INFINITY;
        outgrown |= fmaxf(s0, s1) > top_[n][h] + kSlack;
      }
    }
    if (__any_sync(~0u, outgrown)) Raise();
#pragma unroll
    for (int n = 0; n < kHeadTiles; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float& s0 = score_[n][h];
        float& s1 = score_[n][2 + h];
        s0 = Exp2(s0 - top_[n][h]);
        s1 = Exp2(s1 - top_[n][h]);
        sum_[n][h] += s0 + s1;
      }
      weight_[n][0] = Transpose8x8(PackPair<M>(score_[n][0], score_[n][1]));
      weight_[n][1] = Transpose8x8(PackPair<M>(score_[n][2], score_[n][3]));
    }
  }

  // The tile's values.
  __device__ __forceinline__ void Add(const Raw (&v)[4][kVChunks]) {
    // Rows r and r + 8 of an output tile: element e of chunks r + 8 j and
    // r + 8 (j + 1), or, of a single chunk, its elements e and e + 4.
    constexpr int kPairs = kVChunks == 1 ? 1 : kVChunks / 2;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      uint4 a[4], b[4];
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        a[t] = Chunk<KV>::Widen(v[t][kVChunks == 1 ? 0 : 2 * pair]);
        b[t] = Chunk<KV>::Widen(v[t][kVChunks == 1 ? 0 : 2 * pair + 1]);
      }
      constexpr int kElements = kVChunks == 1 ? 4 : 8;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const int f = kVChunks == 1 ? e + 4 : e;
        const uint32_t a0 = Interleave(a[0], a[1], e), a1 = Interleave(b[0], b[1], f);
        const uint32_t a2 = Interleave(a[2], a[3], e), a3 = Interleave(b[2], b[3], f);
#pragma unroll
        for (int n = 0; n < kHeadTiles; ++n) {
          Mma<M>(out_[n][pair * kElements + e], a0, a1, a2, a3, weight_[n][0], weight_[n][1]);
        }
      }
    }
  }

  // statistics(head, {largest score, sum}) and output(head, d, four elements from d on), of
  // each head below `group` and element below `head_dim`.
  template <typename Statistics, typename Output>
  __device__ __forceinline__ void Store(int group, int head_dim, Statistics statistics,
                                        Output output) const {
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
#pragma unroll
    for (int n = 0; n < kHeadTiles; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float total = sum_[n][h];
        total += __shfl_xor_sync(~0u, total, 4);
        total += __shfl_xor_sync(~0u, total, 8);
        total += __shfl_xor_sync(~0u, total, 16);
        const int head = 8 * n + 2 * c + h;
        if (head >= group) continue;
        if (r == 0) statistics(head, make_float2(top_[n][h], total));
#pragma unroll
        for (int m = 0; m < kOutTiles; m += 4) {
#pragma unroll
          for (int row_half = 0; row_half < 2; ++row_half) {
            const int chunk =
                kVChunks == 1 ? r : ChunkOf<KV, kVChunks>(r, 8, 2 * (m / 8) + row_half);
            const int first = kVChunks == 1 ? 4 * row_half : m % 8;
            const int i = 2 * row_half + h;
            if (chunk * 8 >= head_dim) continue;
            output(head, chunk * 8 + first,
                   make_float4(out_[n][m][i], out_[n][m + 1][i], out_[n][m + 2][i],
                               out_[n][m + 3][i]));
          }
        }
      }
    }
  }

 private:
  // By how much, as a power of two, a score may exceed the one that weights are relative to: that
  // one is then seldom raised, which multiplies all sums.
  static constexpr float kSlack = 8.0f;

  // To the largest score of any position so far.
  __device__ __forceinline__ void Raise() {
#pragma unroll
    for (int n = 0; n < kHeadTiles; ++n) {
      float shrink[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float m = fmaxf(score_[n][h], score_[n][2 + h]);
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 4));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 8));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 16));
        m = fmaxf(m, top_[n][h]);
        shrink[h] = Exp2(top_[n][h] - m);
        top_[n][h] = m;
        sum_[n][h] *= shrink[h];
      }
#pragma unroll
      for (int m = 0; m < kOutTiles; ++m) {
        out_[n][m][0] *= shrink[0];
        out_[n][m][1] *= shrink[1];
        out_[n][m][2] *= shrink[0];
        out_[n][m][3] *= shrink[1];
      }
    }
  }

  float top_[kHeadTiles][2], sum_[kHeadTiles][2];
  float out_[kHeadTiles][kOutTiles][4];
  float score_[kHeadTiles][4];
  uint32_t weight_[kHeadTiles][2];
};

}  // namespace lockstep::kernels::decode

#endif  // LOCKSTEP_KERNELS_ATTENTION_DECODE_TILE_CUH_
