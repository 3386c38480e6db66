#include "tests/sim/ledger.h"

#include <algorithm>
#include <tuple>
#include <utility>
#include <variant>

#include "coordinator/sequence.h"
#include "tests/sim/sim_model.h"

namespace lockstep::sim {
namespace {

auto Seniority(const Ledger::Entry& e, uint32_t index) {
  return std::make_tuple(e.request.priority, e.arrival, index);
}

Ledger::Expected Expect(const Request& request, uint32_t index) {
  const SamplingParams& p = request.sampling;
  const int64_t seed = SequenceSeed(*p.seed, index);
  Ledger::Expected expected;
  uint64_t prefix = HashTokens(request.prompt);
  while (expected.tokens.size() < p.max_tokens) {
    const bool masked = expected.tokens.size() < p.min_tokens;
    const TokenId token =
        NextToken(prefix, seed, masked ? request.ending_ids : std::vector<TokenId>());
    prefix = Mix(prefix, token);
    expected.tokens.push_back(token);
    if (std::binary_search(request.ending_ids.begin(), request.ending_ids.end(), token)) {
      expected.reason = FinishReason::kStop;
      break;
    }
  }
  return expected;
}

}  // namespace

size_t Ledger::Entry::open() const {
  return std::count_if(outputs.begin(), outputs.end(), [](const Output& o) { return !o.ended; });
}

Ledger::Entry* Ledger::Find(RequestId id) {
  const auto it = live_.find(id.value);
  return it == live_.end() ? nullptr : &it->second;
}

void Ledger::Accept(Entry entry) {
  for (uint32_t i = 0; i < entry.request.sampling.n; ++i) {
    if (entry.outputs.size() <= i) entry.outputs.emplace_back();
    entry.outputs[i].expected = Expect(entry.request, i);
    by_seed_[SequenceSeed(*entry.request.sampling.seed, i)] = {entry.request.id, i};
  }
  if (entry.kills_at) {  // a position that it does compute; the last token's is not
    const size_t known = entry.request.prompt.size() + entry.outputs[0].expected.tokens.size();
    *entry.kills_at %= static_cast<uint32_t>(std::max<size_t>(known, 2) - 1);
  }
  live_.emplace(entry.request.id.value, std::move(entry));
}

void Ledger::Cancelled(RequestId id) {
  live_.erase(id.value);
  ++cancelled;
}

void Ledger::Stopped(SequenceId id) {
  Entry* const entry = Find(id.request);
  ++stopped;
  EndOutput(entry, &entry->outputs[id.index]);
}

void Ledger::EndOutput(Entry* entry, Output* output) {
  output->ended = true;
  if (entry->open() > 0) return;
  ++completed;
  live_.erase(entry->request.id.value);
}

void Ledger::Take(const SchedulerEvent& event) {
  std::visit([this](const auto& e) { Take(e); }, event);
}

Ledger::Output* Ledger::Open(SequenceId id, const char* what) {
  Entry* const entry = Find(id.request);
  if (entry == nullptr || id.index >= entry->outputs.size() || entry->outputs[id.index].ended) {
    Violate("request ", id.request.value, "/", id.index, ": ", what, " after its end");
    return nullptr;
  }
  if (!entry->started) Violate("request ", id.request.value, ": ", what, " before its start");
  return &entry->outputs[id.index];
}

void Ledger::Take(const StartedEvent& e) {
  Entry* const entry = Find(e.request);
  if (entry == nullptr) return Violate("request ", e.request.value, " started after its end");
  if (std::exchange(entry->started, true)) Violate("request ", e.request.value, " started twice");
  if (e.cached_tokens >= entry->request.prompt.size()) {
    Violate("request ", e.request.value, ": ", e.cached_tokens, " cached tokens");
  }
  for (const auto& [id, other] : live_) {
    if (!other.started && Seniority(other, 0) < Seniority(*entry, 0)) {
      Violate("request ", e.request.value, " started before ", id, ", which goes first");
    }
  }
}

void Ledger::Take(const PromptLogprobsEvent& e) {
  Entry* const entry = Find(e.request);
  if (entry == nullptr) {
    return Violate("request ", e.request.value, ": prompt logprobs after its end");
  }
  const Request& r = entry->request;
  if (r.sampling.prompt_logprobs < 0 || e.first_position != entry->next_prompt_logprob ||
      e.first_position + e.entries.size() > r.prompt.size() || e.entries.empty()) {
    return Violate("request ", e.request.value, ": prompt logprobs from ", e.first_position);
  }
  for (const TokenLogprobs& got : e.entries) {
    const uint32_t p = entry->next_prompt_logprob++;
    const uint64_t prefix = HashTokens(std::span(r.prompt).first(p));
    if (got.rank != ScoreOf(prefix, r.prompt[p])) {
      return Violate("request ", e.request.value, ": wrong prompt logprob at ", p);
    }
  }
}

void Ledger::Take(const TokenEvent& e) {
  Output* const output = Open(e.sequence, "a token");
  if (output == nullptr) return;
  const Entry& entry = *Find(e.sequence.request);
  const std::vector<TokenId>& expected = output->expected.tokens;
  const std::string name =
      absl::StrCat("request ", e.sequence.request.value, "/", e.sequence.index, ": ");
  if (output->delivered >= expected.size()) {
    return Violate(name, "more than its ", expected.size(), " tokens");
  }
  const size_t i = output->delivered++;
  if (e.token != expected[i]) {
    return Violate(name, "token ", i, " is ", e.token, ", without faults it is ", expected[i]);
  }
  if (e.logprobs.has_value() != (entry.request.sampling.logprobs >= 0)) {
    return Violate(name, "token ", i, ": logprobs given or missing against its wish");
  }
  if (!e.logprobs) return;
  const uint64_t prefix =
      HashTokens(std::span(expected).first(i), HashTokens(entry.request.prompt));
  if (e.logprobs->rank != ScoreOf(prefix, e.token)) Violate(name, "wrong logprob at ", i);
}

void Ledger::Take(const FinishedEvent& e) {
  Output* const output = Open(e.sequence, "a finish");
  if (output == nullptr) return;
  Entry* const entry = Find(e.sequence.request);
  const Expected& expected = output->expected;
  const bool stop = expected.reason == FinishReason::kStop;
  if (output->delivered != expected.tokens.size() || e.reason != expected.reason ||
      e.completion_tokens != expected.tokens.size() || e.ending_token.has_value() != stop ||
      (stop && *e.ending_token != expected.tokens.back())) {
    Violate("request ", e.sequence.request.value, "/", e.sequence.index, ": finished with ",
            output->delivered, " of ", expected.tokens.size(), " tokens or another reason");
  }
  const SamplingParams& p = entry->request.sampling;
  if (e.sequence.index == 0 && p.prompt_logprobs >= 0 &&
      entry->next_prompt_logprob != entry->request.prompt.size()) {
    Violate("request ", e.sequence.request.value, ": finished without all prompt logprobs");
  }
  EndOutput(entry, output);
}

void Ledger::Take(const FailedEvent& e) {
  Entry* const entry = Find(e.request);
  if (entry == nullptr) return Violate("request ", e.request.value, " failed after its end");
  ++failed;
  if (!entry->poisoned && !entry->kills_at) ++innocent_failed;
  switch (e.status.code()) {
    case absl::StatusCode::kInternal:
      if (!entry->poisoned) Violate("request ", e.request.value, ": ", e.status.ToString());
      break;
    case absl::StatusCode::kUnavailable:
      if (entry->deaths < 2) Violate("request ", e.request.value, " quarantined too early");
      break;
    case absl::StatusCode::kDeadlineExceeded:
      if (entry->request.deadline_ms == kNoDeadline) {
        Violate("request ", e.request.value, " had no deadline");
      }
      break;
    default:
      Violate("request ", e.request.value, ": ", e.status.ToString());
  }
  live_.erase(e.request.value);
}

void Ledger::CheckPlan(const StepPlan& plan, int64_t now_ms) {
  CheckReleased(plan);
  for (const NewSequence& s : plan.new_sequences) {
    const auto it = by_seed_.find(s.sampling.seed);
    if (it == by_seed_.end()) return Violate("step ", plan.step, ": a sequence of unknown seed");
    const Entry* const entry = Find(it->second.request);
    if (entry == nullptr) return Violate("step ", plan.step, ": starts what has ended");
    in_slot_[s.slot.value] = {it->second, Seniority(*entry, it->second.index)};
  }
  for (const Span& span : plan.spans) {
    const auto it = in_slot_.find(span.slot.value);
    if (it == in_slot_.end()) return Violate("step ", plan.step, ": a span of an empty slot");
    const SequenceId id = it->second.id;
    Entry* const entry = Find(id.request);
    if (entry == nullptr || entry->outputs[id.index].ended) {
      return Violate("step ", plan.step, ": computes request ", id.request.value,
                     ", which has ended");
    }
    if (entry->request.deadline_ms <= now_ms) {
      return Violate("step ", plan.step, ": computes past a deadline");
    }
    entry->last_step = plan.step;
  }
}

// A slot that is given back by a sequence that has not ended was preempted, for
// somebody senior in another slot (who may have ended since).
void Ledger::CheckReleased(const StepPlan& plan) {
  std::map<uint32_t, Occupant> stayed = in_slot_;
  std::vector<Occupant> victims;
  for (const Slot slot : plan.finished_slots) {
    const auto it = in_slot_.find(slot.value);
    if (it == in_slot_.end()) return Violate("step ", plan.step, ": releases an empty slot");
    const SequenceId id = it->second.id;
    Entry* const entry = Find(id.request);
    if (entry != nullptr && !entry->outputs[id.index].ended) {
      ++preempted;
      if (++entry->outputs[id.index].preemptions > 3) {
        Violate("request ", id.request.value, " preempted a fourth time");
      }
      victims.push_back(it->second);
      stayed.erase(slot.value);
    }
    in_slot_.erase(it);
  }
  for (const Occupant& victim : victims) {
    if (std::none_of(stayed.begin(), stayed.end(),
                     [&](const auto& slot) { return slot.second.seniority < victim.seniority; })) {
      Violate("request ", victim.id.request.value, " was the oldest and was preempted");
    }
  }
}

bool Ledger::HoldsSlot(RequestId id) const {
  return std::any_of(in_slot_.begin(), in_slot_.end(),
                     [id](const auto& slot) { return slot.second.id.request == id; });
}

bool Ledger::KillerLives() const {
  return std::any_of(live_.begin(), live_.end(),
                     [](const auto& entry) { return entry.second.kills_at.has_value(); });
}

void Ledger::EpochEnded(uint64_t acknowledged) {
  for (auto& [id, entry] : live_) {
    if (HoldsSlot(entry.request.id) || entry.last_step > acknowledged) ++entry.deaths;
    entry.last_step = 0;
  }
  in_slot_.clear();
}

}  // namespace lockstep::sim
