#include "cli/sampling_flags.h"

#include <utility>

#include "CLI/Config.hpp"
#include "CLI/Formatter.hpp"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "coordinator/text/utf8.h"

namespace lockstep {

void AddSamplingFlags(CLI::App* app, SamplingFlags* flags) {
  flags->app = app;
  const std::string group = "Sampling";
  app->add_option("--max-tokens", flags->max_tokens, "Tokens to generate at most")->group(group);
  app->add_option("--temperature", flags->temperature, "0 is greedy [0, 2]")->group(group);
  app->add_option("--top-p", flags->top_p, "(0, 1]")->group(group);
  app->add_option("--top-k", flags->top_k, "0 is off")->group(group);
  app->add_option("--min-p", flags->min_p, "[0, 1]")->group(group);
  app->add_option("--repetition-penalty", flags->repetition_penalty, "(0, 2]")->group(group);
  app->add_option("--presence-penalty", flags->presence_penalty, "[-2, 2]")->group(group);
  app->add_option("--frequency-penalty", flags->frequency_penalty, "[-2, 2]")->group(group);
  app->add_option("--seed", flags->seed, "Same seed, same answer")->group(group);
  app->add_option("--stop", flags->stop, "A string that ends the answer; repeatable")
      ->group(group)
      ->expected(1)
      ->allow_extra_args(false)  // the prompt may follow
      ->take_all();
  app->add_option("--stop-token-ids", flags->stop_token_ids, "Token ids that end the answer")
      ->group(group)
      ->allow_extra_args(false)
      ->delimiter(',');
  app->add_option("--logit-bias", flags->logit_bias, "ID=VALUE; repeatable")
      ->group(group)
      ->expected(1)
      ->allow_extra_args(false)
      ->take_all();
  app->add_option("--min-tokens", flags->min_tokens, "Tokens before the answer may end")
      ->group(group);
  app->add_option("-n,--n", flags->n, "Answers to the same prompt")->group(group);
  app->add_option("--logprobs", flags->logprobs, "Alternatives to show a token [0, 20]")
      ->group(group);
  app->add_flag("--ignore-eos", flags->ignore_eos, "Go on past the end token")->group(group);
}

absl::StatusOr<v1::SamplingParams> ToProto(const SamplingFlags& flags) {
  v1::SamplingParams params;
  auto given = [&](const char* name) { return flags.app->count(name) > 0; };
  if (given("--max-tokens")) params.set_max_tokens(flags.max_tokens);
  if (given("--temperature")) params.set_temperature(flags.temperature);
  if (given("--top-p")) params.set_top_p(flags.top_p);
  if (given("--top-k")) params.set_top_k(flags.top_k);
  if (given("--min-p")) params.set_min_p(flags.min_p);
  if (given("--repetition-penalty")) params.set_repetition_penalty(flags.repetition_penalty);
  if (given("--presence-penalty")) params.set_presence_penalty(flags.presence_penalty);
  if (given("--frequency-penalty")) params.set_frequency_penalty(flags.frequency_penalty);
  if (given("--seed")) params.set_seed(flags.seed);
  if (given("--min-tokens")) params.set_min_tokens(flags.min_tokens);
  if (given("--n")) params.set_n(flags.n);
  if (given("--logprobs")) params.set_logprobs(flags.logprobs);
  if (flags.ignore_eos) params.set_ignore_eos(true);
  for (const std::string& stop : flags.stop) {
    if (!IsValidUtf8(stop)) return absl::InvalidArgumentError("--stop: not UTF-8");
    params.add_stop(stop);
  }
  for (uint32_t id : flags.stop_token_ids) params.add_stop_token_ids(id);
  for (const std::string& entry : flags.logit_bias) {
    const std::pair<std::string, std::string> parts =
        absl::StrSplit(entry, absl::MaxSplits('=', 1));
    uint32_t id = 0;
    float value = 0;
    if (!absl::SimpleAtoi(parts.first, &id) || !absl::SimpleAtof(parts.second, &value)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--logit-bias: '", entry, "' is not ID=VALUE, as in 42=-1.5"));
    }
    (*params.mutable_logit_bias())[id] = value;
  }
  return params;
}

}  // namespace lockstep
