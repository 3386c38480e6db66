#include "coordinator/api/server.h"

#include <algorithm>
#include <chrono>
#include <mutex>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/api/address.h"
#include "coordinator/api/admin_door.h"
#include "coordinator/api/api_keys.h"
#include "coordinator/api/grpc_door.h"
#include "coordinator/api/http/health_routes.h"
#include "coordinator/api/http/http_server.h"
#include "coordinator/api/http/routes.h"
#include "coordinator/api/metrics.h"
#include "coordinator/api/request_path.h"

namespace lockstep {
namespace {

// Probers ask and go: nobody can hold a place of the health port for long.
constexpr uint32_t kHealthConnections = 256;
constexpr int64_t kHealthMs = 5'000;

// What is there while the server runs, each behind what it uses. Null: no such door.
struct Doors {
  std::unique_ptr<ApiKeys> keys;
  std::unique_ptr<RequestPath> path;
  std::unique_ptr<GrpcDoor> grpc;
  std::unique_ptr<Routes> routes;
  std::unique_ptr<HttpServer> http;
  std::unique_ptr<HealthRoutes> health_routes;
  std::unique_ptr<HttpServer> health;
  std::unique_ptr<AdminDoor> admin;
};

}  // namespace

struct ApiServer::Impl {
  Impl(ApiOptions o, ServedModel m)
      : options(std::move(o)),
        model(std::move(m)),
        metrics(std::make_shared<Metrics>(
            MetricsLabels{model.name, model.block_size, model.enable_prefix_caching})) {}

  void FollowState();

  const ApiOptions options;
  const ServedModel model;
  const std::shared_ptr<Metrics> metrics;
  GroupWatch* watch = nullptr;  // set before Start
  std::mutex mutex;
  std::vector<std::pair<std::string, double>> startup;  // guarded by mutex, as what follows
  Doors doors;
};

// Health follows the state as it is now, not as it was when the news was sent.
void ApiServer::Impl::FollowState() {
  const std::lock_guard lock(mutex);
  if (doors.grpc != nullptr) doors.grpc->SetServing(doors.path->IsReady());
}

ApiServer::ApiServer(ApiOptions options, ServedModel model)
    : impl_(std::make_unique<Impl>(std::move(options), std::move(model))) {}

ApiServer::~ApiServer() { Stop(0); }

std::shared_ptr<EngineObserver> ApiServer::observer() { return impl_->metrics; }

void ApiServer::Watch(GroupWatch* watch) {
  impl_->watch = watch;
  impl_->metrics->WatchDevices(watch);
}

void ApiServer::OnEngineChange(const EngineInfo&) { impl_->FollowState(); }

void ApiServer::SetStartup(std::vector<std::pair<std::string, double>> phases) {
  const std::lock_guard lock(impl_->mutex);
  if (impl_->doors.path != nullptr) {
    impl_->doors.path->SetStartup(std::move(phases));
  } else {
    impl_->startup = std::move(phases);
  }
}

absl::Status ApiServer::Start(EngineClient* engine) {
  const ApiOptions& options = impl_->options;
  if (absl::Status status = CheckTlsFiles(options.tls); !status.ok()) return status;
  if (!IsLoopback(options.host) && !options.tls.enabled() && !options.insecure) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--host ", options.host, ": not a loopback address; use --ssl-certfile, or --insecure"));
  }
  Doors doors;
  if (!options.api_key_file.empty()) {
    absl::StatusOr<std::unique_ptr<ApiKeys>> loaded = ApiKeys::Load(options.api_key_file);
    if (!loaded.ok()) return loaded.status();
    doors.keys = *std::move(loaded);
  }
  doors.path = std::make_unique<RequestPath>(engine, &impl_->model, impl_->metrics.get(),
                                             options.text_threads);
  if (options.grpc_port >= 0) {
    doors.grpc = std::make_unique<GrpcDoor>(doors.path.get(), doors.keys.get(), options.grpc_pings);
    absl::Status status =
        doors.grpc->Start(options.host, options.grpc_port, options.tls, options.reflection);
    if (!status.ok()) return status;
  }
  if (impl_->watch != nullptr && !options.admin_address.empty()) {
    doors.admin = std::make_unique<AdminDoor>(impl_->watch);
    if (absl::Status status = doors.admin->Start(options.admin_address); !status.ok())
      return status;
  }
  doors.routes =
      std::make_unique<Routes>(doors.path.get(), doors.keys.get(), options.allowed_origins);
  if (options.http_port >= 0) {
    doors.http = std::make_unique<HttpServer>(
        HttpServerOptions{.host = options.host,
                          .port = options.http_port,
                          .max_connections = options.max_http_connections,
                          .write_timeout_ms = options.write_timeout_ms,
                          .ping_interval_ms = options.ping_interval_ms,
                          .tls = options.tls},
        doors.routes.get());
    if (absl::Status status = doors.http->Start(); !status.ok()) return status;
  }
  doors.health_routes = std::make_unique<HealthRoutes>(doors.routes.get());
  if (options.health_port >= 0) {
    doors.health =
        std::make_unique<HttpServer>(HttpServerOptions{.host = options.host,
                                                       .port = options.health_port,
                                                       .flag = "--health-port",
                                                       .max_connections = kHealthConnections,
                                                       .threads = 1,
                                                       .header_timeout_ms = kHealthMs,
                                                       .body_timeout_ms = kHealthMs,
                                                       .idle_timeout_ms = kHealthMs,
                                                       .write_timeout_ms = kHealthMs},
                                     doors.health_routes.get());
    if (absl::Status status = doors.health->Start(); !status.ok()) return status;
  }
  {
    const std::lock_guard lock(impl_->mutex);
    if (!impl_->startup.empty()) doors.path->SetStartup(std::move(impl_->startup));
    impl_->doors = std::move(doors);
  }
  impl_->FollowState();
  return absl::OkStatus();
}

int ApiServer::http_port() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->doors.http == nullptr ? -1 : impl_->doors.http->port();
}

int ApiServer::grpc_port() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->doors.grpc == nullptr ? -1 : impl_->doors.grpc->port();
}

int ApiServer::health_port() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->doors.health == nullptr ? -1 : impl_->doors.health->port();
}

std::string ApiServer::admin_address() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->doors.admin == nullptr ? "" : impl_->doors.admin->address();
}

void ApiServer::BeginLeaving() {
  {
    const std::lock_guard lock(impl_->mutex);
    if (impl_->doors.path == nullptr) return;
    impl_->doors.path->BeginLeaving();
  }
  impl_->FollowState();
}

void ApiServer::BeginDrain() {
  {
    const std::lock_guard lock(impl_->mutex);
    if (impl_->doors.path == nullptr) return;
    impl_->doors.path->BeginDrain();
  }
  impl_->FollowState();
}

void ApiServer::Stop(int64_t grace_ms) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point deadline = Clock::now() + std::chrono::milliseconds(grace_ms);
  Doors doors;
  {
    const std::lock_guard lock(impl_->mutex);
    doors = std::exchange(impl_->doors, {});
  }
  if (doors.path == nullptr) return;
  doors.path->BeginDrain();
  if (doors.admin != nullptr) doors.admin->Stop();
  if (doors.http != nullptr) doors.http->Stop(grace_ms);
  const auto left =
      std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
  if (doors.grpc != nullptr) doors.grpc->Stop(std::max<int64_t>(left, 0));
  if (doors.health != nullptr) doors.health->Stop(0);  // last: who still answers is alive
  doors.path->Stop();
}

}  // namespace lockstep
