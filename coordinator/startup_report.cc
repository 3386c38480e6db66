#include "coordinator/startup_report.h"

#include <algorithm>
#include <cstdint>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"

namespace lockstep {
namespace {

double GiB(uint64_t bytes) { return static_cast<double>(bytes) / (1 << 30); }

double Total(const Phases& phases) {
  double total = 0;
  for (const auto& [name, seconds] : phases) total += seconds;
  return total;
}

}  // namespace

std::vector<std::string> DescribeRanks(const EngineInfo& info) {
  std::vector<std::string> lines;
  for (const RankReport& rank : info.ranks) {
    lines.push_back(absl::StrFormat(
        "rank %d  %s:%d  %s  weights %.4f GiB%s  KV %d blocks, %.4f GiB  collectives %s", rank.rank,
        rank.host, rank.pid, rank.device, GiB(rank.memory.weights),
        rank.predicted ? absl::StrFormat(" (predicted %.4f)", GiB(rank.predicted->weights)) : "",
        info.num_kv_blocks, GiB(rank.memory.kv), rank.collective_library));
    if (!rank.shard.empty()) lines.push_back(absl::StrCat("        holds ", rank.shard));
    const double read = Total(rank.phases);
    std::string line =
        absl::StrCat("        read ", absl::StrFormat("%.4f", GiB(rank.checkpoint_bytes)),
                     " GiB of the checkpoint");
    if (read > 0) absl::StrAppend(&line, "; ", DescribePhases(rank.phases));
    lines.push_back(std::move(line));
  }
  return lines;
}

Phases StartupPhases(const Phases& before, double since, const EngineInfo& info) {
  double load = 0;
  for (const RankReport& rank : info.ranks) load = std::max(load, Total(rank.phases));
  load = std::min(load, since);
  Phases phases = before;
  phases.emplace_back("workers attach", since - load);
  phases.emplace_back("slowest rank loads", load);
  return phases;
}

std::string DescribePhases(const Phases& phases) {
  const auto one = [](std::string* out, const std::pair<std::string, double>& phase) {
    absl::StrAppend(out, phase.first, absl::StrFormat(" %.2f s", phase.second));
  };
  return absl::StrCat(absl::StrJoin(phases, " + ", one),
                      absl::StrFormat(" = %.2f s", Total(phases)));
}

}  // namespace lockstep
