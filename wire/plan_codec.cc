#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "wire/codec.h"
#include "wire/codec_checks.h"

namespace lockstep::wire {
namespace {

using internal::AddIds;
using internal::Bad;
using internal::CheckAtMost;
using internal::CheckBeside;
using internal::CheckFinite;
using internal::kMaxBlocks;
using internal::kMaxLogprobs;
using internal::kMaxSlots;
using internal::kMaxTokens;

constexpr int kMaxBiases = 1'024;
constexpr int kMaxEndingIds = 1'024;

template <typename IdType, typename In>
std::vector<IdType> ToIds(const In& values, int begin, int count) {
  std::vector<IdType> ids;
  ids.reserve(count);
  for (int i = begin; i < begin + count; ++i) ids.emplace_back(values[i]);
  return ids;
}

void EncodeSampling(const SlotSampling& from, worker::v1::SlotSampling* to) {
  to->set_temperature(from.temperature);
  to->set_top_p(from.top_p);
  to->set_top_k(from.top_k);
  to->set_min_p(from.min_p);
  to->set_repetition_penalty(from.repetition_penalty);
  to->set_presence_penalty(from.presence_penalty);
  to->set_frequency_penalty(from.frequency_penalty);
  to->set_seed(from.seed);
  for (const auto& [id, bias] : from.logit_bias) {
    to->add_bias_ids(id);
    to->add_bias_values(bias);
  }
  to->set_min_tokens(from.min_tokens);
  to->mutable_ending_ids()->Add(from.ending_ids.begin(), from.ending_ids.end());
  to->set_logprobs(from.logprobs);
  to->set_prompt_logprobs(from.prompt_logprobs);
}

absl::Status CheckSampling(const std::string& field, const worker::v1::SlotSampling& s) {
  const std::pair<const char*, float> numbers[] = {{".temperature", s.temperature()},
                                                   {".top_p", s.top_p()},
                                                   {".min_p", s.min_p()},
                                                   {".repetition_penalty", s.repetition_penalty()},
                                                   {".presence_penalty", s.presence_penalty()},
                                                   {".frequency_penalty", s.frequency_penalty()}};
  for (const auto& [name, value] : numbers) {
    LOCKSTEP_RETURN_IF_ERROR(CheckFinite(field + name, value));
  }
  if (s.temperature() < 0) return Bad(field + ".temperature", "negative");
  if (s.top_p() <= 0 || s.top_p() > 1) return Bad(field + ".top_p", "outside (0, 1]");
  if (s.min_p() < 0 || s.min_p() > 1) return Bad(field + ".min_p", "outside [0, 1]");
  if (s.repetition_penalty() < kMinRepetitionPenalty) {
    return Bad(field + ".repetition_penalty", "not positive");
  }
  LOCKSTEP_RETURN_IF_ERROR(
      CheckBeside(field + ".bias_values", s.bias_values_size(), "bias_ids", s.bias_ids_size()));
  LOCKSTEP_RETURN_IF_ERROR(CheckAtMost(field + ".bias_ids", s.bias_ids_size(), kMaxBiases));
  for (const float value : s.bias_values()) {
    LOCKSTEP_RETURN_IF_ERROR(CheckFinite(field + ".bias_values", value));
  }
  LOCKSTEP_RETURN_IF_ERROR(CheckAtMost(field + ".ending_ids", s.ending_ids_size(), kMaxEndingIds));
  if (s.logprobs() < -1 || s.logprobs() > kMaxLogprobs) {
    return Bad(field + ".logprobs", absl::StrCat(s.logprobs(), " is outside [-1, 20]"));
  }
  if (s.prompt_logprobs() < -1 || s.prompt_logprobs() > kMaxLogprobs) {
    return Bad(field + ".prompt_logprobs",
               absl::StrCat(s.prompt_logprobs(), " is outside [-1, 20]"));
  }
  return absl::OkStatus();
}

SlotSampling DecodeSampling(const worker::v1::SlotSampling& from) {
  SlotSampling to;
  to.temperature = from.temperature();
  to.top_p = from.top_p();
  to.top_k = from.top_k();
  to.min_p = from.min_p();
  to.repetition_penalty = from.repetition_penalty();
  to.presence_penalty = from.presence_penalty();
  to.frequency_penalty = from.frequency_penalty();
  to.seed = from.seed();
  for (int i = 0; i < from.bias_ids_size(); ++i) {
    to.logit_bias.emplace_back(from.bias_ids(i), from.bias_values(i));
  }
  to.min_tokens = from.min_tokens();
  to.ending_ids.assign(from.ending_ids().begin(), from.ending_ids().end());
  to.logprobs = from.logprobs();
  to.prompt_logprobs = from.prompt_logprobs();
  return to;
}

absl::StatusOr<NewSequence> DecodeSequence(const std::string& field,
                                           const worker::v1::NewSequence& from) {
  if (from.tokens_size() == 0) return Bad(field + ".tokens", "empty");
  LOCKSTEP_RETURN_IF_ERROR(CheckAtMost(field + ".tokens", from.tokens_size(), kMaxTokens));
  LOCKSTEP_RETURN_IF_ERROR(CheckAtMost(field + ".block_ids", from.block_ids_size(), kMaxBlocks));
  const uint32_t num_tokens = static_cast<uint32_t>(from.tokens_size());
  if (from.num_prompt_tokens() == 0 || from.num_prompt_tokens() > num_tokens) {
    return Bad(field + ".num_prompt_tokens",
               absl::StrCat(from.num_prompt_tokens(), " of ", num_tokens, " tokens"));
  }
  if (from.num_computed_tokens() >= num_tokens) {
    return Bad(field + ".num_computed_tokens",
               absl::StrCat(from.num_computed_tokens(), " of ", num_tokens, " tokens"));
  }
  LOCKSTEP_RETURN_IF_ERROR(CheckSampling(field + ".sampling", from.sampling()));
  NewSequence to;
  to.slot = Slot(from.slot());
  to.tokens.assign(from.tokens().begin(), from.tokens().end());
  to.num_prompt_tokens = from.num_prompt_tokens();
  to.num_computed_tokens = from.num_computed_tokens();
  to.block_ids = ToIds<BlockId>(from.block_ids(), 0, from.block_ids_size());
  to.sampling = DecodeSampling(from.sampling());
  return to;
}

}  // namespace

worker::v1::StepPlan Encode(const StepPlan& plan) {
  worker::v1::StepPlan to;
  to.set_epoch(plan.epoch);
  to.set_step(plan.step);
  to.set_digest(plan.digest);
  AddIds(plan.finished_slots, to.mutable_finished_slots());
  for (const NewSequence& from : plan.new_sequences) {
    worker::v1::NewSequence* sequence = to.add_new_sequences();
    sequence->set_slot(from.slot.value);
    sequence->mutable_tokens()->Add(from.tokens.begin(), from.tokens.end());
    sequence->set_num_prompt_tokens(from.num_prompt_tokens);
    sequence->set_num_computed_tokens(from.num_computed_tokens);
    AddIds(from.block_ids, sequence->mutable_block_ids());
    EncodeSampling(from.sampling, sequence->mutable_sampling());
  }
  for (const GrownTable& grown : plan.grown_tables) {
    to.add_grown_slots(grown.slot.value);
    to.add_grown_counts(static_cast<uint32_t>(grown.block_ids.size()));
    AddIds(grown.block_ids, to.mutable_grown_blocks());
  }
  bool one_each = true;
  for (const Span& span : plan.spans) {
    to.add_span_slots(span.slot.value);
    one_each &= span.num_tokens == 1;
  }
  if (!one_each) {
    for (const Span& span : plan.spans) to.add_span_tokens(span.num_tokens);
  }
  return to;
}

absl::StatusOr<StepPlan> Decode(const worker::v1::StepPlan& plan) {
  if (plan.epoch() == 0) return Bad("epoch", "0");
  if (plan.step() == 0) return Bad("step", "0");
  LOCKSTEP_RETURN_IF_ERROR(CheckAtMost("finished_slots", plan.finished_slots_size(), kMaxSlots));
  LOCKSTEP_RETURN_IF_ERROR(CheckAtMost("new_sequences", plan.new_sequences_size(), kMaxSlots));
  LOCKSTEP_RETURN_IF_ERROR(CheckAtMost("grown_slots", plan.grown_slots_size(), kMaxSlots));
  LOCKSTEP_RETURN_IF_ERROR(CheckAtMost("grown_blocks", plan.grown_blocks_size(), kMaxBlocks));
  LOCKSTEP_RETURN_IF_ERROR(CheckAtMost("span_slots", plan.span_slots_size(), kMaxSlots));
  StepPlan to;
  to.epoch = plan.epoch();
  to.step = plan.step();
  to.digest = plan.digest();
  to.finished_slots = ToIds<Slot>(plan.finished_slots(), 0, plan.finished_slots_size());
  for (int i = 0; i < plan.new_sequences_size(); ++i) {
    absl::StatusOr<NewSequence> sequence =
        DecodeSequence(absl::StrCat("new_sequences[", i, "]"), plan.new_sequences(i));
    if (!sequence.ok()) return sequence.status();
    to.new_sequences.push_back(*std::move(sequence));
  }
  LOCKSTEP_RETURN_IF_ERROR(CheckBeside("grown_counts", plan.grown_counts_size(), "grown_slots",
                                       plan.grown_slots_size()));
  int used = 0;
  for (int i = 0; i < plan.grown_slots_size(); ++i) {
    const uint32_t count = plan.grown_counts(i);
    if (count == 0) return Bad(absl::StrCat("grown_counts[", i, "]"), "0");
    if (count > static_cast<uint32_t>(plan.grown_blocks_size() - used)) {
      return Bad("grown_blocks",
                 absl::StrCat("fewer (", plan.grown_blocks_size(), ") than grown_counts announce"));
    }
    to.grown_tables.push_back({Slot(plan.grown_slots(i)),
                               ToIds<BlockId>(plan.grown_blocks(), used, static_cast<int>(count))});
    used += static_cast<int>(count);
  }
  if (used != plan.grown_blocks_size()) {
    return Bad("grown_blocks", absl::StrCat("more (", plan.grown_blocks_size(),
                                            ") than grown_counts announce (", used, ")"));
  }
  if (plan.span_tokens_size() != 0) {
    LOCKSTEP_RETURN_IF_ERROR(
        CheckBeside("span_tokens", plan.span_tokens_size(), "span_slots", plan.span_slots_size()));
  }
  uint64_t total = 0;
  for (int i = 0; i < plan.span_slots_size(); ++i) {
    const uint32_t tokens = plan.span_tokens_size() == 0 ? 1 : plan.span_tokens(i);
    if (tokens == 0) return Bad(absl::StrCat("span_tokens[", i, "]"), "0");
    total += tokens;
    if (total > kMaxTokens) return Bad("span_tokens", absl::StrCat("more than ", kMaxTokens));
    to.spans.push_back({Slot(plan.span_slots(i)), tokens});
  }
  return to;
}

}  // namespace lockstep::wire
