#include "cli/bench/serve_figures.h"

#include <algorithm>
#include <limits>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/bench/statistics.h"

namespace lockstep {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kSlices = 60;
constexpr int kPercentileStep = 2;

double Seconds(int64_t ns) { return static_cast<double>(ns) * 1e-9; }

bool Good(const RequestLog& log, const ServiceLevel& slo) {
  if (log.first_token_s() * 1e3 > slo.ttft_ms) return false;
  return log.per_token_s().value_or(0) * 1e3 <= slo.tpot_ms;
}

// Null where nothing was measured: a zero would read as the best there is.
Json DistributionJson(const Distribution& d) {
  if (d.percentiles.empty()) return nullptr;
  return {{"mean", d.mean},
          {"p50", d.p50},
          {"p90", d.p90},
          {"p95", d.p95},
          {"p99", d.p99},
          {"max", d.max},
          {"percentiles", d.percentiles}};
}

// Tokens a second and requests under way, slice by slice.
void FillSlices(const std::vector<RequestLog>& logs, int64_t begin_ns, int64_t end_ns,
                ServeFigures* figures) {
  const int64_t slice_ns = std::max<int64_t>((end_ns - begin_ns) / kSlices, 1);
  const auto slice_of = [&](int64_t ns) {
    return static_cast<size_t>(std::clamp<int64_t>((ns - begin_ns) / slice_ns, 0, kSlices - 1));
  };
  figures->slice_s = Seconds(slice_ns);
  figures->tokens_per_s.assign(kSlices, 0);
  figures->running.assign(kSlices, 0);
  for (const RequestLog& log : logs) {
    if (!log.ok()) continue;
    for (const TokenArrival& arrival : log.arrivals) {
      figures->tokens_per_s[slice_of(arrival.ns)] += arrival.tokens / figures->slice_s;
    }
    for (size_t i = slice_of(log.sent_ns); i <= slice_of(log.end_ns); ++i) {
      const int64_t from = begin_ns + static_cast<int64_t>(i) * slice_ns;
      const int64_t inside = std::min(log.end_ns, from + slice_ns) - std::max(log.sent_ns, from);
      figures->running[i] +=
          static_cast<double>(std::max<int64_t>(inside, 0)) / static_cast<double>(slice_ns);
    }
  }
}

}  // namespace

std::string LoadPoint::Name() const {
  return open ? absl::StrFormat("%g req/s", value) : absl::StrFormat("%g at once", value);
}

Distribution Distribution::Of(const std::vector<double>& values) {
  std::vector<double> sorted = values;
  std::sort(sorted.begin(), sorted.end());
  Distribution d;
  d.mean = Mean(sorted);
  d.p50 = Quantile(sorted, 0.50);
  d.p90 = Quantile(sorted, 0.90);
  d.p95 = Quantile(sorted, 0.95);
  d.p99 = Quantile(sorted, 0.99);
  d.max = sorted.empty() ? 0 : sorted.back();
  if (sorted.empty()) return d;
  for (int p = 0; p <= 100; p += kPercentileStep) {
    d.percentiles.push_back(Quantile(sorted, p / 100.0));
  }
  return d;
}

double ServeFigures::good_share() const {
  const int64_t sent = completed + refused + failed;
  return sent == 0 ? 0 : static_cast<double>(good) / static_cast<double>(sent);
}

ServeFigures Summarize(const LoadPoint& load, const std::vector<RequestLog>& logs,
                       const ServiceLevel& slo) {
  ServeFigures figures;
  figures.load = load;
  if (logs.empty()) return figures;
  int64_t begin_ns = std::numeric_limits<int64_t>::max();
  int64_t end_ns = std::numeric_limits<int64_t>::min();
  std::vector<double> ttft, tpot, gaps, latency, late;
  for (const RequestLog& log : logs) {
    begin_ns = std::min(begin_ns, log.due_ns);
    end_ns = std::max(end_ns, log.end_ns);
    late.push_back(Seconds(log.sent_ns - log.due_ns) * 1e3);
    if (!log.ok()) {
      ++(absl::IsResourceExhausted(log.status) ? figures.refused : figures.failed);
      if (figures.first_failure.empty()) {
        figures.first_failure = std::string(log.Outcome().message());
      }
      continue;
    }
    ++figures.completed;
    figures.prompt_tokens += log.prompt_tokens;
    figures.cached_tokens += log.cached_tokens;
    figures.output_tokens += log.output_tokens;
    if (Good(log, slo)) ++figures.good;
    ttft.push_back(log.first_token_s() * 1e3);
    latency.push_back(log.latency_s());
    if (const auto each = log.per_token_s()) tpot.push_back(*each * 1e3);
    for (size_t i = 1; i < log.arrivals.size(); ++i) {
      gaps.push_back(Seconds(log.arrivals[i].ns - log.arrivals[i - 1].ns) * 1e3);
    }
  }
  figures.seconds = Seconds(end_ns - begin_ns);
  figures.ttft_ms = Distribution::Of(ttft);
  figures.tpot_ms = Distribution::Of(tpot);
  figures.gap_ms = Distribution::Of(gaps);
  figures.latency_s = Distribution::Of(latency);
  figures.late_ms = Quantile(late, 0.99);
  FillSlices(logs, begin_ns, end_ns, &figures);
  return figures;
}

absl::Status Verdict(const ServeFigures& f) {
  if (f.failed == 0 && f.completed > 0) return absl::OkStatus();
  const int64_t sent = f.completed + f.refused + f.failed;
  const std::string what = f.failed > 0
                               ? absl::StrFormat("%d of %d requests failed", f.failed, sent)
                               : absl::StrFormat("none of %d requests was answered", sent);
  return absl::UnavailableError(
      absl::StrCat(f.load.Name(), ": ", what, "; the first to go wrong: ", f.first_failure));
}

Json ToJson(const ServeFigures& f) {
  return {{"load", f.load.Name()},
          {"loop", f.load.open ? "open" : "closed"},
          {"value", f.load.value},
          {"completed", f.completed},
          {"refused", f.refused},
          {"failed", f.failed},
          {"first_failure", f.first_failure},
          {"seconds", f.seconds},
          {"prompt_tokens", f.prompt_tokens},
          {"cached_prompt_tokens", f.cached_tokens},
          {"output_tokens", f.output_tokens},
          {"requests_per_second", f.requests_per_s()},
          {"output_tokens_per_second", f.output_per_s()},
          {"good", f.good},
          {"goodput_per_second", f.goodput_per_s()},
          {"good_share", f.good_share()},
          {"ttft_ms", DistributionJson(f.ttft_ms)},
          {"tpot_ms", DistributionJson(f.tpot_ms)},
          {"gap_ms", DistributionJson(f.gap_ms)},
          {"latency_s", DistributionJson(f.latency_s)},
          {"send_lag_p99_ms", f.late_ms},
          {"slice_seconds", f.slice_s},
          {"slice_tokens_per_second", f.tokens_per_s},
          {"slice_running", f.running}};
}

}  // namespace lockstep
