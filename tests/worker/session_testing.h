// A worker's session with a fake host, and what a coordinator says to one.
#ifndef LOCKSTEP_TESTS_WORKER_SESSION_TESTING_H_
#define LOCKSTEP_TESTS_WORKER_SESSION_TESTING_H_

#include <chrono>
#include <cstdint>
#include <future>
#include <memory>
#include <optional>
#include <string>

#include "tests/fakes/fake_coordinator.h"
#include "tests/fakes/fake_host.h"
#include "wire/codec.h"
#include "worker/comm/gloo_communicator.h"
#include "worker/grpc_plane.h"
#include "worker/session.h"

namespace lockstep {

using fakes::FakeCoordinator;
using fakes::HostControl;
using worker::v1::CoordinatorMessage;
using worker::v1::WorkerMessage;

inline constexpr std::chrono::seconds kBound{20};

// One worker: a session on a thread of its own, with a fake host.
class TestWorker {
 public:
  explicit TestWorker(const std::string& address, SessionOptions options = Quick())
      : control(std::make_shared<HostControl>()) {
    options.hello.set_protocol_version(wire::kProtocolVersion);
    options.hello.set_instance("test");
    options.hello.set_preferred_rank(-1);
    if (!options.runner.make_communicator) options.runner.make_communicator = MakeGlooCommunicator;
    options.runner.collective_library = GlooVersion();
    session_ = std::make_unique<Session>(options, MakeGrpcPlane(address, false),
                                         std::make_unique<fakes::FakeHost>(control));
    end_ = std::async(std::launch::async, [this] { return session_->Run(); });
  }
  ~TestWorker() {
    control->Set([](auto& s) { s.hold_load = s.hold_begin = s.hold_run = s.hold_done = false; });
    session_->Stop();
  }

  static SessionOptions Quick() {
    SessionOptions options;
    options.heartbeat_interval_ms = 50;
    options.heartbeat_timeout_ms = 5'000;
    options.release_timeout_ms = 5'000;
    options.min_pause_ms = 5;
    options.max_pause_ms = 50;
    return options;
  }

  void Stop() { session_->Stop(); }
  std::optional<SessionEnd> AwaitEnd() {
    if (end_.wait_for(kBound) != std::future_status::ready) return std::nullopt;
    return end_.get();
  }
  bool idle() const { return session_->idle(); }

  const std::shared_ptr<HostControl> control;

 private:
  std::unique_ptr<Session> session_;
  std::future<SessionEnd> end_;  // before session_ goes: its destructor waits for Run
};

inline CoordinatorMessage Configure(uint64_t epoch, uint32_t rank, uint32_t tp_size) {
  CoordinatorMessage message;
  worker::v1::Configure& c = *message.mutable_configure();
  c.set_epoch(epoch);
  c.set_group("g");
  c.set_rank(rank);
  c.set_tp_size(tp_size);
  c.set_model_path("/model");
  c.set_dtype("float32");
  c.set_load_format("auto");
  c.set_block_size(16);
  c.set_num_kv_blocks(8);
  c.set_max_num_seqs(4);
  c.set_max_batched_tokens(64);
  c.set_max_model_len(128);
  c.set_communicator("nonce");
  c.set_max_skew_ms(20'000);
  return message;
}

inline CoordinatorMessage Plan(uint64_t epoch, uint64_t step) {
  StepPlan plan;
  plan.epoch = epoch;
  plan.step = step;
  plan.digest = 77 + step;
  plan.spans = {{Slot(0), 1}};
  CoordinatorMessage message;
  *message.mutable_plan() = wire::Encode(plan);
  return message;
}

inline CoordinatorMessage Close(uint64_t epoch) {
  CoordinatorMessage message;
  message.mutable_close_epoch()->set_epoch(epoch);
  message.mutable_close_epoch()->set_reason("the test says so");
  return message;
}

inline bool IsReady(const std::optional<WorkerMessage>& message, uint64_t epoch) {
  return message && message->has_ready() && message->ready().epoch() == epoch;
}

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_WORKER_SESSION_TESTING_H_
