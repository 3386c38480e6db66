// Workers and the coordinator killed, stopped and resumed under running streams.
#include <signal.h>
#include <sys/wait.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/fakes/process_state.h"
#include "tests/fakes/temp_dir.h"
#include "tests/integration/test_server.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

std::string Prompt(int i) { return absl::StrCat("Count from ", i + 1, " to ", i + 60, "."); }

class FaultTest : public ::testing::Test {
 protected:
  void Serve(int tp_size, std::vector<std::string> flags = {}) {
    flags.insert(flags.end(), {"--dtype", "float32"});
    served_ = TestServer::Start(DemoModel(), tp_size, flags);
    ASSERT_NE(served_, nullptr);
  }

  std::vector<uint32_t> FaultFree(const std::string& prompt, uint32_t max_tokens) {
    StreamedAnswer answer(&served_->client(), LongGreedy(prompt, max_tokens));
    EXPECT_TRUE(answer.Await().ok()) << answer.Await();
    return answer.token_ids();
  }

  std::unique_ptr<StreamedAnswer> Stream(int i, uint32_t max_tokens) {
    return std::make_unique<StreamedAnswer>(&served_->client(), LongGreedy(Prompt(i), max_tokens));
  }

  void ExpectAllBlocksBack() {
    EXPECT_TRUE(Eventually([&] {
      return served_->Metric("lockstep_kv_blocks{state=\"active\"}") == 0 &&
             served_->Metric("lockstep_kv_blocks{state=\"pending\"}") == 0;
    })) << HttpRequest(served_->server().http_port(), "GET", "/metrics");
    EXPECT_EQ(served_->Metric("lockstep_kv_blocks{state=\"free\"}") +
                  served_->Metric("lockstep_kv_blocks{state=\"cached\"}"),
              served_->Info().num_kv_blocks());
  }

  std::unique_ptr<TestServer> served_;
};

class KilledRankTest : public FaultTest, public ::testing::WithParamInterface<int> {};

TEST_P(KilledRankTest, StreamsPauseAndGoOnWithTheSameTokens) {
  constexpr uint32_t kTokens = 400;
  ASSERT_NO_FATAL_FAILURE(Serve(2));
  std::vector<std::vector<uint32_t>> expected;
  for (int i = 0; i < 4; ++i) expected.push_back(FaultFree(Prompt(i), kTokens));
  const uint64_t epoch = served_->Info().epoch();

  std::vector<std::unique_ptr<StreamedAnswer>> streams;
  for (int i = 0; i < 4; ++i) streams.push_back(Stream(i, kTokens));
  for (auto& stream : streams) stream->AwaitTokens(20);
  const size_t before = streams[0]->size();
  ASSERT_LT(before, kTokens) << "the stream ended before the fault";
  const auto killed = std::chrono::steady_clock::now();
  kill(served_->WorkerPid(GetParam()), SIGKILL);
  // Known from the stream's end, at once; a host of two cores may be elsewhere.
  EXPECT_TRUE(Eventually([&] {
    const v1::GetModelInfoResponse info = served_->Info();
    return !info.ready() || info.epoch() > epoch;
  }));
  EXPECT_LE(std::chrono::steady_clock::now() - killed,
            std::thread::hardware_concurrency() >= 8 ? std::chrono::milliseconds(250) : Bound(2));
  // Two tokens may still have been on their way.
  streams[0]->AwaitTokens(std::min<size_t>(kTokens, before + 8));
  const auto pause = std::chrono::steady_clock::now() - killed;
  EXPECT_LE(pause, Bound(5));

  for (int i = 0; i < 4; ++i) {
    ASSERT_TRUE(streams[static_cast<size_t>(i)]->Await().ok())
        << streams[static_cast<size_t>(i)]->Await() << served_->server().Log();
    EXPECT_EQ(streams[static_cast<size_t>(i)]->token_ids(), expected[static_cast<size_t>(i)]);
    EXPECT_EQ(streams[static_cast<size_t>(i)]->finishes(), 1);
  }
  EXPECT_GT(served_->Info().epoch(), epoch);
  ExpectAllBlocksBack();
}

INSTANTIATE_TEST_SUITE_P(Ranks, KilledRankTest, ::testing::Values(0, 1));

// LOCKSTEP_KILLS=N: a night's worth instead of a few.
TEST_F(FaultTest, RandomKillsLoseNoStream) {
  constexpr int kStreams = 16;
  const char* const asked = std::getenv("LOCKSTEP_KILLS");
  const int kills = asked == nullptr ? 6 : std::atoi(asked);
  constexpr uint32_t kTokens = 120;
  ASSERT_NO_FATAL_FAILURE(Serve(2));
  std::vector<std::vector<uint32_t>> expected;
  for (int i = 0; i < kStreams; ++i) expected.push_back(FaultFree(Prompt(i), kTokens));
  std::mt19937 random(20261121);
  for (int round = 0; round < kills; ++round) {
    const uint64_t epoch = served_->AwaitEpochAbove(0).epoch();
    std::vector<std::unique_ptr<StreamedAnswer>> streams;
    for (int i = 0; i < kStreams; ++i) streams.push_back(Stream(i, kTokens));
    streams[0]->AwaitTokens(random() % kTokens);
    kill(served_->WorkerPid(static_cast<int>(random() % 2)), SIGKILL);
    for (int i = 0; i < kStreams; ++i) {
      auto& stream = *streams[static_cast<size_t>(i)];
      ASSERT_TRUE(stream.Await().ok()) << stream.Await() << served_->server().Log();
      EXPECT_EQ(stream.token_ids(), expected[static_cast<size_t>(i)]) << "round " << round;
    }
    served_->AwaitEpochAbove(epoch);
    ExpectAllBlocksBack();
  }
}

TEST_F(FaultTest, APauseOfHalfASecondKillsNobody) {
  ASSERT_NO_FATAL_FAILURE(Serve(2));
  const uint64_t epoch = served_->Info().epoch();
  const pid_t worker = served_->WorkerPid(1);
  const std::vector<uint32_t> expected = FaultFree(Prompt(0), 300);
  auto stream = Stream(0, 300);
  stream->AwaitTokens(10);
  kill(worker, SIGSTOP);
  const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(500);
  EXPECT_TRUE(Eventually([&] { return std::chrono::steady_clock::now() >= until; }));
  kill(worker, SIGCONT);
  ASSERT_TRUE(stream->Await().ok()) << stream->Await();
  EXPECT_EQ(stream->token_ids(), expected);
  EXPECT_EQ(served_->Info().epoch(), epoch);
  EXPECT_EQ(served_->WorkerPid(1), worker);
}

TEST_F(FaultTest, AWorkerStoppedForEverIsReplaced) {
  ASSERT_NO_FATAL_FAILURE(Serve(2));
  const std::vector<uint32_t> expected = FaultFree(Prompt(0), 300);
  const uint64_t epoch = served_->Info().epoch();
  const pid_t worker = served_->WorkerPid(1);
  auto stream = Stream(0, 300);
  stream->AwaitTokens(10);
  const auto stopped = std::chrono::steady_clock::now();
  kill(worker, SIGSTOP);
  EXPECT_TRUE(Eventually([&] { return !served_->Info().ready(); }));
  EXPECT_LE(std::chrono::steady_clock::now() - stopped, Bound(3));
  // A stopped process cannot end itself; whoever stopped it ends it.
  kill(worker, SIGKILL);
  ASSERT_TRUE(stream->Await().ok()) << stream->Await() << served_->server().Log();
  EXPECT_EQ(stream->token_ids(), expected);
  EXPECT_GT(served_->Info().epoch(), epoch);
  ExpectAllBlocksBack();
}

TEST_F(FaultTest, TheSecondDeathEndsARequestAndNamesTheRank) {
  ASSERT_NO_FATAL_FAILURE(Serve(2));
  auto stream = Stream(0, 1500);
  for (int death = 0; death < 2; ++death) {
    const uint64_t epoch = served_->AwaitEpochAbove(0).epoch();
    stream->AwaitTokens(stream->size() + 5);
    ASSERT_FALSE(stream->done());
    kill(served_->WorkerPid(1), SIGKILL);
    served_->AwaitEpochAbove(epoch);
  }
  const absl::Status status = stream->Await();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 1"));
  ExpectAllBlocksBack();
  EXPECT_EQ(FaultFree(Prompt(0), 20).size(), 20u);
}

// With a copy of the model that may be changed.
class ChangedModelTest : public FaultTest {
 protected:
  void ServeCopy(std::vector<std::string> flags) {
    fs::copy(DemoModel(), model());
    flags.insert(flags.end(), {"--dtype", "float32"});
    served_ = TestServer::Start(model().string(), 2, flags);
    ASSERT_NE(served_, nullptr);
  }
  void TearDown() override { served_.reset(); }
  fs::path model() const { return folder_.File("demo"); }
  fs::path away() const { return folder_.File("away"); }
  bool Said(const std::string& text) {
    return served_->server().Log().find(text) != std::string::npos;
  }

  TempDir folder_;
};

TEST_F(ChangedModelTest, AModelThatIsGoneForAMomentCostsNoStream) {
  ASSERT_NO_FATAL_FAILURE(ServeCopy({}));
  const std::vector<uint32_t> expected = FaultFree(Prompt(0), 1500);
  auto stream = Stream(0, 1500);
  stream->AwaitTokens(10);
  fs::rename(model(), away());
  kill(served_->WorkerPid(1), SIGKILL);
  EXPECT_TRUE(Eventually([&] { return Said("demo: cannot open"); })) << served_->server().Log();
  EXPECT_FALSE(stream->done());
  fs::rename(away(), model());
  ASSERT_TRUE(stream->Await().ok()) << stream->Await() << served_->server().Log();
  EXPECT_EQ(stream->token_ids(), expected);
}

// Otherwise one rank would go on with the old weights and one with the new.
TEST_F(ChangedModelTest, WeightsThatWereReplacedMeanwhileDoNotJoinTheOldOnes) {
  ASSERT_NO_FATAL_FAILURE(ServeCopy({"--recovery-timeout", "2"}));
  auto stream = Stream(0, 1500);
  stream->AwaitTokens(10);
  const fs::path weights = model() / "model.safetensors";
  const auto size = fs::file_size(weights);
  std::fstream file(weights, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(static_cast<std::streamoff>(size / 2));
  file << std::string(size / 2, '\x3c');
  file.close();
  kill(served_->WorkerPid(1), SIGKILL);
  const absl::Status ended = stream->Await();
  EXPECT_EQ(ended.code(), absl::StatusCode::kUnavailable) << ended;
  const int status = served_->server().AwaitEnd(static_cast<int>(Bound(20).count()));
  ASSERT_TRUE(WIFEXITED(status)) << served_->server().Log();
  EXPECT_EQ(WEXITSTATUS(status), 1);
  EXPECT_TRUE(Said("not the model that the coordinator has, or not any more"));
}

TEST_F(FaultTest, AKilledCoordinatorEndsStreamsAndWorkersReattach) {
  ASSERT_NO_FATAL_FAILURE(Serve(2, {"--grpc-port", "0"}));
  const std::vector<pid_t> workers = {served_->WorkerPid(0), served_->WorkerPid(1)};
  auto stream = Stream(0, 1500);
  stream->AwaitTokens(5);
  kill(served_->CoordinatorPid(), SIGKILL);
  const auto killed = std::chrono::steady_clock::now();
  EXPECT_EQ(stream->Await().code(), absl::StatusCode::kUnavailable);
  EXPECT_LE(std::chrono::steady_clock::now() - killed, Bound(1));
  // The new coordinator has ports of its own.
  const auto ports = [&] {
    std::vector<std::string> found;
    const std::string log = served_->server().Log();
    const std::string before = ", gRPC ";
    for (size_t at = 0; (at = log.find(before, at)) != std::string::npos;) {
      at += before.size();
      const size_t end = log.find(';', at);
      if (end != std::string::npos) found.push_back(log.substr(at, end - at));
    }
    return found;
  };
  ASSERT_TRUE(Eventually([&] { return ports().size() == 2; })) << served_->server().Log();
  Client client("127.0.0.1:" + ports()[1]);
  const absl::StatusOr<v1::GetModelInfoResponse> info = client.WaitReady(10'000 * kSlowdown);
  ASSERT_TRUE(info.ok()) << info.status() << served_->server().Log();
  for (const v1::RankInfo& rank : info->ranks()) {
    EXPECT_EQ(static_cast<pid_t>(rank.pid()), workers.at(rank.rank()));
  }
  EXPECT_EQ(info->ranks_size(), 2);
  StreamedAnswer answer(&client, LongGreedy(Prompt(0), 20));
  EXPECT_TRUE(answer.Await().ok()) << answer.Await();
  EXPECT_EQ(answer.token_ids().size(), 20u);
}

TEST_F(FaultTest, SigtermDrainsRunningStreams) {
  ASSERT_NO_FATAL_FAILURE(Serve(2, {"--drain-timeout", std::to_string(Bound(100).count())}));
  const std::vector<uint32_t> expected = FaultFree(Prompt(0), 600);
  std::vector<std::unique_ptr<StreamedAnswer>> streams;
  for (int i = 0; i < 4; ++i) streams.push_back(Stream(0, 600));
  for (auto& stream : streams) stream->AwaitTokens(5);
  kill(served_->server().pid(), SIGTERM);
  for (auto& stream : streams) {
    ASSERT_TRUE(stream->Await().ok()) << stream->Await();
    EXPECT_EQ(stream->token_ids(), expected);
  }
  const int status = served_->server().AwaitEnd(static_cast<int>(Bound(110).count()));
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0) << served_->server().Log();
}

TEST_F(FaultTest, NothingOutlivesAKilledLauncher) {
  ASSERT_NO_FATAL_FAILURE(Serve(2));
  const std::vector<pid_t> children = {served_->WorkerPid(0), served_->WorkerPid(1),
                                       served_->CoordinatorPid()};
  for (const pid_t child : children) ASSERT_GT(child, 0);
  kill(served_->server().pid(), SIGKILL);
  EXPECT_TRUE(Eventually(
      [&] {
        for (const pid_t child : children) {
          if (!ProcessGone(child)) return false;
        }
        return true;
      },
      3));
}

TEST_F(FaultTest, ACancelledStreamGivesItsBlocksBack) {
  ASSERT_NO_FATAL_FAILURE(Serve(2));
  for (int round = 0; round < 10; ++round) {
    auto stream = Stream(round, 1500);
    stream->AwaitTokens(static_cast<size_t>(round) * 3);
    stream->Cancel();
    EXPECT_EQ(stream->Await().code(), absl::StatusCode::kCancelled);
  }
  ExpectAllBlocksBack();
  EXPECT_EQ(FaultFree(Prompt(0), 20).size(), 20u);
}

}  // namespace
}  // namespace lockstep
