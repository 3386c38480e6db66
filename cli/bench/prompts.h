// Requests with random prompts of token ids: no two alike, so that no prefix
// cache can help, and answers of a set length.
#ifndef LOCKSTEP_CLI_BENCH_PROMPTS_H_
#define LOCKSTEP_CLI_BENCH_PROMPTS_H_

#include <cstdint>
#include <random>
#include <vector>

#include "proto/inference.pb.h"

namespace lockstep {

struct Lengths {
  uint32_t prompt = 0, output = 0;  // tokens
};

// The lengths of people's conversations, roughly those of the ShareGPT set as
// serving benchmarks use it: log-normal, prompts of median 110 (sigma 1.2), answers
// of median 140 (sigma 0.9), between 4 and 1024 tokens, which leaves means of 201
// and 204; prompt and answer together at most max_total.
Lengths ChatLengths(std::mt19937_64* random, uint32_t max_total);

// Greedy, past ending tokens: exactly `lengths.output` tokens come.
v1::GenerateRequest RandomRequest(const Lengths& lengths, uint32_t vocab_size,
                                  std::mt19937_64* random);
std::vector<v1::GenerateRequest> RandomRequests(int64_t count, const Lengths& lengths,
                                                uint32_t vocab_size, std::mt19937_64* random);

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_BENCH_PROMPTS_H_
