#include "coordinator/engine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "common/log.h"
#include "coordinator/engine_inbox.h"

namespace lockstep {
namespace {

using Clock = EngineInbox::Clock;

int64_t ToMs(Clock::time_point t) {
  return std::chrono::duration_cast<std::chrono::milliseconds>(t.time_since_epoch()).count();
}
Clock::time_point FromMs(int64_t ms) { return Clock::time_point(std::chrono::milliseconds(ms)); }
double Seconds(Clock::duration d) { return std::chrono::duration<double>(d).count(); }

// A plan the group has not answered yet.
struct PlanInFlight {
  StepPlan plan;
  double plan_seconds = 0;
  Clock::time_point sent;
};

struct LiveRequest {
  std::shared_ptr<RequestSink> sink;
  uint32_t sequences_left = 1;
};

}  // namespace

struct Engine::Impl {
  Impl(EngineOptions o, std::unique_ptr<WorkerGroup> g, std::shared_ptr<EngineObserver> obs)
      : options(std::move(o)),
        inbox(options.inbox_capacity),
        observer(obs ? std::move(obs) : std::make_shared<EngineObserver>()),
        group(std::move(g)) {
    inbox.Refuse(absl::UnavailableError("the model is loading"));
  }

  // The engine thread.
  void Run();
  void Handle(Submission& submission);
  absl::Status Admit(Request request);
  void Handle(const CancelCommand& cancel);
  void Handle(const StopCommand& stop);
  void Handle(const DrainCommand& drain);
  void Handle(const CloseCommand& close);
  void Handle(GroupFormed& formed);
  void Handle(GroupStep& step);
  void Handle(const GroupFailed& failed);
  void GiveUpRecovery(int64_t now_ms);
  void SendPlans();
  void Publish();
  void CheckWhenIdle(int64_t now_ms);
  void CheckBooks();
  void Snapshot();
  Clock::time_point NextWake() const;

  void Publish(StartedEvent& e);
  void Publish(PromptLogprobsEvent& e);
  void Publish(TokenEvent& e);
  void Publish(FinishedEvent& e);
  void Publish(FailedEvent& e);
  void EndSequence(RequestId request);

  void FailEverything(const absl::Status& reason);
  void ChangeState(EngineState next, const absl::Status& failure);
  bool Idle() const { return scheduler == nullptr || !scheduler->HasRequests(); }

  EngineOptions options;
  EngineInbox inbox;
  std::shared_ptr<EngineObserver> observer;
  std::unique_ptr<WorkerGroup> group;
  std::atomic<uint64_t> next_request{1};
  std::thread thread;

  // Of the engine thread alone.
  std::unique_ptr<Scheduler> scheduler;  // made when the first group forms
  absl::flat_hash_map<RequestId, LiveRequest> live;
  std::vector<SchedulerEvent> events;
  std::deque<PlanInFlight> in_flight;
  Clock::time_point last_result;
  EngineState state = EngineState::kLoading;  // of the group; info shows draining instead
  EngineInfo info;
  bool epoch_open = false;  // between BeginEpoch and EndEpoch
  bool stepping = false;    // epoch_open, and no result was found to be a lie
  bool draining = false;
  bool closed = false;
  bool busy = false;
  int64_t check_books_ms = kNoDeadline;  // when, if still idle
  int64_t recovery_deadline_ms = kNoDeadline;
  absl::Status given_up;  // why, from the end of that deadline until a group forms
  std::mt19937_64 seeds{std::random_device{}()};

  // What other threads read.
  mutable std::mutex mutex;
  std::condition_variable idle_changed;
  EngineInfo shared_info;       // guarded by mutex
  SchedulerStats shared_stats;  // guarded by mutex
  bool drained = false;         // guarded by mutex
};

void Engine::Impl::Run() {
  std::vector<InboxItem> items;
  while (!closed) {
    inbox.WaitAndTake(NextWake(), &items);
    for (InboxItem& item : items) {
      std::visit([this](auto& it) { Handle(it); }, item);
    }
    GiveUpRecovery(ToMs(Clock::now()));
    SendPlans();
    Publish();
    CheckWhenIdle(ToMs(Clock::now()));
    Snapshot();
  }
  if (check_books_ms != kNoDeadline) CheckBooks();
}

Clock::time_point Engine::Impl::NextWake() const {
  int64_t wake_ms = std::min(recovery_deadline_ms, check_books_ms);
  if (scheduler != nullptr) wake_ms = std::min(wake_ms, scheduler->NextDeadlineMs());
  if (wake_ms == kNoDeadline) return Clock::time_point::max();
  // A deadline that has passed was handled by Schedule(); if its request is still
  // there, it waits for a step to be acknowledged. Do not spin meanwhile.
  return std::max(FromMs(wake_ms), Clock::now() + std::chrono::milliseconds(5));
}

void Engine::Impl::Handle(Submission& submission) {
  const RequestId id = submission.request.id;
  SamplingParams& sampling = submission.request.sampling;
  if (!sampling.seed) sampling.seed = static_cast<int64_t>(seeds());
  const uint32_t n = sampling.n;
  const absl::Status admitted = Admit(std::move(submission.request));
  if (!admitted.ok()) {
    observer->OnRejected(admitted);
    submission.sink->OnRejected(admitted);
    return;
  }
  live[id] = {std::move(submission.sink), n};
}

// The inbox refuses too, but not what it had taken before it was told to.
absl::Status Engine::Impl::Admit(Request request) {
  if (scheduler == nullptr || state == EngineState::kFailed) {
    return absl::UnavailableError(absl::StrCat("not serving: ", info.failure.message()));
  }
  if (!given_up.ok()) return given_up;
  return scheduler->Add(std::move(request), ToMs(Clock::now()));
}

void Engine::Impl::Handle(const CancelCommand& cancel) {
  if (live.erase(cancel.request) > 0) scheduler->Cancel(cancel.request);
}

void Engine::Impl::Handle(const StopCommand& stop) {
  if (!live.contains(stop.sequence.request)) return;
  if (scheduler->Stop(stop.sequence)) EndSequence(stop.sequence.request);
}

void Engine::Impl::Handle(const DrainCommand&) {
  draining = true;
  LogInfo("draining: no new requests");
  ChangeState(state, info.failure);
}

void Engine::Impl::Handle(const CloseCommand&) {
  closed = true;
  FailEverything(absl::UnavailableError("the server is shutting down"));
}

void Engine::Impl::Handle(GroupFormed& formed) {
  if (state == EngineState::kFailed) return;
  if (scheduler == nullptr) {
    options.scheduler.num_kv_blocks = formed.num_kv_blocks;
    options.scheduler.max_num_seqs = formed.max_num_seqs;
    if (options.scheduler.max_queued_requests == 0) {
      options.scheduler.max_queued_requests = std::max(64u, 4 * formed.max_num_seqs);
    }
    if (options.scheduler.cache_hash_key == 0) options.scheduler.cache_hash_key = seeds();
    scheduler = std::make_unique<Scheduler>(options.scheduler);
  }
  LOCKSTEP_CHECK(formed.num_kv_blocks == options.scheduler.num_kv_blocks);
  LOCKSTEP_CHECK(!epoch_open && formed.epoch > info.epoch);
  info.epoch = formed.epoch;
  info.num_kv_blocks = formed.num_kv_blocks;
  info.max_num_seqs = formed.max_num_seqs;
  info.max_queued_requests = options.scheduler.max_queued_requests;
  info.ranks = std::move(formed.ranks);
  scheduler->BeginEpoch(formed.epoch);
  epoch_open = stepping = true;
  in_flight.clear();
  last_result = Clock::now();
  recovery_deadline_ms = kNoDeadline;
  given_up = absl::OkStatus();
  inbox.Refuse(given_up);
  ChangeState(EngineState::kReady, absl::OkStatus());
}

void Engine::Impl::Handle(GroupStep& step) {
  if (!stepping || step.result.epoch != info.epoch) return;
  const absl::Status applied = scheduler->Apply(step.result, &events);
  if (!applied.ok()) {
    stepping = false;  // no plan until the group has closed this epoch
    LogError(absl::StrCat("epoch ", info.epoch, ": ", applied.ToString()));
    group->FailEpoch(info.epoch, applied);
    return;
  }
  LOCKSTEP_CHECK(!in_flight.empty());
  const PlanInFlight done = std::move(in_flight.front());
  in_flight.pop_front();
  // With two plans in flight, a step begins when the one before it ends.
  const Clock::time_point now = Clock::now();
  const Clock::time_point began = std::max(done.sent, last_result);
  last_result = now;
  info.last_step_ms = ToMs(now);
  if (step.result.step == 1 && options.on_first_step) options.on_first_step();
  observer->OnStep(done.plan, step, done.plan_seconds, Seconds(now - began));
}

void Engine::Impl::Handle(const GroupFailed& failed) {
  if (state == EngineState::kFailed) return;
  stepping = false;
  if (epoch_open) {
    epoch_open = false;
    scheduler->EndEpoch(failed.reason, &events);
  }
  if (failed.fatal) {
    recovery_deadline_ms = kNoDeadline;
    FailEverything(failed.reason);
    inbox.Refuse(failed.reason);
    ChangeState(EngineState::kFailed, failed.reason);
    return;
  }
  if (state == EngineState::kReady) {
    recovery_deadline_ms = ToMs(Clock::now()) + options.recovery_timeout_ms;
    ChangeState(EngineState::kRecovering, failed.reason);
  } else {
    ChangeState(state, failed.reason);
  }
}

void Engine::Impl::GiveUpRecovery(int64_t now_ms) {
  if (now_ms < recovery_deadline_ms) return;
  recovery_deadline_ms = kNoDeadline;
  given_up =
      absl::UnavailableError(absl::StrCat("not whole again within ", options.recovery_timeout_ms,
                                          " ms (--recovery-timeout): ", info.failure.message()));
  LogError(std::string(given_up.message()));
  FailEverything(given_up);
  inbox.Refuse(given_up);
  ChangeState(state, given_up);
}

void Engine::Impl::FailEverything(const absl::Status& reason) {
  if (scheduler != nullptr) scheduler->FailAll(reason, &events);
}

void Engine::Impl::SendPlans() {
  // While a lie waits for its epoch to close, nothing is planned. Without an open
  // epoch Schedule() makes no plan, but lets deadlines pass.
  if (scheduler == nullptr || (epoch_open && !stepping)) return;
  for (;;) {
    const Clock::time_point start = Clock::now();
    std::optional<StepPlan> plan = scheduler->Schedule(ToMs(start), &events);
    if (!plan) return;
    group->Send(*plan);
    const Clock::time_point sent = Clock::now();
    in_flight.push_back({std::move(*plan), Seconds(sent - start), sent});
  }
}

void Engine::Impl::Publish() {
  for (SchedulerEvent& event : events) {
    std::visit([this](auto& e) { Publish(e); }, event);
  }
  events.clear();
}

void Engine::Impl::Publish(StartedEvent& e) {
  const auto it = live.find(e.request);
  if (it != live.end()) it->second.sink->OnStarted(e.cached_tokens);
}

void Engine::Impl::Publish(PromptLogprobsEvent& e) {
  const auto it = live.find(e.request);
  if (it != live.end()) {
    it->second.sink->OnPromptLogprobs(e.first_position, std::move(e.entries));
  }
}

void Engine::Impl::Publish(TokenEvent& e) {
  const auto it = live.find(e.sequence.request);
  if (it != live.end()) {
    it->second.sink->OnToken(e.sequence.index, e.token, std::move(e.logprobs));
  }
}

void Engine::Impl::Publish(FinishedEvent& e) {
  const auto it = live.find(e.sequence.request);
  if (it == live.end()) return;
  it->second.sink->OnFinished(e.sequence.index, e.reason, e.ending_token, e.completion_tokens);
  EndSequence(e.sequence.request);
}

void Engine::Impl::Publish(FailedEvent& e) {
  const auto it = live.find(e.request);
  if (it == live.end()) return;
  it->second.sink->OnFailed(e.status);
  live.erase(it);
}

void Engine::Impl::EndSequence(RequestId request) {
  const auto it = live.find(request);
  LOCKSTEP_CHECK(it != live.end() && it->second.sequences_left > 0);
  if (--it->second.sequences_left == 0) live.erase(it);
}

// Once per busy period: the books must balance, and nobody may be left waiting. That
// takes milliseconds for a large cache, so that a request which comes soon goes first.
void Engine::Impl::CheckWhenIdle(int64_t now_ms) {
  constexpr int64_t kQuietMs = 100;
  if (scheduler == nullptr) return;
  if (!Idle() || scheduler->plans_in_flight() > 0) {
    busy = true;
    check_books_ms = kNoDeadline;
  } else if (std::exchange(busy, false)) {
    check_books_ms = now_ms + kQuietMs;
  } else if (now_ms >= check_books_ms) {
    CheckBooks();
  }
}

void Engine::Impl::CheckBooks() {
  check_books_ms = kNoDeadline;
  const absl::Status books = scheduler->CheckIntegrity();
  if (!books.ok()) LogError(books.ToString());
  LOCKSTEP_CHECK(books.ok());
  LOCKSTEP_CHECK(live.empty());
}

void Engine::Impl::ChangeState(EngineState next, const absl::Status& failure) {
  state = next;
  info.whole = next == EngineState::kReady;
  info.state = draining && next != EngineState::kFailed ? EngineState::kDraining : next;
  info.failure = failure;
  {
    const std::lock_guard lock(mutex);
    shared_info = info;
  }
  if (options.on_change) options.on_change(info);
}

void Engine::Impl::Snapshot() {
  const SchedulerStats stats = scheduler != nullptr ? scheduler->Stats() : SchedulerStats{};
  observer->OnStats(stats, info);
  const std::lock_guard lock(mutex);
  shared_stats = stats;
  shared_info.last_step_ms = info.last_step_ms;
  if (draining && Idle()) {
    drained = true;
    idle_changed.notify_all();
  }
}

Engine::Engine(EngineOptions options, std::unique_ptr<WorkerGroup> group,
               std::shared_ptr<EngineObserver> observer)
    : impl_(std::make_unique<Impl>(std::move(options), std::move(group), std::move(observer))) {}

Engine::~Engine() { Shutdown(); }

void Engine::Start() {
  Impl* const impl = impl_.get();
  impl->thread = std::thread([impl] { impl->Run(); });
  impl->group->Start([impl](GroupEvent event) {
    std::visit([impl](auto& e) { impl->inbox.Push(std::move(e)); }, event);
  });
}

absl::StatusOr<RequestId> Engine::Submit(Request request, std::shared_ptr<RequestSink> sink) {
  const RequestId id(impl_->next_request.fetch_add(1, std::memory_order_relaxed));
  request.id = id;
  const absl::Status taken = impl_->inbox.Submit({std::move(request), std::move(sink)});
  if (!taken.ok()) return taken;
  return id;
}

void Engine::Cancel(RequestId request) { impl_->inbox.Push(CancelCommand{request}); }

void Engine::Stop(SequenceId sequence) { impl_->inbox.Push(StopCommand{sequence}); }

int64_t Engine::NowMs() const { return ToMs(Clock::now()); }

EngineInfo Engine::Info() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->shared_info;
}

SchedulerStats Engine::Stats() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->shared_stats;
}

void Engine::Drain(int64_t timeout_ms) {
  if (impl_->thread.joinable()) {
    impl_->inbox.RefuseForGood(absl::UnavailableError("the server is draining"), DrainCommand{});
    std::unique_lock lock(impl_->mutex);
    impl_->idle_changed.wait_until(lock, Clock::now() + std::chrono::milliseconds(timeout_ms),
                                   [this] { return impl_->drained; });
  }
  Shutdown();
}

void Engine::Shutdown() {
  if (!impl_->thread.joinable()) return;
  impl_->inbox.RefuseForGood(absl::UnavailableError("the server is shutting down"), CloseCommand{});
  impl_->thread.join();
  impl_->group->Shutdown();
}

}  // namespace lockstep
