#include "coordinator/api/http/completion_request.h"

#include <limits>
#include <optional>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "coordinator/api/api_error.h"
#include "coordinator/api/limits.h"

namespace lockstep {
namespace {

void ReadStop(FieldReader* fields, ClientSampling* out) {
  const Json* const stop = fields->Raw("stop");
  if (stop == nullptr) return;
  if (stop->is_string()) {
    out->stop.push_back(stop->get<std::string>());
    return;
  }
  if (stop->is_array() && stop->size() > limits::kStopStrings) {
    return fields->Fail(FieldError(
        "stop",
        absl::StrCat(stop->size(), " strings are too many; allowed: ", limits::kStopStrings)));
  }
  if (stop->is_array()) {
    for (const Json& element : *stop) {
      if (!element.is_string()) {
        return fields->Fail(
            FieldError("stop", absl::StrCat("expected strings, got ", EchoJson(element))));
      }
      out->stop.push_back(element.get<std::string>());
    }
    return;
  }
  fields->Fail(FieldError(
      "stop", absl::StrCat("expected a string or an array of strings, got ", EchoJson(*stop))));
}

void ReadLogitBias(FieldReader* fields, ClientSampling* out) {
  const Json* const bias = fields->Raw("logit_bias");
  if (bias == nullptr) return;
  if (!bias->is_object()) {
    return fields->Fail(
        FieldError("logit_bias",
                   absl::StrCat("expected an object of token id to bias, got ", EchoJson(*bias))));
  }
  if (bias->size() > limits::kLogitBiasEntries) {
    return fields->Fail(FieldError(
        "logit_bias",
        absl::StrCat(bias->size(), " entries are too many; allowed: ", limits::kLogitBiasEntries)));
  }
  for (const auto& [key, value] : bias->items()) {
    int64_t id = 0;
    // As JSON would write the number: "7", not "07", "+7" or " 7".
    if (!absl::SimpleAtoi(key, &id) || absl::StrCat(id) != key) {
      return fields->Fail(
          FieldError("logit_bias", absl::StrCat("'", Echo(key), "' is not a token id")));
    }
    if (!value.is_number()) {
      return fields->Fail(FieldError(
          "logit_bias", absl::StrCat("expected a number for ", key, ", got ", EchoJson(value))));
    }
    out->logit_bias.emplace_back(id, value.get<double>());
  }
}

void ReadMaxTokens(FieldReader* fields, ClientSampling* out) {
  out->max_tokens = fields->Integer("max_tokens");
  const std::optional<int64_t> newer = fields->Integer("max_completion_tokens");
  if (!newer) return;
  out->max_tokens_field = "max_completion_tokens";
  if (out->max_tokens && *out->max_tokens != *newer) {
    return fields->Fail(
        FieldError("max_completion_tokens", "differs from max_tokens; send one of them"));
  }
  out->max_tokens = newer;
}

// A prompt of one request: text, or an array of token ids.
absl::Status ReadPrompt(const Json& value, ClientRequest* out) {
  if (value.is_string()) {
    out->prompt = value.get<std::string>();
    return absl::OkStatus();
  }
  if (!value.is_array()) {
    return FieldError("prompt", absl::StrCat("expected text or token ids, got ", EchoJson(value)));
  }
  absl::StatusOr<std::vector<TokenId>> ids = ReadTokenIds(value, "prompt");
  if (!ids.ok()) return ids.status();
  out->prompt = *std::move(ids);
  return absl::OkStatus();
}

// Text, token ids, or a batch of either.
absl::StatusOr<std::vector<ClientRequest>> ReadPrompts(const Json* value) {
  if (value == nullptr) return FieldError("prompt", "missing; send text or token ids");
  std::vector<const Json*> each;
  if (value->is_array() && !value->empty() &&
      (value->front().is_string() || value->front().is_array())) {
    if (value->size() > limits::kPromptsPerBatch) {
      return FieldError("prompt", absl::StrCat(value->size(), " prompts are too many; allowed: ",
                                               limits::kPromptsPerBatch));
    }
    for (const Json& element : *value) each.push_back(&element);
  } else {
    each.push_back(value);
  }
  std::vector<ClientRequest> prompts(each.size());
  for (size_t i = 0; i < each.size(); ++i) {
    // A batch is of one kind, like its first.
    if (each[i]->type() != each[0]->type()) {
      return FieldError("prompt", absl::StrCat("index ", i, ": ", EchoJson(*each[i]),
                                               " in a batch that began with another type"));
    }
    if (absl::Status status = ReadPrompt(*each[i], &prompts[i]); !status.ok()) return status;
  }
  return prompts;
}

void ReadStreamOptions(FieldReader* fields, CompletionRequest* out) {
  const Json* const options = fields->Raw("stream_options");
  if (options == nullptr) return;
  if (!out->stream) {
    return fields->Fail(FieldError("stream_options", "only for stream: true"));
  }
  FieldReader inner(*options, "stream_options.");
  out->include_usage = inner.Bool("include_usage").value_or(false);
  out->continuous_usage_stats = inner.Bool("continuous_usage_stats").value_or(false);
  fields->Fail(inner.Finish());
}

// Fields that are accepted only where they change nothing.
void ReadNeutral(FieldReader* fields, int64_t n) {
  const std::optional<int64_t> best_of = fields->Integer("best_of");
  if (best_of && *best_of != n) {
    fields->Fail(
        FieldError("best_of", absl::StrCat(*best_of, " is not supported; allowed: n (", n, ")")));
  }
  const std::optional<std::string> suffix = fields->String("suffix");
  if (suffix && !suffix->empty()) fields->Fail(FieldError("suffix", "not supported"));
  fields->Identifier("user");
}

ClientSampling ReadSampling(FieldReader* fields) {
  ClientSampling out;
  ReadMaxTokens(fields, &out);
  out.temperature = fields->Real("temperature");
  out.top_p = fields->Real("top_p");
  out.min_p = fields->Real("min_p");
  out.top_k = fields->Integer("top_k");
  // Clients of other servers write "off" so.
  if (out.top_k == -1) out.top_k = 0;
  out.repetition_penalty = fields->Real("repetition_penalty");
  out.presence_penalty = fields->Real("presence_penalty");
  out.frequency_penalty = fields->Real("frequency_penalty");
  out.seed = fields->Integer("seed");
  ReadLogitBias(fields, &out);
  ReadStop(fields, &out);
  out.stop_token_ids = fields->Integers("stop_token_ids");
  out.min_tokens = fields->Integer("min_tokens");
  out.n = fields->Integer("n");
  out.prompt_logprobs = fields->Integer("prompt_logprobs");
  out.ignore_eos = fields->Bool("ignore_eos");
  out.include_stop_str_in_output = fields->Bool("include_stop_str_in_output");
  out.skip_special_tokens = fields->Bool("skip_special_tokens");
  return out;
}

}  // namespace

void ReadCommon(FieldReader* fields, ClientRequest* client, CompletionRequest* out) {
  client->model = fields->Identifier("model").value_or("");
  client->sampling = ReadSampling(fields);
  client->add_special_tokens = fields->Bool("add_special_tokens");
  if (const std::optional<int64_t> priority = fields->Integer("priority")) {
    if (*priority < std::numeric_limits<int32_t>::min() ||
        *priority > std::numeric_limits<int32_t>::max()) {
      fields->Fail(FieldError("priority", absl::StrCat(*priority, " is not a 32-bit number")));
    } else {
      client->priority = static_cast<int32_t>(*priority);
    }
  }
  out->stream = fields->Bool("stream").value_or(false);
  ReadStreamOptions(fields, out);
  out->return_token_ids = fields->Bool("return_token_ids").value_or(false);
  out->return_tokens_as_token_ids = fields->Bool("return_tokens_as_token_ids").value_or(false);
}

absl::StatusOr<CompletionRequest> ReadCompletionRequest(const std::string& text) {
  const absl::StatusOr<Json> body = ParseJson(text);
  if (!body.ok()) return body.status();
  FieldReader fields(*body);
  CompletionRequest out;
  ClientRequest common;
  ReadCommon(&fields, &common, &out);
  common.sampling.logprobs = fields.Integer("logprobs");
  out.echo = fields.Bool("echo").value_or(false);
  const int64_t n = common.sampling.n.value_or(1);
  ReadNeutral(&fields, n);
  const Json* const prompt = fields.Raw("prompt");
  if (absl::Status status = fields.Finish(); !status.ok()) return status;

  absl::StatusOr<std::vector<ClientRequest>> prompts = ReadPrompts(prompt);
  if (!prompts.ok()) return prompts.status();
  out.logprobs = common.sampling.logprobs.has_value();
  out.prompt_logprobs = common.sampling.prompt_logprobs.has_value();
  // Scoring: the prompt's log-probabilities come with the answer's.
  if (out.echo && out.logprobs && !out.prompt_logprobs) {
    common.sampling.prompt_logprobs = common.sampling.logprobs;
  }
  // n itself is judged with the other limits; here only its product is.
  if (n >= 1 && n <= limits::kMaxN) {
    out.n = static_cast<uint32_t>(n);
    if (prompts->size() * out.n > limits::kBatchTimesN) {
      return FieldError("n", absl::StrCat(n, " times ", prompts->size(), " prompts is above ",
                                          limits::kBatchTimesN));
    }
  }
  for (ClientRequest& each : *prompts) {
    auto content = std::move(each.prompt);
    each = common;
    each.prompt = std::move(content);
  }
  out.prompts = *std::move(prompts);
  return out;
}

}  // namespace lockstep
