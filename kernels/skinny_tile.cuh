// The pieces of which the product with 2..16 rows is made: see skinny.cuh.
#ifndef LOCKSTEP_KERNELS_SKINNY_TILE_CUH_
#define LOCKSTEP_KERNELS_SKINNY_TILE_CUH_

#include "kernels/bulk_copy.cuh"
#include "kernels/gemv_elements.cuh"
#include "kernels/gemv_plan.h"

namespace lockstep::kernels {

struct SkinnyParams {
  const uint8_t* weights;
  const float* scales;
  const void* x;
  int64_t x_stride;  // elements
  int n, k, m;
  int cluster, split_log2, pieces, stages;
  uint32_t row_bytes, row_stride, stage_bytes;

  GemvEpilogue epilogue;
  void* out;
  int64_t out_stride;
  const void* bias;
  uint64_t* keys;
  int keys_stride, first_id;
};

namespace skinny {

inline constexpr int kTile = 16;        // weight rows
inline constexpr int kPieceBytes = 64;  // of a weight row
// A column of partial sums: 16 rows and padding against bank conflicts.
inline constexpr int kColumn = 20;

template <typename W>
inline constexpr int kPieceElements = kPieceBytes / static_cast<int>(sizeof(W));

__device__ __forceinline__ int ClusterRank(int cluster) {
  return static_cast<int>(blockIdx.x) % cluster;
}

// The pieces of K of one warp of the cluster.
struct Part {
  int first, count;
};
template <typename W>
__device__ __forceinline__ Part PartOf(const SkinnyParams& p, int rank, int wk) {
  const int first = ((rank << p.split_log2) + wk) * p.pieces;
  const int count = p.k / kPieceElements<W> - first;
  return {first, max(0, min(count, p.pieces))};
}

template <typename T>
__device__ __forceinline__ void Multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                         uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// A lane's 16 bytes of a weight row as pairs of T, in the order that OrderedX gives x.
template <typename W, typename T>
inline constexpr int kPairs = 8 / static_cast<int>(sizeof(W));  // words: 4 or 8

template <typename W, typename T>
__device__ __forceinline__ void WeightPairs(const uint4& v, uint32_t (&out)[kPairs<W, T>]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(W) == 2) {
      out[i] = words[i];
    } else if constexpr (std::is_same_v<T, __half>) {
      out[2 * i] = HalvesOfE4M3(words[i]);
      out[2 * i + 1] = HalvesOfE4M3(words[i] >> 16);
    } else {
      // Sign and the seven bits of e4m3 moved to their places in a bf16: its value is
      // then 2^-120 of what is meant, denormals included. Bytes 0 and 2, 1 and 3.
      const __nv_bfloat162 scale =
          __halves2bfloat162(__ushort_as_bfloat16(0x7b80), __ushort_as_bfloat16(0x7b80));
      const uint32_t raw[2] = {((words[i] << 4) & 0x07f007f0u) | ((words[i] << 8) & 0x80008000u),
                               ((words[i] >> 4) & 0x07f007f0u) | (words[i] & 0x80008000u)};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        __nv_bfloat162 pair;
        memcpy(&pair, &raw[j], 4);
        pair = __hmul2(pair, scale);
        memcpy(&out[2 * i + j], &pair, 4);
      }
    }
  }
}

// Two words of x (elements 0..3) in the order of WeightPairs.
template <typename W, typename T>
__device__ __forceinline__ void OrderX(uint32_t& low, uint32_t& high) {
  if constexpr (sizeof(W) == 1 && !std::is_same_v<T, __half>) {
    const uint32_t even = __byte_perm(low, high, 0x5410);
    high = __byte_perm(low, high, 0x7632);
    low = even;
  }
}

// The words of x that meet one piece of weights: [rows of x / 8][kPairs].
template <typename W, typename T, int kRows, int S>
using XPart = uint32_t[S][kRows / 8][kPairs<W, T>];

template <typename W, typename T, int kRows, int S>
__device__ __forceinline__ void LoadX(const SkinnyParams& p, const Part& part,
                                      XPart<W, T, kRows, S>& x) {
  const int group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
  constexpr int kVectors = kPairs<W, T> / 4;
#pragma unroll
  for (int s = 0; s < S; ++s) {
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      const int row = j * 8 + group;
      const T* from = static_cast<const T*>(p.x) + row * p.x_stride +
                      (part.first + s) * kPieceElements<W> + quad * (kVectors * 8);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const uint4 words = s < part.count && row < p.m
                                ? __ldcg(reinterpret_cast<const uint4*>(from) + v)
                                : uint4{};
        x[s][j][v * 4] = words.x;
        x[s][j][v * 4 + 1] = words.y;
        x[s][j][v * 4 + 2] = words.z;
        x[s][j][v * 4 + 3] = words.w;
      }
    }
  }
#pragma unroll
  for (int s = 0; s < S; ++s) {
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
#pragma unroll
      for (int i = 0; i < kPairs<W, T>; i += 2) OrderX<W, T>(x[s][j][i], x[s][j][i + 1]);
    }
  }
}

// [rows of x / 8][two chains: the unit is deep][fragment]
template <int kRows>
using Accumulator = float[kRows / 8][2][4];

template <typename W, typename T, int kRows, int S>
__device__ __forceinline__ void MultiplyStage(const SkinnyParams& p, const uint8_t* stage,
                                              const Part& part, const XPart<W, T, kRows, S>& x,
                                              Accumulator<kRows>& sum) {
  const int group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
  const uint8_t* low = stage + group * p.row_stride + quad * 16;
  const uint8_t* high = low + 8 * p.row_stride;
#pragma unroll
  for (int s = 0; s < S; ++s) {
    if (s >= part.count) break;
    uint32_t a[kPairs<W, T>], b[kPairs<W, T>];
    WeightPairs<W, T>(*reinterpret_cast<const uint4*>(low + s * kPieceBytes), a);
    WeightPairs<W, T>(*reinterpret_cast<const uint4*>(high + s * kPieceBytes), b);
#pragma unroll
    for (int i = 0; i < kPairs<W, T>; i += 2) {
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j)
        Multiply<T>(sum[j][i / 2 % 2], a[i], b[i], a[i + 1], b[i + 1], x[s][j][i], x[s][j][i + 1]);
    }
  }
}

// -> partial [rows of x][kColumn].
template <int kRows>
__device__ __forceinline__ void StorePartial(const Accumulator<kRows>& sum, float* partial) {
  const int group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < kRows / 8; ++j) {
    float* column = partial + (j * 8 + quad * 2) * kColumn + group;
    column[0] = sum[j][0][0] + sum[j][1][0];
    column[kColumn] = sum[j][0][1] + sum[j][1][1];
    column[8] = sum[j][0][2] + sum[j][1][2];
    column[kColumn + 8] = sum[j][0][3] + sum[j][1][3];
  }
}

// The last of the work on output element (row of x, weight row r).
template <typename T>
__device__ __forceinline__ float Scaled(const SkinnyParams& p, int r, float v) {
  return p.scales == nullptr || r >= p.n ? v : v * __ldg(p.scales + r);
}
template <typename T>
__device__ __forceinline__ void Finish(const SkinnyParams& p, int row, int r, float v,
                                       uint64_t& key) {
  if (row >= p.m || r >= p.n) return;
  v = Scaled<T>(p, r, v);
  if (p.epilogue == GemvEpilogue::kLogits) {
    if (p.out != nullptr) static_cast<float*>(p.out)[row * p.out_stride + r] = v;
    const uint64_t candidate = LogitKey(v, p.first_id + r);
    key = candidate > key ? candidate : key;
    return;
  }
  if (p.bias != nullptr) v += ToFloat(static_cast<const T*>(p.bias)[r]);
  static_cast<T*>(p.out)[row * p.out_stride + r] = FromFloat<T>(v);
}
// n is even: both rows of a gate exist or neither.
template <typename T>
__device__ __forceinline__ void FinishGate(const SkinnyParams& p, int row, int r, float gate,
                                           float up) {
  if (row >= p.m || r >= p.n) return;
  static_cast<T*>(p.out)[row * p.out_stride + r / 2] =
      FromFloat<T>(Gated(p.epilogue, Scaled<T>(p, r, gate), Scaled<T>(p, r + 1, up)));
}

// Outputs [first, first + stride, ...) of `tiles` tiles, the first of which is weight
// row `base`: sum(tile, row, r) gives the finished sums.
template <typename T, int kRows, typename Sum>
__device__ __forceinline__ void FinishTiles(const SkinnyParams& p, int base, int tiles, int first,
                                            int stride, const Sum& sum, uint64_t& key) {
  if (p.epilogue == GemvEpilogue::kSiluGate || p.epilogue == GemvEpilogue::kGeluGate) {
    for (int i = first; i < tiles * kRows * 8; i += stride) {
      const int tile = i / (kRows * 8), row = i / 8 % kRows, r = i % 8 * 2;
      FinishGate<T>(p, row, base + tile * kTile + r, sum(tile, row, r), sum(tile, row, r + 1));
    }
  } else {
    for (int i = first; i < tiles * kRows * kTile; i += stride) {
      const int tile = i / (kRows * kTile), row = i / kTile % kRows, r = i % kTile;
      Finish<T>(p, row, base + tile * kTile + r, sum(tile, row, r), key);
    }
  }
}

// All blocks of the cluster: everything written to shared memory before is visible
// to the others after.
__device__ __forceinline__ void ClusterBarrier(uint64_t* barrier, int cluster, uint32_t parity) {
  ComputeBarrier();
  if (threadIdx.x < static_cast<unsigned>(cluster)) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(
            SharedAddress(barrier)),
        "r"(threadIdx.x)
        : "memory");
  }
  Patience patience(kBarrierPatienceNs);
  for (;;) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(SharedAddress(barrier)), "r"(parity)
        : "memory");
    if (done != 0) return;
    if (patience.Exhausted()) TrapAtBarrier("skinny: the cluster");
  }
}
__device__ __forceinline__ float LoadRemote(const float* local, int rank) {
  float v;
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [remote];\n}"
      : "=f"(v)
      : "r"(SharedAddress(local)), "r"(rank)
      : "memory");
  return v;
}

// Thread t holds a key of row t / kTile % kRows; the largest of each -> keys[row][block].
template <int kRows>
__device__ __forceinline__ void StoreKeys(const SkinnyParams& p, uint64_t key, uint64_t* scratch) {
  scratch[threadIdx.x] = key;
  ComputeBarrier();
  const int row = threadIdx.x;
  if (row >= p.m) return;
  key = 0;
  for (int t = row * kTile; t < kGemvWarps * 32; t += kRows * kTile) {
    for (int i = t; i < t + kTile; ++i) key = scratch[i] > key ? scratch[i] : key;
  }
  p.keys[static_cast<int64_t>(row) * p.keys_stride + blockIdx.x] = key;
}

// Shared memory: ring | partial sums [2][warp][kRows][kColumn] | sums of the cluster.
template <int kRows>
inline constexpr int kPartial = kRows* kColumn;

// The stretch of tiles that a cluster owns.
struct Stretch {
  int first, tiles;
};
__device__ __forceinline__ Stretch StretchOf(const SkinnyParams& p) {
  const int64_t tiles = (p.n + kTile - 1) / kTile;
  const int group = static_cast<int>(blockIdx.x) / p.cluster;
  const int groups = static_cast<int>(gridDim.x) / p.cluster;
  const int first = static_cast<int>(group * tiles / groups);
  return {first, static_cast<int>((group + 1) * tiles / groups) - first};
}

// By a whole warp: a row a lane. Stage i is that of warp i % kGemvWarps.
template <typename W>
__device__ __forceinline__ void Request(const SkinnyParams& p, const Stretch& stretch, int i,
                                        int slot, uint8_t* ring, uint64_t* full) {
  const int warp = i % kGemvWarps, lane = threadIdx.x % 32;
  const int per_step = kGemvWarps >> p.split_log2;
  const int tile = i / kGemvWarps * per_step + (warp >> p.split_log2);
  const Part part = PartOf<W>(p, ClusterRank(p.cluster), warp & ((1 << p.split_log2) - 1));
  const int row = (stretch.first + tile) * kTile;
  const int rows = tile < stretch.tiles ? min(kTile, p.n - row) : 0;
  const uint32_t bytes = part.count * kPieceBytes;
  if (lane == 0) BarrierArriveExpecting(full + slot, rows * bytes);
  __syncwarp();
  if (lane < rows && bytes != 0) {
    BulkCopy(ring + static_cast<size_t>(slot) * p.stage_bytes + lane * p.row_stride,
             p.weights + static_cast<size_t>(row + lane) * p.row_bytes + part.first * kPieceBytes,
             bytes, full + slot);
  }
}

}  // namespace skinny

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_SKINNY_TILE_CUH_
