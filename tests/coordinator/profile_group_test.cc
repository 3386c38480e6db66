// A profile from end to end without the doors: the worker group over gRPC, and
// sessions of workers whose model is a fake one.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "coordinator/group/grpc_worker_group.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/fakes/fake_host.h"
#include "wire/protocol.h"
#include "worker/comm/gloo_communicator.h"
#include "worker/grpc_plane.h"
#include "worker/session.h"

namespace lockstep {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

constexpr uint32_t kRanks = 2;

class Worker {
 public:
  Worker(const std::string& address, int rank) : control_(std::make_shared<fakes::HostControl>()) {
    SessionOptions options;
    options.hello.set_protocol_version(wire::kProtocolVersion);
    options.hello.set_instance(rank == 0 ? "zero" : "one");
    options.hello.set_host("here");
    options.hello.set_backend("cpu");
    options.hello.set_preferred_rank(rank);
    options.heartbeat_interval_ms = 20;
    options.runner.make_communicator = MakeGlooCommunicator;
    options.take_device_stats = [rank]() -> std::optional<worker::v1::DeviceStats> {
      worker::v1::DeviceStats stats;
      stats.set_sm_clock_mhz(1'000 + static_cast<uint32_t>(rank));
      if (rank == 0) stats.set_sm_active(2.0f);  // no share is above 1: not believed
      return stats;
    };
    session_ = std::make_unique<Session>(options, MakeGrpcPlane(address, false),
                                         std::make_unique<fakes::FakeHost>(control_));
    end_ = std::async(std::launch::async, [this] { return session_->Run(); });
  }
  ~Worker() { session_->Stop(); }

 private:
  const std::shared_ptr<fakes::HostControl> control_;
  std::unique_ptr<Session> session_;
  std::future<SessionEnd> end_;  // before session_ goes
};

class ProfileGroupTest : public ::testing::Test {
 protected:
  void SetUp() override {
    GroupOptions options;
    options.tp_size = kRanks;
    worker::v1::Configure& configure = options.configure;
    configure.set_group("g");
    configure.set_model_path("/model");
    configure.set_dtype("float32");
    configure.set_load_format("auto");
    configure.set_block_size(16);
    configure.set_max_batched_tokens(64);
    configure.set_max_model_len(128);
    configure.set_max_skew_ms(20'000);
    options.size = [](const std::vector<WorkerMemory>&) { return GroupSizes{8, 4}; };
    auto group = GrpcWorkerGroup::Listen("127.0.0.1:0", options);
    ASSERT_TRUE(group.ok()) << group.status();
    group_ = *std::move(group);
    for (uint32_t rank = 0; rank < kRanks; ++rank) {
      workers_.push_back(std::make_unique<Worker>(group_->address(), static_cast<int>(rank)));
    }
    group_->Start([this](const GroupEvent& event) { OnEvent(event); });
    stepper_ = std::thread([this] { Step(); });
    ASSERT_TRUE(Await([this] { return epoch_ != 0; }));
  }
  void TearDown() override {
    Pause(true);
    {
      const std::lock_guard lock(mutex_);
      over_ = true;
      changed_.notify_all();
    }
    stepper_.join();
    workers_.clear();
    group_.reset();
  }

  void OnEvent(const GroupEvent& event) {
    const std::lock_guard lock(mutex_);
    if (const auto* formed = std::get_if<GroupFormed>(&event)) epoch_ = formed->epoch;
    if (std::holds_alternative<GroupStep>(event)) ++answered_;
    if (std::holds_alternative<GroupFailed>(event)) over_ = true;
    changed_.notify_all();
  }
  // Two plans in flight for as long as nobody pauses it.
  void Step() {
    std::unique_lock lock(mutex_);
    while (!over_) {
      changed_.wait(lock,
                    [this] { return over_ || (!paused_ && epoch_ != 0 && sent_ < answered_ + 2); });
      if (over_) return;
      StepPlan plan;
      plan.epoch = epoch_;
      plan.step = ++sent_;
      plan.digest = sent_;
      plan.spans = {{Slot(0), 1}};
      lock.unlock();
      group_->Send(plan);
      lock.lock();
    }
  }
  void Pause(bool paused) {
    const std::lock_guard lock(mutex_);
    paused_ = paused;
    changed_.notify_all();
  }
  // On a thread of its own, once it runs; the attempts that find out are in its way.
  std::future<absl::StatusOr<std::string>> Begin(uint32_t steps, int64_t timeout_ms,
                                                 std::function<bool()> cancelled = {}) {
    auto profile = std::async(std::launch::async, [=, this] {
      while (true) {
        absl::StatusOr<std::string> trace = group_->Profile(steps, timeout_ms, cancelled);
        if (!absl::IsFailedPrecondition(trace.status())) return trace;
      }
    });
    absl::Status other;
    do {
      other = group_->Profile(1, 0, {}).status();
    } while (absl::IsDeadlineExceeded(other));  // it was there first
    EXPECT_TRUE(absl::IsFailedPrecondition(other)) << other;
    return profile;
  }
  template <typename Condition>
  bool Await(Condition condition) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(20), condition);
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  uint64_t epoch_ = 0, sent_ = 0, answered_ = 0;
  bool paused_ = true, over_ = false;
  std::unique_ptr<GrpcWorkerGroup> group_;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::thread stepper_;
};

std::map<int, std::vector<json>> StepsOf(const std::string& text) {
  const json trace = json::parse(text, nullptr, /*allow_exceptions=*/false);
  std::map<int, std::vector<json>> steps;
  if (trace.is_discarded()) return steps;
  for (const json& event : trace.at("traceEvents")) {
    if (event.at("ph") == "X" && event.at("tid") == 0) steps[event.at("pid")].push_back(event);
  }
  return steps;
}

TEST_F(ProfileGroupTest, EveryRankTracesTheSameSteps) {
  Pause(false);
  for (const uint32_t count : {1u, 20u, 3u}) {
    const absl::StatusOr<std::string> trace = group_->Profile(count, 20'000, {});
    ASSERT_TRUE(trace.ok()) << trace.status();
    const auto steps = StepsOf(*trace);
    ASSERT_EQ(steps.size(), kRanks);
    for (const auto& [rank, slices] : steps) {
      ASSERT_EQ(slices.size(), count);
      for (size_t i = 0; i < slices.size(); ++i) {
        EXPECT_EQ(slices[i]["args"]["step"], steps.at(0)[0]["args"]["step"].get<uint64_t>() + i);
        if (i == 0) continue;
        EXPECT_GE(slices[i]["ts"].get<double>(), slices[i - 1]["ts"].get<double>());
      }
      // Both ranks' first steps, a collective, lie close together on the axis.
      EXPECT_LT(slices[0]["ts"].get<double>(), 5e6);
    }
  }
  const uint64_t before = [&] {
    const std::lock_guard lock(mutex_);
    return answered_;
  }();
  EXPECT_TRUE(Await([&] { return answered_ > before + 10; }));
}

TEST_F(ProfileGroupTest, SaysThatNothingRanAndGivesWhatDid) {
  EXPECT_TRUE(absl::IsDeadlineExceeded(group_->Profile(5, 20, {}).status()));
  auto some = Begin(1'000, 2'000);
  Pause(false);
  ASSERT_TRUE(Await([this] { return answered_ >= 2; }));
  Pause(true);
  const absl::StatusOr<std::string> trace = some.get();
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_EQ(StepsOf(*trace).size(), kRanks);
}

TEST_F(ProfileGroupTest, OneAtATimeAndCancellable) {
  std::atomic<bool> cancelled = false;
  auto first = Begin(5, 60'000, [&] { return cancelled.load(); });
  cancelled = true;
  EXPECT_TRUE(absl::IsCancelled(first.get().status()));
  EXPECT_TRUE(absl::IsInvalidArgument(group_->Profile(0, 1, {}).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(group_->Profile(1'001, 1, {}).status()));
}

TEST_F(ProfileGroupTest, EndsWithTheEpoch) {
  auto lost = Begin(1'000, 60'000);
  Pause(false);
  ASSERT_TRUE(Await([this] { return answered_ >= 5; }));
  Pause(true);
  workers_.pop_back();
  const absl::Status status = lost.get().status();
  EXPECT_THAT(std::string(status.message()), HasSubstr("epoch ended"));
  EXPECT_TRUE(absl::IsUnavailable(group_->Profile(1, 1'000, {}).status()));
}

TEST_F(ProfileGroupTest, ShowsTheDevicesOfAWholeGroup) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  std::vector<DeviceFigures> devices;
  while (devices.size() < kRanks && std::chrono::steady_clock::now() < until) {
    devices = group_->Devices();
  }
  ASSERT_EQ(devices.size(), kRanks);
  for (uint32_t rank = 0; rank < kRanks; ++rank) {
    EXPECT_EQ(devices[rank].rank, rank);
    EXPECT_DOUBLE_EQ(devices[rank].sm_clock_hertz.value_or(0), 1e9 + rank * 1e6);
    EXPECT_FALSE(devices[rank].sm_active.has_value());
    EXPECT_FALSE(devices[rank].power_watts.has_value());
  }
}

}  // namespace
}  // namespace lockstep
