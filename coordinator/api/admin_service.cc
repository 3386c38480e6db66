#include "coordinator/api/admin_service.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/match.h"
#include "proto/admin.grpc.pb.h"

namespace lockstep {
namespace {

constexpr size_t kPieceBytes = 1 << 20;
constexpr uint32_t kDefaultTimeoutMs = 30'000, kMaxTimeoutMs = 600'000;

// As gRPC writes the other end's address.
bool OnThisHost(const std::string& peer) {
  return absl::StartsWith(peer, "ipv4:127.") || absl::StartsWith(peer, "ipv6:[::1]") ||
         absl::StartsWith(peer, "ipv6:%5B::1%5D") || absl::StartsWith(peer, "unix:");
}

// Calls are rare and long: each has a thread of gRPC's to wait on.
class AdminService final : public v1::Admin::Service {
 public:
  explicit AdminService(GroupWatch* watch) : watch_(watch) {}

  grpc::Status Profile(grpc::ServerContext* context, const v1::ProfileRequest* request,
                       grpc::ServerWriter<v1::ProfileReply>* writer) override {
    if (!OnThisHost(context->peer())) {
      return {grpc::StatusCode::PERMISSION_DENIED,
              "profiles are for callers on the coordinator's own host"};
    }
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

}  // namespace

std::unique_ptr<grpc::Service> MakeAdminService(GroupWatch* watch) {
  return std::make_unique<AdminService>(watch);
}

}  // namespace lockstep
