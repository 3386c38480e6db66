// An address exchange among the threads of a process, where one has all ranks.
#ifndef LOCKSTEP_WORKER_COMM_MEMORY_EXCHANGE_H_
#define LOCKSTEP_WORKER_COMM_MEMORY_EXCHANGE_H_

#include <condition_variable>
#include <map>
#include <mutex>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/comm/rank_communicator.h"

namespace lockstep {

class MemoryExchange final : public AddressExchange {
 public:
  absl::Status Publish(const std::string& key, const std::string& value) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    values_[key] = value;
    changed_.notify_all();
    return absl::OkStatus();
  }
  absl::StatusOr<std::string> Await(const std::string& key) override {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return cancelled_ || values_.count(key) > 0; });
    if (cancelled_) return absl::AbortedError("exchange: cancelled");
    return values_[key];
  }
  void Cancel() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    cancelled_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, std::string> values_;
  bool cancelled_ = false;
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_COMM_MEMORY_EXCHANGE_H_
