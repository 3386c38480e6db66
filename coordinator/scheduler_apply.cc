// Apply(): what the oldest plan in flight brought. First the result is compared
// with what was asked, in full; then the books move on: KV of the step counts
// as computed, full blocks enter the prefix cache, tokens become known. What
// came for a sequence that has left its slot meanwhile is dropped.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "coordinator/scheduler_impl.h"

namespace lockstep {
namespace {

template <typename... Args>
absl::Status Lie(const StepResult& result, const Args&... what) {
  return absl::InternalError(absl::StrCat("result of step ", result.step, ": ", what...));
}

}  // namespace

absl::Status Scheduler::Impl::CheckResult(const StepResult& result) const {
  if (!epoch_open || result.epoch != epoch) {
    return Lie(result, "epoch ", result.epoch, ", expected ", epoch);
  }
  if (in_flight.empty()) return Lie(result, "no step is in flight");
  const PlannedStep& step = in_flight.front();
  if (result.step != step.step) return Lie(result, "expected step ", step.step);
  if (result.digest != step.digest) {
    return Lie(result, "digest ", absl::Hex(result.digest), ", the plan's is ",
               absl::Hex(step.digest));
  }
  size_t sampled = 0, list = 0;
  for (const PlannedSpan& span : step.spans) {
    if (span.num_prompt_logprobs > 0) {
      if (list >= result.prompt_logprobs.size()) {
        return Lie(result, "no prompt_logprobs for slot ", span.slot.value);
      }
      const SlotPromptLogprobs& got = result.prompt_logprobs[list++];
      if (got.slot != span.slot || got.first_position != span.first_position + 1 ||
          got.entries.size() != span.num_prompt_logprobs) {
        return Lie(result, "prompt_logprobs of slot ", got.slot.value, " from position ",
                   got.first_position, ", ", got.entries.size(), " of them; expected slot ",
                   span.slot.value, " from ", span.first_position + 1, ", ",
                   span.num_prompt_logprobs);
      }
    }
    if (!span.samples) continue;
    if (sampled >= result.sampled.size()) {
      return Lie(result, "no token for slot ", span.slot.value);
    }
    const SampledToken& got = result.sampled[sampled++];
    if (got.slot != span.slot) {
      return Lie(result, "a token for slot ", got.slot.value, ", expected slot ", span.slot.value);
    }
    if (!got.poisoned && config.vocab_size > 0 && got.token >= config.vocab_size) {
      return Lie(result, "token ", got.token, " for slot ", got.slot.value, ", the vocabulary has ",
                 config.vocab_size);
    }
  }
  if (sampled != result.sampled.size() || list != result.prompt_logprobs.size()) {
    return Lie(result, "more tokens or prompt_logprobs than were asked for");
  }
  return absl::OkStatus();
}

absl::Status Scheduler::Impl::Apply(const StepResult& result, std::vector<SchedulerEvent>* events) {
  absl::Status honest = CheckResult(result);
  if (!honest.ok()) return honest;
  const PlannedStep step = std::move(in_flight.front());
  in_flight.pop_front();
  acknowledged = step.step;
  allocator.Acknowledge(step.step);
  size_t sampled = 0, list = 0;
  for (const PlannedSpan& span : step.spans) {
    const SlotPromptLogprobs* const scores =
        span.num_prompt_logprobs > 0 ? &result.prompt_logprobs[list++] : nullptr;
    const SampledToken* const token = span.samples ? &result.sampled[sampled++] : nullptr;
    Sequence* const s = StillRunning(span);
    if (s == nullptr) continue;
    Acknowledge(s, span);
    if (scores != nullptr) DeliverPromptLogprobs(s, *scores, events);
    if (token != nullptr) DeliverToken(s, *token, events);
  }
  return absl::OkStatus();
}

Sequence* Scheduler::Impl::StillRunning(const PlannedSpan& span) const {
  Sequence* const s = by_slot[span.slot.value];
  return s != nullptr && s->run == span.run ? s : nullptr;
}

void Scheduler::Impl::Acknowledge(Sequence* s, const PlannedSpan& span) {
  LOCKSTEP_CHECK(s->num_acknowledged == span.first_position);
  s->num_acknowledged += span.num_tokens;
  NoteAcknowledged(s);
  EnterCache(s);
  if (s->request->num_held_back > 0 && s->num_acknowledged >= s->num_prompt()) {
    ReleaseHeldBack(s->request);
  }
}

// Every input token of an acknowledged step is known: the last of them came
// with the step before.
void Scheduler::Impl::EnterCache(Sequence* s) {
  const uint32_t full = std::min(CacheableBlocks(*s), s->num_acknowledged / config.block_size);
  std::vector<TokenId> scratch;
  while (s->chain_open && s->num_cached < full) {
    const uint32_t i = s->num_cached;
    std::optional<BlockId> parent;
    if (i > 0) parent = s->table[i - 1];
    // Where another block stands for the same content, this sequence's own
    // continue a chain that nobody can find: its entries end here.
    s->chain_open =
        allocator.cache().Insert(s->table[i], parent, Salt(*s),
                                 s->Tokens(i * config.block_size, config.block_size, &scratch),
                                 /*keep=*/config.enable_prefix_caching);
    if (s->chain_open) ++s->num_cached;
  }
}

// A replay brings again what was delivered before.
void Scheduler::Impl::DeliverPromptLogprobs(Sequence* s, const SlotPromptLogprobs& list,
                                            std::vector<SchedulerEvent>* events) {
  LiveRequest* const r = s->request;
  const uint32_t end = list.first_position + static_cast<uint32_t>(list.entries.size());
  if (end <= r->next_prompt_logprob) return;
  LOCKSTEP_CHECK(list.first_position <= r->next_prompt_logprob);
  const uint32_t skip = r->next_prompt_logprob - list.first_position;
  events->push_back(PromptLogprobsEvent{
      r->request.id, r->next_prompt_logprob, {list.entries.begin() + skip, list.entries.end()}});
  r->next_prompt_logprob = end;
}

void Scheduler::Impl::DeliverToken(Sequence* s, const SampledToken& sampled,
                                   std::vector<SchedulerEvent>* events) {
  const Request& request = s->request->request;
  --s->num_in_flight;
  if (sampled.poisoned) {
    Fail(s->request,
         absl::InternalError(absl::StrCat("request ", request.external_id,
                                          ": the model's logits at position ", s->num_known(),
                                          " are not finite (NaN or infinity)")),
         events);
    return;
  }
  if (request.sampling.max_tokens == 0) return Complete(s, FinishReason::kLength, {}, events);

  s->generated.push_back(sampled.token);
  ++totals.generated_tokens;
  TokenEvent event{{request.id, s->index}, sampled.token, std::nullopt};
  if (sampled.has_logprobs && request.sampling.logprobs >= 0) event.logprobs = sampled.logprobs;
  events->push_back(std::move(event));

  const size_t count = s->generated.size();
  if (count > request.sampling.min_tokens &&
      std::binary_search(request.ending_ids.begin(), request.ending_ids.end(), sampled.token)) {
    Complete(s, FinishReason::kStop, sampled.token, events);
  } else if (count >= request.sampling.max_tokens) {
    Complete(s, FinishReason::kLength, {}, events);
  }
}

void Scheduler::Impl::Complete(Sequence* s, FinishReason reason,
                               std::optional<TokenId> ending_token,
                               std::vector<SchedulerEvent>* events) {
  LiveRequest* const r = s->request;
  answer_length.Ended(static_cast<uint32_t>(s->generated.size()), reason == FinishReason::kLength);
  events->push_back(FinishedEvent{
      {r->request.id, s->index}, reason, ending_token, static_cast<uint32_t>(s->generated.size())});
  End(s);
  if (r->num_live > 0) return;
  ++totals.completed;
  Forget(r);
}

}  // namespace lockstep
