// The group's life without sockets: a recorded world and a hand-driven clock.
#ifndef LOCKSTEP_TESTS_COORDINATOR_GROUP_MACHINE_TESTING_H_
#define LOCKSTEP_TESTS_COORDINATOR_GROUP_MACHINE_TESTING_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/group/group_machine.h"
#include "tests/fakes/fake_port.h"

namespace lockstep {

class GroupMachineTest : public ::testing::Test {
 protected:
  using CoordinatorMessage = worker::v1::CoordinatorMessage;
  using WorkerMessage = worker::v1::WorkerMessage;

  void Make(uint32_t tp_size) {
    options_.tp_size = tp_size;
    if (!options_.size) {
      options_.size = [](const std::vector<WorkerMemory>&) { return GroupSizes{100, 8}; };
    }
    machine_ = std::make_unique<GroupMachine>(options_, "nonce", &port_);
  }

  // A worker attaches; answers its stream.
  StreamId Attach(int preferred_rank = -1, const std::string& instance = "") {
    const StreamId stream = next_stream_++;
    machine_->OnOpen(stream, now_);
    Say(stream, Hello(stream, preferred_rank, instance));
    return stream;
  }
  static WorkerMessage Hello(StreamId stream, int preferred_rank, const std::string& instance) {
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
  void SayLoaded(StreamId stream) {
    WorkerMessage message;
    message.mutable_comm_key()->set_epoch(Epoch(stream));
    message.mutable_comm_key()->set_key(absl::StrCat("model/", Rank(stream)));
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

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_COORDINATOR_GROUP_MACHINE_TESTING_H_
