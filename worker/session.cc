#include "worker/session.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <random>
#include <thread>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/log.h"

namespace lockstep {

using std::chrono::milliseconds;
using worker::v1::CoordinatorMessage;
using worker::v1::WorkerMessage;
using Clock = std::chrono::steady_clock;

namespace {

int64_t NowNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch())
      .count();
}

// A worker that dials in vain says so when the pause grows, then once a minute.
constexpr std::chrono::minutes kComplainEvery{1};
constexpr milliseconds kStopBound{1'000};

}  // namespace

struct Session::Impl {
  Impl(SessionOptions o, std::unique_ptr<Plane> p, std::unique_ptr<ModelHost> host)
      : options(std::move(o)),
        plane(std::move(p)),
        runner(
            [this] {
              EpochRunnerOptions r = options.runner;
              r.release_timeout_ms = options.release_timeout_ms;
              return r;
            }(),
            std::move(host),
            [this](EpochRunner::StreamId id, const WorkerMessage& m) { Send(id, m); }) {
    heartbeat = std::thread([this] { Beat(); });
  }

  ~Impl() {
    Stop();
    heartbeat.join();
    if (reader.joinable()) reader.join();
  }

  SessionEnd Run();
  SessionEnd Live();
  std::optional<SessionEnd> Attach();
  std::optional<SessionEnd> Watch();
  void Read(PlaneStream& s, EpochRunner::StreamId id);
  void Handle(const CoordinatorMessage& message, PlaneStream& s, EpochRunner::StreamId id);
  void Beat();
  void Pause(const absl::Status& why);
  bool Stuck();

  void Stop() {
    std::shared_ptr<PlaneStream> broken;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      stopping = true;
      broken = stream;
      changed.notify_all();
    }
    if (broken != nullptr) broken->Cancel();
  }

  void Send(EpochRunner::StreamId id, const WorkerMessage& message) {
    std::shared_ptr<PlaneStream> to;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      if (id == stream_id) to = stream;
    }
    // A stream that is broken is found by the reader.
    if (to != nullptr) (void)to->Write(message);
  }

  const SessionOptions options;
  const std::unique_ptr<Plane> plane;

  std::mutex mutex;  // guards what follows; never held while reading, writing or dialling
  std::condition_variable changed;
  std::shared_ptr<PlaneStream> stream;  // null: not attached
  EpochRunner::StreamId stream_id = 0;
  bool reader_ended = false;
  bool stopping = false;
  std::optional<SessionEnd> told;  // by the coordinator: the end

  std::atomic<int64_t> heard_ns{0};
  std::atomic<bool> heard_any{false};  // on this stream
  int64_t pause_ms = 0;                // Run's thread alone, as what follows
  bool attached = false;               // once
  uint64_t free_before_loading = 0;    // bytes, as last said with no model loaded
  Clock::time_point complained;
  std::minstd_rand jitter{std::random_device{}()};
  std::string silence;  // why Watch gave up on a stream that is still there
  bool runner_idle = false;

  EpochRunner runner;  // after what its Send uses
  std::thread reader;
  std::thread heartbeat;
};

void Session::Impl::Handle(const CoordinatorMessage& message, PlaneStream& s,
                           EpochRunner::StreamId id) {
  switch (message.message_case()) {
    case CoordinatorMessage::kConfigure:
      return runner.OnConfigure(
          id, message.configure(),
          options.comm_address.empty() ? s.local_address() : options.comm_address);
    case CoordinatorMessage::kPlan:
      return runner.OnPlan(id, message.plan(), static_cast<uint64_t>(NowNs()));
    case CoordinatorMessage::kCommKey:
      return runner.OnCommKey(message.comm_key());
    case CoordinatorMessage::kCloseEpoch:
      LogInfo(absl::StrCat("epoch ", message.close_epoch().epoch(),
                           " closed: ", message.close_epoch().reason()));
      return runner.OnClose(id, message.close_epoch().epoch());
    case CoordinatorMessage::kProfileStart:
      return runner.OnProfileStart(id, message.profile_start());
    case CoordinatorMessage::kRefusal:
      LogError(absl::StrCat("refused by the coordinator: ", message.refusal().reason()));
      break;
    case CoordinatorMessage::kShutdown:
      LogInfo("the coordinator ends this worker");
      break;
    case CoordinatorMessage::kHeartbeat:
    case CoordinatorMessage::MESSAGE_NOT_SET:
      return;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  told = message.has_shutdown() ? SessionEnd::kShutdown : SessionEnd::kRefused;
  changed.notify_all();
}

void Session::Impl::Read(PlaneStream& s, EpochRunner::StreamId id) {
  pthread_setname_np(pthread_self(), "reader");
  CoordinatorMessage message;
  while (s.Read(&message)) {
    heard_ns = NowNs();
    heard_any = true;
    Handle(message, s, id);
  }
  const std::lock_guard<std::mutex> lock(mutex);
  reader_ended = true;
  changed.notify_all();
}

void Session::Impl::Beat() {
  pthread_setname_np(pthread_self(), "heartbeat");
  std::unique_lock<std::mutex> lock(mutex);
  while (!stopping) {
    if (const std::shared_ptr<PlaneStream> to = stream; to != nullptr) {
      lock.unlock();
      WorkerMessage message;
      message.mutable_heartbeat()->set_epoch(runner.epoch());
      message.mutable_heartbeat()->set_last_step(runner.last_step());
      if (options.take_device_stats) {
        if (auto stats = options.take_device_stats(); stats.has_value()) {
          *message.mutable_heartbeat()->mutable_device() = *std::move(stats);
        }
      }
      message.mutable_heartbeat()->set_clock_ns(static_cast<uint64_t>(NowNs()));
      // Whoever is writing already is a sign of life.
      to->TryWrite(message);
      lock.lock();
    }
    changed.wait_for(lock, milliseconds(options.heartbeat_interval_ms),
                     [this] { return stopping; });
  }
}

bool Session::Impl::Stuck() {
  const std::optional<Clock::time_point> deadline = runner.release_deadline();
  if (!deadline || Clock::now() < *deadline) return false;
  LogError(absl::StrCat("the closed epoch is still held after ", options.release_timeout_ms,
                        " ms: a step or a collective does not return; ending the process"));
  return true;
}

// Until the stream ends, or there is a reason to end altogether.
std::optional<SessionEnd> Session::Impl::Watch() {
  const milliseconds tick(options.heartbeat_interval_ms);
  Clock::time_point next = Clock::now() + tick;
  while (true) {
    {
      std::unique_lock<std::mutex> lock(mutex);
      changed.wait_until(lock, next, [this] { return reader_ended || stopping || told; });
      if (told) return told;
      if (stopping) return SessionEnd::kStopped;
      if (reader_ended) return std::nullopt;
    }
    if (Stuck()) return SessionEnd::kStuck;
    // A tick that comes far too late means that this process stood still, not
    // that the coordinator fell silent.
    const auto late = Clock::now() - next;
    if (late > 2 * tick) {
      heard_ns += std::chrono::duration_cast<std::chrono::nanoseconds>(late).count();
    }
    next = Clock::now() + tick;
    const int64_t silent_ms = (NowNs() - heard_ns) / 1'000'000;
    if (silent_ms >= options.heartbeat_timeout_ms) {
      silence = absl::StrCat("nothing heard for ", silent_ms, " ms");
      return std::nullopt;
    }
  }
}

// One stream, from dial to end. A value: the session is over.
std::optional<SessionEnd> Session::Impl::Attach() {
  absl::StatusOr<std::shared_ptr<PlaneStream>> dialled = plane->Dial([this] {
    const std::lock_guard<std::mutex> lock(mutex);
    return stopping;
  });
  if (absl::IsPermissionDenied(dialled.status())) {
    LogError(std::string(dialled.status().message()));
    return SessionEnd::kForbidden;
  }
  if (!dialled.ok()) {
    Pause(dialled.status());
    return std::nullopt;
  }
  const std::shared_ptr<PlaneStream> mine = *dialled;
  WorkerMessage hello;
  *hello.mutable_hello() = options.hello;
  if (runner.loaded_rank() >= 0) hello.mutable_hello()->set_preferred_rank(runner.loaded_rank());
  if (options.read_memory) {
    // What is held now is free for the next model, or the same one, which is kept only if it is
    // planned as before: so not weights and keys alone are counted, but all that was free then.
    // In this order: a load that ends meanwhile has its rank before it is no longer under way.
    const auto [total, free] = options.read_memory();
    if (!runner.loading() && runner.loaded_rank() < 0) free_before_loading = free;
    hello.mutable_hello()->set_memory_total_bytes(total);
    hello.mutable_hello()->set_memory_free_bytes(
        std::max(free + runner.held_bytes(), free_before_loading));
  }
  heard_ns = NowNs();
  heard_any = false;
  (void)mine->Write(hello);  // before anybody else may write
  EpochRunner::StreamId id = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    stream = mine;
    id = ++stream_id;
    reader_ended = false;
    if (stopping) mine->Cancel();
  }
  silence.clear();
  reader = std::thread([this, mine, id] { Read(*mine, id); });
  const std::optional<SessionEnd> end = Watch();
  {
    const std::lock_guard<std::mutex> lock(mutex);
    stream = nullptr;
  }
  const bool ended_by_itself = !end && silence.empty();  // and can say why
  if (!ended_by_itself) mine->Cancel();
  runner.Fence();
  if (end == SessionEnd::kStuck) return end;  // the reader may be what is stuck
  {
    std::unique_lock<std::mutex> lock(mutex);
    const milliseconds bound(options.release_timeout_ms);
    if (!changed.wait_for(lock, bound, [this] { return reader_ended; })) return SessionEnd::kStuck;
  }
  reader.join();
  if (end) return end;
  const std::string why = ended_by_itself ? mine->Ending() : silence;
  if (heard_any) {  // it was there: come back quickly
    pause_ms = 0;
    attached = true;
  }
  Pause(absl::UnavailableError(absl::StrCat("lost the coordinator: ", why)));
  return std::nullopt;
}

void Session::Impl::Pause(const absl::Status& why) {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (stopping) return;
  }
  const bool grows = pause_ms < options.max_pause_ms;
  pause_ms = std::clamp(2 * pause_ms, options.min_pause_ms, options.max_pause_ms);
  const Clock::time_point now = Clock::now();
  if (grows || now - complained >= kComplainEvery) {
    // Failing for the first seconds is commonplace: both start at once, and the
    // coordinator reads a tokenizer first.
    const bool usual = !attached && pause_ms < options.max_pause_ms;
    Log(usual ? LogLevel::kDebug : LogLevel::kWarning,
        absl::StrCat(std::string(why.message()), "; dialling again every ", pause_ms, " ms",
                     pause_ms < options.max_pause_ms ? ", then less often" : ""));
    complained = now;
  }
  // Between half and all of the pause, so that ranks do not come as one.
  const milliseconds pause(pause_ms / 2 + static_cast<int64_t>(jitter() % (pause_ms / 2 + 1)));
  std::unique_lock<std::mutex> lock(mutex);
  changed.wait_for(lock, pause, [this] { return stopping; });
}

SessionEnd Session::Impl::Live() {
  while (true) {
    if (const std::optional<SessionEnd> end = Attach()) return *end;
    if (Stuck()) return SessionEnd::kStuck;
    const std::lock_guard<std::mutex> lock(mutex);
    if (stopping) return SessionEnd::kStopped;
  }
}

SessionEnd Session::Impl::Run() {
  SessionEnd end = Live();
  runner_idle = end != SessionEnd::kStuck && runner.Stop(kStopBound);
  Stop();
  return end;
}

Session::Session(SessionOptions options, std::unique_ptr<Plane> plane,
                 std::unique_ptr<ModelHost> host)
    : impl_(std::make_unique<Impl>(std::move(options), std::move(plane), std::move(host))) {}
Session::~Session() = default;
SessionEnd Session::Run() { return impl_->Run(); }
void Session::Stop() { impl_->Stop(); }
bool Session::idle() const { return impl_->runner_idle; }

}  // namespace lockstep
