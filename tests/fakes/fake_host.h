// A model host without a model, for tests of the session: every step is one
// all-reduce of the step number; it counts what is asked of it and can be held
// or made to fail.
#ifndef LOCKSTEP_TESTS_FAKES_FAKE_HOST_H_
#define LOCKSTEP_TESTS_FAKES_FAKE_HOST_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "common/check.h"
#include "worker/model_host.h"

namespace lockstep::fakes {

// What a test sees and steers; outlives the host.
class HostControl {
 public:
  struct State {
    int loads = 0, begins = 0, submits = 0, runs = 0, ends = 0;  // calls that were made
    int weights_loaded = 0;  // of the loads: not found in memory
    bool hold_load = false, hold_begin = false, hold_run = false;  // block there while set
    bool hold_done = false;                                        // no step is done while set
    bool in_load = false, in_run = false;
    uint64_t model_digest = 1;
    uint64_t held_bytes = 0;  // as the host says
    absl::Status load_error, begin_error, run_error;
  };

  template <typename Change>
  void Set(Change change) {
    const std::lock_guard<std::mutex> lock(mutex_);
    change(state_);
    changed_.notify_all();
  }
  template <typename Condition>
  bool Await(Condition condition) {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(20), [&] { return condition(state_); });
  }
  State Get() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return state_;
  }
  // Blocks the host's thread while `held` says so.
  template <typename Held>
  State WaitWhile(Held held) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return !held(state_); });
    return state_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  State state_;
};

class FakeHost final : public ModelHost {
 public:
  static constexpr uint64_t kSharedBytes = 12'345;

  explicit FakeHost(std::shared_ptr<HostControl> control) : control_(std::move(control)) {}

  absl::StatusOr<LoadReport> Load(const worker::v1::Configure& configure,
                                  const Progress& progress) override {
    using State = HostControl::State;
    control_->Set([](State& s) { ++s.loads, s.in_load = true; });
    progress(0, 1 << 20);
    const State state = control_->WaitWhile([](const State& s) { return s.hold_load; });
    control_->Set([](State& s) { s.in_load = false; });
    if (!state.load_error.ok()) return state.load_error;
    const std::string key = configure.model_path() + "/" + std::to_string(configure.rank());
    if (key != loaded_) control_->Set([](State& s) { ++s.weights_loaded; });
    loaded_ = key;
    rank_ = static_cast<int>(configure.rank());
    progress(1 << 20, 1 << 20);
    LoadReport report;
    report.weight_bytes = 1 << 20;
    report.kv_bytes = 4096;
    report.shared_bytes = kSharedBytes;
    report.model_digest = state.model_digest;
    report.shard = "everything";
    report.phases = {{"open", 0.25}, {"load", 0.5}};
    return report;
  }

  absl::Status Begin(uint64_t, Communicator* comm) override {
    control_->Set([](auto& s) { ++s.begins; });
    comm_ = comm;
    return control_->WaitWhile([](const auto& s) { return s.hold_begin; }).begin_error;
  }

  absl::Status Submit(const StepPlan& plan, uint64_t plan_received_ns) override {
    submitted_.emplace_back(plan, plan_received_ns);
    control_->Set([](auto& s) { ++s.submits; });
    return absl::OkStatus();
  }
  bool Done() override { return !control_->Get().hold_done; }

  absl::StatusOr<StepResult> Collect() override {
    LOCKSTEP_CHECK(!submitted_.empty());
    const auto [plan, plan_received_ns] = submitted_.front();
    submitted_.pop_front();
    control_->Set([](auto& s) { ++s.runs, s.in_run = true; });
    const auto state = control_->WaitWhile([](const auto& s) { return s.hold_run; });
    control_->Set([](auto& s) { s.in_run = false; });
    if (!state.run_error.ok()) return state.run_error;
    comm_->ResetStats();
    float value = static_cast<float>(plan.step);
    if (absl::Status reduced = comm_->AllReduceSum({&value, 1}); !reduced.ok()) return reduced;
    StepResult result;
    result.epoch = plan.epoch;
    result.step = plan.step;
    result.digest = plan.digest;
    result.num_collectives = comm_->stats().count;
    result.timing.plan_received_ns = plan_received_ns;
    if (comm_->rank() == 0) {
      SampledToken token;
      token.slot = Slot(0);
      token.token = static_cast<TokenId>(value);
      result.sampled.push_back(token);
    }
    return result;
  }

  bool End() override {
    control_->Set([](auto& s) { ++s.ends; });
    submitted_.clear();
    comm_ = nullptr;
    return true;
  }
  int loaded_rank() const override { return rank_; }
  uint64_t held_bytes() const override { return control_->Get().held_bytes; }

 private:
  const std::shared_ptr<HostControl> control_;
  std::string loaded_;
  std::atomic<int> rank_{-1};
  Communicator* comm_ = nullptr;
  std::deque<std::pair<StepPlan, uint64_t>> submitted_;
};

}  // namespace lockstep::fakes

#endif  // LOCKSTEP_TESTS_FAKES_FAKE_HOST_H_
