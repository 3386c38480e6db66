// A group dies, and whose doing it may have been.
//
// Whoever had something in a step at a death is a suspect of it, until it has
// computed again every position that it had reached then. Each suspect is
// replayed on trial: while it is, the steps in flight compute for it and for
// nobody else; who runs otherwise keeps slot and blocks and pauses. Then a second
// death tells:
//
//   during a trial      the suspect is the culprit and fails alone; the deaths
//                       until then count against nobody else
//   without one         who is present at its second death fails
//
// So a request that kills its group does it twice at most, and takes nobody with
// it. Being cleared is passing the place; it does not undo having been there.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "coordinator/scheduler_impl.h"

namespace lockstep {

void Scheduler::Impl::Suspect(Sequence* s, uint32_t clear_at) {
  num_suspects += (clear_at > 0 ? 1 : 0) - (s->clear_at > 0 ? 1 : 0);
  s->clear_at = clear_at;
}

// The one sequence on trial, or nullptr.
Sequence* Scheduler::Impl::RunningSuspect() const {
  if (num_suspects == 0) return nullptr;
  const auto it = std::find_if(running.begin(), running.end(),
                               [](const Sequence* s) { return s->clear_at > 0; });
  return it == running.end() ? nullptr : *it;
}

// Suspects have run, so they wait in front of all that have not.
Sequence* Scheduler::Impl::WaitingSuspect() const {
  if (num_suspects == 0) return nullptr;
  for (Sequence* s : waiting) {
    if (s->clear_at > 0) return s;
    if (!s->resumed) break;
  }
  return nullptr;
}

// A step in flight may compute for a suspect that has left its slot, has been
// cleared or has ended altogether.
bool Scheduler::Impl::TrialIsOn() const {
  return trial_step > acknowledged || RunningSuspect() != nullptr;
}

void Scheduler::Impl::NotePlanned(Sequence* s) {
  s->reached = std::max(s->reached, s->num_computed);
  if (s->clear_at == 0) return;
  on_trial = s->request->request.id;
  trial_step = s->last_step;
}

void Scheduler::Impl::NoteAcknowledged(Sequence* s) {
  if (s->clear_at > 0 && s->num_acknowledged >= s->clear_at) Suspect(s, 0);
}

bool Scheduler::Impl::IsPresent(const LiveRequest& r) const {
  return std::any_of(r.sequences.begin(), r.sequences.end(), [this](const Sequence& s) {
    return s.state == SequenceState::kRunning ||
           (s.state != SequenceState::kEnded && s.last_step > acknowledged);
  });
}

// Counts the death against those who may have caused it; returns whom it ends.
std::vector<LiveRequest*> Scheduler::Impl::Judge() {
  const bool trial = TrialIsOn();
  std::vector<LiveRequest*> guilty;
  for (auto& [id, r] : requests) {
    if (trial) {
      r->num_deaths = 0;
      if (id == on_trial && IsPresent(*r)) guilty.push_back(r.get());
    } else if (IsPresent(*r)) {
      if (++r->num_deaths >= 2) guilty.push_back(r.get());
      for (Sequence& s : r->sequences) {
        if (s.state != SequenceState::kEnded) Suspect(&s, std::max(s.clear_at, s.reached));
      }
    }
  }
  std::sort(guilty.begin(), guilty.end(),
            [](const LiveRequest* a, const LiveRequest* b) { return a->arrival < b->arrival; });
  return guilty;
}

void Scheduler::Impl::SuspendAll() {
  while (!running.empty()) {
    Sequence* const s = running.back();
    LeaveSlot(s);
    s->resumed = true;
    Enqueue(s);
  }
  // No KV is left to share: of each request one sequence goes ahead again.
  for (auto& [id, r] : requests) {
    bool leads = true;
    for (Sequence& s : r->sequences) {
      s.last_step = 0;
      s.reached = 0;
      if (s.state == SequenceState::kEnded) continue;
      if (!std::exchange(leads, false) && s.state == SequenceState::kWaiting) {
        waiting.erase(&s);
        s.state = SequenceState::kHeldBack;
        ++r->num_held_back;
      }
    }
  }
  admission.NoteIdle();
  finished_slots.clear();
  in_flight.clear();
  allocator.Reset();
  last_step = acknowledged = 0;
  on_trial.reset();
  trial_step = 0;
}

void Scheduler::Impl::BeginEpoch(uint64_t new_epoch) {
  LOCKSTEP_CHECK(new_epoch > epoch);
  SuspendAll();
  epoch = new_epoch;
  epoch_open = true;
}

void Scheduler::Impl::EndEpoch(const absl::Status& reason, std::vector<SchedulerEvent>* events) {
  const std::vector<LiveRequest*> guilty = Judge();
  SuspendAll();
  epoch_open = false;
  for (LiveRequest* r : guilty) {
    Fail(r,
         absl::UnavailableError(absl::StrCat("the request was running when the workers failed, "
                                             "twice; last: ",
                                             reason.message())),
         events);
  }
}

}  // namespace lockstep
