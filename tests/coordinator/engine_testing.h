// The engine thread against the real scheduler and a group under the test's
// control: what clients are told, and when.
#ifndef LOCKSTEP_TESTS_COORDINATOR_ENGINE_TESTING_H_
#define LOCKSTEP_TESTS_COORDINATOR_ENGINE_TESTING_H_

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "coordinator/engine.h"
#include "tests/fakes/fake_group.h"
#include "tests/fakes/recording_sink.h"

namespace lockstep {

// Every step is reported with the plan it answers.
class CheckingObserver final : public EngineObserver {
 public:
  void OnStep(const StepPlan& plan, const GroupStep& step, double plan_seconds,
              double step_seconds) override {
    if (plan.step != step.result.step || plan.epoch != step.result.epoch || plan_seconds < 0 ||
        step_seconds < 0) {
      mismatch = true;
    }
    ++steps;
    seconds = seconds + step_seconds;
  }
  std::atomic<bool> mismatch = false;
  void OnRejected(const absl::Status&) override { ++rejections; }
  std::atomic<int> steps = 0;
  std::atomic<double> seconds = 0;  // of all steps
  std::atomic<int> rejections = 0;
};

class EngineTest : public ::testing::Test {
 protected:
  ~EngineTest() override {
    if (engine_ != nullptr) engine_->Shutdown();
    EXPECT_EQ(control_->complaint(), "");
    EXPECT_FALSE(observer_->mismatch);
  }

  void Start() {
    options_.scheduler.block_size = control_->block_size;
    options_.scheduler.max_model_len = 128;
    options_.scheduler.max_batched_tokens = 32;
    options_.scheduler.vocab_size = kFakeVocab;
    options_.scheduler.max_queued_requests = 0;
    options_.on_change = [this](const EngineInfo& info) {
      if (on_change_) on_change_(info);
      const std::lock_guard lock(mutex_);
      info_ = info;
      changed_.notify_all();
    };
    engine_ = std::make_unique<Engine>(options_, std::make_unique<FakeGroup>(control_), observer_);
    engine_->Start();
  }
  void StartWhole() {
    Start();
    Form();
  }
  void Form() {
    control_->Form();
    ASSERT_TRUE(WaitForState(EngineState::kReady));
  }

  bool WaitForState(EngineState state) {
    return WaitForInfo([state](const EngineInfo& info) { return info.state == state; });
  }
  template <typename F>
  bool WaitForInfo(F condition) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(20), [&] { return condition(info_); });
  }
  // The engine thread has handled what was said before, and shows it: the second
  // request it refuses comes after the first one's iteration.
  void Settle() {
    for (int i = 0; i < 2; ++i) {
      auto sink = std::make_shared<RecordingSink>();
      ASSERT_TRUE(engine_->Submit(Prompt(std::vector<TokenId>(10'000, 1), 1), sink).ok());
      ASSERT_TRUE(sink->WaitForTerminal());
    }
  }

  static Request Prompt(std::vector<TokenId> tokens, uint32_t max_tokens, int64_t seed = 5) {
    Request request;
    request.prompt = std::move(tokens);
    request.sampling.max_tokens = max_tokens;
    request.sampling.seed = seed;
    return request;
  }
  std::shared_ptr<RecordingSink> Submit(Request request, RequestId* id = nullptr) {
    auto sink = std::make_shared<RecordingSink>(request.sampling.n);
    const absl::StatusOr<RequestId> taken = engine_->Submit(std::move(request), sink);
    EXPECT_TRUE(taken.ok()) << taken.status();
    if (taken.ok() && id != nullptr) *id = *taken;
    return sink;
  }
  void ExpectAnswer(RecordingSink& sink, const std::vector<TokenId>& prompt, size_t n,
                    int64_t seed = 5) {
    ASSERT_TRUE(sink.WaitForTerminal());
    EXPECT_TRUE(sink.failure().ok()) << sink.failure();
    EXPECT_EQ(sink.tokens(), FakeAnswer(prompt, seed, n));
    EXPECT_EQ(sink.starts(), 1);
    EXPECT_EQ(sink.misuse(), "");
  }

  std::shared_ptr<FakeGroupControl> control_ = std::make_shared<FakeGroupControl>();
  std::shared_ptr<CheckingObserver> observer_ = std::make_shared<CheckingObserver>();
  EngineOptions options_;
  std::function<void(const EngineInfo&)> on_change_;  // first, on the engine thread
  std::unique_ptr<Engine> engine_;
  std::mutex mutex_;
  std::condition_variable changed_;
  EngineInfo info_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_COORDINATOR_ENGINE_TESTING_H_
