// Faults that a worker commits itself (worker/fault_injection.h), under the real
// programs: `lockstep serve` finds a lockstep-worker that adds --inject.
#include <stdlib.h>
#include <sys/wait.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/fakes/temp_dir.h"
#include "tests/integration/sanitizer_reports.h"
#include "tests/integration/test_server.h"

namespace lockstep {
namespace {

using std::chrono::steady_clock;
using ::testing::HasSubstr;

constexpr uint32_t kTokens = 200;

std::string Prompt(int i) { return absl::StrCat("Count from ", i + 1, " to ", i + 60, "."); }

class InjectedFaultTest : public ::testing::Test {
 protected:
  ~InjectedFaultTest() override { unsetenv("LOCKSTEP_PROGRAMS"); }

  // From here on workers are started with these faults.
  void Inject(const std::string& faults) {
    const std::string built = std::string(LOCKSTEP_BINARY_DIR) + "/bin/";
    for (const char* program : {"lockstep", "lockstep-coordinator"}) {
      const std::string link = programs_.File(program);
      if (!std::filesystem::exists(link)) std::filesystem::create_symlink(built + program, link);
    }
    const std::string worker = programs_.File("lockstep-worker");
    std::ofstream(worker) << "#!/bin/sh\nexec " << built << "lockstep-worker \"$@\" --inject '"
                          << faults << "'\n";
    std::filesystem::permissions(worker, std::filesystem::perms::owner_all);
    setenv("LOCKSTEP_PROGRAMS", std::filesystem::path(worker).parent_path().c_str(), 1);
  }
  void Serve(const std::string& faults, std::vector<std::string> flags = {}) {
    Inject(faults);
    flags.insert(flags.end(), {"--dtype", "float32"});
    served_ = TestServer::Start(DemoModel(), 2, flags);
    ASSERT_NE(served_, nullptr);
  }
  std::unique_ptr<StreamedAnswer> Stream(int i) {
    return std::make_unique<StreamedAnswer>(&served_->client(), LongGreedy(Prompt(i), kTokens));
  }
  // What an answer is when nothing goes wrong.
  std::vector<uint32_t> FaultFree(int i) {
    auto stream = Stream(i);
    EXPECT_TRUE(stream->Await().ok()) << stream->Await() << served_->server().Log();
    return stream->token_ids();
  }
  void ExpectAllBlocksBack() {
    EXPECT_TRUE(Eventually([&] {
      return served_->Metric("lockstep_kv_blocks{state=\"active\"}") == 0 &&
             served_->Metric("lockstep_kv_blocks{state=\"pending\"}") == 0;
    })) << HttpRequest(served_->server().http_port(), "GET", "/metrics");
  }

  const TempDir programs_;
  std::unique_ptr<TestServer> served_;
};

// A rank dies of every step that begins a prompt with token 509, which no text
// of these tests has.
TEST_F(InjectedFaultTest, APoisonRequestFailsAloneAndNamesTheRank) {
  constexpr int kBystanders = 4;
  Serve("die@token=509,rank=1");
  std::vector<std::vector<uint32_t>> expected;
  for (int i = 0; i < kBystanders; ++i) expected.push_back(FaultFree(i));
  const uint64_t epoch = served_->Info().epoch();

  std::vector<std::unique_ptr<StreamedAnswer>> bystanders;
  for (int i = 0; i < kBystanders; ++i) bystanders.push_back(Stream(i));
  for (auto& stream : bystanders) stream->AwaitTokens(5);
  v1::GenerateRequest poison;
  poison.mutable_token_ids()->mutable_ids()->Add(509);
  poison.mutable_sampling()->set_max_tokens(20);
  StreamedAnswer poisoned(&served_->client(), poison);
  const absl::Status status = poisoned.Await();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 1"));

  for (int i = 0; i < kBystanders; ++i) {
    StreamedAnswer& stream = *bystanders[static_cast<size_t>(i)];
    EXPECT_TRUE(stream.Await().ok()) << stream.Await() << served_->server().Log();
    EXPECT_EQ(stream.token_ids(), expected[static_cast<size_t>(i)]);
  }
  EXPECT_EQ(served_->AwaitEpochAbove(epoch + 1).epoch(), epoch + 2) << "two deaths, no more";
  ExpectAllBlocksBack();
}

TEST_F(InjectedFaultTest, NanLogitsFailTheRequestThatMetThem) {
  Serve("poison@token=509");
  const std::vector<uint32_t> expected = FaultFree(0);
  auto bystander = Stream(0);
  bystander->AwaitTokens(5);
  v1::GenerateRequest poison;
  poison.mutable_token_ids()->mutable_ids()->Add(509);
  StreamedAnswer poisoned(&served_->client(), poison);
  EXPECT_EQ(poisoned.Await().code(), absl::StatusCode::kInternal) << poisoned.Await();
  EXPECT_TRUE(bystander->Await().ok()) << bystander->Await();
  EXPECT_EQ(bystander->token_ids(), expected);
  EXPECT_EQ(served_->Info().epoch(), 1u) << "nobody had to die";
}

// Each in the first epoch only: the answer must be the one of the second, whole.
class InjectedStepFaultTest : public InjectedFaultTest,
                              public ::testing::WithParamInterface<const char*> {};

TEST_P(InjectedStepFaultTest, EndsTheEpochAndTheStreamGoesOn) {
  // The rank that hangs ends by itself, without the thread that hangs.
  std::optional<ThreadsMayLeak> leak;
  if (absl::StartsWith(GetParam(), "hang")) leak.emplace();
  Serve(absl::StrCat(GetParam(), ",epoch=1"));
  const auto began = steady_clock::now();
  const std::vector<uint32_t> tokens = FaultFree(0);
  EXPECT_LE(steady_clock::now() - began, Bound(15)) << served_->server().Log();
  EXPECT_EQ(served_->Info().epoch(), 2u) << served_->server().Log();
  EXPECT_EQ(FaultFree(0), tokens);
  EXPECT_THAT(served_->server().Log(), HasSubstr("epoch 1 ended: rank"));
  ExpectAllBlocksBack();
}

INSTANTIATE_TEST_SUITE_P(Steps, InjectedStepFaultTest,
                         ::testing::Values("hang@step=9,rank=1", "hang@step=9,rank=0",
                                           "skip_collective@step=1,rank=1",
                                           "skip_collective@step=9,rank=1", "fail@step=9,rank=1",
                                           "lie_digest@step=9,rank=1", "lie_token@step=9,rank=0"),
                         [](const auto& param_info) {
                           std::string name = param_info.param;
                           for (char& c : name)
                             c = isalnum(static_cast<unsigned char>(c)) != 0 ? c : '_';
                           return name;
                         });

// A rank that dies on the way to ready is named within 3 s, and the start goes on.
class InjectedStartFaultTest : public InjectedFaultTest,
                               public ::testing::WithParamInterface<const char*> {};

TEST_P(InjectedStartFaultTest, IsNamedAndTheNextEpochIsWhole) {
  const auto began = steady_clock::now();
  Serve(absl::StrCat("exit@phase=", GetParam(), ",rank=1,epoch=1"));
  EXPECT_LE(steady_clock::now() - began, Bound(10));
  EXPECT_THAT(served_->server().Log(), HasSubstr("epoch 1 ended: rank 1"));
  EXPECT_EQ(FaultFree(0).size(), kTokens);
}

TEST_P(InjectedStartFaultTest, ForEverIsACrashLoopThatEndsTheServer) {
  Inject(absl::StrCat("exit@phase=", GetParam(), ",rank=1"));
  const auto began = steady_clock::now();
  const auto server = LocalServer::Start({"--model", DemoModel(), "--tensor-parallel-size", "2"});
  EXPECT_FALSE(server.ok()) << "it says that it is ready";
  // On a GPU each of its starts takes two seconds more.
  EXPECT_LE(steady_clock::now() - began, Bound(OnGpus() ? 45 : 25));
  EXPECT_THAT(std::string(server.status().message()), HasSubstr("worker 1: crash loop"));
}

INSTANTIATE_TEST_SUITE_P(Phases, InjectedStartFaultTest,
                         ::testing::Values("load", "communicator", "kv"),
                         [](const auto& param_info) { return std::string(param_info.param); });

// No fault where there is no GPU. A sum of two is the same in any order; norms may
// round otherwise, which no token here hangs on.
TEST_F(InjectedFaultTest, NcclAloneGivesTheSameTokens) {
  Serve("slow@ms=0");
  std::vector<std::vector<uint32_t>> expected;
  for (int i = 0; i < 3; ++i) expected.push_back(FaultFree(i));
  served_.reset();
  Serve("no_peers@phase=communicator");
  std::vector<std::unique_ptr<StreamedAnswer>> together;
  for (int i = 0; i < 3; ++i) together.push_back(Stream(i));
  for (int i = 0; i < 3; ++i) {
    StreamedAnswer& stream = *together[static_cast<size_t>(i)];
    EXPECT_TRUE(stream.Await().ok()) << stream.Await() << served_->server().Log();
    EXPECT_EQ(stream.token_ids(), expected[static_cast<size_t>(i)]);
  }
  EXPECT_EQ(served_->Info().epoch(), 1u);
  if (OnGpus()) {
    EXPECT_THAT(served_->server().Log(), HasSubstr("NCCL carries every collective"));
  }
}

TEST_F(InjectedFaultTest, SlowStepsKillNobody) {
  Serve("slow@ms=60,rank=1");
  v1::GenerateRequest request = LongGreedy(Prompt(0), 30);
  StreamedAnswer answer(&served_->client(), request);
  EXPECT_TRUE(answer.Await().ok()) << answer.Await() << served_->server().Log();
  EXPECT_EQ(served_->Info().epoch(), 1u);
}

}  // namespace
}  // namespace lockstep
