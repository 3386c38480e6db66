// The engine's step time does not depend on who reads: the same streams decode
// with clients that read everything and with clients that read next to nothing,
// in turn. And streams that are decoding are not slowed by connections that sit
// over finished answers.
//
//   slow_readers_test                                     64 readers, 1 round
//   LOCKSTEP_LOAD_STREAMS=512 LOCKSTEP_LOAD_ROUNDS=5 slow_readers_test
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/integration/test_server.h"
#include "tests/load/http_streams.h"
#include "tests/load/load_options.h"

namespace lockstep {
namespace {

using std::chrono::steady_clock;
using Reading = HttpStreams::Reading;

// The long form is measured on a quiet machine and held to the promise; the
// short one shows that readers do not stop the engine.
bool IsLongForm() { return LoadSetting("LOCKSTEP_LOAD_ROUNDS", 0) > 0; }

struct StepTimes {
  double mean_ms = 0;    // from plan sent to result
  double period_ms = 0;  // from step to step
  double cpu_ms = 0;     // of the coordinator, which other load does not change
  double steps = 0;
};

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

// none, slow, slow, none, ...: what the machine does besides falls on both alike.
bool IsSlow(int i) { return i % 4 == 1 || i % 4 == 2; }

std::string Body(int i, int max_tokens) {
  return nlohmann::json{{"prompt", absl::StrCat("Tale ", i, ":")},
                        {"max_tokens", max_tokens},
                        {"temperature", 0},
                        {"ignore_eos", true},
                        {"stream", true}}
      .dump();
}

class SlowReadersTest : public ::testing::Test {
 protected:
  void SetUp() override {
    served_ = TestServer::Start(DemoModel(), 2,
                                {"--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs",
                                 std::to_string(readers_ + kBeside)});
    ASSERT_NE(served_, nullptr);
    coordinator_ = served_->CoordinatorPid();
  }
  void TearDown() override { EXPECT_EQ(served_->Info().epoch(), 1u); }

  double Running() { return served_->Metric("lockstep_requests{state=\"running\"}"); }
  double Completed() { return served_->Metric("lockstep_requests_total{outcome=\"completed\"}"); }
  void Post(HttpStreams* streams, int count, int max_tokens) {
    for (int i = 0; i < count; ++i) {
      ASSERT_TRUE(streams->Send(Body(i, max_tokens), [](const std::string&) {}));
    }
  }
  bool AwaitRunning(double count) {
    return Eventually([&] { return Running() == count; }, 60);
  }
  // Of decode steps, from now on until a stream ends or `seconds` have passed.
  StepTimes Measure(double running, double seconds) {
    const Sample first = Take();
    Sample last = first;
    while (last.at_s - first.at_s < seconds) {
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      const Sample now = Take();
      if (Running() != running) break;
      last = now;
    }
    const double steps = last.count - first.count;
    if (steps == 0) return {};
    return {.mean_ms = 1e3 * (last.sum_s - first.sum_s) / steps,
            .period_ms = 1e3 * (last.at_s - first.at_s) / steps,
            .cpu_ms = 1e3 * (last.cpu_s - first.cpu_s) / steps,
            .steps = steps};
  }

  static constexpr int kBeside = 8;
  const int readers_ = LoadStreams(64);
  const int rounds_ = static_cast<int>(LoadSetting("LOCKSTEP_LOAD_ROUNDS", 1));
  const double window_s_ = LoadSeconds(IsLongForm() ? 8 : 1);
  std::unique_ptr<TestServer> served_;
  pid_t coordinator_ = 0;

 private:
  struct Sample {
    double at_s = 0, sum_s = 0, count = 0, cpu_s = 0;
  };
  Sample Take() {
    Sample sample;
    sample.at_s = std::chrono::duration<double>(steady_clock::now().time_since_epoch()).count();
    sample.sum_s = served_->Metric("lockstep_step_seconds_sum{kind=\"decode\"}");
    sample.count = served_->Metric("lockstep_step_seconds_count{kind=\"decode\"}");
    sample.cpu_s = ProcessCpuSeconds(coordinator_);
    return sample;
  }
};

void Report(const char* what, const std::vector<StepTimes>& none,
            const std::vector<StepTimes>& slow) {
  std::vector<double> means[2], periods[2], cpu[2], ratios;
  for (const auto& [times, to] : {std::pair(&none, 0), std::pair(&slow, 1)}) {
    for (const StepTimes& each : *times) {
      means[to].push_back(each.mean_ms);
      periods[to].push_back(each.period_ms);
      cpu[to].push_back(each.cpu_ms);
    }
  }
  for (size_t i = 0; i < none.size(); ++i) ratios.push_back(means[1][i] / means[0][i]);
  std::printf(
      "%s, medians of %zu rounds: step %.3f ms without slow readers, %.3f ms with; from step to "
      "step %.3f ms, %.3f ms; ratio of a round's two steps %.3f (%.3f to %.3f); the coordinator's "
      "processor time a step %.3f ms, %.3f ms\n",
      what, none.size(), Median(means[0]), Median(means[1]), Median(periods[0]), Median(periods[1]),
      Median(ratios), *std::min_element(ratios.begin(), ratios.end()),
      *std::max_element(ratios.begin(), ratios.end()), Median(cpu[0]), Median(cpu[1]));
  // A short form's window is a quarter of a second on a machine with other work.
  EXPECT_LE(Median(ratios), IsLongForm() ? 1.03 : 10.0);
}

TEST_F(SlowReadersTest, StepsTakeAsLongWhoeverReads) {
  std::vector<StepTimes> times[2];
  for (int i = 0; i < 2 * rounds_; ++i) {
    const bool slow = IsSlow(i);
    {
      HttpStreams streams(served_->server().http_port(),
                          slow ? Reading::kTrickle : Reading::kDiscard);
      Post(&streams, readers_, 1000);
      ASSERT_TRUE(AwaitRunning(readers_)) << Running();
      times[slow].push_back(Measure(readers_, window_s_));
      EXPECT_GE(times[slow].back().steps, 5);
    }
    ASSERT_TRUE(AwaitRunning(0)) << "clients that leave free their places";
  }
  Report("streams of slow readers", times[0], times[1]);
}

TEST_F(SlowReadersTest, FinishedAnswersThatNobodyReadsSlowNobody) {
  std::vector<StepTimes> times[2];
  for (int i = 0; i < 2 * rounds_; ++i) {
    const bool slow = IsSlow(i);
    HttpStreams deaf(served_->server().http_port(), Reading::kTrickle);
    if (slow) {
      // Not until none runs: at first none has begun.
      const double before = Completed();
      Post(&deaf, readers_, 120);
      ASSERT_TRUE(Eventually([&] { return Completed() == before + readers_; }, 60))
          << Completed() - before;
      EXPECT_GE(deaf.open(), static_cast<size_t>(readers_) * 9 / 10) << "they had read it all";
    }
    {
      HttpStreams beside(served_->server().http_port(), Reading::kDiscard);
      Post(&beside, kBeside, 1000);
      ASSERT_TRUE(AwaitRunning(kBeside)) << Running();
      times[slow].push_back(Measure(kBeside, window_s_ / 4));
      EXPECT_GE(times[slow].back().steps, 5);
    }
    ASSERT_TRUE(AwaitRunning(0));
  }
  Report("streams beside slow readers", times[0], times[1]);
}

}  // namespace
}  // namespace lockstep
