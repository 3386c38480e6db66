// lockstep bench: what a real server does under a load of our making.
#include <cstdio>
#include <functional>
#include <memory>
#include <string>

#include "CLI/CLI.hpp"
#include "absl/strings/str_join.h"
#include "cli/bench/fixed_benches.h"
#include "cli/bench/model_shapes.h"
#include "cli/bench/serve_bench.h"
#include "cli/commands.h"

namespace lockstep {
namespace {

int ExitCode(const std::string& name, const absl::Status& status) {
  if (status.ok()) return 0;
  std::fprintf(stderr, "lockstep bench %s: %s\n", name.c_str(),
               std::string(status.message()).c_str());
  return absl::IsCancelled(status) ? 130 : 1;
}

// A subcommand with its own flags; `run` is what it does with them.
template <typename Flags>
CLI::App* AddBench(CLI::App* bench, const std::string& name, const std::string& what,
                   const std::shared_ptr<Flags>& flags,
                   const std::function<absl::Status(const Flags&)>& run, Command* chosen) {
  CLI::App* command = bench->add_subcommand(name, what);
  AddBenchFlags(command, &flags->bench);
  command->callback([=] { *chosen = [=] { return ExitCode(name, run(*flags)); }; });
  return command;
}

// How many, or how long.
void AddCount(CLI::App* command, const std::string& name, uint32_t* count,
              const std::string& what) {
  command->add_option(name, *count, what)->check(CLI::Range(1u, 1u << 20))->capture_default_str();
}
// Of the commands whose cases are measured several times.
void AddRuns(CLI::App* command, BenchFlags* flags) {
  command->add_option("--runs", flags->runs, "Runs of each case; the median counts")
      ->group("Report")
      ->check(CLI::Range(1u, 1000u))
      ->capture_default_str();
}
void AddOutputLength(CLI::App* command, uint32_t* tokens) {
  AddCount(command, "--output-len", tokens, "Tokens of an answer");
}

void AddLatency(CLI::App* bench, Command* chosen) {
  auto flags = std::make_shared<LatencyFlags>();
  CLI::App* command =
      AddBench<LatencyFlags>(bench, "latency", "Decode step and first token at fixed batch sizes",
                             flags, RunLatencyBench, chosen);
  command->add_option("--batch", flags->batches, "Sequences that run together")
      ->expected(1, 64)
      ->check(CLI::Range(1u, 65536u))
      ->delimiter(',')
      ->capture_default_str();
  AddCount(command, "--context,--input-len", &flags->context, "Tokens of a prompt");
  AddOutputLength(command, &flags->output);
  AddRuns(command, &flags->bench);
}

void AddPrefill(CLI::App* bench, Command* chosen) {
  auto flags = std::make_shared<PrefillFlags>();
  CLI::App* command = AddBench<PrefillFlags>(
      bench, "prefill", "Time to the first token, idle server", flags, RunPrefillBench, chosen);
  command->add_option("--prompts", flags->cases, "Prompts that come together x tokens of each")
      ->expected(1, 64)
      ->delimiter(',')
      ->capture_default_str();
  AddRuns(command, &flags->bench);
}

void AddThroughput(CLI::App* bench, Command* chosen) {
  auto flags = std::make_shared<ThroughputFlags>();
  CLI::App* command =
      AddBench<ThroughputFlags>(bench, "throughput", "Output tokens a second, all requests at once",
                                flags, RunThroughputBench, chosen);
  AddCount(command, "--requests", &flags->requests, "How many");
  AddCount(command, "--input-len", &flags->input, "Tokens of a prompt");
  AddOutputLength(command, &flags->output);
  AddRuns(command, &flags->bench);
}

void AddServe(CLI::App* bench, Command* chosen) {
  auto flags = std::make_shared<ServeBenchFlags>();
  CLI::App* command =
      AddBench<ServeBenchFlags>(bench, "serve", "A load like users', judged by a service level",
                                flags, RunServeBench, chosen);
  command->add_option("--request-rate", flags->rates, "Open loop: requests a second (Poisson)")
      ->expected(1, 64)
      ->delimiter(',');
  command->add_option("--concurrency", flags->concurrency, "Closed loop: requests under way")
      ->expected(1, 64)
      ->check(CLI::Range(1u, 65536u))
      ->delimiter(',');
  command->add_option("--requests", flags->requests, "Of each load point")
      ->check(CLI::Range(1u, 1u << 20))
      ->default_str("200, or 4 for each of the largest --concurrency");
  command->add_option("--lengths", flags->lengths, "fixed (--input-len, --output-len) or sharegpt")
      ->check(CLI::IsMember({"fixed", "sharegpt"}))
      ->capture_default_str();
  AddCount(command, "--input-len", &flags->input, "Tokens of a prompt");
  AddOutputLength(command, &flags->output);
  command->add_option("--slo-ttft-ms", flags->slo.ttft_ms, "Goodput: first token within")
      ->capture_default_str();
  command->add_option("--slo-tpot-ms", flags->slo.tpot_ms, "Goodput: time per token at most")
      ->capture_default_str();
  command->add_option("--html", flags->html, "Write a report with plots to this file");
}

void AddShape(CLI::App* bench, Command* chosen) {
  auto name = std::make_shared<std::string>();
  auto directory = std::make_shared<std::string>();
  CLI::App* command =
      bench->add_subcommand("shape", "Write a model directory without weights, for dummy loading");
  command->add_option("name", *name, absl::StrJoin(ModelShapeNames(), ", "))->required();
  command->add_option("directory", *directory, "Where to write it")->required();
  command->callback(
      [=] { *chosen = [=] { return ExitCode("shape", WriteModelShape(*name, *directory)); }; });
}

}  // namespace

void AddBenchCommand(CLI::App* app, Command* chosen) {
  CLI::App* bench = app->add_subcommand("bench", "Measure a server");
  bench->group("Measure");
  bench->require_subcommand(1);
  AddLatency(bench, chosen);
  AddPrefill(bench, chosen);
  AddThroughput(bench, chosen);
  AddServe(bench, chosen);
  AddShape(bench, chosen);
}

}  // namespace lockstep
