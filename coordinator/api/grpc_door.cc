#include "coordinator/api/grpc_door.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/impl/server_builder_option.h>
#include <grpcpp/impl/server_builder_plugin.h>
#include <grpcpp/impl/service_type.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_credentials_options.h>

#include <chrono>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/api/address.h"
#include "coordinator/api/grpc_service.h"
#include "coordinator/api/limits.h"
#include "proto/health.pb.h"

namespace lockstep {
namespace {

constexpr char kServiceName[] = "lockstep.v1.Inference";
constexpr int kMaxStreamsPerConnection = 1'024;
// An answer with prompt log-probabilities is large; a client's own limit (4 MiB
// unless it says otherwise) is the one that counts.
constexpr int kMaxSendBytes = 64 * 1024 * 1024;

// Linking the reflection library turns it on for every server of the process;
// here it is a decision of each.
class ReflectionOption : public grpc::ServerBuilderOption {
 public:
  explicit ReflectionOption(bool on) : on_(on) {}
  void UpdateArguments(grpc::ChannelArguments*) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    auto plugin = std::make_unique<grpc::reflection::ProtoServerReflectionPlugin>();
    std::erase_if(*plugins, [&](const auto& each) { return each->name() == plugin->name(); });
    if (!on_) return;
    plugins->push_back(std::move(plugin));
    // gRPC's health service brings no description of itself: without this one a
    // client that goes by reflection finds its name and cannot call it.
    grpc::health::v1::HealthCheckRequest::descriptor();
  }

 private:
  const bool on_;
};

void SetLimits(const GrpcPings& pings, grpc::ServerBuilder* builder) {
  builder->SetMaxReceiveMessageSize(static_cast<int>(limits::kBodyBytes));
  builder->SetMaxSendMessageSize(kMaxSendBytes);
  // Two servers must not share a port by accident.
  builder->AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  // Clients may ping an idle connection, with or without a call.
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                              pings.client_interval_ms);
  // A client whose host vanished is noticed, and its requests cancelled.
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, pings.interval_ms);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, pings.timeout_ms);
  // Messages that are being received, of all connections: beyond it they wait.
  grpc::ResourceQuota quota("door");
  quota.Resize(limits::kBodyBytesInFlight);
  builder->SetResourceQuota(quota);
  builder->AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, kMaxStreamsPerConnection);
  builder->AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE,
                              static_cast<int>(limits::kHttpHeaderBytes));
}

// The files are looked at every second, and read again when they have changed.
std::shared_ptr<grpc::ServerCredentials> Credentials(const TlsFiles& tls) {
  if (!tls.enabled()) return grpc::InsecureServerCredentials();
  constexpr unsigned int kRefreshSeconds = 1;
  namespace experimental = grpc::experimental;
  const auto provider = std::make_shared<experimental::FileWatcherCertificateProvider>(
      tls.key, tls.certificate, tls.client_ca, kRefreshSeconds);
  experimental::TlsServerCredentialsOptions options(provider);
  options.watch_identity_key_cert_pairs();
  if (!tls.client_ca.empty()) {
    options.watch_root_certs();
    options.set_cert_request_type(GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  }
  return experimental::TlsServerCredentials(options);
}

}  // namespace

struct GrpcDoor::Impl {
  RequestPath* path;
  GrpcPings pings;
  std::unique_ptr<grpc::Service> service;
  int port = 0;
  std::mutex mutex;
  std::unique_ptr<grpc::Server> server;  // guarded by mutex
};

GrpcDoor::GrpcDoor(RequestPath* path, ApiKeys* keys, GrpcPings pings)
    : impl_(std::make_unique<Impl>()) {
  impl_->path = path;
  impl_->pings = pings;
  impl_->service = MakeInferenceService(path, keys);
}

GrpcDoor::~GrpcDoor() { Stop(0); }

absl::Status GrpcDoor::Start(const std::string& host, int port, const TlsFiles& tls,
                             bool reflection) {
  // gRPC only says that it failed; a bind of our own says why.
  absl::Status free = CheckCanBind(host, port, "--grpc-port");
  if (!free.ok()) return free;
  grpc::EnableDefaultHealthCheckService(true);
  grpc::ServerBuilder builder;
  SetLimits(impl_->pings, &builder);
  builder.SetOption(std::make_unique<ReflectionOption>(reflection));
  builder.RegisterService(impl_->service.get());
  int bound = 0;
  builder.AddListeningPort(HostPort(host, port), Credentials(tls), &bound);
  std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr || bound == 0) {
    return absl::UnavailableError(absl::StrCat("--grpc-port: cannot listen on ",
                                               HostPort(host, port), "; choose another port"));
  }
  impl_->port = bound;
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->server = std::move(server);
  }
  SetServing(false);
  return absl::OkStatus();
}

int GrpcDoor::port() const { return impl_->port; }

void GrpcDoor::SetServing(bool serving) {
  const std::lock_guard lock(impl_->mutex);
  if (impl_->server == nullptr) return;
  grpc::HealthCheckServiceInterface* const health = impl_->server->GetHealthCheckService();
  if (health == nullptr) return;
  health->SetServingStatus("", serving);
  health->SetServingStatus(kServiceName, serving);
}

void GrpcDoor::Stop(int64_t grace_ms) {
  std::unique_ptr<grpc::Server> server;
  {
    const std::lock_guard lock(impl_->mutex);
    server = std::move(impl_->server);
  }
  if (server == nullptr) return;
  server->Shutdown(std::chrono::system_clock::now() + std::chrono::milliseconds(grace_ms));
}

}  // namespace lockstep
