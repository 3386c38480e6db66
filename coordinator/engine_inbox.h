// What other threads may tell the engine thread: a queue in arrival order with
// one waiter. Submissions are bounded by `capacity`; cancels, stops and group
// events always fit (they are bounded by the requests and steps they speak of).
// Thread-safe. The waiter sleeps on a condition: an idle engine costs nothing.
#ifndef LOCKSTEP_COORDINATOR_ENGINE_INBOX_H_
#define LOCKSTEP_COORDINATOR_ENGINE_INBOX_H_

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "coordinator/request.h"
#include "coordinator/worker_group.h"

namespace lockstep {

class RequestSink;

struct Submission {
  Request request;
  std::shared_ptr<RequestSink> sink;
};
struct CancelCommand {
  RequestId request;
};
struct StopCommand {
  SequenceId sequence;
};
struct DrainCommand {};  // no submission follows it
struct CloseCommand {};  // nothing follows it
using InboxItem = std::variant<Submission, CancelCommand, StopCommand, DrainCommand, CloseCommand,
                               GroupFormed, GroupStep, GroupFailed>;

class EngineInbox {
 public:
  using Clock = std::chrono::steady_clock;

  explicit EngineInbox(size_t capacity) : capacity_(capacity) {}

  // Submissions are answered with `why` until it is OK again.
  void Refuse(const absl::Status& why) {
    const std::lock_guard lock(mutex_);
    if (!final_) refusal_ = why;
  }

  absl::Status Submit(Submission submission) {
    const std::lock_guard lock(mutex_);
    if (!refusal_.ok()) return refusal_;
    if (num_submissions_ >= capacity_) {
      return absl::ResourceExhaustedError(
          absl::StrCat("the server is full: ", capacity_, " requests await admission"));
    }
    ++num_submissions_;
    PushLocked(std::move(submission));
    return absl::OkStatus();
  }

  void Push(InboxItem item) {
    const std::lock_guard lock(mutex_);
    PushLocked(std::move(item));
  }

  // `item` is the last of its kind of change: `why` answers submissions for good.
  void RefuseForGood(const absl::Status& why, InboxItem item) {
    const std::lock_guard lock(mutex_);
    final_ = true;
    refusal_ = why;
    PushLocked(std::move(item));
  }

  // Waits until there is something or `wake_at` has come; replaces *items.
  void WaitAndTake(Clock::time_point wake_at, std::vector<InboxItem>* items) {
    items->clear();
    std::unique_lock lock(mutex_);
    const auto pending = [this] { return !items_.empty(); };
    if (wake_at == Clock::time_point::max()) {
      ready_.wait(lock, pending);
    } else {
      ready_.wait_until(lock, wake_at, pending);
    }
    items_.swap(*items);
    num_submissions_ = 0;
  }

 private:
  void PushLocked(InboxItem item) {
    items_.push_back(std::move(item));
    if (items_.size() == 1) ready_.notify_one();
  }

  const size_t capacity_;
  std::mutex mutex_;
  std::condition_variable ready_;
  std::vector<InboxItem> items_;  // guarded by mutex_, as what follows
  size_t num_submissions_ = 0;
  absl::Status refusal_;
  bool final_ = false;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_ENGINE_INBOX_H_
