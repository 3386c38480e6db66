// What a step costs the coordinator: Schedule() and Apply() on the engine
// thread, and the plan's bytes on the wire. Not a test: it prints.
//
//   Schedule/running/waiting    target: 40 us at 16, 200 us at 256 + 10,000
//   plan_bytes                  target: 1,024 at a steady 256
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "benchmark/benchmark.h"
#include "common/check.h"
#include "coordinator/scheduler.h"
#include "tests/fakes/request_builder.h"
#include "wire/codec.h"

namespace lockstep {
namespace {

constexpr int kSteps = 3'000;
constexpr uint32_t kPrompt = 128;

StepResult Answer(const StepPlan& plan) {
  StepResult result;
  result.epoch = plan.epoch;
  result.step = plan.step;
  result.digest = plan.digest;
  for (const Span& span : plan.spans) {
    SampledToken token;
    token.slot = span.slot;
    token.token = 7;
    result.sampled.push_back(token);
  }
  return result;
}

double Seconds(std::chrono::steady_clock::time_point since) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - since).count();
}

class Steady {
 public:
  // blocked: one slot is free, and the first in the queue lacks blocks for it.
  Steady(uint32_t running, uint32_t waiting, bool blocked)
      : scheduler_(Config(running, waiting, blocked)) {
    scheduler_.BeginEpoch(1);
    for (uint32_t i = 1; i <= running; ++i) {
      // Of different lengths, as they are in life: were they all alike, every
      // table would grow in the same step, whose plan has some 1,800 bytes.
      Add(RequestBuilder(i).Prompt(kPrompt + i % 16).MaxTokens(kSteps + 500));
    }
    while (scheduler_.Stats().running < running) Step();
    for (uint32_t i = 0; i < waiting; ++i) {
      Add(RequestBuilder(running + 1 + i).Prompt(blocked ? 3'000 : kPrompt).MaxTokens(100));
    }
    for (int i = 0; i < 4; ++i) Step();
  }

  // Seconds that one step took the scheduler.
  double Step() {
    events_.clear();
    auto start = std::chrono::steady_clock::now();
    std::optional<StepPlan> plan = scheduler_.Schedule(0, &events_);
    schedule_seconds = Seconds(start);
    if (plan) plans_.push_back(*std::move(plan));
    if (plans_.size() < 2) return schedule_seconds;
    StepResult result = Answer(plans_.front());
    // Prompts fit in the budget, so that every span samples.
    plans_.erase(plans_.begin());
    start = std::chrono::steady_clock::now();
    const absl::Status applied = scheduler_.Apply(result, &events_);
    apply_seconds = Seconds(start);
    LOCKSTEP_CHECK(applied.ok());
    return schedule_seconds + apply_seconds;
  }

  const StepPlan& last_plan() const { return plans_.back(); }
  SchedulerStats stats() const { return scheduler_.Stats(); }

  double schedule_seconds = 0, apply_seconds = 0;

 private:
  static SchedulerConfig Config(uint32_t running, uint32_t waiting, bool blocked) {
    SchedulerConfig config;
    config.max_num_seqs = running + (blocked ? 1 : 0);
    config.max_batched_tokens = 256 * (kPrompt + 16);
    config.max_model_len = 4'096;
    config.num_kv_blocks = running * ((kPrompt + kSteps + 500) / 16 + 3);
    if (blocked) {
      config.num_kv_blocks = running * 12 + 188;
      config.forecast_growth = false;  // or they would not all have started
    }
    config.max_queued_requests = waiting + running;
    config.vocab_size = 1'000;
    return config;
  }
  void Add(const RequestBuilder& builder) {
    LOCKSTEP_CHECK(scheduler_.Add(builder.Build(), 0).ok());
  }

  Scheduler scheduler_;
  std::vector<StepPlan> plans_;
  std::vector<SchedulerEvent> events_;
};

void BM_SteadyDecode(benchmark::State& state) {
  Steady steady(static_cast<uint32_t>(state.range(0)), static_cast<uint32_t>(state.range(1)),
                false);
  double schedule = 0, apply = 0, most_bytes = 0, bytes = 0;
  for (auto _ : state) {
    state.SetIterationTime(steady.Step());
    schedule += steady.schedule_seconds;
    apply += steady.apply_seconds;
    const double size = static_cast<double>(wire::Encode(steady.last_plan()).ByteSizeLong());
    bytes += size;
    most_bytes = std::max(most_bytes, size);
  }
  LOCKSTEP_CHECK(steady.stats().running == state.range(0));
  LOCKSTEP_CHECK(steady.stats().waiting == state.range(1));
  const double steps = static_cast<double>(state.iterations());
  state.counters["schedule_us"] = schedule / steps * 1e6;
  state.counters["apply_us"] = apply / steps * 1e6;
  state.counters["plan_bytes"] = bytes / steps;
  state.counters["plan_bytes_max"] = most_bytes;
}
BENCHMARK(BM_SteadyDecode)
    ->Args({16, 0})
    ->Args({256, 0})
    ->Args({256, 10'000})
    ->UseManualTime()
    ->Iterations(kSteps)
    ->Unit(benchmark::kMicrosecond);

// The head of the queue has a long prompt and is tried in every step.
void BM_BlockedHead(benchmark::State& state) {
  Steady steady(static_cast<uint32_t>(state.range(0)), 10'000, true);
  double schedule = 0;
  for (auto _ : state) {
    state.SetIterationTime(steady.Step());
    schedule += steady.schedule_seconds;
  }
  state.counters["schedule_us"] = schedule / static_cast<double>(state.iterations()) * 1e6;
}
BENCHMARK(BM_BlockedHead)
    ->Arg(256)
    ->UseManualTime()
    ->Iterations(500)
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace lockstep

BENCHMARK_MAIN();
