// lockstep serve: a coordinator and its workers on this host, as children.
#include <cstdio>
#include <cstdlib>
#include <cstring>
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
#include "coordinator/options.h"

namespace lockstep {
namespace {

int Fail(const absl::Status& status, int code) {
  std::fprintf(stderr, "lockstep serve: %s\n", std::string(status.message()).c_str());
  return code;
}

// The coordinator's flags. The one whose default is another here says so.
void AddServeFlags(CLI::App& app, CoordinatorOptions* options) {
  AddCoordinatorFlags(app, options);
  app.get_option("--worker-address")
      ->description(
          "Where the workers dial in: HOST:PORT or unix:PATH; default: a unix socket in $TMPDIR or "
          "/tmp");
}

// In /tmp, too, where the name of a socket in TMPDIR would have more than its 107 bytes, or others.
std::string SocketFolderPrefix() {
  constexpr size_t kLongest = 107 - sizeof("/lockstep-serve-XXXXXX/workers") + 1;
  const char* const base = std::getenv("TMPDIR");
  const bool fits = base != nullptr && *base != '\0' && std::strlen(base) <= kLongest &&
                    std::strpbrk(base, "%?#") == nullptr;  // gRPC reads it as part of a URI
  return absl::StrCat(fits ? base : "/tmp", "/lockstep-serve");
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
  AddServeFlags(app, &options);
  const absl::Status parsed = ParseWithSources(app, args);
  SayUnknownVariables("serve", options.log_format == "json");
  if (!parsed.ok()) return Fail(parsed, 2);
  if (options.print_config) {
    std::fputs(PrintConfig(app).c_str(), stdout);
    return 0;
  }
  if (absl::Status valid = ValidateOptions(options); !valid.ok()) return Fail(valid, 2);
#ifndef LOCKSTEP_CUDA
  if (options.backend == "cuda") {
    return Fail(absl::UnimplementedError("--backend cuda: this build has the cpu backend alone "
                                         "(configure with -DLOCKSTEP_CUDA=ON)"),
                2);
  }
#endif
  std::string address = options.worker_address;
  if (PortOf(address) == 0) {
    return Fail(absl::InvalidArgumentError(absl::StrCat(
                    "--worker-address ", address,
                    ": workers dial the port; give one, or leave the flag out for a socket")),
                2);
  }
  std::unique_ptr<PrivateFolder> folder;  // ends after the children
  if (address.empty()) {
    absl::StatusOr<std::unique_ptr<PrivateFolder>> made = PrivateFolder::Make(SocketFolderPrefix());
    if (!made.ok()) {
      return Fail(absl::UnavailableError(absl::StrCat(
                      std::string(made.status().message()),
                      "; set TMPDIR to a folder that can be written, or give --worker-address")),
                  1);
    }
    folder = *std::move(made);
    address = absl::StrCat("unix:", folder->path(), "/workers");
  }
  SupervisorOptions children;
  if (absl::Status planned = PlanChildren(options, args, address, &children); !planned.ok()) {
    return Fail(planned, 1);
  }
  return RunSupervisor(children);
}

}  // namespace

void AddServeCommand(CLI::App* app, const std::vector<std::string>& words, Command* chosen) {
  const std::vector<std::string> args(words.empty() ? words.end() : words.begin() + 1, words.end());
  // The flags are declared for --help and for hints; the values are read in
  // RunServe, where the file and the environment count as well.
  auto shown = std::make_shared<CoordinatorOptions>();
  CLI::App* command = app->add_subcommand("serve", "Serve a model: coordinator and workers here");
  command->group("Serve");
  AddServeFlags(*command, shown.get());
  command->callback([=] { *chosen = [args, shown] { return RunServe(args); }; });
}

}  // namespace lockstep
