// CheckIntegrity(): every invariant that can be read off the books. Counts
// everything anew, so it is for tests and for when nothing runs.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "coordinator/scheduler_impl.h"

namespace lockstep {
namespace {

template <typename... Args>
absl::Status Broken(const Args&... what) {
  return absl::InternalError(absl::StrCat("scheduler: ", what...));
}

}  // namespace

absl::Status Scheduler::Impl::CheckIntegrity() const {
  absl::Status status = CheckCounts();
  if (status.ok()) status = CheckQueues();
  if (status.ok()) status = CheckBlocks();
  if (status.ok()) status = CheckTrial();
  for (const Sequence* s : running) {
    if (status.ok()) status = CheckSequence(*s);
  }
  return status;
}

// Invariants 1, 12, 16: every request and sequence is somewhere, once.
absl::Status Scheduler::Impl::CheckCounts() const {
  const SchedulerStats s = Stats();
  if (s.received != s.completed + s.failed + s.cancelled + s.rejected + s.waiting + s.running) {
    return Broken(s.received, " requests received, not all accounted for");
  }
  size_t num_waiting = 0, num_with_slot = 0;
  uint32_t running_requests = 0, guaranteed = 0;
  for (const auto& [id, r] : requests) {
    uint32_t live = 0, held_back = 0, with_slot = 0, queued = 0;
    for (const Sequence& q : r->sequences) {
      live += q.state != SequenceState::kEnded ? 1 : 0;
      held_back += q.state == SequenceState::kHeldBack ? 1 : 0;
      with_slot += q.state == SequenceState::kRunning ? 1 : 0;
      queued += q.state == SequenceState::kWaiting ? 1 : 0;
      guaranteed += q.state == SequenceState::kRunning && IsGuaranteed(q) ? 1 : 0;
      if (q.state != SequenceState::kRunning && (!q.table.empty() || q.run != 0)) {
        return Broken("request ", id.value, " holds blocks without running");
      }
      if (q.state == SequenceState::kWaiting && !waiting.contains(const_cast<Sequence*>(&q))) {
        return Broken("request ", id.value, " waits outside the queue");
      }
      if (q.num_preemptions > 2) return Broken("request ", id.value, " preempted a third time");
    }
    if (live == 0 || live == held_back) return Broken("request ", id.value, " can never finish");
    if (live != r->num_live || held_back != r->num_held_back || with_slot != r->num_running) {
      return Broken("request ", id.value, " miscounts its sequences");
    }
    num_waiting += queued;
    num_with_slot += with_slot;
    running_requests += with_slot > 0 ? 1 : 0;
  }
  if (num_waiting != waiting.size() || num_with_slot != running.size()) {
    return Broken("the queues hold sequences that do not exist");
  }
  if (running_requests != num_running_requests || guaranteed != num_guaranteed) {
    return Broken("running requests miscounted");
  }
  const uint64_t most_waiting = uint64_t{config.max_queued_requests} + config.max_num_seqs;
  if (s.waiting > most_waiting) return Broken(s.waiting, " requests wait, ", most_waiting, " may");
  return absl::OkStatus();
}

absl::Status Scheduler::Impl::CheckQueues() const {
  if (!std::is_sorted(running.begin(), running.end(), SeniorFirst())) {
    return Broken("running sequences out of order");
  }
  size_t occupied = 0;
  for (const Sequence* s : by_slot) occupied += s != nullptr ? 1 : 0;
  if (occupied != running.size() || occupied + free_slots.size() != config.max_num_seqs) {
    return Broken(occupied, " slots occupied, ", free_slots.size(), " free, of ",
                  config.max_num_seqs);
  }
  if (std::count_if(running.begin(), running.end(),
                    [](const Sequence* q) { return q->clear_at > 0; }) > 1) {
    return Broken("two suspects run at once");
  }
  size_t suspects = 0;
  if (finished_slots.size() > config.max_num_seqs) return Broken("too many finished slots");
  if (in_flight.size() > static_cast<size_t>(config.max_plans_in_flight)) {
    return Broken(in_flight.size(), " plans in flight");
  }
  if (last_step != acknowledged + in_flight.size()) return Broken("steps miscounted");
  size_t with_deadline = 0;
  for (const auto& [id, r] : requests) {
    with_deadline += r->request.deadline_ms != kNoDeadline ? 1 : 0;
    for (const Sequence& q : r->sequences) suspects += q.clear_at > 0 ? 1 : 0;
  }
  if (suspects != num_suspects) return Broken(num_suspects, " suspects counted");
  if (with_deadline != deadlines.size()) return Broken("deadlines of requests that are gone");
  return absl::OkStatus();
}

// A death during a trial names its suspect: no step then in flight may compute for
// anybody else.
absl::Status Scheduler::Impl::CheckTrial() const {
  if (trial_step <= acknowledged) return absl::OkStatus();
  const uint64_t run = in_flight.front().spans.front().run;
  for (const PlannedStep& step : in_flight) {
    for (const PlannedSpan& span : step.spans) {
      if (span.run != run) return Broken("step ", step.step, " is not the trial's alone");
    }
  }
  return absl::OkStatus();
}

// Invariants 2, 3, 4 and 5, as far as the books go.
absl::Status Scheduler::Impl::CheckBlocks() const {
  std::vector<uint32_t> holds(config.num_kv_blocks);
  for (const Sequence* s : running) {
    for (BlockId block : s->table.blocks()) ++holds[block.value];
  }
  for (const Sequence* s : running) {
    for (uint32_t i = s->num_acknowledged / config.block_size; i < s->table.size(); ++i) {
      if (holds[s->table[i].value] != 1) {
        return Broken("block ", s->table[i].value, " can be written by more than one sequence");
      }
    }
  }
  const SchedulerStats s = Stats();
  if (s.blocks_free + s.blocks_cached + s.blocks_active + s.blocks_pending !=
      config.num_kv_blocks) {
    return Broken("the block counts do not add up to ", config.num_kv_blocks);
  }
  return allocator.CheckIntegrity(holds);
}

// Invariants 6, 8 and 12 for one running sequence.
absl::Status Scheduler::Impl::CheckSequence(const Sequence& s) const {
  const uint64_t id = s.request->request.id.value;
  if (by_slot[s.slot.value] != &s || s.run == 0) return Broken("request ", id, " has no slot");
  if (s.num_acknowledged > s.num_computed || s.num_computed >= s.num_known()) {
    return Broken("request ", id, ": ", s.num_acknowledged, " acknowledged, ", s.num_computed,
                  " computed, ", s.num_known(), " known");
  }
  if (s.generated.size() + s.num_in_flight > s.MaxNewTokens() ||
      s.num_known() > config.max_model_len) {
    return Broken("request ", id, " has more tokens than it may");
  }
  if (s.table.size() * uint64_t{config.block_size} < s.num_computed ||
      s.table.size() > s.MaxBlocks(config.block_size)) {
    return Broken("request ", id, " has ", s.table.size(), " blocks");
  }
  uint32_t in_steps = 0;
  for (const PlannedStep& step : in_flight) {
    for (const PlannedSpan& span : step.spans) {
      if (span.slot == s.slot && span.run == s.run) in_steps += span.num_tokens;
    }
  }
  if (s.num_acknowledged + in_steps != s.num_computed) {
    return Broken("request ", id, " counts tokens that no step computes");
  }
  const PrefixCache& cache = allocator.cache();
  std::vector<TokenId> scratch;
  for (uint32_t i = 0; i < s.table.size(); ++i) {
    const BlockId block = s.table[i];
    const bool writable = (i + 1) * config.block_size > s.num_acknowledged;
    if (writable && (cache.Contains(block) || allocator.IsFenced(block))) {
      return Broken("block ", block.value, " can be written and is shared");
    }
    if (cache.Contains(block) != (i < s.num_cached)) {
      return Broken("block ", block.value, " and its sequence disagree about the prefix cache");
    }
    std::optional<BlockId> parent;
    if (i > 0) parent = s.table[i - 1];
    if (i < s.num_cached &&
        !cache.Holds(block, parent, Salt(s),
                     s.Tokens(i * config.block_size, config.block_size, &scratch))) {
      return Broken("block ", block.value, " is cached under other tokens");
    }
  }
  return absl::OkStatus();
}

}  // namespace lockstep
