// lockstep compare: its flags. What it does is in cli/compare/compare_run.h.
#include <cstdio>
#include <memory>
#include <string>

#include "CLI/CLI.hpp"
#include "absl/strings/numbers.h"
#include "cli/commands.h"
#include "cli/compare/compare_run.h"

namespace lockstep {

void AddCompareCommand(CLI::App* app, Command* chosen) {
  auto flags = std::make_shared<CompareFlags>();
  CLI::App* command = app->add_subcommand(
      "compare", "Say how far two configurations' answers and log-probabilities are apart");
  command->group("Measure");
  std::string group = "Configurations";
  command->add_option("--server-a", flags->a.server, "The reference: host:port")->group(group);
  command->add_option("--server-b", flags->b.server, "What is compared to it")->group(group);
  AddAccessFlags(command, &flags->access);
  command->add_option("--model", flags->model, "Served in turn, where no server is given")
      ->group(group);
  command
      ->add_option("--flags-a", flags->a.flags,
                   "Serve flags of A, as in --flags-a='--dtype float32'")
      ->group(group);
  command
      ->add_option("--flags-b", flags->b.flags,
                   "Serve flags of B, as in --flags-b='--tensor-parallel-size 4'")
      ->group(group);
  group = "Prompts";
  command->add_option("--prompts", flags->prompts, "JSON lines, as `lockstep batch` reads them")
      ->group(group);
  command->add_option("--random-prompts", flags->random_prompts, "Without --prompts: how many")
      ->group(group)
      ->check(CLI::Range(1u, 65536u))
      ->capture_default_str();
  command->add_option("--random-tokens", flags->random_tokens, "Without --prompts: tokens of each")
      ->group(group)
      ->check(CLI::Range(1u, 1u << 20))
      ->capture_default_str();
  command->add_option("--seed", flags->seed, "Of the random prompts")
      ->group(group)
      ->capture_default_str();
  command->add_option("--max-tokens", flags->max_tokens, "Of an answer")
      ->group(group)
      ->check(CLI::Range(1u, 1u << 20))
      ->capture_default_str();
  command->add_option("--top", flags->top, "Log-probabilities compared a position")
      ->group(group)
      ->check(CLI::Range(2u, 20u))
      ->capture_default_str();
  group = "Report";
  command
      ->add_option("--max-error", flags->max_error,
                   "Fail when a log-probability is further off; 0: at any difference")
      ->group(group)
      ->check([](const std::string& text) -> std::string {
        double bound = 0;
        if (absl::SimpleAtod(text, &bound) && bound >= 0) return "";
        return text + ": expected a number of 0 or more";
      });
  command->add_flag("--json", flags->json, "Print JSON instead of the table")->group(group);
  command->add_option("--output", flags->output, "Write the JSON to this file as well")
      ->group(group);
  command->callback([=] {
    *chosen = [=] {
      const absl::Status status = RunCompare(*flags);
      if (status.ok()) return 0;
      std::fprintf(stderr, "lockstep compare: %s\n", std::string(status.message()).c_str());
      return 1;
    };
  });
}

}  // namespace lockstep
