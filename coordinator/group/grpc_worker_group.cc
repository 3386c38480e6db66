#include "coordinator/group/grpc_worker_group.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <optional>
#include <random>
#include <set>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "coordinator/group/attach_server.h"
#include "coordinator/group/clock_offsets.h"
#include "coordinator/group/group_machine.h"
#include "coordinator/group/profile_trace.h"
#include "wire/protocol.h"

namespace lockstep {
namespace {

using Clock = std::chrono::steady_clock;

int64_t NowMs() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now().time_since_epoch())
      .count();
}

int64_t NowNs() { return std::chrono::nanoseconds(Clock::now().time_since_epoch()).count(); }

// A worker's word, within what the figure can be.
std::optional<double> Sane(bool has, double value, double most) {
  if (!has || !std::isfinite(value) || value < 0 || value > most) return std::nullopt;
  return value;
}

DeviceFigures FiguresOf(uint32_t rank, const worker::v1::DeviceStats& s) {
  constexpr double kBytes = 1e15, kHertz = 1e11;
  const auto number = [](uint64_t value) { return static_cast<double>(value); };
  DeviceFigures f;
  f.rank = rank;
  f.sm_active = Sane(s.has_sm_active(), s.sm_active(), 1);
  f.dram_active = Sane(s.has_dram_active(), s.dram_active(), 1);
  f.nvlink_tx_bytes_per_second =
      Sane(s.has_nvlink_tx_bytes_per_second(), number(s.nvlink_tx_bytes_per_second()), kBytes);
  f.nvlink_rx_bytes_per_second =
      Sane(s.has_nvlink_rx_bytes_per_second(), number(s.nvlink_rx_bytes_per_second()), kBytes);
  f.memory_used_bytes = Sane(s.has_memory_used_bytes(), number(s.memory_used_bytes()), kBytes);
  f.sm_clock_hertz = Sane(s.has_sm_clock_mhz(), 1e6 * s.sm_clock_mhz(), kHertz);
  f.memory_clock_hertz = Sane(s.has_memory_clock_mhz(), 1e6 * s.memory_clock_mhz(), kHertz);
  f.power_watts = Sane(s.has_power_watts(), s.power_watts(), 1e5);
  f.temperature_celsius = Sane(s.has_temperature_celsius(), s.temperature_celsius(), 1e3);
  f.throttle_reasons = Sane(s.has_throttle_reasons(), number(s.throttle_reasons()), 2e19);
  return f;
}

std::string Nonce() {
  std::random_device device;
  return absl::StrFormat("%08x%08x", device(), device());
}

// How long workers get to read Shutdown before their streams are cut.
constexpr std::chrono::milliseconds kFarewell(1'000);

constexpr std::chrono::milliseconds kCancelPoll(50);
// For ranks to send what they have, once told that it is enough.
constexpr std::chrono::seconds kProfileAnswer(30);

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
    const int64_t now_ns = NowNs();
    const std::lock_guard lock(mutex);
    if (message.has_heartbeat() && message.heartbeat().clock_ns() != 0) {
      clocks.Heard(stream, message.heartbeat().clock_ns(), now_ns);
    }
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
    clocks.Forget(stream);
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
    if (const auto* failed = std::get_if<GroupFailed>(&event)) {
      EndProfile(absl::UnavailableError(
          absl::StrCat("the group's epoch ended: ", std::string(failed->reason.message()))));
    }
    if (stopping) return;
    if (sink) {
      sink(std::move(event));
    } else {
      early_events.push_back(std::move(event));  // nothing steps before Start: a handful
    }
  }

  void OnProfilePart(uint32_t rank, const worker::v1::ProfilePart& part) override {
    if (profile == nullptr) return;
    if (const absl::Status added = profile->Add(rank, part); !added.ok()) return EndProfile(added);
    if (profile->complete()) profile_changed.notify_all();
  }
  void EndProfile(const absl::Status& why) {
    if (profile == nullptr || !profile_failure.ok()) return;
    profile_failure = why;
    profile_changed.notify_all();
  }
  // Waits for the running profile's parts. DeadlineExceeded, Cancelled: they may
  // still come.
  absl::Status AwaitProfile(std::unique_lock<std::mutex>& lock, Clock::time_point until,
                            const std::function<bool()>& cancelled);

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
  ClockOffsets clocks;
  uint64_t profile_id = 0;                // of the last one
  std::unique_ptr<ProfileTrace> profile;  // running; null: none
  absl::Status profile_failure;           // of it
  std::condition_variable profile_changed;

  std::string address;  // constant once listening
  std::thread ticker;
  // Last, so that it is gone before what its threads use.
  std::unique_ptr<AttachServer> owned_server;
};

absl::StatusOr<std::unique_ptr<GrpcWorkerGroup>> GrpcWorkerGroup::Listen(const std::string& address,
                                                                         GroupOptions options,
                                                                         const TlsFiles& tls) {
  auto impl = std::make_unique<Impl>(std::move(options));
  // Held until the server is known to the machine's port: a worker may be there already.
  std::unique_lock lock(impl->mutex);
  absl::StatusOr<std::unique_ptr<AttachServer>> server =
      AttachServer::Listen(address, impl.get(), tls);
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
    impl_->EndProfile(absl::UnavailableError("the coordinator is shutting down"));
    impl_->ticker_changed.notify_all();
    impl_->all_closed.wait_until(lock, Clock::now() + kFarewell,
                                 [this] { return impl_->open.empty(); });
    impl_->server = nullptr;
  }
  if (impl_->ticker.joinable()) impl_->ticker.join();
  impl_->owned_server.reset();
}

std::vector<DeviceFigures> GrpcWorkerGroup::Devices() {
  const std::lock_guard lock(impl_->mutex);
  std::vector<DeviceFigures> all;
  uint32_t rank = 0;
  for (const GroupMachine::Member& member : impl_->machine.Members()) {
    if (member.stats != nullptr) all.push_back(FiguresOf(rank, *member.stats));
    ++rank;
  }
  return all;
}

absl::Status GrpcWorkerGroup::Impl::AwaitProfile(std::unique_lock<std::mutex>& lock,
                                                 Clock::time_point until,
                                                 const std::function<bool()>& cancelled) {
  while (profile_failure.ok() && !profile->complete()) {
    const Clock::time_point now = Clock::now();
    if (now >= until) return absl::DeadlineExceededError("too slow");
    profile_changed.wait_until(lock, std::min(until, now + kCancelPoll));
    if (cancelled && cancelled()) return absl::CancelledError("the caller is gone");
  }
  return profile_failure;
}

absl::StatusOr<std::string> GrpcWorkerGroup::Profile(uint32_t steps, int64_t timeout_ms,
                                                     const std::function<bool()>& cancelled) {
  if (steps == 0 || steps > wire::kMaxProfileSteps) {
    return absl::InvalidArgumentError(
        absl::StrCat("steps ", steps, ": expected 1 to ", wire::kMaxProfileSteps));
  }
  Impl& g = *impl_;
  std::unique_lock lock(g.mutex);
  if (g.profile != nullptr) {
    return absl::FailedPreconditionError("a profile is running already; try when it is over");
  }
  worker::v1::ProfileStart start;
  start.set_id(g.profile_id + 1);
  start.set_steps(steps);
  std::vector<ProfiledRank> ranks;
  for (const GroupMachine::Member& member : g.machine.Members()) {
    ranks.push_back(
        {absl::StrCat(member.name, ", ", member.device), g.clocks.OffsetNs(member.stream)});
  }
  if (g.stopping || !g.machine.SendProfileStart(start)) {
    return absl::UnavailableError("there is no whole group to profile; try once it is ready");
  }
  ++g.profile_id;
  g.profile = std::make_unique<ProfileTrace>(start.id(), steps, std::move(ranks));
  g.profile_failure = absl::OkStatus();
  absl::Status status =
      g.AwaitProfile(lock, Clock::now() + std::chrono::milliseconds(timeout_ms), cancelled);
  if (absl::IsDeadlineExceeded(status) || absl::IsCancelled(status)) {
    start.set_steps(0);
    (void)g.machine.SendProfileStart(start);
    const absl::Status rest = g.AwaitProfile(lock, Clock::now() + kProfileAnswer, {});
    if (absl::IsDeadlineExceeded(status)) status = rest;
  }
  // Parts that come later find no profile of their id.
  const std::unique_ptr<ProfileTrace> done = std::move(g.profile);
  lock.unlock();
  if (absl::IsDeadlineExceeded(status)) {
    return absl::UnavailableError("a rank did not send its share of the profile");
  }
  if (!status.ok()) return status;
  if (done->num_steps() == 0) {
    return absl::DeadlineExceededError(absl::StrCat(
        "no step ran within ", timeout_ms, " ms: profile while requests are being answered"));
  }
  return done->Json();
}

}  // namespace lockstep
