#include "cli/client.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>
#include <mutex>
#include <thread>

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "cli/open_channel.h"
#include "proto/inference.grpc.pb.h"

namespace lockstep {
namespace {

constexpr char kRetryDelayUrl[] = "lockstep/retry-pushback-ms";
constexpr int kMaxMessageBytes = 64 << 20;

absl::Status ToAbsl(const grpc::Status& status, const grpc::ClientContext& context) {
  if (status.ok()) return absl::OkStatus();
  absl::Status result(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
  const auto& trailers = context.GetServerTrailingMetadata();
  if (auto it = trailers.find("grpc-retry-pushback-ms"); it != trailers.end()) {
    result.SetPayload(kRetryDelayUrl,
                      absl::Cord(std::string(it->second.data(), it->second.size())));
  }
  return result;
}

}  // namespace

struct CallHandle::Impl {
  std::mutex mutex;
  grpc::ClientContext* context = nullptr;
  bool cancelled = false;
};

CallHandle::CallHandle() : impl_(std::make_unique<Impl>()) {}
CallHandle::~CallHandle() = default;

void CallHandle::Cancel() {
  std::lock_guard lock(impl_->mutex);
  impl_->cancelled = true;
  if (impl_->context != nullptr) impl_->context->TryCancel();
}

struct Client::Impl {
  std::unique_ptr<v1::Inference::Stub> stub;

  // Ties a call's context to its handle while the call runs.
  template <typename Handle>
  class Registration {
   public:
    Registration(Handle* handle, grpc::ClientContext* context) : handle_(handle) {
      if (handle_ == nullptr) return;
      std::lock_guard lock(handle_->mutex);
      handle_->context = context;
      if (handle_->cancelled) context->TryCancel();
    }
    ~Registration() {
      if (handle_ == nullptr) return;
      std::lock_guard lock(handle_->mutex);
      handle_->context = nullptr;
    }

   private:
    Handle* handle_;
  };
};

Client::Client(const std::string& address, const ServerAccess& access)
    : impl_(std::make_unique<Impl>()) {
  grpc::ChannelArguments args;
  args.SetMaxReceiveMessageSize(kMaxMessageBytes);
  // A server that is just starting is found within a second, not after gRPC's default
  // back-off. (The "minimal" back-off stays: it is how long one attempt may take, and a
  // busy server needs more than a moment.)
  args.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  args.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  impl_->stub = v1::Inference::NewStub(OpenChannel(address, access, args));
}

Client::~Client() = default;

absl::StatusOr<v1::GetModelInfoResponse> Client::GetModelInfo() {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(5));
  v1::GetModelInfoResponse response;
  const grpc::Status status = impl_->stub->GetModelInfo(&context, {}, &response);
  if (!status.ok()) return ToAbsl(status, context);
  return response;
}

absl::StatusOr<v1::GetModelInfoResponse> Client::WaitReady(int64_t timeout_ms,
                                                           const std::function<bool()>& give_up) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
  absl::Status last = absl::UnavailableError("no answer yet");
  do {
    absl::StatusOr<v1::GetModelInfoResponse> info = GetModelInfo();
    if (info.ok() && info->ready()) return info;
    if (absl::IsUnauthenticated(info.status())) return info;  // so will every other call be
    last = info.ok() ? absl::UnavailableError("the model is still loading") : info.status();
    if (give_up && give_up()) return absl::AbortedError("the server ended while starting");
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  } while (std::chrono::steady_clock::now() < until);
  return absl::Status(last.code(), absl::StrCat("server not ready after ", timeout_ms / 1000,
                                                " s: ", std::string(last.message())));
}

absl::StatusOr<v1::GenerateResponse> Client::Generate(const v1::GenerateRequest& request,
                                                      CallHandle* handle) {
  grpc::ClientContext context;
  Impl::Registration registration(handle ? handle->impl_.get() : nullptr, &context);
  v1::GenerateResponse response;
  const grpc::Status status = impl_->stub->Generate(&context, request, &response);
  if (!status.ok()) return ToAbsl(status, context);
  return response;
}

absl::StatusOr<v1::TokenizeResponse> Client::Tokenize(const v1::TokenizeRequest& request) {
  grpc::ClientContext context;
  v1::TokenizeResponse response;
  const grpc::Status status = impl_->stub->Tokenize(&context, request, &response);
  if (!status.ok()) return ToAbsl(status, context);
  return response;
}

absl::Status Client::GenerateStream(const v1::GenerateRequest& request,
                                    const std::function<void(const v1::GenerateEvent&)>& on_event,
                                    CallHandle* handle) {
  grpc::ClientContext context;
  Impl::Registration registration(handle ? handle->impl_.get() : nullptr, &context);
  auto reader = impl_->stub->GenerateStream(&context, request);
  v1::GenerateEvent event;
  while (reader->Read(&event)) on_event(event);
  return ToAbsl(reader->Finish(), context);
}

std::optional<int64_t> Client::RetryDelayMs(const absl::Status& status) {
  const absl::optional<absl::Cord> payload = status.GetPayload(kRetryDelayUrl);
  int64_t ms = 0;
  if (!payload.has_value() || !absl::SimpleAtoi(std::string(*payload), &ms)) return std::nullopt;
  return std::max<int64_t>(ms, 0);
}

}  // namespace lockstep
