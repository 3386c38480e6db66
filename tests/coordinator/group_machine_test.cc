// How a group forms and what its members are told.
#include "coordinator/group/group_machine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "tests/coordinator/group_machine_testing.h"

namespace lockstep {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

TEST_F(GroupMachineTest, FormsWhenEnoughWorkersAreThere) {
  Make(2);
  const StreamId a = Attach();
  EXPECT_EQ(Epoch(a), 0u);
  const StreamId b = Attach();
  EXPECT_EQ(Epoch(a), 1u);
  EXPECT_EQ(Rank(a), 0u);
  EXPECT_EQ(Rank(b), 1u);
  EXPECT_EQ(Configured(b).tp_size(), 2u);
  EXPECT_EQ(Configured(b).num_kv_blocks(), 100u);
  EXPECT_EQ(Configured(b).cpu_threads(), 4u);  // 8 processors, two ranks
  EXPECT_EQ(Configured(a).communicator(), Configured(b).communicator());
  SayReady(a);
  EXPECT_TRUE(Formed().empty());
  SayReady(b);
  ASSERT_EQ(Formed().size(), 1u);
  EXPECT_EQ(Formed()[0].epoch, 1u);
  EXPECT_EQ(Formed()[0].ranks[1].pid, 1002u);
  EXPECT_EQ(Formed()[0].ranks[1].memory.weights, 77u);
}

TEST_F(GroupMachineTest, RefusesAnotherProtocolVersionAndBackend) {
  Make(1);
  machine_->OnOpen(1, now_);
  WorkerMessage hello = Hello(1, -1, "");
  hello.mutable_hello()->set_protocol_version(99);
  Say(1, hello);
  EXPECT_THAT(Refusal(1), AllOf(HasSubstr("99"),
                                HasSubstr(absl::StrCat("speaks ", wire::kProtocolVersion, ";"))));
  EXPECT_TRUE(port_.closed.contains(1));
  machine_->OnOpen(2, now_);
  hello = Hello(2, -1, "");
  hello.mutable_hello()->set_backend("cuda");
  Say(2, hello);
  EXPECT_THAT(Refusal(2), HasSubstr("--backend"));
  next_stream_ = 3;
  EXPECT_EQ(Epoch(Attach()), 1u);  // the others were not counted
}

TEST_F(GroupMachineTest, RefusesAWorkerThatDoesNotSayHelloFirst) {
  Make(1);
  machine_->OnOpen(1, now_);
  Beat(1);
  EXPECT_NE(Refusal(1), "");
  // Or not at all.
  machine_->OnOpen(2, now_);
  Pass(options_.timeouts.hello_ms + 500);
  EXPECT_TRUE(port_.aborted.contains(2));
}

TEST_F(GroupMachineTest, SurplusWorkersWaitAsSparesAndStepIn) {
  const auto [a, b] = FormTwo();
  const StreamId spare = Attach();
  EXPECT_EQ(Refusal(spare), "");
  EXPECT_EQ(Epoch(spare), 0u);
  machine_->OnClosed(b, now_);
  ASSERT_EQ(Failed().size(), 1u);
  EXPECT_EQ(Failed()[0].rank, 1);
  EXPECT_TRUE(WasClosed(a, 1));
  EXPECT_EQ(Epoch(spare), 0u);  // not before the survivor has let go
  SayReleased(a);
  EXPECT_EQ(Epoch(spare), 2u);
  EXPECT_EQ(Rank(spare), 1u);
  EXPECT_EQ(Rank(a), 0u);
}

TEST_F(GroupMachineTest, SurvivorKeepsItsRankAndTheWeightsThatGoWithIt) {
  const auto [a, b] = FormTwo();
  machine_->OnClosed(a, now_);
  SayReleased(b);
  const StreamId fresh = Attach();
  EXPECT_EQ(Epoch(b), 2u);
  EXPECT_EQ(Rank(b), 1u);
  EXPECT_EQ(Rank(fresh), 0u);
  EXPECT_NE(Configured(b).communicator(), "nonce/1");
}

TEST_F(GroupMachineTest, WorkersThatReattachGetTheRankTheyHoldWeightsOf) {
  Make(2);
  const StreamId a = Attach(1), b = Attach(0);
  EXPECT_EQ(Rank(a), 1u);
  EXPECT_EQ(Rank(b), 0u);
}

TEST_F(GroupMachineTest, TwoClaimsToOneRankAreSettledByArrival) {
  Make(2);
  const StreamId a = Attach(1), b = Attach(1);
  EXPECT_EQ(Rank(a), 1u);
  EXPECT_EQ(Rank(b), 0u);
}

TEST_F(GroupMachineTest, ASecondStreamOfOneProcessReplacesTheFirst) {
  Make(2);
  const StreamId old_stream = Attach(-1, "same"), again = Attach(-1, "same");
  EXPECT_TRUE(port_.aborted.contains(old_stream));
  EXPECT_EQ(Epoch(again), 0u);  // one process is one worker
  const StreamId other = Attach();
  EXPECT_EQ(Epoch(again), 1u);
  EXPECT_EQ(Epoch(other), 1u);
}

TEST_F(GroupMachineTest, ReleaseOfAnotherEpochDoesNotCount) {
  const auto [a, b] = FormTwo();
  machine_->OnClosed(b, now_);
  Attach();
  WorkerMessage released;
  released.mutable_released()->set_epoch(7);
  Say(a, released);
  EXPECT_EQ(Epoch(a), 1u);
  SayReleased(a);
  EXPECT_EQ(Epoch(a), 2u);
}

TEST_F(GroupMachineTest, OneRankReadyTwiceIsNotTwoRanksReady) {
  Make(2);
  const StreamId a = Attach();
  Attach();
  SayReady(a);
  SayReady(a);
  EXPECT_TRUE(Formed().empty());
}

TEST_F(GroupMachineTest, SizesAreDecidedOnceAndAnImpossibleSizeIsFatal) {
  int asked = 0;
  options_.size = [&](const std::vector<WorkerMemory>& memory) -> absl::StatusOr<GroupSizes> {
    ++asked;
    EXPECT_EQ(memory.size(), 1u);
    if (asked == 1) return GroupSizes{10, 2};
    return absl::ResourceExhaustedError("--max-model-len 9 needs more memory");
  };
  Make(1);
  const StreamId a = Attach();
  machine_->OnClosed(a, now_);
  const StreamId b = Attach();
  EXPECT_EQ(Configured(b).num_kv_blocks(), 10u);
  EXPECT_EQ(asked, 1);

  machine_ = std::make_unique<GroupMachine>(options_, "nonce", &port_);
  Attach();
  ASSERT_FALSE(Failed().empty());
  EXPECT_TRUE(Failed().back().fatal);
  EXPECT_THAT(Reason(), HasSubstr("--max-model-len"));
}

TEST_F(GroupMachineTest, RelaysCommunicatorKeysToTheOtherRanksOfTheEpoch) {
  Make(3);
  const StreamId a = Attach(), b = Attach(), c = Attach(), spare = Attach();
  WorkerMessage key;
  key.mutable_comm_key()->set_epoch(1);
  key.mutable_comm_key()->set_key("rank0");
  key.mutable_comm_key()->set_value("10.0.0.1:5");
  Say(a, key);
  EXPECT_EQ(port_.Count(a, CoordinatorMessage::kCommKey), 0u);
  EXPECT_EQ(port_.Last(b, CoordinatorMessage::kCommKey)->comm_key().value(), "10.0.0.1:5");
  EXPECT_EQ(port_.Count(c, CoordinatorMessage::kCommKey), 1u);
  EXPECT_EQ(port_.Count(spare, CoordinatorMessage::kCommKey), 0u);
  key.mutable_comm_key()->set_epoch(9);
  Say(a, key);
  EXPECT_EQ(port_.Count(b, CoordinatorMessage::kCommKey), 1u);
  key.mutable_comm_key()->set_epoch(1);
  key.mutable_comm_key()->set_value(std::string((64 << 10) + 1, 'x'));
  Say(a, key);
  EXPECT_THAT(Reason(), AllOf(HasSubstr("rank 0"), HasSubstr("65537")));
}

TEST_F(GroupMachineTest, BeatsEveryWorkerFourTimesASecond) {
  const auto [a, b] = FormTwo();
  const StreamId spare = Attach();
  Pass(2'000, {a, b, spare});
  EXPECT_EQ(port_.Count(a, CoordinatorMessage::kHeartbeat), 8u);
  EXPECT_EQ(port_.Count(spare, CoordinatorMessage::kHeartbeat), 8u);
}

TEST_F(GroupMachineTest, WithoutWorkersNothingWakes) {
  Make(2);
  EXPECT_EQ(machine_->NextWakeMs(), GroupMachine::kNever);
  const StreamId a = Attach();
  EXPECT_NE(machine_->NextWakeMs(), GroupMachine::kNever);
  machine_->OnClosed(a, now_);
  Pass(1'000);
  EXPECT_EQ(machine_->NextWakeMs(), GroupMachine::kNever);
}

TEST_F(GroupMachineTest, ShutdownTellsEveryWorkerAndPostsNothing) {
  const auto [a, b] = FormTwo();
  const StreamId spare = Attach();
  const size_t posted = port_.posted.size();
  machine_->Shutdown();
  for (const StreamId stream : {a, b, spare}) {
    EXPECT_EQ(port_.Count(stream, CoordinatorMessage::kShutdown), 1u);
    EXPECT_TRUE(port_.closed.contains(stream));
  }
  machine_->OnClosed(a, now_);
  EXPECT_EQ(port_.posted.size(), posted);
  EXPECT_EQ(machine_->NextWakeMs(), GroupMachine::kNever);
}

}  // namespace
}  // namespace lockstep
