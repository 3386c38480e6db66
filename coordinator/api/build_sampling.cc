// The limits table applied to one request's sampling fields.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/api/api_error.h"
#include "coordinator/api/client_request.h"
#include "coordinator/api/limits.h"
#include "coordinator/text/utf8.h"

namespace lockstep {
namespace {

constexpr int64_t kMaxUint32 = std::numeric_limits<uint32_t>::max();

struct Range {
  double low, high;
  bool open_low = false;  // low itself is refused

  std::string Text() const { return absl::StrCat(open_low ? "(" : "[", low, ", ", high, "]"); }
};

absl::Status OutOfRange(std::string_view field, const std::string& value, const char* relation,
                        double limit, const Range& range) {
  return FieldError(field,
                    absl::StrCat(value, " is ", relation, " ", limit, "; allowed: ", range.Text()));
}

absl::Status CheckReal(std::string_view field, double value, const Range& range) {
  if (!std::isfinite(value)) {
    return FieldError(field, absl::StrCat("not a finite number; allowed: ", range.Text()));
  }
  if (value > range.high) {
    return OutOfRange(field, absl::StrCat(value), "above", range.high, range);
  }
  if (value < range.low) return OutOfRange(field, absl::StrCat(value), "below", range.low, range);
  // Judged as the float that the sampler will see: 1e-60 is zero there.
  if (range.open_low && !(static_cast<float>(value) > static_cast<float>(range.low))) {
    return FieldError(
        field, absl::StrCat(value, " is not above ", range.low, "; allowed: ", range.Text()));
  }
  return absl::OkStatus();
}

absl::Status SetReal(std::string_view field, const std::optional<double>& value, const Range& range,
                     float* out) {
  if (!value) return absl::OkStatus();
  if (absl::Status status = CheckReal(field, *value, range); !status.ok()) return status;
  *out = static_cast<float>(*value);
  return absl::OkStatus();
}

template <typename Int>
absl::Status SetInteger(std::string_view field, const std::optional<int64_t>& value, int64_t low,
                        int64_t high, Int* out) {
  if (!value) return absl::OkStatus();
  if (*value < low || *value > high) {
    return FieldError(
        field, absl::StrCat(*value, *value < low ? " is below " : " is above ",
                            *value < low ? low : high, "; allowed: [", low, ", ", high, "]"));
  }
  *out = static_cast<Int>(*value);
  return absl::OkStatus();
}

absl::Status SetStops(const ClientSampling& in, SamplingParams* out) {
  if (in.stop.size() > limits::kStopStrings) {
    return FieldError(
        "stop",
        absl::StrCat(in.stop.size(), " strings are too many; allowed: ", limits::kStopStrings));
  }
  for (size_t i = 0; i < in.stop.size(); ++i) {
    const std::string& stop = in.stop[i];
    if (stop.empty()) return FieldError("stop", absl::StrCat("string ", i, " is empty"));
    if (stop.size() > limits::kStopStringBytes) {
      return FieldError("stop", absl::StrCat("string ", i, " has ", stop.size(),
                                             " bytes; allowed: ", limits::kStopStringBytes));
    }
    if (!IsValidUtf8(stop)) {
      return FieldError("stop", absl::StrCat("string ", i, " is not UTF-8"));
    }
  }
  out->stop = in.stop;
  return absl::OkStatus();
}

absl::Status CheckTokenId(std::string_view field, int64_t id, uint32_t vocab_size) {
  if (id >= 0 && id < static_cast<int64_t>(vocab_size)) return absl::OkStatus();
  return FieldError(field, absl::StrCat("token id ", id, " is not in the vocabulary; allowed: [0, ",
                                        vocab_size, ")"));
}

absl::Status SetTokenLists(const ClientSampling& in, uint32_t vocab_size, SamplingParams* out) {
  if (in.stop_token_ids.size() > limits::kStopTokenIds) {
    return FieldError("stop_token_ids",
                      absl::StrCat(in.stop_token_ids.size(),
                                   " ids are too many; allowed: ", limits::kStopTokenIds));
  }
  if (in.logit_bias.size() > limits::kLogitBiasEntries) {
    return FieldError("logit_bias",
                      absl::StrCat(in.logit_bias.size(),
                                   " entries are too many; allowed: ", limits::kLogitBiasEntries));
  }
  for (const int64_t id : in.stop_token_ids) {
    absl::Status status = CheckTokenId("stop_token_ids", id, vocab_size);
    if (!status.ok()) return status;
    out->stop_token_ids.push_back(static_cast<TokenId>(id));
  }
  const Range range{-limits::kLogitBias, limits::kLogitBias};
  for (const auto& [id, bias] : in.logit_bias) {
    absl::Status status = CheckTokenId("logit_bias", id, vocab_size);
    if (status.ok()) status = CheckReal("logit_bias", bias, range);
    if (!status.ok()) return status;
    out->logit_bias.emplace_back(static_cast<TokenId>(id), static_cast<float>(bias));
  }
  std::sort(out->logit_bias.begin(), out->logit_bias.end());
  const auto same_id = [](const auto& a, const auto& b) { return a.first == b.first; };
  const auto twice = std::adjacent_find(out->logit_bias.begin(), out->logit_bias.end(), same_id);
  if (twice != out->logit_bias.end()) {
    return FieldError("logit_bias", absl::StrCat("token id ", twice->first, " appears twice"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<SamplingParams> BuildSampling(const ClientSampling& in, uint32_t vocab_size) {
  SamplingParams out;
  const Range penalty{-limits::kPenalty, limits::kPenalty};
  absl::Status status;
  const auto real = [&](const char* field, const std::optional<double>& value, const Range& range,
                        float* to) {
    if (status.ok()) status = SetReal(field, value, range, to);
  };
  const auto integer = [&](const char* field, const std::optional<int64_t>& value, int64_t low,
                           int64_t high, auto* to) {
    if (status.ok()) status = SetInteger(field, value, low, high, to);
  };
  real("temperature", in.temperature, {0, limits::kTemperature}, &out.temperature);
  real("top_p", in.top_p, {0, limits::kTopP, true}, &out.top_p);
  real("min_p", in.min_p, {0, limits::kMinP}, &out.min_p);
  real("repetition_penalty", in.repetition_penalty, {0, limits::kRepetitionPenalty, true},
       &out.repetition_penalty);
  real("presence_penalty", in.presence_penalty, penalty, &out.presence_penalty);
  real("frequency_penalty", in.frequency_penalty, penalty, &out.frequency_penalty);
  integer("top_k", in.top_k, 0, kMaxUint32, &out.top_k);
  integer(in.max_tokens_field, in.max_tokens, 0, kMaxUint32, &out.max_tokens);
  integer("min_tokens", in.min_tokens, 0, kMaxUint32, &out.min_tokens);
  integer("n", in.n, 1, limits::kMaxN, &out.n);
  integer(in.logprobs_field, in.logprobs, 0, limits::kLogprobs, &out.logprobs);
  integer("prompt_logprobs", in.prompt_logprobs, 0, limits::kLogprobs, &out.prompt_logprobs);
  if (status.ok()) status = SetStops(in, &out);
  if (status.ok()) status = SetTokenLists(in, vocab_size, &out);
  if (!status.ok()) return status;
  // Of any two so small the effect is the same, and the workers take none smaller.
  out.repetition_penalty = std::max(out.repetition_penalty, kMinRepetitionPenalty);
  // As many as there are is the same as no limit, and cheaper.
  if (out.top_k >= vocab_size) out.top_k = 0;
  out.seed = in.seed;
  out.ignore_eos = in.ignore_eos.value_or(false);
  out.include_stop_str_in_output = in.include_stop_str_in_output.value_or(false);
  out.skip_special_tokens = in.skip_special_tokens.value_or(true);
  return out;
}

}  // namespace lockstep
