// Two runs' likeliest next tokens beside each other.
#ifndef LOCKSTEP_TESTS_INTEGRATION_CLOSE_TOKENS_H_
#define LOCKSTEP_TESTS_INTEGRATION_CLOSE_TOKENS_H_

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <vector>

#include "gtest/gtest.h"
#include "proto/inference.pb.h"

namespace lockstep {

struct Closeness {
  double worst = 0;  // difference of a log-probability that both runs tell
  int least_common = std::numeric_limits<int>::max();  // of a position
};

// Expects log-probabilities to differ by less than `bound`, and a token to be another one only
// where the wanted run's first two are closer to each other than that.
inline Closeness ExpectCloseTokens(const std::vector<v1::TokenLogprobs>& wanted,
                                   const std::vector<v1::TokenLogprobs>& got, double bound) {
  Closeness closeness;
  EXPECT_EQ(got.size(), wanted.size());
  for (size_t i = 0; i < std::min(got.size(), wanted.size()); ++i) {
    std::map<uint32_t, double> by_id;
    for (const v1::Logprob& each : wanted[i].top()) by_id[each.token_id()] = each.logprob();
    int common = 0;
    for (const v1::Logprob& each : got[i].top()) {
      const auto same = by_id.find(each.token_id());
      if (same == by_id.end()) continue;
      ++common;
      closeness.worst = std::max(closeness.worst, std::abs(same->second - double{each.logprob()}));
    }
    closeness.least_common = std::min(closeness.least_common, common);
    if (got[i].chosen().token_id() == wanted[i].chosen().token_id()) continue;
    EXPECT_LT(wanted[i].top(0).logprob() - wanted[i].top(1).logprob(), bound)
        << "position " << i << ": another token, and it was not close";
  }
  EXPECT_LT(closeness.worst, bound);
  return closeness;
}

// The tokens of an answer as far as they are the other's, and the first that is not: what comes
// behind it is of another text.
inline std::vector<v1::TokenLogprobs> UpToDifference(const v1::Completion& of,
                                                     const v1::Completion& other) {
  std::vector<v1::TokenLogprobs> tokens;
  for (int i = 0; i < std::min(of.logprobs_size(), other.logprobs_size()); ++i) {
    tokens.push_back(of.logprobs(i));
    if (of.token_ids(i) != other.token_ids(i)) break;
  }
  return tokens;
}

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_INTEGRATION_CLOSE_TOKENS_H_
