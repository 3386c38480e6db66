#include "coordinator/kv/prefix_cache.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "coordinator/kv/siphash.h"

namespace lockstep {

PrefixCache::PrefixCache(uint32_t num_blocks, uint32_t block_size, uint64_t hash_key)
    : block_size_(block_size),
      hash_key_(hash_key),
      entries_(num_blocks),
      tokens_(size_t{num_blocks} * block_size) {}

uint64_t PrefixCache::Hash(uint32_t parent, uint64_t salt, std::span<const TokenId> tokens) const {
  SipHash hash(hash_key_, salt);
  hash.Add(parent);
  size_t i = 0;
  for (; i + 1 < tokens.size(); i += 2) hash.Add(uint64_t{tokens[i]} << 32 | tokens[i + 1]);
  if (i < tokens.size()) hash.Add(tokens[i]);
  return hash.Finish();
}

bool PrefixCache::Matches(uint32_t block, uint32_t parent, uint64_t salt,
                          std::span<const TokenId> tokens) const {
  const Entry& entry = entries_[block];
  return entry.present && entry.parent == parent && entry.salt == salt &&
         std::equal(tokens.begin(), tokens.end(), tokens_.begin() + size_t{block} * block_size_);
}

std::optional<BlockId> PrefixCache::Find(std::optional<BlockId> parent, uint64_t salt,
                                         std::span<const TokenId> tokens) const {
  LOCKSTEP_CHECK(tokens.size() == block_size_);
  const uint32_t above = parent ? parent->value : kNone;
  const auto it = index_.find(Hash(above, salt, tokens));
  if (it == index_.end() || !Matches(it->second, above, salt, tokens)) return std::nullopt;
  return BlockId(it->second);
}

bool PrefixCache::Insert(BlockId block, std::optional<BlockId> parent, uint64_t salt,
                         std::span<const TokenId> tokens, bool keep) {
  Entry& entry = entries_[block.value];
  LOCKSTEP_CHECK(tokens.size() == block_size_ && !entry.present);
  const uint32_t above = parent ? parent->value : kNone;
  const uint64_t hash = Hash(above, salt, tokens);
  if (!index_.emplace(hash, block.value).second) return false;
  entry = {.hash = hash, .salt = salt, .parent = above, .present = true, .keep = keep};
  std::copy(tokens.begin(), tokens.end(), tokens_.begin() + size_t{block.value} * block_size_);
  if (parent) {
    LOCKSTEP_CHECK(entries_[above].present && !entries_[above].idle);
    ++entries_[above].num_children;
  }
  return true;
}

void PrefixCache::AddIdle(BlockId block) {
  Entry& entry = entries_[block.value];
  LOCKSTEP_CHECK(entry.present && entry.keep && !entry.idle);
  entry.idle = true;
  entry.previous = newest_idle_;
  entry.next = kNone;
  (newest_idle_ == kNone ? oldest_idle_ : entries_[newest_idle_].next) = block.value;
  newest_idle_ = block.value;
  ++num_idle_;
}

void PrefixCache::RemoveIdle(BlockId block) {
  Entry& entry = entries_[block.value];
  LOCKSTEP_CHECK(entry.idle);
  entry.idle = false;
  (entry.previous == kNone ? oldest_idle_ : entries_[entry.previous].next) = entry.next;
  (entry.next == kNone ? newest_idle_ : entries_[entry.next].previous) = entry.previous;
  --num_idle_;
}

std::optional<BlockId> PrefixCache::Evict() {
  if (oldest_idle_ == kNone) return std::nullopt;
  const BlockId block(oldest_idle_);
  RemoveIdle(block);
  Remove(block);
  return block;
}

void PrefixCache::Remove(BlockId block) {
  Entry& entry = entries_[block.value];
  LOCKSTEP_CHECK(entry.present && !entry.idle && entry.num_children == 0);
  index_.erase(entry.hash);
  if (entry.parent != kNone) --entries_[entry.parent].num_children;
  entry = Entry{};
}

void PrefixCache::Clear() {
  std::fill(entries_.begin(), entries_.end(), Entry{});
  index_.clear();
  oldest_idle_ = newest_idle_ = kNone;
  num_idle_ = 0;
}

bool PrefixCache::Holds(BlockId block, std::optional<BlockId> parent, uint64_t salt,
                        std::span<const TokenId> tokens) const {
  return Matches(block.value, parent ? parent->value : kNone, salt, tokens);
}

absl::Status PrefixCache::CheckIntegrity() const {
  std::vector<uint32_t> children(entries_.size());
  uint32_t present = 0;
  for (uint32_t b = 0; b < entries_.size(); ++b) {
    const Entry& entry = entries_[b];
    if (!entry.present) {
      if (entry.idle) return absl::InternalError(absl::StrCat("block ", b, ": idle, not cached"));
      continue;
    }
    ++present;
    const auto it = index_.find(entry.hash);
    if (it == index_.end() || it->second != b) {
      return absl::InternalError(absl::StrCat("block ", b, ": cached but not in the index"));
    }
    const std::span<const TokenId> tokens(tokens_.data() + size_t{b} * block_size_, block_size_);
    if (Hash(entry.parent, entry.salt, tokens) != entry.hash) {
      return absl::InternalError(absl::StrCat("block ", b, ": cached under another hash"));
    }
    if (entry.parent == kNone) continue;
    if (!entries_[entry.parent].present) {
      return absl::InternalError(absl::StrCat("block ", b, ": its parent is not cached"));
    }
    ++children[entry.parent];
  }
  if (present != index_.size()) {
    return absl::InternalError("the prefix index names blocks that are not cached");
  }
  for (uint32_t b = 0; b < entries_.size(); ++b) {
    if (children[b] != entries_[b].num_children) {
      return absl::InternalError(absl::StrCat("block ", b, ": wrong number of children"));
    }
  }
  uint32_t idle = 0;
  for (uint32_t b = oldest_idle_; b != kNone; b = entries_[b].next, ++idle) {
    // Children stand before their parent, so all of them have been counted off by now.
    if (idle >= entries_.size() || !entries_[b].idle || children[b] != 0) {
      return absl::InternalError(absl::StrCat("block ", b, ": idle before its children"));
    }
    if (entries_[b].parent != kNone) --children[entries_[b].parent];
  }
  if (idle != num_idle_) return absl::InternalError("wrong number of idle blocks");
  return absl::OkStatus();
}

}  // namespace lockstep
