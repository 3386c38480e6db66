#include "common/suggest.h"

#include "gtest/gtest.h"

namespace lockstep {
namespace {

TEST(SuggestTest, CountsInsertionsDeletionsReplacementsAndSwaps) {
  EXPECT_EQ(EditDistance("serve", "serve"), 0);
  EXPECT_EQ(EditDistance("srve", "serve"), 1);
  EXPECT_EQ(EditDistance("servee", "serve"), 1);
  EXPECT_EQ(EditDistance("sarve", "serve"), 1);
  EXPECT_EQ(EditDistance("sevre", "serve"), 1);
  EXPECT_EQ(EditDistance("", "abc"), 3);
}

TEST(SuggestTest, NamesTheNearestWord) {
  const std::vector<std::string> words = {"serve", "generate", "chat", "batch", "plan"};
  EXPECT_EQ(NearestWord("genrate", words), "generate");
  EXPECT_EQ(NearestWord("bacth", words), "batch");
}

TEST(SuggestTest, IsSilentWhenNothingIsNear) {
  EXPECT_EQ(NearestWord("frobnicate", {"serve", "chat"}), std::nullopt);
  EXPECT_EQ(NearestWord("x", {}), std::nullopt);
}

}  // namespace
}  // namespace lockstep
