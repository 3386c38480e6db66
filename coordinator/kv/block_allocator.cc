#include "coordinator/kv/block_allocator.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/check.h"

namespace lockstep {

BlockAllocator::BlockAllocator(uint32_t num_blocks, uint32_t block_size, uint64_t hash_key)
    : cache_(num_blocks, block_size, hash_key) {
  blocks_.resize(num_blocks);
  Reset();
}

void BlockAllocator::Reset() {
  std::fill(blocks_.begin(), blocks_.end(), Block{});
  free_.clear();
  for (uint32_t b = num_blocks(); b > 0; --b) free_.push_back(BlockId(b - 1));
  releases_.clear();
  acknowledged_ = 0;
  num_pending_ = 0;
  cache_.Clear();
}

std::optional<BlockId> BlockAllocator::Allocate() {
  std::optional<BlockId> block;
  if (!free_.empty()) {
    block = free_.back();
    free_.pop_back();
  } else {
    block = cache_.Evict();
  }
  if (block) {
    LOCKSTEP_CHECK(blocks_[block->value].holds == 0 && blocks_[block->value].fenced == 0);
    blocks_[block->value].holds = 1;
  }
  return block;
}

void BlockAllocator::Share(BlockId id) {
  LOCKSTEP_CHECK(cache_.Contains(id));
  Block& block = blocks_[id.value];
  if (cache_.IsIdle(id)) {
    cache_.RemoveIdle(id);
  } else if (block.holds == 0) {
    --num_pending_;  // taken up again before its fence came
  }
  ++block.holds;
}

void BlockAllocator::Release(std::vector<BlockId> table, uint64_t fence) {
  const bool fenced = fence > acknowledged_;
  // From the tail, so that the prefix cache sees children before parents.
  for (size_t i = table.size(); i-- > 0;) {
    Block& block = blocks_[table[i].value];
    LOCKSTEP_CHECK(block.holds > 0);
    if (fenced) ++block.fenced;
    if (--block.holds > 0) continue;
    if (block.fenced > 0) {
      ++num_pending_;
    } else {
      Reclaim(table[i]);
    }
  }
  if (fenced && !table.empty()) releases_.push_back({fence, std::move(table)});
}

void BlockAllocator::Acknowledge(uint64_t step) {
  acknowledged_ = step;
  std::erase_if(releases_, [this, step](const FencedRelease& release) {
    if (release.fence > step) return false;
    for (size_t i = release.table.size(); i-- > 0;) {
      Block& block = blocks_[release.table[i].value];
      LOCKSTEP_CHECK(block.fenced > 0);
      if (--block.fenced > 0 || block.holds > 0) continue;
      --num_pending_;
      Reclaim(release.table[i]);
    }
    return true;
  });
}

// Nobody holds the block and no step in flight touches it.
void BlockAllocator::Reclaim(BlockId block) {
  if (cache_.Contains(block)) {
    if (cache_.Keeps(block)) {
      cache_.AddIdle(block);
      return;
    }
    cache_.Remove(block);
  }
  free_.push_back(block);
}

absl::Status BlockAllocator::CheckIntegrity(const std::vector<uint32_t>& holds) const {
  const auto broken = [](uint32_t b, const char* what) {
    return absl::InternalError(absl::StrCat("block ", b, ": ", what));
  };
  std::vector<uint32_t> fenced(num_blocks()), listed(num_blocks());
  for (const FencedRelease& release : releases_) {
    if (release.fence <= acknowledged_) {
      return absl::InternalError("a release outlived the step that it waited for");
    }
    for (BlockId block : release.table) ++fenced[block.value];
  }
  for (BlockId block : free_) ++listed[block.value];
  uint32_t pending = 0;
  for (uint32_t b = 0; b < num_blocks(); ++b) {
    const Block& block = blocks_[b];
    if (block.holds != holds[b]) return broken(b, "held by another number of tables than counted");
    if (block.fenced != fenced[b]) return broken(b, "fences miscounted");
    const bool idle = cache_.IsIdle(BlockId(b));
    if (listed[b] > 1) return broken(b, "twice in the free list");
    if (listed[b] == 1 && cache_.Contains(BlockId(b))) return broken(b, "free and cached");
    const bool in_use = block.holds > 0 || block.fenced > 0;
    if (in_use && (listed[b] == 1 || idle)) return broken(b, "reusable while in use");
    if (!in_use && listed[b] == 0 && !idle) return broken(b, "lost");
    pending += block.holds == 0 && block.fenced > 0 ? 1 : 0;
  }
  if (pending != num_pending_) return absl::InternalError("pending blocks miscounted");
  return cache_.CheckIntegrity();
}

}  // namespace lockstep
