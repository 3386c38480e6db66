// What preemptions cost where the blocks are short: many long answers at once through the
// scheduler, with steps that take what a model of a 70B in FP8 on one H200 says. Not a test:
// it prints. Seconds and tokens a second are the model's; preemptions and prompt tokens (all
// over the requests' own are computed again) are the scheduler's.
//
//   bench_admission [requests [blocks]]      default: 320 20200
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "common/check.h"
#include "coordinator/scheduler.h"
#include "tests/fakes/request_builder.h"

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

class Run {
 public:
  Run(uint32_t requests, uint32_t blocks, bool forecast)
      : requests_(requests), scheduler_(Config(blocks, forecast)) {
    scheduler_.BeginEpoch(1);
    // Short answers before, as of a warm-up.
    for (uint32_t id = 1; id <= 8; ++id) Add(RequestBuilder(id).Prompt(16).MaxTokens(16));
    while (scheduler_.HasRequests()) Step();
    outcome_ = {};
  }
  Outcome All() {
    for (uint32_t id = 1; id <= requests_; ++id)
      Add(RequestBuilder(100 + id).Prompt(kPrompt).MaxTokens(kAnswer));
    while (scheduler_.HasRequests()) Step();
    outcome_.preemptions = scheduler_.Stats().preemptions;
    return outcome_;
  }

 private:
  static SchedulerConfig Config(uint32_t blocks, bool forecast) {
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
  void Add(const RequestBuilder& builder) {
    LOCKSTEP_CHECK(scheduler_.Add(builder.Build(), 0).ok());
  }
  void Step() {
    events_.clear();
    if (std::optional<StepPlan> plan = scheduler_.Schedule(0, &events_)) {
      Count(*plan);
      plans_.push_back(*std::move(plan));
      if (plans_.size() < 2) return;
    }
    if (plans_.empty()) return;
    const StepResult result = Answer(plans_.front());
    plans_.erase(plans_.begin());
    LOCKSTEP_CHECK(scheduler_.Apply(result, &events_).ok());
  }
  void Count(const StepPlan& plan) {
    uint64_t tokens = 0;
    for (const Span& span : plan.spans) {
      tokens += span.num_tokens;
      outcome_.prefilled += span.num_tokens > 1 ? span.num_tokens : 0;
    }
    const double arithmetic = static_cast<double>(tokens) * kToken;
    const double kv = scheduler_.Stats().blocks_active * kBlock * kKv;
    outcome_.seconds += (arithmetic > kWeights ? arithmetic : kWeights) + kv + kStep;
  }
  // A token of every span that reaches the end of what is known.
  StepResult Answer(const StepPlan& plan) {
    StepResult result;
    result.epoch = plan.epoch;
    result.step = plan.step;
    result.digest = plan.digest;
    for (const NewSequence& s : plan.new_sequences)
      left_[s.slot] = static_cast<uint32_t>(s.tokens.size()) - s.num_computed_tokens;
    for (const Span& span : plan.spans) {
      uint32_t& left = left_[span.slot];
      left -= left < span.num_tokens ? left : span.num_tokens;
      if (left > 0) continue;
      SampledToken token;
      token.slot = span.slot;
      token.token = 7;
      result.sampled.push_back(token);
    }
    return result;
  }

  const uint32_t requests_;
  Scheduler scheduler_;
  std::vector<StepPlan> plans_;
  std::vector<SchedulerEvent> events_;
  std::map<Slot, uint32_t> left_;
  Outcome outcome_;
};

void Report(const char* name, uint32_t requests, uint32_t blocks, bool forecast) {
  const Outcome o = Run(requests, blocks, forecast).All();
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
