// Decode attention's work dealt out by tiles: those of all rows and KV heads one after another, cut
// into as many equal parts as blocks, so that rows of any lengths take the device together.
//
//   row 0, head 0 |head 1|row 1, head 0          |head 1                  |row 2 ...
//   -block 0---------|-block 1-------------|-block 2-------------|-block 3-- ...
//
// A row and head that is cut is finished by the block that comes last to it. How it is cut is the
// same for all layers of a step, and planned once.
#ifndef LOCKSTEP_KERNELS_ATTENTION_DECODE_DEAL_CUH_
#define LOCKSTEP_KERNELS_ATTENTION_DECODE_DEAL_CUH_

#include <cstdint>

#include "kernels/attention_decode_launch.h"
#include "kernels/device.cuh"

namespace lockstep::kernels::decode {

inline constexpr int kLeastTiles = 4 * kWarps;  // of a block
inline constexpr int kLeastCut = kWarps;        // of a part of a row's head

// Where the tiles of all rows and heads, counted through, are cut: the first `rest` blocks have one
// more than `each`.
struct Cuts {
  int blocks, each, rest;
  // The first block whose part begins at `at` or behind it.
  __device__ __forceinline__ int FirstFrom(int at) const {
    const int longer = rest * (each + 1);
    return at <= longer ? (at + each) / (each + 1) : rest + (at - longer + each - 1) / each;
  }
};

// What a block begins with, and where its part ends.
struct BlockPlan {
  int at, end;
  int row, slot, position, head;
  int begin, tiles;  // of that row's head
  Cuts cuts;
  int unused;
};
static_assert(sizeof(BlockPlan) % 16 == 0);

// A decoded row's KV head.
struct Place {
  int row = 0, slot = 0, kv_head = 0;
};

// Which tiles of the row this warp takes: first, first + kWarps, ... < end.
struct Work {
  int position = 0;
  int begin = 0;      // first position seen
  int last_tile = 0;  // holds `position`
  int clusters = 1;   // that take part
  int first = 0, end = 0;
  __device__ bool any() const { return first < end; }
  __device__ int tiles() const { return last_tile - begin / kTile + 1; }  // that are seen
};

__device__ __forceinline__ Work WorkOf(int window, int position) {
  Work w;
  w.position = position;
  w.begin = window > 0 ? max(0, position + 1 - window) : 0;
  w.last_tile = position / kTile;
  return w;
}

// A block's part of a place: tiles of a head of the row, from its first to before its end.
struct Share {
  Place place;
  int position, first, end;
  // Blocks that share the place, in order of their parts, and which of them this is.
  int first_block, blocks, index;
};

// A block's shares one after another. Lives in shared memory, for registers are scarce.
class Deal {
 public:
  // One thread's.
  __device__ __forceinline__ void Init(const Params& p) {
    const uint4* from = reinterpret_cast<const uint4*>(p.plan + blockIdx.x);
    uint4* to = reinterpret_cast<uint4*>(&part_);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(BlockPlan) / 16); ++i) to[i] = __ldcg(from + i);
    Next(p);
  }

  // Of all threads, between two barriers of the block.
  __device__ __forceinline__ bool done() const { return share_.first == share_.end; }
  __device__ __forceinline__ const Share& share() const { return share_; }

  // One thread's. Then it is done, or the share is the next.
  __device__ __forceinline__ void Next(const Params& p) {
    share_.first = share_.end = 0;
    if (part_.at >= part_.end) return;
    while (part_.at == part_.begin + part_.tiles) {
      part_.begin = part_.at;
      if (part_.tiles > 0 && ++part_.head < p.kv_heads) break;
      part_.head = 0;
      ++part_.row;
      part_.slot = __ldcg(p.rows.slot + part_.row);
      part_.position = __ldcg(p.rows.position + part_.row);
      part_.tiles = part_.slot < 0 ? 0 : WorkOf(p.window, part_.position).tiles();
    }
    const int place_end = part_.begin + part_.tiles, until = min(part_.end, place_end);
    share_.place = {part_.row, part_.slot, part_.head};
    share_.position = part_.position;
    const int tile = WorkOf(p.window, part_.position).begin / kTile - part_.begin;
    share_.first = tile + part_.at;
    share_.end = tile + until;
    share_.blocks = 1;
    if (until - part_.at < part_.tiles) {
      // The cuts inside the place that the plan has left where they fell.
      const int first = part_.cuts.FirstFrom(part_.begin + kLeastCut);
      share_.first_block = first - 1;
      share_.blocks = part_.cuts.FirstFrom(place_end - kLeastCut + 1) - first + 1;
      share_.index = static_cast<int>(blockIdx.x) - share_.first_block;
    }
    part_.at = until;
  }

 private:
  alignas(16) BlockPlan part_;
  Share share_;
};

}  // namespace lockstep::kernels::decode

#endif  // LOCKSTEP_KERNELS_ATTENTION_DECODE_DEAL_CUH_
