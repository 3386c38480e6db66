// lockstep-worker: one rank. It needs to know nothing but where the coordinator
// is. Exit codes: 0 when told to end, 1 when refused or unable to start, 2 for a
// bad command line or one that no restart can follow (what this build lacks, a plain
// dial beyond this host), 75 when a closed epoch could not be let go of (start it
// again). The last line on stderr says why.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/flag_sources.h"
#include "common/log.h"
#include "common/process_events.h"
#include "common/service_manager.h"
#include "common/supervisor_link.h"
#include "common/variables.h"
#include "common/version.h"
#include "wire/plane_tls.h"
#include "worker/checkpoint_host.h"
#include "worker/comm/gloo_communicator.h"
#include "worker/device_info.h"
#include "worker/fault_injection.h"
#include "worker/gpu.h"
#include "worker/grpc_plane.h"
#include "worker/session.h"

namespace lockstep {
namespace {

constexpr int kBadCommandLine = 2;
constexpr int kStuckExitCode = 75;  // EX_TEMPFAIL

struct WorkerOptions {
  std::string coordinator = "127.0.0.1:50052";
  std::string backend = "cpu";
  int32_t device = 0;
  uint32_t threads = 0;
  int32_t preferred_rank = -1;
  std::string comm_address;
  std::string worker_ssl_certfile, worker_ssl_keyfile, worker_ssl_ca_certs;
  bool insecure = false;
  std::string log_format = "text";
  std::string log_level = "info";
  bool exit_with_parent = false;
  std::string inject;
  bool print_config = false;
  std::string config;
};

void AddFlags(CLI::App& app, WorkerOptions* o) {
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  app.set_version_flag("--version", absl::StrCat("lockstep-worker ", kVersion));
  const char* g = "Network";
  app.add_option("--coordinator", o->coordinator,
                 "HOST:PORT or unix:PATH that the coordinator has as --worker-address")
      ->capture_default_str()
      ->group(g);
  app.add_option(
         "--comm-address", o->comm_address,
         "Address of this host for the other ranks; default: the one that leads to the coordinator")
      ->group(g);
  app.add_option("--worker-ssl-certfile", o->worker_ssl_certfile,
                 "PEM certificate to show the coordinator, with lockstep-worker among its DNS "
                 "names; read at every dial")
      ->group(g);
  app.add_option("--worker-ssl-keyfile", o->worker_ssl_keyfile, "PEM key of --worker-ssl-certfile")
      ->group(g);
  app.add_option("--worker-ssl-ca-certs", o->worker_ssl_ca_certs,
                 "PEM certificates; the coordinator needs one that these signed, named "
                 "lockstep-coordinator")
      ->group(g);
  app.add_flag("--insecure", o->insecure, "Dial beyond this host in plain text")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeLast)
      ->group(g);
  g = "Compute";
  app.add_option("--backend", o->backend, "cpu or cuda")->capture_default_str()->group(g);
  app.add_option("--device", o->device, "GPU of this host, as the driver counts them")
      ->capture_default_str()
      ->group(g);
  app.add_option("--threads", o->threads, "Compute threads; 0: what the coordinator says")
      ->capture_default_str()
      ->group(g);
  app.add_option("--preferred-rank", o->preferred_rank, "Rank to ask for; -1: any")
      ->capture_default_str()
      ->group(g);
  g = "Operations";
  app.add_option("--log-format", o->log_format, "text or json")->capture_default_str()->group(g);
  app.add_option("--log-level", o->log_level, "debug, info, warning or error")
      ->capture_default_str()
      ->group(g);
  app.add_flag("--exit-with-parent", o->exit_with_parent, "End when the parent process ends")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeLast)
      ->group(g);
  app.add_flag("--print-config", o->print_config, "Print the resulting configuration and exit")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeLast)
      ->group(g);
  app.add_option("--config", o->config, "File of flags: key = value lines (LOCKSTEP_WORKER_CONFIG)")
      ->group(g);
  app.add_option("--inject", o->inject, "Faults, for tests")->group("");  // not in --help
}

int Fail(const absl::Status& status, int code) {
  const std::string said(status.message());
  if (LogsJson()) {
    LogError(said);
  } else {
    std::fprintf(stderr, "lockstep-worker: %s\n", EscapeControl(said).c_str());
  }
  return code;
}

TlsFiles PlaneTls(const WorkerOptions& o) {
  return {o.worker_ssl_certfile, o.worker_ssl_keyfile, o.worker_ssl_ca_certs};
}

absl::Status Validate(const WorkerOptions& o) {
  if (o.coordinator.empty()) {
    return absl::InvalidArgumentError("--coordinator: expected HOST:PORT or unix:PATH");
  }
  if (o.backend != "cpu" && o.backend != "cuda") {
    return absl::InvalidArgumentError(
        absl::StrCat("--backend ", o.backend, ": expected cpu or cuda"));
  }
  if (o.device < 0 || o.device > 255) {
    return absl::InvalidArgumentError(absl::StrCat("--device ", o.device, ": expected 0 to 255"));
  }
  if (o.threads > 4'096) {
    return absl::InvalidArgumentError(
        absl::StrCat("--threads ", o.threads, ": expected 0 to 4096"));
  }
  if (o.preferred_rank < -1 || o.preferred_rank > 255) {
    return absl::InvalidArgumentError(
        absl::StrCat("--preferred-rank ", o.preferred_rank, ": expected -1 to 255"));
  }
  if (o.log_format != "text" && o.log_format != "json") {
    return absl::InvalidArgumentError(
        absl::StrCat("--log-format ", o.log_format, ": expected text or json"));
  }
  if (const absl::StatusOr<LogLevel> level = ParseLogLevel(o.log_level); !level.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--log-level: ", std::string(level.status().message())));
  }
  if (absl::Status tls = CheckPlaneTls(PlaneTls(o)); !tls.ok()) return tls;
  return ParseFaults(o.inject).status();
}

SessionOptions MakeSessionOptions(const WorkerOptions& o, Gpu* gpu) {
  const DeviceInfo device = ReadDeviceInfo();
  SessionOptions options;
  worker::v1::Hello& hello = options.hello;
  hello.set_protocol_version(wire::kProtocolVersion);
  hello.set_build_version(kVersion);
  hello.set_host(device.host);
  hello.set_pid(static_cast<uint32_t>(getpid()));
  hello.set_instance(NewInstanceName());
  hello.set_backend(o.backend);
  hello.set_device(device.processor);
  hello.set_collective_library(GlooVersion());
  hello.set_preferred_rank(o.preferred_rank);
  hello.set_num_cpu_threads(device.num_threads);
  options.read_memory = [] {
    const DeviceInfo now = ReadDeviceInfo();
    return std::pair(now.memory_total_bytes, now.memory_free_bytes);
  };
  options.comm_address = o.comm_address;
  options.runner.collective_library = GlooVersion();
  options.runner.terminal =
      isatty(STDERR_FILENO) == 1 || std::getenv(kProgressBarsVariable) != nullptr;
  options.runner.make_communicator = MakeGlooCommunicator;
  if (gpu == nullptr) return options;
  const GpuInfo info = gpu->Info();
  hello.set_device(info.name);
  hello.set_device_uuid(info.uuid);
  hello.set_collective_library(gpu->collective_library());
  options.runner.collective_library = gpu->collective_library();
  options.read_memory = [gpu] {
    const GpuInfo now = gpu->Info();
    return std::pair(now.memory_total_bytes, now.memory_free_bytes);
  };
  options.take_device_stats = [gpu] { return gpu->TakeStats(); };
  options.runner.open_trace = [gpu] { return gpu->OpenTrace(); };
  options.runner.make_communicator = [gpu](const CommunicatorOptions& communicator) {
    return gpu->MakeCommunicator(communicator);
  };
  return options;
}

int CodeOf(SessionEnd end) {
  switch (end) {
    case SessionEnd::kStuck:
      return kStuckExitCode;
    case SessionEnd::kRefused:
      return 1;
    case SessionEnd::kForbidden:
      return kBadCommandLine;
    case SessionEnd::kStopped:
    case SessionEnd::kShutdown:
      break;
  }
  return 0;
}

int Run(const WorkerOptions& o, const ProcessEvents& events, ServiceManager& service) {
  std::unique_ptr<Gpu> gpu;
  if (o.backend == "cuda") {
    absl::StatusOr<std::unique_ptr<Gpu>> opened = Gpu::Open(o.device);
    if (!opened.ok()) {
      // What this build lacks comes with no restart; a driver or a GPU may.
      return Fail(opened.status(), absl::IsUnimplemented(opened.status()) ? kBadCommandLine : 1);
    }
    gpu = *std::move(opened);
  }
  SessionOptions options = MakeSessionOptions(o, gpu.get());
  options.runner.on_ready = [&service] { service.Ready(); };
  service.Status(absl::StrCat("waiting for the coordinator at ", o.coordinator));
  std::unique_ptr<ModelHost> host =
      InjectFaults(*ParseFaults(o.inject), MakeCheckpointHost(o.threads, gpu.get()),
                   &options.runner.make_communicator);
  Session session(std::move(options), MakeGrpcPlane(o.coordinator, o.insecure, PlaneTls(o)),
                  std::move(host));
  std::thread signals([&] {
    ProcessEvents::Event event;
    do {
      service.Beat();
      event = events.Wait(service.MsUntilBeat());
    } while (event == ProcessEvents::Event::kTimeout);
    service.Stopping();
    if (event == ProcessEvents::Event::kTerminate) session.Stop();
  });
  const SessionEnd end = session.Run();
  events.Wake();
  signals.join();
  const int code = CodeOf(end);
  // Whatever computes still is not waited for.
  if (!session.idle()) _exit(code);
  return code;
}

int Main(int argc, char** argv) {
  ServiceManager service;
  // A child of `lockstep serve` inherits its environment: the file that
  // LOCKSTEP_CONFIG names is the coordinator's, and faults are for the command
  // line alone.
  unsetenv("LOCKSTEP_INJECT");
  if (const char* own = std::getenv("LOCKSTEP_WORKER_CONFIG")) {
    setenv("LOCKSTEP_CONFIG", own, /*overwrite=*/1);
  } else {
    unsetenv("LOCKSTEP_CONFIG");
  }
  CLI::App app{"One rank of a model: computes what the coordinator plans.", "lockstep-worker"};
  WorkerOptions options;
  AddFlags(app, &options);
  const absl::Status parsed = ParseWithSources(app, {argv + 1, argv + argc});
  if (absl::IsNotFound(parsed)) {
    std::fputs(std::string(parsed.message()).c_str(), stdout);
    return 0;
  }
  InitLog({.level = ParseLogLevel(options.log_level).value_or(LogLevel::kInfo),
           .json = options.log_format == "json",
           .source = absl::StrCat("worker ", getpid())});
  for (const std::string& line : TakeUnknownVariables()) LogWarning(line);
  if (!parsed.ok()) return Fail(parsed, 2);
  if (options.print_config) {
    std::fputs(PrintConfig(app).c_str(), stdout);
    return 0;
  }
  if (const absl::Status valid = Validate(options); !valid.ok()) return Fail(valid, 2);
  // gRPC's own lines would come between ours; what it has to say is in our errors.
  setenv("GRPC_VERBOSITY", "NONE", /*overwrite=*/0);
  // Before any thread: they inherit the blocked signals.
  const absl::StatusOr<ProcessEvents> events = ProcessEvents::Install();
  if (!events.ok()) return Fail(events.status(), 1);
  if (options.exit_with_parent && !DieWithParent()) {
    return Fail(absl::UnavailableError("--exit-with-parent: the parent is gone"), 1);
  }
  return Run(options, *events, service);
}

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) { return lockstep::Main(argc, argv); }
