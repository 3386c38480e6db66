#include <vector>

#include "coordinator/kv/prefix_cache.h"
#include "coordinator/kv/siphash.h"
#include "gtest/gtest.h"

namespace lockstep {
namespace {

using Tokens = std::vector<TokenId>;

class PrefixCacheTest : public testing::Test {
 protected:
  void TearDown() override { EXPECT_EQ(cache_.CheckIntegrity(), absl::OkStatus()); }
  PrefixCache cache_{8, /*block_size=*/3, /*hash_key=*/1};
};

TEST_F(PrefixCacheTest, FindsWhatWasEntered) {
  ASSERT_TRUE(cache_.Insert(BlockId(4), {}, 0, Tokens{1, 2, 3}, true));
  EXPECT_EQ(cache_.Find({}, 0, Tokens{1, 2, 3}), BlockId(4));
  EXPECT_EQ(cache_.Find({}, 0, Tokens{1, 2, 4}), std::nullopt);
}

TEST_F(PrefixCacheTest, TheSameTokensAfterAnotherPrefixAreAnotherEntry) {
  ASSERT_TRUE(cache_.Insert(BlockId(0), {}, 0, Tokens{1, 1, 1}, true));
  ASSERT_TRUE(cache_.Insert(BlockId(1), {}, 0, Tokens{2, 2, 2}, true));
  ASSERT_TRUE(cache_.Insert(BlockId(2), BlockId(0), 0, Tokens{7, 8, 9}, true));
  EXPECT_EQ(cache_.Find(BlockId(0), 0, Tokens{7, 8, 9}), BlockId(2));
  EXPECT_EQ(cache_.Find(BlockId(1), 0, Tokens{7, 8, 9}), std::nullopt);
  EXPECT_EQ(cache_.Find({}, 0, Tokens{7, 8, 9}), std::nullopt);
}

TEST_F(PrefixCacheTest, SaltsDoNotShare) {
  ASSERT_TRUE(cache_.Insert(BlockId(0), {}, /*salt=*/1, Tokens{1, 2, 3}, true));
  EXPECT_EQ(cache_.Find({}, /*salt=*/2, Tokens{1, 2, 3}), std::nullopt);
  EXPECT_TRUE(cache_.Insert(BlockId(1), {}, /*salt=*/2, Tokens{1, 2, 3}, true));
}

TEST_F(PrefixCacheTest, ASecondBlockOfTheSameContentIsNotEntered) {
  ASSERT_TRUE(cache_.Insert(BlockId(0), {}, 0, Tokens{1, 2, 3}, true));
  EXPECT_FALSE(cache_.Insert(BlockId(1), {}, 0, Tokens{1, 2, 3}, true));
  EXPECT_FALSE(cache_.Contains(BlockId(1)));
}

TEST_F(PrefixCacheTest, EvictedEntriesAreNotFound) {
  ASSERT_TRUE(cache_.Insert(BlockId(0), {}, 0, Tokens{1, 2, 3}, true));
  EXPECT_EQ(cache_.Evict(), std::nullopt);
  cache_.AddIdle(BlockId(0));
  EXPECT_EQ(cache_.Evict(), BlockId(0));
  EXPECT_EQ(cache_.Find({}, 0, Tokens{1, 2, 3}), std::nullopt);
}

TEST_F(PrefixCacheTest, OneThatIsTakenUpAgainIsNotEvicted) {
  ASSERT_TRUE(cache_.Insert(BlockId(0), {}, 0, Tokens{1, 2, 3}, true));
  cache_.AddIdle(BlockId(0));
  cache_.RemoveIdle(BlockId(0));
  EXPECT_EQ(cache_.num_idle(), 0u);
  EXPECT_EQ(cache_.Evict(), std::nullopt);
}

// The reference vectors of the paper's implementation: key 00..0f, messages 00,
// 00 01, ...; here those of whole words.
TEST(SipHashTest, AgreesWithTheReferenceVectors) {
  const uint64_t key0 = 0x0706050403020100u, key1 = 0x0f0e0d0c0b0a0908u;
  EXPECT_EQ(SipHash(key0, key1).Finish(), 0x726fdb47dd0e0e31u);
  SipHash one(key0, key1);
  one.Add(0x0706050403020100u);
  EXPECT_EQ(one.Finish(), 0x93f5f5799a932462u);
  SipHash two(key0, key1);
  two.Add(0x0706050403020100u);
  two.Add(0x0f0e0d0c0b0a0908u);
  EXPECT_EQ(two.Finish(), 0x3f2acc7f57c29bdbu);
}

}  // namespace
}  // namespace lockstep
