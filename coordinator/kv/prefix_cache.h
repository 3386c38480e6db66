// Which full blocks hold the KV of which tokens, so that a sequence that begins
// the same way starts with them instead of computing them again.
//
// An entry says: this block holds the KV of these `block_size` tokens, after
// the tokens of the parent entry (none: at the start), for this salt. It is
// found by a keyed hash and believed only after comparing parent, salt and
// tokens; a second block with the same hash is simply not entered.
//
// Who holds an entry's block holds its parent's block too. So a block that
// nobody holds has no child that somebody holds, and because a table is
// released from its tail, the idle list has children before parents: evicting
// from its front always takes a leaf.
//
//   idle list:  (oldest) [A2] [A1] [B1] [A0] (newest)     A0 <- A1 <- A2, A0 <- B1
//
// The caller (BlockAllocator) knows who holds what; this class knows content.
// Not thread-safe.
#ifndef LOCKSTEP_COORDINATOR_KV_PREFIX_CACHE_H_
#define LOCKSTEP_COORDINATOR_KV_PREFIX_CACHE_H_

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "common/ids.h"

namespace lockstep {

class PrefixCache {
 public:
  // hash_key: secret of this process.
  PrefixCache(uint32_t num_blocks, uint32_t block_size, uint64_t hash_key);

  // The block with exactly these tokens (block_size of them) after `parent`.
  std::optional<BlockId> Find(std::optional<BlockId> parent, uint64_t salt,
                              std::span<const TokenId> tokens) const;

  // Enters a held block. keep: it may stay when nobody holds it any more. False
  // when another block already stands for the same content (or hash).
  bool Insert(BlockId block, std::optional<BlockId> parent, uint64_t salt,
              std::span<const TokenId> tokens, bool keep);

  bool Contains(BlockId block) const { return entries_[block.value].present; }
  bool Keeps(BlockId block) const { return entries_[block.value].keep; }

  // Nobody holds the block any more: it joins the idle list as its newest.
  void AddIdle(BlockId block);
  // Somebody holds it again.
  void RemoveIdle(BlockId block);
  bool IsIdle(BlockId block) const { return entries_[block.value].idle; }
  // Forgets the least recently idle block and returns it.
  std::optional<BlockId> Evict();
  // Forgets a childless block that is not idle.
  void Remove(BlockId block);
  void Clear();

  uint32_t num_idle() const { return num_idle_; }
  uint32_t num_entries() const { return static_cast<uint32_t>(index_.size()); }

  // Whether the entry of `block` stands for exactly this content.
  bool Holds(BlockId block, std::optional<BlockId> parent, uint64_t salt,
             std::span<const TokenId> tokens) const;
  // Internal, with the first broken one: index, child counts, idle order.
  absl::Status CheckIntegrity() const;

 private:
  static constexpr uint32_t kNone = 0xffffffff;

  struct Entry {
    uint64_t hash = 0;
    uint64_t salt = 0;
    uint32_t parent = kNone;
    uint32_t num_children = 0;
    uint32_t previous = kNone, next = kNone;  // in the idle list
    bool present = false, keep = false, idle = false;
  };

  uint64_t Hash(uint32_t parent, uint64_t salt, std::span<const TokenId> tokens) const;
  bool Matches(uint32_t block, uint32_t parent, uint64_t salt,
               std::span<const TokenId> tokens) const;

  const uint32_t block_size_;
  const uint64_t hash_key_;
  std::vector<Entry> entries_;                     // by block
  std::vector<TokenId> tokens_;                    // [num_blocks, block_size], of present entries
  absl::flat_hash_map<uint64_t, uint32_t> index_;  // hash -> block
  uint32_t oldest_idle_ = kNone, newest_idle_ = kNone;
  uint32_t num_idle_ = 0;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_KV_PREFIX_CACHE_H_
