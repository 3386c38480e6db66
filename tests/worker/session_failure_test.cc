// A coordinator or a peer that is gone or makes no sense, and starts that fail.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "tests/fakes/temp_dir.h"
#include "tests/worker/session_testing.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;

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
  const auto configure = [&](size_t stream) {
    coordinator.Send(stream, Plan(3, 1));
    coordinator.Send(stream, Configure(4, 0, 1));
  };
  const auto deadline = std::chrono::steady_clock::now() + kBound;
  size_t last = 1;
  configure(last);
  std::optional<WorkerMessage> ready;
  while (!(ready = coordinator.AwaitCase(last, WorkerMessage::kReady, 50))) {
    ASSERT_LT(std::chrono::steady_clock::now(), deadline);
    // It may have left streams while the coordinator was silent.
    if (!coordinator.AwaitEnd(last, 0)) continue;
    ASSERT_TRUE(coordinator.AwaitHello(++last));
    configure(last);
  }
  EXPECT_EQ(ready->ready().epoch(), 4u);
  EXPECT_EQ(worker.control->Get().runs, 0);
}

TEST(Session, ACollectiveWaitsForARankAsLongAsConfigureSays) {
  FakeCoordinator coordinator("127.0.0.1:0");
  TestWorker first(coordinator.address());
  ASSERT_TRUE(coordinator.AwaitHello(0));
  TestWorker second(coordinator.address());
  ASSERT_TRUE(coordinator.AwaitHello(1));
  for (const uint32_t rank : {0u, 1u}) {
    CoordinatorMessage configure = Configure(1, rank, 2);
    configure.mutable_configure()->set_max_skew_ms(3'000);
    coordinator.Send(rank, configure);
  }
  for (const uint32_t rank : {0u, 1u}) {
    ASSERT_TRUE(IsReady(coordinator.AwaitCase(rank, WorkerMessage::kReady), 1));
  }
  coordinator.Send(0, Plan(1, 1));  // rank 1 never comes
  const auto failure = coordinator.AwaitCase(0, WorkerMessage::kFailure);
  ASSERT_TRUE(failure);
  EXPECT_THAT(failure->failure().message(),
              AllOf(HasSubstr("rank 1"), HasSubstr("did not arrive within 3000 ms")));
}

// So many that a pause that only grows would be of minutes.
TEST(Session, ComesBackQuicklyWheneverTheCoordinatorWasThere) {
  FakeCoordinator coordinator("127.0.0.1:0");
  SessionOptions options = TestWorker::Quick();
  options.min_pause_ms = 1;
  options.max_pause_ms = 1'000'000;
  TestWorker worker(coordinator.address(), options);
  for (size_t stream = 0; stream < 18; ++stream) {
    ASSERT_TRUE(coordinator.AwaitHello(stream)) << stream;
    coordinator.Send(stream, Close(1));
    ASSERT_TRUE(coordinator.AwaitCase(stream, WorkerMessage::kReleased)) << stream;
    coordinator.Cut(stream);
  }
}

TEST(Session, CountsWhatItHoldsAsFreeForTheNextModel) {
  FakeCoordinator coordinator("127.0.0.1:0");
  std::atomic<uint64_t> free_bytes{900};
  SessionOptions options = TestWorker::Quick();
  options.read_memory = [&] { return std::pair<uint64_t, uint64_t>(2'000, free_bytes); };
  TestWorker worker(coordinator.address(), options);
  coordinator.Send(0, Configure(1, 0, 1));
  ASSERT_TRUE(IsReady(coordinator.AwaitCase(0, WorkerMessage::kReady), 1));
  worker.control->Set([](auto& s) { s.held_bytes = 700; });
  free_bytes = 500;  // somebody else let go of some
  coordinator.Cut(0);
  const auto hello = coordinator.AwaitHello(1);
  ASSERT_TRUE(hello);
  EXPECT_EQ(hello->memory_total_bytes(), 2'000u);
  EXPECT_EQ(hello->memory_free_bytes(), 1'200u);
}

// What a load has taken so far is neither free nor held.
TEST(Session, SaysDuringALoadWhatWasFreeBefore) {
  const TempDir directory;
  const std::string address = "unix:" + directory.File("socket");
  std::atomic<uint64_t> free_bytes{900};
  SessionOptions options = TestWorker::Quick();
  options.read_memory = [&] { return std::pair<uint64_t, uint64_t>(1'000, free_bytes); };
  TestWorker worker(address, options);
  worker.control->Set([](auto& s) { s.hold_load = true; });
  const auto free_said = [](FakeCoordinator& coordinator) {
    const auto hello = coordinator.AwaitHello(0);
    return hello ? hello->memory_free_bytes() : 0;
  };
  {
    FakeCoordinator coordinator(address);
    EXPECT_EQ(free_said(coordinator), 900u);
    coordinator.Send(0, Configure(1, 0, 1));
    ASSERT_TRUE(worker.control->Await([](auto& s) { return s.in_load; }));
  }
  free_bytes = 400;
  {
    FakeCoordinator coordinator(address);
    EXPECT_EQ(free_said(coordinator), 900u);
    free_bytes = 100;
    worker.control->Set([](auto& s) { s.hold_load = false; });
    coordinator.Send(0, Configure(1, 0, 1));
    ASSERT_TRUE(IsReady(coordinator.AwaitCase(0, WorkerMessage::kReady), 1));
  }
  FakeCoordinator coordinator(address);
  EXPECT_EQ(free_said(coordinator), 900u);
}

TEST(Session, DialsAgainWhenTheCoordinatorIsRestarted) {
  const TempDir directory;
  const std::string address = "unix:" + directory.File("socket");
  std::atomic<uint64_t> free_bytes{900};
  SessionOptions options = TestWorker::Quick();
  options.read_memory = [&] { return std::pair<uint64_t, uint64_t>(1'000, free_bytes); };
  TestWorker worker(address, options);  // dials before there is anybody
  for (int life = 0; life < 3; ++life) {
    FakeCoordinator coordinator(address);
    const auto hello = coordinator.AwaitHello(0);
    ASSERT_TRUE(hello) << "life " << life;
    // Whatever the model takes: a coordinator that plans with as much plans the same.
    EXPECT_EQ(hello->memory_free_bytes(), 900u);
    free_bytes = 100;
    // The same epoch number again: nothing of the last life is in the way.
    coordinator.Send(0, Configure(1, 0, 1));
    ASSERT_TRUE(IsReady(coordinator.AwaitCase(0, WorkerMessage::kReady), 1));
    coordinator.Send(0, Plan(1, 1));
    ASSERT_TRUE(coordinator.AwaitCase(0, WorkerMessage::kResult));
  }
  worker.Stop();
  EXPECT_EQ(worker.AwaitEnd(), SessionEnd::kStopped);
  EXPECT_EQ(worker.control->Get().weights_loaded, 1);
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
               {absl::UnavailableError("device busy"), true},
               {absl::AbortedError("a rank left"), true},
               {absl::DeadlineExceededError("a rank did not come"), true},
               {absl::CancelledError("the exchange was cancelled"), true}};
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
      {"load_format", [](auto& c) { c.set_load_format("pickle"); }},
      {"kv_dtype", [](auto& c) { c.set_kv_dtype("fp8"); }}};
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
  const auto failure = coordinator.AwaitCase(0, WorkerMessage::kFailure);
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->failure().code(), static_cast<uint32_t>(absl::StatusCode::kUnavailable));
  EXPECT_THAT(failure->failure().message(), HasSubstr("rank 1"));
  EXPECT_TRUE(failure->failure().recoverable());
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
