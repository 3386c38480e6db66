// A worker group under a test's control. Plans are answered at once, or held
// until the test answers them. Thread-safe.
#ifndef LOCKSTEP_TESTS_FAKES_FAKE_GROUP_H_
#define LOCKSTEP_TESTS_FAKES_FAKE_GROUP_H_

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "coordinator/worker_group.h"
#include "tests/fakes/fake_slots.h"

namespace lockstep {

// Shared between the test and the group that the engine owns.
class FakeGroupControl {
 public:
  uint32_t num_kv_blocks = 64;
  uint32_t max_num_seqs = 8;
  uint32_t block_size = 4;

  // Forms the next epoch.
  void Form() {
    GroupFormed formed;
    EventSinkCopy sink;
    {
      const std::lock_guard lock(mutex_);
      formed = {++epoch_, num_kv_blocks, max_num_seqs, {RankReport{}}};
      slots_ = std::make_unique<FakeSlots>(block_size);
      open_ = true;
      held_plans_.clear();
      sink = sink_;
    }
    sink(std::move(formed));
  }

  void Fail(const std::string& reason, bool fatal = false) {
    GroupFailed failed;
    EventSinkCopy sink;
    {
      const std::lock_guard lock(mutex_);
      open_ = false;
      failed = {epoch_, 1, absl::UnavailableError(reason), fatal};
      sink = sink_;
    }
    sink(std::move(failed));
  }

  // Letting go answers what is held, in order.
  void Hold(bool hold) {
    const std::lock_guard lock(mutex_);
    hold_ = hold;
    if (hold || !open_) return;
    for (const StepPlan& plan : held_plans_) AnswerLocked(plan);
    held_plans_.clear();
  }

  // Answers `n` held plans, waiting for them to be sent.
  void Answer(int n) {
    for (int i = 0; i < n; ++i) {
      std::unique_lock lock(mutex_);
      changed_.wait_for(lock, kPatience, [this] { return !held_plans_.empty(); });
      if (held_plans_.empty()) return;
      const StepPlan plan = held_plans_.front();
      held_plans_.pop_front();
      AnswerLocked(plan);
    }
  }

  bool WaitForHeldPlans(size_t n) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, kPatience, [this, n] { return held_plans_.size() >= n; });
  }

  // FailEpoch is noted, but not answered; Fail() does it.
  void HoldFailure(bool hold) {
    const std::lock_guard lock(mutex_);
    hold_failure_ = hold;
  }
  bool WaitForFailEpoch() {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, kPatience, [this] { return failed_epochs_ > 0; });
  }

  // The next answers carry a token that is not in the vocabulary.
  void Lie(bool lie) {
    const std::lock_guard lock(mutex_);
    lie_ = lie;
  }

  std::vector<StepPlan> plans() const {
    const std::lock_guard lock(mutex_);
    return plans_;
  }
  int failed_epochs() const {  // by FailEpoch
    const std::lock_guard lock(mutex_);
    return failed_epochs_;
  }
  bool shut_down() const {
    const std::lock_guard lock(mutex_);
    return shut_down_;
  }
  std::string complaint() const {
    const std::lock_guard lock(mutex_);
    return complaint_;
  }

 private:
  friend class FakeGroup;
  using EventSinkCopy = WorkerGroup::EventSink;
  static constexpr std::chrono::seconds kPatience{20};

  void AnswerLocked(const StepPlan& plan) {
    GroupStep step;
    step.result = slots_->Run(plan);
    if (complaint_.empty()) complaint_ = slots_->complaint();
    if (complaint_.empty() && step.result.digest != plan.digest) complaint_ = "digests differ";
    if (lie_ && !step.result.sampled.empty()) step.result.sampled[0].token = kFakeVocab;
    step.timings.resize(1);
    sink_(std::move(step));
  }

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  WorkerGroup::EventSink sink_;
  std::unique_ptr<FakeSlots> slots_;
  std::deque<StepPlan> held_plans_;
  std::vector<StepPlan> plans_;
  std::string complaint_;
  uint64_t epoch_ = 0;
  bool open_ = false;
  bool hold_ = false;
  bool lie_ = false;
  bool hold_failure_ = false;
  bool shut_down_ = false;
  int failed_epochs_ = 0;
};

class FakeGroup final : public WorkerGroup {
 public:
  explicit FakeGroup(std::shared_ptr<FakeGroupControl> control) : control_(std::move(control)) {}

  void Start(EventSink sink) override {
    const std::lock_guard lock(control_->mutex_);
    control_->sink_ = std::move(sink);
  }

  void Send(const StepPlan& plan) override {
    const std::lock_guard lock(control_->mutex_);
    control_->plans_.push_back(plan);
    if (!control_->open_ || plan.epoch != control_->epoch_) return;
    if (control_->hold_) {
      control_->held_plans_.push_back(plan);
      control_->changed_.notify_all();
    } else {
      control_->AnswerLocked(plan);
    }
  }

  void FailEpoch(uint64_t epoch, const absl::Status& reason) override {
    const std::lock_guard lock(control_->mutex_);
    ++control_->failed_epochs_;
    control_->changed_.notify_all();
    if (control_->hold_failure_ || !control_->open_ || epoch != control_->epoch_) return;
    control_->open_ = false;
    control_->sink_(GroupFailed{epoch, 0, absl::UnavailableError(reason.message()), false});
  }

  void Shutdown() override {
    const std::lock_guard lock(control_->mutex_);
    control_->shut_down_ = true;
    control_->sink_ = [](const GroupEvent&) {};
  }

 private:
  const std::shared_ptr<FakeGroupControl> control_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_FAKES_FAKE_GROUP_H_
