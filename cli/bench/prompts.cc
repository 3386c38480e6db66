#include "cli/bench/prompts.h"

#include <algorithm>
#include <cmath>

namespace lockstep {
namespace {

constexpr double kPromptMedian = 110, kPromptSigma = 1.2;
constexpr double kOutputMedian = 140, kOutputSigma = 0.9;
constexpr double kShortest = 4, kLongest = 1024;

uint32_t LogNormal(double median, double sigma, std::mt19937_64* random) {
  std::lognormal_distribution<double> lengths(std::log(median), sigma);
  return static_cast<uint32_t>(std::clamp(std::round(lengths(*random)), kShortest, kLongest));
}

}  // namespace

Lengths ChatLengths(std::mt19937_64* random, uint32_t max_total) {
  Lengths lengths;
  lengths.prompt = LogNormal(kPromptMedian, kPromptSigma, random);
  lengths.output = LogNormal(kOutputMedian, kOutputSigma, random);
  lengths.prompt = std::clamp(lengths.prompt, 1u, std::max(max_total / 2, 1u));
  lengths.output = std::clamp(lengths.output, 1u, std::max(max_total - lengths.prompt, 1u));
  return lengths;
}

v1::GenerateRequest RandomRequest(const Lengths& lengths, uint32_t vocab_size,
                                  std::mt19937_64* random) {
  std::uniform_int_distribution<uint32_t> tokens(0, std::max(vocab_size, 1u) - 1);
  v1::GenerateRequest request;
  auto* ids = request.mutable_token_ids()->mutable_ids();
  ids->Reserve(static_cast<int>(lengths.prompt));
  for (uint32_t i = 0; i < lengths.prompt; ++i) ids->Add(tokens(*random));
  v1::SamplingParams* sampling = request.mutable_sampling();
  sampling->set_max_tokens(lengths.output);
  sampling->set_temperature(0);
  sampling->set_ignore_eos(true);
  return request;
}

std::vector<v1::GenerateRequest> RandomRequests(int64_t count, const Lengths& lengths,
                                                uint32_t vocab_size, std::mt19937_64* random) {
  std::vector<v1::GenerateRequest> requests;
  requests.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    requests.push_back(RandomRequest(lengths, vocab_size, random));
  }
  return requests;
}

}  // namespace lockstep
