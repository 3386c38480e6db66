// The other way of a warp's tiles: not to its registers, but ahead through shared memory.
#ifndef LOCKSTEP_KERNELS_ATTENTION_DECODE_RING_CUH_
#define LOCKSTEP_KERNELS_ATTENTION_DECODE_RING_CUH_

#include <cstdint>

#include "kernels/attention_decode_launch.h"
#include "kernels/attention_mma.cuh"
#include "kernels/bulk_copy.cuh"

namespace lockstep::kernels::decode {

// A warp's next tiles on their way through shared memory by the copy engine: a tile of
// K or of V is one piece of the cache. The warp's first lane asks; all of it waits.
template <typename KV, int kTiles>
class Ring {
 public:
  using Barriers = uint64_t[kTiles][2];

  __device__ __forceinline__ Ring(const Params& p, void* memory, Barriers& barriers)
      : p_(p), memory_(static_cast<uint8_t*>(memory)), barriers_(barriers) {}
  __device__ __forceinline__ void Init() {
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        BarrierInit(&barriers_[i][0], 1);
        BarrierInit(&barriers_[i][1], 1);
      }
      FenceBarrierInit();
    }
    __syncwarp();
  }
  // The i-th tile's K (part 0) or V (part 1), once every lane has read what was there.
  __device__ __forceinline__ void Ask(int i, int part, const KV* from) {
    FenceReadsBeforeCopies();
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    const uint32_t bytes = kTile * p_.head_dim * static_cast<uint32_t>(sizeof(KV));
    BarrierArriveExpecting(&barriers_[Slot(i)][part], bytes);
    BulkCopy(At(i, part), from, bytes, &barriers_[Slot(i)][part]);
  }
  __device__ __forceinline__ void Await(int i, int part) {
    AwaitBarrier(&barriers_[Slot(i)][part], (before_ + i) / kTiles & 1);
  }
  // Of position `row` of the tile.
  __device__ __forceinline__ const typename Chunk<KV>::Raw* Row(int i, int part, int row) const {
    return reinterpret_cast<const typename Chunk<KV>::Raw*>(
        At(i, part) + row * p_.head_dim * static_cast<int>(sizeof(KV)));
  }
  // So many tiles have gone through it: they are counted from 0 again.
  __device__ __forceinline__ void Restart(int tiles) { before_ += tiles; }

 private:
  __device__ __forceinline__ int Slot(int i) const { return (before_ + i) % kTiles; }
  __device__ __forceinline__ uint8_t* At(int i, int part) const {
    return memory_ + (Slot(i) * 2 + part) * kRingHalf;
  }

  const Params& p_;
  uint8_t* memory_;
  Barriers& barriers_;
  int before_ = 0;
};

}  // namespace lockstep::kernels::decode

#endif  // LOCKSTEP_KERNELS_ATTENTION_DECODE_RING_CUH_
