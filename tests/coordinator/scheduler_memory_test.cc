// Blocks: growth, preemption, fences and the prefix cache, seen through plans.
#include <algorithm>
#include <vector>

#include "coordinator/scheduler.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/fakes/scheduler_harness.h"
#include "wire/protocol.h"

namespace lockstep {
namespace {

using testing::ElementsAre;

SchedulerConfig Config(uint32_t num_kv_blocks) {
  SchedulerConfig config = SmallSchedulerConfig();
  config.max_batched_tokens = 64;
  config.num_kv_blocks = num_kv_blocks;
  config.forecast_growth = false;  // so that more start than fit
  return config;
}

// Two sequences that fit when they start (1 block each and room for 2 more) and
// not when both have grown.
class TightTest : public testing::Test {
 protected:
  TightTest() {
    EXPECT_TRUE(h_.Add(RequestBuilder(1).Prompt(4).MaxTokens(20)).ok());
    EXPECT_TRUE(h_.Add(RequestBuilder(2).Prompt(4).MaxTokens(20)).ok());
  }
  void StepUntilPreemption() {
    for (int i = 0; i < 40 && h_.scheduler.Stats().preemptions == 0; ++i) h_.Step();
    ASSERT_EQ(h_.scheduler.Stats().preemptions, 1u);
  }
  SchedulerHarness h_{Config(8)};
};

TEST_F(TightTest, PreemptsNewestWhenBlocksRunOut) {
  StepUntilPreemption();
  ASSERT_EQ(h_.slots.size(), 1u);
  EXPECT_EQ(h_.slots.at(Slot(0)).sequence.sampling.seed, 1'000) << "the oldest stays";
}

TEST_F(TightTest, ThePreemptedOneComesBackWithItsTokensAndMissesNone) {
  StepUntilPreemption();
  const size_t delivered = h_.Tokens(2).size();
  ASSERT_GT(delivered, 0u);
  StepPlan plan;
  while (plan.new_sequences.empty() && h_.scheduler.HasRequests()) plan = h_.Step();
  const NewSequence again = plan.new_sequences.at(0);
  EXPECT_EQ(again.num_prompt_tokens, 4u);
  EXPECT_EQ(again.tokens.size(), 4 + delivered);
  h_.RunAll();
  std::vector<TokenId> expected(20);
  for (uint32_t i = 0; i < 20; ++i) expected[i] = 10 + i;
  EXPECT_EQ(h_.Tokens(1), expected);
  EXPECT_EQ(h_.Tokens(2), expected);
}

TEST_F(TightTest, ThePreemptedOneGoesBeforeAllNewcomers) {
  StepUntilPreemption();
  ASSERT_TRUE(h_.Add(RequestBuilder(3).Prompt(4).MaxTokens(1).Priority(-9)).ok());
  h_.RunAll();
  std::vector<uint64_t> ends;
  for (const FinishedEvent& e : h_.EventsOf<FinishedEvent>()) {
    ends.push_back(e.sequence.request.value);
  }
  EXPECT_EQ(h_.EventsOf<StartedEvent>().back().request, RequestId(3));
  EXPECT_EQ(ends.front(), 1u);
}

TEST_F(TightTest, LowerPriorityIsPreemptedWhoeverCameFirst) {
  h_.scheduler.Cancel(RequestId(2));
  ASSERT_TRUE(h_.Add(RequestBuilder(3).Prompt(4).MaxTokens(20).Priority(-1)).ok());
  StepUntilPreemption();
  EXPECT_EQ(h_.slots.begin()->second.sequence.sampling.seed, 3'000);
}

TEST(SchedulerMemoryTest, ADemandOfFourTimesThePoolFinishesWithBoundedPreemption) {
  SchedulerConfig config = Config(24);
  config.max_num_seqs = 8;
  SchedulerHarness h(config);
  for (uint64_t id = 1; id <= 16; ++id) {
    ASSERT_TRUE(h.Add(RequestBuilder(id).Prompt(4).MaxTokens(44)).ok());
  }
  h.RunAll();
  EXPECT_EQ(h.scheduler.Stats().completed, 16u);
  EXPECT_GT(h.scheduler.Stats().preemptions, 0u);
  EXPECT_LE(h.scheduler.Stats().preemptions, 32u);
}

TEST(SchedulerMemoryTest, NobodyIsPreemptedWhereAnswersAreAsLongAsExpected) {
  SchedulerConfig config = Config(24);
  config.max_num_seqs = 8;
  config.forecast_growth = true;
  config.expected_tokens = 44;
  SchedulerHarness h(config);
  for (uint64_t id = 1; id <= 16; ++id) {
    ASSERT_TRUE(h.Add(RequestBuilder(id).Prompt(4).MaxTokens(44)).ok());
  }
  uint32_t most = 0;
  while (h.scheduler.HasRequests()) {
    h.Step();
    most = std::max(most, h.scheduler.Stats().running);
  }
  EXPECT_EQ(h.scheduler.Stats().completed, 16u);
  EXPECT_EQ(h.scheduler.Stats().preemptions, 0u);
  EXPECT_EQ(most, 2u) << "12 blocks each";
}

// Who is about to end makes room for who has just begun.
TEST(SchedulerMemoryTest, BlocksThatComeBackInTimeAreGivenAwayBefore) {
  SchedulerConfig config = Config(24);
  config.forecast_growth = true;
  config.expected_tokens = 44;
  SchedulerHarness h(config);
  ASSERT_TRUE(h.Add(RequestBuilder(1).Prompt(4).MaxTokens(44)).ok());
  while (h.Tokens(1).size() < 38) h.Step();
  ASSERT_TRUE(h.Add(RequestBuilder(2).Prompt(4).MaxTokens(44)).ok());
  ASSERT_TRUE(h.Add(RequestBuilder(3).Prompt(4).MaxTokens(44)).ok());
  h.Step();
  EXPECT_EQ(h.scheduler.Stats().running, 3u);
  h.RunAll();
  EXPECT_EQ(h.scheduler.Stats().completed, 3u);
  EXPECT_EQ(h.scheduler.Stats().preemptions, 0u);
}

TEST(SchedulerMemoryTest, NobodyOvertakesARequestThatWaitsForBlocks) {
  SchedulerHarness h(Config(8));
  ASSERT_TRUE(h.Add(RequestBuilder(1).Prompt(16).MaxTokens(4)).ok());
  h.Step();
  ASSERT_TRUE(h.Add(RequestBuilder(2).Prompt(28).MaxTokens(1)).ok());
  ASSERT_TRUE(h.Add(RequestBuilder(3).Prompt(2).MaxTokens(1)).ok());
  h.RunAll();
  const auto started = h.EventsOf<StartedEvent>();
  ASSERT_EQ(started.size(), 3u);
  EXPECT_EQ(started[1].request, RequestId(2));
}

TEST(SchedulerMemoryTest, ARequestThatFillsTheCacheExactlyRuns) {
  SchedulerHarness h(Config(4));
  ASSERT_TRUE(h.Add(RequestBuilder(1).Prompt(4).MaxTokens(13)).ok());
  ASSERT_TRUE(h.Add(RequestBuilder(2).Prompt(16).MaxTokens(1)).ok());
  h.RunAll();
  EXPECT_EQ(h.scheduler.Stats().completed, 2u);
}

TEST(SchedulerMemoryTest, ACancelledRequestsBlocksComeBackWithinTwoSteps) {
  SchedulerHarness h(Config(8));
  ASSERT_TRUE(h.Add(RequestBuilder(1).Prompt(9).MaxTokens(9)).ok());
  h.Plan();
  h.Plan();
  h.scheduler.Cancel(RequestId(1));
  EXPECT_EQ(h.scheduler.Stats().blocks_pending, 3u);
  ASSERT_EQ(h.Answer(), absl::OkStatus());
  EXPECT_EQ(h.scheduler.Stats().blocks_pending, 3u);
  ASSERT_EQ(h.Answer(), absl::OkStatus());
  EXPECT_EQ(h.scheduler.Stats().blocks_pending, 0u);
  EXPECT_EQ(h.scheduler.Stats().blocks_free, 8u);
}

TEST(SchedulerMemoryTest, AFencedBlockIsNotHandedOutWhileItsStepIsInFlight) {
  SchedulerHarness h(Config(4));
  ASSERT_TRUE(h.Add(RequestBuilder(1).Prompt(13).MaxTokens(4)).ok());
  ASSERT_TRUE(h.Add(RequestBuilder(2).Prompt(13).MaxTokens(4)).ok());
  h.Plan();
  h.scheduler.Cancel(RequestId(1));
  EXPECT_EQ(h.Plan(), std::nullopt) << "all blocks are still being written";
  ASSERT_EQ(h.Answer(), absl::OkStatus());
  const std::optional<StepPlan> plan = h.Plan();
  ASSERT_TRUE(plan.has_value());
  EXPECT_THAT(plan->finished_slots, ElementsAre(Slot(0)));
  EXPECT_EQ(plan->new_sequences.size(), 1u);
}

TEST(SchedulerMemoryTest, ASharedPrefixIsComputedOnce) {
  SchedulerHarness h(Config(32));
  ASSERT_TRUE(h.Add(RequestBuilder(1).Tokens({1, 2, 3, 4, 5, 6, 7, 8, 9}).MaxTokens(1)).ok());
  h.RunAll();
  ASSERT_TRUE(h.Add(RequestBuilder(2).Tokens({1, 2, 3, 4, 5, 6, 7, 8, 99}).MaxTokens(1)).ok());
  EXPECT_EQ(h.Step().new_sequences[0].num_computed_tokens, 8u);
  EXPECT_EQ(h.EventsOf<StartedEvent>().back().cached_tokens, 8u);
  EXPECT_EQ(h.scheduler.Stats().prefix_cache_hits, 8u);
  EXPECT_EQ(h.scheduler.Stats().prefix_cache_queries, 18u);
}

TEST(SchedulerMemoryTest, TheSamePromptAgainLeavesOneTokenToCompute) {
  SchedulerHarness h(Config(32));
  for (uint64_t id = 1; id <= 2; ++id) {
    ASSERT_TRUE(h.Add(RequestBuilder(id).Tokens({1, 2, 3, 4, 5, 6, 7, 8}).MaxTokens(1)).ok());
    h.RunAll();
  }
  EXPECT_EQ(h.EventsOf<StartedEvent>().back().cached_tokens, 4u);
}

TEST(SchedulerMemoryTest, GeneratedTokensEnterTheCacheToo) {
  SchedulerHarness h(Config(32));
  ASSERT_TRUE(h.Add(RequestBuilder(1).Tokens({1, 2, 3, 4}).MaxTokens(5)).ok());
  h.RunAll();  // 10, 11, 12, 13, 14
  ASSERT_TRUE(h.Add(RequestBuilder(2).Tokens({1, 2, 3, 4, 10, 11, 12, 13, 50}).MaxTokens(1)).ok());
  h.RunAll();
  EXPECT_EQ(h.EventsOf<StartedEvent>().back().cached_tokens, 8u);
}

TEST(SchedulerMemoryTest, AnUnacknowledgedPrefixIsNotShared) {
  SchedulerHarness h(Config(32));
  const std::vector<TokenId> prompt = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  ASSERT_TRUE(h.Add(RequestBuilder(1).Tokens(prompt).MaxTokens(4)).ok());
  h.Plan();
  ASSERT_TRUE(h.Add(RequestBuilder(2).Tokens(prompt).MaxTokens(4)).ok());
  EXPECT_EQ(h.Plan()->new_sequences[0].num_computed_tokens, 0u);
}

TEST(SchedulerMemoryTest, SaltsDoNotShare) {
  SchedulerHarness h(Config(32));
  for (uint64_t id = 1; id <= 2; ++id) {
    ASSERT_TRUE(h.Add(RequestBuilder(id).Tokens({1, 2, 3, 4, 5}).MaxTokens(1).Salt(id)).ok());
    h.RunAll();
  }
  EXPECT_EQ(h.scheduler.Stats().prefix_cache_hits, 0u);
}

TEST(SchedulerMemoryTest, PromptLogprobsComputeEveryPosition) {
  SchedulerHarness h(Config(32));
  const std::vector<TokenId> prompt = {1, 2, 3, 4, 5, 6};
  ASSERT_TRUE(h.Add(RequestBuilder(1).Tokens(prompt).MaxTokens(1)).ok());
  h.RunAll();
  ASSERT_TRUE(h.Add(RequestBuilder(2).Tokens(prompt).MaxTokens(1).PromptLogprobs(0)).ok());
  EXPECT_EQ(h.Step().new_sequences[0].num_computed_tokens, 0u);
}

TEST(SchedulerMemoryTest, CachedBlocksGiveWayToNewOnes) {
  SchedulerHarness h(Config(4));
  ASSERT_TRUE(h.Add(RequestBuilder(1).Prompt(15).MaxTokens(1)).ok());
  h.RunAll();
  EXPECT_EQ(h.scheduler.Stats().blocks_cached, 3u);
  ASSERT_TRUE(h.Add(RequestBuilder(2).Prompt(15).MaxTokens(1)).ok());
  h.RunAll();
  EXPECT_EQ(h.scheduler.Stats().completed, 2u);
  EXPECT_EQ(h.EventsOf<StartedEvent>().back().cached_tokens, 0u);
}

// Cached tokens cost a step nothing, but they travel: a plan is bounded by them too.
TEST(SchedulerMemoryTest, ManyWhoShareALongPrefixDoNotComeInOnePlan) {
  constexpr uint32_t kPrompt = wire::kMaxNewTokens / 5 * 2;
  SchedulerConfig config = SmallSchedulerConfig();
  config.block_size = 1'024;
  config.num_kv_blocks = 8'192;
  config.max_model_len = config.max_batched_tokens = wire::kMaxNewTokens;
  SchedulerHarness h(config);
  ASSERT_TRUE(h.Add(RequestBuilder(1).Prompt(kPrompt).MaxTokens(3).N(4)).ok());
  EXPECT_EQ(h.Step().new_sequences.size(), 1u);
  EXPECT_EQ(h.Step().new_sequences.size(), 2u);
  EXPECT_EQ(h.Step().new_sequences.size(), 1u);
  h.RunAll();
  EXPECT_EQ(h.EventsOf<FinishedEvent>().size(), 4u);
}

TEST(SchedulerMemoryTest, WithoutPrefixCachingSiblingsStillShareAndNothingStays) {
  SchedulerConfig config = Config(32);
  config.enable_prefix_caching = false;
  SchedulerHarness h(config);
  const std::vector<TokenId> prompt = {1, 2, 3, 4, 5, 6};
  ASSERT_TRUE(h.Add(RequestBuilder(1).Tokens(prompt).MaxTokens(4).N(2)).ok());
  ASSERT_TRUE(h.Add(RequestBuilder(2).Tokens(prompt).MaxTokens(4).N(2)).ok());
  h.Step();
  const StepPlan siblings = h.Step();
  ASSERT_EQ(siblings.new_sequences.size(), 2u);
  EXPECT_EQ(siblings.new_sequences[0].num_computed_tokens, 4u);
  EXPECT_NE(siblings.new_sequences[0].block_ids[0], siblings.new_sequences[1].block_ids[0])
      << "two requests share";
  h.RunAll();
  EXPECT_EQ(h.scheduler.Stats().blocks_cached, 0u);
  EXPECT_EQ(h.scheduler.Stats().blocks_free, 32u);
  EXPECT_EQ(h.scheduler.Stats().prefix_cache_queries, 0u);
}

}  // namespace
}  // namespace lockstep
