// A request as it enters the engine: validated, tokenised, with every default
// filled in. Made by coordinator/api, read by admission and the scheduler.
#ifndef LOCKSTEP_COORDINATOR_REQUEST_H_
#define LOCKSTEP_COORDINATOR_REQUEST_H_

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/ids.h"

namespace lockstep {

// Ranges and meanings: the limits table in coordinator/api/limits.h.
struct SamplingParams {
  uint32_t max_tokens = 16;  // 0: only score the prompt
  float temperature = 1.0f;
  float top_p = 1.0f;
  uint32_t top_k = 0;
  float min_p = 0.0f;
  float repetition_penalty = 1.0f;
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  std::optional<int64_t> seed;  // absent: the engine draws one at admission
  std::vector<std::pair<TokenId, float>> logit_bias;
  std::vector<std::string> stop;
  std::vector<TokenId> stop_token_ids;
  uint32_t min_tokens = 0;
  uint32_t n = 1;
  bool ignore_eos = false;
  bool include_stop_str_in_output = false;
  bool skip_special_tokens = true;
  int32_t logprobs = -1;  // alternatives a token; -1: none
  int32_t prompt_logprobs = -1;
};

inline constexpr int64_t kNoDeadline = std::numeric_limits<int64_t>::max();

struct Request {
  RequestId id;                 // given by Engine::Submit
  std::string external_id;      // the client's x-request-id, or ours
  std::vector<TokenId> prompt;  // never empty
  SamplingParams sampling;
  std::vector<TokenId> ending_ids;    // sorted: eos ids unless ignore_eos, and stop_token_ids
  int32_t priority = 0;               // lower runs first; equal: first come
  int64_t arrival_ms = 0;             // on the engine's clock
  int64_t deadline_ms = kNoDeadline;  // on the engine's clock
  // Prefix-cache sharing is within one salt: that of an API key, 0 without keys.
  uint64_t cache_salt = 0;
};

enum class FinishReason {
  kStop,    // an ending token, or (reported by the text stage) a stop string
  kLength,  // max_tokens or max_model_len
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_REQUEST_H_
