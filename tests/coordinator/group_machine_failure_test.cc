// Deaths, silence and loads that fail: what is reported, who is named, what is repaired.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "tests/coordinator/group_machine_testing.h"

namespace lockstep {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

TEST_F(GroupMachineTest, APauseOfHalfASecondKillsNobody) {
  const auto [a, b] = FormTwo();
  for (int i = 0; i < 100; ++i) {
    Pass(500, {a});  // b is stopped
    Beat(b);
    Pass(300, {a, b});
  }
  EXPECT_TRUE(Failed().empty());
}

TEST_F(GroupMachineTest, ASilentWorkerIsFoundWithinThreeSeconds) {
  const auto [a, b] = FormTwo();
  Pass(1'000, {a, b});
  const int64_t stopped = now_;
  while (Failed().empty() && now_ < stopped + 10'000) Pass(50, {a});
  EXPECT_LE(now_ - stopped, 3'000);
  EXPECT_EQ(Failed().at(0).rank, 1);
  EXPECT_THAT(Reason(), HasSubstr("no sign of life"));
  EXPECT_TRUE(port_.aborted.contains(b));
}

TEST_F(GroupMachineTest, ALostStreamIsKnownAtOnce) {
  const auto [a, b] = FormTwo();
  machine_->OnClosed(a, now_);
  ASSERT_EQ(Failed().size(), 1u);
  EXPECT_THAT(Reason(), AllOf(HasSubstr("rank 0 (host:1001)"), HasSubstr("connection lost")));
  (void)b;
}

TEST_F(GroupMachineTest, NamesTheDeadRankNotTheOneThatNoticed) {
  const auto [a, b] = FormTwo();
  SendPlan(1);
  SayFailure(a, absl::StatusCode::kUnavailable, "all-reduce: connection closed by peer", true);
  EXPECT_TRUE(Failed().empty());
  now_ += 20;
  machine_->OnClosed(b, now_);
  ASSERT_EQ(Failed().size(), 1u);
  EXPECT_EQ(Failed()[0].rank, 1);
  EXPECT_THAT(Reason(),
              AllOf(HasSubstr("rank 1 (host:1002): connection lost"), HasSubstr("all-reduce")));
}

TEST_F(GroupMachineTest, NamesTheSilentRankWhenACollectiveFails) {
  const auto [a, b] = FormTwo();
  SendPlan(1);
  Pass(1'000, {a});
  SayFailure(a, absl::StatusCode::kDeadlineExceeded, "all-reduce timed out", true);
  Pass(200, {a});
  ASSERT_EQ(Failed().size(), 1u);
  EXPECT_EQ(Failed()[0].rank, 1);
  (void)b;
}

TEST_F(GroupMachineTest, WhatAWorkerSaysIsOneBoundedLineOfTheReason) {
  const auto [a, b] = FormTwo();
  SayFailure(a, absl::StatusCode::kInternal, "gone\nERROR forged " + std::string(100'000, 'x'),
             true);
  ASSERT_EQ(Failed().size(), 1u);
  EXPECT_THAT(Reason(), AllOf(HasSubstr("gone\\x0aERROR forged xx"), HasSubstr("x...")));
  EXPECT_LT(Reason().size(), 4096u);
  (void)b;
}

TEST_F(GroupMachineTest, AFailedCollectiveWithoutACauseIsItsOwnCause) {
  const auto [a, b] = FormTwo();
  SendPlan(1);
  SayFailure(b, absl::StatusCode::kAborted, "all-reduce: bad frame", true);
  Pass(150, {a, b});
  ASSERT_EQ(Failed().size(), 1u);
  EXPECT_EQ(Failed()[0].rank, 1);
  EXPECT_THAT(Reason(), HasSubstr("bad frame"));
}

TEST_F(GroupMachineTest, ABadCheckpointIsFatal) {
  Make(2);
  const StreamId a = Attach(), b = Attach();
  SayReady(a);
  SayFailure(b, absl::StatusCode::kDataLoss, "model-00002.safetensors: truncated", false);
  ASSERT_EQ(Failed().size(), 1u);
  EXPECT_TRUE(Failed()[0].fatal);
  EXPECT_THAT(Reason(), AllOf(HasSubstr("rank 1"), HasSubstr("model-00002.safetensors")));
  const StreamId late = Attach();
  EXPECT_THAT(Refusal(late), HasSubstr("truncated"));
  Pass(5'000, {a, b});
  EXPECT_TRUE(Formed().empty());
}

// A mount that is gone for a moment, a spare whose memory is taken: streams wait meanwhile.
TEST_F(GroupMachineTest, OnceWholeAGroupOutlivesAWorkerThatCannotLoad) {
  const auto [a, b] = FormTwo();
  machine_->OnClosed(b, now_);
  SayReleased(a);
  const StreamId broken = Attach();
  SayFailure(broken, absl::StatusCode::kNotFound, "no such folder", false);
  EXPECT_FALSE(Failed().back().fatal);
  EXPECT_THAT(Reason(), AllOf(HasSubstr("rank 1"), HasSubstr("no such folder")));
  EXPECT_TRUE(port_.aborted.contains(broken));
  machine_->OnClosed(broken, now_);
  SayReleased(a);
  const StreamId well = Attach();
  Pass(4'000, {a, well});
  SayReady(a);
  SayReady(well);
  EXPECT_EQ(Formed().size(), 2u);
}

TEST_F(GroupMachineTest, WhatCannotBeLoadedUntilStreamsAreGivenUpIsFatal) {
  const auto [a, b] = FormTwo();
  machine_->OnClosed(b, now_);
  SayReleased(a);
  while (!Failed().back().fatal && now_ < 1'000'000 + 10 * options_.timeouts.reload_ms) {
    const StreamId broken = Attach();
    Pass(4'000, {a, broken});
    EXPECT_FALSE(Failed().back().fatal);
    EXPECT_EQ(Rank(broken), 1u);
    SayFailure(broken, absl::StatusCode::kNotFound, "no such folder", false);
    machine_->OnClosed(broken, now_);
    SayReleased(a);
  }
  EXPECT_TRUE(Failed().back().fatal);
  EXPECT_GE(now_ - 1'000'000, options_.timeouts.reload_ms);
}

TEST_F(GroupMachineTest, ASecondHelloEndsTheStreamAndTheEpoch) {
  const auto [a, b] = FormTwo();
  Say(b, Hello(b, -1, "another"));
  ASSERT_EQ(Failed().size(), 1u);
  EXPECT_EQ(Failed()[0].rank, 1);
  EXPECT_TRUE(port_.aborted.contains(b));
  machine_->OnClosed(b, now_);
  EXPECT_TRUE(machine_->Members().empty());
  SayReleased(a);
  const StreamId c = Attach();
  SayReady(a);
  SayReady(c);
  EXPECT_EQ(Formed().size(), 2u);
}

TEST_F(GroupMachineTest, WhoHangsInALoadGivesItsPlaceToASpare) {
  Make(2);
  const StreamId hung = Attach(), a = Attach(), spare = Attach();
  SayLoaded(a);  // and not ready, before the other is
  Pass(options_.timeouts.load_stall_ms + 1'000, {a, hung, spare});
  ASSERT_EQ(Failed().size(), 1u);
  EXPECT_EQ(Failed()[0].rank, 0);
  SayReleased(a);
  SayReleased(hung);
  Pass(4'000, {a, hung, spare});
  EXPECT_EQ(Epoch(spare), 2u);
  EXPECT_EQ(Epoch(a), 2u);
  EXPECT_EQ(Rank(a), 1u);
  EXPECT_EQ(Epoch(hung), 1u);
}

TEST_F(GroupMachineTest, ALiarComesAfterASpareThoughItHasTheWeights) {
  const auto [a, b] = FormTwo();
  const StreamId spare = Attach();
  machine_->OnGarbage(b, now_);
  machine_->OnClosed(b, now_);
  const StreamId again = Attach(1, "i" + std::to_string(b));
  SayReleased(a);
  EXPECT_EQ(Epoch(a), 2u);
  EXPECT_EQ(Epoch(spare), 2u);
  EXPECT_EQ(Epoch(again), 0u);
  // It is better than nobody, and then keeps its rank.
  machine_->OnClosed(a, now_);
  machine_->OnClosed(spare, now_);
  const StreamId other = Attach();
  Pass(4'000, {again, other});
  EXPECT_EQ(Rank(again), 1u);
  EXPECT_EQ(Epoch(again), Epoch(other));
}

TEST_F(GroupMachineTest, WhoWasSilentForAMomentKeepsItsRankBeforeASpare) {
  const auto [a, b] = FormTwo();
  const StreamId spare = Attach();
  Pass(3'000, {a, spare});
  ASSERT_EQ(Failed().size(), 1u);
  machine_->OnClosed(b, now_);
  const StreamId again = Attach(1, "i" + std::to_string(b));
  SayReleased(a);
  EXPECT_EQ(Rank(again), 1u);
  EXPECT_EQ(Epoch(again), 2u);
  EXPECT_EQ(Epoch(spare), 0u);
}

TEST_F(GroupMachineTest, WhoWasSlowInAStepAndLetsGoKeepsItsRankBeforeASpare) {
  const auto [a, b] = FormTwo();
  const StreamId spare = Attach();
  SendPlan(1);
  Answer(a, 1, 1001);
  for (int i = 0; i < 1'000 && Failed().empty(); ++i) Pass(50, {a, b, spare});
  ASSERT_EQ(Failed().size(), 1u);
  EXPECT_EQ(Failed()[0].rank, static_cast<int>(Rank(b)));
  SayReleased(a);
  SayReleased(b);
  EXPECT_EQ(Epoch(b), 2u);
  EXPECT_EQ(Epoch(spare), 0u);
}

TEST_F(GroupMachineTest, DeathWhileLoadingIsReportedAndRepaired) {
  Make(2);
  const StreamId a = Attach(), b = Attach();
  machine_->OnClosed(b, now_);
  ASSERT_EQ(Failed().size(), 1u);
  EXPECT_FALSE(Failed()[0].fatal);
  EXPECT_EQ(Failed()[0].rank, 1);
  SayReleased(a);
  const StreamId c = Attach();
  SayReady(a);
  SayReady(c);
  EXPECT_EQ(Formed().size(), 1u);
  EXPECT_EQ(Formed()[0].epoch, 2u);
}

TEST_F(GroupMachineTest, ALoadThatDoesNotMoveFails) {
  Make(2);
  const StreamId a = Attach(), b = Attach();
  SayReady(a);
  for (uint64_t bytes = 1; bytes <= 4; ++bytes) {
    WorkerMessage progress;
    progress.mutable_progress()->set_epoch(1);
    progress.mutable_progress()->set_bytes_done(bytes);
    Say(b, progress);
    Pass(options_.timeouts.load_stall_ms - 5'000, {a, b});
  }
  EXPECT_TRUE(Failed().empty());
  Pass(10'000, {a, b});
  ASSERT_EQ(Failed().size(), 1u);
  EXPECT_EQ(Failed()[0].rank, 1);
  EXPECT_THAT(Reason(), HasSubstr("no progress"));
}

TEST_F(GroupMachineTest, ASurvivorThatDoesNotLetGoIsDropped) {
  const auto [a, b] = FormTwo();
  machine_->OnClosed(b, now_);
  const StreamId c = Attach(), d = Attach();
  Pass(wire::kReleaseTimeoutMs, {a, c, d});
  EXPECT_FALSE(port_.aborted.contains(a));
  Pass(1'000, {a, c, d});
  EXPECT_TRUE(port_.aborted.contains(a));
  EXPECT_EQ(Epoch(c), 2u);
  EXPECT_EQ(Epoch(d), 2u);
}

TEST_F(GroupMachineTest, FailuresToLoadAreSpacedOut) {
  Make(1);
  std::vector<int64_t> waited;
  for (int i = 0; i < 6; ++i) {
    const StreamId a = Attach();
    const int64_t start = now_;
    while (Epoch(a) == 0 && now_ < start + 20'000) Pass(50, {a});
    waited.push_back(now_ - start);
    machine_->OnClosed(a, now_);
  }
  EXPECT_EQ(waited[0], 0);
  EXPECT_EQ(waited[1], 0);  // the first failure is answered at once
  EXPECT_GT(waited[5], waited[2]);
  EXPECT_LE(waited[5], 3'500);
}

TEST_F(GroupMachineTest, AGroupThatWasWholeIsFormedAgainAtOnce) {
  Make(1);
  for (int i = 0; i < 6; ++i) {
    const StreamId a = Attach();
    EXPECT_NE(Epoch(a), 0u);
    SayReady(a);
    machine_->OnClosed(a, now_);
  }
}

TEST_F(GroupMachineTest, ItsOwnPauseIsNotHeldAgainstTheWorkers) {
  const auto [a, b] = FormTwo();
  SendPlan(1);
  Pass(500, {a, b});
  now_ += 5'000;  // this process was stopped
  machine_->OnTick(now_);
  EXPECT_TRUE(Failed().empty());
  Answer(a, 1, 1001);
  Answer(b, 1, 1001);
  EXPECT_EQ(Steps().size(), 1u);
  Pass(2'500, {a});
  EXPECT_EQ(Failed().size(), 1u);  // but real silence still counts
}

TEST_F(GroupMachineTest, GarbageEndsTheStreamAndTheEpoch) {
  const auto [a, b] = FormTwo();
  machine_->OnGarbage(b, now_);
  EXPECT_TRUE(port_.aborted.contains(b));
  EXPECT_EQ(Failed().at(0).rank, 1);
  (void)a;
}

}  // namespace
}  // namespace lockstep
