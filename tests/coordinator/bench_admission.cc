// What preemptions cost where the blocks are short: many long answers at once through the
// scheduler, with steps that take what a model of a 70B in FP8 on one H200 says. Not a test:
// it prints. Seconds and tokens a second are the model's; preemptions and prompt tokens (all
// over the requests' own are computed again) are the scheduler's.
//
//   bench_admission [requests [blocks]]      default: 320 20200
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <optional>

#include "common/check.h"
#include "tests/fakes/scheduler_harness.h"

namespace lockstep {
namespace {

constexpr uint32_t kPrompt = 1'000, kAnswer = 1'000, kBlock = 16;
// Of the machine: seconds to read the weights, a token's arithmetic, a KV token's reading,
// and what any step takes besides.
constexpr double kWeights = 16.5e-3, kToken = 1.4e11 / 1.2e15, kKv = 163'840 / 4.0e12, kStep = 3e-3;

struct Outcome {
  double seconds = 0;
  uint64_t preemptions = 0, prefilled = 0;
};

SchedulerConfig Config(uint32_t blocks, bool forecast) {
  SchedulerConfig config;
  config.max_num_seqs = 512;
  config.max_batched_tokens = 8'192;
  config.max_model_len = 4'096;
  config.block_size = kBlock;
  config.num_kv_blocks = blocks;
  config.max_queued_requests = 1'000'000;
  config.vocab_size = 1'000;
  config.forecast_growth = forecast;
  config.enable_prefix_caching = false;
  return config;
}

Outcome Run(uint32_t requests, uint32_t blocks, bool forecast) {
  SchedulerHarness h(Config(blocks, forecast));
  h.model = [](const NewSequence&, uint32_t) { return TokenId{7}; };
  const auto add = [&](const RequestBuilder& builder) { LOCKSTEP_CHECK(h.Add(builder).ok()); };
  // Short answers before, as of a warm-up.
  for (uint32_t id = 1; id <= 8; ++id) add(RequestBuilder(id).Prompt(16).MaxTokens(16));
  h.RunAll();

  for (uint32_t id = 1; id <= requests; ++id)
    add(RequestBuilder(100 + id).Prompt(kPrompt).MaxTokens(kAnswer));
  Outcome outcome;
  while (h.scheduler.HasRequests()) {
    while (const std::optional<StepPlan> plan = h.Plan()) {
      uint64_t tokens = 0;
      for (const Span& span : plan->spans) {
        tokens += span.num_tokens;
        outcome.prefilled += span.num_tokens > 1 ? span.num_tokens : 0;
      }
      const double kv = h.scheduler.Stats().blocks_active * kBlock * kKv;
      outcome.seconds += std::max(static_cast<double>(tokens) * kToken, kWeights) + kv + kStep;
    }
    LOCKSTEP_CHECK(h.Answer().ok());
    h.events.clear();
  }
  outcome.preemptions = h.scheduler.Stats().preemptions;
  return outcome;
}

void Report(const char* name, uint32_t requests, uint32_t blocks, bool forecast) {
  const Outcome o = Run(requests, blocks, forecast);
  std::printf("%-28s %7.1f s %7.0f tok/s %5llu preemptions %9llu prompt tokens\n", name, o.seconds,
              requests * kAnswer / o.seconds, static_cast<unsigned long long>(o.preemptions),
              static_cast<unsigned long long>(o.prefilled));
}

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) {
  const uint32_t requests = argc > 1 ? static_cast<uint32_t>(std::atoi(argv[1])) : 320;
  const uint32_t blocks = argc > 2 ? static_cast<uint32_t>(std::atoi(argv[2])) : 20'200;
  std::printf("%u requests of 1,000 in, 1,000 out; %u blocks of 16\n", requests, blocks);
  lockstep::Report("room for two blocks more", requests, blocks, false);
  lockstep::Report("by forecast", requests, blocks, true);
  return 0;
}
