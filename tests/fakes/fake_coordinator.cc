#include "tests/fakes/fake_coordinator.h"

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "proto/worker.grpc.pb.h"
#include "wire/protocol.h"

namespace lockstep::fakes {

using std::chrono::milliseconds;
using worker::v1::CoordinatorMessage;
using worker::v1::WorkerMessage;
using worker::v1::WorkerPlane;
using ServerStream = grpc::ServerReaderWriter<CoordinatorMessage, WorkerMessage>;

namespace {
constexpr milliseconds kPatience{20'000};
}  // namespace

struct FakeCoordinator::Impl final : public WorkerPlane::Service {
  struct Stream {
    grpc::ServerContext* context = nullptr;  // null: ended
    ServerStream* stream = nullptr;
    std::mutex write_mutex;
    std::optional<worker::v1::Hello> hello;
    std::deque<WorkerMessage> inbox;
    uint64_t epoch = 0;  // of the last Configure sent; guarded by relay_mutex
    size_t heartbeats = 0;
  };

  grpc::Status Attach(grpc::ServerContext* context, ServerStream* rw) override {
    auto self = std::make_shared<Stream>();
    self->context = context;
    self->stream = rw;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      streams.push_back(self);
      changed.notify_all();
    }
    WorkerMessage message;
    while (rw->Read(&message)) {
      if (message.has_comm_key()) Relay(*self, message.comm_key());
      const std::lock_guard<std::mutex> lock(mutex);
      if (message.has_hello()) {
        self->hello = message.hello();
      } else if (message.has_heartbeat()) {
        ++self->heartbeats;
        if (message.heartbeat().has_device()) self->inbox.push_back(message);
      } else if (!message.has_comm_key()) {
        self->inbox.push_back(message);
      }
      changed.notify_all();
    }
    const std::lock_guard<std::mutex> write_lock(self->write_mutex);
    const std::lock_guard<std::mutex> lock(mutex);
    self->context = nullptr;
    self->stream = nullptr;
    changed.notify_all();
    return grpc::Status::OK;
  }

  void Write(Stream& to, const CoordinatorMessage& message) {
    const std::lock_guard<std::mutex> lock(to.write_mutex);
    if (to.stream != nullptr) to.stream->Write(message);
  }

  // To every rank that was sent the epoch's Configure; those that follow get it
  // then. (A real coordinator configures all ranks before it reads on.)
  void Relay(const Stream& from, const worker::v1::CommKey& key) {
    const std::lock_guard<std::mutex> relay_lock(relay_mutex);
    std::vector<std::shared_ptr<Stream>> others;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      if (silent) return;
      keys.push_back({&from, key});
      for (const auto& other : streams) {
        if (other.get() != &from && other->epoch == key.epoch()) others.push_back(other);
      }
    }
    CoordinatorMessage message;
    *message.mutable_comm_key() = key;
    for (const auto& other : others) Write(*other, message);
  }

  void SendConfigure(Stream& to, const CoordinatorMessage& configure) {
    const std::lock_guard<std::mutex> relay_lock(relay_mutex);
    Write(to, configure);
    to.epoch = configure.configure().epoch();
    for (const auto& [from, key] : keys) {
      if (from == &to || key.epoch() != to.epoch) continue;
      CoordinatorMessage message;
      *message.mutable_comm_key() = key;
      Write(to, message);
    }
  }

  void Beat() {
    std::unique_lock<std::mutex> lock(mutex);
    CoordinatorMessage message;
    message.mutable_heartbeat();
    while (!ending) {
      if (!silent) {
        const std::vector<std::shared_ptr<Stream>> all = streams;
        lock.unlock();
        for (const auto& stream : all) Write(*stream, message);
        lock.lock();
      }
      changed.wait_for(lock, milliseconds(heartbeat_ms), [this] { return ending; });
    }
  }

  std::shared_ptr<Stream> Get(size_t i) {
    std::unique_lock<std::mutex> lock(mutex);
    if (!changed.wait_for(lock, kPatience, [&] { return streams.size() > i; })) return nullptr;
    return streams[i];
  }

  std::string address;
  int64_t heartbeat_ms = 0;
  std::unique_ptr<grpc::Server> server;
  std::thread heart;
  std::mutex relay_mutex;                                           // taken before the others
  std::vector<std::pair<const Stream*, worker::v1::CommKey>> keys;  // guarded by relay_mutex
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<std::shared_ptr<Stream>> streams;
  bool silent = false, ending = false;
};

FakeCoordinator::FakeCoordinator(const std::string& address, int64_t heartbeat_ms)
    : impl_(std::make_unique<Impl>()) {
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.AddListeningPort(address, grpc::InsecureServerCredentials(), &port);
  builder.SetMaxReceiveMessageSize(wire::kMaxMessageBytes);
  builder.RegisterService(impl_.get());
  impl_->server = builder.BuildAndStart();
  impl_->address = address.rfind("unix:", 0) == 0
                       ? address
                       : address.substr(0, address.rfind(':') + 1) + std::to_string(port);
  impl_->heartbeat_ms = heartbeat_ms;
  if (heartbeat_ms > 0) impl_->heart = std::thread([this] { impl_->Beat(); });
}

FakeCoordinator::~FakeCoordinator() {
  {
    const std::lock_guard<std::mutex> lock(impl_->mutex);
    impl_->ending = true;
    impl_->changed.notify_all();
  }
  if (impl_->heart.joinable()) impl_->heart.join();
  if (impl_->server != nullptr) {
    impl_->server->Shutdown(std::chrono::system_clock::now());
    impl_->server->Wait();
  }
}

const std::string& FakeCoordinator::address() const { return impl_->address; }

std::optional<worker::v1::Hello> FakeCoordinator::AwaitHello(size_t stream) {
  const std::shared_ptr<Impl::Stream> s = impl_->Get(stream);
  if (s == nullptr) return std::nullopt;
  std::unique_lock<std::mutex> lock(impl_->mutex);
  impl_->changed.wait_for(lock, kPatience, [&] { return s->hello.has_value(); });
  return s->hello;
}

void FakeCoordinator::Send(size_t stream, const CoordinatorMessage& message) {
  const std::shared_ptr<Impl::Stream> s = impl_->Get(stream);
  if (s == nullptr) return;
  if (message.has_configure()) return impl_->SendConfigure(*s, message);
  impl_->Write(*s, message);
}

std::optional<WorkerMessage> FakeCoordinator::Await(
    size_t stream, const std::function<bool(const WorkerMessage&)>& wanted, int64_t bound_ms) {
  const std::shared_ptr<Impl::Stream> s = impl_->Get(stream);
  if (s == nullptr) return std::nullopt;
  std::optional<WorkerMessage> found;
  std::unique_lock<std::mutex> lock(impl_->mutex);
  impl_->changed.wait_for(lock, milliseconds(bound_ms), [&] {
    while (!s->inbox.empty() && !found) {
      if (wanted(s->inbox.front())) found = s->inbox.front();
      s->inbox.pop_front();
    }
    return found.has_value();
  });
  return found;
}

std::optional<WorkerMessage> FakeCoordinator::AwaitCase(size_t stream,
                                                        WorkerMessage::MessageCase wanted,
                                                        int64_t bound_ms) {
  return Await(
      stream, [&](const WorkerMessage& m) { return m.message_case() == wanted; }, bound_ms);
}

bool FakeCoordinator::AwaitEnd(size_t stream, int64_t bound_ms) {
  const std::shared_ptr<Impl::Stream> s = impl_->Get(stream);
  if (s == nullptr) return false;
  std::unique_lock<std::mutex> lock(impl_->mutex);
  return impl_->changed.wait_for(lock, milliseconds(bound_ms),
                                 [&] { return s->context == nullptr; });
}

size_t FakeCoordinator::num_heartbeats(size_t stream) const {
  const std::shared_ptr<Impl::Stream> s = impl_->Get(stream);
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  return s == nullptr ? 0 : s->heartbeats;
}

void FakeCoordinator::FallSilent(bool silent) {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  impl_->silent = silent;
}

void FakeCoordinator::Cut(size_t stream) {
  const std::shared_ptr<Impl::Stream> s = impl_->Get(stream);
  if (s == nullptr) return;
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  if (s->context != nullptr) s->context->TryCancel();
}

}  // namespace lockstep::fakes
