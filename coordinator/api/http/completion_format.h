// Answers as OpenAI's completion objects, and what chat's have in common with
// them: envelope, usage, the reason why an answer ended.
#ifndef LOCKSTEP_COORDINATOR_API_HTTP_COMPLETION_FORMAT_H_
#define LOCKSTEP_COORDINATOR_API_HTTP_COMPLETION_FORMAT_H_

#include <cstdint>
#include <ctime>
#include <optional>
#include <string>
#include <vector>

#include "coordinator/api/answer.h"
#include "coordinator/api/http/choice_builder.h"
#include "coordinator/api/http/completion_request.h"
#include "coordinator/api/served_model.h"

namespace lockstep {

class CompletionChoice : public ChoiceBuilder {
 public:
  // What is referred to outlives the builder.
  CompletionChoice(uint32_t index, const CompletionRequest& request, const ServedModel& model);

  void AddPrompt(const Answer& answer, const PromptInfo& info,
                 const std::string& prompt_text) override;
  void AddDelta(const TextDelta& delta) override;
  void AddEnd(const SequenceEnd& end, const SamplingParams& sampling) override;
  bool HasDelta() const override { return has_delta_; }
  OrderedJson Take() override;

 private:
  // `hidden`: the token has no characters in the text.
  void AddLogprobs(TokenId id, const std::optional<TokenLogprobs>& entry, bool hidden);
  OrderedJson TopLogprobs(TokenId id, const TokenLogprobs& entry) const;

  const uint32_t index_;
  const CompletionRequest& request_;
  const ServedModel& model_;
  size_t text_offset_ = 0;  // characters of tokens so far

  // Since the last Take:
  bool has_delta_ = false;
  std::string text_;
  std::vector<TokenId> token_ids_;
  OrderedJson tokens_, token_logprobs_, top_logprobs_, text_offsets_;
  OrderedJson prompt_token_ids_, prompt_logprobs_;  // null when there are none
  OrderedJson finish_reason_, stop_reason_;
};

struct Usage {
  uint64_t prompt_tokens = 0, completion_tokens = 0, cached_tokens = 0;
};
OrderedJson UsageJson(const Usage& usage);

// What all objects of one answer share: id, object, created, model.
class CompletionEnvelope {
 public:
  CompletionEnvelope(const std::string& id, const std::string& model);
  OrderedJson Make(const char* object, OrderedJson choices) const;

 private:
  const std::string id_;
  const std::string model_;
  const std::time_t created_;
};

// JSON has no infinity; a token that cannot come is very unlikely.
double FiniteLogprob(float logprob);
// How a token is shown beside its log-probability.
std::string TokenName(TokenId id, const CompletionRequest& request, const ServedModel& model);
// What matched, where a stop of the request's own ended the answer; null otherwise.
OrderedJson StopReason(const SequenceEnd& end, const SamplingParams& sampling);

// JSON text; bytes that are not UTF-8 appear as U+FFFD.
std::string Dump(const OrderedJson& json);

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_HTTP_COMPLETION_FORMAT_H_
