#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/bench/bench_session.h"
#include "cli/bench/fixed_benches.h"
#include "cli/bench/statistics.h"

namespace lockstep {
namespace {

using Json = nlohmann::ordered_json;

// One run of one batch size; milliseconds.
struct LatencyRun {
  double step_ms = 0;
  double gap_p99_ms = 0;
  double ttft_median_ms = 0, ttft_last_ms = 0;
  double window_s = 0;  // in which all were running
};

absl::StatusOr<LatencyRun> Evaluate(const Round& round) {
  const TimeWindow window = AllRunning(round.logs);
  std::vector<double> steps, first;
  for (const RequestLog& log : round.logs) {
    first.push_back(log.first_token_s() * 1e3);
    if (const auto step = PerTokenWithin(log, window)) steps.push_back(*step * 1e3);
  }
  if (steps.empty()) {
    return absl::FailedPreconditionError(
        "at no time were all sequences decoding together: raise --output-len");
  }
  LatencyRun run;
  run.step_ms = Median(steps);
  run.gap_p99_ms = Quantile(GapsWithin(round.logs, window), 0.99) * 1e3;
  run.ttft_median_ms = Median(first);
  run.ttft_last_ms = round.last_first_token_s() * 1e3;
  run.window_s = window.seconds();
  return run;
}

template <typename Field>
double MedianOf(const std::vector<LatencyRun>& runs, Field field) {
  std::vector<double> values;
  for (const LatencyRun& run : runs) values.push_back(run.*field);
  return Median(values);
}

// A case's line of the table and object of the JSON.
class Report {
 public:
  Report() {
    table_ = absl::StrFormat(kHead, "batch", "step ms", "p99 gap", "floor", "ratio", "tok/s",
                             "TTFT med", "TTFT last", "client us/tok");
  }

  absl::Status Add(const LatencyFlags& flags, const BenchTarget& target, uint32_t batch,
                   const std::vector<Round>& rounds) {
    std::vector<LatencyRun> runs;
    Json each = Json::array();
    uint64_t cached = 0;
    for (const Round& round : rounds) {
      const absl::StatusOr<LatencyRun> run = Evaluate(round);
      if (!run.ok()) return run.status();
      runs.push_back(*run);
      cached += round.cached_tokens;
      each.push_back({{"step_ms", run->step_ms},
                      {"gap_p99_ms", run->gap_p99_ms},
                      {"ttft_median_ms", run->ttft_median_ms},
                      {"ttft_last_ms", run->ttft_last_ms},
                      {"window_seconds", run->window_s}});
    }
    const double step_ms = MedianOf(runs, &LatencyRun::step_ms);
    const ClientCost cost = CostOf(rounds);
    Json object = {{"batch", batch},
                   {"step_ms", step_ms},
                   {"gap_p99_ms", MedianOf(runs, &LatencyRun::gap_p99_ms)},
                   {"ttft_median_ms", MedianOf(runs, &LatencyRun::ttft_median_ms)},
                   {"ttft_last_ms", MedianOf(runs, &LatencyRun::ttft_last_ms)},
                   {"tokens_per_second", batch * 1e3 / step_ms},
                   {"client_us_per_token", cost.us_per_token},
                   {"client_cores", cost.cores},
                   {"cached_prompt_tokens", cached}};
    std::string floor = "-", ratio = "-";
    if (target.floor) {
      // The context grows while it is measured: its middle.
      const double context = flags.context + flags.output / 2.0;
      const double floor_ms = target.floor->DecodeSeconds(batch, context) * 1e3;
      object["floor_ms"] = floor_ms;
      object["ratio"] = step_ms / floor_ms;
      object["floor_bytes"] = target.floor->DecodeBytes(batch, context);
      floor = absl::StrFormat("%.3f", floor_ms);
      ratio = absl::StrFormat("%.2f", step_ms / floor_ms);
    }
    object["runs"] = each;
    cases_.push_back(object);
    absl::StrAppendFormat(&table_, kHead, absl::StrCat(batch), absl::StrFormat("%.3f", step_ms),
                          absl::StrFormat("%.3f", MedianOf(runs, &LatencyRun::gap_p99_ms)), floor,
                          ratio, absl::StrFormat("%.0f", batch * 1e3 / step_ms),
                          absl::StrFormat("%.1f", MedianOf(runs, &LatencyRun::ttft_median_ms)),
                          absl::StrFormat("%.1f", MedianOf(runs, &LatencyRun::ttft_last_ms)),
                          absl::StrFormat("%.2f", cost.us_per_token));
    if (cached > 0) {
      absl::StrAppendFormat(&table_, "       %d prompt tokens came from the prefix cache\n",
                            cached);
    }
    return absl::OkStatus();
  }

  const std::string& table() const { return table_; }
  const Json& cases() const { return cases_; }

 private:
  static constexpr char kHead[] = "%5s  %9s  %9s  %9s  %5s  %9s  %9s  %9s  %13s\n";
  std::string table_;
  Json cases_ = Json::array();
};

}  // namespace

absl::Status RunLatencyBench(const LatencyFlags& flags) {
  if (flags.output < 3) {
    return absl::InvalidArgumentError("--output-len: a step is between two tokens; 3 at least");
  }
  ServerNeeds needs;
  needs.sequences = *std::max_element(flags.batches.begin(), flags.batches.end());
  needs.requests = needs.sequences;
  needs.tokens = flags.context + flags.output;
  absl::StatusOr<std::unique_ptr<BenchSession>> session = BenchSession::Open(flags.bench, needs);
  if (!session.ok()) return session.status();
  const BenchTarget& target = (*session)->target();
  if (absl::Status fits = CheckNeeds(target.info, needs); !fits.ok()) {
    return absl::Status(fits.code(),
                        absl::StrCat(std::string(fits.message()), ", or lower --batch"));
  }
  Report report;
  for (const uint32_t batch : flags.batches) {
    const absl::StatusOr<std::vector<Round>> rounds =
        (*session)->Measure(absl::StrCat("batch ", batch), batch, {flags.context, flags.output});
    if (!rounds.ok()) return rounds.status();
    if (absl::Status added = report.Add(flags, target, batch, *rounds); !added.ok()) {
      return absl::Status(added.code(),
                          absl::StrCat("batch ", batch, ": ", std::string(added.message())));
    }
  }
  const Json json = {{"bench", "latency"},
                     {"target", DescribeTarget(flags.bench, target)},
                     {"prompt_tokens", flags.context},
                     {"output_tokens", flags.output},
                     {"cases", report.cases()}};
  const std::string head =
      TargetLine(target) +
      absl::StrFormat("decoding at %u to %u tokens of context; median of %u runs\n\n",
                      flags.context, flags.context + flags.output, flags.bench.runs);
  return WriteReport(flags.bench, json, head + report.table());
}

}  // namespace lockstep
