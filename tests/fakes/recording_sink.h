// A request's sink that remembers what it was told, in order, and checks that a
// terminal call is the last. Tests wait for conditions on it.
#ifndef LOCKSTEP_TESTS_FAKES_RECORDING_SINK_H_
#define LOCKSTEP_TESTS_FAKES_RECORDING_SINK_H_

#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "coordinator/engine_client.h"

namespace lockstep {

class RecordingSink final : public RequestSink {
 public:
  explicit RecordingSink(uint32_t n = 1) : sequences_left_(n) {}

  void OnStarted(uint32_t) override {
    Note([this] { ++starts_; });
  }
  void OnPromptLogprobs(uint32_t, std::vector<TokenLogprobs>) override {
    Note([] {});
  }
  void OnToken(uint32_t index, TokenId token, std::optional<TokenLogprobs>) override {
    Note([&] { tokens_[index].push_back(token); });
  }
  void OnFinished(uint32_t index, FinishReason reason, std::optional<TokenId>,
                  uint32_t completion_tokens) override {
    Note([&] {
      if (completion_tokens != tokens_[index].size()) misuse_ = "wrong completion_tokens";
      reasons_[index] = reason;
      if (--sequences_left_ == 0) terminal_ = true;
    });
  }
  void OnFailed(const absl::Status& status) override {
    Note([&] {
      failure_ = status;
      terminal_ = true;
    });
  }
  void OnRejected(const absl::Status& status) override {
    Note([&] {
      failure_ = status;
      terminal_ = rejected_ = true;
    });
  }

  bool WaitForTerminal() {
    return Wait([this] { return terminal_; });
  }
  bool WaitForTokens(size_t n, uint32_t index = 0) {
    return Wait([this, n, index] { return tokens_[index].size() >= n; });
  }

  std::vector<TokenId> tokens(uint32_t index = 0) {
    const std::lock_guard lock(mutex_);
    return tokens_[index];
  }
  std::map<uint32_t, FinishReason> reasons() {
    const std::lock_guard lock(mutex_);
    return reasons_;
  }
  absl::Status failure() {
    const std::lock_guard lock(mutex_);
    return failure_;
  }
  bool rejected() {  // never admitted
    const std::lock_guard lock(mutex_);
    return rejected_;
  }
  bool terminal() {
    const std::lock_guard lock(mutex_);
    return terminal_;
  }
  int starts() {
    const std::lock_guard lock(mutex_);
    return starts_;
  }
  std::string misuse() {  // empty: every rule was kept
    const std::lock_guard lock(mutex_);
    return misuse_;
  }

 private:
  template <typename F>
  void Note(F change) {
    const std::lock_guard lock(mutex_);
    if (terminal_) misuse_ = "a call after the terminal one";
    change();
    changed_.notify_all();
  }
  template <typename F>
  bool Wait(F condition) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(20), condition);
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  uint32_t sequences_left_;
  int starts_ = 0;
  bool terminal_ = false;
  bool rejected_ = false;
  std::map<uint32_t, std::vector<TokenId>> tokens_;
  std::map<uint32_t, FinishReason> reasons_;
  absl::Status failure_;
  std::string misuse_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_FAKES_RECORDING_SINK_H_
