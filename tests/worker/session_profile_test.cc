// Profiles of a session: which steps they hold, when they are sent.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "tests/worker/session_testing.h"

namespace lockstep {
namespace {

CoordinatorMessage StartProfile(uint64_t id, uint32_t steps) {
  CoordinatorMessage message;
  message.mutable_profile_start()->set_id(id);
  message.mutable_profile_start()->set_steps(steps);
  return message;
}

// Says when it was started and stopped, and that `events` ran.
class FakeTrace final : public DeviceTrace {
 public:
  FakeTrace(std::vector<DeviceEvent> events, std::atomic<int>* starts, std::atomic<int>* stops)
      : events_(std::move(events)), starts_(starts), stops_(stops) {}
  absl::Status Start() override {
    ++*starts_;
    return absl::OkStatus();
  }
  absl::StatusOr<std::vector<DeviceEvent>> Stop() override {
    ++*stops_;
    return events_;
  }

 private:
  const std::vector<DeviceEvent> events_;
  std::atomic<int>*const starts_, *const stops_;
};

struct ProfiledWorker {
  explicit ProfiledWorker(std::vector<DeviceEvent> traced = {{"kernel", 5, 9, 7, 132, 256}})
      : events(std::move(traced)), worker(coordinator.address(), Options()) {
    coordinator.AwaitHello(0);
    coordinator.Send(0, Configure(1, 0, 1));
    EXPECT_TRUE(coordinator.AwaitCase(0, WorkerMessage::kReady));
  }
  SessionOptions Options() {
    SessionOptions options = TestWorker::Quick();
    options.runner.open_trace = [this]() -> absl::StatusOr<std::unique_ptr<DeviceTrace>> {
      return std::make_unique<FakeTrace>(events, &starts, &stops);
    };
    return options;
  }
  void Step(uint64_t step) {
    coordinator.Send(0, Plan(1, step));
    EXPECT_TRUE(coordinator.AwaitCase(0, WorkerMessage::kResult));
  }

  const std::vector<DeviceEvent> events;
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

TEST(SessionProfile, IsOverByItselfAfterTheMostStepsThatItMaySpan) {
  ProfiledWorker p;
  p.coordinator.Send(0, StartProfile(1, 2 * wire::kMaxProfileSteps));
  for (uint64_t step = 1; step <= wire::kMaxProfileSteps; ++step) p.Step(step);
  const auto part = p.coordinator.AwaitCase(0, WorkerMessage::kProfile);
  ASSERT_TRUE(part);
  EXPECT_EQ(part->profile().steps_size(), static_cast<int>(wire::kMaxProfileSteps));
}

// Each part names its own events.
TEST(SessionProfile, SendsMoreEventsThanAMessageTakesInParts) {
  std::vector<DeviceEvent> events = {{"copy", 0, 1, 7, 0, 0}};
  while (events.size() <= wire::kMaxProfileEvents) {
    events.push_back({"kernel", events.size(), events.size() + 2, 8, 132, 256});
  }
  ProfiledWorker p(events);
  p.coordinator.Send(0, StartProfile(4, 1));
  p.coordinator.Send(0, Plan(1, 1));
  size_t at = 0;
  for (const bool last : {false, true}) {
    const auto message = p.coordinator.AwaitCase(0, WorkerMessage::kProfile);
    ASSERT_TRUE(message);
    const worker::v1::ProfilePart& part = message->profile();
    EXPECT_EQ(part.id(), 4u);
    EXPECT_EQ(part.last(), last);
    EXPECT_EQ(part.steps_size(), last ? 0 : 1);
    ASSERT_EQ(part.events_size(), last ? 1 : wire::kMaxProfileEvents);
    for (const worker::v1::ProfileEvent& event : part.events()) {
      ASSERT_LT(event.name(), static_cast<uint32_t>(part.names_size()));
      ASSERT_EQ(part.names(static_cast<int>(event.name())), events[at].name) << at;
      ASSERT_EQ(event.begin_ns(), events[at].begin_ns);
      ASSERT_EQ(event.duration_ns(), events[at].end_ns - events[at].begin_ns);
      ASSERT_EQ(event.stream(), events[at].stream);
      ASSERT_EQ(event.blocks(), events[at].blocks);
      ASSERT_EQ(event.threads(), events[at].threads);
      ++at;
    }
  }
  EXPECT_EQ(at, events.size());
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

}  // namespace
}  // namespace lockstep
