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
  values.reserve(runs.size());
  for (const LatencyRun& run : runs) values.push_back(run.*field);
  return Median(values);
}

constexpr char kRow[] = "%5s  %9s  %9s  %9s  %5s  %9s  %9s  %9s  %13s\n";

Json RunsJson(const std::vector<LatencyRun>& runs) {
  Json each = Json::array();
  for (const LatencyRun& run : runs) {
    each.push_back({{"step_ms", run.step_ms},
                    {"gap_p99_ms", run.gap_p99_ms},
                    {"ttft_median_ms", run.ttft_median_ms},
                    {"ttft_last_ms", run.ttft_last_ms},
                    {"window_seconds", run.window_s}});
  }
  return each;
}

// What the runs of one batch size say.
Json Case(const LatencyFlags& flags, const BenchTarget& target, uint32_t batch,
          const std::vector<LatencyRun>& runs, const std::vector<Round>& rounds) {
  const double step_ms = MedianOf(runs, &LatencyRun::step_ms);
  const ClientCost cost = CostOf(rounds);
  uint64_t cached = 0;
  for (const Round& round : rounds) cached += round.cached_tokens;
  Json object = {{"batch", batch},
                 {"step_ms", step_ms},
                 {"gap_p99_ms", MedianOf(runs, &LatencyRun::gap_p99_ms)},
                 {"ttft_median_ms", MedianOf(runs, &LatencyRun::ttft_median_ms)},
                 {"ttft_last_ms", MedianOf(runs, &LatencyRun::ttft_last_ms)},
                 {"tokens_per_second", batch * 1e3 / step_ms},
                 {"client_us_per_token", cost.us_per_token},
                 {"client_cores", cost.cores},
                 {"cached_prompt_tokens", cached}};
  if (target.floor) {
    // The context grows while it is measured: its middle.
    const double context = flags.context + flags.output / 2.0;
    const double floor_ms = target.floor->DecodeSeconds(batch, context) * 1e3;
    object["floor_ms"] = floor_ms;
    object["ratio"] = step_ms / floor_ms;
    object["floor_bytes"] = target.floor->DecodeBytes(batch, context);
  }
  object["runs"] = RunsJson(runs);
  return object;
}

std::string CaseLine(const Json& object) {
  const auto number = [&](const char* key, const char* format) {
    if (!object.contains(key)) return std::string("-");
    return absl::StrFormat(*absl::ParsedFormat<'f'>::New(format), object[key].get<double>());
  };
  std::string line = absl::StrFormat(
      kRow, absl::StrCat(object["batch"].get<uint32_t>()), number("step_ms", "%.3f"),
      number("gap_p99_ms", "%.3f"), number("floor_ms", "%.3f"), number("ratio", "%.2f"),
      number("tokens_per_second", "%.0f"), number("ttft_median_ms", "%.1f"),
      number("ttft_last_ms", "%.1f"), number("client_us_per_token", "%.2f"));
  return line + CachedLine(object);
}

absl::StatusOr<Json> MeasureCase(const LatencyFlags& flags, uint32_t batch, BenchSession* session) {
  const absl::StatusOr<std::vector<Round>> rounds =
      session->Measure(absl::StrCat("batch ", batch), batch, {flags.context, flags.output});
  if (!rounds.ok()) return rounds.status();
  std::vector<LatencyRun> runs;
  for (const Round& round : *rounds) {
    const absl::StatusOr<LatencyRun> run = Evaluate(round);
    if (!run.ok()) {
      return absl::Status(run.status().code(),
                          absl::StrCat("batch ", batch, ": ", std::string(run.status().message())));
    }
    runs.push_back(*run);
  }
  return Case(flags, session->target(), batch, runs, *rounds);
}

}  // namespace

absl::Status RunLatencyBench(const LatencyFlags& flags) {
  if (flags.output < 3) {
    return absl::InvalidArgumentError("--output-len: a step is between two tokens; 3 at least");
  }
  const BenchOutput output(flags.bench);
  if (absl::Status begun = output.Begin(); !begun.ok()) return begun;
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
  output.Text(TargetLine(target));
  output.Text(absl::StrFormat("decoding at %u to %u tokens of context; median of %u runs\n\n",
                              flags.context, flags.context + flags.output, flags.bench.runs));
  output.Text(absl::StrFormat(kRow, "batch", "step ms", "p99 gap", "floor", "ratio", "tok/s",
                              "TTFT med", "TTFT last", "client us/tok"));
  Json report = {{"bench", "latency"},
                 {"target", DescribeTarget(flags.bench, target)},
                 {"prompt_tokens", flags.context},
                 {"output_tokens", flags.output},
                 {"cases", Json::array()}};
  for (const uint32_t batch : flags.batches) {
    const absl::StatusOr<Json> measured = MeasureCase(flags, batch, session->get());
    if (!measured.ok()) return measured.status();
    output.Text(CaseLine(*measured));
    report["cases"].push_back(*measured);
    if (absl::Status saved = output.Save(report); !saved.ok()) return saved;
  }
  return output.Finish(report);
}

}  // namespace lockstep
