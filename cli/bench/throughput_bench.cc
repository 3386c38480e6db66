#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "cli/bench/bench_session.h"
#include "cli/bench/fixed_benches.h"
#include "cli/bench/statistics.h"

namespace lockstep {
namespace {

using Json = nlohmann::ordered_json;

// Sequences that can run together: slots, and blocks at full length.
double AtOnce(const v1::GetModelInfoResponse& info, const ThroughputFlags& flags) {
  const double kv_tokens = double{1} * info.num_kv_blocks() * info.block_size();
  return std::max(1.0,
                  std::min<double>({double{1} * flags.requests, double{1} * info.max_num_seqs(),
                                    kv_tokens / (flags.input + flags.output)}));
}

}  // namespace

absl::Status RunThroughputBench(const ThroughputFlags& flags) {
  const BenchOutput output(flags.bench);
  if (absl::Status begun = output.Begin(); !begun.ok()) return begun;
  ServerNeeds needs;
  needs.sequences = flags.requests;
  needs.requests = flags.requests;
  needs.tokens = flags.input + flags.output;
  absl::StatusOr<std::unique_ptr<BenchSession>> session = BenchSession::Open(flags.bench, needs);
  if (!session.ok()) return session.status();
  const BenchTarget& target = (*session)->target();
  // More than run at once may wait, but one must fit.
  if (absl::Status fits = CheckNeeds(target.info, {1, 1, needs.tokens}); !fits.ok()) return fits;
  const absl::StatusOr<std::vector<Round>> rounds =
      (*session)->Measure("throughput", flags.requests, {flags.input, flags.output});
  if (!rounds.ok()) return rounds.status();

  std::vector<double> rates, first, per_token;
  uint64_t cached = 0;
  for (const Round& round : *rounds) {
    rates.push_back(round.tokens_per_s());
    cached += round.cached_tokens;
    for (const RequestLog& log : round.logs) {
      first.push_back(log.first_token_s() * 1e3);
      if (const auto tpot = log.per_token_s()) per_token.push_back(*tpot * 1e3);
    }
  }
  const double rate = Median(rates);
  const ClientCost cost = CostOf(*rounds);
  Json json = {{"bench", "throughput"},
               {"target", DescribeTarget(flags.bench, target)},
               {"requests", flags.requests},
               {"prompt_tokens", flags.input},
               {"output_tokens", flags.output},
               {"output_tokens_per_second", rate},
               {"runs_output_tokens_per_second", rates},
               {"ttft_median_ms", Median(first)},
               {"tpot_median_ms", nullptr},  // answers of one token have none
               {"client_us_per_token", cost.us_per_token},
               {"client_cores", cost.cores},
               {"cached_prompt_tokens", cached}};
  if (!per_token.empty()) json["tpot_median_ms"] = Median(per_token);
  std::string table =
      TargetLine(target) +
      absl::StrFormat("%u requests of %u in, %u out, all at once; median of %u runs\n\n",
                      flags.requests, flags.input, flags.output, flags.bench.runs);
  absl::StrAppendFormat(&table, "output        %.1f tok/s\n", rate);
  if (target.floor) {
    const double most = target.floor->ThroughputTokensPerSecond(
        flags.requests, AtOnce(target.info, flags), flags.input, flags.output);
    json["bound_tokens_per_second"] = most;
    json["ratio"] = rate / most;
    absl::StrAppendFormat(&table, "bound         %.1f tok/s (%.0f %% reached)\n", most,
                          100 * rate / most);
  }
  absl::StrAppendFormat(&table, "TTFT median   %.1f ms\nTPOT median   %s\n", Median(first),
                        per_token.empty() ? "-" : absl::StrFormat("%.3f ms", Median(per_token)));
  absl::StrAppendFormat(&table, "client        %.2f us a token, %.2f cores\n", cost.us_per_token,
                        cost.cores);
  output.Text(table + CachedLine(json));
  return output.Finish(json);
}

}  // namespace lockstep
