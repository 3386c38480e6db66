#include "cli/connection_flags.h"

#include <cstdio>
#include <utility>

#include "CLI/Config.hpp"
#include "CLI/Formatter.hpp"
#include "absl/strings/str_cat.h"
#include "cli/terminal.h"

namespace lockstep {
namespace {

constexpr int64_t kConnectTimeoutMs = 5'000;

void PrintPhases(const google::protobuf::RepeatedPtrField<v1::LoadPhase>& phases) {
  double total = 0;
  for (const v1::LoadPhase& phase : phases) {
    std::fprintf(stderr, " %s %.3f s,", phase.name().c_str(), phase.seconds());
    total += phase.seconds();
  }
  std::fprintf(stderr, " together %.3f s\n", total);
}

}  // namespace

void AddConnectionFlags(CLI::App* app, ConnectionFlags* flags) {
  const std::string group = "Server";
  CLI::Option* address =
      app->add_option("--address", flags->address, "Server to ask: host:port or unix:path")
          ->group(group)
          ->capture_default_str();
  AddAccessFlags(app, &flags->access);
  app->add_option("--model", flags->model, "Serve this model directory just for this command")
      ->group(group)
      ->excludes(address);
  app->add_option("--tensor-parallel-size", flags->tensor_parallel_size, "Workers, with --model")
      ->group(group)
      ->capture_default_str();
  app->add_option("--serve-flag", flags->serve_flags,
                  "With --model: a flag of `lockstep serve`, as in --serve-flag=--dtype=float32")
      ->group(group)
      ->expected(1)
      ->allow_extra_args(false)  // the prompt may follow
      ->take_all();
}

absl::StatusOr<Connection> Connect(const ConnectionFlags& flags) {
  Connection connection;
  std::string address = flags.address;
  if (!flags.model.empty()) {
    std::vector<std::string> args = {"--model", flags.model, "--tensor-parallel-size",
                                     absl::StrCat(flags.tensor_parallel_size)};
    args.insert(args.end(), flags.serve_flags.begin(), flags.serve_flags.end());
    absl::StatusOr<std::unique_ptr<LocalServer>> server = LocalServer::Start(args);
    if (!server.ok()) return server.status();
    connection.server = std::move(*server);
    address = connection.server->address();
  }
  // A private server is on loopback and asks nobody who they are.
  connection.client = std::make_unique<Client>(
      address, connection.server == nullptr ? flags.access : ServerAccess{});
  absl::StatusOr<v1::GetModelInfoResponse> info = connection.client->WaitReady(kConnectTimeoutMs);
  if (absl::IsUnauthenticated(info.status())) {
    return absl::UnauthenticatedError(
        absl::StrCat("--api-key: ", address, ": ", std::string(info.status().message())));
  }
  if (!info.ok()) {
    return absl::Status(info.status().code(),
                        absl::StrCat("--address: no server answers at ", address, " (",
                                     std::string(info.status().message()),
                                     "); start one with `lockstep serve --model DIR`"));
  }
  connection.info = *std::move(info);
  return connection;
}

void PrintModelInfo(const v1::GetModelInfoResponse& info) {
  std::fprintf(stderr,
               "model %s (%s, %s): %u ranks, epoch %llu, %u KV blocks of %u tokens, context %u\n",
               info.model().c_str(), info.architecture().c_str(), info.dtype().c_str(),
               info.tp_size(), static_cast<unsigned long long>(info.epoch()), info.num_kv_blocks(),
               info.block_size(), info.max_model_len());
  for (const v1::RankInfo& rank : info.ranks()) {
    std::fprintf(stderr, "rank %u  %s of weights on %s (pid %u, %s): %s\n", rank.rank(),
                 HumanBytes(rank.weight_bytes()).c_str(), rank.host().c_str(), rank.pid(),
                 rank.collective_library().c_str(), rank.shard().c_str());
  }
  if (info.startup_size() > 0) {
    std::fprintf(stderr, "start-up:");
    PrintPhases(info.startup());
  }
  for (const v1::RankInfo& rank : info.ranks()) {
    std::fprintf(stderr, "  rank %u:", rank.rank());
    PrintPhases(rank.load_phases());
  }
}

}  // namespace lockstep
