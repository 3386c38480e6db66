// What each warp reads, in the order in which it will: its part of the weights of every
// product and its tiles of the cache, layer by layer, through a ring of its own. All of it is
// known from the start, so warps of their own request it, however far the computation has come.
//
// A ring is deep, to go on filling while its warp waits for other blocks, but not all of its
// pieces are requested at a time: what every SM has under way is what any other access to
// memory queues behind, and the words between blocks are such. (Of 5, 4 at a time: with 2, or
// all, an 8B's layer takes 1 % longer in 16 bits; with FP8 weights all makes no difference.)
#ifndef LOCKSTEP_KERNELS_ROW_STACK_FEED_CUH_
#define LOCKSTEP_KERNELS_ROW_STACK_FEED_CUH_

#include "kernels/bulk_copy.cuh"
#include "kernels/row_stack_plan.h"

namespace lockstep::kernels::stack {

// To the step after this; false: there is none.
__device__ __forceinline__ bool Advance(const Params& p, int& step, int& layer) {
  if (step != kDown) {
    ++step;
  } else {
    step = ++layer < p.num_layers ? kQkv : kHead;
  }
  return step != kDone;
}

// The rows of a product that are this block's, and which warp has what of them.
struct Stretch {
  int begin, rows;
  int part, group, groups;  // a warp's part of K; its turn at the pieces

  __device__ __forceinline__ Stretch(const ProductPlan& q, int warp) {
    const int block = static_cast<int>(blockIdx.x);
    begin = (block * q.share + min(block, q.remainder)) * q.unit;
    rows = (q.share + (block < q.remainder ? 1 : 0)) * q.unit;
    part = warp & ((1 << q.split_log2) - 1);
    group = warp >> q.split_log2;
    groups = kWarps >> q.split_log2;
  }
};

// The context of the row as it is dealt to the blocks of a KV head, tile by tile.
struct Share {
  int kv_head, share, shares;
  int begin;       // first position seen
  int first, end;  // tiles of a warp: first, first + kWarps, ... < end
  int last_tile;   // holds the row's own position
  bool mine;       // this block has a share
  Share() = default;
  __device__ __forceinline__ bool any() const { return mine && first < end; }
  // Of the block: the tile of the row's own position is its.
  __device__ __forceinline__ bool owns() const { return mine && share == shares - 1; }

  __device__ __forceinline__ Share(const Params& p, int warp, int position) {
    const int block = static_cast<int>(blockIdx.x);
    kv_head = block / p.max_shares;
    share = block - kv_head * p.max_shares;
    begin = p.seen > 0 ? max(0, position + 1 - p.seen) : 0;
    last_tile = position / kTile;
    const int first_tile = begin / kTile, tiles = last_tile - first_tile + 1;
    // As few blocks as have a warp for each tile; the more shares, the longer merging takes.
    const int wanted = min(p.max_shares, (tiles + kWarps - 1) / kWarps);
    const int each = (tiles + wanted - 1) / wanted;
    shares = (tiles + each - 1) / each;
    mine = kv_head < p.kv_heads && share < shares;
    first = first_tile + share * each + warp;
    end = min(first_tile + (share + 1) * each, last_tile + 1);
  }
};

// Where a warp has come to, where the row is, and the warp's part of that.
struct Place {
  int step, layer;
  int slot, position;
  Share share;
};

// The barriers of a block's rings, by warp and slot.
struct Barriers {
  uint64_t full[kWarps][kMaxDepth];
  uint64_t empty[kWarps][kMaxDepth];
};

// The side of a warp that reads.
class Ring {
 public:
  __device__ __forceinline__ Ring(int depth, uint8_t* rings, Barriers& barriers)
      : depth_(depth), rings_(rings), barriers_(barriers) {}

  // Whether the next piece is there, to be asked long before it is wanted: the answer takes a
  // while.
  __device__ __forceinline__ bool Ready() const {
    return BarrierTest(barriers_.full[threadIdx.x / 32] + slot_, parity_);
  }
  // Waits for the next piece, unless `ready`, and says where it is.
  __device__ __forceinline__ const uint8_t* Await(bool ready) const {
    const int warp = threadIdx.x / 32;
    if (!ready) AwaitBarrier(barriers_.full[warp] + slot_, parity_);
    __syncwarp();  // whoever waited longer: what comes is for the warp together
    return rings_ + (warp * depth_ + slot_) * kPieceBytes;
  }
  // Goes on to the piece behind. Returns the barrier at which every lane arrives once it has
  // read what it wants: see FenceReadsBeforeCopies.
  __device__ __forceinline__ uint64_t* Advance() {
    uint64_t* const empty = barriers_.empty[threadIdx.x / 32] + slot_;
    if (++slot_ == depth_) {
      slot_ = 0;
      parity_ ^= 1;
    }
    return empty;
  }
  // The same, of a lane that has only just asked for it.
  __device__ __forceinline__ void Release() {
    FenceReadsBeforeCopies();
    BarrierArrive(Advance());
  }

 private:
  const int depth_;
  uint8_t* const rings_;
  Barriers& barriers_;
  int slot_ = 0;
  uint32_t parity_ = 0;
};

// The side that requests.
template <typename KV, int kDim>
class Feed {
 public:
  static constexpr uint32_t kTileBytes = kTile * kDim * sizeof(KV);
  static_assert(kTileBytes <= kPieceBytes);

  // warp: whose.
  __device__ __forceinline__ Feed(const Params& p, int warp, uint8_t* rings, Barriers& barriers)
      : p_(p),
        warp_(warp),
        memory_(rings + warp * p.depth * kPieceBytes),
        full_(barriers.full[warp]),
        empty_(barriers.empty[warp]) {}

  // Looks around once and requests a piece where there is room; false: there is no more.
  // read_position is called after a start with what does not depend on it, and gives the
  // row's position and its block table; the position below 0: the kernel ends without the
  // rest.
  template <typename ReadPosition>
  __device__ __forceinline__ bool Go(ReadPosition read_position) {
    if (!begun_) {
      if (step_ == kCache && position_ < 0 && !Locate(read_position)) return false;
      begun_ = Begin();
      if (!begun_) return Advance(p_, step_, layer_);
    }
    if (landed_ < asked_ && BarrierTest(full_ + landed_slot_, landed_parity_)) {
      ++landed_;
      if (++landed_slot_ == p_.depth) {
        landed_slot_ = 0;
        landed_parity_ ^= 1;
      }
    }
    if (asked_ - landed_ == p_.window ||
        (asked_ >= p_.depth && !BarrierTest(empty_ + slot_, parity_ ^ 1))) {
      // Nobody takes anything from a full ring before the position is known.
      return position_ >= 0 || Locate(read_position);
    }
    if (Ask()) return true;
    begun_ = false;
    return Advance(p_, step_, layer_);
  }

 private:
  template <typename ReadPosition>
  __device__ __forceinline__ bool Locate(ReadPosition read_position) {
    read_position(&position_, &table_);
    if (position_ >= 0) {
      const Share share(p_, warp_, position_);
      kv_head_ = share.kv_head;
      first_tile_ = share.first;
      end_ = share.mine ? share.end : 0;
      first_block_ = BlockOf(first_tile_);
      second_block_ = BlockOf(first_tile_ + kWarps);
      return true;
    }
    for (int i = 0; i < asked_; ++i) AwaitBarrier(full_ + i, 0);
    return false;
  }
  // Requests the next piece; false: it was the step's last.
  __device__ __forceinline__ bool Ask() {
    uint8_t* const to = memory_ + slot_ * kPieceBytes;
    uint64_t* const full = full_ + slot_;
    ++asked_;
    if (++slot_ == p_.depth) {
      slot_ = 0;
      parity_ ^= 1;
    }
    if (step_ == kCache) {
      const int within = tile_ * kTile & ((1 << p_.block_shift) - 1);
      const int64_t row =
          ((static_cast<int64_t>(block_) * p_.kv_heads + kv_head_) << p_.block_shift) + within;
      const void* cache = value_ ? p_.layers[layer_].v : p_.layers[layer_].k;
      BarrierArriveExpecting(full, kTileBytes);
      BulkCopy(to, static_cast<const KV*>(cache) + row * kDim, kTileBytes, full);
      value_ = !value_;
      if (value_) return true;
      tile_ += kWarps;
      block_ = next_block_;
      next_block_ = BlockOf(tile_ + kWarps);
      return tile_ < end_;
    }
    const int rows = min(piece_rows_, left_);
    BarrierArriveExpecting(full, rows * bytes_);
#pragma unroll 1
    for (int r = 0; r < rows; ++r)
      BulkCopy(to + r * stride_, at_ + static_cast<int64_t>(r) * row_bytes_, bytes_, full);
    at_ += ahead_;
    left_ -= turn_;
    return left_ > 0;
  }

  // Goes to the step's first piece; false: there is none.
  __device__ __forceinline__ bool Begin() {
    if (step_ == kCache) {
      tile_ = first_tile_;
      if (tile_ >= end_) return false;
      block_ = first_block_;
      next_block_ = second_block_;
      return true;
    }
    const ProductPlan& q = p_.products[step_];
    const Stretch mine(q, warp_);
    piece_rows_ = PieceRows(q.capacity);
    stride_ = q.count * 512;
    bytes_ = min(stride_, q.row_bytes - mine.part * stride_);
    row_bytes_ = q.row_bytes;
    turn_ = mine.groups * piece_rows_;
    ahead_ = turn_ * q.row_bytes;
    const int first = mine.group * piece_rows_;
    left_ = mine.part < q.parts ? mine.rows - first : 0;
    at_ = (step_ == kHead ? p_.head : p_.layers[layer_].weights[step_]) +
          static_cast<int64_t>(mine.begin + first) * q.row_bytes + mine.part * stride_;
    return left_ > 0;
  }
  __device__ __forceinline__ int32_t BlockOf(int tile) const {
    return tile < end_ ? __ldcg(table_ + (tile * kTile >> p_.block_shift)) : 0;
  }

  const Params& p_;
  const int warp_;
  uint8_t* const memory_;
  uint64_t* const full_;
  uint64_t* const empty_;
  int asked_ = 0, landed_ = 0;  // pieces so far
  int slot_ = 0, landed_slot_ = 0;
  uint32_t parity_ = 0, landed_parity_ = 0;

  // The piece to be asked for next.
  int step_ = kQkv, layer_ = 0;
  bool begun_ = false;
  const uint8_t* at_ = nullptr;
  int left_ = 0;  // rows of the block's from here on
  int piece_rows_ = 0, turn_ = 0, ahead_ = 0, row_bytes_ = 0, stride_ = 0, bytes_ = 0;
  int position_ = -1;
  const int32_t* table_ = nullptr;
  int tile_ = 0, end_ = 0, kv_head_ = 0;
  bool value_ = false;  // of the tile, v
  int32_t block_ = 0, next_block_ = 0;
  int first_tile_ = 0;  // of every layer
  int32_t first_block_ = 0, second_block_ = 0;
};

}  // namespace lockstep::kernels::stack

#endif  // LOCKSTEP_KERNELS_ROW_STACK_FEED_CUH_
