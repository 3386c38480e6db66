// What the clients of a simulated run were promised and what they got. Every
// scheduler event goes through it and is compared with the oracle (sim_model.h)
// at once; the first thing that is wrong is the violation.
//
// Checks invariants 7 (one terminal event, nothing after it), 8 (token index i
// once, in order, at most max_tokens), 9 (output equals the fault-free run) and,
// from the plans, 14 (the oldest is never preempted, at most three preemptions)
// and 15 (no step for who has ended or is past its deadline).
#ifndef LOCKSTEP_TESTS_SIM_LEDGER_H_
#define LOCKSTEP_TESTS_SIM_LEDGER_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/request.h"
#include "coordinator/scheduler.h"
#include "wire/step_plan.h"

namespace lockstep::sim {

class Ledger {
 public:
  struct Expected {
    std::vector<TokenId> tokens;  // what is to be delivered in the end
    FinishReason reason = FinishReason::kLength;
  };
  struct Output {
    Expected expected;
    size_t delivered = 0;
    std::optional<size_t> stop_at;  // the text stage finds a stop string in this token
    bool ended = false;
    int preemptions = 0;
  };
  struct Entry {
    Request request;
    uint64_t arrival = 0;
    std::vector<Output> outputs;  // by index
    bool started = false, over = false;
    bool poisoned = false;  // some sequence meets NaN
    // The group dies whenever this position of its first sequence is computed.
    std::optional<uint32_t> kills_at;
    uint32_t next_prompt_logprob = 1;
    int deaths = 0;          // group deaths it may have been part of
    uint64_t last_step = 0;  // the last plan that computes for it
    size_t open() const;
  };

  void Accept(Entry entry);
  // The client left, or the text stage ended a sequence.
  void Cancelled(RequestId id);
  void Stopped(SequenceId id);
  // What the scheduler said.
  void Take(const SchedulerEvent& event);
  // What it planned.
  void CheckPlan(const StepPlan& plan, int64_t now_ms);
  // The group is gone after answering this many steps: slots are empty. Call
  // before taking the events of EndEpoch.
  void EpochEnded(uint64_t acknowledged);
  // By the plans' word.
  bool HoldsSlot(RequestId id) const;
  SequenceId InSlot(Slot slot) const { return in_slot_.at(slot.value).id; }

  bool KillerLives() const;

  std::map<uint64_t, Entry>& live() { return live_; }
  Entry* Find(RequestId id);
  const std::string& violation() const { return violation_; }
  template <typename... Args>
  void Violate(const Args&... args) {
    if (violation_.empty()) violation_ = absl::StrCat(args...);
  }

  uint64_t completed = 0, failed = 0, cancelled = 0, preempted = 0, stopped = 0;
  uint64_t innocent_failed = 0;  // failed, and neither poisoned nor a killer of groups

 private:
  struct Occupant {
    SequenceId id;
    std::tuple<int32_t, uint64_t, uint32_t> seniority;
  };

  void Take(const StartedEvent& e);
  void Take(const PromptLogprobsEvent& e);
  void Take(const TokenEvent& e);
  void Take(const FinishedEvent& e);
  void Take(const FailedEvent& e);
  Output* Open(SequenceId id, const char* what);
  void EndOutput(Entry* entry, Output* output);
  void CheckReleased(const StepPlan& plan);

  std::map<uint64_t, Entry> live_;         // by request id; erased when over
  std::map<int64_t, SequenceId> by_seed_;  // of every sequence ever accepted
  std::map<uint32_t, Occupant> in_slot_;   // by the plans' word
  std::string violation_;
};

}  // namespace lockstep::sim

#endif  // LOCKSTEP_TESTS_SIM_LEDGER_H_
