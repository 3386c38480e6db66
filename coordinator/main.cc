// lockstep-coordinator: decides what one group of workers computes, and answers
// clients. Exit codes: 0 after a drain, 1 when it cannot start or go on, 2 for
// a bad command line. The last line on stderr says why.
#include <malloc.h>
#include <sys/resource.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/flag_sources.h"
#include "common/log.h"
#include "common/process_events.h"
#include "common/service_manager.h"
#include "common/supervisor_link.h"
#include "common/variables.h"
#include "common/version.h"
#include "coordinator/api/server.h"
#include "coordinator/engine.h"
#include "coordinator/group/grpc_worker_group.h"
#include "coordinator/options.h"
#include "coordinator/serving_plan.h"
#include "coordinator/startup_report.h"
#include "nlohmann/json.hpp"

namespace lockstep {
namespace {

using Clock = std::chrono::steady_clock;

// For answers that are complete but not yet on the wire.
constexpr int64_t kLastBytesMs = 2'000;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

int Fail(const absl::Status& status) {
  const std::string said(status.message());
  if (LogsJson()) {
    LogError(said);
  } else {
    std::fprintf(stderr, "lockstep-coordinator: %s\n", EscapeControl(said).c_str());
  }
  return 1;
}

absl::Status WritePartial(const std::string& partial, const std::string& text) {
  std::ofstream file(partial, std::ios::trunc);
  file << text;
  if (file.flush()) return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat("--port-file: cannot write ", partial, ": ", std::strerror(errno)));
}

absl::Status WritePortFile(const std::string& path, const std::string& json) {
  const std::string partial = path + ".partial";
  if (absl::Status written = WritePartial(partial, json + "\n"); !written.ok()) return written;
  if (std::rename(partial.c_str(), path.c_str()) != 0) {
    return absl::UnavailableError(absl::StrCat("--port-file: cannot rename ", partial, " to ", path,
                                               ": ", std::strerror(errno)));
  }
  return absl::OkStatus();
}

// Before the load, which may take minutes.
absl::Status CheckPortFile(const std::string& path) {
  if (path.empty()) return absl::OkStatus();
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--port-file ", path, ": is a directory; name a file"));
  }
  const std::string partial = path + ".partial";
  absl::Status written = WritePartial(partial, "");
  if (written.ok()) std::remove(partial.c_str());
  return written;
}

// From the flags to the exit code; signals are events by now.
class Coordinator {
 public:
  Coordinator(const CoordinatorOptions& options, const ProcessEvents& events,
              ServiceManager& service)
      : options_(options), events_(events), service_(service) {}
  ~Coordinator() {
    // The doors end before the engine they ask.
    if (api_ != nullptr) api_->Stop(0);
    if (engine_ != nullptr) engine_->Shutdown();
  }

  absl::Status Start();
  int Run();

 private:
  absl::Status SayWhole(const EngineInfo& info);
  void Drain();

  const CoordinatorOptions& options_;
  const ProcessEvents& events_;
  ServiceManager& service_;
  const SupervisorLink supervisor_;
  Phases phases_;  // until workers could attach
  Clock::time_point open_since_;
  std::string worker_address_;
  std::unique_ptr<ApiServer> api_;
  std::unique_ptr<Engine> engine_;
  std::atomic<bool> drained_ = false;
  std::mutex ending_mutex_;
  std::condition_variable ending_now_;
  bool failed_ = false;  // guarded by ending_mutex_
};

absl::Status Coordinator::Start() {
  Clock::time_point began = Clock::now();
  const auto phase = [&](const char* name) {
    phases_.emplace_back(name, SecondsSince(std::exchange(began, Clock::now())));
  };
  if (absl::Status writable = CheckPortFile(options_.port_file); !writable.ok()) return writable;
  absl::StatusOr<ServingPlan> plan = PlanServing(options_);
  if (!plan.ok()) return plan.status();
  phase("read config");
  absl::StatusOr<ServedModel> served =
      LoadServedModel(options_.model, plan->model, plan->served_name);
  if (!served.ok()) return served.status();
  served->dtype = std::string(DTypeName(plan->shape.dtype));
  served->kv_dtype = std::string(DTypeName(plan->shape.kv_dtype.value_or(plan->shape.dtype)));
  served->max_model_len = plan->scheduler.max_model_len;
  served->tp_size = options_.tensor_parallel_size;
  served->block_size = options_.block_size;
  served->enable_prefix_caching = options_.enable_prefix_caching;
  phase("read tokenizer");

  absl::StatusOr<std::unique_ptr<GrpcWorkerGroup>> group = GrpcWorkerGroup::Listen(
      WorkerAddress(options_), MakeGroupOptions(*plan, options_),
      {options_.worker_ssl_certfile, options_.worker_ssl_keyfile, options_.worker_ssl_ca_certs});
  if (!group.ok()) {
    if (absl::StartsWith(group.status().message(), "--")) return group.status();
    return absl::Status(group.status().code(),
                        absl::StrCat("--worker-address: ", std::string(group.status().message())));
  }
  worker_address_ = (*group)->address();
  ApiOptions api_options;
  api_options.host = options_.host;
  api_options.http_port = static_cast<int>(options_.http_port);
  api_options.grpc_port = static_cast<int>(options_.grpc_port);
  if (options_.health_port != 0) api_options.health_port = static_cast<int>(options_.health_port);
  api_options.insecure = options_.insecure;
  api_options.reflection = options_.reflection;
  api_options.tls = {options_.ssl_certfile, options_.ssl_keyfile, options_.ssl_ca_certs};
  api_options.admin_address = AdminAddress(options_);
  api_options.api_key_file = options_.api_key_file;
  api_options.allowed_origins = absl::StrSplit(options_.allowed_origins, ',', absl::SkipEmpty());
  api_ = std::make_unique<ApiServer>(api_options, *std::move(served));
  EngineOptions engine_options;
  engine_options.scheduler = plan->scheduler;
  engine_options.recovery_timeout_ms = static_cast<int64_t>(options_.recovery_timeout_s * 1000);
  engine_options.on_change = [this](const EngineInfo& info) {
    api_->OnEngineChange(info);
    if (info.state == EngineState::kReady) supervisor_.Tell(SupervisorNote::kReady);
    events_.Wake();
  };
  engine_options.on_first_step = [this] { supervisor_.Tell(SupervisorNote::kServed); };
  api_->Watch(group->get());
  engine_ =
      std::make_unique<Engine>(std::move(engine_options), *std::move(group), api_->observer());
  if (absl::Status open = api_->Start(engine_.get()); !open.ok()) return open;
  engine_->Start();
  phase("open ports");
  open_since_ = began;
  LogInfo(absl::StrCat("lockstep ", kVersion, ": ", plan->model.architecture, " as ",
                       plan->served_name, " on ", options_.host, ", HTTP ", api_->http_port(),
                       ", gRPC ", api_->grpc_port(), "; waiting for ",
                       options_.tensor_parallel_size, " worker(s) at ", worker_address_));
  return absl::OkStatus();
}

absl::Status Coordinator::SayWhole(const EngineInfo& info) {
  for (const std::string& line : DescribeRanks(info)) LogInfo(line);
  const Phases startup = StartupPhases(phases_, SecondsSince(open_since_), info);
  LogInfo(absl::StrCat("start-up: ", DescribePhases(startup)));
  api_->SetStartup(startup);
  if (!options_.port_file.empty()) {
    const nlohmann::json ports = {{"http_port", api_->http_port()},
                                  {"grpc_port", api_->grpc_port()},
                                  {"admin_address", api_->admin_address()},
                                  {"worker_address", worker_address_}};
    if (absl::Status written = WritePortFile(options_.port_file, ports.dump()); !written.ok()) {
      return written;
    }
  }
  std::puts("ready");
  std::fflush(stdout);
  service_.Ready();
  supervisor_.Tell(SupervisorNote::kOpen);
  return absl::OkStatus();
}

// On a thread of its own, so that a second signal is heard.
void Coordinator::Drain() {
  if (options_.drain_grace_s > 0) {
    api_->BeginLeaving();
    std::unique_lock lock(ending_mutex_);
    ending_now_.wait_for(lock, std::chrono::duration<double>(options_.drain_grace_s),
                         [this] { return failed_; });
  }
  api_->BeginDrain();
  engine_->Drain(static_cast<int64_t>(options_.drain_timeout_s * 1000));
  api_->Stop(kLastBytesMs);
  drained_ = true;
  events_.Wake();
}

int Coordinator::Run() {
  std::thread drain;
  bool was_ready = false;
  absl::Status failure;
  while (failure.ok() && !drained_) {
    service_.Beat();
    const ProcessEvents::Event event = events_.Wait(service_.MsUntilBeat());
    if (event == ProcessEvents::Event::kTimeout) continue;
    if (event == ProcessEvents::Event::kTerminate) {
      if (drain.joinable()) {
        LogWarning("a second signal: ending at once");
        std::_Exit(1);
      }
      service_.Stopping();
      drain = std::thread([this] { Drain(); });
      continue;
    }
    const EngineInfo info = engine_->Info();
    if (info.state == EngineState::kFailed) failure = info.failure;
    if (info.state == EngineState::kReady && !std::exchange(was_ready, true)) {
      failure = SayWhole(info);
    }
  }
  if (drain.joinable()) {
    {
      const std::lock_guard lock(ending_mutex_);
      failed_ = !failure.ok();
    }
    ending_now_.notify_all();
    drain.join();
  } else {
    api_->Stop(kLastBytesMs);
    engine_->Shutdown();
  }
  return failure.ok() ? 0 : Fail(failure);
}

// Large buffers come and go with the requests. Left alone, malloc would keep ever
// larger ones in its heaps, in one heap a thread.
void KeepMemoryFlat() {
  mallopt(M_MMAP_THRESHOLD, 128 * 1024);
  mallopt(M_TRIM_THRESHOLD, 1024 * 1024);
  mallopt(M_ARENA_MAX, 2);
}

// A client's connection takes a descriptor, and a shell gives a fraction of what may be had.
void RaiseDescriptors() {
  constexpr rlim_t kEnough = 65'536;
  rlimit limit = {};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  const rlim_t wanted = std::min(kEnough, limit.rlim_max);
  if (limit.rlim_cur >= wanted) return;
  limit.rlim_cur = wanted;
  (void)setrlimit(RLIMIT_NOFILE, &limit);  // else there are as many as there are
}

int Main(int argc, char** argv) {
  KeepMemoryFlat();
  RaiseDescriptors();
  ServiceManager service;
  CLI::App app("lockstep-coordinator: schedules one group of workers and answers clients.",
               "lockstep-coordinator");
  app.set_version_flag("--version", absl::StrCat("lockstep-coordinator ", kVersion));
  CoordinatorOptions options;
  AddCoordinatorFlags(app, &options);
  absl::Status parsed = ParseWithSources(app, {argv + 1, argv + argc});
  if (absl::IsNotFound(parsed)) {
    std::fputs(std::string(parsed.message()).c_str(), stdout);
    return 0;
  }
  InitLog({ParseLogLevel(options.log_level).value_or(LogLevel::kInfo), options.log_format == "json",
           "coordinator"});
  for (const std::string& line : TakeUnknownVariables()) LogWarning(line);
  if (parsed.ok() && options.print_config) {
    std::fputs(PrintConfig(app).c_str(), stdout);
    return 0;
  }
  if (parsed.ok()) parsed = ValidateOptions(options);
  if (!parsed.ok()) {
    Fail(parsed);
    return 2;
  }
  // gRPC's own lines would come between ours; what it has to say is in our errors.
  setenv("GRPC_VERBOSITY", "NONE", /*overwrite=*/0);
  if (options.exit_with_parent && !DieWithParent()) return 1;
  const absl::StatusOr<ProcessEvents> events = ProcessEvents::Install();
  if (!events.ok()) return Fail(events.status());
  Coordinator coordinator(options, *events, service);
  if (const absl::Status started = coordinator.Start(); !started.ok()) return Fail(started);
  return coordinator.Run();
}

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) { return lockstep::Main(argc, argv); }
