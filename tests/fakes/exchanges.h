// An address exchange for tests and benchmarks, over a folder, among forked processes.
#ifndef LOCKSTEP_TESTS_FAKES_EXCHANGES_H_
#define LOCKSTEP_TESTS_FAKES_EXCHANGES_H_

#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_replace.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "worker/comm/rank_communicator.h"

namespace lockstep::fakes {

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
