// An engine that replays scripts: each request's sequences emit given tokens,
// on an engine thread, one token a sequence a tick. It keeps the contract of
// EngineClient (ending tokens, max_tokens, Stop, Cancel, deadlines) and
// remembers what it was told.
//
//   ScriptedEngine engine;
//   engine.script = [](const Request&) { return Script{.tokens = {{5, 6, 7}}}; };
//   engine.Hold();  ... engine.Tick(2);   // tokens only when told to
#ifndef LOCKSTEP_TESTS_COORDINATOR_API_SCRIPTED_ENGINE_H_
#define LOCKSTEP_TESTS_COORDINATOR_API_SCRIPTED_ENGINE_H_

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "coordinator/engine_client.h"

namespace lockstep {

struct Script {
  // Tokens per sequence; the last list serves all further ones. Beyond its end
  // the last token repeats, so that max_tokens ends it.
  std::vector<std::vector<TokenId>> tokens = {{}};
  uint32_t cached_tokens = 0;
  // After so many ticks the request fails with `failure`.
  std::optional<uint32_t> fail_after = {};
  absl::Status failure = {};
  bool rejected = false;  // ... and was never admitted
};

class ScriptedEngine : public EngineClient {
 public:
  ScriptedEngine();
  ~ScriptedEngine() override;

  // Set by the test before requests come, called by a door's thread.
  class Scripts {
   public:
    template <typename F>
    void operator=(F next) {
      const std::lock_guard lock(mutex_);
      next_ = std::move(next);
    }
    Script operator()(const Request& request) const {
      const std::lock_guard lock(mutex_);
      return next_(request);
    }

   private:
    mutable std::mutex mutex_;
    std::function<Script(const Request&)> next_ = [](const Request&) { return Script{}; };
  } script;
  std::function<absl::Status(const Request&)> on_submit;  // a refusal at the inbox

  void Hold();                // no tick but those given
  void Tick(uint32_t count);  // gives ticks to every request
  void Release();             // ticks without end
  void SetState(EngineState state, absl::Status failure = absl::OkStatus());
  void SetRoom(uint32_t max_num_seqs, uint32_t max_queued_requests);
  void SetStats(const SchedulerStats& stats);
  void SetRanks(std::vector<RankReport> ranks);

  // What happened; the waits are bounded, and false is a failure.
  std::vector<Request> submitted() const;
  std::vector<RequestId> cancelled() const;
  std::vector<SequenceId> stopped() const;
  bool WaitSubmitted(size_t count) const;
  bool WaitCancelled(size_t count) const;
  bool WaitStopped(size_t count) const;
  bool WaitIdle() const;  // nothing runs

  absl::StatusOr<RequestId> Submit(Request request, std::shared_ptr<RequestSink> sink) override;
  void Cancel(RequestId request) override;
  void Stop(SequenceId sequence) override;
  int64_t NowMs() const override;
  EngineInfo Info() const override;
  SchedulerStats Stats() const override;

 private:
  struct Live {
    Request request;
    std::shared_ptr<RequestSink> sink;
    Script script;
    bool started = false;
    uint32_t ticks = 0;
    std::vector<bool> ended;
    std::vector<uint32_t> counts;
  };

  void Run();
  // One token for every live sequence of `live`; false when the request is over.
  bool Advance(Live* live);
  template <typename Condition>
  bool WaitFor(Condition condition) const;

  mutable std::mutex mutex_;  // guards what follows
  mutable std::condition_variable changed_;
  std::map<RequestId, Live> live_;
  std::vector<Request> submitted_;
  std::vector<RequestId> cancelled_;
  std::vector<SequenceId> stopped_;
  std::optional<uint64_t> ticks_left_;  // absent: without end
  bool closing_ = false;
  uint64_t next_id_ = 1;
  EngineInfo info_;
  SchedulerStats stats_;
  std::thread thread_;
};

// The log-probabilities that the script gives a token: made up, but a function
// of the token alone, so that tests can say them again.
TokenLogprobs ScriptedLogprobs(TokenId token, int32_t alternatives);

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_COORDINATOR_API_SCRIPTED_ENGINE_H_
