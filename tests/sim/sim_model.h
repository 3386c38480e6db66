// What the simulated model answers: the next token and every log-probability
// are functions of all known tokens (and the seed), so that a lost, doubled or
// misplaced token anywhere changes all that follows. It is also the oracle: what
// a run without any fault would say.
#ifndef LOCKSTEP_TESTS_SIM_SIM_MODEL_H_
#define LOCKSTEP_TESTS_SIM_SIM_MODEL_H_

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "common/ids.h"

namespace lockstep::sim {

inline constexpr TokenId kVocab = 48;

inline uint64_t Mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ (value + 0x9e3779b97f4a7c15u)) * 0xff51afd7ed558ccdu;
  return hash ^ (hash >> 32);
}

inline uint64_t HashTokens(std::span<const TokenId> tokens, uint64_t hash = 1) {
  for (const TokenId token : tokens) hash = Mix(hash, token);
  return hash;
}

inline TokenId NextToken(uint64_t prefix_hash, int64_t seed) {
  return static_cast<TokenId>(Mix(prefix_hash, static_cast<uint64_t>(seed)) % kVocab);
}

// Stands in TokenLogprobs::rank of the token that follows the prefix.
inline uint32_t ScoreOf(uint64_t prefix_hash, TokenId token) {
  return static_cast<uint32_t>(Mix(Mix(prefix_hash, 77), token));
}

// As NextToken, with ending tokens masked away (min_tokens).
inline TokenId NextToken(uint64_t prefix_hash, int64_t seed, const std::vector<TokenId>& masked) {
  TokenId token = NextToken(prefix_hash, seed);
  while (std::find(masked.begin(), masked.end(), token) != masked.end()) {
    token = (token + 1) % kVocab;
  }
  return token;
}

}  // namespace lockstep::sim

#endif  // LOCKSTEP_TESTS_SIM_SIM_MODEL_H_
