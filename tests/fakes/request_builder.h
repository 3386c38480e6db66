// Builds requests for tests of the scheduler: what a test does not say does not
// matter to it.
//
//   RequestBuilder(1).Prompt(20).MaxTokens(5).Build()
//   RequestBuilder(2).Tokens({1, 2, 3}).N(4).Priority(-1).Build()
#ifndef LOCKSTEP_TESTS_FAKES_REQUEST_BUILDER_H_
#define LOCKSTEP_TESTS_FAKES_REQUEST_BUILDER_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "coordinator/request.h"

namespace lockstep {

class RequestBuilder {
 public:
  explicit RequestBuilder(uint64_t id) {
    request_.id = RequestId(id);
    request_.external_id = "r" + std::to_string(id);
    request_.sampling.seed = static_cast<int64_t>(id) * 1'000;
    request_.sampling.max_tokens = 4;
    Prompt(4);
  }

  // `length` tokens that no other request's prompt begins with.
  RequestBuilder& Prompt(uint32_t length) {
    request_.prompt.clear();
    for (uint32_t i = 0; i < length; ++i) {
      request_.prompt.push_back(static_cast<TokenId>((request_.id.value * 131 + i) % 900));
    }
    return *this;
  }
  RequestBuilder& Tokens(std::vector<TokenId> tokens) {
    request_.prompt = std::move(tokens);
    return *this;
  }
  RequestBuilder& MaxTokens(uint32_t n) { return request_.sampling.max_tokens = n, *this; }
  RequestBuilder& MinTokens(uint32_t n) { return request_.sampling.min_tokens = n, *this; }
  RequestBuilder& N(uint32_t n) { return request_.sampling.n = n, *this; }
  RequestBuilder& Seed(int64_t seed) { return request_.sampling.seed = seed, *this; }
  RequestBuilder& Logprobs(int32_t k) { return request_.sampling.logprobs = k, *this; }
  RequestBuilder& PromptLogprobs(int32_t k) { return request_.sampling.prompt_logprobs = k, *this; }
  RequestBuilder& EndsWith(std::vector<TokenId> sorted_ids) {
    request_.ending_ids = std::move(sorted_ids);
    return *this;
  }
  RequestBuilder& Priority(int32_t p) { return request_.priority = p, *this; }
  RequestBuilder& Deadline(int64_t ms) { return request_.deadline_ms = ms, *this; }
  RequestBuilder& Salt(uint64_t salt) { return request_.cache_salt = salt, *this; }

  Request Build() const { return request_; }

 private:
  Request request_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_FAKES_REQUEST_BUILDER_H_
