#include "tests/fuzz/fuzz_model.h"

#include <algorithm>
#include <string>

#include "common/check.h"
#include "coordinator/api/limits.h"
#include "coordinator/text/utf8.h"

namespace lockstep::fuzz {
namespace {

ServedModel Load() {
  const std::string dir = std::string(LOCKSTEP_SOURCE_DIR) + "/deploy/demo/model";
  const auto config = LoadModelConfig(dir);
  LOCKSTEP_CHECK(config.ok());
  auto model = LoadServedModel(dir, *config, "demo");
  LOCKSTEP_CHECK(model.ok());
  model->max_model_len = 64;
  return *std::move(model);
}

bool Within(float value, float low, float high) { return value >= low && value <= high; }

}  // namespace

const ServedModel& Model() {
  static const ServedModel& model = *new ServedModel(Load());
  return model;
}

void RequireServable(const Request& request) {
  const ServedModel& model = Model();
  const SamplingParams& s = request.sampling;
  const auto known = [&](TokenId id) { return id < model.vocab_size; };

  LOCKSTEP_CHECK(!request.prompt.empty());
  LOCKSTEP_CHECK(std::all_of(request.prompt.begin(), request.prompt.end(), known));
  LOCKSTEP_CHECK(request.prompt.size() + s.max_tokens <= model.max_model_len);
  LOCKSTEP_CHECK(s.min_tokens <= s.max_tokens);
  LOCKSTEP_CHECK(!request.external_id.empty() &&
                 request.external_id.size() <= limits::kIdentifierBytes);

  LOCKSTEP_CHECK(Within(s.temperature, 0, limits::kTemperature));
  LOCKSTEP_CHECK(Within(s.top_p, 0, limits::kTopP) && s.top_p > 0);
  LOCKSTEP_CHECK(Within(s.min_p, 0, limits::kMinP));
  LOCKSTEP_CHECK(Within(s.repetition_penalty, 0, limits::kRepetitionPenalty) &&
                 s.repetition_penalty > 0);
  LOCKSTEP_CHECK(Within(s.presence_penalty, -limits::kPenalty, limits::kPenalty));
  LOCKSTEP_CHECK(Within(s.frequency_penalty, -limits::kPenalty, limits::kPenalty));
  LOCKSTEP_CHECK(s.n >= 1 && s.n <= limits::kMaxN);
  LOCKSTEP_CHECK(s.logprobs >= -1 && s.logprobs <= limits::kLogprobs);
  LOCKSTEP_CHECK(s.prompt_logprobs >= -1 && s.prompt_logprobs <= limits::kLogprobs);

  LOCKSTEP_CHECK(s.stop.size() <= limits::kStopStrings);
  for (const std::string& stop : s.stop) {
    LOCKSTEP_CHECK(!stop.empty() && stop.size() <= limits::kStopStringBytes && IsValidUtf8(stop));
  }
  LOCKSTEP_CHECK(s.stop_token_ids.size() <= limits::kStopTokenIds);
  LOCKSTEP_CHECK(std::all_of(request.ending_ids.begin(), request.ending_ids.end(), known));
  LOCKSTEP_CHECK(std::is_sorted(request.ending_ids.begin(), request.ending_ids.end()));
  LOCKSTEP_CHECK(s.logit_bias.size() <= limits::kLogitBiasEntries);
  for (const auto& [id, bias] : s.logit_bias) {
    LOCKSTEP_CHECK(known(id) && Within(bias, -limits::kLogitBias, limits::kLogitBias));
  }
}

}  // namespace lockstep::fuzz
