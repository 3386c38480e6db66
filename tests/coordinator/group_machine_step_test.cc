// Steps through a whole group: who answered what, how long that may take, who lied.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>

#include "tests/coordinator/group_machine_testing.h"

namespace lockstep {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

TEST_F(GroupMachineTest, StepIsDoneWhenEveryRankHasAnswered) {
  const auto [a, b] = FormTwo();
  SendPlan(1);
  SendPlan(2);
  EXPECT_EQ(port_.Last(a, CoordinatorMessage::kPlan)->SerializeAsString(),
            port_.Last(b, CoordinatorMessage::kPlan)->SerializeAsString());
  Answer(a, 1, 1001);
  Answer(a, 2, 1002);
  EXPECT_TRUE(Steps().empty());
  Answer(b, 1, 1001);
  ASSERT_EQ(Steps().size(), 1u);
  EXPECT_EQ(Steps()[0].result.step, 1u);
  EXPECT_EQ(Steps()[0].timings.size(), 2u);
  Answer(b, 2, 1002);
  EXPECT_EQ(Steps().size(), 2u);
}

TEST_F(GroupMachineTest, AWrongDigestEndsTheEpochNamingTheRank) {
  const auto [a, b] = FormTwo();
  SendPlan(1);
  Answer(a, 1, 1001);
  Answer(b, 1, 5);
  ASSERT_EQ(Failed().size(), 1u);
  EXPECT_EQ(Failed()[0].rank, 1);
  EXPECT_FALSE(Failed()[0].fatal);
  EXPECT_THAT(Reason(), AllOf(HasSubstr("rank 1 (host:1002)"), HasSubstr("digest")));
  EXPECT_EQ(Failed()[0].reason.code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(port_.aborted.contains(b));  // its state is worth nothing
  EXPECT_FALSE(port_.aborted.contains(a));
  EXPECT_TRUE(Steps().empty());
}

TEST_F(GroupMachineTest, AWrongNumberOfCollectivesEndsTheEpoch) {
  const auto [a, b] = FormTwo();
  SendPlan(1);
  Answer(a, 1, 1001, 4);
  Answer(b, 1, 1001, 3);
  EXPECT_THAT(Reason(), AllOf(HasSubstr("rank 1"), HasSubstr("ran 3 collectives"),
                              HasSubstr("rank 0 ran 4")));
}

TEST_F(GroupMachineTest, AnAnswerToAStepThatWasNotSentIsALie) {
  const auto [a, b] = FormTwo();
  SendPlan(1);
  Answer(a, 2, 1002);
  EXPECT_THAT(Reason(), AllOf(HasSubstr("rank 0"), HasSubstr("step 2")));
  (void)b;
}

TEST_F(GroupMachineTest, AnAnswerOutOfOrderIsALie) {
  const auto [a, b] = FormTwo();
  SendPlan(1);
  SendPlan(2);
  Answer(b, 2, 1002);
  EXPECT_THAT(Reason(), AllOf(HasSubstr("rank 1"), HasSubstr("step 1 was due")));
  (void)a;
}

TEST_F(GroupMachineTest, AnswersOfAnEarlierEpochAreDropped) {
  const auto [a, b] = FormTwo();
  machine_->OnClosed(b, now_);
  SayReleased(a);
  const StreamId c = Attach();
  SayReady(a);
  SayReady(c);
  ASSERT_EQ(Formed().size(), 2u);
  SendPlan(1);
  Answer(a, 7, 1, 1, /*epoch=*/1);
  EXPECT_EQ(Failed().size(), 1u);
  Answer(a, 1, 1001);
  Answer(c, 1, 1001);
  EXPECT_EQ(Steps().size(), 1u);
}

TEST_F(GroupMachineTest, PlansOfAnEarlierEpochAreDropped) {
  const auto [a, b] = FormTwo();
  machine_->OnClosed(b, now_);
  SendPlan(1);
  SayReleased(a);
  const StreamId c = Attach();
  SayReady(a);
  SayReady(c);
  ASSERT_EQ(Formed().size(), 2u);
  StepPlan late;
  late.epoch = 1;
  late.step = 1;
  machine_->SendPlan(late, now_);
  EXPECT_EQ(port_.Count(a, CoordinatorMessage::kPlan), 0u);
}

TEST_F(GroupMachineTest, AStepQueuedBehindAnotherIsTimedFromTheOthersEnd) {
  options_.timeouts.step.factor = 1;
  options_.timeouts.step.first_step_ms = 3'000;
  const auto [a, b] = FormTwo();
  SendPlan(1);
  SendPlan(2);
  Pass(2'900, {a, b});
  Answer(a, 1, 1001);
  Answer(b, 1, 1001);
  Pass(2'900, {a, b});
  EXPECT_TRUE(Failed().empty());
  Pass(300, {a, b});
  EXPECT_EQ(Failed().size(), 1u);
}

TEST_F(GroupMachineTest, AStepThatOneRankDoesNotFinishIsFoundThoughItBeats) {
  const auto [a, b] = FormTwo();
  for (uint64_t step = 1; step <= 20; ++step) {  // 10 ms each
    SendPlan(step);
    now_ += 10;
    Answer(a, step, 1000 + step);
    Answer(b, step, 1000 + step);
  }
  SendPlan(21);
  Answer(a, 21, 1021);
  const int64_t sent = now_;
  while (Failed().empty() && now_ < sent + 60'000) Pass(50, {a, b});
  EXPECT_GE(now_ - sent, 3'000);
  EXPECT_LE(now_ - sent, 3'400);
  EXPECT_EQ(Failed().at(0).rank, 1);
  EXPECT_THAT(Reason(), AllOf(HasSubstr("rank 1"), HasSubstr("step 21")));
}

TEST_F(GroupMachineTest, AStepThatNobodyFinishesBlamesNobodyAlone) {
  const auto [a, b] = FormTwo();
  SendPlan(1, 16);
  Pass(10'000, {a, b});
  ASSERT_EQ(Failed().size(), 1u);
  EXPECT_EQ(Failed()[0].rank, -1);
  EXPECT_THAT(Reason(), HasSubstr("ranks 0, 1"));
}

TEST_F(GroupMachineTest, PatienceGrowsWithMeasuredStepTimes) {
  const auto [a, b] = FormTwo();
  SendPlan(1);
  Pass(900, {a, b});
  Answer(a, 1, 1001);
  Answer(b, 1, 1001);
  SendPlan(2);
  Pass(15'000, {a, b});
  EXPECT_TRUE(Failed().empty());
  Pass(5'000, {a, b});
  EXPECT_EQ(Failed().size(), 1u);
}

TEST_F(GroupMachineTest, ItsOwnPauseIsNoMeasureOfAStep) {
  const auto [a, b] = FormTwo();
  SendPlan(1);
  Pass(250, {a, b});
  now_ += 5'000;
  machine_->OnTick(now_);
  Answer(a, 1, 1001);
  Answer(b, 1, 1001);
  SendPlan(2);
  Pass(20 * 600, {a, b});  // 20 times what the step took without the pause
  EXPECT_EQ(Failed().size(), 1u);
}

TEST_F(GroupMachineTest, EngineFoundALieOfRankZero) {
  const auto [a, b] = FormTwo();
  machine_->FailEpoch(1, absl::InternalError("token 70000 of 1000"), now_);
  ASSERT_EQ(Failed().size(), 1u);
  EXPECT_EQ(Failed()[0].rank, 0);
  EXPECT_THAT(Reason(), HasSubstr("token 70000"));
  machine_->FailEpoch(1, absl::InternalError("again"), now_);
  EXPECT_EQ(Failed().size(), 1u);
  (void)a, (void)b;
}

}  // namespace
}  // namespace lockstep
