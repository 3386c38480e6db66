// The sampling parameters as flags, the same for `generate` and `chat`.
#ifndef LOCKSTEP_CLI_SAMPLING_FLAGS_H_
#define LOCKSTEP_CLI_SAMPLING_FLAGS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "CLI/App.hpp"
#include "absl/status/statusor.h"
#include "proto/inference.pb.h"

namespace lockstep {

struct SamplingFlags {
  uint32_t max_tokens = 0, top_k = 0, min_tokens = 0, n = 0, logprobs = 0;
  float temperature = 0, top_p = 0, min_p = 0;
  float repetition_penalty = 0, presence_penalty = 0, frequency_penalty = 0;
  int64_t seed = 0;
  bool ignore_eos = false;
  std::vector<std::string> stop, logit_bias;
  std::vector<uint32_t> stop_token_ids;
  CLI::App* app = nullptr;
};

// Flags that are not given stay absent in the request: the server's defaults hold.
void AddSamplingFlags(CLI::App* app, SamplingFlags* flags);

// InvalidArgument naming the flag when --logit-bias is not ID=VALUE or --stop no UTF-8.
absl::StatusOr<v1::SamplingParams> ToProto(const SamplingFlags& flags);

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_SAMPLING_FLAGS_H_
