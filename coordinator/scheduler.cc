#include "coordinator/scheduler.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "coordinator/scheduler_impl.h"

namespace lockstep {

Scheduler::Impl::Impl(const SchedulerConfig& c)
    : config(c),
      admission(c),
      allocator(c.num_kv_blocks, c.block_size, c.cache_hash_key),
      answer_length(c.expected_tokens) {
  LOCKSTEP_CHECK(c.max_num_seqs > 0 && c.max_batched_tokens > 0 && c.max_model_len > 0);
  LOCKSTEP_CHECK(c.block_size > 0 && c.max_plans_in_flight > 0);
  by_slot.resize(c.max_num_seqs, nullptr);
  for (uint32_t slot = 0; slot < c.max_num_seqs; ++slot) free_slots.push(slot);
}

absl::Status Scheduler::Impl::Add(Request request, int64_t now_ms) {
  (void)now_ms;
  ++totals.received;
  absl::Status admitted =
      admission.Check(request, num_waiting_requests(), static_cast<uint32_t>(free_slots.size()));
  // Admission reads lengths only. One bad id would make the workers refuse the
  // plan, and with it everybody else's.
  for (size_t i = 0; admitted.ok() && config.vocab_size > 0 && i < request.prompt.size(); ++i) {
    if (request.prompt[i] < config.vocab_size) continue;
    admitted = absl::InvalidArgumentError(
        absl::StrCat("prompt: token ", request.prompt[i], " at position ", i,
                     " is outside the vocabulary of ", config.vocab_size));
  }
  if (!admitted.ok()) {
    ++totals.rejected;
    return admitted;
  }
  LOCKSTEP_CHECK(request.sampling.seed.has_value());
  LOCKSTEP_CHECK(!requests.contains(request.id));
  auto live = std::make_unique<LiveRequest>();
  live->arrival = next_arrival++;
  live->sequences.resize(request.sampling.n);
  live->num_live = live->num_held_back = request.sampling.n;
  live->request = std::move(request);
  for (uint32_t i = 0; i < live->sequences.size(); ++i) {
    live->sequences[i].request = live.get();
    live->sequences[i].index = i;
  }
  if (live->request.deadline_ms != kNoDeadline) {
    deadlines.insert({live->request.deadline_ms, live->request.id});
  }
  Enqueue(&live->sequences[0]);
  requests.emplace(live->request.id, std::move(live));
  return absl::OkStatus();
}

Sequence* Scheduler::Impl::Find(SequenceId id) {
  const auto it = requests.find(id.request);
  if (it == requests.end() || id.index >= it->second->sequences.size()) return nullptr;
  Sequence* const s = &it->second->sequences[id.index];
  return s->state == SequenceState::kEnded ? nullptr : s;
}

bool Scheduler::Impl::Cancel(RequestId id) {
  const auto it = requests.find(id);
  if (it == requests.end()) return false;
  ++totals.cancelled;
  Forget(it->second.get());
  return true;
}

bool Scheduler::Impl::Stop(SequenceId id) {
  Sequence* const s = Find(id);
  if (s == nullptr) return false;
  LiveRequest* const r = s->request;
  answer_length.Ended(static_cast<uint32_t>(s->generated.size()), /*cut=*/false);
  End(s);
  if (r->num_live == 0) {
    ++totals.completed;
    Forget(r);
  }
  return true;
}

void Scheduler::Impl::Fail(LiveRequest* r, const absl::Status& status,
                           std::vector<SchedulerEvent>* events) {
  ++totals.failed;
  events->push_back(FailedEvent{r->request.id, status});
  Forget(r);
}

void Scheduler::Impl::Forget(LiveRequest* r) {
  // From the last: siblings that are held back end before one could take the lead.
  for (auto s = r->sequences.rbegin(); s != r->sequences.rend(); ++s) {
    if (s->state != SequenceState::kEnded) End(&*s);
  }
  deadlines.erase({r->request.deadline_ms, r->request.id});
  requests.erase(r->request.id);
  if (num_waiting_requests() == 0) admission.NoteIdle();
}

void Scheduler::Impl::Enqueue(Sequence* s) {
  if (s->state == SequenceState::kHeldBack) --s->request->num_held_back;
  s->state = SequenceState::kWaiting;
  waiting.insert(s);
}

void Scheduler::Impl::LeaveSlot(Sequence* s) {
  running.erase(std::find(running.begin(), running.end(), s));
  by_slot[s->slot.value] = nullptr;
  free_slots.push(s->slot.value);
  finished_slots.push_back(s->slot);
  allocator.Release(s->table.Take(), s->last_step);
  s->run = 0;
  s->num_computed = s->num_acknowledged = s->num_in_flight = s->num_cached = s->num_found = 0;
  if (--s->request->num_running == 0) --num_running_requests;
  if (IsGuaranteed(*s)) --num_guaranteed;
}

void Scheduler::Impl::Preempt(Sequence* s) {
  LOCKSTEP_CHECK(s != running.front() && !IsGuaranteed(*s));
  LeaveSlot(s);
  s->resumed = true;
  ++s->num_preemptions;
  ++totals.preemptions;
  Enqueue(s);
}

void Scheduler::Impl::End(Sequence* s) {
  LiveRequest* const r = s->request;
  switch (s->state) {
    case SequenceState::kHeldBack:
      --r->num_held_back;
      break;
    case SequenceState::kWaiting:
      waiting.erase(s);
      break;
    case SequenceState::kRunning:
      LeaveSlot(s);
      break;
    case SequenceState::kEnded:
      LOCKSTEP_CHECK(false);
  }
  s->state = SequenceState::kEnded;
  Suspect(s, 0);
  if (--r->num_live > 0 && r->num_live == r->num_held_back) {
    Enqueue(&*std::find_if(r->sequences.begin(), r->sequences.end(), [](const Sequence& sibling) {
      return sibling.state == SequenceState::kHeldBack;
    }));
  }
}

// The leader's prompt is computed and acknowledged: its siblings find its blocks.
void Scheduler::Impl::ReleaseHeldBack(LiveRequest* r) {
  for (Sequence& s : r->sequences) {
    if (s.state == SequenceState::kHeldBack) Enqueue(&s);
  }
}

void Scheduler::Impl::FailAll(const absl::Status& reason, std::vector<SchedulerEvent>* events) {
  std::vector<LiveRequest*> all;
  for (auto& [id, r] : requests) all.push_back(r.get());
  std::sort(all.begin(), all.end(),
            [](const LiveRequest* a, const LiveRequest* b) { return a->arrival < b->arrival; });
  for (LiveRequest* r : all) Fail(r, reason, events);
}

SchedulerStats Scheduler::Impl::Stats() const {
  SchedulerStats stats = totals;
  stats.running = num_running_requests;
  stats.waiting = num_waiting_requests();
  stats.blocks_free = allocator.num_free();
  stats.blocks_cached = allocator.num_cached();
  stats.blocks_active = allocator.num_active();
  stats.blocks_pending = allocator.num_pending();
  return stats;
}

bool Scheduler::Impl::MayShare(const Sequence& s) const {
  return config.enable_prefix_caching || s.request->request.sampling.n > 1;
}

uint64_t Scheduler::Impl::Salt(const Sequence& s) const {
  const Request& request = s.request->request;
  return config.enable_prefix_caching ? request.cache_salt : request.id.value;
}

uint32_t Scheduler::Impl::CacheableBlocks(const Sequence& s) const {
  if (!MayShare(s)) return 0;
  if (!config.enable_prefix_caching) return s.num_prompt() / config.block_size;
  return s.num_acknowledged / config.block_size;
}

bool Scheduler::Impl::WantsPromptLogprobs(const Sequence& s) const {
  return s.index == 0 && s.request->request.sampling.prompt_logprobs >= 0 &&
         s.request->next_prompt_logprob < s.num_prompt();
}

bool Scheduler::Impl::IsGuaranteed(const Sequence& s) { return s.num_preemptions >= 2; }

Scheduler::Scheduler(const SchedulerConfig& config) : impl_(std::make_unique<Impl>(config)) {}
Scheduler::~Scheduler() = default;

absl::Status Scheduler::Add(Request request, int64_t now_ms) {
  return impl_->Add(std::move(request), now_ms);
}
bool Scheduler::Cancel(RequestId request) { return impl_->Cancel(request); }
bool Scheduler::Stop(SequenceId sequence) { return impl_->Stop(sequence); }
void Scheduler::BeginEpoch(uint64_t epoch) { impl_->BeginEpoch(epoch); }
void Scheduler::EndEpoch(const absl::Status& reason, std::vector<SchedulerEvent>* events) {
  impl_->EndEpoch(reason, events);
}
void Scheduler::FailAll(const absl::Status& reason, std::vector<SchedulerEvent>* events) {
  impl_->FailAll(reason, events);
}
std::optional<StepPlan> Scheduler::Schedule(int64_t now_ms, std::vector<SchedulerEvent>* events) {
  return impl_->Schedule(now_ms, events);
}
absl::Status Scheduler::Apply(const StepResult& result, std::vector<SchedulerEvent>* events) {
  return impl_->Apply(result, events);
}
int Scheduler::plans_in_flight() const { return static_cast<int>(impl_->in_flight.size()); }
bool Scheduler::HasRequests() const { return !impl_->requests.empty(); }
int64_t Scheduler::NextDeadlineMs() const {
  return impl_->deadlines.empty() ? kNoDeadline : impl_->deadlines.begin()->first;
}
SchedulerStats Scheduler::Stats() const { return impl_->Stats(); }
absl::Status Scheduler::CheckIntegrity() const { return impl_->CheckIntegrity(); }

}  // namespace lockstep
