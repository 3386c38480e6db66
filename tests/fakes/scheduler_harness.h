// Drives a scheduler by hand: plans are answered by a worker that gives every
// sampling span a token of the test's choice (or 10, 11, 12, ... by order), and
// the books are checked after every call.
#ifndef LOCKSTEP_TESTS_FAKES_SCHEDULER_HARNESS_H_
#define LOCKSTEP_TESTS_FAKES_SCHEDULER_HARNESS_H_

#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "coordinator/scheduler.h"
#include "gtest/gtest.h"
#include "tests/fakes/request_builder.h"

namespace lockstep {

// Four sequences of up to 64 tokens, 16 tokens a step, room for 256: small enough that
// a test reaches every bound.
inline SchedulerConfig SmallSchedulerConfig() {
  SchedulerConfig config;
  config.max_num_seqs = 4;
  config.max_batched_tokens = 16;
  config.max_model_len = 64;
  config.block_size = 4;
  config.num_kv_blocks = 64;
  config.max_queued_requests = 8;
  config.vocab_size = 1'000;
  return config;
}

class SchedulerHarness {
 public:
  explicit SchedulerHarness(const SchedulerConfig& config) : scheduler(config) {
    scheduler.BeginEpoch(1);
  }

  absl::Status Add(const RequestBuilder& builder) {
    const absl::Status status = scheduler.Add(builder.Build(), now_ms);
    Check();
    return status;
  }

  std::optional<StepPlan> Plan() {
    std::optional<StepPlan> plan = scheduler.Schedule(now_ms, &events);
    Check();
    if (!plan) return plan;
    for (const Slot slot : plan->finished_slots) slots.erase(slot);
    for (const NewSequence& s : plan->new_sequences) {
      slots[s.slot] = {s, s.num_computed_tokens, static_cast<uint32_t>(s.tokens.size())};
    }
    sent.push_back({*plan, Honest(*plan)});
    return plan;
  }

  // What an honest worker answers to the oldest plan.
  StepResult& NextResult() { return sent.front().second; }

  absl::Status Answer() {
    const StepResult result = std::move(sent.front().second);
    sent.pop_front();
    const absl::Status status = scheduler.Apply(result, &events);
    Check();
    return status;
  }

  // One step, nothing in flight before or after.
  StepPlan Step() {
    std::optional<StepPlan> plan = Plan();
    EXPECT_TRUE(plan.has_value()) << "nothing to run";
    if (!plan) return {};
    EXPECT_EQ(Answer(), absl::OkStatus());
    return *std::move(plan);
  }

  // Steps until nothing is left to do.
  void RunAll() {
    while (Plan().has_value() || !sent.empty()) {
      while (Plan().has_value()) {
      }
      ASSERT_EQ(Answer(), absl::OkStatus());
    }
  }

  void Die() {
    sent.clear();
    slots.clear();
    scheduler.EndEpoch(absl::UnavailableError("rank 1 died"), &events);
    Check();
  }
  void BeginEpoch(uint64_t epoch) {
    scheduler.BeginEpoch(epoch);
    Check();
  }

  void Check() { ASSERT_EQ(scheduler.CheckIntegrity(), absl::OkStatus()); }

  template <typename Event>
  std::vector<Event> EventsOf() const {
    std::vector<Event> found;
    for (const SchedulerEvent& event : events) {
      if (const auto* e = std::get_if<Event>(&event)) found.push_back(*e);
    }
    return found;
  }
  std::vector<TokenId> Tokens(uint64_t request, uint32_t index = 0) const {
    std::vector<TokenId> tokens;
    for (const TokenEvent& e : EventsOf<TokenEvent>()) {
      if (e.sequence == SequenceId{RequestId(request), index}) tokens.push_back(e.token);
    }
    return tokens;
  }

  struct SlotView {
    NewSequence sequence;
    uint32_t computed = 0, known = 0;
  };

  Scheduler scheduler;
  std::vector<SchedulerEvent> events;
  std::deque<std::pair<StepPlan, StepResult>> sent;
  std::map<Slot, SlotView> slots;
  int64_t now_ms = 0;
  // The token that a sequence gets at a position (the number of known tokens).
  std::function<TokenId(const NewSequence&, uint32_t)> model =
      [](const NewSequence& s, uint32_t position) { return 10 + position - s.num_prompt_tokens; };

 private:
  StepResult Honest(const StepPlan& plan) {
    StepResult result;
    result.epoch = plan.epoch;
    result.step = plan.step;
    result.digest = plan.digest;
    for (const Span& span : plan.spans) {
      SlotView& slot = slots.at(span.slot);
      const uint32_t begin = slot.computed, end = begin + span.num_tokens;
      slot.computed = end;
      if (slot.sequence.sampling.prompt_logprobs >= 0 &&
          begin + 1 < slot.sequence.num_prompt_tokens) {
        SlotPromptLogprobs list{span.slot, begin + 1, {}};
        for (uint32_t p = begin + 1; p <= end && p < slot.sequence.num_prompt_tokens; ++p) {
          TokenLogprobs entry;
          entry.rank = p;
          list.entries.push_back(entry);
        }
        result.prompt_logprobs.push_back(std::move(list));
      }
      EXPECT_LE(end, slot.known);
      if (end < slot.known) continue;
      SampledToken token;
      token.slot = span.slot;
      token.token = model(slot.sequence, slot.known++);
      if (slot.sequence.sampling.logprobs >= 0) token.has_logprobs = true;
      result.sampled.push_back(token);
    }
    return result;
  }
};

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_FAKES_SCHEDULER_HARNESS_H_
