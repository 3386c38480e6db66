// The numbers equal what was sent, under the names that others read.
#include "coordinator/api/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "tests/coordinator/api/api_fixture.h"

namespace lockstep {
namespace {

using nlohmann::json;
using ::testing::Contains;
using ::testing::Key;

constexpr char kLabels[] = R"({engine="0",model_name="demo"})";

// Series to value; "name" alone and "name{labels}" as the text has them.
std::map<std::string, double> Parse(const std::string& text) {
  std::map<std::string, double> series;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.empty() || line[0] == '#') continue;
    const size_t space = line.rfind(' ');
    series[line.substr(0, space)] = std::stod(line.substr(space + 1));
  }
  return series;
}

class MetricsTest : public ApiFixture {
 protected:
  std::map<std::string, double> Scrape() {
    const RawResponse response = Get(http(), "/metrics");
    EXPECT_EQ(response.status, 200);
    EXPECT_EQ(response.headers.at("content-type"), "text/plain; version=0.0.4; charset=utf-8");
    return Parse(response.body);
  }
  static std::string Finished(const std::string& reason) {
    return "vllm:request_success_total{engine=\"0\",finished_reason=\"" + reason +
           "\",model_name=\"demo\"}";
  }
};

TEST_F(MetricsTest, CountersEqualWhatWasSent) {
  engine_.script = [](const Request& request) {
    if (request.prompt[0] == 9) return Script{.tokens = {{70}}};
    return Script{.tokens = {{70, 71, 72, 2}, {80, 2}}};
  };
  uint64_t prompts = 0, completions = 0;
  for (int i = 0; i < 5; ++i) {
    const json usage = Complete({{"prompt", {5, 6, 7}}, {"n", 2}}).json()["usage"];
    prompts += usage["prompt_tokens"].get<uint64_t>();
    completions += usage["completion_tokens"].get<uint64_t>();
  }
  const json stopped =
      Complete({{"prompt", {9}}, {"stop", model_.tokenizer->TokenText(70)}}).json();
  EXPECT_EQ(stopped["usage"]["completion_tokens"], 1);
  completions += 1, prompts += 1;
  completions += Complete({{"prompt", {9}}, {"max_tokens", 7}})
                     .json()["usage"]["completion_tokens"]
                     .get<uint64_t>();
  prompts += 1;

  std::map<std::string, double> series = Scrape();
  EXPECT_EQ(series[std::string("vllm:prompt_tokens_total") + kLabels], prompts);
  EXPECT_EQ(series[std::string("vllm:generation_tokens_total") + kLabels], completions);
  EXPECT_EQ(series[Finished("stop")], 11);  // 5 x 2 by an ending token, 1 by a stop string
  EXPECT_EQ(series[Finished("length")], 1);
  EXPECT_EQ(series[Finished("abort")], 0);
  const auto count = [&](const std::string& name) {
    return series["vllm:" + name + "_count" + kLabels];
  };
  EXPECT_EQ(count("time_to_first_token_seconds"), 7);
  EXPECT_EQ(count("e2e_request_latency_seconds"), 7);
  EXPECT_EQ(count("request_queue_time_seconds"), 7);
  EXPECT_EQ(count("request_prefill_time_seconds"), 7);
  EXPECT_EQ(count("request_decode_time_seconds"), 7);
  EXPECT_EQ(count("inter_token_latency_seconds"), 5 * (3 + 1) + 6);
  EXPECT_EQ(count("request_time_per_output_token_seconds"), 5 * 2 + 1);
}

TEST_F(MetricsTest, AClientThatLeavesIsAnAbort) {
  engine_.Hold();
  {
    RawClient client(http());
    client.Send(PostBytes("/v1/completions", R"({"prompt":[5],"n":2,"stream":true})"));
    ASSERT_TRUE(engine_.WaitSubmitted(1));
    engine_.Tick(1);
    ASSERT_TRUE(client.WaitFor("data: "));
  }
  ASSERT_TRUE(engine_.WaitCancelled(1));
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (Scrape()[Finished("abort")] < 2 && std::chrono::steady_clock::now() < deadline) {
  }
  EXPECT_EQ(Scrape()[Finished("abort")], 2);
}

TEST_F(MetricsTest, RejectionsAreCountedOnceByReason) {
  Complete({{"prompt", "x"}, {"temperature", 9}});
  Complete({{"prompt", "x"}, {"model", "other"}});
  engine_.on_submit = [](const Request&) { return absl::ResourceExhaustedError("full"); };
  Complete({{"prompt", "x"}});
  engine_.SetState(EngineState::kLoading);
  Complete({{"prompt", "x"}});
  const auto series = Scrape();
  for (const char* reason : {"invalid", "not_found", "full", "unavailable"}) {
    EXPECT_EQ(series.at("lockstep_rejections_total{reason=\"" + std::string(reason) + "\"}"), 1)
        << reason;
  }
}

// A request that waited when its group was given up, say: admitted, never started.
TEST_F(MetricsTest, WhatFailsBeforeItStartsIsAnError) {
  engine_.script = [](const Request& request) {
    return Script{.fail_after = 0,
                  .failure = absl::UnavailableError("gone"),
                  .rejected = request.prompt[0] == 9};
  };
  EXPECT_EQ(Complete({{"prompt", {5}}, {"n", 2}}).status, 503);
  EXPECT_EQ(Complete({{"prompt", {9}}}).status, 503);  // the engine counts this one
  EXPECT_EQ(Scrape()[Finished("error")], 2);
}

TEST_F(MetricsTest, ARequestWhoseDeadlinePassedIsAnAbort) {
  engine_.script = [](const Request&) {
    return Script{.fail_after = 0, .failure = absl::DeadlineExceededError("late")};
  };
  EXPECT_EQ(Complete({{"prompt", {5}}}).status, 504);
  EXPECT_EQ(Scrape()[Finished("abort")], 1);
  EXPECT_EQ(Scrape()[Finished("error")], 0);
}

TEST_F(MetricsTest, DrainingDoesNotHideThatTheGroupIsBroken) {
  engine_.SetRanks({RankReport{}});
  const auto up = [this] { return Scrape()["lockstep_worker_up{rank=\"0\"}"]; };
  const auto ready = [this] { return Scrape().at("lockstep_ready"); };
  EXPECT_EQ(ready(), 1);
  server_->BeginDrain();
  EXPECT_EQ(ready(), 0);
  EXPECT_EQ(up(), 1);
  engine_.SetState(EngineState::kRecovering);
  EXPECT_EQ(up(), 0);
}

TEST_F(MetricsTest, GaugesAreOfNow) {
  SchedulerStats stats;
  stats.waiting = 3, stats.running = 2, stats.preemptions = 4;
  stats.prefix_cache_queries = 100, stats.prefix_cache_hits = 40;
  stats.blocks_free = 50, stats.blocks_cached = 10, stats.blocks_active = 30;
  stats.blocks_pending = 10;
  engine_.SetStats(stats);
  engine_.SetRanks(
      {{.rank = 0,
        .host = {},
        .device = {},
        .collective_library = {},
        .shard = {},
        .memory = {.weights = 1000, .kv = 64, .activations = 32, .communication = 0, .runtime = 4},
        .predicted = MemoryParts{.weights = 990, .kv = 64, .activations = 40},
        .phases = {{"load", 0.5}}},
       {.rank = 1,
        .host = {},
        .device = {},
        .collective_library = {},
        .shard = {},
        .memory = {.weights = 900, .kv = 64, .activations = 32},
        .phases = {}}});
  for (int scrape = 0; scrape < 2; ++scrape) {  // totals do not add up over scrapes
    auto series = Scrape();
    const auto vllm = [&](const std::string& name) { return series["vllm:" + name + kLabels]; };
    EXPECT_EQ(vllm("num_requests_running"), 2);
    EXPECT_EQ(vllm("num_requests_waiting"), 3);
    EXPECT_EQ(vllm("kv_cache_usage_perc"), 0.4);
    EXPECT_EQ(vllm("num_preemptions_total"), 4);
    EXPECT_EQ(vllm("prefix_cache_queries_total"), 100);
    EXPECT_EQ(vllm("prefix_cache_hits_total"), 40);
    EXPECT_EQ(series["lockstep_kv_blocks{state=\"free\"}"], 50);
    EXPECT_EQ(series["lockstep_kv_blocks{state=\"cached\"}"], 10);
    EXPECT_EQ(series["lockstep_kv_blocks{state=\"active\"}"], 30);
    EXPECT_EQ(series["lockstep_kv_blocks{state=\"pending\"}"], 10);
    EXPECT_EQ(series["lockstep_requests{state=\"waiting\"}"], 3);
    EXPECT_EQ(series["lockstep_epoch"], 1);
    EXPECT_EQ(series["lockstep_worker_up{rank=\"0\"}"], 1);
    EXPECT_EQ(series["lockstep_weight_bytes{rank=\"1\"}"], 900);
    EXPECT_EQ(series["lockstep_predicted_weight_bytes{rank=\"0\"}"], 990);
    const auto part = [&](const std::string& name, const std::string& labels) {
      const auto found = series.find("lockstep_" + name + "{part=" + labels + "\"}");
      return found == series.end() ? -1 : found->second;
    };
    EXPECT_EQ(part("memory_bytes", "\"weights\",rank=\"0"), 1000);
    EXPECT_EQ(part("memory_bytes", "\"communication\",rank=\"0"), 0);
    EXPECT_EQ(part("memory_bytes", "\"total\",rank=\"0"), 1100);
    EXPECT_EQ(part("memory_bytes", "\"activations\",rank=\"1"), 32);
    EXPECT_EQ(part("predicted_memory_bytes", "\"activations\",rank=\"0"), 40);
    // What is not told is absent, and so is a total that lacks it.
    EXPECT_EQ(part("memory_bytes", "\"communication\",rank=\"1"), -1);
    EXPECT_EQ(part("memory_bytes", "\"total\",rank=\"1"), -1);
    EXPECT_EQ(part("predicted_memory_bytes", "\"total\",rank=\"0"), -1);
    EXPECT_EQ(part("predicted_memory_bytes", "\"weights\",rank=\"1"), -1);
    EXPECT_EQ(series["lockstep_load_phase_seconds{phase=\"load\",rank=\"0\"}"], 0.5);
    EXPECT_EQ(series["vllm:cache_config_info{block_size=\"16\",enable_prefix_caching=\"True\","
                     "engine=\"0\",model_name=\"demo\",num_gpu_blocks=\"100\"}"],
              1);
  }
  engine_.SetState(EngineState::kRecovering);
  EXPECT_EQ(Scrape()["lockstep_worker_up{rank=\"0\"}"], 0);
}

TEST_F(MetricsTest, StepsAreTimedByKindAndRank) {
  const std::shared_ptr<EngineObserver> observer = server_->observer();
  StepPlan plan;
  GroupStep step;
  step.timings.resize(2);
  step.timings[1].collective_wait_ns = 2'000'000;
  step.timings[1].collective_transfer_ns = 1'000'000;
  step.timings[1].collective_bytes = 512;
  step.timings[1].compute_ns = 4'000'000;
  step.timings[1].sampling_ns = 500'000;
  step.timings[1].total_ns = 8'000'000;
  step.timings[1].device_idle_ns = 3'000;
  plan.spans = {{Slot(0), 1}, {Slot(1), 1}};
  observer->OnStep(plan, step, 1e-5, 0.002);
  plan.spans[0].num_tokens = 5;
  observer->OnStep(plan, step, 1e-5, 0.002);
  plan.spans.pop_back();
  observer->OnStep(plan, step, 1e-5, 0.002);
  auto series = Scrape();
  for (const char* kind : {"decode", "prefill", "mixed"}) {
    EXPECT_EQ(series["lockstep_step_seconds_count{kind=\"" + std::string(kind) + "\"}"], 1) << kind;
  }
  EXPECT_NEAR(series["lockstep_collective_wait_seconds_sum{rank=\"1\"}"], 0.006, 1e-9);
  EXPECT_NEAR(series["lockstep_collective_transfer_seconds_sum{rank=\"1\"}"], 0.003, 1e-9);
  EXPECT_EQ(series["lockstep_collective_wait_seconds_count{rank=\"0\"}"], 3);
  EXPECT_EQ(series["lockstep_collective_bytes_total{rank=\"1\"}"], 3 * 512);
  EXPECT_EQ(series["lockstep_plan_seconds_count"], 3);
  const auto own = [&](const std::string& kind, int rank) {
    return series["lockstep_rank_step_seconds_sum{kind=\"" + kind + "\",rank=\"" +
                  std::to_string(rank) + "\"}"];
  };
  EXPECT_NEAR(own("compute", 1), 0.012, 1e-9);
  EXPECT_NEAR(own("sampling", 1), 0.0015, 1e-9);
  EXPECT_NEAR(own("total", 1), 0.024, 1e-9);
  EXPECT_EQ(own("compute", 0), 0);
  EXPECT_EQ(series["lockstep_rank_step_seconds_count{kind=\"total\",rank=\"0\"}"], 3);
  // A rank that does not tell its idle time has no histogram of zeros.
  EXPECT_NEAR(series["lockstep_device_idle_seconds_sum{rank=\"1\"}"], 9e-6, 1e-12);
  EXPECT_EQ(series["lockstep_device_idle_seconds_count{rank=\"1\"}"], 3);
  EXPECT_EQ(series["lockstep_device_idle_seconds_bucket{rank=\"1\",le=\"5e-06\"}"], 3);
  EXPECT_EQ(series.count("lockstep_device_idle_seconds_count{rank=\"0\"}"), 0u);
}

TEST_F(MetricsTest, TheRankThatTheOthersWaitForIsCounted) {
  const std::shared_ptr<EngineObserver> observer = server_->observer();
  StepPlan plan;
  plan.spans = {{Slot(0), 1}};
  GroupStep step;
  step.timings.resize(3);
  const auto run = [&](std::vector<uint64_t> waits_ns) {
    for (size_t rank = 0; rank < 3; ++rank) step.timings[rank].collective_wait_ns = waits_ns[rank];
    observer->OnStep(plan, step, 1e-5, 0.001);
  };
  for (int i = 0; i < 3; ++i) run({400'000, 100'000, 300'000});
  for (int i = 0; i < 2; ++i) run({400'000, 340'000, 300'000});
  run({400'000, 380'000, 360'000});  // less than a twentieth of the step: nobody's fault
  run({0, 0, 0});                    // as where a backend does not tell
  run({0, 0, 900'000});              // two that are late alike: the first
  auto series = Scrape();
  const std::vector<double> expected = {1, 3, 2};
  for (int rank = 0; rank < 3; ++rank) {
    EXPECT_EQ(series["lockstep_straggler_steps_total{rank=\"" + std::to_string(rank) + "\"}"],
              expected[static_cast<size_t>(rank)])
        << rank;
  }
}

TEST(MetricsOfASequence, TheTimeOfATokenIsThatSinceTheOneBefore) {
  Metrics metrics{{.model_name = "demo"}};
  metrics.SequenceFinished(RequestOutcome::kStop, 3, 1.0);
  metrics.SequenceFinished(RequestOutcome::kStop, 1, 0);  // there is none before its token
  auto series = Parse(metrics.Expose({}, {}));
  const std::string name = "vllm:request_time_per_output_token_seconds";
  EXPECT_EQ(series[name + "_sum" + kLabels], 0.5);
  EXPECT_EQ(series[name + "_count" + kLabels], 1);
}

// What dashboards and autoscalers ask for is there before the first request.
TEST_F(MetricsTest, FixedNamesExistFromTheStart) {
  const auto series = Scrape();
  for (const char* name :
       {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
        "num_preemptions_total", "prompt_tokens_total", "generation_tokens_total",
        "prefix_cache_queries_total", "prefix_cache_hits_total",
        "time_to_first_token_seconds_count", "inter_token_latency_seconds_count",
        "request_time_per_output_token_seconds_count", "e2e_request_latency_seconds_count",
        "request_queue_time_seconds_count", "request_prefill_time_seconds_count",
        "request_decode_time_seconds_count"}) {
    EXPECT_THAT(series, Contains(Key("vllm:" + std::string(name) + kLabels)));
  }
  EXPECT_THAT(series, Contains(Key(Finished("stop"))));
  EXPECT_THAT(series, Contains(Key("lockstep_step_seconds_count{kind=\"decode\"}")));
  EXPECT_THAT(series, Contains(Key("lockstep_epoch")));
}

TEST_F(MetricsTest, HttpAnswersAreCountedByCode) {
  Get(http(), "/nowhere");
  Get(http(), "/nowhere");
  EXPECT_EQ(Scrape()["lockstep_http_responses_total{code=\"404\"}"], 2);
}

}  // namespace
}  // namespace lockstep
