#include <vector>

#include "coordinator/kv/block_allocator.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace lockstep {
namespace {

constexpr uint32_t kBlockSize = 2;

class BlockAllocatorTest : public testing::Test {
 protected:
  // `n` blocks held by one table.
  std::vector<BlockId> Take(uint32_t n) {
    std::vector<BlockId> table;
    for (uint32_t i = 0; i < n; ++i) {
      table.push_back(*allocator_.Allocate());
      ++holds_[table.back().value];
    }
    return table;
  }
  void Share(BlockId block) {
    allocator_.Share(block);
    ++holds_[block.value];
  }
  void Release(const std::vector<BlockId>& table, uint64_t fence) {
    for (BlockId block : table) --holds_[block.value];
    allocator_.Release(table, fence);
  }
  // A table whose blocks are entries of the prefix cache, in a chain.
  std::vector<BlockId> TakeCached(uint32_t n, TokenId first, bool keep = true) {
    std::vector<BlockId> table = Take(n);
    std::optional<BlockId> parent;
    for (uint32_t i = 0; i < n; ++i) {
      EXPECT_TRUE(
          allocator_.cache().Insert(table[i], parent, 0, std::vector<TokenId>{first, i}, keep));
      parent = table[i];
    }
    return table;
  }
  void TearDown() override { EXPECT_EQ(allocator_.CheckIntegrity(holds_), absl::OkStatus()); }

  BlockAllocator allocator_{4, kBlockSize, /*hash_key=*/99};
  std::vector<uint32_t> holds_ = std::vector<uint32_t>(4);
};

TEST_F(BlockAllocatorTest, HandsOutEveryBlockOnceAndThenNone) {
  std::vector<BlockId> table = Take(4);
  EXPECT_THAT(table, testing::UnorderedElementsAre(BlockId(0), BlockId(1), BlockId(2), BlockId(3)));
  EXPECT_EQ(allocator_.Allocate(), std::nullopt);
  EXPECT_EQ(allocator_.num_active(), 4u);
}

TEST_F(BlockAllocatorTest, FreesAtOnceWhatNoStepInFlightTouches) {
  Release(Take(3), 0);
  EXPECT_EQ(allocator_.num_free(), 4u);
}

TEST_F(BlockAllocatorTest, KeepsFencedBlocksPendingUntilTheirStepIsAcknowledged) {
  Release(Take(4), /*fence=*/2);
  EXPECT_EQ(allocator_.num_pending(), 4u);
  EXPECT_EQ(allocator_.Allocate(), std::nullopt);
  allocator_.Acknowledge(1);
  EXPECT_EQ(allocator_.num_pending(), 4u);
  allocator_.Acknowledge(2);
  EXPECT_EQ(allocator_.num_pending(), 0u);
  EXPECT_EQ(allocator_.num_free(), 4u);
}

TEST_F(BlockAllocatorTest, ABlockIsPendingOnlyWhenItsLastHoldIsReleased) {
  const std::vector<BlockId> table = TakeCached(1, 5);
  Share(table[0]);
  Release(table, /*fence=*/1);
  EXPECT_EQ(allocator_.num_pending(), 0u);
  EXPECT_EQ(allocator_.num_active(), 1u);
  Release(table, /*fence=*/2);
  EXPECT_EQ(allocator_.num_pending(), 1u);
  allocator_.Acknowledge(1);
  EXPECT_EQ(allocator_.num_pending(), 1u);
  allocator_.Acknowledge(2);
  EXPECT_EQ(allocator_.num_cached(), 1u);
}

TEST_F(BlockAllocatorTest, APendingBlockCanBeTakenUpAgain) {
  const std::vector<BlockId> table = TakeCached(1, 5);
  Release(table, /*fence=*/1);
  Share(table[0]);
  EXPECT_EQ(allocator_.num_pending(), 0u);
  allocator_.Acknowledge(1);
  EXPECT_EQ(allocator_.num_active(), 1u);
  EXPECT_EQ(allocator_.num_free(), 3u);
}

TEST_F(BlockAllocatorTest, EvictsTheOldestLeafWhenNothingIsFree) {
  const std::vector<BlockId> old_chain = TakeCached(2, 1);
  const std::vector<BlockId> new_chain = TakeCached(2, 2);
  Release(old_chain, 0);
  Release(new_chain, 0);
  EXPECT_EQ(allocator_.num_free(), 0u);
  EXPECT_EQ(allocator_.num_cached(), 4u);
  EXPECT_EQ(Take(2), (std::vector<BlockId>{old_chain[1], old_chain[0]}));
  EXPECT_EQ(Take(1)[0], new_chain[1]);
  EXPECT_TRUE(allocator_.cache().Contains(new_chain[0]));
}

TEST_F(BlockAllocatorTest, UseMakesACachedBlockTheNewest) {
  const std::vector<BlockId> a = TakeCached(1, 1), b = TakeCached(1, 2);
  Take(2);
  Release(a, 0);
  Release(b, 0);
  Share(a[0]);
  Release(a, 0);
  EXPECT_EQ(Take(1), b);
}

TEST_F(BlockAllocatorTest, PrivateEntriesAreFreeWhenNobodyHoldsThem) {
  Release(TakeCached(3, 1, /*keep=*/false), 0);
  EXPECT_EQ(allocator_.num_free(), 4u);
  EXPECT_EQ(allocator_.cache().num_entries(), 0u);
}

TEST_F(BlockAllocatorTest, ResetForgetsEverything) {
  Release(TakeCached(2, 1), /*fence=*/7);
  Take(1);
  allocator_.Reset();
  holds_.assign(4, 0);
  EXPECT_EQ(allocator_.num_free(), 4u);
  EXPECT_EQ(allocator_.cache().num_entries(), 0u);
}

TEST_F(BlockAllocatorTest, IntegrityNamesABlockHeldByNoTable) {
  const std::vector<BlockId> table = Take(1);
  --holds_[table[0].value];
  EXPECT_THAT(std::string(allocator_.CheckIntegrity(holds_).message()),
              testing::HasSubstr("held by another number of tables"));
  ++holds_[table[0].value];
}

}  // namespace
}  // namespace lockstep
