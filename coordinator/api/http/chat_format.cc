#include "coordinator/api/http/chat_format.h"

#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/api/client_request.h"
#include "coordinator/api/http/completion_format.h"

namespace lockstep {

ChatChoice::ChatChoice(uint32_t index, const CompletionRequest& request, const ServedModel& model)
    : index_(index), request_(request), model_(model) {
  if (!request.tools.empty()) parser_.emplace(request.tools);
}

void ChatChoice::Add(ToolCallParser::Found found) {
  text_ += found.text;
  for (ToolCall& call : found.calls) {
    OrderedJson json;
    // A message's calls are a list; those of deltas say where in it they are.
    if (request_.stream) json["index"] = calls_;
    ++calls_;
    json["id"] = absl::StrCat("call_", MakeRequestId());
    json["type"] = "function";
    json["function"] = {{"name", std::move(call.name)}, {"arguments", std::move(call.arguments)}};
    tool_calls_.push_back(std::move(json));
  }
}

void ChatChoice::AddDelta(const TextDelta& delta) {
  has_delta_ = true;
  if (parser_) {
    Add(parser_->Push(delta.text));
  } else {
    text_ += delta.text;
  }
  token_ids_.insert(token_ids_.end(), delta.token_ids.begin(), delta.token_ids.end());
  if (!request_.logprobs) return;
  for (size_t i = 0; i < delta.logprobs.size(); ++i) {
    AddLogprobs(delta.token_ids[i], delta.logprobs[i]);
  }
}

void ChatChoice::AddEnd(const SequenceEnd& end, const SamplingParams& sampling) {
  has_delta_ = true;
  if (parser_) Add(parser_->Finish());
  finish_reason_ = end.reason != FinishReason::kStop ? "length"
                   : calls_ > 0                      ? "tool_calls"
                                                     : "stop";
  stop_reason_ = StopReason(end, sampling);
}

OrderedJson ChatChoice::TokenEntry(TokenId id, float logprob) const {
  OrderedJson entry;
  entry["token"] = TokenName(id, request_, model_);
  entry["logprob"] = FiniteLogprob(logprob);
  entry["bytes"] = OrderedJson::array();
  for (const char c : model_.tokenizer->TokenBytes(id)) {
    entry["bytes"].push_back(static_cast<unsigned char>(c));
  }
  return entry;
}

void ChatChoice::AddLogprobs(TokenId id, const TokenLogprobs& at) {
  OrderedJson entry = TokenEntry(id, at.logprob);
  entry["top_logprobs"] = OrderedJson::array();
  for (const auto& [other, logprob] : at.top) {
    entry["top_logprobs"].push_back(TokenEntry(other, logprob));
  }
  logprobs_.push_back(std::move(entry));
}

std::optional<OrderedJson> ChatChoice::TakeOpening() {
  if (std::exchange(opened_, true)) return {};
  OrderedJson choice;
  choice["index"] = index_;
  choice["delta"] = {{"role", "assistant"}, {"content", ""}};
  choice["logprobs"] = nullptr;
  choice["finish_reason"] = nullptr;
  return choice;
}

OrderedJson ChatChoice::TakeMessage() {
  OrderedJson message;
  message["role"] = "assistant";
  const bool only_calls = text_.empty() && !tool_calls_.is_null();
  message["content"] = only_calls ? OrderedJson(nullptr) : OrderedJson(std::move(text_));
  message["refusal"] = nullptr;
  if (!tool_calls_.is_null()) message["tool_calls"] = std::exchange(tool_calls_, nullptr);
  return message;
}

OrderedJson ChatChoice::TakeDelta() {
  OrderedJson delta = OrderedJson::object();
  // Without a parser there is a text of every token, if an empty one. With one
  // an empty text says nothing.
  if (!parser_ || !text_.empty()) delta["content"] = std::move(text_);
  if (!tool_calls_.is_null()) delta["tool_calls"] = std::exchange(tool_calls_, nullptr);
  return delta;
}

OrderedJson ChatChoice::Take() {
  OrderedJson choice;
  choice["index"] = index_;
  if (request_.stream) {
    choice["delta"] = TakeDelta();
  } else {
    choice["message"] = TakeMessage();
  }
  text_.clear();
  choice["logprobs"] = nullptr;
  if (request_.logprobs) {
    choice["logprobs"] = {{"content", logprobs_.is_null() ? OrderedJson::array()
                                                          : std::exchange(logprobs_, nullptr)}};
  }
  choice["finish_reason"] = std::exchange(finish_reason_, nullptr);
  choice["stop_reason"] = std::exchange(stop_reason_, nullptr);
  if (request_.return_token_ids) choice["token_ids"] = token_ids_;
  token_ids_.clear();
  has_delta_ = false;
  return choice;
}

}  // namespace lockstep
