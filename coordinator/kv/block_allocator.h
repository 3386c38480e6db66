// Owns the blocks of the KV cache: who holds each, which are free, and which
// are still waiting for the device to be done with them.
//
// Run-ahead makes freeing a two-part affair: a step that is in flight may still
// write (or read) a block whose sequence has just ended. Release() therefore
// takes a fence, the last step that touches the blocks; until Acknowledge()
// reaches it they are pending: counted, and not reusable.
//
//                Allocate                    Release, fence acknowledged
//      free ------------------> active ----------------------------------> free
//        ^                      ^    |                                   or cached
//        |             Allocate |    | Release, fence ahead
//        |             (evicts),|    v
//        |             Share    |  pending --------------------------------^
//        |                      |    Acknowledge(fence)
//        +---------- cached ----+
//                              cached: full, computed, held by nobody; still found
//                              by its content, and the first to go when free runs out
//
// Shared blocks are simply held more than once; a block is pending only when
// every hold on it has been released and a fence is still ahead.
// Not thread-safe; owned by the scheduler.
#ifndef LOCKSTEP_COORDINATOR_KV_BLOCK_ALLOCATOR_H_
#define LOCKSTEP_COORDINATOR_KV_BLOCK_ALLOCATOR_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "common/ids.h"
#include "coordinator/kv/prefix_cache.h"

namespace lockstep {

class BlockAllocator {
 public:
  BlockAllocator(uint32_t num_blocks, uint32_t block_size, uint64_t hash_key);

  // A block for one holder to write; evicts a cached one when none is free.
  std::optional<BlockId> Allocate();
  // One more holder of a cached block's content; it is not to be written again.
  void Share(BlockId block);
  // Drops one hold on each block of a table, given in table order. fence: the
  // last step that may touch them; 0: none.
  void Release(std::vector<BlockId> table, uint64_t fence);
  // Every step up to `step` is done on all ranks.
  void Acknowledge(uint64_t step);
  // A new epoch: nothing held, pending or cached; no step acknowledged.
  void Reset();

  PrefixCache& cache() { return cache_; }
  const PrefixCache& cache() const { return cache_; }

  // What Allocate() can hand out now.
  uint32_t num_available() const { return num_free() + num_cached(); }
  uint32_t num_free() const { return static_cast<uint32_t>(free_.size()); }
  uint32_t num_cached() const { return cache_.num_idle(); }
  uint32_t num_pending() const { return num_pending_; }
  uint32_t num_active() const { return num_blocks() - num_available() - num_pending_; }
  uint32_t num_blocks() const { return static_cast<uint32_t>(blocks_.size()); }

  // holds[b]: how many tables have block b, counted by the caller. Internal,
  // with the first block whose books are wrong.
  absl::Status CheckIntegrity(const std::vector<uint32_t>& holds) const;
  // True while some released hold on the block waits for its fence.
  bool IsFenced(BlockId block) const { return blocks_[block.value].fenced > 0; }

 private:
  struct Block {
    uint32_t holds = 0;   // by tables of running sequences
    uint32_t fenced = 0;  // released, fence not yet acknowledged
  };
  struct FencedRelease {
    uint64_t fence = 0;
    std::vector<BlockId> table;
  };

  void Reclaim(BlockId block);

  std::vector<Block> blocks_;
  std::vector<BlockId> free_;  // taken from the back
  std::vector<FencedRelease> releases_;
  uint64_t acknowledged_ = 0;
  uint32_t num_pending_ = 0;
  PrefixCache cache_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_KV_BLOCK_ALLOCATOR_H_
