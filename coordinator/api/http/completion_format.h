// Answers as OpenAI's completion objects. A ChoiceBuilder gathers what one
// choice adds; Take turns what was gathered since the last Take into JSON: once
// for a whole answer, once a chunk for a stream, so that both are made alike.
#ifndef LOCKSTEP_COORDINATOR_API_HTTP_COMPLETION_FORMAT_H_
#define LOCKSTEP_COORDINATOR_API_HTTP_COMPLETION_FORMAT_H_

#include <cstdint>
#include <ctime>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "coordinator/api/answer.h"
#include "coordinator/api/http/completion_request.h"
#include "coordinator/api/served_model.h"

namespace lockstep {

using OrderedJson = nlohmann::ordered_json;

class ChoiceBuilder {
 public:
  // What is referred to outlives the builder. `prompt_text`: what echo shows.
  ChoiceBuilder(uint32_t index, const CompletionRequest& request, const ServedModel& model);

  void AddPrompt(const Answer& answer, const PromptInfo& info, const std::string& prompt_text);
  void AddDelta(const TextDelta& delta);
  void AddEnd(const SequenceEnd& end, const SamplingParams& sampling);

  // Whether a chunk is due: the prompt alone waits for the first delta.
  bool HasDelta() const { return has_delta_; }
  OrderedJson Take();

 private:
  // `hidden`: the token has no characters in the text.
  void AddLogprobs(TokenId id, const std::optional<TokenLogprobs>& entry, bool hidden);
  std::string TokenName(TokenId id) const;
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
  CompletionEnvelope(const std::string& request_id, const std::string& model);
  OrderedJson Make(OrderedJson choices) const;

 private:
  const std::string id_;
  const std::string model_;
  const std::time_t created_;
};

// JSON text; bytes that are not UTF-8 appear as U+FFFD.
std::string Dump(const OrderedJson& json);

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_HTTP_COMPLETION_FORMAT_H_
