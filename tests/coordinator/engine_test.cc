#include "coordinator/engine.h"

#include <gtest/gtest.h>

#include <chrono>
#include <future>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "tests/coordinator/engine_testing.h"

namespace lockstep {
namespace {

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

// Two plans in flight do not count the same time twice.
TEST_F(EngineTest, AStepBeginsWhenTheOneBeforeItEnds) {
  using Clock = std::chrono::steady_clock;
  StartWhole();
  control_->Hold(true);
  const Clock::time_point began = Clock::now();
  auto sink = Submit(Prompt({1, 2, 3}, 10));
  ASSERT_TRUE(control_->WaitForHeldPlans(2));
  const Clock::time_point both = Clock::now();
  while (Clock::now() < both + std::chrono::milliseconds(50)) std::this_thread::yield();
  control_->Hold(false);
  ExpectAnswer(*sink, {1, 2, 3}, 10);
  Settle();
  EXPECT_GE(observer_->steps, 10);
  EXPECT_GE(observer_->seconds, 0.05);
  EXPECT_LE(observer_->seconds, std::chrono::duration<double>(Clock::now() - began).count());
}

TEST_F(EngineTest, UnlessToldFourTimesWhatRunsMayWait) {
  control_->max_num_seqs = 40;
  StartWhole();
  EXPECT_EQ(engine_->Info().max_queued_requests, 160u);
}

TEST_F(EngineTest, UnlessToldAtLeast64MayWait) {
  control_->max_num_seqs = 8;
  StartWhole();
  EXPECT_EQ(engine_->Info().max_queued_requests, 64u);
}

// What the doors take a batch for that can never fit.
TEST_F(EngineTest, AnIdleGroupAdmitsAsManyAsItSays) {
  StartWhole();
  control_->Hold(true);
  const EngineInfo info = engine_->Info();
  EXPECT_EQ(info.max_num_seqs, control_->max_num_seqs);
  std::vector<std::shared_ptr<RecordingSink>> admitted;
  for (uint32_t i = 0; i < info.max_num_seqs + info.max_queued_requests; ++i) {
    admitted.push_back(Submit(Prompt({1, i}, 2)));
  }
  auto refused = Submit(Prompt({1}, 2));
  ASSERT_TRUE(refused->WaitForTerminal());
  EXPECT_EQ(refused->failure().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(refused->rejected());
  control_->Hold(false);
  for (uint32_t i = 0; i < admitted.size(); ++i) ExpectAnswer(*admitted[i], {1, i}, 2);
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
  waiting.reserve(3);
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

}  // namespace
}  // namespace lockstep
