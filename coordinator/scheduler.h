// Decides what every step computes. One rule: a sequence has known tokens
// (prompt + generated) and computed tokens; a step lets computed catch up with
// known under a token budget and a sequence budget. Decodes first, then partial
// prefills, then waiting requests by (priority, arrival). Chunked prefill,
// continuous batching, prefix-cache hits (computed starts above zero),
// preemption (computed back to zero) and replay after a fault (all back to
// zero) are that rule.
//
// Run-ahead: up to two plans are unacknowledged. Schedule() counts the tokens
// in flight as known without knowing their values; a sequence that turns out
// to have ended costs one wasted token. Blocks freed meanwhile are fenced: they
// become reusable when the last step that may write them is acknowledged.
//
// A pure state machine: no clock, thread, gRPC or I/O. Called by one thread
// (the engine's); the time is handed in.
//
//   scheduler.BeginEpoch(1);
//   scheduler.Add(request, now_ms);                     // after Admission said yes
//   while (auto plan = scheduler.Schedule(now_ms)) Send(*plan);
//   scheduler.Apply(result, &events);                   // per acknowledged step, in order
#ifndef LOCKSTEP_COORDINATOR_SCHEDULER_H_
#define LOCKSTEP_COORDINATOR_SCHEDULER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "common/ids.h"
#include "coordinator/request.h"
#include "wire/step_plan.h"

namespace lockstep {

struct SchedulerConfig {
  uint32_t max_num_seqs = 16;
  uint32_t max_batched_tokens = 2048;
  uint32_t max_model_len = 2048;
  uint32_t block_size = 16;
  uint32_t num_kv_blocks = 0;
  uint32_t max_queued_requests = 64;
  uint32_t expected_tokens = 1024;  // of an answer, until some have ended
  // false, for tests of short blocks: whoever has room for two blocks more starts.
  bool forecast_growth = true;
  uint32_t vocab_size = 0;  // a sampled token at or above it is a lying worker
  bool enable_prefix_caching = true;
  int max_plans_in_flight = 2;
  // Of the prefix cache's hash; 0: the engine draws one.
  uint64_t cache_hash_key = 0;
};

// What happened to sequences, in order. Token index i of a sequence appears
// exactly once across all epochs; a sequence's kFinished, or its request's
// kFailed, is the last thing said of it.
struct StartedEvent {  // first time any of the request's tokens is scheduled
  RequestId request;
  uint32_t cached_tokens = 0;
};
struct PromptLogprobsEvent {
  RequestId request;
  uint32_t first_position = 0;
  std::vector<TokenLogprobs> entries;
};
struct TokenEvent {
  SequenceId sequence;
  TokenId token = 0;
  std::optional<TokenLogprobs> logprobs;
};
struct FinishedEvent {
  SequenceId sequence;
  FinishReason reason = FinishReason::kStop;
  std::optional<TokenId> ending_token;  // when it was one
  uint32_t completion_tokens = 0;
};
struct FailedEvent {  // terminal for the whole request: deadline, poison, NaN logits, shutdown
  RequestId request;
  absl::Status status;
};
using SchedulerEvent =
    std::variant<StartedEvent, PromptLogprobsEvent, TokenEvent, FinishedEvent, FailedEvent>;

struct SchedulerStats {
  uint64_t received = 0, completed = 0, failed = 0, cancelled = 0, rejected = 0;  // requests, ever
  uint32_t waiting = 0, running = 0;                                              // requests, now
  uint64_t preemptions = 0;
  uint64_t prompt_tokens = 0, generated_tokens = 0;
  uint64_t prefix_cache_queries = 0, prefix_cache_hits = 0;  // tokens
  uint32_t blocks_free = 0, blocks_cached = 0, blocks_active = 0, blocks_pending = 0;
};

class Scheduler {
 public:
  explicit Scheduler(const SchedulerConfig& config);
  ~Scheduler();

  // InvalidArgument: can never fit (names the field and the limit).
  // ResourceExhausted: the queue is full now. Otherwise the request waits.
  absl::Status Add(Request request, int64_t now_ms);

  // The client left: every sequence of the request ends without an event.
  // False when there is no such request any more.
  bool Cancel(RequestId request);
  // The text stage found a stop string: that sequence is complete (kStop, no event).
  bool Stop(SequenceId sequence);

  // Starts stepping under `epoch` with empty KV: everything that ran waits
  // again, before all newcomers, with its known tokens kept and computed = 0.
  void BeginEpoch(uint64_t epoch);
  // The group died. Requests that had something in a step are suspects: they are
  // replayed one after another, and one that kills the group again fails alone
  // with `reason` (Unavailable, naming the rank). So does every request present
  // at two deaths of which no suspect was the cause (scheduler_death.cc). No
  // plans until BeginEpoch.
  void EndEpoch(const absl::Status& reason, std::vector<SchedulerEvent>* events);
  // Fails every request (recovery timed out, shutdown).
  void FailAll(const absl::Status& reason, std::vector<SchedulerEvent>* events);

  // The next plan, or nothing when nothing can run or two are in flight.
  // Requests past their deadline fail here (DeadlineExceeded).
  std::optional<StepPlan> Schedule(int64_t now_ms, std::vector<SchedulerEvent>* events);

  // Takes the result of the oldest unacknowledged step. An error means the
  // worker lied (wrong step, stale epoch, unknown slot, token >= vocabulary):
  // the caller closes the epoch.
  absl::Status Apply(const StepResult& result, std::vector<SchedulerEvent>* events);

  int plans_in_flight() const;
  bool HasRequests() const;
  // Earliest deadline among live requests; kNoDeadline when none.
  int64_t NextDeadlineMs() const;
  SchedulerStats Stats() const;
  // Every invariant of the books; Internal with the first one broken.
  absl::Status CheckIntegrity() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_SCHEDULER_H_
