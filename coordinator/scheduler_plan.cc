// Schedule(): let computed catch up with known, under a budget of tokens and of
// slots. Who already runs comes first, decodes before prefills; then whoever
// waits, strictly in order: nobody overtakes a request that does not fit yet,
// so none starves. After a death of the group its suspects go through one at a
// time (scheduler_death.cc).
//
// Blocks: a sequence enters with blocks for every token it knows and grows by
// one block at a time. When a growing sequence finds none, it waits if enough
// are on their way back (fenced, or held by sequences that end with the step in
// flight); otherwise the most junior sequence is preempted. Thrash is bounded:
// newcomers enter only if everybody, they included, has room to grow for as long
// as answers are expected to be (growth_forecast.h); and who
// has been preempted twice enters only under a guarantee, that all sequences
// senior to it and itself fit at their declared lengths at once. Whatever others
// hold can then be taken from them, so it is not preempted a third time.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "coordinator/scheduler_impl.h"
#include "wire/plan_digest.h"
#include "wire/protocol.h"

namespace lockstep {
namespace {

// Blocks that everybody is expected to grow by, however short answers are.
constexpr uint32_t kGrowthBlocks = 2;

SlotSampling MakeSampling(const Sequence& s, bool wants_prompt_logprobs) {
  const Request& request = s.request->request;
  const SamplingParams& p = request.sampling;
  SlotSampling sampling{.temperature = p.temperature,
                        .top_p = p.top_p,
                        .top_k = p.top_k,
                        .min_p = p.min_p,
                        .repetition_penalty = p.repetition_penalty,
                        .presence_penalty = p.presence_penalty,
                        .frequency_penalty = p.frequency_penalty,
                        .seed = SequenceSeed(*p.seed, s.index),
                        .logit_bias = p.logit_bias,
                        .min_tokens = p.min_tokens,
                        .ending_ids = {},
                        .logprobs = p.logprobs,
                        .prompt_logprobs = wants_prompt_logprobs ? p.prompt_logprobs : -1};
  if (p.min_tokens > 0) sampling.ending_ids = request.ending_ids;
  return sampling;
}

// Numbers that travel when a sequence enters, but for its blocks.
uint64_t WordsOf(const Sequence& s) {
  const Request& request = s.request->request;
  return s.num_known() + 2 * request.sampling.logit_bias.size() + request.ending_ids.size();
}

}  // namespace

struct Scheduler::Impl::Draft {
  StepPlan plan;
  uint32_t budget = 0;     // tokens
  uint64_t new_words = 0;  // that new sequences take in the message
  uint32_t promised = 0;   // coming blocks that somebody is waiting for
  bool short_of_blocks = false;
  std::optional<GrowthForecast> forecast;  // of all that run; made when first asked for
  std::vector<PlannedSpan> spans;
};

std::optional<StepPlan> Scheduler::Impl::Schedule(int64_t now_ms,
                                                  std::vector<SchedulerEvent>* events) {
  FailExpired(now_ms, events);
  if (!epoch_open || in_flight.size() >= static_cast<size_t>(config.max_plans_in_flight)) {
    return std::nullopt;
  }
  Draft draft;
  draft.budget = config.max_batched_tokens;
  if (!PlanTrial(&draft)) {
    PlanDecodes(&draft);
    PlanPrefills(&draft);
    // While a suspect waits for room nobody else takes it.
    if (!draft.short_of_blocks && WaitingSuspect() == nullptr) {
      PlanNewcomers(&draft, now_ms, events);
    }
  }
  if (draft.spans.empty()) {
    // Only a step in flight can be the reason why nothing can run.
    LOCKSTEP_CHECK(!in_flight.empty() || requests.empty());
    return std::nullopt;
  }
  return Finish(&draft);
}

void Scheduler::Impl::FailExpired(int64_t now_ms, std::vector<SchedulerEvent>* events) {
  while (!deadlines.empty() && deadlines.begin()->first <= now_ms) {
    LiveRequest* const r = requests.find(deadlines.begin()->second)->second.get();
    Fail(r,
         absl::DeadlineExceededError(absl::StrCat("request ", r->request.external_id,
                                                  ": its deadline passed before it was complete")),
         events);
  }
}

// True: this plan is a trial's, even where that leaves it empty. A trial begins
// with no step in flight, and looks no further ahead than to its verdict.
bool Scheduler::Impl::PlanTrial(Draft* draft) {
  if (num_suspects == 0 && trial_step <= acknowledged) return false;
  Sequence* s = RunningSuspect();
  if (s != nullptr) {
    if (s->num_computed >= s->clear_at) return true;
    const uint32_t num_tokens = std::min(draft->budget, s->num_to_compute());
    if (Grow(s, draft)) draft->spans.push_back(MakeSpan(s, num_tokens, draft));
    return s->state == SequenceState::kRunning || trial_step > acknowledged;
  }
  if (trial_step > acknowledged) return true;
  s = WaitingSuspect();
  if (s == nullptr || free_slots.empty()) return false;
  if (!HasRoomFor(*s, FindCached(*s), draft)) return false;
  if (in_flight.empty() && TryStart(s, draft)) {
    draft->spans.push_back(MakeSpan(s, std::min(draft->budget, s->num_to_compute()), draft));
  }
  return true;
}

void Scheduler::Impl::PlanDecodes(Draft* draft) {
  for (size_t i = 0; i < running.size() && draft->budget > 0; ++i) {
    Sequence* const s = running[i];
    if (s->num_to_compute() != 1 || s->IsDraining()) continue;
    // Preempts from the back of `running` only, at the earliest s itself.
    if (Grow(s, draft)) draft->spans.push_back(MakeSpan(s, 1, draft));
  }
  std::sort(draft->spans.begin(), draft->spans.end(),
            [](const PlannedSpan& a, const PlannedSpan& b) { return a.slot < b.slot; });
}

void Scheduler::Impl::PlanPrefills(Draft* draft) {
  for (size_t i = 0; i < running.size() && draft->budget > 0; ++i) {
    Sequence* const s = running[i];
    if (s->num_to_compute() <= 1) continue;
    draft->spans.push_back(MakeSpan(s, std::min(draft->budget, s->num_to_compute()), draft));
  }
}

void Scheduler::Impl::PlanNewcomers(Draft* draft, int64_t now_ms,
                                    std::vector<SchedulerEvent>* events) {
  while (draft->budget > 0 && !free_slots.empty() && !waiting.empty()) {
    Sequence* const s = *waiting.begin();
    // Cached tokens cost no budget, but room in the plan.
    const uint64_t words = WordsOf(*s);
    if (draft->new_words > 0 && draft->new_words + words > wire::kMaxNewTokens) return;
    if (!TryStart(s, draft)) return;
    draft->new_words += words;
    NoteStarted(s, now_ms, events);
    draft->spans.push_back(MakeSpan(s, std::min(draft->budget, s->num_to_compute()), draft));
  }
}

// Makes room in the table for the next position. False: not in this plan.
bool Scheduler::Impl::Grow(Sequence* s, Draft* draft) {
  while (s->num_computed >= s->table.size() * config.block_size) {
    if (const std::optional<BlockId> block = allocator.Allocate()) {
      s->table.Append(*block);
      draft->plan.grown_tables.push_back({s->slot, {*block}});
      return true;
    }
    draft->short_of_blocks = true;
    if (draft->promised < ComingBlocks()) {
      ++draft->promised;
      return false;
    }
    Sequence* const victim = *std::find_if(running.rbegin(), running.rend(),
                                           [](const Sequence* r) { return !r->IsDraining(); });
    Preempt(victim);
    if (victim == s) return false;
  }
  return true;
}

// Blocks that come back by themselves when the steps in flight are acknowledged.
uint32_t Scheduler::Impl::ComingBlocks() const {
  uint32_t coming = allocator.num_pending();
  for (const Sequence* s : running) coming += s->IsDraining() ? s->table.size() : 0;
  return coming;
}

// Counts the span as computed from here on; the plan takes it as it is.
PlannedSpan Scheduler::Impl::MakeSpan(Sequence* s, uint32_t num_tokens, Draft* draft) {
  PlannedSpan span{.slot = s->slot,
                   .run = s->run,
                   .first_position = s->num_computed,
                   .num_tokens = num_tokens,
                   .table_length = s->table.size(),
                   .samples = num_tokens == s->num_to_compute()};
  if (s->prompt_logprobs && span.first_position + 1 < s->num_prompt()) {
    span.num_prompt_logprobs = std::min(num_tokens, s->num_prompt() - 1 - span.first_position);
  }
  s->num_computed += num_tokens;
  s->num_in_flight += span.samples ? 1 : 0;
  s->last_step = last_step + 1;
  NotePlanned(s);
  draft->budget -= num_tokens;
  return span;
}

// Of a sequence that has `blocks`, of which it found `shared` in the cache.
GrowthForecast::Run Scheduler::Impl::Forecast(const Sequence& s, uint32_t blocks,
                                              uint32_t shared) const {
  const uint32_t generated = s.num_known() - s.num_prompt();
  const uint32_t left = s.MaxNewTokens() - std::min(generated, s.MaxNewTokens());
  uint32_t tokens = std::min(left, kGrowthBlocks * config.block_size);
  if (config.forecast_growth) tokens = std::max(tokens, answer_length.Remaining(generated, left));
  return {
      .tokens = tokens, .blocks = blocks - shared, .most = s.MaxBlocks(config.block_size) - blocks};
}

bool Scheduler::Impl::HasRoomFor(const Sequence& s, const std::vector<BlockId>& cached,
                                 Draft* draft) const {
  if (!KeepsGuarantees(s)) return false;
  const uint32_t total = BlocksForTokens(s.num_known(), config.block_size);
  const auto idle = std::count_if(cached.begin(), cached.end(), [this](BlockId block) {
    return allocator.cache().IsIdle(block);
  });
  const uint32_t found = static_cast<uint32_t>(cached.size());
  const uint64_t needed = static_cast<uint64_t>(idle) + (total - found);
  if (allocator.num_available() < needed) return false;
  if (!draft->forecast) {
    draft->forecast.emplace(config.block_size);
    for (const Sequence* r : running) {
      draft->forecast->Add(Forecast(*r, r->table.size(), r->num_found));
    }
  }
  return draft->forecast->Fits(Forecast(s, total, found), allocator.num_available() - needed);
}

// Gives the sequence a slot and blocks for all it knows, if that leaves room.
bool Scheduler::Impl::TryStart(Sequence* s, Draft* draft) {
  const std::vector<BlockId> cached = FindCached(*s);
  if (!HasRoomFor(*s, cached, draft)) return false;
  const uint32_t num_cached = static_cast<uint32_t>(cached.size());
  const uint32_t total = BlocksForTokens(s->num_known(), config.block_size);

  waiting.erase(s);
  s->state = SequenceState::kRunning;
  s->slot = Slot(free_slots.top());
  free_slots.pop();
  s->run = next_run++;
  by_slot[s->slot.value] = s;
  running.insert(std::upper_bound(running.begin(), running.end(), s, SeniorFirst()), s);
  if (s->request->num_running++ == 0) ++num_running_requests;
  if (IsGuaranteed(*s)) ++num_guaranteed;
  draft->forecast->Add(Forecast(*s, total, num_cached));

  for (BlockId block : cached) {
    allocator.Share(block);
    s->table.Append(block);
  }
  while (s->table.size() < total) s->table.Append(*allocator.Allocate());
  s->num_cached = s->num_found = num_cached;
  s->chain_open = MayShare(*s);
  s->num_computed = s->num_acknowledged = num_cached * config.block_size;
  s->prompt_logprobs = WantsPromptLogprobs(*s);

  NewSequence entry{.slot = s->slot,
                    .tokens = s->request->request.prompt,
                    .num_prompt_tokens = s->num_prompt(),
                    .num_computed_tokens = s->num_computed,
                    .block_ids = s->table.blocks(),
                    .sampling = MakeSampling(*s, s->prompt_logprobs)};
  entry.tokens.insert(entry.tokens.end(), s->generated.begin(), s->generated.end());
  draft->plan.new_sequences.push_back(std::move(entry));
  return true;
}

// Whether all sequences down to the most junior guaranteed one still fit at
// their declared lengths together with the newcomer.
bool Scheduler::Impl::KeepsGuarantees(const Sequence& newcomer) const {
  if (num_guaranteed == 0 && !IsGuaranteed(newcomer)) return true;
  const Sequence* junior = IsGuaranteed(newcomer) ? &newcomer : nullptr;
  for (const Sequence* s : running) {
    if (IsGuaranteed(*s) && (junior == nullptr || SeniorFirst()(junior, s))) junior = s;
  }
  uint64_t blocks = 0;
  const auto count = [&](const Sequence& s) {
    if (!SeniorFirst()(junior, &s)) blocks += s.MaxBlocks(config.block_size);
  };
  count(newcomer);
  for (const Sequence* s : running) count(*s);
  return blocks <= config.num_kv_blocks;
}

// The longest run of cached blocks that the sequence begins with. One token at
// least is left to compute, and prompt log-probabilities need every position.
std::vector<BlockId> Scheduler::Impl::FindCached(const Sequence& s) const {
  std::vector<BlockId> found;
  if (!MayShare(s) || WantsPromptLogprobs(s)) return found;
  const uint32_t most = (s.num_known() - 1) / config.block_size;
  std::vector<TokenId> scratch;
  std::optional<BlockId> parent;
  while (found.size() < most) {
    const uint32_t first = static_cast<uint32_t>(found.size()) * config.block_size;
    parent = allocator.cache().Find(parent, Salt(s), s.Tokens(first, config.block_size, &scratch));
    if (!parent) break;
    found.push_back(*parent);
  }
  return found;
}

void Scheduler::Impl::NoteStarted(Sequence* s, int64_t now_ms,
                                  std::vector<SchedulerEvent>* events) {
  LiveRequest* const r = s->request;
  if (!s->resumed && config.enable_prefix_caching) {
    totals.prefix_cache_queries += s->num_prompt();
    totals.prefix_cache_hits += s->num_computed;
  }
  if (std::exchange(r->started, true)) {
    if (num_waiting_requests() == 0) admission.NoteIdle();
    return;
  }
  totals.prompt_tokens += s->num_prompt();
  admission.NoteStarted(now_ms, num_waiting_requests());
  events->push_back(StartedEvent{r->request.id, s->num_computed});
}

StepPlan Scheduler::Impl::Finish(Draft* draft) {
  StepPlan plan = std::move(draft->plan);
  plan.epoch = epoch;
  plan.step = ++last_step;
  plan.finished_slots = std::exchange(finished_slots, {});
  std::sort(plan.finished_slots.begin(), plan.finished_slots.end());
  std::sort(plan.grown_tables.begin(), plan.grown_tables.end(),
            [](const GrownTable& a, const GrownTable& b) { return a.slot < b.slot; });
  PlanDigest digest(plan.epoch, plan.step);
  for (const PlannedSpan& span : draft->spans) {
    plan.spans.push_back({span.slot, span.num_tokens});
    digest.Add(span.slot, span.first_position, span.num_tokens, span.table_length, span.samples);
  }
  plan.digest = digest.value();
  in_flight.push_back({plan.step, plan.digest, std::move(draft->spans)});
  return plan;
}

}  // namespace lockstep
