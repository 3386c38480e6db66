// A sequence's blocks in position order: block i holds the KV of positions
// [i * block_size, (i + 1) * block_size). Append-only while the sequence runs;
// Take() empties it when the sequence leaves its slot.
#ifndef LOCKSTEP_COORDINATOR_KV_BLOCK_TABLE_H_
#define LOCKSTEP_COORDINATOR_KV_BLOCK_TABLE_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "common/ids.h"

namespace lockstep {

inline uint32_t BlocksForTokens(uint64_t num_tokens, uint32_t block_size) {
  return static_cast<uint32_t>((num_tokens + block_size - 1) / block_size);
}

class BlockTable {
 public:
  void Append(BlockId block) { blocks_.push_back(block); }
  std::vector<BlockId> Take() { return std::exchange(blocks_, {}); }

  uint32_t size() const { return static_cast<uint32_t>(blocks_.size()); }
  bool empty() const { return blocks_.empty(); }
  const std::vector<BlockId>& blocks() const { return blocks_; }
  BlockId operator[](uint32_t i) const { return blocks_[i]; }

 private:
  std::vector<BlockId> blocks_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_KV_BLOCK_TABLE_H_
