// Address exchanges for tests and benchmarks: among the threads of a process,
// and, over a folder, among forked processes.
#ifndef LOCKSTEP_TESTS_FAKES_EXCHANGES_H_
#define LOCKSTEP_TESTS_FAKES_EXCHANGES_H_

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_replace.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "worker/comm/rank_communicator.h"

namespace lockstep::fakes {

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

class FileExchange final : public AddressExchange {
 public:
  explicit FileExchange(std::string folder) : folder_(std::move(folder)) {}

  absl::Status Publish(const std::string& key, const std::string& value) override {
    const std::string path = Path(key), draft = path + "." + std::to_string(getpid());
    std::ofstream(draft, std::ios::binary) << value;
    std::filesystem::rename(draft, path);
    return absl::OkStatus();
  }
  absl::StatusOr<std::string> Await(const std::string& key) override {
    while (!std::filesystem::exists(Path(key))) {
      if (cancelled_) return absl::AbortedError("exchange: cancelled");
      absl::SleepFor(absl::Milliseconds(1));
    }
    std::ifstream in(Path(key), std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(in), {});
  }
  void Cancel() override { cancelled_ = true; }

 private:
  std::string Path(const std::string& key) const {
    return folder_ + "/" + absl::StrReplaceAll(key, {{"/", "_"}});
  }
  const std::string folder_;
  std::atomic<bool> cancelled_{false};
};

}  // namespace lockstep::fakes

#endif  // LOCKSTEP_TESTS_FAKES_EXCHANGES_H_
