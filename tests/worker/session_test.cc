#include "worker/session.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <future>
#include <optional>
#include <string>
#include <thread>

#include "tests/worker/session_testing.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;

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

TEST(Session, MakesItsCommunicatorOfWhatItWasToldAndOfWhatTheHostShares) {
  for (const std::string address : {"", "127.0.0.5"}) {
    std::promise<CommunicatorOptions> made;
    FakeCoordinator coordinator("127.0.0.1:0");
    SessionOptions options = TestWorker::Quick();
    options.comm_address = address;
    options.runner.make_communicator = [&](const CommunicatorOptions& said) {
      made.set_value(said);
      return MakeGlooCommunicator(said);
    };
    TestWorker worker(coordinator.address(), options);
    coordinator.Send(0, Configure(1, 0, 1));
    ASSERT_TRUE(IsReady(coordinator.AwaitCase(0, WorkerMessage::kReady), 1));
    const CommunicatorOptions said = made.get_future().get();
    EXPECT_EQ(said.id, "nonce");
    EXPECT_EQ(said.rank, 0);
    EXPECT_EQ(said.size, 1);
    EXPECT_EQ(said.max_skew_ms, 20'000);
    EXPECT_EQ(said.shared_bytes, fakes::FakeHost::kSharedBytes);
    EXPECT_EQ(said.bind_address, address.empty() ? "127.0.0.1" : address);
  }
}

TEST(Session, APlanInFlightAtAnEpochsEndIsNoPartOfTheNextOne) {
  FakeCoordinator coordinator("127.0.0.1:0");
  TestWorker worker(coordinator.address());
  coordinator.Send(0, Configure(1, 0, 1));
  ASSERT_TRUE(IsReady(coordinator.AwaitCase(0, WorkerMessage::kReady), 1));
  worker.control->Set([](auto& s) { s.hold_done = true; });
  coordinator.Send(0, Plan(1, 1));
  ASSERT_TRUE(worker.control->Await([](auto& s) { return s.submits == 1; }));
  coordinator.Send(0, Close(1));
  ASSERT_TRUE(coordinator.AwaitCase(0, WorkerMessage::kReleased));
  worker.control->Set([](auto& s) { s.hold_done = false; });
  coordinator.Send(0, Configure(2, 0, 1));
  ASSERT_TRUE(IsReady(coordinator.AwaitCase(0, WorkerMessage::kReady), 2));
  coordinator.Send(0, Plan(2, 1));
  const auto result = coordinator.AwaitCase(0, WorkerMessage::kResult);
  ASSERT_TRUE(result);
  EXPECT_EQ(result->result().epoch(), 2u);
  EXPECT_EQ(worker.control->Get().runs, 1);
}

TEST(Session, HeartbeatsSayTheLastStepOfTheirEpoch) {
  FakeCoordinator coordinator("127.0.0.1:0");
  SessionOptions options = TestWorker::Quick();
  options.take_device_stats = [] { return worker::v1::DeviceStats(); };  // such beats are kept
  TestWorker worker(coordinator.address(), options);
  const auto last_step = [&](uint64_t epoch, uint64_t at_least) {
    const auto beat = coordinator.Await(0, [&](const WorkerMessage& m) {
      return m.has_heartbeat() && m.heartbeat().epoch() == epoch &&
             m.heartbeat().last_step() >= at_least;
    });
    return beat ? std::optional(beat->heartbeat().last_step()) : std::nullopt;
  };
  coordinator.Send(0, Configure(1, 0, 1));
  EXPECT_EQ(last_step(1, 0), 0u);
  for (uint64_t step = 1; step <= 2; ++step) coordinator.Send(0, Plan(1, step));
  EXPECT_EQ(last_step(1, 2), 2u);
  coordinator.Send(0, Configure(2, 0, 1));
  EXPECT_EQ(last_step(2, 0), 0u);
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
      0, [](const WorkerMessage& m) { return m.has_released() || m.has_failure(); });
  ASSERT_TRUE(answer);
  EXPECT_TRUE(answer->has_released()) << answer->ShortDebugString();
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
  // The load that outlived its epoch ends, and the next one finds what it left.
  for (int load = 0; load < 2; ++load) {
    const auto progress = coordinator.Await(0, [](const WorkerMessage& m) {
      return m.has_progress() && m.progress().bytes_done() == m.progress().bytes_total();
    });
    ASSERT_TRUE(progress) << load;
    EXPECT_EQ(progress->progress().epoch(), 2u) << load;
  }
  const auto ready = coordinator.AwaitCase(0, WorkerMessage::kReady);
  ASSERT_TRUE(ready);
  EXPECT_EQ(ready->ready().epoch(), 2u);
  EXPECT_EQ(worker.control->Get().weights_loaded, 1);
}

// A host whose communicator was aborted may begin all the same: nothing failed.
TEST(Session, SaysNotReadyOfAnEpochThatWasClosedWhileItBegan) {
  FakeCoordinator coordinator("127.0.0.1:0");
  TestWorker worker(coordinator.address());
  worker.control->Set([](auto& s) { s.hold_begin = true; });
  coordinator.Send(0, Configure(1, 0, 1));
  ASSERT_TRUE(worker.control->Await([](auto& s) { return s.begins == 1; }));
  coordinator.Send(0, Close(1));
  coordinator.Send(0, Close(99));  // not held: answered at once, behind the other
  const auto other = coordinator.AwaitCase(0, WorkerMessage::kReleased);
  ASSERT_TRUE(other && other->released().epoch() == 99);
  worker.control->Set([](auto& s) { s.hold_begin = false; });
  const auto next = coordinator.Await(
      0, [](const WorkerMessage& m) { return m.has_ready() || m.has_released(); });
  ASSERT_TRUE(next && next->has_released()) << next->DebugString();
  EXPECT_EQ(next->released().epoch(), 1u);
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

}  // namespace
}  // namespace lockstep
