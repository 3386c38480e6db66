#include "coordinator/api/http/completion_format.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace lockstep {
namespace {

// As OpenAI counts offsets: in characters, not bytes.
size_t CountCharacters(const std::string& text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  }));
}

}  // namespace

CompletionChoice::CompletionChoice(uint32_t index, const CompletionRequest& request,
                                   const ServedModel& model)
    : index_(index), request_(request), model_(model) {}

void CompletionChoice::AddPrompt(const Answer& answer, const PromptInfo& info,
                                 const std::string& prompt_text) {
  if (request_.return_token_ids) prompt_token_ids_ = answer.prompt();
  if (request_.prompt_logprobs) {
    prompt_logprobs_ = OrderedJson::array();
    for (size_t i = 0; i < info.logprobs.size(); ++i) {
      prompt_logprobs_.push_back(nullptr);
      if (!info.logprobs[i]) continue;
      OrderedJson entry = OrderedJson::object();
      const auto add = [&](TokenId id, float logprob, uint32_t rank) {
        entry[absl::StrCat(id)] = {{"logprob", FiniteLogprob(logprob)},
                                   {"rank", rank},
                                   {"decoded_token", model_.tokenizer->TokenText(id)}};
      };
      const TokenLogprobs& at = *info.logprobs[i];
      add(answer.prompt()[i], at.logprob, at.rank);
      for (uint32_t k = 0; k < at.top.size(); ++k) add(at.top[k].first, at.top[k].second, k + 1);
      prompt_logprobs_.back() = std::move(entry);
    }
  }
  if (!request_.echo) return;
  text_ += prompt_text;
  if (!request_.logprobs) return;
  size_t position = 0;  // bytes of the text that tokens so far stand for
  for (size_t i = 0; i < answer.prompt().size(); ++i) {
    const TokenId id = answer.prompt()[i];
    const std::string_view bytes = model_.tokenizer->TokenBytes(id);
    // The tokenizer's own frame (a bos) is no part of what the client wrote.
    const bool hidden = model_.tokenizer->IsSpecial(id) &&
                        std::string_view(prompt_text).substr(position, bytes.size()) != bytes;
    if (!hidden) position = std::min(position + bytes.size(), prompt_text.size());
    AddLogprobs(id, i < info.logprobs.size() ? info.logprobs[i] : std::optional<TokenLogprobs>(),
                hidden);
  }
}

void CompletionChoice::AddDelta(const TextDelta& delta) {
  has_delta_ = true;
  text_ += delta.text;
  token_ids_.insert(token_ids_.end(), delta.token_ids.begin(), delta.token_ids.end());
  if (!request_.logprobs) return;
  for (size_t i = 0; i < delta.logprobs.size(); ++i) {
    AddLogprobs(delta.token_ids[i], delta.logprobs[i], /*hidden=*/false);
  }
}

void CompletionChoice::AddEnd(const SequenceEnd& end, const SamplingParams& sampling) {
  has_delta_ = true;
  finish_reason_ = end.reason == FinishReason::kStop ? "stop" : "length";
  stop_reason_ = StopReason(end, sampling);
}

void CompletionChoice::AddLogprobs(TokenId id, const std::optional<TokenLogprobs>& entry,
                                   bool hidden) {
  tokens_.push_back(TokenName(id, request_, model_));
  text_offsets_.push_back(text_offset_);
  if (!hidden) text_offset_ += CountCharacters(model_.tokenizer->TokenText(id));
  token_logprobs_.push_back(entry ? OrderedJson(FiniteLogprob(entry->logprob))
                                  : OrderedJson(nullptr));
  top_logprobs_.push_back(entry ? TopLogprobs(id, *entry) : OrderedJson(nullptr));
}

// The alternatives, and the token itself where it is not among them. Of two
// tokens that look the same the likelier one is shown.
OrderedJson CompletionChoice::TopLogprobs(TokenId id, const TokenLogprobs& entry) const {
  OrderedJson top = OrderedJson::object();
  for (const auto& [other, logprob] : entry.top)
    top.emplace(TokenName(other, request_, model_), FiniteLogprob(logprob));
  top.emplace(TokenName(id, request_, model_), FiniteLogprob(entry.logprob));
  return top;
}

OrderedJson CompletionChoice::Take() {
  OrderedJson choice;
  choice["index"] = index_;
  choice["text"] = std::exchange(text_, {});
  choice["logprobs"] = nullptr;
  if (request_.logprobs) {
    const auto list = [](OrderedJson& from) {
      return from.is_null() ? OrderedJson::array() : std::exchange(from, nullptr);
    };
    OrderedJson logprobs;
    logprobs["text_offset"] = list(text_offsets_);
    logprobs["token_logprobs"] = list(token_logprobs_);
    logprobs["tokens"] = list(tokens_);
    logprobs["top_logprobs"] = list(top_logprobs_);
    choice["logprobs"] = std::move(logprobs);
  }
  choice["finish_reason"] = std::exchange(finish_reason_, nullptr);
  choice["stop_reason"] = std::exchange(stop_reason_, nullptr);
  if (request_.return_token_ids) {
    if (!prompt_token_ids_.is_null()) {
      choice["prompt_token_ids"] = std::exchange(prompt_token_ids_, nullptr);
    }
    choice["token_ids"] = token_ids_;
  }
  token_ids_.clear();
  if (!prompt_logprobs_.is_null()) {
    choice["prompt_logprobs"] = std::exchange(prompt_logprobs_, nullptr);
  }
  has_delta_ = false;
  return choice;
}

OrderedJson UsageJson(const Usage& usage) {
  OrderedJson json;
  json["prompt_tokens"] = usage.prompt_tokens;
  json["completion_tokens"] = usage.completion_tokens;
  json["total_tokens"] = usage.prompt_tokens + usage.completion_tokens;
  json["prompt_tokens_details"] = {{"cached_tokens", usage.cached_tokens}};
  return json;
}

CompletionEnvelope::CompletionEnvelope(const std::string& id, const std::string& model)
    : id_(id), model_(model), created_(std::time(nullptr)) {}

OrderedJson CompletionEnvelope::Make(const char* object, OrderedJson choices) const {
  OrderedJson json;
  json["id"] = id_;
  json["object"] = object;
  json["created"] = created_;
  json["model"] = model_;
  json["choices"] = std::move(choices);
  return json;
}

double FiniteLogprob(float logprob) { return std::max(static_cast<double>(logprob), -9999.0); }

std::string TokenName(TokenId id, const CompletionRequest& request, const ServedModel& model) {
  return request.return_tokens_as_token_ids ? absl::StrCat("token_id:", id)
                                            : model.tokenizer->TokenText(id);
}

OrderedJson StopReason(const SequenceEnd& end, const SamplingParams& sampling) {
  if (end.stop_string) return *end.stop_string;
  const std::vector<TokenId>& asked = sampling.stop_token_ids;
  if (end.ending_token && std::find(asked.begin(), asked.end(), *end.ending_token) != asked.end()) {
    return *end.ending_token;
  }
  return nullptr;
}

std::string Dump(const OrderedJson& json) {
  return json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

}  // namespace lockstep
