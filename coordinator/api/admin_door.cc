#include "coordinator/api/admin_door.h"

#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/impl/server_builder_option.h>
#include <grpcpp/impl/server_builder_plugin.h>
#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/unix_socket.h"
#include "coordinator/api/address.h"
#include "proto/admin.grpc.pb.h"

namespace lockstep {
namespace {

constexpr size_t kPieceBytes = 1 << 20;
constexpr uint32_t kDefaultTimeoutMs = 30'000, kMaxTimeoutMs = 600'000;

// Calls are rare and long: each has a thread of gRPC's to wait on.
class AdminService final : public v1::Admin::Service {
 public:
  explicit AdminService(GroupWatch* watch) : watch_(watch) {}

  grpc::Status Profile(grpc::ServerContext* context, const v1::ProfileRequest* request,
                       grpc::ServerWriter<v1::ProfileReply>* writer) override {
    const uint32_t timeout_ms = request->timeout_ms() == 0
                                    ? kDefaultTimeoutMs
                                    : std::min(request->timeout_ms(), kMaxTimeoutMs);
    const absl::StatusOr<std::string> json =
        watch_->Profile(request->steps(), timeout_ms, [context] { return context->IsCancelled(); });
    if (!json.ok()) {
      return {static_cast<grpc::StatusCode>(json.status().code()),
              std::string(json.status().message())};
    }
    for (size_t at = 0; at < json->size(); at += kPieceBytes) {
      v1::ProfileReply reply;
      reply.set_json(json->substr(at, kPieceBytes));
      if (!writer->Write(reply)) break;
    }
    return grpc::Status::OK;
  }

 private:
  GroupWatch* const watch_;
};

// Nothing that is linked in offers itself here.
class NoPlugins final : public grpc::ServerBuilderOption {
 public:
  void UpdateArguments(grpc::ChannelArguments*) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    plugins->clear();
  }
};

absl::Status Bad(const std::string& why) {
  return absl::InvalidArgumentError(absl::StrCat("--admin-address ", why));
}

// What gRPC would not explain.
absl::Status CheckAddress(const std::string& address) {
  if (absl::StartsWith(address, "unix:")) {
    const absl::Status free = CheckUnixSocketIsFree(address);
    return free.ok() ? free : Bad(std::string(free.message()));
  }
  const size_t colon = address.rfind(':');
  int port = 0;
  if (colon == std::string::npos || !absl::SimpleAtoi(address.substr(colon + 1), &port) ||
      port < 0 || port > 65'535) {
    return Bad(absl::StrCat(address, ": expected HOST:PORT or unix:PATH"));
  }
  std::string host = address.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  }
  if (!IsLoopback(host)) {
    return Bad(absl::StrCat(address, ": never leaves this host; use 127.0.0.1 or unix:PATH"));
  }
  return CheckCanBind(host, port, "--admin-address");
}

}  // namespace

struct AdminDoor::Impl {
  explicit Impl(GroupWatch* watch) : service(watch) {}

  AdminService service;
  std::string address;
  std::unique_ptr<grpc::Server> server;
};

AdminDoor::AdminDoor(GroupWatch* watch) : impl_(std::make_unique<Impl>(watch)) {}

AdminDoor::~AdminDoor() { Stop(); }

absl::Status AdminDoor::Start(const std::string& address) {
  if (absl::Status status = CheckAddress(address); !status.ok()) return status;
  const bool is_unix = absl::StartsWith(address, "unix:");
  // The doors switch the health service on for every server of the process.
  grpc::EnableDefaultHealthCheckService(false);
  grpc::ServerBuilder builder;
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.SetOption(std::make_unique<NoPlugins>());
  builder.RegisterService(&impl_->service);
  int port = 0;
  builder.AddListeningPort(address, grpc::InsecureServerCredentials(), &port);
  impl_->server = builder.BuildAndStart();
  if (impl_->server == nullptr || port == 0) {
    impl_->server.reset();
    return absl::UnavailableError(
        absl::StrCat("--admin-address ", address, ": cannot listen there; choose another"));
  }
  if (is_unix) chmod(address.c_str() + sizeof("unix:") - 1, S_IRUSR | S_IWUSR);
  impl_->address =
      is_unix ? address : absl::StrCat(address.substr(0, address.rfind(':')), ":", port);
  return absl::OkStatus();
}

const std::string& AdminDoor::address() const { return impl_->address; }

void AdminDoor::Stop() {
  if (impl_->server == nullptr) return;
  impl_->server->Shutdown(std::chrono::system_clock::now());
  impl_->server->Wait();
  impl_->server.reset();
}

}  // namespace lockstep
