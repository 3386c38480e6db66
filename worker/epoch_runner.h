// The part of a worker that computes: one thread that takes an epoch from
// Configure to its end. The session's threads feed it; they never wait for it.
//
//   OnConfigure --> load --> join --> Ready --> step, step, ... --> (closed) --> release
//
// A newer Configure, OnClose or Fence ends the epoch at once from the outside:
// plans are dropped, the communicator is aborted, the address exchange is
// cancelled. The thread then has until release_deadline() to come back from
// whatever it is in, and lets go of the communicator. Loading weights is not
// waited for: it touches nothing of the epoch, and the next one wants the same.
//
// Up to kMaxPlansInFlight plans are submitted before the first one's result is
// back: a device is never without its next step. While any is, the thread polls.
//
// What is sent carries the stream it belongs to, so that an answer never reaches
// a coordinator that did not ask.
#ifndef LOCKSTEP_WORKER_EPOCH_RUNNER_H_
#define LOCKSTEP_WORKER_EPOCH_RUNNER_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "proto/worker.pb.h"
#include "worker/comm/rank_communicator.h"
#include "worker/device_trace.h"
#include "worker/model_host.h"
#include "worker/step_profile.h"
#include "worker/stream_exchange.h"

namespace lockstep {

struct EpochRunnerOptions {
  std::string collective_library;  // for Ready
  bool terminal = false;           // progress as a bar on stderr
  int64_t release_timeout_ms = 0;
  std::function<std::unique_ptr<RankCommunicator>(const CommunicatorOptions&)> make_communicator;
  // Told when an epoch is ready to step, before the coordinator is; may be empty.
  std::function<void()> on_ready;
  // Asked when the first profile begins; empty where there is no device to trace.
  std::function<absl::StatusOr<std::unique_ptr<DeviceTrace>>()> open_trace;
};

class EpochRunner {
 public:
  using Clock = std::chrono::steady_clock;
  using StreamId = uint64_t;
  // Drops what belongs to a stream that is gone. Any thread; may block for as
  // long as the stream takes to break.
  using Send = std::function<void(StreamId, const worker::v1::WorkerMessage&)>;

  EpochRunner(EpochRunnerOptions options, std::unique_ptr<ModelHost> host, Send send);
  // Waits for the thread: call Stop first where that may take for ever.
  ~EpochRunner();

  // Of the reader's thread. `bind_address`: what other ranks can reach.
  void OnConfigure(StreamId stream, const worker::v1::Configure& configure,
                   const std::string& bind_address);
  void OnPlan(StreamId stream, const worker::v1::StepPlan& plan, uint64_t received_ns);
  void OnCommKey(const worker::v1::CommKey& key);
  void OnClose(StreamId stream, uint64_t epoch);
  void OnProfileStart(StreamId stream, const worker::v1::ProfileStart& start);

  // Any thread. Ends the epoch without an answer: nobody is there to read it.
  void Fence();
  // Fences and asks the thread to end. False: it is still busy after `bound`.
  bool Stop(std::chrono::milliseconds bound);
  // Set while a closed epoch has not been let go of.
  std::optional<Clock::time_point> release_deadline() const;
  uint64_t epoch() const;  // 0: none
  uint64_t last_step() const;
  bool loading() const;
  int loaded_rank() const { return host_->loaded_rank(); }
  uint64_t held_bytes() const { return host_->held_bytes(); }

 private:
  struct Epoch;
  // At most one; its fields are guarded by the mutex but for `steps`, the thread's.
  struct Profile {
    Profile(StreamId s, const worker::v1::ProfileStart& start)
        : stream(s), plans_left(start.steps()), steps(start.id()) {}
    const StreamId stream;
    uint32_t plans_left;   // that will be part of it
    uint32_t pending = 0;  // that are, and have not been collected
    bool begun = false;    // of the thread alone
    StepProfile steps;
  };
  struct Plan {
    std::shared_ptr<Epoch> epoch;
    StepPlan plan;
    uint64_t received_ns = 0;
    std::shared_ptr<Profile> profile;  // that it is part of; null: none
    uint64_t submitted_ns = 0;
  };

  void Loop();
  void Start(Epoch& epoch);
  absl::Status Form(Epoch& epoch, worker::v1::Ready* ready);
  void SendProgress(uint64_t done, uint64_t total);
  absl::Status CompareModels(Epoch& epoch, uint64_t digest);
  void Submit(Plan plan);
  // A profile's plans are in flight with no others. The mutex is held.
  bool MaySubmit() const;
  bool ProfileIsOver() const;
  void FinishProfile(Profile& profile);
  void Collect();
  // Computes meanwhile: until a step is done or something else asks for the thread.
  void AwaitDevice();
  void Release(Epoch& epoch);
  // Ends current_, if any. `answer`: with Released.
  void EndCurrent(bool answer);
  void Fail(Epoch& epoch, uint64_t step, const absl::Status& status, bool recoverable);
  void SendReleased(StreamId stream, uint64_t epoch);
  // The mutex is held.
  void Notify();

  const EpochRunnerOptions options_;
  const std::unique_ptr<ModelHost> host_;  // of the thread, but for its getters
  const Send send_;

  mutable std::mutex mutex_;  // guards the fields below; never held while sending or computing
  std::condition_variable changed_;
  std::shared_ptr<Epoch> current_;  // open; null: none
  std::shared_ptr<Epoch> running_;  // the thread's; closed ones included
  std::deque<Plan> plans_;          // of current_, waiting: at most kMaxPlansInFlight
  std::deque<Plan> in_flight_;      // submitted, not collected; of the thread alone
  // Changed, since the thread last looked: it polls a device without the mutex.
  std::atomic<bool> attention_{false};
  std::shared_ptr<Profile> profile_;    // asked for, not answered
  std::unique_ptr<DeviceTrace> trace_;  // of the thread alone, as what follows
  std::shared_ptr<Profile> tracing_;    // begun, not finished
  bool loading_ = false;
  bool stop_ = false;
  bool ended_ = false;
  uint64_t last_step_ = 0;
  std::optional<Clock::time_point> release_deadline_;

  std::thread thread_;  // last: runs on all of the above
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_EPOCH_RUNNER_H_
