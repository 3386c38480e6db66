#include "worker/session.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "tests/fakes/fake_coordinator.h"
#include "tests/fakes/fake_host.h"
#include "wire/codec.h"
#include "worker/comm/gloo_communicator.h"
#include "worker/grpc_plane.h"

namespace lockstep {
namespace {

using fakes::FakeCoordinator;
using fakes::HostControl;
using ::testing::HasSubstr;
using worker::v1::CoordinatorMessage;
using worker::v1::WorkerMessage;

constexpr std::chrono::seconds kBound{20};

// One worker: a session on a thread of its own, with a fake host.
class TestWorker {
 public:
  explicit TestWorker(const std::string& address, SessionOptions options = Quick())
      : control(std::make_shared<HostControl>()) {
    options.hello.set_protocol_version(wire::kProtocolVersion);
    options.hello.set_instance("test");
    options.hello.set_preferred_rank(-1);
    options.runner.make_communicator = MakeGlooCommunicator;
    options.runner.collective_library = GlooVersion();
    session_ = std::make_unique<Session>(options, MakeGrpcPlane(address, false),
                                         std::make_unique<fakes::FakeHost>(control));
    end_ = std::async(std::launch::async, [this] { return session_->Run(); });
  }
  ~TestWorker() {
    control->Set([](auto& s) { s.hold_load = s.hold_run = false; });
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

CoordinatorMessage Configure(uint64_t epoch, uint32_t rank, uint32_t tp_size) {
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

CoordinatorMessage Plan(uint64_t epoch, uint64_t step) {
  StepPlan plan;
  plan.epoch = epoch;
  plan.step = step;
  plan.digest = 77 + step;
  plan.spans = {{Slot(0), 1}};
  CoordinatorMessage message;
  *message.mutable_plan() = wire::Encode(plan);
  return message;
}

CoordinatorMessage Close(uint64_t epoch) {
  CoordinatorMessage message;
  message.mutable_close_epoch()->set_epoch(epoch);
  message.mutable_close_epoch()->set_reason("the test says so");
  return message;
}

bool IsReady(const std::optional<WorkerMessage>& message, uint64_t epoch) {
  return message && message->has_ready() && message->ready().epoch() == epoch;
}

TEST(Session, SaysHelloAndKeepsBeating) {
  FakeCoordinator coordinator("127.0.0.1:0");
  TestWorker worker(coordinator.address());
  const auto hello = coordinator.AwaitHello(0);
  ASSERT_TRUE(hello);
  EXPECT_EQ(hello->instance(), "test");
  EXPECT_EQ(hello->preferred_rank(), -1);
  // A step that hangs does not stop the heart.
  coordinator.Send(0, Configure(1, 0, 1));
  ASSERT_TRUE(IsReady(coordinator.AwaitCase(0, WorkerMessage::kReady), 1));
  worker.control->Set([](auto& s) { s.hold_run = true; });
  coordinator.Send(0, Plan(1, 1));
  ASSERT_TRUE(worker.control->Await([](auto& s) { return s.in_run; }));
  const size_t before = coordinator.num_heartbeats(0);
  const auto deadline = std::chrono::steady_clock::now() + kBound;
  while (coordinator.num_heartbeats(0) < before + 5) {
    ASSERT_LT(std::chrono::steady_clock::now(), deadline);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

TEST(Session, LoadsReportsAndStepsWithTwoPlansInFlight) {
  FakeCoordinator coordinator("127.0.0.1:0");
  TestWorker first(coordinator.address());
  ASSERT_TRUE(coordinator.AwaitHello(0));
  TestWorker second(coordinator.address());
  ASSERT_TRUE(coordinator.AwaitHello(1));
  for (const uint32_t rank : {0u, 1u}) coordinator.Send(rank, Configure(7, rank, 2));
  for (const uint32_t rank : {0u, 1u}) {
    const auto progress = coordinator.AwaitCase(rank, WorkerMessage::kProgress);
    ASSERT_TRUE(progress);
    EXPECT_EQ(progress->progress().bytes_total(), 1u << 20);
    const auto ready = coordinator.AwaitCase(rank, WorkerMessage::kReady);
    ASSERT_TRUE(IsReady(ready, 7));
    EXPECT_EQ(ready->ready().rank(), rank);
    EXPECT_EQ(ready->ready().weight_bytes(), 1u << 20);
    EXPECT_THAT(ready->ready().collective_library(), HasSubstr("gloo"));
    std::string phases;
    for (const auto& phase : ready->ready().phases()) phases += phase.name() + " ";
    EXPECT_EQ(phases, "open load other ranks communicator kv ");
  }
  const uint64_t steps = 200;
  for (const uint32_t rank : {0u, 1u}) coordinator.Send(rank, Plan(7, 1));
  for (uint64_t step = 1; step <= steps; ++step) {
    for (const uint32_t rank : {0u, 1u}) {
      if (step < steps) coordinator.Send(rank, Plan(7, step + 1));
    }
    for (const uint32_t rank : {0u, 1u}) {
      const auto message = coordinator.AwaitCase(rank, WorkerMessage::kResult);
      ASSERT_TRUE(message) << "rank " << rank << " step " << step;
      const auto result = wire::Decode(message->result());
      ASSERT_TRUE(result.ok()) << result.status();
      ASSERT_EQ(result->step, step);
      EXPECT_EQ(result->digest, 77 + step);
      EXPECT_EQ(result->num_collectives, 1u);
      EXPECT_GT(result->timing.plan_received_ns, 0u);
      ASSERT_EQ(result->sampled.size(), rank == 0 ? 1u : 0u);
      if (rank == 0) {
        EXPECT_EQ(result->sampled[0].token, 2 * step);
      }
    }
  }
}

TEST(Session, KeepsWeightsWhenTheNextEpochAsksForTheSame) {
  FakeCoordinator coordinator("127.0.0.1:0");
  TestWorker first(coordinator.address());
  ASSERT_TRUE(coordinator.AwaitHello(0));
  TestWorker second(coordinator.address());
  ASSERT_TRUE(coordinator.AwaitHello(1));
  double seconds = 0;
  for (uint64_t epoch = 1; epoch <= 10; ++epoch) {
    const auto start = std::chrono::steady_clock::now();
    for (const uint32_t rank : {0u, 1u}) coordinator.Send(rank, Configure(epoch, rank, 2));
    for (const uint32_t rank : {0u, 1u}) {
      ASSERT_TRUE(IsReady(coordinator.AwaitCase(rank, WorkerMessage::kReady), epoch));
    }
    seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    for (const uint32_t rank : {0u, 1u}) coordinator.Send(rank, Plan(epoch, 1));
    for (const uint32_t rank : {0u, 1u}) {
      ASSERT_TRUE(coordinator.AwaitCase(rank, WorkerMessage::kResult));
    }
    for (const uint32_t rank : {0u, 1u}) coordinator.Send(rank, Close(epoch));
    for (const uint32_t rank : {0u, 1u}) {
      const auto released = coordinator.AwaitCase(rank, WorkerMessage::kReleased);
      ASSERT_TRUE(released);
      EXPECT_EQ(released->released().epoch(), epoch);
    }
  }
  EXPECT_EQ(first.control->Get().weights_loaded, 1);
  EXPECT_EQ(first.control->Get().ends, 10);
  std::printf("re-forming a group of two: %.1f ms\n", 1e3 * seconds / 10);
}

TEST(Session, ReleasesAnEpochInTheMiddleOfACollective) {
  FakeCoordinator coordinator("127.0.0.1:0");
  TestWorker first(coordinator.address());
  ASSERT_TRUE(coordinator.AwaitHello(0));
  TestWorker second(coordinator.address());
  ASSERT_TRUE(coordinator.AwaitHello(1));
  for (const uint32_t rank : {0u, 1u}) coordinator.Send(rank, Configure(1, rank, 2));
  for (const uint32_t rank : {0u, 1u}) {
    ASSERT_TRUE(IsReady(coordinator.AwaitCase(rank, WorkerMessage::kReady), 1));
  }
  coordinator.Send(0, Plan(1, 1));  // rank 1 never comes
  ASSERT_TRUE(first.control->Await([](auto& s) { return s.runs == 1 && !s.in_run; }));
  coordinator.Send(0, Close(1));
  const auto answer = coordinator.Await(
      0, [](const WorkerMessage& m) { return m.has_released() || m.has_failure(); }, 2'000);
  ASSERT_TRUE(answer);
  EXPECT_TRUE(answer->has_released()) << answer->ShortDebugString();
}

TEST(Session, EndsWhenAStepDoesNotComeBackFromAClosedEpoch) {
  FakeCoordinator coordinator("127.0.0.1:0");
  SessionOptions options = TestWorker::Quick();
  options.release_timeout_ms = 200;
  TestWorker worker(coordinator.address(), options);
  coordinator.Send(0, Configure(1, 0, 1));
  ASSERT_TRUE(IsReady(coordinator.AwaitCase(0, WorkerMessage::kReady), 1));
  worker.control->Set([](auto& s) { s.hold_run = true; });
  coordinator.Send(0, Plan(1, 1));
  ASSERT_TRUE(worker.control->Await([](auto& s) { return s.in_run; }));
  coordinator.Send(0, Close(1));
  EXPECT_EQ(worker.AwaitEnd(), SessionEnd::kStuck);
  EXPECT_FALSE(worker.idle());
}

TEST(Session, EndsWhenRefusedOrShutDown) {
  FakeCoordinator coordinator("127.0.0.1:0");
  CoordinatorMessage message;
  message.mutable_refusal()->set_reason("wrong version");
  {
    TestWorker worker(coordinator.address());
    ASSERT_TRUE(coordinator.AwaitHello(0));
    coordinator.Send(0, message);
    EXPECT_EQ(worker.AwaitEnd(), SessionEnd::kRefused);
    EXPECT_TRUE(worker.idle());
  }
  message.mutable_shutdown();
  TestWorker worker(coordinator.address());
  coordinator.Send(1, Configure(1, 0, 1));
  ASSERT_TRUE(IsReady(coordinator.AwaitCase(1, WorkerMessage::kReady), 1));
  coordinator.Send(1, message);
  EXPECT_EQ(worker.AwaitEnd(), SessionEnd::kShutdown);
  EXPECT_TRUE(worker.idle());
}

TEST(Session, FencesItselfWhenTheCoordinatorFallsSilentAndComesBack) {
  FakeCoordinator coordinator("127.0.0.1:0");
  SessionOptions options = TestWorker::Quick();
  options.heartbeat_timeout_ms = 300;
  TestWorker worker(coordinator.address(), options);
  coordinator.Send(0, Configure(3, 1, 2));  // joins with nobody: the epoch never forms
  ASSERT_TRUE(worker.control->Await([](auto& s) { return s.weights_loaded == 1; }));
  coordinator.FallSilent(true);
  EXPECT_TRUE(coordinator.AwaitEnd(0));
  coordinator.FallSilent(false);
  const auto hello = coordinator.AwaitHello(1);
  ASSERT_TRUE(hello);
  EXPECT_EQ(hello->preferred_rank(), 1);  // whose weights it holds
  // The epoch is gone: a plan for it is nothing to it, a new epoch is.
  size_t last = 1;
  while (true) {  // it may have left streams while the coordinator was silent
    coordinator.Send(last, Plan(3, 1));
    coordinator.Send(last, Configure(4, 0, 1));
    const auto ready = coordinator.AwaitCase(last, WorkerMessage::kReady, 2'000);
    if (ready) {
      EXPECT_EQ(ready->ready().epoch(), 4u);
      break;
    }
    ASSERT_TRUE(coordinator.AwaitHello(++last));
  }
  EXPECT_EQ(worker.control->Get().runs, 0);
}

TEST(Session, DialsAgainWhenTheCoordinatorIsRestarted) {
  const std::string path =
      (std::filesystem::temp_directory_path() / ("lockstep_session_" + std::to_string(getpid())))
          .string();
  const std::string address = "unix:" + path;
  TestWorker worker(address);  // dials before there is anybody
  for (int life = 0; life < 3; ++life) {
    FakeCoordinator coordinator(address);
    ASSERT_TRUE(coordinator.AwaitHello(0)) << "life " << life;
    // The same epoch number again: nothing of the last life is in the way.
    coordinator.Send(0, Configure(1, 0, 1));
    ASSERT_TRUE(IsReady(coordinator.AwaitCase(0, WorkerMessage::kReady), 1));
    coordinator.Send(0, Plan(1, 1));
    ASSERT_TRUE(coordinator.AwaitCase(0, WorkerMessage::kResult));
  }
  worker.Stop();
  EXPECT_EQ(worker.AwaitEnd(), SessionEnd::kStopped);
  EXPECT_EQ(worker.control->Get().weights_loaded, 1);
  std::filesystem::remove(path);
}

TEST(Session, AnswersPlansThatMakeNoSenseWithAFailure) {
  FakeCoordinator coordinator("127.0.0.1:0");
  TestWorker worker(coordinator.address());
  coordinator.Send(0, Configure(2, 0, 1));
  ASSERT_TRUE(IsReady(coordinator.AwaitCase(0, WorkerMessage::kReady), 2));
  coordinator.Send(0, Plan(1, 1));  // stale: dropped
  CoordinatorMessage bad = Plan(2, 1);
  bad.mutable_plan()->add_grown_slots(3);
  coordinator.Send(0, bad);
  const auto failure = coordinator.AwaitCase(0, WorkerMessage::kFailure);
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->failure().epoch(), 2u);
  EXPECT_EQ(failure->failure().step(), 1u);
  EXPECT_EQ(failure->failure().code(), static_cast<uint32_t>(absl::StatusCode::kInvalidArgument));
  EXPECT_TRUE(failure->failure().recoverable());
  EXPECT_THAT(failure->failure().message(), HasSubstr("grown_counts"));
  // The epoch is broken: later plans are not executed. It can still be closed.
  coordinator.Send(0, Plan(2, 2));
  coordinator.Send(0, Close(2));
  const auto released = coordinator.AwaitCase(0, WorkerMessage::kReleased);
  ASSERT_TRUE(released);
  EXPECT_EQ(worker.control->Get().runs, 0);
}

TEST(Session, RefusesMorePlansThanMayBeInFlight) {
  FakeCoordinator coordinator("127.0.0.1:0");
  TestWorker worker(coordinator.address());
  coordinator.Send(0, Configure(2, 0, 1));
  ASSERT_TRUE(IsReady(coordinator.AwaitCase(0, WorkerMessage::kReady), 2));
  worker.control->Set([](auto& s) { s.hold_run = true; });
  for (uint64_t step = 1; step <= 5; ++step) coordinator.Send(0, Plan(2, step));
  const auto failure = coordinator.AwaitCase(0, WorkerMessage::kFailure);
  ASSERT_TRUE(failure);
  EXPECT_THAT(failure->failure().message(), HasSubstr("more than 2"));
}

TEST(Session, TellsWhetherAFailedStartMaySucceedNextTime) {
  FakeCoordinator coordinator("127.0.0.1:0");
  TestWorker worker(coordinator.address());
  ASSERT_TRUE(coordinator.AwaitHello(0));
  const struct {
    absl::Status error;
    bool recoverable;
  } cases[] = {{absl::InvalidArgumentError("model.safetensors: truncated"), false},
               {absl::NotFoundError("tensor \"x\": not there"), false},
               {absl::UnavailableError("device busy"), true}};
  uint64_t epoch = 0;
  for (const auto& c : cases) {
    worker.control->Set([&](auto& s) { s.load_error = c.error; });
    coordinator.Send(0, Configure(++epoch, 0, 1));
    const auto failure = coordinator.AwaitCase(0, WorkerMessage::kFailure);
    ASSERT_TRUE(failure);
    EXPECT_EQ(failure->failure().epoch(), epoch);
    EXPECT_EQ(failure->failure().step(), 0u);
    EXPECT_EQ(failure->failure().message(), std::string(c.error.message()));
    EXPECT_EQ(failure->failure().recoverable(), c.recoverable);
    coordinator.Send(0, Close(epoch));
    ASSERT_TRUE(coordinator.AwaitCase(0, WorkerMessage::kReleased));
  }
  worker.control->Set([&](auto& s) { s.load_error = absl::OkStatus(); });
  coordinator.Send(0, Configure(++epoch, 0, 1));
  EXPECT_TRUE(IsReady(coordinator.AwaitCase(0, WorkerMessage::kReady), epoch));
}

TEST(Session, RefusesAConfigureThatCannotBe) {
  FakeCoordinator coordinator("127.0.0.1:0");
  TestWorker worker(coordinator.address());
  const std::pair<const char*, std::function<void(worker::v1::Configure&)>> cases[] = {
      {"rank", [](auto& c) { c.set_rank(2); }},
      {"tp_size", [](auto& c) { c.set_tp_size(0); }},
      {"tp_size", [](auto& c) { c.set_tp_size(100'000); }},
      {"epoch", [](auto& c) { c.set_epoch(0); }},
      {"block_size", [](auto& c) { c.set_block_size(0); }},
      {"num_kv_blocks", [](auto& c) { c.set_num_kv_blocks(0xffffffff); }},
      {"max_num_seqs", [](auto& c) { c.set_max_num_seqs(0xffffffff); }},
      {"max_batched_tokens", [](auto& c) { c.set_max_batched_tokens(0); }},
      {"max_model_len", [](auto& c) { c.set_max_model_len(0xffffffff); }},
      {"model_path", [](auto& c) { c.set_model_path(""); }},
      {"communicator", [](auto& c) { c.set_communicator(std::string(1000, 'x')); }},
      {"load_format", [](auto& c) { c.set_load_format("pickle"); }}};
  for (const auto& [field, spoil] : cases) {
    CoordinatorMessage message = Configure(1, 0, 2);
    spoil(*message.mutable_configure());
    coordinator.Send(0, message);
    const auto failure = coordinator.AwaitCase(0, WorkerMessage::kFailure);
    ASSERT_TRUE(failure) << field;
    EXPECT_THAT(failure->failure().message(), HasSubstr(std::string("Configure.") + field));
    EXPECT_FALSE(failure->failure().recoverable());
  }
  EXPECT_EQ(worker.control->Get().loads, 0);
}

TEST(Session, AnswersACloseWhileLoadingAtOnceAndKeepsWhatWasLoaded) {
  FakeCoordinator coordinator("127.0.0.1:0");
  SessionOptions options = TestWorker::Quick();
  options.release_timeout_ms = 100;  // loading is not bounded by it
  TestWorker worker(coordinator.address(), options);
  worker.control->Set([](auto& s) { s.hold_load = true; });
  coordinator.Send(0, Configure(1, 0, 1));
  ASSERT_TRUE(worker.control->Await([](auto& s) { return s.in_load; }));
  coordinator.Send(0, Close(1));
  ASSERT_TRUE(coordinator.AwaitCase(0, WorkerMessage::kReleased));
  coordinator.Send(0, Configure(2, 0, 1));
  const size_t before = coordinator.num_heartbeats(0);
  const auto deadline = std::chrono::steady_clock::now() + kBound;
  while (coordinator.num_heartbeats(0) < before + 6) {  // well past the release timeout
    ASSERT_LT(std::chrono::steady_clock::now(), deadline);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  worker.control->Set([](auto& s) { s.hold_load = false; });
  const auto ready = coordinator.AwaitCase(0, WorkerMessage::kReady);
  ASSERT_TRUE(ready);
  EXPECT_EQ(ready->ready().epoch(), 2u);
  EXPECT_EQ(worker.control->Get().weights_loaded, 1);
}

TEST(Session, StopsPromptlyWhateverItIsDoing) {
  FakeCoordinator coordinator("127.0.0.1:0");
  {
    TestWorker worker("unix:/nonexistent/socket");
    worker.Stop();
    EXPECT_EQ(worker.AwaitEnd(), SessionEnd::kStopped);
    EXPECT_TRUE(worker.idle());
  }
  TestWorker worker(coordinator.address());
  worker.control->Set([](auto& s) { s.hold_load = true; });
  coordinator.Send(0, Configure(1, 0, 1));
  ASSERT_TRUE(worker.control->Await([](auto& s) { return s.in_load; }));
  worker.Stop();
  EXPECT_EQ(worker.AwaitEnd(), SessionEnd::kStopped);
  EXPECT_FALSE(worker.idle());
}

TEST(Session, RefusesToServeWithARankThatHasAnotherModel) {
  FakeCoordinator coordinator("127.0.0.1:0");
  TestWorker first(coordinator.address());
  ASSERT_TRUE(coordinator.AwaitHello(0));
  TestWorker second(coordinator.address());
  ASSERT_TRUE(coordinator.AwaitHello(1));
  second.control->Set([](auto& s) { s.model_digest = 2; });
  for (const uint32_t rank : {0u, 1u}) coordinator.Send(rank, Configure(1, rank, 2));
  const auto failure = coordinator.AwaitCase(0, WorkerMessage::kFailure);
  ASSERT_TRUE(failure);
  EXPECT_THAT(failure->failure().message(), HasSubstr("rank 1 has another model"));
  EXPECT_FALSE(failure->failure().recoverable());
}

TEST(Session, AKilledPeerIsAFailureOfTheStepNotAHang) {
  FakeCoordinator coordinator("127.0.0.1:0");
  TestWorker first(coordinator.address());
  ASSERT_TRUE(coordinator.AwaitHello(0));
  auto second = std::make_unique<TestWorker>(coordinator.address());
  ASSERT_TRUE(coordinator.AwaitHello(1));
  for (const uint32_t rank : {0u, 1u}) coordinator.Send(rank, Configure(1, rank, 2));
  for (const uint32_t rank : {0u, 1u}) {
    ASSERT_TRUE(IsReady(coordinator.AwaitCase(rank, WorkerMessage::kReady), 1));
  }
  second.reset();
  coordinator.Send(0, Plan(1, 1));
  const auto failure = coordinator.AwaitCase(0, WorkerMessage::kFailure, 3'000);
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->failure().code(), static_cast<uint32_t>(absl::StatusCode::kUnavailable));
  EXPECT_THAT(failure->failure().message(), HasSubstr("rank 1"));
  EXPECT_TRUE(failure->failure().recoverable());
}

CoordinatorMessage StartProfile(uint64_t id, uint32_t steps) {
  CoordinatorMessage message;
  message.mutable_profile_start()->set_id(id);
  message.mutable_profile_start()->set_steps(steps);
  return message;
}

// Says when it was started and stopped, and that one kernel ran.
class FakeTrace final : public DeviceTrace {
 public:
  explicit FakeTrace(std::atomic<int>* starts, std::atomic<int>* stops)
      : starts_(starts), stops_(stops) {}
  absl::Status Start() override {
    ++*starts_;
    return absl::OkStatus();
  }
  absl::StatusOr<std::vector<DeviceEvent>> Stop() override {
    ++*stops_;
    return std::vector<DeviceEvent>{{"kernel", 5, 9, 7, 132, 256}};
  }

 private:
  std::atomic<int>*const starts_, *const stops_;
};

struct ProfiledWorker {
  ProfiledWorker() : worker(coordinator.address(), Options()) {
    coordinator.AwaitHello(0);
    coordinator.Send(0, Configure(1, 0, 1));
    EXPECT_TRUE(coordinator.AwaitCase(0, WorkerMessage::kReady));
  }
  SessionOptions Options() {
    SessionOptions options = TestWorker::Quick();
    options.runner.open_trace = [this]() -> absl::StatusOr<std::unique_ptr<DeviceTrace>> {
      return std::make_unique<FakeTrace>(&starts, &stops);
    };
    return options;
  }
  void Step(uint64_t step) {
    coordinator.Send(0, Plan(1, step));
    EXPECT_TRUE(coordinator.AwaitCase(0, WorkerMessage::kResult));
  }

  std::atomic<int> starts{0}, stops{0};
  FakeCoordinator coordinator{"127.0.0.1:0"};
  TestWorker worker;
};

TEST(SessionProfile, SendsTheStepsThatFollowAndNoOthers) {
  ProfiledWorker p;
  p.Step(1);
  p.coordinator.Send(0, StartProfile(4, 2));
  p.Step(2);
  EXPECT_EQ(p.starts, 1);
  p.coordinator.Send(0, Plan(1, 3));
  p.coordinator.Send(0, Plan(1, 4));  // not part of it: waits until it is over
  const auto sent = p.coordinator.AwaitCase(0, WorkerMessage::kProfile);
  ASSERT_TRUE(sent);
  const worker::v1::ProfilePart& part = sent->profile();
  EXPECT_EQ(part.id(), 4u);
  EXPECT_TRUE(part.last());
  ASSERT_EQ(part.steps_size(), 2);
  EXPECT_EQ(part.steps(0).step(), 2u);
  EXPECT_EQ(part.steps(1).step(), 3u);
  EXPECT_LE(part.steps(0).begin_ns(), part.steps(0).end_ns());
  EXPECT_LE(part.steps(0).end_ns(), part.steps(1).begin_ns());
  ASSERT_EQ(part.events_size(), 1);
  EXPECT_EQ(part.names(static_cast<int>(part.events(0).name())), "kernel");
  EXPECT_EQ(part.events(0).duration_ns(), 4u);
  EXPECT_TRUE(p.coordinator.Await(
      0, [](const WorkerMessage& m) { return m.has_result() && m.result().step() == 4; }));
  EXPECT_EQ(p.stops, 1);
}

TEST(SessionProfile, AnswersWithWhatThereIsWhenToldThatItIsEnough) {
  ProfiledWorker p;
  p.coordinator.Send(0, StartProfile(1, 100));
  p.Step(1);
  p.coordinator.Send(0, StartProfile(1, 0));
  const auto part = p.coordinator.AwaitCase(0, WorkerMessage::kProfile);
  ASSERT_TRUE(part);
  EXPECT_EQ(part->profile().steps_size(), 1);
  p.coordinator.Send(0, StartProfile(2, 100));
  p.coordinator.Send(0, StartProfile(2, 0));
  const auto empty = p.coordinator.AwaitCase(0, WorkerMessage::kProfile);
  ASSERT_TRUE(empty);
  EXPECT_EQ(empty->profile().id(), 2u);
  EXPECT_EQ(empty->profile().steps_size(), 0);
  EXPECT_TRUE(empty->profile().last());
  p.Step(2);
  EXPECT_EQ(p.starts, 1);
}

TEST(SessionProfile, EndsWithItsEpoch) {
  ProfiledWorker p;
  p.coordinator.Send(0, StartProfile(1, 100));
  p.Step(1);
  p.coordinator.Send(0, Close(1));
  ASSERT_TRUE(p.coordinator.AwaitCase(0, WorkerMessage::kReleased));
  EXPECT_EQ(p.stops, 1);
  p.coordinator.Send(0, Configure(2, 0, 1));
  ASSERT_TRUE(p.coordinator.AwaitCase(0, WorkerMessage::kReady));
  p.coordinator.Send(0, StartProfile(2, 1));
  p.coordinator.Send(0, Plan(2, 1));
  const auto part = p.coordinator.AwaitCase(0, WorkerMessage::kProfile);
  ASSERT_TRUE(part);
  EXPECT_EQ(part->profile().id(), 2u);
  EXPECT_EQ(part->profile().steps_size(), 1);
}

TEST(SessionProfile, HeartbeatsCarryTheClockAndWhatTheDriverSays) {
  FakeCoordinator coordinator("127.0.0.1:0");
  SessionOptions options = TestWorker::Quick();
  options.take_device_stats = [told = false]() mutable -> std::optional<worker::v1::DeviceStats> {
    if (std::exchange(told, true)) return std::nullopt;
    worker::v1::DeviceStats stats;
    stats.set_sm_clock_mhz(1980);
    return stats;
  };
  TestWorker worker(coordinator.address(), std::move(options));
  ASSERT_TRUE(coordinator.AwaitHello(0));
  const auto beat = coordinator.AwaitCase(0, WorkerMessage::kHeartbeat);
  ASSERT_TRUE(beat);
  EXPECT_EQ(beat->heartbeat().device().sm_clock_mhz(), 1980u);
  EXPECT_NE(beat->heartbeat().clock_ns(), 0u);
}

TEST(GrpcPlane, SaysWhatIsWrongWithAnAddress) {
  const auto never = [] { return false; };
  const auto unknown = MakeGrpcPlane("no-such-host.invalid:1", false)->Dial(never).status();
  EXPECT_THAT(std::string(unknown.message()), HasSubstr("no-such-host.invalid:1"));
  const auto closed = MakeGrpcPlane("127.0.0.1:1", false)->Dial(never).status();
  EXPECT_THAT(std::string(closed.message()), HasSubstr("\"127.0.0.1:1\": nothing answers there"));
  const auto malformed = MakeGrpcPlane(":50052", false)->Dial(never).status();
  EXPECT_EQ(malformed.code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace lockstep
