#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "cli/bench/bench_session.h"
#include "cli/bench/fixed_benches.h"
#include "cli/bench/statistics.h"

namespace lockstep {
namespace {

using Json = nlohmann::ordered_json;

struct Case {
  uint32_t count = 0, tokens = 0;
};

absl::StatusOr<Case> ParseCase(const std::string& text) {
  const std::vector<std::string> parts = absl::StrSplit(text, 'x');
  Case result;
  if (parts.size() == 2 && absl::SimpleAtoi(parts[0], &result.count) &&
      absl::SimpleAtoi(parts[1], &result.tokens) && result.count > 0 && result.tokens > 0) {
    return result;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("--prompts: \"", text, "\" is not prompts x tokens, as in 64x1024"));
}

}  // namespace

absl::Status RunPrefillBench(const PrefillFlags& flags) {
  std::vector<Case> cases;
  ServerNeeds needs;
  for (const std::string& text : flags.cases) {
    const absl::StatusOr<Case> parsed = ParseCase(text);
    if (!parsed.ok()) return parsed.status();
    cases.push_back(*parsed);
    needs.sequences = std::max(needs.sequences, parsed->count);
    needs.tokens = std::max(needs.tokens, parsed->tokens + 1);
  }
  needs.requests = needs.sequences;
  absl::StatusOr<std::unique_ptr<BenchSession>> session = BenchSession::Open(flags.bench, needs);
  if (!session.ok()) return session.status();
  const BenchTarget& target = (*session)->target();
  for (const Case& each : cases) {
    absl::Status fits = CheckNeeds(target.info, {each.count, each.count, each.tokens + 1});
    if (!fits.ok()) {
      return absl::Status(fits.code(),
                          absl::StrCat(std::string(fits.message()), ", or lower --prompts"));
    }
  }

  constexpr char kRow[] = "%10s  %10s  %10s  %10s  %5s  %14s\n";
  std::string table =
      absl::StrFormat(kRow, "prompts", "TTFT med", "TTFT last", "floor", "ratio", "prompt tok/s");
  Json results = Json::array();
  for (const Case& each : cases) {
    const std::string name = absl::StrCat(each.count, "x", each.tokens);
    const absl::StatusOr<std::vector<Round>> rounds =
        (*session)->Measure(name, each.count, {each.tokens, 1});
    if (!rounds.ok()) return rounds.status();
    std::vector<double> medians, lasts;
    uint64_t cached = 0;
    for (const Round& round : *rounds) {
      std::vector<double> first;
      for (const RequestLog& log : round.logs) first.push_back(log.first_token_s() * 1e3);
      medians.push_back(Median(first));
      lasts.push_back(round.last_first_token_s() * 1e3);
      cached += round.cached_tokens;
    }
    const double last_ms = Median(lasts);
    const double rate = each.count * each.tokens / (last_ms * 1e-3);
    Json object = {{"prompts", each.count},
                   {"tokens", each.tokens},
                   {"ttft_median_ms", Median(medians)},
                   {"ttft_last_ms", last_ms},
                   {"prompt_tokens_per_second", rate},
                   {"cached_prompt_tokens", cached}};
    std::string floor = "-", ratio = "-";
    if (target.floor) {
      const double floor_ms = target.floor->PrefillSeconds(each.count, each.tokens) * 1e3;
      object["floor_ms"] = floor_ms;
      object["ratio"] = last_ms / floor_ms;
      floor = absl::StrFormat("%.2f", floor_ms);
      ratio = absl::StrFormat("%.2f", last_ms / floor_ms);
    }
    object["runs_ttft_last_ms"] = lasts;
    results.push_back(object);
    absl::StrAppendFormat(&table, kRow, name, absl::StrFormat("%.2f", Median(medians)),
                          absl::StrFormat("%.2f", last_ms), floor, ratio,
                          absl::StrFormat("%.0f", rate));
    if (cached > 0) {
      absl::StrAppendFormat(&table, "       %d prompt tokens came from the prefix cache\n", cached);
    }
  }
  const Json json = {
      {"bench", "prefill"}, {"target", DescribeTarget(flags.bench, target)}, {"cases", results}};
  const std::string head =
      TargetLine(target) +
      absl::StrFormat("milliseconds to the first token; median of %u runs\n\n", flags.bench.runs);
  return WriteReport(flags.bench, json, head + table);
}

}  // namespace lockstep
