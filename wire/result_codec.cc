#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "wire/codec.h"
#include "wire/codec_checks.h"

namespace lockstep::wire {
namespace {

using internal::Bad;
using internal::CheckAtMost;
using internal::CheckBeside;
using internal::kMaxLogprobs;
using internal::kMaxSlots;
using internal::kMaxTokens;

void EncodeLogprobs(const TokenLogprobs& from, worker::v1::SampledLogprobs* to) {
  to->set_logprob(from.logprob);
  to->set_rank(from.rank);
  for (const auto& [id, logprob] : from.top) {
    to->add_top_ids(id);
    to->add_top_logprobs(logprob);
  }
}

absl::StatusOr<TokenLogprobs> DecodeLogprobs(const std::string& field,
                                             const worker::v1::SampledLogprobs& from) {
  LOCKSTEP_RETURN_IF_ERROR(CheckBeside(field + ".top_logprobs", from.top_logprobs_size(), "top_ids",
                                       from.top_ids_size()));
  LOCKSTEP_RETURN_IF_ERROR(CheckAtMost(field + ".top_ids", from.top_ids_size(), kMaxLogprobs));
  // Minus infinity is a probability that underflowed.
  if (std::isnan(from.logprob())) return Bad(field + ".logprob", "not a number");
  TokenLogprobs to;
  to.logprob = from.logprob();
  to.rank = from.rank();
  for (int i = 0; i < from.top_ids_size(); ++i) {
    if (std::isnan(from.top_logprobs(i))) return Bad(field + ".top_logprobs", "not a number");
    to.top.emplace_back(from.top_ids(i), from.top_logprobs(i));
  }
  return to;
}

StepTiming DecodeTiming(const worker::v1::StepTiming& from) {
  StepTiming to;
  to.plan_received_ns = from.plan_received_ns();
  to.started_ns = from.started_ns();
  to.compute_ns = from.compute_ns();
  to.collective_wait_ns = from.collective_wait_ns();
  to.collective_transfer_ns = from.collective_transfer_ns();
  to.sampling_ns = from.sampling_ns();
  to.total_ns = from.total_ns();
  to.collective_bytes = from.collective_bytes();
  to.device_idle_ns = from.device_idle_ns();
  return to;
}

}  // namespace

worker::v1::StepResult Encode(const StepResult& result) {
  worker::v1::StepResult to;
  to.set_epoch(result.epoch);
  to.set_step(result.step);
  to.set_digest(result.digest);
  to.set_num_collectives(result.num_collectives);
  worker::v1::StepTiming* timing = to.mutable_timing();
  timing->set_plan_received_ns(result.timing.plan_received_ns);
  timing->set_started_ns(result.timing.started_ns);
  timing->set_compute_ns(result.timing.compute_ns);
  timing->set_collective_wait_ns(result.timing.collective_wait_ns);
  timing->set_collective_transfer_ns(result.timing.collective_transfer_ns);
  timing->set_sampling_ns(result.timing.sampling_ns);
  timing->set_total_ns(result.timing.total_ns);
  timing->set_collective_bytes(result.timing.collective_bytes);
  timing->set_device_idle_ns(result.timing.device_idle_ns);
  bool any_logprobs = false;
  for (const SampledToken& sampled : result.sampled) any_logprobs |= sampled.has_logprobs;
  for (const SampledToken& sampled : result.sampled) {
    to.add_sampled_slots(sampled.slot.value);
    to.add_sampled_tokens(sampled.token);
    if (sampled.poisoned) to.add_poisoned_slots(sampled.slot.value);
    if (!any_logprobs) continue;
    worker::v1::SampledLogprobs* logprobs = to.add_logprobs();
    if (sampled.has_logprobs) EncodeLogprobs(sampled.logprobs, logprobs);
  }
  for (const SlotPromptLogprobs& from : result.prompt_logprobs) {
    worker::v1::PromptLogprobs* prompt = to.add_prompt_logprobs();
    prompt->set_slot(from.slot.value);
    prompt->set_first_position(from.first_position);
    for (const TokenLogprobs& entry : from.entries) EncodeLogprobs(entry, prompt->add_entries());
  }
  return to;
}

absl::StatusOr<StepResult> Decode(const worker::v1::StepResult& result) {
  if (result.epoch() == 0) return Bad("epoch", "0");
  if (result.step() == 0) return Bad("step", "0");
  LOCKSTEP_RETURN_IF_ERROR(CheckAtMost("sampled_slots", result.sampled_slots_size(), kMaxSlots));
  LOCKSTEP_RETURN_IF_ERROR(
      CheckAtMost("prompt_logprobs", result.prompt_logprobs_size(), kMaxSlots));
  LOCKSTEP_RETURN_IF_ERROR(CheckBeside("sampled_tokens", result.sampled_tokens_size(),
                                       "sampled_slots", result.sampled_slots_size()));
  if (result.logprobs_size() != 0) {
    LOCKSTEP_RETURN_IF_ERROR(CheckBeside("logprobs", result.logprobs_size(), "sampled_slots",
                                         result.sampled_slots_size()));
  }
  StepResult to;
  to.epoch = result.epoch();
  to.step = result.step();
  to.digest = result.digest();
  to.num_collectives = result.num_collectives();
  to.timing = DecodeTiming(result.timing());
  for (int i = 0; i < result.sampled_slots_size(); ++i) {
    SampledToken sampled;
    sampled.slot = Slot(result.sampled_slots(i));
    sampled.token = result.sampled_tokens(i);
    // Whoever has a log-probability has a rank, counted from 1.
    if (result.logprobs_size() != 0 && result.logprobs(i).rank() != 0) {
      absl::StatusOr<TokenLogprobs> logprobs =
          DecodeLogprobs(absl::StrCat("logprobs[", i, "]"), result.logprobs(i));
      if (!logprobs.ok()) return logprobs.status();
      sampled.has_logprobs = true;
      sampled.logprobs = *std::move(logprobs);
    }
    to.sampled.push_back(std::move(sampled));
  }
  // Poisoned slots come in the order of the sampled ones.
  size_t at = 0;
  for (const uint32_t slot : result.poisoned_slots()) {
    while (at < to.sampled.size() && to.sampled[at].slot.value != slot) ++at;
    if (at == to.sampled.size()) {
      return Bad("poisoned_slots", absl::StrCat("slot ", slot, " is not among sampled_slots"));
    }
    to.sampled[at++].poisoned = true;
  }
  for (int i = 0; i < result.prompt_logprobs_size(); ++i) {
    const worker::v1::PromptLogprobs& from = result.prompt_logprobs(i);
    const std::string field = absl::StrCat("prompt_logprobs[", i, "]");
    LOCKSTEP_RETURN_IF_ERROR(CheckAtMost(field + ".entries", from.entries_size(), kMaxTokens));
    SlotPromptLogprobs prompt;
    prompt.slot = Slot(from.slot());
    prompt.first_position = from.first_position();
    for (int j = 0; j < from.entries_size(); ++j) {
      absl::StatusOr<TokenLogprobs> entry =
          DecodeLogprobs(absl::StrCat(field, ".entries[", j, "]"), from.entries(j));
      if (!entry.ok()) return entry.status();
      prompt.entries.push_back(*std::move(entry));
    }
    to.prompt_logprobs.push_back(std::move(prompt));
  }
  return to;
}

}  // namespace lockstep::wire
