#include "coordinator/group/attach_server.h"

#include <grpcpp/grpcpp.h>
#include <grpcpp/impl/server_builder_option.h>

#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/log.h"
#include "common/unix_socket.h"
#include "proto/worker.grpc.pb.h"
#include "wire/plane_tls.h"
#include "wire/protocol.h"

namespace lockstep {
namespace {

using worker::v1::CoordinatorMessage;
using worker::v1::WorkerMessage;
using worker::v1::WorkerPlane;

// Of one stream's queue. Steady stepping keeps it near empty; relayed
// communicator keys are what may pile up.
constexpr size_t kMaxQueuedMessages = 16'384;
constexpr size_t kMaxQueuedBytes = 256 << 20;

using RawReactor = grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>;

// One Attach call. gRPC owns it until OnDone; everybody else holds a shared_ptr.
class Stream final : public RawReactor, public std::enable_shared_from_this<Stream> {
 public:
  Stream(StreamId id, grpc::CallbackServerContext* context, AttachServer::Handler* handler,
         std::function<void(StreamId)> forget)
      : id_(id), context_(context), handler_(handler), forget_(std::move(forget)) {}

  void Begin(std::shared_ptr<Stream> self) {
    self_ = std::move(self);
    handler_->OnOpen(id_);
    StartRead(&incoming_);
  }

  void Enqueue(const grpc::ByteBuffer& bytes) {
    const std::lock_guard lock(mutex_);
    if (closing_ || finished_) return;
    queued_bytes_ += bytes.Length();
    if (queue_.size() >= kMaxQueuedMessages || queued_bytes_ > kMaxQueuedBytes) {
      context_->TryCancel();
      return;
    }
    queue_.push_back(bytes);
    if (!writing_) WriteNext();
  }

  void Close() {
    const std::lock_guard lock(mutex_);
    closing_ = true;
    if (!writing_) FinishLocked();
  }

  void Abort() {
    const std::lock_guard lock(mutex_);
    if (done_) return;
    closing_ = true;
    queue_.clear();
    context_->TryCancel();
    if (!writing_) FinishLocked();
  }

  void OnReadDone(bool ok) override {
    if (!ok) {  // the worker is gone or has ended its side
      const std::lock_guard lock(mutex_);
      closing_ = true;
      queue_.clear();
      if (!writing_) FinishLocked();
      return;
    }
    WorkerMessage message;
    if (grpc::SerializationTraits<WorkerMessage>::Deserialize(&incoming_, &message).ok()) {
      handler_->OnMessage(id_, message);
    } else {
      handler_->OnGarbage(id_);
    }
    StartRead(&incoming_);
  }

  void OnWriteDone(bool ok) override {
    const std::lock_guard lock(mutex_);
    writing_ = false;
    queued_bytes_ -= outgoing_.Length();
    if (!ok) {
      closing_ = true;
      queue_.clear();
    }
    if (!queue_.empty()) {
      WriteNext();
    } else if (closing_) {
      FinishLocked();
    }
  }

  void OnDone() override {
    {
      const std::lock_guard lock(mutex_);
      done_ = true;
    }
    handler_->OnClosed(id_);
    forget_(id_);
    self_.reset();  // may delete this
  }

 private:
  void WriteNext() {
    outgoing_.Swap(&queue_.front());
    queue_.pop_front();
    writing_ = true;
    StartWrite(&outgoing_);
  }

  void FinishLocked() {
    if (std::exchange(finished_, true)) return;
    Finish(grpc::Status::OK);
  }

  const StreamId id_;
  grpc::CallbackServerContext* const context_;  // valid until OnDone
  AttachServer::Handler* const handler_;
  const std::function<void(StreamId)> forget_;
  std::shared_ptr<Stream> self_;  // set in Begin, cleared in OnDone
  grpc::ByteBuffer incoming_;     // of the read under way

  std::mutex mutex_;  // guards what follows
  std::deque<grpc::ByteBuffer> queue_;
  grpc::ByteBuffer outgoing_;  // of the write under way
  size_t queued_bytes_ = 0;
  bool writing_ = false;
  bool closing_ = false;   // nothing is queued any more
  bool finished_ = false;  // Finish was called
  bool done_ = false;      // context_ is gone
};

constexpr char kNotAWorker[] =
    "the certificate is not a worker's: it needs lockstep-worker among its DNS names";

// The end of a call whose certificate is good and of another role.
class Refused final : public RawReactor {
 public:
  Refused() { Finish({grpc::StatusCode::PERMISSION_DENIED, kNotAWorker}); }
  void OnDone() override { delete this; }
};

// Whatever is linked in offers itself to every server of the process (reflection
// does): here there is the worker plane and nothing else.
class NoPlugins final : public grpc::ServerBuilderOption {
 public:
  void UpdateArguments(grpc::ChannelArguments*) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    plugins->clear();
  }
};

}  // namespace

struct AttachServer::Impl {
  class Service final : public WorkerPlane::WithRawCallbackMethod_Attach<WorkerPlane::Service> {
   public:
    explicit Service(Impl* impl) : impl_(impl) {}
    RawReactor* Attach(grpc::CallbackServerContext* context) override {
      return impl_->Accept(context);
    }

   private:
    Impl* const impl_;
  };

  Impl(Handler* h, bool t) : handler(h), tls(t), service(this) {}

  RawReactor* Accept(grpc::CallbackServerContext* context) {
    if (tls && !IsWorker(*context->auth_context())) {
      LogWarning(absl::StrCat("workers' plane: ", context->peer(), ": ", kNotAWorker));
      return new Refused();
    }
    std::shared_ptr<Stream> stream;
    {
      const std::lock_guard lock(mutex);
      const StreamId id = next_id++;
      stream = std::make_shared<Stream>(id, context, handler, [this](StreamId gone) {
        const std::lock_guard forget_lock(mutex);
        streams.erase(gone);
      });
      streams[id] = stream;
    }
    stream->Begin(stream);
    return stream.get();
  }

  std::shared_ptr<Stream> Find(StreamId id) {
    const std::lock_guard lock(mutex);
    const auto it = streams.find(id);
    return it == streams.end() ? nullptr : it->second;
  }

  Handler* const handler;
  const bool tls;
  std::mutex mutex;
  std::unordered_map<StreamId, std::shared_ptr<Stream>> streams;  // guarded by mutex
  StreamId next_id = 1;                                           // guarded by mutex
  Service service;
  std::unique_ptr<grpc::Server> server;
  std::string address;
};

absl::StatusOr<std::unique_ptr<AttachServer>> AttachServer::Listen(const std::string& address,
                                                                   Handler* handler,
                                                                   const TlsFiles& tls) {
  auto impl = std::make_unique<Impl>(handler, tls.enabled());
  const bool is_unix = absl::StartsWith(address, "unix:");
  if (absl::Status free = CheckUnixSocketIsFree(address); !free.ok()) return free;
  if (absl::Status checked = CheckPlaneTls(tls); !checked.ok()) return checked;
  grpc::ServerBuilder builder;
  // Without this, a second coordinator would share the port instead of failing.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.SetOption(std::make_unique<NoPlugins>());
  builder.SetMaxReceiveMessageSize(wire::kMaxMessageBytes);
  builder.SetMaxSendMessageSize(wire::kMaxMessageBytes);
  int port = 0;
  builder.AddListeningPort(address, PlaneServerCredentials(tls), &port);
  builder.RegisterService(&impl->service);
  impl->server = builder.BuildAndStart();
  if (impl->server == nullptr || port == 0) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", address, ": the address is taken or not of this host"));
  }
  impl->address =
      is_unix ? address : absl::StrCat(address.substr(0, address.rfind(':')), ":", port);
  return std::unique_ptr<AttachServer>(new AttachServer(std::move(impl)));
}

AttachServer::AttachServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

AttachServer::~AttachServer() {
  // A deadline in the past cancels what is open; Shutdown waits for the reactors.
  impl_->server->Shutdown(std::chrono::system_clock::now());
  impl_->server->Wait();
}

const std::string& AttachServer::address() const { return impl_->address; }

void AttachServer::Send(absl::Span<const StreamId> to, const CoordinatorMessage& message) {
  grpc::ByteBuffer bytes;
  bool own = false;
  if (!grpc::SerializationTraits<CoordinatorMessage>::Serialize(message, &bytes, &own).ok()) return;
  for (const StreamId id : to) {
    if (const std::shared_ptr<Stream> stream = impl_->Find(id)) stream->Enqueue(bytes);
  }
}

void AttachServer::Close(StreamId id) {
  if (const std::shared_ptr<Stream> stream = impl_->Find(id)) stream->Close();
}

void AttachServer::Abort(StreamId id) {
  if (const std::shared_ptr<Stream> stream = impl_->Find(id)) stream->Abort();
}

}  // namespace lockstep
