#include "cli/top/frame.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/terminal.h"

namespace lockstep {
namespace {

constexpr int kBar = 20;  // characters

// Three significant figures in the unit that suits them.
std::string Duration(std::optional<double> seconds) {
  if (!seconds) return "-";
  if (*seconds >= 1) return absl::StrFormat("%.3g s", *seconds);
  if (*seconds >= 1e-3) return absl::StrFormat("%.3g ms", *seconds * 1e3);
  return absl::StrFormat("%.3g us", *seconds * 1e6);
}

std::string Bytes(std::optional<double> bytes) {
  return bytes ? HumanBytes(static_cast<uint64_t>(std::max(*bytes, 0.0))) : "-";
}

class Picture {
 public:
  Picture(const MetricsText& before, const MetricsText& now, double seconds)
      : before_(before), now_(now), seconds_(std::max(seconds, 1e-3)) {}

  std::string Head(const std::string& server) const {
    const std::string model = now_.Label("vllm:num_requests_running", "model_name");
    const bool ready = Now("lockstep_ready") > 0;
    return absl::StrFormat("lockstep top   %s   %s   %s   epoch %.0f   version %s\n\n", server,
                           model.empty() ? "-" : model, ready ? "ready" : "NOT READY",
                           Now("lockstep_epoch"), now_.Label("lockstep_build_info", "version"));
  }

  std::string Requests() const {
    return absl::StrFormat(
        "requests  running %-5.0f waiting %-6.0f answered %.1f/s   refused %.1f/s   failed "
        "%.1f/s\n",
        Now("lockstep_requests", {{"state", "running"}}),
        Now("lockstep_requests", {{"state", "waiting"}}),
        Rate("lockstep_requests_total", {{"outcome", "completed"}}),
        Rate("lockstep_rejections_total"),
        Rate("lockstep_requests_total", {{"outcome", "failed"}}));
  }

  std::string Tokens() const {
    return absl::StrFormat(
        "tokens    out %.1f/s   in %.1f/s   prefix cache %s   preemptions %.1f/s\n",
        Rate("vllm:generation_tokens_total"), Rate("vllm:prompt_tokens_total"), PrefixHits(),
        Rate("vllm:num_preemptions_total"));
  }

  std::string Latency() const {
    return absl::StrCat("latency   first token ", Quantiles("vllm:time_to_first_token_seconds"),
                        "   between tokens ", Quantiles("vllm:inter_token_latency_seconds"), "\n");
  }

  std::string Steps() const {
    std::string line = "steps     ";
    for (const std::string& kind : now_.LabelValues("lockstep_step_seconds_count", "kind")) {
      const HistogramDelta delta = Delta("lockstep_step_seconds", {{"kind", kind}});
      absl::StrAppendFormat(&line, "%s %s x %.0f/s   ", kind, Duration(delta.mean()),
                            delta.count / seconds_);
    }
    absl::StrAppend(&line, "plan ", Duration(Delta("lockstep_plan_seconds").mean()), "\n");
    return line;
  }

  std::string Blocks() const {
    const auto state = [&](const char* name) {
      return Now("lockstep_kv_blocks", {{"state", name}});
    };
    const double active = state("active"), cached = state("cached"), free = state("free"),
                 pending = state("pending");
    const double all = std::max(active + cached + free + pending, 1.0);
    const int used = static_cast<int>(std::lround((active + pending) / all * kBar));
    const int kept = std::min(static_cast<int>(std::lround(cached / all * kBar)), kBar - used);
    return absl::StrFormat(
        "KV        [%s%s%s] %.1f%%   active %.0f  cached %.0f  free %.0f  pending %.0f\n\n",
        std::string(static_cast<size_t>(used), '#'), std::string(static_cast<size_t>(kept), '+'),
        std::string(static_cast<size_t>(kBar - used - kept), '.'), 100 * (active + pending) / all,
        active, cached, free, pending);
  }

  std::string Ranks() const {
    constexpr char kRow[] = "%4s %4s  %9s %9s %9s %9s %9s %9s  %11s %11s\n";
    std::string table = absl::StrFormat(kRow, "rank", "up", "step", "compute", "wait", "transfer",
                                        "idle", "sent/s", "weights", "KV");
    for (const std::string& rank : now_.LabelValues("lockstep_worker_up", "rank")) {
      const MetricLabels labels = {{"rank", rank}};
      const auto mean = [&](const char* name) { return Duration(Delta(name, labels).mean()); };
      const auto own = [&](const char* kind) {
        const MetricLabels of_kind = {{"rank", rank}, {"kind", kind}};
        return Duration(Delta("lockstep_rank_step_seconds", of_kind).mean());
      };
      absl::StrAppendFormat(
          &table, kRow, rank, Now("lockstep_worker_up", labels) > 0 ? "yes" : "NO", own("total"),
          own("compute"), mean("lockstep_collective_wait_seconds"),
          mean("lockstep_collective_transfer_seconds"), mean("lockstep_device_idle_seconds"),
          Bytes(Rate("lockstep_collective_bytes_total", labels)),
          Bytes(now_.Value("lockstep_weight_bytes", labels)),
          Bytes(now_.Value("lockstep_kv_bytes", labels)));
    }
    return table + Straggler();
  }

 private:
  double Now(const std::string& name, const MetricLabels& labels = {}) const {
    return now_.Value(name, labels).value_or(0);
  }
  double Rate(const std::string& name, const MetricLabels& labels = {}) const {
    return CounterDelta(before_, now_, name, labels) / seconds_;
  }
  HistogramDelta Delta(const std::string& name, const MetricLabels& labels = {}) const {
    return DeltaOf(before_, now_, name, labels);
  }
  std::string Quantiles(const std::string& name) const {
    const HistogramDelta delta = Delta(name);
    return absl::StrFormat("p50 %s p99 %s", Duration(delta.quantile(0.5)),
                           Duration(delta.quantile(0.99)));
  }
  std::string PrefixHits() const {
    const double asked = CounterDelta(before_, now_, "vllm:prefix_cache_queries_total");
    if (asked <= 0) return "-";
    const double found = CounterDelta(before_, now_, "vllm:prefix_cache_hits_total");
    return absl::StrFormat("%.0f%%", 100 * found / asked);
  }

  // The rank that waits least is the one the others wait for.
  std::string Straggler() const {
    std::string slowest;
    double least = 0, most = 0;
    for (const std::string& rank :
         now_.LabelValues("lockstep_collective_wait_seconds_count", "rank")) {
      const auto wait = Delta("lockstep_collective_wait_seconds", {{"rank", rank}}).mean();
      if (!wait) continue;
      if (slowest.empty() || *wait < least) {
        slowest = rank;
        least = *wait;
      }
      most = std::max(most, *wait);
    }
    if (slowest.empty() || most <= 0) return "";
    return absl::StrFormat("\nthe others wait for rank %s: %s a step\n", slowest,
                           Duration(most - least));
  }

  const MetricsText& before_;
  const MetricsText& now_;
  const double seconds_;
};

}  // namespace

std::string RenderFrame(const std::string& server, const MetricsText& before,
                        const MetricsText& now, double seconds) {
  const Picture picture(before, now, seconds);
  return absl::StrCat(picture.Head(server), picture.Requests(), picture.Tokens(), picture.Latency(),
                      picture.Steps(), picture.Blocks(), picture.Ranks());
}

}  // namespace lockstep
