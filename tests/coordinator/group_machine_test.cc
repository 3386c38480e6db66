// The group's life without sockets: a recorded world and a hand-driven clock.
#include "coordinator/group/group_machine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/fakes/fake_port.h"

namespace lockstep {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using worker::v1::CoordinatorMessage;
using worker::v1::WorkerMessage;

class GroupMachineTest : public ::testing::Test {
 protected:
  void Make(uint32_t tp_size) {
    options_.tp_size = tp_size;
    if (!options_.size) {
      options_.size = [](const std::vector<WorkerMemory>&) { return GroupSizes{100, 8}; };
    }
    machine_ = std::make_unique<GroupMachine>(options_, "nonce", &port_);
  }

  // A worker attaches; answers its stream.
  StreamId Attach(int preferred_rank = -1, std::string instance = "") {
    const StreamId stream = next_stream_++;
    machine_->OnOpen(stream, now_);
    Say(stream, Hello(stream, preferred_rank, std::move(instance)));
    return stream;
  }
  static WorkerMessage Hello(StreamId stream, int preferred_rank, std::string instance) {
    WorkerMessage message;
    auto& hello = *message.mutable_hello();
    hello.set_protocol_version(wire::kProtocolVersion);
    hello.set_backend("cpu");
    hello.set_host("host");
    hello.set_pid(static_cast<uint32_t>(1000 + stream));
    hello.set_instance(instance.empty() ? absl::StrCat("i", stream) : instance);
    hello.set_preferred_rank(preferred_rank);
    hello.set_num_cpu_threads(8);
    return message;
  }
  void Say(StreamId stream, const WorkerMessage& message) {
    machine_->OnMessage(stream, message, now_);
  }
  void SayReady(StreamId stream) {
    WorkerMessage message;
    message.mutable_ready()->set_epoch(Epoch(stream));
    message.mutable_ready()->set_rank(Rank(stream));
    message.mutable_ready()->set_weight_bytes(77);
    Say(stream, message);
  }
  void SayReleased(StreamId stream) {
    WorkerMessage message;
    message.mutable_released()->set_epoch(Epoch(stream));
    Say(stream, message);
  }
  void Beat(StreamId stream) {
    WorkerMessage message;
    message.mutable_heartbeat();
    Say(stream, message);
  }
  void Answer(StreamId stream, uint64_t step, uint64_t digest, uint32_t collectives = 4,
              uint64_t epoch = 0) {
    WorkerMessage message;
    auto& result = *message.mutable_result();
    result.set_epoch(epoch == 0 ? Epoch(stream) : epoch);
    result.set_step(step);
    result.set_digest(digest);
    result.set_num_collectives(collectives);
    Say(stream, message);
  }
  void SayFailure(StreamId stream, absl::StatusCode code, const std::string& text,
                  bool recoverable) {
    WorkerMessage message;
    auto& failure = *message.mutable_failure();
    failure.set_epoch(Epoch(stream));
    failure.set_code(static_cast<uint32_t>(code));
    failure.set_message(text);
    failure.set_recoverable(recoverable);
    Say(stream, message);
  }
  void SendPlan(uint64_t step, uint32_t tokens = 1) {
    StepPlan plan;
    plan.epoch = Formed().back().epoch;
    plan.step = step;
    plan.digest = 1000 + step;
    plan.spans = {{Slot(0), tokens}};
    machine_->SendPlan(plan, now_);
  }
  // Time passes; `alive` beat all the while.
  void Pass(int64_t ms, const std::vector<StreamId>& alive = {}) {
    for (const int64_t end = now_ + ms; now_ < end;) {
      now_ = std::min(end, now_ + 50);
      for (const StreamId stream : alive) Beat(stream);
      if (now_ >= machine_->NextWakeMs()) machine_->OnTick(now_);
      ASSERT_GT(machine_->NextWakeMs(), now_);  // nothing is left overdue: no spinning
    }
  }
  std::pair<StreamId, StreamId> FormTwo() {
    Make(2);
    const StreamId a = Attach(), b = Attach();
    SayReady(a);
    SayReady(b);
    EXPECT_EQ(Formed().size(), 1u);
    return {a, b};
  }

  const worker::v1::Configure& Configured(StreamId stream) {
    const CoordinatorMessage* last = port_.Last(stream, CoordinatorMessage::kConfigure);
    static const worker::v1::Configure none;
    return last == nullptr ? none : last->configure();
  }
  uint64_t Epoch(StreamId stream) { return Configured(stream).epoch(); }
  uint32_t Rank(StreamId stream) { return Configured(stream).rank(); }
  bool WasClosed(StreamId stream, uint64_t epoch) {
    const CoordinatorMessage* last = port_.Last(stream, CoordinatorMessage::kCloseEpoch);
    return last != nullptr && last->close_epoch().epoch() == epoch;
  }
  std::vector<GroupFormed> Formed() { return port_.Posted<GroupFormed>(); }
  std::vector<GroupStep> Steps() { return port_.Posted<GroupStep>(); }
  std::vector<GroupFailed> Failed() { return port_.Posted<GroupFailed>(); }
  std::string Reason() {
    return Failed().empty() ? "" : std::string(Failed().back().reason.message());
  }
  std::string Refusal(StreamId stream) {
    const CoordinatorMessage* last = port_.Last(stream, CoordinatorMessage::kRefusal);
    return last == nullptr ? "" : last->refusal().reason();
  }

  GroupOptions options_;
  FakePort port_;
  std::unique_ptr<GroupMachine> machine_;
  int64_t now_ = 1'000'000;
  StreamId next_stream_ = 1;
};

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
  EXPECT_EQ(Formed()[0].ranks[1].weight_bytes, 77u);
}

TEST_F(GroupMachineTest, RefusesAnotherProtocolVersionAndBackend) {
  Make(1);
  machine_->OnOpen(1, now_);
  WorkerMessage hello = Hello(1, -1, "");
  hello.mutable_hello()->set_protocol_version(99);
  Say(1, hello);
  EXPECT_THAT(Refusal(1), AllOf(HasSubstr("99"), HasSubstr("1")));
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

TEST_F(GroupMachineTest, GarbageEndsTheStreamAndTheEpoch) {
  const auto [a, b] = FormTwo();
  machine_->OnGarbage(b, now_);
  EXPECT_TRUE(port_.aborted.contains(b));
  EXPECT_EQ(Failed().at(0).rank, 1);
  (void)a;
}

}  // namespace
}  // namespace lockstep
