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
  int share, remainder;  // tiles of a block; the first `remainder` blocks have one more
  int phases, pieces, depth;
  uint32_t row_bytes, row_stride, stage_bytes;

  GemvEpilogue epilogue;
  void* out;
  int64_t out_stride;
  const void* bias;
  uint64_t* keys;
  int first_id;
};

namespace skinny {

inline constexpr int kTile = 16;        // weight rows
inline constexpr int kPieceBytes = 64;  // of a weight row
// A column of partial sums: 16 rows and padding against bank conflicts.
inline constexpr int kColumn = 20;
template <int kRows>
inline constexpr int kPartial = kRows* kColumn;

template <typename W>
inline constexpr int kPieceElements = kPieceBytes / static_cast<int>(sizeof(W));
// Pieces of x that a warp holds: 64 or 128 registers.
template <typename W>
inline constexpr int kPieces = kSkinnyPieces / static_cast<int>(3 - sizeof(W));
// Words that a lane has of a piece: pairs of elements.
template <typename W>
inline constexpr int kPairs = 8 / static_cast<int>(sizeof(W));
// What the tensor cores multiply: e4m3 becomes f16 with one instruction a pair.
template <typename W, typename T>
using Operand = std::conditional_t<sizeof(W) == 1, __half, T>;

// Tiles that are worked on at a time: while x passes by in phases, each keeps its sums.
template <int kRows, bool kPhased>
inline constexpr int kGroup = kPhased ? 64 / kRows : 1;

// The pieces of K of one warp in one phase.
struct Part {
  int first, count;
};
template <typename W>
__device__ __forceinline__ Part PartOf(const SkinnyParams& p, int phase) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int first = (phase * kGemvWarps + warp) * p.pieces;
  return {first, max(0, min(p.k / kPieceElements<W> - first, p.pieces))};
}

// The block's tiles.
struct Stretch {
  int first, tiles;
};
__device__ __forceinline__ Stretch StretchOf(const SkinnyParams& p) {
  const int block = static_cast<int>(blockIdx.x);
  return {block * p.share + min(block, p.remainder), p.share + (block < p.remainder ? 1 : 0)};
}

// Goes through a warp's stages: tiles, within phases, within groups of tiles.
template <int kGroupTiles>
struct Cursor {
  int group = 0, phase = 0, tile = 0;  // group: its first tile

  __device__ __forceinline__ void Advance(const SkinnyParams& p, int tiles) {
    if (++tile < min(group + kGroupTiles, tiles)) return;
    if (++phase == p.phases) {
      phase = 0;
      group += kGroupTiles;
    }
    tile = group;
  }
};

// By a whole warp, a row a lane: its part of the weights of a tile.
template <typename W, int kGroupTiles>
__device__ __forceinline__ void Request(const SkinnyParams& p, const Stretch& stretch,
                                        const Cursor<kGroupTiles>& at, uint8_t* stage,
                                        uint64_t* full) {
  const int lane = threadIdx.x % 32;
  const Part part = PartOf<W>(p, at.phase);
  const int row = (stretch.first + at.tile) * kTile;
  const int rows = min(kTile, p.n - row);
  const uint32_t bytes = part.count * kPieceBytes;
  if (lane == 0) BarrierArriveExpecting(full, rows * bytes);
  __syncwarp();
  if (lane < rows && bytes != 0) {
    BulkCopy(stage + lane * p.row_stride,
             p.weights + static_cast<size_t>(row + lane) * p.row_bytes + part.first * kPieceBytes,
             bytes, full);
  }
}

// A lane's 16 bytes of a weight row as operands.
template <typename W>
__device__ __forceinline__ void WeightPairs(const uint4& v, uint32_t (&out)[kPairs<W>]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(W) == 2) {
      out[i] = words[i];
    } else {
      HalvesOfE4M3(words[i], out[2 * i], out[2 * i + 1]);
    }
  }
}

// The words of x that meet a warp's pieces.
template <typename W, int kRows>
using XPart = uint32_t[kPieces<W>][kRows / 8][kPairs<W>];

template <typename W, typename T, int kRows>
__device__ __forceinline__ void LoadX(const SkinnyParams& p, const Part& part, XPart<W, kRows>& x) {
  const int group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
  constexpr int kVectors = kPairs<W> / 4;
#pragma unroll
  for (int s = 0; s < kPieces<W>; ++s) {
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
}

// bf16 as f16, whose range is smaller: each row of a part is multiplied by a power of
// two that brings its largest element just below 2^15, or by that of an earlier part
// of the row if it is smaller. What is lost that way is 2^38 times smaller than the
// largest element.
template <int kRows>
struct Narrowing {
  float factor[kRows / 8];      // of this lane's rows of x
  float inverse[kRows / 8][2];  // of this lane's columns of sums

  __device__ __forceinline__ void Reset() {
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) factor[j] = 0x1p126f;
  }

  // x becomes f16. Returns by how much the sums so far must be multiplied.
  template <int kS, int kP>
  __device__ __forceinline__ void Narrow(uint32_t (&x)[kS][kRows / 8][kP],
                                         float (&change)[kRows / 8][2]) {
    const int lane = threadIdx.x % 32, quad = lane % 4;
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      uint32_t largest = 15u << 7;  // as bf16 bits; below it the factor would overflow
#pragma unroll
      for (int s = 0; s < kS; ++s) {
#pragma unroll
        for (int i = 0; i < kP; ++i)
          largest = max(largest, max(x[s][j][i] & 0x7fffu, x[s][j][i] >> 16 & 0x7fffu));
      }
      largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
      const float before = factor[j];
      factor[j] = fminf(before, __uint_as_float((268u - (largest >> 7)) << 23));
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int from = (quad * 2 + c) * 4;
        const float now = __shfl_sync(~0u, factor[j], from);
        change[j][c] = now / __shfl_sync(~0u, before, from);
        inverse[j][c] = 1.0f / now;
      }
#pragma unroll
      for (int s = 0; s < kS; ++s) {
#pragma unroll
        for (int i = 0; i < kP; ++i) {
          const float2 pair = UnpackPair(x[s][j][i], __nv_bfloat16());
          x[s][j][i] = PackPair<__half>(pair.x * factor[j], pair.y * factor[j]);
        }
      }
    }
  }
};

// [chain][rows of x / 8][fragment]; two chains where nothing else hides the unit's depth.
template <int kRows, bool kPhased>
using Accumulator = float[kPhased ? 1 : 2][kRows / 8][4];

template <typename W, typename T, int kRows, bool kPhased>
__device__ __forceinline__ void MultiplyStage(const SkinnyParams& p, const uint8_t* stage,
                                              int count, const XPart<W, kRows>& x,
                                              Accumulator<kRows, kPhased>& sum) {
  const int group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
  const uint8_t* low = stage + group * p.row_stride + quad * 16;
  const uint8_t* high = low + 8 * p.row_stride;
#pragma unroll
  for (int s = 0; s < kPieces<W>; ++s) {
    if (s >= count) break;
    uint32_t a[kPairs<W>], b[kPairs<W>];
    WeightPairs<W>(*reinterpret_cast<const uint4*>(low + s * kPieceBytes), a);
    WeightPairs<W>(*reinterpret_cast<const uint4*>(high + s * kPieceBytes), b);
#pragma unroll
    for (int i = 0; i < kPairs<W>; i += 2) {
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j) {
        Multiply<Operand<W, T>>(sum[kPhased ? 0 : i / 2 % 2][j], a[i], b[i], a[i + 1], b[i + 1],
                                x[s][j][i], x[s][j][i + 1]);
      }
    }
  }
}

template <int kRows, bool kPhased>
__device__ __forceinline__ void Rescale(Accumulator<kRows, kPhased>& sum,
                                        const float (&change)[kRows / 8][2]) {
#pragma unroll
  for (int j = 0; j < kRows / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[0][j][i] *= change[j][i % 2];
  }
}

// -> partial [rows of x][kColumn].
template <int kRows, bool kPhased>
__device__ __forceinline__ void StorePartial(const Accumulator<kRows, kPhased>& sum,
                                             const float (&scale)[kRows / 8][2], float* partial) {
  const int group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < kRows / 8; ++j) {
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      v[i] = (kPhased ? sum[0][j][i] : sum[0][j][i] + sum[kPhased ? 0 : 1][j][i]) * scale[j][i % 2];
    float* column = partial + (j * 8 + quad * 2) * kColumn + group;
    column[0] = v[0];
    column[kColumn] = v[1];
    column[8] = v[2];
    column[kColumn + 8] = v[3];
  }
}

__device__ __forceinline__ float Scaled(const SkinnyParams& p, int r, float v) {
  return p.scales == nullptr ? v : v * __ldg(p.scales + r);
}

// A tile whose first weight row is `base`, from the partial sums of all warps.
template <typename T, int kRows>
__device__ __forceinline__ void FinishTile(const SkinnyParams& p, int base, const float* partial,
                                           uint64_t& key) {
  const auto sum = [&](int row, int r) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kGemvWarps; ++w) total += partial[w * kPartial<kRows> + row * kColumn + r];
    return total;
  };
  const bool gate = p.epilogue == GemvEpilogue::kSiluGate || p.epilogue == GemvEpilogue::kGeluGate;
  const int width = gate ? kTile / 2 : kTile;
  const int row = static_cast<int>(threadIdx.x) / width, i = static_cast<int>(threadIdx.x) % width;
  if (row >= p.m) return;
  if (gate) {  // n is even: both rows of a gate exist or neither
    const int r = base + 2 * i;
    if (r >= p.n) return;
    const float g = Scaled(p, r, sum(row, 2 * i)), u = Scaled(p, r + 1, sum(row, 2 * i + 1));
    static_cast<T*>(p.out)[row * p.out_stride + r / 2] = FromFloat<T>(Gated(p.epilogue, g, u));
    return;
  }
  const int r = base + i;
  if (r >= p.n) return;
  float v = Scaled(p, r, sum(row, i));
  if (p.epilogue == GemvEpilogue::kLogits) {
    if (p.out != nullptr) static_cast<float*>(p.out)[row * p.out_stride + r] = v;
    const uint64_t candidate = LogitKey(v, p.first_id + r);
    key = candidate > key ? candidate : key;
    return;
  }
  if (p.bias != nullptr) v += ToFloat(static_cast<const T*>(p.bias)[r]);
  static_cast<T*>(p.out)[row * p.out_stride + r] = FromFloat<T>(v);
}

// Thread t holds a key of row t / kTile; the largest of each -> keys[row][block].
__device__ __forceinline__ void StoreKeys(const SkinnyParams& p, uint64_t key) {
#pragma unroll
  for (int offset = kTile / 2; offset > 0; offset >>= 1) {
    const uint64_t other = __shfl_xor_sync(~0u, key, offset);
    key = other > key ? other : key;
  }
  const int row = static_cast<int>(threadIdx.x) / kTile;
  if (threadIdx.x % kTile == 0 && row < p.m)
    p.keys[static_cast<int64_t>(row) * gridDim.x + blockIdx.x] = key;
}

}  // namespace skinny

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_SKINNY_TILE_CUH_
