// Planning, delivery and ends. Memory is in scheduler_memory_test.cc, faults in
// scheduler_fault_test.cc.
#include "coordinator/scheduler.h"

#include <set>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/fakes/scheduler_harness.h"

namespace lockstep {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

std::vector<std::pair<uint32_t, uint32_t>> Spans(const StepPlan& plan) {
  std::vector<std::pair<uint32_t, uint32_t>> spans;
  for (const Span& span : plan.spans) spans.push_back({span.slot.value, span.num_tokens});
  return spans;
}

class SchedulerTest : public testing::Test {
 protected:
  SchedulerHarness h_{SmallSchedulerConfig()};
};

TEST_F(SchedulerTest, SendsANewSequenceWholeAndComputesItsPrompt) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).Prompt(6).MaxTokens(2).Seed(77)).ok());
  const StepPlan plan = h_.Step();
  ASSERT_EQ(plan.new_sequences.size(), 1u);
  const NewSequence& s = plan.new_sequences[0];
  EXPECT_EQ(s.tokens, RequestBuilder(1).Prompt(6).Build().prompt);
  EXPECT_EQ(s.num_prompt_tokens, 6u);
  EXPECT_EQ(s.num_computed_tokens, 0u);
  EXPECT_EQ(s.block_ids.size(), 2u);
  EXPECT_EQ(s.sampling.seed, 77);
  EXPECT_THAT(Spans(plan), ElementsAre(std::pair(0u, 6u)));
  EXPECT_EQ(plan.epoch, 1u);
  EXPECT_EQ(plan.step, 1u);
}

TEST_F(SchedulerTest, SendsARunningSequenceByItsChanges) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).Prompt(7).MaxTokens(5)).ok());
  h_.Step();
  const StepPlan within = h_.Step();
  EXPECT_THAT(within.new_sequences, IsEmpty());
  EXPECT_THAT(within.grown_tables, IsEmpty());
  const StepPlan over = h_.Step();
  ASSERT_EQ(over.grown_tables.size(), 1u);
  EXPECT_EQ(over.grown_tables[0].block_ids.size(), 1u);
  EXPECT_THAT(Spans(over), ElementsAre(std::pair(0u, 1u)));
}

TEST_F(SchedulerTest, DeliversTokensAndEndsAtMaxTokens) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).MaxTokens(3)).ok());
  h_.RunAll();
  EXPECT_THAT(h_.Tokens(1), ElementsAre(10, 11, 12));
  const auto finished = h_.EventsOf<FinishedEvent>();
  ASSERT_EQ(finished.size(), 1u);
  EXPECT_EQ(finished[0].reason, FinishReason::kLength);
  EXPECT_EQ(finished[0].completion_tokens, 3u);
  EXPECT_EQ(finished[0].ending_token, std::nullopt);
  EXPECT_FALSE(h_.scheduler.HasRequests());
}

TEST_F(SchedulerTest, AnEndingTokenStopsAndIsPartOfTheAnswer) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).MaxTokens(9).EndsWith({5, 12})).ok());
  h_.RunAll();
  EXPECT_THAT(h_.Tokens(1), ElementsAre(10, 11, 12));
  EXPECT_EQ(h_.EventsOf<FinishedEvent>()[0].reason, FinishReason::kStop);
  EXPECT_EQ(h_.EventsOf<FinishedEvent>()[0].ending_token, 12u);
}

TEST_F(SchedulerTest, WastesNoStepOnASequenceWhoseLastTokenIsInFlight) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).MaxTokens(2)).ok());
  ASSERT_TRUE(h_.Plan().has_value());
  ASSERT_TRUE(h_.Plan().has_value());
  ASSERT_EQ(h_.Answer(), absl::OkStatus());
  EXPECT_EQ(h_.Plan(), std::nullopt);
}

TEST_F(SchedulerTest, SchedulesTheNextTokenBeforeTheLastIsKnown) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).MaxTokens(5)).ok());
  ASSERT_TRUE(h_.Plan().has_value());
  const std::optional<StepPlan> ahead = h_.Plan();
  ASSERT_TRUE(ahead.has_value());
  EXPECT_THAT(Spans(*ahead), ElementsAre(std::pair(0u, 1u)));
  EXPECT_EQ(h_.Plan(), std::nullopt) << "a third plan in flight";
  EXPECT_EQ(h_.scheduler.plans_in_flight(), 2);
}

TEST_F(SchedulerTest, DropsTheWastedTokenOfASequenceThatHadStopped) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).MaxTokens(9).EndsWith({10})).ok());
  h_.Plan();
  h_.Plan();
  ASSERT_EQ(h_.Answer(), absl::OkStatus());
  ASSERT_EQ(h_.Answer(), absl::OkStatus());
  EXPECT_THAT(h_.Tokens(1), ElementsAre(10));
}

TEST_F(SchedulerTest, PrefillsInChunksOfTheBudget) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).Prompt(36).MaxTokens(1)).ok());
  EXPECT_THAT(Spans(h_.Step()), ElementsAre(std::pair(0u, 16u)));
  EXPECT_THAT(Spans(h_.Step()), ElementsAre(std::pair(0u, 16u)));
  EXPECT_THAT(h_.Tokens(1), IsEmpty());
  EXPECT_THAT(Spans(h_.Step()), ElementsAre(std::pair(0u, 4u)));
  EXPECT_THAT(h_.Tokens(1), ElementsAre(10));
}

TEST_F(SchedulerTest, DecodesComeBeforePrefillsAndPrefillsBeforeNewcomers) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).Prompt(4).MaxTokens(9)).ok());
  h_.Step();
  ASSERT_TRUE(h_.Add(RequestBuilder(2).Prompt(25).MaxTokens(9).Priority(-1)).ok());
  EXPECT_THAT(Spans(h_.Step()), ElementsAre(std::pair(0u, 1u), std::pair(1u, 15u)));
  ASSERT_TRUE(h_.Add(RequestBuilder(3).Prompt(9).MaxTokens(9)).ok());
  EXPECT_THAT(Spans(h_.Step()),
              ElementsAre(std::pair(0u, 1u), std::pair(1u, 10u), std::pair(2u, 5u)));
}

TEST_F(SchedulerTest, DecodesGoInSlotOrder) {
  for (uint64_t id = 1; id <= 3; ++id) {
    ASSERT_TRUE(h_.Add(RequestBuilder(id).MaxTokens(9).Priority(-static_cast<int>(id))).ok());
  }
  h_.Step();
  EXPECT_THAT(Spans(h_.Step()),
              ElementsAre(std::pair(0u, 1u), std::pair(1u, 1u), std::pair(2u, 1u)));
}

TEST_F(SchedulerTest, AdmitsByPriorityThenArrival) {
  SchedulerConfig config = SmallSchedulerConfig();
  config.max_num_seqs = 1;
  SchedulerHarness h(config);
  ASSERT_TRUE(h.Add(RequestBuilder(1).MaxTokens(1)).ok());
  ASSERT_TRUE(h.Add(RequestBuilder(2).MaxTokens(1)).ok());
  ASSERT_TRUE(h.Add(RequestBuilder(3).MaxTokens(1).Priority(-5)).ok());
  h.RunAll();
  std::vector<uint64_t> order;
  for (const StartedEvent& e : h.EventsOf<StartedEvent>()) order.push_back(e.request.value);
  EXPECT_THAT(order, ElementsAre(3, 1, 2));
}

TEST_F(SchedulerTest, ASlotIsReusedByThePlanThatReleasesIt) {
  SchedulerConfig config = SmallSchedulerConfig();
  config.max_num_seqs = 1;
  SchedulerHarness h(config);
  ASSERT_TRUE(h.Add(RequestBuilder(1).MaxTokens(1)).ok());
  ASSERT_TRUE(h.Add(RequestBuilder(2).MaxTokens(1)).ok());
  h.Step();
  const StepPlan plan = h.Step();
  EXPECT_THAT(plan.finished_slots, ElementsAre(Slot(0)));
  ASSERT_EQ(plan.new_sequences.size(), 1u);
  EXPECT_EQ(plan.new_sequences[0].slot, Slot(0));
}

TEST_F(SchedulerTest, CancelEndsARequestWithoutAnEvent) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).MaxTokens(9).N(2)).ok());
  h_.Step();
  h_.events.clear();
  EXPECT_TRUE(h_.scheduler.Cancel(RequestId(1)));
  EXPECT_FALSE(h_.scheduler.Cancel(RequestId(1)));
  EXPECT_EQ(h_.Plan(), std::nullopt);
  EXPECT_THAT(h_.events, IsEmpty());
  EXPECT_EQ(h_.scheduler.Stats().cancelled, 1u);
  EXPECT_EQ(h_.scheduler.Stats().blocks_active, 0u);
}

TEST_F(SchedulerTest, StopCompletesOneSequenceAndLeavesItsSiblings) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).MaxTokens(3).N(2)).ok());
  h_.Step();
  EXPECT_TRUE(h_.scheduler.Stop({RequestId(1), 0}));
  EXPECT_FALSE(h_.scheduler.Stop({RequestId(1), 0}));
  EXPECT_FALSE(h_.scheduler.Stop({RequestId(1), 2}));
  h_.RunAll();
  EXPECT_EQ(h_.Tokens(1, 0).size(), 1u);
  EXPECT_EQ(h_.Tokens(1, 1).size(), 3u);
  EXPECT_EQ(h_.EventsOf<FinishedEvent>().size(), 1u);
  EXPECT_EQ(h_.scheduler.Stats().completed, 1u);
}

TEST_F(SchedulerTest, ScoresAPromptWithoutDeliveringAToken) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).Prompt(20).MaxTokens(0).PromptLogprobs(1)).ok());
  h_.RunAll();
  EXPECT_THAT(h_.Tokens(1), IsEmpty());
  const auto finished = h_.EventsOf<FinishedEvent>();
  ASSERT_EQ(finished.size(), 1u);
  EXPECT_EQ(finished[0].reason, FinishReason::kLength);
  EXPECT_EQ(finished[0].completion_tokens, 0u);
  uint32_t next = 1;
  for (const PromptLogprobsEvent& e : h_.EventsOf<PromptLogprobsEvent>()) {
    EXPECT_EQ(e.first_position, next);
    for (const TokenLogprobs& entry : e.entries) EXPECT_EQ(entry.rank, next++);
  }
  EXPECT_EQ(next, 20u);
}

TEST_F(SchedulerTest, SiblingsStartWhenTheFirstPromptIsAcknowledgedAndShareItsBlocks) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).Prompt(10).MaxTokens(4).N(3).Seed(9)).ok());
  const std::optional<StepPlan> first = h_.Plan();
  EXPECT_EQ(first->new_sequences.size(), 1u);
  EXPECT_EQ(h_.Plan()->new_sequences.size(), 0u);
  ASSERT_EQ(h_.Answer(), absl::OkStatus());
  const std::optional<StepPlan> siblings = h_.Plan();
  ASSERT_EQ(siblings->new_sequences.size(), 2u);
  std::set<int64_t> seeds = {first->new_sequences[0].sampling.seed};
  EXPECT_TRUE(seeds.contains(9));
  for (const NewSequence& s : siblings->new_sequences) {
    EXPECT_EQ(s.num_computed_tokens, 8u);
    EXPECT_EQ(s.block_ids[0], first->new_sequences[0].block_ids[0]);
    EXPECT_EQ(s.block_ids[1], first->new_sequences[0].block_ids[1]);
    EXPECT_NE(s.block_ids[2], first->new_sequences[0].block_ids[2]);
    EXPECT_TRUE(seeds.insert(s.sampling.seed).second);
  }
  h_.RunAll();
  EXPECT_EQ(h_.EventsOf<FinishedEvent>().size(), 3u);
  EXPECT_EQ(h_.EventsOf<StartedEvent>().size(), 1u);
}

TEST_F(SchedulerTest, ASiblingLeadsWhenTheFirstIsStoppedBeforeItsPromptIsDone) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).Prompt(40).MaxTokens(2).N(2)).ok());
  h_.Step();
  EXPECT_TRUE(h_.scheduler.Stop({RequestId(1), 0}));
  h_.RunAll();
  EXPECT_EQ(h_.Tokens(1, 1).size(), 2u);
}

TEST_F(SchedulerTest, EndingIdsTravelOnlyWithMinTokens) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).EndsWith({3})).ok());
  ASSERT_TRUE(h_.Add(RequestBuilder(2).EndsWith({3}).MinTokens(2)).ok());
  const StepPlan plan = h_.Step();
  EXPECT_THAT(plan.new_sequences[0].sampling.ending_ids, IsEmpty());
  EXPECT_THAT(plan.new_sequences[1].sampling.ending_ids, ElementsAre(3));
}

TEST_F(SchedulerTest, LogprobsComeWithTheTokenWhereAskedFor) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).MaxTokens(1)).ok());
  ASSERT_TRUE(h_.Add(RequestBuilder(2).MaxTokens(1).Logprobs(0)).ok());
  h_.RunAll();
  for (const TokenEvent& e : h_.EventsOf<TokenEvent>()) {
    EXPECT_EQ(e.logprobs.has_value(), e.sequence.request == RequestId(2));
  }
}

TEST_F(SchedulerTest, CountsEveryRequestOnce) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).MaxTokens(1)).ok());
  ASSERT_TRUE(h_.Add(RequestBuilder(2)).ok());
  ASSERT_FALSE(h_.Add(RequestBuilder(3).Prompt(99)).ok());
  h_.scheduler.Cancel(RequestId(2));
  h_.RunAll();
  const SchedulerStats stats = h_.scheduler.Stats();
  EXPECT_EQ(stats.received, 3u);
  EXPECT_EQ(stats.completed, 1u);
  EXPECT_EQ(stats.cancelled, 1u);
  EXPECT_EQ(stats.rejected, 1u);
  EXPECT_EQ(stats.generated_tokens, 1u);
  EXPECT_EQ(stats.prompt_tokens, 4u);
}

TEST_F(SchedulerTest, RefusesWhatTheQueueCannotHold) {
  for (uint64_t id = 1; id <= 12; ++id) ASSERT_TRUE(h_.Add(RequestBuilder(id)).ok()) << id;
  EXPECT_EQ(h_.Add(RequestBuilder(13)).code(), absl::StatusCode::kResourceExhausted);
}

TEST_F(SchedulerTest, RefusesAPromptTokenOutsideTheVocabulary) {
  const absl::Status status = h_.Add(RequestBuilder(1).Tokens({1, 1'000}));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), testing::HasSubstr("1000"));
}

}  // namespace
}  // namespace lockstep
