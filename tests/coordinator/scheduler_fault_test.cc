// Deaths of the group, lies, NaN, deadlines.
#include <functional>
#include <string>
#include <vector>

#include "coordinator/scheduler.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/fakes/scheduler_harness.h"

namespace lockstep {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

class SchedulerFaultTest : public testing::Test {
 protected:
  SchedulerHarness h_{SmallSchedulerConfig()};
};

TEST_F(SchedulerFaultTest, AReplayGoesOnWhereTheStreamWas) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).Prompt(6).MaxTokens(6)).ok());
  h_.Step();
  h_.Step();
  h_.Plan();  // a token in flight is lost with the group
  h_.Die();
  EXPECT_EQ(h_.Plan(), std::nullopt);
  h_.BeginEpoch(2);
  const StepPlan plan = h_.Step();
  EXPECT_EQ(plan.epoch, 2u);
  EXPECT_EQ(plan.step, 1u);
  EXPECT_THAT(plan.finished_slots, IsEmpty());
  const NewSequence& s = plan.new_sequences.at(0);
  EXPECT_EQ(s.tokens.size(), 8u);
  EXPECT_EQ(s.num_prompt_tokens, 6u);
  EXPECT_EQ(s.num_computed_tokens, 0u);
  h_.RunAll();
  EXPECT_THAT(h_.Tokens(1), ElementsAre(10, 11, 12, 13, 14, 15));
  EXPECT_EQ(h_.EventsOf<StartedEvent>().size(), 1u);
}

TEST_F(SchedulerFaultTest, WhatRanGoesBeforeAllNewcomers) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).MaxTokens(9).Priority(5)).ok());
  h_.Step();
  h_.Die();
  ASSERT_TRUE(h_.Add(RequestBuilder(2).Priority(-5)).ok());
  h_.BeginEpoch(2);
  EXPECT_EQ(h_.Step().new_sequences.at(0).sampling.seed, 1'000);
}

TEST_F(SchedulerFaultTest, ANewEpochHasNoCachedPrefix) {
  const std::vector<TokenId> prompt = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  ASSERT_TRUE(h_.Add(RequestBuilder(1).Tokens(prompt).MaxTokens(1)).ok());
  h_.RunAll();
  h_.Die();
  EXPECT_EQ(h_.scheduler.Stats().blocks_free, 64u);
  h_.BeginEpoch(2);
  ASSERT_TRUE(h_.Add(RequestBuilder(2).Tokens(prompt).MaxTokens(1)).ok());
  EXPECT_EQ(h_.Step().new_sequences.at(0).num_computed_tokens, 0u);
}

TEST_F(SchedulerFaultTest, TheSecondDeathQuarantinesWhoRanAtBoth) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).MaxTokens(9)).ok());
  h_.Step();
  h_.Die();
  EXPECT_THAT(h_.EventsOf<FailedEvent>(), IsEmpty());
  h_.BeginEpoch(2);
  ASSERT_TRUE(h_.Add(RequestBuilder(2).MaxTokens(9)).ok());
  h_.Step();
  ASSERT_TRUE(h_.Add(RequestBuilder(3).MaxTokens(9)).ok());
  h_.Die();
  const auto failed = h_.EventsOf<FailedEvent>();
  ASSERT_EQ(failed.size(), 1u);
  EXPECT_EQ(failed[0].request, RequestId(1));
  EXPECT_EQ(failed[0].status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(failed[0].status.message()), HasSubstr("rank 1 died"));
  h_.BeginEpoch(3);
  h_.RunAll();
  EXPECT_EQ(h_.scheduler.Stats().completed, 2u);
}

// Four run when the group dies, one of them the culprit: each is replayed with
// nobody else in a step, and only the culprit's trial ends badly.
TEST_F(SchedulerFaultTest, ASuspectIsReplayedAloneAndFailsAlone) {
  for (uint64_t id = 1; id <= 4; ++id) ASSERT_TRUE(h_.Add(RequestBuilder(id).MaxTokens(9)).ok());
  h_.Step();
  h_.Plan();
  h_.Die();
  h_.BeginEpoch(2);
  for (uint64_t id = 1; id <= 2; ++id) {  // cleared
    EXPECT_EQ(h_.Step().new_sequences.at(0).sampling.seed, static_cast<int64_t>(1'000 * id));
  }
  const std::optional<StepPlan> trial = h_.Plan();
  ASSERT_TRUE(trial.has_value());
  EXPECT_EQ(trial->spans.size(), 1u);
  EXPECT_EQ(trial->new_sequences.at(0).sampling.seed, 3'000);
  EXPECT_EQ(h_.Plan(), std::nullopt) << "somebody else in a step during the trial";
  h_.Die();
  const auto failed = h_.EventsOf<FailedEvent>();
  ASSERT_EQ(failed.size(), 1u);
  EXPECT_EQ(failed[0].request, RequestId(3));
  EXPECT_EQ(failed[0].status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(failed[0].status.message()), HasSubstr("rank 1 died"));
  // What is explained counts against nobody else.
  h_.BeginEpoch(3);
  h_.Step();
  h_.Step();
  h_.Plan();
  h_.Die();
  h_.BeginEpoch(4);
  h_.RunAll();
  EXPECT_EQ(h_.scheduler.Stats().completed, 3u);
}

TEST_F(SchedulerFaultTest, AClearedRequestThatMeetsAnotherDeathFails) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).MaxTokens(9)).ok());
  h_.Step();
  h_.Die();
  h_.BeginEpoch(2);
  for (int i = 0; i < 4; ++i) h_.Step();
  h_.Die();
  EXPECT_EQ(h_.EventsOf<FailedEvent>().size(), 1u);
}

TEST_F(SchedulerFaultTest, ACancelledSuspectLeavesNobodyToBlame) {
  for (uint64_t id = 1; id <= 2; ++id) ASSERT_TRUE(h_.Add(RequestBuilder(id).MaxTokens(9)).ok());
  h_.Step();
  h_.Die();
  h_.BeginEpoch(2);
  h_.Plan();
  EXPECT_TRUE(h_.scheduler.Cancel(RequestId(1)));
  EXPECT_EQ(h_.Plan(), std::nullopt) << "its step may still kill";
  h_.Die();
  EXPECT_THAT(h_.EventsOf<FailedEvent>(), IsEmpty());
  h_.BeginEpoch(3);
  h_.RunAll();
  EXPECT_EQ(h_.Tokens(2).size(), 9u);
}

TEST_F(SchedulerFaultTest, ARequestThatOnlyWaitedIsNotToBlame) {
  for (uint64_t epoch = 2; epoch < 5; ++epoch) {
    ASSERT_TRUE(h_.Add(RequestBuilder(epoch).MaxTokens(2)).ok());
    h_.Die();
    h_.BeginEpoch(epoch);
  }
  EXPECT_THAT(h_.EventsOf<FailedEvent>(), IsEmpty());
}

TEST_F(SchedulerFaultTest, PromptLogprobsAreDeliveredOnceAcrossAReplay) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).Prompt(40).MaxTokens(3).PromptLogprobs(0)).ok());
  h_.Step();
  h_.Step();
  h_.Plan();
  h_.Die();
  h_.BeginEpoch(2);
  h_.RunAll();
  uint32_t next = 1;
  for (const PromptLogprobsEvent& e : h_.EventsOf<PromptLogprobsEvent>()) {
    EXPECT_EQ(e.first_position, next);
    next += static_cast<uint32_t>(e.entries.size());
  }
  EXPECT_EQ(next, 40u);
}

TEST_F(SchedulerFaultTest, DeliveredPromptLogprobsAreNotAskedForAgain) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).Prompt(8).MaxTokens(3).PromptLogprobs(0)).ok());
  h_.Step();
  h_.Die();
  h_.BeginEpoch(2);
  EXPECT_EQ(h_.Step().new_sequences.at(0).sampling.prompt_logprobs, -1);
}

TEST_F(SchedulerFaultTest, SiblingsShareAgainAfterAReplay) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).Prompt(9).MaxTokens(8).N(3)).ok());
  h_.Step();
  h_.Step();
  h_.Die();
  h_.BeginEpoch(2);
  EXPECT_EQ(h_.Step().new_sequences.size(), 1u);
  for (int sibling = 1; sibling < 3; ++sibling) {  // each on trial alone
    const StepPlan plan = h_.Step();
    ASSERT_EQ(plan.new_sequences.size(), 1u);
    EXPECT_EQ(plan.new_sequences[0].num_computed_tokens, 8u);
  }
  h_.RunAll();
  for (uint32_t i = 0; i < 3; ++i) EXPECT_EQ(h_.Tokens(1, i).size(), 8u);
}

TEST_F(SchedulerFaultTest, NanLogitsFailTheirRequestAlone) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).MaxTokens(3).N(2)).ok());
  ASSERT_TRUE(h_.Add(RequestBuilder(2).MaxTokens(3)).ok());
  h_.Plan();
  h_.NextResult().sampled[0].poisoned = true;
  ASSERT_EQ(h_.Answer(), absl::OkStatus());
  h_.RunAll();
  const auto failed = h_.EventsOf<FailedEvent>();
  ASSERT_EQ(failed.size(), 1u);
  EXPECT_EQ(failed[0].status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(failed[0].status.message()), HasSubstr("r1"));
  EXPECT_THAT(h_.Tokens(1), IsEmpty());
  EXPECT_EQ(h_.Tokens(2).size(), 3u);
}

TEST_F(SchedulerFaultTest, FailsARequestAtItsDeadline) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).MaxTokens(9).Deadline(100)).ok());
  ASSERT_TRUE(h_.Add(RequestBuilder(2).MaxTokens(9).Deadline(200)).ok());
  EXPECT_EQ(h_.scheduler.NextDeadlineMs(), 100);
  h_.now_ms = 99;
  h_.Plan();
  h_.now_ms = 100;
  const std::optional<StepPlan> plan = h_.Plan();
  ASSERT_TRUE(plan.has_value());
  EXPECT_EQ(plan->spans.size(), 1u);
  ASSERT_EQ(h_.EventsOf<FailedEvent>().size(), 1u);
  EXPECT_EQ(h_.EventsOf<FailedEvent>()[0].status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(h_.scheduler.NextDeadlineMs(), 200);
}

TEST_F(SchedulerFaultTest, DeadlinesPassWithoutAGroupAndBehindTwoPlans) {
  ASSERT_TRUE(h_.Add(RequestBuilder(1).MaxTokens(9).Deadline(100)).ok());
  h_.Plan();
  h_.Plan();
  h_.now_ms = 100;
  EXPECT_EQ(h_.Plan(), std::nullopt);
  EXPECT_EQ(h_.EventsOf<FailedEvent>().size(), 1u);
  h_.Die();
  ASSERT_TRUE(h_.Add(RequestBuilder(2).Deadline(150)).ok());
  h_.now_ms = 150;
  EXPECT_EQ(h_.Plan(), std::nullopt);
  EXPECT_EQ(h_.EventsOf<FailedEvent>().size(), 2u);
  EXPECT_FALSE(h_.scheduler.HasRequests());
}

TEST_F(SchedulerFaultTest, FailAllEndsEverythingAndGivesTheBlocksBack) {
  for (uint64_t id = 1; id <= 6; ++id) {
    ASSERT_TRUE(h_.Add(RequestBuilder(id).MaxTokens(9).N(2)).ok());
  }
  h_.Step();
  h_.Plan();
  h_.scheduler.FailAll(absl::UnavailableError("shutting down"), &h_.events);
  h_.Check();
  EXPECT_EQ(h_.EventsOf<FailedEvent>().size(), 6u);
  EXPECT_FALSE(h_.scheduler.HasRequests());
  ASSERT_EQ(h_.Answer(), absl::OkStatus());
  EXPECT_EQ(h_.scheduler.Stats().blocks_active + h_.scheduler.Stats().blocks_pending, 0u);
}

struct Lie {
  const char* name;
  std::function<void(StepResult*)> tell;
  const char* complaint;
};

class LieTest : public testing::TestWithParam<Lie> {};

TEST_P(LieTest, IsNotBelievedAndChangesNothing) {
  SchedulerHarness h(SmallSchedulerConfig());
  ASSERT_TRUE(h.Add(RequestBuilder(1).MaxTokens(3).PromptLogprobs(0)).ok());
  h.Plan();
  const StepResult honest = h.NextResult();
  GetParam().tell(&h.NextResult());
  const size_t events = h.events.size();
  const absl::Status status = h.scheduler.Apply(h.NextResult(), &h.events);
  EXPECT_FALSE(status.ok());
  EXPECT_THAT(std::string(status.message()), HasSubstr(GetParam().complaint));
  EXPECT_EQ(h.events.size(), events);
  h.Check();
  h.NextResult() = honest;
  EXPECT_EQ(h.Answer(), absl::OkStatus());
}

INSTANTIATE_TEST_SUITE_P(
    Results, LieTest,
    testing::Values(
        Lie{"WrongStep", [](StepResult* r) { ++r->step; }, "expected step 1"},
        Lie{"StaleEpoch", [](StepResult* r) { r->epoch = 0; }, "expected 1"},
        Lie{"WrongDigest", [](StepResult* r) { r->digest ^= 1; }, "digest"},
        Lie{"NoToken", [](StepResult* r) { r->sampled.clear(); }, "no token for slot 0"},
        Lie{"TwoTokens", [](StepResult* r) { r->sampled.push_back(r->sampled[0]); }, "more tokens"},
        Lie{"AnotherSlot", [](StepResult* r) { r->sampled[0].slot = Slot(3); }, "slot 3"},
        Lie{"TokenBeyondTheVocabulary", [](StepResult* r) { r->sampled[0].token = 1'000; },
            "token 1000"},
        Lie{"NoPromptLogprobs", [](StepResult* r) { r->prompt_logprobs.clear(); },
            "no prompt_logprobs"},
        Lie{"ShortPromptLogprobs", [](StepResult* r) { r->prompt_logprobs[0].entries.pop_back(); },
            "prompt_logprobs of slot 0"},
        Lie{"ShiftedPromptLogprobs", [](StepResult* r) { ++r->prompt_logprobs[0].first_position; },
            "prompt_logprobs of slot 0"}),
    [](const auto& param_info) { return param_info.param.name; });

TEST_F(SchedulerFaultTest, AResultWithoutAPlanIsALie) {
  StepResult result;
  result.epoch = 1;
  result.step = 1;
  EXPECT_FALSE(h_.scheduler.Apply(result, &h_.events).ok());
}

}  // namespace
}  // namespace lockstep
