#include "coordinator/growth_forecast.h"

#include <algorithm>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace lockstep {
namespace {

using One = GrowthForecast::Run;

constexpr uint32_t kBlock = 4;

uint64_t Peak(const std::vector<One>& runs, const One& newcomer) {
  GrowthForecast forecast(kBlock);
  for (const One& run : runs) forecast.Add(run);
  uint64_t least = 0;
  while (!forecast.Fits(newcomer, least)) ++least;
  return least;
}

// Token by token: what all hold beyond today's, each a whole number of blocks.
uint64_t Simulated(std::vector<One> runs, const One& newcomer) {
  runs.push_back(newcomer);
  uint32_t longest = 0;
  for (const One& run : runs) longest = std::max(longest, run.tokens);
  int64_t peak = 0;
  for (uint32_t t = 0; t <= longest; ++t) {
    int64_t more = 0;
    for (const One& run : runs) {
      more += t <= run.tokens ? static_cast<int64_t>((t + kBlock - 1) / kBlock)
                              : -static_cast<int64_t>(run.blocks);
    }
    peak = std::max(peak, more);
  }
  return static_cast<uint64_t>(peak);
}

TEST(GrowthForecastTest, AloneItIsItsOwnGrowth) {
  EXPECT_EQ(Peak({}, {.tokens = 0, .blocks = 3, .most = 9}), 0u);
  EXPECT_EQ(Peak({}, {.tokens = 1, .blocks = 3, .most = 9}), 1u);
  EXPECT_EQ(Peak({}, {.tokens = 8, .blocks = 3, .most = 9}), 2u);
  EXPECT_EQ(Peak({}, {.tokens = 8, .blocks = 3, .most = 1}), 1u) << "it cannot grow by more";
}

TEST(GrowthForecastTest, WhoEndsSoonerMakesRoomForWhoLasts) {
  const One brief = {.tokens = 4, .blocks = 10, .most = 1};
  const One lasting = {.tokens = 40, .blocks = 1, .most = 10};
  // Both grow by 1; then 10 come back and the other wants 9 more.
  EXPECT_EQ(Peak({brief}, lasting), 2u);
  // What somebody else holds too does not come back.
  EXPECT_EQ(Peak({{.tokens = 4, .blocks = 0, .most = 1}}, lasting), 10u);
}

TEST(GrowthForecastTest, IsTheWorstMomentOfAnyMix) {
  std::mt19937 random(7);
  for (int round = 0; round < 300; ++round) {
    std::vector<One> runs(random() % 12);
    const auto any = [&] {
      const uint32_t tokens = random() % 60;
      return One{.tokens = tokens, .blocks = static_cast<uint32_t>(random() % 8), .most = 1000};
    };
    for (One& run : runs) run = any();
    const One newcomer = any();
    EXPECT_EQ(Peak(runs, newcomer), Simulated(runs, newcomer)) << round;
  }
}

TEST(AnswerLengthTest, GoesOverFromAGuessToWhatAnswersWere) {
  AnswerLength length(1000);
  EXPECT_EQ(length.Remaining(0, 5000), 1000u);
  EXPECT_EQ(length.Remaining(0, 20), 20u) << "no more than is declared";
  for (int i = 0; i < 800; ++i) length.Ended(50, false);
  EXPECT_NEAR(length.Remaining(0, 5000), 50, 3);
  EXPECT_NEAR(length.Remaining(30, 5000), 20, 3);
  EXPECT_EQ(length.Remaining(400, 5000), 200u) << "it has outlived the mean";
  EXPECT_EQ(length.Remaining(400, 100), 100u);
}

// Short limits say nothing of how long an answer would have been.
TEST(AnswerLengthTest, CutAnswersCountAsLongerThanTheyWere) {
  AnswerLength length(1000);
  for (int i = 0; i < 8; ++i) length.Ended(16, true);
  EXPECT_GE(length.Remaining(0, 5000), 1000u);
  for (int i = 0; i < 2000; ++i) length.Ended(16, true);
  EXPECT_EQ(length.Remaining(0, 5000), 5000u) << "all that is declared";
  // Of three, one is cut at 100 and two end at 50.
  for (int i = 0; i < 3000; ++i) length.Ended(i % 3 == 0 ? 100 : 50, i % 3 == 0);
  EXPECT_NEAR(length.Remaining(0, 5000), 100, 5);
}

}  // namespace
}  // namespace lockstep
