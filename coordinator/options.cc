#include "coordinator/options.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/flag_sources.h"
#include "common/log.h"
#include "coordinator/api/address.h"
#include "wire/protocol.h"

namespace lockstep {
namespace {

absl::Status Bad(std::string_view message) {
  return absl::InvalidArgumentError(std::string(message));
}

bool IsOneOf(const std::string& value, std::initializer_list<const char*> allowed) {
  return std::find(allowed.begin(), allowed.end(), value) != allowed.end();
}

absl::Status CheckChoice(const char* flag, const std::string& value,
                         std::initializer_list<const char*> allowed) {
  if (IsOneOf(value, allowed)) return absl::OkStatus();
  return Bad(absl::StrCat(flag, " '", value, "': expected one of ", absl::StrJoin(allowed, ", ")));
}

absl::Status CheckRange(const char* flag, uint64_t value, uint64_t low, uint64_t high,
                        const char* unit) {
  if (value >= low && value <= high) return absl::OkStatus();
  return Bad(absl::StrCat(flag, " ", value, ": expected ", low, " to ", high, unit));
}

}  // namespace

void AddCoordinatorFlags(CLI::App& app, CoordinatorOptions* o) {
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  const auto flag = [&app](const char* name, bool* value, const char* help, const char* group) {
    app.add_flag(name, *value, help)
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeLast)
        ->group(group);
  };
  const auto option = [&app](const char* name, auto* value, const char* help, const char* group) {
    app.add_option(name, *value, help)->capture_default_str()->group(group);
  };
  const char* g = "Model";
  option("--model", &o->model, "Hugging Face model directory", g);
  option("--served-model-name", &o->served_model_name,
         "Name in the APIs; default: the directory's name", g);
  option("--backend", &o->backend, "cpu or cuda", g);
  option("--tensor-parallel-size", &o->tensor_parallel_size, "Workers the weights are split over",
         g);
  option("--dtype", &o->dtype, "auto (the checkpoint's), float32, bfloat16 or float16", g);
  option("--load-format", &o->load_format, "auto, or dummy: random weights from config.json", g);
  option("--quantization", &o->quantization, "fp8; default: as the checkpoint", g);
  option("--kv-cache-dtype", &o->kv_cache_dtype,
         "auto (the serving dtype) or fp8 (cuda): a byte a value, twice the KV blocks", g);
  option("--max-model-len", &o->max_model_len,
         "Tokens of a prompt and its answer; 0: the smaller of 8192 and the model's", g);
  g = "Memory";
  option("--block-size", &o->block_size, "Tokens a KV block", g);
  option("--num-kv-blocks", &o->num_kv_blocks, "KV blocks a rank; 0: as memory allows", g);
  option("--gpu-memory-utilization", &o->gpu_memory_utilization,
         "Share of each GPU's memory to use", g);
  flag("--enable-prefix-caching,!--no-enable-prefix-caching", &o->enable_prefix_caching,
       "Keep the KV of prompts that may come again (default on)", g);
  option("--cpu-threads", &o->cpu_threads,
         "Compute threads a rank; 0: the host's processors over its ranks", g);
  g = "Requests";
  option("--max-num-seqs", &o->max_num_seqs,
         "Sequences that run at once; 0: what fits at a quarter of --max-model-len, at most 64 "
         "(cpu) or 256 (cuda)",
         g);
  option("--max-num-batched-tokens", &o->max_num_batched_tokens,
         "Tokens a step; 0: 2048 (cpu) or 8192 (cuda)", g);
  option("--max-queued-requests", &o->max_queued_requests,
         "Requests that may wait; 0: 4 x --max-num-seqs, at least 64", g);
  g = "Network";
  option("--host", &o->host, "Address of the HTTP and gRPC doors", g);
  option("--http-port", &o->http_port, "0: any free port", g);
  option("--grpc-port", &o->grpc_port, "0: any free port", g);
  option("--health-port", &o->health_port,
         "Plain HTTP for /health and /ready alone, for probers without a certificate; 0: none", g);
  option("--worker-address", &o->worker_address,
         "Where workers dial in: HOST:PORT (port 0: any) or unix:PATH; default: 127.0.0.1:50052",
         g);
  option("--worker-ssl-certfile", &o->worker_ssl_certfile,
         "PEM certificate for the workers' plane, with lockstep-coordinator among its DNS names; "
         "read again when it changes",
         g);
  option("--worker-ssl-keyfile", &o->worker_ssl_keyfile, "PEM key of --worker-ssl-certfile", g);
  option("--worker-ssl-ca-certs", &o->worker_ssl_ca_certs,
         "PEM certificates; workers need one that these signed, named lockstep-worker", g);
  option("--admin-address", &o->admin_address,
         "Where `lockstep profile` asks: HOST:PORT of loopback or unix:PATH; default: 127.0.0.1, "
         "two above --grpc-port",
         g);
  flag("--insecure", &o->insecure, "Serve in plain text beyond loopback", g);
  option("--ssl-certfile", &o->ssl_certfile,
         "PEM certificate of the doors, which then speak TLS; read again when it changes", g);
  option("--ssl-keyfile", &o->ssl_keyfile, "PEM key of --ssl-certfile", g);
  option("--ssl-ca-certs", &o->ssl_ca_certs,
         "PEM certificates; clients then need one that these signed", g);
  option("--api-key-file", &o->api_key_file,
         "Lines of SHA256-OF-KEY NAME; clients then send 'Authorization: Bearer KEY'", g);
  option("--allowed-origins", &o->allowed_origins,
         "Web pages that may ask from a browser, separated by commas; * for all", g);
  flag("--reflection", &o->reflection, "gRPC server reflection", g);
  option("--port-file", &o->port_file, "JSON file with the ports, written once ready", g);
  g = "Operations";
  option("--drain-grace", &o->drain_grace_s,
         "Seconds after SIGTERM in which the server is not ready but serves what still comes", g);
  option("--drain-timeout", &o->drain_timeout_s, "Seconds that running requests get at SIGTERM", g);
  option("--recovery-timeout", &o->recovery_timeout_s,
         "Seconds that requests wait for a broken group", g);
  option("--log-format", &o->log_format, "text or json", g);
  option("--log-level", &o->log_level, "debug, info, warning or error", g);
  flag("--exit-with-parent", &o->exit_with_parent, "End when the parent process ends", g);
  flag("--print-config", &o->print_config, "Print the resulting configuration and exit", g);
  option("--config", &o->config, "File of flags: key = value lines", g);
}

namespace {

// The default port of the admin door is easily given to another one, whose own error
// would send people after some other server.
absl::Status CheckAdminPort(const CoordinatorOptions& o) {
  const std::string admin = AdminAddress(o);
  const bool same_host = IsOneOf(o.host, {"", "127.0.0.1", "localhost", "0.0.0.0", "::", "[::]"});
  if (!same_host) return absl::OkStatus();
  for (const auto& [name, port] :
       {std::pair("--http-port", o.http_port), std::pair("--grpc-port", o.grpc_port),
        std::pair("--health-port", o.health_port)}) {
    if (port == 0 || admin != absl::StrCat("127.0.0.1:", port)) continue;
    return Bad(absl::StrCat(name, " ", port, " is --admin-address, too",
                            o.admin_address.empty() ? " (by default two above --grpc-port)" : "",
                            "; give another ", name, " or --admin-address"));
  }
  return absl::OkStatus();
}

// What gRPC would take for another address, or for a port that nobody meant.
absl::Status CheckWorkerAddress(const CoordinatorOptions& o) {
  const std::string address = WorkerAddress(o);
  if (absl::StartsWith(address, "unix:") || PortOf(address)) return absl::OkStatus();
  return Bad(absl::StrCat("--worker-address ", address,
                          ": expected HOST:PORT with a port of 0 to 65535, or unix:PATH"));
}

absl::Status Check(const CoordinatorOptions& o) {
  if (o.model.empty()) return Bad("--model: a model directory is needed");
  const absl::Status checks[] = {
      CheckChoice("--backend", o.backend, {"cpu", "cuda"}),
      CheckChoice("--dtype", o.dtype, {"auto", "float32", "bfloat16", "float16"}),
      CheckChoice("--load-format", o.load_format, {"auto", "dummy"}),
      CheckChoice("--quantization", o.quantization, {"", "fp8"}),
      CheckChoice("--kv-cache-dtype", o.kv_cache_dtype, {"auto", "fp8", "fp8_e4m3"}),
      CheckChoice("--log-format", o.log_format, {"text", "json"}),
      CheckRange("--tensor-parallel-size", o.tensor_parallel_size, 1, 64, " workers"),
      CheckRange("--block-size", o.block_size, 1, 1024, " tokens"),
      CheckRange("--num-kv-blocks", o.num_kv_blocks, 0, 1u << 24, " blocks"),
      CheckRange("--max-num-seqs", o.max_num_seqs, 0, 65'536, " sequences"),
      CheckRange("--max-model-len", o.max_model_len, 0, wire::kMaxNewTokens, " tokens"),
      CheckRange("--max-num-batched-tokens", o.max_num_batched_tokens, 0, 1u << 18, " tokens"),
      CheckRange("--max-queued-requests", o.max_queued_requests, 0, 1u << 20, " requests"),
      CheckRange("--cpu-threads", o.cpu_threads, 0, 1'024, " threads"),
      CheckRange("--http-port", o.http_port, 0, 65'535, ""),
      CheckRange("--grpc-port", o.grpc_port, 0, 65'535, ""),
      CheckRange("--health-port", o.health_port, 0, 65'535, ""),
  };
  for (const absl::Status& check : checks) {
    if (!check.ok()) return check;
  }
  if (absl::StatusOr<LogLevel> level = ParseLogLevel(o.log_level); !level.ok()) {
    return Bad(absl::StrCat("--log-level: ", std::string(level.status().message())));
  }
  if (!(o.gpu_memory_utilization > 0 && o.gpu_memory_utilization <= 1)) {
    return Bad(absl::StrCat("--gpu-memory-utilization ", o.gpu_memory_utilization,
                            ": expected more than 0 and at most 1"));
  }
  for (const auto& [name, seconds] : {std::pair("--drain-grace", o.drain_grace_s),
                                      std::pair("--drain-timeout", o.drain_timeout_s),
                                      std::pair("--recovery-timeout", o.recovery_timeout_s)}) {
    if (!(seconds >= 0 && seconds <= 86'400)) {
      return Bad(absl::StrCat(name, " ", seconds, ": expected 0 to 86400 seconds"));
    }
  }
  if (o.max_num_batched_tokens != 0 && o.max_num_seqs > o.max_num_batched_tokens) {
    return Bad(absl::StrCat("--max-num-seqs ", o.max_num_seqs, " exceeds --max-num-batched-tokens ",
                            o.max_num_batched_tokens, ": every running sequence needs a token"));
  }
  if (o.http_port != 0 && o.http_port == o.grpc_port) {
    return Bad(absl::StrCat("--http-port ", o.http_port, " is --grpc-port, too"));
  }
  for (const auto& [name, port] :
       {std::pair("--http-port", o.http_port), std::pair("--grpc-port", o.grpc_port)}) {
    if (o.health_port == 0 || o.health_port != port) continue;
    return Bad(absl::StrCat("--health-port ", port, " is ", name, ", too"));
  }
  if (absl::Status admin = CheckAdminPort(o); !admin.ok()) return admin;
  if (const std::string admin = AdminAddress(o); !IsLocalAddress(admin)) {
    return Bad(absl::StrCat("--admin-address ", admin,
                            ": never leaves this host; use 127.0.0.1:PORT or unix:PATH"));
  }
  if (absl::Status worker = CheckWorkerAddress(o); !worker.ok()) return worker;
  if (o.insecure) return absl::OkStatus();
  if (!IsLocalAddress(o.host) && o.ssl_certfile.empty()) {
    return Bad(absl::StrCat("--host ", o.host,
                            ": others could read the traffic; use loopback, --ssl-certfile, or "
                            "--insecure on a network you trust"));
  }
  if (!IsLocalAddress(WorkerAddress(o)) && o.worker_ssl_certfile.empty()) {
    return Bad(absl::StrCat("--worker-address ", o.worker_address,
                            ": others could read the traffic; use loopback, "
                            "--worker-ssl-certfile, or --insecure on a network you trust"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ValidateOptions(const CoordinatorOptions& o) {
  absl::Status checked = Check(o);
  if (checked.ok()) return checked;
  return FlagError(std::string(checked.message()));
}

std::string AdminAddress(const CoordinatorOptions& options) {
  if (!options.admin_address.empty()) return options.admin_address;
  const bool any = options.grpc_port == 0 || options.grpc_port > 65'533;
  return absl::StrCat("127.0.0.1:", any ? 0 : options.grpc_port + 2);
}

std::string WorkerAddress(const CoordinatorOptions& options) {
  return options.worker_address.empty() ? "127.0.0.1:50052" : options.worker_address;
}

std::optional<uint16_t> PortOf(const std::string& address) {
  const size_t colon = address.rfind(':');
  if (colon == std::string::npos || colon == 0 || absl::StartsWith(address, "unix:")) return {};
  const std::string host = address.substr(0, colon), port = address.substr(colon + 1);
  // Without brackets the last part of an IPv6 address looks like a port.
  const bool brackets = host.size() > 2 && host.front() == '[' && host.back() == ']';
  if (!brackets && host.find_first_of(":[]") != std::string::npos) return {};
  uint32_t value = 0;
  const bool digits = port.find_first_not_of("0123456789") == std::string::npos;
  if (!digits || !absl::SimpleAtoi(port, &value) || value > 65'535) return {};
  return static_cast<uint16_t>(value);
}

bool IsLocalAddress(const std::string& address) {
  if (absl::StartsWith(address, "unix:")) return true;
  std::string host = address;
  const size_t colon = host.rfind(':');
  // One colon separates a port; an address in brackets may be followed by one.
  if (colon != std::string::npos && (host.find(':') == colon || host.front() == '[')) {
    const size_t bracket = host.rfind(']');
    if (bracket == std::string::npos || bracket < colon) host.resize(colon);
  }
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  }
  return IsLoopback(host);
}

}  // namespace lockstep
