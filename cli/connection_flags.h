// How a command reaches a server: an address that already answers, or a model
// to serve privately for as long as the command runs.
#ifndef LOCKSTEP_CLI_CONNECTION_FLAGS_H_
#define LOCKSTEP_CLI_CONNECTION_FLAGS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "CLI/App.hpp"
#include "absl/status/statusor.h"
#include "cli/client.h"
#include "cli/local_server.h"
#include "cli/server_access.h"

namespace lockstep {

struct ConnectionFlags {
  std::string address = "127.0.0.1:50051";
  std::string model;
  uint32_t tensor_parallel_size = 1;
  ServerAccess access;                   // to the address
  std::vector<std::string> serve_flags;  // further flags for the private server
};

void AddConnectionFlags(CLI::App* app, ConnectionFlags* flags);

struct Connection {
  std::unique_ptr<LocalServer> server;  // null when an address was given
  std::unique_ptr<Client> client;
  v1::GetModelInfoResponse info;
};

// Unavailable when nothing answers within a few seconds, with what to start;
// Unauthenticated when what answers wants another key.
absl::StatusOr<Connection> Connect(const ConnectionFlags& flags);

// Which rank holds which share of the weights, and where the start-up seconds
// went; on stderr.
void PrintModelInfo(const v1::GetModelInfoResponse& info);

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_CONNECTION_FLAGS_H_
