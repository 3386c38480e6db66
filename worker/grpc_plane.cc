#include "worker/grpc_plane.h"

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <mutex>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "proto/worker.grpc.pb.h"
#include "wire/plane_tls.h"
#include "wire/protocol.h"
#include "worker/comm/local_address.h"

namespace lockstep {
namespace {

using worker::v1::CoordinatorMessage;
using worker::v1::WorkerMessage;
using worker::v1::WorkerPlane;

constexpr std::chrono::milliseconds kDialTimeout{3'000};
constexpr std::chrono::milliseconds kDialSlice{100};

class GrpcStream final : public PlaneStream {
 public:
  GrpcStream(std::shared_ptr<grpc::Channel> channel, std::string local_address)
      : channel_(std::move(channel)),
        local_address_(std::move(local_address)),
        stub_(WorkerPlane::NewStub(channel_)) {
    stream_ = stub_->Attach(&context_);
  }
  // A call must be finished before it is let go.
  ~GrpcStream() override {
    context_.TryCancel();
    if (!finished_) (void)Ending();
  }

  bool Read(CoordinatorMessage* message) override { return stream_->Read(message); }

  bool Write(const WorkerMessage& message) override {
    const std::lock_guard<std::mutex> lock(write_mutex_);
    return !finished_ && stream_->Write(message);
  }

  void TryWrite(const WorkerMessage& message) override {
    const std::unique_lock<std::mutex> lock(write_mutex_, std::try_to_lock);
    if (lock && !finished_) stream_->Write(message);
  }

  void Cancel() override { context_.TryCancel(); }

  std::string local_address() const override { return local_address_; }

  std::string Ending() override {
    const std::lock_guard<std::mutex> lock(write_mutex_);
    finished_ = true;
    const grpc::Status status = stream_->Finish();
    return status.ok() ? "the coordinator closed the stream" : status.error_message();
  }

 private:
  const std::shared_ptr<grpc::Channel> channel_;
  const std::string local_address_;
  const std::unique_ptr<WorkerPlane::Stub> stub_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<WorkerMessage, CoordinatorMessage>> stream_;
  std::mutex write_mutex_;  // gRPC takes one writer at a time
  bool finished_ = false;   // guarded by write_mutex_; no write may follow Finish
};

// Only a call is told why there is no connection.
std::string WhyRefused(const std::shared_ptr<grpc::Channel>& channel, bool tls) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kDialTimeout);
  const std::string why = WorkerPlane::NewStub(channel)->Attach(&context)->Finish().error_message();
  for (const char* handshake :
       {"handshake", "Handshake", "Peer name", "Socket closed", "SETTINGS", "reset"}) {
    if (!absl::StrContains(why, handshake)) continue;
    return tls ? absl::StrCat(
                     "the certificates of the two sides do not fit: each needs one that "
                     "the other's --worker-ssl-ca-certs signed, named "
                     "lockstep-coordinator or lockstep-worker (",
                     why, ")")
               : absl::StrCat("it does not talk in plain text; it may want --worker-ssl-certfile (",
                              why, ")");
  }
  return absl::StrCat("nothing answers there (", why, ")");
}

class GrpcPlane final : public Plane {
 public:
  GrpcPlane(std::string coordinator, bool insecure, TlsFiles tls)
      : coordinator_(std::move(coordinator)), insecure_(insecure), tls_(std::move(tls)) {}

  absl::StatusOr<std::shared_ptr<PlaneStream>> Dial(const std::function<bool()>& stop) override {
    const absl::StatusOr<std::string> local = LocalAddressTowards(coordinator_);
    if (!local.ok()) return local.status();
    const bool on_this_host = absl::StartsWith(*local, "127.") || *local == "::1";
    if (!on_this_host && !insecure_ && !tls_.enabled()) {
      return absl::PermissionDeniedError(
          absl::StrCat("coordinator \"", coordinator_,
                       "\" is beyond this host and the connection would be plain: use a loopback "
                       "or unix: address, --worker-ssl-certfile, or say --insecure"));
    }
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(wire::kMaxMessageBytes);
    arguments.SetMaxSendMessageSize(wire::kMaxMessageBytes);
    // A connection of its own: none of gRPC's back-off from an earlier dial. No
    // keepalive pings: heartbeats flow both ways four times a second.
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
    const auto credentials = PlaneChannelCredentials(tls_, &arguments);
    if (!credentials.ok()) return credentials.status();
    const std::shared_ptr<grpc::Channel> channel =
        grpc::CreateCustomChannel(coordinator_, *credentials, arguments);
    const auto deadline = std::chrono::system_clock::now() + kDialTimeout;
    while (!channel->WaitForConnected(std::chrono::system_clock::now() + kDialSlice)) {
      if (stop()) return absl::CancelledError("stopped");
      const bool refused = channel->GetState(false) == GRPC_CHANNEL_TRANSIENT_FAILURE;
      if (refused || std::chrono::system_clock::now() >= deadline) {
        return absl::UnavailableError(absl::StrCat(
            "coordinator \"", coordinator_,
            "\": ", refused ? WhyRefused(channel, tls_.enabled()) : "no answer within 3 s"));
      }
    }
    return std::shared_ptr<PlaneStream>(std::make_shared<GrpcStream>(channel, *local));
  }

 private:
  const std::string coordinator_;
  const bool insecure_;
  const TlsFiles tls_;
};

}  // namespace

std::unique_ptr<Plane> MakeGrpcPlane(const std::string& coordinator, bool insecure,
                                     const TlsFiles& tls) {
  return std::make_unique<GrpcPlane>(coordinator, insecure, tls);
}

}  // namespace lockstep
