// Engine, scheduler and group over real gRPC streams, under fire: workers die,
// freeze and lie while clients stream; every answer must come out as if nothing
// had happened, or end with a status that names the rank.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/engine.h"
#include "coordinator/group/grpc_worker_group.h"
#include "tests/fakes/fake_slots.h"
#include "tests/fakes/fake_worker.h"
#include "tests/fakes/recording_sink.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;

constexpr uint32_t kBlocks = 96;

class EngineGroupTest : public ::testing::Test {
 protected:
  ~EngineGroupTest() override {
    if (engine_ != nullptr) engine_->Shutdown();
  }

  void Start(uint32_t tp_size) {
    GroupOptions group_options;
    group_options.tp_size = tp_size;
    group_options.configure.set_block_size(4);
    group_options.size = [](const std::vector<WorkerMemory>&) { return GroupSizes{kBlocks, 16}; };
    auto group = GrpcWorkerGroup::Listen(
        absl::StrCat("unix:", ::testing::TempDir(), "/engine-", getpid(), ".sock"), group_options);
    ASSERT_TRUE(group.ok()) << group.status();
    address_ = (*group)->address();
    EngineOptions options;
    options.scheduler.block_size = 4;
    options.scheduler.max_model_len = 128;
    options.scheduler.max_batched_tokens = 48;
    options.scheduler.vocab_size = kFakeVocab;
    options.scheduler.max_queued_requests = 1'000;
    options.recovery_timeout_ms = 30'000;
    options.on_change = [this](const EngineInfo& info) {
      const std::lock_guard lock(mutex_);
      info_ = info;
      changed_.notify_all();
    };
    engine_ = std::make_unique<Engine>(options, *std::move(group), nullptr);
    engine_->Start();
    for (uint32_t i = 0; i < tp_size; ++i) workers_.push_back(NewWorker());
    ASSERT_TRUE(WaitForEpoch(1));
  }
  std::unique_ptr<FakeWorker> NewWorker() {
    FakeWorkerOptions options;
    options.address = address_;
    return std::make_unique<FakeWorker>(options);
  }
  bool WaitForEpoch(uint64_t epoch) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(30), [&] {
      return info_.state == EngineState::kReady && info_.epoch >= epoch;
    });
  }
  bool WaitUntilNotReady() {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(30),
                             [&] { return info_.state != EngineState::kReady; });
  }
  std::shared_ptr<RecordingSink> Submit(const std::vector<TokenId>& prompt, uint32_t max_tokens) {
    Request request;
    request.prompt = prompt;
    request.sampling.max_tokens = max_tokens;
    request.sampling.seed = 5;
    auto sink = std::make_shared<RecordingSink>();
    EXPECT_TRUE(engine_->Submit(std::move(request), sink).ok());
    return sink;
  }
  // Waits until nothing runs and says how many blocks came back.
  uint32_t ReusableBlocks() {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    SchedulerStats stats;
    do {
      stats = engine_->Stats();
      std::this_thread::yield();
    } while ((stats.running + stats.waiting > 0 || stats.blocks_pending > 0) &&
             std::chrono::steady_clock::now() < end);
    return stats.blocks_free + stats.blocks_cached;
  }

  std::string address_;
  std::mutex mutex_;
  std::condition_variable changed_;
  EngineInfo info_;
  std::unique_ptr<Engine> engine_;
  std::vector<std::unique_ptr<FakeWorker>> workers_;
};

TEST_F(EngineGroupTest, AnswersThroughTwoRanks) {
  Start(2);
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (TokenId i = 0; i < 40; ++i) sinks.push_back(Submit({i, i + 1, i + 2}, 1 + i));
  for (TokenId i = 0; i < 40; ++i) {
    ASSERT_TRUE(sinks[i]->WaitForTerminal());
    EXPECT_EQ(sinks[i]->tokens(), FakeAnswer({i, i + 1, i + 2}, 5, 1 + i));
  }
  EXPECT_EQ(ReusableBlocks(), kBlocks);
  EXPECT_EQ(workers_[0]->plans(), workers_[1]->plans());
  EXPECT_EQ(workers_[0]->complaint() + workers_[1]->complaint(), "");
}

TEST_F(EngineGroupTest, AnswersOutliveKilledWorkers) {
  Start(2);
  std::mt19937 random(7);
  constexpr int kDeaths = 40;
  std::atomic<bool> over = false;
  std::atomic<int> right = 0, unavailable = 0;
  std::vector<std::thread> clients;
  for (TokenId c = 0; c < 8; ++c) {
    clients.emplace_back([&, c] {
      for (TokenId i = 0; !over; ++i) {
        const std::vector<TokenId> prompt = {c, i, 3, i / 4, c};
        const uint64_t epoch = engine_->Info().epoch;
        auto sink = Submit(prompt, 5 + (i * 7 + c) % 60);
        ASSERT_TRUE(sink->WaitForTerminal());
        EXPECT_EQ(sink->misuse(), "");
        const std::vector<TokenId> full = FakeAnswer(prompt, 5, 5 + (i * 7 + c) % 60);
        const std::vector<TokenId> tokens = sink->tokens();
        if (sink->failure().ok()) {
          EXPECT_EQ(tokens, full);
          ++right;
        } else {  // present at two deaths: a prefix, and the rank
          ASSERT_LE(tokens.size(), full.size());
          EXPECT_TRUE(std::equal(tokens.begin(), tokens.end(), full.begin()));
          EXPECT_EQ(sink->failure().code(), absl::StatusCode::kUnavailable);
          EXPECT_THAT(std::string(sink->failure().message()), HasSubstr("rank"));
          EXPECT_GT(engine_->Info().epoch, epoch) << "failed at its first death";
          ++unavailable;
        }
      }
    });
  }
  for (int death = 0; death < kDeaths; ++death) {
    ASSERT_TRUE(WaitForEpoch(static_cast<uint64_t>(death) + 1));
    const size_t victim = random() % 2;
    (void)workers_[victim]->WaitForSteps(1 + random() % 20);
    workers_[victim]->Die();
    ASSERT_TRUE(WaitUntilNotReady());
    workers_[victim] = NewWorker();
  }
  ASSERT_TRUE(WaitForEpoch(kDeaths + 1));
  over = true;
  for (std::thread& client : clients) client.join();
  EXPECT_GT(right, 0);
  EXPECT_EQ(ReusableBlocks(), kBlocks);
  EXPECT_EQ(workers_[0]->complaint() + workers_[1]->complaint(), "");
  RecordProperty("right", right);
  RecordProperty("unavailable", unavailable);
}

TEST_F(EngineGroupTest, AnAnswerPausesWhileAFrozenWorkerIsReplaced) {
  Start(2);
  auto sink = Submit({1, 2, 3}, 100);
  ASSERT_TRUE(sink->WaitForTokens(5));
  workers_[1]->Freeze();
  ASSERT_TRUE(WaitUntilNotReady() || sink->terminal());
  auto replacement = NewWorker();
  ASSERT_TRUE(sink->WaitForTerminal());
  EXPECT_EQ(sink->tokens(), FakeAnswer({1, 2, 3}, 5, 100));
  workers_[1]->Thaw();
  EXPECT_TRUE(workers_[1]->WaitForEnd());
}

TEST_F(EngineGroupTest, AWrongDigestCostsAnEpochNotAnAnswer) {
  Start(2);
  auto sink = Submit({4, 5}, 60);
  ASSERT_TRUE(sink->WaitForTokens(2));
  workers_[0]->LieAboutDigest(true);
  ASSERT_TRUE(WaitUntilNotReady() || sink->terminal());
  auto replacement = NewWorker();
  ASSERT_TRUE(sink->WaitForTerminal());
  EXPECT_EQ(sink->tokens(), FakeAnswer({4, 5}, 5, 60));
}

}  // namespace
}  // namespace lockstep
