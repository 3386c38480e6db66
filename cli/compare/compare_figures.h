// How far two configurations of a model are apart, from what each said about
// the same tokens. Pure.
//
// Two questions, kept apart:
//   given A's text    B scores A's own tokens, position by position, so that one
//                     early difference does not make all that follows differ:
//                     errors of log-probabilities, agreement on the next token
//   left to itself    B answers the prompt alone: where the answers part
#ifndef LOCKSTEP_CLI_COMPARE_COMPARE_FIGURES_H_
#define LOCKSTEP_CLI_COMPARE_COMPARE_FIGURES_H_

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "nlohmann/json.hpp"

namespace lockstep {

// A configuration's view of one position: its most likely tokens, most likely
// first, and the log-probability of the token that stands there.
struct PositionView {
  std::vector<std::pair<uint32_t, double>> top;
  double chosen = 0;
};

struct ComparedPrompt {
  std::string name;
  std::vector<uint32_t> tokens_a, tokens_b;  // greedy answers, each left to itself
  std::vector<PositionView> view_a, view_b;  // of tokens_a; equally long
};

// Where B would have gone on otherwise than A.
struct Disagreement {
  std::string prompt;
  size_t position = 0;  // in A's answer
  uint32_t token_a = 0, token_b = 0;
  double gap = 0;  // A's log-probability of its own choice less that of B's (or of its last listed)
};

struct CompareFigures {
  int64_t prompts = 0, positions = 0;
  int64_t same_answers = 0;
  std::vector<int64_t> divergences;  // a prompt: tokens that agree before the answers part, or -1
  int64_t same_next = 0;             // positions where both have the same most likely token
  // Of log-probabilities, over the tokens that both listed.
  double max_error = 0, mean_error = 0, p99_error = 0;
  std::string worst_prompt;  // where max_error is
  size_t worst_position = 0;
  std::vector<Disagreement> disagreements;

  std::optional<int64_t> earliest_divergence() const;
  double largest_gap() const;  // of the disagreements; 0 without any
};

CompareFigures Compare(const std::vector<ComparedPrompt>& prompts);

nlohmann::ordered_json ToJson(const CompareFigures& figures);
std::string ToTable(const CompareFigures& figures);

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_COMPARE_COMPARE_FIGURES_H_
