// sim: runs the scheduler's simulation over many seeds.
//
//   sim --start 1 --count 10000     ten thousand seeds, and some of every scenario
//   sim --seed 1234 [--overloaded | --poisoned] [--trace]
//                                   one run again, every event a line
//
// Exits 1 at the first violation, with the command that replays it.
#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdint>
#include <cstdio>

#include "tests/sim/simulation.h"

using lockstep::sim::RunOptions;
using lockstep::sim::RunReport;
using lockstep::sim::Scenario;

int main(int argc, char** argv) {
  CLI::App app{"Simulates the scheduler among failing workers and leaving clients."};
  uint64_t start = 1, count = 1'000, seed = 0;
  bool overloaded = false, poisoned = false, trace = false;
  app.add_option("--start", start, "first seed");
  app.add_option("--count", count, "how many seeds");
  app.add_option("--seed", seed, "this seed alone");
  app.add_flag("--overloaded", overloaded, "with --seed: the overloaded scenario");
  app.add_flag("--poisoned", poisoned, "with --seed: the poisoned scenario");
  app.add_flag("--trace", trace, "with --seed: print every event");
  CLI11_PARSE(app, argc, argv);

  const auto run = [](const RunOptions& options, RunReport* report) {
    *report = lockstep::sim::Simulate(options);
    if (report->violation.empty()) return true;
    std::printf("seed %llu: %s\n  replay: sim --seed %llu --trace%s\n",
                static_cast<unsigned long long>(options.seed), report->violation.c_str(),
                static_cast<unsigned long long>(options.seed),
                lockstep::sim::FlagOf(options.scenario));
    return false;
  };
  RunReport report;
  if (app.count("--seed") > 0) {
    const Scenario scenario = overloaded ? Scenario::kOverloaded
                              : poisoned ? Scenario::kPoisoned
                                         : Scenario::kMixed;
    const bool ok = run({.seed = seed, .scenario = scenario, .keep_trace = trace}, &report);
    std::printf("%sseed %llu: trace hash %016llx, %llu events\n", report.trace.c_str(),
                static_cast<unsigned long long>(seed),
                static_cast<unsigned long long>(report.trace_hash),
                static_cast<unsigned long long>(report.events));
    return ok ? 0 : 1;
  }

  RunReport sum;
  const auto began = std::chrono::steady_clock::now();
  for (uint64_t s = start; s < start + count; ++s) {
    for (const Scenario scenario : {Scenario::kMixed, Scenario::kOverloaded, Scenario::kPoisoned}) {
      if (scenario == Scenario::kOverloaded && s % 10 != 0) continue;
      if (scenario == Scenario::kPoisoned && s % 2 != 0) continue;
      if (!run({.seed = s, .scenario = scenario}, &report)) return 1;
      sum.Add(report);
    }
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  const auto n = [](uint64_t v) { return static_cast<unsigned long long>(v); };
  std::printf("%llu seeds from %llu, 0 violations, %.1f s, %.0f seeds/s\n", n(count), n(start),
              seconds, static_cast<double>(count) / seconds);
  std::printf(
      "events %llu, steps %llu; requests: received %llu, completed %llu, failed %llu, "
      "cancelled %llu, rejected %llu\n",
      n(sum.events), n(sum.steps), n(sum.received), n(sum.completed), n(sum.failed),
      n(sum.cancelled), n(sum.rejected));
  std::printf(
      "preemptions %llu (at most %d of one sequence), group deaths %llu, lies %llu, "
      "quarantined %llu, stop strings %llu, prefix-cache hits %llu tokens\n",
      n(sum.preemptions), sum.most_preemptions, n(sum.deaths), n(sum.lies), n(sum.quarantined),
      n(sum.stops), n(sum.cache_hits));
  return 0;
}
