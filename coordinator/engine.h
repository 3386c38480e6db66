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
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/engine_client.h"
#include "coordinator/request.h"
#include "coordinator/scheduler.h"
#include "coordinator/worker_group.h"

namespace lockstep {

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
  SchedulerConfig scheduler;  // num_kv_blocks and max_num_seqs are set when the group forms
  int64_t recovery_timeout_ms = 60'000;
  size_t inbox_capacity = 4'096;  // submissions; cancels and group events always fit
  // Told each change of state or failure, from the engine thread; must not block.
  std::function<void(const EngineInfo&)> on_change;
  // Told the first result of each epoch, likewise.
  std::function<void()> on_first_step;
};

class Engine : public EngineClient {
 public:
  Engine(EngineOptions options, std::unique_ptr<WorkerGroup> group,
         std::shared_ptr<EngineObserver> observer);
  ~Engine() override;  // Shutdown if still running

  void Start();

  absl::StatusOr<RequestId> Submit(Request request, std::shared_ptr<RequestSink> sink) override;
  void Cancel(RequestId request) override;
  void Stop(SequenceId sequence) override;
  int64_t NowMs() const override;
  EngineInfo Info() const override;
  SchedulerStats Stats() const override;

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
