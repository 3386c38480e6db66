// What clients are told when the group fails, lies or takes long to come back.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "tests/coordinator/engine_testing.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;

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

// What the inbox took before it was told to refuse is seen a round later.
TEST_F(EngineTest, RefusesWhatComesWhileRecoveryIsGivenUp) {
  options_.recovery_timeout_ms = 0;
  std::shared_ptr<RecordingSink> late;
  on_change_ = [&](const EngineInfo& info) {  // given up in the round that brings the news
    if (info.state == EngineState::kRecovering && late == nullptr) late = Submit(Prompt({1}, 1));
  };
  StartWhole();
  control_->Hold(true);
  auto running = Submit(Prompt({1, 2, 3}, 25));
  ASSERT_TRUE(control_->WaitForHeldPlans(1));
  control_->Fail("rank 1 (h:7): connection lost");
  ASSERT_TRUE(WaitForInfo([](const EngineInfo& info) {
    return info.failure.message().find("--recovery-timeout") != absl::string_view::npos;
  }));
  ASSERT_TRUE(running->WaitForTerminal());
  ASSERT_TRUE(late->WaitForTerminal());
  // Each is counted once: what had been admitted has failed, the other was refused.
  EXPECT_FALSE(running->rejected());
  EXPECT_TRUE(late->rejected());
  EXPECT_EQ(observer_->rejections, 1);
  EXPECT_EQ(late->failure().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(late->failure().message()), HasSubstr("--recovery-timeout"));
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
  ASSERT_TRUE(control_->WaitForHeldPlans(2));
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

TEST_F(EngineTest, DrainSurvivesAGroupFailure) {
  StartWhole();
  control_->Hold(true);
  auto running = Submit(Prompt({1, 2, 3}, 25));
  ASSERT_TRUE(control_->WaitForHeldPlans(1));
  std::thread drain([this] { engine_->Drain(20'000); });
  ASSERT_TRUE(WaitForState(EngineState::kDraining));
  EXPECT_TRUE(engine_->Info().whole);
  control_->Fail("rank 1 (h:7): connection lost");
  EXPECT_TRUE(WaitForInfo(
      [](const EngineInfo& info) { return info.state == EngineState::kDraining && !info.whole; }));
  control_->Hold(false);
  control_->Form();
  drain.join();
  ExpectAnswer(*running, {1, 2, 3}, 25);
}

TEST_F(EngineTest, DrainingDoesNotHideAFatalFailure) {
  StartWhole();
  control_->Hold(true);
  auto running = Submit(Prompt({1, 2, 3}, 25));
  ASSERT_TRUE(control_->WaitForHeldPlans(1));
  std::thread drain([this] { engine_->Drain(20'000); });
  EXPECT_TRUE(WaitForState(EngineState::kDraining));
  control_->Fail("rank 1 (h:7): model.safetensors: truncated", /*fatal=*/true);
  EXPECT_TRUE(running->WaitForTerminal());
  EXPECT_TRUE(WaitForState(EngineState::kFailed));
  drain.join();
}

TEST_F(EngineTest, ManyClientsComeAndGoWhileTheGroupDies) {
  StartWhole();
  constexpr int kThreads = 4, kDeaths = 20;
  std::atomic<bool> over = false;
  std::atomic<int> finished = 0;
  std::vector<std::thread> clients;
  clients.reserve(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    clients.emplace_back([&, t] {
      for (int i = 0; !over; ++i) {
        const std::vector<TokenId> prompt = {TokenId(t), TokenId(i % 500), TokenId(i / 2 % 500)};
        const uint64_t epoch = engine_->Info().epoch;
        RequestId id;
        auto sink = Submit(Prompt(prompt, 1 + i % 17), &id);
        if (i % 5 == 4) {
          engine_->Cancel(id);
          continue;
        }
        ASSERT_TRUE(sink->WaitForTerminal());
        EXPECT_EQ(sink->misuse(), "");
        if (!sink->failure().ok()) {
          EXPECT_EQ(sink->failure().code(), absl::StatusCode::kUnavailable);
          EXPECT_GT(engine_->Info().epoch, epoch) << "failed at its first death";
          continue;
        }
        EXPECT_EQ(sink->tokens(), FakeAnswer(prompt, 5, 1 + i % 17));
        ++finished;
      }
    });
  }
  for (int death = 0; death < kDeaths; ++death) {
    control_->Hold(true);
    EXPECT_TRUE(control_->WaitForHeldPlans(1));  // somebody is present
    control_->Fail("rank 1 (h:7): connection lost");
    EXPECT_TRUE(WaitForState(EngineState::kRecovering));
    const int before = finished;
    control_->Hold(false);
    Form();
    const auto patience = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (finished == before && std::chrono::steady_clock::now() < patience) {
      std::this_thread::yield();
    }
    EXPECT_GT(finished, before);
  }
  over = true;
  for (std::thread& client : clients) client.join();
  Settle();
  const SchedulerStats stats = engine_->Stats();
  EXPECT_EQ(stats.running + stats.waiting, 0u);
  EXPECT_EQ(stats.blocks_free + stats.blocks_cached, control_->num_kv_blocks);
}

}  // namespace
}  // namespace lockstep
