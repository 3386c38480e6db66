// Answers as OpenAI's chat completion objects: messages, or deltas of them, with
// the function calls that an answer makes taken out of its text.
#ifndef LOCKSTEP_COORDINATOR_API_HTTP_CHAT_FORMAT_H_
#define LOCKSTEP_COORDINATOR_API_HTTP_CHAT_FORMAT_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "coordinator/api/http/choice_builder.h"
#include "coordinator/api/http/completion_request.h"
#include "coordinator/api/http/tool_call_parser.h"
#include "coordinator/api/served_model.h"

namespace lockstep {

class ChatChoice : public ChoiceBuilder {
 public:
  // What is referred to outlives the builder.
  ChatChoice(uint32_t index, const CompletionRequest& request, const ServedModel& model);

  void AddPrompt(const Answer&, const PromptInfo&, const std::string&) override {}
  void AddDelta(const TextDelta& delta) override;
  void AddEnd(const SequenceEnd& end, const SamplingParams& sampling) override;
  bool HasDelta() const override { return has_delta_; }
  std::optional<OrderedJson> TakeOpening() override;
  OrderedJson Take() override;

 private:
  void Add(ToolCallParser::Found found);
  void AddLogprobs(TokenId id, const TokenLogprobs& entry);
  OrderedJson TokenEntry(TokenId id, float logprob) const;
  OrderedJson TakeMessage();
  OrderedJson TakeDelta();

  const uint32_t index_;
  const CompletionRequest& request_;
  const ServedModel& model_;
  std::optional<ToolCallParser> parser_;  // when there are functions to call
  bool opened_ = false;
  uint32_t calls_ = 0;

  // Since the last Take:
  bool has_delta_ = false;
  std::string text_;
  std::vector<TokenId> token_ids_;
  OrderedJson logprobs_, tool_calls_;  // null when there are none
  OrderedJson finish_reason_, stop_reason_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_HTTP_CHAT_FORMAT_H_
