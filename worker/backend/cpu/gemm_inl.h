// Matrix products over a vector type V of vec_*.h; kernels.h states the order of
// every sum. Included by kernels_*.cc alone.
//
// Two forms of the same arithmetic. Direct: few rows of x; w streams through
// registers once, from memory, widened on the way. Packed: many rows; blocks of
// w and x lie packed in the caches, and accumulators are put aside, all 16 lanes
// of them, while K goes by in blocks.
#ifndef LOCKSTEP_WORKER_BACKEND_CPU_GEMM_INL_H_
#define LOCKSTEP_WORKER_BACKEND_CPU_GEMM_INL_H_

#include <cstddef>
#include <cstdint>

#include "worker/backend/cpu/half.h"
#include "worker/backend/cpu/kernels.h"

#define LOCKSTEP_INLINE [[gnu::always_inline]] static inline

namespace lockstep::cpu {

// Slices are summed as leaves of a binary tree: at most this many levels.
inline constexpr int kMaxLevels = 16;

// The lanes of NR accumulators, each to one float.
template <class V, int NR>
LOCKSTEP_INLINE void SumLanes(const typename V::F* acc, float* out) {
  if constexpr (NR % 4 == 0) {
    for (int j = 0; j < NR; j += 4) V::Sum4(acc[j], acc[j + 1], acc[j + 2], acc[j + 3], out + j);
  } else {
    for (int j = 0; j < NR; ++j) out[j] = V::Sum(acc[j]);
  }
}

// Weights are asked for this far ahead, into the second-level cache: a tile reads
// NR rows at once, and the processor's own prefetch is slow to see NR streams.
inline constexpr int64_t kPrefetchBytes = 32 * 1024;
inline constexpr int64_t kCacheLine = 64;

// out[i][j] = x row i . w row j over k elements, rows of out NR apart. `ahead`:
// not null where w is streamed from memory: advanced by as many bytes as are read.
template <class V, class W, int MR, int NR>
LOCKSTEP_INLINE void DotTile(const float* x, int64_t ldx, const W* const* w, int64_t k, float* out,
                             const char** ahead) {
  typename V::F acc[MR][NR];
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NR; ++j) acc[i][j] = V::Zero();
  }
  const auto step = [&](int64_t at) __attribute__((always_inline)) {
    typename V::F wv[NR];
    for (int j = 0; j < NR; ++j) wv[j] = V::Load(w[j] + at);
    for (int i = 0; i < MR; ++i) {
      const typename V::F xv = V::Load(x + i * ldx + at);
      for (int j = 0; j < NR; ++j) acc[i][j] = V::Fma(xv, wv[j], acc[i][j]);
    }
  };
  constexpr int64_t kLine = kCacheLine / static_cast<int64_t>(sizeof(W));  // elements
  int64_t kk = 0;
  for (; kk + kLine <= k; kk += kLine) {
    for (int64_t at = kk; at < kk + kLine; at += kLanes) step(at);
    if (ahead != nullptr) {
      for (int j = 0; j < NR; ++j, *ahead += kCacheLine) {
        __builtin_prefetch(*ahead, /*rw=*/0, /*locality=*/2);
      }
    }
  }
  for (; kk + kLanes <= k; kk += kLanes) step(kk);
  if (const int64_t rest = k - kk; rest > 0) {
    typename V::F wv[NR];
    for (int j = 0; j < NR; ++j) wv[j] = V::LoadFirst(w[j] + kk, rest);
    for (int i = 0; i < MR; ++i) {
      const typename V::F xv = V::LoadFirst(x + i * ldx + kk, rest);
      for (int j = 0; j < NR; ++j) acc[i][j] = V::Fma(xv, wv[j], acc[i][j]);
    }
  }
  for (int i = 0; i < MR; ++i) SumLanes<V, NR>(acc[i], out + i * NR);
}

// Adds leaf number `leaf`, just put at level `depth` - 1 of the stack, into the
// complete subtrees before it. Like carrying in a binary counter. `add(to, from)`
// adds one level into the one below. Returns the new depth.
template <class Add>
LOCKSTEP_INLINE int CarryLeaf(int depth, int64_t leaf, int64_t leaves, Add add) {
  for (int64_t t = leaf + 1; (t & 1) == 0; t >>= 1, --depth) add(depth - 2, depth - 1);
  if (leaf + 1 == leaves) {
    for (; depth > 1; --depth) add(depth - 2, depth - 1);
  }
  return depth;
}

// One register tile through all slices, to y.
template <class V, class W, int MR, int NR, bool STREAM>
LOCKSTEP_INLINE void SlicedTile(const DirectTask& t, const float* x, const W* w, float* y) {
  const char* at = reinterpret_cast<const char*>(w) + kPrefetchBytes;
  const char** ahead = STREAM ? &at : nullptr;
  const W* rows[NR];
  for (int j = 0; j < NR; ++j) rows[j] = w + j * t.ldw;
  float stack[kMaxLevels][MR * NR];
  if (t.slices == 1) {
    DotTile<V, W, MR, NR>(x, t.ldx, rows, t.k, stack[0], ahead);
  } else {
    const int64_t part = t.k / t.slices;
    int depth = 0;
    for (int64_t s = 0; s < t.slices; ++s) {
      DotTile<V, W, MR, NR>(x + s * part, t.ldx, rows, part, stack[depth++], ahead);
      for (int j = 0; j < NR; ++j) rows[j] += part;
      depth = CarryLeaf(depth, s, t.slices, [&](int to, int from) {
        for (int e = 0; e < MR * NR; ++e) stack[to][e] = stack[to][e] + stack[from][e];
      });
    }
  }
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NR; ++j) y[i * t.ldy + j] = stack[0][i * NR + j];
  }
}

// Rows [i, i + MR) against NR rows of w, then what is left with smaller MR.
template <class V, class W, int MR, int NR>
LOCKSTEP_INLINE void DirectRows(const DirectTask& t, int64_t i, const W* w, float* y) {
  if (i == 0 && t.m >= MR) {
    SlicedTile<V, W, MR, NR, true>(t, t.x, w, y);
    i = MR;
  }
  for (; i + MR <= t.m; i += MR) {
    SlicedTile<V, W, MR, NR, false>(t, t.x + i * t.ldx, w, y + i * t.ldy);
  }
  if constexpr (MR > 1) {
    if (i < t.m) DirectRows<V, W, MR - 1, NR>(t, i, w, y);
  }
}

template <class V, class W>
void GemmDirectOf(const DirectTask& t) {
  const W* w = static_cast<const W*>(t.w);
  int64_t j = 0;
  if (t.m == 1) {
    // Measured: several rows at once for 32-bit weights, one after the other, as
    // plain memory, for 16-bit ones.
    constexpr int kRows = sizeof(W) == sizeof(float) ? V::kGemvN : 1;
    for (; j + kRows <= t.n; j += kRows) {
      SlicedTile<V, W, 1, kRows, true>(t, t.x, w + j * t.ldw, t.y + j);
    }
  } else {
    for (; j + V::kDirectN <= t.n; j += V::kDirectN) {
      DirectRows<V, W, V::kDirectM, V::kDirectN>(t, 0, w + j * t.ldw, t.y + j);
    }
  }
  for (; j < t.n; ++j) DirectRows<V, W, V::kDirectM, 1>(t, 0, w + j * t.ldw, t.y + j);
}

template <class V>
void GemmDirect(const DirectTask& task) {
  switch (task.dtype) {
    case DType::kBFloat16:
      return GemmDirectOf<V, BFloat16>(task);
    case DType::kFloat16:
      return GemmDirectOf<V, Float16>(task);
    default:
      return GemmDirectOf<V, float>(task);
  }
}

// R rows (those from `rows` on read as zero) into [vectors of K][R][16], each
// slice padded with zeros to whole vectors: a zero factor leaves a lane as it is.
template <class V, class T, int R>
LOCKSTEP_INLINE void PackRows(const T* src, int64_t ld, int64_t rows, int64_t k, int64_t slices,
                              float* out) {
  const int64_t part = k / slices;
  for (int64_t s = 0; s < slices; ++s) {
    for (int64_t kk = 0; kk < part; kk += kLanes, out += R * kLanes) {
      const int64_t left = part - kk;
      for (int r = 0; r < R; ++r) {
        const T* from = src + r * ld + s * part + kk;
        const typename V::F x = r >= rows        ? V::Zero()
                                : left >= kLanes ? V::Load(from)
                                                 : V::LoadFirst(from, left);
        V::Store(out + r * kLanes, x);
      }
    }
  }
}

template <class V>
void PackX(const float* x, int64_t ldx, int64_t rows, int64_t k, int64_t slices, float* out) {
  PackRows<V, float, V::kTileM>(x, ldx, rows, k, slices, out);
}

// `vectors` steps of K. acc: the tile's accumulators, all lanes: read unless
// `first`, written unless `last`; then out gets the lanes' sums.
template <class V>
LOCKSTEP_INLINE void PackedTile(const float* x, const float* w, int64_t vectors, bool first,
                                bool last, float* acc, float* out, int64_t ldo) {
  constexpr int MR = V::kTileM, NR = V::kTileN;
  typename V::F sum[MR][NR];
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NR; ++j) {
      sum[i][j] = first ? V::Zero() : V::Load(acc + (i * NR + j) * kLanes);
    }
  }
  for (int64_t v = 0; v < vectors; ++v, x += MR * kLanes, w += NR * kLanes) {
    typename V::F wv[NR];
    for (int j = 0; j < NR; ++j) wv[j] = V::Load(w + j * kLanes);
    for (int i = 0; i < MR; ++i) {
      const typename V::F xv = V::Load(x + i * kLanes);
      for (int j = 0; j < NR; ++j) sum[i][j] = V::Fma(xv, wv[j], sum[i][j]);
    }
  }
  if (last) {
    for (int i = 0; i < MR; ++i) SumLanes<V, NR>(sum[i], out + i * ldo);
  } else {
    for (int i = 0; i < MR; ++i) {
      for (int j = 0; j < NR; ++j) V::Store(acc + (i * NR + j) * kLanes, sum[i][j]);
    }
  }
}

// Blocks of the packed form: rows of x, rows of w (both whole tiles), vectors of
// K. Tiles of x and w stay in the first-level cache, blocks in the second.
template <class V>
struct Blocks {
  static constexpr int64_t kM = (48 / V::kTileM) * V::kTileM;
  static constexpr int64_t kN = 32;
  static constexpr int64_t kKVectors = 32;
};

// Scratch: packed w, put-aside accumulators, partial sums of each tree level.
template <class V, class W>
void GemmPackedOf(const PackedTask& t) {
  using B = Blocks<V>;
  constexpr int64_t MR = V::kTileM, NR = V::kTileN;
  const int64_t packed_k = PackedK(t.k, t.slices);
  const int64_t slice_vectors = packed_k / t.slices / kLanes;
  float* const packed_w = t.scratch;
  float* const aside = packed_w + B::kN * packed_k;
  float* const levels = aside + B::kM * B::kN * kLanes;

  const W* w = static_cast<const W*>(t.w);
  for (int64_t j = 0; j < t.n; j += NR) {
    const int64_t rows = t.n - j < NR ? t.n - j : NR;
    PackRows<V, W, NR>(w + j * t.ldw, t.ldw, rows, t.k, t.slices, packed_w + j * packed_k);
  }

  for (int64_t m0 = 0; m0 < t.m; m0 += B::kM) {
    const int64_t block_m = t.m - m0 < B::kM ? t.m - m0 : B::kM;
    int depth = 0;
    for (int64_t s = 0; s < t.slices; ++s) {
      float* const partial = levels + depth++ * B::kM * B::kN;
      for (int64_t v0 = 0; v0 < slice_vectors; v0 += B::kKVectors) {
        const int64_t vectors =
            slice_vectors - v0 < B::kKVectors ? slice_vectors - v0 : B::kKVectors;
        const bool first = v0 == 0, last = v0 + vectors == slice_vectors;
        const int64_t at = (s * slice_vectors + v0) * kLanes;  // into a packed row
        for (int64_t i = 0; i < block_m; i += MR) {
          const float* x = t.packed_x + (m0 + i) * packed_k + at * MR;
          for (int64_t j = 0; j < t.n; j += NR) {
            PackedTile<V>(x, packed_w + j * packed_k + at * NR, vectors, first, last,
                          aside + (i * B::kN + j * MR) * kLanes, partial + i * B::kN + j, B::kN);
          }
        }
      }
      depth = CarryLeaf(depth, s, t.slices, [&](int to, int from) {
        float* a = levels + to * B::kM * B::kN;
        const float* b = levels + from * B::kM * B::kN;
        for (int64_t e = 0; e < B::kM * B::kN; ++e) a[e] = a[e] + b[e];
      });
    }
    for (int64_t i = 0; i < block_m; ++i) {
      for (int64_t j = 0; j < t.n; ++j) t.y[(m0 + i) * t.ldy + j] = levels[i * B::kN + j];
    }
  }
}

template <class V>
void GemmPacked(const PackedTask& task) {
  switch (task.dtype) {
    case DType::kBFloat16:
      return GemmPackedOf<V, BFloat16>(task);
    case DType::kFloat16:
      return GemmPackedOf<V, Float16>(task);
    default:
      return GemmPackedOf<V, float>(task);
  }
}

}  // namespace lockstep::cpu

#endif  // LOCKSTEP_WORKER_BACKEND_CPU_GEMM_INL_H_
