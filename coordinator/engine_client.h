// The engine as the API doors see it: submit, cancel, stop, look. Engine is the
// one implementation in production; tests of the doors replay scripted tokens
// behind the same surface.
//
// Every call is thread-safe and never blocks. A RequestSink is called from the
// engine thread only and must not block either: it hands what it gets to the
// text stage (coordinator/api).
#ifndef LOCKSTEP_COORDINATOR_ENGINE_CLIENT_H_
#define LOCKSTEP_COORDINATOR_ENGINE_CLIENT_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/ids.h"
#include "coordinator/request.h"
#include "coordinator/scheduler.h"
#include "coordinator/worker_group.h"
#include "wire/step_plan.h"

namespace lockstep {

// Exactly one terminal call per request: OnFinished for its last sequence,
// OnFailed or OnRejected; nothing after it. A sequence ended by Stop, and a request ended by
// Cancel, is over without a call; because both travel to the engine thread, a
// sink must tolerate calls that were under way.
class RequestSink {
 public:
  virtual ~RequestSink() = default;
  virtual void OnStarted(uint32_t cached_tokens) = 0;
  virtual void OnPromptLogprobs(uint32_t first_position, std::vector<TokenLogprobs> entries) = 0;
  virtual void OnToken(uint32_t index, TokenId token, std::optional<TokenLogprobs> logprobs) = 0;
  virtual void OnFinished(uint32_t index, FinishReason reason, std::optional<TokenId> ending_token,
                          uint32_t completion_tokens) = 0;
  // Ended early (DeadlineExceeded, Unavailable, Internal).
  virtual void OnFailed(const absl::Status& status) = 0;
  // Never admitted (InvalidArgument, ResourceExhausted, Unavailable); the engine has
  // counted it as a rejection.
  virtual void OnRejected(const absl::Status& status) { OnFailed(status); }
};

enum class EngineState { kLoading, kReady, kRecovering, kDraining, kFailed };

// A snapshot for readiness, GetModelInfo and logs.
struct EngineInfo {
  EngineState state = EngineState::kLoading;
  bool whole = false;  // the group, which draining hides
  uint64_t epoch = 0;
  uint32_t num_kv_blocks = 0;
  uint32_t max_num_seqs = 0;
  uint32_t max_queued_requests = 0;
  std::vector<RankReport> ranks;  // of the current or last epoch
  int64_t last_step_ms = 0;       // engine clock
  absl::Status failure;           // why kFailed / what is being recovered from
};

class EngineClient {
 public:
  virtual ~EngineClient() = default;
  // Unavailable while loading, draining, failed, or not whole again after the
  // recovery timeout; ResourceExhausted when the inbox is full. On OK the sink
  // will get exactly one terminal call.
  virtual absl::StatusOr<RequestId> Submit(Request request, std::shared_ptr<RequestSink> sink) = 0;
  virtual void Cancel(RequestId request) = 0;
  virtual void Stop(SequenceId sequence) = 0;

  // Milliseconds of the engine's monotonic clock, for arrival and deadlines.
  virtual int64_t NowMs() const = 0;
  virtual EngineInfo Info() const = 0;
  virtual SchedulerStats Stats() const = 0;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_ENGINE_CLIENT_H_
