#include <algorithm>
#include <memory>
#include <optional>
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

constexpr char kRow[] = "%10s  %10s  %10s  %10s  %5s  %14s\n";

std::string Name(const Case& each) { return absl::StrCat(each.count, "x", each.tokens); }

absl::StatusOr<Json> MeasureCase(const Case& each, BenchSession* session) {
  const absl::StatusOr<std::vector<Round>> rounds =
      session->Measure(Name(each), each.count, {each.tokens, 1});
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
  Json object = {{"prompts", each.count},
                 {"tokens", each.tokens},
                 {"ttft_median_ms", Median(medians)},
                 {"ttft_last_ms", last_ms},
                 {"prompt_tokens_per_second", double{1} * each.count * each.tokens / last_ms * 1e3},
                 {"cached_prompt_tokens", cached}};
  if (const std::optional<Floor>& floor = session->target().floor) {
    const double floor_ms = floor->PrefillSeconds(each.count, each.tokens) * 1e3;
    object["floor_ms"] = floor_ms;
    object["ratio"] = last_ms / floor_ms;
  }
  object["runs_ttft_last_ms"] = lasts;
  return object;
}

std::string CaseLine(const Case& each, const Json& object) {
  const auto number = [&](const char* key, const char* format) {
    if (!object.contains(key)) return std::string("-");
    return absl::StrFormat(*absl::ParsedFormat<'f'>::New(format), object[key].get<double>());
  };
  return absl::StrFormat(kRow, Name(each), number("ttft_median_ms", "%.2f"),
                         number("ttft_last_ms", "%.2f"), number("floor_ms", "%.2f"),
                         number("ratio", "%.2f"), number("prompt_tokens_per_second", "%.0f")) +
         CachedLine(object);
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
  const BenchOutput output(flags.bench);
  if (absl::Status begun = output.Begin(); !begun.ok()) return begun;
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

  output.Text(TargetLine(target));
  output.Text(
      absl::StrFormat("milliseconds to the first token; median of %u runs\n\n", flags.bench.runs));
  output.Text(
      absl::StrFormat(kRow, "prompts", "TTFT med", "TTFT last", "floor", "ratio", "prompt tok/s"));
  Json report = {{"bench", "prefill"},
                 {"target", DescribeTarget(flags.bench, target)},
                 {"cases", Json::array()}};
  for (const Case& each : cases) {
    const absl::StatusOr<Json> measured = MeasureCase(each, session->get());
    if (!measured.ok()) return measured.status();
    output.Text(CaseLine(each, *measured));
    report["cases"].push_back(*measured);
    if (absl::Status saved = output.Save(report); !saved.ok()) return saved;
  }
  return output.Finish(report);
}

}  // namespace lockstep
