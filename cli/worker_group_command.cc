// lockstep worker-group: the workers of one host whose coordinator is elsewhere, as
// children. One process a GPU, all in one container, because CUDA maps a peer's memory
// only where its device is visible.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "cli/child_process.h"
#include "cli/commands.h"
#include "cli/supervisor.h"

namespace lockstep {
namespace {

struct WorkerGroupFlags {
  uint32_t count = 0;
  uint32_t node = 1;
  std::string log_format;  // empty: the worker's own default, or its file's
};

// worker_flags: as they stand behind --.
int RunWorkerGroup(const WorkerGroupFlags& flags, const std::vector<std::string>& worker_flags) {
  const bool json = flags.log_format == "json";
  SayUnknownVariables("worker-group", json);
  const absl::StatusOr<std::string> worker = SiblingProgram("lockstep-worker");
  if (!worker.ok()) {
    std::fprintf(stderr, "lockstep worker-group: %s\n",
                 std::string(worker.status().message()).c_str());
    return 1;
  }
  SupervisorOptions options;
  options.command = "worker-group";
  options.log_json = json;
  for (uint32_t index = 0; index < flags.count; ++index) {
    std::vector<std::string>& argv = options.workers.emplace_back();
    argv = {*worker};
    if (!flags.log_format.empty()) argv.push_back("--log-format=" + flags.log_format);
    argv.insert(argv.end(), worker_flags.begin(), worker_flags.end());
    // Neighbours share a host: node I has ranks (I-1)*N to I*N-1.
    argv.push_back(absl::StrCat("--preferred-rank=", (flags.node - 1) * flags.count + index));
    argv.push_back(absl::StrCat("--device=", index));
  }
  return RunSupervisor(options);
}

}  // namespace

void AddWorkerGroupCommand(CLI::App* app, std::vector<std::string>* words, Command* chosen) {
  // Not parsed here: CLI11 would take a value in brackets apart.
  std::vector<std::string> worker_flags;
  const auto mark = std::find(words->begin(), words->end(), "--");
  if (!words->empty() && words->front() == "worker-group" && mark != words->end()) {
    worker_flags.assign(mark + 1, words->end());
    words->erase(mark, words->end());
  }
  CLI::App* command = app->add_subcommand(
      "worker-group", "Keep this host's workers alive; their coordinator is elsewhere");
  command->group("Serve");
  command->footer(
      "lockstep worker-group --count N [--node I] -- LOCKSTEP-WORKER-FLAGS...\n\n"
      "Worker i computes on device i where the backend is cuda. One that dies is started again; "
      "one that the coordinator told to end ends them all. Exit codes: 0 after that, SIGTERM or "
      "SIGINT, 1 when a worker kept dying young or is not installed, 2 for a bad command line.");
  const auto flags = std::make_shared<WorkerGroupFlags>();
  command->add_option("--count", flags->count, "Workers here")
      ->required()
      ->check(CLI::Range(1, 64));
  command
      ->add_option("--node", flags->node,
                   "Which host of the group this is, counted from 1: its workers ask for the ranks "
                   "from (I-1)*N")
      ->capture_default_str()
      ->check(CLI::Range(1, 64));
  command->add_option("--log-format", flags->log_format, "text or json, of the workers too")
      ->envname("LOCKSTEP_LOG_FORMAT")
      ->check(CLI::IsMember({"text", "json"}));
  command->callback([=] { *chosen = [=] { return RunWorkerGroup(*flags, worker_flags); }; });
}

}  // namespace lockstep
