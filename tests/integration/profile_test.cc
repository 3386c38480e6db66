// `lockstep profile` against a running server of two ranks.
#include <sys/stat.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/fakes/shell.h"
#include "tests/fakes/temp_dir.h"
#include "tests/integration/test_server.h"

namespace lockstep {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

Shell Profile(const std::string& arguments) {
  return RunShell(absl::StrCat(LOCKSTEP_BINARY_DIR, "/bin/lockstep profile ", arguments, " 2>&1"));
}

// Tokens of an answer that outlasts the start of a command.
uint32_t Many() { return OnGpus() ? 1800 : 200; }

struct StepSlice {
  double begin = 0, end = 0;  // microseconds
  uint64_t step = 0;
};

// By rank, as the file has them.
std::map<int, std::vector<StepSlice>> StepsOf(const json& trace) {
  std::map<int, std::vector<StepSlice>> steps;
  for (const json& event : trace.at("traceEvents")) {
    if (event.at("ph") != "X" || event.at("tid") != 0) continue;
    const double begin = event.at("ts");
    steps[event.at("pid")].push_back(
        {begin, begin + event.at("dur").get<double>(), event.at("args").at("step")});
  }
  return steps;
}

class ProfileTest : public ::testing::Test {
 protected:
  void SetUp() override {
    server_ = TestServer::Start(DemoModel(), 2, {"--dtype", "float32"});
    ASSERT_NE(server_, nullptr);
  }
  Shell Run(const std::string& flags) {
    return Profile(absl::StrCat("--address ", server_->server().admin_address(), " --output ",
                                path_, " ", flags));
  }
  json Trace() {
    std::ifstream file(path_);
    return json::parse(file, nullptr, /*allow_exceptions=*/false);
  }

  std::unique_ptr<TestServer> server_;
  const TempDir folder_;
  const std::string path_ = folder_.File("trace.json");
};

TEST_F(ProfileTest, TracesTheSameStepsOfEveryRankOnOneTimeAxis) {
  StreamedAnswer answer(&server_->client(), LongGreedy("Once upon a time", Many()));
  answer.AwaitTokens(5);
  const Shell shell = Run("--steps 12");
  ASSERT_EQ(shell.code, 0) << shell.out;
  const json trace = Trace();
  ASSERT_FALSE(trace.is_discarded());
  const auto steps = StepsOf(trace);
  ASSERT_EQ(steps.size(), 2u);
  for (const auto& [rank, slices] : steps) {
    ASSERT_EQ(slices.size(), 12u) << "rank " << rank;
    for (size_t i = 0; i < slices.size(); ++i) {
      EXPECT_LT(slices[i].begin, slices[i].end);
      EXPECT_EQ(slices[i].step, steps.at(0)[0].step + i);
      const double last_end = i == 0 ? 0 : slices[i - 1].end;
      EXPECT_GE(slices[i].begin, last_end - 0.002);  // of rounding
      // A step's all-reduces meet: its slices on the two ranks overlap.
      EXPECT_LT(slices[i].begin, steps.at(1 - rank)[i].end);
    }
  }
  std::set<int> named;
  bool waited = false;
  for (const json& event : trace.at("traceEvents")) {
    if (event.at("name") == "process_name") named.insert(event.at("pid").get<int>());
    waited |= event.at("name") == "collective wait";
  }
  EXPECT_EQ(named, (std::set<int>{0, 1}));
  EXPECT_TRUE(waited);
  EXPECT_TRUE(answer.Await().ok());
  EXPECT_EQ(answer.token_ids().size(), Many());
}

// On GPUs: what each rank's device ran, on the same axis as its steps.
TEST_F(ProfileTest, ShowsTheKernelsOfEveryStepOnGpus) {
  StreamedAnswer answer(&server_->client(), LongGreedy("Once upon a time", Many()));
  answer.AwaitTokens(30);
  const Shell shell = Run("--steps 10");
  ASSERT_EQ(shell.code, 0) << shell.out;
  const json trace = Trace();
  ASSERT_FALSE(trace.is_discarded());
  constexpr double kSlackUs = 200;  // two clocks of the device
  const auto steps = StepsOf(trace);
  ASSERT_EQ(steps.size(), 2u);
  std::map<int, std::set<size_t>> with_kernels;
  for (const json& event : trace.at("traceEvents")) {
    if (event.at("ph") != "X" || event.at("tid") < 2) continue;
    const int rank = event.at("pid");
    const double begin = event.at("ts"), end = begin + event.at("dur").get<double>();
    EXPECT_GE(begin, steps.at(rank).front().begin - kSlackUs) << event;
    EXPECT_LE(end, steps.at(rank).back().end + kSlackUs) << event;
    for (size_t i = 0; i < steps.at(rank).size(); ++i) {
      const StepSlice& step = steps.at(rank)[i];
      if (begin < step.end && end > step.begin) with_kernels[rank].insert(i);
    }
  }
  for (int rank = 0; rank < 2; ++rank) {
    EXPECT_EQ(with_kernels[rank].size(), OnGpus() ? 10u : 0u) << "rank " << rank << shell.out;
  }
  EXPECT_TRUE(answer.Await().ok());
}

TEST_F(ProfileTest, AnIdleServerHasNothingToTraceAndCanBeAskedAgain) {
  const Shell idle = Run("--steps 3 --timeout 0.2");
  EXPECT_EQ(idle.code, 1);
  EXPECT_THAT(idle.out, HasSubstr("no step ran within 200 ms"));
  StreamedAnswer answer(&server_->client(), LongGreedy("Once upon a time", Many()));
  const Shell busy = Run("--steps 3");
  EXPECT_EQ(busy.code, 0) << busy.out;
  EXPECT_TRUE(answer.Await().ok());
}

// A pod has no other way out: no shell, no tar.
TEST_F(ProfileTest, WritesToStdoutAndReplacesNoDevice) {
  const std::string pipe = folder_.File("pipe");
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  for (const std::string& output : {std::string("- > " + path_), pipe}) {
    StreamedAnswer answer(&server_->client(), LongGreedy("Once upon a time", Many()));
    const Shell shell = RunShell(absl::StrCat(
        output == pipe ? absl::StrCat("cat ", pipe, " > ", path_, " & ") : "", LOCKSTEP_BINARY_DIR,
        "/bin/lockstep profile --steps 5 --address ", server_->server().admin_address(),
        " --output ", output, "; code=$?; wait; ", "exit $code"));
    EXPECT_EQ(shell.code, 0) << output;
    const json trace = Trace();
    ASSERT_FALSE(trace.is_discarded()) << output;
    EXPECT_EQ(StepsOf(trace).size(), 2u) << output;
    EXPECT_TRUE(answer.Await().ok());
  }
  EXPECT_TRUE(std::filesystem::is_fifo(pipe));
}

TEST_F(ProfileTest, GivesTheStepsThatRanInTime) {
  Shell shell;
  std::atomic<bool> done = false;
  std::thread profile([&] {
    shell = Run("--steps 1000 --timeout 0.5");
    done = true;
  });
  while (!done && server_->client().Generate(LongGreedy("Count:", 2)).ok()) {
  }
  profile.join();
  ASSERT_EQ(shell.code, 0) << shell.out;
  const auto steps = StepsOf(Trace());
  ASSERT_EQ(steps.size(), 2u);
  EXPECT_GE(steps.at(0).size(), 1u);
  EXPECT_EQ(steps.at(0).size(), steps.at(1).size());
}

TEST_F(ProfileTest, EndsWithTheEpoch) {
  Shell shell;
  std::thread profile([&] {
    do {
      shell = Run("--steps 1000 --timeout 60");
    } while (shell.out.find("running already") != std::string::npos);
  });
  // Refused once the first one runs.
  EXPECT_TRUE(Eventually([&] {
    return Profile(absl::StrCat("--address ", server_->server().admin_address(), " --output ",
                                path_, ".other --steps 1 --timeout 0.001"))
               .out.find("running already") != std::string::npos;
  }));
  StreamedAnswer answer(&server_->client(), LongGreedy("Once upon a time", 150));
  answer.AwaitTokens(10);
  kill(server_->WorkerPid(1), SIGKILL);
  profile.join();
  EXPECT_EQ(shell.code, 1);
  EXPECT_THAT(shell.out, HasSubstr("rank 1"));
  EXPECT_TRUE(answer.Await().ok());
  StreamedAnswer next(&server_->client(), LongGreedy("Once upon a time", 100));
  EXPECT_EQ(Run("--steps 5").code, 0);
  EXPECT_TRUE(next.Await().ok());
}

TEST_F(ProfileTest, SaysWhatItCannotDo) {
  EXPECT_EQ(Profile("--output /nowhere/at/all.json").code, 1);
  EXPECT_THAT(Profile("--output /nowhere/at/all.json").out, HasSubstr("/nowhere/at/all.json"));
  EXPECT_EQ(Run("--steps 0").code, 2);
  EXPECT_EQ(Run("--steps 1001").code, 2);
}

}  // namespace
}  // namespace lockstep
