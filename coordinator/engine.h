// The engine thread: owns the scheduler and everything it decides. Other threads
// reach it only through a bounded inbox.
//
//   drain inbox -> admit -> plan = scheduler.Schedule() -> group.Send(plan)
//               -> scheduler.Apply(result) -> publish to each request's sink
//
// Submit, Cancel and Stop are thread-safe and never block. A RequestSink is
// called from the engine thread only and must not block: it hands what it gets
// to the text stage (coordinator/api).
#ifndef LOCKSTEP_COORDINATOR_ENGINE_H_
#define LOCKSTEP_COORDINATOR_ENGINE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/request.h"
#include "coordinator/scheduler.h"
#include "coordinator/worker_group.h"

namespace lockstep {

// Exactly one terminal call per request: OnFinished for its last sequence, or
// OnFailed; nothing after it. No call at all after Engine::Cancel returned...
// other than those already under way: a sink must tolerate a late call.
class RequestSink {
 public:
  virtual ~RequestSink() = default;
  virtual void OnStarted(uint32_t cached_tokens) = 0;
  virtual void OnPromptLogprobs(uint32_t first_position, std::vector<TokenLogprobs> entries) = 0;
  virtual void OnToken(uint32_t index, TokenId token, std::optional<TokenLogprobs> logprobs) = 0;
  virtual void OnFinished(uint32_t index, FinishReason reason,
                          std::optional<TokenId> ending_token, uint32_t completion_tokens) = 0;
  // Refused by admission (InvalidArgument, ResourceExhausted) or ended early
  // (DeadlineExceeded, Unavailable, Internal).
  virtual void OnFailed(const absl::Status& status) = 0;
};

enum class EngineState { kLoading, kReady, kRecovering, kDraining, kFailed };

// A snapshot for readiness, GetModelInfo and logs.
struct EngineInfo {
  EngineState state = EngineState::kLoading;
  uint64_t epoch = 0;
  uint32_t num_kv_blocks = 0;
  uint32_t max_num_seqs = 0;
  std::vector<RankReport> ranks;  // of the current or last epoch
  int64_t last_step_ms = 0;       // engine clock
  absl::Status failure;           // why kFailed / what is being recovered from
};

// Told what happens, for metrics; every call from the engine thread.
class EngineObserver {
 public:
  virtual ~EngineObserver() = default;
  virtual void OnStep(const StepPlan& plan, const GroupStep& step, double plan_seconds,
                      double step_seconds) {
    (void)plan, (void)step, (void)plan_seconds, (void)step_seconds;
  }
  virtual void OnStats(const SchedulerStats& stats, const EngineInfo& info) {
    (void)stats, (void)info;
  }
  virtual void OnRejected(const absl::Status& status) { (void)status; }
};

struct EngineOptions {
  SchedulerConfig scheduler;       // num_kv_blocks and max_num_seqs are set when the group forms
  int64_t recovery_timeout_ms = 60'000;
  size_t inbox_capacity = 4'096;   // submissions; cancels and group events always fit
};

class Engine {
 public:
  Engine(EngineOptions options, std::unique_ptr<WorkerGroup> group,
         std::shared_ptr<EngineObserver> observer);
  ~Engine();  // Shutdown if still running

  void Start();

  // Unavailable while loading, draining or failed; ResourceExhausted when the
  // inbox is full. On OK the sink will get exactly one terminal call.
  absl::StatusOr<RequestId> Submit(Request request, std::shared_ptr<RequestSink> sink);
  void Cancel(RequestId request);
  void Stop(SequenceId sequence);

  // Milliseconds of the engine's monotonic clock, for arrival and deadlines.
  int64_t NowMs() const;
  EngineInfo Info() const;
  SchedulerStats Stats() const;

  // No admission from here on; returns when nothing runs or `timeout_ms` passed
  // (what is left then fails with Unavailable). Then Shutdown.
  void Drain(int64_t timeout_ms);
  void Shutdown();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_ENGINE_H_
