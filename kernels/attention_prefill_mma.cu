// Prefill attention with mma.sync: any head_dim that is a multiple of 8 up to
// 256, any block size, KV of 16 bits or e4m3. A block of four warps takes 64
// rows; a warp keeps its 16 rows of q, their scores and their output in
// registers, while k and v come through two stages of shared memory. e4m3 is
// widened to f16 on the way in.
//
// A row of k or v is kDim elements in chunks of 16 bytes. Chunk ch of position t
// lies at ch ^ 4 (t % 2) for k, read 16 bytes a lane, and at ch ^ (t % 8) for v,
// read by ldmatrix: no two lanes of a phase meet in a bank.
#include <cmath>

#include "kernels/attention_mma.cuh"
#include "kernels/attention_prefill_launch.h"
#include "kernels/attention_prefill_rows.cuh"

namespace lockstep::kernels::prefill {
namespace {

__device__ __forceinline__ uint32_t SharedAddress(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}
// 16 bytes, or zeros.
__device__ __forceinline__ void CopyAsync(uint32_t to, const void* from, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(present ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void AwaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ void LoadTransposed(uint32_t (&m)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(at)
               : "memory");
}

template <typename T, typename KV, int kDim>
__global__ void __launch_bounds__(kMmaThreads, kDim == 64    ? 3
                                               : kDim == 128 ? 2
                                                             : 1)
    MmaKernel(const __grid_constant__ Params p) {
  using M = typename Chunk<KV>::M;
  using Raw = typename Chunk<KV>::Raw;
  constexpr int kPositions = MmaPositions(kDim), kRowChunks = kDim / 8, kKChunks = kDim / 32;
  constexpr int kScoreTiles = kPositions / 8, kOutTiles = kDim / 8;
  constexpr int kPassPositions = kMmaThreads / kRowChunks;  // that one pass of the block copies

  TriggerDependents();
  WaitForPrevious();
  const TileRows rows = FindRows(p, p.spans[blockIdx.z], gridDim.x - 1 - blockIdx.x, kMmaRows);
  if (rows.count == 0) return;

  extern __shared__ __align__(128) uint4 shared[];  // [stage][k, v][position][chunk]
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, r = lane / 4, c = lane % 4;
  const int kv_head = blockIdx.y, chunks = p.head_dim / 8;
  const int32_t* table = p.block_table + static_cast<int64_t>(rows.span.slot) * p.table_stride;

  const auto load = [&](int stage, int first) {
    const int chunk = tid % kRowChunks;
    uint4* k_to = shared + stage * 2 * kPositions * kRowChunks;
    uint4* v_to = k_to + kPositions * kRowChunks;
#pragma unroll
    for (int i = 0; i < kPositions / kPassPositions; ++i) {
      const int t = tid / kRowChunks + i * kPassPositions, position = first + t;
      const bool present = position >= rows.see_begin && position < rows.see_end && chunk < chunks;
      const int64_t block = present ? __ldg(table + position / p.block_size) : 0;
      const int64_t offset =
          present ? ((block * p.kv_heads + kv_head) * p.block_size + position % p.block_size) *
                            p.head_dim +
                        chunk * 8
                  : 0;
      uint4* k_at = k_to + t * kRowChunks + (chunk ^ (t % 2 * 4));
      uint4* v_at = v_to + t * kRowChunks + (chunk ^ (t % 8));
      const Raw* k_from = reinterpret_cast<const Raw*>(static_cast<const KV*>(p.k) + offset);
      const Raw* v_from = reinterpret_cast<const Raw*>(static_cast<const KV*>(p.v) + offset);
      if constexpr (sizeof(KV) == 2) {
        CopyAsync(SharedAddress(k_at), k_from, present);
        CopyAsync(SharedAddress(v_at), v_from, present);
      } else {
        const uint4 zero = make_uint4(0, 0, 0, 0);
        *k_at = present ? Chunk<KV>::Widen(__ldcg(k_from)) : zero;
        *v_at = present ? Chunk<KV>::Widen(__ldcg(v_from)) : zero;
      }
    }
    CommitCopies();
  };

  const int first_tile = rows.see_begin / kPositions;
  const int end_tile = (rows.see_end + kPositions - 1) / kPositions;
  load(0, first_tile * kPositions);

  // This lane's rows, r and r + 8 of the warp's 16.
  uint4 q[2][kKChunks];
  int position[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int m = warp * 16 + r + 8 * i;
    const bool exists = m < rows.count;
    position[i] = rows.span.begin + (rows.first + min(m, rows.count - 1)) / p.group;
    const T* at = static_cast<const T*>(p.q) +
                  RowOffset(p, rows, min(m, rows.count - 1), p.q_stride, kv_head);
#pragma unroll
    for (int j = 0; j < kKChunks; ++j) {
      q[i][j] = make_uint4(0, 0, 0, 0);
      const int chunk = c + 4 * j;
      if (!exists || chunk >= chunks) continue;
      const Packed<T, 8> raw = LoadData<T, 8>(at + chunk * 8);
      if constexpr (std::is_same_v<T, M>) {
        q[i][j] = raw.raw;
      } else {
        float x[8];
        Unpack<T, 8>(raw, x);
#pragma unroll
        for (float& value : x) value *= p.factors.q;
        q[i][j] = Pack<M, 8>(x).raw;
      }
    }
  }

  float out[kOutTiles][4] = {};
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
  for (int tile = first_tile; tile < end_tile; ++tile) {
    const int stage = (tile - first_tile) % 2, first = tile * kPositions;
    if (tile + 1 < end_tile) {
      load(stage ^ 1, first + kPositions);
      AwaitCopies<1>();
    } else {
      AwaitCopies<0>();
    }
    __syncthreads();
    const uint4* k = shared + stage * 2 * kPositions * kRowChunks;
    const uint4* v = k + kPositions * kRowChunks;

    float score[kScoreTiles][4] = {};
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
      const uint4* k_row = k + (n * 8 + r) * kRowChunks;
#pragma unroll
      for (int j = 0; j < kKChunks; ++j) {
        const uint4 b = k_row[(c + 4 * j) ^ (r % 2 * 4)];
        Mma<M>(score[n], q[0][j].x, q[1][j].x, q[0][j].y, q[1][j].y, b.x, b.y);
        Mma<M>(score[n], q[0][j].z, q[1][j].z, q[0][j].w, q[1][j].w, b.z, b.w);
      }
    }

    const bool edge = first + kPositions - 1 > rows.first_position ||
                      (p.window > 0 && first < rows.last_position + 1 - p.window);
    if (edge) {
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = first + n * 8 + 2 * c + i % 2, mine = position[i / 2];
          if (at > mine || (p.window > 0 && at + p.window <= mine)) score[n][i] = -INFINITY;
        }
      }
    }
    float shrink[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float m = top[i];
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
        m = fmaxf(m, fmaxf(score[n][2 * i], score[n][2 * i + 1]) * p.factors.score);
      }
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
      // A row that has seen nothing yet keeps zeros.
      const float base = m == -INFINITY ? 0.0f : m;
      shrink[i] = Exp2(top[i] - base);
      top[i] = m;
      sum[i] *= shrink[i];
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& s = score[n][2 * i + h];
          s = Exp2(__fmaf_rn(s, p.factors.score, -base));
          sum[i] += s;
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] *= shrink[i / 2];
    }
#pragma unroll
    for (int step = 0; step < kPositions / 16; ++step) {
      const uint32_t a0 = PackPair<M>(score[2 * step][0], score[2 * step][1]);
      const uint32_t a1 = PackPair<M>(score[2 * step][2], score[2 * step][3]);
      const uint32_t a2 = PackPair<M>(score[2 * step + 1][0], score[2 * step + 1][1]);
      const uint32_t a3 = PackPair<M>(score[2 * step + 1][2], score[2 * step + 1][3]);
      const int t = step * 16 + lane % 16;
#pragma unroll
      for (int n = 0; n < kOutTiles; n += 2) {
        uint32_t b[4];
        LoadTransposed(b, SharedAddress(v + t * kRowChunks + ((n + lane / 16) ^ (t % 8))));
        Mma<M>(out[n], a0, a1, a2, a3, b[0], b[1]);
        Mma<M>(out[n + 1], a0, a1, a2, a3, b[2], b[3]);
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float total = sum[i];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    const int m = warp * 16 + r + 8 * i;
    if (m >= rows.count) continue;
    const float factor = p.factors.v / total;
    T* at = static_cast<T*>(p.out) + RowOffset(p, rows, m, p.out_stride, kv_head);
#pragma unroll
    for (int n = 0; n < kOutTiles; ++n) {
      if (n >= chunks) break;
      const float pair[2] = {out[n][2 * i] * factor, out[n][2 * i + 1] * factor};
      Store<T, 2>(at + n * 8 + 2 * c, Pack<T, 2>(pair));
    }
  }
}

template <typename T, typename KV>
Kernel Find(int dim) {
  return dim == 64    ? MmaKernel<T, KV, 64>
         : dim == 128 ? MmaKernel<T, KV, 128>
                      : MmaKernel<T, KV, 256>;
}

}  // namespace

Kernel FindMma(Type type, Type kv_type, int dim) {
  if (type == Type::kBF16 && kv_type == Type::kBF16) return Find<__nv_bfloat16, __nv_bfloat16>(dim);
  if (type == Type::kF16 && kv_type == Type::kF16) return Find<__half, __half>(dim);
  if (kv_type != Type::kE4M3) return nullptr;
  if (type == Type::kBF16) return Find<__nv_bfloat16, __nv_fp8_e4m3>(dim);
  if (type == Type::kF16) return Find<__half, __nv_fp8_e4m3>(dim);
  return nullptr;
}

}  // namespace lockstep::kernels::prefill
