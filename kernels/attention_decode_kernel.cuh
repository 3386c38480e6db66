// The fast decode kernel. A warp takes tiles of 16 positions and keeps all
// operands in registers: with 16-byte loads straight from the cache, the order
// in which a lane holds the elements is not the tensor core's, but it is the
// same for both operands, and a sum does not care.
//
//   scores^T [16 positions, 8 heads] = K [16, d] * q^T [d, 8 heads]
//   out^T [d, 8 heads]              += V^T [d, 16] * p^T [16, 8 heads]
//
// With lane = 4 * r + c: of K, the chunks (8 elements) of lane c of 4 (ChunkOf) of positions r
// and r + 8; of V, those of lane r of 8 of positions 2c, 2c + 1, 2c + 8, 2c + 9. Chunks
// past head_dim repeat the last ones: q is zero there, or the result unused.
//
// grid: x = clusters * cluster size (shares of the context), y = KV head, z = row. Or, where the
// work is dealt out by tiles (attention_decode_deal.cuh): x alone, as many blocks as the device
// holds.
#ifndef LOCKSTEP_KERNELS_ATTENTION_DECODE_KERNEL_CUH_
#define LOCKSTEP_KERNELS_ATTENTION_DECODE_KERNEL_CUH_

#include <cmath>

#include "kernels/attention_decode_deal.cuh"
#include "kernels/attention_decode_launch.h"
#include "kernels/attention_decode_merge.cuh"
#include "kernels/attention_decode_query.cuh"
#include "kernels/attention_decode_ring.cuh"
#include "kernels/attention_decode_tile.cuh"
#include "kernels/attention_mma.cuh"

namespace lockstep::kernels::decode {

__device__ __forceinline__ Work Divide(const Params& p, int position, int warp) {
  Work w = WorkOf(p.window, position);
  const int first_tile = w.begin / kTile, tiles = w.tiles();
  // Another cluster only where every warp of one has several tiles.
  const int per_cluster = __ffs(kWarps * kTilesPerWarp) - 1 + p.cluster_shift;
  const int useful = 31 - __clz(max(1, tiles >> per_cluster));
  w.clusters = min(p.clusters, 1 << useful);
  const int shares_shift = 31 - __clz(w.clusters) + p.cluster_shift;
  const int per_share = (tiles + (1 << shares_shift) - 1) >> shares_shift;
  const int share = static_cast<int>(blockIdx.x);
  w.first = first_tile + share * per_share + warp;
  w.end =
      share >> shares_shift == 0 ? min(first_tile + (share + 1) * per_share, w.last_tile + 1) : 0;
  return w;
}

// The addresses of a row's tiles. Lane i keeps the block of the warp's i-th tile
// of each 32.
template <typename KV>
class Tiles {
 public:
  __device__ __forceinline__ Tiles(const Params& p, const Place& place, const Work& work)
      : p_(p), place_(place), work_(work) {}

  // The element offset of a position of this KV head.
  __device__ __forceinline__ int64_t OffsetOf(int position) const {
    const int64_t block = __ldcg(Table() + (position >> p_.block_shift));
    const int within = position & ((1 << p_.block_shift) - 1);
    return (((block * p_.kv_heads + place_.kv_head) << p_.block_shift) + within) * p_.head_dim;
  }

  // The element offset of position `tile` * 16; i counts the
  // warp's tiles from 0.
  __device__ __forceinline__ int64_t Offset(int tile, int i) {
    if (i % 32 == 0) {
      const int mine = tile + static_cast<int>(threadIdx.x % 32) * kWarps;
      block_ = mine < work_.end ? __ldcg(Table() + (mine * kTile >> p_.block_shift)) : 0;
    }
    const int64_t block = __shfl_sync(~0u, block_, i % 32);
    const int within = tile * kTile & ((1 << p_.block_shift) - 1);
    return (((block * p_.kv_heads + place_.kv_head) << p_.block_shift) + within) * p_.head_dim;
  }

 private:
  __device__ __forceinline__ const int32_t* Table() const {
    return p_.rows.block_table + static_cast<int64_t>(place_.slot) * p_.rows.table_stride;
  }

  const Params& p_;
  const Place& place_;
  const Work& work_;
  int32_t block_ = 0;
};

// Of a way without one too, where it is not used.
template <typename KV, Way kWay>
using RingOf = Ring<KV, RingTiles(kWay) == 0 ? 1 : RingTiles(kWay)>;

// A warp's part of a share: its tiles, and what it found to the merge. Of all the block's threads.
template <typename T, typename KV, int kDim, int kHeadTiles, Way kWay>
__device__ __forceinline__ void Attend(const Params& p, const Merge& merge, RingOf<KV, kWay>& ring,
                                       const Place& place, const Work& work) {
  using M = typename Chunk<KV>::M;
  using Raw = typename Chunk<KV>::Raw;
  constexpr int kKChunks = kDim / 32, kVChunks = kDim / 64;
  // Both operands of the next tile are requested while this one is worked on;
  // with 256 elements there are not the registers.
  constexpr bool kAhead = kDim <= 128;
  constexpr bool kRing = RingTiles(kWay) > 0;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  Raw* stash_k = reinterpret_cast<Raw*>(merge.stash());
  Raw* stash_v = stash_k + kDim / 8;
  const KV* k_cache = static_cast<const KV*>(p.k);
  const KV* v_cache = static_cast<const KV*>(p.v);
  const int chunks = p.head_dim / 8;
  Tiles<KV> tiles(p, place, work);

  Raw k[2][kKChunks], v[4][kVChunks];
  // A row of the tile whose v may be used: what others hold weighs nothing, but must be
  // finite. (The score of an unseen k is not used.) The row's own position is replaced before use.
  const auto seen = [&](int tile, int i) {
    return min(max(i, work.begin - tile * kTile), work.position - tile * kTile);
  };
  // To registers, or into the ring as the warp's `number`-th tile.
  const auto load_k = [&](int tile, int64_t offset, int number) {
    if constexpr (kRing) {
      ring.Ask(number, 0, k_cache + offset);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Raw* at = reinterpret_cast<const Raw*>(k_cache + offset + (r + 8 * i) * p.head_dim);
        LoadChunks<KV, true>(at, chunks, c, 4, k[i]);
      }
    }
  };
  const auto load_v = [&](int tile, int64_t offset, int number) {
    if constexpr (kRing) {
      ring.Ask(number, 1, v_cache + offset);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 2 * c + i % 2 + 8 * (i / 2);
        const Raw* at =
            reinterpret_cast<const Raw*>(v_cache + offset + seen(tile, token) * p.head_dim);
        LoadChunks<KV, true>(at, chunks, r, 8, v[i]);
      }
    }
  };

  // The warp that takes the tile of the row's own position.
  const bool owner =
      work.any() && work.end == work.last_tile + 1 && (work.last_tile - work.first) % kWarps == 0;
  int64_t offset = 0;
  if (owner) offset = tiles.OffsetOf(work.position);
  OwnPosition<T, KV> own(p, place, offset);
  if constexpr (kRing) {
#pragma unroll
    for (int i = 0; i < RingTiles(kWay); ++i) {
      const int tile = work.first + i * kWarps;
      if (tile >= work.end) break;
      offset = tiles.Offset(tile, i);
      load_k(tile, offset, i);
      load_v(tile, offset, i);
    }
  } else if (work.any()) {
    offset = tiles.Offset(work.first, 0);
    load_k(work.first, offset, 0);
    if (kAhead) load_v(work.first, offset, 0);
  }
  WaitForPrevious();

  const float2* rotary = p.rotary == nullptr
                             ? nullptr
                             : p.rotary + static_cast<int64_t>(work.position) * (p.head_dim / 2);
  if (owner) own.Request(rotary);
  uint4* const staged = static_cast<uint4*>(merge.query());
  const float row_factor = RowFactor(p.scales, place.row);
  StageQuery<T, M>(p, place, row_factor, rotary, staged);
  if (owner) own.Store(row_factor, rotary, stash_k, stash_v);
  __syncthreads();

  TileSums<KV, kDim, kHeadTiles> sums;
  if (work.any()) {
    uint4 q[kHeadTiles][kKChunks];
    LoadQuery<KV>(p, staged, q);

    for (int tile = work.first, i = 0; tile < work.end; tile += kWarps, ++i) {
      const int replaced = tile == work.last_tile ? work.position % kTile : kTile;
      if constexpr (kRing) {
        ring.Await(i, 0);
#pragma unroll
        for (int part = 0; part < 2; ++part)
          LoadChunks<KV, false>(ring.Row(i, 0, r + 8 * part), chunks, c, 4, k[part]);
      } else if (!kAhead) {
        load_v(tile, offset, 0);
      }
      if (replaced < kTile) {
#pragma unroll
        for (int j = 0; j < kKChunks; ++j) {
          const Raw mine = stash_k[min(ChunkOf<KV, kKChunks>(c, 4, j), chunks - 1)];
          if (r >= replaced) k[0][j] = mine;
          if (r + 8 >= replaced) k[1][j] = mine;
        }
      }
      sums.Multiply(q, k);
      constexpr int kDistance = kRing ? RingTiles(kWay) : 1;
      const int next = tile + kDistance * kWarps;
      if (next < work.end) {
        offset = tiles.Offset(next, i + kDistance);
        load_k(next, offset, i + kDistance);
      }

      const int at = tile * kTile + r;
      sums.Weigh(at >= work.begin && at <= work.position,
                 at + 8 >= work.begin && at + 8 <= work.position, p.factors.score);

      if constexpr (kRing) {
        ring.Await(i, 1);
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          const Raw* at = ring.Row(i, 1, seen(tile, 2 * c + t % 2 + 8 * (t / 2)));
          LoadChunks<KV, false>(at, chunks, r, 8, v[t]);
        }
      }
      if (replaced < kTile) {
#pragma unroll
        for (int j = 0; j < kVChunks; ++j) {
          const Raw mine = stash_v[min(ChunkOf<KV, kVChunks>(r, 8, j), chunks - 1)];
#pragma unroll
          for (int t = 0; t < 4; ++t) {
            if (2 * c + t % 2 + 8 * (t / 2) >= replaced) v[t][j] = mine;
          }
        }
      }
      sums.Add(v);
      if ((kAhead || kRing) && next < work.end) load_v(next, offset, i + kDistance);
    }
  }
  if constexpr (kRing) ring.Restart(max(0, (work.end - work.first + kWarps - 1) / kWarps));
  __syncwarp();  // what was the ring's is the merge's

  sums.Store(
      p.group, p.head_dim,
      [&](int head, float2 statistics) { merge.SetWarpStatistics(warp, head, statistics); },
      [&](int head, int d, float4 v) { merge.SetWarpOutput(warp, head, d, v); });
}

// kDim: head_dim rounded up to 64, 128 or 256; kHeadTiles: tiles of 8 query heads.
// Rings: loads to registers need the L1, of which the products' division of an SM's memory leaves
// little, and registers to arrive in, without which four blocks fit where three do. For several
// tiles a warp; a ring takes the room in which a product's blocks could begin.
template <typename T, typename KV, int kDim, int kHeadTiles, Way kWay>
__global__ void __launch_bounds__(kThreads, BlocksOf(sizeof(KV), kDim, kHeadTiles, kWay))
    DecodeKernel(const __grid_constant__ Params p) {
  TriggerDependents();
  if (!p.history_ready) WaitForPrevious();
  const int row = blockIdx.z;
  const Place place = {row, __ldcg(p.rows.slot + row), static_cast<int>(blockIdx.y)};
  const int position = __ldcg(p.rows.position + row);
  if (place.slot < 0) {
    WaitForPrevious();
    return;
  }
  const Work work = Divide(p, position, threadIdx.x / 32);
  if (blockIdx.x >= static_cast<unsigned>(work.clusters * p.cluster_size)) {
    WaitForPrevious();
    return;
  }
  __shared__ uint64_t merge_barrier;
  const Merge merge(p, &merge_barrier);
  merge.Begin();
  __shared__ typename RingOf<KV, kWay>::Barriers barriers[kWarps];
  RingOf<KV, kWay> ring(p, merge.ring(threadIdx.x / 32), barriers[threadIdx.x / 32]);
  if constexpr (RingTiles(kWay) > 0) ring.Init();
  Attend<T, KV, kDim, kHeadTiles, kWay>(p, merge, ring, place, work);
  merge.template Finish<T>(place, work.clusters);
}

template <typename T, typename KV, int kDim, int kHeadTiles, Way kWay>
__global__ void __launch_bounds__(kThreads, BlocksOf(sizeof(KV), kDim, kHeadTiles, kWay))
    DealtDecodeKernel(const __grid_constant__ Params p) {
  TriggerDependents();
  if (!p.history_ready) WaitForPrevious();
  const Merge merge(p, nullptr);
  __shared__ typename RingOf<KV, kWay>::Barriers barriers[kWarps];
  RingOf<KV, kWay> ring(p, merge.ring(threadIdx.x / 32), barriers[threadIdx.x / 32]);
  if constexpr (RingTiles(kWay) > 0) ring.Init();
  __shared__ Deal deal;
  if (threadIdx.x == 0) deal.Init(p);
  __syncthreads();
  while (!deal.done()) {
    Work work = WorkOf(p.window, deal.share().position);
    work.first = deal.share().first + static_cast<int>(threadIdx.x) / 32;
    work.end = deal.share().end;
    Attend<T, KV, kDim, kHeadTiles, kWay>(p, merge, ring, deal.share().place, work);
    merge.template Finish<T>(deal.share());
    if constexpr (RingTiles(kWay) > 0) FenceReadsBeforeCopies();
    __syncthreads();  // what was this share's is the next one's
    if (threadIdx.x == 0) deal.Next(p);
    __syncthreads();
  }
  WaitForPrevious();
}

template <typename T, typename KV, int kDim, int kHeadTiles>
Kernel FindFor(Way way, bool dealt) {
  if constexpr (HasRing(sizeof(KV), kDim, kHeadTiles)) {
    if (dealt && way == Way::kRing) return DealtDecodeKernel<T, KV, kDim, kHeadTiles, Way::kRing>;
    if (way == Way::kRing) return DecodeKernel<T, KV, kDim, kHeadTiles, Way::kRing>;
    if (way == Way::kDeepRing && !dealt)
      return DecodeKernel<T, KV, kDim, kHeadTiles, Way::kDeepRing>;
  }
  if (dealt) return DealtDecodeKernel<T, KV, kDim, kHeadTiles, Way::kPlain>;
  return DecodeKernel<T, KV, kDim, kHeadTiles, Way::kPlain>;
}
template <typename T, typename KV, int kDim>
Kernel FindFor(const KernelShape& shape) {
  return shape.head_tiles == 1 ? FindFor<T, KV, kDim, 1>(shape.way, shape.dealt)
                               : FindFor<T, KV, kDim, 2>(shape.way, shape.dealt);
}
template <typename T, typename KV>
Kernel FindFor(const KernelShape& shape) {
  return shape.dim == 64    ? FindFor<T, KV, 64>(shape)
         : shape.dim == 128 ? FindFor<T, KV, 128>(shape)
                            : FindFor<T, KV, 256>(shape);
}

}  // namespace lockstep::kernels::decode

#endif  // LOCKSTEP_KERNELS_ATTENTION_DECODE_KERNEL_CUH_
