#include "worker/epoch_runner.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/log.h"
#include "wire/codec.h"
#include "wire/protocol.h"
#include "worker/load_progress.h"

namespace lockstep {

using worker::v1::WorkerMessage;

struct EpochRunner::Epoch {
  Epoch(StreamId s, const worker::v1::Configure& c, std::string bind, StreamExchange::Send send)
      : stream(s),
        number(c.epoch()),
        configure(c),
        bind_address(std::move(bind)),
        exchange(c.epoch(), std::move(send)) {}

  const StreamId stream;
  const uint64_t number;
  const worker::v1::Configure configure;
  const std::string bind_address;
  StreamExchange exchange;
  std::atomic<bool> closed{false};
  std::atomic<bool> failed{false};
  bool answer = false;  // with Released, once released; guarded by the runner's mutex
  // Set under the runner's mutex, unless closed; shared with whoever aborts it.
  std::shared_ptr<RankCommunicator> communicator;
};

namespace {

uint64_t NowNs() {
  return static_cast<uint64_t>(
      std::chrono::nanoseconds(EpochRunner::Clock::now().time_since_epoch()).count());
}

double SecondsSince(EpochRunner::Clock::time_point start) {
  return std::chrono::duration<double>(EpochRunner::Clock::now() - start).count();
}

// A start that failed like this may succeed in another epoch.
bool MayRecover(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsAborted(status) ||
         absl::IsDeadlineExceeded(status) || absl::IsCancelled(status);
}

}  // namespace

EpochRunner::EpochRunner(EpochRunnerOptions options, std::unique_ptr<ModelHost> host, Send send)
    : options_(std::move(options)), host_(std::move(host)), send_(std::move(send)) {
  thread_ = std::thread([this] { Loop(); });
}

EpochRunner::~EpochRunner() {
  (void)Stop(std::chrono::milliseconds(0));
  thread_.join();
}

void EpochRunner::OnConfigure(StreamId stream, const worker::v1::Configure& configure,
                              const std::string& bind_address) {
  EndCurrent(false);
  auto epoch = std::make_shared<Epoch>(
      stream, configure, bind_address,
      [this, stream](const WorkerMessage& message) { send_(stream, message); });
  if (absl::Status valid = CheckConfigure(configure); !valid.ok()) {
    return Fail(*epoch, 0, valid, false);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  current_ = std::move(epoch);
  last_step_ = 0;
  Notify();
}

void EpochRunner::OnPlan(StreamId stream, const worker::v1::StepPlan& plan, uint64_t received_ns) {
  absl::StatusOr<StepPlan> decoded = wire::Decode(plan);
  std::shared_ptr<Epoch> epoch;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (current_ == nullptr || current_->stream != stream || current_->number != plan.epoch()) {
      return;  // stale
    }
    epoch = current_;
    if (epoch->failed) return;
    if (decoded.ok() && plans_.size() < wire::kMaxPlansInFlight) {
      plans_.push_back({epoch, *std::move(decoded), received_ns, nullptr, 0});
      if (profile_ != nullptr && profile_->plans_left > 0) {
        plans_.back().profile = profile_;
        --profile_->plans_left;
        ++profile_->pending;
      }
      Notify();
      return;
    }
  }
  const std::string what = decoded.ok()
                               ? absl::StrCat("more than ", wire::kMaxPlansInFlight, " wait")
                               : std::string(decoded.status().message());
  Fail(*epoch, plan.step(), absl::InvalidArgumentError(absl::StrCat("plan: ", what)), true);
}

void EpochRunner::OnCommKey(const worker::v1::CommKey& key) {
  std::shared_ptr<Epoch> epoch;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (current_ == nullptr || current_->number != key.epoch()) return;  // stale
    epoch = current_;
  }
  if (!epoch->exchange.Deliver(key)) {
    Fail(*epoch, 0, absl::InvalidArgumentError("communicator key: above the protocol's bounds"),
         true);
  }
}

void EpochRunner::OnClose(StreamId stream, uint64_t epoch) {
  if (this->epoch() == epoch) return EndCurrent(true);
  SendReleased(stream, epoch);  // there is nothing to let go of
}

void EpochRunner::OnProfileStart(StreamId stream, const worker::v1::ProfileStart& start) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (start.steps() == 0) {
      if (profile_ == nullptr || profile_->steps.id() != start.id()) return;  // answered already
      profile_->plans_left = 0;
      return Notify();
    }
    if (current_ != nullptr && profile_ == nullptr) {
      worker::v1::ProfileStart bounded = start;
      bounded.set_steps(std::min(start.steps(), wire::kMaxProfileSteps));
      profile_ = std::make_shared<Profile>(stream, bounded);
      return;
    }
  }
  WorkerMessage message;
  message.mutable_profile()->set_id(start.id());
  message.mutable_profile()->set_last(true);
  message.mutable_profile()->set_note("another profile is not over, or there is no epoch");
  send_(stream, message);
}

void EpochRunner::Fence() { EndCurrent(false); }

void EpochRunner::EndCurrent(bool answer) {
  std::shared_ptr<Epoch> epoch;
  std::shared_ptr<RankCommunicator> communicator;
  bool answer_now = false;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (current_ == nullptr) return;
    epoch = std::exchange(current_, nullptr);
    plans_.clear();
    profile_.reset();
    epoch->closed = true;
    communicator = epoch->communicator;
    const bool held = epoch == running_ && !loading_;
    answer_now = answer && !held;
    epoch->answer = answer && held;
    if (held) {
      release_deadline_ = Clock::now() + std::chrono::milliseconds(options_.release_timeout_ms);
    }
    Notify();
  }
  epoch->exchange.Cancel();
  if (communicator != nullptr) communicator->Abort();
  if (answer_now) SendReleased(epoch->stream, epoch->number);
}

bool EpochRunner::Stop(std::chrono::milliseconds bound) {
  EndCurrent(false);
  std::unique_lock<std::mutex> lock(mutex_);
  stop_ = true;
  Notify();
  return changed_.wait_for(lock, bound, [this] { return ended_; });
}

std::optional<EpochRunner::Clock::time_point> EpochRunner::release_deadline() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return release_deadline_;
}

uint64_t EpochRunner::epoch() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return current_ == nullptr ? 0 : current_->number;
}

bool EpochRunner::loading() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return loading_;
}

uint64_t EpochRunner::last_step() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return last_step_;
}

void EpochRunner::Notify() {
  attention_ = true;
  changed_.notify_all();
}

void EpochRunner::Loop() {
  pthread_setname_np(pthread_self(), "runner");
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] {
      return stop_ || !plans_.empty() || !in_flight_.empty() ||
             (running_ != nullptr && running_->closed) || current_ != running_ || ProfileIsOver();
    });
    attention_ = false;
    if (running_ != nullptr && (running_->closed || stop_)) {
      const std::shared_ptr<Epoch> epoch = running_;
      lock.unlock();
      Release(*epoch);
      lock.lock();
    } else if (stop_) {
      break;
    } else if (current_ != running_) {
      running_ = current_;
      loading_ = true;  // from here on: a load may be closed long before it ends
      const std::shared_ptr<Epoch> epoch = running_;
      lock.unlock();
      Start(*epoch);
      lock.lock();
    } else if (!in_flight_.empty() && host_->Done()) {
      lock.unlock();
      Collect();
      lock.lock();
    } else if (ProfileIsOver()) {
      const std::shared_ptr<Profile> profile = std::exchange(profile_, nullptr);
      lock.unlock();
      FinishProfile(*profile);
      lock.lock();
    } else if (MaySubmit()) {
      Plan plan = std::move(plans_.front());
      plans_.pop_front();
      lock.unlock();
      Submit(std::move(plan));
      lock.lock();
    } else {
      lock.unlock();
      AwaitDevice();
      lock.lock();
    }
  }
  ended_ = true;
  Notify();
}

bool EpochRunner::MaySubmit() const {
  if (plans_.empty() || in_flight_.size() >= wire::kMaxPlansInFlight) return false;
  return in_flight_.empty() || in_flight_.back().profile == plans_.front().profile;
}

bool EpochRunner::ProfileIsOver() const {
  return profile_ != nullptr && profile_->plans_left == 0 && profile_->pending == 0;
}

void EpochRunner::FinishProfile(Profile& profile) {
  tracing_.reset();
  profile.steps.Finish([&](const WorkerMessage& message) { send_(profile.stream, message); });
}

void EpochRunner::AwaitDevice() {
  while (!attention_ && !host_->Done()) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

void EpochRunner::Release(Epoch& epoch) {
  in_flight_.clear();
  if (!host_->End()) {
    // Not let go of: the session sees the deadline pass and ends the process.
    const std::lock_guard<std::mutex> lock(mutex_);
    release_deadline_ = Clock::now();
    running_ = nullptr;
    return;
  }
  if (tracing_ != nullptr) std::exchange(tracing_, nullptr)->steps.Abandon();
  std::shared_ptr<RankCommunicator> communicator;
  bool answer = false;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    communicator = std::move(epoch.communicator);
    answer = epoch.answer;
    running_ = nullptr;
  }
  communicator.reset();  // closes its connections
  if (answer) SendReleased(epoch.stream, epoch.number);
  const std::lock_guard<std::mutex> lock(mutex_);
  release_deadline_.reset();
}

void EpochRunner::Start(Epoch& epoch) {
  SetLogRank(static_cast<int>(epoch.configure.rank()));
  const Clock::time_point start = Clock::now();
  WorkerMessage message;
  worker::v1::Ready* ready = message.mutable_ready();
  const absl::Status formed = Form(epoch, ready);
  if (!formed.ok()) return Fail(epoch, 0, formed, MayRecover(formed));
  ready->set_epoch(epoch.number);
  ready->set_rank(epoch.configure.rank());
  if (options_.on_ready) options_.on_ready();
  send_(epoch.stream, message);
  LogInfo(absl::StrCat("epoch ", epoch.number, ": ready after ",
                       static_cast<int64_t>(1e3 * SecondsSince(start)), " ms"));
}

// Of the load under way to whoever waits for it: it may outlive the epoch that began it.
void EpochRunner::SendProgress(uint64_t done, uint64_t total) {
  std::shared_ptr<Epoch> waiting;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    waiting = current_;
  }
  if (waiting == nullptr) return;
  WorkerMessage message;
  message.mutable_progress()->set_epoch(waiting->number);
  message.mutable_progress()->set_bytes_done(done);
  message.mutable_progress()->set_bytes_total(total);
  send_(waiting->stream, message);
}

absl::Status EpochRunner::Form(Epoch& epoch, worker::v1::Ready* ready) {
  const auto add_phase = [&](const std::string& name, double seconds) {
    worker::v1::LoadPhase* phase = ready->add_phases();
    phase->set_name(name);
    phase->set_seconds(seconds);
  };
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    loading_ = !epoch.closed;
    if (epoch.closed) return absl::AbortedError("the epoch was closed before it was loaded");
  }
  LoadProgressReport progress(epoch.configure.rank(), options_.terminal,
                              [this](uint64_t done, uint64_t total) { SendProgress(done, total); });
  const absl::StatusOr<LoadReport> loaded = host_->Load(
      epoch.configure, [&](uint64_t done, uint64_t total) { progress.Update(done, total); });
  CommunicatorOptions options;
  options.id = epoch.configure.communicator();
  options.rank = static_cast<int>(epoch.configure.rank());
  options.size = static_cast<int>(epoch.configure.tp_size());
  options.bind_address = epoch.bind_address;
  options.max_skew_ms = static_cast<int64_t>(epoch.configure.max_skew_ms());
  std::shared_ptr<RankCommunicator> communicator;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    loading_ = false;
    if (!loaded.ok()) return loaded.status();
    if (epoch.closed) return absl::AbortedError("the epoch was closed while loading");
    options.shared_bytes = loaded->shared_bytes;
    communicator = epoch.communicator = options_.make_communicator(options);
  }
  for (const auto& [name, seconds] : loaded->phases) add_phase(name, seconds);
  Clock::time_point start = Clock::now();
  if (absl::Status same = CompareModels(epoch, loaded->model_digest); !same.ok()) return same;
  add_phase("other ranks", SecondsSince(start));
  start = Clock::now();
  if (absl::Status joined = communicator->Join(epoch.exchange); !joined.ok()) return joined;
  add_phase("communicator", SecondsSince(start));
  start = Clock::now();
  if (absl::Status begun = host_->Begin(epoch.number, communicator.get()); !begun.ok()) {
    return begun;
  }
  // What was aborted meanwhile may have begun all the same.
  if (epoch.closed || epoch.failed) return absl::AbortedError("the epoch was closed as it began");
  add_phase("kv", SecondsSince(start));
  ready->set_weight_bytes(loaded->weight_bytes);
  ready->set_checkpoint_bytes(loaded->checkpoint_bytes);
  ready->set_kv_bytes(loaded->kv_bytes);
  if (loaded->activation_bytes) ready->set_activation_bytes(*loaded->activation_bytes);
  if (loaded->runtime_bytes) ready->set_runtime_bytes(*loaded->runtime_bytes);
  if (const auto bytes = communicator->buffer_bytes()) ready->set_communication_bytes(*bytes);
  const std::string library = communicator->library();
  ready->set_collective_library(library.empty() ? options_.collective_library : library);
  ready->set_shard(loaded->shard);
  return absl::OkStatus();
}

// Also where a rank waits until the slowest one has loaded.
absl::Status EpochRunner::CompareModels(Epoch& epoch, uint64_t digest) {
  const auto key = [](uint32_t rank) { return absl::StrCat("model/", rank); };
  const uint32_t rank = epoch.configure.rank();
  const std::string mine = absl::StrCat(absl::Hex(digest, absl::kZeroPad16));
  if (absl::Status sent = epoch.exchange.Publish(key(rank), mine); !sent.ok()) return sent;
  for (uint32_t other = 0; other < epoch.configure.tp_size(); ++other) {
    if (other == rank) continue;
    const absl::StatusOr<std::string> theirs = epoch.exchange.Await(key(other));
    if (!theirs.ok()) return theirs.status();
    if (*theirs != mine) {
      return absl::FailedPreconditionError(
          absl::StrCat(epoch.configure.model_path(), ": rank ", other,
                       " has another model there (config.json or the weights differ)"));
    }
  }
  return absl::OkStatus();
}

void EpochRunner::Submit(Plan plan) {
  Epoch& epoch = *plan.epoch;
  if (epoch.closed || epoch.failed) return;
  if (plan.profile != nullptr && !std::exchange(plan.profile->begun, true)) {
    tracing_ = plan.profile;
    absl::Status opened = absl::OkStatus();
    if (trace_ == nullptr && options_.open_trace) {
      absl::StatusOr<std::unique_ptr<DeviceTrace>> trace = options_.open_trace();
      opened = trace.status();
      if (trace.ok()) trace_ = *std::move(trace);
    }
    plan.profile->steps.Begin(trace_.get(), std::string(opened.message()));
  }
  if (absl::Status status = host_->Submit(plan.plan, plan.received_ns); !status.ok()) {
    return Fail(epoch, plan.plan.step, status, true);
  }
  if (plan.profile != nullptr) plan.submitted_ns = NowNs();
  in_flight_.push_back(std::move(plan));
}

void EpochRunner::Collect() {
  const Plan plan = std::move(in_flight_.front());
  in_flight_.pop_front();
  Epoch& epoch = *plan.epoch;
  const absl::StatusOr<StepResult> result = host_->Collect();
  if (!result.ok()) {
    in_flight_.clear();
    return Fail(epoch, plan.plan.step, result.status(), true);
  }
  WorkerMessage message;
  *message.mutable_result() = wire::Encode(*result);
  if (plan.profile != nullptr) {
    plan.profile->steps.Ran(message.result(), plan.submitted_ns, NowNs());
  }
  send_(epoch.stream, message);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (plan.profile != nullptr) --plan.profile->pending;
  last_step_ = plan.plan.step;
}

// An epoch that was closed meanwhile has nothing to report: whatever went wrong
// is what closing it does.
void EpochRunner::Fail(Epoch& epoch, uint64_t step, const absl::Status& status, bool recoverable) {
  std::shared_ptr<RankCommunicator> communicator;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (epoch.closed || epoch.failed.exchange(true)) return;
    plans_.clear();
    communicator = epoch.communicator;
  }
  WorkerMessage message;
  worker::v1::Failure* failure = message.mutable_failure();
  failure->set_epoch(epoch.number);
  failure->set_step(step);
  failure->set_code(static_cast<uint32_t>(status.code()));
  failure->set_message(std::string(status.message()));
  failure->set_recoverable(recoverable);
  send_(epoch.stream, message);
  LogError(absl::StrCat("epoch ", epoch.number, step == 0 ? "" : absl::StrCat(", step ", step),
                        ": ", std::string(status.message())));
  // After the report: the other ranks' failures are symptoms of this one.
  if (communicator != nullptr) communicator->Abort();
}

void EpochRunner::SendReleased(StreamId stream, uint64_t epoch) {
  WorkerMessage message;
  message.mutable_released()->set_epoch(epoch);
  send_(stream, message);
}

}  // namespace lockstep
