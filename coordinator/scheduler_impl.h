// The scheduler's state and the steps between its states. Private to
// coordinator/scheduler*.cc:
//
//   scheduler.cc            requests come and go
//   scheduler_death.cc      epochs begin and end; who is blamed for a death
//   scheduler_plan.cc       Schedule(): the one rule
//   scheduler_apply.cc      Apply(): what a step's result means
//   scheduler_integrity.cc  CheckIntegrity()
#ifndef LOCKSTEP_COORDINATOR_SCHEDULER_IMPL_H_
#define LOCKSTEP_COORDINATOR_SCHEDULER_IMPL_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <queue>
#include <utility>
#include <vector>

#include "absl/container/btree_set.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "coordinator/admission.h"
#include "coordinator/growth_forecast.h"
#include "coordinator/kv/block_allocator.h"
#include "coordinator/scheduler.h"
#include "coordinator/sequence.h"
#include "wire/step_plan.h"

namespace lockstep {

// What was asked of one slot in a step that is not yet acknowledged. `run` tells
// whether the slot still belongs to the sequence that it belonged to.
struct PlannedSpan {
  Slot slot;
  uint64_t run = 0;
  uint32_t first_position = 0;
  uint32_t num_tokens = 0;
  uint32_t table_length = 0;  // blocks, after this plan's growth
  bool samples = false;
  // The result must bring log-probabilities of this many prompt positions, from
  // first_position + 1 on.
  uint32_t num_prompt_logprobs = 0;
};

struct PlannedStep {
  uint64_t step = 0;
  uint64_t digest = 0;
  std::vector<PlannedSpan> spans;
};

struct Scheduler::Impl {
  explicit Impl(const SchedulerConfig& c);

  // --- scheduler.cc: requests.
  absl::Status Add(Request request, int64_t now_ms);
  bool Cancel(RequestId id);
  bool Stop(SequenceId id);
  void FailAll(const absl::Status& reason, std::vector<SchedulerEvent>* events);
  SchedulerStats Stats() const;

  // Transitions of one sequence (see coordinator/sequence.h).
  void Enqueue(Sequence* s);    // -> kWaiting
  void LeaveSlot(Sequence* s);  // kRunning ->: slot and blocks given back, nothing computed
  void Preempt(Sequence* s);    // kRunning -> kWaiting
  void End(Sequence* s);        // -> kEnded; the next sibling takes the lead where needed
  void ReleaseHeldBack(LiveRequest* r);

  void Fail(LiveRequest* r, const absl::Status& status, std::vector<SchedulerEvent>* events);
  void Forget(LiveRequest* r);  // ends what is left of it and destroys it
  Sequence* Find(SequenceId id);
  uint32_t num_waiting_requests() const {
    return static_cast<uint32_t>(requests.size()) - num_running_requests;
  }

  // --- scheduler_death.cc: epochs and trials.
  void BeginEpoch(uint64_t new_epoch);
  void EndEpoch(const absl::Status& reason, std::vector<SchedulerEvent>* events);
  void SuspendAll();  // the group is gone: kRunning -> kWaiting, all KV forgotten
  void Suspect(Sequence* s, uint32_t clear_at);
  Sequence* RunningSuspect() const;
  Sequence* WaitingSuspect() const;
  bool TrialIsOn() const;
  void NotePlanned(Sequence* s);  // computes in the plan being made
  void NoteAcknowledged(Sequence* s);
  bool IsPresent(const LiveRequest& r) const;
  std::vector<LiveRequest*> Judge();

  // --- scheduler_plan.cc
  struct Draft;  // a plan in the making
  std::optional<StepPlan> Schedule(int64_t now_ms, std::vector<SchedulerEvent>* events);
  void FailExpired(int64_t now_ms, std::vector<SchedulerEvent>* events);
  bool PlanTrial(Draft* draft);
  void PlanDecodes(Draft* draft);
  void PlanPrefills(Draft* draft);
  void PlanNewcomers(Draft* draft, int64_t now_ms, std::vector<SchedulerEvent>* events);
  bool Grow(Sequence* s, Draft* draft);
  uint32_t ComingBlocks() const;
  PlannedSpan MakeSpan(Sequence* s, uint32_t num_tokens, Draft* draft);
  bool HasRoomFor(const Sequence& s, const std::vector<BlockId>& cached, Draft* draft) const;
  bool TryStart(Sequence* s, Draft* draft);
  bool KeepsGuarantees(const Sequence& newcomer) const;
  std::vector<BlockId> FindCached(const Sequence& s) const;
  GrowthForecast::Run Forecast(const Sequence& s, uint32_t blocks, uint32_t shared) const;
  void NoteStarted(Sequence* s, int64_t now_ms, std::vector<SchedulerEvent>* events);
  StepPlan Finish(Draft* draft);

  // --- scheduler_apply.cc
  absl::Status Apply(const StepResult& result, std::vector<SchedulerEvent>* events);
  absl::Status CheckResult(const StepResult& result) const;
  Sequence* StillRunning(const PlannedSpan& span) const;
  void Acknowledge(Sequence* s, const PlannedSpan& span);
  void EnterCache(Sequence* s);
  void DeliverPromptLogprobs(Sequence* s, const SlotPromptLogprobs& list,
                             std::vector<SchedulerEvent>* events);
  void DeliverToken(Sequence* s, const SampledToken& sampled, std::vector<SchedulerEvent>* events);
  void Complete(Sequence* s, FinishReason reason, std::optional<TokenId> ending_token,
                std::vector<SchedulerEvent>* events);

  // --- scheduler_integrity.cc
  absl::Status CheckIntegrity() const;
  absl::Status CheckCounts() const;
  absl::Status CheckBlocks() const;
  absl::Status CheckTrial() const;
  absl::Status CheckSequence(const Sequence& s) const;
  absl::Status CheckQueues() const;

  // Sharing of blocks: across requests of one salt, or, with the prefix cache
  // off, among the n sequences of one request only.
  bool MayShare(const Sequence& s) const;
  uint64_t Salt(const Sequence& s) const;
  // Blocks of the sequence that may become entries.
  uint32_t CacheableBlocks(const Sequence& s) const;
  bool WantsPromptLogprobs(const Sequence& s) const;
  // Preempted often enough: it runs to its end the next time it is admitted.
  static bool IsGuaranteed(const Sequence& s);

  const SchedulerConfig config;
  Admission admission;
  BlockAllocator allocator;
  AnswerLength answer_length;

  absl::flat_hash_map<RequestId, std::unique_ptr<LiveRequest>> requests;
  absl::btree_set<Sequence*, AdmittedFirst> waiting;
  std::vector<Sequence*> running;  // SeniorFirst
  absl::btree_set<std::pair<int64_t, RequestId>> deadlines;
  std::vector<Sequence*> by_slot;  // nullptr: nobody
  // The lowest free slot first: small numbers keep plans short.
  std::priority_queue<uint32_t, std::vector<uint32_t>, std::greater<>> free_slots;
  std::vector<Slot> finished_slots;  // for the next plan

  bool epoch_open = false;
  uint64_t epoch = 0;
  uint64_t last_step = 0;     // planned
  uint64_t acknowledged = 0;  // steps
  std::deque<PlannedStep> in_flight;

  uint32_t num_suspects = 0;  // sequences
  // Of this epoch: whose suspect was planned last, and in which step.
  std::optional<RequestId> on_trial;
  uint64_t trial_step = 0;

  uint64_t next_arrival = 1;
  uint64_t next_run = 1;
  uint32_t num_running_requests = 0;
  uint32_t num_guaranteed = 0;  // running ones
  SchedulerStats totals;        // what only grows
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_SCHEDULER_IMPL_H_
