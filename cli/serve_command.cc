// lockstep serve: a coordinator and its workers on this host, as children.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "cli/child_process.h"
#include "cli/commands.h"
#include "cli/private_folder.h"
#include "cli/supervisor.h"
#include "common/flag_sources.h"
#include "common/log.h"
#include "common/variables.h"
#include "coordinator/options.h"

namespace lockstep {
namespace {

int Fail(const absl::Status& status, int code) {
  std::fprintf(stderr, "lockstep serve: %s\n", std::string(status.message()).c_str());
  return code;
}

// As a line of the log where that is JSON, which something may read line by line.
void SayUnknownVariables(const CoordinatorOptions& options) {
  const bool json = options.log_format == "json";
  if (json) InitLog({.json = true, .source = "serve"});
  for (const std::string& line : TakeUnknownVariables()) {
    if (json) {
      LogWarning(line);
    } else {
      std::fprintf(stderr, "lockstep serve: %s\n", line.c_str());
    }
  }
}

// Fills in the daemons' command lines. `args` are serve's own flags, which the
// coordinator reads again: file and environment included.
absl::Status PlanChildren(const CoordinatorOptions& options, const std::vector<std::string>& args,
                          const std::string& worker_address, SupervisorOptions* children) {
  absl::StatusOr<std::string> coordinator = SiblingProgram("lockstep-coordinator");
  if (!coordinator.ok()) return coordinator.status();
  absl::StatusOr<std::string> worker = SiblingProgram("lockstep-worker");
  if (!worker.ok()) return worker.status();
  children->log_json = options.log_format == "json";
  children->coordinator = {*coordinator};
  children->coordinator.insert(children->coordinator.end(), args.begin(), args.end());
  children->coordinator.push_back(absl::StrCat("--worker-address=", worker_address));
  for (uint32_t rank = 0; rank < options.tensor_parallel_size; ++rank) {
    children->workers.push_back(
        {*worker, "--coordinator", worker_address, "--backend", options.backend, "--preferred-rank",
         absl::StrCat(rank), "--log-format", options.log_format, "--log-level", options.log_level});
    if (options.backend == "cuda") {
      children->workers.back().push_back(absl::StrCat("--device=", rank));
    }
    for (const auto& [name, file] : {std::pair("certfile", &options.worker_ssl_certfile),
                                     std::pair("keyfile", &options.worker_ssl_keyfile),
                                     std::pair("ca-certs", &options.worker_ssl_ca_certs)}) {
      if (file->empty()) continue;
      children->workers.back().push_back(absl::StrCat("--worker-ssl-", name, "=", *file));
    }
    if (options.insecure) children->workers.back().push_back("--insecure");
  }
  return absl::OkStatus();
}

int RunServe(const std::vector<std::string>& args) {
  CLI::App app{"Serve a model on this host.", "lockstep serve"};
  CoordinatorOptions options;
  AddCoordinatorFlags(app, &options);
  const absl::Status parsed = ParseWithSources(app, args);
  SayUnknownVariables(options);
  if (!parsed.ok()) return Fail(parsed, 2);
  if (options.print_config) {
    std::fputs(PrintConfig(app).c_str(), stdout);
    return 0;
  }
  if (absl::Status valid = ValidateOptions(options); !valid.ok()) return Fail(valid, 2);
  absl::StatusOr<std::unique_ptr<PrivateFolder>> folder =
      PrivateFolder::Make("/tmp/lockstep-serve");
  if (!folder.ok()) return Fail(folder.status(), 1);
  std::string address = absl::StrCat("unix:", (*folder)->path(), "/workers");
  if (app.count("--worker-address") > 0) address = options.worker_address;
  SupervisorOptions children;
  if (absl::Status planned = PlanChildren(options, args, address, &children); !planned.ok()) {
    return Fail(planned, 1);
  }
  return RunSupervisor(children);
}

}  // namespace

void AddServeCommand(CLI::App* app, const std::vector<std::string>& args, Command* chosen) {
  // The flags are declared for --help and for hints; the values are read in
  // RunServe, where the file and the environment count as well.
  auto shown = std::make_shared<CoordinatorOptions>();
  CLI::App* command = app->add_subcommand("serve", "Serve a model: coordinator and workers here");
  command->group("Serve");
  AddCoordinatorFlags(*command, shown.get());
  command->callback([=] { *chosen = [args, shown] { return RunServe(args); }; });
}

}  // namespace lockstep
