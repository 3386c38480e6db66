#include "cli/compare/compare_figures.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_format.h"
#include "cli/bench/statistics.h"

namespace lockstep {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kListed = 10;  // disagreements in the table

const double* Find(const PositionView& view, uint32_t token) {
  for (const auto& [id, logprob] : view.top) {
    if (id == token) return &logprob;
  }
  return nullptr;
}

// Tokens that agree before the answers part; -1 when they never do.
int64_t Divergence(const std::vector<uint32_t>& a, const std::vector<uint32_t>& b) {
  const auto [in_a, in_b] = std::mismatch(a.begin(), a.end(), b.begin(), b.end());
  return in_a == a.end() && in_b == b.end() ? -1 : in_a - a.begin();
}

class Gatherer {
 public:
  void Add(const ComparedPrompt& prompt) {
    ++figures_.prompts;
    const int64_t divergence = Divergence(prompt.tokens_a, prompt.tokens_b);
    figures_.divergences.push_back(divergence);
    if (divergence < 0) ++figures_.same_answers;
    const size_t positions = std::min(prompt.view_a.size(), prompt.view_b.size());
    for (size_t i = 0; i < positions; ++i) AddPosition(prompt, i);
  }

  CompareFigures Finish() {
    figures_.mean_error = Mean(errors_);
    figures_.p99_error = Quantile(errors_, 0.99);
    return std::move(figures_);
  }

 private:
  void AddPosition(const ComparedPrompt& prompt, size_t i) {
    const PositionView& a = prompt.view_a[i];
    const PositionView& b = prompt.view_b[i];
    ++figures_.positions;
    Note(prompt, i, std::abs(a.chosen - b.chosen));
    for (const auto& [token, logprob] : a.top) {
      if (const double* other = Find(b, token)) Note(prompt, i, std::abs(logprob - *other));
    }
    if (a.top.empty() || b.top.empty()) return;
    const uint32_t token_a = a.top.front().first, token_b = b.top.front().first;
    if (token_a == token_b) {
      ++figures_.same_next;
      return;
    }
    const double* const in_a = Find(a, token_b);
    const double reached = in_a != nullptr ? *in_a : a.top.back().second;
    figures_.disagreements.push_back(
        {prompt.name, i, token_a, token_b, a.top.front().second - reached});
  }

  void Note(const ComparedPrompt& prompt, size_t i, double error) {
    errors_.push_back(error);
    // A NaN is the worst error there is, and stays it.
    if (!(error <= figures_.max_error) && !std::isnan(figures_.max_error)) {
      figures_.max_error = error;
      figures_.worst_prompt = prompt.name;
      figures_.worst_position = i;
    }
  }

  CompareFigures figures_;
  std::vector<double> errors_;
};

double Percent(int64_t part, int64_t whole) {
  return whole == 0 ? 0 : 100.0 * static_cast<double>(part) / static_cast<double>(whole);
}

}  // namespace

std::optional<int64_t> CompareFigures::earliest_divergence() const {
  std::optional<int64_t> earliest;
  for (const int64_t divergence : divergences) {
    if (divergence >= 0 && (!earliest || divergence < *earliest)) earliest = divergence;
  }
  return earliest;
}

double CompareFigures::largest_gap() const {
  double largest = 0;
  for (const Disagreement& each : disagreements) largest = std::max(largest, each.gap);
  return largest;
}

CompareFigures Compare(const std::vector<ComparedPrompt>& prompts) {
  Gatherer gatherer;
  for (const ComparedPrompt& prompt : prompts) gatherer.Add(prompt);
  return gatherer.Finish();
}

Json ToJson(const CompareFigures& f) {
  Json disagreements = Json::array();
  for (const Disagreement& each : f.disagreements) {
    disagreements.push_back({{"prompt", each.prompt},
                             {"position", each.position},
                             {"token_a", each.token_a},
                             {"token_b", each.token_b},
                             {"gap", each.gap}});
  }
  Json earliest = nullptr;
  if (const auto value = f.earliest_divergence()) earliest = *value;
  return {{"prompts", f.prompts},
          {"positions", f.positions},
          {"same_answers", f.same_answers},
          {"divergences", f.divergences},
          {"earliest_divergence", earliest},
          {"same_next_token", f.same_next},
          {"max_logprob_error", f.max_error},
          {"mean_logprob_error", f.mean_error},
          {"p99_logprob_error", f.p99_error},
          {"worst_prompt", f.worst_prompt},
          {"worst_position", f.worst_position},
          {"largest_gap_at_disagreement", f.largest_gap()},
          {"disagreements", disagreements}};
}

std::string ToTable(const CompareFigures& f) {
  std::string table =
      absl::StrFormat("same answers         %d of %d prompts (%.1f %%)\n", f.same_answers,
                      f.prompts, Percent(f.same_answers, f.prompts));
  if (const auto earliest = f.earliest_divergence()) {
    absl::StrAppendFormat(&table, "first divergence     after %d tokens\n", *earliest);
  }
  absl::StrAppendFormat(&table,
                        "same next token      %d of %d positions (%.2f %%), given A's text\n",
                        f.same_next, f.positions, Percent(f.same_next, f.positions));
  absl::StrAppendFormat(&table, "logprob error        max %.3g, p99 %.3g, mean %.3g\n", f.max_error,
                        f.p99_error, f.mean_error);
  if (f.max_error != 0) {
    absl::StrAppendFormat(&table, "largest error at     %s, token %d\n", f.worst_prompt,
                          f.worst_position);
  }
  if (f.disagreements.empty()) return table;
  absl::StrAppendFormat(&table,
                        "largest gap          %.3g, of A's choice over B's where they differ\n",
                        f.largest_gap());
  absl::StrAppendFormat(&table, "\n%-16s %8s %9s %9s %9s\n", "prompt", "token", "A's", "B's",
                        "gap");
  for (size_t i = 0; i < std::min(f.disagreements.size(), kListed); ++i) {
    const Disagreement& each = f.disagreements[i];
    absl::StrAppendFormat(&table, "%-16s %8d %9d %9d %9.3g\n", each.prompt, each.position,
                          each.token_a, each.token_b, each.gap);
  }
  if (f.disagreements.size() > kListed) {
    absl::StrAppendFormat(&table, "and %d more\n", f.disagreements.size() - kListed);
  }
  return table;
}

}  // namespace lockstep
