// The engine thread against the real scheduler and a group under the test's
// control: what clients are told, and when.
#include "coordinator/engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <future>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "tests/fakes/fake_group.h"
#include "tests/fakes/recording_sink.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

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
  }
  std::atomic<bool> mismatch = false;
  std::atomic<int> steps = 0;
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
  std::unique_ptr<Engine> engine_;
  std::mutex mutex_;
  std::condition_variable changed_;
  EngineInfo info_;
};

TEST_F(EngineTest, RefusesRequestsWhileLoading) {
  Start();
  const auto refused = engine_->Submit(Prompt({1, 2}, 3), std::make_shared<RecordingSink>());
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(engine_->Info().state, EngineState::kLoading);
}

TEST_F(EngineTest, StreamsTokensInOrderWithOneTerminalCall) {
  StartWhole();
  auto a = Submit(Prompt({1, 2, 3}, 20));
  auto b = Submit(Prompt({4, 5, 6, 7, 8, 9}, 33));
  ExpectAnswer(*a, {1, 2, 3}, 20);
  ExpectAnswer(*b, {4, 5, 6, 7, 8, 9}, 33);
  EXPECT_EQ(a->reasons()[0], FinishReason::kLength);
}

TEST_F(EngineTest, EndsARequestAfterTheLastOfItsSequences) {
  StartWhole();
  Request request = Prompt({1, 2, 3}, 7);
  request.sampling.n = 3;
  auto sink = Submit(request);
  ASSERT_TRUE(sink->WaitForTerminal());
  EXPECT_EQ(sink->reasons().size(), 3u);
  for (uint32_t i = 0; i < 3; ++i) EXPECT_EQ(sink->tokens(i).size(), 7u);
  EXPECT_EQ(sink->misuse(), "");
}

TEST_F(EngineTest, TellsTheClientWhatAdmissionRefuses) {
  StartWhole();
  auto sink = Submit(Prompt(std::vector<TokenId>(500, 1), 3));
  ASSERT_TRUE(sink->WaitForTerminal());
  EXPECT_EQ(sink->failure().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(EngineTest, CancelledRequestIsForgottenAndItsBlocksComeBack) {
  StartWhole();
  control_->Hold(true);
  RequestId id;
  auto sink = Submit(Prompt({1, 2, 3}, 50), &id);
  control_->Answer(4);
  ASSERT_TRUE(sink->WaitForTokens(3));
  engine_->Cancel(id);
  std::weak_ptr<RecordingSink> alive = sink;
  sink.reset();
  control_->Hold(false);
  auto after = Submit(Prompt({9, 9}, 3));
  ExpectAnswer(*after, {9, 9}, 3);
  Settle();
  EXPECT_TRUE(alive.expired());
  const SchedulerStats stats = engine_->Stats();
  EXPECT_EQ(stats.running + stats.waiting, 0u);
  EXPECT_EQ(stats.blocks_active + stats.blocks_pending, 0u);
  EXPECT_EQ(stats.cancelled, 1u);
}

TEST_F(EngineTest, StoppedSequenceIsCompleteWithoutACall) {
  StartWhole();
  control_->Hold(true);
  Request request = Prompt({1, 2, 3}, 12);
  request.sampling.n = 2;
  RequestId id;
  auto sink = Submit(request, &id);
  control_->Answer(3);
  ASSERT_TRUE(sink->WaitForTokens(1, 1));
  engine_->Stop({id, 0});
  Settle();
  control_->Hold(false);
  // Only sequence 1 is left: when it ends, the request does, and the sink is let go.
  std::weak_ptr<RecordingSink> alive = sink;
  auto after = Submit(Prompt({9, 9}, 30));
  ExpectAnswer(*after, {9, 9}, 30);
  Settle();
  EXPECT_EQ(sink->reasons().count(0), 0u);
  EXPECT_EQ(sink->tokens(1).size(), 12u);
  sink.reset();
  EXPECT_TRUE(alive.expired());
}

TEST_F(EngineTest, KeepsTwoPlansInFlightAndNoMore) {
  StartWhole();
  control_->Hold(true);
  auto sink = Submit(Prompt({1, 2, 3}, 10));
  ASSERT_TRUE(control_->WaitForHeldPlans(2));
  Settle();
  EXPECT_EQ(control_->plans().size(), 2u);
  control_->Hold(false);
  ExpectAnswer(*sink, {1, 2, 3}, 10);
}

TEST_F(EngineTest, ContinuesStreamsAfterAGroupFailure) {
  StartWhole();
  control_->Hold(true);
  auto a = Submit(Prompt({1, 2, 3}, 25));
  auto b = Submit(Prompt({4, 5}, 25));
  control_->Answer(6);
  ASSERT_TRUE(a->WaitForTokens(4));
  control_->Fail("rank 1 (h:7): connection lost");
  ASSERT_TRUE(WaitForState(EngineState::kRecovering));
  EXPECT_THAT(std::string(engine_->Info().failure.message()), HasSubstr("rank 1"));
  auto c = Submit(Prompt({6}, 5));  // queues meanwhile
  control_->Hold(false);
  Form();
  ExpectAnswer(*a, {1, 2, 3}, 25);
  ExpectAnswer(*b, {4, 5}, 25);
  ExpectAnswer(*c, {6}, 5);
  EXPECT_EQ(engine_->Info().epoch, 2u);
}

TEST_F(EngineTest, QuarantinesTheRequestPresentAtTwoDeaths) {
  StartWhole();
  control_->Hold(true);
  auto poison = Submit(Prompt({1, 2, 3}, 25));
  control_->Answer(2);
  ASSERT_TRUE(poison->WaitForTokens(1));
  control_->Fail("rank 1 (h:7): connection lost");
  ASSERT_TRUE(WaitForState(EngineState::kRecovering));
  Form();
  control_->Answer(1);
  ASSERT_TRUE(control_->WaitForHeldPlans(1));
  control_->Fail("rank 1 (h:8): connection lost");
  ASSERT_TRUE(poison->WaitForTerminal());
  EXPECT_EQ(poison->failure().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(poison->failure().message()), HasSubstr("rank 1"));
  control_->Hold(false);
  Form();
  auto other = Submit(Prompt({8, 8}, 6));
  ExpectAnswer(*other, {8, 8}, 6);
  EXPECT_EQ(poison->misuse(), "");
}

TEST_F(EngineTest, GivesUpOnRequestsWhenRecoveryTakesTooLong) {
  options_.recovery_timeout_ms = 50;
  StartWhole();
  control_->Hold(true);
  auto running = Submit(Prompt({1, 2, 3}, 25));
  ASSERT_TRUE(control_->WaitForHeldPlans(1));
  control_->Fail("rank 1 (h:7): connection lost");
  ASSERT_TRUE(running->WaitForTerminal());
  EXPECT_EQ(running->failure().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(running->failure().message()), HasSubstr("rank 1"));
  ASSERT_TRUE(WaitForInfo([](const EngineInfo& info) {
    return info.failure.message().find("--recovery-timeout") != absl::string_view::npos;
  }));
  EXPECT_EQ(engine_->Submit(Prompt({1}, 1), std::make_shared<RecordingSink>()).status().code(),
            absl::StatusCode::kUnavailable);
  control_->Hold(false);
  Form();
  auto later = Submit(Prompt({8, 8}, 6));
  ExpectAnswer(*later, {8, 8}, 6);
}

TEST_F(EngineTest, FailureDuringRecoveryDoesNotStartTheTimeoutAgain) {
  options_.recovery_timeout_ms = 200;
  StartWhole();
  control_->Hold(true);
  auto running = Submit(Prompt({1, 2, 3}, 25));
  ASSERT_TRUE(control_->WaitForHeldPlans(1));
  const auto start = std::chrono::steady_clock::now();
  control_->Fail("first");
  std::atomic<bool> over = false;
  std::thread more([&] {  // an epoch that never forms fails again and again
    while (!over) {
      control_->Fail("again");
      std::this_thread::yield();
    }
  });
  EXPECT_TRUE(running->WaitForTerminal());
  over = true;
  more.join();
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
}

TEST_F(EngineTest, FatalFailureEndsServing) {
  StartWhole();
  control_->Hold(true);
  auto running = Submit(Prompt({1, 2, 3}, 25));
  ASSERT_TRUE(control_->WaitForHeldPlans(1));
  control_->Fail("rank 1 (h:7): model.safetensors: truncated", /*fatal=*/true);
  ASSERT_TRUE(running->WaitForTerminal());
  ASSERT_TRUE(WaitForState(EngineState::kFailed));
  EXPECT_THAT(std::string(engine_->Info().failure.message()), HasSubstr("truncated"));
  EXPECT_FALSE(engine_->Submit(Prompt({1}, 1), std::make_shared<RecordingSink>()).ok());
}

TEST_F(EngineTest, FatalFailureBeforeTheFirstEpochIsReported) {
  Start();
  control_->Fail("rank 0 (h:7): config.json differs", /*fatal=*/true);
  ASSERT_TRUE(WaitForState(EngineState::kFailed));
}

TEST_F(EngineTest, ALieEndsTheEpochAndTheAnswerIsStillRight) {
  StartWhole();
  control_->Hold(true);
  auto sink = Submit(Prompt({1, 2, 3}, 12));
  control_->Answer(4);
  ASSERT_TRUE(sink->WaitForTokens(3));
  control_->Lie(true);
  control_->Answer(1);
  ASSERT_TRUE(WaitForState(EngineState::kRecovering));
  EXPECT_EQ(control_->failed_epochs(), 1);
  control_->Lie(false);
  control_->Hold(false);
  Form();
  ExpectAnswer(*sink, {1, 2, 3}, 12);
}

TEST_F(EngineTest, PlansNothingBetweenALieAndTheEndOfItsEpoch) {
  StartWhole();
  control_->Hold(true);
  control_->HoldFailure(true);
  auto sink = Submit(Prompt({1, 2, 3}, 12));
  control_->Answer(2);
  ASSERT_TRUE(control_->WaitForHeldPlans(1));
  control_->Lie(true);
  control_->Answer(1);
  ASSERT_TRUE(control_->WaitForFailEpoch());
  const size_t planned = control_->plans().size();
  control_->Answer(1);  // of the plan that was under way: not to be believed either
  auto other = Submit(Prompt({7}, 3));
  Settle();
  EXPECT_EQ(control_->plans().size(), planned);
  EXPECT_EQ(control_->failed_epochs(), 1);
  control_->Lie(false);
  control_->Fail("rank 0 (h:7): token 1000 of 1000");
  ASSERT_TRUE(WaitForState(EngineState::kRecovering));
  control_->Hold(false);
  Form();
  ExpectAnswer(*sink, {1, 2, 3}, 12);
  ExpectAnswer(*other, {7}, 3);
}

TEST_F(EngineTest, ARecoveryInTimeIsNotHeldAgainstItLater) {
  options_.recovery_timeout_ms = 50;
  StartWhole();
  control_->Fail("rank 1 (h:7): connection lost");
  Form();
  control_->Hold(true);
  auto running = Submit(Prompt({1, 2, 3}, 12));
  Request brief = Prompt({4}, 50);
  brief.deadline_ms = engine_->NowMs() + 100;  // past the recovery timeout
  auto clock = Submit(brief);
  ASSERT_TRUE(clock->WaitForTerminal());
  EXPECT_FALSE(running->terminal());
  control_->Hold(false);
  ExpectAnswer(*running, {1, 2, 3}, 12);
}

TEST_F(EngineTest, BoundsItsInboxButAlwaysTakesCancels) {
  options_.inbox_capacity = 3;
  StartWhole();
  // A sink that keeps the engine thread busy until the test lets it go.
  class BlockingSink final : public RequestSink {
   public:
    void OnStarted(uint32_t) override {
      started.set_value();
      go.get_future().wait();
    }
    void OnPromptLogprobs(uint32_t, std::vector<TokenLogprobs>) override {}
    void OnToken(uint32_t, TokenId, std::optional<TokenLogprobs>) override {}
    void OnFinished(uint32_t, FinishReason, std::optional<TokenId>, uint32_t) override {}
    void OnFailed(const absl::Status&) override {}
    std::promise<void> started, go;
  };
  auto blocking = std::make_shared<BlockingSink>();
  ASSERT_TRUE(engine_->Submit(Prompt({1}, 2), blocking).ok());
  ASSERT_EQ(blocking->started.get_future().wait_for(std::chrono::seconds(20)),
            std::future_status::ready);
  std::vector<std::shared_ptr<RecordingSink>> waiting;
  RequestId last;
  for (int i = 0; i < 3; ++i) waiting.push_back(Submit(Prompt({2}, 3), &last));
  EXPECT_EQ(engine_->Submit(Prompt({3}, 3), std::make_shared<RecordingSink>()).status().code(),
            absl::StatusCode::kResourceExhausted);
  engine_->Cancel(last);
  blocking->go.set_value();
  ExpectAnswer(*waiting[0], {2}, 3);
  ExpectAnswer(*waiting[1], {2}, 3);
  Settle();
  EXPECT_FALSE(waiting[2]->terminal());
}

TEST_F(EngineTest, FailsARequestAtItsDeadline) {
  StartWhole();
  control_->Hold(true);
  Request request = Prompt({1, 2, 3}, 25);
  request.deadline_ms = engine_->NowMs() + 30;
  auto sink = Submit(request);
  control_->Answer(1);
  ASSERT_TRUE(sink->WaitForTerminal());
  EXPECT_EQ(sink->failure().code(), absl::StatusCode::kDeadlineExceeded);
}

TEST_F(EngineTest, DeadlinesPassWhileRecovering) {
  StartWhole();
  control_->Fail("rank 0 (h:7): connection lost");
  ASSERT_TRUE(WaitForState(EngineState::kRecovering));
  Request request = Prompt({1, 2, 3}, 25);
  request.deadline_ms = engine_->NowMs() + 30;
  auto sink = Submit(request);
  ASSERT_TRUE(sink->WaitForTerminal());
  EXPECT_EQ(sink->failure().code(), absl::StatusCode::kDeadlineExceeded);
}

TEST_F(EngineTest, DrawsASeedWhereNoneWasGiven) {
  StartWhole();
  control_->Hold(true);
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (TokenId i = 1; i <= 2; ++i) {
    Request request = Prompt({i, i}, 2);
    request.sampling.seed.reset();
    sinks.push_back(Submit(request));
  }
  control_->Hold(true);
  control_->Answer(1);
  control_->Hold(false);
  for (auto& sink : sinks) ASSERT_TRUE(sink->WaitForTerminal());
  std::vector<int64_t> seeds;
  for (const StepPlan& plan : control_->plans()) {
    for (const NewSequence& sequence : plan.new_sequences) seeds.push_back(sequence.sampling.seed);
  }
  ASSERT_EQ(seeds.size(), 2u);
  EXPECT_NE(seeds[0], seeds[1]);
}

TEST_F(EngineTest, DrainLetsRunningRequestsFinishAndTakesNoMore) {
  StartWhole();
  control_->Hold(true);
  auto running = Submit(Prompt({1, 2, 3}, 25));
  ASSERT_TRUE(control_->WaitForHeldPlans(1));
  std::thread drain([this] { engine_->Drain(20'000); });
  ASSERT_TRUE(WaitForState(EngineState::kDraining));
  EXPECT_EQ(engine_->Submit(Prompt({1}, 1), std::make_shared<RecordingSink>()).status().code(),
            absl::StatusCode::kUnavailable);
  control_->Hold(false);
  drain.join();
  ExpectAnswer(*running, {1, 2, 3}, 25);
  EXPECT_TRUE(control_->shut_down());
}

TEST_F(EngineTest, DrainSurvivesAGroupFailure) {
  StartWhole();
  control_->Hold(true);
  auto running = Submit(Prompt({1, 2, 3}, 25));
  ASSERT_TRUE(control_->WaitForHeldPlans(1));
  std::thread drain([this] { engine_->Drain(20'000); });
  ASSERT_TRUE(WaitForState(EngineState::kDraining));
  control_->Fail("rank 1 (h:7): connection lost");
  control_->Hold(false);
  control_->Form();
  drain.join();
  ExpectAnswer(*running, {1, 2, 3}, 25);
}

TEST_F(EngineTest, DrainEndsWhatDoesNotFinishInTime) {
  StartWhole();
  control_->Hold(true);
  auto stuck = Submit(Prompt({1, 2, 3}, 25));
  ASSERT_TRUE(control_->WaitForHeldPlans(1));
  engine_->Drain(30);
  ASSERT_TRUE(stuck->WaitForTerminal());
  EXPECT_EQ(stuck->failure().code(), absl::StatusCode::kUnavailable);
}

TEST_F(EngineTest, ShutdownLeavesNoRequestWithoutATerminalCall) {
  StartWhole();
  control_->Hold(true);
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (TokenId i = 0; i < 20; ++i) sinks.push_back(Submit(Prompt({i, i + 1}, 30)));
  engine_->Shutdown();
  for (auto& sink : sinks) {
    EXPECT_TRUE(sink->terminal());
    EXPECT_EQ(sink->failure().code(), absl::StatusCode::kUnavailable);
    EXPECT_EQ(sink->misuse(), "");
  }
  EXPECT_FALSE(engine_->Submit(Prompt({1}, 1), std::make_shared<RecordingSink>()).ok());
}

TEST_F(EngineTest, ManyClientsComeAndGoWhileTheGroupDies) {
  StartWhole();
  constexpr int kThreads = 4, kRequests = 60;
  std::atomic<int> finished = 0, cancelled = 0, failed = 0;
  std::vector<std::thread> clients;
  for (int t = 0; t < kThreads; ++t) {
    clients.emplace_back([&, t] {
      for (int i = 0; i < kRequests; ++i) {
        const std::vector<TokenId> prompt = {TokenId(t), TokenId(i), TokenId(i / 2)};
        RequestId id;
        auto sink = Submit(Prompt(prompt, 1 + i % 17), &id);
        if (i % 5 == 4) {
          engine_->Cancel(id);
          ++cancelled;
          continue;
        }
        ASSERT_TRUE(sink->WaitForTerminal());
        EXPECT_EQ(sink->misuse(), "");
        if (!sink->failure().ok()) {
          EXPECT_EQ(sink->failure().code(), absl::StatusCode::kUnavailable);
          ++failed;
          continue;
        }
        EXPECT_EQ(sink->tokens(), FakeAnswer(prompt, 5, 1 + i % 17));
        ++finished;
      }
    });
  }
  for (int death = 0; death < 20; ++death) {
    control_->Fail("rank 1 (h:7): connection lost");
    ASSERT_TRUE(WaitForState(EngineState::kRecovering));
    Form();
  }
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(finished + failed + cancelled, kThreads * kRequests);
  Settle();
  const SchedulerStats stats = engine_->Stats();
  EXPECT_EQ(stats.running + stats.waiting, 0u);
  EXPECT_EQ(stats.blocks_free + stats.blocks_cached, control_->num_kv_blocks);
}

}  // namespace
}  // namespace lockstep
