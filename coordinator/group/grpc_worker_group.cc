#include "coordinator/group/grpc_worker_group.h"

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <random>
#include <set>
#include <thread>
#include <utility>

#include "absl/strings/str_format.h"
#include "coordinator/group/attach_server.h"
#include "coordinator/group/group_machine.h"

namespace lockstep {
namespace {

using Clock = std::chrono::steady_clock;

int64_t NowMs() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now().time_since_epoch())
      .count();
}

std::string Nonce() {
  std::random_device device;
  return absl::StrFormat("%08x%08x", device(), device());
}

// How long workers get to read Shutdown before their streams are cut.
constexpr std::chrono::milliseconds kFarewell(1'000);

}  // namespace

struct GrpcWorkerGroup::Impl final : public GroupPort, public AttachServer::Handler {
  explicit Impl(GroupOptions options) : machine(std::move(options), Nonce(), this) {}

  // AttachServer::Handler, on gRPC's threads.
  void OnOpen(StreamId stream) override {
    const std::lock_guard lock(mutex);
    open.insert(stream);
    machine.OnOpen(stream, NowMs());
    Rearm();
  }
  void OnMessage(StreamId stream, const worker::v1::WorkerMessage& message) override {
    const std::lock_guard lock(mutex);
    machine.OnMessage(stream, message, NowMs());
    Rearm();
  }
  void OnGarbage(StreamId stream) override {
    const std::lock_guard lock(mutex);
    machine.OnGarbage(stream, NowMs());
    Rearm();
  }
  void OnClosed(StreamId stream) override {
    const std::lock_guard lock(mutex);
    open.erase(stream);
    machine.OnClosed(stream, NowMs());
    Rearm();
    if (open.empty()) all_closed.notify_all();
  }

  // GroupPort, called by the machine with the mutex held.
  void Send(absl::Span<const StreamId> to, const worker::v1::CoordinatorMessage& message) override {
    if (server != nullptr) server->Send(to, message);
  }
  void Close(StreamId stream) override {
    if (server != nullptr) server->Close(stream);
  }
  void Abort(StreamId stream) override {
    if (server != nullptr) server->Abort(stream);
  }
  void Post(GroupEvent event) override {
    if (stopping) return;
    if (sink) {
      sink(std::move(event));
    } else {
      early_events.push_back(std::move(event));  // nothing steps before Start: a handful
    }
  }

  // Wakes the ticker when something became due before it meant to wake.
  void Rearm() {
    if (machine.NextWakeMs() < ticker_wakes_ms) ticker_changed.notify_one();
  }

  void Tick() {
    std::unique_lock lock(mutex);
    while (!stopping) {
      ticker_wakes_ms = machine.NextWakeMs();
      if (ticker_wakes_ms == GroupMachine::kNever) {
        ticker_changed.wait(lock);
      } else {
        ticker_changed.wait_until(lock,
                                  Clock::time_point(std::chrono::milliseconds(ticker_wakes_ms)));
      }
      if (stopping) break;
      const int64_t now_ms = NowMs();
      if (now_ms >= machine.NextWakeMs()) machine.OnTick(now_ms);
    }
  }

  std::mutex mutex;  // guards what follows
  GroupMachine machine;
  EventSink sink;
  std::vector<GroupEvent> early_events;
  AttachServer* server = nullptr;
  std::set<StreamId> open;
  bool stopping = false;
  int64_t ticker_wakes_ms = GroupMachine::kNever;
  std::condition_variable ticker_changed;
  std::condition_variable all_closed;

  std::string address;  // constant once listening
  std::thread ticker;
  // Last, so that it is gone before what its threads use.
  std::unique_ptr<AttachServer> owned_server;
};

absl::StatusOr<std::unique_ptr<GrpcWorkerGroup>> GrpcWorkerGroup::Listen(const std::string& address,
                                                                         GroupOptions options) {
  auto impl = std::make_unique<Impl>(std::move(options));
  // Held until the server is known to the machine's port: a worker may be there already.
  std::unique_lock lock(impl->mutex);
  absl::StatusOr<std::unique_ptr<AttachServer>> server = AttachServer::Listen(address, impl.get());
  if (!server.ok()) return server.status();
  impl->owned_server = *std::move(server);
  impl->server = impl->owned_server.get();
  impl->address = impl->server->address();
  lock.unlock();
  return std::unique_ptr<GrpcWorkerGroup>(new GrpcWorkerGroup(std::move(impl)));
}

GrpcWorkerGroup::GrpcWorkerGroup(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

GrpcWorkerGroup::~GrpcWorkerGroup() { Shutdown(); }

const std::string& GrpcWorkerGroup::address() const { return impl_->address; }

void GrpcWorkerGroup::Start(EventSink sink) {
  const std::lock_guard lock(impl_->mutex);
  impl_->sink = std::move(sink);
  for (GroupEvent& event : impl_->early_events) impl_->sink(std::move(event));
  impl_->early_events.clear();
  Impl* const impl = impl_.get();
  impl_->ticker = std::thread([impl] { impl->Tick(); });
}

void GrpcWorkerGroup::Send(const StepPlan& plan) {
  const std::lock_guard lock(impl_->mutex);
  impl_->machine.SendPlan(plan, NowMs());
  impl_->Rearm();
}

void GrpcWorkerGroup::FailEpoch(uint64_t epoch, const absl::Status& reason) {
  const std::lock_guard lock(impl_->mutex);
  impl_->machine.FailEpoch(epoch, reason, NowMs());
  impl_->Rearm();
}

void GrpcWorkerGroup::Shutdown() {
  {
    std::unique_lock lock(impl_->mutex);
    if (impl_->stopping) return;
    impl_->machine.Shutdown();
    impl_->stopping = true;
    impl_->ticker_changed.notify_all();
    impl_->all_closed.wait_until(lock, Clock::now() + kFarewell,
                                 [this] { return impl_->open.empty(); });
    impl_->server = nullptr;
  }
  if (impl_->ticker.joinable()) impl_->ticker.join();
  impl_->owned_server.reset();
}

}  // namespace lockstep
