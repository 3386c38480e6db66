// What a coordinator gets of its workers: a series of events, each two bytes (what
// and which stream) and, for a message, a record. They drive the whole machine
// that forms, judges and ends a group, plans being sent whenever it serves; parts
// of profiles go on into a trace. Nothing a worker says may stop the machine, make
// it spin, or have it call anything done that was not.
#include <google/protobuf/stubs/logging.h>

#include <cstdint>
#include <memory>
#include <string>
#include <variant>

#include "common/check.h"
#include "coordinator/group/group_machine.h"
#include "coordinator/group/profile_trace.h"
#include "nlohmann/json.hpp"
#include "proto/worker.pb.h"
#include "tests/fuzz/fuzz_input.h"

namespace lockstep::fuzz {
namespace {

using worker::v1::WorkerMessage;

constexpr uint32_t kRanks = 2;
constexpr uint64_t kProfile = 1;

// Gives the machine what it posts and the profile what it passes on.
class Port final : public GroupPort {
 public:
  void Send(absl::Span<const StreamId>, const worker::v1::CoordinatorMessage& message) override {
    LOCKSTEP_CHECK(message.message_case() != worker::v1::CoordinatorMessage::MESSAGE_NOT_SET);
  }
  void Close(StreamId) override {}
  void Abort(StreamId) override {}
  void Post(GroupEvent event) override {
    if (const auto* formed = std::get_if<GroupFormed>(&event)) {
      LOCKSTEP_CHECK(serving == 0 && formed->epoch > last_epoch);
      LOCKSTEP_CHECK(formed->ranks.size() == kRanks);
      serving = last_epoch = formed->epoch;
      steps_done = 0;
    } else if (const auto* step = std::get_if<GroupStep>(&event)) {
      LOCKSTEP_CHECK(serving != 0 && step->result.epoch == serving);
      LOCKSTEP_CHECK(step->result.step == ++steps_done && steps_done <= steps_sent);
      LOCKSTEP_CHECK(step->timings.size() == kRanks);
    } else if (const auto* failed = std::get_if<GroupFailed>(&event)) {
      LOCKSTEP_CHECK(!failed->reason.ok() && failed->rank < static_cast<int>(kRanks));
      const std::string message(failed->reason.message());
      LOCKSTEP_CHECK(message.find('\n') == std::string::npos);
      serving = steps_sent = 0;
    }
  }
  void OnProfilePart(uint32_t rank, const worker::v1::ProfilePart& part) override {
    LOCKSTEP_CHECK(rank < kRanks);
    if (trace.complete()) return;
    if (const absl::Status status = trace.Add(rank, part); !status.ok()) RequireRefusal(status);
    if (trace.complete()) LOCKSTEP_CHECK(nlohmann::json::accept(trace.Json()));
  }

  uint64_t serving = 0, last_epoch = 0, steps_sent = 0, steps_done = 0;
  ProfileTrace trace{kProfile, 4, {{.name = "rank 0"}, {.name = "rank 1"}}};
};

class Coordinator {
 public:
  Coordinator() {
    GroupOptions options;
    options.tp_size = kRanks;
    options.size = [](const std::vector<WorkerMemory>&) { return GroupSizes{100, 8}; };
    machine_ = std::make_unique<GroupMachine>(options, "nonce", &port_);
  }

  void OnEvent(Input* input) {
    const char what = static_cast<char>(input->Byte());
    const StreamId stream = input->Byte() % 8;
    switch (what) {
      case 'o':  // ids rise and are never used again
        machine_->OnOpen(++last_stream_, now_ms_);
        break;
      case 'c':
        machine_->OnClosed(stream, now_ms_);
        break;
      case 'g':
        machine_->OnGarbage(stream, now_ms_);
        break;
      case 't':
        Pass(static_cast<int64_t>(stream) * 100 + 10);
        break;
      case 'p':
        SendPlan();
        break;
      case 'P':
        StartProfile();
        break;
      default:
        Say(stream, input->Record());
    }
    RequireRest();
  }

 private:
  void Say(StreamId stream, std::string_view bytes) {
    WorkerMessage message;
    if (!message.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) {
      machine_->OnGarbage(stream, now_ms_);
    } else {
      machine_->OnMessage(stream, message, now_ms_);
    }
  }
  void Pass(int64_t ms) {
    now_ms_ += ms;
    if (now_ms_ >= machine_->NextWakeMs()) machine_->OnTick(now_ms_);
  }
  void SendPlan() {
    if (port_.serving == 0 || port_.steps_sent - port_.steps_done >= wire::kMaxPlansInFlight) {
      return;
    }
    StepPlan plan;
    plan.epoch = port_.serving;
    plan.step = ++port_.steps_sent;
    plan.digest = 7;
    plan.spans = {{Slot(0), 1}};
    machine_->SendPlan(plan, now_ms_);
  }
  void StartProfile() {
    worker::v1::ProfileStart start;
    start.set_id(kProfile);
    start.set_steps(4);
    machine_->SendProfileStart(start);
  }
  // What is overdue is done by one tick: the owner must not spin.
  void RequireRest() {
    if (machine_->NextWakeMs() <= now_ms_) machine_->OnTick(now_ms_);
    LOCKSTEP_CHECK(machine_->NextWakeMs() > now_ms_);
    for (const GroupMachine::Member& member : machine_->Members()) {
      LOCKSTEP_CHECK(!member.name.empty());
    }
  }

  Port port_;
  std::unique_ptr<GroupMachine> machine_;
  StreamId last_stream_ = 0;
  int64_t now_ms_ = 0;
};

}  // namespace
}  // namespace lockstep::fuzz

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // It has a line to say about each string that is no UTF-8.
  static const bool quiet = google::protobuf::SetLogHandler(nullptr) != nullptr;
  (void)quiet;
  lockstep::fuzz::Input input(data, size);
  lockstep::fuzz::Coordinator coordinator;
  while (!input.empty()) coordinator.OnEvent(&input);
  return 0;
}
