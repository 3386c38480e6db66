// The step plan and its result as plain values: what the scheduler makes and
// consumes and what a worker executes. proto/step_plan.proto is the same thing
// on the wire; wire/codec.h translates, and checks.
//
//   scheduler --StepPlan--> codec ==gRPC==> codec --StepPlan--> step executor
//   scheduler <--StepResult-- codec <==gRPC== codec <--StepResult-- step executor
#ifndef LOCKSTEP_WIRE_STEP_PLAN_H_
#define LOCKSTEP_WIRE_STEP_PLAN_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "common/ids.h"

namespace lockstep {

// A logit divided by less may not be finite any more.
inline constexpr float kMinRepetitionPenalty = 1e-9f;

// How one slot samples, validated and defaulted. Applied in this order:
// logit_bias, penalties, min_tokens mask, temperature, top_k, top_p, min_p.
struct SlotSampling {
  float temperature = 1.0f;  // 0: greedy, ties to the lowest id
  float top_p = 1.0f;
  uint32_t top_k = 0;  // 0: off
  float min_p = 0.0f;
  float repetition_penalty = 1.0f;  // over prompt and generated tokens; see kMinRepetitionPenalty
  float presence_penalty = 0.0f;    // over generated tokens
  float frequency_penalty = 0.0f;   // over generated tokens
  int64_t seed = 0;                 // of this sequence, already distinct per index of n
  std::vector<std::pair<TokenId, float>> logit_bias;
  uint32_t min_tokens = 0;
  std::vector<TokenId>
      ending_ids;         // masked until min_tokens are generated; empty when min_tokens is 0
  int32_t logprobs = -1;  // alternatives a generated token; -1: none
  int32_t prompt_logprobs = -1;  // likewise for prompt tokens
  bool operator==(const SlotSampling&) const = default;
};

struct NewSequence {
  Slot slot;
  std::vector<TokenId> tokens;  // every known token; never empty
  uint32_t num_prompt_tokens = 0;
  uint32_t num_computed_tokens = 0;  // KV present in the first blocks; < tokens.size()
  std::vector<BlockId> block_ids;
  SlotSampling sampling;
  bool operator==(const NewSequence&) const = default;
};

struct GrownTable {
  Slot slot;
  std::vector<BlockId> block_ids;  // appended
  bool operator==(const GrownTable&) const = default;
};

// One slot's work in a step: num_tokens positions from the slot's computed
// count on. A span that reaches the slot's last known token samples the next
// one, which becomes known on the worker at once (the coordinator learns it
// with the result, possibly after the next plan was sent).
struct Span {
  Slot slot;
  uint32_t num_tokens = 0;
  bool operator==(const Span&) const = default;
};

struct StepPlan {
  uint64_t epoch = 0;
  uint64_t step = 0;
  uint64_t digest = 0;  // see wire/plan_digest.h
  // Applied in this order.
  std::vector<Slot> finished_slots;
  std::vector<NewSequence> new_sequences;
  std::vector<GrownTable> grown_tables;
  std::vector<Span> spans;
  bool operator==(const StepPlan&) const = default;
};

// From the raw distribution, before bias, penalties and temperature.
struct TokenLogprobs {
  float logprob = 0.0f;                        // of the token itself
  uint32_t rank = 0;                           // 1: the most likely
  std::vector<std::pair<TokenId, float>> top;  // most likely first
  bool operator==(const TokenLogprobs&) const = default;
};

struct SampledToken {
  Slot slot;
  TokenId token = 0;
  bool poisoned = false;  // the logits held NaN or infinity: no token was sampled
  bool has_logprobs = false;
  TokenLogprobs logprobs;
  bool operator==(const SampledToken&) const = default;
};

struct SlotPromptLogprobs {
  Slot slot;
  uint32_t first_position = 0;  // entries[i] speaks of the prompt token at first_position + i
  std::vector<TokenLogprobs> entries;
  bool operator==(const SlotPromptLogprobs&) const = default;
};

// Nanoseconds; the first two are values of the worker's monotonic clock.
struct StepTiming {
  uint64_t plan_received_ns = 0;
  uint64_t started_ns = 0;
  uint64_t compute_ns = 0;
  uint64_t collective_wait_ns = 0;
  uint64_t collective_transfer_ns = 0;
  uint64_t sampling_ns = 0;
  uint64_t total_ns = 0;
  uint64_t collective_bytes = 0;
  uint64_t device_idle_ns = 0;  // before this step; 0: the backend does not measure it
  bool operator==(const StepTiming&) const = default;
};

struct StepResult {
  uint64_t epoch = 0;
  uint64_t step = 0;
  uint64_t digest = 0;
  uint32_t num_collectives = 0;
  StepTiming timing;
  // Rank 0 only:
  std::vector<SampledToken>
      sampled;  // in span order, one per span that reached its last known token
  std::vector<SlotPromptLogprobs> prompt_logprobs;
  bool operator==(const StepResult&) const = default;
};

}  // namespace lockstep

#endif  // LOCKSTEP_WIRE_STEP_PLAN_H_
