// Every flag of lockstep-coordinator, which `lockstep serve` passes through.
// A value comes from, in rising precedence: the default, the file that --config
// names (key = value, the flag's name without dashes), the environment
// (LOCKSTEP_ and the name in capitals), the command line.
//
//   CoordinatorOptions options;
//   CLI::App app("...");
//   AddCoordinatorFlags(app, &options);
//   absl::Status parsed = ParseWithSources(app, {argv + 1, argv + argc});
//   if (parsed.ok()) parsed = ValidateOptions(options);
//
// Errors are InvalidArgument, one line, naming the flag, file or variable.
#ifndef LOCKSTEP_COORDINATOR_OPTIONS_H_
#define LOCKSTEP_COORDINATOR_OPTIONS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace CLI {
class App;
}

namespace lockstep {

// Zero and empty mean "choose", as the flag's help says.
struct CoordinatorOptions {
  // Model
  std::string model;
  std::string served_model_name;
  std::string backend = "cpu";
  uint32_t tensor_parallel_size = 1;
  std::string dtype = "auto";
  std::string load_format = "auto";
  std::string quantization;
  std::string kv_cache_dtype = "auto";
  uint32_t max_model_len = 0;
  // Memory
  uint32_t block_size = 16;
  uint32_t num_kv_blocks = 0;
  double gpu_memory_utilization = 0.9;
  bool enable_prefix_caching = true;
  uint32_t cpu_threads = 0;
  // Requests
  uint32_t max_num_seqs = 0;
  uint32_t max_num_batched_tokens = 0;
  uint32_t max_queued_requests = 0;
  // Network
  std::string host = "127.0.0.1";
  uint32_t http_port = 8000;
  uint32_t grpc_port = 50051;
  uint32_t health_port = 0;
  std::string worker_address;
  std::string worker_ssl_certfile, worker_ssl_keyfile, worker_ssl_ca_certs;
  std::string admin_address;
  bool insecure = false;
  std::string ssl_certfile, ssl_keyfile, ssl_ca_certs;
  std::string api_key_file;
  std::string allowed_origins;  // separated by commas
  bool reflection = false;
  std::string port_file;
  // Operations
  double drain_grace_s = 0;
  double drain_timeout_s = 30;
  double recovery_timeout_s = 60;
  std::string log_format = "text";
  std::string log_level = "info";
  bool exit_with_parent = false;
  bool print_config = false;
  std::string config;
};

void AddCoordinatorFlags(CLI::App& app, CoordinatorOptions* options);

// What can be said of the values before any file is read.
absl::Status ValidateOptions(const CoordinatorOptions& options);

// --admin-address, or its default: loopback, two above --grpc-port.
std::string AdminAddress(const CoordinatorOptions& options);

// --worker-address, or the coordinator's default; `lockstep serve` has another.
std::string WorkerAddress(const CoordinatorOptions& options);

// The port of HOST:PORT; nothing for unix:PATH, and for what is neither.
std::optional<uint16_t> PortOf(const std::string& address);

// Whether nothing but this host can reach `address` (HOST, HOST:PORT, unix:PATH).
bool IsLocalAddress(const std::string& address);

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_OPTIONS_H_
